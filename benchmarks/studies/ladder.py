"""The ladder of weighted imitation on the smallest example: one state, a good and a bad action, tried equally often.

    python benchmarks/studies/ladder.py            # a few minutes; writes ladder.json and ladder.png next to this file

The example of the lectures. Behaviour cloning ends at one half each; every rung above weighs the good action more. The
files in algos/ are run as they are, through their own `load_data` and `make_train`, on Minari datasets of one-step
episodes; the probability of the good action that each ends with stands beside its closed form. Three sets of rewards:

    as taught     0.9 and 0.1
    negative      -0.1 and -0.9: the same differences
    large         900 and 100

All exponential weights have beta 1 (EQL: 10 / alpha = 1), REPS and MPO a ball of 0.1 nats; the rest is each file's
default.
"""

import importlib
import json
import os
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.special import expit, rel_entr  # noqa: E402

from common.networks import CategoricalActor  # noqa: E402

HERE = Path(__file__).resolve().parent
REWARDS = {"as taught": (0.9, 0.1), "negative": (-0.1, -0.9), "large": (900.0, 100.0)}
UPDATES = 4_000
COMMON = dict(hidden=(32,), batch_size=256, num_updates=UPDATES, log_interval=1_000, learning_rate=1e-2)
METHODS = {  # label: algorithm, fields
    "BC": ("bc", {}),
    "EMRL": ("emrl", {}),
    "RWR": ("rwr", {"beta": 1.0}),
    "MARWIL": ("marwil", {"beta": 1.0}),
    "AWR": ("awr", {"beta": 1.0, "prepare_interval": 1_000}),
    "REPS": ("reps", {"epsilon": 0.1, "discount": 0.0}),
    "AWAC": ("awac", {"beta": 1.0, "reward_shift": 0.0}),
    "CRR exp": ("crr", {"beta": 1.0, "reward_shift": 0.0}),
    "CRR binary": ("crr", {"binary": True, "reward_shift": 0.0}),
    "IQL": ("iql", {"beta": 1.0, "reward_shift": 0.0}),
    "XQL": ("xql", {"beta": 1.0, "reward_shift": 0.0}),
    "SQL": ("sql", {"reward_shift": 0.0}),
    "EQL": ("eql", {"alpha": 10.0, "reward_shift": 0.0}),
    "MPO": ("mpo", {"epsilon": 0.1, "reward_shift": 0.0}),
    "MPO, prior": ("mpo", {"epsilon": 0.1, "prior": True, "reward_shift": 0.0}),
}


def closed_form(label, good, bad):
    """pi(good action) at the optimum of the method's loss, with exact values; None where there is no optimum."""
    gap = good - bad
    if label == "BC":
        return 0.5
    if label == "EMRL":  # mu E[w]; a negative weight has no optimum
        return good / (good + bad) if bad >= 0 else None
    if label in ("MARWIL", "AWR"):  # in units of the deviation, which is gap / 2: +1 and -1
        return expit(2.0)
    if label in ("REPS", "MPO, prior"):  # the distribution at 0.1 nats from (1/2, 1/2), whatever the rewards
        return brentq(lambda p: rel_entr(p, 0.5) + rel_entr(1 - p, 0.5) - 0.1, 0.5, 1)
    if label in ("CRR binary", "SQL", "MPO"):  # the bad action's weight is 0; MPO's ball moves with its policy
        return 1.0
    return expit(gap)  # exp(beta Q) in the same state: whatever the baseline


def write_dataset(name, good, bad):
    """64 episodes of one step; action 1 is the good one."""
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    def episode(action):
        reward = np.array([good if action else bad])
        observations = np.ones((2, 1), np.float32)
        return EpisodeBuffer(
            observations=observations,
            actions=np.array([action]),
            rewards=reward,
            terminations=[True],
            truncations=[False],
        )

    minari.create_dataset_from_buffers(
        name,
        buffer=[episode(i % 2) for i in range(64)],
        observation_space=spaces.Box(-1, 1, (1,), np.float32),
        action_space=spaces.Discrete(2),
    )


def probability(label, dataset_id, cache):
    """pi(good action) after training, the metrics of the end, and why there are none."""
    name, fields = METHODS[label]
    algo = importlib.import_module(f"algos.{name}")
    cfg = algo.Config(**(COMMON | fields), dataset=dataset_id)
    try:
        data, env = algo.load_data(cfg)
    except SystemExit as refusal:
        return None, {}, str(refusal)
    agent = algo.make_agent(cfg, env.spec)
    train = cache.setdefault(label, jax.jit(algo.make_train(cfg, agent)))  # one compilation for all rewards
    state = jax.jit(agent.init)(jax.random.key(0))
    for _ in range(UPDATES // cfg.log_interval):
        state, metrics = train(state, data)
    logits = CategoricalActor(2, cfg.hidden).apply(state.actor.params, jnp.ones((1, 1))).logits
    return float(jax.nn.softmax(logits)[0, 1]), {k: float(v) for k, v in metrics.items()}, ""


def draw(results, path):
    figure, axes = plt.subplots(1, len(REWARDS), figsize=(11, 4.2), dpi=120, sharey=True, layout="constrained")
    rows = np.arange(len(METHODS))[::-1]
    for axis, (case, (good, bad)) in zip(axes, REWARDS.items(), strict=True):
        for row, label in zip(rows, METHODS, strict=True):
            result = results[case][label]
            if result["closed_form"] is not None:
                axis.plot(result["closed_form"], row, "|", color="black", markersize=14, markeredgewidth=2)
            if result["learned"] is not None:
                axis.plot(result["learned"], row, "o", color="#0072B2")
            else:
                axis.text(0.03, row, "refused: no optimum", va="center", color="#D55E00")
        axis.set(title=f"{case}: {good:g} and {bad:g}", xlim=(-0.02, 1.02), xlabel="probability of the good action")
        axis.axvline(0.5, color="0.85", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(rows, list(METHODS))
    figure.suptitle("One state, two actions: what each rung learns (dots) and its closed form (bars)")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    made_by, results, cache = provenance(), {}, {}
    with tempfile.TemporaryDirectory() as root:
        os.environ["MINARI_DATASETS_PATH"] = root
        for i, (case, (good, bad)) in enumerate(REWARDS.items()):
            name = f"study/two-actions-{i}-v0"
            write_dataset(name, good, bad)
            results[case] = {}
            for label in METHODS:
                learned, metrics, refused = probability(label, name, cache)
                exact = closed_form(label, good, bad)
                results[case][label] = {
                    "closed_form": exact,
                    "learned": learned,
                    "metrics": metrics,
                    "refused": refused,
                }
                shown = [f"{x:.4f}" if x is not None else "none" for x in (learned, exact)]
                print(f"{case:10s} {label:11s} learned {shown[0]}, closed form {shown[1]}  {refused}", flush=True)
    about = {"rewards": REWARDS, "settings": COMMON, "methods": METHODS} | made_by | device()
    (HERE / "ladder.json").write_text(json.dumps(about | {"results": results}, indent=1))
    draw(results, HERE / "ladder.png")


if __name__ == "__main__":
    main()
