"""The manipulation datasets: the play can be replayed, and its labels are those that the single task gives."""

import functools

import gymnasium
import jax
import minari
import numpy as np
import pytest

from algos import iql
from common import recipes
from common.datasets import load_dataset
from common.recipes import manipulation, rollouts

pytest.importorskip("ogbench", reason="the manipulation datasets need ogbench>=1.2: pip install -e '.[suite]'")

DATASET = "stitch/cube-single-play-v0"
LENGTHS = [40, 40, 20]
SOLVED = 74  # the number of an episode of cube-single whose cube lies at the task's goal at first


@pytest.fixture(autouse=True)
def global_generator():
    """Roll-outs seed NumPy's global generator."""
    state = np.random.get_state()
    yield
    np.random.set_state(state)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Three short episodes of cube-single, built by name with two processes, loaded without ogbench's registrations."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        with monkeypatch.context() as building:
            building.setattr(manipulation, "EPISODE_STEPS", LENGTHS[0])
            building.setattr(rollouts.os, "cpu_count", lambda: 2)
            few = functools.partial(manipulation.write, "cube-single")
            building.setitem(recipes.RECIPES, DATASET, recipes.Recipe(few, sum(LENGTHS)))
            recipes.build(DATASET)
        for env_id in [env_id for env_id in gymnasium.registry if env_id.startswith("cube-single")]:
            monkeypatch.delitem(gymnasium.registry, env_id)  # as in a process that has not imported ogbench
        yield minari.load_dataset(DATASET), *load_dataset(DATASET)


def bits(episodes):
    names = ("observations", "actions", "rewards", "terminations", "truncations")
    return [tuple(getattr(e, name).tobytes() for name in names) for e in episodes]


def replay(task, episode):
    """Executes an episode's actions anew. Returns the T + 1 observations and T + 1 simulator states it passes."""
    env = manipulation.simulators(task)[0]
    observations = [env.reset(seed=episode.seed)[0]]
    sim = env.unwrapped
    keep = lambda: (sim.data.qpos.copy(), sim.data.qvel.copy(), *buttons(sim))  # noqa: E731
    states = [keep()]
    for action in episode.actions:
        observations.append(env.step(action)[0])
        states.append(keep())
    return np.stack(observations), states


def buttons(sim):
    return (sim._cur_button_states.copy(),) if hasattr(sim, "_cur_button_states") else ()


# --- Play and labels --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task, number, num_steps, num_parts",
    [("cube-single", SOLVED, 40, 1), ("cube-double", 0, 20, 2), ("scene", 0, 20, 5), ("puzzle-3x3", 0, 50, 9)],
)
def test_play_can_be_replayed_and_labels_are_the_environments(task, number, num_steps, num_parts):
    """Row t is (s, a, r, s') of the single task: put into s, it answers action a with this reward, terminal and s'."""
    episode = manipulation.rollout(task, (0, number), num_steps)
    observations, states = replay(task, episode)
    np.testing.assert_array_equal(episode.observations, observations)

    env = manipulation.simulators(task)[1]
    env.reset(seed=0)
    sim = env.unwrapped
    for t, action in enumerate(episode.actions):
        sim.set_state(*states[t])
        sim.pre_step()
        sim.post_step()  # the success of this state, as after a step that led to it
        next_obs, reward, terminated, _, _ = sim.step(action)
        assert (reward, terminated) == (episode.rewards[t], episode.terminations[t])
        # The solver starts from other contact forces than in the play: nearly the same state follows.
        np.testing.assert_allclose(next_obs, observations[t + 1], atol=0.05)
        assert -num_parts <= reward <= 0 and terminated == (reward == 0)
    if task == "cube-single":  # at the goal, then carried away
        assert episode.terminations[0] and not episode.terminations[-1]
        assert np.diff(episode.terminations).sum() == 1
    if task == "puzzle-3x3":  # a button and its neighbours switch with each press, of which there are two
        presses = np.diff([s[2] for s in states], axis=0)
        assert np.abs(presses).any(axis=1).sum() >= 2
        assert set(np.abs(presses).sum(axis=1)) <= {0, 3, 4, 5}


def test_plans_are_noisy(monkeypatch):
    """The same state, target and seed, with the noise of the recipe and without."""
    play_env = manipulation.simulators("cube-single")[0]

    def actions():
        oracles = manipulation.make_oracles("cube-single", play_env)
        monkeypatch.setattr(manipulation, "simulators", lambda task: (play_env, None, oracles))
        np.random.seed(0)
        return manipulation.play("cube-single", 0, 0.0, 30)[1]

    noisy = actions()
    monkeypatch.setattr(manipulation, "PLAN_NOISE", 0.0)
    plan = actions()
    assert np.abs(noisy - plan).max() > 0.05
    np.testing.assert_array_equal(plan, actions())


def test_cubes_are_stacked_with_a_probability_of_each_episode(monkeypatch):
    """It is drawn from 0 to a quarter, and every further target of the episode with it."""
    sim = manipulation.simulators("cube-double")[0].unwrapped
    set_new_target, asked = sim.set_new_target, []

    def watch(p_stack=None, **fields):
        if p_stack is None:  # the first target, of a reset, has OGBench's own probability
            return set_new_target(**fields)
        asked[-1].append(p_stack)
        return set_new_target(p_stack=p_stack, **fields)

    monkeypatch.setattr(sim, "set_new_target", watch)
    for number in range(2):
        asked.append([])
        manipulation.rollout("cube-double", (0, number), 150)
    assert all(len(set(values)) == 1 and 0 < values[0] < 0.25 for values in asked) and asked[0][0] != asked[1][0]


@pytest.mark.parametrize("task", ["cube-single", "puzzle-3x3"])
def test_solved_is_terminal(task):
    """On made-up states: r(s) counts what is not in place."""
    if task == "cube-single":
        qpos = np.zeros((4, 21))
        # The goal is (0.5, 0, 0.02), the tolerance 4 cm
        qpos[:, 14:17] = [[0.5, 0, 0.02], [0.5, 0.039, 0.02], [0.5, 0.041, 0.02], [0.35, 0, 0.02]]
        rewards, terminations = manipulation.label(task, {"qpos": qpos})
        assert rewards.tolist() == [0, 0, -1, -1]
    else:
        goal = manipulation.simulators(task)[1].unwrapped.task_infos[4 - 1]["goal_button_states"]
        states = np.stack([goal, 1 - goal, np.where(np.arange(9) < 2, 1 - goal, goal)])
        rewards, terminations = manipulation.label(task, {"qpos": np.zeros((3, 30)), "button_states": states})
        assert rewards.tolist() == [0, -9, -2]
    assert terminations.tolist() == [r == 0 for r in rewards]


def test_scenes_out_of_sight_are_played_again(monkeypatch):
    # (x, y, z): on the table; too far right; too far left on the table; as far left, in the drawer
    for cube, expected in [
        ((0.4, 0.1, 0.02), 1),
        ((0.4, 0.3, 0.02), 0),
        ((0.4, -0.31, 0.02), 0),
        ((0.4, -0.31, 0.07), 1),
    ]:
        assert manipulation.in_sight(np.array([(0.4, 0.0, 0.02), cube])) == bool(expected)
    episode = manipulation.rollout("scene", (0, 0), 3)
    answers = [False, True]
    monkeypatch.setattr(manipulation, "in_sight", lambda positions: answers.pop(0))
    again = manipulation.rollout("scene", (0, 0), 3)
    assert not answers and again.seed != episode.seed


# --- Datasets ---------------------------------------------------------------------------------------


def test_same_seed_same_bits_whatever_the_processes(built):
    """The dataset comes from two processes; here, all episodes are played in this one."""
    here = [manipulation.rollout("cube-single", (0, k), length) for k, length in enumerate(LENGTHS)]
    assert bits(built[0]) == bits(here)
    assert len(set(bits(here))) == len(here)
    assert bits([manipulation.rollout("cube-single", (1, 0), 40)]) != bits(here[:1])


def test_timeouts_are_truncations(built):
    for episode, length in zip(built[0], LENGTHS, strict=True):
        assert episode.observations.shape == (length + 1, 28) and episode.actions.shape == (length, 5)
        assert episode.truncations.tolist() == [False] * (length - 1) + [True]
        assert not episode.terminations[-1] and (episode.rewards < 0).all()


def test_evaluation_environment(built):
    """The default single task, from the dataset's own specification. Doing nothing scores 0."""
    minari_dataset, _, env = built
    task = minari_dataset.recover_environment(eval_env=True, disable_env_checker=True)
    assert task.spec.id == "cube-single-singletask-v0" and task.unwrapped._success_timing == "pre"
    assert task.spec.max_episode_steps == 200
    task.close()
    still = lambda obs, *_: (np.zeros((*obs.shape[:2], 5)), None)  # noqa: E731
    returns = env.evaluate(still, [0], 1, max_steps=3).returns  # of 200
    assert returns.tolist() == [[-3]]
    np.testing.assert_allclose(env.score(np.array([-200.0, -50.0, 0.0])), [0, 75, 100])


def test_iql_learns_from_it(built):
    _, data, env = built
    assert data.obs.dtype == np.float32 and data.obs.shape == (sum(LENGTHS), 28)
    agent = iql.make_agent(iql.Config(hidden=(8,)), env.spec)
    _, metrics = jax.jit(agent.update)(agent.init(jax.random.key(0)), data)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(metrics))


def test_recipes_have_ogbenchs_size():
    for task in manipulation.TASKS:
        recipe = recipes.find(f"stitch/{task}-play-v0")
        assert recipe.num_transitions == 1_000_000 and recipe.write.args == (task,)
        assert recipes.find(f"stitch/{task}-play-100k-v0").num_transitions == 100_000
