"""Doubly robust estimators against numbers worked out by hand, and the contract of their array functions."""

import dataclasses

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain import ACTIONS, D1, D2, MASK, MU, PI, Q_PI, REWARDS, V_PI

from algos import doubly_robust as ope
from algos import fqe, importance_sampling
from algos.doubly_robust import Episodes


def episodes_of(rows, q=None, pi=PI, dtype=np.float32):
    """Episodes of chain C2 (tests/chain.py) with a Q: "pi" its true one, or the same number everywhere."""
    state = np.broadcast_to(np.arange(2), (len(rows), 2))
    action = ACTIONS[rows]
    log_pi, log_mu = (jnp.log(jnp.asarray(p, dtype))[state, action] for p in (pi, MU))
    q_table, v_table = (Q_PI, V_PI) if q == "pi" else (np.full((2, 2), float(q)), np.full(2, float(q)))
    q, v = jnp.asarray(q_table[state, action], dtype), jnp.asarray(v_table[state], dtype)
    return Episodes(jnp.asarray(REWARDS[rows], dtype), log_pi, log_mu, q, v, jnp.asarray(MASK[rows]))


def estimates(episodes, discount=0.9, count=None):
    count = jnp.ones(len(episodes.reward)) if count is None else count
    found = ope.estimate(episodes, count, discount)
    return {name: float(found[name]) for name in ope.ESTIMATORS}


@pytest.mark.parametrize(
    "rows, q, right",
    [
        (D1, 1, {"DR": 1.464, "WDR": 1.464, "DM": 1.0, "ESS": 2.834467}),
        (D2, 1, {"DR": 2.056, "WDR": 1.786622, "DM": 1.0}),
        (D1, "pi", {"DR": 1.464, "WDR": 1.464, "DM": 1.464}),
        (D2, "pi", {"DR": 1.464, "WDR": 1.464, "DM": 1.464}),
        (D1, 0, {"DR": 1.464, "WDR": 1.464, "DM": 0.0}),
        (D2, 0, {"DR": 2.428, "WDR": 1.790635, "DM": 0.0}),  # PDIS and PDWIS
    ],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_chain(rows, q, right, dtype):
    # D1 has the behaviour's own frequencies: every consistent estimator has 1.464 there. Where an episode that has
    # ended drops out of the sums of weights, WDR with Q = 0 has 1.68.
    with jax.enable_x64(dtype == np.float64):
        found = estimates(episodes_of(rows, q, dtype=dtype))
    for name, value in right.items():
        assert found[name] == pytest.approx(value, abs=1e-6 if dtype == np.float64 else 1e-4), name


def test_single_episodes():
    # Q = 1: 1 + 0.4 (1 - 1); 1 + 1.6 (0.5 + 0.9 (1 + 0.8 (0 - 1)) - 1); 1 + 1.6 (0.5 + 0.9 (1 + 1.2 (2 - 1)) - 1)
    for row, right in enumerate([1.0, 0.488, 3.368]):
        assert estimates(episodes_of([row], 1))["DR"] == pytest.approx(right, abs=1e-5)
        assert estimates(episodes_of([row], "pi"))["DR"] == pytest.approx(1.464, abs=1e-5)


def test_variance_of_one_episode_under_the_behaviour():
    probability = np.array([0.5, 0.25, 0.25])
    for q, right in ((0, 2.625088), (1, 1.252096), ("pi", 0.0)):
        x = np.array([estimates(episodes_of([row], q))["DR"] for row in range(3)])
        assert probability @ x == pytest.approx(1.464, abs=1e-5)
        assert probability @ (x - probability @ x) ** 2 == pytest.approx(right, abs=1e-4)


def test_the_behaviour_itself_has_the_mean_return():
    for q in (0, 1):
        found = estimates(episodes_of(D1, q, pi=MU))
        assert found["DR"] == pytest.approx(1.2, abs=1e-6) and found["WDR"] == pytest.approx(1.2, abs=1e-6)


def random_episodes(n, steps, rng):
    mask = np.arange(steps)[None] < rng.integers(1, steps + 1, n)[:, None]
    log_pi, log_mu = np.log(rng.uniform(0.1, 1, (2, n, steps)))
    reward, q, v = rng.normal(size=(3, n, steps))
    return Episodes(reward, log_pi, log_mu, q, v, mask)


def test_the_recursion_is_the_sum():
    """V_0 of the recursion is sum_t discount^t [w_t (r_t - Q_t) + w_{t-1} V_t]."""
    with jax.enable_x64(True):
        e = random_episodes(7, 5, np.random.default_rng(0))
        w = np.exp(np.cumsum(np.where(e.mask, e.log_pi - e.log_mu, 0), axis=1))
        before = np.concatenate([np.ones((7, 1)), w[:, :-1]], axis=1)
        right = (0.9 ** np.arange(5) * (w * (e.reward - e.q) + before * e.v) * e.mask).sum(axis=1).mean()
        assert estimates(e)["DR"] == pytest.approx(right, rel=1e-12)


def test_without_a_q_it_is_importance_sampling():
    with jax.enable_x64(True):
        e = random_episodes(7, 5, np.random.default_rng(1))
        e = e._replace(q=0 * e.q, v=0 * e.v)
        right = importance_sampling.estimate(
            importance_sampling.Episodes(e.reward, e.log_pi, e.log_mu, e.mask), np.ones(7), 0.9
        )
        found = estimates(e)
        assert found["DR"] == pytest.approx(float(right["PDIS"]), rel=1e-12)
        assert found["WDR"] == pytest.approx(float(right["PDWIS"]), rel=1e-12)


# --- MAGIC -------------------------------------------------------------------------------------------------


def test_blend_of_two():
    # x'diag(0.09, 0.04)x with x = (x, 1 - x): x = 0.04 / 0.13. The element-wise bias * bias of a list instead of its
    # outer product, added to every row, gives 0.
    np.testing.assert_allclose(ope.blend(np.diag([0, 0.04]), np.array([0.3, 0])), [0.04 / 0.13, 0.09 / 0.13], atol=1e-6)
    # Biases of opposite sign cancel, which only the outer product knows: x'(0.01 I + b b')x, b = (0.3, -0.3)
    np.testing.assert_allclose(ope.blend(0.01 * np.eye(2), np.array([0.3, -0.3])), [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(ope.blend(0.01 * np.eye(2), np.array([0.6, -0.3])), [0.56 / 1.66, 1.1 / 1.66], atol=1e-6)


def test_blend_is_the_minimum_on_the_simplex():
    rng = np.random.default_rng(0)
    for size in (1e-9, 1.0, 1e9):
        root, bias = rng.normal(size=(4, 4)), rng.normal(size=4)
        omega, bias = size * root @ root.T, size**0.5 * bias
        x = ope.blend(omega, bias)
        assert x.min() >= 0 and x.sum() == pytest.approx(1)
        error = omega + np.outer(bias, bias)
        others = rng.dirichlet(np.full(4, 0.5), 20_000)
        assert x @ error @ x <= np.einsum("ni,ij,nj->n", others, error, others).min() * (1 + 1e-9)
    np.testing.assert_allclose(ope.blend(np.zeros((3, 3)), np.zeros(3)), 1 / 3)  # all exact, all alike


def test_magic_weighs_squared_biases_against_variances():
    # g = (1.1, 0.8), WDR's interval is 0.8 alone: b = (0.3, 0). The parts 0.1, 0.3, 0.1, 0.3 have the variance
    # 0.04 / 3, and their sum 4 times that: x = (0.16 / 3) / (0.16 / 3 + 0.09)
    parts = np.stack([np.full(4, 0.275), [0.1, 0.3, 0.1, 0.3]], axis=1)
    x = ope.magic(parts, np.full(100, 0.8))
    np.testing.assert_allclose(x[0], 0.16 / 3 / (0.16 / 3 + 0.09), atol=1e-6)
    # An interval from 0.7 to 1, of samples of which 5 % are outside on each side: b = (0.1, 0)
    x = ope.magic(parts, np.linspace(0.7 - 0.3 / 18, 1 + 0.3 / 18, 1001))
    np.testing.assert_allclose(x[0], 0.16 / 3 / (0.16 / 3 + 0.01), atol=1e-6)


def test_partial_estimators_go_from_the_model_to_wdr():
    with jax.enable_x64(True):
        e = random_episodes(7, 5, np.random.default_rng(2))
        g = np.asarray(ope.partial(e, np.ones(7), 0.9).sum(axis=0))
        found = estimates(e)
        assert g[0] == pytest.approx(found["DM"], rel=1e-12) and g[-1] == pytest.approx(found["WDR"], rel=1e-12)
        # j = 0: the first reward and the model's value of the second state, with the weights of step 0
        w = np.exp((e.log_pi - e.log_mu)[:, 0])
        w = w / w.sum()
        after = np.where(e.mask[:, 1], e.v[:, 1], 0)
        right = (w * (e.reward[:, 0] - e.q[:, 0] + 0.9 * after) + e.v[:, 0] / 7).sum()
        assert g[1] == pytest.approx(right, rel=1e-12)


def test_magic_takes_the_model_where_it_is_right_and_wdr_where_it_is_far_off():
    """With Q^pi all g_j are alike; with a Q of 100 the model's bias rules it out."""
    rng = np.random.default_rng(3)
    rows = rng.choice(3, size=200, p=[0.5, 0.25, 0.25])
    for q, least, most in (("pi", 1.46, 1.47), (100, 0, 3)):
        with jax.enable_x64(True):
            e = episodes_of(rows, q, dtype=np.float64)
            samples = jax.jit(ope.bootstrap, static_argnums=3)(e, 0.9, jax.random.key(0), 200)
            parts = np.asarray(ope.partial(e, np.ones(200), 0.9))
        x = ope.magic(parts, np.asarray(samples["WDR"]))
        assert x.sum() == pytest.approx(1) and least < parts.sum(axis=0) @ x < most
    assert x[0] < 0.01


# --- The contract ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 7.0])
def test_padding_changes_nothing(garbage):
    e = random_episodes(6, 5, np.random.default_rng(4))
    after = [np.full((6, 3), garbage)] * 5 + [np.zeros((6, 3), bool)]
    padded = Episodes(*(np.concatenate([x, y], axis=1) for x, y in zip(e, after, strict=True)))
    inside = Episodes(*(np.where(padded.mask, x, garbage) for x in padded[:5]), padded.mask)
    for other in (padded, inside):
        ope.check(other)
        assert estimates(other) == pytest.approx(estimates(e), rel=1e-5)


def test_order_of_the_episodes_changes_nothing_and_counts_stand_for_copies():
    e = random_episodes(6, 5, np.random.default_rng(5))
    order = np.random.default_rng(6).permutation(6)
    assert estimates(jax.tree.map(lambda x: x[order], e)) == pytest.approx(estimates(e), rel=1e-5)
    count = np.array([2, 0, 1, 3, 1, 1])
    copies = estimates(jax.tree.map(lambda x: np.repeat(x, count, axis=0), e))
    assert estimates(e, count=count.astype(np.float32)) == pytest.approx(copies, rel=1e-5)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"q": np.zeros((6, 4))}, "one shape"),
        ({"v": np.full((6, 5), np.nan)}, "must be numbers"),
        ({"q": np.full((6, 5), np.inf)}, "must be numbers"),
        ({"log_mu": np.full((6, 5), -np.inf)}, "probability 0 of an action that it took"),
        ({"log_pi": np.full((6, 5), -np.inf)}, "No support"),
        ({"mask": np.zeros((6, 5), bool)}, "come first"),
        ({name: np.zeros((1, 5)) for name in Episodes._fields}, "Two or more|two or more"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(change, sentence):
    e = random_episodes(6, 5, np.random.default_rng(7))._replace(mask=np.ones((6, 5), bool))
    with pytest.raises(SystemExit, match=sentence) as error:
        ope.check(e._replace(**change))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code


# --- Runs and data -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folders of a policy (seed 0 is PI, seed 1 MU) and of FQE runs of it: as it is, and in two folds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        dataset = chain.write(D1 * 10, propensity=0.5)
        policy = chain.train(tmp_path_factory.mktemp("policy"), dataset)
        folders = [policy]
        small = dict(
            num_updates=1000, eval_interval=1000, log_interval=1000, batch_size=32, hidden=(16,), eval_episodes=0
        )
        for folds in (1, 2):
            out = str(tmp_path_factory.mktemp("fqe"))
            cfg = fqe.Config(
                dataset, policy=policy, act="sample", discount=0.9, num_seeds=2 * folds, folds=folds, out=out
            )
            fqe.main(dataclasses.replace(cfg, **small))
            folders.append(out)
        yield folders


@pytest.mark.parametrize("folds, behaviour", [(1, "counts"), (2, "logged")])
def test_every_run_of_a_folder_is_evaluated(run, folds, behaviour, capsys):
    cfg = ope.Config(run[folds], behaviour, resamples=50)
    pi, mu = ope.evaluate(cfg)
    for name in ("DM", "DR", "WDR", "MAGIC"):
        assert pi[name][0] == pytest.approx(1.464, abs=0.03) and mu[name][0] == pytest.approx(1.2, abs=0.03), name
    assert pi["ESS"][0] == pytest.approx(10 * 2.834467, rel=1e-4)
    assert pi["DR"][2] - pi["DR"][1] < 0.1  # Q explains nearly all; importance sampling has 1
    ope.main(cfg)
    assert capsys.readouterr().out.count("MAGIC") == 2


def test_cross_fitting_asks_the_critics_that_have_not_seen_the_episode():
    # Seeds 4 .. 9, two runs, folds by seed // 2 % 3: 2 2 0 0 1 1. Rows of the episodes 0, 1, 2, 3
    x = np.arange(6.0)[:, None] * np.ones((6, 4))
    found = ope.cross_fitted(x, np.arange(4, 10), 1, 2, 3, np.arange(4))
    np.testing.assert_array_equal(found, [3, 5, 1, 3])
    np.testing.assert_array_equal(ope.cross_fitted(x, np.arange(4, 10), 0, 2, 1, np.arange(4)), [2] * 4)


def test_what_it_cannot_do_is_said_in_one_sentence(run):
    for folder, sentence in (
        ("", "python algos/fqe.py"),
        ("nowhere", "holds no run"),
        (run[0], "is a run of marwil.py"),
    ):
        with pytest.raises(SystemExit, match=sentence) as error:
            ope.evaluate(ope.Config(folder))
        assert isinstance(error.value.code, str) and "\n" not in error.value.code
