"""DDPG against numbers worked out by hand, and against TD3. With hidden=() every network is linear."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import ddpg, td3
from common.datasets import Transition
from common.environments import Spec

LINEAR = ddpg.Config(hidden=(), learning_rate=0.0)  # networks that stand still
SMALL = dict(hidden=(8, 8), learning_rate=3e-3, tau=0.1)


@functools.partial(jax.jit, static_argnames="cfg")
def update(cfg, floats, state, batch):
    """One update with one observation and one action, compiled once for all values of the `floats` of its Config."""
    return ddpg.make_agent(dataclasses.replace(cfg, **floats), Spec(1, 1)).update(state, batch)


def fill(tree, kernel, bias=0.0):
    """Linear networks with this kernel (inputs,) for one output."""

    def leaf(path, x):
        new = np.array(kernel, np.float32)[..., None] if path[-1].key == "kernel" else np.float32(bias)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(critic=(0, 0), target_critic=(0, 0), target_action=0.0):
    """The policy's action is 0, the target policy's `target_action`; critics: weights of (obs, action)."""
    shapes = jax.eval_shape(ddpg.make_agent(LINEAR, Spec(1, 1)).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    return state._replace(
        key=jax.random.key(0),
        critic=state.critic._replace(params=fill(state.critic.params, critic)),
        target_actor=fill(state.target_actor, (0,), np.arctanh(np.clip(target_action, 0, 1 - 1e-7))),
        target_critic=fill(state.target_critic, target_critic),
    )


def batch_of(obs=0, action=0, reward=0, next_obs=0, terminal=0):
    """Two rows."""
    rows = lambda x, *shape: jnp.resize(jnp.float32(x), (2, *shape))  # noqa: E731
    return Transition(rows(obs, 1), rows(action, 1), rows(reward), rows(next_obs, 1), rows(terminal))


def bias_gradient(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable.opt_state[0].mu)  # after one update of Adam, (1 - b1) g
    (mu,) = [x for path, x in leaves if path[-1].key == "bias"]
    return mu.squeeze(axis=-1) / 0.1


def test_actor_climbs_the_critic():
    # Q = 3 s + 2 a, pi = tanh(b), b = 0: L = -mean Q = -3 mean(s) = -4.5 and dL/db = -dQ/da = -2, whatever the data's
    # action
    after, info = update(LINEAR, {}, linear_state(critic=(3, 2)), batch_of(obs=(1, 2), action=0.9))
    np.testing.assert_allclose(info["actor_loss"], -4.5, rtol=1e-5)
    np.testing.assert_allclose(bias_gradient(after.actor), -2.0, rtol=1e-5)


def test_target_is_the_target_critic_at_the_target_actors_action():
    # target action 1, target critic 2 s' + 3 a', s' = 0.5: 1 + 3 = 4. y = 1 + 0.99 * 4 = 4.96 where the episode goes
    # on, 1 at a terminal. Q = a = 0.5: loss = (4.46^2 + 0.5^2) / 2.
    state = linear_state(critic=(0, 1), target_critic=(2, 3), target_action=1)
    batch = batch_of(action=0.5, reward=1, next_obs=0.5, terminal=(0, 1))
    np.testing.assert_allclose(update(LINEAR, {}, state, batch)[1]["critic_loss"], (4.46**2 + 0.5**2) / 2, rtol=1e-4)


@pytest.mark.parametrize("target_action, tenth", [(1.0, 445.058), (0.5, 6.513)], ids=["policy", "data"])
def test_an_action_that_is_not_in_the_data_makes_values_grow_for_ever(target_action, tenth):
    # One state, Q = w a, reward 1, discount 0.9; the data hold the action 0.5, whose value is x = 0.5 w. The policy's
    # action is 1, of value 2 x, which no data correct. Fitted Q-iteration: x <- y = 1 + 0.9 * 2 x, from 0:
    # x_n = (1.8^n - 1) / 0.8, x_10 = 445.058. With the data's action in its place, x_n = 10 (1 - 0.9^n), x_10 = 6.513.
    x = 0.0
    for _ in range(10):
        state = linear_state(target_critic=(0, 2 * x), target_action=target_action)
        _, info = update(LINEAR, {"discount": 0.9}, state, batch_of(action=0.5, reward=1))
        x = float(np.sqrt(info["critic_loss"]))  # Q = 0: the loss is y^2
    np.testing.assert_allclose(x, tenth, rtol=1e-3)


def test_a_reward_that_repeats_itself_is_worth_its_geometric_sum():
    # One state and one action, the policy's own as well: y = 1 + 0.9 Q, so Q = 1 / (1 - 0.9) = 10; with every row
    # terminal, Q = 1. All of it learned by update, target network included.
    cfg = ddpg.Config(hidden=(), learning_rate=0.1, tau=0.5, discount=0.9)
    for terminal, value in ((0, 10), (1, 1)):
        state, batch = linear_state(), batch_of(reward=1, terminal=terminal)
        for _ in range(300):
            state, info = update(cfg, {}, state, batch)
        np.testing.assert_allclose(info["q"], value, rtol=1e-2)


def test_is_td3_with_one_critic_no_delay_and_no_noise():
    """Whole updates of the two files: TD3's two critics are the same, so that the smaller one is DDPG's."""
    k = jax.random.split(jax.random.key(1), 4)
    batch = Transition(
        obs=jax.random.normal(k[0], (16, 1)),
        action=jax.random.uniform(k[1], (16, 1), minval=-1),
        reward=jax.random.normal(k[2], (16,)),
        next_obs=jax.random.normal(k[3], (16, 1)),
        terminal=(jnp.arange(16) % 4 == 1).astype(jnp.float32),
    )
    cfg = ddpg.Config(**SMALL)
    ours = jax.jit(ddpg.make_agent(cfg, Spec(1, 1)).init)(jax.random.key(0))
    twice = lambda tree: jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, tree)  # noqa: E731
    theirs = td3.State(
        key=ours.key,
        actor=td3.Trainable(*ours.actor),
        critic=td3.Trainable(*twice(tuple(ours.critic))),
        target_actor=ours.target_actor,
        target_critic=twice(ours.target_critic),
    )
    their_agent = td3.make_agent(td3.Config(**SMALL, policy_noise=0.0, policy_delay=1), Spec(1, 1))
    their_update = jax.jit(their_agent.update)
    for _ in range(5):
        ours, our_info = update(cfg, {}, ours, batch)
        theirs, their_info = their_update(theirs, batch)
    np.testing.assert_allclose(our_info["actor_loss"], their_info["actor_loss"], rtol=1e-5)
    np.testing.assert_allclose(2 * our_info["critic_loss"], their_info["critic_loss"], rtol=1e-5)
    for name in ("actor", "critic", "target_actor", "target_critic"):
        x, y = (getattr(getattr(state, name), "params", getattr(state, name)) for state in (ours, theirs))
        x = twice(x) if "critic" in name else x
        chex.assert_trees_all_close(x, y, rtol=1e-5, atol=1e-6, custom_message=name)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="DDPG needs continuous actions"):
        ddpg.make_agent(ddpg.Config(), Spec(3, 4, discrete=True))
