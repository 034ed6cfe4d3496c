"""CQL against numbers worked out by hand, against SAC, and against the paper's fixed points in tables.

Where a policy draws no noise, its action is tanh(mean), and log pi = -log_std - log(2 pi) / 2 - log(1 - action^2).
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import cql, sac
from common.datasets import Transition
from common.environments import Spec

LINEAR = cql.Config(hidden=(), learning_rate=0.0, actor_learning_rate=0.0, discount=0.9, num_samples=10)
EIGHT = cql.Config(hidden=(8,), num_samples=2)
TABLE = cql.Config(hidden=(4,), num_samples=1)
LOG_STD_OF_HALF = np.log(2) - 0.918939  # log pi(0) = -log 2 for each dimension, as of the uniform distribution


@functools.partial(jax.jit, static_argnames=("cfg", "spec", "noise"))
def update(cfg, spec, floats, state, batch, noise=True):
    """One update, compiled once for all values of the `floats` of its Config.

    Without noise, Gaussians are at their means and uniform actions at 0.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        for draw in () if noise else ("normal", "uniform"):
            monkeypatch.setattr(jax.random, draw, lambda key, shape=(), *args, **kwargs: jnp.zeros(shape))
        return cql.make_agent(dataclasses.replace(cfg, **floats), spec).update(state, batch)


def zeros(cfg, spec):
    shapes = jax.eval_shape(cql.make_agent(cfg, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    return state._replace(key=jax.random.key(0))


@functools.cache
def eight_state():
    return jax.jit(cql.make_agent(EIGHT, Spec(3, 2)).init)(jax.random.key(0))


def fill(tree, kernel, bias):
    """Linear networks with kernel (..., inputs, outputs) and bias (..., outputs), (...) being an ensemble's axis."""

    def leaf(path, x):
        return jnp.broadcast_to(jnp.float32(kernel if "kernel" in jax.tree_util.keystr(path) else bias), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(mean=(0.0, 0.0), log_std=-1.0, critics=((0.0, 0.0),) * 2, target_critics=None, bias=0.0):
    """One observation, one action: mean[0] s + mean[1], a log_std, and critics of weights (s, a) and a bias."""
    state = zeros(LINEAR, Spec(1, 1))
    target_critics = critics if target_critics is None else target_critics
    return state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, [[mean[0], 0.0]], [mean[1], log_std])),
        critic=state.critic._replace(params=fill(state.critic.params, np.array(critics)[..., None], bias)),
        target_critic=fill(state.target_critic, np.array(target_critics)[..., None], bias),
    )


def rows_of(obs, action, reward=0.0, next_obs=0.0, terminal=0.0, n=2):
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    obs, action, next_obs = (column(x)[:, None] for x in (obs, action, next_obs))
    return Transition(obs, action, column(reward), next_obs, column(terminal))


def random_batch(n=16):
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs, action = (jax.random.uniform(k[i], (n, d), minval=-1) for i, d in ((0, 3), (1, 3), (2, 2)))
    return Transition(obs, action, jax.random.normal(k[3], (n,)), next_obs, jnp.arange(n) % 4 // 3.0)


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


def named(tree):
    """{"kernel": array, "bias": array} of a linear network."""
    return {path[-1].key: x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


# --- Learning rates -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("moving", ["learning_rate", "actor_learning_rate"])
def test_actor_and_alpha_have_their_own_learning_rate(moving):
    cfg = dataclasses.replace(EIGHT, lagrange=True)
    state = jax.jit(cql.make_agent(cfg, Spec(3, 2)).init)(jax.random.key(0))
    floats = {"learning_rate": 0.0, "actor_learning_rate": 0.0} | {moving: 0.1}
    after, _ = update(cfg, Spec(3, 2), floats, state, random_batch())
    of = {"learning_rate": ["critic", "log_multiplier"], "actor_learning_rate": ["actor", "log_alpha"]}
    for name in sum(of.values(), []):
        leaves = (jax.tree.leaves(getattr(s, name).params) for s in (state, after))
        assert all(np.array_equal(x, y) != (name in of[moving]) for x, y in zip(*leaves, strict=True)), name


# --- Limits ----------------------------------------------------------------------------------------------


def test_weight_zero_is_sac_bit_for_bit():
    # Not compiled as a whole: XLA would add the gradients' two parts, one of them zero, in another order. Linear
    # networks, because every operation is then a compilation of its own
    new, batch = [], random_batch()
    limit = cql.Config(hidden=(), num_samples=2, weight=0.0, actor_learning_rate=1e-3, backup_entropy=True)
    start = jax.jit(cql.make_agent(limit, Spec(3, 2)).init)(jax.random.key(0))
    for algo, cfg, state in ((sac, sac.Config(hidden=()), sac.State(*start[:5])), (cql, limit, start)):
        for _ in range(2):
            state, info = algo.make_agent(cfg, Spec(3, 2)).update(state, batch)
        new.append([*jax.tree.leaves(state[:5]), info["critic_loss"], info["actor_loss"], info["entropy"]])
    chex.assert_trees_all_equal(*new)


# --- The conservative term --------------------------------------------------------------------------------


@pytest.mark.parametrize("action_dim, gap", [(3, 5.480639), (6, 7.560080)])
def test_gap_of_a_constant_q_under_a_uniform_policy(action_dim, gap):
    # Every proposal has the density 2^-|A|: log sum_(30) exp(c + |A| log 2) - c = |A| log 2 + log 30
    state = zeros(LINEAR, Spec(1, action_dim))
    bias = np.concatenate([np.zeros(action_dim), np.full(action_dim, LOG_STD_OF_HALF)])
    state = state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, 0.0, bias)),
        critic=state.critic._replace(params=fill(state.critic.params, 0.0, 7.0)),
    )
    batch = rows_of(obs=1.0, action=0.3)._replace(action=jnp.zeros((2, action_dim)))
    _, info = update(LINEAR, Spec(1, action_dim), {}, state, batch, noise=False)
    np.testing.assert_allclose(info["gap"], gap, rtol=1e-6)
    np.testing.assert_allclose(info["critic_loss"], info["td_loss"] + 5 * 2 * gap, rtol=1e-5)  # of both critics


def test_rho_has_no_densities_and_counts_the_datas_action():
    # log sum over 3 n + 1 = 31 equal values, less one of them: log 31 = 3.433987, whatever the densities
    cfg, state = dataclasses.replace(LINEAR, regularizer="rho"), linear_state(log_std=0.7, bias=7.0)
    _, info = update(cfg, Spec(1, 1), {}, state, rows_of(obs=1.0, action=0.3), noise=False)
    np.testing.assert_allclose(info["gap"], 3.433987, rtol=1e-6)


@pytest.mark.parametrize("regularizer", ["H", "rho"])
def test_gradients_of_the_gap(regularizer):
    # Of a logsumexp: each term's share p. With rho the data's Q is one of the terms, and dgap / dq_data = p_data - 1
    keys = jax.random.split(jax.random.key(0), 3)
    q, q_data, log_density = (
        jax.random.normal(k, shape) for k, shape in zip(keys, [(2, 6, 5), (2, 5), (6, 5)], strict=True)
    )
    gap = lambda q, q_data: cql.conservative_gap(q, log_density, q_data, regularizer).sum()  # noqa: E731
    by_q, by_q_data = jax.grad(gap, argnums=(0, 1))(q, q_data)
    terms = np.concatenate([q, q_data[:, None]], axis=1) if regularizer == "rho" else q - log_density[None]
    p = np.exp(terms) / np.exp(terms).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(by_q, p[:, :6], rtol=1e-5)
    np.testing.assert_allclose(by_q_data, p[:, 6] - 1 if regularizer == "rho" else -np.ones((2, 5)), rtol=1e-5)


def test_gradient_of_the_term():
    # s = 1, s' = -1, mean = atanh(0.6) s, both Q = 0.5 a, which is right at the data's action 0.2 = r (terminal), so
    # that the gradient is that of weight * gap. Ten proposals each of 0.6, -0.6 and 0. log pi(+-0.6) = 1 - 0.918939
    # - log 0.64 = 0.527348, log uniform = -0.693147: exponents 0.3 - 0.527348, -0.3 - 0.527348 and 0.693147, and with
    # their softmax p, dgap / dw_a = 0.6 p_1 - 0.6 p_2 - 0.2. All proposals and the data's action are at s, so that
    # dgap / dw_s = dgap / dbias = sum p - 1 = 0.
    state = linear_state(mean=(np.arctanh(0.6), 0.0), critics=[[0.0, 0.5]] * 2)
    batch = rows_of(obs=1.0, action=0.2, reward=0.1, next_obs=-1.0, terminal=1.0)
    after, info = update(LINEAR, Spec(1, 1), {}, state, batch, noise=False)
    p = np.exp([-0.227348, -0.827348, 0.693147])
    p /= p.sum()
    assert info["td_loss"] < 1e-12
    grads = named(gradient(after.critic))
    np.testing.assert_allclose(grads["kernel"][:, 1, 0], 5 * (0.6 * p[0] - 0.6 * p[1] - 0.2), rtol=1e-4)
    np.testing.assert_allclose(grads["kernel"][:, 0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(grads["bias"], 0, atol=1e-6)


def test_the_term_moves_no_policy():
    # The actor's step sees the critics, which stand still at learning rate 0, and not the weight
    grads = []
    for weight in (0.0, 5.0):
        floats = {"learning_rate": 0.0, "weight": weight}
        after, _ = update(EIGHT, Spec(3, 2), floats, eight_state(), random_batch())
        grads.append(gradient(after.actor))
    chex.assert_trees_all_equal(*grads)


def test_a_critics_term_does_not_depend_on_the_other_critic():
    state, grads = eight_state(), []
    other = jax.tree.map(lambda x: x.at[1].multiply(-3), state.critic.params)
    for params in (state.critic.params, other):
        changed = state._replace(critic=state.critic._replace(params=params))
        after, _ = update(EIGHT, Spec(3, 2), {"learning_rate": 0.0, "weight": 5.0}, changed, random_batch())
        grads.append(gradient(after.critic))
    chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[0], g) for g in grads))
    assert not np.array_equal(*(jax.tree.leaves(g)[0][1] for g in grads))


@pytest.mark.parametrize("mean", [(0.2, 0.0), (0.0, 0.5)])
def test_proposals_estimate_the_integral_of_exp_q(mean):
    # Q = 2 a: log of the integral of e^(2a) over [-1, 1] = log sinh 2 = 1.288365; each of the three proposals estimates
    # it, so the sum over 3 n has log(3 n) more. The data's action is 0, with Q = 0. Were actions paired with the
    # densities of others, a proposal of mean 0.5 would estimate 1.74 times the integral.
    cfg = dataclasses.replace(LINEAR, num_samples=2000)
    state = linear_state(mean=mean, log_std=0.3, critics=[[0.0, 2.0]] * 2)
    _, info = update(cfg, Spec(1, 1), {}, state, rows_of(obs=1.0, action=0.0, next_obs=-1.0))
    np.testing.assert_allclose(info["gap"] - np.log(6000), 1.288365, atol=0.03)


def test_conservatism_holds_what_extrapolation_drives_up():
    # One state that follows itself, reward 1, discount 0.9, and no action in the data but 0.5: no return is above 10.
    # Without the term the policy runs to the end of its box, where Q exceeds every return, and takes Q of the data's
    # action along. With it no action is worth more than the data's.
    data = rows_of(obs=1.0, action=0.5, reward=1.0, next_obs=1.0, n=8)
    actions = jnp.linspace(-1, 1, 9)[:, None]  # number 6 is the data's

    def one(weight):
        cfg = cql.Config(hidden=(32,), batch_size=8, discount=0.9, weight=weight, log_interval=600)
        cfg = dataclasses.replace(cfg, learning_rate=0.01, actor_learning_rate=0.01, tau=0.1)
        agent = cql.make_agent(cfg, Spec(1, 1))
        state, _ = cql.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)
        action = agent.act(state, jnp.ones(1), jax.random.key(0))
        return agent.q(state, jnp.ones((9, 1)), actions), agent.q(state, jnp.ones(1), action), action[0]

    q, believed, action = jax.jit(jax.vmap(one))(jnp.array([0.0, 5.0]))
    assert believed[0] > 100 and action[0] > 0.9
    assert believed[1] < 10 and abs(action[1] - 0.5) < 0.15 and q[1].argmax() == 6


# --- Target ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backup_entropy, y", [(False, 2.44), (True, 1.965387)])
def test_target_with_and_without_entropy(backup_entropy, y):
    # As in SAC's test: a' = 0.6, min Q' = 1.6, log pi(a'|s') = 0.527348, alpha = 1: y = 1 + 0.9 * 1.6 = 2.44, or
    # 1 + 0.9 (1.6 - 0.527348) = 1.965387; 1 at a terminal. Q = 0.
    cfg = dataclasses.replace(LINEAR, backup_entropy=backup_entropy)
    targets = [[2.0, 3.0], [2.0, 1.0]]
    state = linear_state(mean=(2 * np.arctanh(0.6), 0.0), target_critics=targets)
    batch = rows_of(obs=-0.5, action=0.3, reward=1.0, next_obs=0.5, terminal=jnp.array([0.0, 1.0]))
    _, info = update(cfg, Spec(1, 1), {}, state, batch, noise=False)
    np.testing.assert_allclose(info["td_loss"], y**2 + 1, rtol=1e-5)


def test_the_targets_action_is_a_sample():
    # pi is nearly uniform on two ends: Q'(s', a') = a' is +-1 by halves, so that y^2 is 0.81; of tanh(mean) 0
    state = linear_state(log_std=2.0, target_critics=[[0.0, 1.0]] * 2)
    _, info = update(LINEAR, Spec(1, 1), {}, state, rows_of(obs=1.0, action=0.0, n=256))
    assert 0.7 < info["td_loss"] / (2 * 0.81) <= 1


def test_max_q_backup_is_of_each_critic_before_the_smaller_one():
    # Q1' = a', Q2' = -a', ten actions that are -1 or 1 mostly: each critic's best is near 1, and so is the smaller of
    # the two; the best of min(a', -a') = -|a'| would be below 0
    cfg = dataclasses.replace(LINEAR, max_q_backup=True)
    state = linear_state(log_std=2.0, target_critics=[[0.0, 1.0], [0.0, -1.0]])
    _, info = update(cfg, Spec(1, 1), {}, state, rows_of(obs=1.0, action=0.0, reward=1.0, n=256))
    np.testing.assert_allclose(info["td_loss"] / 2, 1.9**2, rtol=0.05)


# --- Lagrange multiplier ---------------------------------------------------------------------------------


def test_multiplier_starts_at_one():
    cfg = dataclasses.replace(EIGHT, lagrange=True)
    state = jax.jit(cql.make_agent(cfg, Spec(3, 2)).init)(jax.random.key(0))
    assert state.log_multiplier.params == 0
    _, info = update(cfg, Spec(3, 2), {"learning_rate": 0.0, "actor_learning_rate": 0.1}, state, random_batch())
    np.testing.assert_allclose(info["weight"], cfg.weight)


@pytest.mark.parametrize("gap_target, grows", [(5.0, True), (6.0, False)])
def test_multiplier_grows_where_the_gap_is_above_its_target(gap_target, grows):
    # The gap is 3 log 2 + log 30 = 5.480639; multiplier 2, weight 5: dL / dlog multiplier = -10 (5.480639 - target)
    cfg = dataclasses.replace(LINEAR, lagrange=True)
    state = zeros(cfg, Spec(1, 3))
    bias = np.concatenate([np.zeros(3), np.full(3, LOG_STD_OF_HALF)])
    state = state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, 0.0, bias)),
        log_multiplier=state.log_multiplier._replace(params=jnp.log(2.0)),
    )
    batch = rows_of(obs=1.0, action=0.3)._replace(action=jnp.zeros((2, 3)))
    floats = {"learning_rate": 0.1, "gap_target": gap_target}
    after, info = update(cfg, Spec(1, 3), floats, state, batch, noise=False)
    np.testing.assert_allclose(info["critic_loss"], info["td_loss"] + 10 * 2 * 5.480639, rtol=1e-5)
    np.testing.assert_allclose(gradient(after.log_multiplier), -10 * (5.480639 - gap_target), rtol=1e-5)
    np.testing.assert_allclose(info["multiplier_loss"], -10 * (5.480639 - gap_target), rtol=1e-5)
    assert (after.log_multiplier.params > jnp.log(2.0)) == grows


# --- Fixed points of the paper's equations 1 and 2 in tables -------------------------------------------------
#
# Actions -1 and 1. An observation is (state in one-hot form, the action that the policy takes): a linear policy of
# large slope and no width takes it, and a batch holds each state, data action, next state and pair of the policy's
# actions as often as they are likely. Four hidden units are one for a state and an action each, so that the critic
# is a table. At a fixed point its loss has no gradient. The paper has a factor 1/2 before the squared error:
# its alpha is half our weight.

M2_NEXT, M2_REWARD = [[0, 1], [0, 1]], [[0.0, 1.0], [2.0, 0.0]]  # [state][action]


def table_state(q):
    """A policy that does as the observation says, and critics and targets with the table q[state][action]."""
    q = np.array(q)
    state = zeros(TABLE, Spec(3, 1))
    hidden = np.zeros((4, 4))  # inputs (state 0, state 1, the policy's action, action), units (s, a)
    for i, (s, a) in enumerate(np.ndindex(2, 2)):
        hidden[s, i], hidden[3, i] = 2, 2 * (2 * a - 1)  # relu(2 one_hot + 2 a - 3): 1 at (s, a), 0 elsewhere
    first, last = np.zeros((3, 4)), np.zeros((4, 2))  # the policy's: relu(u) and relu(-u), then mean 20 u
    first[2, :2], last[:2, 0] = (1, -1), (20, -20)

    def load(tree, *layers):
        def leaf(path, x):
            kernel, bias = layers["Dense_1" in jax.tree_util.keystr(path)]
            return jnp.broadcast_to(jnp.float32(kernel if path[-1].key == "kernel" else bias), x.shape)

        return jax.tree_util.tree_map_with_path(leaf, tree)

    critic = load(state.critic.params, (hidden, np.full(4, -3.0)), (q.reshape(4, 1), np.zeros(1)))
    actor = load(state.actor.params, (first, np.zeros(4)), (last, np.array([0.0, -20.0])))
    return state._replace(
        actor=state.actor._replace(params=actor),
        critic=state.critic._replace(params=critic),
        target_critic=critic,
    )


def table_batch(beta, mu, pi, next_state, reward, quarter=4):
    """Each state's data actions (beta), pushed-down actions (mu) and next actions (pi), all in quarters."""

    def draws(p):
        return [a for a, share in enumerate(p) for _ in range(round(quarter * share))]

    rows = [
        (s, u, a, reward[s][a], next_state[s][a], v)
        for s in range(len(beta))
        for a in draws(beta[s])
        for u in draws(mu[s])
        for v in draws(pi[next_state[s][a]])
    ]
    s, u, a, r, t, v = map(np.array, zip(*rows, strict=True))
    sign = lambda x: 2.0 * x[:, None] - 1  # noqa: E731
    obs, next_obs = (np.concatenate([np.eye(2)[i], sign(j)], axis=1) for i, j in ((s, u), (t, v)))
    columns = (obs, sign(a), r, next_obs, np.zeros(len(r)))
    return Transition(*(jnp.asarray(x, jnp.float32) for x in columns))


def table_gradient(state):
    """Of the loss with respect to Q(s, a): the last layer's kernels, (critics, states and actions, 1)."""
    return gradient(state.critic)["params"]["VmapMLP_0"]["Dense_1"]["linear"]["kernel"]


HALVES, PI, BETA = [[0.5, 0.5]] * 2, [[0.25, 0.75], [1.0, 0.0]], [[0.75, 0.25], [0.5, 0.5]]
A1 = [[1.0, 0.0]] * 2


def solve(alpha, beta, mu, pi, next_state, reward, discount, push_up):
    """Q = r + discount V(s') - alpha (mu / beta - push_up), and V = sum_a pi Q."""
    beta, mu, pi, reward, next_state = map(np.array, (beta, mu, pi, reward, next_state))
    q = np.zeros((2, 2))
    for _ in range(600):
        q = reward + discount * (pi * q).sum(axis=1)[next_state] - alpha * (mu / beta - push_up)
    return q


@pytest.mark.parametrize(
    "regularizer, mu, values",
    [
        ("eq2", PI, (11.3383, 12.1045)),
        ("eq1", PI, (10.3383, 11.1045)),
        ("eq1", HALVES, (11.1393, 11.9254)),
        ("eq2", HALVES, (12.1393, 12.9254)),
        ("none", PI, (12.5373, 13.2836)),
    ],
)
def test_fixed_points_of_two_states(regularizer, mu, values):
    alpha = 0.0 if regularizer == "none" else 0.1
    q = solve(alpha, BETA, mu, PI, M2_NEXT, M2_REWARD, 0.9, push_up=regularizer == "eq2")
    np.testing.assert_allclose((np.array(PI) * q).sum(axis=1), values, atol=1e-4)  # the numbers of the derivation
    cfg = dataclasses.replace(TABLE, regularizer="eq1" if regularizer == "none" else regularizer)
    floats = {"weight": 2 * alpha, "discount": 0.9}
    batch = table_batch(BETA, mu, PI, M2_NEXT, M2_REWARD)
    for q_, still in ((q, True), (q + 0.05 * np.eye(2), False)):
        after, _ = update(cfg, Spec(3, 1), floats, table_state(q_), batch)
        assert np.allclose(table_gradient(after), 0, atol=1e-5) == still


@pytest.mark.parametrize(
    "regularizer, mu, slope",
    [("eq2", A1, 2), ("eq1", A1, 4), ("eq1", HALVES, 2)],
    ids=["eq2-pi", "eq1-pi", "eq1-uniform"],
)
@pytest.mark.parametrize("alpha", [0.1, 0.4])
def test_fixed_points_of_one_state(regularizer, mu, slope, alpha):
    # One state, rewards 1 and 0, discount 1/2, uniform data, pi = a1: V = 2 and Q(a2) = 1. CQL of eq. 2 with mu = pi
    # leaves Q(a2) = 1 for every alpha: the bound is on the value, not on every action.
    q = solve(alpha, HALVES, mu, A1, [[0, 0]] * 2, [[1.0, 0.0]] * 2, 0.5, push_up=regularizer == "eq2")
    np.testing.assert_allclose(q[0, 0], 2 - slope * alpha, atol=1e-6)
    if regularizer == "eq2":
        np.testing.assert_allclose(q[0, 1], 1, atol=1e-6)
    cfg = dataclasses.replace(TABLE, regularizer=regularizer)
    floats = {"weight": 2 * alpha, "discount": 0.5}
    batch = table_batch(HALVES, mu, A1, [[0, 0]] * 2, [[1.0, 0.0]] * 2)
    after, _ = update(cfg, Spec(3, 1), floats, table_state(q), batch)
    np.testing.assert_allclose(table_gradient(after), 0, atol=1e-5)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        cql.make_agent(cql.Config(), Spec(3, 4, discrete=True))
