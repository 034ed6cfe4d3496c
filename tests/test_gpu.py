"""benchmarks/gpu.py, on the CPU with small numbers: a GPU is not needed to see that every line comes."""

import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import gpu  # noqa: E402

SMALL = "--num-seeds 1 --num-updates 4 --eval-interval 2 --log-interval 2 --eval-episodes 1 --hidden 8 --batch-size 8"


def test_every_line_comes(umaze, tmp_path):
    out = tmp_path / "gpu.jsonl"
    command = [
        sys.executable,
        ROOT / "benchmarks" / "gpu.py",
        "--algos",
        "iql",
        "--seeds",
        "2",
        "--precisions",
        "highest",
    ]
    command += ["--updates", "3", "--seconds", "0.01", f"--curve={SMALL}", "--out", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    about, first, curve, *speeds = map(json.loads, out.read_text().splitlines())
    assert about["device"] == "cpu" and "jax" in about["versions"] and about["shape"]["batch_size"] == 256
    seconds = first["first_update_seconds"]
    assert seconds["cold"] > seconds["warm"] > 0
    assert list(curve["curve"]) == ["2", "4"] and curve["score_mean"] == curve["curve"]["4"]
    assert curve["dataset"] == "stitch/pointmaze-umaze-v0" and curve["train_seconds"] > 0
    (speed,) = speeds
    assert (speed["algo"], speed["seeds"], speed["precision"]) == ("iql", 2, "highest")
    assert speed["updates_per_second"] > 0 and speed["compile_seconds"] > 0


@pytest.fixture
def stubs(monkeypatch):
    """`main` without processes; what it says of speeds is its arguments."""
    about = {"device": "My GPU", "versions": {}}
    monkeypatch.setattr(gpu, "first_updates", lambda updates: (about, {"seconds": 30.0}, {"seconds": 4.0}))
    monkeypatch.setattr(gpu, "learning_curve", lambda arguments: {"curve": {}})
    monkeypatch.setattr(gpu, "speeds", lambda options, precision, seeds: [{"seeds": seeds, "precision": precision}])
    monkeypatch.setattr(gpu.os, "environ", {})


def lines(tmp_path, **options):
    gpu.main(gpu.Options(out=str(tmp_path / "gpu.jsonl"), **options))
    return [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]


def test_lines_of_known_numbers(stubs, tmp_path):
    first, curve, *rest = lines(tmp_path)[1:]
    assert first == {"algo": "iql", "first_update_seconds": {"cold": 30, "warm": 4}} and curve == {"curve": {}}
    assert rest == [{"seeds": n, "precision": p} for p in ("default", "highest") for n in (1, 16, 64)]


def test_nothing_new_is_begun_when_time_is_up(stubs, tmp_path):
    rest = lines(tmp_path, minutes=0, precisions=("highest",), seeds=(1, 64))[3:]
    assert rest == [{"error": f"no time left for {n} seeds at precision highest"} for n in (1, 64)]


def test_a_program_that_fails_leaves_the_others(monkeypatch):
    def trainer(algo, cfg, interface, dataset):
        if algo == "cql":
            raise MemoryError("64 seeds")
        return [], lambda: 0, None

    def problem(algo, setting, **counts):
        return algo, SimpleNamespace(log_interval=5), None, None

    monkeypatch.setattr(gpu.speed, "problem", problem)
    monkeypatch.setattr(gpu.speed, "trainer", trainer)
    options = gpu.Options(algos=("cql", "iql"), seconds=1e-9)
    failed, good = gpu.speeds(options, "default", 64)
    assert failed == {"algo": "cql", "seeds": 64, "precision": "default", "error": "MemoryError: 64 seeds"}
    assert good["algo"] == "iql" and good["updates_per_second"] > 0


def test_speed_is_of_all_seeds_and_calls_and_not_of_the_first(monkeypatch):
    """100 updates of each of 16 seeds in a call. The first takes 9 s, others 2 s; 5 s are asked for: three calls."""
    seconds = iter([9.0, 2.0, 2.0, 2.0])
    monkeypatch.setattr(gpu.speed, "seconds_of", lambda step: step())
    rate, calls = gpu.timed(lambda: next(seconds), 100, 16, at_least=5.0)
    assert (rate, calls) == (100 * 16 * 3 / 6.0, 3)


def test_a_curve_is_the_mean_of_the_runs():
    lines = [{"step": 2, "score": 10.0}, {"step": 2, "score": 20.0}, {"step": 4, "score": None}]
    curve = gpu.curve(lines)
    assert curve[2] == 15 and curve[4] != curve[4]  # NaN: not scored


def test_a_run_that_fails_is_a_line():
    assert "nonsense" in gpu.learning_curve("--nonsense 3")["error"]
