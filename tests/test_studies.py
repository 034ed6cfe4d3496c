"""The studies' exact parts against closed forms, and what their committed results say of themselves."""

import importlib
import json
import pathlib
import re

import numpy as np
import pytest

from common.datasets import Transition

STUDIES = pathlib.Path(__file__).parents[1] / "benchmarks" / "studies"
NAMES = ("deadly_triad", "ladder", "lower_bound", "overestimation", "support")


def section(title):
    """Of the studies' page, as one line."""
    (text,) = re.findall(rf"^## {title}:.*\n([^#]*)", (STUDIES / "README.md").read_text(), flags=re.MULTILINE)
    return " ".join(text.split())


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


@pytest.mark.parametrize("study", ["deadly_triad"], indirect=True)
def test_of_networks_too_the_batch_constrained_backup_is_the_cure(study):
    assert study.METHODS["BCQ, phi 0"][1]["phi"] == 0
    ends = json.loads((STUDIES / "deadly_triad.json").read_text())["networks"]
    assert ends.keys() == {f"reward {reward}" for reward in study.REWARDS}
    assert np.abs(ends["reward 0"]["BCQ, phi 0"]).max() < 1 < 1e6 < max(ends["reward 0"]["DDPG"])
    constrained, naive = ends["reward 1"]["BCQ, phi 0"], [ends["reward 1"][label] for label in study.NAIVE]
    assert 80 < min(constrained) and max(constrained) <= 100 and 1e5 < np.min(naive)  # 100 is true
    text = section("The deadly triad")
    diverged = {label: f"{np.sum(np.array(x) > 1e4)} of {study.SEEDS}" for label, x in ends["reward 0"].items()}
    assert f"DDPG diverges on {diverged['DDPG']} seeds" in text and f"diverges on {diverged['SAC']}; TD3" in text
    assert diverged["TD3"] == diverged["BCQ, phi 0"] == f"0 of {study.SEEDS}"
    assert f"about {np.median(constrained):.0f} and {np.median(ends['reward 1']['IQL']):.0f} after" in text
    assert f"({min(ends['reward 1']['BCQ']):.0f} to {max(ends['reward 1']['BCQ']):.0f})" in text


@pytest.mark.parametrize("study", ["support"], indirect=True)
def test_samples_of_a_kl_constraint_are_not_good_in_both_states_but_its_mode_and_a_support_constraint_are(study):
    points = study.exact()
    shares = {label: {kind: study.worse_state(x) for kind, x in both.items()} for label, both in points.items()}
    assert shares["KL"]["expected"] < 0.4 < 0.8 < shares["KL"]["acting"]
    assert shares["support"]["expected"] > 0.95
    # KL with Q = 5 a on N(0, s^2) is N(5 s^2 / alpha, s^2); nearly all of it is on the bridge where alpha is 10
    mean = 5 * study.SPREAD**2 / study.ALPHAS
    assert points["KL"]["expected"][-1, 1] == pytest.approx(5 * mean[-1], abs=0.005)
    on_bridge = mean <= study.WIDTH  # the mode is the mean, to half a step of the grid
    assert points["KL"]["acting"][:, 1] == pytest.approx(np.where(on_bridge, 5 * mean, -1), abs=0.002)
    assert points["KL"]["acting"][:, 0] == pytest.approx(1)


def test_the_text_on_the_bridge_gives_the_shares_of_samples_and_of_the_mode():
    text, best = section("The narrow bridge"), json.loads((STUDIES / "support.json").read_text())["best"]
    for share in [share for shares in best.values() for share in shares.values()]:
        assert f"{100 * share:.0f} %" in text


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


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_the_committed_table_of_bounds_is_that_of_the_committed_result(study):
    result = json.loads((STUDIES / "lower_bound.json").read_text())
    assert study.table(result["networks"]) in (STUDIES / "lower_bound.md").read_text()
    conservative, two = result["networks"]["CQL(H)"], result["networks"]["2 critics"]
    for dataset in study.DATASETS:  # the claim: below the truth, where the smaller of two critics is far above it
        assert max(conservative[dataset]) < 0 < 1_000 < min(two[dataset])


@pytest.mark.parametrize("study", ["overestimation"], indirect=True)
def test_the_committed_table_of_over_estimation_is_that_of_the_quick_results(study):
    """report.py reads the values, and test_report.py tests that."""
    assert study.quick_table() in (STUDIES / "overestimation.md").read_text()


@pytest.mark.parametrize("study", ["overestimation"], indirect=True)
def test_the_text_names_every_method_that_over_estimates_on_hopper(study):
    naive = {"ddpg", "td3", "sac", "qt_opt", "mpo"}
    runs = [run for run in study.read_runs(STUDIES.parent / "results" / "quick") if len(run.values)]
    errors = [
        np.subtract(*run.values.mean(axis=0))
        for run in runs
        if run.dataset.startswith("stitch/hopper") and run.method not in naive
    ]
    shown = set(re.findall(r"\+[\d,.]*\d", section("Over-estimation")))
    assert shown == {study.number(error, "+") for error in errors if error > 0}
    assert len(shown) < len(errors) / 2  # "most" believe too little


def test_what_the_text_says_of_sac_is_in_its_result():
    text, curves = section("Over-estimation"), json.loads((STUDIES / "overestimation.json").read_text())["curves"]
    believed = {size: np.array(curve["believed_value"])[:, -1] for size, curve in curves.items()}
    true = np.array([curve["true_value"] for curve in curves.values()])[..., -1]
    small, large = believed["1k"], np.array([believed[size] for size in ("10k", "100k", "1m")])
    assert f"{small.min():,.0f} to {small.max():,.0f} on 1k, and {large.min():,.0f} to {large.max():,.0f} on" in text
    assert f"{true.min():.0f} to {true.max():.0f}.".replace("-", "−") in text
    assert 45 < np.median(small) / np.median(believed["10k"]) < 55  # README's "some 50 times"


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_result_says_what_made_it(name):
    result = json.loads((STUDIES / f"{name}.json").read_text())
    assert f"studies/{name}.py" in result["command"] and result["device"] and result["date"]
    assert len(result["commit"]) == 40 and result["versions"].keys() >= {"jax", "numpy"}  # no "-dirty"
    page = (STUDIES / "README.md").read_text()
    assert f"[`{name}.py`]({name}.py)" in page and f"]({name}.png)" in page and (STUDIES / f"{name}.png").exists()
