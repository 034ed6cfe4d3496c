"""How much on-line data halves the failures, and whether a dip after the switch is the switch's doing.

    python benchmarks/studies/fine_tuning.py     # at once: fine_tuning.json and fine_tuning.png, from committed runs

Claims (LECTURES L3, L9, L15): a policy pre-trained on data needs little interaction to become good (QT-Opt, grasping:
of 13 % failures 4 % are left); conservative values are so low that a method forgets at first when the environment
opens, and calibration is the cure.

Failures    The runs of the protocol `finetune` (benchmarks/results/finetune) on the stitched U-maze, where a score is
            the share of successes in %: the failures at the switch, and the steps after which they were half as many,
            at an evaluation and all that follow.
Values      What CQL and Cal-QL believe there at the start states, and what is true. Rewards are -1 a step until the
            goal, so no policy has a value below -1 / (1 - discount) = -100. Beside them CQL of the protocol `quick`,
            which makes as many updates on the data alone: a dip that it has too is not the switch's doing.
Calibration The same two with rewards of 1 at the goal and 0 elsewhere, and 3,000 updates before the switch (a trial in
            benchmarks/results/trials): no value is below 0 then, and what CQL pushes down is far too low.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from plot import read_columns  # noqa: E402
from report import read_runs, short  # noqa: E402
from report.online import since_switch  # noqa: E402

RESULTS = HERE.parent / "results"
DATASET = "stitch/pointmaze-umaze-v0"
SHOWN = {  # label: protocol and method
    "CQL, on-line from 1,000": ("finetune", "cql"),
    "Cal-QL, on-line from 1,000": ("finetune", "cal_ql"),
    "CQL, data alone": ("quick", "cql"),
}
CALIBRATION = {"CQL": ("trials/reward-shift-0", "cql"), "Cal-QL": ("trials/reward-shift-0", "cal_ql")}
COLOURS = "#D55E00", "#0072B2", "#555555"
FLOOR = -100.0  # of any policy's value


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
    for run in read_runs(RESULTS / "finetune"):
        steps, scores = since_switch(run), run.curve.mean(axis=0)
        if run.dataset == DATASET and (steps == 0).any():
            first, after = halved(steps, scores)
            curve = {"steps": steps.tolist(), "failures": (100 - scores).tolist()}
            found[run.method] = {"at_switch": first, "halved_after": after, **curve}
    return found


def values(protocol, method):
    """Updates and then steps (n,), and for each seed what was believed, true and scored (seeds, n)."""
    names = "believed_value", "true_value", "score", "held"
    steps, columns = read_columns(RESULTS / protocol / short(DATASET) / method, names)
    return {"steps": steps.tolist(), **{name: x.tolist() for name, x in columns.items() if np.isfinite(x).all()}}


def draw(result, path):
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), dpi=110, layout="constrained")
    (failed, score), (believed, calibrated) = axes
    for method, found in result["failures"].items():
        failed.plot(found["steps"], found["failures"], label=method)
    failed.set(title="Failures, in %", xlabel="steps on-line", ylim=(-3, 103))
    panels = [(score, "values", "score", "-"), (believed, "values", "believed_value", "-")]
    panels += [(believed, "values", "true_value", ":"), (calibrated, "calibration", "believed_value", "-")]
    panels += [(calibrated, "calibration", "true_value", ":")]
    for axis, of, column, style in panels:
        for (label, found), colour in zip(result[of].items(), COLOURS, strict=False):
            middle = np.mean(found[column], axis=0)
            axis.plot(found["steps"], middle, style, color=colour, label=label if style == "-" else None)
    score.set(title="Score", xlabel="updates, then steps on-line", ylim=(-3, 103))
    believed.axhline(FLOOR, color="#AAAAAA", linewidth=1)
    believed.set(title="Value of the start: believed; dotted: true", xlabel="updates, then steps on-line")
    calibrated.axvline(3000, color="#AAAAAA", linewidth=1)
    calibrated.set(title="The same with rewards of 0 and 1", xlabel="updates, and from 3,000 on steps on-line")
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about = {**provenance(), **device()}
    result = {**about, "failures": failures(), "values": {label: values(*where) for label, where in SHOWN.items()}}
    result["calibration"] = {label: values(*where) for label, where in CALIBRATION.items()}
    (HERE / "fine_tuning.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, HERE / "fine_tuning.png")


if __name__ == "__main__":
    main()
