"""EDP: Diffusion-QL whose policy climbs Q by a guess of the action in one step, and not through a chain of steps.

The guess is at hand: cloning has noised the action of the data, and predicts this noise. So steps may be many.

Paper      Kang, Ma, Du, Pang & Yan (2023), https://arxiv.org/abs/2305.20081
Reference  https://github.com/sail-sg/edp at b019648, by the paper's authors: its TD3 loss with --sample_method=dpm

From equation to code
    abar_t = exp(-bmin t / T - (bmax - bmin) t^2 / (2 T^2)), t = 1 .. T                          levels
    x_t  = sqrt(abar_t) a + sqrt(1 - abar_t) eps, eps ~ N(0, 1), a of the data                   add_noise
    xhat_0 = (x_t - sqrt(1 - abar_t) eps_pi(x_t, s, t)) / sqrt(abar_t), clipped                  estimate
    a    = x of the ODE of these noises, from x_T ~ N(0, 1) to t = 1, by DPM-Solver              solver, sample
    y    = r + discount min_j max_i Qbar_j(s', a'_i), a'_i ~ pibar(s')                           update
    L_Q  = E[ (Q_j(s, a) - y)^2 ], summed over the critics j                                     critic_loss
    L_pi = E|eps - eps_pi(x_t, s, t)|^2 - eta E[Q_j(s, xhat_0)] / E|Q_j(s, xhat_0)|              actor_loss
    j is 1 or 2 by chance; the denominator is not differentiated
    pi(s) of num_act_samples draws a: one by softmax(min_j Q_j(s, a))                            act

Order of one update   Q and pi, each by the networks before it, in every fifth update target pi, target Q.
Hyper-parameters      The reference's; tau and the rate are larger, for the short default run.
Deviations            1. Diffusion-QL's schedule ("vp" there, not its default) and network. The page tells them apart.
                      2. The target policy moves from the first update on, and not from the 1,000th.
                      3. The solver's actions are clipped; the two critics' gradients are scaled down together.
                      4. `reward_shift` is not in the paper, which makes AntMaze's rewards -2 and 2 instead.
                      5. Batches are drawn on the device, with replacement. The data's actions are not cut at 0.999.
Run                   python algos/edp.py --dataset stitch/pointmaze-umaze-v0
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import filelock
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orjson
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from common.datasets import load_dataset
from common.environments import Interface, Spec, provenance
from common.networks import Critic, NoiseMLP


# --- Configuration -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    # Experiment
    dataset: str = "stitch/pointmaze-umaze-v0"  # a Minari dataset: local, built, or downloaded
    seed: int = 0  # of the first run: its networks, batches and evaluation
    num_seeds: int = 3  # runs trained in one program, with seeds seed, seed + 1, ...
    num_updates: int = 6_000  # gradient steps (published runs: some 1,000,000)
    eval_interval: int = 2_000  # gradient steps between two evaluations, each with a checkpoint
    eval_episodes: int = 20  # episodes of one evaluation, for each seed; 0: none, and no environment is made
    eval_steps: int = 0  # after as many steps an episode of an evaluation is stopped; 0: the environment's own limit
    log_interval: int = 250  # gradient steps of one compiled call; the progress line moves after each
    out: str = ""  # the run folder; by default runs/ALGORITHM/DATASET
    # Optimisation
    batch_size: int = 256  # transitions of one gradient step
    learning_rate: float = 1e-3  # of every Adam (the reference: 3e-4)
    max_grad_norm: float = 2.0  # a longer gradient is scaled down to this length, the actor's and the critics' each
    hidden: tuple[int, ...] = (256, 256, 256)  # units of the hidden layers
    discount: float = 0.99  # gamma
    tau: float = 0.05  # Polyak step of both targets (the reference: 0.005)
    # EDP
    eta: float = 2.0  # weight of Q, scaled to a mean size of 1, against cloning: 0 is cloning alone
    num_steps: int = 1_000  # T, levels of noise that cloning learns
    solver_steps: int = 15  # calls of the network from noise to an action
    ema_interval: int = 5  # updates between two Polyak steps of the target policy
    num_next_samples: int = 1  # next actions of which the target takes the best (the reference, with max-Q backup: 10)
    num_act_samples: int = 50  # actions from which the one to take is drawn
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere


def load_data(cfg: Config):
    return load_dataset(cfg.dataset, reward_shift=cfg.reward_shift)


def check(cfg: Config, grid: dict[str, list[float]]):
    """Ends with one sentence where a value cannot be what its field needs."""
    types = {field.name: field.type for field in dataclasses.fields(cfg)}
    zero = {"seed", "eval_episodes", "eval_steps", "online_steps", "online_start"}  # what may be 0
    zero |= {"num_updates"} if getattr(cfg, "online_steps", 0) else set()
    for name, kind in types.items():
        value, kind = (grid[name], list[kind]) if name in grid else (getattr(cfg, name), kind)
        try:
            check_type(value, kind, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
        except TypeCheckError:
            raise SystemExit(f"{name} must be {inspect.formatannotation(kind)}, not {value!r}.") from None
        low = 0 if name in zero else 1
        if kind in (int, tuple[int, ...]) and not all(low <= x < 2**31 for x in np.ravel(value)):
            raise SystemExit(f"{name} must be from {low} to {2**31 - 1}, not {value}.")
        if not all(abs(x) < 1e38 for x in np.ravel(value) if isinstance(x, float | int)):  # nor is NaN
            raise SystemExit(f"{name} must be a finite number, not {value}.")
    if cfg.seed + cfg.num_seeds > 2**31:
        raise SystemExit(f"seed + num_seeds must be at most {2**31}, not {cfg.seed + cfg.num_seeds}.")
    read = load_data.__code__.co_names  # names in its text: the data are loaded once, for all points of a grid
    if wrong := [name for name in grid if types.get(name) is not float or name in read or not grid[name]]:
        raise SystemExit(f"A grid has values of float fields that load_data does not read: not so {wrong[0]}.")
    counts = {"num_updates": "eval_interval", "pretrain_updates": "eval_interval", "eval_interval": "log_interval"}
    turn = "prepare_interval" if "prepare_interval" in types else "log_interval"  # which is made of whole cycles
    counts |= {"log_interval": turn, turn: "policy_delay"}
    counts |= {"online_steps": "eval_interval", "online_start": "online_block"}
    for whole, part in counts.items():
        if getattr(cfg, whole, 0) % getattr(cfg, part, 1):
            raise SystemExit(f"{whole} must be a multiple of {part}, which is {getattr(cfg, part)}.")


# --- State: arrays only, so that a whole run can be vmapped, compared and saved -----------------------------
class Trainable(NamedTuple):
    params: Any
    opt_state: optax.OptState


class State(NamedTuple):
    key: jax.Array
    step: jax.Array  # updates so far
    actor: Trainable
    critic: Trainable
    target_actor: Any
    target_critic: Any


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it


# --- Algorithm -----------------------------------------------------------------------------------------
def draw(key, dataset, state, cfg: Config):
    """A batch: rows of the dataset, uniformly and with replacement."""
    index = jax.random.randint(key, (cfg.batch_size,), 0, len(dataset.reward))
    return jax.tree.map(lambda x: x[index], dataset)


def descend(tx, loss_fn, trainable, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, info)`."""
    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable.params, *args)
    updates, opt_state = tx.update(grads, trainable.opt_state, trainable.params)
    params = optax.apply_updates(trainable.params, updates)
    return Trainable(params, opt_state), {loss_fn.__name__: loss, **info}


def levels(t):
    """(signal, noise) = sqrt(abar), sqrt(1 - abar) at times t in (0, 1], a share of T: arrays of numpy.

    The variance-preserving schedule: at t = 1 nearly all is noise, abar = exp(-5.05).
    """
    low, high = 0.1, 10.0  # bmin and bmax
    log_abar = -low * t - 0.5 * (high - low) * t**2
    return np.exp(0.5 * log_abar), np.sqrt(-np.expm1(log_abar))


def at_steps(t, num_steps):
    """(signal, noise) at steps t (...), counted from 0, which are the paper's t + 1: (..., 1) each."""
    columns = levels(np.arange(1, num_steps + 1) / num_steps)
    return tuple(jnp.asarray(column, jnp.float32)[t][..., None] for column in columns)


def add_noise(action, noise, t, num_steps):
    """x_t of actions (..., action_dim), noise of that shape and steps t (...), counted from 0."""
    signal, share = at_steps(t, num_steps)
    return signal * action + share * noise


def estimate(noisy, noise, signal, share):
    """The action in noisy = signal * action + share * noise, within its bounds."""
    return jnp.clip((noisy - share * noise) / signal, -1, 1)


class Solver(NamedTuple):
    """DPM-Solver's numbers: arrays (solver_steps,), whose entry i belongs to the i-th call of the network."""

    t: jax.Array  # the step that the network is told, counted from 0; between the steps that it has learned
    signal: jax.Array  # sqrt(abar) there
    noise: jax.Array  # sqrt(1 - abar) there
    begins: jax.Array  # whether a step of the solver begins there. It has up to three calls
    keep: jax.Array  # of the point where this step began, in the next point
    first: jax.Array  # of the noise where this step began
    change: jax.Array  # of the change of the noise since then


def solver(num_steps, solver_steps) -> Solver:
    """DPM-Solver-fast (https://arxiv.org/abs/2206.00927): steps of third order, and lower ones for the rest.

    With lambda = log(signal / noise), the ODE of a constant noise is solved exactly by signal * x / signal_0 - noise *
    (exp(lambda - lambda_0) - 1) * first. The higher orders add how the noise changes along lambda.
    """
    t = np.linspace(1, 1 / num_steps, solver_steps + 1)
    signal, noise = levels(t)
    ratio = np.log(signal / noise)  # lambda
    orders = [3] * ((solver_steps - 1) // 3) + {1: [1], 2: [2], 0: [2, 1]}[solver_steps % 3]
    rows, begin = [], 0
    for order in orders:
        for at in range(begin, begin + order):
            width, before = ratio[at + 1] - ratio[begin], ratio[at] - ratio[begin]
            weight = np.expm1(width) / 2 if order == 2 else np.expm1(width) / width - 1
            change = 0.0 if at == begin else -noise[at + 1] * weight * width / before
            keep, first = signal[at + 1] / signal[begin], -noise[at + 1] * np.expm1(width)
            rows.append((num_steps * t[at] - 1, signal[at], noise[at], at == begin, keep, first, change))
        begin += order
    return Solver(*(jnp.asarray(column, jnp.float32) for column in zip(*rows, strict=True)))


def sample(predict, key, shape, num_steps, solver_steps):
    """Actions (..., action_dim) of the model `predict(x_t, t)` of the noise in x_t; t (...) counts from 0."""

    def step(points, at):
        begin, x, first = points
        start = estimate(x, predict(x, jnp.full(shape[:-1], at.t)), at.signal, at.noise)
        noise = (x - at.signal * start) / at.noise  # as predicted, but for estimates that are clipped
        begin, first = jnp.where(at.begins, x, begin), jnp.where(at.begins, noise, first)
        return (begin, at.keep * begin + at.first * first + at.change * (noise - first), first), None

    x = jax.random.normal(key, shape)
    (_, x, _), _ = jax.lax.scan(step, (x, x, x), solver(num_steps, solver_steps))
    return jnp.clip(x, -1, 1)


def make_agent(cfg: Config, spec: Spec) -> Agent:
    if spec.discrete:
        raise SystemExit("EDP needs continuous actions and this dataset's are discrete: use IQL or BC.")
    if cfg.num_steps < 2:
        raise SystemExit("num_steps must be at least 2: the solver goes from the last step to the first one.")
    actor = NoiseMLP(spec.action_dim, cfg.hidden)
    critic = Critic(2, cfg.hidden, "torch", activation=jax.nn.mish)
    clip = optax.clip_by_global_norm(cfg.max_grad_norm)
    adam = optax.chain(clip, optax.adam(cfg.learning_rate))

    def propose(params, obs, key):
        """An action of the policy for each of obs."""
        predict = functools.partial(actor.apply, params, obs)
        return sample(predict, key, (*obs.shape[:-1], spec.action_dim), cfg.num_steps, cfg.solver_steps)

    def critic_loss(params, batch, target):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (2, *target.shape))
        return ((q - target[None]) ** 2).sum(axis=0).mean(), {"q": q.mean()}

    def actor_loss(params, batch, critic_params, key):
        key_t, key_noise, key_which = jax.random.split(key, 3)
        t = jax.random.randint(key_t, batch.reward.shape, 0, cfg.num_steps)
        noise = jax.random.normal(key_noise, batch.action.shape)
        noisy = add_noise(batch.action, noise, t, cfg.num_steps)
        predicted = actor.apply(params, batch.obs, noisy, t)
        chex.assert_equal_shape([predicted, noise])
        bc_loss = ((predicted - noise) ** 2).mean()

        action = estimate(noisy, predicted, *at_steps(t, cfg.num_steps))
        q = critic.apply(critic_params, batch.obs, action)
        chex.assert_shape(q, (2, *batch.reward.shape))
        q = jnp.where(jax.random.bernoulli(key_which), q[0], q[1])
        scale = cfg.eta / jax.lax.stop_gradient(jnp.abs(q).mean())
        return bc_loss - scale * q.mean(), {"bc_loss": bc_loss}

    def init(key):
        key, key_actor, key_critic = jax.random.split(key, 3)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        actor_params = actor.init(key_actor, obs, action, jnp.zeros(1, int))
        critic_params = critic.init(key_critic, obs, action)
        return State(
            key=key,
            step=jnp.zeros((), int),
            actor=Trainable(actor_params, adam.init(actor_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            target_actor=actor_params,
            target_critic=critic_params,
        )

    def update(state, batch):
        key, key_next, key_actor = jax.random.split(state.key, 3)
        next_obs = jnp.broadcast_to(batch.next_obs, (cfg.num_next_samples, *batch.next_obs.shape))
        next_q = critic.apply(state.target_critic, next_obs, propose(state.target_actor, next_obs, key_next))
        next_q = next_q.max(axis=1).min(axis=0)  # the best action for each critic, and then the smaller critic
        target = batch.reward + cfg.discount * (1 - batch.terminal) * next_q
        new_critic, critic_info = descend(adam, critic_loss, state.critic, batch, target)

        new_actor, info = descend(adam, actor_loss, state.actor, batch, state.critic.params, key_actor)

        actor_tau = jnp.where(state.step % cfg.ema_interval == 0, cfg.tau, 0.0)  # a step of size 0 changes nothing
        target_actor = optax.incremental_update(new_actor.params, state.target_actor, actor_tau)
        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        state = State(key, state.step + 1, new_actor, new_critic, target_actor, target_critic)
        return state, critic_info | info

    def act(state, obs, key):
        key_action, key_choice = jax.random.split(key)
        obs = jnp.broadcast_to(obs, (cfg.num_act_samples, *obs.shape))
        action = propose(state.actor.params, obs, key_action)
        q = critic.apply(state.critic.params, obs, action).min(axis=0)
        choice = jax.random.categorical(key_choice, q, axis=0)[None, ..., None]
        return jnp.take_along_axis(action, choice, axis=0).squeeze(axis=0)

    def q(state, obs, action):
        return critic.apply(state.critic.params, obs, action).min(axis=0)

    return Agent(init, update, act, q)


# --- Training: the same in every file, and a test keeps it so -----------------------------------------------
def make_train(cfg: Config, agent: Agent, phase: str = "update"):
    """`train(state, dataset)`: `cfg.log_interval` updates and the mean of each metric. Pure: jit it, vmap it."""
    first = "pretrain_" if phase == "pretrain" else ""  # of the two phases that some methods have
    cycle = getattr(agent, first + "cycle", [getattr(agent, phase)])  # updates in turn; the last has every metric
    prepare = getattr(agent, first + "prepare", lambda *unchanged: unchanged)
    draw_batch = getattr(agent, first + "draw", draw)
    interval = getattr(cfg, "prepare_interval", cfg.log_interval)

    def train(state, dataset):
        names = []  # of the metrics, once `step` is traced

        def step(state, rows):
            infos = []
            for update in cycle:
                key, key_batch = jax.random.split(state.key)
                batch = draw_batch(key_batch, rows, state, cfg)
                state, info = update(state._replace(key=key), batch)
                infos.append(info)
            names[:] = info
            values = ([info[name] for info in infos if name in info] for name in names)
            return state, jnp.stack([sum(x) / len(x) for x in values])  # in one array: one kernel

        def steps(state, _):
            state, rows = prepare(state, dataset)
            return jax.lax.scan(lambda state, _: step(state, rows), state, length=interval // len(cycle))

        state, metrics = jax.lax.scan(steps, state, length=cfg.log_interval // interval)
        return state, dict(zip(names, metrics.mean(axis=(0, 1)), strict=True))

    return train


def act_at(cfg: Config, agent: Agent, state, obs, memory, reward, t):
    """(actions, memory) at step `t` of episodes; at their start there is no memory, and the last reward is 0."""
    act = getattr(agent, "act_with_memory", lambda *at: (agent.act(*at[:3]), None))
    key = jax.random.fold_in(jax.random.key(~cfg.seed), t)  # of no use elsewhere: init splits the seed's own key
    return act(state, obs, key, memory, reward)


class Runs:
    """The runs of a folder: each seed at each point of a grid has a row in every array of `fields` and `states`."""

    def __init__(self, cfg: Config, interface: Interface, grid: dict[str, list[float]]):
        self.cfg, self.interface = cfg, interface
        rows = list(itertools.product(*grid.values(), range(cfg.seed, cfg.seed + cfg.num_seeds)))
        self.runs = [{"seed": row[-1], "grid": dict(zip(grid, row, strict=False))} for row in rows]
        self.fields = {name: np.array([run["grid"][name] for run in self.runs], np.float32) for name in grid}
        self.fields["seed"] = np.array([run["seed"] for run in self.runs], np.int32)
        self.mesh = Mesh(jax.local_devices()[: math.gcd(len(self.runs), jax.local_device_count())], "run")
        self.step = -getattr(cfg, "pretrain_updates", 0)  # updates so far; a first phase ends at 0
        self.seconds = {"train_seconds": 0.0, "eval_seconds": 0.0}
        self.metrics, self.lines, self.online, self.episode = {}, [], {}, None  # of advance, evaluate, Online, __call__
        make_agent(cfg, interface.spec)  # refuses what it cannot be, before any compilation
        init, act = self.every(lambda cfg, agent: agent.init(jax.random.key(cfg.seed))), self.every(act_at)
        self.init = lambda: init(self.fields, (), {})
        self.act = lambda obs, t, *episode: act(self.fields, (self.states, obs, *episode), {"t": t})
        q = self.every(lambda cfg, agent, *at: agent.q(*at))
        self.q = (lambda *at: q(self.fields, (self.states, *at), {})) if "q" in Agent._fields else None

    def __call__(self, observation, reward=None):  # see Interface.act
        action, self.episode = self.interface.act(self.act, observation, reward, self.episode)
        return action

    def every(self, function, donate=(), shared_specs=None):
        """`function(cfg, agent, *row, **shared)` of every run, with its row of each array: (fields, rows, shared)."""

        def of_run(fields, row, shared):
            cfg = dataclasses.replace(self.cfg, **fields)
            return function(cfg, make_agent(cfg, self.interface.spec), *row, **shared)

        def of_device(fields, rows, shared):
            if self.mesh.devices[0].platform == "cpu":  # its caches hold the networks of one run: they take turns
                return jax.lax.map(lambda row: of_run(*row, shared), (fields, rows))
            return jax.vmap(of_run, in_axes=(0, 0, None))(fields, rows, shared)

        specs = {"in_specs": (P("run"), P("run"), shared_specs or P()), "out_specs": P("run"), "check_vma": False}
        return jax.jit(jax.shard_map(of_device, mesh=self.mesh, **specs), donate_argnums=donate)

    def lower(self, phase: str, shared):
        train = self.every(lambda cfg, agent, *row, **shared: make_train(cfg, agent, phase)(*row, **shared), donate=1)
        return train.lower(self.fields, (self.states,), shared)

    def advance(self, train, shared, bar):
        infos, started = [], time.perf_counter()
        for _ in range(self.cfg.eval_interval // self.cfg.log_interval):
            self.states, info = train(self.fields, (self.states,), shared)
            infos.append(jax.device_get(info))
            bar.set_postfix({k: f"{x.mean():.3g}" for k, x in infos[-1].items() if k.endswith("loss")}, refresh=False)
            bar.update(self.cfg.log_interval)
        self.step += self.cfg.eval_interval
        self.seconds["train_seconds"] += time.perf_counter() - started
        self.metrics = {name: np.mean([info[name] for info in infos], axis=0) for name in info}

    def save(self, folder: Path):
        states = jax.device_get(self.states._replace(key=jax.random.key_data(self.states.key)))
        saved = {name: getattr(self, name) for name in ("step", "seconds", "metrics", "lines", "online")}
        saved["states"] = flax.serialization.to_state_dict(states)
        write(folder / "checkpoint.msgpack", flax.serialization.msgpack_serialize(saved, in_place=True))  # keeps order

    def evaluate(self, env, folder: Path, bar):
        cfg, columns, started = self.cfg, {}, time.perf_counter()
        if self.step > 0:  # a first phase is not played
            how = {"discount": self.fields.get("discount", getattr(cfg, "discount", 1.0)), "max_steps": cfg.eval_steps}
            columns = env.measure(self.act, self.q, self.fields["seed"], cfg.eval_episodes, **how)
            bar.set_description(f"score {columns['score'].mean():.1f}".replace("score nan", "no score"))
        arrays = self.metrics, jax.device_get([x.params for x in self.states if isinstance(x, Trainable)])
        finite = [np.isfinite(x).reshape(len(self.runs), -1).all(axis=1) for x in jax.tree.leaves(arrays)]
        columns |= {**self.metrics, **self.online.get("columns", {}), "diverged": ~np.all(finite, axis=0)}
        for i, run in enumerate(self.runs):
            self.lines.append({"step": self.step, **run, **{name: column[i] for name, column in columns.items()}})
        write(folder / "metrics.jsonl", *self.lines)
        self.seconds["eval_seconds"] += time.perf_counter() - started


def restore(folder: str | Path, run: int | None = 0, cfg: Config | None = None) -> Runs:
    """A trained policy: `policy = restore("runs/iql/...")`; `env.step(policy(observation))`. run None: all of them."""
    try:
        kept = json.loads((Path(folder) / "config.json").read_text())
        saved = flax.serialization.msgpack_restore((Path(folder) / "checkpoint.msgpack").read_bytes())
        fields = {name: tuple(x) if isinstance(x, list) else x for name, x in kept["config"].items()}
        assert fields["algo"] == Path(__file__).stem, f"a run of {fields['algo']}"
        cfg = cfg or Config(**{field.name: fields[field.name] for field in dataclasses.fields(Config)})
        runs = Runs(cfg, Interface(*kept["interface"]), fields["grid"])
        states = flax.serialization.from_state_dict(like := jax.eval_shape(runs.init), saved["states"])
        states = states._replace(key=jax.random.wrap_key_data(states.key))
        chex.assert_trees_all_equal_shapes_and_dtypes(states, like)
        if run not in (None, *range(len(runs.runs))):
            raise SystemExit(f"{folder} has no run {run}: its seeds, point by point, are 0 to {len(runs.runs) - 1}.")
        if run is not None:
            one, states = runs.runs[run], jax.tree.map(lambda x: x[run, None], states)
            runs = Runs(dataclasses.replace(cfg, seed=one["seed"], num_seeds=1, **one["grid"]), runs.interface, {})
        vars(runs).update({name: saved[name] for name in ("step", "seconds", "metrics", "lines", "online")})
        runs.states = jax.device_put(states)
        return runs
    except Exception as error:  # absent, torn, foreign or of another version, each in its own way
        raise SystemExit(f"{folder} holds no run that {Path(__file__).name} can go on with ({error!r}).") from error


def read(path: Path):  # a JSON object, empty where the file is absent, torn or something else
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(orjson.loads(path.read_bytes()))
    return {}


def write(path: Path, *parts):
    """Bytes, or what becomes JSON (NaN becomes null). A reader, or a kill, finds the old file or the new one whole."""
    style = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE | orjson.OPT_INDENT_2 * (path.suffix == ".json")
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(x if isinstance(x, bytes) else orjson.dumps(x, option=style) for x in parts))
    os.replace(temporary, path)


@contextlib.contextmanager
def hold(folder: Path, about: dict):
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / "lock", timeout=0):
            if not {path.suffix for path in folder.iterdir()} & {".json", ".jsonl", ".msgpack"}:  # no run yet
                write(folder / "config.json", about)
            if read(folder / "config.json").get("config") != json.loads(json.dumps(about["config"])):
                raise SystemExit(f"{folder} holds something else than this very run: choose another --out.")
            yield
    except KeyboardInterrupt:
        raise SystemExit(f"Stopped: the same command goes on from the last checkpoint in {folder}.") from None
    except OSError as error:
        raise SystemExit(f"{folder} is in use, or cannot be written ({error}): choose another --out.") from error


def main(cfg: Config, grid: dict[str, list[float]] | None = None):
    """Trains every seed at every point of `grid`, whose float fields `load_data` does not read; goes on if stopped."""
    algo, grid, pretrain = Path(__file__).stem, grid or {}, getattr(cfg, "pretrain_updates", 0)
    check(cfg, grid)
    out = Path(cfg.out or f"runs/{algo}/{cfg.dataset}")
    with contextlib.suppress(RuntimeError):  # JAX runs already, in a notebook or a test; or there is no home
        rows = cfg.num_seeds * math.prod(map(len, grid.values()))
        jax.config.update("jax_num_cpu_devices", math.gcd(rows, os.cpu_count()))
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "stitch"))
    dataset, env = load_data(cfg)
    env.probe(cfg.eval_episodes)  # says before training what will not be scored
    online = globals()["Online"](cfg, grid, env) if getattr(cfg, "online_steps", 0) else None  # the text below
    started, runs = time.perf_counter(), Runs(cfg, env.interface, grid)
    source = {**provenance(), "device": f"{runs.mesh.size} x {runs.mesh.devices[0].device_kind}"}
    config = {"algo": algo, **dataclasses.asdict(cfg), "out": "", "grid": grid, "data": env.fingerprint}
    with hold(out, {"config": config, "interface": list(env.interface), **source}):
        if (summary := read(out / "summary.json")).get("algo") == algo:
            print(f"{out} holds this very run, finished: to train again, choose another --out or remove it.")
            return summary
        runs.states = runs.init()
        if begin := out if (out / "checkpoint.msgpack").exists() else getattr(cfg, "init", ""):
            runs = restore(begin, None, cfg)
        shared = {"dataset": jax.device_put(dataset, NamedSharding(runs.mesh, P()))}
        phases = ("pretrain", "update")[(runs.step >= 0) + (runs.step >= cfg.num_updates) :]
        trains = {phase: runs.lower(phase, shared).compile() for phase in phases}
        compile_seconds = time.perf_counter() - started
        with tqdm(total=pretrain + cfg.num_updates, initial=pretrain + runs.step, unit="update") as bar:
            if runs.metrics:  # a checkpoint comes before its evaluation
                runs.evaluate(env, out, bar)
            while runs.step < cfg.num_updates:
                runs.advance(trains["pretrain" if runs.step < 0 else "update"], shared, bar)
                runs.save(out)
                runs.evaluate(env, out, bar)
            if online:
                online.train(runs, shared, env, out, bar)
        speed = (pretrain + runs.step) * len(runs.runs) / runs.seconds["train_seconds"]  # of all runs together
        summary = {"algo": algo, "dataset": cfg.dataset, "num_updates": runs.step, "updates_per_second": speed}
        summary |= {"compile_seconds": compile_seconds, **runs.seconds, **env.summary(runs.lines), **source}
        write(out / "summary.json", summary)
    print(f"{algo} on {env.sentence(summary)}, {speed:.0f} updates/s\nTo draw it: python benchmarks/plot.py {out}")
    return read(out / "summary.json")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.partition("\n\n")[0]))
