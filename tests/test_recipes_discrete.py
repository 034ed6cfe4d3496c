"""Datasets of discrete actions, and the exact evaluation of policies in a finite MDP, on numbers worked by hand."""

from pathlib import Path

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from common import recipes
from common.datasets import load_dataset
from common.environments import Spec
from common.recipes import cartpole, rollouts, tabular, worker

pytestmark = [
    pytest.mark.usefixtures("root"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Minari's, of missing authors and descriptions
]


class TwoStates(gymnasium.Env):
    """States 0 and 1, and 2, which is terminal; as observations 3, 4 and 5.

    In 0, action 0 stays half of the time, which pays 2, and ends the other half; action 1 leads to 1.
    In 1, action 0 pays 4 and ends; action 1 leads to 0. Three quarters of the episodes start in 0.
    """

    observation_space, action_space = spaces.Discrete(3, start=3), spaces.Discrete(2)

    def __init__(self):
        p, r = np.zeros((3, 2, 3)), np.zeros((3, 2, 3))
        p[0, 0] = 0.5, 0.0, 0.5
        p[0, 1, 1] = p[1, 0, 2] = p[1, 1, 0] = 1
        p[2, :, 2] = 1
        r[0, 0, 0], r[1, 0, 2] = 2, 4
        self.dynamics = {"tx_mat": p, "r_mat": r, "d_0": np.array([0.75, 0.25, 0.0])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.choice(3, p=self.dynamics["d_0"]))
        return self.state + 3, {}

    def step(self, action):
        before, self.state = self.state, int(self.np_random.choice(3, p=self.dynamics["tx_mat"][self.state, action]))
        return self.state + 3, float(self.dynamics["r_mat"][before, action, self.state]), self.state == 2, False, {}


gymnasium.register("stitch-test/TwoStates-v0", entry_point=f"{__name__}:TwoStates", max_episode_steps=3)


@pytest.fixture
def two_states():
    step = {"rewards": np.array([4.0]), "terminations": np.array([True]), "truncations": np.array([False])}
    episode = EpisodeBuffer(observations=np.array([4, 5]), actions=np.array([0]), **step)
    minari.create_dataset_from_buffers("test/two-states-v0", buffer=[episode], env="stitch-test/TwoStates-v0")
    return load_dataset("test/two-states-v0")[1]


def policy_of(table):
    """A policy of `table`, the action in each state, from one-hot observations."""
    return lambda obs, *_: (np.array(table)[obs.argmax(-1)], None)


# --- Exact returns -----------------------------------------------------------------------------------

# Worked by hand, v_k being the values with k steps to go. Action 0 of state 0 pays 0.5 * 2 = 1 in expectation.
#   (0, 0): v(0) = 1 + 1/2 + 1/4, v(1) = 4.                       0.75 * 1.75 + 0.25 * 4 = 2.3125
#   (1, 0): v(0) = 0 + 4, v(1) = 4.                                                        4, the optimum
#   (0, 1): v_1 = 1, 0; v_2 = 1.5, 1; v_3 = 1.75, 1.5.            0.75 * 1.75 + 0.25 * 1.5 = 1.6875
#   half:   v_1 = 1/2, 2; v_2(0) = 1/2 + 1/8 + 1, v_2(1) = 2 + 1/4; v_3(0) = 1/2 + 1.625/4 + 2.25/2 = 2.03125,
#           v_3(1) = 2 + 1.625/2 = 2.8125.                        0.75 * 2.03125 + 0.25 * 2.8125 = 2.2265625


@pytest.mark.parametrize("table, expected", [((0, 0, 0), 2.3125), ((1, 0, 1), 4.0), ((0, 1, 0), 1.6875)])
def test_exact_evaluation(two_states, table, expected):
    calls = []
    policy = policy_of(table)
    returns = two_states.evaluate(lambda obs, *_: calls.append(obs.shape) or policy(obs), [0, 7], 4).returns
    np.testing.assert_allclose(returns, np.full((2, 4), expected))
    assert set(calls) == {(2, 3, 3)}  # all states in the place of the episodes: one trace of a jitted policy
    assert two_states.score_kind.endswith(", exact")


def test_exact_evaluation_of_each_seed_and_of_a_stochastic_policy(two_states):
    def policy(obs, step, *_):  # of seed 0: half of the draws 0 and half 1; of seed 1: (0, 0)
        return np.array([step % 2, 0])[:, None] * np.ones(obs.shape[:2], int), None

    np.testing.assert_allclose(two_states.evaluate(policy, [0, 1], 4).returns[:, 0], [2.2265625, 2.3125])


def test_the_exact_true_value_is_discounted_and_of_likely_starts(two_states):
    # (0, 0), discount 1/2: v_1 = 1, 4; v_2(0) = 1 + 1/4; v_3(0) = 1 + (1.25 / 2) / 2, half of it staying: 1 + 1.25 / 4
    play = two_states.evaluate(policy_of((0, 0, 0)), [0, 1], 2, discount=np.array([0.5, 1.0]))
    np.testing.assert_allclose(play.value, [0.75 * 1.3125 + 0.25 * 4, 2.3125])
    assert play.obs.shape == (2, 3, 3) and play.action.shape == (2, 3)
    np.testing.assert_allclose(play.weight, [0.75, 0.25, 0])


def test_a_policy_that_remembers_its_episode_is_played(two_states):
    """It is no function of the state: this one takes action 1 in its first step alone, 0 after it."""

    def policy(obs, step, memory, rewards):
        return np.full(obs.shape[:2], int(memory is None)), "an episode"

    shapes = []
    returns = two_states.evaluate(lambda *at: shapes.append(at[0].shape) or policy(*at), [0, 1], 2).returns
    assert returns.shape == (2, 2) and np.all(returns % 1 == 0)  # of episodes, and not what is expected of them
    assert not two_states._scored_kind.endswith(", exact")
    # On all states it was called once: memories of all states, from a call for each of many episodes, fill a machine
    assert shapes[0] == (2, 3, 3) and set(shapes[1:]) == {(2, 2, 3)}


def test_episodes_of_a_finite_mdp_share_its_arrays(two_states):
    """An environment made for each of a thousand episodes would hold ICU-Sepsis' 205 MB a thousand times."""
    held, starts = worker.Held(*two_states._task), [(seed, None) for seed in range(20)]
    held.reset(range(20), starts)
    arrays = [env.unwrapped.dynamics for env in held.envs]
    assert all(x["tx_mat"] is arrays[0]["tx_mat"] and x["r_mat"] is arrays[0]["r_mat"] for x in arrays)
    played = [held.step(range(20), np.array([1, 0] * 10)), held.step(range(10), np.zeros(10, int))]
    # Apart from that they are environments of their own: each is at the state of one that is made and played alone
    for i, start in enumerate(starts):
        alone = worker.Held(*two_states._task)
        alone.reset([0], [start])
        for (obs, *rest), action in zip(played[: 2 if i < 10 else 1], ([1, 0][i % 2], 0), strict=False):
            its_obs, *its = alone.step([0], np.array([action]))
            np.testing.assert_array_equal(obs[i], its_obs[0])
            assert [x[i] for x in rest] == [x[0] for x in its]


def test_exact_evaluation_equals_roll_outs(two_states):
    policy = policy_of((0, 0, 0))
    exact = two_states.evaluate(policy, [0], 1).returns[0, 0]
    two_states._model = None
    returns = two_states.evaluate(policy, [0], 1000).returns
    assert returns.std() > 1
    assert abs(returns.mean() - exact) < 4 * returns.std() / np.sqrt(returns.size)


def test_observations_are_normalised_for_the_exact_evaluation_too():
    observations = np.array([3, 4, 3, 3, 4])
    fields = {name: np.zeros(4) for name in ("rewards", "terminations", "truncations")}
    episode = EpisodeBuffer(observations=observations, actions=np.array([1, 1, 0, 1]), **fields)
    minari.create_dataset_from_buffers("test/two-states-v0", buffer=[episode], env="stitch-test/TwoStates-v0")
    data, env = load_dataset("test/two-states-v0", normalize_obs=True)
    seen = []
    env.evaluate(lambda obs, *_: seen.append(obs[0].copy()) or (np.zeros(obs.shape[:2], int), None), [0], 1)
    np.testing.assert_array_equal(seen[0][:2], data.obs[:2])
    assert seen[0].dtype == np.float32


def test_optimal_return():
    model = tabular.model_of(TwoStates())
    # One step: 1 from state 0, 4 from state 1. Two and more: 4 from both.
    assert [tabular.optimal_return(model, k) for k in (0, 1, 2, 3)] == [0, 1.75, 4, 4]


def test_an_environment_without_a_model():
    assert tabular.model_of(gymnasium.make("CartPole-v1")) is None


# --- ICU-Sepsis --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sepsis(tmp_path_factory):
    pytest.importorskip("icu_sepsis")
    name = "stitch/icu-sepsis-2k-v0"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        recipes.build(name)
        data, env = load_dataset(name)
        assert env.probe()
        yield data, env, minari.load_dataset(name)


def test_sepsis_reference_scores(sepsis):
    """The returns that the package's documentation publishes: random 0.78, clinicians 0.78, optimal 0.88."""
    _, env, dataset = sepsis
    low, high = (dataset.storage.metadata[name] for name in ("ref_min_score", "ref_max_score"))
    assert low == pytest.approx(0.780071, abs=1e-6) and high == pytest.approx(0.875142, abs=1e-6)
    card = Path(__file__).parents[1] / "benchmarks" / "cards" / "icu-sepsis-v0.md"
    assert f"\n\n{dataset.storage.metadata['description']}\n\n" in card.read_text()
    assert "0.7818" in dataset.storage.metadata["description"] and dataset.storage.metadata["requirements"]
    # The best policy of infinitely many steps loses nothing in 500
    value = np.zeros(716)
    for _ in range(100):
        q = env._model.reward + env._model.transition @ value
        value = q.max(axis=-1)
    np.testing.assert_allclose(env.score(env.evaluate(policy_of(q.argmax(axis=-1)), [0], 1).returns), 100, atol=1e-3)


def test_sepsis_data_are_the_clinicians(sepsis):
    data, env, dataset = sepsis
    assert env.spec == Spec(716, 25, discrete=True)
    np.testing.assert_array_equal(data.obs.sum(-1), 1)
    state, next_state = data.obs.argmax(-1), data.next_obs.argmax(-1)
    clinicians = dataset.recover_environment().unwrapped.expert_policy
    assert (clinicians[state, data.action] > 0).all()
    # Action 0 is what clinicians do most: as often in the data as their policy says, within four standard errors
    p = clinicians[state, 0]
    assert abs((data.action == 0).sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
    assert (env._model.transition[state, data.action, next_state] > 0).all()
    np.testing.assert_array_equal(data.terminal, next_state >= 713)  # death or survival
    np.testing.assert_array_equal(data.reward, next_state == 714)  # survival
    assert len(data.reward) >= 2000 and 0.68 < data.reward.sum() / data.terminal.sum() < 0.88  # of about 215 patients


# --- CartPole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, low, high", [("random", 20, 24), ("medium", 150, 250), ("mixed", 35, 75)])
def test_cartpole(kind, low, high):
    recipes.build(f"stitch/cartpole-{kind}-6k-v0")
    data, env = load_dataset(f"stitch/cartpole-{kind}-6k-v0", columns=("episode",))
    lengths = np.bincount(data.episode)
    assert 6000 <= len(data.reward) < 6500 and low < lengths.mean() < high and lengths.max() <= 500
    np.testing.assert_array_equal(data.reward, 1)
    random = data.action != (data.obs @ cartpole.WEIGHTS > 0)  # half of the random actions are the controller's
    first, last = {"random": (1, 1), "medium": (0.1, 0.1), "mixed": (0.88, 0.32)}[kind]  # of the first and last third
    third = len(random) // 3
    assert abs(2 * random[:third].mean() - first) < 0.1 and abs(2 * random[-third:].mean() - last) < 0.12
    np.testing.assert_allclose(env.score(np.array([22.1, 500])), [0, 100])


def test_time_limit_of_cartpole_is_no_terminal():
    env = gymnasium.make("CartPole-v1")
    balance = np.array([0.1, 0.2, 1.0, 0.5])
    (episode,) = rollouts.collect(env, lambda obs, rng, progress: int(balance @ obs > 0), 1, desc="balance")
    assert len(episode) == 500 and not episode.terminations.any() and np.flatnonzero(episode.truncations) == [499]


def test_collect_is_a_function_of_its_seed():
    env = gymnasium.make("CartPole-v1")

    def collect(seed):
        episodes = rollouts.collect(env, lambda obs, rng, progress: int(rng.integers(2)), 200, desc="test", seed=seed)
        return [(e.actions.tobytes(), e.observations.tobytes()) for e in episodes]

    first = collect(0)
    assert first == collect(0)  # in an environment that has been used in between
    assert set(first).isdisjoint(collect(1)) and len(set(first)) == len(first)
