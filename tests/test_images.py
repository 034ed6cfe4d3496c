"""Images: kept once, in bytes; rows that see several of their episode and of no other; encoders; what is refused."""

import dataclasses
import importlib
import json
import pathlib
import re
import types

import chex
import flax.linen as nn
import gymnasium
import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer
from screens import SHAPE, Screens

from common import layouts
from common.datasets import DatasetError, Transition, load_dataset
from common.environments import Interface, Spec
from common.layouts import fold, sizes, windows
from common.networks import (
    ENCODERS,
    MLP,
    CategoricalActor,
    Critic,
    DeterministicActor,
    DiscreteCritic,
    Encoder,
    GaussianActor,
    Value,
    image_encoder,
    random_shift,
)
from common.recipes import storage

pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Minari's, of missing authors and descriptions
]
NAME = "test/screens-v0"
TAKE_IMAGES = ["bc", "dqn", "cql_discrete", "bcq_discrete", "iql", "awac", "crr"]
SHIFT = ["bc", "iql"]


def start(seed, j):
    """The seed of episode j of an evaluation of the run `seed`."""
    return int(np.random.SeedSequence((seed, j)).generate_state(1)[0])


def play(env, seed, actions):
    frames, rewards, ended = [env.reset(seed=seed)[0]], [], []
    for action in actions:
        frame, reward, terminated, _, _ = env.step(action)
        frames, rewards, ended = [*frames, frame], [*rewards, reward], [*ended, terminated]
    return EpisodeBuffer(
        observations=np.stack(frames),
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.array(ended),
        truncations=np.zeros(len(actions), bool),
    )


def record(root, plays=((0, 1, 2), (2, 2)), frame_stack=None, env=None, **kwargs):
    """Episode j begins as that of an evaluation of seed 0, and plays these actions."""
    env = env or gymnasium.make("stitch-test/Screens-v0", disable_env_checker=True, **kwargs)
    episodes = [play(env.unwrapped, start(0, j), actions) for j, actions in enumerate(plays)]
    write(env, episodes)
    if frame_stack:
        edit(root, frame_stack=frame_stack)
    return [episode.observations for episode in episodes]


def write(env, episodes):
    folder = data_path()
    folder.parent.mkdir(parents=True, exist_ok=True)
    storage.write(NAME, folder, episodes, env, env, None, algorithm_name="", code_permalink="", description="")


def data_path():
    from minari.storage import get_dataset_path

    return get_dataset_path(NAME) / "data"


def edit(root, **changes):
    path = root / NAME / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def message(**options):
    with pytest.raises(DatasetError) as error:
        load_dataset(NAME, **{"images": True, **options})
    text = str(error.value)
    assert "\n" not in text
    return text


# --- Rows ------------------------------------------------------------------------------------------------


def test_the_windows_of_a_toy():
    """Episodes of 3 and 2 rows have images 0 .. 3 and 4 .. 6; 7 is the black one."""
    repeat = [[0, 0, 0, 0, 1], [0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [4, 4, 4, 4, 5], [4, 4, 4, 5, 6]]
    zero = [[7, 7, 7, 0, 1], [7, 7, 0, 1, 2], [7, 0, 1, 2, 3], [7, 7, 7, 4, 5], [7, 7, 4, 5, 6]]
    for padding, expected in {"repeat": repeat, "zero": zero}.items():
        found = windows(np.array([3, 2]), 4, padding)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int32
    np.testing.assert_array_equal(windows(np.array([3, 2]), 1, "zero"), [[0, 1], [1, 2], [2, 3], [4, 5], [5, 6]])
    # Episodes of one row each, shorter than a stack: images 0, 1, then 2, 3, and 4 the black one
    np.testing.assert_array_equal(windows(np.array([1, 1]), 3, "repeat"), [[0, 0, 0, 1], [2, 2, 2, 3]])
    np.testing.assert_array_equal(windows(np.array([1, 1]), 3, "zero"), [[4, 4, 0, 1], [4, 4, 2, 3]])


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("padding", ["repeat", "zero"])
def test_no_window_leaves_its_episode(frames, padding):
    """Against a loop that keeps the last images as an environment does."""
    rng = np.random.default_rng(frames)
    for _ in range(20):
        lengths = rng.integers(1, 7, size=rng.integers(1, 6))
        black, number, expected = int(lengths.sum() + len(lengths)), 0, []
        for length in lengths:
            seen = [number if padding == "repeat" else black] * (frames - 1) + [number]
            for t in range(length):
                following = [*seen[1:], number + t + 1]
                expected.append([*seen, following[-1]])
                seen = following
            number += length + 1
        np.testing.assert_array_equal(windows(lengths, frames, padding), expected)


def test_a_stack_has_the_oldest_first_and_the_colours_of_an_image_together():
    images = np.arange(9).reshape(3, 1, 1, 3)  # three of one pixel with three colours
    np.testing.assert_array_equal(fold(images), np.arange(9).reshape(1, 1, 9))
    np.testing.assert_array_equal(fold(jnp.asarray(images)), fold(images))
    high = np.random.default_rng(0).integers(256, size=(2, 4, 5, 6, 3))
    for k in range(4):
        np.testing.assert_array_equal(fold(high)[..., 3 * k : 3 * k + 3], high[:, k])


@pytest.mark.parametrize("padding", ["repeat", "zero"])
def test_data_and_environment_show_the_same(root, padding):
    """Row t of the data is what the policy sees at step t of that very episode, bit for bit; a restored one, too."""
    plays = ((0, 1, 2), (2, 2, 1))
    record(root, plays, {"frames": 3, "padding": padding})
    data, env = load_dataset(NAME, images=True)
    rows = jax.jit(lambda data: data.take(jnp.arange(6)))(data)
    seen = []

    def policy(obs, step, *_):
        seen.append(obs.copy())
        return np.array(plays)[None, :, min(step, 2)], None

    env.num_workers = 1
    played = env.evaluate(policy, [0], 2)
    np.testing.assert_array_equal(played.returns, [[3, 5]])
    seen = np.stack(seen, axis=2).reshape(6, 12, 11, 6)  # (episodes, steps) as rows
    np.testing.assert_array_equal(rows.obs, seen)
    assert seen.dtype == rows.obs.dtype == played.obs.dtype == np.uint8
    np.testing.assert_array_equal(played.obs[0], seen[::3])
    # What follows a row is the next row, and after the last one the last image of the recording
    np.testing.assert_array_equal(rows.next_obs[:2], rows.obs[1:3])
    last = minari.load_dataset(NAME)[0].observations[-1]
    np.testing.assert_array_equal(rows.next_obs[2][..., -2:], last)
    np.testing.assert_array_equal(rows.next_obs[2][..., :-2], rows.obs[2][..., 2:])
    # A policy that acts without the dataset, on single images
    interface, given, episode = Interface(*json.loads(json.dumps(env.interface))), [], None
    act = lambda obs, *_: (given.append(obs[0, 0]), (np.zeros((1, 1), int), None))[1]  # noqa: E731
    for t, image in enumerate(minari.load_dataset(NAME)[1].observations[:3]):
        action, episode = interface.act(act, image, None if t == 0 else 0.0, episode)
        assert action == 0
    interface.act(act, minari.load_dataset(NAME)[1].observations[0], None, episode)  # another episode
    np.testing.assert_array_equal(given, rows.obs[np.array([3, 4, 5, 3])])


def test_before_the_first_image_stands_what_the_metadata_say(root):
    frames = record(root, frame_stack={"frames": 2, "padding": "zero"})
    zero = load_dataset(NAME, images=True)[0].take(np.arange(5)).obs
    edit(root, frame_stack={"frames": 2, "padding": "repeat"})
    repeat = load_dataset(NAME, images=True)[0].take(np.arange(5)).obs
    for row, j in ((0, 0), (3, 1)):
        assert not zero[row][..., :2].any() and np.array_equal(repeat[row][..., :2], frames[j][0])
        assert np.array_equal(zero[row][..., 2:], frames[j][0])
    np.testing.assert_array_equal(zero[[1, 2, 4]], repeat[[1, 2, 4]])


def test_images_are_kept_once_in_bytes(root):
    """The bytes of a dataset: an image for each row and one more for each episode, and the numbers of the rows."""
    record(root, plays=((0,) * 3,) * 40, frame_stack={"frames": 4, "padding": "zero"})
    data, env = load_dataset(NAME, images=True)
    n, images = 120, 160 + 1  # and the black one
    on_device = jax.device_put(data)
    assert on_device.frames.dtype == jnp.uint8 and on_device.frames.shape == (images, *SHAPE)
    size = sum(x.nbytes for x in jax.tree.leaves(on_device))
    assert size == images * 12 * 11 * 2 + n * (4 * (4 + 1) + 3 * 4)  # window; action, reward, terminal
    batch = jax.eval_shape(lambda d: d.take(jnp.zeros(7, int)), on_device)
    assert batch.obs.shape == batch.next_obs.shape == (7, 12, 11, 8) and batch.obs.dtype == jnp.uint8
    assert (batch.frames, batch.window) == (None, None)
    assert env.spec == Spec(12 * 11 * 8, 3, True, obs_shape=(12, 11, 8), obs_high=255)
    assert all(x.ctypes.data % 64 == 0 for x in jax.tree.leaves(data))


def test_images_are_read_as_they_were_and_again_from_the_cache(root):
    """Of 40 x 40 and more Minari would make JPEGs, which lose a part."""
    frames = record(root, shape=(40, 44, 3))
    for _ in range(2):
        data, env = load_dataset(NAME, images=True)
        np.testing.assert_array_equal(data.frames, np.concatenate(frames))
        assert data.obs is None and data.next_obs is None
        fingerprint = env.fingerprint
    assert (root / NAME / "data" / "stitch-cache.npz").exists() and fingerprint["obs_dim"] == 40 * 44 * 3
    assert load_dataset(NAME, images=True)[1].fingerprint == fingerprint
    edit(root, frame_stack={"frames": 2, "padding": "zero"})  # a policy of other stacks is of other data
    assert load_dataset(NAME, images=True)[1].fingerprint != fingerprint


def test_grey_images_and_images_of_few_numbers(root):
    frames = record(root, shape=(12, 11), high=1)
    data, env = load_dataset(NAME, images=True)
    np.testing.assert_array_equal(data.frames[..., 0], np.concatenate(frames))
    assert env.spec.obs_shape == (12, 11, 1) and env.spec.obs_high == 1
    assert env.probe()


def test_other_columns_and_a_part_of_the_rows(root):
    frames = record(root)
    data, _ = load_dataset(NAME, images=True, columns=("next_action", "episode", "timestep"))
    np.testing.assert_array_equal(data.timestep, [0, 1, 2, 0, 1])
    part = data.part(np.array([False, True, False, False, True]))
    assert len(part.reward) == 2 and part.frames is data.frames
    batch = part.take(np.array([1, 0]))
    np.testing.assert_array_equal(batch.obs, [frames[1][1], frames[0][1]])
    np.testing.assert_array_equal(batch.next_obs, [frames[1][2], frames[0][2]])
    np.testing.assert_array_equal(batch.action, [2, 1])


def test_rows_of_vectors_are_taken_as_ever():
    rng = np.random.default_rng(0)
    columns = [rng.standard_normal(x).astype(np.float32) for x in ((9, 3), (9, 2), 9, (9, 3), 9)]
    data, index = Transition(*columns, episode=np.arange(9)), np.array([4, 4, 0, 8])
    for xp in (data, jax.tree.map(jnp.asarray, data)):
        chex.assert_trees_all_equal(xp.take(index), jax.tree.map(lambda x: x[index], xp))
    text = [
        jax.jit(f).lower(data, index).as_text()
        for f in (lambda d, i: d.take(i), lambda d, i: jax.tree.map(lambda x: x[i], d))
    ]
    assert text[0] == text[1]  # the same program


# --- Networks ------------------------------------------------------------------------------------------------

STACK = Spec(10 * 10 * 4, 3, True, obs_shape=(10, 10, 4), obs_high=255)


def small(spec=STACK):
    return Encoder(((4, 3, 1),), float(spec.obs_high))


NETWORKS = {
    "mlp": (lambda e: MLP(3, (8,), encoder=e), ()),
    "categorical": (lambda e: CategoricalActor(3, (8,), encoder=e), ()),
    "gaussian": (lambda e: GaussianActor(2, (8,), encoder=e), ()),
    "deterministic": (lambda e: DeterministicActor(2, (8,), encoder=e), ()),
    "value": (lambda e: Value((8,), encoder=e), ()),
    "discrete critic": (lambda e: DiscreteCritic(3, 2, (8,), encoder=e), ()),
    "critic": (lambda e: Critic(2, (8,), encoder=e), (np.ones((5, 2), np.float32),)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_sees_every_image_of_its_row_and_of_no_other(name):
    make, rest = NETWORKS[name]
    images = np.random.default_rng(0).integers(256, size=(5, 10, 10, 4), dtype=np.uint8)
    network = make(small())
    params = network.init(jax.random.key(0), images, *rest)
    assert "encoder" in params["params"]
    apply = jax.jit(lambda x: jax.tree.leaves(network.apply(params, x, *rest))[0])
    critics = name in ("critic", "discrete critic")  # their first axis is another
    rows = (lambda x: np.moveaxis(x, 1, 0)) if critics else np.asarray
    before = rows(apply(images))
    for k in range(4):
        other = images.copy()
        other[2, :, :, k] ^= 255
        changed = [not np.array_equal(a, b) for a, b in zip(before, rows(apply(other)), strict=True)]
        assert changed == [False, False, True, False, False], k
    if critics:  # one encoder for both
        assert params["params"]["encoder"]["Conv_0"]["kernel"].shape == (3, 3, 4, 4)


def test_pixels_are_divided_once():
    """A kernel of ones over 8 x 8 x 4 inputs of 255 / 255 gives 256 everywhere: nothing is padded."""
    encoder, image = Encoder(((1, 8, 4),)), np.full((1, 84, 84, 4), 255, np.uint8)
    params = {"params": {"Conv_0": {"kernel": np.ones((8, 8, 4, 1)), "bias": np.zeros(1)}}}
    out = encoder.apply(params, image)
    assert out.shape == (1, 20 * 20) and np.all(out == 256)
    one = Encoder(((1, 8, 4),), 1.0).apply(params, np.ones((1, 84, 84, 4), np.uint8))  # bits are not divided by 255
    np.testing.assert_array_equal(one, out)


@pytest.mark.parametrize(
    "name, shape, hidden, outputs, count",
    [  # numbers of parameters of MinAtar's own DQN and of Nature's, from their layers
        ("minatar", (10, 10, 4), 128, 6, 132_566),
        ("minatar", (10, 10, 6), 128, 6, 132_854),
        ("nature", (84, 84, 4), 512, 6, 1_687_206),
        ("nature", (84, 84, 4), 512, 200 * 6, 2_299_728),
    ],
)
def test_encoders_have_the_sizes_of_their_sources(name, shape, hidden, outputs, count):
    spec = Spec(1, 1, True, obs_shape=shape)
    network = MLP(outputs, (hidden,), "torch", encoder=image_encoder(name, spec))
    shapes = jax.eval_shape(lambda key: network.init(key, spec.zeros(1)), jax.random.key(0))
    assert sum(np.prod(x.shape) for x in jax.tree.leaves(shapes)) == count


def test_kernels_are_uniform_as_in_torch():
    params = Encoder(((64, 8, 4),)).init(jax.random.key(0), np.zeros((1, 36, 36, 4), np.uint8))["params"]["Conv_0"]
    for x in (params["kernel"], params["bias"]):
        assert 0.9 * 256**-0.5 < np.abs(x).max() <= 256**-0.5 and abs(np.mean(x)) < 0.02


@pytest.mark.parametrize("layers, shape", [(ENCODERS["minatar"], (10, 10, 4)), (ENCODERS["nature"], (44, 39, 2))])
def test_an_encoder_is_the_convolution_and_its_program_has_none(layers, shape):
    """Values and gradients against XLA's convolution, of sides that the steps do not divide. On a CPU the gradient of a
    kernel takes XLA's convolution a hundred times as long."""
    images = np.random.default_rng(0).integers(256, size=(3, *shape), dtype=np.uint8)
    encoder = Encoder(layers)
    params = encoder.init(jax.random.key(0), images)["params"]

    def expected(params):
        x = images / jnp.float32(255)
        for i, (_, _, step) in enumerate(layers):
            kernel, bias = params[f"Conv_{i}"]["kernel"], params[f"Conv_{i}"]["bias"]
            numbers = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, kernel, (step, step), "VALID", dimension_numbers=numbers)
            x = jnp.maximum(x + bias[None, None, None], 0)
        return x.reshape(3, -1)

    of = lambda f: jax.jit(lambda params: (f(params), jax.grad(lambda params: jnp.square(f(params)).sum())(params)))  # noqa: E731
    own = of(lambda params: encoder.apply({"params": params}, images))
    chex.assert_trees_all_close(own(params), of(expected)(params), rtol=2e-4, atol=1e-5)
    assert "stablehlo.convolution" not in own.lower(params).as_text()


def test_any_number_of_leading_axes():
    encoder, images = small(), np.random.default_rng(0).integers(256, size=(6, 10, 10, 4), dtype=np.uint8)
    params = encoder.init(jax.random.key(0), images)
    flat, deep = (encoder.apply(params, x) for x in (images, images.reshape(2, 3, 10, 10, 4)))
    np.testing.assert_allclose(deep.reshape(flat.shape), flat, rtol=1e-6)
    assert encoder.apply(params, images[0]).shape == flat[0].shape


def test_networks_of_vectors_are_as_ever():
    """Without an encoder there are no parameters of one, and the keys of the others are split as before."""
    obs = np.ones((1, 3), np.float32)
    for name, (make, _) in NETWORKS.items():
        rest = (np.ones((1, 2), np.float32),) if name == "critic" else ()
        params = make(None).init(jax.random.key(0), obs, *rest)["params"]
        assert "encoder" not in params
        inner = params if name == "mlp" else next(iter(x for key, x in params.items() if key != "log_std"))
        assert inner.keys() == {"Dense_0", "Dense_1"}
    assert image_encoder("identity", Spec(3, 2)) is None
    zeros = Spec(3, 2).zeros(1)
    assert zeros.dtype == np.float32 and zeros.shape == (1, 3)


# --- Random shift ----------------------------------------------------------------------------------------------


def moved(images, corners, pad):
    """By its definition, pixel by pixel: place (i, j) shows (i + row - pad, j + column - pad), or the nearest one."""
    out, (height, width) = np.empty_like(images), images.shape[1:3]
    for n, (row, column) in enumerate(corners):
        for i in range(height):
            for j in range(width):
                y, x = (min(max(k, 0), most - 1) for k, most in ((i + row - pad, height), (j + column - pad, width)))
                out[n, i, j] = images[n, y, x]
    return out


def corners_of(shifted, images, pad):
    """The only place from which each image can have come."""
    found = []
    for one, image in zip(shifted, images, strict=True):
        places = [(i, j) for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
        found.append([at for at in places if np.array_equal(moved(image[None], [at], pad)[0], one)])
    assert all(len(places) == 1 for places in found)
    return [places[0] for places in found]


def test_a_shift_of_one_pixel_by_hand():
    """All nine shifts of 0 1 2 / 3 4 5: what moves in from outside is the edge again, and never 0."""
    image = np.array([[10, 11, 12], [13, 14, 15]], np.uint8)[None, :, :, None]
    a, b, c = [10, 10, 11], [10, 11, 12], [11, 12, 12]  # the first row, moved to the right, not at all, to the left
    d, e, f = [13, 13, 14], [13, 14, 15], [14, 15, 15]
    expected = [[a, a], [b, b], [c, c], [a, d], [b, e], [c, f], [d, d], [e, e], [f, f]]
    seen = random_shift(jax.random.key(0), np.repeat(image, 400, axis=0), 1)
    assert seen.dtype == jnp.uint8 and seen.shape == (400, 2, 3, 1)
    counts = [sum(np.array_equal(x[..., 0], y) for x in np.asarray(seen)) for y in expected]
    assert sum(counts) == 400 and min(counts) > 20  # of 44 on average


@pytest.mark.parametrize("pad", [1, 2, 4])
def test_each_row_has_a_shift_of_its_own_for_all_images_of_its_stack(pad):
    images = np.random.default_rng(0).integers(1, 256, size=(9, 6, 5, 4), dtype=np.uint8)  # two of two channels
    shift = jax.jit(random_shift, static_argnums=2)
    seen = np.asarray(shift(jax.random.key(1), images, pad))
    corners = corners_of(seen, images, pad)
    np.testing.assert_array_equal(seen, moved(images, corners, pad))  # all channels alike
    assert seen.min() > 0 and len(set(corners)) > 3
    np.testing.assert_array_equal(seen, shift(jax.random.key(1), images, pad))
    assert corners_of(np.asarray(shift(jax.random.key(2), images, pad)), images, pad) != corners


def shifted_case(name, root):
    """(module, Config, data, environment, Agent) of a file on stacks of two images, shifted by at most two pixels."""
    record(root, plays=((0, 1, 2),) * 9, frame_stack={"frames": 2, "padding": "repeat"})
    algo, small = load(name), {"hidden": (8,), "batch_size": 8, "log_interval": 2, "eval_interval": 2, "num_updates": 2}
    cfg = algo.Config(dataset=NAME, encoder="minatar", random_shift=2, **small)
    data, env = algo.load_data(cfg)
    return algo, cfg, data, env, algo.make_agent(cfg, env.spec)


@pytest.mark.parametrize("name", SHIFT)
def test_a_batch_is_the_unshifted_one_moved_and_next_obs_apart(name, root):
    algo, cfg, data, _, _ = shifted_case(name, root)
    draw = lambda key, **changes: algo.draw(key, data, None, dataclasses.replace(cfg, **changes))  # noqa: E731
    places = []
    for key in map(jax.random.key, (5, 6)):
        plain, seen = draw(key, random_shift=None), draw(key)
        unmoved = {"obs": None} | ({"next_obs": None} if name == "iql" else {})  # bc has no use for next_obs
        chex.assert_trees_all_equal(seen._replace(**unmoved), plain._replace(**unmoved))  # the same rows
        assert seen.obs.dtype == jnp.uint8
        for column in unmoved:
            found = corners_of(*(np.asarray(getattr(x, column)) for x in (seen, plain)), 2)
            assert len(set(found)) > 3
            assert found not in places  # of another key, or of the other column
            places.append(found)


@pytest.mark.parametrize("name", SHIFT)
def test_what_acts_and_believes_is_never_shifted(name, root):
    """The programs are the same with and without; training's are not, and without it, it is as if there were none."""
    algo, cfg, data, env, agent = shifted_case(name, root)
    without = algo.make_agent(dataclasses.replace(cfg, random_shift=None), env.spec)
    state, obs, key = jax.jit(agent.init)(jax.random.key(0)), data.take(np.arange(5)).obs, jax.random.key(0)
    texts = [jax.jit(x.act).lower(state, obs, key).as_text() for x in (agent, without)]
    assert texts[0] == texts[1]
    if "q" in agent._fields:
        texts = [jax.jit(x.q).lower(state, obs, np.zeros(5, int)).as_text() for x in (agent, without)]
        assert texts[0] == texts[1]

    def train(cfg, draw=None):
        if draw:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(algo, "draw", draw)
                return jax.jit(algo.make_train(cfg, agent))(state, data)[0].actor.params
        return jax.jit(algo.make_train(cfg, agent))(state, data)[0].actor.params

    off = train(dataclasses.replace(cfg, random_shift=None))
    rows = lambda key, dataset, state, cfg: dataset.take(jax.random.randint(key, (8,), 0, len(dataset.reward)))  # noqa: E731
    chex.assert_trees_all_equal(off, train(cfg, rows))
    assert not np.array_equal(jax.tree.leaves(off)[0], jax.tree.leaves(train(cfg))[0])


@pytest.mark.parametrize("name", SHIFT)
def test_vectors_are_not_shifted_nor_images_by_more_than_they_have(name):
    algo = load(name)
    for spec, options, says in (
        (Spec(3, 4, True), {"random_shift": 4}, "vectors, which cannot be shifted: leave out --random-shift"),
        (STACK, {"random_shift": 0, "encoder": "minatar"}, "must be from 1 to 9 pixels for these images, not 0"),
        (STACK, {"random_shift": -1, "encoder": "minatar"}, "must be from 1 to 9 pixels for these images, not -1"),
        (STACK, {"random_shift": 10, "encoder": "minatar"}, "must be from 1 to 9 pixels for these images, not 10"),
    ):
        with pytest.raises(SystemExit, match=says) as error:
            algo.make_agent(algo.Config(**options), spec)
        assert "\n" not in str(error.value)
    algo.make_agent(algo.Config(random_shift=9, encoder="minatar"), STACK)
    for name in set(TAKE_IMAGES) - set(SHIFT):
        assert "random_shift" not in {field.name for field in dataclasses.fields(load(name).Config)}


# --- The files -----------------------------------------------------------------------------------------------


def load(name):
    return importlib.import_module(f"algos.{name}")


@pytest.mark.parametrize("name", TAKE_IMAGES)
def test_every_network_of_a_file_has_its_own_encoder_and_it_learns(name, root):
    """A few updates on stacks of three images, from the dataset on: each convolution moves, and pixels matter."""
    record(root, plays=((0, 1, 2),) * 9, frame_stack={"frames": 3, "padding": "zero"})
    algo = load(name)
    small = {"hidden": (8,), "batch_size": 16, "log_interval": 5, "eval_interval": 5, "num_updates": 5}
    cfg = algo.Config(dataset=NAME, encoder="minatar", **small)
    data, env = algo.load_data(cfg)
    agent = algo.make_agent(cfg, env.spec)
    state = jax.jit(agent.init)(jax.random.key(0))
    new, metrics = jax.jit(algo.make_train(cfg, agent))(state, data)
    assert all(np.isfinite(x) for x in metrics.values())

    def encoders(state):
        tree = {field: getattr(x, "params", x) for field, x in state._asdict().items() if field != "key"}
        found = [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        return {path: x for path, x in found if "encoder" in path}

    assert {path.split("'")[1] for path in encoders(state)} == set(state._fields) - {"key"}
    for path, x in encoders(state).items():
        assert np.any(x != encoders(new)[path]), path
    obs = data.take(np.arange(27)).obs
    act = jax.jit(agent.act)
    assert act(new, obs, jax.random.key(0)).shape == (27,)
    if "q" in agent._fields:
        values = [agent.q(new, x, np.zeros(27, int)) for x in (obs, obs[::-1])]
        assert not np.array_equal(*values)


@pytest.mark.parametrize("name", TAKE_IMAGES)
def test_images_without_an_encoder_and_vectors_with_one_are_refused(name):
    algo = load(name)
    for spec, encoder, says in (
        (STACK, "identity", "These observations are images: say --encoder nature"),
        (Spec(3, 4, True), "minatar", "These observations are vectors, which minatar cannot take: leave out --encoder"),
        (STACK, "nature", "Images of 10 x 10 are too small for the encoder nature: say --encoder minatar"),
    ):
        with pytest.raises(SystemExit, match=says) as error:
            algo.make_agent(algo.Config(encoder=encoder), spec)
        assert "\n" not in str(error.value)
    image_encoder("nature", STACK._replace(obs_shape=(36, 36, 4)))  # the smallest
    with pytest.raises(SystemExit):
        image_encoder("nature", STACK._replace(obs_shape=(35, 36, 4)))


def test_a_file_that_takes_vectors_refuses_images_before_anything_else(root):
    record(root)
    for name, options in (("td3_bc", {}), ("sac", {}), ("iql", {"online_steps": 10})):
        algo = load(name)
        with pytest.raises(DatasetError, match="has images as observations, which are not for .*--encoder") as error:
            algo.load_data(dataclasses.replace(algo.Config(), dataset=NAME, **options))
        assert "\n" not in str(error.value)
    assert "not for goals" in message(goals=True) and "not for normalize_obs" in message(normalize_obs=True)


def test_main_trains_and_restores_on_images(root, tmp_path):
    """From the folder to a policy that takes the environment's images."""
    frames = record(root, plays=((0, 1, 2),) * 9, frame_stack={"frames": 2, "padding": "repeat"})
    dqn = load("dqn")
    counts = {"num_updates": 2, "eval_interval": 2, "log_interval": 2, "eval_episodes": 2, "batch_size": 4}
    cfg = dqn.Config(NAME, encoder="minatar", hidden=(8,), num_seeds=2, out=str(tmp_path / "run"), **counts)
    summary = dqn.main(cfg)
    assert np.isfinite(summary["score_mean"]) and "diverged" in summary
    policy = dqn.restore(tmp_path / "run")
    assert policy.interface.spec.obs_shape == (12, 11, 4)
    assert policy(frames[0][0]) in (0, 1, 2)
    assert policy(frames[0][:4]).shape == (4,)  # a batch
    with pytest.raises(ValueError, match="an image must hold whole numbers from 0 to 255"):
        policy(frames[0][0] / 255)
    with pytest.raises(ValueError, match=r"as uint8 \(12, 11, 2\), not uint8 \(2, 12, 11\)"):
        policy(np.moveaxis(frames[0][0], 2, 0))


# --- Bad input -----------------------------------------------------------------------------------------------

ONE = spaces.Discrete(2)


def write_raw(root, space, images):
    """An episode of these images, as the space declares them or not."""
    length = len(images) - 1
    flags = {"terminations": np.zeros(length, bool), "truncations": np.zeros(length, bool)}
    episode = EpisodeBuffer(observations=images, actions=np.zeros(length, int), rewards=np.zeros(length), **flags)
    minari.create_dataset_from_buffers(NAME, buffer=[episode], observation_space=space, action_space=ONE)


def image(*shape, high=255, dtype=np.uint8):
    return spaces.Box(0, high, shape, dtype)


@pytest.mark.parametrize(
    "space",
    [
        image(3, 12, 12),  # the channels first
        image(12, 12, 3, high=1.0, dtype=np.float32),
        spaces.Box(-1, 1, (12, 12), np.int8),
        image(4, 12, 12, 3),  # a stack with an axis of its own
        image(12, 12, 13),  # more channels than rows
        image(12, 12, 3, high=65535, dtype=np.uint16),
        spaces.Box(1, 255, (12, 12, 3), np.uint8),  # not from 0 on
        spaces.Box(0, np.array([9, 9, 8], np.uint8) + np.zeros((12, 12, 3), np.uint8), dtype=np.uint8),
        spaces.Dict({"camera": image(12, 12, 3), "speed": spaces.Box(-1, 1, (2,))}),
    ],
)
def test_spaces_that_are_no_images(root, space):
    sample = space.sample()
    images = {k: np.stack([x] * 3) for k, x in sample.items()} if isinstance(sample, dict) else np.stack([sample] * 3)
    write_raw(root, space, images)
    text = message()
    assert text.startswith("Observations must be a Box vector, a Discrete, a Dict of these, or an image")
    inner = space["camera"] if isinstance(space, spaces.Dict) else space
    assert " ".join(str(inner).split())[:20] in text and "store np.uint8 from 0 on as (H, W, C)" in text


def test_images_that_are_not_what_they_declare(root):
    import h5py

    record(root, high=1)
    path = root / NAME / "data" / "main_data.hdf5"

    def put(change):
        with h5py.File(path, "a") as file:
            old = file["episode_1"]["observations"][:]
            del file["episode_1"]["observations"]
            file["episode_1"]["observations"] = change(old)
        return old

    for change, says in (
        (lambda x: x + np.uint8(1), "whole numbers from 0 to 1 in bytes, and row 0 holds 2"),
        (lambda x: x.astype(np.float32), "they have the type float32"),
        (lambda x: x.astype(np.int16), "they have the type int16"),
        (lambda x: x[:, :9], "they have the shape (3, 9, 11, 2) where (3, 12, 11, 2) is declared"),
        (lambda x: np.moveaxis(x, 3, 1), "they have the shape (3, 2, 12, 11) where (3, 12, 11, 2) is declared"),
    ):
        old = put(change)
        text = message()
        assert "observations of episode 1 must be" in text and says in text and "store them as np.uint8" in text
        put(lambda _, old=old: old)
    load_dataset(NAME, images=True)


@pytest.mark.parametrize(
    "frame_stack",
    [4, 0, {}, {"frames": 4}, {"frames": 0, "padding": "zero"}, {"frames": 2.0, "padding": "zero"}]
    + [{"frames": 2, "padding": "reset"}, {"frames": True, "padding": "zero"}],
)
def test_a_frame_stack_that_is_none(root, frame_stack):
    record(root)
    edit(root, frame_stack=frame_stack)
    assert message().startswith("frame_stack in metadata.json must be like")


@pytest.mark.parametrize("frame_stack", [{"frames": 2, "padding": "zero"}, {}, 0])
def test_a_frame_stack_of_vectors(root, frame_stack):
    write_raw(root, image(12), np.zeros((3, 12), np.uint8))
    load_dataset(NAME)
    edit(root, frame_stack=frame_stack)
    for images in (False, True):
        text = message(images=images)
        assert text.startswith("frame_stack in metadata.json is for images, and these observations are vectors: leave")


def test_images_of_bits(root):
    images = np.random.default_rng(0).integers(2, size=(4, 10, 10, 4)).astype(bool)
    write_raw(root, image(10, 10, 4, high=1, dtype=bool), images)
    data, env = load_dataset(NAME, images=True)
    assert data.frames.dtype == np.uint8 and env.spec.obs_high == 1
    np.testing.assert_array_equal(data.frames, images)


def test_a_reset_without_a_step_shifts_no_window(root):
    """The observation of an episode without rows is none of the images."""
    import h5py

    shown = record(root, ((0, 1), (0,), (2, 2, 1)), {"frames": 2, "padding": "repeat"})
    with h5py.File(root / NAME / "data" / "main_data.hdf5", "a") as file:
        for name in ("actions", "rewards", "terminations", "truncations", "observations"):
            old = file["episode_1"][name][:]
            del file["episode_1"][name]
            file["episode_1"][name] = old[: name == "observations"]
    edit(root, total_steps=5)
    data, _ = load_dataset(NAME, images=True)
    np.testing.assert_array_equal(data.window, [[0, 0, 1], [0, 1, 2], [3, 3, 4], [3, 4, 5], [4, 5, 6]])
    np.testing.assert_array_equal(data.frames, np.concatenate([shown[0], shown[2]]))


def test_an_environment_that_repeats_actions(root):
    """A row is what a policy decides, however often its action is repeated: the wrapper that does it is in the dataset,
    and evaluations have it too. Rewards of both steps are summed."""
    env = gymnasium.make("stitch-test/Screens-v0", disable_env_checker=True, length=6)
    env, plays = gymnasium.wrappers.MaxAndSkipObservation(env, skip=2), ((0, 1, 2), (2, 2, 1))
    write(env, [play(env, start(0, j), actions) for j, actions in enumerate(plays)])
    edit(root, frame_stack={"frames": 2, "padding": "zero"})
    data, env = load_dataset(NAME, images=True)
    seen, env.num_workers = [], 1

    def policy(obs, step, *_):
        seen.append(obs.copy())
        return np.array(plays)[None, :, min(step, 2)], None

    np.testing.assert_array_equal(data.reward, [0, 2, 4, 4, 4, 2])
    np.testing.assert_array_equal(env.evaluate(policy, [0], 2).returns, [[6, 10]])
    np.testing.assert_array_equal(data.take(np.arange(6)).obs, np.stack(seen, axis=2).reshape(6, 12, 11, 4))


def test_images_that_a_device_cannot_hold_are_refused_before_anything_else(root, tmp_path, monkeypatch):
    """A row has an image of 12 x 11 x 2 bytes, three numbers of images and three others: 264 + 4 (3 + 3) bytes."""
    record(root, frame_stack={"frames": 2, "padding": "zero"})
    edit(root, total_steps=10**8)
    gpu = types.SimpleNamespace(device_kind="Some GPU", memory_stats=lambda: {"bytes_limit": 18 * 2**30})
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    monkeypatch.setattr(layouts, "_free_memory", lambda: 2**40)
    dqn = load("dqn")
    for name in ("Runs", "make_agent"):
        monkeypatch.setattr(dqn, name, None)
    with pytest.raises(DatasetError) as error:
        dqn.main(dqn.Config(NAME, encoder="minatar", out=str(tmp_path / "run")))
    assert str(error.value) == (
        f"{NAME} needs 26.8 GiB on each device, where all seeds share its 100,000,000 rows, and JAX may use 18.0 GiB "
        "of Some GPU: use a device with more memory, or write fewer episodes, or each image once where it has stacks "
        "(frame_stack in metadata.json)."
    )
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(layouts, "_free_memory", lambda: 49 * 2**30)  # twice 264 bytes: as read, and as frames
    assert "needs about 49.2 GiB of memory" in message() and "and 49.0 GiB are free" in message()


@pytest.mark.parametrize("padding", ["repeat", "zero"])
def test_the_bytes_of_images_are_known_before_they_are_read(root, padding):
    record(root, plays=((0,) * 3,) * 4, frame_stack={"frames": 3, "padding": padding})
    data, env = load_dataset(NAME, images=True, columns=("next_action", "episode"))
    of_rows, reading = sizes(env.interface.observation, env.interface.action, 12, 4, ("next_action", "episode"))
    assert of_rows == sum(x.nbytes for x in jax.tree.leaves(data)) and reading == 2 * data.frames.nbytes


def test_an_environment_that_shows_other_images_is_not_scored(root):
    record(root, env=gymnasium.make("stitch-test/Screens-v0", disable_env_checker=True))
    edit(root, env_spec=gymnasium.make("stitch-test/Screens-v0", broken=True).spec.to_json())
    edit(root, eval_env_spec=gymnasium.make("stitch-test/Screens-v0", broken=True).spec.to_json())
    _, env = load_dataset(NAME, images=True)
    assert not env.probe() and "an image must hold whole numbers from 0 to 255 as uint8 (12, 11, 2)" in env.score_kind
    assert "not float64 (12, 11, 2)" in env.score_kind


def test_without_an_environment_nothing_is_scored_and_starts_are_black(root):
    write_raw(root, image(12, 11, 2), np.zeros((4, 12, 11, 2), np.uint8))
    _, env = load_dataset(NAME, images=True)
    play = env.evaluate(None, [0, 1], 2)
    assert np.isnan(play.returns).all() and play.obs.shape == (2, 1, 12, 11, 2) and play.obs.dtype == np.uint8


def test_the_encoders_are_the_words_of_the_option():
    for name in TAKE_IMAGES:
        field = next(f for f in dataclasses.fields(load(name).Config) if f.name == "encoder")
        assert field.type.__args__ == ("identity", *ENCODERS)
    assert isinstance(small(), nn.Module) and Screens(high=1).observation_space.high.max() == 1


def test_the_table_of_the_page_is_that_of_the_formula():
    """Rows of GB: an image once for each row, 4 (k + 1) bytes of window and 12 of the other columns; or 2 k images."""
    page = (pathlib.Path(__file__).parents[1] / "benchmarks" / "images.md").read_text()
    rows = re.findall(r"^\| (1[0,]+) \| (.*) \|$", page, re.M)
    assert [int(n.replace(",", "")) for n, _ in rows] == [10**5, 10**6, 10**7]
    for n, cells in rows:
        n, stack = int(n.replace(",", "")), 2 * 4 * 84 * 84
        sizes = 84 * 84 + 4 * 5 + 12, stack, 4 * stack, 64 * 64 * 3 + 4 * 2 + 12, 10 * 10 * 4 + 4 * 2 + 12
        for cell, size in zip(cells.split(" | "), sizes, strict=True):
            assert float(f"{n * size / 1e9:.2g}") == pytest.approx(float(cell.replace(",", "")), rel=0.03)
            assert cell.replace(",", "") in {f"{n * size / 1e9:.{d}f}" for d in range(4)}
    card = (pathlib.Path(__file__).parents[1] / "benchmarks" / "cards" / "minatar-breakout-mixed-v0.md").read_text()
    episodes, n = (
        int(x.replace(",", "")) for x in re.search(r"([0-9,]+) episodes, ([0-9,]+) transitions", card).groups()
    )
    size = (n + episodes) * 400 + n * (4 * 2 + 12)
    assert f"{n:,} rows in {episodes:,} episodes, take {size / 1e6:.1f} MB" in " ".join(page.split())
