"""GCIQL against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walks

from algos import gcbc, gciql
from common.environments import Spec

KEY = jax.random.key(0)
SMALL = dict(batch_size=16, hidden=(8,))


def luck():
    """From 0, action 0 leads to the goal 4 or to the dead end 5 by even chance, action 1 to 1, one step before 4."""
    state, next_state, action = [0, 0, 0, 0, 1, 5, 4], [4, 5, 1, 1, 4, 5, 4], [0, 0, 1, 1, 0, 0, 0]
    mask = jnp.array([1.0] * 6 + [0.0])
    obs, next_obs, goal = map(walks.one_hot, (state, next_state, [4] * 7))
    return gciql.Batch(obs, jnp.array(action), next_obs, goal, goal, mask * -1, mask)


@pytest.mark.parametrize("expectile, expected", [(0.5, -3.7), (0.7, -2.98), (0.9, -2.26), (0.99, -1.936)])
def test_it_does_not_believe_in_luck(monkeypatch, expectile, expected):
    # Q(0, 0) = (-1 - 10) / 2 = -5.5, Q(0, 1) = -1.9; V is their expectile with equal weights:
    # -5.5 + 3.6 expectile. exp(10 (Q - V)) of action 0 is nothing beside that of action 1.
    monkeypatch.setattr(gciql, "GoalValue", walks.Table)
    cfg = gciql.Config(hidden=(8,), discount=0.9, tau=0.5, expectile=expectile, extraction="awr", alpha=10.0)
    agent, state, _ = walks.settle(gciql, cfg, walks.spec(), luck(), steps=2000)
    np.testing.assert_allclose(state.value.params["params"]["table"][0, 0, 4], expected, atol=0.03)
    for member in state.critic.params["params"]["table"]:
        np.testing.assert_allclose(member[0, 4], [-5.5, -1.9], atol=0.03)
    # What it believes, in the environment's unit: 1 on arrival. Action 1 arrives in two steps: 0.9
    obs = walks.one_hot([0, 4]).reshape(1, -1)
    np.testing.assert_allclose(agent.q(state, obs, jnp.array([1])), [0.9], atol=0.01)
    pi = gciql.GoalActor(2, (8,), True).apply(state.actor.params, obs[:, :6], obs[:, 6:])
    assert jax.nn.softmax(pi.logits)[0, 0] < 1e-2


def test_ddpgbc_by_hand():
    # q = (-4, -2): -mean / mean|q| = 1; log pi = -1.962877 in both rows: 1 + 0.3 * 1.962877 = 1.588863
    loss = gciql.ddpgbc_loss(jnp.array([-4.0, -2.0]), jnp.full(2, -1.962877), 0.3)
    np.testing.assert_allclose(loss, 1.588863, rtol=1e-5)
    # The scale is not differentiated: d/dq = -1 / (2 * 3) for each of the two
    gradient = jax.grad(gciql.ddpgbc_loss)(jnp.array([-4.0, -2.0]), jnp.zeros(2), 0.3)
    np.testing.assert_allclose(gradient, [-1 / 6, -1 / 6], rtol=1e-5)


def test_awr_by_hand():
    # weights exp(3 * 0.1) = 1.349859 and exp(3 * 2) = 403.4, cut to 100; log pi = (-1, -2): (1.349859 + 200) / 2
    loss = gciql.awr_loss(jnp.array([0.1, 2.0]), jnp.array([-1.0, -2.0]), 3.0, 100.0)
    np.testing.assert_allclose(loss, 100.674929, rtol=1e-5)


def continuous(n=8):
    k = jax.random.split(KEY, 6)
    obs, next_obs, actor_goal, goal = (jax.random.normal(k[i], (n, 3)) for i in range(4))
    mask = jax.random.bernoulli(k[5], 0.7, (n,)).astype(float)
    return gciql.Batch(obs, jax.random.uniform(k[4], (n, 2), minval=-1), next_obs, actor_goal, goal, mask * -1, mask)


def one_update(cfg, change=lambda state: state, batch=None):
    agent = gciql.make_agent(cfg, Spec(3, 2, goal_dim=3))
    return jax.jit(agent.update)(change(jax.jit(agent.init)(KEY)), continuous() if batch is None else batch)


def test_all_networks_move_by_the_old_ones_and_a_reached_goal_ends():
    cfg, b = gciql.Config(**SMALL, learning_rate=0.1, expectile=0.8, discount=0.9), continuous()

    def slow(state):
        return state._replace(target_critic=jax.tree.map(lambda x: 1.1 * x, state.target_critic))

    state = slow(jax.jit(gciql.make_agent(cfg, Spec(3, 2, goal_dim=3)).init)(KEY))
    critic, value = gciql.GoalValue(2, (8,)), gciql.GoalValue(1, (8,))
    _, info = one_update(cfg, slow)
    q = critic.apply(state.target_critic, b.obs, b.goal, b.action).min(axis=0)
    u = q - value.apply(state.value.params, b.obs, b.goal)[0]
    np.testing.assert_allclose(info["value_loss"], np.mean(np.where(u >= 0, 0.8, 0.2) * u**2), rtol=1e-4)
    # reward and mask are -1 and 1, or 0 and 0
    y = -b.mask + 0.9 * b.mask * value.apply(state.value.params, b.next_obs, b.goal)[0]
    q = np.asarray(critic.apply(state.critic.params, b.obs, b.goal, b.action))
    np.testing.assert_allclose(info["critic_loss"], np.mean(((q - np.asarray(y)) ** 2).sum(axis=0)), rtol=1e-4)
    pi = gciql.GoalActor(2, (8,)).apply(state.actor.params, b.obs, b.actor_goal)
    q = critic.apply(state.critic.params, b.obs, b.actor_goal, pi.mean).min(axis=0)
    expected = -q.mean() / np.abs(q).mean() - 0.3 * pi.log_prob(b.action).mean()
    np.testing.assert_allclose(info["actor_loss"], expected, rtol=1e-4)


def test_beyond_the_bounds_only_cloning_pulls():
    """The critic is asked at clip(mu): where |mu| > 1 it has no say, and the gradient is that of cloning alone."""

    def far(state):
        def move(path, x):
            return x + 5 if "Dense_1" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path) else x

        params = jax.tree_util.tree_map_with_path(move, state.actor.params)
        return state._replace(actor=state.actor._replace(params=params))

    def other_critic(state):
        state = far(state)
        return state._replace(critic=state.critic._replace(params=jax.tree.map(lambda x: -x, state.critic.params)))

    cfg = gciql.Config(**SMALL)
    a, b = (one_update(cfg, change)[0].actor.params for change in (far, other_critic))
    chex.assert_trees_all_close(a, b, rtol=1e-6)
    a, b = (one_update(cfg)[0], one_update(cfg, lambda s: other_critic(s)._replace(actor=s.actor))[0])
    assert walks.differ(a.actor.params, b.actor.params)


def test_limits_are_cloning():
    b = continuous()
    agent = gcbc.make_agent(gcbc.Config(**SMALL), Spec(3, 2, goal_dim=3))
    clone, _ = jax.jit(agent.update)(jax.jit(agent.init)(KEY), gcbc.Batch(b.obs, b.action, b.actor_goal))
    awr, _ = one_update(gciql.Config(**SMALL, extraction="awr", alpha=0.0))
    chex.assert_trees_all_equal(clone.actor.params, awr.actor.params)
    much, _ = one_update(gciql.Config(**SMALL, alpha=1e7))  # Adam's first step has the gradient's direction alone
    chex.assert_trees_all_close(clone.actor.params, much.actor.params, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("random_goals", [True, False])
def test_walks_that_never_met_are_joined_by_random_goals(monkeypatch, random_goals, optimised):
    """0-1-2-(3) and 2-3-4-(5): only goals of other episodes ask how 4 is reached from 0. Q is V, where each state has
    one action: -(1 - 0.9^d) / 0.1 at d steps."""
    monkeypatch.setattr(gciql, "GoalValue", walks.Table)
    cfg = gciql.Config(batch_size=64, hidden=(4,), discount=0.9, tau=0.2, learning_rate=0.01, extraction="awr")
    cfg = gciql.dataclasses.replace(cfg, p_future=0.5 if random_goals else 0.8)
    _, state = walks.train(gciql, cfg, walks.spec(), walks.rows(walks.STITCH), 4000)
    v, q = state.value.params["params"]["table"][0, :5, 4], state.critic.params["params"]["table"][0, :5, 4, 0]
    if random_goals:
        np.testing.assert_allclose(v, [-3.439, -2.71, -1.9, -1, 0], atol=0.25)
        np.testing.assert_allclose(q, [-3.439, -2.71, -1.9, -1, 0], atol=0.25)
    else:
        assert v[0] == v[1] == q[0] == q[1] == 0 and abs(v[2] + 1.9) < 0.25  # never trained


def test_discrete_actions_need_awr():
    with pytest.raises(SystemExit, match="use --extraction awr"):
        gciql.make_agent(gciql.Config(**SMALL), walks.spec())
