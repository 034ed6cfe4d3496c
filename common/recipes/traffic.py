"""Traffic lights of one crossing in SUMO: data of a fixed plan, of random phases, and of longest queue first.

The crossing is "2way-single-intersection" of the package sumo-rl 1.4.5 (Lucas Alegre, MIT), in the simulator SUMO 1.28
as libsumo (EPL-2.0, or GPL-2.0-or-later). The user installs both, and nothing of them is here. Roads come from north,
east, south and west with two lanes each: lane 0 leads straight on and to the right, lane 1 to the left. An episode has
the first 1000 s of its demand "vhvh": 2000 cars an hour come from north and south, 500 from east and west.

    action       which of four phases shall have green for the next 5 s. Where that changes, the first 2 s are yellow.
                 After a change the phase stays for 10 s: another one that is asked for earlier is ignored.
    observation  the phase, one-hot (4); whether it may change (1); the density of each lane (8); the queue of each lane
                 (8). Density and queue are cars, and cars that stand, as a share of the 18.9 for which a lane has room.
    reward       minus a hundredth of the cars that stand on the eight lanes at the end of the step: sumo-rl's "queue",
                 divided. The rewards of its default, "diff-waiting-time", sum to what waits at the end alone. A car
                 that finds its lane full waits outside, and costs nothing.
    end          after 200 steps, a truncation: nothing terminates.

Behaviours: `fixed` is the network's own plan, whose 35, 8, 35 and 8 s become 7, 2, 7 and 2 steps; it depends on the
time, which is not observed. `random` asks for each phase with the same probability at each step. `queue` asks for the
phase whose two lanes have the longest queues together. `mixed` has episodes of the three in turn.

D4RL's Flow data (https://arxiv.org/abs/2004.07219) are of SUMO too, and of another task: there the agent drives some of
the cars, by their accelerations, on a ring road or where a ramp joins a highway, and is paid for speed. Here it sets
lights and drives no car, and actions are discrete. Scores cannot be compared.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.recipes import rollouts, storage

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer

# The order of the lanes in an observation, and which of them have green in each phase. A test compares both with the
# network's file: with another order, longest queue first is far worse than random phases.
LANES = ("n_t_0", "n_t_1", "e_t_0", "e_t_1", "s_t_0", "s_t_1", "w_t_0", "w_t_1")
GREEN = (("n_t_0", "s_t_0"), ("n_t_1", "s_t_1"), ("e_t_0", "w_t_0"), ("e_t_1", "w_t_1"))
SERVED = np.array([[lane in lanes for lane in LANES] for lanes in GREEN])  # (phases, lanes)
QUEUES = slice(13, 21)  # of an observation

STEPS, SECONDS = 200, 5  # of an episode, and of a step
PLAN = np.repeat(np.arange(4), (7, 2, 7, 2))
QUALITIES = {"fixed": ("fixed",), "random": ("random",), "queue": ("queue",), "mixed": ("fixed", "random", "queue")}
NAMES = {"fixed": "the network's own plan", "random": "random phases", "queue": "longest queue first"}
# Means of returns(behaviour, 300, seed=1), with standard errors of 0.47 and 0.07
REFERENCES = {"random": -65.76, "queue": -25.37}
REQUIREMENTS = ["sumo-rl==1.4.5", "libsumo==1.28.0"]


# --- Recipes ------------------------------------------------------------------------------------------


def write(quality: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Collects episodes and writes them. Where longest queue first is not the best of the three, nothing is written."""
    from common.recipes.traffic_env import missing

    if absent := missing():
        raise SystemExit(f"Building {dataset_id} needs {absent}.")
    check_rule({behaviour: returns(behaviour, 2, seed=1).mean() for behaviour in NAMES})
    env, behaviours = simulator(), QUALITIES[quality]
    low, high = REFERENCES["random"], REFERENCES["queue"]
    names = ", ".join(NAMES[behaviour] for behaviour in behaviours) + " in turn" * (len(behaviours) > 1)
    storage.write(
        dataset_id,
        data_path,
        rollouts.equal_episodes(rollout, (behaviours,), num_transitions, STEPS, desc=dataset_id),
        env,
        env,
        reference_scores=(low, high),
        algorithm_name=names[0].upper() + names[1:],
        code_permalink="common/recipes/traffic.py",
        description=f"Traffic lights of one crossing (SUMO 1.28, sumo-rl 1.4.5): {names}. A step of {SECONDS} s costs "
        f"0.01 for each car that stands. Random phases score 0 ({low:g}), longest queue first scores 100 ({high:g}).",
        requirements=REQUIREMENTS,
    )


def check_rule(means: dict[str, float]) -> None:
    """Refuses data in which longest queue first (the mean return "queue") is not better than the other behaviours."""
    if max(means, key=means.get) != "queue":
        found = ", ".join(f"{name} {mean:.1f}" for name, mean in means.items())
        raise SystemExit(
            f"Longest queue first is not the best behaviour (mean returns: {found}), as where lanes have another order "
            f"than common/recipes/traffic.py says: pip install {' '.join(REQUIREMENTS)}."
        )


# --- Behaviours ---------------------------------------------------------------------------------------


def action_of(behaviour: str, obs: np.ndarray, step: int, rng: np.random.Generator) -> int:
    """The phase that shall have green."""
    if behaviour == "fixed":
        return int(PLAN[step % len(PLAN)])
    if behaviour == "random":
        return int(rng.integers(len(GREEN)))
    return int(np.argmax(SERVED @ obs[QUEUES]))


def returns(behaviour: str, num_episodes: int, seed: int) -> np.ndarray:
    """Returns (num_episodes,) of a behaviour. The data are of seed 0."""
    return np.array([rollout((behaviour,), (seed, k), STEPS).rewards.sum() for k in range(num_episodes)])


def rollout(behaviours: tuple[str, ...], seed: tuple[int, int], num_steps: int) -> EpisodeBuffer:
    """The first steps of episode seed[1], in which the behaviours take turns; a function of its arguments only."""
    from minari.data_collector import EpisodeBuffer

    env, rng = simulator(), np.random.default_rng(np.random.SeedSequence(seed))
    behaviour = behaviours[seed[1] % len(behaviours)]
    env_seed = int(rng.integers(2**31))
    observations, actions, rewards = [env.reset(seed=env_seed)[0]], [], []
    for step in range(num_steps):
        actions.append(action_of(behaviour, observations[-1], step, rng))
        obs, reward, *_ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
    return EpisodeBuffer(
        seed=env_seed,
        observations=np.array(observations),
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.zeros(num_steps, bool),
        truncations=np.arange(1, num_steps + 1) == num_steps,
    )


@functools.cache  # once for each process
def simulator() -> gym.Env:
    from common.recipes.traffic_env import make_env

    return make_env()
