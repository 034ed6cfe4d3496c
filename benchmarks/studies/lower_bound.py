"""Is what conservative Q-learning believes below what is true, as its theory says? Tabular and with networks.

    python benchmarks/studies/lower_bound.py            # hours on two cores; killed, it goes on where it stopped
    python benchmarks/studies/lower_bound.py --tabular  # a minute: the exact part alone
    python benchmarks/studies/lower_bound.py --draw     # at once: picture and table anew, from lower_bound.json

Claims (LECTURES L12, L13): pushing Q down under mu makes it a lower bound everywhere, but too low a one (the paper's
eq. 1); pushing up on the data as well (eq. 2) leaves a bound in expectation under the policy. With networks, full CQL
believes slightly less than is true, push-down alone far less, ensembles of 2 to 20 critics and BEAR far more (Table 4).

Tabular    ICU-Sepsis, whose true values are exact. The policy is the greedy one of the batch-constrained optimum of the
           data's own MDP; Q is the fixed point of eq. 1 and eq. 2 with mu = pi, on counts of 3k to 300k transitions:
               Q = r + discount P^pi Q - alpha pi / b            (eq. 1)
               Q = r + discount P^pi Q - alpha (pi / b - 1)      (eq. 2)
           Shown: believed minus true value at the start, against alpha; where the curve is below 0 the bound holds.
Networks   CQL's forms, SAC-N with 2 to 20 critics, and BEAR on three hopper datasets: believed_value minus true_value
           of each run's evaluations (Evaluation in common/datasets.py), the mean over the last half of the training.

Writes lower_bound.json, lower_bound.png and the table lower_bound.md beside it.
"""

import argparse
import importlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402
from scipy.sparse import csr_array  # noqa: E402

from common.datasets import load_dataset  # noqa: E402

HERE = Path(__file__).resolve().parent
DISCOUNT = 0.99
SIZES = ("3k", "30k", "300k")
ALPHAS = np.concatenate([[0.0], np.geomspace(1e-5, 1e-1, 17)])
DATASETS = ("hopper-medium-expert-100k", "hopper-medium-replay-100k", "hopper-medium-100k")
LAST = 5  # evaluations whose mean is the number in the table
SETTINGS = dict(num_seeds=3, num_updates=10_000, eval_interval=1_000, log_interval=500, eval_episodes=5,
                hidden=(128, 128), reward_shift=0.0)  # fmt: skip
# The target follows Q with tau, so values approach their fixed point as exp(-tau (1 - discount) updates). With CQL's
# default of 0.02, 14 % of the way is left after 10,000 updates, with 0.05 less than 1 %: the bound is about the end.
CQL = {"weight": 5.0, "tau": 0.05, "learning_rate": 1e-3, "num_seeds": 1}
METHODS = {  # label: algorithm, fields
    "CQL(H)": ("cql", {**CQL, "regularizer": "H", "num_samples": 4}),
    "CQL eq. 2": ("cql", {**CQL, "regularizer": "eq2", "num_samples": 1}),  # a mean, which one sample does not bias
    "CQL eq. 1": ("cql", {**CQL, "regularizer": "eq1", "num_samples": 1}),
    # The control: nothing pushes its Q down. Its targets move in every second update, so twice as far as CQL's.
    "TD3+BC": ("td3_bc", {"tau": 0.1, "learning_rate": 1e-3, "num_seeds": 2}),
    "2 critics": ("sac_n", {"num_critics": 2}),
    "4 critics": ("sac_n", {"num_critics": 4}),
    "10 critics": ("sac_n", {"num_critics": 10}),
    "20 critics": ("sac_n", {"num_critics": 20}),
    "BEAR": ("bear", {"vae_hidden": (128, 128)}),
}
PUBLISHED = {  # CQL's Table 4, on D4RL's v0 data: orders of magnitude only. value.md, section 1: partly second-hand
    "CQL(H)": (-43.2, -10.93, -7.48),
    "CQL eq. 1": (-151.36, -22.87, -156.7),
    "2 critics": (3.71e6, 15e6, 26.03e12),
    "4 critics": (2.93e6, 59.93e3, 437.57e6),
    "10 critics": (0.32e6, 8.92e3, 1.12e12),
    "20 critics": (24.05e3, 2.47e3, 885e3),
    "BEAR": (65.93, 1399.46, 4.32),
}


# --- Tabular -------------------------------------------------------------------------------------------


def empirical_mdp(data, num_actions):
    """Of the data: transitions (S * A, S), mean rewards (S, A) and behaviour (S, A); 0 where they have none."""
    num_states = data.obs.shape[1]
    state, following = data.obs.argmax(axis=1), data.next_obs.argmax(axis=1)
    pair = state * num_actions + data.action
    count = np.bincount(pair, minlength=num_states * num_actions)
    seen = np.maximum(count, 1)
    reward = np.bincount(pair, data.reward, num_states * num_actions) / seen
    goes_on = 1 - data.terminal  # nothing follows a terminal
    transition = csr_array((goes_on / seen[pair], (pair, following)), (num_states * num_actions, num_states))
    count = count.reshape(num_states, num_actions)
    behaviour = count / np.maximum(count.sum(axis=1, keepdims=True), 1)
    return transition, reward.reshape(num_states, num_actions), behaviour


def constrained_greedy(transition, reward, behaviour):
    """The optimum over actions that the data have, by value iteration: (S,) actions."""
    value = np.zeros(len(reward))
    for _ in range(2_000):
        following = (transition @ value).reshape(reward.shape)
        q = np.where(behaviour > 0, reward + DISCOUNT * following, -np.inf)
        value = np.where(behaviour.any(axis=1), q.max(axis=1), 0)
    return q.argmax(axis=1)


def believed(transition, reward, behaviour, policy, alpha, push_up):
    """V = Q(s, pi(s)) (S,) at the fixed point of eq. 1 or, with push_up, eq. 2; 0 in states the data never left."""
    rows = np.arange(len(policy))
    seen = behaviour[rows, policy] > 0
    penalty = np.where(seen, 1 / np.where(seen, behaviour[rows, policy], 1) - push_up, 0)
    p = transition[rows * reward.shape[1] + policy].toarray()
    return np.linalg.solve(np.eye(len(p)) - DISCOUNT * p, reward[rows, policy] - alpha * penalty)


def tabular():
    """Believed minus true value at the start, for each size of the data, equation and alpha."""
    gaps = {}
    for size in SIZES:
        data, env = load_dataset(f"stitch/icu-sepsis-{size}-v0")
        mdp = empirical_mdp(data, env.spec.action_dim)
        policy = constrained_greedy(*mdp)
        play = env.evaluate(lambda obs, step, policy=policy: policy[obs.argmax(axis=-1)], [0], 1, DISCOUNT)
        for equation, push_up in (("eq. 1", 0), ("eq. 2", 1)):
            values = [play.weight @ believed(*mdp, policy, alpha, push_up) for alpha in ALPHAS]
            gaps[f"{size}, {equation}"] = (np.array(values) - play.value[0]).tolist()
        bounds = ", ".join(f"{first_below(gaps[f'{size}, {e}']):.1e} ({e})" for e in ("eq. 1", "eq. 2"))
        gap = gaps[f"{size}, eq. 1"][0]
        print(f"{size}: true value {play.value[0]:.4f}, believed {gap:+.4f} more at alpha 0; a bound from {bounds}")
    return gaps


def first_below(gaps):
    """The smallest alpha from which on the bound holds."""
    above = np.flatnonzero(np.array(gaps) > 0)
    first = above[-1] + 1 if len(above) else 0
    return ALPHAS[first] if first < len(ALPHAS) else np.inf


# --- Networks ------------------------------------------------------------------------------------------


def networks(labels):
    """Trains these methods on each dataset: {label: {dataset: row}}."""
    rows = {}
    for dataset in DATASETS:
        for label in labels:
            name, fields = METHODS[label]
            algo = importlib.import_module(f"algos.{name}")
            out = HERE.parents[1] / "runs" / "lower_bound" / dataset / label.replace(" ", "-")
            algo.main(algo.Config(dataset=f"stitch/{dataset}-v0", out=str(out), **(SETTINGS | fields)))
            rows.setdefault(label, {})[dataset] = read_row(out)
    return rows


def read_row(out):
    """Of a run folder: what made it, and the values of each seed at each evaluation and late in training."""
    run = json.loads((out / "config.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seeds, steps = (sorted({line[name] for line in lines}) for name in ("seed", "step"))
    believed, true = (
        [[line[name] for line in lines if line["seed"] == seed] for seed in seeds]
        for name in ("believed_value", "true_value")
    )
    gap = (np.array(believed) - np.array(true))[:, -LAST:].mean(axis=1).tolist()
    about = {"updates": steps[-1], "seeds": seeds, "command": run["command"], "commit": run["commit"]}
    return {**about, "config": run["config"], "gap": gap, "steps": steps, "believed": believed, "true": true}


def table(rows):
    lines = [["method", "updates, seeds", *DATASETS], ["---"] * (2 + len(DATASETS))]
    for label, row in rows.items():
        about = sorted({f"{row[d]['updates']:,}, {len(row[d]['seeds'])}" for d in DATASETS})
        published = PUBLISHED.get(label, [None] * len(DATASETS))
        lines.append([label, "; ".join(about), *(cell(row[d], x) for d, x in zip(DATASETS, published, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(row, published):
    """Believed minus true value, median and range of the seeds; the mean true value; and the published number."""
    gap = row["gap"]
    text = f"{np.median(gap):+.3g}" + (f" ({min(gap):+.3g} to {max(gap):+.3g})" if len(gap) > 1 else "")
    text += f"; true {np.array(row['true'])[:, -LAST:].mean():.3g}" if "true" in row else ""
    return text + (f"; published {published:+.3g}" if published is not None else "")


def page(rows):
    return f"# Believed minus true value\n\n{table(rows)}\n"


def draw(result, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), dpi=120, layout="constrained")
    for i, size in enumerate(SIZES):
        for equation, line in (("eq. 1", "--"), ("eq. 2", "-")):
            label = f"{size}, {equation}"
            axes[0].plot(ALPHAS, result["tabular"][label], line, color=f"C{i}", label=label)
    axes[0].set_xscale("symlog", linthresh=1e-5)
    axes[0].set(title="ICU-Sepsis, exact", xlabel="alpha", ylabel="believed minus true value", ylim=(-1, 0.5))
    axes[0].legend(frameon=False, fontsize=8)
    if "networks" in result:
        for y, row in enumerate(result["networks"].values()):
            for i, dataset in enumerate(DATASETS):
                style = {"color": f"C{i}", "markersize": 4, "label": None if y else dataset}
                gap = row[dataset]["gap"]
                axes[1].plot(gap, [y + 0.2 * (i - 1)] * len(gap), "o", **style)
        axes[1].set_yticks(range(len(result["networks"])), list(result["networks"]))
        axes[1].set_xscale("symlog", linthresh=10)
        axes[1].set(title="Networks", xlabel="believed minus true value", xlim=(-1e3, 1e9))
        axes[1].set_xticks([-100, 0, 100, 1e4, 1e6, 1e8])
        axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    for axis in axes:
        axis.axhline(0, color="0.7", zorder=0) if axis is axes[0] else axis.axvline(0, color="0.7", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tabular", action="store_true", help="the exact part alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="the networks alone, and of these only")
    parser.add_argument("--draw", action="store_true", help="picture and table alone, from lower_bound.json")
    options = parser.parse_args()
    update(HERE / "lower_bound.json", options)
    result = json.loads((HERE / "lower_bound.json").read_text())
    (HERE / "lower_bound.md").write_text(page(result["networks"]))
    draw(result, HERE / "lower_bound.png")


def update(path, options):
    """Runs what is asked for, and changes only that in the result: the other rows took hours."""
    result = json.loads(path.read_text()) if path.exists() else {}
    rows = result.setdefault("networks", {})
    if not (options.draw or options.methods):
        result |= {**provenance(), "alphas": ALPHAS.tolist(), "tabular": tabular()}  # each row says its own commit
    if not (options.draw or options.tabular):
        for label, row in networks(options.methods or list(METHODS)).items():
            rows[label] = rows.get(label, {}) | row
    result["networks"] = {label: rows[label] for label in METHODS if label in rows}
    path.write_text(json.dumps(result | device(), indent=1) + "\n")


if __name__ == "__main__":
    main()
