"""Where the time of learning on-line goes: simulator, policy or updates.

    python benchmarks/speed_online.py      # results/online-speed.json and a table

On two cores a file takes a minute for each repetition with `--steps 500`, and some two with the default.

Each file that can learn on-line is run as a user runs it, with its defaults but for the number of updates for each step
(1, and one seed), in an environment of HalfCheetah, whose episodes all have 1,000 steps. Rates and shares are those of
the steps between a short and a long run: what a run does once, such as compiling, is in both.
"""

import ast
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from speed import processor, spread, write

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
ALGOS = tuple(sorted(path.stem for path in (ROOT / "algos").glob("*.py") if "\nclass Online:" in path.read_text()))


@dataclass(frozen=True)
class Options:
    algos: tuple[str, ...] = ALGOS
    dataset: str = "stitch/halfcheetah-medium-20k-v0"
    steps: int = 1_000  # of the short run, and updates of the one without an environment; the long one has thrice that
    repeats: int = 3
    out: str = str(HERE / "results" / "online-speed.json")


def fields(algo):
    """The names of the settings of a file, read from its text."""
    tree = ast.parse((ROOT / "algos" / f"{algo}.py").read_text())
    config = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "Config")
    return [x.target.id for x in config.body if isinstance(x, ast.AnnAssign)]


def run(algo, options, **counts):
    """summary.json of the file, run with these settings where it has them."""
    cycle = {"updates_per_step": 1, "policy_delay": 1, "online_start": 0, "pretrain_updates": options.steps}
    settings = {"dataset": options.dataset, "num_seeds": 1, "eval_episodes": 0, **cycle, **counts}
    settings |= {"eval_interval": options.steps, "log_interval": min(options.steps, 250)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), "--out", folder]
        for name in set(settings) & set(fields(algo)):
            command += ["--" + name.replace("_", "-"), str(settings[name])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{algo} failed:\n{done.stderr[-2000:]}")
        return json.loads((Path(folder) / "summary.json").read_text())


def measure(algo, options):
    """A row of the table, with one number for each repetition."""
    n, rows = options.steps, {"updates_per_second": {"data": [], "online": []}, "share": []}
    for _ in range(options.repeats):
        # The longer of two runs on the data alone, too: the first call of a program is slower than the others
        data = [run(algo, options, num_updates=k * n) for k in (1, 3)]
        online = [run(algo, options, num_updates=0, online_steps=k * n) for k in (1, 3)]
        rows["updates_per_second"]["data"].append(2 * n / difference(data)["update"])
        seconds = difference(online)
        rows["updates_per_second"]["online"].append(2 * n / seconds["update"])
        rows["share"].append({name: x / sum(seconds.values()) for name, x in seconds.items()})
    return {"algo": algo, **rows}


def difference(summaries):
    """Seconds that the second run spent longer than the first, by what for."""
    names = {"update": "train_seconds", "simulator": "simulator_seconds", "policy": "policy_seconds"}
    first, second = ({name: summary.get(key, 0.0) for name, key in names.items()} for summary in summaries)
    return {name: second[name] - first[name] for name in names}


def main(options: Options):
    load, results = os.getloadavg()[0], []
    commit = subprocess.getoutput(f"git -C {HERE} describe --always --dirty --abbrev=40")
    for algo in options.algos:
        print(f"{algo} ...", file=sys.stderr, flush=True)
        results.append(measure(algo, options))
        report = {"command": " ".join(sys.argv), "commit": commit, "cores": os.cpu_count(), "processor": processor()}
        report |= {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        report |= {"load_average": {"before": load, "after": os.getloadavg()[0]}}
        report |= {"dataset": options.dataset, "repeats": options.repeats}
        write(Path(options.out), {**report, "results": results})
    print(table(report | {"results": results}))


def table(report):
    """The results as Markdown, in alphabetical order: medians of the repetitions, with the lowest and highest."""
    head = ["algorithm", "updates/s on the data", "updates/s on-line", "simulator", "policy", "updates"]
    lines = [head, ["---"] * len(head)]
    for row in sorted(report["results"], key=lambda row: row["algo"]):
        rates = [spread(row["updates_per_second"][where]) for where in ("data", "online")]
        parts = ("simulator", "policy", "update")
        shares = [f"{statistics.median(share[part] for share in row['share']):.0%}" for part in parts]
        lines.append([row["algo"], *rates, *shares])
    foot = (
        f"One seed on `{report['dataset']}`, one update for each step; the last three columns are shares of the time "
        f"of a step. Medians of {report['repeats']} repetitions, on {report['date'][:10]}; {report['processor']}, "
        f"{report['cores']} cores."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n\n")[0]))
