"""Environments for the tests, in a module that is quick to import: worker processes make them."""

import os
import pickle
import sys
import threading
import time

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

LABELS = spaces.Box(-np.inf, np.inf, (2,), np.float64)
OBSERVATIONS = {
    "labels": LABELS,
    "dict": spaces.Dict(
        {"z": spaces.Discrete(3, start=-1), "a": spaces.Dict({"y": LABELS, "x": spaces.Box(-1, 1, ())})}
    ),
    "discrete": spaces.Discrete(4, start=2),
}


class Echo(gymnasium.Env):
    """Starts at a number drawn from its seed, ends after 3 to 6 steps, pays start + 0.1 sum(action) per step.

    What it shows and is given is appended to the file that ECHO_LOG names: ("reset", observation), ("step", action).
    """

    def __init__(
        self, observation="labels", low=0.0, high=2048.0, num_actions=0, start=0, dtype="float32", endless=False
    ):
        self.observation_space = OBSERVATIONS[observation]
        self.kind, self.endless = observation, endless
        self.action_space = spaces.Box(low, high, (2,), np.dtype(dtype).type)
        if num_actions:
            self.action_space = spaces.Discrete(num_actions, start=start)

    def _observation(self):
        labels = np.array([self.start, self.t])
        if self.kind == "dict":
            return {"a": {"x": np.float32(self.start), "y": labels}, "z": self.t % 3 - 1}
        return 2 + self.t % 4 if self.kind == "discrete" else labels

    def _log(self, *event):
        if path := os.environ.get("ECHO_LOG"):
            with open(path, "ab") as file:
                pickle.dump(event, file)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.t = self.np_random.uniform(), 0
        self.length = np.inf if self.endless else 3 + int(self.np_random.integers(4))
        self._log("reset", self._observation())
        return self._observation(), {}

    def step(self, action):
        assert self.t < self.length, "stepped after its end"
        self._log("step", action)
        self.t += 1
        return self._observation(), self.start + 0.1 * float(np.sum(action)), self.t == self.length, False, {}


class Clock(gymnasium.Env):
    """Shows (t, number of the episode), starts counting at 0, pays `rewards[t]` (the last again and again) and ends
    as its arguments say. `Clock("fault", at)` does what FAULTS has for that name at step `at` of episode `of`."""

    def __init__(self, fault=None, at=1, of=2, rewards=(1.0,), terminate=None, truncate=None, render_mode=None):
        self.observation_space, self.action_space = LABELS, spaces.Box(-1, 1, (2,))
        if render_mode:
            sys.exit("no display")
        self.fault, self.at, self.of, self.rewards = FAULTS.get(fault, FAULTS[None]), at, of, rewards
        self.terminate, self.truncate, self.episodes = terminate, truncate, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episodes = 0, self.episodes + 1
        return self._fault(np.array([0.0, self.episodes]), {})

    def step(self, action):
        self.t += 1
        reward = self.rewards[min(self.t, len(self.rewards)) - 1]
        obs = np.array([self.t, self.episodes], float)
        return self._fault(obs, reward, self.t == self.terminate, self.t == self.truncate, {})

    def _fault(self, *answer):
        return self.fault(*answer) if (self.t, self.episodes) == (self.at, self.of) else answer


class Sayer(Clock):
    """Pays its process' number: that of the worker."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, float(os.getpid()), *rest


def raises(error):
    raise error


def _abort(*answer):
    os.abort()


FAULTS = {
    None: lambda *answer: answer,
    "raises": lambda *answer: raises(RuntimeError("the simulator\nhas lost its licence.")),
    "asserts": lambda *answer: raises(AssertionError),
    "interrupts": lambda *answer: raises(KeyboardInterrupt),
    "sys.exit": lambda *answer: sys.exit(),
    "os._exit": lambda *answer: os._exit(0),
    "abort": _abort,
    "kill": lambda *answer: os.kill(os.getpid(), 9),
    "four": lambda obs, reward, terminated, truncated, info: (obs, reward, terminated, info),
    "reset": lambda obs, info: obs[:1],
    "shape": lambda obs, *rest: (obs[:1], *rest),
    "matrix": lambda obs, *rest: (obs[None], *rest),
    "nan observation": lambda obs, *rest: (obs * np.nan, *rest),
    "no observation": lambda obs, *rest: (None, *rest),
    "nan": lambda obs, reward, *rest: (obs, float("nan"), *rest),
    "inf": lambda obs, reward, *rest: (obs, np.inf, *rest),
    "none": lambda obs, reward, *rest: (obs, None, *rest),
    "two rewards": lambda obs, reward, *rest: (obs, np.ones(2), *rest),
    "word": lambda obs, reward, *rest: (obs, "much", *rest),
    "array": lambda obs, reward, *rest: (obs, np.array([reward]), *rest),
    "matrix of one": lambda obs, reward, *rest: (obs, np.array([[reward]], np.float32), *rest),
    "array end": lambda obs, reward, terminated, *rest: (obs, reward, np.array([terminated]), *rest),
    "thread": lambda *answer: threading.Thread(target=time.sleep, args=(600,)).start() or answer,
    "sleep": lambda *answer: time.sleep(3600),
    "modules": lambda *answer: raises(RuntimeError(f"JAX is imported: {'jax' in sys.modules}")),
}


def cannot_be_made():
    raise RuntimeError("no display")


gymnasium.register("stitch-test/Echo-v0", entry_point=f"{__name__}:Echo", max_episode_steps=5)
gymnasium.register("stitch-test/EchoWithoutLimit-v0", entry_point=f"{__name__}:Echo")
gymnasium.register("stitch-test/Clock-v0", entry_point=f"{__name__}:Clock", max_episode_steps=4)
gymnasium.register("stitch-test/ClockWithoutLimit-v0", entry_point=f"{__name__}:Clock")
gymnasium.register("stitch-test/Sayer-v0", entry_point=f"{__name__}:Sayer", max_episode_steps=4)


class Chain(gymnasium.Env):
    """Has a model: from state 1 or 2 (probabilities 1/4, 3/4), action 1 pays 1 and leads to the end, 0 stays."""

    def __init__(self):
        self.observation_space, self.action_space = spaces.Discrete(3), spaces.Discrete(2)
        stay, move, reward = np.eye(3), np.eye(3)[[0, 0, 0]], np.zeros((3, 2, 3))
        reward[1:, 1] = 1.0
        self.dynamics = {"tx_mat": np.stack([stay, move], axis=1), "r_mat": reward, "d_0": np.array([0, 0.25, 0.75])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 1, {}

    def step(self, action):
        return 1, 0.0, False, False, {}


gymnasium.register("stitch-test/Chain-v0", entry_point=f"{__name__}:Chain", max_episode_steps=2)


class Reach(gymnasium.Env):
    """A point at (x, 7) and a goal there, reached within 0.1 of x: 1 is paid and the episode ends. Actions add to x.

    Where it draws its start, its goal and a gust at each step from is what OGBench's environments do: NumPy's global
    generator, the action space, and a space that is made anew. `options`: {"task_id": n} (goal: n) or {"goal": [x, 7]},
    an array. It is a Box and says its goal as OGBench's do, or a Dict as gymnasium-robotics' are.
    """

    def __init__(self, form="box", gust=0.0, silent=False):
        self.form, self.gust, self.silent = form, gust, silent
        self.observation_space, self.action_space = LABELS, spaces.Box(-1, 1, (1,))
        if form == "dict":
            parts = {"observation": spaces.Box(-np.inf, np.inf, (1,), np.float64), "achieved_goal": LABELS}
            self.observation_space = spaces.Dict(parts | {"desired_goal": LABELS})

    def _observation(self):
        if self.form == "box":
            return self.at.copy()
        return {"observation": np.array([self.t]), "achieved_goal": self.at.copy(), "desired_goal": self.goal.copy()}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, options = 0.0, options or {}
        self.at = np.array([np.random.uniform() + self.action_space.sample()[0], 7.0])
        self.goal = np.array([options.get("task_id", 0) + spaces.Box(0, 0.5).sample().item(), 7.0])
        if "goal" in options:
            assert isinstance(options["goal"], np.ndarray)
            self.goal = options["goal"].astype(float)
        return self._observation(), {} if self.silent or self.form == "dict" else {"goal": self.goal.copy()}

    def step(self, action):
        self.t += 1
        self.at[0] += action[0] + self.gust * np.random.normal()
        reached = abs(self.at[0] - self.goal[0]) < 0.1
        return self._observation(), float(reached), bool(reached), False, {}


gymnasium.register("stitch-test/Reach-v0", entry_point=f"{__name__}:Reach", max_episode_steps=6)


class Put(gymnasium.Wrapper, RecordConstructorArgs):
    """Puts an ant of gymnasium-robotics' mazes at its goal before step `arrive`, and back to its start before `leave`.

    No ant here can walk, so that this is how one gets there."""

    def __init__(self, env, arrive, leave):
        RecordConstructorArgs.__init__(self, arrive=arrive, leave=leave)
        gymnasium.Wrapper.__init__(self, env)
        self.arrive, self.leave = arrive, leave

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.t, self.places = 0, {self.arrive: obs["desired_goal"], self.leave: obs["achieved_goal"]}
        return obs, info

    def step(self, action):
        if self.t in self.places:
            ant = self.unwrapped.ant_env
            ant.set_state(np.concatenate([self.places[self.t], ant.init_qpos[2:]]), ant.init_qvel)
        self.t += 1
        return self.env.step(action)
