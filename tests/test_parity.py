"""Parity with d3rlpy 2.8.1: the same weights and the same batch give the same losses, gradients and whole updates.

The numbers in parity/*.npz are d3rlpy's own (parity/d3rlpy_reference.py calls its code); parity/provenance.json holds
its hyper-parameters, the factors between its losses and ours, and where it departs from the papers and from our files.

A gradient is read from Adam: after the first update its first moment is mu = (1 - b1) gradient. At learning rate 0 no
network moves within an update, so that IQL's networks may take their turns in another order in d3rlpy.
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

from algos import (
    awac,
    bc,
    bcq,
    bcq_discrete,
    bear,
    cql,
    cql_discrete,
    crr,
    ddpg,
    dqn,
    iql,
    rebrac,
    sac,
    sac_n,
    td3,
    td3_bc,
)
from common.datasets import Transition
from common.environments import Spec
from common.networks import Normal

FOLDER = pathlib.Path(__file__).parent / "parity"
PROVENANCE = json.loads((FOLDER / "provenance.json").read_text())
D3RLPY = PROVENANCE["config"]
ADAM_B1 = 0.9
HIDDEN = (8, 8)

CASES = {
    "bc": (bc.make_agent, bc.Config(hidden=HIDDEN, deterministic=True), Spec(obs_dim=3, action_dim=2)),
    "bc_discrete": (bc.make_agent, bc.Config(hidden=HIDDEN), Spec(obs_dim=3, action_dim=4, discrete=True)),
    "bc_gaussian": (bc.make_agent, bc.Config(hidden=HIDDEN), Spec(obs_dim=3, action_dim=2)),
    "iql": (
        iql.make_agent,
        iql.Config(
            hidden=HIDDEN,
            discount=D3RLPY["iql"]["gamma"],
            tau=D3RLPY["iql"]["tau"],
            expectile=D3RLPY["iql"]["expectile"],
            beta=D3RLPY["iql"]["weight_temp"],
            max_weight=D3RLPY["iql"]["max_weight"],
            num_updates=10**9,  # the actor's cosine decay stays at its start: d3rlpy has none
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "td3_bc": (
        td3_bc.make_agent,
        td3_bc.Config(
            hidden=HIDDEN,
            discount=D3RLPY["td3_bc"]["gamma"],
            tau=D3RLPY["td3_bc"]["tau"],
            alpha=D3RLPY["td3_bc"]["alpha"],
            policy_noise=D3RLPY["td3_bc"]["target_smoothing_sigma"],
            noise_clip=D3RLPY["td3_bc"]["target_smoothing_clip"],
            policy_delay=D3RLPY["td3_bc"]["update_actor_interval"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "td3": (
        td3.make_agent,
        td3.Config(
            hidden=HIDDEN,
            discount=D3RLPY["td3"]["gamma"],
            tau=D3RLPY["td3"]["tau"],
            policy_noise=D3RLPY["td3"]["target_smoothing_sigma"],
            noise_clip=D3RLPY["td3"]["target_smoothing_clip"],
            policy_delay=D3RLPY["td3"]["update_actor_interval"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "ddpg": (
        ddpg.make_agent,
        ddpg.Config(hidden=HIDDEN, discount=D3RLPY["ddpg"]["gamma"], tau=D3RLPY["ddpg"]["tau"]),
        Spec(obs_dim=3, action_dim=2),
    ),
    "rebrac": (
        rebrac.make_agent,
        rebrac.Config(
            hidden=HIDDEN,
            discount=D3RLPY["rebrac"]["gamma"],
            tau=D3RLPY["rebrac"]["tau"],
            actor_beta=D3RLPY["rebrac"]["actor_beta"],
            critic_beta=D3RLPY["rebrac"]["critic_beta"],
            policy_noise=D3RLPY["rebrac"]["target_smoothing_sigma"],
            noise_clip=D3RLPY["rebrac"]["target_smoothing_clip"],
            policy_delay=D3RLPY["rebrac"]["update_actor_interval"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "awac": (
        awac.make_agent,
        awac.Config(
            hidden=HIDDEN,
            discount=D3RLPY["awac"]["gamma"],
            tau=D3RLPY["awac"]["tau"],
            beta=1 / D3RLPY["awac"]["lam"],
            max_weight=float("inf"),
            num_samples=D3RLPY["awac"]["n_action_samples"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "crr": (
        crr.make_agent,
        crr.Config(
            hidden=HIDDEN,
            discount=D3RLPY["crr"]["gamma"],
            tau=D3RLPY["crr"]["tau"],
            binary=D3RLPY["crr"]["weight_type"] == "binary",
            max_baseline=D3RLPY["crr"]["advantage_type"] == "max",
            beta=1 / D3RLPY["crr"]["beta"],
            max_weight=D3RLPY["crr"]["max_weight"],
            num_samples=D3RLPY["crr"]["n_action_samples"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "crr_binary": (
        crr.make_agent,
        crr.Config(
            hidden=HIDDEN,
            discount=D3RLPY["crr_binary"]["gamma"],
            tau=D3RLPY["crr_binary"]["tau"],
            binary=D3RLPY["crr_binary"]["weight_type"] == "binary",
            max_baseline=D3RLPY["crr_binary"]["advantage_type"] == "max",
            num_samples=D3RLPY["crr_binary"]["n_action_samples"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "sac_n": (
        sac_n.make_agent,
        sac_n.Config(
            hidden=HIDDEN,
            discount=D3RLPY["sac_n"]["gamma"],
            tau=D3RLPY["sac_n"]["tau"],
            num_critics=D3RLPY["sac_n"]["n_critics"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "bcq": (
        bcq.make_agent,
        bcq.Config(
            hidden=HIDDEN,
            vae_hidden=HIDDEN,
            discount=D3RLPY["bcq"]["gamma"],
            tau=D3RLPY["bcq"]["tau"],
            min_weight=D3RLPY["bcq"]["lam"],
            phi=D3RLPY["bcq"]["action_flexibility"],
            kl_weight=D3RLPY["bcq"]["beta"],
            num_samples=D3RLPY["bcq"]["n_action_samples"],
            num_act_samples=D3RLPY["bcq"]["n_action_samples"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
    "dqn": (
        dqn.make_agent,
        dqn.Config(hidden=HIDDEN, discount=D3RLPY["dqn"]["gamma"]),
        Spec(obs_dim=3, action_dim=4, discrete=True),
    ),
    "double_dqn": (
        dqn.make_agent,
        dqn.Config(hidden=HIDDEN, discount=D3RLPY["double_dqn"]["gamma"], double=True),
        Spec(obs_dim=3, action_dim=4, discrete=True),
    ),
    "bcq_discrete": (
        bcq_discrete.make_agent,
        bcq_discrete.Config(
            hidden=HIDDEN,
            discount=D3RLPY["bcq_discrete"]["gamma"],
            threshold=D3RLPY["bcq_discrete"]["action_flexibility"],
            logit_penalty=D3RLPY["bcq_discrete"]["beta"],
        ),
        Spec(obs_dim=3, action_dim=4, discrete=True),
    ),
    "cql_discrete": (
        cql_discrete.make_agent,
        cql_discrete.Config(
            hidden=HIDDEN,
            discount=D3RLPY["cql_discrete"]["gamma"],
            alpha=D3RLPY["cql_discrete"]["alpha"],
            double=True,
        ),
        Spec(obs_dim=3, action_dim=4, discrete=True),
    ),
    "cql_quantiles": (
        cql_discrete.make_agent,
        cql_discrete.Config(
            hidden=HIDDEN,
            discount=D3RLPY["cql_quantiles"]["gamma"],
            alpha=D3RLPY["cql_quantiles"]["alpha"],
            num_quantiles=3,
            double=True,
        ),
        Spec(obs_dim=3, action_dim=4, discrete=True),
    ),
    "bear": (
        bear.make_agent,
        bear.Config(
            hidden=HIDDEN,
            vae_hidden=HIDDEN,
            discount=D3RLPY["bear"]["gamma"],
            tau=D3RLPY["bear"]["tau"],
            kl_weight=D3RLPY["bear"]["vae_kl_weight"],
            kernel=D3RLPY["bear"]["mmd_kernel"],
            mmd_sigma=D3RLPY["bear"]["mmd_sigma"],
            mmd_threshold=D3RLPY["bear"]["alpha_threshold"],
            num_mmd_samples=D3RLPY["bear"]["n_mmd_action_samples"],
            min_weight=D3RLPY["bear"]["lam"],
            num_samples=D3RLPY["bear"]["n_target_samples"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
}
CASES |= {
    "sac": (
        sac.make_agent,
        sac.Config(hidden=HIDDEN, discount=D3RLPY["sac"]["gamma"], tau=D3RLPY["sac"]["tau"]),
        Spec(obs_dim=3, action_dim=2),
    ),
    "cql": (
        cql.make_agent,
        cql.Config(
            hidden=HIDDEN,
            discount=D3RLPY["cql"]["gamma"],
            tau=D3RLPY["cql"]["tau"],
            weight=D3RLPY["cql"]["conservative_weight"],
            num_samples=D3RLPY["cql"]["n_action_samples"],
            lagrange=True,
            gap_target=D3RLPY["cql"]["alpha_threshold"],
            backup_entropy=D3RLPY["cql"]["soft_q_backup"],
        ),
        Spec(obs_dim=3, action_dim=2),
    ),
}
COPIED_TARGET = ["dqn", "double_dqn", "bcq_discrete", "cql_discrete", "cql_quantiles"]  # after each update: tau = 1
NETWORKS = [(name, network) for name in CASES for network in PROVENANCE["factors"][name]]
TARGETS = [("iql", "critic"), ("td3_bc", "critic"), ("td3_bc", "actor")]
TARGETS += [("sac", "critic"), ("cql", "critic")]
TARGETS += [("bear", "critic")]
TARGETS += [(name, "critic") for name in COPIED_TARGET]
TARGETS += [("awac", "critic"), ("crr", "critic"), ("crr", "actor"), ("bcq", "critic"), ("bcq", "perturbation")]
TARGETS += [(name, network) for name in ("td3", "ddpg", "rebrac") for network in ("critic", "actor")]
TARGETS += [("sac_n", "critic")]
AFTER = [("iql", "value"), ("iql", "actor")]
AFTER += [("awac", network) for network in ("actor", "critic", "target_critic")]
AFTER += [(name, n) for name in ("sac", "cql") for n in ("actor", "critic", "target_critic")]
AFTER += [("bear", network) for network in ("vae", "actor", "critic", "log_alpha", "target_critic")]
AFTER += [(name, n) for name in COPIED_TARGET for n in ("critic", "target_critic")] + [("bcq_discrete", "actor")]
AFTER += [("bcq", n) for n in ("vae", "critic", "perturbation", "target_critic", "target_perturbation")]
ACTOR_CRITIC = ("td3_bc", "td3", "ddpg", "rebrac", "crr")
AFTER += [(name, n) for name in ACTOR_CRITIC for n in ("actor", "critic", "target_actor", "target_critic")]
AFTER += [("sac_n", network) for network in ("actor", "critic", "target_critic")]


# --- d3rlpy's arrays in our trees --------------------------------------------------------------------------


def in_tree(like, arrays, prefix):
    """The arrays `prefix/...` in the tree of our parameters `like`; those of an ensemble are stacked on axis 0."""

    def leaf(path, old):
        names = [entry.key for entry in path]
        layer = [name.removeprefix("Dense_") for name in names if name.startswith(("Dense_", "encoder", "decoder"))]
        layer += [name.replace("LayerNorm_", "norm_") for name in names if name.startswith("LayerNorm_")]
        key = "/".join([*layer, *names[-1:]])  # "0/kernel", "norm_0/scale", "log_std"; nothing: a number
        if f"{prefix}/0/{key}" in arrays:
            new = np.stack([arrays[f"{prefix}/{member}/{key}"] for member in range(len(old))])
        else:
            new = arrays[f"{prefix}/{key}".removesuffix("/")]
        assert new.shape == old.shape, f"{prefix}/{key}: {new.shape} is not {old.shape}"
        return jnp.asarray(new)

    return jax.tree_util.tree_map_with_path(leaf, like)


def load(state, arrays):
    """`state` with d3rlpy's weights in every network and target network."""
    networks = {}
    for name, old in state._asdict().items():
        if isinstance(old, tuple):  # a Trainable
            networks[name] = old._replace(params=in_tree(old.params, arrays, name))
        elif isinstance(old, dict):
            networks[name] = in_tree(old, arrays, name)
    return state._replace(**networks)


def with_its_noise(function, arrays):
    """`function` with d3rlpy's noise in the place of our draws, while it is traced."""

    samples = [arrays[key] for key in ("batch/noise", "batch/posterior_noise") if key in arrays]
    samples = {noise.shape[-1]: noise for noise in samples}  # a policy's actions and a latent's are of different sizes

    def normal(key, shape):
        if "batch/prior_noise" in arrays:  # BEAR
            return arrays["batch/prior_noise"].reshape(shape)
        return arrays["batch/latent"] if len(shape) == 3 else arrays["batch/latent"][0]

    def traced(*args):
        with pytest.MonkeyPatch.context() as monkeypatch:
            sample = lambda self, key: self.mean + jnp.exp(self.log_std) * samples[self.mean.shape[-1]]  # noqa: E731
            monkeypatch.setattr(Normal, "sample", sample)
            if {"batch/latent", "batch/prior_noise"} & arrays.keys():
                monkeypatch.setattr(jax.random, "normal", normal)
            if "batch/uniform" in arrays:  # CQL's actions; asked by position, it is flax checking the shape of a layer
                uniform = lambda key, shape, *args, **range: jnp.broadcast_to(  # noqa: E731
                    0 if args else arrays["batch/uniform"], shape
                )
                monkeypatch.setattr(jax.random, "uniform", uniform)
            return function(*args)

    return traced


@functools.cache
def program(name):
    """d3rlpy's arrays, a state of zeros, and one jitted update whose learning rate and tau are arguments."""
    make_agent, cfg, spec = CASES[name]
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    shapes = jax.eval_shape(make_agent(cfg, spec).init, jax.random.key(0))  # to run it would take longer than all else
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))

    @functools.partial(jax.jit, static_argnames="turn")
    def update(learning_rate, tau, state, batch, turn):
        rates = [field.name for field in dataclasses.fields(cfg) if field.name.endswith("learning_rate")]
        changes = dict.fromkeys(rates, learning_rate) | ({"tau": tau} if hasattr(cfg, "tau") else {})
        agent = make_agent(dataclasses.replace(cfg, **changes), spec)
        return with_its_noise(getattr(agent, "cycle", [agent.update])[turn], arrays)(state, batch)

    return arrays, zeros._replace(key=jax.random.key(0)), update


@functools.cache
def run(name, num_updates, learning_rate, tau):
    """(arrays, state, metrics) after `num_updates` of ours from d3rlpy's weights, all on d3rlpy's batch."""
    arrays, state, update = program(name)
    start = {key.removeprefix("start/"): arrays[key] for key in arrays if key.startswith("start/")}
    state = load(state, arrays | (start if num_updates > 1 else {}))
    columns = [column for column in Transition._fields if f"batch/{column}" in arrays]
    batch = Transition(**{column: jnp.asarray(arrays[f"batch/{column}"]) for column in columns})
    if CASES[name][2].discrete:
        batch = batch._replace(action=batch.action.astype(jnp.int32))
    turns = getattr(
        CASES[name][1], "policy_delay", 1
    )  # a single update is a whole one: the last of those that take turns
    for i in range(num_updates):
        new, metrics = update(learning_rate, tau, state, batch, i % turns if num_updates > 1 else turns - 1)
        state = new._replace(log_alpha=state.log_alpha) if name == "sac_n" else new  # d3rlpy's temperature is held
    return arrays, state, metrics


def one_update(name):
    return run(name, 1, 0.0, 1.0 if name in COPIED_TARGET else D3RLPY[name].get("tau"))


def assert_close(ours, theirs, **tolerance):
    def compare(path, a, b):
        np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance)

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


# --- Tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, network", NETWORKS)
def test_loss(name, network):
    arrays, _, metrics = one_update(name)
    factor = PROVENANCE["factors"][name][network]
    np.testing.assert_allclose(metrics[f"{network}_loss"], factor * arrays[f"loss/{network}"], rtol=1e-5)


@pytest.mark.parametrize("name, network", NETWORKS)
def test_gradient(name, network):
    arrays, state, _ = one_update(name)
    factor = PROVENANCE["factors"][name][network]
    mu = optax.tree_utils.tree_get(getattr(state, network).opt_state, "mu")
    ours = jax.tree.map(lambda x: x / (1 - ADAM_B1), mu)
    theirs = jax.tree.map(lambda x: factor * x, in_tree(mu, arrays, f"grad/{network}"))
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name, multiplier", [("sac", "log_alpha"), ("cql", "log_alpha"), ("cql", "log_multiplier")])
def test_gradient_of_a_multiplier(name, multiplier):
    arrays, state, _ = one_update(name)
    ours = getattr(state, multiplier).opt_state[0].mu / (1 - ADAM_B1)
    # departure "SAC and CQL, loss of the temperature": d3rlpy's is a factor alpha larger
    factor = np.exp(-arrays["log_alpha"]) if multiplier == "log_alpha" else 1
    np.testing.assert_allclose(ours, factor * arrays[f"grad/{multiplier}"], rtol=1e-4)


@pytest.mark.parametrize("name, network", TARGETS)
def test_polyak_step(name, network):
    # the online networks stand still, so their targets move by tau towards the weights in the file
    arrays, state, _ = one_update(name)
    ours = getattr(state, f"target_{network}")
    assert_close(ours, in_tree(ours, arrays, f"polyak/{network}"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, network", AFTER)
def test_whole_updates(name, network):
    # Large steps show the order inside an update: IQL's actor reads the value network of the same update. IQL's critic
    # is left out (d3rlpy's reads the value network of the update before), and tau = 0 keeps it from the other two.
    after = PROVENANCE["after"][name]
    arrays, state, _ = run(name, after["num_updates"], after["learning_rate"], after["tau"])
    ours = getattr(state, network)
    ours = ours.params if isinstance(ours, tuple) else ours
    theirs = in_tree(ours, {"after/actor/log_std": arrays.get("start/actor/log_std")} | arrays, f"after/{network}")
    assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bcq_acts_alike():
    # ours chooses from num_act_samples candidates, d3rlpy from as many as the target has: here they are as many
    arrays, state, _ = program("bcq")
    make_agent, cfg, spec = CASES["bcq"]
    act = jax.jit(with_its_noise(make_agent(cfg, spec).act, arrays))
    action = act(load(state, arrays), jnp.asarray(arrays["batch/obs"]), jax.random.key(0))
    np.testing.assert_allclose(action, arrays["act"], rtol=1e-4, atol=1e-5)
