"""benchmarks/play.py: it plays the run that was asked for, says what it got, and draws it where that is possible."""

import json
import pathlib
import sys
import types

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import play  # noqa: E402


class Counter:
    """Counts its steps; a reward of the action, and an end after `length` steps. Its picture brightens with time."""

    spec, length, drawn, action_space = None, 6, True, spaces.Discrete(4)

    def __init__(self, render_mode=None):
        self.render_mode, self.metadata = render_mode, {"render_fps": 40}

    def reset(self, seed, options=None):
        self.t, self.start, self.task = 0, seed, options
        return np.array([seed, 0]), {"goal": np.array([7, 7])}

    def step(self, action):
        self.t += 1
        return np.array([self.start, self.t]), float(action), self.t == self.length, False, {}

    def render(self):
        if not self.drawn:
            raise RuntimeError("an OpenGL platform library\nhas not been loaded")
        return np.full((480, 640, 3), 40 * self.t, np.uint8)


class Policy:
    """Acts by which run it is; remembers what it was given."""

    step, interface = 900, types.SimpleNamespace(goal=None, observation=[2])

    def __init__(self, row):
        self.row, self.episode, self.given = row, "an earlier one", []
        self.runs = [{"seed": 3 + row % 2, "grid": {"beta": [1.0, 3.0][row // 2]}}]

    def __call__(self, observation, reward=None):
        assert reward is not None or self.episode is None
        self.given.append(
            (np.concatenate([*observation.values()]).tolist(), reward)
            if self.interface.goal
            else (observation.tolist(), reward)
        )
        return self.row


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder of a grid of two values, with two seeds each."""
    config = {"algo": "iql", "dataset": "own/counter-v0", "seed": 3, "num_seeds": 2, "grid": {"beta": [1.0, 3.0]}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config | {"eval_steps": 100}}))
    restored = []
    monkeypatch.setattr(play, "restore", lambda folder, config, row: restored.append(Policy(row)) or restored[-1])
    monkeypatch.setattr(play, "make_env", lambda dataset_id, render_mode=None: Counter(render_mode))
    monkeypatch.setattr(play, "dataset_tasks", lambda dataset_id: [None])
    monkeypatch.setitem(play.os.environ, "DISPLAY", ":0")  # leaves MUJOCO_GL alone
    return tmp_path, restored


def test_returns_and_a_gif_of_the_run_that_is_asked_for(run, capsys):
    folder, restored = run
    play.main(play.Options(folder, episodes=2, run=3))
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "iql on own/counter-v0, seed 4, beta 3, after 900 updates",
        "episode 0: return 18 in 6 steps",
        "episode 1: return 18 in 6 steps",
        "mean return 18",
        str(folder / "play.gif"),
    ]
    starts = [seed for seed, _ in play.starts(4, 2)]
    observations = [observation for observation, _ in restored[0].given]
    assert observations == [[start, t] for start in starts for t in range(6)] and starts[0] != starts[1]
    assert [reward for _, reward in restored[0].given] == [None, 3, 3, 3, 3, 3] * 2
    gif = Image.open(folder / "play.gif")
    assert gif.size == (320, 240) and gif.info["duration"] == 50 and gif.n_frames == 8  # 20 of 40 a second, and the end
    levels = []
    for i in range(gif.n_frames):
        gif.seek(i)
        levels.append(int(np.mean(gif.convert("L"))))
    np.testing.assert_allclose(levels, [0, 80, 160, 240] * 2, atol=2)


def test_a_policy_of_goals_is_handed_the_goal_of_each_task_in_turn(run, capsys, monkeypatch):
    folder, restored = run
    tasks, begun, reset = [{"task_id": 1}, {"task_id": 2}], [], Counter.reset
    monkeypatch.setattr(play, "dataset_tasks", lambda dataset_id: tasks)
    monkeypatch.setattr(Policy, "interface", types.SimpleNamespace(goal=[2], observation=[2]))
    monkeypatch.setattr(
        Counter, "reset", lambda self, seed, options: (begun.append(options), reset(self, seed, options))[1]
    )
    play.main(play.Options(folder, episodes=3, run=1))
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said[1:4]] == [
        "episode 0, task 1",
        "episode 1, task 2",
        "episode 2, task 1",
    ]
    assert begun[-3:] == [*tasks, tasks[0]]
    assert {tuple(x[2:]) for x, _ in restored[0].given} == {(7, 7)} and len(restored[0].given) == 18


def test_where_nothing_can_be_drawn_it_says_why_and_plays(run, capsys, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(Counter, "drawn", False)
    play.main(play.Options(folder, episodes=1, run=1))
    said = capsys.readouterr().out.splitlines()
    assert "episode 0: return 6 in 6 steps" in said and not (folder / "play.gif").exists()
    assert said[-1].startswith(
        "No GIF is written: the environment cannot be drawn here (RuntimeError: an OpenGL platform library has not"
    )
    monkeypatch.setattr(Counter, "render", lambda self: None)
    play.main(play.Options(folder, episodes=1))
    assert capsys.readouterr().out.endswith("No GIF is written: the environment draws no pictures.\n")


def test_an_episode_is_no_longer_than_in_the_run_s_evaluations(run, capsys):
    folder, _ = run
    config = json.loads((folder / "config.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps({"config": config | {"eval_steps": 4}}))
    play.main(play.Options(folder, episodes=1, run=1))
    assert "return 4 in 4 steps" in capsys.readouterr().out


def test_an_episode_ends_where_the_environment_cuts_it_off(run, capsys, monkeypatch):
    folder, _ = run

    def step(self, action):
        self.t += 1
        return np.array([self.start, self.t]), float(action), False, self.t == 3, {}

    monkeypatch.setattr(Counter, "step", step)
    play.main(play.Options(folder, episodes=1, run=1, out=folder / "other.gif"))
    assert "return 3 in 3 steps" in capsys.readouterr().out
    assert (folder / "other.gif").exists() and not (folder / "play.gif").exists()


def test_the_limit_of_an_episode(monkeypatch):
    """The run's own; else the environment's; else the longest episode of the data."""
    data = [types.SimpleNamespace(rewards=np.zeros(n)) for n in (3, 8, 5)]
    monkeypatch.setattr("minari.load_dataset", lambda name: types.SimpleNamespace(iterate_episodes=lambda: data))
    limited, free = (types.SimpleNamespace(spec=types.SimpleNamespace(max_episode_steps=limit)) for limit in (20, None))
    config = {"dataset": "own/counter-v0", "eval_steps": 0}
    assert play.step_limit(limited, config | {"eval_steps": 4}) == 4 and play.step_limit(limited, config) == 20
    assert play.step_limit(free, config) == play.step_limit(types.SimpleNamespace(spec=None), config) == 8


def test_it_plays_in_the_environment_for_evaluation(monkeypatch):
    asked = {}
    dataset = types.SimpleNamespace(recover_environment=lambda **options: asked.update(options))
    dataset.env_spec = dataset._eval_env_spec = None
    monkeypatch.setattr("minari.load_dataset", lambda name: dataset)
    play.make_env("own/counter-v0", "rgb_array")
    assert asked["eval_env"] is True and asked["render_mode"] == "rgb_array"


class Bare(gymnasium.Env):
    """Cannot be drawn, and has no argument that says how."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}


class Window(Bare):
    metadata = {"render_modes": ["human"]}

    def __init__(self, render_mode):
        self.render_mode = render_mode


@pytest.mark.filterwarnings("ignore")  # Gymnasium's, of a render mode that Bare has not
def test_an_environment_that_takes_no_render_mode_is_played_without_a_picture(monkeypatch):
    def stored(entry_point, **kwargs):
        spec = gymnasium.envs.registration.EnvSpec("own/env-v0", entry_point=entry_point, kwargs=kwargs)
        make = lambda eval_env, **options: gymnasium.make(spec, **options)  # noqa: E731
        dataset = types.SimpleNamespace(env_spec=spec, _eval_env_spec=None, recover_environment=make)
        monkeypatch.setattr("minari.load_dataset", lambda name: dataset)

    stored(Bare)
    env, why_not = play.drawn_env("own/env-v0")
    assert isinstance(env.unwrapped, Bare) and why_not.startswith("the environment cannot be drawn here (TypeError: ")
    stored(Window, render_mode="human")  # as it was recorded: no window is opened
    assert play.make_env("own/env-v0").unwrapped.render_mode is None


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(episodes=0), "--episodes must be at least 1, not 0"),
        (dict(run=4), "--run must be from 0 to 3, not 4: .* has 4 runs"),
        (dict(run=-1), "--run must be from 0 to 3, not -1"),
    ],
)
def test_bad_options_are_one_sentence(run, options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        play.main(play.Options(run[0], **options))


def test_a_folder_or_a_dataset_that_is_not_there_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="is not a run folder"):
        play.main(play.Options(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="own/nowhere-v0 is not in Minari's folder"):
        play.make_env("own/nowhere-v0")


def test_a_trained_policy_repeats_its_evaluation(umaze, tmp_path, capsys):
    """Returns are the first of summary.json, and the last line names a GIF or why there is none."""
    from algos import bc

    sizes = dict(num_seeds=2, num_updates=20, eval_interval=20, log_interval=10, eval_episodes=2, hidden=(8,))
    summary = bc.main(bc.Config(**sizes, eval_steps=5, out=str(tmp_path / "run")))
    capsys.readouterr()
    play.main(play.Options(tmp_path / "run", episodes=2, run=1))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "bc on stitch/pointmaze-umaze-v0, seed 1, after 20 updates"
    expected = [f"episode {j}: return {value:g} in 5 steps" for j, value in enumerate(summary["returns"][1])]
    assert said[1:3] == expected
    assert said[-1].startswith("No GIF is written: ") or (tmp_path / "run" / "play.gif").exists()
