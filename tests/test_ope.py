"""benchmarks/ope.py: its measures have known answers, and it ranks the chain's policies as they are."""

import importlib
import json
import pathlib
import sys
import types

import chain
import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ope  # noqa: E402

from algos import importance_sampling  # noqa: E402

TRUTH, ESTIMATE = np.array([1.0, 2, 3, 4]), np.array([1.5, 1, 4, 3])


def test_measures_on_four_policies():
    # errors .5, 1, 1, 1; ranks 2, 1, 4, 3 against 1, 2, 3, 4; the highest estimate is of the policy with value 3
    assert ope.absolute_error(TRUTH, ESTIMATE) == pytest.approx(0.875)
    assert ope.rank_correlation(TRUTH, ESTIMATE) == pytest.approx(0.6)
    assert ope.regret(TRUTH, ESTIMATE, 1, np.ptp(TRUTH)) == pytest.approx(1 / 3)
    assert ope.regret(TRUTH, ESTIMATE, 2, np.ptp(TRUTH)) == 0
    found = ope.measures(TRUTH, ESTIMATE)
    assert [found[name][0] for name in ope.MEASURES] == pytest.approx([0.875, 0.6, 1 / 3, 0])
    assert all(low <= value <= high for value, low, high in found.values())


def test_a_rising_map_of_the_truth_ranks_perfectly_and_a_constant_ranks_nothing():
    assert ope.rank_correlation(TRUTH, np.exp(TRUTH)) == pytest.approx(1)
    assert ope.regret(TRUTH, np.exp(TRUTH), 1, 3) == 0
    assert np.isnan(ope.rank_correlation(TRUTH, np.ones(4)))
    assert ope.regret(TRUTH, np.ones(4), 1, 3) == pytest.approx(1)  # by the first index
    assert 0.3 < ope.measures(TRUTH, np.ones(4))["regret@1"][0] < 0.5  # at random: less than 1/2, of a resample's best


def test_a_policy_without_an_estimate_cannot_be_chosen_and_counts_in_nothing_else():
    estimate = np.array([1.5, 2.5, np.nan, np.nan])
    assert ope.absolute_error(TRUTH, estimate) == pytest.approx(0.5)
    assert ope.rank_correlation(TRUTH, estimate) == pytest.approx(1)
    assert ope.regret(TRUTH, estimate, 1, 3) == pytest.approx(2 / 3)
    nothing = ope.measures(TRUTH, np.full(4, np.nan))
    assert np.isnan([value for value, _, _ in nothing.values()]).all()
    assert ope.cell(nothing["regret@1"]) == "–" == ope.cell([None, None, None])


def test_intervals_that_hold_the_truth_are_counted():
    intervals = [(1.5, 1.0, 1.8), (1.0, 0.5, 1.5), (4.0, 2.5, 5.0), (3.0, 1.0, 3.5)]  # of truths 1, 2, 3, 4
    policies = [
        {"true_value": true, "estimates": {"FQE": row, "constant": (2.0,) * 3, "ESS": row}}
        for true, row in zip(TRUTH, intervals, strict=True)
    ]
    policies[0]["estimates"]["WIS"] = (1.2, 1.1, 1.3)  # which refused the others
    policies.append({"true_value": None, "estimates": {"FQE": (0.0, -9.0, 9.0)}})
    assert [ope.held(policies, name) for name in ("FQE", "WIS", "constant")] == [2, 0, "–"]
    number = {measure: (1.0, 1.0, 1.0) for measure in ope.MEASURES}
    measures = {name: number | {"policies": 4} for name in ("WIS", "FQE", "constant")}
    measures["WIS"] = {measure: (None,) * 3 for measure in ope.MEASURES} | {"policies": 0}  # no estimate: it is last
    ends = [line.split(" | ")[-1] for line in ope.table({"measures": measures, "policies": policies}).splitlines()]
    assert ends[0] == "held |" and ends[2:] == ["2 |", "– |", "0 |"]


def test_what_the_rewards_do_not_allow_is_no_estimate():
    data, options = types.SimpleNamespace(reward=np.array([-2.0, 1.0])), ope.Options((), discount=0.9)
    assert [ope.possible(x, data, options) for x in (20.0, -20.0, 20.1, np.nan)] == [True, True, False, True]
    endless = ope.Options((), discount=1.0)  # any sum is possible
    assert ope.possible(1e9, data, endless)


def test_importance_sampling_ranks_the_chains_policies():
    """pi(go|s0) in 0, .25, .5, .75, 1 and pi(go|s1) = .6: V = 1 + 0.58 pi(go|s0). D1 has mu's very frequencies."""
    truth, found = 1 + 0.58 * np.linspace(0, 1, 5), []
    for go in np.linspace(0, 1, 5):
        pi = np.array([[1 - go, go], [0.4, 0.6]])
        with np.errstate(divide="ignore"):
            log_pi = np.log(pi[[0, 1], chain.ACTIONS[chain.D1]])
        log_mu = np.full((4, 2), np.log(0.5))
        episodes = importance_sampling.Episodes(chain.REWARDS[chain.D1], log_pi, log_mu, chain.MASK[chain.D1])
        with jax.enable_x64(True):
            found.append(float(jax.jit(importance_sampling.per_decision)(episodes, np.ones(4), 0.9)))
    assert found == pytest.approx(truth)
    assert ope.rank_correlation(truth, np.array(found)) == pytest.approx(1)
    assert ope.regret(truth, np.array(found), 1, np.ptp(truth)) == 0


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A pool of the chain's two policies: every estimator, without an environment."""
    folder = tmp_path_factory.mktemp("pool")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        chain.train(folder / "pool" / "chain", chain.write(chain.D1 * 10))
        small = dict(behaviour="counts", discount=0.9, num_updates=500, hidden=(8,), eval_episodes=0, resamples=10)
        result = ope.main(ope.Options((folder / "pool" / "chain",), **small))
        return folder, result, small


def test_every_estimator_is_asked_by_its_files_name(judged):
    folder, result, _ = judged
    assert tuple(result["options"]["estimators"]) == ope.PRESENT
    first, second = result["policies"]
    names = {"constant", "FQE", "DICE", "model", "IS", "PDIS", "WIS", "PDWIS", "DR", "WDR", "MAGIC"}
    assert names <= first["estimates"].keys()
    assert first["estimates"]["model"][0] == pytest.approx(1.464, abs=1e-3)  # the data's two steps, if none are named
    # D1's own frequencies: MU's value is the data's mean return, and all weights of MU are 1
    assert first["estimates"]["PDIS"][0] == pytest.approx(1.464, abs=1e-3)
    for name in ("constant", "IS", "WIS", "PDWIS"):
        assert second["estimates"][name][0] == pytest.approx(1.2, abs=1e-3)
    assert first["estimates"]["FQE"][0] > second["estimates"]["FQE"][0]
    assert first["estimates"]["ESS"][0] < 40 == pytest.approx(second["estimates"]["ESS"][0])
    written = json.loads((folder / "pool-ope" / "ope.json").read_text())
    assert written["measures"] == {} and written["policies"][0]["true_value"] is None  # no environment: no truth
    assert {"command", "commit", "device", "versions"} <= written.keys()


def test_a_refusal_costs_only_that_estimator(judged, monkeypatch):
    folder, _, small = judged
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
    wanted = {"behaviour": "logged", "estimators": ("fqe", "importance_sampling"), "out": folder / "pool-ope"}
    result = ope.main(ope.Options((folder / "pool" / "chain",), **small | wanted))  # these data have no propensities
    assert set(result["refused"]["chain"]) == {"importance_sampling"}
    assert str(folder) not in json.dumps(result["refused"])
    assert all("FQE" in policy["estimates"] and "IS" not in policy["estimates"] for policy in result["policies"])


@pytest.mark.parametrize("name", ["fqe", "dice", "model_evaluation", "importance_sampling"])
def test_an_evaluation_is_no_policy(name, tmp_path):
    module, config = importlib.import_module(f"algos.{name}"), {"algo": "fqe", "policy": "runs/iql"}
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    load = module.load_policy if name == "importance_sampling" else module.frozen
    with pytest.raises(SystemExit, match="is itself an evaluation: name the folder of its policy, runs/iql"):
        load(str(tmp_path), "mode")


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"runs": ()}, "Name at least one run folder"),
        ({"estimators": ("nonsense",)}, "no estimator here"),
        ({"estimators": ("doubly_robust",)}, "takes its Q from fqe"),
        ({"num_updates": 0}, "at least 1"),
        ({"horizon": -1}, "at least 0"),
        ({"runs": (pathlib.Path("none"),)}, "holds no run"),
        ({"runs": (pathlib.Path("a/x"), pathlib.Path("b/x"))}, "same name"),
    ],
)
def test_what_cannot_be_judged_is_said(wrong, sentence):
    with pytest.raises(SystemExit, match=sentence):
        ope.main(ope.Options(**{"runs": (pathlib.Path("x"),), **wrong}))
