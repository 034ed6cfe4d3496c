"""Chain C2 of the tests of off-policy evaluation: as arrays, as a Minari dataset, and with the run of a policy.

s0: stop -> reward 1, end; go -> 0.5, s1. s1: stop -> 0, end; go -> 2, end; discount 0.9. The behaviour takes each with
probability 1/2. pi(go|s0) = 0.8, pi(go|s1) = 0.6: V^pi(s0) = 0.2 + 0.8 (0.5 + 0.9 * 0.6 * 2) = 1.464.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

PI = np.array([[0.2, 0.8], [0.4, 0.6]])
MU = np.full((2, 2), 0.5)
ACTIONS = np.array([[0, 0], [1, 0], [1, 1]])  # of the three possible episodes; the first has one step
REWARDS = np.array([[1.0, np.nan], [0.5, 0.0], [0.5, 2.0]])  # what the mask leaves out is never read
MASK = np.array([[True, False], [True, True], [True, True]])
D1, D2 = [0, 0, 1, 2], [0, 1, 2, 2]  # D1 has exactly the behaviour's frequencies
V_PI, Q_PI = np.array([1.464, 1.2]), np.array([[1, 1.58], [0, 2]])


def write(rows=D1, name="test/chain-v0", propensity=None):
    """Writes the episodes as a dataset without an environment; returns its name."""
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    buffers = []
    for k, row in enumerate(rows):
        steps = int(MASK[row].sum())
        buffers.append(
            EpisodeBuffer(
                id=k,
                observations=np.array([0, 1, 1])[: steps + 1] if steps == 2 else np.array([0, 0]),
                actions=ACTIONS[row, :steps],
                rewards=REWARDS[row, :steps],
                terminations=[False] * (steps - 1) + [True],
                truncations=[False] * steps,
                infos={} if propensity is None else {"propensity": np.full(steps, propensity)},
            )
        )
    minari.create_dataset_from_buffers(
        name,
        buffers,
        observation_space=spaces.Discrete(2),
        action_space=spaces.Discrete(2),
        algorithm_name="x",
        author="x",
        author_email="x@x.x",
        code_permalink="x",
    )
    return name


def train(folder, dataset, num_seeds=2, policies=(PI, MU)):
    """The folder of runs of marwil, the weights of whose policies are then set: seed 0 is PI, and seed 1 is MU."""
    from algos import marwil

    small = dict(num_seeds=num_seeds, num_updates=10, eval_interval=10, log_interval=10, batch_size=4, hidden=(2,))
    marwil.main(marwil.Config(dataset=dataset, out=str(folder), eval_episodes=0, **small))
    runs = marwil.restore(folder, run=None)
    kernels = [np.stack([np.eye(2)] * num_seeds), np.log(policies)]  # ReLU of a one-hot state is that state
    actor, linear = runs.states.actor.params, iter(kernels)

    def weights(path, old):
        return jnp.asarray(next(linear) if "kernel" in jax.tree_util.keystr(path) else np.zeros(old.shape), old.dtype)

    actor = jax.tree_util.tree_map_with_path(weights, actor)
    runs.states = runs.states._replace(actor=runs.states.actor._replace(params=actor))
    runs.save(Path(folder))
    return str(folder)
