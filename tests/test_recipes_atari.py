"""Atari: the script and its dataset of Pong, and Minari's atari/*, whose images are large and in colours."""

import contextlib
import itertools
import json
import pathlib
import re
import sys

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from screens import Screens  # registers stitch-test/Screens-v0

from common import recipes
from common.datasets import DatasetError, load_dataset
from common.environments import Interface
from common.layouts import describe, grey
from common.recipes import atari, storage

pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Minari's, of missing authors and descriptions
]
NAME = "atari/screens/expert-v0"
COLOURS = (210, 160, 3)


@pytest.fixture
def emulator():
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")


def start(seed, j):
    """The seed of episode j of an evaluation of the run `seed`."""
    return int(np.random.SeedSequence((seed, j)).generate_state(1)[0])


# --- Minari's atari/* ----------------------------------------------------------------------------------------


def test_grey_images_by_hand():
    """Two rows become one, and three columns two: of the first, one and a half are in the first new column."""
    image = np.zeros((2, 3, 3), np.uint8)
    image[0] = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    r, g, b = 255 * 0.2125, 255 * 0.7154, 255 * 0.0721  # of the first row; the second is black
    expected = [[(r + g / 2) / 1.5 / 2, (g / 2 + b) / 1.5 / 2]]
    found = grey(np.stack([image, 0 * image, 0 * image + 255]), (1, 2))
    assert found.dtype == np.uint8 and found.shape == (3, 1, 2, 1)
    np.testing.assert_array_equal(found[..., 0], [np.rint(expected), [[0, 0]], [[255, 255]]])
    assert grey(image, (2, 3)).shape == (2, 3, 1)
    images = np.random.default_rng(0).integers(256, size=(2, 3, *COLOURS), dtype=np.uint8)
    np.testing.assert_array_equal(grey(images, (84, 84))[1, 2], grey(images[1, 2], (84, 84)))


def test_grey_images_are_gymnasium_s():
    """Of the wrappers through which the policies of Minari's data saw. Both cut off what follows the point."""
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=COLOURS, dtype=np.uint8).repeat(7, axis=0)[: COLOURS[0]]

    class Still(gymnasium.Env):
        observation_space, action_space = spaces.Box(0, 255, COLOURS, np.uint8), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return image, {}

    env = gymnasium.wrappers.GrayscaleObservation(gymnasium.wrappers.ResizeObservation(Still(), (84, 84)))
    theirs = env.reset()[0].astype(int)
    difference = grey(image, (84, 84))[..., 0] - theirs
    assert np.ptp(theirs) > 50 and difference.min() >= -1 and difference.max() <= 2


def record(shape=COLOURS, name=NAME, frame_stack=None):
    """Two episodes as an evaluation of seed 0 begins them, in Minari's layout but for the loss of a JPEG."""
    env = gymnasium.make("stitch-test/Screens-v0", shape=list(shape), disable_env_checker=True)
    plays, episodes = ((0, 1, 2), (2, 2, 1)), []
    for j, actions in enumerate(plays):
        images, steps = [env.unwrapped.reset(seed=start(0, j))[0]], []
        for action in actions:
            image, *step, _ = env.unwrapped.step(action)
            images, steps = [*images, image], [*steps, step]
        rewards, terminations, truncations = map(np.array, zip(*steps, strict=True))
        flags = {"terminations": terminations, "truncations": truncations}
        columns = {"observations": np.stack(images), "actions": np.array(actions), "rewards": rewards, **flags}
        episodes.append(EpisodeBuffer(**columns))
    folder = minari.storage.get_dataset_path(name) / "data"
    folder.parent.mkdir(parents=True)
    about = {"algorithm_name": "", "code_permalink": "", "description": ""}
    about |= {"frame_stack": frame_stack} if frame_stack else {}
    storage.write(name, folder, episodes, env, env, None, **about)
    return plays, [episode.observations for episode in episodes]


def test_colours_become_small_grey_stacks_in_data_environment_and_a_policy_s_hands(root):
    """Row t of the data is what the policy sees at step t of that episode, bit for bit; a restored one, too."""
    plays, images = record()
    for _ in range(2):  # as read, and from the cache
        data, env = load_dataset(NAME, images=True)
        assert data.frames.shape == (8, 84, 84, 1) and data.frames.dtype == np.uint8
        np.testing.assert_array_equal(data.frames, grey(np.concatenate(images), (84, 84)))
    assert env.spec.obs_shape == (84, 84, 4) and env.spec.obs_high == 255 and env.spec.action_dim == 3
    rows, seen = data.take(np.arange(6)), []

    def policy(obs, step, *_):
        seen.append(obs.copy())
        return np.array(plays)[None, :, min(step, 2)], None

    env.num_workers = 1
    played = env.evaluate(policy, [0], 2)
    assert env.score_kind == "raw return"
    np.testing.assert_array_equal(played.returns, [[3, 5]])
    np.testing.assert_array_equal(np.stack(seen, axis=2).reshape(6, 84, 84, 4), rows.obs)
    first = grey(images[1][0], (84, 84))
    np.testing.assert_array_equal(rows.obs[3], np.concatenate([first] * 4, axis=-1))  # repeated, not black
    # A policy that acts without the dataset, on what the environment shows
    interface, given, episode = Interface(*json.loads(json.dumps(env.interface))), [], None
    act = lambda obs, *_: (given.append(obs[0, 0]), (np.zeros((1, 1), int), None))[1]  # noqa: E731
    for t, image in enumerate(images[1][:3]):
        _, episode = interface.act(act, image, None if t == 0 else 0.0, episode)
    np.testing.assert_array_equal(given, rows.obs[3:])


def test_a_cache_of_large_images_is_not_taken_for_small_ones(root):
    """As where a folder was loaded under another name, and then copied."""
    record(name="mine/screens-v0")
    assert load_dataset("mine/screens-v0", images=True)[0].frames.shape == (8, *COLOURS)
    (root / "atari" / "screens").mkdir(parents=True)
    (root / "mine" / "screens-v0").rename(root / NAME)  # files keep their size and time of change
    assert (root / NAME / "data" / "stitch-cache.npz").exists()
    assert load_dataset(NAME, images=True)[0].frames.shape == (8, 84, 84, 1)


@pytest.mark.parametrize(
    "shape, name, frame_stack, expected",
    [
        (COLOURS, "mine/screens-v0", None, COLOURS),  # another's images of that size are what they are
        ((84, 84), NAME, None, (84, 84, 4)),  # grey ones are kept
        ((250, 160, 3), NAME, None, (84, 84, 4)),  # as some games have them
        (COLOURS, NAME, {"frames": 2, "padding": "zero"}, (84, 84, 2)),  # what a file says counts
    ],
)
def test_which_images_become_grey(shape, name, frame_stack, expected):
    record(shape, name, frame_stack)
    data, env = load_dataset(name, images=True)
    assert env.spec.obs_shape == expected and env.probe()
    if frame_stack:
        assert not data.take(np.array([3])).obs[..., 0].any()


def test_images_that_are_not_what_atari_declares(root):
    import h5py

    record()
    with h5py.File(root / NAME / "data" / "main_data.hdf5", "a") as file:
        old = file["episode_1"]["observations"][:]
        del file["episode_1"]["observations"]
        file["episode_1"]["observations"] = old[:, ::2]
    wrong = r"the shape \(4, 105, 160, 3\) where \(4, 210, 160, 3\) is declared"
    with pytest.raises(DatasetError, match=wrong) as error:
        load_dataset(NAME, images=True)
    assert "\n" not in str(error.value)
    observation, _ = describe(Screens(shape=COLOURS).observation_space, spaces.Discrete(3), atari=True)
    interface = Interface(observation, {"n": 3, "start": 0}, [], [])
    for wrong in (np.zeros((84, 84), np.uint8), np.zeros(COLOURS, np.float32)):
        with pytest.raises(ValueError, match=r"as uint8 \(210, 160, 3\), not"):
            interface.observe(wrong)


def test_a_dataset_as_minari_s_own_script_records_it(emulator):
    """Raw images of the emulator as JPEGs, 4 frames a step without their maximum, and no sticky actions."""
    import ale_py

    gymnasium.register_envs(ale_py)
    env = gymnasium.make("ALE/Pong-v5", repeat_action_probability=0, max_episode_steps=40)
    env = minari.DataCollector(env)
    seeds, raw = [start(0, j) for j in range(2)], []
    for seed in seeds:
        images, ended = [env.reset(seed=seed)[0]], False
        while not ended:
            image, _, terminated, truncated, _ = env.step(len(images) % 6)
            images, ended = [*images, image], terminated or truncated
        raw += images
    env.create_dataset("atari/pong/expert-v0", requirements=["gymnasium[atari]"])
    env.close()
    data, env = load_dataset("atari/pong/expert-v0", images=True)
    assert data.frames.shape == (82, 84, 84, 1) and env.spec.obs_shape == (84, 84, 4) and env.spec.action_dim == 6
    exact = grey(np.stack(raw), (84, 84)).astype(int)
    assert np.abs(data.frames - exact).mean() < 2  # a JPEG has a loss
    assert not data.terminal.any() and env.probe() and env._limit == 40
    seen, env.num_workers = [], 1

    def policy(obs, step, *_):
        seen.append(obs[0, 0, ..., -1].copy())
        return np.full((1, 2), (step + 1) % 6), None

    env.evaluate(policy, [0], 2)
    np.testing.assert_array_equal(seen, exact[:40, ..., 0])  # an environment of the same kind


# --- The script ----------------------------------------------------------------------------------------------


def test_where_the_ball_arrives():
    """In 10 steps from 88 to 188. From 100, 6 down a step leads to 160; 15 down to 250, which is 45 beyond the wall at
    205; 30 up to -200, 245 above the wall at 45, of which 160 lead down to the other one and 85 up again."""
    assert atari.arrival(88, 100, 10, 6) == 160 and atari.arrival(88, 100, 10, 0) == 100
    assert atari.arrival(88, 100, 10, 15) == 205 - 45 and atari.arrival(88, 100, 10, -30) == 205 - 85
    assert atari.arrival(190, 100, 4, 8) == 100  # it is there


def test_the_script_steers():
    """Its place is 5 above the ball's: the paddle's middle. What slides there by itself is not pushed."""
    still = lambda ball, paddle: atari.steer((*ball, paddle), (ball[0] - 4, ball[1], paddle))  # noqa: E731
    assert [still((100, 100), paddle) for paddle in (90, 95, 100)] == [atari.DOWN, atari.STAY, atari.UP]
    slides = atari.steer((100, 100, 85), (96, 100, 75))
    assert (slides, atari.steer((100, 100, 85), (96, 100, 85))) == (atari.STAY, atari.DOWN)
    leaves = atari.steer((100, 60, 150), (104, 50, 150))  # it follows the ball's height, wherever it will arrive
    assert leaves == atari.UP
    assert atari.steer((0, 0, 125), (0, 0, 125)) == atari.STAY  # in the middle, where there is no ball


def test_the_script_plays_the_game_that_it_reads(emulator):
    """Without random actions it gives away few of the first points, which random ones lose; the addresses are right."""
    points = {}
    for noise in (0.0, 1.0):
        with pytest.MonkeyPatch.context() as patch:
            game = gymnasium.make(atari.spec(), max_episode_steps=700)
            patch.setattr(atari, "simulator", lambda game=game: game)
            points[noise] = atari.rollout(noise, (1, 0)).rewards.sum()
    assert points[0.0] > points[1.0] + 8


# --- Its dataset ---------------------------------------------------------------------------------------------


def test_a_small_dataset(emulator, root, capsys):
    name = "stitch/atari-pong-scripted-1k-v0"
    recipes.build(name)
    data, env = load_dataset(name, images=True, columns=("start",))
    n = len(data.reward)
    assert n == 1000 and env.spec.obs_shape == (84, 84, 4) and env.spec.action_dim == 6
    assert data.frames.shape == (n + int(data.start.sum()) + 1, 84, 84, 1) and data.frames.dtype == np.uint8
    assert env.probe() and env._limit == atari.STEPS == 27_000
    np.testing.assert_allclose(env.score(np.array(atari.REFERENCES)), [0, 100])
    assert {-1, 0} <= set(data.reward.tolist()) <= {-1, 0, 1}
    assert set(np.unique(data.action)) == set(range(6)) and not data.terminal.any()  # cut at the size that was asked

    # The same episode again: images, rewards and stacks are the environment's, and most actions the script's
    episode, agree = minari.load_dataset(name)[0], 0
    game = gymnasium.wrappers.FrameStackObservation(gymnasium.make(atari.spec()), 4, padding_type="zero")
    (about,) = minari.load_dataset(name).storage.get_episode_metadata([0])
    obs, _ = game.reset(seed=about["seed"])
    now = before = atari.read(game)
    batch = data.take(np.arange(300))
    for t in range(300):
        np.testing.assert_array_equal(batch.obs[t], np.moveaxis(obs, 0, -1))
        agree += atari.steer(now, before) == episode.actions[t]
        obs, reward, *_ = game.step(int(episode.actions[t]))
        now, before = atari.read(game), now
        assert reward == data.reward[t]
        np.testing.assert_array_equal(batch.next_obs[t], np.moveaxis(obs, 0, -1))
    assert abs(agree / 300 - (1 - atari.NOISE * 5 / 6)) < 0.08

    # What the lines of the page count: a frame for each row, 20 bytes of window and 12 of columns; or 8 frames and 12
    page = (pathlib.Path(__file__).parents[1] / "benchmarks" / "images.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.S)
    capsys.readouterr()
    exec(block.replace("stitch/atari-pong-scripted-v0", name), {})
    sizes = data.frames.nbytes / n + 32, 8 * 84 * 84 + 12
    assert capsys.readouterr().out.split()[-2:] == [f"{size / 1e3:.1f}" for size in sizes] == ["7.1", "56.5"]

    first = data.frames.copy()
    (root / name).rename(root / "old")
    recipes.build(name)
    np.testing.assert_array_equal(load_dataset(name, images=True)[0].frames, first)  # the same bits again


def test_episodes_are_written_one_by_one(monkeypatch, tmp_path):
    """A million images are never in a list: each episode is played when it is asked for."""
    played, spaces_of = [], Screens(shape=(84, 84))

    def play(noise, seed):
        played.append(seed)
        ones = np.ones(600)
        return atari.rollouts.Episode(np.zeros((601, 84, 84), np.uint8), ones.astype(int), ones, True, 0)

    def write(dataset_id, path, episodes, *_, **__):
        assert not played
        assert [len(episode) for episode in itertools.islice(episodes, 2)] == [600, 400] and len(played) == 2

    monkeypatch.setattr(atari, "rollout", play)
    monkeypatch.setattr(atari, "simulator", lambda: spaces_of)
    monkeypatch.setattr(storage, "write", write)
    monkeypatch.setattr(atari.rollouts, "processes", lambda number: contextlib.nullcontext(map))
    atari.scripted("stitch/atari-pong-scripted-1k-v0", tmp_path, 1000)


def test_a_step_is_four_frames_and_an_environment_that_would_make_16_of_them_is_not_scored(emulator, root):
    env = gymnasium.make(atari.spec())
    machine = env.unwrapped.ale
    env.reset(seed=3)
    frames = [machine.getEpisodeFrameNumber()]
    for _ in range(3):
        env.step(0)
        frames.append(machine.getEpisodeFrameNumber())
    assert frames == [0, 4, 8, 12]  # from the first one: no no-ops
    settings = [machine.getFloat("repeat_action_probability"), machine.getInt("max_num_frames_per_episode")]
    assert settings == [0.25, 108_000]
    # An emulator that repeats actions, within AtariPreprocessing, which repeats them too
    record((84, 84), "mine/screens-v0")
    spec = atari.spec()
    spec.entry_point, spec.kwargs = "ale_py.env:AtariEnv", {"game": "pong", "frameskip": 4}
    spec.additional_wrappers = (gymnasium.wrappers.AtariPreprocessing.wrapper_spec(noop_max=0, frame_skip=4),)
    path = root / "mine/screens-v0" / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_env_spec": spec.to_json()}))
    _, env = load_dataset("mine/screens-v0", images=True)
    assert not env.probe() and "Disable frame-skipping in the original env" in env.score_kind


@pytest.mark.parametrize("package", ["ale_py", "cv2"])
def test_without_a_package_one_sentence_says_how_to_get_it(monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    atari.simulator.cache_clear()
    says = r"needs a package that is missing .* pip install -e '\.\[atari\]'\."
    with pytest.raises(DatasetError, match=says) as error:
        load_dataset("stitch/atari-pong-scripted-1k-v0", images=True)
    assert "\n" not in str(error.value)


def test_it_can_be_drawn(emulator):
    env = gymnasium.make(atari.spec(), render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == COLOURS and picture.dtype == np.uint8 and picture.max() > 100


def test_the_page_has_the_bytes_of_the_card_s_data():
    """An image for each row and one more for each episode, and a black one; 20 bytes of window, 12 of columns."""
    folder = pathlib.Path(__file__).parents[1] / "benchmarks"
    card = (folder / "cards" / "atari-pong-scripted-v0.md").read_text()
    episodes, n = map(int, re.search(r"(\d+) episodes, ([\d,]+) transitions", card.replace(",000", "000")).groups())
    size = (n + episodes + 1) * 84 * 84 + n * (20 + 12)
    text = " ".join((folder / "images.md").read_text().split())
    assert f"{n:,} rows in {episodes} episodes take {size / 1e6:.1f} MB as frames, {size / n / 1e3:.1f} GB" in text
    stacks = [k * 84 * 84 + 12 for k in (8, 4)]
    assert "takes {:.1f} GB, and {:.1f} GB with one stack".format(*(x / 1e3 for x in stacks)) in text
