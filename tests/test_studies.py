"""The studies' exact parts against closed forms, and what their committed results say of themselves."""

import importlib
import json
import pathlib

import numpy as np
import pytest

from common.datasets import Transition

STUDIES = pathlib.Path(__file__).parents[1] / "benchmarks" / "studies"
NAMES = ("deadly_triad", "ladder", "lower_bound", "overestimation", "support")


@pytest.fixture
def study(request, monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))  # as when the script is run
    return importlib.import_module(request.param)


@pytest.mark.parametrize("study", ["deadly_triad"], indirect=True)
def test_one_weight_grows_only_where_the_three_come_together(study):
    rate, discount, steps = 0.1, 0.99, study.STEPS
    ends = {label: values[-1] for label, values in study.linear().items()}
    assert ends["all three"] == pytest.approx((1 + rate * (2 * discount - 1)) ** steps)
    assert ends["no bootstrapping"] == pytest.approx((1 - rate) ** steps)
    assert ends["no off-policy data"] == pytest.approx((1 - 4 * rate * (1 - discount)) ** steps)
    assert ends["batch-constrained"] == pytest.approx((1 - rate * (1 - discount)) ** steps)
    assert ends["no approximation"] == pytest.approx(2 * discount)


@pytest.mark.parametrize("study", ["support"], indirect=True)
def test_no_kl_constraint_is_good_in_both_states_and_a_support_constraint_is(study):
    points = study.exact()
    best = np.array([1, study.SLOPE * study.WIDTH])
    assert (points["KL"] / best).min(axis=1).max() < 0.4
    assert (points["support"] / best).min(axis=1).max() > 0.95
    # KL with Q = 5 a on N(0, s^2) is N(5 s^2 / alpha, s^2); nearly all of it is on the bridge where alpha is 10
    assert points["KL"][-1, 1] == pytest.approx(5 * 5 * study.SPREAD**2 / 10, abs=0.005)


def two_states():
    """State 0: action 0 stays, with reward 1, three times as often as action 1 ends, with 5. State 1: never left."""
    state, action = np.zeros(4, int), np.array([0, 0, 0, 1], np.int32)
    reward, terminal = np.array([1, 1, 1, 5], np.float32), np.array([0, 0, 0, 1], np.float32)
    return Transition(np.eye(2)[state], action, reward, np.eye(2)[state], terminal)


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_the_penalised_values_of_a_chain_are_the_closed_forms(study):
    transition, reward, behaviour = study.empirical_mdp(two_states(), 2)
    assert transition.toarray().tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert reward.tolist() == [[1, 5], [0, 0]] and behaviour.tolist() == [[0.75, 0.25], [0, 0]]
    policy = study.constrained_greedy(transition, reward, behaviour)
    assert policy[0] == 0  # 1 / (1 - 0.99) = 100, against 5
    data = two_states()
    unpleasant = study.empirical_mdp(data._replace(reward=-data.reward), 3)  # the third action, never tried, has 0
    assert study.constrained_greedy(*unpleasant)[0] == 1
    for push_up, penalty in ((0, 1 / 0.75), (1, 1 / 0.75 - 1)):
        value = study.believed(transition, reward, behaviour, policy, 0.3, push_up)
        assert value == pytest.approx([(1 - 0.3 * penalty) / (1 - study.DISCOUNT), 0])


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_a_bound_starts_after_the_last_alpha_that_over_estimates(study):
    gaps = np.full(len(study.ALPHAS), -1.0)
    assert study.first_below(gaps) == study.ALPHAS[0]
    gaps[[0, 3]] = 1.0
    assert study.first_below(gaps) == study.ALPHAS[4]
    assert study.first_below(gaps + 2) == np.inf


@pytest.mark.parametrize("study", ["overestimation"], indirect=True)
def test_the_table_is_of_the_last_evaluation_and_passes_over_methods_without_q(study, tmp_path, monkeypatch):
    results = tmp_path / "results" / "quick" / "some-data-v0"
    lines = [{"step": step, "seed": seed, "score": 0.0} for step in (1, 2) for seed in (0, 1)]
    values = [{"believed_value": line["step"] * 10.0 + line["seed"], "true_value": 4.0} for line in lines]
    for method, extra in (("bc", [{}] * 4), ("sac", values)):
        (results / method).mkdir(parents=True)
        text = "".join(json.dumps(line | more) + "\n" for line, more in zip(lines, extra, strict=True))
        (results / method / "metrics.jsonl").write_text(text)
    monkeypatch.setattr(study, "HERE", tmp_path / "studies")
    assert study.quick_table().splitlines()[2:] == ["| sac | +16.5 (4); +16 to +17 |"]


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_result_says_what_made_it(name):
    result = json.loads((STUDIES / f"{name}.json").read_text())
    assert f"studies/{name}.py" in result["command"] and result["device"] and result["date"]
    assert len(result["commit"]) == 40 and result["versions"].keys() >= {"jax", "numpy"}  # no "-dirty"
    page = (STUDIES / "README.md").read_text()
    assert f"[`{name}.py`]({name}.py)" in page and f"]({name}.png)" in page and (STUDIES / f"{name}.png").exists()
