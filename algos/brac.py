"""Behaviour Regularized Actor Critic (BRAC): an actor-critic that pays for its distance to a cloned behaviour policy.

The policy maximises Q less alpha D(pi, b), so that it leaves the data only where Q promises more than that.

Paper      Wu, Tucker & Nachum (2019), https://arxiv.org/abs/1911.11361
Reference  https://github.com/rail-berkeley/d4rl_evaluations at c93b9d2, folder brac (brac_primal_agent.py)

From equation to code
    b    = argmax_b E[ log b(a|s) ], of an entropy of at least -|A|              behaviour_loss, pretrain
    D(s) = KL(pi, b) or MMD^2(pi, b), by samples; discrete KL exactly            kl, mmd, exact_kl
    y    = r + discount E_pi[ min_j Qbar_j(s', a') - alpha D(s') ]               update
           BRAC-p (value_penalty off): without D in y
    L_Q  = E[ (Q_j(s, a) - y)^2 ], summed over the critics j                     critic_loss
    L_pi = E[ alpha D(s) - min_j Q_j(s, pi(s)) ]                                 actor_loss

Order of one update   First phase: b. Then Q, pi (with the new Q), alpha where it is learned, target.
Hyper-parameters      divergence, value_penalty, num_samples: defaults of brac_primal_agent.py; alpha: train_brac.py;
                      tau is larger and the updates are fewer than the reference's, for the short default run.
Deviations            1. The policy starts as the clone; the reference's starts at random, with 20,000 steps without Q.
                      2. No dual forms of D, which train a network in an inner loop; no entropy term (there 0 too).
                      3. The clone's entropy bonus starts at weight 0, not 1, and is found by plain dual ascent.
                      4. log std is clipped to [-5, 2], not squashed into [-5, 0].
                      5. A learned alpha moves by D from before the policy's step; the reference's by D after it.
                      6. PyTorch's initialisation of every layer; the reference has Keras's.
                      7. Batches are drawn on the device, with replacement.
Run                   python algos/brac.py --dataset stitch/pointmaze-umaze-v0
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
from common.networks import CategoricalActor, Critic, DiscreteCritic, TanhGaussianActor


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
    learning_rate: float = 1e-3  # of every Adam but the actor's
    actor_learning_rate: float = 3e-4  # of the actor's
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers (the reference: 200, 200 and 300, 300)
    discount: float = 0.99  # gamma
    tau: float = 0.05  # Polyak step of the target critic (the reference: 0.005)
    # BRAC
    pretrain_updates: int = 2_000  # gradient steps of the first phase, the cloning of b (the reference: 1,000,000)
    divergence: Literal["kl", "mmd"] = "kl"  # D: KL divergence, or squared maximum mean discrepancy
    value_penalty: bool = True  # D is a part of the value (BRAC-v), or of the actor's loss alone (BRAC-p)
    alpha: float = 1.0  # weight of D: 0 is an actor-critic without it; where it is learned, its first value
    target_divergence: float | None = None  # alpha is learned so that the mean of D is this; None: alpha is fixed
    num_samples: int = 4  # actions of each policy that estimate D
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere


def load_data(cfg: Config):
    return load_dataset(cfg.dataset, reward_shift=cfg.reward_shift)


# --- State: arrays only, so that a whole run can be vmapped, compared and saved -----------------------------
class Trainable(NamedTuple):
    params: Any
    opt_state: optax.OptState


class State(NamedTuple):
    key: jax.Array
    behaviour: Trainable  # b, of the first phase
    entropy_weight: jax.Array  # of b's entropy in that phase
    actor: Trainable
    critic: Trainable
    target_critic: Any
    alpha: Trainable | None  # None: it is fixed


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    pretrain: Callable  # (State, Transition) -> (State, metrics), of the first phase
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it


# --- Algorithm -----------------------------------------------------------------------------------------
def inside(action):
    """Densities of tanh-Gaussians are asked within 1e-3 of the actions' bounds, on which they have none."""
    return jnp.clip(action, -1 + 1e-3, 1 - 1e-3)


def kl(pi, b, key, num_samples):
    """KL(pi, b) in each state: the mean of log pi - log b over samples of pi."""

    def one(key):
        action, log_prob = pi.sample_and_log_prob(key)
        return log_prob - b.log_prob(inside(action))

    return jax.vmap(one)(jax.random.split(key, num_samples)).mean(axis=0)


def mmd(pi, b, key, num_samples):
    """MMD^2(pi, b) in each state: of equally many samples of both, with the kernel exp(-|x - y|_1 / 20)."""

    def mean_kernel(x, y):  # over all pairs of samples (num_samples, ..., action_dim)
        return jnp.exp(-jnp.abs(x[:, None] - y[None]).sum(axis=-1) / 20).mean(axis=(0, 1))

    key_pi, key_b = jax.random.split(key)
    x = jax.vmap(pi.sample)(jax.random.split(key_pi, num_samples))
    y = jax.vmap(b.sample)(jax.random.split(key_b, num_samples))
    return mean_kernel(x, x) - 2 * mean_kernel(x, y) + mean_kernel(y, y)


def exact_kl(pi, b):
    """KL(pi, b) of categorical policies in each state."""
    log_pi, log_b = jax.nn.log_softmax(pi.logits), jax.nn.log_softmax(b.logits)
    return (jnp.exp(log_pi) * (log_pi - log_b)).sum(axis=-1)


def make_agent(cfg: Config, spec: Spec) -> Agent:
    if spec.discrete and cfg.divergence != "kl":
        raise SystemExit(f"BRAC takes --divergence kl with discrete actions, not {cfg.divergence}.")
    if spec.discrete:
        actor = CategoricalActor(spec.action_dim, cfg.hidden, initializer="torch")
        critic = DiscreteCritic(spec.action_dim, 2, cfg.hidden, initializer="torch")
    else:
        actor = TanhGaussianActor(spec.action_dim, cfg.hidden, log_std_min=-5.0)
        critic = Critic(2, cfg.hidden, initializer="torch")
    adam, actor_adam = optax.adam(cfg.learning_rate), optax.adam(cfg.actor_learning_rate)

    def q_and_divergence(actor_params, critic_params, behaviour_params, obs, key):
        """E[ min_j Q_j(s, a) ], a ~ pi(.|s), and D(s): sums over discrete actions, samples of others."""
        pi, b = actor.apply(actor_params, obs), actor.apply(behaviour_params, obs)
        if spec.discrete:
            q = critic.apply(critic_params, obs).min(axis=0)  # (batch, actions)
            return (jax.nn.softmax(pi.logits) * q).sum(axis=-1), exact_kl(pi, b)
        key_action, key_divergence = jax.random.split(key)
        q = critic.apply(critic_params, obs, pi.sample(key_action)).min(axis=0)
        return q, {"kl": kl, "mmd": mmd}[cfg.divergence](pi, b, key_divergence, cfg.num_samples)

    def behaviour_loss(params, batch, entropy_weight, key):
        b = actor.apply(params, batch.obs)
        log_prob = b.log_prob(batch.action if spec.discrete else inside(batch.action))
        entropy = b.entropy() if spec.discrete else -b.sample_and_log_prob(key)[1]
        chex.assert_equal_shape([log_prob, entropy, batch.reward])
        info = {"log_prob": log_prob.mean(), "entropy": entropy.mean()}
        return -(log_prob + entropy_weight * entropy).mean(), info

    def critic_loss(params, batch, target):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (2, *target.shape))
        return ((q - target[None]) ** 2).sum(axis=0).mean(), {"q": q.mean()}

    def actor_loss(params, batch, critic_params, behaviour_params, alpha, key):
        q, divergence = q_and_divergence(params, critic_params, behaviour_params, batch.obs, key)
        chex.assert_equal_shape([q, divergence, batch.reward])
        return (alpha * divergence - q).mean(), {"divergence": divergence.mean()}

    def alpha_loss(alpha, divergence):
        return -alpha * (divergence - cfg.target_divergence), {"alpha": alpha}

    def init(key):
        key, key_behaviour, key_actor, key_critic = jax.random.split(key, 4)
        obs = jnp.zeros((1, spec.obs_dim))
        action = jnp.zeros(1, int) if spec.discrete else jnp.zeros((1, spec.action_dim))
        behaviour_params = actor.init(key_behaviour, obs)
        actor_params = actor.init(key_actor, obs)
        critic_params = critic.init(key_critic, obs, action)
        alpha = jnp.float32(cfg.alpha)
        return State(
            key=key,
            behaviour=Trainable(behaviour_params, adam.init(behaviour_params)),
            entropy_weight=jnp.zeros(()),
            actor=Trainable(actor_params, actor_adam.init(actor_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            target_critic=critic_params,
            alpha=None if cfg.target_divergence is None else Trainable(alpha, adam.init(alpha)),
        )

    def pretrain(state, batch):
        key, key_entropy = jax.random.split(state.key)
        weight = state.entropy_weight
        new_behaviour, info = descend(adam, behaviour_loss, state.behaviour, batch, weight, key_entropy)
        # dual ascent; the entropy of discrete actions, never negative, has no weight
        weight = jnp.maximum(weight + cfg.learning_rate * (-spec.action_dim - info["entropy"]), 0)
        new_actor = state.actor._replace(params=new_behaviour.params)
        return state._replace(key=key, behaviour=new_behaviour, entropy_weight=weight, actor=new_actor), info

    def update(state, batch):
        key, key_next, key_actor = jax.random.split(state.key, 3)
        b, alpha = state.behaviour.params, cfg.alpha if state.alpha is None else state.alpha.params
        next_q, next_divergence = q_and_divergence(state.actor.params, state.target_critic, b, batch.next_obs, key_next)
        next_v = next_q - alpha * next_divergence if cfg.value_penalty else next_q
        target = batch.reward + cfg.discount * (1 - batch.terminal) * next_v
        new_critic, info = descend(adam, critic_loss, state.critic, batch, target)

        args = batch, new_critic.params, b, alpha, key_actor
        new_actor, actor_info = descend(actor_adam, actor_loss, state.actor, *args)
        info |= actor_info

        if state.alpha is not None:
            new_alpha, alpha_info = descend(adam, alpha_loss, state.alpha, info["divergence"])
            new_alpha = new_alpha._replace(params=jnp.clip(new_alpha.params, 0, 500))
            state, info = state._replace(alpha=new_alpha), info | alpha_info

        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        return state._replace(key=key, actor=new_actor, critic=new_critic, target_critic=target_critic), info

    def act(state, obs, key):
        return actor.apply(state.actor.params, obs).mode()

    def q(state, obs, action):
        return critic.apply(state.critic.params, obs, action).min(axis=0)

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
