"""Doubly robust estimators (DM, DR, WDR, MAGIC): importance sampling of what a fitted Q-function leaves unexplained.

Q explains most of an episode's return, and only the rest is weighted: less variance than importance sampling, and no
bias where the behaviour's probabilities are right, however wrong Q is. Q comes from a run of fqe.py.

Paper      DR: Jiang & Li (2016), https://arxiv.org/abs/1511.03722
           WDR, MAGIC: Thomas & Brunskill (2016), https://arxiv.org/abs/1604.00923
Reference  https://github.com/clvoloshin/COBS at bc76441: DR; its WDR and MAGIC differ (see the page)

From equation to code, with rho_t, w_t of importance_sampling.py, w_{-1} = 1 and n episodes
    DM   = 1/n sum_i V(s_0)                                                              direct
    DR   = 1/n sum_i V_0,  V_t = V(s_t) + rho_t (r_t + discount V_{t+1} - Q(s_t, a_t))   doubly_robust
    WDR  = sum_i sum_t discount^t [w_t (r_t - Q_t) + w_{t-1} V_t], weights sum to 1      weighted_doubly_robust
    g_j  = WDR to step j, and V(s_{j+1}) from there: DM at j = -1, WDR at the last       partial
    MAGIC = sum_j x_j g_j, x = argmin over the simplex of x'(Omega + b b')x              blend

Order of one update   Nothing is updated.
Hyper-parameters      At most 25 of the g_j; a 90 % interval of WDR for the biases b: the paper's.
Deviations            1. Q is fitted to the same episodes; with fqe.py's --folds each has one that has not seen it.
                      2. MAGIC's own interval takes x as given.
Run                   python algos/doubly_robust.py --fqe FOLDER_OF_FQE
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import tyro

from common.datasets import load_dataset
from common.environments import Interface, Spec
from common.networks import CategoricalActor, TanhGaussianActor


# --- Configuration -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    fqe: str = ""  # folder of a run of fqe.py: it names the policy, the dataset and the discount
    behaviour: str = "clone"  # mu: "clone" or "counts" of the data, "logged" with them, or the folder of a run
    seed: int = 0  # of the clone and of the resamples
    resamples: int = 1_000  # of the episodes, for the interval
    clone_updates: int = 5_000  # gradient steps of the clone
    batch_size: int = 256  # rows of one of them
    learning_rate: float = 1e-3  # of its Adam
    hidden: tuple[int, ...] = (256, 256)  # units of its hidden layers


# --- Estimators: pure functions of episodes, `count` of each, and the discount -------------------------------
class Episodes(NamedTuple):
    """Steps of episodes, each array (episodes, steps). What the mask leaves out is never read."""

    reward: jax.Array
    log_pi: jax.Array  # log-probability, or log-density, of the action that was taken: by the evaluated policy
    log_mu: jax.Array  # by the behaviour
    q: jax.Array  # Q(s_t, a_t) of the action that was taken
    v: jax.Array  # V(s_t) = E_{a ~ pi} Q(s_t, a)
    mask: jax.Array  # True in an episode's steps, which come first; False after them


def log_weights(episodes):
    """log w_t, (episodes, steps). An episode that has ended keeps its last weight: it still stands for its share."""
    return jnp.cumsum(jnp.where(episodes.mask, episodes.log_pi - episodes.log_mu, 0.0), axis=1)


def discounted(episodes, discount):
    """discount^t r_t, and 0 after the end: (episodes, steps)."""
    return jnp.where(episodes.mask, episodes.reward, 0.0) * discount ** jnp.arange(episodes.reward.shape[1])[None]


def total(count, x):
    """Sum over the episodes, each taken `count` times: (episodes, ...) -> (...)."""
    return jnp.dot(count, x, precision="highest")


def direct(episodes, count, discount):
    return total(count, episodes.v[:, 0]) / count.sum()


def doubly_robust(episodes, count, discount):
    """DR by its recursion from the last step: nothing follows the end of an episode."""

    def back(after, step):
        reward, log_pi, log_mu, q, v, mask = step
        value = v + jnp.exp(log_pi - log_mu) * (reward + discount * after - q)
        return jnp.where(mask, value, 0.0), None

    value, _ = jax.lax.scan(
        back, jnp.zeros_like(episodes.reward[:, 0]), jax.tree.map(jnp.transpose, episodes), reverse=True
    )
    return total(count, value) / count.sum()


def weighted_doubly_robust(episodes, count, discount):
    return total(count, partial(episodes, count, discount)[:, -1])


def partial(episodes, count, discount):
    """(episodes, 1 + steps): each episode's part of g_j for j = -1, 0, 1, ...; g_j is their sum."""
    reward, _, _, q, v, mask = episodes
    factor = discount ** jnp.arange(reward.shape[1])[None]
    w = shifted(log_weights(episodes))
    w = w / total(count, w)[None]  # of every step, the weights sum to 1: one that has ended keeps its own
    before = jnp.concatenate([jnp.ones_like(w[:, :1]) / count.sum(), w[:, :-1]], axis=1)
    step = jnp.where(mask, factor * (w * (reward - q) + before * v), 0.0)
    v = jnp.where(mask, v, 0.0)
    after = discount * factor * w * jnp.concatenate([v[:, 1:], jnp.zeros_like(v[:, :1])], axis=1)
    return jnp.concatenate([before[:, :1] * v[:, :1], jnp.cumsum(step, axis=1) + after], axis=1)


def effective_sample_size(episodes, count, discount=None):
    w = shifted(log_weights(episodes)[:, -1])
    return total(count, w) ** 2 / total(count, w**2)


def shifted(log_w):
    """Weights on a scale on which the largest of all episodes is 1: a ratio of their sums is the same."""
    return jnp.exp(log_w - log_w.max(axis=0, keepdims=True))


ESTIMATORS = {
    "DM": direct,
    "DR": doubly_robust,
    "WDR": weighted_doubly_robust,
    "ESS": effective_sample_size,
}


def estimate(episodes, count, discount):
    """{name: number} of every estimator; and "g": at most 25 of the g_j, for MAGIC."""
    numbers = {name: estimator(episodes, count, discount) for name, estimator in ESTIMATORS.items()}
    return numbers | {"g": total(count, partial(episodes, count, discount)[:, steps_of(episodes)])}


def steps_of(episodes):
    return np.unique(np.linspace(0, episodes.reward.shape[1], 25).astype(int))


def bootstrap(episodes, discount, key, resamples):
    """{name: (resamples, ...)}: the estimates from as many whole episodes, drawn with replacement."""
    n = len(episodes.reward)

    def of_resample(key):
        count = jnp.bincount(jax.random.randint(key, (n,), 0, n), length=n)
        return estimate(episodes, count.astype(episodes.reward.dtype), discount)

    return jax.lax.map(of_resample, jax.random.split(key, resamples), batch_size=50)


def blend(omega, bias):
    """The weights x >= 0, sum 1, of estimators with this covariance and these biases: argmin x'(omega + bias bias')x.

    x is proportional to the solution of argmin_{z >= 0} z'Sz / 2 - sum(z), a least-squares problem of S's root.
    """
    error = omega + np.outer(bias, bias)
    size = np.trace(error)
    if not size > 0:  # all are alike
        return np.full(len(bias), 1 / len(bias))
    root = np.linalg.cholesky(error / size + 1e-12 * np.eye(len(bias)))
    x, _ = scipy.optimize.nnls(root.T, np.linalg.solve(root, np.ones(len(bias))))
    return x / x.sum()


def magic(parts, samples):
    """x of `blend`, from each episode's parts (episodes, j) of the g_j and the bootstrap's samples of WDR."""
    g = parts.sum(axis=0)
    low, high = np.nanpercentile(samples, [5, 95])
    low, high = min(low, g[-1]), max(high, g[-1])
    bias = np.maximum(0, np.maximum(low - g, g - high))  # how far it is from the interval
    return blend(len(parts) * np.atleast_2d(np.cov(parts.T)), bias)


def check(episodes):
    """One sentence for episodes from which nothing can be estimated."""
    shapes = [np.shape(x) for x in episodes]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise SystemExit(f"Episodes need arrays of one shape (episodes, steps), and these have {shapes}.")
    mask = np.asarray(episodes.mask)
    if len(mask) < 2:
        raise SystemExit("One episode has no covariance: two or more are needed.")
    inside = mask.astype(bool)
    reward, log_pi, log_mu, q, v = steps = [np.where(inside, x, 0) for x in episodes[:5]]
    rules = {
        "The mask must hold True and False.": mask.dtype == bool,
        "The steps of an episode come first in its row.": inside[:, 0].all()
        and (inside[:, 1:] <= inside[:, :-1]).all(),
        "Rewards, values and log-probabilities must be numbers.": not np.isnan(steps).any()
        and np.isfinite([reward, q, v]).all(),
        "The evaluated policy has an infinite density: it is deterministic.": (log_pi < np.inf).all(),
        "The behaviour has an infinite density: it is deterministic.": (log_mu < np.inf).all(),
        "The behaviour has probability 0 of an action that it took: its probabilities are wrong.": (
            log_mu > -np.inf
        ).all(),
        "No support: the policy gives an action of every episode the probability 0, so that all weights are 0. Use "
        "--act sample, or algos/fqe.py.": (log_pi > -np.inf).all(axis=1).any(),
    }
    for sentence, right in rules.items():
        if not right:
            raise SystemExit(sentence)


# --- The evaluated policy, its Q and the behaviour -------------------------------------------------------------
def load_runs(folder, algo=None):
    """All runs of a folder, and the module of their file."""
    try:
        name = json.loads((Path(folder) / "config.json").read_text())["config"]["algo"]
        module = importlib.import_module(f"algos.{name}")
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise SystemExit(f"{folder} holds no run of a file in algos/ ({error!r}): choose another folder.") from error
    if algo and name != algo:
        raise SystemExit(f"{folder} is a run of {name}.py: make one of fqe.py, with --policy {folder} --act sample.")
    return module.restore(folder, run=None), module


def own_scale(runs, here: Interface, obs, action):
    """Observations and actions on the scale of one interface -> as the networks of the runs see them."""
    own, spec = runs.interface, here.spec
    if (own.observation, own.spec[:3]) != (here.observation, spec[:3]) or (spec.discrete and own.action != here.action):
        raise SystemExit(
            "The behaviour's observations or actions are not the data's: choose a run on data of the task."
        )
    (mean, std), (own_mean, own_std) = (np.float32([x.obs_mean, x.obs_scale]) for x in (here, own))
    if not spec.discrete:
        (middle, half), (own_middle, own_half) = scale(here), scale(own)
        action = ((middle + half * action - own_middle) / own_half).astype(np.float32)
    return {"obs": (obs * std + mean - own_mean) / own_std, "action": action}


def log_prob(runs, here: Interface, obs, action):
    """log pi(a|s) per unit of the environment's actions: (runs, n)."""
    log_p = runs.every(log_prob_of)(runs.fields, (runs.states,), own_scale(runs, here, obs, action))
    return np.asarray(log_p, np.float64) - (0 if here.spec.discrete else np.log(scale(runs.interface)[1]).sum())


def log_prob_of(cfg, agent, state, obs, action):
    policy = getattr(agent, "policy", None)
    if getattr(cfg, "act", "mode") == "sample" and policy is not None:
        return policy(state, obs).log_prob(action)
    if not jnp.issubdtype(action.dtype, jnp.integer) or hasattr(agent, "act_with_memory"):
        raise SystemExit(
            "No ratio of probabilities exists for a policy that is deterministic, has no density or has a memory: use "
            "--act sample with a run that has a density, or the estimate of fqe.py."
        )
    return jnp.where(agent.act(state, obs, jax.random.key(0)) == action, 0.0, -jnp.inf)


def values(runs, obs, action):
    """Q(s, a) and V(s) = E_{a ~ pi} Q(s, a), each (runs, n); V exactly for discrete actions, else of 32 draws."""
    spec = runs.interface.spec

    def of_run(cfg, agent, state, obs, action):
        if spec.discrete:
            actions = jnp.stack([jnp.full(len(obs), a) for a in range(spec.action_dim)])
            weights = jnp.exp(jax.vmap(lambda a: log_prob_of(cfg, agent, state, obs, a))(actions))
        else:
            keys = jax.random.split(jax.random.key(0), 32)
            actions = jax.vmap(lambda key: agent.act(state, obs, key))(keys)
            weights = jnp.full((32, len(obs)), 1 / 32)
        each = jax.vmap(lambda a: agent.q(state, obs, a))(actions)
        return agent.q(state, obs, action), (weights * each).sum(axis=0)

    pair = runs.every(of_run)(runs.fields, (runs.states,), {"obs": obs, "action": action})
    return np.asarray(pair, np.float64)


def cross_fitted(x, seeds, run, num_runs, folds, episode):
    """(critics, n) -> (n,): for each row the mean of the run's critics that were fitted without its episode."""
    used = np.broadcast_to((seeds % num_runs == run)[:, None], x.shape)
    if folds > 1:
        used = used & ((seeds // num_runs % folds)[:, None] == (episode % folds)[None])
    return (x * used).sum(axis=0) / used.sum(axis=0)


def scale(interface):
    low, high = interface.bounds
    return (low + high) / 2, np.where(high > low, (high - low) / 2, 1)


def counts(state, action, num_states, num_actions, prior=0.0):
    """mu(a|s) = (n(s, a) + prior) / (n(s) + prior * num_actions): (num_states, num_actions). Integers (n,)."""
    n = np.zeros((num_states, num_actions))
    np.add.at(n, (state, action), 1)
    n += prior
    return n / np.maximum(n.sum(axis=1, keepdims=True), np.finfo(float).tiny)


def clone(cfg: Config, spec: Spec, obs, action):
    """log mu(a|s), (n,), of a policy fitted to these very rows: its errors of chance cancel some of theirs."""
    actor = (CategoricalActor if spec.discrete else TanhGaussianActor)(spec.action_dim, cfg.hidden)
    adam = optax.adam(cfg.learning_rate)

    def loss(params, obs, action):
        return -actor.apply(params, obs).log_prob(action).mean()

    def step(carry, key, obs, action):
        params, opt_state = carry
        index = jax.random.randint(key, (cfg.batch_size,), 0, len(obs))
        updates, opt_state = adam.update(jax.grad(loss)(params, obs[index], action[index]), opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def fit(obs, action):
        key_init, key_steps = jax.random.split(jax.random.key(cfg.seed))
        params = actor.init(key_init, obs[:1])
        keys = jax.random.split(key_steps, cfg.clone_updates)
        (params, _), _ = jax.lax.scan(lambda c, key: step(c, key, obs, action), (params, adam.init(params)), keys)
        return actor.apply(params, obs).log_prob(action)

    return np.asarray(fit(obs, action), np.float64)


def behaviour(cfg: Config, dataset, interface: Interface, data):
    """log mu(a|s) per unit of the environment's actions: (n,)."""
    spec = interface.spec
    if cfg.behaviour == "logged":
        return np.log(load_dataset(dataset, columns=("propensity",))[0].propensity.astype(np.float64))
    if cfg.behaviour == "counts":
        if not (spec.discrete and isinstance(interface.observation, dict) and "n" in interface.observation):
            raise SystemExit("Only Discrete observations and actions can be counted: use --behaviour clone.")
        state = data.obs.argmax(axis=-1)
        return np.log(counts(state, data.action, spec.obs_dim, spec.action_dim)[state, data.action])
    if cfg.behaviour == "clone":
        half = 1.0 if spec.discrete else scale(interface)[1]
        return clone(cfg, spec, data.obs, data.action) - np.log(half).sum()
    runs, _ = load_runs(cfg.behaviour)
    if hasattr(runs.cfg, "act"):
        runs.cfg = dataclasses.replace(runs.cfg, act="sample")
    return log_prob(runs, interface, data.obs, data.action)[0]


# --- From rows to numbers ------------------------------------------------------------------------------------
def pad(episode, column):
    """Rows (n,), whose episodes are numbered 0, 1, 2, ... in their order -> (episodes, longest); 0 after the end."""
    length = np.bincount(episode)
    step = np.arange(len(episode)) - np.repeat(np.cumsum(length) - length, length)
    padded = np.zeros((len(length), length.max()), column.dtype)
    padded[episode, step] = column
    return padded


def evaluate(cfg: Config) -> list[dict]:
    """For each run of the evaluated policy: its seed and grid point, and {"DR": (estimate, low, high), ...}."""
    if min(cfg.resamples, cfg.clone_updates, cfg.batch_size) < 1:
        raise SystemExit("resamples, clone_updates and batch_size must be at least 1.")
    if not cfg.fqe:
        raise SystemExit(
            "Say whose Q to use with --fqe FOLDER. This makes one: python algos/fqe.py --policy RUN_FOLDER "
            "--dataset stitch/icu-sepsis-v0 --act sample --out runs/q"
        )
    runs, module = load_runs(cfg.fqe, "fqe")
    if len(runs.fields) > 1:
        raise SystemExit(f"{cfg.fqe} is a grid of fqe.py: make a run with one value of each field.")
    folds, discount, seeds = runs.cfg.folds, runs.cfg.discount, np.asarray(runs.fields["seed"])
    data, env = module.load_data(runs.cfg)  # on the scale of the policy, with the numbers of the folds
    policies = env.runs.runs
    episode = np.cumsum(np.diff(data.episode, prepend=-1) != 0) - 1
    log_pi, (q, v) = log_prob(runs, env.interface, data.obs, data.action), values(runs, data.obs, data.action)
    log_mu = pad(episode, behaviour(cfg, runs.cfg.dataset, env.interface, data))
    reward, mask = pad(episode, data.reward.astype(np.float64)), pad(episode, np.ones(len(data.reward), bool))

    summary = Path(cfg.fqe) / "summary.json"  # not of a run that was stopped
    truth = json.loads(summary.read_text())["true_value"] if summary.exists() else [None] * len(seeds)
    results = []
    for run, about in enumerate(policies):
        own = np.argmax(seeds % len(policies) == run)  # the first critic of this run
        fitted = [pad(episode, cross_fitted(x, seeds, run, len(policies), folds, data.episode)) for x in (q, v)]
        episodes = Episodes(reward, pad(episode, log_pi[own]), log_mu, *fitted, mask)
        check(episodes)
        with jax.enable_x64(True):  # weights of many steps are further apart than float32 can add
            ones, key = np.ones(len(reward)), jax.random.key(cfg.seed)
            estimates = jax.device_get(jax.jit(estimate)(episodes, ones, discount))
            samples = jax.device_get(jax.jit(bootstrap, static_argnums=3)(episodes, discount, key, cfg.resamples))
            parts = np.asarray(jax.jit(partial)(episodes, ones, discount))[:, steps_of(episodes)]
        x = magic(parts, samples["WDR"])
        estimates["MAGIC"], samples["MAGIC"] = estimates.pop("g") @ x, samples.pop("g") @ x
        interval = {name: np.nanpercentile(sample, [2.5, 97.5]) for name, sample in samples.items()}
        results.append({**about, "discount": discount, "folds": folds, "weights_of_magic": x.tolist()})
        results[-1]["true_value"] = np.nan if truth[own] is None else truth[own]
        results[-1] |= {name: (float(value), *map(float, interval[name])) for name, value in estimates.items()}
    return results


def main(cfg: Config):
    results = evaluate(cfg)
    discount, folds = results[0]["discount"], results[0]["folds"]
    print(f"The policy of {cfg.fqe}: raw rewards, discount {discount:g}, as many steps as an episode of the data has;")
    fitted = f"cross-fitted in {folds} folds" if folds > 1 else "fitted to the same episodes"
    print(f"behaviour: {cfg.behaviour}; Q is {fitted}.")
    print(f"In brackets: 95 % of {cfg.resamples:,} resamples of the episodes, with this Q.")
    for result in results:
        print(f"seed {result['seed']} {result['grid'] or ''}")
        for name in ("DM", "DR", "WDR", "MAGIC", "ESS"):
            print("  {:6} {:>10.5g}  ({:.5g} to {:.5g})".format(name, *result[name]))
        print(f"  true value {result['true_value']:.5g}, as fqe.py measured it")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.partition("\n\n")[0]))
