"""How often OGBench's own code draws which goal for which row; tests/test_parity_ogbench.py compares our draws with it.

Writes ogbench_goals.npz and ogbench_goals_provenance.json beside this file. It needs a clone, whose data code is no
package, and beside NumPy only JAX and Flax, which any environment of this project has:

    git clone https://github.com/seohongpark/ogbench && git -C ogbench checkout 1d41409
    python tests/parity/ogbench_goals_reference.py ogbench

The data are two episodes of 7 and 5 rows whose state is the row's number. Keys of the .npz: NAME/GOAL is an array
(12, 12) of counts, row by goal, of DRAWS draws of the rows; NAME is one of CONFIG and GOAL one of OGBench's columns.
"""

import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import numpy as np

SEED, LENGTHS, DRAWS = 0, (7, 5), 1_000_000
OUT = pathlib.Path(__file__).parent
STEPS, DISCOUNT = 2, 0.7  # of HIQL's subgoals; of the value's goals ahead
ROWS = sum(LENGTHS)


def shares(current, ahead, anywhere):
    return {"p_curgoal": current, "p_trajgoal": ahead, "p_randomgoal": anywhere}


# OGBench's shares, but for the policy's: its default, 1, would not show which part of a draw is random
CONFIG = {
    "gcivl": {"value": shares(0.2, 0.5, 0.3), "actor": shares(0.0, 0.7, 0.3)},
    "crl": {"value": shares(0.0, 1.0, 0.0), "actor": shares(0.0, 0.7, 0.3)},
    "qrl": {"value": shares(0.0, 0.0, 1.0), "actor": shares(0.0, 0.7, 0.3)},
    "hiql": {"value": shares(0.2, 0.5, 0.3), "actor": shares(0.0, 0.7, 0.3)},
}


def counts(name, module):
    config = {f"{whose}_{key}": x for whose, parts in CONFIG[name].items() for key, x in parts.items()}
    config |= {"discount": DISCOUNT, "value_geom_sample": True, "actor_geom_sample": False, "subgoal_steps": STEPS}
    config |= {"frame_stack": None, "p_aug": None, "gc_negative": True}
    number = np.arange(ROWS)
    last = np.isin(number, np.cumsum(LENGTHS) - 1)
    columns = {"observations": number, "next_observations": number + 1, "actions": number, "terminals": last}
    sampler = module.HGCDataset if name == "hiql" else module.GCDataset
    batch = sampler(module.Dataset.create(**columns), config).sample(DRAWS)
    goals = {key: batch[key] for key in batch if key.endswith(("_goals", "_targets"))}
    tables = {}
    for key, goal in goals.items():
        tables[f"{name}/{key}"] = np.zeros((ROWS, ROWS), np.int64)
        np.add.at(tables[f"{name}/{key}"], (batch["observations"], goal), 1)
    return tables


def main(clone):
    sys.path.insert(0, str(pathlib.Path(clone) / "impls"))
    from utils import datasets

    np.random.seed(SEED)
    tables = {}
    for name in CONFIG:
        tables |= counts(name, datasets)
    np.savez_compressed(OUT / "ogbench_goals.npz", **tables)
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}
    provenance = {
        "source": "https://github.com/seohongpark/ogbench",
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), **versions},
        "seed": SEED,
        "lengths": LENGTHS,
        "draws": DRAWS,
        "subgoal_steps": STEPS,
        "discount": DISCOUNT,
        "config": CONFIG,
    }
    (OUT / "ogbench_goals_provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
