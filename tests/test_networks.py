"""common/networks.py: distributions against closed forms and numerical integrals, ensembles, initialisation."""

import functools
import os
import subprocess
import sys

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.networks import (
    VAE,
    AutoregressiveActor,
    Bilinear,
    Categorical,
    CategoricalActor,
    CausalTransformer,
    Critic,
    Dense,
    DeterministicActor,
    DiscreteCritic,
    Dynamics,
    GaussianActor,
    GoalActor,
    GoalEncoder,
    GoalValue,
    NoiseMLP,
    NoiseResNet,
    Normal,
    Quasimetric,
    TanhGaussianActor,
    TanhNormal,
    Value,
    interval_union,
    metric_residual,
    sinusoidal,
    sphere,
)

KEY = jax.random.key(0)
HIDDEN = (8, 8)
OBS = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
OBS_3 = OBS[:, :3]  # a critic's: its first layer has 3 + 2 inputs, as many as the other networks'
ACTION = np.random.default_rng(1).uniform(-1, 1, (7, 2)).astype(np.float32)
GRID = np.linspace(-30, 30, 60_001)  # of integrals over Gaussians of the tests, whose means are below 2 and std below 3


def normal_log_density(x, mean, log_std):
    return -0.5 * ((x - mean) / np.exp(log_std)) ** 2 - log_std - 0.5 * np.log(2 * np.pi)


def inputs_of(network):
    return (OBS_3, ACTION) if isinstance(network, Critic) else (OBS,)


@functools.cache
def init(network, seed=0):
    # Not jitted: networks share layers of the same shape, and each of these is compiled once
    return network.init(jax.random.key(seed), *inputs_of(network))


def random_params(network):
    """Parameters that no initialisation made, at no cost of compiling one."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, KEY, *inputs_of(network))
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def kernels(params):
    return {path: leaf for path, leaf in flax.traverse_util.flatten_dict(params).items() if path[-1] == "kernel"}


# --- Distributions -------------------------------------------------------------------------------------

MEAN = np.array([[0.3, -1.2, 0.0], [1.5, 0.1, -0.4]], np.float32)
LOG_STD = np.array([[0.0, -1.0, 0.9], [-0.5, 0.2, -2.0]], np.float32)
NORMAL, TANH_NORMAL = Normal(MEAN, LOG_STD), TanhNormal(MEAN, LOG_STD)
CATEGORICAL = Categorical(np.log(np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], np.float32)) + 4)  # + 4: not normalised


def test_normal_log_prob_sums_over_the_actions_dimensions():
    x = np.array([[0.1, -3.0, 2.5], [1.5, 0.0, -0.5]], np.float32)
    log_prob = jax.jit(Normal.log_prob)(NORMAL, x)
    assert log_prob.shape == (2,)
    np.testing.assert_allclose(log_prob, normal_log_density(x, MEAN, LOG_STD).sum(axis=-1), rtol=1e-5)


def test_normal_entropy_is_the_integral_of_minus_p_log_p():
    log_p = normal_log_density(GRID, MEAN[..., None].astype(float), LOG_STD[..., None].astype(float))
    expected = -np.trapezoid(np.exp(log_p) * log_p, GRID, axis=-1).sum(axis=-1)
    np.testing.assert_allclose(NORMAL.entropy(), expected, rtol=1e-5)


def test_normal_samples():
    samples = np.asarray(jax.jit(jax.vmap(NORMAL.sample))(jax.random.split(KEY, 20_000)))
    assert samples.shape == (20_000, 2, 3)
    z = (samples - MEAN) / np.exp(LOG_STD)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=0.03)  # four standard errors: 4 / sqrt(20,000)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.03)
    correlation = np.corrcoef(z.reshape(20_000, -1), rowvar=False)
    np.testing.assert_allclose(correlation, np.eye(6), atol=0.03)  # dimensions and rows get noise of their own
    np.testing.assert_array_equal(NORMAL.mode(), MEAN)


def test_tanh_normal_log_prob_integrates_to_one():
    a = np.tanh(np.linspace(-6, 6, 20_001))[:, None]
    for mean, log_std in ((0.3, -0.5), (-1.0, -1.0), (0.0, 0.0)):
        density = np.exp(jax.jit(TanhNormal.log_prob)(TanhNormal(np.full_like(a, mean), np.full_like(a, log_std)), a))
        np.testing.assert_allclose(np.trapezoid(density, a[:, 0]), 1, atol=1e-3)


def test_tanh_normal_log_prob_is_the_change_of_variables():
    a = np.array([[0.1, -0.99, 0.5], [0.9, 0.0, -0.5]])
    log_slope = np.log(1 - a**2)
    expected = (normal_log_density(np.arctanh(a), MEAN, LOG_STD) - log_slope).sum(axis=-1)
    log_prob = jax.jit(TanhNormal.log_prob)(TANH_NORMAL, a.astype(np.float32))
    assert log_prob.shape == (2,)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-4)


def test_tanh_normal_is_finite_on_the_bounds():
    a = np.array([[1, -1, 1], [-1, 1, 0.5]], np.float32)
    value, gradient = jax.jit(jax.value_and_grad(lambda pi: pi.log_prob(a).sum()))(TANH_NORMAL)
    assert np.isfinite(value) and all(np.isfinite(g).all() and (g != 0).any() for g in gradient)


def test_tanh_normal_samples_with_their_log_prob():
    action, log_prob = jax.jit(TanhNormal.sample_and_log_prob)(TANH_NORMAL, KEY)
    np.testing.assert_allclose(action, TANH_NORMAL.sample(KEY), rtol=1e-6)
    np.testing.assert_allclose(action, np.tanh(NORMAL.sample(KEY)), rtol=1e-6)
    assert log_prob.shape == (2,)
    np.testing.assert_allclose(log_prob, TANH_NORMAL.log_prob(action), rtol=1e-3)
    np.testing.assert_allclose(TANH_NORMAL.mode(), np.tanh(MEAN), rtol=1e-6)


def test_tanh_normal_log_prob_of_samples_far_out():
    """tanh(u)^2 is 1 in float32 from u = 9 on: log(1 - tanh(u)^2) must be computed otherwise."""
    pi = TanhNormal(np.array([[15.0], [-15.0]], np.float32), np.full((2, 1), -3.0, np.float32))
    _, log_prob = pi.sample_and_log_prob(KEY)
    u = np.asarray(Normal(*pi).sample(KEY), np.float64)
    log_slope = np.log(4) - 2 * np.abs(u) - 2 * np.log1p(np.exp(-2 * np.abs(u)))
    expected = (normal_log_density(u, np.asarray(pi.mean), -3.0) - log_slope).sum(axis=-1)
    np.testing.assert_allclose(log_prob, expected, rtol=1e-3)


def test_categorical():
    p = np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]])
    log_prob = jax.jit(Categorical.log_prob)(CATEGORICAL, np.array([2, 0]))
    assert log_prob.shape == (2,)
    np.testing.assert_allclose(log_prob, np.log([0.3, 0.7]), rtol=1e-4)
    np.testing.assert_allclose(CATEGORICAL.entropy(), -(p * np.log(p)).sum(axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(CATEGORICAL.mode(), [1, 0])
    samples = jax.jit(jax.vmap(CATEGORICAL.sample))(jax.random.split(KEY, 20_000))
    frequency = np.stack([(samples == n).mean(axis=0) for n in range(3)], axis=-1)
    np.testing.assert_allclose(frequency, p, atol=0.015)  # four standard errors: 4 sqrt(0.25 / 20,000)


def test_categorical_of_an_impossible_action_has_a_finite_entropy():
    np.testing.assert_allclose(Categorical(jnp.array([0.0, 0.0, -200.0])).entropy(), np.log(2), rtol=1e-5)


@pytest.mark.parametrize("lead", [(), (4,), (2, 4)])
def test_leading_axes_of_distributions_are_free(lead):
    zeros, index = jnp.zeros((*lead, 3)), jnp.zeros(lead, int)
    for pi, action in ((Normal(zeros, zeros), zeros), (TanhNormal(zeros, zeros), zeros), (Categorical(zeros), index)):
        assert jax.eval_shape(pi.log_prob, action).shape == lead
        assert jax.eval_shape(pi.sample, KEY).shape == jax.eval_shape(pi.mode).shape == action.shape
        if not isinstance(pi, TanhNormal):
            assert jax.eval_shape(pi.entropy).shape == lead


# --- Networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Actor", [GaussianActor, TanhGaussianActor, CategoricalActor])
def test_policies_are_interchangeable(Actor):
    actor = Actor(4, HIDDEN)
    params = random_params(actor)

    @jax.jit
    def mode_and_log_prob(obs):
        pi = actor.apply(params, obs)
        return pi.mode(), pi.log_prob(pi.mode())

    mode, log_prob = mode_and_log_prob(OBS)
    assert log_prob.shape == (7,)
    assert mode.shape == ((7,) if Actor is CategoricalActor else (7, 4))
    assert Actor is CategoricalActor or (np.abs(mode) <= 1).all()
    for lead in ((), (2, 7)):
        shapes = jax.eval_shape(mode_and_log_prob, jnp.zeros((*lead, 5)))
        assert [x.shape for x in shapes] == [lead + mode.shape[1:], lead]


def test_gaussian_actor_has_one_standard_deviation_for_all_states():
    actor = GaussianActor(2, HIDDEN)
    params = random_params(actor)
    for log_std, expected in (([0.5, -1.0], [0.5, -1.0]), ([9.0, -9.0], [2.0, -5.0])):
        params["params"]["log_std"] = jnp.array(log_std)
        pi = actor.apply(params, OBS)
        np.testing.assert_array_equal(pi.log_std, np.tile(np.float32(expected), (7, 1)))
    np.testing.assert_array_equal(init(actor)["params"]["log_std"], np.zeros(2))


def test_tanh_gaussian_actor_has_a_standard_deviation_per_state():
    actor = TanhGaussianActor(2, HIDDEN)
    params = random_params(actor)
    assert len(np.unique(actor.apply(params, OBS).log_std)) > 5
    huge = jax.jit(actor.apply)(params, 1e4 * OBS)
    assert set(np.unique(huge.log_std)) == {-20.0, 2.0} and np.abs(huge.mean).max() > 20  # the mean is not clipped


def test_deterministic_actor_is_within_the_bounds():
    actor = DeterministicActor(2, HIDDEN)
    action = jax.jit(actor.apply)(random_params(actor), 1e4 * OBS)
    assert action.shape == (7, 2) and np.abs(action).max() == 1


def test_a_hidden_layer_is_linear_then_relu_and_the_last_is_linear():
    value = Value((4,))
    params = random_params(value)
    layers = flax.traverse_util.flatten_dict(params, sep="/")
    b0, w0, b1, w1 = (layers[name] for name in sorted(layers))
    v = jax.jit(value.apply)(params, OBS)
    assert v.shape == (7,)  # no trailing axis
    np.testing.assert_allclose(v, (np.maximum(OBS @ w0 + b0, 0) @ w1 + b1)[:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu_first", [False, True])
def test_layer_norm_is_before_or_after_the_relu(relu_first):
    critic = Critic(1, (4,), layer_norm=True, relu_first=relu_first)
    params = random_params(critic)
    layers = {"/".join(path[-3:]): x[0] for path, x in flax.traverse_util.flatten_dict(params).items()}
    w0, b0, w1, b1 = (layers[f"Dense_{i}/linear/{name}"] for i in (0, 1) for name in ("kernel", "bias"))
    (scale,), (shift,) = ([x for k, x in layers.items() if k.endswith(f"LayerNorm_0/{n}")] for n in ("scale", "bias"))

    def norm(x):
        x = x - x.mean(axis=-1, keepdims=True)
        return scale * x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) + shift

    x = np.concatenate([OBS_3, ACTION], axis=1) @ w0 + b0
    x = norm(np.maximum(x, 0)) if relu_first else np.maximum(norm(x), 0)
    np.testing.assert_allclose(critic.apply(params, OBS_3, ACTION)[0], (x @ w1 + b1)[:, 0], rtol=1e-3, atol=1e-4)


INDEX = np.array([0, 3, 1, 1, 2, 0, 3])  # of a discrete action
CRITICS = [(Critic(3, HIDDEN), (OBS_3, ACTION)), (DiscreteCritic(4, 3, HIDDEN), (OBS, INDEX))]
CRITICS = pytest.mark.parametrize("critic, inputs", CRITICS, ids=["continuous", "discrete"])


@CRITICS
def test_critic_axis_comes_first(critic, inputs):
    params = random_params(critic)
    q = jax.jit(critic.apply)(params, *inputs)
    assert q.shape == (3, 7)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params)} == {3}
    # Each is the function of its own parameters and of all inputs
    for i in range(3):
        alone = critic.copy(num_critics=1).apply(jax.tree.map(lambda x, i=i: x[i : i + 1], params), *inputs)
        np.testing.assert_allclose(q[i], alone[0], rtol=1e-4, atol=1e-4)
    assert len(np.unique(q)) == 21


@CRITICS
def test_critics_do_not_touch_each_other(critic, inputs):
    gradient = jax.jit(jax.grad(lambda params: critic.apply(params, *inputs)[1].sum()))(random_params(critic))
    for leaf in jax.tree.leaves(gradient):
        assert not leaf[0].any() and not leaf[2].any()
    assert all(leaf[1].any() for leaf in kernels(gradient).values())


def test_discrete_critic_gathers_the_given_actions():
    critic = DiscreteCritic(4, 2, HIDDEN)
    params = random_params(critic)
    every = critic.apply(params, OBS)
    assert every.shape == (2, 7, 4)
    gathered = np.stack([every[:, i, a] for i, a in enumerate(INDEX)], axis=1)
    np.testing.assert_array_equal(critic.apply(params, OBS, INDEX), gathered)


def test_critic_reads_both_inputs():
    critic = Critic(2, HIDDEN)
    params = random_params(critic)
    gradients = jax.jit(jax.grad(lambda x: critic.apply(params, *x).sum()))((OBS_3, ACTION))
    assert all((np.abs(g).sum(axis=0) > 0).all() for g in gradients)


# --- Goals -----------------------------------------------------------------------------------------------


def test_layers_for_goals_are_gelu_and_then_layer_norm_but_the_actors():
    value, actor = GoalValue(1, (4,)), GoalActor(2, (4,))
    for network, norm in ((value, True), (actor, False)):
        shapes = jax.eval_shape(network.init, KEY, OBS_3, ACTION)
        params = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), shapes)
        flat = {"/".join(path[-3:]): x for path, x in flax.traverse_util.flatten_dict(params).items()}
        layers = {name: x[0] if norm else x for name, x in flat.items()}
        assert norm == any("LayerNorm_0/scale" in name for name in layers)
        w0, b0, w1, b1 = (layers[f"Dense_{i}/linear/{name}"] for i in (0, 1) for name in ("kernel", "bias"))
        x = np.concatenate([OBS_3, ACTION], axis=1) @ w0 + b0
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        if norm:
            (scale,), (shift,) = (
                [x for k, x in layers.items() if k.endswith(f"LayerNorm_0/{n}")] for n in ("scale", "bias")
            )
            x = scale * (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6) + shift
        out = network.apply(params, OBS_3, ACTION)
        out = out[0] if norm else out.mean
        np.testing.assert_allclose(out, (x @ w1 + b1)[:, 0] if norm else x @ w1 + b1, rtol=1e-3, atol=1e-4)


def test_actor_of_goals_has_deviation_one_and_starts_near_zero():
    actor = GoalActor(2, (64,))
    params = jax.jit(actor.init)(KEY, OBS_3, ACTION)
    pi = actor.apply(params, OBS_3, ACTION)
    np.testing.assert_array_equal(pi.log_std, np.zeros((7, 2)))
    # An error of (0.3, -0.4): -0.25 / 2 - log(2 pi)
    np.testing.assert_allclose(pi.log_prob(pi.mean + np.array([[0.3, -0.4]])), [-1.962877] * 7, rtol=1e-5)
    first, last = (x for path, x in sorted(kernels(params).items()))
    # Glorot: uniform within sqrt(6 / (inputs + outputs)); the last with a hundredth of the variance
    for kernel, variance in ((first, 2 / (5 + 64)), (last, 0.02 / (64 + 2))):
        assert 0.9 * (3 * variance) ** 0.5 < np.abs(kernel).max() <= (3 * variance) ** 0.5
    assert GoalActor(4, (8,), discrete=True).init_with_output(KEY, OBS_3, ACTION)[0].logits.shape == (7, 4)


def test_goal_encoder_is_of_length_sqrt_n():
    encoder = GoalEncoder(10, (8,), normalized=True)
    params = jax.jit(encoder.init)(KEY, OBS_3, ACTION)
    np.testing.assert_allclose(np.linalg.norm(encoder.apply(params, OBS_3, ACTION), axis=-1), [10**0.5] * 7, rtol=1e-5)
    np.testing.assert_allclose(sphere(jnp.array([3.0, 4.0])), np.array([0.6, 0.8]) * 2**0.5, rtol=1e-6)


def test_bilinear_pairs_are_what_it_gives_row_by_row():
    critic = Bilinear(2, (8,), latent_dim=4)
    params = jax.jit(critic.init)(KEY, OBS, OBS_3, ACTION)
    pairs = critic.apply(params, OBS[:4], OBS_3, ACTION, method="pairs")
    assert pairs.shape == (2, 7, 4)
    for j in range(4):
        one = critic.apply(params, np.tile(OBS[j], (7, 1)), OBS_3, ACTION)
        np.testing.assert_allclose(pairs[:, :, j], one, rtol=1e-4, atol=1e-5)
    # The product is divided by sqrt(4): twice both vectors give four times the number
    assert not np.allclose(pairs[0], pairs[1])


@pytest.mark.parametrize(
    "x, y, length",
    [
        ((0, 0), (1, 2), 2),  # [0, 1] and [0, 2]
        ((0, 1), (1, 2), 2),  # they touch
        ((0, 3), (1, 4), 2),  # they do not
        ((2, 0), (1, 4), 4),  # [2, 1] is none
        ((1, 4), (2, 0), 1),
        ((1, 3), (1, 3), 0),
    ],
)
def test_interval_unions_by_hand(x, y, length):
    assert interval_union(jnp.array(x, float), jnp.array(y, float)) == length


def test_interval_unions_measure_the_union():
    x, y = np.random.default_rng(0).normal(size=(2, 20, 6)).astype(np.float32)
    grid = np.linspace(-5, 5, 100_001)
    covered = ((x[..., None] < grid) & (grid < y[..., None])).any(axis=1)
    np.testing.assert_allclose(interval_union(x, y), covered.mean(axis=-1) * 10, atol=2e-3)


def test_metric_residual_by_hand():
    # Half (3, 4) apart: 5; of (1, 5) to (0, 3) the larger decrease is 2, of the way back there is none
    x, y = jnp.array([0.0, 0, 1, 5]), jnp.array([3.0, 4, 0, 3])
    assert metric_residual(x, y) == 7 and metric_residual(y, x) == 5
    np.testing.assert_allclose(metric_residual(x, x), 1e-6, rtol=1e-3)  # not 0: its root has a gradient there


@pytest.mark.parametrize("kind", ["iqe", "mrn"])
def test_quasimetrics(kind):
    network = Quasimetric((16,), 16, kind)
    params = jax.jit(network.init)(KEY, OBS, OBS)
    d = jax.jit(lambda x, y: network.apply(params, x, y))
    x, y, z = np.random.default_rng(1).normal(size=(3, 500, 5)).astype(np.float32)
    assert np.all(d(x, z) <= d(x, y) + d(y, z) + 1e-5) and np.all(d(x, y) >= 0)
    np.testing.assert_allclose(d(x, x), np.zeros(500), atol=2e-6)
    assert np.abs(d(x, y) - d(y, x)).max() > 0.1
    latent = [network.apply(params, s, method="encode") for s in (x, y)]
    np.testing.assert_allclose(network.apply(params, *latent, method="between"), d(x, y), rtol=1e-4, atol=1e-6)
    moved = network.apply(params, *(s + 3.0 for s in latent), method="between")  # only differences count
    np.testing.assert_allclose(moved, d(x, y), rtol=1e-3, atol=1e-4)


def test_iqe_is_half_the_mean_and_half_the_maximum_at_first():
    # Components of two: (0, 0) to (1, 2) is 2, (0, 0) to (3, 1) is 3: (2.5 + 3) / 2 = 2.75, and 0 on the way back
    network = Quasimetric((4,), 4, component_dim=2)
    params = jax.jit(network.init)(KEY, OBS, OBS)
    assert params["params"]["alpha"] == 0
    x, y = jnp.zeros(4), jnp.array([1.0, 2, 3, 1])
    assert network.apply(params, x, y, method="between") == 2.75
    assert network.apply(params, y, x, method="between") == 0


# --- Behaviour models ------------------------------------------------------------------------------------

VAE_OF_2 = VAE(2, latent_dim=4, hidden=HIDDEN)
LATENT = np.random.default_rng(2).normal(size=(7, 4)).astype(np.float32)


def random_vae_params():
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(VAE_OF_2.init, KEY, OBS, ACTION, KEY)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_vae_reconstructs_from_a_sample_of_the_posterior():
    params = random_vae_params()
    recon, posterior = jax.jit(VAE_OF_2.apply)(params, OBS, ACTION, KEY)
    assert recon.shape == (7, 2) and posterior.mean.shape == posterior.log_std.shape == (7, 4)
    z = posterior.mean + np.exp(posterior.log_std) * jax.random.normal(KEY, (7, 4))
    np.testing.assert_allclose(recon, VAE_OF_2.apply(params, OBS, z, method="decode"), rtol=1e-4, atol=1e-5)
    encoded = VAE_OF_2.apply(params, OBS, ACTION, method="encode")
    np.testing.assert_allclose(encoded.mean, posterior.mean, rtol=1e-4, atol=1e-5)


def test_vae_decoder_before_and_after_its_tanh():
    params = random_vae_params()
    u = VAE_OF_2.apply(params, OBS, LATENT, method="decode_unsquashed")
    assert np.abs(u).max() > 2  # not squashed
    np.testing.assert_allclose(VAE_OF_2.apply(params, OBS, LATENT, method="decode"), np.tanh(u), rtol=1e-5)


def test_vae_posterior_clips_its_log_std_alone():
    posterior = VAE_OF_2.apply(random_vae_params(), 1e4 * OBS, ACTION, method="encode")
    assert set(np.unique(posterior.log_std)) == {-4.0, 15.0} and np.abs(posterior.mean).max() > 20


def test_vae_halves_read_all_their_inputs_and_share_nothing():
    params = random_vae_params()
    by_obs, by_z = jax.grad(lambda *x: VAE_OF_2.apply(params, *x, method="decode_unsquashed").sum(), (0, 1))(
        OBS, LATENT
    )
    assert (np.abs(by_obs).sum(axis=0) > 0).all() and (np.abs(by_z).sum(axis=0) > 0).all()
    by_action = jax.grad(lambda a: VAE_OF_2.apply(params, OBS, a, method="encode").mean.sum())(ACTION)
    assert (np.abs(by_action).sum(axis=0) > 0).all()
    gradient = jax.grad(lambda p: VAE_OF_2.apply(p, OBS, LATENT, method="decode").sum())(params)["params"]
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient["encoder"]))
    assert all(leaf.any() for leaf in jax.tree.leaves(gradient["decoder"]))


MADE = AutoregressiveActor(3, bins=5, hidden=(8, 7))
ACTION_3 = np.random.default_rng(3).uniform(-1, 1, (7, 3)).astype(np.float32)


def random_made_params(actor, scale=1.0):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(actor.init, KEY, OBS, np.zeros((7, actor.action_dim), np.float32))
    return jax.tree.map(lambda x: scale * rng.normal(size=x.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("hidden", [(), (8,), (8, 7)], ids=str)
def test_made_reads_the_earlier_dimensions_alone(hidden):
    """d p(a_j | ...) / d a_k = 0 for k >= j: the order of the dimensions is that of the arrays."""
    actor = MADE.copy(hidden=hidden)
    params = random_made_params(actor)
    logits = lambda obs, action: actor.apply(params, obs, action)  # noqa: E731
    by_obs, by_action = (np.abs(jax.jit(jax.vmap(jax.jacobian(logits, i)))(OBS, ACTION_3)).sum(axis=2) for i in (0, 1))
    assert by_action.shape == (7, 3, 3)
    reads = by_action.sum(axis=0) > 0
    np.testing.assert_array_equal(reads, np.tri(3, k=-1, dtype=bool))  # a_2 reads a_1; a_3 reads a_1 and a_2
    assert (by_obs.sum(axis=0) > 0).all()  # every factor reads every part of obs


def test_made_density_integrates_to_one():
    # Given a_1 the density of a_2 is constant in each bin: one point per bin makes the sum exact
    actor = AutoregressiveActor(2, bins=5, hidden=(8, 8))
    params = random_made_params(actor, scale=0.5)
    centre = np.linspace(-0.8, 0.8, 5, dtype=np.float32)
    grid = np.stack(np.meshgrid(centre, centre, indexing="ij"), axis=-1)
    obs, action = np.broadcast_to(OBS[:, None, None], (7, 5, 5, 5)), np.broadcast_to(grid, (7, 5, 5, 2))
    density = np.exp(actor.apply(params, obs, action, method="log_prob"))
    np.testing.assert_allclose(density.sum(axis=(1, 2)) * 0.4**2, 1, rtol=1e-4)
    assert density.std(axis=0).max() > 0.1 and density.std(axis=(1, 2)).max() > 0.1  # it depends on state and action


def test_made_bins_are_equal_and_closed_on_the_bounds():
    # One linear layer without inputs: the same probabilities (0.1, 0.2, 0.3, 0.4) everywhere; a bin is 0.5 wide
    actor = AutoregressiveActor(1, bins=4, hidden=())
    params = jax.tree.map(jnp.zeros_like, random_made_params(actor))
    params["params"]["Dense_0"]["linear"]["bias"] = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])) + 3
    action = np.float32([-1, -0.51, -0.49, -0.01, 0.01, 0.49, 0.51])[:, None]
    log_prob = actor.apply(params, OBS, action, method="log_prob")
    np.testing.assert_allclose(np.exp(log_prob), np.array([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4]) / 0.5, rtol=1e-5)
    on_the_bound = actor.apply(params, OBS[:1], np.ones((1, 1), np.float32), method="log_prob")
    np.testing.assert_allclose(np.exp(on_the_bound), 0.4 / 0.5, rtol=1e-5)


def test_made_samples_follow_its_density():
    n = 40_000
    actor = AutoregressiveActor(2, bins=4, hidden=())
    params = random_made_params(actor)
    obs = np.zeros((n, 5), np.float32)
    action = np.asarray(jax.jit(lambda obs, key: actor.apply(params, obs, key, method="sample"))(obs, KEY))
    assert action.shape == (n, 2) and np.abs(action).max() <= 1
    probability = np.asarray(jax.nn.softmax(jax.jit(actor.apply)(params, obs, action)))
    index = np.floor((action + 1) * 2).astype(int)
    first = np.bincount(index[:, 0], minlength=4) / n
    np.testing.assert_allclose(first, probability[0, 0], atol=0.01)  # four standard errors: 4 sqrt(0.25 / n)
    given = probability[:, 1]  # of the second, given the first
    assert np.abs(given - given.mean(axis=0)).mean() > 0.02  # the second depends on the first
    for low in (True, False):  # of the first
        rows = (action[:, 0] < np.median(action[:, 0])) == low
        frequency = np.bincount(index[rows, 1], minlength=4) / rows.sum()
        np.testing.assert_allclose(frequency, given[rows].mean(axis=0), atol=0.015)
    inside = (action + 1) * 2 - index  # uniform in the bin, each dimension by a number of its own
    np.testing.assert_allclose([inside.mean(), inside.std()], [0.5, 12**-0.5], atol=0.01)
    np.testing.assert_allclose(np.corrcoef(inside, rowvar=False), np.eye(2), atol=0.02)


@pytest.mark.parametrize("lead", [(), (2, 7)])
def test_leading_axes_of_behaviour_models_are_free(lead):
    obs, action, z = (jnp.zeros((*lead, n)) for n in (5, 3, 4))
    made = functools.partial(jax.eval_shape, functools.partial(MADE.apply, random_made_params(MADE)))
    assert made(obs, action).shape == (*lead, 3, 5)
    assert jax.eval_shape(lambda: MADE.apply(random_made_params(MADE), obs, action, method="log_prob")).shape == lead
    assert jax.eval_shape(lambda: MADE.apply(random_made_params(MADE), obs, KEY, method="sample")).shape == (*lead, 3)
    decoded = jax.eval_shape(lambda: VAE_OF_2.apply(random_vae_params(), obs, z, method="decode"))
    assert decoded.shape == (*lead, 2)


def test_behaviour_models_start_as_pytorch_does():
    every = [MADE.init(KEY, OBS, ACTION_3), VAE_OF_2.init(KEY, OBS, ACTION, KEY)]
    for params in map(flax.traverse_util.flatten_dict, every):
        for path, leaf in params.items():
            bound = 1 / np.sqrt(params[(*path[:-1], "kernel")].shape[-2])
            assert leaf.any() and np.abs(leaf).max() <= bound


# --- Initialisation ------------------------------------------------------------------------------------

NETWORKS = [
    GaussianActor(2, HIDDEN),
    TanhGaussianActor(1, HIDDEN),
    DeterministicActor(2, HIDDEN),
    CategoricalActor(2, HIDDEN),
    Value(HIDDEN),
    Critic(2, HIDDEN),
    DiscreteCritic(1, 2, HIDDEN),
]
NETWORKS = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: type(network).__name__)


@NETWORKS
def test_orthogonal(network):
    """Also of the output layer, as in jaxrl and IQL's reference: rows or columns, the fewer, of length sqrt(2)."""
    params = flax.traverse_util.flatten_dict(init(network.copy(initializer="orthogonal")))
    assert sum(path[-1] == "kernel" for path in params) == 3
    for path, leaf in params.items():
        if path[-1] == "bias":
            assert not leaf.any()
        if path[-1] == "kernel":
            for kernel in np.asarray(leaf).reshape(-1, *leaf.shape[-2:]):
                small = kernel.T @ kernel if kernel.shape[0] >= kernel.shape[1] else kernel @ kernel.T
                np.testing.assert_allclose(small, 2 * np.eye(len(small)), atol=1e-5)


@NETWORKS
def test_torch(network):
    """nn.Linear's: kernel and bias uniform in +-1 / sqrt(inputs of the layer)."""
    params = flax.traverse_util.flatten_dict(init(network.copy(initializer="torch")))
    for path, leaf in params.items():
        if path[-1] in ("kernel", "bias"):
            bound = 1 / np.sqrt(params[(*path[:-1], "kernel")].shape[-2])
            assert leaf.any() and np.abs(leaf).max() <= bound


@pytest.mark.parametrize("initializer", ["orthogonal", "torch"])
@pytest.mark.parametrize("critic", [Critic(2, HIDDEN), DiscreteCritic(1, 2, HIDDEN)], ids=["continuous", "discrete"])
def test_critics_start_different(critic, initializer):
    for kernel in kernels(init(critic.copy(initializer=initializer))).values():
        assert not np.isclose(kernel[0], kernel[1]).any()


def linear_of_100(features, initializer):
    layer = Dense(features, initializer).init(KEY, np.zeros((1, 100), np.float32))["params"]["linear"]
    return np.asarray(layer["kernel"]), np.asarray(layer["bias"])


def test_torch_fills_its_interval():
    kernel, bias = linear_of_100(300, "torch")
    for x in (kernel, bias):
        assert -0.1 <= x.min() < -0.095 and 0.095 < x.max() <= 0.1  # 1 / sqrt(100), not of the outputs' number
        np.testing.assert_allclose([x.mean(), x.std()], [0, 0.1 / np.sqrt(3)], atol=0.012)
    assert not np.isclose(kernel[0], bias).all()  # drawn from keys of their own


def test_lecun_is_flax_own():
    kernel, bias = linear_of_100(300, "lecun")
    np.testing.assert_allclose(kernel.std(), 0.1, rtol=0.02)  # sqrt(1 / inputs)
    assert not bias.any()


def test_edac_is_torchs_kernel_and_a_constant_bias():
    kernel, bias = linear_of_100(300, "edac")
    np.testing.assert_array_equal(kernel, linear_of_100(300, "torch")[0])
    np.testing.assert_array_equal(bias, np.float32(0.1))


def test_mbpo_is_a_normal_cut_at_twice_its_deviation():
    kernel, bias = linear_of_100(300, "mbpo")  # 1 / (2 sqrt(100)) = 0.05, and 0.88 of that once it is cut
    assert 0.097 < np.abs(kernel).max() <= 0.1 and not bias.any()
    np.testing.assert_allclose(kernel.std(), 0.8796 * 0.05, rtol=0.02)


def test_a_number_is_the_bound_of_kernel_and_bias():
    for x in linear_of_100(300, 0.003):
        assert -0.003 <= x.min() < -0.0028 and 0.0028 < x.max() <= 0.003


@pytest.mark.parametrize("network", [DeterministicActor(2, (8,), "edac"), Critic(2, (8,), "edac")])
def test_output_bound_is_of_the_last_layer_alone(network):
    with_bound = flax.traverse_util.flatten_dict(init(network.copy(output_bound=1e-3)), sep="/")
    without = flax.traverse_util.flatten_dict(init(network), sep="/")
    for name, x in with_bound.items():
        if "Dense_1" in name:
            assert 1e-4 < np.abs(x).max() <= 1e-3
        else:
            np.testing.assert_array_equal(x, without[name])


def test_unknown_initializer():
    with pytest.raises(ValueError, match="'mbpo', 'glorot' or 'glorot/100', not 'xavier'"):
        Value(HIDDEN, "xavier").init(KEY, OBS)


@pytest.mark.parametrize("initializer", ["orthogonal", "torch"])
def test_layers_and_seeds_draw_their_own_numbers(initializer):
    network = Value((8, 8, 8), initializer)
    first, again, other = init(network), init.__wrapped__(network), init(network, seed=1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    square = [kernel for kernel in kernels(first).values() if kernel.shape == (8, 8)]
    assert len(square) == 2 and not np.isclose(*square).any()
    for a, b in zip(kernels(first).values(), kernels(other).values(), strict=True):
        assert not np.isclose(a, b).any()


# --- Models of the dynamics --------------------------------------------------------------------------------


def dynamics(raw, learns_terminal=False, hidden=(), kernel=0.0, members=1):
    """One observation, one action; every output is `raw`, or what `kernel` makes of the inputs beside it."""
    network = Dynamics(members, 1, hidden, learns_terminal)
    inputs = np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(2), np.ones(2)
    values = {"kernel": kernel, "bias": raw}
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: np.broadcast_to(np.float32(values[path[-1].key]), x.shape) if path[-1].key in values else x,
        network.init(KEY, *inputs),
    )
    return network, params, inputs


def test_the_log_variance_approaches_its_bounds_softly():
    raw = np.float32([-20, -10, 0, 0.5, 5, 1e4, -1e4])
    bounded = []
    for x in raw:
        network, params, inputs = dynamics(x)
        bounded.append(network.apply(params, *inputs).log_var)
    expect = [-9.999955, -9.306867, -0.474004, -0.193092, 0.488980, 0.500028, -10.0]
    np.testing.assert_allclose(np.ravel(bounded), np.repeat(expect, 2), rtol=1e-5)


def test_hidden_layers_of_the_dynamics_are_swish():
    network, params, inputs = dynamics(0.0, hidden=(1,), kernel=1.0)
    ahead = [network.apply(params, np.float32([[x]]), *inputs[1:]).mean[0, 0, 0] for x in (1.0, -1.0)]
    np.testing.assert_allclose(ahead, [0.731059, -0.268941], rtol=1e-5)


def test_inputs_of_the_dynamics_are_scaled():
    network, params, _ = dynamics(0.0, kernel=np.float32([[1.0], [10.0]]), learns_terminal=True)
    at = np.float32([[5.0]]), np.float32([[0.5]]), np.float32([1.0, 0.25]), np.float32([2.0, 0.5])
    prediction = network.apply(params, *at)  # (5 - 1) / 2 + 10 (0.5 - 0.25) / 0.5 = 7
    np.testing.assert_allclose(
        np.ravel([prediction.mean[0, 0, 0], prediction.mean[0, 0, 1], prediction.terminal[0, 0]]), 7
    )


def test_members_of_the_dynamics_see_the_same_rows_or_their_own():
    network = Dynamics(2, 3, (8,), True)
    scale = np.zeros(5, np.float32), np.ones(5, np.float32)
    params = network.init(KEY, OBS_3, ACTION, *scale)
    same = network.apply(params, OBS_3, ACTION, *scale)
    assert same.mean.shape == same.log_var.shape == (2, 7, 4) and same.terminal.shape == (2, 7)
    assert not np.isclose(same.mean[0], same.mean[1]).any()  # drawn from keys of their own
    own = network.apply(params, np.stack([OBS_3, OBS_3[::-1]]), np.stack([ACTION, ACTION[::-1]]), *scale)
    for ours, theirs in zip(own, same, strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
        np.testing.assert_allclose(ours[1], theirs[1][::-1], rtol=1e-6)
    assert (
        Dynamics(2, 3, (8,))
        .apply(Dynamics(2, 3, (8,)).init(KEY, OBS_3, ACTION, *scale), OBS_3, ACTION, *scale)
        .terminal
        is None
    )


# --- Many seeds in one program --------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", ["orthogonal", "torch"])
def test_seeds_together_start_as_each_alone(initializer):
    critic = Critic(2, (), initializer)  # a single layer, to compile less
    together = jax.jit(jax.vmap(lambda seed: critic.init(jax.random.key(seed), OBS_3, ACTION)))(np.arange(3))
    alone = jax.tree.map(lambda *leaves: np.stack(leaves), *(init(critic, seed) for seed in range(3)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), together, alone)


VMAPPED_INIT = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
import numpy as np
from common.networks import Critic, GaussianActor, Value

obs, action = np.zeros((1, 17)), np.zeros((1, 6))

def init(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return GaussianActor(6).init(keys[0], obs), Critic().init(keys[1], obs, action), Value().init(keys[2], obs)

params = jax.jit(jax.vmap(init))(np.arange(3))
assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
"""


def test_vmapped_initialisation_does_not_deadlock():
    """JAX 0.10's batched QR on a CPU can wait for the threads of other QRs, for ever: see networks._alone."""
    environ = {"PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the compiler, to save seconds: the QRs wait all the same
    subprocess.run([sys.executable, "-c", VMAPPED_INIT], env=environ, timeout=60, check=True)


def test_a_transformer_drops_tokens_attention_and_what_a_block_adds():
    """As GPT-2 does: the tokens, then in each block the weights of attention, its output, and that of the layer."""
    dropped = []

    def watch(call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, nn.Dropout | nn.MultiHeadDotProductAttention):
            share = module.rate if isinstance(module, nn.Dropout) else module.dropout_rate
            dropped.append((type(module).__name__, 0.0 if module.deterministic else share))
        return call(*args, **kwargs)

    network, rngs = CausalTransformer((8,), 1, 0.3), {"params": KEY, "dropout": KEY}
    for train, share in ((True, 0.3), (False, 0.0)):
        dropped.clear()
        with nn.intercept_methods(watch):
            jax.eval_shape(lambda x, train=train: network.init(rngs, x, train), jnp.zeros((2, 3, 4)))
        block = [("MultiHeadDotProductAttention", share), ("Dropout", share), ("Dropout", share)]
        assert dropped == [("Dropout", share), *block]


# --- Diffusion ---------------------------------------------------------------------------------------------


def test_steps_are_told_as_sines_and_cosines():
    # Frequencies 10000^(-k / 7): 1, 0.268270, 0.071969, ...
    found = sinusoidal(jnp.array([0, 1]))
    np.testing.assert_allclose(found[0], [0] * 8 + [1] * 8)
    np.testing.assert_allclose(found[1, :3], [0.841471, 0.265063, 0.071906], rtol=1e-4)
    np.testing.assert_allclose(found[1, 8:10], [0.540302, 0.964231], rtol=1e-4)


@pytest.mark.parametrize("network", [NoiseMLP(2, HIDDEN), NoiseResNet(2, HIDDEN, 0.5)])
def test_noise_is_predicted_for_each_row_by_its_step(network):
    t = jnp.arange(7) % 3
    params = jax.jit(network.init)(KEY, OBS, ACTION, t)
    apply = jax.jit(network.apply)
    noise = apply(params, OBS, ACTION, t)
    assert noise.shape == ACTION.shape
    for i, row in enumerate(noise):
        np.testing.assert_allclose(apply(params, OBS[i], ACTION[i], t[i]), row, rtol=1e-4, atol=1e-5)
    later = apply(params, OBS, ACTION, t + 1)
    assert (np.abs(later - noise).max(axis=-1) > 1e-4).all()


def test_idqls_network_is_residual_blocks_of_layer_norm_and_mish():
    """In NumPy, from the same parameters: which layer comes where. The second block changes the width."""
    network, t = NoiseResNet(2, (4, 8, 8)), jnp.arange(7) % 3
    shapes = jax.eval_shape(network.init, KEY, OBS, ACTION, t)
    leaves, tree = jax.tree.flatten(shapes)
    numbers = np.random.default_rng(0)
    params = tree.unflatten([numbers.normal(size=x.shape).astype(np.float32) for x in leaves])
    p = params["params"]

    def dense(name, x, of=p):
        layer = of[name]["linear"]
        return x @ layer["kernel"] + layer["bias"]

    def mish(x):
        return x * np.tanh(np.logaddexp(0, x))

    def norm(name, x):
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6)
        return x * p[name]["scale"] + p[name]["bias"]

    angle = 2 * np.pi * np.asarray(t)[:, None] * p["frequency"]
    time = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    time = dense("Dense_1", mish(dense("Dense_0", time, p["MLP_0"])), p["MLP_0"])
    x = dense("Dense_0", np.concatenate([ACTION, OBS, time], axis=-1))
    x = x + dense("Dense_2", mish(dense("Dense_1", norm("LayerNorm_0", x))))
    x = dense("Dense_3", x) + dense("Dense_5", mish(dense("Dense_4", norm("LayerNorm_1", x))))
    x = x + dense("Dense_7", mish(dense("Dense_6", norm("LayerNorm_2", x))))
    np.testing.assert_allclose(jax.jit(network.apply)(params, OBS, ACTION, t), dense("Dense_8", mish(x)), rtol=1e-3)


def test_dropout_is_on_in_training_alone_and_keeps_the_mean():
    network = NoiseResNet(2, (64,), 0.25)
    t = jnp.zeros(7, int)
    params = network.init(KEY, OBS, ACTION, t)
    # Without the block's second layer nothing that is dropped comes to the output: it goes round the block
    without = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "['Dense_2']" in jax.tree_util.keystr(path) else x, params
    )

    @jax.jit
    def trained(params, key):
        return network.apply(params, OBS, ACTION, t, training=True, rngs={"dropout": key})

    a, b = (trained(params, jax.random.key(k)) for k in (1, 2))
    assert np.abs(a - b).max() > 1e-3
    np.testing.assert_allclose(trained(without, KEY), network.apply(without, OBS, ACTION, t), rtol=1e-5, atol=1e-6)
    still = NoiseResNet(2, (64,), 0.0).apply(params, OBS, ACTION, t)
    np.testing.assert_array_equal(network.apply(params, OBS, ACTION, t), still)
