"""Learning on-line: the second shared text of the files that have it, and the environments that they step.

`toy` is the text of algos/iql.py with an agent of a few lines in it, which writes down what it is given. The
environments are Echo and Clock of tests/echo.py: an episode of Echo has 3 to 6 steps, of which a time limit allows 5.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import pathlib
import types
from functools import partial
from typing import Any, NamedTuple

import echo  # noqa: F401  (registers the environments)
import flax
import gymnasium
import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path

from common.datasets import Transition, load_dataset
from common.environments import Environment, Spec
from common.recipes.worker import EnvironmentFailure
from common.stepper import Stepper

ROOT = pathlib.Path(__file__).parents[1]
ECHO = dict(low=-1.0, high=3.0)
NAME, CLOCK = "test/echo-v0", "test/clock-v0"
SIZES = dict(num_updates=20, eval_interval=20, log_interval=10, online_steps=40, online_block=5, buffer_size=64)
TINY = SIZES | dict(dataset=NAME, num_seeds=2, batch_size=4, eval_episodes=0)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions


def build(name, env, episodes=8, steps=5, rewards=None):
    """A dataset of random actions, whose observations are no environment's: only its spaces matter here."""
    if name in minari.list_local_datasets():
        minari.delete_dataset(name)
    rng, buffers = np.random.default_rng(0), []
    for _ in range(episodes):
        end = np.arange(1, steps + 1) == steps
        obs, reward = rng.normal(size=(steps + 1, 2)), rng.uniform(size=steps)
        actions = rng.uniform(env.action_space.low, env.action_space.high, (steps, 2)).astype(np.float32)
        buffers.append(EpisodeBuffer(None, None, None, obs, actions, reward, end & False, end))
    minari.create_dataset_from_buffers(name, buffers, env=env, ref_min_score=0.0, ref_max_score=10.0)


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        build(NAME, gymnasium.make("stitch-test/Echo-v0", **ECHO))
        build(CLOCK, gymnasium.make("stitch-test/Clock-v0", terminate=3))
        yield


class State(NamedTuple):
    key: Any
    net: Any  # a Trainable, of which divergence is asked
    count: Any  # updates so far
    drawn: Any  # (updates, batch): the rewards of each batch


def init(algo, cfg, spec, key):
    return State(key, algo.Trainable(jnp.zeros(1), jnp.zeros(1)), jnp.int32(0), jnp.zeros((100, cfg.batch_size)))


def update(algo, cfg, spec, state, batch):
    state = state._replace(count=state.count + 1, drawn=state.drawn.at[state.count].set(batch.reward))
    return state, {"count": state.count.astype(jnp.float32)}


def act(algo, cfg, spec, state, obs, key):
    return jnp.zeros((*obs.shape[:-1], 2))


def explore(algo, cfg, spec, state, obs, key, step):
    """(noise, how much it has learned)"""
    noise = jax.random.uniform(key, obs.shape[:-1], minval=-1)
    return jnp.stack([noise, jnp.broadcast_to(state.count / 1000, noise.shape)], axis=-1)


def toy(options=None, **seams):
    """A module like algos/iql.py, with these parts of its Agent and these options of load_dataset."""
    spec = importlib.util.spec_from_file_location("toy", ROOT / "algos" / "iql.py")
    algo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(algo)
    parts = {"init": init, "update": update, "act": act, "explore": explore} | seams
    algo.Agent = NamedTuple("Agent", [(name, Any) for name in parts])

    def make_agent(cfg, spec):
        def bind(part):
            return [bind(x) for x in part] if isinstance(part, list) else partial(part, algo, cfg, spec)

        return algo.Agent(*map(bind, parts.values()))

    algo.make_agent, algo.load_data = make_agent, lambda cfg: load_dataset(cfg.dataset, **(options or {}))
    return algo


def load(name):
    return importlib.import_module(f"algos.{name}")


def train(algo, out, **changes):
    """(summary, lines of metrics.jsonl, the runs) of a whole run."""
    summary = algo.main(algo.Config(**(TINY | changes), out=str(out)))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return summary, lines, algo.restore(out, None)


def own_rows(runs, i):
    """The rows in the ring of run i, the oldest first, without the places that are empty."""
    ring = runs.online["ring"]
    columns = {name: np.asarray(x)[i] for name, x in ring["rows"].items() if x is not None}
    count, capacity = int(ring["count"][i]), len(columns["reward"])
    order = np.arange(max(0, count - capacity), count) % capacity
    return types.SimpleNamespace(count=count, **{name: x[order] for name, x in columns.items()})


def sentence(call, *args, **kwargs):
    with pytest.raises(SystemExit) as error:
        call(*args, **kwargs)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code and error.value.code.endswith(".")
    return error.value.code


# --- The ring --------------------------------------------------------------------------------------------


def numbered(first, number, height=None):
    """A block of `height` rows, of which `number` are real: their rewards number them."""
    x = jnp.where(jnp.arange(height or number) < number, first + jnp.arange(height or number), -99.0)
    return Transition(x[:, None], x[:, None], x, x[:, None], x)


def test_the_ring_keeps_the_newest_rows_whatever_blocks_they_come_in():
    # Capacity 10 and 25 rows: 15 .. 24 are left, the next one goes to place 5
    algo = toy()
    insert = jax.jit(algo.insert)
    empty = algo.Ring(jax.tree.map(lambda x: jnp.zeros((10, *x.shape[1:])), numbered(0, 1)), jnp.int32(0))
    rings = []
    for sizes in ([1] * 25, [7, 7, 7, 4]):
        ring, first = empty, 0
        for number in sizes:
            ring, first = insert(ring, numbered(first, number, height=7), number), first + number
        rings.append(ring)
    for ring in rings:
        np.testing.assert_array_equal(ring.rows.reward, [20, 21, 22, 23, 24, 15, 16, 17, 18, 19])
        np.testing.assert_array_equal(ring.rows.next_obs[:, 0], ring.rows.reward)
        assert (ring.count, ring.count % 10, ring.size) == (25, 5, 10)


def test_a_padded_block_goes_past_the_end_and_writes_nothing_more():
    # Capacity 10, 8 rows, and 3 more in a block of height 4: places 8, 9 and 0; place 1 is untouched
    algo = toy()
    ring = algo.Ring(jax.tree.map(lambda x: jnp.full((10, *x.shape[1:]), -1.0), numbered(0, 1)), jnp.int32(8))
    ring = jax.jit(algo.insert)(ring, numbered(100, 3, height=4), 3)
    np.testing.assert_array_equal(ring.rows.reward, [102, -1, -1, -1, -1, -1, -1, -1, 100, 101])
    none = jax.jit(algo.insert)(ring, numbered(100, 0, height=4), 0)
    jax.tree.map(np.testing.assert_array_equal, none, ring)


def test_a_block_copies_no_ring():
    """Three runs on a device, with room for 100,000 rows each: the rewards, which a toy reads, are 0.4 MB of a run."""
    algo = toy()
    data, env = load_dataset(NAME)
    runs = algo.Runs(algo.Config(**(TINY | {"num_seeds": 3})), env.interface, {})
    rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, 100_000, *x.shape[1:]), x.dtype), data)
    ring = algo.Ring(rows, jax.ShapeDtypeStruct((3,), jnp.int32))
    update = runs.every(algo.learn, 1, {"dataset": P(), "ring": P("run")})
    given = (runs.init(), np.arange(3)), {"dataset": data, "ring": ring}
    assert update.lower(runs.fields, *given).compile().memory_analysis().temp_size_in_bytes < 2e5
    block = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, 5, *x.shape[1:]), x.dtype), data)
    add = jax.jit(jax.vmap(algo.insert), donate_argnums=0).lower(ring, block, ring.count).compile().memory_analysis()
    assert add.temp_size_in_bytes < 2e5 and add.alias_size_in_bytes > 3e6  # in place


def ring_of(algo, rows, capacity):
    empty = jax.tree.map(lambda x: jnp.full((capacity, *x.shape[1:]), jnp.nan), rows)
    return algo.insert(algo.Ring(empty, jnp.int32(0)), rows, len(rows.reward))


def test_every_row_of_the_union_is_equally_likely():
    # 9 rows of the data and 1 of its own in a ring of 5: a share of 0.1; the empty places are never drawn
    algo = toy()
    data, ring = numbered(0, 9), ring_of(algo, numbered(100, 1), 5)
    cfg = algo.Config(batch_size=20_000)
    batch = jax.jit(lambda key: algo.draw_online(key, (data, ring), None, cfg))(jax.random.key(0))
    drawn, count = np.unique(batch.reward, return_counts=True)
    np.testing.assert_array_equal(drawn, [*range(9), 100])
    np.testing.assert_allclose(count / 20_000, 0.1, atol=4 * np.sqrt(0.09 / 20_000))
    np.testing.assert_array_equal(batch.obs[:, 0], batch.reward)


def test_with_an_empty_ring_it_draws_as_it_does_offline():
    algo = toy()
    data, ring = numbered(0, 9), ring_of(algo, numbered(0, 1), 5)._replace(count=jnp.int32(0))
    cfg = algo.Config(batch_size=64)
    ours = algo.draw_online(jax.random.key(0), (data, ring), None, cfg)
    jax.tree.map(np.testing.assert_array_equal, ours, algo.draw(jax.random.key(0), data, None, cfg))


# --- What is stepped -------------------------------------------------------------------------------------


def plain_loop(name, seed, actions):
    """Rows (obs, reward, next_obs, terminal) of an environment stepped by hand, and the returns of its episodes."""
    env, interface = gymnasium.make(minari.load_dataset(name).env_spec), load_dataset(name)[1].interface
    rows, returns, obs = [], [], None
    for action in actions:
        if obs is None:
            start = np.random.SeedSequence((seed, len(returns), 1)).generate_state(1)[0]
            obs, total = env.reset(seed=int(start))[0], 0.0
        next_obs, reward, terminated, truncated, _ = env.step(interface.to_env(action))
        rows.append((obs, reward, next_obs, float(terminated)))
        total += reward
        obs = None if terminated or truncated else next_obs
        returns += [total] if obs is None else []
    return [np.array(x) for x in zip(*rows, strict=True)], returns


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, *train(toy(), out)


def test_rows_are_those_of_a_plain_loop_and_none_is_of_two_episodes(whole):
    _, _, lines, runs = whole
    seen = []
    for i, seed in enumerate((0, 1)):
        own = own_rows(runs, i)
        assert own.count == len(own.reward) == 40
        (obs, reward, next_obs, terminal), returns = plain_loop(NAME, seed, own.action)
        np.testing.assert_allclose(own.obs, obs, rtol=1e-6)
        np.testing.assert_allclose(own.reward, reward, rtol=1e-6)
        np.testing.assert_allclose(own.next_obs, next_obs, rtol=1e-6)
        np.testing.assert_array_equal(own.terminal, terminal)
        np.testing.assert_array_equal(own.next_obs[:, 1], own.obs[:, 1] + 1)  # Echo shows the step of its episode
        cut = (own.next_obs[:, 1] == 5) & (own.terminal == 0)
        assert 0 < cut.sum() < (own.obs[:, 1] == 0).sum(), "both kinds of an end are here, and a time-out is none"
        last = [line for line in lines if line["seed"] == seed][-1]
        assert (last["online_steps"], last["online_episodes"]) == (40, len(returns))
        np.testing.assert_allclose(last["regret"], np.mean([100 - 10 * x for x in returns]), rtol=1e-6)
        later = returns[lines[2 + i]["online_episodes"] :]  # lines: two at the switch, two after 20 steps, two after 40
        np.testing.assert_allclose(last["online_return"], np.mean(later), rtol=1e-6)
        seen.append(obs[0])
    assert not np.array_equal(*seen)


def test_rows_have_the_rewards_observations_and_actions_of_the_data(tmp_path, whole):
    """normalize_obs, normalize_reward and reward_shift, against a run without."""
    changed = dict(normalize_obs=True, normalize_reward=True, reward_shift=-1.0)
    _, _, runs = train(toy(changed), tmp_path)
    raw = load_dataset(NAME)[0]
    (obs, scale), returns = (raw.obs.mean(axis=0), raw.obs.std(axis=0) + 1e-3), raw.reward.reshape(8, 5).sum(axis=1)
    for i in range(2):
        ours, plain = own_rows(runs, i), own_rows(whole[-1], i)
        np.testing.assert_array_equal(ours.action, plain.action)
        assert np.abs(ours.action).max() <= 1 and np.ptp(ours.action[:, 0]) > 1
        np.testing.assert_allclose(ours.obs, (plain.obs - obs) / scale, rtol=1e-4)
        np.testing.assert_allclose(ours.next_obs, (plain.next_obs - obs) / scale, rtol=1e-4)
        np.testing.assert_allclose(ours.reward, plain.reward * 1000 / np.ptp(returns) - 1, rtol=1e-4)
    assert runs.interface.obs_mean == load_dataset(NAME, normalize_obs=True)[1].interface.obs_mean


def test_the_steps_of_a_block_have_the_policy_from_before_it(whole, tmp_path):
    """The second number of a toy's action is how often it had been updated, by 1000: 20 times at the switch."""
    for block, runs in ((5, whole[-1]), (1, train(toy(), tmp_path, online_block=1)[-1])):
        expect = 20 + np.arange(40) // block * block
        np.testing.assert_allclose(own_rows(runs, 0).action[:, 1], expect / 1000, rtol=1e-5)


def test_rows_are_in_the_ring_before_the_updates_of_their_block(tmp_path):
    """Here each update draws the newest row: with blocks of one step, that is the row just seen."""
    algo = toy()

    def newest(key, rows, state, cfg):
        dataset, ring = rows
        return ring.take(jnp.full(cfg.batch_size, ring.count - 1))

    algo.draw_online = newest
    _, _, runs = train(algo, tmp_path, online_block=1)
    np.testing.assert_array_equal(runs.states.drawn[0, 20:60, 0], own_rows(runs, 0).reward)


def test_updates_per_step_and_the_steps_before_the_first(tmp_path):
    _, lines, runs = train(toy(), tmp_path, online_start=15, updates_per_step=3)
    np.testing.assert_array_equal(runs.states.count, [20 + 3 * 25] * 2)
    actions = own_rows(runs, 0).action[:, 1]
    np.testing.assert_allclose(actions[:20], 20 / 1000, rtol=1e-5)  # steps 15 .. 19 are the first block with updates
    np.testing.assert_allclose(actions[20:25], (20 + 15) / 1000, rtol=1e-5)
    assert [line["step"] for line in lines[::2]] == [20, 40, 60]
    np.testing.assert_allclose(lines[2]["count"], 20 + 8, rtol=1e-5)  # of 15 updates, the mean of 1 .. 15


def test_learning_on_line_begins_with_the_offline_run_bit_for_bit(whole, tmp_path):
    """Offline nothing depends on what comes after, and nothing is drawn from the same keys."""
    _, lines, runs = train(toy(), tmp_path, online_steps=0)
    assert lines == whole[2][:2] and "online_steps" not in lines[0]
    np.testing.assert_array_equal(whole[-1].states.drawn[:, :20], runs.states.drawn[:, :20])


def test_the_ring_forgets_and_draws_what_it_holds(tmp_path):
    """Room for 12 rows and 40 steps: rows of the union are of the dataset or among the 12 newest."""
    algo = toy()
    _, _, runs = train(algo, tmp_path, buffer_size=12)
    own = own_rows(runs, 1)
    assert (own.count, len(own.reward)) == (40, 12)
    known = np.concatenate([load_dataset(NAME)[0].reward, own.reward])
    assert np.isin(np.asarray(runs.states.drawn[1, 55:60]), known).all()
    (_, reward, *_), _ = plain_loop(NAME, 1, own_rows(train(toy(), tmp_path / "all")[-1], 1).action)
    np.testing.assert_allclose(own.reward, reward[-12:], rtol=1e-6)


def test_evaluations_do_not_touch_the_environments_that_are_learned_from(whole, tmp_path):
    _, lines, runs = train(toy(), tmp_path, eval_episodes=3)
    assert lines[-1]["score"] is not None and whole[2][-1]["score"] is None
    for i in range(2):
        ours, plain = own_rows(runs, i), own_rows(whole[-1], i)
        np.testing.assert_array_equal(ours.next_obs, plain.next_obs)
        np.testing.assert_array_equal(ours.action, plain.action)


def test_each_run_alone_sees_what_it_sees_beside_others(whole, tmp_path):
    _, _, runs = train(toy(), tmp_path, seed=1, num_seeds=1)
    np.testing.assert_array_equal(own_rows(runs, 0).next_obs, own_rows(whole[-1], 1).next_obs)
    np.testing.assert_array_equal(runs.states.drawn[0], whole[-1].states.drawn[1])


# --- Rows that wait for the end of their episode -----------------------------------------------------------


def returns_to_go(rewards, terminal, discount=0.99):
    """The sum after each step; the published rule for episodes without success is that of algos/cal_ql.py."""
    to_go = [0.0]
    for reward in rewards[::-1]:
        to_go.append(reward + discount * to_go[-1])
    return np.array(to_go[:0:-1])


@pytest.mark.parametrize("saved", [False, True])
def test_labelled_rows_are_given_once_their_episode_has_finished(saved):
    # Clock ends after 3 steps; with rewards -5, -5, 5 and discount 0.99: -5.0495, -0.05, 5
    build("test/paid-v0", gymnasium.make("stitch-test/Clock-v0", terminate=3, rewards=(-5.0, -5.0, 5.0)))
    env = load_dataset("test/paid-v0")[1]
    stepper = Stepper(env, [0, 1], height=2 + 4, label=returns_to_go)
    given = []
    for _ in range(4):  # 2, 4, 6, 8 steps: 0, 1, 2 and 2 episodes
        rows, number = stepper.collect(lambda obs, t: np.zeros((2, 2), np.float32), 2)
        assert rows.reward.shape == (2, 6) and rows.obs.shape == (2, 6, 2)
        given.append(number.tolist())
        np.testing.assert_allclose(rows.return_to_go[0, : number[0]], [-5.0495, -0.05, 5.0][: number[0]], rtol=1e-5)
        np.testing.assert_array_equal(rows.terminal[0, : number[0]], [0, 0, 1][: number[0]])
        if saved:  # a new one, which knows what was saved
            kept = flax.serialization.msgpack_restore(flax.serialization.msgpack_serialize(stepper.save()))
            stepper.close()
            stepper = Stepper(env, [0, 1], height=6, label=returns_to_go, saved=kept)
    assert given == [[0, 0], [3, 3], [3, 3], [0, 0]]
    assert stepper.returns == [[-5.0, -5.0]] * 2 and stepper.steps == 8
    stepper.close()


def test_a_label_reaches_the_ring(tmp_path):
    def label(algo, cfg, spec, rewards, terminal):
        return np.arange(len(rewards)) + 100.0 * terminal

    algo = toy(dict(columns=("return_to_go",)), label=label)
    _, _, runs = train(algo, tmp_path, buffer_size=64)
    own = own_rows(runs, 0)
    assert own.count == len(own.reward) <= 40 and own.next_obs[-1, 1] >= 3, "the last episode is a whole one"
    ends = np.flatnonzero(np.append(own.obs[1:, 1] == 0, True))
    ending = ends[np.searchsorted(ends, np.arange(own.count))]  # the last row of each row's episode
    np.testing.assert_array_equal(own.return_to_go, own.obs[:, 1] + 100 * own.terminal[ending])


# --- Going on, and beginning as another run ----------------------------------------------------------------


class Killed(BaseException):
    pass


def assert_same_end(out, other):
    ours, theirs = (flax.serialization.msgpack_restore((x / "checkpoint.msgpack").read_bytes()) for x in (out, other))
    for name in ("step", "states", "metrics", "lines"):
        jax.tree.map(np.testing.assert_array_equal, ours[name], theirs[name])
    jax.tree.map(np.testing.assert_array_equal, ours["online"]["ring"], theirs["online"]["ring"])
    for name in ("steps", "returns", "actions"):
        jax.tree.map(np.testing.assert_array_equal, ours["online"]["stepper"][name], theirs["online"]["stepper"][name])
    assert (out / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("label", [False, True])
def test_a_run_killed_at_every_write_ends_with_the_same_bits(whole, tmp_path, monkeypatch, label):
    """In the middle of episodes, which are not saved but played again: 40 steps are no multiple of any length."""
    seams = {"label": lambda algo, cfg, spec, rewards, terminal: np.cumsum(rewards)} if label else {}
    options = dict(columns=("return_to_go",)) if label else {}
    other = whole[0]
    if label:
        other = tmp_path / "whole"
        train(toy(options, **seams), other)
    algo, torn = toy(options, **seams), []
    write = algo.write

    def killed(path, *parts):
        what = path.name, len(parts[0]) if path.name == "checkpoint.msgpack" else len(parts)
        if path.name in ("checkpoint.msgpack", "metrics.jsonl") and what not in torn:
            torn.append(what)
            raise Killed
        write(path, *parts)

    monkeypatch.setattr(algo, "write", killed)
    for _ in range(6):
        with pytest.raises(Killed):
            train(algo, tmp_path / "out")
    train(algo, tmp_path / "out")
    assert len(torn) == 6
    assert_same_end(tmp_path / "out", other)


def test_it_may_begin_as_a_finished_run(whole, tmp_path):
    """The same as both phases in one folder, and config.json says which run that was."""
    algo, offline, out = toy(), tmp_path / "offline", tmp_path / "out"
    train(algo, offline, online_steps=0)
    summary, lines, _ = train(algo, out, init=str(offline))
    assert lines == whole[2] and summary["num_updates"] == 60
    assert_same_end(out, whole[0])
    about = json.loads((out / "config.json").read_text())["config"]
    assert about["init"] == str(offline) and len(about["data"]["init"]) == 32
    train(algo, tmp_path / "other", online_steps=0, num_updates=40)
    _, lines, _ = train(
        algo, tmp_path / "out2", init=str(tmp_path / "other")
    )  # more updates than num_updates: as it is
    assert [line["step"] for line in lines[::2]] == [20, 40, 60, 80] and lines[-1]["online_steps"] == 40
    other = json.loads((tmp_path / "out2" / "config.json").read_text())["config"]
    assert other["data"]["init"] != about["data"]["init"]


def test_without_offline_updates(tmp_path):
    summary, lines, runs = train(toy(), tmp_path, num_updates=0)
    assert [line["step"] for line in lines[::2]] == [20, 40] and summary["num_updates"] == 40
    np.testing.assert_array_equal(runs.states.count, [40, 40])
    assert summary["simulator_seconds"] > 0 and summary["policy_seconds"] > 0 and summary["train_seconds"] > 0


# --- What is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"updates_per_step": 0}, "updates_per_step must be from 1"),
        ({"online_steps": -1}, "online_steps must be from 0"),
        ({"online_steps": 30}, "online_steps must be a multiple of eval_interval, which is 20"),
        ({"online_start": 3}, "online_start must be a multiple of online_block, which is 5"),
        ({"online_block": 8}, "eval_interval must be a multiple of online_block, which is 8"),
        ({"online_block": 0}, "online_block must be from 1"),
        ({"buffer_size": 9}, "buffer_size must be at least 10, an episode of test/echo-v0 and an online_block"),
        ({"num_updates": 0, "online_steps": 0}, "num_updates must be from 1"),
        ({"init": "nowhere"}, "nowhere"),
    ],
)
def test_bad_numbers_are_one_sentence_before_any_compilation(tmp_path, monkeypatch, changes, said):
    algo = toy()
    monkeypatch.setattr(algo, "Runs", None)
    assert said in sentence(train, algo, tmp_path, **changes)
    assert not (tmp_path / "config.json").exists()


def test_a_cycle_must_fit_into_a_block(tmp_path):
    algo = toy()
    algo.Config = dataclasses.make_dataclass("Config", [("policy_delay", int, 2)], bases=(algo.Config,), frozen=True)
    assert "online_block * updates_per_step must be a multiple of policy_delay" in sentence(train, algo, tmp_path)


def test_without_an_environment_it_cannot_learn_on_line(tmp_path, monkeypatch):
    algo = toy()
    monkeypatch.setattr(algo, "Runs", None)
    build("test/other-v0", gymnasium.make("stitch-test/Echo-v0", **ECHO))
    metadata = get_dataset_path("test/other-v0") / "data" / "metadata.json"
    about = json.loads(metadata.read_text())
    spec = json.loads(about["env_spec"])
    spec["kwargs"] = dict(low=-1.0, high=2.0)  # an environment of other spaces
    metadata.write_text(json.dumps(about | {"env_spec": json.dumps(spec)}))
    said = sentence(train, algo, tmp_path, dataset="test/other-v0")
    assert said.startswith("Learning on-line needs the environment of test/other-v0") and "its actions are Box" in said
    metadata.write_text(json.dumps(about | {"env_spec": None}))
    assert "names none" in sentence(train, algo, tmp_path, dataset="test/other-v0")


def test_a_run_that_does_not_fit_cannot_be_begun_as(tmp_path):
    algo, offline = toy(), tmp_path / "offline"
    train(algo, offline, online_steps=0)
    begin = dict(init=str(offline))
    assert "it has another seed" in sentence(train, algo, tmp_path / "x", seed=1, **begin)
    assert "it has another num_seeds" in sentence(train, algo, tmp_path / "x", num_seeds=1, **begin)
    normalised = toy(dict(normalize_obs=True))
    assert "it has another interface" in sentence(train, normalised, tmp_path / "x", **begin)
    train(algo, tmp_path / "online")
    assert "it has another online_steps" in sentence(train, algo, tmp_path / "x", init=str(tmp_path / "online"))
    (offline / "summary.json").unlink()
    assert "it is none" in sentence(train, algo, tmp_path / "x", **begin)


def test_an_environment_that_fails_is_a_sentence_and_the_same_command_goes_on(whole, tmp_path, monkeypatch):
    ask, calls = Environment._ask, itertools.count()

    def fails(self, workers, messages):
        if messages[0][0] == "step" and next(calls) == 25:
            raise EnvironmentFailure("the simulator has lost its licence")
        return ask(self, workers, messages)

    with monkeypatch.context() as context:
        context.setattr(Environment, "_ask", fails)
        said = sentence(train, toy(), tmp_path)
    assert "at step 2" in said and "lost its licence" in said and "the same command goes on" in said
    train(toy(), tmp_path)
    assert_same_end(tmp_path, whole[0])


def test_actions_that_are_no_numbers_do_not_reach_the_environment(tmp_path):
    nowhere = toy(explore=lambda *args: explore(*args) * jnp.nan)
    _, _, runs = train(nowhere, tmp_path)
    assert np.all(own_rows(runs, 0).action == 0) and np.isfinite(own_rows(runs, 0).reward).all()


# --- Known answers -----------------------------------------------------------------------------------------


LEARN_ON_LINE = [path.stem for path in (ROOT / "algos").glob("*.py") if "# --- Online: the same" in path.read_text()]
UNION = {"iql", "awac", "cql", "td3_bc", "qt_opt", "sac_n", "spot"}  # others: a share of the data


def test_every_file_draws_the_union_or_equal_shares_and_the_texts_of_either_are_the_same():
    def draws(name):
        return inspect.getsource(load(name).draw_online)

    assert {name for name in LEARN_ON_LINE if draws(name) == draws("iql")} == UNION
    assert {name for name in LEARN_ON_LINE if draws(name) == draws("cal_ql")} == set(LEARN_ON_LINE) - UNION


@pytest.mark.parametrize("name", sorted(set(LEARN_ON_LINE) - UNION))
def test_half_of_each_batch_is_of_the_data(name):
    algo, data, ring = load(name), numbered(0, 50), ring_of(load(name), numbered(100, 3), 8)
    cfg = algo.Config(batch_size=256)

    @jax.jit
    def draw(key, ring, ratio):
        return algo.draw_online(key, (data, ring), None, dataclasses.replace(cfg, offline_ratio=ratio))

    for seed in range(20):
        batch = draw(jax.random.key(seed), ring, 0.5)
        assert (batch.reward < 50).sum() == 128 and set(np.asarray(batch.reward[128:]).tolist()) == {100, 101, 102}
        np.testing.assert_array_equal(batch.obs[:, 0], batch.reward)
    assert (draw(jax.random.key(0), ring, 0.0).reward >= 100).all()
    assert (draw(jax.random.key(0), ring, 0.3).reward < 50).sum() == 76  # floor(0.3 * 256)
    offline = algo.draw(jax.random.key(0), data, None, cfg)
    for ours in (draw(jax.random.key(0), ring, 1.0), draw(jax.random.key(0), ring._replace(count=jnp.int32(0)), 0.5)):
        jax.tree.map(np.testing.assert_array_equal, ours, offline)


def agent_and_state(name, **changes):
    algo, spec = load(name), Spec(3, 2)
    cfg = algo.Config(hidden=(8,), online_steps=1000, **changes)
    agent = algo.make_agent(cfg, spec)
    return agent, jax.jit(agent.init)(jax.random.key(0))


@pytest.mark.parametrize("name", LEARN_ON_LINE)
def test_how_it_explores(name):
    """A sample of the policy where there is one, noise of the stated deviation elsewhere; RLPD at first anything."""
    agent, state = agent_and_state(name)
    obs, key = jax.random.normal(jax.random.key(1), (1, 3)), jax.random.key(2)
    if hasattr(agent, "policy"):
        pi = agent.policy(state, obs)
        expect = pi.sample(jax.random.split(key)[1] if name == "rlpd" else key)
        np.testing.assert_array_equal(agent.explore(state, obs, key, 10_000), expect)
    else:
        sigma, inside = 0.01, {"init_std": 0.1} if name == "qt_opt" else {}  # so that nothing is clipped
        agent, state = agent_and_state(name, exploration_noise=sigma, **inside)
        silent, _ = agent_and_state(name, exploration_noise=0.0, **inside)
        keys = jax.random.split(key, 2000)
        noise = jax.vmap(lambda key: agent.explore(state, obs, key, 0) - silent.explore(state, obs, key, 0))(keys)
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, sigma], atol=0.1 * sigma)
        mode = silent.act(state, obs, jax.random.split(key)[1] if name == "qt_opt" else key)
        np.testing.assert_allclose(silent.explore(state, obs, key, 0), mode, atol=1e-6)


class Table(NamedTuple):
    key: Any
    q: Any  # (states, actions)


def q_learning(discount, rate):
    def update(state, batch):
        s, s_next = batch.obs.argmax(axis=-1), batch.next_obs.argmax(axis=-1)
        target = batch.reward + discount * (1 - batch.terminal) * state.q[s_next].max(axis=-1)
        step = jnp.zeros_like(state.q).at[s, batch.action].add(rate * (target - state.q[s, batch.action]))
        return state._replace(q=state.q + step), {"q": state.q.mean()}

    return types.SimpleNamespace(update=update)


def learned(algo, agent, q, data, ring, number, updates, **changes):
    """The table after `updates`, of a run that has seen the first `number` of the rows `ring` itself.

    It is the second of two on its device; the other one has seen nothing but NaN.
    """
    cfg = algo.Config(batch_size=64, online_block=updates, updates_per_step=1, **changes)
    empty = jax.tree.map(lambda x: jnp.zeros((100, *x.shape[1:]), x.dtype), ring)
    own = algo.insert(algo.Ring(empty, jnp.int32(0)), ring, number)
    other = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0), own)
    both = jax.tree.map(lambda *of_runs: jnp.stack(of_runs), other, own)
    state = Table(jax.random.key(1), jnp.asarray(q, jnp.float32))
    (state, _), _ = jax.jit(partial(algo.learn, cfg, agent))(state, 1, data, both)
    return np.asarray(state.q)


@pytest.mark.parametrize("number, union", [(1, 0.1), (9, 0.5), (90, 90 / 99)])
@pytest.mark.parametrize("name", ["iql", "cal_ql"])
def test_rewards_that_contradict_each_other_show_the_share_of_either(name, number, union):
    # One state, one action, discount 0: 9 rows pay 0, and as many as `number` of its own pay 1. Q is their mean, or 1/2
    # whatever the number where a batch has equal shares
    algo, one = load(name), jnp.ones((90, 1))
    rows = Transition(one, jnp.zeros(90, int), jnp.ones(90), one, jnp.ones(90))
    data = jax.tree.map(lambda x: x[:9], rows)._replace(reward=jnp.zeros(9))
    q = learned(algo, q_learning(0.0, 0.0002), [[0.0]], data, rows, number, 3000)
    np.testing.assert_allclose(q, 0.5 if name == "cal_ql" else union, atol=0.02)


def test_one_row_of_its_own_opens_what_the_data_never_tried():
    # M2: discount 0.9; s0: a0 -> s0, 0; a1 -> s1, 1; s1: a0 -> s0, 2; a1 -> s1, 0. Without (s0, a1), and with its value
    # at 0, Q = 0, 2, 1.8; with one row of it, Q* = 13.2632, 14.7368, 15.2632, 13.7368, however rare that row is
    algo, agent = toy(), q_learning(0.9, 0.02)
    s, a = jnp.array([0, 1, 1]), jnp.array([0, 0, 1])
    eye, r = jnp.eye(2), jnp.array([0.0, 2.0, 0.0])
    data = Transition(eye[s], a, r, eye[jnp.array([0, 0, 1])], jnp.zeros(3))
    row = Transition(eye[:1], jnp.array([1]), jnp.ones(1), eye[1:], jnp.zeros(1))
    before = learned(algo, agent, np.zeros((2, 2)), data, row, 0, 1000)
    np.testing.assert_allclose(before, [[0, 0], [2, 1.8]], atol=1e-3)
    after = learned(algo, agent, before, data, row, 1, 3000)
    np.testing.assert_allclose(after, [[13.2632, 14.7368], [15.2632, 13.7368]], atol=1e-3)
    same = learned(algo, agent, before, data, row, 0, 3000)
    np.testing.assert_allclose(same, before, atol=1e-3)


def test_a_time_out_keeps_its_bootstrap(tmp_path):
    # Clock without an end pays 1 and is cut after 4 steps: with discount 0.9 Q = 10, and not 3.439, the sum of 4
    build("test/endless-v0", gymnasium.make("stitch-test/Clock-v0"))
    env = load_dataset("test/endless-v0")[1]
    stepper = Stepper(env, [0], height=8)
    rows, number = stepper.collect(lambda obs, t: np.zeros((1, 2), np.float32), 8)
    stepper.close()
    rows = jax.tree.map(lambda x: x[0], rows)
    np.testing.assert_array_equal(rows.terminal, np.zeros(8))
    np.testing.assert_array_equal(rows.next_obs[:, 0], [1, 2, 3, 4] * 2)
    np.testing.assert_array_equal(rows.obs[:, 0], [0, 1, 2, 3] * 2)
    eye = jnp.eye(5)
    rows = rows._replace(obs=eye[rows.obs[:, 0].astype(int)], next_obs=eye[rows.next_obs[:, 0].astype(int) % 4])
    rows = rows._replace(action=jnp.zeros(8, int))
    q = learned(toy(), q_learning(0.9, 0.05), np.zeros((5, 1)), rows, rows, 8, 2000)
    np.testing.assert_allclose(q[:4], 10, atol=0.01)
