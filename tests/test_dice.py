"""DICE against ratios worked out by hand: its function L has the right saddle, and training finds it."""

import dataclasses

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain import D1

from algos import dice, iql
from common.datasets import Transition
from common.environments import Interface

SMALL = dict(hidden=(16,), batch_size=64, num_updates=100, eval_interval=100, log_interval=100, eval_episodes=0)
# M2 of the tests, discount 0.9: s0: a0 -> s0, 0; a1 -> s1, 1. s1: a0 -> s0, 2; a1 -> s1, 0. No episode ends.
M2 = np.array([[0.25, 0.75], [1.0, 0.0]]), np.array([0, 1, 0, 1]), np.array([0, 1, 2, 0]), np.zeros(4)
C2 = chain.PI, np.array([0, 1, 0, 0]), np.array([1, 0.5, 0, 2]), np.array([1, 0, 1, 1])  # the chain: go leads to s1


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run whose seed 0 is PI and seed 1 MU, and the name of a dataset with MU's frequencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        dataset = chain.write(D1 * 10)
        yield chain.train(tmp_path_factory.mktemp("policy"), dataset), dataset


def saddle(mdp, often, with_reward, discount=0.9):
    """(nu, zeta) of each (s, a) at which L is stationary: data have row k `often[k]` times, episodes start in s0.

    L of tables is a polynomial of degree 2, so that a step of Newton's method from 0 is exact. lambda is a constant
    of nu, and without rewards it is left out.
    """
    pi, next_state, reward, terminal = mdp
    row = np.repeat(np.arange(4), often)
    n = len(row)
    batch = Transition(None, None, np.tile(reward[row], 2), None, np.tile(terminal[row], 2))
    batch = batch._replace(start=np.repeat([0.0, 1.0], n))
    kappa = 1 - discount * (1 - terminal[row].mean())

    def value(x):
        nu, zeta, lam = x[:4], x[4:8], x[8] * with_reward
        v = (pi * nu.reshape(2, 2)).sum(axis=1)
        v = jnp.concatenate([v[next_state[row]], jnp.full(n, v[0])])
        rows = (jnp.concatenate([y[row]] * 2) for y in (nu, zeta))
        return dice.lagrangian(batch, v, *rows, lam, kappa, discount, 1.0, with_reward)

    with jax.enable_x64(True):
        slope, curvature = jax.grad(value)(jnp.zeros(9)), jax.hessian(value)(jnp.zeros(9))
        x = -np.linalg.lstsq(np.asarray(curvature), np.asarray(slope), rcond=1e-12)[0]
        assert np.abs(slope + curvature @ x).max() < 1e-9  # there is a saddle
        assert np.all(np.diagonal(np.asarray(curvature))[4:8] < 0)  # of zeta it is a maximum
    return x[:4], x[4:8], np.asarray(row), kappa


RATIOS = [  # MDP, how often the data have each (s, a), the ratio, the value
    # d^pi = (1 - 0.9) sum_t 0.9^t P(s_t, a_t) = (.149254, .447761, .402985, 0), over 1/4
    (M2, [1, 1, 1, 1], [0.597015, 1.791045, 1.611940, 0], 12.537313),
    # over the occupancy of the behaviour (.75, .25), (.5, .5): 33, 11, 9 and 9 of 62
    (M2, [33, 11, 9, 9], [0.280416, 2.523745, 2.776119, 0], 12.537313),
    # visits .2, .8, .9 * .8 * .4, .9 * .8 * .6 over 1/3, 1/3, 1/6, 1/6, and kappa = 1 - .9 * 2/6 = .7
    (C2, [2, 2, 1, 1], [0.42, 1.68, 1.2096, 1.8144], 1.464),
]


@pytest.mark.parametrize("form", ["best", "dual"])
@pytest.mark.parametrize("mdp, often, right, value", RATIOS, ids=["M2-uniform", "M2-behaviour", "chain"])
def test_the_saddle_has_the_ratio_of_visits(form, mdp, often, right, value):
    _, zeta, row, kappa = saddle(mdp, often, form == "best")
    np.testing.assert_allclose(zeta, right, atol=1e-6)
    assert (zeta * mdp[2])[row].mean() / kappa == pytest.approx(value, abs=1e-6)
    flow = zeta[row] * (1 - 0.9 * (1 - mdp[3][row]))
    assert flow.mean() == pytest.approx(kappa, abs=1e-9)  # what the estimate is divided by


def test_the_behaviour_itself_has_the_ratio_1():
    beta = np.array([[0.75, 0.25], [0.5, 0.5]])
    for with_reward in (True, False):
        np.testing.assert_allclose(saddle((beta, *M2[1:]), [33, 11, 9, 9], with_reward)[1], 1, atol=1e-6)


def test_nu_of_dual_dice():
    # zeta = discount V(s') - nu: in DualDICE's sign nu is (14.462909, 15.721096, 15.477835, 13.930051), and
    # (1 - discount) E nu(s_0) = E zeta^2 = 1.540655
    nu, zeta, _, _ = saddle(M2, [1, 1, 1, 1], False)
    np.testing.assert_allclose(-nu, [14.462909, 15.721096, 15.477835, 13.930051], atol=1e-5)
    assert (zeta**2).mean() == pytest.approx(1.540655, abs=1e-6)
    assert -0.1 * (0.25 * nu[0] + 0.75 * nu[1]) == pytest.approx(1.540655, abs=1e-6)


@pytest.mark.parametrize("form", ["best", "dual"])
def test_training_finds_the_value_of_every_run_of_a_folder(form, policy, tmp_path, capsys, optimised):
    # 1.464 and 1.2. If episodes began in any row, the first would be (4 * 1.464 + 2 * 1.2) / 6 = 1.376
    cfg = dice.Config(policy[1], policy=policy[0], act="sample", discount=0.9, num_seeds=4, out=str(tmp_path))
    counts = dict(num_updates=2000, eval_interval=2000, log_interval=1000)
    summary = dice.main(dataclasses.replace(cfg, form=form, **SMALL | counts))
    np.testing.assert_allclose(summary["estimate"], [1.464, 1.2, 1.464, 1.2], atol=0.05)
    np.testing.assert_allclose(summary["normalization"], 1, atol=0.05)
    np.testing.assert_allclose(summary["effective_rows"], [48, 60, 48, 60], atol=3)  # 60 (mean zeta)^2 / mean zeta^2
    truth = np.array([1.464, 1.2] * 2)
    assert np.all(summary["estimate_low"] < truth) and np.all(truth < summary["estimate_high"])
    assert summary["true_value"] == [None] * 4
    said = capsys.readouterr().out
    assert "raw rewards, discount 0.9, no horizon" in said and said.count("true value nan; ratios add up to") == 4
    again = dice.restore(tmp_path, run=None)  # its act is the evaluated policy's, its q the ratio
    zeta = again.q(np.eye(2, dtype=np.float32)[None].repeat(4, 0), np.ones((4, 2), int))[0]
    np.testing.assert_allclose(zeta, [1.68, 1.8144], atol=0.15)


class Env:
    interface, dataset_id = Interface([1], {"n": 2, "start": 0}, [0.0], [1.0]), "some/data-v0"
    fingerprint = {}

    def measure(self, policy, q, seeds, num_episodes, **options):
        return {"true_value": np.full(len(seeds), 7.0)}


def estimates(terminal, **changes):
    """Of two episodes, of rows 0, 1 and of row 2."""
    n = np.arange(3.0, dtype=np.float32)
    data = Transition(n[:, None], np.zeros(3, int), np.array([1, 2, 4], np.float32), n[:, None], np.array(terminal))
    runs = type("Runs", (), {"runs": [{"seed": 0, "grid": {}}], "interface": Env.interface, "digest": ""})()
    return dice.Estimates(dice.Config(**changes), Env(), runs, data._replace(episode=np.array([0, 0, 1])))


def test_the_estimate_divides_by_what_flows_out_and_resamples_episodes():
    env = estimates([0.0, 1.0, 0.0])
    found = env.measure(None, lambda obs, action: 1 + obs[..., 0], [0, 1], 1, discount=np.array([0.5, 0.75]))
    # zeta = 1, 2, 3: earned 1 + 4 + 12; of the outflow, 1 - 0.5 = 0.5, 2 and 1.5: 4. With 0.75: 0.25, 2 and 0.75: 3
    np.testing.assert_allclose(found["estimate"], [17 / 4, 17 / 3])
    np.testing.assert_allclose(found["normalization"], [4 / 2, 3 / 1.5])
    np.testing.assert_allclose(found["effective_rows"], 36 / 14)
    np.testing.assert_array_equal(found["believed_value"], found["estimate"])
    np.testing.assert_array_equal(found["true_value"], 7)
    # A resample has both episodes, or one of them twice: 5 / 2.5 = 2, and 12 / 1.5 = 8
    np.testing.assert_allclose([found["estimate_low"][0], found["estimate_high"][0]], [2, 8])


def test_a_resample_has_as_many_episodes_as_the_data():
    # 100 episodes, half of which earn 1: a mean of 0.5, of deviation 0.05
    env = estimates([1.0, 1.0, 1.0])
    data = env.dataset
    env.dataset = Transition(*(x if x is None else np.resize(x, (100, *x.shape[1:])) for x in data))
    env.dataset, env.first = env.dataset._replace(reward=np.arange(100) % 2), np.arange(100)
    found = env.measure(None, lambda obs, action: np.ones(obs.shape[:2]), [0], 1, discount=0.9)
    ends = [found["estimate_low"][0], found["estimate"][0], found["estimate_high"][0]]
    np.testing.assert_allclose(ends, [0.4, 0.5, 0.6], atol=0.011)  # 90 % would be 0.42 to 0.58


def test_visits_that_never_end_need_a_discount():
    with pytest.raises(SystemExit, match="use --discount below 1"):
        estimates([0.0, 0.0, 0.0], discount=1.0)
    estimates([0.0, 1.0, 0.0], discount=1.0)


def test_a_deterministic_policy_of_continuous_actions_has_no_ratio(monkeypatch):
    own = Interface([1], {"low": [-1.0], "high": [1.0], "dtype": "float32"}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1), own, {})
    states = runs.init()
    rows = states._replace(key=jax.random.key_data(states.key)), runs.fields
    monkeypatch.setattr(dice, "frozen", lambda folder, act: (runs, iql.make_agent, rows))
    with pytest.raises(SystemExit, match="No ratio of visits exists for a deterministic policy"):
        dice.make_agent(dice.Config(policy="x"), own.spec)
    dice.make_agent(dice.Config(policy="x", act="sample"), own.spec)
    monkeypatch.setattr(
        dice, "frozen", lambda folder, act: (runs, lambda *at: iql.make_agent(*at)._replace(policy=None), rows)
    )
    with pytest.raises(SystemExit, match="or one without a density"):
        dice.make_agent(dice.Config(policy="x", act="sample"), own.spec)


def test_the_policy_sees_its_own_observations_and_the_data_its_own_actions(monkeypatch):
    """A policy of data with another normalisation and other bounds, on the data as they are."""
    own = Interface([1], {"low": [0.0], "high": [4.0], "dtype": "float32"}, [5.0], [2.0], [True, []])
    theirs = Interface([1], {"low": [-10.0], "high": [10.0], "dtype": "float32"}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1), own, {})
    runs.states, runs.digest = runs.init(), "of the policy"
    raw, action = np.array([[3.0], [6.0], [9.0]], np.float32), np.array([[-0.2], [0.1], [0.9]], np.float32)
    data = Transition(raw, action, np.ones(3, np.float32), raw + 1, np.zeros(3), episode=np.array([0, 0, 1]))

    class OfData(Env):
        interface, fingerprint = theirs, {"hash": "of the data"}

        def measure(self, policy, q, seeds, num_episodes, **options):
            return {"acted": policy(raw[None], 0, None, np.zeros((1, 3), np.float32))[0], "true_value": np.zeros(1)}

    monkeypatch.setattr(dice, "frozen", lambda folder, act: (runs, iql.make_agent, None))
    monkeypatch.setattr(dice, "load_dataset", lambda *args, **options: (data, OfData()))
    dataset, env = dice.load_data(dice.Config(policy="x", num_seeds=1))
    np.testing.assert_allclose(dataset.obs[:, 0], [-1, 0.5, 2])
    np.testing.assert_allclose(dataset.next_obs[:, 0], [-0.5, 1, 2.5])
    np.testing.assert_allclose(dataset.action[:, 0], [-2, -0.5, 3.5])  # -2, 1 and 9 where the bounds are 0 and 4
    assert not [x for x in jax.tree.leaves(dataset) if x.ctypes.data % 64]  # aligned: all CPU devices share them
    assert env.fingerprint == {"hash": "of the data", "policy": "of the policy"}
    acted = env.measure(runs.act, lambda obs, action: 1 + 0 * obs[..., 0], [0], 1, discount=0.9)["acted"]
    mean = np.asarray(runs.act((raw[None] - 5) / 2, 0, None, np.zeros((1, 3), np.float32))[0])
    np.testing.assert_allclose(10 * acted, 2 + 2 * mean, rtol=1e-4)
    with pytest.raises(SystemExit, match="other observations or actions"):
        OfData.interface = theirs._replace(observation=[2])
        dice.load_data(dice.Config(policy="x", num_seeds=1))


def test_the_ratios_of_all_rows_count():
    # More rows than are asked about at once: 9,000, in one episode, of which the last 1,000 have the reward 1
    env = estimates([1.0, 1.0, 1.0])
    env.dataset = Transition(*(x if x is None else np.resize(x, (9000, *x.shape[1:])) for x in env.dataset))
    env.dataset, env.first = env.dataset._replace(reward=np.arange(9000) >= 8000), np.array([0])
    found = env.measure(None, lambda obs, action: np.ones(obs.shape[:2]), [0], 1, discount=0.9)
    assert found["estimate"] == pytest.approx(1 / 9) and found["effective_rows"] == pytest.approx(9000)


def test_a_policy_with_a_memory_has_no_value_of_a_state(monkeypatch):
    own = Interface([1], {"n": 2, "start": 0}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1), own, {})
    rows = runs.init()._replace(key=np.zeros((1, 2), np.uint32)), runs.fields
    remembers = type("Agent", (), {"act_with_memory": None})
    monkeypatch.setattr(dice, "frozen", lambda folder, act: (runs, lambda cfg, spec: remembers, rows))
    with pytest.raises(SystemExit, match="has a memory"):
        dice.make_agent(dice.Config(policy="x"), own.spec)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"policy": ""}, "python algos/iql.py --dataset"),
        ({"policy": "nowhere"}, "holds no run"),
        ({"num_seeds": 3}, "holds 2 runs: evaluate all of them with --num-seeds 2"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(policy, changes, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        dice.main(dice.Config(**{"policy": policy[0], "dataset": policy[1], **SMALL} | changes))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
