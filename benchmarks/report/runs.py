"""Result files: the run folders below a folder, and what went wrong in them."""

import hashlib
import json
import os
import re
import urllib.parse
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from plot import read_json, read_lines, read_scores  # benchmarks/plot.py

SUMMARY = {"algo": str, "dataset": str, "num_updates": int, "score_kind": str, "score_per_seed": list, "returns": list}
NOT_SWEPT = {"seed", "num_seeds", "out", "grid", "data"}  # of config.json: in these, runs of one sweep may differ


class Run(NamedTuple):
    method: str  # name of its folder: an algorithm, or a variant of one
    algo: str
    dataset: str  # with @ and what tells its data or its scale apart, where one name has several
    place: str  # its folder, below that of the results
    scores: np.ndarray  # (seeds,) of the last evaluation; NaN where there is none. In a grid, a row for each run
    summary: dict
    config: dict
    values: np.ndarray  # (seeds, 2): its believed and true value; (0, 2) of a method without a Q-function
    steps: np.ndarray  # (evaluations,)
    curve: np.ndarray  # (seeds, evaluations) scores
    digest: str  # of its files: a picture keeps those of the runs that it shows
    more: tuple[str, ...] = ()  # folders of the same setting with other seeds, which are in these arrays

    @property
    def diverged(self) -> np.ndarray:
        """(seeds,) bool. Older results do not say it: False."""
        return np.array(self.summary.get("diverged") or [False] * len(self.scores), bool)


class Failure(NamedTuple):
    method: str
    algo: str
    dataset: str
    reason: str
    refused: bool  # the algorithm does not take the dataset's actions: nothing is wrong


class Sweep(NamedTuple):
    """Runs that differ in some fields of their configuration, and in nothing else."""

    name: str  # of its cells, without their values
    algo: str
    dataset: str
    fields: list[str]
    points: dict[tuple, tuple]  # values of the fields, as JSON -> (scores (seeds,), diverged (seeds,)), in order
    kind: str  # of its scores
    runs: list[Run]


class Results(NamedTuple):
    runs: list[Run]  # finished, scored and of one setting, sorted by dataset and method
    failures: list[Failure]
    sweeps: list[Sweep]


def read_results(folder: Path) -> Results:
    """All that is below a folder. What cannot be read or shown costs a printed line."""
    found = []
    for file in sorted(folder.rglob("summary.json")):
        try:
            found.append(read_run(file.parent, folder))
        except (Exception, SystemExit) as error:  # torn, foreign or incomplete, each in its own way
            print(f"{file.parent} cannot be read ({type(error).__name__}: {error}): it is in no table.")
    failures = read_failures(folder)
    found = apart(with_more_seeds(found))
    sweeps = find_sweeps(found)
    runs = []
    for run in found:
        place, count = folder / run.place, sum(run.diverged)
        if is_grid(run):
            continue  # it is in the table of its sweep, and in no other
        if not np.isnan(run.scores).any():
            runs.append(run)
        elif count:
            reason = f"{count} of {len(run.scores)} runs diverged"
            failures.append(Failure(run.method, run.algo, run.dataset, reason, False))
        else:
            print(f"{place} was not scored ({run.summary['score_kind']}): it is in no table.")
    if not (runs or sweeps or failures):
        open_runs = [file for file in folder.rglob("config.json") if not (file.parent / "summary.json").exists()]
        unfinished = f"; {len(open_runs)} have begun, and their own command goes on with them" if open_runs else ""
        unscored = ", and those finished have no scores: benchmarks/plot.py draws their losses" if found else ""
        raise SystemExit(f"{folder} holds no finished run with scores{unscored}{unfinished}.")
    return Results(sorted(runs, key=lambda run: (run.dataset, run.method)), failures, sweeps)


def read_runs(folder: Path) -> list[Run]:
    return read_results(folder).runs


def read_run(run: Path, folder: Path) -> Run:
    """Raises where the folder's files are incomplete or contradict each other."""
    summary, lines = read_json(run / "summary.json", SUMMARY), read_lines(run)
    config = read_json(run / "config.json", {"config": dict})["config"]
    scores = np.array(summary["score_per_seed"], float)
    per_run = {name: summary[name] for name in ("returns", "seeds", "grid", "diverged") if summary.get(name)}
    if scores.ndim != 1 or not len(scores) or any(len(column) != len(scores) for column in per_run.values()):
        raise ValueError(f"summary.json has not one of score_per_seed, {', '.join(per_run)} for each run")
    for name in ("algo", "dataset"):
        if config.get(name) != summary[name]:
            raise ValueError(f"its {name} is {config.get(name)} in config.json and {summary[name]} in summary.json")
    last = [line for line in lines if line["step"] == lines[-1]["step"] and "believed_value" in line]
    values = np.array([[line["believed_value"], line["true_value"]] for line in last], float).reshape(-1, 2)
    steps, curve = read_scores(run)
    if not np.array_equal(curve[:, -1], scores, equal_nan=True):
        raise ValueError("metrics.jsonl does not end with the scores of summary.json")
    digest = hashlib.sha256((run / "summary.json").read_bytes() + (run / "metrics.jsonl").read_bytes()).hexdigest()
    place, algo, dataset = run.relative_to(folder).as_posix(), summary["algo"], summary["dataset"]
    method = own_place(place, dataset).name or algo
    return Run(method, algo, dataset, place, scores, summary, config, values, steps, curve, digest)


def read_failures(folder: Path) -> list[Failure]:
    """The cells that failed below a folder, as benchmarks/sweep.py records them."""
    failures = []
    for file in sorted(folder.rglob("failed.json")):
        try:
            cell = read_json(file, {"algo": str, "config": dict, "reason": str})
            refused = re.search("needs (discrete|continuous) actions", cell["reason"]) is not None
            dataset = cell["config"]["dataset"]
            method = own_place(file.parent.relative_to(folder).as_posix(), dataset).name or cell["algo"]
            failures.append(Failure(method, cell["algo"], dataset, cell["reason"], refused))
        except Exception as error:  # torn or foreign
            print(f"{file} cannot be read ({type(error).__name__}: {error}): it is in no table.")
    return failures


def short(dataset_id: str) -> str:
    """A dataset's name as a file or a column is called."""
    return dataset_id.removeprefix("stitch/").replace("/", "-")


def join(folder: str, name: str) -> str:
    """A relative link."""
    return urllib.parse.quote(os.path.normpath(f"{folder}/{name}"), safe="/,=@")


def spread(counts):
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def own_place(place: str, dataset: str) -> Path:
    """A folder's path without the part that is the dataset's name: DATASET/METHOD and METHOD/DATASET alike."""
    inner = f"/{place}/".replace(f"/{dataset}/", "/").replace(f"/{dataset.removeprefix('stitch/')}/", "/")
    return Path(inner.strip("/"))


def is_grid(run: Run) -> bool:
    return len({json.dumps(point, sort_keys=True) for point in run.summary.get("grid") or [{}]}) > 1


def comparable(runs: list[Run], failures: list[Failure]) -> tuple[list[str], dict[str, list[np.ndarray]]]:
    """What aggregates are over: the datasets, and for each method its scores on each of them, [(seeds,)].

    These are the datasets with normalised scores that two thirds of the methods or more take (some take only discrete
    actions, more take only continuous ones), and the methods that have all of them. A cell that failed leaves its
    method out, and not its dataset. Of one name with several data or scales (runs.apart) none is among them.
    """
    methods = sorted({run.method for run in runs})
    normalised = {run.dataset for run in runs if run.summary["score_kind"].startswith("normalised")}
    normalised = {dataset for dataset in normalised if "@" not in dataset}
    taken = [*runs, *(failure for failure in failures if not failure.refused and failure.method in methods)]
    count = Counter(dataset for _, dataset in {(x.method, x.dataset) for x in taken} if dataset in normalised)
    datasets = sorted(dataset for dataset in count if count[dataset] >= 2 / 3 * len(methods))
    rows = {m: [run.scores for run in runs if run.method == m and run.dataset in datasets] for m in methods}
    return datasets, {method: row for method, row in rows.items() if datasets and len(row) == len(datasets)}


# --- What is the same, and what must not be taken for it ---------------------------------------------------


def with_more_seeds(found: list[Run]) -> list[Run]:
    """Cells of one setting, on the same data, whose seeds are others, are one run with all of these seeds."""
    groups = {}
    for run in found:
        # a field that is None is not used: an older run of the same setting may not have it
        setting = {
            field: value
            for field, value in run.config.items()
            if value is not None and field not in ("seed", "num_seeds", "out")
        }
        what = run.method, run.dataset, scale_of(run), run.steps.tolist(), setting
        groups.setdefault(json.dumps(what, sort_keys=True), []).append(run)
    return [run for runs in groups.values() for run in ([together(runs)] if apart_in_seeds(runs) else runs)]


def apart_in_seeds(runs: list[Run]) -> bool:
    seeds = [json.dumps(seed) for run in runs for seed in run.summary.get("seeds") or [None, None]]  # older: not said
    return len(set(seeds)) == len(seeds) and not any(is_grid(run) for run in runs)


def together(runs: list[Run]) -> Run:
    """One run of several; its folder is the one with the fewest parts, and the others' are in `more`."""
    runs = sorted(runs, key=lambda run: (run.place.count("/"), run.place))
    if len(runs) == 1:
        return runs[0]
    arrays = {name: np.concatenate([getattr(run, name) for run in runs]) for name in ("scores", "values", "curve")}
    lists = {name: [x for run in runs for x in run.summary[name]] for name in ("returns", "seeds", "score_per_seed")}
    diverged = [bool(x) for run in runs for x in run.diverged]
    summary = runs[0].summary | lists | {"diverged": diverged, "grid": [{}] * len(diverged)}
    digest = hashlib.sha256("".join(run.digest for run in runs).encode()).hexdigest()
    return runs[0]._replace(**arrays, summary=summary, digest=digest, more=tuple(run.place for run in runs[1:]))


def apart(found: list[Run]) -> list[Run]:
    """Runs on different data, or of different scores, under one dataset's name are on datasets of their own; runs of
    one method on one dataset, and algorithms under one method's name, are methods of their own."""
    for tell in (data_of, scale_of):
        variants = {run.dataset: {tell(x) for x in found if x.dataset == run.dataset} - {None} for run in found}
        for dataset, several in variants.items():
            if len(several) > 1:
                print(f"{dataset}: not pooled, each in a column of its own: {', '.join(sorted(several))}.")
        found = [
            run._replace(dataset=f"{run.dataset}@{tell(run) or 'unknown'}") if len(variants[run.dataset]) > 1 else run
            for run in found
        ]
    count = Counter((run.method, run.dataset) for run in found)
    twice = {method for (method, _), times in count.items() if times > 1}
    names = {method: {run.algo for run in found if run.method == method} for method in {run.method for run in found}}
    twice |= {method for method, algos in names.items() if len(algos) > 1}
    named = [
        run._replace(method=str(own_place(run.place, run.summary["dataset"])) if run.method in twice else run.method)
        for run in found
    ]
    count = Counter((run.method, run.dataset) for run in named)
    return [run._replace(method=run.place) if count[run.method, run.dataset] > 1 else run for run in named]


def data_of(run: Run) -> str | None:
    """Which data, by their fingerprint in config.json. Older results have none: they pass for the others' data."""
    data = run.config.get("data")
    return f"data-{hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:6]}" if data else None


def scale_of(run: Run) -> str | None:
    """Which scores, if any; an exact one is on the same scale as one of episodes."""
    kind = run.summary["score_kind"].removesuffix(", exact")
    return None if np.isnan(run.scores).all() else re.sub(r"\W+", "-", kind)


def find_sweeps(found: list[Run]) -> list[Sweep]:
    """Cells of one folder, algorithm and dataset whose names differ only after a comma, as benchmarks/sweep.py names
    them; and grids, each of which has several settings by itself."""
    groups = {}
    for run in found:
        parent, name = Path(run.place).parent.as_posix(), Path(run.place).name.partition(",")[0]
        groups.setdefault((parent, name, run.algo, run.dataset), []).append(run)
    sweeps = []
    for (parent, name, algo, dataset), runs in groups.items():
        texts = [{field: json.dumps(value) for field, value in run.config.items()} for run in runs]
        candidates = list(dict.fromkeys(field for text in texts for field in text if field not in NOT_SWEPT))
        differ = [field for field in candidates if len({text.get(field) for text in texts}) > 1]
        swept = list(dict.fromkeys(field for run in runs for point in run.summary.get("grid") or [] for field in point))
        fields = list(dict.fromkeys([*differ, *swept]))
        at = {}  # settings -> {seed: (score, diverged)}: a seed that two cells trained at one point counts once
        for run in runs:
            grid = run.summary.get("grid") or [{}] * len(run.scores)
            seeds = run.summary.get("seeds") or range(len(run.scores))
            for point, seed, *result in zip(grid, seeds, run.scores, run.diverged, strict=True):
                values = [point.get(field, run.config.get(field)) for field in fields]
                values = [float(v) if field in swept else v for field, v in zip(fields, values, strict=True)]
                at.setdefault(tuple(map(json.dumps, values)), {})[seed] = result
        if len(at) > 1:
            points = {
                point: tuple(map(np.array, zip(*at[point].values(), strict=True))) for point in sorted(at, key=in_order)
            }
            name = "/".join(part for part in (parent, name or algo) if part != ".")
            scored = [run for run in runs if scale_of(run)] or runs
            sweeps.append(Sweep(name, algo, dataset, fields, points, scored[0].summary["score_kind"], runs))
    return sweeps


def in_order(point: tuple) -> list:
    """Numbers by size, then what is none."""
    values = [json.loads(text) for text in point]
    numeric = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    return [(0, value, "") if number else (1, 0, str(value)) for value, number in zip(values, numeric, strict=True)]
