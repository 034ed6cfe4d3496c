"""The environment of a dataset, and what a policy is worth in it.

    env.measure(policy, q, seeds, num_episodes=20)       # columns of metrics.jsonl; a failure costs a line, not the run
    env.evaluate(policy, seeds, num_episodes=20)         # the episodes behind them (Evaluation)

Environments live in worker processes, one per core, which import neither JAX nor the caller's main module: whatever an
environment does, be it an abort of its simulator, costs a score and never the training.
"""

import importlib.metadata
import multiprocessing
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.layouts import DatasetError, Interface, Spec  # noqa: F401 the last two are for the files of algos/
from common.recipes import adroit, tabular
from common.recipes.worker import EnvironmentFailure, one_line, reason, work


class Evaluation(NamedTuple):
    """What a policy got (`returns`), and what is needed to ask whether a critic's belief about it is true.

    The true value of a policy is that of its start: E[sum_t discount^t r_t], with the rewards scaled and shifted as the
    algorithm sees them, until the episode ends by itself or at its time limit. What would have followed a time limit is
    not in it; a critic, which knows of none, adds discount^limit of that. It believes `q(obs, action) @ weight`.
    """

    returns: np.ndarray  # (num_seeds, num_episodes) float64, undiscounted, of the environment's own rewards
    value: np.ndarray  # (num_seeds,) float64: the true value, a mean over the episodes
    obs: np.ndarray  # (num_seeds, num_starts, ...) as the policy sees it: where the episodes start
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
HANDS = "D4RL/door/", "D4RL/hammer/", "D4RL/pen/", "D4RL/relocate/"  # gymnasium-robotics pays or ends otherwise
REMARKS = dict.fromkeys(HANDS, "paid and ended as in D4RL")
# Minari's ant goes on at its goal, paid at each step there. Its files have sums of that as reference scores: not used
ONCE = "D4RL/antmaze/"
REMARKS[ONCE] = "an episode counts once"

# When episodes end, from `terminated` in the sources of Gymnasium: possible lengths of an observation; whether bounds
# are inside; (name of the argument healthy_.._range, first column, one past the last, low, high), to leave which ends.
TERMINATIONS = {
    "Ant": ((27, 105, 111), True, [("z", 0, 1, 0.2, 1), ("", 0, None, -3e38, 3e38)]),
    "CartPole": ((4,), True, [("", 0, 1, -2.4, 2.4), ("", 2, 3, -np.pi / 15, np.pi / 15)]),
    "HalfCheetah": ((17,), True, []),
    "Hopper": ((11,), False, [("z", 0, 1, 0.7, None), ("angle", 1, 2, -0.2, 0.2), ("state", 1, 11, -100, 100)]),
    "Humanoid": ((348, 376), False, [("z", 0, 1, 1, 2)]),
    "InvertedPendulum": ((4,), True, [("", 1, 2, -0.2, 0.2), ("", 0, None, -3e38, 3e38)]),
    "Walker2d": ((17,), False, [("z", 0, 1, 0.8, 2), ("angle", 1, 2, -1, 1)]),
}


def provenance():
    """What a result depends on besides its configuration and data, for config.json; None where that is not known."""
    versions, commit = {}, None
    simulators = "gymnasium", "gymnasium-robotics", "mujoco"
    of_extras = "icu-sepsis", "ogbench", "minatar", "ale-py", "sumo-rl", "libsumo", "highway-env", "overcooked-ai"
    for name in ("jax", "flax", "optax", "numpy", "minari", *simulators, *of_extras):
        versions[name] = None
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, no repository, or one of another user
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    return {"command": shlex.join(sys.argv), "commit": commit, "versions": versions}


# --- The environment ------------------------------------------------------------------------------------


class Environment:
    """Evaluates policies on the task of a dataset, through its Interface.

    Attributes: `dataset_id`, `interface`, `spec`, `fingerprint` (of the data), `score_kind` (its normalisation, or why
    nothing is scored), `num_workers` (processes that step environments; 0: one per core; no result depends on it),
    `tasks` (options of reset that the dataset's metadata name as "eval_tasks"; episode j plays tasks[j % len(tasks)]).
    """

    def __init__(self, dataset, interface, fingerprint, reward_scale, reward_shift, longest_episode):
        self.dataset_id, self.fingerprint = dataset.id, fingerprint
        self.interface = interface._replace(termination=_termination(dataset.env_spec, interface.observation))
        self.spec, self.num_workers = self.interface.spec, 0
        self._reward_scale, self._reward_shift, self._longest = reward_scale, reward_shift, longest_episode
        self.tasks = tasks_of(dataset.id, dataset.storage.metadata)
        self._reference, self._scored_kind = _reference(dataset.id, dataset.storage.metadata)
        needed = dataset.storage.metadata.get("requirements") or ["the package that registers it"]
        env_spec, spaces = dataset._eval_env_spec or dataset.env_spec, (dataset.observation_space, dataset.action_space)
        env_spec = adroit.as_in_d4rl(env_spec) if env_spec and dataset.id.startswith(HANDS) else env_spec
        self._task = env_spec and env_spec.to_json(), *spaces, self.interface, needed
        self._workers, self._said = [], set()
        self._works = self._score_kind = self._limit = self._model = None  # until it is probed

    @property
    def score_kind(self):
        if self._score_kind is None:
            self.probe()
        return self._score_kind

    def probe(self, num_episodes: int | None = None) -> bool:
        """Whether the environment can be made, is the dataset's, and takes a step; if not, a line says why. Evaluations
        ask as well. For 0 episodes nothing is made, and nothing that the dataset's metadata name is run."""
        if num_episodes == 0:
            self._score_kind = "not scored: eval_episodes is 0"
            return False
        if num_episodes and num_episodes % len(self.tasks):
            raise DatasetError(
                f"{self.dataset_id} is evaluated on {len(self.tasks)} tasks in turn, and {num_episodes} episodes are "
                f"no multiple of that: set eval_episodes to {num_episodes + -num_episodes % len(self.tasks)}."
            )
        if self._works is None:
            try:
                self._limit, self._model = self._ask(self._hire(1), [("probe", self.tasks[0])])[0]
                self._scored_kind += ", exact" if self._model else ""
                self._works, self._score_kind = True, self._scored_kind
            except Exception as error:
                self._works = False
                self._fail(f"the environment cannot be used ({reason(error)})")
            if self._model or not self._works:
                self._dismiss()
        return self._works

    def measure(self, policy: Callable, q, seeds, num_episodes: int, discount=1.0, max_steps=0) -> dict:
        """Columns of metrics.jsonl, each with a row for each seed: score, returns, believed_value and true_value.

        Args:
          q: (obs, action of the policy) -> values, or None where an algorithm believes none.
          num_episodes: 0: nothing is played, and no environment is made. Otherwise all is as `evaluate` has it.

        Whatever fails makes NaN of the scores; its reason is printed once and is `score_kind`.
        """
        columns = {"score": np.full(len(seeds), np.nan), "returns": np.full((len(seeds), num_episodes), np.nan)}
        columns |= {} if q is None else {name: np.full(len(seeds), np.nan) for name in ("believed_value", "true_value")}
        if not self.probe(num_episodes):
            return columns
        try:
            play = self.evaluate(policy, seeds, num_episodes, discount, max_steps)
            if q is not None:  # is what the critic believes of the policy true?
                believed = np.asarray(q(play.obs, play.action)) @ play.weight
                columns |= {"believed_value": believed, "true_value": play.value}
            columns |= {"score": self.score(play.returns).mean(axis=1), "returns": play.returns}
            self._score_kind = self._scored_kind
        except Exception as error:
            self._fail(f"the evaluation failed ({reason(error)})")
        return columns

    def summary(self, lines: list[dict]) -> dict:
        """What summary.json says of the last evaluation in the lines of metrics.jsonl, which has one for each run."""
        lines = [line for line in lines if line["step"] == lines[-1]["step"]]
        scores = np.array([line["score"] for line in lines], float)  # None, JSON's NaN, is NaN again
        result = {"score_per_seed": scores, "score_mean": scores.mean(), "score_std": scores.std()}
        result["score_kind"] = self.score_kind
        lists = {"seeds": "seed", "grid": "grid", "returns": "returns", "diverged": "diverged"}
        result |= {name: [line[column] for line in lines] for name, column in lists.items()}
        if any(self.tasks) and any(map(len, result["returns"])):  # (runs, tasks); episode j plays task j % tasks
            played = self.score(np.array(result["returns"], float)).reshape(len(lines), -1, len(self.tasks))
            result["success_per_task"] = played.mean(axis=1)
        return result

    def sentence(self, summary: dict) -> str:
        score, runs = f"score {summary['score_mean']:.1f} +- {summary['score_std']:.1f}", len(summary["seeds"])
        score = "no score" if np.isnan(summary["score_mean"]) else score
        lost = f", {np.sum(summary['diverged'])} of which diverged" if np.any(summary["diverged"]) else ""
        return f"{self.dataset_id}: {score} over {runs} runs{lost} ({self.score_kind})"

    def score(self, returns):
        """The returns on the scale that `score_kind` names: 0 is a reference's minimum and 100 its maximum."""
        if self._reference is None:
            return np.asarray(returns)
        low, high = self._reference
        once = self.dataset_id.startswith(ONCE) or any(self.tasks)
        return 100 * (np.minimum(returns, high if once else np.inf) - low) / (high - low)

    def evaluate(self, policy: Callable, seeds, num_episodes: int, discount=1.0, max_steps=0) -> Evaluation:
        """Plays `num_episodes` episodes for each of `seeds`, in step: one `policy` call per step for all of them.

        Args:
          policy: (observations (num_seeds, num_episodes, obs_dim + goal_dim) float32, or images (num_seeds,
            num_episodes, *obs_shape) uint8, step, memory, last rewards (num_seeds, num_episodes) float32) -> (actions
            with the same leading axes, in [-1, 1] or discrete; memory).
            At step 0 the memory is None and the rewards are 0; then both are those of the step before.
            An episode that has ended keeps its last observation and reward, so shapes never change.
          seeds: of the runs. Episode j of seed i starts from the same state whatever the other seeds and episodes are.
          discount: of the value, one for all seeds or (num_seeds,).
          max_steps: of an episode; 0: the environment's own limit or, where it has none, the longest episode's.

        Returns:
          Evaluation; NaN returns, value and start where there is no environment, and NaN for an episode in which the
          policy gives an action that is not finite. In a finite MDP whose model the environment exposes, no episode of
          a policy without a memory is played: tabular.evaluate computes what is expected.

        Raises:
          EnvironmentFailure: whatever an environment did. The next evaluation makes them anew.
        """
        discount = np.broadcast_to(discount, len(seeds)).astype(np.float64)
        if not self.probe():
            unknown, one = np.full((len(seeds), num_episodes), np.nan), (len(seeds), 1)
            obs = np.full((*one, self.spec.obs_dim + self.spec.goal_dim), np.nan, np.float32)
            obs = self.spec.zeros(*one) if self.spec.obs_shape else obs  # bytes know no NaN
            action = np.zeros(one, int) if self.spec.discrete else np.zeros((*one, self.spec.action_dim), np.float32)
            return Evaluation(unknown, unknown[:, 0], obs, action, np.ones(1))
        limit = max_steps or self._limit or self._longest
        if not (max_steps or self._limit):
            self._say(f"{self.dataset_id}: it has no time limit, so evaluation has the data's longest, {limit} steps.")
        try:
            rest = len(seeds), num_episodes, limit, discount, self._reward_scale, self._reward_shift
            exact = self._model and tabular.evaluate(self._model, policy, self.interface, *rest)
            if exact is None:  # there is no model, or the policy remembers its episode
                self._model, self._scored_kind = None, self._scored_kind.removesuffix(", exact")
                return self._play(policy, seeds, num_episodes, discount, limit)
            return Evaluation(*exact)
        except BaseException:
            self._dismiss()  # the environments are somewhere in an episode, and answers are on their way
            raise

    def _play(self, policy, seeds, num_episodes, discount, limit):
        shape, count = (len(seeds), num_episodes), len(seeds) * num_episodes
        episodes = [np.random.SeedSequence((int(seed) % 2**32, j)) for seed in seeds for j in range(num_episodes)]
        starts = [int(episode.generate_state(1)[0]) for episode in episodes]
        workers = self._hire(count)
        own = [np.arange(i, count, len(workers)) for i in range(len(workers))]  # environment i is in worker i % n
        obs = self.spec.zeros(count) if self.spec.obs_shape else np.zeros((count, *self.interface.shape), np.float32)
        tasks = [self.tasks[j % len(self.tasks)] for _ in seeds for j in range(num_episodes)]
        messages = [("reset", mine // len(workers), [(starts[i], tasks[i]) for i in mine]) for mine in own]
        resets = self._ask(workers, messages)
        for mine, observations in zip(own, resets, strict=True):
            obs[mine] = self.interface.stack(observations)
        start, start_action, memory = obs.reshape(*shape, *obs.shape[1:]).copy(), None, None
        returns, values, rewards = np.zeros(count), np.zeros(count), np.zeros(count)
        alive, factor, discounts = np.ones(count, bool), np.ones(count), np.repeat(discount, num_episodes)
        for step in tqdm(range(limit), "evaluation", unit="step", leave=False, delay=10):
            now = obs.reshape(*shape, *obs.shape[1:]), step, memory, rewards.reshape(shape).astype(np.float32)
            actions, memory = policy(*now)
            actions = np.asarray(actions)
            if step == 0:  # as the environment gets it
                start_action = actions if self.spec.discrete else np.clip(actions, -1, 1)
            actions = actions.reshape(count, *actions.shape[2:])
            lost = alive & ~np.isfinite(actions).reshape(count, -1).all(axis=1)
            returns[lost], values[lost], alive[lost] = np.nan, np.nan, False
            if lost.any():
                self._say(f"{self.dataset_id}: episodes whose actions are not finite have no score.")
            actions = self.interface.to_env(actions)
            acting = [i for i, mine in enumerate(own) if alive[mine].any()]
            turns = [own[i][alive[own[i]]] for i in acting]
            messages = [("step", mine // len(workers), actions[mine]) for mine in turns]
            for mine, answer in zip(turns, self._ask([workers[i] for i in acting], messages), strict=True):
                observations, rewards[mine], _, ended = answer
                obs[mine] = self.interface.stack(observations, obs[mine])
                returns[mine] += rewards[mine]
                values[mine] += factor[mine] * (self._reward_scale * rewards[mine] + self._reward_shift)
                alive[mine] = ~ended
            factor = factor * discounts
            if not alive.any():
                break
        values = values.reshape(shape).mean(axis=1)
        return Evaluation(returns.reshape(shape), values, start, start_action, np.full(num_episodes, 1 / num_episodes))

    def _say(self, sentence):
        if sentence not in self._said:
            tqdm.write(sentence)
        self._said.add(sentence)

    def _fail(self, why):
        self._score_kind = f"not scored: {why}"
        self._say(f"{self.dataset_id} is {self._score_kind}; training goes on without a score.")

    def _hire(self, num_environments):
        """The workers, [(connection, process)], of so many environments; they keep theirs between evaluations."""
        import loky.backend

        number = min(self.num_workers or loky.cpu_count(), num_environments)
        while len(self._workers) < number:
            ours, theirs = multiprocessing.Pipe()
            process = loky.backend.get_context("loky").Process(target=work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that our end hears of its death
            ours.send(self._task)
            self._workers.append((ours, process))
        return self._workers[:number]

    def _ask(self, workers, messages):
        """Sends each worker its message; their answers, for which they work at the same time."""
        for (connection, _), message in zip(workers, messages, strict=True):
            with suppress(OSError):  # it has died, which `recv` says too
                connection.send_bytes(pickle.dumps(message, -1))  # half the time of `send`
        answers = []
        for connection, process in workers:
            try:
                answer = pickle.loads(connection.recv_bytes()) if connection.poll(600) else None
                answers.append(EnvironmentFailure("no answer in 600 s") if answer is None else answer)
            except (EOFError, OSError):
                process.join(5)
                how = process.exitcode if process.exitcode != -9 else "-9: out of memory, or killed by hand"
                answers.append(EnvironmentFailure(f"its process ended with exit code {how}"))
            if isinstance(answers[-1], EnvironmentFailure):
                raise answers[-1]
        return answers

    def _dismiss(self):
        for connection, process in self._workers:
            connection.close()
            process.terminate()
        self._workers = []


def _termination(spec, observation):
    """[closed, ranges] of `ends` if the data are of one of TERMINATIONS, with its own robot and observations."""
    lengths, closed, ranges = TERMINATIONS.get(spec.id.partition("-v")[0] if spec else "", ((), None, None))
    if observation not in [[length] for length in lengths] or spec.additional_wrappers or "xml_file" in spec.kwargs:
        return None
    if not spec.kwargs.get("terminate_when_unhealthy", True):
        return [closed, []]
    ranges = [(*row[:3], *spec.kwargs.get(f"healthy_{row[0]}_range", row[3:])) for row in ranges]
    return [closed, [[None if x in (-np.inf, np.inf) else x for x in row] for row in ranges]]  # JSON has no infinity


def tasks_of(dataset_id, metadata):
    """The options of reset of the tasks of an evaluation in turn; [None] where the dataset names none."""
    tasks = metadata.get("eval_tasks", [None])
    if tasks != [None] and not (isinstance(tasks, list) and tasks and all(isinstance(x, dict) and x for x in tasks)):
        raise DatasetError(
            f"{dataset_id}: eval_tasks in its metadata.json must be a list of options of its environment's reset, such "
            f'as [{{"task_id": 1}}, {{"task_id": 2}}], not {one_line(tasks)}: mend it or leave it out.'
        )
    return tasks


def _reference(dataset_id, metadata):
    """((minimum, maximum) or None, what the score is)."""
    if "eval_tasks" in metadata:
        return (0.0, 1.0), f"success, %, mean over {len(metadata['eval_tasks'])} tasks"
    low, high = own = [metadata.get(f"ref_{side}_score") for side in ("min", "max")]
    if own != [None, None] and not dataset_id.startswith(ONCE):
        if all(type(x) in (int, float) and abs(x) < 1e30 for x in own) and high - low > 1e-30:
            return own, "normalised by the dataset's reference scores"
        print(f"{dataset_id}: scores are raw returns, since its reference scores, {low} and {high}, are no range.")
        return None, "raw return"
    for prefix, reference in D4RL_REFERENCE_SCORES.items():
        if dataset_id.startswith(prefix):
            return reference, "; ".join(["normalised by D4RL's reference scores", *filter(None, [REMARKS.get(prefix)])])
    return None, "raw return"
