"""MOReL against numbers worked out by hand. What it shares with MBPO is tested there; here, that it is shared."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mbpo
from test_mbpo import KEY, KNOWN, rows

from algos import mbpo, morel

TWO = dataclasses.replace(test_mbpo.LINEAR, num_members=2, num_elites=2, rollout_batch_size=8, horizon=2)
LINEAR = morel.Config(**dataclasses.asdict(TWO))


def as_ours(state, largest=jnp.nan):
    """MBPO's state, as MOReL's."""
    ours = {name: morel.Trainable(*x) if hasattr(x, "params") else x for name, x in state._asdict().items()}
    report = state.report | {"unknown": jnp.zeros(())}
    own = {"buffer": morel.Buffer(*state.buffer), "report": report, "largest": jnp.float32(largest)}
    return morel.State(**ours | own)


def split_state(cfg, largest=jnp.nan, spec=KNOWN):
    """Two members whose next states are s + 1 and 1.5 s + 1: they are |s| / 2 apart. Both have the reward 1."""
    kernel = np.zeros((2, 2, 4))
    kernel[1, 0, 0] = 0.5
    state = test_mbpo.linear_state(TWO, spec, bias=[1.0, 1.0, -1e3, -1e3])
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.float32(kernel) if path[-1].key == "kernel" else x, state.snapshot
    )
    return as_ours(state._replace(snapshot=params), largest)


def prepare(cfg, state, data, spec=KNOWN):
    return jax.jit(lambda state: morel.make_agent(cfg, spec).prepare(state, data)[0])(state)


def test_disagreement_is_between_members_in_the_same_row():
    # Next states (0, 0), (1, 0) and (0, 2), whatever the rewards: the farthest pair is sqrt(5) apart. In a second row
    # all are equal, and what they say of other rows does not matter.
    mean = jnp.array([[[0, 0, 5], [9, 9, 0]], [[1, 0, -5], [9, 9, 7]], [[0, 2, 0], [9, 9, 1]]], jnp.float32)
    np.testing.assert_allclose(morel.disagreement(mean), [5**0.5, 0.0], rtol=1e-6)


def test_the_threshold_is_of_the_largest_disagreement_over_the_data():
    # Data at -4, 1, 1.5 and 3 (11 rows, more than a block): disagreement 2, 0.5, 0.75 and 1.5. With pessimism 2 a row
    # is unknown above 1, that is beyond |s| = 2. There: reward -5 / (1 - 0.9) = -50, and terminal. Only the first
    # member imagines, s + 1, and the other one, no elite, disagrees all the same
    cfg = dataclasses.replace(LINEAR, pessimism=2.0, kappa=5.0, discount=0.9, num_elites=1, buffer_size=32)
    state = prepare(cfg, split_state(cfg), rows([-4.0, 1.0, 1.5, 3.0, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0]))
    np.testing.assert_allclose(state.largest, 2.0)
    imagined = jax.tree.map(lambda x: np.asarray(x[: int(state.buffer.size)]), state.buffer.rows)
    unknown = np.abs(imagined.obs[:, 0]) > 2
    np.testing.assert_allclose(imagined.reward, np.where(unknown, -50.0, 1.0), rtol=1e-5)
    np.testing.assert_array_equal(imagined.terminal, unknown)
    assert unknown[:8].any() and unknown[8:].any() and not unknown.all()  # in the data's states, and a step later
    assert len(unknown) == 8 + (~unknown[:8]).sum()  # nothing follows HALT
    np.testing.assert_allclose(state.report["unknown"], unknown.mean(), rtol=1e-6)


@pytest.mark.parametrize("largest_at", [0, 10])
def test_every_row_of_the_data_counts_for_the_threshold(largest_at):
    # 11 rows in blocks of 8, of which the last one begins at the fourth row. Vmapped, each seed has its own
    states = jax.tree.map(lambda x: jnp.stack([x, x]), split_state(LINEAR)._replace(key=None))
    states = states._replace(key=jax.random.split(KEY), largest=jnp.array([jnp.nan, 70.0]))
    data = rows(np.where(np.arange(11) == largest_at, -4.0, 1.0))
    agent = morel.make_agent(LINEAR, KNOWN)
    state, _ = jax.jit(jax.vmap(agent.prepare, in_axes=(0, None)))(states, data)
    np.testing.assert_allclose(state.largest, [2.0, 70.0])


@pytest.mark.parametrize("largest, unknown", [(70.0, 0.0), (0.5, 1.0)])
def test_the_threshold_is_taken_once(largest, unknown):
    # The members are 2 apart in all of the data; the threshold is a third of what was measured before
    state = prepare(LINEAR, split_state(LINEAR, largest=largest), rows(np.full(20, 4.0)))
    assert state.largest == largest and state.report["unknown"] == unknown


def test_what_the_members_agree_on_is_known_and_a_pessimism_without_bound_makes_all_unknown():
    # Equal members: 0 on all data, and 0 is not above a threshold of 0
    state = prepare(LINEAR, as_ours(test_mbpo.linear_state(TWO, bias=[1.0, 1.0, -1e3, -1e3])), rows(np.arange(20.0)))
    assert state.largest == 0 and state.report["unknown"] == 0
    cfg = dataclasses.replace(LINEAR, pessimism=1e30)
    state = prepare(cfg, split_state(cfg), rows(1 + np.arange(20.0)))
    assert state.report["unknown"] == state.report["model_terminal"] == 1 and state.buffer.size == 8


def test_halt_is_worth_what_it_costs_for_ever():
    # kappa 5, discount 0.9: -5 - 0.9 * 5 - ... = -50. On rows of HALT the critics' target is that, whatever the target
    # critics say of the next state; Q = 0
    cfg = dataclasses.replace(LINEAR, kappa=5.0, discount=0.9, real_ratio=0.0)
    agent = morel.make_agent(cfg, KNOWN)
    state = split_state(cfg)
    far = jax.tree.map(lambda x: jnp.full_like(x, 100.0), state.target_critic)
    halt = rows(np.ones(8), reward=-5 / (1 - 0.9), terminal=1.0)
    _, info = jax.jit(agent.update)(state._replace(target_critic=far), halt)
    np.testing.assert_allclose(info["critic_loss"], 2 * 50.0**2, rtol=1e-5)


def test_without_pessimism_it_is_mbpo_bit_for_bit():
    changes = dict(hidden=(8,), model_hidden=(8,), real_ratio=0.5)
    ours = dataclasses.replace(LINEAR, **changes, pessimism=0.0)
    theirs = mbpo.Config(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(mbpo.Config)})
    rng = np.random.default_rng(0)
    data = rows(*rng.normal(size=(4, 40)), terminal=np.arange(40) % 5 == 0)
    without = jax.jit(mbpo.make_agent(theirs, KNOWN).init)(KEY)
    with_0 = as_ours(without)
    for phase in ("pretrain", "update"):
        with_0, _ = jax.jit(morel.make_train(ours, morel.make_agent(ours, KNOWN), phase))(with_0, data)
        without, _ = jax.jit(mbpo.make_train(theirs, mbpo.make_agent(theirs, KNOWN), phase))(without, data)
    assert with_0.largest > 0
    for name in set(mbpo.State._fields) - {"key", "report"}:
        chex.assert_trees_all_equal(*(jax.tree.leaves(getattr(state, name)) for state in (with_0, without)))


def test_halt_needs_a_discount_below_1():
    with pytest.raises(SystemExit, match="discount below 1"):
        morel.make_agent(dataclasses.replace(LINEAR, discount=1.0), KNOWN)
