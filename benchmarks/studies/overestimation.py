"""What naive actor-critic believes offline, and what is true; then the same for every algorithm that learns a Q.

    python benchmarks/studies/overestimation.py           # half an hour on two cores; a killed one goes on
    python benchmarks/studies/overestimation.py --table   # at once: the table alone, after new quick results

Claims (LECTURES L3 to L5): trained on recorded HalfCheetah data alone, SAC fails however many transitions there are, so
that this is no over-fitting; what it believes of its policy, there 10^7 to 10^20, lies orders of magnitude above what
the policy gets, since the policy seeks the actions that Q overrates. Both are measured by `main` at each evaluation
(Evaluation in common/datasets.py): believed_value is Q at the start states and the policy's actions there, true_value
the mean discounted return of the roll-outs from these states.

Writes overestimation.json and overestimation.png beside it: SAC on 1k to 1M transitions of HalfCheetah-medium over
training; and overestimation.md: believed minus true value at the last evaluation of every run of the quick protocol.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

from algos import sac  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from report import number, over_estimation, read_runs, short  # noqa: E402

SIZES = ("1k", "10k", "100k", "1m")
SETTINGS = dict(num_seeds=4, num_updates=20_000, eval_interval=2_000, log_interval=1_000, eval_episodes=5,
                learning_rate=3e-4, tau=0.005, reward_shift=0.0)  # fmt: skip  # the reference's step sizes


def train(size):
    """The evaluations of SAC on that many transitions: a run folder as any other, resumed where it was killed."""
    out = HERE.parents[1] / "runs" / "overestimation" / size
    sac.main(sac.Config(dataset=f"stitch/halfcheetah-medium-{size}-v0", out=str(out), **SETTINGS))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    curves = {name: by_seed(lines, name) for name in ("believed_value", "true_value", "score")}
    return {"steps": sorted({line["step"] for line in lines}), **curves}


def by_seed(lines, name):
    seeds = sorted({line["seed"] for line in lines})
    return [[line[name] for line in lines if line["seed"] == seed] for seed in seeds]


def quick_table():
    """Markdown: believed minus true value, and in brackets the true one, of the last evaluation of each quick run."""
    runs = [run for run in read_runs(HERE.parent / "results" / "quick") if len(run.values)]
    datasets, methods = sorted({run.dataset for run in runs}), sorted({run.method for run in runs})
    cells = dict.fromkeys(itertools.product(methods, datasets), "–")
    for run in runs:
        error = run.values[:, 0] - run.values[:, 1]
        cells[run.method, run.dataset] = (
            f"{over_estimation(run.values)}; {number(error.min(), '+')} to {number(error.max(), '+')}"
        )
    rows = [["method", *map(short, datasets)], ["---"] * (1 + len(datasets))]
    rows += [[method, *(cells[method, dataset] for dataset in datasets)] for method in methods]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(curves, path):
    figure, axes = plt.subplots(1, len(SIZES), figsize=(12, 3.8), dpi=120, sharey=True, layout="constrained")
    for axis, (size, curve) in zip(axes, curves.items(), strict=True):
        for name, colour in (("believed_value", "#D55E00"), ("true_value", "#0072B2")):
            values = np.array(curve[name])
            axis.plot(curve["steps"], np.median(values, axis=0), color=colour, label=name.replace("_", " "))
            axis.fill_between(curve["steps"], values.min(axis=0), values.max(axis=0), color=colour, alpha=0.2, lw=0)
        axis.set(title=f"{size} transitions", xlabel="updates")
        axis.set_yscale("symlog", linthresh=100)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("value at the start states")
    axes[0].legend(frameon=False)
    figure.suptitle(f"SAC on HalfCheetah-medium: median of {SETTINGS['num_seeds']} seeds, lowest to highest")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="overestimation.md alone, from the quick results")
    if not parser.parse_args().table:
        about = provenance()
        curves = {size: train(size) for size in SIZES}
        result = {**about, **device(), "settings": SETTINGS, "curves": curves}
        (HERE / "overestimation.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(curves, HERE / "overestimation.png")
    (HERE / "overestimation.md").write_text(
        "# Believed minus true value\n\nOf every method of the quick protocol that learns a Q-function, at the last "
        "evaluation: mean over the seeds (in brackets the true value), then the lowest and the highest seed. Positive "
        "is over-estimation. Rewards are scaled and shifted as each method sees them, so compare within a cell. "
        "Made by `overestimation.py --table` from the runs in benchmarks/results/quick.\n\n"
        f"{quick_table()}\n"
    )


if __name__ == "__main__":
    main()
