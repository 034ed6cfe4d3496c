"""Episodes of a behaviour policy in a Gymnasium environment, for recipes that need no more than that."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer


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
