"""Writing what a recipe has collected, as a Minari dataset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gymnasium as gym
    from minari.data_collector import EpisodeBuffer


def write(
    dataset_id: str,
    data_path: Path,
    episodes: Iterable[EpisodeBuffer],
    env: gym.Env,
    eval_env: gym.Env,
    reference_scores: tuple[float, float] | None,
    **metadata,
) -> None:
    """Writes `episodes` to the folder `data_path`.

    Args:
      dataset_id: Minari's name of the dataset.
      data_path: a folder that does not exist yet.
      episodes: each of T + 1 observations and T actions, rewards, terminations and truncations.
      env: whose spaces the data have; its `spec` is None where there is no environment.
      eval_env: the task on which policies are evaluated; its spec travels in the file.
      reference_scores: the returns that score 0 and 100, or None.
      **metadata: `algorithm_name`, `code_permalink`, `description` and `requirements` in Minari's sense.
    """
    import minari
    from minari.dataset.minari_storage import MinariStorage

    # The storage and not `minari.create_dataset_from_buffers`, which writes only below MINARI_DATASETS_PATH.
    storage = MinariStorage.new(
        data_path,
        env.observation_space,
        env.action_space,
        env_spec=env.spec,
        data_format="hdf5",
        jpeg_encoding=False,  # else Minari stores images with a loss
    )
    if eval_env.spec:
        metadata["eval_env_spec"] = eval_env.spec.to_json()
    if reference_scores:
        metadata |= dict(zip(("ref_min_score", "ref_max_score"), reference_scores, strict=True))
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "minari_version": minari.__version__,
            "author": {"Stitch"},
            **metadata,
        }
    )
    storage.update_episodes(episodes)
