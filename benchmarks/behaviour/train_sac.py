"""Trains SAC on a locomotion task, for the behaviour policies of the datasets v1: they are to be as good as D4RL's.

    python benchmarks/behaviour/train_sac.py --task hopper

The losses, networks and updates are those of algos/sac.py; here are the environment and the replay buffer around them:
one update for each step, 50 at a time. The settings are those of the SAC paper (https://arxiv.org/abs/1812.05905,
appendix D). D4RL's policies were trained with SAC, too.

It takes hours. It can be stopped at any time: the same command goes on from the last checkpoint, in
runs/behaviour/TASK, and ends with the same policies; with a larger --num-steps a finished training goes on, too.
benchmarks/behaviour/measure_sac.py then chooses the policies that the datasets need.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal

import flax
import jax
import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from algos import sac  # noqa: E402
from common.datasets import Transition  # noqa: E402
from common.environments import Spec, provenance  # noqa: E402
from common.recipes import locomotion  # noqa: E402

BLOCK = 50  # environment steps, then as many updates in one compiled call
# A medium-replay dataset needs 30 policies up to the medium one, which training can reach after 60,000 steps or so, and
# from here on has by snapshot_interval alone
EARLY = 300_000
COLUMNS = ("obs", "action", "reward", "next_obs", "terminal")


@dataclasses.dataclass(frozen=True)
class Config:
    task: Literal["hopper", "walker2d", "halfcheetah"]
    seed: int = 0
    num_steps: int = 1_000_000  # of the environment
    random_steps: int = 10_000  # of uniform actions, before the first update
    snapshot_interval: int = 10_000  # steps between two policies that are kept, from EARLY steps on
    early_interval: int = 2_000  # the same, before
    save_interval: int = 20_000  # steps between two checkpoints, each at the end of an episode
    batch_size: int = 256
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4
    discount: float = 0.99
    tau: float = 0.005


def settings(config: dict) -> dict:
    """What a training that goes on must have in common with what was saved: not when policies are kept, nor its end."""
    return {name: value for name, value in config.items() if name != "num_steps" and not name.endswith("_interval")}


class Replay:
    """All transitions so far, as rows of files that grow with the training; the pages in memory are the cache."""

    def __init__(self, folder: Path, obs_dim: int, action_dim: int, capacity: int):
        widths = {"obs": (obs_dim,), "action": (action_dim,), "reward": (), "next_obs": (obs_dim,), "terminal": ()}
        self.rows = {}
        for name, width in widths.items():
            path = folder / f"{name}.npy"
            old = np.load(path, mmap_mode="r") if path.exists() else np.empty((0, *width), np.float32)
            if len(old) < capacity:  # new, or of a training that is to be longer now
                shape = (capacity, *width)
                rows = np.lib.format.open_memmap(folder / f"{name}.tmp", mode="w+", dtype=np.float32, shape=shape)
                rows[: len(old)] = old
                rows.flush()
                os.replace(folder / f"{name}.tmp", path)
            self.rows[name] = np.lib.format.open_memmap(path, mode="r+")

    def add(self, index, *values):
        for name, value in zip(COLUMNS, values, strict=True):
            self.rows[name][index] = value

    def batches(self, rng, size, batch_size):
        """BLOCK batches of the first `size` rows, uniformly and with replacement, on a leading axis."""
        index = rng.integers(size, size=(BLOCK, batch_size))
        return Transition(*(self.rows[name][index] for name in COLUMNS))


def layers(params):
    """Weights and biases of the policy's network, in order: NumPy arrays w0, b0, w1, b1, ..."""
    dense = params["params"]["MLP_0"]
    arrays = {}
    for i in range(len(dense)):
        arrays[f"w{i}"] = np.asarray(dense[f"Dense_{i}"]["linear"]["kernel"])
        arrays[f"b{i}"] = np.asarray(dense[f"Dense_{i}"]["linear"]["bias"])
    return arrays


def forward(arrays, obs):
    """(mean, standard deviation) of the Gaussian whose tanh is the action; the same as networks.TanhGaussianActor."""
    x, last = obs, len(arrays) // 2 - 1
    for i in range(last):
        x = np.maximum(x @ arrays[f"w{i}"] + arrays[f"b{i}"], 0)
    mean, log_std = np.split(x @ arrays[f"w{last}"] + arrays[f"b{last}"], 2, axis=-1)
    return mean, np.exp(np.clip(log_std, -20, 2))


def train(cfg: Config, folder: Path):
    """Trains, or goes on. Leaves in `folder` the replay buffer and snapshots.npz, every policy that is kept."""
    env = locomotion.make_env(cfg.task)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    assert np.all(env.action_space.high == 1) and np.all(env.action_space.low == -1)
    names = ("batch_size", "hidden", "learning_rate", "discount", "tau")
    algorithm = sac.Config(seed=cfg.seed, **{name: getattr(cfg, name) for name in names})
    agent = sac.make_agent(algorithm, Spec(obs_dim, action_dim))

    @jax.jit
    def updates(state, batches):
        return jax.lax.scan(agent.update, state, batches)

    folder.mkdir(parents=True, exist_ok=True)
    # An episode that is under way when the steps are enough is finished
    replay = Replay(folder, obs_dim, action_dim, cfg.num_steps + env.spec.max_episode_steps)
    state, step, episode, snapshots, returns, seconds = agent.init(jax.random.key(cfg.seed)), 0, 0, [], [], 0.0
    if (folder / "checkpoint.msgpack").exists():
        saved = flax.serialization.msgpack_restore((folder / "checkpoint.msgpack").read_bytes())
        if settings(json.loads(saved["config"])) != settings(json.loads(json.dumps(dataclasses.asdict(cfg)))):
            raise SystemExit(f"{folder} holds a training with other settings: remove it, or use the same command.")
        key_data = jax.random.key_data(state.key)
        state = flax.serialization.from_state_dict(state._replace(key=key_data), saved["state"])
        state = state._replace(key=jax.random.wrap_key_data(state.key))
        step, episode, returns, seconds = saved["step"], saved["episode"], list(saved["returns"]), saved["seconds"]
        with np.load(folder / "snapshots.npz") as file:
            kept = np.flatnonzero(file["step"] < step)  # it may be newer than the checkpoint
            snapshots = [{name: file[name][i] for name in file.files} for i in kept]
    arrays, begun, last_save = layers(state.actor.params), time.perf_counter() - seconds, step
    bar = tqdm(total=cfg.num_steps, initial=step, desc=cfg.task, unit=" steps", mininterval=10)
    while step < cfg.num_steps:
        # Whatever is drawn in an episode depends on its number alone, so that a training that goes on draws the same
        rng = np.random.default_rng(np.random.SeedSequence([cfg.seed, episode]))
        obs, _ = env.reset(seed=int(rng.integers(2**31)))
        ended, total = False, 0.0
        while not ended:
            if step % (cfg.early_interval if step < EARLY else cfg.snapshot_interval) == 0:
                snapshots.append({**arrays, "step": np.array(step)})
            if step < cfg.random_steps:
                action = rng.uniform(-1, 1, action_dim).astype(np.float32)
            else:
                mean, std = forward(arrays, obs.astype(np.float32))
                action = np.tanh(mean + std * rng.standard_normal(action_dim)).astype(np.float32)
            next_obs, reward, terminated, truncated, _ = env.step(action)
            replay.add(step, obs, action, reward, next_obs, terminated)
            obs, ended, total, step = next_obs, terminated or truncated, total + float(reward), step + 1
            if step % BLOCK == 0 and step >= cfg.random_steps:
                state, metrics = updates(state, replay.batches(rng, step, cfg.batch_size))
                arrays = layers(state.actor.params)
                bar.update(BLOCK)
        episode, returns = episode + 1, [*returns, total]
        bar.set_postfix({"return": f"{np.mean(returns[-10:]):.0f}"}, refresh=False)
        if step - last_save >= cfg.save_interval or step >= cfg.num_steps:
            last_save = step
            if step >= cfg.num_steps:
                snapshots.append({**arrays, "step": np.array(step)})
            for rows in replay.rows.values():
                rows.flush()
            with open(folder / "snapshots.tmp", "wb") as file:
                np.savez(file, **{name: np.stack([x[name] for x in snapshots]) for name in snapshots[0]})
            os.replace(folder / "snapshots.tmp", folder / "snapshots.npz")
            saved = {"config": json.dumps(dataclasses.asdict(cfg)), "step": step, "episode": episode}
            saved |= {"returns": np.array(returns), "seconds": time.perf_counter() - begun}
            saved["state"] = flax.serialization.to_state_dict(
                jax.device_get(state._replace(key=jax.random.key_data(state.key)))
            )
            (folder / "checkpoint.tmp").write_bytes(flax.serialization.msgpack_serialize(saved))
            os.replace(folder / "checkpoint.tmp", folder / "checkpoint.msgpack")
            progress = {"step": step, "return": np.mean(returns[-10:]), "seconds": saved["seconds"], **provenance()}
            progress["device"] = jax.devices()[0].device_kind
            (folder / "progress.json").write_text(json.dumps(progress))
            print(f"{step} steps: return {np.mean(returns[-10:]):.0f}", flush=True)


if __name__ == "__main__":
    config = tyro.cli(Config)
    train(config, ROOT / "runs" / "behaviour" / config.task)
