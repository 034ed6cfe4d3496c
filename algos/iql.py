"""Implicit Q-Learning (IQL): improve on the data without ever querying an unseen action.

Paper      Kostrikov, Nair & Levine (2022), https://arxiv.org/abs/2110.06169
Reference  https://github.com/ikostrikov/implicit_q_learning at 09d7002

From equation to code
    L2(u) = |expectile - 1(u < 0)| u^2, the paper's L2_tau            expectile_loss
    (5)  L_V  = E[ L2(Qhat(s, a) - V(s)) ]                            value_loss
    (6)  L_Q  = E[ (r + discount V(s') - Q(s, a))^2 ]                 critic_loss
    (7)  L_pi = E[ -exp(beta (Qhat(s, a) - V(s))) log pi(a|s) ]       actor_loss

Order of one update   V, pi, Q, target: the reference's learner.py, not the paper's two phases.
Hyper-parameters      expectile, beta, reward_shift: the reference's configs/antmaze_config.py and train_offline.py;
                      learning_rate and tau are larger than its 3e-4 and 0.005, for the short default run.
                      MuJoCo: expectile 0.7, beta 3, normalize_reward, reward_shift 0 (configs/mujoco_config.py).
Deviations            1. Batches are drawn on the device, with replacement.
                      2. No dropout on the actor (the reference uses 0.1 on Adroit and Kitchen).
                      3. Data actions are not clipped to +-(1 - 1e-5): the density is finite on the bounds.
Images                random_shift: V, Q and pi see the same shift of s, and s' has its own, as in jaxrl2's pixel_iql.
On-line               The union of data and own rows, samples of the policy, a constant rate: its train_finetune.py.
Run                   python algos/iql.py --dataset stitch/pointmaze-umaze-v0 --num-seeds 3
"""

import contextlib
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import time
import types
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
from common.networks import CategoricalActor, Critic, DiscreteCritic, GaussianActor, Value, image_encoder, random_shift
from common.stepper import Stepper, time_limit


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
    learning_rate: float = 1e-3  # of every Adam; the actor's decays to 0 along a cosine (the reference: 3e-4)
    hidden: tuple[int, ...] = (256, 256)  # units of the hidden layers
    encoder: Literal["identity", "minatar", "nature"] = "identity"  # what images pass first; identity: vectors
    random_shift: int | None = None  # pixels by which images in batches are moved at random, at most; None: not moved
    discount: float = 0.99  # gamma
    tau: float = 0.05  # Polyak step of the target critic (the reference: 0.005)
    # IQL
    expectile: float = 0.9  # of eq. 5, where the paper calls it tau: 0.5 is SARSA, 1 the in-sample maximum
    beta: float = 10.0  # inverse temperature of eq. 7: 0 is behaviour cloning
    max_weight: float = 100.0  # clip of exp(beta A), for stability
    normalize_reward: bool = False  # reward * 1000 / (best - worst episode return)
    reward_shift: float = -1.0  # added to every reward: -1 for tasks with reward 1 at a goal and 0 elsewhere
    act: Literal["mode", "sample"] = "mode"  # what evaluations take: the most likely action of the policy, or a draw
    # Online
    online_steps: int = 0  # steps of each seed in an environment of its own, after num_updates; 0: offline only
    online_start: int = 0  # of these, how many before the first update
    online_block: int = 10  # steps between two turns of the updates; the policy that acts is as many steps old at most
    updates_per_step: int = 1  # gradient steps for each of these steps
    buffer_size: int = 1_000_000  # rows of its own that a seed keeps, the newest
    init: str = ""  # folder of a finished offline run of this file, to begin as; its updates count as num_updates


def load_data(cfg: Config):
    how = {"normalize_reward": cfg.normalize_reward, "reward_shift": cfg.reward_shift}
    return load_dataset(cfg.dataset, images=cfg.online_steps == 0, **how)


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
    actor: Trainable
    critic: Trainable
    target_critic: Any
    value: Trainable


class Agent(NamedTuple):
    init: Callable  # (key) -> State
    update: Callable  # (State, Transition) -> (State, metrics)
    act: Callable  # (State, obs, key) -> action
    policy: Callable  # (State, obs) -> distribution; act is its mode, or a draw
    q: Callable  # (State, obs, action) -> value, as the algorithm believes it
    explore: Callable  # (State, obs, key, step) -> action, of a run that learns on-line


# --- Algorithm -----------------------------------------------------------------------------------------
def draw(key, dataset, state, cfg: Config):
    """A batch: rows of the dataset, uniformly and with replacement; of images, with `random_shift`, each one moved."""
    batch = dataset.take(jax.random.randint(key, (cfg.batch_size,), 0, len(dataset.reward)))
    if cfg.random_shift is None:
        return batch
    key_obs, key_next = (jax.random.fold_in(key, i) for i in (2, 3))  # randint itself spends what 0 and 1 would give
    obs = random_shift(key_obs, batch.obs, cfg.random_shift)
    return batch._replace(obs=obs, next_obs=random_shift(key_next, batch.next_obs, cfg.random_shift))


def draw_online(key, rows, state, cfg: Config):
    """A batch of the union of the dataset and of what the run has seen itself: all rows are equally likely."""
    dataset, ring = rows
    number = len(dataset.reward)
    index = jax.random.randint(key, (cfg.batch_size,), 0, number + ring.size)
    from_dataset = jax.tree.map(lambda x: x[jnp.minimum(index, number - 1)], dataset)
    own = ring.take(jnp.maximum(index - number, 0))
    return jax.tree.map(lambda x, y: jax.vmap(jnp.where)(index < number, x, y), from_dataset, own)


def descend(tx, loss_fn, trainable, *args):
    """One optimiser step on `loss_fn(params, *args) -> (loss, info)`."""
    (loss, info), grads = jax.value_and_grad(loss_fn, has_aux=True)(trainable.params, *args)
    updates, opt_state = tx.update(grads, trainable.opt_state, trainable.params)
    params = optax.apply_updates(trainable.params, updates)
    return Trainable(params, opt_state), {loss_fn.__name__: loss, **info}


def expectile_loss(u, expectile):
    """Asymmetric squared error: weight `expectile` where u > 0, 1 - `expectile` where u < 0. Any shape."""
    return jnp.abs(expectile - (u < 0)) * u**2


def make_agent(cfg: Config, spec: Spec) -> Agent:
    encoder = image_encoder(cfg.encoder, spec, cfg.random_shift)
    actor = (CategoricalActor if spec.discrete else GaussianActor)(spec.action_dim, cfg.hidden, encoder=encoder)
    if spec.discrete:
        critic = DiscreteCritic(spec.action_dim, 2, cfg.hidden, encoder=encoder)
    else:
        critic = Critic(2, cfg.hidden, encoder=encoder)
    value = Value(cfg.hidden, encoder=encoder)
    adam = optax.adam(cfg.learning_rate)
    constant, rate = cfg.online_steps > 0, cfg.learning_rate  # a rate that has decayed to 0 could not learn on-line
    actor_adam = optax.adam((lambda _: rate) if constant else optax.cosine_decay_schedule(rate, cfg.num_updates))

    def value_loss(params, batch, q):
        v = value.apply(params, batch.obs)
        chex.assert_equal_shape([q, v, batch.reward])
        return expectile_loss(q - v, cfg.expectile).mean(), {"v": v.mean()}

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
        obs = spec.zeros(1)
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

    def policy(state, obs):
        return actor.apply(state.actor.params, obs)

    def act(state, obs, key):
        pi = policy(state, obs)
        return pi.sample(key) if cfg.act == "sample" else pi.mode()

    def q(state, obs, action):
        return critic.apply(state.critic.params, obs, action).min(axis=0)

    def explore(state, obs, key, step):
        return policy(state, obs).sample(key)

    return Agent(init, update, act, policy, q, explore)


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


# --- Online: the same in every file that has it, and a test keeps it so --------------------------------------
class Ring(NamedTuple):
    """The newest rows that a run has seen itself: its row i is in place i % capacity."""

    rows: Transition  # (capacity, ...), or (runs, capacity, ...) with those of all runs on a device
    count: jax.Array  # of all that it has seen
    run: jax.Array | None = None  # which run this is, where the rows are those of all

    @property
    def size(self):
        return jnp.minimum(self.count, self.rows.reward.shape[-1])

    def take(self, index):
        return jax.tree.map(lambda x: x[index] if self.run is None else x[self.run, index], self.rows)


def insert(ring: Ring, rows: Transition, number) -> Ring:
    """The ring with the first `number` of `rows` in the places of its oldest: one program for any number."""
    i, capacity = jnp.arange(len(rows.reward)), len(ring.rows.reward)
    place = jnp.where(i < number, (ring.count + i) % capacity, capacity)  # what is past the end is dropped
    return Ring(jax.tree.map(lambda x, new: x.at[place].set(new, mode="drop"), ring.rows, rows), ring.count + number)


def learn(cfg: Config, agent: Agent, state, run, dataset, ring):
    """The updates of a block. `ring` has the rows of all runs on the device: nothing of it is copied, or changes."""
    cfg = dataclasses.replace(cfg, log_interval=cfg.online_block * cfg.updates_per_step)
    cycle = getattr(agent, "online_cycle", getattr(agent, "cycle", [agent.update]))
    online = types.SimpleNamespace(update=agent.update, cycle=cycle, draw=draw_online)
    state, info = make_train(cfg, online)(state, (dataset, ring._replace(count=ring.count[run], run=run)))
    return (state, run), info  # all that is donated is given back


def explore_at(cfg: Config, agent: Agent, state, obs, t):
    key = jax.random.fold_in(jax.random.key(~cfg.seed), 2**31 - 1)  # below it is what act_at has
    return agent.explore(state, obs, jax.random.fold_in(key, t), t)


class Online:
    """What follows `num_updates`: each run steps an environment of its own, and learns from that and the dataset."""

    def __init__(self, cfg: Config, grid: dict[str, list[float]], env):
        """Ends with one sentence where that cannot be, before any compilation."""
        if not env.probe():
            raise SystemExit(f"Learning on-line needs the environment of {cfg.dataset}, which is {env.score_kind}.")
        self.label = getattr(make_agent(cfg, env.spec), "label", None)  # of rows that wait for the end of their episode
        self.height = cfg.online_block + (time_limit(env) if self.label else 0)  # of a block
        if cfg.buffer_size < (least := cfg.online_block + time_limit(env)):
            raise SystemExit(f"buffer_size must be at least {least}, an episode of {cfg.dataset} and an online_block.")
        if cfg.eval_interval % cfg.online_block:
            raise SystemExit(f"eval_interval must be a multiple of online_block, which is {cfg.online_block}.")
        if cfg.online_block * cfg.updates_per_step % (delay := getattr(cfg, "policy_delay", 1)):
            raise SystemExit(f"online_block * updates_per_step must be a multiple of policy_delay, which is {delay}.")
        if cfg.init:
            about, finished = (read(Path(cfg.init) / f"{name}.json") for name in ("config", "summary"))
            theirs = {"online_steps": 0, **about.get("config", {}), "interface": about.get("interface")}
            ours = {"algo": Path(__file__).stem, "seed": cfg.seed, "num_seeds": cfg.num_seeds, "grid": grid}
            ours = orjson.loads(orjson.dumps({**ours, "online_steps": 0, "interface": list(env.interface)}))
            if not finished or (wrong := [name for name in ours if theirs.get(name) != ours[name]]):
                why = f"it has another {wrong[0]}" if finished else "it is none"
                raise SystemExit(f"init must be a finished run that is like this one but offline: {cfg.init}: {why}.")
            begin = hashlib.sha256((Path(cfg.init) / "checkpoint.msgpack").read_bytes()).hexdigest()
            env.fingerprint = {**env.fingerprint, "init": begin[:32]}  # for config.json

    def train(self, runs: Runs, shared, env, out: Path, bar):
        """Steps and learns in turn, to the end; evaluates and saves like `main`."""
        cfg, kept, seeds = runs.cfg, runs.online, runs.fields["seed"]
        capacity = min(cfg.buffer_size, cfg.online_steps)
        ring = jax.tree.map(lambda x: np.zeros((len(seeds), capacity, *x.shape[1:]), x.dtype), shared["dataset"])
        ring = Ring(ring, np.zeros(len(seeds), np.int32))
        ring = flax.serialization.from_state_dict(ring, kept.get("ring", flax.serialization.to_state_dict(ring)))
        of_runs = {"in_specs": P("run"), "out_specs": P("run"), "check_vma": False}
        add = jax.jit(jax.shard_map(jax.vmap(insert), mesh=runs.mesh, **of_runs), donate_argnums=0)
        run = np.arange(len(seeds)) % (len(seeds) // runs.mesh.size)  # places of the runs, each on its device
        ring, run = jax.device_put((ring, run), NamedSharding(runs.mesh, P("run")))
        explore, update = runs.every(explore_at), runs.every(learn, 1, {"dataset": P(), "ring": P("run")})

        def act(obs, t):
            return explore(runs.fields, (runs.states, obs[:, None]), {"t": t})[:, 0]

        with contextlib.closing(Stepper(env, seeds, self.height, self.label, kept.get("stepper"))) as stepper:
            bar.reset(cfg.online_steps)
            bar.update(stepper.steps)
            while stepper.steps < cfg.online_steps:
                infos, since = [], [len(returns) for returns in stepper.returns]
                for _ in range(cfg.eval_interval // cfg.online_block):
                    rows, number = stepper.collect(act, cfg.online_block)
                    started = time.perf_counter()
                    ring = add(ring, rows, number)
                    if stepper.steps > cfg.online_start:
                        (runs.states, run), info = update(runs.fields, (runs.states, run), {**shared, "ring": ring})
                        infos.append(jax.device_get(info))
                    runs.seconds["train_seconds"] += time.perf_counter() - started
                    bar.update(cfg.online_block)
                runs.step += cfg.eval_interval
                runs.metrics = {name: np.mean([info[name] for info in infos], axis=0) for name in (infos or [{}])[0]}
                runs.seconds |= stepper.seconds
                runs.online = {"columns": stepper.columns(since), "stepper": stepper.save()}
                runs.online["ring"] = flax.serialization.to_state_dict(jax.device_get(ring))
                runs.save(out)
                runs.evaluate(env, out, bar)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.partition("\n\n")[0]))
