"""TD3+BC against numbers worked out by hand. With hidden=() every network is linear, so that they can be."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import td3_bc
from common.datasets import Transition
from common.environments import Spec

LINEAR = td3_bc.Config(hidden=(), policy_noise=0.0, policy_delay=1)


def fill(tree, kernel, bias=0.0):
    """Linear networks with this kernel (inputs,) for one output, the same for every member of an ensemble."""

    def leaf(path, x):
        new = jnp.array(kernel, jnp.float32)[:, None] if "kernel" in jax.tree_util.keystr(path) else jnp.float32(bias)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(cfg, actor=(0.0, 0.0), critic=(0.0, 0.0), target_actor=None, target_critic=None):
    """One observation, one action. `actor`: weight and bias before the tanh; `critic`: weights of (obs, action)."""
    agent = td3_bc.make_agent(cfg, Spec(1, 1))
    state = jax.jit(agent.init)(jax.random.key(0))
    target_actor, target_critic = target_actor or actor, target_critic or critic
    return agent, state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, actor[:1], actor[1])),
        critic=state.critic._replace(params=fill(state.critic.params, critic)),
        target_actor=fill(state.target_actor, target_actor[:1], target_actor[1]),
        target_critic=fill(state.target_critic, target_critic),
    )


def batch_of(obs, action, reward=0.0, next_obs=0.0, terminal=0.0):
    n = len(obs)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    obs, action = jnp.array(obs)[:, None], jnp.broadcast_to(jnp.float32(action), (n,))[:, None]
    return Transition(obs, action, column(reward), column(next_obs)[:, None], column(terminal))


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


def test_scale_of_q_in_the_actors_loss():
    # Q = obs = (2, -4), policy and data at action 0: lambda = 2.5 / mean|Q| = 2.5 / 3, -lambda mean Q = 0.8333
    agent, state = linear_state(LINEAR, critic=(1.0, 0.0))
    _, info = jax.jit(agent.update)(state, batch_of([2.0, -4.0], 0.0, terminal=1.0, reward=jnp.array([2.0, -4.0])))
    np.testing.assert_allclose(info["actor_loss"], 2.5 / 3, rtol=1e-5)
    np.testing.assert_allclose(info["bc_loss"], 0.0, atol=1e-7)


def test_scale_of_q_is_not_differentiated():
    # Q = 3 + a at s = 3, pi = tanh(b), b = 0, data at 0: dL/db = -lambda dQ/da = -2.5 / 3. Differentiated as well,
    # lambda mean Q would be the constant 2.5 and its gradient 0.
    agent, state = linear_state(LINEAR, critic=(1.0, 1.0))
    batch = batch_of([3.0, 3.0], 0.0, reward=3.0, terminal=1.0)  # Q is right: the critic does not move
    after, _ = jax.jit(agent.update)(state, batch)
    (bias,) = [
        g for p, g in jax.tree_util.tree_leaves_with_path(gradient(after.actor)) if "bias" in jax.tree_util.keystr(p)
    ]
    np.testing.assert_allclose(bias, [-2.5 / 3], rtol=1e-5)


@pytest.mark.parametrize("scale", [7.0, 0.01])
def test_the_scale_of_q_does_not_matter_to_the_actor(scale):
    batch = batch_of([0.3, -2.0, 1.1], jnp.array([0.5, -0.2, 0.9]), terminal=1.0)
    cfg = dataclasses.replace(LINEAR, learning_rate=0.0)
    grads = []
    for c in (1.0, scale):
        agent, state = linear_state(cfg, actor=(0.4, 0.1), critic=(c * 0.7, c * 1.3))
        grads.append(gradient(jax.jit(agent.update)(state, batch)[0].actor))
    chex.assert_trees_all_close(*grads, rtol=1e-4)


def test_alpha_zero_is_behaviour_cloning():
    # d/db mean((tanh(b) - a)^2) at b = 0 is -2 mean(a) = -0.8
    agent, state = linear_state(dataclasses.replace(LINEAR, alpha=0.0), critic=(1.0, 5.0))
    after, info = jax.jit(agent.update)(state, batch_of([1.0, 1.0], jnp.array([0.2, 0.6])))
    assert all(np.allclose(g, -0.8, rtol=1e-5) for g in jax.tree.leaves(gradient(after.actor)))
    np.testing.assert_allclose(info["actor_loss"], (0.04 + 0.36) / 2, rtol=1e-5)


def test_only_the_first_critic_moves_the_actor():
    agent, state = linear_state(LINEAR, critic=(0.0, 1.0))
    second = jax.tree.map(lambda x: x.at[1].set(-5 * x[1]), state.critic.params)
    batch = batch_of([1.0, 2.0], 0.0)
    cfg = dataclasses.replace(LINEAR, learning_rate=0.0)
    agent, state = linear_state(cfg, actor=(0.2, 0.1), critic=(0.0, 1.0))
    one, _ = jax.jit(agent.update)(state, batch)
    two, _ = jax.jit(agent.update)(state._replace(critic=state.critic._replace(params=second)), batch)
    chex.assert_trees_all_equal(gradient(one.actor), gradient(two.actor))


def test_target_is_the_smaller_critic_at_the_target_actors_action():
    # target actor: tanh(9) = 1; target critics 2 s' + 3 a' and 2 s' + a'; s' = 0.5: min(1 + 3, 1 + 1) = 2.
    # y = 1 + 0.99 * 2 = 2.98 where the episode goes on, 1 at a terminal. Q = 0: loss = 2 critics * mean(y^2).
    agent, state = linear_state(LINEAR, target_actor=(0.0, 9.0), target_critic=(2.0, 3.0))
    smaller = jax.tree.map(lambda x: x.at[1, 1].set(1.0) if x.ndim == 3 else x, state.target_critic)
    batch = batch_of([0.0, 0.0], 0.0, reward=1.0, next_obs=0.5, terminal=jnp.array([0.0, 1.0]))
    _, info = jax.jit(agent.update)(state._replace(target_critic=smaller), batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (2.98**2 + 1) / 2, rtol=1e-4)


def test_noise_on_the_target_is_clipped_and_so_is_the_action():
    # Q'(s', a') = a', y = 0.99 a'. Noise of standard deviation 1000 clipped at 0.5, round 0: a' = +-0.5.
    # Round tanh(9) = 1: a' = 0.5 or, clipped to the action's bound, 1: y^2 lies between those of 0.5 and 1.
    cfg = dataclasses.replace(LINEAR, policy_noise=1000.0)
    batch = batch_of([0.0] * 512, 0.0)
    agent, state = linear_state(cfg, target_critic=(0.0, 1.0))
    _, info = jax.jit(agent.update)(state, batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (0.99 * 0.5) ** 2, rtol=1e-2)
    agent, state = linear_state(cfg, target_actor=(0.0, 9.0), target_critic=(0.0, 1.0))
    _, info = jax.jit(agent.update)(state, batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.99**2 * (0.25 + 1) / 2, rtol=0.1)


def test_the_actor_waits_for_every_second_update():
    agent = td3_bc.make_agent(td3_bc.Config(hidden=(8,)), Spec(1, 1))
    states = [jax.jit(agent.init)(jax.random.key(0))]
    batch = batch_of([0.3, -2.0, 1.1], jnp.array([0.5, -0.2, 0.9]), reward=1.0)
    infos = []
    for turn in agent.cycle * 2:
        state, info = jax.jit(turn)(states[-1], batch)
        states.append(state)
        infos.append(info)
    moved = [
        not np.array_equal(*(jax.tree.leaves(s.actor.params)[-1] for s in pair))
        for pair in zip(states, states[1:], strict=False)
    ]
    assert moved == [False, True, False, True]
    assert ["actor_loss" in info for info in infos] == [False, True, False, True]


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        td3_bc.make_agent(td3_bc.Config(), Spec(3, 4, discrete=True))
