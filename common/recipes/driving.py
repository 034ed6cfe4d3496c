"""Driving on a motorway with other cars, by a rule of three lines and at random: highway-env's "highway-fast-v0".

The package highway-env 1.12.1 (Edouard Leurent and others, MIT) is installed by the user. Three lanes lead straight on,
20 other cars drive on them and change lanes by rules of their own, and one car is the agent's. A decision holds for one
second, in which the package's own controllers steer and brake.

    action       change to the left lane (0), keep on (1), change to the right lane (2), the next higher speed (3), the
                 next lower (4), of 20, 25 and 30 m/s. A change to a lane that is not there does nothing.
    observation  five numbers each of the car and of the four nearest others ahead, the nearest first: whether there is
                 one, x / 200 m, y / 12 m, and their speeds / 80 m/s. Of the others they are relative to the car. Ahead
                 also is who is less than 10 m behind. The car's own x ends at 1, after 200 m.
    reward       2/3 in each second, up to 4/15 more for speed, from 20 to 30 m/s, and up to 1/15 more the farther right
                 the lane is. The second of a crash costs 2/3: there it is 0 to 1/3.
    end          a crash terminates. After 30 seconds the episode is truncated.

Behaviours: `rule` speeds up where there is room ahead, else changes to a lane with more room, else slows down. `random`
takes each action with the same probability in each second. `mixed` has half of the transitions of each.

D4RL's driving data (https://arxiv.org/abs/2004.07219) are of the simulator CARLA, and of another task: there a policy
sees images from the driver's place, accelerates, brakes and steers by continuous actions, and the data are of
controllers that keep to the lane of a figure eight or cross a small town. Here the other cars are observed as numbers,
one of five manoeuvres is chosen in each second, and half of `mixed` are random actions, which crash. Scores cannot be
compared.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.recipes import rollouts, storage
from common.recipes.rollouts import Episode

if TYPE_CHECKING:
    import gymnasium as gym

LEFT, _, RIGHT, FASTER, SLOWER = range(5)
SECONDS, LANES = 30, 3
METRES = 200  # of 1 in an observation's x
QUALITIES = {"random": ("random",), "rule": ("rule",), "mixed": ("random", "rule")}
NAMES = {"random": "random actions", "rule": "a rule of three lines"}
# Means of returns("random", 200, seed=1) and returns("rule", 50, seed=1), with standard errors of 0.41 and 0.67
REFERENCES = {"random": 8.24, "rule": 24.14}
REQUIREMENTS = ["highway-env==1.12.1"]


# --- Recipe -------------------------------------------------------------------------------------------


def write(quality: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Collects episodes and writes them; nothing where the rule does not drive clearly better than chance."""
    if missing():
        raise SystemExit(
            f"Building {dataset_id} needs highway_env, which cannot be imported: pip install -e '.[driving]'."
        )
    check_rule({behaviour: returns(behaviour, 5, seed=1).mean() for behaviour in NAMES})
    behaviours, env = QUALITIES[quality], simulator()
    low, high = REFERENCES["random"], REFERENCES["rule"]
    names = " and ".join(NAMES[behaviour] for behaviour in behaviours)
    halves = ", half of the transitions each" * (len(behaviours) > 1)
    storage.write(
        dataset_id,
        data_path,
        rollouts.equal_parts(rollout, [(x,) for x in behaviours], num_transitions, SECONDS, desc=dataset_id),
        env,
        env,
        reference_scores=(low, high),
        algorithm_name=names[0].upper() + names[1:],
        code_permalink="common/recipes/driving.py",
        description=f"Driving on a motorway of three lanes with 20 other cars (highway-env 1.12.1): {names}{halves}. "
        f"An episode has at most {SECONDS} seconds with a decision in each; a crash ends it. Random actions score 0 "
        f"({low:g}), the rule scores 100 ({high:g}).",
        requirements=REQUIREMENTS,
    )


def missing() -> bool:
    return importlib.util.find_spec("highway_env") is None


def check_rule(means: dict[str, float]) -> None:
    """Refuses data of a rule whose mean return is not half as much again as that of random actions, or more."""
    if not means["rule"] > 1.5 * means["random"]:
        found = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
        raise SystemExit(
            f"The rule does not drive clearly better than random actions (mean returns: {found}), as where "
            f"observations are not what common/recipes/driving.py says: pip install {' '.join(REQUIREMENTS)}."
        )


# --- Behaviours ---------------------------------------------------------------------------------------


def action_of(behaviour: str, obs: np.ndarray, rng: np.random.Generator) -> int:
    if behaviour == "random":
        return int(rng.integers(5))
    left, own, right = room(obs)
    if own > 30:
        return FASTER
    if max(left, right) > own + 5:
        return LEFT if left > right else RIGHT
    return SLOWER


def room(obs: np.ndarray) -> list[float]:
    """Metres to the next car in the lane to the left, in the car's own and in that to the right.

    It is METRES where none is seen, negative where one is beside or behind, and -inf where there is no lane. `obs` is
    (25,) of the environment.
    """
    car, others = obs[:5], obs[5:].reshape(-1, 5)
    others = others[others[:, 0] == 1]
    metres = []
    for side in (-1, 0, 1):
        there = 0 <= np.rint(LANES * car[2]) + side < LANES
        in_lane = others[np.rint(LANES * others[:, 2]) == side]
        metres.append(METRES * float(in_lane[:, 1].min(initial=1)) if there else -np.inf)
    return metres


def returns(behaviour: str, num_episodes: int, seed: int) -> np.ndarray:
    """Returns (num_episodes,) of a behaviour. The data are of seed 0."""
    return np.array([rollout(behaviour, (seed, k)).rewards.sum() for k in range(num_episodes)])


def rollout(behaviour: str, seed: tuple[int, ...]) -> Episode:
    """One episode; a function of its arguments only."""
    env, rng = simulator(), np.random.default_rng(np.random.SeedSequence(seed))
    env_seed = int(rng.integers(2**31))
    observations, actions, rewards = [env.reset(seed=env_seed)[0]], [], []
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(action_of(behaviour, observations[-1], rng))
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(float(reward))
    return Episode(np.stack(observations), np.array(actions), np.array(rewards), bool(terminated), env_seed)


# --- The environment ----------------------------------------------------------------------------------


@functools.cache  # once for each process
def simulator() -> gym.Env:
    """The motorway with flat observations, with its time limit and with the spec that travels in a dataset's file."""
    import gymnasium as gym
    from gymnasium.envs.registration import EnvSpec, WrapperSpec

    return gym.make(
        EnvSpec(
            id="stitch/DrivingHighway-v0",  # it is not registered
            entry_point="highway_env.envs.highway_env:HighwayEnvFast",
            max_episode_steps=SECONDS,
            disable_env_checker=True,
            additional_wrappers=(WrapperSpec("FlattenObservation", "gymnasium.wrappers:FlattenObservation", {}),),
        )
    )
