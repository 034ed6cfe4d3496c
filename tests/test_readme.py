"""README and the pages: short, true and runnable.

Their numbers are those of the committed result files, their links and commands exist, and their code runs as it stands.
"""

import importlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib

import gymnasium
import numpy as np
import pytest
import tyro
from conftest import project_algos

from common.recipes import RECIPES, locomotion_sac

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import report  # noqa: E402
import speed  # noqa: E402
import speed_act  # noqa: E402
import speed_online  # noqa: E402
import sweep  # noqa: E402
from report import standard  # noqa: E402
from report.online import since_switch  # noqa: E402
from report.runs import read_runs  # noqa: E402

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
UMAZE = RESULTS / "pointmaze-umaze-v0"
SPEED = sorted(RESULTS.glob("speed-*.json"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
PAGES = [*TEXTS, *sorted((ROOT / "algos").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*/*.md"))]
PROTOCOLS = tomllib.loads((ROOT / "benchmarks" / "protocols.toml").read_text())
TINY = "num_updates=20 eval_interval=10 log_interval=10 eval_episodes=1 num_seeds=2 batch_size=16".split()


def page(name):
    return (ROOT / "benchmarks" / name).read_text()


def name_of(path):
    return path.relative_to(ROOT).as_posix()


# --- Form, links and commands ------------------------------------------------------------------------------


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_pictures_exist(path):
    # Formulas have brackets of their own
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^"]+)"', text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def commands(text):
    """What a reader would type: the lines of indented blocks, and what begins with `python` within the text."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    block = re.compile(r"^    ((?:.*\\\n)*.*)$", flags=re.MULTILINE)
    blocks = block.findall(text)
    inline = [
        code for code in re.findall(r"`([^`]*)`", block.sub("", text)) if re.match(r"([A-Z_]+=\S+ )*python ", code)
    ]
    for line in blocks + inline:
        for command in line.replace("\\\n", " ").split("&&"):
            words = shlex.split(command, comments=True)
            while words and "=" in words[0]:  # of the environment
                words = words[1:]
            if words:
                yield words


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_exist_and_take_these_options(path):
    found = list(commands(path.read_text()))
    assert found or "CONTRIBUTING" in path.name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for program, *words in found:
        if program == "python":
            # Words in capitals are the reader's
            script = ROOT / words[0].replace("NAME", "iql")
            args = [re.sub(r"^[A-Z]+(\.\.\.)?$", "bc", word) for word in words[1:]]
            assert script.exists(), words
            module = importlib.import_module(f"{'algos.' * (script.parent.name == 'algos')}{script.stem}")
            options = getattr(module, "Config", None) or module.Options
            tyro.cli(options, args=args)
        elif program == "pip":
            assert words[0] == "install" and all(word.startswith((".", "-", "benchmarks/")) for word in words[1:])
            assert set(re.findall(r"\[(\w+)\]", " ".join(words))) <= extras.keys(), words
        elif program == "pytest":
            assert all((ROOT / word).exists() for word in words if "/" in word), words
        else:
            assert program in ("cp", "sed", "ruff") or (ROOT / program).exists(), program


def test_a_command_with_an_unknown_option_would_be_noticed():
    """The test above parses what it finds: these it must find."""
    found = list(commands("x `python algos/iql.py --nonsense 1` y\n\n    A=b python algos/bc.py \\\n        --c # d\n"))
    assert found == [["python", "algos/bc.py", "--c"], ["python", "algos/iql.py", "--nonsense", "1"]]


def test_every_algorithm_of_the_project_is_in_the_list_once():
    page = (ROOT / "algos" / "README.md").read_text().partition("\n## ")[2]
    for listed in (
        re.findall(r"\[`(\w+)`\]\(algos/(\w+)\.md\)", README),
        re.findall(r"\[`(\w+)\.py`\]\((\w+)\.md\)", page),
    ):
        assert all(file == linked for file, linked in listed)
        assert sorted(file for file, _ in listed) == project_algos()


def test_every_dataset_that_can_be_built_is_named():
    def spread(name):
        parts = [part.split(",") for part in re.split(r"[{}]", name)]
        return ["".join(choice) for choice in itertools.product(*parts)]

    table = page("protocols.md").partition("| built here")[2].partition("\n## ")[0]  # two tables
    named = re.findall(r"^\|.*?`(stitch/[^`]*)`", table, flags=re.MULTILINE)
    coming = {
        f"stitch/{task}-{quality}-v{version}"
        for task, version in locomotion_sac.VERSIONS
        for quality in locomotion_sac.QUALITIES
    }
    assert sorted(x for name in named for x in spread(name)) == sorted(RECIPES.keys() | coming)


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation and f"\nlicense: {project['license']}\n" in citation


def test_what_python_3_13_has_not_is_said():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [need for extra in project["optional-dependencies"].values() for need in extra]
    (without,) = [need for need in needs if "python_version < '3.13'" in need]
    assert f"On Python 3.13 `[test]` leaves out `{without.partition('>')[0]}`" in " ".join(README.split())
    assert project["requires-python"] == ">=3.11" and "Python 3.11, 3.12 or 3.13" in README


# --- Numbers ---------------------------------------------------------------------------------------------------


def test_the_table_of_the_main_job_is_that_of_the_result_files():
    report.main(report.Options("pointmaze-umaze-v0", check=True))
    runs = read_runs(UMAZE)
    assert {run.method for run in runs} == {path.name for path in UMAZE.iterdir() if path.is_dir()}
    for run in runs:
        assert run.summary["num_updates"] == 6000 and len(run.scores) == 3 and "dirty" not in run.summary["commit"]
    score = {run.method: run.summary for run in runs}
    iql = f"{score['iql']['score_mean']:.0f} ± {score['iql']['score_std']:.0f}"
    assert f"IQL had {iql} on the CPU that made the table" in " ".join(page("scores.md").split())
    assert f"IQL had {score['iql']['score_mean']:.0f} on the CPU of this table" in " ".join(README.split())
    assert f"TD3+BC has {score['td3_bc']['score_mean']:.1f} because" in " ".join(README.split())


def test_a_protocol_that_has_no_results_yet_has_none():
    of = dict(re.findall(r"^- \*\*([a-z]+)\*\*(.*?)(?=^- |^#)", page("protocols.md"), re.M | re.S))
    assert {"images", "atari", "full"} <= of.keys()
    for name, text in of.items():
        assert "no results of it" not in " ".join(text.split()) or not (RESULTS / name).exists(), name


def test_the_tables_of_the_standard_protocol_are_those_of_its_result_files():
    if (RESULTS / standard.NAME).is_dir():
        report.main(report.Options(standard.NAME, check=True))
        found = read_runs(RESULTS / standard.NAME)
        assert all("dirty" not in run.summary["commit"] for run in found)
    else:
        assert "0 of 36 cells (9 methods on 4 datasets) are finished" in page("standard.md")
        assert "<!-- report:standard:begin -->\n\n<!-- report:standard:end -->" in README


def test_default_run_reaches_the_required_score_and_cloning_does_not():
    score = {p.name: json.loads((p / "summary.json").read_text())["score_mean"] for p in UMAZE.iterdir() if p.is_dir()}
    assert score["iql"] >= 90 and score["bc"] <= 20


def rows(text, mark):
    """The cells of each row of a marked table, without its head."""
    table = text.partition(f"<!-- report:{mark}:begin -->")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[3:]]


def number_in(cell):
    """The first number of a cell, or None of a dash."""
    found = re.search(r"(?:^|\[)(-?[\d,]+(?:\.\d+)?)", cell)
    return found and float(found[1].replace(",", ""))


@pytest.mark.parametrize(
    "path, mark, column",
    [("README.md", "pointmaze-umaze-v0", 1), ("benchmarks/quick.md", "quick", -1)]
    + [("benchmarks/speed.md", f"speed:{file.stem.removeprefix('speed-')}", 2) for file in SPEED],
)
def test_tables_are_sorted_by_what_they_show(path, mark, column):
    shown = [number_in(row[column]) for row in rows((ROOT / path).read_text(), mark)]
    numbers = [x for x in shown if x is not None]
    assert numbers and numbers == sorted(numbers, reverse=True)
    assert shown[len(numbers) :] == [None] * (len(shown) - len(numbers))  # what has none stands last


def test_speed_tables_are_those_of_the_result_files():
    assert SPEED
    for file in SPEED:
        measured = json.loads(file.read_text())
        mark = f"<!-- report:speed:{file.stem.removeprefix('speed-')}"
        shown = f"{mark}:begin -->\n{speed.table(measured)}\n{mark}:end -->"
        assert shown in page("speed.md"), f"speed.md does not show {file.name} as it is: python benchmarks/report.py"
        assert "dirty" not in measured["commit"]


def test_the_table_of_learning_on_line_is_that_of_its_result_file():
    measured = json.loads((RESULTS / "online-speed.json").read_text())
    mark, text = "<!-- report:speed-online", page("speed.md")
    assert f"{mark}:begin -->\n{speed_online.table(measured)}\n{mark}:end -->" in text
    assert "dirty" not in measured["commit"] and {row["algo"] for row in measured["results"]} == set(speed_online.ALGOS)
    rates = {row["algo"]: row["updates_per_second"] for row in measured["results"]}
    ratios = {algo: rate["online"][0] / rate["data"][0] for algo, rate in rates.items()}
    assert {algo for algo, ratio in ratios.items() if not 0.85 < ratio < 1.15} == {"wsrl", "rlpd"}
    assert ratios["rlpd"] < 1 < ratios["wsrl"] and "in eight of the ten files" in text
    [again] = json.loads((RESULTS / "online-speed-rlpd.json").read_text())["results"]
    rates = [speed_online.spread(again["updates_per_second"][where]) for where in ("data", "online")]
    data, online = (rate.replace(" (", " {} (", 1) for rate in rates)
    said = f"gave {data.format('updates/s on the data')} and {online.format('on-line')}"
    assert again["algo"] == "rlpd" and said in " ".join(text.split())
    simulator = [100 * share["simulator"] for row in measured["results"] for share in row["share"]]
    assert f"{min(simulator):.0f} to {max(simulator):.0f} % of it" in " ".join(text.split())


def test_the_table_of_acting_is_that_of_its_result_file():
    measured, mark = json.loads((RESULTS / "act-speed.json").read_text()), "<!-- report:speed-act"
    assert "dirty" not in measured["commit"]
    assert {row["algo"] for row in measured["results"]} == set(speed_act.ALGOS)
    text = " ".join(page("speed.md").split())
    assert f"{mark}:begin -->\n{speed_act.table(measured)}\n{mark}:end -->" in page("speed.md")
    times = {(x["algo"], x["protocol"], x["environments"]): np.array(x["milliseconds"]) for x in measured["results"]}
    full = {algo: np.median(times[algo, "full", 1]) for algo in speed_act.ALGOS}
    assert max(full, key=full.get) == "idql" and f"takes {full['idql']:.1f} ms" in text
    assert f"it takes {np.median(times['idql', 'full', 160]) / 1000:.1f} s for each step" in text
    ratio = np.median(times["fql", "full", 1] / times["iql", "full", 1])
    assert f"call takes {ratio:.1f} times as long as IQL's" in text


@pytest.mark.parametrize("file", ["speed-ensembles-cpu", "speed-ensembles-small-cpu"])
def test_costs_per_critic_are_those_of_the_result_files(file):
    """Milliseconds of an update / critics, in the order of their number: 'a, b, c, d (SAC-N) and e, f, g, h (EDAC)'."""
    shown = {}
    for row in json.loads((RESULTS / f"{file}.json").read_text())["results"]:
        milliseconds = 1000 / statistics.median(row["updates_per_second"]) / row["setting"]["num_critics"]
        shown.setdefault(row["algo"], []).append(f"{milliseconds:.2g}")
    sac_n, edac = ", ".join(shown["sac_n"]), ", ".join(shown["edac"])
    assert f"{sac_n} (SAC-N) and {edac} (EDAC)" in " ".join(page("speed.md").split())


MAZE = "pointmaze-umaze-v0"
HOPPER = ["hopper-medium-expert-100k-v0", "hopper-medium-replay-100k-v0"]
NAIVE = ("ddpg", "td3", "sac", "qt_opt", "mpo")


@pytest.fixture(scope="module")
def quick():
    """{(dataset, method): run} of the quick protocol."""
    return {tuple(run.place.split("/")): run for run in read_runs(RESULTS / "quick")}


def test_numbers_of_the_scores_page_are_those_of_the_result_files(quick):
    text = page("quick.md").partition("## What the gaps")[2].partition("\n## ")[0]
    means = {f"{run.scores.mean():.1f}" for run in quick.values()}
    assert set(re.findall(r"(?<![\d.])-?\d+\.\d(?!\d)", text)) <= means


def test_what_the_scores_page_says_of_imitation_and_of_naive_methods(quick):
    assert all(quick[MAZE, method].scores.mean() < 30 for method in ("bc", "bc-top-10", "marwil", "awr", "dt"))
    assert all(quick[dataset, method].scores.mean() < 7 for dataset in HOPPER for method in NAIVE)
    assert all(quick[MAZE, method].scores.max() == 0 for method in NAIVE)
    perfect = {method for (dataset, method), run in quick.items() if dataset == MAZE and run.scores.min() == 100}
    assert len(perfect - {"emrl"}) == 14  # EMRL bootstraps nothing
    for dataset in HOPPER:
        assert quick[dataset, "bc-top-10"].scores.min() > quick[dataset, "bc"].scores.max()


def test_what_the_scores_page_says_of_people():
    runs = {run.place.split("/")[1]: run for run in read_runs(RESULTS / "people")}
    text = page("scores.md").partition("### What an argmax makes of people")[2].partition("\n## ")[0]
    card = (ROOT / "benchmarks" / "cards" / "overcooked-cramped-room-human-v0.md").read_text()
    shares = re.search(r"In ([\d.]+)% of the steps both stay where they are, and a person does so in ([\d.]+)%", card)
    said = {*shares.groups(), *(f"{run.scores.mean():.1f}" for run in runs.values()), "6.7"}
    assert set(re.findall(r"(?<![\d.])-?\d+\.\d(?!\d)", text)) <= said and f"{shares[1]} %" in text
    assert runs["bc"].scores.max() == runs["iql"].scores.max() == 0 and runs["bc-sample"].scores.min() > 10
    cloning = " ".join((ROOT / "algos" / "bc.md").read_text().split())
    drawn = runs["bc-sample"].scores.mean()
    assert f"scores 0.0, where a draw from the same clone (`--act sample`) scores {drawn:.1f}." in cloning
    assert f"as it was with people: {drawn:.1f}." in " ".join(text.split())
    lines = [
        (RESULTS / "people" / runs[name].place / "metrics.jsonl").read_text().splitlines()
        for name in ("bc", "bc-sample")
    ]
    losses = [[json.loads(line)["actor_loss"] for line in of_one] for of_one in lines]
    assert losses[0] == losses[1]


def test_what_the_scores_page_says_of_goals():
    runs = {tuple(run.place.split("/")): run for run in read_runs(RESULTS / "goals")}
    text = page("scores.md").partition("### What a few updates show")[2].partition("\n## ")[0]
    means = {f"{run.scores.mean():.1f}" for run in runs.values()}
    assert set(re.findall(r"(?<![\d.])-?\d+\.\d(?!\d)", text)) <= means
    stitch = {method: run for (dataset, method), run in runs.items() if "-stitch-" in dataset}
    assert all(stitch[method].scores.min() > stitch["gcbc"].scores.max() for method in ("hiql", "qrl"))
    navigate = {method: run for (dataset, method), run in runs.items() if "-navigate-" in dataset}
    assert all(navigate[method].scores.min() > navigate["gcbc"].scores.max() for method in ("hiql", "qrl", "gcivl"))
    published = ["hiql", "qrl", "gcivl", "gciql", "crl", "gcbc"]
    assert sorted(published, key=lambda method: -navigate[method].scores.mean()) == published
    assert all(run["actionable_models"].scores.max() == 0 for run in (stitch, navigate))
    arm = {method: run.scores for (dataset, method), run in runs.items() if dataset.startswith("cube")}
    assert [method for method in arm if arm[method].max() > 0] == ["hiql"]
    assert stitch["crl"].scores.mean() < stitch["gcbc"].scores.mean() and stitch["gciql"].scores.max() == 0
    logs = {}
    for method, name, sign in (("gciql", "log_prob", 1), ("gcbc", "actor_loss", -1)):
        path = RESULTS / "goals" / stitch[method].place / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        logs[method] = sign * np.mean([line[name] for line in lines if line["step"] == lines[-1]["step"]])
    ratio = (logs["gciql"] + np.log(2 * np.pi)) / (logs["gcbc"] + np.log(2 * np.pi))
    text = (ROOT / "algos" / "gciql.md").read_text().rpartition("report:goals:end")[2]
    assert all(f"−{-x:.2f}" in text for x in logs.values()) and f"{ratio:.1f} times" in text
    tasks = np.array([np.mean(run.summary["success_per_task"], axis=0) for run in stitch.values()])
    assert np.all(tasks[:, 2] == 0)


@pytest.mark.parametrize(
    "method, baseline, dataset, margin",
    [("cql_discrete", "dqn", "cartpole-mixed-v0", 40), *(("cql", "sac", dataset, 20) for dataset in [*HOPPER, MAZE])],
)
def test_the_conservative_term_beats_what_it_is_added_to(quick, method, baseline, dataset, margin):
    """The worst seed of CQL is above the best one of SAC or DQN, by so many points of the score."""
    assert quick[dataset, method].scores.min() >= quick[dataset, baseline].scores.max() + margin


@pytest.mark.parametrize("dataset", HOPPER)
def test_diverse_critics_believe_less_but_small_ensembles_do_not_reach_cloning(quick, dataset):
    """EDAC's page: five diverse critics believe a small multiple of what is true, ten plain ones 60 to 300 times it."""
    believed, true = (
        np.array([quick[dataset, m].values.mean(axis=0) for m in ("edac", "sac_n")])[:, i] for i in (0, 1)
    )
    assert believed[0] <= 3 * true[0] and believed[1] >= 60 * true[1]
    assert all(quick[dataset, m].scores.max() < quick[dataset, "bc"].scores.min() for m in ("edac", "sac_n"))


def test_what_cqls_page_says_of_medium_expert(quick):
    text = " ".join((ROOT / "algos" / "cql.md").read_text().split())
    run, bc = (quick[HOPPER[0], method] for method in ("cql", "bc"))
    lines = (RESULTS / "quick" / HOPPER[0] / "cql" / "metrics.jsonl").read_text().splitlines()
    first = np.mean([line["score"] for line in map(json.loads, lines) if line["step"] == 2000])
    last = run.scores.mean()
    assert f"({last:.1f} and {bc.scores.mean():.1f})" in text
    assert f"from {first:.1f} after 2,000 updates to {last:.1f} after 6,000" in text
    (weight_5,) = (run for run in read_runs(RESULTS / "trials" / "weight-5") if run.place == f"{HOPPER[0]}/cql")
    assert f"({', '.join(f'{score:.1f}' for score in weight_5.scores)})" in text


def test_what_the_pages_say_of_policies_that_train_in_a_model(quick):
    """Means of scores over the seeds, and ranges of the last evaluation's metrics."""
    names = ("mbpo", "mopo", "combo", "morel")
    others = ("mbpo", "mopo", "morel", "rambo", "mobile")
    texts = {name: " ".join((ROOT / "algos" / f"{name}.md").read_text().split()) for name in names}
    for name in (*names, "rambo", "mobile"):
        assert quick[HOPPER[1], name].scores.max() < quick[HOPPER[1], "bc"].scores.min()
    assert all(quick[MAZE, name].scores.max() == 0 for name in others)
    assert all(quick[HOPPER[0], name].scores.max() < quick[HOPPER[0], "bc"].scores.min() for name in others)
    means = {name: quick[HOPPER[0], name].scores.mean() for name in (*others, "combo", "bc")}
    low, high = min(means[name] for name in others), max(means[name] for name in others)
    says = f"{means['combo']:.1f} on hopper-medium-expert, where the others are between {low:.1f} and {high:.1f}"
    assert says in texts["mbpo"]
    assert f"COMBO has {means['combo']:.1f}, and [cloning](bc.md) {means['bc']:.1f}" in texts["combo"]
    scores = " ".join((ROOT / "benchmarks" / "quick.md").read_text().split())
    shown = {"mopo": "MOPO", "mbpo": "MBPO", "rambo": "RAMBO", "mobile": "MOBILE", "morel": "MOReL"}
    assert all(f"{title} ({means[name]:.1f})" in scores for name, title in shown.items())
    models = {(run.dataset, run.method): run.scores for run in read_runs(RESULTS / "models")}
    cloning = {dataset: scores.mean() for (dataset, name), scores in models.items() if name == "bc"}
    assert all(scores.mean() < cloning[dataset] for (dataset, name), scores in models.items() if name != "bc")
    walker = "stitch/walker2d-medium-replay-100k-v0"
    assert all(models[walker, name].max() > models[walker, "bc"].min() for name in ("combo", "mobile"))
    lines = (RESULTS / "models" / walker.removeprefix("stitch/") / "mopo" / "metrics.jsonl").read_text().splitlines()
    ends = [line for line in map(json.loads, lines) if line["step"] == 6000]
    taken = [line["mean_penalty"] for line in ends]
    assert f"takes {min(taken):.1f} to {max(taken):.1f} from" in texts["mopo"]
    assert f"and {np.mean([line['model_reward'] for line in ends]):.1f} is left" in texts["mopo"]
    runs = {name: quick[HOPPER[1], name] for name in (*names, "bc", "cql")}
    mean = {name: f"{run.scores.mean():.1f}" for name, run in runs.items()}
    last = {}
    for name in names:
        lines = (RESULTS / "quick" / HOPPER[1] / name / "metrics.jsonl").read_text().splitlines()
        last[name] = [line for line in map(json.loads, lines) if line["step"] == 6000]

    def range_of(name, metric, form=",.0f", times=1):
        values = [times * line[metric] for line in last[name]]
        return f"{min(values):{form}} to {max(values):{form}}"

    for name in names:
        believed, true = (range_of(name, f"{which}_value") for which in ("believed", "true"))
        assert f"in {believed}" in texts[name] and f"where {true} is true" in texts[name], (name, believed, true)
    says = f"MBPO has {mean['mbpo']}, [COMBO](combo.md) {mean['combo']}, [MOPO](mopo.md) {mean['mopo']} and"
    assert f"{says} [MOReL](morel.md) {mean['morel']}, where [cloning](bc.md) has {mean['bc']}" in texts["mbpo"]
    errors = [line[f"holdout_{which}"] for name in names for line in last[name] for which in ("min", "max")]
    assert f"between {min(errors):.3f} and {max(errors):.3f}" in texts["mbpo"]
    assert all(line["zero_rows"] == 0 for name in names for line in last[name])
    assert f"pays {range_of('mbpo', 'model_reward', '.1f')} on average" in texts["mbpo"]
    assert f"at most {max(line['model_reward'] for line in last['mbpo']) / (1 - 0.99):.0f}" in texts["mbpo"]
    assert f"MOPO has {mean['mopo']}, MBPO {mean['mbpo']} and [cloning](bc.md) {mean['bc']}" in texts["mopo"]
    taken, left = range_of("mopo", "mean_penalty", ".1f"), range_of("mopo", "model_reward", ".1f")
    assert f"takes {taken} from each imagined reward, of which {left} are left" in texts["mopo"]
    assert f"MOReL has {mean['morel']}, more" in texts["morel"] and f"({mean['bc']})" in texts["morel"]
    assert f"only {range_of('morel', 'unknown', '.1f', 100)} %" in texts["morel"]
    assert max(runs[name].scores.max() for name in names) < runs["bc"].scores.min()
    assert runs["morel"].scores.min() > max(runs[name].scores.max() for name in ("mbpo", "mopo", "combo"))
    assert f"COMBO has {mean['combo']}, [MBPO](mbpo.md#results) {mean['mbpo']}" in texts["combo"]
    assert f"ends at {range_of('combo', 'gap')} " in texts["combo"] and f"here, and {mean['cql']}." in texts["combo"]


def test_trials_on_the_pages_are_those_of_the_result_files():
    """A page's cell [SCORE, believes B, true T](.../trials/...): means over the seeds of the last evaluation."""
    runs = {run.place: run for run in read_runs(RESULTS / "trials")}
    cells = [
        cell
        for path in (ROOT / "algos").glob("*.md")
        for cell in re.findall(r"\[([^]]*)\]\(\.\./benchmarks/results/trials/([^)]*)\)", path.read_text())
    ]
    assert {place for _, place in cells} == runs.keys()  # none is left unshown
    for shown, place in cells:
        run, (believed, true) = runs[place], runs[place].values.mean(axis=0)
        score = f"{run.scores.mean():.1f}"
        assert shown == f"{score}, believes {report.number(believed)}, true {report.number(true)}", place
        assert "dirty" not in run.summary["commit"]


def test_what_the_page_on_learning_on_line_says():
    """Means over the seeds at the switch and after 1,000, 5,000 and 20,000 steps."""
    page_text = " ".join(page("online.md").partition("What the gaps are")[2].partition("\n## ")[0].split())
    found = read_runs(RESULTS / "finetune")
    runs = {(run.dataset.split("-")[0].removeprefix("stitch/"), run.method): run for run in found}
    shown = {}
    for key, run in runs.items():
        steps, scores = since_switch(run), run.curve.mean(axis=0)
        shown[key] = {n: f"{scores[list(steps).index(n)]:.1f}" for n in (0, 1000, 5000, 20_000) if n in steps}
    maze = {method: curve for (data, method), curve in shown.items() if data == "pointmaze"}
    hopper = {method: curve for (data, method), curve in shown.items() if data == "hopper"}
    assert maze["awac"][0] == maze["spot"][0] == "0.0" and "which began with 0.0" in page_text
    assert {maze[name][20_000] for name in ("awac", "spot", "iql")} == {"100.0"}
    for name, title in (("cql", "CQL goes"), ("spot", "SPOT"), ("awac", "AWAC")):
        within = " within 5,000 steps" if name == "cql" else ""
        assert f"{title} from {hopper[name][0]} to {hopper[name][5000]}{within}" in page_text
    assert f"IQL falls from {maze['iql'][0]} to {maze['iql'][1000]}" in page_text
    assert f"from {maze['wsrl'][0]} to {maze['wsrl'][1000]}" in page_text
    assert f"IQL has {hopper['iql'][5000]} after 5,000" in page_text
    fell, rose = sorted(runs["hopper", "iql"].scores)[:2], max(runs["hopper", "iql"].scores)
    assert f"fell to {fell[0]:.1f} and {fell[1]:.1f}, and the third rose to {rose:.1f}" in page_text
    cartpole = {method: curve for (data, method), curve in shown.items() if data == "cartpole"}
    assert all(float(x["awac"][5000]) > float(x["iql"][5000]) for x in (maze, hopper, cartpole))
    assert f"{maze['rlpd'][5000]} after 5,000" in page_text and f"({hopper['rlpd'][5000]})" in page_text
    assert f"Cal-QL has {hopper['cal_ql'][0]} at the switch and CQL {hopper['cql'][0]}" in page_text
    folder = RESULTS / "finetune" / "hopper-medium-replay-100k-v0"
    lines = (folder / "cal_ql" / "metrics.jsonl").read_text().splitlines()
    held = [line["held"] for line in map(json.loads, lines) if line["step"] == 1000]
    assert f"{100 * np.mean(held):.0f} % of the policy's proposals" in page_text
    study = " ".join((ROOT / "benchmarks" / "studies" / "README.md").read_text().split())
    lines = (folder / "cql" / "metrics.jsonl").read_text().splitlines()
    first = [line for line in map(json.loads, lines) if line["step"] == 1000]
    believed, true = (np.mean([line[f"{which}_value"] for line in first]) for which in ("believed", "true"))
    assert f"believes {believed:.0f} where {true:.0f} is true. Yet" in study
    scores = [hopper["cql"][n] for n in (0, 1000, 5000)]
    assert "{} at the switch, {} after 1,000 steps and {} after 5,000".format(*scores) in study


# --- Code that runs as it stands -------------------------------------------------------------------------------


def options_of(kind):
    """The options that README has for one kind of rewards."""
    (row,) = [line for line in README.splitlines() if line.startswith(f"| {kind}")]
    return re.search(r"`(--[^`]*)`", row)[1].split()


@pytest.mark.parametrize(
    "kind, protocol, dataset",
    [
        ("1 at a goal, else 0", None, ""),
        ("−1 at each step", "full", "stitch/puzzle-3x3-play-v0"),
        ("dense: a reward", "full", "stitch/hopper-medium-v0"),
        ("dense, and only", "quick", "stitch/hopper-medium-replay-100k-v0"),
        ("1 at each step", "quick", "stitch/cartpole-mixed-v0"),
    ],
)
def test_settings_by_kind_of_task_are_those_of_the_protocols(kind, protocol, dataset):
    """What differs from the defaults, but for the published step sizes, which all of `full` has."""
    iql = importlib.import_module("algos.iql")
    expected = iql.Config()
    if protocol:
        settings = sweep.tuned(PROTOCOLS[protocol], "iql", dataset)
        if kind.startswith("−1"):
            settings = {"reward_shift": settings["reward_shift"]}
        expected = iql.Config(**settings)
    assert tyro.cli(iql.Config, args=options_of(kind)) == expected


def python_block(containing):
    (block,) = [x for x in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if containing in x]
    return block


def test_every_block_of_python_is_run_below():
    assert README.count("```python") == len(
        {python_block(x) for x in ("EpisodeBuffer", "eval_tasks", "restore", "pandas")}
    )


def recorded():
    """What a reader may have: random episodes of Pendulum-v1."""
    env, recording = gymnasium.make("Pendulum-v1", max_episode_steps=20), []
    env.action_space.seed(0)
    for seed in range(5):
        episode = {"observations": [env.reset(seed=seed)[0]]}
        while not episode.get("truncations", [False])[-1]:
            action = env.action_space.sample()
            observation, *rest = env.step(action)
            episode["observations"].append(observation)
            for name, x in zip(("actions", "rewards", "terminations", "truncations"), (action, *rest), strict=False):
                episode.setdefault(name, []).append(x)
        recording.append({name: np.array(column) for name, column in episode.items()})
    return recording


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder for runs, and README's own dataset in a Minari root of its own."""
    folder = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        exec(python_block("EpisodeBuffer"), {"recording": recorded()})
        yield folder


def test_own_data_are_read_as_they_were_recorded(own_data):
    from common.datasets import load_dataset

    data, env = load_dataset("mine/pendulum-v0")
    recording = recorded()
    np.testing.assert_array_equal(data.obs, np.concatenate([x["observations"][:-1] for x in recording]))
    np.testing.assert_array_equal(data.next_obs, np.concatenate([x["observations"][1:] for x in recording]))
    np.testing.assert_allclose(data.action, np.concatenate([x["actions"] for x in recording]) / 2, atol=1e-6)
    assert data.terminal.sum() == 0 and env.score_kind == "raw return"


def test_own_data_for_goals_have_the_tasks_that_are_named(own_data):
    from common.datasets import load_dataset

    exec(python_block("EpisodeBuffer").replace("mine/pendulum-v0", "mine/robot-v0"), {"recording": recorded()})
    exec(python_block("eval_tasks"), {})
    data, env = load_dataset("mine/robot-v0", goals=True)
    assert env.tasks == [{"task_id": 1}, {"task_id": 2}] and env.spec.goal_dim == data.obs.shape[1] == 3
    assert not env.probe() and 'looked for in info["goal"]' in env.score_kind  # Pendulum's reset gives none


@pytest.fixture(scope="module")
def own_run(own_data):
    """IQL with README's settings for dense rewards, in the folder of which README's other blocks speak."""
    iql = importlib.import_module("algos.iql")
    folder = own_data / re.search(r'restore\("([^"]*)"\)', README)[1]
    tiny = [f"--{item.replace('_', '-')}" for item in TINY]
    options = ["--dataset", "mine/pendulum-v0", "--out", str(folder), *options_of("dense: a reward"), *tiny]
    iql.main(tyro.cli(iql.Config, args=[*options, "--hidden", "8", "8"]))
    return folder


def test_a_trained_policy_acts_in_three_lines_without_its_dataset(own_run, own_data, monkeypatch):
    monkeypatch.chdir(own_data)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(own_data / "none"))
    env = gymnasium.make("Pendulum-v1")
    names = {"env": env, "observation": env.reset(seed=0)[0]}
    exec(python_block("restore"), names)
    assert np.shape(names["observation"]) == (3,) and np.isfinite(names["reward"]) and not names["terminated"]
    batch = names["policy"](np.zeros((4, 3), np.float32))
    assert batch.shape == (4, 1) and np.abs(batch).max() <= 2
    other = names["restore"]("runs/iql/stitch/pointmaze-umaze-v0", run=1)  # README's "the second of the folder's seeds"
    assert other.runs[0]["seed"] == 1 and not np.array_equal(other(np.zeros((4, 3), np.float32)), batch)


def test_metrics_in_three_lines_of_pandas(own_run, own_data, monkeypatch, capsys):
    pytest.importorskip("pandas")
    monkeypatch.chdir(own_data)
    names = {}
    exec(python_block("pandas"), names)
    assert capsys.readouterr().out.split()[:3] == ["seed", "0", "1"]
    metrics = names["metrics"]
    assert list(metrics["step"]) == [10, 10, 20, 20] and metrics["score"].notna().all()
    assert {"believed_value", "true_value"} <= set(metrics.columns)


def test_the_example_of_a_sweep_ends_in_its_best_value(own_data):
    """On our own small dataset, with tiny networks: two cells of three values."""
    block = page("protocols.md").partition("## Sweeps\n")[2]
    train, answer = itertools.islice(commands(block), 2)
    small = [item for item in TINY if not item.startswith("batch_size")] + ["hidden=[8,8]", "reward_shift=0"]
    train[train.index("--set") + 1 : train.index("--set") + 1] = small
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in ([*train, "--datasets", "mine/pendulum-v0"], answer):
        command = [sys.executable, str(ROOT / command[1]), *command[2:]]
        done = subprocess.run(command, cwd=own_data, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "iql on mine/pendulum-v0: best of 6 is " in done.stdout
    text = (own_data / "results" / "mine" / "report.md").read_text()
    assert "| beta | batch_size | score |" in text or "| batch_size | beta | score |" in text
    assert list((own_data / "results" / "mine").glob("sweep_*.png"))


@pytest.mark.parametrize("episodes, runs", [(0, False), (1, True)])
def test_without_evaluations_nothing_that_the_metadata_name_is_run(own_data, tmp_path, monkeypatch, episodes, runs):
    """README's advice on data of strangers. The environment of this dataset is `os.mkdir`: with 1 it is run."""
    iql = importlib.import_module("algos.iql")
    shutil.copytree(own_data / "minari", tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    metadata = tmp_path / "minari" / "mine" / "pendulum-v0" / "data" / "metadata.json"
    content = json.loads(metadata.read_text())
    hostile = {"entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "was-run")}}
    content["eval_env_spec"] = json.dumps(json.loads(content["eval_env_spec"]) | hostile)
    metadata.write_text(json.dumps(content))
    tiny = [f"--{item.replace('_', '-')}" for item in TINY]
    options = ["--dataset", "mine/pendulum-v0", "--out", str(tmp_path / "run"), *tiny, "--hidden", "8", "8"]
    summary = iql.main(tyro.cli(iql.Config, args=[*options, f"--eval-episodes={episodes}"]))
    assert summary["score_mean"] is None and (tmp_path / "was-run").exists() == runs
    assert "`--eval-episodes 0`: then no environment is made" in " ".join(README.split())


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy of the project in which README's steps to fork a file were taken, but for their last, the tests."""
    folder = tmp_path_factory.mktemp("fork")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=folder, check=True)
    steps = list(commands(README.partition("## Fork a file\n")[2].partition("\n## ")[0]))
    assert [step[0] for step in steps] == ["cp", "sed", "pytest"]
    subprocess.run(steps[0], cwd=folder, check=True)
    source, target = steps[1][:3], steps[1][-1]  # > target
    (folder / target).write_text(subprocess.run(source, cwd=folder, check=True, capture_output=True, text=True).stdout)
    return folder


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="the list of files is git's")
def test_a_forked_file_leaves_the_tests_green(fork):
    """Those that look at all files of algos/; the contract tests of what a page and a text must have."""
    environment = os.environ | {"PYTHONPATH": str(fork)}
    environment.pop("PYTEST_CURRENT_TEST", None)
    choice = "mine and (page or shared or sibling or docstring or comment or links)"
    choice += " or every_algorithm or protocols_have or committed_tables or trials_on or are_complete"
    files = [f"tests/test_{name}.py" for name in ("contract", "readme", "sweep", "report", "kernels")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", choice, *files]
    done = subprocess.run(command, cwd=fork, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
