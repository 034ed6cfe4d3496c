"""An environment whose observations are images that say which episode, step and action they are of."""

import gymnasium
import numpy as np
from gymnasium import spaces

SHAPE = (12, 11, 2)  # no two sides are equal


class Screens(gymnasium.Env):
    action_space = spaces.Discrete(3)

    def __init__(self, shape=SHAPE, high=255, length=3, broken=False):
        self.observation_space = spaces.Box(0, high, tuple(shape), np.uint8)
        self.length, self.broken = length, broken

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.actions = seed, []
        return self.screen(), {}

    def step(self, action):
        self.actions.append(int(action))
        return self.screen(), float(action), len(self.actions) == self.length, False, {}

    def screen(self):
        rng = np.random.default_rng([self.seed, *self.actions, len(self.actions)])
        space = self.observation_space
        image = rng.integers(0, int(space.high.max()), space.shape, np.uint8, endpoint=True)
        return image.astype(float) if self.broken and self.actions else image


gymnasium.register("stitch-test/Screens-v0", entry_point=f"{__name__}:Screens", max_episode_steps=9)
