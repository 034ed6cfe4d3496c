"""Conservative Q-Learning (CQL): SAC whose critics are pushed down where the policy would go and up where the data are.

Actions that are not in the data are not avoided: their values are held below those of the data's.

Paper      Kumar, Zhou, Tucker & Levine (2020), https://arxiv.org/abs/2006.04779
Reference  https://github.com/aviralkumar2907/CQL at d67dbe9 (d4rl/)

From equation to code
    (4)  gap_j  = log sum_a exp Q_j(s, a) - Q_j(s, a_data), the sum by importance sampling    conservative_gap, propose
         L_Q    = E[ (Q_j(s, a) - y)^2 + weight gap_j ], summed over the critics j            critic_loss
         L_mult = -multiplier weight (E[ gap ] - gap_target), the dual of the weight          multiplier_loss
         y      = r + discount min_j Qbar_j(s', a'),  a' ~ pi(.|s')                           next_value
         L_pi, L_alpha: those of SAC                                                          actor_loss, alpha_loss

Order of one update   Q, (multiplier,) pi (with the new Q), alpha, target, as sac.py; the reference computes all
                      gradients at the old networks, with the new alpha.
Hyper-parameters      weight, max_q_backup, backup_entropy and no multiplier: the reference's README for MuJoCo. Its
                      AntMaze: `lagrange`, gap_target 1. As in both, actor and alpha have a learning rate of their
                      own, which sac.py has not. Steps are larger than its 3e-4, 1e-4 (actor) and 0.005.
Deviations            1. The policy does not clone in its first 40,000 updates (the reference: it hardly matters).
                      2. Two hidden layers of PyTorch's initialisation, log std >= -20 (the reference: three, -5).
                      3. gap_target is the reference's tau / weight, the form of JaxCQL; the multiplier is not clipped.
                      4. As the reference: no 1/2 before the squared error, so that weight is twice the paper's alpha.
                      5. max_q_backup takes the best of num_samples actions, 4 (the reference: of 10).
                      6. Targets start as copies (there: other draws), `reward_shift`, and batches, as sac.py.
Run                   python algos/cql.py --dataset stitch/pointmaze-umaze-v0
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
from common.networks import Critic, TanhGaussianActor


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
    learning_rate: float = 1e-3  # Adam of the critics (the reference: 3e-4)
    actor_learning_rate: float = 3e-4  # Adam of the actor and of alpha (the reference: 1e-4)
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers
    discount: float = 0.99  # gamma
    tau: float = 0.02  # Polyak step of the target critic (the reference: 0.005)
    # SAC
    target_entropy: float = -1.0  # H in L_alpha, for each dimension of the action
    # CQL
    regularizer: Literal["H", "rho", "eq1", "eq2"] = "H"  # CQL(H), CQL(rho), or the paper's eq. 1 or 2 with mu = pi
    weight: float = 5.0  # of the gap in the critics' loss: 0 (with backup_entropy) is SAC
    num_samples: int = 4  # actions of each of the three proposals (the reference: 10, slow on a CPU)
    lagrange: bool = False  # multiply the weight by a learned factor that holds the gap at gap_target
    gap_target: float = 1.0  # with `lagrange`: the factor rises while the gap is larger
    max_q_backup: bool = False  # y with the best of num_samples actions for s', without its entropy
    backup_entropy: bool = False  # y with the entropy of the next action, as in SAC; without max_q_backup only
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere


def load_data(cfg: Config):
    return load_dataset(cfg.dataset, reward_shift=cfg.reward_shift)


# --- State: arrays only, so that a whole run can be vmapped, compared and saved -----------------------------
class Trainable(NamedTuple):
    params: Any
    opt_state: optax.OptState


class State(NamedTuple):
    key: jax.Array
    actor: Trainable
    critic: Trainable
    target_critic: Any
    log_alpha: Trainable  # of the temperature
    log_multiplier: Trainable | None  # of the weight, with `lagrange`


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it


# --- Algorithm -----------------------------------------------------------------------------------------
def conservative_gap(q, log_density, q_data, regularizer):
    """Values that the critics give to proposed actions, less those of the data's.

    q (critics, 3 n, batch): of n actions each of pi(.|s), pi(.|s') and the uniform distribution, at s;
    log_density (3 n, batch): of their proposals; q_data and the gap: (critics, batch).
    """
    chex.assert_shape(q, (*q_data.shape[:1], *log_density.shape))
    if regularizer == "H":
        return jax.nn.logsumexp(q - log_density[None], axis=1) - q_data
    if regularizer == "rho":
        return jax.nn.logsumexp(jnp.concatenate([q, q_data[:, None]], axis=1), axis=1) - q_data
    push_down = q[:, : q.shape[1] // 3].mean(axis=1)
    return push_down if regularizer == "eq1" else push_down - q_data


def make_agent(cfg: Config, spec: Spec) -> Agent:
    if spec.discrete:
        raise SystemExit("CQL needs continuous actions and this dataset's are discrete: use cql_discrete.py.")
    actor = TanhGaussianActor(spec.action_dim, cfg.hidden)
    critic = Critic(2, cfg.hidden, initializer="torch")
    adam = optax.adam(cfg.learning_rate)
    actor_adam = optax.adam(cfg.actor_learning_rate)

    def sample(pi, key):
        """num_samples actions for each state, with their log-probabilities: (num_samples, batch, ...)."""
        return jax.vmap(pi.sample_and_log_prob)(jax.random.split(key, cfg.num_samples))

    def ask(params, obs, actions):
        """Q(s, a_k): actions (k, batch, action_dim) -> (critics, k, batch)."""
        return critic.apply(params, jnp.broadcast_to(obs, (len(actions), *obs.shape)), actions)

    def propose(actor_params, batch, key):
        """Actions of pi(.|s), of pi(.|s') and uniform ones, all of them for s, with their log-densities."""
        key_now, key_then, key_uniform = jax.random.split(key, 3)
        now, log_now = sample(actor.apply(actor_params, batch.obs), key_now)
        then, log_then = sample(actor.apply(actor_params, batch.next_obs), key_then)
        uniform = jax.random.uniform(key_uniform, now.shape, minval=-1, maxval=1)
        log_uniform = jnp.full(log_now.shape, -spec.action_dim * jnp.log(2))
        return jnp.concatenate([now, then, uniform]), jnp.concatenate([log_now, log_then, log_uniform])

    def critic_loss(params, batch, target, proposals, weight):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (2, *target.shape))
        actions, log_density = proposals
        gap = conservative_gap(ask(params, batch.obs, actions), log_density, q, cfg.regularizer)
        chex.assert_equal_shape([gap, q])
        td_loss = ((q - target[None]) ** 2).sum(axis=0).mean()
        info = {"q": q.mean(), "gap": gap.mean(), "td_loss": td_loss, "weight": weight}
        return td_loss + weight * gap.sum(axis=0).mean(), info

    def multiplier_loss(log_multiplier, gap):
        return -jnp.exp(log_multiplier) * cfg.weight * (gap - cfg.gap_target), {}

    def actor_loss(params, batch, critic_params, alpha, key):
        action, log_prob = actor.apply(params, batch.obs).sample_and_log_prob(key)
        q = critic.apply(critic_params, batch.obs, action).min(axis=0)
        chex.assert_equal_shape([log_prob, q, batch.reward])
        return (alpha * log_prob - q).mean(), {"entropy": -log_prob.mean()}

    def alpha_loss(log_alpha, entropy):
        return log_alpha * (entropy - cfg.target_entropy * spec.action_dim), {}

    def init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        actor_params = actor.init(key_actor, obs)
        critic_params = critic.init(key_critic, obs, action)
        log_alpha = jnp.zeros(())
        return State(
            key=key,
            actor=Trainable(actor_params, actor_adam.init(actor_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            target_critic=critic_params,
            log_alpha=Trainable(log_alpha, actor_adam.init(log_alpha)),
            log_multiplier=Trainable(jnp.zeros(()), adam.init(jnp.zeros(()))) if cfg.lagrange else None,
        )

    def next_value(state, obs, alpha, key):
        """The targets' value of pi at `obs`."""
        pi = actor.apply(state.actor.params, obs)
        if cfg.max_q_backup:
            return ask(state.target_critic, obs, sample(pi, key)[0]).max(axis=1).min(axis=0)
        action, log_prob = pi.sample_and_log_prob(key)
        q = critic.apply(state.target_critic, obs, action).min(axis=0)
        return q - alpha * log_prob if cfg.backup_entropy else q

    def update(state, batch):
        key, key_next, key_actor, key_propose = jax.random.split(state.key, 4)  # the first three are SAC's
        alpha = jnp.exp(state.log_alpha.params)
        next_v = next_value(state, batch.next_obs, alpha, key_next)
        target = batch.reward + cfg.discount * (1 - batch.terminal) * next_v
        proposals = propose(state.actor.params, batch, key_propose)
        weight = cfg.weight * (jnp.exp(state.log_multiplier.params) if cfg.lagrange else 1.0)
        new_critic, critic_info = descend(adam, critic_loss, state.critic, batch, target, proposals, weight)
        new_log_multiplier, multiplier_info = None, {}
        if cfg.lagrange:
            args = state.log_multiplier, critic_info["gap"]
            new_log_multiplier, multiplier_info = descend(adam, multiplier_loss, *args)

        new_actor, actor_info = descend(actor_adam, actor_loss, state.actor, batch, new_critic.params, alpha, key_actor)
        new_log_alpha, alpha_info = descend(actor_adam, alpha_loss, state.log_alpha, actor_info["entropy"])

        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        state = State(key, new_actor, new_critic, target_critic, new_log_alpha, new_log_multiplier)
        return state, {"alpha": alpha} | critic_info | actor_info | alpha_info | multiplier_info

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
