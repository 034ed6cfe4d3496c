"""Parity with the code of RvS and of the Decision Transformer, which parity/sequence_reference.py calls at a commit.

RvS: what an outcome is, and which pairs are drawn for the same random numbers. Its losses are not compared: its
Gaussian has a linear mean, ours is that of bc.py.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from algos import rvs

FOLDER = pathlib.Path(__file__).parent / "parity"


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def test_outcomes_of_rvs():
    theirs = arrays("rvs")
    last = np.flatnonzero(theirs["dones"])
    start = np.concatenate([[0], last[:-1] + 1])
    timestep = np.arange(len(theirs["dones"])) - np.repeat(start, last - start + 1)
    average = rvs.average_to_go(theirs["cumulative"], timestep)
    np.testing.assert_allclose(average, theirs["average"], rtol=1e-12)
    assert timestep.max() + 1 == 12 and len(last) == 6


def test_pairs_of_rvs(monkeypatch):
    """The same uniform numbers u, of which a row is floor(u (high - low))."""
    theirs = arrays("rvs")
    episode = jnp.asarray(np.cumsum(theirs["dones"]) - theirs["dones"], jnp.int32)
    numbers = iter([theirs["episode"], theirs["first"], theirs["second"]])

    def randint(key, shape, low, high):
        u = next(numbers)
        return jnp.asarray(u if u.dtype == int else np.floor(u * (high - low)) + low, jnp.int32)

    monkeypatch.setattr(jax.random, "randint", randint)
    index, later = rvs.draw_pairs(jax.random.key(0), episode, len(theirs["start"]))
    np.testing.assert_array_equal(index, theirs["start"])
    np.testing.assert_array_equal(later, theirs["goal"])
