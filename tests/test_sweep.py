"""benchmarks/sweep.py: which cells there are, that each ends once, and that no failure stops the others."""

import fnmatch
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from common.datasets import Spec

ROOT = pathlib.Path(__file__).parents[1]
UMAZE = "stitch/pointmaze-umaze-v0"
TINY = ["num_updates=20", "eval_interval=10", "log_interval=10", "eval_episodes=1", "num_seeds=1", "hidden=[8,8]"]
PROTOCOLS = {
    "p": {
        "common": {"num_seeds": 2, "num_updates": 100},
        "datasets": {"stitch/a-v0": {"num_updates": 200}, "stitch/b-v0": {}},
        "methods": {"bc": {}, "bc-half": {"algo": "bc", "top_fraction": 0.5}, "iql": {}},
        "tuned": {"iql": {"stitch/*": {"beta": 3.0, "tau": 0.1, "source": "a"}, "stitch/b-*": {"beta": 5.0}}},
    }
}


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "benchmarks" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def command(out, *options, methods=("bc",), settings=TINY):
    options = ["--methods", *methods, f"--out={out}", "--set", *settings, *options]
    return [sys.executable, "benchmarks/sweep.py", "quick", "--datasets", UMAZE, *options]


def start(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), cwd=ROOT, capture_output=True, text=True, timeout=600)


def results(out):
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {line["cell"]: line for line in lines}


def test_cells_of_a_protocol_and_which_setting_counts(sweep):
    cells = sweep.make_cells(sweep.Options("p"), PROTOCOLS)
    assert [cell.name for cell in cells] == [f"{d}-v0/{m}" for d in "ab" for m in ("bc", "bc-half", "iql")]
    a_bc, a_half, a_iql, b_bc, _, b_iql = (cell.config for cell in cells)
    assert a_bc == {"num_seeds": 2, "num_updates": 200, "dataset": "stitch/a-v0"}
    assert a_half == a_bc | {"top_fraction": 0.5} and cells[1].algo == "bc"
    assert a_iql == a_bc | {"beta": 3.0, "tau": 0.1}  # without `source`
    assert b_bc["num_updates"] == 100 and b_iql["beta"] == 5.0 and b_iql["tau"] == 0.1
    chosen = sweep.Options("p", ("iql",), ("stitch/b-v0",), ("beta=7", "num-seeds=1"))
    (cell,) = sweep.make_cells(chosen, PROTOCOLS)
    assert (cell.config["beta"], cell.config["num_seeds"], cell.grid) == (7, 1, {})


def test_floats_share_a_program_and_other_settings_are_cells(sweep):
    settings = ("beta=1,3", "batch_size=16,32", "reward_shift=0,-1", "tau=0.5")
    cells = sweep.make_cells(sweep.Options("p", ("iql",), ("stitch/a-v0",), settings), PROTOCOLS)
    names = [f"a-v0/iql,batch_size={b},reward_shift={r}" for b in (16, 32) for r in (0, -1)]
    assert [cell.name for cell in cells] == names  # load_data reads the shift: the data of the two differ
    assert all(cell.grid == {"beta": [1.0, 3.0]} and cell.config["tau"] == 0.5 for cell in cells)
    assert [(cell.config["batch_size"], cell.config["reward_shift"]) for cell in cells] == [
        (16, 0), (16, -1), (32, 0), (32, -1)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(protocol="fast"), "fast is no protocol: choose one of p"),
        (dict(protocol="p", methods=("sarsa",)), "sarsa is no file in algos/"),
        (
            dict(protocol="p", set=("betta=1",)),
            "bc has no setting betta: correct it, or leave bc out of --methods",
        ),
        (dict(protocol="p", set=("beta",)), "--set takes FIELD=VALUE"),
        (dict(protocol="p", set=("dataset=stitch/a-v0",)), "data and folder are --datasets and --out"),
        (dict(protocol="p", set=("out=runs",)), "data and folder are --datasets and --out"),
        (dict(protocol="p", set=("seed=1", "seed=3")), "--set has seed twice: give all its values at once, seed=1,3"),
    ],
)
def test_bad_input_is_one_sentence(sweep, options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        sweep.make_cells(sweep.Options(**options), PROTOCOLS)


@pytest.mark.parametrize(
    "setting, kind",
    [
        ("normalize_reward=False", "bool"),  # a word, and words are true
        ("normalize_reward=1", "bool"),
        ("num_updates=2e1", "int"),
        ("num_seeds=abc", "int"),
        ("num_seeds=true", "int"),
        ("beta=1,high", "float"),
        ("beta=true", "float"),
        ("hidden=8", r"tuple\[int, ...\]"),
        ("hidden=[8,8", r"tuple\[int, ...\]"),
        ("hidden=[8,0.5]", r"tuple\[int, ...\]"),
        ("divergence=js", r"Literal\['kl', 'mmd'\]"),
        ("target_divergence=off", r"float \| None"),
    ],
)
def test_a_value_of_another_type_is_refused(sweep, setting, kind):
    method = "brac" if "divergence" in setting else "iql"
    with pytest.raises(SystemExit, match=f"--set {setting.partition('=')[0]} takes {kind}, not"):
        sweep.make_cells(sweep.Options("p", (method,), set=(setting,)), PROTOCOLS)


def test_values_are_of_the_field_s_type(sweep):
    settings = ("value_penalty=false", "hidden=[8,8],[16]", "reward_shift=-1", "divergence=kl,mmd")
    settings += ("target_divergence=null",)
    cells = sweep.make_cells(sweep.Options("p", ("brac",), ("stitch/a-v0",), settings), PROTOCOLS)
    configs = [cell.config for cell in cells]
    assert [(c["hidden"], c["divergence"]) for c in configs] == [
        ([8, 8], "kl"), ([8, 8], "mmd"), ([16], "kl"), ([16], "mmd")
    ]  # fmt: skip
    # A float that is written as an integer is a float: `main` takes only positive integers
    assert configs[0]["value_penalty"] is False and type(configs[0]["reward_shift"]) is float
    assert configs[0]["target_divergence"] is None


def test_settings_beside_the_protocol_need_a_folder_of_their_own(sweep):
    with pytest.raises(SystemExit, match="give another --out"):
        sweep.main(sweep.Options("quick", ("bc",), (UMAZE,), ("num_updates=20",)))


def test_a_failed_cell_is_recorded_and_a_second_sweep_does_what_is_missing(umaze, tmp_path):
    first = start(tmp_path, settings=[*TINY, "batch_size=0,16"])
    assert first.returncode == 1 and "1 cells done, 1 failed" in first.stdout
    bad, good = (f"pointmaze-umaze-v0/bc,batch_size={size}" for size in (0, 16))
    lines = results(tmp_path)
    assert lines.keys() == {bad, good}
    assert lines[bad]["reason"] == "status 1: batch_size must be positive, not 0."
    done = lines[good]
    assert done["config"]["batch_size"] == 16 and len(done["returns"]) == 1 and done["versions"]["jax"]
    assert done["command"].startswith("benchmarks/sweep.py quick") and done["commit"] and done["updates_per_second"] > 0
    made = (tmp_path / good / "summary.json").stat().st_mtime_ns

    second = start(tmp_path, settings=[*TINY, "batch_size=16,0"])
    assert "2 cells, 1 of them finished before" in second.stdout
    assert (tmp_path / good / "summary.json").stat().st_mtime_ns == made
    # The folder of another configuration is a failure as well, and what was there stays
    other = start(tmp_path, settings=[*TINY, "batch_size=16,32", "learning_rate=0.1"])
    assert other.returncode == 1 and "holds a run of another configuration" in other.stdout
    assert results(tmp_path)[good] == done and len(results(tmp_path)) == 3
    assert (tmp_path / good / "summary.json").stat().st_mtime_ns == made


def test_two_sweeps_share_a_folder_and_a_killed_one_is_resumed(umaze, tmp_path):
    settings = ["num_updates=100000", *TINY[1:]]
    first = subprocess.Popen(
        command(tmp_path, settings=settings), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    cell = tmp_path / "pointmaze-umaze-v0" / "bc"
    deadline = time.time() + 300
    while not (cell / "checkpoint.msgpack").exists() and time.time() < deadline:
        time.sleep(0.05)
    assert (cell / "checkpoint.msgpack").exists()
    second = start(tmp_path, settings=settings)
    assert "another sweep trains it" in second.stdout, second.stdout + second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    steps = [json.loads(line)["step"] for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert not (cell / "summary.json").exists()
    # The rest of this run would take long: that it goes on where it stopped is seen from its first new line
    third = subprocess.Popen(
        command(tmp_path, settings=settings), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    while time.time() < deadline + 300:
        lines = [json.loads(line)["step"] for line in (cell / "metrics.jsonl").read_text().splitlines()]
        if len(lines) > len(steps):
            break
        time.sleep(0.05)
    os.killpg(third.pid, signal.SIGKILL)
    third.wait()
    assert lines[: len(steps) - 1] == steps[:-1] and len(lines) > len(steps)


def test_ray_ends_every_cell_once_though_a_node_dies(umaze, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        settings = ["num_updates=1500", *TINY[1:], "batch_size=16,17,18,19"]
        process = subprocess.Popen(
            command(tmp_path, f"--ray={cluster.address}", "--cpus=1", settings=settings),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.time() + 240
        while not list(tmp_path.glob("*/*/summary.json")) and time.time() < deadline and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None and len(list(tmp_path.glob("*/*/summary.json"))) < 4  # in mid-sweep
        cluster.remove_node(nodes[0], allow_graceful=False)
        output, _ = process.communicate(timeout=600)
    finally:
        cluster.shutdown()
    assert process.returncode == 0 and "4 cells done, 0 failed" in output, output
    lines = results(tmp_path)
    assert lines.keys() == {f"pointmaze-umaze-v0/bc,batch_size={size}" for size in (16, 17, 18, 19)}
    assert all(line["num_updates"] == 1500 and len(line["returns"]) == 1 for line in lines.values())
    assert not list(tmp_path.rglob("failed.json")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("name", ["quick", "full"])
def test_the_protocols_have_every_algorithm_and_no_setting_that_fits_nothing(sweep, name):
    protocols = tomllib.loads((ROOT / "benchmarks" / "protocols.toml").read_text())
    cells = sweep.make_cells(sweep.Options(name), protocols)  # refuses a field that an algorithm does not have
    algos = {path.stem for path in (ROOT / "algos").glob("*.py")} - {"__init__"}
    assert {cell.algo for cell in cells} == algos
    for algo, patterns in protocols[name]["tuned"].items():
        for pattern, settings in patterns.items():
            assert algo in algos and settings["source"], (algo, pattern)
            assert any(fnmatch.fnmatchcase(dataset, pattern) for dataset in protocols[name]["datasets"]), pattern
    # -1 a step is for a reward of 1 at a goal, which only the mazes have: elsewhere it makes death a way out
    for cell in cells:
        module = importlib.import_module(f"algos.{cell.algo}")
        config = module.Config(**cell.config)
        if getattr(config, "reward_shift", 0) < 0 and "pointmaze" not in config.dataset:
            assert any(word in config.dataset for word in ("cartpole", "icu")), cell.name
            with pytest.raises(SystemExit, match="continuous"):
                module.make_agent(config, Spec(4, 2, discrete=True))
