"""CartPole-v1 datasets of a mediocre linear controller, whose imitation does not solve the task.

The pole has to stay up and the cart on the track for 500 steps, each of which pays 1. The controller pushes right where
a weighted sum of cart position, cart velocity, pole angle and pole velocity is positive. Its weights balance the pole
and drive the cart outwards (the weights of the cart have the wrong sign): it leaves the track after about 275 steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.recipes import rollouts, storage

WEIGHTS = np.array([-0.2, -0.2, 1.0, 0.5])
MEDIUM_NOISE = 0.1  # share of uniformly random actions, with which the controller's mean return is about 200
RANDOM_RETURN = 22.1  # mean of 20,000 episodes of uniformly random actions, with a standard error of 0.1


# --- Recipes --------------------------------------------------------------------------------------


def random(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Uniformly random actions."""
    build(dataset_id, data_path, num_transitions, 1.0, 1.0)


def medium(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """The controller, with every tenth action random."""
    build(dataset_id, data_path, num_transitions, MEDIUM_NOISE, MEDIUM_NOISE)


def mixed(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """From random to medium, as in the replay buffer of a learner: the share of random actions falls linearly."""
    build(dataset_id, data_path, num_transitions, 1.0, MEDIUM_NOISE)


# --- Collection -----------------------------------------------------------------------------------


def build(dataset_id: str, data_path: Path, num_steps: int, first_noise: float, last_noise: float) -> None:
    """Writes episodes of the controller with a share of random actions from `first_noise` to `last_noise`."""
    import gymnasium as gym

    def behaviour(obs, rng, progress):
        noise = first_noise + progress * (last_noise - first_noise)
        return int(rng.integers(2)) if rng.random() < noise else int(WEIGHTS @ obs > 0)

    env = gym.make("CartPole-v1")
    storage.write(
        dataset_id,
        data_path,
        rollouts.collect(env, behaviour, num_steps, desc=dataset_id),
        env,
        env,
        reference_scores=(RANDOM_RETURN, 500.0),
        algorithm_name="Linear controller with random actions",
        code_permalink="common/recipes/cartpole.py",
        description=f"A linear controller that lets the cart drift; the share of random actions goes from "
        f"{first_noise:g} to {last_noise:g}. Random actions score 0, 500 steps score 100.",
        requirements=["gymnasium>=1.2"],
    )
    env.close()
