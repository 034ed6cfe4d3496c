"""A small task of which everything is known, for tests of whole runs. Quick to import: worker processes make `Payer`.

It shows random points (x, y) in [-1, 1]^2, pays its action, in [-2, 3], and lasts four steps. The data's action is -x.
"""

import gymnasium
import numpy as np
from gymnasium import spaces

NAME, REFERENCE = "test/payer-v0", (-8.0, 12.0)  # scores 0 and 100: the smallest and the largest action, four times


class Payer(gymnasium.Env):
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-2, 3, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2), {}

    def step(self, action):
        return self.np_random.uniform(-1, 1, 2), float(action[0]), False, False, {}


gymnasium.register("stitch-test/Payer-v0", entry_point=f"{__name__}:Payer", max_episode_steps=4)


def build(name=NAME, episodes=20, offset=0.0, reference=REFERENCE, middle=0.0, half=1.0):
    """Writes the dataset, over another of that name. `offset` is added to its rewards; points are middle + half * x."""
    import minari
    from minari.data_collector import EpisodeBuffer

    if name in minari.list_local_datasets():
        minari.delete_dataset(name)
    rng, buffers = np.random.default_rng(0), []
    for _ in range(episodes):
        points = rng.uniform(-1, 1, (5, 2))
        actions = (-points[:-1, :1]).astype(np.float32)
        ends = np.zeros((2, 4), bool)
        ends[1, -1] = True
        buffers.append(EpisodeBuffer(None, None, None, middle + half * points, actions, actions[:, 0] + offset, *ends))
    scores = dict(zip(("ref_min_score", "ref_max_score"), reference, strict=True)) if reference else {}
    return minari.create_dataset_from_buffers(name, buffers, env=gymnasium.make("stitch-test/Payer-v0"), **scores)
