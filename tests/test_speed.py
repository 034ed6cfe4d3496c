"""benchmarks/speed.py: which rows it measures, and how it names them. The numbers themselves need a quiet machine."""

import json
import subprocess
import sys

import pytest
from test_readme import ROOT, load_speed

speed = load_speed()


def test_set_makes_a_row_for_each_combination_of_values():
    assert speed.combinations(()) == [{}]
    rows = speed.combinations(("num-critics=10,500", "hidden=[8,8]", "normalize_obs=false", "mode=exp"))
    rest = {"hidden": [8, 8], "normalize_obs": False, "mode": "exp"}
    assert rows == [{"num_critics": 10, **rest}, {"num_critics": 500, **rest}]
    assert speed.label("sac_n", {"num_critics": 10}) == "sac_n num_critics=10" and speed.label("bc", {}) == "bc"


@pytest.mark.parametrize("bad", ["num_critics", "num_critics=", "=3"])
def test_a_setting_without_a_field_or_a_value_is_refused(bad):
    with pytest.raises(SystemExit, match="FIELD=VALUE"):
        speed.combinations((bad,))


def test_a_field_that_the_algorithm_does_not_have_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="bc has no setting num_critics."):
        speed.worker("bc", {"num_critics": 10}, 1, 10, str(tmp_path))


def worker_process(algo, setting, cache):
    """One of speed.py's own processes: a worker sets the number of devices, which must come before JAX starts."""
    job = {"algo": algo, "setting": setting, "seeds": 1, "updates": 2, "cache": str(cache)}
    return [sys.executable, str(ROOT / "benchmarks" / "speed.py"), "worker", json.dumps(job)]


def test_what_an_algorithm_refuses_for_another_reason_stays_refused(tmp_path):
    command = worker_process("edac", {"num_critics": 1}, tmp_path)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "num_critics must be at least 2" in done.stderr


def test_algorithms_for_discrete_actions_are_measured_on_those(tmp_path):
    worker = speed.Worker(worker_process("dqn", {}, tmp_path))
    assert worker.ask("about")["flops_per_update"] > 0
    worker.close()
    assert worker.process.returncode == 0
