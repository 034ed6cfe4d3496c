"""ReBRAC against numbers worked out by hand, and against TD3+BC. With hidden=() every network is linear."""

import dataclasses
import functools

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import rebrac, td3_bc
from common.datasets import Transition
from common.environments import Spec

SPEC = Spec(1, 2)
STILL = dict(actor_learning_rate=0.0, critic_learning_rate=0.0)
LINEAR = rebrac.Config(hidden=(), policy_delay=1, policy_noise=0.0, actor_beta=0.0, critic_beta=0.0, **STILL)
N = 1024  # rows of a batch


@functools.partial(jax.jit, static_argnames="cfg")
def update(cfg, floats, state, batch):
    """One update, compiled once for all values of the `floats` of its Config."""
    return rebrac.make_agent(dataclasses.replace(cfg, **floats), SPEC).update(state, batch)


def fill(tree, kernel, bias=0.0):
    """Linear networks with this kernel (inputs,), or (2, inputs) for two critics, for every output."""

    def leaf(path, x):
        new = np.array(kernel, np.float32)[..., None] if path[-1].key == "kernel" else np.array(bias, np.float32)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(critic=(0, 0, 0), target_critic=(0, 0, 0), target_action=(0, 0)):
    """The policy's action is (0, 0), the target policy's `target_action`; critics: weights of (obs, action, action)."""
    shapes = jax.eval_shape(rebrac.make_agent(LINEAR, SPEC).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    return state._replace(
        key=jax.random.key(0),
        critic=state.critic._replace(params=fill(state.critic.params, critic)),
        target_actor=fill(state.target_actor, (0,), np.arctanh(np.clip(target_action, 0, 1 - 1e-7))),
        target_critic=fill(state.target_critic, target_critic),
    )


def batch_of(obs=0, action=(0, 0), reward=0, next_obs=0, terminal=0, next_action=(0, 0)):
    """Each column, of one row or of some, is repeated to N rows."""
    rows = lambda x, *shape: jnp.resize(jnp.float32(x), (N, *shape))  # noqa: E731
    columns = rows(obs, 1), rows(action, 2), rows(reward), rows(next_obs, 1), rows(terminal), rows(next_action, 2)
    return Transition(*columns)


def bias_gradient(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable.opt_state[0].mu)  # after one update of Adam, (1 - b1) g
    (mu,) = [x for path, x in leaves if path[-1].key == "bias"]
    return mu / 0.1


def test_target_pays_for_each_step_away_from_the_datas_next_action():
    # a' = (1, 0), the data's (0.5, -1): |.|^2 = 0.25 + 1 = 1.25. Target critics 2 s' + a'_1 and 2 s' + 3 a'_1 at
    # s' = 0.5: min(2, 4) = 2. y = 1 + 0.99 (2 - 0.4 * 1.25) = 2.485; at a terminal 1, whatever stands there for a'.
    # Q = 0: loss = 2 critics * mean(y^2).
    state = linear_state(target_critic=[(2, 1, 0), (2, 3, 0)], target_action=(1, 0))
    batch = batch_of(reward=1, next_obs=0.5, terminal=(0, 1), next_action=[(0.5, -1), (1e6, 1e6)])
    _, info = update(LINEAR, {"critic_beta": 0.4}, state, batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (2.485**2 + 1) / 2, rtol=1e-4)


def test_the_penalty_is_of_the_action_that_q_is_asked_for():
    # Noise of standard deviation 1000, clipped at 0.5, on (1, 0); then the action's bound: a'_1 is 0.5 or 1 and
    # a'_2 +-0.5. From the data's (1, 0): |.|^2 is 0.5 or 0.25, each in half of the rows; y = -0.99 |.|^2, Q' = 0.
    batch = batch_of(next_action=(1, 0))
    floats = {"critic_beta": 1.0, "policy_noise": 1000.0}
    _, info = update(LINEAR, floats, linear_state(target_action=(1, 0)), batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.99**2 * (0.5**2 + 0.25**2) / 2, rtol=0.1)


def test_each_dimension_of_the_action_has_its_own_noise():
    # Q' = a'_1 - a'_2 and each is +-0.5: 0 in half of the rows and +-1 in the others. Of one noise for both, 0.
    _, info = update(LINEAR, {"policy_noise": 1000.0}, linear_state(target_critic=(0, 1, -1)), batch_of())
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.99**2 * 0.5, rtol=0.15)  # 1,024 rows: 0.03 a standard error


def test_what_it_believes_is_the_smaller_critic():
    cfg = dataclasses.replace(LINEAR, layer_norm=False)
    state = linear_state(critic=[(0, 1, 0), (0, 2, 0)])
    np.testing.assert_allclose(rebrac.make_agent(cfg, SPEC).q(state, jnp.zeros((1, 1)), jnp.ones((1, 2))), [1])


def test_the_penalty_is_discounted_and_sums_up():
    # One state, reward 1, discount 0.9; the policy is 1 away from the data in every step: Q = 1 + 0.9 (Q - 0.5 * 1),
    # so Q = (1 - 0.45) / 0.1 = 5.5 instead of 10. All of it learned by update, target network included.
    cfg = dataclasses.replace(LINEAR, critic_learning_rate=0.1, critic_beta=0.5, discount=0.9, tau=0.5)
    state, batch = linear_state(), batch_of(reward=1, next_action=(1, 0))
    for _ in range(300):
        state, info = update(cfg, {}, state, batch)
    np.testing.assert_allclose(info["q"], 5.5, rtol=1e-2)


def test_actors_loss_and_what_it_does_not_differentiate():
    # Critics s + a_1 and s + a_1 + 1: at s = (2, 2, 2, -4) and pi = (0, 0) the smaller one is s: lambda = 1 / 2.5, and
    # -lambda mean Q = -0.4 * 0.5. |pi - a|^2 = 0.09 + 0.16 = 0.25, a sum over the dimensions: L = -0.2 + 2 * 0.25.
    # dL/db_1 = -0.4 - 2 * 2 * 0.3 and dL/db_2 = -2 * 2 * 0.4. With lambda differentiated too, -0.4 would be
    # -(2.5 - 0.5 * 0.5) / 2.5^2 = -0.36, as mean|Q| grows by 0.5 with b_1.
    state = linear_state(critic=(1, 1, 0))
    one_more = fill(state.critic.params, (1, 1, 0), np.array([[0], [1]]))
    state = state._replace(critic=state.critic._replace(params=one_more))
    after, info = update(LINEAR, {"actor_beta": 2.0}, state, batch_of(obs=(2, 2, 2, -4), action=(0.3, 0.4)))
    np.testing.assert_allclose([info["actor_loss"], info["bc_loss"]], [-0.2 + 0.5, 0.25], rtol=1e-5)
    np.testing.assert_allclose(bias_gradient(after.actor), [-0.4 - 1.2, -1.6], rtol=1e-5)


def test_actor_climbs_the_smaller_critic_of_each_state():
    # Critics s + a_1 and -s + a_2: the second one is smaller at s = 1, the first at s = -1, both -1. The gradient of
    # -lambda Q, lambda = 1, is (0, -1) in one half of the rows and (-1, 0) in the other.
    state = linear_state(critic=[(1, 1, 0), (-1, 0, 1)])
    after, _ = update(LINEAR, {}, state, batch_of(obs=(1, -1)))
    np.testing.assert_allclose(bias_gradient(after.actor), [-0.5, -0.5], rtol=1e-5)


def test_is_td3_bc_with_one_penalty_and_its_networks():
    """Whole updates of the two files, with the same noise: critic_beta 0, no LayerNorm, actor_beta 1 / (alpha |A|).

    The loss of TD3+BC's actor is alpha times ours, which Adam does not see. Its Q_1 is our minimum where the second
    critic is larger everywhere, as it remains here.
    """
    k = jax.random.split(jax.random.key(1), 5)
    uniform = functools.partial(jax.random.uniform, shape=(16, 2), minval=-1.0)
    batch = Transition(
        obs=jax.random.normal(k[0], (16, 1)),
        action=uniform(k[1]),
        reward=jax.random.normal(k[2], (16,)),
        next_obs=jax.random.normal(k[3], (16, 1)),
        terminal=(jnp.arange(16) % 4 == 1).astype(jnp.float32),
        next_action=uniform(k[4]),
    )
    small = dict(hidden=(8, 8), tau=0.1)
    their_agent = td3_bc.make_agent(td3_bc.Config(**small, learning_rate=3e-3, alpha=2.5), SPEC)
    theirs = jax.jit(their_agent.init)(jax.random.key(0))
    above = lambda path, x: x.at[1].add(100.0) if "Dense_2" in str(path) and x.ndim == 2 else x  # noqa: E731
    critic_params = jax.tree_util.tree_map_with_path(above, theirs.critic.params)
    theirs = theirs._replace(critic=theirs.critic._replace(params=critic_params), target_critic=critic_params)
    ours = rebrac.State(*(rebrac.Trainable(*x) if isinstance(x, td3_bc.Trainable) else x for x in theirs))

    rates = dict(actor_learning_rate=3e-3, critic_learning_rate=3e-3)
    cfg = rebrac.Config(**small, **rates, actor_beta=1 / (2.5 * 2), critic_beta=0.0, layer_norm=False)
    their_update = jax.jit(their_agent.update)
    for _ in range(4):
        ours, our_info = update(cfg, {}, ours, batch)
        theirs, their_info = their_update(theirs, batch)
    np.testing.assert_allclose(2.5 * our_info["actor_loss"], their_info["actor_loss"], rtol=1e-4)
    np.testing.assert_allclose(our_info["bc_loss"] / 2, their_info["bc_loss"], rtol=1e-4)
    assert ours.key == theirs.key
    for x, y in zip(ours[1:], theirs[1:], strict=True):
        chex.assert_trees_all_close(getattr(x, "params", x), getattr(y, "params", y), rtol=1e-4, atol=2e-5)


def test_networks_of_the_reference():
    """LayerNorm in the critics alone; hidden biases 0.1; last layers within 3e-3 (critics) and 1e-3 (actor)."""
    state = jax.jit(rebrac.make_agent(rebrac.Config(hidden=(8, 8)), SPEC).init)(jax.random.key(0))
    for network, bound, layer_norm in ((state.actor, 1e-3, False), (state.critic, 3e-3, True)):
        layers = flax.traverse_util.flatten_dict(network.params, sep="/")
        assert any("LayerNorm" in name for name in layers) == layer_norm
        for name, x in layers.items():
            if "Dense_2" in name:
                assert 0.1 * bound < jnp.abs(x).max() <= bound, name
            elif name.endswith("linear/bias"):
                np.testing.assert_array_equal(x, np.float32(0.1))


def test_the_row_of_a_time_out_is_left_out_and_that_of_a_terminal_is_not(monkeypatch):
    # Episodes of 3, 2 and 2 rows: the first ends by itself, the others do not, so their last rows 4 and 6 go. What is
    # left has the action of the row that follows: row 3, before the time-out, has the time-out's row's.
    label, last = np.arange(7, dtype=np.float32), [2, 4, 6]
    following = label + 1
    following[last] = label[last]  # as load_dataset has it where there is none
    terminal = np.float32([0, 0, 1, 0, 0, 0, 0])
    columns = label[:, None], label[:, None], label, label[:, None], terminal, following[:, None]
    asked = {}

    def load_dataset(name, columns, **options):
        asked.update(options, columns=columns)
        return data, "environment"

    data = Transition(*columns, episode=np.int32([0, 0, 0, 1, 1, 2, 2]))
    monkeypatch.setattr(rebrac, "load_dataset", load_dataset)
    kept, env = rebrac.load_data(rebrac.Config(reward_shift=-3.0))
    np.testing.assert_array_equal(kept.action[:, 0], [0, 1, 2, 3, 5])
    np.testing.assert_array_equal(kept.next_action[:, 0], [1, 2, 2, 4, 6])  # 2: masked by the terminal
    assert env == "environment" and kept.episode is None
    assert asked == {"columns": ("next_action", "episode"), "reward_shift": -3.0, "normalize_obs": False}


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="ReBRAC needs continuous actions"):
        rebrac.make_agent(rebrac.Config(), Spec(3, 4, discrete=True))
