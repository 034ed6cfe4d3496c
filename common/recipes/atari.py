"""Atari's Pong, played by a script that reads ball and paddle from the console's memory, with random actions.

The emulator and the games are those of the package ale-py 0.12.1 (GPL-2.0), which the user installs and of which
nothing is here. The environment is gymnasium's AtariPreprocessing with the settings of Dopamine and of the DQN replay
data (Machado et al., 2018, https://arxiv.org/abs/1709.06009):

    action       one of the six that Pong uses, for 4 frames. It is sticky: in each frame the action of the frame before
                 is repeated with probability 0.25. Nothing else is random: there are no no-ops at the start.
    observation  one grey image of 84 x 84, the maximum of the last two of the 4 frames, made smaller by the mean over
                 areas. Rows see 4 images of their episode, and before its first black ones, as in the DQN replay data.
    reward       the sum over the 4 frames: 1 for a point, -1 for a point of the opponent. It is not clipped.
    end          at 21 points of either side, a termination. After 27,000 steps (108,000 frames), a truncation.

Behaviour: the script steers the paddle to where the ball will arrive, by its place and speed. A quarter of the actions
is uniformly random instead. Each of these lasts 4 frames, and the paddle goes on sliding for some more, so they cost
points: the finished games of the data have returns from -14 to -2, and three games of the script alone -9, 4 and 13
(`rollout(0.0, (1, k))` for k from 0 to 2). Random actions alone have -19, -20 and -20 (`rollout(1.0, (1, k))`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.recipes import rollouts, storage

if TYPE_CHECKING:
    import gymnasium as gym

STEPS = 27_000  # of an episode at most
NOISE = 0.25  # share of random actions
STAY, UP, DOWN = 0, 2, 3  # actions; 1, 4 and 5 are the same with the button, which Pong does not need
BALL_X, BALL_Y, PADDLE_Y = 49, 54, 51  # bytes of memory: how far to the right, how far down; the ball's are 0 if none
FACE, TOP, BOTTOM = 188, 45, 205  # where the paddle is, and between which two walls the ball flies
AIM, SLIDE, NEAR = -5, 1.0, 4  # the paddle's middle; how far it slides on, in its last steps; what is near enough
# Mean returns, the scale of published scores: of random actions and of a person (Dopamine at 5873f54,
# labs/atari_100k/normalization_utils.py). Both were measured with other settings of the game
REFERENCES = (-20.7, 14.6)
REQUIREMENTS = ["ale-py==0.12.1", "opencv-python-headless"]


def scripted(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Collects episodes of exactly `num_transitions` steps and writes each as soon as it is played."""
    env, (low, high) = simulator(), REFERENCES
    storage.write(
        dataset_id,
        data_path,
        rollouts.equal_parts(rollout, [(NOISE,)], num_transitions, STEPS, desc=dataset_id),
        env,
        env,
        reference_scores=REFERENCES,
        algorithm_name=f"A script that reads the memory, with {NOISE:.0%} random actions",
        code_permalink="common/recipes/atari.py",
        description="Atari Pong (ale-py 0.12.1; 84 x 84 grey, 4 frames a step, sticky actions 0.25, no no-ops, at most "
        f"{STEPS:,} steps): a script that steers to where the ball will arrive, with {NOISE:.0%} uniformly random "
        f"actions. The published return of random actions scores 0 ({low:g}), a person's 100 ({high:g}).",
        requirements=REQUIREMENTS,
        frame_stack={"frames": 4, "padding": "zero"},
    )


# --- The game ---------------------------------------------------------------------------------------


def spec():
    """The EnvSpec of the game. It needs no registration, which ale-py's own environments do."""
    from gymnasium.envs.registration import EnvSpec

    return EnvSpec(id="stitch/Atari-Pong-v0", entry_point="common.recipes.atari:make_env", max_episode_steps=STEPS)


def make_env(render_mode: str | None = None):
    import cv2  # noqa: F401 which AtariPreprocessing needs; without it, its error is no ImportError
    from ale_py.env import AtariEnv
    from gymnasium.wrappers import AtariPreprocessing

    game = {"frameskip": 1, "repeat_action_probability": 0.25, "max_num_frames_per_episode": 4 * STEPS}
    return AtariPreprocessing(AtariEnv("pong", **game, render_mode=render_mode), noop_max=0, frame_skip=4)


@functools.cache  # once for each process
def simulator() -> gym.Env:
    import gymnasium

    return gymnasium.make(spec(), disable_env_checker=True)


def returns(noise: float, num_episodes: int, seed: int) -> np.ndarray:
    """Returns (num_episodes,) of the script with a part `noise` of random actions. The data are of seed 0."""
    return np.array([rollout(noise, (seed, k)).rewards.sum() for k in range(num_episodes)])


# --- The script -------------------------------------------------------------------------------------


def rollout(noise: float, seed: tuple[int, ...]) -> rollouts.Episode:
    """One episode, of which a part `noise` of the actions is random; a function of its arguments only."""
    env, rng = simulator(), np.random.default_rng(np.random.SeedSequence(seed))
    env_seed = int(rng.integers(2**31))
    observations, actions, rewards = [env.reset(seed=env_seed)[0]], [], []
    memory = before = read(env)
    terminated = truncated = False
    while not (terminated or truncated):
        random = rng.random() < noise
        actions.append(int(rng.integers(6)) if random else steer(memory, before))
        obs, reward, terminated, truncated, _ = env.step(actions[-1])
        memory, before = read(env), memory
        observations.append(obs)
        rewards.append(float(reward))
    return rollouts.Episode(np.stack(observations), np.array(actions), np.array(rewards), bool(terminated), env_seed)


def read(env: gym.Env) -> tuple[int, int, int]:
    """BALL_X, BALL_Y and PADDLE_Y."""
    memory = env.unwrapped.ale.getRAM()
    return int(memory[BALL_X]), int(memory[BALL_Y]), int(memory[PADDLE_Y])


def steer(memory: tuple[int, int, int], before: tuple[int, int, int]) -> int:
    """The action, by what `read` gives now and what it gave a step before."""
    (x, y, paddle), (x_before, y_before, paddle_before) = memory, before
    target = (TOP + BOTTOM) / 2
    if y > 0 and y_before > 0:
        comes = x > x_before
        target = AIM + (arrival(x, y, x - x_before, y - y_before) if comes else y)
    gap = target - paddle - SLIDE * (paddle - paddle_before)
    return DOWN if gap > NEAR else UP if gap < -NEAR else STAY


def arrival(x: int, y: int, dx: int, dy: int) -> float:
    """At which height a ball that flies to the right reaches the paddle, thrown back by the walls on its way."""
    way = BOTTOM - TOP
    y = (y + dy * max(FACE - x, 0) / dx - TOP) % (2 * way)
    return TOP + min(y, 2 * way - y)
