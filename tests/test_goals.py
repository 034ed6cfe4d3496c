"""Data and environments of goal-conditioned methods: the goal apart from the observation, and the tasks in turn."""

import json

import gymnasium
import minari
import numpy as np
import pytest
from echo import Reach
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from common import environments
from common.datasets import DatasetError, load_dataset
from common.environments import Interface, Spec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors and descriptions

NAME = "test/goals-v0"
TASKS = [{"task_id": 1}, {"task_id": 2}]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def record(root, form="box", lengths=(3, 2), tasks=None, **kwargs):
    """Observation t of episode k is 10 k + t in each number that is no goal, 100 + 10 k + t in an achieved goal, and
    9999 in a desired one."""
    env = gymnasium.make("stitch-test/Reach-v0", form=form, **kwargs)
    buffers = []
    for k, length in enumerate(lengths):
        label, end = (10.0 * k + np.arange(length + 1))[:, None], np.arange(1, length + 1) == length
        observations = label + [0, 0.5]
        if form == "dict":
            observations = {"observation": label, "achieved_goal": 100 + label + [0, 0.5]}
            observations["desired_goal"] = np.full((length + 1, 2), 9999.0)
        fields = {"rewards": np.zeros(length), "terminations": end & False, "truncations": end}
        buffers.append(EpisodeBuffer(observations=observations, actions=np.zeros((length, 1), np.float32), **fields))
    minari.create_dataset_from_buffers(NAME, buffer=buffers, env=env)
    if tasks is not None:
        path = root / NAME / "data" / "metadata.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_tasks": tasks}))


def load(root, *args, options=None, **kwargs):
    record(root, *args, **kwargs)
    return load_dataset(NAME, goals=True, **(options or {}))


def towards(obs, step, memory, rewards):
    """To the goal, with the greatest steps, where (observation, goal) is ((x, 7), (x, 7)) of a Box."""
    return np.clip(obs[..., 2:3] - obs[..., :1], -1, 1), None


def nowhere(obs, *_):
    return np.zeros((*obs.shape[:2], 1), np.float32), None


def watched(policy, seen):
    return lambda obs, *rest: (seen.append(obs.copy()), policy(obs, *rest))[1]


# --- Data --------------------------------------------------------------------------------------------------


def test_of_a_dict_the_observation_leaves_the_desired_goal_out(root):
    data, env = load(root, "dict", options={"columns": ("end",)})
    # The rest is in the sorted order of its keys: achieved_goal (2), observation (1)
    obs = np.array([[100, 100.5, 0], [101, 101.5, 1], [102, 102.5, 2], [110, 110.5, 10], [111, 111.5, 11]])
    np.testing.assert_array_equal(data.obs, obs)
    np.testing.assert_array_equal(data.next_obs, obs + 1)
    np.testing.assert_array_equal(data.achieved, obs[:, :2])
    np.testing.assert_array_equal(data.end, [2, 2, 2, 4, 4])
    assert (data.achieved.dtype, data.end.dtype) == (np.float32, np.int32)
    assert env.spec == Spec(obs_dim=3, action_dim=1, goal_dim=2)


def test_of_a_box_any_observation_is_a_goal(root):
    data, env = load(root)
    np.testing.assert_array_equal(data.obs, [[0, 0.5], [1, 1.5], [2, 2.5], [10, 10.5], [11, 11.5]])
    assert data.achieved is None  # no second copy
    assert env.spec == Spec(obs_dim=2, action_dim=1, goal_dim=2)


def test_without_goals_all_is_as_ever(root):
    record(root, "dict")
    data, env = load_dataset(NAME)
    assert data.achieved is None and env.spec == Spec(obs_dim=5, action_dim=1)
    np.testing.assert_array_equal(data.obs[0], [100, 100.5, 9999, 9999, 0])
    assert env.fingerprint == load_dataset(NAME, goals=True)[1].fingerprint  # of the data, whatever is made of them


@pytest.mark.parametrize("form, goal", [("box", [0, 1]), ("dict", [0, 1])])
def test_goals_are_normalised_as_the_same_numbers_in_observations(root, form, goal):
    plain, _ = load(root, form)
    data, env = load_dataset(NAME, goals=True, normalize_obs=True)
    mean, scale = plain.obs.mean(axis=0), plain.obs.std(axis=0) + 1e-3
    np.testing.assert_allclose(data.obs, (plain.obs - mean) / scale, rtol=1e-5, atol=1e-6)
    if form == "dict":
        np.testing.assert_array_equal(data.achieved, data.obs[:, goal])
    seen = []
    env.evaluate(watched(nowhere, seen), [0], 1)
    raw = []
    load_dataset(NAME, goals=True)[1].evaluate(watched(nowhere, raw), [0], 1)
    mean, scale = np.append(mean, mean[goal]), np.append(scale, scale[goal])
    np.testing.assert_allclose(seen[0], (raw[0] - mean) / scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3),
        spaces.Dict({"observation": spaces.Box(0, 1, (2,)), "achieved_goal": spaces.Box(0, 1, (2,))}),
        spaces.Dict({"achieved_goal": spaces.Box(0, 1, (2,)), "desired_goal": spaces.Box(0, 1, (1,))}),
        spaces.Dict({"observation": spaces.Box(0, 1, (2,)), "desired_goal": spaces.Box(0, 1, (2,))}),
    ],
    ids=["discrete", "no desired goal", "other shape", "no achieved goal"],
)
def test_data_without_goals_are_refused_in_one_sentence(root, space):
    samples = [space.sample() for _ in range(3)]
    whole = {key: np.stack([x[key] for x in samples]) for key in space} if isinstance(space, spaces.Dict) else samples
    end = np.array([False, True])
    buffer = [EpisodeBuffer(observations=whole, actions=np.zeros((2, 1), np.float32), rewards=np.zeros(2),
                            terminations=end & False, truncations=end)]  # fmt: skip
    minari.create_dataset_from_buffers(
        NAME, buffer=buffer, observation_space=space, action_space=spaces.Box(-1, 1, (1,)), env=None
    )
    assert len(load_dataset(NAME)[0].obs) == 2
    with pytest.raises(DatasetError, match="needs observations in a Box.*achieved_goal and desired_goal.*again so"):
        load_dataset(NAME, goals=True)


# --- Evaluation --------------------------------------------------------------------------------------------


def test_a_policy_is_handed_the_observation_and_then_the_goal(root):
    _, env = load(root, tasks=[{"goal": [3.0, 7.0]}, {"goal": [4.0, 7.0]}])
    seen = []
    play = env.evaluate(watched(towards, seen), [0], 2)
    assert {obs.shape for obs in seen} == {(1, 2, 4)}
    for obs in seen:  # to the last step
        np.testing.assert_array_equal(obs[0, :, 1:], [[7, 3, 7], [7, 4, 7]])
    np.testing.assert_array_equal(play.obs, seen[0])
    np.testing.assert_array_equal(play.returns, [[1, 1]])


def test_a_dict_says_its_goal_itself(root):
    _, env = load(root, "dict", tasks=[{"goal": [3.0, 7.0]}])
    seen = []
    env.evaluate(watched(nowhere, seen), [0], 1)
    # achieved_goal (2), observation: the step, desired_goal (2)
    np.testing.assert_array_equal(np.concatenate(seen)[:, 0, 1:], [[7, t, 3, 7] for t in range(len(seen))])


def test_episodes_play_the_tasks_in_turn_and_the_score_is_success(root):
    _, env = load(root, tasks=[{"goal": [1.0, 7.0]}, {"goal": [90.0, 7.0]}])  # the second is too far away
    runs = env.measure(towards, None, [0, 1, 2], 4)
    np.testing.assert_array_equal(runs["returns"], [[1, 0, 1, 0]] * 3)
    np.testing.assert_array_equal(runs["score"], [50.0] * 3)
    assert env.score_kind == "success, %, mean over 2 tasks"
    lines = [
        {"step": 5, "seed": i, "grid": {}, "score": x, "returns": np.array([1, 0, 1, x]), "diverged": False}
        for i, x in enumerate([0.0, 1.0])
    ]
    np.testing.assert_array_equal(env.summary(lines)["success_per_task"], [[100, 0], [100, 50]])
    lines[0]["returns"] = [1, 3, 1, None]  # reached again and again counts once; an episode without a score
    np.testing.assert_array_equal(env.summary(lines)["success_per_task"], [[100, np.nan], [100, 50]])
    assert env.score(np.array([0.0, 1.0, 3.0])).tolist() == [0, 100, 100]


def test_without_tasks_nothing_is_said_of_them(root):
    _, env = load(root)
    lines = [{"step": 5, "seed": 0, "grid": {}, "score": 1.0, "returns": [1, 0], "diverged": False}]
    assert "success_per_task" not in env.summary(lines) and env.score_kind == "raw return"
    assert env.probe(3)


def test_episodes_must_be_a_multiple_of_the_tasks(root):
    _, env = load(root, tasks=TASKS)
    with pytest.raises(DatasetError, match="evaluated on 2 tasks in turn, and 3 episodes.*set eval_episodes to 4"):
        env.probe(3)
    assert not env._workers  # nothing has been made yet
    assert env.probe(4) and not env.probe(0)
    np.testing.assert_array_equal(env.measure(nowhere, None, [0], 0)["returns"].shape, (1, 0))
    lines = [{"step": 5, "seed": 0, "grid": {}, "score": None, "returns": [], "diverged": False}]
    assert "success_per_task" not in env.summary(lines)


@pytest.mark.parametrize("tasks", [[], {}, {"task_id": 1}, [{}], [1, 2], None, [None, {"task_id": 1}], "task"])
def test_tasks_that_are_none_are_refused_in_one_sentence(root, tasks):
    record(root)
    path = root / NAME / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eval_tasks": tasks}))
    with pytest.raises(DatasetError, match=r'eval_tasks .* must be a list of options .*\[{"task_id": 1}'):
        load_dataset(NAME, goals=True)


def test_an_environment_that_says_no_goal_is_not_scored(root, capsys):
    data, env = load(root, silent=True)
    assert len(data.obs) == 5 and not env.probe()
    assert 'its reset gives no goal, which is looked for in info["goal"]' in env.score_kind


# --- Seeds -------------------------------------------------------------------------------------------------


def everything(env, seeds=(0, 1), episodes=4):
    seen = []
    env.evaluate(watched(nowhere, seen), list(seeds), episodes)
    return np.stack(seen)


def test_a_seed_decides_all_that_is_drawn(root):
    """The start comes from NumPy's global generator and the action space, the goal from a space that is made anew,
    and the gusts from the global generator again: environments do so, whatever their seed is."""
    _, env = load(root, gust=0.3, tasks=[{"task_id": 50}, {"task_id": 60}])
    once = everything(env)
    starts = once[0].reshape(8, 4)
    assert len({*starts[:, 0]}) == 8 and len({*starts[:, 2]}) == 8  # each its own start and goal
    gusts = np.diff(once[..., 0], axis=0).reshape(len(once) - 1, 8)
    assert len({*gusts[0]}) == 8
    np.testing.assert_array_equal(everything(env), once)
    np.testing.assert_array_equal(everything(load_dataset(NAME, goals=True)[1]), once)


def test_no_episode_depends_on_those_beside_it(root):
    _, env = load(root, gust=0.3, tasks=[{"task_id": 50}, {"task_id": 60}])
    once = everything(env)
    np.testing.assert_array_equal(everything(env, (1,), 2)[:, 0], once[:, 1, :2])
    env = load_dataset(NAME, goals=True)[1]
    env.num_workers = 1
    np.testing.assert_array_equal(everything(env), once)


def test_what_seeds_itself_later_is_left_alone(root):
    from gymnasium.utils import seeding

    before = seeding.np_random
    from common.recipes.worker import begin

    begin(Reach(), 0)
    assert seeding.np_random is before


# --- A policy without its dataset --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["box", "dict"])
def test_the_interface_takes_observations_with_their_goal(root, form):
    _, env = load(root, form, options={"normalize_obs": True})
    again = Interface(*json.loads(json.dumps(env.interface)))
    assert again.spec == env.spec
    mean, scale = np.array(again.obs_mean), np.array(again.obs_scale)
    x = {"observation": np.array([3.0, 7.0]), "goal": np.array([5.0, 7.0])}
    flat = [3, 7, 5, 7]
    if form == "dict":
        goal = {"achieved_goal": np.array([3.0, 7.0]), "desired_goal": np.array([5.0, 8.0])}
        x, flat = {"observation": np.array([2.0])} | goal, [3, 7, 2, 5, 8]
    np.testing.assert_allclose(again.observe(x), (flat - mean) / scale, rtol=1e-5)
    many = {key: np.stack([value, value + 1]) for key, value in x.items()}
    np.testing.assert_allclose(again.observe(many), ([flat, np.add(flat, 1)] - mean) / scale, rtol=1e-5)
    handed = []
    again.act(lambda obs, *rest: (handed.append(obs), (np.zeros((1, 1, 1)), None))[1], x)
    assert handed[0].shape == (1, 1, len(flat))


def test_an_observation_without_its_goal_is_refused(root):
    _, env = load(root)
    for x in (np.zeros(2), {"observation": np.zeros(2)}, {"goal": np.zeros(2)}):
        with pytest.raises(ValueError, match="needs a dict with goal and observation"):
            env.interface.observe(x)


def test_configurations_from_before_there_were_goals_are_read(root):
    old = [[2], {"n": 2, "start": 0}, [0.0, 0.0], [1.0, 1.0], None]
    assert Interface(*old).spec == Spec(2, 2, True) and environments.Interface(*old).goal is None
