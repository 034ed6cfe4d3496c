"""Algorithms x datasets x hyper-parameters x seeds: python benchmarks/sweep.py quick --methods iql bc

A protocol (benchmarks/protocols.toml) names datasets, methods (an algorithm file with settings) and, for each dataset,
the settings of each algorithm with their source. Every (dataset, method) is a cell, a run folder
OUT/DATASET/METHOD as `main` of the algorithm leaves it; seeds train in one program. `--set FIELD=VALUE[,VALUE...]`
makes a grid: float fields of the algorithm's Config join the seeds in that program, other fields with several values
make cells of their own.

A cell is a process, resumes from its checkpoint, and is not trained again once finished: the same command does what is
missing. A cell that fails leaves its reason in failed.json and the others go on; so does one whose algorithm is not for
the dataset's actions, which is no failure and not tried again. Ctrl-C or SIGTERM ends the sweep and the cell it runs.
Two sweeps may share OUT: a cell that another process trains comes last, and is taken over if that process dies.
OUT/results.jsonl has one line per cell: its configuration, command, commit and versions, and either its summary (per-
seed, per-episode returns, timings, device) or the reason.

`--ray local`, or the HOST:PORT of a cluster, runs the cells as Ray tasks. A cell whose worker dies is started elsewhere
and goes on from its checkpoint, since all cells work in OUT: the machines of a cluster must share that folder.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import filelock
import tyro

HERE = Path(__file__).resolve().parent
# What a cell's process does. It holds the lock itself, for as long as it lives; the recorded command is the sweep's.
RUN = """
import importlib, json, pathlib, sys, traceback
import filelock
cell, sys.argv, timeout = map(json.loads, sys.argv[1:])
algo = importlib.import_module("algos." + cell["algo"])
config = {name: tuple(value) if isinstance(value, list) else value for name, value in cell["config"].items()}
try:
    with filelock.FileLock(config["out"] + ".lock", timeout=timeout):
        pathlib.Path(config["out"], "failed.json").unlink(missing_ok=True)  # a run folder holds a run and nothing else
        algo.main(algo.Config(**config), cell["grid"])
except filelock.Timeout:
    sys.exit(75)
except Exception as error:
    traceback.print_exc()
    sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:500])  # the last line, whatever JAX adds above
"""
LOCKED = 75
BAR = r"[^\r\n]*?\[\d+:\d\d(:\d\d)?[<,][^\]\r\n]*\]"  # of tqdm: all before and in [01:23<04:56, 7.8update/s, loss=9]


@dataclasses.dataclass(frozen=True)
class Options:
    protocol: Annotated[str, tyro.conf.Positional] = "quick"  # a section of benchmarks/protocols.toml
    methods: tuple[str, ...] = ()  # of the protocol, or any algorithm file; by default all of the protocol
    datasets: tuple[str, ...] = ()  # by default all of the protocol
    set: tuple[str, ...] = ()  # FIELD=VALUE[,VALUE...]: overrides the protocol for every cell
    out: str = ""  # by default benchmarks/results/PROTOCOL; --set needs one of its own
    ray: str = ""  # "local", or the HOST:PORT of a Ray cluster whose machines share the folder --out
    cpus: float = 2  # of one cell, on Ray
    gpus: float = 0  # of one cell, on Ray


class Cell(NamedTuple):
    name: str  # its folder below OUT
    algo: str  # file in algos/
    config: dict[str, Any]  # fields of its Config
    grid: dict[str, list[float]]  # float fields, and their values


# --- Which cells ---------------------------------------------------------------------------------------


def make_cells(options: Options, protocols: dict) -> list[Cell]:
    """The cells of a sweep, in the order of the protocol's datasets."""
    if options.protocol not in protocols:
        raise SystemExit(f"{options.protocol} is no protocol: choose one of {', '.join(protocols)}.")
    protocol = protocols[options.protocol]
    chosen = {}
    for setting in options.set:
        name, _, values = setting.partition("=")
        name = name.replace("-", "_")
        if not (name and values):
            raise SystemExit(f"--set takes FIELD=VALUE[,VALUE...], not {setting}.")
        if name in chosen:
            raise SystemExit(f"--set has {name} twice: give all its values at once, {name}={chosen[name]},{values}.")
        chosen[name] = values
    cells = []
    for dataset in options.datasets or protocol["datasets"]:
        for method in options.methods or protocol["methods"]:
            settings = dict(protocol.get("methods", {}).get(method, {}))
            algo = settings.pop("algo", method)
            # From the most general to the most special: the later one counts.
            general = protocol["common"] | protocol["datasets"].get(dataset, {}) | tuned(protocol, algo, dataset)
            cells += make_cell_grid(method, algo, dataset, general | settings, chosen)
    names = [cell.name for cell in cells]
    for name in names:
        if Path(name).is_absolute() or {"", ".", ".."} & set(name.split("/")):
            raise SystemExit(f"The folder of a cell would be {name}, outside --out: correct --datasets or --methods.")
        if names.count(name) > 1:
            raise SystemExit(f"Two cells would share the folder {name}: name each dataset, method and value once.")
    return cells


def tuned(protocol, algo, dataset):
    """The settings of an algorithm on a dataset, of every pattern that fits its name; `source` is for the reader."""
    patterns = protocol.get("tuned", {}).get(algo, {})
    fitting = [settings for pattern, settings in patterns.items() if fnmatch.fnmatchcase(dataset, pattern)]
    return {name: value for settings in fitting for name, value in settings.items() if name != "source"}


def read_values(name, values, kind):
    """[1, 3] of "1,3": words where the field is a Literal, else JSON, and of the field's type."""
    try:
        read = values.split(",") if typing.get_origin(kind) is typing.Literal else json.loads(f"[{values}]")
    except json.JSONDecodeError:
        read = []
    if not read or not all(fits(value, kind) for value in read):
        kind = inspect.formatannotation(kind)
        raise SystemExit(f"--set {name} takes {kind}, not {values}: write true, 3, 0.5, [64,64], or a Literal's word.")
    return read


def fits(value, kind) -> bool:
    """Whether a JSON value is one of a type that Configs have."""
    if typing.get_origin(kind) is typing.Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list) and all(fits(v, typing.get_args(kind)[0]) for v in value)
    if typing.get_origin(kind) is types.UnionType:
        return any(fits(value, k) for k in typing.get_args(kind))
    return type(value) is kind or kind is float and type(value) is int  # True is no int


def make_cell_grid(method, algo, dataset, settings, chosen):
    """One cell per combination of the values that cannot be traced; floats with several values are its grid."""
    if algo not in {path.stem for path in (HERE.parent / "algos").glob("[!_]*.py")}:
        raise SystemExit(f"{algo} is no file in algos/ and no method of the protocol.")
    module = importlib.import_module(f"algos.{algo}")
    fields = {field.name: field.type for field in dataclasses.fields(module.Config)}
    fields = {name: kind for name, kind in fields.items() if name not in ("dataset", "out")}  # options of a sweep
    unknown = sorted((settings.keys() | chosen.keys()) - fields.keys())
    if unknown:
        raise SystemExit(
            f"{algo} has no setting {', '.join(unknown)}: correct it, or leave {algo} out of --methods. "
            f"It has {', '.join(fields)}; data and folder are --datasets and --out."
        )
    chosen = {name: read_values(name, values, fields[name]) for name, values in chosen.items()}
    read_by_data = inspect.getsource(module.load_data)
    traced = {name for name, values in chosen.items() if fields[name] is float and f"cfg.{name}" not in read_by_data}
    grid = {name: [float(v) for v in values] for name, values in chosen.items() if name in traced and len(values) > 1}
    for name, values in grid.items():
        if len(set(values)) < len(values):
            raise SystemExit(f"--set {name} has a value twice: name each once.")
    static = {name: values for name, values in chosen.items() if name not in grid}
    cells = []
    for values in itertools.product(*static.values()):
        point = dict(zip(static, values, strict=True))
        several = [f"{name}={value}" for name, value in point.items() if len(static[name]) > 1]
        name = "/".join([dataset.removeprefix("stitch/"), ",".join([method, *several])])
        point = {name: float(value) if fields[name] is float else value for name, value in point.items()}
        cells.append(Cell(name, algo, settings | point | {"dataset": dataset}, grid))
    return cells


# --- One cell ------------------------------------------------------------------------------------------


def read(path: Path) -> dict | None:
    """The object in a JSON file, None where it is missing, cut or something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def full_config(cell: Cell) -> dict:
    """The configuration as `main` of the algorithm records it: with all defaults, without the folder."""
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.config.items()}
    config = dataclasses.asdict(importlib.import_module(f"algos.{cell.algo}").Config(**config))
    return json.loads(json.dumps({"algo": cell.algo, **config, "grid": cell.grid, "out": ""}))


def does_not_apply(reason: str) -> bool:
    """Whether a cell ended since its algorithm is not for such actions: that is no failure."""
    return "needs discrete actions" in reason or "needs continuous actions" in reason


def ended_before(cell: Cell, folder: Path) -> str | None:
    """How this very cell ended: "" where it is finished, why it does not apply, or None where it is to be run."""
    config, summary, failed = (read(folder / f"{name}.json") for name in ("config", "summary", "failed"))
    if config and summary and same(cell, config.get("config")):
        return ""
    reason = str(failed.get("reason")) if failed else ""
    return reason if does_not_apply(reason) and same(cell, failed.get("config")) else None


def same(cell: Cell, recorded) -> bool:
    """Whether a recorded configuration is the cell's: a field that is newer than the record has its default there."""
    if not isinstance(recorded, dict):
        return False
    known = {**full_config(cell._replace(config={})), **recorded}
    data = known.pop("data", None)  # which older results do not have
    today = fingerprint(cell.config["dataset"]) if data and known == full_config(cell) else None
    return known == full_config(cell) and today in (None, data)


@functools.cache
def fingerprint(dataset_id: str) -> dict | None:
    """Of the data that this name stands for today; None where they are not on this machine, {} if they are damaged."""
    from minari.storage.datasets_root_dir import get_dataset_path

    from common.datasets import DatasetError, load_dataset

    if not Path(get_dataset_path(dataset_id)).exists():
        return None
    try:
        return load_dataset(dataset_id, images=True, on_device=False)[1].fingerprint  # the runs need the device
    except DatasetError:
        return {}


def run_cell(cell: Cell, folder: Path, command: list[str], wait: bool = False) -> str | None:
    """Trains a cell in a process of its own, and passes its progress on.

    Returns why it failed, "" where it did not. Where another process trains it: None, or waits for that one.
    """
    config, summary = folder / "config.json", folder / "summary.json"
    for path in (config, summary):
        if read(path) is None and (path.exists() or summary.exists()):
            return f"{path} is missing or cut: remove that folder to train the cell anew."
    folder.mkdir(parents=True, exist_ok=True)
    payload = cell._asdict() | {"config": cell.config | {"out": str(folder)}}
    # Unbuffered, so that what is printed comes before the sentence it ends with
    arguments = [sys.executable, "-u", "-c", RUN, json.dumps(payload), json.dumps(command), "-1" if wait else "0"]
    tail = b""
    with subprocess.Popen(arguments, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                sys.stderr.buffer.write(chunk)
                sys.stderr.flush()
                tail = (tail + chunk)[-4000:]
        except BaseException:  # Ctrl-C, SIGTERM, or nobody reads what is passed on: nothing goes on unseen
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            raise
    if process.returncode == 0 and read(summary) is None:
        return f"ended with status 0, but without a summary: {last_sentence(tail)}"
    if process.returncode in (0, LOCKED):
        return "" if process.returncode == 0 else None
    return why_it_ended(process.returncode, last_sentence(tail))


def why_it_ended(status: int, said: str) -> str:
    if status == -signal.SIGKILL:  # by another process, which for want of memory is the system
        return "killed by signal 9 (out of memory?)"
    if status < 0:
        return f"killed by signal {-status} ({signal.strsignal(-status)}): {said}"
    return f"status {status}: {said}"


def last_sentence(output: bytes) -> str:
    """The last line that is no progress bar, without one that stands before it in that line."""
    text = output.decode(errors="replace").replace("\r\n", "\n")
    text = re.sub(BAR, "\n", text).replace("\r", "\n")
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["without a word"])[-1]


def write(path: Path, content: str | bytes):
    """Whole or not at all: what was there stays where the disk is full, or a kill comes in between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise SystemExit(f"{path} cannot be written ({error.strerror or error}).") from error


def settle(cell: Cell, folder: Path, reason: str):
    """Leaves failed.json where a cell failed or does not apply, and none where it is finished."""
    if not reason:
        (folder / "failed.json").unlink(missing_ok=True)
        return
    from common.environments import provenance

    failed = {**cell._asdict(), "config": full_config(cell), "reason": reason, **provenance()}
    write(folder / "failed.json", json.dumps(failed, indent=2))


def collect(out: Path):
    """OUT/results.jsonl: a line for each run folder below OUT, of its finished run or else of how it failed."""
    lines = []
    for folder in sorted({path.parent for name in ("summary", "failed") for path in out.rglob(f"{name}.json")}):
        config, summary, failed = (read(folder / f"{name}.json") for name in ("config", "summary", "failed"))
        result = {**config, **summary} if config and summary else failed
        if result:
            lines.append(json.dumps({"cell": folder.relative_to(out).as_posix(), **result}))
    write(out / "results.jsonl", "".join(line + "\n" for line in lines))


# --- All cells -----------------------------------------------------------------------------------------


def run_here(cells, out):
    """One cell after another; each has the whole machine. Those that another sweep trains come last."""
    pending = [(cell, False) for cell in cells]
    while pending:
        cell, wait = pending.pop(0)
        reason = run_cell(cell, out / cell.name, sys.argv, wait)
        if reason is None:
            pending.append((cell, True))
        yield cell, reason


def run_on_ray(cells, out, options):
    """All cells at once, as many as the cluster has CPUs and GPUs for. Those that another sweep trains come last."""
    ray, command = connect(options), sys.argv

    def task(cell, wait):
        return run_cell(Cell(*cell), out / cell[0], command, wait)

    # A worker or a node that dies is no failure of the cell: Ray starts the task again, on another node if need be.
    remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=3)(task)
    pending = {remote.remote(tuple(cell), False): cell for cell in cells}
    while pending:
        (done,), _ = ray.wait(list(pending))
        cell = pending.pop(done)
        try:
            reason = ray.get(done)
        except ray.exceptions.RayError as error:
            reason = f"Ray: {' '.join(str(error).split())[:300]}"
        if reason is None:  # another sweep has its lock or, for a moment, the process of a dead worker
            pending[remote.remote(tuple(cell), True)] = cell
        if reason == "" and not (out / cell.name / "summary.json").exists():
            reason = f"{out} has no result of it: give an --out that all machines of the cluster share."
        yield cell, reason


def connect(options):
    """Ray, on a cluster that answers and has a node which a cell fits on."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit("--ray needs Ray: pip install -e '.[ray]'.") from error

    if options.ray != "local":
        host, _, port = options.ray.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError) as error:
            raise SystemExit(f"No cluster answers at {options.ray}: --ray takes local, or its HOST:PORT.") from error
    ray.init(address=options.ray, log_to_driver=False, ignore_reinit_error=True)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= options.cpus and node.get("GPU", 0) >= options.gpus for node in nodes):
        raise SystemExit(f"No node has {options.cpus:g} CPUs and {options.gpus:g} GPUs: lower --cpus or --gpus.")
    return ray


def main(options: Options):
    protocols = tomllib.loads((HERE / "protocols.toml").read_text())
    cells = make_cells(options, protocols)
    if options.set and not options.out:
        raise SystemExit("--set departs from the protocol, whose results benchmarks/results keeps: give another --out.")
    out = Path(options.out or HERE / "results" / options.protocol).resolve()
    out.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / ".lock")  # of failed.json and results.jsonl: sweeps that share OUT all write them
    reasons = {cell.name: ended_before(cell, out / cell.name) for cell in cells}
    missing = [cell for cell in cells if reasons[cell.name] is None]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them ended before, in {out}", flush=True)
    with lock:
        for cell in cells:
            if reasons[cell.name] == "":
                settle(cell, out / cell.name, "")
        collect(out)
    started, ended = time.perf_counter(), 0
    for cell, reason in run_on_ray(missing, out, options) if options.ray else run_here(missing, out):
        if reason is None:
            print(f"{cell.name}: another sweep trains it; it comes last, when that one has ended", flush=True)
            continue
        with lock:
            settle(cell, out / cell.name, reason)
            collect(out)
        reasons[cell.name] = reason
        ended += 1
        left = (time.perf_counter() - started) / ended * (len(missing) - ended) / 60
        print(f"[{ended}/{len(missing)}] {cell.name}: {reason or 'finished'}; about {left:.0f} min left", flush=True)
    finished = sum(not reason for reason in reasons.values())
    failed = sum(not does_not_apply(reason) for reason in reasons.values() if reason)
    others = len(reasons) - finished - failed
    print(f"{finished} finished, {others} do not apply, {failed} failed; all results: {out / 'results.jsonl'}")
    return failed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: with its cell
    try:
        sys.exit(min(main(tyro.cli(Options, description=__doc__)), 1))
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from the last checkpoint.")
