"""Observations and actions as networks take them: which spaces can be, how they are laid out, as JSON, where a goal is,
and the Interface, which takes them from an environment and back.

    policy.interface.observe(observation)                # raw, or a batch of them -> flat, normalised, for networks
    policy.interface.to_env(action)                      # [-1, 1] or 0 .. n - 1 -> the environment's own units

An Interface is a few numbers, in config.json of every run: with it a trained policy acts without the dataset.

An image stays what it is: (H, W, C) whole numbers in a byte each. Where a policy sees several of an episode at once, a
stack, they are joined along their channels, (H, W, k C), the oldest first. Atari's own images alone are made small and
grey, in the data and in the environment by the same function, `grey`.

Goals come in two forms. Of gymnasium-robotics a Dict has "achieved_goal", what is reached, and "desired_goal", what
shall be. The latter is then no part of the observation: a policy would read from it where the recording went. Of
OGBench the observation is a Box, any observation may be a goal, and that of an episode is info["goal"] of its reset.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.recipes.worker import one_line

UNBOUNDED = 1e30  # a Box with bounds beyond it, as float32's own limits are, has none


class DatasetError(SystemExit):
    """One sentence for the user. As a SystemExit, it ends a script with that sentence and status 1, no traceback."""


def layout(space):
    """What `flatten` must know of an observation space, as JSON; None where the space is not supported."""
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        parts = {key: layout(space[key]) for key in sorted(space.keys())}
        return None if any(part is None or "image" in part for part in parts.values()) else {"dict": parts}
    if isinstance(space, spaces.Discrete):
        return {"n": int(space.n), "start": int(space.start)}
    if _is_image(space):
        return {"image": list(space.shape), "high": int(np.max(space.high))}
    return list(space.shape) if isinstance(space, spaces.Box) and len(space.shape) <= 1 else None


def width(layout):
    """The length of an observation once it is flat."""
    if isinstance(layout, list):
        return int(np.prod(layout))
    if "image" in layout:
        return int(np.prod(stack_shape(layout)))
    return layout["n"] if "n" in layout else sum(map(width, layout["dict"].values()))


def flatten(layout, x):
    """Observations (...) of an environment or of Minari -> (..., width) float32, or images (..., H, W, C) uint8."""
    if isinstance(layout, list):
        x = np.asarray(x, np.float32)
        return x.reshape(*x.shape[: x.ndim - len(layout)], width(layout))
    if "image" in layout:
        x, shape = np.asarray(x), layout["image"]
        if x.dtype.kind not in "bu" or list(x.shape[x.ndim - len(shape) :]) != shape or np.any(x > layout["high"]):
            kind, high = f"{x.dtype} {x.shape}", layout["high"]
            raise ValueError(f"an image must hold whole numbers from 0 to {high} as uint8 {tuple(shape)}, not {kind}")
        x = grey(x, layout["grey"]) if "grey" in layout else x.astype(np.uint8)
        return x.reshape(*x.shape[: x.ndim - len(shape)], *image_shape(layout))
    if "n" in layout:
        return (index(layout, x)[..., None] == np.arange(layout["n"])).astype(np.float32)  # one-hot
    return np.concatenate([flatten(inner, x[key]) for key, inner in sorted(layout["dict"].items())], axis=-1)


def index(layout, x):
    """Elements of a Discrete space, whose first may be any integer, counted from 0."""
    i = np.asarray(x).astype(np.int64) - layout["start"]
    if not np.all((i >= 0) & (i < layout["n"])):
        raise ValueError(f"{np.min(x)} or {np.max(x)} is not in Discrete({layout['n']}, start={layout['start']})")
    return i


# --- Images --------------------------------------------------------------------------------------------


def _is_image(space):
    """Whether a space is (H, W) or (H, W, C) bytes from 0 on, with fewer channels than rows and columns."""
    if type(space).__name__ != "Box" or space.dtype not in (np.uint8, bool) or len(space.shape) not in (2, 3):
        return False
    height, width, channels = (*space.shape, 1)[:3]
    flat = np.all(space.low == 0) and np.all(space.high == space.high.flat[0]) and space.high.flat[0] > 0
    return bool(flat) and 0 < channels <= min(height, width)


def image_shape(layout):
    """(H, W, C) of one image; C is 1 where the space says (H, W), and where `grey` makes it."""
    return (*layout.get("grey", layout["image"]), 1)[:3]


def stack_shape(layout):
    """(H, W, k C): of what a policy sees."""
    height, width, channels = image_shape(layout)
    return height, width, layout.get("frames", 1) * channels


ATARI = {"frames": 4, "padding": "repeat"}  # what the policies of Minari's atari/* saw: four, the first repeated


def grey(images, shape):
    """Colour images (..., H, W, 3) uint8 -> grey ones (..., *shape, 1) uint8 of another height and width: a mean over
    the area of each new pixel. Gymnasium's ResizeObservation and then GrayscaleObservation make the same of them, but
    for rounding.
    """
    flat = images.reshape(-1, *images.shape[-3:])
    small = np.empty((len(flat), *shape, 1), np.uint8)
    for i, image in enumerate(flat):  # one at a time: as floats, an episode would need eight times its memory
        light = image @ np.array([0.2125, 0.7154, 0.0721])  # (H, W)
        small[i, ..., 0] = np.rint(_means(_means(light, shape[1]).T, shape[0]).T)
    return small.reshape(*images.shape[:-3], *small.shape[1:])


def _means(x, new):
    """(n, old) -> (n, new): the means of x as a step function over `new` equal parts of its length."""
    old = x.shape[1]
    edges = np.arange(new + 1) * old / new
    last = np.minimum(edges.astype(int), old - 1)  # the pixel in which each part begins, of which some is before it
    up_to = np.cumsum(x, axis=1)[:, last] - (last + 1 - edges) * x[:, last]
    return np.diff(up_to, axis=1) * new / old


def fold(x):
    """Images one after another (..., k, H, W, C), NumPy's or JAX's -> a stack (..., H, W, k C)."""
    x = x.swapaxes(-4, -3).swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def windows(lengths, frames, padding):
    """The images that each row sees: (n, frames + 1) int32, of which obs is the first `frames`, next_obs the last ones.

    Images are numbered through all episodes, of which number e has lengths[e] + 1: the last is next_obs's alone. Before
    the first of an episode it stands there again ("repeat"), or the one after the last of all, which is black ("zero").
    """
    episode = np.repeat(np.arange(len(lengths)), lengths)
    now = np.arange(len(episode)) + episode
    first = now[np.cumsum(lengths) - lengths][episode][:, None]
    window = now[:, None] + np.arange(1 - frames, 2)[None]
    before = first if padding == "repeat" else len(episode) + len(lengths)
    return np.where(window < first, before, window).astype(np.int32)


def with_stack(layout, frame_stack):
    """The layout of images, with what metadata say of stacks: {"frames": k, "padding": "repeat" or "zero"}."""
    right = isinstance(frame_stack, dict) and frame_stack.keys() == {"frames", "padding"}
    if not (
        right and type(k := frame_stack["frames"]) is int and k > 0 and frame_stack["padding"] in ("repeat", "zero")
    ):
        raise DatasetError(
            'frame_stack in metadata.json must be like {"frames": 4, "padding": "zero"} (black images before the first '
            f'of an episode; "repeat": that one again), not {one_line(frame_stack)}: mend it or leave it out.'
        )
    return {**layout, **frame_stack}


# --- Memory --------------------------------------------------------------------------------------------


def sizes(observation, action, steps, episodes, columns=()):
    """Of a dataset with these layouts and optional columns: (bytes of its arrays, bytes in use while it is read)."""
    action_dim = 1 if "n" in action else len(action["low"])
    rows = 4 * steps * (action_dim + 2 + sum(action_dim if name == "next_action" else 1 for name in columns))
    if "image" in observation:  # a byte for each number, in memory twice: as read, and as frames
        images = (steps + episodes + (observation["padding"] == "zero")) * int(np.prod(image_shape(observation)))
        return rows + images + 4 * steps * (observation["frames"] + 1), 2 * images
    obs_dim = width(observation)  # four times: as read, as obs, as next_obs and, of these, while it is copied
    return rows + 8 * steps * obs_dim, 16 * steps * (obs_dim + action_dim + 5)


def check_memory(dataset_id, spaces, steps, episodes, columns, on_device):
    """Ends with one sentence where a dataset is too large for the machine or, `on_device`, for JAX's device."""
    rows, reading = sizes(*spaces, steps, episodes, columns)
    if reading > (free := _free_memory()):
        raise too_large(dataset_id, spaces, steps, episodes, f"{free / 2**30:.1f} GiB are free")
    if on_device and rows > 2**30:  # to ask starts JAX, which takes most of a GPU's memory; each device has so much
        import jax

        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", np.inf)  # a CPU's, which is the machine's, is not told
        if rows > limit:
            stacks = ", or each image once where it has stacks (frame_stack in metadata.json)" * ("image" in spaces[0])
            raise DatasetError(
                f"{dataset_id} needs {rows / 2**30:.1f} GiB on each device, where all seeds share its {steps:,} rows, "
                f"and JAX may use {limit / 2**30:.1f} GiB of {device.device_kind}: use a device with more memory, or "
                f"write fewer episodes{stacks}."
            )


def too_large(dataset_id, spaces, steps, episodes, there="less is free"):
    """The sentence where the machine has too little memory."""
    size, numbers = sizes(*spaces, steps, episodes)[1], width(spaces[0])
    return DatasetError(
        f"{dataset_id} needs about {size / 2**30:.1f} GiB of memory ({steps:,} steps with observations of {numbers:,} "
        f"numbers), and {there}: free some, use a larger machine, or record fewer steps or numbers."
    )


def _free_memory():
    """Bytes that programs can still have, infinite where the system does not tell. Linux does."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [int(line.split()[1]) for line in lines if line.startswith(("MemAvailable:", "SwapFree:"))]
        return 1024 * sum(free) or np.inf
    return np.inf


# --- Goals ---------------------------------------------------------------------------------------------


def split_goal(layout):
    """Of the layout of whole observations: (the layout without the goal, that of a goal, the columns (obs_dim,) of the
    flat whole that remain, the columns (goal_dim,) of these which say what goal is reached)."""
    if isinstance(layout, list):
        return layout, layout, np.arange(width(layout)), np.arange(width(layout))
    parts = dict(layout.get("dict", {}))
    goal = parts.pop("desired_goal", None)
    if goal is None or goal != parts.get("achieved_goal"):
        raise DatasetError(
            "A policy of goals needs observations in a Box, any of which is a goal, or in a Dict with achieved_goal "
            "and desired_goal of the same shape, and these are others: write the dataset again so, or choose another."
        )
    names = np.array([key for key in sorted(layout["dict"]) for _ in range(width(layout["dict"][key]))])
    remain = np.flatnonzero(names != "desired_goal")
    return {"dict": parts}, goal, remain, np.flatnonzero(names[remain] == "achieved_goal")


def flatten_with_goal(layout, goal, x):
    """Observations with their goals -> (..., obs_dim + goal_dim) float32, by the layouts of the two.

    x: where observations are a Box, {"observation": them, "goal": others}; else the Dict, with its desired_goal.
    """
    names = {"desired_goal"} if "dict" in layout else {"observation", "goal"}
    if not (isinstance(x, dict) and names <= x.keys()):
        raise ValueError(f"a policy of goals needs a dict with {' and '.join(sorted(names))}, not {one_line(x)}")
    own, its_goal = (x, x["desired_goal"]) if "dict" in layout else (x["observation"], x["goal"])
    return np.concatenate([flatten(layout, own), flatten(goal, its_goal)], axis=-1)


# --- What is supported --------------------------------------------------------------------------------

JOIN = "join its parts to one vector, np.concatenate(parts, axis=-1), and declare a Box of it"
FLAT = "make vectors of them, x.reshape(len(x), -1), and declare a Box of that shape"
CONVERSIONS = {  # what is not supported: what to make of it as an observation, and as an action
    "MultiDiscrete": (
        "make floats of it, x.astype(np.float32), and declare a Box of them",
        "number its combinations, np.ravel_multi_index(x.T, nvec), and declare a Discrete(nvec.prod())",
    ),
    "MultiBinary": (
        "make floats of it, x.astype(np.float32), and declare a Box(0, 1, (n,))",
        "number its combinations, x @ 2 ** np.arange(n), and declare a Discrete(2 ** n)",
    ),
    "Tuple": ("make a Dict of it, with a name for each part", JOIN),
    "Dict": ("", JOIN),
    "no vector": (f"{FLAT}, or, of an image, store np.uint8 from 0 on as (H, W, C), the channels last", FLAT),
    "no floats": ("", "make floats of them, x.astype(np.float32), or declare a Discrete where they number choices"),
    "no bounds": ("", "declare the bounds of what was recorded, Box(x.min(axis=0), x.max(axis=0))"),
}


def describe(observation_space, action_space, frame_stack=None, atari=False):
    """(observation, action) of an Interface: what it must know of the two spaces, as JSON. See with_stack.

    atari: whether images are Atari's, as Minari records them: large and in colours, and no stacks.
    """
    from gymnasium import spaces

    for part in _parts(observation_space):
        if layout(part) is None or width(layout(part)) == 0 or (_is_image(part) and part is not observation_space):
            raise _unsupported("Observations must be a Box vector, a Discrete, a Dict of these, or an image", part, 0)
    observation = layout(observation_space)
    if _is_image(observation_space):
        usual = ATARI if atari else {"frames": 1, "padding": "repeat"}
        observation |= {"grey": [84, 84]} if atari and observation["image"][2:] == [3] else {}
        observation = with_stack(observation, usual if frame_stack is None else frame_stack)
    elif frame_stack is not None:
        raise DatasetError(
            "frame_stack in metadata.json is for images, and these observations are vectors: leave it out, and, if the "
            "policy shall see several steps at once, store them as one vector, np.concatenate(steps, axis=-1)."
        )
    if isinstance(action_space, spaces.Discrete):
        return observation, {"n": int(action_space.n), "start": int(action_space.start)}
    if _lacks(action_space):
        raise _unsupported("Actions must be Discrete or a bounded, one-dimensional Box of floats", action_space, 1)
    low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
    return observation, {"low": low.tolist(), "high": high.tolist(), "dtype": str(action_space.dtype)}


def _parts(space):
    """The spaces in a Dict, or an empty Dict itself."""
    parts = list(space.values()) if type(space).__name__ == "Dict" else []
    return [inner for part in parts for inner in _parts(part)] or [space]


def _lacks(space):
    """What a space lacks to be a bounded vector of floats: a key of CONVERSIONS, or another space's name."""
    if type(space).__name__ != "Box":
        return type(space).__name__
    bounds = np.abs([space.low, space.high]).astype(np.float64)
    lacks = {
        "no numbers": bounds.size == 0,
        "no vector": len(space.shape) != 1,
        "no floats": not np.issubdtype(space.dtype, np.floating),
        "no bounds": not (bounds < UNBOUNDED).all(),
    }
    return next((name for name, lacking in lacks.items() if lacking), None)


def _unsupported(rule, space, of):
    how = CONVERSIONS.get(_lacks(space), ("", ""))[of] or "leave it out, or make numbers of it and declare a Box"
    return DatasetError(f"{rule}, and {one_line(space)} is not: write the dataset again, and {how}.")


# --- Between an environment and a network ----------------------------------------------------------------


class Spec(NamedTuple):
    """What an algorithm must know of its dataset to build its networks."""

    obs_dim: int
    action_dim: int  # length of the action vector, or the number of discrete actions
    discrete: bool = False
    goal_dim: int = 0  # length of the goal that follows an observation handed to the policy; 0: no goals
    terminal_of: Callable | None = None  # un-normalised next_obs (..., obs_dim) -> whether it ends an episode, if known
    obs_shape: tuple[int, ...] = ()  # of images, (H, W, k C) uint8: k of them, the oldest first; (): they are vectors
    obs_high: int = 255  # the largest number in an image

    def zeros(self, *lead):
        """Observations (*lead, obs_dim), or images, of the type that networks get; no goal follows them."""
        return np.zeros((*lead, *(self.obs_shape or (self.obs_dim,))), np.uint8 if self.obs_shape else np.float32)


class Interface(NamedTuple):
    """How observations reach the networks, and actions the environment. `Interface(*x)` of its JSON is itself again."""

    # Layout: a Box's shape [4], a Discrete's {"n": 5, "start": 0}, a Dict's {"dict": {key: ...}}, or of images
    # {"image": [84, 84], "high": 255, "frames": 4, "padding": "zero" or "repeat"}, and "grey": [84, 84] if made so
    observation: Any
    action: Any  # {"n", "start"}, or of a Box {"low", "high", "dtype"}
    obs_mean: list  # (obs_dim + goal_dim,) of the rows' observations and the goals in them, or zeros; images: []
    obs_scale: list
    termination: Any = None  # (closed, ranges) of `ends`, as TERMINATIONS has them; None: not known
    goal: Any = None  # layout of the goal, which is then no part of `observation`; None: there is none

    @property
    def spec(self) -> Spec:
        discrete, known = "n" in self.action, self.termination is not None
        action_dim = self.action["n"] if discrete else len(self.action["low"])
        terminal_of = partial(ends, *self.termination) if known else None
        goal_dim = 0 if self.goal is None else width(self.goal)
        image = (stack_shape(self.observation), self.observation["high"]) if self.of_images else ()
        return Spec(width(self.observation), action_dim, discrete, goal_dim, terminal_of, *image)

    @property
    def of_images(self):
        return "image" in self.observation

    @property
    def shape(self):
        """Of what `observe` makes of one observation."""
        return image_shape(self.observation) if self.of_images else (self.spec.obs_dim + self.spec.goal_dim,)

    def observe(self, observation):
        """Raw observations (...) -> (..., obs_dim + goal_dim) float32, flat and normalised. Where there are goals, they
        are Dicts with a desired_goal or, of a Box, {"observation": observations, "goal": other ones}. Images:
        (..., H, W, C) uint8; `stack` makes of them what the networks see."""
        if self.of_images:
            return flatten(self.observation, observation)
        if self.goal is None:
            obs = flatten(self.observation, observation)
        else:
            obs = flatten_with_goal(self.observation, self.goal, observation)
        return (obs - np.array(self.obs_mean, np.float32)) / np.array(self.obs_scale, np.float32)

    def stack(self, observed, before=None):
        """What networks see once `observe` has given `observed` (...): of images, the last k of the episode.

        before: what this function gave at the step before; None where an episode begins.
        """
        if not self.of_images:
            return observed
        if before is None:
            first = observed if self.observation["padding"] == "repeat" else np.zeros_like(observed)
            before = np.concatenate([first] * self.observation["frames"], axis=-1)
        return np.concatenate([before[..., observed.shape[-1] :], observed], axis=-1)

    def act(self, act, observation, reward=None, episode=None):
        """A policy's action at what an environment gives, one observation or a batch, and the episode so far.

        act: (obs (1, n, obs_dim), step, memory, last rewards (1, n)) -> (actions (1, n, ...), memory). `reward` is that
        of the step before, None where an episode begins (policies without a memory, of vectors or single images, need
        none); `episode` is what the call before gave. Returns (action in the environment's own units, episode).
        """
        step, memory, before = episode or (0, None, None)
        obs = self.stack(self.observe(observation), None if reward is None else before)
        lead = obs.shape[: obs.ndim - len(self.shape)]
        rows = obs.reshape(1, -1, *obs.shape[len(lead) :])
        rewards = np.zeros(rows.shape[:2]) + (0 if reward is None else np.ravel(reward))
        action, memory = act(rows, step, None if reward is None else memory, rewards.astype(np.float32))
        action = np.asarray(action)[0]
        action = self.to_env(action.reshape(lead + action.shape[1:]))
        return action[()], (step + 1, memory, obs)  # a number, not an array of shape ()

    def to_env(self, action):
        """Actions (..., action_dim) in [-1, 1], or (...) indices -> the environment's."""
        if "n" in self.action:
            return np.asarray(action).astype(np.int64) + self.action["start"]
        low, high = self.bounds
        middle, half = (low + high) / 2, (high - low) / 2
        # Clipped again: in float32, middle + half may lie beyond the bound
        action = (middle + half * np.asarray(action, np.float64)).astype(self.action["dtype"])
        return np.clip(action, low.astype(action.dtype), high.astype(action.dtype))

    def from_env(self, action):
        """The environment's actions of a Box, scaled to [-1, 1] and clipped to it."""
        low, high = self.bounds
        middle, half = (low + high) / 2, (high - low) / 2
        return np.clip((action - middle) / np.where(half > 0, half, 1), -1, 1).astype(np.float32)

    @property
    def bounds(self):  # in float64, so that half of it neither overflows nor makes -1 .. 1 anything but itself
        return np.array(self.action["low"], np.float64), np.array(self.action["high"], np.float64)


def ends(closed, ranges, next_obs):
    """Whether un-normalised next observations (..., obs_dim), NumPy's or JAX's, end an episode: (...) bool."""
    ended = np.zeros(next_obs.shape[:-1], bool)
    for _, first, stop, low, high in ranges:
        x, low, high = next_obs[..., first:stop], -np.inf if low is None else low, np.inf if high is None else high
        inside = (low <= x) & (x <= high) if closed else (low < x) & (x < high)
        ended = ended | ~inside.all(-1)
    return ended
