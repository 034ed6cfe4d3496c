"""MinAtar: small Atari games on images of 10 x 10, played by a DQN at several times of its training.

Young & Tian (2019), https://arxiv.org/abs/1903.03176. The games are those of the package minatar 1.0.15 (GPL), which
the user installs and of which nothing is here: sticky actions (each repeats the one before with probability 0.1), a
difficulty that rises, and only the actions that a game uses. A channel of an image says where objects of one kind are.

The policies were trained by benchmarks/behaviour/train_minatar.py, which leaves their weights in behaviour/.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.recipes import rollouts, storage

STEPS = 1000  # of an episode at most: the games have no limit, and gymnax's has this one
NOISE = (1.0, 0.2, 0.1, 0.05)  # share of random actions in each quarter: of no policy, and then of each snapshot
# Mean returns of 1,000 episodes of uniformly random actions, and of the last snapshot without random actions:
# benchmarks/behaviour/minatar-GAME.json has them with their standard errors
REFERENCES = {"breakout": (0.0, 1.0), "space_invaders": (0.0, 1.0)}


def mixed(game: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Four equal parts, as of a learner's replay buffer: random actions, and then three snapshots in their order."""
    import gymnasium as gym

    policies = load(Path(__file__).parent / "behaviour" / f"minatar-{game}.npz")

    def behaviour(obs, rng, progress):
        part = min(int(progress * len(NOISE)), len(NOISE) - 1)
        if rng.random() < NOISE[part]:
            return int(rng.integers(env.action_space.n))
        return int(values(policies[part - 1], obs).argmax())

    env = gym.make(spec(game))
    low, high = REFERENCES[game]
    storage.write(
        dataset_id,
        data_path,
        rollouts.collect(env, behaviour, num_transitions, desc=dataset_id),
        env,
        env,
        reference_scores=(low, high),
        algorithm_name="DQN at three times of its training, with random actions",
        code_permalink="common/recipes/minatar.py",
        description=f"MinAtar {game} (minatar 1.0.15, minimal actions, sticky 0.1, at most {STEPS} steps): a quarter "
        f"of random actions, and a quarter of each of three snapshots of a DQN with {NOISE[1]:g}, {NOISE[2]:g} and "
        f"{NOISE[3]:g} of random ones. Random actions score 0 (return {low:g}), the last snapshot without them scores "
        f"100 ({high:g}).",
        requirements=["minatar==1.0.15"],
    )
    env.close()


# --- The game ---------------------------------------------------------------------------------------


def spec(game: str):
    """The EnvSpec of a game. It needs no registration, which minatar's own environments do."""
    from gymnasium.envs.registration import EnvSpec

    name = game.title().replace("_", "")
    entry = {"entry_point": "common.recipes.minatar:make_env", "kwargs": {"game": game}}
    return EnvSpec(id=f"stitch/MinAtar-{name}-v1", max_episode_steps=STEPS, **entry)


def make_env(game: str, render_mode: str | None = None):
    """A game whose episodes depend on their seeds alone: minatar's first step may repeat the episode's before."""
    from gymnasium import spaces
    from minatar.gym import BaseEnv

    class Game(BaseEnv):
        metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

        def __init__(self):
            super().__init__(game, render_mode, use_minimal_action_set=True)
            self.observation_space = spaces.Box(0, 1, tuple(self.game.state_shape()), np.uint8)

        def reset(self, *, seed=None, options=None):
            state, info = super().reset(seed, options)
            self.game.last_action = 0
            return state.astype(np.uint8), info

        def step(self, action):
            state, reward, terminated, truncated, info = super().step(action)
            return state.astype(np.uint8), float(reward), bool(terminated), truncated, info

        def render(self):
            return (255 * super().render()).astype(np.uint8).repeat(16, axis=0).repeat(16, axis=1)

    return Game()


# --- The policies -----------------------------------------------------------------------------------


def load(path: Path) -> list[dict]:
    """The snapshots in a file, in the order of their training: weights of each layer."""
    with np.load(path) as file:
        count = len(file["step"])
        return [{name: file[name][i].astype(np.float64) for name in file.files if name != "step"} for i in range(count)]


def values(weights: dict, obs: np.ndarray) -> np.ndarray:
    """Q(s, .) of one image (H, W, C): a convolution of 3 x 3, a hidden layer and a linear one."""
    patches = np.lib.stride_tricks.sliding_window_view(obs, (3, 3), axis=(0, 1))  # (H - 2, W - 2, C, 3, 3)
    x = np.maximum(np.einsum("hwcij,ijcf->hwf", patches, weights["conv"], optimize=True) + weights["conv_bias"], 0)
    x = np.maximum(x.ravel() @ weights["w0"] + weights["b0"], 0)
    return x @ weights["w1"] + weights["b1"]
