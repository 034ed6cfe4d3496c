"""Numbers of EDP's own code that tests/test_parity_diffusion.py compares our file with.

Writes NAME.npz for each name of CONFIG, and edp_provenance.json, beside this file. It needs a clone and an environment
of its own, since the clone needs libraries that this project does without:

    git clone https://github.com/sail-sg/edp && git -C edp checkout b019648
    python -m venv /tmp/edp && . /tmp/edp/bin/activate && pip install jax==0.4.38 flax==0.10.2 distrax ml_collections
    python tests/parity/edp_reference.py edp

Every loss is one that the clone's `train` returns, every gradient is in the clone's optimisers after it, and actions
are of its DPM-Solver: no formula is written out here but the one that departures of the provenance name. All its draws
are those of the file. Keys of an .npz, with our names of parameters, are those of diffusion_ql_reference.py.

Weights and batches are float32. The clone then computes in float64 and the results are rounded to float32, so that the
bytes do not depend on the order in which a CPU sums.
"""

import contextlib
import json
import pathlib
import platform
import subprocess
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import core

jax.config.update("jax_enable_x64", True)
jax.tree_multimap = jax.tree_util.tree_map  # its name when the clone was written
type(jnp.zeros(1)).tile = jnp.tile  # methods of arrays, and of those that are traced, that were there then
core.ShapedArray.tile = core.aval_method(jnp.tile)

SEED, OBS_DIM, ACTION_DIM, BATCH, UNITS, TIME = 0, 3, 2, 16, 8, 16
OUT = pathlib.Path(__file__).parent
UPDATES, LEARNING_RATE = 5, 0.01
CONFIG = {  # in the clone's names; mostly not its defaults
    "edp": {
        "discount": 0.9, "tau": 0.1, "alpha": 0.7, "max_q_backup": False, "num_timesteps": 1000, "dpm_steps": 15,
        "policy_tgt_freq": 2, "first": True,
    },
    "edp_max": {
        "discount": 0.9, "tau": 0.1, "alpha": 2.0, "max_q_backup": True, "num_timesteps": 49, "dpm_steps": 8,
        "policy_tgt_freq": 3, "first": False,
    },
}  # fmt: skip
DEPARTURES = [
    {
        "what": "the first moves of the target policy", "theirs": "from update 1,000 on", "ours": "from the first on",
        "handled": "theirs counts from 1,001",
    },
    {
        "what": "the last time of the solver", "theirs": "dpm_t_end = 0.001", "ours": "1 / T",
        "handled": "dpm_t_end = 1 / num_timesteps",
    },
    {
        "what": "the solver's actions", "theirs": "clipped in max-Q backups alone", "ours": "clipped",
        "handled": "theirs are clipped",
    },
    {
        "what": "the level of noise by which the solver clips a guess",
        "theirs": "that of the point's step, rounded down", "ours": "the point's own",
        "handled": "theirs is between the levels of both neighbours",
    },
    {
        "what": "sines that tell the step", "theirs": "cosines first, with frequencies 10000^(-k / 8)",
        "ours": "sines first, with 10000^(-k / 7)", "handled": "theirs are ours",
    },
    {"what": "order of the network's inputs", "theirs": "obs, action, step", "ours": "action, step, obs",
     "handled": "the rows of its first kernel are in our order"},
    {"what": "length of gradients", "theirs": "of each critic", "ours": "of both critics",
     "handled": "neither is scaled down"},
]  # fmt: skip


class Double:
    """jax.numpy whose narrow types are float64: the clone names float32, and int32 where it rounds down."""

    float32 = int32 = jnp.float64

    def __getattr__(self, name):
        return getattr(jnp, name)


def sines(timesteps, dim, max_period=10_000):
    angle = jnp.expand_dims(timesteps, -1) * max_period ** -jnp.linspace(0, 1, dim // 2)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def actor_arrays(params):
    net = params["params"]["base_net"]
    found = {}
    for i, mlp in enumerate((net["TimeEmbedding_0"], net)):
        for name in sorted(name for name in mlp if name.startswith("Dense")):
            for part, value in mlp[name].items():
                found[f"MLP_{i}/{name}/{part}"] = np.asarray(value)
    kernel = found["MLP_1/Dense_0/kernel"]
    found["MLP_1/Dense_0/kernel"] = np.concatenate([kernel[OBS_DIM:], kernel[:OBS_DIM]])
    return found


def critic_arrays(first, second):
    pairs = {name: (first["params"][name], second["params"][name]) for name in first["params"]}
    return {f"{name}/{part}": np.stack([np.asarray(x[part]) for x in pair]) for name, pair in pairs.items()
            for part in pair[0]}  # fmt: skip


def arrays_of(trees, prefixes):
    """{our name: array} of the trees "policy", "qf1" and "qf2"."""
    actor, critic = actor_arrays(trees["policy"]), critic_arrays(trees["qf1"], trees["qf2"])
    return {f"{prefixes[0]}/{key}": x for key, x in actor.items()} | {
        f"{prefixes[1]}/{key}": x for key, x in critic.items()
    }


def all_arrays(agent):
    online = {name: state.params for name, state in agent.train_states.items()}
    return arrays_of(online, ("actor", "critic")) | arrays_of(agent._tgt_params, ("target_actor", "target_critic"))


def single(arrays, prefix):
    return {f"{prefix}{key}": np.asarray(value, np.float32) for key, value in arrays.items()}


def main(clone):
    sys.path.insert(0, clone)
    from diffusion import diffusion, dpm_solver, dql, nets
    from utilities import jax_utils

    diffusion.np = nets.jnp = Double()
    nets.sinusoidal_embedding = sines
    solve = dpm_solver.DPM_Solver.sample
    dpm_solver.DPM_Solver.sample = lambda *args, **options: jnp.clip(solve(*args, **options), -1, 1)
    jax_utils.init_rng(SEED)

    for number, (name, options) in enumerate(CONFIG.items()):
        rng = np.random.default_rng(SEED + number)
        options = dict(options)
        first = options.pop("first")
        candidates = 10 if options["max_q_backup"] else 1
        steps = options["num_timesteps"]

        def draw(*shape, rng=rng):
            return rng.normal(size=shape).astype(np.float32)

        batch = {
            "obs": draw(BATCH, OBS_DIM), "action": rng.uniform(-1, 1, (BATCH, ACTION_DIM)).astype(np.float32),
            "reward": draw(BATCH), "next_obs": draw(BATCH, OBS_DIM), "terminal": (rng.random(BATCH) < 0.3) * 1.0,
            "noise": draw(BATCH, ACTION_DIM), "next_noise": draw(candidates, BATCH, ACTION_DIM),
            "t": rng.integers(0, steps, BATCH), "first": first,
        }  # fmt: skip
        names = {"observations": "obs", "actions": "action", "rewards": "reward", "next_observations": "next_obs",
                 "dones": "terminal"}  # fmt: skip
        theirs = {key: jnp.asarray(batch[ours], jnp.float64) for key, ours in names.items()}

        def agent_of(rate, options=options, steps=steps, seed=SEED + number):
            process = diffusion.GaussianDiffusion(
                num_timesteps=steps, schedule_name="vp", model_mean_type=diffusion.ModelMeanType.EPSILON,
                model_var_type=diffusion.ModelVarType.FIXED_SMALL, loss_type=diffusion.LossType.MSE,
            )  # fmt: skip
            log_signal = 0.5 * jnp.log(process.alphas_cumprod)

            def interpolated(table, t, shape):
                """Of 1 / signal or of noise / signal, at steps t that need not be whole: as the solver's schedule."""
                found = jnp.exp(-jnp.interp(t, jnp.arange(steps), log_signal))
                found = found if table is process.sqrt_recip_alphas_cumprod else jnp.sqrt(found**2 - 1)
                return jnp.broadcast_to(found[..., None], shape)

            nets._extract_into_tensor = interpolated
            arch = (UNITS,) * 3
            policy = nets.DiffusionPolicy(
                diffusion=process, observation_dim=OBS_DIM, action_dim=ACTION_DIM, arch=arch, time_embed_size=TIME,
                sample_method="dpm", dpm_steps=options["dpm_steps"], dpm_t_end=1 / steps,
            )  # fmt: skip
            critic = nets.Critic(OBS_DIM, ACTION_DIM, arch, act=nets.mish)
            config = dql.DiffusionQL.get_default_config({**options, "lr": rate})
            unused = nets.Value(OBS_DIM, arch), nets.GaussianPolicy(ACTION_DIM)  # of its other losses
            agent = dql.DiffusionQL(config, policy, critic, *unused)
            weights = np.random.default_rng(seed)

            def drawn(tree):
                values = [
                    weights.normal(size=x.shape).astype(np.float32) * 0.5 for x in jax.tree_util.tree_leaves(tree)
                ]
                values = [jnp.asarray(x, jnp.float64) for x in values]
                return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(tree), values)

            for key in ("policy", "qf1", "qf2"):
                agent._train_states[key] = dql.TrainState.create(
                    params=drawn(agent._train_states[key].params), tx=agent._train_states[key].tx, apply_fn=None
                )
                agent._tgt_params[key] = drawn(agent._tgt_params[key])
            agent._total_steps = 1001
            return agent

        @contextlib.contextmanager
        def draws(batch=batch, first=first):
            """All random numbers of the clone are those of the batch. Within training_losses it noises the actions."""
            now = {"noise": jnp.moveaxis(jnp.asarray(batch["next_noise"], jnp.float64), 0, 1)}
            losses = diffusion.GaussianDiffusion.training_losses

            def cloning(*args, **kwargs):
                with unittest.mock.patch.dict(now, noise=jnp.asarray(batch["noise"], jnp.float64)):
                    return losses(*args, **kwargs)

            with (
                unittest.mock.patch.object(diffusion.GaussianDiffusion, "training_losses", cloning),
                unittest.mock.patch.object(jax.random, "normal", lambda _, shape, **__: now["noise"].reshape(shape)),
                unittest.mock.patch.object(jax.random, "randint", lambda *_, **__: jnp.asarray(batch["t"])),
                unittest.mock.patch.object(jax.random, "uniform", lambda *_, **__: 1.0 if first else 0.0),
            ):
                yield

        agent = agent_of(0.0)
        arrays = single(all_arrays(agent), "")
        arrays |= {f"batch/{key}": np.asarray(value) for key, value in batch.items()}
        with draws():
            metric = agent.train(theirs)
        losses = {"actor": "policy_loss", "critic": "qf_loss", "bc": "diff_loss"}
        arrays |= single({ours: metric[key] for ours, key in losses.items()}, "loss/")

        def gradients(state):  # after the first update Adam's first moment is 0.1 of it
            (moments,) = [x for x in state.opt_state if hasattr(x, "mu")]
            return jax.tree_util.tree_map(lambda x: x / 0.1, moments.mu)

        states = agent.train_states
        trees = {key: gradients(states[key]) for key in ("policy", "qf1", "qf2")}
        arrays |= single(arrays_of(trees, ("actor", "critic")), "grad/")
        agent = agent_of(LEARNING_RATE)
        with draws():
            for _ in range(UPDATES):
                agent.train(theirs)
        arrays |= single(all_arrays(agent), "after/")
        if candidates == 1:
            agent = agent_of(0.0)
            with draws():
                act = agent.policy.apply(agent.train_states["policy"].params, jax.random.PRNGKey(0),
                                         theirs["observations"])  # fmt: skip
            arrays |= single({"act": act}, "")
        np.savez_compressed(OUT / f"{name}.npz", **arrays)
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    import flax

    about = {
        "code": "https://github.com/sail-sg/edp", "commit": commit.stdout.strip(), "config": CONFIG,
        "updates": UPDATES, "learning_rate": LEARNING_RATE, "units": UNITS, "departures": DEPARTURES,
        "versions": {
            "python": platform.python_version(), "jax": jax.__version__, "flax": flax.__version__,
            "numpy": np.__version__,
        },
    }  # fmt: skip
    (OUT / "edp_provenance.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
