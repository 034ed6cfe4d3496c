"""Datasets that can be built on any machine, without a download: `build("stitch/pointmaze-umaze-v0")`.

A recipe writes a Minari dataset of a number of transitions into a folder. Its name stands for its usual size; another
size is written before the version: "stitch/pointmaze-umaze-20k-v0", "stitch/hopper-medium-1m-v0".
Importing this package imports no simulator: the recipes do, when they are called.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common.recipes import (
    adroit,
    atari,
    cartpole,
    driving,
    locomotion,
    locomotion_sac,
    manipulation,
    minatar,
    ogbench_maze,
    open_bandit,
    overcooked,
    pointmaze,
    sepsis,
    traffic,
)


class Recipe(NamedTuple):
    write: Callable[[str, Path, int], None]  # (dataset_id, data_path, num_transitions)
    num_transitions: int  # of the dataset whose name has no size


RECIPES: dict[str, Recipe] = {
    "stitch/pointmaze-umaze-v0": Recipe(pointmaze.umaze_stitch, 50_000),
    "stitch/pointmaze-umaze-navigate-v0": Recipe(pointmaze.umaze_navigate, 50_000),
    "stitch/pointmaze-medium-stitch-v0": Recipe(pointmaze.medium_stitch, 500_000),
    "stitch/pointmaze-medium-navigate-v0": Recipe(pointmaze.medium_navigate, 500_000),
    "stitch/pointmaze-large-stitch-v0": Recipe(pointmaze.large_stitch, 1_000_000),
    "stitch/pointmaze-large-navigate-v0": Recipe(pointmaze.large_navigate, 1_000_000),
    "stitch/icu-sepsis-v0": Recipe(sepsis.icu_sepsis, 30_000),
    "stitch/cartpole-random-v0": Recipe(cartpole.random, 50_000),
    "stitch/cartpole-medium-v0": Recipe(cartpole.medium, 50_000),
    "stitch/cartpole-mixed-v0": Recipe(cartpole.mixed, 50_000),
    "stitch/minatar-breakout-mixed-v0": Recipe(functools.partial(minatar.mixed, "breakout"), 100_000),
    "stitch/minatar-space-invaders-mixed-v0": Recipe(functools.partial(minatar.mixed, "space_invaders"), 100_000),
    "stitch/atari-pong-scripted-v0": Recipe(atari.scripted, 50_000),
    **{
        f"stitch/traffic-single-{quality}-v0": Recipe(functools.partial(traffic.write, quality), 30_000)
        for quality in traffic.QUALITIES
    },
    **{
        f"stitch/driving-highway-{quality}-v0": Recipe(functools.partial(driving.write, quality), 10_000)
        for quality in driving.QUALITIES
    },
    **{
        f"stitch/{task}-{quality}-v0": Recipe(functools.partial(locomotion.write, task, quality), 1_000_000)
        for task in locomotion.TASKS
        for quality in locomotion.QUALITIES
    },
    **{
        f"stitch/{task}-{quality}-v{version}": Recipe(
            functools.partial(locomotion_sac.write, task, version, quality), 1_000_000
        )
        for task, version in locomotion_sac.VERSIONS
        for quality in locomotion_sac.qualities(task, version)
    },
    **{
        f"stitch/open-bandit-{log}-{campaign}-v0": Recipe(functools.partial(open_bandit.write, log, campaign), 10_000)
        for log in ("random", "bts")
        for campaign in open_bandit.CAMPAIGNS
    },
    **{
        f"stitch/overcooked-{name}-human-v0": Recipe(functools.partial(overcooked.write, name), kitchen.num_steps)
        for name, kitchen in overcooked.KITCHENS.items()
    },
    **{
        f"stitch/{task}-play-v0": Recipe(functools.partial(manipulation.write, task), 1_000_000)
        for task in manipulation.TASKS
    },
    **{
        f"stitch/adroit-{task}-{quality}-v0": Recipe(
            functools.partial(adroit.write, task, quality), adroit.TASKS[task].num_transitions
        )
        for task in adroit.TASKS
        for quality in adroit.QUALITIES
    },
    # Reward-free, for policies of goals
    **{
        f"stitch/{task}-play-goals-v0": Recipe(functools.partial(manipulation.write_goals, task), 1_000_000)
        for task in manipulation.TASKS
    },
    **{
        f"stitch/pointmaze-{maze}-{kind}-goals-v0": Recipe(functools.partial(pointmaze.write_goals, maze, kind), size)
        for maze, size in (("umaze", 50_000), ("medium", 500_000), ("large", 1_000_000))
        for kind in ("stitch", "navigate")
    },
    **{
        f"stitch/ogbench-pointmaze-{maze}-{kind}-v0": Recipe(
            functools.partial(ogbench_maze.write, maze, kind), ogbench_maze.size(maze, kind)
        )
        for maze in ogbench_maze.MAZES
        for kind in ogbench_maze.NOISE_STD
    },
}


def find(dataset_id: str) -> Recipe | None:
    """The recipe of a name, with the number of transitions that the name asks for; None where there is no recipe."""
    size = re.search(r"-([1-9]\d*)(k|m)(?=-v\d+$)", dataset_id)
    if not size:
        return RECIPES.get(dataset_id)
    recipe = RECIPES.get(dataset_id.replace(size[0], ""))
    return recipe and recipe._replace(num_transitions=int(size[1]) * {"k": 1_000, "m": 1_000_000}[size[2]])


def not_yet(dataset_id: str) -> str | None:
    """One sentence about a name whose recipe waits for its trained policy; None about every other name."""
    name = re.fullmatch(r"stitch/([a-z0-9]+)-([a-z-]+?)(-[1-9]\d*[km])?-v([1-9])", dataset_id)
    if not name or (name[1], int(name[4])) not in locomotion_sac.VERSIONS:
        return None
    if name[2] not in locomotion_sac.QUALITIES or find(dataset_id):
        return None
    missing = "the expert policy" if locomotion_sac.qualities(name[1], int(name[4])) else "the policies"
    return (
        f"{dataset_id} needs {missing} that SAC trained on {name[1]}, which this version does not have yet: "
        f"use {dataset_id.removesuffix(name[4])}0, of weaker policies."
    )


def build(dataset_id: str) -> None:
    """Builds a dataset in Minari's root folder (`MINARI_DATASETS_PATH`); does nothing where it exists already.

    The dataset is written in a hidden folder, which Minari does not list, and renamed into place: a build that is
    killed leaves no half-written dataset, and two builds at once both succeed. Hidden folders of a day ago are those of
    killed builds, and are removed.
    """
    recipe = find(dataset_id)
    if recipe is None:
        if sentence := not_yet(dataset_id):
            raise ValueError(sentence)
        raise ValueError(f"No recipe builds '{dataset_id}'. These can be built: {', '.join(sorted(RECIPES))}.")
    from minari.storage import get_dataset_path

    target = get_dataset_path(dataset_id)
    if _is_complete(target):
        return
    for left in get_dataset_path().glob(".building-*"):
        with contextlib.suppress(OSError):  # another build may remove it at the same time
            if left.stat().st_mtime < time.time() - 86_400:
                shutil.rmtree(left)
    # The hidden folder is in Minari's root, because a rename is atomic only within a file system.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=get_dataset_path()) as tmp:
        dataset = Path(tmp) / "dataset"  # a folder of its own: that of tempfile is closed to other users
        dataset.mkdir()
        recipe.write(dataset_id, dataset / "data", recipe.num_transitions)
        target.parent.mkdir(parents=True, exist_ok=True)
        namespace = Path(tmp) / "namespace_metadata.json"  # Minari lists a namespace only where this file exists
        namespace.write_text(json.dumps({"description": "Built by common/recipes of Stitch."}))
        if not (target.parent / namespace.name).exists():
            os.replace(namespace, target.parent / namespace.name)
        try:
            os.rename(dataset, target)
        except OSError:
            if not _is_complete(target):  # else another process has built it meanwhile, from the same seed
                raise


def _is_complete(dataset: Path) -> bool:
    return (dataset / "data" / "metadata.json").exists()
