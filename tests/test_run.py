"""The run contract: what a run leaves, and that a killed one ends as one that was not killed, bit for bit."""

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import flax
import numpy as np
import pytest

from common.datasets import Environment, Evaluation

ROOT = pathlib.Path(__file__).parents[1]
TINY = dict(
    num_updates=40, eval_interval=20, log_interval=10, eval_episodes=2, batch_size=16, hidden=(8, 8), num_seeds=2
)
SUMMARY = {
    "algo", "dataset", "num_updates", "seeds", "grid", "returns",
    "score_per_seed", "score_mean", "score_std", "score_kind",
    "updates_per_second", "compile_seconds", "train_seconds", "device", "command", "commit", "versions",
}  # fmt: skip
ALGOS = sorted(p.stem for p in (ROOT / "algos").glob("*.py") if p.stem != "__init__")


def load(name):
    return importlib.import_module(f"algos.{name}")


def run(algo, out, **changes):
    fields = {f.name for f in dataclasses.fields(algo.Config)}
    more = {"pretrain_updates": 20} if "pretrain_updates" in fields else {}
    more |= {name: (8, 8) for name in fields if name.endswith("hidden")}
    if not algo.Config.dataset.startswith("stitch/pointmaze"):  # it takes discrete actions only
        more["dataset"] = "stitch/cartpole-mixed-2k-v0"
    return algo.main(algo.Config(**(TINY | more | changes), out=str(out)))


def command(out, *extra):
    options = [f"--{k.replace('_', '-')}={v}" for k, v in TINY.items() if k != "hidden"]
    return [sys.executable, "algos/iql.py", *options, "--hidden", "8", "8", f"--out={out}", *extra]


def result(out):
    """What must not depend on interruptions: final parameters, optimiser states and keys, and every metric."""
    _, states = (flax.serialization.msgpack_restore((out / "checkpoint.msgpack").read_bytes())[i] for i in ("0", "2"))
    leaves = {"/".join(map(str, path)): x for path, x in flatten(states)}
    return leaves, (out / "metrics.jsonl").read_text()


def flatten(tree, path=()):
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in flatten(value, (*path, key))]
    return [(path, tree)]


def assert_same(a, b):
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        np.testing.assert_array_equal(a[0][name], b[0][name], err_msg=name)
    assert a[1] == b[1]


@pytest.fixture(scope="module")
def finished(umaze, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, run(load("iql"), out)


@pytest.mark.parametrize("name", ALGOS)
def test_a_run_leaves_what_it_says(name, umaze, tmp_path, capsys):
    out = tmp_path / "run"
    summary = run(load(name), out)
    assert {p.name for p in out.iterdir()} == {"config.json", "metrics.jsonl", "checkpoint.msgpack", "summary.json"}
    assert summary.keys() == SUMMARY and json.loads((out / "summary.json").read_text()) == summary
    assert summary["seeds"] == [0, 1] and summary["grid"] == [{}, {}] and np.shape(summary["returns"]) == (2, 2)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [0, 20, 40] if hasattr(load(name).Config, "pretrain_updates") else [20, 40]
    assert [(line["step"], line["seed"]) for line in lines] == [(step, seed) for step in steps for seed in (0, 1)]
    assert all(("score" in line) == (line["step"] > 0) for line in lines)
    assert summary["score_per_seed"] == [line["score"] for line in lines[-2:]]  # the last evaluation, not the best
    if summary["dataset"].startswith("stitch/pointmaze"):
        assert summary["score_per_seed"] == [100 * np.mean(r) for r in summary["returns"]]
    np.testing.assert_allclose(summary["score_std"], np.std(summary["score_per_seed"]))
    saved = json.loads((out / "config.json").read_text())
    assert saved["config"]["batch_size"] == 16 and saved["versions"]["jax"] and saved["device"]
    assert f"python benchmarks/plot.py {out}" in capsys.readouterr().out.splitlines()[-1]


def test_a_finished_run_is_not_trained_again(finished, capsys):
    out, summary = finished
    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert run(load("iql"), out) == summary and "finished" in capsys.readouterr().out
    assert before == {p.name: p.stat().st_mtime_ns for p in out.iterdir()}


def test_a_folder_with_another_configuration_is_never_overwritten(finished):
    out, _ = finished
    before = result(out)
    with pytest.raises(SystemExit, match="another configuration"):
        run(load("iql"), out, beta=1.0)
    assert_same(result(out), before)


def test_each_seed_is_that_seed_alone(finished, tmp_path):
    together, _ = result(finished[0])
    run(load("iql"), tmp_path / "alone", seed=1, num_seeds=1)
    alone, metrics = result(tmp_path / "alone")
    for name, x in alone.items():
        np.testing.assert_allclose(together[name][1], x[0], rtol=1e-4, atol=1e-6, err_msg=name)
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    for line, other in zip([x for x in lines if x["seed"] == 1], map(json.loads, metrics.splitlines()), strict=True):
        assert line["returns"] == other["returns"]


def test_a_grid_of_floats_is_each_of_its_runs_alone(umaze, tmp_path):
    """Every combination trains every seed; initialisation, training and evaluation have that combination's values."""
    summary = load("iql").main(
        load("iql").Config(**TINY, out=str(tmp_path / "grid")), {"beta": [0.0, 30.0], "tau": [0.5]}
    )
    points = [{"beta": 0.0, "tau": 0.5}, {"beta": 30.0, "tau": 0.5}]
    assert summary["seeds"] == [0, 1, 0, 1] and summary["grid"] == [points[0]] * 2 + [points[1]] * 2
    together, metrics = result(tmp_path / "grid")
    lines = [json.loads(line) for line in metrics.splitlines()]
    for i, point in enumerate(points):
        run(load("iql"), tmp_path / str(i), **point)
        alone, metrics = result(tmp_path / str(i))
        for name, x in alone.items():
            np.testing.assert_allclose(together[name][2 * i : 2 * i + 2], x, rtol=1e-4, atol=1e-6, err_msg=name)
        for line, other in zip(
            [x for x in lines if x["grid"] == point], map(json.loads, metrics.splitlines()), strict=True
        ):
            assert (line["seed"], line["returns"]) == (other["seed"], other["returns"])
    with pytest.raises(SystemExit, match="another configuration"):
        load("iql").main(load("iql").Config(**TINY, out=str(tmp_path / "grid")), {"beta": [0.0]})


def test_scores_are_those_of_the_last_evaluation_and_their_spread(umaze, tmp_path, monkeypatch):
    # Reference scores 10 and 20: returns (0, 1) and (1, 1) score -95 and -90: mean -92.5, standard deviation 2.5.
    # (The standard deviation of the returns, put through the same map as a mean, would be -97.5.)
    evaluations = iter([np.full((2, 2), 15.0), np.array([[0.0, 1.0], [1.0, 1.0]])])  # the better one first
    monkeypatch.setattr(Environment, "evaluate", lambda *args: Evaluation(next(evaluations), None, None, None, None))
    monkeypatch.setattr(Environment, "score", lambda self, returns: 100 * (np.asarray(returns) - 10) / 10)
    summary = run(load("bc"), tmp_path)
    assert summary["score_per_seed"] == [-95, -90] and summary["returns"] == [[0, 1], [1, 1]]
    assert (summary["score_mean"], summary["score_std"]) == (-92.5, 2.5)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path, iql = tmp_path / "file", load("iql")
    iql.write(path, "old")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        iql.write(path, b"new")
    assert path.read_text() == "old"


def kill_after(algo, out, writes, monkeypatch, **changes):
    """A run that is killed in the middle of the write that follows the first `writes`."""
    write, count = algo.write, 0

    def killed(path, content):
        nonlocal count
        count += 1
        if count > writes:
            path.with_name(path.name + ".tmp").write_bytes(b"torn")
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as context:
        context.setattr(algo, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(algo, out, **changes)


@pytest.mark.parametrize("writes", [2, 4, 5])
def test_a_kill_between_two_writes_changes_nothing(finished, tmp_path, monkeypatch, writes):
    """The files are written in this order: config, then metrics and checkpoint of each evaluation, then summary."""
    kill_after(load("iql"), tmp_path, writes, monkeypatch)
    run(load("iql"), tmp_path)
    assert_same(result(tmp_path), result(finished[0]))


TWO_PHASES = dict(pretrain_updates=40, target_divergence=0.5)  # BRAC, with every part of its state in use


@pytest.fixture(scope="module")
def finished_in_two_phases(umaze, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "two_phases"
    run(load("brac"), out, **TWO_PHASES)
    return out


@pytest.mark.parametrize("writes, step", [(3, -20), (5, 0), (7, 20)])
def test_a_kill_in_either_phase_changes_nothing(finished_in_two_phases, tmp_path, monkeypatch, writes, step):
    """Steps -20 and 0 are the checkpoints of the first phase, 20 is the first one of the second."""
    kill_after(load("brac"), tmp_path, writes, monkeypatch, **TWO_PHASES)
    saved = flax.serialization.msgpack_restore((tmp_path / "checkpoint.msgpack").read_bytes())
    assert saved["0"] == step
    run(load("brac"), tmp_path, **TWO_PHASES)
    assert_same(result(tmp_path), result(finished_in_two_phases))


def test_the_second_phase_leaves_the_first_ones_network_alone(finished_in_two_phases, tmp_path, monkeypatch):
    """Each phase trains its own networks: b the first, critic and actor the second."""
    before = {}
    for writes, step in ((3, -20), (5, 0)):
        kill_after(load("brac"), tmp_path / str(step), writes, monkeypatch, **TWO_PHASES)
        before[step], _ = result(tmp_path / str(step))
    after, _ = result(finished_in_two_phases)
    for name, x in after.items():
        if name.startswith("behaviour/"):
            np.testing.assert_array_equal(x, before[0][name], err_msg=name)
            assert not np.array_equal(x, before[-20][name]), name
        elif name.startswith("critic/params"):
            np.testing.assert_array_equal(before[0][name], before[-20][name], err_msg=name)
            assert not np.array_equal(x, before[0][name]), name
        elif name.startswith("actor/params"):  # it starts as the clone
            np.testing.assert_array_equal(before[0][name], before[0][name.replace("actor", "behaviour", 1)])
            assert not np.array_equal(x, before[0][name]), name


def test_sigkill_and_start_again(umaze, tmp_path):
    """A real kill of a real process, sharded over the devices that `main` asks for."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, check=True, capture_output=True)
    process = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (killed / "checkpoint.msgpack").exists() and time.time() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "checkpoint.msgpack").exists()
    subprocess.run(command(killed), cwd=ROOT, check=True, capture_output=True)
    assert_same(result(killed), result(whole))


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"batch_size": 0}, "batch_size must be positive, not 0"),
        ({"num_seeds": -1}, "num_seeds must be positive"),
        ({"hidden": (8, 0)}, "hidden must be positive"),
        ({"eval_interval": 30}, "multiple of eval_interval"),
        ({"log_interval": 3}, "multiple of eval_interval"),
        ({"dataset": "stitch/pointmaze-umaz-v0"}, "a similar name .stitch/pointmaze-umaze-v0"),
    ],
)
def test_bad_input_is_one_sentence_before_any_compilation(umaze, tmp_path, monkeypatch, changes, sentence):
    monkeypatch.setattr(load("iql"), "make_agent", None)
    with pytest.raises(SystemExit, match=sentence) as error:
        run(load("iql"), tmp_path / "run", **changes)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    assert not (tmp_path / "run").exists()


def test_bad_input_on_the_command_line_is_a_sentence_and_a_status(umaze, tmp_path):
    done = subprocess.run(command(tmp_path / "x", "--batch-size=0"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == "batch_size must be positive, not 0."
    assert "Traceback" not in done.stderr


def test_one_compilation_of_training_and_one_of_the_policy(umaze, tmp_path, caplog):
    import jax

    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(load("iql"), tmp_path, num_updates=80)
    compiled = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling jit(")]
    assert sum("jit(policy)" in m for m in compiled) == 1, compiled
    assert sum("jit(train_shard)" in m for m in compiled) == 1, compiled


def test_tests_leave_the_users_datasets_alone(umaze):
    assert str(umaze.storage.data_path).startswith(os.environ["MINARI_DATASETS_PATH"])
