"""The run contract: what a run leaves, whom it belongs to, how it goes on after a kill, and how its policy acts.

Real files of algos/, on tests/payer.py. Each program is compiled once for all tests (`load`); where what an evaluation
does is not the question, `staged` stands in for the environment.
"""

import dataclasses
import errno
import importlib
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import filelock
import flax
import jax
import numpy as np
import payer
import pytest
from conftest import EVALUATORS, GOALS

from common.environments import Environment, Interface

ROOT = pathlib.Path(__file__).parents[1]
TINY = dict(
    dataset=payer.NAME, num_updates=40, eval_interval=20, log_interval=10, eval_episodes=2, batch_size=16, num_seeds=2
)
FILES = {"config.json", "metrics.jsonl", "checkpoint.msgpack", "summary.json", "lock"}
SUMMARY = {
    "algo", "dataset", "num_updates", "seeds", "grid", "returns", "diverged",
    "score_per_seed", "score_mean", "score_std", "score_kind",
    "updates_per_second", "compile_seconds", "train_seconds", "eval_seconds", "device", "command", "commit", "versions",
}  # fmt: skip
PHASES = {
    "iql": {},
    "brac": dict(pretrain_updates=40, target_divergence=0.5),
    "bear": dict(pretrain_updates=20, num_samples=2),
}
BOX = {"low": [-2.0], "high": [3.0], "dtype": "float32"}  # of Payer's actions

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """The dataset, in a Minari root of this module's own, and what `load` changes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # of the processes that are started here
        monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        payer.build()
        load.monkeypatch = monkeypatch
        yield


def load(name):
    """The module, whose `Runs` compile equal programs once: a run that goes on does not compile again."""
    algo, programs = importlib.import_module(f"algos.{name}"), {}
    every, lower = algo.Runs.every, algo.Runs.lower
    if every.__name__ == "kept":
        return algo

    def key(self, *more):
        cfg = dataclasses.replace(self.cfg, out="", dataset="", eval_episodes=0, eval_steps=0)
        return cfg, str(self.interface), tuple(map(str, self.fields.values())), *more

    def kept(self, function, donate=()):
        at = key(self, function.__code__, function.__closure__ and str(function.__closure__[0].cell_contents))
        if at not in programs:
            programs[at] = every(self, function, donate)
        return programs[at]

    def lowered(self, phase, shared):
        at = key(self, phase)
        if at not in programs:
            programs[at] = lower(self, phase, shared).compile()
        return SimpleNamespace(compile=lambda: programs[at])

    load.monkeypatch.setattr(algo.Runs, "every", kept)
    load.monkeypatch.setattr(algo.Runs, "lower", lowered)
    return algo


@pytest.fixture
def staged(monkeypatch):
    """Evaluations that ask the policy at four points, twice, and play nothing; its actions are the returns."""

    def measure(self, policy, q, seeds, num_episodes, discount=1.0, max_steps=0):
        obs = np.linspace(-1, 1, num=len(seeds) * num_episodes * 2, dtype=np.float32)
        obs, memory = obs.reshape(len(seeds), num_episodes, 2), None
        for step in range(2):
            actions, memory = policy(obs, step, memory, np.zeros(obs.shape[:2], np.float32))
        returns = np.asarray(actions, np.float64).reshape(len(seeds), num_episodes, -1).sum(axis=-1)
        columns = {"score": returns.mean(axis=1), "returns": returns}
        return columns if q is None else columns | {"believed_value": np.asarray(q(obs, actions)).mean(axis=1)}

    monkeypatch.setattr(Environment, "measure", measure)
    monkeypatch.setattr(Environment, "probe", lambda self, wanted=True: True)
    monkeypatch.setattr(Environment, "score_kind", "staged")


def config(algo, out="", **changes):
    fields = {field.name for field in dataclasses.fields(algo.Config)}
    small = {name: (4,) for name in fields if name.endswith("hidden")}
    small |= {"pretrain_updates": 20} if "pretrain_updates" in fields else {}
    small |= {"prepare_interval": 10} if "prepare_interval" in fields else {}
    return algo.Config(**(TINY | small | changes), out=str(out))


def run(name, out, grid=None, **changes):
    algo = load(name)
    return algo.main(config(algo, out, **PHASES.get(name, {}) | changes), grid)


def strictly(text):
    """The value of a JSON text; NaN and infinities, which Python's parser takes, are no JSON."""

    def no_json(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=no_json)


def lines(out):
    return [strictly(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def checkpoint(out):
    return flax.serialization.msgpack_restore((out / "checkpoint.msgpack").read_bytes())


def flatten(tree, path=()):
    if isinstance(tree, dict):
        return {name: x for key, value in tree.items() for name, x in flatten(value, (*path, key)).items()}
    return {"/".join(map(str, path)): tree}


def assert_same_end(out, whole):
    """Every array of the checkpoint and every byte of the metrics."""
    ours, theirs = (flatten(checkpoint(x)["states"]) for x in (out, whole))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)
    assert (out / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "lock"}


def copy(whole, out, without=()):
    shutil.copytree(whole, out, ignore=lambda folder, names: without)
    return out


def sentence(call, *args, **kwargs):
    """What the user reads where `call` refuses: one sentence, with status 1."""
    with pytest.raises((SystemExit, KeyboardInterrupt)) as error:
        call(*args, **kwargs)
    assert (
        error.type is not KeyboardInterrupt
        and isinstance(error.value.code, str)
        and "\n" not in error.value.code
        and error.value.code.endswith(".")
    )
    assert len(error.value.code) < 1500
    return error.value.code


@pytest.fixture(scope="module")
def finished(surroundings, tmp_path_factory):
    """IQL, evaluated in the environment itself."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run("iql", out)


@pytest.fixture
def unfinished(finished, tmp_path):
    """All of it but the summary: the same command goes on from here."""
    return copy(finished[0], tmp_path / "unfinished", without={"summary.json"})


# --- What a run leaves -----------------------------------------------------------------------------------


def test_a_run_leaves_what_it_says(finished):
    out, summary = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert summary.keys() == SUMMARY and strictly((out / "summary.json").read_text()) == summary
    assert (summary["algo"], summary["dataset"], summary["num_updates"]) == ("iql", payer.NAME, 40)
    assert summary["seeds"] == [0, 1] and summary["grid"] == [{}, {}] and summary["diverged"] == [False, False]
    assert [(line["step"], line["seed"]) for line in lines(out)] == [(20, 0), (20, 1), (40, 0), (40, 1)]
    columns = {"step", "seed", "grid", "score", "returns", "believed_value", "true_value", "diverged"}
    assert all(columns | {"actor_loss", "critic_loss", "value_loss", "q"} <= line.keys() for line in lines(out))
    about = strictly((out / "config.json").read_text())
    assert about.keys() == {"config", "interface", "command", "commit", "versions", "device"}
    assert about["config"]["algo"] == "iql" and about["config"]["batch_size"] == 16 and about["config"]["out"] == ""
    assert about["config"]["data"]["rows"] == 80 and about["versions"]["jax"] and about["device"].endswith("x cpu")


def test_the_score_is_that_of_the_last_evaluation_between_the_reference_scores(finished):
    # Reference scores -8 and 12. The spread is that of the scores: put through the map of the mean, it would be shifted
    summary, last = finished[1], lines(finished[0])[-2:]
    assert summary["score_kind"] == "normalised by the dataset's reference scores"
    assert summary["returns"] == [line["returns"] for line in last] and np.shape(summary["returns"]) == (2, 2)
    scores = [100 * (np.mean(line["returns"]) + 8) / 20 for line in last]
    assert len(set(scores)) == 2
    np.testing.assert_allclose(summary["score_per_seed"], scores)
    np.testing.assert_allclose([line["score"] for line in last], scores)
    np.testing.assert_allclose([summary["score_mean"], summary["score_std"]], [np.mean(scores), np.std(scores)])


def test_without_reference_scores_the_score_is_the_return(finished, tmp_path):
    payer.build("test/raw-v0", reference=None)
    summary = run("iql", tmp_path, dataset="test/raw-v0")
    assert summary["score_kind"] == "raw return"
    np.testing.assert_allclose(summary["score_per_seed"], np.mean(summary["returns"], axis=1))


def test_the_last_lines_say_the_score_and_how_to_draw_it(staged, unfinished, capsys):
    summary = run("iql", unfinished)
    *_, score, folder = capsys.readouterr().out.splitlines()
    assert score.startswith(f"iql on {payer.NAME}: score {summary['score_mean']:.1f} +- {summary['score_std']:.1f}")
    assert folder.endswith(f"python benchmarks/plot.py {unfinished}")


def test_what_is_written_is_strict_json_and_whole_or_not_at_all(tmp_path, monkeypatch):
    iql, path = load("iql"), tmp_path / "file.jsonl"
    iql.write(path, {"a": np.float32("nan"), "b": np.array([np.inf, 1.5])}, {"c": np.bool_(True), "d": (np.int32(3),)})
    assert [strictly(x) for x in path.read_text().splitlines()] == [
        {"a": None, "b": [None, 1.5]},
        {"c": True, "d": [3]},
    ]

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        iql.write(path, b"new")
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def labels(surroundings):
    """Data whose actions are 0, 1 and 2, for files that take no others."""
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    rng, ends = np.random.default_rng(0), np.zeros((2, 4), bool)
    ends[1, -1] = True
    rows = [(rng.uniform(-1, 1, (5, 2)), rng.integers(3, size=4), rng.uniform(0, 1, 4)) for _ in range(20)]
    rows = [EpisodeBuffer(None, None, None, obs, actions, rewards, *ends) for obs, actions, rewards in rows]
    shown, taken = spaces.Box(-np.inf, np.inf, (2,)), spaces.Discrete(3)
    minari.create_dataset_from_buffers("test/labels-v0", rows, observation_space=shown, action_space=taken)
    return "test/labels-v0"


@pytest.fixture
def unplayed(staged, monkeypatch):
    """Evaluations that only trace what the policy and its values compute: nothing more is compiled."""

    def measure(self, policy, q, seeds, num_episodes, **limits):
        spec = self.interface.spec
        obs = np.zeros((len(seeds), num_episodes, spec.obs_dim + spec.goal_dim), np.float32)
        actions, _ = jax.eval_shape(lambda: policy(obs, 0, None, obs[..., 0]))
        assert actions.shape[:2] == obs.shape[:2]
        value = {} if q is None else {"believed_value": np.zeros(jax.eval_shape(lambda: q(obs, actions)).shape[:1])}
        return {"score": np.zeros(len(seeds)), "returns": np.zeros((len(seeds), num_episodes)), **value}

    monkeypatch.setattr(Environment, "measure", measure)


@pytest.mark.parametrize(
    "name", sorted({p.stem for p in (ROOT / "algos").glob("*.py") if "\ndef main(" in p.read_text()} - EVALUATORS)
)
def test_every_file_trains_and_goes_on_after_a_stop(name, unplayed, labels, tmp_path, monkeypatch):
    """Its own load_data, `main`, checkpoint and restore; a stop between the two ends as no stop."""
    algo, changes = load(name), {"num_members": 3, "num_elites": 2, "horizon": 2, "rollout_batch_size": 8}
    changes |= {"buffer_size": 64, "policy_delay": 2}
    changes = {field: x for field, x in changes.items() if hasattr(algo.Config, field)} | {"num_seeds": 1}
    try:
        spec = Interface([2], BOX, [0.0, 0.0], [1.0, 1.0]).spec
        algo.make_agent(config(algo), spec._replace(goal_dim=2 if name in GOALS else 0))
    except SystemExit:
        changes["dataset"] = labels
    if name == "emrl":
        changes["reward_shift"] = 5.0  # no weight may be negative
    whole, stopped, evaluate = tmp_path / "whole", tmp_path / "stopped", algo.Runs.evaluate
    assert run(name, whole, **changes)["num_updates"] == 40

    def interrupted(self, *args):
        if self.step == 20:
            raise KeyboardInterrupt
        return evaluate(self, *args)

    with monkeypatch.context() as stop:
        stop.setattr(algo.Runs, "evaluate", interrupted)
        assert "Stopped" in sentence(run, name, stopped, **changes)
    assert run(name, stopped, **changes)["num_updates"] == 40 and checkpoint(stopped)["step"] == 40
    assert [line["step"] for line in lines(stopped) if line["step"] > 0] == [20, 40]
    assert_same_end(stopped, whole)


# --- Whose folder it is ----------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(finished, capsys):
    out, summary = finished
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "lock"}
    assert run("iql", out) == summary and "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("changes", [{"beta": 1.0}, {"num_seeds": 1}, {"seed": 1}, {"num_updates": 60}])
def test_a_folder_of_another_configuration_is_refused(unfinished, changes):
    before = contents(unfinished)
    assert "something else" in sentence(run, "iql", unfinished, **changes)
    assert "something else" in sentence(run, "iql", unfinished, grid={"beta": [10.0]})
    assert contents(unfinished) == before


def test_a_folder_of_other_data_under_the_same_name_is_refused(staged, tmp_path):
    """Whether that run has finished or not. The same data, recorded anew, are the same."""
    name, finished, stopped = "test/renewed-v0", tmp_path / "finished", tmp_path / "stopped"
    payer.build(name)
    run("iql", finished, dataset=name)
    copy(finished, stopped, without={"summary.json"})
    before = contents(finished), contents(stopped)
    payer.build(name, offset=0.5)
    for out in (finished, stopped):
        assert "something else" in sentence(run, "iql", out, dataset=name)
    assert (contents(finished), contents(stopped)) == before
    payer.build(name)
    assert run("iql", finished, dataset=name) and run("iql", stopped, dataset=name)


def test_one_process_at_a_time_holds_a_folder(staged, unfinished):
    code = """if True:
        import filelock, sys
        with filelock.FileLock(sys.argv[1]):
            print("held", flush=True)
            sys.stdin.read()
    """
    holder = [sys.executable, "-c", code, str(unfinished / "lock")]
    process = subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        before = contents(unfinished)
        assert "in use" in sentence(run, "iql", unfinished)
        assert contents(unfinished) == before
        load("iql").restore(unfinished)  # who only acts needs no lock
    finally:
        process.communicate()
    assert run("iql", unfinished)["num_updates"] == 40
    with filelock.FileLock(unfinished / "lock", timeout=0):  # given back
        pass


@pytest.fixture(scope="module")
def damages(finished):
    """{what has happened: (file, its content)}; each makes a run that cannot go on."""
    out, pack = finished[0], flax.serialization.msgpack_serialize
    about, saved = (out / "config.json").read_bytes(), (out / "checkpoint.msgpack").read_bytes()
    parts = checkpoint(out)
    other = strictly(about)
    other["config"] = {name: x for name, x in other["config"].items() if name != "expectile"} | {"algo": "bc"}
    table = {
        f"config.json holds {text}": ("config.json", text) for text in (b"", b"[]", b"null", b"{}", b"\xff\0", b"7")
    }
    table |= {"config.json torn": ("config.json", about[: len(about) // 2])}
    table |= {"config.json of another algorithm": ("config.json", json.dumps(other).encode())}
    table |= {
        f"checkpoint holds {x}": ("checkpoint.msgpack", x) for x in (b"", b"junk", pack([1, 2]), pack({}), pack(3))
    }
    table |= {f"checkpoint cut at {i}": ("checkpoint.msgpack", saved[:i]) for i in (1, len(saved) // 2, len(saved) - 1)}
    for name in parts:
        table[f"checkpoint without {name}"] = (
            "checkpoint.msgpack",
            pack({k: x for k, x in parts.items() if k != name}),
        )
    states = parts["states"]
    changed = {"another algorithm": {name: x for name, x in states.items() if name != "value"}}
    changed |= {"fewer seeds": jax.tree.map(lambda x: x[:1], states)}
    changed |= {"more seeds": jax.tree.map(lambda x: np.concatenate([x, x[:1]]), states)}
    changed |= {"wider layers": jax.tree.map(lambda x: np.repeat(x, 2, axis=-1) if x.ndim > 2 else x, states)}
    changed |= {"other dtypes": jax.tree.map(lambda x: x.astype(np.float64), states)}
    for what, states in changed.items():
        table[f"checkpoint of {what}"] = ("checkpoint.msgpack", pack({**parts, "states": states}))
    return table


def test_damaged_files_are_one_sentence_each_and_nothing_is_overwritten(damages, unfinished):
    for what, (name, content) in damages.items():
        untouched = (unfinished / name).read_bytes()
        (unfinished / name).write_bytes(content)
        before = contents(unfinished)
        try:
            assert str(unfinished) in sentence(run, "iql", unfinished)
            assert contents(unfinished) == before
            assert str(unfinished) in sentence(load("iql").restore, unfinished)
        except BaseException as error:
            error.add_note(what)
            raise
        (unfinished / name).write_bytes(untouched)
    (unfinished / "config.json").unlink()
    before = contents(unfinished)
    assert "something else" in sentence(run, "iql", unfinished) and contents(unfinished) == before


def test_what_follows_from_the_checkpoint_is_written_anew_where_it_is_damaged(finished, tmp_path):
    whole, summary = finished
    for i, content in enumerate([b"", b"[]", b'{"algo": "iq', b"null", (whole / "config.json").read_bytes()]):
        out = copy(whole, tmp_path / str(i))
        (out / "summary.json").write_bytes(content)
        (out / "metrics.jsonl").write_bytes(content)
        again = run("iql", out)
        assert_same_end(out, whole)
        assert {k: x for k, x in again.items() if "second" not in k} == {
            k: x for k, x in summary.items() if "second" not in k
        }


def test_an_output_folder_that_cannot_be_written_is_said_before_any_compilation(tmp_path, monkeypatch):
    iql = load("iql")
    monkeypatch.setattr(iql.Runs, "lower", None)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        assert str(out) in sentence(run, "iql", out)
    assert (tmp_path / "file").read_text() == "mine"
    for code in (errno.ENOSPC, errno.EROFS, errno.EACCES):

        def write(path, *parts, code=code):
            raise OSError(code, os.strerror(code), str(path))

        monkeypatch.setattr(iql, "write", write)
        assert os.strerror(code) in sentence(run, "iql", tmp_path / str(code))


def test_a_disk_that_fills_up_while_training_is_a_sentence(staged, unfinished, monkeypatch):
    write = load("iql").write

    def full(path, *parts):
        if path.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, *parts)

    monkeypatch.setattr(load("iql"), "write", full)
    before = contents(unfinished)
    assert "No space left" in sentence(run, "iql", unfinished)
    assert contents(unfinished) == before


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": 0}, "batch_size must be from 1"),
        ({"num_seeds": -1}, "num_seeds must be from 1"),
        ({"num_seeds": 0}, "num_seeds must be from 1"),
        ({"hidden": (8, 0)}, "hidden must be from 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**32}, "seed must be from 0"),  # cut to 32 bits it is seed 0
        ({"seed": 2**31 - 1, "num_seeds": 2}, "seed"),
        ({"eval_episodes": -1}, "eval_episodes must be from 0"),
        ({"eval_steps": -1}, "eval_steps must be from 0"),
        ({"num_updates": 0}, "num_updates must be from 1"),
        ({"num_updates": 30}, "num_updates must be a multiple of eval_interval, which is 20"),
        ({"log_interval": 3}, "eval_interval must be a multiple of log_interval, which is 3"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"beta": float("inf")}, "beta must be a finite number"),
        ({"reward_shift": 1e39}, "reward_shift must be a finite number"),
        ({"num_updates": "many"}, "num_updates must be int, not 'many'"),
        ({"num_updates": 40.0}, "num_updates must be int, not 40.0"),
        ({"batch_size": None}, "batch_size must be int, not None"),
        ({"hidden": 8}, "hidden must be tuple[int, ...], not 8"),
        ({"hidden": (8, "8")}, "hidden must be tuple[int, ...], not (8, '8')"),
        ({"beta": "10"}, "beta must be float, not '10'"),
        ({"normalize_reward": "no"}, "normalize_reward must be bool, not 'no'"),
        ({"act": "samples"}, "act must be Literal['mode', 'sample'], not 'samples'"),
        ({"dataset": None}, "dataset must be str, not None"),
    ],
)
def test_bad_numbers_are_one_sentence_before_the_data_are_read(tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(load("iql"), "load_data", lambda cfg: pytest.fail("the data were read"))
    assert said in sentence(run, "iql", tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_bad_numbers_of_some_files_and_of_grids(tmp_path, monkeypatch):
    for name in ("iql", "brac", "td3_bc", "awr"):
        monkeypatch.setattr(load(name), "load_dataset", lambda *args, **options: pytest.fail("the data were read"))
    for value in (float("nan"), float("-inf")):
        assert "beta must be a finite number" in sentence(run, "iql", tmp_path / "x", grid={"beta": [1.0, value]})
    assert "pretrain_updates must be a multiple" in sentence(run, "brac", tmp_path / "x", pretrain_updates=30)
    assert "log_interval must be a multiple of policy_delay" in sentence(run, "td3_bc", tmp_path / "x", policy_delay=3)
    assert "multiple of prepare_interval" in sentence(run, "awr", tmp_path / "x", prepare_interval=20)
    for values in (["x"], [1.0, "x"], [1.0, None], "10", 10.0, None, np.array([1.0])):
        assert "beta must be list[float], not" in sentence(run, "iql", tmp_path / "x", grid={"beta": values})
    for name, value in {"no_such_field": 1.0, "batch_size": 8, "reward_shift": 0.0, "act": "mode"}.items():
        assert f"not so {name}" in sentence(run, "iql", tmp_path / "x", grid={"beta": [1.0], name: [value]})
    assert "not so beta" in sentence(run, "iql", tmp_path / "x", grid={"beta": []})
    said = sentence(run, "brac", tmp_path / "x", target_divergence=float("nan"))
    assert "target_divergence must be a finite number" in said
    assert "must be float | None" in sentence(run, "brac", tmp_path / "x", target_divergence="small")
    # And these are right
    load("iql").check(load("iql").Config(seed=2**31 - 4, beta=1), {"beta": [0.0, -1, np.float64(0.5)]})
    load("brac").check(load("brac").Config(target_divergence=None), {})


def test_an_unknown_dataset_is_a_sentence_before_any_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(load("iql").Runs, "__init__", None)
    said = sentence(run, "iql", tmp_path / "run", dataset="stitch/pointmaze-umaz-v0")
    assert "a similar name (stitch/pointmaze-umaze-v0" in said and not (tmp_path / "run").exists()


def test_actions_that_an_algorithm_does_not_take_are_a_sentence_before_there_is_a_folder(tmp_path):
    assert "discrete actions" in sentence(run, "dqn", tmp_path / "run") and not (tmp_path / "run").exists()


def test_what_will_not_be_scored_is_said_before_training(tmp_path, monkeypatch):
    happened = []

    def listen(of, name):
        call = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args, **kwargs: happened.append(name) or call(*args, **kwargs))

    listen(Environment, "probe")
    listen(load("iql").Runs, "advance")
    listen(Environment, "evaluate")
    run("iql", tmp_path)
    assert happened[:2] == ["probe", "advance"] and happened.count("evaluate") == 2


def command(out, *more):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
    return [sys.executable, "algos/iql.py", *options, "--hidden=4", f"--out={out}", *more]


def test_on_the_command_line_it_is_the_last_line_and_a_status(tmp_path):
    done = subprocess.run(command(tmp_path / "x", "--batch-size=0"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("batch_size must be from 1 to")
    assert "Traceback" not in done.stderr


# --- Going on --------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def tear_every_write_once(algo, monkeypatch):
    """Each first try to write a file of a step ends in the middle, and with it the run."""
    write, torn = algo.write, []

    def killed(path, *parts):
        what = path.name, 0
        if path.name == "checkpoint.msgpack":
            what = path.name, flax.serialization.msgpack_restore(parts[0])["step"]
        if path.name == "metrics.jsonl":
            what = path.name, parts[-1]["step"]
        if what not in torn:
            torn.append(what)
            path.with_name(path.name + ".tmp").write_bytes(b"torn")
            raise Killed
        write(path, *parts)

    monkeypatch.setattr(algo, "write", killed)
    return torn


@pytest.mark.parametrize("name, steps", [("iql", [20, 40]), ("brac", [-20, 0, 20, 40]), ("bear", [0, 20, 40])])
def test_a_run_killed_in_every_window_ends_as_one_that_was_not(staged, tmp_path, monkeypatch, name, steps):
    """A checkpoint comes before its evaluation, so between two kills a run trains, or evaluates, or summarises."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    summary = run(name, whole)
    with monkeypatch.context() as context:
        advance, trained = load(name).Runs.advance, []
        context.setattr(load(name).Runs, "advance", lambda runs, *args: trained.append(1) or advance(runs, *args))
        torn = tear_every_write_once(load(name), context)
        for kills in range(2 * len(steps) + 2):
            with pytest.raises(Killed):
                run(name, out)
            assert len(torn) == kills + 1
        again = run(name, out)
    evaluations = [(file, step) for step in steps for file in ("checkpoint.msgpack", "metrics.jsonl")]
    assert torn == [("config.json", 0), *evaluations, ("summary.json", 0)]
    assert len(trained) == 2 * len(steps), "what is in a whole checkpoint is not trained again"
    assert_same_end(out, whole)
    assert {k: x for k, x in again.items() if "second" not in k} == {
        k: x for k, x in summary.items() if "second" not in k
    }
    assert [line["step"] for line in lines(out)] == [step for step in steps for _ in range(2)]
    assert all(("score" in line) == (line["step"] > 0) for line in lines(out))  # a first phase is not played


def test_the_second_phase_leaves_the_first_ones_network_alone(staged, tmp_path, monkeypatch):
    """Each phase trains its own networks: b the first, critic and actor the second."""
    brac, saved = load("brac"), {}
    write = brac.write

    def keep(path, *parts):
        write(path, *parts)
        if path.name == "checkpoint.msgpack":
            parts = checkpoint(tmp_path)
            saved[parts["step"]] = flatten(parts["states"])

    monkeypatch.setattr(brac, "write", keep)
    run("brac", tmp_path)
    for name, x in saved[40].items():
        if name.startswith("behaviour/"):
            np.testing.assert_array_equal(x, saved[0][name], err_msg=name)
            assert not np.array_equal(x, saved[-20][name]), name
        elif name.startswith("critic/params"):
            np.testing.assert_array_equal(saved[0][name], saved[-20][name], err_msg=name)
            assert not np.array_equal(x, saved[0][name]), name
        elif name.startswith("actor/params"):  # it starts as the clone
            np.testing.assert_array_equal(saved[0][name], saved[0][name.replace("actor", "behaviour", 1)])
            assert not np.array_equal(x, saved[0][name]), name


def test_ctrl_c_is_a_word_and_the_same_command_goes_on(staged, finished, tmp_path, monkeypatch):
    with monkeypatch.context() as context:

        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        context.setattr(Environment, "measure", interrupted)
        said = sentence(run, "iql", tmp_path)
        assert "the same command goes on" in said and str(tmp_path) in said
    assert checkpoint(tmp_path)["step"] == 20
    assert run("iql", tmp_path)["num_updates"] == 40


def test_sigkill_and_start_again(finished, tmp_path):
    """A real kill of a real process, sharded over the devices that `main` asks for."""
    process = subprocess.Popen(command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (tmp_path / "checkpoint.msgpack").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "checkpoint.msgpack").exists() and not (tmp_path / "summary.json").exists()
    about = strictly((tmp_path / "config.json").read_text())
    assert about["device"] == f"{math.gcd(2, os.cpu_count())} x cpu" and "algos/iql.py" in about["command"]
    assert any((pathlib.Path.home() / ".cache" / "stitch").iterdir()), "compiled programs are kept for the next start"
    subprocess.run(command(tmp_path), cwd=ROOT, check=True, capture_output=True)
    ours, theirs = (flatten(checkpoint(out)["states"]) for out in (tmp_path, finished[0]))
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=1e-4, atol=1e-6, err_msg=name)
    for ours, theirs in zip(lines(tmp_path), lines(finished[0]), strict=True):
        assert (ours["step"], ours["seed"]) == (theirs["step"], theirs["seed"])
        np.testing.assert_allclose(ours["returns"], theirs["returns"], rtol=1e-4)


# --- Seeds and grids; divergence -------------------------------------------------------------------------


def test_each_seed_is_that_seed_alone(finished, tmp_path):
    run("iql", tmp_path, seed=1, num_seeds=1)
    together, alone = (flatten(checkpoint(out)["states"]) for out in (finished[0], tmp_path))
    for name, x in alone.items():
        np.testing.assert_allclose(together[name][1], x[0], rtol=1e-4, atol=1e-6, err_msg=name)
        assert "kernel" not in name or not np.array_equal(together[name][0], together[name][1]), name
    ours = [line for line in lines(finished[0]) if line["seed"] == 1]
    np.testing.assert_allclose([x["returns"] for x in ours], [x["returns"] for x in lines(tmp_path)], rtol=1e-4)


@pytest.fixture(scope="module")
def diverged(surroundings, tmp_path_factory):
    """A grid, half of which has a learning rate that nothing survives: (folder, summary, what it printed)."""
    out, capture = tmp_path_factory.mktemp("runs") / "grid", []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("builtins.print", lambda *args, **kwargs: capture.append(" ".join(map(str, args))))
        summary = run("iql", out, grid={"learning_rate": [1e-3, 1e10], "beta": [10.0, 0.0]})
    return out, summary, "\n".join(capture)


def test_a_grid_is_each_seed_at_each_of_its_points(diverged, finished):
    out, summary, _ = diverged
    points = [{"learning_rate": rate, "beta": beta} for rate in (1e-3, 1e10) for beta in (10.0, 0.0)]
    assert summary["seeds"] == [0, 1] * 4 and summary["grid"] == [point for point in points for _ in range(2)]
    assert [(line["seed"], line["grid"]) for line in lines(out)[-8:]] == list(
        zip(summary["seeds"], summary["grid"], strict=True)
    )
    together, plain = (flatten(checkpoint(x)["states"]) for x in (out, finished[0]))
    for name, x in plain.items():  # the first point is the default
        np.testing.assert_allclose(together[name][:2], x, rtol=1e-4, atol=1e-6, err_msg=name)
        if name.startswith("actor/params") and "kernel" in name:
            assert not np.allclose(together[name][2:4], x), "beta changes nothing"
    np.testing.assert_allclose(summary["returns"][:2], finished[1]["returns"], rtol=1e-4)


def test_divergence_is_said_and_recorded_run_by_run(diverged):
    out, summary, said = diverged
    assert summary["diverged"] == [False] * 4 + [True] * 4
    assert [line["diverged"] for line in lines(out)[-8:]] == summary["diverged"]
    assert any(line["critic_loss"] is None for line in lines(out)[-4:])
    assert not any(None in line.values() for line in lines(out)[-8:-4])
    assert "diverged" in said
    strictly((out / "summary.json").read_text())


def test_restoring_a_run_of_a_grid_gives_that_run(diverged):
    out, summary, _ = diverged
    everything, one = load("iql").restore(out, run=None), load("iql").restore(out, run=3)
    assert [run["seed"] for run in everything.runs] == summary["seeds"] and everything.step == 40
    assert everything.runs[3] == {"seed": 1, "grid": {"learning_rate": 1e-3, "beta": 0.0}}
    assert (one.cfg.seed, one.cfg.num_seeds, one.cfg.beta) == (1, 1, 0.0)
    points = np.array([[-0.5, 0.1], [0.5, -0.8]])
    obs = np.broadcast_to(one.interface.observe(points), (8, 2, 2))
    rows, _ = everything.act(obs, 0, None, np.zeros((8, 2), np.float32))
    np.testing.assert_allclose(one(points), one.interface.to_env(np.asarray(rows)[3]), rtol=1e-4)
    assert not np.allclose(rows[2], rows[3], rtol=1e-4)
    for absent in (8, -1, "x"):
        said = sentence(load("iql").restore, out, run=absent)
        assert said == f"{out} has no run {absent}: its seeds, point by point, are 0 to 7."
    assert "no run that iql.py can go on with" in sentence(load("iql").restore, out.parent / "nowhere", run=None)


# --- Evaluation is never in the way of training ----------------------------------------------------------


def test_an_evaluation_that_fails_costs_a_line_and_no_training(finished, tmp_path, monkeypatch, capsys):
    steps = []

    def evaluate(*args, **kwargs):
        steps.append(checkpoint(tmp_path)["step"])
        raise RuntimeError("the simulator\nhas lost its licence")

    monkeypatch.setattr(Environment, "evaluate", evaluate)
    summary = run("iql", tmp_path)
    assert steps == [20, 40], "the checkpoint is written before its evaluation"
    said = capsys.readouterr()
    assert (said.out + said.err).count("not scored: the evaluation failed (RuntimeError: the simulator has lost") >= 1
    assert summary["score_kind"].startswith("not scored: the evaluation failed")
    assert summary["score_per_seed"] == [None, None] and summary["score_mean"] is None
    assert all(line["score"] is None and line["critic_loss"] for line in lines(tmp_path))
    for name, x in flatten(checkpoint(finished[0])["states"]).items():
        np.testing.assert_array_equal(flatten(checkpoint(tmp_path)["states"])[name], x)


def test_without_episodes_it_trains_and_makes_no_environment(finished, tmp_path, monkeypatch):
    def made(*args):
        raise Killed

    monkeypatch.setattr(Environment, "_hire", made)  # the workers, in which environments are made
    summary = run("iql", tmp_path, eval_episodes=0)
    assert summary["returns"] == [[], []] and summary["score_mean"] is None and "eval_episodes" in summary["score_kind"]
    for name, x in flatten(checkpoint(finished[0])["states"]).items():
        np.testing.assert_array_equal(flatten(checkpoint(tmp_path)["states"])[name], x)


def test_the_progress_line_has_a_score_only_where_one_is(unfinished, staged, tmp_path, monkeypatch):
    said, bars, tqdm = [], [], load("iql").tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

        def set_description(self, text, *args, **kwargs):
            said.append(text)

        def set_postfix(self, losses, *args, **kwargs):
            assert losses.keys() == {"actor_loss", "critic_loss", "value_loss"} and all(map(float, losses.values()))
            said.append("losses")

    monkeypatch.setattr(load("iql"), "tqdm", Bar)
    summary = run("iql", tmp_path / "scored")
    assert said[:2] == ["losses"] * 2 and said[5] == f"score {summary['score_mean']:.1f}" and len(said) == 6
    monkeypatch.setattr(Environment, "measure", lambda *args, **options: {"score": np.full(2, np.nan)})
    monkeypatch.setattr(Environment, "summary", lambda self, lines: {"score_mean": np.nan})
    monkeypatch.setattr(Environment, "sentence", lambda self, summary: "")
    run("iql", tmp_path / "not scored")
    assert said[6:] == [*["losses"] * 2, "no score"] * 2
    run("iql", unfinished)  # all of it is trained already
    monkeypatch.setattr(load("brac"), "tqdm", type("Bar", (Bar,), {"set_postfix": tqdm.set_postfix}))
    run("brac", tmp_path / "two phases")
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 40, 40)] * 2 + [(40, 40, 40), (0, 80, 80)]


def test_what_an_evaluation_is_given(staged, tmp_path, monkeypatch):
    measure, given = Environment.measure, []

    def listen(self, policy, q, seeds, num_episodes, *, discount, max_steps):
        given.append((list(seeds), num_episodes, discount, max_steps))
        return measure(self, policy, q, seeds, num_episodes)

    monkeypatch.setattr(Environment, "measure", listen)
    run("iql", tmp_path, eval_steps=7, eval_episodes=3)
    assert given == [([0, 1], 3, 0.99, 7)] * 2


# --- The folder is the policy ----------------------------------------------------------------------------


def test_a_moved_folder_acts_in_the_environments_units_without_its_dataset(surroundings, tmp_path):
    """TD3+BC that only clones: observations normalised by the data's mean of 500, actions scaled from [-2, 3]."""
    payer.build("test/far-v0", middle=500.0, half=100.0)
    cloning = dict(
        dataset="test/far-v0",
        alpha=0.0,
        num_updates=600,
        eval_interval=600,
        log_interval=600,
        eval_episodes=0,
        num_seeds=1,
    )
    run("td3_bc", tmp_path / "here", **cloning, batch_size=64, learning_rate=1e-2, hidden=(16,))
    there = tmp_path / "elsewhere" / "policy"
    there.parent.mkdir()
    shutil.move(tmp_path / "here", there)
    code = """if True:
        import json, sys
        from algos.td3_bc import restore
        policy = restore(sys.argv[1])
        points = [[400, 500], [500, 500], [600, 500]]
        unwanted = {"minari", "gymnasium", "h5py", "mujoco"} & set(sys.modules)
        print(json.dumps([[policy(x).tolist() for x in points], policy(points).tolist(), sorted(unwanted)]))
    """
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "MINARI_DATASETS_PATH": str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(there)], cwd=tmp_path, env=surroundings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one_by_one, batch, unwanted = json.loads(done.stdout)
    np.testing.assert_allclose(one_by_one, [[1], [0], [-1]], atol=0.15)
    np.testing.assert_allclose(batch, one_by_one, atol=1e-5)
    assert unwanted == []


def kept(name, folder, interface, **changes):
    """An untrained policy, as a run leaves it."""
    algo = load(name)
    cfg = config(algo, **changes)
    runs = algo.Runs(cfg, interface, {})
    runs.states = runs.init()
    runs.save(folder)
    saved = {"algo": name, **dataclasses.asdict(cfg), "grid": {}, "data": {}}
    algo.write(folder / "config.json", {"config": saved, "interface": list(interface)})
    return runs, algo.restore(folder)


def test_it_takes_observations_and_gives_actions_in_the_datasets_own_form(surroundings, tmp_path):
    """Dict observations with a Discrete among them, which counts from -1; Discrete actions, which count from 3."""
    layout = {"dict": {"goal": [2], "at": {"n": 3, "start": -1}}}
    interface = Interface(layout, {"n": 4, "start": 3}, [0.0, 0, 0, 10, 20], [1.0, 1, 1, 2, 4])
    runs, policy = kept("bc", tmp_path, interface, num_seeds=1)
    flat = np.array([[0, 0, 1, (12 - 10) / 2, (28 - 20) / 4], [1, 0, 0, 0, 0]], np.float32)  # "at" before "goal"
    indices = np.asarray(runs.act(flat[None], 0, None, np.zeros((1, 2), np.float32))[0])[0]
    one = policy({"goal": np.array([12.0, 28.0]), "at": 1})
    assert one == 3 + indices[0] and np.shape(one) == () and one.dtype == np.int64
    batch = {"goal": np.array([[12.0, 28.0], [10.0, 20.0]]), "at": np.array([1, -1])}
    np.testing.assert_array_equal(policy(batch), 3 + indices)
    deep = {"goal": batch["goal"][:, None], "at": batch["at"][:, None]}
    np.testing.assert_array_equal(policy(deep), 3 + indices[:, None])
    many = {"goal": np.random.default_rng(0).normal(15, 9, (64, 2)), "at": np.zeros(64, int)}
    assert len(set(policy(many).tolist())) > 1, "a policy that always does the same shows nothing"


def test_sampling_is_reproducible_and_differs_over_steps_seeds_and_rows(finished, tmp_path):
    about = strictly((finished[0] / "config.json").read_text())
    for act in ("mode", "sample"):
        copy(finished[0], tmp_path / act)
        about["config"]["act"] = act
        (tmp_path / act / "config.json").write_text(json.dumps(about))
    restore, points = load("iql").restore, np.full((3, 2), 0.5)
    mode, sample, again = restore(tmp_path / "mode"), restore(tmp_path / "sample"), restore(tmp_path / "sample")
    assert np.ptp(mode(points)) == 0 and np.array_equal(mode(points), mode(points))
    first, second = sample(points), sample(points)
    assert np.ptp(first) > 0 and not np.array_equal(first, second)
    np.testing.assert_array_equal([again(points), again(points)], [first, second])
    everyone = restore(tmp_path / "sample", run=None)
    everyone.states = jax.tree.map(lambda x: x[np.zeros(2, int)], everyone.states)  # seed 0's networks, twice
    rows = [everyone.act(np.full((2, 3, 2), 0.5, np.float32), t, None, np.zeros((2, 3), np.float32))[0] for t in (0, 1)]
    np.testing.assert_allclose(everyone.interface.to_env(np.asarray(rows)[:, 0]), [first, second], rtol=1e-4)
    assert not np.allclose(rows[0][0], rows[0][1]), "each seed has noise of its own"
