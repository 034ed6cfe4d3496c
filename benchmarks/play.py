"""Watch a trained policy: python benchmarks/play.py runs/iql/stitch/pointmaze-umaze-v0

Plays the policy of a run folder in the environment of its dataset, prints the return of each episode, and writes
RUN/play.gif (or --out), as far as that environment can be drawn on this machine. Episode j starts where episode j of
the run's own evaluations did, on the same of its tasks, so returns of a finished run are the first of its summary.json.
"""

import ctypes.util
import dataclasses
import io
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from plot import read_config, restore  # benchmarks/plot.py
from sweep import write  # benchmarks/sweep.py

from common.environments import HANDS, tasks_of
from common.recipes.adroit import as_in_d4rl
from common.recipes.worker import begin, with_goal

WIDTH = 320  # pixels of the GIF, at most
FRAMES_PER_SECOND = 20  # viewers slow down what is much faster


@dataclasses.dataclass(frozen=True)
class Options:
    folder: Annotated[Path, tyro.conf.Positional]  # run folder
    episodes: int = 3
    run: int = 0  # which of the folder's runs: its seeds, at each point of a grid in turn
    out: Path | None = None  # of the GIF; by default play.gif in the run folder


def main(options: Options):
    if options.episodes < 1:
        raise SystemExit(f"--episodes must be at least 1, not {options.episodes}.")
    config = read_config(options.folder)
    count = int(np.prod([len(values) for values in config["grid"].values()], initial=config["num_seeds"]))
    if not 0 <= options.run < count:
        raise SystemExit(f"--run must be from 0 to {count - 1}, not {options.run}: {options.folder} has {count} runs.")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        if ctypes.util.find_library("EGL"):  # else importing mujoco would fail
            os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo's own choice, GLFW, needs a display
    policy = restore(options.folder, config, options.run)
    (of,) = policy.runs
    seed, point = of["seed"], "".join(f", {field} {value:g}" for field, value in of["grid"].items())
    print(f"{config['algo']} on {config['dataset']}, seed {seed}{point}, after {policy.step:,} updates")
    env, why_not = drawn_env(config["dataset"])
    frames = None if why_not else []
    steps = step_limit(env, config)
    returns = []
    tasks = dataset_tasks(config["dataset"])
    for j, start in enumerate(starts(seed, options.episodes, tasks)):
        total, observations = episode(policy, env, start, steps, frames)
        returns.append(total)
        of_task = f", task {1 + j % len(tasks)}" if any(tasks) else ""
        print(f"episode {j}{of_task}: return {total:g} in {len(observations)} steps", flush=True)
    print(f"mean return {np.mean(returns):g}")
    if why_not:
        print(f"No GIF is written: {why_not}.")
    else:
        out = options.out or options.folder / "play.gif"
        write(out, gif(frames))
        print(out)


# --- The environment -----------------------------------------------------------------------------------


def make_env(dataset_id: str, render_mode: str | None = None):
    """The evaluation environment that the dataset's file names. Loading it runs what that file names."""
    import minari

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari warns of every package version that differs
        try:
            dataset = minari.load_dataset(dataset_id)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(f"{dataset_id} is not in Minari's folder: a run on it builds or downloads it.") from error
        spec = dataset._eval_env_spec or dataset.env_spec
        if dataset_id.startswith(HANDS):  # as the evaluations of the run
            dataset._eval_env_spec = as_in_d4rl(spec)
        takes_mode = render_mode or (spec and "render_mode" in spec.kwargs)  # some environments have no such argument
        options = {"render_mode": render_mode} if takes_mode else {}
        return dataset.recover_environment(eval_env=True, disable_env_checker=True, **options)


def drawn_env(dataset_id: str):
    """(environment, "") where it can be drawn, else (environment, why it cannot)."""
    try:
        env = make_env(dataset_id, "rgb_array")
        env.reset(seed=0)
        picture = env.render()
        if np.ndim(picture) == 3:
            return env, ""
        why_not = "the environment draws no pictures"
    except Exception as error:  # whatever a renderer, a graphics library or a package that is missing raises
        why_not = (
            f"the environment cannot be drawn here ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
            "without a display MuJoCo needs EGL or OSMesa (apt install libegl1, or libosmesa6 and MUJOCO_GL=osmesa)"
        )
    try:
        return make_env(dataset_id), why_not
    except Exception as error:
        raise SystemExit(
            f"The environment of {dataset_id} cannot be made ({type(error).__name__}: {error})."
        ) from error


def dataset_tasks(dataset_id: str) -> list:
    """The tasks that episodes of an evaluation play in turn, as options of reset; [None] where there are none."""
    import minari

    with warnings.catch_warnings(action="ignore"):
        return tasks_of(dataset_id, minari.load_dataset(dataset_id).storage.metadata)


def step_limit(env, config: dict) -> int:
    """Of an episode, as in the run's evaluations: its own setting, else the environment's, else the longest of data."""
    limit = config.get("eval_steps") or (env.spec and env.spec.max_episode_steps)
    if limit:
        return limit
    import minari

    return max(len(episode.rewards) for episode in minari.load_dataset(config["dataset"]).iterate_episodes())


def starts(seed: int, count: int, tasks=(None,)) -> list[tuple]:
    """(seed of the environment, task) of each episode, as common.environments draws them."""
    seeds = (int(np.random.SeedSequence((seed, j)).generate_state(1)[0]) for j in range(count))
    return [(start, tasks[j % len(tasks)]) for j, start in enumerate(seeds)]


def episode(policy, env, start: tuple, steps: int, frames: list | None = None):
    """(return, the observations that the policy acted on, as the environment gave them) from such a start."""
    observation, goal = begin(env, *start)
    reward = None
    policy.episode = None  # its memory and step begin anew
    every = max(1, round(env.metadata.get("render_fps", FRAMES_PER_SECOND) / FRAMES_PER_SECOND))
    total, observations = 0.0, []
    for step in range(steps):
        observations.append(observation)
        if frames is not None and step % every == 0:
            frames.append(small(env.render()))
        action = policy(with_goal(policy.interface, observation, goal), reward)
        observation, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    if frames is not None:
        frames.append(small(env.render()))
    return total, observations


# --- The picture ---------------------------------------------------------------------------------------


def small(frame) -> Image.Image:
    """With a palette of its own: a frame in full colour and size would need ten times the memory."""
    image = Image.fromarray(np.asarray(frame, np.uint8))
    image.thumbnail((WIDTH, WIDTH))
    return image.quantize(128)


def gif(frames: list[Image.Image]) -> bytes:
    file = io.BytesIO()
    settings = {"duration": round(1000 / FRAMES_PER_SECOND), "loop": 0}
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], **settings)
    return file.getvalue()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
