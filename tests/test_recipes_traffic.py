"""Traffic lights in SUMO: which lane is where, what the rule does, and the data that are made of it."""

import importlib.util
import json
import xml.etree.ElementTree as xml
from pathlib import Path

import minari
import numpy as np
import pytest

from common import recipes
from common.datasets import load_dataset
from common.environments import Spec
from common.recipes import rollouts, traffic, traffic_env
from common.recipes.worker import EnvironmentFailure

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Minari's, of missing authors

ABSENT = traffic_env.missing()
needs_sumo = pytest.mark.skipif(ABSENT is not None, reason=f"SUMO is not here: it needs {ABSENT}")
MIXED = "stitch/traffic-single-mixed-1k-v0"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A dataset of five episodes."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        monkeypatch.setattr(rollouts.os, "cpu_count", lambda: 2)
        recipes.build(MIXED)
        data, env = load_dataset(MIXED, columns=("episode",))
        yield data, env, minari.load_dataset(MIXED)
        env._dismiss()


def observation(phase=0, may_change=1, **queues):
    obs = np.zeros(21, np.float32)
    obs[phase], obs[4] = 1, may_change
    obs[traffic.QUEUES] = [queues.get(lane, 0) for lane in traffic.LANES]
    return obs


# --- The rule, without SUMO --------------------------------------------------------------------------


def test_longest_queue_first_on_observations_written_by_hand():
    def rule(**queues):
        return traffic.action_of("queue", observation(**queues), 0, None)

    assert [rule(n_t_0=0.5), rule(s_t_0=0.5), rule(n_t_1=0.5), rule(s_t_1=0.5)] == [0, 0, 1, 1]
    assert [rule(e_t_0=0.5), rule(w_t_0=0.5), rule(e_t_1=0.5), rule(w_t_1=0.5)] == [2, 2, 3, 3]
    assert rule(n_t_0=0.5, e_t_1=0.3, w_t_1=0.3) == 3  # 0.6 together, though 0.5 is the longest of one lane
    assert rule(n_t_0=0.3, s_t_0=0.3, e_t_1=0.5) == 0
    assert rule() == 0
    obs = observation(phase=2, w_t_1=0.1)
    obs[5:13] = 1  # the densities play no part
    assert traffic.action_of("queue", obs, 0, None) == 3


def test_the_fixed_plan_and_random_phases():
    plan = [traffic.action_of("fixed", observation(n_t_0=1), step, None) for step in range(20)]
    assert plan == [0] * 7 + [1] * 2 + [2] * 7 + [3] * 2 + [0] * 2
    rng = np.random.default_rng(0)
    actions = [traffic.action_of("random", observation(n_t_0=1), step, rng) for step in range(1000)]
    assert (np.abs(np.bincount(actions) - 250) < 4 * np.sqrt(1000 * 3 / 16)).all() and type(actions[0]) is int


def test_a_rule_that_is_not_the_best_is_refused():
    traffic.check_rule({"fixed": -80.0, "random": -60.0, "queue": -25.0})
    with pytest.raises(SystemExit, match="random -16.0, queue -921.0.*: pip install sumo-rl==1.4.5 libsumo=="):
        traffic.check_rule({"fixed": -80.0, "random": -16.0, "queue": -921.0})
    with pytest.raises(SystemExit):
        traffic.check_rule({"fixed": -20.0, "random": -60.0, "queue": -25.0})


def test_nothing_is_written_where_the_rule_is_not_the_best(root, monkeypatch):
    monkeypatch.setattr(traffic_env, "missing", lambda: None)
    monkeypatch.setattr(traffic, "returns", lambda behaviour, *_, **__: np.array([-1.0, -2.0]))
    with pytest.raises(SystemExit, match="Longest queue first is not the best behaviour"):
        load_dataset(MIXED)
    assert not list(root.rglob("*.hdf5")) and not list(root.glob(".building-*"))


@pytest.mark.parametrize("absent", ["sumo_rl", "libsumo"])
def test_a_package_that_is_missing_is_named(root, monkeypatch, absent):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == absent else found(name) or name)
    with pytest.raises(SystemExit) as error:
        load_dataset(MIXED)
    text = f"needs {absent}, which cannot be imported: pip install -e '.[traffic]'"
    assert str(error.value) == f"Building {MIXED} {text}."
    with pytest.raises(EnvironmentFailure) as error:
        traffic_env.make_env()
    assert str(error.value) == f"it {text}"
    traffic_env.Crossing.__new__(traffic_env.Crossing).close()  # of what was never made, as Python deletes it


# --- The order of the lanes ---------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("sumo_rl") is None, reason="the network is in sumo-rl's wheel")
def test_lanes_and_phases_are_those_of_the_network_s_file():
    """A connection has a number, from which the lights' states and the order of the lanes in an observation come."""
    folder = Path(importlib.util.find_spec("sumo_rl").origin).parent / "nets" / "2way-single-intersection"
    network = xml.parse(folder / "single-intersection.net.xml").getroot()
    lane_of = {
        int(connection.get("linkIndex")): f"{connection.get('from')}_{connection.get('fromLane')}"
        for connection in network.iter("connection")
        if connection.get("tl") == "t"
    }
    assert tuple(dict.fromkeys(lane_of[i] for i in sorted(lane_of))) == traffic.LANES
    states = [phase.get("state") for phase in network.iter("phase")]
    green = [{lane_of[i] for i, light in enumerate(state) if light in "Gg"} for state in states if "y" not in state]
    assert green == [set(lanes) for lanes in traffic.GREEN]
    np.testing.assert_array_equal(
        traffic.SERVED, np.array([[lane in lanes for lane in traffic.LANES] for lanes in green])
    )
    seconds = [int(phase.get("duration")) for phase in network.iter("phase")]
    assert seconds == [33, 2, 6, 2, 33, 2, 6, 2]  # 35, 8, 35, 8: the plan's 7, 2, 7 and 2 steps of 5 s


@needs_sumo
def test_the_lanes_that_a_phase_serves_have_no_queue_and_the_others_grow():
    """What the simulator does, whatever the names are: a phase that stays for 300 s serves its lanes alone."""
    env = traffic.simulator()
    assert env.unwrapped.lanes == traffic.LANES
    for phase, served in enumerate(traffic.SERVED):
        obs, _ = env.reset(seed=0)
        seen = []
        for _ in range(60):
            obs, *_ = env.step(phase)
            seen.append(obs[traffic.QUEUES])
        queues = np.mean(seen[-10:], axis=0)
        assert queues[served].max() < 0.05 < 0.15 < queues[~served].min(), (phase, queues)


@needs_sumo
def test_longest_queue_first_beats_the_others_and_another_order_of_lanes_is_worse_than_chance(monkeypatch):
    mean = {behaviour: traffic.returns(behaviour, 3, seed=2).mean() for behaviour in traffic.NAMES}
    assert mean["queue"] > 0.5 * max(mean["random"], mean["fixed"])  # it costs less than half
    for behaviour, reference in traffic.REFERENCES.items():
        assert abs(mean[behaviour] - reference) < 0.2 * abs(reference)
    monkeypatch.setattr(traffic, "SERVED", traffic.SERVED[[1, 2, 3, 0]])
    assert traffic.returns("queue", 1, seed=2)[0] < 1.5 * mean["random"]


# --- The environment ----------------------------------------------------------------------------------


@needs_sumo
def test_a_phase_stays_for_ten_seconds():
    """The start counts as a change: 5 s later nothing may change yet, and 10 s later it may."""
    env = traffic.simulator()
    obs, _ = env.reset(seed=0)
    seen = []
    for action in (1, 2, 2, 3, 3, 0, 0, 0):
        obs, *_ = env.step(action)
        seen.append((int(obs[:4].argmax()), int(obs[4])))
    assert seen == [(0, 0), (0, 1), (2, 0), (2, 1), (3, 0), (3, 1), (0, 0), (0, 1)]


@needs_sumo
def test_an_episode_is_a_function_of_its_seed_in_a_used_process_and_a_new_one():
    def bits(number, steps=40):
        episode = traffic.rollout(("random",), (0, number), steps)
        return [getattr(episode, name).tobytes() for name in ("observations", "actions", "rewards")]

    first, other = bits(0), bits(1)
    assert first != other and bits(0) == first
    traffic.simulator.cache_clear()
    assert bits(0) == first
    env = traffic.simulator()
    seen = []
    for seed in (2**32 - 1, 2**31, 2**32 - 1):  # SUMO's own seeds are smaller
        env.reset(seed=seed)
        seen.append(np.array([env.step(action)[0] for action in np.resize([0, 0, 2, 2], 60)]))
    np.testing.assert_array_equal(seen[0], seen[2])
    assert (seen[0] != seen[1]).any()
    env.reset()  # without a seed


@needs_sumo
def test_the_number_of_processes_changes_nothing():
    def bits(number):
        episodes = rollouts.equal_episodes(
            traffic.rollout, (traffic.QUALITIES["mixed"],), 75, 30, desc="test", num_processes=number
        )
        return [(e.observations.tobytes(), e.actions.tobytes(), e.rewards.tobytes()) for e in episodes]

    one = bits(1)
    assert len(one) == 3 and one == bits(2)


@needs_sumo
def test_a_process_that_ends_is_an_answer_and_leaves_nothing():
    env = traffic_env.make_env()
    env.reset(seed=0)
    process = env.unwrapped.process
    process.kill()
    with pytest.raises(EnvironmentFailure, match="SUMO's process ended with exit code -9"):
        env.step(0)
    env.close()
    env.close()
    other = traffic_env.make_env()
    process = other.unwrapped.process
    with pytest.raises(EnvironmentFailure, match="KeyError"):
        other.reset(seed=0)
        [other.step(action) for action in (0, 0, 9)]
    other.close()
    assert process.poll() is not None


# --- The data -----------------------------------------------------------------------------------------


@needs_sumo
def test_data_of_the_three_behaviours_in_turn(mixed):
    data, env, dataset = mixed
    assert env.spec == Spec(21, 4, discrete=True)
    assert len(data.reward) == 1000 and data.terminal.sum() == 0
    episodes = list(dataset)
    assert [len(e.rewards) for e in episodes] == [200] * 5
    for episode in episodes:
        assert np.flatnonzero(episode.truncations).tolist() == [199] and not episode.terminations.any()
    np.testing.assert_array_equal(episodes[0].actions, np.resize(traffic.PLAN, 200))
    np.testing.assert_array_equal(episodes[3].actions, episodes[0].actions)
    rule = (data.obs[:, traffic.QUEUES] @ traffic.SERVED.T).argmax(axis=1)
    agrees = [(data.action == rule)[data.episode == k].mean() for k in range(5)]
    assert agrees[2] == 1 and 0.1 < agrees[1] < 0.4 and 0.1 < agrees[4] < 0.4
    phase, following = data.obs[:, :4].argmax(axis=1), data.next_obs[:, :4].argmax(axis=1)
    np.testing.assert_array_equal(following, np.where(data.obs[:, 4] == 1, data.action, phase))
    # A lane of 141.95 m has room for 18.93 cars of 5 m with gaps of 2.5 m, and a queue of 19 counts as 1
    queues = data.next_obs[:, traffic.QUEUES]
    short = queues.max(axis=1) < 1
    np.testing.assert_allclose(queues[short].sum(axis=1) * 1.4195 / 7.5, -data.reward[short], rtol=1e-5)
    assert short.sum() > 400
    assert dataset.storage.metadata["requirements"] == traffic.REQUIREMENTS


@needs_sumo
def test_policies_are_evaluated_in_the_environment_of_the_file(mixed):
    _, env, _ = mixed

    def rule(obs, *_):
        return (obs[..., traffic.QUEUES] @ traffic.SERVED.T).argmax(axis=-1), None

    def stay(obs, *_):
        return np.zeros(obs.shape[:2], int), None

    env.num_workers = 1
    assert env.probe() and env._limit == 200 and env.score_kind == "normalised by the dataset's reference scores"
    returns = env.evaluate(rule, [0], 2).returns
    assert (np.abs(env.score(returns) - 100) < 15).all() and returns[0, 0] != returns[0, 1]
    assert env.score(env.evaluate(stay, [0], 1).returns)[0, 0] < -50  # the phase stays 0, and the others wait
    env._dismiss()
    env.num_workers = 2
    np.testing.assert_array_equal(env.evaluate(rule, [0], 2).returns, returns)  # side by side, as in turn


def test_what_the_scores_say_of_episodes_is_in_the_result_files():
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    runs = benchmarks / "results" / "traffic" / "traffic-single-mixed-20k-v0"
    returns = {p.parent.name: np.ravel(json.loads(p.read_text())["returns"]) for p in runs.glob("*/summary.json")}
    text = " ".join((benchmarks / "scores.md").read_text().split())
    bad = returns["bc"] < -60
    assert bad.sum() == 3 and returns["bc"][~bad].min() >= -32 and len(bad) == 15
    assert "Three of cloning's 15 episodes return less than -60" in text and "the others at least -32." in text
    assert min(returns["iql"].min(), returns["cql_discrete"].min()) >= -30
    assert "No episode of IQL or CQL returns less than -30" in text
