"""The environment of a dataset: what lies between it and a network, and what a policy is worth in it.

    policy.interface.observe(observation)                # raw, or a batch of them -> flat, normalised, for networks
    policy.interface.to_env(action)                      # [-1, 1] or 0 .. n - 1 -> the environment's own units
    env.measure(policy, q, seeds, num_episodes=20)       # columns of metrics.jsonl; a failure costs a line, not the run
    env.evaluate(policy, seeds, num_episodes=20)         # the episodes behind them (Evaluation)

An Interface is a few numbers, in config.json of every run: with it a trained policy acts without the dataset.
This module imports gymnasium only when an environment is made.
"""

import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.recipes import tabular


class Spec(NamedTuple):
    """What an algorithm must know of its dataset to build its networks."""

    obs_dim: int
    action_dim: int  # length of the action vector, or the number of discrete actions
    discrete: bool = False
    goal_dim: int = 0  # length of the goal that follows an observation handed to the policy; 0: no goals
    terminal_of: Callable | None = None  # un-normalised next_obs (..., obs_dim) -> whether it ends an episode, if known


class Evaluation(NamedTuple):
    """What a policy got (`returns`), and what is needed to ask whether a critic's belief about it is true.

    The true value of a policy is that of its start: E[sum_t discount^t r_t], with the rewards scaled and shifted as the
    algorithm sees them, until the episode ends by itself or at its time limit. What would have followed a time limit is
    not in it; a critic, which knows of none, adds discount^limit of that. It believes `q(obs, action) @ weight`.
    """

    returns: np.ndarray  # (num_seeds, num_episodes) float64, undiscounted, of the environment's own rewards
    value: np.ndarray  # (num_seeds,) float64: the true value, a mean over the episodes
    obs: np.ndarray  # (num_seeds, num_starts, obs_dim) float32: where the episodes start
    action: np.ndarray  # (num_seeds, num_starts, ...): of the policy there
    weight: np.ndarray  # (num_starts,) float64, sums to 1: how likely each start is


# Reference scores of D4RL (https://github.com/Farama-Foundation/D4RL, d4rl/infos.py: REF_MIN_SCORE, REF_MAX_SCORE), for
# the Minari datasets of the same tasks, which mostly do not carry any. D4RL's Maze2D scores are left out: Minari's
# pointmaze data have another reward and horizon. Scores of mujoco/* are on Gymnasium's v5 environments, D4RL's on v2.
D4RL_REFERENCE_SCORES = {
    "mujoco/ant/": (-325.6, 3879.7),
    "mujoco/halfcheetah/": (-280.178953, 12135.0),
    "mujoco/hopper/": (-20.272305, 3234.3),
    "mujoco/walker2d/": (1.629008, 4592.3),
    "D4RL/antmaze/": (0.0, 1.0),
    "D4RL/door/": (-56.512833, 2880.5693087298737),
    "D4RL/hammer/": (-274.856578, 12794.134825156867),
    "D4RL/kitchen/": (0.0, 4.0),
    "D4RL/pen/": (96.262799, 3076.8331017826877),
    "D4RL/relocate/": (-6.425911, 4233.877797728884),
}


# --- Between an environment and a network ----------------------------------------------------------------


class Interface(NamedTuple):
    """How observations reach the networks, and actions the environment. `Interface(*x)` of its JSON is itself again."""

    observation: Any  # layout: a Box's shape [4], a Discrete's {"n": 5, "start": 0}, or a Dict's {"dict": {key: ...}}
    action: Any  # {"n", "start"}, or of a Box {"low", "high", "dtype"}
    obs_mean: list  # (obs_dim,) of the rows' observations, or zeros
    obs_scale: list

    @property
    def spec(self) -> Spec:
        discrete = "n" in self.action
        return Spec(width(self.observation), self.action["n"] if discrete else len(self.action["low"]), discrete)

    def observe(self, observation):
        """Raw observations (...) -> (..., obs_dim) float32, flat and normalised."""
        obs = flatten(self.observation, observation)
        return (obs - np.array(self.obs_mean, np.float32)) / np.array(self.obs_scale, np.float32)

    def act(self, act, observation, reward=None, episode=None):
        """A step of a policy on what an environment gives: (action in the environment's own units, the episode so far).

        Args:
          act: (obs (1, n, obs_dim), step, memory, last rewards (1, n)) -> (actions (1, n, ...), memory).
          observation: one, or a batch with any leading axes.
          reward: of the step before, for policies with a memory; None begins an episode.
          episode: what the call of the step before gave; None at first.
        """
        step, memory = episode or (0, None)
        obs = self.observe(observation)
        rows = obs.reshape(1, -1, obs.shape[-1])
        rewards = np.zeros(rows.shape[:2], np.float32) + (0 if reward is None else np.ravel(reward))
        action, memory = act(rows, step, None if reward is None else memory, rewards.astype(np.float32))
        action = np.asarray(action)[0]
        action = self.to_env(action.reshape(obs.shape[:-1] + action.shape[1:]))
        return action[()], (step + 1, memory)  # a number, not an array of shape ()

    def to_env(self, action):
        """Actions (..., action_dim) in [-1, 1], or (...) indices -> the environment's."""
        if "n" in self.action:
            return np.asarray(action).astype(np.int64) + self.action["start"]
        low, high = self.bounds
        middle, half = (low + high) / 2, (high - low) / 2
        # Clipped again: in float32, middle + half may lie beyond the bound
        action = (middle + half * np.asarray(action, np.float64)).astype(self.action["dtype"])
        return np.clip(action, low.astype(action.dtype), high.astype(action.dtype))

    def from_env(self, action):
        """The environment's actions of a Box, scaled to [-1, 1] and clipped to it."""
        low, high = self.bounds
        middle, half = (low + high) / 2, (high - low) / 2
        return np.clip((action - middle) / np.where(half > 0, half, 1), -1, 1).astype(np.float32)

    @property
    def bounds(self):  # in float64, so that half of it neither overflows nor makes -1 .. 1 anything but itself
        return np.array(self.action["low"], np.float64), np.array(self.action["high"], np.float64)


def provenance():
    """What a result depends on besides its configuration and data, for config.json."""
    packages = ("jax", "flax", "optax", "numpy", "minari", "gymnasium", "gymnasium-robotics", "mujoco")
    describe = f"git -C '{Path(__file__).parent}' describe --always --dirty --abbrev=40 2>/dev/null"
    return {
        "command": " ".join(sys.argv),
        "commit": subprocess.getoutput(describe) or None,
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def layout(space):
    """What `flatten` must know of an observation space, as JSON; None where the space is not supported."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        parts = {key: layout(space[key]) for key in sorted(space.keys())}
        return None if None in parts.values() else {"dict": parts}
    if isinstance(space, spaces.Discrete):
        return {"n": int(space.n), "start": int(space.start)}
    return list(space.shape) if isinstance(space, spaces.Box) and len(space.shape) <= 1 else None


def width(layout):
    """The length of an observation once it is flat."""
    if isinstance(layout, list):
        return int(np.prod(layout))
    return layout["n"] if "n" in layout else sum(map(width, layout["dict"].values()))


def flatten(layout, x):
    """Observations (...) as an environment or Minari gives them -> (..., width) float32."""
    if isinstance(layout, list):
        x = np.asarray(x, np.float32)
        return x.reshape(*x.shape[: x.ndim - len(layout)], width(layout))
    if "n" in layout:
        return (index(layout, x)[..., None] == np.arange(layout["n"])).astype(np.float32)  # one-hot
    return np.concatenate([flatten(inner, x[key]) for key, inner in sorted(layout["dict"].items())], axis=-1)


def index(layout, x):
    """Elements of a Discrete space, whose first may be any integer, counted from 0."""
    i = np.asarray(x).astype(np.int64) - layout["start"]
    if not np.all((i >= 0) & (i < layout["n"])):
        raise ValueError(f"{np.min(x)} or {np.max(x)} is not in Discrete({layout['n']}, start={layout['start']})")
    return i


# --- The environment ------------------------------------------------------------------------------------


class Environment:
    """Evaluates policies on the task of a dataset, with its observation flattening, normalisation and action scaling.

    Attributes: `dataset_id`, `interface` (Interface), `spec` (its Spec), `fingerprint` (of the data: a dict for
    config.json), `score_kind` (what `score` returns: which normalisation, or why nothing).
    """

    def __init__(self, dataset, interface, fingerprint, reward_scale, reward_shift, longest_episode, make=True):
        self.dataset_id, self.interface, self.spec = dataset.id, interface, interface.spec
        self.fingerprint = fingerprint
        self._dataset = dataset
        self._reward_scale, self._reward_shift = reward_scale, reward_shift
        self._reference, self._scored_kind = _reference(dataset.id, dataset.storage.metadata)
        self._envs, self._model, self._said = [], None, set()
        self.score_kind = self._scored_kind
        if not make:
            self._fail("no environment was asked for")
            return
        try:
            self._max_steps = self._probe().spec.max_episode_steps or longest_episode
        except Exception as error:  # whatever gymnasium and the environment's package raise: training needs neither
            self._fail(f"the environment cannot be created ({_one_line(error)})")
            self._envs.clear()

    def _probe(self):
        """Fails where the environment is not the dataset's, before training rather than after it."""
        env = _recover(self._dataset)
        self._observe(env.reset(seed=0)[0])
        theirs, ours = env.action_space, self._dataset.action_space
        same = theirs.shape == ours.shape
        if same and not self.spec.discrete:
            same = np.allclose(theirs.low, ours.low) and np.allclose(theirs.high, ours.high)
        if not same:
            raise ValueError(f"its actions are {theirs}, the dataset's {ours}")
        observation, _, _, _, _ = env.step(self._to_env(np.zeros((1, *ours.shape)))[0])
        self._observe(observation)
        self._model = tabular.model_of(env)
        self._scored_kind += ", exact" if self._model else ""
        self.score_kind = self._scored_kind
        self._envs.append(env)
        return env

    def measure(
        self, policy: Callable, q: Callable | None, seeds, num_episodes: int, discount=1.0, max_steps=0
    ) -> dict:
        """Columns of metrics.jsonl, each with a row for each seed: score, returns, believed_value and true_value.

        Args:
          q: (obs, action of the policy) -> values, or None where an algorithm believes none.
          num_episodes: 0: nothing is played. Otherwise as `evaluate` has it.

        Whatever fails in an environment makes NaN of the scores; its reason is printed once and is `score_kind`.
        """
        columns = {"score": np.full(len(seeds), np.nan), "returns": np.full((len(seeds), num_episodes), np.nan)}
        columns |= {} if q is None else {name: np.full(len(seeds), np.nan) for name in ("believed_value", "true_value")}
        if not num_episodes:
            self.score_kind = "not scored: eval_episodes is 0"
        if not num_episodes or not self._envs:
            return columns
        try:
            play = self.evaluate(policy, seeds, num_episodes, discount)
        except Exception as error:  # of the environment: the policy itself has been compiled and checked by training
            self._fail(f"the evaluation failed ({_one_line(error)})")
            self._envs = self._envs[:1]  # the others are made anew: they may be anywhere in an episode
            return columns
        self.score_kind = self._scored_kind
        columns |= {"score": self.score(play.returns).mean(axis=1), "returns": play.returns}
        if q is not None:  # is what the critic believes of the policy true?
            believed = np.asarray(q(play.obs, play.action)) @ play.weight
            columns |= {"believed_value": believed, "true_value": play.value}
        return columns

    def summary(self, lines: list[dict]) -> dict:
        """What summary.json says of the last evaluation, whose lines, one for each run, are the last of metrics.jsonl."""
        lines = [line for line in lines if line["step"] == lines[-1]["step"]]
        scores = np.array([line["score"] for line in lines], float)  # None, JSON's NaN, is NaN again
        return {
            "seeds": [line["seed"] for line in lines],
            "grid": [line["grid"] for line in lines],
            "returns": [line["returns"] for line in lines],
            "diverged": [line["diverged"] for line in lines],
            "score_per_seed": scores,
            "score_mean": scores.mean(),
            "score_std": scores.std(),
            "score_kind": self.score_kind,
        }

    def sentence(self, summary: dict) -> str:
        score = f"score {summary['score_mean']:.1f} +- {summary['score_std']:.1f} over {len(summary['seeds'])} runs"
        return f"{self.dataset_id}: {score} ({self.score_kind})"

    def _fail(self, reason):
        self.score_kind = f"not scored: {reason}"
        if reason not in self._said:
            print(f"{self.dataset_id} is {self.score_kind}; training goes on without a score.")
        self._said.add(reason)

    def evaluate(self, policy: Callable, seeds, num_episodes: int, discount=1.0) -> Evaluation:
        """Plays `num_episodes` episodes for each of `seeds`, in step: one `policy` call per step for all of them.

        Args:
          policy: (observations (num_seeds, num_episodes, obs_dim) float32, step, memory, last rewards (num_seeds,
            num_episodes) float32) -> (actions with the same leading axes, in [-1, 1] or discrete; memory). The memory is
            None at step 0 and then what the policy gave back; the rewards are 0 there, and then the environment's own.
            An episode that has ended keeps its last observation and reward, so shapes never change.
          seeds: of the runs. Episode j of seed i starts from the same state whatever the other seeds and episodes are.
          num_episodes: per seed.
          discount: of the value, one for all seeds or (num_seeds,).

        Returns:
          Evaluation; NaN returns, value and start where there is no environment. In one without a time limit an
          episode stops after as many steps as the longest of the dataset.

        In a finite MDP whose model the environment exposes (recipes.tabular), no episode is played: the expected return
        of each seed's policy is computed exactly and stands for each of its episodes, as is its value (NaN with a
        reward_shift: the model does not say where the rewards end). The policy must then be a function of the state. It
        is called on all states (in the place of the episodes) at steps 0 .. num_episodes - 1: if it is stochastic, its
        probabilities are the frequencies of these draws. The starts are all states, with their probabilities.
        """
        discount = np.broadcast_to(discount, len(seeds)).astype(np.float64)
        if not self._envs:
            unknown, one = np.full((len(seeds), num_episodes), np.nan), (len(seeds), 1)
            obs = np.full((*one, self.spec.obs_dim), np.nan, np.float32)
            action = np.zeros(one, int) if self.spec.discrete else np.zeros((*one, self.spec.action_dim), np.float32)
            return Evaluation(unknown, unknown[:, 0], obs, action, np.ones(1))
        if self._model:
            return self._evaluate_exactly(policy, len(seeds), num_episodes, discount)
        count = len(seeds) * num_episodes
        self._envs += [_recover(self._dataset) for _ in range(count - len(self._envs))]
        episodes = [np.random.SeedSequence((int(seed) % 2**32, j)) for seed in seeds for j in range(num_episodes)]
        starts = [int(episode.generate_state(1)[0]) for episode in episodes]
        obs = np.stack([self._observe(env.reset(seed=s)[0]) for env, s in zip(self._envs, starts, strict=False)])
        start = obs.reshape(len(seeds), num_episodes, -1).copy()
        returns, values, alive = np.zeros(count), np.zeros(count), np.ones(count, bool)
        discounts, memory, rewards = np.repeat(discount, num_episodes), None, np.zeros(count, np.float32)
        for step in range(self._max_steps):
            now = obs.reshape(len(seeds), num_episodes, -1), step, memory, rewards.reshape(len(seeds), num_episodes)
            actions, memory = policy(*now)
            actions = np.asarray(actions)
            if step == 0:
                start_action = actions
            actions = self._to_env(actions.reshape(count, *actions.shape[2:]))
            for i in np.flatnonzero(alive):
                observation, reward, terminated, truncated, _ = self._envs[i].step(actions[i])
                obs[i] = self._observe(observation)
                rewards[i] = float(reward)
                returns[i] += rewards[i]
                values[i] += discounts[i] ** step * (self._reward_scale * float(reward) + self._reward_shift)
                alive[i] = not (terminated or truncated)
            if not alive.any():
                break
        values = values.reshape(len(seeds), num_episodes).mean(axis=1)
        weight = np.full(num_episodes, 1 / num_episodes)
        return Evaluation(returns.reshape(len(seeds), num_episodes), values, start, start_action, weight)

    def score(self, returns):
        """The returns on the scale that `score_kind` names: 0 is a reference's minimum and 100 its maximum."""
        if self._reference is None:
            return np.asarray(returns)
        low, high = self._reference
        return 100 * (np.asarray(returns) - low) / (high - low)

    def _evaluate_exactly(self, policy, num_seeds, num_episodes, discount):
        space = self.interface.observation
        obs = self._observe(np.arange(space["n"]) + space["start"])
        obs = np.broadcast_to(obs, (num_seeds, *obs.shape))
        rewards = np.zeros(obs.shape[:2], np.float32)
        draws = np.stack(
            [policy(obs, step, None, rewards)[0] for step in range(num_episodes)]
        )  # (num_episodes, num_seeds, states)
        probs = np.eye(self.spec.action_dim)[draws].mean(axis=0)
        returns = [tabular.expected_return(self._model, pi, self._max_steps) for pi in probs]
        values = [
            self._reward_scale * tabular.expected_return(self._model, pi, self._max_steps, g)
            for pi, g in zip(probs, discount, strict=True)
        ]
        values = np.array(values) if self._reward_shift == 0 else np.full(num_seeds, np.nan)
        returns = np.repeat(np.array(returns)[:, None], num_episodes, axis=1)
        return Evaluation(returns, values, obs, draws[0], self._model.initial)

    def _observe(self, observation):
        return self.interface.observe(observation)

    def _to_env(self, actions):
        actions = self.interface.to_env(actions)
        return actions.tolist() if self.spec.discrete else actions


def _recover(dataset):
    """The evaluation environment that the dataset file describes."""
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari warns of every package version that differs
        try:
            # The specification names the environment's class, so nothing need be registered
            return dataset.recover_environment(eval_env=True, disable_env_checker=True)
        except (ImportError, gymnasium.error.DependencyNotInstalled, gymnasium.error.UnregisteredEnv) as error:
            needed = dataset.storage.metadata.get("requirements") or ["the package that registers it"]
            needed = [needed] if isinstance(needed, str) else needed
            raise RuntimeError(f"{_one_line(error)}: install {', '.join(needed)}") from error


def _reference(dataset_id, metadata):
    """((minimum, maximum) or None, what the score is)."""
    if metadata.get("ref_min_score") is not None and metadata.get("ref_max_score") is not None:
        reference = float(metadata["ref_min_score"]), float(metadata["ref_max_score"])
        return reference, "normalised by the dataset's reference scores"
    for prefix, reference in D4RL_REFERENCE_SCORES.items():
        if dataset_id.startswith(prefix):
            return reference, "normalised by D4RL's reference scores"
    return None, "raw return"


def _one_line(x):
    """An error or a space, for a sentence."""
    return " ".join((f"{type(x).__name__}: {x}" if isinstance(x, Exception) else str(x)).split())[:300]
