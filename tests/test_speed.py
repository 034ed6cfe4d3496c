"""benchmarks/speed.py: its arithmetic on known numbers, which rows it measures, and how it names them.

The numbers themselves need a quiet machine.
"""

import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import speed  # noqa: E402

from common.datasets import Transition  # noqa: E402


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


def test_a_field_that_the_algorithm_does_not_have_is_refused():
    with pytest.raises(SystemExit, match="bc has no setting num_critics."):
        speed.problem("bc", {"num_critics": 10})


# --- Arithmetic --------------------------------------------------------------------------------------------


class Pending:
    """A result that is there 3 seconds after it was asked for."""

    now = 10.0

    def block_until_ready(self):
        Pending.now += 3
        return self


def test_seconds_last_until_the_result_is_there():
    def call():
        Pending.now += 1
        return {"states": Pending(), "metrics": 0.5}

    assert speed.seconds_of(call, clock=lambda: Pending.now) == 4


def test_first_update_is_one_of_the_first_call_after_all_that_came_before():
    """7 s from the start of the process to the call, which makes 100 updates in 5 s."""
    assert speed.first_update(started=1000.0, ready=1007.0, seconds=5.0, updates=100) == pytest.approx(7.05)


def test_updates_per_second_are_of_all_seeds_together():
    assert speed.updates_per_second(125, 8, 2.0) == 500  # each of 8 seeds made 125, in 2 s


def test_rate_of_the_products():
    """A product of two 4 x 4 matrices: 64 multiplications and 64 additions. 10 of them in 2 s, on each of 3 devices."""
    assert speed.product_flops_per_second(side=4, count=10, seconds=2.0, devices=3) == 128 * 10 / 2 * 3


def test_bound_lies_between_the_products_before_and_after_a_repetition():
    assert speed.bounds([100.0, 300.0, 500.0], flops=10) == [20, 40]


def test_ratios_are_ours_to_the_others():
    assert speed.ratios([10.0, 30.0], [20.0, 15.0]) == [0.5, 2]


def test_share_of_the_preparations():
    """4 of them in a repetition, 0.5 s and 0.25 s each; 1,000 updates take 10 s at 100 updates/s, and 5 s at 200."""
    assert speed.prepare_share([0.5, 0.25], 4, 1_000, [100.0, 200.0]) == [0.2, 0.2]


def flops(function, *shapes):
    return speed.product_flops(jax.make_jaxpr(function)(*map(jnp.zeros, shapes)).jaxpr)


def test_flops_of_products():
    assert flops(jnp.matmul, (2, 3), (3, 5)) == 2 * 2 * 3 * 5
    assert flops(jax.vmap(jnp.matmul), (7, 2, 3), (7, 3, 5)) == 7 * 60
    assert flops(lambda x, y: jnp.exp(x) @ y + 1, (2, 3), (3, 5)) == 60  # what is no product does not count
    assert flops(jax.jit(jnp.matmul), (2, 3), (3, 5)) == 60  # within another function
    # The gradients of both factors are products of the same size
    assert flops(jax.value_and_grad(lambda x, y: (x @ y).sum(), argnums=(0, 1)), (2, 3), (3, 5)) == 3 * 60


def test_flops_of_a_loop_are_those_of_its_rounds():
    def loop(x, y):
        return jax.lax.scan(lambda carry, _: (carry, carry @ y), x, length=4)

    assert flops(loop, (2, 3), (3, 5)) == 4 * 60


@pytest.mark.parametrize("form", ["cond", "while"])
def test_products_whose_number_is_not_known_from_shapes_are_refused(form):
    def update(x, y):
        if form == "cond":
            return jax.lax.cond(x.sum() > 0, lambda: x @ y, lambda: x @ (2 * y))
        return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ y, x)

    with pytest.raises(SystemExit, match=f"matrix products in a {form}"):
        flops(update, (3, 3), (3, 3))
    assert flops(lambda x: jax.lax.cond(x.sum() > 0, jnp.exp, jnp.log, x), (3, 3)) == 0


def test_flops_of_updates_that_take_turns_are_their_mean():
    """Two updates with a product of (batch 5, obs 3) and (3, 4), and one with two of these: 120 FLOPs for each.

    The batch is what the file draws, here of observations alone."""
    dataset = Transition(np.zeros((100, 3)), None, np.zeros(100), None, None)

    def draw(key, rows, state, cfg):
        return Transition(rows.obs[: cfg.batch_size], *[None] * 4)

    def one(state, batch):
        return batch.obs @ state, {}

    def two(state, batch):
        return one(state, batch)[0] + batch.obs @ state, {}

    agent = SimpleNamespace(init=lambda key: jnp.zeros((3, 4)), update=two, cycle=(one, one, two))
    assert speed.flops_per_update(agent, draw, dataset, SimpleNamespace(batch_size=5)) == (120 + 120 + 240) / 3
    del agent.cycle
    assert speed.flops_per_update(agent, draw, dataset, SimpleNamespace(batch_size=5)) == 240


# --- A row ---------------------------------------------------------------------------------------------------


class Stub:
    """In the place of speed.Worker: the first of our processes starts cold, the second warm; d3rlpy's is the third."""

    made = []

    def __init__(self, command):
        self.answers = (
            {"first": [{"seconds": 30.0, "memory_mb": 900.0, "device_memory_mb": 50.0}]},
            {
                "first": [{"seconds": 5.0, "memory_mb": 700.0, "device_memory_mb": 40.0}],
                "about": [{"flops_per_update": 10, "devices": 2, "updates_per_repetition": 1_000, "prepares": 0}],
                "product": [1000.0, 3000.0, 5000.0, 3000.0],
                "train": [100.0, 200.0, 300.0],
            },
            {"about": ["versions"], "train": [50.0, 40.0, 30.0]},
        )[len(self.made)]
        self.made.append(command)

    def ask(self, question):
        return self.answers[question].pop(0)

    def close(self):
        pass


@pytest.fixture
def row(monkeypatch):
    monkeypatch.setattr(speed, "Worker", Stub)
    monkeypatch.setattr(Stub, "made", [])
    options = speed.Options(repeats=3, against="d3rlpy", python="theirs")
    return speed.measure("iql", {}, 8, options)[1]


def test_a_row_of_known_numbers(row):
    assert row["updates_per_second"] == [100, 200, 300] and row["flops_per_update"] == 10
    assert row["bound_updates_per_second"] == [200, 400, 400]  # of 1000 and 3000, 3000 and 5000, 5000 and 3000
    assert row["share_of_bound"] == [0.5, 0.5, 0.75]
    assert row["first_update_seconds"] == {"cold": 30, "warm": 5}
    assert row["peak_memory_mb"] == {"cold": 900, "warm": 700} and row["peak_device_memory_mb"] == 50
    assert row["d3rlpy"]["ratio_of_each_pair"] == [2, 5, 10] and row["d3rlpy"]["ratio_of_medians"] == 5
    assert [command[0] for command in Stub.made] == [sys.executable, sys.executable, "theirs"]
    assert Stub.made[0] == Stub.made[1]  # one cache: the second finds what the first compiled
    assert json.loads(Stub.made[0][-1])["seeds"] == 8


def test_a_table_of_known_numbers(row):
    report = {"results": [row], "device": "D", "processor": "P", "cores": 2, "date": "2026-01-02T03:04"}
    report |= {"versions": {"jax": "1"}, "environment": None}
    cells = speed.table(report).splitlines()[2]
    assert cells == (
        "| iql | 8 | 200 (100 to 300) | 50% (50% to 75%) | 30.0 s, 5.0 s | 900 MB, device 50 MB | 40 (30 to 50) | "
        "5.0 (2.0 to 10.0) |"
    )
    shown = speed.table(
        report | {"results": [row, row | {"algo": "mopo", "prepare_share": [0.25, 0.2, 0.3]}]}
    ).splitlines()
    assert shown[0].split("|")[4] == " of it, roll-outs or relabelling " and shown[2].split("|")[4] == " – "
    assert shown[3].startswith("| mopo | 8 | 200 (100 to 300) | 25% (20% to 30%) | 50%")
    report["environment"] = {"dataset": "x-v0", "steps_per_second": {"1": [2000.0] * 3, "16": [9000.0, 8000.0, 9500.0]}}
    said = "2,000 (2,000 to 2,000) with 1 worker; 9,000 (8,000 to 9,500) with 16 workers"
    said += ", 4.50 (4.00 to 4.75) times as many."
    assert speed.table(report).endswith(f"Environment steps/s of `x-v0`: {said}")


def test_the_fastest_is_the_first_of_the_table(row):
    slow = row | {"algo": "slow", "updates_per_second": [1.0, 2.0, 3.0]}
    report = {"results": [slow, row], "device": "D", "processor": "P", "cores": 2, "date": "2026-01-02T03:04"}
    report |= {"versions": {"jax": "1"}, "environment": None}
    assert [line.split(" | ")[0] for line in speed.table(report).splitlines()[2:4]] == ["| iql", "| slow"]


def test_environment_is_stepped_by_one_worker_and_by_one_for_each_core(monkeypatch):
    """In turn, so that a machine that becomes slower slows both."""
    jobs, turns = [], []

    class Stepper(Stub):
        def __init__(self, command):
            jobs.append((command[2], json.loads(command[3])))
            self.workers = jobs[-1][1]["workers"]
            self.answers = {"step": [100.0 * self.workers] * 2}

        def ask(self, name):
            turns.append(self.workers)
            return super().ask(name)

    monkeypatch.setattr(speed, "Worker", Stepper)
    monkeypatch.setattr(speed.os, "cpu_count", lambda: 16)
    stepping = speed.environment_steps(speed.Options(environment="x-v0", repeats=2))
    assert stepping == {"dataset": "x-v0", "steps_per_second": {"1": [100, 100], "16": [1600, 1600]}}
    assert jobs == [("environment", {"dataset": "x-v0", "workers": n}) for n in (1, 16)]
    assert turns == [1, 16, 1, 16]


def test_what_is_written_is_whole(tmp_path):
    out = tmp_path / "folder" / "speed.json"
    speed.write(out, {"results": [1]})
    speed.write(out, {"results": [1, 2]})
    assert json.loads(out.read_text()) == {"results": [1, 2]} and [p.name for p in out.parent.iterdir()] == [out.name]


# --- The processes ---------------------------------------------------------------------------------------------


def worker_process(algo, setting, cache, seeds=1, updates=2):
    """One of speed.py's own processes: a worker sets the number of devices, which must come before JAX starts."""
    job = {"algo": algo, "setting": setting, "seeds": seeds, "updates": updates, "cache": str(cache)}
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


def test_a_worker_trains_the_seeds_that_it_is_asked_for(tmp_path):
    """3 updates for each of 2 seeds, rounded up to two turns of policy_delay 2."""
    worker = speed.Worker(worker_process("td3_bc", {"hidden": [8, 8]}, tmp_path, seeds=2, updates=6))
    about = worker.ask("about")
    assert about["updates_per_repetition"] == 2 * 4
    # Critic: its two networks of 23-8-8-1 forward and backward, target and target actor forward; the actor in turn
    q, pi = 2 * 256 * (23 * 8 + 8 * 8 + 8), 2 * 256 * (17 * 8 + 8 * 8 + 8 * 6)
    backward_of_weights_and_inputs = 2
    critic = 2 * q * (1 + 1 + backward_of_weights_and_inputs) - 2 * 2 * 256 * 23 * 8 + pi  # not to its inputs
    actor = pi * 3 - 2 * 256 * 17 * 8 + q * 2
    assert about["flops_per_update"] == pytest.approx(critic + actor / 2)
    assert worker.ask("train") > 0 and worker.ask("first")["seconds"] > 0
    worker.close()
    assert worker.process.returncode == 0


def test_environment_steps_are_counted(umaze):
    """200 steps of PointMaze for each of 16 seeds x 10 episodes, which random actions do not end."""
    job = json.dumps({"dataset": "stitch/pointmaze-umaze-v0", "workers": 1})
    worker = speed.Worker([sys.executable, str(ROOT / "benchmarks" / "speed.py"), "environment", job])
    assert worker.ask("step") > 0
    worker.close()
    assert worker.process.returncode == 0


def test_environment_steps_are_those_of_all_seeds_and_episodes_in_the_time_they_took(monkeypatch, capsys):
    """Two calls of the policy for 16 seeds x 10 episodes in 8 s of this clock; making the environments is outside."""
    clock = iter([100.0, 108.0])
    asked = SimpleNamespace(num_workers=0, spec=SimpleNamespace(action_dim=3), plays=0)

    def evaluate(policy, seeds, episodes, max_steps):
        asked.plays += 1
        for step in range(2):
            actions, _ = policy(np.zeros((len(seeds), episodes, 5)), step, None, None)
            assert actions.shape == (16, 10, 3) and np.abs(actions).max() <= 1 and np.ptp(actions) > 1

    asked.evaluate = evaluate
    monkeypatch.setattr("common.datasets.load_dataset", lambda name: (None, asked))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(speed.sys, "stdin", ["step\n"])
    speed.environment("x-v0", 3)
    assert capsys.readouterr().out == f"ANSWER {2 * 16 * 10 / 8}\n" and asked.num_workers == 3 and asked.plays == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_kernel():
    status = pathlib.Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    assert speed.peak_memory_mb() == pytest.approx(peak, rel=0.2)


def test_constraints_are_the_versions_of_the_committed_results():
    lines = (ROOT / "benchmarks" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    results = [*(ROOT / "benchmarks" / "results").glob("kernels-*.json")]
    results += [*(ROOT / "benchmarks" / "results").glob("*/*/config.json")]
    assert results
    for path in results:
        for name, version in json.loads(path.read_text())["versions"].items():
            assert pinned[name] == version, f"{path}: {name} {version}"
