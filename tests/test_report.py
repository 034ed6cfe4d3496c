"""benchmarks/report.py: its estimators and its model selection have known answers; its tables are the result files."""

import json
import pathlib
import resource
import shutil
import sys
import tomllib
import unittest.mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import tyro

from common import recipes
from common.environments import D4RL_REFERENCE_SCORES
from common.recipes import driving, manipulation, pointmaze, storage, traffic, traffic_env

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import report  # noqa: E402
from report import cards, estimators, pictures, rules, runs, selection, standard, sweeps, tables  # noqa: E402

# (datasets, seeds) of two methods
A = list(np.array([[40, 55, 45, 70, 60], [10, 20, 0, 35, 5], [90, 80, 85, 95, 100]], float))
B = list(np.array([[50, 30, 45, 20, 65], [10, 15, 20, 25, 30], [60, 90, 75, 85, 70]], float))


def make_run(folder, dataset, scores, algo="iql", kind="normalised by the dataset's reference scores", **fields):
    """A run folder as main leaves it: two evaluations of two episodes each, of which the last has these scores."""
    folder.mkdir(parents=True)
    returns = [[score and score / 100] * 2 for score in scores]
    lines = [
        {"step": step, "seed": seed, "score": score and score * step / 500, "returns": returns[seed]}
        for step in (250, 500)
        for seed, score in enumerate(scores)
    ]
    summary = {"algo": algo, "dataset": dataset, "num_updates": 500, "seeds": list(range(len(scores)))}
    summary |= {"returns": returns, "score_per_seed": list(scores), "score_kind": kind, "grid": [{}] * len(scores)}
    (folder / "config.json").write_text(json.dumps({"config": {"algo": algo, "dataset": dataset}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(summary | fields))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with results of two algorithms and a variant, and the marks in README.md and one page."""
    results = tmp_path / "benchmarks" / "results" / "quick"
    make_run(results / "maze-v0" / "iql", "stitch/maze-v0", [80.0, 90.0, 100.0])
    make_run(results / "maze-v0" / "bc", "stitch/maze-v0", [10.0, 20.0, 0.0], "bc")
    make_run(results / "maze-v0" / "bc-top-10", "stitch/maze-v0", [30.0, 50.0, 40.0], "bc")
    make_run(results / "D4RL" / "door" / "human-v2" / "iql", "D4RL/door/human-v2", [60.0, 50.0, 70.0])
    make_run(results / "D4RL" / "door" / "human-v2" / "bc", "D4RL/door/human-v2", [5.0, 5.0, 5.0], "bc")
    make_run(results / "own-v0" / "iql", "own-v0", [1500.0, 2500.0, 2000.0], kind="raw return")
    marked = "above\n<!-- report:quick:begin -->\n<!-- report:quick:end -->\nbelow\n"
    (tmp_path / "algos").mkdir()
    (tmp_path / "README.md").write_text(marked)
    (tmp_path / "algos" / "bc.md").write_text(marked)
    (tmp_path / "algos" / "iql.md").write_text("no marks\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setitem(report.STYLE, "figure.dpi", 20)  # small pictures: nobody looks at them
    with plt.rc_context():
        yield tmp_path


def write_tables(root):
    """What a report writes, without its pictures."""
    folder = root / "benchmarks" / "results" / "quick"
    found = runs.read_results(folder)
    tables.write_tables(root, "quick", found.runs, found.failures, check=False)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Estimators -----------------------------------------------------------------------------------------


def test_estimators_and_intervals_are_those_of_rliable():
    """rliable 1.2.0 with pandas 2, on the transposed arrays: its point estimates, and its intervals from 20,000 samples
    or more, which are themselves only good to about one run's share."""
    np.testing.assert_allclose([estimators.iqm(A), estimators.iqm(B)], [54.444444, 43.888889], rtol=1e-6)
    np.testing.assert_allclose([estimators.mean(A), estimators.mean(B)], [52.666667, 46.0], rtol=1e-6)
    np.testing.assert_allclose(estimators.interval(estimators.iqm, A), [47.8, 60.6], atol=0.7)
    np.testing.assert_allclose(estimators.interval(estimators.iqm, B), [36.1, 52.2], atol=0.7)
    np.testing.assert_allclose(estimators.interval(estimators.mean, A), [47.7, 58.0], atol=0.4)
    np.testing.assert_allclose(estimators.improvement(A, B), 0.62)
    np.testing.assert_allclose(estimators.interval(estimators.improvement, A, B), [0.433, 0.8], atol=0.02)
    levels = np.array([20.0, 50.0, 85.0])  # each the score of a run, which is not above it
    np.testing.assert_allclose(estimators.profile(A, levels), [0.733333, 0.533333, 0.2], rtol=1e-5)
    shares = estimators.interval(lambda row: estimators.profile(row, levels), A)
    np.testing.assert_allclose(shares, [[0.667, 0.4, 0.067], [0.867, 0.667, 0.333]], atol=0.001)


def test_interval_is_stratified():
    """Each dataset keeps its seeds: where those agree, there is no spread, however far apart the datasets are."""
    row = [np.zeros(4), np.full(3, 100.0)]
    np.testing.assert_allclose(estimators.interval(estimators.mean, row), 50)


def test_interval_is_the_same_with_every_numpy():
    row = [np.array([2.0, 3, 5, 7, 11, 13, 17, 19, 23]) ** 2]
    np.testing.assert_allclose(estimators.interval(estimators.mean, row), [69.555556, 289.008333], rtol=1e-7)


def test_improvement_counts_a_tie_as_half():
    row = [np.array([1.0, 2.0]), np.array([3.0])]
    assert estimators.improvement(row, row) == 0.5
    assert estimators.improvement([np.array([1.0, 3.0])], [np.array([2.0, 2.0, 2.0])]) == 0.5


def test_datasets_weigh_the_same_whatever_their_numbers_of_seeds():
    row = [np.zeros(3), np.full(12, 100.0)]
    assert estimators.iqm(row) == estimators.mean(row) == 50
    assert estimators.profile(row, np.array([50.0])) == 0.5
    assert (
        estimators.iqm([np.array([0.0, 30.0]), np.array([60.0, 60.0, 90.0])]) == 45
    )  # of 0 0 0 30 30 30 60 60 60 60 90 90


def test_one_seed_has_no_interval():
    one, two = [np.array([12.34])], [np.array([1.0, 2.0])]
    assert estimators.with_interval(estimators.mean, one) == "12.3"
    assert np.isnan(estimators.interval(estimators.improvement, one, two)).all()
    assert np.isnan(estimators.interval(estimators.mean, [*one, *two])).all()


# --- Tables ----------------------------------------------------------------------------------------------


def test_table_shows_means_intervals_and_links(root):
    write_tables(root)
    readme = (root / "README.md").read_text()
    assert readme.startswith("above\n<!-- report:quick:begin -->\n| method |")
    (row,) = [line for line in readme.splitlines() if line.startswith("| [iql]")]
    cell = "[60.0](benchmarks/results/quick/D4RL/door/human-v2/iql) (50.0 to 70.0); published 3.3"
    assert row.startswith(f"| [iql](algos/iql.md) | {cell} |")
    assert "[90.0](benchmarks/results/quick/maze-v0/iql) (80.0 to 100.0) | 75.0 (" in row
    # 75: of 50 60 70 80 90 100 without the lowest and the highest. The raw returns are not in it
    assert "| [2000.0](benchmarks/results/quick/own-v0/iql) (1500.0 to 2500.0) | [90.0]" in row
    (row,) = [line for line in readme.splitlines() if line.startswith("| [bc-top-10]")]
    assert row.startswith("| [bc-top-10](algos/bc.md) | not run | not run | [40.0]") and row.endswith(" | – |")
    assert "(2 episodes) after 500 updates: mean over 3 seeds" in readme
    assert " IQM: interquartile mean over D4RL-door-human-v2, maze-v0." in readme
    assert readme.endswith(f" Published: {tables.PUBLISHED['source']}.\n<!-- report:quick:end -->\nbelow\n")
    page = (root / "algos" / "bc.md").read_text()
    assert "[5.0](../benchmarks/results/quick/D4RL/door/human-v2/bc) (5.0 to 5.0); published 2.3 |" in page
    assert "| [bc](../algos/bc.md)" in page and "| [bc-top-10](../algos/bc.md)" in page and "iql" not in page
    assert "own-v0" not in page  # no run of bc
    found = runs.read_runs(root / "benchmarks" / "results" / "quick")
    assert "not comparable" in tables.table([run for run in found if run.dataset == "stitch/maze-v0"], [], ".")
    assert tables.table(found, [], ".", "cql") == "No run yet."
    for link in [part.split(")")[0] for part in readme.split("](")[1:]]:
        assert (root / link).is_dir() or link.endswith((".md", ".png")), link


def test_a_page_shows_what_the_critic_believes_and_what_is_true(root):
    """Of the last evaluation of each seed; README does not show it, nor a page of a method without a critic."""
    run = root / "benchmarks" / "results" / "quick" / "maze-v0" / "iql"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [{"believed_value": 1000.0 * line["step"] + line["seed"], "true_value": 2.0} for line in lines]
    text = "".join(json.dumps(line | value) + "\n" for line, value in zip(lines, values, strict=True))
    (run / "metrics.jsonl").write_text(text)
    found = runs.read_runs(root / "benchmarks" / "results" / "quick")
    page = tables.table(found, [], ".", "iql")
    assert "| believed − true value | – | – | +499,999 (2) | – |" in page and "less what the policy gets" in page
    assert all("believe" not in text for text in (tables.table(found, [], "."), tables.table(found, [], ".", "bc")))


def test_runs_that_go_on_on_line_have_a_table_of_their_scores_along_the_way(root):
    """Two seeds: 1,000 updates and 20,000 steps of one method; no updates and 5,000 steps of the other."""
    folder = root / "benchmarks" / "results" / "finetune"

    def make(method, switch, steps, scores):
        run = folder / "maze-v0" / method
        make_run(run, "stitch/maze-v0", [scores(steps), scores(steps) + 10.0], method)
        config = {"algo": method, "dataset": "stitch/maze-v0", "num_updates": switch, "online_steps": steps}
        (run / "config.json").write_text(json.dumps({"config": config}))
        lines = []
        for step in range(1000, switch + steps + 1, 1000):
            for seed in (0, 1):
                line = {"step": step, "seed": seed, "score": scores(step - switch) + 10.0 * seed, "returns": [0.0]}
                lines.append(json.dumps(line | {"online_steps": step - switch, "regret": 50.0 + 2 * seed}))
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    make("iql", 1000, 20_000, lambda n: 40.0 + n / 1000)
    make("bc", 0, 5000, lambda n: 80.0 + n / 1000)
    found = runs.read_results(folder)
    marked = "<!-- report:finetune:begin -->\n<!-- report:finetune:end -->\n"
    (root / "benchmarks" / "online.md").write_text(marked)
    (root / "algos" / "iql.md").write_text(marked)
    tables.write_tables(root, "finetune", found.runs, found.failures, check=False)
    rows = [line for line in (root / "benchmarks" / "online.md").read_text().splitlines() if line.startswith("| maze")]
    cells = [[cell.split("](")[0].partition(" (")[0].strip("[ ") for cell in row.split("|")[2:-1]] for row in rows]
    assert cells[0] == ["bc", "–", "86.0", "90.0", "–", "51"], "85 + 5 after 5,000 steps: first"
    assert cells[1] == ["iql", "45.0", "46.0", "50.0", "65.0", "51"]
    page = (root / "algos" / "iql.md").read_text()
    assert "[iql](../algos/iql.md)" in page and "| [bc]" not in page and "after 1,000 updates on the data" in page
    report.draw(found, folder)
    assert not report.stale_pictures(found, folder)


def test_numbers_have_three_digits_or_are_whole():
    shown = {1.23456: "1.23", -1.23456: "-1.23", 123.4: "123", -499999.4: "-499,999", 1e6: "1e+06", 99.96: "100"}
    assert {x: tables.number(x) for x in shown} == shown and tables.number(2.0, "+") == "+2"


def test_a_second_report_changes_nothing(root):
    report.main(report.Options())
    first = files(root)
    drawn = {path.name for path in first if path.suffix == ".png"}
    curves = {f"learning_curves_{name}.png" for name in ("maze-v0", "D4RL-door-human-v2", "own-v0")}
    assert drawn == curves | {"iqm.png", "performance_profiles.png", "probability_of_improvement.png"}
    assert not any(b"matplotlib" in content for path, content in first.items() if path.suffix == ".png")  # its version
    report.main(report.Options())
    assert files(root) == first
    names = [part.split(")")[0] for part in (root / "README.md").read_text().split("](")]
    assert all((root / name).exists() for name in names if name.endswith(".png"))
    report.main(report.Options(check=True))


@pytest.mark.parametrize("page", ["README.md", "algos/bc.md"])
def test_check_fails_where_a_table_is_not_the_files_and_writes_nothing(root, page, monkeypatch):
    monkeypatch.setattr(report, "stale_pictures", lambda *_: [])  # a test of its own
    write_tables(root)
    text = (root / page).read_text()
    (root / page).write_text(text.replace("[5.0]", "[6.0]"))
    before = files(root)
    with pytest.raises(SystemExit, match=page):
        report.main(report.Options(check=True))
    assert files(root) == before
    (root / page).write_text(text.replace("above", "other words outside the marks"))
    report.main(report.Options(check=True))
    shutil.rmtree(root / "benchmarks" / "results" / "quick" / "maze-v0" / "bc")
    with pytest.raises(SystemExit, match=page):
        report.main(report.Options(check=True))


@pytest.mark.parametrize("text", ["", "<!-- report:quick:end -->\n<!-- report:quick:begin -->\n"])
def test_readme_without_its_marks_is_an_error(root, text):
    (root / "README.md").write_text(text)
    with pytest.raises(SystemExit, match="report:quick:begin"):
        report.main(report.Options())


def test_what_is_no_row_of_the_table(root, tmp_path, capsys):
    """A grid, a run without scores and one that is not finished."""
    results = root / "benchmarks" / "results" / "quick"
    make_run(results / "maze-v0" / "grid", "stitch/maze-v0", [1.0, 2.0], grid=[{"beta": 1.0}, {"beta": 3.0}])
    make_run(results / "maze-v0" / "single", "stitch/maze-v0", [1.0, 2.0], grid=[{"beta": 1.0}] * 2)
    make_run(results / "maze-v0" / "blind", "stitch/maze-v0", [float("nan")] * 2)
    make_run(results / "maze-v0" / "unfinished", "stitch/maze-v0", [1.0, 2.0])
    (results / "maze-v0" / "unfinished" / "summary.json").unlink()
    methods = {run.method for run in runs.read_runs(results)}
    assert methods == {"iql", "bc", "bc-top-10", "single"}
    said = capsys.readouterr().out
    assert "blind was not scored" in said
    with pytest.raises(SystemExit, match="no finished run"):
        runs.read_runs(tmp_path / "nothing")


def test_foot_with_one_seed_promises_no_interval(tmp_path):
    make_run(tmp_path / "maze-v0" / "iql", "stitch/maze-v0", [80.0])
    shown = tables.table(runs.read_runs(tmp_path), [], ".")
    assert "updates: 1 seed, of whose spread nothing is known." in shown and "interval" not in shown


def test_foot_says_how_exact_an_exact_evaluation_is(tmp_path):
    make_run(
        tmp_path / "iql", "stitch/icu-v0", [80.0, 90.0], kind="normalised by the dataset's reference scores, exact"
    )
    shown = tables.table(runs.read_runs(tmp_path), [], ".")
    assert "On icu-v0 no episode is played" in shown and "the frequencies of 2 draws in each state" in shown


def test_published_scores_are_shown_only_beside_the_data_they_are_of(tmp_path):
    for dataset in ("D4RL/pen/human-v2", "mujoco/hopper/medium-v0", "stitch/maze-v0"):
        make_run(tmp_path / dataset / "iql", dataset, [60.0, 70.0])
        make_run(tmp_path / dataset / "dqn", dataset, [60.0, 70.0], "dqn")  # no published score
    found = runs.read_runs(tmp_path)
    shown = tables.table(found, [], ".")
    assert shown.count("; published") == 1 and "(60.0 to 70.0); published 78.5 |" in shown and "CORL" in shown
    assert "ublished" not in tables.table([run for run in found if run.dataset == "mujoco/hopper/medium-v0"], [], ".")


def test_published_scores_are_of_methods_and_normalisations_that_are_ours():
    protocols = tomllib.loads((ROOT / "benchmarks" / "protocols.toml").read_text())
    for dataset, scores in tables.PUBLISHED["scores"].items():
        if "source" in scores:  # made anew by the source's own script: it must say what differs
            (protocol,) = (name for name in ("goals", "play", "hands") if dataset in protocols[name]["datasets"])
            assert "script" in scores["source"]
            assert scores.keys() - {"source"} <= protocols[protocol]["methods"].keys()
            continue
        assert any(dataset.startswith(prefix) for prefix in D4RL_REFERENCE_SCORES), dataset
        assert scores.keys() <= protocols["full"]["methods"].keys()


def test_a_dataset_s_own_source_stands_in_the_place_of_the_general_one(tmp_path):
    dataset = "stitch/ogbench-pointmaze-medium-stitch-200k-v0"
    make_run(tmp_path / dataset / "qrl", dataset, [60.0, 70.0], "qrl", kind="success, %, mean over 5 tasks")
    shown = tables.table(runs.read_runs(tmp_path), [], ".")
    assert "; published 80.0 |" in shown and shown.count("Published: OGBench") == 1 and "CORL" not in shown
    assert "not comparable, and not shown" not in shown


def fail(folder, dataset, reason, algo="cql"):
    folder.mkdir(parents=True)
    cell = {"name": folder.name, "algo": algo, "config": {"dataset": dataset}, "grid": {}, "reason": reason}
    (folder / "failed.json").write_text(json.dumps(cell))


def test_a_failed_cell_is_shown_and_costs_only_its_own_method_the_aggregates(root):
    results = root / "benchmarks" / "results" / "quick"
    make_run(results / "maze-v0" / "cql", "stitch/maze-v0", [1.0, 2.0, 3.0], "cql")
    fail(results / "D4RL" / "door" / "human-v2" / "cql", "D4RL/door/human-v2", "status -9: killed")
    fail(
        results / "own-v0" / "cql", "own-v0", "status 1: CQL needs continuous actions and this dataset's are discrete."
    )
    fail(
        results / "own-v0" / "sac", "own-v0", "status 1: SAC needs continuous actions and this dataset's are discrete."
    )
    write_tables(root)
    readme = (root / "README.md").read_text()
    (row,) = [line for line in readme.splitlines() if line.startswith("| [cql]")]
    assert row.startswith("| [cql](algos/cql.md) | failed | – | [2.0]") and row.endswith(" (1.0 to 3.0) | – |")
    assert "Failed: cql on D4RL-door-human-v2 (status -9: killed)." in readme and "needs continuous" not in readme
    assert "| [sac]" not in readme  # it takes none of these datasets
    # Three of four methods would do without the failure; two of four would not
    shutil.rmtree(results / "D4RL" / "door" / "human-v2" / "bc")
    datasets, rows = runs.comparable(runs.read_runs(results), runs.read_failures(results))
    assert datasets == ["stitch/maze-v0"]
    fail(results / "D4RL" / "door" / "human-v2" / "bc", "D4RL/door/human-v2", "status -9: killed", "bc")
    datasets, rows = runs.comparable(runs.read_runs(results), runs.read_failures(results))
    assert datasets == ["D4RL/door/human-v2", "stitch/maze-v0"] and rows.keys() == {"iql"}


def break_summary(run):
    (run / "summary.json").write_text((run / "summary.json").read_text()[:-20])


def break_metrics(run):
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-20])


def lose_metrics(run):
    (run / "metrics.jsonl").unlink()


def lose_a_line(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))


def lose_a_field(run, field="algo"):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({key: summary[key] for key in summary if key != field}))


def lose_the_returns(run):
    lose_a_field(run, "returns")


DAMAGES = [break_summary, break_metrics, lose_metrics, lose_a_line, lose_a_field, lose_the_returns]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_run_is_named_and_left_out(root, capsys, damage):
    results = root / "benchmarks" / "results" / "quick"
    damage(results / "maze-v0" / "bc")
    fail(results / "maze-v0" / "cql", "stitch/maze-v0", "")
    (results / "maze-v0" / "cql" / "failed.json").write_text("{")
    write_tables(root)
    said = capsys.readouterr().out
    assert "maze-v0/bc cannot be read" in said and "failed.json cannot be read" in said
    assert "maze-v0/bc)" not in (root / "README.md").read_text()


def test_speed_tables_stand_between_their_marks(root):
    results = root / "benchmarks" / "results"
    shutil.copy(ROOT / "benchmarks" / "results" / "speed-cpu.json", results / "speed-cpu.json")
    mark = "<!-- report:speed:cpu:{} -->\n"
    (root / "README.md").write_text(
        (root / "README.md").read_text() + mark.format("begin") + mark.format("end") + "end"
    )
    write_tables(root)
    readme = (root / "README.md").read_text()
    shown = readme.partition(mark.format("begin"))[2].partition("\n" + mark.format("end"))
    assert shown[0] == tables.speed.table(json.loads((results / "speed-cpu.json").read_text())) and shown[2] == "end"
    write_tables(root)
    assert (root / "README.md").read_text() == readme


def test_a_folder_of_ones_own_gets_its_report_in_it(root, tmp_path, monkeypatch):
    (root / "README.md").unlink()  # not asked for
    before = {path.name for path in tmp_path.iterdir()}
    shutil.move(root / "benchmarks" / "results" / "quick", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    report.main(report.Options("mine"))
    assert {path.name for path in tmp_path.iterdir()} == before | {"mine"}
    text = (tmp_path / "mine" / "report.md").read_text()
    assert "| [iql](../algos/iql.md) | [60.0](D4RL/door/human-v2/iql) (50.0 to 70.0)" in text
    targets = [part.split(")")[0] for part in text.split("](")[1:]]
    assert sum(target.endswith(".png") for target in targets) == 3 + 6  # of the columns, and shown
    pages = {"../algos/bc.md", "../algos/iql.md"}
    assert all((tmp_path / "mine" / target).exists() for target in targets) and pages < set(targets)
    first = files(tmp_path / "mine")
    report.main(report.Options(str(tmp_path / "mine"), check=True))
    assert files(tmp_path / "mine") == first


def test_aggregates_are_over_what_most_methods_have(root):
    results = root / "benchmarks" / "results" / "quick"
    make_run(results / "own-v0" / "bc", "own-v0", [1500.0, 2500.0, 2000.0], "bc", kind="raw return")
    for method in ("x", "y"):
        make_run(results / "maze-v0" / method, "stitch/maze-v0", [1.0, 2.0, 3.0])
        make_run(results / "D4RL" / "door" / "human-v2" / method, "D4RL/door/human-v2", [1.0, 2.0, 3.0])
    for method in ("bc", "x", "y"):  # three methods of five, where four have the door and five the maze
        make_run(results / "rare-v0" / method, "stitch/rare-v0", [1.0, 2.0, 3.0])
    datasets, rows = runs.comparable(runs.read_runs(results), [])
    assert datasets == ["D4RL/door/human-v2", "stitch/maze-v0"]
    assert rows.keys() == {"iql", "bc", "x", "y"}  # bc-top-10 lacks one
    np.testing.assert_array_equal(rows["bc"], [[5, 5, 5], [10, 20, 0]])


def test_committed_tables_are_those_of_the_committed_result_files():
    if (ROOT / "benchmarks" / "results" / "quick").exists():
        report.main(report.Options(check=True))
    else:
        between = (ROOT / "README.md").read_text().partition("<!-- report:quick:begin -->")[2]
        assert between.partition("<!-- report:quick:end -->")[0].strip() == ""


# --- The protocol `standard` ------------------------------------------------------------------------------


def make_standard_run(folder, dataset, curves, algo):
    """A run whose seeds have these scores at evaluation 1, 2, ..."""
    make_run(folder, dataset, [curve[-1] for curve in curves], algo)
    summary = json.loads((folder / "summary.json").read_text())
    lines = [
        {"step": 10 * (i + 1), "seed": seed, "score": float(score), "returns": [score / 100] * 2}
        for seed, curve in enumerate(curves)
        for i, score in enumerate(curve)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda x: x["step"]))
    )
    (folder / "summary.json").write_text(json.dumps(summary | {"num_updates": 10 * len(curves[0])}))


@pytest.fixture
def standard_runs(tmp_path):
    """Five methods on one dataset, where the last evaluation tells another order than the last five; one elsewhere."""
    hopper = "stitch/hopper-medium-expert-v1"
    last = {"bc": 0.0, "td3_bc": 90.0, "iql": 20.0, "rebrac": 80.0, "bc-top-10": 10.0}
    five = {"bc": 40.0, "td3_bc": 50.0, "iql": 70.0, "rebrac": 80.0, "bc-top-10": 60.0}  # with the last one
    for method, mean in five.items():
        four = (5 * mean - last[method]) / 4
        curves = [[1000.0, four + d, four + d, four + d, four + d, last[method] + d] for d in (-1.0, 0.0, 1.0)]
        algo = "bc" if method == "bc-top-10" else method
        make_standard_run(tmp_path / "hopper-medium-expert-v1" / method, hopper, curves, algo)
    maze = "stitch/pointmaze-medium-stitch-v0"
    make_standard_run(tmp_path / "pointmaze-medium-stitch-v0" / "iql", maze, [[5.0, 7.0], [7.0, 9.0]], "iql")
    return tmp_path


def rows_under(text, heading):
    table = text.partition(f"### {heading}\n\n")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_standard_page_shows_the_last_five_evaluations_the_last_one_and_what_is_published(standard_runs):
    found = runs.read_results(standard_runs)
    text = standard.page(found.runs, found.failures, "results/standard", "..", tables.PUBLISHED)
    assert text.startswith("**6 of 36 cells (9 methods on 4 datasets) are finished.**\n\n### hopper-medium-expert-v1\n")
    head = "| method | mean of the last five evaluations | last evaluation | (published on hopper-medium-expert-v2) |"
    assert head in text and "| method | mean of the last five evaluations | last evaluation |\n" in text
    shown = rows_under(text, "hopper-medium-expert-v1")
    assert [row[0] for row in shown] == [  # by the last five
        f"[{method}](../algos/{algo}.md)"
        for method, algo in (("rebrac",) * 2, ("iql",) * 2, ("bc-top-10", "bc"), ("td3_bc",) * 2, ("bc",) * 2)
    ]
    assert shown[1][1:] == [
        "[70.0](results/standard/hopper-medium-expert-v1/iql) (69.0 to 71.0)", "20.0 (19.0 to 21.0)", "(107.4)"
    ]  # fmt: skip
    # of a run with two evaluations, their mean
    assert rows_under(text, "pointmaze-medium-stitch-v0") == [
        [
            "[iql](../algos/iql.md)",
            "[7.0](results/standard/pointmaze-medium-stitch-v0/iql) (6.0 to 8.0)",
            "8.0 (7.0 to 9.0)",
        ]
    ]
    assert "Not run yet: awac, xql, cql, edac. Rank correlation" in text
    assert "v5 of Gymnasium and not v2 of Gym, and the published runs have 1,000,000 updates (EDAC: 3,000,000)" in text
    assert text.count("Rank correlation") == 1  # none of the maze: nothing is published there


def test_rank_correlation_has_known_answers():
    """1 - 6 sum d^2 / (n (n^2 - 1)) without ties; with ties, scipy 1.16's spearmanr."""
    assert standard.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert standard.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # differences 1, 1, 2, 1, 1: 1 - 6 * 8 / (5 * 24)
    assert standard.rank_correlation([1, 2, 3, 4, 5], [2, 1, 5, 3, 4]) == pytest.approx(0.6)
    # ranks 0, 1.5, 1.5, 3 and 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5)
    assert standard.rank_correlation([1, 4, 4, 9], [1, 2, 3, 4]) == pytest.approx(0.9**0.5)
    assert np.isnan(standard.rank_correlation([1, 1], [1, 2]))


def test_the_rank_correlation_is_of_the_last_five_and_of_five_methods_or_more(standard_runs):
    """Ours: bc, td3_bc, bc-top-10, iql, rebrac; published: bc, td3_bc, iql, rebrac, bc-top-10. d = 0, 0, 2, 1, 1."""
    found = runs.read_results(standard_runs)
    text = standard.page(found.runs, found.failures, ".", ".", tables.PUBLISHED)
    assert "(Spearman's, 5 methods): 0.70." in text
    four = [run for run in found.runs if run.method != "bc"]
    assert "Rank correlation" not in standard.page(four, [], ".", ".", tables.PUBLISHED)
    assert standard.small(four, [], ".", ".", tables.PUBLISHED) == ""  # README compares as many, or shows nothing
    assert standard.small(found.runs, [], ".", ".", tables.PUBLISHED)


def test_the_standard_page_names_what_failed_and_begins_without_a_run(standard_runs):
    fail(standard_runs / "hopper-medium-expert-v1" / "edac", "stitch/hopper-medium-expert-v1", "no memory", "edac")
    found = runs.read_results(standard_runs)
    text = standard.page(found.runs, found.failures, ".", ".", tables.PUBLISHED)
    assert "Failed: edac on hopper-medium-expert-v1 (no memory)." in text and "Not run yet: awac, xql, cql. " in text
    empty = standard.page([], [], ".", ".", tables.PUBLISHED)
    assert empty == "**0 of 36 cells (9 methods on 4 datasets) are finished.**"
    assert standard.small([], [], ".", ".", tables.PUBLISHED) == ""


def test_readme_has_one_table_of_the_standard_protocol_as_soon_as_there_is_a_run(standard_runs, tmp_path):
    root = tmp_path / "root"
    (root / "benchmarks").mkdir(parents=True), (root / "algos").mkdir()
    marks = "<!-- report:standard:begin -->\n<!-- report:standard:end -->\n"
    (root / "README.md").write_text(f"above\n{marks}below\n")
    (root / "benchmarks" / "standard.md").write_text(marks)
    # README has the protocol's datasets alone, the page also what it does not have
    other = "stitch/walker2d-medium-replay-v1"
    make_standard_run(standard_runs / "walker2d-medium-replay-v1" / "awac", other, [[5.0, 7.0], [7.0, 9.0]], "awac")
    found = runs.read_results(standard_runs)
    tables.write_tables(root, "standard", found.runs, found.failures, check=False)
    readme, page = (root / "README.md").read_text(), (root / "benchmarks" / "standard.md").read_text()
    assert (
        "\n## Scores on data like D4RL's\n\n| method | hopper-medium-expert-v1 | pointmaze-medium-stitch-v0 |\n"
        in readme
    )
    place = "benchmarks/results/standard/hopper-medium-expert-v1/iql"
    maze = "benchmarks/results/standard/pointmaze-medium-stitch-v0/iql"
    assert f"| [iql](algos/iql.md) | [70.0]({place}) (107.4) | [7.0]({maze}) |" in readme
    assert f"| [bc](algos/bc.md) | [40.0]({place[:-3]}bc) (52.3) |  |" in readme
    assert "6 of 36 cells" in readme and "(benchmarks/standard.md)" in readme and readme.endswith("end -->\nbelow\n")
    assert "### hopper-medium-expert-v1" in page and "(results/standard/hopper-medium-expert-v1/iql)" in page
    assert "### walker2d-medium-replay-v1" in page and "walker2d" not in readme and "awac" not in readme
    before = files(root)
    assert tables.write_tables(root, "standard", found.runs, found.failures, check=True) == [] and files(root) == before


def further_seeds(folder, dataset, curves, algo, first=3, **config):
    """A cell of its own with other seeds than those of `standard_runs`."""
    make_standard_run(folder, dataset, curves, algo)
    change(folder / "summary.json", seeds=[first + i for i in range(len(curves))])
    change(folder / "config.json", config={"algo": algo, "dataset": dataset, "seed": first, "num_seeds": 2, **config})


def test_a_cell_with_other_seeds_is_of_the_same_row(standard_runs):
    """The three seeds of `standard_runs` have 69, 70 and 71 in the mean of the last five, and 19, 20 and 21 at last."""
    name, hopper = "seeds-3-and-4/hopper-medium-expert-v1/iql", "stitch/hopper-medium-expert-v1"
    further_seeds(standard_runs / name, hopper, [[0.0] + [100.0] * 5] * 2, "iql")
    found = runs.read_results(standard_runs)
    text = standard.page(found.runs, found.failures, "results/standard", "..", tables.PUBLISHED)
    assert text.startswith("**6 of 36 cells")
    (row,) = [x for x in rows_under(text, "hopper-medium-expert-v1") if x[0] == "[iql](../algos/iql.md)"]
    assert row[1].startswith("[82.0](results/standard/hopper-medium-expert-v1/iql) (")  # (69 + 70 + 71 + 200) / 5
    assert row[2].startswith("52.0 (") and row[3] == "(107.4)"  # (19 + 20 + 21 + 200) / 5
    assert f"More seeds, in folders of their own: [iql](results/standard/{name}). [Learning" in text
    assert "mean over 2 to 5 seeds" in text
    (run,) = [run for run in found.runs if run.method == "iql" and run.dataset == hopper]
    assert run.summary["seeds"] == [0, 1, 2, 3, 4] and run.curve.shape == (5, 6)
    assert len(run.summary["returns"]) == len(run.summary["score_per_seed"]) == len(run.diverged) == 5


def test_a_newer_field_that_is_not_used_is_no_other_setting(standard_runs):
    hopper = "stitch/hopper-medium-expert-v1"
    place = standard_runs / "seeds-3-and-4/hopper-medium-expert-v1/iql"
    further_seeds(place, hopper, [[0.0] + [100.0] * 5] * 2, "iql", random_shift=None)
    found = runs.read_results(standard_runs).runs
    assert [len(run.scores) for run in found if run.algo == "iql" and run.dataset == hopper] == [5]


@pytest.mark.parametrize("what", [{"first": 2}, {"beta": 3.0}, {"data": {"hash": "other"}}])
def test_a_cell_with_a_seed_again_or_another_setting_or_other_data_is_no_part_of_a_row(standard_runs, what):
    name, hopper = "further/hopper-medium-expert-v1/iql", "stitch/hopper-medium-expert-v1"
    further_seeds(standard_runs / name, hopper, [[0.0] + [100.0] * 5] * 2, "iql", **what)
    found = runs.read_results(standard_runs).runs
    assert sorted(len(run.scores) for run in found if run.algo == "iql" and run.dataset.startswith(hopper)) == [2, 3]


def test_published_scores_of_like_named_data_are_of_the_protocol():
    protocol = tomllib.loads((ROOT / "benchmarks" / "protocols.toml").read_text())["standard"]
    for dataset, scores in tables.PUBLISHED["like"].items():
        assert dataset in protocol["datasets"] and dataset[:-1] == f"stitch/{scores['name'][:-1]}"
        assert scores.keys() - {"name"} <= protocol["methods"].keys()
    assert not tables.PUBLISHED["like"].keys() & tables.PUBLISHED["scores"].keys()


# --- What must not be taken for the same ---------------------------------------------------------------


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def set_data(run, fingerprint):
    config = json.loads((run / "config.json").read_text())["config"]
    change(run / "config.json", config=config | {"data": fingerprint})


def rows_of(text):
    """{first cell: other cells} of the markdown table in a text."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0].partition("]")[0].lstrip("["): row[1:] for row in rows}


def test_runs_on_different_data_under_one_name_are_in_no_column_together(root, capsys):
    results = root / "benchmarks" / "results" / "quick"
    set_data(results / "maze-v0" / "iql", {"rows": 100, "hash": "a"})
    set_data(results / "maze-v0" / "bc", {"rows": 100, "hash": "b"})  # bc-top-10 is older and says nothing
    found = runs.read_results(results)
    assert "stitch/maze-v0: not pooled, each in a column of its own: data-" in capsys.readouterr().out
    columns = {run.method: run.dataset for run in found.runs if run.dataset.startswith("stitch/maze-v0")}
    assert len(set(columns.values())) == 3 and columns["bc-top-10"] == "stitch/maze-v0@unknown"
    assert runs.comparable(found.runs, [])[0] == ["D4RL/door/human-v2"]
    shown = rows_of(tables.table(found.runs, [], "."))
    of = {
        name: [cell for cell in cells if cell.startswith("[")] for name, cells in shown.items() if name[0] not in "m-"
    }
    assert len(shown["method"]) == 5 and {name: len(cells) for name, cells in of.items()} == {
        "iql": 3, "bc": 2, "bc-top-10": 1
    }  # fmt: skip
    same = {"rows": 100, "hash": "a"}
    for method in ("iql", "bc"):  # one that says nothing is of the data that the others name, where these agree
        set_data(results / "maze-v0" / method, same)
    assert {run.dataset for run in runs.read_runs(results)} == {"D4RL/door/human-v2", "own-v0", "stitch/maze-v0"}


@pytest.mark.parametrize("kind", ["raw return", "normalised by D4RL's reference scores"])
def test_scores_on_different_scales_are_in_no_column_and_no_mean_together(root, kind):
    results = root / "benchmarks" / "results" / "quick"
    change(results / "maze-v0" / "bc" / "summary.json", score_kind=kind)
    exact = "normalised by the dataset's reference scores, exact"  # the same scale
    change(results / "maze-v0" / "bc-top-10" / "summary.json", score_kind=exact)
    found = runs.read_runs(results)
    columns = {run.method: run.dataset for run in found if run.dataset.startswith("stitch/maze-v0")}
    assert columns["iql"] == columns["bc-top-10"] != columns["bc"]
    datasets, rows = runs.comparable(found, [])
    assert datasets == ["D4RL/door/human-v2"] and all(len(row) == 1 for row in rows.values())


def test_two_runs_of_one_method_on_one_dataset_are_both_named(tmp_path):
    for part, score in (("first", 10.0), ("second", 30.0)):
        make_run(tmp_path / part / "maze-v0" / "iql", "stitch/maze-v0", [score, score])
        make_run(tmp_path / part / "door-v0" / "iql", "stitch/door-v0", [score + 1, score + 1])
    make_run(tmp_path / "first" / "maze-v0" / "bc", "stitch/maze-v0", [1.0, 1.0], "bc")
    found = runs.read_runs(tmp_path)
    rows = rows_of(tables.table(found, [], "."))
    assert rows.keys() == {"method", "---", "first/iql", "second/iql", "bc"}
    assert [cell.partition("]")[0] for cell in rows["second/iql"][:2]] == ["[31.0", "[30.0"]
    _, scores = runs.comparable(found, [])
    assert {name: np.mean(row) for name, row in scores.items()} == {"first/iql": 10.5, "second/iql": 30.5}


def test_runs_in_the_folders_that_main_chooses_are_named_by_their_algorithm(tmp_path):
    """runs/ALGORITHM/DATASET; and one run's folder by itself."""
    make_run(tmp_path / "iql" / "stitch" / "maze-v0", "stitch/maze-v0", [10.0])
    make_run(tmp_path / "bc" / "stitch" / "maze-v0", "stitch/maze-v0", [20.0], "bc")
    make_run(tmp_path / "bc" / "own-v0", "own-v0", [30.0], "bc")
    assert {(run.method, run.dataset) for run in runs.read_runs(tmp_path)} == {
        ("iql", "stitch/maze-v0"), ("bc", "stitch/maze-v0"), ("bc", "own-v0")
    }  # fmt: skip
    (run,) = runs.read_runs(tmp_path / "iql" / "stitch" / "maze-v0")
    assert run.method == "iql"


def test_a_method_s_name_is_of_one_algorithm(tmp_path):
    make_run(tmp_path / "a" / "mine", "stitch/maze-v0", [10.0], "iql")
    make_run(tmp_path / "b" / "mine", "stitch/door-v0", [20.0], "bc")
    rows = rows_of(tables.table(runs.read_runs(tmp_path), [], "."))
    assert rows["a/mine"][0] == rows["b/mine"][1] == "not run"
    assert rows["a/mine"][1].startswith("[10.0]") and rows["b/mine"][0].startswith("[20.0]")


FOREIGN = ["7", "[1, 2]", '"text"', "null", "true", "", "{", "[" * 100_000, '{"config": 3, "algo": [], "reason": {}}']


@pytest.mark.parametrize("content", [*FOREIGN, b"\xff\x00"], ids=range(len(FOREIGN) + 1))
@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl", "failed.json"])
def test_a_foreign_file_costs_a_line_and_its_own_run(root, capsys, name, content):
    results = root / "benchmarks" / "results" / "quick"
    (results / "maze-v0" / "bc" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = runs.read_results(results)
    (said,) = capsys.readouterr().out.splitlines()
    assert "cannot be read" in said
    places = {run.place for run in found.runs}
    assert ("maze-v0/bc" in places) == (name == "failed.json") and "maze-v0/iql" in places and not found.failures


@pytest.mark.parametrize(
    "fields",
    [
        {"score_per_seed": []},
        {"score_per_seed": [10.0, 20.0]},
        {"score_per_seed": [[10.0], [20.0], [0.0]]},
        {"score_per_seed": ["a", "b", "c"]},
        {"score_per_seed": 3.0},
        {"returns": [[1.0]]},
        {"returns": None},
        {"grid": [1, 2]},
        {"seeds": [0]},
        {"diverged": [True]},
        {"num_updates": "many"},
        {"algo": 3},
        {"dataset": "stitch/other-v0"},
        {"algo": "cql"},
        {"score_kind": None},
    ],
    ids=str,
)
def test_a_summary_of_another_shape_costs_a_line_and_its_own_run(root, capsys, fields):
    results = root / "benchmarks" / "results" / "quick"
    change(results / "maze-v0" / "bc" / "summary.json", **fields)
    assert "maze-v0/bc" not in {run.place for run in runs.read_runs(results)}
    (said,) = capsys.readouterr().out.splitlines()
    assert "maze-v0/bc cannot be read" in said


def test_what_a_folder_without_results_is_told(root, tmp_path, monkeypatch):
    """A name that is none, a protocol that has not been run, and runs that have not ended or have no scores."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^nothing is no folder: name one that holds runs, or one of quick.$"):
        report.main(report.Options("nothing"))
    with pytest.raises(SystemExit, match="full is no folder.* python benchmarks/sweep.py full makes it"):
        report.main(report.Options("full"))
    make_run(tmp_path / "mine" / "run", "stitch/maze-v0", [1.0])
    (tmp_path / "mine" / "run" / "summary.json").unlink()
    with pytest.raises(SystemExit, match="mine holds no finished run with scores; 1 have begun, and their own command"):
        report.main(report.Options("mine"))
    make_run(tmp_path / "blind", "stitch/maze-v0", [None, None], kind="not scored: no environment")
    with pytest.raises(SystemExit, match="benchmarks/plot.py draws their losses"):
        report.main(report.Options("blind"))


def test_candidates_are_at_least_one():
    for count in (0, -1):
        with pytest.raises(SystemExit, match=f"--candidates must be at least 1, not {count}"):
            report.main(report.Options(candidates=count))


def test_a_full_disk_leaves_what_was_there(root, tmp_path):
    """No file grows beyond 100 bytes: README.md and report.md are as before, and nothing is left beside them."""
    results = root / "benchmarks" / "results" / "quick"
    shutil.copytree(results, tmp_path / "mine")
    (tmp_path / "mine" / "report.md").write_text("an older report")
    before = files(root)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for protocol in ("quick", str(tmp_path / "mine")):
            with pytest.raises(SystemExit, match="cannot be written .File too large"):
                report.main(report.Options(protocol))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(root) == before


def test_tables_go_into_every_page_with_their_marks(root):
    """README.md need not be the page; links lead from where the table stands."""
    (root / "README.md").rename(root / "benchmarks" / "scores.md")
    (root / "README.md").write_text("no marks")
    write_tables(root)
    text = (root / "benchmarks" / "scores.md").read_text()
    assert "[iql](../algos/iql.md)" in text and "[90.0](results/quick/maze-v0/iql)" in text


# --- Runs that diverged, and NaN -----------------------------------------------------------------------


def test_diverged_runs_are_shown(root):
    """Two of three seeds, whose scores are numbers; and all, without a score."""
    results = root / "benchmarks" / "results" / "quick"
    change(results / "maze-v0" / "iql" / "summary.json", diverged=[True, False, True])
    change(results / "maze-v0" / "bc-top-10" / "summary.json", diverged=[False] * 3)
    make_run(results / "maze-v0" / "td3", "stitch/maze-v0", [None] * 3, "td3", diverged=[True] * 3)
    write_tables(root)
    rows = rows_of((root / "README.md").read_text())
    assert rows["iql"][2].endswith("(80.0 to 100.0); 2 of 3 diverged")
    assert "diverged" not in "".join(rows["bc-top-10"]) and "failed" in rows["td3"]
    readme = (root / "README.md").read_text()
    assert "Failed: td3 on maze-v0 (3 of 3 runs diverged)." in readme
    assert "Diverged: the networks of that seed are not finite." in readme


def test_a_folder_of_which_all_diverged_has_a_table(tmp_path):
    make_run(tmp_path / "maze-v0" / "td3", "stitch/maze-v0", [None] * 3, "td3", diverged=[True] * 3)
    report.main(report.Options(str(tmp_path)))
    assert "| failed |" in (tmp_path / "report.md").read_text()


def test_success_on_each_task_is_a_row_of_its_own(tmp_path):
    kind = "success, %, mean over 2 tasks"
    per_task = [[100.0, 0.0], [40.0, 20.0]]
    make_run(tmp_path / "goals-v0" / "gcbc", "stitch/goals-v0", [50.0, 30.0], "gcbc", kind, success_per_task=per_task)
    make_run(tmp_path / "goals-v0" / "iql", "stitch/goals-v0", [10.0, 20.0], kind=kind)
    make_run(tmp_path / "own-v0" / "gcbc", "own-v0", [1.0, 2.0], "gcbc", "raw return")
    lines = tables.table(runs.read_runs(tmp_path), [], ".").splitlines()
    row = next(i for i, line in enumerate(lines) if "algos/gcbc.md" in line)
    assert f", {kind} |" in lines[0] and lines[row + 1] == "| on each task | – | 70, 10 |"
    assert sum("on each task" in line for line in lines) == 1
    assert "On each task: the success on task 1, 2, ... of the data's, in %, a mean over the seeds." in lines[-1]
    plain = tables.table([run for run in runs.read_runs(tmp_path) if run.dataset == "own-v0"], [], ".")
    assert "each task" not in plain.lower()


def test_null_is_no_number(root, figures):
    """An evaluation that failed amid a run leaves a gap in the curve, and an unknown value a dash."""
    run = root / "benchmarks" / "results" / "quick" / "maze-v0" / "iql"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"believed_value": 1.0, "true_value": None} for line in lines]
    lines[1]["score"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = runs.read_results(root / "benchmarks" / "results" / "quick")
    assert "| believed − true value | – | – | – | – |" in tables.table(found.runs, [], ".", "iql")
    pictures.draw(found, root)
    panels = {panel.get_title(): panel for panel in figures["learning_curves_maze-v0.png"].axes}
    np.testing.assert_array_equal(last_line(panels["iql"]), [np.nan, 90])


# --- Sweeps ---------------------------------------------------------------------------------------------


def make_grid(folder, scores, batch_size=None, **fields):
    """A grid over beta, {beta: scores of its seeds}, as main leaves it."""
    points = [({"beta": beta}, seed, score) for beta, row in scores.items() for seed, score in enumerate(row)]
    flat = [score for *_, score in points]
    grid = [point for point, *_ in points]
    seeds = [seed for _, seed, _ in points]
    make_run(folder, "stitch/maze-v0", flat, **({"grid": grid, "seeds": seeds} | fields))
    lines = [
        {"step": step, "seed": seed, "grid": point, "score": None if score is None else score * step / 500}
        for step in (250, 500)
        for point, seed, score in points
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"algo": "iql", "dataset": "stitch/maze-v0", "beta": 7.0, "seed": 0, "grid": {"beta": list(scores)}}
    change(folder / "config.json", config=config | ({} if batch_size is None else {"batch_size": batch_size}))


BETAS = {10.0: [0.0, 2.0, 4.0], 1.0: [50.0, 55.0, 60.0], 3.0: [58.0, 70.0, 64.0]}


@pytest.mark.parametrize("of", ["iql", "."])
def test_a_grid_ends_in_a_table_a_picture_and_the_best_value(tmp_path, capsys, of):
    make_grid(tmp_path / "iql", BETAS)
    folder = tmp_path / of if of != "iql" else tmp_path / "iql"
    report.main(report.Options(str(folder)))
    said = capsys.readouterr().out
    assert "best of 3 is beta 3, score 64.0 (58.0 to 70.0)." in said
    assert said.startswith("iql on stitch/maze-v0: best") and "Intervals that reach its own: beta 1." in said
    text = (folder / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows == [
        "| beta | score |",
        "| --- | --- |",
        "| 1 | 55.0 (50.0 to 60.0) |",
        "| **3** | **64.0 (58.0 to 70.0)** |",
        "| 10 | 2.0 (0.0 to 4.0) |",
    ]
    assert "best of 3 is beta 3" in text and "train it with other seeds" in text
    (picture,) = folder.glob("*.png")
    assert picture.name == "sweep_iql-maze-v0.png" and f"]({picture.name})" in text
    first = files(folder)
    report.main(report.Options(str(folder)))
    assert files(folder) == first
    report.main(report.Options(str(folder), check=True))
    picture.unlink()
    with pytest.raises(SystemExit, match="sweep_iql-maze-v0.png"):
        report.main(report.Options(str(folder), check=True))


def make_cells(folder):
    """batch_size 64 and 128, each with its grid, as a sweep of both leaves them. By the sum: 128 is better for 1."""
    make_grid(folder / "maze-v0" / "iql,batch_size=128", {1.0: [80.0, 82.0], 3.0: [10.0, 20.0]}, 128)
    make_grid(folder / "maze-v0" / "iql,batch_size=64", {1.0: [30.0, 30.0], 3.0: [40.0, 44.0]}, 64)


def test_two_swept_settings_are_one_table_of_all_combinations(tmp_path, figures):
    make_cells(tmp_path)
    found = runs.read_results(tmp_path)
    (sweep,) = found.sweeps
    assert not found.runs and sweep.fields == ["batch_size", "beta"] and sweep.name == "maze-v0/iql"
    text = sweeps.section(sweep)
    assert [line for line in text.splitlines() if line.startswith("| ")][2:] == [
        "| 64 | 1 | 30.0 (30.0 to 30.0) |",
        "| 64 | 3 | 42.0 (40.0 to 44.0) |",
        "| **128** | **1** | **81.0 (80.0 to 82.0)** |",
        "| 128 | 3 | 15.0 (10.0 to 20.0) |",
    ]
    assert "best of 4 is batch_size 128, beta 1, score 81.0 (80.0 to 82.0). No other interval reaches its own." in text
    pictures.draw(found, tmp_path)
    panels = {panel.get_xlabel(): panel for panel in figures["sweep_maze-v0-iql.png"].axes}
    for field, values, best in (("batch_size", ["64", "128"], [42, 81]), ("beta", ["1", "3"], [81, 42])):
        line = panels[field].lines[-1]
        assert [label.get_text() for label in panels[field].get_xticklabels()] == values
        np.testing.assert_allclose(line.get_xydata(), np.array([[0, best[0]], [1, best[1]]]))
        bars = np.array([segment[:, 1] for segment in panels[field].collections[0].get_segments()])
        np.testing.assert_allclose(sorted(bars.tolist()), [[40, 44], [80, 82]])
        assert sorted(panels[field].lines[0].get_ydata()) == [15, 30, 42, 81]  # all points
    assert figures["sweep_maze-v0-iql.png"].get_suptitle() == "iql on stitch/maze-v0"


def test_cells_of_single_values_are_a_sweep_as_well(tmp_path):
    """Values that cannot be traced make a cell each, and no grid; they stay methods of the table too."""
    for units, score in (([8, 8], 10.0), ([64], 30.0)):
        run = tmp_path / "maze-v0" / f"iql,hidden={units}"
        make_run(run, "stitch/maze-v0", [score, score])
        change(run / "config.json", config={"algo": "iql", "dataset": "stitch/maze-v0", "hidden": units, "seed": 0})
    found = runs.read_results(tmp_path)
    assert len(found.runs) == 2
    assert "best of 2 is hidden [64], score 30.0" in sweeps.sentence(found.sweeps[0])


def test_more_seeds_of_one_point_are_pooled_and_one_seed_counts_once(tmp_path):
    for first, scores in ((0, [10.0, 20.0]), (1, [20.0, 60.0])):
        run = tmp_path / "maze-v0" / f"iql,seed={first}"
        make_grid(run, {1.0: scores, 3.0: [0.0, 0.0]}, seeds=[first, first + 1] * 2)
        change(run / "config.json", config={"algo": "iql", "dataset": "stitch/maze-v0", "seed": first})
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [line | {"seed": line["seed"] + first} for line in lines]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sweep,) = runs.read_results(tmp_path).sweeps
    assert sweep.fields == ["beta"] and sorted(sweep.points["1.0",][0]) == [10, 20, 60]
    assert "score 30.0 (" in sweeps.sentence(sweep)


def test_a_value_without_all_its_scores_is_never_the_best(tmp_path):
    """beta 1 has the best mean of the scores that are there; one of its seeds diverged."""
    rows = BETAS | {1.0: [None, 70.0, 90.0]}
    make_grid(tmp_path / "iql", rows, diverged=[False] * 3 + [True] + [False] * 5)
    (sweep,) = runs.read_results(tmp_path).sweeps
    assert "best of 3 is beta 3, score 64.0" in sweeps.sentence(sweep)
    assert "| 1 | not scored; 1 of 3 diverged |" in sweeps.section(sweep)
    shutil.rmtree(tmp_path / "iql")
    make_grid(tmp_path / "iql", {1.0: [None], 3.0: [None]}, kind="not scored: eval_episodes is 0")
    (sweep,) = runs.read_results(tmp_path).sweeps
    assert "none can be called the best (not scored: eval_episodes is 0)" in sweeps.sentence(sweep)
    report.main(report.Options(str(tmp_path)))  # draws an empty picture, and does not fail


def test_one_seed_of_a_grid_has_no_interval(tmp_path):
    make_grid(tmp_path / "iql", {1.0: [10.0], 3.0: [20.0], 10.0: [20.0]})
    (sweep,) = runs.read_results(tmp_path).sweeps
    said = sweeps.sentence(sweep)
    assert "best of 3 is beta 3, score 20.0. Intervals that reach its own: beta 10." in said
    assert "interval" not in sweeps.section(sweep).partition("evaluation after")[2].partition("The best of")[0]


def test_a_committed_folder_shows_no_sweep(root, monkeypatch, capsys):
    """Its tables go into pages, which have no place for one; the answer is printed."""
    make_grid(root / "benchmarks" / "results" / "quick" / "maze-v0" / "grid", BETAS)
    drawn = []
    monkeypatch.setattr(report, "draw", lambda found, folder: drawn.append(found))
    report.main(report.Options())
    assert drawn[0].sweeps == [] and drawn[0].runs and "best of 3 is beta 3" in capsys.readouterr().out


def test_grids_on_different_data_are_different_sweeps(tmp_path):
    make_cells(tmp_path)
    for file in tmp_path.rglob("config.json"):
        set_data(file.parent, {"hash": "b" if file.parent.name == "iql,batch_size=64" else "a"})
    assert len(runs.read_results(tmp_path).sweeps) == 2


# --- Pictures -------------------------------------------------------------------------------------------


@pytest.fixture
def figures(monkeypatch):
    """{name of the file: figure} of what is drawn; no file is written."""
    drawn = {}
    monkeypatch.setattr(estimators, "RESAMPLES", 500)
    for module in (pictures, sweeps):
        monkeypatch.setattr(module, "save", lambda figure, path, source="": drawn.update({path.name: figure}))
    yield drawn
    plt.close("all")


def test_scores_of_a_run_that_is_being_written_are_those_that_every_seed_has(tmp_path):
    make_run(tmp_path / "run", "stitch/maze-v0", [10.0, 20.0, 30.0])
    lose_a_line(tmp_path / "run")
    steps, scores = runs.read_scores(tmp_path / "run")
    assert steps.tolist() == [250] and scores.tolist() == [[5], [10], [15]]
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(SystemExit, match="no evaluation yet"):
        runs.read_scores(tmp_path / "run")


def last_line(panel):
    return panel.lines[-1].get_ydata()


def test_panels_show_the_mean_of_the_seeds_under_the_name_of_their_method(root, figures):
    results = root / "benchmarks" / "results" / "quick"
    pictures.draw(runs.read_results(results), results)
    panels = {panel.get_title(): panel for panel in figures["learning_curves_maze-v0.png"].axes}
    means = {"iql": [45, 90], "bc": [5, 10], "bc-top-10": [20, 40]}  # half of the last score at the first evaluation
    for name, expected in means.items():
        np.testing.assert_allclose(last_line(panels[name]), expected)
    low_and_high = panels["iql"].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([low_and_high.min(), low_and_high.max()], [40, 100])
    panels = {panel.get_title(): panel for panel in figures["performance_profiles.png"].axes}
    np.testing.assert_allclose([last_line(panels[name])[50] for name in ("iql", "bc")], [5 / 6, 0])  # above 50
    assert panels.keys() == {"iql", "bc"}  # bc-top-10 lacks a dataset


def test_picture_of_the_iqm_shows_the_iqm_of_each_method(root, figures):
    results = root / "benchmarks" / "results" / "quick"
    pictures.draw(runs.read_results(results), results)
    axes = figures["iqm.png"].axes[0]
    dots = {y: x for line in axes.lines for x, y in [line.get_xydata()[-1]] if line.get_marker() == "o"}
    names = {tick: label.get_text() for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)}
    # Of 50 60 70 80 90 100 and 5 5 5 10 20 0 the middle four, and three of four
    np.testing.assert_allclose([dots[y] for y in sorted(names)], [6.25, 75])
    assert [names[y] for y in sorted(names)] == ["bc", "iql"]
    pictures.draw_iqm({"a": A, "b": B}, "", pathlib.Path("p.png"), "")
    lines = [line.get_xydata() for line in figures["p.png"].axes[0].lines if len(line.get_xdata()) == 2]
    for (ends, y), row in zip([(line[:, 0], line[0, 1]) for line in lines], (B, A), strict=True):  # the best on top
        np.testing.assert_allclose(ends, estimators.interval(estimators.iqm, row), err_msg=y)


def test_curves_are_means_with_their_intervals_and_profiles_reach_every_score(tmp_path, figures):
    """Of seeds whose median is not their mean, and scores beyond 0 and 100."""
    steps, scores = np.array([10, 20]), np.array([[0.0, 5.0], [0.0, 5.0], [90.0, 5.0]])
    x, middle, low, high = pictures.learning_curve(steps, scores)
    np.testing.assert_array_equal(x, steps)
    np.testing.assert_allclose([middle, low, high], [[30, 5], [0, 5], [90, 5]])
    for name, scores in {"maze-v0": [-60.0, 20.0], "door-v0": [150.0, 90.0]}.items():
        make_run(tmp_path / name / "iql", f"stitch/{name}", scores)
    pictures.draw(runs.read_results(tmp_path), tmp_path)
    line = figures["performance_profiles.png"].axes[0].lines[-1]
    assert line.get_xdata()[[0, -1]].tolist() == [-60, 150] and line.get_ydata()[[0, -1]].tolist() == [0.75, 0]


def test_probability_of_improvement_is_of_the_row_and_bold_where_it_is_sure(figures):
    noise = np.array([0.0, 1.0, 2.0])
    rows = {"low": [noise], "high": [noise + 10], "any": [np.array([-0.5, 11.5, 1.5])]}
    pictures.draw_improvement(rows, "a dataset", pathlib.Path("p.png"), "")
    axes = figures["p.png"].axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [label.get_text() for label in axes.get_xticklabels()]
    cells = {(names[round(t.get_position()[1])], names[round(t.get_position()[0])]): t for t in axes.texts}
    image = axes.images[0].get_array()
    assert cells["high", "low"].get_text() == "1.00" and cells["low", "high"].get_text() == "0.00"
    assert image[names.index("high"), names.index("low")] == 1 and image[names.index("low"), names.index("high")] == 0
    bold = {pair for pair, text in cells.items() if text.get_weight() == "bold"}
    assert bold == {("high", "low"), ("low", "high")}


def test_with_one_seed_nothing_is_bold(figures):
    pictures.draw_improvement({"x": [np.array([1.0])], "y": [np.array([0.0])]}, "", pathlib.Path("p.png"), "")
    assert {text.get_weight() for text in figures["p.png"].axes[0].texts} == {"normal"}


def caption_of(figure):
    (text,) = figure.texts[-1:]
    return " ".join(text.get_text().split())


def test_titles_are_one_line_and_captions_name_the_data_and_the_band(root, figures):
    results = root / "benchmarks" / "results" / "quick"
    pictures.draw(runs.read_results(results), results)
    for name in ("iqm.png", "performance_profiles.png", "learning_curves_maze-v0.png"):
        title = figures[name].get_suptitle() or figures[name].axes[0].get_title()
        below = caption_of(figures[name])
        assert "\n" not in title and len(title) < 50
        assert "maze-v0" in title + below and "95 % bootstrap interval over 3 seeds, too narrow" in below
        assert "75 %" in below
    below = caption_of(figures["probability_of_improvement.png"])
    assert "D4RL-door-human-v2, maze-v0" in below and "9 % of pairs that do not differ" in below


@pytest.mark.parametrize("count", [1, 32])
def test_title_and_caption_of_panels_touch_none(figures, count):
    line = np.array([0.0, 1.0])
    curves = {f"method-{i}": (line, line, line, line) for i in range(count)}
    text = f"Mean of the seeds. Band: {pictures.band([line] * 3)}."
    pictures.draw_panels(
        curves, pathlib.Path("p.png"), "", text, "stitch/hopper-medium-expert-100k-v0", "updates", "score"
    )
    figure = figures["p.png"]
    figure.draw_without_rendering()
    shown, below = figure._suptitle.get_window_extent(), figure.texts[-1].get_window_extent()
    for extent in (shown, below):
        assert 0 <= extent.x0 and extent.x1 <= figure.bbox.width
    assert all(panel.title.get_window_extent().y1 < shown.y0 for panel in figure.axes)
    assert below.y1 < min(panel.get_tightbbox().y0 for panel in figure.axes)


def test_check_finds_pictures_of_other_result_files(root):
    """Another score in the middle of a run stands in no table."""
    results = root / "benchmarks" / "results" / "quick"
    report.main(report.Options())
    found = runs.read_results(results)
    assert pictures.stale_pictures(found, results) == []
    metrics = results / "maze-v0" / "bc" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"score": 5.0', '"score": 6.0'))
    with pytest.raises(SystemExit, match="learning_curves_maze-v0.png: not as the result files"):
        report.main(report.Options(check=True))
    renamed = found._replace(runs=[run._replace(method=run.method.replace("bc-top-10", "best")) for run in found.runs])
    assert "learning_curves_maze-v0.png" in pictures.stale_pictures(renamed, results)
    (results / "learning_curves_own-v0.png").unlink()
    assert pictures.stale_pictures(found, results) == ["learning_curves_own-v0.png"]


# --- Model selection ------------------------------------------------------------------------------------


def test_selection_among_policies_that_never_vary():
    """With scores 0, 1, 2, 3 and no noise, m episodes try m policies: E[the highest of m] = 5 m / (m + 1) - 1."""
    scores = np.arange(4.0)
    chosen = selection.selection_curve(np.tile(scores[:, None] - 9, (1, 5)), scores, 6, num_trials=20_000).mean(axis=1)
    np.testing.assert_allclose(chosen[:5], [1.5, 1.5, 7 / 3, 11 / 4, 3], atol=0.04)
    np.testing.assert_array_equal(chosen[4:], 3)


def test_selection_adds_the_bonus_of_ucb1(monkeypatch):
    """Auer et al. (2002), fig. 1: sqrt(2 ln n / n_j). After both of two policies were tried once, n = 2 and n_j = 1."""
    asked, sqrt = [], np.sqrt
    monkeypatch.setattr(np, "sqrt", lambda x: asked.append(x.copy()) or sqrt(x))
    selection.selection_curve([[0.0], [1.0]], [0.0, 1.0], 4, num_trials=1)
    np.testing.assert_allclose(asked[2], 2 * np.log(2))
    np.testing.assert_allclose(sorted(asked[3][0]), [2 * np.log(3) / 2, 2 * np.log(3)])


def test_selection_draws_its_candidates_anew_in_each_trial():
    """Of 4 policies 2 are candidates: the better of two is 5 * 2 / 3 - 1 on average, however long one looks."""
    scores = np.arange(4.0)
    chosen = selection.selection_curve(scores[:, None], scores, 20, num_candidates=2, num_trials=20_000).mean(axis=1)
    np.testing.assert_allclose(chosen[[0, 2, 20]], [1.5, 7 / 3, 7 / 3], atol=0.04)


def test_selection_between_two_coins():
    """Returns 1 with probability 3/4 (policy x) or 1/4 (y), scores 75 and 25.

    Two episodes try both; x is chosen if it wins, 9/16, or by half of the ties, 6/16: 3/4 in all. The third goes to the
    one with the higher mean. (x, y) = (1, 0): x stays ahead. (0, 1): y does. (1, 1), 3/16: if the tie breaks to x, a 1
    leaves a tie, which breaks to x again, and a 0 makes y better; if to y, likewise: x with probability 3/4. (0, 0),
    3/16: the other one never gets ahead: 1/2. Together 9/16 + 3/16 * 3/4 + 3/16 * 1/2 = 51/64.
    """
    returns = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    chosen = selection.selection_curve(returns, [75.0, 25.0], 3, num_trials=40_000).mean(axis=1)
    expected = 25 + 50 * np.array([1 / 2, 1 / 2, 3 / 4, 51 / 64])
    np.testing.assert_allclose(chosen, expected, atol=0.6)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_selection_comes_back_to_a_policy_that_had_bad_luck(scale):
    """One policy always returns 0.5, the other 1 in three of four episodes and else 0. Greed would leave the better one
    for good after a first 0, in a quarter of the trials; the bonus brings it back, whatever the scale of returns."""
    returns = scale * np.array([[0.5] * 4, [1.0, 1.0, 1.0, 0.0]])
    chosen = selection.selection_curve(returns, [50.0, 75.0], 300, num_trials=2_000).mean(axis=1)
    np.testing.assert_allclose(chosen[2], 50 + 25 * 3 / 4, atol=1.5)
    assert chosen[300] > 74


def test_selection_does_not_waste_episodes_on_policies_that_are_plainly_worse():
    """Coins of 0.7 and 0.55 among six policies that always fail. Split evenly, 400 episodes are 50 for each, and the
    better coin is chosen with probability Phi(0.15 / sqrt((0.7 * 0.3 + 0.55 * 0.45) / 50)) = 0.94."""
    returns = np.zeros((8, 20))
    returns[0, :14] = returns[1, :11] = 1
    chosen = selection.selection_curve(returns, [1.0] + [0.0] * 7, 400)
    assert chosen[400].mean() > 0.98


def test_selection_of_equal_policies_promises_nothing():
    """Twenty coins of 1/2, ten flips each: whichever is chosen scores 50. By the flips that chose it, it has 67."""
    rng = np.random.default_rng(0)
    chosen = []
    for _ in range(40):
        returns = (rng.random((20, 10)) < 0.5).astype(float)
        for part in selection.halves(returns, 100 * returns.mean(axis=1)):
            chosen.append(selection.selection_curve(*part, 100, num_trials=50).mean(axis=1)[[0, 1, 10, 100]])
    np.testing.assert_allclose(np.mean(chosen, axis=0), 50, atol=6)


def test_halves_are_apart_and_scored_as_the_whole():
    """Scores are 10 + 2 x the mean return; of four episodes two choose and two score, and the other way round."""
    returns = [[1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 7.0, 0.0]]
    (a, score_a), (b, score_b) = selection.halves(returns, [15.0, 16.0])
    np.testing.assert_array_equal(a, [[1, 3], [5, 7]])
    np.testing.assert_array_equal(b, [[2, 4], [0, 0]])
    np.testing.assert_allclose(score_a, [16, 10])
    np.testing.assert_allclose(score_b, [14, 22])
    (_, score), _ = selection.halves([[1.0, 0.0], [0.0, 1.0]], [7.0, 7.0])  # nothing tells the scale
    np.testing.assert_allclose(score, 7)


def test_the_peak_of_the_data_s_q():
    assert rules.peak([1, 2, 3, 2.5, 2]) == 2
    assert rules.peak([1, 2, np.nan]) == 1 and rules.peak([np.nan, np.nan]) == 1  # a critic that diverged, and then all
    assert rules.peak([3, 3]) == 0  # at the peak or before it


def with_critic(folder, columns):
    """A finished run of one seed with these evaluations: {column: [value of each evaluation]}."""
    make_run(folder, "stitch/maze-v0", [columns["score"][-1]])
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    lines = [{"step": 10 * i, "seed": 0, "returns": [1, 1], "true_value": 0, **row} for i, row in enumerate(rows, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_rules_that_stop_a_run_cost_what_the_best_evaluation_has_more(tmp_path, capsys):
    with_critic(tmp_path / "a", {"score": [10, 50, 40, 20], "q": [1, 3, 4, 2], "believed_value": [1, 2, 3, 9]})
    with_critic(tmp_path / "b", {"score": [30, 50, 60, 70], "q": [4, 3, 2, 1], "believed_value": [1, 2, 3, 4]})
    make_run(tmp_path / "bc", "stitch/maze-v0", [5.0], "bc")  # it has no critic
    assert rules.stopping(tmp_path / "a") == {
        "last": [30],
        "peak of the data's Q": [10],
        "highest believed value": [30],
    }
    assert rules.stopping(tmp_path / "bc") == {}
    report.main(report.Options(selection=tuple(tmp_path / name for name in ("a", "b", "bc")), out=tmp_path))
    assert "| maze-v0 | all | 2 | 15.0 | 25.0 | 15.0 |" in capsys.readouterr().out


def left_by_ope(folder, estimates):
    """What benchmarks/ope.py leaves beside the runs of `folder`: {folder: [(updates, mean Q, {name: value})]}."""
    rows = [
        {"folder": name, "seed": seed, "grid": {}, "updates": updates, "true_value": None, "score": None, "q": q}
        | {"estimates": {key: [x, x - 1, x + 1] for key, x in found.items()}}
        for name, runs in estimates.items()
        for seed, (updates, q, found) in enumerate(runs)
    ]
    folder.with_name(folder.name + "-ope").mkdir()
    (folder.with_name(folder.name + "-ope") / "ope.json").write_text(json.dumps({"policies": rows}))


def test_rules_that_choose_a_policy_stand_beside_the_bandit(tmp_path, capsys):
    """Scores 0 and 40 after 500 updates, 20 and 30 after 3,000, and 100: FQE prefers the second. The last checkpoints
    are the three others, and the data's Q fell in the first training only."""
    pool, late = tmp_path / "pool", "iql,num_updates=3000"
    make_run(pool / "iql,num_updates=500", "stitch/maze-v0", [0.0, 40.0])
    make_run(pool / late, "stitch/maze-v0", [20.0, 30.0])
    make_run(pool / "bc", "stitch/maze-v0", [100.0], "bc")
    early = [(500, 2.0, {"FQE": 3.0, "ESS": 9.0, "constant": 5.0}), (500, 2.0, {"FQE": 4.0})]
    rows = {"iql,num_updates=500": early, late: [(3000, 1.0, {"FQE": 1.0}), (3000, 3.0, {"FQE": 1.0})]}
    left_by_ope(pool, rows | {"bc": [(3000, None, {"FQE": 2.0, "WIS": 1.0})]})
    found = selection.report_selection(sorted(pool.iterdir()), 8, tmp_path)
    capsys.readouterr()
    rules.report_choices(found)
    said = capsys.readouterr().out
    chosen = "iql,num_updates=500, seed 1"
    assert f"| FQE | {chosen} | 40.0 | 60.0 |" in said and f"| FQE, lower bound | {chosen} | 40.0 | 60.0 |" in said
    assert "| WIS | bc, seed 0 | 100.0 | 0.0 |" in said
    assert "| the last checkpoint | any of 3 | 50.0 | 50.0 |" in said  # 20, 30 and 100
    assert "| peak of the data's Q | any of 3 | 43.3 | 56.7 |" in said  # 0, 30 and 100
    assert "| a bandit, 100 episodes |  | 100.0 | 0.0 |" in said  # nothing varies: it finds the best
    assert "constant" not in said and "ESS" not in said


def test_policies_that_were_never_played_are_chosen_by_their_estimates(tmp_path, capsys):
    pool = tmp_path / "pool"
    make_run(pool / "iql", "stitch/maze-v0", [float("nan")] * 2, returns=[[], []])
    left_by_ope(pool, {"iql": [(500, None, {"FQE": 3.0}), (500, None, {"FQE": 4.0})]})
    report.main(report.Options(selection=(pool / "iql",), out=tmp_path))
    said = capsys.readouterr().out
    assert "| FQE | iql, seed 1 | – | – |" in said and "| the last checkpoint | any of 2 | – | – |" in said


def test_selection_has_as_many_candidates_as_asked_for(tmp_path, capsys):
    """Among one candidate there is nothing to choose: its score is the mean however long one looks."""
    make_run(tmp_path / "grid", "stitch/maze-v0", [0.0, 50.0, 100.0])
    report.main(report.Options(selection=(tmp_path / "grid",), candidates=1, out=tmp_path))
    cells = capsys.readouterr().out.splitlines()[2].split(" | ")
    np.testing.assert_allclose([float(cell) for cell in cells[3:7]], 50, atol=5)


def test_selection_shows_ninety_percent_of_the_trials(tmp_path, monkeypatch):
    """Before any episode one of ten policies is drawn, with scores 0, 10 .. 90."""
    make_run(tmp_path / "run", "stitch/maze-v0", [10.0 * i for i in range(10)])
    drawn = {}
    monkeypatch.setattr(selection, "draw_panels", lambda curves, *args, **labels: drawn.update(curves))
    selection.report_selection([tmp_path / "run"], 10, tmp_path)
    _, middle, low, high = drawn["iql"]
    assert low[0] == 0 and high[0] == 90 and abs(middle[0] - 45) < 4 and middle[-1] > 85


def test_one_episode_cannot_both_choose_and_score(tmp_path):
    make_run(tmp_path / "run", "stitch/maze-v0", [1.0, 2.0], returns=[[1.0], [2.0]])
    with pytest.raises(SystemExit, match="one episode cannot both choose a policy and score it"):
        selection.report_selection([tmp_path / "run"], 8, tmp_path)


def test_selection_leaves_out_what_is_not_finished_and_draws_beside_its_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(report.STYLE, "figure.dpi", 20)
    make_run(tmp_path / "mine" / "maze-v0" / "iql", "stitch/maze-v0", [10.0, 30.0])
    make_run(tmp_path / "mine" / "door-v0" / "iql", "stitch/door-v0", [10.0, 30.0])
    fail(tmp_path / "mine" / "maze-v0" / "cql", "stitch/maze-v0", "status -9: killed")
    report.main(report.Options(selection=tuple(tmp_path.glob("mine/*/*"))))
    assert "cql holds no finished run" in capsys.readouterr().out
    drawn = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")}
    assert drawn == {"mine/selection_maze-v0.png", "mine/selection_door-v0.png"}


def test_selection_report_pools_the_folders_of_an_algorithm(tmp_path, capsys):
    grid = [{"beta": 1.0}, {"beta": 3.0}]
    make_run(tmp_path / "grid", "stitch/maze-v0", [10.0, 30.0], grid=grid)
    make_run(tmp_path / "more", "stitch/maze-v0", [50.0])
    make_run(tmp_path / "bc", "stitch/maze-v0", [20.0, 20.0], "bc")
    folders = tuple(str(tmp_path / name) for name in ("grid", "more", "bc"))
    options = tyro.cli(report.Options, args=["--selection", *folders, "--out", str(tmp_path / "out")])
    report.main(options)
    bc, iql = capsys.readouterr().out.splitlines()[2:4]
    assert bc == "| stitch/maze-v0 | bc | 2 | 20.0 | 20.0 | 20.0 | 20.0 | 20.0 |"
    cells = iql.split(" | ")
    assert cells[1:3] == ["iql", "3"] and cells[5:] == ["50.0", "50.0", "50.0 |"]
    np.testing.assert_allclose([float(cells[3]), float(cells[4])], 30, atol=2)
    assert (tmp_path / "out" / "selection_maze-v0.png").exists()
    with pytest.raises(SystemExit, match="finished run"):
        selection.report_selection([tmp_path / "nowhere"], 8, tmp_path)
    make_run(tmp_path / "blind", "stitch/maze-v0", [float("nan")])
    with pytest.raises(SystemExit, match="not all runs were scored"):
        selection.report_selection([tmp_path / "blind"], 8, tmp_path)


# --- Cards ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:minari")  # an author and an environment would be recommended
def test_card_of_a_dataset(tmp_path, monkeypatch):
    """Ten episodes of lengths 1 to 10 with a reward of 1 per step; the longest only is cut off."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes = [
        EpisodeBuffer(
            observations=np.zeros((length + 1, 2), np.float32),
            actions=np.zeros((length, 1), np.float32),
            rewards=np.ones(length),
            terminations=np.arange(1, length + 1) == (0 if length == 10 else length),
            truncations=np.arange(1, length + 1) == (10 if length == 10 else 0),
        )
        for length in range(1, 11)
    ]
    minari.create_dataset_from_buffers(
        "own/steps-v0",
        buffer=episodes,
        observation_space=gymnasium.spaces.Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32)),
        action_space=gymnasium.spaces.Box(-1, 1, (1,)),
        algorithm_name="a script",
        code_permalink="common/recipes/steps.py",
        description="As many points as steps.",
    )
    minari.load_dataset("own/steps-v0").storage.update_metadata({"ref_min_score": 0.0, "ref_max_score": 10.0})
    options = tyro.cli(report.Options, args=["--cards", "own/steps-v0", "--out", str(tmp_path / "cards")])
    drawn, save = [], cards.save
    monkeypatch.setattr(cards, "save", lambda figure, path: drawn.append(figure.axes[0]) or save(figure, path))
    report.main(options)
    bars = [(bar.get_x(), bar.get_height()) for bar in drawn[0].patches]  # of the returns: one of each, 1 to 10
    assert (
        sum(height for _, height in bars) == 10 and bars[0][0] == 1 and drawn[0].get_xlabel() == "return of an episode"
    )
    card = (tmp_path / "cards" / "own-steps-v0.md").read_text()
    assert card.startswith("# own/steps-v0\n\nAs many points as steps.\n")
    for line in (
        "| made by | a script (common/recipes/steps.py) |",
        "| episode length | 1 to 10, median 6 |",
        "| ends | 9 terminated, 1 only cut off |",
        "| actions | `Box(-1.0, 1.0, (1,), float32)` |",
        "| episode return | 5.5 ± 2.872 (mean ± standard deviation) |",
        "| its quantiles | 1, 1.45, 3.25, 5.5, 7.75, 9.55, 10 (0, 5, 25, 50, 75, 95, 100 %) |",
        "| evaluation | no environment in the file |",
        "| reference scores | return 0 scores 0, 10 scores 100 |",
        "![Histogram of the episodes' returns](own-steps-v0.png)",
    ):
        assert line in card.splitlines(), line
    assert "| size | 10 episodes, 55 transitions, " in card
    first = files(tmp_path / "cards")
    report.main(options)
    assert files(tmp_path / "cards") == first and len(first) == 2
    with pytest.raises(SystemExit, match="is not in Minari's folder"):
        cards.write_card("own/other-v0", tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:minari")
def test_card_of_play_that_goes_on_after_a_terminal_row(tmp_path, monkeypatch):
    """Of two episodes one has two terminal rows within it and is cut off, and the other ends in one."""
    import gymnasium
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    episodes = [
        EpisodeBuffer(
            observations=np.zeros((4, 2), np.float32),
            actions=np.zeros((3, 1), np.float32),
            rewards=np.full(3, 2.0),
            terminations=np.array(terminations),
            truncations=np.array([False, False, not terminations[-1]]),
        )
        for terminations in ([True, True, False], [False, False, True])
    ]
    box = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.Box(-1, 1, (1,))
    minari.create_dataset_from_buffers(
        "own/play-v0", buffer=episodes, observation_space=box[0], action_space=box[1], description="Play."
    )
    (tmp_path / "README.md").write_text("Cards\n<!-- report:cards:begin -->\n<!-- report:cards:end -->\n")
    drawn = []
    monkeypatch.setattr(cards, "save", lambda figure, path: drawn.extend(figure.axes[0].patches))
    cards.write_card("own/play-v0", tmp_path)
    assert [bar.get_x() <= 6 <= bar.get_x() + bar.get_width() for bar in drawn if bar.get_height()] == [True]
    card = (tmp_path / "own-play-v0.md").read_text()
    assert "| ends | 1 terminated, 1 only cut off |\n| terminal rows within episodes | 2 |\n" in card
    row = "| [own-play-v0](own-play-v0.md) | 2 episodes, 6 transitions | 6 ± 0 |"
    assert row in (tmp_path / "README.md").read_text().splitlines()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_card_of_a_maze_without_rewards(tmp_path, monkeypatch):
    """Two walks along a row of cells of the U-maze, whose centre is (0, 0): over three cells, and over one."""
    import gymnasium
    import gymnasium_robotics
    import minari
    from minari.data_collector import EpisodeBuffer

    gymnasium.register_envs(gymnasium_robotics)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env = gymnasium.make("PointMaze_UMaze-v3", continuing_task=False)

    def walk(xs):
        at = np.stack([xs, np.ones(len(xs))], axis=1)
        observations = {"achieved_goal": at, "desired_goal": at, "observation": np.concatenate([at, at], axis=1)}
        end, steps = np.arange(2, len(xs) + 1) == len(xs), len(xs) - 1
        actions = np.zeros((steps, 2), np.float32)
        return EpisodeBuffer(observations=observations, actions=actions, rewards=np.zeros(steps),
                             terminations=end & False, truncations=end)  # fmt: skip

    walks = [walk([-1.0, -0.6, -0.4, 0.0, 0.6, 0.9]), walk([1.0, 1.1, 0.8])]
    minari.create_dataset_from_buffers("own/walks-v0", buffer=walks, env=env, eval_env=env, description="Walks.")
    tasks = [{"reset_cell": [1, 1], "goal_cell": [3, 1]}, {"reset_cell": [3, 3], "goal_cell": [1, 1]}]
    minari.load_dataset("own/walks-v0").storage.update_metadata({"eval_tasks": tasks})
    (tmp_path / "README.md").write_text("Cards\n<!-- report:cards:begin -->\n<!-- report:cards:end -->\n")
    drawn = {}
    monkeypatch.setattr(cards, "save", lambda figure, path: drawn.update({path.name: figure}))
    cards.write_card("own/walks-v0", tmp_path)
    card = (tmp_path / "own-walks-v0.md").read_text().splitlines()
    for line in (
        "| evaluation | `PointMaze_UMaze-v3`, 300 steps, 2 tasks in turn |",
        "| episode return | none: no rewards |",
        "| cells of the maze | 3 of 7 are visited; an episode passes 1 to 3 of them, median 2 |",
        "![Where the episodes are, and the tasks](own-walks-v0.png)",
    ):
        assert line in card, line
    assert not [line for line in card if "quantiles" in line or "reference" in line]
    row = "| [own-walks-v0](own-walks-v0.md) | 2 episodes, 7 transitions | none: no rewards |"
    assert row in (tmp_path / "README.md").read_text().splitlines()
    (axes,) = drawn["own-walks-v0.png"].axes
    assert [text.get_text() for text in axes.texts] == ["1", "1", "2", "2"]
    stars = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(stars, [[-1, -1], [-1, 1]], atol=0.2)
    plt.close("all")


def test_list_of_the_committed_cards_is_what_they_say():
    folder = ROOT / "benchmarks" / "cards"
    readme = folder / "README.md"
    assert tables.fill(readme.read_text(), "cards", cards.list_of_cards(folder), readme) == readme.read_text()
    drawn = [card for card in folder.glob("*-v0.md") if "![" in card.read_text()]  # the arm's goals have no picture
    assert len(drawn) > 20 and all(card.with_suffix(".png").exists() for card in drawn)


CARDS = [card for card in sorted((ROOT / "benchmarks" / "cards").glob("*-v0.md")) if "sepsis" not in card.stem]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_committed_cards_are_those_of_the_recipes(card, monkeypatch):
    """What a recipe says of its dataset, without collecting it. Not of icu-sepsis, whose text takes a minute."""
    said = {}
    if card.stem.startswith("ogbench") or "-play-goals-" in card.stem:
        pytest.importorskip("ogbench")
    if card.stem.startswith("minatar"):
        pytest.importorskip("minatar")
    if card.stem.startswith("atari"):
        pytest.importorskip("ale_py")
        pytest.importorskip("cv2")
    if card.stem.startswith("overcooked"):
        pytest.importorskip("overcooked_ai_py")
        pytest.importorskip("pandas")
    monkeypatch.setattr(storage, "write", lambda *args, **fields: said.update(fields))
    monkeypatch.setattr(pointmaze, "collect_walks", lambda *args, **fields: [])
    monkeypatch.setattr(manipulation, "simulators", lambda task: [unittest.mock.MagicMock()] * 3)  # seconds each
    monkeypatch.setattr(traffic_env, "missing", lambda: None)  # nothing is simulated
    monkeypatch.setattr(traffic, "simulator", unittest.mock.MagicMock())
    monkeypatch.setattr(traffic, "returns", lambda behaviour, *_, **__: np.array([behaviour == "queue"]))
    monkeypatch.setattr(driving, "missing", lambda: False)
    monkeypatch.setattr(driving, "simulator", unittest.mock.MagicMock())
    monkeypatch.setattr(driving, "returns", lambda behaviour, *_, **__: np.array([behaviour == "rule"]))
    dataset_id = f"stitch/{card.stem}"
    recipes.find(dataset_id).write(dataset_id, pathlib.Path("nowhere"), 0)
    text = card.read_text()
    assert f"\n\n{said['description']}\n\n" in text
    assert f"| made by | {said['algorithm_name']} ({said['code_permalink']}) |" in text
    if "eval_tasks" in said:
        assert f", {len(said['eval_tasks'])} tasks in turn |" in text and said["reference_scores"] is None
    elif "-play-" not in card.stem:
        low, high = said["reference_scores"]
        assert f"return {low:.6g} scores 0, {high:.6g} scores 100 |" in text
