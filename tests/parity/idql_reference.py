"""Numbers of IDQL's own code that tests/test_parity_idql.py compares our file with.

Writes NAME.npz for each name of CONFIG, and idql_provenance.json, beside this file. It needs a clone and an environment
of its own, since the clone was written for an old JAX:

    git clone https://github.com/philippe-eecs/IDQL && git -C IDQL checkout 7582571
    python -m venv /tmp/idql && . /tmp/idql/bin/activate && pip install jax==0.4.38 flax==0.10.2
    python tests/parity/idql_reference.py IDQL

Every loss is one that the clone's `update` returns, every gradient is in the clone's optimisers after it, and actions
are of its `eval_actions` and `sample_implicit_policy`: no formula is written out here. All its draws are those of the
file. Residual blocks have 8 units in the place of 256. The network of the step keeps its 64 inputs and 128 units, but
beyond the eighth all weights are 0 and stay so: the file is small. Keys of an .npz, with our names of parameters:
    actor/Dense_0/kernel    weights; kernels are (in, out), critics' have an axis of the two in front
    batch/obs               16 rows
    batch/t, batch/noise    of cloning; batch/dropout/0, 1, 2: uniform numbers, which drop an input where they are large
    loss/critic_loss        a number
    grad/actor/...          gradient in the first update, in which nothing moves
    after/actor/...         all networks after UPDATES whole updates
    draws                   noise of acting: (steps + 1, samples, rows, action_dim); the first is what it starts from
    act, act_implicit       actions at the batch's first rows, the second with the draw that `choice` names
    weights                 (samples, rows), with which that one is drawn

Weights and batches are float32. The clone then computes in float64 and the results are rounded to float32, so that the
bytes do not depend on the order in which a CPU sums.
"""

import contextlib
import functools
import itertools
import json
import pathlib
import platform
import subprocess
import sys
import types
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np

jax.config.update("jax_enable_x64", True)

SEED, OBS_DIM, ACTION_DIM, BATCH, UNITS, BLOCKS, ROWS = 0, 3, 2, 16, 8, 3, 4
OUT = pathlib.Path(__file__).parent
UPDATES, LEARNING_RATE = 5, 0.01
CONFIG = {  # in the clone's names; mostly not its defaults
    "idql": {
        "discount": 0.9, "tau": 0.1, "critic_hyperparam": 0.8, "actor_tau": 0.2, "T": 5, "N": 6, "decay_steps": 8,
        "actor_dropout_rate": 0.3,
    },
    "idql_long": {
        "discount": 0.8, "tau": 0.3, "critic_hyperparam": 0.6, "actor_tau": 0.05, "T": 9, "N": 5, "decay_steps": 20,
        "actor_dropout_rate": 0.1,
    },
}  # fmt: skip
DEPARTURES = [
    {
        "what": "the critics' loss", "theirs": "the mean over the two critics", "ours": "the sum over them",
        "handled": "their loss and its gradient are doubled",
    },
    {
        "what": "order of one update", "theirs": "the clone first", "ours": "the value first",
        "handled": "neither reads the other",
    },
]  # fmt: skip


def learner(clone):
    """The module of the learner. What it would import besides needs libraries, and is not used."""
    sys.path.insert(0, clone)
    for name in ("jaxrl5.agents", "jaxrl5.agents.ddpm_iql", "jaxrl5.data"):  # not what their __init__ imports
        package = types.ModuleType(name)
        package.__path__ = [str(pathlib.Path(clone, *name.split(".")))]
        sys.modules[name] = package
    gym, dataset = types.ModuleType("gym"), types.ModuleType("jaxrl5.data.dataset")
    gym.spaces = types.SimpleNamespace(Space=object, Box=object)  # for annotations
    dataset.DatasetDict = dict
    sys.modules |= {"gym": gym, "jaxrl5.data.dataset": dataset}
    from jaxrl5.agents.ddpm_iql import ddpm_iql_learner

    ddpm_iql_learner.MLPResNet = functools.partial(ddpm_iql_learner.MLPResNet, hidden_dim=UNITS)
    return ddpm_iql_learner


def small(params):
    """The network of the step with weights of 0 beyond the eighth unit, at both ends. Outputs are small, since with
    large ones all actions would be clipped to the same corner."""
    step, blocks = dict(params["MLP_0"]), dict(params["MLPResNet_0"])
    inputs = {"Dense_0": 64, "Dense_1": UNITS}
    for name, rows in inputs.items():
        kernel, bias = (step[name][part] for part in ("kernel", "bias"))
        step[name] = {"kernel": kernel.at[rows:].set(0).at[:, UNITS:].set(0), "bias": bias.at[UNITS:].set(0)}
    first = ACTION_DIM + OBS_DIM + UNITS
    blocks["Dense_0"] = blocks["Dense_0"] | {"kernel": blocks["Dense_0"]["kernel"].at[first:].set(0)}
    blocks["Dense_1"] = jax.tree_util.tree_map(lambda x: x / 8, blocks["Dense_1"])
    return params | {"MLP_0": step, "MLPResNet_0": blocks}


def layer(found, name, params):
    found |= {f"{name}/{part}": np.asarray(value) for part, value in params.items()}


def actor_arrays(params):
    found = {"frequency": np.asarray(params["FourierFeatures_0"]["kernel"])[:, 0]}
    for name in ("Dense_0", "Dense_1"):
        layer(found, f"MLP_0/{name}", params["MLP_0"][name])
    net = params["MLPResNet_0"]
    layer(found, "Dense_0", net["Dense_0"])
    for i in range(BLOCKS):
        block = net[f"MLPResNetBlock_{i}"]
        layer(found, f"LayerNorm_{i}", block["LayerNorm_0"])
        layer(found, f"Dense_{2 * i + 1}", block["Dense_0"])
        layer(found, f"Dense_{2 * i + 2}", block["Dense_1"])
    layer(found, f"Dense_{2 * BLOCKS + 1}", net["Dense_1"])
    return found


def value_arrays(params, prefix=""):
    """Of a value or of an ensemble of critics: hidden layers and then the last one."""
    found = {}
    (last,) = [name for name in params if name != "MLP_0"]
    for name in ("Dense_0", "Dense_1"):
        layer(found, prefix + name, params["MLP_0"][name])
    layer(found, f"{prefix}Dense_2", params[last])
    return found


def arrays_of(trees):
    """{our name: array} of trees {our name of a network: tree of the clone}."""
    found = {}
    for name, tree in trees.items():
        if "actor" in name:
            arrays = actor_arrays(tree)
        else:
            arrays = value_arrays(*tree.values()) if "critic" in name else value_arrays(tree, "MLP_0/")
        found |= {f"{name}/{key}": x for key, x in arrays.items()}
    return found


def single(arrays, prefix):
    return {f"{prefix}{key}": np.asarray(value, np.float32) for key, value in arrays.items()}


STATES = {"actor": "score_model", "target_actor": "target_score_model", "critic": "critic",
          "target_critic": "target_critic", "value": "value"}  # fmt: skip


def trees_of(agent, names=tuple(STATES), read=lambda state: state.params):
    return {name: read(getattr(agent, STATES[name])) for name in names}


@contextlib.contextmanager
def training_draws(batch):
    """The clone's random numbers in `update` are those of the batch, with one mask for each block."""
    masks = iter(batch["dropout"])

    def keep(key, p, shape):
        return jnp.asarray(next(masks)) < p

    def normal(key, shape, *dtype, normal=jax.random.normal):  # flax asks for the shapes of initial weights, too
        return jnp.asarray(batch["noise"], jnp.float64) if shape == (BATCH, ACTION_DIM) else normal(key, shape, *dtype)

    with (
        unittest.mock.patch.object(jax.random, "randint", lambda *_, **__: jnp.asarray(batch["t"])),
        unittest.mock.patch.object(jax.random, "normal", normal),
        unittest.mock.patch.object(jax.random, "bernoulli", keep),
    ):
        yield


def drawn_case(module, options, seed):
    """(batch, agent_of, arrays of weights, batch and actions), all from that seed."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    batch = {
        "obs": draw(BATCH, OBS_DIM), "action": rng.uniform(-1, 1, (BATCH, ACTION_DIM)).astype(np.float32),
        "reward": draw(BATCH), "next_obs": draw(BATCH, OBS_DIM), "terminal": (rng.random(BATCH) < 0.3) * 1.0,
        "t": rng.integers(0, options["T"], BATCH), "noise": draw(BATCH, ACTION_DIM),
        "dropout": rng.random((BLOCKS, BATCH, UNITS)).astype(np.float32),
    }  # fmt: skip
    draws = draw(options["T"] + 1, options["N"], ROWS, ACTION_DIM)
    choice = rng.integers(0, options["N"], ROWS)

    def agent_of(rate):
        spaces = [types.SimpleNamespace(sample=lambda n=n: np.zeros(n), shape=(n,)) for n in (OBS_DIM, ACTION_DIM)]
        agent = module.DDPMIQLLearner.create(
            0, *spaces, actor_architecture="ln_resnet", actor_num_blocks=BLOCKS, actor_layer_norm=True,
            critic_hidden_dims=(UNITS, UNITS), actor_lr=rate, critic_lr=rate, value_lr=rate, **options,
        )  # fmt: skip
        weights = np.random.default_rng(seed)

        def drawn(tree):
            leaves, structure = jax.tree_util.tree_flatten(tree)
            values = [weights.normal(size=x.shape).astype(np.float32) * 0.5 for x in leaves]
            return structure.unflatten([jnp.asarray(x, jnp.float64) for x in values])

        changed = {}
        for ours, field in STATES.items():
            state = getattr(agent, field)
            params = drawn(state.params)
            params = small(params) if "actor" in ours else params
            opt_state = state.tx.init(params) if field in ("score_model", "critic", "value") else None
            changed[field] = state.replace(params=params, opt_state=opt_state)
        return agent.replace(**changed)

    agent, acts, weights = agent_of(0.0), {"act": [], "act_implicit": []}, []
    arrays = single(arrays_of(trees_of(agent)), "")
    arrays |= {f"batch/{key}": np.asarray(value) for key, value in batch.items() if key != "dropout"}
    arrays |= {f"batch/dropout/{i}": x for i, x in enumerate(batch["dropout"])}
    for row in range(ROWS):

        def chosen(key, number, p, row=row):
            weights.append(np.asarray(p))
            return choice[row]

        for key, act in (("act", agent.eval_actions), ("act_implicit", agent.sample_implicit_policy)):
            noise = iter(jnp.asarray(draws[:, :, row], jnp.float64))

            def normal(key, shape, *dtype, noise=noise, normal=jax.random.normal):
                return next(noise) if shape == (options["N"], ACTION_DIM) else normal(key, shape, *dtype)

            with (
                jax.disable_jit(),  # so that each step of the sampler draws anew
                unittest.mock.patch.object(jax.random, "normal", normal),
                unittest.mock.patch.object(jax.random, "choice", chosen),
            ):
                acts[key].append(act(jnp.asarray(batch["obs"][row], jnp.float64))[0])
            assert next(noise, None) is None  # all of it is used
    arrays |= single({key: np.stack(x) for key, x in acts.items()} | {"weights": np.stack(weights, axis=1)}, "")
    return batch, agent_of, arrays | {"draws": draws, "choice": choice}


def main(clone):
    module = learner(clone)
    for number, (name, options) in enumerate(CONFIG.items()):
        for seed in itertools.count(SEED + number, len(CONFIG)):
            batch, agent_of, arrays = drawn_case(module, options, seed)
            if np.abs(arrays["act"]).min() < 0.9 and np.ptp(arrays["weights"]) > 0.01:
                break  # not all actions are in the same corner, nor are all draws on the same side of V
        names = {"observations": "obs", "actions": "action", "rewards": "reward", "next_observations": "next_obs"}
        theirs = {key: jnp.asarray(batch[ours], jnp.float64) for key, ours in names.items()}
        theirs["masks"] = jnp.asarray(1 - batch["terminal"])
        jax.clear_caches()
        with training_draws(batch):
            new, info = agent_of(0.0).update(theirs)
        logged = {key: info[key] for key in ("actor_loss", "value_loss", "q", "v")}
        arrays |= single(logged | {"critic_loss": 2 * info["critic_loss"]}, "loss/")

        def gradients(state):  # after the first update Adam's first moment is 0.1 of it
            (moments,) = [x for x in state.opt_state if hasattr(x, "mu")]
            return jax.tree_util.tree_map(lambda x: x / 0.1, moments.mu)

        trees = trees_of(new, ("actor", "critic", "value"), gradients)
        trees["critic"] = jax.tree_util.tree_map(lambda x: 2 * x, trees["critic"])
        arrays |= single(arrays_of(trees), "grad/")
        agent = agent_of(LEARNING_RATE)
        jax.clear_caches()
        with training_draws(batch):
            for _ in range(UPDATES):
                agent, _ = agent.update(theirs)
        arrays |= single(arrays_of(trees_of(agent)), "after/")
        np.savez_compressed(OUT / f"{name}.npz", **arrays)
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    import flax
    import optax

    about = {
        "code": "https://github.com/philippe-eecs/IDQL", "commit": commit.stdout.strip(), "config": CONFIG,
        "updates": UPDATES, "learning_rate": LEARNING_RATE, "units": UNITS, "blocks": BLOCKS, "departures": DEPARTURES,
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__,
            "optax": optax.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    (OUT / "idql_provenance.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
