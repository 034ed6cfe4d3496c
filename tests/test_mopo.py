"""MOPO against numbers worked out by hand. What it shares with MBPO is tested there; here, that it is shared."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mbpo
from test_mbpo import KEY, KNOWN, rows

from algos import mbpo, mopo
from common.environments import Spec

LINEAR = mopo.Config(**dataclasses.asdict(dataclasses.replace(test_mbpo.LINEAR, num_members=3, num_elites=2)))


def linear_state(cfg, spec=KNOWN, **options):
    return as_ours(test_mbpo.linear_state(cfg, spec, **options))


def as_ours(state):
    """MBPO's state, as MOPO's."""
    ours = {name: mopo.Trainable(*x) if hasattr(x, "params") else x for name, x in state._asdict().items()}
    report = state.report | {"mean_penalty": jnp.zeros(())}
    return mopo.State(**ours | {"buffer": mopo.Buffer(*state.buffer), "report": report})


def prepare(cfg, state, data, spec=KNOWN):
    return jax.jit(lambda state: mopo.make_agent(cfg, spec).prepare(state, data)[0])(state)


def test_uncertainty_is_the_largest_norm_of_all_members_deviations():
    # Deviations (1, 1, 1), (2, 0, 0) and (0, 0, 3): norms 1.732051, 2 and 3. In a second row the first member's tenfold
    deviation = jnp.array([[[1, 1, 1], [10, 10, 10]], [[2, 0, 0]] * 2, [[0, 0, 3]] * 2])
    np.testing.assert_allclose(mopo.uncertainty(2 * jnp.log(deviation)), [3, 17.320508], rtol=1e-6)
    np.testing.assert_allclose(mopo.uncertainty(2 * jnp.log(deviation[:2]))[0], 2)


def test_uncertainty_of_a_perfect_model_depends_on_the_bounds():
    # Three outputs at the lower bound of -10: sqrt(3) e^-5; equal members do not make it 0
    np.testing.assert_allclose(mopo.uncertainty(jnp.full((2, 1, 3), -10.0)), 3**0.5 * 0.006738, rtol=1e-4)


@pytest.mark.parametrize("reach, terminal", [(9.0, 0.0), (0.5, 1.0)])
def test_an_imagined_reward_is_reduced_by_its_own_rows_uncertainty(reach, terminal):
    # Raw log-variances a s and b s + c, far within the bounds of +-60, of members 0, 1, 2; the mean reward is 5 and the
    # observation rises by 1. Member 2 is no elite and the least certain: in state s its deviations are both e^(s / 2)
    cfg = dataclasses.replace(LINEAR, penalty=0.25)
    spec = Spec(1, 1, terminal_of=lambda next_obs: next_obs[..., 0] > reach)
    bias = np.array([[1, 5, -1e3, -1e3]] * 2 + [[1, 5, 0, 0]], np.float64)
    state = linear_state(cfg, spec, bias=bias)
    kernel = {"params": {**state.snapshot["params"]}}
    kernel = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[2, 0, 2:].set(1.0) if path[-1].key == "kernel" else x, kernel
    )
    kernel["params"]["max_log_var"] = -kernel["params"]["min_log_var"]
    state = state._replace(snapshot=kernel, error=jnp.array([0.1, 0.2, 0.3]))
    start = np.array([-1.0, 0.0, 1.0, 2.0] * 5)
    state = prepare(cfg, state, rows(start), spec)
    filled = int(state.buffer.size)
    obs = np.asarray(state.buffer.rows.obs[:filled, 0])
    expect = 0.25 * np.sqrt(2) * np.exp(obs / 2)  # of s, not of s'
    np.testing.assert_allclose(state.buffer.rows.reward[:filled], 5 - expect, rtol=1e-4)
    np.testing.assert_allclose(state.report["mean_penalty"], expect.mean(), rtol=1e-4)
    ends = np.asarray(state.buffer.rows.terminal[:filled])
    assert ends.max() == terminal  # a terminal row is reduced as well


def test_with_lambda_0_it_is_mbpo_bit_for_bit():
    changes = dict(hidden=(8,), model_hidden=(8,), real_ratio=0.5)
    ours = dataclasses.replace(LINEAR, **changes, penalty=0.0)
    theirs = mbpo.Config(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(mbpo.Config)})
    rng = np.random.default_rng(0)
    data = rows(*rng.normal(size=(4, 40)), terminal=np.arange(40) % 5 == 0)
    state = jax.jit(mbpo.make_agent(theirs, KNOWN).init)(KEY)
    chex.assert_trees_all_equal(
        as_ours(state)._replace(key=None), jax.jit(mopo.make_agent(ours, KNOWN).init)(KEY)._replace(key=None)
    )
    with_0, without = as_ours(state), state
    for phase in ("pretrain", "update"):
        with_0, _ = jax.jit(mopo.make_train(ours, mopo.make_agent(ours, KNOWN), phase))(with_0, data)
        without, _ = jax.jit(mbpo.make_train(theirs, mbpo.make_agent(theirs, KNOWN), phase))(without, data)
    for name in set(mbpo.State._fields) - {"key", "report"}:
        same = jax.tree.leaves(getattr(with_0, name)), jax.tree.leaves(getattr(without, name))
        chex.assert_trees_all_equal(*same)


def test_rows_of_the_data_are_not_reduced():
    cfg = dataclasses.replace(LINEAR, real_ratio=1.0, penalty=100.0, batch_size=32)
    state = prepare(cfg, linear_state(cfg, bias=[0.0, 5.0, 0.0, 0.0]), rows(np.ones(20), reward=3.0))
    assert (
        state.report["mean_penalty"] > 50
        and (mopo.mix(KEY, rows(np.ones(20), reward=3.0), state, cfg).reward == 3).all()
    )
