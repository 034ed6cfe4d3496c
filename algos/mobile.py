"""MOBILE (Model-Bellman Inconsistency): MBPO whose targets are less by how much the members' targets differ.

What matters of a model's error is what it does to values. So the doubt of an imagined row is the deviation, over the
elites, of the value that follows: none where the members disagree on what is worth the same.

Paper      Sun, Zhang, Jia, Lin, Ye & Yu (2023), https://proceedings.mlr.press/v202/sun23q.html
Reference  https://github.com/yihaosun1124/mobile at 4882dce

From equation to code
    L_M, roll-outs, the buffer                                                  as in mbpo.py
    v_i    = mean over n draws s'_k of member i, a'_k ~ pi(.|s'_k), of min_j Qbar_j(s'_k, a'_k)    next_values
    U(s, a) = deviation over the elites of v_i (with K - 1), 0 in rows of the data                 inconsistency, update
    y      = r - beta U(s, a) + discount (1 - d) min_j Qbar_j(s', a')           update
    L_Q, L_pi and L_alpha of SAC                                                critic_loss, actor_loss, alpha_loss

Order of one update   That of mbpo.py: with beta 0, backup_entropy and one learning rate it is the same to the last bit.
Hyper-parameters      beta and horizon: the reference's for each dataset; the others: those of mbpo.py.
Deviations            1. y may be negative: clip_target is the reference's max(y, 0), which is wrong where rewards are.
                      2. alpha has no upper bound (there: 1), and no learning rate falls (the actor's there, to 0).
                      3. Those of mbpo.py.
Run                   python algos/mobile.py --dataset stitch/pointmaze-umaze-v0
"""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

from common.datasets import Transition, load_dataset
from common.environments import Interface, Spec, provenance
from common.networks import Critic, Dynamics, Normal, TanhGaussianActor


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
    learning_rate: float = 1e-3  # Adam of the critics (the reference: 3e-4)
    actor_learning_rate: float = 3e-4  # Adam of the actor and of alpha (the reference: 1e-4)
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers
    discount: float = 0.99  # gamma
    tau: float = 0.02  # Polyak step of the target critic (the reference: 0.005)
    # SAC
    target_entropy: float = -1.0  # H in L_alpha, for each dimension of the action
    # MOBILE
    penalty: float = 1.0  # beta, weight of the inconsistency that targets are reduced by
    num_samples: int = 4  # next states of each elite, n (the reference: 10, slow on a CPU)
    backup_entropy: bool = False  # y with the entropy of the next action, as in SAC
    clip_target: bool = False  # y at least 0: for tasks without negative rewards alone
    pretrain_updates: int = 4_000  # gradient steps of the first phase, the model's fit (there: as long as it improves)
    prepare_interval: int = 250  # gradient steps between two roll-outs (1,000), or two hold-out errors (an epoch)
    num_members: int = 7  # of the ensemble
    num_elites: int = 5  # the members with the smallest hold-out errors, which imagine
    model_hidden: tuple[int, ...] = (200, 200, 200, 200)  # units of the hidden layers of each member
    model_learning_rate: float = 1e-3  # of the members' Adam
    weight_decay: float = 5e-5  # weight of half the sum of squares of the kernels (there: 2.5e-5 to 1e-4 by layer)
    bound_weight: float = 0.01  # weight of the width between the bounds of log sigma^2
    holdout: int = 1_000  # rows that no member is fitted to, at most a fifth of the data
    patience: int = 5  # epochs without an improvement of 1 %, after which a member keeps its snapshot for good
    horizon: int = 5  # steps of a roll-out, k
    rollout_batch_size: int = 2_000  # states that a roll-out starts from (there: 50,000)
    buffer_size: int = 50_000  # imagined rows that are kept, the newest (there: of five roll-outs)
    real_ratio: float = 0.05  # share of a batch that is rows of the data, rounded down to whole rows
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere
    act: Literal["mode", "sample"] = "mode"  # what evaluations take: the most likely action of the policy, or a draw


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


class Buffer(NamedTuple):
    rows: Transition  # (buffer_size, ...), a ring
    next: jax.Array  # where the next row goes
    size: jax.Array  # rows so far, at most buffer_size


class State(NamedTuple):
    key: jax.Array
    actor: Trainable
    critic: Trainable
    target_critic: Any
    log_alpha: Trainable  # of the temperature
    model: Trainable  # the ensemble as it is fitted; here and in the next three, members are the first axis
    snapshot: Any  # the parameters of the smallest hold-out errors, which imagine
    error: jax.Array  # these errors: mean squares, in units of the data
    stale: jax.Array  # epochs of the fit since then
    scale: tuple[jax.Array, jax.Array]  # mean and deviation of the model's inputs
    buffer: Buffer
    report: dict[str, jax.Array]  # metrics that only a roll-out changes


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    policy: Callable  # (State, obs) -> distribution; act is its mode, or a draw
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it
    draw: Callable  # (key, dataset, State, cfg) -> Transition, in part imagined
    prepare: Callable  # (State, dataset) -> (State, dataset), with a roll-out
    pretrain: Callable  # (State, Transition) -> (State, metrics), of the first phase
    pretrain_draw: Callable  # (key, rows, State, cfg) -> Transition, with a first axis of members
    pretrain_prepare: Callable  # (State, dataset) -> (State, rows), with the hold-out errors


# --- Algorithm -----------------------------------------------------------------------------------------
# Keys that SAC does not spend are fold_in(key, number), beyond those of split, whose i-th key is fold_in(key, i)
NEXT, MODEL, ROWS, ROLL_OUT, IMAGINED = range(2**31 - 5, 2**31)
REPORT = "holdout_min", "holdout_max", "zero_rows", "model_terminal", "model_reward", "data_reward"
choose = jax.vmap(jnp.where)  # row by row


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


def real_rows(num, ratio):
    return jnp.arange(num) < jnp.floor(ratio * num)


def mix(key, dataset, state, cfg: Config):
    """A batch whose row i is of the data where i < floor(real_ratio * batch_size), and imagined elsewhere."""
    index = jax.random.randint(jax.random.fold_in(key, IMAGINED), (cfg.batch_size,), 0, state.buffer.size)
    is_real = real_rows(cfg.batch_size, cfg.real_ratio)
    real = Transition(*draw(key, dataset, state, cfg)[:5])  # no other columns
    return jax.tree.map(lambda x, y: choose(is_real, x, y[index]), real, state.buffer.rows)


def store(buffer, rows, valid):
    """The buffer with those of the rows that are valid (n,): after its newest, over its oldest once it is full."""
    capacity = len(buffer.rows.reward)
    chex.assert_axis_dimension_lteq(valid, 0, capacity)
    slot = jnp.where(valid, (buffer.next + jnp.cumsum(valid) - 1) % capacity, capacity)  # there: not written
    written = jax.tree.map(lambda old, new: old.at[slot].set(new, mode="drop"), buffer.rows, rows)
    count = valid.sum()
    return Buffer(written, (buffer.next + count) % capacity, jnp.minimum(buffer.size + count, capacity))


def describe(buffer):
    """Means over the rows of a buffer, for the metrics."""
    rows, filled = buffer.rows, jnp.arange(len(buffer.rows.reward)) < buffer.size
    zero = ~jnp.concatenate([rows.obs, rows.action, rows.next_obs], axis=1).any(axis=1)
    columns = {"zero_rows": zero, "model_terminal": rows.terminal, "model_reward": rows.reward}
    return {name: x.mean(where=filled) for name, x in columns.items()}


def inconsistency(next_value):
    """The deviation of the elites' values (elites, samples, n), each a mean over its samples: (n,)."""
    return next_value.mean(axis=1).std(axis=0, ddof=1)


def pretrain_draw(key, rows, state, cfg: Config):
    """A batch for each member (members, batch_size, ...), of its bootstrap of the data (members, n)."""
    dataset, bootstrap = rows
    column = jax.random.randint(key, (cfg.num_members, cfg.batch_size), 0, bootstrap.shape[1])
    index = jnp.take_along_axis(bootstrap, column, axis=1)
    return jax.tree.map(lambda x: x[index], dataset)


def make_agent(cfg: Config, spec: Spec) -> Agent:
    if spec.discrete:
        raise SystemExit("MOBILE needs continuous actions and this dataset's are discrete: use IQL or BC.")
    if cfg.horizon * cfg.rollout_batch_size > cfg.buffer_size:
        raise SystemExit(f"horizon times rollout_batch_size must be at most buffer_size, which is {cfg.buffer_size}.")
    if cfg.num_elites > cfg.num_members:
        raise SystemExit(f"num_elites must be at most num_members, which is {cfg.num_members}.")
    if cfg.num_elites < 2:
        raise SystemExit("MOBILE needs num_elites of at least 2, since it asks how much they differ.")
    if isinstance(cfg.real_ratio, float) and not 0 <= cfg.real_ratio <= 1:  # of a grid, floats are traced
        raise SystemExit(f"real_ratio must be from 0 to 1, not {cfg.real_ratio}.")
    actor = TanhGaussianActor(spec.action_dim, cfg.hidden)
    critic = Critic(2, cfg.hidden, initializer="torch")
    dynamics = Dynamics(cfg.num_members, spec.obs_dim, cfg.model_hidden, learns_terminal=spec.terminal_of is None)
    adam, model_adam = optax.adam(cfg.learning_rate), optax.adam(cfg.model_learning_rate)
    actor_adam = optax.adam(cfg.actor_learning_rate)

    def predict(params, rows, scale):
        """What each member expects of the rows, and what came of them: (members, n, obs_dim + 1)."""
        prediction = dynamics.apply(params, rows.obs, rows.action, *scale)
        target = jnp.concatenate([rows.next_obs - rows.obs, rows.reward[..., None]], axis=-1)
        return prediction, jnp.broadcast_to(target, prediction.mean.shape)

    def model_loss(params, batch, scale):
        (mean, log_var, logit), target = predict(params, batch, scale)
        nll = ((mean - target) ** 2 * jnp.exp(-log_var) + log_var).mean(axis=(1, 2))
        if logit is not None:
            terminal = jnp.broadcast_to(batch.terminal, logit.shape)
            nll += optax.sigmoid_binary_cross_entropy(logit, terminal).mean(axis=1)
        width = (params["params"]["max_log_var"] - params["params"]["min_log_var"]).sum()
        leaves = jax.tree_util.tree_leaves_with_path(params)
        decay = sum((x**2).sum() / 2 for path, x in leaves if path[-1].key == "kernel")
        return nll.sum() + cfg.bound_weight * width + cfg.weight_decay * decay, {"model_nll": nll.mean()}

    def critic_loss(params, batch, target):
        q = critic.apply(params, batch.obs, batch.action)
        chex.assert_shape(q, (2, *target.shape))
        return ((q - target[None]) ** 2).sum(axis=0).mean(), {"q": q.mean()}

    def actor_loss(params, batch, critic_params, alpha, key):
        action, log_prob = actor.apply(params, batch.obs).sample_and_log_prob(key)
        q = critic.apply(critic_params, batch.obs, action).min(axis=0)
        chex.assert_equal_shape([log_prob, q, batch.reward])
        return (alpha * log_prob - q).mean(), {"entropy": -log_prob.mean()}

    def alpha_loss(log_alpha, entropy):
        return log_alpha * (entropy - cfg.target_entropy * spec.action_dim), {}

    def init(key):
        key_model = jax.random.fold_in(key, MODEL)
        key, key_actor, key_critic = jax.random.split(key, 3)
        obs, action = jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim))
        scale = jnp.zeros(spec.obs_dim + spec.action_dim), jnp.ones(spec.obs_dim + spec.action_dim)
        model_params = dynamics.init(key_model, obs, action, *scale)
        row = Transition(obs, action, jnp.zeros(1), obs, jnp.zeros(1))
        rows = jax.tree.map(lambda x: x.repeat(cfg.buffer_size, axis=0), row)
        actor_params = actor.init(key_actor, obs)
        critic_params = critic.init(key_critic, obs, action)
        log_alpha = jnp.zeros(())
        return State(
            key=key,
            actor=Trainable(actor_params, actor_adam.init(actor_params)),
            critic=Trainable(critic_params, adam.init(critic_params)),
            target_critic=critic_params,
            log_alpha=Trainable(log_alpha, actor_adam.init(log_alpha)),
            model=Trainable(model_params, model_adam.init(model_params)),
            snapshot=model_params,
            error=jnp.full(cfg.num_members, jnp.inf, float),
            stale=jnp.zeros(cfg.num_members),
            scale=scale,
            buffer=Buffer(rows, jnp.zeros((), int), jnp.zeros((), int)),
            report=dict.fromkeys(REPORT, jnp.zeros(())),
        )

    def split_rows(dataset):
        """Held-out rows, the others, and of these a bootstrap for each member; the same whenever it is asked."""
        rows = len(dataset.reward)
        num = min(cfg.holdout, rows // 5)
        if num == 0:
            raise SystemExit(f"The model's fit holds out a fifth of the data, and {rows} rows are too few: it needs 5.")
        key_order, key_bootstrap = jax.random.split(jax.random.fold_in(jax.random.key(cfg.seed), ROWS))
        order = jax.random.permutation(key_order, rows)
        fitted = order[num:]
        bootstrap = jax.random.randint(key_bootstrap, (cfg.num_members, len(fitted)), 0, len(fitted))
        return order[:num], fitted, fitted[bootstrap]

    def keep_best(state, dataset):
        """Takes a snapshot of the members whose error on the held-out rows is 1 % less than ever before."""
        held_out, fitted, _ = split_rows(dataset)
        prediction, target = predict(state.model.params, jax.tree.map(lambda x: x[held_out], dataset), state.scale)
        error = ((prediction.mean - target) ** 2).mean(axis=(1, 2))
        better = (error < 0.99 * state.error) & (state.stale < cfg.patience)
        snapshot = jax.tree.map(lambda new, old: choose(better, new, old), state.model.params, state.snapshot)
        epochs = cfg.prepare_interval * cfg.batch_size / len(fitted)  # from one of these errors to the next
        error, stale = jnp.where(better, error, state.error), jnp.where(better, 0, state.stale + epochs)
        return state._replace(snapshot=snapshot, error=error, stale=stale)

    def errors(state):
        return {"holdout_min": state.error.min(), "holdout_max": state.error.max()}

    def pretrain_prepare(state, dataset):
        _, fitted, bootstrap = split_rows(dataset)
        inputs = jnp.concatenate([dataset.obs, dataset.action], axis=-1)[fitted]
        mean, std, largest = inputs.mean(axis=0), inputs.std(axis=0), jnp.abs(inputs).max(axis=0)
        scale = mean, jnp.where(std > 1e-5 * largest, std, 1.0)  # 1: a constant, but for rounding
        return keep_best(state._replace(scale=scale), dataset), (dataset, bootstrap)

    def pretrain(state, batch):
        new_model, info = descend(model_adam, model_loss, state.model, batch, state.scale)
        return state._replace(model=new_model), info | errors(state)

    def elites(state):
        return jnp.argsort(state.error)[: cfg.num_elites]

    def imagine(state, obs, action, elites, key):
        """A step of the model for each row, of an elite member drawn for it."""
        key_member, key_noise = jax.random.split(key)
        mean, log_var, logit = dynamics.apply(state.snapshot, obs, action, *state.scale)
        member = jax.random.choice(key_member, elites, obs.shape[:1]), jnp.arange(len(obs))
        step = Normal(mean[member], log_var[member] / 2).sample(key_noise)
        next_obs = obs + step[:, :-1]
        terminal = logit[member] > 0 if spec.terminal_of is None else spec.terminal_of(next_obs)
        return Transition(obs, action, step[:, -1], next_obs, terminal.astype(jnp.float32))

    def roll_out(state, dataset):
        """Imagined rows (horizon * rollout_batch_size, ...), and which of them belong to an episode that goes on."""
        key_start, key_steps = jax.random.split(jax.random.fold_in(state.key, ROLL_OUT))

        def step(carry, key):
            obs, alive = carry
            key_action, key_model = jax.random.split(key)
            rows = imagine(state, obs, policy(state, obs).sample(key_action), elites(state), key_model)
            alive &= jnp.isfinite(rows.next_obs).all(axis=1) & jnp.isfinite(rows.reward)  # a model can diverge
            return (rows.next_obs, alive & (rows.terminal == 0)), (rows, alive)

        start = dataset.obs[jax.random.randint(key_start, (cfg.rollout_batch_size,), 0, len(dataset.obs))]
        carry, keys = (start, jnp.ones(len(start), bool)), jax.random.split(key_steps, cfg.horizon)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.scan(step, carry, keys)[1])

    def prepare(state, dataset):
        # Once, for the fit's last steps. A cond would be a select under vmap, and measure before every roll-out
        times = (state.buffer.size == 0).astype(int)
        state = jax.lax.fori_loop(0, times, lambda _, state: keep_best(state, dataset), state)
        buffer = store(state.buffer, *roll_out(state, dataset))
        report = errors(state) | describe(buffer) | {"data_reward": dataset.reward.mean()}
        return state._replace(buffer=buffer, report=report), dataset

    def next_values(state, batch, key):
        """What each elite expects to follow a row, in `num_samples` draws: (elites, samples, n)."""
        key_next, key_action = jax.random.split(key)
        mean, log_var, _ = dynamics.apply(state.snapshot, batch.obs, batch.action, *state.scale)
        best = elites(state)
        shape = cfg.num_elites, cfg.num_samples, *batch.obs.shape
        mean, log_std = (jnp.broadcast_to(x[best, None, :, :-1], shape) for x in (mean, log_var / 2))
        next_obs = batch.obs[None, None] + Normal(mean, log_std).sample(key_next)
        next_action = policy(state, next_obs).sample(key_action)
        return critic.apply(state.target_critic, next_obs, next_action).min(axis=0)

    def update(state, batch):
        key, key_next, key_actor = jax.random.split(state.key, 3)
        alpha = jnp.exp(state.log_alpha.params)
        next_action, next_log_prob = actor.apply(state.actor.params, batch.next_obs).sample_and_log_prob(key_next)
        next_q = critic.apply(state.target_critic, batch.next_obs, next_action).min(axis=0)
        next_v = next_q - alpha * next_log_prob if cfg.backup_entropy else next_q
        imagined = ~real_rows(len(next_v), cfg.real_ratio)
        doubt = imagined * inconsistency(next_values(state, batch, jax.random.fold_in(state.key, NEXT)))
        target = batch.reward - cfg.penalty * doubt + cfg.discount * (1 - batch.terminal) * next_v
        target = jnp.maximum(target, 0) if cfg.clip_target else target
        new_critic, critic_info = descend(adam, critic_loss, state.critic, batch, target)

        new_actor, actor_info = descend(actor_adam, actor_loss, state.actor, batch, new_critic.params, alpha, key_actor)
        new_log_alpha, alpha_info = descend(actor_adam, alpha_loss, state.log_alpha, actor_info["entropy"])

        target_critic = optax.incremental_update(new_critic.params, state.target_critic, cfg.tau)
        state = State(key, new_actor, new_critic, target_critic, new_log_alpha, *state[5:])
        doubt_info = {"inconsistency": doubt.sum() / jnp.maximum(imagined.sum(), 1)}
        return state, {"alpha": alpha} | doubt_info | critic_info | actor_info | alpha_info | state.report

    def policy(state, obs):
        return actor.apply(state.actor.params, obs)

    def act(state, obs, key):
        pi = policy(state, obs)
        return pi.sample(key) if cfg.act == "sample" else pi.mode()

    def q(state, obs, action):
        return critic.apply(state.critic.params, obs, action).min(axis=0)

    return Agent(init, update, act, policy, q, mix, prepare, pretrain, pretrain_draw, pretrain_prepare)


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
