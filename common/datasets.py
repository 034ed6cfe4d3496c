"""Minari datasets as arrays, and the environment that belongs to each of them.

    data, env = load_dataset("stitch/pointmaze-umaze-v0")   # found locally, built by a recipe, or downloaded by Minari
    data.obs, data.action, data.reward, data.next_obs, data.terminal         # one row per transition, float32
    play = env.evaluate(policy, seeds=[0, 1, 2], num_episodes=20)            # real environments, one policy call a step
    play.returns                                                             # (seeds, episodes)

The contract, for every dataset and every algorithm:
- Minari keeps T + 1 observations and T actions of an episode: row t is (obs[t], action[t], reward[t], obs[t + 1]).
- `terminal` is Minari's `terminations` alone. A time-out ends an episode and keeps its bootstrap.
- Nothing crosses an episode. The last row of an episode has no next action: it repeats its own action there. Where
  that row is terminal, `1 - terminal` masks it; at a time-out, or where the recording stops, nothing does.
- Observations are flat float32 vectors: a Box as it is, a Discrete as one-hot, a Dict in the sorted order of its keys.
- Actions: a bounded Box is scaled to [-1, 1] here (and clipped to it, as is what a policy returns) and back on the way
  to the environment; a Discrete is 0 .. n - 1.
- Observations and rewards are normalised here, once; the environment handed back normalises observations in the same
  way. Returns are always sums of the environment's own rewards.

This module imports minari and gymnasium only when a dataset is loaded.
"""

import contextlib
import difflib
import json
import os
import re
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.recipes import RECIPES, build, find, tabular


class DatasetError(SystemExit):
    """One sentence for the user. As a SystemExit, it ends a script with that sentence and status 1, no traceback."""


class Transition(NamedTuple):
    """Rows of a dataset, or of a batch, with the same leading axes. Optional columns are None unless asked for."""

    obs: np.ndarray  # (n, obs_dim) float32
    action: np.ndarray  # (n, action_dim) float32 in [-1, 1], or (n,) int32
    reward: np.ndarray  # (n,) float32
    next_obs: np.ndarray  # (n, obs_dim) float32
    terminal: np.ndarray  # (n,) float32: 1 where the MDP ended, 0 at a time-out
    next_action: np.ndarray | None = None  # like action; at the end of an episode, where there is none, the row's own
    episode: np.ndarray | None = None  # (n,) int32: 0, 1, 2, ... in the order of the rows
    return_to_go: np.ndarray | None = None  # (n,) float32: discounted sum of rewards to the episode's end


class Spec(NamedTuple):
    """What an algorithm must know of its dataset to build its networks."""

    obs_dim: int
    action_dim: int  # length of the action vector, or the number of discrete actions
    discrete: bool = False


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
REMOTE_NAMESPACES = ("D4RL", "atari", "mujoco")  # of Minari's server: other names are not asked for, it takes 25 s


# --- The environment of a dataset ----------------------------------------------------------------------


class Environment:
    """Evaluates policies on the task of a dataset, with its observation flattening, normalisation and action scaling.

    Attributes: `dataset_id`, `spec` (Spec), `score_kind` (what `score` returns: which normalisation, or why nothing).
    """

    def __init__(self, dataset, spec, obs_mean, obs_scale, reward_scale, reward_shift, longest_episode):
        self.dataset_id, self.spec = dataset.id, spec
        self._dataset = dataset
        self._obs_mean, self._obs_scale = obs_mean, obs_scale
        self._reward_scale, self._reward_shift = reward_scale, reward_shift
        self._reference, self.score_kind = _reference(dataset.id, dataset.storage.metadata)
        self._envs = []
        try:
            env = _recover(dataset)
            self._observe(env.reset(seed=0)[0])  # fails where it is not one of the dataset's space
            if env.action_space.shape != dataset.action_space.shape:
                raise ValueError(f"its actions are {env.action_space}, the dataset's {dataset.action_space}")
            self._max_steps = env.spec.max_episode_steps or longest_episode
            self._model = tabular.model_of(env)
            self.score_kind += ", exact" if self._model else ""
            self._envs.append(env)
        except DatasetError:
            raise
        except Exception as error:  # whatever gymnasium and the environment's package raise: training needs neither
            self.score_kind = f"not scored: the environment cannot be created ({_one_line(error)})"
            print(f"{dataset.id} is {self.score_kind}; training goes on without evaluation.")

    def evaluate(self, policy: Callable, seeds, num_episodes: int, discount=1.0) -> Evaluation:
        """Plays `num_episodes` episodes for each of `seeds`, in step: one `policy` call per step for all of them.

        Args:
          policy: (observations (num_seeds, num_episodes, obs_dim) float32, step) -> actions with the same leading axes,
            in [-1, 1] or discrete. An episode that has ended keeps its last observation, so shapes never change.
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
        episodes = [np.random.SeedSequence((seed % 2**32, j)) for seed in seeds for j in range(num_episodes)]
        starts = [int(episode.generate_state(1)[0]) for episode in episodes]
        obs = np.stack([self._observe(env.reset(seed=s)[0]) for env, s in zip(self._envs, starts, strict=False)])
        start = obs.reshape(len(seeds), num_episodes, -1).copy()
        returns, values, alive = np.zeros(count), np.zeros(count), np.ones(count, bool)
        discounts = np.repeat(discount, num_episodes)
        for step in range(self._max_steps):
            actions = np.asarray(policy(obs.reshape(len(seeds), num_episodes, -1), step))
            if step == 0:
                start_action = actions
            actions = self._to_env(actions.reshape(count, *actions.shape[2:]))
            for i in np.flatnonzero(alive):
                observation, reward, terminated, truncated, _ = self._envs[i].step(actions[i])
                obs[i] = self._observe(observation)
                returns[i] += float(reward)
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
        space = self._dataset.observation_space
        obs = (_flatten(space, np.arange(space.n) + space.start) - self._obs_mean) / self._obs_scale
        obs = np.broadcast_to(obs, (num_seeds, *obs.shape))
        draws = np.stack([policy(obs, step) for step in range(num_episodes)])  # (num_episodes, num_seeds, states)
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
        obs = _flatten(self._dataset.observation_space, _expand(observation))[0]
        return (obs - self._obs_mean) / self._obs_scale

    def _to_env(self, actions):
        space = self._dataset.action_space
        if self.spec.discrete:
            return [int(a) + int(space.start) for a in actions]
        middle, half = _middle_and_half(space)
        # Clipped again: in float32, middle + half may lie beyond the bound
        return np.clip((middle + half * actions.astype(np.float64)).astype(space.dtype), space.low, space.high)


# --- Loading -------------------------------------------------------------------------------------------


def load_dataset(
    dataset_id: str, *, columns=(), discount=1.0, normalize_obs=False, normalize_reward=False, reward_shift=0.0
):
    """Load a Minari dataset, building or downloading it first where needed.

    Args:
      dataset_id: Minari's name, e.g. "stitch/pointmaze-umaze-v0", "mujoco/hopper/medium-v0" or one of your own.
      columns: optional columns of Transition to fill: "next_action", "episode", "return_to_go".
      discount: of return_to_go, which sums `reward` as it is returned. At a time-out it stops: nothing stands for what
        would have followed.
      normalize_obs: (obs - mean) / (std + 1e-3) over the rows' observations, in the environment too (TD3+BC, sec. 5).
      normalize_reward: reward * 1000 / (best - worst episode return) (IQL's reference, for MuJoCo).
      reward_shift: added to every reward, after that scaling (-1 for a reward of 1 at a goal, as IQL on AntMaze).

    Returns:
      (Transition of NumPy arrays, Environment).

    Raises:
      DatasetError: with one sentence that says what to do.
    """
    minari_dataset, path = _open(dataset_id)
    action_space = minari_dataset.action_space
    spec = _spec(minari_dataset.observation_space, action_space)
    raw = _read(minari_dataset, path, spec)
    _check_finite(dataset_id, raw)

    lengths, reward, reward_scale = raw["lengths"], raw["rewards"], 1.0
    episode = np.repeat(np.arange(len(lengths)), lengths)
    if normalize_reward:
        returns = np.bincount(episode, weights=reward)
        if np.ptp(returns) == 0:
            raise DatasetError(f"normalize_reward needs episodes of different return; those of {dataset_id} are equal.")
        reward_scale = 1000 / np.ptp(returns)
        reward = reward * reward_scale

    # Episode k has lengths[k] + 1 observations: row i of the data begins at observation i + (its episode's number)
    first = np.arange(len(episode)) + episode
    obs = raw["observations"]
    mean, scale = np.zeros(spec.obs_dim, np.float32), np.ones(spec.obs_dim, np.float32)
    if normalize_obs:
        mean, scale = obs[first].mean(axis=0, dtype=np.float64), obs[first].std(axis=0, dtype=np.float64) + 1e-3
        mean, scale = mean.astype(np.float32), scale.astype(np.float32)
        obs = (obs - mean) / scale
    action = raw["actions"]
    if not spec.discrete:
        middle, half = _middle_and_half(action_space)
        action = np.clip((action - middle) / np.where(half > 0, half, 1), -1, 1).astype(np.float32)

    last = np.cumsum(lengths) - 1
    optional = {"episode": episode.astype(np.int32)}
    if "next_action" in columns:
        optional["next_action"] = np.concatenate([action[1:], action[-1:]])
        optional["next_action"][last] = action[last]
    reward = (reward + reward_shift).astype(np.float32)
    if "return_to_go" in columns:
        to_go = reward.tolist()
        goes_on = ~raw["terminations"].astype(bool)
        goes_on[last] = False
        for i in np.flatnonzero(goes_on)[::-1].tolist():
            to_go[i] += discount * to_go[i + 1]
        optional["return_to_go"] = np.array(to_go, np.float32)
    data = Transition(
        obs=obs[first],
        action=action,
        reward=reward,
        next_obs=obs[first + 1],
        terminal=raw["terminations"].astype(np.float32),
        **{name: optional[name] for name in columns},
    )
    longest = int(lengths.max())
    return data, Environment(minari_dataset, spec, mean, scale, reward_scale, reward_shift, longest_episode=longest)


def _open(dataset_id):
    """The MinariDataset and its folder, built or downloaded if it is not there yet."""
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    if not _is_name(dataset_id):
        raise _unknown(dataset_id, "is not a dataset name (they look like namespace/name-v0)")
    path = get_dataset_path(dataset_id)
    if not (path / "data").exists():
        if find(dataset_id):
            _build(dataset_id)
        elif dataset_id.split("/")[0] in REMOTE_NAMESPACES:
            _download(dataset_id)
        else:
            raise _unknown(dataset_id, "is neither on this machine, nor a recipe, nor in a namespace Minari serves")
    try:
        return minari.load_dataset(dataset_id), path / "data"
    except ImportError as error:  # of the reader of this dataset's format
        raise DatasetError(f"{dataset_id} needs a package that is missing ({_one_line(error)}): install it.") from error
    except Exception as error:  # bad JSON, a missing file, an unreadable space: Minari raises what its parts raise
        raise _corrupt(dataset_id, path, error) from error


def _build(dataset_id):
    try:
        build(dataset_id)
    except ImportError as error:
        raise DatasetError(
            f"Building {dataset_id} needs a package that is missing ({_one_line(error)}): pip install -e '.[suite]'."
        ) from error


def _download(dataset_id):
    import minari

    try:
        minari.download_dataset(dataset_id)
    except ImportError as error:
        raise DatasetError(
            f"Downloading {dataset_id} needs a package that is missing ({_one_line(error)}): pip install 'minari[hf]'."
        ) from error
    except ValueError as error:  # Minari reached its server, and the server has no such dataset
        raise _unknown(dataset_id, f"cannot be downloaded ({_one_line(error)})") from error
    except Exception as error:  # the client libraries share no base class for a failed connection
        raise DatasetError(
            f"{dataset_id} is not on this machine and Minari's server cannot be reached ({_one_line(error)}): run "
            f"`minari download {dataset_id}` where there is a network, or use one built here: {_names(RECIPES)}."
        ) from error


def _read(minari_dataset, path, spec):
    """Flat arrays of all episodes: dict of `observations` (n + episodes, obs_dim), `actions`, `rewards`, `terminations`
    (n, ...) and `lengths` (episodes,).

    Minari's files hold a group per episode, a millisecond each to read. The arrays are kept beside the data and used
    again as long as the data file has the same size and time of change.
    """
    files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("stitch-"))
    stamp = json.dumps([2, [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]])
    cache = path / "stitch-cache.npz"
    try:
        with np.load(cache) as arrays:
            if str(arrays["stamp"]) == stamp:
                return {name: arrays[name] for name in arrays.files if name != "stamp"}
    except Exception:  # absent, torn or of another version: read the data themselves
        pass

    try:
        arrays = _read_episodes(minari_dataset, spec)
    except Exception as error:  # h5py and Minari raise what their parts raise
        raise _corrupt(minari_dataset.id, path.parent, error) from error
    temporary = path / f"stitch-cache-{os.getpid()}.npz"
    try:
        np.savez(temporary, stamp=stamp, **arrays)
        os.replace(temporary, cache)
    except OSError:  # a full disk or a read-only folder costs only time
        with contextlib.suppress(OSError):
            temporary.unlink()
    return arrays


def _read_episodes(minari_dataset, spec):
    observation_space, action_space = minari_dataset.observation_space, minari_dataset.action_space
    fields = {"observations": [], "actions": [], "rewards": [], "terminations": []}
    for episode in minari_dataset.iterate_episodes():
        length = len(episode.rewards)
        observations = _flatten(observation_space, episode.observations)
        sizes = len(observations), len(episode.actions), len(episode.terminations)
        if sizes != (length + 1, length, length):
            raise ValueError(
                f"episode {episode.id} has {sizes[0]} observations, {sizes[1]} actions and {sizes[2]} terminations for "
                f"{length} rewards, not {length + 1}, {length} and {length}"
            )
        if length == 0:  # a reset without a step
            continue
        actions = np.asarray(episode.actions).reshape(length, *action_space.shape)
        if spec.discrete:
            actions = _index(action_space, actions)
        fields["observations"].append(observations)
        fields["actions"].append(actions.astype(np.int32 if spec.discrete else np.float32))
        fields["rewards"].append(np.asarray(episode.rewards, np.float64))
        fields["terminations"].append(np.asarray(episode.terminations, bool))
    lengths = np.array([len(r) for r in fields["rewards"]], np.int64)
    if len(lengths) == 0:
        raise DatasetError(f"{minari_dataset.id} holds no transitions: rebuild it, or choose another dataset.")
    return {name: np.concatenate(parts) for name, parts in fields.items()} | {"lengths": lengths}


def _check_finite(dataset_id, raw):
    bad = {name: int((~np.isfinite(raw[name])).sum()) for name in ("observations", "actions", "rewards")}
    bad = [f"{count} in {name}" for name, count in bad.items() if count]
    if bad:
        raise DatasetError(f"{dataset_id} holds NaN or infinite values ({', '.join(bad)}): repair or rebuild it.")


# --- Spaces --------------------------------------------------------------------------------------------


def _spec(observation_space, action_space):
    from gymnasium import spaces

    if isinstance(action_space, spaces.Discrete):
        return Spec(_width(observation_space), int(action_space.n), True)
    box = isinstance(action_space, spaces.Box) and np.issubdtype(action_space.dtype, np.floating)
    if box and len(action_space.shape) == 1 and action_space.is_bounded():
        return Spec(_width(observation_space), action_space.shape[0], False)
    raise DatasetError(
        f"Actions must be Discrete or a bounded, one-dimensional Box of floats, and {_one_line(action_space)} is not: "
        "choose another dataset."
    )


def _width(space):
    """The length of an observation once it is flat."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return sum(_width(space[key]) for key in sorted(space.keys()))
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    if isinstance(space, spaces.Box) and len(space.shape) <= 1:
        return int(np.prod(space.shape))
    raise DatasetError(
        f"Observations must be a Box vector, a Discrete or a Dict of these, and {_one_line(space)} is not: choose "
        "another dataset."
    )


def _flatten(space, x):
    """A batch of observations of `space`, as Minari keeps it, to (batch, width) float32."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        return np.concatenate([_flatten(space[key], x[key]) for key in sorted(space.keys())], axis=-1)
    if isinstance(space, spaces.Discrete):
        return np.eye(int(space.n), dtype=np.float32)[_index(space, x).reshape(len(x))]
    return np.asarray(x, np.float32).reshape(len(x), _width(space))


def _index(space, x):
    """Elements of a Discrete space, whose first may be any integer, counted from 0."""
    index = np.asarray(x).astype(np.int64) - int(space.start)
    if not np.all((index >= 0) & (index < space.n)):
        raise ValueError(f"{index.min() + space.start} or {index.max() + space.start} is not in {space}")
    return index


def _middle_and_half(space):
    """A Box is middle +- half; in float64, so that neither overflows nor makes -1 .. 1 anything but itself."""
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return (low + high) / 2, (high - low) / 2


def _expand(x):
    """One observation as a batch of one."""
    return {key: _expand(value) for key, value in x.items()} if isinstance(x, dict) else np.asarray(x)[None]


# --- The environment, its scores, and the errors --------------------------------------------------------


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
            raise DatasetError(
                f"The environment of {dataset.id} is not installed ({_one_line(error)}): install {', '.join(needed)}."
            ) from error


def _reference(dataset_id, metadata):
    """((minimum, maximum) or None, what the score is)."""
    if metadata.get("ref_min_score") is not None and metadata.get("ref_max_score") is not None:
        reference = float(metadata["ref_min_score"]), float(metadata["ref_max_score"])
        return reference, "normalised by the dataset's reference scores"
    for prefix, reference in D4RL_REFERENCE_SCORES.items():
        if dataset_id.startswith(prefix):
            return reference, "normalised by D4RL's reference scores"
    return None, "raw return"


def _is_name(dataset_id):
    return re.fullmatch(r"([-_\w][-_\w/]*/)?[-_\w]+-v\d+", dataset_id) is not None


def _unknown(dataset_id, why):
    from minari.storage.datasets_root_dir import get_dataset_path

    root = get_dataset_path()  # minari.list_local_datasets raises where a folder in it is no dataset
    found = [p.parent.parent.relative_to(root).as_posix() for p in root.rglob("data/metadata.json")]
    local = sorted(name for name in found if _is_name(name) and not find(name))
    near = difflib.get_close_matches(dataset_id, [*RECIPES, *local], n=3, cutoff=0.7)
    return DatasetError(
        f"{dataset_id} {why}: choose "
        + (f"a similar name ({_names(near)}), " if near else "")
        + f"one that is built here ({_names(RECIPES)})"
        + (f", one on this machine ({_names(local)})" if local else "")
        + " or one that Minari downloads (names in D4RL/, mujoco/ and atari/, as `minari list remote` shows them)."
    )


def _corrupt(dataset_id, path, error):
    return DatasetError(
        f"{dataset_id} cannot be read from {path} ({_one_line(error)}): that folder is corrupt, incomplete or of "
        "another version of Minari, so remove it, and build or download it again."
    )


def _names(ids):
    return ", ".join(ids)


def _one_line(x):
    """An error or a space, for a sentence."""
    return " ".join((f"{type(x).__name__}: {x}" if isinstance(x, Exception) else str(x)).split())[:300]
