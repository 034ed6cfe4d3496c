"""Parity with the code of RvS and of the Decision Transformer, which parity/sequence_reference.py calls at a commit.

RvS: what an outcome is, and which pairs are drawn for the same random numbers. Its losses are not compared: its
Gaussian has a linear mean, ours is that of bc.py. The Decision Transformer: loss, gradient, whole updates and a played
episode, on the same weights. It pads windows on the left and masks the padding, ours are padded on the right. Without
dropout; a gradient is read from AdamW, whose first moment is (1 - b1) times the clipped gradient.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import dt, rvs
from common.environments import Spec

FOLDER = pathlib.Path(__file__).parent / "parity"
DT = json.loads((FOLDER / "sequence_provenance.json").read_text())["dt"]["config"]


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def test_outcomes_of_rvs():
    theirs = arrays("rvs")
    last = np.flatnonzero(theirs["dones"])
    start = np.concatenate([[0], last[:-1] + 1])
    timestep = np.arange(len(theirs["dones"])) - np.repeat(start, last - start + 1)
    average = rvs.average_to_go(theirs["cumulative"], timestep)
    np.testing.assert_allclose(average, theirs["average"], rtol=1e-12)
    assert timestep.max() + 1 == 12 and len(last) == 6


def test_pairs_of_rvs(monkeypatch):
    """The same uniform numbers u, of which a row is floor(u (high - low))."""
    theirs = arrays("rvs")
    episode = jnp.asarray(np.cumsum(theirs["dones"]) - theirs["dones"], jnp.int32)
    numbers = iter([theirs["episode"], theirs["first"], theirs["second"]])

    def randint(key, shape, low, high):
        u = next(numbers)
        return jnp.asarray(u if u.dtype == int else np.floor(u * (high - low)) + low, jnp.int32)

    monkeypatch.setattr(jax.random, "randint", randint)
    index, later = rvs.draw_pairs(jax.random.key(0), episode, len(theirs["start"]))
    np.testing.assert_array_equal(index, theirs["start"])
    np.testing.assert_array_equal(later, theirs["goal"])


# --- The Decision Transformer ---------------------------------------------------------------------------------


def place(path):
    """(the reference's name of our parameter, whether its matrix is transposed, which third of it ours is)."""
    *names, last = [entry.key for entry in path if entry.key not in ("params", "linear")]
    kind = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}[last]
    if names[0] != "CausalTransformer_0":
        embeds = ("embed_return", "embed_state", "embed_action", "predict_action.0")
        layers = dict(zip([f"Dense_{i}" for i in range(4)], embeds, strict=True))
        layers |= {"Embed_0": "embed_timestep", "LayerNorm_0": "embed_ln"}
        return f"{layers[names[0]]}.{kind}", last == "kernel", None
    layer, number = names[1].split("_")
    block, second = (int(number), 0) if layer == "MultiHeadDotProductAttention" else divmod(int(number), 2)
    if block == DT["blocks"]:
        return f"transformer.ln_f.{kind}", False, None
    third = {"query": 0, "key": 1, "value": 2}.get(names[-1])
    parts = {"LayerNorm": ("ln_1", "ln_2"), "Dense": ("mlp.c_fc", "mlp.c_proj")}
    part = parts.get(layer, ("attn.c_attn" if third is not None else "attn.c_proj",))[second]
    return f"transformer.h.{block}.{part}.{kind}", False, third


def in_tree(like, theirs, prefix):
    """The reference's arrays `prefix/...` in the tree of our parameters."""

    def leaf(path, old):
        name, transposed, third = place(path)
        new = theirs[f"{prefix}/{name}"]
        new = new.T if transposed else new
        new = new if third is None else np.split(new, 3, axis=-1)[third]
        return jnp.asarray(new).reshape(old.shape)

    return jax.tree_util.tree_map_with_path(leaf, like)


@functools.cache
def program():
    """The reference's arrays, our agent with its weights, its windows as ours."""
    theirs = arrays("dt")
    fields = {name: DT[name] for name in ("learning_rate", "weight_decay", "max_norm", "context")}
    cfg = dt.Config(
        **fields, hidden=(DT["inner"],) * DT["blocks"], num_heads=DT["heads"], embed_dim=DT["width"], dropout=0.0,
        max_timestep=DT["max_ep_len"], warmup_updates=DT["warmup"], return_scale=DT["scale"],
        target_return=DT["target"],
    )  # fmt: skip
    agent = dt.make_agent(cfg, Spec(DT["state_dim"], DT["act_dim"]))
    state = agent.init(jax.random.key(0))
    state = state._replace(actor=state.actor._replace(params=in_tree(state.actor.params, theirs, "params")))
    count = theirs["batch/mask"].sum(axis=1).astype(int)

    def on_the_right(name):
        x = theirs[f"batch/{name}"]
        return jnp.asarray(np.stack([np.roll(row, n - DT["context"], axis=0) for row, n in zip(x, count, strict=True)]))

    columns = [on_the_right(name) for name in ("states", "actions", "rtg", "timesteps", "mask")]
    obs, action, return_to_go, timestep, mask = columns
    batch = dt.Window(obs, action, DT["scale"] * return_to_go[..., 0], timestep, mask == 1)
    return theirs, agent._replace(update=jax.jit(agent.update)), state, batch


def test_loss_and_gradient_of_the_decision_transformer():
    theirs, agent, state, batch = program()
    new, info = agent.update(state, batch)
    np.testing.assert_allclose(info["actor_loss"], theirs["loss"], rtol=1e-5)
    gradient = in_tree(state.actor.params, theirs, "grad")
    norm = optax.tree.norm(gradient)
    assert norm > DT["max_norm"]  # it is clipped
    mu = optax.tree_utils.tree_get(new.actor.opt_state, "mu")
    for ours, clipped in zip(jax.tree.leaves(mu), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(10 * ours, clipped * DT["max_norm"] / norm, rtol=1e-4, atol=1e-7)


def test_whole_updates_of_the_decision_transformer():
    """The bias of the keys changes no attention. Its gradient is rounding, of which Adam makes steps."""
    theirs, agent, state, batch = program()
    for _ in range(DT["updates"]):
        state, _ = agent.update(state, batch)
    after, moved = in_tree(state.actor.params, theirs, "after"), in_tree(state.actor.params, theirs, "params")
    for (path, ours), x, old in zip(
        jax.tree_util.tree_leaves_with_path(state.actor.params), *map(jax.tree.leaves, (after, moved)), strict=True
    ):
        if "['key']['bias']" not in jax.tree_util.keystr(path):
            assert np.abs(x - old).max() > 5e-3
            np.testing.assert_allclose(ours, x, rtol=1e-4, atol=2e-5, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("episodes", [1, 3])
def test_a_played_episode_of_the_decision_transformer(episodes):
    """Seven steps with a context of four: what is asked for falls by each reward, and the oldest step is forgotten."""
    theirs, agent, state, _ = program()
    act, memory, reward = jax.jit(agent.act_with_memory), None, jnp.zeros(episodes)
    for seen, done, paid in zip(theirs["play/state"], theirs["play/action"], theirs["play/reward"], strict=True):
        action, memory = act(state, jnp.tile(seen, (episodes, 1)), jax.random.key(0), memory, reward)
        np.testing.assert_allclose(action, np.tile(done, (episodes, 1)), rtol=1e-4, atol=1e-5)
        reward = jnp.full(episodes, paid)
