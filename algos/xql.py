"""Extreme Q-Learning (XQL): IQL whose V is the soft maximum of Q over the data's actions, by Gumbel regression.

Paper      Garg, Hejna, Geist & Ermon (2023), https://arxiv.org/abs/2301.02328
Reference  https://github.com/Div99/XQL at dff09af, offline/

From equation to code
    J(V) = E[ exp(z) - z - 1 ],  z = (Qhat(s, a) - V(s)) / b          gumbel_loss, value_loss
    V(s) = b log E_mu[ exp(Qhat(s, a) / b) ]                          its minimum
    L_Q  = E[ (r + discount V(s') - Q(s, a))^2 ]                      critic_loss
    L_pi = E[ -exp(beta (Qhat(s, a) - V(s))) log pi(a|s) ]            actor_loss

Order of one update   V, pi, Q, target: the reference's learner.py.
Hyper-parameters      beta, max_weight, max_clip, reward_shift: the reference's AntMaze settings, where b is 0.55 to 5;
                      learning_rate and tau are IQL's of the short run.
                      MuJoCo: temperature 2, beta 3, normalize_reward, reward_shift 0 ("consistent" in the paper).
Deviations            1. From the paper, as the reference: z is clipped, V's gradient is divided by exp of the batch's
                         largest z, and beta is not 1 / b but a number of its own.
                      2. The error of Q is squared, as in the paper; the reference's is Huber's with delta 20.
                      3. One step of V per update, with no random actions and no noise in its loss, and no dropout on
                         the actor (options of the reference on some datasets).
                      4. The actor's rate decays on every dataset (the reference's not on AntMaze).
                      5. Batches are drawn on the device, with replacement.
Run                   python algos/xql.py --dataset stitch/pointmaze-umaze-v0 --num-seeds 3
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
from typing import Any, NamedTuple

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
from common.networks import CategoricalActor, Critic, DiscreteCritic, GaussianActor, Value


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
    learning_rate: float = 1e-3  # of every Adam; the actor's decays to 0 along a cosine (the reference: 3e-4)
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers
    discount: float = 0.99  # gamma
    tau: float = 0.05  # Polyak step of the target critic (the reference: 0.005)
    # XQL
    temperature: float = 1.0  # b: towards 0 V is the in-sample maximum, towards infinity SARSA's
    max_clip: float = 7.0  # of z: rows beyond it have no gradient
    beta: float = 10.0  # inverse temperature of the weights: 0 is behaviour cloning
    max_weight: float = 100.0  # clip of exp(beta A), for stability
    normalize_reward: bool = False  # reward * 1000 / (best - worst episode return)
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere


def load_data(cfg: Config):
    return load_dataset(cfg.dataset, normalize_reward=cfg.normalize_reward, reward_shift=cfg.reward_shift)


# --- State: arrays only, so that a whole run can be vmapped, compared and saved -----------------------------
class Trainable(NamedTuple):
    params: Any
    opt_state: optax.OptState


class State(NamedTuple):
    key: jax.Array
    actor: Trainable
    critic: Trainable
    target_critic: Any
    value: Trainable


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it


# --- Algorithm -----------------------------------------------------------------------------------------
def gumbel_loss(z):
    """Negative log-likelihood of Gumbel noise: 0 at z = 0, exponential above and linear below. Any shape."""
    return jnp.exp(z) - z - 1


def make_agent(cfg: Config, spec: Spec) -> Agent:
    actor = (CategoricalActor if spec.discrete else GaussianActor)(spec.action_dim, cfg.hidden)
    critic = DiscreteCritic(spec.action_dim, 2, cfg.hidden) if spec.discrete else Critic(2, cfg.hidden)
    value = Value(cfg.hidden, layer_norm=True)
    adam = optax.adam(cfg.learning_rate)
    actor_adam = optax.adam(optax.cosine_decay_schedule(cfg.learning_rate, cfg.num_updates))

    def value_loss(params, batch, q):
        v = value.apply(params, batch.obs)
        chex.assert_equal_shape([q, v, batch.reward])
        z = jnp.minimum((q - v) / cfg.temperature, cfg.max_clip)
        loss = gumbel_loss(z).mean()
        scale = jnp.exp(-jax.lax.stop_gradient(jnp.maximum(z.max(), -1)))  # one row's exp does not decide the step
        return scale * loss, {"value_loss": loss, "v": v.mean()}

    def actor_loss(params, batch, advantage):
        weight = jnp.minimum(jnp.exp(cfg.beta * advantage), cfg.max_weight)
        log_prob = actor.apply(params, batch.obs).log_prob(batch.action)
        chex.assert_equal_shape([weight, log_prob, batch.reward])
        return -(weight * log_prob).mean(), {"weight": weight.mean(), "log_prob": log_prob.mean()}

    def critic_loss(params, batch, target):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (2, *target.shape))
        return ((q - target[None]) ** 2).sum(axis=0).mean(), {"q": q.mean()}

    def init(key):
        key, key_actor, key_critic, key_value = jax.random.split(key, 4)
        obs = jnp.zeros((1, spec.obs_dim))
        action = jnp.zeros(1, int) if spec.discrete else jnp.zeros((1, spec.action_dim))
        actor_params = actor.init(key_actor, obs)
        critic_params = critic.init(key_critic, obs, action)
        value_params = value.init(key_value, obs)
        return State(
            key=key,
            actor=Trainable(actor_params, actor_adam.init(actor_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            target_critic=critic_params,
            value=Trainable(value_params, adam.init(value_params)),
        )

    def update(state, batch):
        # Qhat(s, a): the smaller of the two target critics
        q = critic.apply(state.target_critic, batch.obs, batch.action).min(axis=0)
        new_value, value_info = descend(adam, value_loss, state.value, batch, q)

        advantage = q - value.apply(new_value.params, batch.obs)
        new_actor, actor_info = descend(actor_adam, actor_loss, state.actor, batch, advantage)

        next_v = value.apply(new_value.params, batch.next_obs)
        target = batch.reward + cfg.discount * (1 - batch.terminal) * next_v
        new_critic, critic_info = descend(adam, critic_loss, state.critic, batch, target)

        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        state = State(state.key, new_actor, new_critic, target_critic, new_value)
        return state, value_info | actor_info | critic_info

    def act(state, obs, key):
        return actor.apply(state.actor.params, obs).mode()

    def q(state, obs, action):
        return critic.apply(state.critic.params, obs, action).min(axis=0)

    return Agent(init, update, act, q)


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
