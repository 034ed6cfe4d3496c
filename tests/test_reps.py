"""REPS against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import reps
from common.datasets import Transition
from common.environments import Spec
from common.networks import Value


def fit(data, spec, sweep, num_updates=3000):
    """One run per element of `sweep` (name -> values), each update on all rows: metrics, V and pi in every state.

    `reward_scale` multiplies rewards; any other name is a field of Config. One-hot states and no hidden layer: tables.
    """
    states = jnp.eye(spec.obs_dim)

    def one(floats):
        rows = data._replace(reward=floats.pop("reward_scale", 1.0) * data.reward)
        cfg = reps.Config(hidden=(), learning_rate=1e-2, **floats)
        agent = reps.make_agent(cfg, spec)
        state, info = jax.lax.scan(
            lambda state, _: agent.update(state, rows), agent.init(jax.random.key(0)), length=num_updates
        )
        actor = (reps.CategoricalActor if spec.discrete else reps.GaussianActor)(spec.action_dim, cfg.hidden)
        v = Value(()).apply(state.dual.params["value"], states)
        return {name: x[-1] for name, x in info.items()}, v, actor.apply(state.actor.params, states)

    return jax.jit(jax.vmap(one))({name: jnp.array(values, jnp.float32) for name, values in sweep.items()})


@functools.cache
def small():
    """A Config, a state, and the jitted update."""
    cfg = reps.Config(hidden=(8,), learning_rate=0.1, epsilon=0.3, discount=0.9)
    agent = reps.make_agent(cfg, Spec(3, 2))
    return cfg, agent.init(jax.random.key(0)), jax.jit(agent.update)


def random_batch(n=8):
    k = jax.random.split(jax.random.key(1), 5)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    action = jax.random.uniform(k[1], (n, 2), minval=-1)
    return Transition(jax.random.normal(k[0], (n, 3)), action, reward, jax.random.normal(k[3], (n, 3)), terminal)


def test_log_mean_exp():
    # q = (0.75, 0.25), x = (1, 2): log(0.75 e + 0.25 e^2) = 1.357374; p = 0.25 e^2 / (that + 0.75 e) = 0.475367 on the
    # second; KL = p log(p / 0.25) + (1 - p) log((1 - p) / 0.75) = 0.117993. A huge x changes neither.
    mass, x = jnp.array([3.0, 1.0]), jnp.array([1.0, 2.0])
    np.testing.assert_allclose(reps.log_mean_exp(x, mass), [1.357374, 0.117993], rtol=1e-4)
    np.testing.assert_allclose(reps.log_mean_exp(x + 1e4, mass), [10001.357374, 0.117993], rtol=2e-3)


def test_slope_of_the_dual_in_eta_is_the_slack_of_the_constraint():
    # d/d eta [eta epsilon + eta log E exp(delta / eta)] = epsilon - KL, so that KL = epsilon where g is least
    delta, mass = jax.random.normal(jax.random.key(0), (2, 50)) ** jnp.array([[1], [2]])
    slope, kl = jax.grad(
        lambda eta: (lambda log_mean, kl: (eta * (0.3 + log_mean), kl))(*reps.log_mean_exp(delta / eta, mass)),
        has_aux=True,
    )(0.7)
    np.testing.assert_allclose(slope, 0.3 - kl, rtol=1e-4)


def test_bandit():
    # One state, arms of reward 1 and 2 taken with mu = (0.75, 0.25), every step terminal; at discount 0 V cancels.
    # g = eta epsilon + eta log(0.75 e^(1 / eta) + 0.25 e^(2 / eta)) is least at
    #   epsilon 0.001: eta 9.84329; 0.01: 3.210563; 0.1: 1.081238; 0.5: 0.481303, where g = 1 + pi(1) and
    #   pi(1) = 0.269528, 0.312783, 0.456672, 0.726927: towards 0, cloning. KL = epsilon in each.
    # Rewards times 10: g and eta times 10, the same policy.
    # Discount 0.9: nine in ten steps are spent absorbed, so that KL and g are a tenth of what they are at discount 0:
    # epsilon 0.01 gives the policy of 0.1, and g = 0.1456672.
    arm = jnp.array([0, 0, 0, 1])
    data = Transition(jnp.ones((4, 1)), arm, 1.0 + arm, jnp.ones((4, 1)), jnp.ones(4))
    epsilon = [0.001, 0.01, 0.1, 0.5, 0.1, 0.01]
    sweep = {"epsilon": epsilon, "discount": [0, 0, 0, 0, 0, 0.9], "reward_scale": [1, 1, 1, 1, 10, 1]}
    info, _, pi = fit(data, Spec(1, 2, True), sweep)
    np.testing.assert_allclose(info["eta"], [9.84329, 3.210563, 1.081238, 0.481303, 10.81238, 1.081238], rtol=0.01)
    np.testing.assert_allclose(info["kl"], epsilon, rtol=0.02)
    np.testing.assert_allclose(info["dual"], [1.269528, 1.312783, 1.456672, 1.726927, 14.56672, 0.1456672], rtol=1e-4)
    expect = [0.269528, 0.312783, 0.456672, 0.726927, 0.456672, 0.456672]
    np.testing.assert_allclose(jax.nn.softmax(pi.logits)[:, 0, 1], expect, atol=1e-3)


def test_gaussian_bandit():
    # Actions -0.5 and 0.5, half and half, rewards 0 and 1; p = (0.25, 0.75) has KL 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812
    # and eta = 1 / ln 3 = 0.910239; the weighted mean is 0.25, the variance 0.1875, log std -0.8370
    action, reward = jnp.array([[-0.5], [0.5]]), jnp.array([0.0, 1.0])
    data = Transition(jnp.ones((2, 1)), action, reward, jnp.ones((2, 1)), jnp.ones(2))
    info, _, pi = fit(data, Spec(1, 1), {"epsilon": [0.130812], "discount": [0.0]})
    np.testing.assert_allclose(info["eta"], [0.910239], rtol=0.01)
    np.testing.assert_allclose(pi.mean[0, 0], [0.25], atol=1e-3)
    np.testing.assert_allclose(pi.log_std[0, 0], [-0.8370], atol=1e-3)


def test_what_a_state_is_worth_does_not_change_the_policy():
    # Two states with the bandit's arms above, the second with 5 added to its rewards: V differs by 5, pi is the same
    row = jnp.arange(8)
    arm, second = row % 4 // 3, row // 4
    obs = jax.nn.one_hot(second, 2)
    data = Transition(obs, arm, 1.0 + arm + 5.0 * second, obs, jnp.ones(8))
    info, v, pi = fit(data, Spec(2, 2, True), {"epsilon": [0.1], "discount": [0.0]})
    np.testing.assert_allclose(v[0, 1] - v[0, 0], 5.0, atol=0.01)
    np.testing.assert_allclose(info["eta"], [1.081238], rtol=0.01)
    np.testing.assert_allclose(jax.nn.softmax(pi.logits)[0, :, 1], [0.456672] * 2, atol=1e-3)


def test_two_state_chain():
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. One row of each; discount 0.9, so that
    # the absorbing state has mass 9 for each of the three terminal rows: q = (1, 1, 1, 1, 27) / 31.
    # The flow, from s0 and s1 with 0.05 each: p(s0) = 0.05, p(s1) = 0.05 + 0.9 p(s0, go), the rest is absorbed.
    # The largest p(s0, stop) + 2 p(s1, go) with KL(p||q) <= epsilon, found by solving this primal problem itself (two
    # free numbers, p(s0, go) and p(s1, go); SciPy's SLSQP):
    #   epsilon  E[r]      pi(go|s0)  pi(go|s1)
    #   0.02     0.146058  0.518029   0.831794
    #   0.05     0.171315  0.649423   0.970580
    #   0.1      0.188711  0.967854   0.999983
    # One-step methods prefer stop in s0 (1 against 0.9 V(s1) = 0.9); here go wins, since p(go|s1) grows too.
    state, go = jnp.array([0, 0, 1, 1]), jnp.array([0, 1, 0, 1])
    reward, terminal = jnp.array([1.0, 0.0, 0.0, 2.0]), jnp.array([1.0, 0.0, 1.0, 1.0])
    data = Transition(jax.nn.one_hot(state, 2), go, reward, jnp.array([[0.0, 1.0]] * 4), terminal)
    info, _, pi = fit(data, Spec(2, 2, True), {"epsilon": [0.02, 0.05, 0.1], "discount": [0.9] * 3})
    np.testing.assert_allclose(info["dual"], [0.146058, 0.171315, 0.188711], atol=1e-4)
    np.testing.assert_allclose(info["eta"], [1.251258, 0.572046, 0.182722], rtol=0.02)
    pi = jax.nn.softmax(pi.logits)[:, :, 1]
    np.testing.assert_allclose(pi[:, 0], [0.518029, 0.649423, 0.967854], atol=3e-3)
    np.testing.assert_allclose(pi[:, 1], [0.831794, 0.970580, 0.999983], atol=3e-3)


def test_order_of_one_update():
    """First eta and V; then pi, with weights by the new ones that average to 1."""
    (cfg, before, update), batch = small(), random_batch()
    after, info = update(before, batch)

    def parts(params):
        v, next_v = (Value(cfg.hidden).apply(params["value"], obs) for obs in (batch.obs, batch.next_obs))
        return np.exp(params["log_eta"]), v, batch.reward + 0.9 * (1 - batch.terminal) * next_v - v

    eta, v, delta = parts(before.dual.params)
    absorbed = 9 * batch.terminal.sum()
    log_mean = np.log((np.exp(delta / eta).sum() + absorbed) / (8 + absorbed))
    np.testing.assert_allclose(info["dual"], eta * (0.3 + log_mean) + 0.1 * v.mean(), rtol=1e-4)
    eta, _, delta = parts(after.dual.params)
    weight = np.exp(delta / eta) / np.exp(delta / eta).mean()
    log_prob = reps.GaussianActor(2, cfg.hidden).apply(before.actor.params, batch.obs).log_prob(batch.action)
    np.testing.assert_allclose(info["actor_loss"], -(weight * log_prob).mean(), rtol=1e-4)
    np.testing.assert_allclose(info["max_weight"], weight.max(), rtol=1e-4)


@pytest.mark.parametrize("ends", [0.0, 1.0])
def test_what_follows_a_row_is_read_unless_it_is_terminal(ends):
    _, state, update = small()
    batch = random_batch()._replace(terminal=jnp.full(8, ends))
    a, b = (update(state, x)[1]["dual"] for x in (batch, batch._replace(next_obs=1 + batch.next_obs)))
    assert (a == b) == bool(ends)


def test_adding_a_constant_to_the_rewards_changes_no_weight():
    # Where nothing ends, delta moves by the constant in every row
    _, state, update = small()
    batch = random_batch()._replace(terminal=jnp.zeros(8))
    a, b = (update(state, x)[1] for x in (batch, batch._replace(reward=100 + batch.reward)))
    np.testing.assert_allclose(b["dual"] - a["dual"], 100, rtol=1e-4)
    np.testing.assert_allclose([b["kl"], b["actor_loss"]], [a["kl"], a["actor_loss"]], rtol=1e-3)


def test_huge_rewards_give_finite_weights():
    (_, state, update), batch = small(), random_batch()
    state, info = update(state, batch._replace(reward=1e4 * batch.reward))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.actor, state.dual, info)))
