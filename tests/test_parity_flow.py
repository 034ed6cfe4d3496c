"""Parity with the authors' own code of FQL, IFQL and Q-chunking: from the same weights, batch and noise come the same
losses, gradients, targets, whole updates and actions.

The numbers in parity/flow_*.npz are those of their code (parity/flow_reference.py calls it at a commit). How windows
are drawn for Q-chunking is not compared, because there the code differs on purpose: tests/test_qc.py.

A gradient is read from Adam: after the first update its first moment is mu = (1 - b1) gradient.
"""

import dataclasses
import importlib
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import qc
from common.datasets import Transition
from common.environments import Spec

FOLDER = pathlib.Path(__file__).parent / "parity"
PROVENANCE = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("flow_*_provenance.json"))]
CONFIG = {name: options for source in PROVENANCE for name, options in source["config"].items()}
TAU, UPDATES = PROVENANCE[0]["tau"], PROVENANCE[0]["updates"]
ADAM_B1 = 0.9
FILES = {"fql": "fql", "ifql": "ifql", "acfql": "qc"}  # ours for the authors' names
FIELDS = {
    "discount": "discount",
    "alpha": "alpha",
    "expectile": "expectile",
    "flow_steps": "flow_steps",
    "q_agg": "q_agg",
    "num_samples": "num_samples",
    "actor_num_samples": "num_samples",
    "horizon_length": "horizon",
    "actor_type": "policy",
}
VALUES = {"distill-ddpg": "one-step"}
MODULES = {
    "fql": {"actor": "actor_onestep_flow", "flow": "actor_bc_flow"},
    "ifql": {"actor": "actor_flow"},
}
MODULES["qc"] = MODULES["fql"]
LOSSES = {  # ours is the sum of theirs, each with its weight
    "fql": {
        "critic_loss": {"critic/critic_loss": 1},
        "flow_loss": {"actor/bc_flow_loss": 1},
        "distill_loss": {"actor/distill_loss": 1},
        "actor_loss": {"actor/actor_loss": 1, "actor/bc_flow_loss": -1},
    },
    "ifql": {
        "value_loss": {"value/value_loss": 1},
        "critic_loss": {"critic/critic_loss": 1},
        "actor_loss": {"actor/actor_loss": 1},
    },
}
LOSSES["qc"] = LOSSES["fql"]


def place(file, network, path):
    """The authors' name of our parameter `path` of a network."""
    names = [entry.key for entry in path if entry.key not in ("params", "MLP_0", "VmapMLP_0", "linear")]
    inner = "mlp" if network in ("actor", "flow") else "value_net"
    return "/".join([f"modules_{MODULES[file].get(network, network)}", inner, *names])


def in_tree(file, network, like, arrays, prefix):
    """The authors' arrays `prefix/...` in the tree of our parameters."""

    def leaf(path, old):
        new = arrays[f"{prefix}/{place(file, network, path)}"]
        assert new.shape == old.shape, (network, path, new.shape, old.shape)
        return jnp.asarray(new)

    return jax.tree_util.tree_map_with_path(leaf, like)


def batch_of(file, arrays):
    columns = "observations", "actions", "rewards", "next_observations", "masks"
    obs, action, reward, next_obs, mask = (jnp.asarray(arrays[f"batch/{name}"]) for name in columns)
    if file != "qc":
        return Transition(obs, action, reward, next_obs, 1 - mask)
    chunk, valid = action.reshape(len(action), -1), jnp.asarray(arrays["batch/valid"])
    return qc.Batch(obs, chunk, reward[:, -1], next_obs[:, -1], 1 - mask[:, -1], valid)


@pytest.fixture(scope="module", params=list(CONFIG))
def case(request):
    """(file, the authors' arrays, our state with their weights, update(rate, tau, state), act(state, obs))."""
    name, options = request.param, CONFIG[request.param]
    file = FILES[options["agent"]]
    module = importlib.import_module(f"algos.{file}")
    cfg = module.Config(hidden=(8, 8), **{FIELDS[key]: VALUES.get(x, x) for key, x in options.items() if key in FIELDS})
    with np.load(FOLDER / f"flow_{name}.npz") as saved:
        arrays = dict(saved)
    batch = batch_of(file, arrays)
    spec = Spec(obs_dim=3, action_dim=2)
    shapes = jax.eval_shape(module.make_agent(cfg, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    for network, old in state._asdict().items():
        if isinstance(old, module.Trainable):
            params = in_tree(file, network, old.params, arrays, "params")
            state = state._replace(**{network: old._replace(params=params)})
    target = in_tree(file, "target_critic", state.target_critic, arrays, "params")
    state = state._replace(key=jax.random.key(0), target_critic=target)

    def run(function, noise):
        """Traced with the authors' noise, in the order in which both sides ask for it."""
        queue, normal, uniform = itertools.cycle(noise), jax.random.normal, jax.random.uniform

        def next_noise(key, shape=()):
            drawn = next(queue)
            drawn = drawn.swapaxes(0, 1) if drawn.ndim == 3 else drawn  # ours has the samples of a state first
            assert drawn.shape == shape
            return jnp.asarray(drawn)

        def time(key, shape=(), *args):  # flax asks it too, for the shape of a weight
            return jnp.asarray(arrays["time"]) if shape == arrays["time"].shape else uniform(key, shape, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.random, "normal", next_noise)
            patch.setattr(jax.random, "uniform", time)
            result = function()
        assert jax.random.normal is normal
        return result

    noise = [arrays[f"noise/{i}"] for i in range(sum(key.startswith("noise/") for key in arrays))]

    @jax.jit
    def traced(rate, tau, state):
        agent = module.make_agent(dataclasses.replace(cfg, learning_rate=rate, tau=tau), spec)
        return run(lambda: agent.update(state, batch), noise)

    def act(state, obs):
        agent, at = module.make_agent(cfg, spec), (state, obs, jax.random.key(0))
        if file != "qc":
            return run(lambda: agent.act(*at), [arrays["act_noise"]])
        _, (queue, _) = run(lambda: agent.act_with_memory(*at, None, None), [arrays["act_noise"]])
        return jnp.moveaxis(queue, 0, 1).reshape(len(obs), -1)

    return file, arrays, state, traced, jax.jit(act)


def trained(state):
    return {name: x for name, x in state._asdict().items() if hasattr(x, "opt_state")}


def assert_close(ours, theirs, rtol=1e-4, atol=1e-6):
    """Sums in another order differ by a share of the largest number of an array."""

    def compare(path, a, b):
        size = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol + 1e-5 * size, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


def test_losses(case):
    file, arrays, state, update, _ = case
    info = update(0.0, TAU, state)[1]
    for ours, theirs in LOSSES[file].items():
        if ours in info:
            expected = sum(weight * arrays[f"loss/{part}"] for part, weight in theirs.items())
            np.testing.assert_allclose(info[ours], expected, rtol=1e-5, err_msg=ours)
    assert {name for name in info if name.endswith("_loss")} <= LOSSES[file].keys()


def test_gradients(case):
    file, arrays, state, update, _ = case
    for network, new in trained(update(0.0, TAU, state)[0]).items():
        mu = optax.tree_utils.tree_get(new.opt_state, "mu")
        assert_close(jax.tree.map(lambda x: x / (1 - ADAM_B1), mu), in_tree(file, network, mu, arrays, "grad"))


def test_polyak_step(case):
    """The other networks stand still: the authors' targets move towards those from before a step, ours to the new."""
    file, arrays, state, update, _ = case
    ours = update(0.0, TAU, state)[0].target_critic
    assert_close(ours, in_tree(file, "target_critic", ours, arrays, "polyak"))


def test_whole_updates(case):
    """Large steps show which networks a loss reads: those from before the update. Their one Adam is ours for each."""
    file, arrays, state, update, _ = case
    for _ in range(UPDATES["number"]):
        state, _ = update(UPDATES["learning_rate"], 0.0, state)
    for network, new in trained(state).items():
        assert_close(new.params, in_tree(file, network, new.params, arrays, "after"), atol=2e-5)


def test_actions(case):
    file, arrays, state, _, act = case
    obs = arrays["batch/observations"]
    actions = act(state, obs[0] if file == "ifql" else obs)
    np.testing.assert_allclose(actions, arrays["act"], rtol=1e-5, atol=1e-5)


def test_both_sources_were_run_alike():
    assert all(source["tau"] == TAU and source["updates"] == UPDATES for source in PROVENANCE)
