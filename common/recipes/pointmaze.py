"""PointMaze datasets in three mazes: short walks, of which no single one solves the task, and long ones.

A force-actuated ball (gymnasium-robotics PointMaze, 100 Hz) has to roll from the cell "r" of a maze to the cell "g".
Reward is 1 at the goal, where the episode terminates, and 0 elsewhere, so the return of an episode is its success.

A scripted controller collects the data. Each episode starts at rest in a random cell other than the goal's, walks a
shortest path to another random cell and is truncated where the ball comes to rest there, unless it meets the goal
first. The controller is a PD law on the next cell's centre, with Gaussian noise on every action (standard deviation 0.5
of the bound 1); the environment jitters start and goal within their cells.

*navigate*: the target is any cell, each as likely, as in D4RL's maze2d; some walks lead all the way to the goal.

*stitch*: the target is `walk_cells` steps away (less only where the maze ends), and one farther from the goal than the
start is three times as likely as another one. In the U-maze, with two cells per walk and six from "r" to "g", every
trajectory that reaches the goal began next to it, and what the data hold near "r" never gets a reward; so in the other
mazes, with four cells per walk and ten or fifteen from "r" to "g". A policy must *stitch*: find, through values, that
parts of different walks, joined end to end, lead to the goal. Imitation ends near "r", where most walks lead. (With all
targets equally likely it does not: the ball's velocity tells which way a walk goes, and a clone rolls on by momentum,
to the goal at times.)

*goals*: the same two kinds of walks without a goal in the maze that would end them, without rewards, from any cell to
any target, each as likely: for policies of goals. They are evaluated on five tasks, each a start and a goal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from common.recipes import rollouts, storage

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

Cell = tuple[int, int]  # row and column in a maze map
MazeMap = list[list]  # 1: wall, 0: free, "r": start of the evaluation, "g": its goal


class Maze(NamedTuple):
    env_id: str  # gymnasium-robotics' name; its time limit is that of the evaluation
    map: MazeMap


# gymnasium-robotics' maps, with the start of the evaluation at one end and its goal at the other.
UMAZE = Maze(
    "PointMaze_UMaze-v3",
    [
        [1, 1, 1, 1, 1],
        [1, "r", 0, 0, 1],
        [1, 1, 1, 0, 1],
        [1, "g", 0, 0, 1],
        [1, 1, 1, 1, 1],
    ],
)
MEDIUM = Maze(
    "PointMaze_Medium-v3",
    [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, "r", 0, 1, 1, 0, 0, 1],
        [1, 0, 0, 1, 0, 0, 0, 1],
        [1, 1, 0, 0, 0, 1, 1, 1],
        [1, 0, 0, 1, 0, 0, 0, 1],
        [1, 0, 1, 0, 0, 1, 0, 1],
        [1, 0, 0, 0, 1, 0, "g", 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ],
)
LARGE = Maze(
    "PointMaze_Large-v3",
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, "r", 0, 0, 0, 1, 0, 0, 0, 0, 0, 1],
        [1, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1],
        [1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1],
        [1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1],
        [1, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1],
        [1, 0, 0, 1, 0, 0, 0, 1, 0, 0, "g", 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ],
)

# Start and goal of each task for policies of goals; in the medium and the large maze they are those of OGBench, whose
# maps are the same
TASKS = {
    "umaze": [((1, 1), (3, 1)), ((3, 1), (1, 1)), ((1, 1), (2, 3)), ((3, 3), (1, 1)), ((1, 3), (3, 1))],
    "medium": [((1, 1), (6, 6)), ((6, 1), (1, 6)), ((5, 3), (4, 2)), ((6, 5), (6, 1)), ((2, 6), (1, 1))],
    "large": [((1, 1), (7, 10)), ((5, 4), (7, 1)), ((7, 4), (1, 10)), ((3, 8), (5, 4)), ((1, 1), (5, 4))],
}
STEPS_PER_CELL = 75  # time limit of a short walk; it rarely binds. A long one has the evaluation's.
AWAY_WEIGHT = 3.0  # how much likelier a walk away from the goal is than one towards it
NOISE_STD = 0.5  # of the Gaussian noise on each action
P_GAIN, D_GAIN = 10.0, 1.0  # of the PD law, per metre and per metre per second (D4RL's)
WAYPOINT_RADIUS = 0.25  # metres from a cell's centre at which the walk turns to the next cell
ARRIVAL_RADIUS, ARRIVAL_SPEED = 0.2, 0.5  # metres, metres per second: what counts as at rest in the last cell
CHUNK = 100  # episodes that one of several processes collects at a time
STEPS_PER_PROCESS = 50_000  # fewer are not worth another process


# --- Recipes --------------------------------------------------------------------------------------


def umaze_stitch(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks of two cells in the U-maze."""
    build_walks(dataset_id, data_path, UMAZE, walk_cells=2, num_steps=num_transitions)


def umaze_navigate(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks between any two cells of the U-maze."""
    build_walks(dataset_id, data_path, UMAZE, walk_cells=None, num_steps=num_transitions)


def medium_stitch(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks of four cells in the medium maze."""
    build_walks(dataset_id, data_path, MEDIUM, walk_cells=4, num_steps=num_transitions)


def medium_navigate(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks between any two cells of the medium maze."""
    build_walks(dataset_id, data_path, MEDIUM, walk_cells=None, num_steps=num_transitions)


def large_stitch(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks of four cells in the large maze."""
    build_walks(dataset_id, data_path, LARGE, walk_cells=4, num_steps=num_transitions)


def large_navigate(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks between any two cells of the large maze."""
    build_walks(dataset_id, data_path, LARGE, walk_cells=None, num_steps=num_transitions)


def write_goals(name: str, kind: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Walks in a maze without a goal of its own, and without rewards: name "umaze", "medium", "large"; kind "stitch"
    or "navigate"."""
    maze = {"umaze": UMAZE, "medium": MEDIUM, "large": LARGE}[name]
    maze = maze._replace(map=[[int(cell == 1) for cell in row] for row in maze.map])
    walk_cells = {"stitch": 2 if name == "umaze" else 4, "navigate": None}[kind]
    env, eval_env = make_behaviour_env(maze, walk_cells), make_env(maze)
    episodes = collect_walks(
        maze, walk_cells, num_transitions, desc=dataset_id, num_processes=processes_for(num_transitions)
    )
    far = f"at most {walk_cells} cells" if walk_cells else "any length"
    storage.write(
        dataset_id,
        data_path,
        (dataclasses.replace(episode, rewards=0 * episode.rewards) for episode in episodes),
        env,
        eval_env,
        reference_scores=None,
        algorithm_name="PD controller on shortest paths, with Gaussian action noise",
        code_permalink="common/recipes/pointmaze.py",
        description=f"PointMaze walks of {far} between random cells, without rewards and ends, for policies of goals.",
        requirements=["gymnasium-robotics>=1.4"],
        eval_tasks=[{"reset_cell": list(start), "goal_cell": list(goal)} for start, goal in TASKS[name]],
    )
    env.close()
    eval_env.close()


# --- Mazes ----------------------------------------------------------------------------------------


def free_cells(maze_map: MazeMap) -> list[Cell]:
    """The cells that are not walls, row by row."""
    return [(i, j) for i, row in enumerate(maze_map) for j, cell in enumerate(row) if cell != 1]


def has_goal(maze_map: MazeMap) -> bool:
    """Whether a cell holds "g", where episodes end."""
    return any("g" in row for row in maze_map)


def find_cell(maze_map: MazeMap, letter: str) -> Cell:
    """The one cell that holds `letter`."""
    (cell,) = [(i, j) for i, j in free_cells(maze_map) if maze_map[i][j] == letter]
    return cell


def neighbours(maze_map: MazeMap, cell: Cell) -> list[Cell]:
    """The free cells that share a side with `cell`."""
    i, j = cell
    return [c for c in [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)] if maze_map[c[0]][c[1]] != 1]


def bfs_distances(maze_map: MazeMap, target: Cell) -> dict[Cell, int]:
    """Steps of a shortest path to `target`, for every cell from which there is one (breadth-first search)."""
    distances, queue = {target: 0}, deque([target])
    while queue:
        cell = queue.popleft()
        for neighbour in neighbours(maze_map, cell):
            if neighbour not in distances:
                distances[neighbour] = distances[cell] + 1
                queue.append(neighbour)
    return distances


def next_cell(maze_map: MazeMap, distances: dict[Cell, int], cell: Cell) -> Cell:
    """The neighbour of `cell` that is nearest to the target of `distances`."""
    return min(neighbours(maze_map, cell), key=distances.__getitem__)


def walk_targets(maze_map: MazeMap, start: Cell, walk_cells: int | None) -> list[Cell]:
    """Ends of the walks from `start`: cells `walk_cells` steps away, and nearer ones from which none leads farther.

    All other cells if `walk_cells` is None.
    """
    distances = bfs_distances(maze_map, start)
    if walk_cells is None:
        return sorted(cell for cell in distances if cell != start)

    def is_end(cell: Cell) -> bool:
        return distances[cell] > 0 and all(distances[c] < distances[cell] for c in neighbours(maze_map, cell))

    return sorted(cell for cell, d in distances.items() if d == walk_cells or (d < walk_cells and is_end(cell)))


def cell_centre(maze_map: MazeMap, cell: Cell) -> np.ndarray:
    """(x, y) of the centre of `cell`, in metres, shape (2,): cells are 1 m wide, the maze is centred on the origin."""
    return np.array([cell[1] + 0.5 - len(maze_map[0]) / 2, len(maze_map) / 2 - cell[0] - 0.5])


# --- Walks ----------------------------------------------------------------------------------------


def pd_action(position: np.ndarray, velocity: np.ndarray, waypoint: np.ndarray) -> np.ndarray:
    """Force towards `waypoint`, as a fraction of the largest, not yet clipped. All (x, y), metres, shape (2,)."""
    return P_GAIN * (waypoint - position) - D_GAIN * velocity


def make_env(maze: Maze, max_episode_steps: int | None = None, goes_on: bool = False) -> gym.Env:
    """PointMaze on a map: reward 1 and termination at "g"; starts at "r". Where a letter is missing, any cell may be
    it. If it `goes_on`, a goal ends no episode."""
    import gymnasium as gym
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make(maze.env_id, maze_map=maze.map, continuing_task=goes_on, max_episode_steps=max_episode_steps)


def make_behaviour_env(maze: Maze, walk_cells: int | None) -> gym.Env:
    """The same one without "r": same goal, starts anywhere."""
    anywhere = [[0 if cell == "r" else cell for cell in row] for row in maze.map]
    limit = walk_cells and STEPS_PER_CELL * walk_cells
    return make_env(maze._replace(map=anywhere), limit, goes_on=not has_goal(maze.map))


def walk(
    env: gym.Env, maze_map: MazeMap, start: Cell, target: Cell, seed: int, rng: np.random.Generator
) -> EpisodeBuffer:
    """One episode of T steps from `start` to `target`: T + 1 observations, T actions in [-1, 1] of shape (T, 2).

    It is truncated when the ball comes to rest in `target` or at the time limit, and terminated at the maze's goal.
    `seed` is the environment's (the jitter of start and goal), `rng` draws the noise on the actions.
    """
    from minari.data_collector import EpisodeBuffer

    distances = bfs_distances(maze_map, target)
    waypoint = start
    cells = {"reset_cell": np.array(start)} | ({} if has_goal(maze_map) else {"goal_cell": np.array(target)})
    obs, _ = env.reset(seed=seed, options=cells)
    observations, actions, rewards, terminations, truncations = [obs], [], [], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        position, velocity = np.split(obs["observation"], 2)
        if waypoint != target and np.linalg.norm(cell_centre(maze_map, waypoint) - position) < WAYPOINT_RADIUS:
            waypoint = next_cell(maze_map, distances, waypoint)
        action = pd_action(position, velocity, cell_centre(maze_map, waypoint))
        action = np.clip(np.clip(action, -1, 1) + rng.normal(0, NOISE_STD, 2), -1, 1).astype(np.float32)
        obs, reward, terminated, truncated, _ = env.step(action)
        position, velocity = np.split(obs["observation"], 2)
        distance = np.linalg.norm(cell_centre(maze_map, target) - position)
        arrived = distance < ARRIVAL_RADIUS and np.linalg.norm(velocity) < ARRIVAL_SPEED
        truncated = not terminated and bool(truncated or arrived)
        observations.append(obs)
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(terminated)
        truncations.append(truncated)
    return EpisodeBuffer(
        seed=seed,
        observations={name: np.stack([o[name] for o in observations]) for name in obs},
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=np.array(terminations),
        truncations=np.array(truncations),
    )


def random_walk(env: gym.Env, maze_map: MazeMap, walk_cells: int | None, rng: np.random.Generator) -> EpisodeBuffer:
    """One episode from a random start to a random target."""
    if not has_goal(maze_map):
        starts = free_cells(maze_map)
        start = starts[rng.integers(len(starts))]
        targets = walk_targets(maze_map, start, walk_cells)
        target = targets[rng.integers(len(targets))]
        return walk(env, maze_map, start, target, seed=int(rng.integers(2**31)), rng=rng)
    # An episode that starts at the goal would be over at its first step.
    goal_distances = bfs_distances(maze_map, find_cell(maze_map, "g"))
    starts = [cell for cell in free_cells(maze_map) if goal_distances[cell] > 0]
    start = starts[rng.integers(len(starts))]
    targets = walk_targets(maze_map, start, walk_cells)
    away_weight = AWAY_WEIGHT if walk_cells else 1.0
    weights = np.array([away_weight if goal_distances[c] > goal_distances[start] else 1.0 for c in targets])
    target = targets[rng.choice(len(targets), p=weights / weights.sum())]
    return walk(env, maze_map, start, target, seed=int(rng.integers(2**31)), rng=rng)


def walks(maze: Maze, walk_cells: int | None, seed: int, numbers: Iterable[int]) -> Iterator[EpisodeBuffer]:
    """The episodes of these numbers."""
    with contextlib.closing(make_behaviour_env(maze, walk_cells)) as env:
        for k in numbers:
            # A seed of its own for each episode: episode k is the same whatever was drawn before it, and where.
            rng = np.random.default_rng(np.random.SeedSequence([seed, k]))
            yield random_walk(env, maze.map, walk_cells, rng)


def walks_in_parallel(maze: Maze, walk_cells: int | None, seed: int, num_processes: int) -> Iterator[EpisodeBuffer]:
    """All episodes in the order of their numbers, computed ahead in other processes."""
    chunks = ((maze, walk_cells, seed, range(k, k + CHUNK)) for k in itertools.count(0, CHUNK))
    with rollouts.processes(num_processes) as run:
        for episodes in run(_walk_list, chunks):
            yield from episodes


def _walk_list(job: tuple[Maze, int | None, int, range]) -> list[EpisodeBuffer]:
    """In a process of the pool."""
    return list(walks(*job))


def collect_walks(
    maze: Maze, walk_cells: int | None, num_steps: int, seed: int = 0, desc: str = "walks", num_processes: int = 1
) -> list[EpisodeBuffer]:
    """Episodes until there are at least `num_steps` transitions, the same ones whatever the number of processes."""
    if num_processes == 1:
        episodes = walks(maze, walk_cells, seed, itertools.count())
    else:
        episodes = walks_in_parallel(maze, walk_cells, seed, num_processes)
    collected: list[EpisodeBuffer] = []
    total_steps = 0
    with tqdm(total=num_steps, desc=desc, unit=" steps") as progress, contextlib.closing(episodes):
        while total_steps < num_steps:
            collected.append(next(episodes))
            total_steps += len(collected[-1])
            progress.update(len(collected[-1]))
    return collected


def processes_for(num_steps: int) -> int:
    return max(1, min(os.cpu_count() or 1, num_steps // STEPS_PER_PROCESS))


def build_walks(dataset_id: str, data_path: Path, maze: Maze, walk_cells: int | None, num_steps: int) -> None:
    """Collects walks and writes them, with the environment of the evaluation, as a Minari dataset in `data_path`."""
    distance = bfs_distances(maze.map, find_cell(maze.map, "g"))[find_cell(maze.map, "r")]
    env, eval_env = make_behaviour_env(maze, walk_cells), make_env(maze)
    if walk_cells:
        description = (
            f"PointMaze walks of at most {walk_cells} cells in a maze whose goal is {distance} cells "
            "from the start of the evaluation: no trajectory solves the task, a policy has to stitch. Sparse reward."
        )
    else:
        description = (
            f"PointMaze walks between random cells of a maze whose goal is {distance} cells from the start of the "
            "evaluation. Sparse reward."
        )
    storage.write(
        dataset_id,
        data_path,
        collect_walks(maze, walk_cells, num_steps, desc=dataset_id, num_processes=processes_for(num_steps)),
        env,
        eval_env,
        reference_scores=(0.0, 1.0),  # returns of failure and success, so that the normalised score is the success rate
        algorithm_name="PD controller on shortest paths, with Gaussian action noise",
        code_permalink="common/recipes/pointmaze.py",
        description=description,
        requirements=["gymnasium-robotics>=1.4"],
    )
    env.close()
    eval_env.close()
