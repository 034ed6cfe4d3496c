"""OGBench's point mazes: reward-free walks of a script, from which a policy of goals learns to reach any place.

    medium, large, giant    mazes of 8 x 8, 9 x 12 and 12 x 16 cells, 4 units wide each
    teleport                two holes lead to one of three exits at random, one of which is a dead end

The data are collected as by OGBench's data_gen_scripts/generate_locomaze.py, in the environments of the package
(https://github.com/seohongpark/ogbench, commit 1d41409, version 1.2.2). A script walks on a shortest path of cells,
always towards the centre of the next one, with Gaussian noise on its actions; nothing ends an episode but its length:

    navigate   1000 episodes of 1000 steps (giant: 500 of 2000). The goal is a random cell that is no corridor, and
               another one where it is reached. Noise 0.5.
    stitch     5000 episodes of 200 steps. The goal is a cell at a distance of four steps (the start itself where there
               is none), and the walk stays there: no episode is much longer than four cells. Noise 0.5.
    explore    10,000 episodes of 500 steps. A random direction for ten steps at a time, goals play no part. Noise 1.

The evaluation is OGBench's: five tasks, each a start and a goal, both with a noise of 1 unit in each coordinate; an
episode succeeds, and ends, within 1 unit of its goal, and has 1000 steps for it.

What differs from OGBench's files: every episode has a seed of its own, actions are rounded to float32 before they are
executed and not only in the file, the last episode is cut short where the size of the dataset asks for it, and there is
no validation split. OGBench has no explore data of the point, only of the ant, whose numbers these are.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.recipes import rollouts, storage
from common.recipes.worker import begin

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

MAZES = ("medium", "large", "giant", "teleport")
NOISE_STD = {"navigate": 0.5, "stitch": 0.5, "explore": 1.0}  # of each action, whose bounds are -1 and 1
STITCH_CELLS, EXPLORE_STEPS = 4, 10
TASKS = [{"task_id": i} for i in range(1, 6)]

Cell = tuple[int, int]  # row and column


def length(maze: str, kind: str) -> int:
    """Steps of an episode."""
    return 2000 if (maze, kind) == ("giant", "navigate") else {"navigate": 1000, "stitch": 200, "explore": 500}[kind]


def size(maze: str, kind: str) -> int:
    """OGBench's number of transitions."""
    return 5_000_000 if kind == "explore" else 1_000_000


def write(maze: str, kind: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Collects episodes and writes them, with the environment and the tasks of the evaluation, as a Minari dataset."""
    env, steps = simulator(maze), length(maze, kind)
    episodes = rollouts.equal_episodes(rollout, (maze, kind), num_transitions, steps, desc=dataset_id)
    import gymnasium as gym

    storage.write(
        dataset_id,
        data_path,
        episodes,
        env,
        gym.make(f"pointmaze-{maze}-v0"),
        reference_scores=None,
        algorithm_name="OGBench's oracle of shortest paths, with Gaussian action noise",
        code_permalink="common/recipes/ogbench_maze.py",
        description=f"OGBench's pointmaze-{maze}-{kind}, collected anew: episodes of {steps} steps without rewards and "
        "ends. A policy learns to reach any of their states, and is evaluated on OGBench's five tasks.",
        requirements=["ogbench>=1.2"],
        eval_tasks=TASKS,
    )


# --- The walks ------------------------------------------------------------------------------------


@functools.cache  # once for each process
def simulator(maze: str) -> gym.Env:
    """The environment of the data, in which no goal ends an episode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GLFW, which finds no display: nothing is rendered
        import gymnasium as gym
        import ogbench  # noqa: F401 (registers its environments)

        return gym.make(f"pointmaze-{maze}-v0", terminate_at_goal=False, max_episode_steps=-1)


def rollout(maze: str, kind: str, seed: tuple[int, ...], num_steps: int) -> EpisodeBuffer:
    """One episode; a function of its arguments only.

    It seeds NumPy's global generator, from which OGBench's mazes draw, so it belongs into a process of its own.
    """
    from minari.data_collector import EpisodeBuffer

    env, rng = simulator(maze), np.random.default_rng(np.random.SeedSequence(seed))
    free, crossings = cells(maze)
    start = free[rng.integers(len(free))]
    targets = crossings if kind != "stitch" else at_distance(maze, start, STITCH_CELLS) or [start]
    task = {"task_info": {"init_ij": start, "goal_ij": targets[rng.integers(len(targets))]}}
    env_seed = int(rng.integers(2**31))
    observations, actions = [begin(env, env_seed, task)[0]], []
    inner, direction = env.unwrapped, None
    for step in range(num_steps):
        if kind != "explore":
            direction = towards_goal(maze, inner)
        elif step % EXPLORE_STEPS == 0:
            direction = unit(rng.standard_normal(2))
        action = direction + rng.normal(0, NOISE_STD[kind], 2)
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        obs, _, _, _, info = env.step(actions[-1])
        observations.append(obs)
        if kind == "navigate" and info["success"]:
            inner.set_goal(crossings[rng.integers(len(crossings))])
    end = np.arange(1, num_steps + 1) == num_steps
    return EpisodeBuffer(
        seed=env_seed,
        observations=np.stack(observations),
        actions=np.stack(actions),
        rewards=np.zeros(num_steps),
        terminations=end & False,
        truncations=end,
    )


def towards_goal(maze: str, env) -> np.ndarray:
    """The direction (2,) from where the point is to the centre of the next cell on a shortest path to its goal."""
    position = env.get_xy()
    return unit(subgoal(maze, env.xy_to_ij(position), env.xy_to_ij(env.cur_goal_xy)) - position)


@functools.cache
def subgoal(maze: str, cell: Cell, goal: Cell) -> np.ndarray:
    """The centre (2,) of the cell that OGBench's oracle goes to next."""
    env = simulator(maze).unwrapped
    return env.get_oracle_subgoal(env.ij_to_xy(cell), env.ij_to_xy(goal))[0]


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.linalg.norm(vector) + 1e-6)


@functools.cache
def cells(maze: str) -> tuple[list[Cell], list[Cell]]:
    """All free cells, and those that are no corridor, which has two walls at its sides and none before and behind."""
    free = simulator(maze).unwrapped.maze_map == 0

    def corridor(i, j):
        up, down, left, right = free[i - 1, j], free[i + 1, j], free[i, j - 1], free[i, j + 1]
        return up == down != left == right

    every = [(int(i), int(j)) for i, j in np.argwhere(free)]
    return every, [cell for cell in every if not corridor(*cell)]


@functools.cache
def at_distance(maze: str, start: Cell, distance: int) -> list[Cell]:
    """The cells that are so many steps away on shortest paths."""
    env = simulator(maze).unwrapped
    steps = env.get_oracle_subgoal(env.ij_to_xy(start), env.ij_to_xy(start))[1]  # to `start`, of each cell
    return [(int(i), int(j)) for i, j in np.argwhere(steps == distance)]
