"""Algorithms x datasets x hyper-parameters x seeds: python benchmarks/sweep.py quick --methods iql bc

A protocol (benchmarks/protocols.toml) names datasets, methods (an algorithm file with settings) and, for each dataset,
the settings of each algorithm with their source. Every (dataset, method) is a cell, a run folder
OUT/DATASET/METHOD as `main` of the algorithm leaves it; seeds train in one program. `--set FIELD=VALUE[,VALUE...]`
makes a grid: float fields of the algorithm's Config join the seeds in that program, other fields with several values
make cells of their own.

A cell is a process, resumes from its checkpoint, and is not trained again once finished: the same command does what is
missing. A cell that fails leaves its reason in failed.json and the others go on. Two sweeps may share OUT: a cell that
another process trains is left to it. OUT/results.jsonl has one line per cell: its configuration, and either its summary
(per-seed, per-episode returns, timings, command, commit, versions, device) or why it failed.

`--ray local`, or the address of a cluster, runs the cells as Ray tasks, each in a temporary folder of its worker; the
files come back to OUT. A cell whose worker dies is started elsewhere.
"""

import dataclasses
import fnmatch
import importlib
import inspect
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent
# What a cell's process does. It holds the lock itself, for as long as it lives; the recorded command is the sweep's.
RUN = """
import importlib, json, pathlib, sys
import filelock
cell, sys.argv = json.loads(sys.argv[1]), json.loads(sys.argv[2])
algo = importlib.import_module("algos." + cell["algo"])
config = {name: tuple(value) if isinstance(value, list) else value for name, value in cell["config"].items()}
try:
    with filelock.FileLock(pathlib.Path(config["out"], ".lock"), timeout=0):
        algo.main(algo.Config(**config), cell["grid"])
except filelock.Timeout:
    sys.exit(75)
"""
LOCKED = 75


@dataclasses.dataclass(frozen=True)
class Options:
    protocol: Annotated[str, tyro.conf.Positional] = "quick"  # a section of benchmarks/protocols.toml
    methods: tuple[str, ...] = ()  # of the protocol, or any algorithm file; by default all of the protocol
    datasets: tuple[str, ...] = ()  # by default all of the protocol
    set: tuple[str, ...] = ()  # FIELD=VALUE[,VALUE...]: overrides the protocol for every cell
    out: str = ""  # by default benchmarks/results/PROTOCOL; --set needs one of its own
    ray: str = ""  # "local" or the address of a Ray cluster
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
    if not (HERE.parent / "algos" / f"{algo}.py").exists():
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
    static = {name: values for name, values in chosen.items() if name not in grid}
    cells = []
    for values in itertools.product(*static.values()):
        point = dict(zip(static, values, strict=True))
        several = [f"{name}={value}" for name, value in point.items() if len(static[name]) > 1]
        name = "/".join([dataset.removeprefix("stitch/"), ",".join([method, *several])])
        config = {
            name: float(v) if type(v) is int and fields[name] is not int else v
            for name, v in (settings | point).items()
        }
        cells.append(Cell(name, algo, config | {"dataset": dataset}, grid))
    return cells


# --- One cell ------------------------------------------------------------------------------------------


def is_finished(cell: Cell, folder: Path) -> bool:
    """Whether the folder holds the finished run of this very cell."""
    if not (folder / "summary.json").exists():
        return False
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.config.items()}
    config = dataclasses.asdict(importlib.import_module(f"algos.{cell.algo}").Config(**config))
    config = {"algo": cell.algo, **config, "grid": cell.grid, "out": ""}
    return json.loads((folder / "config.json").read_text())["config"] == json.loads(json.dumps(config))


def run_cell(cell: Cell, folder: Path, command: list[str]) -> str | None:
    """Trains a cell in a process of its own, and passes its progress on.

    Returns why it failed, "" where it did not, None where another process trains it.
    """
    payload = cell._asdict() | {"config": cell.config | {"out": str(folder)}}
    arguments = [sys.executable, "-c", RUN, json.dumps(payload), json.dumps(command)]
    folder.mkdir(parents=True, exist_ok=True)
    tail = b""
    with subprocess.Popen(arguments, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while chunk := os.read(process.stdout.fileno(), 65536):
            sys.stderr.buffer.write(chunk)
            sys.stderr.flush()
            tail = (tail + chunk)[-4000:]
    if process.returncode in (0, LOCKED):
        return "" if process.returncode == 0 else None
    lines = tail.decode(errors="replace").replace("\r", "\n").strip().splitlines() or [""]
    return f"status {process.returncode}: {lines[-1]}"


def write(path: Path, content: str | bytes):
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


def settle(cell: Cell, folder: Path, reason: str):
    """Records how a cell ended. The finished run of another configuration stays the folder's one result."""
    if reason and not (folder / "summary.json").exists():
        write(folder / "failed.json", json.dumps({**cell._asdict(), "reason": reason}, indent=2))
    if not reason:
        (folder / "failed.json").unlink(missing_ok=True)


def collect(out: Path):
    """OUT/results.jsonl, from all run folders below OUT."""
    lines = []
    for path in sorted([*out.rglob("summary.json"), *out.rglob("failed.json")]):
        result = json.loads(path.read_text())
        if path.name == "summary.json":
            result = {**json.loads((path.parent / "config.json").read_text()), **result}
        lines.append(json.dumps({"cell": path.parent.relative_to(out).as_posix(), **result}))
    write(out / "results.jsonl", "".join(line + "\n" for line in lines))


# --- All cells -----------------------------------------------------------------------------------------


def run_here(cells, out, command):
    """One cell after another; each has the whole machine."""
    for cell in cells:
        yield cell, run_cell(cell, out / cell.name, command)


def run_on_ray(cells, out, command, options):
    """All cells at once, as many as the cluster has CPUs and GPUs for."""
    try:
        import ray
    except ImportError as error:
        raise SystemExit("--ray needs Ray: pip install -e '.[ray]'.") from error

    def task(cell):
        with tempfile.TemporaryDirectory() as folder:
            reason = run_cell(Cell(*cell), Path(folder) / "run", command)
            return reason, {p.name: p.read_bytes() for p in (Path(folder) / "run").glob("[!.]*")}

    ray.init(address=None if options.ray == "local" else options.ray, log_to_driver=False, ignore_reinit_error=True)
    # A worker or a node that dies is no failure of the cell: Ray starts the task again, on another node if need be.
    remote = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=3)(task)
    pending = {remote.remote(tuple(cell)): cell for cell in cells}
    while pending:
        (done,), _ = ray.wait(list(pending))
        cell = pending.pop(done)
        try:
            reason, files = ray.get(done)
        except ray.exceptions.RayError as error:
            reason, files = f"Ray: {' '.join(str(error).split())[:300]}", {}
        if "summary.json" in files:  # written last here too: it says that the others are there
            files["summary.json"] = files.pop("summary.json")
        for name, content in files.items():
            write(out / cell.name / name, content)
        yield cell, reason


def main(options: Options):
    protocols = tomllib.loads((HERE / "protocols.toml").read_text())
    cells = make_cells(options, protocols)
    if options.set and not options.out:
        raise SystemExit("--set departs from the protocol, whose results benchmarks/results keeps: give another --out.")
    out = Path(options.out or HERE / "results" / options.protocol).resolve()
    missing = [cell for cell in cells if not is_finished(cell, out / cell.name)]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} of them finished before, in {out}")
    started, failed = time.perf_counter(), 0
    results = run_on_ray(missing, out, sys.argv, options) if options.ray else run_here(missing, out, sys.argv)
    for i, (cell, reason) in enumerate(results, 1):
        if reason is None:
            print(f"[{i}/{len(missing)}] {cell.name}: another sweep trains it")
            continue
        settle(cell, out / cell.name, reason)
        collect(out)
        failed += bool(reason)
        left = (time.perf_counter() - started) / i * (len(missing) - i) / 60
        print(f"[{i}/{len(missing)}] {cell.name}: {reason or 'finished'}; about {left:.0f} min left", flush=True)
    collect(out)
    print(f"{len(missing) - failed} cells done, {failed} failed; all results: {out / 'results.jsonl'}")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(tyro.cli(Options, description=__doc__)), 1))
