"""How well does each estimator judge a pool of policies? As in DOPE (Fu et al. 2021), https://arxiv.org/abs/2103.16596

    python benchmarks/sweep.py quick --datasets stitch/icu-sepsis-v0 --methods bc iql crr sql \
        --set num_updates=500,3000 eval_interval=500 act=sample --out runs/pool
    python benchmarks/ope.py runs/pool/icu-sepsis-v0/* --behaviour counts

The pool: all runs (seeds, points of a grid) of the folders given, finished and of one task. Snapshots of one training
are folders with different --num-updates. Each estimator of algos/ sees the data and the policies, and nothing else; the
truth comes from the environment, is exact where its model is known, and is only the judge. All values are discounted
sums of raw rewards.

Measures   Absolute error: the mean of |estimate - truth|. Rank correlation: Spearman's. Regret@k: the best true value
           less the best among the k policies of the highest estimates, of the range of true values (DOPE divides by
           the largest one). A policy that an estimator refuses is one that it cannot choose. So is one with an
           estimate that the data's rewards do not allow, max |r| / (1 - discount): FQE, say, has diverged.
Intervals  95 % of 1,000 bootstrap resamples of the policies. Runs of one method resemble each other, which it ignores.
Own Q      What the run's own critic believes of its policy where the episodes begin, if it learned from raw rewards.
Constant   The mean return of the data's episodes, as the estimate of every policy: an error to beat. Its regret is that
           of a choice at random.
Held       In how many policies the estimator's own 95 % interval holds the truth.

The folder --out has ope.json (all estimates, truths and measures), ope.png, and the runs of the estimators that train.
"""

import dataclasses
import importlib
import json
import math
import os
from pathlib import Path
from typing import Annotated, Literal

import jax
import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro
from plot import COLOURS, MARKERS, STYLE, caption, read_lines, save
from sweep import write

from algos import importance_sampling
from common.datasets import load_dataset
from common.environments import provenance

ALGOS = Path(__file__).parents[1] / "algos"
# Of these, the files that are there; doubly_robust comes after fqe.py, whose critics it takes
ESTIMATORS = ("fqe", "dice", "model_evaluation", "importance_sampling", "doubly_robust")
PRESENT = tuple(name for name in ESTIMATORS if (ALGOS / f"{name}.py").exists())
SHORT = {"fqe": "FQE", "dice": "DICE", "model_evaluation": "model"}  # those that train, in tables
RESAMPLES = 1_000
MEASURES = ("absolute error", "rank correlation", "regret@1", "regret@3")


@dataclasses.dataclass(frozen=True)
class Options:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # run folders, of any algorithms
    dataset: str = ""  # whose rows the estimators get; by default that of the first run
    estimators: tuple[str, ...] = PRESENT  # files of algos/
    act: Literal["mode", "sample"] = "sample"  # what the policies do; those without a density act as ever
    behaviour: str = "clone"  # mu of the weights: "clone" or "counts" of the data, "logged" with them, or a run folder
    discount: float = 0.99  # of the values
    eval_episodes: int = 100  # of each policy, for the truth; draws in each state where it is exact; 0: none is known
    resamples: int = 200  # of the episodes, for the intervals of the estimators with weights, where they cost most
    folds: int = 1  # of FQE's critics, for cross-fitting
    horizon: int = 0  # steps of an episode in a fitted model; 0: as many as the longest one of the data has
    num_updates: int = 6_000  # of the estimators that train, and of the clone
    hidden: tuple[int, ...] = (256, 256)  # of their networks
    tau: float = 0.05  # Polyak step of FQE's target: short runs need a larger one
    out: Path | None = None  # by default the folder of the runs with -ope after its name


# --- Measures: of true values (policies,) and estimates (policies,), NaN where there is none -------------------
def absolute_error(truth, estimate):
    return np.nanmean(np.abs(estimate - truth)) if np.isfinite(estimate).any() else np.nan


def rank_correlation(truth, estimate):
    """Spearman's, of the policies that have an estimate; NaN where all estimates, or all truths, are equal."""
    known = np.isfinite(estimate)
    ranks = [scipy.stats.rankdata(x[known]) for x in (truth, estimate)]
    if known.sum() < 2 or min(map(np.ptp, ranks)) == 0:
        return np.nan
    return np.corrcoef(ranks)[0, 1]


def regret(truth, estimate, k, size):
    """(best of all - best of the k highest estimates) / size. Equal estimates: the first ones."""
    known = np.where(np.isnan(estimate), -np.inf, estimate)
    chosen = np.argsort(-known, kind="stable")[:k]
    return (truth.max() - truth[chosen].max()) / size if np.isfinite(known).any() else np.nan


def measures(truth, estimate):
    """{measure: (value, low, high)}; the range of the true values is that of the whole pool in every resample."""
    size, n = np.ptp(truth) or 1.0, len(truth)
    rows = np.random.RandomState(0).randint(n, size=(RESAMPLES, n))
    rules = absolute_error, rank_correlation, *(lambda t, e, k=k: regret(t, e, k, size) for k in (1, 3))
    found = {}
    for name, measure in zip(MEASURES, rules, strict=True):
        samples = np.array([measure(truth[row], estimate[row]) for row in rows])
        samples = samples[np.isfinite(samples)]
        ends = np.percentile(samples, [2.5, 97.5]) if len(samples) else (np.nan, np.nan)
        value = measure(truth, estimate)
        if name.startswith("regret") and np.ptp(estimate) == 0:  # by the first of them: in the resamples, any
            value = samples.mean()
        found[name] = (float(value), *map(float, ends))
    return found


# --- Estimates ---------------------------------------------------------------------------------------------
def of_training(name, folder, count, options, out):
    """The estimates of a file that trains, whose summary has a row for each seed: [{name: (value, low, high)}]."""
    module = importlib.import_module(f"algos.{name}")
    folds = options.folds if name == "fqe" else 1
    fields = {field.name for field in dataclasses.fields(module.Config)}
    wanted = dict(policy=str(folder), dataset=options.dataset, act=options.act, discount=options.discount, folds=folds)
    wanted |= dict(num_seeds=count * folds, num_updates=options.num_updates, eval_interval=options.num_updates)
    wanted |= dict(log_interval=math.gcd(options.num_updates, 250), eval_episodes=0, hidden=options.hidden)
    wanted |= dict(prepare_interval=wanted["log_interval"], horizon=options.horizon, tau=options.tau)
    config = module.Config(**{key: value for key, value in wanted.items() if key in fields}, out=str(out))
    summary = module.main(config)
    rows = [summary[column] for column in ("estimate", "estimate_low", "estimate_high")]
    rows = np.array(rows, float).reshape(3, folds, count)  # None, JSON's NaN, is NaN again
    return [{SHORT[name]: tuple(row)} for row in rows.mean(axis=1).T.tolist()]


def estimates_of(folder, count, options, out):
    """For each run of a folder {estimator: (value, low, high)}, and {file: why it refused}."""
    found, refused = [{} for _ in range(count)], {}
    weights = dict(behaviour=options.behaviour, resamples=options.resamples, hidden=options.hidden)
    weights |= dict(clone_updates=options.num_updates)
    for name in options.estimators:
        try:
            if name == "importance_sampling":
                fields = dict(dataset=options.dataset, act=options.act, discount=options.discount, eval_episodes=0)
                config = importance_sampling.Config(policy=str(folder), **fields, **weights)
                rows = importance_sampling.evaluate(config)
            elif name == "doubly_robust":
                doubly_robust = importlib.import_module("algos.doubly_robust")
                config = doubly_robust.Config(fqe=str(out / "fqe" / folder.name), **weights)
                rows = doubly_robust.evaluate(config)
            else:
                rows = of_training(name, folder, count, options, out / name / folder.name)
        except SystemExit as sentence:
            refused[name] = str(sentence).replace(f"{folder.parent}/", "").replace(f"{out}/", "")
            print(f"{folder}: {name} refuses. {sentence}")
            continue
        for have, row in zip(found, rows, strict=True):
            have |= {key: value for key, value in row.items() if isinstance(value, tuple) and key != "DM"}  # it is FQE
    return found, refused


def own_values(runs, first):
    """What each run's critic believes of its policy at raw observations (n, obs_dim): [value], NaN without a critic."""
    raw = not (getattr(runs.cfg, "normalize_reward", False) or getattr(runs.cfg, "reward_shift", 0))
    if runs.q is None or not raw:
        return [np.nan] * len(runs.runs)
    obs = (first - np.array(runs.interface.obs_mean, np.float32)) / np.array(runs.interface.obs_scale, np.float32)

    def of_run(cfg, agent, state, obs):
        keys = jax.random.split(jax.random.key(cfg.seed), 8)
        return jax.vmap(lambda key: agent.q(state, obs, agent.act(state, obs, key)))(keys).mean()

    return np.asarray(runs.every(of_run)(runs.fields, (runs.states,), {"obs": obs}), float).tolist()


def pool(options, out):
    """A row for each policy: where it is from, its truth, its score in its own folder, and its estimates."""
    data, env = load_dataset(options.dataset, columns=("episode",))
    first = data.obs[np.diff(data.episode, prepend=-1) != 0]
    step = np.arange(len(data.reward)) - np.searchsorted(data.episode, data.episode)
    constant = (options.discount**step * data.reward.astype(np.float64)).sum() / (data.episode[-1] + 1)
    options = dataclasses.replace(options, horizon=options.horizon or int(step.max()) + 1)
    policies, refusals = [], {}
    for folder in options.runs:
        runs = importance_sampling.load_policy(str(folder), options.act)
        fields = dict(eval_episodes=options.eval_episodes, discount=options.discount)
        truth = importance_sampling.true_value(runs, env, importance_sampling.Config(**fields))
        last = [line for line in read_lines(folder) if line["step"] == runs.step]
        rows, refusals[folder.name] = estimates_of(folder, len(runs.runs), options, out)
        own = own_values(runs, first)
        for run, true, row, line, believed in zip(runs.runs, truth, rows, last, own, strict=True):
            about = {"folder": folder.name, "updates": runs.step, **run, "true_value": float(true)}
            row = {"constant": (constant,) * 3, "own Q": (believed,) * 3, **row}
            row = {k: x if k == "ESS" or possible(x[0], data, options) else (math.nan,) * 3 for k, x in row.items()}
            about |= {name: line.get(name) for name in ("score", "returns", "q")}  # of report.py's rules
            policies.append(about | {"estimates": row})
    return policies, {folder: said for folder, said in refusals.items() if said}


def possible(value, data, options):
    """Whether the data's rewards can sum up to it: as fqe.py rejects a critic that has diverged."""
    return not abs(value) * (1 - options.discount) > 1.001 * float(np.abs(data.reward).max())


def judge(policies):
    """{estimator: measures} over policies with a truth; {} where none has one."""
    policies = [policy for policy in policies if np.isfinite(policy["true_value"])]
    truth = np.array([policy["true_value"] for policy in policies])
    names = list(dict.fromkeys(name for policy in policies for name in policy["estimates"] if name != "ESS"))
    nothing = (np.nan,) * 3
    columns = {
        name: np.array([policy["estimates"].get(name, nothing)[0] for policy in policies], float) for name in names
    }
    return {
        name: measures(truth, column) | {"policies": int(np.isfinite(column).sum())} for name, column in columns.items()
    }


# --- What people read ------------------------------------------------------------------------------------------
def table(result):
    """Markdown: a row for each estimator, the smallest absolute error first."""
    lines = [f"| estimator | policies | {' | '.join(MEASURES)} | held |", "| --- " * (len(MEASURES) + 3) + "|"]
    errors = {name: np.array(found["absolute error"], float)[0] for name, found in result["measures"].items()}
    for name in sorted(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf)):  # without an estimate: last
        found = result["measures"][name]
        cells = [cell(found[measure]) for measure in MEASURES]
        lines.append(f"| {name} | {found['policies']} | {' | '.join(cells)} | {held(result['policies'], name)} |")
    return "\n".join(lines)


def held(policies, name):
    """In how many policies the estimator's interval holds the truth; – where it has none."""
    rows = [(*policy["estimates"].get(name, (None,) * 3)[1:], policy["true_value"]) for policy in policies]
    low, high, truth = np.array(rows, float).T  # None, JSON's NaN, is NaN again
    return int(((low <= truth) & (truth <= high)).sum()) if (low < high).any() else "–"


def estimates_table(result):
    """Markdown: a row for each method and setting, each cell a mean over its seeds and, in brackets, all of them."""
    policies = result["policies"]
    names = list(dict.fromkeys(name for policy in policies for name in policy["estimates"] if name != "constant"))
    groups = {}
    for policy in policies:
        groups.setdefault((label(policy), policy["updates"]), []).append(policy)
    lines = [f"| policies | updates | {' | '.join(names)} | true value |", "| --- " * (len(names) + 3) + "|"]
    for (method, updates), rows in groups.items():
        columns = [[row["estimates"].get(name, (None,))[0] for row in rows] for name in names]
        columns.append([row["true_value"] for row in rows])
        lines.append(f"| {method} | {updates:,} | {' | '.join(map(seeds_cell, columns))} |")
    return "\n".join(lines)


def seeds_cell(column):
    values = np.array(column, float)
    return "–" if np.isnan(values).all() else f"{np.nanmean(values):.3g} ({', '.join(f'{x:.3g}' for x in values)})"


def cell(found):
    value, low, high = np.array(found, float)  # None, JSON's NaN, is NaN again
    return "–" if np.isnan(value) else f"{value:.3g} ({low:.3g} to {high:.3g})"


def label(policy):
    """Of the same method: its seeds and snapshots, but not the points of a grid."""
    return " ".join([policy["folder"].partition(",")[0], *(f"{k} {v:g}" for k, v in policy["grid"].items())])


def draw(result, path):
    """The estimates against the truth, a panel for each estimator."""
    names, policies = list(result["measures"]), result["policies"]
    truth = np.array([policy["true_value"] for policy in policies], float)
    labels = [label(policy) for policy in policies]
    methods = list(dict.fromkeys(labels))
    figure, axes = plt.subplots(2, math.ceil(len(names) / 2), figsize=(2.4 * math.ceil(len(names) / 2) + 1.6, 5.6),
                                sharex=True, squeeze=False, layout="constrained")  # fmt: skip
    for panel, name in zip(axes.flat, names, strict=False):
        rows = np.array([policy["estimates"].get(name, (np.nan,) * 3) for policy in policies], float)
        panel.plot([truth.min(), truth.max()], [truth.min(), truth.max()], color="#B0B0B0", zorder=0)
        for (value, *ends), true, i in zip(rows, truth, map(methods.index, labels), strict=True):
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            panel.plot([true, true], ends, color=colour, linewidth=1, alpha=0.4)
            panel.plot(true, value, marker, color=colour, markersize=5, clip_on=False)
        panel.set_title(name, fontsize=11)
        panel.tick_params(labelsize=8)
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    handles = [
        plt.Line2D([], [], marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], linestyle="")
        for i in range(len(methods))
    ]
    figure.legend(handles, methods, loc="outside right center", fontsize=10)
    figure.supxlabel("true value", fontsize=11)
    figure.supylabel("estimate", fontsize=11)
    figure.suptitle(f"{result['options']['dataset']}: what estimators say of {len(policies)} policies", fontsize=11)
    text = (
        "On the grey line an estimate is right. Bars: the estimator's own 95 % interval. Each panel has its own scale."
    )
    caption(figure, text)
    save(figure, path)


def main(options: Options):
    if not options.runs:
        raise SystemExit("Name at least one run folder, as the docstring of this file makes them.")
    if unknown := sorted(set(options.estimators) - set(PRESENT)):
        raise SystemExit(f"{unknown[0]} is no estimator here: choose among {', '.join(PRESENT)}.")
    if "doubly_robust" in options.estimators and "fqe" not in options.estimators:
        raise SystemExit("doubly_robust takes its Q from fqe: name both in --estimators.")
    if (
        min(options.num_updates, options.folds, options.resamples) < 1
        or min(options.eval_episodes, options.horizon) < 0
    ):
        raise SystemExit(
            "--num-updates, --folds and --resamples must be at least 1, --eval-episodes and --horizon at least 0."
        )
    if len({path.resolve().name for path in options.runs}) < len(options.runs):
        raise SystemExit("Two of these folders have the same name: rename one of them.")
    dataset = options.dataset or read_dataset(options.runs[0])
    order = [name for name in PRESENT if name in options.estimators]
    runs = tuple(path.resolve() for path in options.runs)
    common = Path(os.path.commonpath([path.parent for path in runs]))
    out = options.out or common.with_name(common.name + "-ope")
    options = dataclasses.replace(options, runs=runs, dataset=dataset, estimators=tuple(order), out=None)
    about = provenance()  # before it writes, which makes the tree dirty
    policies, refused = pool(options, out.resolve())
    settings = dataclasses.asdict(options) | {"runs": [path.name for path in runs], "out": ""}
    result = {**about, "device": jax.devices()[0].device_kind, "options": settings, "refused": refused}
    result |= {"policies": policies, "measures": judge(policies)}
    write(out / "ope.json", json.dumps(without_nan(result), indent=1) + "\n")
    print(estimates_table(result))
    if result["measures"]:
        print("\n" + table(result))
        plt.rcParams.update(STYLE)
        draw(result, out / "ope.png")
    print(f"All estimates: {out / 'ope.json'}")
    return result


def read_dataset(folder):
    try:
        return json.loads((folder / "config.json").read_text())["config"]["dataset"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{folder} holds no run of a file in algos/ ({error!r}): choose another folder.") from error


def without_nan(x):
    """JSON has no NaN: null stands for it."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n\n")[0]))
