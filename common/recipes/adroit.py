"""The Adroit hand, 24 joints and up to 30 actuators: it opens a door, hammers a nail, turns a pen, carries a ball.

    expert   roll-outs of D4RL's own experts, which DAPG trained (behaviour/adroit/NOTICE.md names their source)
    cloned   roll-outs of a policy that was cloned from 25 episodes of the expert, and then copies of these episodes:
             half of the transitions each

As in D4RL, every action is drawn from a Gaussian policy and clipped to its bounds; tasks pay and end as D4RL's
(common/recipes/adroit_env.py says what gymnasium-robotics has otherwise); and the returns that score 0 and 100 are
D4RL's, so that scores are on its scale. The expert's mean action, without noise, scores more: about 105 in door and 127
in hammer. So does a policy that imitates it well, since evaluation has no noise either.

What differs from D4RL (https://arxiv.org/abs/2004.07219), whose names these are:
- There is no *human*: no package has the demonstrations of people.
- *cloned* imitates no people. Its 25 demonstrations are the expert's, where D4RL's are those of people, which are
  harder to imitate: published scores of door, hammer and relocate are near 0 there. **They do not compare with ours.**
- The clones are ours (benchmarks/behaviour/clone.py), with the layers and steps of the cloning in DAPG's example.
- MuJoCo is a newer one.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.recipes import rollouts, storage
from common.recipes.rollouts import Episode, Policy

if TYPE_CHECKING:
    import gymnasium as gym
    from gymnasium.envs.registration import EnvSpec


class Task(NamedTuple):
    env_id: str
    episode_steps: int  # D4RL's time limit
    num_transitions: int  # as many as in D4RL, which has 5000 episodes


TASKS = {
    "door": Task("AdroitHandDoor-v1", 200, 1_000_000),
    "hammer": Task("AdroitHandHammer-v1", 200, 1_000_000),
    "relocate": Task("AdroitHandRelocate-v1", 200, 1_000_000),
    "pen": Task("AdroitHandPen-v1", 100, 500_000),
}
QUALITIES = {"expert": ["expert"], "cloned": ["clone", "demonstration"]}
NUM_DEMONSTRATIONS = 25
DEMONSTRATION_SEED = 2**31  # apart from those of the data
BEHAVIOUR = Path(__file__).parent / "behaviour" / "adroit"


# --- Recipe ---------------------------------------------------------------------------------------


def write(task: str, quality: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Rolls out the policies of a quality and writes the episodes as a Minari dataset."""
    from common.environments import D4RL_REFERENCE_SCORES

    low, high = reference = D4RL_REFERENCE_SCORES[f"D4RL/{task}/"]
    measured = load(f"{task}-clone")
    scores = {name: 100 * (measured[f"{name}_return"].mean() - low) / (high - low) for name in ("expert", "clone")}
    roll = f"roll-outs of DAPG's expert (mean score {scores['expert']:.0f})"
    if quality == "cloned":
        roll = (
            f"roll-outs of a clone of {NUM_DEMONSTRATIONS} episodes of DAPG's expert, and copies of these episodes, "
            f"half of the transitions each (mean scores {scores['clone']:.0f} and {scores['expert']:.0f})"
        )
    env = make_env(task)
    parts = [(task, part) for part in QUALITIES[quality]]
    storage.write(
        dataset_id,
        data_path,
        rollouts.equal_parts(rollout, parts, num_transitions, TASKS[task].episode_steps, desc=dataset_id),
        env,
        env,
        reference_scores=reference,
        algorithm_name="DAPG" if quality == "expert" else "Behaviour cloning of DAPG, and DAPG",
        code_permalink="common/recipes/adroit.py",
        description=f"{env.spec.id}, paid and ended as in D4RL: {roll}. Scores are on D4RL's scale.",
        requirements=["gymnasium-robotics>=1.4"],
    )
    env.close()


# --- Policies -------------------------------------------------------------------------------------


@functools.cache
def load(name: str) -> dict[str, np.ndarray]:
    """The arrays of a file in behaviour/adroit/, as its NOTICE.md explains them."""
    with np.load(BEHAVIOUR / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def policy(name: str) -> Policy:
    """A policy in float64, with its normalisation of observations and actions in the first and the last layer."""
    x = {key: array.astype(np.float64) for key, array in load(name).items()}
    w0 = x["w0"] / (x["in_scale"] + 1e-8)  # as DAPG's code divides
    w2 = x["w2"] * x["out_scale"][:, None]
    b0, b2 = x["b0"] - w0 @ x["in_shift"], x["b2"] * x["out_scale"] + x["out_shift"]
    return Policy(w0.T, b0, x["w1"].T, x["b1"], w2.T, b2, np.exp(x["log_std"]))


# --- Roll-outs ------------------------------------------------------------------------------------


def make_env(task: str) -> gym.Env:
    import gymnasium as gym
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    return gym.make(as_in_d4rl(gym.spec(TASKS[task].env_id)))


def as_in_d4rl(spec: EnvSpec) -> EnvSpec:
    """The specification; if it is of one of TASKS, with D4RL's time limit, and with D4RL's rewards and ends."""
    from gymnasium.envs.registration import WrapperSpec

    spec = copy.deepcopy(spec)
    for name, task in TASKS.items():
        if spec.id == task.env_id:
            spec.max_episode_steps = task.episode_steps
            wrapper = WrapperSpec("AsInD4RL", "common.recipes.adroit_env:AsInD4RL", {"task": name})
            spec.additional_wrappers = (*spec.additional_wrappers, wrapper)
    return spec


def rollout(task: str, part: str, seed: tuple[int, ...]) -> Episode:
    """An episode of a part of QUALITIES; a function of its arguments only. `seed` ends in the episode's number."""
    if part == "demonstration":
        return demonstration(task, seed[-1] % NUM_DEMONSTRATIONS)
    return rollouts.rollout(_process_env(task), policy(task if part == "expert" else f"{task}-clone"), seed)


@functools.lru_cache(NUM_DEMONSTRATIONS)  # copied tens of times
def demonstration(task: str, number: int) -> Episode:
    """One of the episodes of the expert from which the clone has learned."""
    return rollouts.rollout(_process_env(task), policy(task), (DEMONSTRATION_SEED, number))


_process_env = functools.cache(make_env)  # one environment for each process
