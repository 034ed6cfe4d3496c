"""Diffusion-QL against numbers worked out by hand: its schedule and sampler with an exact model, then its losses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import modes
import numpy as np
import pytest
from modes import ABAR, BETA, set_layers

from algos import diffusion_ql
from common.datasets import Transition
from common.environments import Spec

# --- Schedule and sampler ------------------------------------------------------------------------------------


def test_the_schedule_of_five_steps():
    """beta_t = 1 - exp(-bmin / T - (bmax - bmin) (2 t - 1) / (2 T^2)); the posterior is that of two Gaussians."""
    steps = diffusion_ql.schedule(5)
    np.testing.assert_allclose(steps.signal, [0.896730, 0.659680, 0.398121, 0.197109, 0.080058], rtol=1e-5)
    np.testing.assert_allclose(steps.noise, [0.442577, 0.751546, 0.917333, 0.980382, 0.996790], rtol=1e-5)
    np.testing.assert_allclose(steps.from_start, [1, 0.728435, 0.498410, 0.312681, 0.165654], rtol=1e-5)
    np.testing.assert_allclose(steps.from_noisy, [0, 0.255116, 0.405078, 0.433466, 0.392901], rtol=1e-5)
    np.testing.assert_allclose(steps.std**2, [0, 0.159114, 0.426742, 0.660907, 0.807766], rtol=1e-5)
    assert steps.from_noisy[0] == steps.std[0] == 0 and steps.from_start[0] == 1  # so an action is within its bounds


@pytest.mark.parametrize("num_steps", [1, 5, 100])
def test_nearly_nothing_is_left_of_the_action_whatever_the_number_of_steps(num_steps):
    # abar_T = exp(-0.1 - 9.9 / 2)
    np.testing.assert_allclose(diffusion_ql.schedule(num_steps).signal[-1] ** 2, 0.0064093, rtol=1e-4)


def test_noise_is_added_by_the_step_of_each_row():
    # At the third step 0.398121 * 0.5 + 0.917333 * 1
    action, noise = jnp.array([[0.5, 0.5], [0.5, -0.5]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    noisy = diffusion_ql.add_noise(action, noise, jnp.array([2, 0]), 5)
    expect = [[1.116393, 0.199061], [0.448365, 0.442577 - 0.448365]]
    np.testing.assert_allclose(noisy, expect, rtol=1e-5)


def exact_samples(num_steps, n=100_000):
    steps = diffusion_ql.schedule(num_steps)

    def predict(x, t):
        return modes.exact(x, steps.signal[t][..., None], steps.noise[t][..., None])

    return jax.jit(lambda key: diffusion_ql.sample(predict, key, (n, 1), num_steps))(jax.random.key(0))


@pytest.mark.parametrize(
    "num_steps, expect", [(5, (0.8223, 0.2705, 0.2714)), (20, (0.7719, 0.2719, 0.4169)), (50, (0.7595, 0.2595, 0.4274))]
)
def test_samples_of_an_exact_model(num_steps, expect):
    """Integrals over the sampler's transitions. A correct one of 5 steps has 0.82 in the larger mode, and not 0.75."""
    np.testing.assert_allclose(modes.of_samples(exact_samples(num_steps)), expect, atol=0.005)


def test_a_point_is_hit_from_every_noise():
    steps = diffusion_ql.schedule(5)

    def predict(x, t):
        return (x - steps.signal[t][..., None] * 0.3) / steps.noise[t][..., None]

    action = diffusion_ql.sample(predict, jax.random.key(0), (100, 2), 5)
    np.testing.assert_allclose(action, 0.3, atol=1e-5)


def test_estimates_of_the_action_are_clipped_at_each_step():
    # A model that sees no noise: x_0 is estimated as x_T / 0.08, mostly beyond the bounds. Unclipped, x_1 would be some
    # 6 in size and so 99 % of the actions on a bound. Clipped, the estimates pull x to within the bounds.
    action = diffusion_ql.sample(lambda x, t: jnp.zeros_like(x), jax.random.key(0), (20_000, 1), 5)
    assert np.abs(action).max() == 1
    assert 0.4 < np.mean(np.abs(action) == 1) < 0.9


def test_a_gradient_goes_through_every_step():
    """Also of the first, the noisiest: a model with a parameter of its own for each step."""

    def loss(theta):
        return diffusion_ql.sample(lambda x, t: x + theta[t][..., None], jax.random.key(0), (64, 1), 5).mean()

    assert np.all(np.abs(jax.grad(loss)(jnp.zeros(5))) > 1e-4)


# --- Losses: linear networks with numbers of ours --------------------------------------------------------------

BASE = {f.name: getattr(diffusion_ql.Config(), f.name) for f in dataclasses.fields(diffusion_ql.Config)}
FLOATS = {name: jnp.float32(x) for name, x in BASE.items() if isinstance(x, float)}
LAYER = "['MLP_1']['Dense_0']['linear']"  # the one of an actor without hidden layers; MLP_0 is that of the step
FLOATS |= {"actor_learning_rate": 0.0, "critic_learning_rate": 0.0, "max_grad_norm": 1e9, "eta": 1.0}


@functools.cache
def program(obs_dim, action_dim, **counts):
    """A state of zeros, and jitted update and act. Config's floats are arguments."""

    def agent(floats):
        cfg = diffusion_ql.Config(hidden=(), **counts)
        return diffusion_ql.make_agent(dataclasses.replace(cfg, **floats), Spec(obs_dim, action_dim))

    shapes = jax.eval_shape(agent({}).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    update = jax.jit(lambda floats, state, batch: agent(FLOATS | floats).update(state, batch))
    act = jax.jit(lambda state, obs, key: agent({}).act(state, obs, key))
    return state._replace(key=jax.random.key(0)), update, act


def actor_of(params, bias, noisy=0.0, of_obs=0.0):
    """An actor that predicts noisy * x + of_obs * obs + bias, all of one number: x is its first input, obs the last."""
    kernel = jnp.zeros(leaf(params, f"{LAYER}['kernel']").shape).at[0, 0].set(noisy).at[-1, 0].set(of_obs)
    return set_layers(params, {f"{LAYER}['kernel']": kernel, f"{LAYER}['bias']": bias})


def critic_of(params, rows, bias=0.0):
    """Critics of these weights of (obs, action): a row for each."""
    return set_layers(params, {"kernel": jnp.array(rows, jnp.float32)[..., None], "bias": jnp.array(bias)[..., None]})


def with_networks(state, actor=None, critic=None, target_actor=None, target_critic=None):
    return state._replace(
        actor=state.actor if actor is None else state.actor._replace(params=actor),
        critic=state.critic if critic is None else state.critic._replace(params=critic),
        target_actor=state.target_actor if target_actor is None else target_actor,
        target_critic=state.target_critic if target_critic is None else target_critic,
    )


def batch_of(obs, action=0.0, reward=0.0, terminal=0.0, action_dim=1):
    obs = jnp.asarray(obs, jnp.float32)
    column = jnp.zeros(len(obs))
    return Transition(obs, jnp.zeros((len(obs), action_dim)) + action, column + reward, obs, column + terminal)


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[1][0].mu)  # after one update of Adam, mu = (1 - b1) g


def leaf(tree, part):
    (found,) = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if part in jax.tree_util.keystr(path)]
    return found


def test_the_target_is_of_the_target_policy_and_the_smaller_target_critic():
    # A policy that sees much positive noise acts by -1, and the online one by 1. Q1 = 3 a and Q2 = 2 a + 0.5 there are
    # -3 and -1.5, so y = 1 - 3 * 0.99 = -1.97, and 1 in terminal rows. The critics say 0, so their loss is 2 E[y^2].
    # Only next_obs counts, and this is 0: of obs 1, the policy would act by 1, and Q1 and Q2 would be larger by 5.
    state, update, _ = program(1, 1)
    state = with_networks(
        state,
        actor=actor_of(state.target_actor, -1e4),
        target_actor=actor_of(state.target_actor, 1e4, of_obs=-2e4),
        target_critic=critic_of(state.target_critic, [[5, 3], [5, 2]], [0.0, 0.5]),
    )
    batch = batch_of(np.ones((4, 1)), reward=1.0, terminal=jnp.array([0.0, 0, 0, 1]))
    _, info = update({}, state, batch._replace(next_obs=jnp.zeros((4, 1))))
    np.testing.assert_allclose(info["critic_loss"], 2 * (3 * 1.97**2 + 1) / 4, rtol=1e-4)


def test_the_best_next_action_is_chosen_for_each_critic_before_the_smaller_one():
    # Q1 = 1 + 2 a and Q2 = 1 - a, on [-1, 1]: the best are 3 and 2, of which 2 is smaller. (The smaller one of the two
    # is at most 1, at a = 0.) Without noise in its prediction the policy is on either bound in most of its 64 draws.
    state, update, _ = program(1, 1, num_next_samples=64)
    state = with_networks(state, target_critic=critic_of(state.target_critic, [[0, 2], [0, -1]], [1.0, 1.0]))
    _, info = update({}, state, batch_of(np.zeros((8, 1)), reward=1.0))
    np.testing.assert_allclose(info["critic_loss"], 2 * (1 + 0.99 * 2) ** 2, rtol=1e-4)


# Rows are one-hot, so that a critic's weights of obs are its values of the two rows, whatever the action
ROWS, CRITICS = np.eye(2), [[2.0, -4, 0], [1, 3, 0]]


def test_q_is_scaled_by_the_mean_size_of_the_other_critic():
    # Q1 = (2, -4), Q2 = (1, 3): -mean Q1 / mean|Q2| = 1 / 2, and -mean Q2 / mean|Q1| = -2 / 3, each in half of the
    # updates. (By its own size it would be 1 / 3 and -1.) eta = 3 times that.
    state, update, _ = program(2, 1)
    state = with_networks(state, critic=critic_of(state.target_critic, CRITICS))
    keys = jax.random.split(jax.random.key(1), 200)
    info = jax.jit(jax.vmap(lambda key: update({"eta": 3.0}, state._replace(key=key), batch_of(ROWS))[1]))(keys)
    term = (info["actor_loss"] - info["bc_loss"]) / 3
    first = np.abs(term - 0.5) < 1e-4
    np.testing.assert_allclose(term[~first], -2 / 3, rtol=1e-4)
    assert 70 < first.sum() < 130


def test_the_scale_of_the_critics_does_not_matter_and_without_q_it_is_cloning():
    state, update, _ = program(2, 1)

    def new_actor(critics, **floats):
        at = with_networks(state, critic=critic_of(state.target_critic, critics))
        return update({"actor_learning_rate": 0.1, **floats}, at, batch_of(ROWS, action=0.3))[0].actor.params

    critics = np.array(CRITICS) + [0, 0, 1]  # with the action
    chex.assert_trees_all_close(new_actor(critics), new_actor(100 * critics), rtol=1e-4, atol=1e-6)
    cloned = new_actor(critics, eta=0.0)
    chex.assert_trees_all_equal(cloned, new_actor(0 * critics + 5, eta=0.0))  # whatever Q says
    moved = jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), cloned, new_actor(critics)))
    assert max(moved) > 0.01


def test_cloning_is_a_mean_over_the_dimensions_and_q_goes_through_all_steps(monkeypatch):
    # All noise is 0.02, so that nothing is clipped, and the policy predicts 0. Cloning: 0.02^2 on average over the
    # dimensions; its gradient in the bias of one dimension of two is 2 (0 - 0.02) / 2. Without clips the mean of a step
    # is (x - beta eps / sqrt(1 - abar)) / sqrt(1 - beta), so x' = dx / dbias follows x' <- (x' - beta / sqrt(1 - abar))
    # / sqrt(1 - beta). Q1 = Q2 = 5 + 2 a_1: the gradient of the other term is -eta 2 x' / (5 + 2 x), for the first
    # dimension alone.
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, 0.02))
    state, update, _ = program(1, 2, num_next_samples=2)  # of its own, since it is traced with that noise
    state = with_networks(state, critic=critic_of(state.target_critic, [[0, 2, 0]] * 2, [5.0, 5.0]))
    new, info = update({"eta": 3.0}, state, batch_of(np.zeros((4, 1)), action_dim=2))
    np.testing.assert_allclose(info["bc_loss"], 0.02**2, rtol=1e-5)
    x, slope = 0.02, 0.0
    std = np.sqrt(BETA * (1 - np.append(1, ABAR[:-1])) / (1 - ABAR))
    for beta, abar, deviation in zip(BETA[::-1], ABAR[::-1], std[::-1], strict=True):
        x = x / np.sqrt(1 - beta) + 0.02 * deviation
        slope = (slope - beta / np.sqrt(1 - abar)) / np.sqrt(1 - beta)
    assert 0.3 < x < 0.9 and slope < -10  # the last step alone: -0.49
    expect = [-0.02 - 3 * 2 * slope / (5 + 2 * x), -0.02]
    np.testing.assert_allclose(leaf(gradient(new.actor), f"{LAYER}['bias']"), expect, rtol=1e-3)


class Echo:
    """A network without parameters, which predicts that the noise is what it is shown."""

    def init(self, key, *inputs):
        return {}

    def apply(self, params, obs, noisy, t, **options):
        return noisy


def test_cloning_learns_every_step_alike(monkeypatch):
    # With x_t = eps + t and a network that returns x_t, the squared error is t^2. For t = 0 .. 4, all as
    # likely, its mean is 30 / 5 = 6; without the last step it is 3.5, without the first one 7.5
    monkeypatch.setattr(diffusion_ql, "NoiseMLP", lambda *sizes: Echo())
    monkeypatch.setattr(diffusion_ql, "add_noise", lambda action, noise, t, num_steps: noise + t[..., None])
    agent = diffusion_ql.make_agent(diffusion_ql.Config(hidden=()), Spec(1, 1))
    state = agent.init(jax.random.key(0))
    _, info = jax.jit(agent.update)(state, batch_of(np.zeros((10_000, 1)), reward=1.0))
    np.testing.assert_allclose(info["bc_loss"], 6, atol=0.3)


def test_the_actor_climbs_the_critics_of_this_update():
    """The reference's order: Q first. With large steps of the critics the actor's gradient is another one."""
    state, update, _ = program(2, 1)
    state = with_networks(state, critic=critic_of(state.target_critic, np.array(CRITICS) + [0, 0, 1]))
    at_once, later = (
        update({"critic_learning_rate": rate}, state, batch_of(ROWS, action=0.3, reward=9.0))[1]["actor_loss"]
        for rate in (0.0, 1.0)
    )
    assert abs(at_once - later) > 0.01


def test_the_target_policy_moves_in_every_fifth_update_and_the_target_critic_in_all():
    state, update, _ = program(1, 1)
    rates = {"actor_learning_rate": 0.1, "critic_learning_rate": 0.1}
    moved = []
    for _ in range(11):
        new, _ = update(rates, state, batch_of(np.zeros((4, 1)), action=0.3, reward=1.0))
        same = jax.tree.map(lambda x, y: bool((x == y).all()), new.target_actor, state.target_actor)
        moved.append(not all(jax.tree.leaves(same)))
        expect = jax.tree.map(lambda x, y: 0.05 * x + 0.95 * y, new.critic.params, state.target_critic)
        chex.assert_trees_all_close(new.target_critic, expect, rtol=1e-5)
        if moved[-1]:
            expect = jax.tree.map(lambda x, y: 0.05 * x + 0.95 * y, new.actor.params, state.target_actor)
            chex.assert_trees_all_close(new.target_actor, expect, rtol=1e-5, atol=1e-8)
        state = new
    assert [i for i, x in enumerate(moved) if x] == [0, 5, 10]


def test_long_gradients_are_scaled_down_to_their_greatest_length():
    state, update, _ = program(1, 1)
    batch = batch_of(np.ones((4, 1)), action=0.3, reward=100.0)
    long, short = (update({"max_grad_norm": norm}, state, batch)[0].critic for norm in (1e9, 2.0))
    length = lambda trainable: np.sqrt(sum((x**2).sum() for x in jax.tree.leaves(gradient(trainable))))  # noqa: E731
    assert length(long) > 100
    np.testing.assert_allclose(length(short), 2.0, rtol=1e-4)


# --- Acting: two actions, -1 and 1 with probabilities 3/4 and 1/4 ----------------------------------------
# With one step, a = clip((x - sqrt(1 - abar) eps) / sqrt(abar)) of x ~ N(0, 1). For eps = 6745 - 10,000 x it is the
# sign of x - 0.6745, the third quartile: 1 in a quarter of the draws.


def two_actions(num_act_samples, low, high):
    """(act, state): target critics (low, high + 3) and (low + 5, high) of the two actions: each is once the smaller."""
    state, _, act = program(1, 1, num_steps=1, num_act_samples=num_act_samples)
    actor = actor_of(state.target_actor, 6745.0, -1e4)
    slopes = [[0, (high + 3 - low) / 2], [0, (high - low - 5) / 2]]
    target = critic_of(state.target_critic, slopes, [(high + 3 + low) / 2, (high + low + 5) / 2])
    return act, with_networks(state, actor=actor, target_critic=target)


def test_with_one_sample_it_acts_by_the_model_alone():
    act, state = two_actions(1, 1, 2)
    action = act(state, jnp.zeros((2000, 1)), jax.random.key(0))
    assert np.mean(np.abs(action) == 1) > 0.99
    np.testing.assert_allclose(np.mean(action > 0), 0.25, atol=0.03)
    np.testing.assert_array_equal(action, act(two_actions(1, 51, -49)[1], jnp.zeros((2000, 1)), jax.random.key(0)))


def test_it_draws_among_many_by_the_softmax_of_the_smaller_target_critic():
    # Q = 1 and 2: e^2 / 4 against 3 e / 4, so that P(1) = 0.475367. By the mean of the critics it is 0.25, by the
    # first one 0.95, by the second one and by the larger one at most 0.02
    act, state = two_actions(500, 1, 2)
    action = act(state, jnp.zeros((2000, 1)), jax.random.key(0))
    np.testing.assert_allclose(np.mean(action > 0), 0.475367, atol=0.04)


# --- Small problems ------------------------------------------------------------------------------------------------


def test_it_learns_what_the_exact_model_draws_and_with_q_the_rare_mode_that_is_better(optimised):
    """Two modes, each an episode of one step. Only -1/2 earns a reward, and a fourth of the data is of it."""
    action, obs = modes.data(64), jnp.zeros((64, 1))
    data = Transition(obs, action, jnp.where(action[:, 0] < 0, 1.0, 0.0), obs, jnp.ones(64))

    def draws(eta):
        rates = {"actor_learning_rate": 5e-4, "log_interval": 1000}
        cfg = diffusion_ql.Config(hidden=(32, 32), num_act_samples=1, eta=eta, **rates)
        agent = diffusion_ql.make_agent(cfg, Spec(1, 1))
        state, _ = diffusion_ql.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)
        return agent.act(state, jnp.zeros((2000, 1)), jax.random.key(1))

    cloned, improved = jax.jit(jax.vmap(draws))(jnp.array([0.0, 1.0]))
    # See above for the numbers. One Gaussian of the modes' mean and deviation would have P(a > 0) = 0.72
    np.testing.assert_allclose(modes.of_samples(cloned), (0.8223, 0.2705, 0.2714), atol=0.06)
    assert np.mean(improved < 0) > 0.8
