"""HIQL against numbers worked out by hand."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walks

from algos import hiql
from common.environments import Spec

KEY = jax.random.key(0)
SMALL = dict(batch_size=16, hidden=(8,))
TASK = Spec(3, 2, goal_dim=3)


def random_batch(n=8):
    k = jax.random.split(KEY, 9)
    states = [jax.random.normal(k[i], (n, 3)) for i in range(7)]
    mask = jax.random.bernoulli(k[8], 0.7, (n,)).astype(float)
    action = jax.random.uniform(k[7], (n, 2), minval=-1)
    return hiql.Batch(states[0], action, *states[1:], mask * -1, mask)


def one_update(change=lambda state: state, **options):
    agent = hiql.make_agent(hiql.Config(**SMALL, **options), TASK)
    return jax.jit(agent.update)(change(jax.jit(agent.init)(KEY)), random_batch())


# --- Goals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_future", [1.0, 0.0])
def test_subgoals_lie_on_the_way(p_future):
    """k rows on, at most the last; and at most the goal where that lies ahead. A goal elsewhere cuts nothing short."""
    data = walks.rows([list(range(13)), list(range(13, 26))], size=26)
    cfg = hiql.Config(batch_size=3000, subgoal_steps=4, actor_p_future=p_future)
    b = jax.jit(hiql.draw, static_argnums=(2, 3))(KEY, data, None, cfg)
    state, low, high, sub = map(walks.state_of, (b.obs, b.low_goal, b.high_goal, b.subgoal))
    last = np.where(state < 13, 11, 24)
    np.testing.assert_array_equal(low, np.minimum(state + 4, last))
    np.testing.assert_array_equal(walks.state_of(b.subgoal_obs), sub)
    if p_future:
        np.testing.assert_array_equal(sub, np.minimum(low, high))
        assert np.all((high > state) | (state == last)) and np.any(sub < low)
    else:
        np.testing.assert_array_equal(sub, low)
        between = (high >= state) & (high < low)
        assert between.any() and len(set(high.tolist())) == 24


# --- Losses --------------------------------------------------------------------------------------------


class Itself(nn.Module):
    """A goal as it is, in the place of phi."""

    outputs: int
    hidden: tuple = ()
    normalized: bool = False

    def __call__(self, obs, goal):
        return goal


def distances(n, discount):
    """V*(s, g) of a chain that is walked to the right, -(1 - discount^d) / (1 - discount): (1, n, n)."""
    d = np.maximum(np.arange(n)[None] - np.arange(n)[:, None], 0)
    return np.tile(-(1 - discount**d) / (1 - discount), (2, 1, 1))


@pytest.mark.parametrize(
    "discount, state, target, goal, weight",
    [
        (0.9, 0, 1, 4, 8.9084),  # exp(3 (-2.71 + 3.439))
        (0.9, 0, 2, 4, 100.0),  # exp(3 (-1.9 + 3.439)) = 101.2, cut
        (0.9, 3, 4, 4, 20.0855),  # e^3: the goal itself
        (0.99, 100, 125, 600, 1.756),  # 500 steps from the goal: exp(3 * 0.18768)
        (0.99, 125, 100, 625, 0.6454),  # a step back: the inverse of exp(3 (V(500) - V(525)))
        (0.995, 20, 45, 620, 52.36),  # 600 steps, with a longer horizon
        (0.99, 0, 1, 25, 10.5596),
    ],
)
def test_weights_of_both_levels(monkeypatch, discount, state, target, goal, weight):
    monkeypatch.setattr(hiql, "GoalValue", walks.Table)
    monkeypatch.setattr(hiql, "GoalEncoder", Itself)
    n = goal + 1
    agent = hiql.make_agent(hiql.Config(hidden=(4,), rep_dim=n, discount=discount), walks.spec(n))
    start = agent.init(KEY)
    start = start._replace(value=start.value._replace(params={"phi": {}, "v": walks.table(distances(n, discount))}))
    s, t, g = (walks.one_hot([x], n) for x in (state, target, goal))
    b = hiql.Batch(s, jnp.zeros(1, int), t, g, g, t, t, g, jnp.zeros(1), jnp.zeros(1))
    info = agent.update(start, b)[1]
    for name in ("weight", "high_weight"):
        np.testing.assert_allclose(info[name], weight, rtol=2e-3)


def test_values_are_read_where_they_belong():
    """Each loss by its definition, with a target network that differs: phi has no slow copy."""
    b, old = random_batch(), jax.jit(hiql.make_agent(hiql.Config(**SMALL), TASK).init)(KEY)
    old = old._replace(target_value=jax.tree.map(lambda x: 1.2 * x, old.target_value))
    info = one_update(lambda _: old, discount=0.9, expectile=0.8)[1]
    encoder, value = hiql.GoalEncoder(10, (8,), normalized=True), hiql.GoalValue(2, (8,))

    def phi(obs, goal):
        return encoder.apply(old.value.params["phi"], obs, goal)

    def v(obs, goal, params=old.value.params["v"]):
        return np.asarray(value.apply(params, obs, phi(obs, goal)))

    np.testing.assert_allclose(jnp.linalg.norm(phi(b.obs, b.goal), axis=-1), np.full(8, 10**0.5), rtol=1e-5)
    y = np.asarray(b.reward) + 0.9 * np.asarray(b.mask) * v(b.next_obs, b.goal, old.target_value)
    advantage = y.min(axis=0) - v(b.obs, b.goal, old.target_value).mean(axis=0)
    loss = np.where(advantage >= 0, 0.8, 0.2) * (y - v(b.obs, b.goal)) ** 2
    np.testing.assert_allclose(info["value_loss"], loss.sum(axis=0).mean(), rtol=1e-4)

    weight = np.minimum(np.exp(3 * (v(b.next_obs, b.low_goal) - v(b.obs, b.low_goal)).mean(axis=0)), 100)
    pi = hiql.GoalActor(2, (8,)).apply(old.actor.params, b.obs, phi(b.obs, b.low_goal))
    np.testing.assert_allclose(info["actor_loss"], -np.mean(weight * pi.log_prob(b.action)), rtol=1e-4)

    weight = np.minimum(np.exp(3 * (v(b.subgoal_obs, b.high_goal) - v(b.obs, b.high_goal)).mean(axis=0)), 100)
    pi = hiql.GoalActor(10, (8,)).apply(old.high_actor.params, b.obs, b.high_goal)
    expected = -np.mean(weight * pi.log_prob(phi(b.obs, b.subgoal)))
    np.testing.assert_allclose(info["high_actor_loss"], expected, rtol=1e-4)


def test_phi_learns_from_the_value_alone():
    a, b = (one_update(alpha_low=x, alpha_high=x)[0] for x in (0.0, 5.0))
    chex.assert_trees_all_equal(a.value, b.value)
    assert walks.differ(a.actor, b.actor) and walks.differ(a.high_actor, b.high_actor)


def test_only_the_direction_of_a_subgoal_counts():
    """The high policy's mean is scaled to the length of phi: twice it names the same subgoal."""
    agent = hiql.make_agent(hiql.Config(**SMALL), TASK)
    state = jax.jit(agent.init)(KEY)

    def twice(path, x):
        return 2 * x if "Dense_1" in jax.tree_util.keystr(path) else x  # the last layer

    params = jax.tree_util.tree_map_with_path(twice, state.high_actor.params)
    obs = jax.random.normal(KEY, (5, 6))
    a, b = (
        agent.act(s, obs, KEY) for s in (state, state._replace(high_actor=state.high_actor._replace(params=params)))
    )
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    # The low policy is handed that subgoal, and not the goal
    z = hiql.GoalActor(10, (8,)).apply(state.high_actor.params, obs[:, :3], obs[:, 3:]).mean
    z = z / np.linalg.norm(z, axis=-1, keepdims=True) * 10**0.5
    expected = hiql.GoalActor(2, (8,)).apply(state.actor.params, obs[:, :3], z).mean
    np.testing.assert_allclose(a, np.clip(expected, -1, 1), rtol=1e-4, atol=1e-6)


# --- Training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_goals", [True, False])
def test_walks_that_never_met_are_joined_by_random_goals(monkeypatch, random_goals, optimised):
    """0-1-2-(3) and 2-3-4-(5): only goals of other episodes ask how 4 is reached from 0. The values, of which both
    levels take differences, are -(1 - 0.9^d) / 0.1 at d steps."""
    monkeypatch.setattr(hiql, "GoalValue", walks.Table)
    monkeypatch.setattr(hiql, "GoalEncoder", Itself)
    cfg = hiql.Config(batch_size=64, hidden=(4,), rep_dim=6, discount=0.9, tau=0.2, learning_rate=0.01, subgoal_steps=2)
    cfg = hiql.dataclasses.replace(cfg, p_future=0.5 if random_goals else 0.8)
    _, state = walks.train(hiql, cfg, walks.spec(), walks.rows(walks.STITCH), 3000)
    v = state.value.params["v"]["params"]["table"][0, :5, 4]
    if random_goals:
        np.testing.assert_allclose(v, [-3.439, -2.71, -1.9, -1, 0], atol=0.25)
    else:
        assert v[0] == v[1] == 0 and abs(v[2] + 1.9) < 0.25  # never trained
