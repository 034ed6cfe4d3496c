"""People's games in Overcooked: which rows a recording becomes, and the rules by which it is played again.

The recordings here are made up, in the format of the package's files. Those of people are read by the last test alone.
"""

import ast
import functools
import sys
import types

import numpy as np
import pytest

from common import recipes
from common.datasets import load_dataset
from common.recipes import overcooked

pandas = pytest.importorskip("pandas")

DATASET = "stitch/overcooked-cramped-room-human-v0"
# Cook 1 reaches the onions on the left, the pot above and, a step to the right, dishes below and the delivery above
GRID = ["XPSXX", "O1 2X", "XXDXX"]
NORTH, SOUTH, EAST, WEST, STAY, INTERACT = range(6)

# What cook 1 does. Three times: turn to the onions, take one, turn to the pot, put it in. The third one is in the pot
# after row 11, in which the soup cooks for its first step; it cooks for 20. Row t begins after t - 11 of them.
ONION = [WEST, INTERACT, NORTH, INTERACT]
FETCH_DISH = [EAST, SOUTH, INTERACT, WEST, NORTH]  # rows 12 to 16
SERVE = [INTERACT, EAST, NORTH, INTERACT]
SOUP = ONION * 3 + FETCH_DISH + [STAY] * 14 + SERVE  # takes the soup in row 31, as soon as it is done; 20 in row 34
HASTY = ONION * 3 + FETCH_DISH + [STAY] * 13 + SERVE + [STAY]  # a row too early: there is no soup to take
# Hands without an onion at a pot with one: nothing happens, where in the package's own rules one onion would cook
EAGER = ONION + [INTERACT] + ONION * 2 + FETCH_DISH + [STAY] * 14 + SERVE  # 20 in row 35


def recorded(game, paid, other=(STAY,), worker=1, layout="cramped_room"):
    """Rows of a file: cook 1's moves of a game, those of cook 2 at its beginning, then none, and the row that pays."""
    other = list(other) + [STAY] * (len(game) - len(other))
    moves = [
        str([overcooked.MOVES[i] if i == INTERACT else list(overcooked.MOVES[i]) for i in pair])
        for pair in zip(game, other, strict=True)
    ]
    row = {"layout_name": layout, "layout": str(GRID), "run": "run-1", "workerid_num": worker}
    return [
        row | {"cur_gameloop": float(t), "joint_action": move, "reward": 5.0 * (t == paid)}
        for t, move in enumerate(moves)
    ]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes two files of rows, in which the recipe finds them; and an empty Minari root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(overcooked, "recordings", lambda: tmp_path)

    def write(first, second):
        for name, rows in zip(overcooked.FILES, (first, second), strict=True):
            pandas.DataFrame(rows).to_pickle(tmp_path / name)

    return write


@pytest.fixture
def sized(monkeypatch):
    """Builds the dataset with a number of rows."""

    def load(rows, **options):
        recipe = recipes.Recipe(functools.partial(overcooked.write, "cramped-room"), rows)
        monkeypatch.setitem(recipes.RECIPES, DATASET, recipe)
        return load_dataset(DATASET, **options)

    return load


def needs_package():
    pytest.importorskip("overcooked_ai_py")


# --- What a recording becomes -------------------------------------------------------------------------


def test_an_action_is_what_both_do():
    assert overcooked.index("[[0, 0], [0, 0]]") == 6 * STAY + STAY == 28
    assert overcooked.index("[[0, -1], 'INTERACT']") == 6 * NORTH + INTERACT == 5
    assert overcooked.index("['INTERACT', [0, -1]]") == 6 * INTERACT + NORTH == 30
    assert overcooked.index("[[1, 0], [-1, 0]]") == 6 * EAST + WEST == 15
    assert overcooked.index("[[0, 1], [1, 0]]") == 6 * SOUTH + EAST == 8


def test_the_order_of_actions_is_the_package_s():
    needs_package()
    from overcooked_ai_py.mdp.actions import Action

    assert [x if isinstance(x, tuple) else x.lower() for x in overcooked.MOVES] == Action.INDEX_TO_ACTION


def test_rows_are_those_of_the_games_in_order(files, sized):
    needs_package()
    # In a file the rows of two games and of another kitchen are mixed; the second file has a pair of the same number
    first = recorded(SOUP, 34, [SOUTH, EAST, INTERACT], worker=2) + recorded([EAST, STAY], None, worker=1)
    first += recorded([NORTH] * 5, None, layout="random3", worker=2)
    order = np.random.default_rng(0).permutation(np.arange(1, len(first)))
    files([first[0], *(first[i] for i in order)], recorded(EAGER, 35, worker=2))
    data, env = sized(35 + 2 + 36, columns=("episode", "timestep"))
    np.testing.assert_array_equal(data.episode, [0] * 35 + [1] * 2 + [2] * 36)
    np.testing.assert_array_equal(data.timestep, [*range(35), *range(2), *range(36)])
    one, other = SOUP + [EAST, STAY] + EAGER, [SOUTH, EAST, INTERACT] + [STAY] * 70
    np.testing.assert_array_equal(data.action, 6 * np.array(one) + other)
    np.testing.assert_array_equal(np.flatnonzero(data.reward), [34, 37 + 35])
    assert set(data.reward.tolist()) == {0, 20} and not data.terminal.any()
    assert env.spec[:3] == (26 * 5 * 3, 36, True)
    # Nothing crosses an episode: the kitchen is as it was at the start, and no row leads there
    np.testing.assert_array_equal(data.obs[[35, 37]], data.obs[[0, 0]])
    assert (data.next_obs[[34, 36]] != data.obs[0]).any(axis=1).all()
    inside = np.delete(np.arange(72), [34, 36])
    np.testing.assert_array_equal(data.next_obs[inside], data.obs[inside + 1])


def test_observations_show_the_kitchen(files, sized):
    needs_package()
    files(recorded(SOUP, 34), recorded(HASTY, None))
    data, _ = sized(70)
    obs = data.obs.reshape(70, 5, 3, 26)
    assert np.argwhere(obs[0, :, :, 0]).tolist() == [[1, 1]] and np.argwhere(obs[0, :, :, 1]).tolist() == [[3, 1]]
    assert obs[1, 1, 1, 2 + WEST] == 1 and obs[3, 1, 1, 2 + NORTH] == 1 and obs[0, 3, 1, 6 + NORTH] == 1
    assert np.argwhere(obs[0, :, :, 10]).tolist() == [[1, 0]] and np.argwhere(obs[0, :, :, 15]).tolist() == [[2, 0]]
    assert obs[2, 1, 1, 23] == 1 and obs[4, 1, 1, 23] == 0  # carries the first onion, and has put it into the pot
    assert [int(obs[t, 1, 0, 16]) for t in (3, 4, 8, 11, 12)] == [0, 1, 2, 2, 0]  # onions before it cooks
    assert obs[12, 1, 0, 18] == 3 and [int(obs[t, 1, 0, 20]) for t in (12, 13, 30, 31)] == [19, 18, 1, 0]
    assert [int(obs[t, 1, 0, 21]) for t in (30, 31, 32)] == [0, 1, 0] and obs[32, 1, 1, 18] == 3  # done, and carried
    assert not obs[..., 25].any()
    from common.recipes.kitchen import Kitchen

    kitchen = Kitchen(GRID)
    kitchen.reset()
    kitchen.state.timestep = overcooked.TIME_LIMIT - 1
    np.testing.assert_array_equal(kitchen.observe(), data.obs[0])  # which tell no time
    np.testing.assert_array_equal(obs[35:66], obs[:31])  # the hasty one: the same until it grasps at nothing
    assert obs[66, 1, 0, 21] == 1 and obs[66 + 1, 1, 1, 18] == 0


def test_a_smaller_dataset_ends_within_a_game_and_a_larger_one_is_refused(files, sized):
    needs_package()
    files(recorded(SOUP, 34), recorded(HASTY, None))
    with pytest.raises(SystemExit, match="people played 70 steps there; ask for no more"):
        sized(71)
    data, env = sized(37, columns=("end",))
    np.testing.assert_array_equal(data.end, [34] * 35 + [36] * 2)
    np.testing.assert_array_equal(data.action, 6 * np.array(SOUP + HASTY[:2]) + STAY)
    assert env.score(np.array([0.0, 10.0])).tolist() == [0, 100]  # of all games, whatever the size


def test_what_pays_otherwise_than_it_was_recorded_is_refused(files, sized):
    needs_package()
    files(recorded(SOUP, 34), recorded(HASTY, 34))
    with pytest.raises(SystemExit, match="step 34 of game 1 pays 0 here and 20 in people's game: install"):
        sized(70)


# --- What is missing -----------------------------------------------------------------------------------


def test_without_the_package_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "common.recipes.kitchen", raising=False)
    monkeypatch.setitem(sys.modules, "overcooked_ai_py.mdp.actions", None)
    with pytest.raises(SystemExit, match=r"human-v0 needs overcooked-ai, .*: run pip install -e '.\[people\]'\.$"):
        load_dataset(DATASET)


def test_without_the_recordings_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(overcooked, "recordings", lambda: tmp_path)
    monkeypatch.setitem(sys.modules, "common.recipes.kitchen", types.ModuleType("kitchen"))
    said = "people's games, clean_train_trials.pickle, are not in .* pip install .*--no-deps .*overcooked-ai==1.1.0"
    with pytest.raises(SystemExit, match=said):
        load_dataset(DATASET)


# --- The environment ----------------------------------------------------------------------------------


def test_an_evaluation_plays_by_the_rules_of_the_recordings(files, sized):
    needs_package()
    files(recorded(SOUP, 34), recorded(EAGER, 35))
    _, env = sized(71)

    def play(*games):
        """A policy of cook 1's moves, a game for each seed; then it stays."""
        moves = [[game[t] if t < len(game) else STAY for t in range(40)] for game in games]
        policy = lambda obs, step, *_: (np.array([[6 * x[step] + STAY] * 2 for x in moves]), None)  # noqa: E731
        return env.evaluate(policy, range(len(games)), 2, max_steps=40).returns.tolist()

    env.num_workers = 1
    assert play(SOUP, HASTY, EAGER, []) == [[20, 20], [0, 0], [20, 20], [0, 0]]
    assert env.score_kind == "normalised by the dataset's reference scores" and env._limit == 1204
    assert env.score(np.array([10.0])).tolist() == [50]


# --- People -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people():
    """The kitchens' recorded games, from the package's files, each of which is read once."""
    needs_package()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pandas, "read_pickle", functools.cache(pandas.read_pickle))
        yield {name: overcooked.read(name, DATASET) for name in overcooked.KITCHENS}


def test_people_s_games_are_all_there(people):
    games = {name: games for name, (_, games) in people.items()}
    assert sum(map(len, games.values())) == 76
    for name, kitchen in overcooked.KITCHENS.items():
        assert sum(len(game.action) for game in games[name]) == kitchen.num_steps
        assert max(len(game.action) for game in games[name]) == overcooked.TIME_LIMIT
    assert sum(kitchen.num_steps for kitchen in overcooked.KITCHENS.values()) == 91_102
    cramped = games["cramped-room"]
    assert sum((game.action == 28).sum() for game in cramped) == 9_956  # of 19,190: both stay
    assert sum(overcooked.PAY * game.reward.sum() for game in cramped) == 5680


def test_where_the_kitchen_is_as_at_the_start_people_mostly_wait(people):
    """What the page of scores says of these rows."""
    from common.recipes.kitchen import Kitchen

    grid, games = people["cramped-room"]
    env, there = Kitchen(grid), []
    start, _ = env.reset()
    for game in games:
        obs, _ = env.reset()
        for action in game.action:
            there += [int(action)] * np.array_equal(obs, start)
            obs, *_ = env.step(action)
    assert (len(there), there.count(28)) == (225, 208)


@pytest.mark.parametrize("name", overcooked.KITCHENS)
def test_people_s_games_are_played_again_move_for_move(people, name):
    """The recorded states, which the recipe does not read, of the beginning of a kitchen's first game."""
    from overcooked_ai_py.mdp.overcooked_mdp import OvercookedState

    from common.recipes.kitchen import Kitchen

    grid, games = people[name]
    table = pandas.read_pickle(overcooked.recordings() / overcooked.FILES[0])
    table = table[table["layout_name"] == overcooked.KITCHENS[name].recorded_as]
    table = table[table["workerid_num"] == table["workerid_num"].iloc[0]].sort_values("cur_gameloop")
    env = Kitchen(grid)
    obs, _ = env.reset()
    for state, action in zip(table["state"][:120], games[0].action, strict=False):
        state = ast.literal_eval(state)
        things = state["objects"]
        state["objects"] = list(things.values()) if isinstance(things, dict) else things
        was = env.rules.lossless_state_encoding(OvercookedState.from_dict(state), np.inf)[0]
        np.testing.assert_array_equal(obs, was.ravel())
        obs, *_ = env.step(action)
