"""README's numbers are those of the committed result files, and its commands and links exist."""

import importlib.util
import json
import pathlib
import re
import sys

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
        mark = f"<!-- report:speed:{file.stem.removeprefix('speed-')}"
        shown = f"{mark}:begin -->\n{speed.table(report)}\n{mark}:end -->"
        assert shown in README, f"README does not show {file.name} as it is: python benchmarks/report.py"
        assert "dirty" not in report["commit"]


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r'src="([^"]+)"', README):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_default_run_reaches_the_required_score_and_cloning_does_not():
    score = {p.name: json.loads((p / "summary.json").read_text())["score_mean"] for p in UMAZE.iterdir() if p.is_dir()}
    assert score["iql"] >= 90 and score["bc"] <= 20


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
