"""The narrow bridge: a KL constraint is too strict and too loose at once for samples; a support constraint is neither.

    python benchmarks/studies/support.py            # some minutes; writes support.json and support.png beside it

Claim (LECTURES L10): where the behaviour policy is random its density should not bind, where it is narrow it must. Two
states, each a bandit with one action in [-1, 1]:
    field    behaviour uniform; reward 1 - |a - 0.8|. To be good is to leave the behaviour's density far behind.
    bridge   behaviour N(0, 0.05^2); reward 5 a while |a| <= 0.15, and -1 beyond, where there are no data: what was
             learned on the bridge, that more is better, leads off it.
Shown is the true reward in both states for each strength of a constraint; the best corner is top right.
    expected   of the policy, solid. All are stochastic, but the optimum under a support constraint.
    acting     of the one action at evaluation, dashed: the mode or, of BEAR, the best of 100. A mode can be good where
               many samples are not, and the claim does not hold for it.

Exact      KL(pi, b): pi ~ b exp(Q / alpha). Support: argmax of Q over {a: b(a|s) >= epsilon}. Q continues as 5 a,
           so that the mode of the first is 5 0.05^2 / alpha on the bridge. In the field it is 0.8 for every alpha.
Learned    brac.py (KL and MMD) and bear.py as they are, on 4,096 rows, a grid of strengths in one program.
"""

import dataclasses
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

from algos import bear, brac  # noqa: E402
from common.datasets import Transition  # noqa: E402
from common.environments import Spec  # noqa: E402
from common.networks import TanhGaussianActor  # noqa: E402

HERE = Path(__file__).resolve().parent
FIELD, BRIDGE = np.eye(2, dtype=np.float32)
WIDTH, SPREAD, SLOPE = 0.15, 0.05, 5.0  # of the bridge, of the behaviour on it, of the reward on it
GRID = np.linspace(-1, 1, 4001)
ALPHAS = np.geomspace(0.01, 10, 13)
EPSILONS = np.geomspace(0.01, 0.49, 13)
UPDATES = 4_000
COMMON = dict(hidden=(64, 64), batch_size=256, num_updates=UPDATES, pretrain_updates=2_000, log_interval=1_000,
              eval_interval=1_000, learning_rate=1e-3, actor_learning_rate=1e-3)  # fmt: skip
LEARNED = {  # label: algorithm, fields, the float that is the strength of its constraint, and its values
    "BRAC, KL": (brac, {}, "alpha", ALPHAS),
    "BRAC, MMD": (brac, {"divergence": "mmd"}, "alpha", 100 * ALPHAS),
    "BEAR": (bear, {"vae_hidden": (64, 64)}, "mmd_threshold", np.geomspace(0.003, 0.3, 13)),
}


def true_reward(on_bridge, action):
    if on_bridge:
        return np.where(np.abs(action) <= WIDTH, SLOPE * action, -1.0)
    return 1 - np.abs(action - 0.8)


def exact():
    """Of each constraint's optimum: true reward in field and bridge, (strengths, 2), expected and acting."""
    behaviour = np.stack([np.full_like(GRID, 0.5), np.exp(-0.5 * (GRID / SPREAD) ** 2) / (SPREAD * np.sqrt(2 * np.pi))])
    q = np.stack([true_reward(False, GRID), SLOPE * GRID])  # of the bridge: as the data on it have it
    true = np.stack([true_reward(False, GRID), true_reward(True, GRID)])
    kl, mode, support = [], [], []
    states = np.arange(2)
    for alpha in ALPHAS:
        log_pi = np.log(np.maximum(behaviour, 1e-300)) + q / alpha
        pi = np.exp(log_pi - log_pi.max(axis=1, keepdims=True))
        kl.append((pi * true).sum(axis=1) / pi.sum(axis=1))
        mode.append(true[states, pi.argmax(axis=1)])
    for epsilon in EPSILONS:
        best = np.where(behaviour >= epsilon, q, -np.inf).argmax(axis=1)
        support.append(true[states, best])
    kl, mode, support = map(np.array, (kl, mode, support))
    return {"KL": {"expected": kl, "acting": mode}, "support": {"expected": support, "acting": support}}


def make_data(rows=4096):
    rng = np.random.default_rng(0)
    on_bridge = np.arange(rows) % 2 == 1
    action = np.where(on_bridge, rng.normal(0, SPREAD, rows), rng.uniform(-1, 1, rows))
    action = np.clip(action, -np.where(on_bridge, WIDTH, 1), np.where(on_bridge, WIDTH, 1))  # the data never fall
    reward = np.where(on_bridge, true_reward(True, action), true_reward(False, action))
    obs = np.where(on_bridge[:, None], BRIDGE, FIELD).astype(np.float32)
    action, reward, terminal = action[:, None].astype(np.float32), reward.astype(np.float32), np.ones(rows, np.float32)
    return jax.tree.map(jnp.asarray, Transition(obs, action, reward, obs, terminal))


def learned(algo, fields, strength, values, data):
    """True reward in field and bridge, (strengths, 2): expected of the policy, and of the action at evaluation."""

    def run(value):
        cfg = dataclasses.replace(algo.Config(**COMMON, **fields), **{strength: value})
        agent = algo.make_agent(cfg, Spec(2, 1))
        state = agent.init(jax.random.key(0))
        for phase, updates in (("pretrain", cfg.pretrain_updates), ("update", cfg.num_updates)):
            whole = dataclasses.replace(cfg, log_interval=updates)
            state, _ = algo.make_train(whole, agent, phase)(state, data)
        obs = jnp.stack([FIELD, BRIDGE])
        pi = TanhGaussianActor(1, cfg.hidden, log_std_min=-5.0).apply(state.actor.params, obs)  # as both files have it
        samples = jax.vmap(pi.sample)(jax.random.split(jax.random.key(1), 1_000))
        return samples[..., 0], agent.act(state, obs, jax.random.key(2))[:, 0]

    samples, action = map(np.asarray, jax.jit(jax.vmap(run))(jnp.asarray(values, jnp.float32)))
    expected, acting = (
        np.stack([true_reward(on_bridge, x[..., on_bridge]) for on_bridge in (0, 1)], axis=-1)
        for x in (samples, action)
    )
    return {"expected": expected.mean(axis=1), "acting": acting}


def worse_state(points):
    """Share of the best reward in the worse of the two states, at the strength where that is largest."""
    return float((points / [1.0, SLOPE * WIDTH]).min(axis=1).max())


def draw(results, path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), dpi=120, sharex=True, sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes, results.items(), strict=True):
        for i, (label, rewards) in enumerate(curves.items()):
            axis.plot(*rewards["expected"].T, "o-", color=f"C{i}", markersize=4, label=label)
            axis.plot(*rewards["acting"].T, "s--", color=f"C{i}", markersize=7, markerfacecolor="none", lw=1, zorder=3)
        axis.set(title=title, xlabel="reward in the field (at most 1)")
        axis.axhline(SLOPE * WIDTH, color="0.85", zorder=0)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(f"reward on the bridge (at most {SLOPE * WIDTH:g})")
    figure.suptitle(
        "Each point is one strength: the policy's expected reward (solid), that of its mode or best of 100 (dashed)"
    )
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about, data = provenance(), make_data()
    results = {"Exact": exact(), "Learned": {label: learned(*args, data) for label, args in LEARNED.items()}}
    best = jax.tree.map(worse_state, results["Exact"] | results["Learned"])
    print("share of the best reward in the worse state, at the best strength:")
    for label, shares in best.items():
        print(f"{label:10s} expected {shares['expected']:.2f}, acting {shares['acting']:.2f}", flush=True)
    result = {**about, **device(), "best": best, **jax.tree.map(np.ndarray.tolist, results)}
    (HERE / "support.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(results, HERE / "support.png")


if __name__ == "__main__":
    main()
