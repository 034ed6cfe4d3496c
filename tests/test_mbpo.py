"""MBPO against numbers worked out by hand. With hidden=() every network is linear, so that they can be."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import combo, mbpo, mobile, mopo, morel, rambo, sac
from common.datasets import Transition
from common.environments import Spec


def never(next_obs):
    return np.zeros(next_obs.shape[:-1], bool)  # as that of HalfCheetah does


SMALL = dict(batch_size=8, num_updates=20, eval_interval=20, log_interval=20, prepare_interval=10, pretrain_updates=20)
LINEAR = mbpo.Config(
    **SMALL,
    hidden=(),
    model_hidden=(),
    num_members=1,
    num_elites=1,
    rollout_batch_size=4,
    horizon=2,
    buffer_size=16,
    holdout=4,
)
KNOWN = Spec(1, 1, terminal_of=never)
KEY = jax.random.key(0)
OTHERS = (mopo, morel, combo, rambo, mobile)  # what they share with MBPO is the same text
QUIET = -40.0  # log-variance of a model without noise


def linear_state(cfg, spec=KNOWN, kernel=0.0, bias=0.0, low=QUIET, action=0.0):
    """A state whose members have this kernel (inputs, outputs) and bias ([members,] outputs), and spent their patience.

    The policy takes `action` everywhere. Outputs: the change of the observation, the reward, their raw log-variances
    and, where the rule of termination is not known, the logit of the end.
    """
    shapes = jax.eval_shape(mbpo.make_agent(cfg, spec).init, KEY)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    values = {"kernel": kernel, "bias": bias, "max_log_var": 0.5, "min_log_var": low}

    def fill(path, x):
        value = np.asarray(values[path[-1].key], np.float32)
        if path[-1].key == "bias" and value.ndim == 2:
            return jnp.asarray(value)
        return jnp.broadcast_to(value, x.shape)

    params = jax.tree_util.tree_map_with_path(fill, state.model.params)
    policy = {"kernel": 0.0, "bias": jnp.array([np.arctanh(action), -20.0])}
    actor = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.broadcast_to(jnp.float32(policy[path[-1].key]), x.shape), state.actor.params
    )
    return state._replace(
        key=KEY,
        scale=(jnp.zeros(2), jnp.ones(2)),
        model=state.model._replace(params=params),
        snapshot=params,
        error=jnp.zeros(cfg.num_members),
        stale=jnp.full(cfg.num_members, float(cfg.patience)),
        actor=state.actor._replace(params=actor),
    )


def rows(obs, action=0.0, reward=0.0, next_obs=0.0, terminal=0.0):
    obs = jnp.float32(obs)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), obs.shape)  # noqa: E731
    columns = obs, column(action), column(reward), column(next_obs), column(terminal)
    return Transition(columns[0][:, None], columns[1][:, None], columns[2], columns[3][:, None], columns[4])


def gradient(trainable):
    """{name: array} of the only layer and the bounds, after one update of Adam: mu = (1 - b1) g."""
    leaves = jax.tree_util.tree_leaves_with_path(trainable.opt_state[0].mu)
    return {path[-1].key: np.asarray(x) / 0.1 for path, x in leaves}


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def pretrain(cfg, spec, state, batch):
    return mbpo.make_agent(cfg, spec).pretrain(state, batch)


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def prepare(cfg, spec, state, dataset):
    return mbpo.make_agent(cfg, spec).prepare(state, dataset)[0]


# --- The model's fit ---------------------------------------------------------------------------------------


def test_negative_log_likelihood_and_its_gradient():
    # One member, means (0, 1), targets (1, 1), raw log-variances 0: through the bounds 0.5 and -10 both are -0.474004.
    # L = ((1 - 0)^2 e^0.474004 - 0.474004 + 0 - 0.474004) / 2 + 0.01 * 2 * 10.5 = 0.539203
    cfg = dataclasses.replace(LINEAR, weight_decay=0.0)
    state = linear_state(cfg, bias=[0.0, 1.0, 0.0, 0.0], low=-10.0)
    after, info = pretrain(cfg, KNOWN, state, rows([0.0, 0.0], reward=1.0, next_obs=1.0))
    np.testing.assert_allclose(info["model_loss"], 0.539203, rtol=1e-5)
    np.testing.assert_allclose(info["model_nll"], 0.329203, rtol=1e-5)
    slope = gradient(after.model)
    np.testing.assert_allclose(slope["bias"][0], [-1.606413, 0.0, -0.188720, 0.311207], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(slope["max_log_var"][0], [-0.104465, 0.198757], rtol=1e-4)
    np.testing.assert_allclose(slope["min_log_var"][0], [-0.010022, -0.009964], rtol=1e-3)


def test_the_loss_is_a_sum_over_members_each_on_its_own_rows():
    # Two members, the second's rows twice as far: each has the gradient that it has alone, in either order
    cfg = dataclasses.replace(LINEAR, weight_decay=0.0, num_members=2)
    state = linear_state(cfg, bias=[0.0, 1.0, 0.0, 0.0], low=-10.0)
    near, far = rows([0.0, 0.0], reward=1.0, next_obs=1.0), rows([0.0, 0.0], reward=1.0, next_obs=2.0)
    ours, theirs = (jax.tree.map(lambda *x: jnp.stack(x), *pair) for pair in ((near, far), (far, near)))
    slope, other = (pretrain(cfg, KNOWN, state, batch) for batch in (ours, theirs))
    np.testing.assert_allclose(gradient(slope[0].model)["bias"][:, 0], [-1.606413, -2 * 1.606413], rtol=1e-4)
    np.testing.assert_allclose(gradient(other[0].model)["bias"], gradient(slope[0].model)["bias"][::-1], rtol=1e-5)
    # 0.329203 for the near row; of the far one the square is 4 times as large: (4 * 1.606413 - 2 * 0.474004) / 2
    np.testing.assert_allclose(slope[1]["model_loss"], 0.329203 + 2.738822 + 2 * 0.21, rtol=1e-5)
    np.testing.assert_allclose(other[1]["model_loss"], slope[1]["model_loss"], rtol=1e-6)


def test_weight_decay_is_of_the_kernels_alone():
    # A kernel of 2 x 4 ones: 2.5e-5 * 8 / 2 = 1e-4, slope 2.5e-5 of each; inputs and targets at 0
    losses = []
    for decay in (0.0, 2.5e-5):
        cfg = dataclasses.replace(LINEAR, weight_decay=decay)
        after, info = pretrain(cfg, KNOWN, linear_state(cfg, kernel=1.0, bias=3.0, low=-10.0), rows([0.0, 0.0]))
        losses.append((info["model_loss"], gradient(after.model)))
    np.testing.assert_allclose(losses[1][0] - losses[0][0], 1e-4, rtol=0.02)
    np.testing.assert_allclose(losses[1][1]["kernel"] - losses[0][1]["kernel"], 2.5e-5, rtol=1e-4)
    np.testing.assert_array_equal(losses[1][1]["bias"], losses[0][1]["bias"])


def test_a_terminal_row_teaches_its_true_next_state():
    cfg, slopes = dataclasses.replace(LINEAR, weight_decay=0.0), []
    for terminal in (0.0, 1.0):
        batch = rows([0.0, 0.0], reward=1.0, next_obs=1.0, terminal=terminal)
        slopes.append(gradient(pretrain(cfg, KNOWN, linear_state(cfg, low=-10.0), batch)[0].model)["bias"][0])
    np.testing.assert_array_equal(*slopes)
    assert slopes[0][0] < -1


def test_where_the_rule_is_not_known_an_output_learns_it():
    # Logit 0: cross-entropy log 2, slope sigmoid(0) - 1 = -0.5 at a terminal row, which the mean over rows halves
    cfg = dataclasses.replace(LINEAR, weight_decay=0.0)
    state, known = linear_state(cfg, Spec(1, 1), low=-10.0), linear_state(cfg, low=-10.0)
    batch = rows([0.0, 0.0], terminal=[1.0, 1.0])
    after, info = pretrain(cfg, Spec(1, 1), state, batch)
    _, without = pretrain(cfg, KNOWN, known, batch)
    np.testing.assert_allclose(info["model_loss"] - without["model_loss"], np.log(2), rtol=1e-5)
    np.testing.assert_allclose(gradient(after.model)["bias"][0], [0, 0, *[0.311207] * 2, -0.5], rtol=1e-4, atol=1e-6)


def test_held_out_rows_are_in_no_bootstrap_and_make_the_error():
    cfg = dataclasses.replace(LINEAR, num_members=7, holdout=1_000)
    data = rows(np.arange(60.0))
    ask = jax.jit(mbpo.make_agent(cfg, KNOWN).pretrain_prepare)
    fresh = linear_state(cfg)._replace(error=jnp.full(7, jnp.inf), stale=jnp.zeros(7))
    _, (_, bootstrap) = ask(fresh, data)
    seen = [set(member) for member in np.asarray(bootstrap).tolist()]
    assert bootstrap.shape == (7, 48)  # a fifth is held out
    assert all(len(member) < 40 for member in seen) and len(set(map(frozenset, seen))) == 7  # with replacement
    held_out = np.array(sorted(set(range(60)) - set.union(*seen)))
    assert len(held_out) == 12  # a row that all members miss has a chance of 0.1 %
    # Predictions are 0. Change and reward are 0 in the held-out rows, then there alone 2 and 1: (4 + 1) / 2
    for inside, outside, error in ((0.0, 1.0, 0.0), (1.0, 0.0, 2.5)):
        value = np.where(np.isin(np.arange(60), held_out), inside, outside)
        state, _ = ask(fresh, rows(np.arange(60.0), reward=value, next_obs=np.arange(60.0) + 2 * value))
        np.testing.assert_allclose(state.error, error)
    # The scale is that of the rows that are fitted; an input that does not vary is only centred
    fitted = np.setdiff1d(np.arange(60), held_out)
    np.testing.assert_allclose(state.scale[0], [fitted.mean(), 0], rtol=1e-6)
    np.testing.assert_allclose(state.scale[1], [fitted.std(), 1], rtol=1e-6)


def test_a_members_batch_is_of_its_own_bootstrap():
    cfg = dataclasses.replace(LINEAR, num_members=3, batch_size=64)
    bootstrap = jnp.array([[0, 1], [2, 3], [4, 4]])
    batch = mbpo.pretrain_draw(KEY, (rows(np.arange(6.0), reward=10 + np.arange(6.0)), bootstrap), None, cfg)
    assert [set(x) for x in np.asarray(batch.obs[..., 0]).tolist()] == [{0, 1}, {2, 3}, {4}]
    np.testing.assert_array_equal(batch.reward, 10 + batch.obs[..., 0])


@pytest.mark.parametrize("patience, best", [(5, 0.489), (6, 0.484)])
def test_a_member_whose_patience_is_spent_keeps_its_snapshot(patience, best):
    # Improvements of 1 %: 0.5, 0.494, 0.489 and, after five epochs without one, 0.484. A second member has twice the
    # error, and improves for the last time in the end. 16 rows are fitted: two batches of 8 are an epoch
    cfg = dataclasses.replace(LINEAR, num_members=2, patience=patience, prepare_interval=2)
    errors = [1, 0.5, 0.499, 0.498, 0.497, 0.496, 0.494, 0.49, 0.489, 0.488, 0.487, 0.486, 0.485, 0.4845, 0.484]
    state = linear_state(cfg)._replace(error=jnp.full(2, jnp.inf), stale=jnp.zeros(2))
    ask = jax.jit(lambda state: mbpo.make_agent(cfg, KNOWN).pretrain_prepare(state, rows(np.zeros(20)))[0])
    for i, error in enumerate(errors):
        outputs = np.repeat(np.sqrt([[error], [2.0 - i / 10]]), 4, axis=1)  # the error is their mean square
        state = ask(state._replace(model=linear_state(cfg, bias=outputs).model))
    np.testing.assert_allclose(state.error, [best, 0.6], rtol=1e-5)
    kept = [x for path, x in jax.tree_util.tree_leaves_with_path(state.snapshot) if path[-1].key == "bias"][0]
    np.testing.assert_allclose(kept[:, 0], np.sqrt([best, 0.6]), rtol=1e-5)


@pytest.mark.parametrize("batch_size, interval, kept", [(8, 2, 2.0), (8, 1, 1.0), (4, 2, 1.0), (16, 2, 2.0)])
def test_patience_is_of_epochs_however_often_they_are_measured(batch_size, interval, kept):
    # 16 rows are fitted, and patience is 2 epochs. Errors 4, 4, 4, 1 of snapshots 2, 2, 2, 1: two intervals without an
    # improvement are 2, 1, 1 and 4 epochs
    cfg = dataclasses.replace(LINEAR, patience=2, batch_size=batch_size, prepare_interval=interval)
    state = linear_state(cfg)._replace(error=jnp.full(1, jnp.inf), stale=jnp.zeros(1))
    ask = jax.jit(lambda state: mbpo.make_agent(cfg, KNOWN).pretrain_prepare(state, rows(np.zeros(20)))[0])
    for bias in (2.0, 2.0, 2.0, 1.0):
        state = ask(state._replace(model=linear_state(cfg, bias=bias).model))
    np.testing.assert_allclose(jnp.sqrt(state.error), kept)


def test_the_last_steps_of_the_fit_are_measured_once():
    # Before the first roll-out, when the buffer is empty: bias 1. Not before the second: bias 0 would be better
    state = linear_state(LINEAR, bias=1.0)._replace(error=jnp.full(1, 4.0), stale=jnp.zeros(1))
    for bias in (1.0, 0.0):
        state = prepare(LINEAR, KNOWN, state._replace(model=linear_state(LINEAR, bias=bias).model), rows(np.zeros(20)))
        np.testing.assert_allclose([state.error[0], state.report["holdout_max"]], 1.0)
        np.testing.assert_allclose(state.stale, 0.0)


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e6])
def test_a_column_is_constant_by_its_own_measure(unit):
    # Observations vary in any unit. The action is 0.1, but for rounding of its last digits
    obs = unit * np.arange(60.0)
    data = rows(obs, action=0.1 * (1 + 1e-6 * (np.arange(60) % 2)))
    state, _ = jax.jit(mbpo.make_agent(LINEAR, KNOWN).pretrain_prepare)(linear_state(LINEAR), data)
    np.testing.assert_allclose(state.scale[1], [obs.std(), 1], rtol=0.1)


def test_the_fit_recovers_a_linear_world(optimised):
    # s' = 0.9 s + 0.5 a, r = 2 s - a. Inputs of unequal size, and not round 0
    rng = np.random.default_rng(0)
    s, a = 3 + 5 * rng.normal(size=400), rng.uniform(-1, 1, 400)
    data = rows(s, a, 2 * s - a, 0.9 * s + 0.5 * a)
    cfg = dataclasses.replace(LINEAR, batch_size=64, num_members=2, log_interval=2_000, prepare_interval=500,
                              model_learning_rate=0.1, weight_decay=0.0, holdout=40)  # fmt: skip
    agent = mbpo.make_agent(cfg, KNOWN)
    start = linear_state(cfg, low=-10.0)._replace(error=jnp.full(2, jnp.inf), stale=jnp.zeros(2))
    state, info = jax.jit(mbpo.make_train(cfg, agent, "pretrain"))(start, data)
    assert (state.error < 25).all() and info["holdout_min"] <= info["holdout_max"]  # before the last 500 steps
    state = prepare(cfg, KNOWN, state, data)  # measures what they brought
    assert (state.error < 0.01).all()  # the rewards' variance is 100
    imagined, start = state.buffer.rows, state.buffer.rows.obs[:4, 0]
    np.testing.assert_allclose(imagined.next_obs[:4, 0], 0.9 * start + 0.5 * imagined.action[:4, 0], atol=0.5)
    np.testing.assert_array_equal(imagined.obs[4:8], imagined.next_obs[:4])  # a step begins where the last one led


# --- Roll-outs ---------------------------------------------------------------------------------------------


def test_roll_outs_of_a_perfect_model():
    # s' = 0.9 s + 0.5 a, r = 2 s - a. With a = 0.2, s = 1 stays where it is and r = 1.8, in each of the steps
    cfg = dataclasses.replace(LINEAR, horizon=4)
    kernel = np.array([[-0.1, 2, 0, 0], [0.5, -1, 0, 0]])
    bias = np.array([0, 0, -1e3, -1e3])
    state = prepare(cfg, KNOWN, linear_state(cfg, kernel=kernel, bias=bias, action=0.2), rows(np.ones(20)))
    rows_, zero = state.buffer.rows, np.zeros(16)
    assert state.buffer.size == 16 and state.buffer.next == 0
    for name, value in (("obs", 1.0), ("action", 0.2), ("reward", 1.8), ("next_obs", 1.0), ("terminal", 0.0)):
        np.testing.assert_allclose(np.ravel(getattr(rows_, name)), zero + value, rtol=1e-5, err_msg=name)


def test_nothing_follows_a_termination():
    # The observation rises by 1 a step, and an episode ends above 1.5: from 1 after one step, from 0 after two, from -5
    # not in the three steps of a roll-out
    spec = Spec(1, 1, terminal_of=lambda next_obs: next_obs[..., 0] > 1.5)
    cfg = dataclasses.replace(LINEAR, horizon=3, rollout_batch_size=64, buffer_size=200)
    state = prepare(cfg, spec, linear_state(cfg, spec, bias=[1.0, 5.0, -1e3, -1e3]), rows([1.0, 0.0, -5.0] * 20))
    size, imagined = int(state.buffer.size), state.buffer.rows
    stored = np.round(np.asarray(imagined.obs[:size, 0])).astype(int)
    first = np.bincount(stored[:64] + 5, minlength=10)
    from_1, from_0, from_5 = first[6], first[5], first[0]  # the roll-outs that start there
    assert from_1 + from_0 + from_5 == 64 and min(from_1, from_0, from_5) > 5
    assert size == state.buffer.next == from_1 + 2 * from_0 + 3 * from_5
    np.testing.assert_array_equal(np.bincount(stored + 5), [from_5, from_5, from_5, 0, 0, from_0, from_1 + from_0])
    ends = np.asarray(imagined.terminal[:size])
    np.testing.assert_array_equal(ends, stored == 1)  # a roll-out that is over has not ended
    assert not np.any(imagined.obs[size:]) and not np.any(imagined.reward[size:])
    np.testing.assert_allclose(state.report["model_terminal"], (from_1 + from_0) / size, rtol=1e-5)
    np.testing.assert_allclose([state.report["model_reward"], state.report["zero_rows"]], [5.0, 0.0])


def test_a_learned_termination_is_the_sign_of_the_logit_of_the_member_that_imagines():
    cfg = dataclasses.replace(LINEAR, num_members=2, num_elites=2, rollout_batch_size=64, buffer_size=200)
    bias = [[1.0, 7.0, -1e3, -1e3, 0.1], [1.0, 3.0, -1e3, -1e3, -0.1]]  # the rewards tell which it was
    state = prepare(cfg, Spec(1, 1), linear_state(cfg, Spec(1, 1), bias=bias), rows(np.zeros(20)))
    first, rest = state.buffer.rows.reward[:64], state.buffer.rows.reward[64 : int(state.buffer.size)]
    np.testing.assert_array_equal(state.buffer.rows.terminal[:64], first > 5)
    assert len(rest) == (first < 5).sum() > 10  # one more step of those that go on


@pytest.mark.parametrize("algo", [mbpo, mopo, morel, rambo], ids=lambda algo: algo.__name__.removeprefix("algos."))
def test_each_step_is_imagined_by_a_member_drawn_from_the_elites(algo):
    # Member i gives the reward i; the errors of 0, 2 and 3 are the smallest. Over 4,000 steps each has a third, and so
    # it has in each place of a batch. These files have an `imagine` of their own
    cfg = dataclasses.replace(
        LINEAR, num_members=4, num_elites=3, horizon=4, rollout_batch_size=1_000, buffer_size=4_000
    )
    bias = np.zeros((4, 4)) + [[0, 0, -1e3, -1e3]]
    bias[:, 1] = np.arange(4)
    state = linear_state(cfg, bias=bias)._replace(error=jnp.array([0.2, 0.9, 0.1, 0.3]))
    if algo != mbpo:
        state = importlib.import_module(algo.__name__.replace("algos.", "test_")).as_ours(state)
    agent = algo.make_agent(algo.Config(**dataclasses.asdict(cfg)), KNOWN)
    state = jax.jit(agent.prepare)(state, rows(np.zeros(20)))[0]
    np.testing.assert_allclose(state.error, [0.2, 0.9, 0.1, 0.3])
    member = np.round(state.buffer.rows.reward).astype(int).reshape(4, 1_000)
    np.testing.assert_allclose(np.bincount(member.ravel(), minlength=4) / 4_000, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.03)
    np.testing.assert_allclose((member[1:] == member[:-1]).mean(), 1 / 3, atol=0.03)  # drawn anew at each step
    np.testing.assert_allclose((member[:, 3:] == member[:, :-3]).mean(), 1 / 3, atol=0.03)  # and for each row


def test_a_step_is_a_draw_with_the_models_deviation():
    # Raw log-variances (0, 2 log 3) far within the bounds 40 and -40: deviations 1 and 3, of means (0, 7)
    cfg = dataclasses.replace(LINEAR, horizon=1, rollout_batch_size=4_000, buffer_size=4_000)
    state = linear_state(cfg, bias=[0.0, 7.0, 0.0, 2 * np.log(3)])
    wide = {**state.snapshot["params"], "max_log_var": state.snapshot["params"]["min_log_var"] * -1}
    state = prepare(cfg, KNOWN, state._replace(snapshot={"params": wide}), rows(np.zeros(20)))
    np.testing.assert_allclose([state.buffer.rows.next_obs.mean(), state.buffer.rows.reward.mean()], [0, 7], atol=0.15)
    np.testing.assert_allclose([state.buffer.rows.next_obs.std(), state.buffer.rows.reward.std()], [1, 3], rtol=0.05)


def test_rows_of_a_model_that_diverged_are_not_stored():
    # s = 1e38 grows by as much in each step: 2e38, 3e38, then infinity. s = 0 stays 0. Rewards of s = 5 are NaN
    cfg = dataclasses.replace(LINEAR, horizon=4, rollout_batch_size=64, buffer_size=256)
    state = linear_state(cfg, bias=[0.0, 0.0, -1e3, -1e3])
    kernel = jnp.zeros((1, 2, 4)).at[0, 0, 0].set(1.0)
    params = jax.tree_util.tree_map_with_path(lambda path, x: kernel if path[-1].key == "kernel" else x, state.snapshot)
    state = prepare(cfg, KNOWN, state._replace(snapshot=params), rows([1e38, 0.0] * 10))
    size, first = int(state.buffer.size), state.buffer.rows.obs[:64, 0] > 0
    assert (
        size == first.sum() + 4 * (~first).sum() and 10 < first.sum() < 54
    )  # 1e38 doubles to 2e38, and then overflows
    assert np.isfinite(jnp.concatenate([state.buffer.rows.obs, state.buffer.rows.next_obs])).all()
    state = prepare(cfg, KNOWN, linear_state(cfg, bias=[0.0, jnp.nan, -1e3, -1e3]), rows(np.zeros(20)))
    assert state.buffer.size == 0 and np.isnan(state.report["model_reward"])  # so that the run counts as diverged


# --- The ring buffer ---------------------------------------------------------------------------------------


def test_ring_buffer():
    buffer = mbpo.Buffer(rows(np.zeros(8)), jnp.int32(0), jnp.int32(0))
    store = jax.jit(mbpo.store)
    for first in (1, 4, 7):  # 1 .. 9 into 8 places
        buffer = store(buffer, rows(first + np.arange(3.0)), jnp.ones(3, bool))
    np.testing.assert_array_equal(buffer.rows.obs[:, 0], [9, 2, 3, 4, 5, 6, 7, 8])
    assert (buffer.next, buffer.size) == (1, 8)
    buffer = store(buffer, rows([10.0, 99.0, 12.0]), jnp.array([True, False, True]))
    np.testing.assert_array_equal(buffer.rows.obs[:, 0], [9, 10, 12, 4, 5, 6, 7, 8])
    assert (buffer.next, buffer.size) == (3, 8)
    with pytest.raises(AssertionError):
        mbpo.store(buffer, rows(np.arange(9.0)), jnp.ones(9, bool))


def test_rows_that_were_never_written_are_not_drawn():
    cfg = dataclasses.replace(LINEAR, batch_size=256, real_ratio=0.0)
    buffer = mbpo.store(mbpo.Buffer(rows(np.zeros(8)), jnp.int32(0), jnp.int32(0)), rows([1.0, 2.0]), jnp.ones(2, bool))
    batch = mbpo.mix(KEY, rows(np.full(20, 7.0)), linear_state(cfg)._replace(buffer=buffer), cfg)
    assert set(np.ravel(batch.obs).tolist()) == {1.0, 2.0}


def test_the_report_tells_empty_rows_and_terminals():
    filled = rows([0.0, 0.0, 1.0, 2.0, 0.0, 0.0], terminal=[0, 0, 0, 1, 0, 0], reward=[0, 0, 3, 5, 0, 0])
    report = mbpo.describe(mbpo.Buffer(filled, jnp.int32(4), jnp.int32(4)))
    chex.assert_trees_all_close(report, {"zero_rows": 0.5, "model_terminal": 0.25, "model_reward": 2.0})


# --- The policy's updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, real", [(0.0, 0), (0.05, 12), (0.5, 128), (0.999, 255), (1.0, 256)])
def test_a_batch_is_part_data_and_part_imagined(ratio, real):
    cfg = dataclasses.replace(LINEAR, batch_size=256)
    state = linear_state(cfg)._replace(buffer=mbpo.Buffer(rows(np.full(16, 2.0)), jnp.int32(0), jnp.int32(16)))
    batch = jax.jit(lambda r: mbpo.mix(KEY, rows(np.ones(20)), state, dataclasses.replace(cfg, real_ratio=r)))(ratio)
    np.testing.assert_array_equal(batch.obs[:, 0], np.where(np.arange(256) < real, 1.0, 2.0))


def as_sac(state):
    """The part of a state that SAC has."""
    part = {name: getattr(state, name) for name in sac.State._fields}
    return sac.State(**{name: sac.Trainable(*x) if hasattr(x, "params") else x for name, x in part.items()})


def test_with_real_rows_alone_it_is_sac_bit_for_bit():
    changes = dict(hidden=(8,), learning_rate=3e-3)
    cfg = dataclasses.replace(LINEAR, **changes, real_ratio=1.0)
    agent, rng = mbpo.make_agent(cfg, KNOWN), np.random.default_rng(0)
    data = rows(*rng.normal(size=(4, 40)), terminal=np.arange(40) % 5 == 0)
    start = jax.jit(agent.init)(KEY)._replace(stale=jnp.full(1, float(cfg.patience)))
    ours, info = jax.jit(mbpo.make_train(cfg, agent))(start, data)
    assert ours.buffer.size == 16 and info["zero_rows"] == 0
    chex.assert_trees_all_equal(ours.model, start.model)
    small = {name: value for name, value in SMALL.items() if hasattr(sac.Config(), name)}
    theirs = sac.Config(**small, **changes)
    theirs, _ = jax.jit(sac.make_train(theirs, sac.make_agent(theirs, KNOWN)))(as_sac(start), data)
    chex.assert_trees_all_equal(as_sac(ours)._replace(key=None), theirs._replace(key=None))
    assert jax.random.key_data(ours.key).tolist() == jax.random.key_data(theirs.key).tolist()


def test_it_starts_as_sac():
    cfg = dataclasses.replace(LINEAR, hidden=(8,))
    ours = jax.jit(mbpo.make_agent(cfg, KNOWN).init)(KEY)
    theirs = jax.jit(sac.make_agent(sac.Config(hidden=(8,)), KNOWN).init)(KEY)
    chex.assert_trees_all_equal(as_sac(ours)._replace(key=None), theirs._replace(key=None))


def test_without_real_rows_the_datas_rewards_are_not_read():
    cfg = dataclasses.replace(LINEAR, real_ratio=0.0)
    train = jax.jit(mbpo.make_train(cfg, mbpo.make_agent(cfg, KNOWN)))
    start = linear_state(cfg, bias=[0.0, 1.0, -1e3, -1e3])
    (one, info), (other, there) = (train(start, rows(np.ones(20), reward=r)) for r in (1.0, -50.0))
    chex.assert_trees_all_equal(one.critic, other.critic)
    assert (info["data_reward"], there["data_reward"]) == (1.0, -50.0)
    np.testing.assert_allclose([info["model_reward"], there["model_reward"]], 1.0)


# --- The family --------------------------------------------------------------------------------------------


def functions(algo):
    """{name: text} of the functions above the training text."""
    text = inspect.getsource(algo).partition("# --- Training: the same")[0]
    defined = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(text, node) for node in defined}


@pytest.mark.parametrize(
    "algo, own",
    [
        (mopo, {"imagine", "roll_out", "prepare"}),
        (morel, {"imagine", "roll_out", "prepare", "init"}),
        (combo, {"critic_loss", "init", "update"}),
        (rambo, {"imagine", "roll_out", "prepare", "init", "update", "keep_best", "pretrain"}),
        (mobile, {"roll_out", "init", "update"}),
    ],
    ids=lambda x: getattr(x, "__name__", "").removeprefix("algos."),
)
def test_the_family_differs_only_where_it_should(algo, own):
    """So what is tested here holds for all of them; what is their own has tests of its own."""
    ours, theirs = functions(mbpo), functions(algo)
    for name, written, here in (
        ("step", r"rows, \w+ = ", "rows = "),  # of a roll-out
        ("step", r"\(rows, alive, \w+\)", "(rows, alive)"),
        ("step", r"elites\(state\)", "elites"),
        ("mix", r"real_rows\(cfg\.batch_size, cfg\.real_ratio\)",
         "jnp.arange(cfg.batch_size) < jnp.floor(cfg.real_ratio * cfg.batch_size)"),
    ):  # fmt: skip
        theirs[name] = re.sub(written, here, theirs[name])
    assert {name for name in ours if theirs[name] != ours[name]} == own | {"make_agent"}
    for name in own & {"imagine", "keep_best"}:  # but for two of their lines
        here = theirs[name].replace("snapshot.params", "snapshot").splitlines()
        assert len([line for line in ours[name].splitlines() if line not in here]) <= 2


# --- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", [mbpo, *OTHERS], ids=lambda algo: algo.__name__.removeprefix("algos."))
def test_what_it_cannot_do_is_said_in_one_sentence(algo):
    """And before any compilation. The files of this family have the same text."""
    small = algo.Config(**dataclasses.asdict(dataclasses.replace(LINEAR, num_members=2, num_elites=2)))
    for changes, text in (
        ({"horizon": 5}, "at most buffer_size, which is 16"),
        ({"num_elites": 3}, "num_elites must be at most num_members, which is 2"),
        ({"real_ratio": -0.1}, "real_ratio must be from 0 to 1, not -0.1"),
        ({"real_ratio": 1.5}, "real_ratio must be from 0 to 1, not 1.5"),
    ):
        with pytest.raises(SystemExit, match=text) as error:
            algo.make_agent(dataclasses.replace(small, **changes), KNOWN)
        assert "\n" not in error.value.code
    with pytest.raises(SystemExit, match="continuous actions"):
        algo.make_agent(small, Spec(3, 4, discrete=True))
    agent = algo.make_agent(small, KNOWN)
    with pytest.raises(SystemExit, match="4 rows are too few"):  # as it is traced
        jax.eval_shape(algo.make_train(small, agent, "pretrain"), jax.eval_shape(agent.init, KEY), rows(np.zeros(4)))


def test_episodes_of_one_step_are_data_as_any_other(optimised):
    # Each row is an episode, ends it and pays its action: the model learns both, and imagines one step a roll-out
    action = np.random.default_rng(0).uniform(-1, 1, 40)
    data, spec = rows(np.arange(40.0), action, reward=action, terminal=1.0), Spec(1, 1)
    cfg = dataclasses.replace(LINEAR, log_interval=1_000, prepare_interval=500, model_learning_rate=0.1)
    agent = mbpo.make_agent(cfg, spec)
    state, _ = jax.jit(mbpo.make_train(cfg, agent, "pretrain"))(jax.jit(agent.init)(KEY), data)
    state = prepare(cfg, spec, state, data)
    assert state.buffer.size == 4 and state.report["model_terminal"] == 1
    np.testing.assert_allclose(state.buffer.rows.reward[:4], state.buffer.rows.action[:4, 0], atol=0.3)
