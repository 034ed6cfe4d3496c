"""benchmarks/two_implementations.py and falls.py: their arithmetic has known answers; the page has their numbers."""

import collections
import dataclasses
import importlib
import json
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import scipy.stats

from common.datasets import Transition
from common.recipes import locomotion_sac

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import falls  # noqa: E402
import two_implementations as two  # noqa: E402

PAGE = (ROOT / "benchmarks" / "standard.md").read_text()
WORDS = " ".join(PAGE.split())
FALLS = {
    algo: json.loads((ROOT / "benchmarks" / "results" / f"falls-{algo}-hopper-medium-expert-v1.json").read_text())
    for algo in ("iql", "xql")
}


def result(name):
    return json.loads((two.RESULTS / f"{name}.json").read_text())


OURS = sorted(path.stem for path in two.RESULTS.glob("*-ours*.json"))  # each beside a file of CORL's


def corl(ours):
    return ours.rpartition("-ours")[0] + "-corl"


# --- Arithmetic ------------------------------------------------------------------------------------------


def test_the_interval_is_welchs():
    # means 2 and 4, variances 1 and 4: the difference has variance 1/3 + 4/3 = 5/3, and (25/9) / (1/18 + 16/18) = 50/17
    # degrees of freedom
    half = scipy.stats.t.ppf(0.975, 50 / 17) * (5 / 3) ** 0.5
    assert two.interval([1, 2, 3], [2, 4, 6]) == pytest.approx((-2 - half, -2 + half))


def lines(seed, scores, believed=1.0):
    steps = range(10_000, 22_000, 2_000)
    returns = {"returns": [0.0], "true_value": seed + 0.5, "believed_value": believed}
    return [{"step": step, "seed": seed, "score": x, **returns} for step, x in zip(steps, scores, strict=True)]


def test_one_number_of_each_seed():
    result = {"lines": lines(1, [9, 1, 2, 3, 4, 10]) + lines(0, [7, 0, 0, 0, 0, 5])}
    assert two.values(result, "mean of the last five") == [1, 4]
    assert two.values(result, "last") == [5, 10]
    assert two.values(result, "at half of the updates") == [7, 9]


def test_the_table_says_whether_the_interval_holds_0():
    ours = {"lines": lines(0, [50] * 6) + lines(1, [52] * 6, 1.5)}
    theirs = {"lines": lines(0, [51] * 6, 9.0) + lines(1, [53] * 6, 9.5)}
    rows = {row.split("|")[1].strip(): row for row in two.table(ours, theirs).splitlines()}
    half = scipy.stats.t.ppf(0.975, 2) * 2**0.5
    assert (
        f"| 51.0 ± 1.4 (2) | 52.0 ± 1.4 (2) | -1.0 [{-1 - half:.1f}, {half - 1:.1f}] | yes | {2 * half:.1f} |"
        in rows["last"]
    )
    assert "| no |" in rows["believed value"]
    (reverse,) = [row for row in two.table(theirs, ours).splitlines() if "believed value" in row]
    assert "| 8.0 [" in reverse and "| no |" in reverse


def test_seeds_are_added_to_a_file_of_one_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(two, "RESULTS", tmp_path)
    options = two.Options("corl", "iql")
    cfg, _ = two.configure(options)
    assert (cfg.num_updates, cfg.eval_interval, cfg.expectile, cfg.tau) == (20_000, 2_000, 0.7, 0.005)
    early = {"step": 8_000, "seed": 0, "score": 1.0, "returns": [1.0], "believed_value": 1.0, "true_value": 1.0}
    two.keep(options, cfg, [early, *lines(0, [1.234] * 6)], {"commit": "a"})
    two.keep(options, cfg, lines(3, [2] * 6), {"commit": "b"})
    kept = json.loads((tmp_path / "iql-corl.json").read_text())
    assert two.seeds_of(options) == {0, 3} and len(kept["lines"]) == 12  # not what came before half of the updates
    assert kept["lines"][0]["score"] == 1.23 and [source["seeds"] for source in kept["sources"]] == [[0], [3]]
    with pytest.raises(SystemExit, match=r"has the seeds \[3\] already"):  # the file of ours
        (tmp_path / "iql-corl.json").rename(tmp_path / "iql-ours.json")
        monkeypatch.setattr(
            importlib.import_module("algos.iql"), "main", lambda cfg: pytest.fail("it trains them again")
        )
        two.main(two.Options("ours", "iql", seed=1))
    (tmp_path / "iql-ours.json").rename(tmp_path / "iql-corl.json")
    other, _ = two.configure(two.Options("corl", "iql", set=("beta=6",)))
    with pytest.raises(SystemExit, match="another configuration"):
        two.keep(options, other, lines(4, [2] * 6), {})


@pytest.mark.parametrize("side", ["ours", "corl"])
def test_what_cannot_be_kept_is_not_trained(tmp_path, monkeypatch, side):
    monkeypatch.setattr(two, "RESULTS", tmp_path)
    options = two.Options(side, "iql", seed=5, checkout=str(tmp_path))
    cfg, module = two.configure(options)
    monkeypatch.setattr(module, "main", lambda cfg: pytest.fail("it trains"))
    monkeypatch.setattr(module, "load_data", lambda cfg: pytest.fail("it loads the data, to train"))
    two.keep(options, cfg, lines(0, [2] * 6), {"commit": "a"})
    if side == "corl":
        with pytest.raises(SystemExit, match=r"iql.py is not there: give the folder of CORL's repository"):
            two.main(options)
        (tmp_path / "algorithms" / "offline").mkdir(parents=True)
        (tmp_path / "algorithms" / "offline" / "iql.py").write_text("")
        monkeypatch.setattr(two, "commit_of", lambda path: "a" * 40)
        monkeypatch.setattr(two.importlib.metadata, "version", lambda name: "1")  # of torch, which is not here
    with pytest.raises(SystemExit, match="another configuration: choose a --name"):
        two.main(dataclasses.replace(options, num_updates=40_000))


def test_other_weights_are_for_iql_alone():
    with pytest.raises(SystemExit, match="is for iql alone"):
        two.main(two.Options("ours-torch", "td3_bc"))


def test_corls_file_is_loaded_without_its_other_packages_and_refused_if_changed(tmp_path, monkeypatch):
    for name in ("d4rl", "gym", "pyrallis", "wandb", "corl_iql"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    path = tmp_path / "iql.py"
    text = ["import d4rl, gym, pyrallis, wandb", "@pyrallis.wrap()", "def train(env: gym.Env):", "    wandb.init()"]
    path.write_text("\n".join([*text, "X = 3", ""]))
    assert two.load_corl(path).X == 3
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
        subprocess.run([*git, *command], check=True)
    assert len(two.commit_of(path)) == 40
    (tmp_path / "other").write_text("not of the file")
    assert len(two.commit_of(path)) == 40
    path.write_text("X = 4")
    with pytest.raises(SystemExit, match="has changes"):
        two.commit_of(path)


def test_an_episodes_length_is_where_its_observation_stays():
    obs = np.repeat(np.arange(10.0)[None, :, None], 3, axis=0)
    obs[0, 5:] = 5  # five steps, to the sixth observation
    obs[1, 9:] = obs[1, 8]
    assert falls.lengths(obs).tolist() == [5, 8, 10]


@pytest.mark.parametrize("name, rows", [("hopper-medium-v1", 100_000), ("hopper-medium-expert-20k-v1", 99_998)])
def test_a_run_on_other_data_is_refused(tmp_path, monkeypatch, name, rows):
    (tmp_path / "config.json").write_text('{"config": {"algo": "iql"}}')
    data = types.SimpleNamespace(reward=np.zeros(rows))
    runs = types.SimpleNamespace(cfg=types.SimpleNamespace(dataset=name))
    iql = types.SimpleNamespace(restore=lambda *_: runs, load_data=lambda cfg: (data, None))
    monkeypatch.setattr(falls.importlib, "import_module", lambda name: iql)
    monkeypatch.setattr(falls, "load_dataset", lambda *_, **__: (data, None))
    with pytest.raises(SystemExit, match=f"is of {name}, {rows:,} rows: give a run on .* of 100,000 rows"):
        falls.main(falls.Options(tmp_path))


@pytest.mark.parametrize("algo, layer_norm", [("iql", [False, False]), ("xql", [True, True]), ("td3_bc", None)])
def test_what_is_asked_of_a_run_and_where_the_answer_goes(tmp_path, monkeypatch, algo, layer_norm):
    about = {"commit": "", "command": "", "device": "", "num_updates": 1, "seeds": [3, 4], "score_per_seed": [1, 2]}
    (tmp_path / "config.json").write_text(json.dumps({"config": {"algo": algo}}))
    (tmp_path / "summary.json").write_text(json.dumps(about))
    data = types.SimpleNamespace(reward=np.zeros(4), return_to_go=None, end=None)
    cfg = types.SimpleNamespace(dataset="stitch/hopper-medium-expert-v1", hidden=(256, 256))
    runs = types.SimpleNamespace(cfg=cfg, runs=[{}, {}])
    module = types.SimpleNamespace(restore=lambda *_: runs, load_data=lambda cfg: (data, None))
    stubs = {"ROWS": 2, "RESULTS": tmp_path, "of_data": lambda *_: {}, "episodes": lambda *_: []}
    stubs |= {"load_dataset": lambda *_, **__: (data, None), "weights": lambda runs, i, value, *_: value.layer_norm}
    for name, stub in stubs.items():
        monkeypatch.setattr(falls, name, stub)
    monkeypatch.setattr(falls.importlib, "import_module", {f"algos.{algo}": module}.get)
    falls.main(falls.Options(tmp_path))
    result = json.loads((tmp_path / f"falls-{algo}-hopper-medium-expert-v1.json").read_text())
    assert result["run"] == about and result.get("weights") == layer_norm


def test_by_which_weights_each_half_is_cloned(monkeypatch):
    """Critics that are off by +1 and 0 in seed 0, and by +3 and +2 in seed 1; V is off by 0 and 1."""
    critic = types.SimpleNamespace(apply=lambda params, obs, action: obs[:, 0] + action[:, 0] + params[:, None])
    value = types.SimpleNamespace(apply=lambda params, obs: obs[:, 1] + params)
    monkeypatch.setattr(falls, "Critic", lambda *_: critic)
    State = collections.namedtuple("State", "target_critic value")
    Params = collections.namedtuple("Params", "params")
    states = State(np.array([[1.0, 0.0], [3.0, 2.0]]), Params(np.array([0.0, 1.0])))
    runs = types.SimpleNamespace(
        cfg=types.SimpleNamespace(hidden=(), beta=np.log(2), max_weight=5.0),
        states=states,
        runs=[{"seed": 3}, {"seed": 4}],
    )
    # Q - V of the rows, before the networks' errors: 1, 2, 0, 0. Row 1 ends soon.
    data = types.SimpleNamespace(
        obs=np.array([[1.0, 1], [2, 2], [3, 3], [4, 4]]), action=np.array([[1.0], [2], [0], [0]])
    )
    end, to_go, rows = (
        np.array([500, 300, 500, 500]),
        np.array([10.0, 20, 30, 40]),
        [np.array([0, 1]), np.array([2, 3])],
    )
    seed_0, seed_1 = (falls.weights(runs, i, value, data, to_go, end, rows) for i in range(2))
    assert seed_0["medium"] == {"weight": 3, "v": 1, "return_to_go": 10}  # the weights are 2 and 4
    assert seed_0["expert"] == {"weight": 1, "v": 3.5, "return_to_go": 35}
    assert seed_0["seed"] == 3 and seed_0["share_of_weight_on_expert"] == 0.25
    assert seed_1["seed"] == 4 and seed_1["medium"]["weight"] == 4.5  # 4, and 8 cut to 5
    assert seed_1["expert"] == {"weight": 2, "v": 4.5, "return_to_go": 35}


def test_where_a_policy_falls():
    """Rows of the medium policy are at 0 and those of the expert at 10. Episode 0 leaves the expert at step 160, and
    episode 2 is never near the expert."""
    data = Transition(*(np.repeat([0.0, 10.0], 100)[:, None] + 0.01 * np.arange(200)[:, None] for _ in range(5)))
    at = np.full((3, 1000), 10.0)
    at[0, 160:200], at[0, 200:] = 0, 0
    wiggle = 0.1 * (np.arange(1000) % 2)
    at[0, :200], at[1] = at[0, :200] + wiggle[:200], at[1] + wiggle
    at[0, 200:] = at[0, 199] + 0.05
    at[2, :300], at[2, 300:] = wiggle[:300], 0.05

    class Env:
        def evaluate(self, policy, seeds, number):
            obs = np.empty((1, 3, 1))  # one array, written anew at every step, as the environments do
            for step in range(1000):
                obs[0, :, 0] = at[:, step]
                policy(obs, step, None, None)
            return types.SimpleNamespace(returns=np.array([[900.0, 3400.0, 700.0]]))

        def score(self, returns):
            return returns / 34

    runs = types.SimpleNamespace(runs=[{"seed": 4}], act=lambda *at: None)
    (found,) = falls.episodes(runs, Env(), data, [np.arange(0, 100), np.arange(100, 200)], 3)
    assert found["seed"] == 4 and found["falls"] == 2 and found["lengths"] == [200, 300, 1000]
    assert found["near_expert_in_steps_50_to_150"] == 0.667 and found["steps_from_the_expert_to_a_fall"] == [40]


# --- The committed numbers -------------------------------------------------------------------------------


def check_falls(algo, folder):
    """What the page says of both algorithms; returns the words of the section."""
    found = FALLS[algo]
    assert all("dirty" not in commit for commit in (found["commit"], found["run"]["commit"]))
    hopper = f"hopper-medium-expert-v1/{algo}"
    summary = json.loads((two.RESULTS.parent / folder / hopper / "summary.json").read_text())
    assert found["run"]["score_per_seed"] == summary["score_per_seed"] and found["run"]["num_updates"] == 100_000
    first, more = (float(last_five(f"{place}/{hopper}")) for place in ("standard", "standard/seeds-3-and-4"))
    heading = f"\n## Why {algo.upper()} is near {(3 * first + 2 * more) / 5:.0f} on hopper-medium-expert\n"
    assert heading in PAGE
    words = " ".join(PAGE.split(heading)[1].split("\n## ")[0].split())

    early = np.mean([seed["near_expert_in_steps_50_to_150"] for seed in found["episodes"]])
    assert f"expert's at {early:.0%} of the steps".replace("%", " %") in words
    length, returns = over_seeds(found, "lengths"), over_seeds(found, "returns")
    fallen = length < 1000
    assert f"{fallen.sum()} of the {len(length)} episodes end by a fall" in words
    whole = f"The {(~fallen).sum()} episodes without a fall have returns of {returns[~fallen].mean():,.0f} on average"
    assert whole in words
    v = [seed["expert"]["v"] for seed in found["weights"]]
    assert f"$V$ is {min(v):.1f} to {max(v):.1f} on the expert's rows" in words
    assert f"have earned {found['weights'][0]['expert']['return_to_go']:.1f}" in words
    share = [round(100 * seed["share_of_weight_on_expert"]) for seed in found["weights"]]
    assert f"have {min(share)} to {max(share)} % of the weight" in words
    return words


def over_seeds(found, name):
    return np.concatenate([seed[name] for seed in found["episodes"]])


def test_the_page_says_what_was_measured_of_iqls_falls():
    found, words = FALLS["iql"], check_falls("iql", "standard")
    medium, expert = (found["data"][name] for name in falls.HALVES)
    assert f"falls in {medium['falls']:,} of its {medium['episodes']:,} episodes" in words
    assert f"end within {medium['median_length']:.0f} steps. The expert has {expert['episodes']} episodes" in words
    assert expert["falls"] == 0 and expert["median_length"] == 1000
    (near,) = re.findall(r"## Why IQL is near (\d+) on", PAGE)
    assert f"IQL is at about {near} here" in words

    away = over_seeds(found, "steps_from_the_expert_to_a_fall")
    assert f"Of these, {len(away)} last longer" in words
    assert f"the last {away.min()} to {away.max()} steps before the fall ({np.median(away):.0f} in the middle)" in words
    assert f"on average; the expert's have {expert['mean_return']:,.0f}" in words
    assert "score {:.0f}, {:.0f} and {:.0f}".format(*(seed["score"] for seed in found["episodes"])) in words

    v = [seed["medium"]["v"] for seed in found["weights"]]
    assert f"it is {min(v):.1f} to {max(v):.1f}, a little" in words
    assert f"above their {found['weights'][0]['medium']['return_to_go']:.1f}" in words
    begin = [half["discounted_return_from_the_start"] for half in (medium, expert)]
    assert f"{begin[0]} with a discount of 0.99, which is {begin[0] / begin[1]:.0%}".replace("%", " %") in words
    assert f"the expert's {begin[1]}. Without" in words
    assert f"Without a discount it is {medium['mean_return'] / expert['mean_return']:.0%}".replace("%", " %") in words


def test_the_page_says_what_was_measured_of_xqls_falls():
    found, words = FALLS["xql"], check_falls("xql", "standard/seeds-3-and-4")
    (near,) = re.findall(r"## Why XQL is near (\d+) on", PAGE)
    assert f"XQL is near {near} on hopper-medium-expert-v1" in algo_page("xql")
    assert found["run"]["seeds"] == [3, 4] and "the policies of seeds 3 and 4 play" in words
    assert "score {:.0f} and {:.0f} there".format(*(seed["score"] for seed in found["episodes"])) in words
    away = over_seeds(found, "steps_from_the_expert_to_a_fall")
    length = over_seeds(found, "lengths")
    assert (length < 1000).sum() == len(away) and "end by a fall, and in all of them" in words
    assert f"the last {away.min()} to {away.max()} steps ({np.median(away):.0f} in the middle)" in words
    early = length[length < 300]
    assert f"{len(early)} come after {early.min()} to {early.max()} steps" in words

    mean_share = [np.mean([seed["share_of_weight_on_expert"] for seed in x["weights"]]) for x in (found, FALLS["iql"])]
    assert mean_share[0] < mean_share[1] and "choose the expert even less" in words
    v = {name: [seed[name]["v"] for seed in found["weights"]] for name in falls.HALVES}
    earned = {name: found["weights"][0][name]["return_to_go"] for name in falls.HALVES}
    assert all(max(v[name]) < earned[name] for name in falls.HALVES) and "values are still too low" in words
    assert f"{min(v['medium']):.1f} to {max(v['medium']):.1f} on the medium policy's" in words
    assert f"have earned {earned['medium']:.1f}. IQL's are not" in words


def test_the_page_says_what_corls_settings_of_iql_give():
    place = "trials/corl-settings/hopper-medium-expert-v1/iql"
    runs = [json.loads(line) for line in (two.RESULTS.parent / place / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((two.RESULTS.parent / place / "config.json").read_text())
    assert "dirty" not in config["commit"]
    config = config["config"]
    assert (config["beta"], config["expectile"], config["normalize_reward"]) == (6, 0.5, False)
    scores = np.array([[run["score"] for run in runs if run["seed"] == seed] for seed in range(3)])
    last, mean = scores[:, -1], scores[:, -5:].mean(axis=1)
    assert f"({'results/' + place}) have {last[0]:.0f}, {last[1]:.0f} and {last[2]:.0f} in the last evaluation" in WORDS
    assert f"and {mean[0]:.0f}, {mean[1]:.0f} and {mean[2]:.0f} in the mean of the last five" in WORDS
    low, high = (scores < 3).sum(), (scores > 90).sum()
    assert f"{low} of the {scores.size} are below 3, which is a fall at once, and {high} are above 90." in WORDS


def test_the_page_says_how_td3_bc_rises():
    at = {}
    for place in ("standard", "standard/seeds-3-and-4"):
        lines = ROOT / "benchmarks/results" / place / "hopper-medium-expert-v1/td3_bc/metrics.jsonl"
        for line in map(json.loads, lines.read_text().splitlines()):
            at.setdefault(line["step"], []).append(line["score"])
    assert len(at[100_000]) == 5
    means = [np.mean(at[step]) for step in (50_000, 70_000, 90_000, 100_000)]
    half, then, late, end = (f"{mean:.1f}" for mean in means)
    assert (
        f"five seeds is {half} after 50,000 updates, {then} after 70,000, {late} after 90,000 and {end} at the" in WORDS
    )
    assert all(np.mean(scores) < np.mean(at[100_000]) for step, scores in at.items() if step < 100_000)
    *low, third, _, best = sorted(at[100_000])
    assert f"three of them end at {third:.1f} to {best:.1f}, and the others at {low[0]:.1f} and {low[1]:.1f}." in WORDS


def last_five(place):
    """The mean over the seeds of the last five evaluations, as a table shows it."""
    lines = (ROOT / "benchmarks/results" / place / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    late = sorted({row["step"] for row in rows})[-5:]
    return f"{np.mean([row['score'] for row in rows if row['step'] in late]):.1f}"


def test_the_page_says_what_the_walkers_data_are():
    card = (ROOT / "benchmarks/cards/walker2d-medium-replay-v2.md").read_text()
    assert "median 94 |" in card and ", 473.4, 1274, 4096 (0, 5, 25, 50, 75, 95, 100 %)" in card
    low, high = locomotion_sac.REFERENCE_SCORES["walker2d"]
    assert "end within 94 steps, and 95 % of them earn less than 1,274, which" in WORDS
    assert f"less than 1,274, which is a score of {100 * (1274 - low) / (high - low):.0f}." in WORDS
    for name in ("walker2d-sac", "walker2d-sac-v2"):
        medium = json.loads((ROOT / f"benchmarks/behaviour/{name}.json").read_text())["medium"]["return_mean"]
        score = 100 * (medium - low) / (high - low)
        assert f"his policy](behaviour/{name}.json) earns {medium:,.0f}, a score of {score:.1f}." in WORDS
    behaviour = locomotion_sac.load("walker2d", 2)
    step, earns = behaviour["step"][: behaviour["medium"] + 1], behaviour["return"].mean(1)[: behaviour["medium"] + 1]
    good = earns >= high / 3
    assert f"of v2's {len(step)} policies, {(~good).sum()} earn less than a third of what D4RL's" in WORDS
    assert f"the others come after step 260,000 of {step[-1]:,}." in WORDS and step[good].min() > 260_000


def test_the_page_says_how_td3_bc_depends_on_the_walkers_data():
    first, second = (f"standard/walker2d-medium-replay-v{version}" for version in (1, 2))
    assert f"Published is 85.6 on D4RL's set of that name, and ours has {last_five(f'{second}/td3_bc')}." in WORDS
    (row,) = [row for row in PAGE.splitlines() if "[td3_bc]" in row and "walker2d-medium-replay-v2/td3_bc)" in row]
    assert row.endswith("| (85.6) |") and "(published on walker2d-medium-replay-v2)" in WORDS
    new, old = (last_five(f"{place}/bc-top-10") for place in (second, first))
    assert f"With v2 10 % BC has {new} in the place of {old}, and 54.4 is published." in WORDS
    new, old = (last_five(f"{place}/td3_bc") for place in (second, first))
    assert f"But TD3+BC has only {new} in the place of {old}." in WORDS
    iql, awac, xql = (last_five(f"{second}/{method}") for method in ("iql", "awac", "xql"))
    assert f"we think: they have {iql}, {awac} and {xql}, and 82.2, 80.6 and 82.2 are published." in WORDS
    heading = f"Why TD3+BC is near {float(new):.0f} on walker2d-medium-replay"
    assert f"\n## {heading}\n" in PAGE
    place = "trials/medium-alone/walker2d-medium-v2/td3_bc"
    alone, whole = (
        json.loads((ROOT / f"benchmarks/results/{x}/config.json").read_text()) for x in (place, f"{second}/td3_bc")
    )
    differ = {name for name in whole["config"] if alone["config"][name] != whole["config"][name]}
    assert differ == {"dataset", "data", "num_seeds"} and "dirty" not in alone["commit"]
    assert f"[one seed](results/{place}) has {last_five(place)} in the mean of the last five evaluations;" in WORDS


def of_a_million_updates(dataset, method):
    """(steps, scores) of the one seed of a trial as long as the published runs."""
    place = two.RESULTS.parent / "trials/a-million-updates" / dataset / method
    config = json.loads((place / "config.json").read_text())
    short = json.loads((ROOT / "benchmarks/results/standard" / dataset / method / "config.json").read_text())
    differ = {name for name in short["config"] if config["config"][name] != short["config"][name]}
    assert differ == {"num_updates", "num_seeds", "eval_interval"} and "dirty" not in config["commit"]
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in lines} == {0} and lines[-1]["step"] == 1_000_000
    return tuple(np.array([[line["step"], line["score"]] for line in lines]).T)


def test_the_page_says_what_a_million_updates_of_td3_bc_give():
    steps, scores = of_a_million_updates("walker2d-medium-replay-v1", "td3_bc")
    assert f"is at {scores[-1]:.1f} in the last evaluation and at {scores[-5:].mean():.1f} in the mean" in WORDS
    late = scores[steps >= 150_000]
    assert f"from 150,000 updates on are between {late.min():.1f} and {late.max():.1f}." in WORDS


def test_the_page_says_why_bc_stands_still():
    def last(method):
        lines = ROOT / f"benchmarks/results/standard/halfcheetah-medium-replay-v1/{method}/metrics.jsonl"
        rows = [json.loads(line) for line in lines.read_text().splitlines()]
        returns = np.concatenate([row["returns"] for row in rows if row["step"] == 100_000])
        assert len(returns) == 30
        return f"{min(returns):,.0f} to {max(returns):,.0f}".replace("-", "−")

    assert f"30 episodes earns {last('bc')}:" in WORDS
    assert f"30 episodes earn {last('bc-top-10')}, and" in WORDS
    parts = locomotion_sac.snapshots("halfcheetah", 1, "medium-replay")
    policies = parts[parts.count(None) :]
    earn = locomotion_sac.load("halfcheetah", 1)["return"].mean(axis=1)[policies]
    assert f"{len(parts)} parts of the same length" in WORDS and f"{parts.count(None)} of uniform actions" in WORDS
    assert f"{len(policies)} policies, of which the first {np.argmax(earn >= 0)} earn less than 0" in WORDS
    assert 0.3 < (parts.count(None) + np.argmax(earn >= 0)) / len(parts) < 0.36
    assert f"earns {locomotion_sac.load('halfcheetah', 1)['medium_return'].mean():,.0f} on average" in WORDS


def test_the_page_says_how_far_the_scores_on_halfcheetah_are_above_the_medium_policy():
    low, high = locomotion_sac.REFERENCE_SCORES["halfcheetah"]
    medium = 100 * (locomotion_sac.load("halfcheetah", 1)["medium_return"].mean() - low) / (high - low)
    card = (ROOT / "benchmarks" / "cards" / "halfcheetah-medium-replay-v1.md").read_text()
    best = re.search(r"its quantiles \| .* ([\d,]+) \(0, 5, 25, 50, 75, 95, 100 %\)", card)[1].replace(",", "")
    best = 100 * (float(best) - low) / (high - low)
    assert f"The medium policy scores {medium:.1f} on average, and [the best episode of the data]" in WORDS
    assert f"(cards/halfcheetah-medium-replay-v1.md) {best:.1f}." in WORDS

    names = {"td3_bc": "TD3+BC", "awac": "AWAC", "iql": "IQL", "xql": "XQL"}
    table = PAGE.split("\n### halfcheetah-medium-replay-v1\n")[1].split("\n###")[0]
    ours = {name: float(last_five(f"standard/halfcheetah-medium-replay-v1/{name}")) for name in names}
    theirs = {name: float(re.search(rf"\[{name}\]\(.* \(([\d.]+)\) \|\n", table)[1]) for name in names}
    said = "{} has {}, {} {}, {} {} and {} {}.".format(*(x for name in names for x in (names[name], ours[name])))
    assert said in WORDS
    for name in names:
        assert f"{theirs[name]} is published for {names[name]}" in WORDS or f"{theirs[name]} for {names[name]}" in WORDS
    assert "has 42.4 on halfcheetah-medium, which is the medium policy alone." in WORDS  # CORL's README
    above = [[round(x - at, 1) for x in scores.values()] for scores, at in ((theirs, 42.4), (ours, round(medium, 1)))]
    (theirs_low, theirs_high), (ours_low, ours_high) = ((min(x), max(x)) for x in above)
    said = f"are {theirs_low} to {theirs_high} points above the medium policy, and ours are {ours_low} to {ours_high}."
    assert said.replace("are -", "are −") in WORDS


def test_the_page_says_that_the_other_form_of_bc_stands_still_too():
    place = two.RESULTS.parent / "trials/alpha-0/halfcheetah-medium-replay-v1/td3_bc"
    config = json.loads((place / "config.json").read_text())
    scores = [json.loads(line)["score"] for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert config["config"]["alpha"] == 0 and config["config"]["num_seeds"] == 1 and "dirty" not in config["commit"]
    (shown,) = {f"{score:.1f}" for score in scores}
    assert f"trials/alpha-0/halfcheetah-medium-replay-v1/td3_bc) has {shown} in every evaluation" in WORDS
    (row,) = [row for row in PAGE.splitlines() if row.startswith("| [bc](") and "halfcheetah-medium-replay-v1" in row]
    assert row.endswith("| (35.7) |") and "has 35.7 on D4RL's set." in WORDS


def test_the_page_says_what_a_million_updates_of_iql_give():
    steps, scores = of_a_million_updates("hopper-medium-expert-v1", "iql")
    first, second, third = (scores[steps == 1000 * k].item() for k in (100, 200, 250))
    assert f"is at {first:.1f} after 100,000 updates, at {second:.1f} after 200,000 and at {third:.1f} after" in WORDS
    late = scores[steps >= 250_000]
    good, others = late[late > 105], late[late <= 105]
    assert f"Of its {len(late)} evaluations from there on, {len(good)} are between" in WORDS
    assert f"between {good.min():.1f} and {good.max():.1f}, the last nine among them, and the others" in WORDS
    assert f"the others between {others.min():.1f} and {others.max():.1f}." in WORDS
    assert min(scores[-9:]) > 105 > scores[-10] and steps[-9] == 600_000 and "score from 600,000 on." in WORDS
    assert f"The last one is {scores[-1]:.1f}, and the mean of the last five" in WORDS
    assert f"the mean of the last five {scores[-5:].mean():.1f}. All" in WORDS
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"IQL has {scores[-5:].mean():.1f} on hopper-medium-expert-v1 after a million updates" in readme


def algo_page(name):
    return " ".join((ROOT / "algos" / f"{name}.md").read_text().split())


def test_the_page_says_who_stitches_in_the_medium_maze():
    scores = {}
    for method in ("iql", "xql", "rebrac", "awac", "bc-top-10", "td3_bc", "bc"):
        lines = ROOT / f"benchmarks/results/standard/pointmaze-medium-stitch-v0/{method}/metrics.jsonl"
        for line in map(json.loads, lines.read_text().splitlines()):
            scores.setdefault(method, {}).setdefault(line["step"], []).append(line["score"])
    # a score is the success in % over ten episodes
    late = {m: sum(sum(x) for step, x in at.items() if step > 50_000) / 10 for m, at in scores.items()}
    names = {"xql": "XQL", "rebrac": "ReBRAC", "awac": "AWAC", "bc-top-10": "10 % BC", "td3_bc": "TD3+BC"}
    reached = ", ".join(f"{late[method]:.0f} by {name}" for method, name in names.items())
    assert f"reached in {late['iql']:.0f} of them by IQL, {reached} and {late['bc']:.0f} by BC." in WORDS
    for method in ("iql", "xql"):
        assert all(x == [100] * 3 for step, x in scores[method].items() if step >= 50_000)
    assert "from 50,000 updates on, every episode of both reaches the goal" in WORDS
    assert scores["awac"][50_000] == scores["rebrac"][60_000] == [100] * 3
    first, second, third = scores["awac"][100_000]
    assert f"after 50,000 updates, and in {first:.0f}, {second:.0f} and {third:.0f} % of them at the end" in WORDS
    first, second, third = scores["rebrac"][100_000]
    assert f"after 60,000 updates, and at {first:.0f}, {second:.0f} and {third:.0f} % at the end" in WORDS
    ours, theirs = (
        json.loads((ROOT / f"benchmarks/results/standard/pointmaze-medium-stitch-v0/{m}/config.json").read_text())
        for m in ("td3_bc", "rebrac")
    )
    alpha, weight = ours["config"]["alpha"], theirs["config"]["actor_beta"]  # of a mean and of a sum over two actions
    assert f"weighs cloning {1 / (2 * alpha) / weight:.0f} times less" in WORDS
    assert round(1 / (2 * weight), 1) == 166.7 and "With `alpha` 166.7, which makes the two weights equal" in WORDS
    trials = {
        "alpha-167": {"alpha": 166.7},
        "raw-observations": {"normalize_obs": False},
        "raw-observations-alpha-167": {"alpha": 166.7, "normalize_obs": False},
        "no-layer-norm": {"layer_norm": False},
    }
    for name, changed in trials.items():
        method, base = ("rebrac", theirs) if name == "no-layer-norm" else ("td3_bc", ours)
        place = f"trials/{name}/pointmaze-medium-stitch-v0/{method}"
        config = json.loads((ROOT / "benchmarks/results" / place / "config.json").read_text())
        assert config["config"] == base["config"] | changed | {"num_seeds": 1} and "dirty" not in config["commit"]
        assert f"[{last_five(place)}](results/{place})" in WORDS
    trial_scores = {}
    for name in ("raw-observations-alpha-167", "no-layer-norm"):
        (lines,) = (two.RESULTS.parent / "trials" / name).glob("pointmaze-medium-stitch-v0/*/metrics.jsonl")
        trial_scores[name] = {x["step"]: x["score"] for x in map(json.loads, lines.read_text().splitlines())}
    both = trial_scores["raw-observations-alpha-167"]
    assert f"up to {max(both.values()):.0f} % after 40,000 updates" in WORDS and both[40_000] == max(both.values())
    found = [score for score in both.values() if score]
    assert len(found) == 4 and f"but {min(found):.0f} to {max(found):.0f} % in four evaluations" in algo_page("td3_bc")
    assert list(trial_scores["no-layer-norm"].values()).count(100) == 3
    assert "in all episodes of three evaluations" in algo_page("rebrac")


@pytest.mark.parametrize("ours", OURS)
def test_both_sides_had_the_same_settings(ours):
    sides = {name: result(name) for name in (ours, corl(ours))}
    first, second = (found["config"] for found in sides.values())
    assert all(first[name] == second[name] for name in first.keys() & second.keys())
    assert first.keys() ^ second.keys() <= {"random_shift"}  # of images; it came between the runs
    for name, found in sides.items():
        steps = {}
        for line in found["lines"]:
            assert len(line["returns"]) == found["config"]["eval_episodes"]
            steps.setdefault(line["seed"], []).append(line["step"])
        updates = found["config"]["num_updates"]
        assert all(x == list(range(updates // 2, updates + 1, updates // 10)) for x in steps.values())
        assert sorted(steps) == sorted(seed for source in found["sources"] for seed in source["seeds"])
        for source in found["sources"]:
            # The walker's are the runs of the protocol's cell
            script = "sweep.py standard" if name == "td3_bc-walker2d-ours" else "two_implementations.py"
            assert len(source["commit"]) == 40 and source["command"].startswith(f"benchmarks/{script}")
            assert name == ours or source["corl"].startswith("https://github.com/")
            assert name == ours or name == "rebrac-corl" or source["versions"]["torch"]  # ReBRAC is in JAX there, too


@pytest.mark.parametrize("ours", OURS)
def test_the_page_has_the_tables_of_the_result_files(ours):
    assert two.table(result(ours), result(corl(ours))) in PAGE


def test_what_the_page_concludes_is_so():
    def found(ours, column):
        low, high = two.interval(*(two.values(result(name), column) for name in (ours, corl(ours))))
        return low <= 0 <= high, high - low

    score, believed = "mean of the last five", "believed value"
    assert found("td3_bc-ours", score)[0] and found("td3_bc-ours", score)[1] < 20
    ours, theirs = (np.mean(two.values(result(f"td3_bc-{side}"), believed)) for side in ("ours", "corl"))
    assert 1.005 < ours / theirs < 1.025 and not found("td3_bc-ours", believed)[0]
    assert not found("iql-ours", score)[0] and not found("iql-ours", believed)[0]
    assert found("iql-ours-torch", believed)[0] and found("iql-ours-torch", believed)[1] < 2
    assert found("iql-ours-torch", score)[0] and found("iql-ours-torch", score)[1] > 20
    assert all(found("td3_bc-walker2d-ours", column)[0] for column in (score, believed))
    seeds = [two.values(result(f"td3_bc-walker2d-{side}"), score) for side in ("ours", "corl")]
    assert max(seeds[0]) < min(seeds[1]) and len(seeds[0]) == len(seeds[1]) == 3
    means = np.mean(seeds, axis=1)
    assert f"CORL's is {means[1] - means[0]:.1f} points above ours, and each of its seeds" in WORDS
    assert f"has {means[1]:.1f} in the mean of the last five" in WORDS and f"where ours has {means[0]:.1f}." in WORDS
    assert all(found("rebrac-ours", column)[0] for column in two.COLUMNS)
    assert 2.5 < found("rebrac-ours", score)[1] < 3.5
    gap = {
        column: np.subtract(*(np.mean(two.values(result(f"rebrac-{side}"), column)) for side in ("ours", "corl")))
        for column in (score, believed)
    }
    assert f"ours is {gap[score]:.1f} points above CORL's" in WORDS and f"agree to {gap[believed]:.1f}." in WORDS
    ends = [two.values(result(path.stem), "last") for path in two.RESULTS.glob("*.json")]
    assert all(np.mean(end) < 75 for end in ends)  # published: 101 and 107
