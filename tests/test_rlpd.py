"""RLPD against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import rlpd
from common.datasets import Transition
from common.environments import Spec

SMALL = dict(hidden=(8,), batch_size=8, num_critics=4)


def rows(n=8):
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs, action = (jax.random.normal(key, (n, 3)) for key in k[:3])
    reward, terminal = jax.random.normal(k[3], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(obs, jnp.tanh(action[:, :2]), reward, next_obs, terminal)


def agent_of(**changes):
    cfg = rlpd.Config(**SMALL | changes)
    agent = rlpd.make_agent(cfg, Spec(3, 2))
    return cfg, agent, jax.jit(agent.init)(jax.random.key(0))


@pytest.mark.parametrize("number, expect", [(1, 0.0), (2, -0.5642), (10, -1.5388)])
def test_the_smallest_of_some_critics_is_drawn_without_replacement(number, expect):
    # E[min of n of 10 iid N(0, 1)]: 0, -0.5642, -1.5388. Two drawn with replacement would give 0.9 * -0.5642 = -0.5078
    keys = jax.random.split(jax.random.key(0), 60_000)
    draw = jax.vmap(lambda key: rlpd.subset_min(jax.random.normal(key, (10,)), jax.random.fold_in(key, 1), number))
    np.testing.assert_allclose(jax.jit(draw)(keys).mean(), expect, atol=0.015)


def test_a_subset_is_one_for_the_batch_and_another_in_each_update():
    q = jnp.arange(10.0)[:, None] + jnp.zeros((10, 5))
    smallest = [rlpd.subset_min(q, jax.random.key(seed), 2) for seed in range(20)]
    assert all(np.ptp(x) == 0 for x in smallest) and len({float(x[0]) for x in smallest}) > 3


def test_twenty_critic_steps_and_one_of_the_actor_for_each_step():
    # Target critics that follow critics at rest: 1 - 0.995^20 = 0.0953895 of the way
    cfg, agent, state = agent_of(policy_delay=20, updates_per_step=20, online_block=1, tau=0.005, learning_rate=0.0)
    far = state._replace(target_critic=jax.tree.map(lambda x: x + 1.0, state.critic.params))
    data = rows()
    ring = rlpd.Ring(jax.tree.map(lambda x: x[None], data), jnp.array([1]))
    (after, _), info = jax.jit(lambda *x: rlpd.learn(cfg, agent, *x))(far, 0, data, ring)
    moved = jax.tree.map(lambda new, online: np.asarray(1 - (new - online)), after.target_critic, state.critic.params)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 0.0953895, rtol=1e-3)
    counts = [optax.tree.get(x.opt_state, "count") for x in (after.critic, after.actor, after.log_alpha)]
    assert [int(x) for x in counts] == [20, 1, 1]
    assert {"critic_loss", "actor_loss", "alpha_loss", "alpha", "entropy"} <= info.keys()


def test_each_critic_step_has_a_batch_of_its_own_half_of_the_data_half_of_the_ring():
    """The data pay 0 and the ring 1: with discount 0 and one row of each, every batch has a mean reward of 1/2."""
    cfg, agent, state = agent_of(policy_delay=5, updates_per_step=5, online_block=2, batch_size=16)
    data, seen = rows()._replace(reward=jnp.zeros(8)), []

    def note(state, batch):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch.reward)
        return state, {"reward": batch.reward.mean()}

    agent = agent._replace(update=note, cycle=[note] * 5)
    own = data._replace(reward=jnp.where(jnp.arange(8) < 2, 1.0, jnp.nan))
    ring = rlpd.Ring(jax.tree.map(lambda x: x[None], own), jnp.array([2]))
    _, info = jax.jit(lambda *x: rlpd.learn(cfg, agent, *x))(state, 0, data, ring)
    jax.effects_barrier()
    assert len(seen) == 10 and all(x.tolist() == [0.0] * 8 + [1.0] * 8 for x in seen)
    np.testing.assert_allclose(info["reward"], 0.5)


@pytest.mark.parametrize("backup_entropy", [False, True])
def test_targets_and_losses(backup_entropy):
    cfg, agent, state = agent_of(backup_entropy=backup_entropy, num_subset=4, policy_delay=1)
    state = state._replace(log_alpha=state.log_alpha._replace(params=jnp.log(0.3)))
    batch = rows()
    after, info = jax.jit(agent.update)(state, batch)
    critic = rlpd.Critic(4, (8,), initializer="torch", layer_norm=True)
    _, key_next, _ = jax.random.split(state.key, 3)
    action, log_prob = agent.policy(state, batch.next_obs).sample_and_log_prob(key_next)
    next_q = critic.apply(state.target_critic, batch.next_obs, action).min(
        axis=0
    )  # all four: nothing is left to chance
    y = batch.reward + 0.99 * (1 - batch.terminal) * (next_q - (0.3 * log_prob if backup_entropy else 0.0))
    q = critic.apply(state.critic.params, batch.obs, batch.action)
    np.testing.assert_allclose(info["critic_loss"], ((q - y[None]) ** 2).mean(), rtol=1e-4)
    # The actor: the mean of all critics, the new ones; the temperature: H = -|A| / 2 = -1
    key, _, _ = jax.random.split(state.key, 3)
    _, key_actor = jax.random.split(key)
    action, log_prob = agent.policy(state, batch.obs).sample_and_log_prob(key_actor)
    q = critic.apply(after.critic.params, batch.obs, action).mean(axis=0)
    np.testing.assert_allclose(info["actor_loss"], (0.3 * log_prob - q).mean(), rtol=1e-4)
    np.testing.assert_allclose(info["alpha_loss"], np.log(0.3) * (info["entropy"] + 1.0), rtol=1e-4)
    assert (after.log_alpha.params > state.log_alpha.params) == (info["entropy"] < -1.0)


def test_until_it_begins_its_actions_are_uniform_and_know_no_policy():
    _, agent, state = agent_of(online_start=5)
    other = jax.tree.map(lambda x: x + 1.0 if jnp.issubdtype(x.dtype, jnp.floating) else x, state)
    obs, explore = jnp.ones((1, 3)), jax.jit(agent.explore)
    key = jax.random.key(3)
    chex.assert_trees_all_equal(explore(state, obs, key, 4), explore(other, obs, key, 4))
    assert not np.array_equal(explore(state, obs, key, 5), explore(other, obs, key, 5))
    actions = jax.vmap(lambda key: agent.explore(state, obs, key, 0))(jax.random.split(key, 4000))
    assert actions.min() > -1 and actions.max() < 1
    np.testing.assert_allclose([actions.mean(), actions.std()], [0, 3**-0.5], atol=0.02)


def test_more_of_a_subset_than_there_are_critics_is_one_sentence():
    with pytest.raises(SystemExit, match="num_subset must be at most num_critics, not 5 of 4"):
        agent_of(num_subset=5)
