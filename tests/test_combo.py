"""COMBO against numbers worked out by hand. What it shares with MBPO is tested there; here, that it is shared."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mbpo
from test_mbpo import KEY, KNOWN, rows

from algos import combo, mbpo

LINEAR = combo.Config(**dataclasses.asdict(dataclasses.replace(test_mbpo.LINEAR, real_ratio=0.5)), num_samples=10)


def as_ours(state):
    """MBPO's state, as COMBO's."""
    ours = {name: combo.Trainable(*x) if hasattr(x, "params") else x for name, x in state._asdict().items()}
    return combo.State(**ours | {"buffer": combo.Buffer(*state.buffer)})


def gap(q, q_data, is_real, is_pushed, log_density=None):
    log_density = jnp.zeros(q.shape[1:]) if log_density is None else log_density
    return combo.conservative_gap(q, log_density, q_data, jnp.asarray(is_real), jnp.asarray(is_pushed))


ALL = np.ones(4, bool)


def test_the_soft_maximum_is_over_all_proposals_of_each_critic():
    # Q is c everywhere: log 30 with 30 actions and no densities, whatever c (log 3 if their axis is lost)
    constant = jnp.array([2.0, -7.0])
    q, q_data = jnp.broadcast_to(constant[:, None, None], (2, 30, 4)), jnp.broadcast_to(constant[:, None], (2, 4))
    np.testing.assert_allclose(gap(q, q_data, ALL, ALL), [3.401197] * 2, rtol=1e-5)
    # Uniform densities 1 / 2^2 of two dimensions: 2 log 2 more
    density = jnp.full((30, 4), -2 * np.log(2))
    np.testing.assert_allclose(gap(q, q_data, ALL, ALL, density), [3.401197 + 1.386294] * 2, rtol=1e-5)


def test_which_rows_are_pushed_up_and_which_down():
    # One proposal, so that the soft maximum is its Q: 1, 2, 3, 4 in the rows. The data's: 10, 20, 30, 40.
    q, q_data = jnp.arange(1.0, 5)[None, None], 10 * jnp.arange(1.0, 5)[None]
    real = np.array([True, True, False, False])
    np.testing.assert_allclose(gap(q, q_data, real, ALL), [2.5 - 15], rtol=1e-6)
    np.testing.assert_allclose(gap(q, q_data, real, ~real), [3.5 - 15], rtol=1e-6)
    order = np.array([1, 0, 2, 3])  # of the real rows
    np.testing.assert_allclose(gap(q[..., order], q_data[:, order], real, ALL), [2.5 - 15], rtol=1e-6)
    np.testing.assert_allclose(gap(q, q_data, ~ALL, ALL), [2.5])  # no rows of the data: nothing to push up
    np.testing.assert_allclose(gap(q, q_data, ALL, ~ALL), [-25.0])


def test_both_sides_have_a_gradient():
    q, q_data = jnp.array([[[0.0] * 4, [1.0] * 4]]), jnp.zeros((1, 4))
    down, up = jax.grad(lambda q, q_data: gap(q, q_data, ALL, ALL).sum(), argnums=(0, 1))(q, q_data)
    weights = np.exp([0, 1]) / (1 + np.e) / 4  # a softmax over the proposals, a mean over the rows
    np.testing.assert_allclose(down[0], np.repeat(weights[:, None], 4, axis=1), rtol=1e-5)
    np.testing.assert_allclose(up, -0.25 * np.ones((1, 4)))


@pytest.mark.parametrize("num_td, beta, values", [(8, 0.5, (1.5, 1.5)), (8, 1.0, (2.0, 1.0)), (4, 0.5, (4 / 3, 1.0))])
def test_values_of_a_bandit_end_where_the_paper_has_them(num_td, beta, values):
    # Two actions, T = r = (1, 2). Four rows of the data, d = (0.75, 0.25), and four imagined ones, which are pushed
    # down, rho = (0.25, 0.75). With TD errors on d_f, of all rows or of the data's, and half the squared error, as in
    # the paper: Q = T - beta (rho - d) / d_f. Without the half it takes twice the weight.
    action, reward = np.array([0, 0, 0, 1, 0, 1, 1, 1]), jnp.array([1.0, 2.0])
    real = np.arange(8) < 4

    def loss(q):
        term = gap(q[action][None, None], q[action][None], real, ~real).sum()
        return ((q[action] - reward[action]) ** 2)[:num_td].mean() + 2 * beta * term

    q, slope = jnp.zeros(2), jax.jit(jax.grad(loss))
    for _ in range(300):
        q = q - 0.2 * slope(q)
    np.testing.assert_allclose(q, values, atol=1e-4)


@pytest.mark.parametrize("states, pushed_down", [("mix", 2.5), ("model", 3.0)])
def test_the_gap_reaches_the_critics_in_an_update(states, pushed_down):
    # Linear critics of Q = 0, and rewards of 0: the TD error is 0, and so all of the gradient is the gap's. The bias
    # has none: both sides have it. Pi is at 0.5 exactly. Two real rows are at s = 1 with the action -1, six imagined
    # ones at s = 3 with the action 1
    cfg = dataclasses.replace(LINEAR, batch_size=8, weight=2.0, num_samples=200, real_ratio=0.25, states=states)
    state = as_ours(test_mbpo.linear_state(test_mbpo.LINEAR, action=0.5))
    batch = rows([1.0] * 2 + [3.0] * 6, action=[-1.0] * 2 + [1.0] * 6, next_obs=1.0)
    after, info = jax.jit(combo.make_agent(cfg, KNOWN).update)(state, batch)
    assert info["td_loss"] == 0
    np.testing.assert_allclose(info["critic_loss"], 2 * 2.0 * info["gap"], rtol=1e-6)
    slope = test_mbpo.gradient(after.critic)
    np.testing.assert_allclose(slope["bias"], 0, atol=1e-5)
    # Importance weights of a policy of no width vanish, and the uniform proposals have a mean action of 0: 2 (0 - (-1))
    np.testing.assert_allclose(slope["kernel"][:, 1, 0], [2.0, 2.0], atol=0.2)
    np.testing.assert_allclose(slope["kernel"][:, 0, 0], 2 * (pushed_down - 1), rtol=1e-4)  # less the data's s
    np.testing.assert_allclose(info["gap"], np.log(400), atol=0.05)  # 200 uniform ones of density 1/2


@pytest.mark.parametrize("obs, next_obs", [(2.0, -2.0), (-2.0, 2.0)])
def test_proposals_are_of_the_policy_in_this_state_and_in_the_next(obs, next_obs):
    # Q(s, a) = 200 a, and pi is at tanh(s) exactly, with log density 20 - log(2 pi) / 2 - 1 / 2 - log(1 - tanh(2)^2) on
    # average. In the state at 2 its action is 0.964: log of exp Q / density = 192.8 - 21.2 = 171.6, which few uniform
    # actions exceed. The other state's is -0.964, of no weight. The data's action is 0
    cfg = dataclasses.replace(LINEAR, batch_size=64, num_samples=1)
    state = as_ours(test_mbpo.linear_state(test_mbpo.LINEAR))
    slope = lambda at, value: lambda path, x: x.at[at].set(value) if path[-1].key == "kernel" else x  # noqa: E731
    actor = jax.tree_util.tree_map_with_path(slope((0, 0), 1.0), state.actor.params)
    critic = jax.tree_util.tree_map_with_path(slope((slice(None), 1, 0), 200.0), state.critic.params)
    state = state._replace(actor=state.actor._replace(params=actor), critic=state.critic._replace(params=critic))
    info = jax.jit(combo.make_agent(cfg, KNOWN).update)(state, rows(np.full(64, obs), next_obs=next_obs))[1]
    np.testing.assert_allclose(info["gap"], 172.7, atol=4)


def test_rows_of_the_data_come_first():
    np.testing.assert_array_equal(combo.real_rows(8, 0.3), np.arange(8) < 2)


def test_without_the_gap_it_is_mbpo_bit_for_bit():
    changes = dict(hidden=(8,), model_hidden=(8,), learning_rate=1e-3)
    ours = dataclasses.replace(LINEAR, **changes, weight=0.0, backup_entropy=True, actor_learning_rate=1e-3)
    theirs = mbpo.Config(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(mbpo.Config)})
    rng = np.random.default_rng(0)
    data = rows(*rng.normal(size=(4, 40)), terminal=np.arange(40) % 5 == 0)
    without = jax.jit(mbpo.make_agent(theirs, KNOWN).init)(KEY)
    with_0 = as_ours(without)
    for phase in ("pretrain", "update"):
        with_0, _ = jax.jit(combo.make_train(ours, combo.make_agent(ours, KNOWN), phase))(with_0, data)
        without, _ = jax.jit(mbpo.make_train(theirs, mbpo.make_agent(theirs, KNOWN), phase))(without, data)
    for name in set(mbpo.State._fields) - {"key", "report"}:
        chex.assert_trees_all_equal(*(jax.tree.leaves(getattr(state, name)) for state in (with_0, without)))


def test_the_target_is_without_entropy_unless_asked_for():
    # The policy is at 0 with a log deviation of -20: -log pi is -20 + 1.418939 = -18.6 in the mean, and alpha is 1.
    # Q' = 0, reward 0, so that y is 0, or 0.9 times that. Q = 0
    losses = []
    for entropy in (False, True):
        cfg = dataclasses.replace(LINEAR, batch_size=64, weight=0.0, backup_entropy=entropy, discount=0.9)
        state = as_ours(test_mbpo.linear_state(test_mbpo.LINEAR))
        _, info = jax.jit(combo.make_agent(cfg, KNOWN).update)(state, rows(np.ones(64)))
        losses.append(info["td_loss"])
    np.testing.assert_allclose(losses, [0.0, 2 * (0.9 * 18.6) ** 2], rtol=0.05)
