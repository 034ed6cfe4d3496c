"""Numbers of Diffusion-QL's own code that tests/test_parity_diffusion.py compares our file with.

Writes NAME.npz for each name of CONFIG, and diffusion_ql_provenance.json, beside this file. It needs a clone and torch:

    git clone https://github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL && cd Diffusion-Policies-for-Offline-RL
    git checkout d871f5c && cd -
    python -m venv /tmp/dql && . /tmp/dql/bin/activate && pip install torch==2.13.0 numpy
    python tests/parity/diffusion_ql_reference.py Diffusion-Policies-for-Offline-RL

Every loss is one that the clone's `train` returns, every gradient is torch's: no formula is written out here. Layers
have 8 units in the place of the 256 of its text. All its draws are those of the file. Keys of an .npz, with our names
of parameters:
    actor/MLP_1/Dense_0/kernel  weights; kernels are (in, out), critics' have an axis of the two in front
    batch/obs                   16 rows
    batch/noise                 of cloning and of every step of the policy; batch/next_noise: likewise in the target
    batch/t, batch/first        steps of the rows; whether the first critic is the one that the policy climbs
    loss/critic                 a number
    grad/actor/...              gradient in the first update, with critics that stand still
    after/actor/...             all networks after UPDATES whole updates
    act                         actions of the policy, with batch/next_noise

Weights and batches are float32. The clone then computes in float64 and the results are rounded to float32, so that the
bytes do not depend on the order in which a CPU sums.
"""

import contextlib
import json
import pathlib
import platform
import subprocess
import sys
import types
import unittest.mock

import numpy as np
import torch

SEED, OBS_DIM, ACTION_DIM, BATCH, UNITS = 0, 3, 2, 16, 8
OUT = pathlib.Path(__file__).parent
UPDATES, LEARNING_RATE = 5, 0.01
CONFIG = {  # in the clone's names; mostly not its defaults
    "diffusion_ql": {
        "discount": 0.9, "tau": 0.1, "eta": 0.7, "max_q_backup": False, "n_timesteps": 5, "ema_decay": 0.9,
        "update_ema_every": 2, "grad_norm": 0.5, "first": True,
    },
    "diffusion_ql_max": {
        "discount": 0.9, "tau": 0.1, "eta": 2.0, "max_q_backup": True, "n_timesteps": 3, "ema_decay": 0.9,
        "update_ema_every": 3, "grad_norm": 0.5, "first": False,
    },
}  # fmt: skip


def small_linear(linear=torch.nn.Linear):
    return lambda inputs, outputs: linear(*(UNITS if n == 256 else n for n in (inputs, outputs)))


def layers(modules):
    return [module for module in modules if isinstance(module, torch.nn.Linear)]


def arrays_of(agent, read):
    """{our name: array} of read(parameter) for all networks."""
    found = {}
    for name, diffusion in (("actor", agent.actor), ("target_actor", agent.ema_model)):
        mlps = [diffusion.model.time_mlp, [*diffusion.model.mid_layer, diffusion.model.final_layer]]
        for i, mlp in enumerate(mlps):
            for j, layer in enumerate(layers(mlp)):
                found[f"{name}/MLP_{i}/Dense_{j}/kernel"] = read(layer.weight).T
                found[f"{name}/MLP_{i}/Dense_{j}/bias"] = read(layer.bias)
    for name, critic in (("critic", agent.critic), ("target_critic", agent.critic_target)):
        for j, pair in enumerate(zip(*(layers(mlp) for mlp in (critic.q1_model, critic.q2_model)), strict=True)):
            found[f"{name}/Dense_{j}/kernel"] = np.stack([read(layer.weight).T for layer in pair])
            found[f"{name}/Dense_{j}/bias"] = np.stack([read(layer.bias) for layer in pair])
    return found


def single(arrays, prefix):
    return {f"{prefix}{key}": np.asarray(value, np.float32) for key, value in arrays.items()}


@contextlib.contextmanager
def draws(batch, first):
    """All random numbers of the clone are those of the batch. It draws for s', steps, for s, and a critic."""
    rows = np.concatenate([batch["next_noise"][:, i] for i in range(BATCH)])  # repeats of a row stand together
    noise = {at: torch.as_tensor(x, dtype=torch.float64) for at, x in (("s", batch["noise"]), ("s'", rows))}
    now = {"at": "s'"}

    def steps(*_, **__):
        now["at"] = "s"
        return torch.as_tensor(batch["t"])

    def chance():
        now["at"] = "s'"
        return 1.0 if first else 0.0

    with (
        unittest.mock.patch.object(torch, "randn", lambda *_, **__: noise[now["at"]]),
        unittest.mock.patch.object(torch, "randn_like", lambda _: noise[now["at"]]),
        unittest.mock.patch.object(torch, "randint", steps),
        unittest.mock.patch.object(np.random, "uniform", chance),
    ):
        yield


def main(clone):
    sys.path.insert(0, clone)
    logger = types.ModuleType("utils.logger")  # it would need libraries for plots
    logger.logger = None
    sys.modules["utils.logger"] = logger
    from agents.ql_diffusion import Diffusion_QL

    torch.set_default_dtype(torch.float64)
    for number, (name, options) in enumerate(CONFIG.items()):
        rng = np.random.default_rng(SEED + number)
        options = dict(options)
        first = options.pop("first")
        candidates = 10 if options["max_q_backup"] else 1

        def draw(*shape, rng=rng):
            return rng.normal(size=shape).astype(np.float32)

        batch = {
            "obs": draw(BATCH, OBS_DIM), "action": rng.uniform(-1, 1, (BATCH, ACTION_DIM)).astype(np.float32),
            "reward": draw(BATCH), "next_obs": draw(BATCH, OBS_DIM), "terminal": (rng.random(BATCH) < 0.3) * 1.0,
            "noise": draw(BATCH, ACTION_DIM), "next_noise": draw(candidates, BATCH, ACTION_DIM),
            "t": rng.integers(0, options["n_timesteps"], BATCH), "first": first,
        }  # fmt: skip
        columns = [torch.as_tensor(batch[c], dtype=torch.float64) for c in ("obs", "action", "next_obs")]
        columns += [torch.as_tensor(x, dtype=torch.float64)[:, None] for x in (batch["reward"], 1 - batch["terminal"])]
        buffer = types.SimpleNamespace(sample=lambda size, columns=columns: columns)

        def agent_of(grad_norm, rate, options=options, seed=SEED + number):
            weights = np.random.default_rng(seed)
            with unittest.mock.patch.object(torch.nn, "Linear", small_linear()):
                made = {**options, "grad_norm": grad_norm}
                agent = Diffusion_QL(
                    OBS_DIM, ACTION_DIM, 1.0, "cpu", beta_schedule="vp", step_start_ema=0, **made
                )
            for network in (agent.actor, agent.ema_model, agent.critic, agent.critic_target):
                network.double()
                for p in network.parameters():
                    p.data = torch.as_tensor(weights.normal(size=p.shape).astype(np.float32) * 0.5).double()
            for optimizer in (agent.actor_optimizer, agent.critic_optimizer):
                optimizer.param_groups[0]["lr"] = rate
            return agent

        agent = agent_of(0.0, 0.0)
        arrays = single(arrays_of(agent, lambda p: p.data.numpy().copy()), "")
        arrays |= {f"batch/{key}": np.asarray(value) for key, value in batch.items()}
        grads = {}

        def keep(agent=agent, grads=grads):  # before the actor's gradient is added to the critics'
            grads |= arrays_of(agent, lambda p: np.zeros(p.shape) if p.grad is None else p.grad.numpy().copy())

        agent.critic_optimizer.step = keep
        with draws(batch, first):
            metric = agent.train(buffer, 1, BATCH)
        losses = {"actor": "actor_loss", "critic": "critic_loss", "bc": "bc_loss"}
        arrays |= single({ours: metric[theirs][0] for ours, theirs in losses.items()}, "loss/")
        critics = {key: x for key, x in grads.items() if key.startswith("critic")}
        keep()
        arrays |= single(critics | {key: x for key, x in grads.items() if key.startswith("actor")}, "grad/")
        agent = agent_of(options["grad_norm"], LEARNING_RATE)
        with draws(batch, first):
            agent.train(buffer, UPDATES, BATCH)
        arrays |= single(arrays_of(agent, lambda p: p.data.numpy().copy()), "after/")
        if candidates == 1:
            with draws(batch, first), torch.no_grad():
                arrays |= single({"act": agent_of(0.0, 0.0).actor.sample(columns[0]).numpy()}, "")
        np.savez_compressed(OUT / f"{name}.npz", **arrays)
    commit = subprocess.run(["git", "-C", clone, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    about = {
        "code": "https://github.com/Zhendong-Wang/Diffusion-Policies-for-Offline-RL", "commit": commit.stdout.strip(),
        "config": CONFIG, "updates": UPDATES, "learning_rate": LEARNING_RATE, "units": UNITS,
        "departures": [
            {
                "what": "the first moves of the target policy", "theirs": "from update step_start_ema = 1,000 on",
                "ours": "from the first update on", "handled": "step_start_ema = 0",
            },
        ],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }  # fmt: skip
    (OUT / "diffusion_ql_provenance.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
