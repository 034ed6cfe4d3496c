"""OGBench's data for policies of goals: its point mazes, and its play without rewards."""

import functools

import gymnasium
import minari
import numpy as np
import pytest

from common import recipes
from common.datasets import load_dataset
from common.recipes import manipulation, ogbench_maze, pointmaze, rollouts
from common.recipes.worker import begin

ogbench = pytest.importorskip("ogbench", reason="OGBench's mazes need ogbench>=1.2: pip install -e '.[suite]'")

MEDIUM = "stitch/ogbench-pointmaze-medium-{}-v0"
SHORT = {"navigate": 100, "stitch": 200, "explore": 40}


@pytest.fixture(autouse=True)
def global_generator():
    """Roll-outs seed NumPy's global generator."""
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        path = tmp_path_factory.mktemp("minari")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(path))
        monkeypatch.setattr(ogbench_maze, "length", lambda maze, kind: SHORT[kind])
        monkeypatch.setattr(rollouts.os, "cpu_count", lambda: 2)
        yield path


def bits(episodes):
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return [tuple(getattr(e, name).tobytes() for name in names) for e in episodes]


@functools.cache
def episode(kind, maze="medium", number=0, steps=None):
    return ogbench_maze.rollout(maze, kind, (0, number), steps or ogbench_maze.length(maze, kind))


def cell_of(positions):
    """Rows and columns (n, 2) of positions (n, 2): cells are 4 units wide, and that of row 1, column 1 is at (0, 0)."""
    return np.floor((np.asarray(positions)[:, ::-1] + 6) / 4).astype(int)


# --- OGBench's point mazes ---------------------------------------------------------------------------------


def test_corridors_are_no_goals():
    free, crossings = ogbench_maze.cells("medium")
    # Row 5 of the map is 1 0 1 0 0 1 0 1, row 6 is 1 0 0 0 1 0 0 1: (5, 1) has walls at its sides, (6, 2) above and
    # below; (6, 1) is a corner, (3, 2) a crossing, (5, 3) a corner with a free cell at two sides, (4, 6) another one
    assert {(5, 1), (6, 2), (5, 6)}.isdisjoint(crossings) and {(6, 1), (3, 2), (5, 3), (4, 6)} <= set(crossings)
    assert len(free) == (np.array(ogbench_maze.simulator("medium").unwrapped.maze_map) == 0).sum() == 26
    assert set(crossings) < set(free)


def test_stitch_goes_to_a_cell_four_steps_away_and_stays():
    # From (1, 1) of medium: (1, 2), (2, 1), then (2, 2), (3, 2), then (3, 3) and (4, 2): the fourth step leads there
    assert sorted(ogbench_maze.at_distance("medium", (1, 1), 4)) == [(3, 3), (4, 2)]
    for number in range(8):
        walk = episode("stitch", number=number)
        cells = cell_of(walk.observations)
        assert (cells[-60:] == cells[-1]).all(axis=1).mean() > 0.9  # noise may carry it over an edge for a moment
        start, end = map(tuple, (cells[0], cells[-1]))
        assert tuple(map(int, end)) in ogbench_maze.at_distance("medium", tuple(map(int, start)), 4)


def test_actions_are_the_way_and_noise():
    walk = episode("navigate", steps=1000)
    moved = np.diff(walk.observations, axis=0)
    free = np.abs(moved - 0.2 * walk.actions).max(axis=1) < 1e-6  # unless a wall is in the way
    assert free.mean() > 0.8 and np.abs(walk.actions).max() == 1 and walk.actions.dtype == np.float32
    # Of a direction (0, 1), say, the second action is clip(1 + 0.5 n): its mean is 1 - 0.5 E[max(n, 0)] = 0.80
    ahead = np.linalg.norm(walk.actions, axis=1)
    assert 0.75 < ahead.mean() < 1.15


def test_navigate_takes_a_new_goal_where_one_is_reached(monkeypatch):
    env = ogbench_maze.simulator("medium").unwrapped
    goals, reached = [], []
    set_goal, step = env.set_goal, env.step
    monkeypatch.setattr(env, "set_goal", lambda *args, **kwargs: (goals.append(args), set_goal(*args, **kwargs))[1])

    def watched(action):
        answer = step(action)
        reached.append(answer[-1]["success"])
        return answer

    monkeypatch.setattr(env, "step", watched)
    ogbench_maze.rollout("medium", "navigate", (0, 5), 1000)
    drawn = [args[0] for args in goals if args]  # a reset names its goal by keyword
    assert len(drawn) == sum(reached) > 2 and set(drawn) <= set(ogbench_maze.cells("medium")[1])
    assert len(set(drawn)) > 1
    goals.clear()
    ogbench_maze.rollout("medium", "stitch", (0, 5), 200)
    assert not [args for args in goals if args]


def test_explore_keeps_a_direction_for_ten_steps(monkeypatch):
    monkeypatch.setitem(ogbench_maze.NOISE_STD, "explore", 0.0)
    actions = ogbench_maze.rollout("medium", "explore", (0, 0), 40).actions.reshape(4, 10, 2)
    assert (actions == actions[:, :1]).all() and len(np.unique(actions[:, 0], axis=0)) == 4
    np.testing.assert_allclose(np.linalg.norm(actions[:, 0], axis=-1), 1, rtol=1e-5)
    monkeypatch.setitem(ogbench_maze.NOISE_STD, "explore", 1.0)
    noisy = ogbench_maze.rollout("medium", "explore", (0, 0), 40).actions
    assert len(np.unique(noisy, axis=0)) > 30


def test_teleports_lead_away():
    jumps = []
    for number in range(12):
        moved = np.abs(np.diff(episode("navigate", "teleport", number, 300).observations, axis=0)).max(axis=1)
        jumps += [number] * int((moved > 1).sum())
    assert jumps


def test_walks_begin_and_lead_everywhere():
    cells = {tuple(c) for k in range(6) for c in cell_of(episode("navigate", number=k, steps=1000).observations)}
    assert len(cells & set(ogbench_maze.cells("medium")[0])) >= 25
    assert len({tuple(cell_of(episode("stitch", number=k).observations[:1])[0]) for k in range(8)}) > 5


@pytest.mark.parametrize("maze", ogbench_maze.MAZES)
def test_every_maze_and_kind_can_be_collected(maze):
    for kind in ogbench_maze.NOISE_STD:
        walk = ogbench_maze.rollout(maze, kind, (0, 0), 20)
        assert walk.observations.shape == (21, 2) and walk.actions.shape == (20, 2)
        recipe = recipes.find(f"stitch/ogbench-pointmaze-{maze}-{kind}-v0")
        assert recipe.num_transitions == (5_000_000 if kind == "explore" else 1_000_000)
        assert recipe.write.args == (maze, kind)
    assert recipes.find(f"stitch/ogbench-pointmaze-{maze}-stitch-300k-v0").num_transitions == 300_000


def test_episodes_have_ogbenchs_lengths():
    assert ogbench_maze.length("giant", "navigate") == 2000 and ogbench_maze.length("medium", "navigate") == 1000
    for maze in ogbench_maze.MAZES:
        assert (ogbench_maze.length(maze, "stitch"), ogbench_maze.length(maze, "explore")) == (200, 500)


def test_the_dataset(root, monkeypatch):
    """Built by name in two processes and loaded as in a process that has not imported ogbench."""
    name = MEDIUM.format("navigate-1k")
    monkeypatch.setitem(recipes.RECIPES, MEDIUM.format("navigate"), recipes.find(name)._replace(num_transitions=250))
    recipes.build(MEDIUM.format("navigate"))
    stored = minari.load_dataset(MEDIUM.format("navigate"))
    here = [ogbench_maze.rollout("medium", "navigate", (0, k), steps) for k, steps in enumerate((100, 100, 50))]
    assert bits(stored) == bits(here) and len(set(bits(here))) == 3
    assert bits([ogbench_maze.rollout("medium", "navigate", (1, 0), 100)]) != bits(here[:1])
    for walk, steps in zip(here, (100, 100, 50), strict=True):
        assert not walk.rewards.any() and not walk.terminations.any()
        assert walk.truncations.tolist() == [False] * (steps - 1) + [True]
    for env_id in [env_id for env_id in gymnasium.registry if env_id.startswith("pointmaze")]:
        monkeypatch.delitem(gymnasium.registry, env_id)
    data, env = load_dataset(MEDIUM.format("navigate"), goals=True, columns=("end",))
    assert data.obs.shape == (250, 2) and data.achieved is None and env.spec.goal_dim == 2
    assert np.unique(data.end).tolist() == [99, 199, 249]
    assert env.tasks == [{"task_id": i} for i in range(1, 6)]


def test_the_oracle_solves_every_task_and_a_policy_that_rests_solves_none(root):
    """Starts and goals are near those of OGBench's tasks; the way to them is the environment's own oracle's."""
    recipes.build(MEDIUM.format("stitch-1k"))
    _, env = load_dataset(MEDIUM.format("stitch-1k"), goals=True)
    maze = ogbench_maze.simulator("medium").unwrapped

    def oracle(obs, *_):
        actions = []
        for x in obs.reshape(-1, 4).astype(float):
            cell, goal = maze.xy_to_ij(x[:2]), maze.xy_to_ij(x[2:])
            way = (x[2:] if cell == goal else ogbench_maze.subgoal("medium", cell, goal)) - x[:2]
            actions.append(np.clip(5 * way, -1, 1))
        return np.reshape(actions, (*obs.shape[:2], 2)), None

    columns = env.measure(oracle, None, [0], 5)
    assert columns["score"].tolist() == [100.0] and env.score_kind == "success, %, mean over 5 tasks"
    still = lambda obs, *_: (np.zeros((*obs.shape[:2], 2)), None)  # noqa: E731
    play = env.evaluate(still, [0], 5, max_steps=3)
    assert not play.returns.any()
    ours = cell_of(play.obs[0, :, :2]), cell_of(play.obs[0, :, 2:])
    tasks = [(i["init_ij"], i["goal_ij"]) for i in maze.task_infos]
    assert [tuple(map(tuple, pair)) for pair in zip(*ours, strict=True)] == tasks
    assert env._limit == 1000


# --- Manipulation ------------------------------------------------------------------------------------------


def test_play_with_goals_is_the_same_play(root, monkeypatch):
    monkeypatch.setattr(manipulation, "EPISODE_STEPS", 30)
    name = "stitch/cube-single-play-goals-v0"
    assert recipes.find(name).num_transitions == 1_000_000
    monkeypatch.setitem(recipes.RECIPES, name, recipes.find(name)._replace(num_transitions=50))
    recipes.build(name)
    for k, (ours, steps) in enumerate(zip(minari.load_dataset(name), (30, 20), strict=True)):
        play = manipulation.rollout("cube-single", (0, k), steps)
        np.testing.assert_array_equal(ours.observations, play.observations)
        np.testing.assert_array_equal(ours.actions, play.actions)
        assert not ours.rewards.any() and not ours.terminations.any() and play.rewards.any()
    data, env = load_dataset(name, goals=True)
    assert env.spec.goal_dim == env.spec.obs_dim == 28 and len(env.tasks) == 5
    seen = []
    still = lambda obs, *_: (seen.append(obs.copy()), (np.zeros((*obs.shape[:2], 5)), None))[1]  # noqa: E731
    assert not env.evaluate(still, [0], 5, max_steps=2).returns.any()
    first = seen[0]
    env.evaluate(still, [0], 5, max_steps=1)
    np.testing.assert_array_equal(seen[-1], first)  # with the pose of the arm in each goal
    assert env._limit == 200


def test_without_begin_ogbenchs_goals_do_not_repeat():
    """What `begin` is for. If this fails, OGBench has mended it."""
    for env in (gymnasium.make("cube-single-v0"), ogbench_maze.simulator("medium")):
        task = {"task_id": 1}
        plain = [env.reset(seed=0, options=task)[1]["goal"] for _ in range(2)]
        seeded = [begin(env, 0, task) for _ in range(2)]
        assert (plain[0] != plain[1]).any()
        np.testing.assert_array_equal(seeded[0][1], seeded[1][1])
        np.testing.assert_array_equal(seeded[0][0], seeded[1][0])
        assert (begin(env, 1, task)[1] != seeded[0][1]).any()


# --- The same mazes in gymnasium-robotics ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["medium", "large"])
def test_pointmaze_has_the_maps_and_the_tasks_of_ogbench(name):
    env = ogbench_maze.simulator(name).unwrapped
    assert [(i["init_ij"], i["goal_ij"]) for i in env.task_infos] == pointmaze.TASKS[name]
    ours = {"medium": pointmaze.MEDIUM, "large": pointmaze.LARGE}[name].map
    np.testing.assert_array_equal(env.maze_map, [[int(cell == 1) for cell in row] for row in ours])
