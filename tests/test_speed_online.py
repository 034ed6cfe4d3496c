"""The measurement of learning on-line: what is taken from summaries, with numbers worked out by hand."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed_online  # noqa: E402


def test_rates_and_shares_are_of_the_steps_between_two_runs(monkeypatch):
    """Between 100 and 300 steps: 4 s of updates, 5 s of simulator, 1 s of policy. On the data: 2 s for 200 updates."""
    asked = []

    def run(algo, options, **counts):
        asked.append(counts)
        long = max(counts.values()) == 300
        if "online_steps" not in counts:
            return {"train_seconds": 3.0 if long else 1.0}
        return {"train_seconds": 30.0 + 4 * long, "simulator_seconds": 20.0 + 5 * long, "policy_seconds": 7.0 + long}

    monkeypatch.setattr(speed_online, "run", run)
    row = speed_online.measure("iql", speed_online.Options(steps=100, repeats=2))
    assert asked[:2] == [{"num_updates": 100}, {"num_updates": 300}]
    assert asked[2:4] == [{"num_updates": 0, "online_steps": 100}, {"num_updates": 0, "online_steps": 300}]
    assert row["algo"] == "iql" and row["updates_per_second"] == {"data": [100.0] * 2, "online": [50.0] * 2}
    assert row["share"] == [pytest.approx({"update": 0.4, "simulator": 0.5, "policy": 0.1})] * 2


def test_the_table_has_medians_and_shares_in_the_order_of_names():
    def row(algo, rate):
        share = [{"update": 0.3, "simulator": 0.6, "policy": 0.1}] * 3
        return {"algo": algo, "share": share, "updates_per_second": {"data": [rate] * 3, "online": [20.0, 10.0, 30.0]}}

    about = {"dataset": "d", "repeats": 3, "date": "2026-11-30T01:02", "processor": "P", "cores": 2}
    lines = speed_online.table(about | {"results": [row("wsrl", 100.0), row("cql", 50.0)]}).splitlines()
    assert lines[2:4] == [
        "| cql | 50 (50 to 50) | 20 (10 to 30) | 60% | 10% | 30% |",
        "| wsrl | 100 (100 to 100) | 20 (10 to 30) | 60% | 10% | 30% |",
    ]
    assert "Medians of 3 repetitions, on 2026-11-30; P, 2 cores." in lines[-1]


def test_every_file_that_learns_on_line_is_measured_with_the_settings_that_it_has():
    assert {"iql", "rlpd", "spot", "wsrl"} <= set(speed_online.ALGOS) and "bc" not in speed_online.ALGOS
    assert "updates_per_step" in speed_online.fields("rlpd") and "pretrain_updates" not in speed_online.fields("rlpd")
    assert "pretrain_updates" in speed_online.fields("spot")


def test_a_failure_is_shown(monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="no dataset")
    monkeypatch.setattr(speed_online.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(SystemExit, match="iql failed:\nno dataset"):
        speed_online.run("iql", speed_online.Options())
