"""How much on-line data halves the failures, and what conservative values do when the environment opens.

    python benchmarks/studies/fine_tuning.py             # fine_tuning.json and .png beside it: some minutes
    python benchmarks/studies/fine_tuning.py --failures  # at once: the first part alone, after new runs

Claims (LECTURES L3, L9, L15): a policy pre-trained on data needs little interaction to become good (QT-Opt, grasping:
of 13 % failures 4 % are left); conservative values are so low that a method forgets at first, and calibration is the
cure.

Failures    From the committed runs of the protocol `finetune` (benchmarks/results/finetune) on the stitched U-maze,
            where a score is the share of successes in %: the failures at the switch, and the steps after which they
            were half as many, at an evaluation and all that follow.
Values      Cal-QL with two weights of the gap, and the same without calibration: returns of -10^9 hold nothing up,
            which is CQL bit for bit (tests/test_cal_ql.py). Rewards are -1 a step until the goal, so that no policy
            has a value below -1 / (1 - discount) = -100. What a critic believes below it is wrong for certain.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

from algos import cal_ql  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from report import read_runs  # noqa: E402
from report.online import since_switch  # noqa: E402

RESULTS = HERE.parent / "results" / "finetune"
DATASET = "stitch/pointmaze-umaze-v0"
WEIGHTS = (5.0, 50.0)  # of the gap, offline and on-line
FLOOR = -100.0  # of any policy's value
SETTINGS = dict(dataset=DATASET, num_seeds=2, hidden=(128, 128), num_samples=2, num_updates=3000, eval_interval=500,
                log_interval=250, eval_episodes=10, online_steps=2000)  # fmt: skip


def halved(steps, scores):
    """(failures at the switch in %, steps until they are at most half as many and stay so: None if never)."""
    failures = 100 - np.asarray(scores)
    first = failures[steps == 0][0]
    good = failures <= first / 2
    stays = [n for i, n in enumerate(steps) if n > 0 and good[i:].all()]
    return float(first), int(stays[0]) if stays and first > 0 else None


def failures():
    """{method: what `halved` says of the mean over the seeds, and the curve that it is of}, of pre-trained runs."""
    found = {}
    for run in read_runs(RESULTS):
        steps, scores = since_switch(run), run.curve.mean(axis=0)
        if run.dataset == DATASET and (steps == 0).any():
            first, after = halved(steps, scores)
            curve = {"steps": steps.tolist(), "failures": (100 - scores).tolist()}
            found[run.method] = {"failures": first, "halved_after": after, **curve}
    return found


def train(calibrated, weight):
    """Curves of a run folder as any other, which goes on where it was killed."""
    out = HERE.parents[1] / "runs" / "fine_tuning" / f"{'calibrated' if calibrated else 'plain'}-{weight:g}"
    returns = cal_ql.return_to_go
    if not calibrated:
        cal_ql.return_to_go = lambda rewards, terminal, discount: np.full(len(rewards), -1e9)
    try:
        cal_ql.main(cal_ql.Config(out=str(out), weight=weight, online_weight=weight, **SETTINGS))
    finally:
        cal_ql.return_to_go = returns
    return curves([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])


def curves(lines):
    """Steps since the switch (those before it are updates), and for each seed what was believed, true and scored."""
    seeds = sorted({line["seed"] for line in lines})
    names = "believed_value", "true_value", "score", "held"
    of = {name: [[line[name] for line in lines if line["seed"] == seed] for seed in seeds] for name in names}
    return {"steps": [step - SETTINGS["num_updates"] for step in sorted({line["step"] for line in lines})], **of}


def draw(result, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), dpi=110, layout="constrained")
    for method, found in result["failures"].items():
        axes[0].plot(found["steps"], found["failures"], label=method)
    axes[0].set(title="Failures, in %", xlabel="steps on-line (up to 0: updates on the data)", ylim=(-3, 103))
    axes[0].set_xlim(-1000, 5000)
    for (label, found), colour, style in zip(result["values"].items(), ("C1", "C1", "C0", "C0"), "-:-:", strict=True):
        for axis, column in ((axes[1], "believed_value"), (axes[2], "score")):
            values = np.array(found[column], float).mean(axis=0)
            axis.plot(found["steps"], values, style, color=colour, label=label)
    axes[1].axhline(FLOOR, color="#555555", linewidth=1)
    axes[1].set(title="Believed value at the start (line: no policy is worse)", xlabel="steps on-line")
    axes[2].set(title="Score", xlabel="steps on-line", ylim=(-3, 103))
    for axis in axes:
        axis.axvline(0, color="#333333", linestyle=":", linewidth=1.2)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--failures", action="store_true", help="the first part alone, after new runs of the protocol")
    path, about = HERE / "fine_tuning.json", provenance()
    if parser.parse_args().failures:
        result = json.loads(path.read_text()) | {"failures": failures()}
    else:
        result = {"settings": SETTINGS, "failures": failures(), "values": {}}
        for name, calibrated in (("CQL", False), ("Cal-QL", True)):
            result["values"] |= {f"{name}, weight {weight:g}": train(calibrated, weight) for weight in WEIGHTS}
        result = {**about, **device(), **result}
    path.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, HERE / "fine_tuning.png")


if __name__ == "__main__":
    main()
