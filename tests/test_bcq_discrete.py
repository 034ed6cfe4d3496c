"""Discrete BCQ against numbers worked out by hand. With hidden=() its networks are linear, on one-hot states tables."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, bcq_discrete, dqn
from common.datasets import Transition
from common.environments import Spec

LOGITS = np.log([6.0, 3.0, 1.0])  # of G = (0.6, 0.3, 0.1)

# Two states: s0: a0 -> s0, reward 0; a1 -> s1, reward 1. s1: a0 -> s0, reward 2; a1 -> s1, reward 0. Nothing ends.
STATE, ACTION, REWARD, NEXT = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 2, 0], [0, 1, 0, 1]])
SEEN = (STATE == 1) | (ACTION == 0)  # all but (s0, a1)


def fill(params, kernel, bias=0.0):
    """A linear network with this kernel (inputs, outputs) and these biases."""

    def leaf(path, x):
        return jnp.broadcast_to(jnp.float32(kernel if "kernel" in jax.tree_util.keystr(path) else bias), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, params)


def kernel(params):
    (x,) = [x for path, x in jax.tree_util.tree_leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path)]
    return x


def updated(thresholds, logits=LOGITS, q=(1.0, 2.0, 3.0), target_q=(10.0, 20.0, 5.0), action=2, **changes):
    """For each threshold one update on one transition, reward 1: (metrics, the action chosen before it)."""
    batch = Transition(jnp.ones((1, 1)), jnp.array([action]), jnp.ones(1), jnp.ones((1, 1)), jnp.zeros(1))

    @jax.jit
    @jax.vmap
    def one(threshold):
        cfg = bcq_discrete.Config(hidden=(), discount=0.9, threshold=threshold, **changes)
        agent = bcq_discrete.make_agent(cfg, Spec(1, 3, True))
        state = agent.init(jax.random.key(0))
        state = state._replace(
            actor=state.actor._replace(params=fill(state.actor.params, 0.0, logits)),
            critic=state.critic._replace(params=fill(state.critic.params, 0.0, jnp.array(q))),
            target_critic=fill(state.target_critic, 0.0, jnp.array(target_q)),
        )
        return agent.update(state, batch)[1], agent.act(state, batch.obs, jax.random.key(1))[0]

    return one(jnp.float32(thresholds))


def test_target_and_policy_take_the_best_of_the_likely_actions():
    # G / max G = (1, 0.5, 0.167): threshold 0.3 allows a0 and a1, of which a1 has the larger Q: y = 1 + 0.9 * 20.
    # 0.4 does too. 0 allows a2: y = 1 + 0.9 * 5. 0.9 and 1 leave a0 alone: y = 1 + 0.9 * 10.
    # Q(s, a2) = 3, Huber: y - 3.5. The step is large: G of after it would allow only a2 at 0.3.
    info, action = updated([0.3, 0.4, 0.0, 0.9, 1.0], learning_rate=10.0)
    np.testing.assert_allclose(info["critic_loss"] + 3.5, [19.0, 19.0, 5.5, 10.0, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(action, [1, 1, 2, 0, 0])


def test_absolute_threshold_is_one_of_the_probability_and_falls_back_to_the_likeliest_action():
    # G >= 0.05: all; >= 0.25: a0 and a1; >= 0.35: a0; >= 0.7: none, and so a0
    info, action = updated([0.05, 0.25, 0.35, 0.7], absolute=True, learning_rate=10.0)
    np.testing.assert_allclose(info["critic_loss"] + 3.5, [5.5, 19.0, 10.0, 10.0], rtol=1e-6)
    np.testing.assert_array_equal(action, [2, 1, 0, 0])
    _, action = updated([0.05, 0.7], logits=np.roll(LOGITS, 1), q=(3.0, 2.0, 1.0), absolute=True)  # G = (0.1, 0.6, 0.3)
    np.testing.assert_array_equal(action, [0, 1])


def test_a_threshold_above_one_leaves_the_likeliest_action():
    # G = (0.1, 0.6, 0.3): without any action left, argmax would take the first one
    info, action = updated([1.5, 100.0], logits=np.roll(LOGITS, 1), learning_rate=10.0)
    np.testing.assert_allclose(info["critic_loss"] + 3.5, [19.0, 19.0], rtol=1e-6)
    np.testing.assert_array_equal(action, [1, 1])


def test_an_unlikely_action_is_not_taken_where_all_others_have_a_negative_q():
    # multiplied by a mask of 0 and 1, its Q would be 0 and the largest
    info, action = updated([0.3], q=(-5.0, -1.0, 9.0), action=0, target_q=(-10.0, -20.0, 5.0))
    assert action == 1
    np.testing.assert_allclose(info["critic_loss"], 11.5, rtol=1e-6)  # y = 1 - 0.9 * 20, Q = -5


def test_what_is_likely_does_not_depend_on_the_level_of_the_logits():
    key = jax.random.key(0)
    logits = 3 * jax.random.normal(key, (64, 5))
    a, b = (bcq_discrete.likely(jax.nn.softmax(x), 0.3, absolute=False) for x in (logits, logits + 4))
    np.testing.assert_array_equal(a, b)
    assert a.any(axis=-1).all() and not a.all(axis=-1).any()


def test_loss_of_the_clone():
    # -log G(a1) = -log 0.3, and the mean over the actions of the squared logits log 6, log 3 and 0
    info, _ = updated([0.3], action=1, logit_penalty=0.5)
    np.testing.assert_allclose(info["log_prob"], [np.log(0.3)], rtol=1e-5)
    np.testing.assert_allclose(info["actor_loss"], [-np.log(0.3) + 0.5 * (LOGITS**2).mean()], rtol=1e-5)


def random_batch(n=8):
    k = jax.random.split(jax.random.key(1), 5)
    terminal = jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    obs, next_obs = (jax.random.normal(k[i], (n, 3)) for i in (0, 3))
    return Transition(obs, jax.random.randint(k[1], (n,), 0, 4), jax.random.normal(k[2], (n,)), next_obs, terminal)


def test_threshold_zero_is_double_dqn_bit_for_bit():
    after = []
    for algo, changes in ((bcq_discrete, {"threshold": 0.0}), (dqn, {"double": True})):
        agent = algo.make_agent(algo.Config(hidden=(8,), learning_rate=0.1, **changes), Spec(3, 4, True))
        state, update = jax.jit(agent.init)(jax.random.key(0)), jax.jit(agent.update)
        for _ in range(4):
            state, info = update(state, random_batch())
        after.append((*state.critic, state.target_critic, info["critic_loss"], info["q"]))
    chex.assert_trees_all_equal(*after)


def test_threshold_one_acts_as_the_clone_does():
    cfg = bcq_discrete.Config(hidden=(8,), threshold=1.0)
    agent = bcq_discrete.make_agent(cfg, Spec(3, 4, True))
    state, obs = jax.jit(agent.init)(jax.random.key(0)), jax.random.normal(jax.random.key(1), (64, 3))
    clone = bcq_discrete.CategoricalActor(4, (8,)).apply(state.actor.params, obs)
    np.testing.assert_array_equal(agent.act(state, obs, jax.random.key(2)), clone.mode())


def test_the_clone_is_behaviour_cloning_bit_for_bit_without_its_penalty():
    spec, batch = Spec(3, 4, True), random_batch()
    agents = [
        bc.make_agent(bc.Config(hidden=(8,)), spec),
        bcq_discrete.make_agent(bcq_discrete.Config(hidden=(8,), learning_rate=3e-4, logit_penalty=0.0), spec),
    ]
    cloned, state = (jax.jit(agent.init)(jax.random.key(0)) for agent in agents)
    states = [cloned, state._replace(actor=bcq_discrete.Trainable(*cloned.actor))]
    new = [tuple(jax.jit(agent.update)(s, batch)[0].actor) for agent, s in zip(agents, states, strict=True)]
    chex.assert_trees_all_equal(*new)


def train_tables(rows, initial):
    """For each initial Q(s0, a1): (Q, greedy actions) after training on `rows` of the two states, biases held at 0."""
    n = int(np.sum(rows))
    obs, next_obs = jnp.eye(2)[STATE[rows]], jnp.eye(2)[NEXT[rows]]
    data = Transition(obs, jnp.array(ACTION[rows]), jnp.float32(REWARD[rows]), next_obs, jnp.zeros(n))
    cfg = bcq_discrete.Config(hidden=(), learning_rate=0.03, discount=0.9, tau=0.5)
    agent = bcq_discrete.make_agent(cfg, Spec(2, 2, True))

    def clear(trainable):
        return trainable._replace(params=fill(trainable.params, kernel(trainable.params)))

    def step(state, _):
        state, _ = agent.update(state, data)
        target_critic = fill(state.target_critic, kernel(state.target_critic))
        state = state._replace(actor=clear(state.actor), critic=clear(state.critic), target_critic=target_critic)
        return state, None

    def train(initial):
        state = clear_all(agent.init(jax.random.key(0)), jnp.array([[0.0, 1.0], [0.0, 0.0]]) * initial)
        state, _ = jax.lax.scan(step, state, length=5000)
        return kernel(state.critic.params), agent.act(state, jnp.eye(2), jax.random.key(0))

    def clear_all(state, q):
        critic = state.critic._replace(params=fill(state.critic.params, q))
        return state._replace(actor=clear(state.actor), critic=critic, target_critic=critic.params)

    return jax.jit(jax.vmap(train))(jnp.float32(initial))


def test_with_all_actions_in_the_data_q_is_the_optimal_one(optimised):
    q, greedy = train_tables(STATE >= 0, [0.0])
    np.testing.assert_allclose(q[0], [[13.2632, 14.7368], [15.2632, 13.7368]], rtol=1e-3)  # tests/test_dqn.py
    np.testing.assert_array_equal(greedy[0], [1, 0])


def test_an_action_outside_the_data_changes_nothing_whatever_its_initial_q(optimised):
    # Without (s0, a1) nothing leaves s0: Q(s0, a0) = 0, Q(s1, a0) = 2 + 0.9 * 0, Q(s1, a1) = 0.9 * 2, and a0 is best.
    # Naive DQN ends at 18, 20 and 18 for an initial 20 (tests/test_dqn.py).
    q, greedy = train_tables(SEEN, [-20.0, 20.0, 100.0])
    np.testing.assert_array_equal(q[:, 0, 1], [-20, 20, 100])
    np.testing.assert_allclose(q[:, [0, 1, 1], [0, 0, 1]], [[0, 2, 1.8]] * 3, atol=5e-3)
    np.testing.assert_array_equal(greedy, [[0, 0]] * 3)


def test_continuous_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="discrete actions"):
        bcq_discrete.make_agent(bcq_discrete.Config(), Spec(3, 2))
