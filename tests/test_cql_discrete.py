"""Discrete CQL against numbers worked out by hand. With hidden=() the critic is linear, its biases a table."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import cql_discrete, dqn
from common.datasets import Transition
from common.environments import Spec


def random_batch(n=8):
    k = jax.random.split(jax.random.key(1), 5)
    terminal = jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    obs, next_obs = (jax.random.normal(k[i], (n, 3)) for i in (0, 3))
    return Transition(obs, jax.random.randint(k[1], (n,), 0, 4), jax.random.normal(k[2], (n,)), next_obs, terminal)


def bandit(action, reward):
    """One state in which every step is terminal."""
    n = len(action)
    return Transition(jnp.zeros((n, 1)), jnp.array(action), jnp.float32(reward), jnp.zeros((n, 1)), jnp.ones(n))


def constant(outputs):
    """Parameters of a linear network on one input that returns `outputs`."""
    return {"params": {"Dense_0": {"linear": {"bias": jnp.float32(outputs), "kernel": jnp.zeros((1, len(outputs)))}}}}


# --- The conservative term -------------------------------------------------------------------------------


def test_conservative_loss():
    # log(e^1 + e^2 + e^3) = 3.407606
    loss = cql_discrete.conservative_loss(jnp.array([[1.0, 2.0, 3.0]] * 2), jnp.array([0, 2]))
    np.testing.assert_allclose(loss, [2.407606, 0.407606], rtol=1e-6)


def test_conservative_loss_is_the_cross_entropy_of_the_boltzmann_policy():
    key, key_action = jax.random.split(jax.random.key(0))
    q, action = 3 * jax.random.normal(key, (32, 5)), jax.random.randint(key_action, (32,), 0, 5)
    loss, gradient = jax.vmap(jax.value_and_grad(cql_discrete.conservative_loss))(q, action)
    pi = jax.nn.softmax(q)
    np.testing.assert_allclose(loss, -np.log(pi[np.arange(32), action]), rtol=1e-5, atol=1e-5)
    # so its gradient raises what the data take by one, and lowers every action by its probability
    np.testing.assert_allclose(gradient, pi - jax.nn.one_hot(action, 5), atol=1e-6)
    np.testing.assert_allclose(cql_discrete.conservative_loss(q + 7, action), loss, rtol=1e-5, atol=1e-5)


def test_bandit(optimised):
    # Rewards (1, 0). While |Q - r| < 1 the Huber loss is half the squared error, the paper's own, and Q solves
    # beta (Q - r) + alpha (softmax(Q) - beta) = 0, whose roots are below. For alpha to infinity softmax(Q) = beta.
    alphas = jnp.array([0.5, 1.0, 10.0, 1000.0])
    for arms, roots in (
        ([0, 1], [(0.83742, 0.16258), (0.75262, 0.24738), (0.54548, 0.45452)]),  # beta = (0.5, 0.5)
        ([0, 0, 0, 0, 1], [(1.02702, -0.10806), (1.03969, -0.15876), (1.07030, -0.28121)]),  # (0.8, 0.2)
    ):
        data = bandit(arms, 1 - np.array(arms))

        def train(alpha, data=data):
            cfg = cql_discrete.Config(hidden=(), learning_rate=0.01, alpha=alpha)
            agent = cql_discrete.make_agent(cfg, Spec(1, 2, True))
            state, _ = jax.lax.scan(
                lambda s, _: (agent.update(s, data)[0], None), agent.init(jax.random.key(0)), length=4000
            )
            return agent.q(state, jnp.zeros((2, 1)), jnp.arange(2))

        q, beta = jax.jit(jax.vmap(train))(alphas), 1 - np.mean(arms)
        np.testing.assert_allclose(q[:3], roots, atol=1e-3)
        # the mean of Q over the data's actions is that of the rewards, whatever alpha is
        np.testing.assert_allclose(q[:3] @ np.array([beta, 1 - beta]), [beta] * 3, atol=1e-3)
        np.testing.assert_allclose(jax.nn.softmax(q[3]), [beta, 1 - beta], atol=1e-3)


def test_the_targets_maximum_takes_what_the_term_raises(optimised):
    # One state that follows itself, rewards 0: every true value is 0. beta = (0.8, 0.2), alpha 1, discount 0.9.
    # beta (Q - y) + alpha (softmax(Q) - beta) = 0 with y = 0.9 Q(a0): Q(a0) = alpha (1 - pi(a0) / 0.8) / (1 - 0.9),
    # and D = Q(a0) - Q(a1) = alpha (pi(a1) / 0.2 - pi(a0) / 0.8), where pi(a0) = 1 / (1 + exp(-D)): D = 0.7522,
    # pi(a0) = 0.67965, Q = (1.5043, 0.7522). With the mean over the data's actions in y, that of Q would be 0.
    data = bandit([0, 0, 0, 0, 1], np.zeros(5))._replace(terminal=jnp.zeros(5))
    agent = cql_discrete.make_agent(cql_discrete.Config(hidden=(), learning_rate=0.01, discount=0.9), Spec(1, 2, True))

    @jax.jit
    def train():
        step = lambda state, _: (agent.update(state, data)[0], None)  # noqa: E731
        state, _ = jax.lax.scan(step, agent.init(jax.random.key(0)), length=4000)
        return agent.q(state, jnp.zeros((2, 1)), jnp.arange(2))

    np.testing.assert_allclose(train(), [1.5043, 0.7522], atol=1e-3)


@pytest.mark.parametrize("double", [False, True])
def test_alpha_zero_is_dqn_bit_for_bit(double):
    after = []
    for algo, changes in ((cql_discrete, {"alpha": 0.0}), (dqn, {})):
        agent = algo.make_agent(algo.Config(hidden=(8,), learning_rate=0.1, double=double, **changes), Spec(3, 4, True))
        state, update = jax.jit(agent.init)(jax.random.key(0)), jax.jit(agent.update)
        for _ in range(4):
            state, info = update(state, random_batch())
        after.append((*state.critic, state.target_critic, info["critic_loss"], info["q"]))
    chex.assert_trees_all_equal(*after)


def test_loss_is_the_sum_of_its_two_terms():
    agent = cql_discrete.make_agent(cql_discrete.Config(hidden=(), alpha=0.3), Spec(1, 3, True))
    state = jax.jit(agent.init)(jax.random.key(0))
    state = state._replace(critic=state.critic._replace(params=constant([1.0, 2.0, 3.0])))
    _, info = jax.jit(agent.update)(state, bandit([0], [5.0]))
    # Huber of 5 - 1: 4 - 1/2; the conservative term as above
    expect = {"td_loss": 3.5, "conservative_loss": 2.407606, "critic_loss": 3.5 + 0.3 * 2.407606, "q": 1.0}
    chex.assert_trees_all_close(info, expect, rtol=1e-6)


# --- Quantile regression -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "z, target, loss",
    [
        # midpoints 1/4 and 3/4; errors 3 and 2: 1/4 (3 - 1/2) + 3/4 (2 - 1/2)
        ([0.0, 1.0], [3.0], 1.75),
        ([0.0, 1.0], [3.0, 3.0], 1.75),  # a mean over the target's quantiles
        # errors -2 and -3: weights 1 - 1/4 and 1 - 3/4: 3/4 (2 - 1/2) + 1/4 (3 - 1/2)
        ([0.0, 1.0], [-2.0], 1.75),
        # errors 1 and 10 of the first, 0 and 9 of the second: 1/4 (0.5 + 9.5) / 2 + 3/4 (0 + 8.5) / 2
        ([0.0, 1.0], [1.0, 10.0], 4.4375),
        # all quantiles at one point: sum_i of the midpoints = n / 2, times the Huber loss 2.5
        ([1.0] * 8, [4.0], 4 * 2.5),
        ([1.0] * 8, [-2.0], 4 * 2.5),
    ],
)
def test_quantile_loss(z, target, loss):
    batch = (jnp.array([z] * 3), jnp.array([target] * 3))
    np.testing.assert_allclose(cql_discrete.quantile_loss(*batch), [loss] * 3, rtol=1e-6)


def test_quantiles_of_four_rewards(optimised):
    # Rewards 0, 10, 20, 30 in equal shares, 4 quantiles. At z = e, 0 < e < 1, of the first (midpoint 1/8) the errors
    # are -e, weight 7/8, and three above 1, whose slope is 1 and weight 1/8: 7/8 e = 3/8, e = 3/7. Of the second (3/8)
    # at 10 + e: 5/8 (1 + e) = 2 * 3/8, e = 1/5. The others mirror them, and their mean is that of the rewards.
    rewards = np.arange(4) * 10.0
    data = bandit([0] * 4, rewards)
    cfg = cql_discrete.Config(hidden=(), learning_rate=0.03, alpha=0.0, num_quantiles=4)
    agent = cql_discrete.make_agent(cfg, Spec(1, 1, True))
    run = jax.jit(
        lambda key: jax.lax.scan(lambda s, _: (agent.update(s, data)[0], None), agent.init(key), length=4000)[0]
    )
    state = run(jax.random.key(0))
    np.testing.assert_allclose(
        state.critic.params["params"]["Dense_0"]["linear"]["bias"], rewards + [3 / 7, 1 / 5, -1 / 5, -3 / 7], atol=5e-3
    )
    np.testing.assert_allclose(agent.q(state, jnp.zeros((1, 1)), jnp.zeros(1, int)), [15.0], atol=5e-3)


@pytest.mark.parametrize("double, td_loss", [(False, 4.4375), (True, 3.8)])
def test_target_of_the_quantiles_is_of_the_action_with_the_largest_mean(double, td_loss):
    # Reward 1, discount 0.9. Zbar(s', a0) = (0, 10), Zbar(s', a1) = (4, 5): the mean prefers a0, y = (1, 10); by the
    # smallest or the first quantile it would be a1. The online Z(s', a0) = (0, 1), Z(s', a1) = (2, 2) choose a1:
    # y = (4.6, 5.5). Z(s, a0) = (0, 1): 4.4375 as above, and 1/4 (4.1 + 5) / 2 + 3/4 (3.1 + 4) / 2 = 3.8.
    cfg = cql_discrete.Config(hidden=(), discount=0.9, num_quantiles=2, double=double)
    agent = cql_discrete.make_agent(cfg, Spec(1, 2, True))
    state = jax.jit(agent.init)(jax.random.key(0))
    state = state._replace(
        critic=state.critic._replace(params=constant([0.0, 2.0, 1.0, 2.0])),
        target_critic=constant([0.0, 4.0, 10.0, 5.0]),
    )
    batch = Transition(jnp.zeros((3, 1)), jnp.zeros(3, int), jnp.ones(3), jnp.zeros((3, 1)), jnp.array([0.0, 0.0, 1.0]))
    _, info = jax.jit(agent.update)(state, batch)
    # the third row ends: y = (1, 1): 1/4 * 1/2 + 3/4 * 0
    np.testing.assert_allclose(info["td_loss"], (2 * td_loss + 0.125) / 3, rtol=1e-6)
    # Q(s, .) is the mean of the quantiles, (0.5, 2): log(e^0.5 + e^2) - 0.5 = 1.701413
    np.testing.assert_allclose(info["conservative_loss"], 1.701413, rtol=1e-6)
    np.testing.assert_allclose(info["q"], 0.5)


def test_acts_by_the_mean_of_the_quantiles():
    # Z(s, a0) = (0, 10), Z(s, a1) = (4, 5): means 5 and 4.5, where the first quantile alone prefers a1
    agent = cql_discrete.make_agent(cql_discrete.Config(hidden=(), num_quantiles=2), Spec(1, 2, True))
    state = jax.jit(agent.init)(jax.random.key(0))
    state = state._replace(critic=state.critic._replace(params=constant([0.0, 4.0, 10.0, 5.0])))
    assert not agent.act(state, jnp.zeros((3, 1)), jax.random.key(0)).any()
    np.testing.assert_allclose(agent.q(state, jnp.zeros((2, 1)), jnp.arange(2)), [5.0, 4.5])


def test_continuous_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="discrete actions"):
        cql_discrete.make_agent(cql_discrete.Config(), Spec(3, 2))
