"""The studies' exact parts against closed forms, and what their committed results say of themselves."""

import argparse
import importlib
import itertools
import json
import pathlib
import re

import numpy as np
import pytest

from common.datasets import Transition
from common.recipes import tabular

STUDIES = pathlib.Path(__file__).parents[1] / "benchmarks" / "studies"
NAMES = (
    "deadly_triad",
    "distances",
    "fine_tuning",
    "ladder",
    "lower_bound",
    "model_exploitation",
    "multimodality",
    "ope_bias_variance",
    "ope_intervals",
    "overestimation",
    "support",
    "when_rl_beats_cloning",
)


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
def test_true_values_are_those_of_the_policy_s_actions(study):
    """State 0: action 0 pays 2 and leads to state 1, action 1 pays 5 and ends in state 2. State 1 pays 1 for ever."""
    transition, reward = np.zeros((3, 2, 3)), np.array([[2.0, 5.0], [1.0, 1.0], [0.0, 0.0]])
    transition[0, 0, 1] = transition[0, 1, 2] = transition[1, :, 1] = transition[2, :, 2] = 1
    model = study.Model(transition, reward, initial=np.array([1.0, 0, 0]))
    assert study.true_values(model, np.array([0, 0, 0])) == pytest.approx([2 + 0.99 * 100, 100, 0])
    assert study.true_values(model, np.array([1, 0, 0])) == pytest.approx([5, 100, 0])


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_a_bound_holds_from_where_the_lines_of_the_states_cross_the_truth(study):
    """Believed 3 - 10 alpha, 1 - 10 alpha, 5 - 10 alpha where 1, 2 and 0 are true; the start is in the first two."""
    value, cost, truth = np.array([3.0, 1.0, 5.0]), np.full(3, 10.0), np.array([1.0, 2.0, 0.0])
    start, known = np.array([0.5, 0.5, 0.0]), np.array([True, True, False])  # the data never were in the third
    result = study.bound(value, cost, truth, start, known)
    assert result["gap"] == pytest.approx(0.5 - 10 * study.ALPHAS)
    assert result["crossing"] == pytest.approx(0.05)
    assert result["above_at_crossing"] == 0.5  # on average below, and above in the first state until alpha is 0.2
    assert result["above"] == [0.5 if alpha < 0.2 else 0 for alpha in study.ALPHAS]
    assert result["everywhere"] == pytest.approx(0.2) and result["believed_everywhere"] == pytest.approx(0)
    assert result["never"] == 0
    unpunished = study.bound(value, np.array([0.0, 10.0, 10.0]), truth, start, known)  # one action tried, b = 1
    assert unpunished["never"] == 1 and unpunished["everywhere"] is None and unpunished["above"][-1] == 0.5


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_the_committed_exact_part_is_repeated(study):
    pytest.importorskip("icu_sepsis")
    committed = json.loads((STUDIES / "lower_bound.json").read_text())
    assert committed["alphas"] == pytest.approx(study.ALPHAS.tolist())
    model = study.model_of(study.gymnasium.make("icu_sepsis:Sepsis/ICU-Sepsis-v2"))
    data, env = study.load_dataset("stitch/icu-sepsis-3k-v0")
    result = study.of_size(data, model)
    for name, value in committed["tabular"]["3k"].items():
        pairs = [(result[name], value)] if np.isscalar(value) else [(result[name][x], value[x]) for x in value]
        for x, y in pairs:
            assert x is None if y is None else x == pytest.approx(y, rel=1e-6, abs=1e-9), name
    policy = study.constrained_greedy(*study.empirical_mdp(data, env.spec.action_dim))
    play = env.evaluate(lambda obs, *at: (policy[obs.argmax(axis=-1)], None), [0], 1, study.DISCOUNT)
    assert result["true"] == pytest.approx(play.value[0], abs=1e-6)  # its time limit, 500 steps, hardly matters
    for size in study.SIZES:  # eq. 1 pushes further down, so its bound at the start holds from a smaller alpha on
        one, two = (committed["tabular"][size][equation] for equation in ("eq. 1", "eq. 2"))
        assert one["crossing"] < two["crossing"] and one["gap"][0] == pytest.approx(two["gap"][0])


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_a_row_is_believed_minus_true_late_in_the_run(study, tmp_path):
    run = {"command": "a", "commit": "b", "device": "c", "config": {"weight": 5.0}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    lines = [
        {"step": step, "seed": seed, "believed_value": 100.0 * (step <= 200) + 10 * seed + step, "true_value": step}
        for step in range(100, 800, 100)
        for seed in (0, 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = study.read_row(tmp_path)
    assert study.LAST == 5 and row["gap"] == [0, 10]  # the 100 of the first two of seven evaluations are not in it
    assert row["updates"] == 700 and row["seeds"] == [0, 1] and row["steps"] == list(range(100, 800, 100))
    assert row["believed"][1][:3] == [210, 310, 310] and row["true"][1][:3] == [100, 200, 300]
    assert {name: row[name] for name in run} == run
    assert study.cell(row, -43.2) == "+5 (+0 to +10); true 500; published -43.2"


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_a_part_that_is_run_anew_leaves_the_others_as_they_are(study, tmp_path, monkeypatch):
    old = {"tabular": {"3k": 0}, "commit": "old", "networks": {"CQL(H)": {"x": 1, "y": 2}, "BEAR": {"x": 3}}}
    monkeypatch.setattr(study, "tabular", lambda: {"3k": 1})
    monkeypatch.setattr(
        study, "networks", lambda labels, datasets: {label: dict.fromkeys(datasets, 9) for label in labels}
    )
    path = tmp_path / "result.json"

    def after(**options):
        path.write_text(json.dumps(old))
        study.update(path, argparse.Namespace(**{"tabular": False, "methods": None, "datasets": ["x"], **options}))
        return json.loads(path.read_text())

    tabular = after(tabular=True)
    assert tabular["networks"] == old["networks"] and tabular["tabular"] == {"3k": 1} and tabular["commit"] != "old"
    networks = after(methods=["CQL(H)"])
    assert networks == old | {"networks": {"CQL(H)": {"x": 9, "y": 2}, "BEAR": {"x": 3}}}
    assert list(after()["networks"]) == list(study.METHODS)


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_the_methods_are_what_their_labels_say(study):
    for label, (algo, fields) in study.METHODS.items():
        if label.endswith("critics"):
            assert algo == "sac_n" and fields["num_critics"] == int(label.split()[0])
        elif label.startswith("CQL"):
            regularizer = {"CQL(H)": "H", "CQL eq. 1": "eq1", "CQL eq. 2": "eq2"}[label]
            assert algo == "cql" and fields["regularizer"] == regularizer
        else:
            assert algo == {"BEAR": "bear", "TD3+BC": "td3_bc"}[label.split(",")[0]]
            assert "tau" not in label or fields["tau"] == float(label.split()[-1])


@pytest.mark.parametrize("study", ["lower_bound"], indirect=True)
def test_the_committed_rows_of_bounds_are_those_of_the_script(study):
    result = json.loads((STUDIES / "lower_bound.json").read_text())
    rows = result["networks"]
    assert (STUDIES / "lower_bound.md").read_text() == study.page(result)
    assert list(rows) == list(study.METHODS)
    for label, (algo, fields) in study.METHODS.items():
        assert list(rows[label]) == list(study.DATASETS)
        settings = json.loads(json.dumps({"algo": algo, **study.SETTINGS, **fields}))
        for dataset, row in rows[label].items():
            assert len(row["commit"]) == 40 and "studies/lower_bound.py" in row["command"]  # no "-dirty"
            assert row["config"].items() >= (settings | {"dataset": f"stitch/{dataset}-v0"}).items(), (label, dataset)
            assert row["updates"] == row["config"]["num_updates"] and len(row["gap"]) == len(row["seeds"])
            if "true" in row:
                gap = np.array(row["believed"]) - np.array(row["true"])
                assert row["gap"] == pytest.approx(gap[:, -study.LAST :].mean(axis=1))
    for dataset in study.DATASETS:  # however many updates: the smaller of two critics is far above the truth
        assert min(rows["2 critics"][dataset]["gap"]) > 1_000


def test_the_text_on_bounds_has_the_numbers_of_the_committed_result():
    result = json.loads((STUDIES / "lower_bound.json").read_text())
    text = (STUDIES / "README.md").read_text().partition("## Lower bounds")[2].partition("\n## ")[0]
    text = " ".join(text.split()).replace("−", "-")

    def listed(numbers, form):
        *first, last = (format(x, form) for x in numbers)
        return f"{', '.join(first)} and {last}"

    sizes = result["tabular"].values()
    for name in ("eq. 1", "eq. 2"):
        assert listed([x[name]["crossing"] for x in sizes], ".3g") in text
    assert listed([x["eq. 1"]["everywhere"] for x in sizes], ".2g") in text
    assert listed([x["eq. 1"]["believed_everywhere"] for x in sizes], ".2g") in text
    assert listed([x["inverse_b"] for x in sizes], ".3g") in text
    assert listed([100 * (x["eq. 2"]["crossing"] / x["eq. 1"]["crossing"] - 1) for x in sizes], ".2g") in text
    for label in ("CQL(H)", "CQL eq. 2", "CQL eq. 1", "TD3+BC, tau 0.05"):
        gaps = [np.median(row["gap"]) for row in result["networks"][label].values()]
        assert listed(gaps, "+.0f") in text, label
    for label in ("CQL eq. 2", "CQL eq. 1", "2 critics", "4 critics"):
        true = [np.mean([seed[-5:] for seed in row["true"]]) for row in result["networks"][label].values()]
        assert listed(true, ".0f") in text, label


@pytest.mark.parametrize("study", ["model_exploitation"], indirect=True)
def test_the_error_of_a_counted_model_bounds_what_it_believes(study):
    """State 0: action 0 stays, pays 0.005; action 1 ends in 2 and pays 1 half of the time, else leads to 1. 1: pays 0.

    The data have seen action 0 twice and action 1 once, when it ended and paid: its next state is wrong by 1/2, its
    reward by 1/2. Action 0 is right. What was never seen leads to nowhere, where 1 leads to 1 in truth: all of it.
    """
    transition, reward = np.zeros((3, 2, 3)), np.array([[0.005, 0.5], [0.0, 0.01], [0.0, 0.0]])
    transition[0, 0, 0] = transition[1, :, 1] = transition[2, :, 2] = 1
    transition[0, 1, 1:] = 0.5
    model = study.Model(transition, reward, initial=np.array([1.0, 0, 0]))
    assert study.over(model).tolist() == [False, False, True]
    state, action = np.zeros(3, int), np.array([0, 0, 1], np.int32)
    pay, terminal = np.array([0.005, 0.005, 1], np.float32), np.array([0, 0, 1], np.float32)
    data = Transition(np.eye(3)[state], action, pay, np.eye(3)[[0, 0, 2]], terminal)
    counted, earned, _ = study.empirical_mdp(data, 2)
    u = study.true_error(model, counted, earned)
    assert u == pytest.approx(np.array([[0, 0.5 + 0.99 / 2], [0.99, 0.01 + 0.99], [0, 0]]), abs=1e-6)
    assert study.greedy(counted, earned).tolist() == [1, 0, 0]  # 0.005 for ever is 0.5, and less than 1
    assert study.greedy(counted, earned - u).tolist() == [0, 0, 0]  # which may be 0.005
    result = study.of_size(data, model)
    for true, believed, error in result["policies"].values():
        assert believed - error - 1e-6 <= true
    true, believed, error = result["policies"]["pi_hat"]
    assert true >= result["best_right_side"] - 1e-6


def test_the_text_on_a_models_errors_has_the_numbers_of_its_result():
    result = json.loads((STUDIES / "model_exploitation.json").read_text())
    text = section("A model's errors").replace("−", "-")

    def ends(name, penalty, *horizons):
        rows = [x for x in result["returns"] if x["penalty"] == penalty and x["horizon"] in horizons]
        last = [row[name][-1] for row in rows]
        assert len(rows) == 2 * len(horizons) and {len(row[name]) for row in rows} == {3}  # two seeds, 3,000 updates
        return f"{min(last):.0f} to {max(last):.0f}"

    short, model, critic = ends("true", 0, 1, 5), ends("model", 0, 1, 5), ends("critic", 0, 1, 5)
    assert f"true return of {short}. In the model it has {model}, but its critics believe in {critic}" in text
    critic, true = ends("critic", 2.5, 1, 5), ends("true", 2.5, 1, 5)
    assert f"belief to {critic}, and the true return rises to {true}" in text
    critic, model, true = (ends(name, 0, 20) for name in ("critic", "model", "true"))
    assert f"believe in {critic}, the model has {model}, and the true return is {true}." in text
    assert f"(true: {ends('true', 2.5, 20)})" in text
    errors = result["errors"]
    assert max(result["simulator_off"].values()) < 1e-6 and {row["penalty"] for row in result["returns"]} == {0, 2.5}
    kinds = "held-out rows", "random actions", "lambda 0, after 20 steps", "lambda 2.5, after 20 steps"
    shares = [f"{100 * errors[kind]['bounded']:.0f} %" for kind in kinds]
    assert f"in {shares[0]} of cases" in text and f"same states in {shares[1]}." in text
    assert f"bounds {shares[2]} and {shares[3]} of the errors" in text
    data = [errors[kind] for kind in ("held-out rows", "random actions")]
    assert "= {:.1f} and {:.1f}.".format(*(x["lambda_90"] for x in data)) in text
    assert "correlations {:.2f} and {:.2f})".format(*(x["rank_correlation"] for x in data)) in text
    assert all(9 < errors[f"lambda {x}, after 20 steps"]["lambda_90"] < 11 for x in ("0", "2.5"))
    sizes = result["tabular"].values()

    def listed(numbers):
        *first, last = (f"{x:.3f}" for x in numbers)
        return f"{', '.join(first)} and {last}"

    policies = [x["policies"] for x in sizes]
    assert f"$\\hat\\pi$ are {listed(x['pi_hat'][0] for x in policies)}." in text
    assert f"promises {listed(x['best_right_side'] for x in sizes)}," in text
    assert f"without it has {listed(x['best in the model'][0] for x in policies)}." in text
    assert f"it has {listed(x['best in the model'][1] for x in policies)}." in text
    assert {f"{x['best in the world'][0]:.3f}" for x in policies} == {"0.801"} and "policies has 0.801." in text
    assert f"true returns of {listed(max(x['sweep']['true']) for x in sizes)}." in text


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


@pytest.mark.parametrize("study", ["fine_tuning"], indirect=True)
def test_failures_are_halved_where_they_stay_so(study):
    # 40 % fail at the switch; 15 %, 30 %, 20 %, 10 % after 1,000 steps each: at most 20 % from 3,000 on
    steps = np.array([-1000, 0, 1000, 2000, 3000, 4000])
    assert study.halved(steps, [10, 60, 85, 70, 80, 90]) == (40.0, 3000)
    assert study.halved(steps, [10, 60, 85, 70, 80, 70]) == (40.0, None)
    assert study.halved(steps, [10, 100, 85, 70, 80, 70]) == (0.0, None), "there is nothing to halve"


@pytest.mark.parametrize("study", ["fine_tuning"], indirect=True)
def test_the_committed_result_on_fine_tuning_is_that_of_the_committed_runs(study):
    result = json.loads((STUDIES / "fine_tuning.json").read_text())
    assert result["failures"] == json.loads(json.dumps(study.failures()))
    assert result["values"] == {label: study.values(*where) for label, where in study.SHOWN.items()}
    assert result["calibration"] == {label: study.values(*where) for label, where in study.CALIBRATION.items()}
    for found in result["failures"].values():
        assert found["at_switch"] == found["failures"][found["steps"].index(0)]


def test_the_text_on_fine_tuning_has_the_numbers_of_its_result():
    result = json.loads((STUDIES / "fine_tuning.json").read_text())
    text = section("Fine-tuning").replace("−", "-")
    titles = {"awac": "AWAC", "spot": "SPOT", "cal_ql": "Cal-QL", "cql": "CQL", "wsrl": "WSRL", "iql": "IQL"}
    assert result["failures"].keys() == titles.keys()
    for method, found in result["failures"].items():
        later = found["failures"][found["steps"].index(5000)]
        after = f"{found['halved_after']:,} steps" if found["halved_after"] else "not within 5,000"
        assert f"| {titles[method]} | {found['at_switch']:.0f} % | {later:.0f} % | {after} |" in text
    assert "12,000 steps until every episode" in text and max(result["failures"]["iql"]["failures"][12:]) == 0
    wsrl = result["failures"]["wsrl"]
    assert [wsrl["failures"][wsrl["steps"].index(n)] for n in (1000, 2000)] == [100, 100]
    low, held = (result["calibration"][name] for name in ("CQL", "Cal-QL"))
    i = low["steps"].index(3000)
    for found, form in ((low, ".0f"), (held, ".1f")):
        believed, true = (np.mean(found[f"{which}_value"], axis=0)[i] for which in ("believed", "true"))
        assert f"believes {believed:{form}} where {true:.2f} is true" in text
    shares = [100 * row[i] for row in held["held"]]
    assert f"holds up {min(shares):.0f} to {max(shares):.0f} %" in text
    assert [[round(row[-1]) for row in found["score"]] for found in (low, held)] == [[100, 80, 0], [0, 0, 20]]
    last = [row[-1] for row in held["believed_value"]]
    assert f"believes {min(last):.0f} to {max(last):.0f}, although" in text
    cql, cal_ql, offline = result["values"].values()
    for found, steps in ((cql, 1000), (cal_ql, 1000), (offline, 2000)):
        i = found["steps"].index(steps)
        for column in ("believed_value", "true_value"):
            assert f"{np.mean(found[column], axis=0)[i]:.0f}" in text, (steps, column)
    assert np.max(np.array(cql["score"])[:, 2:4]) == 0 and "to 0 after 2,000 and 3,000 steps, in all seeds" in text
    middle = np.mean(offline["score"], axis=0)
    assert f"{middle[0]:.0f}, {middle[1]:.0f} and {middle[2]:.0f}" in text
    assert np.max(cal_ql["held"]) < 0.06 and "at most 5 %" in text
    assert min(np.min(found["believed_value"]) for found in result["values"].values()) > -100


@pytest.mark.parametrize("study", ["when_rl_beats_cloning"], indirect=True)
def test_the_methods_on_a_road_of_two_steps(study):
    """One state of each step is visited. Step 0, critical: action 0 (right) three times, action 1 four times, two of
    which fall. Step 1, not critical: action 2. So cloning takes 1, and RL and the filter 0."""
    state = np.zeros((7, 2), int)
    action = np.array([[0, 2], [0, 2], [0, 2], [1, 2], [1, 2], [1, 2], [1, 2]])
    length = np.array([3, 3, 3, 3, 3, 1, 1])  # 1: a fall in the first step; 3: none
    policies = study.learn(state, action, length)
    first = {name: policy[0, 0].tolist() for name, policy in policies.items()}
    assert first["cloning"] == [0, 1, 0, 0] and first["filtered cloning"] == [1, 0, 0, 0] == first["RL"]
    assert first["cloning, sampled"] == pytest.approx([3 / 7, 4 / 7, 0, 0])
    assert policies["RL"][1, 0].tolist() == [0, 0, 1, 0] and policies["RL"][0, 1].tolist() == [0.25] * 4
    critical, right, habit = np.zeros((2, study.STATES), bool), np.zeros((2, study.STATES), int), np.ones((2, 10), int)
    critical[0, :5] = True
    assert study.value((critical, right, habit), np.tile([0.4, 0.6, 0, 0], (2, 10, 1))) == pytest.approx(1 - 0.3 / 2)


@pytest.mark.parametrize("study", ["when_rl_beats_cloning"], indirect=True)
def test_pessimism_doubts_an_action_that_was_tried_once(study):
    """Action 0: 9 of 10 survive, action 1: the only one. 0.9 - c / sqrt(10) against 1 - c, with c = 1/2."""
    action = np.array([[0]] * 10 + [[1]])
    policies = study.learn(np.zeros((11, 1), int), action, np.array([2] * 9 + [1] + [2]))
    assert policies["RL"][0, 0].tolist() == [0, 1, 0, 0] and policies["RL, pessimistic"][0, 0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("study", ["when_rl_beats_cloning"], indirect=True)
def test_demonstrators_reach_the_end_as_often_as_their_exact_value_says(study):
    rng = np.random.default_rng(0)
    road = study.make_road(5, 0.3, rng)
    assert road[0].sum() == 15 and (road[1] != road[2]).all()
    _, _, length = study.sample(road, 0.4, 20_000, rng)
    exact = np.prod(
        1 - study.FALL * 0.4 * road[0].mean(axis=1)
    )  # in a critical state, the habit falls in half of cases
    assert (length > 5).mean() == pytest.approx(exact, abs=0.01)
    eye = np.eye(study.ACTIONS)
    assert study.value(road, 0.6 * eye[road[1]] + 0.4 * eye[road[2]]) == pytest.approx(exact)


@pytest.mark.parametrize("study", ["when_rl_beats_cloning"], indirect=True)
def test_the_committed_sweep_of_noise_is_repeated_and_the_text_has_its_numbers(study):
    sweeps = json.loads((STUDIES / "when_rl_beats_cloning.json").read_text())["sweeps"]
    by_field = {(x["field"], x["others"]["noise"]): x for x in sweeps.values()}
    committed, again = by_field["noise", 0.4]["points"][5], study.measure(**study.USUAL | {"noise": 0.5})
    for name, values in again.items():
        assert committed[name] == pytest.approx(values, rel=1e-6), name

    def mean(field, x, method, noise=0.4):
        sweep = by_field[field, noise]
        return f"{np.mean(sweep['points'][sweep['values'].index(x)][method]):.2f}"

    text = section("When RL beats cloning")
    assert {mean("noise", x, "cloning") for x in (0, 0.1, 0.2, 0.3)} == {"1.00"} == {mean("noise", 0.5, "RL")}
    assert f"has {mean('noise', 0.5, 'cloning')} at 0.5" in text and mean("noise", 0, "RL") == "1.00"
    assert f"has {mean('noise', 0.5, 'filtered cloning')} there" in text
    assert f"RL has 1.00, and still {mean('noise', 0.8, 'RL')} at noise 0.8" in text
    assert f"cloning has {mean('steps', 40, 'cloning')} and RL {mean('steps', 40, 'RL')}" in text
    assert f"RL has {mean('steps', 80, 'RL')} and {mean('critical', 1, 'RL')}" in text
    few = [mean("episodes", 100, name, 0.1) for name in ("cloning", "RL", "RL, pessimistic")]
    assert f"cloning has {few[0]} and RL {few[1]}." in text and f"mends this ({few[2]})" in text
    rare = [mean("noise", 0.9, name) for name in ("RL, pessimistic", "RL")]
    assert f"pessimistic RL has {rare[0]} where RL has {rare[1]}" in text


def chain_model():
    """Chain C2 of tests/chain.py as (model, rewards (S, A, S)); state 2 is the end."""
    transition, paid = np.zeros((3, 2, 3)), np.zeros((3, 2, 3))
    transition[0, 0, 2] = transition[0, 1, 1] = transition[1, :, 2] = transition[2, :, 2] = 1
    paid[0, 0, 2], paid[0, 1, 1], paid[1, 1, 2] = 1, 0.5, 2
    return tabular.Model(transition, (transition * paid).sum(axis=2), np.array([1.0, 0, 0])), paid


CHAIN_PI, CHAIN_MU = np.array([[0.2, 0.8], [0.4, 0.6], [0.5, 0.5]]), np.full((3, 2), 0.5)


@pytest.mark.parametrize("study", ["ope_bias_variance"], indirect=True)
def test_second_moments_of_weights_are_products_of_those_of_a_step(study):
    """s0: (0.2^2 + 0.8^2) / 0.5 = 1.36. s1, after go: (0.4^2 + 0.6^2) / 0.5 = 1.04; the end has 1. After two steps
    0.08 + 1.28 * 1.04 = 1.4112, and no more."""
    model, _ = chain_model()
    assert study.second_moments(model, CHAIN_PI, CHAIN_MU, 3) == pytest.approx([1.36, 1.4112, 1.4112])
    one = tabular.Model(np.ones((1, 2, 1)), np.zeros((1, 2)), np.ones(1))  # a state that is never left: c^H
    assert study.second_moments(one, CHAIN_PI[:1], CHAIN_MU[:1], 5) == pytest.approx(1.36 ** np.arange(1, 6))


@pytest.mark.parametrize("study", ["ope_bias_variance"], indirect=True)
def test_estimates_on_the_chain(study):
    """Undiscounted, V = 0.2 + 0.8 (0.5 + 0.6 * 2) = 1.56; with one step left 0.2 + 0.8 * 0.5 = 0.6. Enough data of mu
    give a table its exact values."""
    model, paid = chain_model()
    over = study.ended(model)
    assert over.tolist() == [False, False, True]
    rows = study.sample(model, paid, CHAIN_MU, 4_000, np.random.default_rng(0))
    state, action, reward, following, mask = rows
    assert mask[:, 0].all() and not mask[:, 2:].any() and (mask[:, 1] == (action[:, 0] == 1)).all()
    assert reward[mask].mean() == pytest.approx((1 * 0.5 + 0.5 * 0.5 + 2 * 0.25) / 1.5, abs=0.05)
    for horizon, truth in ((1, 0.6), (2, 1.56), (100, 1.56)):
        found = study.estimates(rows, CHAIN_PI, CHAIN_MU, over, horizon)
        assert found.keys() == set(study.ESTIMATORS)
        assert found == pytest.approx(dict.fromkeys(found, truth), abs=0.1)
        assert found["FQE"] == pytest.approx(truth, abs=1e-9)  # nothing in the chain is random but the actions


@pytest.mark.parametrize("study", ["ope_bias_variance"], indirect=True)
def test_an_action_without_data_is_as_good_as_what_was_done(study):
    """s0: only stop (1). s1: stop (0) once and go (2) twice, so 4/3. State 2 was never seen and is not the end here."""
    state, action = np.array([[0], [1], [1], [1]]), np.array([[0], [0], [1], [1]])
    reward, following = np.array([[1.0], [0], [2], [2]]), np.full((4, 1), 3)
    tables = study.counted_tables(
        (state, action, reward, following, np.ones((4, 1), bool)), np.full((4, 3), 1 / 3), np.arange(4) == 3, 1
    )
    assert tables[0].max() == 0
    assert tables[1] == pytest.approx(np.array([[1, 1, 1], [0, 2, 4 / 3], [1.25] * 3, [0] * 3]))


@pytest.mark.parametrize("study", ["ope_bias_variance"], indirect=True)
def test_an_episode_s_q_is_of_the_other_half_of_the_episodes(study):
    """Two episodes of one step in s0: stop, reward 1, and go, reward 0.5. Without the first, Q = V = 0.5 there:
    0.5 + 0.4 (1 - 0.5) = 0.7; without the second 1 + 1.6 (0.5 - 1) = 0.2. With its own Q each would have its reward."""
    rows = [np.zeros((2, study.STEPS), kind) for kind in (int, int, float, int, bool)]
    rows[1][1, 0], rows[2][:, 0], rows[3][:, 0], rows[4][:, 0] = 1, [1, 0.5], 2, True
    found = study.estimates(rows, CHAIN_PI, CHAIN_MU, np.arange(3) == 2, 1)
    assert found["DR"] == pytest.approx(0.45)


@pytest.mark.parametrize("study", ["ope_bias_variance"], indirect=True)
def test_the_committed_errors_are_repeated(study):
    pytest.importorskip("icu_sepsis")
    committed = json.loads((STUDIES / "ope_bias_variance.json").read_text())
    model, paid, mu = study.load()
    best = study.best_within(model, mu)
    again = study.measure(model, paid, mu, best, {110: study.REPETITIONS[110]})
    assert again["truth"] == pytest.approx(committed["truth"]) and list(committed["sizes"]) == [
        str(size) for size in study.REPETITIONS
    ]
    assert again["moments"]["0.1"] == pytest.approx(committed["moments"]["0.1"])
    for d, row in again["sizes"]["110"].items():
        for name, numbers in row.items():
            kept = {key: np.nan if x is None else x for key, x in committed["sizes"]["110"][d][name].items()}
            assert numbers == pytest.approx(kept, rel=1e-4, abs=1e-9, nan_ok=True), (d, name)


@pytest.mark.parametrize("study", ["ope_intervals"], indirect=True)
def test_the_task_of_the_intervals_is_played_as_it_is_solved(study):
    # One state, one action, a reward in half of the steps: 0.5 / (1 - 0.95 * 0.85)
    one = np.ones((1, 1, 1)), np.full((1, 1), 0.5), np.ones(1), np.ones((1, 1)), np.ones((1, 1))
    assert study.truth(one, np.ones((1, 1))) == pytest.approx(0.5 / 0.1925)
    task = study.make()
    assert task[3].min() > 1 / 6 and np.allclose(task[3].sum(axis=1), 1)
    state, action, reward, following, end, mask = study.sample(task, 4_000, np.random.default_rng(0))
    assert mask[:, 0].all() and not (mask[:, 1:] & (end | ~mask)[:, :-1]).any()
    assert (state[:, 1:] == following[:, :-1])[mask[:, 1:]].all()
    returns = (reward * mask * study.DISCOUNT ** np.arange(study.STEPS)).sum(axis=1)
    assert returns.mean() == pytest.approx(study.truth(task, task[3]), abs=4 * returns.std() / 4_000**0.5)
    # The model that these episodes count is nearly the right one, for another policy, too
    q = study.counted(*(x.sum(axis=0) for x in study.counts((state, action, reward, following, end, mask))), task[4])
    found = (task[4] * q).sum(axis=1)[state[:, 0]].mean()
    assert found == pytest.approx(study.truth(task, task[4]), abs=0.1)


@pytest.mark.parametrize("study", ["ope_intervals"], indirect=True)
def test_estimates_of_the_study_agree_where_they_must(study, optimised):
    """The ratios of the counted MDP give its value; so does MAGIC of that Q, whose intervals know no error of it."""
    task, rng = study.make(), np.random.default_rng(1)
    *_, mu, other = task
    rows = study.sample(task, 100, rng)
    assert (study.counts(rows)[0].sum(axis=0) > 0).all()
    found = study.intervals(rows, 0.5 * mu + 0.5 * other, mu, rng)
    assert found.keys() == set(study.ESTIMATORS)
    assert found["DICE"][0] == pytest.approx(found["FQE"][0]) == pytest.approx(found["counted model"][0])
    assert all(low < high for _, low, high in found.values())
    same = study.intervals(rows, mu, mu, rng)  # of mu itself all weights are 1
    for name in ("IS", "PDIS", "WIS", "PDWIS"):
        assert same[name] == pytest.approx(same["IS"])


def test_the_text_on_evaluation_has_the_numbers_of_its_result():
    result, text = (
        json.loads((STUDIES / "ope_bias_variance.json").read_text()),
        section("Bias and variance of evaluation"),
    )
    sizes, moments, horizons = result["sizes"], result["moments"], result["horizons"]
    transitions = [f"{x:,.0f}" for x in result["transitions"].values()]
    assert f"{transitions[0]} to {transitions[-1]} transitions" in text
    assert f"{moments['0.05'][31]:.3g} for $d = 0.05$ and {moments['0.1'][31]:.3g} for $d = 0.1$" in text
    assert f"multiplies it by {moments['0.1'][31] / moments['0.1'][30]:.2f}" in text
    assert f"from {horizons['2']['IS']['std']:.3f} to {horizons['32']['IS']['std']:.3f} only" in text
    rmse = {n: {d: {k: v["rmse"] for k, v in x.items()} for d, x in row.items()} for n, row in sizes.items()}
    assert (
        f"IS is {rmse['3300']['0.2']['IS']:.3f} with 34k transitions and {rmse['11000']['0.2']['IS']:.3f} with" in text
    )
    bias = {d: row["FQE"]["bias"] for d, row in sizes["3300"].items()}
    assert f"at most {max(abs(bias[d]) for d in ('0', '0.05', '0.1', '0.2')):.3f} up to" in text
    assert f"−{-bias['1']:.3f} for the policy" in text and f"true value is {result['truth']['1']:.3f}" in text
    assert f"−{-sizes['33000']['1']['FQE']['bias']:.3f} with 340k" in text
    for d in ("0.1", "0.2"):
        assert all(min(row[d].items(), key=lambda x: x[1])[0] == "FQE" for row in rmse.values())
    near = dict(rmse["3300"]["0.1"])
    assert f"it has {near.pop('FQE'):.4f} with" in text and f"others has {min(near.values()):.3f}" in text
    far = rmse["33000"]["1"]
    assert f"340k WDR has {far['WDR']:.3f} and FQE {far['FQE']:.3f}" in text and min(far, key=far.get) == "WDR"
    assert f"({rmse['110']['1']['FQE']:.2f} with 1k)" in text


@pytest.mark.parametrize("study", ["distances"], indirect=True)
def test_true_distances_go_round_the_walls(study):
    """Centres of cells lie 4 apart, which takes 20 steps of 0.2. Round a corner the point keeps its radius, 0.7: it
    passes the corner 0.5 away in both coordinates, 2 + 0.5 of its way in each, 25 steps; diagonals cost what sides do.
    """
    cells = np.zeros((4, 5), bool)
    cells[1, 1] = cells[1, 2] = cells[2, 2] = cells[1, 3] = True
    centres = (np.array([(1, 1), (1, 2), (2, 2), (1, 3)]) + 0.5) * study.UNIT
    steps = study.steps_between(cells, centres, centres)
    np.testing.assert_allclose(steps, [[0, 20, 25, 40], [20, 0, 20, 20], [25, 20, 0, 25], [40, 20, 25, 0]])
    maze = study.make_maze(cells)
    assert study.free(cells, maze.places).all() and not study.free(cells, np.array([5.3, 6.0]) - [0.7, 0])
    truth = study.measure(maze, maze.steps > 20, maze.steps, True)
    assert truth == {name: {"rank": 1, "nearer": 1, "ratio": 1} for name in ("met", "never met")}
    turned = study.measure(maze, maze.steps > 20, -maze.steps, False)["met"]
    assert turned["rank"] == -1 and turned["nearer"] < 0.2 and turned["ratio"] is None


@pytest.mark.parametrize("study", ["distances"], indirect=True)
def test_pairs_meet_in_the_order_of_a_walk(study):
    cells = np.ones((1, 4), bool)
    walks = [np.array([[2, 1], [2, 3], [2, 5], [2, 9]]), np.array([[2, 13], [2, 10]])]  # cells 0, 0, 1, 2 and 3, 2
    met = study.meetings(cells, walks)[0, :, 0, :]
    np.testing.assert_array_equal(met.astype(int), [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]])
    maze = study.Maze(cells, np.array([[2.0, 5.0]]), np.array([[2.0, 2.0], [2.0, 10.0]]), None)
    np.testing.assert_array_equal(study.pairs_that_met(maze, walks), [[False, True]])


@pytest.mark.parametrize("study", ["distances"], indirect=True)
def test_values_are_read_as_steps_where_they_say_so(study, monkeypatch):
    """V = -(1 - 0.9^3) / 0.1 = -2.71 and Q = 0.9^2 are three steps; beyond EDGE a value says no more."""
    from algos import actionable_models, gcivl
    from common.environments import Spec

    monkeypatch.setattr(gcivl, "GoalValue", lambda *_: argparse.Namespace(apply=lambda p, *_: np.full((2, 1), p)))
    monkeypatch.setattr(gcivl, "make_agent", lambda *_: None)
    agent = argparse.Namespace(act=lambda *_: None, q=lambda state, *_: np.full(1, state))
    monkeypatch.setattr(actionable_models, "make_agent", lambda *_: agent)
    here = np.zeros((1, 2))

    def steps(algo, value):
        state = argparse.Namespace(value=argparse.Namespace(params=value)) if algo is gcivl else value
        name = algo.__name__.split(".")[1]
        return study.make_belief(name, algo.Config(discount=0.9), Spec(2, 2, goal_dim=2))(state, here, here)

    np.testing.assert_allclose(steps(gcivl, -2.71), [3], rtol=1e-5)
    np.testing.assert_allclose(steps(actionable_models, 0.81), [3], rtol=1e-5)
    most = np.log(study.EDGE) / np.log(0.9)
    np.testing.assert_allclose(steps(gcivl, -12.0), [most], rtol=1e-5)
    np.testing.assert_allclose(steps(gcivl, 0.3), [0], atol=1e-6)


@pytest.mark.parametrize("study", ["distances"], indirect=True)
def test_the_page_has_the_table_of_distances(study):
    result = json.loads((STUDIES / "distances.json").read_text())
    assert study.table(result) in (STUDIES / "README.md").read_text()
    for data in result["data"].values():
        assert all(len(found["run_commit"]) == 40 for found in data["methods"].values())  # no "-dirty"
    text, stitch = section("Distances"), result["data"]["stitch"]
    assert f"*stitch* {stitch['met']:.0%} of".replace("%", " %") in text and result["data"]["navigate"]["met"] == 1
    assert f"more than {stitch['farthest_met']:.0f} steps apart, and the maze has 140" in text
    assert result["data"]["navigate"]["farthest_met"] == 140

    def median(data, algo, pairs, measure):
        return np.median([seed[pairs][measure] for seed in result["data"][data]["methods"][algo]["seeds"]])

    for data, measure in itertools.product(("navigate", "stitch"), ("rank", "nearer")):
        methods = result["data"][data]["methods"]
        assert methods.keys() == set(study.METHODS)
        order = sorted(methods, key=lambda algo: -median(data, algo, "never met", measure))
        assert order[0] == "qrl" and order[-1] == "actionable_models"
    for title, algo in (("GCIVL", "gcivl"), ("HIQL", "hiql"), ("GCIQL", "gciql"), ("QRL is", "qrl")):
        both = [f"{median(data, algo, 'never met', 'rank'):.2f}" for data in ("navigate", "stitch")]
        assert f"{title} ({both[0]} against {both[1]})" in text
    bootstrapped = ("gcivl", "gciql", "hiql", "qrl", "gc_td3_bc")
    assert min(median(data, algo, "met", "rank") for data in ("navigate", "stitch") for algo in bootstrapped) >= 0.865
    for algo in ("crl", "actionable_models"):
        both = [f"{median(data, algo, 'met', 'rank'):.2f}" for data in ("navigate", "stitch")]
        assert f"{both[0]} and {both[1]}" in text


@pytest.mark.parametrize("study", ["distances"], indirect=True)
def test_places_are_those_of_ogbench(study):
    pytest.importorskip("ogbench")
    import gymnasium

    maze = gymnasium.make("pointmaze-medium-v0").unwrapped
    for cell in ((1, 1), (2, 6), (6, 3)):
        np.testing.assert_allclose(study.to_ogbench((np.array(cell) + 0.5) * study.UNIT), maze.ij_to_xy(cell))
    assert study.UNIT == maze._maze_unit and study.RADIUS == maze.model.geom("pointbody").size[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_result_says_what_made_it(name):
    result = json.loads((STUDIES / f"{name}.json").read_text())
    assert f"studies/{name}.py" in result["command"] and result["device"] and result["date"]
    assert len(result["commit"]) == 40 and result["versions"].keys() >= {"jax", "numpy"}  # no "-dirty"
    page = (STUDIES / "README.md").read_text()
    assert f"[`{name}.py`]({name}.py)" in page and f"]({name}.png)" in page and (STUDIES / f"{name}.png").exists()


def test_the_text_on_intervals_has_the_numbers_of_its_result(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    study, result = importlib.import_module("ope_intervals"), json.loads((STUDIES / "ope_intervals.json").read_text())
    page = (STUDIES / "README.md").read_text()
    assert f"<!-- ope_intervals:begin -->\n{study.table(result)}\n<!-- ope_intervals:end -->" in page
    text = " ".join(page.partition("<!-- ope_intervals:end -->")[2].split())

    def span(name, *distances, sizes=study.SIZES):
        found = [result["coverage"][d][str(n)][name]["held"] for d in distances or ("0.2", "0.8") for n in sizes]
        return f"{min(found)} to {max(found)} %"

    assert result["repetitions"] == 100  # a count is a percentage
    assert f"it holds the truth in {span('FQE')} of the cases" in text and f"FQE's** ({span('MAGIC')})" in text
    assert f"{span('counted model', sizes=(100, 300))} from 100 episodes on" in text
    assert f"nearly right** ({span('DICE')})" in text and f"({span('IS', '0.2', sizes=(100, 300))} for IS)" in text
    assert f"{span('DR', '0.2')} and {span('WDR', '0.2')} near the data, {span('DR', '0.8')} and" in text
    assert f"{span('IS', '0.8')} for IS, {span('PDWIS', '0.8')} for PDWIS" in text
    for name, of in (("fqe", span("FQE")), ("dice", span("DICE")), ("doubly_robust", span("MAGIC"))):
        own = " ".join((STUDIES.parents[1] / "algos" / f"{name}.md").read_text().split())
        assert f"{of} of 100 data sets" in own or f"MAGIC's holds it in {of}" in own


@pytest.mark.parametrize("study", ["multimodality"], indirect=True)
def test_the_data_of_the_fork_are_walks_on_both_sides_of_the_block(study):
    data = study.fork(100)
    obs, action = np.asarray(data.obs), np.asarray(data.action)
    assert len(obs) > 100 * 2 * study.GOAL / study.STRIDE and obs[:, 0].max() > study.GOAL - 2 * study.STRIDE
    assert not (np.abs(obs) < [study.WIDE, study.HIGH]).all(axis=1).any()
    beside = np.abs(obs[:, 0]) < study.STRIDE / 2
    assert 0.3 < np.mean(obs[beside, 1] > 0) < 0.7
    near = (np.abs(obs[:, 0] + study.TURN) < 2 * study.STRIDE) & (np.abs(obs[:, 1]) < 0.05)
    turning = near & (np.abs(action[:, 1]) > 0.5)
    assert 0.3 < np.mean(action[turning, 1] > 0) < 0.7 and turning.sum() > 20
    # Whoever goes straight on hits the block, who stays is stuck, and who follows the guide arrives on his side
    side = np.where(np.arange(50) % 2, 1.0, -1.0)
    for policy, how in (
        (lambda place: np.tile([1.0, 0.0], (len(place), 1)), "hit"),
        (np.zeros_like, "stuck"),
        (lambda place: study.guide(place, side), "reached"),
    ):
        assert set(study.walk(policy, 50, np.random.default_rng(0))[1]) == {how}


@pytest.mark.parametrize("study", ["multimodality"], indirect=True)
def test_the_measures_of_the_bandit(study):
    # Of N(+-0.5, 0.1^2), |a| < 0.2 is from 3 to 7 deviations away: 0.135 %
    np.testing.assert_allclose([study.truth().sum(), study.truth()[32:48].sum()], [1, 0.00135], atol=1e-5)
    rng = np.random.default_rng(0)
    exact = rng.choice([-0.5, 0.5], study.SAMPLES) + 0.1 * rng.standard_normal(study.SAMPLES)
    shares, distance, between = study.of_bandit(lambda obs, key: exact[:, None])
    assert distance < 0.03 and between < 0.003 and shares.shape == (80,)
    # A Gaussian of the same mean and deviation, 0.51, has 31 % between the modes
    _, distance, between = study.of_bandit(lambda obs, key: 0.51 * rng.standard_normal((study.SAMPLES, 1)))
    assert distance > 0.4 and 0.29 < between < 0.32


@pytest.mark.parametrize("study", ["multimodality"], indirect=True)
def test_each_policy_is_a_file_as_it_is_and_is_measured(study, monkeypatch, tmp_path):
    tiny = dict(hidden=(8,), num_updates=20, log_interval=20, eval_interval=20, batch_size=16)
    small = {"vae_hidden": (8,), "actor_hidden": (8,), "flow_steps": 2, "num_steps": 2}
    methods = {
        label: (file, fields | {name: x for name, x in small.items() if name in fields}, passes)
        for label, (file, fields, passes) in study.METHODS.items()
    }
    changes = dict(COMMON=study.COMMON | tiny, SEEDS=1, SAMPLES=100, ROWS=200, WALKS=10, LIMIT=100, HERE=tmp_path)
    for name, value in (changes | {"METHODS": methods}).items():
        monkeypatch.setattr(study, name, value)
    mark = "<!-- multimodality:{} -->\n"
    (tmp_path / "README.md").write_text(f"Before.\n{mark.format('begin')}Old.\n{mark.format('end')}After.\n")
    study.main()
    result = json.loads((tmp_path / "multimodality.json").read_text())
    page = (tmp_path / "README.md").read_text()
    assert page == f"Before.\n{mark.format('begin')}{study.shown(result)}\n{mark.format('end')}After.\n"
    assert (tmp_path / "multimodality.png").exists() and result["results"].keys() == study.METHODS.keys()
    for one in result["results"].values():
        (ended,), (density,), (distance,) = one["fork"], one["density"], one["distance"]
        assert ended["reached"] + ended["hit"] + ended["stuck"] == pytest.approx(1)
        assert len(density) == 80 and 0 <= distance <= 1 and set(one["microseconds"]) == {"1", "1000"}


@pytest.mark.parametrize("study", ["multimodality"], indirect=True)
def test_the_table_of_the_policies_is_that_of_its_result(study):
    fork = [{"reached": 0.5, "up": 0.25}, {"reached": 1.0, "up": 0.75}]
    row = {"distance": [0.1, 0.3], "between": [0.01, 0.01], "fork": fork, "passes": 5}
    row["microseconds"] = {"1": 1234.5, "1000": 6.78}
    stuck = row | {"fork": [{"reached": 0.0, "up": None}] * 2}
    lines = study.table({"results": {"flow": row, "Gaussian": stuck}}).splitlines()
    assert lines[2] == (
        "| flow | 0.20 (0.10 to 0.30) | 1.0 % | 75 % (50 to 100) | 50 % (25 to 75) | 5 | 1,234 µs | 6.8 µs |"
    )
    assert lines[3].startswith("| Gaussian | 0.20 (0.10 to 0.30) | 1.0 % | 0 % | – | 5 |")
    page, result = (STUDIES / "README.md").read_text(), json.loads((STUDIES / "multimodality.json").read_text())
    assert f"<!-- multimodality:begin -->\n{study.shown(result)}\n<!-- multimodality:end -->\n" in page


@pytest.mark.parametrize("study", ["multimodality"], indirect=True)
def test_what_the_text_says_of_two_modes_is_in_its_result(study):
    text, found = section("Two ways round a block"), json.loads((STUDIES / "multimodality.json").read_text())["results"]
    between = {name: 100 * np.mean(row["between"]) for name, row in found.items()}
    reached = {name: 100 * np.mean([x["reached"] for x in row["fork"]]) for name, row in found.items()}
    assert min(found, key=lambda name: np.mean(found[name]["distance"])) == "flow"
    assert between["Gaussian, mode"] == 100 and f"{between['flow']:.1f} % of its actions there" in text
    assert round(between["diffusion"]) == 20 and "a fifth of its actions" in text
    assert f"in {reached['Gaussian, mode']:.0f} % of its walks" in text and f"({reached['flow']:.0f} %)" in text
