"""What made a study's numbers: the fields that every result file of this project has."""

import datetime
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import jax


def provenance():
    """Command, commit, date and versions, at the start: what the study writes makes the tree dirty."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "command": " ".join(sys.argv),
        "commit": subprocess.getoutput(f"git -C {Path(__file__).parent} describe --always --dirty --abbrev=40"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def device():
    """At the end: asking JAX fixes the number of its devices, which an algorithm's `main` chooses."""
    return {"device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"}
