"""The deadly triad on the smallest example, first with one weight, then with networks and the files of this project.

    python benchmarks/studies/deadly_triad.py    # some minutes; writes deadly_triad.json and deadly_triad.png beside it

Claim (LECTURES L6): one state that leads to itself, reward 0, two actions of features 1 and 2, Q = w a, and data of the
action 1 only. Q-learning's w grows for ever, though every true value is 0. It needs function approximation,
bootstrapping and off-policy data together: take one away and it does not.

Linear     One step on one data action is w <- w + lr a (y - w a), with y = discount max(w, 2 w). From w = 1:
               all three             w grows by 1 + lr (2 discount - 1) a step
               no bootstrapping      y is the return of the data, 0: w shrinks by 1 - lr
               no off-policy data    the data are the greedy policy's, a = 2: w shrinks by 1 - 4 lr (1 - discount)
               no approximation      a table: Q(1) ends at discount Q(2), where the unseen Q(2) was: wrong, not growing
               batch-constrained     the maximum is over the data's actions only: w shrinks by 1 - lr (1 - discount)
Networks   The same state with actions in [-1, 1], the data's always 0.5. With reward 0 it is the example above, but w
           started at 1 and networks start near 0. With reward 1 all true values are 100, and learning that at 0.5 tilts
           Q. DDPG, TD3 and SAC maximise Q over all actions. BCQ without its perturbation, phi = 0, is the
           batch-constrained backup; BCQ as it is, TD3+BC and IQL stay near the data's action in other ways. Shown is Q
           of the policy's action.
"""

import importlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

from common.datasets import Transition  # noqa: E402
from common.environments import Spec  # noqa: E402

HERE = Path(__file__).resolve().parent
LEARNING_RATE, DISCOUNT, STEPS = 0.1, 0.99, 300
SEEDS, UPDATES, LOOK = 10, 10_000, 500  # of the networks; LOOK updates between two points
COMMON = dict(hidden=(64, 64), batch_size=64, log_interval=LOOK, eval_interval=LOOK, num_updates=UPDATES,
              learning_rate=1e-3, tau=0.02, discount=DISCOUNT)  # fmt: skip
METHODS = {  # label: algorithm, fields
    "DDPG": ("ddpg", {}),
    "TD3": ("td3", {}),
    "SAC": ("sac", {}),
    "TD3+BC": ("td3_bc", {}),
    "BCQ": ("bcq", {"vae_hidden": (64, 64)}),
    "BCQ, phi 0": ("bcq", {"vae_hidden": (64, 64), "phi": 0.0}),
    "IQL": ("iql", {}),
}
NAIVE = ("DDPG", "TD3", "SAC")
REWARDS = (0, 1)


def linear():
    """|w| (or, of the table, |Q(1)|) after each step, for each way of learning."""

    def run(step, x):
        values = [x]
        for _ in range(STEPS):
            values.append(step(values[-1]))
        return np.array(values)

    def towards(feature, target):  # one step of w on the action with that feature
        return lambda w: w + LEARNING_RATE * feature * (target(w) - w * feature)

    def table(q):  # (Q(1), Q(2)): the data never show the second
        return np.array([q[0] + LEARNING_RATE * (DISCOUNT * q.max() - q[0]), q[1]])

    return {
        "all three": run(towards(1, lambda w: DISCOUNT * max(w, 2 * w)), 1.0),
        "no bootstrapping": run(towards(1, lambda w: 0.0), 1.0),
        "no off-policy data": run(towards(2, lambda w: DISCOUNT * max(w, 2 * w)), 1.0),
        "no approximation": run(table, np.array([1.0, 2.0]))[:, 0],
        "batch-constrained": run(towards(1, lambda w: DISCOUNT * w), 1.0),
    }


def networks(name, fields, reward):
    """Q of the policy's action, (seeds, looks); its true value is reward / (1 - discount)."""
    algo = importlib.import_module(f"algos.{name}")
    cfg = algo.Config(**COMMON, **fields)
    agent = algo.make_agent(cfg, Spec(1, 1))
    rows = jnp.ones((cfg.batch_size, 1))
    data = Transition(rows, 0.5 * rows, reward * rows[:, 0], rows, 0 * rows[:, 0])

    def look(state, key):
        state, _ = algo.make_train(cfg, agent)(state, data)
        obs = jnp.ones((1,))
        return state, agent.q(state, obs, agent.act(state, obs, key))

    def run(seed):
        keys = jax.random.split(jax.random.key(1_000 + seed), UPDATES // LOOK)
        return jax.lax.scan(look, agent.init(jax.random.key(seed)), keys)[1]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.arange(SEEDS)))


def draw(weights, beliefs, path):
    figure, axes = plt.subplots(1, 1 + len(REWARDS), figsize=(15, 4.2), dpi=110, layout="constrained")
    for label, values in weights.items():
        axes[0].plot(np.abs(values), label=label)
    axes[0].set(xlabel="steps", ylabel="|w|, or |Q(1)| of the table", yscale="log", ylim=(1e-3, 1e6))
    axes[0].set_title("One weight, Q = w a: the true value is 0")
    updates = LOOK * np.arange(1, UPDATES // LOOK + 1)
    for axis, reward in zip(axes[1:], REWARDS, strict=True):
        for i, label in enumerate(METHODS):
            line = dict(ls="-" if label in NAIVE else "--", color=f"C{i}", lw=0.8, alpha=0.7)
            axis.plot(updates, beliefs[reward][label].T, label=[label] + [None] * (SEEDS - 1), **line)
        axis.set(xlabel="updates", ylabel="Q of the policy's action")
        axis.set_yscale("symlog", linthresh=1)
        axis.axhline(reward / (1 - DISCOUNT), color="0.7", zorder=0)
        axis.set_title(f"Networks, {SEEDS} seeds, reward {reward}: the true value is {reward / (1 - DISCOUNT):.0f}")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8, loc="upper right" if axis is axes[0] else "upper left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about, weights, beliefs = provenance(), linear(), {}
    for reward in REWARDS:
        beliefs[reward] = {label: networks(*algorithm, reward) for label, algorithm in METHODS.items()}
        for label, values in beliefs[reward].items():
            final = values[:, -1]
            spread = f"median {np.median(final):.3g}, {final.min():.3g} to {final.max():.3g}"
            print(f"reward {reward}: {label:10s} Q after {UPDATES} updates: {spread}", flush=True)
    ends = {
        f"reward {reward}": {label: values[:, -1].tolist() for label, values in of_methods.items()}
        for reward, of_methods in beliefs.items()
    }
    result = {
        "settings": {**COMMON, "seeds": SEEDS},
        **about,
        **device(),
        "linear": {label: float(values[-1]) for label, values in weights.items()},
        "networks": ends,
    }
    (HERE / "deadly_triad.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(weights, beliefs, HERE / "deadly_triad.png")


if __name__ == "__main__":
    main()
