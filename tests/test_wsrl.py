"""WSRL against numbers worked out by hand, and against Cal-QL and RLPD."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from algos import cal_ql, rlpd, wsrl
from common.datasets import Transition
from common.environments import Spec

SMALL = dict(hidden=(8,), batch_size=8, num_critics=4, num_samples=3)
SPEC = Spec(3, 2)


def rows(return_to_go=0.0, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs, action = (jax.random.normal(key, (n, 3)) for key in k[:3])
    reward, terminal = jax.random.normal(k[3], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    data = Transition(obs, jnp.tanh(action[:, :2]), reward, next_obs, terminal)
    return data._replace(return_to_go=jnp.full(n, return_to_go))


def agent_of(algo=wsrl, **changes):
    cfg = algo.Config(**{name: x for name, x in (SMALL | changes).items() if hasattr(algo.Config, name)})
    agent = algo.make_agent(cfg, SPEC)
    return cfg, agent, jax.jit(agent.init)(jax.random.key(0))


def assert_same(ours, theirs):
    """The states of two files: each has classes of its own, so leaf by leaf."""
    for x, y in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_gap_of_constant_values_below_the_return():
    # Q = c everywhere and R > c. n = 1, log-densities 0: log(e^R + e^R + e^c) - c; where R < c it is CQL's, log 3
    c, q = -2.0, jnp.full((2, 3, 4), -2.0)
    reference = jnp.array([1.0, -9.0, 0.0, -2.0])
    gap = wsrl.calibrated_gap(q, jnp.zeros((3, 4)), jnp.full((2, 4), c), reference)
    high = np.log(2 * np.exp(np.maximum(np.asarray(reference) - c, 0)) + 1)
    np.testing.assert_allclose(gap, np.broadcast_to(high, (2, 4)), rtol=1e-6)


def test_offline_the_gap_is_cal_qls():
    """Its text with regularizer H, on the same values; and the returns are those of that file."""
    k = jax.random.split(jax.random.key(0), 3)
    q, log_density, q_data = (jax.random.normal(key, s) for key, s in zip(k, [(2, 9, 4), (9, 4), (2, 4)], strict=True))
    reference = jnp.array([0.3, -2.0, 1.5, 0.0])
    theirs = cal_ql.conservative_gap(cal_ql.calibrate(q, reference), log_density, q_data, "H")
    np.testing.assert_array_equal(wsrl.calibrated_gap(q, log_density, q_data, reference), theirs)
    for rewards, terminal in (([-5.0, -5.0, 5.0], True), ([-5.0] * 4, False), ([0.0, 1.0], False)):
        ours, theirs = (algo.return_to_go(rewards, terminal, 0.99) for algo in (wsrl, cal_ql))
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("max_q_backup", [False, True])
def test_targets_and_losses_offline(max_q_backup):
    cfg, agent, state = agent_of(num_subset=4, max_q_backup=max_q_backup, weight=2.0)
    state = state._replace(log_alpha=state.log_alpha._replace(params=jnp.log(0.3)))
    batch = rows(0.1)
    after, info = jax.jit(agent.update)(state, batch)
    critic = wsrl.Critic(4, (8,), initializer="torch", layer_norm=True)
    _, key_next, _, key_propose, _ = jax.random.split(state.key, 5)

    def ask(params, obs, actions):
        return jnp.stack([critic.apply(params, obs, action) for action in actions], axis=1)

    def draw(pi, key):
        pairs = [pi.sample_and_log_prob(k) for k in jax.random.split(key, 3)]
        return jnp.stack([a for a, _ in pairs]), jnp.stack([x for _, x in pairs])

    pi, pi_next = agent.policy(state, batch.obs), agent.policy(state, batch.next_obs)
    if (
        max_q_backup
    ):  # the best of three actions, by the smallest of all four critics, which nothing is left to choose of
        next_v = ask(state.target_critic, batch.next_obs, draw(pi_next, key_next)[0]).min(axis=0).max(axis=0)
    else:
        next_v = critic.apply(state.target_critic, batch.next_obs, pi_next.sample(key_next)).min(axis=0)
    y = batch.reward + 0.99 * (1 - batch.terminal) * next_v
    q = critic.apply(state.critic.params, batch.obs, batch.action)
    np.testing.assert_allclose(info["td_loss"], ((q - y[None]) ** 2).mean(), rtol=1e-4)
    # The gap: 3 actions of pi(.|s), of pi(.|s'), uniform with density 1 / 2^2; the first 6 are held up at R = 0.1
    k = jax.random.split(key_propose, 3)
    (now, log_now), (then, log_then) = draw(pi, k[0]), draw(pi_next, k[1])
    uniform = jax.random.uniform(k[2], now.shape, minval=-1, maxval=1)
    held = jnp.maximum(ask(state.critic.params, batch.obs, jnp.concatenate([now, then])), 0.1)
    free = ask(state.critic.params, batch.obs, uniform)
    log_density = jnp.concatenate([log_now, log_then, jnp.full((3, 8), -2 * np.log(2))])
    values = jnp.concatenate([held, free], axis=1) - log_density[None]
    gap = (jnp.log(jnp.exp(values).sum(axis=1)) - q).mean()
    np.testing.assert_allclose(info["gap"], gap, rtol=1e-4)
    np.testing.assert_allclose(info["critic_loss"], info["td_loss"] + 2 * gap, rtol=1e-4)
    # The actor: the smallest of all critics, the new ones; the temperature: H = -|A| = -2
    key, *_ = jax.random.split(state.key, 5)
    _, key_actor = jax.random.split(key)
    action, log_prob = pi.sample_and_log_prob(key_actor)
    q = critic.apply(after.critic.params, batch.obs, action).min(axis=0)
    np.testing.assert_allclose(info["actor_loss"], (0.3 * log_prob - q).mean(), rtol=1e-4)
    np.testing.assert_allclose(info["alpha_loss"], np.log(0.3) * (info["entropy"] + 2.0), rtol=1e-4)


def test_of_the_critics_a_few_are_pushed_down_in_each_update_and_each_in_its_turn():
    """Beside an update without weight, which draws the same: the momentum of two critics of five is another."""
    _, agent, state = agent_of(num_critics=5, num_subset=2)
    none = agent_of(num_critics=5, num_subset=2, weight=0.0)[1]
    update, plain = jax.jit(agent.update), jax.jit(none.update)
    pushed = []
    for seed in range(12):
        at = state._replace(key=jax.random.key(seed))
        moved = [x(at, rows(-1e9))[0].critic.opt_state[0].mu for x in (update, plain)]
        pairs = zip(*map(jax.tree.leaves, moved), strict=True)
        pushed.append(np.any([np.abs(x - y).reshape(5, -1).max(axis=1) > 1e-7 for x, y in pairs], axis=0))
        assert pushed[-1].sum() == 2
    assert np.all(np.any(pushed, axis=0)) and len({tuple(x) for x in pushed}) > 3


def test_on_line_it_is_sac_with_many_critics():
    """The critics' update is RLPD's bit for bit, and with one critic, of which mean and minimum are one, all of it."""
    both = dict(num_critics=1, num_subset=1, policy_delay=4, updates_per_step=4, target_entropy=-1.0)
    both |= dict(learning_rate=1e-3, actor_learning_rate=1e-3)
    _, agent, state = agent_of(**both)
    _, theirs, same = agent_of(rlpd, **both)
    assert len(agent.online_cycle) == len(theirs.cycle) == 4
    for ours, other in zip(agent.online_cycle[2:], theirs.cycle[2:], strict=True):
        new, info = jax.jit(ours)(state, rows())
        expect, _ = jax.jit(other)(same, rows())
        assert_same((new.critic, new.target_critic), (expect.critic, expect.target_critic))
        assert "gap" not in info
    key, keys = jax.random.split(state.key, 5)[0], jax.random.split(same.key, 3)
    np.testing.assert_array_equal(*map(jax.random.key_data, (key, keys[0])))
    assert_same((new.actor, new.log_alpha), (expect.actor, expect.log_alpha))
    _, agent, state = agent_of(num_critics=5, num_subset=2)
    _, theirs, same = agent_of(rlpd, num_critics=5, num_subset=2)
    new, expect = (jax.jit(x)(y, rows())[0] for x, y in ((agent.online_cycle[0], state), (theirs.cycle[0], same)))
    assert_same((new.critic, new.target_critic), (expect.critic, expect.target_critic))


def test_four_critic_steps_and_one_of_the_actor_for_each_step_in_the_environment():
    # Target critics that follow critics at rest: 1 - 0.995^4 = 0.01985 of the way
    cfg, agent, state = agent_of(online_block=1, tau=0.005, learning_rate=0.0)
    far = state._replace(target_critic=jax.tree.map(lambda x: x + 1.0, state.critic.params))
    data = rows()
    ring = wsrl.Ring(jax.tree.map(lambda x: x[None], data), jnp.array([8]))
    (after, _), info = jax.jit(lambda *x: wsrl.learn(cfg, agent, *x))(far, 0, data, ring)
    moved = jax.tree.map(lambda new, online: np.asarray(1 - (new - online)), after.target_critic, state.critic.params)
    for leaf in jax.tree.leaves(moved):
        np.testing.assert_allclose(leaf, 0.01985, rtol=1e-2)
    counts = [optax.tree.get(x.opt_state, "count") for x in (after.critic, after.actor, after.log_alpha)]
    assert [int(x) for x in counts] == [4, 1, 1]
    assert {"critic_loss", "actor_loss", "alpha_loss", "alpha", "entropy"} <= info.keys()


def test_on_line_no_row_of_the_dataset_is_drawn_and_no_return_is_read():
    cfg, agent, state = agent_of(online_block=2)
    data, own = rows()._replace(reward=jnp.full(8, jnp.nan)), rows(jnp.nan)
    ring = wsrl.Ring(jax.tree.map(lambda x: x[None], own), jnp.array([8]))
    (after, _), info = jax.jit(lambda *x: wsrl.learn(cfg, agent, *x))(state, 0, data, ring)
    chex.assert_tree_all_finite((after._replace(key=None), info))
    kept = wsrl.Config(**SMALL, online_block=2, offline_ratio=0.5)
    (after, _), _ = jax.jit(lambda *x: wsrl.learn(kept, agent, *x))(state, 0, data, ring)
    assert np.isnan(jax.tree.leaves(after.critic.params)[0]).all(), "half of the batches, if one says so"


def test_more_of_a_subset_than_there_are_critics_is_one_sentence():
    with pytest.raises(SystemExit, match="num_subset must be at most num_critics, not 5 of 4"):
        agent_of(num_subset=5)
