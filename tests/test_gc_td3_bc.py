"""TD3+BC with hindsight against numbers worked out by hand. (Its update is that of td3_bc.py.)"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import walks

from algos import gc_td3_bc, td3_bc
from common.environments import Spec

KEY = jax.random.key(0)
SMALL = dict(batch_size=16, hidden=(8,))


def drawn(size=30_000, **options):
    data = walks.rows([[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]], size=11)
    b = jax.jit(gc_td3_bc.draw, static_argnums=(2, 3))(KEY, data, None, gc_td3_bc.Config(batch_size=size, **options))
    return b, walks.state_of(b.obs[:, :11]), walks.state_of(b.obs[:, 11:])


def test_goals_are_later_states_all_equally_likely():
    _, state, goal = drawn(p_future=1.0)
    np.testing.assert_allclose(walks.frequencies(goal[state == 0], 5), [0, 0.25, 0.25, 0.25, 0.25], atol=0.03)
    np.testing.assert_allclose(walks.frequencies(goal[state == 2], 5), [0, 0, 0, 0.5, 0.5], atol=0.04)
    np.testing.assert_allclose(walks.frequencies(goal[state == 4], 10), [0.1] * 10, atol=0.025)  # none later: any


def test_the_share_of_random_goals():
    # Row 0: 0.8 / 4 on each later row, and 0.2 / 10 on each of ten
    _, state, goal = drawn()
    np.testing.assert_allclose(walks.frequencies(goal[state == 0], 10), [0.02] + [0.22] * 4 + [0.02] * 5, atol=0.03)


def test_a_goal_is_reached_by_the_row_before_it_in_its_episode():
    """Not by the last row of the episode before, though the goal's row is the next of the data: 4, then 5 as row 5."""
    b, state, goal = drawn(p_future=0.0)
    reached = (goal == state + 1) & (state != 4)
    assert ((state == 4) & (goal == 5)).any() and reached.any()
    np.testing.assert_array_equal(b.terminal, reached)
    np.testing.assert_array_equal(b.reward, reached - 1.0)
    np.testing.assert_array_equal(b.obs[:, 11:], b.next_obs[:, 11:])  # the goal stays


def test_an_update_is_that_of_td3_bc():
    k = jax.random.split(KEY, 3)
    batch = gc_td3_bc.Transition(
        obs=jax.random.normal(k[0], (8, 6)),
        action=jax.random.uniform(k[1], (8, 2)),
        reward=-jnp.ones(8),
        next_obs=jax.random.normal(k[2], (8, 6)),
        terminal=jnp.zeros(8).at[0].set(1.0),
    )
    new = []
    for algo, spec in ((gc_td3_bc, Spec(3, 2, goal_dim=3)), (td3_bc, Spec(6, 2))):
        agent = algo.make_agent(algo.Config(**SMALL, learning_rate=1e-3, tau=0.02), spec)
        new.append(jax.jit(agent.update)(jax.jit(agent.init)(KEY), batch)[0])
    chex.assert_trees_all_equal(*(jax.tree.leaves(x)[1:] for x in new))  # but for the key


def test_beliefs_are_of_rewards_on_arrival():
    # Q of a constant -1.9 = -(1 + 0.9), three steps from the goal: 1 - 0.1 * 1.9 = 0.81 = 0.9^2
    agent = gc_td3_bc.make_agent(gc_td3_bc.Config(**SMALL, discount=0.9), Spec(3, 2, goal_dim=3))
    state = jax.jit(agent.init)(KEY)

    def constant(path, x):
        last = "Dense_1" in jax.tree_util.keystr(path) and "bias" in jax.tree_util.keystr(path)
        return jnp.full_like(x, -1.9) if last else jnp.zeros_like(x)

    params = jax.tree_util.tree_map_with_path(constant, state.critic.params)
    q = agent.q(state._replace(critic=state.critic._replace(params=params)), jnp.ones((4, 6)), jnp.ones((4, 2)))
    np.testing.assert_allclose(q, [0.81] * 4, rtol=1e-5)
