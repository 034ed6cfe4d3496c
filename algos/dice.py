"""DICE: how often a policy visits what the data hold, without the behaviour's probabilities.

Learns zeta(s, a), the ratio of the policy's discounted visits to the data's. The value is the mean reward of the data's
rows, each weighed by its ratio. A second function nu presses the ratios until visits flow as the policy has them.

Paper      Yang, Nachum, Dai, Li & Schuurmans (2020), https://arxiv.org/abs/2007.03438; form "dual": DualDICE, Nachum,
           Chow, Dai & Li (2019), https://arxiv.org/abs/1906.04733
Reference  https://github.com/google-research/dice_rl at 0adb2e0, estimators/neural_dice.py, scripts/run_neural_dice.py

From equation to code, with V(s) = E_{a ~ pi} nu(s, a), d = 1 at a terminal and g = discount (1 - d)
    L = kappa E[V(s_0)] + E[zeta (r + g V(s') - nu(s, a)) - alpha zeta^2 / 2]
        + lambda (1 - E[zeta (1 - g)] / kappa),   min over nu and lambda, max over zeta    lagrangian
    estimate = E[zeta r] / E[zeta (1 - g)]        over all rows of the data                Estimates
    "dual": without r in L, without lambda, and zeta of any sign; else zeta is a square    make_agent

Order of one update   nu, zeta and lambda, each with the others as they were before.
Hyper-parameters      The reference's defaults, but for larger steps and a smaller batch, for the short default run.
Deviations            1. Episodes may end: kappa = E[1 - g], where the reference, whose never do, has 1 - discount.
                      2. Gradients are not clipped.
Run                   python algos/dice.py --policy RUN_FOLDER --dataset stitch/icu-sepsis-v0
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
from common.networks import Categorical, Critic, DiscreteCritic, Normal


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
    learning_rate: float = 1e-3  # of the Adam of nu and lambda (the reference: 1e-4)
    zeta_learning_rate: float = 1e-3  # of that of zeta (the reference: 1e-4)
    hidden: tuple[int, ...] = (64, 64)  # units of the hidden layers
    discount: float = 0.99  # gamma
    # DICE
    form: Literal["best", "dual"] = "best"  # with rewards, lambda and zeta >= 0 in L; or DualDICE, without them
    alpha: float = 1.0  # weight of the regularisation zeta^2 / 2
    policy: str = ""  # folder of the run whose policy is evaluated; seed s has its run s mod their number
    act: Literal["mode", "sample"] = "mode"  # what the evaluated policy does: its most likely action, or a draw


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
    dataset, env = load_dataset(cfg.dataset, columns=("episode",))
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
    players: Trainable  # nu, zeta and lam, which is lambda
    ended: jax.Array  # share of the data's rows that are terminal
    policy: Any  # the evaluated policy's own state, which never changes


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    policy: Callable | None  # (State, obs) -> distribution; act is its mode, or a draw; None: the policy has no density
    q: Callable  # (State, obs, action) -> zeta, the ratio by which the estimate weighs that row
    draw: Callable  # (key, dataset, State, cfg) -> Transition, of rows and of starts
    prepare: Callable  # (State, dataset) -> (State, dataset), with the share of terminal rows


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


def draw_both(key, dataset, state, cfg: Config):
    """A batch of rows, of which `start` is 0, and as many first rows of episodes, of which it is 1."""
    key_rows, key_start = jax.random.split(key)
    number = jax.random.randint(key_start, (cfg.batch_size,), 0, dataset.episode[-1] + 1)
    index = jnp.searchsorted(dataset.episode, number)  # the first row of each
    rows, first = draw(key_rows, dataset, state, cfg), jax.tree.map(lambda x: x[index], dataset)
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), rows, first)
    return both._replace(start=jnp.repeat(jnp.array([0.0, 1.0]), cfg.batch_size))


def lagrangian(batch, v, nu, zeta, lam, kappa, discount, alpha, with_reward=True):
    """L, of rows (start 0: v is V(s'), nu and zeta are of s, a) and starts (1: v is V(s_0)), half of each."""
    chex.assert_equal_shape([v, nu, zeta, batch.reward, batch.start])
    goes_on = discount * (1 - batch.terminal)
    of_row = zeta * (with_reward * batch.reward + goes_on * v - nu) - alpha * zeta**2 / 2
    of_row += lam * (1 - zeta * (1 - goes_on) / kappa)
    return 2 * jnp.where(batch.start == 1, kappa * v, of_row).mean()


def evaluated(cfg: Config, spec: Spec):
    """(state, agent) of the policy; without a folder a fixed one, for tests."""

    def fixed(state, obs):
        zeros = jnp.zeros((*obs.shape[:-1], spec.action_dim))
        return Categorical(zeros) if spec.discrete else Normal(zeros, zeros)

    def act(state, obs, key):
        return fixed(state, obs).sample(key) if cfg.act == "sample" else fixed(state, obs).mode()

    if not cfg.policy:
        return (), Agent(None, None, act, fixed, *[None] * 3)
    runs, make, rows = frozen(cfg.policy, cfg.act)
    state, fields = jax.tree.map(lambda x: jnp.asarray(x)[cfg.seed % len(runs.runs)], rows)
    agent = make(dataclasses.replace(runs.cfg, **fields), runs.interface.spec)
    if hasattr(agent, "act_with_memory"):
        raise SystemExit(f"The policy of {cfg.policy} has a memory: its value is no function of the observation alone.")
    if not spec.discrete and (cfg.act == "mode" or not getattr(agent, "policy", None)):
        raise SystemExit(
            "No ratio of visits exists for a deterministic policy of continuous actions, or one without a density: use "
            "--act sample with a run that has a density, or algos/fqe.py."
        )
    return state, agent


def choices(cfg: Config, spec: Spec, agent, state, obs, key):
    """Actions (k, ...) that the policy may take and their weights (k, ...), whose sum over k is 1; one of a Box."""
    if not spec.discrete:
        return agent.act(state, obs, key)[None], jnp.ones((1, *obs.shape[:-1]))
    actions = jnp.stack([jnp.full(obs.shape[:-1], a) for a in range(spec.action_dim)])
    if cfg.act == "sample" and getattr(agent, "policy", None):
        return actions, jnp.exp(jax.vmap(agent.policy(state, obs).log_prob)(actions))
    return actions, (agent.act(state, obs, key)[None] == actions).astype(float)


def make_agent(cfg: Config, spec: Spec) -> Agent:
    network = DiscreteCritic(spec.action_dim, 1, cfg.hidden) if spec.discrete else Critic(1, cfg.hidden)
    best = cfg.form == "best"
    up, down = optax.chain(optax.adam(cfg.zeta_learning_rate), optax.scale(-1)), optax.adam(cfg.learning_rate)
    tx = optax.multi_transform({"down": down, "up": up}, {"nu": "down", "zeta": "up", "lam": "down"})
    policy_state, pi = evaluated(cfg, spec)

    def ratio(params, obs, action):
        (x,) = network.apply(params["zeta"], obs, action)
        return x**2 if best else x

    def lagrangian_loss(params, state, batch, key):
        at = jnp.where(batch.start[:, None] == 1, batch.obs, batch.next_obs)
        actions, weights = choices(cfg, spec, pi, state.policy, at, key)
        v = (weights * jax.vmap(lambda action: network.apply(params["nu"], at, action)[0])(actions)).sum(axis=0)
        (nu,) = network.apply(params["nu"], batch.obs, batch.action)
        zeta, lam = ratio(params, batch.obs, batch.action), best * params["lam"]
        kappa = 1 - cfg.discount * (1 - state.ended)
        loss = lagrangian(batch, v, nu, zeta, lam, kappa, cfg.discount, cfg.alpha, best)
        return loss, {"nu": nu.mean(), "zeta": zeta.mean(), "lambda": lam}

    def init(key):
        key, key_nu, key_zeta = jax.random.split(key, 3)
        at = jnp.zeros((1, spec.obs_dim)), jnp.zeros(1, int) if spec.discrete else jnp.zeros((1, spec.action_dim))
        params = {"nu": network.init(key_nu, *at), "zeta": network.init(key_zeta, *at), "lam": jnp.zeros(())}
        return State(key, Trainable(params, tx.init(params)), jnp.zeros(()), policy_state)

    def update(state, batch):
        key, key_action = jax.random.split(state.key)
        players, info = descend(tx, lagrangian_loss, state.players, state, batch, key_action)
        return state._replace(key=key, players=players), info

    def prepare(state, dataset):
        return state._replace(ended=dataset.terminal.mean()), dataset

    def act(state, obs, key):
        return pi.act(state.policy, obs, key)

    def q(state, obs, action):
        return ratio(state.players.params, obs, action)

    policy = getattr(pi, "policy", None) and (lambda state, obs: pi.policy(state.policy, obs))
    return Agent(init, update, act, policy, q, draw_both, prepare)


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

    names = "estimate", "estimate_low", "estimate_high", "true_value", "normalization", "effective_rows"

    def __init__(self, cfg: Config, env, runs, dataset):
        self.env, self.runs, self.interface, self.dataset = env, runs, runs.interface, dataset
        self.discount, self.first = cfg.discount, np.flatnonzero(np.diff(dataset.episode, prepend=-1))  # (episodes,)
        if cfg.discount >= 1 and not dataset.terminal.any():
            raise SystemExit(f"No episode of {cfg.dataset} terminates, so visits never end: use --discount below 1.")

        self.fingerprint = env.fingerprint | {"policy": runs.digest}  # of another policy in that folder: another run

    def __getattr__(self, name):
        return getattr(self.env, name)

    def measure(self, policy, q, seeds, num_episodes, discount=1.0, **options):
        own, theirs, data = self.interface, self.env.interface, self.dataset  # the environment has the data's scales

        def play(obs, *episode):
            action, memory = policy(observed(own, obs), *episode)
            return rescaled(own, theirs, action), memory

        options |= {"discount": discount, "q": lambda obs, action: np.zeros(obs.shape[:2])}  # believed of no state
        columns = self.env.measure(play, seeds=seeds, num_episodes=num_episodes, **options)
        parts = [(data.obs[i : i + 8192], data.action[i : i + 8192]) for i in range(0, len(data.obs), 8192)]
        zeta = [q(*(np.broadcast_to(x, (len(seeds), *x.shape)) for x in part)) for part in parts]
        zeta = np.concatenate(zeta, axis=1, dtype=np.float64)  # (runs, n)
        outflow = np.ones_like(zeta) - np.reshape(discount, (-1, 1)) * (1 - data.terminal)[None]
        earned, flow = (np.add.reduceat(zeta * x, self.first, axis=1) for x in (data.reward[None], outflow))
        draws = np.random.default_rng(0).integers(len(self.first), size=(1000, len(self.first)))  # of the bootstrap
        samples = [earned[:, rows].sum(axis=1) / flow[:, rows].sum(axis=1) for rows in draws]
        numbers = earned.sum(axis=1) / flow.sum(axis=1), *np.percentile(samples, [2.5, 97.5], axis=0)
        sizes = flow.sum(axis=1) / outflow.sum(axis=1), zeta.sum(axis=1) ** 2 / (zeta**2).sum(axis=1)
        columns |= dict(zip(self.names, (*numbers, columns["true_value"], *sizes), strict=True))
        return columns | {"believed_value": columns["estimate"]}

    def summary(self, lines):
        last = [line for line in lines if line["step"] == lines[-1]["step"]]
        return self.env.summary(lines) | {name: [line[name] for line in last] for name in self.names}

    def sentence(self, summary):
        rows = [f"{self.env.dataset_id}: discounted return in raw rewards, discount {self.discount:g}, no horizon\n"]
        columns = [summary[name] for name in self.names]
        for seed, grid, *numbers in zip(summary["seeds"], summary["grid"], *columns, strict=True):
            run = self.runs.runs[seed % len(self.runs.runs)]
            estimate, low, high, true, norm, size = np.array(numbers, float)  # None, JSON's NaN, is NaN again
            rows.append(
                f"  seed {run['seed']} {run['grid'] or ''}{grid or ''}: {estimate:.5g} ({low:.5g} to {high:.5g})"
            )
            rows[-1] += f", true value {true:.5g}; ratios add up to {norm:.3g}, {size:,.0f} effective rows\n"
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
