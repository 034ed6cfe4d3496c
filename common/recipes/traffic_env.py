"""The crossing of traffic.py as an environment, with SUMO in a process of its own.

libsumo has one simulation for each process, and an evaluation plays all its episodes side by side. Each process takes
about 80 MB of memory and a second to start: 20 episodes of each of 3 seeds are 60 processes, with 5 GB.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import gymnasium
import numpy as np

from common.recipes.traffic import GREEN, SECONDS, STEPS
from common.recipes.worker import EnvironmentFailure, reason

# --- The environment ----------------------------------------------------------------------------------


def make_env() -> gymnasium.Env:
    """The crossing, with its time limit and with the spec that travels in a dataset's file. It is not registered."""
    return gymnasium.make(
        gymnasium.envs.registration.EnvSpec(
            id="stitch/TrafficSingle-v0",
            entry_point="common.recipes.traffic_env:Crossing",
            max_episode_steps=STEPS,
            disable_env_checker=True,
        )
    )


def missing() -> str | None:
    """What is not installed, and how to install it; None where all is."""
    names = [name for name in ("sumo_rl", "libsumo") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(names)}, which cannot be imported: pip install -e '.[traffic]'" if names else None


class Crossing(gymnasium.Env):
    """The crossing, which a process of its own simulates. Lanes, phases, reward and end are those of traffic.py."""

    observation_space = gymnasium.spaces.Box(0, 1, (21,), np.float32)
    action_space = gymnasium.spaces.Discrete(len(GREEN))
    process = None

    def __init__(self):
        if absent := missing():
            raise EnvironmentFailure(f"it needs {absent}")
        code = f"import sys; sys.path[:] = {sys.path!r}; from common.recipes.traffic_env import serve; serve()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([sys.executable, "-c", code], **pipes)
        self.lanes, self.phases = self.ask("start")

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.ask("reset", int(self.np_random.integers(2**31))), {}  # SUMO's seeds have 31 bits

    def step(self, action):
        obs, reward, truncated = self.ask("step", int(action))
        return obs, reward, False, truncated, {}

    def ask(self, *message):
        try:
            pickle.dump(message, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (EOFError, OSError) as error:
            raise EnvironmentFailure(f"SUMO's process ended with exit code {self.process.wait(10)}") from error
        if isinstance(answer, EnvironmentFailure):
            raise answer
        return answer

    def close(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            try:
                self.process.stdin.close()
            except OSError:  # of a message that was not read
                pass
            self.process.stdout.close()
            self.process = None

    def __del__(self):
        self.close()  # it needs no name of this module, which has none when Python ends


# --- The process --------------------------------------------------------------------------------------


def serve() -> None:
    """The process of a Crossing: answers its messages until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller
    with os.fdopen(os.dup(1), "wb") as out, suppress(EOFError, OSError):
        os.dup2(2, 1)  # SUMO prints, and what it prints is no answer
        simulation = Simulation()
        while True:
            name, *arguments = pickle.load(sys.stdin.buffer)
            try:
                answer = getattr(simulation, name)(*arguments)
            except BaseException as error:  # sys.exit too
                answer = EnvironmentFailure(reason(error))
            pickle.dump(answer, out)
            out.flush()
    os._exit(0)


class Simulation:
    """What the process does: sumo-rl's environment."""

    def start(self):
        """The lanes in the order of the observation, and for each phase the lights of the connections."""
        os.environ["LIBSUMO_AS_TRACI"] = "1"  # read when traci and sumo_rl are imported
        import traci  # sets SUMO_HOME, without which sumo_rl cannot be imported

        if not traci.isLibsumo():
            raise EnvironmentFailure("libsumo is installed and cannot be imported")
        import sumo_rl

        folder = Path(sumo_rl.__file__).parent / "nets" / "2way-single-intersection"
        self.env = sumo_rl.SumoEnvironment(
            net_file=str(folder / "single-intersection.net.xml"),
            route_file=str(folder / "single-intersection-vhvh.rou.xml"),
            single_agent=True,
            num_seconds=STEPS * SECONDS,
            delta_time=SECONDS,
            yellow_time=2,
            min_green=5,
            reward_fn="queue",
            add_system_info=False,
            add_per_agent_info=False,
            sumo_seed=0,
            sumo_warnings=False,
            additional_sumo_cmd="--no-step-log true",
        )
        (lights,) = self.env.traffic_signals.values()
        return tuple(lights.lanes), tuple(phase.state for phase in lights.green_phases)

    def reset(self, seed):
        return self.env.reset(seed=seed)[0]

    def step(self, action):
        obs, reward, _, truncated, _ = self.env.step(action)
        return obs, float(reward) / 100, bool(truncated)
