"""DQN against numbers worked out by hand. With hidden=() the critic is linear, on one-hot states a table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import dqn
from common.datasets import Transition
from common.environments import Spec

LINEAR = dqn.Config(hidden=(), learning_rate=0.0, discount=0.9)

# Two states: s0: a0 -> s0, reward 0; a1 -> s1, reward 1. s1: a0 -> s0, reward 2; a1 -> s1, reward 0. Nothing ends.
STATE, ACTION, REWARD, NEXT = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 0], [0, 1, 0, 1]])
SEEN = (STATE == 1) | (ACTION == 0)  # all but (s0, a1)


def two_states(rows=slice(None)):
    n = len(STATE[rows])
    obs, next_obs = jnp.eye(2)[STATE[rows]], jnp.eye(2)[NEXT[rows]]
    return Transition(obs, jnp.array(ACTION[rows]), jnp.float32(REWARD[rows]), next_obs, jnp.zeros(n))


def fill(params, kernel, bias=0.0):
    """A linear network with this kernel (inputs, outputs) and these biases."""

    def leaf(path, x):
        return jnp.broadcast_to(jnp.float32(kernel if "kernel" in jax.tree_util.keystr(path) else bias), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, params)


def kernel(params):
    (x,) = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path)]
    return x


def with_critics(state, q, target_q):
    """Q(s, .) = q and Qbar(s, .) = target_q in every state."""
    critic = state.critic._replace(params=fill(state.critic.params, 0.0, q))
    return state._replace(critic=critic, target_critic=fill(state.target_critic, 0.0, target_q))


def one_step(action, terminal):
    return Transition(jnp.ones((1, 1)), jnp.array([action]), jnp.ones(1), jnp.ones((1, 1)), jnp.array([terminal]))


def updated(cfg, action, terminal=0.0, q=(1.0, 2.0, 3.0), target_q=(10.0, 20.0, 5.0)):
    """One update on one transition with reward 1, whose next state has these Q and Qbar."""
    agent = dqn.make_agent(cfg, Spec(1, 3, True))
    state = with_critics(jax.jit(agent.init)(jax.random.key(0)), jnp.array(q), jnp.array(target_q))
    return jax.jit(agent.update)(state, one_step(action, terminal))


@pytest.mark.parametrize(
    "double, terminal, target",
    [
        (False, 0.0, 19.0),  # 1 + 0.9 max(10, 20, 5)
        (True, 0.0, 5.5),  # the online critic chooses a2: 1 + 0.9 * 5
        (False, 1.0, 1.0),
        (True, 1.0, 1.0),
    ],
)
def test_target(double, terminal, target):
    # Q(s, a0) = 1, and the Huber loss is |error| - 1/2 where the error is at least 1, and 0 where it is 0
    _, info = updated(dataclasses.replace(LINEAR, double=double), 0, terminal)
    np.testing.assert_allclose(info["critic_loss"], max(target - 1 - 0.5, 0), rtol=1e-6)
    np.testing.assert_allclose(info["q"], 1.0)


@pytest.mark.parametrize("q, gradient, loss", [(0.25, -0.75, 0.28125), (1.5, 0.5, 0.125), (9.0, 1.0, 7.5)])
def test_huber_loss_has_the_error_within_one_as_its_gradient(q, gradient, loss):
    # y = 1 at a terminal. Error Q - y = -0.75, 0.5: loss error^2 / 2, gradient the error. Error 8: 8 - 1/2, gradient 1.
    state, info = updated(LINEAR, 0, terminal=1.0, q=(q, 0.0, 0.0))
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-6)
    bias = state.critic.opt_state[0].mu["params"]["Dense_0"]["linear"]["bias"] / 0.1  # Adam: mu = (1 - b1) gradient
    np.testing.assert_allclose(bias, [gradient, 0, 0], rtol=1e-5)  # of the other actions none


def test_an_action_that_is_never_taken_drives_q_to_infinity():
    # Q = w times a feature, which is 1 for the data's action and 2 for one that is never taken; reward 1, one state.
    # y = 1 + 0.9 max(w, 2 w), so w_n = 1 + 1.8 w_(n-1) = (1.8^n - 1) / 0.8 and w_10 = 445.058.
    # Over the data's action alone it would be 1 + 0.9 w, which ends at 10.
    agent = dqn.make_agent(LINEAR, Spec(1, 2, True))
    state, update = jax.jit(agent.init)(jax.random.key(0)), jax.jit(agent.update)
    w = 0.0
    for _ in range(10):
        q = jnp.array([w, 2 * w])
        _, info = update(with_critics(state, q, q), one_step(0, 0.0))
        w += float(info["critic_loss"]) + 0.5  # the error y - Q, which is at least 1 all the time
    np.testing.assert_allclose(w, 445.058, rtol=1e-5)


def train_table(cfg, data, q):
    """Q after training from the table `q` on all rows of `data`: biases are held at 0, so that states share nothing."""
    agent = dqn.make_agent(cfg, Spec(2, 2, True))

    def step(state, _):
        state, _ = agent.update(state, data)
        clear = lambda params: fill(params, kernel(params))  # noqa: E731
        critic = state.critic._replace(params=clear(state.critic.params))
        return state._replace(critic=critic, target_critic=clear(state.target_critic)), None

    def train(key):
        state = agent.init(key)
        critic = state.critic._replace(params=fill(state.critic.params, q))
        return jax.lax.scan(step, state._replace(critic=critic, target_critic=critic.params), length=4000)[0]

    return kernel(jax.jit(train)(jax.random.key(0)).critic.params)


TABLE = dqn.Config(hidden=(), learning_rate=0.03, discount=0.9, tau=0.5)


@pytest.mark.parametrize("double", [False, True])
def test_with_all_actions_in_the_data_q_is_the_optimal_one(optimised, double):
    # V*(s0) = 1 + 0.9 V*(s1) and V*(s1) = 2 + 0.9 V*(s0): V* = (2.8, 2.9) / 0.19 = (14.7368, 15.2632)
    q = train_table(dataclasses.replace(TABLE, double=double), two_states(), jnp.zeros((2, 2)))
    np.testing.assert_allclose(q, [[13.2632, 14.7368], [15.2632, 13.7368]], rtol=1e-3)


def test_an_action_outside_the_data_keeps_its_initial_q_and_the_others_bootstrap_from_it(optimised):
    # (s0, a1) is not in the data and starts at 20: Q(s0, a0) = 0.9 * 20, Q(s1, a0) = 2 + 0.9 * 20,
    # Q(s1, a1) = 0.9 max(20, 18). What the data allow is 0, 2 and 1.8 (tests/test_bcq_discrete.py).
    q = train_table(TABLE, two_states(SEEN), jnp.array([[0.0, 20.0], [0.0, 0.0]]))
    np.testing.assert_allclose(q, [[18, 20], [20, 18]], rtol=1e-3)


def test_continuous_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="discrete actions"):
        dqn.make_agent(dqn.Config(), Spec(3, 2))
