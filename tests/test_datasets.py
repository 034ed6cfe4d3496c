"""The data contract of common/datasets.py, on tiny Minari datasets whose every number says where it comes from.

In a labelled dataset the observation of episode k at step t is (k, t), its action (k, t) too and its reward 100 k + t,
so that each row can be checked by itself. The environment is `Echo` of echo.py.
"""

import collections
import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tracemalloc
import types
from concurrent.futures.process import BrokenProcessPool

import gymnasium
import h5py
import jax
import minari
import numpy as np
import pytest
from echo import LABELS, OBSERVATIONS
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from algos.bc import keep_best
from common import datasets, layouts
from common.datasets import DatasetError, Transition, load_dataset
from common.environments import Spec
from common.layouts import flatten, layout, sizes
from common.recipes import RECIPES, rollouts
from common.recipes.worker import EnvironmentFailure

pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Minari's, of missing authors and descriptions
]

LABEL_ACTIONS = spaces.Box(0, 2048, (2,), np.float32)  # a power of two: labels are scaled without rounding
NAME = "test/labelled-v0"


def labels(k, length):
    return np.stack([np.full(length, k), np.arange(length)], axis=-1).astype(float)


def episode(k, length, end="terminal", **changes):
    """Labelled; its end is "terminal", "timeout", or None where the recording just stops."""
    flags = np.zeros((2, length), bool)
    flags[:, -1] = end == "terminal", end == "timeout"
    fields = {
        "observations": labels(k, length + 1),
        "actions": labels(k, length).astype(np.float32),
        "rewards": 100.0 * k + np.arange(length),
        "terminations": flags[0],
        "truncations": flags[1],
    }
    return EpisodeBuffer(**{**fields, **changes})


def write(episodes, name=NAME, env=None, observation_space=LABELS, action_space=LABEL_ACTIONS, **metadata):
    """Writes a dataset; `env` is the id, or the made instance, of its environment."""
    if env is None:
        metadata |= {"observation_space": observation_space, "action_space": action_space}
    return minari.create_dataset_from_buffers(name, buffer=episodes, env=env, **metadata)


def write_echo(name=NAME, env_id="stitch-test/Echo-v0", longest=4, **kwargs):
    """A dataset whose environment is Echo with `kwargs`; with labelled data where these fit its spaces."""
    env = gymnasium.make(env_id, **kwargs)
    changes = {}
    if env.observation_space != LABELS:
        changes["observations"] = stack([env.observation_space.sample() for _ in range(longest + 1)])
    if env.action_space != LABEL_ACTIONS:
        changes["actions"] = stack([env.action_space.sample() for _ in range(longest)])
    return write([episode(0, longest, **changes)], name, env=env)


def skip_without_arrow(data_format):
    if data_format != "hdf5":
        pytest.importorskip("pyarrow")


def stack(samples):
    if isinstance(samples[0], dict):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def edit_metadata(root, name=NAME, **changes):
    path = root / name / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unscale(action):
    """Of LABEL_ACTIONS: what the data held."""
    return 1024 * (action + 1)


def zeros(obs, step):
    return np.zeros((*obs.shape[:2], 2), np.float32)


def label_rows(lengths):
    return np.concatenate([labels(k, length) for k, length in enumerate(lengths)])


# --- Rows ----------------------------------------------------------------------------------------------

LENGTHS = (1000, 999, 1, 1000, 3)  # a rule such as "an episode has 1000 rows" fails on these


def test_rows_hold_one_step_of_one_episode():
    write([episode(k, length) for k, length in enumerate(LENGTHS)])
    data, env = load_dataset(NAME)
    expected = label_rows(LENGTHS)
    np.testing.assert_array_equal(data.obs, expected)
    np.testing.assert_array_equal(unscale(data.action), expected)
    np.testing.assert_array_equal(data.reward, 100 * expected[:, 0] + expected[:, 1])
    np.testing.assert_array_equal(data.next_obs, expected + [0, 1])
    assert env.spec == Spec(obs_dim=2, action_dim=2, discrete=False)
    assert data.next_action is None and data.episode is None
    assert {x.dtype for x in data if x is not None} == {np.dtype(np.float32)}


def test_terminal_is_the_end_of_the_mdp_not_of_the_recording():
    ends = ("terminal", "timeout", "terminal", None)
    write([episode(k, 3, end) for k, end in enumerate(ends)])
    data, _ = load_dataset(NAME)
    np.testing.assert_array_equal(data.terminal, [0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0])


def test_a_recording_may_say_that_it_goes_on_after_a_termination(root):
    """As OGBench's play data, which are labelled afterwards."""
    write([episode(0, 4, None, terminations=np.array([False, True, False, False]))])
    edit_metadata(root, goes_on_after_termination=True)
    data, _ = load_dataset(NAME, columns=("return_to_go",))
    np.testing.assert_array_equal(data.terminal, [0, 1, 0, 0])
    np.testing.assert_array_equal(data.next_obs, labels(0, 5)[1:])
    np.testing.assert_array_equal(data.return_to_go, [1, 1, 5, 3])  # a terminal row ends the sum
    write([episode(0, 4, None, truncations=np.array([False, True, False, False]))], "test/cut-v0")
    edit_metadata(root, "test/cut-v0", goes_on_after_termination=True)
    assert "truncations of episode 0 are set in row 1" in message("test/cut-v0")  # what follows is another episode


def test_terminal_rows_are_kept_with_their_reward():
    """As in AntMaze, where the terminal row's reward is the only one."""
    write([episode(k, 5, rewards=np.array([0, 0, 0, 0, 1.0])) for k in range(2)])
    data, _ = load_dataset(NAME)
    np.testing.assert_array_equal(data.reward, [0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(data.reward, data.terminal)


def test_next_action_stays_in_its_episode():
    ends = ("terminal", "timeout", None, "terminal")
    lengths = (3, 2, 1, 2)
    write([episode(k, length, end) for k, (length, end) in enumerate(zip(lengths, ends, strict=True))])
    data, _ = load_dataset(NAME, columns=("next_action", "episode"))
    rows = label_rows(lengths)
    last = [2, 4, 5, 7]
    expected = rows + [0, 1]
    expected[last] = rows[last]  # there is none: the row's own
    np.testing.assert_array_equal(unscale(data.next_action), expected)
    np.testing.assert_array_equal(data.episode, [0, 0, 0, 1, 1, 2, 3, 3])
    assert data.next_action.dtype == np.float32 and data.episode.dtype == np.int32
    # 1 - terminal masks the missing ones of episodes 0 and 3, and masks no other
    np.testing.assert_array_equal(np.flatnonzero(data.terminal), [2, 7])


def test_discrete_next_action():
    write([episode(k, 2, actions=np.array([k, 2])) for k in range(2)], action_space=spaces.Discrete(3))
    data, _ = load_dataset(NAME, columns=("next_action",))
    np.testing.assert_array_equal(data.next_action, [2, 2, 2, 2])
    assert data.next_action.dtype == np.int32


def test_return_to_go_stops_at_the_end_of_its_episode():
    first = episode(0, 3, rewards=np.array([1.0, 2.0, 4.0]))
    write([first, episode(1, 2, "timeout", rewards=np.array([8.0, 16.0]))])
    data, _ = load_dataset(NAME, columns=("return_to_go",), discount=0.5)
    # 1 + 2/2 + 4/4; 8 + 16/2, with nothing for what would have followed the time-out
    np.testing.assert_array_equal(data.return_to_go, [3, 4, 4, 16, 16])
    assert data.return_to_go.dtype == np.float32
    data, _ = load_dataset(NAME, columns=("return_to_go",), discount=1.0, reward_shift=-1)  # of the shifted rewards
    np.testing.assert_array_equal(data.return_to_go, [4, 4, 3, 22, 15])


def test_starts_and_ends_of_episodes():
    write([episode(k, length, end) for k, (length, end) in enumerate([(3, "terminal"), (1, "timeout"), (2, None)])])
    data, _ = load_dataset(NAME, columns=("start", "end", "timestep"))
    np.testing.assert_array_equal(data.start, [1, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(data.end, [2, 2, 2, 3, 5, 5])
    np.testing.assert_array_equal(data.timestep, [0, 1, 2, 0, 0, 1])
    assert data.start.dtype == np.float32 and data.end.dtype == data.timestep.dtype == np.int32


def test_episode_without_a_step_is_no_episode(root):
    """A collector that is closed after a reset leaves one: it has no row, and no return to be the best of."""
    write([episode(k, 2) for k in range(3)])
    with h5py.File(root / NAME / "data" / "main_data.hdf5", "a") as file:
        for field, size in {"observations": 1, "actions": 0, "rewards": 0, "terminations": 0, "truncations": 0}.items():
            file["episode_1"][field].resize(size, axis=0)
    edit_metadata(root, total_steps=4)
    data, _ = load_dataset(NAME, columns=("episode", "next_action"))
    np.testing.assert_array_equal(data.obs[:, 0], [0, 0, 2, 2])
    np.testing.assert_array_equal(data.next_obs[:, 1], [1, 2, 1, 2])
    np.testing.assert_array_equal(data.episode, [0, 0, 1, 1])
    np.testing.assert_array_equal(unscale(data.next_action)[:, 1], [1, 1, 1, 1])


@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_episode_without_a_step_in_a_folder(data_format):
    skip_without_arrow(data_format)
    parts = [episode(k, length, actions=np.zeros(length, int)) for k, length in enumerate((2, 1, 2))]
    parts[1] = EpisodeBuffer(observations=labels(1, 1), actions=[], rewards=[], terminations=[], truncations=[])
    write(parts, action_space=spaces.Discrete(3), data_format=data_format)
    data, _ = load_dataset(NAME, columns=("episode",))
    np.testing.assert_array_equal(data.obs[:, 0], [0, 0, 2, 2])
    np.testing.assert_array_equal(data.episode, [0, 0, 1, 1])


def test_combined_datasets_follow_each_other():
    parts = [
        write([episode(k, 2) for k in (0, 1)], "test/part-v0", env="stitch-test/Echo-v0"),
        write([episode(2, 3, "timeout")], "test/part-v1", env="stitch-test/Echo-v0"),
    ]
    minari.combine_datasets(parts, "test/both-v0")
    data, env = load_dataset("test/both-v0", columns=("episode",))
    np.testing.assert_array_equal(data.obs, label_rows((2, 2, 3)))
    np.testing.assert_array_equal(data.next_obs, label_rows((2, 2, 3)) + [0, 1])
    np.testing.assert_array_equal(data.terminal, [0, 1, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(data.episode, [0, 0, 1, 1, 2, 2, 2])
    assert not env.score_kind.startswith("not scored")


# --- Returns: reward scaling and the filter of bc.py, which need true episode bounds -------------------------


def test_normalize_reward_uses_the_returns_of_whole_episodes():
    # A reward of 1 per step: returns are the lengths, the best 1000 and the worst 1
    write([episode(k, length, rewards=np.ones(length)) for k, length in enumerate(LENGTHS)])
    data, _ = load_dataset(NAME, normalize_reward=True)
    np.testing.assert_allclose(data.reward, 1000 / 999, rtol=1e-6)


def test_reward_shift_comes_after_the_scaling():
    write([episode(0, 1, rewards=np.array([4.0])), episode(1, 1, rewards=np.array([2.0]))])
    data, _ = load_dataset(NAME, normalize_reward=True, reward_shift=-1.0)
    np.testing.assert_allclose(data.reward, [1999, 999])  # 4 * 1000 / 2 - 1 and 2 * 1000 / 2 - 1


def test_keep_best_keeps_whole_episodes():
    lengths = (1000, 999, 1, 1000, 4)  # the sums of 1000 rows of 1, 3, 2, 4 and of 4 rows of 9: 1000 2997 2 4000 36
    rewards = [np.full(length, r) for length, r in zip(lengths, (1.0, 3.0, 2.0, 4.0, 9.0), strict=True)]
    write([episode(k, length, rewards=rewards[k]) for k, length in enumerate(lengths)])
    data, _ = load_dataset(NAME, columns=("episode",))
    kept = keep_best(data, 2000 / 3004)  # 1000 + 999 rows fit, and no part of the next best
    np.testing.assert_array_equal(kept.obs, np.concatenate([labels(1, 999), labels(3, 1000)]))
    np.testing.assert_array_equal(kept.next_obs, kept.obs + [0, 1])
    np.testing.assert_array_equal(kept.episode, kept.obs[:, 0])


def rows(lengths, returns):
    """Rows of episodes; all of an episode's return is in its last row. The observation is the row's number."""
    n, last = sum(lengths), np.cumsum(lengths) - 1
    reward = np.zeros(n, np.float32)
    reward[last] = returns
    number = np.arange(n, dtype=np.float32)
    return Transition(number, number, reward, number, number, episode=np.repeat(np.arange(len(lengths)), lengths))


@pytest.mark.parametrize("fraction, kept", [(0.25, [2]), (0.5, [0, 2]), (0.75, [0, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_keep_best_of_episodes_of_one_step(fraction, kept):
    np.testing.assert_array_equal(keep_best(rows([1] * 4, [2, 0, 3, 1]), fraction).obs, kept)


def test_keep_best_counts_transitions_not_episodes():
    """specs/weighted.md: the best episode has 505 steps, nine others 55. Of 1000 transitions 20 % are less than that
    one episode, which is kept all the same; a rule of episodes would keep two."""
    data = rows([55] * 4 + [505] + [55] * 5, [0, 1, 2, 3, 10, 4, 5, 6, 7, 8])
    np.testing.assert_array_equal(keep_best(data, 0.2).obs, 4 * 55 + np.arange(505))
    assert len(keep_best(data, 0.56).obs) == 505 + 55


def test_keep_best_of_equal_returns_takes_the_later():
    np.testing.assert_array_equal(keep_best(rows([1] * 4, [1, 1, 0, 1]), 0.5).obs, [1, 3])
    np.testing.assert_array_equal(keep_best(rows([1] * 4, [1, 1, 1, 1]), 0.25).obs, [3])


# --- Spaces --------------------------------------------------------------------------------------------


def test_dict_observations_are_flattened_as_gymnasium_does():
    space = OBSERVATIONS["dict"]
    samples = [space.sample() for _ in range(6)]
    write([episode(0, 5, observations=stack(samples))], observation_space=space)
    data, env = load_dataset(NAME)
    expected = np.stack([spaces.flatten(space, sample) for sample in samples]).astype(np.float32)
    assert env.spec.obs_dim == 6
    np.testing.assert_array_equal(data.obs, expected[:-1])
    np.testing.assert_array_equal(data.next_obs, expected[1:])


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_the_interface_flattens_as_gymnasium_does(kind):
    write_echo(observation=kind)
    _, env = load_dataset(NAME)
    sample = OBSERVATIONS[kind].sample()
    flat = spaces.flatten(OBSERVATIONS[kind], sample).astype(np.float32)
    np.testing.assert_array_equal(env.interface.observe(sample), flat)


@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_dict_observations_are_in_the_sorted_order_of_their_keys(data_format):
    """Whatever the order in which the space declares them, and the file and the environment hold them."""
    skip_without_arrow(data_format)
    box = spaces.Box(-9, 9, (1,), np.float32)
    inner = spaces.Dict(collections.OrderedDict([("d", box), ("c", box)]))
    space = spaces.Dict(collections.OrderedDict([("z", box), ("b", inner), ("a", spaces.Discrete(2))]))
    assert list(space) == ["z", "b", "a"]  # gymnasium keeps the order of an OrderedDict

    def observations(n):
        column = np.arange(n, dtype=np.float32)[:, None]
        return {"z": column + 1, "b": {"d": column + 2, "c": column + 3}, "a": np.arange(n) % 2}

    write([episode(0, 2, observations=observations(3))], observation_space=space, data_format=data_format)
    data, env = load_dataset(NAME)
    expected = [[1, 0, 3, 2, 1], [0, 1, 4, 3, 2], [1, 0, 5, 4, 3]]  # a as one-hot, b/c, b/d, z
    np.testing.assert_array_equal(data.obs, expected[:2])
    np.testing.assert_array_equal(data.next_obs, expected[1:])
    np.testing.assert_array_equal(env.interface.observe(observations(3)), expected)
    assert list(layout(space)["dict"]) == ["a", "b", "z"] and list(layout(space)["dict"]["b"]["dict"]) == ["c", "d"]
    np.testing.assert_array_equal(flatten({"dict": {"z": [1], "a": [1]}}, {"z": [1], "a": [2]}), [2, 1])


def test_the_kitchens_observations_load():
    """FrankaKitchen's goals are a Dict of their own, with a name for each of its tasks, some of two words."""
    box = lambda n: spaces.Box(-np.inf, np.inf, (n,), np.float64)  # noqa: E731
    goal = spaces.Dict({"microwave": box(1), "light switch": box(2)})
    space = spaces.Dict({"desired_goal": goal, "achieved_goal": goal, "observation": box(59)})
    samples = [space.sample() for _ in range(6)]
    write([episode(0, 5, observations=stack(samples))], observation_space=space)
    data, env = load_dataset(NAME)
    names = [("achieved_goal", "light switch"), ("achieved_goal", "microwave")]
    names += [("desired_goal", "light switch"), ("desired_goal", "microwave")]
    expected = [np.concatenate([*(x[a][b] for a, b in names), x["observation"]]) for x in samples]
    np.testing.assert_allclose(data.obs, expected[:-1], rtol=1e-6)
    assert env.spec.obs_dim == 3 + 3 + 59
    data, env = load_dataset(NAME, goals=True)
    assert (env.spec.obs_dim, env.spec.goal_dim) == (3 + 59, 3)
    np.testing.assert_allclose(data.achieved, np.array(expected)[:-1, :3], rtol=1e-6)


def test_a_discrete_observation_costs_its_own_rows_alone():
    """K1.9: an identity matrix of 200,000 rows and columns would take 149 GiB."""
    write([episode(0, 3, observations=np.array([199_999, 0, 7, 7]))], observation_space=spaces.Discrete(200_000))
    data, env = load_dataset(NAME)
    np.testing.assert_array_equal(np.argmax(data.obs, axis=-1), [199_999, 0, 7])
    np.testing.assert_array_equal(data.obs.sum(axis=-1), [1, 1, 1])
    assert env.interface.observe(5)[5] == 1


def test_discrete_observations_are_one_hot():
    write([episode(0, 3, observations=np.array([2, 5, 3, 2]))], observation_space=OBSERVATIONS["discrete"])
    data, env = load_dataset(NAME)
    assert env.spec.obs_dim == 4
    np.testing.assert_array_equal(data.obs, [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]])
    np.testing.assert_array_equal(data.next_obs[-1], [1, 0, 0, 0])


def test_actions_between_minus_one_and_one_are_not_rounded():
    actions = np.array([[1e-9, -3e-12], [0.3, 0.7], [1, -1]], np.float32)
    write([episode(0, 3, actions=actions)], action_space=spaces.Box(-1, 1, (2,)))
    data, _ = load_dataset(NAME)
    np.testing.assert_array_equal(data.action, actions)


# --- Normalisation and scores ---------------------------------------------------------------------------


def test_observations_that_never_change_stay_finite_and_comparable():
    write([episode(0, 3, observations=np.full((4, 2), 7.0))])
    data, _ = load_dataset(NAME, normalize_obs=True)
    np.testing.assert_array_equal(data.obs, np.zeros((3, 2)))


def cannot_be_made():
    raise RuntimeError("no display")


# --- Bad input: one sentence that says what to do --------------------------------------------------------


def message(name=NAME, **kwargs):
    with pytest.raises(DatasetError) as raised:
        load_dataset(name, **kwargs)
    text = raised.value.code  # what Python prints to stderr, with exit status 1
    assert isinstance(text, str) and "\n" not in text and text.endswith(".")
    outside, count = text, 1
    while count:  # what is in brackets is quoted from others
        outside, count = re.subn(r"\([^()]*\)", "", outside)
    assert not re.search(r"[.?!] ", outside), f"not one sentence: {text}"
    return text


def test_unknown_name():
    write([episode(0, 2)])
    text = message("test/labeled-v0")
    assert "a similar name (test/labelled-v0)" in text
    assert "stitch/" not in text and "minari list remote" in text  # all that is built here would be a page
    assert "a similar name (stitch/pointmaze-umaze-v0" in message("stitch/pointmaze-umase-v0")
    text = message("quite/different-v3")
    assert "similar" not in text and "stitch/pointmaze-umaze-v0" in text


def test_unknown_name_beside_folders_that_are_no_datasets(root):
    (root / "notes" / "data").mkdir(parents=True)  # minari.list_local_datasets raises on this one
    (root / ".building-x" / "data").mkdir(parents=True)
    (root / ".building-x" / "data" / "metadata.json").write_text("{}")
    assert "building-x" not in message("test/labelled-v0")


@pytest.mark.parametrize("name", ["", "hopper", "mujoco/hopper/", "test/../labelled-v0", "/etc-v0", "a b-v0", "x-v0\n"])
def test_malformed_name(name):
    with pytest.raises(DatasetError) as raised:
        load_dataset(name)
    assert "not a dataset name (they look like namespace/name-v0)" in raised.value.code


class ConnectError(Exception):
    """httpx2's, which huggingface_hub raises without a network: neither an OSError nor a ConnectionError."""


@pytest.fixture
def download(monkeypatch):
    """Lets minari.download_dataset do something else; returns the list of names it was asked for."""

    def set_download(action):
        asked = []

        def download_dataset(name):
            asked.append(name)
            return action(name)

        monkeypatch.setattr(minari, "download_dataset", download_dataset)
        return asked

    return set_download


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("error", [ConnectError("[Errno -2] Name or service not known"), TimeoutError("timed out")])
def test_no_network(download, error):
    asked = download(raises(error))
    text = message("mujoco/hopper/medium-v0")
    assert asked == ["mujoco/hopper/medium-v0"]
    assert "cannot be reached" in text and str(error) in text and "minari download mujoco/hopper/medium-v0" in text
    assert "stitch/pointmaze-umaze-v0" in text


def test_the_server_has_no_such_version(download):
    download(raises(ValueError("The dataset version doesn't exist. We suggest you download mujoco/hopper/medium-v0")))
    text = message("mujoco/hopper/medium-v9")
    assert "cannot be downloaded" in text and "We suggest you download mujoco/hopper/medium-v0" in text


def test_the_downloader_is_not_installed(download):
    download(raises(ImportError("huggingface_hub is not installed")))
    assert "pip install 'minari[hf]'" in message("D4RL/pen/human-v2")


def test_names_of_no_server_are_not_asked_for(download):
    asked = download(raises(AssertionError))
    message("elsewhere/hopper-v0")
    assert not asked


def test_a_download_is_loaded(download):
    download(lambda name: write([episode(0, 3)], name))
    assert len(load_dataset("mujoco/hopper/tiny-v0")[0].obs) == 3


def test_a_download_that_was_broken_off(root, download):
    (root / "mujoco" / "hopper" / "medium-v0").mkdir(parents=True)
    download(lambda name: None)  # Minari skips the download where the folder exists
    assert "if it was downloaded, remove it" in message("mujoco/hopper/medium-v0")


def truncate(folder):
    file = folder / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def in_file(change):
    def damage(folder):
        with h5py.File(folder / "main_data.hdf5", "a") as file:
            change(file)

    return damage


def in_metadata(**changes):
    def damage(folder):
        metadata = json.loads((folder / "metadata.json").read_text())
        (folder / "metadata.json").write_text(json.dumps(metadata | changes))

    return damage


def number_from_one(file):
    file.move("episode_1", "episode_2")
    file.move("episode_0", "episode_1")


def replace_by_a_group(file):
    file.pop("episode_1/observations")
    file.create_group("episode_1/observations")


DAMAGES = {  # and what the sentence says of them
    "truncated": (truncate, "truncated file"),
    "episode": (in_file(lambda file: file.pop("episode_1")), "episode 1 is missing"),
    "numbers": (in_file(number_from_one), "counted from 0, but episode 0 is missing and episode 2 is not among them"),
    "field": (in_file(lambda file: file.pop("episode_1/rewards")), "episode 1: KeyError"),
    "parts": (in_file(replace_by_a_group), "episode 1: it does not have the parts that the spaces declare"),
    "spaces": (in_metadata(observation_space='{"type": "Bax"}'), "space_dict"),
    "fewer-episodes": (
        in_metadata(total_episodes=1),
        "says 1 episodes, counted from 0, but episode 1 is not among them",
    ),
    "more-episodes": (in_metadata(total_episodes=3), "says 3 episodes, counted from 0, but episode 2 is missing"),
    "steps": (in_metadata(total_steps=99), "metadata.json says 99 steps, and 100 can be read"),
    "text": (in_metadata(total_episodes="2"), "TypeError"),
    "format": (in_metadata(data_format="csv"), "csv"),
    "empty-file": (lambda folder: (folder / "main_data.hdf5").write_bytes(b""), ""),
    "no-file": (lambda folder: (folder / "main_data.hdf5").unlink(), "No data found"),
    "no-metadata": (lambda folder: (folder / "metadata.json").unlink(), "No such file"),
    "bad-json": (lambda folder: (folder / "metadata.json").write_text("{"), "JSONDecodeError"),
    "no-keys": (lambda folder: (folder / "metadata.json").write_text("{}"), ""),
}


@pytest.mark.parametrize("damage, reason", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize(
    "name, advice",
    [
        (NAME, "mend it, or copy or record it again"),
        ("stitch/icu-sepsis-3k-v0", "remove it, and it will be built again"),
        ("D4RL/pen/human-v2", "if it was downloaded, remove it, and it will be downloaded again"),
    ],
    ids=["own", "recipe", "server"],
)
def test_damaged_file(root, name, advice, damage, reason):
    """Nobody is told to remove a recording that may be the only one."""
    write([episode(k, 50) for k in range(2)], name)
    damage(root / name / "data")
    text = message(name)
    assert "cannot be read" in text and str(root / name) in text and reason in text and text.endswith(f"{advice}.")


@pytest.mark.parametrize("lost", [1, 2])
@pytest.mark.parametrize("data_format", ["arrow", "parquet"])
def test_an_episode_that_is_lost_from_a_folder(root, data_format, lost):
    """Minari reads on, and gives the others its number."""
    skip_without_arrow(data_format)
    write([episode(k, 3) for k in range(3)], data_format=data_format)
    for file in (root / NAME / "data" / str(lost)).glob("part*"):
        file.unlink()
    text = message()
    assert f"episode {lost} is missing" in text and "damaged" in text and "remove" not in text


def test_a_file_of_another_minari(root):
    write([episode(0, 2)])
    edit_metadata(root, minari_version="99.0.0")
    text = message()
    assert "was written by a Minari that the installed one cannot read" in text and "99.0.0" in text
    assert "remove" not in text and "damaged" not in text


def test_a_file_that_its_recorder_holds(root):
    write([episode(0, 2)])
    code = f"import h5py, sys; f = h5py.File({str(root / NAME / 'data' / 'main_data.hdf5')!r}, 'a'); print(1); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", code], **pipes) as recorder:
        recorder.stdout.readline()
        text = message()
        recorder.communicate(b"\n")
    assert "is being written by another process" in text and "wait" in text
    assert "remove" not in text and "damaged" not in text
    assert len(load_dataset(NAME)[0].obs) == 2


@pytest.mark.parametrize("where", [(minari, "load_dataset"), (h5py, "File")])
def test_a_file_of_another_user(root, monkeypatch, where):
    """Simulated, since root may read everything."""
    write([episode(0, 2)])
    monkeypatch.setattr(*where, raises(PermissionError(errno.EACCES, "Permission denied")))
    text = message()
    assert "may not be read by this user" in text and f"change the permissions of {root / NAME}" in text
    assert "remove" not in text and "damaged" not in text


def test_an_error_that_says_nothing_of_the_data(root, monkeypatch):
    write([episode(0, 2)])
    monkeypatch.setattr(h5py, "File", raises(OSError(errno.EMFILE, "Too many open files")))
    text = message()
    assert "Too many open files" in text and "mend that and start again" in text
    assert "remove" not in text and "damaged" not in text


@pytest.mark.parametrize(
    "error, says",
    [
        (EnvironmentFailure("libsumo is installed and cannot be imported"), "mend that, and start again to build it"),
        (KeyError("green"), "test_datasets.py, line"),
        (MemoryError("Unable to allocate 9 GiB"), "needs more memory than there is"),
        (OSError(errno.ENOSPC, "No space left on device"), "make room"),
        (BrokenProcessPool("A worker process was terminated"), "for want of memory"),
        (ImportError("No module named 'ogbench'"), "pip install -e '.[suite]'"),
    ],
)
def test_a_build_that_fails(monkeypatch, error, says):
    monkeypatch.setattr(datasets, "build", raises(error))
    text = message("stitch/cube-single-play-2k-v0")
    assert (str(error) in text or isinstance(error, MemoryError)) and says in text
    assert "damaged" not in text and "cannot be read" not in text


@pytest.mark.parametrize("extra", ["minatar", "atari", "driving"])
def test_a_build_that_lacks_a_package_names_its_extra(monkeypatch, extra):
    name = next(name for name in RECIPES if name.startswith(f"stitch/{extra}-"))
    monkeypatch.setattr(datasets, "build", raises(ImportError("No module named 'pygame'")))
    assert f"No module named 'pygame'): pip install -e '.[{extra}]'." in message(name)


def test_too_little_memory(root, monkeypatch):
    """A step needs 16 * (2 + 2 + 5) bytes while it is read: 1e9 of them 144 GB, 134.1 GiB."""
    write([episode(0, 2)])
    load_dataset(NAME)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "aligned", raises(MemoryError()))
        text = message()
        assert "needs about 0.0 GiB of memory (2 steps with observations of 2 numbers), and less is free" in text
        assert "remove" not in text
    # Before anything is read
    monkeypatch.setattr(datasets, "_read", raises(AssertionError("read")))
    monkeypatch.setattr(layouts, "_free_memory", lambda: 288)
    with pytest.raises(AssertionError, match="read"):  # just enough
        load_dataset(NAME)
    monkeypatch.setattr(layouts, "_free_memory", lambda: 134 * 2**30)
    edit_metadata(root, total_steps=10**9)
    assert "needs about 134.1 GiB of memory (1,000,000,000 steps" in message() and "134.0 GiB are free" in message()


def test_more_rows_than_a_device_can_hold(root, monkeypatch):
    """A row of two observations, an action, a reward and a terminal, of 2 + 2 + 2 + 1 + 1 numbers, has 32 bytes: 1e9 of
    them are 29.8 GiB. This is said before anything is read, and before a device is asked for memory."""
    write([episode(0, 2)])
    edit_metadata(root, total_steps=10**9)
    gpu = types.SimpleNamespace(device_kind="Some GPU", memory_stats=lambda: {"bytes_limit": 18 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu, gpu])
    monkeypatch.setattr(layouts, "_free_memory", lambda: 2**40)
    monkeypatch.setattr(datasets, "_read", raises(AssertionError("read")))
    text = message()
    assert text.startswith(f"{NAME} needs 29.8 GiB on each device, where all seeds share its 1,000,000,000 rows, and ")
    assert text.endswith("JAX may use 18.0 GiB of Some GPU: use a device with more memory, or write fewer episodes.")
    optional = ("next_action", "episode", "timestep")  # 2 + 1 + 1 numbers more
    with pytest.raises(DatasetError, match="needs 44.7 GiB"):
        load_dataset(NAME, columns=optional)
    for limit in ({"bytes_limit": 32 * 10**9}, {}, None):  # just enough; a platform that does not tell
        gpu.memory_stats = lambda limit=limit: limit
        with pytest.raises(AssertionError, match="read"):
            load_dataset(NAME)
    gpu.memory_stats = raises(AssertionError("asked"))
    with pytest.raises(AssertionError, match="read"):  # by who needs no device
        load_dataset(NAME, on_device=False)
    edit_metadata(root, total_steps=2**25)  # a GiB
    with pytest.raises(AssertionError, match="read"):
        load_dataset(NAME)
    edit_metadata(root, total_steps=2**25 + 1)
    with pytest.raises(AssertionError, match="asked"):
        load_dataset(NAME)


@pytest.mark.parametrize("columns", [(), ("next_action", "episode", "end", "return_to_go")])
@pytest.mark.parametrize("actions", [LABEL_ACTIONS, spaces.Discrete(3)])
def test_the_bytes_of_a_dataset_are_known_before_it_is_read(root, columns, actions):
    changes = {} if actions is LABEL_ACTIONS else {"actions": np.zeros(4, int)}
    found = write([episode(k, 4, **changes) for k in range(3)], action_space=actions)
    data, env = load_dataset(NAME, columns=columns)
    size = sizes(env.interface.observation, env.interface.action, found.total_steps, found.total_episodes, columns)[0]
    assert size == sum(x.nbytes for x in jax.tree.leaves(data))


@pytest.mark.parametrize("dims", [(100, 3), (11, 3), (24, 30)])
@pytest.mark.parametrize("of", ["rows", "normalised rows", "goals"])
def test_the_memory_in_use_while_a_dataset_is_read_is_known(dims, of):
    """NumPy tells tracemalloc of its arrays. The formula says at most a tenth less than that, or a third more."""
    n, (obs_dim, action_dim), rng = 2_000, dims, np.random.default_rng(0)
    box = {"low": [-1.0] * action_dim, "high": [1.0] * action_dim, "dtype": "float32"}
    raw = {
        "observations": rng.standard_normal((n + 2, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        "rewards": rng.standard_normal(n),
        "terminations": np.zeros(n, bool),
        "lengths": np.full(2, n // 2),
        "numbers": np.arange(2),
    }
    before = {name: x.copy() for name, x in raw.items()}
    tracemalloc.start()
    data, *_ = datasets._rows(NAME, raw, ([obs_dim], box), of == "goals", (), 1.0, of == "normalised rows", False, 0.0)
    most = sum(x.nbytes for x in raw.values()) + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 0.9 < sizes([obs_dim], box, n, 2)[1] / most < 1.33
    for name, x in raw.items():  # of which the fingerprint is made afterwards
        np.testing.assert_array_equal(x, before[name])
    if of == "normalised rows":
        seen = raw["observations"][np.r_[:1000, 1001:2001]]
        mean, std = (getattr(seen, name)(axis=0, dtype=np.float64) for name in ("mean", "std"))
        mean, scale = mean.astype(np.float32), (std + 1e-3).astype(np.float32)
        np.testing.assert_array_equal(data.obs, (seen - mean) / scale)
        np.testing.assert_array_equal(data.next_obs[:1000], (raw["observations"][1:1001] - mean) / scale)


def test_the_free_memory_of_this_machine():
    free = layouts._free_memory()
    assert free == np.inf or 10**6 < free < 10**15
    if sys.platform == "linux":
        assert free < np.inf


# What a field must hold: (what is written, what the sentence says of it, which space the actions have)
DISCRETE = {"action_space": spaces.Discrete(3)}
FROM_ONE = {"action_space": spaces.Discrete(3, start=1)}
ONE_HOT = "declare Discrete(3, start=1), and if rows are one-hot, store np.argmax(x, -1)"
DICT = {"observation_space": OBSERVATIONS["dict"]}


def dict_observations(length, **changes):
    inner = {"x": np.zeros(length, np.float32), "y": labels(1, length)} | changes.pop("a", {})
    return {"z": np.arange(length) % 3 - 1, "a": inner} | changes


WRONG = [
    ({"rewards": np.ones((3, 2))}, "rewards of episode 1 must be finite numbers, and they have the shape (3, 2)", {}),
    ({"rewards": np.array([0, np.nan, 1])}, "rewards of episode 1 must be finite numbers, and row 1 holds nan", {}),
    ({"rewards": np.array([0, 1, -np.inf])}, "row 2 holds -inf", {}),
    ({"rewards": np.array([np.inf, 1, 1])}, "row 0 holds inf", {}),
    ({"rewards": np.arange(3) + 1j}, "rewards of episode 1 must be finite numbers, and they have the type complex", {}),
    ({"rewards": ["a", "b", "c"]}, "rewards of episode 1 must be finite numbers, and they have the type object", {}),
    ({"rewards": np.ones((1, 3))}, "1 rewards", {}),
    ({"terminations": np.array([0, 0, np.nan])}, "terminations of episode 1 must be 0 or 1, and row 2 holds nan", {}),
    ({"terminations": np.array([0, 0.5, 1])}, "terminations of episode 1 must be 0 or 1, and row 1 holds 0.5", {}),
    ({"terminations": np.array([0, 0, 2])}, "terminations of episode 1 must be 0 or 1, and row 2 holds 2", {}),
    ({"truncations": np.array([0, 0, -1])}, "truncations of episode 1 must be 0 or 1, and row 2 holds -1", {}),
    ({"terminations": ["no", "no", "yes"]}, "terminations of episode 1 must be 0 or 1, and they have the type", {}),
    ({"terminations": np.zeros((3, 2), bool)}, "terminations of episode 1 must be 0 or 1, and they have the shape", {}),
    ({"observations": np.full((4, 2), 1e300)}, "observations of episode 1 must be finite", {}),
    ({"observations": np.full((4, 2), 1e300)}, "row 0 holds 1e+300", {}),
    ({"observations": np.array([[0, 0], [0, 0], [0, 0], [0, np.nan]])}, "row 3 holds nan", {}),
    ({"observations": np.ones((4, 3))}, "they have the shape (4, 3) where (4, 2) is declared", {}),
    (
        {"observations": np.ones((4, 2)) * 1j},
        "observations of episode 1 must be finite numbers of float32, and they",
        {},
    ),
    ({"actions": np.full((3, 2), np.inf, np.float32)}, "actions of episode 1 must be finite", {}),
    ({"actions": np.ones((3, 3), np.float32)}, "they have the shape (3, 3) where (3, 2) is declared", {}),
    ({"actions": np.array([0, 0.7, 1])}, "whole numbers in Discrete(3, start=0), and row 1 holds 0.7", DISCRETE),
    ({"actions": np.array([1, 2, 3])}, f"row 2 holds 3: if they count from 1, {ONE_HOT}", DISCRETE),
    ({"actions": np.array([0, -1, 3])}, "row 1 holds -1", DISCRETE),
    ({"actions": np.array([0, 1, 2])}, "Discrete(3, start=1), and row 0 holds 0", FROM_ONE),
    (
        {"actions": np.eye(3)},
        f"they have the shape (3, 3) where (3,) is declared: if they count from 1, {ONE_HOT}",
        DISCRETE,
    ),
    ({"observations": np.array([2, 6, 3, 2])}, "row 1 holds 6", {"observation_space": OBSERVATIONS["discrete"]}),
    ({"observations": np.array([2, 1, 3, 2])}, "row 1 holds 1", {"observation_space": OBSERVATIONS["discrete"]}),
    (
        {"observations": dict_observations(4, z=np.array([0, 0.5, 0, 0]))},
        "observations/z of episode 1 must be whole",
        DICT,
    ),
    (
        {"observations": dict_observations(4, a={"x": np.full(4, np.nan)})},
        "observations/a/x of episode 1 must be",
        DICT,
    ),
    ({"observations": dict_observations(4, z=np.zeros(3, int))}, "3 observations/z", DICT),
    ({"observations": labels(0, 3)}, "episode 1 holds 3 observations, 3 actions, 3 rewards, 3 terminations", {}),
    ({"observations": labels(0, 3)}, "add the observation after the last step", {}),
    ({"actions": labels(0, 4)}, "4 observations, 4 actions", {}),
    ({"terminations": np.zeros(2, bool)}, "2 terminations", {}),
    ({"truncations": np.zeros(4, bool)}, "4 truncations", {}),
    ({"terminations": np.array([True, False, True])}, "terminations of episode 1 are set in row 0, and it goes on", {}),
    ({"terminations": np.array([1, 0, 1])}, "split it there (one EpisodeBuffer per episode", {}),
    (
        {"truncations": np.array([False, True, False])},
        "truncations of episode 1 are set in row 1, and it goes on to row 2",
        {},
    ),
    ({"truncations": np.array([False, True, True])}, "split it there (one EpisodeBuffer per episode", {}),
]


@pytest.mark.parametrize(
    "changes, reason, spaces_", WRONG, ids=[f"{next(iter(w[0]))}-{i}" for i, w in enumerate(WRONG)]
)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_field_that_does_not_hold_what_it_should(changes, reason, spaces_, data_format):
    """One sentence with field, episode and row, also when it is read again; no word of removing or of damage."""
    skip_without_arrow(data_format)
    right = {"actions": np.array([1, 2, 1])} if "action_space" in spaces_ else {}
    if spaces_ is DICT:
        right = {"observations": dict_observations(4)}
    elif "observation_space" in spaces_:
        right = {"observations": np.array([2, 3, 4, 5])}
    try:
        write([episode(0, 3, **right), episode(1, 3, **(right | changes))], data_format=data_format, **spaces_)
    except Exception:
        assert data_format == "arrow"  # Minari writes no such file
        return
    if data_format == "arrow" and reason in ("1 rewards", "4 truncations"):  # which Minari has put right
        assert len(load_dataset(NAME)[0].obs) == 6
        return
    text = message()
    assert "episode 1" in text and (reason in text or data_format == "arrow")
    assert "remove" not in text and "damaged" not in text and text.startswith(f"{NAME}: ")
    assert message() == text


RIGHT = [
    ({"rewards": np.array([[1], [2], [3]])}, "reward", [1, 2, 3]),
    ({"rewards": np.array([1, 2, 3], np.int64)}, "reward", [1, 2, 3]),
    ({"rewards": np.array([1, 2, 3], np.float16)}, "reward", [1, 2, 3]),
    ({"rewards": np.array([True, False, True])}, "reward", [1, 0, 1]),
    ({"terminations": np.array([[False], [False], [True]])}, "terminal", [0, 0, 1]),
    ({"terminations": np.array([0, 0, 1], np.int8)}, "terminal", [0, 0, 1]),
    ({"terminations": np.array([0, 0, 1.0])}, "terminal", [0, 0, 1]),
    ({"truncations": np.array([0, 0, 1]), "terminations": np.zeros(3, int)}, "terminal", [0, 0, 0]),
    ({"observations": np.arange(8, dtype=np.float16).reshape(4, 2)}, "obs", [[0, 1], [2, 3], [4, 5]]),
    ({"observations": np.arange(8).reshape(4, 2, 1)}, "next_obs", [[2, 3], [4, 5], [6, 7]]),
    ({"actions": np.full((3, 2), 1024, np.int32)}, "action", np.zeros((3, 2))),
]


@pytest.mark.parametrize("changes, name, expected", RIGHT)
@pytest.mark.parametrize("data_format", ["hdf5", "arrow", "parquet"])
def test_other_types_and_shapes_of_the_same_numbers(changes, name, expected, data_format):
    """Beside an episode with the usual ones: each episode of a file may have its own."""
    skip_without_arrow(data_format)
    try:
        write([episode(0, 2), episode(1, 3, **changes)], data_format=data_format)
    except Exception:
        assert data_format != "hdf5"  # Minari writes no such file
        return
    column = getattr(load_dataset(NAME)[0], name)
    np.testing.assert_array_equal(column[2:], expected)
    assert column.dtype == np.float32


@pytest.mark.parametrize(
    "actions", [np.array([[0], [2], [1]]), np.array([0.0, 2.0, 1.0]), np.array([0, 2, 1], np.uint8)]
)
def test_other_types_and_shapes_of_discrete_actions(actions):
    write([episode(0, 3, actions=actions)], **DISCRETE)
    data, _ = load_dataset(NAME)
    np.testing.assert_array_equal(data.action, [0, 2, 1])
    assert data.action.dtype == np.int32


def test_an_arrow_file_without_the_last_observation(root):
    """Minari pads the other fields to the observations, and cuts the last row off: a step would vanish silently."""
    skip_without_arrow("arrow")
    write([episode(0, 3), episode(1, 3, observations=labels(1, 3))], data_format="arrow")
    text = message()
    assert "episode 1 says 3 steps, and 2 can be read" in text and "observation after the last step" in text


def test_a_key_that_one_episode_has_not(root):
    write([episode(k, 3, observations=dict_observations(4)) for k in range(2)], **DICT)
    in_file(lambda file: file.pop("episode_1/observations/a/x"))(root / NAME / "data")
    assert "episode 1 has no observations/a/x" in message()


def box(*actions, low=-1.0, high=1.0):
    """A dataset of one-dimensional actions."""
    actions = np.array(actions, np.float32)[:, None]
    write([episode(0, 1, actions=actions[:1]), episode(1, len(actions) - 1, actions=actions[1:])],
          action_space=spaces.Box(low, high, (1,)))  # fmt: skip


def test_actions_a_little_outside_the_bounds_are_clipped_and_said(capsys):
    """People's recordings have them: D4RL's door-human exceeds [-1, 1] in 82 % of its rows, by up to 0.37."""
    box(0.5, -1.37, 1.0, 1.2, -1.0)
    data, _ = load_dataset(NAME)
    np.testing.assert_array_equal(data.action[:, 0], np.array([0.5, -1, 1, 1, -1], np.float32))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "clipped" in line]
    assert "2 of 5 rows" in line and "1.37 where the bounds are -1 and 1" in line


def test_the_largest_excess_is_half_of_the_half_width(capsys):
    box(4, 8.5, 10, low=0, high=8)
    np.testing.assert_array_equal(load_dataset(NAME)[0].action[:, 0], [0, 1, 1])
    assert "2 of 3 rows" in (out := capsys.readouterr().out) and "the largest is 1.5 where" in out


@pytest.mark.parametrize(
    "actions, low, high, reason",
    [
        (
            (10, 50, 90, 30),
            -1,
            1,
            "actions[0] range from 10 to 90 (first in episode 0, row 0) where the space says -1 to 1",
        ),
        ((0, 1, -1.51), -1, 1, "range from -1.51 to 1 (first in episode 1, row 1)"),
        ((4, 10.1), 0, 8, "range from 4 to 10.1 (first in episode 1, row 0) where the space says 0 to 8"),
        ((2, 2, 7), 2, 2, "where the space says 2 to 2"),
    ],
)
def test_actions_far_outside_the_bounds_are_refused(actions, low, high, reason):
    box(*actions, low=low, high=high)
    text = message()
    assert reason in text and "declare the Box of what was recorded" in text
    assert message() == text  # from the cache too


def test_rounding_is_not_outside_the_bounds(capsys):
    bounds = np.array([1000.1, 1000.3])
    write(
        [episode(0, 2, actions=bounds.astype(np.float32)[:, None])], action_space=spaces.Box(*bounds, (1,), np.float64)
    )
    load_dataset(NAME)
    assert "clipped" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "rewards, options, reason",
    [
        ([0, 1e300], {}, "reward of episode 1, row 1 becomes inf"),
        ([0, 1], {"reward_shift": 1e39}, "reward of episode 0, row 0 becomes inf"),
        ([0, 5e-324], {"normalize_reward": True}, "reward of episode 0, row 0 becomes nan"),
        ([1e38, 3e38], {"columns": ("return_to_go",)}, "return_to_go of episode 1, row 0 becomes inf"),
        ([1, 1], {"columns": ("return_to_go",), "discount": 1e39}, "return_to_go of episode 1, row 0 becomes inf"),
    ],
)
def test_what_is_handed_out_is_finite(rewards, options, reason):
    write([episode(0, 2, rewards=np.zeros(2)), episode(1, 2, rewards=np.array(rewards, float))])
    text = message(**options)
    assert reason in text and "reward_shift" in text


def test_normalize_reward_may_bring_large_rewards_down():
    write([episode(0, 1, rewards=np.array([1e300])), episode(1, 1, rewards=np.zeros(1))])
    np.testing.assert_allclose(load_dataset(NAME, normalize_reward=True)[0].reward, [1000, 0], rtol=1e-6)


def test_missing_reader_of_the_format(root, monkeypatch):
    write([episode(0, 2)])
    monkeypatch.setattr(minari, "load_dataset", raises(ImportError('pip install "minari[arrow]"')))
    text = message()
    assert "package that is missing" in text and "minari[arrow]" in text


def test_empty_dataset():
    write([])
    assert "no transitions" in message()


@pytest.mark.parametrize("observations", [1, 3])
def test_a_reset_without_a_step_is_left_out_and_the_episodes_keep_their_numbers(root, observations):
    """An episode of one observation. With more of them, its steps have been lost."""
    write([episode(0, 2), episode(1, 2, actions=np.array([[1.0, 1], [9000, 1]], np.float32))])
    with h5py.File(root / NAME / "data" / "main_data.hdf5", "a") as file:
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            rows = file["episode_0"][name][:]
            del file["episode_0"][name]
            file["episode_0"][name] = rows[: observations if name == "observations" else 0]
    edit_metadata(root, total_steps=2)
    if observations == 1:
        assert "first in episode 1, row 1" in message()
    else:
        assert "episode 0 holds 3 observations, 0 actions" in message()


@pytest.mark.parametrize(
    "space, sample, how",
    [
        (spaces.MultiDiscrete([2, 3]), np.zeros((2, 2), int), "np.ravel_multi_index(x.T, nvec)"),
        (spaces.MultiBinary(2), np.zeros((2, 2), np.int8), "Discrete(2 ** n)"),
        (spaces.Box(-np.inf, np.inf, (2,)), np.zeros((2, 2), np.float32), "Box(x.min(axis=0), x.max(axis=0))"),
        (spaces.Box(0, np.inf, (2,)), np.zeros((2, 2), np.float32), "Box(x.min(axis=0), x.max(axis=0))"),
        (spaces.Box(-3.4e38, 3.4e38, (2,)), np.zeros((2, 2), np.float32), "Box(x.min(axis=0), x.max(axis=0))"),
        (spaces.Box(-1, 1, (2, 2)), np.zeros((2, 2, 2), np.float32), "x.reshape(len(x), -1)"),
        (spaces.Box(-1, 1, ()), np.zeros(2, np.float32), "x.reshape(len(x), -1)"),
        (spaces.Box(-128, 127, (2,), np.int8), np.zeros((2, 2), np.int8), "x.astype(np.float32)"),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"a": np.zeros(2, int)}, "np.concatenate(parts, axis=-1)"),
        (spaces.Tuple([spaces.Discrete(2)]), (np.zeros(2, int),), "np.concatenate(parts, axis=-1)"),
        (spaces.Box(-1, 1, (0,)), np.zeros((2, 0), np.float32), "make numbers of it"),
        (spaces.Text(5), ["a", "b"], "make numbers of it"),
    ],
)
def test_unsupported_action_space(space, sample, how):
    """It says how to convert what was recorded, and sends nobody to another dataset."""
    write([episode(0, 2, actions=sample)], action_space=space)
    text = message()
    assert text.startswith("Actions must be") and " ".join(str(space).split()) in text and how in text
    assert "choose another dataset" not in text


@pytest.mark.parametrize(
    "space, sample, named, how",
    [
        (spaces.MultiBinary(2), np.zeros((3, 2), np.int8), "MultiBinary(2)", "x.astype(np.float32)"),
        (spaces.Tuple([LABELS]), (np.zeros((3, 2)),), "Tuple", "make a Dict of it"),
        (spaces.Box(0, 1, (40, 40, 3)), np.zeros((3, 40, 40, 3), np.float32), "(40, 40, 3)", "x.reshape(len(x), -1)"),
        (
            spaces.Dict({"a": spaces.MultiDiscrete([2])}),
            {"a": np.zeros((3, 1), int)},
            "and MultiDiscrete([2])",
            "floats",
        ),
        (spaces.Box(-1, 1, (0,)), np.zeros((3, 0), np.float32), "(0,)", "make numbers of it"),
        (spaces.Text(5), ["a", "b", "c"], "Text", "make numbers of it"),
    ],
)
def test_unsupported_observation_space(space, sample, named, how):
    write([episode(0, 2, observations=sample)], observation_space=space)
    text = message()
    assert text.startswith("Observations must be") and named in text and how in text
    assert "choose another dataset" not in text


def test_observations_of_an_empty_dict(root):
    write([episode(0, 2)])
    edit_metadata(root, observation_space='{"type": "Dict", "subspaces": {}}')
    assert message().startswith("Observations must be")


def test_missing_environment_package(root):
    dataset = write_echo()
    spec = json.loads(dataset.env_spec.to_json()) | {"entry_point": "no_such_package.envs:Env"}
    edit_metadata(root, env_spec=json.dumps(spec))
    edit_metadata(root, requirements=["no-such-package>=1.2"])
    data, env = load_dataset(NAME)  # training needs no environment: tests/test_environments.py has what is said
    assert len(data.obs) == 4 and not env.probe() and "install no-such-package>=1.2" in env.score_kind


def test_normalize_reward_of_equal_returns():
    rewards = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])  # equal but for rounding
    assert np.ptp(rewards.cumsum(axis=1)[:, -1]) > 0
    write([episode(k, 3, rewards=rewards[k]) for k in range(2)])
    assert "normalize_reward needs episodes of different return" in message(normalize_reward=True)


def test_a_script_ends_with_the_sentence_and_status_1(root):
    code = "from common.datasets import load_dataset; load_dataset('hopper')"
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "MINARI_DATASETS_PATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.returncode == 1
    assert run.stderr.startswith("hopper is not a dataset name") and run.stderr.count("\n") == 1


# --- What is said, and what identifies data --------------------------------------------------------------


def test_the_rewards_that_the_algorithm_sees_are_said(capsys):
    write([episode(0, 4, rewards=np.array([0, 0, 1.0, 2.0]))])
    load_dataset(NAME, reward_shift=-1.0)
    out = capsys.readouterr().out
    assert f"{NAME}: 4 rows in 1 episodes; rewards as the algorithm sees them: from -1 to 1, mean -0.25." in out
    assert "Warning" not in out


@pytest.mark.parametrize(
    "shift, says", [(-1, "0 (reward_shift -1): nothing tells"), (0, "1 (reward_shift 0): only the")]
)
def test_rewards_that_are_all_equal_are_warned_of(capsys, shift, says):
    """CartPole pays 1 a step: a shift of -1 leaves nothing to learn from."""
    write([episode(k, 3, rewards=np.ones(3)) for k in range(2)])
    load_dataset(NAME, reward_shift=shift)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert says in line


def fingerprint(**options):
    return load_dataset(NAME, **options)[1].fingerprint


def test_the_fingerprint_is_of_the_data_alone(root, monkeypatch):
    """Neither the cache, nor a move, nor options, nor the format of the file change it."""
    parts = [episode(0, 3), episode(1, 4, "timeout")]
    dataset = write(parts)
    first = fingerprint()
    sizes = {"rows": 7, "episodes": 2, "obs_dim": 2, "action_dim": 2}
    assert {name: first[name] for name in sizes} == sizes and first["spaces"][0] == [2]
    assert json.loads(json.dumps(first)) == first
    assert (root / NAME / "data" / "stitch-cache.npz").exists()
    assert fingerprint(normalize_obs=True, normalize_reward=True, reward_shift=-1.0) == first
    assert fingerprint(columns=("next_action", "episode", "start")) == first
    dataset.storage.update_metadata({"description": "the same"})
    shutil.copytree(root / NAME, root / "moved" / NAME)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root / "moved"))
    assert fingerprint() == first
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    pytest.importorskip("pyarrow")
    shutil.rmtree(root / NAME)
    write(parts, data_format="arrow")
    assert fingerprint() == first


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminations", "order", "split", "space"])
def test_any_number_changes_the_fingerprint(root, field):
    parts, kwargs = [episode(0, 3, None), episode(1, 3, None)], {}
    write(parts)
    first = fingerprint()
    shutil.rmtree(root / NAME)
    if field == "order":
        parts = parts[::-1]
    elif field == "space":
        kwargs["action_space"] = spaces.Box(0, 4096, (2,), np.float32)
    elif field == "split":  # the same numbers in the same order, cut elsewhere
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        flat = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        cut = {name: 3 if name == "observations" else 2 for name in names}
        parts = [{n: x[: cut[n]] for n, x in flat.items()}, {n: x[cut[n] :] for n, x in flat.items()}]
        parts = [EpisodeBuffer(**part) for part in parts]
    else:
        array = getattr(parts[1], field)
        array[-1] = 1 - array[-1] if field == "terminations" else array[-1] + 1
    write(parts, **kwargs)
    assert fingerprint() != first
    assert fingerprint()["hash"] != first["hash"] or field == "space"


def test_what_is_handed_out_is_aligned():
    write([episode(k, 7) for k in range(3)])
    columns = ("next_action", "episode", "return_to_go", "start", "end", "timestep")
    for _ in range(5):  # memory may begin there by chance
        data, _ = load_dataset(NAME, columns=columns, normalize_obs=True)
        arrays = [x for x in data if x is not None]  # there are no logged propensities
        assert [x.ctypes.data % 64 for x in arrays] == [0] * 11
        assert all(x.flags.c_contiguous and x.flags.writeable for x in arrays)


def test_all_cpu_devices_share_the_arrays(root):
    """K8.35: one copy for each virtual device otherwise."""
    write([episode(k, 50) for k in range(3)])
    code = f"""
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from common.datasets import load_dataset
data, _ = load_dataset({NAME!r})
shared = jax.device_put(data, NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec()))
for host, array in zip(jax.tree.leaves(data), jax.tree.leaves(shared)):
    assert [s.data.unsafe_buffer_pointer() for s in array.addressable_shards] == [host.ctypes.data] * 4
print("shared", len(jax.tree.leaves(shared)))
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    assert script(root, code, **flags).stdout.endswith("shared 5\n")


def script(root, code, args=("-c",), **environ):
    environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "MINARI_DATASETS_PATH": str(root), "PATH": os.environ["PATH"]}
    args = [sys.executable, *args, *([code] if "-c" in args else [])]
    run = subprocess.run(args, input=code, capture_output=True, text=True, env=environ, timeout=120)
    assert run.returncode == 0, run.stderr
    return run


def test_without_an_environment_nothing_of_the_metadata_is_run(root, capsys):
    dataset = write_echo()
    spec = json.loads(dataset.env_spec.to_json()) | {"entry_point": f"{__name__}:cannot_be_made"}
    edit_metadata(root, env_spec=json.dumps(spec))
    made = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules[__name__], "cannot_be_made", lambda *args, **kwargs: made.append(1))
        data, env = load_dataset(NAME)
        assert not env.probe(0) and not made and len(data.obs) == 4
        assert env.score_kind == "not scored: eval_episodes is 0"
        edit_metadata(root, observation_space=None)
        metadata = json.loads((root / NAME / "data" / "metadata.json").read_text())
        del metadata["observation_space"]  # then Minari itself makes the environment
        (root / NAME / "data" / "metadata.json").write_text(json.dumps(metadata))
        assert "lacks observation_space or action_space" in message()
        assert not made


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_a_recipe_builds_from_a_script_without_a_guard(root, tmp_path, how):
    """K7.28: processes that import the caller's main module would build, and start processes, without end."""
    code = 'from common.datasets import load_dataset\nprint(len(load_dataset("stitch/hopper-random-2k-v0")[0].obs))'
    (tmp_path / "unguarded.py").write_text(code)
    run = script(root, code, args=("-",) if how == "stdin" else (str(tmp_path / "unguarded.py"),))
    assert "2000" in run.stdout.splitlines()


def test_a_process_that_dies_ends_the_build():
    with rollouts.processes(2) as run:
        assert list(run(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        numbers = run(abs, itertools.count())  # endless
        assert [next(numbers) for _ in range(9)] == [*range(9)]
        with pytest.raises(Exception, match="worker"):
            list(run(os._exit, [3]))


# --- Cache ---------------------------------------------------------------------------------------------


@pytest.fixture
def cached(root):
    """A dataset that was loaded once: its Minari handle, its rows and the file of its cache."""
    dataset = write([episode(k, 3, end) for k, end in enumerate(("terminal", "timeout"))])
    data, _ = load_dataset(NAME, columns=("next_action", "episode"))
    (cache,) = (root / NAME / "data").glob("stitch-*")
    return dataset, data, cache


def load_again():
    return load_dataset(NAME, columns=("next_action", "episode"))[0]


def test_second_load_takes_the_cache(cached, monkeypatch):
    monkeypatch.setattr(datasets, "_read_episodes", raises(AssertionError("read the file again")))
    jax.tree.map(np.testing.assert_array_equal, load_again(), cached[1])
    assert [x.dtype for x in jax.tree.leaves(load_again())] == [x.dtype for x in jax.tree.leaves(cached[1])]


def test_added_episodes_are_seen(cached):
    cached[0].update_dataset_from_buffer([episode(2, 2)])
    np.testing.assert_array_equal(load_again().obs, label_rows((3, 3, 2)))


def test_changed_numbers_are_seen(cached, root):
    with h5py.File(root / NAME / "data" / "main_data.hdf5", "a") as file:
        file["episode_1"]["rewards"][1] = -7  # the file keeps its size
    assert load_again().reward[4] == -7


def test_a_dataset_of_the_same_name_is_not_taken_for_the_old_one(cached, root):
    kept = cached[2].read_bytes()
    shutil.rmtree(root / NAME)
    write([episode(5, 3), episode(6, 3, "timeout")])
    cached[2].write_bytes(kept)
    np.testing.assert_array_equal(load_again().episode, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(load_again().obs[:, 0], [5, 5, 5, 6, 6, 6])


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_torn_cache_is_ignored_and_replaced(cached, keep, monkeypatch):
    content = cached[2].read_bytes()
    cached[2].write_bytes(content[: int(keep * len(content))])
    jax.tree.map(np.testing.assert_array_equal, load_again(), cached[1])
    test_second_load_takes_the_cache(cached, monkeypatch)


def test_a_flipped_bit_in_the_cache_is_noticed(cached):
    content = bytearray(cached[2].read_bytes())
    content[content.index(b"rewards.npy") + 200] ^= 1
    cached[2].write_bytes(content)
    jax.tree.map(np.testing.assert_array_equal, load_again(), cached[1])


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_costs_only_time(root, monkeypatch, code):
    """Simulated, since root may write everywhere. On a read-only mount even removing an absent file raises."""
    write([episode(0, 3)])
    monkeypatch.setattr(np, "savez", raises(OSError(code, "refused")))
    monkeypatch.setattr(pathlib.Path, "unlink", raises(OSError(code, "refused")))
    for _ in range(2):
        np.testing.assert_array_equal(load_again().obs, label_rows((3,)))


def test_a_full_disk_leaves_nothing_behind(root, monkeypatch):
    def savez(path, **arrays):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    write([episode(0, 3)])
    monkeypatch.setattr(np, "savez", savez)
    np.testing.assert_array_equal(load_again().obs, label_rows((3,)))
    assert not list((root / NAME / "data").glob("stitch-*"))


def test_ctrl_c_while_the_cache_is_written_leaves_nothing_behind(root, monkeypatch):
    def savez(path, **arrays):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    write([episode(0, 3)])
    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(KeyboardInterrupt):
        load_again()
    assert not list((root / NAME / "data").glob("stitch-*"))


# --- Logged propensities -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True], ids=["T", "T+1"])
def test_propensities_are_those_of_the_rows(reset):
    """Logged with each action, or by a DataCollector, whose first info is the reset's."""
    logged = [np.array([0.5, 0.25, 2.0]), np.array([0.125, 4.0])]
    infos = [{"propensity": np.concatenate([[np.nan], x]) if reset else x} for x in logged]
    write([episode(k, len(x), infos=info) for k, (x, info) in enumerate(zip(logged, infos, strict=True))])
    for _ in range(2):  # read, and from the cache
        data, env = load_dataset(NAME, columns=("propensity",))
        np.testing.assert_array_equal(data.propensity, [0.5, 0.25, 2.0, 0.125, 4.0])
        assert data.propensity.dtype == np.float32
    assert load_dataset(NAME)[0].propensity is None
    write([episode(k, len(x), infos={"propensity": 0.5 * x}) for k, x in enumerate(logged)], "test/other-v0")
    assert load_dataset("test/other-v0")[1].fingerprint != env.fingerprint  # other data


@pytest.mark.parametrize(
    "logged, sentence",
    [
        ([None, None], "has no logged propensities: .* infos"),
        ([[0.5, 0.5, 0.5], None], "in some episodes up to 1 and not in others"),
        ([None, [0.5, 0.5, 0.5]], "in some episodes up to 1 and not in others"),
        ([[0.5, 0.5, 0.5], [0.5, 0.0, 0.5]], "infos/propensity of episode 1 must be above 0 .* row 1 holds 0.0"),
        ([[0.5, 0.5, 0.5], [0.5, 0.5, 1.5]], "above 0 and at most 1, and row 2 holds 1.5"),
        ([[0.5, 0.5, 0.5], [np.nan, 0.5, 0.5]], "row 0 holds nan"),
        ([[0.5, 0.5, 0.5], [0.5, 0.5]], "2 infos/propensity"),
        ([[0.5, 0.5, 0.5], [1j, 1j, 1j]], "they have the type"),
    ],
)
def test_propensities_that_are_none_are_refused_in_one_sentence(logged, sentence):
    infos = [None if x is None else {"propensity": np.array(x)} for x in logged]
    actions = np.array([0, 1, 0])
    write([episode(k, 3, actions=actions, infos=x) for k, x in enumerate(infos)], action_space=spaces.Discrete(2))
    with pytest.raises(DatasetError, match=sentence) as error:
        load_dataset(NAME, columns=("propensity",))
    assert "\n" not in error.value.code
