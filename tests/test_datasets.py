"""The data contract of common/datasets.py, on tiny Minari datasets whose every number says where it comes from.

In a labelled dataset the observation of episode k at step t is (k, t), its action (k, t) too and its reward 100 k + t,
so that each row can be checked by itself. `Echo` is the environment: it records what it is given.
"""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import gymnasium
import h5py
import jax
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from algos.bc import keep_best
from common import datasets
from common.datasets import DatasetError, Spec, Transition, load_dataset

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions

LABELS = spaces.Box(-np.inf, np.inf, (2,), np.float64)
LABEL_ACTIONS = spaces.Box(0, 2048, (2,), np.float32)  # a power of two: labels are scaled without rounding
NAME = "test/labelled-v0"

OBSERVATIONS = {
    "labels": LABELS,
    "dict": spaces.Dict(
        {"z": spaces.Discrete(3, start=-1), "a": spaces.Dict({"y": LABELS, "x": spaces.Box(-1, 1, ())})}
    ),
    "discrete": spaces.Discrete(4, start=2),
}


class Echo(gymnasium.Env):
    """Starts at a number drawn from its seed, ends after 3 to 6 steps, pays start + 0.1 sum(action) per step."""

    log = []  # ("reset", observation) and ("step", action) of all instances

    def __init__(
        self, observation="labels", low=0.0, high=2048.0, num_actions=0, start=0, dtype="float32", endless=False
    ):
        self.observation_space = OBSERVATIONS[observation]
        self.kind, self.endless = observation, endless
        self.action_space = spaces.Box(low, high, (2,), np.dtype(dtype).type)
        if num_actions:
            self.action_space = spaces.Discrete(num_actions, start=start)

    def _observation(self):
        labels = np.array([self.start, self.t])
        if self.kind == "dict":
            return {"a": {"x": np.float32(self.start), "y": labels}, "z": self.t % 3 - 1}
        return 2 + self.t % 4 if self.kind == "discrete" else labels

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.t = self.np_random.uniform(), 0
        self.length = np.inf if self.endless else 3 + int(self.np_random.integers(4))
        self.log.append(("reset", self._observation()))
        return self._observation(), {}

    def step(self, action):
        assert self.t < self.length, "stepped after its end"
        self.log.append(("step", action))
        self.t += 1
        return self._observation(), self.start + 0.1 * float(np.sum(action)), self.t == self.length, False, {}


gymnasium.register("stitch-test/Echo-v0", entry_point=f"{__name__}:Echo", max_episode_steps=5)
gymnasium.register("stitch-test/EchoWithoutLimit-v0", entry_point=f"{__name__}:Echo")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty Minari root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    Echo.log.clear()
    return tmp_path


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


def stack(samples):
    if isinstance(samples[0], dict):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def edit_metadata(root, **changes):
    path = root / NAME / "data" / "metadata.json"
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


def test_terminal_inside_an_episode_is_kept():
    write([episode(0, 4, None, terminations=np.array([False, True, False, False]))])
    data, _ = load_dataset(NAME)
    np.testing.assert_array_equal(data.terminal, [0, 1, 0, 0])
    np.testing.assert_array_equal(data.next_obs, labels(0, 5)[1:])


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
    timeout = episode(1, 2, "timeout", rewards=np.array([8.0, 16.0]))
    inside = episode(2, 3, None, rewards=np.array([1.0, 2.0, 4.0]), terminations=np.array([False, True, False]))
    write([first, timeout, inside])
    data, _ = load_dataset(NAME, columns=("return_to_go",), discount=0.5)
    # 1 + 2/2 + 4/4; 8 + 16/2, with nothing for what would have followed the time-out; a terminal row ends the sum too
    np.testing.assert_array_equal(data.return_to_go, [3, 4, 4, 16, 16, 2, 2, 4])
    assert data.return_to_go.dtype == np.float32
    data, _ = load_dataset(NAME, columns=("return_to_go",), discount=1.0, reward_shift=-1)  # of the shifted rewards
    np.testing.assert_array_equal(data.return_to_go, [4, 4, 3, 22, 15, 1, 1, 3])


def test_episode_without_a_step_is_no_episode(root):
    """A collector that is closed after a reset leaves one: it has no row, and no return to be the best of."""
    write([episode(k, 2) for k in range(3)])
    with h5py.File(root / NAME / "data" / "main_data.hdf5", "a") as file:
        for field, size in {"observations": 1, "actions": 0, "rewards": 0, "terminations": 0, "truncations": 0}.items():
            file["episode_1"][field].resize(size, axis=0)
    data, _ = load_dataset(NAME, columns=("episode", "next_action"))
    np.testing.assert_array_equal(data.obs[:, 0], [0, 0, 2, 2])
    np.testing.assert_array_equal(data.next_obs[:, 1], [1, 2, 1, 2])
    np.testing.assert_array_equal(data.episode, [0, 0, 1, 1])
    np.testing.assert_array_equal(unscale(data.next_action)[:, 1], [1, 1, 1, 1])


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
    assert np.isfinite(env.evaluate(zeros, [0], 1).returns).all()


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
    assert "stitch/pointmaze-umaze-v0" in text and "minari list remote" in text
    assert "a similar name (stitch/pointmaze-umaze-v0" in message("stitch/pointmaze-umase-v0")
    assert "similar" not in message("quite/different-v3")


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
    assert "remove it" in message("mujoco/hopper/medium-v0")


def truncate(folder):
    file = folder / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lose_an_episode(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_1"]


def lose_a_field(folder):
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        del file["episode_1"]["rewards"]


def break_spaces(folder):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"observation_space": '{"type": "Bax"}'}))


def narrow_the_space(folder):
    path = folder / "metadata.json"
    space = '{"type": "Box", "dtype": "float64", "shape": [1], "low": [0], "high": [1]}'
    path.write_text(json.dumps(json.loads(path.read_text()) | {"observation_space": space}))


def come_from_the_future(folder):
    path = folder / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"minari_version": "99.0.0"}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        lose_an_episode,
        lose_a_field,
        break_spaces,
        narrow_the_space,
        come_from_the_future,
        lambda folder: (folder / "main_data.hdf5").write_bytes(b""),
        lambda folder: (folder / "main_data.hdf5").unlink(),
        lambda folder: (folder / "metadata.json").unlink(),
        lambda folder: (folder / "metadata.json").write_text("{"),
        lambda folder: (folder / "metadata.json").write_text("{}"),
    ],
    ids="truncated episode field spaces width version empty-file no-file no-metadata bad-json no-keys".split(),
)
def test_damaged_file(root, damage):
    write([episode(k, 50) for k in range(2)])
    damage(root / NAME / "data")
    text = message()
    assert "cannot be read" in text and str(root / NAME) in text and "remove it" in text


@pytest.mark.parametrize(
    "changes, numbers",
    [
        ({"observations": labels(0, 3)}, "3 observations, 3 actions and 3 terminations for 3 rewards"),
        ({"actions": labels(0, 4)}, "4 observations, 4 actions"),
        ({"terminations": np.zeros(2, bool)}, "2 terminations"),
    ],
)
def test_fields_that_do_not_fit_together(changes, numbers):
    write([episode(0, 3, **changes)])
    assert numbers in message()


@pytest.mark.parametrize(
    "changes, kwargs",
    [
        ({"actions": np.array([0, 3, 1])}, {"action_space": spaces.Discrete(3)}),
        ({"actions": np.array([0, 1, 2])}, {"action_space": spaces.Discrete(3, start=1)}),
        ({"observations": np.array([2, 6, 3, 2])}, {"observation_space": OBSERVATIONS["discrete"]}),
        ({"observations": np.array([2, 1, 3, 2])}, {"observation_space": OBSERVATIONS["discrete"]}),
    ],
)
def test_elements_outside_a_discrete_space(changes, kwargs):
    """JAX clamps an index that is too large, and NumPy counts a negative one from the end: nobody would notice."""
    write([episode(0, 3, **changes)], **kwargs)
    assert "is not in Discrete" in message()


def test_missing_reader_of_the_format(root, monkeypatch):
    write([episode(0, 2)])
    monkeypatch.setattr(minari, "load_dataset", raises(ImportError('pip install "minari[arrow]"')))
    text = message()
    assert "package that is missing" in text and "minari[arrow]" in text


@pytest.mark.parametrize("field, value", [("observations", np.nan), ("actions", np.inf), ("rewards", -np.inf)])
def test_not_finite(field, value):
    broken = episode(1, 4)
    array = getattr(broken, field)
    array.reshape(len(array), -1)[1:3, 0] = value
    write([episode(0, 4), broken])
    text = message()
    assert f"(2 in {field})" in text  # and not in the others
    assert message() == text  # from the cache too


def test_every_field_that_is_not_finite_is_named():
    write([episode(0, 1, observations=np.full((2, 2), np.nan), rewards=np.array([np.inf]))])
    assert "(4 in observations, 1 in rewards)" in message()


def test_empty_dataset():
    write([])
    assert "no transitions" in message()


@pytest.mark.parametrize(
    "space, sample",
    [
        (spaces.MultiDiscrete([2, 3]), np.zeros((2, 2), int)),
        (spaces.MultiBinary(2), np.zeros((2, 2), np.int8)),
        (spaces.Box(-np.inf, np.inf, (2,)), np.zeros((2, 2), np.float32)),
        (spaces.Box(-1, 1, (2, 2)), np.zeros((2, 2, 2), np.float32)),
        (spaces.Box(-128, 127, (2,), np.int8), np.zeros((2, 2), np.int8)),
        (spaces.Dict({"a": spaces.Discrete(2)}), {"a": np.zeros(2, int)}),
    ],
)
def test_unsupported_action_space(space, sample):
    write([episode(0, 2, actions=sample)], action_space=space)
    text = message()
    assert text.startswith("Actions must be") and " ".join(str(space).split()) in text


IMAGE = spaces.Box(0, 255, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    "space, sample, named",
    [
        (spaces.MultiBinary(2), np.zeros((3, 2), np.int8), "MultiBinary(2)"),
        (spaces.Tuple([LABELS]), (np.zeros((3, 2)),), "Tuple"),
        (IMAGE, np.zeros((3, 40, 40, 3), np.uint8), "(40, 40, 3)"),
        (spaces.Dict({"a": spaces.MultiDiscrete([2])}), {"a": np.zeros((3, 1), int)}, "MultiDiscrete([2])"),
    ],
)
def test_unsupported_observation_space(space, sample, named):
    write([episode(0, 2, observations=sample)], observation_space=space)
    text = message()
    assert text.startswith("Observations must be") and named in text


def test_normalize_reward_of_equal_returns():
    write([episode(k, 2, rewards=np.ones(2)) for k in range(2)])
    assert "normalize_reward" in message(normalize_reward=True)


def test_a_script_ends_with_the_sentence_and_status_1(root):
    code = "from common.datasets import load_dataset; load_dataset('hopper')"
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "MINARI_DATASETS_PATH": str(root)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert run.returncode == 1
    assert run.stderr.startswith("hopper is not a dataset name") and run.stderr.count("\n") == 1


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
