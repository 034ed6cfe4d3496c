"""Environments of a dataset's task that several runs step side by side, and the rows that they learn from.

    stepper = Stepper(env, seeds, height=10)           # an environment for each run, in worker processes of their own
    rows, number = stepper.collect(act, num_steps=10)  # act: (observations (n, obs_dim), step) -> actions (n, ...)

Rows are as those of the dataset: the same reward map, normalised observations and scaled actions. `terminal` is the end
by the task alone; at a time-out next_obs is the true last observation. Where an episode ends the next one begins at
once, so that each step is a row of one episode. Evaluations have environments of their own.

An environment cannot be saved in the middle of an episode. What is saved is the number of the episode, which gives the
seed of its reset, and the actions since: to go on, they are played again. For a deterministic simulator this is exact.
"""

import copy
import time
from collections.abc import Callable

import numpy as np

from common.datasets import Transition
from common.environments import Environment
from common.recipes.worker import EnvironmentFailure


class Stepper:
    """Attributes: `steps` of each run so far; `returns`, a list for each run, of its finished episodes, in the
    environment's own rewards; `seconds`, what they were spent on."""

    def __init__(self, env: Environment, seeds, height: int, label: Callable | None = None, saved: dict | None = None):
        """Begins an episode for each of `seeds`, those of the runs, or goes on where `saved` was.

        Args:
          height: how many rows of each run a block has room for: those of one call of `collect` and, with `label`,
            those of an episode.
          label: (rewards (T,) of a finished episode, whether its last row is terminal) -> return_to_go (T,). With it,
            rows are given once their episode has finished.
          saved: what `save` gave.
        """
        self.env, self.height, self.label, self.limit = copy.copy(env), height, label, time_limit(env)
        self.env._workers = []  # evaluations, which have others, neither step nor reset these environments
        self.seeds, number = [int(seed) % 2**32 for seed in seeds], len(seeds)
        self.steps, self.seconds = 0, {"simulator_seconds": 0.0, "policy_seconds": 0.0}
        self.obs = np.zeros((number, env.spec.obs_dim), np.float32)
        self.returns, self.actions, self.rewards, self.waiting = ([[] for _ in seeds] for _ in range(4))
        self.ready = [0] * number  # how many of the rows that are waiting may be given
        if saved is not None:
            self.steps, self.seconds = saved["steps"], saved["seconds"]
            self.returns = [list(x) for x in saved["returns"]]
        self._begin(np.arange(number))
        if saved is not None:
            self._replay(saved["actions"])

    def collect(self, act: Callable, num_steps: int) -> tuple[Transition, np.ndarray]:
        """Steps each environment `num_steps` times. Returns (rows (n, height, ...), how many of them are real (n,))."""
        for _ in range(num_steps):
            started = time.perf_counter()
            actions = np.asarray(act(self.obs, self.steps))
            acted = time.perf_counter()
            self._step(np.arange(len(self.obs)), actions)
            self.steps += 1
            self.seconds["policy_seconds"] += acted - started
            self.seconds["simulator_seconds"] += time.perf_counter() - acted
        given = [rows[:ready] for rows, ready in zip(self.waiting, self.ready, strict=True)]
        self.waiting = [rows[ready:] for rows, ready in zip(self.waiting, self.ready, strict=True)]
        self.ready = [0] * len(given)
        return self._block(given), np.array([len(rows) for rows in given], np.int32)

    def save(self) -> dict:
        """What a new Stepper needs to go on from here."""
        kept = {"steps": self.steps, "seconds": dict(self.seconds), "returns": self.returns}
        return {**kept, "actions": [np.array(x) for x in self.actions]}

    def columns(self, since: list[int]) -> dict:
        """Columns of metrics.jsonl. `since`: how many episodes each run had finished at the last evaluation.

        online_return is the mean return of the episodes that have ended since then; regret is by how much the scores of
        all of them so far stay below 100, on average. NaN: there is no such episode, or scores are not normalised.
        """
        new = [np.mean(x[first:]) if x[first:] else np.nan for x, first in zip(self.returns, since, strict=True)]
        scored = self.env._reference is not None
        regret = [np.mean(100 - self.env.score(np.array(x))) if x and scored else np.nan for x in self.returns]
        counts = {"online_steps": [self.steps] * len(new), "online_episodes": [len(x) for x in self.returns]}
        return {name: np.array(x) for name, x in {**counts, "online_return": new, "regret": regret}.items()}

    def close(self):
        self.env._dismiss()

    def _begin(self, runs):
        numbers, tasks = [(self.seeds[i], len(self.returns[i]), 1) for i in runs], self.env.tasks  # 1: no evaluation's
        seeds = [int(np.random.SeedSequence(x).generate_state(1)[0]) for x in numbers]
        starts = [(seed, tasks[k % len(tasks)]) for seed, (_, k, _) in zip(seeds, numbers, strict=True)]
        self.obs[runs] = self._ask("reset", runs, lambda mine: [starts[j] for j in mine])
        for i in runs:
            self.actions[i], self.rewards[i] = [], []

    def _step(self, runs, actions):
        env = self.env
        if not env.spec.discrete:  # as the environment gets them; where a network has diverged there is no number
            actions = np.clip(np.nan_to_num(actions), -1, 1)
        next_obs, rewards, terminal, ended = self._ask("step", runs, lambda mine: env.interface.to_env(actions[mine]))
        seen = (env._reward_scale * rewards + env._reward_shift).astype(np.float32)
        for j, i in enumerate(runs):
            self.actions[i].append(actions[j])
            self.rewards[i].append(rewards[j])
            self.waiting[i].append((self.obs[i].copy(), actions[j], seen[j], next_obs[j], np.float32(terminal[j])))
            ended[j] = ended[j] or len(self.actions[i]) >= self.limit
            self.ready[i] += self.label is None
        self.obs[runs] = next_obs
        for i in runs[ended]:
            self.returns[i].append(float(np.sum(self.rewards[i])))
            if self.label:
                episode = self.waiting[i][self.ready[i] :]
                to_go = self.label(np.array([row[2] for row in episode]), bool(episode[-1][4]))
                labelled = [(*row, np.float32(x)) for row, x in zip(episode, to_go, strict=True)]
                self.waiting[i][self.ready[i] :] = labelled
                self.ready[i] = len(self.waiting[i])
        if ended.any():
            self._begin(runs[ended])

    def _replay(self, actions):
        """The steps since the last resets. Their rows have been given, unless they wait for the end of the episode."""
        for t in range(max(map(len, actions))):
            runs = np.array([i for i, x in enumerate(actions) if t < len(x)])
            self._step(runs, np.stack([actions[i][t] for i in runs]))
        if not self.label:
            self.waiting, self.ready = [[] for _ in self.ready], [0] * len(self.ready)

    def _block(self, given):
        """Lists of rows -> a Transition of arrays (n, height, ...), which are 0 behind the rows of each run."""
        spec, shape = self.env.spec, (len(given), self.height)
        action = np.zeros(shape, np.int32) if spec.discrete else np.zeros((*shape, spec.action_dim), np.float32)
        obs, next_obs = np.zeros((2, *shape, spec.obs_dim), np.float32)
        reward, terminal, return_to_go = np.zeros((3, *shape), np.float32)
        columns = obs, action, reward, next_obs, terminal, *([return_to_go] if self.label else [])
        for i, rows in enumerate(given):
            for k, row in enumerate(rows):
                for column, value in zip(columns, row, strict=True):
                    column[i, k] = value
        return Transition(obs, action, reward, next_obs, terminal, return_to_go=return_to_go if self.label else None)

    def _ask(self, what, runs, of):
        """What the workers answer for the environments of `runs`, each to its part `of(indices)`: (len(runs), ...), or
        a list of these."""
        workers = self.env._hire(len(self.seeds))
        own = [np.flatnonzero(runs % len(workers) == k) for k in range(len(workers))]  # environment i: worker i % n
        asked = [k for k, mine in enumerate(own) if len(mine)]
        messages = [(what, runs[own[k]] // len(workers), of(own[k])) for k in asked]
        try:
            answers = self.env._ask([workers[k] for k in asked], messages)
        except EnvironmentFailure as error:
            begin = f"Learning on-line has ended at step {self.steps}, because the environment failed"
            raise SystemExit(f"{begin} ({error}): the same command goes on from the last checkpoint.") from error
        order = np.argsort(np.concatenate(own))
        if what == "reset":
            return np.concatenate(answers)[order]
        return [np.concatenate(parts)[order] for parts in zip(*answers, strict=True)]


def time_limit(env: Environment) -> int:
    """Steps of an episode at most: the environment's own limit or, where it has none, the longest one of the data."""
    env.probe()
    return env._limit or env._longest
