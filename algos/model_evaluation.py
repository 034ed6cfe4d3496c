"""Model-based evaluation: what a policy is worth in a model of the task that is fitted to the data.

An ensemble learns how the task goes on from a state and an action. The policy then plays in it, from the observations
in which the data's episodes begin. With Discrete states and actions the model is the data's own frequencies.

Paper      Fu et al. (2021), "DOPE", https://arxiv.org/abs/2103.16596, appendix: the model-based estimators
Reference  https://github.com/google-research/google-research, policy_eval/model_based.py; the ensemble is mbpo.py's

From equation to code
    L = E[ w_i(e) (-log N(s' - s, r; f_i(s, a), sigma_i^2(s, a)) - log p_i(d | s, a)) ], members i    model_loss
    w_i(e) ~ Exp(1): each member has its own bootstrap of the episodes e; a tenth of them is held out   bootstrap
    Q(s_0, a_0) = E sum_{t < horizon} discount^t prod_{k < t} (1 - p(d_k)) r_t, a_t ~ pi                make_agent.q
    counts: Q_{h+1}(s, a) = mean of r + discount (1 - d) sum_a' pi(a'|s') Q_h(s', a') over its rows      counted
    estimate = mean of Q over the first observations and the members                                   Estimates

Order of one update   The members take a step. Every prepare_interval updates: the error on the episodes held out,
                      and a snapshot of each member that improved; snapshots are what the policy plays in.
Hyper-parameters      mbpo.py's, but for a smaller network; the reference has 4 x 256 and roll-outs of 1,000 steps.
Deviations            1. One network for change, reward and end; the reward and the end count by their expectations.
                      2. Members, their bootstrap and the interval: the reference has one model and no interval.
Run                   python algos/model_evaluation.py --policy RUN_FOLDER --dataset stitch/icu-sepsis-v0 --horizon 20
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
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

from common.datasets import aligned, load_dataset
from common.environments import Interface, Spec, provenance
from common.networks import Categorical, Dynamics, Normal


# --- Configuration -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    # Experiment
    dataset: str = "stitch/icu-sepsis-v0"  # a Minari dataset: local, built, or downloaded
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
    learning_rate: float = 1e-3  # of Adam
    hidden: tuple[int, ...] = (200, 200)  # units of the hidden layers of each member (mbpo.py: four layers)
    discount: float = 0.99  # gamma
    # Model-based evaluation
    policy: str = ""  # folder of the run whose policy is evaluated; seed s has its run s mod their number
    act: Literal["mode", "sample"] = "mode"  # what the evaluated policy does: its most likely action, or a draw
    horizon: int = 100  # steps of an episode in the model, and of those that are played for the true value
    max_starts: int = 500  # first observations that each member's roll-outs start from, at most
    prepare_interval: int = 250  # gradient steps between two errors on the episodes that are held out
    num_members: int = 5  # of the ensemble
    weight_decay: float = 5e-5  # weight of half the sum of squares of the kernels
    bound_weight: float = 0.01  # weight of the width between the bounds of log sigma^2
    holdout: int = 1_000  # rows of the episodes held out that the error is measured on, at most


@functools.cache
def frozen(folder: str, act: str):
    """(All runs of the policy's folder, make_agent of their file, (states, fields) as NumPy arrays)."""
    if not folder:
        raise SystemExit(
            "Say which run to evaluate with --policy FOLDER. This makes a small one: "
            "python algos/iql.py --dataset stitch/icu-sepsis-v0 --num-updates 2000 --out runs/policy"
        )
    try:
        config = json.loads((Path(folder) / "config.json").read_text())["config"]
        module = importlib.import_module(f"algos.{config['algo']}")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise SystemExit(f"{folder} holds no run of a file in algos/ ({error!r}): choose another folder.") from error
    if "policy" in config:
        raise SystemExit(f"{folder} is itself an evaluation: name the folder of its policy, {config['policy']}.")
    with jax.ensure_compile_time_eval():  # it may be asked for while a program is traced
        runs = module.restore(folder, run=None)
        if hasattr(runs.cfg, "act"):
            runs.cfg = dataclasses.replace(runs.cfg, act=act)
        slim = {name: x._replace(opt_state=()) for name, x in runs.states._asdict().items() if hasattr(x, "opt_state")}
        states = runs.states._replace(key=jax.random.key_data(runs.states.key), **slim)
        runs.digest = hashlib.sha256((Path(folder) / "checkpoint.msgpack").read_bytes()).hexdigest()[:32]
        return runs, module.make_agent, jax.device_get((states, runs.fields))


def load_data(cfg: Config):
    """The data on the scale of the evaluated policy: its observations as its networks see them, and its actions."""
    runs, _, _ = frozen(cfg.policy, cfg.act)
    if cfg.num_seeds % (wanted := len(runs.runs)):
        raise SystemExit(f"{cfg.policy} holds {wanted} runs: evaluate all of them with --num-seeds {wanted}.")
    dataset, env = load_dataset(cfg.dataset, columns=("episode", "start"))
    own, theirs = runs.interface, env.interface
    if len({str((x.observation, x.spec[:3], own.spec.discrete and x.action)) for x in (own, theirs)}) > 1:
        raise SystemExit(f"{cfg.policy} has other observations or actions than {cfg.dataset}: choose data of its task.")
    scaled = {"obs": observed(own, dataset.obs), "next_obs": observed(own, dataset.next_obs)}
    scaled["action"] = rescaled(theirs, own, dataset.action)
    dataset = jax.tree.map(aligned, dataset._replace(**scaled))
    return dataset, Estimates(cfg, env, runs, dataset)


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
    model: Trainable  # the ensemble as it is fitted; here and in the next two, members are the first axis
    snapshot: Any  # the parameters of the smallest errors on what is held out; or Q (states, actions) of the counts
    error: jax.Array  # these errors: the mean loss of a row
    scale: tuple[jax.Array, jax.Array]  # mean and deviation of the model's inputs
    limits: tuple[jax.Array, jax.Array]  # smallest and largest next observation and, last, reward: (obs_dim + 1,)
    policy: Any  # the evaluated policy's own state, which never changes


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    policy: Callable | None  # (State, obs) -> distribution; act is its mode, or a draw; None: the policy has no density
    q: Callable  # (State, obs, action) -> value in the model: of one roll-out, or of the counts
    prepare: Callable  # (State, dataset) -> (State, dataset), with the errors and snapshots, or the counts


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


def bootstrap(cfg: Config, episode):
    """Which rows are held out (n,), and the weights of the others for each member (members, n): one for an episode."""

    def of_row(number):
        key_held, key_weight = jax.random.split(jax.random.fold_in(key, number))
        return jax.random.uniform(key_held) > 0.9, jax.random.exponential(key_weight, (cfg.num_members,))

    key = jax.random.fold_in(jax.random.key(cfg.seed), 2**31 - 1)
    held, weight = jax.vmap(of_row)(episode)
    return held, jnp.where(held[None], 0.0, weight.T)


def counted(data, weight, pi, discount, horizon, unseen=0.0):
    """Q (states, actions) of `horizon` steps in the model that weighted rows count; `unseen` where there are none."""
    state, next_state = data.obs.argmax(axis=1), data.next_obs.argmax(axis=1)
    number = jnp.zeros(pi.shape).at[state, data.action].add(weight)

    def sweep(_, q):
        target = data.reward + discount * (1 - data.terminal) * (pi * q).sum(axis=1)[next_state]
        total = jnp.zeros(pi.shape).at[state, data.action].add(weight * target)
        return jnp.where(number > 0, total / jnp.where(number > 0, number, 1), unseen)

    return jax.lax.fori_loop(0, horizon, sweep, jnp.zeros(pi.shape))


def at_starts(data, weight, pi, q):
    """The mean of V = sum_a pi(a|s) q(s, a) over the first observations of weighted episodes."""
    v = (pi * q).sum(axis=1)[data.obs.argmax(axis=1)]
    return (v * weight * data.start).sum() / (weight * data.start).sum()


def evaluated(cfg: Config, spec: Spec):
    """(state, agent) of the policy; without a folder a fixed one, for tests."""

    def fixed(state, obs):
        zeros = jnp.zeros((*obs.shape[:-1], spec.action_dim))
        return Categorical(zeros) if spec.discrete else Normal(zeros, zeros)

    def act(state, obs, key):
        return fixed(state, obs).sample(key) if cfg.act == "sample" else fixed(state, obs).mode()

    if not cfg.policy:
        return (), Agent(None, None, act, fixed, None, None)
    runs, make, rows = frozen(cfg.policy, cfg.act)
    state, fields = jax.tree.map(lambda x: jnp.asarray(x)[cfg.seed % len(runs.runs)], rows)
    agent = make(dataclasses.replace(runs.cfg, **fields), runs.interface.spec)
    if hasattr(agent, "act_with_memory"):
        raise SystemExit(f"The policy of {cfg.policy} has a memory: its value is no function of the observation alone.")
    return state, agent


def probabilities(cfg: Config, interface: Interface, agent, state):
    """Of each action in each state, both Discrete, as the policy takes them: (states, actions)."""
    spec, obs = interface.spec, observed(interface, np.eye(interface.spec.obs_dim))
    actions = jnp.stack([jnp.full(len(obs), a) for a in range(spec.action_dim)])
    if cfg.act == "sample" and getattr(agent, "policy", None):
        return jnp.exp(jax.vmap(agent.policy(state, obs).log_prob)(actions)).T
    return (agent.act(state, obs, jax.random.key(0))[None] == actions).astype(float).T


def countable(interface: Interface):
    return interface.spec.discrete and isinstance(interface.observation, dict) and "n" in interface.observation


def make_agent(cfg: Config, spec: Spec) -> Agent:
    policy_state, pi = evaluated(cfg, spec)
    is_counted = cfg.policy and countable(frozen(cfg.policy, cfg.act)[0].interface)
    model = (of_counts if is_counted else of_networks)(cfg, spec, policy_state, pi)

    def act(state, obs, key):
        return pi.act(state.policy, obs, key)

    policy = getattr(pi, "policy", None) and (lambda state, obs: pi.policy(state.policy, obs))
    return Agent(act=act, policy=policy, **model)


def of_counts(cfg: Config, spec: Spec, policy_state, pi):
    def init(key):
        nothing = (jnp.zeros(0),) * 2
        table = jnp.zeros((spec.obs_dim, spec.action_dim))
        return State(key, Trainable((), ()), table, jnp.zeros(0), nothing, nothing, policy_state)

    def prepare(state, dataset):
        chances = probabilities(cfg, frozen(cfg.policy, cfg.act)[0].interface, pi, state.policy)
        table = counted(dataset, jnp.ones(len(dataset.reward)), chances, cfg.discount, cfg.horizon)
        return state._replace(snapshot=table), dataset

    def update(state, batch):
        return state, {"q": state.snapshot.mean()}

    def q(state, obs, action):
        return state.snapshot[obs.argmax(axis=-1), action]

    return {"init": init, "update": update, "q": q, "prepare": prepare}


def of_networks(cfg: Config, spec: Spec, policy_state, pi):
    dynamics = Dynamics(cfg.num_members, spec.obs_dim, cfg.hidden, learns_terminal=True)
    adam = optax.adam(cfg.learning_rate)

    def predict(params, obs, action, scale):
        return dynamics.apply(params, obs, jax.nn.one_hot(action, spec.action_dim) if spec.discrete else action, *scale)

    def losses(params, rows, scale):
        """-log-likelihood of the rows by each member, (members, n), up to factors; after an end there is no change."""
        mean, log_var, logit = predict(params, rows.obs, rows.action, scale)
        target = jnp.concatenate([rows.next_obs - rows.obs, rows.reward[:, None]], axis=1)
        counts = (rows.terminal == 0)[:, None] | (jnp.arange(spec.obs_dim + 1) == spec.obs_dim)[None]
        square = jnp.where(counts[None], mean - target[None], 0.0) ** 2
        nll = (square * jnp.exp(-log_var) + counts[None] * log_var).mean(axis=2)
        return nll + optax.sigmoid_binary_cross_entropy(logit, rows.terminal[None])

    def model_loss(params, batch, scale):
        nll = (bootstrap(cfg, batch.episode)[1] * losses(params, batch, scale)).mean(axis=1)
        width = (params["params"]["max_log_var"] - params["params"]["min_log_var"]).sum()
        leaves = jax.tree_util.tree_leaves_with_path(params)
        decay = sum((x**2).sum() / 2 for path, x in leaves if path[-1].key == "kernel")
        return nll.sum() + cfg.bound_weight * width + cfg.weight_decay * decay, {"model_nll": nll.mean()}

    def init(key):
        key, key_model = jax.random.split(key)
        size = spec.obs_dim + spec.action_dim
        scale = jnp.zeros(size), jnp.ones(size)
        limits = tuple(jnp.full(spec.obs_dim + 1, x, float) for x in (-jnp.inf, jnp.inf))
        params = dynamics.init(key_model, jnp.zeros((1, spec.obs_dim)), jnp.zeros((1, spec.action_dim)), *scale)
        error = jnp.full(cfg.num_members, jnp.inf, float)
        return State(key, Trainable(params, adam.init(params)), params, error, scale, limits, policy_state)

    def prepare(state, dataset):
        action = jax.nn.one_hot(dataset.action, spec.action_dim) if spec.discrete else dataset.action
        inputs = jnp.concatenate([dataset.obs, action], axis=1)
        std = inputs.std(axis=0)
        scale = inputs.mean(axis=0), jnp.where(std > 1e-5, std, 1.0)  # 1: a constant, but for rounding
        seen = jnp.concatenate([dataset.next_obs, dataset.reward[:, None]], axis=1)
        held, _ = bootstrap(cfg, dataset.episode)
        index = jnp.flatnonzero(held, size=min(cfg.holdout, len(held)), fill_value=0)
        rows, valid = jax.tree.map(lambda x: x[index], dataset), (jnp.arange(len(index)) < held.sum())[None]
        error = (losses(state.model.params, rows, scale) * valid).sum(axis=1) / jnp.maximum(valid.sum(), 1)
        better = (error < state.error) | ~valid.any()  # nothing is held out of a few episodes
        choose = jax.vmap(jnp.where)  # member by member
        snapshot = jax.tree.map(lambda new, old: choose(better, new, old), state.model.params, state.snapshot)
        error, limits = jnp.where(better, error, state.error), (seen.min(axis=0), seen.max(axis=0))
        return state._replace(snapshot=snapshot, error=error, scale=scale, limits=limits), dataset

    def update(state, batch):
        model, info = descend(adam, model_loss, state.model, batch, state.scale)
        return state._replace(model=model), info | {"holdout_nll": state.error.mean()}

    def q(state, obs, action):
        """The return of one roll-out for each row (n,), in one member: they share the rows out in blocks."""
        blocks = cfg.num_members, -(-len(obs) // cfg.num_members)
        (low, low_reward), (high, high_reward) = ((x[None, :-1], x[-1]) for x in state.limits)

        def step(carry, key):
            obs, action, factor, total = carry
            key_noise, key_action = jax.random.split(key)
            each = (jnp.resize(x, (*blocks, *x.shape[1:])) for x in (obs, action))
            found = predict(state.snapshot, *each, state.scale)
            mean, log_var, logit = (x.reshape(-1, *x.shape[2:])[: len(obs)] for x in found)
            total += factor * jnp.clip(mean[:, -1], low_reward, high_reward)  # that of the last step, too
            factor *= cfg.discount * jax.nn.sigmoid(-logit)
            obs = jnp.clip(obs + Normal(mean, log_var / 2).sample(key_noise)[:, :-1], low, high)
            return (obs, pi.act(state.policy, obs, key_action), factor, total), None

        start = obs, action, jnp.ones(len(obs)), jnp.zeros(len(obs))
        keys = jax.random.split(jax.random.fold_in(state.key, 2**31 - 1), cfg.horizon)
        return jax.lax.scan(step, start, keys)[0][-1]

    return {"init": init, "update": update, "q": q, "prepare": prepare}


def observed(own: Interface, obs):
    """Flat raw observations as the networks of an interface see them."""
    return ((obs - np.array(own.obs_mean, np.float32)) / np.array(own.obs_scale, np.float32)).astype(np.float32)


def rescaled(here: Interface, there: Interface, action):
    """Actions on the scale of one interface on that of another, beyond -1 and 1 where its bounds are narrower."""
    if here.spec.discrete:
        return action
    (low, high), (low_there, high_there) = here.bounds, there.bounds
    raw = (low + high) / 2 + (high - low) / 2 * np.asarray(action)
    half = np.where(high_there > low_there, (high_there - low_there) / 2, 1)
    return ((raw - (low_there + high_there) / 2) / half).astype(np.float32)


class Estimates:
    """The environment of the data, whose columns and sentence also have the estimate, for which nothing is played."""

    names = "estimate", "estimate_low", "estimate_high", "true_value", "unseen"

    def __init__(self, cfg: Config, env, runs, dataset):
        self.cfg, self.env, self.runs, self.interface, self.dataset = cfg, env, runs, runs.interface, dataset
        first = np.flatnonzero(dataset.start)
        self.longest = np.diff(np.append(first, len(dataset.start))).max()
        first = first[np.linspace(0, len(first) - 1, min(cfg.max_starts, len(first))).astype(int)]
        self.first = dataset.obs[first]  # (starts, obs_dim)

        def choose(_, agent, state, obs):
            if countable(self.interface):
                return probabilities(cfg, self.interface, agent, state)
            keys = jax.random.split(jax.random.key(cfg.seed), cfg.num_members)
            return jax.vmap(lambda key: agent.act(state, obs, key))(keys)

        # Of every run: the first actions (members, starts, ...), or all probabilities (states, actions)
        self.actions = jax.device_get(runs.every(choose)(runs.fields, (runs.states,), {"obs": self.first}))

        self.fingerprint = env.fingerprint | {"policy": runs.digest}  # of another policy in that folder: another run

    def __getattr__(self, name):
        return getattr(self.env, name)

    def measure(self, policy, q, seeds, num_episodes, discount=1.0, max_steps=0):
        own, theirs, run = self.interface, self.env.interface, np.asarray(seeds) % len(self.runs.runs)

        def play(obs, *episode):
            action, memory = policy(observed(own, obs), *episode)
            return rescaled(own, theirs, action), memory

        options = {"discount": discount, "max_steps": max_steps or self.cfg.horizon}  # as many as in the model
        options["q"] = lambda obs, action: np.zeros(obs.shape[:2])  # the model is not asked a second time
        columns = self.env.measure(play, seeds=seeds, num_episodes=num_episodes, **options)
        if countable(own):
            discounts = np.broadcast_to(discount, len(run))
            numbers = [self.of_counts(self.actions[i], x) for i, x in zip(run, discounts, strict=True)]
        else:
            at = np.broadcast_to(self.first, (*self.actions[run].shape[:2], *self.first.shape)), self.actions[run]
            values = np.asarray(q(*(x.reshape(len(run), -1, *x.shape[3:]) for x in at)), np.float64)
            numbers = [self.of_members(x.reshape(self.cfg.num_members, -1)) for x in values]
        estimate, low, high, unseen = np.transpose(numbers)
        numbers = estimate, low, high, columns["true_value"], unseen
        return columns | dict(zip(self.names, numbers, strict=True)) | {"believed_value": estimate}

    def of_members(self, values):
        """(estimate, low, high, NaN) of values (members, starts): resamples have other members and other starts."""
        rng = np.random.default_rng(0)
        draws = [[rng.integers(n, size=n) for n in values.shape] for _ in range(1000)]
        samples = [values[members][:, starts].mean() for members, starts in draws]
        return values.mean(), *np.percentile(samples, [2.5, 97.5]), np.nan

    def of_counts(self, pi, discount):
        """(estimate, low, high, unseen): the model of each of 200 resamples of the episodes is counted anew."""
        data, horizon = self.dataset, self.cfg.horizon
        number = np.cumsum(data.start).astype(int) - 1

        @jax.jit
        def value(count):  # (episodes,)
            weight = count[number]
            return at_starts(data, weight, pi, counted(data, weight, pi, discount, horizon))

        ones, rng = np.ones(number[-1] + 1, np.float32), np.random.default_rng(0)
        samples = [value(x) for x in rng.multinomial(len(ones), ones / len(ones), size=200).astype(np.float32)]
        nothing = data._replace(reward=np.zeros_like(data.reward))  # but for what the unseen would bring: 1
        unseen = at_starts(data, ones[number], pi, counted(nothing, ones[number], pi, 1.0, horizon, unseen=1.0))
        return value(ones), *np.percentile(samples, [2.5, 97.5]), unseen

    def summary(self, lines):
        last = [line for line in lines if line["step"] == lines[-1]["step"]]
        return self.env.summary(lines) | {name: [line[name] for line in last] for name in self.names}

    def sentence(self, summary):
        rows = [f"{self.env.dataset_id}: discounted return in raw rewards, discount {self.cfg.discount:g}, of "]
        rows[0] += f"{self.cfg.horizon} steps (the data's longest episode has {self.longest})\n"
        columns = [summary[name] for name in self.names]
        for seed, grid, *numbers in zip(summary["seeds"], summary["grid"], *columns, strict=True):
            run = self.runs.runs[seed % len(self.runs.runs)]
            estimate, low, high, true, unseen = np.array(numbers, float)  # None, JSON's NaN, is NaN again
            rows.append(
                f"  seed {run['seed']} {run['grid'] or ''}{grid or ''}: {estimate:.5g} ({low:.5g} to {high:.5g})"
            )
            rows[-1] += f", true value {true:.5g}{'' if np.isnan(unseen) else f', {unseen:.0%} leave the data'}\n"
        return "".join(rows) + f"  {len(rows) - 1} estimates"


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
