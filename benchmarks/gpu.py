"""Eight minutes on a GPU or TPU: how fast the algorithms train there, how soon they start, and that they learn.

    pip install -e '.[cuda]'        # or '.[tpu]'
    python benchmarks/gpu.py        # please send us benchmarks/results/gpu-DEVICE.jsonl

One line of JSON for each of these, printed and written as it comes, so that a run that ends early keeps what it has:
- `device`: what it ran on, with versions and commit.
- `first_update_seconds` of IQL with one seed, from a fresh process on: with an empty compilation cache, and warm.
- `curve`: IQL's quick start with 16 seeds: mean score at each evaluation, and where the time went.
- `updates_per_second`, of all seeds together, of six algorithms with 1, 16 and 64 seeds at speed.py's shapes, with
  JAX's default precision of matrix products (TF32 on a GPU, bfloat16 on a TPU) and the highest (float32).
- `error`: what could not be measured and why. After `--minutes`, nothing new is begun.
"""

import concurrent.futures
import dataclasses
import datetime
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import speed  # benchmarks/speed.py
import tyro

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Options:
    algos: tuple[str, ...] = ("iql", "td3_bc", "rebrac", "cql", "sac_n", "edac")  # files in algos/
    seeds: tuple[int, ...] = (1, 16, 64)  # numbers of seeds trained together
    precisions: tuple[str, ...] = ("default", "highest")  # of matrix products, as JAX names them
    updates: int = 2_000  # of each seed in one compiled call
    seconds: float = 2.0  # of training that each speed is measured for, at least
    curve: str = "--num-seeds 16"  # arguments of algos/iql.py for the learning curve
    minutes: float = 7.0  # after which nothing new is begun
    out: str = ""  # the result file; by default benchmarks/results/gpu-DEVICE.jsonl


def main(options: Options):
    started = time.perf_counter()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # processes follow one another on one device
    about, cold, warm = first_updates(options.updates)
    slug = "".join(c if c.isalnum() else "-" for c in about["device"].lower())
    out = Path(options.out or HERE / "results" / f"gpu-{slug}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)

    def late():
        return time.perf_counter() - started > 60 * options.minutes

    with out.open("w") as file:

        def say(**line):
            print(json.dumps(line), file=file, flush=True)
            print(json.dumps(line), flush=True)

        say(
            device=about["device"],
            versions=about["versions"],
            command=" ".join(sys.argv),
            commit=subprocess.getoutput(f"git -C {HERE} describe --always --dirty --abbrev=40"),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            shape=speed.SHAPE,
        )
        say(algo="iql", first_update_seconds={"cold": cold["seconds"], "warm": warm["seconds"]})
        say(**learning_curve(options.curve))
        for precision in options.precisions:
            for seeds in options.seeds:
                if late():
                    say(error=f"no time left for {seeds} seeds at precision {precision}")
                    continue
                for line in speeds(options, precision, seeds):
                    say(**line)
    print(f"{time.perf_counter() - started:.0f} s. Written to {out}", file=sys.stderr)


def first_updates(updates):
    """What speed.py's worker says of itself, and of its first update with an empty and with a filled cache."""
    with tempfile.TemporaryDirectory() as cache:
        job = {"algo": "iql", "setting": {}, "seeds": 1, "updates": updates, "cache": cache}
        answers = []
        for _ in ("cold", "warm"):
            worker = speed.Worker([sys.executable, str(HERE / "speed.py"), "worker", json.dumps(job)])
            answers.append(worker.ask("first"))
            about = worker.ask("about")
            worker.close()
    return about, *answers


def learning_curve(arguments):
    """A run of algos/iql.py in a process of its own: its mean score at each evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(HERE.parent / "algos" / "iql.py"), *shlex.split(arguments), "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"error": f"the learning curve: {' '.join(done.stderr.split())[-300:]}"}
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((Path(folder) / "summary.json").read_text())
    said = (
        "dataset",
        "score_mean",
        "score_std",
        "compile_seconds",
        "train_seconds",
        "eval_seconds",
        "updates_per_second",
    )
    return {"curve": curve(lines), **{name: summary[name] for name in said}}


def curve(lines):
    """{update: mean score of the runs} of the lines of metrics.jsonl."""
    scores = {}
    for line in lines:
        scores.setdefault(line["step"], []).append(math.nan if line["score"] is None else line["score"])
    return {step: sum(x) / len(x) for step, x in scores.items()}


def speeds(options, precision, seeds):
    """Yields a line for each algorithm. They are compiled at the same time, and then timed one after another."""
    import jax

    def program(algo):
        begun = time.perf_counter()
        module, cfg, interface, dataset = speed.problem(algo, {}, num_seeds=seeds, log_interval=options.updates)
        with jax.default_matmul_precision(precision):  # of this thread
            _, step, _ = speed.trainer(module, cfg, interface, dataset)
        return step, cfg.log_interval, time.perf_counter() - begun

    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = {algo: pool.submit(program, algo) for algo in options.algos}
    for algo in options.algos:
        line = {"algo": algo, "seeds": seeds, "precision": precision}
        try:
            step, updates, compile_seconds = programs.pop(algo).result()
            rate, calls = timed(step, updates, seeds, options.seconds)
            yield line | {"updates_per_second": rate, "calls": calls, "compile_seconds": compile_seconds}
        except (Exception, SystemExit) as error:  # too large for this device, say: the others are measured
            yield line | {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def timed(step, updates, seeds, at_least):
    """(updates per second of all seeds together, calls that it is of), after a first call that warms up."""
    speed.seconds_of(step)
    calls, seconds = 0, 0.0
    while seconds < at_least:
        seconds += speed.seconds_of(step)
        calls += 1
    return speed.updates_per_second(updates * calls, seeds, seconds), calls


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
