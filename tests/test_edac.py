"""EDAC: the diversity of the critics' gradients, worked out by hand; without it, it is SAC-N."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import edac, sac_n
from common.datasets import Transition
from common.environments import Spec
from common.networks import Critic


def directions(*degrees):
    """Gradients (N, 1, 2) of one row."""
    angle = jnp.deg2rad(jnp.array(degrees, jnp.float32))
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)[:, None]


def by_pairs(grads):
    """ES as the paper writes it: the cosines of all ordered pairs, / (N - 1), the mean over the batch."""
    unit = grads / jnp.linalg.norm(grads, axis=-1, keepdims=True)
    n = len(grads)
    pairs = [(unit[i] * unit[j]).sum(axis=-1) for i in range(n) for j in range(n) if i != j]
    return sum(pairs).mean() / (n - 1)


def random_batch(n=16, **columns):
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs = jax.random.normal(k[0], (n, 3)), jax.random.normal(k[3], (n, 3))
    action, reward = jax.random.uniform(k[1], (n, 2), minval=-1), jax.random.normal(k[2], (n,))
    terminal = jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(obs, action, reward, next_obs, terminal)._replace(**columns)


@functools.cache
def programs():
    """SAC-N's update, EDAC's with eta as its first argument, and a state of either: jitted, four critics."""
    cfg, spec = edac.Config(num_critics=4, hidden=(16,), learning_rate=0.01), Spec(3, 2)
    plain = sac_n.make_agent(sac_n.Config(num_critics=4, hidden=(16,), learning_rate=0.01), spec)

    @jax.jit
    def update(eta, state, batch):
        return edac.make_agent(dataclasses.replace(cfg, eta=eta), spec).update(state, batch)

    return jax.jit(plain.update), update, jax.jit(plain.init)(jax.random.key(0))


def gradient(state):
    return jax.tree.map(lambda mu: mu / 0.1, optax.tree_utils.tree_get(state.critic.opt_state, "mu"))


# --- The diversity term ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grads, expected",
    [
        (directions(30, 30, 30, 30), 4.0),  # all agree: N (N - 1) / (N - 1)
        (directions(20, 110), 0.0),  # orthogonal
        (directions(20, 200), -2.0),  # opposite: -N / (N - 1), the least there is
        (directions(0, 120, 240), -1.5),  # likewise
        (directions(0, 60), 1.0),  # both orders of the pair: 2 cos 60
    ],
)
def test_diversity_of_known_directions(grads, expected):
    lengths = jnp.array([1e-6, 3.0, 100.0, 0.5])[: len(grads), None, None]  # which do not matter
    np.testing.assert_allclose(edac.diversity_loss(lengths * grads), expected, atol=1e-5)


def test_diversity_is_the_mean_over_rows_of_all_pairs():
    grads = jax.random.normal(jax.random.key(0), (5, 7, 3))
    np.testing.assert_allclose(edac.diversity_loss(grads), by_pairs(grads), rtol=1e-5)
    for i in range(5):  # any critic may be scaled
        scaled = grads.at[i].multiply(40.0)
        np.testing.assert_allclose(edac.diversity_loss(scaled), by_pairs(grads), rtol=1e-5)


def test_a_gradient_of_zero_is_no_direction_and_harms_nothing():
    # Of 90 degrees, 30 degrees and nothing: 2 cos 60 / (3 - 1) = 0.5
    grads = directions(90, 30, 0) * jnp.array([1.0, 1.0, 0.0])[:, None, None]
    value, slope = jax.value_and_grad(edac.diversity_loss)(grads)
    np.testing.assert_allclose(value, 0.5, rtol=1e-5)
    assert np.all(np.isfinite(slope))


def test_in_one_dimension_there_is_nothing_to_gain():
    # Directions are +1 or -1 whatever the parameters: ES is constant where it is differentiable, and EDAC is SAC-N
    grads = jax.random.normal(jax.random.key(0), (5, 7, 1))
    np.testing.assert_allclose(jax.grad(edac.diversity_loss)(grads), 0, atol=1e-5)


# --- In the update -----------------------------------------------------------------------------------------


def test_eta_zero_is_sac_n_bit_for_bit():
    batch, ends = random_batch(), []
    plain, update, start = programs()
    for step in (plain, functools.partial(update, 0.0)):
        state = start
        for _ in range(3):
            state, info = step(state, batch)
        ends.append(jax.tree.leaves((state._replace(key=jax.random.key_data(state.key)), info["critic_loss"])))
    chex.assert_trees_all_equal(*ends)
    init = edac.make_agent(edac.Config(num_critics=4, hidden=(16,)), Spec(3, 2)).init
    params = jax.jit(lambda key: init(key).critic.params)(jax.random.key(0))
    chex.assert_trees_all_equal(params, start.critic.params)


def test_linear_critics():
    # Q_j = w_j . a, w at 0 and 60 degrees: ES = 2 cos 60 = 1. At a = 0 and r = 0 no error: the loss is eta ES = 3.
    # d ES / d w_1 = 2 (w_2 - cos 60 w_1) = (0, sqrt 3) where w_1 = (1, 0); likewise for w_2, turned towards w_1.
    agent = edac.make_agent(edac.Config(num_critics=2, hidden=(), eta=3.0), Spec(3, 2))
    state = jax.jit(agent.init)(jax.random.key(0))
    w = directions(0, 60)[:, 0]
    kernel = jnp.concatenate([jnp.zeros((2, 3)), w], axis=1)[..., None]
    put = lambda path, x: kernel if "kernel" in jax.tree_util.keystr(path) else jnp.zeros_like(x)  # noqa: E731
    params = jax.tree_util.tree_map_with_path(put, state.critic.params)
    state = state._replace(critic=state.critic._replace(params=params))
    batch = random_batch(action=jnp.zeros((16, 2)), reward=jnp.zeros(16), terminal=jnp.ones(16))
    after, info = jax.jit(agent.update)(state, batch)
    np.testing.assert_allclose([info["critic_loss"], info["diversity_loss"]], [3.0, 1.0], rtol=1e-5)
    (slope,) = [
        g for p, g in jax.tree_util.tree_leaves_with_path(gradient(after)) if "kernel" in jax.tree_util.keystr(p)
    ]
    expected = 3 * 2 * jnp.stack([w[1] - 0.5 * w[0], w[0] - 0.5 * w[1]])
    np.testing.assert_allclose(slope[:, 3:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(slope[:, :3, 0], 0, atol=1e-6)


def test_it_is_taken_at_the_datas_actions_and_moves_the_critics():
    """The gradient of the loss with eta = 2, less that without: twice that of ES, pair by pair, at the data's a."""
    batch, critic = random_batch(), Critic(4, (16,))
    plain, update, state = programs()
    (after, info), (without, _) = update(2.0, state, batch), plain(state, batch)

    @jax.jit
    @jax.value_and_grad
    def es(params):
        one_row = jax.jacfwd(lambda action, obs: critic.apply(params, obs, action))
        return by_pairs(jax.vmap(one_row, out_axes=1)(batch.action, batch.obs))

    value, slope = es(state.critic.params)
    np.testing.assert_allclose(info["diversity_loss"], value, rtol=1e-4)
    added = jax.tree.map(lambda a, b: a - b, gradient(after), gradient(without))
    chex.assert_trees_all_close(added, jax.tree.map(lambda g: 2 * g, slope), rtol=1e-3, atol=1e-5)
    kernels = [x for p, x in jax.tree_util.tree_leaves_with_path(slope) if "kernel" in jax.tree_util.keystr(p)]
    assert all(np.abs(x).max() > 1e-2 for x in kernels)


def test_critics_are_driven_apart():
    """200 updates on nothing but the diversity term: the rewards say only Q = 0 at the data."""
    batch = random_batch(reward=jnp.zeros(16), terminal=jnp.ones(16))
    _, update, start = programs()
    ends = []
    for eta in (0.0, 1.0):
        state = start
        for _ in range(200):
            state, info = update(eta, state, batch)
        ends.append(info["diversity_loss"])
    assert ends[1] < -1 and ends[1] < ends[0] - 0.5, ends  # the least is -4 / 3


def test_what_it_cannot_take_is_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        edac.make_agent(edac.Config(), Spec(3, 4, discrete=True))
    with pytest.raises(SystemExit, match="at least 2"):
        edac.make_agent(edac.Config(num_critics=1), Spec(3, 2))
