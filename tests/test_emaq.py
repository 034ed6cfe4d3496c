"""EMaQ against numbers worked out by hand, and against values of small MDPs in closed form."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import emaq
from common.datasets import Transition
from common.environments import Spec

# --- The operator ----------------------------------------------------------------------------------------

log = lambda p: jnp.log(jnp.array(p, jnp.float32))  # noqa: E731
expected_max = jax.jit(emaq.expected_max, static_argnums=2)


@pytest.mark.parametrize("num, expect", [(1, 0.25), (2, 0.4375), (5, 0.762695), (10, 0.943686)])
def test_expected_max_of_draws(num, expect):
    # Values 1 and 0, the better with probability 1/4: the maximum is 1 unless all draws are 0, 1 - 0.75^N
    np.testing.assert_allclose(expected_max(jnp.array([0.0, 1.0]), log([0.75, 0.25]), num), expect, rtol=1e-5)


def test_expected_max_is_what_draws_have_on_average():
    values = jax.random.normal(jax.random.key(0), (5, 6))
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (5, 6)))

    @jax.jit
    def drawn(key):
        index = jax.random.categorical(key, log_probs, shape=(20_000, 3, 5))
        return jnp.take_along_axis(values[None, None], index[..., None], axis=-1).squeeze(axis=-1).max(axis=1)

    samples = np.asarray(drawn(jax.random.key(2)))
    error = 5 * samples.std(axis=0) / np.sqrt(20_000)  # five standard errors
    assert (np.abs(expected_max(values, log_probs, 3) - samples.mean(axis=0)) < error).all()


def test_more_draws_are_better_and_one_is_the_mean():
    values = jax.random.normal(jax.random.key(0), (5, 6))
    log_probs = jax.nn.log_softmax(jax.random.normal(jax.random.key(1), (5, 6)))
    by_num = np.stack([expected_max(values, log_probs, num) for num in (1, 2, 3, 8, 1000)])
    assert (np.diff(by_num, axis=0) > 0).all()
    np.testing.assert_allclose(by_num[0], (jnp.exp(log_probs) * values).sum(axis=-1), rtol=1e-4)
    np.testing.assert_allclose(by_num[-1], values.max(axis=-1), rtol=1e-4)


def test_expected_max_with_equal_values_and_impossible_actions():
    np.testing.assert_allclose(expected_max(jnp.array([2.0, 2.0, 2.0]), log([0.2, 0.3, 0.5]), 7), 2.0, rtol=1e-5)
    np.testing.assert_allclose(expected_max(jnp.array([100.0, 1.0]), log([0.0, 1.0]), 1000), 1.0, rtol=1e-5)


# The two-state MDP: gamma 0.9; in s0, a0 stays with reward 0 and a1 goes to s1 with reward 1; in s1, a0 goes back with
# reward 2 and a1 stays with reward 0. The behaviour takes a1 in s0 once in four times, and either in s1 alike.
REWARD, NEXT, DISCOUNT = np.array([[0.0, 1.0], [2.0, 0.0]]), np.array([[0, 1], [0, 1]]), 0.9
MU = np.array([[0.75, 0.25], [0.5, 0.5]])
# V_1 is the behaviour's value: V0 = 0.25 + 0.9 (0.75 V0 + 0.25 V1), V1 = 1 + 0.9 (V0 + V1) / 2. V* is that of a1 in s0
# and a0 in s1: V0 = 1 + 0.9 V1, V1 = 2 + 0.9 V0, so V0 = 2.8 / 0.19. V_2: a1 is best in s0, and a0 in s1, so
# V0 = q1 - 0.5625 (q1 - q0), V1 = q0 - 0.25 (q0 - q1), with q the Q-values there; V_5 has 0.75^5 and 0.5^5.
V_N = {1: (4.6774, 5.6452), 2: (7.9545, 8.8636), 5: (12.4899, 13.1983), 1000: (14.7368, 15.2632)}


@pytest.mark.parametrize("num", V_N)
def test_values_of_a_small_mdp(num):
    @jax.jit
    def solve():
        backup = lambda _, v: emaq.expected_max(REWARD + DISCOUNT * v[NEXT], log(MU), num)  # noqa: E731
        return jax.lax.fori_loop(0, 300, backup, jnp.zeros(2))

    np.testing.assert_allclose(solve(), V_N[num], rtol=1e-4)


@pytest.mark.parametrize("num", [1, 2, 1000])
def test_the_algorithm_finds_these_values(num):
    """Both phases, with tables for networks: linear in one-hot observations, on data that have MU's frequencies."""
    rows = [(s, a) for s in (0, 1) for a in (0, 1) for _ in range(int(4 * MU[s, a]))]
    s, a = np.array(rows).T
    one_hot = np.eye(2, dtype=np.float32)
    batch = Transition(one_hot[s], a.astype(np.int32), np.float32(REWARD[s, a]), one_hot[NEXT[s, a]], np.zeros(8, "f4"))
    cfg = emaq.Config(
        hidden=(), num_critics=2, num_samples=num, discount=DISCOUNT, learning_rate=0.05, tau=0.5, log_interval=1500
    )
    agent = emaq.make_agent(cfg, Spec(2, 2, discrete=True))

    @jax.jit
    def train():
        def run(update, state):
            return jax.lax.scan(lambda state, _: (update(state, batch)[0], None), state, length=1500)[0]

        return run(agent.update, run(agent.pretrain, agent.init(jax.random.key(0))))

    state = train()
    every = jnp.repeat(one_hot, 2, axis=0), jnp.array([0, 1, 0, 1])
    q = np.asarray(agent.q(state, *every)).reshape(2, 2)
    np.testing.assert_allclose(q, REWARD + DISCOUNT * np.array(V_N[num])[NEXT], rtol=0.02)
    # It acts by the best of N draws: a1 in s0 with probability 1 - 0.75^N, a0 in s1 with 1 - 0.5^N
    action = jax.jit(agent.act)(state, jnp.repeat(jnp.asarray(one_hot), 2000, axis=0), jax.random.key(1))
    best = np.array([action[:2000].mean(), 1 - action[2000:].mean()])
    np.testing.assert_allclose(best, [1 - 0.75**num, 1 - 0.5**num], atol=0.05)


def test_many_draws_are_the_maximum_over_the_datas_actions_alone():
    """N -> infinity is batch-constrained Q-learning: without (s0, a1), the only way to s1, its Q changes nothing."""
    # Nothing leaves s0: Q(s0, a0) = 0, Q(s1, a0) = 2 + 0.9 * 0, Q(s1, a1) = 0.9 * 2. With Q(s0, a1) in the maximum, of
    # 20 at first, they would be near 18, 20 and 18.
    s, a = np.array([(0, 0), (1, 0), (1, 1)]).T
    one_hot = np.eye(2, dtype=np.float32)
    batch = Transition(one_hot[s], a.astype(np.int32), np.float32(REWARD[s, a]), one_hot[NEXT[s, a]], np.zeros(3, "f4"))
    cfg = emaq.Config(hidden=(), num_critics=2, num_samples=1000, discount=DISCOUNT, learning_rate=0.05, tau=0.5)
    agent = emaq.make_agent(cfg, Spec(2, 2, discrete=True))

    @jax.jit
    def train():
        state = agent.init(jax.random.key(0))
        behaviour = set_layer(state.behaviour.params, [[0, -100], [0, 0]], np.zeros(2))  # a1 is impossible in s0
        critic = set_layer(state.critic.params, [[[0, 20], [0, 0]]] * 2, np.zeros((2, 2)))
        state = state._replace(
            behaviour=state.behaviour._replace(params=behaviour),
            critic=state.critic._replace(params=critic),
            target_critic=critic,
        )
        return jax.lax.scan(lambda state, _: (agent.update(state, batch)[0], None), state, length=1500)[0]

    state = train()
    np.testing.assert_allclose(agent.q(state, batch.obs, batch.action), [0, 2, 1.8], atol=0.02)
    np.testing.assert_array_equal(jax.jit(agent.act)(state, batch.obs, jax.random.key(1)), [0, 0, 0])


# --- Continuous actions: linear networks with numbers of ours ------------------------------------------------

BINS = 2  # of the behaviour model: [-1, 0) and [0, 1]


@functools.cache
def program(num_samples, num_critics=2):
    """A state of zeros, update, pretrain and act for one observation and one action; Config's floats are arguments."""

    def agent(floats):
        cfg = emaq.Config(hidden=(), bins=BINS, num_critics=num_critics, num_samples=num_samples)
        return emaq.make_agent(dataclasses.replace(cfg, **floats), Spec(1, 1))

    shapes = jax.eval_shape(agent({}).init, jax.random.key(0))._replace(key=None)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(key=jax.random.key(0))
    update = jax.jit(lambda floats, state, batch: agent(floats).update(state, batch))
    pretrain = jax.jit(lambda floats, state, batch: agent(floats).pretrain(state, batch))
    return state, update, pretrain, jax.jit(lambda floats, state, obs, key: agent(floats).act(state, obs, key))


def set_layer(params, kernel, bias):
    """The one layer of these parameters: (inputs, outputs) and (outputs,), with a leading axis in an ensemble."""
    names = jax.tree_util.tree_leaves_with_path(params)
    values = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    leaves = [values["kernel" if "kernel" in jax.tree_util.keystr(path) else "bias"] for path, _ in names]
    assert [leaf.shape for leaf in leaves] == [old.shape for _, old in names]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def linear_agent(critics, target_critics=None, upper=0.5, num_samples=8, **floats):
    """(update, pretrain, act, state). Critics: weights of obs and action, and bias. `upper`: the model's P(a > 0)."""
    state, *functions = program(num_samples, len(critics))
    base = {f.name: getattr(emaq.Config(), f.name) for f in dataclasses.fields(emaq.Config) if f.type == "float"}
    floats = {name: jnp.float32(x) for name, x in (base | {"learning_rate": 0.0} | floats).items()}

    def critic_of(rows):
        rows = np.array(rows)
        return set_layer(state.target_critic, rows[:, :2, None], rows[:, 2:])

    behaviour = set_layer(state.behaviour.params, np.zeros((2, BINS)), np.log([1 - upper + 1e-30, upper + 1e-30]))
    state = state._replace(
        behaviour=state.behaviour._replace(params=behaviour),
        critic=state.critic._replace(params=critic_of(critics)),
        target_critic=critic_of(target_critics or critics),
    )
    return *(functools.partial(f, floats) for f in functions), state


def batch_of(obs, action=0.0, reward=0.0, next_obs=0.0, terminal=0.0):
    n = len(obs)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    return Transition(
        jnp.array(obs)[:, None], column(action)[:, None], column(reward), column(next_obs)[:, None], column(terminal)
    )


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


ZERO = ((0.0, 0.0, 0.0),) * 2


@pytest.mark.parametrize("num, mean", [(1, 0.0), (8, 7 / 9)])
def test_the_target_is_the_best_of_n_actions_of_the_model(num, mean):
    # The model is uniform on [-1, 1] and target Q = s' + a: the best of N actions is (N - 1) / (N + 1) on average, and
    # of one action 0, the expected SARSA target. At Q = 0 the gradient of a critic's bias is -2 mean(y).
    update, _, _, state = linear_agent(ZERO, ((1.0, 1.0, 0.0),) * 2, num_samples=num)
    terminal = jnp.arange(2048) % 2
    after, info = update(state, batch_of([0.0] * 2048, reward=1.0, next_obs=2.0, terminal=terminal))
    (bias,) = (
        g for p, g in jax.tree_util.tree_leaves_with_path(gradient(after.critic)) if "bias" in jax.tree_util.keystr(p)
    )
    np.testing.assert_allclose(bias / -2, 1 + 0.99 * (2 + mean) / 2, atol=0.04)  # four standard errors: 0.036
    np.testing.assert_allclose(info["q"], 0.0, atol=1e-7)


@pytest.mark.parametrize("min_weight, next_q", [(1.0, 2.6), (0.75, 2.75), (0.0, 5.0)])
def test_critics_are_mixed_before_the_maximum(min_weight, next_q):
    # Target Q1 = 3 + 2 a, Q2 = 2.5 - a / 2 on [-1, 1]. The smaller one is largest where they cross, 2.6 at a = -0.2;
    # the larger one is 5 at a = 1; mixed by 0.75 it is 2.625 + a / 8 from the crossing on, 2.75 at a = 1. (Mixtures of
    # the maxima, 3 and 5, are 3 for 1 and 3.5 for 0.75.) The best of 64 actions is within 2 % of these.
    update, _, _, state = linear_agent(ZERO, ((0.0, 2.0, 3.0), (0.0, -0.5, 2.5)), num_samples=64, min_weight=min_weight)
    _, info = update(state, batch_of([0.0] * 512, reward=1.0))
    np.testing.assert_allclose(np.sqrt(info["critic_loss"] / 2), 1 + 0.99 * next_q, rtol=0.02)


def test_every_critic_of_the_ensemble_counts():
    # The smallest of three at s' = 1 is the last: y = 0.5 + 0.99 * 1; critics 0: the loss is a sum over three
    update, _, _, state = linear_agent(((0.0,) * 3,) * 3, ((3.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 0.0, 1.0)))
    _, info = update(state, batch_of([0.0, 0.0], reward=0.5, next_obs=1.0))
    np.testing.assert_allclose(info["critic_loss"], 3 * (0.5 + 0.99) ** 2, rtol=1e-5)


def test_it_acts_by_the_best_of_n_actions_of_the_model():
    # The model is uniform on [0, 1]; critics a and 1 - a / 2 mixed by 1 are largest at a = 2/3, by 0 at a = 0 or 1
    obs = jnp.zeros((512, 1))
    rows = ((0.0, 1.0, 0.0), (0.0, -0.5, 1.0))
    _, _, act, state = linear_agent(rows, upper=1.0, num_samples=64)
    action = act(state, obs, jax.random.key(1))
    assert action.min() >= 0 and np.abs(action - 2 / 3).max() < 0.2 and np.abs(action - 2 / 3).mean() < 0.02
    action = linear_agent(rows, upper=1.0, num_samples=64, min_weight=0.0)[2](state, obs, jax.random.key(1))
    assert np.minimum(action, 1 - action).max() < 0.2
    # With one action Q has no say: it is the behaviour's own
    action = linear_agent(rows, upper=1.0, num_samples=1)[2](state, obs, jax.random.key(1))
    np.testing.assert_allclose([action.mean(), action.std()], [0.5, 12**-0.5], atol=0.05)


def test_the_first_phase_fits_the_model_by_its_likelihood():
    # P(a > 0) = 1/4: density 1/4 above 0 and 3/4 below, where the data have three actions and one.
    # Loss = -(3 log 1/4 + log 3/4) / 4. Its gradient in the logits is probabilities minus frequencies:
    # (3/4 - 1/4, 1/4 - 3/4)
    update, pretrain, _, state = linear_agent(ZERO, upper=0.25)
    batch = batch_of([0.0] * 4, jnp.array([0.1, 0.9, 0.5, -0.5]))
    after, info = pretrain(state, batch)
    np.testing.assert_allclose(info["behaviour_loss"], -(3 * np.log(0.25) + np.log(0.75)) / 4, rtol=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(gradient(after.behaviour))
    (bias,) = (g for path, g in leaves if "bias" in jax.tree_util.keystr(path))
    np.testing.assert_allclose(bias, [0.5, -0.5], rtol=1e-5)
    chex.assert_trees_all_equal((after.critic, after.target_critic), (state.critic, state.target_critic))
    chex.assert_trees_all_equal(update(state, batch)[0].behaviour, state.behaviour)  # fixed in the second phase
