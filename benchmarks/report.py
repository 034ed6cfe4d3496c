"""From result files to what people read.

    python benchmarks/report.py quick                     # tables into README.md and algos/*.md, and pictures
    python benchmarks/report.py quick --check             # status 1 if those tables are not those of the result files
    python benchmarks/report.py --selection runs/grid/*   # how good is the policy that few episodes would choose?
    python benchmarks/report.py --cards stitch/pointmaze-umaze-v0

Tables     The run folders in benchmarks/results/PROTOCOL, as benchmarks/sweep.py leaves them: a row for each method, a
           column for each dataset, and the interquartile mean (IQM) of all. They go between the marks
           `<!-- report:PROTOCOL:begin -->` and `<!-- report:PROTOCOL:end -->`: of README.md the whole table, of a page
           algos/x.md the rows of that algorithm, and what its critic believes beside what is true.
Pictures   benchmarks/results/PROTOCOL/*.png: learning curves of each dataset; IQM, performance profiles and probability
           of improvement, as in Agarwal et al. (2021), https://arxiv.org/abs/2108.13264
Intervals  95 %, percentiles of a bootstrap over seeds, stratified by dataset. Estimators and intervals are rliable's;
           rliable 1.2.0 itself fails on import beside pandas 3 and takes no seed. Here equal files give equal bytes.
Selection  Of policies trained over a set of hyper-parameters, by a UCB bandit, as in Jackson et al. (2025),
           https://arxiv.org/abs/2504.11453
Cards      benchmarks/cards/DATASET.md and its histogram of returns, from the dataset in Minari's folder.
"""

import dataclasses
import json
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro
from plot import COLOURS, STYLE, read_scores  # benchmarks/plot.py; it chooses a backend that needs no display

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 5_000  # of the bootstrap
BUDGETS = (0, 1, 10, 100)  # evaluation episodes, in the table of --selection


@dataclasses.dataclass(frozen=True)
class Options:
    protocol: Annotated[str, tyro.conf.Positional] = "quick"  # folder in benchmarks/results
    check: bool = False  # write nothing; fail where a table differs from the result files
    selection: tuple[Path, ...] = ()  # run folders over hyper-parameters, of any algorithms and datasets
    candidates: int = 8  # --selection: policies to choose from, drawn from all that were trained
    cards: tuple[str, ...] = ()  # datasets in Minari's folder
    out: Path | None = None  # of --selection and --cards; by default the results' folder, and benchmarks/cards


def main(options: Options):
    plt.rcParams.update(STYLE)
    folder = ROOT / "benchmarks" / "results" / options.protocol
    if options.selection:
        report_selection(options.selection, options.candidates, options.out or folder)
    for dataset_id in options.cards:
        write_card(dataset_id, options.out or ROOT / "benchmarks" / "cards")
    if options.selection or options.cards:
        return
    runs = read_runs(folder)
    stale = write_tables(ROOT, options.protocol, runs, options.check)
    if not options.check:
        draw(runs, folder)
    elif stale:
        raise SystemExit(f"{', '.join(stale)}: not as the result files. Run benchmarks/report.py {options.protocol}.")


# --- Result files ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    method: str  # name of its folder: an algorithm, or a variant of one
    algo: str
    dataset: str
    place: str  # its folder, below that of the results
    scores: np.ndarray  # (seeds,) of the last evaluation
    summary: dict
    values: np.ndarray  # (seeds, 2): its believed and true value; (0, 2) of a method without a Q-function


def read_runs(folder: Path) -> list[Run]:
    """The finished and scored runs below a folder, sorted by dataset and method."""
    runs = []
    for file in sorted(folder.rglob("summary.json")):
        summary, run = json.loads(file.read_text()), file.parent
        scores = np.array(summary["score_per_seed"], float)
        if len({json.dumps(point) for point in summary.get("grid", [])}) > 1:
            print(f"{run} is a grid of hyper-parameters, for --selection: it is in no table.")
        elif np.isnan(scores).any():
            print(f"{run} was not scored: it is in no table.")
        else:
            place = run.relative_to(folder).as_posix()
            runs.append(Run(run.name, summary["algo"], summary["dataset"], place, scores, summary, read_values(run)))
    if not runs:
        raise SystemExit(f"{folder} holds no finished run: python benchmarks/sweep.py {folder.name}")
    return sorted(runs, key=lambda run: (run.dataset, run.method))


def read_values(run: Path) -> np.ndarray:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["step"] == lines[-1]["step"] and "believed_value" in line]
    return np.array([[line["believed_value"], line["true_value"]] for line in last]).reshape(-1, 2)


def short(dataset_id: str) -> str:
    """A dataset's name as a file or a column is called."""
    return dataset_id.removeprefix("stitch/").replace("/", "-")


def comparable(runs: list[Run]) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """What aggregates are over: the datasets, and for each method its scores on each of them, [(seeds,)].

    These are the datasets with normalised scores that two thirds of the methods or more have (some take only discrete
    actions, more take only continuous ones), and the methods that have all of them.
    """
    methods = sorted({run.method for run in runs})
    count = Counter(run.dataset for run in runs if run.summary["score_kind"].startswith("normalised"))
    datasets = sorted(dataset for dataset in count if count[dataset] >= 2 / 3 * len(methods))
    rows = {m: [run.scores for run in runs if run.method == m and run.dataset in datasets] for m in methods}
    return datasets, {method: row for method, row in rows.items() if datasets and len(row) == len(datasets)}


# --- Estimators: a row is a list over datasets of scores (..., seeds); leading axes are resamples -------------------


def mean(row):
    return np.mean([scores.mean(axis=-1) for scores in row], axis=0)


def iqm(row):
    """Mean of the scores of all datasets and seeds, without the lowest and the highest quarter."""
    scores = np.sort(np.concatenate(row, axis=-1))
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def improvement(row, other):
    """P(X > Y) of a seed X of one method and a seed Y of another, the mean over datasets. A tie is half a win."""
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(row, other, strict=True)]
    return np.mean([((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)) for x, y in pairs], axis=0)


def profile(row, levels):
    """Share of the runs whose score is above each level: (..., levels)."""
    return (np.concatenate(row, axis=-1)[..., None] > levels).mean(axis=-2)


def interval(statistic, *rows):
    """The lower and the upper end of the 95 % interval of statistic(*rows): resampled over seeds, in each dataset."""
    rng = np.random.RandomState(0)  # not a Generator, whose numbers may change with NumPy's version
    samples = [[scores[rng.randint(len(scores), size=(RESAMPLES, len(scores)))] for scores in row] for row in rows]
    return np.percentile(statistic(*samples), [2.5, 97.5], axis=0)


# --- Tables ----------------------------------------------------------------------------------------------


def write_tables(root: Path, protocol: str, runs: list[Run], check: bool) -> list[str]:
    """Fills the marked places of README.md and the pages; returns the files that were not up to date."""
    stale = []
    begin, end = (f"<!-- report:{protocol}:{edge} -->" for edge in ("begin", "end"))
    for page in [root / "README.md", *sorted((root / "algos").glob("*.md"))]:
        text, is_readme = page.read_text(), page.parent == root
        if not is_readme and begin not in text:
            continue
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise SystemExit(f"{page} needs one line {begin} and, below it, one line {end}.")
        shown = table(runs, protocol) if is_readme else table(runs, protocol, page.stem, "../")
        new = "".join([text.split(begin)[0], begin, "\n", shown, "\n", end, text.split(end)[1]])
        if new != text:
            stale.append(page.relative_to(root).as_posix())
            if not check:
                page.write_text(new)
                print(page)
    return stale


def table(runs: list[Run], protocol: str, algo: str | None = None, up: str = "") -> str:
    """Markdown: the rows of all methods, or of one algorithm's. `up` leads from the page to the root."""
    aggregated, rows = comparable(runs)
    runs = [run for run in runs if algo in (None, run.algo)]
    if not runs:
        return "No run yet."
    results = f"{up}benchmarks/results/{protocol}"
    kinds = {run.dataset: run.summary["score_kind"] for run in runs}
    lines = [["method"], ["---"] * (len(kinds) + 2)]
    for dataset, kind in kinds.items():
        link = f"[{short(dataset)}]({results}/learning_curves_{short(dataset)}.png)"
        lines[0].append(link if kind.startswith("normalised") else f"{link}, {kind}")
    lines[0].append("IQM")
    for method, name in sorted({(run.method, run.algo) for run in runs}):
        cells = dict.fromkeys(kinds, "–")
        for run in runs:
            if run.method == method:
                cells[run.dataset] = with_interval(mean, [run.scores], f"{results}/{run.place}")
        total = with_interval(iqm, rows[method]) if method in rows else "–"
        lines.append([f"[{method}]({up}algos/{name}.md)", *cells.values(), total])
        values = {run.dataset: run.values for run in runs if run.method == method and len(run.values)}
        if algo and values:  # on its page
            cells = [over_estimation(values[dataset]) if dataset in values else "–" for dataset in kinds]
            lines.append(["believed − true value", *cells, "–"])
    seeds = spread([len(run.scores) for run in runs])
    episodes = spread([len(returns) for run in runs for returns in run.summary["returns"]])
    updates = spread([run.summary["num_updates"] for run in runs])
    foot = (
        f"Score of the last evaluation ({episodes} episodes) after {updates} updates: mean over {seeds} seeds and, in "
        "brackets, the 95 % interval of a bootstrap over them, which is too narrow with few seeds."
    )
    if any("believed" in line[0] for line in lines):
        foot += (
            " Below it: what the critic believes of the policy at the start states, less what the policy gets there "
            "(in brackets), with rewards as the method sees them; means over the seeds."
        )
    if aggregated:
        foot += f" IQM: interquartile mean over {', '.join(map(short, aggregated))}."
    if all(dataset.startswith("stitch/") for dataset in kinds):
        foot += " The data are rebuilt by recipes: published scores are on other data, not comparable, and not shown."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot


def with_interval(statistic, row, link=""):
    value = f"{statistic(row):.1f}"
    value = f"[{value}]({link})" if link else value
    if all(len(scores) == 1 for scores in row):
        return value  # one seed: nothing is known of the spread
    low, high = interval(statistic, row)
    return f"{value} ({low:.1f} to {high:.1f})"


def over_estimation(values):
    believed, true = values.mean(axis=0)
    return f"{number(believed - true, '+')} ({number(true)})"


def number(x, sign=""):
    """Three digits, and whole numbers in full up to a million."""
    return f"{x:{sign},.0f}" if 100 <= abs(x) < 1e6 else f"{x:{sign}.3g}"


def spread(counts):
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# --- Pictures --------------------------------------------------------------------------------------------


def draw(runs: list[Run], folder: Path):
    for dataset in sorted({run.dataset for run in runs}):
        curves = {run.method: learning_curve(folder / run.place) for run in runs if run.dataset == dataset}
        title = f"{dataset}: mean of the seeds, 95 % interval"
        labels = {"title": title, "xlabel": "updates of each seed", "ylabel": "score"}
        draw_panels(curves, folder / f"learning_curves_{short(dataset)}.png", **labels)
    datasets, rows = comparable(runs)
    if not rows:
        print("No method has normalised scores on all datasets that most have: no picture is over all datasets.")
        return
    title = ", ".join(map(short, datasets)) if len(datasets) < 3 else f"{len(datasets)} datasets"
    scores = np.concatenate([scores for row in rows.values() for scores in row])
    levels = np.linspace(min(0, scores.min()), max(100, scores.max()), 101)
    shares = partial(profile, levels=levels)
    curves = {method: (levels, shares(row), *interval(shares, row)) for method, row in rows.items()}
    labels = {"title": title, "xlabel": "score", "ylabel": "share of runs above"}
    draw_panels(curves, folder / "performance_profiles.png", **labels)
    draw_iqm(rows, title, folder / "iqm.png")
    draw_improvement(rows, title, folder / "probability_of_improvement.png")


def learning_curve(run: Path):
    """Updates, and the mean score of the seeds with its interval, each (evaluations,)."""
    steps, scores = read_scores(run)
    bounds = [interval(mean, [evaluation]) for evaluation in scores.T]
    return steps, scores.mean(axis=0), *np.transpose(bounds)


def draw_panels(curves, path, title, xlabel, ylabel, **settings):
    """A panel for each of {name: (x, middle, low, high)}, before the others in grey: many lines stay readable so."""
    width = min(4, len(curves))
    height = math.ceil(len(curves) / width)
    size = (3 * width, 2.2 * height + 0.6)
    figure, axes = plt.subplots(height, width, figsize=size, sharex=True, sharey=True, squeeze=False)
    for i, (panel, (name, (x, middle, low, high))) in enumerate(zip(axes.flat, curves.items(), strict=False)):
        for other in curves.values():
            panel.plot(*other[:2], color="#D0D0D0", linewidth=1)
        colour = COLOURS[i % len(COLOURS)]
        panel.fill_between(x, low, high, color=colour, alpha=0.25, linewidth=0)
        panel.plot(x, middle, color=colour, linewidth=2)
        panel.set_title(name, fontsize=11)
        panel.tick_params(labelsize=8, labelbottom=i + width >= len(curves))  # nothing below it
        panel.set(**settings)
    for panel in axes.flat[len(curves) :]:
        panel.set_visible(False)
    figure.suptitle(title)
    figure.supxlabel(xlabel, fontsize=11)
    figure.supylabel(ylabel, fontsize=11)
    figure.tight_layout()
    save(figure, path)


def draw_iqm(rows, title, path):
    order = sorted(rows, key=lambda method: iqm(rows[method]))
    figure, axes = plt.subplots(figsize=(6, 0.32 * len(rows) + 1.2))
    for y, method in enumerate(order):
        axes.plot(interval(iqm, rows[method]), [y, y], color=COLOURS[0], linewidth=6, alpha=0.3, solid_capstyle="butt")
        axes.plot(iqm(rows[method]), y, color=COLOURS[0], marker="o")
    axes.set_yticks(range(len(order)), order)
    axes.set(xlabel="interquartile mean of the scores", title=title)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    save(figure, path)


def draw_improvement(rows, title, path):
    names = sorted(rows, key=lambda method: -iqm(rows[method]))
    figure, axes = plt.subplots(figsize=(0.5 * len(names) + 2, 0.4 * len(names) + 1.8))
    chance = np.array([[improvement(rows[x], rows[y]) for y in names] for x in names])
    axes.imshow(chance, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(chance.shape):
        if i != j:
            low, high = interval(improvement, rows[names[i]], rows[names[j]])
            weight = "bold" if low > 0.5 or high < 0.5 else "normal"
            colour = "white" if abs(chance[i, j] - 0.5) > 0.3 else "black"
            axes.text(j, i, f"{chance[i, j]:.2f}", ha="center", va="center", fontsize=8, weight=weight, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_title(f"P(row > column), {title}\nbold: its interval excludes 0.5", fontsize=11)
    save(figure, path)


def save(figure, path: Path):
    """The same picture is the same file: matplotlib's version, which it would name, is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)
    print(path)


# --- Model selection -------------------------------------------------------------------------------------


def selection_curve(returns, scores, num_episodes, num_candidates=8, num_trials=1_000, seed=0):
    """Scores of the policies chosen after 0 .. num_episodes evaluation episodes: (num_episodes + 1, num_trials).

    In each trial UCB1 (Auer et al. 2002) spends episodes on candidates drawn from the policies. An episode is one of
    the recorded `returns` (policies, episodes) of its policy, with replacement. Chosen is the highest mean so far, or
    any candidate after no episode; `scores` (policies,) say how good it is. Unlike evaluation.py of unifloral at
    f2dc127, returns are scaled to [0, 1], as UCB1's bonus needs, and what was not tried is not chosen (there its mean
    is 0).
    """
    returns, scores = np.asarray(returns, float), np.asarray(scores, float)
    rng = np.random.default_rng(seed)
    unit = (returns - returns.min()) / (np.ptp(returns) or 1)
    order = np.tile(np.arange(len(scores)), (num_trials, 1))
    arms = rng.permuted(order, axis=1)[:, :num_candidates]  # (trials, candidates): argmax breaks ties at random
    trials = np.arange(num_trials)
    count, total = np.zeros(arms.shape), np.zeros(arms.shape)
    chosen = [scores[arms[:, 0]]]
    for played in range(num_episodes):
        tried = np.maximum(count, 1)
        bound = np.where(count > 0, total / tried + np.sqrt(2 * np.log(max(played, 1)) / tried), np.inf)
        pull = bound.argmax(axis=1)
        episode = rng.integers(unit.shape[1], size=num_trials)
        total[trials, pull] += unit[arms[trials, pull], episode]
        count[trials, pull] += 1
        best = np.where(count > 0, total / np.maximum(count, 1), -np.inf).argmax(axis=1)
        chosen.append(scores[arms[trials, best]])
    return np.array(chosen)


def report_selection(folders, num_candidates: int, out: Path):
    """Prints a table of what one would have chosen, and draws it against the number of episodes, for each dataset."""
    policies = {}
    for folder in folders:
        if not (folder / "summary.json").exists():
            raise SystemExit(f"{folder} holds no finished run: it has no summary.json.")
        summary = json.loads((folder / "summary.json").read_text())
        returns, scores = policies.setdefault(summary["dataset"], {}).setdefault(summary["algo"], ([], []))
        returns += summary["returns"]
        scores += summary["score_per_seed"]
    print(f"| dataset | algorithm | policies | score after {' | '.join(map(str, BUDGETS))} episodes | best policy |")
    print("| --- " * (len(BUDGETS) + 4) + "|")
    for dataset, by_algo in sorted(policies.items()):
        curves = {}
        for algo, (returns, scores) in sorted(by_algo.items()):
            if len({len(episodes) for episodes in returns}) > 1 or np.isnan(scores).any():
                raise SystemExit(f"{algo} on {dataset}: not all runs were scored, with the same number of episodes.")
            chosen = selection_curve(returns, scores, max(BUDGETS), num_candidates)
            cells = [f"{chosen[n].mean():.1f}" for n in BUDGETS]
            print("| " + " | ".join([dataset, algo, str(len(scores)), *cells, f"{max(scores):.1f}"]) + " |")
            curves[algo] = (range(len(chosen)), chosen.mean(axis=1), *np.percentile(chosen, [5, 95], axis=1))
        title = f"{dataset}: mean, and 90 % of the trials"
        labels = {"title": title, "xlabel": "evaluation episodes", "ylabel": "score"}
        ticks = {"xscale": "symlog", "xticks": BUDGETS, "xticklabels": BUDGETS}
        draw_panels(curves, out / f"selection_{short(dataset)}.png", **labels, **ticks)


# --- Dataset cards ---------------------------------------------------------------------------------------


def write_card(dataset_id: str, out: Path):
    """DATASET.md and DATASET.png, the histogram of its returns, from the dataset in Minari's folder."""
    import minari

    try:
        dataset = minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise SystemExit(f"{dataset_id} is not in Minari's folder: a run on it builds or downloads it.") from error
    about, name = dataset.storage.metadata, short(dataset_id)
    episodes = [(e.rewards.sum(), len(e.rewards), e.terminations.any()) for e in dataset.iterate_episodes()]
    returns, lengths, terminated = map(np.array, zip(*episodes, strict=True))
    quantiles = ", ".join(f"{q:.4g}" for q in np.percentile(returns, [0, 5, 25, 50, 75, 95, 100]))
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    task = json.loads(about.get("eval_env_spec") or about.get("env_spec") or "null")
    rows = {
        "made by": f"{about.get('algorithm_name', 'not recorded')} ({about.get('code_permalink', 'no link to code')})",
        "size": f"{len(returns):,} episodes, {lengths.sum():,} transitions, {about.get('dataset_size', '?')} MB",
        "episode length": f"{spread(lengths)}, median {np.median(lengths):.0f}",
        "ends": f"{terminated.sum():,} terminated, {(~terminated).sum():,} only cut off",
        "observations": f"`{' '.join(str(dataset.observation_space).split())}`",
        "actions": f"`{' '.join(str(dataset.action_space).split())}`",
        "evaluation": f"`{task['id']}`, {task['max_episode_steps']} steps" if task else "no environment in the file",
        "episode return": f"{returns.mean():.4g} ± {returns.std():.4g} (mean ± standard deviation)",
        "its quantiles": f"{quantiles} (0, 5, 25, 50, 75, 95, 100 %)",
        "reference scores": "none in the file" if low is None else f"return {low:.6g} scores 0, {high:.6g} scores 100",
    }
    lines = [f"# {dataset_id}", "", about.get("description") or "No description.", "", "| | |", "| --- | --- |"]
    lines += [f"| {label} | {value} |" for label, value in rows.items()]
    lines += ["", f"![Histogram of the episodes' returns]({name}.png)", ""]
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join(lines))
    print(out / f"{name}.md")
    figure, axes = plt.subplots(figsize=(6, 2.8))
    axes.hist(returns, bins=40, color=COLOURS[0])
    axes.set(title=dataset_id, xlabel="return of an episode", ylabel="episodes")
    save(figure, out / f"{name}.png")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
