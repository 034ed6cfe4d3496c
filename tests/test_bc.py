"""Behaviour cloning against numbers worked out by hand. (The filter's tests are in test_datasets.py.)"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from algos import bc
from common.datasets import Transition
from common.environments import Spec

SMALL = dict(batch_size=512, hidden=(16,), learning_rate=3e-3, num_updates=1500, log_interval=1500)


def fit(cfg, spec, data):
    agent = bc.make_agent(cfg, spec)
    state = jax.jit(agent.init)(jax.random.key(0))
    state, info = jax.jit(bc.make_train(cfg, agent))(state, data)
    return agent, state, info


def one_state(action):
    n = len(action)
    return Transition(jnp.ones((n, 1)), action, jnp.arange(n) * 1.0, jnp.ones((n, 1)), jnp.ones(n))


def test_two_conflicting_actions(optimised):
    # Actions -0.5 and 0.5 in one state: the squared error is least at 0; the likelihood at mean 0 and standard
    # deviation 0.5, log 0.5 = -0.6931, where the entropy is log 0.5 + 0.5 log(2 pi e) = 0.7258
    data = one_state(jnp.where(jnp.arange(64) % 2 == 0, -0.5, 0.5)[:, None])
    for deterministic in (True, False):
        agent, state, info = fit(bc.Config(**SMALL, deterministic=deterministic), Spec(1, 1), data)
        np.testing.assert_allclose(agent.act(state, jnp.ones((1, 1)), jax.random.key(0)), [[0.0]], atol=0.05)
        if not deterministic:
            pi = bc.GaussianActor(1, (16,)).apply(state.actor.params, jnp.ones((1, 1)))
            np.testing.assert_allclose(pi.log_std, [[-0.6931]], atol=0.05)
            np.testing.assert_allclose(pi.entropy(), [0.7258], atol=0.05)
        else:
            np.testing.assert_allclose(info["actor_loss"], 0.25, atol=0.02)


def test_squared_error_is_the_mean_over_the_actions_dimensions():
    # hidden=() and zero weights: pi = 0; actions (0.5, 0.1): (0.25 + 0.01) / 2 = 0.13
    cfg = bc.Config(hidden=(), deterministic=True)
    agent = bc.make_agent(cfg, Spec(1, 2))
    state = jax.tree.map(jnp.zeros_like, agent.init(jax.random.key(0)).actor)
    _, info = jax.jit(agent.update)(bc.State(jax.random.key(0), state), one_state(jnp.array([[0.5, 0.1]] * 4)))
    np.testing.assert_allclose(info["actor_loss"], 0.13, rtol=1e-5)


def test_discrete_cloning_finds_the_frequencies(optimised):
    # mu = (0.75, 0.25): the cross-entropy is least at mu
    data = one_state(jnp.arange(64) % 4 // 3)
    _, state, _ = fit(bc.Config(**SMALL), Spec(1, 2, True), data)
    logits = bc.CategoricalActor(2, (16,)).apply(state.actor.params, jnp.ones((1, 1))).logits
    np.testing.assert_allclose(jax.nn.softmax(logits), [[0.75, 0.25]], atol=0.03)


def test_rewards_and_terminals_are_ignored_bit_for_bit():
    data = one_state(jax.random.uniform(jax.random.key(1), (64, 1)))
    cfg = bc.Config(**{**SMALL, "num_updates": 20, "log_interval": 20})
    _, a, _ = fit(cfg, Spec(1, 1), data)
    _, b, _ = fit(cfg, Spec(1, 1), data._replace(reward=data.reward[::-1], terminal=0 * data.terminal))
    chex.assert_trees_all_equal(a.actor, b.actor)
