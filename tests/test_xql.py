"""XQL, SQL and EQL, which are IQL with another regression of V, against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, eql, sql, xql
from common.datasets import Transition
from common.environments import Spec
from common.networks import CategoricalActor, DiscreteCritic, Value

SMALL = dict(batch_size=512, hidden=(32,), learning_rate=1e-3, tau=0.05)


def train(algo, name, values, data, spec, num_updates, **changes):
    """One run per value of the field `name`, as one program: V (values, states), Q (values, states, actions), pi."""
    states = jnp.eye(spec.obs_dim) if spec.obs_dim > 1 else jnp.ones((1, 1))

    def one(x):
        cfg = algo.Config(**SMALL, num_updates=num_updates, log_interval=num_updates, **{name: x}, **changes)
        agent = algo.make_agent(cfg, spec)
        state, _ = algo.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)
        v = Value(cfg.hidden, layer_norm=True).apply(state.value.params, states)
        q = DiscreteCritic(spec.action_dim, 2, cfg.hidden).apply(state.critic.params, states).min(axis=0)
        actor = CategoricalActor(spec.action_dim, cfg.hidden).apply(state.actor.params, states)
        return v, q, jax.nn.softmax(actor.logits)

    return jax.jit(jax.vmap(one))(jnp.array(values))


def bandit():
    """One state, arms of reward 1 and 2 taken with mu = (0.75, 0.25), every step terminal: Q = (1, 2)."""
    arm = jnp.arange(64) % 4 // 3
    return Transition(jnp.ones((64, 1)), arm, 1.0 + arm, jnp.ones((64, 1)), jnp.ones(64)), Spec(1, 2, True)


def chain():
    """s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform data."""
    row = jnp.arange(64) % 4
    reward, terminal = jnp.array([1.0, 0, 0, 2])[row], jnp.array([1.0, 0, 1, 1])[row]
    next_obs = jax.nn.one_hot(jnp.ones_like(row), 2)
    return Transition(jax.nn.one_hot(row // 2, 2), row % 2, reward, next_obs, terminal), Spec(2, 2, True)


def random_batch(discrete=False, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(jax.random.normal(k[0], (n, 3)), action, reward, jax.random.normal(k[3], (n, 3)), terminal)


# --- XQL -----------------------------------------------------------------------------------------------


def test_gumbel_loss():
    # z = 0: 0; z = 1: e - 2; z = -1: 1 / e
    np.testing.assert_allclose(xql.gumbel_loss(jnp.array([0.0, 1.0, -1.0])), [0, np.e - 2, 1 / np.e], rtol=1e-5)


def test_xql_bandit(optimised):
    # V = b ln(0.75 e^(1/b) + 0.25 e^(2/b)): b = 0.5: 1.477229, 1: 1.357374, 2: 1.300596
    # pi(1), any state's constant cancels: 0.25 e^beta / (0.75 + 0.25 e^beta) = 0.475367 for beta = 1
    v, _, pi = train(xql, "temperature", [0.5, 1.0, 2.0], *bandit(), 3000, beta=1.0)
    np.testing.assert_allclose(v[:, 0], [1.477229, 1.357374, 1.300596], atol=0.03)
    np.testing.assert_allclose(pi[:, 0, 1], [0.475367] * 3, atol=0.02)


def test_xql_chain(optimised):
    # discount 0.9. b = 1: V(s1) = ln((1 + e^2) / 2) = 1.433781, Q(s0, go) = 0.9 of it = 1.290403,
    # V(s0) = ln((e + e^1.290403) / 2) = 1.155706; b = 0.5: 1.662501, 1.496251, 1.307319
    v, q, _ = train(xql, "temperature", [1.0, 0.5], *chain(), 4000, discount=0.9)
    np.testing.assert_allclose(v, [[1.155706, 1.433781], [1.307319, 1.662501]], atol=0.05)
    np.testing.assert_allclose(q[:, 0, 1], [1.290403, 1.496251], atol=0.05)


def value_gradient(algo):
    """The largest gradient of V's loss, and the metrics, where every Q(s, a) is far above V."""
    agent = algo.make_agent(algo.Config(hidden=(8,)), Spec(3, 2))
    state = jax.jit(agent.init)(jax.random.key(0))
    target = jax.tree.map(lambda x: 1e2 * x + 1e4, state.target_critic)
    new, info = jax.jit(agent.update)(state._replace(target_critic=target), random_batch())
    moments = jax.tree.leaves(new.value.opt_state[0].mu)  # 0.1 times the gradient after one step
    return max(float(jnp.abs(m).max()) for m in moments), info


def test_rows_beyond_the_clip():
    """XQL: no gradient at all. EQL: they still push V down. Both: finite for z of 1e4 and more."""
    gradient, info = value_gradient(xql)
    assert gradient == 0 and np.isfinite(info["value_loss"])
    gradient, info = value_gradient(eql)
    assert 0 < gradient < 1e3 and np.isfinite(info["value_loss"])


# --- SQL and EQL ---------------------------------------------------------------------------------------


def test_sparse_loss_is_least_where_the_weights_are_a_distribution():
    # Q in {0, 1}, half each: for alpha >= 0.25 both weights are positive and V = 0.5; alpha = 0.1: only the better
    # action's is, 0.5 (1 + (1 - V) / 0.2) = 1, so V = 0.8
    q = jnp.array([0.0, 1.0])
    for alpha, v in ((1.0, 0.5), (0.25, 0.5), (0.1, 0.8)):
        grad = jax.grad(lambda v, alpha=alpha: sql.sparse_loss(q, v, alpha).mean())(v)
        np.testing.assert_allclose(grad, 0, atol=1e-5)
        np.testing.assert_allclose(jnp.maximum(1 + (q - v) / (2 * alpha), 0).mean(), 1, rtol=1e-5)


def test_sql_bandit(optimised):
    # alpha = 1: E[1 + (Q - V) / 2] = 1, V = E[Q] = 1.25; alpha = 0.1: 0.25 (1 + (2 - V) / 0.2) = 1, V = 1.4.
    # The weights (Q - V)_+ of the worse arm are 0: it is not imitated at all
    v, _, pi = train(sql, "alpha", [1.0, 0.1], *bandit(), 3000)
    np.testing.assert_allclose(v[:, 0], [1.25, 1.4], atol=0.03)
    np.testing.assert_allclose(pi[:, 0, 1], [1, 1], atol=0.02)


def test_sql_chain(optimised):
    # discount 0.9. alpha = 0.1: V(s1) = 1.8, Q(s0, go) = 1.62, V(s0) = 1.42; alpha = 1: the means 1, 0.9, 0.95
    v, q, _ = train(sql, "alpha", [0.1, 1.0], *chain(), 4000, discount=0.9)
    np.testing.assert_allclose(v, [[1.42, 1.8], [0.95, 1.0]], atol=0.08)
    np.testing.assert_allclose(q[:, 0, 1], [1.62, 0.9], atol=0.05)


def test_eql_bandit(optimised):
    # V is XQL's at b = alpha: 1.300596 for 2. Weights exp(10 (Q - V) / 2) = 0.2225 and 33.017: pi(1) = 0.980187
    v, _, pi = train(eql, "alpha", [2.0, 1.0], *bandit(), 3000)
    np.testing.assert_allclose(v[:, 0], [1.300596, 1.357374], atol=0.03)
    np.testing.assert_allclose(pi[0, 0, 1], 0.980187, atol=0.01)


# --- All three -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_xql_with_beta_zero_is_behaviour_cloning_bit_for_bit(discrete):
    spec, batch = Spec(3, 3 if discrete else 2, discrete), random_batch(discrete)
    new = []
    for algo, changes in ((xql, {"beta": 0.0, "learning_rate": 3e-4}), (bc, {})):
        agent = algo.make_agent(algo.Config(hidden=(8,), **changes), spec)
        state = jax.jit(agent.init)(jax.random.key(0))
        new.append(jax.jit(agent.update)(state, batch)[0].actor.params)
    chex.assert_trees_all_equal(*new)


@pytest.mark.parametrize("algo", [xql, sql, eql], ids=lambda algo: algo.__name__)
def test_order_of_one_update(algo):
    """V first; then pi and Q with the new V; the Q of both the advantage and V is the target before it moves."""
    cfg = algo.Config(hidden=(8,), learning_rate=0.1, max_weight=np.inf)
    agent = algo.make_agent(cfg, Spec(3, 2))
    batch = random_batch()
    before = jax.jit(agent.init)(jax.random.key(0))
    before = before._replace(target_critic=jax.tree.map(lambda x: 1.1 * x, before.target_critic))
    after, info = jax.jit(agent.update)(before, batch)

    def q(params):
        return algo.Critic(2, cfg.hidden).apply(params, batch.obs, batch.action)

    def v(params, obs):
        return Value(cfg.hidden, layer_norm=True).apply(params, obs)

    q_hat = q(before.target_critic).min(axis=0)
    u = q_hat - v(before.value.params, batch.obs)
    if algo is xql:
        value_loss = np.exp(np.minimum(u / cfg.temperature, 7)) - np.minimum(u / cfg.temperature, 7) - 1
    elif algo is sql:
        value_loss = np.maximum(1 + u / (2 * cfg.alpha), 0) ** 2 + v(before.value.params, batch.obs) / cfg.alpha
    else:
        value_loss = np.exp(np.minimum(u / cfg.alpha, 5)) + v(before.value.params, batch.obs) / cfg.alpha
    np.testing.assert_allclose(info["value_loss"], value_loss.mean(), rtol=1e-4)
    advantage = q_hat - v(after.value.params, batch.obs)
    weights = {
        xql: lambda: np.exp(cfg.beta * advantage),
        sql: lambda: np.maximum(advantage, 0),
        eql: lambda: np.exp(10 * advantage / cfg.alpha),
    }
    np.testing.assert_allclose(info["weight"], weights[algo]().mean(), rtol=1e-4)
    target = batch.reward + 0.99 * (1 - batch.terminal) * v(after.value.params, batch.next_obs)
    loss = ((q(before.critic.params) - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-5)


@pytest.mark.parametrize("algo", [xql, sql, eql], ids=lambda algo: algo.__name__)
def test_weights_are_clipped_and_finite(algo):
    agent = algo.make_agent(algo.Config(hidden=(8,)), Spec(3, 2))
    state = jax.jit(agent.init)(jax.random.key(0))
    huge = jax.tree.map(lambda x: 1e4 * x + 1e4, state.target_critic)
    new, info = jax.jit(agent.update)(state._replace(target_critic=huge), random_batch())
    assert info["weight"] == 100
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new.actor.params, new.value.params)))
