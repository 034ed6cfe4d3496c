"""Chooses the policies of the locomotion datasets v1 among those of a training by train_sac.py, and keeps them.

    python benchmarks/behaviour/measure_sac.py --task hopper

Plays 20 episodes of each policy that the training kept, in NumPy, with a process for each core (their returns stay in
the training's folder, and the same command goes on), and writes
    common/recipes/behaviour/TASK-sac.npz   the policies that the recipes need, in half precision, and their returns
    benchmarks/behaviour/TASK-sac.png       the learning curve
    benchmarks/behaviour/TASK-sac.json      returns, the settings of the training, versions and commits
(TASK-sac-v2 with --version 2, of the same training).

expert         the last policy whose mean return is at least --expert-return; there may be none yet
medium         v1: the first one whose mean return is a third of an expert's or more (MEDIUM_RETURNS)
               v2, for walker2d alone: the first one that scores 63.2 or more, as BC does on D4RL's medium data
medium-replay  30 policies, evenly over the steps from the first one that acted in training to the medium one

A training that has its medium policy and no expert is enough for the datasets that need none. It can go on, with a
larger --num-steps, and be measured again: the medium policy stays the same.

All returns are of policies in half precision, as they are kept, and of episodes with the policy's own noise, as in the
data.
"""

import dataclasses
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import flax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import train_sac  # noqa: E402

from common.environments import provenance  # noqa: E402
from common.recipes import locomotion, locomotion_sac, rollouts  # noqa: E402

HERE = Path(__file__).resolve().parent
REPLAY = 30  # policies of medium-replay
CURVE_EPISODES = 20  # of each policy
REFERENCE_EPISODES = 100  # of the medium and of the expert policy, to report
EVAL_SEED = 2**31  # apart from those of the data
# D4RL's experts have 3234, 4592 and 12135. Ours of halfcheetah may be worse: its returns still grow after many hours
EXPERT_RETURNS = {"hopper": 3200.0, "walker2d": 4500.0, "halfcheetah": 9000.0}
# A third of our expert's on hopper, and of D4RL's on the tasks whose medium policy is older than their expert. v2: the
# score of 63.2 that BC has on D4RL's walker2d-medium-v2 (CORL at 2ed69e3)
MEDIUM_RETURNS = {
    ("hopper", 1): 3448.0 / 3,
    ("walker2d", 1): 4592.3 / 3,
    ("halfcheetah", 1): 12135.0 / 3,
    ("walker2d", 2): float(np.interp(63.2, (0, 100), locomotion_sac.REFERENCE_SCORES["walker2d"])),
}


@dataclass(frozen=True)
class Config:
    task: Literal["hopper", "walker2d", "halfcheetah"]
    training: str = ""  # folder that train_sac.py left; by default runs/behaviour/TASK
    expert_return: float = 0.0  # that an expert has at least; 0: what EXPERT_RETURNS asks for
    version: Literal[1, 2] = 1  # of the datasets


def policies_of(snapshots):
    """[Policy], as they will be read: rounded to half precision."""
    weights = [snapshots[name].astype(np.float16).astype(np.float32) for name in locomotion_sac.Policy._fields]
    return [locomotion_sac.Policy(*arrays) for arrays in zip(*weights, strict=True)]


def evaluate(job):
    """Returns of an episode; in a process of the pool."""
    task, policy, number = job
    return locomotion.rollout(locomotion.process_env(task), policy, (EVAL_SEED, number)).rewards.sum()


def play(task, policies, num_episodes):
    """Yields the returns (num_episodes,) of each policy in turn."""
    jobs = ((task, policy, number) for policy in policies for number in range(num_episodes))
    with rollouts.processes(os.cpu_count()) as run:
        returns = run(evaluate, jobs)
        for _ in tqdm(policies, desc=task, unit=" policies"):
            yield np.array(list(itertools.islice(returns, num_episodes)))


def curve_of(task, policies, steps, file):
    """(policies, CURVE_EPISODES) returns. `file` keeps them along the way: what was played once is not played again."""
    known = {}
    if file.exists():
        with np.load(file) as saved:
            known = dict(zip(saved["step"].tolist(), saved["returns"], strict=True))
    missing = [i for i, step in enumerate(steps.tolist()) if step not in known]
    played = play(task, [policies[i] for i in missing], CURVE_EPISODES) if missing else []
    for i, returns in zip(missing, played, strict=True):
        known[int(steps[i])] = returns
        np.savez(file.with_suffix(".tmp.npz"), step=list(known), returns=list(known.values()))
        os.replace(file.with_suffix(".tmp.npz"), file)
    return np.stack([known[step] for step in steps.tolist()])


def choose(steps, returns, random_steps, medium_return, expert_return):
    """(indices of the policies to keep, in order; the place of the medium one among them). An expert is the last one.

    `steps`, `returns`: (policies,) steps of the training, and mean returns.
    """
    first = np.searchsorted(steps, random_steps)
    if not np.any(returns[first:] >= medium_return):
        raise SystemExit(
            f"No policy that acted has a mean return of {medium_return:.0f}; the best of all has {returns.max():.0f}, "
            f"at step {steps[returns.argmax()]}: train longer (--num-steps)."
        )
    medium, good = first + np.argmax(returns[first:] >= medium_return), np.flatnonzero(returns >= expert_return)
    wanted = np.linspace(steps[first], steps[medium], REPLAY)
    replay = np.unique(np.abs(steps[:, None] - wanted).argmin(axis=0))
    if len(replay) < REPLAY:
        interval = int((steps[medium] - steps[first]) / (REPLAY - 1))
        raise SystemExit(
            f"The medium policy is that of step {steps[medium]}, and {medium - first + 1} policies that acted until "
            f"then were kept, where medium-replay needs {REPLAY}: train again with --early-interval {interval} or less."
        )
    return np.append(replay, good[-1:]), REPLAY - 1


def measure(cfg, snapshots, random_steps, training):
    """What goes into the .npz file."""
    policies, steps = policies_of(snapshots), snapshots["step"]
    curve = curve_of(cfg.task, policies, steps, training / "returns.npz")
    levels = MEDIUM_RETURNS[cfg.task, cfg.version], cfg.expert_return or EXPERT_RETURNS[cfg.task]
    kept, medium = choose(steps, curve.mean(axis=1), random_steps, *levels)
    named = {"medium_return": kept[medium]} | ({"expert_return": kept[-1]} if len(kept) > medium + 1 else {})
    played = play(cfg.task, [policies[i] for i in named.values()], REFERENCE_EPISODES)
    return {name: snapshots[name][kept].astype(np.float16) for name in locomotion_sac.Policy._fields} | {
        "step": steps[kept],
        "return": curve[kept],  # (kept policies, CURVE_EPISODES)
        "medium": medium,
        **dict(zip(named, played, strict=True)),  # (REFERENCE_EPISODES,) each
        "curve_step": steps,
        "curve_return": curve,  # (all policies, CURVE_EPISODES)
    }


def places(behaviour):
    """Where the medium policy is among those that are kept, and the expert, if there is one."""
    places = {"medium": int(behaviour["medium"]), "expert": len(behaviour["step"]) - 1}
    return {name: i for name, i in places.items() if f"{name}_return" in behaviour}


def draw(path, task, behaviour):
    """The learning curve, with the policies that are kept."""
    figure, axes = plt.subplots(figsize=(6, 3.5), dpi=120, layout="constrained")
    steps, returns = behaviour["curve_step"] / 1000, behaviour["curve_return"]
    axes.fill_between(steps, *np.quantile(returns, [0.1, 0.9], axis=-1), color="#0072B2", alpha=0.2, linewidth=0)
    axes.plot(steps, returns.mean(-1), color="#0072B2", linewidth=1, label="mean of the episodes (shade: 10 to 90 %)")
    step, kept = behaviour["step"] / 1000, behaviour["return"].mean(-1)
    axes.plot(step, kept, ".", color="#0072B2", label="kept policies")
    for name, i in places(behaviour).items():
        axes.plot(step[i], kept[i], "o", color="#D55E00")
        mean = behaviour[f"{name}_return"].mean()
        axes.annotate(f"{name}: {mean:.0f}", (step[i], kept[i]), (6, -12), textcoords="offset points")
    axes.axhline(locomotion_sac.REFERENCE_SCORES[task][1], color="0.5", linestyle=":", label="D4RL's expert")
    axes.margins(x=0.15)  # room for the names
    axes.set(title=f"SAC on {locomotion.TASKS[task]}", xlabel="environment steps, in thousands", ylabel="return")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def training_command(config):
    """The command of a training with this config, as the checkpoint has it: its task, and what is not the default."""
    default = json.loads(json.dumps(dataclasses.asdict(train_sac.Config(config["task"]))))
    changed = {name: value for name, value in config.items() if value != default[name]}
    options = [f" --{name.replace('_', '-')} {' '.join(map(str, np.ravel(value)))}" for name, value in changed.items()]
    return f"python benchmarks/behaviour/train_sac.py --task {config['task']}{''.join(options)}"


def record_of(cfg, behaviour, saved, progress):
    """What the .json file says; the folder of the training is a place on one machine, and not in it."""
    option = f" --expert-return {cfg.expert_return:g}" if cfg.expert_return else ""
    option += f" --version {cfg.version}" if cfg.version > 1 else ""

    def about(returns):
        return {"return_mean": round(float(returns.mean()), 1), "return_std": round(float(returns.std()), 1)}

    config = json.loads(saved["config"])
    policies = zip(behaviour["step"].tolist(), behaviour["return"], strict=True)
    return provenance() | {
        "command": f"python benchmarks/behaviour/measure_sac.py --task {cfg.task}{option}",
        "training": {
            "command": training_command(config),
            "config": config,
            "steps": saved["step"],
            "seconds": round(saved["seconds"]),
            **{name: progress[name] for name in ("commit", "device", "versions") if name in progress},
        },
        **{
            name: {"step": int(behaviour["step"][i]), **about(behaviour[f"{name}_return"])}
            for name, i in places(behaviour).items()
        },
        "episodes": {"policies": CURVE_EPISODES, "medium and expert": REFERENCE_EPISODES},
        "policies": [{"step": step, **about(returns)} for step, returns in policies],
    }


def main(cfg):
    if (cfg.task, cfg.version) not in MEDIUM_RETURNS:
        raise SystemExit(f"{cfg.task} has no version {cfg.version}: use --version 1.")
    training = Path(cfg.training or ROOT / "runs" / "behaviour" / cfg.task)
    if not (training / "checkpoint.msgpack").exists():
        raise SystemExit(
            f"{training} holds no training of {cfg.task}: run benchmarks/behaviour/train_sac.py, or name its "
            "folder with --training."
        )
    saved = flax.serialization.msgpack_restore((training / "checkpoint.msgpack").read_bytes())
    config = json.loads(saved["config"])
    if config["task"] != cfg.task or saved["step"] < config["num_steps"]:
        raise SystemExit(
            f"{training} is a training of {config['task']} that has {saved['step']} of {config['num_steps']} steps: "
            f"name a finished one of {cfg.task}."
        )
    with np.load(training / "snapshots.npz") as file:
        behaviour = measure(cfg, dict(file), config["random_steps"], training)
    # Before a file is written that git knows: its commit would be said to be changed
    record = record_of(cfg, behaviour, saved, json.loads((training / "progress.json").read_text()))
    name = locomotion_sac.name_of(cfg.task, cfg.version)
    np.savez_compressed(locomotion_sac.BEHAVIOUR / f"{name}.npz", **behaviour)
    draw(HERE / f"{name}.png", cfg.task, behaviour)
    (HERE / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for which in ("medium", "expert"):
        print(f"{which}: {record.get(which, 'none yet; a longer training (--num-steps) may have one')}")


if __name__ == "__main__":
    main(tyro.cli(Config))
