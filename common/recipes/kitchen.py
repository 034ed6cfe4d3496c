"""Overcooked as people played it: two cooks in a kitchen, both moved by one agent.

It wraps the rules of the package overcooked-ai 1.1.0 (https://github.com/HumanCompatibleAI/overcooked_ai), in which a
soup cooks when somebody presses "interact" at the pot. When people were recorded (2019) it cooked by itself as soon as
it had three onions, and not before, and so it does here: then every recorded game is played again move for move.

This module imports the package; common/recipes/overcooked.py imports it only where a kitchen is needed.
"""

import contextlib
import io

import gymnasium
import numpy as np

with contextlib.redirect_stderr(io.StringIO()):  # the package needs gym, which prints that it is not maintained
    from overcooked_ai_py.mdp.actions import Action, Direction
    from overcooked_ai_py.mdp.overcooked_mdp import OvercookedGridworld

ORDERS = [{"ingredients": ["onion"] * 3}]  # a soup of three onions, which pays 20 where it is delivered
LAYERS = {
    "cooks": [(0, 2), (1, 6)],  # where one is, and the first of four layers of where it looks
    "cell": {"P": 10, "X": 11, "O": 12, "D": 14, "S": 15},  # 13, 17, 19 and 24 are of tomatoes
    "onions in a pot": 16,  # that does not cook yet
    "onions, steps to cook, done": [18, 20, 21],
    "dish": 22,
    "onion": 23,
}


class Rules(OvercookedGridworld):
    """Of 2019: a pot with three onions cooks by itself, and no other one does."""

    def soup_to_be_cooked_at_location(self, state, pos):
        return False

    def step_environment_effects(self, state):
        for thing in state.objects.values():
            if thing.name == "soup" and thing.is_idle and thing.is_full:
                thing.begin_cooking()
        super().step_environment_effects(state)


class Kitchen(gymnasium.Env):
    """Both cooks of a kitchen. Deterministic, with one start; nothing but a time limit ends an episode.

    Args:
      grid: rows of equal length: X counter, O onions, D dishes, P pot, S where soups are delivered, blank floor, and 1
        and 2 where the cooks begin.

    An action is 6 * a + b, of what cook 1 does (a) and cook 2 (b): 0 to 3 go north, south, east, west, 4 stays, 5
    interacts. An observation (26 * width * height,) is the package's lossless encoding as cook 1 sees it, layers of the
    grid (LAYERS): where the cooks are and look, what each cell is, and what lies there or is carried there. The last
    layer, which tells the last 40 steps, is 0: it has no clock.
    """

    metadata = {"render_modes": []}

    def __init__(self, grid):
        read = OvercookedGridworld.from_grid(grid)
        self.rules = Rules(read.terrain_mtx, read.start_player_positions, start_all_orders=ORDERS)
        self.cells = np.zeros((*self.rules.shape, 26), np.float32)
        for kind, layer in LAYERS["cell"].items():
            for place in self.rules.terrain_pos_dict[kind]:
                self.cells[*place, layer] = 1
        self.observation_space = gymnasium.spaces.Box(0, 20, (self.cells.size,), np.float32)  # 20: steps a soup cooks
        self.action_space = gymnasium.spaces.Discrete(Action.NUM_ACTIONS**2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.rules.get_standard_start_state()
        return self.observe(), {}

    def step(self, action):
        joint = [Action.INDEX_TO_ACTION[i] for i in divmod(int(action), Action.NUM_ACTIONS)]
        self.state, infos = self.rules.get_state_transition(self.state, joint)
        return self.observe(), float(sum(infos["sparse_reward_by_agent"])), False, False, {}

    def observe(self):
        """The package's own function computes the same for both cooks, in twice the time of a step."""
        obs = self.cells.copy()
        for cook, (place, look) in zip(self.state.players, LAYERS["cooks"], strict=True):
            obs[*cook.position, [place, look + Direction.DIRECTION_TO_INDEX[cook.orientation]]] = 1
        for thing in self.state.all_objects_list:
            if thing.name != "soup":
                obs[*thing.position, LAYERS[thing.name]] = 1
            elif thing.is_idle:
                obs[*thing.position, LAYERS["onions in a pot"]] = len(thing.ingredients)
            else:
                now = len(thing.ingredients), thing.cook_time_remaining, thing.is_ready
                obs[*thing.position, LAYERS["onions, steps to cook, done"]] = now
        return obs.ravel()
