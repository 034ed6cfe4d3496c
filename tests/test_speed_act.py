"""The measurement of acting: what it times and how it is shown, with numbers worked out by hand."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import speed_act  # noqa: E402


def test_a_time_is_the_mean_over_the_steps_of_whole_episodes(monkeypatch):
    # Each episode takes 0.2 s and has 10 steps. Two of them are over at 0.4 s, the first time that is beyond 0.3 s
    now, played = [5.0], []

    def episode():
        played.append(now[0])
        now[0] += 0.2

    assert speed_act.SECONDS == 0.3
    assert speed_act.milliseconds(episode, 10, clock=lambda: now[0]) == pytest.approx(20) and len(played) == 2
    monkeypatch.setattr(speed_act, "SECONDS", 0.0)
    assert speed_act.milliseconds(episode, 10, clock=lambda: now[0]) == pytest.approx(20)  # of one episode


def test_an_episode_carries_what_the_policy_remembers():
    asked = []

    class Runs:
        def act(self, obs, step, memory, reward):
            asked.append((obs.shape, step, memory, reward.tolist()))
            return np.zeros((1, 3, 6)), step

    speed_act.play(Runs(), 3, 4)
    assert [x[:3] for x in asked] == [((1, 3, 17), step, memory) for step, memory in enumerate((None, 0, 1, 2))]
    assert all(x[3] == [[0, 0, 0]] for x in asked)


def test_the_table_has_ratios_of_the_same_repetition_fastest_first():
    def row(algo, number, *times):
        return {"algo": algo, "protocol": "quick", "environments": number, "milliseconds": times}

    about = {"repeats": 3, "date": "2026-11-30T01:02", "processor": "P", "cores": 2, "device": "cpu", "versions": {}}
    results = [row("edp", 1, 2, 8, 3), row("edp", 160, 9, 9, 9), row("iql", 1, 1, 2, 1), row("iql", 160, 1, 1, 1)]
    lines = speed_act.table(about | {"results": results}).splitlines()
    assert lines[0] == "| algorithm | quick, 1 environment | quick, 160 environments |"
    assert lines[2] == "| iql | 1.00 ms | 1.00 ms |"
    # 2 / 1, 8 / 2, 3 / 1: not the ratio of the medians, 3
    assert lines[3] == "| edp | 3.00 ms, 3.0 (2.0 to 4.0) times IQL's | 9.00 ms, 9.0 (9.0 to 9.0) times IQL's |"
    assert "medians of 3 (lowest to highest), on 2026-11-30." in lines[-1]


def test_networks_are_those_of_the_protocols():
    runs = speed_act.policy("ifql", "full")
    assert runs.cfg.hidden == (512,) * 4 and runs.cfg.num_seeds == 1
    quick = speed_act.policy("dt", "quick")
    assert (quick.cfg.hidden, quick.cfg.context) == ((128, 128), 10)
    shapes = {x.shape for x in jax.tree.leaves(quick.states.actor.params)}
    assert (1, 17, 64) in shapes  # one seed, 17 observations


def test_one_command_measures_in_turn_and_writes_what_made_it(monkeypatch, tmp_path):
    order = []

    class Runs:
        def __init__(self, name):
            self.name = name

        def act(self, obs, step, memory, reward):
            if step == 9:
                order.append((*self.name, obs.shape[1]))
            return np.zeros((1, obs.shape[1], 6)), None

    monkeypatch.setattr(speed_act, "policy", lambda *name: Runs(name))
    monkeypatch.setattr(speed_act, "SECONDS", 0.0)
    out = tmp_path / "act.json"
    speed_act.main(speed_act.Options(algos=("fql",), environments=(2, 3), repeats=2, out=str(out)))
    once = [(algo, protocol, n) for algo in ("fql", "iql") for protocol in ("quick", "full") for n in (2, 3)]
    assert order == once * 2
    report = json.loads(out.read_text())
    assert report["commit"] and report["versions"]["jax"] and report["repeats"] == 2
    assert all(len(row["milliseconds"]) == 2 for row in report["results"])
    with pytest.raises(SystemExit, match="must be positive"):
        speed_act.main(speed_act.Options(environments=()))
