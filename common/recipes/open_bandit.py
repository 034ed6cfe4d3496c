"""Open Bandit: a week of what an online fashion store recommended, and what was clicked, with the probabilities.

Saito, Aihara, Matsutani & Narita (2021), https://arxiv.org/abs/2008.07146. Each row is one item in one of three
positions of a page, shown to a user. One log is of uniformly random items, the other of Bernoulli Thompson sampling
(BTS), which was updated in the course of the week: its probabilities were logged with each row.

The sample of 10,000 rows of each log lies in the wheel of obp 0.4.1 (Apache-2.0), which is read as it is and is not
installed. An episode is one row: the observation is the position and the user's features, each one-hot, the action is
the item, and the reward is 1 for a click. There is no environment.
"""

from __future__ import annotations

import csv
import io
import types
import zipfile
from pathlib import Path

import numpy as np

from common.recipes import storage

WHEEL = "obp-0.4.1-py3-none-any.whl"
CAMPAIGNS = {"all": 80, "men": 34, "women": 46}  # and their numbers of items
FEATURES = [f"user_feature_{i}" for i in range(4)]


def write(log: str, campaign: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """The first rows of a log ("random" or "bts") of a campaign; users' features have the same layout in both logs."""
    import gymnasium.spaces as spaces
    from minari.data_collector import EpisodeBuffer

    rows = read(log, campaign)
    if num_transitions > len(rows["item"]):
        raise SystemExit(f"{dataset_id}: the sample has {len(rows['item']):,} rows; ask for no more.")
    obs = rows["obs"]
    episodes = [
        EpisodeBuffer(
            id=i,
            observations=obs[[i, i]],
            actions=rows["item"][[i]],
            rewards=rows["click"][[i]],
            terminations=np.array([True]),
            truncations=np.array([False]),
            infos={"propensity": rows["propensity"][[i]]},
        )
        for i in range(num_transitions)
    ]
    box, items = spaces.Box(0, 1, obs.shape[1:], np.float32), spaces.Discrete(CAMPAIGNS[campaign])
    env = types.SimpleNamespace(observation_space=box, action_space=items, spec=None)
    storage.write(
        dataset_id,
        data_path,
        episodes,
        env,
        env,
        reference_scores=None,
        algorithm_name={"random": "Uniformly random items", "bts": "Bernoulli Thompson sampling"}[log],
        code_permalink="common/recipes/open_bandit.py",
        description=f"Open Bandit, campaign {campaign}, log {log}: one-step episodes with logged propensities; "
        f"{rows['click'][:num_transitions].mean():.4f} of the items were clicked.",
    )


def read(log: str, campaign: str) -> dict[str, np.ndarray]:
    """Rows in the order of time: obs (n, 3 + levels), item, position (0 to 2), click and propensity (n,)."""
    tables = {name: _table(name, campaign) for name in ("random", "bts")}
    columns = {name: [row[name] for rows in tables.values() for row in rows] for name in FEATURES}
    levels = {name: sorted(set(values)) for name, values in columns.items()}
    rows = sorted(tables[log], key=lambda row: row["timestamp"])
    position = np.array([int(row["position"]) - 1 for row in rows])
    hot = [np.eye(3)[position]]
    hot += [np.eye(len(x))[[x.index(row[name]) for row in rows]] for name, x in levels.items()]
    return {
        "obs": np.concatenate(hot, axis=1).astype(np.float32),
        "item": np.array([int(row["item_id"]) for row in rows]),
        "position": position,
        "click": np.array([float(row["click"]) for row in rows]),
        "propensity": np.array([float(row["propensity_score"]) for row in rows]),
    }


def thompson_sampling(campaign: str, draws: int = 100_000) -> np.ndarray:
    """(items, 3): how often BTS, as it was when the week began, shows an item in each position; as obp draws it."""
    import yaml

    prior = yaml.safe_load(_open("obp/policy/conf/prior_bts.yaml"))[campaign]
    rng = np.random.RandomState(12345)
    clicks = rng.beta(prior["alpha"], prior["beta"], size=(draws, CAMPAIGNS[campaign]))
    best = clicks.argsort(axis=1)[:, ::-1][:, :3]
    return np.stack([np.bincount(best[:, k], minlength=CAMPAIGNS[campaign]) for k in range(3)], axis=1) / draws


def _table(log, campaign):
    text = io.TextIOWrapper(io.BytesIO(_open(f"obp/dataset/obd/{log}/{campaign}/{campaign}.csv")), "utf-8")
    return list(csv.DictReader(text))


def _open(name):
    from minari.storage import get_dataset_path

    folders = [Path.cwd(), get_dataset_path()]
    for folder in folders:
        if (folder / WHEEL).exists():
            with zipfile.ZipFile(folder / WHEEL) as wheel:
                return wheel.read(name)
    raise SystemExit(
        f"The Open Bandit sample is in {WHEEL}, which is in none of {', '.join(map(str, folders))}: "
        "run pip download --no-deps obp==0.4.1 and start again in that folder."
    )
