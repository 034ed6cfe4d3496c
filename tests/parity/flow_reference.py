"""Numbers of the authors' own code that tests/test_parity_flow.py compares fql.py, ifql.py and qc.py with.

Writes flow_NAME.npz for each name of CONFIG whose agent the given clone has, and flow_CLONE_provenance.json, both here.
It needs clones, and an environment of its own, because they are no packages and need libraries that this project does
without:

    git clone https://github.com/seohongpark/fql && git -C fql checkout 719d044
    git clone https://github.com/ColinQiyangLi/qc && git -C qc checkout 48283b4
    python -m venv /tmp/flow && . /tmp/flow/bin/activate
    pip install jax==0.4.38 flax==0.10.2 distrax ml_collections
    python tests/parity/flow_reference.py fql && python tests/parity/flow_reference.py qc

Every loss is a call into the clone's agents, and every gradient is JAX's: no formula is written out here. Keys of an
.npz, with the paths of the clone's parameters:
    params/modules_critic/...         weights, all drawn anew, so that no bias is 0 and no target equals its network
    batch/observations                16 rows
    noise/0, noise/1, ..., time       what jax.random.normal gives, in the order of the clone's calls, and uniform
    loss/actor/bc_flow_loss           a number that the clone logs
    grad/modules_critic/...           gradient of the sum of all losses
    polyak/modules_target_critic/...  a target network after an update in which no other network moves
    after/modules_critic/...          all networks after UPDATES whole updates of one noise in which no target moves
    act, act_noise                    actions at the batch's observations (IFQL: at the first one), with that noise

Weights, batches and noise are float32. The clone then computes in float64 and the results are rounded to float32, so
that the bytes do not depend on the order in which a CPU sums.
"""

import importlib
import itertools
import json
import pathlib
import platform
import subprocess
import sys
import types

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

SEED, OBS_DIM, ACTION_DIM, BATCH, HORIZON = 0, 3, 2, 16, 3
OUT = pathlib.Path(__file__).parent
HIDDEN = {"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8)}
UPDATES, LEARNING_RATE, TAU = 4, 0.01, 0.1

# Hyper-parameters, in the clones' names. Mostly not their defaults: a number written into an algorithm must not agree
# by luck. `agent` is the file.
CONFIG = {
    "fql": {"agent": "fql", "discount": 0.9, "alpha": 3.0, "flow_steps": 4, "q_agg": "mean"},
    "fql_min": {"agent": "fql", "discount": 0.9, "alpha": 3.0, "flow_steps": 4, "q_agg": "min"},
    "ifql": {"agent": "ifql", "discount": 0.9, "expectile": 0.8, "flow_steps": 4, "num_samples": 5},
    "qc": {
        "agent": "acfql", "discount": 0.9, "flow_steps": 4, "q_agg": "mean", "horizon_length": HORIZON,
        "actor_type": "best-of-n", "actor_num_samples": 5,
    },
    "qc_fql": {
        "agent": "acfql", "discount": 0.9, "alpha": 3.0, "flow_steps": 4, "q_agg": "mean", "horizon_length": HORIZON,
        "actor_type": "distill-ddpg",
    },
}  # fmt: skip


def paths(tree):
    """{"modules_critic/value_net/Dense_0/kernel": leaf} of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


def single(arrays, prefix):
    return {f"{prefix}/{key}": np.asarray(value, np.float32) for key, value in arrays.items()}


def double(tree):
    return jax.tree_util.tree_map(lambda x: np.asarray(x, np.float64), tree)


def draw_batch(rng, chunks):
    steps = (HORIZON,) if chunks else ()
    batch = {"observations": rng.normal(size=(BATCH, OBS_DIM))}
    batch |= {"actions": rng.uniform(-1, 1, (BATCH, *steps, ACTION_DIM)), "rewards": rng.normal(size=(BATCH, *steps))}
    batch |= {"next_observations": rng.normal(size=(BATCH, *steps, OBS_DIM))}
    masks = np.ones((BATCH, *steps))
    masks[:4] = 0.0
    batch["masks"] = masks
    if chunks:  # four rows lie at the end of an episode, with one, two, ... actions left in it
        batch["valid"] = np.arange(HORIZON)[None] < np.array([1, 2, 1, 2] + [HORIZON] * (BATCH - 4))[::-1, None]
    return {key: x.astype(np.float32) for key, x in batch.items()}


def draw_params(rng, params):
    """Every weight drawn anew: wide enough for actions beyond the clip."""

    def leaf(path, x):
        layer = "/".join(entry.key for entry in path)
        scale = 0.3 if x.ndim < 2 + ("critic" in layer) else 0.6
        return (np.ones(x.shape) * layer.endswith("scale") + scale * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, params)


def reference(name):
    options = dict(CONFIG[name])
    module = importlib.import_module(f"agents.{options.pop('agent')}")
    (create,) = [x.create for key, x in vars(module).items() if key.endswith("Agent")]
    rng = np.random.default_rng([SEED, list(CONFIG).index(name)])
    config, chunks = module.get_config(), "horizon_length" in options
    batch = draw_batch(rng, chunks)
    width = ACTION_DIM * (HORIZON if chunks else 1)
    samples = options.get("num_samples", options.get("actor_num_samples"))

    def make(params=None, **rates):
        for key, value in (HIDDEN | options | rates).items():
            config[key] = value
        first = (slice(None),) if not chunks else (0,)
        actions = batch["actions"][0, 0] if chunks else batch["actions"]
        agent = create(SEED, batch["observations"][first], actions, config)
        if params is None:
            return agent
        return agent.replace(network=agent.network.replace(params=double(params)))

    # In the order of the clone's calls: of the next action (IFQL has none), of the flow, of the one-step policy
    shapes = {
        "fql": [(BATCH, width)] * 3,
        "fql_min": [(BATCH, width)] * 3,
        "ifql": [(BATCH, width)],
        "qc": [(BATCH, samples, width), (BATCH, width)],
        "qc_fql": [(BATCH, width)] * 3,
    }[name]
    noise = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    time = rng.uniform(size=(BATCH, 1)).astype(np.float32)
    act_shape = {"ifql": (samples, width), "qc": (BATCH, samples, width)}.get(name, (BATCH, width))
    act_noise = rng.normal(size=act_shape).astype(np.float32)

    def patch(arrays):
        queue = itertools.cycle(arrays)

        def normal(key, shape=(), *args):
            drawn = next(queue)
            assert drawn.shape == tuple(shape), (drawn.shape, shape)
            return np.asarray(drawn, np.float64)

        def uniform(key, shape=(), *args):  # flax asks it too, for the shape of a weight
            return np.asarray(time, np.float64) if shape == (BATCH, 1) else originals[1](key, shape, *args)

        jax.random.normal, jax.random.uniform = normal, uniform

    params, originals = draw_params(rng, make().network.params), (jax.random.normal, jax.random.uniform)
    exact = {key: x.astype(np.float64) for key, x in batch.items()}
    still, agent = make(params, lr=0.0, tau=TAU), make(params, lr=LEARNING_RATE, tau=0.0)
    agent = agent.replace(network=agent.network.replace(opt_state=agent.network.tx.init(agent.network.params)))
    calls = [*noise, noise[0]] if name.startswith("fql") else noise  # FQL draws once more, for a number that it logs
    with jax.disable_jit():
        patch(calls)
        grads, info = jax.grad(lambda p: still.total_loss(exact, p, rng=still.rng), has_aux=True)(still.network.params)
        patch(calls)
        moved, _ = still.update(exact)
        patch(calls)
        for _ in range(UPDATES):
            agent, _ = agent.update(exact)
        patch([act_noise])
        obs = exact["observations"][0] if name == "ifql" else exact["observations"]
        act = still.sample_actions(obs, **{"rng" if chunks else "seed": jax.random.PRNGKey(0)})
    jax.random.normal, jax.random.uniform = originals
    targets = {key: x for key, x in paths(moved.network.params).items() if "target" in key}
    arrays = {f"batch/{key}": value for key, value in batch.items()} | {"act": np.asarray(act, np.float32)}
    arrays |= {f"noise/{i}": x for i, x in enumerate(noise)} | {"time": time, "act_noise": act_noise}
    learned = {key: x for key, x in paths(grads).items() if "target" not in key}
    arrays |= single(paths(params), "params") | single(info, "loss") | single(learned, "grad")
    arrays |= single(targets, "polyak") | single(paths(agent.network.params), "after")
    assert all(np.all(np.isfinite(x)) for x in arrays.values()), name
    np.savez(OUT / f"flow_{name}.npz", **arrays)


def main(clone):
    clone = pathlib.Path(clone).resolve()
    sys.path.insert(0, str(clone))
    sys.modules["agents"] = types.ModuleType("agents")  # without its other agents, which need more libraries
    sys.modules["agents"].__path__ = [str(clone / "agents")]
    config = {name: x for name, x in CONFIG.items() if (clone / "agents" / f"{x['agent']}.py").exists()}
    for name in config:
        reference(name)
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    packages = ("jax", "flax", "optax", "distrax", "numpy")
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    source = {"fql": "https://github.com/seohongpark/fql", "qc": "https://github.com/ColinQiyangLi/qc"}[clone.name]
    provenance = {
        "source": source,
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), **versions},
        "seed": SEED,
        "updates": {"number": UPDATES, "learning_rate": LEARNING_RATE},
        "tau": TAU,
        "config": config,
    }
    (OUT / f"flow_{clone.name}_provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
