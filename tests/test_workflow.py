"""benchmarks/workflow.md and ope.md: their commands run as they stand, and their numbers are those of result files."""

import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pytest
import tyro

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import ope  # noqa: E402
import report  # noqa: E402
from report import rules  # noqa: E402
from report.runs import read_run  # noqa: E402
from test_readme import commands  # noqa: E402

PAGE = (ROOT / "benchmarks" / "workflow.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"
SMALL = {"bc.py": "--num-updates 20 --eval-interval 20 --log-interval 10 --batch-size 16 --num-seeds 2 --hidden 4"}
SMALL["ope.py"] = "--num-updates 10 --hidden 4 --estimators fqe importance_sampling --resamples 10"
FIELDS = {"num_updates": "20", "eval_interval": "20", "hidden": "[4]"}


def small(words):
    """A command of the page with small numbers, on a thirtieth of the data: the later value of an option counts."""
    words = [word.replace("stitch/icu-sepsis-v0", "stitch/icu-sepsis-1k-v0") for word in words]
    words = [word.replace("/icu-sepsis-v0", "/icu-sepsis-1k-v0") for word in words]
    name = words[1].rpartition("/")[2]
    if name == "sweep.py":
        fields = dict(word.split("=") for word in words if "=" in word)
        at = words.index("--set") + 1
        swept = {"log_interval": "10", "num_seeds": "2", "batch_size": "16", "beta": "3,30"}
        words[at : at + len(fields)] = [f"{key}={value}" for key, value in (fields | FIELDS | swept).items()]
    return words[1:] + SMALL.get(name, "").split()


def test_the_commands_of_the_page_lead_from_logs_to_a_choice(tmp_path, monkeypatch, capsys):
    pytest.importorskip("icu_sepsis")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setitem(report.STYLE, "figure.dpi", 20)
    found = [words for words in commands(PAGE) if words[0] == "python"]
    scripts = [words[1] for words in found]
    assert scripts[:3] == ["benchmarks/report.py", "algos/bc.py", "benchmarks/sweep.py"]
    assert scripts[3:] == ["benchmarks/ope.py", "benchmarks/report.py", "benchmarks/ope.py"]
    from common.datasets import load_dataset

    load_dataset("stitch/icu-sepsis-1k-v0")  # built, as the page's first step finds it
    for words in found:
        script, *options = small(words)
        module = importlib.import_module(script.removesuffix(".py").replace("benchmarks/", "").replace("/", "."))
        kind = getattr(module, "Config", None) or module.Options
        if script == "benchmarks/sweep.py":  # in this process: another one costs ten seconds
            (cell,) = module.make_cells(tyro.cli(kind, args=options), importlib.import_module("tomllib").loads(
                (ROOT / "benchmarks" / "protocols.toml").read_text()))  # fmt: skip
            algo = importlib.import_module(f"algos.{cell.algo}")
            config = {name: tuple(x) if isinstance(x, list) else x for name, x in cell.config.items()}
            algo.main(algo.Config(**config, out=f"runs/workflow/{cell.name}"), cell.grid)
        else:
            module.main(tyro.cli(kind, args=options))
    said = capsys.readouterr().out
    assert "| FQE | " in said and "| WIS | " in said and "true value" in said
    result = json.loads((tmp_path / "runs" / "workflow" / "icu-sepsis-1k-v0-ope" / "ope.json").read_text())
    assert len(result["policies"]) == 2 + 4 and result["measures"]["FQE"]["policies"] == 6


def marked(page, mark):
    text = (ROOT / "benchmarks" / page).read_text()
    return text.partition(f"<!-- {mark}:begin -->\n")[2].partition(f"<!-- {mark}:end -->")[0].rstrip("\n")


OPE = sorted(RESULTS.glob("ope-*.json")) + sorted(RESULTS.glob("workflow-*.json"))


@pytest.mark.parametrize("file", OPE, ids=lambda file: file.stem)
def test_a_committed_result_says_what_made_it_and_its_measures_are_of_its_estimates(file):
    result = json.loads(file.read_text())
    assert "benchmarks/ope.py" in result["command"] and "dirty" not in result["commit"] and result["device"]
    assert len(result["commit"]) >= 7 and result["versions"]["jax"] and not re.search(r'"/\w', file.read_text())
    again = ope.without_nan(ope.judge([p | {"true_value": float(p["true_value"])} for p in result["policies"]]))
    for name, found in result["measures"].items():
        for measure in ope.MEASURES:
            assert found[measure] == pytest.approx(again[name][measure], nan_ok=True), (name, measure)
    assert file.with_suffix(".png").exists()


@pytest.mark.parametrize("file", OPE, ids=lambda file: file.stem)
def test_tables_of_the_pages_are_those_of_the_result_files(file):
    result = json.loads(file.read_text())
    if file.stem.startswith("workflow"):
        assert marked("workflow.md", "workflow") == ope.estimates_table(result)
        return
    assert marked("ope.md", file.stem) == ope.table(result)
    if "returns" in result["policies"][0]:
        assert marked("ope.md", f"choices-{file.stem}") == rules.choices_table(result["policies"])
    text = (ROOT / "benchmarks" / "ope.md").read_text()
    truth = [policy["true_value"] for policy in result["policies"]]
    assert f"from {min(truth):.3f} to {max(truth):.3f}" in text


def test_the_table_of_stopping_rules_is_that_of_the_quick_results():
    folders = sorted(path.parent for path in (RESULTS / "quick").glob("*/*/summary.json"))
    found = [(folder, read_run(folder, folder.parent)) for folder in folders]
    assert marked("ope.md", "report:stopping:quick") == rules.stopping_table(found)


def test_what_the_workflow_says_of_the_choice_is_in_its_result():
    result, text = json.loads((RESULTS / "workflow-icu-sepsis-v0.json").read_text()), " ".join(PAGE.split())
    policies = result["policies"]
    mean = {}
    for name in (None, 3.0, 30.0, 300.0):
        rows = [row for row in policies if row["grid"].get("beta") == name]
        mean[name] = {
            key: np.mean([r["estimates"][key][0] for r in rows]) for key in ("FQE", "ESS", "WIS", "IS", "PDWIS")
        }
        mean[name]["true"] = np.mean([row["true_value"] for row in rows])
        if name:
            mean[name]["own"] = np.mean([row["estimates"]["own Q"][0] for row in rows])
    assert f"{mean[300]['true']:.3f}, where the clone has {mean[None]['true']:.3f}" in text
    assert f"FQE says {mean[300]['FQE']:.3f} for it" in text and f"and {mean[300]['ESS']:.0f} for `beta` 300" in text
    assert 4.5 < (mean[300]["FQE"] - mean[None]["true"]) / (mean[300]["true"] - mean[None]["true"]) < 5.5
    owns = [f"{mean[beta]['own']:.3f}" for beta in (3.0, 30.0, 300.0)]
    assert f"they have {owns[0]}, {owns[1]} and {owns[2]}" in text
    low = [x for row in mean.values() for x in (row["IS"], row["PDWIS"])]
    assert f"say {min(low):.2f} to {max(low):.2f}" in text
    assert f"episodes have {policies[0]['estimates']['constant'][0]:.3f}" in text
    best = max(policies, key=lambda row: row["true_value"])
    assert best is max(policies, key=lambda row: row["estimates"]["FQE"][0])
    errors = {name: result["measures"][name]["absolute error"][0] for name in ("constant", "FQE")}
    assert 0.45 < errors["constant"] / errors["FQE"] < 0.55


def test_what_the_page_says_of_the_pool_on_hopper_is_in_its_result():
    result = json.loads((RESULTS / "ope-hopper-medium-replay-100k-v0.json").read_text())
    text, measures = " ".join((ROOT / "benchmarks" / "ope.md").read_text().split()), result["measures"]
    order = {name: f"{measures[name]['rank correlation'][0]:.2f}" for name in ("WDR", "FQE")}
    assert f"WDR ({order['WDR']}), FQE ({order['FQE']}) and MAGIC rank" in text
    assert f"FQE is wrong by {measures['FQE']['absolute error'][0]:.0f}, more than" in text
    assert measures["constant"]["absolute error"][0] < measures["FQE"]["absolute error"][0]
    number = {name: (ope.held(result["policies"], name), measures[name]["policies"]) for name in measures}
    assert number["FQE"] == (0, 16) and number["DICE"] == (3, 15) and number["model"] == (6, 18)
    assert [number[name][1] for name in ("IS", "PDIS", "DR")] == [3, 1, 0]
    size = [row["estimates"]["ESS"][0] for row in result["policies"] if "ESS" in row["estimates"]]
    assert f"is {min(size):.1f} to {max(size):.1f}, of 1,099 episodes" in text
    bad = [row for row in result["policies"] if row["folder"].startswith("sac")][1:]
    assert [round(row["estimates"]["model"][0]) for row in bad] == [298, 356]
    assert [round(row["true_value"]) for row in bad] == [33, 76]
