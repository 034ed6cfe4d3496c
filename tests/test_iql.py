"""IQL against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import bc, iql
from common.datasets import Transition
from common.environments import Spec
from common.networks import DiscreteCritic, Value

SMALL = dict(batch_size=512, hidden=(32,), learning_rate=1e-3, tau=0.05)  # large batches: little noise in V


def expectiles(data, spec, taus, num_updates, **changes):
    """Train one run per expectile, as one program. Returns V (taus, states), Q (taus, states, actions), pi likewise."""
    states = jnp.eye(spec.obs_dim)

    def one(expectile):
        cfg = iql.Config(**SMALL, expectile=expectile, num_updates=num_updates, log_interval=num_updates, **changes)
        agent = iql.make_agent(cfg, spec)
        state, metrics = iql.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)
        v = Value(cfg.hidden).apply(state.value.params, states)
        q = DiscreteCritic(spec.action_dim, 2, cfg.hidden).apply(state.critic.params, states).min(axis=0)
        actor = iql.CategoricalActor(spec.action_dim, cfg.hidden).apply(state.actor.params, states)
        return v, q, jax.nn.softmax(actor.logits)

    return jax.jit(jax.vmap(one))(jnp.array(taus))


def random_batch(discrete=False, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(jax.random.normal(k[0], (n, 3)), action, reward, jax.random.normal(k[3], (n, 3)), terminal)


def test_expectile_loss():
    # u = -2, 0, 2 and tau = 0.7: |0.7 - 1| * 4 = 1.2, 0, 0.7 * 4 = 2.8
    np.testing.assert_allclose(iql.expectile_loss(jnp.array([-2.0, 0.0, 2.0]), 0.7), [1.2, 0.0, 2.8], rtol=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_expectile_of_a_fair_coin_is_tau(tau):
    # argmin_m E L2_tau(x - m), x in {0, 1}: tau (1 - m) = (1 - tau) m, so m = tau
    grad = jax.grad(lambda m: iql.expectile_loss(jnp.array([0.0, 1.0]) - m, tau).mean())
    np.testing.assert_allclose(grad(tau), 0.0, atol=1e-6)


def test_bandit(optimised):
    # One state, arms of reward 1 and 2 taken with mu = (0.75, 0.25), every step terminal, so Q = (1, 2).
    # V: tau * 0.25 (2 - V) = (1 - tau) * 0.75 (V - 1); tau = 0.5: 1.25, 0.7: 1.4375, 0.9: 1.75.
    # pi(1) = 0.25 e^(3 (2 - V)) / (that + 0.75 e^(3 (1 - V))) = 1 / (1 + 3 e^-3) = 0.870049 for every V.
    arm = jnp.arange(64) % 4 // 3
    data = Transition(jnp.ones((64, 1)), arm, 1.0 + arm, jnp.ones((64, 1)), jnp.ones(64))
    v, q, pi = expectiles(data, Spec(1, 2, True), [0.5, 0.7, 0.9], 3000, beta=3.0)
    np.testing.assert_allclose(v[:, 0], [1.25, 1.4375, 1.75], atol=0.03)
    np.testing.assert_allclose(q[:, 0], [[1, 2]] * 3, atol=0.01)
    np.testing.assert_allclose(pi[:, 0, 1], [0.870049] * 3, atol=0.01)


def test_two_state_chain(optimised):
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform data, discount 0.9.
    # V(s1) is the expectile of (0, 2) = 2 tau; Q(s0, go) = 1.8 tau; V(s0) the expectile of (1, 1.8 tau):
    # tau = 0.5: 0.95; 0.7: 1.182; 0.9: 1.558. pi(go|s0) = sigmoid(3 (1.8 tau - 1)); pi(go|s1) = sigmoid(6) = 0.9975.
    row = jnp.arange(64) % 4
    state, go = row // 2, row % 2
    reward = jnp.array([1.0, 0.0, 0.0, 2.0])[row]
    terminal = jnp.array([1.0, 0.0, 1.0, 1.0])[row]
    data = Transition(jax.nn.one_hot(state, 2), go, reward, jax.nn.one_hot(jnp.ones_like(row), 2), terminal)
    v, q, pi = expectiles(data, Spec(2, 2, True), [0.5, 0.7, 0.9], 4000, beta=3.0, discount=0.9)
    np.testing.assert_allclose(v, [[0.95, 1.0], [1.182, 1.4], [1.558, 1.8]], atol=0.05)
    np.testing.assert_allclose(q[:, 0, 1], [0.9, 1.26, 1.62], atol=0.05)
    np.testing.assert_allclose(pi[:, 0, 1], [0.4256, 0.6857, 0.8653], atol=0.03)
    np.testing.assert_allclose(pi[:, 1, 1], [0.9975] * 3, atol=0.005)


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_zero_is_behaviour_cloning_bit_for_bit(discrete):
    spec, batch = Spec(3, 3 if discrete else 2, discrete), random_batch(discrete)
    new = []
    for algo, changes in ((iql, {"beta": 0.0, "learning_rate": 3e-4}), (bc, {})):
        agent = algo.make_agent(algo.Config(hidden=(8,), **changes), spec)
        state = jax.jit(agent.init)(jax.random.key(0))
        new.append(jax.jit(agent.update)(state, batch)[0].actor.params)
    chex.assert_trees_all_equal(*new)


def test_order_of_one_update():
    """V first; then pi and Q with the new V; the Q of both the advantage and V is the target before it moves."""
    cfg = iql.Config(hidden=(8,), beta=2.0, learning_rate=0.1, max_weight=np.inf)
    agent = iql.make_agent(cfg, Spec(3, 2))
    batch = random_batch()
    before = jax.jit(agent.init)(jax.random.key(0))
    before = before._replace(target_critic=jax.tree.map(lambda x: 1.1 * x, before.target_critic))
    after, info = jax.jit(agent.update)(before, batch)

    def q(params):
        return iql.Critic(2, cfg.hidden).apply(params, batch.obs, batch.action)

    def v(params, obs):
        return Value(cfg.hidden).apply(params, obs)

    q_hat = q(before.target_critic).min(axis=0)
    u = q_hat - v(before.value.params, batch.obs)
    np.testing.assert_allclose(info["value_loss"], (np.where(u < 0, 0.1, 0.9) * u**2).mean(), rtol=1e-5)
    weight = np.exp(2 * (q_hat - v(after.value.params, batch.obs)))
    np.testing.assert_allclose(info["weight"], weight.mean(), rtol=1e-5)
    target = batch.reward + 0.99 * (1 - batch.terminal) * v(after.value.params, batch.next_obs)
    loss = ((q(before.critic.params) - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-5)


def test_weights_are_clipped_and_finite():
    # exp(beta A) reaches 100 at A = ln(100) / beta: 1.5351 for beta 3, 0.4605 for beta 10
    for beta, edge in ((3.0, 1.5351), (10.0, 0.4605)):
        np.testing.assert_allclose(np.exp(beta * edge), 100, rtol=1e-3)
    agent = iql.make_agent(iql.Config(hidden=(8,)), Spec(3, 2))
    state = jax.jit(agent.init)(jax.random.key(0))
    huge = jax.tree.map(lambda x: 1e4 * x + 1e4, state.target_critic)  # advantages of 1e4 and more
    new, info = jax.jit(agent.update)(state._replace(target_critic=huge), random_batch())
    assert info["weight"] == 100
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.actor.params))


@pytest.mark.parametrize("online_steps, rate", [(0, [0.5, 0.0]), (100, [1.0, 1.0])])
def test_learning_rate_of_the_actor_alone_decays_along_a_cosine_unless_it_goes_on(online_steps, rate):
    # cos: at half of num_updates half of the rate, at the end zero; critic and value keep theirs. A run that goes on
    # on-line keeps its rate: with T_max = num_updates, a cosine would be 0 at the switch and then rise again
    cfg = iql.Config(hidden=(8,), num_updates=1000, online_steps=online_steps)
    agent = iql.make_agent(cfg, Spec(3, 2))
    state, batch = jax.jit(agent.init)(jax.random.key(0)), random_batch()

    def step_sizes(count):
        def late(trainable):
            is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)  # noqa: E731
            set_count = lambda x: x._replace(count=jnp.array(count)) if is_schedule(x) else x  # noqa: E731
            return trainable._replace(opt_state=jax.tree.map(set_count, trainable.opt_state, is_leaf=is_schedule))

        late_state = state._replace(actor=late(state.actor), critic=late(state.critic), value=late(state.value))
        new, _ = jax.jit(agent.update)(late_state, batch)
        move = lambda name: optax.tree.norm(  # noqa: E731
            optax.tree.sub(getattr(new, name).params, getattr(state, name).params)
        )
        return np.array([move("actor"), move("critic"), move("value")])

    full = step_sizes(0)
    np.testing.assert_allclose(step_sizes(500) / full, [rate[0], 1, 1], rtol=1e-3)
    np.testing.assert_allclose(step_sizes(1000) / full, [rate[1], 1, 1], atol=1e-4)
