"""Trains a DQN on a MinAtar game, for the policies behind stitch/minatar-GAME-mixed-v0: some minutes on one core.

    python benchmarks/behaviour/train_minatar.py --game breakout

The loss, network and update are those of algos/dqn.py; here are the games, the random actions and the replay buffer
around them: four updates for each 16 steps, one of each of 16 games. Three snapshots become the recipe's policies, in
half precision: common/recipes/behaviour/minatar-GAME.npz. What they are worth is played with those weights, by the
NumPy policy of common/recipes/minatar.py, and written beside this file: minatar-GAME.json.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from algos import dqn  # noqa: E402
from common.datasets import Transition  # noqa: E402
from common.environments import provenance  # noqa: E402
from common.layouts import Interface, describe  # noqa: E402
from common.recipes import minatar  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    game: Literal["breakout", "space_invaders"]
    seed: int = 0
    num_steps: int = 200_000  # of all games together
    snapshots: tuple[int, ...] = (48_000, 96_000, 200_000)  # after as many of them a policy is kept
    num_games: int = 16  # played side by side
    updates: int = 4  # after each step of all of them
    batch_size: int = 32
    random_steps: int = 5_000  # before the first update
    noise_steps: int = 80_000  # in which the share of random actions falls from 1 to that of the end
    noise: float = 0.05  # share of random actions from there on
    learning_rate: float = 2.5e-4
    discount: float = 0.99
    tau: float = 0.005
    hidden: tuple[int, ...] = (64,)
    episodes: int = 300  # of each snapshot, to see what it is worth
    random_episodes: int = 1_000  # of random actions


def layers(params):
    """The network's arrays, as common/recipes/minatar.py has them."""
    tree = params["params"]
    arrays = {"conv": tree["encoder"]["Conv_0"]["kernel"], "conv_bias": tree["encoder"]["Conv_0"]["bias"]}
    for i in range(2):
        arrays |= {f"w{i}": tree[f"Dense_{i}"]["linear"]["kernel"], f"b{i}": tree[f"Dense_{i}"]["linear"]["bias"]}
    return {name: np.asarray(x) for name, x in arrays.items()}


def train(cfg: Config):
    """(weights after each of `snapshots` steps, mean return of the last 100 training episodes there)."""
    import gymnasium

    envs = [gymnasium.make(minatar.spec(cfg.game)) for _ in range(cfg.num_games)]
    interface = Interface(*describe(envs[0].observation_space, envs[0].action_space), [], [])
    names = ("batch_size", "learning_rate", "discount", "tau", "hidden")
    algorithm = dqn.Config(encoder="minatar", **{name: getattr(cfg, name) for name in names})
    agent = dqn.make_agent(algorithm, interface.spec)
    act = jax.jit(agent.act)

    @jax.jit
    def learn(state, batches):
        return jax.lax.scan(agent.update, state, batches)

    state, rng = agent.init(jax.random.key(cfg.seed)), np.random.default_rng(cfg.seed)
    shape, rows = (cfg.num_steps, *interface.spec.obs_shape), cfg.num_steps
    obs, next_obs = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    action, reward, terminal = np.zeros(rows, np.int32), np.zeros(rows, np.float32), np.zeros(rows, np.float32)
    now = np.stack([env.reset(seed=int(rng.integers(2**31)))[0] for env in envs])
    returns, totals, kept, scores = [], np.zeros(cfg.num_games), [], []
    for step in tqdm(range(0, cfg.num_steps, cfg.num_games), desc=cfg.game, mininterval=10):
        here = np.arange(step, step + cfg.num_games)
        noise = max(cfg.noise, 1 - (1 - cfg.noise) * step / cfg.noise_steps)
        drawn = rng.integers(interface.spec.action_dim, size=cfg.num_games)
        action[here] = np.where(rng.random(cfg.num_games) < noise, drawn, np.asarray(act(state, now, state.key)))
        obs[here] = now
        for i, env in enumerate(envs):
            now[i], reward[step + i], terminated, truncated, _ = env.step(int(action[step + i]))
            next_obs[step + i], terminal[step + i] = now[i], terminated
            totals[i] += reward[step + i]
            if terminated or truncated:
                returns.append(totals[i])
                totals[i], now[i] = 0, env.reset(seed=int(rng.integers(2**31)))[0]
        done = step + cfg.num_games
        if done >= cfg.random_steps:
            index = rng.integers(done, size=(cfg.updates, cfg.batch_size))
            columns = (obs, action, reward, next_obs, terminal)
            state, _ = learn(state, Transition(*(column[index] for column in columns)))
        if done in cfg.snapshots:
            kept.append(layers(state.critic.params))
            scores.append(float(np.mean(returns[-100:])))
    return kept, scores


def play(env, policy, episodes, seed):
    """Mean return, its standard error, and the mean length, of episodes of `policy(obs, rng)`."""
    returns, lengths = [], []
    for j in range(episodes):
        rng = np.random.default_rng([seed, j])
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        total, length, ended = 0.0, 0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(policy(obs, rng))
            total, length, ended = total + reward, length + 1, terminated or truncated
        returns.append(total)
        lengths.append(length)
    found = {"return": np.mean(returns), "error": np.std(returns) / len(returns) ** 0.5, "length": np.mean(lengths)}
    return {name: round(float(x), 2) for name, x in found.items()}


def main(cfg: Config):
    import gymnasium

    started = time.perf_counter()
    kept, scores = train(cfg)
    seconds = time.perf_counter() - started
    path = ROOT / "common" / "recipes" / "behaviour" / f"minatar-{cfg.game}.npz"
    arrays = {name: np.stack([x[name] for x in kept]).astype(np.float16) for name in kept[0]}
    np.savez_compressed(path, step=np.array(cfg.snapshots), **arrays)
    env = gymnasium.make(minatar.spec(cfg.game))
    random = play(env, lambda obs, rng: int(rng.integers(env.action_space.n)), cfg.random_episodes, 1)
    found = []
    for step, score, weights in zip(cfg.snapshots, scores, minatar.load(path), strict=True):
        greedy = play(env, lambda obs, rng, w=weights: int(minatar.values(w, obs).argmax()), cfg.episodes, 2)
        found.append({"step": step, "training_return": round(score, 2), **greedy})
        print(found[-1], flush=True)
    about = {"config": dataclasses.asdict(cfg), "seconds": round(seconds), "random": random, "snapshots": found}
    out = Path(__file__).parent / f"minatar-{cfg.game}.json"
    out.write_text(json.dumps({**about, **provenance()}, indent=2) + "\n")
    print(out, random)


if __name__ == "__main__":
    main(tyro.cli(Config))
