"""Actionable Models against numbers worked out by hand. (The cross-entropy method is that of qt_opt.py.)"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walks

from algos import actionable_models as am
from algos import qt_opt
from common.environments import Spec

KEY = jax.random.key(0)
SMALL = dict(batch_size=16, hidden=(8,), num_samples=8, num_elites=2)


def test_negatives_by_hand():
    # exp(0.5) : exp(0) : exp(-0.5); without the first 0.62246, 0.37754; with temperature 0.5 logits of 1, 0
    q = jnp.array([0.5, 0.0, -0.5])
    np.testing.assert_allclose(am.negatives(q, 1.0), [0.506480, 0.307196, 0.186324], rtol=1e-5)
    np.testing.assert_allclose(am.negatives(q, 1.0, jnp.array(0)), [0, 0.622459, 0.377541], rtol=1e-5)
    np.testing.assert_allclose(am.negatives(q, 0.5, jnp.array(2)), [0.731059, 0.268941, 0], rtol=1e-5)


@pytest.mark.parametrize("y, actions, expected", [(1.0, 2, 0.60706), (1.0, 4, 0.71198), (0.5, 2, 0.31675)])
def test_why_the_taken_action_is_no_negative(y, actions, expected):
    """Were it one, its value would settle at y / (1 + p), p its own chance: too low, though in the right order."""
    q = jnp.zeros(actions)
    for _ in range(200):
        q = q.at[0].set(y / (1 + am.negatives(q, 1.0)[0]))
    np.testing.assert_allclose(q[0], expected, atol=1e-4)


class Table:
    """Q of the pair of one-hot vectors in obs, of all actions or the given one, in the place of DiscreteCritic."""

    def __init__(self, action_dim, num_critics, hidden, initializer):
        self.shape = num_critics, action_dim

    def init(self, key, obs, action):
        n = obs.shape[-1] // 2
        return {"Dense": jnp.zeros((self.shape[0], n, n, self.shape[1]))}

    def apply(self, params, obs, action=None):
        state, goal = jnp.split(obs, 2, axis=-1)
        q = jnp.einsum("ksga,...s,...g->k...a", params["Dense"], state, goal)
        return (
            q
            if action is None
            else jnp.take_along_axis(q, jnp.broadcast_to(action, q.shape[:-1])[..., None], -1)[..., 0]
        )


def test_goals_of_other_episodes_chain_walks(monkeypatch, optimised):
    """0-1-2-(3) and 2-3-4-(5), all by action 1: Q(0, 1, 4) = 0.9^3 although no episode has both, and action 0, which
    nobody took, is worth nothing. Without random goals 0 and 4 are never paired."""
    monkeypatch.setattr(am, "DiscreteCritic", Table)
    data = walks.rows(walks.STITCH, actions=[1] * 6)
    for p_future, expected in ((0.5, [0.729, 0.81, 0.9, 1.0]), (1.0, None)):
        cfg = am.Config(batch_size=64, hidden=(4,), discount=0.9, tau=0.2, learning_rate=0.01, p_future=p_future)
        _, state = walks.train(am, cfg, walks.spec(), data, 3000)
        q = np.asarray(state.critic.params["Dense"][0])
        if expected:
            np.testing.assert_allclose(q[:4, 4, 1], expected, atol=0.04)
            assert np.abs(q[:4, 4, 0]).max() < 0.04
        else:
            assert q[0, 4, 1] == 0


def test_negatives_push_each_value_by_twice_itself_times_its_chance(monkeypatch):
    """The gradient is 2 p Q, none goes through p, and none of Q(s', .): CQL's is p, whatever Q is."""
    monkeypatch.setattr(am, "DiscreteCritic", Table)
    cfg = am.Config(batch_size=1, hidden=(4,), weight=3.0, learning_rate=1.0)
    monkeypatch.setattr(am.optax, "adam", lambda rate: am.optax.sgd(rate))
    agent = am.make_agent(cfg, walks.spec(2, actions=3))
    state = agent.init(KEY)
    values = jnp.array([0.2, 0.6, 0.4])
    params = {"Dense": jnp.zeros((2, 2, 2, 3)).at[:, 0, 1].set(values)}
    state = state._replace(critic=state.critic._replace(params=params))
    s, t, g = walks.one_hot([0], 2), walks.one_hot([1], 2), walks.one_hot([1], 2)
    row = am.Transition(
        jnp.concatenate([s, g], -1), jnp.array([0]), jnp.ones(1), jnp.concatenate([t, g], -1), jnp.ones(1)
    )
    new, info = agent.update(state, row)
    p = np.array([0, 0.549834, 0.450166])  # of exp(0.6), exp(0.4)
    # y = 1: 2 (0.2 - 1) for the action that was taken
    np.testing.assert_allclose(
        values - new.critic.params["Dense"][0, 0, 1], [-1.6, *(3 * 2 * p * values)[1:]], rtol=1e-4
    )
    np.testing.assert_allclose(info["critic_loss"], 2 * (0.64 + 3 * (p * values**2).sum()), rtol=1e-4)


def test_targets_stay_within_zero_and_one(monkeypatch):
    monkeypatch.setattr(am, "DiscreteCritic", Table)
    agent = am.make_agent(am.Config(batch_size=1, hidden=(4,), weight=0.0, discount=0.9), walks.spec(2))
    state = agent.init(KEY)
    s, g = walks.one_hot([0], 2), walks.one_hot([1], 2)
    row = am.Transition(
        jnp.concatenate([s, g], -1), jnp.array([0]), jnp.zeros(1), jnp.concatenate([s, g], -1), jnp.zeros(1)
    )
    for size, y in ((7.0, 0.9), (-7.0, 0.0)):
        high = state._replace(target_critic=jax.tree.map(lambda x, size=size: x + size, state.target_critic))
        np.testing.assert_allclose(agent.update(high, row)[1]["critic_loss"], 2 * y**2, rtol=1e-5)


def test_the_next_action_is_best_by_the_first_slow_critic_and_worth_what_the_smaller_says(monkeypatch):
    # Qbar_1(1, 1, .) = (0.2, 0.6), Qbar_2 = (0.9, 0.3): action 1, worth 0.3. The online critics, which are 0.9 and 0.1,
    # would take action 0. y = 0.9 * 0.3, and each of two online critics has 0 for the action in the row: 2 * 0.27^2
    monkeypatch.setattr(am, "DiscreteCritic", Table)
    agent = am.make_agent(am.Config(batch_size=1, hidden=(4,), weight=0.0, discount=0.9), walks.spec(2))
    state = agent.init(KEY)
    online = state.critic.params["Dense"].at[:, 1, 1].set(jnp.array([0.9, 0.1]))
    slow = state.target_critic["Dense"].at[:, 1, 1].set(jnp.array([[0.2, 0.6], [0.9, 0.3]]))
    state = state._replace(critic=state.critic._replace(params={"Dense": online}), target_critic={"Dense": slow})
    s, t = (walks.one_hot([i, 1], 2).reshape(1, -1) for i in (0, 1))
    info = agent.update(state, am.Transition(s, jnp.array([0]), jnp.zeros(1), t, jnp.zeros(1)))[1]
    np.testing.assert_allclose(info["next_q"], 0.3, rtol=1e-5)
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.27**2, rtol=1e-5)


def test_without_negatives_it_is_qt_opt():
    k = jax.random.split(KEY, 3)
    batch = am.Transition(
        jax.random.normal(k[0], (8, 6)), jax.random.uniform(k[1], (8, 2)), jnp.ones(8), jax.random.normal(k[2], (8, 6)),
        jnp.ones(8),
    )  # fmt: skip
    new = []
    for algo, spec, options in ((am, Spec(3, 2, goal_dim=3), {"weight": 0.0}), (qt_opt, Spec(6, 2), {})):
        agent = algo.make_agent(algo.Config(**SMALL, **options), spec)
        new.append(jax.jit(agent.update)(jax.jit(agent.init)(KEY), batch)[0])
    chex.assert_trees_all_close(new[0].critic.params, new[1].critic.params, rtol=1e-5, atol=1e-7)


def test_goals_and_who_reaches_them():
    """As in gc_td3_bc.py, but 1 on arrival: not by the last row of an episode, though the goal's row is the next."""
    data = walks.rows([[0, 1, 2, 3], [3, 4, 5, 6]], size=7)
    b = am.draw(KEY, data, None, am.Config(batch_size=2000))
    state, goal = walks.state_of(b.obs[:, :7]), walks.state_of(b.obs[:, 7:])
    reached = (goal == state + 1) & (state != 2)
    np.testing.assert_array_equal(b.reward, reached)
    np.testing.assert_array_equal(b.terminal, reached)
    assert ((state == 2) & (goal == 3)).any()
    np.testing.assert_allclose(
        walks.frequencies(goal[state == 0], 6), [1 / 12, 1 / 3, 1 / 3, 1 / 12, 1 / 12, 1 / 12], atol=0.08
    )
