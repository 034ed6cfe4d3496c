"""benchmarks/plot.py: what is drawn are the numbers of the run folders."""

import json
import pathlib
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
from gymnasium import spaces

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import play  # noqa: E402
import plot  # noqa: E402

# (seeds, evaluations): the mean of the seeds is none of them, and neither the first, the best nor the worst
SCORES = [[10.0, 20.0, 60.0], [0.0, 40.0, 90.0], [5.0, 0.0, 0.0]]


def make_run(folder, scores=SCORES, algo="iql", dataset="stitch/maze-v0", grid=None, **metrics):
    folder.mkdir(parents=True)
    config = {"algo": algo, "dataset": dataset, "seed": 0, "num_seeds": len(scores), "num_updates": 300}
    (folder / "config.json").write_text(json.dumps({"config": config | {"grid": grid or {}}}))
    lines = [
        {"step": 100 * (i + 1), "seed": seed, "grid": {}, "score": row[i]}
        | {name: values[seed][i] for name, values in metrics.items()}
        for i in range(len(scores[0]))
        for seed, row in enumerate(scores)
    ]
    first = [{"step": -100, "seed": seed, "grid": {}, "fit_loss": 1.0} for seed in range(len(scores))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*first, *lines]))
    kind = {"score_kind": "normalised by the dataset's reference scores"}
    (folder / "summary.json").write_text(json.dumps(kind))
    return folder


@pytest.fixture
def figures(monkeypatch):
    """{name of the file: figure} of what is drawn; no file is written."""
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.update({path.name: figure}))
    yield drawn
    plt.close("all")


def draw(*runs):
    configs = [plot.read_config(run) for run in runs]
    plot.plot_learning_curve(runs, configs, pathlib.Path("curve.png"))


def band(axes, i=0):
    """(lowest, highest) of a band at each update."""
    points = axes.collections[i].get_paths()[0].vertices
    return {x: (points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in set(points[:, 0])}


def test_a_learning_curve_is_the_mean_of_the_seeds_between_the_lowest_and_the_highest(tmp_path, figures):
    draw(make_run(tmp_path / "run"))
    (axes,) = figures["curve.png"].axes
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xydata(), [[100, 5], [200, 20], [300, 50]])
    assert band(axes) == {100: (0, 10), 200: (0, 40), 300: (0, 90)}
    assert axes.get_ylabel() == "score" and axes.get_ylim() == (0, 100)


def test_several_runs_are_told_apart_by_what_differs(tmp_path, figures):
    draw(make_run(tmp_path / "a"), make_run(tmp_path / "b", [[30.0, 30.0, 30.0]], "bc"))
    labels = {line.get_label(): line.get_ydata().tolist() for line in figures["curve.png"].axes[0].lines}
    assert labels == {"iql": [5, 20, 50], "bc": [30, 30, 30]}
    draw(tmp_path / "a", make_run(tmp_path / "c"))
    assert [line.get_label() for line in figures["curve.png"].axes[0].lines] == ["iql (a)", "iql (c)"]


def test_the_switch_to_learning_on_line_is_marked(tmp_path, figures):
    # Two evaluations offline, at 100 and 200, and one on-line, after 100 steps
    run = make_run(tmp_path / "run", online_steps=[[None, None, 100]] * 3)
    about = json.loads((run / "config.json").read_text())
    about["config"]["online_steps"] = 100
    (run / "config.json").write_text(json.dumps(about))
    draw(run)
    (axes,) = figures["curve.png"].axes
    curve, mark = axes.lines
    assert curve.get_xdata().tolist() == [100, 200, 300] and list(mark.get_xdata()) == [200, 200]
    assert "from here on-line" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert axes.get_xlabel() == "updates of each seed, then its steps on-line"
    draw(make_run(tmp_path / "offline"))
    assert len(figures["curve.png"].axes[0].lines) == 1


def test_title_is_one_line_and_the_caption_says_what_is_drawn(tmp_path, figures):
    draw(make_run(tmp_path / "run"))
    figure = figures["curve.png"]
    assert figure.get_suptitle() == "stitch/maze-v0"
    below = " ".join(figure.texts[-1].get_text().split())
    assert below == (
        "Lines: mean of 3 seeds; bands: lowest to highest. Score: normalised by the dataset's reference scores."
    )
    figure.draw_without_rendering()
    extent = figure.texts[-1].get_window_extent()
    assert extent.y1 <= min(axes.get_tightbbox().y0 for axes in figure.axes)  # with its legend


def test_an_evaluation_that_failed_leaves_a_gap(tmp_path, figures):
    scores = [[10.0, None, 60.0], [0.0, None, 90.0], [5.0, 1.0, 0.0]]
    draw(make_run(tmp_path / "run", scores))
    np.testing.assert_array_equal(figures["curve.png"].axes[0].lines[0].get_ydata(), [5, np.nan, 50])


def test_of_runs_without_scores_the_losses_are_drawn(tmp_path, figures, capsys):
    nothing = [[None] * 3] * 2
    critic, actor = [[4.0, 2.0, 1.0], [8.0, 4.0, None]], [[-1.0, -2.0, -3.0], [-3.0, -4.0, -5.0]]
    draw(make_run(tmp_path / "run", nothing, critic_loss=critic, actor_loss=actor, q=critic))
    panels = {axes.get_title(): axes for axes in figures["curve.png"].axes}
    assert panels.keys() == {"critic_loss", "actor_loss"}  # nor what belongs to a first phase
    np.testing.assert_array_equal(panels["critic_loss"].lines[0].get_ydata(), [6, 3, np.nan])
    np.testing.assert_array_equal(panels["actor_loss"].lines[0].get_xydata(), [[100, -2], [200, -3], [300, -4]])
    assert "not scored" in figures["curve.png"].texts[-1].get_text().lower()
    draw(tmp_path / "run", make_run(tmp_path / "scored"))
    assert len(figures["curve.png"].axes[0].lines) == 1 and "was not scored: it has no line" in capsys.readouterr().out


def test_a_run_with_neither_scores_nor_losses_is_said(tmp_path, figures, capsys):
    draw(make_run(tmp_path / "run", [[None] * 3]))
    assert not figures and "neither scores nor losses" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["7", "[1]", "null", "{", "", "not json"])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
def test_a_foreign_file_is_one_sentence(tmp_path, figures, name, content):
    run = make_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(SystemExit, match=r"run (cannot be read \(|has no evaluation yet)"):
        draw(run)


def test_bad_options_are_one_sentence(tmp_path):
    run, grid = make_run(tmp_path / "run"), make_run(tmp_path / "grid", grid={"beta": [1.0, 3.0]})
    for options, sentence in (
        (dict(runs=()), "Name at least one run folder"),
        (dict(runs=(run, run)), "say with --out"),
        (dict(runs=(tmp_path,)), "is not a run folder"),
        (dict(runs=(grid,)), f"python benchmarks/report.py {grid} shows it"),
        (dict(runs=(run,), data_episodes=0), "--data-episodes must be at least 1, not 0"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            plot.main(plot.Options(**options))


class Corridor:
    """From (0, 0) one step along an axis per unit of action; a reward of 1 at the goal, (3, 0)."""

    metadata = {}
    spec = None
    action_space = spaces.Box(-1, 1, (2,))
    unwrapped = property(lambda self: self)

    seeds = []

    def reset(self, seed, options):
        self.at, self.seed = np.zeros(2), seed
        self.seeds.append(seed)
        return self.seen(), {}

    def step(self, action):
        self.at = self.at + action
        return self.seen(), float(self.at[0] == 3), bool(self.at[0] == 3), False, {}

    def seen(self):
        return {"achieved_goal": self.at.copy(), "desired_goal": np.array([3.0, 0.0])}


class Walker:
    """Seed 0 walks to the goal, and seed 1 the other way."""

    step, episode, interface = 700, None, types.SimpleNamespace(goal=None)

    def __init__(self, row):
        self.way = np.array([1.0, 0.0]) * (-1 if row else 1)

    def __call__(self, observation, reward=None):
        return self.way


def test_rollouts_of_a_maze_are_those_of_each_seed_s_policy(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "restore", lambda run, config, row: Walker(row))
    monkeypatch.setattr(Corridor, "seeds", [])
    config = {"algo": "iql", "seed": 5, "num_seeds": 2, "eval_episodes": 2}
    step, paths, reached = plot.rollouts(tmp_path, config, Corridor(), steps=4)
    assert step == 700 and reached.tolist() == [True, True, False, False]
    np.testing.assert_array_equal(paths[0], [[0, 0], [1, 0], [2, 0]])
    np.testing.assert_array_equal(paths[3], [[0, 0], [-1, 0], [-2, 0], [-3, 0]])
    assert Corridor.seeds == [start for start, _ in play.starts(5, 2) + play.starts(6, 2)]


def test_a_dense_reward_does_not_say_whether_the_goal_was_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "restore", lambda run, config, row: Walker(row))
    monkeypatch.setattr(Corridor, "reward_type", "dense", raising=False)
    monkeypatch.setattr(Corridor, "step", lambda self, action: (self.walk(action), 0.5, False, False, {}))
    monkeypatch.setattr(
        Corridor, "walk", lambda self, a: setattr(self, "at", self.at + a) or self.seen(), raising=False
    )
    config = {"algo": "iql", "seed": 5, "num_seeds": 2, "eval_episodes": 1}
    assert plot.rollouts(tmp_path, config, Corridor(), steps=5)[2].tolist() == [True, False]


class Maze:
    """Three rows of four cells of 2 m, walls around two free cells: at (-1, 0) and (1, 0)."""

    maze_size_scaling, map_width, map_length = 2.0, 4, 3
    maze_map = [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]
    unique_reset_locations, unique_goal_locations = [np.array([-1.0, 0.0])], [np.array([1.0, 0.0])]

    def cell_rowcol_to_xy(self, at):  # as gymnasium-robotics has it
        return np.array([(at[1] + 0.5) * 2 - 4, 3 - (at[0] + 0.5) * 2])


class InMaze(Corridor):
    maze, position_noise_range = Maze(), 0.25


def test_walls_are_where_the_maze_has_them_with_its_start_and_goal():
    _, axes = plt.subplots()
    plot.draw_maze(axes, plot.maze_of(InMaze(), [None]))
    walls = {(*map(float, wall.get_xy()), wall.get_width(), wall.get_height()) for wall in axes.patches}
    middles = {(x + 1, y + 1) for x, y, *_ in walls}
    assert middles == {(x, y) for x in (-3, -1, 1, 3) for y in (-2, 0, 2)} - {(-1, 0), (1, 0)}
    assert {wall[2:] for wall in walls} == {(2, 2)}
    marks = {line.get_marker(): line.get_xydata().tolist() for line in axes.lines}
    assert marks == {"o": [[-1, 0]], "*": [[1, 0]]}
    assert axes.get_xlim() == pytest.approx((-8 / 3, 8 / 3)) and axes.get_ylim() == pytest.approx((-5 / 3, 5 / 3))
    plt.close("all")


def test_rollouts_are_coloured_and_counted_by_what_they_reach():
    _, axes = plt.subplots()
    paths = [np.array([[0, 0], [1.0, 0]]), np.array([[0, 0], [0.0, 2]]), np.array([[0, 0], [3.0, 0]])]
    plot.draw_rollouts(axes, plot.maze_of(InMaze(), [None]), "a title", paths, np.array([True, False, True]))
    lines = [(line.get_color(), line.get_xydata()[-1].tolist()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert lines == [(plot.REACHED, [1, 0]), (plot.REACHED, [3, 0]), (plot.MISSED, [0, 2])]  # the missed one on top
    ends = [line for line in axes.lines if line.get_marker() == "X"]
    assert [line.get_xydata().tolist() for line in ends] == [[[0, 2]]] and ends[0].get_color() == plot.MISSED
    assert axes.get_title() == "a title" and axes.get_xlabel().startswith("2 of 3 roll-outs come within 0.45 m")
    plt.close("all")


def test_data_are_drawn_as_a_sample_and_counted_whole():
    """Of 3 walks one visits both cells, one the start alone, and one is in neither: x or y by itself is not enough."""
    both, one = np.array([[-1.0, 0.0], [0.9, 0.9]]), np.array([[-1.9, 0.5], [-1.0, 0.0]])
    neither = np.array([[-1.0, 2.0], [3.0, 0.0]])
    maze = plot.maze_of(InMaze(), [None])
    assert [plot.visits(maze, path, maze.starts) for path in (both, one, neither)] == [True, True, False]
    assert [plot.visits(maze, path, maze.goals) for path in (both, one, neither)] == [True, False, False]
    _, axes = plt.subplots()
    plot.draw_data(axes, maze, [both, one, neither], 2, False)
    assert axes.get_title() == "Data: 3 episodes, 1 visit both start and goal"
    assert axes.get_xlabel().startswith("2 of them")
    thin = [line for line in axes.lines if line.get_linewidth() == 1 and len(line.get_xdata()) == 2]
    assert len(thin) == 2 and all(
        any(np.array_equal(line.get_xydata(), path) for path in (both, one, neither)) for line in thin
    )
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert sorted(line.get_xydata()[0].tolist() for line in dots) == sorted(
        line.get_xydata()[0].tolist() for line in thin
    )
    plt.close("all")


def test_walks_that_lie_apart_are_the_farthest_from_those_chosen():
    assert plot.apart(np.array([[0.0, 0], [1, 0], [10, 0], [9, 0], [5, 0]]), 3) == [0, 2, 4]
    assert plot.apart(np.zeros((2, 2)), 7) == [0, 0]


def test_walks_of_a_maze_are_where_the_agent_was(umaze):
    walks = plot.walks_of("stitch/pointmaze-umaze-v0")
    assert len(walks) == umaze.total_episodes and sum(map(len, walks)) == umaze.total_steps
    np.testing.assert_array_equal(walks[3], next(iter(umaze.iterate_episodes([3]))).observations["achieved_goal"][:-1])


def plot_maze(tmp_path, figures, monkeypatch, **changes):
    monkeypatch.setattr(play, "make_env", lambda dataset_id: InMaze())
    monkeypatch.setattr(play, "dataset_tasks", lambda dataset_id: [None])
    monkeypatch.setattr(plot, "walks_of", lambda dataset_id: [np.zeros((2, 2))] * 3)
    monkeypatch.setattr(plot, "restore", lambda run, config, row: Walker(row))
    run = make_run(tmp_path / "run")
    (run / "checkpoint.msgpack").touch()
    config = plot.read_config(run) | {"num_seeds": 2, "eval_episodes": 2, "eval_steps": 4} | changes
    plot.plot_maze([run], [config], 150, pathlib.Path("maze.png"))
    return figures.get("maze.png")


def test_a_maze_has_a_panel_of_data_and_one_for_each_policy(tmp_path, figures, monkeypatch):
    figure = plot_maze(tmp_path, figures, monkeypatch)
    assert [axes.get_title() for axes in figure.axes] == [
        "Data: 3 episodes, none visits both start and goal", "Policy: iql, 700 updates"
    ]  # fmt: skip
    assert figure.axes[1].get_xlabel().startswith("2 of 4 roll-outs")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["start, ± 0.5 m", "goal, ± 0.5 m"]


def test_a_run_that_promises_to_make_no_environment_draws_no_maze(tmp_path, figures, monkeypatch, capsys):
    assert plot_maze(tmp_path, figures, monkeypatch, eval_episodes=0) is None
    assert "such a run promises that no environment is made" in capsys.readouterr().out


def test_scores_below_zero_and_above_a_hundred_are_in_the_picture(tmp_path, figures):
    draw(make_run(tmp_path / "run", [[-30.0, 130.0, 20.0]]))
    low, high = figures["curve.png"].axes[0].get_ylim()
    assert low <= -30 and high >= 130


def test_one_seed_is_no_band_and_an_unfinished_run_is_said(tmp_path, figures, capsys):
    run = make_run(tmp_path / "run", [[10.0, 20.0, 30.0]])
    (run / "summary.json").unlink()
    draw(run)
    assert figures["curve.png"].texts[-1].get_text() == "One seed."
    assert "is not finished: its line ends before update 300" in capsys.readouterr().out


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    figure, _ = plt.subplots()
    (tmp_path / "a.png").write_bytes(b"the old one")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plot.save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"the old one"


def test_starts_are_those_of_the_run_s_own_evaluation(umaze):
    """Of seed 5's first two episodes, in the environment of the dataset."""
    from common.datasets import load_dataset

    _, env = load_dataset("stitch/pointmaze-umaze-v0")
    ours = play.make_env("stitch/pointmaze-umaze-v0")
    still = np.zeros((1, 2, 2), np.float32)
    theirs = env.evaluate(lambda obs, step, memory, rewards: (still, None), [5], 2).obs[0]
    starts = [env.interface.observe(ours.reset(seed=start)[0]) for start, _ in play.starts(5, 2)]
    np.testing.assert_array_equal(np.stack(starts), theirs)


# --- Tasks ---------------------------------------------------------------------------------------------


class Rooms:
    """As an OGBench maze: a row of four free cells between walls, 4 units wide, in which a point goes right."""

    metadata, spec, action_space = {}, None, spaces.Box(-1, 1, (2,))
    unwrapped = property(lambda self: self)
    maze_map = np.array([[1] * 6, [1, 0, 0, 0, 0, 1], [1] * 6])
    _maze_unit, _noise, _goal_tol = 4.0, 1, 1.0
    task_infos = [{"init_xy": (0, 0), "goal_xy": (4 * k, 0)} for k in (1, 2)]

    def ij_to_xy(self, cell):
        return 4 * (cell[1] - 1), 4 * (cell[0] - 1)

    def reset(self, seed, options):
        self.at, self.goal = np.zeros(2), np.array(self.task_infos[options["task_id"] - 1]["goal_xy"])
        return self.at.copy(), {"goal": self.goal}

    def step(self, action):
        self.at = self.at + action
        near = bool(np.abs(self.at - self.goal).max() <= 1)
        return self.at.copy(), float(near), near, False, {}


class Right:
    step, episode, interface = 700, None, types.SimpleNamespace(goal=[2], observation=[2])

    def __call__(self, x, reward=None):
        assert x.keys() == {"observation", "goal"}
        return np.array([1.0, 0.0])


def test_a_maze_with_tasks_has_a_panel_for_each(tmp_path, monkeypatch, figures):
    """The first goal is three steps away, the second one seven, and there are five."""
    run, tasks = make_run(tmp_path / "run"), [{"task_id": 1}, {"task_id": 2}]
    config = {"algo": "iql", "dataset": "own/rooms-v0", "seed": 0, "num_seeds": 2, "eval_episodes": 4, "eval_steps": 5}
    (run / "checkpoint.msgpack").touch()
    monkeypatch.setattr(plot, "restore", lambda run, config, row: Right())
    monkeypatch.setattr(play, "make_env", lambda dataset_id: Rooms())
    monkeypatch.setattr(play, "dataset_tasks", lambda dataset_id: tasks)
    monkeypatch.setattr(plot, "walks_of", lambda dataset_id: [np.zeros((9, 2)), np.ones((9, 2))])
    plot.plot_maze([run, run], [config, config], 5, tmp_path / "maze.png")
    axes = figures["maze.png"].axes
    titles = [panel.get_title() for panel in axes if panel.get_visible()]
    of_runs = [f"iql (run), task {k}: {share} %" for k, share in ((1, 100), (2, 0))]
    assert titles == ["Data: 2 episodes", *of_runs, *of_runs]
    assert [panel.get_xlabel().split(" roll")[0] for panel in axes[1:3]] == ["4 of 4", "0 of 4"]
    goal = [line.get_xydata()[0].tolist() for line in axes[2].lines if line.get_marker() == "*"]
    assert goal == [[8, 0]] and len(axes[2].patches) == 14  # its own alone; and the walls
    assert axes[1].get_xlim() == pytest.approx((-4 + 4 / 6, 16 - 4 / 6))


def test_a_maze_of_gymnasium_robotics_has_the_marks_of_its_tasks_or_of_its_map(umaze):
    env = play.make_env("stitch/pointmaze-umaze-v0")
    maze = plot.maze_of(env, [None])
    assert len(maze.walls) == 18 and maze.size == 1 and maze.radius == 0.45 and maze.jitter == 0.25
    np.testing.assert_array_equal([maze.starts, maze.goals], [[[-1, 1]], [[-1, -1]]])  # "r" and "g" of its map
    tasks = [{"reset_cell": [3, 3], "goal_cell": [1, 3]}]
    maze = plot.maze_of(env, tasks)
    np.testing.assert_array_equal([maze.starts, maze.goals], [[[1, -1]], [[1, 1]]])
    assert plot.maze_of(types.SimpleNamespace(unwrapped=None), [None]) is None
