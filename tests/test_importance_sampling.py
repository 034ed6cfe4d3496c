"""Importance sampling against numbers worked out by hand, and the contract of its array functions."""

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from chain import ACTIONS, D1, D2, MASK, MU, PI, REWARDS

from algos import importance_sampling as ope
from algos import iql
from algos.importance_sampling import Episodes
from common.datasets import Transition
from common.environments import Interface

COUNTED = ope.counts(*np.array([(0, 0), (0, 1), (1, 0), (0, 1), (1, 1), (0, 1), (1, 1)]).T, 2, 2)  # D2's: 3/4 and 2/3
LAPLACE = ope.counts(*np.array([(0, 0), (0, 1), (1, 0), (0, 1), (1, 1), (0, 1), (1, 1)]).T, 2, 2, prior=1.0)


def episodes_of(rows, pi=PI, mu=MU, dtype=np.float32):
    state = np.broadcast_to(np.arange(2), (len(rows), 2))
    action = ACTIONS[rows]
    log_pi, log_mu = (jnp.log(jnp.asarray(p, dtype))[state, action] for p in (pi, mu))
    return Episodes(jnp.asarray(REWARDS[rows], dtype), log_pi, log_mu, jnp.asarray(MASK[rows]))


def estimates(episodes, discount=0.9):
    return jax.tree.map(float, ope.estimate(episodes, jnp.ones(len(episodes.reward)), discount))


@pytest.mark.parametrize(
    "rows, mu, right",
    [
        (D1, MU, {"IS": 1.464, "PDIS": 1.464, "WIS": 1.464, "PDWIS": 1.464, "ESS": 2.834467}),
        (D2, MU, {"IS": 2.468, "PDIS": 2.428, "WIS": 1.788406, "PDWIS": 1.790635, "ESS": 3.322401}),
        (D2, COUNTED, {"IS": 1.464, "PDIS": 1.464, "WIS": 1.464, "PDWIS": 1.464, "ESS": 3.881988}),
        (D2, LAPLACE, {"IS": 1.68, "PDIS": 1.68, "WIS": 1.6, "PDWIS": 1.6, "ESS": 3.769231}),
    ],
    ids=["D1", "D2", "D2-counted", "D2-laplace"],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_chain(rows, mu, right, dtype):
    # D1: PDWIS is 1.68 where an ended episode drops out of the sums of weights, and 0.932308 where it joins them with
    # weight 1: neither would be consistent, since D1 has the behaviour's own frequencies.
    with jax.enable_x64(dtype == np.float64):
        found = estimates(episodes_of(rows, mu=mu, dtype=dtype))
    for name, value in right.items():
        assert found[name] == pytest.approx(value, abs=1e-6 if dtype == np.float64 else 1e-4), name


def test_counts():
    np.testing.assert_allclose(COUNTED, [[1 / 4, 3 / 4], [1 / 3, 2 / 3]])
    np.testing.assert_allclose(LAPLACE, [[2 / 6, 4 / 6], [2 / 5, 3 / 5]])
    np.testing.assert_array_equal(ope.counts([0], [1], 2, 2)[1], 0)  # a state that was never seen


def test_single_episodes():
    # w = 0.4; 1.6, 1.28; 1.6, 1.92. PDIS: 0.4 * 1; 1.6 * 0.5; 1.6 * 0.5 + 0.9 * 1.92 * 2. WIS of one is its return.
    for row, right in enumerate([0.4, 0.8, 4.256]):
        found = estimates(episodes_of([row]))
        assert found["PDIS"] == pytest.approx(right, abs=1e-5)
        assert found["WIS"] == pytest.approx([1.0, 0.5, 2.3][row], abs=1e-5)


def test_variance_of_one_episode_under_the_behaviour():
    # Episodes have the probabilities 1/2, 1/4, 1/4
    probability = np.array([0.5, 0.25, 0.25])
    for name, right in {"IS": 2.914368, "PDIS": 2.625088}.items():
        x = np.array(
            [
                estimates(
                    episodes_of(
                        [row],
                    )
                )[name]
                for row in range(3)
            ]
        )
        assert probability @ x == pytest.approx(1.464, abs=1e-5)
        assert probability @ (x - probability @ x) ** 2 == pytest.approx(right, abs=1e-4)


def test_the_behaviour_itself_has_the_mean_return():
    found = estimates(episodes_of(D1, pi=MU))
    assert found == pytest.approx({"IS": 1.2, "PDIS": 1.2, "WIS": 1.2, "PDWIS": 1.2, "ESS": 4.0}, abs=1e-6)


def logits_of(pi):
    return jnp.log(jnp.asarray(pi)[:, 1] / jnp.asarray(pi)[:, 0])


@pytest.mark.parametrize(
    "rows, name, right",
    [
        (D1, "PDIS", (0.0928, 0.3456)),
        (D1, "IS", (0.0928, 0.3456)),
        (D2, "PDIS", (0.3856, 0.6912)),
        (D2, "IS", (0.3936, 0.7872)),
    ],
)
def test_the_gradient_is_the_policy_gradient(rows, name, right):
    # In the logits of "go": dV/dtheta0 = pi(go) pi(stop) (Q(s0, go) - Q(s0, stop)) = 0.16 * 0.58, and
    # dV/dtheta1 = 0.8 * 0.9 * 0.24 * 2. D1, with the behaviour's frequencies, has it exactly.
    with jax.enable_x64(True):

        def value(logits):
            log_p = jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], axis=1)
            episodes = episodes_of(rows, dtype=np.float64)
            log_pi = log_p[jnp.arange(2)[None], ACTIONS[rows]]
            return ope.estimate(episodes._replace(log_pi=log_pi), jnp.ones(len(rows)), 0.9)[name]

        np.testing.assert_allclose(jax.grad(value)(logits_of(PI)), right, atol=1e-9)


def test_the_gradient_per_decision_is_its_formula():
    # sum_t discount^t w_t grad log pi_t sum_{t' >= t} discount^(t' - t) (rho_{t+1} .. rho_t') r_t', in numbers
    with jax.enable_x64(True):
        key = jax.random.split(jax.random.key(0), 3)
        theta, features = jax.random.normal(key[0], (4,)), jax.random.normal(key[1], (6, 5, 4))
        episodes = random_episodes(6, 5, np.random.default_rng(0))

        def log_pi(theta):
            return jax.nn.log_sigmoid(features @ theta)

        found = jax.grad(lambda x: ope.per_decision(episodes._replace(log_pi=log_pi(x)), jnp.ones(6), 0.9))(theta)
        slope = np.asarray(jax.jacobian(log_pi)(theta))
        rho = np.exp(np.asarray(log_pi(theta)) - episodes.log_mu)
        right = np.zeros(4)
        for i in range(6):
            for t in range(int(episodes.mask[i].sum())):
                to_go, w = 0.0, 1.0
                for u in range(t, int(episodes.mask[i].sum())):
                    w *= rho[i, u] if u > t else 1.0
                    to_go += 0.9 ** (u - t) * w * episodes.reward[i, u]
                right += 0.9**t * np.prod(rho[i, : t + 1]) * slope[i, t] * to_go / 6
        np.testing.assert_allclose(found, right, rtol=1e-10)


def test_ranks_a_pool_of_policies():
    # V = 1 + p (1.58 - 1) for pi(go|s0) = p; deterministic policies have weights 0 and need no special care
    found = [estimates(episodes_of(D1, pi=np.array([[1 - p, p], [0.4, 0.6]])))["PDIS"] for p in (0, 0.25, 0.5, 0.75, 1)]
    np.testing.assert_allclose(found, [1, 1.145, 1.29, 1.435, 1.58], atol=1e-6)


# --- The contract ------------------------------------------------------------------------------------------


def random_episodes(n, steps, rng, whole=False):
    mask = np.arange(steps)[None] < (np.full(n, steps) if whole else rng.integers(1, steps + 1, n))[:, None]
    log_pi, log_mu = np.log(rng.uniform(0.1, 1, (2, n, steps)))
    return Episodes(rng.normal(size=(n, steps)), log_pi, log_mu, mask)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 7.0])
def test_padding_changes_nothing(garbage):
    episodes = random_episodes(6, 5, np.random.default_rng(1))
    after = [np.full((6, 3), garbage)] * 3 + [np.zeros((6, 3), bool)]
    padded = Episodes(*(np.concatenate([x, y], axis=1) for x, y in zip(episodes, after, strict=True)))
    inside = padded._replace(
        **{name: np.where(padded.mask, x, garbage) for name, x in padded._asdict().items() if name != "mask"}
    )
    right = estimates(episodes)
    for other in (padded, inside):
        ope.check(other)
        assert estimates(other) == pytest.approx(right, rel=1e-6)
        gradient = jax.grad(lambda x, e=other: ope.per_decision(e._replace(log_pi=x), jnp.ones(6), 0.9))(other.log_pi)
        assert np.isfinite(gradient).all()


def test_order_of_the_episodes_changes_nothing_and_counts_stand_for_copies():
    episodes = random_episodes(6, 5, np.random.default_rng(2))
    right = estimates(episodes)
    order = np.random.default_rng(3).permutation(6)
    assert estimates(jax.tree.map(lambda x: x[order], episodes)) == pytest.approx(right, rel=1e-5)
    count = np.array([2, 0, 1, 3, 1, 1])
    copies = estimates(jax.tree.map(lambda x: np.repeat(x, count, axis=0), episodes))
    assert jax.tree.map(float, ope.estimate(episodes, count.astype(np.float32), 0.9)) == pytest.approx(copies, rel=1e-5)


def test_a_constant_on_every_reward_moves_weighted_estimates_by_its_own_value():
    episodes = random_episodes(6, 5, np.random.default_rng(4), whole=True)
    before, after = estimates(episodes), estimates(episodes._replace(reward=episodes.reward + 3))
    for name in ("WIS", "PDWIS"):
        assert after[name] - before[name] == pytest.approx(3 * (1 - 0.9**5) / (1 - 0.9), abs=1e-4)
    assert after["IS"] - before["IS"] != pytest.approx(3 * (1 - 0.9**5) / (1 - 0.9), abs=0.1)


def test_weights_of_long_episodes_do_not_underflow():
    # 0.5^1000 is 0 in float32, even in float64 its square is: the ratios are 1/4 : 3/4 all the same
    log_pi = np.log(np.full((2, 1000), 0.5))
    log_pi[1, 0] += np.log(3)
    episodes = Episodes(
        np.stack([np.zeros(1000), np.ones(1000)]), log_pi, np.zeros((2, 1000)), np.ones((2, 1000), bool)
    )
    found = estimates(episodes.__class__(*(x.astype(np.float32) if x.dtype == float else x for x in episodes)), 1.0)
    assert found["WIS"] == pytest.approx(750, rel=1e-3) and found["PDWIS"] == pytest.approx(750, rel=1e-3)
    assert found["ESS"] == pytest.approx(1.6, rel=1e-3)


def test_bootstrap_draws_episodes_and_not_steps():
    # Two episodes of return 0 and 10 steps of 1: a resample has 0, 5 or 10, as often as two coins have it
    reward = np.stack([np.zeros(10), np.ones(10)])
    episodes = Episodes(reward, np.zeros((2, 10)), np.zeros((2, 10)), np.ones((2, 10), bool))
    samples = jax.jit(ope.bootstrap, static_argnums=3)(episodes, 1.0, jax.random.key(0), 4000)["IS"]
    values, often = np.unique(np.round(np.asarray(samples), 3), return_counts=True)
    np.testing.assert_array_equal(values, [0, 5, 10])
    np.testing.assert_allclose(often / 4000, [0.25, 0.5, 0.25], atol=0.03)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"reward": np.zeros((6, 4))}, "one shape"),
        ({"reward": np.full((6, 5), np.nan)}, "must be numbers"),
        ({"log_pi": np.full((6, 5), np.nan)}, "must be numbers"),
        ({"log_pi": np.full((6, 5), np.inf)}, "evaluated policy .* deterministic"),
        ({"log_mu": np.full((6, 5), np.inf)}, "behaviour .* deterministic"),
        ({"log_mu": np.full((6, 5), -np.inf)}, "probability 0 of an action that it took"),
        ({"log_pi": np.full((6, 5), -np.inf)}, "No support"),
        ({"mask": np.ones((6, 5))}, "True and False"),
        ({"mask": np.array([[True, False, True, True, True]] * 6)}, "come first"),
        ({"mask": np.zeros((6, 5), bool)}, "come first"),
        ({name: np.zeros((0, 5)) for name in Episodes._fields}, "one shape"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        ope.check(random_episodes(6, 5, np.random.default_rng(5), whole=True)._replace(**change))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code


def test_rows_become_episodes():
    episode = np.array([0, 0, 0, 1, 2, 2])
    np.testing.assert_array_equal(ope.pad(episode, np.arange(1, 7)), [[1, 2, 3], [4, 0, 0], [5, 6, 0]])


# --- Runs and data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run whose seed 0 is PI and seed 1 MU, and the name of a dataset with MU's frequencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        dataset = chain.write(D1 * 5, propensity=0.5)
        yield chain.train(tmp_path_factory.mktemp("policy"), dataset), dataset


@pytest.mark.parametrize(
    "behaviour, tolerance", [("counts", 1e-5), ("clone", 0.05), ("folder", 1e-5), ("logged", 1e-5)]
)
def test_every_run_of_a_folder_is_evaluated(policy, behaviour, tolerance, capsys, tmp_path):
    folder, dataset = policy
    if behaviour == "folder":  # of which the first run is the behaviour
        behaviour = chain.train(tmp_path, dataset, num_seeds=1, policies=[MU])
    cfg = ope.Config(folder, dataset, behaviour, discount=0.9, resamples=100, clone_updates=2000, eval_episodes=0)
    pi, mu = ope.evaluate(cfg)
    ope.main(cfg)
    assert capsys.readouterr().out.count("PDWIS") == 2
    for name in ("IS", "PDIS", "WIS", "PDWIS"):
        assert pi[name][0] == pytest.approx(1.464, abs=tolerance) and mu[name][0] == pytest.approx(1.2, abs=tolerance)
        assert pi[name][1] < 1.2 < 1.464 < pi[name][2]
    assert pi["ESS"][0] == pytest.approx(5 * 2.834467, rel=tolerance) and mu["ESS"][0] == pytest.approx(
        20, rel=tolerance
    )
    assert (pi["seed"], mu["seed"], pi["zero_weights"]) == (0, 1, 0)


def test_the_most_likely_action_is_a_policy_too(policy):
    # go, go in every state: its return 0.5 + 0.9 * 2 = 2.3, of the only episodes whose weight, 4, is not 0
    pi, _ = ope.evaluate(ope.Config(*policy, "counts", "mode", discount=0.9, resamples=10, eval_episodes=0))
    assert pi["IS"][0] == pytest.approx(2.3) and pi["WIS"][0] == pytest.approx(2.3)
    assert pi["zero_weights"] == 0.75 and pi["ESS"][0] == pytest.approx(5)


def test_densities_are_of_raw_observations_and_of_the_environments_actions():
    """Whatever the normalisation and the bounds of the data that the policy was trained on."""
    own = Interface([1], {"low": [0.0], "high": [4.0], "dtype": "float32"}, [5.0], [2.0], [True, []])
    data = Interface([1], {"low": [-10.0], "high": [10.0], "dtype": "float32"}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1, act="sample"), own, {})
    runs.states = runs.init()
    raw, action = np.array([[3.0], [6.0], [9.0]], np.float32), np.array([[-0.2], [0.1], [0.3]], np.float32)
    mean = own.to_env(
        iql.GaussianActor(1, (4,)).apply(jax.tree.map(lambda x: x[0], runs.states.actor.params), (raw - 5) / 2).mean
    )
    right = scipy.stats.norm.logpdf(10 * action, mean, 2)[:, 0]  # log_std is 0, and half the width of the bounds is 2
    np.testing.assert_allclose(ope.log_prob(runs, data, raw, action)[0], right, rtol=1e-5)
    runs.cfg = iql.Config(hidden=(4,), num_seeds=1, act="mode")
    with pytest.raises(SystemExit, match="No ratio of probabilities"):
        ope.log_prob(runs, data, raw, action)
    with pytest.raises(SystemExit, match="not the data's"):
        ope.log_prob(runs, data._replace(observation=[2]), raw, action)


def test_a_clone_has_the_density_of_the_data():
    # Actions uniform on half of the Box [0, 4], whose density is 1/2 there
    interface = Interface([1], {"low": [0.0], "high": [4.0], "dtype": "float32"}, [0.0], [1.0])
    action = np.random.default_rng(0).uniform(-0.5, 0.5, (500, 1)).astype(np.float32)
    cfg = ope.Config(behaviour="clone", clone_updates=1000, hidden=(8,))
    data = Transition(np.zeros((500, 1), np.float32), action, *[None] * 3)
    assert np.exp(ope.behaviour(cfg, interface, data)).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"policy": ""}, "python algos/iql.py --dataset"),
        ({"policy": "nowhere"}, "holds no run"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(policy, changes, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        ope.evaluate(ope.Config(**{"policy": policy[0], "dataset": policy[1], "eval_episodes": 0} | changes))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
