"""The environment of a dataset (common/environments.py): evaluation in worker processes, scores, faults, termination.

The environments are those of echo.py: `Echo` records what it is given, `Clock` counts steps, pays and fails as told.
"""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import gymnasium
import jax
import jax.numpy as jnp
import minari
import numpy as np
import pytest
from echo import LABELS, OBSERVATIONS
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from common import environments, layouts
from common.datasets import load_dataset
from common.environments import Interface, Spec, provenance
from common.recipes import worker

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions

NAME = "test/recorded-v0"
NEVER = "stitch-test/EchoWithoutLimit-v0"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    """An empty Minari root, and a file for what Echo has seen."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setenv("ECHO_LOG", str(tmp_path / "echo.log"))
    return tmp_path


def record(
    root, env_id="stitch-test/Echo-v0", name=NAME, steps=4, actions=None, observations=None, edit=None, **kwargs
):
    """Writes a dataset of one episode, random where it is not given, of an environment made with `kwargs`; `edit` are
    changes of its metadata, and "spec" in them changes of its environment's specification."""
    env = gymnasium.make(env_id, **kwargs)
    observations = sample(env.observation_space, steps + 1) if observations is None else observations
    end = np.arange(1, steps + 1) == steps
    fields = {"rewards": np.arange(float(steps)), "terminations": end & False, "truncations": end}
    actions = sample(env.action_space, steps) if actions is None else actions
    buffer = [EpisodeBuffer(observations=observations, actions=actions, **fields)]
    minari.create_dataset_from_buffers(name, buffer=buffer, env=env)
    if edit:
        path = root / name / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        spec = json.loads(metadata["env_spec"]) | edit.pop("spec", {})
        path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)} | edit))


def load(root, *args, options=None, **kwargs):
    record(root, *args, **kwargs)
    return load_dataset(kwargs.get("name", NAME), **(options or {}))[1]


def sample(space, n):
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: stack([x[key] for x in samples]) for key in space.keys()}
    return stack(samples)


def stack(samples):
    if isinstance(samples[0], dict):
        return {key: stack([x[key] for x in samples]) for key in samples[0]}
    return np.stack(samples)


def events(root, kind):
    """What Echo has seen since the last call, from the file."""
    path, found = root / "echo.log", []
    if path.exists():
        with open(path, "rb") as file:
            while file.peek(1):
                found.append(pickle.load(file))
        path.unlink()
    return [what for event, what in found if event == kind]


def zeros(obs, step, memory, rewards):
    return np.zeros((*obs.shape[:2], 2), np.float32), None


def plays(actions):
    """A policy that plays action[step % n] everywhere."""
    return lambda obs, step, memory, rewards: (
        np.broadcast_to(actions[step % len(actions)], (*obs.shape[:2], *np.shape(actions)[1:])),
        None,
    )


def witness(policy=zeros):
    """(policy, the list of (obs, step, memory, rewards) that it is called with)."""
    seen = []

    def watched(obs, step, memory, rewards):
        seen.append((obs.copy(), step, memory, rewards.copy()))
        return policy(obs, step, memory, rewards)

    return watched, seen


# --- Between the environment and a network -----------------------------------------------------------------


@pytest.mark.parametrize("kind", OBSERVATIONS)
def test_environment_flattens_as_gymnasium_does(root, kind):
    env = load(root, observation=kind)
    env.probe()
    events(root, "reset")
    policy, seen = witness()
    env.evaluate(policy, [0], 1)
    (first,) = events(root, "reset")
    np.testing.assert_array_equal(seen[0][0][0, 0], spaces.flatten(OBSERVATIONS[kind], first).astype(np.float32))


def test_discrete_actions_count_from_zero_and_back(root):
    record(root, num_actions=3, start=3, actions=np.array([5, 3, 4, 3]))
    data, env = load_dataset(NAME)
    assert env.spec == Spec(obs_dim=2, action_dim=3, discrete=True)
    np.testing.assert_array_equal(data.action, [2, 0, 1, 0])
    assert data.action.dtype == np.int32
    env.probe()
    events(root, "step")
    env.evaluate(plays(data.action), [0], 1)
    taken = events(root, "step")[:3]
    assert taken == [5, 3, 4] and {type(action) for action in taken} == {int}


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (-4.0, 4.0), (0.0, 2048.0), (-3.0, 5.0)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_actions_are_scaled_and_reach_the_environment_as_they_were(root, low, high, dtype):
    # Multiples of 1 / 256 of the range, which no step of the scaling rounds, and both bounds
    actions = (low + (high - low) * np.array([[0, 256], [1, 255], [128, 77]]) / 256).astype(dtype)
    record(root, low=low, high=high, dtype=dtype, steps=3, actions=actions)
    data, env = load_dataset(NAME)
    np.testing.assert_array_equal(data.action, np.array([[-128, 128], [-127, 127], [0, -51]]) / 128)
    env.probe()
    events(root, "step")
    env.evaluate(plays(data.action), [0], 1)
    taken = events(root, "step")[:3]
    np.testing.assert_array_equal(taken, actions)
    assert taken[0].dtype == dtype


def test_the_environment_never_gets_an_action_outside_its_bounds(root):
    """Neither by rounding (-0.3 + 2 * (0.1 + 0.3) / 2 is not 0.1 in float32) nor from a policy that leaves [-1, 1]."""
    env = load(root, low=-0.3, high=0.1)
    env.probe()
    events(root, "step")
    env.evaluate(plays(np.array([[-1, 1], [-7, 7], [0.9999999, -0.9999999]], np.float32)), [0], 1)
    taken = events(root, "step")[:3]
    bounds = [np.float32(-0.3), np.float32(0.1)]
    np.testing.assert_array_equal(taken[:2], [bounds, bounds])
    assert all(bounds[0] <= a <= bounds[1] for a in taken[2])


def test_action_dimension_that_cannot_move(root):
    record(root, low=2, high=2, steps=2, actions=np.full((2, 2), 2.0, np.float32))
    data, env = load_dataset(NAME)
    np.testing.assert_array_equal(data.action, np.zeros((2, 2)))
    env.evaluate(zeros, [0], 1)
    np.testing.assert_array_equal(events(root, "step")[-1], [2, 2])


def test_data_and_environment_are_normalised_by_the_same_formula(root):
    raw = np.array([[0.0, 3.0], [1.0, 5.0], [5.0, 4.0], [2.0, 0.0], [9.0, 9.0]])
    record(root, observations=raw)
    data, env = load_dataset(NAME, normalize_obs=True, reward_shift=-1.0)
    mean, scale = raw[:4].mean(axis=0), raw[:4].std(axis=0) + 1e-3  # of the rows, without the episode's last one
    np.testing.assert_allclose(data.obs, (raw[:4] - mean) / scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.next_obs, (raw[1:] - mean) / scale, rtol=1e-5, atol=1e-6)
    env.probe()
    events(root, "reset")
    policy, seen = witness()
    returns = env.evaluate(policy, [0], 1).returns
    (start,) = events(root, "reset")
    np.testing.assert_allclose(seen[0][0][0, 0], (start - mean) / scale, rtol=1e-5)
    np.testing.assert_allclose(seen[1][0][0, 0], (start + [0, 1] - mean) / scale, rtol=1e-5)
    # zeros are 1024 for Echo: each step pays start + 0.1 * 2048, neither scaled nor shifted
    np.testing.assert_allclose(returns, len(seen) * (start[0] + 204.8))


# --- Scores --------------------------------------------------------------------------------------------


def test_without_reference_scores_the_score_is_the_raw_return(root):
    env = load(root)
    assert env.score_kind == "raw return"
    returns = np.random.default_rng(0).normal(size=(3, 50))  # 100 x / 100 is not x for one in seven of these
    np.testing.assert_array_equal(env.score(returns), returns)


def test_the_datasets_own_reference_scores_come_first(root):
    env = load(root, name="mujoco/hopper/own-v0", edit={"ref_min_score": -10, "ref_max_score": 30.0})
    np.testing.assert_allclose(env.score(np.array([-10, 0, 30])), [0, 25, 100])
    assert env.score_kind == "normalised by the dataset's reference scores"


@pytest.mark.parametrize(
    "low, high",
    [
        (5.0, 5.0),
        (30.0, -10.0),
        (float("nan"), 1.0),
        (0.0, float("nan")),
        (0.0, float("inf")),
        ("0", "1"),
        ([0.0], [1.0]),
        (False, True),
        (None, 1.0),
        (0.0, None),
        (-1e308, 1e308),
        (0.0, 1e-320),
        (0, 10**400),
    ],
)
def test_reference_scores_that_are_no_range(root, capsys, low, high):
    """The score was infinite, or its sign reversed, or there was a traceback."""
    env = load(root, name="mujoco/hopper/own-v0", edit={"ref_min_score": low, "ref_max_score": high})
    np.testing.assert_array_equal(env.score(np.array([-10.0, 30.0])), [-10, 30])
    assert env.score_kind == "raw return"
    assert capsys.readouterr().out.count("its reference scores") == 1


D4RL = [
    ("mujoco/halfcheetah/medium-v0", -280.178953, 12135.0),
    ("mujoco/hopper/expert-v0", -20.272305, 3234.3),
    ("mujoco/walker2d/simple-v0", 1.629008, 4592.3),
    ("mujoco/ant/medium-v0", -325.6, 3879.7),
    ("D4RL/antmaze/umaze-v1", 0.0, 1.0),
    ("D4RL/pen/human-v2", 96.262799, 3076.8331017826877),
    ("D4RL/door/cloned-v2", -56.512833, 2880.5693087298737),
    ("D4RL/hammer/expert-v2", -274.856578, 12794.134825156867),
    ("D4RL/relocate/human-v2", -6.425911, 4233.877797728884),
    ("D4RL/kitchen/mixed-v2", 0.0, 4.0),
]


@pytest.mark.parametrize("name, low, high", D4RL)
def test_d4rl_reference_scores_by_prefix(root, name, low, high):
    """The numbers: d4rl/infos.py, https://github.com/Farama-Foundation/D4RL at 0ace16d."""
    env = load(root, name=name)
    np.testing.assert_allclose(env.score(np.array([low, (low + high) / 2, high])), [0, 50, 100], atol=1e-9)
    assert env.score_kind.startswith("normalised by D4RL's reference scores")
    hand = name.split("/")[1] in ("door", "hammer", "pen", "relocate")  # tests/test_recipes_adroit.py has whether it is
    assert env.score_kind.endswith("paid and ended as in D4RL") == hand


@pytest.mark.parametrize("name", ["D4RL/pointmaze/umaze-v2", "mujoco/humanoid/medium-v0", "mujoco/hopper-v0"])
def test_other_tasks_of_these_names_have_no_reference_scores(root, name):
    assert load(root, name=name).score_kind == "raw return"


@pytest.mark.parametrize(
    "rewards, terminate, score",
    [((0, 1), None, 100), ((0, 1), 2, 100), ((0,), None, 0), ((0, 1, 0), None, 100)],
    ids=["goes on at the goal", "ends there", "never there", "passes it"],
)
def test_an_episode_that_goes_on_at_its_goal_counts_once(root, rewards, terminate, score):
    """As Minari's D4RL/antmaze does, where the sum of rewards over [0, 1] gave scores such as 7640."""
    name = "D4RL/antmaze/umaze-v1"
    env = load(root, "stitch-test/Clock-v0", name=name, rewards=rewards, terminate=terminate)
    assert env.measure(zeros, None, [0], 2)["score"] == [score]
    assert "counts once" in env.score_kind
    env = load(root, "stitch-test/Clock-v0", name="D4RL/kitchen/mixed-v2", rewards=(2,))  # 8, where others count all
    assert env.measure(zeros, None, [0], 2)["score"] == [200]


# --- Evaluation ----------------------------------------------------------------------------------------


@pytest.fixture
def echo(root):
    env = load(root, NEVER, steps=9)
    env.probe()
    events(root, "reset")
    return env


def count_steps(env, seeds, num_episodes, **kwargs):
    """Shapes that the policy is called with."""
    policy, seen = witness()
    env.evaluate(policy, seeds, num_episodes, **kwargs)
    return [(obs.shape, obs.dtype, step) for obs, step, _, _ in seen]


def test_returns_are_undiscounted_sums_over_whole_episodes(root, echo):
    play = echo.evaluate(zeros, [4, 5], 3)
    assert play.returns.shape == (2, 3) and play.returns.dtype == np.float64
    steps = play.returns / (play.obs[..., 0].astype(float) + 204.8)  # each step pays start + 0.1 * 2048
    np.testing.assert_allclose(steps, steps.round(), rtol=1e-6)
    assert set(steps.round().ravel()) <= {3, 4, 5, 6} and len(set(steps.round().ravel())) > 1  # lengths differ
    assert len(events(root, "step")) == steps.round().sum()


def test_returns_are_summed_in_double_precision(root):
    env = load(root, "stitch-test/ClockWithoutLimit-v0", rewards=(0.1,), steps=3)
    assert env.evaluate(zeros, [0], 1).returns.item() == 0.1 + 0.1 + 0.1


def test_seeds_and_episodes_do_not_depend_on_each_other(echo):
    def policy(obs, step, memory, rewards):  # depends on the observation, and not on the place in the batch
        return np.stack([np.sin(37 * obs[..., 0]), np.cos(obs[..., 1])], axis=-1), None

    together = echo.evaluate(policy, [0, 3, 7], 4).returns
    np.testing.assert_array_equal(echo.evaluate(policy, [3], 4).returns, together[1:2])
    np.testing.assert_array_equal(echo.evaluate(policy, [7, 0], 2).returns, together[[2, 0], :2])
    again = echo.evaluate(policy, np.array([0, 3, 7]), 4).returns
    np.testing.assert_array_equal(again, together)
    assert len(np.unique(together)) == 12


def test_negative_seeds_are_seeds_too(echo):
    assert echo.evaluate(zeros, [-1], 2).returns[0, 0] != echo.evaluate(zeros, [0], 2).returns[0, 0]


def test_each_seed_acts_by_its_own_policy(echo):
    # Row i of the batch belongs to seed i: only seed 1 is paid for its actions
    def policy(obs, *others):
        return zeros(obs, *others)[0] + np.array([-1, 1])[:, None, None], None

    returns = echo.evaluate(policy, [2, 2], 3).returns
    steps = (returns[1] - returns[0]) / 409.6  # the same starts and lengths; 0.1 * 2 * (2048 - 0) more per step
    np.testing.assert_allclose(steps, steps.round(), rtol=1e-9)
    assert (steps.round() >= 3).all()


def test_one_policy_call_per_step_for_all_seeds_and_episodes(echo):
    shapes = count_steps(echo, [0, 1, 2], 20)
    # Echo ends after 3 to 6 steps: among 60 episodes one lasts 6
    assert shapes == [((3, 20, 2), np.dtype(np.float32), step) for step in range(6)]


def test_a_jitted_policy_is_traced_once(echo):
    traces = []

    @jax.jit
    def act(obs, step):
        traces.append(obs.shape)
        return jnp.zeros((*obs.shape[:2], 2)) + 0.01 * step

    def policy(obs, step, memory, rewards):
        return act(obs, step), None

    first = echo.evaluate(policy, [0, 1], 5).returns
    np.testing.assert_array_equal(echo.evaluate(policy, [0, 1], 5).returns, first)
    assert traces == [(2, 5, 2)]


def test_an_ended_episode_keeps_its_last_observation_and_reward(echo):
    policy, seen = witness()
    echo.evaluate(policy, [0], 20)
    clock = np.stack([obs for obs, *_ in seen])[:, 0, :, 1]  # (step, episode): Echo's own count of steps
    assert (clock == np.minimum(np.arange(len(seen))[:, None], clock[-1])).all()
    assert clock[-1].min() < len(seen) - 1
    rewards = np.stack([rewards for *_, rewards in seen])[:, 0]
    assert rewards.dtype == np.float32 and (rewards[0] == 0).all() and (rewards[1:] == rewards[1]).all()


def test_a_policy_has_a_memory_and_sees_its_last_reward(root):
    env = load(root, "stitch-test/Clock-v0", rewards=(3.0, 5.0, 7.0, 9.0))

    def policy(obs, step, memory, rewards):
        return zeros(obs, step, memory, rewards)[0], (memory or []) + [rewards[0, 0]]

    policy, seen = witness(policy)
    for _ in range(2):  # each evaluation begins with none
        seen.clear()
        env.evaluate(policy, [0], 1)
        assert [memory for _, _, memory, _ in seen] == [None, [0], [0, 3], [0, 3, 5]]


def test_an_environment_without_time_limit_stops_after_the_longest_episode_of_the_data(root, capsys):
    env = load(root, NEVER, steps=8, endless=True)
    assert len(count_steps(env, [0], 2)) == 8
    assert len(count_steps(env, [0], 2)) == 8
    assert capsys.readouterr().out.count("no time limit, so evaluation has the data's longest, 8 steps") == 1


def test_the_time_limit_is_the_environments_own(root, capsys):
    env = load(root, steps=2, endless=True)
    assert len(count_steps(env, [0], 2)) == 5
    assert "time limit" not in capsys.readouterr().out


@pytest.mark.parametrize("env_id, longest", [(NEVER, 3), ("stitch-test/Echo-v0", 3)])
def test_a_limit_may_be_given(root, capsys, env_id, longest):
    env = load(root, env_id, steps=8, endless=True)
    assert len(count_steps(env, [0], 2, max_steps=longest)) == longest
    assert env.measure(zeros, None, [0], 1, max_steps=2)["returns"].shape == (1, 1)
    assert "time limit" not in capsys.readouterr().out


def test_an_environment_may_truncate_by_itself(root):
    env = load(root, "stitch-test/ClockWithoutLimit-v0", truncate=3, steps=8)
    assert env.evaluate(zeros, [0], 2).returns.tolist() == [[3, 3]]


def test_the_evaluation_environment_of_the_file_is_used(root):
    episode = EpisodeBuffer(
        observations=sample(LABELS, 8),
        actions=np.zeros((7, 2), np.float32),
        rewards=np.zeros(7),
        terminations=np.zeros(7, bool),
        truncations=np.zeros(7, bool),
    )
    eval_env = gymnasium.make(NEVER, endless=True)
    minari.create_dataset_from_buffers(NAME, buffer=[episode], env="stitch-test/Echo-v0", eval_env=eval_env)
    assert len(count_steps(load_dataset(NAME)[1], [0], 1)) == 7


def test_a_short_evaluation_shows_no_progress(echo, capsys):
    echo.evaluate(zeros, [0], 2)
    assert capsys.readouterr().err == ""


def test_a_long_evaluation_shows_progress(echo, capsys, monkeypatch):
    asked = {}

    class Shown(environments.tqdm):
        def __init__(self, *args, **kwargs):
            asked.update(kwargs)
            super().__init__(*args, **kwargs | {"delay": 0})

    monkeypatch.setattr(environments, "tqdm", Shown)
    echo.evaluate(zeros, [0], 2)
    assert asked["delay"] == 10 and re.search(r"evaluation:.*/9", capsys.readouterr().err)


# --- True values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, (7.0, 1 + 2 / 2 + 4 / 4)),
        ({"reward_shift": -1.0}, (4.0, 0 + 1 / 2 + 3 / 4)),
        ({"normalize_reward": True}, (3500.0, 1500.0)),  # returns of the data are 1 and 3: 1000 / 2 for each reward
        ({"normalize_reward": True, "reward_shift": 1.0}, (3503.0, 1501.75)),
    ],
)
def test_the_true_value_is_of_the_rewards_that_the_algorithm_sees(root, options, expected):
    """Rewards 1, 2, 4; discounts 1 and 1/2, one for each seed."""
    env = gymnasium.make("stitch-test/ClockWithoutLimit-v0", rewards=(1.0, 2.0, 4.0), terminate=3)
    buffer = [
        EpisodeBuffer(
            observations=np.zeros((n + 1, 2)),
            actions=np.zeros((n, 2), np.float32),
            rewards=np.ones(n),
            terminations=np.zeros(n, bool),
            truncations=np.arange(1, n + 1) == n,
        )
        for n in (1, 3)
    ]
    minari.create_dataset_from_buffers(NAME, buffer=buffer, env=env)
    env = load_dataset(NAME, **options)[1]
    columns = env.measure(zeros, lambda obs, action: obs[..., 0] + 5.0, [0, 1], 2, np.array([1.0, 0.5]))
    np.testing.assert_allclose(columns["true_value"], expected)
    np.testing.assert_allclose(columns["believed_value"], [5, 5])  # weights sum to 1
    np.testing.assert_array_equal(columns["returns"], [[7, 7], [7, 7]])  # of the environment's own rewards
    np.testing.assert_array_equal(columns["score"], [7, 7])


def test_believed_values_are_weighted_by_how_likely_a_start_is(root):
    """Chain starts in state 1 or 2 with probabilities 1/4 and 3/4. Seed 0 takes the reward at once in state 1 and never
    in state 2: 1/4. Seed 1 takes it in both: 1."""
    env = load(root, "stitch-test/Chain-v0", steps=3)
    assert env.score_kind == "raw return, exact" and not env._workers

    def policy(obs, step, memory, rewards):
        states = obs.argmax(axis=-1)  # (seeds, states)
        return np.stack([states[0] == 1, states[1] >= 1, (states[2] >= 1) & (step > 0)]).astype(int), None

    def q(obs, action):
        return 10.0 * obs.argmax(axis=-1) + action

    columns = env.measure(policy, q, [0, 1, 2], 2, discount=0.5)
    # Seed 2 takes it in half of the draws: 1/2 at the first step and 1/4 at the second, discounted by 1/2
    np.testing.assert_allclose(columns["true_value"], [0.25, 1.0, 0.5 + 0.5 * 0.25])
    np.testing.assert_allclose(columns["returns"][:, 0], [0.25, 1.0, 0.75])
    np.testing.assert_allclose(columns["believed_value"], [17.5 + 0.25, 17.5 + 1, 17.5])  # 10/4 + 20 * 3/4 = 17.5
    assert env.measure(policy, q, [0, 1, 2], 2, max_steps=1)["returns"][2, 0] == 0.5
    env._reward_scale = 4.0  # as normalize_reward sets it
    np.testing.assert_allclose(env.measure(policy, q, [0, 1, 2], 2)["true_value"], [1.0, 4.0, 3.0])
    env = load_dataset(NAME, reward_shift=-1.0)[1]
    assert np.isnan(env.measure(policy, q, [0, 1, 2], 2)["true_value"]).all()


def test_the_starts_and_the_actions_there_are_handed_back(echo):
    policy, seen = witness(lambda obs, step, *_: (np.full((*obs.shape[:2], 2), 0.1 * step, np.float32), None))
    play = echo.evaluate(policy, [0, 1], 3)
    np.testing.assert_array_equal(play.obs, seen[0][0])
    np.testing.assert_array_equal(play.action, np.zeros((2, 3, 2)))
    np.testing.assert_allclose(play.weight, np.full(3, 1 / 3))


# --- Workers -------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_workers(root):
    def policy(obs, step, memory, rewards):
        return np.stack([np.sin(37 * obs[..., 0]), np.cos(obs[..., 1] + rewards)], axis=-1), None

    plays = []
    for number in (1, 2, 3):
        env = load(root, NEVER, name=f"test/of{number}-v0", steps=9)
        env.num_workers = number
        plays += [env.evaluate(policy, [0, 3, 7], 4, discount=np.array([0.9, 0.99, 1.0])) for _ in range(2)]
        assert len(env._workers) == number
    for play in plays[1:]:
        for one, other in zip(plays[0], play, strict=True):
            np.testing.assert_array_equal(one, other)


def test_workers_are_one_per_core_and_keep_their_environments(root):
    """Sayer pays the number of its process, and shows how many episodes it has begun."""
    env = load(root, "stitch-test/Sayer-v0")
    env.num_workers = 2
    first, second = env.evaluate(zeros, [0], 3), env.evaluate(zeros, [0], 3)
    np.testing.assert_array_equal(first.returns, second.returns)
    pids = first.returns[0] / 4
    assert pids[0] == pids[2] != pids[1] and os.getpid() not in pids
    np.testing.assert_array_equal(first.obs[0, :, 1], [2, 1, 1])  # the first one took the probe's step as well
    np.testing.assert_array_equal(second.obs[0, :, 1], [3, 2, 2])
    one = env.evaluate(zeros, [0], 1)  # no more workers than environments
    assert one.returns[0, 0] == first.returns[0, 0] and one.obs[0, 0, 1] == 4


SCRIPT = """
import os, sys
print("main runs")
sys.path.insert(0, {tests!r})
import numpy as np
from common.datasets import load_dataset
env = load_dataset({name!r})[1]
env.num_workers = 2
policy = lambda obs, *_: (np.zeros((*obs.shape[:2], 2), np.float32), None)
print(env.evaluate(policy, [0], 2).returns.tolist(), "jax" in sys.modules, flush=True)
print("pids", *[process.pid for _, process in env._workers], flush=True)
{end}
"""


def run_script(root, end="", by="stdin"):
    text = SCRIPT.format(tests=os.path.dirname(__file__), name=NAME, end=end)
    path = root / "script.py"
    path.write_text(text)
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *([str(path)] if by == "file" else ["-"])]
    return subprocess.run(
        command, input=text if by == "stdin" else None, capture_output=True, text=True, env=environ, timeout=120
    )


@pytest.mark.parametrize("by", ["file", "stdin"])
def test_workers_do_not_import_the_callers_main_module(root, by):
    """A script without `if __name__ == "__main__"` would start itself again in each of them."""
    record(root, "stitch-test/Clock-v0")
    run = run_script(root, by=by)
    assert run.returncode == 0 and run.stdout.count("main runs") == 1 and "[[4.0, 4.0]]" in run.stdout, run
    assert run.stderr == ""


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "os._exit(3)", "raise ValueError"])
def test_workers_end_with_their_caller(root, end):
    record(root, "stitch-test/Clock-v0", fault="thread", of=1)
    run = run_script(root, end)
    pids = [int(pid) for pid in re.search(r"^pids (.*)$", run.stdout, re.M)[1].split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_import_no_jax(root):
    env = load(root, "stitch-test/Clock-v0", fault="modules")
    env.measure(zeros, None, [0], 1)
    assert "JAX is imported: False" in env.score_kind


def test_ctrl_c_is_for_the_caller(root):
    env = load(root, "stitch-test/Clock-v0")
    env.probe()
    os.kill(env._workers[0][1].pid, signal.SIGINT)
    assert env.evaluate(zeros, [0], 1).returns == 4


# --- What fails in an environment costs a score, and not the training ------------------------------------------

FATAL = {
    "raises": "RuntimeError: the simulator has lost its licence.",
    "asserts": "AssertionError, in echo.py",
    "interrupts": "KeyboardInterrupt",
    "sys.exit": "SystemExit",
    "os._exit": "its process ended with exit code 0",
    "abort": "its process ended with exit code -6",
    "kill": "its process ended with exit code -9: out of memory",
    "four": "expected 5, got 4",
    "shape": "cannot reshape array of size 1 into shape (2,)",
    "matrix": "not 2 finite numbers",
    "nan observation": "not 2 finite numbers",
    "no observation": "",
    "nan": "its reward is nan, not one finite number",
    "inf": "its reward is inf",
    "none": "its reward is nan",
    "two rewards": "its reward is [1. 1.]",
    "word": "could not convert string to float",
}


OF_A_RESET = "raises", "sys.exit", "abort", "reset", "shape"


@pytest.mark.parametrize("fault, at", [*((fault, 3) for fault in FATAL), *((fault, 0) for fault in OF_A_RESET)])
def test_a_fault_in_a_later_episode(root, capsys, fault, at):
    """In the third step, or in the reset, of the third episode: the probe and the first evaluation pass."""
    env = load(root, "stitch-test/Clock-v0", fault=fault, at=at, of=3)
    env.num_workers = 1
    assert env.measure(zeros, None, [0], 1)["score"] == [4.0] and env.score_kind == "raw return"
    columns = env.measure(zeros, lambda obs, action: obs[..., 0], [0, 1], 1)
    assert {name: x.shape for name, x in columns.items()} == {
        "score": (2,),
        "returns": (2, 1),
        "believed_value": (2,),
        "true_value": (2,),
    }
    assert all(np.isnan(x).all() for x in columns.values())
    assert env.score_kind.startswith("not scored: the evaluation failed (")
    assert ("expected 2, got 1" if fault == "reset" else FATAL[fault]) in env.score_kind
    assert "\n" not in env.score_kind and not re.search(r"\(\w+: ?\)|: ?\)", env.score_kind)
    assert capsys.readouterr().out.count("training goes on without a score") == 1
    assert env.measure(zeros, None, [0], 1)["score"] == [4.0] and env.score_kind == "raw return"  # a new worker
    if fault == "raises":
        env.measure(zeros, None, [0, 1], 1)
        env.measure(zeros, None, [0, 1], 1)
        assert "not scored" in env.score_kind and capsys.readouterr().out == ""  # said once


def test_an_observation_of_another_shape_is_seen_where_a_worker_steps_one_environment_alone(root):
    env = load(root, "stitch-test/Clock-v0", fault="matrix", at=3, of=2)
    env.measure(zeros, None, [0], 1)
    assert "not 2 finite numbers" in env.score_kind


@pytest.mark.parametrize("fault, at", [("abort", 1), ("four", 1), ("nan", 1), *((fault, 0) for fault in OF_A_RESET)])
def test_a_fault_in_the_first_reset_or_step(root, capsys, fault, at):
    env = load(root, "stitch-test/Clock-v0", fault=fault, at=at, of=1)
    for _ in range(2):
        columns = env.measure(zeros, None, [0, 1], 3)
        assert np.isnan(columns["score"]).all() and columns["returns"].shape == (2, 3)
    assert env.score_kind.startswith("not scored: the environment cannot be used (")
    assert capsys.readouterr().out.count("training goes on without a score") == 1
    assert not env._workers


@pytest.mark.parametrize("kind", ["array", "matrix of one", "array end"])
def test_one_number_in_an_array_is_a_number(root, kind):
    env = load(root, "stitch-test/Clock-v0", fault=kind, at=1, of=2, rewards=(2.5, 1.0))
    assert env.measure(zeros, None, [0], 1)["returns"] == [[5.5]]


def test_an_environment_that_does_not_answer(root, monkeypatch):
    env = load(root, "stitch-test/Clock-v0", fault="sleep", at=1, of=2)
    env.probe()
    connection, process = env._workers[0]
    poll = connection.poll
    monkeypatch.setattr(type(connection), "poll", lambda self, timeout: poll(timeout / 3000))
    env.measure(zeros, None, [0], 1)
    assert "no answer in 600 s" in env.score_kind
    process.join(5)
    assert process.exitcode == -signal.SIGTERM


def cannot(x, *_):
    raise FloatingPointError("the policy's own")


def test_a_policy_or_a_critic_that_fails_costs_no_training_either(root):
    env = load(root, "stitch-test/Clock-v0")
    assert np.isnan(env.measure(cannot, None, [0], 1)["score"]).all()
    assert "FloatingPointError: the policy's own" in env.score_kind
    columns = env.measure(zeros, cannot, [0], 1)
    assert "FloatingPointError" in env.score_kind and np.isnan(columns["score"]).all()
    assert env.measure(zeros, None, [0], 1)["score"] == [4]
    with pytest.raises(FloatingPointError):  # for whoever asks for the episodes themselves
        env.evaluate(cannot, [0], 1)


def test_a_run_that_diverged_has_no_score_and_the_others_keep_theirs(root, capsys):
    def policy(obs, step, memory, rewards):
        actions = zeros(obs, step, memory, rewards)[0]
        actions[1] = np.nan if step >= 2 else 0
        return actions, None

    env = load(root, "stitch-test/Clock-v0")
    columns = env.measure(policy, lambda obs, action: action.sum(-1), [0, 1, 2], 2)
    np.testing.assert_array_equal(columns["score"], [4, np.nan, 4])
    np.testing.assert_array_equal(columns["true_value"], [4, np.nan, 4])
    env.measure(policy, None, [0, 1, 2], 2)
    assert capsys.readouterr().out.count("actions are not finite") == 1 and env.score_kind == "raw return"


@pytest.mark.parametrize(
    "edit, reason",
    [
        ({"env_spec": None}, "env_spec is None"),
        ({"spec": {"entry_point": "echo:cannot_be_made"}}, "no display"),
        ({"spec": {"entry_point": "echo:no_such_class"}}, "no_such_class"),
        ({"spec": {"entry_point": "__main__:Mine"}}, "keep it in a module"),
        ({"spec": {"entry_point": "os:getcwd"}}, ""),
        ({"spec": {"entry_point": "no_such_package.envs:Env"}}, "install the package that registers it, or,"),
        ({"spec": {"entry_point": "no_such_package:Env"}, "requirements": ["no-such-package>=1.2"]}, "PYTHONPATH"),
        ({"spec": {"entry_point": "no_such_package:Env"}, "requirements": "numpy"}, "install numpy,"),
        ({"spec": {"kwargs": {"no_such_argument": 1}}}, "no_such_argument"),
        ({"spec": {"kwargs": {"num_actions": 3}}}, "its actions are Discrete(3), the dataset's Box(0.0, 2048.0"),
        ({"spec": {"kwargs": {"observation": "discrete"}}}, "its observations are Discrete(4, start=2)"),
    ],
)
def test_an_environment_that_cannot_be_recreated_does_not_stop_loading(root, capsys, edit, reason):
    record(root, edit=edit)
    data, env = load_dataset(NAME)
    assert len(data.obs) == 4
    returns = env.evaluate(zeros, [0, 1], 3).returns
    assert returns.shape == (2, 3) and np.isnan(returns).all() and np.isnan(env.score(returns)).all()
    assert env.score_kind.startswith("not scored") and reason in env.score_kind
    assert not re.search(r": ?\)", env.score_kind)
    assert "training goes on" in capsys.readouterr().out


def test_windows_and_videos_are_no_part_of_the_task(root):
    """Clock ends the process where it is told to render."""
    wrappers = [
        {"name": "HumanRendering", "entry_point": "gymnasium.wrappers:HumanRendering", "kwargs": {}},
        {"name": "RecordVideo", "entry_point": "gymnasium.wrappers:RecordVideo", "kwargs": {"video_folder": "x"}},
    ]
    edit = {"spec": {"kwargs": {"render_mode": "human"}, "additional_wrappers": wrappers}}
    assert load(root, "stitch-test/Clock-v0", edit=edit).evaluate(zeros, [0], 1).returns == 4


BOX = spaces.Box(-1, 1, (2,))
SPACES = {  # name: dataset's, environment's, the same as an action, the same as an observation
    "equal": (BOX, spaces.Box(-1, 1, (2,)), True, True),
    "precision": (BOX, spaces.Box(-1, 1, (2,), np.float64), True, True),
    "rounded": (spaces.Box(-0.1, 0.1, (2,), np.float64), spaces.Box(-0.1, 0.1, (2,)), True, True),
    "high": (BOX, spaces.Box(-1, 5, (2,)), False, False),
    "low": (BOX, spaces.Box(-5, 1, (2,)), False, False),
    "one bound": (BOX, spaces.Box(np.array([-1, -1]), np.array([1, 2]), dtype=np.float32), False, False),
    "tiny": (BOX, spaces.Box(-1.001, 1.001, (2,)), False, False),
    "length": (BOX, spaces.Box(-1, 1, (3,)), False, False),
    "rank": (BOX, spaces.Box(-1, 1, (2, 1)), False, False),
    "scalar": (spaces.Box(-1, 1, (1,)), spaces.Box(-1, 1, ()), False, False),
    "integers": (BOX, spaces.Box(-1, 1, (2,), np.int8), False, False),
    "bytes": (spaces.Box(0, 1, (2,)), spaces.Box(0, 255, (2,), np.uint8), False, False),
    "no bounds": (BOX, spaces.Box(-np.inf, np.inf, (2,)), False, True),
    "had no bounds": (spaces.Box(-3.4e38, np.inf, (2,)), BOX, False, True),
    "discrete": (BOX, spaces.Discrete(2), False, False),
    "n": (spaces.Discrete(3), spaces.Discrete(4), False, False),
    "start": (spaces.Discrete(3), spaces.Discrete(3, start=1), False, False),
    "same": (spaces.Discrete(3, start=1), spaces.Discrete(3, start=1), True, True),
    "multi": (spaces.Discrete(3), spaces.MultiDiscrete([3]), False, False),
    "dict": (spaces.Dict(a=BOX, b=BOX), spaces.Dict(b=BOX, a=BOX), True, True),
    "keys": (spaces.Dict(a=BOX, b=BOX), spaces.Dict(a=BOX, c=BOX), False, False),
    "more keys": (spaces.Dict(a=BOX), spaces.Dict(a=BOX, b=BOX), False, False),
    "within": (spaces.Dict(a=spaces.Dict(b=BOX)), spaces.Dict(a=spaces.Dict(b=spaces.Discrete(2))), False, False),
    "no dict": (spaces.Dict(a=BOX), BOX, False, False),
}


@pytest.mark.parametrize("name", SPACES)
def test_spaces_of_the_environment_are_compared_with_the_datasets(name):
    ours, its, action, observation = SPACES[name]
    assert worker._alike(its, ours, bounds=True) == action
    assert worker._alike(its, ours, bounds=False) == observation


def test_an_environment_with_other_bounds_is_not_scored(root):
    env = load(root, low=-1.0, high=1.0, edit={"spec": {"kwargs": {"low": -5.0, "high": 5.0}}})
    assert np.isnan(env.measure(zeros, None, [0], 1)["score"])
    assert "its actions are Box(-5.0, 5.0, (2,), float32), the dataset's Box(-1.0, 1.0, (2,)" in env.score_kind


def test_kitchen_has_a_cause(root):
    """gymnasium-robotics asserts `np.int32 in (enum, ...)`, which is false from mujoco 3.12 on."""
    robotics = pytest.importorskip("gymnasium_robotics")
    mujoco = pytest.importorskip("mujoco")
    gymnasium.register_envs(robotics)
    spec = json.loads(gymnasium.spec("FrankaKitchen-v1").to_json())
    env = load(root, edit={"spec": spec})
    env.probe()
    if tuple(map(int, mujoco.__version__.split(".")[:2])) >= (3, 12):
        assert "pip install 'mujoco<3.12'" in env.score_kind
    else:
        assert "its actions are" in env.score_kind  # it can be made, and is not Echo


# --- What measure, summary and provenance say --------------------------------------------------------------


def test_no_episodes_need_no_environment(root, capsys):
    env = load(root, edit={"spec": {"entry_point": "os:abort"}})
    columns = env.measure(zeros, zeros, [0, 1], 0)
    assert columns["returns"].shape == (2, 0) and np.isnan(columns["score"]).all()
    assert env.score_kind == "not scored: eval_episodes is 0" and not env._workers
    assert "training goes on" not in capsys.readouterr().out


def test_summary_and_sentence(root):
    env = load(root, "stitch-test/Clock-v0")
    columns = env.measure(zeros, None, [4, 5], 3)
    lines = [
        {"step": 8, "seed": seed, "grid": {"beta": 1.0}, "diverged": False, "score": score, "returns": returns.tolist()}
        for seed, score, returns in zip([4, 5], [4.0, 6.0], columns["returns"], strict=True)
    ]
    summary = env.summary([lines[0] | {"step": 4, "score": 99.0}, *lines])  # of the last evaluation alone
    assert summary["seeds"] == [4, 5] and summary["grid"] == [{"beta": 1.0}] * 2 and summary["diverged"] == [False] * 2
    assert summary["returns"] == [[4.0] * 3] * 2 and list(summary["score_per_seed"]) == [4, 6]
    assert (summary["score_mean"], summary["score_std"]) == (5, 1)
    assert summary["score_kind"] == "raw return"
    assert env.sentence(summary) == f"{NAME}: score 5.0 +- 1.0 over 2 runs (raw return)"
    lines[1] |= {"diverged": True, "score": None}
    summary = env.summary(lines)
    assert np.isnan(summary["score_mean"])  # what is missing is not hidden by the others
    assert "2 runs, 1 of which diverged (" in env.sentence(summary)


def test_provenance_without_git_or_packages(monkeypatch, tmp_path):
    here = provenance()
    assert set(here) == {"command", "commit", "versions"} and here["versions"]["numpy"] == np.__version__
    extras = {"icu-sepsis", "ogbench", "minatar", "ale-py", "sumo-rl", "libsumo", "highway-env", "overcooked-ai"}
    assert {"mujoco", *extras} <= here["versions"].keys()
    assert here["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", here["commit"])
    real = environments.importlib.metadata.version

    def version(name):
        if name == "mujoco":
            raise environments.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(environments.importlib.metadata, "version", version)
    assert provenance()["versions"]["mujoco"] is None and provenance()["versions"]["numpy"] == np.__version__
    monkeypatch.setattr(environments, "__file__", str(tmp_path / "it's common" / "environments.py"))
    (tmp_path / "it's common").mkdir()
    assert provenance()["commit"] is None  # "fatal: not a git repository" was taken for one
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None
    monkeypatch.undo()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # "fatal: detected dubious ownership"
    assert provenance()["commit"] is None


# --- Termination ---------------------------------------------------------------------------------------

REAL = {
    "Hopper-v5": {},
    "Hopper-v5 other": {"healthy_z_range": [1.0, 1.3], "healthy_angle_range": [-0.05, 0.05]},
    "Hopper-v5 state": {"healthy_state_range": [-2.0, 2.0]},
    "Hopper-v5 never": {"terminate_when_unhealthy": False},
    "Walker2d-v5": {},
    "Walker2d-v5 other": {"healthy_z_range": [1.0, 1.26], "healthy_angle_range": [-0.1, 0.2]},
    "HalfCheetah-v5": {},
    "Ant-v5": {},
    "Ant-v5 other": {"healthy_z_range": [0.4, 0.9], "include_cfrc_ext_in_observation": False},
    "Humanoid-v5": {},
    "InvertedPendulum-v5": {},
    "CartPole-v1": {},
}


def interface_of(env):
    observation = layouts.layout(env.observation_space)
    zero = [0.0] * layouts.width(observation)
    termination = environments._termination(env.spec, observation)
    return Interface(*json.loads(json.dumps(Interface(observation, {"n": 2, "start": 0}, zero, zero, termination))))


@pytest.mark.parametrize("name", REAL)
def test_termination_is_the_environments(name):
    """Random actions: every step, terminal ones too, of NumPy and of JAX."""
    pytest.importorskip("mujoco")
    env = gymnasium.make(name.split()[0], max_episode_steps=200, **REAL[name])
    terminal_of = interface_of(env).spec.terminal_of
    env.action_space.seed(0)
    rows, ended = [], []
    for seed in range(12):
        env.reset(seed=seed)
        over = False
        while not over:
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            rows.append(obs)
            ended.append(terminated)
            over = terminated or truncated
    rows, ended = np.stack(rows).astype(np.float32), np.array(ended)
    assert ended.any() == (name.split()[0] != "HalfCheetah-v5" and "never" not in name) and not ended.all()
    for got in (terminal_of(rows), jax.jit(terminal_of)(jnp.asarray(rows)), terminal_of(rows[None, :, None])[0, :, 0]):
        np.testing.assert_array_equal(got, ended)
    assert terminal_of(rows[0]) == ended[0] and terminal_of(rows).dtype == bool


@pytest.mark.parametrize(
    "name, length, values, ended",
    [
        ("Hopper", 11, {0: 0.71, 1: 0.19}, False),
        ("Hopper", 11, {0: 0.70, 1: 0.0}, True),
        ("Hopper", 11, {0: 1.2, 1: 0.2}, True),
        ("Hopper", 11, {0: 1.2, 5: -150.0}, True),  # abs(x < 100), as copied by half a dozen projects, is alive here
        ("Hopper", 11, {0: 1.2, 5: 150.0}, True),
        ("Hopper", 11, {0: 1.2, 10: np.nan}, True),
        ("Hopper", 11, {0: np.inf}, True),
        ("Walker2d", 17, {0: 0.8}, True),
        ("Walker2d", 17, {0: 2.0}, True),
        ("Walker2d", 17, {0: 1.5, 1: 0.99, 9: -150.0}, False),
        ("Ant", 27, {0: 0.2}, False),
        ("Ant", 27, {0: 1.0}, False),
        ("Ant", 105, {0: 1.01}, True),
        ("Ant", 105, {0: 0.5, 77: np.inf}, True),
        ("HalfCheetah", 17, {0: -150.0}, False),
    ],
)
def test_termination_of_known_numbers(name, length, values, ended):
    """The sheet's (model-based, A9.10)."""
    spec = gymnasium.spec(f"{name}-v5")
    terminal_of = Interface(
        [length], {"n": 2, "start": 0}, [], [], environments._termination(spec, [length])
    ).spec.terminal_of
    obs = np.zeros(length, np.float32)
    for column, value in values.items():
        obs[column] = value
    assert terminal_of(obs) == ended and terminal_of(jnp.asarray(obs)) == ended


def test_termination_is_none_where_it_is_not_known():
    spec = gymnasium.spec("Hopper-v5")
    make = environments._termination
    assert make(spec, [11]) and not make(None, [11]) and not make(spec, [12]) and not make(spec, {"n": 11, "start": 0})
    assert not make(gymnasium.spec("stitch-test/Echo-v0"), [2])
    scaled = gymnasium.wrappers.RescaleObservation
    wrapped = gymnasium.make("CartPole-v1", disable_env_checker=True)
    wrapped = gymnasium.wrappers.NormalizeObservation(wrapped)
    assert scaled and not make(wrapped.spec, [4])
    other = gymnasium.make("Hopper-v5").spec
    other.kwargs["xml_file"] = "walker2d.xml"
    assert not make(other, [11])


def test_a_dataset_of_a_known_environment_has_its_termination(root):
    env = load(root, "CartPole-v1")
    assert env.spec.terminal_of(np.array([2.41, 0, 0, 0])) and not env.spec.terminal_of(np.array([2.39, 0, 0.2, 0]))
    again = Interface(*json.loads(json.dumps(env.interface)))
    assert again == env.interface and again.spec.terminal_of(np.array([0, 0, 0.21, 0]))
    assert load(root, name="test/other-v0").spec.terminal_of is None
