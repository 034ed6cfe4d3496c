"""The Adroit hand's four tasks as D4RL has them, in gymnasium-robotics' simulation.

D4RL's tasks (d4rl/hand_manipulation_suite, https://github.com/Farama-Foundation/D4RL at 5b44ecd) and the v1 of
gymnasium-robotics have the same bodies, observations, actions and starts. This wrapper mends what differs:
- door, hammer, relocate: D4RL pays -0.1 |palm - object|, gymnasium-robotics, from 1.2.1 to 1.4.2 at least, +0.1. The
  reward is computed anew, by D4RL's formula from the state of the simulator, so that it is right with any version.
- pen: D4RL ends an episode where the pen falls, which terminates it, and gymnasium-robotics does not. (D4RL's time
  limit of 100 steps, 200 there, is part of the specification that `adroit.as_in_d4rl` gives.)

This module imports gymnasium. Only the specifications of `adroit.as_in_d4rl` name it: importing the recipes does not.
"""

import gymnasium as gym
import numpy as np
from gymnasium.utils import RecordConstructorArgs

FALLEN = 0.075  # metres: below this height the pen has fallen out of the hand


class AsInD4RL(gym.Wrapper, RecordConstructorArgs):
    """Pays and ends as D4RL's `task`. It is part of the environment's `spec`, hence of a dataset's metadata."""

    def __init__(self, env: gym.Env, task: str):
        RecordConstructorArgs.__init__(self, task=task)
        gym.Wrapper.__init__(self, env)
        self.task = task

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        data = self.unwrapped.data
        if self.task == "pen":
            return obs, reward, bool(data.body("Object").xpos[2] < FALLEN), truncated, info
        return obs, float(REWARDS[self.task](data)), terminated, truncated, info


# --- D4RL's rewards, of the state after a step (mujoco.MjData) ---------------------------------------


def door(data) -> float:
    palm, handle = data.site("S_grasp").xpos, data.site("S_handle").xpos
    angle = data.joint("door_hinge").qpos.item()  # radians
    opened = 2 * (angle > 0.2) + 8 * (angle > 1.0) + 10 * (angle > 1.35)
    return opened - 0.1 * distance(palm, handle) - 0.1 * (angle - 1.57) ** 2 - 1e-5 * np.sum(data.qvel**2)


def hammer(data) -> float:
    palm, handle, head = data.site("S_grasp").xpos, data.body("Object").xpos, data.site("tool").xpos
    nail, goal = data.site("S_target").xpos, data.site("nail_goal").xpos
    lifted = 2 * (min(handle[2], head[2]) > 0.04)
    driven = 25 * (distance(nail, goal) < 0.02) + 75 * (distance(nail, goal) < 0.01)
    costs = 0.1 * distance(palm, handle) + distance(head, nail) + 10 * distance(nail, goal)
    return lifted + driven - costs - 0.01 * np.linalg.norm(data.qvel)


def relocate(data) -> float:
    palm, ball, target = data.site("S_grasp").xpos, data.body("Object").xpos, data.site("target").xpos
    lifted = (ball[2] > 0.04) * (1 - 0.5 * distance(palm, target) - 0.5 * distance(ball, target))
    near = 10 * (distance(ball, target) < 0.1) + 20 * (distance(ball, target) < 0.05)
    return lifted + near - 0.1 * distance(palm, ball)


def distance(a, b) -> float:
    return np.linalg.norm(a - b)


REWARDS = {"door": door, "hammer": hammer, "relocate": relocate}
