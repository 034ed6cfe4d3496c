"""GCBC against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walks

from algos import gcbc
from common.environments import Spec

KEY = jax.random.key(0)


def drawn(index, end, n=10, p_future=1.0, size=40_000):
    index, end = jnp.full(size, index), jnp.full(size, end)
    return jax.jit(gcbc.draw_goals, static_argnums=3)(KEY, index, end, n, p_future)


@pytest.mark.parametrize(
    "index, expected",
    [
        (0, [0, 1 / 6, 1 / 3, 1 / 3, 1 / 6]),  # round(3 u) of a uniform u: both ends have half an interval
        (1, [0, 0, 1 / 4, 1 / 2, 1 / 4]),
        (2, [0, 0, 0, 1 / 2, 1 / 2]),
        (3, [0, 0, 0, 0, 1]),
        (4, [0, 0, 0, 0, 1]),  # the last row: the state itself
    ],
)
def test_goals_are_uniform_in_the_future_but_for_the_ends(index, expected):
    np.testing.assert_allclose(walks.frequencies(drawn(index, 4), 5), expected, atol=0.012)  # 4.5 standard errors


def test_other_goals_are_any_row():
    # 0.5 * (0, 1/4, 1/2, 1/4) of rows 1 .. 4, and 0.05 of each of ten rows
    expected = np.full(10, 0.05) + 0.5 * np.array([0, 0, 1 / 4, 1 / 2, 1 / 4, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(walks.frequencies(drawn(1, 4, p_future=0.5), 10), expected, atol=0.012)


def test_large_row_numbers_keep_their_future():
    """round(first u + last (1 - u)), as float64 has it, is wrong in float32: (0.3, 0.7) here, then out of range."""
    goal = np.asarray(drawn(5_000_000, 5_000_002, n=6_000_000)) - 5_000_000
    np.testing.assert_allclose(walks.frequencies(goal, 3), [0, 0.5, 0.5], atol=0.012)
    goal = np.asarray(drawn(30_000_001, 30_000_004, n=40_000_000)) - 30_000_001
    np.testing.assert_allclose(walks.frequencies(goal, 4), [0, 0.25, 0.5, 0.25], atol=0.012)


def test_a_batch_has_the_rows_and_the_states_of_their_goals():
    data = walks.rows(walks.STITCH, actions=np.arange(6))
    batch = gcbc.draw(KEY, data, None, gcbc.Config(batch_size=2000))
    row, goal = np.asarray(batch.action), walks.state_of(batch.actor_goal)
    np.testing.assert_array_equal(walks.state_of(batch.obs), np.array([0, 1, 2, 2, 3, 4])[row])
    pairs = set(zip(row.tolist(), goal.tolist(), strict=True))
    # Last states, 3 of the first episode and 5, begin no row: they are no goals. Of 0, goal 4 is in no episode.
    assert pairs == {(0, 1), (0, 2), (1, 2), (2, 2), (3, 3), (3, 4), (4, 4), (5, 4)}


def test_loss_is_half_a_squared_error():
    # log pi = -|a - mu|^2 / 2 - (d / 2) log(2 pi): an error of (0.3, -0.4) in two dimensions is -0.125 - 1.837877
    cfg, spec = gcbc.Config(hidden=(4,)), Spec(2, 2, goal_dim=2)
    agent = gcbc.make_agent(cfg, spec)
    state = jax.jit(agent.init)(KEY)
    state = state._replace(actor=jax.tree.map(jnp.zeros_like, state.actor))
    batch = gcbc.Batch(jnp.ones((3, 2)), jnp.tile(jnp.array([0.3, -0.4]), (3, 1)), jnp.ones((3, 2)))
    _, info = jax.jit(agent.update)(state, batch)
    np.testing.assert_allclose(info["actor_loss"], 1.962877, rtol=1e-5)


def test_acts_within_bounds_towards_the_goal_behind_the_observation():
    cfg, spec = gcbc.Config(hidden=(8,)), Spec(2, 2, goal_dim=3)
    agent = gcbc.make_agent(cfg, spec)
    state = jax.jit(agent.init)(KEY)
    obs, goal = jax.random.normal(KEY, (5, 2)), 1e4 * jax.random.normal(jax.random.key(1), (5, 3))
    action = agent.act(state, jnp.concatenate([obs, goal], axis=-1), KEY)
    mean = gcbc.GoalActor(2, (8,)).apply(state.actor.params, obs, goal).mean
    np.testing.assert_allclose(action, np.clip(mean, -1, 1), rtol=1e-5)
    assert np.abs(mean).max() > 1


@pytest.mark.parametrize("discrete", [False, True])
def test_of_two_ways_the_goal_decides(discrete, optimised):
    """From 0 one episode goes by action 0 to 1 and 2, another by action 1 to 3 and 4: each state names its way."""
    data = walks.rows([[0, 1, 2, 5], [0, 3, 4, 5]], actions=[0, 0, 0, 1, 1, 1])
    spec = walks.spec() if discrete else Spec(6, 1, goal_dim=6)
    data = data if discrete else data._replace(action=2.0 * data.action[:, None] - 1)
    cfg = gcbc.Config(batch_size=64, hidden=(32,), learning_rate=1e-2)
    agent, state = walks.train(gcbc, cfg, spec, data, 500)
    goals = walks.one_hot([1, 2, 3, 4])
    obs = jnp.concatenate([walks.one_hot([0, 0, 0, 0]), goals], axis=-1)
    action = np.asarray(agent.act(state, obs, KEY)).reshape(4)
    np.testing.assert_allclose(action, [0, 0, 1, 1] if discrete else [-1, -1, 1, 1], atol=0.15)
