"""GCIVL against numbers worked out by hand, most of them with tables in place of its networks."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walks

from algos import gcbc, gcivl

KEY = jax.random.key(0)
CFG = gcivl.Config(batch_size=16, hidden=(8,), discount=0.9, tau=0.5, alpha=10.0)


@pytest.fixture
def tabular(monkeypatch):
    monkeypatch.setattr(gcivl, "GoalValue", walks.Table)


def batch(state, next_state, goal, mask=None, action=None):
    """Rows of one-hot states; the reward is -1, and nothing where mask is 0: there the goal is reached."""
    mask = jnp.ones(len(state)) if mask is None else jnp.array(mask, float)
    action = jnp.zeros(len(state), int) if action is None else jnp.array(action)
    obs, next_obs, goal = map(walks.one_hot, (state, next_state, goal))
    return gcivl.Batch(obs, action, next_obs, goal, goal, mask * -1, mask)


# --- Goals ---------------------------------------------------------------------------------------------


def drawn(index, p_current=0.0, p_future=1.0, size=40_000, discount=0.9):
    goals = jax.jit(gcivl.draw_goals, static_argnums=3)
    return goals(KEY, jnp.full(size, index), jnp.full(size, 4), 10, p_current, p_future, discount)


@pytest.mark.parametrize(
    "index, expected",
    [
        (0, [0, 0.1, 0.09, 0.081, 0.729]),  # 0.1 * 0.9^(k - 1), and all that lies beyond the last row is on it
        (1, [0, 0, 0.1, 0.09, 0.81]),
        (3, [0, 0, 0, 0, 1]),
        (4, [0, 0, 0, 0, 1]),
    ],
)
def test_goals_lie_geometrically_far_ahead(index, expected):
    np.testing.assert_allclose(walks.frequencies(drawn(index), 5), expected, atol=0.012)


def test_mix_of_own_later_and_random_goals():
    # Row 1: 0.2 on itself, 0.5 * (0.1, 0.09, 0.81) on 2, 3, 4, and 0.03 on each of ten rows
    expected = [0.03, 0.23, 0.08, 0.075, 0.435, 0.03, 0.03, 0.03, 0.03, 0.03]
    np.testing.assert_allclose(walks.frequencies(drawn(1, 0.2, 0.5), 10), expected, atol=0.012)


def test_a_goal_is_reached_in_its_own_row_alone():
    """Not in another row of the same state, nor by the row before it. Of T = 5 rows the share is .2 + .5/5 + .3/5."""
    data = walks.rows([[0, 1, 2, 3, 4, 5]])
    data = data._replace(obs=data.obs.at[3].set(data.obs[2]))  # row 3 is in state 2 as well
    b = jax.jit(gcivl.draw, static_argnums=(2, 3))(KEY, data, None, gcivl.Config(batch_size=20_000))
    np.testing.assert_array_equal(b.reward, -b.mask)
    reached, same = np.asarray(b.mask) == 0, walks.state_of(b.obs) == walks.state_of(b.goal)
    assert np.all(same[reached]) and not np.all(reached[same])
    np.testing.assert_allclose(reached.mean(), 0.36, atol=0.015)


# --- Losses --------------------------------------------------------------------------------------------


def test_one_value_loss_by_hand(tabular):
    # Vbar(s') = (-1, -2), Vbar(s) = (-3, -2), V(s) = (-2.5, -2.2), r = -1, discount = expectile = 0.9:
    # y = (-1.9, -2.8), A = -2.8 - (-2.5) = -0.3, weight 0.1: 0.1 (0.6^2 + 0.6^2) = 0.072
    agent = gcivl.make_agent(CFG, walks.spec(2))
    state = agent.init(KEY)
    slow = np.zeros((2, 2, 2))
    slow[:, 1, 1], slow[:, 0, 1] = (-1, -2), (-3, -2)
    online = np.zeros((2, 2, 2))
    online[:, 0, 1] = (-2.5, -2.2)
    state = state._replace(value=state.value._replace(params=walks.table(online)), target_value=walks.table(slow))
    one = jax.tree.map(lambda x: x[..., :2] if x.ndim == 2 else x, batch([0], [1], [1]))
    _, info = jax.jit(agent.update)(state, one)
    np.testing.assert_allclose(info["value_loss"], 0.072, rtol=1e-4)


# A walk of 0 .. 4, right or left with equal chance, reflected at 0; goal 4; discount 0.9
RANDOM_WALK = batch([0, 0, 1, 1, 2, 2, 3, 3, 4], [1, 0, 2, 0, 3, 1, 4, 2, 5], [4] * 9, [1] * 8 + [0])


@pytest.mark.parametrize(
    "expectile, expected",
    [
        (0.5, [-7.52611, -6.97636, -5.75468, -3.58961, 0]),  # the value of the random walk
        (0.7, [-5.37342, -4.63904, -3.47336, -1.93781, 0]),
        (0.9, [-3.93483, -3.18604, -2.26162, -1.20355, 0]),
        (0.99, [-3.48347, -2.7521, -1.93126, -1.01738, 0]),  # nearly -(1 - 0.9^d) / 0.1: 3.439, 2.71, 1.9, 1
    ],
)
def test_values_of_a_random_walk(tabular, expectile, expected):
    cfg = gcivl.Config(hidden=(4,), discount=0.9, tau=0.5, expectile=expectile)
    _, state, _ = walks.settle(gcivl, cfg, walks.spec(), RANDOM_WALK)
    for member in state.value.params["params"]["table"]:
        np.testing.assert_allclose(member[:5, 4], expected, atol=0.02)


def test_it_believes_in_luck(tabular):
    # From 0, action 0 leads to the goal 4 or to the dead end 5 (V = -10) by even chance, action 1 to 1, next to 4.
    # Targets -1, -10, -1.9, -1.9: their 0.9-expectile is -1.9, where 0.9 * 0.9 = 0.1 * 8.1; the mean is -3.7.
    # weights exp(10 (V(s') - V(s))): 100 (to the goal), 0 (dead), exp(10 * 0.9) = 8103, cut to 100: pi(0) = 1/3.
    b = batch([0, 0, 0, 0, 1, 5, 4], [4, 5, 1, 1, 4, 5, 4], [4] * 7, [1] * 6 + [0], [0, 0, 1, 1, 0, 0, 0])
    for expectile, expected in ((0.5, -3.7), (0.9, -1.9)):
        cfg = gcivl.Config(hidden=(8,), discount=0.9, tau=0.5, expectile=expectile)
        agent, state, _ = walks.settle(gcivl, cfg, walks.spec(), b)
        np.testing.assert_allclose(state.value.params["params"]["table"][0, 0, 4], expected, atol=0.02)
    pi = gcivl.GoalActor(2, (8,), True).apply(state.actor.params, b.obs[:1], b.goal[:1])
    np.testing.assert_allclose(jax.nn.softmax(pi.logits)[0, 0], 1 / 3, atol=0.02)


def test_a_state_that_is_met_twice_counts_as_not_reached_in_the_other_row(tabular):
    """By design of the reference, which compares row numbers: here V(2, 2) is not 0 but -0.0298."""
    # Two episodes 0-1-2-(3) and 2-3-4-(5). Of the pairs (2, 2), 1.0 are the row itself and 0.1 the other row, whose
    # target is -1 + 0.9 V(3, 2) = -2.71 (5 is no row: V(5, 2) stays 0). 0.9 (0 - V) = 0.1 * 0.1 (V + 2.71).
    b = batch([2] * 11 + [1, 0, 3, 4], [2] * 10 + [3, 2, 1, 4, 5], [2] * 15, [0] * 10 + [1] * 5)
    _, state, _ = walks.settle(gcivl, gcivl.Config(hidden=(4,), discount=0.9, tau=0.5), walks.spec(), b)
    v = state.value.params["params"]["table"][0]
    np.testing.assert_allclose(v[[2, 1, 0], 2], [-0.0298, -1.0268, -1.9241], atol=2e-3)


# --- Training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("random_goals", [True, False])
def test_walks_that_never_met_are_joined_by_random_goals(tabular, random_goals, optimised):
    """0-1-2-(3) and 2-3-4-(5): only goals of other episodes ask how 4 is reached from 0."""
    cfg = gcivl.Config(batch_size=64, hidden=(4,), discount=0.9, tau=0.2, learning_rate=0.01)
    cfg = gcivl.dataclasses.replace(cfg, p_future=0.5 if random_goals else 0.8)
    _, state = walks.train(gcivl, cfg, walks.spec(), walks.rows(walks.STITCH), 3000)
    v = np.asarray(state.value.params["params"]["table"][0])[:5, 4]
    if random_goals:
        np.testing.assert_allclose(v, [-3.439, -2.71, -1.9, -1, 0], atol=0.25)
    else:
        assert v[0] == v[1] == 0 and abs(v[2] + 1.9) < 0.25  # never trained


def test_alpha_zero_is_cloning_bit_for_bit():
    """Whole runs: the batches too are those of GCBC."""
    data, small = walks.rows(walks.STITCH, actions=[0, 1, 0, 1, 1, 0]), dict(batch_size=16, hidden=(8,))
    _, clone = walks.train(gcbc, gcbc.Config(**small), walks.spec(), data, 20)
    _, state = walks.train(gcivl, gcivl.Config(**small, alpha=0.0), walks.spec(), data, 20)
    chex.assert_trees_all_equal(clone.actor.params, state.actor.params)


def test_it_goes_where_cloning_does_not(optimised):
    """From 0, action 0 leads to 1 and 2, action 1 to 3, 4 and the dead end 6. Another episode goes from 2 to 5. None
    has both 0 and 5: GCBC does there what was done most often, and GCIVL what leads on."""
    episodes = [[0, 1, 2, 6]] + 3 * [[0, 3, 4, 6]] + [[2, 5, 6, 6]]
    data = walks.rows(episodes, actions=[0, 0, 0] + 3 * [1, 0, 0] + [1, 1, 1], size=7)
    obs, small = walks.one_hot([0, 5], 7).reshape(1, -1), dict(batch_size=256, hidden=(32,), learning_rate=3e-3)
    took = {}
    for algo, options in ((gcbc, {}), (gcivl, dict(tau=0.2, discount=0.9, actor_p_future=0.5))):
        agent, state = walks.train(algo, algo.Config(**small, **options), walks.spec(7), data, 1500)
        took[algo] = agent.act(state, obs, KEY).item()
    assert took == {gcbc: 1, gcivl: 0}
