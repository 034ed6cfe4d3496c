"""Datasets that can be built on any machine, without a download: `build("stitch/pointmaze-umaze-v0")`.

A recipe is a function `(dataset_id, data_path) -> None` that writes a Minari dataset into the folder `data_path`.
Importing this package imports no simulator: the recipes do, when they are called.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from common.recipes import pointmaze

RECIPES: dict[str, Callable[[str, Path], None]] = {
    "stitch/pointmaze-umaze-v0": pointmaze.build_umaze_stitch,
}


def build(dataset_id: str) -> None:
    """Builds a dataset in Minari's root folder (`MINARI_DATASETS_PATH`); does nothing where it exists already.

    The dataset is written in a hidden folder, which Minari does not list, and renamed into place: a build that is
    killed leaves no half-written dataset, and two builds at once both succeed.
    """
    if dataset_id not in RECIPES:
        raise ValueError(f"No recipe builds '{dataset_id}'. These can be built: {', '.join(sorted(RECIPES))}.")
    from minari.storage import get_dataset_path

    target = get_dataset_path(dataset_id)
    if _is_complete(target):
        return
    # The hidden folder is in Minari's root, because a rename is atomic only within a file system.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=get_dataset_path()) as tmp:
        dataset = Path(tmp) / "dataset"  # a folder of its own: that of tempfile is closed to other users
        dataset.mkdir()
        RECIPES[dataset_id](dataset_id, dataset / "data")
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
