"""The process in which environments are made and stepped, for common/environments.py.

It imports neither JAX nor the caller's main module: it starts in half a second, from a script without a main guard, a
notebook or standard input too. Whatever an environment does in it is an answer, or the end of this process alone.
"""

import io
import os
import pickle
import signal
import traceback
import warnings
from contextlib import redirect_stderr, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np

from common.recipes import tabular


class EnvironmentFailure(Exception):
    """What an environment did wrong, as a part of a sentence."""


def work(connection):
    """Answers messages (name of a method of Held, arguments) until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    with suppress(EOFError, OSError):
        held = Held(*connection.recv())
        while True:
            name, *arguments = pickle.loads(connection.recv_bytes())
            try:
                answer = getattr(held, name)(*arguments)
            except BaseException as error:  # sys.exit too
                answer = EnvironmentFailure(reason(error))
            connection.send_bytes(pickle.dumps(answer, -1))
    os._exit(0)  # threads of an environment do not outlive the caller


class Held:
    """The environments of a worker: all of one task, that which a dataset's file describes."""

    def __init__(self, env_spec, observation_space, action_space, interface, needed):
        self.env_spec, self.observation_space, self.action_space = env_spec, observation_space, action_space
        self.interface, self.needed, self.envs = interface, [needed] if isinstance(needed, str) else needed, []
        self.spec, self.shape = interface.spec, interface.shape  # the shape of what the policy sees of one environment
        self.goals, self.random = {}, {}  # of the episode in each slot; what NumPy's global generator draws from there

    def make(self):
        import gymnasium
        from gymnasium.envs.registration import EnvSpec, load_env_creator

        if self.env_spec is None:
            raise EnvironmentFailure("the dataset names none, its env_spec is None")
        spec = EnvSpec.from_json(self.env_spec)
        spec.kwargs.pop("render_mode", None)  # windows and videos are no part of the task
        films = "HumanRendering", "RecordVideo"
        spec.additional_wrappers = tuple(wrapper for wrapper in spec.additional_wrappers if wrapper.name not in films)
        absent = ImportError, AttributeError, gymnasium.error.DependencyNotInstalled, gymnasium.error.UnregisteredEnv
        try:
            with warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO()):  # notes on versions
                load_env_creator(spec.entry_point)
                return gymnasium.make(spec, disable_env_checker=True)
        except absent as error:
            own = "or, where it is code of your own, keep it in a module and put the module's folder on PYTHONPATH"
            raise EnvironmentFailure(f"{reason(error)}: install {', '.join(self.needed)}, {own}") from error

    def probe(self, task):
        """(time limit or None, tabular model or None) of the environment, if it is the dataset's."""
        self.envs.append(self.make())
        env = self.envs[0]
        for name in ("action", "observation"):
            its, ours = getattr(env, f"{name}_space"), getattr(self, f"{name}_space")
            if not _alike(its, ours, bounds=name == "action"):
                raise EnvironmentFailure(f"its {name}s are {one_line(its)}, the dataset's {one_line(ours)}")
        self.reset([0], [(0, task)])
        self.step([0], self.interface.to_env(np.zeros((1, *self.action_space.shape))))
        return getattr(env.spec, "max_episode_steps", None), tabular.model_of(env)

    def reset(self, slots, starts):
        """Begins an episode, (seed, task), in the environments in `slots`, made if need be: what the policy sees."""
        while len(self.envs) <= max(slots):
            twin = tabular.twin(self.envs[0]) if self.envs else None
            self.envs.append(self.make() if twin is None else twin)
        observations = []
        for slot, (seed, task) in zip(slots, starts, strict=True):
            self.random[slot] = np.random.MT19937()
            np.random.set_bit_generator(self.random[slot])
            observation, self.goals[slot] = begin(self.envs[slot], seed, task)
            observations.append(observation)
        return self.observe(slots, observations)

    def step(self, slots, actions):
        """Steps the environments in `slots` (n,): what the policy sees, rewards (n,), and (n,) whether the task ended
        the episode, and whether that or a time limit did."""
        observations, rewards, terminal, ended = [], *np.zeros((3, len(slots)))
        for i, action in enumerate(actions.tolist() if "n" in self.interface.action else actions):
            slot = slots[i]
            np.random.set_bit_generator(self.random[slot])  # else episodes side by side would draw from one sequence
            observation, reward, terminated, truncated, _ = self.envs[slot].step(action)
            observations.append(observation)
            if np.size(reward) != 1 or not np.isfinite(reward := np.asarray(reward, np.float64).item()):
                raise EnvironmentFailure(f"its reward is {one_line(reward)}, not one finite number")
            rewards[i], terminal[i], ended[i] = reward, bool(terminated), bool(terminated) or bool(truncated)
        return self.observe(slots, observations), rewards, terminal.astype(bool), ended.astype(bool)

    def observe(self, slots, observations):
        """What the policy sees of the environments in `slots`, (n, obs_dim + goal_dim), or an image of each."""
        goals = [self.goals[slot] for slot in slots]
        with suppress(Exception):  # all at once, which costs little more than one
            given = [with_goal(self.interface, *pair) for pair in zip(observations, goals, strict=True)]
            obs = self.interface.observe(stacked(given))
            if obs.shape == (len(slots), *self.shape) and np.isfinite(obs).all():
                return obs
        return np.stack([self.observe_one(*pair) for pair in zip(observations, goals, strict=True)])  # says which

    def observe_one(self, observation, goal):
        if self.spec.goal_dim and goal is None and not isinstance(observation, dict):
            raise EnvironmentFailure('its reset gives no goal, which is looked for in info["goal"]')
        obs = self.interface.observe(with_goal(self.interface, observation, goal))
        if obs.shape != self.shape or not np.isfinite(obs).all():
            length = np.prod(self.shape)
            raise EnvironmentFailure(f"its observation is {one_line(observation)}, not {length} finite numbers")
        return obs


def begin(env, seed, task=None):
    """Begins an episode: (observation, its goal or None). What follows depends on the seed and the actions alone.

    Some environments draw from NumPy's global generator (OGBench's mazes their starts, goals and teleports), from their
    action space, or from a space made anew, which seeds itself: all of these get this seed. `task` are options of
    reset, whose lists become arrays.
    """
    from gymnasium.utils import seeding

    np.random.seed(seed)
    env.action_space.seed(seed)
    options = task and {key: np.array(x) if isinstance(x, list) else x for key, x in task.items()}
    given = seeding.np_random
    seeded = lambda seed=None: given(int(np.random.randint(2**31)) if seed is None else seed)  # noqa: E731
    with patch.object(seeding, "np_random", seeded):
        observation, info = env.reset(seed=seed, options=options)
    return observation, info.get("goal")


def stacked(observations):
    if isinstance(observations[0], dict):
        return {key: stacked([observation[key] for observation in observations]) for key in observations[0]}
    return np.stack(observations)


def with_goal(interface, observation, goal):
    """An environment's observation as `Interface.observe` takes it."""
    apart = interface.goal is not None and "dict" not in interface.observation
    return {"observation": observation, "goal": goal} if apart else observation


def _alike(its, ours, bounds):
    """Whether two spaces mean the same numbers. Without `bounds`, these may differ where one of them has none."""
    from gymnasium import spaces

    if type(its) is not type(ours):
        return False
    if isinstance(ours, spaces.Dict):
        return its.keys() == ours.keys() and all(_alike(its[key], ours[key], bounds) for key in ours.keys())
    if isinstance(ours, spaces.Discrete):
        return (its.n, its.start) == (ours.n, ours.start)
    if its.shape != ours.shape or its.dtype.kind != ours.dtype.kind:
        return False
    pairs = (its.low, ours.low), (its.high, ours.high)
    return all(np.all(np.isclose(a, b) | (not bounds and np.maximum(abs(a), abs(b)) > 1e30)) for a, b in pairs)


def reason(error):
    """What went wrong and where, for a sentence."""
    if isinstance(error, EnvironmentFailure):
        return str(error)
    *_, frame = traceback.extract_tb(error.__traceback__)
    if isinstance(error, AssertionError) and frame.filename.endswith("mujoco_utils.py"):
        return "gymnasium-robotics does not work with this version of mujoco: pip install 'mujoco<3.12'"
    return f"{one_line(error)}, in {Path(frame.filename).name}, line {frame.lineno}: `{frame.line}`"


def one_line(x):
    """An error or a space, for a sentence."""
    text = f"{type(x).__name__}: {x}".removesuffix(": ") if isinstance(x, BaseException) else str(x)
    return " ".join(text.split())[:300]
