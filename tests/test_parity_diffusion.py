"""Parity with the code of diffusion policies' authors: the same weights, batch and noise give the same numbers.

The numbers in parity/NAME.npz are of that code (parity/*_reference.py call it at a commit); parity/*_provenance.json
hold its hyper-parameters. All draws of one policy in one update are the same noise there, and here.

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

from algos import diffusion_ql, edp
from common.datasets import Transition
from common.environments import Spec

FOLDER = pathlib.Path(__file__).parent / "parity"
SOURCES = {
    algo: json.loads((FOLDER / f"{algo.__name__.split('.')[1]}_provenance.json").read_text())
    for algo in (diffusion_ql, edp)
}
ALGOS = {name: algo for algo, source in SOURCES.items() for name in source["config"]}
FIELDS = {"discount": "discount", "tau": "tau"}  # ours: theirs
FIELDS_OF = {
    diffusion_ql: {"eta": "eta", "num_steps": "n_timesteps", "ema_interval": "update_ema_every"},
    edp: {
        "eta": "alpha",
        "num_steps": "num_timesteps",
        "ema_interval": "policy_tgt_freq",
        "solver_steps": "dpm_steps",
    },
}
SPEC = Spec(3, 2)


def config_of(name):
    algo = ALGOS[name]
    theirs = SOURCES[algo]["config"][name]
    return algo.Config(
        hidden=(8, 8, 8),
        num_next_samples=10 if theirs["max_q_backup"] else 1,
        num_act_samples=1,
        **{ours: theirs[field] for ours, field in (FIELDS | FIELDS_OF[algo]).items()},
    )


def in_tree(like, arrays, prefix):
    """Arrays `prefix/...` in the tree of our parameters."""

    def leaf(path, old):
        names = [entry.key for entry in path if entry.key not in ("params", "VmapMLP_0", "linear")]
        return jnp.asarray(arrays["/".join([prefix, *names])]).reshape(old.shape)

    return jax.tree_util.tree_map_with_path(leaf, like)


def with_its_noise(function, arrays):
    """`function` with the noise of the file in the place of our draws, while it is traced."""

    def normal(key, shape):
        return arrays["batch/next_noise" if len(shape) == 3 else "batch/noise"]

    def traced(*args):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(jax.random, "normal", normal)
            monkeypatch.setattr(jax.random, "randint", lambda *_, **__: arrays["batch/t"])
            monkeypatch.setattr(jax.random, "bernoulli", lambda key: arrays["batch/first"])
            return function(*args)

    return traced


@functools.cache
def program(name):
    """The file's arrays, our agent with its weights, its batch as ours, jitted update and act."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    algo, cfg = ALGOS[name], config_of(name)
    rates = [field.name for field in dataclasses.fields(cfg) if field.name.endswith("learning_rate")]
    shapes = jax.eval_shape(algo.make_agent(cfg, SPEC).init, jax.random.key(0))._replace(key=None)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(key=jax.random.key(0))
    networks = {
        network: old._replace(params=in_tree(old.params, arrays, network))
        if hasattr(old, "params")
        else in_tree(old, arrays, network)
        for network, old in state._asdict().items()
        if "actor" in network or "critic" in network
    }
    columns = ("obs", "action", "reward", "next_obs", "terminal")
    batch = Transition(*(jnp.asarray(arrays[f"batch/{column}"], jnp.float32) for column in columns))

    @jax.jit
    def update(learning_rate, max_grad_norm, state):
        changed = dataclasses.replace(cfg, max_grad_norm=max_grad_norm, **dict.fromkeys(rates, learning_rate))
        return with_its_noise(algo.make_agent(changed, SPEC).update, arrays)(state, batch)

    act = jax.jit(with_its_noise(algo.make_agent(cfg, SPEC).act, arrays))
    return arrays, state._replace(**networks), update, act, batch


def assert_close(ours, theirs, share=1e-5):
    """Sums in another order differ by a share of the largest number of an array."""

    def compare(path, a, b):
        atol = 1e-6 + share * float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, ours, theirs)


@pytest.mark.parametrize("name", ALGOS)
def test_losses_and_gradients(name):
    arrays, state, update, *_ = program(name)
    new, info = update(0.0, 1e9, state)
    for loss in ("critic", "actor", "bc"):
        np.testing.assert_allclose(info[f"{loss}_loss"], arrays[f"loss/{loss}"], rtol=1e-5, err_msg=loss)
    for network in ("critic", "actor"):
        mu = optax.tree_utils.tree_get(getattr(new, network).opt_state, "mu")
        share = 4e-5 if ALGOS[name] is edp else 1e-5  # float32's sines of steps near 1,000 are off by up to 6e-5
        assert_close(jax.tree.map(lambda x: x / 0.1, mu), in_tree(mu, arrays, f"grad/{network}"), share)


@pytest.mark.parametrize("name", ALGOS)
def test_whole_updates(name):
    """Order, clipping, Adam, and which target moves when."""
    arrays, state, update, *_ = program(name)
    source = SOURCES[ALGOS[name]]
    max_grad_norm = source["config"][name].get("grad_norm", 1e9)  # EDP's is of each critic alone: not compared
    for _ in range(source["updates"]):
        state, _ = update(source["learning_rate"], max_grad_norm, state)
    for network in ("critic", "actor", "target_critic", "target_actor"):
        new = getattr(state, network)
        new = getattr(new, "params", new)
        theirs = in_tree(new, arrays, f"after/{network}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), new, theirs)


@pytest.mark.parametrize("name", ["diffusion_ql", "edp"])
def test_actions_of_the_policy(name):
    arrays, state, _, act, batch = program(name)
    np.testing.assert_allclose(act(state, batch.obs, jax.random.key(0)), arrays["act"], rtol=1e-4, atol=1e-5)
