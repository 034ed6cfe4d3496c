"""The locomotion datasets: their policies are the trained ones, their mixtures are mixtures, their ends are right."""

import json
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest

from common import recipes
from common.recipes import locomotion, rollouts
from common.recipes.rollouts import Episode, Policy

TASKS = list(locomotion.TASKS)
BEHAVIOUR = Path(__file__).parents[1] / "benchmarks" / "behaviour"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two small datasets of hopper, built by name in a Minari root of their own: {quality: episodes}, and a dataset."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        episodes = {}
        for quality in ("medium-replay", "medium-expert"):
            recipes.build(f"stitch/hopper-{quality}-1k-v0")
            dataset = minari.load_dataset(f"stitch/hopper-{quality}-1k-v0")
            episodes[quality] = list(dataset)
        yield episodes, dataset


def log_likelihood(policy, episode):
    """Of an episode's actions, less a constant. Clipped actions are left out: they have no density."""
    mean = policy.mean(episode.observations[:-1])
    inside = np.abs(episode.actions) < 1
    return (-0.5 * ((episode.actions - mean) / policy.std) ** 2 - np.log(policy.std))[inside].sum()


def parts(episodes, num_parts):
    """The episodes of each policy, which hold `num_parts` equal shares of the transitions, one after the other."""
    ends = np.cumsum([len(e.actions) for e in episodes])
    bounds = np.linspace(0, ends[-1], num_parts + 1).astype(int)
    assert set(bounds[1:]) <= set(ends.tolist())  # no episode lies in two parts
    return [[e for e, end in zip(episodes, ends, strict=True) if a < end <= b] for a, b in pairwise(bounds)]


def bits(episodes):
    return [(e.seed, e.observations.tobytes(), e.actions.tobytes(), e.rewards.tobytes()) for e in episodes]


# --- The policies -----------------------------------------------------------------------------------


def test_policy_by_hand():
    policy = Policy(*(np.array(x) for x in ([[2.0]], [1.0], [[0.5]], [0.1], [[3.0, -1.0]], [0.2, 0.0], [0.3, 0.3])))
    # tanh(0.1 * 2 + 1) = 0.8336546; tanh(0.5 * 0.8336546 + 0.1) = 0.4752476; times (3, -1), plus (0.2, 0).
    np.testing.assert_allclose(policy.mean(np.array([0.1])), [1.6257428, -0.4752476], atol=1e-6)


@pytest.mark.parametrize("task", TASKS)
def test_policies_are_the_trained_ones(task):
    """The mean actions of Stable-Baselines3, stored when a snapshot was taken, on observations of a random walk."""
    behaviour = locomotion.load(task)
    env = locomotion.make_env(task)
    assert behaviour["probe_obs"].shape[1:] == env.observation_space.shape
    assert behaviour["probe_mean"].shape[2:] == env.action_space.shape
    assert len(behaviour["probe_mean"]) == len(behaviour["step"]) >= 6
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()  # as roll-outs take for granted
    assert env.spec.max_episode_steps == locomotion.EPISODE_STEPS
    env.close()
    for i, expected in enumerate(behaviour["probe_mean"]):  # float32 there, float64 here
        np.testing.assert_allclose(locomotion.policy(task, i).mean(behaviour["probe_obs"]), expected, atol=1e-4)
    assert np.abs(behaviour["probe_mean"][-1] - behaviour["probe_mean"][0]).max() > 0.1


@pytest.mark.parametrize("task", TASKS)
def test_qualities_name_the_right_snapshots(task):
    behaviour = locomotion.load(task)
    curve, medium = behaviour["curve_return"].mean(-1), int(behaviour["medium"])
    reached = behaviour["curve_step"][curve >= curve[-1] / 3]
    assert behaviour["step"][medium] == reached[0]
    assert behaviour["step"][0] == 0 and behaviour["step"][-1] == behaviour["curve_step"][-1]
    assert (np.diff(behaviour["step"]) > 0).all()
    last = len(behaviour["step"]) - 1
    assert 3 <= medium < last
    assert locomotion.snapshots(task, "random") == [None]
    assert locomotion.snapshots(task, "medium") == [medium]
    assert locomotion.snapshots(task, "medium-replay") == list(range(medium + 1))
    assert locomotion.snapshots(task, "medium-expert") == [medium, last]
    assert locomotion.snapshots(task, "expert") == [last]


@pytest.mark.parametrize("task", TASKS)
def test_returns_grow_with_the_quality(task):
    behaviour = locomotion.load(task)
    returns = behaviour["return"].mean(-1)
    assert behaviour["random_return"] < returns[int(behaviour["medium"])] < 0.6 * returns[-1]
    record = json.loads((BEHAVIOUR / f"{task}.json").read_text())
    np.testing.assert_allclose([s["return_mean"] for s in record["snapshots"]], returns, atol=0.051)


# --- Roll-outs --------------------------------------------------------------------------------------


def test_actions_are_drawn_from_the_policy():
    """Where the mean is three deviations from the bounds, so that clipping is rare, the residual is standard normal."""
    policy = locomotion.policy("hopper", int(locomotion.load("hopper")["medium"]))
    env = locomotion.make_env("hopper")
    episodes = [locomotion.rollout(env, policy, (0, k)) for k in range(3)]
    env.close()
    mean = np.concatenate([policy.mean(e.observations[:-1]) for e in episodes])
    residual = (np.concatenate([e.actions for e in episodes]) - mean) / policy.std
    residual = residual[np.abs(mean) + 3 * policy.std < 1]
    assert len(residual) > 100
    assert abs(residual.mean()) < 4 / len(residual) ** 0.5
    assert abs(residual.std() - 1) < 4 / (2 * len(residual)) ** 0.5


def test_exploration_noise_has_the_policys_deviation():
    """HalfCheetah's is small, so that thousands of action components are far from the bounds."""
    policy = locomotion.policy("halfcheetah", int(locomotion.load("halfcheetah")["medium"]))
    env = locomotion.make_env("halfcheetah")
    episode = locomotion.rollout(env, policy, (0, 0))
    env.close()
    mean = policy.mean(episode.observations[:-1])
    residual = ((episode.actions - mean) / policy.std)[np.abs(mean) + 4 * policy.std < 1]
    assert len(residual) > 2000
    assert abs(residual.std() - 1) < 4 / (2 * len(residual)) ** 0.5 < 0.07


def test_the_actions_in_the_file_are_those_that_were_executed():
    """Executed again, they lead through the same states to the last bit; rounded from others, they would not."""
    env = locomotion.make_env("hopper")
    episode = locomotion.rollout(env, locomotion.policy("hopper", 1), (0, 0))
    observations = [env.reset(seed=episode.seed)[0]]
    for action in episode.actions:
        observations.append(env.step(action)[0])
    env.close()
    np.testing.assert_array_equal(np.stack(observations), episode.observations)


def test_random_actions_are_uniform():
    env = locomotion.make_env("hopper")
    actions = np.concatenate([locomotion.rollout(env, None, (0, k)).actions for k in range(20)]).ravel()
    env.close()
    quartiles = np.quantile(actions, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [-0.5, 0, 0.5], atol=4 / len(actions) ** 0.5)  # deviation at most 1 / sqrt(n)
    assert np.abs(actions).max() < 1 and np.abs(actions).max() > 0.95


@pytest.mark.parametrize("task", ["hopper", "walker2d"])
def test_falls_are_terminations(task):
    """A fall is what the environments' documentation says is unhealthy: the torso's height and angle."""
    env = locomotion.make_env(task)
    episodes = [locomotion.rollout(env, None, (0, k)) for k in range(5)]
    env.close()
    low, high, angle = {"hopper": (0.7, np.inf, 0.2), "walker2d": (0.8, 2.0, 1.0)}[task]
    for episode in episodes:
        obs = episode.observations
        fallen = ~((low < obs[:, 0]) & (obs[:, 0] < high) & (np.abs(obs[:, 1]) < angle))
        assert episode.terminated and fallen[-1] and not fallen[:-1].any()
        buffer = rollouts.to_buffer(episode, max_steps=1000)
        assert buffer.terminations.sum() == 1 and buffer.terminations[-1] and not buffer.truncations.any()


def test_timeouts_are_truncations():
    """HalfCheetah never falls."""
    env = locomotion.make_env("halfcheetah")
    episode = locomotion.rollout(env, locomotion.policy("halfcheetah", 0), (0, 0))
    env.close()
    buffer = rollouts.to_buffer(episode, max_steps=5000)
    assert len(buffer.rewards) == 1000
    assert not buffer.terminations.any() and buffer.truncations.sum() == 1 and buffer.truncations[-1]


@pytest.mark.parametrize("max_steps, terminated", [(3, True), (4, True), (2, False)])
def test_cuts_are_truncations(max_steps, terminated):
    rows = np.arange(4.0)
    episode = Episode(rows[:, None], rows[:3, None].astype(np.float32), rows[:3], terminated=True, seed=7)
    buffer = rollouts.to_buffer(episode, max_steps)
    length = min(max_steps, 3)
    assert len(buffer.actions) == len(buffer.rewards) == len(buffer.observations) - 1 == length
    expected = [False] * (length - 1) + [True]
    assert buffer.terminations.tolist() == [terminated and end for end in expected]
    assert buffer.truncations.tolist() == [not terminated and end for end in expected]


def test_same_seed_same_bits_whatever_the_processes():
    def collect(num_processes, seed=0):
        return bits(locomotion.collect("hopper", [None, 0], 6000, seed, num_processes))

    one, two = collect(1), collect(2)
    assert one == two
    assert len({env_seed for env_seed, *_ in one}) == len(one)  # no start twice, in neither part
    env = locomotion.make_env("hopper")
    locomotion.rollout(env, None, (1, 0, 0))  # the environment's past does not matter
    first = rollouts.to_buffer(locomotion.rollout(env, None, (0, 0, 0)), 1000)
    other = rollouts.to_buffer(locomotion.rollout(env, None, (1, 0, 0)), 1000)
    env.close()
    assert bits([first]) == one[:1] != bits([other])


# --- Datasets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("quality", ["medium-replay", "medium-expert"])
def test_mixtures_hold_an_equal_part_of_each_snapshot(built, quality):
    """Which policy an action was drawn from shows in its likelihood, among all the snapshots there are."""
    expected = locomotion.snapshots("hopper", quality)
    policies = [locomotion.policy("hopper", i) for i in range(len(locomotion.load("hopper")["step"]))]
    found = [
        int(np.argmax([sum(log_likelihood(policy, e) for e in part) for policy in policies]))
        for part in parts(built[0][quality], len(expected))
    ]
    assert found == expected


@pytest.mark.parametrize("quality", ["medium-replay", "medium-expert"])
def test_shapes_types_and_sizes(built, quality):
    episodes = built[0][quality]
    assert sum(len(e.actions) for e in episodes) == 1000
    for e in episodes:
        length = len(e.actions)
        assert length > 0
        assert e.observations.shape == (length + 1, 11) and e.observations.dtype == np.float64
        assert e.actions.shape == (length, 3) and e.actions.dtype == np.float32
        assert e.rewards.shape == e.terminations.shape == e.truncations.shape == (length,)
        assert all(np.isfinite(x).all() for x in (e.observations, e.actions, e.rewards))
        assert np.abs(e.actions).max() <= 1
        assert (e.terminations | e.truncations).tolist() == [False] * (length - 1) + [True]
        assert not (e.terminations & e.truncations).any()
    for part in parts(episodes, len(locomotion.snapshots("hopper", quality))):
        assert not any(e.truncations[-1] for e in part[:-1])  # short of 1000 steps only a cut truncates: one a part


def test_reference_scores(built):
    """Random scores 0 and expert 100, and the stored means are those of such policies."""
    _, dataset = built
    behaviour = locomotion.load("hopper")
    means = np.array([behaviour["random_return"], behaviour["return"][-1].mean()])
    np.testing.assert_allclose(100 * minari.get_normalized_score(dataset, means), [0, 100], atol=1e-9)
    env = dataset.recover_environment(eval_env=True)
    assert env.spec.id == "Hopper-v5" and isinstance(env, gym.Env)
    returns = [locomotion.rollout(env, None, (3, k)).rewards.sum() for k in range(30)]
    assert abs(np.mean(returns) - means[0]) < 5 * np.std(returns) / 30**0.5
    expert = locomotion.policy("hopper", len(behaviour["step"]) - 1)
    returns = [locomotion.rollout(env, expert, (3, k)).rewards.sum() for k in range(2)]
    env.close()
    assert abs(np.mean(returns) - means[1]) < 5 * behaviour["return"][-1].std() / 2**0.5
    assert means[1] > 10 * means[0]


def test_every_quality_has_a_recipe_of_a_million_transitions():
    for task in TASKS:
        for quality in locomotion.QUALITIES:
            assert recipes.find(f"stitch/{task}-{quality}-v0").num_transitions == 1_000_000
            assert recipes.find(f"stitch/{task}-{quality}-20k-v0").num_transitions == 20_000
            assert recipes.find(f"stitch/{task}-{quality}-v0").write.args == (task, quality)
