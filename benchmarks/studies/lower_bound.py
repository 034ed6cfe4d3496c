"""Is what conservative Q-learning believes below what is true, as its theory says? Tabular and with networks.

    python benchmarks/studies/lower_bound.py            # hours on two cores; killed, it goes on where it stopped
    python benchmarks/studies/lower_bound.py --tabular  # minutes: the exact part alone
    python benchmarks/studies/lower_bound.py --methods "CQL(H)"  # these networks alone: the other rows are kept
    python benchmarks/studies/lower_bound.py --draw     # at once: picture and table anew, from lower_bound.json

Claims (LECTURES L12, L13): pushing Q down under mu makes it a lower bound everywhere, but too low a one (the paper's
eq. 1); pushing up on the data as well (eq. 2) leaves a bound on the policy's value in every state. With networks, full
CQL believes slightly less than is true, push-down alone far less, ensembles of 2 to 20 critics and BEAR far more
(Table 4).

Tabular    ICU-Sepsis, whose true values are exact. The policy is the greedy one of the batch-constrained optimum of the
           data's own MDP; Q is the fixed point of eq. 1 and eq. 2 with mu = pi, on counts of 3k to 300k transitions:
               Q = r + discount P^pi Q - alpha pi / b            (eq. 1)
               Q = r + discount P^pi Q - alpha (pi / b - 1)      (eq. 2)
           Shown against alpha: believed minus true value, mean over the start states, which is a bound where it is
           below 0; and the share of the states in the data in which V is above the truth, 0 where the bound holds.
Networks   CQL(H), eq. 2 and eq. 1 with mu = pi (the same with and without the push-up), SAC-N with 2 to 20 critics,
           BEAR, and as a control TD3+BC, on three hopper datasets: believed_value minus true_value of each run's
           evaluations (Evaluation in common/datasets.py), the mean of the last ones. CQL(rho) is not among them.

Writes lower_bound.json, lower_bound.png and the table lower_bound.md beside it.
"""

import argparse
import importlib
import json
from pathlib import Path

import gymnasium
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402
from scipy.sparse import csr_array  # noqa: E402

from common.datasets import load_dataset  # noqa: E402
from common.recipes.tabular import Model, model_of  # noqa: E402

HERE = Path(__file__).resolve().parent
DISCOUNT = 0.99
SIZES = ("3k", "30k", "300k")
ALPHAS = np.concatenate([[0.0], np.geomspace(1e-5, 1, 21)])
DATASETS = ("hopper-medium-expert-100k", "hopper-medium-replay-100k", "hopper-medium-100k")
LAST = 5  # evaluations whose mean is the number in the table
SETTINGS = dict(num_seeds=3, num_updates=10_000, eval_interval=1_000, log_interval=500, eval_episodes=5,
                hidden=(128, 128), reward_shift=0.0)  # fmt: skip
# The target follows Q with tau, so values approach their fixed point as exp(-tau (1 - discount) updates). With CQL's
# default of 0.02, 14 % of the way is left after 10,000 updates, with 0.05 less than 1 %: the bound is about the end.
CQL = {"weight": 5.0, "tau": 0.05, "learning_rate": 1e-3, "num_seeds": 1}
TD3 = {"learning_rate": 1e-3, "num_seeds": 2}
METHODS = {  # label: algorithm, fields
    "CQL(H)": ("cql", {**CQL, "regularizer": "H", "num_samples": 4, "num_seeds": 2}),
    "CQL eq. 2": ("cql", {**CQL, "regularizer": "eq2", "num_samples": 1}),  # a mean, which one sample does not bias
    "CQL eq. 1": ("cql", {**CQL, "regularizer": "eq1", "num_samples": 1}),
    # Controls: nothing pushes their Q down. Their targets move in every second update, so that tau 0.1 is as fast as
    # CQL's, but most of these runs diverge; 0.05, the quick results', is half as fast and is run longer.
    "TD3+BC, tau 0.1": ("td3_bc", {**TD3, "tau": 0.1}),
    "TD3+BC, tau 0.05": ("td3_bc", {**TD3, "tau": 0.05, "num_updates": 15_000}),
    "2 critics": ("sac_n", {"num_critics": 2}),
    "4 critics": ("sac_n", {"num_critics": 4}),
    "10 critics": ("sac_n", {"num_critics": 10}),
    "20 critics": ("sac_n", {"num_critics": 20}),
    "BEAR": ("bear", {"vae_hidden": (128, 128)}),
}
CURVES = ("CQL(H)", "CQL eq. 2", "CQL eq. 1", "TD3+BC, tau 0.1", "TD3+BC, tau 0.05")  # drawn over training
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


def true_values(model: Model, policy):
    """V (S,) of a deterministic policy in the true MDP, without a time limit."""
    rows = np.arange(len(policy))
    return np.linalg.solve(np.eye(len(policy)) - DISCOUNT * model.transition[rows, policy], model.reward[rows, policy])


def bound(value, cost, truth, start, known):
    """Where value - alpha cost, the believed value, lies below the truth: at the start, and in every known state.

    Both are lines in alpha, so the alphas from which they are bounds are exact: `crossing` for the mean over the start
    states; `everywhere` for the last of the states, None where some are above the truth with every alpha.
    """
    excess, slope = (value - truth)[known], cost[known]
    from_alpha = np.divide(excess, slope, out=np.full(len(excess), np.inf), where=slope > 1e-9)  # no cost: no alpha
    from_alpha = np.where(excess > 1e-9, from_alpha, 0)
    never = np.isinf(from_alpha)
    return {
        "gap": (start @ (value - truth) - ALPHAS * (start @ cost)).tolist(),
        "crossing": start @ (value - truth) / (start @ cost),
        "above": [np.mean(from_alpha > alpha) for alpha in ALPHAS],
        "above_at_crossing": np.mean(from_alpha > start @ (value - truth) / (start @ cost)),
        "never": int(never.sum()),
        "everywhere": None if never.any() else from_alpha.max(),
        "believed_everywhere": None if never.any() else start @ (value - from_alpha.max() * cost),
    }


def tabular():
    """For each size of the data: the true value, what the policy relies on, and `bound` of each equation."""
    model = model_of(gymnasium.make("icu_sepsis:Sepsis/ICU-Sepsis-v2"))
    return {size: of_size(load_dataset(f"stitch/icu-sepsis-{size}-v0")[0], model) for size in SIZES}


def of_size(data, model):
    transition, reward, behaviour = mdp = empirical_mdp(data, model.reward.shape[1])
    policy = constrained_greedy(*mdp)
    truth, known, rows = true_values(model, policy), behaviour.any(axis=1), np.arange(len(policy))
    state = data.obs.argmax(axis=1)
    tried = np.bincount(state, data.action == policy[state], minlength=len(policy))  # how often, the policy's action
    following = transition[rows * reward.shape[1] + policy].toarray()
    visits = np.linalg.solve(np.eye(len(policy)) - DISCOUNT * following.T, model.initial) * known
    result = {
        "true": model.initial @ truth,
        "states": int(known.sum()),
        "steps": visits.sum(),  # discounted, of the policy in the data's MDP; below, means over them
        "inverse_b": np.average(1 / behaviour[rows, policy][known], weights=visits[known]),
        "tried_at_most_3": np.average(tried[known] <= 3, weights=visits[known]),
    }
    for equation, push_up in (("eq. 1", 0), ("eq. 2", 1)):
        value = believed(*mdp, policy, 0.0, push_up)
        result[equation] = bound(value, value - believed(*mdp, policy, 1.0, push_up), truth, model.initial, known)
    return result


# --- Networks ------------------------------------------------------------------------------------------


def networks(labels, datasets):
    """Trains these methods on these datasets: {label: {dataset: row}}."""
    rows = {}
    for dataset in datasets:
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
    about = {name: run[name] for name in ("command", "commit", "device", "config")}
    curves = {"steps": steps, "believed": believed, "true": true}
    return {"updates": steps[-1], "seeds": seeds, **about, "gap": gap, **curves}


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


def exact_table(sizes):
    columns = ["transitions", "equation", "believed minus true at alpha 0", "at the start from alpha"]
    columns += ["states above the truth there", "in every state from alpha", "believed at the start then"]
    lines = [columns, ["---"] * len(columns)]
    for size, exact in sizes.items():
        for name in ("eq. 1", "eq. 2"):
            x = exact[name]
            above = f"{100 * x['above_at_crossing']:.0f} % of {exact['states']}"
            start = [f"{x['gap'][0]:+.3f}", f"{x['crossing']:.3g}", above]
            every = [f"never in {x['never']} states", "–"]
            if not x["never"]:
                every = [f"{x['everywhere']:.3g}", f"{x['believed_everywhere']:.3g}"]
            lines.append([size, name, *start, *every])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(result):
    return (
        f"# Believed minus true value\n\nAt the start states, mean of the last {LAST} evaluations, one in 1,000 "
        "updates: median of the seeds, lowest to highest. True: the mean true value; where it is missing, only the "
        f"differences were kept. CQL has weight {CQL['weight']:g} (eq. 1: push-down alone, eq. 2: with the push-up, "
        "both with mu = pi); TD3+BC, which pushes no Q down, is a control. Published: CQL's Table 4, on D4RL's "
        "datasets of these names, partly second-hand: for orders of magnitude. Made by `lower_bound.py`.\n\n"
        f"{table(result['networks'])}\n\n"
        "On ICU-Sepsis, exact: the alphas from which eq. 1 and eq. 2 are bounds, for the mean over the start states "
        "and in every state of the data, and what is believed at the start with the latter. No policy gets less than "
        "0.\n\n"
        f"{exact_table(result['tabular'])}\n"
    )


def draw(result, path):
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), dpi=110, layout="constrained")
    (start, states, methods), curves = axes
    for i, size in enumerate(SIZES):
        for equation, line in (("eq. 1", "--"), ("eq. 2", "-")):
            exact, style = result["tabular"][size][equation], {"color": f"C{i}", "label": f"{size}, {equation}"}
            start.plot(result["alphas"], exact["gap"], line, **style)
            states.plot(result["alphas"], exact["above"], line, **style)
    start.set(title="ICU-Sepsis, exact: at the start", ylabel="believed minus true value", xlim=(0, 1), ylim=(-1, 0.5))
    states.set(title="ICU-Sepsis, exact: in every state", ylabel="share of states believed above the truth")
    for axis in (start, states):
        axis.set_xscale("symlog", linthresh=1e-5)
        axis.set_xlabel("alpha")
    states.legend(frameon=False, fontsize=8, loc="center left")

    rows = result["networks"]
    for y, row in enumerate(rows.values()):
        for i, dataset in enumerate(DATASETS):
            style = {"color": f"C{i}", "markersize": 4, "label": None if y else dataset.removeprefix("hopper-")}
            gap = row[dataset]["gap"]
            methods.plot(gap, [y + 0.2 * (i - 1)] * len(gap), "o", **style)
    methods.set_yticks(range(len(rows)), list(rows))
    methods.set_xscale("symlog", linthresh=10)
    methods.set(title="Networks: last evaluations", xlabel="believed minus true value", xlim=(-1e3, 1e9))
    methods.set_xticks([-100, 0, 100, 1e4, 1e6, 1e8])
    methods.legend(frameon=False, fontsize=8, loc="lower right")
    for axis, dataset in zip(curves, DATASETS, strict=True):
        for i, label in enumerate(CURVES):
            row = rows[label][dataset]
            gaps = np.array(row["believed"]) - np.array(row["true"])
            axis.plot(row["steps"], np.median(gaps, axis=0), color=f"C{i}", label=label)
            axis.fill_between(row["steps"], gaps.min(axis=0), gaps.max(axis=0), color=f"C{i}", alpha=0.2, lw=0)
        axis.set(title=dataset, xlabel="updates", ylim=(-300, 300))  # the diverging ones leave it
    curves[0].set_ylabel("believed minus true value")
    curves[0].legend(frameon=False, fontsize=8)

    for axis in axes.flat:
        (axis.axvline if axis is methods else axis.axhline)(0, color="0.7", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def update(path, options):
    """Runs what is asked for and changes only that in the result: the other rows took hours."""
    result = json.loads(path.read_text()) if path.exists() else {}
    rows = result.setdefault("networks", {})
    if not options.methods:
        result |= {**provenance(), "alphas": ALPHAS.tolist(), "tabular": tabular()}  # of networks, each row has its own
    if not options.tabular:
        for label, row in networks(options.methods or list(METHODS), options.datasets).items():
            rows[label] = rows.get(label, {}) | row
    result["networks"] = {label: rows[label] for label in METHODS if label in rows}
    if not options.methods:
        result |= device()
    path.write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tabular", action="store_true", help="the exact part alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="the networks alone, and of these only")
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS, help="the networks on these only")
    parser.add_argument("--draw", action="store_true", help="picture and table alone, from lower_bound.json")
    options = parser.parse_args()
    if not options.draw:
        update(HERE / "lower_bound.json", options)
    result = json.loads((HERE / "lower_bound.json").read_text())
    (HERE / "lower_bound.md").write_text(page(result))
    draw(result, HERE / "lower_bound.png")


if __name__ == "__main__":
    main()
