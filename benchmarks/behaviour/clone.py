"""Trains the clones of the recipes of the Adroit hand (common/recipes/adroit.py), and measures them and their experts.

    python benchmarks/behaviour/clone.py

writes common/recipes/behaviour/adroit/TASK-clone.npz for each task, and benchmarks/behaviour/adroit.json with what was
measured, the command and the versions. A clone learns from 25 episodes of its expert: the means by least squares, with
normalised observations and actions, the standard deviations as what remains. Layers, batches, epochs and step size are
those of DAPG's example (dapg/examples/dapg.txt of hand_dapg at 9a1de23), the initial layers PyTorch's.
"""

import json
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from common.environments import D4RL_REFERENCE_SCORES, provenance
from common.recipes import adroit, rollouts
from common.recipes.rollouts import Policy

MEASURED_SEED = 2**31 + 1  # apart from those of the data and of the demonstrations


@dataclass(frozen=True)
class Config:
    seed: int = 0
    hidden: int = 32
    batch_size: int = 32
    num_epochs: int = 5
    learning_rate: float = 1e-3
    num_episodes: int = 40  # for the returns of a policy


def train(cfg: Config, obs: np.ndarray, action: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays as those of the experts, of a policy that imitates `action` (n, action_dim) at `obs` (n, obs_dim)."""
    rng = np.random.default_rng(cfg.seed)
    sizes = obs.shape[1], cfg.hidden, cfg.hidden, action.shape[1]
    arrays = {}
    for i, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        arrays |= {f"w{i}": rng.uniform(-1, 1, (fan_out, fan_in)) / fan_in**0.5}
        arrays |= {f"b{i}": rng.uniform(-1, 1, fan_out) / fan_in**0.5}
    shifts = {"in_shift": obs.mean(0), "in_scale": obs.std(0) + 1e-3}
    shifts |= {"out_shift": action.mean(0), "out_scale": action.std(0) + 1e-3}
    x, y = (obs - shifts["in_shift"]) / shifts["in_scale"], (action - shifts["out_shift"]) / shifts["out_scale"]
    optimiser = optax.adam(cfg.learning_rate)
    params, opt_state = arrays, optimiser.init(arrays)

    def mean(params, x):
        hidden = jnp.tanh(jnp.tanh(x @ params["w0"].T + params["b0"]) @ params["w1"].T + params["b1"])
        return hidden @ params["w2"].T + params["b2"]

    @jax.jit
    def update(params, opt_state, x, y):
        grads = jax.grad(lambda params: jnp.mean((mean(params, x) - y) ** 2))(params)
        step, opt_state = optimiser.update(grads, opt_state)
        return optax.apply_updates(params, step), opt_state

    for _ in range(cfg.num_epochs):
        num_batches = len(x) // cfg.batch_size
        for rows in rng.permutation(len(x))[: num_batches * cfg.batch_size].reshape(num_batches, -1):
            params, opt_state = update(params, opt_state, x[rows], y[rows])
    error = (np.asarray(mean(params, x)) - y) * shifts["out_scale"]
    arrays = {**params, "log_std": np.log(np.sqrt(np.mean(error**2, axis=0))), **shifts}
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}


def returns(task: str, policy: Policy | None, num_episodes: int) -> np.ndarray:
    env = adroit.make_env(task)
    episodes = [rollouts.rollout(env, policy, (MEASURED_SEED, k)) for k in range(num_episodes)]
    env.close()
    return np.array([episode.rewards.sum() for episode in episodes])


def main(cfg: Config) -> None:
    report = {"config": cfg.__dict__, **provenance(), "scores": {}}
    for task in adroit.TASKS:
        demonstrations = [adroit.demonstration(task, k) for k in range(adroit.NUM_DEMONSTRATIONS)]
        obs = np.concatenate([episode.observations[:-1] for episode in demonstrations])
        clone = train(cfg, obs, np.concatenate([episode.actions for episode in demonstrations]))
        np.savez(adroit.BEHAVIOUR / f"{task}-clone.npz", **clone)
        adroit.load.cache_clear()
        adroit.policy.cache_clear()
        expert, clones = adroit.policy(task), adroit.policy(f"{task}-clone")
        silent = expert._replace(std=0 * expert.std), clones._replace(std=0 * clones.std)
        of = {"random": None, "expert": expert, "clone": clones, "expert_mean": silent[0], "clone_mean": silent[1]}
        of = {name: returns(task, policy, cfg.num_episodes) for name, policy in of.items()}
        np.savez(adroit.BEHAVIOUR / f"{task}-clone.npz", **clone, expert_return=of["expert"], clone_return=of["clone"])
        low, high = D4RL_REFERENCE_SCORES[f"D4RL/{task}/"]
        report["scores"][task] = {}
        for name, values in of.items():
            scores = 100 * (values - low) / (high - low)
            error = scores.std() / len(scores) ** 0.5
            report["scores"][task][name] = {
                "mean": round(float(scores.mean()), 1),
                "standard_error": round(float(error), 1),
            }
        print(task, report["scores"][task], flush=True)
    path = adroit.BEHAVIOUR.parents[3] / "benchmarks" / "behaviour" / "adroit.json"
    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
