"""What recipes share: policies and their episodes in a Gymnasium environment, and work in other processes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer


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


def collect(env: gym.Env, behaviour: Callable, num_steps: int, desc: str, seed: int = 0) -> list[EpisodeBuffer]:
    """Episodes until there are at least `num_steps` transitions; a function of its arguments only.

    `behaviour`: (observation, rng, progress) -> action, where `progress` is the share of `num_steps` that was collected
    before the episode, from 0 to 1.
    """
    episodes: list[EpisodeBuffer] = []
    total_steps = 0
    with tqdm(total=num_steps, desc=desc, unit=" steps") as bar:
        while total_steps < num_steps:
            rng = np.random.default_rng(np.random.SeedSequence([seed, len(episodes)]))
            episodes.append(_episode(env, behaviour, rng, total_steps / num_steps))
            total_steps += len(episodes[-1])
            bar.update(len(episodes[-1]))
    return episodes


@contextlib.contextmanager
def processes(number: int) -> Iterator[Callable]:
    """Other processes: `with processes(2) as run: results = run(function, jobs)`, as the built-in map.

    Of `jobs`, which may be endless, a few are computed ahead; the results come in their order. loky's processes are not
    forked, which can deadlock where JAX has threads, and do not import the caller's main module: recipes build from a
    script without a main guard, a notebook and standard input too.
    """
    from loky import ProcessPoolExecutor

    # Without warnings: each process would warn of the same. Where the caller is killed, they end after a minute or two.
    # A product of matrices has one thread: the processes share the cores, and more threads would wait for each other.
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    pool = ProcessPoolExecutor(
        number, timeout=60, initializer=warnings.simplefilter, initargs=("ignore",), env=threads
    )  # fmt: skip

    def run(function: Callable, jobs: Iterable) -> Iterator:
        waiting = deque()
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > 2 * number:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    finally:
        pool.shutdown(kill_workers=True)


def equal_episodes(
    rollout: Callable,
    of: tuple,
    num_transitions: int,
    length: int,
    desc: str,
    seed: int = 0,
    num_processes: int | None = None,
) -> Iterator[EpisodeBuffer]:
    """Episodes `rollout(*of, (seed, number), steps)` of exactly `num_transitions` transitions; the last may be short.

    The number of processes, by default one for each core, changes nothing but the time it takes: every episode has a
    seed of its own, and the episodes come in the order of their seeds.
    """
    starts = range(0, num_transitions, length)
    jobs = [(rollout, *of, (seed, k), min(length, num_transitions - start)) for k, start in enumerate(starts)]
    number = num_processes or min(os.cpu_count(), len(jobs))
    with processes(number) as run, tqdm(total=num_transitions, desc=desc, unit=" steps") as progress:
        for episode in run(_call, jobs):
            yield episode
            progress.update(len(episode.rewards))


def equal_parts(
    rollout: Callable,
    parts: list[tuple],
    num_transitions: int,
    longest: int,
    desc: str,
    seed: int = 0,
    num_processes: int | None = None,
) -> Iterator[EpisodeBuffer]:
    """Episodes `rollout(*part, (seed, i, k))` of exactly `num_transitions` transitions, an equal share from each of the
    `parts`, in their order; i is the number of the part, k that of its episode. None is longer than `longest`.

    The last episode of a share is cut short. The number of processes, by default one for each core, changes nothing but
    the time it takes: every episode has a seed of its own, and the episodes come in the order of their seeds.
    """
    ends = np.linspace(0, num_transitions, len(parts) + 1).astype(int)
    number = num_processes or min(os.cpu_count(), -(-num_transitions // longest))
    with processes(number) as run, tqdm(total=num_transitions, desc=desc, unit=" steps") as progress:
        for i, (part, steps_left) in enumerate(zip(parts, np.diff(ends).tolist(), strict=True)):
            num_episodes = 0
            while steps_left > 0:
                # All of these are needed, even if none of them ends early: no roll-out is ever thrown away.
                batch = range(num_episodes, num_episodes - (-steps_left // longest))
                num_episodes = batch.stop
                for episode in run(_call, [(rollout, *part, (seed, i, k)) for k in batch]):
                    yield to_buffer(episode, max_steps=steps_left)
                    num_steps = min(len(episode.rewards), steps_left)
                    steps_left -= num_steps
                    progress.update(num_steps)


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


def _call(job: tuple) -> Any:
    """In a process of the pool."""
    function, *arguments = job
    return function(*arguments)


def _episode(env: gym.Env, behaviour: Callable, rng: np.random.Generator, progress: float) -> EpisodeBuffer:
    from minari.data_collector import EpisodeBuffer

    seed = int(rng.integers(2**31))
    obs, _ = env.reset(seed=seed)
    observations, steps = [obs], []
    terminated = truncated = False
    while not (terminated or truncated):
        action: Any = behaviour(obs, rng, progress)
        obs, reward, terminated, truncated, _ = env.step(action)
        observations.append(obs)
        steps.append((action, float(reward), terminated, truncated))
    actions, rewards, terminations, truncations = (np.array(column) for column in zip(*steps, strict=True))
    return EpisodeBuffer(
        seed=seed,
        observations=np.array(observations),
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        truncations=truncations,
    )
