"""What policies of goals believe of distances in a maze, beside the true ones: python benchmarks/studies/distances.py

Claim (OGBench): from data without rewards one can learn how far any state is from any other,
also where no recorded walk leads from one to the other, because walks share states ("stitching"). Which methods do so?

It reads the runs that `python benchmarks/sweep.py goals` leaves in benchmarks/results/goals, checkpoints included (what
has none is left out), of OGBench's medium point maze: `navigate`, whose walks of 1000 steps cross the maze, and
`stitch`, whose walks of 200 steps are no longer than four cells. The point moves by at most 0.2 in each coordinate and
step and its radius is 0.7, so the true number of steps between two places is that of a shortest path on a fine grid of
where its centre can be.

Writes distances.json and distances.png beside it. Of each file that has a value, data and seed:
    rank    Spearman's correlation of believed and true distance, over all pairs of a place and a goal
    nearer  share of places whose best neighbour, of 8 at a distance of 1, is truly nearer to the goal
    ratio   median of believed by true number of steps, where a value says a number of steps
each for pairs that met in `stitch` (some walk was in the place's cell and, then or later, in the goal's) and for those
that never met. In `navigate` all of them met, so the same two groups of pairs tell what the meeting is worth.
"""

import importlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from provenance import device, provenance  # noqa: E402
from scipy.sparse import coo_array  # noqa: E402
from scipy.sparse.csgraph import dijkstra  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "results" / "goals"
DATASETS = {kind: f"ogbench-pointmaze-medium-{kind}-200k-v0" for kind in ("navigate", "stitch")}
METHODS = ("gcivl", "gciql", "hiql", "qrl", "crl", "gc_td3_bc", "actionable_models")
UNIT, RADIUS, STEP = 4.0, 0.7, 0.2  # of OGBench's mazes: width of a cell, radius of the point, its largest step
FINE, COARSE = 10, 1  # places per unit of length: of the shortest paths, and of those that are compared
EDGE = 1e-3  # a value that says more steps than discount^steps = EDGE says as many


# --- The maze ------------------------------------------------------------------------------------------


class Maze(NamedTuple):
    """Places are (rows, columns) of cells in units of length from the corner of the first cell, as (y, x)."""

    cells: np.ndarray  # (rows, columns) of bool: not a wall
    places: np.ndarray  # (n, 2), on a grid of COARSE
    goals: np.ndarray  # (m, 2), centres of cells
    steps: np.ndarray  # (n, m), true distances


def free(cells, places):
    """Whether the point's centre can be at `places` (..., 2): no wall is nearer than its radius."""
    walls = (np.argwhere(~cells) + 0.5) * UNIT
    gap = np.maximum(np.abs(places[..., None, :] - walls) - UNIT / 2, 0)
    return np.linalg.norm(gap, axis=-1).min(axis=-1) >= RADIUS - 1e-9


def grid(cells, resolution):
    """Free places (n, 2) on a grid through the cells' centres, and the number of each place of the grid, or -1."""
    size = np.array(cells.shape) * UNIT * resolution
    every = np.stack(np.meshgrid(*(np.arange(int(s) + 1) for s in size), indexing="ij"), axis=-1)
    inside = free(cells, every / resolution)
    number = np.where(inside, np.cumsum(inside).reshape(inside.shape) - 1, -1)
    return every[inside] / resolution, number


def neighbours(number):
    """Pairs (k, 2) of numbers of places that are next to each other, also diagonally; `number` is that of `grid`."""
    pairs = []
    for dy, dx in itertools.product((-1, 0, 1), repeat=2):
        if dy or dx:
            rolled = np.roll(number, (-dy, -dx), axis=(0, 1))  # the rim is wall
            both = (number >= 0) & (rolled >= 0)
            pairs.append(np.stack([number[both], rolled[both]], axis=-1))
    return np.concatenate(pairs)


def steps_between(cells, places, goals):
    """The smallest number of steps (n, m): STEP in each coordinate, so that a diagonal costs no more than a side."""
    fine, number = grid(cells, FINE)
    pairs = neighbours(number)
    graph = coo_array((np.ones(len(pairs)), tuple(pairs.T)), shape=(len(fine), len(fine))).tocsr()

    def nodes(x):
        return number[tuple(np.round(x * FINE).astype(int).T)]

    hops = dijkstra(graph, unweighted=True, indices=nodes(goals))
    return (hops[:, nodes(places)] / FINE / STEP).T


def make_maze(cells):
    places, goals = grid(cells, COARSE)[0], (np.argwhere(cells) + 0.5) * UNIT
    return Maze(cells, places, goals, steps_between(cells, places, goals))


def to_ogbench(places):
    """(x, y) of places (..., 2): OGBench's origin is the centre of the cell (1, 1)."""
    return places[..., ::-1] - 1.5 * UNIT


def cell_of(places):
    """(row, column) of the cells of places (..., 2)."""
    return (np.asarray(places) // UNIT).astype(int)


def meetings(cells, walks):
    """(rows, columns, rows, columns) of bool: whether a walk (steps, 2) was in one and, then or later, in the other."""
    met = np.zeros(cells.shape * 2, bool)
    for walk in walks:
        visited = cell_of(walk)
        change = np.flatnonzero(np.r_[True, np.any(visited[1:] != visited[:-1], axis=1)])
        stays = visited[change]
        for k, cell in enumerate(stays):
            met[(*cell, *stays[k:].T)] = True
    return met


def pairs_that_met(maze, walks):
    """(n, m) of bool: by the cells of a place and a goal."""
    (y, x), (v, u) = cell_of(maze.places).T, cell_of(maze.goals).T
    return meetings(maze.cells, walks)[y[:, None], x[:, None], v[None], u[None]]


# --- Beliefs -------------------------------------------------------------------------------------------


def steps_of(reach, discount):
    """Number of steps d of discount^d, at most that of EDGE."""
    return jnp.log(jnp.clip(reach, EDGE, 1)) / jnp.log(discount)


def make_belief(algo, cfg, spec):
    """`belief(state, obs, goal)`: how far the goals (n, 2) are from observations (n, 2), in steps where it says so."""
    module = importlib.import_module(f"algos.{algo}")
    agent = module.make_agent(cfg, spec)

    def belief(state, obs, goal):
        key, both = jax.random.key(0), jnp.concatenate([obs, goal], axis=-1)
        if algo == "qrl":
            quasimetric = module.Quasimetric(cfg.hidden, cfg.latent_dim, cfg.quasimetric)
            return quasimetric.apply(state.distance.params["d"], obs, goal)
        if algo == "crl":  # a logit: it orders, and is no number of steps
            f = module.Bilinear(2, cfg.hidden, cfg.latent_dim)
            return -f.apply(state.critic.params, goal, obs, agent.act(state, both, key)).min(axis=0)
        if algo in ("gc_td3_bc", "actionable_models"):  # discount^(d - 1)
            return 1 + steps_of(agent.q(state, both, agent.act(state, both, key)), cfg.discount)
        if algo == "hiql":
            phi = module.GoalEncoder(cfg.rep_dim, cfg.hidden, normalized=True)
            goal, params = phi.apply(state.value.params["phi"], obs, goal), state.value.params["v"]
        else:
            params = state.value.params
        members = 1 if algo == "gciql" else 2
        v = module.GoalValue(members, cfg.hidden).apply(params, obs, goal).mean(axis=0)
        return steps_of(1 + (1 - cfg.discount) * v, cfg.discount)

    return belief


def believed(folder, algo, maze):
    """Distances (seeds, n, m) from the maze's places to its goals, as a run folder's policies believe."""
    module = importlib.import_module(f"algos.{algo}")
    runs = module.restore(folder, None)
    belief = jax.jit(make_belief(algo, runs.cfg, runs.interface.spec))
    shape = (len(maze.places), len(maze.goals), 2)
    xy = to_ogbench(maze.places[:, None]), to_ogbench(maze.goals[None])
    raw = dict(zip(("observation", "goal"), (np.broadcast_to(x, shape).reshape(-1, 2) for x in xy), strict=True))
    obs, goal = np.split(runs.interface.observe(raw), 2, axis=-1)  # as the networks see them
    rows = [jax.tree.map(lambda x, k=k: x[k], runs.states) for k in range(len(runs.runs))]
    return np.stack([np.asarray(belief(row, obs, goal)).reshape(shape[:2]) for row in rows])


# --- Measures ------------------------------------------------------------------------------------------


def nearer(maze, distance):
    """(n, m) of 0 or 1: whether the neighbour with the least `distance` (n, m) is truly nearer; NaN at the goal."""
    _, number = grid(maze.cells, COARSE)
    best, best_steps = np.full(distance.shape, np.inf), np.full(distance.shape, np.inf)
    for here, there in neighbours(number):
        better = distance[there] < best[here]
        best[here] = np.where(better, distance[there], best[here])
        best_steps[here] = np.where(better, maze.steps[there], best_steps[here])
    return np.where(maze.steps > 0, best_steps < maze.steps, np.nan)


def measure(maze, met, distance, counts_steps):
    """The three numbers of a belief (n, m), for pairs that met, and for the others."""
    towards, result = nearer(maze, distance), {}
    for name, pairs in (("met", met), ("never met", ~met)):
        pairs = pairs & (maze.steps > 0)
        result[name] = {
            "rank": float(spearmanr(distance[pairs], maze.steps[pairs])[0]),
            "nearer": float(towards[pairs].mean()),
            "ratio": float(np.median(distance[pairs] / maze.steps[pairs])) if counts_steps else None,
        }
    return result


# --- All of it -----------------------------------------------------------------------------------------


def load_maze():
    import gymnasium as gym
    import ogbench  # noqa: F401 (registers its environments)

    return make_maze(np.array(gym.make("pointmaze-medium-v0").unwrapped.maze_map) == 0)


def load_walks(dataset):
    """Places (steps, 2) of each episode, from the corner of the first cell."""
    import minari

    episodes = minari.load_dataset(f"stitch/{dataset}", download=False)
    return [np.asarray(episode.observations)[:-1, ::-1] + 1.5 * UNIT for episode in episodes]


def main():
    about, maze = provenance(), load_maze()
    goal = int(np.flatnonzero((cell_of(maze.goals) == (6, 6)).all(axis=1)).item())  # of OGBench's first task
    apart = maze.steps > 0
    met = {kind: pairs_that_met(maze, load_walks(dataset)) for kind, dataset in DATASETS.items()}
    result, maps = {}, {}
    for kind, dataset in DATASETS.items():
        result[kind] = {"met": float(met[kind][apart].mean()), "farthest_met": float(maze.steps[met[kind]].max())}
        result[kind]["methods"], maps[kind] = {}, {}
        for algo in METHODS:
            if not (RUNS / dataset / algo / "checkpoint.msgpack").exists():
                print(f"{RUNS / dataset / algo} has no checkpoint: it is left out.")
                continue
            distance = believed(RUNS / dataset / algo, algo, maze)
            config = json.loads((RUNS / dataset / algo / "config.json").read_text())
            seeds = [measure(maze, met["stitch"], x, algo != "crl") for x in distance]
            result[kind]["methods"][algo] = {"run_commit": config["commit"], "seeds": seeds}
            maps[kind][algo] = distance[0, :, goal]
    result = {**about, **device(), "places": len(maze.places), "goals": len(maze.goals), "data": result}
    (HERE / "distances.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(maze, goal, maps, HERE / "distances.png")


def table(result):
    """Markdown for the studies' page: medians over the seeds, of pairs that met in `stitch` and of the others."""
    lines = ["| data | file | rank, met | rank, never met | nearer, met | nearer, never met | ratio, met | never met |"]
    lines.append("| --- " * 8 + "|")
    for kind, data in result["data"].items():
        for algo, found in data["methods"].items():
            cells = [kind, f"[`{algo}`](../../algos/{algo}.md)"]
            for measure, form in (("rank", ".2f"), ("nearer", ".0%"), ("ratio", ".2f")):
                for pairs in ("met", "never met"):
                    values = [seed[pairs][measure] for seed in found["seeds"]]
                    cells.append("–" if None in values else format(np.median(values), form).replace("%", " %"))
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(maze, goal, maps, path):
    """A row for each data, the first panel with the true distances to one goal, the others with those of seed 0."""
    columns = 1 + max(map(len, maps.values()))
    size = (2.1 * columns + 1, 2.5 * len(maps))
    figure, axes = plt.subplots(len(maps), columns, figsize=size, dpi=120, layout="constrained", squeeze=False)
    true = maze.steps[:, goal]
    for row, (kind, beliefs) in zip(axes, maps.items(), strict=True):
        for axis in row[1 + len(beliefs) :]:
            axis.set_visible(False)
        for axis, (name, values) in zip(row, {f"{kind}: true": true, **beliefs}.items(), strict=False):
            limits = (values.min(), values.max()) if name == "crl" else (0, true.max())
            panel(axis, maze, values, limits)
            axis.plot(*maze.goals[goal][::-1], "*", color="white", markeredgecolor="black", markersize=12)
            axis.set_title(name, fontsize=10)
    bar = plt.cm.ScalarMappable(plt.Normalize(0, true.max()), "viridis_r")
    figure.colorbar(bar, ax=axes[:, -1], label="steps to the star (crl: its own scale)")
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def panel(axis, maze, values, limits):
    image = np.full([int(s * UNIT * COARSE) + 1 for s in maze.cells.shape], np.nan)
    image[tuple(np.round(maze.places * COARSE).astype(int).T)] = values
    half = 0.5 / COARSE
    extent = (-half, image.shape[1] / COARSE - half, -half, image.shape[0] / COARSE - half)
    axis.imshow(np.ma.masked_invalid(image), origin="lower", extent=extent, cmap="viridis_r",
                vmin=limits[0], vmax=limits[1], interpolation="nearest")  # fmt: skip
    axis.set_facecolor("#9A9A9A")
    axis.set(xticks=[], yticks=[])


if __name__ == "__main__":
    main()
