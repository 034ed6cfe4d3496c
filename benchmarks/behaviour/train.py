"""Trains the behaviour policies of the locomotion datasets. The files that are committed come from

    python benchmarks/behaviour/train.py --task hopper
    python benchmarks/behaviour/train.py --task walker2d
    python benchmarks/behaviour/train.py --task halfcheetah --discount 0.98 --gae-lambda 0.92 --log-std-init -2

PPO of Stable-Baselines3 (pip install -e .[behaviour]), on one core. Writes
    common/recipes/behaviour/TASK.npz     about ten snapshots of the policy, their returns, the reference scores
    benchmarks/behaviour/TASK.png         the learning curve
    benchmarks/behaviour/TASK.json        the command, the hyper-parameters, the versions and the time it took
The recipes (common/recipes/locomotion.py) roll the snapshots out in NumPy, so nobody needs to train again.

The hyper-parameters are those of the PPO paper's MuJoCo runs (https://arxiv.org/abs/1707.06347), except for
- discount and lambda of halfcheetah: RL Baselines3 Zoo's tuned ones (hyperparams/ppo.yml at 00128b5);
- a smaller initial noise (standard deviation 0.37, halfcheetah 0.14, and not 1), so that fewer actions of the data lie
  on their bounds, where the environment clips them: that suits no algorithm that fits a density;
- batches of 128 and not 64, for speed.
"""

import importlib.metadata
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from common.recipes import locomotion

HERE = Path(__file__).parent
NUM_ENVS = 8
PROBES = 32  # observations whose mean actions are stored, to compare the NumPy policy with
KEPT_TO_MEDIUM, KEPT_FROM_MEDIUM = 6, 6  # snapshots that are kept, evenly over the steps; the medium one is in both
CURVE_EPISODES = 20  # for each snapshot
REFERENCE_EPISODES = 100  # for each kept snapshot and the random policy
EVAL_SEED = 2**31  # apart from those of the data


@dataclass(frozen=True)
class Config:
    task: Literal["hopper", "walker2d", "halfcheetah"]
    seed: int = 0
    num_steps: int = 1_000_000  # of the environment
    num_snapshots: int = 50  # evaluated, evenly over the training; about ten of them are kept
    learning_rate: float = 3e-4  # falls linearly to 0
    rollout_steps: int = 2048  # per update, over all environments
    batch_size: int = 128
    num_epochs: int = 10
    discount: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    hidden_dim: int = 64  # of two tanh layers
    log_std_init: float = -1.0


def fold(model, norm):
    """The policy as the arrays of locomotion.Policy: the normalisation of observations goes into the first layer."""
    network = model.policy.mlp_extractor.policy_net
    (w0, b0), (w1, b1), (w2, b2) = [
        (layer.weight.detach().double().numpy().T, layer.bias.detach().double().numpy())
        for layer in (network[0], network[2], model.policy.action_net)
    ]
    w0 = w0 / np.sqrt(norm.obs_rms.var + norm.epsilon)[:, None]
    b0 = b0 - norm.obs_rms.mean @ w0
    std = model.policy.log_std.detach().double().exp().numpy()
    return dict(zip(("w0", "b0", "w1", "b1", "w2", "b2", "std"), (w0, b0, w1, b1, w2, b2, std), strict=True))


class TakeSnapshots(BaseCallback):
    """Keeps the policy of every `interval` steps, between two updates, and the library's mean actions on `probes`."""

    def __init__(self, interval, probes):
        super().__init__()
        self.interval, self.probes, self.snapshots = interval, probes, []

    def _on_rollout_start(self):
        if self.num_timesteps >= len(self.snapshots) * self.interval:
            self._take()

    def _on_training_end(self):
        self._take()

    def _on_step(self):
        return True

    def _take(self):
        obs = torch.as_tensor(self.training_env.normalize_obs(self.probes), dtype=torch.float32)
        with torch.no_grad():
            probe_mean = self.model.policy.get_distribution(obs).distribution.mean.numpy()
        snapshot = fold(self.model, self.training_env) | {"step": self.num_timesteps, "probe_mean": probe_mean}
        self.snapshots.append(snapshot)
        recent = [episode["r"] for episode in self.model.ep_info_buffer]
        print(f"{self.num_timesteps} steps: return {np.mean(recent) if recent else np.nan:.0f}", flush=True)


def probe_observations(env):
    """Observations of a random walk, shape (PROBES, obs_dim)."""
    env.action_space.seed(0)
    env.reset(seed=0)
    obs = []
    while len(obs) < PROBES:
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        obs.append(observation)
        if terminated or truncated:
            env.reset()
    return np.stack(obs)


def train(cfg):
    """The snapshots, as one dict of arrays with a leading snapshot axis, and the probe observations."""
    torch.set_num_threads(1)
    envs = make_vec_env(locomotion.TASKS[cfg.task], NUM_ENVS, seed=cfg.seed)
    probes = probe_observations(locomotion.make_env(cfg.task))
    # Without the usual clipping of normalised observations, which could not be folded into the first layer.
    norm = VecNormalize(envs, gamma=cfg.discount, clip_obs=np.inf)
    model = PPO(
        "MlpPolicy",
        norm,
        seed=cfg.seed,
        device="cpu",
        learning_rate=lambda remaining: cfg.learning_rate * remaining,
        n_steps=cfg.rollout_steps // NUM_ENVS,
        batch_size=cfg.batch_size,
        n_epochs=cfg.num_epochs,
        gamma=cfg.discount,
        gae_lambda=cfg.gae_lambda,
        clip_range=cfg.clip_range,
        policy_kwargs={
            "net_arch": [cfg.hidden_dim] * 2,
            "activation_fn": torch.nn.Tanh,
            "log_std_init": cfg.log_std_init,
        },
    )
    taker = TakeSnapshots(cfg.num_steps // cfg.num_snapshots, probes)
    model.learn(cfg.num_steps, callback=taker)
    return {name: np.stack([s[name] for s in taker.snapshots]) for name in taker.snapshots[0]}, probes


def choose(curve):
    """Which snapshots to keep, and where the medium one is among them; `curve` holds the mean returns of all."""
    last = len(curve) - 1
    medium = int(np.argmax(curve >= curve[last] / 3))
    kept = np.concatenate([np.linspace(0, medium, KEPT_TO_MEDIUM), np.linspace(medium, last, KEPT_FROM_MEDIUM)])
    kept = np.unique(kept.round().astype(int))
    return kept, int(np.searchsorted(kept, medium))


def evaluate(env, policy, num_episodes):
    """Returns of stochastic episodes, as in the data; (num_episodes,)."""
    return np.array([locomotion.rollout(env, policy, (EVAL_SEED, k)).rewards.sum() for k in range(num_episodes)])


def measure(env, snapshots, probes):
    """What goes into the .npz file."""
    weights = {name: snapshots[name].astype(np.float32) for name in locomotion.Policy._fields}
    policies = [locomotion.Policy(*(w[i].astype(float) for w in weights.values())) for i in range(len(weights["std"]))]
    curve = np.stack([evaluate(env, policy, CURVE_EPISODES) for policy in policies])
    kept, medium = choose(curve.mean(-1))
    returns = np.stack([evaluate(env, policies[i], REFERENCE_EPISODES) for i in kept])
    return {name: array[kept] for name, array in weights.items()} | {
        "step": snapshots["step"][kept],
        "return": returns,  # (kept snapshots, REFERENCE_EPISODES)
        "medium": medium,
        "random_return": evaluate(env, None, REFERENCE_EPISODES).mean(),
        "expert_return": returns[-1].mean(),
        "curve_step": snapshots["step"],
        "curve_return": curve,  # (all snapshots, CURVE_EPISODES)
        "probe_obs": probes,
        "probe_mean": snapshots["probe_mean"][kept],  # (kept snapshots, PROBES, action_dim): the library's, not NumPy's
    }


def draw(path, task, behaviour):
    """The learning curve, with the snapshots that are kept."""
    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=120, layout="constrained")
    steps, returns = behaviour["curve_step"], behaviour["curve_return"]
    axes.fill_between(steps, *np.quantile(returns, [0.1, 0.9], axis=-1), color="#0072B2", alpha=0.2, linewidth=0)
    axes.plot(steps, returns.mean(-1), color="#0072B2", label="mean, and 10 to 90 % of the episodes")
    step, kept = behaviour["step"], behaviour["return"].mean(-1)
    axes.plot(step, kept, "o", color="#0072B2", label="kept snapshots")
    for name, i in {"medium": behaviour["medium"], "expert": -1}.items():
        axes.plot(step[i], kept[i], "o", color="#D55E00")
        axes.annotate(f"{name}: {kept[i]:.0f}", (step[i], kept[i]), (6, -3), textcoords="offset points")
    axes.axhline(behaviour["random_return"], color="0.5", linestyle=":", label="uniform actions")
    axes.margins(x=0.15)  # room for the names
    axes.set(title=f"PPO on {locomotion.TASKS[task]}", xlabel="environment steps", ylabel="return")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def save(cfg, behaviour, train_seconds):
    """The three files of a task."""
    np.savez_compressed(Path(locomotion.__file__).parent / "behaviour" / f"{cfg.task}.npz", **behaviour)
    draw(HERE / f"{cfg.task}.png", cfg.task, behaviour)
    packages = ("stable-baselines3", "torch", "gymnasium", "mujoco", "numpy")
    record = {
        "command": " ".join(["python benchmarks/behaviour/train.py", *sys.argv[1:]]),
        "config": asdict(cfg),
        "train_seconds": round(train_seconds),
        "steps_per_second": round(cfg.num_steps / train_seconds),
        "snapshots": [
            {"step": int(step), "return_mean": round(r.mean(), 1), "return_std": round(r.std(), 1)}
            for step, r in zip(behaviour["step"], behaviour["return"], strict=True)
        ],
        "medium": behaviour["medium"],
        "random_return": round(behaviour["random_return"], 1),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in packages},
        "processor": platform.machine(),
    }
    (HERE / f"{cfg.task}.json").write_text(json.dumps(record, indent=1) + "\n")


def main(cfg):
    start = time.perf_counter()
    snapshots, probes = train(cfg)
    train_seconds = time.perf_counter() - start
    save(cfg, measure(locomotion.make_env(cfg.task), snapshots, probes), train_seconds)


if __name__ == "__main__":
    main(tyro.cli(Config))
