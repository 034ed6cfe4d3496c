"""Parity of idql.py with its authors' code: the same weights, batch and draws give the same numbers.

The numbers in parity/idql*.npz are of that code (parity/idql_reference.py calls it at a commit);
parity/idql_provenance.json holds its hyper-parameters, and what it does otherwise than we do.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_parity_diffusion import FOLDER, assert_close, in_tree

from algos import idql
from common.datasets import Transition
from common.environments import Spec

SOURCE = json.loads((FOLDER / "idql_provenance.json").read_text())
FIELDS = {  # ours: theirs
    "discount": "discount",
    "tau": "tau",
    "expectile": "critic_hyperparam",
    "actor_tau": "actor_tau",
    "num_steps": "T",
    "num_samples": "N",
    "num_updates": "decay_steps",
    "dropout": "actor_dropout_rate",
}
NETWORKS = "actor", "target_actor", "critic", "target_critic", "value"


@functools.cache
def program(name):
    """The file's arrays, our configuration, our state with its weights, and its batch as ours."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    theirs = SOURCE["config"][name]
    cfg = idql.Config(hidden=(8, 8), actor_hidden=(8, 8, 8), **{ours: theirs[field] for ours, field in FIELDS.items()})
    shapes = jax.eval_shape(idql.make_agent(cfg, Spec(3, 2)).init, jax.random.key(0))._replace(key=None)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(key=jax.random.key(0))
    networks = {}
    for network in NETWORKS:
        old = getattr(state, network)
        new = in_tree(getattr(old, "params", old), arrays, network)
        networks[network] = old._replace(params=new) if hasattr(old, "params") else new
    columns = ("obs", "action", "reward", "next_obs", "terminal")
    batch = Transition(*(jnp.asarray(arrays[f"batch/{column}"], jnp.float32) for column in columns))
    return arrays, cfg, state._replace(**networks), batch


def patch_normal(monkeypatch, of, noise):
    """Draws of that shape are `noise()`. Flax asks for the shapes of initial weights, too."""
    drawn = jax.random.normal
    patched = lambda key, shape, *dtype: noise() if shape == of else drawn(key, shape, *dtype)  # noqa: E731
    monkeypatch.setattr(jax.random, "normal", patched)


def trained(name, learning_rate, updates, monkeypatch):
    """(state, metrics) after so many updates, all with the draws of the file."""
    arrays, cfg, state, batch = program(name)
    masks = iter([arrays[f"batch/dropout/{i}"] for i in range(SOURCE["blocks"])])
    monkeypatch.setattr(jax.random, "randint", lambda *_, **__: jnp.asarray(arrays["batch/t"]))
    patch_normal(monkeypatch, (16, 2), lambda: jnp.asarray(arrays["batch/noise"]))
    monkeypatch.setattr(jax.random, "uniform", lambda *_, **__: jnp.asarray(next(masks)))
    changed = dataclasses.replace(cfg, learning_rate=learning_rate)
    update = jax.jit(idql.make_agent(changed, Spec(3, 2)).update)  # is traced once
    for _ in range(updates):
        state, info = update(state, batch)
    assert next(masks, None) is None
    return arrays, state, info


@pytest.mark.parametrize("name", SOURCE["config"])
def test_losses_and_gradients(name, monkeypatch):
    """A gradient is read from Adam: after the first update its first moment is mu = (1 - b1) gradient."""
    arrays, new, info = trained(name, 0.0, 1, monkeypatch)
    for metric in ("actor_loss", "critic_loss", "value_loss", "q", "v"):
        np.testing.assert_allclose(info[metric], arrays[f"loss/{metric}"], rtol=1e-5, err_msg=metric)
    for network in ("actor", "critic", "value"):
        mu = optax.tree_utils.tree_get(getattr(new, network).opt_state, "mu")
        assert_close(jax.tree.map(lambda x: x / 0.1, mu), in_tree(mu, arrays, f"grad/{network}"))


@pytest.mark.parametrize("name", SOURCE["config"])
def test_whole_updates(name, monkeypatch):
    """Order, AdamW, the cosine of the clone's rate, and which average moves by which step."""
    arrays, new, _ = trained(name, SOURCE["learning_rate"], SOURCE["updates"], monkeypatch)
    for network in NETWORKS:
        ours = getattr(new, network)
        ours = getattr(ours, "params", ours)
        theirs = in_tree(ours, arrays, f"after/{network}")
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), ours, theirs)


@pytest.mark.parametrize("choice", ["best", "implicit"])
@pytest.mark.parametrize("name", SOURCE["config"])
def test_actions_of_the_policy(name, choice, monkeypatch):
    """Each step of the sampler has noise of its own in the file; the chosen draw and its weights are theirs."""
    arrays, cfg, state, batch = program(name)
    draws, logits = iter(jnp.asarray(arrays["draws"])), []
    patch_normal(monkeypatch, arrays["draws"].shape[1:], lambda: next(draws))
    chosen = lambda key, x, axis: logits.append(x) or jnp.asarray(arrays["choice"])  # noqa: E731
    monkeypatch.setattr(jax.random, "categorical", chosen)
    agent = idql.make_agent(dataclasses.replace(cfg, choice=choice), Spec(3, 2))
    rows = arrays["draws"].shape[2]
    with jax.disable_jit():  # else all steps of the loop would have the same noise
        action = agent.act(state, batch.obs[:rows], jax.random.key(0))
    assert next(draws, None) is None
    np.testing.assert_allclose(
        action, arrays["act_implicit" if choice == "implicit" else "act"], rtol=1e-4, atol=1e-5
    )
    if choice == "implicit":
        np.testing.assert_allclose(jax.nn.softmax(logits[0], axis=0), arrays["weights"], rtol=1e-5)
