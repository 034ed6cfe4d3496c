"""OGBench's manipulation play data, each relabelled with the rewards of one task: a robot arm moves cubes, presses
buttons, opens drawers and windows, and a policy has to bring them into one given arrangement.

    cube-single   a cube to its place
    cube-double   two cubes to theirs
    scene         a cube, a drawer, a window, and two buttons that lock and unlock drawer and window
    puzzle-3x3    "Lights Out" on nine buttons, each of which switches its neighbours too

The data are collected as by OGBench's data_gen_scripts/generate_manipspace.py, dataset type "play", with the oracles of
the package (https://github.com/seohongpark/ogbench, commit 1d41409, version 1.2.2): again and again a random object
gets a random target, and an oracle follows an open-loop plan to it, with temporally correlated noise on the plan. No
episode knows the task of the evaluation. An episode is 1000 transitions; scenes whose cube got out of sight are played
again.

Rewards and terminals are those of OGBench's single-task environments (their default task) from version 1.2.0 on, which
is another convention than that of 1.1:
- Both are functions of s, not of s': the row (s, a, s') has the number of parts of the arrangement that are right in s,
  less the number of all, so at best 0, and it is terminal where s solves the task.
- As in OGBench's files, a recorded episode goes on after its terminal rows: the play knows no task and undoes what it
  solved. What ends an episode is the time-out alone, which is a truncation and not a terminal.

Score 100 is a return of 0, which only an arrangement solved from the start would have; score 0 is the return of an arm
that touches nothing until the time limit, and a policy that spoils what was right is below it. These are not success
rates, which OGBench reports.

For policies of goals, the same episodes are written without rewards and ends (`write_goals`). They are evaluated on
OGBench's five tasks of the environment: an episode succeeds, and ends, where its arrangement is reached.

What differs from OGBench's files: the last episode is cut short where the size of the dataset asks for it, actions are
rounded to float32 before they are executed and not only in the file, and there is no validation split.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.recipes import rollouts, storage

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

# What the oracles of a task move; the environment names one of these whenever it sets a target
TASKS = {
    "cube-single": ("cube",),
    "cube-double": ("cube",),
    "scene": ("cube", "button", "drawer", "window"),
    "puzzle-3x3": ("button",),
}
TASK_IDS = [{"task_id": i} for i in range(1, 6)]  # of the evaluation of policies of goals
EPISODE_STEPS = 1000
PLAN_NOISE, PLAN_NOISE_SMOOTHING = 0.1, 0.5  # standard deviation as a share of the largest action; width in steps
MAX_STACK_PROBABILITY = 0.25  # that a cube's target is on top of the other cube; drawn anew for every episode
CUBE_POSITION = slice(14, 17)  # in qpos, behind the joints of arm and gripper


# --- Recipe ---------------------------------------------------------------------------------------


def write(task: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Plays, labels and writes the episodes as a Minari dataset."""
    play_env, task_env, _ = simulators(task)
    task_env.reset(seed=0)
    storage.write(
        dataset_id,
        data_path,
        rollouts.equal_episodes(rollout, (task,), num_transitions, EPISODE_STEPS, desc=dataset_id),
        play_env,
        task_env,
        reference_scores=(task_env.unwrapped.compute_reward() * task_env.spec.max_episode_steps, 0.0),
        algorithm_name="OGBench's plan oracles, with temporally correlated noise",
        code_permalink="common/recipes/manipulation.py",
        description=f"OGBench's {task}-play, collected anew, with the rewards of the default single task: functions of "
        "s, as in OGBench 1.2. Score 0 is the return of doing nothing, score 100 a return of 0.",
        goes_on_after_termination=True,
        requirements=["ogbench>=1.2"],
    )


def write_goals(task: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """The same episodes without rewards and ends, for policies of goals, and OGBench's five tasks."""
    import gymnasium as gym

    play_env, *_ = simulators(task)
    episodes = rollouts.equal_episodes(rollout, (task,), num_transitions, EPISODE_STEPS, desc=dataset_id)
    goal_env = gym.make(f"{task}-v0")
    goal_env.reset(seed=0)
    storage.write(
        dataset_id,
        data_path,
        (dataclasses.replace(e, rewards=0 * e.rewards, terminations=e.terminations & False) for e in episodes),
        play_env,
        goal_env,
        reference_scores=None,
        algorithm_name="OGBench's plan oracles, with temporally correlated noise",
        code_permalink="common/recipes/manipulation.py",
        description=f"OGBench's {task}-play, collected anew: the episodes of stitch/{task}-play without rewards and "
        "ends. A policy learns to reach any of their states, and is evaluated on OGBench's five tasks.",
        requirements=["ogbench>=1.2"],
        eval_tasks=TASK_IDS,
    )


# --- Environments ---------------------------------------------------------------------------------


@functools.cache  # once for each process: it takes seconds
def simulators(task: str) -> tuple[gym.Env, gym.Env, dict]:
    """The environment of the play (random states and targets, no terminations), the single task, and the oracles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GLFW, which finds no display: nothing is rendered
        import gymnasium as gym
        import ogbench  # noqa: F401 (registers its environments)

        play_env = gym.make(
            f"{task}-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=EPISODE_STEPS
        )
        task_env = gym.make(f"{task}-singletask-v0")
    return play_env, task_env, make_oracles(task, play_env)


def make_oracles(task: str, env: gym.Env) -> dict:
    """{what is moved: the oracle that moves it}."""
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    makers = {
        "cube": CubePlanOracle,
        # With nothing to grasp, the gripper stays closed
        "button": functools.partial(ButtonPlanOracle, gripper_always_closed=TASKS[task] == ("button",)),
        "drawer": DrawerPlanOracle,
        "window": WindowPlanOracle,
    }
    return {name: makers[name](env=env, noise=PLAN_NOISE, noise_smoothing=PLAN_NOISE_SMOOTHING) for name in TASKS[task]}


# --- Play -----------------------------------------------------------------------------------------


def rollout(task: str, seed: tuple[int, ...], num_steps: int) -> EpisodeBuffer:
    """One labelled episode; a function of its arguments only.

    It seeds NumPy's global generator, from which OGBench's oracles draw, so it belongs into a process of its own.
    """
    from minari.data_collector import EpisodeBuffer

    rng = np.random.default_rng(np.random.SeedSequence(seed))
    while True:
        env_seed = int(rng.integers(2**31))
        np.random.seed(int(rng.integers(2**32)))
        observations, actions, states = play(task, env_seed, rng.uniform(0, MAX_STACK_PROBABILITY), num_steps)
        if task != "scene" or in_sight(states["qpos"][:, CUBE_POSITION]):
            break
    rewards, terminations = label(task, states)
    return EpisodeBuffer(
        seed=env_seed,
        observations=observations,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=np.arange(1, num_steps + 1) == num_steps,
    )


def play(
    task: str, env_seed: int, stack_probability: float, num_steps: int
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """T + 1 observations, T actions, and the T simulator states in which these were taken."""
    env, _, oracles = simulators(task)
    obs, info = env.reset(seed=env_seed)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(obs, info)
    observations, actions, infos = [obs], [], []
    for _ in range(num_steps):
        actions.append(np.clip(oracle.select_action(obs, info), -1, 1).astype(np.float32))
        obs, _, _, _, info = env.step(actions[-1])
        observations.append(obs)
        infos.append(info)
        if oracle.done:
            target_obs, target_info = env.unwrapped.set_new_target(p_stack=stack_probability)
            oracle = oracles[target_info["privileged/target_task"]]
            oracle.reset(target_obs, target_info)
    # The info after a step holds the state before it
    states = {
        name: np.stack([i[f"prev_{name}"] for i in infos])
        for name in ("qpos", "qvel", "button_states")
        if f"prev_{name}" in info
    }
    return np.stack(observations), np.stack(actions), states


def in_sight(cube_positions: np.ndarray) -> bool:
    """Whether a scene's cube (T, 3) stays on the table, and in the drawer where that hides it (OGBench's criterion)."""
    _, y, z = cube_positions.T
    in_drawer = (0.06 <= z) & (z <= 0.08)
    return bool(((y < 0.29) & ((y > -0.3) | in_drawer)).all())


def label(task: str, states: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and terminations (T,) of the default single task, by OGBench's own code."""
    from ogbench.relabel_utils import relabel_dataset

    rows = dict(states)
    relabel_dataset(task, simulators(task)[1], rows)  # adds columns; masks are 0 where s solves the task
    return rows["rewards"], rows["masks"] == 0
