"""Cal-QL against numbers worked out by hand, and against CQL."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import cal_ql, cql
from common.datasets import Transition
from common.environments import Spec

SMALL = dict(hidden=(8,), num_samples=3, batch_size=8)


def batch(return_to_go, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs, action = (jax.random.normal(key, (n, 3)) for key in k[:3])
    reward, terminal = jax.random.normal(k[3], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    rows = Transition(obs, jnp.tanh(action[:, :2]), reward, next_obs, terminal)
    return rows._replace(return_to_go=jnp.full(n, return_to_go))


def agent_of(algo, **changes):
    agent = algo.make_agent(algo.Config(**SMALL | changes), Spec(3, 2))
    return agent, jax.jit(agent.init)(jax.random.key(0))


def assert_same(ours, theirs):
    """The states of two files: each has classes of its own, so leaf by leaf."""
    pairs = zip(*(jax.tree.leaves(state._replace(key=None)) for state in (ours, theirs)), strict=True)
    for x, y in pairs:
        np.testing.assert_array_equal(x, y)


def test_returns_to_the_end_of_an_episode():
    # -5 + 0.99 (-5 + 0.99 * 5) = -5.0495; -5 + 0.99 * 5 = -0.05
    np.testing.assert_allclose(cal_ql.return_to_go([-5.0, -5.0, 5.0], True, 0.99), [-5.0495, -0.05, 5.0])
    np.testing.assert_allclose(cal_ql.return_to_go([0.0, 0.0, 1.0], True, 0.5), [0.25, 0.5, 1.0])
    # Cut, and never paid anything else: -5 / (1 - 0.99) in every row. A task that ends there has the plain sum
    np.testing.assert_allclose(cal_ql.return_to_go([-5.0] * 4, False, 0.99), [-500.0] * 4)
    np.testing.assert_allclose(cal_ql.return_to_go([-5.0] * 2, True, 0.99), [-9.95, -5.0])
    # Cut after different rewards: nothing stands for what would have followed
    np.testing.assert_allclose(cal_ql.return_to_go([0.0, 1.0], False, 0.5), [0.5, 1.0])
    np.testing.assert_allclose(cal_ql.return_to_go([1.0, 1.0], False, 1.0), [2.0, 1.0])


def test_rows_of_the_data_have_the_return_of_their_own_episode(monkeypatch):
    # Episodes of 2 and 3 rows: the first ends by the task, the second is cut after -1 again and again
    reward, terminal = np.array([-1.0, 0, -1, -1, -1], np.float32), np.array([0.0, 1, 0, 0, 0], np.float32)
    data = Transition(np.zeros((5, 3)), np.zeros((5, 2)), reward, np.zeros((5, 3)), terminal)
    data = data._replace(episode=np.array([0, 0, 1, 1, 1], np.int32))
    monkeypatch.setattr(cal_ql, "load_dataset", lambda *args, **kwargs: (data, None))
    rows, _ = cal_ql.load_data(cal_ql.Config(discount=0.9))
    np.testing.assert_allclose(rows.return_to_go, [-1, 0, -10, -10, -10], rtol=1e-6)
    assert rows.episode is None and rows.return_to_go.dtype == np.float32


def test_new_rows_have_it_too():
    agent, _ = agent_of(cal_ql, discount=0.5)
    np.testing.assert_allclose(agent.label(np.array([0.0, 0.0, 1.0]), True), [0.25, 0.5, 1.0])


def test_the_policys_proposals_are_held_up_and_no_others():
    # One critic, proposals (now, then, uniform) of 1 action each, two states with the returns 2 and -3
    q = jnp.array([[[1.0, -4.0], [3.0, -2.0], [0.0, -9.0]]])
    held = cal_ql.calibrate(q, jnp.array([2.0, -3.0]))
    np.testing.assert_array_equal(held, [[[2, -3], [3, -2], [0, -9]]])


def test_the_gap_of_constant_values_below_the_return():
    # Q = c everywhere and R > c. n = 1, log-densities 0: log(e^R + e^R + e^c) - c = log(2 e^(R - c) + 1); CQL: log 3
    c, r = -2.0, 1.0
    q = jnp.full((2, 3, 4), c)
    gap = cal_ql.conservative_gap(cal_ql.calibrate(q, jnp.full(4, r)), jnp.zeros((3, 4)), jnp.full((2, 4), c), "H")
    np.testing.assert_allclose(gap, np.log(2 * np.exp(r - c) + 1), rtol=1e-6)


@pytest.mark.parametrize("lagrange", [False, True])
def test_without_a_return_to_hold_it_up_it_is_cql_bit_for_bit(lagrange):
    agent, state = agent_of(cal_ql, lagrange=lagrange)
    theirs, same = agent_of(cql, lagrange=lagrange)
    rows = batch(-1e9)
    ours, info = jax.jit(agent.update)(state, rows)
    assert_same(ours, jax.jit(theirs.update)(same, rows)[0])
    assert info["held"] == 0


def test_where_the_return_wins_the_policy_has_no_gradient():
    """Then only what is drawn uniformly, and the data, move the critics: other actions of the policy change nothing."""
    agent, state = agent_of(cal_ql)
    other = state._replace(actor=jax.tree.map(lambda x: x + 0.3, state.actor))
    rows = batch(0.0)._replace(terminal=jnp.ones(8))  # no policy in the target
    for height, equal in ((1e4, True), (-1e4, False)):
        rows = rows._replace(return_to_go=jnp.full(8, height))
        a, b = (jax.jit(agent.update)(x, rows)[0].critic.params for x in (state, other))
        same = all(np.allclose(x, y, rtol=1e-4, atol=1e-7) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
        assert same == equal
    assert jax.jit(agent.update)(state, rows._replace(return_to_go=jnp.full(8, 1e4)))[1]["held"] == pytest.approx(1)


def test_on_line_the_weight_is_another():
    agent, state = agent_of(cal_ql, weight=5.0, online_weight=0.5)
    (update,) = agent.online_cycle
    half, _ = agent_of(cal_ql, weight=0.5)
    ours, info = jax.jit(update)(state, batch(0.0))
    chex.assert_trees_all_equal(ours, jax.jit(half.update)(state, batch(0.0))[0])
    assert info["weight"] == 0.5


def test_on_line_without_weight_it_is_sac():
    """The critics, the policy and the temperature of a step are SAC's: what the gap would be is not asked."""
    agent, state = agent_of(cal_ql, online_weight=0.0, backup_entropy=True)
    plain, same = agent_of(cql, weight=0.0, backup_entropy=True)  # tests/test_cql.py: this is SAC
    ours, _ = jax.jit(agent.online_cycle[0])(state, batch(3.0))
    assert_same(ours, jax.jit(plain.update)(same, batch(3.0))[0])
    assert dataclasses.asdict(cal_ql.Config())["online_weight"] == cal_ql.Config().weight
