"""Numbers of two repositories that tests/test_parity_sequence.py compares our files with: of their own code.

    git clone https://github.com/scottemmons/rvs /tmp/rvs && git -C /tmp/rvs checkout 90c0ffb
    python -m venv /tmp/sq && . /tmp/sq/bin/activate && pip install torch==2.13.0
    python tests/parity/sequence_reference.py rvs /tmp/rvs
    git clone https://github.com/kzl/decision-transformer /tmp/dt && git -C /tmp/dt checkout e2d82e6
    pip install transformers==4.40.2
    python tests/parity/sequence_reference.py dt /tmp/dt

Each writes its own .npz and its part of sequence_provenance.json beside this file. The module of RvS that holds its
data imports D4RL, gym and PyTorch Lightning, of which these functions need nothing: empty modules take their places.

rvs.npz: rewards, ends of episodes (`dones`), `average` and `cumulative`, the reward-to-go of RvS-R; `first` and
`second`, uniform numbers, and the rows `start` and `goal` of RvS-G's pairs, with the episode that was chosen for each.

dt.npz: params/... by the names of the reference, batch/... as its get_batch pads it (on the left), `loss`, grad/... of
it, after/... parameters after `updates` steps of its trainer, and of an episode that its evaluation plays: play/state,
play/reward, play/action. Weights and batches are float32; the updates are computed in float64, the episode in float32.
"""

import json
import pathlib
import platform
import subprocess
import sys
import types
import unittest.mock

import numpy as np

FOLDER = pathlib.Path(__file__).parent


def note(part, checkout, **facts):
    """Writes what a part of the numbers comes from."""
    path = FOLDER / "sequence_provenance.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    git = ["git", "-C", checkout, "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    kept[part] = {"commit": commit, "python": platform.python_version(), "numpy": np.__version__, **facts}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


class Anything(types.ModuleType):
    """A module of which every name is an empty class."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def rvs(checkout):
    sys.path.insert(0, f"{checkout}/src")
    for name in (
        "d4rl",
        "gym",
        "pytorch_lightning",
        "wandb",
        "wandb.sdk",
        "wandb.sdk.wandb_run",
        "rvs.step",
        "rvs.train",
    ):
        sys.modules[name] = Anything(name)
    from rvs import dataset

    rng = np.random.default_rng(0)
    lengths = np.array([5, 1, 12, 7, 12, 2])
    n = lengths.sum()
    dones = np.zeros(n, bool)
    dones[np.cumsum(lengths) - 1] = True
    rewards = rng.normal(size=n)
    data = {
        "rewards": rewards,
        "terminals": dones & (np.arange(n) % 2 == 0),
        "timeouts": dones & (np.arange(n) % 2 == 1),
    }
    arrays = {"rewards": rewards, "dones": dones, "average": dataset.reward_to_go(data, average=True)}
    arrays["cumulative"] = dataset.reward_to_go(data, average=False)

    number = 200
    drawn = dataset.D4RLIterableDataset(np.zeros((n, 1)), np.zeros((n, 1)), dones, index_batch_size=number)
    episode, uniform = rng.integers(len(lengths), size=number), [rng.random(number), rng.random(number)]
    with unittest.mock.patch.object(np.random, "choice", lambda *args: episode):
        with unittest.mock.patch.object(np.random, "rand", unittest.mock.Mock(side_effect=uniform)):
            arrays["start"], arrays["goal"] = drawn._sample_indices()
    np.savez(FOLDER / "rvs.npz", **arrays, episode=episode, first=uniform[0], second=uniform[1])
    note("rvs", checkout, repository="https://github.com/scottemmons/rvs")


DT = {"state_dim": 3, "act_dim": 2, "context": 4, "max_ep_len": 9, "width": 8, "inner": 12, "blocks": 2, "heads": 2}
DT |= {"learning_rate": 0.01, "weight_decay": 0.1, "warmup": 2, "updates": 3, "scale": 10.0, "target": 7.0}


def dt_batch(rng):
    """Windows of 4, 2, 1 and 4 steps, padded on the left as the reference's get_batch does."""
    columns = {name: [] for name in ("states", "actions", "rtg", "timesteps", "mask")}
    for begin, length in ((0, 4), (3, 2), (5, 1), (6, 4)):
        pad = DT["context"] - length

        def left(x, fill, pad=pad):
            return np.concatenate([np.full((pad, *x.shape[1:]), fill), x])

        columns["states"].append(left(rng.normal(size=(length, DT["state_dim"])), 0.0))
        columns["actions"].append(left(rng.uniform(-1, 1, (length, DT["act_dim"])), -10.0))
        columns["rtg"].append(left(rng.normal(size=(length, 1)), 0.0))
        columns["timesteps"].append(left(np.minimum(begin + np.arange(length), DT["max_ep_len"] - 1), 0))
        columns["mask"].append(left(np.ones(length), 0.0))
    return {name: np.stack(x).astype(int if name == "timesteps" else np.float32) for name, x in columns.items()}


class Toy:
    """Seven steps of a linear system; the reward is the sum of the action and 0.3."""

    def reset(self):
        self.step_number, self.states = 0, [np.array([0.5, -0.2, 0.1], np.float32)]
        self.actions, self.rewards = [], []
        return self.states[0]

    def step(self, action):
        self.step_number += 1
        self.actions.append(action)
        self.rewards.append(float(action.sum()) + 0.3)
        state = self.states[-1]
        self.states.append(np.array([state[1], state[2] + action[0], action[1] - state[0]], np.float32))
        return self.states[-1], self.rewards[-1], self.step_number == 7, {}


def dt(checkout):
    import torch
    import transformers
    from transformers import file_utils, modeling_utils, pytorch_utils

    for name in ("find_pruneable_heads_and_indices", "prune_conv1d_layer"):  # where transformers 4.5 had them
        setattr(modeling_utils, name, getattr(pytorch_utils, name))
    file_utils.add_code_sample_docstrings = lambda **options: lambda function: function
    sys.path.insert(0, f"{checkout}/gym")
    sys.modules["wandb"] = Anything("wandb")
    from decision_transformer.evaluation.evaluate_episodes import evaluate_episode_rtg
    from decision_transformer.models.decision_transformer import DecisionTransformer
    from decision_transformer.training.seq_trainer import SequenceTrainer

    rng = np.random.default_rng(1)
    model = DecisionTransformer(
        DT["state_dim"], DT["act_dim"], DT["width"], max_length=DT["context"], max_ep_len=DT["max_ep_len"],
        n_layer=DT["blocks"], n_head=DT["heads"], n_inner=DT["inner"], n_positions=64, n_ctx=64,
        activation_function="relu", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.as_tensor(rng.normal(size=parameter.shape) * 0.3, dtype=torch.float32))
    arrays = {f"params/{name}": x.detach().numpy().copy() for name, x in model.named_parameters()}

    env = Toy()
    scale = {"scale": DT["scale"], "target_return": DT["target"] / DT["scale"], "max_ep_len": DT["max_ep_len"]}
    zero, one = np.zeros(DT["state_dim"], np.float32), np.ones(DT["state_dim"], np.float32)
    evaluate_episode_rtg(
        env, DT["state_dim"], DT["act_dim"], model, device="cpu", state_mean=zero, state_std=one, **scale
    )
    arrays |= {"play/state": np.stack(env.states[:-1]), "play/action": np.stack(env.actions)}
    arrays["play/reward"] = np.array(env.rewards)

    batch = dt_batch(rng)
    arrays |= {f"batch/{name}": x for name, x in batch.items()}
    model = model.double()

    def get_batch(_):
        x = {
            name: torch.as_tensor(x, dtype=torch.long if name == "timesteps" else torch.float64)
            for name, x in batch.items()
        }
        more = torch.zeros(len(x["rtg"]), 1, 1, dtype=torch.float64)  # the trainer leaves the last return out
        rtg = torch.cat([x["rtg"], more], dim=1)
        return x["states"], x["actions"], None, None, rtg, x["timesteps"], x["mask"]

    optimizer = torch.optim.AdamW(model.parameters(), lr=DT["learning_rate"], weight_decay=DT["weight_decay"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: min((steps + 1) / DT["warmup"], 1))
    options = {"batch_size": 4, "get_batch": get_batch, "scheduler": schedule}
    options["loss_fn"] = lambda s_hat, a_hat, r_hat, s, a, r: torch.mean((a_hat - a) ** 2)
    trainer = SequenceTrainer(model=model, optimizer=optimizer, **options)
    clipped = {}

    def clip(parameters, size, clip=torch.nn.utils.clip_grad_norm_):
        if not clipped:
            arrays.update(
                {f"grad/{k}": x.grad.numpy().copy() for k, x in model.named_parameters() if x.grad is not None}
            )
        clipped["max_norm"] = size
        return clip(parameters, size)

    with unittest.mock.patch.object(torch.nn.utils, "clip_grad_norm_", clip):
        for _ in range(DT["updates"]):
            loss = trainer.train_step()
            schedule.step()  # as its train_iteration does
            arrays.setdefault("loss", np.array(loss))
    arrays |= {f"after/{name}": x.detach().numpy() for name, x in model.named_parameters()}
    unused = ("predict_state", "predict_return", "transformer.wte")
    arrays = {k: np.asarray(x, np.float32 if np.asarray(x).dtype == float else None) for k, x in arrays.items()}
    np.savez(FOLDER / "dt.npz", **{k: x for k, x in arrays.items() if not any(name in k for name in unused)})
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "config": DT | clipped}
    note("dt", checkout, repository="https://github.com/kzl/decision-transformer", **facts)


if __name__ == "__main__":
    {"rvs": rvs, "dt": dt}[sys.argv[1]](sys.argv[2])
