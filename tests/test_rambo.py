"""RAMBO against numbers worked out by hand. What it shares with MBPO is tested there; here, that it is shared."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mbpo
from test_mbpo import KEY, KNOWN, rows

from algos import mbpo, rambo
from common.environments import Spec

LINEAR = rambo.Config(**dataclasses.asdict(test_mbpo.LINEAR), adversary_updates=1)


def as_ours(state):
    """MBPO's state, as RAMBO's: the adversary's Adam as it starts."""
    ours = {name: rambo.Trainable(*x) if hasattr(x, "params") else x for name, x in state._asdict().items()}
    start = jax.tree.map(jnp.zeros_like, state.model.opt_state)
    own = {"buffer": rambo.Buffer(*state.buffer), "snapshot": rambo.Trainable(state.snapshot, start)}
    return rambo.State(**ours | own | {"report": state.report | dict.fromkeys(rambo.PROVOKED, jnp.zeros(()))})


def adversary_state(cfg, spec=KNOWN, **options):
    """A state after the first roll-out, with noise within bounds of +-40 and with critics Q(s, a) = s."""
    state = as_ours(test_mbpo.linear_state(cfg, spec, **options))
    params = {**state.snapshot.params["params"], "max_log_var": -state.snapshot.params["params"]["min_log_var"]}
    slope = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[:, 0].set(1.0) if path[-1].key == "kernel" else x, state.critic.params
    )
    return state._replace(
        snapshot=state.snapshot._replace(params={"params": params}),
        buffer=state.buffer._replace(size=jnp.int32(1)),
        critic=state.critic._replace(params=slope),
        target_critic=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), state.target_critic),  # not asked
    )


def prepare(cfg, state, data, spec=KNOWN):
    return jax.jit(lambda state: rambo.make_agent(cfg, spec).prepare(state, data)[0])(state)


def test_the_density_of_a_mixture():
    # N(0, 1) and N(1, 0.5^2) at 0.3, each half of it
    mean, log_var = jnp.array([[[0.0]], [[1.0]]]), jnp.array([[[0.0]], [[2 * np.log(0.5)]]])
    target = jnp.full((2, 1, 1), 0.3)
    value, slope = jax.value_and_grad(lambda mean: rambo.log_mixture(target, mean, log_var)[0])(mean)
    np.testing.assert_allclose(value, -1.077571, rtol=1e-5)
    np.testing.assert_allclose(slope[:, 0, 0], [0.168051, -1.231523], rtol=1e-5)


def test_the_density_has_no_bounds():
    # 28 outputs at the means with deviation e^-5, 28 (5 - log(2 pi) / 2) = 114.3; and 300 deviations away. Densities
    # themselves are infinite or 0 in float32
    for target, value in ((0.0, 114.2699), (300 * np.exp(-5), 114.2699 - 28 * 300**2 / 2)):
        log_p = rambo.log_mixture(jnp.full((2, 1, 28), target), jnp.zeros((2, 1, 28)), jnp.full((2, 1, 28), -10.0))
        np.testing.assert_allclose(log_p, [value], rtol=1e-4)


def test_advantages_are_relative_to_their_batch():
    advantage = jnp.array([1.0, 2.0, 3.0, 6.0])
    unit = rambo.standardise(advantage)
    np.testing.assert_allclose([unit.mean(), unit.std()], [0, 1], atol=1e-6)
    np.testing.assert_allclose(rambo.standardise(100 + advantage), unit, atol=1e-5)
    np.testing.assert_array_equal(rambo.standardise(jnp.full(4, 7.0)), 0)


def test_the_adversary_lowers_what_is_better_than_expected():
    # d/dmu of lambda E[A (r - mu)^2 / (-2 sigma^2)] is lambda E[A (r - mu)] / sigma^2 = lambda / sigma = 3e-3, of the
    # reward, whose deviation is 0.1, for it alone is worth something where Q = 0. The data are at the model's means
    cfg = dataclasses.replace(LINEAR, batch_size=8_192, adversary_weight=3e-4, weight_decay=0.0)
    noise = 2 * np.log(0.1)
    state = adversary_state(cfg, bias=[1.0, 5.0, noise, noise])
    state = state._replace(critic=state.critic._replace(params=jax.tree.map(jnp.zeros_like, state.critic.params)))
    state = prepare(cfg, state, rows(np.zeros(20), reward=5.0, next_obs=1.0))
    np.testing.assert_allclose(test_mbpo.gradient(state.snapshot)["bias"][0, :2], [0, 3e-3], atol=2e-4)
    np.testing.assert_allclose(state.report["advantage"], 5.0, atol=0.02)
    moved = [x for path, x in jax.tree_util.tree_leaves_with_path(state.snapshot.params) if path[-1].key == "bias"]
    assert moved[0][0, 1] < 5.0


@pytest.mark.parametrize("updates, expect", [(1, 5.8), (2, 5.7), (3, 5.8)])
@pytest.mark.parametrize("reach, lost", [(9.0, 0.0), (0.5, 1.0)])
def test_advantage_of_a_path_in_the_model(updates, expect, reach, lost):
    # Q(s, a) = s, r = 5, s' = s + 1 without noise, from s = 1, paths of 2 steps: 5 + 0.9 * 2 - 1 = 5.8, then
    # 5 + 0.9 * 3 - 2 = 5.7, and again from the start. Where s' ends the episode its value is lost, and the path goes on
    spec = Spec(1, 1, terminal_of=lambda next_obs: next_obs[..., 0] > reach)
    cfg = dataclasses.replace(LINEAR, adversary_updates=updates, discount=0.9, model_learning_rate=0.0)
    state = adversary_state(cfg, spec, bias=[1.0, 5.0, -1e3, -1e3])
    state = prepare(cfg, state, rows(np.ones(20), reward=5.0, next_obs=2.0), spec)
    value = expect - lost * 0.9 * (3.0 if updates == 2 else 2.0)
    np.testing.assert_allclose(state.report["advantage"], value, rtol=1e-5)


def test_what_follows_is_valued_at_the_mode_of_the_policy():
    # Q(s, a) = a, r = 5, pi = tanh(N(arctanh 0.5, 1)): A = 5 + 0.9 * 0.5 - a on average, with a drawn as in a roll-out
    cfg = dataclasses.replace(LINEAR, batch_size=8_192, discount=0.9)
    state = adversary_state(cfg, bias=[1.0, 5.0, -1e3, -1e3], action=0.5)
    wide = lambda path, x: x.at[1].set(0.0) if path[-1].key == "bias" else x  # noqa: E731
    of_action = lambda path, x: x.at[:, :, 0].set(jnp.array([0.0, 1.0])) if path[-1].key == "kernel" else x  # noqa: E731
    state = state._replace(
        actor=state.actor._replace(params=jax.tree_util.tree_map_with_path(wide, state.actor.params)),
        critic=state.critic._replace(params=jax.tree_util.tree_map_with_path(of_action, state.critic.params)),
    )
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    drawn = np.tanh(np.arctanh(0.5) + points) @ weights / weights.sum()  # 0.32
    state = prepare(cfg, state, rows(np.ones(20), reward=5.0, next_obs=2.0))
    np.testing.assert_allclose(state.report["advantage"], 5 + 0.9 * 0.5 - drawn, atol=0.03)


def test_how_often_the_adversary_moves():
    # Not before the first roll-out, which is of the model as it was fitted; and never with lambda 0
    data = rows(np.arange(20.0), reward=1.0)
    for weight, size, count in ((3e-4, 0, 0), (3e-4, 1, 4), (0.0, 1, 0)):
        cfg = dataclasses.replace(LINEAR, adversary_updates=4, adversary_weight=weight)
        state = adversary_state(cfg)._replace(stale=jnp.full(1, 99.0))
        state = state._replace(buffer=state.buffer._replace(size=jnp.int32(size)))
        assert prepare(cfg, state, data).snapshot.opt_state[0].count == count


def test_members_that_are_no_elites_learn_from_the_data_alone():
    cfg = dataclasses.replace(LINEAR, num_members=2, adversary_weight=1e3, weight_decay=0.0)
    state = adversary_state(cfg, bias=[[1.0, 5.0, -1.0, -1.0]] * 2)._replace(error=jnp.array([2.0, 1.0]))
    slope = test_mbpo.gradient(prepare(cfg, state, rows(np.zeros(20), reward=5.0, next_obs=1.0)).snapshot)["bias"]
    np.testing.assert_allclose(slope[0, :2], 0, atol=1e-5)  # the data are at its means
    assert np.abs(slope[1, :2]).max() > 10


def test_the_adversarys_members_have_rows_of_the_data_of_their_own():
    # Equal members, and a game of no weight: on the same rows their gradients would be equal
    cfg = dataclasses.replace(LINEAR, num_members=2, adversary_weight=1e-30)
    state = adversary_state(cfg, bias=[1.0, 5.0, -1.0, -1.0])
    data = rows(np.zeros(20), reward=np.arange(20.0), next_obs=1.0)
    slope = test_mbpo.gradient(prepare(cfg, state, data).snapshot)["bias"]
    assert np.abs(slope[0, 1] - slope[1, 1]) > 0.01 * np.abs(slope[0, 1])


def test_the_first_phase_clones_the_data():
    # The policy is N(0, 1) before its tanh, the data's action tanh(1): log density -1.418939 - log(1 - tanh(1)^2), and
    # the slope of the mean, of minus that, is -1
    state = as_ours(test_mbpo.linear_state(test_mbpo.LINEAR))
    actor = jax.tree.map(jnp.zeros_like, state.actor.params)
    batch = jax.tree.map(lambda x: x[None], rows(np.zeros(8), action=np.tanh(1.0)))
    state, info = jax.jit(rambo.make_agent(LINEAR, KNOWN).pretrain)(
        state._replace(actor=state.actor._replace(params=actor)), batch
    )
    np.testing.assert_allclose(info["clone_loss"], 1.418939 + np.log(1 - np.tanh(1) ** 2), rtol=1e-4)
    np.testing.assert_allclose(test_mbpo.gradient(state.actor)["bias"][0], -1.0, rtol=1e-4)


def test_without_an_adversary_the_second_phase_is_mbpo_bit_for_bit():
    changes = dict(hidden=(8,), model_hidden=(8,), learning_rate=1e-3)
    ours = dataclasses.replace(LINEAR, **changes, adversary_weight=0.0, actor_learning_rate=1e-3)
    theirs = mbpo.Config(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(mbpo.Config)})
    rng = np.random.default_rng(0)
    data = rows(*rng.normal(size=(4, 40)), terminal=np.arange(40) % 5 == 0)
    without = jax.jit(mbpo.make_agent(theirs, KNOWN).init)(KEY)
    with_0 = as_ours(without)
    assert jax.tree.structure(with_0) == jax.tree.structure(jax.eval_shape(rambo.make_agent(ours, KNOWN).init, KEY))
    for phase in ("pretrain", "update"):
        with_0 = with_0._replace(actor=rambo.Trainable(*without.actor))  # not cloned
        with_0, _ = jax.jit(rambo.make_train(ours, rambo.make_agent(ours, KNOWN), phase))(with_0, data)
        without, _ = jax.jit(mbpo.make_train(theirs, mbpo.make_agent(theirs, KNOWN), phase))(without, data)
        chex.assert_trees_all_equal(with_0.snapshot.params, without.snapshot)
    for name in set(mbpo.State._fields) - {"key", "report", "snapshot"}:
        chex.assert_trees_all_equal(*(jax.tree.leaves(getattr(state, name)) for state in (with_0, without)))
