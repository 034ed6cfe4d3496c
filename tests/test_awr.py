"""AWR against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import awr, bc
from common.datasets import Transition
from common.environments import Spec
from common.networks import CategoricalActor, Value


def loop(reward, terminal, episode, next_v, discount, td_lambda):
    """R_t row by row, from the definition."""
    returns = np.zeros(len(reward))
    for t in reversed(range(len(reward))):
        if terminal[t]:
            returns[t] = reward[t]
        elif t + 1 == len(reward) or episode[t + 1] != episode[t]:  # cut off: V stands for what follows
            returns[t] = reward[t] + discount * next_v[t]
        else:
            returns[t] = reward[t] + discount * ((1 - td_lambda) * next_v[t] + td_lambda * returns[t + 1])
    return returns


def rows(n=40):
    rng = np.random.default_rng(0)
    episode = np.sort(rng.integers(0, 8, n))
    last = np.append(episode[1:] != episode[:-1], True)
    terminal = (last & (episode % 2 == 0)).astype(np.float32)  # the others are time-outs
    return rng.normal(size=n).astype(np.float32), terminal, episode, rng.normal(size=n).astype(np.float32)


@pytest.mark.parametrize("td_lambda", [0.0, 0.6, 1.0])
def test_lambda_returns_are_those_of_a_loop(td_lambda):
    returns = jax.jit(awr.lambda_returns, static_argnums=(4, 5))(*rows(), 0.9, td_lambda)
    np.testing.assert_allclose(returns, loop(*rows(), 0.9, td_lambda), rtol=1e-5, atol=1e-6)


def test_lambda_return_of_the_chain():
    # s0 go, then s1 go (reward 2, end) or s1 stop (0, end); V(s1) = 1, discount 0.9, lambda 0.95:
    # 0 + 0.9 (0.05 * 1 + 0.95 * 2) = 1.755 and 0.9 * 0.05 = 0.045
    reward, terminal = jnp.array([0.0, 2, 0, 0]), jnp.array([0.0, 1, 0, 1])
    returns = awr.lambda_returns(reward, terminal, jnp.array([0, 0, 1, 1]), jnp.array([1.0, 5, 1, 5]), 0.9, 0.95)
    np.testing.assert_allclose(returns, [1.755, 2, 0.045, 0], rtol=1e-5)


def train(data, spec, num_updates, **changes):
    cfg = awr.Config(
        **dict(batch_size=256, hidden=(32,), learning_rate=1e-3, log_interval=100, prepare_interval=100) | changes
    )
    agent = awr.make_agent(cfg, spec)
    step = jax.jit(awr.make_train(cfg, agent))
    state = agent.init(jax.random.key(0))
    for _ in range(num_updates // 100):
        state, _ = step(state, data)
    states = jnp.eye(spec.obs_dim) if spec.obs_dim > 1 else jnp.ones((1, 1))
    logits = CategoricalActor(spec.action_dim, cfg.hidden).apply(state.actor.params, states).logits
    return Value(cfg.hidden).apply(state.value.params, states), jax.nn.softmax(logits)


def test_bandit(optimised):
    # One state, arms of reward 1 and 2 taken with mu = (0.75, 0.25), every step terminal. V = 1.25; A = (-0.25, 0.75)
    # has mean 0 and deviation 0.433013, in units of which it is (-0.57735, 1.73205):
    # pi(1) = 0.25 e^1.73205 / (that + 0.75 e^-0.57735) = 0.770438; with beta 0 behaviour cloning, 0.25
    arm = jnp.arange(64) % 4 // 3
    data = Transition(jnp.ones((64, 1)), arm, 1.0 + arm, jnp.ones((64, 1)), jnp.ones(64), episode=jnp.arange(64))
    v, pi = train(data, Spec(1, 2, True), 2500)
    np.testing.assert_allclose(v[0], 1.25, atol=0.03)
    np.testing.assert_allclose(pi[0, 1], 0.770438, atol=0.02)
    # whatever the scale and the zero of the rewards
    _, pi = train(data._replace(reward=0.1 * data.reward - 0.3), Spec(1, 2, True), 2500)
    np.testing.assert_allclose(pi[0, 1], 0.770438, atol=0.03)


def random_batch(discrete=False, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    obs, next_obs = jax.random.normal(k[0], (n, 3)), jax.random.normal(k[3], (n, 3))
    to_go = jax.random.normal(k[2], (n,))
    return Transition(obs, action, to_go, next_obs, jnp.zeros(n), episode=jnp.arange(n) // 4, return_to_go=to_go)


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_zero_is_behaviour_cloning_bit_for_bit(discrete):
    spec, batch = Spec(3, 3 if discrete else 2, discrete), random_batch(discrete)
    new = []
    for algo, changes in ((awr, {"beta": 0.0}), (bc, {})):
        agent = algo.make_agent(algo.Config(hidden=(8,), **changes), spec)
        state = jax.jit(agent.init)(jax.random.key(0))
        new.append(jax.jit(agent.update)(state, batch)[0].actor.params)
    chex.assert_trees_all_equal(*new)


def test_relabelling_and_one_update():
    """Returns from the V of the state; advantages in units of the dataset's spread; all from the old V."""
    cfg = awr.Config(hidden=(8,), learning_rate=0.1, max_weight=np.inf)
    agent = awr.make_agent(cfg, Spec(3, 2))
    data = random_batch(n=32)
    before, labelled = jax.jit(agent.prepare)(agent.init(jax.random.key(0)), data)
    v, next_v = (Value(cfg.hidden).apply(before.value.params, x) for x in (data.obs, data.next_obs))
    returns = loop(data.reward, data.terminal, data.episode, next_v, 0.99, 0.95)
    np.testing.assert_allclose(labelled.return_to_go, returns, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([before.mean, before.std], [(returns - v).mean(), (returns - v).std()], rtol=1e-4)
    batch = jax.tree.map(lambda x: x[:8], labelled)
    _, info = jax.jit(agent.update)(before, batch)
    advantage = (returns - v - before.mean) / before.std
    np.testing.assert_allclose(info["weight"], np.exp(advantage[:8]).mean(), rtol=1e-3)
    np.testing.assert_allclose(info["value_loss"], 0.5 * ((returns - v)[:8] ** 2).mean(), rtol=1e-4)


def test_training_relabels_with_the_present_value():
    """One call of training starts from the returns that its state's V gives, whatever column the data bring."""
    cfg = awr.Config(hidden=(8,), log_interval=5, prepare_interval=5, batch_size=8)
    agent = awr.make_agent(cfg, Spec(3, 2))
    state, data = agent.init(jax.random.key(0)), random_batch(n=32)
    step = jax.jit(awr.make_train(cfg, agent))
    first, _ = step(state, data)
    chex.assert_trees_all_equal(step(state, data._replace(return_to_go=jnp.full(32, jnp.nan)))[0].actor, first.actor)
    _, labelled = agent.prepare(first, data)
    assert not np.allclose(labelled.return_to_go, agent.prepare(state, data)[1].return_to_go)


def test_weights_are_clipped_and_finite():
    # exp(A) reaches 20 at A = ln 20 = 2.9957 deviations
    agent = awr.make_agent(awr.Config(hidden=(8,)), Spec(3, 2))
    state, batch = jax.jit(agent.init)(jax.random.key(0)), random_batch()
    for advantage, weight in ((2.99, np.exp(2.99)), (3.0, 20.0), (1e4, 20.0)):
        v = Value((8,)).apply(state.value.params, batch.obs)
        new, info = jax.jit(agent.update)(state, batch._replace(return_to_go=v + advantage))
        np.testing.assert_allclose(info["weight"], weight, rtol=1e-3)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.actor.params))
