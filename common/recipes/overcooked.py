"""Overcooked, played by pairs of people: two cooks fill pots with onions, and deliver the soups.

Carroll et al. (2019), On the Utility of Learning about Humans for Human-AI Coordination,
https://arxiv.org/abs/1910.05789. Pairs of people played for three minutes in each of five kitchens, 6.7 steps in a
second. What the authors kept are 76 games, 91,102 joint steps.

    cramped-room            a small room, in which the cooks get into each other's way
    asymmetric-advantages   two rooms, one near the onions, the other near the counter of delivery
    coordination-ring       a ring, round which both have to go the same way
    forced-coordination     neither cook can make a soup alone: they hand things over a counter
    counter-circuit         a long ring, where handing things over a counter is faster

The recordings are two files of PyPI's overcooked-ai 1.1.0. Its repository has the MIT License; the package itself names
none, so nothing of it is kept here: the recipe reads the files in the reader's own copy, which `pip install -e
'.[people]'` installs. Of the files it takes the kitchens and what both people did, and plays that again in
common/recipes/kitchen.py, from which observations and rewards come (20 for a soup; the files have 5). What is paid
there must be what was recorded, in every step.

An action is what both do, one of 36, since that makes the game a plain MDP with one agent. With one person's actions
alone, the other would be a part of the environment, and an evaluation would need somebody to play it. Observations are
the package's lossless encoding. Its features, which the paper clones, are found by a planner that NumPy 2 breaks.

An episode is a game, cut off by its clock and never terminal. An evaluation has as many steps as the longest of them.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from common.recipes import storage


class Kitchen(NamedTuple):
    recorded_as: str  # in the files
    num_steps: int  # of all its games


KITCHENS = {
    "cramped-room": Kitchen("cramped_room", 19_190),
    "asymmetric-advantages": Kitchen("asymmetric_advantages", 20_385),
    "coordination-ring": Kitchen("coordination_ring", 19_181),
    "forced-coordination": Kitchen("random0", 14_375),
    "counter-circuit": Kitchen("random3", 17_971),
}
FILES = ("clean_train_trials.pickle", "clean_test_trials.pickle")
TIME_LIMIT = 1204  # steps of 180 seconds; the shortest game has 1132
MOVES = [(0, -1), (0, 1), (1, 0), (-1, 0), (0, 0), "INTERACT"]  # in the package's order: north, south, east, west, stay
PAY = 4  # of the simulator, for each unit that was recorded: 20 and 5 for a soup


class Game(NamedTuple):
    action: np.ndarray  # (T,) of both people, 6 * a + b
    reward: np.ndarray  # (T,) as it was recorded


def write(kitchen: str, dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """The first rows of a kitchen's games. Score 0 is a return of 0, and 100 the mean return of all its games."""
    import gymnasium as gym

    grid, games = read(kitchen, dataset_id)
    recorded = sum(len(game.action) for game in games)
    if num_transitions > recorded:
        raise SystemExit(f"{dataset_id}: people played {recorded:,} steps there; ask for no more.")
    entry = {"id": "StitchKitchen-v0", "entry_point": "common.recipes.kitchen:Kitchen", "kwargs": {"grid": grid}}
    env = gym.make(gym.envs.registration.EnvSpec(**entry, max_episode_steps=TIME_LIMIT), disable_env_checker=True)
    actions = np.concatenate([game.action for game in games])
    alone = np.stack(np.divmod(actions, len(MOVES)))
    returns = [PAY * game.reward.sum() for game in games]
    storage.write(
        dataset_id,
        data_path,
        replay(env.unwrapped, games, num_transitions, dataset_id),
        env,
        env,
        reference_scores=(0.0, float(np.mean(returns))),
        algorithm_name="Pairs of people",
        code_permalink="common/recipes/overcooked.py",
        description=f"Overcooked, kitchen {kitchen}: {len(games)} games of pairs of people, of three minutes each. In "
        f"{(actions == 28).mean():.1%} of the steps both stay where they are, and a person does so in "
        f"{(alone == 4).mean():.1%}. A soup pays 20. A return of 0 scores 0, people's mean return 100.",
        requirements=["overcooked-ai==1.1.0"],
    )


def read(kitchen: str, dataset_id: str) -> tuple[list[str], list[Game]]:
    """The rows of a kitchen's grid, and its games: those of the first file, and in a file as they were recorded."""
    try:
        import pandas

        import common.recipes.kitchen  # noqa: F401 (which imports the package)
    except ImportError as error:
        raise SystemExit(
            f"{dataset_id} needs overcooked-ai, which has people's games and the kitchens, and pandas ({error}): run "
            "pip install -e '.[people]'."
        ) from error
    folder, grids, games = recordings(), set(), []
    for name in FILES:
        if not (folder / name).exists():
            raise SystemExit(
                f"{dataset_id}: people's games, {name}, are not in {folder}; overcooked-ai 1.1.0 has them there: run "
                "pip install --force-reinstall --no-deps --no-binary overcooked-ai overcooked-ai==1.1.0."
            )
        table = pandas.read_pickle(folder / name)
        table = table[table["layout_name"] == KITCHENS[kitchen].recorded_as]
        grids |= set(table["layout"])
        for _, game in table.groupby(["run", "workerid_num"], sort=False):  # a pair plays once in each kitchen
            game = game.sort_values("cur_gameloop")
            games.append(Game(np.array([index(x) for x in game["joint_action"]]), game["reward"].to_numpy(float)))
    (grid,) = grids
    return ast.literal_eval(grid), games


def recordings() -> Path:
    """The folder of the installed package that has the files."""
    from overcooked_ai_py.static import HUMAN_DATA_DIR

    return Path(HUMAN_DATA_DIR)


def index(joint_action: str) -> int:
    """6 * a + b of "[[0, -1], 'INTERACT']", in which the first is what cook 1 does."""
    a, b = (MOVES.index(move if isinstance(move, str) else tuple(move)) for move in ast.literal_eval(joint_action))
    return len(MOVES) * a + b


def replay(env, games: list[Game], num_transitions: int, dataset_id: str):
    """Episodes of exactly `num_transitions` transitions; the last may be cut short."""
    from minari.data_collector import EpisodeBuffer

    left = num_transitions
    with tqdm(total=num_transitions, desc=dataset_id, unit=" steps") as progress:
        for number, game in enumerate(games):
            steps = min(left, len(game.action))
            if not steps:
                break
            observations, rewards = [env.reset()[0]], []
            for action in game.action[:steps]:
                obs, reward, *_ = env.step(action)
                observations.append(obs)
                rewards.append(reward)
            wrong = np.flatnonzero(rewards != PAY * game.reward[:steps])
            if len(wrong):
                raise SystemExit(
                    f"{dataset_id}: step {wrong[0]} of game {number} pays {rewards[wrong[0]]:g} here and "
                    f"{PAY * game.reward[wrong[0]]:g} in people's game: install overcooked-ai==1.1.0."
                )
            left -= steps
            end = np.arange(1, steps + 1) == steps
            yield EpisodeBuffer(
                observations=np.stack(observations),
                actions=game.action[:steps],
                rewards=np.array(rewards),
                terminations=end & False,
                truncations=end,
            )
            progress.update(steps)
