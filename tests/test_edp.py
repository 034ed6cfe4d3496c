"""EDP against numbers worked out by hand: its guess and its solver with exact models, then its losses."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import modes
import numpy as np
import pytest
from modes import set_layers

from algos import diffusion_ql, edp
from common.datasets import Transition
from common.environments import Spec

# --- Noise and guess -----------------------------------------------------------------------------------------


def test_five_steps_have_the_levels_of_diffusion_ql():
    signal, noise = edp.at_steps(jnp.arange(5), 5)
    np.testing.assert_allclose(signal[:, 0], [0.896730, 0.659680, 0.398121, 0.197109, 0.080058], rtol=1e-5)
    np.testing.assert_allclose(noise[:, 0], [0.442577, 0.751546, 0.917333, 0.980382, 0.996790], rtol=1e-5)
    theirs = diffusion_ql.schedule(1_000)
    signal, noise = edp.at_steps(jnp.arange(1_000), 1_000)
    np.testing.assert_allclose(signal[:, 0], theirs.signal, rtol=1e-6)
    np.testing.assert_allclose(noise[:, 0], theirs.noise, rtol=1e-5)


def test_the_first_of_a_thousand_steps_has_little_noise_and_float32_keeps_it():
    # abar_1 = exp(-1e-4 - 4.95e-6), so that 1 - abar_1 = 1.049445e-4
    signal, noise = edp.at_steps(jnp.array(0), 1_000)
    np.testing.assert_allclose(noise**2, 1.049445e-4, rtol=1e-5)
    np.testing.assert_allclose(signal, 0.9999475, rtol=1e-6)


def test_the_guess_undoes_the_noise():
    # At the third of five steps 0.398121 * 0.5 + 0.917333 * 1 = 1.116393. Of 0.9 of this noise the guess is too large
    # by 0.1 * 0.917333 / 0.398121 = 0.230416, of none it is 2.80 and clipped
    t, one = jnp.array([2]), jnp.ones((1, 1))
    noisy = edp.add_noise(0.5 * one, one, t, 5)
    np.testing.assert_allclose(noisy, 1.116393, rtol=1e-5)
    guesses = [edp.estimate(noisy, share * one, *edp.at_steps(t, 5)).item() for share in (1.0, 0.9, 0.0)]
    np.testing.assert_allclose(guesses, [0.5, 0.730416, 1.0], rtol=1e-5)


def test_with_one_step_the_guess_is_the_action_that_diffusion_ql_draws():
    key = jax.random.key(3)
    noisy = jax.random.normal(jax.random.split(key)[0], (100, 2))  # what its sampler starts from
    theirs = diffusion_ql.sample(lambda x, t: 0.5 * x + 0.1, key, (100, 2), 1)
    ours = edp.estimate(noisy, 0.5 * noisy + 0.1, *edp.at_steps(jnp.zeros(100, int), 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


# --- The solver ------------------------------------------------------------------------------------------------


def test_points_lie_at_equal_distances_and_orders_use_up_the_calls():
    numbers = edp.solver(1_000, 15)  # 1 - 0.0666 i of T
    np.testing.assert_allclose(numbers.t, 999 - 66.6 * np.arange(15), atol=1e-3)
    begins = {n: list(np.flatnonzero(edp.solver(1_000, n).begins)) for n in (1, 2, 3, 5, 7, 15)}
    assert begins == {1: [0], 2: [0], 3: [0, 2], 5: [0, 3], 7: [0, 3, 6], 15: [0, 3, 6, 9, 12, 14]}


def exact_samples(noise, model, num_steps, solver_steps):
    """What the solver makes of `noise` (n,), in the place of what it would draw, with a model(x, signal, noise)."""

    def predict(x, t):  # t may lie between the steps
        share = (t[..., None] + 1) / num_steps
        log_abar = -0.1 * share - 4.95 * share**2
        return model(x, jnp.exp(log_abar / 2), jnp.sqrt(-jnp.expm1(log_abar)))

    def sample(noise):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(jax.random, "normal", lambda key, shape: noise)
            return edp.sample(predict, jax.random.key(0), noise.shape, num_steps, solver_steps)

    return np.asarray(jax.jit(sample)(noise[:, None])[:, 0], np.float64)


@pytest.mark.parametrize("solver_steps", [1, 2, 3, 15])
def test_of_a_single_action_the_noise_stays_what_it_was(solver_steps):
    """x_T = 0.080058 c + 0.996790 eps goes to x_1 = 0.999948 c + 0.010244 eps: of a constant noise all are exact."""
    c, eps = -0.3, jnp.linspace(-3, 3, 7)
    start = 0.0800583 * c + 0.9967902 * eps
    actions = exact_samples(start, lambda x, signal, noise: (x - signal * c) / noise, 1_000, solver_steps)
    np.testing.assert_allclose(actions, 0.9999475 * c + 0.0102442 * eps, atol=1e-4)


@pytest.mark.parametrize("solver_steps, expect", [(5, 2.118e-4), (11, 2.555e-5), (4, 3.870e-4), (3, 4.297e-4)])
def test_a_gaussian_is_followed_with_the_error_of_the_paper_s_steps(solver_steps, expect):
    """Data N(0.1, 0.15^2). Their curve is x_t = signal 0.1 + sqrt(signal^2 0.15^2 + noise^2) z, with the same z always.

    The errors are those of the paper's algorithms, stage by stage in float64. With 3 k + 2 calls they fall as n^-3;
    with 3 k + 1 and 3 k the last step, of first order, has most of it.
    """
    m, s, z = 0.1, 0.15, jnp.linspace(-1, 1, 11)  # at t = T / 2 all within the bounds

    def model(x, signal, noise):
        return noise * (x - signal * m) / (signal**2 * s**2 + noise**2)

    def curve(log_abar):
        return np.exp(log_abar / 2) * m + np.sqrt(np.exp(log_abar) * s**2 - np.expm1(log_abar)) * z

    actions = exact_samples(curve(-5.05), model, 2, solver_steps)
    error = np.abs(actions - np.asarray(curve(-0.05 - 4.95 / 4), np.float64)).max()
    np.testing.assert_allclose(error, expect, rtol=0.03)


@pytest.mark.parametrize(
    "solver_steps, expect",
    [
        (4, (0.8004, 0.2423, 0.2777)),
        (6, (0.7574, 0.2389, 0.3583)),
        (15, (0.7443, 0.2441, 0.4331)),
        (20, (0.7438, 0.2486, 0.5056)),
    ],
)
def test_samples_of_an_exact_model(solver_steps, expect):
    """Of two modes, by the paper's algorithms on a million quantiles of the noise. After a last step of second order,
    as of 20 calls, actions lie beyond the modes; the reference's 15 end with one of first order."""
    n = 100_000
    noise = jax.scipy.special.ndtri((jnp.arange(n) + 0.5) / n)
    samples = exact_samples(noise, modes.exact, 1_000, solver_steps)
    np.testing.assert_allclose(modes.of_samples(samples), expect, atol=2e-3)


def test_guesses_are_clipped_at_each_call():
    # A model that sees no noise in the first half, where guesses are x / signal and mostly beyond the bounds, and then
    # that of the action 0.3. Of an x within 1 + 3 noise the end is within 0.3 + 0.0102 * 5. Without clips x would grow
    # to some 6 at t = T / 2, and the end be off by up to 0.3.
    def model(x, signal, noise):
        return jnp.where(signal < 0.5, 0.0, (x - signal * 0.3) / noise)

    actions = exact_samples(jnp.linspace(-3, 3, 101), model, 1_000, 15)
    assert np.abs(actions - 0.3).max() < 0.055


def test_actions_are_within_their_bounds():
    actions = exact_samples(jnp.linspace(-3, 3, 101), lambda x, signal, noise: (x - signal) / noise, 1_000, 15)
    assert actions.max() == 1 and actions.min() < 1  # 0.999948 + 0.010244 eps


def test_a_single_step_is_refused():
    with pytest.raises(SystemExit, match="num_steps must be at least 2"):
        edp.make_agent(edp.Config(num_steps=1), Spec(1, 1))


# --- Losses: linear networks with numbers of ours --------------------------------------------------------------

BASE = {f.name: getattr(edp.Config(), f.name) for f in dataclasses.fields(edp.Config)}
FLOATS = {name: jnp.float32(x) for name, x in BASE.items() if isinstance(x, float)}
LAYER = "['MLP_1']['Dense_0']['linear']"  # the one of an actor without hidden layers; MLP_0 is that of the step
FLOATS |= {"learning_rate": 0.0, "max_grad_norm": 1e9, "eta": 1.0}


@functools.cache
def program(obs_dim, action_dim, **counts):
    """A state of zeros, and jitted update and act. Config's floats are arguments."""

    def agent(floats):
        return edp.make_agent(dataclasses.replace(edp.Config(hidden=(), **counts), **floats), Spec(obs_dim, action_dim))

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
    # A policy that sees much positive noise acts by -1, and the online one by 1, but for what noise is left at the
    # first step: 0.001 of 100,000. Q1 = 3 a and Q2 = 2 a + 0.5 there are -3 and -1.5, so y = 1 - 3 * 0.99 = -1.97, and
    # 1 in terminal rows. The critics say 0, so their loss is 2 E[y^2]. Only next_obs counts, and this is 0: of obs 1,
    # the policy would act by 1, and Q1 and Q2 would be larger by 5.
    state, update, _ = program(1, 1, num_steps=100_000)
    state = with_networks(
        state,
        actor=actor_of(state.target_actor, -1e4),
        target_actor=actor_of(state.target_actor, 1e4, of_obs=-2e4),
        target_critic=critic_of(state.target_critic, [[5, 3], [5, 2]], [0.0, 0.5]),
    )
    batch = batch_of(np.ones((4, 1)), reward=1.0, terminal=jnp.array([0.0, 0, 0, 1]))
    _, info = update({}, state, batch._replace(next_obs=jnp.zeros((4, 1))))
    np.testing.assert_allclose(info["critic_loss"], 2 * (3 * 1.97**2 + 1) / 4, rtol=5e-3)


def test_the_best_next_action_is_chosen_for_each_critic_before_the_smaller_one():
    # Q1 = 1 + 2 a and Q2 = 1 - a, on [-1, 1]: the best are 3 and 2, of which 2 is smaller. (The smaller one of the two
    # is at most 1, at a = 0.) Without noise in its prediction the policy is near either bound in most of its 64 draws.
    state, update, _ = program(1, 1, num_next_samples=64)
    state = with_networks(state, target_critic=critic_of(state.target_critic, [[0, 2], [0, -1]], [1.0, 1.0]))
    _, info = update({}, state, batch_of(np.zeros((8, 1)), reward=1.0))
    np.testing.assert_allclose(info["critic_loss"], 2 * (1 + 0.99 * 2) ** 2, rtol=1e-4)


# Rows are one-hot, so that a critic's weights of obs are its values of the two rows, whatever the action
ROWS, CRITICS = np.eye(2), [[2.0, -4, 0], [1, 3, 0]]


def test_q_is_scaled_by_its_own_mean_size():
    # Q1 = (2, -4), Q2 = (1, 3): -mean Q1 / mean|Q1| = 1 / 3, and -mean Q2 / mean|Q2| = -1, each in half of the updates.
    # (By the other's size, as in Diffusion-QL, it would be 1 / 2 and -2 / 3.) eta = 3 times that.
    state, update, _ = program(2, 1)
    state = with_networks(state, critic=critic_of(state.target_critic, CRITICS))
    keys = jax.random.split(jax.random.key(1), 200)
    info = jax.jit(jax.vmap(lambda key: update({"eta": 3.0}, state._replace(key=key), batch_of(ROWS))[1]))(keys)
    term = (info["actor_loss"] - info["bc_loss"]) / 3
    first = np.abs(term - 1 / 3) < 1e-4
    np.testing.assert_allclose(term[~first], -1, rtol=1e-4)
    assert 70 < first.sum() < 130


def test_the_scale_of_the_critics_does_not_matter_and_without_q_it_is_cloning():
    state, update, _ = program(2, 1)

    def slopes(critics, **floats):
        at = with_networks(state, critic=critic_of(state.target_critic, critics))
        return gradient(update(floats, at, batch_of(np.tile(ROWS, (16, 1)), action=0.3))[0].actor)

    critics = np.array(CRITICS) + [0, 0, 1]  # with the action
    chex.assert_trees_all_close(slopes(critics), slopes(100 * critics), rtol=1e-4, atol=1e-6)
    cloned = slopes(critics, eta=0.0)
    chex.assert_trees_all_equal(cloned, slopes(0 * critics + 5, eta=0.0))  # whatever Q says
    once, twice = (
        max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), cloned, slopes(critics, eta=eta))))
        for eta in (1.0, 2.0)
    )
    assert once > 0.01
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-3)


def test_cloning_alone_is_diffusion_ql_s():
    """With eta = 0, and as many steps: both draw the same steps and noise from the same keys. (The programs differ, and
    so their rounding.)"""
    data = batch_of(np.linspace(-1, 1, 16)[:, None], action=0.3, reward=1.0)
    actors = []
    for algo in (edp, diffusion_ql):
        rates = {f.name: 0.01 for f in dataclasses.fields(algo.Config) if f.name.endswith("learning_rate")}
        counts = {"batch_size": 8, "log_interval": 10, "num_steps": 7, "hidden": (8,)}
        cfg = algo.Config(eta=0.0, **counts, **rates)
        agent = algo.make_agent(cfg, Spec(1, 1))
        state, _ = jax.jit(algo.make_train(cfg, agent))(agent.init(jax.random.key(0)), data)
        actors.append(state.actor.params)
    chex.assert_trees_all_close(*actors, rtol=1e-5, atol=1e-6)


def test_q_reaches_the_policy_through_the_guess_alone(monkeypatch):
    # All noise is 1, and each row at the third of five steps: the noisy action is 1.116393 (see above). The policy
    # predicts 0.9, so that the guess is 0.730416 in both dimensions. Cloning: a mean over them, so its gradient in the
    # bias of each is 2 (0.9 - 1) / 2. Q1 = Q2 = 5 + 2 a_1: that of the other term is eta 2 * 0.917333 / 0.398121
    # / (5 + 2 * 0.730416), in the first dimension alone.
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.ones(shape))
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.full(shape, 2))
    state, update, _ = program(1, 2, num_steps=5, num_next_samples=2)  # of its own, since it is traced with that noise
    critic = critic_of(state.target_critic, [[0, 2, 0]] * 2, [5.0, 5.0])

    def bias_gradient(bias):
        at = with_networks(state, critic=critic, actor=actor_of(state.target_actor, bias))
        new, info = update({"eta": 3.0}, at, batch_of(np.zeros((4, 1)), action=0.5, action_dim=2))
        np.testing.assert_allclose(info["bc_loss"], (bias - 1) ** 2, rtol=1e-4)
        return leaf(gradient(new.actor), f"{LAYER}['bias']")

    np.testing.assert_allclose(bias_gradient(0.9), [-0.1 + 3 * 4.608312 / 6.460832, -0.1], rtol=1e-4)
    np.testing.assert_allclose(bias_gradient(0.0), [-1, -1], rtol=1e-4)  # the guess is on the bound: nothing pulls


class Echo:
    """A network without parameters, which predicts that the noise is what it is shown."""

    def init(self, key, *inputs):
        return {}

    def apply(self, params, obs, noisy, t, **options):
        return noisy


def test_cloning_learns_every_step_alike(monkeypatch):
    # With x_t = eps + t and a network that returns x_t, the squared error is t^2. For t = 0 .. 4, all as
    # likely, its mean is 30 / 5 = 6; without the last step it is 3.5, without the first one 7.5
    monkeypatch.setattr(edp, "NoiseMLP", lambda *sizes: Echo())
    monkeypatch.setattr(edp, "add_noise", lambda action, noise, t, num_steps: noise + t[..., None])
    agent = edp.make_agent(edp.Config(hidden=(), num_steps=5), Spec(1, 1))
    state = agent.init(jax.random.key(0))
    _, info = jax.jit(agent.update)(state, batch_of(np.zeros((10_000, 1)), reward=1.0))
    np.testing.assert_allclose(info["bc_loss"], 6, atol=0.3)


def test_both_gradients_are_of_the_networks_before_the_update():
    """As in the reference. The critics' step, however large, is nothing to the actor before the next update."""
    state, update, _ = program(2, 1)
    state = with_networks(state, critic=critic_of(state.target_critic, np.array(CRITICS) + [0, 0, 1]))
    at_once, later = (
        gradient(
            update({"learning_rate": rate}, state, batch_of(np.tile(ROWS, (16, 1)), action=0.3, reward=-9.0))[0].actor
        )
        for rate in (0.0, 1.0)
    )
    chex.assert_trees_all_close(at_once, later, rtol=1e-5, atol=1e-7)


def test_the_target_policy_moves_in_every_fifth_update_and_the_target_critic_in_all():
    state, update, _ = program(1, 1)
    one = critic_of(state.target_critic, [[0, 1]] * 2, [1.0, 1.0])  # of critics that say 0 everywhere there is no scale
    state = with_networks(state, critic=one, target_critic=one)
    moved = []
    for _ in range(11):
        new, _ = update({"learning_rate": 0.1}, state, batch_of(np.zeros((4, 1)), action=0.3, reward=1.0))
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


# --- Acting: two actions, near -1 and 1 with probabilities 3/4 and 1/4 ----------------------------------------
# With one call the action is 0.99995 guess + 0.0102 noise, of the guess clip((x - noise eps) / signal), x ~ N(0, 1).
# For eps = 6745 - 10,000 x it is the sign of x - 0.6745, the third quartile: 1 in a quarter of the draws.


def two_actions(num_act_samples, low, high):
    """(act, state): critics (low, high + 3) and (low + 5, high) of the two actions: each is once the smaller."""
    state, _, act = program(1, 1, solver_steps=1, num_act_samples=num_act_samples)
    actor = actor_of(state.target_actor, 6745.0, -1e4)
    slopes = [[0, (high + 3 - low) / 2], [0, (high - low - 5) / 2]]
    critic = critic_of(state.target_critic, slopes, [(high + 3 + low) / 2, (high + low + 5) / 2])
    return act, with_networks(state, actor=actor, critic=critic)


def test_with_one_sample_it_acts_by_the_model_alone():
    act, state = two_actions(1, 1, 2)
    action = act(state, jnp.zeros((2000, 1)), jax.random.key(0))
    assert np.mean(np.abs(action) > 0.95) > 0.99
    np.testing.assert_allclose(np.mean(action > 0), 0.25, atol=0.03)
    np.testing.assert_array_equal(action, act(two_actions(1, 51, -49)[1], jnp.zeros((2000, 1)), jax.random.key(0)))


def test_it_draws_among_many_by_the_softmax_of_the_smaller_critic():
    # Q = 1 and 2: e^2 / 4 against 3 e / 4, so that P(1) = 0.475367. By the mean of the critics it is 0.25, by the
    # first one 0.95, by the second one and by the larger one at most 0.02. (Near the bounds, Q is off by some 0.03.)
    act, state = two_actions(500, 1, 2)
    action = act(state, jnp.zeros((2000, 1)), jax.random.key(0))
    np.testing.assert_allclose(np.mean(action > 0), 0.475367, atol=0.05)


# --- Small problems ------------------------------------------------------------------------------------------------


def test_it_learns_what_the_exact_model_draws_and_with_q_the_rare_mode_that_is_better(optimised):
    """Two modes, each an episode of one step. Only -1/2 earns a reward, and a fourth of the data is of it."""
    action, obs = modes.data(64), jnp.zeros((64, 1))
    data = Transition(obs, action, jnp.where(action[:, 0] < 0, 1.0, 0.0), obs, jnp.ones(64))

    def draws(eta):
        cfg = edp.Config(hidden=(32, 32), num_act_samples=1, eta=eta, learning_rate=5e-4, log_interval=1000)
        agent = edp.make_agent(cfg, Spec(1, 1))
        state, _ = edp.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)
        return agent.act(state, jnp.zeros((2000, 1)), jax.random.key(1))

    cloned, improved = jax.jit(jax.vmap(draws))(jnp.array([0.0, 1.0]))
    # See above for the numbers. One Gaussian of the modes' mean and deviation would have P(a > 0) = 0.72
    np.testing.assert_allclose(modes.of_samples(cloned), (0.7443, 0.2441, 0.4331), atol=0.06)
    assert np.mean(improved < 0) > 0.6
