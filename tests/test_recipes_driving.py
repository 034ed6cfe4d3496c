"""Driving in highway-env: what the rule does, what the environment pays and ends, and the data that are made of it."""

import importlib.util

import minari
import numpy as np
import pytest

from common import recipes
from common.datasets import load_dataset
from common.environments import Spec
from common.recipes import driving, rollouts
from common.recipes.driving import FASTER, LEFT, RIGHT, SLOWER

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors

needs_highway = pytest.mark.skipif(driving.missing(), reason="highway-env is not here")
MIXED, STEPS = "stitch/driving-highway-mixed-v0", 60


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset of few steps."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        monkeypatch.setattr(rollouts.os, "cpu_count", lambda: 1)
        monkeypatch.setattr(driving, "returns", lambda behaviour, *_, **__: np.array([behaviour == "rule"]))
        monkeypatch.setitem(recipes.RECIPES, MIXED, recipes.RECIPES[MIXED]._replace(num_transitions=STEPS))
        recipes.build(MIXED)
        data, env = load_dataset(MIXED, columns=("episode",))
        yield data, env, minari.load_dataset(MIXED)
        env._dismiss()


def observation(*others, lane=1):
    """Of (metres ahead, lanes to the right) of other cars."""
    obs = np.zeros((5, 5), np.float32)
    obs[0, [0, 2]] = 1, lane / 3
    for row, (ahead, side) in zip(obs[1:], others, strict=False):
        row[:3] = 1, ahead / 200, side / 3
    return obs.ravel()


# --- The rule, without highway-env -------------------------------------------------------------------


def test_the_rule_on_observations_written_by_hand():
    def rule(*others, lane=1):
        return driving.action_of("rule", observation(*others, lane=lane), None)

    assert rule() == FASTER
    assert rule((31, 0), (8, -1), (8, 1)) == FASTER and rule((29, 0), (8, -1), (8, 1)) == SLOWER
    assert rule((20, 0), (40, -1), (60, 1)) == RIGHT and rule((20, 0), (60, -1), (40, 1)) == LEFT
    assert rule((20, 0), (40, -1), (24, 1)) == LEFT and rule((20, 0), (24, -1), (24, 1)) == SLOWER
    assert rule((20, 0), (-5, 1), (10, -1)) == SLOWER  # who is beside or close behind is in the way
    assert rule((20, 0), (60, 1), (-5, 1), (10, -1)) == SLOWER  # and so is the nearest one, wherever it is in the list
    assert rule((20, 0), lane=0) == RIGHT and rule((20, 0), lane=2) == LEFT
    assert rule((20, 0), (10, 1), lane=0) == SLOWER  # there is no lane to the left
    assert rule((20, 0), (10, -1), lane=2) == SLOWER
    assert driving.room(observation((20, 0), (-5, 1), lane=0)) == pytest.approx([-np.inf, 20, -5])


def test_random_actions():
    rng = np.random.default_rng(0)
    actions = [driving.action_of("random", observation(), rng) for _ in range(1000)]
    assert (np.abs(np.bincount(actions) - 200) < 4 * np.sqrt(1000 * 4 / 25)).all() and type(actions[0]) is int


def test_a_rule_that_is_not_clearly_better_is_refused():
    driving.check_rule({"random": 10.0, "rule": 15.1})
    with pytest.raises(SystemExit, match="random 10.0, rule 14.9.*: pip install highway-env=="):
        driving.check_rule({"random": 10.0, "rule": 14.9})
    with pytest.raises(SystemExit):
        driving.check_rule({"random": 10.0, "rule": np.nan})


def test_nothing_is_written_where_the_rule_is_not_better(root, monkeypatch):
    monkeypatch.setattr(driving, "missing", lambda: False)
    monkeypatch.setattr(driving, "returns", lambda behaviour, *_, **__: np.array([9.0, 11.0]))
    with pytest.raises(SystemExit, match="does not drive clearly better than random actions"):
        load_dataset(MIXED)
    assert not list(root.rglob("*.hdf5")) and not list(root.glob(".building-*"))


def test_a_package_that_is_missing_is_named(root, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "highway_env" else found(name))
    with pytest.raises(SystemExit) as error:
        load_dataset(MIXED)
    assert str(error.value) == (
        f"Building {MIXED} needs highway_env, which cannot be imported: pip install -e '.[driving]'."
    )


# --- The environment ----------------------------------------------------------------------------------


@needs_highway
def test_an_observation_is_of_the_cars_on_the_road():
    """What `room` reads, beside the positions in the simulator: the lanes' middles are at 0, 4 and 8 m."""
    env = driving.simulator()
    for seed in range(5):
        obs, _ = env.reset(seed=seed)
        for action in (FASTER, SLOWER):
            me = env.unwrapped.vehicle
            lane, others = np.rint(me.position[1] / 4), [car for car in env.unwrapped.road.vehicles if car is not me]
            metres = driving.room(obs)
            for side, found in zip((-1, 0, 1), metres, strict=True):
                ahead = [
                    car.position[0] - me.position[0] for car in others if np.rint(car.position[1] / 4) == lane + side
                ]
                ahead = [x for x in ahead if x > -10]
                assert (found == -np.inf) == (not 0 <= lane + side < 3)
                if -np.inf < found < driving.METRES:
                    assert found == pytest.approx(min(ahead), abs=0.01)
            assert obs[3] * 80 == pytest.approx(me.speed, abs=0.01)
            obs, *_ = env.step(action)


@needs_highway
def test_what_is_paid_and_what_ends():
    """In each second 2/3, and up to 4/15 for speed and 1/15 for the lane; a crash terminates, the clock truncates."""
    env = driving.simulator()
    for seed, action, crashes in ((0, FASTER, True), (1, SLOWER, False)):
        env.reset(seed=seed)
        seconds, terminated, truncated = 0, False, False
        while not (terminated or truncated):
            obs, reward, terminated, truncated, _ = env.step(action)
            seconds += 1
            me = env.unwrapped.vehicle
            speed = np.clip((me.speed * np.cos(me.heading) - 20) / 10, 0, 1)
            paid = 2 / 3 * (not terminated) + 4 / 15 * speed + me.target_lane_index[2] / 2 / 15
            assert reward == pytest.approx(paid) and terminated == me.crashed
        assert (terminated, truncated) == (crashes, not crashes) and (seconds == 30) == (not crashes)


@needs_highway
def test_the_rule_beats_chance_and_what_it_is_scored_by():
    episodes = {behaviour: [driving.rollout(behaviour, (2, k)) for k in range(3)] for behaviour in driving.NAMES}
    for episode in (ends := sum(episodes.values(), [])):
        assert episode.terminated == (episode.rewards[-1] < 0.4) and len(episode.rewards) <= 30  # 2/3 without a crash
    assert {episode.terminated for episode in ends} == {True, False}
    mean = {name: np.mean([episode.rewards.sum() for episode in played]) for name, played in episodes.items()}
    driving.check_rule(mean)
    low, high = driving.REFERENCES["random"], driving.REFERENCES["rule"]
    assert abs(mean["random"] - low) < 6 and abs(mean["rule"] - high) < 3


@needs_highway
def test_an_episode_is_a_function_of_its_seed_in_a_used_process_and_a_new_one():
    def bits(number):
        episode = driving.rollout("random", (0, number))
        return [getattr(episode, name).tobytes() for name in ("observations", "actions", "rewards")]

    first, other = bits(0), bits(1)
    assert first != other and bits(0) == first
    driving.simulator.cache_clear()
    assert bits(0) == first


@needs_highway
def test_the_number_of_processes_changes_nothing():
    def bits(number):
        episodes = rollouts.equal_parts(driving.rollout, [("random",)], 40, 30, desc="test", num_processes=number)
        return [(e.observations.tobytes(), e.actions.tobytes(), e.rewards.tobytes()) for e in episodes]

    assert bits(1) == bits(2)


# --- The data -----------------------------------------------------------------------------------------


@needs_highway
def test_data_have_half_of_each_behaviour_and_only_a_crash_is_terminal(mixed):
    data, env, dataset = mixed
    assert env.spec == Spec(25, 5, discrete=True) and data.obs.dtype == np.float32
    assert len(data.reward) == STEPS
    rule = np.array([driving.action_of("rule", obs, None) for obs in data.obs])
    agrees = data.action == rule
    half = STEPS // 2
    assert agrees[half:].all() and agrees[:half].mean() < 0.6
    np.testing.assert_array_equal(data.terminal == 1, data.reward < 0.4)  # 2/3 else
    assert 2 <= data.terminal[:half].sum()
    for episode in dataset:
        ends = np.flatnonzero(episode.terminations | episode.truncations)
        assert ends.tolist() == [len(episode.rewards) - 1] and not (episode.terminations & episode.truncations).any()
        assert len(episode.rewards) <= 30 and episode.observations.shape == (len(episode.rewards) + 1, 25)
    assert dataset.storage.metadata["requirements"] == driving.REQUIREMENTS


@needs_highway
def test_policies_are_evaluated_in_the_environment_of_the_file(mixed):
    _, env, _ = mixed

    def rule(obs, *_):
        actions = [driving.action_of("rule", row, None) for row in obs.reshape(-1, 25)]
        return np.reshape(actions, obs.shape[:2]), None

    env.num_workers = 1
    assert env.probe() and env._limit == 30 and env.score_kind == "normalised by the dataset's reference scores"
    returns = env.evaluate(rule, [0], 2).returns
    assert abs(env.score(returns).mean() - 100) < 30 and returns[0, 0] != returns[0, 1]
    in_turn = env.evaluate(rule, [0], 2, max_steps=8).returns
    env._dismiss()
    env.num_workers = 2
    np.testing.assert_array_equal(env.evaluate(rule, [0], 2, max_steps=8).returns, in_turn)  # side by side
