"""README's numbers are those of the committed result files, and its commands and links exist."""

import importlib.util
import json
import pathlib
import re
import statistics
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import report  # noqa: E402

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
UMAZE = RESULTS / "pointmaze-umaze-v0"


def load_speed():
    spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_scores_are_those_of_the_result_files():
    """Every row of the main job's table: its score is mean ± standard deviation of the run that it links."""
    rows = re.findall(r"^\| \[`\w+`\].*$", README, flags=re.MULTILINE)
    assert len(rows) == len([p for p in UMAZE.iterdir() if p.is_dir()]) > 0
    for row in rows:
        (folder,) = re.findall(r"\]\((benchmarks/results/[^)]*)\)", row)
        summary = json.loads((ROOT / folder / "summary.json").read_text())
        assert f"[{summary['score_mean']:.1f} ± {summary['score_std']:.1f}]" in row, row
        assert f"algos/{summary['algo']}.md" in row and summary["num_updates"] == 6000
        assert "dirty" not in summary["commit"] and len(summary["seeds"]) == 3


def test_every_algorithm_is_in_the_table():
    for page in (ROOT / "algos").glob("*.md"):
        assert f"[`{page.stem}.py`](algos/{page.name})" in README, page.stem


def test_speed_tables_are_those_of_the_result_files():
    speed = load_speed()
    files = sorted(RESULTS.glob("speed-*.json"))
    assert files
    for file in files:
        report = json.loads(file.read_text())
        assert speed.table(report) in README, f"README does not show {file.name} as it is"
        assert "dirty" not in report["commit"]


@pytest.mark.parametrize("file", ["speed-ensembles-cpu", "speed-ensembles-small-cpu"])
def test_costs_per_critic_are_those_of_the_result_files(file):
    """Milliseconds of an update / critics, in the order of the table: 'a, b, c, d (SAC-N) and e, f, g, h (EDAC)'."""
    shown = {}
    for row in json.loads((RESULTS / f"{file}.json").read_text())["results"]:
        milliseconds = 1000 / statistics.median(row["updates_per_second"]) / row["setting"]["num_critics"]
        shown.setdefault(row["algo"], []).append(f"{milliseconds:.2g}")
    sac_n, edac = ", ".join(shown["sac_n"]), ", ".join(shown["edac"])
    assert f"{sac_n} (SAC-N) and {edac} (EDAC)" in " ".join(README.split())


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_default_run_reaches_the_required_score_and_cloning_does_not():
    score = {p.name: json.loads((p / "summary.json").read_text())["score_mean"] for p in UMAZE.iterdir() if p.is_dir()}
    assert score["iql"] >= 90 and score["bc"] <= 20


HOPPER = ["hopper-medium-expert-100k-v0", "hopper-medium-replay-100k-v0"]


@pytest.fixture(scope="module")
def quick():
    """{(dataset, method): run} of the quick protocol."""
    return {tuple(run.place.split("/")): run for run in report.read_runs(RESULTS / "quick")}


@pytest.mark.parametrize(
    "method, baseline, dataset, margin",
    [
        ("cql_discrete", "dqn", "cartpole-mixed-v0", 40),
        *(("cql", "sac", dataset, 20) for dataset in [*HOPPER, "pointmaze-umaze-v0"]),
    ],
)
def test_the_conservative_term_beats_what_it_is_added_to(quick, method, baseline, dataset, margin):
    """The worst seed of CQL is above the best one of SAC or DQN, by so many points of the score."""
    assert quick[dataset, method].scores.min() >= quick[dataset, baseline].scores.max() + margin


@pytest.mark.parametrize("dataset", HOPPER)
def test_diverse_critics_believe_less_but_small_ensembles_do_not_reach_cloning(quick, dataset):
    """EDAC's page: five diverse critics believe a small multiple of what is true, ten plain ones 60 to 300 times it."""
    believed, true = (
        np.array([quick[dataset, m].values.mean(axis=0) for m in ("edac", "sac_n")])[:, i] for i in (0, 1)
    )
    assert believed[0] <= 3 * true[0] and believed[1] >= 60 * true[1]
    assert all(quick[dataset, m].scores.max() < quick[dataset, "bc"].scores.min() for m in ("edac", "sac_n"))


def test_what_cqls_page_says_of_medium_expert(quick):
    page = " ".join((ROOT / "algos" / "cql.md").read_text().split())
    run, bc = (quick[HOPPER[0], method] for method in ("cql", "bc"))
    lines = (RESULTS / "quick" / HOPPER[0] / "cql" / "metrics.jsonl").read_text().splitlines()
    first = np.mean([line["score"] for line in map(json.loads, lines) if line["step"] == 2000])
    last = run.scores.mean()
    assert f"({last:.1f} and {bc.scores.mean():.1f})" in page
    assert f"from {first:.1f} after 2,000 updates to {last:.1f} after 6,000" in page
    (weight_5,) = (run for run in report.read_runs(RESULTS / "trials" / "weight-5") if run.place == f"{HOPPER[0]}/cql")
    assert f"({', '.join(f'{score:.1f}' for score in weight_5.scores)})" in page


def test_trials_on_the_pages_are_those_of_the_result_files():
    """A page's cell [SCORE, believes B, true T](.../trials/...): means over the seeds of the last evaluation."""
    runs = {run.place: run for run in report.read_runs(RESULTS / "trials")}
    cells = [
        cell
        for page in (ROOT / "algos").glob("*.md")
        for cell in re.findall(r"\[([^]]*)\]\(\.\./benchmarks/results/trials/([^)]*)\)", page.read_text())
    ]
    assert {place for _, place in cells} == runs.keys()  # none is left unshown
    for shown, place in cells:
        run, (believed, true) = runs[place], runs[place].values.mean(axis=0)
        score = f"{run.scores.mean():.1f}"
        assert shown == f"{score}, believes {report.number(believed)}, true {report.number(true)}", place
        assert "dirty" not in run.summary["commit"]
