"""Two modes: actions -1/2 and 1/2 with probabilities 1/4 and 3/4, and what predicts the noise in them exactly.

A sampler that is handed the exact prediction shows its own defects, and none of a network's. With few steps its numbers
are not 3/4, 1/4 and 0.4330: those here are of integrals over the samplers' own transitions.
"""

import jax
import jax.numpy as jnp
import numpy as np

MODE, P = 0.5, 0.75
# beta of five steps of the variance-preserving schedule, and the product of 1 - beta
BETA = np.array([0.195875, 0.458818, 0.635781, 0.754878, 0.835031])
ABAR = np.array([0.804125, 0.435178, 0.158500, 0.038852, 0.006409])


def exact(x, signal, noise):
    """E[eps | x] where x = signal a + noise eps. The odds of the modes are 3 exp(signal x / noise^2): so the tanh."""
    action = MODE * jnp.tanh(MODE * signal * x / noise**2 + np.log(P / (1 - P)) / 2)
    return (x - signal * action) / noise


def of_samples(action):
    """(P(a > 0), mean, standard deviation)"""
    action = np.asarray(action, np.float64)
    return np.array([np.mean(action > 0), action.mean(), action.std()])


def data(n):
    """n actions (n, 1), a fourth of them -1/2."""
    return jnp.where(jnp.arange(n) % 4 == 0, -MODE, MODE)[:, None]


def set_layers(params, values):
    """Zeros but for `values`: {part of the path: array}, each for the leaf whose path has that part."""

    def leaf(path, x):
        found = [value for part, value in values.items() if part in jax.tree_util.keystr(path)]
        assert len(found) <= 1, path
        return jnp.broadcast_to(jnp.asarray(found[0], x.dtype), x.shape) if found else jnp.zeros_like(x)

    return jax.tree_util.tree_map_with_path(leaf, params)
