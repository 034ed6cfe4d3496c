"""The training text with toy agents: what it counts, averages, hands out and times, and each seam for later families.

`toy` is the text of a file with an agent of a few lines in it, which writes down what it is given. What it shows holds
for every file: tests/test_contract.py keeps their texts equal.
"""

import dataclasses
import importlib.util
import itertools
import json
import pathlib
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import payer
import pytest

from common.datasets import load_dataset
from common.environments import Environment, Evaluation, Interface

ROOT = pathlib.Path(__file__).parents[1]
B, STEPS = 4, 40  # rows of a batch, and updates
TINY = dict(
    dataset=payer.NAME, num_updates=STEPS, eval_interval=20, log_interval=10, eval_episodes=0, batch_size=B, num_seeds=2
)
BOX = Interface([2], {"low": [-2.0], "high": [3.0], "dtype": "float32"}, [0.0, 0.0], [1.0, 1.0])

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    """Rows (a Transition) whose rewards number them, for all tests; with these comes a new Environment for each run."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        payer.build()
        rows, _ = load_dataset(payer.NAME)
        yield rows._replace(reward=np.arange(len(rows.reward), dtype=np.float32))


class State(NamedTuple):
    key: Any
    net: Any  # a Trainable, of which divergence is asked
    count: Any  # updates so far
    prepared: Any  # calls of prepare so far
    rows: Any  # (updates, batch): the rewards of each batch
    by: Any  # (updates,): who made the update


def note(state, batch, by=0.0):
    """The state after an update `by` that only writes down its batch."""
    rows, whose = state.rows.at[state.count].set(batch.reward), state.by.at[state.count].set(by)
    return state._replace(rows=rows, by=whose, count=state.count + 1)


def init(algo, cfg, spec, key):
    net = algo.Trainable(jnp.zeros(1), jnp.zeros(1))
    number = cfg.num_updates + getattr(cfg, "pretrain_updates", 0)
    return State(key, net, jnp.int32(0), jnp.int32(0), jnp.zeros((number, cfg.batch_size)), jnp.zeros(number))


def update(algo, cfg, spec, state, batch):
    state = note(state, batch)
    return state, {"count": state.count.astype(jnp.float32)}


def act(algo, cfg, spec, state, obs, key):
    return jnp.zeros((*obs.shape[:-1], 1))


def toy(data, fields=None, **seams):
    """A module like algos/iql.py; `fields` {name: (type, default)} join its Config, `seams` are parts of its Agent.

    Each of these is a function (module, cfg, spec, and then what the text gives it), or a list of such.
    """
    spec = importlib.util.spec_from_file_location("toy", ROOT / "algos" / "iql.py")
    algo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(algo)
    parts = {"init": init, "update": update, "act": act} | seams
    algo.Agent = NamedTuple("Agent", [(name, Any) for name in parts])

    def make_agent(cfg, spec):
        def bind(part):
            return [bind(x) for x in part] if isinstance(part, list) else partial(part, algo, cfg, spec)

        return algo.Agent(*map(bind, parts.values()))

    more = [(name, kind, dataclasses.field(default=default)) for name, (kind, default) in (fields or {}).items()]
    algo.Config = dataclasses.make_dataclass("Config", more, bases=(algo.Config,), frozen=True)
    algo.make_agent, algo.load_data = make_agent, lambda cfg: (data, load_dataset(payer.NAME)[1])
    return algo


def train(algo, out, grid=None, **changes):
    """(summary, lines of metrics.jsonl, states) of a whole run."""
    cfg = algo.Config(**(TINY | changes), out=str(out))
    summary = algo.main(cfg, grid)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary, lines, algo.restore(out, run=None).states


def batches(algo, key, rows, cfg, number):
    """What a loop of draws and updates, one after the other, would draw: rewards (number, batch)."""
    drawn = []
    for _ in range(number):
        key, key_batch = jax.random.split(key)
        drawn.append(algo.draw(key_batch, rows, None, cfg).reward)
    return np.array(drawn)


# --- Counts, means, keys, time ---------------------------------------------------------------------------


@pytest.mark.parametrize("log_interval", [5, 10, 20])
def test_as_many_updates_as_asked_each_with_its_own_batch_and_the_mean_of_all(data, tmp_path, log_interval):
    algo = toy(data)
    _, lines, states = train(algo, tmp_path, log_interval=log_interval, seed=3)
    np.testing.assert_array_equal(states.count, [STEPS, STEPS])
    for seed, rows in zip([3, 4], states.rows, strict=True):
        expect = batches(algo, jax.random.key(seed), data, algo.Config(**TINY), STEPS)
        np.testing.assert_array_equal(rows, expect)
    # the means of 1 .. 20 and of 21 .. 40
    assert [(line["step"], line["seed"], line["count"]) for line in lines] == [
        (20, 3, 10.5),
        (20, 4, 10.5),
        (40, 3, 30.5),
        (40, 4, 30.5),
    ]


def test_each_run_begins_with_the_key_of_its_seed(data):
    algo = toy(data)
    runs = algo.Runs(algo.Config(**TINY | {"seed": 3, "num_seeds": 3}), BOX, {"beta": [0.0, 1.0]})
    keys = jax.random.key_data(runs.init().key)
    np.testing.assert_array_equal(keys, [jax.random.key_data(jax.random.key(seed)) for seed in (3, 4, 5) * 2])


def noise(algo, cfg, spec, state, obs, key):
    return jax.random.uniform(key, (*obs.shape[:-1], 1)) + cfg.beta


def test_each_run_acts_with_a_key_of_its_seed_and_step_alone(data):
    algo = toy(data, act=noise)
    runs = algo.Runs(algo.Config(**TINY | {"num_seeds": 3}), BOX, {"beta": [0.0, 1.0]})
    runs.states = runs.init()
    obs, nothing = np.zeros((6, 2, 2), np.float32), np.zeros((6, 2), np.float32)
    drawn = np.stack([runs.act(obs, t, None, nothing)[0] for t in range(5)])  # (steps, runs, 2, 1)
    np.testing.assert_allclose(drawn[:, 3:], drawn[:, :3] + 1, rtol=1e-6)  # the same seeds at another point
    assert len(np.unique(drawn[:, :3])) == 5 * 3 * 2
    np.testing.assert_array_equal(runs.act(obs, 4, None, nothing)[0], drawn[4])
    spent = [jax.random.uniform(key, (2, 1)) for key in jax.random.split(jax.random.key(0), 5)]  # by `init`
    assert not np.intersect1d(spent, drawn[:, 0]).size


def test_the_data_are_an_argument_of_the_compiled_program(data, tmp_path, monkeypatch):
    """As constants they would be in its text, 1,000 times longer for 1,000 times the rows."""
    texts = []
    for times in (1, 1000):
        rows = jax.tree.map(lambda x, times=times: np.concatenate([x] * times), data)
        algo = toy(rows)
        lower = algo.Runs.lower

        def listen(self, phase, shared, lower=lower):
            texts.append(lower(self, phase, shared).as_text())
            return lower(self, phase, shared)

        monkeypatch.setattr(algo.Runs, "lower", listen)
        train(algo, tmp_path / str(times))
    states = jax.tree.leaves(algo.restore(tmp_path / "1", run=None).states)
    donated = sum(texts[0].count(name) for name in ("tf.aliasing_output", "jax.buffer_donor"))
    assert donated == len(states), "the new state is written in the place of the old one"
    assert "tensor<80000xf32>" in texts[1] and abs(len(texts[1]) - len(texts[0])) < 0.1 * len(texts[0])


def test_on_a_cpu_runs_take_turns(data):
    """Its caches hold the networks of one run: a product of all runs at once would have a batch axis."""

    def product(algo, cfg, spec, state, batch):
        loss = batch.obs.T @ batch.reward
        return note(state, batch), {"loss": loss.sum()}

    algo = toy(data, update=product)
    runs = algo.Runs(algo.Config(**TINY), BOX, {})
    runs.states = runs.init()
    text = runs.lower("update", {"dataset": data}).as_text()
    assert "dot_general" in text and "batching_dims" not in text


def test_updates_per_second_are_of_all_runs_and_phases_and_of_training_alone(data, tmp_path, monkeypatch):
    """Three calls of 20 updates, the first of them in the first phase, each taking a second of this clock."""
    fields = {"pretrain_updates": (int, 20)}
    algo = toy(data, fields, pretrain=update)
    measure, clock, interruptions = Environment.measure, itertools.count(100), [20]
    algo.time = SimpleNamespace(perf_counter=lambda: float(next(clock)))

    def slow(*args, **kwargs):  # and interrupted at the first evaluation, that of step 20
        for _ in range(1000):
            next(clock)
        if interruptions:
            interruptions.pop()
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(Environment, "measure", slow)
    with pytest.raises(SystemExit):
        train(algo, tmp_path)
    summary, _, _ = train(algo, tmp_path)
    assert summary["train_seconds"] == 3 and summary["updates_per_second"] == (20 + STEPS) * 2 / 3
    assert summary["compile_seconds"] == 1


def test_nothing_is_compiled_again_at_the_next_evaluation(data, tmp_path, caplog):
    algo = toy(data, q=lambda algo, cfg, spec, state, obs, action: obs.sum(axis=-1))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        train(algo, tmp_path, eval_episodes=2)
    compiled = [r.getMessage() for r in caplog.records if "jit(of_device)" in r.getMessage()]
    compiled = [message for message in compiled if message.startswith("Compiling")]
    assert len(compiled) == 4, "init, the training step, act and q\n" + "\n".join(compiled)


# --- What a policy is worth ------------------------------------------------------------------------------


def test_true_and_believed_values_have_each_runs_own_discount(data, tmp_path):
    # Actions of 0.2, in the environment's units 0.5 + 2.5 * 0.2 = 1, pay 1 in each of 4 steps. IQL's data have shift 0
    algo = toy(
        data,
        act=lambda algo, cfg, spec, state, obs, key: jnp.full((*obs.shape[:-1], 1), 0.2),
        q=lambda algo, cfg, spec, state, obs, action: 10 * cfg.discount + action.sum(axis=-1) - 0.2,
    )
    summary, lines, _ = train(algo, tmp_path, grid={"discount": [0.5, 1.0]}, eval_episodes=3, num_seeds=1)
    assert [line["grid"] for line in lines] == [{"discount": 0.5}, {"discount": 1.0}] * 2
    np.testing.assert_allclose([line["true_value"] for line in lines], [1.875, 4] * 2, rtol=1e-6)
    np.testing.assert_allclose([line["believed_value"] for line in lines], [5, 10] * 2, rtol=1e-6)
    np.testing.assert_allclose(summary["returns"], np.full((2, 3), 4.0), rtol=1e-6)
    np.testing.assert_allclose(summary["score_per_seed"], [60, 60], rtol=1e-6)  # of -8 .. 12


def test_the_belief_weighs_the_starts(data, tmp_path, monkeypatch):
    # q = x + y is 1 and 3 at two starts of weight 1/4 and 3/4: 2.5, not 2; the true value is the evaluation's
    algo = toy(data, q=lambda algo, cfg, spec, state, obs, action: obs.sum(axis=-1))
    obs = np.array([[[0, 1], [1, 2]]] * 2, np.float32)
    play = Evaluation(np.ones((2, 2)), np.array([7.0, 8]), obs, np.zeros((2, 2, 1)), np.array([0.25, 0.75]))
    monkeypatch.setattr(Environment, "evaluate", lambda *args, **kwargs: play)
    _, lines, _ = train(algo, tmp_path, eval_episodes=2, num_updates=20)
    assert [line["believed_value"] for line in lines] == [2.5, 2.5] and [x["true_value"] for x in lines] == [7, 8]


def test_without_a_q_nothing_is_believed(data, tmp_path):
    _, lines, _ = train(toy(data), tmp_path, eval_episodes=1, num_updates=20)
    assert lines[0]["score"] is not None and not {"believed_value", "true_value"} & lines[0].keys()


def test_a_run_diverges_alone(data, tmp_path):
    """Parameters of one run, metrics of another: each marks its own run, from that evaluation on."""

    def breaks(algo, cfg, spec, state, batch):
        state, info = update(algo, cfg, spec, state, batch)
        late = state.count > 20
        params = jnp.where(late & (cfg.beta == 1), jnp.inf, state.net.params)
        loss = jnp.where(late & (cfg.beta == 2), jnp.nan, 0.0)
        return state._replace(net=state.net._replace(params=params)), info | {"loss": loss}

    summary, lines, _ = train(toy(data, update=breaks), tmp_path, grid={"beta": [0.0, 1.0, 2.0, 3.0]}, num_seeds=1)
    assert [line["diverged"] for line in lines] == [False] * 4 + [False, True, True, False]
    assert summary["diverged"] == [False, True, True, False] and lines[6]["loss"] is None


# --- The seams -------------------------------------------------------------------------------------------


def test_draw_may_mix_by_a_ratio_that_is_a_traced_float_and_see_the_state(data, tmp_path):
    """Row i of a batch is real where i < floor(ratio * batch_size); the others are made of the state."""
    algo = toy(data, {"ratio": (float, 0.5)})
    uniform = algo.draw

    def draw(key, dataset, state, cfg):
        batch = uniform(key, dataset, state, cfg)
        real = jnp.arange(cfg.batch_size) < jnp.floor(cfg.ratio * cfg.batch_size)
        return batch._replace(reward=jnp.where(real, batch.reward, -1.0 - state.count))

    algo.draw = draw
    _, _, states = train(algo, tmp_path, grid={"ratio": [0.0, 0.3, 0.5, 1.0]}, num_seeds=1)
    expect = batches(toy(data), jax.random.key(0), data, algo.Config(**TINY), STEPS)
    made = np.broadcast_to(-1.0 - np.arange(STEPS)[:, None], (STEPS, B))
    for rows, real in zip(states.rows, (0, 1, 2, 4), strict=True):
        np.testing.assert_array_equal(rows, np.concatenate([expect[:, :real], made[:, real:]], axis=1))


def prepare(algo, cfg, spec, state, dataset):
    """The number of its call, in the state and in place of every reward."""
    state = state._replace(prepared=state.prepared + 1)
    return state, dataset._replace(reward=dataset.reward * 0 + state.prepared)


@pytest.mark.parametrize("log_interval", [5, 20])
def test_prepare_comes_before_every_prepare_interval_updates(data, tmp_path, log_interval):
    algo = toy(data, {"prepare_interval": (int, 5)}, prepare=prepare)
    _, lines, states = train(algo, tmp_path, log_interval=log_interval)
    np.testing.assert_array_equal(states.prepared, [STEPS / 5] * 2)
    calls = np.repeat(np.arange(1, STEPS / 5 + 1), 5)
    np.testing.assert_array_equal(states.rows, np.broadcast_to(calls[:, None], (2, STEPS, B)))
    assert [line["count"] for line in lines] == [10.5, 10.5, 30.5, 30.5]
    with pytest.raises(SystemExit, match="log_interval must be a multiple of prepare_interval, which is 5"):
        train(algo, tmp_path, log_interval=4)


def by(number, **metrics):
    """An update that writes down its number and gives these metrics, plus how often it has been updated before."""

    def update(algo, cfg, spec, state, batch):
        return note(state, batch, number), {name: x + state.count for name, x in metrics.items()}

    return update


def test_the_first_phase_has_an_update_a_draw_a_preparation_and_a_cycle_of_its_own(data, tmp_path):
    def first_draw(algo, cfg, spec, key, dataset, state, cfg_again):
        return toy_draw(key, dataset, state, cfg_again)._replace(
            reward=jnp.full(cfg.batch_size, 100.0 + state.prepared)
        )

    fields = {"pretrain_updates": (int, 20), "prepare_interval": (int, 10)}
    seams = dict(
        pretrain=by(2.0), pretrain_cycle=[by(1.0), by(2.0, y=0.0)], pretrain_draw=first_draw, pretrain_prepare=prepare
    )
    algo = toy(data, fields, **seams, update=by(3.0, x=0.0))
    toy_draw = algo.draw
    _, lines, states = train(algo, tmp_path, log_interval=20)
    assert [line["step"] for line in lines] == [0, 0, 20, 20, 40, 40]
    np.testing.assert_array_equal(states.by, [[1.0, 2.0] * 10 + [3.0] * STEPS] * 2)
    np.testing.assert_array_equal(states.prepared, [2, 2])  # in the first phase alone, which has one
    np.testing.assert_array_equal(states.rows[0, :20, 0], [101.0] * 10 + [102.0] * 10)
    assert states.rows[0, 20:].min() >= 0 and states.rows[0, 20:].max() < 80  # then rows of the data, as they are
    assert [line.get("x") for line in lines[::2]] == [None, 20 + 9.5, 20 + 29.5]


def test_without_them_the_first_phase_has_the_draw_of_the_second_and_one_update(data, tmp_path):
    fields = {"pretrain_updates": (int, 20), "prepare_interval": (int, 10)}
    algo = toy(
        data, fields, pretrain=by(2.0, x=0.0), update=by(4.0, y=0.0), cycle=[by(3.0), by(4.0, y=0.0)], prepare=prepare
    )
    _, lines, states = train(algo, tmp_path)
    expect = batches(algo, jax.random.key(1), data, algo.Config(**TINY), 20)
    np.testing.assert_array_equal(states.rows[1, :20], expect)
    np.testing.assert_array_equal(states.by, [[2.0] * 20 + [3.0, 4.0] * 20] * 2)
    np.testing.assert_array_equal(states.prepared, [4, 4])
    assert ["x" in line for line in lines] == [True] * 2 + [False] * 4


def test_an_interval_that_is_no_whole_number_of_cycles_is_refused(data, tmp_path, monkeypatch):
    """The rest of its updates would be left out, and nobody would hear of it."""
    fields, cycle = {"policy_delay": (int, 2)}, [by(1.0), by(2.0)]
    prepared = {"prepare_interval": (int, 5)}, {"prepare": lambda algo, cfg, spec, state, dataset: (state, dataset)}
    for more, seams, interval in (({}, {}, "log_interval"), (*prepared, "prepare_interval")):
        algo = toy(data, fields | more, update=cycle[-1], cycle=cycle, **seams)
        changes = {"log_interval": 5, "eval_interval": 20}
        with pytest.raises(SystemExit, match=f"^{interval} must be a multiple of policy_delay, which is 2"):
            train(algo, tmp_path / interval, **changes)
        whole = {"log_interval": 10, "policy_delay": 5} if more else {"log_interval": 10}
        algo.check(algo.Config(**TINY | whole), {})


def test_the_updates_of_a_cycle_take_turns_each_with_its_own_batch(data, tmp_path):
    # x: the mean of all three; y: of the first and the last, which have it; z: of the last; w, which that has not: none
    cycle = [by(1.0, x=100.0, y=10.0, w=5.0), by(2.0, x=200.0), by(3.0, x=600.0, y=30.0, z=7.0)]
    algo = toy(data, update=cycle[-1], cycle=cycle)
    sizes = dict(num_updates=12, eval_interval=12, log_interval=6)
    _, lines, states = train(algo, tmp_path, **sizes)
    np.testing.assert_array_equal(states.by, [[1.0, 2.0, 3.0] * 4] * 2)
    np.testing.assert_array_equal(states.count, [12, 12])
    for seed in (0, 1):
        expect = batches(algo, jax.random.key(seed), data, algo.Config(**TINY), 12)
        np.testing.assert_array_equal(states.rows[seed], expect)
    # `by` adds the number of updates before: 0 .. 11, in the mean 5.5; 5.5 too for first and last; 6.5 for the last
    for line in lines:
        np.testing.assert_allclose([line["x"], line["y"], line["z"]], [300 + 5.5, 20 + 5.5, 7 + 6.5])
        assert "w" not in line


def remember(algo, cfg, spec, state, obs, key, memory, reward):
    """Acts by the number of its step and by the sum of the rewards so far, both in its memory."""
    step, total = (jnp.zeros(obs.shape[:-1]), jnp.zeros(obs.shape[:-1])) if memory is None else memory
    total = total + reward
    return (0.1 * step - 0.1 * total)[..., None], (step + 1, total)


def remembered(steps):
    """The actions of `remember` in the environment's units, which are the rewards too: 0.5 + 2.5 a."""
    rewards = []
    for t in range(steps):
        rewards.append(0.5 + 2.5 * (0.1 * t - 0.1 * sum(rewards)))
    return rewards


def test_a_policy_with_a_memory_knows_its_step_and_what_it_was_paid(data, tmp_path):
    algo = toy(data, act_with_memory=remember)
    summary, lines, _ = train(algo, tmp_path, eval_episodes=3)
    for line in lines:  # of both evaluations: each begins with nothing in mind
        np.testing.assert_allclose(line["returns"], [sum(remembered(4))] * 3, rtol=1e-5)

    policy, reward, played = algo.restore(tmp_path, run=1), None, []
    for _ in range(4):
        reward = policy(np.zeros(2), reward)[0]
        played.append(reward)
    np.testing.assert_allclose(played, remembered(4), rtol=1e-5)
    np.testing.assert_allclose(policy(np.zeros(2)), remembered(1), rtol=1e-5)  # no reward: an episode begins
    two, rewards = [], None
    for _ in range(3):  # two episodes at once, each with its own rewards
        two.append(policy(np.zeros((2, 2)), rewards)[:, 0])
        rewards = two[-1] + np.array([0.0, 1.0])
    np.testing.assert_allclose([x[0] for x in two], remembered(3), rtol=1e-5)
    np.testing.assert_allclose(two[1][1], two[1][0] - 0.25, rtol=1e-5)


def test_an_agent_may_ask_what_ends_an_episode(data):
    """Spec.terminal_of, of next observations without normalisation, in the middle of a compiled update."""

    known = Interface(*json.loads(json.dumps(BOX._replace(termination=[True, [["x", 0, 1, None, 0.5]]]))))

    def imagine(algo, cfg, spec, state, batch):
        return note(state, batch), {"ends": spec.terminal_of(batch.next_obs).mean()}

    algo = toy(data, update=imagine)
    runs = algo.Runs(algo.Config(**TINY | {"batch_size": 500}), known, {})
    runs.states = runs.init()
    _, info = runs.lower("update", {"dataset": data}).compile()(runs.fields, (runs.states,), {"dataset": data})
    np.testing.assert_allclose(info["ends"], np.mean(data.next_obs[:, 0] > 0.5), atol=0.05)
    assert BOX.spec.terminal_of is None
