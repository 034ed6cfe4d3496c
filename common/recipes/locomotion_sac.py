"""Hopper, Walker2d and HalfCheetah again, with policies that are about as good as D4RL's: versions v1 and v2.

    random          uniform actions
    medium          the first policy whose return, over 20 episodes, is a third of an expert's or more (of ours on
                    hopper, of D4RL's on the others, whose data came before their experts)
    medium-replay   what training had seen until then: uniform actions, then 30 policies up to the medium one, evenly
                    over the steps of the training and in their order, as many transitions of each
    medium-expert   medium, then expert: half of the transitions each
    expert          the last policy of the training whose return, over 20 episodes, is 3200, 4500 and 9000 or more
                    (D4RL's experts have 3234, 4592 and 12135). Over 100 episodes hopper's has 3448, walker2d's 4426

The policies are of one run of SAC for each task (benchmarks/behaviour/train_sac.py), and measured and chosen by
benchmarks/behaviour/measure_sac.py; returns, learning curve and versions lie next to these two. They are kept as arrays
in half precision in behaviour/*-sac.npz, and evaluated here in NumPy. A task without a file has no recipe yet, and one
whose training has not reached its expert has only those that need none.

Every action is a draw from the policy, as in SAC's training: a Gaussian whose mean and standard deviation depend on the
state, squashed by tanh. Ends of episodes are those of v0 (locomotion.py).

Scores are on D4RL's own scale: 0 and 100 are the returns of its random and of its expert policy. So the expert of a
task has about 100 only where it earns what D4RL's does.

What differs from D4RL (https://arxiv.org/abs/2004.07219), whose names these are:
- The data are rolled out anew, of other trainings, in v5 of Gymnasium's environments, where D4RL has v2 of Gym.
- medium-replay is no replay buffer, in which every step has a policy of its own, but roll-outs of 30 policies.
- Medium is no better than the name says: it scores 36.6, 30.4 and 35.8 on hopper, walker2d and halfcheetah. D4RL's is
  better: BC of its data scores 53.5, 63.2 and 42.4 (CORL at 2ed69e3).
  This is why walker2d has a version v2. It is of the same training, but its medium policy is the first one whose
  return, over 20 episodes, scores 63.2 or more; it scores 73.5 over 100.
- Every dataset has a million transitions, unless its name asks for another number. D4RL's medium-expert has two
  million, its medium-replay as many as the training took to reach the medium policy.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.recipes import locomotion, storage

BEHAVIOUR = Path(__file__).parent / "behaviour"
VERSIONS = (("hopper", 1), ("walker2d", 1), ("halfcheetah", 1), ("walker2d", 2))  # (task, version) of the datasets
MEDIUM = {
    1: "the first policy of SAC whose return is a third of an expert's",
    2: "the first policy of SAC that scores 63.2 or more, as BC does on D4RL's medium data",
}
QUALITIES = {
    "random": "uniform actions",
    "medium": "the medium policy of SAC",
    "medium-replay": "uniform actions and policies of SAC up to the medium one, as in its training",
    "medium-expert": "the medium and the expert policy of SAC, half of the transitions each",
    "expert": "the last policy of SAC that earns what D4RL's expert does, or nearly so",
}
# Returns that score 0 and 100: D4RL's, infos.py at https://github.com/Farama-Foundation/D4RL
REFERENCE_SCORES = {
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "halfcheetah": (-280.178953, 12135.0),
}


class Policy(NamedTuple):
    """Two ReLU layers to the mean and the log of the standard deviation of a Gaussian, whose tanh is the action."""

    w0: np.ndarray  # (obs_dim, hidden_dim) float32
    b0: np.ndarray
    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray  # (hidden_dim, 2 * action_dim)
    b2: np.ndarray

    def gaussian(self, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(..., obs_dim) -> mean and standard deviation, each (..., action_dim), before the tanh."""
        x = np.maximum(obs.astype(np.float32) @ self.w0 + self.b0, 0)
        x = np.maximum(x @ self.w1 + self.b1, 0)
        mean, log_std = np.split(x @ self.w2 + self.b2, 2, axis=-1)
        return mean, np.exp(np.clip(log_std, -20, 2))  # the bounds of networks.TanhGaussianActor

    def act(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(obs_dim,) -> (action_dim,): a draw."""
        mean, std = self.gaussian(obs)
        return np.tanh(mean + std * rng.standard_normal(mean.shape))


def name_of(task: str, version: int) -> str:
    """Of the files that hold the policies and what was measured of them."""
    return f"{task}-sac" if version == 1 else f"{task}-sac-v{version}"


def qualities(task: str, version: int) -> list[str]:
    """Those whose policies are there: none, all, or all that need no expert."""
    file = BEHAVIOUR / f"{name_of(task, version)}.npz"
    if not file.exists():
        return []
    with np.load(file) as arrays:
        expert = "expert_return" in arrays.files
    return [name for name in QUALITIES if expert or not name.endswith("expert")]


def write(task: str, version: int, quality: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Rolls out the policies of a quality and writes the episodes as a Minari dataset."""
    env = locomotion.make_env(task)
    policies = functools.partial(policy, version=version)
    parts = snapshots(task, version, quality)
    made = MEDIUM[version] if quality == "medium" else QUALITIES[quality]
    episodes = locomotion.collect(task, parts, num_transitions, desc=dataset_id, policies=policies)
    storage.write(
        dataset_id,
        data_path,
        episodes,
        env,
        env,
        reference_scores=REFERENCE_SCORES[task],
        algorithm_name="uniform actions" if quality == "random" else "SAC (algos/sac.py)",
        code_permalink="common/recipes/locomotion_sac.py",
        description=f"{locomotion.TASKS[task]}: {made}. Score 100 is the return of D4RL's expert.",
        requirements=["gymnasium[mujoco]>=1.2"],
    )
    env.close()


@functools.cache
def load(task: str, version: int) -> dict[str, np.ndarray]:
    """The policies of a task, on a leading axis, and what benchmarks/behaviour/measure_sac.py measured of them."""
    with np.load(BEHAVIOUR / f"{name_of(task, version)}.npz") as file:
        return dict(file)


@functools.cache
def policy(task: str, snapshot: int, version: int) -> Policy:
    """One policy. Kept in half precision, evaluated in float32."""
    return Policy(*(load(task, version)[name][snapshot].astype(np.float32) for name in Policy._fields))


def snapshots(task: str, version: int, quality: str) -> list[int | None]:
    """The policies that collect a dataset, in this order and in equal parts; None stands for uniform actions."""
    steps, medium = load(task, version)["step"], int(load(task, version)["medium"])
    # In training uniform actions came before the first policy: as many parts of them as there are intervals until then
    uniform = round(steps[0] / ((steps[medium] - steps[0]) / medium))
    return {
        "random": [None],
        "medium": [medium],
        "medium-replay": [None] * uniform + [*range(medium + 1)],
        "medium-expert": [medium, len(steps) - 1],
        "expert": [len(steps) - 1],
    }[quality]
