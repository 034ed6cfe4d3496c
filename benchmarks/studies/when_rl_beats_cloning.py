"""When does offline RL beat cloning? Cloning, filtered cloning and RL, exactly, on data whose noise is controlled.

    python benchmarks/studies/when_rl_beats_cloning.py  # a minute; writes when_rl_beats_cloning.json and .png beside it

Claims (LECTURES L15, L16; Kumar et al. 2022, https://arxiv.org/abs/2204.05618): on an expert's data cloning is as good
as RL. RL is better on noisy data, with a long horizon, and where only a few states, the critical ones, decide.

The task is a road. Each step has one of 10 states, at random. In a critical state one of 4 actions is right, and any
other one is a fall with probability 1/2; in the other states all actions are alike. Who reaches the end earns 1. So a
policy's value is a product over the steps, and exact. The demonstrators know the right action, but in a share of their
steps, the noise, they follow a habit instead: a wrong action, in each state always the same.

cloning           the most frequent action of each state; `sampled` draws from the frequencies
filtered cloning  the same, of the episodes that reached the end
RL                the highest mean of what followed, by dynamic programming from the last step, over actions in the data
RL, pessimistic   the same, less c / sqrt(number of times that the action was tried), c = 1/2
States without data have a uniform policy, for all methods.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

HERE = Path(__file__).resolve().parent
STATES, ACTIONS, FALL = 10, 4, 0.5
USUAL = {"steps": 20, "critical": 0.3, "noise": 0.4, "episodes": 1_000}
SWEEPS = {
    "noise": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "episodes": (10, 30, 100, 300, 1_000, 3_000, 10_000),
    "steps": (5, 10, 20, 40, 80),
    "critical": (0.0, 0.1, 0.3, 0.5, 1.0),
}
SLIGHT = 0.1  # the noise of a second sweep over the episodes: nearly an expert
SEEDS = 30
PESSIMISM = 0.5
METHODS = ("cloning", "cloning, sampled", "filtered cloning", "RL", "RL, pessimistic")


# --- The road ------------------------------------------------------------------------------------------------
def make_road(steps, critical, rng):
    """(is_critical (steps, STATES), right and habitual actions (steps, STATES)): the habit is never right."""
    shape = (steps, STATES)
    number = round(critical * steps * STATES)
    is_critical = rng.permutation(np.arange(steps * STATES) < number).reshape(shape)
    right = rng.integers(ACTIONS, size=shape)
    return is_critical, right, (right + rng.integers(1, ACTIONS, size=shape)) % ACTIONS


def survival(road):
    """P(no fall) of each action: (steps, STATES, ACTIONS)."""
    is_critical, right, _ = road
    wrong = np.arange(ACTIONS) != right[..., None]
    return 1 - FALL * (is_critical[..., None] & wrong)


def value(road, policy):
    """The probability that probabilities (steps, STATES, ACTIONS) reach the end."""
    return float((policy * survival(road)).sum(axis=2).mean(axis=1).prod())


def sample(road, noise, episodes, rng):
    """state, action (episodes, steps) and the number of steps until the fall; that number is steps + 1 without one."""
    _, right, habit = road
    steps = len(right)
    state, t = rng.integers(STATES, size=(episodes, steps)), np.arange(steps)
    action = np.where(rng.random(state.shape) < noise, habit[t, state], right[t, state])
    falls = rng.random(state.shape) > survival(road)[t, state, action]
    return state, action, np.where(falls.any(axis=1), falls.argmax(axis=1) + 1, steps + 1)


# --- The methods ---------------------------------------------------------------------------------------------
def count(state, action, used):
    """n (steps, STATES, ACTIONS) of the entries in use, (episodes, steps) bool."""
    n = np.zeros((state.shape[1], STATES, ACTIONS))
    np.add.at(n, (np.broadcast_to(np.arange(state.shape[1]), state.shape)[used], state[used], action[used]), 1)
    return n


def frequencies(n):
    total = n.sum(axis=2, keepdims=True)
    return np.where(total > 0, n / np.maximum(total, 1), 1 / ACTIONS)


def greedy(score):
    """Probabilities: the highest score, shared between equal ones; uniform where none is finite."""
    best = score == score.max(axis=-1, keepdims=True)
    return best / best.sum(axis=-1, keepdims=True)


def dynamic_programming(n, survived, pessimism):
    """Policy of the last step first. Q is the share of survivors times what the next step is worth.

    n, survived: how often an action was taken, and without a fall: (steps, STATES, ACTIONS). A state's next state is as
    often each of the step's states, whatever was done: the data's own frequencies of states.
    """
    policy, later = np.zeros_like(n), 1.0
    for t in reversed(range(len(n))):
        tried = np.maximum(n[t], 1)
        q = np.where(n[t] > 0, survived[t] / tried * later - pessimism / np.sqrt(tried), -np.inf)
        policy[t] = greedy(np.where(np.isfinite(q), q, -np.inf))
        worth = np.where(n[t] > 0, survived[t] / tried * later, 0)
        seen = n[t].sum(axis=1)
        later = ((policy[t] * worth).sum(axis=1) * seen).sum() / max(seen.sum(), 1)
    return policy


def learn(state, action, length):
    """{method: policy}."""
    steps = state.shape[1]
    used = np.arange(steps) < length[:, None]
    survived = np.arange(steps) < length[:, None] - 1
    n, alive = count(state, action, used), count(state, action, survived)
    finished = count(state, action, used & (length > steps)[:, None])
    return {
        "cloning": greedy(n),
        "cloning, sampled": frequencies(n),
        "filtered cloning": greedy(finished),
        "RL": dynamic_programming(n, alive, 0.0),
        "RL, pessimistic": dynamic_programming(n, alive, PESSIMISM),
    }


def measure(steps, critical, noise, episodes, seeds=SEEDS):
    """{method: values of the seeds}, and the demonstrators' own, each on a road and data of its own."""
    found = {name: [] for name in (*METHODS, "demonstrators")}
    for seed in range(seeds):
        rng = np.random.default_rng([seed, steps, episodes, round(100 * critical), round(100 * noise)])
        road = make_road(steps, critical, rng)
        policies = learn(*sample(road, noise, episodes, rng))
        eye = np.eye(ACTIONS)
        policies["demonstrators"] = (1 - noise) * eye[road[1]] + noise * eye[road[2]]
        for name, policy in policies.items():
            found[name].append(value(road, policy))
    return found


def draw(result, path):
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), dpi=120, sharey=True, layout="constrained")
    for axis, (title, sweep) in zip(axes.flat, result["sweeps"].items(), strict=False):
        for i, name in enumerate((*METHODS, "demonstrators")):
            rows = np.array([point[name] for point in sweep["points"]])
            style = {"color": f"C{i}" if name in METHODS else "0.3", "marker": "os^Dv."[i], "markersize": 4}
            style["linestyle"] = "-" if name in METHODS else ":"
            low, high = np.percentile(rows, [25, 75], axis=1)
            axis.plot(sweep["values"], rows.mean(axis=1), label=name, **style)
            axis.fill_between(sweep["values"], low, high, color=style["color"], alpha=0.12, linewidth=0)
        if sweep["field"] in ("episodes", "steps"):
            axis.set_xscale("log")
            axis.set_xticks(sweep["values"], [f"{x:,}" for x in sweep["values"]])
            axis.minorticks_off()
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(sweep["field"])
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("probability of reaching the end")
    axes.flat[-1].set_visible(False)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="lower right", frameon=False, bbox_to_anchor=(0.95, 0.15)
    )
    figure.suptitle("Mean of the seeds; the band holds half of them")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about, sweeps = provenance(), {}
    named = {
        f"{field} (else {', '.join(f'{k} {v:g}' for k, v in USUAL.items() if k != field)})": (field, USUAL)
        for field in SWEEPS
    }
    named[f"episodes, with noise {SLIGHT:g}"] = ("episodes", USUAL | {"noise": SLIGHT})
    for title, (field, others) in named.items():
        points = [measure(**others | {field: x}) for x in SWEEPS[field]]
        sweeps[title] = {"field": field, "values": SWEEPS[field], "others": others, "points": points}
        for x, point in zip(SWEEPS[field], points, strict=True):
            print(f"{title}: {x:g}  " + ", ".join(f"{name} {np.mean(v):.2f}" for name, v in point.items()), flush=True)
    result = {**about, **device(), "seeds": SEEDS, "pessimism": PESSIMISM, "usual": USUAL, "sweeps": sweeps}
    (HERE / "when_rl_beats_cloning.json").write_text(json.dumps(result) + "\n")
    draw(result, HERE / "when_rl_beats_cloning.png")


if __name__ == "__main__":
    main()
