"""From result files to what people read.

    python benchmarks/report.py quick                     # tables into README.md and algos/*.md, and pictures
    python benchmarks/report.py quick --check             # status 1 if those are not of the result files as they are
    python benchmarks/report.py results/mine              # of any folder of runs: report.md and pictures in it
    python benchmarks/report.py --selection runs/grid/*   # how good is the policy that few episodes would choose?
    python benchmarks/report.py --cards stitch/pointmaze-umaze-v0

Tables     The run folders in benchmarks/results/PROTOCOL, as benchmarks/sweep.py leaves them: a row for each method, a
           column for each dataset, and the interquartile mean (IQM) of all. They go between the marks
           `<!-- report:PROTOCOL:begin -->` and `<!-- report:PROTOCOL:end -->`: of README.md the whole table, of a page
           algos/x.md the rows of that algorithm, and what its critic believes beside what is true. Between the marks
           report:speed:NAME of README.md goes the table of benchmarks/results/speed-NAME.json.
Published  Scores of benchmarks/published.toml, beside ours on the datasets that it names and on no other.
Pictures   benchmarks/results/PROTOCOL/*.png: learning curves of each dataset; IQM, performance profiles and probability
           of improvement, as in Agarwal et al. (2021), https://arxiv.org/abs/2108.13264
Intervals  95 %, percentiles of a bootstrap over seeds, stratified by dataset. Estimators and intervals are rliable's;
           rliable 1.2.0 itself fails on import beside pandas 3 and takes no seed. Here equal files give equal bytes.
           With few seeds they are too narrow: of three, the interval of a mean is from the lowest to the highest, and
           those are on both sides of the true mean in three of four cases.
Selection  Of policies trained over a set of hyper-parameters, by a UCB bandit, as in Jackson et al. (2025),
           https://arxiv.org/abs/2504.11453, except that no episode both chooses a policy and scores it.
Cards      benchmarks/cards/DATASET.md and its histogram of returns, from the dataset in Minari's folder, and the list
           of all cards in their README.md.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import textwrap
import tomllib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import speed  # benchmarks/speed.py
import tyro
from PIL import Image
from plot import COLOURS, STYLE, read_scores  # benchmarks/plot.py; it chooses a backend that needs no display

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 5_000  # of the bootstrap
BUDGETS = (0, 1, 10, 100)  # evaluation episodes, in the table of --selection
PUBLISHED = tomllib.loads((Path(__file__).parent / "published.toml").read_text())
# 1 - 2 / 2^3, where the scores are symmetric: then it is from the lowest of the three to the highest
NARROW = "with 3 seeds it holds a dataset's true mean in about 75 % of cases"


@dataclasses.dataclass(frozen=True)
class Options:
    protocol: Annotated[str, tyro.conf.Positional] = "quick"  # folder in benchmarks/results, or any folder of runs
    check: bool = False  # write nothing; fail where a table or a picture is not of the result files as they are
    selection: tuple[Path, ...] = ()  # run folders over hyper-parameters, of any algorithms and datasets
    candidates: int = 8  # --selection: policies to choose from, drawn from all that were trained
    cards: tuple[str, ...] = ()  # datasets in Minari's folder
    out: Path | None = None  # of --selection and --cards; by default beside those runs, and benchmarks/cards


def main(options: Options):
    plt.rcParams.update(STYLE)
    if options.selection:
        report_selection(options.selection, options.candidates, options.out)
    for dataset_id in options.cards:
        write_card(dataset_id, options.out or ROOT / "benchmarks" / "cards")
    if options.selection or options.cards:
        return
    results = ROOT / "benchmarks" / "results"
    folder = results / options.protocol
    folder = folder if folder.is_dir() else Path(options.protocol)
    runs, failures = read_runs(folder), read_failures(folder)
    if folder.resolve().parent == results.resolve():
        stale = write_tables(ROOT, folder.name, runs, failures, options.check)
    else:
        stale = write_own(folder, runs, failures, options.check)
    if options.check:
        stale += stale_pictures(runs, failures, folder)
    else:
        draw(runs, failures, folder)
    if options.check and stale:
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
    steps: np.ndarray  # (evaluations,)
    curve: np.ndarray  # (seeds, evaluations) scores
    digest: str  # of its files: a picture keeps those of the runs that it shows


class Failure(NamedTuple):
    method: str
    algo: str
    dataset: str
    reason: str
    refused: bool  # the algorithm does not take the dataset's actions: nothing is wrong


def read_runs(folder: Path) -> list[Run]:
    """The finished and scored runs below a folder, sorted by dataset and method."""
    runs = []
    for file in sorted(folder.rglob("summary.json")):
        run = file.parent
        try:
            summary = json.loads(file.read_text())
            scores = np.array(summary["score_per_seed"], float)
            if len({json.dumps(point) for point in summary.get("grid", [])}) > 1:
                print(f"{run} is a grid of hyper-parameters, for --selection: it is in no table.")
            elif np.isnan(scores).any():
                print(f"{run} was not scored: it is in no table.")
            else:
                runs.append(read_run(run, folder, summary, scores))
        except (OSError, ValueError, KeyError, SystemExit) as error:  # cut short, or lines are missing
            print(f"{run} cannot be read ({type(error).__name__}: {error}): it is in no table.")
    if not runs:
        raise SystemExit(f"{folder} holds no finished run: python benchmarks/sweep.py {folder.name}")
    return sorted(runs, key=lambda run: (run.dataset, run.method))


def read_run(run: Path, folder: Path, summary: dict, scores: np.ndarray) -> Run:
    contents = [(run / name).read_bytes() for name in ("summary.json", "metrics.jsonl")]
    lines = [json.loads(line) for line in contents[1].splitlines()]
    last = [line for line in lines if line["step"] == lines[-1]["step"] and "believed_value" in line]
    values = np.array([[line["believed_value"], line["true_value"]] for line in last]).reshape(-1, 2)
    steps, curve = read_scores(run)
    if not np.array_equal(curve[:, -1], scores):
        raise ValueError("metrics.jsonl does not end with the scores of summary.json")
    if missing := {"returns", "num_updates", "score_kind"} - summary.keys():
        raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
    digest = hashlib.sha256(b"".join(contents)).hexdigest()
    place = run.relative_to(folder).as_posix()
    return Run(run.name, summary["algo"], summary["dataset"], place, scores, summary, values, steps, curve, digest)


def read_failures(folder: Path) -> list[Failure]:
    """The cells that failed below a folder, as benchmarks/sweep.py records them."""
    failures = []
    for file in sorted(folder.rglob("failed.json")):
        try:
            cell = json.loads(file.read_text())
            refused = re.search("needs (discrete|continuous) actions", cell["reason"]) is not None
            failures.append(Failure(file.parent.name, cell["algo"], cell["config"]["dataset"], cell["reason"], refused))
        except (ValueError, KeyError) as error:
            print(f"{file} cannot be read ({type(error).__name__}: {error}): it is in no table.")
    return failures


def short(dataset_id: str) -> str:
    """A dataset's name as a file or a column is called."""
    return dataset_id.removeprefix("stitch/").replace("/", "-")


def comparable(runs: list[Run], failures: list[Failure]) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """What aggregates are over: the datasets, and for each method its scores on each of them, [(seeds,)].

    These are the datasets with normalised scores that two thirds of the methods or more take (some take only discrete
    actions, more take only continuous ones), and the methods that have all of them. A cell that failed leaves its
    method out, and not its dataset.
    """
    methods = sorted({run.method for run in runs})
    normalised = {run.dataset for run in runs if run.summary["score_kind"].startswith("normalised")}
    taken = [*runs, *(failure for failure in failures if not failure.refused and failure.method in methods)]
    count = Counter(dataset for _, dataset in {(x.method, x.dataset) for x in taken} if dataset in normalised)
    datasets = sorted(dataset for dataset in count if count[dataset] >= 2 / 3 * len(methods))
    rows = {m: [run.scores for run in runs if run.method == m and run.dataset in datasets] for m in methods}
    return datasets, {method: row for method, row in rows.items() if datasets and len(row) == len(datasets)}


# --- Estimators: a row is a list over datasets of scores (..., seeds); leading axes are resamples -------------------


def mean(row):
    return np.mean([scores.mean(axis=-1) for scores in row], axis=0)


def pooled(row):
    """The scores of all datasets, each as often as a common multiple of their numbers of seeds asks for.

    So datasets weigh the same, as in the mean. rliable has as many seeds everywhere, and then this changes nothing.
    """
    size = math.lcm(*(scores.shape[-1] for scores in row))
    return np.concatenate([np.repeat(scores, size // scores.shape[-1], axis=-1) for scores in row], axis=-1)


def iqm(row):
    """Mean of the scores of all datasets and seeds, without the lowest and the highest quarter."""
    scores = np.sort(pooled(row))
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(axis=-1)


def improvement(row, other):
    """P(X > Y) of a seed X of one method and a seed Y of another, the mean over datasets. A tie is half a win."""
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(row, other, strict=True)]
    return np.mean([((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)) for x, y in pairs], axis=0)


def profile(row, levels):
    """Share of the runs whose score is above each level: (..., levels)."""
    return (pooled(row)[..., None] > levels).mean(axis=-2)


def interval(statistic, *rows):
    """The lower and the upper end of the 95 % interval of statistic(*rows): resampled over seeds, in each dataset.

    NaN where a dataset has one seed: of its spread nothing is known.
    """
    rng = np.random.RandomState(0)  # not a Generator, whose numbers may change with NumPy's version
    samples = [[scores[rng.randint(len(scores), size=(RESAMPLES, len(scores)))] for scores in row] for row in rows]
    known = all(len(scores) > 1 for row in rows for scores in row)
    return np.percentile(statistic(*samples), [2.5, 97.5], axis=0) * (1 if known else np.nan)


# --- Tables ----------------------------------------------------------------------------------------------


def write_tables(root: Path, protocol: str, runs: list[Run], failures: list[Failure], check: bool) -> list[str]:
    """Fills the marked places of README.md and the pages; returns the files that were not up to date."""
    stale = []
    results = f"benchmarks/results/{protocol}"
    for page in [root / "README.md", *sorted((root / "algos").glob("*.md"))]:
        text, is_readme = page.read_text(), page.parent == root
        if is_readme:
            new = fill(text, protocol, table(runs, failures, results), page)
            for name in re.findall("<!-- report:speed:(.*):begin -->", text):
                measured = json.loads((root / "benchmarks" / "results" / f"speed-{name}.json").read_text())
                new = fill(new, f"speed:{name}", speed.table(measured), page)
        elif f"<!-- report:{protocol}:begin -->" in text:
            new = fill(text, protocol, table(runs, failures, f"../{results}", page.stem, ".."), page)
        else:
            continue
        stale += put(page, new, check, page.relative_to(root).as_posix())
    return stale


def write_own(folder: Path, runs: list[Run], failures: list[Failure], check: bool) -> list[str]:
    """FOLDER/report.md: the table, and the pictures that `draw` leaves beside it."""
    root = os.path.relpath(ROOT, folder.resolve())
    lines = [f"# {folder.resolve().name}", "", table(runs, failures, ".", root=root)]
    for name in pictures(runs, failures):
        lines += ["", f"![{name.removesuffix('.png').replace('_', ' ')}]({name})"]
    return put(folder / "report.md", "\n".join(lines) + "\n", check, "report.md")


def fill(text: str, mark: str, shown: str, page: Path) -> str:
    """The text with `shown` between its marks."""
    begin, end = (f"<!-- report:{mark}:{edge} -->" for edge in ("begin", "end"))
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page} needs one line {begin} and, below it, one line {end}.")
    return "".join([text.split(begin)[0], begin, "\n", shown, "\n", end, text.split(end)[1]])


def put(page: Path, new: str, check: bool, name: str) -> list[str]:
    """[name] where the page was not up to date."""
    if page.exists() and page.read_text() == new:
        return []
    if not check:
        page.write_text(new)
        print(page)
    return [name]


def table(runs: list[Run], failures: list[Failure], results: str, algo: str | None = None, root: str = ".") -> str:
    """Markdown: the rows of all methods, or of one algorithm's.

    `results` and `root` lead from the page to the folder of the runs and to the root.
    """
    aggregated, rows = comparable(runs, failures)
    runs = [run for run in runs if algo in (None, run.algo)]
    failures = [failure for failure in failures if algo in (None, failure.algo)]
    if not runs:
        return "No run yet."
    kinds = {run.dataset: run.summary["score_kind"] for run in runs}
    published = {dataset: PUBLISHED["scores"][dataset] for dataset in kinds if dataset in PUBLISHED["scores"]}
    lines = [["method"], ["---"] * (len(kinds) + 2)]
    for dataset, kind in kinds.items():
        link = f"[{short(dataset)}]({join(results, curves_of(dataset))})"
        lines[0].append(link if kind.startswith("normalised") else f"{link}, {kind}")
    lines[0].append("IQM")
    failed = [failure for failure in failures if not failure.refused]
    for method, name in sorted({(x.method, x.algo) for x in [*runs, *failed]}):
        cells = dict.fromkeys(kinds, "not run")
        for failure in failures:
            if failure.method == method and failure.dataset in kinds:
                cells[failure.dataset] = "–" if failure.refused else "failed"
        for run in runs:
            if run.method == method:
                cells[run.dataset] = with_interval(mean, [run.scores], join(results, run.place))
                if method in published.get(run.dataset, {}):
                    cells[run.dataset] += f"; published {published[run.dataset][method]:.1f}"
        total = with_interval(iqm, rows[method]) if method in rows else "–"
        lines.append([f"[{method}]({join(root, f'algos/{name}.md')})", *cells.values(), total])
        values = {run.dataset: run.values for run in runs if run.method == method and len(run.values)}
        if algo and values:  # on its page
            cells = [over_estimation(values[dataset]) if dataset in values else "–" for dataset in kinds]
            lines.append(["believed − true value", *cells, "–"])
    seeds = [len(run.scores) for run in runs]
    episodes = spread([len(returns) for run in runs for returns in run.summary["returns"]])
    updates = spread([run.summary["num_updates"] for run in runs])
    foot = f"Score of the last evaluation ({episodes} episodes) after {updates} updates: "
    if max(seeds) == 1:
        foot += "1 seed, of whose spread nothing is known."
    else:
        foot += (
            f"mean over {spread(seeds)} seeds and, in brackets, the 95 % interval of a bootstrap over them, which is "
            f"too narrow with few seeds: {NARROW}."
        )
    if any("believed" in line[0] for line in lines):
        foot += (
            " Below it: what the critic believes of the policy at the start states, less what the policy gets there "
            "(in brackets), with rewards as the method sees them; means over the seeds."
        )
    exact = [run for run in runs if run.summary["score_kind"].endswith("exact")]
    if exact:
        draws = spread([len(returns) for run in exact for returns in run.summary["returns"]])
        foot += (
            f" On {', '.join(sorted({short(run.dataset) for run in exact}))} no episode is played: a policy is "
            "evaluated exactly, by dynamic programming; a stochastic one's probabilities are the frequencies of "
            f"{draws} draws in each state."
        )
    if aggregated:
        foot += f" IQM: interquartile mean over {', '.join(map(short, aggregated))}."
    if any(failure.refused for failure in failures):
        foot += " A dash: the method does not take that dataset's actions."
    for failure in failed:
        foot += f" Failed: {failure.method} on {short(failure.dataset)} ({failure.reason})."
    if published:
        foot += f" Published: {PUBLISHED['source']}."
    if all(dataset.startswith("stitch/") for dataset in kinds):
        foot += " The data are rebuilt by recipes: published scores are on other data, not comparable, and not shown."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot


def join(folder: str, name: str) -> str:
    """A relative link."""
    return os.path.normpath(f"{folder}/{name}")


def with_interval(statistic, row, link=""):
    value = f"{statistic(row):.1f}"
    value = f"[{value}]({link})" if link else value
    low, high = interval(statistic, row)
    return value if np.isnan(low) else f"{value} ({low:.1f} to {high:.1f})"


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


def curves_of(dataset: str) -> str:
    return f"learning_curves_{short(dataset)}.png"


def pictures(runs: list[Run], failures: list[Failure]) -> dict[str, list[Run]]:
    """The name of each picture, and the runs that it shows."""
    names = {}
    if comparable(runs, failures)[1]:
        names = dict.fromkeys(("iqm.png", "performance_profiles.png", "probability_of_improvement.png"), runs)
    for dataset in sorted({run.dataset for run in runs}):
        names[curves_of(dataset)] = [run for run in runs if run.dataset == dataset]
    return names


def draw(runs: list[Run], failures: list[Failure], folder: Path):
    shown = pictures(runs, failures)
    for dataset in sorted({run.dataset for run in runs}):
        name = curves_of(dataset)
        curves = {run.method: learning_curve(run.steps, run.curve) for run in shown[name]}
        title = f"{dataset}: mean of the seeds. Band: {band([run.scores for run in shown[name]])}"
        labels = {"title": title, "xlabel": "updates of each seed", "ylabel": "score"}
        draw_panels(curves, folder / name, digest(shown[name]), **labels)
    datasets, rows = comparable(runs, failures)
    if not rows:
        print("No method has normalised scores on all datasets that most have: no picture is over all datasets.")
        return
    over = ", ".join(map(short, datasets))
    of = band([scores for row in rows.values() for scores in row])
    scores = np.concatenate([scores for row in rows.values() for scores in row])
    levels = np.linspace(min(0, scores.min()), max(100, scores.max()), 101)
    shares = partial(profile, levels=levels)
    curves = {method: (levels, shares(row), *interval(shares, row)) for method, row in rows.items()}
    labels = {"title": f"{over}. Band: {of}", "xlabel": "score", "ylabel": "share of runs above"}
    draw_panels(curves, folder / "performance_profiles.png", digest(runs), **labels)
    draw_iqm(rows, f"{over}. Bar: {of}", folder / "iqm.png", digest(runs))
    draw_improvement(rows, over, folder / "probability_of_improvement.png", digest(runs))


def band(scores: list[np.ndarray]) -> str:
    """What the band of a picture is."""
    seeds = [len(x) for x in scores]
    if min(seeds) == 1:
        return "none where there is 1 seed, else the 95 % bootstrap interval" if max(seeds) > 1 else "none, of 1 seed"
    text = f"95 % bootstrap interval over {spread(seeds)} seeds"
    return text + f", too narrow: {NARROW}" if min(seeds) < 5 else text


def digest(runs: list[Run]) -> str:
    return hashlib.sha256(" ".join(f"{run.method} {run.digest}" for run in runs).encode()).hexdigest()


def stale_pictures(runs: list[Run], failures: list[Failure], folder: Path) -> list[str]:
    """Those that are missing, or of other result files than these. How they are drawn is not compared."""
    stale = []
    for name, shown in pictures(runs, failures).items():
        if not (folder / name).exists() or Image.open(folder / name).info.get("Source") != digest(shown):
            stale.append(name)
    return stale


def learning_curve(steps, curve):
    """Updates, and the mean score of the seeds (seeds, evaluations) with its interval, each (evaluations,)."""
    bounds = [interval(mean, [evaluation]) for evaluation in curve.T]
    return steps, curve.mean(axis=0), *np.transpose(bounds)


def draw_panels(curves, path, source, title, xlabel, ylabel, **settings):
    """A panel for each of {name: (x, middle, low, high)}, before the others in grey: many lines stay readable so."""
    width = min(4, len(curves))
    height = math.ceil(len(curves) / width)
    size = (max(5, 3 * width), 2.2 * height + 0.9)
    axes_of = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(height, width, figsize=size, **axes_of)
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
    figure.suptitle(textwrap.fill(title, 12 * size[0]), fontsize=11)
    figure.supxlabel(xlabel, fontsize=11)
    figure.supylabel(ylabel, fontsize=11)
    save(figure, path, source)


def draw_iqm(rows, title, path, source):
    order = sorted(rows, key=lambda method: iqm(rows[method]))
    figure, axes = plt.subplots(figsize=(6, 0.32 * len(rows) + 1.2))
    for y, method in enumerate(order):
        axes.plot(interval(iqm, rows[method]), [y, y], color=COLOURS[0], linewidth=6, alpha=0.3, solid_capstyle="butt")
        axes.plot(iqm(rows[method]), y, color=COLOURS[0], marker="o")
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("interquartile mean of the scores")
    axes.set_title(textwrap.fill(title, 66), fontsize=11)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.8)
    save(figure, path, source)


def draw_improvement(rows, title, path, source):
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
    # 9 %: of pairs of the same normal scores, 3 seeds on each of 3 datasets
    about = (
        f"P(row > column), {title}. Bold: the 95 % bootstrap interval of this pair by itself excludes 0.5. With 3 "
        "seeds on 3 datasets it does so in 9 % of pairs that do not differ"
    )
    axes.set_title(textwrap.fill(about, max(36, 6 * len(names))), fontsize=11)
    save(figure, path, source)


def save(figure, path: Path, source: str = ""):
    """The same picture is the same file: matplotlib's version, which it would name, is left out.

    `source` stands in the file, so that `stale_pictures` can tell whether the result files are still those drawn.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None, **({"Source": source} if source else {})}
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata=metadata)
    plt.close(figure)
    print(path)


# --- Model selection -------------------------------------------------------------------------------------


def selection_curve(returns, scores, num_episodes, num_candidates=8, num_trials=1_000, seed=0):
    """Scores of the policies chosen after 0 .. num_episodes evaluation episodes: (num_episodes + 1, num_trials).

    In each trial UCB1 (Auer et al. 2002) spends episodes on candidates drawn from the policies. An episode is one of
    the recorded `returns` (policies, episodes) of its policy, with replacement. Chosen is the highest mean so far, or
    any candidate after no episode; `scores` (policies,) say how good it is, and must be of other episodes than these.
    Unlike evaluation.py of unifloral at f2dc127, returns are scaled to [0, 1], as UCB1's bonus needs, and what was not
    tried is not chosen (there its mean is 0).
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


def halves(returns, scores):
    """Twice: the `returns` (policies, episodes) of half of the episodes, and the scores (policies,) of the other half.

    The score of the episodes with which a policy was chosen flatters it: of equal policies, the luckiest is chosen. So
    no episode does both, unlike in unifloral's evaluation.py, whose 1,000 episodes of each policy hide that.
    A score is a linear function of the mean return, which is known from the scores of all episodes.
    """
    returns, scores = np.asarray(returns, float), np.asarray(scores, float)
    means = returns.mean(axis=1)
    slope = 0 if np.allclose(means, means[0]) else np.ptp(scores) / np.ptp(means)
    for first, second in ((returns[:, ::2], returns[:, 1::2]), (returns[:, 1::2], returns[:, ::2])):
        yield first, scores + slope * (second.mean(axis=1) - means)


def report_selection(folders, num_candidates: int, out: Path | None):
    """Prints a table of what one would have chosen, and draws it against the number of episodes, for each dataset.

    The last column is the policy that is best by one half of the episodes, scored by the other.
    """
    policies = {}
    for folder in folders:
        try:
            summary = json.loads((folder / "summary.json").read_text())
            new = summary["returns"], summary["score_per_seed"]
        except (OSError, ValueError, KeyError) as error:
            print(f"{folder} holds no finished run ({type(error).__name__}): it is left out.")
            continue
        returns, scores = policies.setdefault(summary["dataset"], {}).setdefault(summary["algo"], ([], []))
        returns += new[0]
        scores += new[1]
    if not policies:
        raise SystemExit("None of these folders holds a finished run.")
    out = out or Path(os.path.commonpath([folder.resolve() for folder in folders]))
    print(f"| dataset | algorithm | policies | score after {' | '.join(map(str, BUDGETS))} episodes | best policy |")
    print("| --- " * (len(BUDGETS) + 4) + "|")
    for dataset, by_algo in sorted(policies.items()):
        curves = {}
        for algo, (returns, scores) in sorted(by_algo.items()):
            if len({len(episodes) for episodes in returns}) > 1 or np.isnan(scores).any():
                raise SystemExit(f"{algo} on {dataset}: not all runs were scored, with the same number of episodes.")
            if len(returns[0]) < 2:
                raise SystemExit(f"{algo} on {dataset}: one episode cannot both choose a policy and score it.")
            parts = list(halves(returns, scores))
            chosen = [selection_curve(*part, max(BUDGETS), num_candidates, num_trials=500) for part in parts]
            chosen = np.concatenate(chosen, axis=1)
            best = np.mean([score[half.mean(axis=1).argmax()] for half, score in parts])
            cells = [f"{chosen[n].mean():.1f}" for n in BUDGETS]
            print("| " + " | ".join([dataset, algo, str(len(scores)), *cells, f"{best:.1f}"]) + " |")
            curves[algo] = (range(len(chosen)), chosen.mean(axis=1), *np.percentile(chosen, [5, 95], axis=1))
        title = f"{dataset}: score of the chosen policy in other episodes. Mean, and 90 % of the trials"
        labels = {"title": title, "xlabel": "evaluation episodes", "ylabel": "score"}
        ticks = {"xscale": "symlog", "xticks": BUDGETS, "xticklabels": BUDGETS}
        draw_panels(curves, out / f"selection_{short(dataset)}.png", "", **labels, **ticks)


# --- Dataset cards ---------------------------------------------------------------------------------------


def write_card(dataset_id: str, out: Path):
    """DATASET.md and DATASET.png, the histogram of its returns, from the dataset in Minari's folder."""
    import minari

    try:
        dataset = minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise SystemExit(f"{dataset_id} is not in Minari's folder: a run on it builds or downloads it.") from error
    about, name = dataset.storage.metadata, short(dataset_id)
    # Play data go on after a terminal row: it ends an episode only where it is the last one
    episodes = [
        (e.rewards.sum(), len(e.rewards), e.terminations[-1], e.terminations[:-1].sum())
        for e in dataset.iterate_episodes()
    ]
    returns, lengths, terminated, within = map(np.array, zip(*episodes, strict=True))
    quantiles = ", ".join(f"{q:.4g}" for q in np.percentile(returns, [0, 5, 25, 50, 75, 95, 100]))
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    task = json.loads(about.get("eval_env_spec") or about.get("env_spec") or "null")
    rows = {
        "made by": f"{about.get('algorithm_name', 'not recorded')} ({about.get('code_permalink', 'no link to code')})",
        "size": f"{len(returns):,} episodes, {lengths.sum():,} transitions, {about.get('dataset_size', '?')} MB",
        "episode length": f"{spread(lengths)}, median {np.median(lengths):.0f}",
        "ends": f"{terminated.sum():,} terminated, {(~terminated).sum():,} only cut off",
        **({"terminal rows within episodes": f"{within.sum():,}"} if within.any() else {}),
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
    readme = out / "README.md"
    if readme.exists():
        readme.write_text(fill(readme.read_text(), "cards", list_of_cards(out), readme))


def list_of_cards(folder: Path) -> str:
    """Markdown: a row for each card in the folder, with what stands in it."""
    lines = ["| dataset | episodes, transitions | episode return |", "| --- | --- | --- |"]
    for card in sorted(folder.glob("*-v*.md")):
        cells = dict(re.findall(r"^\| (size|episode return) \| (.*) \|$", card.read_text(), flags=re.MULTILINE))
        size, returns = cells["size"].rpartition(", ")[0], cells["episode return"].partition(" (")[0]
        lines.append(f"| [{card.stem}]({card.name}) | {size} | {returns} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
