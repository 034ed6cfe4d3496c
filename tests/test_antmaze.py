"""Minari's D4RL/antmaze/*: the rows that are read of them, and what an episode scores.

The files here are written in the layout of Minari's: its documentation has the spaces, kwargs and limits, and
scripts/antmaze/create_antmaze_dataset.py of minari-dataset-generation-scripts, where an episode ends (only at its time
limit), which infos are kept and that the reference scores are the mean returns of a random policy and of the expert.
"""

import copy

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium.envs.registration import WrapperSpec
from minari.data_collector import EpisodeBuffer

from common.datasets import load_dataset

robotics = pytest.importorskip("gymnasium_robotics")
gymnasium.register_envs(robotics)
pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Minari's, of missing authors
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Gymnasium's: the recordings are of v4
]

NAME = "D4RL/antmaze/umaze-v1"
MAPS = {  # of the recording, and of the evaluation
    "env": [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, 0, 1], [1, 1, 1, 1, 1]],
    "eval_env": [[1, 1, 1, 1, 1], [1, 0, 0, "r", 1], [1, 0, 1, 1, 1], [1, 0, 0, "g", 1], [1, 1, 1, 1, 1]],
}
STEPS = 12  # of an evaluation, where Minari has 700
EXPERT = 455.0  # Minari's experts stay at the goal, where each step is paid: their returns are hundreds


def episode(number, rewards):
    """Of numbers that tell the episode, the step and the column; each is one of float32."""
    steps = len(rewards)
    t = 100.0 * number + np.arange(steps + 1)[:, None]
    observations = {
        "observation": 1000 + t + np.arange(27) / 32,
        "achieved_goal": 4000 + t + np.arange(2) / 32,
        "desired_goal": 8000 + number + np.zeros((steps + 1, 2)),
    }
    qpos = np.concatenate([observations["achieved_goal"], observations["observation"][:, :13]], axis=1)
    infos = {"success": np.append(0, rewards) == 1, "goal": observations["desired_goal"], "qpos": qpos}
    return EpisodeBuffer(
        observations=observations,
        actions=np.full((steps, 8), number / 8, np.float32),
        rewards=np.array(rewards),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(1, steps + 1) == steps,
        infos=infos | {"qvel": observations["observation"][:, 13:]},
    )


def record(name=NAME, continuing=True, **put):
    """Writes two episodes of Minari's layout. `put` says when the ant of the evaluation is at its goal."""
    specs = {}
    for role, maze_map in MAPS.items():
        spec = copy.deepcopy(gymnasium.spec("AntMaze_UMaze-v4"))
        kwargs = {"maze_map": maze_map, "continuing_task": continuing, "reset_target": False}
        spec.kwargs, spec.max_episode_steps = spec.kwargs | kwargs, STEPS
        specs[role] = spec
    if put:
        specs["eval_env"].additional_wrappers = (WrapperSpec("Put", "echo:Put", put),)
    episodes = [episode(0, [0.0, 0.0, 1.0, 1.0]), episode(1, [0.0, 1.0, 0.0])]
    scores = {"ref_min_score": 0.0, "ref_max_score": EXPERT}
    minari.create_dataset_from_buffers(name, buffer=episodes, **specs, **scores)


def stand(obs, *_):
    return np.zeros((*obs.shape[:2], 8), np.float32), None


# --- Rows --------------------------------------------------------------------------------------------


def test_a_row_has_where_the_ant_is_where_its_goal_is_and_its_joints():
    """31 numbers, of which D4RL's observation has 29: not the goal, which it keeps in its infos."""
    record()
    data, env = load_dataset(NAME, reward_shift=-1, columns=("next_action", "episode", "return_to_go"))
    assert data.obs.shape == (7, 31) and (env.spec.obs_dim, env.spec.action_dim, env.spec.goal_dim) == (31, 8, 0)
    t = np.array([0, 1, 2, 3, 100, 101, 102])
    np.testing.assert_array_equal(data.obs[:, :2], 4000 + t[:, None] + np.arange(2) / 32)
    np.testing.assert_array_equal(data.obs[:, 2:4], 8000 + (t // 100)[:, None] + [0, 0])
    np.testing.assert_array_equal(data.obs[:, 4:], 1000 + t[:, None] + np.arange(27) / 32)
    np.testing.assert_array_equal(data.next_obs[:, 0], 4001 + t)  # the last observation of an episode is its own
    np.testing.assert_array_equal(data.action[:, 0], (t // 100) / 8)
    # The field's shift: -1 a step, and 0 at the goal. Nothing terminates, so that an ant that stays there has a value
    # of 0: that of D4RL's, which ends there.
    np.testing.assert_array_equal(data.reward, [-1, -1, 0, 0, -1, 0, -1])
    np.testing.assert_array_equal(data.terminal, np.zeros(7))
    np.testing.assert_array_equal(data.return_to_go, [-2, -1, 0, 0, -2, -1, -1])
    np.testing.assert_array_equal(data.next_action[:, 0], data.action[:, 0])


def test_policies_of_goals_see_d4rl_s_observation_and_the_goal():
    record()
    data, env = load_dataset(NAME, goals=True)
    t = np.array([0, 1, 2, 3, 100, 101, 102])
    assert data.obs.shape == (7, 29) and (env.spec.obs_dim, env.spec.goal_dim) == (29, 2)  # qpos (15) and qvel (14)
    np.testing.assert_array_equal(data.obs[:, 2:], 1000 + t[:, None] + np.arange(27) / 32)
    np.testing.assert_array_equal(data.achieved, data.obs[:, :2])
    np.testing.assert_array_equal(data.achieved[:, 1], 4000 + t + 1 / 32)
    one = {"observation": np.zeros(27), "achieved_goal": np.ones(2), "desired_goal": np.full(2, 2.0)}
    np.testing.assert_array_equal(env.interface.observe(one), [1, 1, *[0] * 27, 2, 2])


# --- Scores ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "continuing, arrive, leave, total, score",
    [(True, 0, 99, STEPS, 100), (True, 99, 99, 0, 0), (True, 4, 7, 3, 100), (False, 4, 99, 1, 100)],
    ids=["stands at it", "never reaches it", "passes it", "ends there"],
)
def test_an_episode_scores_whether_the_ant_was_at_its_goal(continuing, arrive, leave, total, score):
    """Whatever the environment does at the goal, and whatever the file says that its expert was paid there."""
    record(continuing=continuing, arrive=arrive, leave=leave)
    _, env = load_dataset(NAME, reward_shift=-1)
    columns = env.measure(stand, None, [0], 2)
    np.testing.assert_array_equal(columns["returns"], [[total, total]])
    assert columns["score"] == [score]
    assert env.score_kind == "normalised by D4RL's reference scores; an episode counts once"
    assert env._limit == STEPS
    value = env.evaluate(stand, [0], 1).value.item()  # of rewards as the algorithm sees them
    assert value == (-4 if not continuing else total - STEPS)
    env._dismiss()


def test_the_evaluation_is_in_its_own_maze_and_the_ant_sees_its_goal():
    record()
    _, env = load_dataset(NAME)
    start = env.evaluate(stand, [0, 1], 2, max_steps=1).obs.reshape(4, -1)
    # Cells of 4 m; the maze's middle is the origin. From the upper right corner to the lower right; 1 m of noise each
    np.testing.assert_allclose(start[:, :4], np.tile([4, 4, 4, -4], (4, 1)), atol=1.2)
    assert np.ptp(start[:, 0]) > 0.05 and np.ptp(start[:, 3]) > 0.05  # another goal and start in each episode
    env._dismiss()


def test_data_of_another_name_keep_the_scores_of_their_file():
    record("mine/ant-v0", arrive=0, leave=99)
    _, env = load_dataset("mine/ant-v0")
    np.testing.assert_allclose(env.measure(stand, None, [0], 1)["score"], [100 * STEPS / EXPERT])
    assert env.score_kind == "normalised by the dataset's reference scores"
    env._dismiss()
