"""SAC against numbers worked out by hand. With hidden=() every network is linear, so that they can be.

Where a policy draws no noise, its action is tanh(mean), and log pi = -log_std - log(2 pi) / 2 - log(1 - action^2).
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import cql, edac, sac, sac_n
from common.datasets import Transition
from common.environments import Spec
from common.networks import Critic, TanhGaussianActor

LINEAR = sac.Config(hidden=(), discount=0.9)
HALF_LOG_2PI = 0.918939


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def update(cfg, spec, learning_rate, state, batch):
    """One update without noise, compiled once for all learning rates."""
    cfg = dataclasses.replace(cfg, learning_rate=learning_rate)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args, **kwargs: jnp.zeros(shape))
        return sac.make_agent(cfg, spec).update(state, batch)


def fill(tree, kernel, bias):
    """Linear networks with kernel (..., inputs, outputs) and bias (..., outputs), (...) being an ensemble's axis."""

    def leaf(path, x):
        return jnp.broadcast_to(jnp.float32(kernel if "kernel" in jax.tree_util.keystr(path) else bias), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(mean=(0.0, 0.0), log_std=-1.0, alpha=0.5, critics=((0.0, 0.0),) * 2, target_critics=None):
    """One observation, one action: mean[0] s + mean[1], a log_std, and critics of weights (s, a)."""
    shapes = jax.eval_shape(sac.make_agent(LINEAR, Spec(1, 1)).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    target_critics = critics if target_critics is None else target_critics
    return state._replace(
        key=jax.random.key(0),
        actor=state.actor._replace(params=fill(state.actor.params, [[mean[0], 0.0]], [mean[1], log_std])),
        critic=state.critic._replace(params=fill(state.critic.params, np.array(critics)[..., None], 0.0)),
        target_critic=fill(state.target_critic, np.array(target_critics)[..., None], 0.0),
        log_alpha=state.log_alpha._replace(params=jnp.log(jnp.float32(alpha))),
    )


def rows_of(obs, action, reward=0.0, next_obs=0.0, terminal=0.0, n=2):
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    return Transition(*(column(x)[:, None] for x in (obs, action)), column(reward), column(next_obs)[:, None],
                      column(terminal))  # fmt: skip


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


def named(tree):
    """{"kernel": array, "bias": array} of a linear network."""
    return {path[-1].key: x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_target_is_the_smaller_critics_value_with_the_entropy():
    # mean = 2 atanh(0.6) s: a' = 0.6 at s' = 0.5, and -0.6 at s = -0.5. log_std = -1, so log pi(a'|s')
    # = 1 - 0.918939 - log(1 - 0.36) = 0.527348. Target critics 2 s' + 3 a' and 2 s' + a': min(2.8, 1.6) = 1.6.
    # y = 1 + 0.9 (1.6 - 0.5 * 0.527348) = 2.202693 where the episode goes on, 1 at a terminal; Q = 0.
    targets = [[2.0, 3.0], [2.0, 1.0]]
    state = linear_state(mean=(2 * np.arctanh(0.6), 0.0), target_critics=targets)
    batch = rows_of(obs=-0.5, action=0.3, reward=1.0, next_obs=0.5, terminal=jnp.array([0.0, 1.0]))
    _, info = update(LINEAR, Spec(1, 1), 0.0, state, batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (2.202693**2 + 1) / 2, rtol=1e-5)


def test_actor_loss_and_its_gradient():
    # a = 0.6 at s = 1, log_std = -1, critics 3 a and 2 a: L = 0.5 * 0.527348 - 1.2 = -0.936326.
    # dlog pi / dmean = 2 a, dQ / dmean = 2 (1 - a^2): dL / dmean = 0.5 * 1.2 - 1.28 = -0.68.
    # dlog pi / dlog_std = -1, and without noise Q does not feel it: dL / dlog_std = -0.5.
    state = linear_state(mean=(0.0, np.arctanh(0.6)), critics=[[0.0, 3.0], [0.0, 2.0]])
    after, info = update(LINEAR, Spec(1, 1), 0.0, state, rows_of(obs=1.0, action=0.0, terminal=1.0))
    np.testing.assert_allclose(info["actor_loss"], -0.936326, rtol=1e-5)
    np.testing.assert_allclose(named(gradient(after.actor))["bias"], [-0.68, -0.5], rtol=1e-5)


def test_the_policy_moves_no_critic():
    # Q is right at the data's action: the critics have no gradient, whatever the policy does
    state = linear_state(mean=(0.0, 1.0), critics=[[0.0, 3.0]] * 2)
    after, info = update(LINEAR, Spec(1, 1), 0.0, state, rows_of(obs=1.0, action=0.5, reward=1.5, terminal=1.0))
    assert info["critic_loss"] == 0 and info["actor_loss"] < -1
    assert all(not g.any() for g in jax.tree.leaves(gradient(after.critic)))


@pytest.mark.parametrize("log_std, grows", [(-3.0, True), (0.0, False)])
def test_alpha_grows_where_the_entropy_is_below_its_target(log_std, grows):
    # |A| = 1, action 0: the entropy is log_std + 0.918939, its target -1, dL / dlog alpha = entropy - (-1), and
    # L = log alpha times that
    state = linear_state(log_std=log_std)
    after, info = update(LINEAR, Spec(1, 1), 0.1, state, rows_of(obs=1.0, action=0.0))
    np.testing.assert_allclose(info["entropy"], log_std + HALF_LOG_2PI, rtol=1e-5)
    np.testing.assert_allclose(gradient(after.log_alpha), log_std + HALF_LOG_2PI + 1, rtol=1e-5)
    np.testing.assert_allclose(info["alpha_loss"], np.log(0.5) * (log_std + HALF_LOG_2PI + 1), rtol=1e-5)
    assert (after.log_alpha.params > state.log_alpha.params) == grows


def test_entropy_and_its_target_are_sums_over_the_actions_dimensions():
    # three dimensions at action 0 with log_std 0: entropy 3 * 0.918939, target -3 * 0.5
    cfg, spec = dataclasses.replace(LINEAR, target_entropy=-0.5), Spec(1, 3)
    shapes = jax.eval_shape(sac.make_agent(cfg, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    batch = rows_of(obs=1.0, action=0.0)._replace(action=jnp.zeros((2, 3)))
    after, _ = update(cfg, spec, 0.0, state._replace(key=jax.random.key(0)), batch)
    np.testing.assert_allclose(gradient(after.log_alpha), 3 * HALF_LOG_2PI + 1.5, rtol=1e-5)


def test_order_of_one_update():
    """Q; then pi with the new Q and the old alpha; then alpha with the old policy's entropy; then the target."""
    cfg = sac.Config(hidden=(8,))
    agent = sac.make_agent(cfg, Spec(3, 2))
    k = jax.random.split(jax.random.key(1), 4)
    obs, next_obs = jax.random.uniform(k[0], (8, 3)), jax.random.uniform(k[1], (8, 3))
    batch = Transition(obs, jax.random.uniform(k[2], (8, 2)), jnp.arange(8.0), next_obs, jnp.arange(8) % 2.0)
    before = jax.jit(agent.init)(jax.random.key(0))
    before = before._replace(
        target_critic=jax.tree.map(lambda x: 1.1 * x, before.target_critic),
        log_alpha=before.log_alpha._replace(params=jnp.log(0.3)),
    )
    after, info = update(cfg, Spec(3, 2), 0.1, before, batch)

    critic = Critic(2, cfg.hidden)
    pi = TanhGaussianActor(2, cfg.hidden).apply(before.actor.params, obs)
    next_pi = TanhGaussianActor(2, cfg.hidden).apply(before.actor.params, next_obs)
    next_q = critic.apply(before.target_critic, next_obs, next_pi.mode()).min(axis=0)
    target = batch.reward + 0.99 * (1 - batch.terminal) * (next_q - 0.3 * next_pi.log_prob(next_pi.mode()))
    loss = ((critic.apply(before.critic.params, obs, batch.action) - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-4)
    log_prob, q = pi.log_prob(pi.mode()), critic.apply(after.critic.params, obs, pi.mode()).min(axis=0)
    np.testing.assert_allclose(info["actor_loss"], (0.3 * log_prob - q).mean(), rtol=1e-4)
    np.testing.assert_allclose(info["entropy"], -log_prob.mean(), rtol=1e-4)
    np.testing.assert_allclose(gradient(after.log_alpha), info["entropy"] + 2, rtol=1e-5)
    moved = jax.tree.map(lambda new, old: 0.02 * new + 0.98 * old, after.critic.params, before.target_critic)
    chex.assert_trees_all_close(after.target_critic, moved, rtol=1e-5)


@pytest.mark.parametrize("action, growth", [(0.5, 0.9), (1.0, 1.8)])
def test_extrapolation_diverges(action, growth):
    """Why SAC fails offline: the policy's action is not in the data, and Q there is a multiple of Q in the data."""
    # One state that follows itself, reward 1, discount 0.9: no return is above 10. The data hold the action 0.5 alone,
    # and Q = w a. Fitted Q-iteration with the policy at 0.5: y_n = 1 + 0.9 y_(n-1) = (1 - 0.9^n) / 0.1 -> 10. With the
    # policy at 1, where Q is twice as large: y_n = 1 + 1.8 y_(n-1) = (1.8^n - 1) / 0.8, for n = 10 445.058.
    # alpha = 0; from Q = 0 the loss is 2 y^2.
    state = linear_state(mean=(0.0, 9.0 if action == 1 else np.arctanh(0.5)), alpha=0.0)
    y = 0.0
    for n in range(1, 11):
        target = fill(state.target_critic, np.array([[0.0], [y / 0.5]]), 0.0)
        batch = rows_of(obs=1.0, action=0.5, reward=1.0, next_obs=1.0)
        _, info = update(LINEAR, Spec(1, 1), 0.0, state._replace(target_critic=target), batch)
        y = float(np.sqrt(info["critic_loss"] / 2))
        np.testing.assert_allclose(y, (growth**n - 1) / (growth - 1), rtol=1e-4)


def test_bandit(optimised):
    # One state, r = -4 (a - 0.3)^2 on uniform actions. The policy's mean finds 0.3, alpha holds its entropy at -1.
    action = jnp.linspace(-1, 1, 64)[:, None]
    data = Transition(jnp.ones((64, 1)), action, -4 * (action[:, 0] - 0.3) ** 2, jnp.ones((64, 1)), jnp.ones(64))
    cfg = sac.Config(hidden=(32,), batch_size=64, learning_rate=3e-3, log_interval=1500)
    agent = sac.make_agent(cfg, Spec(1, 1))
    state = jax.jit(lambda: sac.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)[0])()
    pi = TanhGaussianActor(1, cfg.hidden).apply(state.actor.params, jnp.ones(1))
    entropy = -jax.vmap(pi.sample_and_log_prob)(jax.random.split(jax.random.key(1), 1000))[1].mean()
    np.testing.assert_allclose(pi.mode(), 0.3, atol=0.08)
    np.testing.assert_allclose(entropy, -1, atol=0.15)


def test_it_acts_by_the_squashed_mean():
    act = sac.make_agent(LINEAR, Spec(1, 1)).act
    for mean in (0.5, 2.0):
        action = act(linear_state(mean=(mean, 0.0)), jnp.ones((1, 1)), jax.random.key(0))
        np.testing.assert_allclose(action, [[np.tanh(mean)]], rtol=1e-5)


@pytest.mark.parametrize("algo", [sac, cql, sac_n, edac], ids=lambda algo: algo.__name__.removeprefix("algos."))
def test_what_sac_and_its_kin_believe_is_the_smallest_of_their_critics(algo):
    """The belief that main logs, of the critics and not of their targets; and metrics that are of all critics."""
    cfg = algo.Config(hidden=())
    agent, critic = algo.make_agent(cfg, Spec(3, 2)), Critic(getattr(cfg, "num_critics", 2), cfg.hidden)
    k = jax.random.split(jax.random.key(1), 3)
    obs, next_obs, action = (jax.random.uniform(k[i], (32, d), minval=-1) for i, d in ((0, 3), (1, 3), (2, 2)))

    @jax.jit
    def run():
        state = agent.init(jax.random.key(0))
        state = state._replace(target_critic=jax.tree.map(lambda x: 3 * x, state.target_critic))
        _, info = agent.update(state, Transition(obs, action, obs[:, 0], next_obs, jnp.arange(32) % 2.0))
        return critic.apply(state.critic.params, obs, action), agent.q(state, obs, action), info

    each, believed, info = run()
    assert len(set(np.array(each).argmin(axis=0))) > 1, "the smallest is now one, now another"
    np.testing.assert_allclose(believed, np.array(each).min(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info["q"], np.array(each).mean(), rtol=1e-4)
    if "q_std" in info:
        np.testing.assert_allclose(info["q_std"], np.array(each).std(axis=0).mean(), rtol=1e-4)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        sac.make_agent(sac.Config(), Spec(3, 4, discrete=True))
