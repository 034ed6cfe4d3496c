"""MARWIL against numbers worked out by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, marwil
from common.datasets import Transition
from common.environments import Spec
from common.networks import Value

NAN = jnp.nan  # for what must not be read


def fit(data, spec, sweep, num_updates=2000, **changes):
    """One run per element of `sweep` (name -> values), each update on all rows: V, c and the policy in every state.

    `reward_scale` multiplies rewards and returns; any other name is a field of Config. One-hot states and no hidden
    layer: tables.
    """
    states = jnp.eye(spec.obs_dim)

    def one(floats):
        scale = floats.pop("reward_scale", 1.0)
        rows = data._replace(reward=scale * data.reward, return_to_go=scale * data.return_to_go)
        cfg = marwil.Config(hidden=(), learning_rate=1e-2, **changes, **floats)
        agent = marwil.make_agent(cfg, spec)
        state, info = jax.lax.scan(
            lambda state, _: agent.update(state, rows), agent.init(jax.random.key(0)), length=num_updates
        )
        actor = (marwil.CategoricalActor if spec.discrete else marwil.GaussianActor)(spec.action_dim, cfg.hidden)
        return Value(()).apply(state.value.params, states), info["c"][-1], actor.apply(state.actor.params, states)

    return jax.jit(jax.vmap(one))({name: jnp.array(values) for name, values in sweep.items()})


@functools.cache
def small(td):
    """A Config, a state, and the jitted update."""
    cfg = marwil.Config(hidden=(8,), beta=0.7, learning_rate=0.1, td=td)
    agent = marwil.make_agent(cfg, Spec(3, 2))
    return cfg, agent.init(jax.random.key(0)), jax.jit(agent.update)


def random_batch(discrete=False, n=8):
    k = jax.random.split(jax.random.key(1), 6)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    obs, next_obs = jax.random.normal(k[0], (n, 3)), jax.random.normal(k[3], (n, 3))
    return Transition(obs, action, reward, next_obs, terminal, return_to_go=3 * jax.random.normal(k[5], (n,)))


def test_bandit():
    # One state, arms of reward 1 and 2 taken with mu = (0.75, 0.25), every step terminal: V = 1.25,
    # c^2 = 0.75 * 0.25^2 + 0.25 * 0.75^2 = 0.1875, A / c = (-0.57735, 1.73205).
    # pi(1) = 0.25 e^1.73205 / (that + 0.75 e^-0.57735) = 0.770438; with beta 0.5: 0.514018; with beta 0: mu.
    # Rewards of another scale k: V and c are k times as large, and the policy is the same.
    arm = jnp.array([0, 0, 0, 1])
    reward = 1.0 + arm
    data = Transition(jnp.ones((4, 1)), arm, reward, jnp.ones((4, 1)), jnp.ones(4), return_to_go=reward)
    sweep = {"beta": [1.0, 0.5, 0.0, 1.0, 1.0], "reward_scale": [1.0, 1.0, 1.0, 0.1, 4.0]}
    v, c, pi = fit(data, Spec(1, 2, True), sweep)
    scale = np.array(sweep["reward_scale"])
    np.testing.assert_allclose(v[:, 0] / scale, [1.25] * 5, atol=1e-3)
    np.testing.assert_allclose(c / scale, [0.433013] * 5, atol=1e-3)
    expect = [0.770438, 0.514018, 0.25, 0.770438, 0.770438]
    np.testing.assert_allclose(jax.nn.softmax(pi.logits)[:, 0, 1], expect, atol=1e-3)


def test_gaussian_bandit():
    # Actions -0.5 and 0.5, half and half, rewards 0 and 1: V = c = 0.5, A / c = -1 and 1; beta = ln(3) / 2 gives
    # weights 1 : 3, so mean 0.25 and variance 0.25 (1 - 0.25) = 0.1875, log std -0.8370
    action, reward = jnp.array([[-0.5], [0.5]]), jnp.array([0.0, 1.0])
    data = Transition(jnp.ones((2, 1)), action, reward, jnp.ones((2, 1)), jnp.ones(2), return_to_go=reward)
    v, c, pi = fit(data, Spec(1, 1), {"beta": [np.log(3) / 2]})
    np.testing.assert_allclose([v[0, 0], c[0]], [0.5, 0.5], atol=1e-3)
    np.testing.assert_allclose(pi.mean[0, 0], [0.25], atol=1e-3)
    np.testing.assert_allclose(pi.log_std[0, 0], [-0.8370], atol=1e-3)


@pytest.mark.parametrize("td", [False, True])
def test_two_state_chain(td):
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform actions, discount 0.9.
    # The episodes stop, stop, go-stop, go-go make six rows. V(s1) = 1; V(s0) = (1 + 0.9) / 2 = 0.95.
    # Returns: in s0 1, 1, 0, 1.8, so A = 0.05, 0.05, -0.95, 0.85; in s1 A = -1, 1. c^2 = 3.63 / 6 = 0.605.
    #   pi(go|s0): (e^(-0.95 / c) + e^(0.85 / c)) / 2 to e^(0.05 / c): 0.605786; pi(go|s1) = sigmoid(2 / c): 0.928991
    # One step: A of go in s0 is 0.9 V(s1) - 0.95 = -0.05 both times. c^2 = 2.01 / 6 = 0.335.
    #   pi(go|s0) = sigmoid(-0.1 / c) = 0.456914; pi(go|s1) = 0.969394.
    state = jnp.array([0, 0, 0, 1, 0, 1])
    go = jnp.array([0, 0, 1, 0, 1, 1])
    reward = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    terminal = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    to_go = jnp.array([1.0, 1.0, 0.0, 0.0, 1.8, 2.0])
    next_obs = jnp.array([[0.0, 1.0]] * 6)
    # Neither estimator reads what is the other's
    unread = {"return_to_go": to_go * NAN} if td else {"next_obs": next_obs * 1e3, "reward": reward * NAN}
    data = Transition(jax.nn.one_hot(state, 2), go, reward, next_obs, terminal, return_to_go=to_go)
    v, c, pi = fit(data._replace(**unread), Spec(2, 2, True), {"discount": [0.9]}, td=td)
    np.testing.assert_allclose(v[0], [0.95, 1.0], atol=1e-3)
    np.testing.assert_allclose(c[0] ** 2, 0.335 if td else 0.605, atol=1e-3)
    expect = [0.456914, 0.969394] if td else [0.605786, 0.928991]
    np.testing.assert_allclose(jax.nn.softmax(pi.logits)[0, :, 1], expect, atol=1e-3)


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_zero_is_behaviour_cloning_bit_for_bit(discrete):
    spec, batch = Spec(3, 3 if discrete else 2, discrete), random_batch(discrete)
    new = []
    for algo, changes in ((marwil, {"beta": 0.0}), (bc, {})):
        agent = algo.make_agent(algo.Config(hidden=(8,), **changes), spec)
        state, update = agent.init(jax.random.key(0)), jax.jit(agent.update)
        for _ in range(5):
            state, _ = update(state, batch)
        new.append(state.actor.params)
    chex.assert_trees_all_equal(*new)


@pytest.mark.parametrize("td", [False, True])
def test_order_of_two_updates(td):
    """A from the V of before the update; c with this batch's A; the moving average corrected for its start at 0."""
    cfg, state, update = small(td)
    batch = random_batch()
    squares = []
    for step in range(2):
        v, next_v = (Value(cfg.hidden).apply(state.value.params, obs) for obs in (batch.obs, batch.next_obs))
        target = batch.reward + 0.99 * (1 - batch.terminal) * next_v if td else batch.return_to_go
        advantage = target - v
        squares.append((advantage**2).mean())
        # c^2 = a_1, then (0.99 a_1 + a_2) / 1.99: the weights 0.01 * 0.99 and 0.01, over their sum
        c = np.sqrt(squares[0] if step == 0 else (0.99 * squares[0] + squares[1]) / 1.99)
        log_prob = marwil.GaussianActor(2, cfg.hidden).apply(state.actor.params, batch.obs).log_prob(batch.action)
        weight = np.exp(0.7 * advantage / c)
        state, info = update(state, batch)
        np.testing.assert_allclose(info["value_loss"], 0.5 * squares[-1], rtol=1e-5)
        np.testing.assert_allclose(info["c"], c, rtol=1e-5)
        np.testing.assert_allclose(info["weight"], weight.mean(), rtol=1e-4)
        np.testing.assert_allclose(info["actor_loss"], -(weight * log_prob).mean(), rtol=1e-4)


def test_the_target_of_a_step_is_not_differentiated():
    # One row that leads to its own state, V(s) = b (hidden=() and zero weights): A = 1 + 0.9 b - b, and the
    # semi-gradient of A^2 / 2 by b is -A = -1, where the residual gradient would be -0.1. Adam's mu is a tenth of it.
    cfg = marwil.Config(hidden=(), td=True, discount=0.9)
    agent = marwil.make_agent(cfg, Spec(1, 1))
    state = agent.init(jax.random.key(0))
    state = state._replace(value=jax.tree.map(jnp.zeros_like, state.value))
    one = jnp.ones((1, 1))
    state, _ = jax.jit(agent.update)(state, Transition(one, one, one[0], one, 0 * one[0], return_to_go=one[0]))
    np.testing.assert_allclose(state.value.opt_state[0].mu["params"]["MLP_0"]["Dense_0"]["linear"]["bias"], [-0.1])


def test_weights_are_finite():
    (_, state, update), batch = small(td=False), random_batch(n=64)
    # A first batch of huge advantages sets c before its weights are taken
    _, info = update(state, batch._replace(return_to_go=1e4 * batch.return_to_go))
    assert 0.5 < info["weight"] < 10
    # Where c has settled long ago, one outlier among 64 has A / c = sqrt(64 / 0.01) = 80: e^(0.7 * 80) = 2e24, and its
    # square overflows in Adam; cut, the weight is 1e6 / 64 = 15625 in the mean
    settled = state._replace(scale=state.scale._replace(count=jnp.array(10_000), ema=jnp.array(1e-3)))
    new, info = update(settled, batch._replace(return_to_go=batch.return_to_go.at[0].set(1e4)))
    np.testing.assert_allclose(info["weight"], 15626, atol=1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.actor))
