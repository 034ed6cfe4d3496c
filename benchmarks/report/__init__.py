"""From result files to what people read.

    python benchmarks/report.py quick                     # tables into README.md and algos/*.md, and pictures
    python benchmarks/report.py quick --check             # status 1 if those are not of the result files as they are
    python benchmarks/report.py results/mine              # of any folder of runs: report.md and pictures in it
    python benchmarks/report.py --selection runs/grid/*   # how good is the policy that few episodes would choose?
    python benchmarks/report.py --cards stitch/pointmaze-umaze-v0

Tables     The run folders in benchmarks/results/PROTOCOL, as benchmarks/sweep.py leaves them: a row for each method, a
           column for each dataset, and the interquartile mean (IQM) of all. They go between the marks
           `<!-- report:PROTOCOL:begin -->` and `<!-- report:PROTOCOL:end -->`: of README.md the whole table, of a page
           algos/x.md the rows of that algorithm, and what its critic believes beside what is true. Runs that differ in
           their seeds alone share a row, in whatever folders below that one they are. Between the marks
           report:speed:NAME of README.md goes the table of benchmarks/results/speed-NAME.json.
Sweeps     Where a folder of runs has several values of a setting: a table and a picture of the score at each of them,
           the best value, and which others cannot be told from it.
Published  Scores of benchmarks/published.toml, beside ours on the datasets that it names and on no other.
Pictures   Learning curves of each dataset; IQM, performance profiles and probability of improvement, as in Agarwal et
           al. (2021), https://arxiv.org/abs/2108.13264
Intervals  95 %, percentiles of a bootstrap over seeds, stratified by dataset. Estimators and intervals are rliable's;
           rliable 1.2.0 itself fails on import beside pandas 3 and takes no seed. Here equal files give equal bytes.
           With few seeds they are too narrow: of three, the interval of a mean is from the lowest to the highest, and
           those are on both sides of the true mean in three of four cases.
Selection  Of policies trained over a set of hyper-parameters, by a UCB bandit, as in Jackson et al. (2025),
           https://arxiv.org/abs/2504.11453, except that no episode both chooses a policy and scores it. Beside it, what
           needs no episode: which evaluation of a run to take (the last; the peak of the data's Q, as Kumar et al.,
           2021, https://arxiv.org/abs/2109.10813; the highest believed value), and which policy, by the estimates that
           benchmarks/ope.py left beside these folders.
Cards      benchmarks/cards/DATASET.md and its histogram of returns, from the dataset in Minari's folder, and the list
           of all cards in their README.md.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import tyro
from plot import STYLE  # benchmarks/plot.py; it chooses a backend that needs no display

from report.cards import write_card
from report.pictures import draw, stale_pictures
from report.rules import report_choices, report_stopping
from report.runs import read_results, read_runs, short  # noqa: F401  (read_runs, short: for benchmarks/studies)
from report.selection import report_selection
from report.sweeps import sentence
from report.tables import marked, number, over_estimation, write_own, write_tables  # noqa: F401  (likewise)

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Options:
    protocol: Annotated[str, tyro.conf.Positional] = "quick"  # folder in benchmarks/results, or any folder of runs
    check: bool = False  # write nothing; fail where a table or a picture is not of the result files as they are
    selection: tuple[Path, ...] = ()  # run folders over hyper-parameters, of any algorithms and datasets
    candidates: int = 8  # --selection: policies to choose from, drawn from all that were trained
    cards: tuple[str, ...] = ()  # datasets in Minari's folder
    out: Path | None = None  # of --selection and --cards; by default beside those runs, and benchmarks/cards


def main(options: Options):
    plt.rcParams.update(STYLE)
    if options.candidates < 1:
        raise SystemExit(f"--candidates must be at least 1, not {options.candidates}.")
    if options.selection:
        found = report_selection(options.selection, options.candidates, options.out)
        report_stopping(found)
        report_choices(found)
    for dataset_id in options.cards:
        write_card(dataset_id, options.out or ROOT / "benchmarks" / "cards")
    if options.selection or options.cards:
        return
    results = ROOT / "benchmarks" / "results"
    protocols = tomllib.loads((Path(__file__).parents[1] / "protocols.toml").read_text())
    folder = results / options.protocol
    folder = folder if folder.is_dir() else Path(options.protocol)
    if not folder.is_dir():
        is_protocol = options.protocol in protocols
        there = sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
        advice = f"python benchmarks/sweep.py {folder} makes it" if is_protocol else f"or one of {', '.join(there)}"
        raise SystemExit(f"{folder} is no folder: name one that holds runs, {advice}.")
    found = read_results(folder)
    for sweep in found.sweeps:
        print(sentence(sweep))
    committed = folder.resolve().parent == results.resolve()
    if committed and (folder.name in protocols or marked(ROOT, folder.name)):
        found = found._replace(sweeps=[])  # no page shows one
        stale = write_tables(ROOT, folder.name, found.runs, found.failures, options.check)
    else:
        stale = write_own(ROOT, folder, found, options.check)
    if options.check:
        stale += stale_pictures(found, folder)
    else:
        draw(found, folder)
    if options.check and stale:
        raise SystemExit(f"{', '.join(stale)}: not as the result files. Run benchmarks/report.py {options.protocol}.")
