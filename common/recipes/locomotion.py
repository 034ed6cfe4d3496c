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
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from common.recipes import rollouts, storage

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


class Policy(NamedTuple):
    """A Gaussian policy: two tanh layers to its mean, and a standard deviation that is the same in all states."""

    w0: np.ndarray  # (obs_dim, hidden_dim), the observations' normalisation included
    b0: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray  # (hidden_dim, action_dim)
    b2: np.ndarray
    std: np.ndarray  # (action_dim,)

    def mean(self, obs: np.ndarray) -> np.ndarray:
        """(..., obs_dim) -> (..., action_dim), not clipped."""
        return np.tanh(np.tanh(obs @ self.w0 + self.b0) @ self.w1 + self.b1) @ self.w2 + self.b2

    def act(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(obs_dim,) -> (action_dim,): a draw, clipped."""
        return np.clip(self.mean(obs) + self.std * rng.standard_normal(self.std.shape), -1, 1)


class Episode(NamedTuple):
    observations: np.ndarray  # (T + 1, obs_dim)
    actions: np.ndarray  # (T, action_dim) float32 in [-1, 1]
    rewards: np.ndarray  # (T,)
    terminated: bool  # else truncated
    seed: int  # of the environment's reset


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


def rollout(env: gym.Env, policy: Policy | None, seed: tuple[int, ...]) -> Episode:
    """One episode; without a policy, of uniform actions. A function of its arguments only.

    A policy is whatever has `act(obs, rng)`, a draw of an action.
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    env_seed = int(rng.integers(2**31))
    obs, _ = env.reset(seed=env_seed)
    observations, actions, rewards = [obs], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        if policy is None:
            action = rng.uniform(-1, 1, env.action_space.shape)
        else:
            action = policy.act(obs, rng)
        actions.append(action.astype(np.float32))
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(float(reward))
    return Episode(np.stack(observations), np.stack(actions), np.array(rewards), bool(terminated), env_seed)


def collect(
    task: str,
    snapshots: list[int | None],
    num_transitions: int,
    seed: int = 0,
    num_processes: int | None = None,
    desc: str = "roll-outs",
    policies: Callable = policy,
) -> Iterator[EpisodeBuffer]:
    """Episodes of exactly `num_transitions` transitions, an equal part from each snapshot, in the order of `snapshots`.

    `policies`: (task, snapshot) -> policy, a function of a module, since other processes call it.
    The number of processes, by default one for each core, changes nothing but the time it takes: every episode has a
    seed of its own, and the episodes come in the order of their seeds.
    """
    ends = np.linspace(0, num_transitions, len(snapshots) + 1).astype(int)
    num_processes = num_processes or min(os.cpu_count(), num_full_episodes(num_transitions))
    with rollouts.processes(num_processes) as run, tqdm(total=num_transitions, desc=desc, unit=" steps") as progress:
        for part, (snapshot, steps_left) in enumerate(zip(snapshots, np.diff(ends).tolist(), strict=True)):
            num_episodes = 0
            while steps_left > 0:
                # All of these are needed, even if none of them ends early: no roll-out is ever thrown away.
                batch = range(num_episodes, num_episodes + num_full_episodes(steps_left))
                num_episodes = batch.stop
                for episode in run(_rollout, [(policies, task, snapshot, (seed, part, k)) for k in batch]):
                    yield to_buffer(episode, max_steps=steps_left)
                    num_steps = min(len(episode.rewards), steps_left)
                    steps_left -= num_steps
                    progress.update(num_steps)


def num_full_episodes(num_steps: int) -> int:
    """The fewest episodes that hold `num_steps` steps."""
    return -(-num_steps // EPISODE_STEPS)


def to_buffer(episode: Episode, max_steps: int) -> EpisodeBuffer:
    """In Minari's form; what is cut off after `max_steps` leaves a truncated episode."""
    from minari.data_collector import EpisodeBuffer

    length = len(episode.rewards)
    kept = min(length, max_steps)
    last = np.arange(1, kept + 1) == kept
    terminated = episode.terminated and kept == length
    return EpisodeBuffer(
        seed=episode.seed,
        observations=episode.observations[: kept + 1],
        actions=episode.actions[:kept],
        rewards=episode.rewards[:kept],
        terminations=last & terminated,
        truncations=last & (not terminated),
    )


def _rollout(job: tuple[Callable, str, int | None, tuple[int, ...]]) -> Episode:
    """In a process of the pool."""
    policies, task, snapshot, seed = job
    return rollout(process_env(task), None if snapshot is None else policies(task, snapshot), seed)


process_env = functools.cache(make_env)  # one environment for each process
