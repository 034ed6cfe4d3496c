"""Two ways round a block: what a Gaussian, a mixture (VAE), a flow and a diffusion learn where data have two modes.

    python benchmarks/studies/multimodality.py      # some 6 minutes; multimodality.json and .png, and the page's table

Claim: behaviour that is recorded from people has modes, and a Gaussian policy cannot hold them: it puts its mean
between them, where nobody was. Policies that transform noise can. Two examples, cloned, without rewards:
    bandit   one state, actions in [-1, 1]: half N(-0.5, 0.1^2), half N(0.5, 0.1^2).
    fork     a point walks from the left to the right of a block, on the one side or on the other one, each half of the
             time. At the fork half of the data go up and half go down. Observed is the place alone, which does not tell
             the side there, but does so a few steps later: a policy may win back what its first actions lose.
Shown of each policy, over seeds:
    distance   total variation between the histogram of its actions and the truth, in the bandit: 0 equal, 1 disjoint
    between    share of its actions within 0.2 of 0. The data have 0.13 %.
    reached    share of its walks that come to the right side in 150 steps; the others hit the block, or are stuck
    up         share of those that reached it which went the upper way
    passes     of the policy's network for one action, and the time that an action takes, alone and among 1,000. In this
               time is a critic, too, where there is one that would choose among actions

Each policy is a file of this project as it is. Where it would choose among actions by a critic, it gets one action:
that is plain cloning by its model of the behaviour. The average of IDQL's actor moves by 0.005 an update in the place
of 0.001, since there are few of them.
"""

import dataclasses
import importlib
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402

from common.datasets import Transition  # noqa: E402
from common.environments import Spec  # noqa: E402

HERE = Path(__file__).resolve().parent
MODE, SPREAD = 0.5, 0.1  # of the bandit's data: +-MODE, and the deviation round each
STRIDE, WIDE, HIGH = 0.05, 0.3, 0.35  # of a step; half of the block's width and height
TURN, LANE, GOAL = 0.6, 0.5, 0.8  # walks turn at x = -TURN, pass at y = +-LANE, turn back at TURN and end at x = GOAL
LIMIT = 150  # steps of a walk
BINS = np.linspace(-1, 1, 81)
SEEDS, SAMPLES, ROWS, WALKS = 3, 20_000, 20_000, 400  # walks of the data, and of a policy
COMMON = dict(hidden=(128, 128), batch_size=256, num_updates=3_000, log_interval=3_000, eval_interval=3_000,
              learning_rate=1e-3)  # fmt: skip
VAE = dict(vae_hidden=(128, 128), phi=0.0, num_samples=1, num_act_samples=1)
METHODS = {  # label: file, fields, and passes of a network for one action
    "Gaussian, mode": ("bc", {}, 1),
    "Gaussian, sampled": ("bc", {"act": "sample"}, 1),
    "VAE, latents within 0.5 (BCQ)": ("bcq", VAE, 1),
    "VAE": ("bcq", VAE | {"latent_clip": 10.0}, 1),
    "flow": ("ifql", {"num_samples": 1, "flow_steps": 10}, 10),
    "diffusion": ("idql", {"num_samples": 1, "num_steps": 5, "actor_hidden": (128, 128), "actor_tau": 0.005}, 5),
}


# --- The examples -----------------------------------------------------------------------------------------


def rows(obs, action):
    """A dataset of these rows, without rewards; each is the last of its episode, so that values are 0."""
    n = len(obs)
    obs, action = obs.astype(np.float32), np.clip(action, -1, 1).astype(np.float32)
    return jax.tree.map(jnp.asarray, Transition(obs, action, np.zeros(n, np.float32), obs, np.ones(n, np.float32)))


def bandit(number):
    rng = np.random.default_rng(0)
    action = rng.choice([-MODE, MODE], number) + SPREAD * rng.standard_normal(number)
    return rows(np.ones((number, 1)), action[:, None])


def truth():
    """Probability of each bin of the bandit's actions."""
    cdf = np.vectorize(statistics.NormalDist(0, SPREAD).cdf)
    return np.diff(0.5 * cdf(BINS - MODE) + 0.5 * cdf(BINS + MODE))


def guide(place, side):
    """The demonstrator's action, (n, 2), at places (n, 2), on the side (n,) of +1 or -1 that it has chosen."""
    x, y = place.T
    to_lane, past = (x >= -TURN) & (x < TURN), x >= TURN
    up = to_lane & (side * y < LANE)
    down = past & (side * y > 0.05)
    x_action = np.where(up, 0.5, np.where(down, 0.0, 1.0))  # the block comes nearer while one turns
    return np.stack([x_action, side * np.where(up, 0.87, np.where(down, -1.0, 0.0))], axis=1)


def walk(policy, number, rng):
    """Walks of policy(places) from the left: places (steps + 1, n, 2); whether each "reached", "hit" or is "stuck"."""
    place = np.stack([np.full(number, -GOAL), 0.02 * rng.standard_normal(number)], axis=1)
    places, ended = [place], np.full(number, "stuck", object)
    for _ in range(LIMIT):
        walking = ended == "stuck"
        place = np.where(walking[:, None], place + STRIDE * np.clip(policy(place), -1, 1), place)
        inside = (np.abs(place) < [WIDE, HIGH]).all(axis=1)
        ended[walking & inside], ended[walking & (place[:, 0] >= GOAL)] = "hit", "reached"
        places.append(place)
    return np.stack(places), ended


def fork(walks):
    """Rows of so many demonstrations, with noise on every action."""
    rng = np.random.default_rng(1)
    side, seen, done = rng.choice([-1.0, 1.0], walks), [], []

    def demonstrate(place):
        seen.append(place)
        done.append(guide(place, side) + 0.1 * rng.standard_normal(place.shape))
        return done[-1]

    places, ended = walk(demonstrate, walks, rng)
    assert np.all(ended == "reached")
    moved = np.any(np.diff(places, axis=0) != 0, axis=2)  # the rows of a walk that has ended are left out
    return rows(np.stack(seen)[moved], np.stack(done)[moved])


# --- What is learned --------------------------------------------------------------------------------------


def learner(file, fields, data, spec):
    """`train(seed)`: `act(obs, key)` of the file, trained on the data. All seeds share what is compiled."""
    algo = importlib.import_module(f"algos.{file}")
    cfg = dataclasses.replace(algo.Config(**COMMON), **fields)
    agent = algo.make_agent(cfg, spec)
    init, update, act = jax.jit(agent.init), jax.jit(algo.make_train(cfg, agent)), jax.jit(agent.act)

    def train(seed):
        state, _ = update(init(jax.random.key(seed)), data)
        return lambda obs, key: act(state, obs, key)

    return train


def of_bandit(act):
    """(probability of each bin, total variation from the truth, share of actions between the modes)."""
    action = np.asarray(act(jnp.ones((SAMPLES, 1)), jax.random.key(1)))[:, 0]
    shares = np.histogram(action, BINS)[0] / SAMPLES
    return shares, 0.5 * np.abs(shares - truth()).sum(), np.mean(np.abs(action) < 0.2)


def of_fork(act, seed):
    """(places of the walks, shares of how they ended, share of those that reached the goal by the upper way)."""
    keys = iter(jax.random.split(jax.random.key(seed), LIMIT))
    places, ended = walk(
        lambda place: np.asarray(act(jnp.asarray(place, jnp.float32), next(keys))), WALKS, np.random.default_rng(seed)
    )
    shares = {how: float(np.mean(ended == how)) for how in ("reached", "hit", "stuck")}
    middle = places[np.abs(places[:, :, 0]).argmin(axis=0), np.arange(WALKS), 1]  # y where x is next to 0
    return places, shares | {"up": float(np.mean(middle[ended == "reached"] > 0)) if shares["reached"] else None}


def microseconds(act, number):
    """Of one action, where `number` are asked for at once: the median of 20 calls."""
    obs, seconds = jnp.zeros((number, 2)), []
    for k in jax.random.split(jax.random.key(0), 21):
        started = time.perf_counter()
        jax.block_until_ready(act(obs, k))
        seconds.append(time.perf_counter() - started)
    return 1e6 * statistics.median(seconds[1:]) / number  # the first call compiles


def measure(file, fields, passes):
    """Numbers of a method, each a list over seeds, and the walks of the first seed."""
    one, two = learner(file, fields, bandit(ROWS), Spec(1, 1)), learner(file, fields, fork(WALKS), Spec(2, 2))
    result = {"passes": passes, "density": [], "distance": [], "between": [], "fork": []}
    for seed in range(SEEDS):
        shares, distance, between = of_bandit(one(seed))
        act = two(seed)
        places, ended = of_fork(act, seed)
        values = shares.tolist(), float(distance), float(between), ended
        for name, value in zip(("density", "distance", "between", "fork"), values, strict=True):
            result[name].append(value)
        if seed == 0:
            walks, result["microseconds"] = places, {str(n): microseconds(act, n) for n in (1, 1_000)}
    return result, walks


def table(result):
    """Markdown: a row for each policy, means over the seeds (lowest to highest)."""
    head = ["policy", "distance", "between the modes", "reached", "of these, the upper way", "passes", "an action",
            "among 1,000"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for label, row in result["results"].items():
        up = [100 * x["up"] for x in row["fork"] if x["up"] is not None]
        cells = [label, spread(row["distance"], ".2f"), spread([100 * x for x in row["between"]], ".1f", " %")]
        cells.append(spread([100 * x["reached"] for x in row["fork"]], ".0f", " %"))
        cells += [spread(up, ".0f", " %") if up else "–", str(row["passes"])]
        cells += [f"{row['microseconds'][number]:,.{digits}f} µs" for number, digits in (("1", 0), ("1000", 1))]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread(values, form, unit=""):
    low, high = (f"{x:{form}}" for x in (min(values), max(values)))
    return f"{np.mean(values):{form}}{unit}" + (f" ({low} to {high})" if low != high else "")


def shown(result):
    """What stands between the marks of the studies' page."""
    title = "Above: density of actions in one state, of six policies. Below: their walks round a block"
    return f"![{title}](multimodality.png)\n\nNumbers: [`multimodality.json`](multimodality.json).\n\n{table(result)}"


def draw(results, walks, path):
    figure, axes = plt.subplots(2, len(results), figsize=(2.6 * len(results), 5.4), dpi=110, layout="constrained")
    centre, width = (BINS[1:] + BINS[:-1]) / 2, BINS[1] - BINS[0]
    for (label, result), (above, below) in zip(results.items(), axes.T, strict=True):
        above.fill_between(centre, truth() / width, color="0.8", step="mid", label="data")
        above.step(centre, np.array(result["density"][0]) / width, where="mid", color="C0", label="policy")
        above.set_title(label.replace(", ", ",\n"), fontsize=11)
        above.set(xlabel="action", yticks=[], ylim=(0, 4))
        below.add_patch(plt.Rectangle((-WIDE, -HIGH), 2 * WIDE, 2 * HIGH, color="0.75"))
        below.plot(*np.moveaxis(walks[label][:, :60], -1, 0), color="C0", lw=0.5, alpha=0.5)
        reached = np.mean([x["reached"] for x in result["fork"]])
        below.set(xlim=(-1, 1), ylim=(-0.8, 0.8), xticks=[], yticks=[], xlabel=f"{100 * reached:.0f} % reach the right")
        above.spines[["top", "right", "left"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.suptitle("Above: density of the actions in one state. Below: walks of the policy round a block")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def main():
    about, results, walks = provenance(), {}, {}
    for label, method in METHODS.items():
        results[label], walks[label] = measure(*method)
        means = {name: np.mean(results[label][name]) for name in ("distance", "between")}
        reached = np.mean([x["reached"] for x in results[label]["fork"]])
        said = f"distance {means['distance']:.2f}, between {means['between']:.3f}, reached {reached:.2f}"
        print(f"{label:30s} {said}, {results[label]['microseconds']['1']:.0f} us", flush=True)
    result = {**about, **device(), "truth": truth().tolist(), "results": results}
    (HERE / "multimodality.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(results, walks, HERE / "multimodality.png")
    page, (begin, end) = HERE / "README.md", (f"<!-- multimodality:{edge} -->\n" for edge in ("begin", "end"))
    before, _, after = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}{shown(result)}\n{end}{after.partition(end)[2]}")


if __name__ == "__main__":
    main()
