"""Numbers of two repositories that tests/test_parity_sequence.py compares our files with: of their own code.

    git clone https://github.com/scottemmons/rvs /tmp/rvs && git -C /tmp/rvs checkout 90c0ffb
    python -m venv /tmp/sq && . /tmp/sq/bin/activate && pip install torch==2.13.0
    python tests/parity/sequence_reference.py rvs /tmp/rvs

Writes rvs.npz and the part "rvs" of sequence_provenance.json beside this file. The module of RvS that holds its data
imports D4RL, gym and PyTorch Lightning, of which these functions need nothing: empty modules stand in their places.

rvs.npz: rewards, ends of episodes (`dones`), `average` and `cumulative`, the reward-to-go of RvS-R; `first` and
`second`, uniform numbers, and the rows `start` and `goal` of RvS-G's pairs, with the episode that was chosen for each.
"""

import json
import pathlib
import platform
import subprocess
import sys
import types
import unittest.mock

import numpy as np

FOLDER = pathlib.Path(__file__).parent


def note(part, checkout, **facts):
    """Writes what a part of the numbers comes from."""
    path = FOLDER / "sequence_provenance.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    git = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    kept[part] = {"commit": commit, "python": platform.python_version(), "numpy": np.__version__, **facts}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


class Anything(types.ModuleType):
    """A module of which every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def rvs(checkout):
    sys.path.insert(0, f"{checkout}/src")
    for name in (
        "d4rl",
        "gym",
        "pytorch_lightning",
        "wandb",
        "wandb.sdk",
        "wandb.sdk.wandb_run",
        "rvs.step",
        "rvs.train",
    ):
        sys.modules[name] = Anything(name)
    from rvs import dataset

    rng = np.random.default_rng(0)
    lengths = np.array([5, 1, 12, 7, 12, 2])
    n = lengths.sum()
    dones = np.zeros(n, bool)
    dones[np.cumsum(lengths) - 1] = True
    rewards = rng.normal(size=n)
    data = {
        "rewards": rewards,
        "terminals": dones & (np.arange(n) % 2 == 0),
        "timeouts": dones & (np.arange(n) % 2 == 1),
    }
    arrays = {"rewards": rewards, "dones": dones, "average": dataset.reward_to_go(data, average=True)}
    arrays["cumulative"] = dataset.reward_to_go(data, average=False)

    number = 200
    drawn = dataset.D4RLIterableDataset(np.zeros((n, 1)), np.zeros((n, 1)), dones, index_batch_size=number)
    episode, uniform = rng.integers(len(lengths), size=number), [rng.random(number), rng.random(number)]
    with unittest.mock.patch.object(np.random, "choice", lambda *args: episode):
        with unittest.mock.patch.object(np.random, "rand", unittest.mock.Mock(side_effect=uniform)):
            arrays["start"], arrays["goal"] = drawn._sample_indices()
    np.savez(FOLDER / "rvs.npz", **arrays, episode=episode, first=uniform[0], second=uniform[1])
    note("rvs", checkout, repository="https://github.com/scottemmons/rvs")


if __name__ == "__main__":
    {"rvs": rvs}[sys.argv[1]](sys.argv[2])
