"""TD3-AWR against numbers worked out by hand. With hidden=() every network is linear, so that they can be."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import td3_awr, td3_bc
from common.datasets import Transition
from common.environments import Spec

LINEAR = td3_awr.Config(hidden=(), policy_noise=0.0, policy_delay=1, critic_bc=0.0)
STILL = dataclasses.replace(LINEAR, learning_rate=0.0)


@functools.partial(jax.jit, static_argnames="cfg")
def update(cfg, floats, state, batch):
    """One update of one observation and one action, compiled once for all values of the `floats` of its Config."""
    return td3_awr.make_agent(dataclasses.replace(cfg, **floats), Spec(1, 1)).update(state, batch)


def fill(tree, kernel, bias=0.0):
    """Linear networks with this kernel (inputs,) for one output, the same for every member of an ensemble."""

    def leaf(path, x):
        new = jnp.array(kernel, jnp.float32)[:, None] if "kernel" in jax.tree_util.keystr(path) else jnp.float32(bias)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


@functools.cache
def blank():
    return jax.jit(td3_awr.make_agent(LINEAR, Spec(1, 1)).init)(jax.random.key(0))


def linear_state(actor=(0.0, 0.0), critic=(0.0, 0.0), value=(0.0, 0.0), target_actor=None, target_critic=None):
    """`actor`: weight and bias before the tanh; `critic`: weights of (obs, action); `value`: weight and bias."""
    state = blank()
    target_actor, target_critic = target_actor or actor, target_critic or critic
    return state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, actor[:1], actor[1])),
        critic=state.critic._replace(params=fill(state.critic.params, critic)),
        value=state.value._replace(params=fill(state.value.params, value[:1], value[1])),
        target_actor=fill(state.target_actor, target_actor[:1], target_actor[1]),
        target_critic=fill(state.target_critic, target_critic),
    )


def batch_of(obs, action, reward=0.0, next_obs=0.0, terminal=0.0, next_action=0.0):
    n = len(obs)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    obs, action, next_action = (column(jnp.array(x))[:, None] for x in (obs, action, next_action))
    return Transition(obs, action, column(reward), column(next_obs)[:, None], column(terminal), next_action)


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


def of_bias(tree):
    (bias,) = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if path[-1].key == "bias"]
    return bias


def test_expectile_loss():
    # 0.7 of a positive difference's square, 0.3 of a negative one's
    np.testing.assert_allclose(td3_awr.expectile_loss(jnp.array([2.0, -2.0]), 0.7), [2.8, 1.2], rtol=1e-6)


def test_value_is_regressed_on_the_smaller_new_critic():
    # Critics 2 a and a; a = 1 and -1, so that the smaller is 1 and -2; V = 0. Loss 0.9 / 2 + 0.1 * 4 / 2 = 0.65.
    state = linear_state(critic=(0.0, 2.0), target_critic=(0.0, 9.0))
    smaller = jax.tree.map(lambda x: x.at[1].set(x[1] / 2), state.critic.params)
    state = state._replace(critic=state.critic._replace(params=smaller))
    batch = batch_of([0.0, 0.0], [1.0, -1.0])
    _, info = update(STILL, {"expectile": 0.9}, state, batch)
    np.testing.assert_allclose(info["value_loss"], 0.65, rtol=1e-5)
    # Of the critics from after their step: with one of 0.1 in each weight, Q(s, a) is 0.1 b + 1.1 a or 0.1 b + 2.1 a
    after, info = update(LINEAR, {"expectile": 0.9, "learning_rate": 0.1}, state, batch)
    q = td3_awr.Critic(2, ()).apply(after.critic.params, batch.obs, batch.action).min(axis=0)
    assert np.abs(q - jnp.array([1.0, -2.0])).min() > 0.05
    np.testing.assert_allclose(info["value_loss"], td3_awr.expectile_loss(q, 0.9).mean(), rtol=1e-4)


def test_weights_are_of_the_rows_own_advantage():
    # Q = a and V = 0.25, beta = 2: weights exp(2 (a - 0.25)) = (e^0.5, e^-1.5) = (1.648721, 0.223130) of rows a = (0.5,
    # -0.5), whose distances from pi = tanh(9) = 1 are 0.25 and 2.25: the mean product is 0.457108. (The product of the
    # means, that of an accidental matrix, is 1.169907.)
    state = linear_state(actor=(0.0, 9.0), critic=(0.0, 1.0), value=(0.0, 0.25))
    _, info = update(STILL, {"beta": 2.0}, state, batch_of([1.0, 1.0], [0.5, -0.5]))
    np.testing.assert_allclose(info["weight"], (1.648721 + 0.223130) / 2, rtol=1e-5)
    np.testing.assert_allclose(info["bc_loss"], 0.457108, rtol=1e-4)


def test_value_takes_its_step_before_the_weights():
    # V = 0, Q = a = 0.5: Adam's first step of the value's bias is +0.1, and the weight exp(0.5 - V(s)) at s = 0. The
    # critics are right (y = r = 0.5), and do not move.
    state = linear_state(critic=(0.0, 1.0))
    batch = batch_of([0.0, 0.0], 0.5, reward=0.5, terminal=1.0)
    after, info = update(LINEAR, {"learning_rate": 0.1, "beta": 1.0}, state, batch)
    np.testing.assert_allclose(of_bias(after.value.params), [0.1], rtol=1e-4)
    np.testing.assert_allclose(info["weight"], np.exp(0.4), rtol=1e-4)


def test_weights_are_clipped_and_finite():
    # exp(beta A) reaches 100 at A = ln(100) / 3 = 1.5351
    state = linear_state(actor=(0.0, 0.5), critic=(0.0, 1.0))
    for action, weight in ((1.0, np.exp(3)), (1.5, np.exp(4.5)), (1.6, 100), (1e4, 100)):
        new, info = update(STILL, {}, state, batch_of([1.0, 1.0], action))
        np.testing.assert_allclose(info["weight"], weight, rtol=1e-4)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.actor))


def test_weighted_regression_and_the_pull_of_q():
    # The slope of the loss in pi's bias b at pi = tanh(b). Actions -0.5 and 0.5 that weigh 1 to 3 (Q = a, beta = ln 3,
    # V = -0.5): at alpha 0 it is 0 at their weighted mean 0.25. There E|Q(s, pi)| = 0.25, so that alpha = 0.5 adds
    # -(0.5 / 0.25) dQ/da = -2, times dpi/db = 1 - 0.25^2.
    state = linear_state(actor=(0.0, np.arctanh(0.25)), critic=(0.0, 1.0), value=(0.0, -0.5))
    for alpha, slope in ((0.0, 0.0), (0.5, -2 * (1 - 0.25**2))):
        new, _ = update(STILL, {"alpha": alpha, "beta": np.log(3.0)}, state, batch_of([1.0, 1.0], [-0.5, 0.5]))
        np.testing.assert_allclose(of_bias(gradient(new.actor)), [slope], atol=1e-5)


def test_the_actor_follows_the_smaller_critic():
    # Critics a and -a at pi = tanh(b), b > 0: the smaller is -a, and its slope in b is -(1 - pi^2), scaled by 2.5 / pi;
    # beta = 0 and the data's action is pi's own, so that cloning adds nothing
    state, pi = linear_state(actor=(0.0, 0.5), critic=(0.0, 1.0)), np.tanh(0.5)
    other = jax.tree.map(lambda x: x.at[1].set(-x[1]), state.critic.params)
    state = state._replace(critic=state.critic._replace(params=other))
    new, _ = update(STILL, {"beta": 0.0}, state, batch_of([1.0, 1.0], pi))
    np.testing.assert_allclose(of_bias(gradient(new.actor)), [2.5 / pi * (1 - pi**2)], rtol=1e-4)


def test_target_is_penalised_for_leaving_the_datas_next_action():
    # Target actor tanh(9) = 1, target critics 2 s' + 3 a' at s' = 0.5: 4. The data's next action is -0.5, two
    # dimensions would add: 4 - 0.1 * 1.5^2 = 3.775; y = 1 + 0.99 * 3.775 = 4.73725 where the episode goes on, 1 at a
    # terminal. Q = 0: the loss is that of 2 critics.
    state = linear_state(target_actor=(0.0, 9.0), target_critic=(2.0, 3.0))
    batch = batch_of([0.0, 0.0], 0.0, reward=1.0, next_obs=0.5, terminal=jnp.array([0.0, 1.0]), next_action=-0.5)
    _, info = update(STILL, {"critic_bc": 0.1}, state, batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (4.73725**2 + 1) / 2, rtol=1e-4)
    # and without the penalty TD3's, 1 + 0.99 * 4 = 4.96
    _, info = update(STILL, {"critic_bc": 0.0}, state, batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (4.96**2 + 1) / 2, rtol=1e-4)


def test_the_penalty_is_of_the_noisy_action_and_summed_over_dimensions():
    # Two dimensions, target actor at 0 with noise of deviation 1000 clipped to +-0.5: |a~ - a'|^2 = 0.25 + 0.25
    cfg = dataclasses.replace(STILL, policy_noise=1000.0, critic_bc=1.0)
    agent = td3_awr.make_agent(cfg, Spec(1, 2))
    state = jax.tree.map(lambda x: 0 * x, jax.jit(agent.init)(jax.random.key(0))._replace(key=None))
    row = jnp.zeros((512, 2))
    batch = Transition(row[:, :1], row, row[:, 0], row[:, :1], row[:, 0], row)
    _, info = jax.jit(agent.update)(state._replace(key=jax.random.key(0)), batch)
    np.testing.assert_allclose(info["critic_loss"], 2 * (0.99 * 0.5) ** 2, rtol=1e-2)


def test_beta_zero_and_no_penalty_is_td3_bc_bit_for_bit():
    # TD3+BC's actor follows the first critic: the second is made the larger one, everywhere and for good
    k = jax.random.split(jax.random.key(1), 5)
    obs, next_obs = (jax.random.normal(key, (8, 3)) for key in k[:2])
    action = jax.random.uniform(k[2], (8, 2), minval=-1)
    batch = Transition(obs, action, jax.random.normal(k[3], (8,)), next_obs, jnp.zeros(8), action)
    common = dict(hidden=(8,), learning_rate=3e-4, tau=0.005)
    ours = td3_awr.make_agent(td3_awr.Config(**common, beta=0.0, critic_bc=0.0), Spec(3, 2))
    theirs = td3_bc.make_agent(td3_bc.Config(**common), Spec(3, 2))

    def raise_second(path, x):
        return x.at[1].add(100.0) if path[-1].key == "bias" and x.shape[-1] == 1 else x

    state = jax.jit(theirs.init)(jax.random.key(0))
    critic = jax.tree_util.tree_map_with_path(raise_second, state.critic.params)
    state = state._replace(critic=state.critic._replace(params=critic), target_critic=critic)
    value = jax.jit(ours.init)(jax.random.key(0)).value
    mine = td3_awr.State(**state._asdict(), value=value)
    mine = mine._replace(actor=td3_awr.Trainable(*state.actor), critic=td3_awr.Trainable(*state.critic))
    step, other = jax.jit(ours.update), jax.jit(theirs.update)
    for _ in range(4):
        mine, state = step(mine, batch)[0], other(state, batch)[0]
        for name in ("actor", "critic"):
            chex.assert_trees_all_equal(tuple(getattr(mine, name)), tuple(getattr(state, name)))
            chex.assert_trees_all_equal(getattr(mine, f"target_{name}"), getattr(state, f"target_{name}"))


def test_actor_value_and_targets_wait_for_every_second_update():
    agent = td3_awr.make_agent(td3_awr.Config(hidden=(8,)), Spec(1, 1))
    states, infos = [jax.jit(agent.init)(jax.random.key(0))], []
    batch = batch_of([0.3, -2.0, 1.1], [0.5, -0.2, 0.9], reward=1.0)
    for turn in agent.cycle * 2:
        state, info = jax.jit(turn)(states[-1], batch)
        states.append(state)
        infos.append(info)
    for name in ("actor", "value", "target_actor", "target_critic"):
        last = [jax.tree.leaves(getattr(state, name))[-2] for state in states]
        moved = [not np.array_equal(*pair) for pair in zip(last, last[1:], strict=False)]
        assert moved == [False, True, False, True], name
    assert ["value_loss" in info for info in infos] == [False, True, False, True]


def test_load_data_asks_for_the_next_action(monkeypatch):
    asked = {}
    monkeypatch.setattr(td3_awr, "load_dataset", lambda name, **options: asked.update(options))
    td3_awr.load_data(td3_awr.Config())
    assert asked["columns"] == ("next_action",) and asked["normalize_obs"] and asked["reward_shift"] == -1


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        td3_awr.make_agent(td3_awr.Config(), Spec(3, 4, discrete=True))
