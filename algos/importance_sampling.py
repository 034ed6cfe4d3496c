"""Importance sampling (IS, PDIS, WIS, PDWIS): what a policy is worth, from the episodes of another one.

An episode that the policy would produce more often than the behaviour did counts for more. Nothing is assumed of the
environment and nothing is trained, but for a clone of the behaviour where one is asked for. The price is variance: it
grows exponentially with the number of steps.

Paper      Precup, Sutton & Singh (2000), Eligibility traces for off-policy policy evaluation
Reference  https://github.com/hakuhodo-technologies/scope-rl at b1c9e9f, ope/discrete/basic_estimators.py: the formulas

From equation to code, with rho_t = pi(a_t|s_t) / mu(a_t|s_t) and episodes i = 1 .. n
    w_t   = rho_0 rho_1 ... rho_t; after the last step T of an episode it stays w_T    log_weights
    IS    = 1/n sum_i w_T G                    G = sum_t discount^t r_t                importance_sampling
    PDIS  = 1/n sum_i sum_t discount^t w_t r_t                                         per_decision
    WIS   = sum_i w_T G / sum_i w_T                                                    weighted
    PDWIS = sum_t discount^t [ sum_i w_t r_t / sum_i w_t ]                             per_decision_weighted
    ESS   = (sum_i w_T)^2 / sum_i w_T^2                                                effective_sample_size

Order of one update   Nothing is updated. jax.grad of `per_decision` is the off-policy policy gradient.
Hyper-parameters      1,000 resamples of whole episodes for the 95 % interval.
Deviations            1. Weights are kept as logarithms and shifted by their largest, so that none underflows.
                      2. Weights are not clipped.
Run                   python algos/importance_sampling.py --policy RUN_FOLDER --dataset stitch/icu-sepsis-v0
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from common.datasets import load_dataset
from common.environments import Interface, Spec
from common.networks import CategoricalActor, TanhGaussianActor


# --- Configuration -------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Config:
    policy: str = ""  # folder of the run whose policy is evaluated, with all of its seeds and grid points
    dataset: str = "stitch/icu-sepsis-v0"  # a Minari dataset: local, built, or downloaded
    behaviour: str = "clone"  # mu: "clone" or "counts" of the data, "logged" with them, or the folder of a run
    act: Literal["mode", "sample"] = "sample"  # what the evaluated policy does: a draw, or its most likely action
    discount: float = 0.99  # gamma
    seed: int = 0  # of the clone and of the resamples
    resamples: int = 1_000  # of the episodes, for the interval
    eval_episodes: int = 100  # played for the true value, for each run; 0: none, and no environment is made
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


def importance_sampling(episodes, count, discount):
    w = jnp.exp(log_weights(episodes)[:, -1])
    return total(count, w * discounted(episodes, discount).sum(axis=1)) / count.sum()


def per_decision(episodes, count, discount):
    w = jnp.exp(log_weights(episodes))
    return total(count, (w * discounted(episodes, discount)).sum(axis=1)) / count.sum()


def weighted(episodes, count, discount):
    w = shifted(log_weights(episodes)[:, -1])
    return total(count, w * discounted(episodes, discount).sum(axis=1)) / total(count, w)


def per_decision_weighted(episodes, count, discount):
    w = shifted(log_weights(episodes))
    return (total(count, w * discounted(episodes, discount)) / total(count, w)).sum()


def effective_sample_size(episodes, count, discount=None):
    w = shifted(log_weights(episodes)[:, -1])
    return total(count, w) ** 2 / total(count, w**2)


def shifted(log_w):
    """Weights on a scale on which the largest of all episodes is 1: a ratio of their sums is the same."""
    return jnp.exp(log_w - log_w.max(axis=0, keepdims=True))


ESTIMATORS = {
    "IS": importance_sampling,
    "PDIS": per_decision,
    "WIS": weighted,
    "PDWIS": per_decision_weighted,
    "ESS": effective_sample_size,
}


def estimate(episodes, count, discount):
    """{name: number} of every estimator; NaN where all weights are 0."""
    return {name: estimator(episodes, count, discount) for name, estimator in ESTIMATORS.items()}


def bootstrap(episodes, discount, key, resamples):
    """{name: (resamples,)}: the estimates from as many whole episodes, drawn with replacement."""
    n = len(episodes.reward)

    def of_resample(key):
        count = jnp.bincount(jax.random.randint(key, (n,), 0, n), length=n)
        return estimate(episodes, count.astype(episodes.reward.dtype), discount)

    return jax.lax.map(of_resample, jax.random.split(key, resamples), batch_size=50)


def check(episodes):
    """One sentence for episodes from which nothing can be estimated."""
    shapes = [np.shape(x) for x in episodes]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise SystemExit(f"Episodes need arrays of one shape (episodes, steps), and these have {shapes}.")
    mask = np.asarray(episodes.mask)
    inside = mask.astype(bool)
    reward, log_pi, log_mu = steps = [np.where(inside, x, 0) for x in episodes[:3]]
    rules = {
        "The mask must hold True and False.": mask.dtype == bool,
        "The steps of an episode come first in its row.": inside[:, 0].all()
        and (inside[:, 1:] <= inside[:, :-1]).all(),
        "Rewards and log-probabilities must be numbers.": not np.isnan(steps).any() and np.isfinite(reward).all(),
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


# --- The evaluated policy and the behaviour ------------------------------------------------------------------
def load_policy(folder, act):
    """All runs of a folder, which act by `act`."""
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
    runs = module.restore(folder, run=None)
    if hasattr(runs.cfg, "act"):
        runs.cfg = dataclasses.replace(runs.cfg, act=act)
    return runs


def log_prob(runs, interface: Interface, obs, action):
    """log pi(a|s) per unit of the environment's actions, (runs, n), of rows in the data's own interface.

    A run's networks see observations and actions on the scale of the data that it was trained on.
    """
    own, spec = runs.interface, interface.spec
    if (own.observation, own.spec[:3]) != (interface.observation, spec[:3]) or (
        spec.discrete and own.action != interface.action
    ):
        raise SystemExit(
            "The policy's observations or actions are not the data's: choose a run on data of the same task."
        )
    size = 0.0
    if not spec.discrete:
        (middle, half), (own_middle, own_half) = scale(interface), scale(own)
        action = ((middle + half * action - own_middle) / own_half).astype(np.float32)
        size = np.log(own_half).sum()
    obs = (obs - np.array(own.obs_mean, np.float32)) / np.array(own.obs_scale, np.float32)
    log_p = runs.every(log_prob_of)(runs.fields, (runs.states,), {"obs": obs, "action": action})
    return np.asarray(log_p, np.float64) - size


def log_prob_of(cfg, agent, state, obs, action):
    policy = getattr(agent, "policy", None)
    if getattr(cfg, "act", "mode") == "sample" and policy is not None:
        return policy(state, obs).log_prob(action)
    if not jnp.issubdtype(action.dtype, jnp.integer) or hasattr(agent, "act_with_memory"):
        raise SystemExit(
            "No ratio of probabilities exists for a policy that is deterministic, has no density or has a memory: use "
            "--act sample with a run that has a density, or algos/fqe.py."
        )
    return jnp.where(agent.act(state, obs, jax.random.key(0)) == action, 0.0, -jnp.inf)


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


def behaviour(cfg: Config, interface: Interface, data):
    """log mu(a|s) per unit of the environment's actions: (n,)."""
    spec = interface.spec
    if cfg.behaviour == "logged":
        return np.log(data.propensity.astype(np.float64))
    if cfg.behaviour == "counts":
        if not (spec.discrete and isinstance(interface.observation, dict) and "n" in interface.observation):
            raise SystemExit("Only Discrete observations and actions can be counted: use --behaviour clone.")
        state = data.obs.argmax(axis=-1)
        return np.log(counts(state, data.action, spec.obs_dim, spec.action_dim)[state, data.action])
    if cfg.behaviour == "clone":
        half = 1.0 if spec.discrete else scale(interface)[1]
        return clone(cfg, spec, data.obs, data.action) - np.log(half).sum()
    return log_prob(load_policy(cfg.behaviour, "sample"), interface, data.obs, data.action)[0]


# --- From rows to numbers ------------------------------------------------------------------------------------
def pad(episode, column):
    """Rows (n,), whose episodes are numbered 0, 1, 2, ... in their order -> (episodes, longest); 0 after the end."""
    length = np.bincount(episode)
    step = np.arange(len(episode)) - np.repeat(np.cumsum(length) - length, length)
    padded = np.zeros((len(length), length.max()), column.dtype)
    padded[episode, step] = column
    return padded


def true_value(runs, env, cfg: Config):
    """The discounted return of each run's policy in the environment, (runs,); NaN where it cannot be played."""
    own, theirs = runs.interface, env.interface  # the environment here observes and acts on the scale of the data

    def play(obs, *episode):
        obs = (obs - np.array(own.obs_mean, np.float32)) / np.array(own.obs_scale, np.float32)
        action, memory = runs.act(obs, *episode)
        return action if own.spec.discrete else theirs.from_env(own.to_env(action)), memory

    def q(obs, action):  # nothing is believed
        return np.zeros(obs.shape[:2])

    return env.measure(play, q, runs.fields["seed"], cfg.eval_episodes, discount=cfg.discount)["true_value"]


def evaluate(cfg: Config) -> list[dict]:
    """For each run of the policy's folder: its seed and grid point, and {"IS": (estimate, low, high), ...}."""
    if min(cfg.resamples, cfg.clone_updates, cfg.batch_size, cfg.eval_episodes + 1) < 1:
        raise SystemExit("resamples, clone_updates and batch_size must be at least 1, and eval_episodes at least 0.")
    runs = load_policy(cfg.policy, cfg.act)
    columns = ("episode", "propensity") if cfg.behaviour == "logged" else ("episode",)
    data, env = load_dataset(cfg.dataset, columns=columns)
    log_pi = log_prob(runs, env.interface, data.obs, data.action)
    log_mu = pad(data.episode, behaviour(cfg, env.interface, data))
    reward, mask = pad(data.episode, data.reward.astype(np.float64)), pad(data.episode, np.ones(len(data.reward), bool))

    results, truth = [], true_value(runs, env, cfg)
    for run, log_p, true in zip(runs.runs, log_pi, truth, strict=True):
        episodes = Episodes(reward, pad(data.episode, log_p), log_mu, mask)
        check(episodes)
        with jax.enable_x64(True):  # weights of many steps are further apart than float32 can add
            estimates = jax.jit(estimate)(episodes, np.ones(len(reward)), cfg.discount)
            samples = jax.jit(bootstrap, static_argnums=3)(
                episodes, cfg.discount, jax.random.key(cfg.seed), cfg.resamples
            )
            log_w = np.asarray(log_weights(episodes))
        interval = {name: np.nanpercentile(sample, [2.5, 97.5]) for name, sample in samples.items()}
        result = {name: (float(x), *map(float, interval[name])) for name, x in estimates.items()}
        results.append({**run, **result, "true_value": true})
        results[-1] |= {"mean_weight": np.exp(log_w[:, -1]).mean(), "zero_weights": np.isinf(log_w[:, -1]).mean()}
        results[-1] |= {"behaviour_value": discounted(episodes, cfg.discount).sum(axis=1).mean()}
    return results


def main(cfg: Config):
    results = evaluate(cfg)
    print(f"The policy of {cfg.policy} on {cfg.dataset}: raw rewards, discount {cfg.discount:g}, as many steps as an")
    print(f"episode of the data has; behaviour: {cfg.behaviour}. In brackets: 95 % of {cfg.resamples:,} resamples.")
    for result in results:
        print(f"seed {result['seed']} {result['grid'] or ''}")
        for name in ESTIMATORS:
            print("  {:6} {:>10.5g}  ({:.5g} to {:.5g})".format(name, *result[name]))
        weight, zero = result["mean_weight"], result["zero_weights"]
        print(f"  mean weight {weight:.3g} (1 where the behaviour is right); of weight 0: {zero:.1%} of the episodes")
        print(f"  the behaviour's return {result['behaviour_value']:.5g}; true value {result['true_value']:.5g}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__.partition("\n\n")[0]))
