"""Bootstrapping Error Accumulation Reduction (BEAR): maximise Q within the support of the data, not near its density.

The policy may put its weight on any action that the data's behaviour takes at all: samples of both are close in MMD.

Paper      Kumar, Fu, Tucker & Levine (2019), https://arxiv.org/abs/1906.00949
Reference  https://github.com/rail-berkeley/d4rl_evaluations at c93b9d2, folder bear (rlkit/torch/sac/bear.py)

From equation to code
    ELBO of the behaviour model p(a|s)                                          vae_loss
    MMD^2(x, y) = E k(x, x') - 2 E k(x, y) + E k(y, y')                         mmd
    y    = r + discount max_i mix_j Qbar_j(s', a'_i),  a'_i ~ pi(.|s')          mix, update
    L_Q  = E[ (Q_j(s, a) - y)^2 ], summed over the critics j                    critic_loss
    L_pi = E[ alpha (MMD(s) - mmd_threshold) - min_j Q_j(s, pi(s)) ]            actor_loss
    dual ascent on log alpha: E[ alpha (MMD(s) - mmd_threshold) ]               alpha_loss

Order of one update   VAE, Q, pi (with the new VAE and Q), log alpha, target. First phase: the same without Q in L_pi.
Hyper-parameters      bear_hdf5_d4rl.py and the README of the reference (hopper, walker2d);
                      learning_rate and tau are larger and the first phase is shorter, for the short default run.
Deviations            1. The policy's loss has the Q of this update; the reference's has the one from before.
                      2. From the paper, as the reference: no target policy, no variance of an ensemble in L_pi.
                      3. One Adam step size for Q and the VAE.
                      4. PyTorch's initialisation of every layer; the reference has rlkit's.
                      5. Batches are drawn on the device, with replacement.
Run                   python algos/bear.py --dataset stitch/pointmaze-umaze-v0
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from common.datasets import Spec, load_dataset
from common.networks import VAE, Critic, Normal, TanhGaussianActor


# --- Configuration -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    # Experiment
    dataset: str = "stitch/pointmaze-umaze-v0"  # a Minari dataset: on this machine, built by a recipe, or downloaded
    seed: int = 0  # of the first run: its networks, batches and evaluation
    num_seeds: int = 3  # runs trained in one program, with seeds seed, seed + 1, ...
    num_updates: int = 6_000  # gradient steps (published runs: some 1,000,000)
    eval_interval: int = 2_000  # gradient steps between two evaluations, each with a checkpoint
    eval_episodes: int = 20  # episodes of one evaluation, for each seed
    log_interval: int = 250  # gradient steps of one compiled call; the progress line moves after each
    out: str = ""  # the run folder; by default runs/ALGORITHM/DATASET
    # Optimisation
    batch_size: int = 256  # transitions of one gradient step
    learning_rate: float = 1e-3  # of the Adams of Q and the VAE (the reference: 3e-4)
    actor_learning_rate: float = 3e-4  # of the actor's (the reference: 1e-4)
    alpha_learning_rate: float = 1e-3  # of log alpha's
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers of actor and critics
    discount: float = 0.99  # gamma
    tau: float = 0.05  # Polyak step of the target critic (the reference: 0.005)
    # BEAR
    pretrain_updates: int = 2_000  # gradient steps of the first phase, in which the actor only matches (there: 40,000)
    vae_hidden: tuple[int, ...] = (750, 750)  # units of the hidden layers of encoder and decoder
    kl_weight: float = 0.5  # of the KL to the prior, a mean over latent dimensions as the error is over the action's
    latent_clip: float = 0.5  # bound of the latents that behaviour actions are generated from
    kernel: Literal["laplacian", "gaussian"] = "laplacian"  # of the MMD
    mmd_sigma: float = 20.0  # width of that kernel: exp(-distance / (2 sigma))
    mmd_threshold: float = 0.05  # the MMD that alpha is learned for
    num_mmd_samples: int = 4  # actions of each side of the MMD: with few of them it compares supports
    min_weight: float = 0.75  # weight of the smaller critic in the target, against the larger one
    num_samples: int = 10  # actions that the target's maximum is over
    num_act_samples: int = 100  # actions that the policy chooses from
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere


def load_data(cfg: Config):
    return load_dataset(cfg.dataset, reward_shift=cfg.reward_shift)


# --- State: arrays only, so that a whole run can be vmapped, compared and saved -----------------------------
class Trainable(NamedTuple):
    params: Any
    opt_state: optax.OptState


class State(NamedTuple):
    key: jax.Array
    vae: Trainable
    critic: Trainable
    actor: Trainable
    log_alpha: Trainable
    target_critic: Any


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    pretrain: Callable  # (State, Transition) -> (State, metrics), of the first phase
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it


# --- Algorithm -----------------------------------------------------------------------------------------
def mmd(x, y, kernel, sigma):
    """Maximum mean discrepancy of two sets of actions (samples, ..., action_dim); pairs with itself are counted."""

    def mean_kernel(x, y):
        difference = x[:, None] - y[None]
        distance = (jnp.abs(difference) if kernel == "laplacian" else difference**2).sum(axis=-1)
        return jnp.exp(-distance / (2 * sigma)).mean(axis=(0, 1))

    squared = mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y)
    return jnp.sqrt(squared + 1e-6)  # the root has no slope at 0


def mix(q, min_weight):
    """Soft clipped double Q: min_weight times the smallest critic and the rest times the largest, critics on axis 0."""
    return min_weight * q.min(axis=0) + (1 - min_weight) * q.max(axis=0)


def make_agent(cfg: Config, spec: Spec) -> Agent:
    if spec.discrete:
        raise SystemExit("BEAR needs continuous actions and this dataset's are discrete: use BRAC, IQL or BC.")
    latent_dim = 2 * spec.action_dim
    vae = VAE(spec.action_dim, latent_dim, cfg.vae_hidden)
    actor = TanhGaussianActor(spec.action_dim, cfg.hidden, log_std_min=-5.0)
    critic, first_critic = (Critic(n, cfg.hidden, initializer="torch") for n in (2, 1))
    adam, actor_adam = optax.adam(cfg.learning_rate), optax.adam(cfg.actor_learning_rate)
    alpha_adam = optax.adam(cfg.alpha_learning_rate)

    def sample(distribution, num, key):
        """`num` actions for each state, on a new first axis."""
        return jax.vmap(distribution.sample)(jax.random.split(key, num))

    def repeat(obs, num):
        return jnp.broadcast_to(obs, (num, *obs.shape))

    def vae_loss(params, batch, key):
        recon, posterior = vae.apply(params, batch.obs, batch.action, key)
        chex.assert_equal_shape([recon, batch.action])
        recon_loss = ((recon - batch.action) ** 2).mean()
        variance = jnp.exp(2 * posterior.log_std)
        kl = 0.5 * (posterior.mean**2 + variance - 1 - 2 * posterior.log_std).mean()
        return recon_loss + cfg.kl_weight * kl, {"recon_loss": recon_loss, "kl": kl}

    def critic_loss(params, batch, target):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (2, *target.shape))
        return ((q - target[None]) ** 2).sum(axis=0).mean(), {"q": q.mean()}

    def actor_loss(params, batch, critic_params, vae_params, alpha, q_weight, key):
        key_policy, key_latent = jax.random.split(key)
        policy = sample(Normal(*actor.apply(params, batch.obs)), cfg.num_mmd_samples, key_policy)  # before the tanh
        z = jax.random.normal(key_latent, (cfg.num_mmd_samples, *batch.reward.shape, latent_dim))
        z = jnp.clip(z, -cfg.latent_clip, cfg.latent_clip)
        behaviour = vae.apply(vae_params, repeat(batch.obs, cfg.num_mmd_samples), z, method="decode_unsquashed")
        divergence = mmd(behaviour, policy, cfg.kernel, cfg.mmd_sigma)
        q = critic.apply(critic_params, batch.obs, jnp.tanh(policy[0])).min(axis=0)
        chex.assert_equal_shape([divergence, q, batch.reward])
        loss = alpha * (divergence - cfg.mmd_threshold) - q_weight * q
        return loss.mean(), {"mmd": divergence.mean()}

    def alpha_loss(log_alpha, divergence):
        return -jnp.exp(log_alpha) * (divergence - cfg.mmd_threshold), {}

    def init(key):
        key, key_vae, key_latent, key_critic, key_actor = jax.random.split(key, 5)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        vae_params = vae.init(key_vae, obs, action, key_latent)
        critic_params = critic.init(key_critic, obs, action)
        actor_params = actor.init(key_actor, obs)
        log_alpha = jnp.zeros(())
        return State(
            key=key,
            vae=Trainable(vae_params, adam.init(vae_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            actor=Trainable(actor_params, actor_adam.init(actor_params)),
            log_alpha=Trainable(log_alpha, alpha_adam.init(log_alpha)),
            target_critic=critic_params,
        )

    def step(state, batch, q_weight):
        key, key_vae, key_next, key_actor = jax.random.split(state.key, 4)
        new_vae, vae_info = descend(adam, vae_loss, state.vae, batch, key_vae)

        next_action = sample(actor.apply(state.actor.params, batch.next_obs), cfg.num_samples, key_next)
        next_q = critic.apply(state.target_critic, repeat(batch.next_obs, cfg.num_samples), next_action)
        next_v = mix(next_q, cfg.min_weight).max(axis=0)
        target = batch.reward + cfg.discount * (1 - batch.terminal) * next_v
        new_critic, critic_info = descend(adam, critic_loss, state.critic, batch, target)

        alpha = jnp.exp(state.log_alpha.params)
        args = batch, new_critic.params, new_vae.params, alpha, q_weight, key_actor
        new_actor, actor_info = descend(actor_adam, actor_loss, state.actor, *args)
        new_log_alpha, alpha_info = descend(alpha_adam, alpha_loss, state.log_alpha, actor_info["mmd"])
        new_log_alpha = new_log_alpha._replace(params=jnp.clip(new_log_alpha.params, -5, 10))

        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        state = State(key, new_vae, new_critic, new_actor, new_log_alpha, target_critic)
        return state, {"alpha": alpha} | vae_info | critic_info | actor_info | alpha_info

    def update(state, batch):
        return step(state, batch, q_weight=1.0)

    def pretrain(state, batch):
        return step(state, batch, q_weight=0.0)

    def act(state, obs, key):
        action = sample(actor.apply(state.actor.params, obs), cfg.num_act_samples, key)
        first = jax.tree.map(lambda x: x[:1], state.critic.params)
        q = first_critic.apply(first, repeat(obs, cfg.num_act_samples), action).squeeze(axis=0)
        best = q.argmax(axis=0, keepdims=True)
        return jnp.take_along_axis(action, best[..., None], axis=0).squeeze(axis=0)

    def q(state, obs, action):
        return mix(critic.apply(state.critic.params, obs, action), cfg.min_weight)

    return Agent(init, update, act, pretrain, q)


# --- Training: the same in every file, and a test keeps it so -----------------------------------------------
def descend(tx, loss_fn, trainable, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, info)`."""
    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable.params, *args)
    updates, opt_state = tx.update(grads, trainable.opt_state, trainable.params)
    params = optax.apply_updates(trainable.params, updates)
    return Trainable(params, opt_state), {loss_fn.__name__: loss, **info}


def make_train(cfg: Config, agent: Agent):
    """`train(state, dataset)`: `cfg.log_interval` updates and the means of their metrics. Pure: jit it, vmap it."""

    def train(state, dataset):
        if hasattr(agent, "relabel"):  # columns that are functions of the networks and of whole episodes
            state, dataset = agent.relabel(state, dataset)

        def step(state, _):
            key, key_batch = jax.random.split(state.key)
            index = jax.random.randint(key_batch, (cfg.batch_size,), 0, len(dataset.reward))
            batch = jax.tree.map(lambda x: x[index], dataset)
            return agent.update(state._replace(key=key), batch)

        state, metrics = jax.lax.scan(step, state, length=cfg.log_interval)
        return state, jax.tree.map(jnp.nanmean, metrics)  # NaN: not computed in that update

    return train


def write(path: Path, content: str | bytes):
    """Write a file so that a reader, or a kill at any moment, finds the old one or the new one whole."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.replace(temporary, path)


def main(cfg: Config, grid: dict[str, list[float]] | None = None):
    """Train `num_seeds` runs in one program, evaluate and checkpoint them; a killed run goes on where it stopped.

    `grid` maps float fields of Config that `load_data` does not read to values: each combination trains each seed.
    """
    for name, value in dataclasses.asdict(cfg).items():
        if type(value) in (int, tuple) and name != "seed" and not np.all(np.array(value) > 0):
            raise SystemExit(f"{name} must be positive, not {value}.")
    pretrain = getattr(cfg, "pretrain_updates", 0)  # of a first phase, whose steps are counted from -pretrain to 0
    if cfg.num_updates % cfg.eval_interval or pretrain % cfg.eval_interval or cfg.eval_interval % cfg.log_interval:
        counts = "num_updates and pretrain_updates" if pretrain else "num_updates"
        raise SystemExit(f"{counts} must be a multiple of eval_interval, and eval_interval one of log_interval.")
    algo = Path(__file__).stem
    out = Path(cfg.out or f"runs/{algo}/{cfg.dataset}")
    config = {"algo": algo, **dataclasses.asdict(cfg), "grid": grid or {}, "out": ""}  # a folder may be moved
    config = json.loads(json.dumps(config))
    if (out / "config.json").exists() and json.loads((out / "config.json").read_text())["config"] != config:
        raise SystemExit(f"{out} holds a run of another configuration: choose another --out, or remove that folder.")
    if (out / "summary.json").exists():
        print(f"{out} holds this very run, finished: to train again, choose another --out or remove that folder.")
        return json.loads((out / "summary.json").read_text())

    points = [dict(zip(config["grid"], values, strict=True)) for values in itertools.product(*config["grid"].values())]
    runs = [(cfg.seed + i, point) for point in points for i in range(cfg.num_seeds)]
    with contextlib.suppress(RuntimeError):  # JAX runs already, in a notebook or a test: take the devices it has
        jax.config.update("jax_num_cpu_devices", math.gcd(len(runs), os.cpu_count()))
    jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "stitch"))
    dataset, env = load_data(cfg)

    # Every array of the states has a leading axis of runs, sharded over the devices. Within one device that axis is a
    # loop on a CPU, whose caches hold the networks of one run at a time, and a vmap on an accelerator.
    devices = jax.local_devices()[: math.gcd(len(runs), jax.local_device_count())]
    mesh = jax.sharding.Mesh(devices, "run")
    by_run, whole = NamedSharding(mesh, PartitionSpec("run")), NamedSharding(mesh, PartitionSpec())
    seeds = np.array([seed for seed, _ in runs])
    floats = {name: np.array([point[name] for _, point in runs], np.float32) for name in config["grid"]}

    def agent_of(floats):
        return make_agent(dataclasses.replace(cfg, **floats), env.spec)

    def compile_train(phase):
        """`make_train` of all runs, with the agent's `phase`: its update or, in the first phase, its pretrain."""

        def train_one(state, floats, dataset):
            agent = agent_of(floats)
            agent = agent._replace(update=getattr(agent, phase))
            return make_train(dataclasses.replace(cfg, **floats), agent)(state, dataset)

        def train_shard(states, floats, dataset):
            if devices[0].platform == "cpu":
                return jax.lax.map(lambda run: train_one(*run, dataset), (states, floats))
            return jax.vmap(train_one, in_axes=(0, 0, None))(states, floats, dataset)

        in_specs = (by_run.spec, by_run.spec, whole.spec)
        train = jax.shard_map(train_shard, mesh=mesh, in_specs=in_specs, out_specs=by_run.spec, check_vma=False)
        return jax.jit(train, donate_argnums=0).lower(states, *arguments).compile()

    @jax.jit
    def policy(states, obs, t):
        def act(state, floats, seed, obs):
            return agent_of(floats).act(state, obs, jax.random.fold_in(jax.random.key(seed), t))

        return jax.vmap(act)(states, floats, seeds, obs)

    @jax.jit
    def believe(states, obs, action):
        return jax.vmap(lambda state, floats, *at: agent_of(floats).q(state, *at))(states, floats, obs, action)

    def evaluate(states):
        """Columns of metrics.jsonl, with a row for each run."""
        discount = floats.get("discount", getattr(cfg, "discount", 1.0))
        play = env.evaluate(partial(policy, states), seeds, cfg.eval_episodes, discount)
        columns = {"score": env.score(play.returns).mean(axis=1), "returns": play.returns}
        if hasattr(make_agent(cfg, env.spec), "q"):  # is what it believes of its policy true?
            believed = np.asarray(believe(states, play.obs, play.action)) @ play.weight
            columns |= {"believed_value": believed, "true_value": play.value}
        return columns

    started = time.perf_counter()
    init = jax.jit(jax.vmap(lambda seed, floats: agent_of(floats).init(jax.random.key(seed))))
    states = jax.device_put(init(seeds, floats), by_run)
    arguments = jax.device_put(floats, by_run), jax.device_put(dataset, whole)
    trains = {phase: compile_train(phase) for phase in ("pretrain", "update") if pretrain or phase == "update"}
    compile_seconds, train_seconds = time.perf_counter() - started, 0.0

    step, lines, score = -pretrain, [], math.nan
    if (out / "checkpoint.msgpack").exists():
        saved = step, train_seconds, states._replace(key=jax.random.key_data(states.key))
        saved = flax.serialization.from_bytes(saved, (out / "checkpoint.msgpack").read_bytes())
        step, train_seconds, states = saved
        states = states._replace(key=jax.random.wrap_key_data(states.key))
        states = jax.device_put(states, by_run)
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        lines = [line for line in lines if line["step"] <= step]  # a kill may have come before their checkpoint
    packages = ("jax", "flax", "optax", "numpy", "minari", "gymnasium", "gymnasium-robotics", "mujoco")
    source = {
        "command": " ".join(sys.argv),
        "commit": subprocess.getoutput(f"git -C {Path(__file__).parent} describe --always --dirty --abbrev=40"),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }
    out.mkdir(parents=True, exist_ok=True)
    write(out / "config.json", json.dumps({"config": config, **source}, indent=2))

    with tqdm(total=pretrain + cfg.num_updates, initial=pretrain + step, unit="update") as bar:
        while step < cfg.num_updates:
            infos, train = [], trains["pretrain" if step < 0 else "update"]
            for _ in range(cfg.eval_interval // cfg.log_interval):
                started = time.perf_counter()
                states, info = jax.block_until_ready(train(states, *arguments))
                train_seconds += time.perf_counter() - started
                infos.append(info)
                losses = {name: f"{x.mean():.3g}" for name, x in info.items() if name.endswith("loss")}
                bar.set_postfix(losses, score=f"{score:.1f}")
                bar.update(cfg.log_interval)
            step += cfg.eval_interval
            columns = evaluate(jax.device_put(states, devices[0])) if step > 0 else {}
            score = columns["score"].mean() if columns else score
            for i, (seed, point) in enumerate(runs):
                metrics = {name: float(np.mean([info[name][i] for info in infos])) for name in info}
                evaluation = {name: column[i].tolist() for name, column in columns.items()}
                lines.append({"step": step, "seed": seed, "grid": point, **evaluation, **metrics})
            write(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            saved = step, train_seconds, states._replace(key=jax.random.key_data(states.key))
            write(out / "checkpoint.msgpack", flax.serialization.to_bytes(jax.device_get(saved)))

    last = [line for line in lines if line["step"] == step]
    scores = [line["score"] for line in last]
    summary = {
        "algo": algo,
        "dataset": cfg.dataset,
        "num_updates": step,
        "seeds": [seed for seed, _ in runs],
        "grid": [point for _, point in runs],
        "returns": [line["returns"] for line in last],
        "score_per_seed": scores,
        "score_mean": np.mean(scores),
        "score_std": np.std(scores),
        "score_kind": env.score_kind,
        "updates_per_second": (pretrain + step) * len(runs) / train_seconds,  # of all seeds together
        "compile_seconds": compile_seconds,
        "train_seconds": train_seconds,
        **source,
    }
    write(out / "summary.json", json.dumps(summary, indent=2))
    result = f"score {np.mean(scores):.1f} +- {np.std(scores):.1f} over {len(runs)} runs ({env.score_kind})"
    print(f"{algo} on {cfg.dataset}: {result}, {summary['updates_per_second']:.0f} updates/s")
    print(f"The run is in {out}; to draw it: python benchmarks/plot.py {out}")
    return summary


if __name__ == "__main__":
    main(tyro.cli(Config))
