"""IFQL against numbers worked out by hand. With hidden=() every network is linear. Its flow is FQL's: tests/test_fql.py
has the exact velocities of its sampler, and a test here that the two samplers are one text.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import fql, ifql, iql
from common.datasets import Transition
from common.environments import Spec
from common.networks import Velocity

SPEC = Spec(1, 2)
LINEAR = ifql.Config(hidden=(), learning_rate=0.0, flow_steps=2, num_samples=4)
N = 64  # rows of a batch


@functools.partial(jax.jit, static_argnames="cfg")
def update(cfg, floats, state, batch):
    """One update, compiled once for all values of the `floats` of its Config."""
    return ifql.make_agent(dataclasses.replace(cfg, **floats), SPEC).update(state, batch)


def put(tree, kernel=0.0, bias=0.0):
    """A linear network, or an ensemble of two, with these numbers, broadcast to (.., inputs, outputs)."""

    def leaf(path, x):
        new = kernel if path[-1].key == "kernel" else bias
        return jnp.broadcast_to(jnp.array(new, jnp.float32), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(actor=(), critic=(), target_critic=(), value=(), spec=SPEC):
    """Each network is 0 but for the (kernel, bias) given; inputs are [s, x, t], [s, a] and [s]."""
    shapes = jax.eval_shape(ifql.make_agent(LINEAR, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    networks = {}
    for name, numbers in {"actor": actor, "critic": critic, "value": value}.items():
        networks[name] = getattr(state, name)._replace(params=put(getattr(shapes, name).params, *numbers))
    target = put(shapes.target_critic, *target_critic)
    return state._replace(key=jax.random.key(0), target_critic=target, **networks)


def batch_of(obs=0, action=(0, 0), reward=0, next_obs=0, terminal=0):
    """Each column, of one row or of some, is repeated to N rows."""
    rows = lambda x, *shape: jnp.resize(jnp.float32(x), (N, *shape))  # noqa: E731
    return Transition(rows(obs, 1), rows(action, 2), rows(reward), rows(next_obs, 1), rows(terminal))


def test_values_are_iqls():
    # Target critics a_1 + 2 and a_1 - 0.5 at a_1 = 1: the smaller is 0.5. V(s) = s: differences -0.5 and 1.5 at s = 1
    # and -1, weights 0.1 and 0.9: L_V = (0.025 + 2.025) / 2. y = 2 + 0.99 * V(s' = 3) = 4.97, at a terminal 2. Q = 0:
    # summed over two critics.
    state = linear_state(target_critic=([[0.0], [1.0], [0.0]], [[2.0], [-0.5]]), value=(1.0,))
    batch = batch_of(obs=(1, -1), action=(1, 0), reward=2, next_obs=3, terminal=(0, 1))
    _, info = update(LINEAR, {"expectile": 0.9}, state, batch)
    np.testing.assert_allclose(info["value_loss"], 1.025, rtol=1e-5)
    np.testing.assert_allclose(info["critic_loss"], 2 * (4.97**2 + 2**2) / 2, rtol=1e-5)
    np.testing.assert_array_equal(
        ifql.expectile_loss(jnp.arange(-2.0, 3), 0.8), iql.expectile_loss(jnp.arange(-2.0, 3), 0.8)
    )


def test_actors_loss_by_hand(monkeypatch):
    # z0 = 0.4, t = 0.25, a = (1, -1): x_t = (0.55, 0.05), v = x_t + 2 t = (1.05, 0.55), a - z0 = (0.6, -1.4): errors
    # 0.45 and 1.95, the mean over both dimensions of their squares 2.0025
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args: jnp.full(shape, 0.4))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(), *args: jnp.full(shape, 0.25))
    state = linear_state(actor=([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]],))
    cfg = dataclasses.replace(LINEAR, flow_steps=3)  # of no other test: traced anew
    _, info = update(cfg, {"expectile": 0.9}, state, batch_of(action=(1, -1)))
    np.testing.assert_allclose(info["actor_loss"], 2.0025, rtol=1e-5)


def test_the_policys_training_never_reads_the_values():
    """100 times the rewards and other critics: the flow's parameters are the same to the last bit."""
    cfg = ifql.Config(hidden=(8,), flow_steps=2)
    init = jax.jit(ifql.make_agent(cfg, SPEC).init)
    state, other = init(jax.random.key(0)), init(jax.random.key(1))
    batch = batch_of(obs=np.linspace(-1, 1, 7), action=np.linspace(-1, 1, 10), reward=1)
    strange = state._replace(critic=other.critic, value=other.value, target_critic=other.target_critic)
    a, _ = update(cfg, {"expectile": 0.9}, state, batch)
    b, _ = update(cfg, {"expectile": 0.9}, strange, batch._replace(reward=100 * batch.reward))
    jax.tree.map(np.testing.assert_array_equal, a.actor, b.actor)


def samples_of(cfg, state, obs, key):
    """The N actions that act chooses from: the noise of its key, through two Euler steps of v = x / 2, clipped."""
    noise = jax.random.normal(key, (cfg.num_samples, *obs.shape[:-1], 2))
    return jnp.clip(noise * (1 + 0.5 / cfg.flow_steps) ** cfg.flow_steps, -1, 1)


def test_act_takes_the_sample_whose_smaller_critic_is_largest():
    # Critics a_1 + 0.2 and -a_1 + a_2: which is smaller changes from sample to sample; the targets would choose others
    kernel = [[[0.0], [1.0], [0.0]], [[0.0], [-1.0], [1.0]]]
    half = [[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.0]]
    state = linear_state(actor=(half,), critic=(kernel, [[0.2], [0.0]]), target_critic=([[0.0], [-1.0], [0.0]],))
    obs, key = jnp.zeros((5, 1)), jax.random.key(3)
    actions = np.asarray(samples_of(LINEAR, state, obs, key))
    q = np.minimum(actions[..., 0] + 0.2, actions[..., 1] - actions[..., 0])  # (4, 5)
    chosen = ifql.make_agent(LINEAR, SPEC).act(state, obs, key)
    np.testing.assert_allclose(chosen, actions[q.argmax(axis=0), np.arange(5)], rtol=1e-5)
    assert len(set(q.argmax(axis=0))) > 1  # each row has a best one of its own


def test_q_is_asked_of_the_actions_as_they_will_be_taken(monkeypatch):
    # Noises (3, -1) and (1, 1), v = 0, Q = a_1 + 0.1 a_2: 2.9 and 1.1. But (3, -1) becomes (1, -1), and has 0.9
    noise = jnp.array([[[3.0, -1.0]], [[1.0, 1.0]]])
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: noise)
    agent = ifql.make_agent(dataclasses.replace(LINEAR, num_samples=2), SPEC)
    state = linear_state(critic=([[0.0], [1.0], [0.1]],))
    np.testing.assert_allclose(agent.act(state, jnp.zeros((1, 1)), jax.random.key(0)), [[1.0, 1.0]])


def test_one_sample_is_the_flow_itself():
    """N = 1 is cloning: whatever Q says."""
    cfg = dataclasses.replace(LINEAR, num_samples=1)
    half = [[0.0, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.0]]
    obs, key = jnp.zeros((5, 1)), jax.random.key(3)
    for slope in (-1.0, 1.0):
        state = linear_state(actor=(half,), critic=(slope,))
        chosen = ifql.make_agent(cfg, SPEC).act(state, obs, key)
        np.testing.assert_allclose(chosen, samples_of(cfg, state, obs, key)[0], rtol=1e-5)


@pytest.mark.parametrize("samples, rare", [(1, 0.23563), (2, 0.41574), (8, 0.88347)])
def test_the_best_of_n_finds_a_rare_mode(samples, rare, monkeypatch):
    """Data of two modes, the better one with probability 1/4; ten exact steps have 1 - 0.76437 = 0.23563 there.

    P(better) = 1 - 0.76437^N. Q prefers -0.5: its slope is -1.
    """

    class ExactFlow(Velocity):
        def __call__(self, obs, x, t):
            return (0.5 * jnp.tanh(0.5 * (t * x / (1 - t) ** 2 + jnp.log(3.0))) - x) / (1 - t)

    monkeypatch.setattr(ifql, "Velocity", ExactFlow)
    spec, cfg = Spec(1, 1), dataclasses.replace(LINEAR, num_samples=samples, flow_steps=10)
    state = linear_state(critic=([[0.0], [-1.0]],), spec=spec)
    action = jax.jit(ifql.make_agent(cfg, spec).act)(state, jnp.zeros((20_000, 1)), jax.random.key(0))
    np.testing.assert_allclose(np.mean(action < 0), rare, atol=0.01)


def test_the_sampler_is_fqls():
    assert inspect.getsource(ifql.euler) == inspect.getsource(fql.euler)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="IFQL needs continuous actions"):
        ifql.make_agent(ifql.Config(), Spec(3, 4, discrete=True))
