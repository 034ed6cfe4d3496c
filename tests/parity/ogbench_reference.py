"""Numbers of OGBench's own code that tests/test_parity_ogbench.py compares our files with: its losses and gradients.

Writes ogbench_NAME.npz for each name of CONFIG, and ogbench_provenance.json, beside this file. It needs a clone, and an
environment of its own, because the code is no package and needs libraries that this project does without:

    git clone https://github.com/seohongpark/ogbench && git -C ogbench checkout 1d41409
    python -m venv /tmp/ogbench && . /tmp/ogbench/bin/activate
    pip install jax==0.4.38 flax==0.10.2 distrax ml_collections
    python tests/parity/ogbench_reference.py ogbench

Every loss is a call into the clone's impls/agents, and every gradient is JAX's: no formula is written out here. Keys of
an .npz, with the paths of OGBench's parameters:
    params/modules_value/...        weights, all drawn anew, so that no bias is 0 and no target equals its network
    batch/observations              16 rows
    loss/value/value_loss           a number that OGBench logs
    grad/modules_value/...          gradient of the sum of all losses
    polyak/modules_target_value/... a target network after an update in which no other network moves
    after/modules_value/...         all networks after UPDATES whole updates in which no target moves
    act                             actions at temperature 0, with the batch's observations and actor_goals

Weights and batches are float32. OGBench then computes in float64 and the results are rounded to float32, so that the
bytes do not depend on the order in which a CPU sums.
"""

import importlib
import json
import pathlib
import platform
import subprocess
import sys

import jax
import numpy as np

jax.config.update("jax_enable_x64", True)

SEED, OBS_DIM, ACTION_DIM, NUM_ACTIONS, BATCH = 0, 3, 2, 4, 16
OUT = pathlib.Path(__file__).parent
HIDDEN = {"actor_hidden_dims": (8, 8), "value_hidden_dims": (8, 8)}
UPDATES, LEARNING_RATE, TAU = 4, 0.01, 0.1

# Hyper-parameters, in OGBench's names. Mostly not its defaults: a number written into an algorithm must not agree by
# luck. `agent` is the file.
CONFIG = {
    "gcbc": {"agent": "gcbc"},
    "gcbc_discrete": {"agent": "gcbc", "discrete": True},
    "gcivl": {"agent": "gcivl", "discount": 0.9, "expectile": 0.8, "alpha": 2.0},
    "gciql": {"agent": "gciql", "discount": 0.9, "expectile": 0.8, "alpha": 0.2, "actor_loss": "ddpgbc"},
    "gciql_awr": {"agent": "gciql", "discount": 0.9, "expectile": 0.8, "alpha": 2.0, "actor_loss": "awr"},
    "gciql_discrete": {
        "agent": "gciql", "discount": 0.9, "expectile": 0.8, "alpha": 2.0, "actor_loss": "awr", "discrete": True,
    },
    "hiql": {
        "agent": "hiql", "discount": 0.9, "expectile": 0.8, "low_alpha": 2.0, "high_alpha": 1.5, "rep_dim": 5,
    },
    "qrl": {"agent": "qrl", "latent_dim": 16, "eps": 0.1, "alpha": 0.2, "actor_loss": "ddpgbc"},
    "qrl_mrn": {
        "agent": "qrl", "latent_dim": 16, "eps": 0.1, "alpha": 0.2, "actor_loss": "awr", "quasimetric_type": "mrn",
    },
    "crl": {"agent": "crl", "latent_dim": 16, "alpha": 0.2, "actor_loss": "ddpgbc"},
    "crl_awr": {"agent": "crl", "latent_dim": 16, "alpha": 2.0, "actor_loss": "awr"},
}  # fmt: skip


def paths(tree):
    """{"modules_value/value_net/Dense_0/kernel": leaf} of nested dicts."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): np.asarray(leaf) for path, leaf in leaves}


def single(arrays, prefix):
    return {f"{prefix}/{key}": np.asarray(value, np.float32) for key, value in arrays.items()}


def double(tree):
    return jax.tree_util.tree_map(lambda x: np.asarray(x, np.float64), tree)


def draw_batch(rng, name, discrete):
    states = [
        "observations", "next_observations", "value_goals", "actor_goals", "low_actor_goals", "high_actor_goals",
        "high_actor_targets",
    ]  # fmt: skip
    batch = {key: rng.normal(size=(BATCH, OBS_DIM)).astype(np.float32) for key in states}
    reached = rng.uniform(size=BATCH) < 0.3
    batch["actions"] = rng.uniform(-1, 1, (BATCH, ACTION_DIM)).astype(np.float32)
    if discrete:
        batch["actions"] = rng.integers(NUM_ACTIONS, size=BATCH)
        batch["actions"][0] = NUM_ACTIONS - 1  # from which OGBench takes their number
    batch |= {"rewards": reached.astype(np.float32) - 1, "masks": 1 - reached.astype(np.float32)}
    return batch


def draw_params(rng, params):
    """Every weight drawn anew: wide enough for actions beyond the clip, and for weights beyond theirs."""

    def leaf(path, x):
        layer = "/".join(entry.key for entry in path)
        scale = 0.3 if x.ndim < 2 + ("value_net" in layer) else 0.6
        return (np.ones(x.shape) * layer.endswith("scale") + scale * rng.normal(size=x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, params)


def reference(name):
    options = dict(CONFIG[name])
    module = importlib.import_module(f"agents.{options.pop('agent')}")
    (create,) = [x.create for key, x in vars(module).items() if key.endswith("Agent")]
    rng = np.random.default_rng([SEED, list(CONFIG).index(name)])
    config = module.get_config()

    def make(params=None, **rates):
        for key, value in (HIDDEN | options | rates).items():
            if key in config:
                config[key] = value
        agent = create(SEED, batch["observations"], batch["actions"], config)
        if params is None:
            return agent
        return agent.replace(network=agent.network.replace(params=double(params)))

    batch = draw_batch(rng, name, options.get("discrete", False))
    params = draw_params(rng, make().network.params)
    exact = {key: x if x.dtype.kind == "i" else x.astype(np.float64) for key, x in batch.items()}

    still = make(params, lr=0.0, tau=TAU)
    grads, info = jax.grad(lambda p: still.total_loss(exact, p, rng=still.rng), has_aux=True)(still.network.params)
    moved, _ = still.update(exact)
    agent = make(params, lr=LEARNING_RATE, tau=0.0)
    agent = agent.replace(network=agent.network.replace(opt_state=agent.network.tx.init(agent.network.params)))
    for _ in range(UPDATES):
        agent, _ = agent.update(exact)
    act = still.sample_actions(exact["observations"], exact["actor_goals"], seed=jax.random.PRNGKey(0), temperature=0.0)
    targets = {key: x for key, x in paths(moved.network.params).items() if "target" in key}
    arrays = {f"batch/{key}": value for key, value in batch.items()} | {"act": np.asarray(act, np.float32)}
    learned = {key: x for key, x in paths(grads).items() if "target" not in key}
    arrays |= single(paths(params), "params") | single(info, "loss") | single(learned, "grad")
    arrays |= single(targets, "polyak") | single(paths(agent.network.params), "after")
    assert all(np.all(np.isfinite(x)) for x in arrays.values()), name
    np.savez(OUT / f"ogbench_{name}.npz", **arrays)


def main(clone):
    sys.path.insert(0, str(pathlib.Path(clone) / "impls"))
    for name in CONFIG:
        reference(name)
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    packages = ("jax", "flax", "optax", "distrax", "numpy")
    versions = {name: importlib.import_module(name).__version__ for name in packages}
    provenance = {
        "source": "https://github.com/seohongpark/ogbench",
        "commit": commit.stdout.strip(),
        "versions": {"python": platform.python_version(), **versions},
        "seed": SEED,
        "updates": {"number": UPDATES, "learning_rate": LEARNING_RATE},
        "tau": TAU,
        "config": CONFIG,
    }
    (OUT / "ogbench_provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
