"""Hopper, Walker2d and HalfCheetah (Gymnasium's MuJoCo tasks, v5), each at D4RL's five qualities of data: version v0.

    random          uniform actions
    medium          the first snapshot whose return, over 20 episodes, is a third of the expert's or more
    medium-replay   the snapshots from the untrained to the medium one, in this order: as many transitions of each
    medium-expert   medium, then expert: half of the transitions each
    expert          the last snapshot

The snapshots are of one run of PPO for each task, of a million steps (benchmarks/behaviour/train.py; returns, learning
curve and versions lie next to it). They are kept as arrays in behaviour/*.npz and evaluated here in NumPy, so the data
are rolled out anew wherever they are built, and neither PPO nor PyTorch is needed. Every action of a snapshot is drawn
from its own Gaussian, whose standard deviation is the exploration noise of that stage of the training.

An episode that falls terminates; one that meets the time limit of 1000 steps, or the end of its policy's share of the
data, is truncated.

What differs from D4RL (https://arxiv.org/abs/2004.07219), whose names these are:
- The policies are PPO's, and a Gaussian action is clipped to its bounds, where SAC's is squashed by tanh: up to a sixth
  of the experts' action components lie on a bound. Mean returns of medium and expert: hopper 676 and 1567 (D4RL's
  expert: 3234), walker2d 1381 and 4193 (4592), halfcheetah 1994 and 5035 (12135).
- Scores 0 and 100 are the mean returns of the random and of this expert policy, so they compare with no score of D4RL.
  The expert is the last snapshot and not the best: an earlier one of hopper's has 1822, which scores 116.
- medium has more than a third of the expert's return where the training was steep: 43 % in hopper, 40 % in
  halfcheetah, 33 % in walker2d.
- medium-replay is not a replay buffer, in which every step has a policy of its own, but roll-outs of a few snapshots.
- Every dataset has a million transitions, unless its name asks for another number. D4RL's medium-expert has two
  million, its medium-replay as many as the training took to reach the medium policy.
- The environments are v5 of Gymnasium, where D4RL has v2 of Gym.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.recipes import rollouts, storage
from common.recipes.rollouts import Episode, Policy, rollout

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

TASKS = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5", "halfcheetah": "HalfCheetah-v5"}
QUALITIES = {
    "random": "uniform actions",
    "medium": "the first PPO snapshot whose return is a third of the expert's",
    "medium-replay": "PPO snapshots from the untrained policy to the medium one, as many transitions of each",
    "medium-expert": "the medium and the expert policy of PPO, half of the transitions each",
    "expert": "the last PPO snapshot",
}
EPISODE_STEPS = 1000  # the time limit of the three tasks


# --- Recipe ---------------------------------------------------------------------------------------


def write(task: str, quality: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Rolls out the policies of a quality and writes the episodes as a Minari dataset."""
    behaviour = load(task)
    env = make_env(task)
    storage.write(
        dataset_id,
        data_path,
        collect(task, snapshots(task, quality), num_transitions, desc=dataset_id),
        env,
        env,
        reference_scores=(float(behaviour["random_return"]), float(behaviour["expert_return"])),
        algorithm_name="uniform actions" if quality == "random" else "PPO of Stable-Baselines3",
        code_permalink="common/recipes/locomotion.py",
        description=f"{TASKS[task]}: {QUALITIES[quality]}. Score 100 is the mean return of the expert snapshot.",
        requirements=["gymnasium[mujoco]>=1.2"],
    )
    env.close()


# --- Policies -------------------------------------------------------------------------------------


@functools.cache
def load(task: str) -> dict[str, np.ndarray]:
    """The snapshots of a task, on a leading axis, and what benchmarks/behaviour/train.py measured of them."""
    with np.load(Path(__file__).parent / "behaviour" / f"{task}.npz") as file:
        return dict(file)


@functools.cache
def policy(task: str, snapshot: int) -> Policy:
    """One snapshot. Kept in float32, evaluated in float64."""
    return Policy(*(load(task)[name][snapshot].astype(np.float64) for name in Policy._fields))


def snapshots(task: str, quality: str) -> list[int | None]:
    """The snapshots that collect a dataset, in this order and in equal parts; None stands for uniform actions."""
    medium, expert = int(load(task)["medium"]), len(load(task)["step"]) - 1
    return {
        "random": [None],
        "medium": [medium],
        "medium-replay": [*range(medium + 1)],
        "medium-expert": [medium, expert],
        "expert": [expert],
    }[quality]


# --- Roll-outs ------------------------------------------------------------------------------------


def make_env(task: str) -> gym.Env:
    import gymnasium as gym

    return gym.make(TASKS[task])


def collect(
    task: str,
    snapshots: list[int | None],
    num_transitions: int,
    seed: int = 0,
    num_processes: int | None = None,
    desc: str = "roll-outs",
    policies: Callable = policy,
) -> Iterator[EpisodeBuffer]:
    """Episodes of exactly `num_transitions` transitions, an equal part from each of `snapshots`, in their order.

    `policies`: (task, snapshot) -> policy, a function of a module, since other processes call it.
    """
    parts = [(policies, task, snapshot) for snapshot in snapshots]
    return rollouts.equal_parts(_rollout, parts, num_transitions, EPISODE_STEPS, desc, seed, num_processes)


def _rollout(policies: Callable, task: str, snapshot: int | None, seed: tuple[int, ...]) -> Episode:
    """In a process of the pool."""
    return rollout(process_env(task), None if snapshot is None else policies(task, snapshot), seed)


process_env = functools.cache(make_env)  # one environment for each process
