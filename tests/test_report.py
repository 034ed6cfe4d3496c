"""benchmarks/report.py: its estimators and its model selection have known answers; its tables are the result files."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import tyro

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import report  # noqa: E402

# (datasets, seeds) of two methods
A = list(np.array([[40, 55, 45, 70, 60], [10, 20, 0, 35, 5], [90, 80, 85, 95, 100]], float))
B = list(np.array([[50, 30, 45, 20, 65], [10, 15, 20, 25, 30], [60, 90, 75, 85, 70]], float))


def make_run(folder, dataset, scores, algo="iql", kind="normalised by the dataset's reference scores", **fields):
    """A run folder as main leaves it: two evaluations of two episodes each, of which the last has these scores."""
    folder.mkdir(parents=True)
    returns = [[score / 100, score / 100] for score in scores]
    lines = [
        {"step": step, "seed": seed, "score": score * step / 500, "returns": returns[seed]}
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
    return tmp_path


def write_tables(root):
    """What a report writes, without its pictures."""
    folder = root / "benchmarks" / "results" / "quick"
    report.write_tables(root, "quick", report.read_runs(folder), report.read_failures(folder), check=False)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- Estimators -----------------------------------------------------------------------------------------


def test_estimators_and_intervals_are_those_of_rliable():
    """rliable 1.2.0 with pandas 2, on the transposed arrays: its point estimates, and its intervals from 20,000 samples
    or more, which are themselves only good to about one run's share."""
    np.testing.assert_allclose([report.iqm(A), report.iqm(B)], [54.444444, 43.888889], rtol=1e-6)
    np.testing.assert_allclose([report.mean(A), report.mean(B)], [52.666667, 46.0], rtol=1e-6)
    np.testing.assert_allclose(report.interval(report.iqm, A), [47.8, 60.6], atol=0.7)
    np.testing.assert_allclose(report.interval(report.iqm, B), [36.1, 52.2], atol=0.7)
    np.testing.assert_allclose(report.interval(report.mean, A), [47.7, 58.0], atol=0.4)
    np.testing.assert_allclose(report.improvement(A, B), 0.62)
    np.testing.assert_allclose(report.interval(report.improvement, A, B), [0.433, 0.8], atol=0.02)
    levels = np.array([20.0, 50.0, 85.0])  # each the score of a run, which is not above it
    np.testing.assert_allclose(report.profile(A, levels), [0.733333, 0.533333, 0.2], rtol=1e-5)
    shares = report.interval(lambda row: report.profile(row, levels), A)
    np.testing.assert_allclose(shares, [[0.667, 0.4, 0.067], [0.867, 0.667, 0.333]], atol=0.001)


def test_interval_is_stratified():
    """Each dataset keeps its seeds: where those agree, there is no spread, however far apart the datasets are."""
    row = [np.zeros(4), np.full(3, 100.0)]
    np.testing.assert_allclose(report.interval(report.mean, row), 50)


def test_interval_is_the_same_with_every_numpy():
    row = [np.array([2.0, 3, 5, 7, 11, 13, 17, 19, 23]) ** 2]
    np.testing.assert_allclose(report.interval(report.mean, row), [69.555556, 289.008333], rtol=1e-7)


def test_improvement_counts_a_tie_as_half():
    row = [np.array([1.0, 2.0]), np.array([3.0])]
    assert report.improvement(row, row) == 0.5
    assert report.improvement([np.array([1.0, 3.0])], [np.array([2.0, 2.0, 2.0])]) == 0.5


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
    assert readme.endswith(f" Published: {report.PUBLISHED['source']}.\n<!-- report:quick:end -->\nbelow\n")
    page = (root / "algos" / "bc.md").read_text()
    assert "[5.0](../benchmarks/results/quick/D4RL/door/human-v2/bc) (5.0 to 5.0); published 2.3 |" in page
    assert "| [bc](../algos/bc.md)" in page and "| [bc-top-10](../algos/bc.md)" in page and "iql" not in page
    assert "own-v0" not in page  # no run of bc
    runs = report.read_runs(root / "benchmarks" / "results" / "quick")
    assert "not comparable" in report.table([run for run in runs if run.dataset == "stitch/maze-v0"], [], ".")
    assert report.table(runs, [], ".", "cql") == "No run yet."
    for link in [part.split(")")[0] for part in readme.split("](")[1:]]:
        assert (root / link).is_dir() or link.endswith((".md", ".png")), link


def test_a_page_shows_what_the_critic_believes_and_what_is_true(root):
    """Of the last evaluation of each seed; README does not show it, nor a page of a method without a critic."""
    run = root / "benchmarks" / "results" / "quick" / "maze-v0" / "iql"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [{"believed_value": 1000.0 * line["step"] + line["seed"], "true_value": 2.0} for line in lines]
    text = "".join(json.dumps(line | value) + "\n" for line, value in zip(lines, values, strict=True))
    (run / "metrics.jsonl").write_text(text)
    runs = report.read_runs(root / "benchmarks" / "results" / "quick")
    page = report.table(runs, [], ".", "iql")
    assert "| believed − true value | – | – | +499,999 (2) | – |" in page and "less what the policy gets" in page
    assert all("believe" not in text for text in (report.table(runs, [], "."), report.table(runs, [], ".", "bc")))


def test_a_second_report_changes_nothing(root):
    report.main(report.Options())
    first = files(root)
    pictures = {path.name for path in first if path.suffix == ".png"}
    curves = {f"learning_curves_{name}.png" for name in ("maze-v0", "D4RL-door-human-v2", "own-v0")}
    assert pictures == curves | {"iqm.png", "performance_profiles.png", "probability_of_improvement.png"}
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
    methods = {run.method for run in report.read_runs(results)}
    assert methods == {"iql", "bc", "bc-top-10", "single"}
    said = capsys.readouterr().out
    assert "grid is a grid" in said and "blind was not scored" in said
    with pytest.raises(SystemExit, match="no finished run"):
        report.read_runs(tmp_path / "nothing")


def test_one_seed_has_no_interval():
    assert report.with_interval(report.mean, [np.array([12.34])]) == "12.3"


def test_aggregates_are_over_what_most_methods_have(root):
    results = root / "benchmarks" / "results" / "quick"
    make_run(results / "own-v0" / "bc", "own-v0", [1500.0, 2500.0, 2000.0], "bc", kind="raw return")
    for method in ("x", "y"):
        make_run(results / "maze-v0" / method, "stitch/maze-v0", [1.0, 2.0, 3.0])
        make_run(results / "D4RL" / "door" / "human-v2" / method, "D4RL/door/human-v2", [1.0, 2.0, 3.0])
    for method in ("bc", "x", "y"):  # three methods of five, where four have the door and five the maze
        make_run(results / "rare-v0" / method, "stitch/rare-v0", [1.0, 2.0, 3.0])
    datasets, rows = report.comparable(report.read_runs(results), [])
    assert datasets == ["D4RL/door/human-v2", "stitch/maze-v0"]
    assert rows.keys() == {"iql", "bc", "x", "y"}  # bc-top-10 lacks one
    np.testing.assert_array_equal(rows["bc"], [[5, 5, 5], [10, 20, 0]])


def test_committed_tables_are_those_of_the_committed_result_files():
    if (ROOT / "benchmarks" / "results" / "quick").exists():
        report.main(report.Options(check=True))
    else:
        between = (ROOT / "README.md").read_text().partition("<!-- report:quick:begin -->")[2]
        assert between.partition("<!-- report:quick:end -->")[0].strip() == ""


# --- Model selection ------------------------------------------------------------------------------------


def test_selection_among_policies_that_never_vary():
    """With scores 0, 1, 2, 3 and no noise, m episodes try m policies: E[the highest of m] = 5 m / (m + 1) - 1."""
    scores = np.arange(4.0)
    chosen = report.selection_curve(np.tile(scores[:, None] - 9, (1, 5)), scores, 6, num_trials=20_000).mean(axis=1)
    np.testing.assert_allclose(chosen[:5], [1.5, 1.5, 7 / 3, 11 / 4, 3], atol=0.04)
    np.testing.assert_array_equal(chosen[4:], 3)


def test_selection_draws_its_candidates_anew_in_each_trial():
    """Of 4 policies 2 are candidates: the better of two is 5 * 2 / 3 - 1 on average, however long one looks."""
    scores = np.arange(4.0)
    chosen = report.selection_curve(scores[:, None], scores, 20, num_candidates=2, num_trials=20_000).mean(axis=1)
    np.testing.assert_allclose(chosen[[0, 2, 20]], [1.5, 7 / 3, 7 / 3], atol=0.04)


def test_selection_between_two_coins():
    """Returns 1 with probability 3/4 (policy x) or 1/4 (y), scores 75 and 25.

    Two episodes try both; x is chosen if it wins, 9/16, or by half of the ties, 6/16: 3/4 in all. The third goes to the
    one with the higher mean. (x, y) = (1, 0): x stays ahead. (0, 1): y does. (1, 1), 3/16: if the tie breaks to x, a 1
    leaves a tie, which breaks to x again, and a 0 makes y better; if to y, likewise: x with probability 3/4. (0, 0),
    3/16: the other one never gets ahead: 1/2. Together 9/16 + 3/16 * 3/4 + 3/16 * 1/2 = 51/64.
    """
    returns = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
    chosen = report.selection_curve(returns, [75.0, 25.0], 3, num_trials=40_000).mean(axis=1)
    expected = 25 + 50 * np.array([1 / 2, 1 / 2, 3 / 4, 51 / 64])
    np.testing.assert_allclose(chosen, expected, atol=0.6)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_selection_comes_back_to_a_policy_that_had_bad_luck(scale):
    """One policy always returns 0.5, the other 1 in three of four episodes and else 0. Greed would leave the better one
    for good after a first 0, in a quarter of the trials; the bonus brings it back, whatever the scale of returns."""
    returns = scale * np.array([[0.5] * 4, [1.0, 1.0, 1.0, 0.0]])
    chosen = report.selection_curve(returns, [50.0, 75.0], 300, num_trials=2_000).mean(axis=1)
    np.testing.assert_allclose(chosen[2], 50 + 25 * 3 / 4, atol=1.5)
    assert chosen[300] > 74


def test_selection_does_not_waste_episodes_on_policies_that_are_plainly_worse():
    """Coins of 0.7 and 0.55 among six policies that always fail. Split evenly, 400 episodes are 50 for each, and the
    better coin is chosen with probability Phi(0.15 / sqrt((0.7 * 0.3 + 0.55 * 0.45) / 50)) = 0.94."""
    returns = np.zeros((8, 20))
    returns[0, :14] = returns[1, :11] = 1
    chosen = report.selection_curve(returns, [1.0] + [0.0] * 7, 400)
    assert chosen[400].mean() > 0.98


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
        report.report_selection([tmp_path / "nowhere"], 8, tmp_path)
    make_run(tmp_path / "blind", "stitch/maze-v0", [float("nan")])
    with pytest.raises(SystemExit, match="not all runs were scored"):
        report.report_selection([tmp_path / "blind"], 8, tmp_path)


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
    report.main(options)
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
        report.write_card("own/other-v0", tmp_path)
