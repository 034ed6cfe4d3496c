"""The datasets that can be built anywhere: what the mazes' walks hold, and that a build is atomic and repeatable."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from common import recipes
from common.recipes import pointmaze

UMAZE_ID = "stitch/pointmaze-umaze-v0"
UMAZE = pointmaze.UMAZE.map
START, GOAL = pointmaze.find_cell(UMAZE, "r"), pointmaze.find_cell(UMAZE, "g")


@pytest.fixture(scope="session")
def episodes(umaze):
    return list(umaze)


@pytest.fixture
def behaviour_env():
    env = pointmaze.make_behaviour_env(pointmaze.UMAZE, walk_cells=2)
    yield env
    env.close()


@pytest.fixture
def quick_recipe(tmp_path, monkeypatch):
    """A recipe of a few walks in an empty Minari root. Returns the root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setitem(recipes.RECIPES, UMAZE_ID, recipes.Recipe(build_few_walks, 500))
    return tmp_path


def build_few_walks(dataset_id, data_path, num_transitions=500):
    pointmaze.umaze_stitch(dataset_id, data_path, num_transitions)


def run_python(code, **environ):
    """Runs `code` in a fresh interpreter, without the environ of this one, which an import may have changed already."""
    environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run([sys.executable, "-c", code], env=environ)


def visited_cells(episode, maze_map=UMAZE):
    """The cells of an episode's T + 1 positions, in order, each repeated once per step."""
    # Computed from the definition of the map (cells 1 m wide, centred on the origin), not with the recipe's functions.
    x, y = episode.observations["achieved_goal"].T
    i, j = len(maze_map) / 2 - y, x + len(maze_map[0]) / 2
    return list(zip(np.floor(i).astype(int).tolist(), np.floor(j).astype(int).tolist(), strict=True))


# --- Maze functions, on numbers worked by hand -------------------------------------------------------


def test_bfs_distances_and_next_cell():
    distances = pointmaze.bfs_distances(UMAZE, GOAL)
    # The U from its goal (3, 1): right along the bottom, up on the right, left along the top.
    u = [(3, 1), (3, 2), (3, 3), (2, 3), (1, 3), (1, 2), (1, 1)]
    assert distances == {cell: k for k, cell in enumerate(u)}
    assert all(pointmaze.next_cell(UMAZE, distances, u[k]) == u[k - 1] for k in range(1, 7))


def test_walk_targets():
    # From (3, 2), one step from the end of the U: the end itself, and two steps the other way.
    assert pointmaze.walk_targets(UMAZE, (3, 2), walk_cells=2) == [(2, 3), (3, 1)]
    assert pointmaze.walk_targets(UMAZE, (3, 3), walk_cells=2) == [(1, 3), (3, 1)]
    assert pointmaze.walk_targets(UMAZE, (1, 1), walk_cells=2) == [(1, 3)]


def test_cell_centre_agrees_with_environment(behaviour_env):
    for cell in pointmaze.free_cells(UMAZE):
        expected = behaviour_env.unwrapped.maze.cell_rowcol_to_xy(np.array(cell))
        np.testing.assert_array_equal(pointmaze.cell_centre(UMAZE, cell), expected)


def test_pd_action():
    # 10 (1 - 0.5) - 1 * 2 = 3 along x; 10 (0 - 0) - 1 * (-1) = 1 along y.
    action = pointmaze.pd_action(np.array([0.5, 0.0]), np.array([2.0, -1.0]), np.array([1.0, 0.0]))
    np.testing.assert_allclose(action, [3.0, 1.0])


# --- What the data hold -----------------------------------------------------------------------------


def test_no_episode_connects_start_and_goal(episodes):
    """Geometry only. The jitter (0.25 m) and the overshoot stay within a cell (0.5 m from its centre): no tolerance."""
    distances = {c: pointmaze.bfs_distances(UMAZE, c) for c in pointmaze.free_cells(UMAZE)}
    for episode in episodes:
        visited = set(visited_cells(episode))
        assert max(distances[a][b] for a in visited for b in visited) <= 2
        reaches_goal = episode.rewards.any() or GOAL in visited
        assert not (reaches_goal and START in visited)


def test_all_episodes_together_connect_start_and_goal(episodes):
    """Walks that overlap by a cell or more form a path: the union of cell-to-cell moves leads from start to goal."""
    moves = {move for e in episodes for move in zip(visited_cells(e)[:-1], visited_cells(e)[1:], strict=True)}
    reached = {START}
    for _ in pointmaze.free_cells(UMAZE):
        reached |= {b for a, b in moves if a in reached}
    assert GOAL in reached
    assert reached == set(pointmaze.free_cells(UMAZE))


def test_walks_start_everywhere_and_go_both_ways(episodes):
    """At least 20 walks towards the goal and 20 away from it, from every cell where there is such a walk."""
    to_goal = pointmaze.bfs_distances(UMAZE, GOAL)
    ways = {(cell, sign): 0 for cell in to_goal for sign in (-1, 0, 1)}
    for episode in episodes:
        cells = visited_cells(episode)
        # A walk of one cell that ends within 0.45 m of the goal may end before it has left its cell: sign 0.
        ways[cells[0], np.sign(to_goal[cells[-1]] - to_goal[cells[0]])] += 1
    for cell in to_goal:
        if cell == GOAL:
            assert ways[cell, -1] == ways[cell, 0] == ways[cell, 1] == 0
            continue
        assert ways[cell, -1] + ways[cell, 0] >= 20, cell
        if cell != START:
            assert ways[cell, 1] >= 20, cell


def test_most_walks_lead_away_from_the_goal(episodes):
    """Otherwise imitation, carried on by the ball's momentum, solves the task: see the docstring of the recipe."""
    to_goal = pointmaze.bfs_distances(UMAZE, GOAL)
    for cell in [(1, 3), (2, 3), (3, 3)]:  # two cells or more from both ends of the U
        ends = [to_goal[visited_cells(e)[-1]] for e in episodes if visited_cells(e)[0] == cell]
        assert 0.6 < np.mean(np.array(ends) > to_goal[cell]) < 0.9  # 3 : 1 of about 110 walks, within 3.5 deviations


def test_one_goal(episodes):
    """The goal of every observation is in the goal's cell, and does not move within an episode."""
    for episode in episodes:
        goal = episode.observations["desired_goal"]
        assert (goal == goal[0]).all()
        assert np.abs(goal[0] - pointmaze.cell_centre(UMAZE, GOAL)).max() <= 0.25  # the environment's jitter


def test_ends_and_rewards(episodes):
    """Terminated at the goal with reward 1, truncated everywhere else."""
    goals_reached = 0
    for episode in episodes:
        terminated = bool(episode.terminations[-1])
        goals_reached += terminated
        obs = episode.observations
        at_goal = np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1)[1:] <= 0.45
        np.testing.assert_array_equal(episode.terminations, at_goal)
        np.testing.assert_array_equal(episode.rewards, at_goal.astype(float))
        np.testing.assert_array_equal(episode.truncations[:-1], False)
        assert episode.truncations[-1] == (not terminated)
    assert 30 <= goals_reached <= len(episodes) / 4


def test_shapes_types_and_sizes(umaze, episodes):
    for episode in episodes:
        t = len(episode.actions)
        assert len(episode.rewards) == len(episode.terminations) == len(episode.truncations) == t > 0
        for name, space in umaze.observation_space.items():
            assert episode.observations[name].shape == (t + 1, *space.shape)
            assert episode.observations[name].dtype == space.dtype
        assert episode.actions.shape == (t, 2)
        assert episode.actions.dtype == umaze.action_space.dtype
        assert np.abs(episode.actions).max() <= 1
    assert sum(len(e.actions) for e in episodes) == umaze.total_steps
    assert 45_000 <= umaze.total_steps <= 60_000


def test_actions_are_noisy(episodes):
    """Ideal PD actions would be a function of the state; the noise's deviation is what the recipe says it is."""
    residual = []
    for episode in episodes:
        position, velocity = np.split(episode.observations["observation"][0], 2)
        cell = visited_cells(episode)[0]
        # At rest and out of the waypoint's radius, the first waypoint is the centre of the start's own cell.
        centre = pointmaze.cell_centre(UMAZE, cell)
        if np.linalg.norm(centre - position) > pointmaze.WAYPOINT_RADIUS:
            residual.append(episode.actions[0] - np.clip(10 * (centre - position) - velocity, -1, 1))
    residual = np.concatenate(residual)
    assert 0.2 < np.abs(residual).mean() < 0.5  # E|noise| is 0.4, less what the clipping to [-1, 1] takes away


# --- The other mazes --------------------------------------------------------------------------------


@pytest.mark.parametrize("walk_cells, away", [(2, 0.75), (None, 0.5)])
def test_only_short_walks_prefer_to_lead_away_from_the_goal(monkeypatch, walk_cells, away):
    """From (2, 3), the middle of the U, as many targets are nearer to the goal as farther: all weigh the same in long
    walks, and a farther one three times as much in short ones."""
    to_goal = pointmaze.bfs_distances(UMAZE, GOAL)
    monkeypatch.setattr(pointmaze, "walk", lambda env, maze_map, start, target, **_: (start, target))
    rng = np.random.default_rng(0)
    drawn = [pointmaze.random_walk(None, UMAZE, walk_cells, rng) for _ in range(6000)]
    farther = [to_goal[target] > to_goal[start] for start, target in drawn if start == (2, 3)]
    assert len(farther) > 800
    assert abs(np.mean(farther) - away) < 2 / len(farther) ** 0.5  # four deviations


@pytest.mark.parametrize(
    "name, maze, distance, time_limit",
    [
        ("umaze-navigate", pointmaze.UMAZE, 6, 300),
        ("medium-stitch", pointmaze.MEDIUM, 10, 600),
        ("medium-navigate", pointmaze.MEDIUM, 10, 600),
        ("large-stitch", pointmaze.LARGE, 15, 800),
        ("large-navigate", pointmaze.LARGE, 15, 800),
    ],
)
def test_walks_of_a_maze(quick_recipe, name, maze, distance, time_limit):
    """Short walks never lead from the start of the evaluation to its goal, long ones cross the maze."""
    import minari
    from gymnasium_robotics.envs.maze import maps

    map_of_package = getattr(maps, {6: "U_MAZE", 10: "MEDIUM_MAZE", 15: "LARGE_MAZE"}[distance])
    assert [[0 if cell in ("r", "g") else cell for cell in row] for row in maze.map] == map_of_package
    distances = {c: pointmaze.bfs_distances(maze.map, c) for c in pointmaze.free_cells(maze.map)}
    start, goal = pointmaze.find_cell(maze.map, "r"), pointmaze.find_cell(maze.map, "g")
    assert distances[start][goal] == distance

    recipes.build(f"stitch/pointmaze-{name}-6k-v0")
    dataset = minari.load_dataset(f"stitch/pointmaze-{name}-6k-v0")
    lengths = []
    for episode in dataset:
        cells = visited_cells(episode, maze.map)
        lengths.append(max(distances[a][b] for a in cells[:1] for b in set(cells)))
        if name.endswith("stitch"):
            visited = set(cells)
            assert max(distances[a][b] for a in visited for b in visited) <= 4  # of which no two make 10
            assert not (start in visited and (goal in visited or episode.rewards.any()))
        # At rest in the end, or at the goal: nothing was cut short
        position, velocity = np.split(episode.observations["observation"][-1], 2)
        assert episode.terminations[-1] or np.linalg.norm(velocity) < pointmaze.ARRIVAL_SPEED
    counts = np.bincount(lengths, minlength=distance)
    if name.endswith("stitch"):
        assert counts.argmax() == 4
    else:
        assert len(counts) - 1 >= 2 * distance / 3 and counts.max() < 0.5 * counts.sum()

    env = dataset.recover_environment(eval_env=True)
    assert env.spec.max_episode_steps == time_limit and env.spec.id == maze.env_id
    walk = pointmaze.walk(env, maze.map, start, goal, seed=0, rng=np.random.default_rng(0))
    assert walk.terminations[-1] and walk.rewards.sum() == 1
    env.close()


# --- The evaluation ---------------------------------------------------------------------------------


def test_normalised_score_is_success_rate(umaze):
    from minari import get_normalized_score

    np.testing.assert_array_equal(get_normalized_score(umaze, np.array([0.0, 1.0])), [0.0, 1.0])


def test_evaluation_is_feasible(umaze):
    """The recovered environment starts in the far cell, and the controller, walking the whole way, reaches the goal."""
    env = umaze.recover_environment(eval_env=True)
    assert env.spec.max_episode_steps == 300
    successes = 0
    for seed in range(20):
        obs, _ = env.reset(seed=seed)
        assert np.abs(obs["achieved_goal"] - pointmaze.cell_centre(UMAZE, START)).max() <= 0.25
        assert np.abs(obs["desired_goal"] - pointmaze.cell_centre(UMAZE, GOAL)).max() <= 0.25
        episode = pointmaze.walk(env, UMAZE, START, GOAL, seed=seed, rng=np.random.default_rng(seed))
        successes += episode.rewards.sum() == 1 and episode.terminations[-1]
    env.close()
    assert successes >= 19


# --- Building ---------------------------------------------------------------------------------------


def bits(episodes):
    return [(e.actions.tobytes(), *(v.tobytes() for v in e.observations.values())) for e in episodes]


def test_same_seed_same_bits(monkeypatch):
    monkeypatch.setattr(pointmaze, "CHUNK", 3)

    def collect(seed, **kwargs):
        return bits(pointmaze.collect_walks(pointmaze.UMAZE, walk_cells=2, num_steps=500, seed=seed, **kwargs))

    first = collect(seed=0)
    assert first == collect(seed=0) == collect(seed=0, num_processes=2)
    assert set(first).isdisjoint(collect(seed=1))
    assert len(set(first)) == len(first)


def test_an_episode_does_not_depend_on_the_one_before(behaviour_env):
    def collect(*seeds):
        return bits(pointmaze.random_walk(behaviour_env, UMAZE, 2, np.random.default_rng(seed)) for seed in seeds)

    assert collect(0, 1) == collect(1, 0)[::-1]


def test_import_has_no_side_effects():
    code = (
        "import os, sys; before = dict(os.environ), list(sys.argv); import common.recipes; "
        "assert before == (dict(os.environ), sys.argv); "
        "assert not {'gymnasium', 'gymnasium_robotics', 'minari', 'mujoco'} & set(sys.modules)"
    )
    assert run_python(code).returncode == 0


def test_unknown_recipe_is_named(quick_recipe):
    with pytest.raises(ValueError, match="stitch/none-v0.*" + UMAZE_ID):
        recipes.build("stitch/none-v0")


def test_size_in_the_name(quick_recipe):
    """The size counts transitions; a name without one has the recipe's own; no other name has a recipe."""
    import minari

    assert recipes.find("stitch/pointmaze-umaze-20k-v0").num_transitions == 20_000
    assert recipes.find("stitch/pointmaze-umaze-1m-v0").num_transitions == 1_000_000
    assert recipes.find(UMAZE_ID).num_transitions == 500
    for name in ("pointmaze-umaze-0k-v0", "pointmaze-umaze-5-v0", "pointmaze-umaze-1k-v1", "none-1k-v0"):
        assert recipes.find(f"stitch/{name}") is None
    recipes.build("stitch/pointmaze-umaze-1k-v0")
    assert 1000 <= minari.load_dataset("stitch/pointmaze-umaze-1k-v0").total_steps < 1150
    assert list(minari.list_local_datasets()) == ["stitch/pointmaze-umaze-1k-v0"]


@pytest.mark.parametrize("moment", ["collect_walks", "write"])
def test_failed_build_leaves_nothing(quick_recipe, monkeypatch, moment):
    from minari.dataset.minari_storage import MinariStorage

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "collect_walks":
        monkeypatch.setattr(pointmaze, "collect_walks", fail)
    else:
        monkeypatch.setattr(MinariStorage, "update_metadata", fail)
    with pytest.raises(KeyboardInterrupt):
        recipes.build(UMAZE_ID)
    assert list(quick_recipe.iterdir()) == []


KILLED_BUILD = f"""
import os
from common import recipes
from common.recipes import pointmaze
from minari.dataset.minari_storage import MinariStorage

MinariStorage.update_metadata = lambda *args: os._exit(9)
pointmaze.collect_walks = lambda *args, **kwargs: []
recipes.build("{UMAZE_ID}")
"""


def test_killed_build_is_invisible(quick_recipe):
    """Killed with no chance to clean up, with the dataset half written: Minari sees nothing, and a new build works. The
    build of another process, which may be running, is left alone for a day."""
    import minari

    assert run_python(KILLED_BUILD, MINARI_DATASETS_PATH=str(quick_recipe)).returncode == 9
    assert list(quick_recipe.glob(".building-*/dataset/data/metadata.json"))  # it was indeed half written
    assert minari.list_local_datasets() == {}
    recipes.build(UMAZE_ID)
    assert minari.load_dataset(UMAZE_ID).total_steps >= 500
    (left,) = quick_recipe.glob(".building-*")
    yesterday = time.time() - 90_000
    os.utime(left, (yesterday, yesterday))
    recipes.build(UMAZE_ID.replace("-v0", "-1k-v0"))
    assert not left.exists()


def test_build_over_existing_dataset_is_harmless(quick_recipe, monkeypatch):
    recipes.build(UMAZE_ID)
    files = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in quick_recipe.rglob("*")}

    def fail(*args):
        raise AssertionError("built again")

    monkeypatch.setitem(recipes.RECIPES, UMAZE_ID, recipes.Recipe(fail, 500))
    recipes.build(UMAZE_ID)
    assert files == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in quick_recipe.rglob("*")}


def test_build_beaten_by_another_process(quick_recipe, monkeypatch):
    """Another build finishes between the start of this one and its renaming: both succeed, one dataset stays."""
    import minari

    def overtaken(dataset_id, data_path, num_transitions):
        monkeypatch.setitem(recipes.RECIPES, UMAZE_ID, recipes.Recipe(build_few_walks, 500))
        recipes.build(UMAZE_ID)
        build_few_walks(dataset_id, data_path)

    monkeypatch.setitem(recipes.RECIPES, UMAZE_ID, recipes.Recipe(overtaken, 500))
    recipes.build(UMAZE_ID)
    assert sorted(p.name for p in quick_recipe.iterdir()) == ["stitch"]
    assert list(minari.list_local_datasets()) == [UMAZE_ID]
    assert minari.namespace.list_local_namespaces() == ["stitch"]
    assert minari.load_dataset(UMAZE_ID).total_steps >= 500


# --- For policies of goals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, cells", [("stitch", 2), ("navigate", 4)])
def test_walks_without_stops_and_rewards(tmp_path, monkeypatch, kind, cells):
    import minari

    from common.datasets import load_dataset

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    name = f"stitch/pointmaze-umaze-{kind}-goals-2k-v0"
    recipes.build(name)
    walks = list(minari.load_dataset(name))
    assert sum(len(e) for e in walks) >= 2000
    passed, arrived, lengths = 0, 0, []
    for walk in walks:
        assert not walk.rewards.any() and not walk.terminations.any() and walk.truncations[-1]
        x, goal = walk.observations["achieved_goal"], walk.observations["desired_goal"]
        assert (goal == goal[0]).all()
        near = np.linalg.norm(x - goal, axis=1) <= 0.45
        passed += near[:-1].sum() > 1  # goes on within the radius that ends an episode of the task
        arrived += (
            np.linalg.norm(x[-1] - goal[-1]) < 0.6
        )  # 0.2 from the cell's centre, the goal 0.25 in each coordinate
        lengths.append(np.ptp(x[:, 0]) + np.ptp(x[:, 1]))
    assert arrived > 0.8 * len(walks)
    assert passed > 0.8 * len(walks)
    assert max(lengths) > cells - 0.5 and (kind == "navigate" or max(lengths) < 3.5)
    assert len({visited_cells(walk)[0] for walk in walks}) == 7  # each cell of the U
    data, env = load_dataset(name, goals=True)
    assert env.spec.obs_dim == 6 and env.spec.goal_dim == 2
    np.testing.assert_array_equal(data.achieved, data.obs[:, :2])
    # The tasks of the evaluation start and end where they say, within 0.25 m
    still = lambda obs, *_: (np.zeros((*obs.shape[:2], 2)), None)  # noqa: E731
    obs = env.evaluate(still, [0], 5, max_steps=1).obs[0]
    for x, (start, goal) in zip(obs, pointmaze.TASKS["umaze"], strict=True):
        for place, cell in ((x[:2], start), (x[-2:], goal)):
            assert np.abs(place - pointmaze.cell_centre(UMAZE, cell)).max() <= 0.25


@pytest.mark.parametrize("name", pointmaze.TASKS)
def test_tasks_are_between_free_cells(name):
    maze = {"umaze": pointmaze.UMAZE, "medium": pointmaze.MEDIUM, "large": pointmaze.LARGE}[name]
    for start, goal in pointmaze.TASKS[name]:
        assert pointmaze.bfs_distances(maze.map, goal)[start] >= 2
