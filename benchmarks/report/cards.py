"""Dataset cards: what is in a dataset, from the dataset in Minari's folder."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from plot import COLOURS, save  # benchmarks/plot.py
from sweep import write  # benchmarks/sweep.py

from report.runs import short, spread
from report.tables import fill


def write_card(dataset_id: str, out: Path):
    """DATASET.md and DATASET.png, the histogram of its returns, from the dataset in Minari's folder."""
    import minari

    try:
        dataset = minari.load_dataset(dataset_id)
    except FileNotFoundError as error:
        raise SystemExit(f"{dataset_id} is not in Minari's folder: a run on it builds or downloads it.") from error
    about, name = dataset.storage.metadata, short(dataset_id)
    # Play data go on after a terminal row: it ends an episode only where it is the last one
    episodes = [
        (e.rewards.sum(), len(e.rewards), e.terminations[-1], e.terminations[:-1].sum())
        for e in dataset.iterate_episodes()
    ]
    returns, lengths, terminated, within = map(np.array, zip(*episodes, strict=True))
    quantiles = ", ".join(f"{q:.4g}" for q in np.percentile(returns, [0, 5, 25, 50, 75, 95, 100]))
    low, high = about.get("ref_min_score"), about.get("ref_max_score")
    task = json.loads(about.get("eval_env_spec") or about.get("env_spec") or "null")
    rows = {
        "made by": f"{about.get('algorithm_name', 'not recorded')} ({about.get('code_permalink', 'no link to code')})",
        "size": f"{len(returns):,} episodes, {lengths.sum():,} transitions, {about.get('dataset_size', '?')} MB",
        "episode length": f"{spread(lengths)}, median {np.median(lengths):.0f}",
        "ends": f"{terminated.sum():,} terminated, {(~terminated).sum():,} only cut off",
        **({"terminal rows within episodes": f"{within.sum():,}"} if within.any() else {}),
        "observations": f"`{' '.join(str(dataset.observation_space).split())}`",
        "actions": f"`{' '.join(str(dataset.action_space).split())}`",
        "evaluation": f"`{task['id']}`, {task['max_episode_steps']} steps" if task else "no environment in the file",
        "episode return": f"{returns.mean():.4g} ± {returns.std():.4g} (mean ± standard deviation)",
        "its quantiles": f"{quantiles} (0, 5, 25, 50, 75, 95, 100 %)",
        "reference scores": "none in the file" if low is None else f"return {low:.6g} scores 0, {high:.6g} scores 100",
    }
    lines = [f"# {dataset_id}", "", about.get("description") or "No description.", "", "| | |", "| --- | --- |"]
    lines += [f"| {label} | {value} |" for label, value in rows.items()]
    lines += ["", f"![Histogram of the episodes' returns]({name}.png)", ""]
    out.mkdir(parents=True, exist_ok=True)
    write(out / f"{name}.md", "\n".join(lines))
    print(out / f"{name}.md")
    figure, axes = plt.subplots(figsize=(6, 2.8))
    axes.hist(returns, bins=40, color=COLOURS[0])
    axes.set(title=dataset_id, xlabel="return of an episode", ylabel="episodes")
    save(figure, out / f"{name}.png")
    readme = out / "README.md"
    if readme.exists():
        write(readme, fill(readme.read_text(), "cards", list_of_cards(out), readme))


def list_of_cards(folder: Path) -> str:
    """Markdown: a row for each card in the folder, with what stands in it."""
    lines = ["| dataset | episodes, transitions | episode return |", "| --- | --- | --- |"]
    for card in sorted(folder.glob("*-v*.md")):
        cells = dict(re.findall(r"^\| (size|episode return) \| (.*) \|$", card.read_text(), flags=re.MULTILINE))
        size, returns = cells["size"].rpartition(", ")[0], cells["episode return"].partition(" (")[0]
        lines.append(f"| [{card.stem}]({card.name}) | {size} | {returns} |")
    return "\n".join(lines)
