"""How often does the 95 % interval of an estimator hold the truth? Counted where the truth is exact.

    python benchmarks/studies/ope_intervals.py    # some minutes; writes ope_intervals.json and .png beside it

Claim (Levine et al. 2020, https://arxiv.org/abs/2005.01643, section 3): an estimate of a policy's value is of use only
with an interval. A bootstrap over episodes gives one, but what it resamples differs between the estimators of algos/.

A task has 10 states, 3 actions, random transitions, a random reward of 0 or 1, and ends after each step with the
probability 0.15. The behaviour mu, which has at least 1/6 for each action, and another policy are random, too; the
evaluated policies are pi = (1 - d) mu + d other. V is the discounted return without a horizon, from the model. With 100
episodes nearly all pairs of a state and an action are in the data, so that no estimator has to guess: what an interval
lacks here is its own fault.

Intervals    Those of the files, from 200 resamples; mu is known. Q is the one of the MDP that the data count, and
             DICE's ratios are the exact solution of its Lagrangian on the data.
  IS .. PDWIS, DR, WDR, MAGIC   resample the episodes, with Q and MAGIC's weights as they are
  DR, two folds                 the same, each episode with the Q of the other half of them
  FQE                           resamples the first states alone, with Q as it is
  DICE                          resamples the episodes, with the ratios as they are
  counted model                 counts the model anew in each resample
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

from algos import doubly_robust, importance_sampling  # noqa: E402

HERE = Path(__file__).resolve().parent
STATES, ACTIONS, END, DISCOUNT = 10, 3, 0.15, 0.95
STEPS = 100  # an episode has more with a probability of 1e-7
SIZES = (30, 100, 300)  # episodes
DISTANCES = (0.2, 0.8)
REPETITIONS, RESAMPLES = 100, 200
ESTIMATORS = ("IS", "PDIS", "WIS", "PDWIS", "FQE", "counted model", "DICE", "DR", "DR, two folds", "WDR", "MAGIC")


# --- The task, and what is exact ----------------------------------------------------------------------------
def make():
    """Transitions (S, A, S), chances of the reward 1 (S, A), first states (S,), mu and the other policy (S, A)."""
    rng = np.random.default_rng(0)
    transition = rng.dirichlet(np.full(STATES, 0.3), (STATES, ACTIONS))
    chance, initial = rng.random((STATES, ACTIONS)), rng.dirichlet(np.ones(STATES))
    mu, other = rng.dirichlet(np.ones(ACTIONS), (2, STATES))
    return transition, chance, initial, (mu + 1 / ACTIONS) / 2, other


def solve(pi, reward, goes_on):
    """Q (S, A) of pi, from mean rewards (S, A) and the discounted chances of each next state (S, A, S)."""
    following = np.einsum("sat,tb->satb", goes_on, pi).reshape(pi.size, pi.size)
    return np.linalg.solve(np.eye(pi.size) - following, reward.ravel()).reshape(pi.shape)


def truth(task, pi):
    transition, chance, initial, _, _ = task
    return float(initial @ (pi * solve(pi, chance, DISCOUNT * (1 - END) * transition)).sum(axis=1))


# --- Data and intervals ---------------------------------------------------------------------------------------
def sample(task, episodes, rng):
    """Episodes of mu: state, action, reward, next state, end and mask, each (episodes, STEPS)."""
    transition, chance, initial, mu, _ = task
    rows, now, alive = [], rng.choice(STATES, episodes, p=initial), np.ones(episodes, bool)
    for _ in range(STEPS):
        action = (np.cumsum(mu[now], axis=1) < rng.random((episodes, 1))).sum(axis=1).clip(max=ACTIONS - 1)
        last = np.cumsum(transition[now, action], axis=1)
        following = (last < rng.random((episodes, 1))).sum(axis=1).clip(max=STATES - 1)
        reward, end = rng.random(episodes) < chance[now, action], rng.random(episodes) < END
        rows.append((now, action, reward.astype(float), following, end, alive))
        now, alive = following, alive & ~end
    return [np.stack(column, axis=1) for column in zip(*rows, strict=True)]


def counts(rows):
    """Of each episode, (episodes, S A) and (episodes, S A, S): visits, rewards, and next states that were no end."""
    state, action, reward, following, end, mask = rows
    pair, number = state * ACTIONS + action, np.arange(len(state))[:, None]
    visits, paid = np.zeros((2, len(state), STATES * ACTIONS))
    after = np.zeros((len(state), STATES * ACTIONS, STATES))
    np.add.at(visits, (number, pair), mask)
    np.add.at(paid, (number, pair), mask * reward)
    np.add.at(after, (number, pair, following), mask & ~end)
    return visits, paid, after


def counted(visits, paid, after, pi):
    """Q (S, A) of the MDP that summed counts make; 0 where there are none, as in algos/model_evaluation.py."""
    number = np.maximum(visits, 1)
    goes_on = DISCOUNT * after / number[:, None]
    return solve(pi, (paid / number).reshape(pi.shape), goes_on.reshape(*pi.shape, STATES))


def ratios(visits, after, pi, initial):
    """zeta (S A,) where DICE's Lagrangian is stationary: discounted visits of pi in the counted MDP over the data's."""
    number = np.maximum(visits, 1)
    following = np.einsum("xt,tb->xtb", DISCOUNT * after / number[:, None], pi).reshape(pi.size, pi.size)
    policy_visits = np.linalg.solve(np.eye(pi.size) - following.T, (initial[:, None] * pi).ravel())
    return np.where(visits > 0, policy_visits / number, 0)  # up to a factor, which cancels


def intervals(rows, pi, mu, rng):
    """{estimator: (estimate, low, high)}."""
    state, action, reward, _, _, mask = rows
    n, (visits, paid, after) = len(state), counts(rows)
    tables = counted(visits.sum(axis=0), paid.sum(axis=0), after.sum(axis=0), pi)
    fold, first = np.arange(n) % 2, state[:, 0]
    other = [counted(*(x[fold != k].sum(axis=0) for x in (visits, paid, after)), pi) for k in (0, 1)]
    crossed = np.where((fold == 0)[:, None, None], *(q[None] for q in other))[np.arange(n)[:, None], state, action]
    crossed_v = np.where((fold == 0)[:, None], *((pi * q).sum(axis=1)[None] for q in other))
    crossed_v = crossed_v[np.arange(n)[:, None], state]

    draws = rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES)  # how often each episode is in each resample
    v = (pi * tables).sum(axis=1)[first]
    found = {"FQE": (v.mean(), draws @ v / n)}
    start = np.eye(STATES)[first]
    models = [counted(count @ visits, count @ paid, np.tensordot(count, after, 1), pi) for count in draws]
    values = [(count @ start) @ (pi * q).sum(axis=1) / n for count, q in zip(draws, models, strict=True)]
    found["counted model"] = v.mean(), np.array(values)
    zeta = ratios(visits.sum(axis=0), after.sum(axis=0), pi, start.mean(axis=0))
    earned, flow = paid @ zeta, (visits - DISCOUNT * after.sum(axis=2)) @ zeta  # as algos/dice.py: zeta (1 - g)
    found["DICE"] = earned.sum() / flow.sum(), draws @ earned / (draws @ flow)

    with np.errstate(divide="ignore"):
        log_pi, log_mu = (np.log(p)[state, action] for p in (pi, mu))
    with jax.enable_x64(True):
        key, ones = jax.random.key(int(rng.integers(2**31))), np.ones(n)
        weights = importance_sampling.Episodes(reward, log_pi, log_mu, mask)
        value, samples = compiled(importance_sampling)(weights, ones, key)
        found |= {name: (value[name], samples[name]) for name in ("IS", "PDIS", "WIS", "PDWIS")}
        same = doubly_robust.Episodes(
            reward, log_pi, log_mu, tables[state, action], (pi * tables).sum(axis=1)[state], mask
        )
        value, samples = compiled(doubly_robust)(same, ones, key)
        found |= {name: (value[name], samples[name]) for name in ("DR", "WDR")}
        parts = np.asarray(PARTIAL(same, ones, DISCOUNT))[:, doubly_robust.steps_of(same)]
        x = doubly_robust.magic(parts, np.asarray(samples["WDR"]))
        found["MAGIC"] = value["g"] @ x, samples["g"] @ x
        value, samples = compiled(doubly_robust)(same._replace(q=crossed, v=crossed_v), ones, key)
        found["DR, two folds"] = value["DR"], samples["DR"]
    return {name: (float(x), *map(float, np.nanpercentile(rest, [2.5, 97.5]))) for name, (x, rest) in found.items()}


PARTIAL, COMPILED = jax.jit(doubly_robust.partial), {}


def compiled(module):
    """(estimates, resamples) of a file, compiled once for each shape."""
    if module not in COMPILED:

        def both(episodes, ones, key):
            return module.estimate(episodes, ones, DISCOUNT), module.bootstrap(episodes, DISCOUNT, key, RESAMPLES)

        COMPILED[module] = jax.jit(both)
    return COMPILED[module]


def measure(task, sizes=SIZES, repetitions=REPETITIONS):
    """For each distance and size {estimator: share of intervals with the truth, mean error and mean width}."""
    *_, mu, other = task
    found = {"truth": {}, "coverage": {}}
    for d in DISTANCES:
        pi = (1 - d) * mu + d * other
        true = found["truth"][f"{d:g}"] = truth(task, pi)
        for size in sizes:
            rows = []
            for seed in range(repetitions):
                rng = np.random.default_rng([size, seed])
                rows.append(intervals(sample(task, size, rng), pi, mu, rng))
            cell = found["coverage"].setdefault(f"{d:g}", {})[str(size)] = {}
            for name in ESTIMATORS:
                value, low, high = np.array([row[name] for row in rows]).T
                held, width = (low <= true) & (true <= high), (high - low).mean()
                rmse = np.sqrt(((value - true) ** 2).mean())
                cell[name] = {"held": int(held.sum()), "rmse": float(rmse), "width": float(width)}
            print(f"d = {d:g}, {size} episodes: { ({name: row['held'] for name, row in cell.items()}) }", flush=True)
    return found


def table(result):
    """Markdown: a row for each estimator, the share of intervals with the truth for each distance and size."""
    columns = [(d, size) for d, by_size in result["coverage"].items() for size in by_size]
    heads = [f"d = {d}, {int(size):,}" for d, size in columns]
    lines = [f"| interval of | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for name in result["estimators"]:
        shares = [result["coverage"][d][size][name]["held"] / result["repetitions"] for d, size in columns]
        lines.append(f"| {name} | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |")
    return "\n".join(lines)


def draw(result, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), dpi=120, layout="constrained", sharey=True)
    for axis, (d, by_size) in zip(axes, result["coverage"].items(), strict=True):
        axis.axhline(0.95, color="0.6", linewidth=1, linestyle="--")
        for i, name in enumerate(result["estimators"]):
            shares = [row[name]["held"] / result["repetitions"] for row in by_size.values()]
            style = {"color": [*(f"C{k}" for k in range(10)), "k"][i], "marker": "osD^vPX*hd<"[i], "markersize": 5}
            axis.semilogx(list(map(int, by_size)), shares, label=name, **style)
        axis.set_xticks(list(map(int, by_size)), list(by_size))
        axis.minorticks_off()
        axis.set(title=f"d = {d}", xlabel="episodes", ylim=(0, 1.02))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("share of 95 % intervals that hold the truth")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about = provenance()
    found = measure(make())
    result = {**about, **device(), "estimators": ESTIMATORS, "repetitions": REPETITIONS, "resamples": RESAMPLES}
    result |= found
    (HERE / "ope_intervals.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, HERE / "ope_intervals.png")
    print(table(result))


if __name__ == "__main__":
    main()
