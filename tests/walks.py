"""Small tasks whose values for each goal are known, and tables in place of networks: for tests of files with goals.

States are one-hot vectors. An episode of T + 1 states makes T rows, so that its last state begins none.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common.datasets import Transition
from common.environments import Spec

C5 = [[0, 1, 2, 3, 4, 5]]  # a chain of the rows 0 .. 4, one episode
STITCH = [[0, 1, 2, 3], [2, 3, 4, 5]]  # no episode has both 0 and 4


def rows(episodes, actions=None, size=6):
    """A Transition of `episodes` (lists of states). Rewards and terminals are NaN: data for goals have none."""
    state = np.concatenate([np.array(x[:-1]) for x in episodes])
    next_state = np.concatenate([np.array(x[1:]) for x in episodes])
    end = np.repeat(np.cumsum([len(x) - 1 for x in episodes]) - 1, [len(x) - 1 for x in episodes])
    nan = jnp.full(len(state), jnp.nan)
    action = jnp.zeros(len(state), int) if actions is None else jnp.array(actions)
    return Transition(one_hot(state, size), action, nan, one_hot(next_state, size), nan, end=jnp.array(end))


def one_hot(state, size=6):
    return jax.nn.one_hot(jnp.array(state), size)


def state_of(obs):
    return np.asarray(obs).argmax(axis=-1)


def spec(size=6, actions=2):
    return Spec(size, actions, discrete=True, goal_dim=size)


class Table(nn.Module):
    """A number for each combination of the one-hot inputs, in the place of GoalValue."""

    num_members: int = 2
    hidden: tuple = ()

    @nn.compact
    def __call__(self, *inputs):
        axes = "xyz"[: len(inputs)]
        table = self.param("table", nn.initializers.zeros, (self.num_members, *(x.shape[-1] for x in inputs)))
        return jnp.einsum(f"k{axes}," + ",".join(f"...{axis}" for axis in axes) + "->k...", table, *inputs)


def table(values):
    """The parameters of a Table."""
    return {"params": {"table": jnp.array(values, jnp.float32)}}


def settle(algo, cfg, spec, batch, steps=1500, rates=(0.05, 0.005, 0.0005), key=0):
    """(agent, state, metrics) after many updates on one batch, with ever smaller steps: nothing is left to chance."""
    state = None
    for rate in rates:
        agent = algo.make_agent(dataclasses.replace(cfg, learning_rate=rate), spec)
        state = jax.jit(agent.init)(jax.random.key(key)) if state is None else state
        many = jax.jit(lambda s, a=agent: jax.lax.scan(lambda s, _: a.update(s, batch), s, length=steps))
        state, metrics = many(state)
    return agent, state, jax.tree.map(lambda x: x[-1], metrics)


def train(algo, cfg, spec, data, updates, key=0):
    """(agent, state) after `updates` of the training loop."""
    cfg = dataclasses.replace(cfg, num_updates=updates, log_interval=updates)
    agent = algo.make_agent(cfg, spec)
    state = jax.jit(agent.init)(jax.random.key(key))
    return agent, jax.jit(algo.make_train(cfg, agent))(state, data)[0]


def frequencies(draws, size):
    return np.bincount(np.asarray(draws).ravel(), minlength=size) / np.size(draws)


def differ(a, b):
    """Whether any array of two trees differs."""
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
