"""CRR against numbers worked out by hand."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, crr
from common.datasets import Transition
from common.environments import Spec
from common.networks import CategoricalActor, DiscreteCritic

SMALL = dict(batch_size=512, hidden=(32,), learning_rate=3e-3, tau=0.05, max_weight=np.inf)
LINEAR = crr.Config(hidden=(), learning_rate=0.0)  # linear networks that stand still, with values known by hand


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def update(cfg, spec, floats, state, batch):
    """One update, compiled once for all values of the `floats` of its Config."""
    return crr.make_agent(dataclasses.replace(cfg, **floats), spec).update(state, batch)


def train(cfg, spec, data):
    agent = crr.make_agent(cfg, spec)
    return crr.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)[0]


def random_batch(discrete=False, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(jax.random.normal(k[0], (n, 3)), action, reward, jax.random.normal(k[3], (n, 3)), terminal)


EIGHT = crr.Config(hidden=(8,))


@functools.cache
def discrete_state():
    return jax.jit(crr.make_agent(EIGHT, Spec(3, 3, True)).init)(jax.random.key(0))


def linear_state(mean, log_std, critics, target_critics):
    """One observation, one action: the policy's mean is tanh(mean * obs), critic j is critics[j] @ (obs, action)."""
    shapes = jax.eval_shape(crr.make_agent(LINEAR, Spec(1, 1)).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))

    def fill(tree, kernel):
        values = {"kernel": kernel, "bias": 0.0, "log_std": log_std}
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.broadcast_to(jnp.float32(values[path[-1].key]), x.shape), tree
        )

    return state._replace(
        key=jax.random.key(0),
        actor=state.actor._replace(params=fill(state.actor.params, mean)),
        critic=state.critic._replace(params=fill(state.critic.params, np.array(critics)[..., None])),
        target_actor=fill(state.actor.params, mean),
        target_critic=fill(state.target_critic, np.array(target_critics)[..., None]),
    )


def rows_of(obs, action, reward, next_obs, n=4096):
    column = lambda x: jnp.full((n, 1), x, jnp.float32)  # noqa: E731
    return Transition(column(obs), column(action), column(reward)[:, 0], column(next_obs), jnp.zeros(n))


def fixed_point(cfg):
    """Q (states, actions) and pi(1|s) on the chain s0, s1 and the bandit s2 of `test_bandit_and_chain`."""
    row = jnp.arange(64) % 8
    state, action = jnp.array([0, 0, 1, 1, 2, 2, 2, 2])[row], jnp.array([0, 1, 0, 1, 0, 0, 0, 1])[row]
    reward = jnp.array([1.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 2.0])[row]
    terminal = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])[row]
    data = Transition(jax.nn.one_hot(state, 3), action, reward, jax.nn.one_hot(jnp.ones_like(row), 3), terminal)
    state = train(cfg, Spec(3, 2, True), data)
    q = DiscreteCritic(2, 2, cfg.hidden).apply(state.critic.params, jnp.eye(3)).min(axis=0)
    return q, jax.nn.softmax(CategoricalActor(2, cfg.hidden).apply(state.actor.params, jnp.eye(3)).logits)[:, 1]


def test_bandit_and_chain(optimised):
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform data, discount 0.9.
    # s2, a bandit: arms of reward 1 and 2 taken with mu = (0.75, 0.25).
    # exp, beta = 1: pi ~ mu exp(Q): pi(go|s1) = sigmoid(2) = 0.880797, V(s1) = 1.761594, Q(s0, go) = 1.585435,
    # pi(go|s0) = sigmoid(0.585435) = 0.642317, pi(1|s2) = e / (e + 3) = 0.475367.
    # binary: the better action has A = 1 - pi > 0 and the other A < 0, so that pi -> 1: Q(s0, go) = 0.9 * 2.
    cfg = crr.Config(**SMALL, beta=1.0, discount=0.9, log_interval=1500)
    q, pi = jax.jit(lambda: fixed_point(cfg))()
    np.testing.assert_allclose(q, [[1, 1.5854], [0, 2], [1, 2]], atol=0.03)
    np.testing.assert_allclose(pi, [0.6423, 0.8808, 0.4754], atol=0.02)
    q, pi = jax.jit(lambda: fixed_point(dataclasses.replace(cfg, binary=True)))()
    np.testing.assert_allclose(q, [[1, 1.8], [0, 2], [1, 2]], atol=0.03)
    np.testing.assert_allclose(pi, [1, 1, 1], atol=0.02)


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_zero_is_behaviour_cloning_bit_for_bit(discrete):
    spec, batch = Spec(3, 3 if discrete else 2, discrete), random_batch(discrete)
    new = []
    for algo, changes in ((crr, {"beta": 0.0, "learning_rate": 3e-4}), (bc, {})):
        agent = algo.make_agent(algo.Config(hidden=(8,), **changes), spec)
        state = jax.jit(agent.init)(jax.random.key(0))
        new.append(jax.jit(agent.update)(state, batch)[0].actor.params)
    chex.assert_trees_all_equal(*new)


def test_order_of_one_update():
    """Q from the target critic and the target policy; then pi with the new Q and the policy from before."""
    before, batch = discrete_state(), random_batch(discrete=True)
    before = before._replace(
        target_actor=jax.tree.map(lambda x: 1.2 * x, before.target_actor),
        target_critic=jax.tree.map(lambda x: 1.1 * x, before.target_critic),
    )
    floats = {"learning_rate": 0.1, "beta": 2.0, "max_weight": np.inf}
    after, info = update(EIGHT, Spec(3, 3, True), floats, before, batch)

    def q(params, obs):  # (critics, batch, actions)
        return DiscreteCritic(3, 2, EIGHT.hidden).apply(params, obs)

    def pi(params, obs):
        return CategoricalActor(3, EIGHT.hidden).apply(params, obs)

    def v(critic, actor, obs):
        return (jax.nn.softmax(pi(actor, obs).logits) * q(critic, obs).min(axis=0)).sum(axis=-1)

    rows = np.arange(8)
    next_v = v(before.target_critic, before.target_actor, batch.next_obs)
    target = batch.reward + 0.99 * (1 - batch.terminal) * next_v
    loss = ((q(before.critic.params, batch.obs)[:, rows, batch.action] - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-5)
    advantage = q(after.critic.params, batch.obs).min(axis=0)[rows, batch.action]
    advantage -= v(after.critic.params, before.actor.params, batch.obs)
    weight = np.exp(2 * advantage)
    np.testing.assert_allclose(info["weight"], weight.mean(), rtol=1e-5)
    # The policy is cloned with these weights: they are not differentiated, although V is a function of the policy
    grad = jax.grad(lambda params: -(weight * pi(params, batch.obs).log_prob(batch.action)).mean())(before.actor.params)
    mu = jax.tree.map(lambda m: m / 0.1, after.actor.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g
    chex.assert_trees_all_close(mu, grad, rtol=1e-4, atol=1e-6)


def test_target_is_the_smaller_critic_at_the_target_policys_next_action():
    # Target policy N(tanh(9 s), e^-5): 1 at s' = 0.5, -1 at s = -0.5; the policy itself is round 0.
    # Target critics 2 s' + 3 a' and 2 s' + a': min(4, 2) = 2. y = 1 + 0.99 * 2 = 2.98; Q = 0: loss = 2 critics * y^2.
    state = linear_state(0.0, -5.0, [[0.0, 0.0]] * 2, [[2.0, 3.0], [2.0, 1.0]])
    state = state._replace(target_actor=linear_state(9.0, -5.0, [[0.0, 0.0]] * 2, [[0.0, 0.0]] * 2).actor.params)
    _, info = update(LINEAR, Spec(1, 1), {}, state, rows_of(obs=-0.5, action=0.3, reward=1.0, next_obs=0.5))
    np.testing.assert_allclose(info["critic_loss"], 2 * 2.98**2, rtol=0.01)


def test_q_is_asked_of_actions_within_their_bounds():
    # pi = N(0, e^2) and Q(s', a') = a'; one sample: at +-1 most of the time, and never beyond
    state = linear_state(0.0, 2.0, [[0.0, 0.0]] * 2, [[0.0, 1.0]] * 2)
    cfg = dataclasses.replace(LINEAR, num_samples=1)
    _, info = update(cfg, Spec(1, 1), {}, state, rows_of(obs=1.0, action=0.0, reward=0.0, next_obs=1.0))
    assert 0.8 < info["critic_loss"] / (2 * 0.99**2) < 1


@pytest.mark.parametrize("max_baseline, expected", [(False, 0.0), (True, 1.02938)])
def test_baseline_of_four_samples(max_baseline, expected):
    # Critics a and a + s, s = 1: the smaller is a. pi = N(0, sigma), sigma = e^-2: the mean of 4 samples is 0 on
    # average, the largest 1.02938 sigma. The target is a mean in both: target critics a', so that y = 0 on average; its
    # variance (0.99 sigma)^2 / 4 is the loss of each critic where Q = 0, at s = a = 0.
    cfg, sigma = dataclasses.replace(LINEAR, max_baseline=max_baseline), np.exp(-2)
    state = linear_state(0.0, -2.0, [[0.0, 1.0], [1.0, 1.0]], [[0.0, 1.0]] * 2)
    _, info = update(cfg, Spec(1, 1), {}, state, rows_of(obs=1.0, action=0.0, reward=0.0, next_obs=1.0))
    np.testing.assert_allclose(info["v"], expected * sigma, atol=0.02 * sigma)
    _, info = update(cfg, Spec(1, 1), {}, state, rows_of(obs=0.0, action=0.0, reward=0.0, next_obs=1.0))
    np.testing.assert_allclose(info["critic_loss"], 2 * (0.99 * sigma) ** 2 / 4, rtol=0.1)


def test_binary_filter_against_the_best_of_the_samples():
    # One state, Q = (1, 2), pi = (0.75, 0.25), 4 samples. Arm 0 beats nothing; arm 1 beats four samples of arm 0:
    # weight 0.75^4 = 0.3164. The target is no maximum: y = 0.99 (0.75 + 2 * 0.25), and the loss of arm 1 2 (2 - y)^2.
    cfg, spec = dataclasses.replace(LINEAR, binary=True, max_baseline=True), Spec(1, 2, True)
    state = jax.eval_shape(crr.make_agent(cfg, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state._replace(key=None))

    def fill(tree, row):
        values = {"kernel": jnp.array(row), "bias": 0.0}
        return jax.tree_util.tree_map_with_path(lambda path, x: jnp.broadcast_to(values[path[-1].key], x.shape), tree)

    actor, critic = fill(state.target_actor, [np.log(3.0), 0.0]), fill(state.target_critic, [1.0, 2.0])
    state = crr.State(
        jax.random.key(0), state.actor._replace(params=actor), state.critic._replace(params=critic), actor, critic
    )
    for arm, weight in ((0, 0.0), (1, 0.75**4)):
        batch = rows_of(obs=1.0, action=0.0, reward=0.0, next_obs=1.0)._replace(action=jnp.full(4096, arm))
        _, info = update(cfg, spec, {}, state, batch)
        np.testing.assert_allclose(info["weight"], weight, atol=0.03)
    np.testing.assert_allclose(info["critic_loss"], 2 * (2 - 0.99 * 1.25) ** 2, rtol=1e-5)


def test_only_advantages_matter_on_the_scale_of_beta():
    """Q -> 3 Q + 5 with beta -> beta / 3: the same gradient of the actor."""
    before, batch, grads = discrete_state(), random_batch(discrete=True), []
    for scale, shift in ((1.0, 0.0), (3.0, 5.0)):

        def last_layer(path, x, k=scale, c=shift):
            return k * x + c * (path[-1].key == "bias") if "Dense_1" in jax.tree_util.keystr(path) else x

        critic = jax.tree_util.tree_map_with_path(last_layer, before.critic.params)
        state = before._replace(critic=before.critic._replace(params=critic))
        floats = {"learning_rate": 0.0, "beta": 2 / scale, "max_weight": np.inf}
        grads.append(update(EIGHT, Spec(3, 3, True), floats, state, batch)[0].actor.opt_state[0].mu)
    chex.assert_trees_all_close(*grads, rtol=1e-3, atol=1e-6)


def test_weights_are_clipped_and_finite():
    # exp(beta A) reaches 20 at A = ln(20) / beta = 2.9957 / beta. Here A = 1e4 (a - pi) = 1e4.
    state = linear_state(0.0, -5.0, [[0.0, 1e4]] * 2, [[0.0, 0.0]] * 2)
    new, info = update(LINEAR, Spec(1, 1), {}, state, rows_of(obs=1.0, action=1.0, reward=0.0, next_obs=1.0))
    assert info["weight"] == 20
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.actor))
