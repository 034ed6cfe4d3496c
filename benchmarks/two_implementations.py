"""Two implementations on the same arrays: IQL, TD3+BC, CQL and ReBRAC of CORL, and ours.

    python benchmarks/two_implementations.py ours iql
    OTHER/bin/python benchmarks/two_implementations.py corl iql --checkout CORL
    python benchmarks/two_implementations.py compare iql

"ours-torch" in the place of "ours": the same, but IQL's networks begin with weights as PyTorch draws them, like CORL's.
CORL is a checkout of https://github.com/corl-team/CORL; OTHER, an environment that has this project and torch (ReBRAC
needs none: it is in JAX there, too). CORL's code is not in this project, and it is not changed: its networks, its
buffer and its update are imported from its files and called. d4rl, gym, pyrallis and wandb, which these files import
and their updates do not use, are empty modules here.

Equal on both sides: the arrays that `load_data` of our file returns, hence what is done to observations and rewards;
the settings, which are the `standard` protocol's; the seeds' numbers, the environment, where each episode starts, and
that the policy's mode acts. Not equal: initial weights, batches and noise, and what an implementation does in its own
way. A seed is trained alone in CORL, and the seeds together in ours.

Evaluations are a tenth of the updates apart, and those of the second half are kept, from the one at half of the updates
on. The mean of the last five has 50 episodes for each seed, hence less noise than the last one.
"""

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import scipy.stats
import tyro
from sweep import Options as Sweep
from sweep import make_cells, write

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "two-implementations"
COLUMNS = {  # of a comparison: title, and what of the evaluations of one seed, in their order
    "mean of the last five": lambda lines: np.mean([line["score"] for line in lines[-5:]]),
    "last": lambda lines: lines[-1]["score"],
    "at half of the updates": lambda lines: lines[0]["score"],
    "believed value": lambda lines: lines[-1]["believed_value"],
    "true value": lambda lines: lines[-1]["true_value"],
}


@dataclasses.dataclass(frozen=True)
class Options:
    side: Annotated[Literal["ours", "ours-torch", "corl", "compare"], tyro.conf.Positional]
    algo: Annotated[Literal["iql", "td3_bc", "cql", "rebrac"], tyro.conf.Positional]
    checkout: str = ""  # of CORL's repository, for "corl"
    seed: int = 0  # the first one; CORL's seeds that the result file has already are not trained again
    num_seeds: int = 5
    num_updates: int = 20_000
    dataset: str = "stitch/hopper-medium-expert-v1"  # one of the protocol's
    name: str = ""  # of the result files, after the algorithm's; for other data or settings
    set: tuple[str, ...] = ()  # FIELD=VALUE: overrides the protocol, on both sides


def main(options: Options):
    if options.side == "compare":
        for file in sorted(RESULTS.glob(f"{options.algo}{options.name}-ours*.json")):
            theirs = json.loads(result_file(options, "corl").read_text())
            print(f"{file.stem}\n\n{table(json.loads(file.read_text()), theirs)}\n")
        return
    if options.side == "ours-torch" and options.algo != "iql":
        raise SystemExit('"ours-torch" is for iql alone: the other files begin with PyTorch\'s weights already.')
    cfg, module = configure(options)
    begun(options, cfg)  # refuses another configuration before anything is trained
    if options.side != "corl":
        if both := sorted(seeds_of(options) & set(range(cfg.seed, cfg.seed + cfg.num_seeds))):
            raise SystemExit(f"{result_file(options)} has the seeds {both} already: choose another --seed.")
        if options.side == "ours-torch":
            for name in ("GaussianActor", "Critic", "Value"):
                setattr(module, name, functools.partial(getattr(module, name), initializer="torch"))
        out = f"runs/two-implementations/{options.algo}{options.name}-{options.side}-{options.seed}-{options.num_seeds}"
        module.main(dataclasses.replace(cfg, out=out))
        lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        about = json.loads((Path(out) / "config.json").read_text())
        keep(options, cfg, lines, {name: about[name] for name in ("command", "commit", "versions", "device")})
        return
    from common.environments import provenance

    path = Path(options.checkout) / "algorithms" / "offline" / f"{options.algo}.py"
    if not path.exists():
        raise SystemExit(f"{path} is not there: give the folder of CORL's repository as --checkout.")
    source = provenance()
    if options.algo != "rebrac":
        source["versions"]["torch"] = importlib.metadata.version("torch")
        source["device"] = "1 x cpu, 1 thread"
    source["corl"] = "https://github.com/corl-team/CORL at " + commit_of(path)
    data, env = module.load_data(cfg)
    for seed in range(cfg.seed, cfg.seed + cfg.num_seeds):
        if seed not in seeds_of(options):
            keep(options, cfg, train(load_corl(path), options.algo, cfg, data, env, seed), source)


def configure(options: Options):
    """(the Config of the protocol's cell with these options, the module of the algorithm)."""
    protocols = tomllib.loads((HERE / "protocols.toml").read_text())
    (cell,) = make_cells(Sweep("standard", (options.algo,), (options.dataset,), set=options.set), protocols)
    module = importlib.import_module(f"algos.{options.algo}")
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.config.items()}
    settings |= {"seed": options.seed, "num_seeds": options.num_seeds, "num_updates": options.num_updates}
    return module.Config(**settings | {"eval_interval": options.num_updates // 10}), module


# --- CORL's side ---------------------------------------------------------------------------------------


def train(corl, algo, cfg, data, env, seed):
    """The evaluations of one seed of CORL, each as a line of our metrics.jsonl."""
    make = {"iql": make_iql, "td3_bc": make_td3_bc, "cql": make_cql}
    side = make_rebrac(corl, cfg, data, seed) if algo == "rebrac" else in_torch(make[algo], corl, cfg, data, seed)
    update, policy, believed = side  # update: eval_interval gradient steps
    lines = []
    for step in range(cfg.eval_interval, cfg.num_updates + 1, cfg.eval_interval):
        update()
        if 2 * step >= cfg.num_updates:
            columns = env.measure(policy, believed, [seed], cfg.eval_episodes, cfg.discount)
            lines.append({"step": step, "seed": seed, **{name: x[0].tolist() for name, x in columns.items()}})
            print(f"seed {seed}, {step} updates: score {lines[-1]['score']:.1f}", flush=True)
    return lines


def in_torch(make, corl, cfg, data, seed):
    """(update, policy, believed) of one of CORL's files in PyTorch."""
    import torch

    torch.set_num_threads(1)
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    buffer = corl.ReplayBuffer(obs_dim, action_dim, len(data.reward), "cpu")
    with contextlib.redirect_stdout(None):
        buffer.load_d4rl_dataset(
            {
                "observations": data.obs,
                "actions": data.action,
                "rewards": data.reward,
                "next_observations": data.next_obs,
                "terminals": data.terminal,
            }
        )
    corl.set_seed(seed)
    trainer, mode, q = make(corl, cfg, obs_dim, action_dim)

    def update():
        for _ in range(cfg.eval_interval):
            trainer.train(buffer.sample(cfg.batch_size))

    @torch.no_grad()
    def policy(obs, step, memory, reward):
        return mode(torch.as_tensor(obs)).clamp(-1, 1).numpy(), memory

    @torch.no_grad()
    def believed(obs, action):
        obs, action = torch.as_tensor(obs), torch.as_tensor(np.asarray(action))
        return q(obs.flatten(0, 1), action.flatten(0, 1)).reshape(action.shape[:2]).numpy()

    return update, policy, believed


def make_iql(corl, cfg, obs_dim, action_dim):
    """(trainer, mode of the policy, smaller one of the critics), with the settings of our Config."""
    import torch

    actor, critic = corl.GaussianPolicy(obs_dim, action_dim, 1.0), corl.TwinQ(obs_dim, action_dim)
    value = corl.ValueFunction(obs_dim)
    trainer = corl.ImplicitQLearning(
        max_action=1.0,
        actor=actor,
        actor_optimizer=torch.optim.Adam(actor.parameters(), lr=cfg.learning_rate),
        q_network=critic,
        q_optimizer=torch.optim.Adam(critic.parameters(), lr=cfg.learning_rate),
        v_network=value,
        v_optimizer=torch.optim.Adam(value.parameters(), lr=cfg.learning_rate),
        iql_tau=cfg.expectile,
        beta=cfg.beta,
        max_steps=cfg.num_updates,  # of the cosine schedule, as ours
        discount=cfg.discount,
        tau=cfg.tau,
    )
    assert corl.EXP_ADV_MAX == cfg.max_weight
    return trainer, lambda obs: actor(obs).mean, critic


def make_td3_bc(corl, cfg, obs_dim, action_dim):
    """As make_iql."""
    import torch

    nets = [corl.Actor(obs_dim, action_dim, 1.0), *(corl.Critic(obs_dim, action_dim) for _ in range(2))]
    names = "actor", "critic_1", "critic_2"
    adams = [torch.optim.Adam(net.parameters(), lr=cfg.learning_rate) for net in nets]
    trainer = corl.TD3_BC(
        max_action=1.0,
        **dict(zip(names, nets, strict=True)),
        **{f"{name}_optimizer": adam for name, adam in zip(names, adams, strict=True)},
        discount=cfg.discount,
        tau=cfg.tau,
        policy_noise=cfg.policy_noise,
        noise_clip=cfg.noise_clip,
        policy_freq=cfg.policy_delay,
        alpha=cfg.alpha,
    )
    return trainer, nets[0], lambda *at: torch.minimum(nets[1](*at), nets[2](*at))


def make_cql(corl, cfg, obs_dim, action_dim):
    """As make_iql."""
    import torch

    defaults = corl.TrainConfig()
    actor = corl.TanhGaussianPolicy(
        obs_dim, action_dim, 1.0, defaults.policy_log_std_multiplier, orthogonal_init=defaults.orthogonal_init
    )
    layers = len(cfg.hidden)
    critics = [corl.FullyConnectedQFunction(obs_dim, action_dim, defaults.orthogonal_init, layers) for _ in range(2)]
    trainer = corl.ContinuousCQL(
        *(x for net in critics for x in (net, torch.optim.Adam(net.parameters(), lr=cfg.learning_rate))),
        actor,
        torch.optim.Adam(actor.parameters(), lr=cfg.actor_learning_rate),
        target_entropy=cfg.target_entropy * action_dim,
        discount=cfg.discount,
        policy_lr=cfg.actor_learning_rate,  # of the temperature
        soft_target_update_rate=cfg.tau,
        bc_steps=0,
        backup_entropy=cfg.backup_entropy,
        cql_n_actions=cfg.num_samples,
        cql_alpha=cfg.weight,
    )
    return trainer, lambda obs: actor(obs, deterministic=True)[0], lambda *at: torch.minimum(*(q(*at) for q in critics))


def make_rebrac(corl, cfg, data, seed):
    """(update, policy, believed), with the settings of our Config."""
    import jax
    import jax.numpy as jnp
    import optax

    jax.tree_map = jax.tree.map  # the file calls it by its old name
    names = {"states": "obs", "actions": "action", "rewards": "reward", "next_states": "next_obs"}
    names |= {"next_actions": "next_action", "dones": "terminal"}
    buffer = corl.ReplayBuffer(data={name: jnp.asarray(getattr(data, ours)) for name, ours in names.items()})
    key, actor_key, critic_key = jax.random.split(jax.random.PRNGKey(seed), 3)
    width, layers = cfg.hidden[0], len(cfg.hidden)
    nets = [
        corl.DetActor(data.action.shape[1], width, layernorm=False, n_hiddens=layers),
        corl.EnsembleCritic(width, num_critics=2, layernorm=cfg.layer_norm, n_hiddens=layers),
    ]
    actor_params = nets[0].init(actor_key, data.obs[:1])
    actor = corl.ActorTrainState.create(
        apply_fn=nets[0].apply,
        params=actor_params,
        target_params=actor_params,
        tx=optax.adam(cfg.actor_learning_rate),
    )
    critic_params = nets[1].init(critic_key, data.obs[:1], data.action[:1])
    critic = corl.CriticTrainState.create(
        apply_fn=nets[1].apply,
        params=critic_params,
        target_params=critic_params,
        tx=optax.adam(cfg.critic_learning_rate),
    )
    settings = dict(gamma=cfg.discount, actor_bc_coef=cfg.actor_beta, critic_bc_coef=cfg.critic_beta, tau=cfg.tau)
    settings |= dict(policy_noise=cfg.policy_noise, noise_clip=cfg.noise_clip)
    both = functools.partial(corl.update_td3, **settings, normalize_q=True)
    critic_alone = functools.partial(corl.update_td3_no_targets, **settings)
    logged = "critic_loss", "q_min", "actor_loss", "bc_mse_policy", "bc_mse_random", "action_mse"

    @jax.jit
    def interval(carry, buffer):
        def step(i, carry):
            key, actor, critic, metrics = carry
            key, key_batch = jax.random.split(key)
            batch = buffer.sample_batch(key_batch, cfg.batch_size)
            turns = [lambda *at, f=f: f(*at[:3], batch, metrics=at[3]) for f in (both, critic_alone)]
            return jax.lax.cond(i % cfg.policy_delay == 0, *turns, key, actor, critic, metrics)

        return jax.lax.fori_loop(0, cfg.eval_interval, step, carry)

    carry = key, actor, critic, corl.Metrics.create(logged)

    def update():
        nonlocal carry
        carry = interval(carry, buffer)

    act = jax.jit(nets[0].apply)
    q = jax.jit(lambda params, *at: nets[1].apply(params, *at).min(axis=0))

    def policy(obs, step, memory, reward):
        return np.asarray(act(carry[1].params, obs)), memory

    def believed(obs, action):
        obs, action = np.asarray(obs), np.asarray(action)
        q_of = q(carry[2].params, obs.reshape(-1, obs.shape[-1]), action.reshape(-1, action.shape[-1]))
        return np.asarray(q_of).reshape(action.shape[:2])

    return update, policy, believed


def load_corl(path: Path):
    """A file of CORL as a module, with empty ones in the place of what its updates do not use."""
    for name in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["gym"].Env = object  # in the annotations of functions that are not called
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    spec = importlib.util.spec_from_file_location(f"corl_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def commit_of(path: Path):
    """The commit of the checkout that a file is in, and in which the file is unchanged."""
    git = ["git", "-C", str(path.parent)]
    if subprocess.run([*git, "status", "--porcelain", path.name], capture_output=True, text=True, check=True).stdout:
        raise SystemExit(f"{path} has changes: it must be as CORL has it.")
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


# --- Results and their comparison ------------------------------------------------------------------------


def result_file(options, side=None):
    return RESULTS / f"{options.algo}{options.name}-{side or options.side}.json"


def seeds_of(options):
    file = result_file(options)
    return {line["seed"] for line in json.loads(file.read_text())["lines"]} if file.exists() else set()


def begun(options, cfg):
    """What the result file has so far. It is of one configuration, and refused where that is not `cfg`."""
    file = result_file(options)
    config = {"algo": options.algo, **dataclasses.asdict(cfg), "out": "", "hidden": list(cfg.hidden)}
    config = {name: value for name, value in config.items() if name not in ("seed", "num_seeds")}
    result = json.loads(file.read_text()) if file.exists() else {"config": config, "sources": [], "lines": []}
    if any(config[name] != value for name, value in result["config"].items()):  # a field may have come since then
        raise SystemExit(f"{file} has another configuration: choose a --name.")
    return result


def keep(options, cfg, lines, source):
    """Adds seeds to the result file."""
    result = begun(options, cfg)
    columns = ("score", "returns", "believed_value", "true_value")
    for line in [line for line in lines if 2 * line["step"] >= cfg.num_updates]:
        numbers = {name: np.round(line[name], 2).tolist() for name in columns}
        result["lines"].append({"step": line["step"], "seed": line["seed"], **numbers})
    seeds = sorted({line["seed"] for line in lines})
    result["sources"].append({"seeds": seeds, **source})
    text = json.dumps(result, indent=1)
    write(result_file(options), text + "\n")


def values(result, column) -> list[float]:
    """One number for each seed."""
    seeds = sorted({line["seed"] for line in result["lines"]})
    return [float(COLUMNS[column]([x for x in result["lines"] if x["seed"] == seed])) for seed in seeds]


def interval(ours, theirs) -> tuple[float, float]:
    """The 95 % interval of the difference of the means of two samples whose variances may differ (Welch's)."""
    found = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


def table(ours, theirs) -> str:
    """Markdown: each column's mean and standard deviation over the seeds on both sides, and the interval."""
    rows = ["| score | ours | CORL | ours − CORL, 95 % interval | contains 0 | width |"]
    rows.append("| --- | ---: | ---: | ---: | --- | ---: |")
    for column in COLUMNS:
        samples = values(ours, column), values(theirs, column)
        low, high = interval(*samples)
        cells = [f"{np.mean(x):.1f} ± {np.std(x, ddof=1):.1f} ({len(x)})" for x in samples]
        cells += [f"{np.mean(samples[0]) - np.mean(samples[1]):.1f} [{low:.1f}, {high:.1f}]"]
        rows.append(f"| {' | '.join([column, *cells, 'yes' if low <= 0 <= high else 'no', f'{high - low:.1f}'])} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
