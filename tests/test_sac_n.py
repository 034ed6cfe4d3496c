"""SAC-N: what many critics add to SAC, worked out by hand; with two of them it is SAC."""

import functools
import pathlib
import re
import shlex

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro

from algos import sac, sac_n
from common.datasets import Transition
from common.environments import Spec
from common.networks import Critic, TanhGaussianActor

SPEC = Spec(3, 2)


def random_batch(n=16, **columns):
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs = jax.random.normal(k[0], (n, 3)), jax.random.normal(k[3], (n, 3))
    action, reward = jax.random.uniform(k[1], (n, 2), minval=-1), jax.random.normal(k[2], (n,))
    terminal = jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(obs, action, reward, next_obs, terminal)._replace(**columns)


@functools.cache
def make(num_critics):
    """(agent with a jitted update, state): on 8-unit networks, with target critics that are not its critics."""
    cfg = sac_n.Config(num_critics=num_critics, hidden=(8,), learning_rate=0.01, discount=0.9)
    agent = sac_n.make_agent(cfg, SPEC)
    state = jax.jit(agent.init)(jax.random.key(0))
    spread = jax.tree.map(lambda x: 3 * x, state.target_critic)
    alpha = state.log_alpha._replace(params=jnp.float32(-1.0))
    return agent._replace(update=jax.jit(agent.update)), state._replace(target_critic=spread, log_alpha=alpha)


def test_two_critics_are_sac_bit_for_bit():
    batch, ends = random_batch(), []
    for algo, changes in ((sac, {}), (sac_n, {"num_critics": 2})):
        agent = algo.make_agent(algo.Config(hidden=(8,), learning_rate=0.01, **changes), SPEC)
        state, update = jax.jit(agent.init)(jax.random.key(0)), jax.jit(agent.update)
        for _ in range(3):
            state, info = update(state, batch)
        ends.append(jax.tree.leaves((state._replace(key=jax.random.key_data(state.key)), info["critic_loss"])))
    chex.assert_trees_all_equal(*ends)


@pytest.mark.parametrize("num_critics", [1, 5])
def test_target_and_policy_take_the_smallest_of_all_critics(num_critics):
    """The whole update again, from its equations. With one critic there is no minimum."""
    (agent, state), batch = make(num_critics), random_batch()
    after, info = agent.update(state, batch)
    _, key_next, key_actor = jax.random.split(state.key, 3)
    actor = TanhGaussianActor(2, (8,))

    def q(params, obs, action):
        return np.array(Critic(num_critics, (8,)).apply(params, obs, action))

    next_action, next_log_prob = actor.apply(state.actor.params, batch.next_obs).sample_and_log_prob(key_next)
    next_q = q(state.target_critic, batch.next_obs, next_action)
    assert num_critics == 1 or len(set(next_q.argmin(axis=0))) > 2, "the smallest is now one, now another"
    target = batch.reward + 0.9 * (1 - batch.terminal) * (next_q.min(axis=0) - np.exp(-1) * next_log_prob)
    loss = ((q(state.critic.params, batch.obs, batch.action) - target[None]) ** 2).mean(axis=1).sum()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-5)

    action, log_prob = actor.apply(state.actor.params, batch.obs).sample_and_log_prob(key_actor)
    new_q = q(after.critic.params, batch.obs, action).min(axis=0)
    np.testing.assert_allclose(info["actor_loss"], (np.exp(-1) * log_prob - new_q).mean(), rtol=1e-5)
    np.testing.assert_allclose(agent.q(after, batch.obs, action), new_q, rtol=1e-5)


def test_what_a_critic_learns_from_a_target_does_not_depend_on_how_many_others_there_are():
    # All rows terminal: every critic has the target r. The gradient of a sum over critics is each one's own.
    batch, grads = random_batch(terminal=jnp.ones(16)), []
    first = lambda tree: jax.tree.map(lambda x: x[:1], tree)  # noqa: E731
    (many_agent, many), (one_agent, one) = make(5), make(1)
    one = one._replace(critic=one.critic._replace(params=first(many.critic.params)))
    for agent, state in ((many_agent, many), (one_agent, one)):
        after, _ = agent.update(state, batch)
        grads.append(first(optax.tree_utils.tree_get(after.critic.opt_state, "mu")))
    chex.assert_trees_all_close(*grads, rtol=1e-5, atol=1e-7)
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads[0]))


# E[ the smallest of N independent N(m, s^2) ] = m - c_N s
EXPECTED_MINIMUM = {2: 0.5642, 4: 1.0294, 10: 1.5388, 20: 1.8675, 50: 2.2491, 500: 3.0370}


@pytest.mark.parametrize("num_critics", [2, 10, 500])
def test_more_critics_believe_less(num_critics):
    # Q_j(s, a) = b_j ~ N(5, 2^2), drawn anew 20,000 times: believed is 5 - 2 c_N, to within 4 * 1.7 / sqrt(20,000)
    agent = sac_n.make_agent(sac_n.Config(num_critics=num_critics, hidden=()), SPEC)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(agent.init, jax.random.key(0)))

    def believed(bias):
        put = lambda path, x: bias[:, None] if "bias" in jax.tree_util.keystr(path) else x  # noqa: E731
        params = jax.tree_util.tree_map_with_path(put, state.critic.params)
        return agent.q(state._replace(critic=state.critic._replace(params=params)), jnp.zeros(3), jnp.zeros(2))

    bias = 5 + 2 * np.random.default_rng(0).normal(size=(20_000, num_critics)).astype(np.float32)
    mean = jax.jit(jax.vmap(believed))(bias).mean()
    np.testing.assert_allclose(mean, 5 - 2 * EXPECTED_MINIMUM[num_critics], atol=0.05)


def page():
    return (pathlib.Path(sac_n.__file__).with_suffix(".md")).read_text()


def test_constants_on_the_page():
    # c_N = the integral of x N phi(x) Phi(x)^(N - 1): the mean of the largest; and Royston's approximation to it
    x = np.linspace(-8, 8, 4_001)
    cdf = np.array(jax.scipy.stats.norm.cdf(x))
    numbers = [re.findall(r"[\d.]+", line) for line in page().splitlines() if line.startswith(("| $N$ |", "| $c$ |"))]
    assert [int(n) for n in numbers[0]] == list(EXPECTED_MINIMUM)
    for n, on_page in zip(map(int, numbers[0]), map(float, numbers[1]), strict=True):
        c = np.trapezoid(x * np.gradient(cdf**n, x), x)
        np.testing.assert_allclose(c, EXPECTED_MINIMUM[n], atol=2e-3)
        assert on_page == round(EXPECTED_MINIMUM[n], 2)
        royston = jax.scipy.stats.norm.ppf((n - np.pi / 8) / (n - np.pi / 4 + 1))
        np.testing.assert_allclose(royston, c, atol=0.04)


def test_commands_on_the_page_are_the_published_settings():
    commands = re.findall(r"python algos/sac_n.py (--dataset (?:.*\\\n)*.*)", page())
    sac_n_cfg, lb_sac = (tyro.cli(sac_n.Config, args=shlex.split(c.replace("\\\n", " "))) for c in commands)
    assert (sac_n_cfg.num_critics, sac_n_cfg.batch_size, sac_n_cfg.learning_rate) == (500, 256, 3e-4)
    assert sac_n_cfg.hidden == lb_sac.hidden == (256, 256, 256) and sac_n_cfg.tau == lb_sac.tau == 0.005
    # LB-SAC: the rate grows as the square root of the batch, 3e-4 sqrt(10,000 / 256) = 0.001875, which it rounds down
    assert lb_sac.num_critics == 25 and lb_sac.batch_size == 10_000
    np.testing.assert_allclose(lb_sac.learning_rate, 3e-4 * (lb_sac.batch_size / 256) ** 0.5, rtol=0.05)


def test_sum_or_mean_over_critics_is_the_same_step_of_adam():
    """LB-SAC's loss is the mean: its gradient is that of ours / N, and Adam does not see the factor."""
    agent, state = make(5)
    after, _ = agent.update(state, random_batch())
    grads = jax.tree.map(lambda mu: mu / 0.1 / 5, optax.tree_utils.tree_get(after.critic.opt_state, "mu"))
    updates, _ = optax.adam(0.01).update(grads, state.critic.opt_state)
    steps = jax.tree.map(lambda new, old: new - old, after.critic.params, state.critic.params)
    large = jax.tree.map(lambda g: np.abs(g) > 1e-4, grads)  # against Adam's epsilon of 1e-8
    assert all(x.mean() > 0.3 for x in jax.tree.leaves(large))
    masked = lambda tree: jax.tree.map(lambda x, keep: np.where(keep, x, 0), tree, large)  # noqa: E731
    chex.assert_trees_all_close(masked(steps), masked(updates), rtol=1e-3)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        sac_n.make_agent(sac_n.Config(), Spec(3, 4, discrete=True))
