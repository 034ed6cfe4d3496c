"""How long a policy takes to act: expressive policies beside IQL's Gaussian.

    python benchmarks/speed_act.py      # some three minutes; results/act-speed.json and a table

Each file acts as in an evaluation: one call for all environments, whose actions come back as NumPy arrays. Networks are
those of the protocols quick and full on hopper (full: the references'), at 17 observations and 6 actions, untrained,
with one seed. A time is the mean over a step of episodes of 10 steps, so that each fifth step of `qc`, which makes a
chunk of actions, is in it, and the first step of a policy that remembers its episode.

All are in one process, and each repetition times them all in turn: a ratio to IQL is of the same repetition.
"""

import datetime
import importlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sweep
import tyro
from speed import SHAPE, processor, ratios, spread, write

HERE = Path(__file__).resolve().parent
ALGOS = ("bc", "iql", "rvs", "fql", "ifql", "diffusion_ql", "edp", "idql", "qc", "dt")
DATASETS = {"quick": "stitch/hopper-medium-replay-100k-v0", "full": "stitch/hopper-medium-replay-v0"}  # not loaded
STEPS = 10  # of an episode
SECONDS = 0.3  # of episodes that one time is of, at the least


@dataclass(frozen=True)
class Options:
    algos: tuple[str, ...] = ALGOS  # files whose actions are continuous; iql, which the ratios need, is always measured
    environments: tuple[int, ...] = (1, 160)  # side by side: one, and 16 seeds of 10 episodes
    repeats: int = 3
    out: str = str(HERE / "results" / "act-speed.json")


def policy(algo, protocol):
    """`Runs` of the file with the protocol's networks, untrained: as its `main` has them."""
    sys.path.insert(0, str(HERE.parent))  # this checkout, installed or not
    from common.environments import Interface

    protocols = tomllib.loads((HERE / "protocols.toml").read_text())
    chosen = sweep.Options(protocol, methods=(algo,), datasets=(DATASETS[protocol],))
    ((_, _, config, _),) = sweep.make_cells(chosen, protocols)
    config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
    module = importlib.import_module(f"algos.{algo}")
    obs_dim, action_dim = SHAPE["obs_dim"], SHAPE["action_dim"]
    box = {"low": [-1.0] * action_dim, "high": [1.0] * action_dim, "dtype": "float32"}
    interface = Interface([obs_dim], box, [0.0] * obs_dim, [1.0] * obs_dim)
    runs = module.Runs(module.Config(**config | {"num_seeds": 1}), interface, {})
    runs.states = runs.init()
    return runs


def play(runs, environments, steps):
    """An episode of so many steps in each environment, all of which show the same observation."""
    obs = np.ones((1, environments, SHAPE["obs_dim"]), np.float32)
    memory, reward = None, np.zeros((1, environments), np.float32)
    for step in range(steps):
        action, memory = runs.act(obs, step, memory, reward)
        np.asarray(action)  # waits for it


def milliseconds(episode, steps, clock=time.perf_counter):
    """Of a step: the mean over whole episodes, which are played until SECONDS are over."""
    begun, episodes = clock(), 0
    while (seconds := clock() - begun) < SECONDS or not episodes:
        episode()
        episodes += 1
    return 1000 * seconds / (episodes * steps)


def measure(options):
    """Rows of the results: {"algo", "protocol", "environments", "milliseconds": one for each repetition}."""
    rows, episodes = [], []
    for algo in dict.fromkeys([*options.algos, "iql"]):
        print(f"{algo} ...", file=sys.stderr, flush=True)
        for protocol in DATASETS:
            runs = policy(algo, protocol)
            for number in options.environments:
                play(runs, number, 3)  # compiles the first step and those after it
                episodes.append(lambda runs=runs, number=number: play(runs, number, STEPS))
                rows.append({"algo": algo, "protocol": protocol, "environments": number, "milliseconds": []})
    for _ in range(options.repeats):
        for row, episode in zip(rows, episodes, strict=True):
            row["milliseconds"].append(milliseconds(episode, STEPS))
    return rows


def main(options: Options):
    if options.repeats < 1 or min(options.environments, default=0) < 1:
        raise SystemExit("--repeats and --environments must be positive.")
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"Other programs are running (load average {load:.1f}): expect high and uneven numbers.", file=sys.stderr)
    commit = subprocess.getoutput(f"git -C {HERE} describe --always --dirty --abbrev=40")
    results = measure(options)
    import jax

    packages = ("jax", "jaxlib", "flax", "numpy")
    report = {
        "command": " ".join(sys.argv),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_average": {"before": load, "after": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), **{x: importlib.metadata.version(x) for x in packages}},
        "shape": {"obs_dim": SHAPE["obs_dim"], "action_dim": SHAPE["action_dim"], "steps": STEPS},
        "repeats": options.repeats,
        "results": results,
    }
    write(Path(options.out), report)
    print(f"{table(report)}\n\nWritten to {options.out}")


def table(report):
    """The results as Markdown: milliseconds of a step, and how many times those of IQL, fastest first."""
    found = {(row["algo"], row["protocol"], row["environments"]): row["milliseconds"] for row in report["results"]}
    algos, columns = (list(dict.fromkeys(x)) for x in zip(*((key[0], key[1:]) for key in found), strict=True))
    algos.sort(key=lambda algo: statistics.median(found[algo, *columns[0]]))
    head = ["algorithm", *(f"{protocol}, {number} environment{'s' * (number > 1)}" for protocol, number in columns)]
    lines = [head, ["---"] * len(head)]
    for algo in algos:
        cells = [algo]
        for column in columns:
            times = found[algo, *column]
            cell = f"{statistics.median(times):,.2f} ms"
            if algo != "iql":
                cell += f", {spread(ratios(times, found['iql', *column]), ',.1f')} times IQL's"
            cells.append(cell)
        lines.append(cells)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    foot = (
        f"Milliseconds of a step of all environments, and beside them how many times IQL's that is, in the same "
        f"repetition: medians of {report['repeats']} (lowest to highest), on {report['date'][:10]}. Networks of the "
        f"protocols quick and full. Device: {report['device']}; {report['processor']}, {report['cores']} cores. "
        f"{versions}."
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n\n")[0]))
