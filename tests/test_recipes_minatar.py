"""MinAtar's games: episodes that depend on their seeds alone, the NumPy policies, and the datasets."""

import json
import sys
from pathlib import Path

import gymnasium
import jax
import numpy as np
import pytest

from common import recipes
from common.datasets import DatasetError, load_dataset
from common.layouts import Spec
from common.networks import MLP, image_encoder
from common.recipes import minatar
from common.recipes.worker import begin

ROOT = Path(__file__).parents[1]
GAMES = {"breakout": ((10, 10, 4), 3), "space_invaders": ((10, 10, 6), 4)}
pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.filterwarnings("ignore"),  # of the packages that draw MinAtar's pictures
]


def weights_of(game):
    return minatar.load(ROOT / "common" / "recipes" / "behaviour" / f"minatar-{game}.npz")


def test_the_policy_in_numpy_is_the_network(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "behaviour"))
    pytest.importorskip("minatar")
    import train_minatar

    spec = Spec(400, 3, True, obs_shape=(10, 10, 4), obs_high=1)
    network = MLP(3, (7,), "torch", encoder=image_encoder("minatar", spec))
    obs = np.random.default_rng(0).integers(2, size=(5, 10, 10, 4), dtype=np.uint8)
    params = network.init(jax.random.key(0), obs)
    found = [minatar.values(train_minatar.layers(params), x) for x in obs]
    np.testing.assert_allclose(found, network.apply(params, obs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("game", GAMES)
def test_the_weights_are_those_that_were_measured(game):
    """Files of a known size, whose worth the recipe's reference scores are."""
    found = json.loads((ROOT / "benchmarks" / "behaviour" / f"minatar-{game}.json").read_text())
    snapshots = weights_of(game)
    assert [x["step"] for x in found["snapshots"]] == found["config"]["snapshots"] and len(snapshots) == 3
    assert minatar.REFERENCES[game] == (found["random"]["return"], found["snapshots"][-1]["return"])
    first, _, last = (x["return"] for x in found["snapshots"])
    assert found["random"]["return"] < first < last  # the second one of Space Invaders is better than its last
    (height, width, channels), actions = GAMES[game]
    assert snapshots[0]["conv"].shape == (3, 3, channels, 16) and snapshots[0]["w1"].shape[1] == actions
    path = ROOT / "common" / "recipes" / "behaviour" / f"minatar-{game}.npz"
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize("game", GAMES)
def test_an_episode_depends_on_its_seed_alone(game):
    """minatar keeps the last action of the episode before, and the first step may repeat it."""
    pytest.importorskip("minatar")
    used, same = gymnasium.make(minatar.spec(game)), True
    raw = []
    for seed in range(60):
        fresh = gymnasium.make(minatar.spec(game))
        begin(used, 1000 + seed)
        used.step(used.action_space.n - 1)  # its last action is not "do nothing"
        shown = []
        for env in (fresh, used):
            first, _ = begin(env, seed)
            shown.append([first, *(env.step(0)[0] for _ in range(3))])
        same = same and np.array_equal(*shown)
        raw.append(used.unwrapped.game.last_action)
    assert same and set(raw) == {used.unwrapped.action_set[0]}


@pytest.mark.parametrize("game", GAMES)
def test_a_small_dataset(game):
    pytest.importorskip("minatar")
    name = f"stitch/minatar-{game.replace('_', '-')}-mixed-2k-v0"
    recipes.build(name)
    data, env = load_dataset(name, images=True, columns=("episode",))
    shape, actions = GAMES[game]
    assert env.spec == Spec(int(np.prod(shape)), actions, True, obs_shape=shape, obs_high=1)
    n, episodes = len(data.reward), data.episode[-1] + 1
    assert 2000 <= n < 3001 and data.frames.shape == (n + episodes, *shape) and data.frames.dtype == np.uint8
    assert data.frames.max() == 1 and env.probe() and env._limit == minatar.STEPS
    low, high = minatar.REFERENCES[game]
    np.testing.assert_allclose(env.score(np.array([low, high])), [0, 100])
    batch = data.take(np.arange(n))
    # Rows of snapshots without a random action are the policy's: a part p of them is random, of which 1 / n agree
    for part, weights in enumerate(weights_of(game), start=1):
        rows = np.arange(n)[int(n * (part + 0.2) / 4) : int(n * (part + 0.8) / 4)]
        agree = np.mean([minatar.values(weights, batch.obs[i]).argmax() == data.action[i] for i in rows])
        expected = 1 - minatar.NOISE[part] * (1 - 1 / actions)
        assert abs(agree - expected) < 0.06, (part, agree, expected)
    first = data.frames.copy()
    import shutil

    shutil.rmtree(Path(env_path(name)))
    recipes.build(name)
    np.testing.assert_array_equal(load_dataset(name, images=True)[0].frames, first)  # the same bits again


def env_path(name):
    from minari.storage import get_dataset_path

    return get_dataset_path(name)


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "minatar"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "minatar", None)
    monkeypatch.setitem(sys.modules, "minatar.gym", None)
    with pytest.raises(
        DatasetError, match=r"needs a package that is missing .* pip install -e '\.\[minatar\]'\."
    ) as error:
        load_dataset("stitch/minatar-breakout-mixed-1k-v0", images=True)
    assert "\n" not in str(error.value)


def test_it_can_be_drawn():
    pytest.importorskip("minatar")
    env = gymnasium.make(minatar.spec("breakout"), render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (160, 160, 3) and picture.dtype == np.uint8 and picture.max() > 100
