"""Bias and variance of off-policy evaluation: which estimator is right when, where the truth is known exactly.

    python benchmarks/studies/ope_bias_variance.py    # some minutes; writes ope_bias_variance.json and .png beside it

Claims (LECTURES L1, L17; Levine et al. 2020, https://arxiv.org/abs/2005.01643): the variance of importance sampling
grows exponentially with the horizon; FQE has little variance, and a bias that grows with the distance of the policies.

ICU-Sepsis has 716 states and 25 actions, and its model is known. So is the clinicians' policy mu, which makes the data
here. The evaluated policies lie between mu and the best policy among the actions that mu takes at all:
pi = (1 - d) mu + d best, d from 0 to 1. Episodes are cut after 100 steps, which hardly any has, and the value is the
survival rate. Its truth is dynamic programming with the model.

Estimators   Those of algos/importance_sampling.py and algos/doubly_robust.py, on arrays; mu is known. FQE is tabular: Q
             of the MDP that the data count, a table for each number of steps left. It has to guess about an action that
             the data do not have in a state: as good as what was done there. DR and WDR take it cross-fitted, in two
             folds.
Error        Root mean squared error over repetitions, each with data of its own; bias is the mean error.
Exact        E[w_H^2], the second moment of the weight after H steps, by the same recursion as a value. n divided by it
             is what n episodes are worth. It needs no data.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import gymnasium  # noqa: E402
import jax  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import scipy.sparse  # noqa: E402
from provenance import device, provenance  # noqa: E402

from algos import doubly_robust, importance_sampling  # noqa: E402
from common.recipes import tabular  # noqa: E402

HERE = Path(__file__).resolve().parent
STEPS = 100  # of an episode, at most
REPETITIONS = {110: 10, 330: 10, 1_100: 10, 3_300: 6, 11_000: 3, 33_000: 2}  # episodes: some 1k to 300k transitions
DISTANCES = (0.0, 0.05, 0.1, 0.2, 1.0)
HORIZONS = (2, 4, 8, 16, 32)
SHOWN, CROWD = 0.1, 3_300  # the distance of the pictures over sizes and horizons, and the episodes of the latter
ESTIMATORS = ("IS", "PDIS", "WIS", "PDWIS", "FQE", "DR", "WDR")


# --- The model, its policies, and what is exact -------------------------------------------------------------
def load():
    """The model, its rewards (S, A, S) and the clinicians' probabilities (S, A), uniform in states after the end."""
    env = gymnasium.make("icu_sepsis:Sepsis/ICU-Sepsis-v2")
    mu = env.unwrapped.expert_policy
    model, paid = tabular.model_of(env), env.unwrapped.dynamics["r_mat"]
    env.close()
    return model, paid, np.where(mu.sum(axis=1, keepdims=True) > 0, mu, 1 / mu.shape[1])


def best_within(model, mu):
    """Probabilities (S, A) of the best policy that takes only actions which mu takes."""
    value = np.zeros(len(mu))
    for _ in range(STEPS):
        q = np.where(mu > 0, model.reward + model.transition @ value, -np.inf)
        value = q.max(axis=1)
    return np.eye(mu.shape[1])[q.argmax(axis=1)]


def second_moments(model, pi, mu, num_steps):
    """E_mu[w_h^2] for h = 1 .. num_steps, where w_h is the product of the first h ratios pi / mu."""
    square = np.divide(pi**2, mu, out=np.zeros_like(pi), where=mu > 0)  # mu (pi / mu)^2
    step = (square[:, None] @ model.transition)[:, 0]
    moment, found = np.ones(len(mu)), []
    for _ in range(num_steps):
        moment = step @ moment
        found.append(float(model.initial @ moment))
    return found


def ended(model):
    """(S,) bool: states that are never left and pay nothing."""
    stay = model.transition[np.arange(len(model.initial)), :, np.arange(len(model.initial))].min(axis=1) == 1
    return stay & (np.abs(model.reward).max(axis=1) == 0)


# --- Data and estimates -------------------------------------------------------------------------------------
def sample(model, paid, mu, episodes, rng):
    """Episodes of mu: state, action, reward, next state and mask, each (episodes, STEPS)."""
    size, shape = len(model.initial), (episodes, STEPS)
    cumulative, choose = np.cumsum(model.transition, axis=2), np.cumsum(mu, axis=1)
    over = ended(model)
    state, action, following = (np.zeros(shape, int) for _ in range(3))
    mask, now = np.zeros(shape, bool), rng.choice(size, episodes, p=model.initial)
    for t in range(STEPS):
        alive = np.flatnonzero(~over[now])
        if not len(alive):
            break
        at = now[alive]
        act = (choose[at] < rng.random((len(at), 1)) * choose[at, -1:]).sum(axis=1)
        last = cumulative[at, act]
        now[alive] = (last < rng.random((len(at), 1)) * last[:, -1:]).sum(axis=1)
        state[alive, t], action[alive, t], following[alive, t], mask[alive, t] = at, act, now[alive], True
    return state, action, paid[state, action, following] * mask, following, mask


def counted_tables(rows, pi, over, horizon):
    """Q (horizon + 1, S, A), with h steps left, in the MDP that these rows count.

    An action that they do not have in a state has the mean of those that they have, and a state that they do not have
    at all the mean of the others. Where an episode is over, (S,) bool, all is 0.
    """
    state, action, reward, following, mask = rows
    size, actions = pi.shape
    pair = (state * actions + action)[mask]
    counts = scipy.sparse.coo_matrix((np.ones(len(pair)), (pair, following[mask])), (size * actions, size)).tocsr()
    number = np.bincount(pair, minlength=size * actions).reshape(size, actions)
    paid = np.bincount(pair, weights=reward[mask], minlength=size * actions)
    visits = number.sum(axis=1)
    tables = np.zeros((horizon + 1, size, actions))
    for h in range(horizon):
        total = (paid + counts @ (pi * tables[h]).sum(axis=1)).reshape(size, actions)
        usual = np.where(visits > 0, total.sum(axis=1) / np.maximum(visits, 1), total.sum() / visits.sum())
        usual[over] = 0
        tables[h + 1] = np.where(number > 0, total / np.maximum(number, 1), usual[:, None])
    return tables


def estimates(rows, pi, mu, over, horizon):
    """{estimator: value of `horizon` steps}, with mu known."""
    state, action, reward, _, mask = rows
    mask = mask & (np.arange(STEPS) < horizon)
    left = np.broadcast_to(np.maximum(horizon - np.arange(STEPS), 0), state.shape)
    fold = (np.arange(len(state)) % 2)[:, None]
    halves = [counted_tables([x[fold[:, 0] != k] for x in rows], pi, over, horizon) for k in (0, 1)]
    q = np.where(fold == 0, halves[0][left, state, action], halves[1][left, state, action])
    values = [(pi * tables).sum(axis=2) for tables in halves]
    v = np.where(fold == 0, values[0][left, state], values[1][left, state])
    with np.errstate(divide="ignore"):
        log_pi, log_mu = (np.log(p)[state, action] for p in (pi, mu))
    whole = counted_tables(rows, pi, over, horizon)
    found = {"FQE": float((pi * whole[horizon]).sum(axis=1)[state[:, 0]].mean())}
    with jax.enable_x64(True):
        ones = np.ones(len(state))
        weights = importance_sampling.Episodes(reward, log_pi, log_mu, mask)
        found |= all_of(importance_sampling)(weights, ones)
        found |= all_of(doubly_robust)(doubly_robust.Episodes(reward, log_pi, log_mu, q, v, mask), ones)
    return {name: float(found[name]) for name in ESTIMATORS}


COMPILED = {}


def all_of(module):
    """Its estimators of undiscounted episodes, compiled once for each shape."""
    wanted = {name: rule for name, rule in module.ESTIMATORS.items() if name in ESTIMATORS}
    if module not in COMPILED:
        COMPILED[module] = jax.jit(lambda x, count: {name: rule(x, count, 1.0) for name, rule in wanted.items()})
    return COMPILED[module]


def summarise(errors):
    """{estimator: rmse, bias and standard deviation} of a list of {estimator: error}."""
    rows = {name: np.array([error[name] for error in errors]) for name in ESTIMATORS}
    return {
        name: {"rmse": float(np.sqrt((x**2).mean())), "bias": float(x.mean()), "std": float(x.std(ddof=1))}
        for name, x in rows.items()
    }


def measure(model, paid, mu, best, repetitions=None):
    """Errors over sizes and distances, and over horizons at one of each."""
    policies = {d: (1 - d) * mu + d * best for d in DISTANCES}
    truth = {d: tabular.expected_return(model, pi, STEPS) for d, pi in policies.items()}
    sizes, horizons, transitions, over = {}, {}, {}, ended(model)
    for episodes, number in (repetitions or REPETITIONS).items():
        errors = {d: [] for d in DISTANCES}
        over_steps, rows_of = {h: [] for h in HORIZONS}, []
        for seed in range(number):
            rows = sample(model, paid, mu, episodes, np.random.default_rng([episodes, seed]))
            rows_of.append(int(rows[-1].sum()))
            for d, pi in policies.items():
                found = estimates(rows, pi, mu, over, STEPS)
                errors[d].append({name: x - truth[d] for name, x in found.items()})
            if episodes == CROWD:
                for h in HORIZONS:
                    true = tabular.expected_return(model, policies[SHOWN], h)
                    found = estimates(rows, policies[SHOWN], mu, over, h)
                    over_steps[h].append({name: x - true for name, x in found.items()})
        sizes[str(episodes)] = {f"{d:g}": summarise(x) for d, x in errors.items()}
        transitions[str(episodes)] = float(np.mean(rows_of))
        if episodes == CROWD:
            horizons = {str(h): summarise(x) for h, x in over_steps.items()}
        print(f"{episodes} episodes, {transitions[str(episodes)]:.0f} transitions: done", flush=True)
    moments = {f"{d:g}": second_moments(model, pi, mu, max(HORIZONS)) for d, pi in policies.items()}
    truth = {f"{d:g}": x for d, x in truth.items()}
    return {"truth": truth, "transitions": transitions, "sizes": sizes, "horizons": horizons, "moments": moments}


# --- Pictures --------------------------------------------------------------------------------------------------
def winners(result):
    """{size: {distance: the estimator with the smallest root mean squared error}}."""
    return {
        size: {d: min(row, key=lambda name: row[name]["rmse"]) for d, row in by_distance.items()}
        for size, by_distance in result["sizes"].items()
    }


def draw(result, path):
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), dpi=120, layout="constrained")
    sizes, shown = list(result["sizes"]), f"{SHOWN:g}"
    transitions = [result["transitions"][size] for size in sizes]
    for i, name in enumerate(ESTIMATORS):
        style = {"color": f"C{i}", "marker": "os^DvPX"[i], "markersize": 5, "label": name}
        axes[0, 0].loglog(transitions, [result["sizes"][size][shown][name]["rmse"] for size in sizes], **style)
        column = [row[name]["std"] for row in result["horizons"].values()]
        axes[0, 1].semilogy(list(map(int, result["horizons"])), column, **style)
        if name in ("FQE", "DR", "WDR", "WIS", "PDWIS"):
            bias = [row[name]["bias"] for row in result["sizes"][str(CROWD)].values()]
            axes[1, 0].plot(list(map(float, result["truth"])), bias, **style)
    axes[0, 0].set(title=f"error and data, d = {SHOWN:g}", xlabel="transitions", ylabel="root mean squared error")
    title = f"spread and horizon, d = {SHOWN:g}, {CROWD:,} episodes"
    axes[0, 1].set(title=title, xlabel="horizon (steps)", ylabel="standard deviation of the estimate")
    exact = np.sqrt(np.array(result["moments"][shown]) / CROWD)
    axes[0, 1].semilogy(range(1, len(exact) + 1), exact, "k--", linewidth=1, label=r"$\sqrt{E[w_H^2] / n}$, exact")
    axes[1, 0].axhline(0, color="0.8", zorder=0)
    axes[1, 0].set(title=f"bias and distance, {CROWD:,} episodes", xlabel="distance d", ylabel="mean error")
    names, best = list(ESTIMATORS), winners(result)
    for x, size in enumerate(sizes):
        for y, name in enumerate(best[size].values()):
            axes[1, 1].add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=f"C{names.index(name)}", alpha=0.5))
            rmse = result["sizes"][size][list(result["truth"])[y]][name]["rmse"]
            axes[1, 1].text(x, y, f"{name}\n{rmse:.2g}", ha="center", va="center", fontsize=9)
    axes[1, 1].set(xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(DISTANCES) - 0.5), xlabel="transitions")
    axes[1, 1].set(title="which has the smallest error, and how large it is", ylabel="distance d")
    axes[1, 1].set_xticks(range(len(sizes)), [f"{x / 1000:.0f}k" for x in transitions])
    axes[1, 1].set_yticks(range(len(DISTANCES)), list(result["truth"]))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[1, 1]:
            axis.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about = provenance()
    model, paid, mu = load()
    best = best_within(model, mu)
    result = measure(model, paid, mu, best)
    result = {**about, **device(), "estimators": ESTIMATORS, "steps": STEPS, "shown": SHOWN, "crowd": CROWD, **result}
    result["repetitions"] = {str(n): number for n, number in REPETITIONS.items()}
    text = json.dumps(result, indent=1).replace("NaN", "null")  # all weights are 0 in some data of the far policy
    (HERE / "ope_bias_variance.json").write_text(text + "\n")
    draw(result, HERE / "ope_bias_variance.png")
    for size, row in winners(result).items():
        print(f"{result['transitions'][size]:.0f} transitions: {row}")


if __name__ == "__main__":
    main()
