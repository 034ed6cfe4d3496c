"""Where does a trained policy fall? Of a run of the `standard` protocol on a medium-expert dataset.

    python benchmarks/falls.py benchmarks/results/standard/hopper-medium-expert-v1/iql

The rows of such a dataset are the medium policy's, then, from the middle on, the expert's. Three questions:

Data      How do the episodes of each half end, and how much is either half worth where an episode begins?
Weights   Of IQL and XQL: by which weights is each half cloned, and does V believe what follows a row in the data?
Episodes  The last policy of each seed plays, by its mode. At every step, of which half is the nearest row of the data?
          Near: by the distance of observations, each dimension divided by its standard deviation, of 50,000 rows of
          each half. Asked of the steps 50 to 150; and, of the episodes of more than 150 steps that end by a fall, how
          many steps before it the last one was near the expert's rows. One that never was is left out there.

The numbers go to results/falls-ALGORITHM-DATASET.json. What is nearest depends on the distance and tells no cause by
itself.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import scipy.spatial
import tyro
from sweep import write

from common.datasets import load_dataset
from common.environments import provenance
from common.networks import Critic, Value

HALVES = "medium", "expert"
ROWS = 50_000  # of each half
RESULTS = Path(__file__).parent / "results"
LIMIT = 1_000  # steps of an episode, as gymnasium registers these environments


@dataclasses.dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional]  # a finished run folder, with its checkpoint
    episodes: int = 50  # of each seed


def main(options: Options):
    algo = json.loads((options.run / "config.json").read_text())["config"]["algo"]
    module = importlib.import_module(f"algos.{algo}")
    runs = module.restore(options.run, None)
    seen, env = module.load_data(runs.cfg)  # the rows as the algorithm sees them
    raw, _ = load_dataset(runs.cfg.dataset, columns=("episode", "start", "end", "return_to_go"), discount=0.99)
    rng, half = np.random.default_rng(0), len(raw.reward) // 2
    if "-medium-expert-" not in runs.cfg.dataset or half < ROWS:
        few = f"a medium-expert dataset of {2 * ROWS:,} rows or more"
        raise SystemExit(f"{options.run} is of {runs.cfg.dataset}, {len(raw.reward):,} rows: give a run on {few}.")
    rows = [rng.choice(np.arange(k * half, (k + 1) * half), ROWS, replace=False) for k in range(2)]
    result = {"algo": algo, "dataset": runs.cfg.dataset, "run": run_of(options.run), **provenance()}
    result["data"] = {name: of_data(raw, k * half, (k + 1) * half) for k, name in enumerate(HALVES)}
    if algo in ("iql", "xql"):  # their critics, V and weights are the same, but for XQL's LayerNorm
        value = Value(runs.cfg.hidden, layer_norm=algo == "xql")
        to_go = load_dataset(runs.cfg.dataset, normalize_reward=True, columns=("return_to_go",), discount=0.99)[0]
        about = seen, to_go.return_to_go, raw.end, rows
        result["weights"] = [weights(runs, i, value, *about) for i in range(len(runs.runs))]
    result["episodes"] = episodes(runs, env, seen, rows, options.episodes)
    name = f"falls-{algo}-{runs.cfg.dataset.removeprefix('stitch/')}.json"
    write(RESULTS / name, json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("data", "weights", "episodes") if name in result}, indent=1))


def run_of(folder):
    """What the run's own files say of where it comes from."""
    about = json.loads((folder / "summary.json").read_text())
    return {name: about[name] for name in ("commit", "command", "device", "num_updates", "seeds", "score_per_seed")}


def of_data(data, low, high):
    """Of the episodes of the rows from low to high."""
    first = low + np.flatnonzero(data.start[low:high])
    last = data.end[first]
    returns = np.bincount(data.episode[low:high] - data.episode[low], weights=data.reward[low:high])
    return {
        "episodes": len(first),
        "falls": int(data.terminal[last].sum()),
        "mean_return": round(float(returns.mean()), 1),
        "highest_return": round(float(returns.max()), 1),
        "lowest_return": round(float(returns.min()), 1),
        "median_length": float(np.median(last - first + 1)),
        "discounted_return_from_the_start": round(float(data.return_to_go[first].mean()), 1),
    }


def weights(runs, i, value, data, return_to_go, end, rows):
    """Of seed i of IQL or XQL, for each half: the mean weight of eq. 7, V, and the discounted return of the data."""
    cfg, state = runs.cfg, jax.tree.map(lambda x: x[i], runs.states)
    found = {"seed": runs.runs[i]["seed"]}
    for name, index in zip(HALVES, rows, strict=True):
        q = Critic(2, cfg.hidden).apply(state.target_critic, data.obs[index], data.action[index]).min(axis=0)
        v = np.asarray(value.apply(state.value.params, data.obs[index]))
        far = end[index] - index > 300  # what follows is worth 5 % of a value at most
        weight = np.minimum(np.exp(cfg.beta * (np.asarray(q) - v)), cfg.max_weight)
        numbers = {"weight": weight.mean(), "v": v[far].mean(), "return_to_go": return_to_go[index][far].mean()}
        found[name] = {key: round(float(number), 2) for key, number in numbers.items()}
    total = sum(found[name]["weight"] for name in HALVES)
    return found | {"share_of_weight_on_expert": round(found["expert"]["weight"] / total, 2)}


def episodes(runs, env, data, rows, number):
    """Of each seed: returns, lengths, near whose rows the policy is early, and how long before a fall it left them."""
    rows, scale, seen = np.concatenate(rows), data.obs.std(axis=0), []
    tree = scipy.spatial.cKDTree(data.obs[rows] / scale)
    expert = rows >= len(data.obs) // 2

    def policy(obs, *rest):
        seen.append(obs.copy())  # the environments write into the same array at every step
        return runs.act(obs, *rest)

    seeds = [run["seed"] for run in runs.runs]
    play = env.evaluate(policy, seeds, number)
    seen = np.stack(seen, axis=2)  # (seeds, episodes, steps, obs_dim)
    found = []
    for seed, obs, returns in zip(seeds, seen, play.returns, strict=True):
        length = lengths(obs)
        fallen = length < LIMIT
        near = [expert[tree.query(x[:n] / scale)[1]] for x, n in zip(obs, length, strict=True)]
        left = [x for x, fell in zip(near, fallen, strict=True) if fell and len(x) > 150 and x.any()]
        away = [np.argmax(x[::-1]) for x in left]
        middle = [x[50:150].mean() for x in near if len(x) > 150]
        numbers = {"seed": seed, "score": round(float(env.score(returns).mean()), 1), "falls": int(fallen.sum())}
        numbers["near_expert_in_steps_50_to_150"] = round(float(np.mean(middle)), 3)
        numbers["steps_from_the_expert_to_a_fall"] = np.sort(away).tolist()
        found.append(numbers | {"returns": np.sort(returns).round().tolist(), "lengths": np.sort(length).tolist()})
    return found


def lengths(obs):
    """(episodes, steps, obs_dim) -> (episodes,) steps: one that has ended keeps its last observation from then on.

    Of an episode that still moves at the end, all steps: what its last step led to is not in `obs`.
    """
    still = np.argmin((obs[:, 1:] == obs[:, :-1]).all(axis=2)[:, ::-1], axis=1)  # steps at the end without a change
    return np.where(still > 0, obs.shape[1] - 1 - still, obs.shape[1])


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.partition("\n\n")[0]))
