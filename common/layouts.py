"""Observations and actions as flat vectors: which spaces can be, how they are laid out, as JSON, and where a goal is.

Goals come in two forms. Of gymnasium-robotics a Dict has "achieved_goal", what is reached, and "desired_goal", what
shall be. The latter is then no part of the observation: a policy would read from it where the recording went. Of
OGBench the observation is a Box, any observation may be a goal, and that of an episode is info["goal"] of its reset.
"""

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
        return None if None in parts.values() else {"dict": parts}
    if isinstance(space, spaces.Discrete):
        return {"n": int(space.n), "start": int(space.start)}
    return list(space.shape) if isinstance(space, spaces.Box) and len(space.shape) <= 1 else None


def width(layout):
    """The length of an observation once it is flat."""
    if isinstance(layout, list):
        return int(np.prod(layout))
    return layout["n"] if "n" in layout else sum(map(width, layout["dict"].values()))


def flatten(layout, x):
    """Observations (...) as an environment or Minari gives them -> (..., width) float32."""
    if isinstance(layout, list):
        x = np.asarray(x, np.float32)
        return x.reshape(*x.shape[: x.ndim - len(layout)], width(layout))
    if "n" in layout:
        return (index(layout, x)[..., None] == np.arange(layout["n"])).astype(np.float32)  # one-hot
    return np.concatenate([flatten(inner, x[key]) for key, inner in sorted(layout["dict"].items())], axis=-1)


def index(layout, x):
    """Elements of a Discrete space, whose first may be any integer, counted from 0."""
    i = np.asarray(x).astype(np.int64) - layout["start"]
    if not np.all((i >= 0) & (i < layout["n"])):
        raise ValueError(f"{np.min(x)} or {np.max(x)} is not in Discrete({layout['n']}, start={layout['start']})")
    return i


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
    "no vector": (f"{FLAT}, or of features of an image", FLAT),
    "no floats": ("", "make floats of them, x.astype(np.float32), or declare a Discrete where they number choices"),
    "no bounds": ("", "declare the bounds of what was recorded, Box(x.min(axis=0), x.max(axis=0))"),
}


def describe(observation_space, action_space):
    """(observation, action) of an Interface: what it must know of the two spaces, as JSON."""
    from gymnasium import spaces

    for part in _parts(observation_space):
        if layout(part) is None or width(layout(part)) == 0:
            raise _unsupported("Observations must be a Box vector, a Discrete or a Dict of these", part, 0)
    observation = layout(observation_space)
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
