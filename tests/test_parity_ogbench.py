"""Parity with OGBench's own code: the same weights and the same batch give the same losses, gradients and updates.

The numbers in parity/ogbench_*.npz are OGBench's (parity/ogbench_reference.py calls its code at a commit);
parity/ogbench_provenance.json holds its hyper-parameters. Goals are in the batch; how often which goal is drawn for
which row is compared with parity/ogbench_goals.npz, by the last test.

A gradient is read from Adam: after the first update its first moment is mu = (1 - b1) gradient.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import crl, gcbc, gciql, gcivl, hiql, qrl
from common.datasets import Transition
from common.environments import Spec

FOLDER = pathlib.Path(__file__).parent / "parity"
PROVENANCE = json.loads((FOLDER / "ogbench_provenance.json").read_text())
UPDATES = PROVENANCE["updates"]
ADAM_B1 = 0.9
MODULES = {"gcbc": gcbc, "gcivl": gcivl, "gciql": gciql, "hiql": hiql, "qrl": qrl, "crl": crl}
FIELDS = {  # ours for OGBench's names
    "discount": "discount",
    "expectile": "expectile",
    "alpha": "alpha",
    "low_alpha": "alpha_low",
    "high_alpha": "alpha_high",
    "rep_dim": "rep_dim",
    "latent_dim": "latent_dim",
    "eps": "epsilon",
    "actor_loss": "extraction",
    "quasimetric_type": "quasimetric",
}
COLUMNS = {
    "obs": "observations",
    "action": "actions",
    "next_obs": "next_observations",
    "actor_goal": "actor_goals",
    "goal": "value_goals",
    "reward": "rewards",
    "mask": "masks",
    "low_goal": "low_actor_goals",
    "high_goal": "high_actor_goals",
    "subgoal": "high_actor_targets",
    "subgoal_obs": "high_actor_targets",
}
LOSSES = {  # ours is the sum of OGBench's
    "gcbc": {"actor_loss": ["actor/actor_loss"]},
    "gcivl": {"value_loss": ["value/value_loss"], "actor_loss": ["actor/actor_loss"]},
    "gciql": {
        "value_loss": ["value/value_loss"],
        "critic_loss": ["critic/critic_loss"],
        "actor_loss": ["actor/actor_loss"],
    },
    "hiql": {
        "value_loss": ["value/value_loss"],
        "actor_loss": ["low_actor/actor_loss"],
        "high_actor_loss": ["high_actor/actor_loss"],
    },
    "qrl": {
        "distance_loss": ["value/value_loss", "dynamics/dynamics_loss"],
        "multiplier_loss": ["value/lam_loss"],
        "actor_loss": ["actor/actor_loss"],
    },
    "crl": {
        "critic_loss": ["critic/contrastive_loss"],
        "value_loss": ["value/contrastive_loss"],
        "actor_loss": ["actor/actor_loss"],
    },
}
TARGETS = {"gcivl": ["target_value"], "hiql": ["target_value"], "gciql": ["target_critic"]}
NAMES = list(PROVENANCE["config"])


def algorithm(name):
    return PROVENANCE["config"][name]["agent"]


def place(name, network, path):
    """OGBench's name of our parameter `path` of a network."""
    names = [entry.key for entry in path if entry.key not in ("params", "MLP_0", "VmapMLP_0", "linear")]
    algo = algorithm(name)
    if network in ("actor", "high_actor"):
        module = {"hiql": {"actor": "low_actor"}}.get(algo, {}).get(network, network)
        layer = {"Dense_2": ["mean_net"]}.get(names[0], ["actor_net", names[0]])
        if PROVENANCE["config"][name].get("discrete") and names[0] == "Dense_2":
            layer = ["logit_net"]
        return "/".join([f"modules_{module}", *layer, *names[1:]])
    if network == "multiplier":
        return "modules_lam/log_value"
    if algo == "qrl":
        if names[0] == "T":
            return "/".join(["modules_dynamics", *names[1:]])
        return "/".join(["modules_value", *names[1:]]) + ("/value" if names[1:] == ["alpha"] else "")
    if algo == "hiql" and names[0] == "phi":
        return "/".join(["modules_goal_rep", "layers_0", *names[1:]])
    if algo == "crl":
        return "/".join([f"modules_{network}", *names])
    names = names[1:] if names[0] == "v" else names  # HIQL's
    return "/".join([f"modules_{network}", "value_net", *names])


def in_tree(name, network, like, arrays, prefix):
    """OGBench's arrays `prefix/...` in the tree of our parameters; an ensemble of one has no axis there."""

    def leaf(path, old):
        new = arrays[f"{prefix}/{place(name, network, path)}"]
        assert new.size == old.size and new.shape in (old.shape, old.shape[1:]), (network, path, new.shape, old.shape)
        return jnp.asarray(new).reshape(old.shape)

    return jax.tree_util.tree_map_with_path(leaf, like)


@functools.cache
def program(name):
    """OGBench's arrays, our agent with its weights, its batch as ours, and one jitted update."""
    module, options = MODULES[algorithm(name)], PROVENANCE["config"][name]
    fields = {FIELDS[key]: value for key, value in options.items() if key in FIELDS}
    cfg = module.Config(hidden=(8, 8), **fields)
    discrete = options.get("discrete", False)
    spec = Spec(obs_dim=3, action_dim=4 if discrete else 2, discrete=discrete, goal_dim=3)
    with np.load(FOLDER / f"ogbench_{name}.npz") as file:
        arrays = dict(file)
    shapes = jax.eval_shape(module.make_agent(cfg, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))._replace(
        key=jax.random.key(0)
    )
    networks = {}
    for network, old in state._asdict().items():
        if isinstance(old, module.Trainable):
            networks[network] = old._replace(params=in_tree(name, network, old.params, arrays, "params"))
        elif isinstance(old, dict):
            networks[network] = in_tree(name, network, old, arrays, "params")
    columns = {column: arrays[f"batch/{COLUMNS[column]}"] for column in module.Batch._fields}
    if discrete:
        columns["action"] = columns["action"].astype(np.int32)
    batch = module.Batch(**jax.tree.map(jnp.asarray, columns))

    @jax.jit
    def update(learning_rate, tau, state):
        changes = {"learning_rate": learning_rate} | ({"tau": tau} if hasattr(cfg, "tau") else {})
        return module.make_agent(dataclasses.replace(cfg, **changes), spec).update(state, batch)

    act = jax.jit(module.make_agent(cfg, spec).act)
    return arrays, state._replace(**networks), update, act, batch


def trained(state):
    return {name: x for name, x in state._asdict().items() if hasattr(x, "opt_state")}


def assert_close(ours, theirs, rtol=1e-4, atol=1e-6):
    """Sums in another order differ by a share of the largest number of an array."""

    def compare(path, a, b):
        size = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol + 1e-5 * size, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_losses(name):
    arrays, state, update, *_ = program(name)
    info = update(0.0, PROVENANCE["tau"], state)[1]
    losses = LOSSES[algorithm(name)]
    compared = 0
    for ours, theirs in losses.items():
        parts = [arrays[f"loss/{part}"] for part in theirs if f"loss/{part}" in arrays]
        if parts:
            np.testing.assert_allclose(info[ours], sum(parts), rtol=1e-5, err_msg=ours)
            compared += 1
    assert compared == len([key for key in losses if key in info])


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    arrays, state, update, *_ = program(name)
    for network, new in trained(update(0.0, PROVENANCE["tau"], state)[0]).items():
        mu = optax.tree_utils.tree_get(new.opt_state, "mu")
        theirs = in_tree(name, network, mu, arrays, "grad")
        assert_close(jax.tree.map(lambda x: x / (1 - ADAM_B1), mu), theirs)


@pytest.mark.parametrize("name", [name for name in NAMES if algorithm(name) in TARGETS])
def test_polyak_step(name):
    """The other networks stand still: OGBench's targets move towards those from before a step, ours from after it."""
    arrays, state, update, *_ = program(name)
    new = update(0.0, PROVENANCE["tau"], state)[0]
    for network in TARGETS[algorithm(name)]:
        ours = getattr(new, network)
        assert_close(ours, in_tree(name, network, ours, arrays, "polyak"))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qrl_mrn"])
def test_whole_updates(name):
    """Large steps show which networks a loss reads: those from before the update, in all of them.

    MRN reads differences of latents alone, so two of phi's biases have no gradient: Adam makes steps of its rounding.
    """
    arrays, state, update, *_ = program(name)
    for _ in range(UPDATES["number"]):
        state, _ = update(UPDATES["learning_rate"], 0.0, state)
    for network, new in trained(state).items():
        assert_close(new.params, in_tree(name, network, new.params, arrays, "after"), atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_actions(name):
    arrays, state, _, act, _ = program(name)
    obs = np.concatenate([arrays["batch/observations"], arrays["batch/actor_goals"]], axis=-1)
    np.testing.assert_allclose(act(state, obs, jax.random.key(0)), arrays["act"], rtol=1e-5, atol=1e-5)


GOALS = json.loads((FOLDER / "ogbench_goals_provenance.json").read_text())


@pytest.mark.parametrize("name", MODULES)
def test_goals_are_drawn_as_often(name):
    """200,000 of our draws beside a million of OGBench's: shares within 5 standard errors, 0 where OGBench has 0.

    A state is the number of its row. `end` is the last row of each episode.
    """
    module, source = MODULES[name], {"gcbc": "gcivl", "gciql": "gcivl"}.get(name, name)
    shares = GOALS["config"][source]
    fields = {"p_current": shares["value"]["p_curgoal"], "p_future": shares["value"]["p_trajgoal"]}
    fields |= {"actor_p_future": shares["actor"]["p_trajgoal"], "discount": GOALS["discount"]}
    fields |= {"subgoal_steps": GOALS["subgoal_steps"], "batch_size": 200_000}
    if name == "gcbc":  # its only goals are the policy's
        fields["p_future"] = fields["actor_p_future"]
    known = {field.name for field in dataclasses.fields(module.Config)}
    cfg = module.Config(**{key: value for key, value in fields.items() if key in known})
    number = jnp.arange(sum(GOALS["lengths"]))
    obs, end = number[:, None].astype(jnp.float32), np.repeat(np.cumsum(GOALS["lengths"]) - 1, GOALS["lengths"])
    dataset = Transition(obs, number, 0.0 * number, obs + 1, 0.0 * number, end=jnp.asarray(end))
    batch = jax.jit(functools.partial(module.draw, cfg=cfg))(jax.random.key(0), dataset, None)
    with np.load(FOLDER / "ogbench_goals.npz") as file:
        theirs = {key.partition("/")[2]: file[key] for key in file.files if key.startswith(f"{source}/")}
    columns = [column for column in module.Batch._fields if "goal" in column]
    assert columns
    for column in columns:
        ours = np.zeros((len(number), len(number)))
        np.add.at(ours, (np.asarray(batch.obs[:, 0], int), np.asarray(getattr(batch, column)[:, 0], int)), 1)
        table = theirs[COLUMNS.get(column, column)]
        n, m = ours.sum(axis=1, keepdims=True), table.sum(axis=1, keepdims=True)
        share = (ours + table) / (n + m)
        error = np.sqrt(share * (1 - share) * (1 / n + 1 / m))
        assert np.all(np.abs(ours / n - table / m) <= 5 * error), column
