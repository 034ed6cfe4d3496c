"""TD3 against numbers worked out by hand, and against TD3+BC. With hidden=() every network is linear."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from algos import td3, td3_bc
from common.datasets import Transition
from common.environments import Spec

LINEAR = td3.Config(hidden=(), policy_delay=1, learning_rate=0.0, policy_noise=0.0)  # networks that stand still
SMALL = dict(hidden=(8, 8), learning_rate=3e-3, tau=0.1)
N = 2**14  # rows of a batch


@functools.partial(jax.jit, static_argnames="cfg")
def update(cfg, floats, state, batch):
    """One update with two observations and one action, compiled once for all values of the `floats` of its Config."""
    return td3.make_agent(dataclasses.replace(cfg, **floats), Spec(2, 1)).update(state, batch)


def fill(tree, kernel, bias=0.0):
    """Linear networks with this kernel (inputs,) for one output, or (2, inputs) for two critics."""

    def leaf(path, x):
        new = np.array(kernel, np.float32)[..., None] if path[-1].key == "kernel" else np.float32(bias)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(critic=(0, 0, 0), target_critic=(0, 0, 0), target_action=0.0):
    """The policy's action is 0, the target policy's `target_action`; critics: weights of (obs, obs, action)."""
    shapes = jax.eval_shape(td3.make_agent(LINEAR, Spec(2, 1)).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    return state._replace(
        key=jax.random.key(0),
        critic=state.critic._replace(params=fill(state.critic.params, critic)),
        target_actor=fill(state.target_actor, (0, 0), np.arctanh(np.clip(target_action, 0, 1 - 1e-7))),
        target_critic=fill(state.target_critic, target_critic),
    )


def batch_of(obs=(0, 0), action=0, reward=0, next_obs=(0, 0), terminal=0):
    """Each column, of one row or of some, is repeated to N rows."""
    rows = lambda x, *shape: jnp.resize(jnp.float32(x), (N, *shape))  # noqa: E731
    return Transition(rows(obs, 2), rows(action, 1), rows(reward), rows(next_obs, 2), rows(terminal))


def bias_gradient(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable.opt_state[0].mu)  # after one update of Adam, (1 - b1) g
    (mu,) = [x for path, x in leaves if path[-1].key == "bias"]
    return mu.squeeze(axis=-1) / 0.1


def test_actor_climbs_the_first_critic():
    # Q_1 = 3 s + 2 a, pi = tanh(b), b = 0: L = -mean Q_1 = -3 mean(s) = -4.5 and dL/db = -dQ_1/da = -2, whatever the
    # size of Q and the data's action. The second critic, 7 a, has no say.
    state = linear_state(critic=[(3, 0, 2), (0, 0, 7)])
    after, info = update(LINEAR, {}, state, batch_of(obs=[(1, 0), (2, 0)], action=0.9))
    np.testing.assert_allclose(info["actor_loss"], -4.5, rtol=1e-5)
    np.testing.assert_allclose(bias_gradient(after.actor), -2.0, rtol=1e-5)


def test_target_is_the_smaller_critic_at_the_target_actors_action():
    # target action 1; target critics 2 s' + 3 a' and 2 s' + a'; s' = 0.5: min(1 + 3, 1 + 1) = 2.
    # y = 1 + 0.99 * 2 = 2.98 where the episode goes on, 1 at a terminal. Q = 0: loss = 2 critics * mean(y^2).
    state = linear_state(target_critic=[(2, 0, 3), (2, 0, 1)], target_action=1)
    _, info = update(LINEAR, {}, state, batch_of(reward=1, next_obs=(0.5, 0), terminal=(0, 1)))
    np.testing.assert_allclose(info["critic_loss"], 2 * (2.98**2 + 1) / 2, rtol=1e-4)


def test_the_smaller_of_two_noisy_critics_is_too_small():
    # Two independent N(0, 1) errors, here of a target critic that reads s'_1 and of one that reads s'_2:
    # E[min] = -1 / sqrt(pi) = -0.5642. Q = 0 and y = 0.99 min: the gradient of a critic's bias is -2 E[y].
    state = linear_state(target_critic=[(1, 0, 0), (0, 1, 0)])
    batch = batch_of()._replace(next_obs=jax.random.normal(jax.random.key(2), (N, 2)))
    after, _ = update(LINEAR, {}, state, batch)
    error = 4 * 0.83 / np.sqrt(N)  # four standard errors of the mean of min
    np.testing.assert_allclose(bias_gradient(after.critic) / (2 * 0.99), 2 * [0.5642], atol=error)


def test_noise_on_the_target_is_clipped_and_so_is_the_action():
    # Q'(s', a') = a', y = 0.99 a'. Noise of standard deviation 1000 clipped at 0.5, round 0: a' = +-0.5.
    # Round 1: a' = 0.5 or, clipped to the action's bound, 1, each in half of the rows.
    noise = {"policy_noise": 1000.0}
    _, info = update(LINEAR, noise, linear_state(target_critic=(0, 0, 1)), batch_of())
    np.testing.assert_allclose(info["critic_loss"], 2 * (0.99 * 0.5) ** 2, rtol=1e-2)
    _, info = update(LINEAR, noise, linear_state(target_critic=(0, 0, 1), target_action=1), batch_of())
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.99**2 * (0.25 + 1) / 2, rtol=0.03)


@pytest.mark.parametrize("target_action, tenth", [(1.0, 445.058), (0.5, 6.513)], ids=["policy", "data"])
def test_an_action_that_is_not_in_the_data_makes_values_grow_for_ever(target_action, tenth):
    # One state, Q = w a, reward 1, discount 0.9; the data hold the action 0.5, whose value is x = 0.5 w. The policy's
    # action is 1, of value 2 x, which no data correct. Fitted Q-iteration: x <- y = 1 + 0.9 * 2 x, from 0:
    # x_n = (1.8^n - 1) / 0.8, x_10 = 445.058. With the data's action in its place, x_n = 10 (1 - 0.9^n), x_10 = 6.513.
    x = 0.0
    for _ in range(10):
        state = linear_state(target_critic=(0, 0, 2 * x), target_action=target_action)
        _, info = update(LINEAR, {"discount": 0.9}, state, batch_of(action=0.5, reward=1))
        x = float(np.sqrt(info["critic_loss"] / 2))  # Q = 0: the loss of the two critics is 2 y^2
    np.testing.assert_allclose(x, tenth, rtol=1e-3)


def test_each_dimension_of_the_action_has_its_own_noise():
    # Q' = a'_1 - a'_2 and each is +-0.5: 0 in half of the rows and +-1 in the others. Of one noise for both, 0.
    cfg = dataclasses.replace(LINEAR, policy_noise=1000.0)
    agent = td3.make_agent(cfg, Spec(1, 2))
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    state = state._replace(key=jax.random.key(0), target_critic=fill(state.target_critic, (0, 1, -1)))
    rows = lambda *shape: jnp.zeros((N, *shape))  # noqa: E731
    _, info = jax.jit(agent.update)(state, Transition(rows(1), rows(2), rows(), rows(1), rows()))
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.99**2 * 0.5, rtol=0.05)


def test_what_it_believes_is_the_smaller_critic():
    state = linear_state(critic=[(0, 0, 1), (0, 0, 2)])
    np.testing.assert_allclose(td3.make_agent(LINEAR, Spec(2, 1)).q(state, jnp.zeros((1, 2)), jnp.ones((1, 1))), [1])


def random_batch(n=16):
    k = jax.random.split(jax.random.key(1), 4)
    action, terminal = jax.random.uniform(k[1], (n, 1), minval=-1), (jnp.arange(n) % 4 == 1).astype(jnp.float32)
    reward, next_obs = jax.random.normal(k[2], (n,)), jax.random.normal(k[3], (n, 2))
    return Transition(jax.random.normal(k[0], (n, 2)), action, reward, next_obs, terminal)


@functools.cache
def six_states():
    """The start and six updates of tiny networks, with the metrics of each."""
    cfg = td3.Config(**SMALL)
    agent = td3.make_agent(cfg, Spec(2, 1))
    states, infos, turns = [jax.jit(agent.init)(jax.random.key(0))], [], [jax.jit(turn) for turn in agent.cycle]
    for i in range(6):
        state, info = turns[i % 2](states[-1], random_batch())
        states.append(state)
        infos.append(info)
    return states, infos


def test_is_td3_bc_without_its_cloning():
    """Whole updates of the two files from the same state, with the same noise, to the actor's first.

    A large alpha makes cloning vanish beside Q: TD3+BC's gradient of the actor is TD3's times alpha / mean|Q_1|.
    """
    (start, _, ours, *_), _ = six_states()
    theirs = td3_bc.State(*(td3_bc.Trainable(*x) if isinstance(x, td3.Trainable) else x for x in start))
    for their_update in td3_bc.make_agent(td3_bc.Config(**SMALL, alpha=1e6), Spec(2, 1)).cycle:
        theirs, _ = jax.jit(their_update)(theirs, random_batch())
    assert ours.key == theirs.key
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        chex.assert_trees_all_close(getattr(x, "params", x), getattr(y, "params", y), atol=5e-5)  # eps of Adam
    ours, theirs = (ravel_pytree(state.actor.opt_state[0].mu)[0] for state in (ours, theirs))
    ours_norm, theirs_norm = jnp.linalg.norm(ours), jnp.linalg.norm(theirs)
    assert theirs_norm > 1e4 * ours_norm
    np.testing.assert_allclose(ours / ours_norm, theirs / theirs_norm, atol=1e-4)


def test_actor_and_targets_wait_for_every_second_update():
    states, infos = six_states()
    for name in ("actor", "target_actor", "target_critic", "critic"):
        first = [jax.tree.leaves(getattr(state, name))[0] for state in states]
        moved = [not np.array_equal(*pair) for pair in zip(first, first[1:], strict=False)]
        assert moved == ([True] * 6 if name == "critic" else [False, True] * 3), name
    assert ["actor_loss" in info for info in infos] == [False, True] * 3


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="TD3 needs continuous actions"):
        td3.make_agent(td3.Config(), Spec(3, 4, discrete=True))
