"""The datasets of the Adroit hand: tasks pay and end as D4RL's, experts are D4RL's, mixtures are mixtures."""

import hashlib
import json
import sys
from pathlib import Path

import gymnasium
import gymnasium_robotics
import jax
import minari
import numpy as np
import pytest

from algos import iql
from common import recipes
from common.datasets import DatasetError, load_dataset
from common.environments import D4RL_REFERENCE_SCORES
from common.recipes import adroit, rollouts
from common.recipes.worker import begin

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import play  # noqa: E402

TASKS = list(adroit.TASKS)
RECORD = json.loads((Path(__file__).parents[1] / "benchmarks" / "behaviour" / "adroit.json").read_text())
# SHA-256, its first 16 digits, of the arrays of each expert in the order of their names, as they were in the pickles
DIGESTS = {
    "door": "f9b4abdbfd48c016",
    "hammer": "d89e824fb034672d",
    "relocate": "ca814dd42a92fb89",
    "pen": "035debaaf3cc0acc",
}
# Columns of the observation that are palm - object, as gymnasium-robotics' documentation lists them
PALM_TO_OBJECT = {
    "door": lambda obs: obs[35:38],
    "hammer": lambda obs: obs[33:36] - obs[36:39],
    "relocate": lambda obs: obs[30:33],
}


@pytest.fixture(scope="module", autouse=True)
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        yield monkeypatch


@pytest.fixture(scope="module")
def built(root):
    """(dataset, rows, environment) of 200 steps of door, built by name: half of the clone, half of a demonstration."""
    with root.context() as monkeypatch:
        monkeypatch.setitem(
            recipes.RECIPES,
            "stitch/adroit-door-cloned-v0",
            recipes.RECIPES["stitch/adroit-door-cloned-v0"]._replace(num_transitions=200),
        )
        data, env = load_dataset("stitch/adroit-door-cloned-v0")
    return minari.load_dataset("stitch/adroit-door-cloned-v0"), data, env


@pytest.fixture(scope="module")
def experts():
    """{task: 3 episodes of the expert's mean action}."""
    found = {}
    for task in TASKS:
        policy, env = adroit.policy(task), adroit.make_env(task)
        found[task] = [rollouts.rollout(env, policy._replace(std=0 * policy.std), (7, k)) for k in range(3)]
        env.close()
    return found


def bits(episodes):
    return [(e.seed, e.observations.tobytes(), e.actions.tobytes(), e.rewards.tobytes()) for e in episodes]


def score(task, episodes):
    low, high = D4RL_REFERENCE_SCORES[f"D4RL/{task}/"]
    return 100 * (np.mean([e.rewards.sum() for e in episodes]) - low) / (high - low)


# --- The tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", PALM_TO_OBJECT)
def test_all_but_the_way_to_the_object_is_paid_as_by_the_package(task, experts):
    """Where gymnasium-robotics adds 0.1 |palm - object|, D4RL subtracts it, and all other terms are the same: ours is
    0.2 of that distance below the simulator's raw reward, or equal to it where the package has mended its sign."""
    env = adroit.make_env(task)
    raw = env.env  # without the wrapper
    raw.reset(seed=experts[task][0].seed)
    for t, action in enumerate(experts[task][0].actions):
        obs, reward, *_ = raw.step(action)
        assert (obs == experts[task][0].observations[t + 1]).all()  # it is the same episode
        far = np.linalg.norm(PALM_TO_OBJECT[task](obs))
        apart = reward - experts[task][0].rewards[t]
        assert 0.01 < far < 2 and min(abs(apart - 0.2 * far), abs(apart)) < 1e-9
    env.close()
    # The expert has met all bonuses, so that all terms were compared
    assert experts[task][0].rewards.max() > {"door": 19, "hammer": 99, "relocate": 30}[task]


def test_the_way_to_the_object_is_paid_with_d4rls_sign():
    """By hand, of the simulator's state after a step of doing nothing: the terms that are not 0 there."""
    for task in PALM_TO_OBJECT:
        env = adroit.make_env(task)
        env.reset(seed=3)
        obs, reward, *_ = env.step(np.zeros(env.action_space.shape, np.float32))
        data, far = env.unwrapped.data, np.linalg.norm(PALM_TO_OBJECT[task](obs))
        expected = -0.1 * far  # the ball lies on the table, and far from its target
        if task == "door":  # shut
            expected -= 0.1 * (obs[28] - 1.57) ** 2 + 1e-5 * np.square(data.qvel).sum()
        if task == "hammer":  # which lies on the table
            nail, goal = obs[42:45], data.site("nail_goal").xpos
            expected -= np.linalg.norm(data.site("tool").xpos - nail) + 10 * np.linalg.norm(nail - goal)
            expected -= 0.01 * np.linalg.norm(data.qvel)
        env.close()
        assert far > 0.1 and reward == pytest.approx(expected, abs=1e-9), task


def test_pen_is_paid_as_before_and_ends_where_it_falls():
    """Random actions drop it: D4RL ends the episode at a height of 7.5 cm, and the package goes on."""
    env = adroit.make_env("pen")
    raw = gymnasium.make("AdroitHandPen-v1")
    env.reset(seed=0), raw.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(100):
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        obs, reward, terminated, *_ = env.step(action)
        _, same, goes_on, *_ = raw.step(action)
        assert reward == same and not goes_on
        assert terminated == (obs[26] < 0.075)  # the pen's height
        if terminated:
            break
    assert terminated and reward < -4  # D4RL's penalty of the fall is paid
    env.close(), raw.close()


@pytest.mark.parametrize("task", TASKS)
def test_limits_are_d4rls(task, experts):
    limit = 100 if task == "pen" else 200
    assert max(len(e.rewards) for e in experts[task]) == limit
    for e in experts[task]:
        assert e.terminated == (len(e.rewards) < limit)
    env = adroit.make_env(task)
    assert env.spec.max_episode_steps == limit
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))  # as an evaluation does
    assert again.spec == env.spec and type(again).__name__ == "AsInD4RL"
    env.close(), again.close()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions
@pytest.mark.parametrize("task", ["pen", "hammer"])
def test_minaris_recordings_are_evaluated_as_in_d4rl(task):
    """Their own environments are gymnasium-robotics'. Data of another name keep what their file says."""
    gymnasium.register_envs(gymnasium_robotics)
    env = gymnasium.make(adroit.TASKS[task].env_id, max_episode_steps=300)
    for name in (f"D4RL/{task}/human-v2", f"mine/{task}-v0"):
        end = np.arange(4) == 3
        buffer = minari.data_collector.EpisodeBuffer(
            observations=np.zeros((5, *env.observation_space.shape)),
            actions=np.zeros((4, *env.action_space.shape), np.float32),
            rewards=np.arange(4.0),
            terminations=end & False,
            truncations=end,
        )
        minari.create_dataset_from_buffers(name, buffer=[buffer], env=env)
    env.close()
    still = lambda obs, *_: (np.zeros((*obs.shape[:2], len(env.action_space.low))), None)  # noqa: E731
    returns = {}
    for name in (f"D4RL/{task}/human-v2", f"mine/{task}-v0"):
        _, evaluation = load_dataset(name)
        assert evaluation.probe() and evaluation._limit == ({"pen": 100}.get(task, 200) if "D4RL" in name else 300)
        returns[name] = evaluation.evaluate(still, [0], 1, max_steps=20).returns.item()
        evaluation._dismiss()
        env = play.make_env(name)  # the same as the evaluation's
        begin(env, *play.starts(0, 1)[0])
        rewards = [env.step(np.zeros(env.action_space.shape, np.float32))[1] for _ in range(20)]
        assert sum(rewards) == pytest.approx(returns[name]) and env.spec.max_episode_steps == evaluation._limit
        env.close()
    d4rl, own = returns.values()
    assert (d4rl == own) == (task == "pen") and d4rl <= own  # the sign


# --- The policies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task, published, margin", [("door", 105, 3), ("hammer", 127, 4), ("relocate", 99, 25)])
def test_the_experts_mean_action_scores_what_is_published(task, published, margin, experts):
    """Three episodes: door and hammer differ little from one to the other (standard deviations below 2), relocate
    by 13, since it is paid for as long as the ball is held at a target that lies near or far."""
    assert abs(score(task, experts[task]) - published) < margin


@pytest.mark.parametrize("task", TASKS)
def test_weights_are_read_as_dapg_reads_them(task):
    """(obs - in_shift) / (in_scale + 1e-8), two tanh layers, out_scale and out_shift, on observations of its size."""
    x, policy = {key: array.astype(float) for key, array in adroit.load(task).items()}, adroit.policy(task)
    obs = x["in_shift"] + x["in_scale"] * np.random.default_rng(0).standard_normal((5, len(x["in_shift"])))
    hidden = np.tanh(((obs - x["in_shift"]) / (x["in_scale"] + 1e-8)) @ x["w0"].T + x["b0"])
    mean = (np.tanh(hidden @ x["w1"].T + x["b1"]) @ x["w2"].T + x["b2"]) * x["out_scale"] + x["out_shift"]
    np.testing.assert_allclose(policy.mean(obs), mean, atol=1e-9)
    np.testing.assert_allclose(np.log(policy.std), x["log_std"])


def test_their_source_and_licence_are_beside_the_weights():
    notice = (adroit.BEHAVIOUR / "NOTICE.md").read_text()
    assert "github.com/aravindr93/hand_dapg" in notice and "Apache" in notice
    assert "Apache License" in (adroit.BEHAVIOUR / "LICENSE").read_text()
    for path in adroit.BEHAVIOUR.glob("*.npz"):
        assert f"`{path.name}`" in notice
    assert {path.stem for path in adroit.BEHAVIOUR.glob("*.npz")} == {*TASKS, *(f"{task}-clone" for task in TASKS)}
    for task, digest in DIGESTS.items():
        arrays = b"".join(array.tobytes() for _, array in sorted(adroit.load(task).items()))
        assert hashlib.sha256(arrays).hexdigest().startswith(digest)


@pytest.mark.parametrize("task", TASKS)
def test_clones_imitate_the_demonstrations(task):
    """Much better than a constant; and the returns in its file are those in the record."""
    episode = adroit.demonstration(task, 3)
    clone = adroit.policy(f"{task}-clone")
    error = np.square(clone.mean(episode.observations[:-1]) - episode.actions).mean()
    assert error < 0.6 * np.square(episode.actions - episode.actions.mean(0)).mean()
    low, high = D4RL_REFERENCE_SCORES[f"D4RL/{task}/"]
    for name in ("expert", "clone"):
        mean = 100 * (adroit.load(f"{task}-clone")[f"{name}_return"].mean() - low) / (high - low)
        assert mean == pytest.approx(RECORD["scores"][task][name]["mean"], abs=0.051)
    assert abs(RECORD["scores"][task]["random"]["mean"]) < 5  # on D4RL's scale it is 0


# --- Datasets ---------------------------------------------------------------------------------------


def test_same_seed_same_bits_whatever_the_processes():
    def collect(num_processes, seed=0):
        parts = [("pen", part) for part in adroit.QUALITIES["cloned"]]
        return bits(rollouts.equal_parts(adroit.rollout, parts, 500, 100, "test", seed, num_processes))

    one, two = collect(1), collect(2)
    assert one == two and sum(len(rewards) for *_, rewards in one) == 8 * 500
    assert len({env_seed for env_seed, *_ in one}) == len(one) >= 6  # no start twice, in neither part
    first = rollouts.to_buffer(adroit.rollout("pen", "clone", (0, 0, 0)), 100)
    other = rollouts.to_buffer(adroit.rollout("pen", "clone", (1, 0, 0)), 100)
    assert bits([first]) == one[:1] != bits([other])


def test_half_is_of_the_clone_and_half_are_demonstrations(built):
    clone, demonstration = built[0]
    expected = adroit.rollout("door", "clone", (0, 0, 0)), adroit.demonstration("door", 0)
    for episode, whole in zip((clone, demonstration), expected, strict=True):
        np.testing.assert_array_equal(episode.actions, whole.actions[:100])
        np.testing.assert_array_equal(episode.observations, whole.observations[:101])
        assert episode.truncations.tolist() == [False] * 99 + [True] and not episode.terminations.any()


def test_the_same_25_demonstrations_come_again_and_again(monkeypatch):
    monkeypatch.setattr(rollouts, "rollout", lambda env, policy, seed: seed)
    monkeypatch.setattr(adroit, "_process_env", lambda task: None)
    adroit.demonstration.cache_clear()
    seeds = [adroit.rollout("door", "demonstration", (0, 1, k)) for k in range(60)]
    adroit.demonstration.cache_clear()
    assert seeds == [(2**31, k % 25) for k in range(60)]
    assert adroit.rollout("door", "clone", (0, 1, 30)) == (0, 1, 30)


def test_it_loads_learns_and_is_evaluated(built):
    _, data, env = built
    assert data.obs.shape == (200, 39) and data.action.shape == (200, 28) and not data.terminal.any()
    agent = iql.make_agent(iql.Config(hidden=(8,)), env.spec)
    _, metrics = jax.jit(agent.update)(agent.init(jax.random.key(0)), data)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))
    still = lambda obs, *_: (np.zeros((*obs.shape[:2], 28)), None)  # noqa: E731
    assert -60 < env.evaluate(still, [0], 1, max_steps=50).returns.item() < 0
    assert env.score_kind == "normalised by the dataset's reference scores"
    np.testing.assert_allclose(env.score(np.array([-56.512833, 2880.5693087298737])), [0, 100], atol=1e-9)
    env._dismiss()


def test_without_the_package_one_sentence_says_what_to_install(built, monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)  # as if it were not installed
    with pytest.raises(DatasetError, match="gymnasium_robotics") as refused:
        load_dataset("stitch/adroit-door-expert-1k-v0")
    assert "\n" not in str(refused.value) and str(refused.value).endswith(": pip install -e ..")


def test_recipes_have_d4rls_sizes():
    for task in TASKS:
        for quality in ("expert", "cloned"):
            recipe = recipes.find(f"stitch/adroit-{task}-{quality}-v0")
            assert recipe.num_transitions == (500_000 if task == "pen" else 1_000_000)
            assert recipe.write.args == (task, quality)
            assert recipes.find(f"stitch/adroit-{task}-{quality}-100k-v0").num_transitions == 100_000
