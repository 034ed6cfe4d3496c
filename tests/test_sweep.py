"""benchmarks/sweep.py: which cells there are, that each ends once, and that no failure stops the others."""

import concurrent.futures
import contextlib
import dataclasses
import fnmatch
import functools
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import tomllib
import types

import flax
import pytest
from conftest import EVALUATORS, GOALS, project_algos

from common.environments import Spec

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
        (dict(protocol="p", datasets=("../../x-v0",)), "outside --out: correct --datasets or --methods"),
        (dict(protocol="p", datasets=("/tmp/x-v0",)), "outside --out"),
        (dict(protocol="p", datasets=("stitch//x-v0",)), "outside --out"),
        (dict(protocol="p", datasets=("x/./y-v0",)), "outside --out"),
        (dict(protocol="p", methods=("../algos/iql",)), "../algos/iql is no file in algos/"),
        (dict(protocol="p", methods=("__init__",)), "__init__ is no file in algos/"),
        (dict(protocol="p", datasets=("stitch/a-v0", "a-v0")), "Two cells would share the folder a-v0/bc: name each"),
        (dict(protocol="p", methods=("iql", "iql")), "Two cells would share the folder a-v0/iql"),
        (dict(protocol="p", set=("batch_size=16,16",)), "Two cells would share the folder a-v0/bc,batch_size=16"),
        (dict(protocol="p", methods=("iql",), set=("beta=1,1.0",)), "--set beta has a value twice"),
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


def test_a_failed_cell_is_recorded_and_a_second_sweep_does_what_is_missing(sweep, umaze, tmp_path, monkeypatch):
    bad, good = (f"pointmaze-umaze-v0/bc,batch_size={size}" for size in (0, 16))
    grid = [*TINY, "learning_rate=0.1,0.01"]
    (tmp_path / good).mkdir(parents=True)
    (tmp_path / good / "failed.json").write_text(json.dumps({"config": {}, "reason": "of an earlier sweep"}))
    first = start(tmp_path, settings=[*grid, "batch_size=0,16"])
    assert first.returncode == 1 and "1 finished, 0 do not apply, 1 failed" in first.stdout
    assert not (tmp_path / good / "failed.json").exists()
    lines = results(tmp_path)
    assert lines.keys() == {bad, good}
    assert lines[bad]["reason"] == "status 1: batch_size must be from 1 to 2147483647, not 0."
    done = lines[good]
    assert done["config"]["batch_size"] == 16 and done["versions"]["jax"]
    assert done["grid"] == [{"learning_rate": 0.1}, {"learning_rate": 0.01}] and len(done["returns"]) == 2
    assert done["command"].startswith("benchmarks/sweep.py quick") and done["commit"] and done["updates_per_second"] > 0
    assert done["config"].pop("data") and lines[bad]["config"] == done["config"] | {"batch_size": 0}
    assert all(lines[bad][name] == done[name] for name in ("command", "commit", "versions"))

    # The folder of another configuration is a failure as well, and what was there stays the one result
    other = sweep.Options("quick", ("bc",), (UMAZE,), (*TINY, "batch_size=16,0"), str(tmp_path))
    assert sweep.main(other) == 2
    assert (
        "holds something else than this very run" in json.loads((tmp_path / good / "failed.json").read_text())["reason"]
    )
    done = lines[good] = results(tmp_path)[good]  # with its data
    assert done["config"]["batch_size"] == 16 and len(results(tmp_path)) == 2
    # The same sweep again tries what failed, and nothing else
    monkeypatch.setattr(sweep, "run_cell", lambda cell, *args: f"{cell.name} failed again")
    assert sweep.main(dataclasses.replace(other, set=(*grid, "batch_size=16,0"))) == 1
    assert results(tmp_path)[bad]["reason"] == f"{bad} failed again" and results(tmp_path)[good] == done
    assert not (tmp_path / good / "failed.json").exists()


def test_a_failure_names_its_cause(sweep, tmp_path, monkeypatch):
    """Whatever it raises, in one line, though what is printed before and a traceback stand around it."""
    fails = sweep.RUN.replace("algo.main(", 'print("not scored"); raise ValueError("of two\\n lines") or (')
    monkeypatch.setattr(sweep, "RUN", fails)
    assert fails.count("raise") == 1 and sweep.main(sweep.Options("quick", ("bc",), (UMAZE,), out=str(tmp_path))) == 1
    assert results(tmp_path)["pointmaze-umaze-v0/bc"]["reason"] == "status 1: ValueError: of two lines"


def test_what_does_not_apply_is_no_failure_and_not_tried_again(sweep, umaze, tmp_path, monkeypatch, capsys):
    options = sweep.Options("quick", ("dqn",), (UMAZE,), (*TINY[:-1],), str(tmp_path))
    assert sweep.main(options) == 0
    assert "0 finished, 1 do not apply, 0 failed" in capsys.readouterr().out
    monkeypatch.setattr(sweep, "run_cell", lambda *args: "tried again")
    sweep.main(options)
    (line,) = results(tmp_path).values()
    assert "DQN needs discrete actions" in line["reason"]


def test_the_sweep_that_the_texts_show_ends_in_its_best_value(umaze, tmp_path):
    """Their two commands, on one dataset and with tiny runs: a row for each combination, a best one and a picture."""
    pages = [ROOT / "README.md", *(ROOT / "benchmarks").glob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    (line, options, out) = re.search(r"^ *python (benchmarks/sweep.py (.*--set .*) --out (\S+))", text, re.M).groups()
    assert re.search(rf"^ *python benchmarks/report.py {re.escape(out)}\b", text, re.M), line
    words = options.replace('"', "").split()
    settings = words[words.index("--set") + 1 :]
    tiny = [setting for setting in TINY if setting.split("=")[0] not in [s.split("=")[0] for s in settings]]
    done = subprocess.run(
        [sys.executable, "benchmarks/sweep.py", *words, *tiny, "--datasets", UMAZE, f"--out={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    report = [sys.executable, "benchmarks/report.py", str(tmp_path)]
    said = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, timeout=600)
    count = math.prod(len(setting.split(",")) for setting in settings)
    assert said.returncode == 0 and f"best of {count} is" in said.stdout, said.stderr[-2000:]
    text = (tmp_path / "report.md").read_text()
    assert sum(line.startswith("| ") for line in text.splitlines()) == count + 2
    assert [path.name for path in tmp_path.glob("sweep_*.png")] == ["sweep_pointmaze-umaze-v0-iql.png"]
    assert "sweep_pointmaze-umaze-v0-iql.png" in text


@pytest.mark.parametrize("cut", [("summary", "config"), ("config", ""), ("summary", "")])
def test_a_damaged_folder_is_a_failed_cell(sweep, tmp_path, cut):
    folder = tmp_path / "pointmaze-umaze-v0" / "bc"
    folder.mkdir(parents=True)
    damaged, whole = cut
    (folder / f"{damaged}.json").write_text('{"config": {')
    if whole:
        (folder / f"{whole}.json").write_text("{}")
    assert sweep.main(sweep.Options("quick", ("bc",), (UMAZE,), out=str(tmp_path))) == 1
    (line,) = results(tmp_path).values()
    assert str(folder) in line["reason"] and "missing or cut: remove that folder" in line["reason"]


@pytest.mark.parametrize("content", ["7", "[1, 2]", '"text"', "null", "{", "[" * 100_000], ids=range(6))
@pytest.mark.parametrize("name", ["config.json", "summary.json", "failed.json"])
def test_a_foreign_file_stops_no_sweep(sweep, tmp_path, monkeypatch, name, content):
    """Nor does the same in a folder of OUT that is no cell."""
    for folder in (tmp_path / "pointmaze-umaze-v0" / "bc", tmp_path / "other"):
        folder.mkdir(parents=True)
        (folder / name).write_text(content)
    if name == "failed.json":
        monkeypatch.setattr(sweep, "RUN", "import sys; sys.exit('not run')")
    assert sweep.main(sweep.Options("quick", ("bc",), (UMAZE,), out=str(tmp_path))) == 1
    (line,) = results(tmp_path).values()
    expected = "status 1: not run" if name == "failed.json" else "missing or cut: remove that folder"
    assert line["cell"] == "pointmaze-umaze-v0/bc" and expected in line["reason"]


BAR = "\r 50%|#####     | 5/10 [00:01<00:01, 5.00update/s, loss=1.2]"


@pytest.mark.parametrize(
    "output, sentence",
    [
        ("ValueError: beta\n", "ValueError: beta"),
        (f"{BAR}{BAR}\nValueError: beta\n", "ValueError: beta"),
        (f"ValueError: beta\n{BAR}", "ValueError: beta"),
        (f"ValueError: beta\n{BAR}\n\n  \n", "ValueError: beta"),
        (f"{BAR}Fatal Python error: Aborted\n", "Fatal Python error: Aborted"),
        (f"said\r\n{BAR}\r", "said"),
        ("said\n\rscore 3.0:   0%|          | 0/10 [00:00<?, ?update/s]", "said"),
        ("said\n\r12update [01:02:03, 5.1update/s]", "said"),
        ("% | 5/10 [00:01<00:01, 5.00update/s]", "without a word"),  # its beginning was cut off
        (BAR, "without a word"),
        ("", "without a word"),
        ("shape [3, 4] is not [5]\n", "shape [3, 4] is not [5]"),
    ],
)
def test_the_reason_is_the_last_sentence_and_no_progress_bar(sweep, output, sentence):
    assert sweep.last_sentence(output.encode()) == sentence


@pytest.mark.parametrize(
    "code, reason",
    [
        ("os.kill(os.getpid(), 9)", "killed by signal 9 (out of memory?)"),
        ("os.kill(os.getpid(), 11)", "killed by signal 11 (Segmentation fault): said"),
        ("os._exit(3)", "status 3: said"),
        ("sys.exit('beta must be positive.')", "status 1: beta must be positive."),
        ("print('not scored'); sys.exit('beta must be positive.')", "status 1: beta must be positive."),
        ("os._exit(0)", "ended with status 0, but without a summary: said"),
        ("print('The simulator gave up.'); os._exit(3)", "status 3: The simulator gave up."),
        ("sys.exit()", "ended with status 0, but without a summary: said"),
    ],
)
def test_how_a_cell_ended(sweep, tmp_path, monkeypatch, code, reason):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    bar = f"sys.stderr.write('said\\n' + {BAR!r}); sys.stderr.flush()"
    monkeypatch.setattr(sweep, "RUN", f"import os, sys; {bar}; {code}")
    assert sweep.main(sweep.Options("quick", ("bc",), (UMAZE,), out=str(tmp_path))) == 1
    assert [line["reason"] for line in results(tmp_path).values()] == [reason]


SLEEPER = """
import pathlib, signal, sys, time
sys.path.insert(0, "benchmarks")
import sweep
sweep.RUN = "import json, os, pathlib, sys, time; out = json.loads(sys.argv[1])['config']['out']; " \\
    "pathlib.Path(out, 'pid').write_text(str(os.getpid())); time.sleep(300)"
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_sweep_alone_ends_its_cell(tmp_path, sent):
    """The sweep's own last lines, from `if __name__`, with a cell that sleeps."""
    script = (ROOT / "benchmarks" / "sweep.py").read_text()
    script = script.replace(
        "LOCKED = 75\n", SLEEPER.split("import sweep\n")[1].replace("sweep.RUN", "RUN") + "LOCKED = 75\n"
    )
    script = script.replace("Path(__file__)", f"Path({str(ROOT / 'benchmarks' / 'sweep.py')!r})")
    (tmp_path / "sleeper.py").write_text(script)
    arguments = [sys.executable, str(tmp_path / "sleeper.py"), *command(tmp_path / "out")[2:]]
    # A shell's background job ignores SIGINT, and so would all that it starts
    options = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL), "text": True}
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)
    pid = tmp_path / "out" / "pointmaze-umaze-v0" / "bc" / "pid"
    try:
        deadline = time.time() + 60
        while not (pid.exists() and pid.read_text()) and time.time() < deadline:
            time.sleep(0.05)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and errors.strip().endswith("goes on from the last checkpoint.")
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    finally:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(int(pid.read_text()), signal.SIGKILL)
        process.kill()


def finish(sweep, cell, folder, **changes):
    """A finished run of a cell, as main leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": sweep.full_config(cell) | changes}))
    (folder / "summary.json").write_text('{"algo": "iql"}')


def test_a_finished_cell_is_of_the_same_data_and_may_be_older_than_a_field(sweep, tmp_path, monkeypatch):
    (cell,) = sweep.make_cells(sweep.Options("p", ("iql",), ("stitch/a-v0",)), PROTOCOLS)
    today = {"hash": "a"}
    monkeypatch.setattr(sweep, "fingerprint", lambda dataset_id: today)
    finish(sweep, cell, tmp_path / "same", data={"hash": "a"})
    finish(sweep, cell, tmp_path / "other", data={"hash": "b"})
    finish(sweep, cell, tmp_path / "older")  # without a fingerprint
    finish(sweep, cell, tmp_path / "setting", beta=77.0)
    config = json.loads((tmp_path / "older" / "config.json").read_text())["config"]
    del config["max_weight"]  # it had its default before it was a field
    (tmp_path / "older" / "config.json").write_text(json.dumps({"config": config}))
    ended = {name: sweep.ended_before(cell, tmp_path / name) for name in ("same", "other", "older", "setting")}
    assert ended == {"same": "", "other": None, "older": "", "setting": None}
    today = None  # not on this machine: nothing to compare with
    assert sweep.ended_before(cell, tmp_path / "other") == ""


def test_a_fingerprint_is_that_of_the_data_on_this_machine(sweep, umaze, monkeypatch):
    sweep.fingerprint.cache_clear()
    assert sweep.fingerprint(UMAZE)["rows"] == umaze.total_steps
    assert sweep.fingerprint("own/nowhere-v0") is None
    seen = []  # to ask a GPU for its size would take its memory from the runs
    monkeypatch.setattr("common.datasets.check_memory", lambda *args: seen.append(args[-1]))
    sweep.fingerprint.cache_clear()
    assert sweep.fingerprint(UMAZE)["rows"] == umaze.total_steps and seen == [False]


def test_sweeps_that_write_at_the_same_time(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "run_cell", lambda *args: random.choice(["", "status 1: failed"]))
    options = sweep.Options("quick", datasets=(UMAZE,), out=str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for sweeps in [pool.submit(sweep.main, options) for _ in range(4)]:
            sweeps.result()
    lines = results(tmp_path)  # each line is whole, and the last one to write saw all files
    assert lines.keys() == {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("failed.json")}


def test_a_cell_that_another_sweep_trains_is_taken_over_when_that_one_is_killed(umaze, tmp_path):
    arguments = command(tmp_path, settings=["num_updates=300", *TINY[1:]])
    cell = tmp_path / "pointmaze-umaze-v0" / "bc"
    quiet = {"cwd": ROOT, "stderr": subprocess.DEVNULL, "start_new_session": True, "text": True}
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, **quiet)
    second = None
    try:
        while not (cell / "checkpoint.msgpack").exists() and first.poll() is None:
            time.sleep(0.01)
        assert first.poll() is None
        os.killpg(first.pid, signal.SIGSTOP)  # it keeps its lock
        assert not (cell / "summary.json").exists()
        saved = flax.serialization.msgpack_restore((cell / "checkpoint.msgpack").read_bytes())
        saved["seconds"]["train_seconds"] += 1_000  # which goes into the summary of whoever goes on from here
        (cell / "checkpoint.msgpack").write_bytes(flax.serialization.msgpack_serialize(saved))
        second = subprocess.Popen(arguments, stdout=subprocess.PIPE, **quiet)
        seen = [second.stdout.readline() for _ in range(2)]
        assert "another sweep trains it" in seen[1], seen
        os.killpg(first.pid, signal.SIGKILL)
        output, _ = second.communicate(timeout=300)
    finally:
        for process in filter(None, (first, second)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert second.returncode == 0 and "1 finished, 0 do not apply, 0 failed" in output
    lines = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10, 301, 10))
    assert json.loads((cell / "summary.json").read_text())["train_seconds"] > 1_000


def test_an_interrupted_sweep_ends_in_one_sentence(tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    assert "1 cells, 0 of them" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.strip().endswith("goes on from the last checkpoint.")
    assert "Traceback" not in errors


class FakeRay:
    """One node with 2 CPUs and a GPU, which runs nothing and finds all well."""

    exceptions = types.SimpleNamespace(RayError=RuntimeError)

    def init(self, **options):
        self.options = options

    def nodes(self):
        return [{"Alive": True, "Resources": {"CPU": 2, "GPU": 1}}, {"Alive": False, "Resources": {"CPU": 64}}]

    def remote(self, **asked):
        self.asked = asked
        return lambda task: types.SimpleNamespace(remote=lambda *args: object())

    def wait(self, pending):
        return pending[:1], pending[1:]

    def get(self, task):
        return ""


def test_what_a_cell_asks_ray_for(sweep, tmp_path, monkeypatch):
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)
    options = sweep.Options("quick", ("bc",), (UMAZE,), out=str(tmp_path), ray="local", cpus=1.5, gpus=0.5)
    assert sweep.main(options) == 1  # the folder of a finished cell is empty here: that machine has another one
    assert ray.options["address"] == "local"
    assert ray.asked["num_cpus"] == 1.5 and ray.asked["num_gpus"] == 0.5
    (line,) = results(tmp_path).values()
    assert "give an --out that all machines of the cluster share" in line["reason"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(ray="locall"), "No cluster answers at locall: --ray takes local, or its HOST:PORT"),
        (dict(ray="127.0.0.1:1"), "No cluster answers at 127.0.0.1:1"),
        (dict(ray="local", cpus=8), "No node has 8 CPUs and 0 GPUs: lower --cpus or --gpus"),
        (dict(ray="local", gpus=2), "No node has 2 CPUs and 2 GPUs: lower --cpus or --gpus"),
    ],
)
def test_a_cluster_that_cannot_run_a_cell_is_refused(sweep, tmp_path, monkeypatch, options, sentence):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    with pytest.raises(SystemExit, match=sentence):
        sweep.main(sweep.Options("quick", ("bc",), (UMAZE,), out=str(tmp_path), **options))


def test_ray_ends_every_cell_once_though_a_node_dies(umaze, tmp_path):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    other = tmp_path / "pointmaze-umaze-v0" / "bc,batch_size=20"  # a finished run of another configuration
    other.mkdir(parents=True)
    (other / "config.json").write_text('{"config": {}}')
    (other / "summary.json").write_text('{"score_mean": 1.0}')
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        settings = ["num_updates=500", *TINY[1:], "batch_size=16,17,18,20"]
        process = subprocess.Popen(
            command(tmp_path, f"--ray={cluster.address}", "--cpus=1", settings=settings),
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        deadline = time.time() + 240
        while len(list(tmp_path.glob("*/*/checkpoint.msgpack"))) < 2 and time.time() < deadline:  # both nodes train
            time.sleep(0.1)
        assert process.poll() is None and len(list(tmp_path.glob("*/*/summary.json"))) < 4  # in mid-sweep
        cluster.remove_node(nodes[0], allow_graceful=False)
        output, _ = process.communicate(timeout=600)
    finally:
        cluster.shutdown()
    assert process.returncode == 1 and "3 finished, 0 do not apply, 1 failed" in output, output
    assert "holds something else than this very run" in output
    lines = results(tmp_path)
    assert lines.pop("pointmaze-umaze-v0/bc,batch_size=20") == {
        "cell": "pointmaze-umaze-v0/bc,batch_size=20", "config": {}, "score_mean": 1.0
    }  # fmt: skip
    assert lines.keys() == {f"pointmaze-umaze-v0/bc,batch_size={size}" for size in (16, 17, 18)}
    for name, line in lines.items():
        assert line["num_updates"] == 500 and len(line["returns"]) == 1
        steps = [json.loads(text)["step"] for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(10, 501, 10))
    assert [path.parent for path in tmp_path.rglob("failed.json")] == [other]


def test_what_failed_in_the_committed_results_is_of_today_s_protocol(sweep):
    folder = ROOT / "benchmarks" / "results" / "quick"
    cells = sweep.make_cells(sweep.Options("quick"), tomllib.loads((ROOT / "benchmarks/protocols.toml").read_text()))
    cells = {cell.name: cell for cell in cells}
    for path in folder.rglob("failed.json"):
        failed, cell = json.loads(path.read_text()), cells[path.parent.relative_to(folder).as_posix()]
        assert not (path.parent / "summary.json").exists() and "dirty" not in failed["commit"]
        assert failed["config"] | cell.config == failed["config"] and sweep.does_not_apply(failed["reason"]), path


@pytest.mark.parametrize(
    "name",
    ["quick", "full", "goals", "goals-full", "models", "play", "standard", "hands", "people", "images", "traffic"]
    + ["atari", "driving"],
)
def test_the_protocols_have_every_algorithm_and_no_setting_that_fits_nothing(sweep, name):
    protocols = tomllib.loads((ROOT / "benchmarks" / "protocols.toml").read_text())
    cells = sweep.make_cells(sweep.Options(name), protocols)  # refuses a field that an algorithm does not have
    either = {"rvs"}  # learns to reach goals if it is told so
    algos = GOALS | either if name.startswith("goals") else set(project_algos()) - EVALUATORS - GOALS
    if name == "models":  # those that learn one, and what they are compared with
        algos = {algo for algo in algos if "model_hidden" in (ROOT / "algos" / f"{algo}.py").read_text()} | {"bc"}
    if name == "play":  # models of many modes, and what they are compared with
        names = ("fql", "ifql", "qc", "idql", "diffusion_ql", "edp")
        algos = {"bc", "iql", "rebrac"} | algos & set(names)
    if name == "people":  # of their paper's methods cloning alone learns from data
        algos = {"bc", "iql"}
    if name == "standard":  # what is published for D4RL's locomotion, and most read
        algos = {"bc", "td3_bc", "iql", "rebrac", "awac", "xql", "cql", "edac"}
    if name == "hands":  # the family's three
        algos = {"bc", "iql", "rebrac"}
    if name in ("traffic", "driving"):  # discrete actions: cloning, and two that learn values
        algos = {"bc", "iql", "cql_discrete"}
    if name == "atari":  # the paper's two, and those of every family
        algos = {"bc", "bcq_discrete", "cql_discrete", "iql"}
    if name == "images":
        algos = {"bc", "dqn", "bcq_discrete", "cql_discrete", "iql"}
    assert {cell.algo for cell in cells} == algos
    for algo, patterns in protocols[name]["tuned"].items():
        for pattern, settings in patterns.items():
            assert algo in algos and settings["source"], (algo, pattern)
            assert any(fnmatch.fnmatchcase(dataset, pattern) for dataset in protocols[name]["datasets"]), pattern
    # -1 a step is for a reward of 1 at a goal, which only the mazes have: elsewhere it makes death a way out
    for cell in cells:
        module = importlib.import_module(f"algos.{cell.algo}")
        config = module.Config(**cell.config)
        # main refuses a cell whose counts are not multiples of each other
        for count in (config.num_updates, getattr(config, "pretrain_updates", 0)):
            assert count % config.eval_interval == 0 and config.eval_interval % config.log_interval == 0, cell.name
        if getattr(config, "reward_shift", 0) < 0 and "pointmaze" not in config.dataset:
            assert any(word in config.dataset for word in ("cartpole", "icu")), cell.name
            with pytest.raises(SystemExit, match="continuous"):
                module.make_agent(config, Spec(4, 2, discrete=True))
