"""EMaQ: Q-learning whose maximum is over N actions of a fitted behaviour model, and no policy network at all.

The maximum of few likely actions never asks Q about unlikely ones; N goes from the behaviour's value to the best.

Paper      Ghasemipour, Schuurmans & Gu (2021), https://arxiv.org/abs/2007.11091
Reference  none published; its behaviour model: MADE, https://arxiv.org/abs/1502.03509

From equation to code
    L_mu  = -E[ log mu(a|s) ], mu a product of histograms (a softmax for discrete actions)   behaviour_loss
    mix_k Q_k = lambda min_k Q_k + (1 - lambda) max_k Q_k                                    mix
    y     = r + discount E[ max_i mix_k Qbar_k(s', a_i) ],  a_1 .. a_N ~ mu(.|s')            update
    the expectation: one draw of N, or exactly for discrete actions                          expected_max
    L_Q   = E[ (Q_k(s, a) - y)^2 ], summed over the critics k                                critic_loss
    pi(s) = the a_i of the largest mix_k Q_k,  a_1 .. a_N ~ mu(.|s)                          act

Order of one update   First phase: mu. Then, with mu fixed: Q, target Q.
Hyper-parameters      num_samples, min_weight, bins and num_critics are the paper's notions, their numbers ours or from
                      memory: there is no code to read them in. learning_rate and tau: for the short default run.
Deviations            1. Discrete actions, which the paper does not treat, have the operator exactly.
                      2. `reward_shift` is not in the paper: -1 for 0/1 rewards, as CORL does on AntMaze.
                      3. Batches are drawn on the device, with replacement.
Run                   python algos/emaq.py --dataset stitch/pointmaze-umaze-v0
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
from common.networks import AutoregressiveActor, CategoricalActor, Critic, DiscreteCritic


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
    learning_rate: float = 1e-3  # of every Adam
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers
    discount: float = 0.99  # gamma
    tau: float = 0.02  # Polyak step of the target critics
    # EMaQ
    pretrain_updates: int = 4_000  # gradient steps of the first phase, which fits the behaviour model
    bins: int = 40  # of the behaviour model's histogram of one action dimension
    num_critics: int = 4  # members of the ensemble
    min_weight: float = 1.0  # lambda: weight of the smallest critic in the target, against the largest one
    num_samples: int = 3  # N, actions of the behaviour model that a maximum is over, in the target and in acting
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere


def load_data(cfg: Config):
    return load_dataset(cfg.dataset, reward_shift=cfg.reward_shift)


# --- State: arrays only, so that a whole run can be vmapped, compared and saved -----------------------------
class Trainable(NamedTuple):
    params: Any
    opt_state: optax.OptState


class State(NamedTuple):
    key: jax.Array
    behaviour: Trainable
    critic: Trainable
    target_critic: Any


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    pretrain: Callable  # (State, Transition) -> (State, metrics), the first phase
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it


# --- Algorithm -----------------------------------------------------------------------------------------
def mix(q, min_weight):
    """Soft clipped double Q: min_weight times the smallest critic and the rest times the largest, critics on axis 0."""
    return min_weight * q.min(axis=0) + (1 - min_weight) * q.max(axis=0)


def expected_max(values, log_probs, num):
    """E[ max of `num` values drawn with these probabilities ]: (..., n), (..., n) -> (...).

    The maximum is no more than the k-th largest value if no larger one is drawn: (1 - P(larger))^num.
    """
    order = jnp.argsort(-values, axis=-1)
    values, probs = (jnp.take_along_axis(x, order, axis=-1) for x in (values, jnp.exp(log_probs)))
    at_most_next = jnp.maximum(1 - probs.cumsum(axis=-1), 0) ** num
    at_most = jnp.concatenate([jnp.ones_like(at_most_next[..., :1]), at_most_next[..., :-1]], axis=-1)
    return (values * (at_most - at_most_next)).sum(axis=-1)


def make_agent(cfg: Config, spec: Spec) -> Agent:
    if spec.discrete:
        behaviour = CategoricalActor(spec.action_dim, cfg.hidden, "torch")
        critic = DiscreteCritic(spec.action_dim, cfg.num_critics, cfg.hidden, "torch")
    else:
        behaviour = AutoregressiveActor(spec.action_dim, cfg.bins, cfg.hidden)
        critic = Critic(cfg.num_critics, cfg.hidden, "torch")
    adam = optax.adam(cfg.learning_rate)

    def propose(params, obs, key):
        """`num_samples` actions for each state, on a new first axis, and the states repeated along it."""
        obs = jnp.broadcast_to(obs, (cfg.num_samples, *obs.shape))
        if spec.discrete:
            return obs, behaviour.apply(params, obs).sample(key)
        return obs, behaviour.apply(params, obs, key, method="sample")

    def next_value(critic_params, behaviour_params, obs, key):
        if spec.discrete:
            q = mix(critic.apply(critic_params, obs), cfg.min_weight)  # (batch, actions)
            return expected_max(q, jax.nn.log_softmax(behaviour.apply(behaviour_params, obs).logits), cfg.num_samples)
        obs, action = propose(behaviour_params, obs, key)
        return mix(critic.apply(critic_params, obs, action), cfg.min_weight).max(axis=0)

    def behaviour_loss(params, batch):
        if spec.discrete:
            log_prob = behaviour.apply(params, batch.obs).log_prob(batch.action)
        else:
            log_prob = behaviour.apply(params, batch.obs, batch.action, method="log_prob")
        chex.assert_equal_shape([log_prob, batch.reward])
        return -log_prob.mean(), {}

    def critic_loss(params, batch, target):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (cfg.num_critics, *target.shape))
        return ((q - target[None]) ** 2).sum(axis=0).mean(), {"q": q.mean()}

    def init(key):
        key, key_behaviour, key_critic = jax.random.split(key, 3)
        obs = jnp.zeros((1, spec.obs_dim))
        action = jnp.zeros(1, int) if spec.discrete else jnp.zeros((1, spec.action_dim))
        behaviour_params = behaviour.init(key_behaviour, obs, *([] if spec.discrete else [action]))
        critic_params = critic.init(key_critic, obs, action)
        return State(
            key=key,
            behaviour=Trainable(behaviour_params, adam.init(behaviour_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            target_critic=critic_params,
        )

    def pretrain(state, batch):
        new_behaviour, info = descend(adam, behaviour_loss, state.behaviour, batch)
        return state._replace(behaviour=new_behaviour), info

    def update(state, batch):
        key, key_next = jax.random.split(state.key)
        next_v = next_value(state.target_critic, state.behaviour.params, batch.next_obs, key_next)
        target = batch.reward + cfg.discount * (1 - batch.terminal) * next_v
        new_critic, info = descend(adam, critic_loss, state.critic, batch, target)
        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        return State(key, state.behaviour, new_critic, target_critic), info

    def act(state, obs, key):
        obs, action = propose(state.behaviour.params, obs, key)
        best = mix(critic.apply(state.critic.params, obs, action), cfg.min_weight).argmax(axis=0, keepdims=True)
        best = best if spec.discrete else best[..., None]
        return jnp.take_along_axis(action, best, axis=0).squeeze(axis=0)

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
