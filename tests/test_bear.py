"""BEAR against numbers worked out by hand. With hidden=() every network is linear, so that they can be."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bear, brac
from common.datasets import Transition
from common.environments import Spec

STILL = dict(learning_rate=0.0, actor_learning_rate=0.0, alpha_learning_rate=0.0)
LINEAR = bear.Config(hidden=(), vae_hidden=(), mmd_sigma=10.0, **STILL)
KEY = jax.random.key(0)


@pytest.fixture
def no_noise(monkeypatch):
    """Every sample of a Gaussian is its mean, every latent of the prior 0."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args, **kwargs: jnp.zeros(shape))


def fill(tree, kernel, bias):
    """Linear networks with this kernel (inputs, outputs) and this bias (outputs,)."""
    values = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    return jax.tree_util.tree_map_with_path(lambda path, x: values[path[-1].key].reshape(x.shape), tree)


def linear_state(agent, actor=(0, 0, -5), decoder=0.0, encoder=(0, 0), critics=((0, 0),) * 2, targets=((0, 0),) * 2):
    """One observation, one action. A policy (m, c, l) is tanh of N(m * obs + c, e^2l), Q_j = critics[j] @ (obs, a).

    The VAE's posterior has this mean and log standard deviation; its action before the tanh is `decoder` + z_0.
    """
    shapes = jax.eval_shape(agent.init, KEY)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    mean, constant, log_std = actor
    vae = {
        "encoder": fill(state.vae.params["params"]["encoder"], np.zeros((2, 4)), np.repeat(encoder, 2)),
        "decoder": fill(state.vae.params["params"]["decoder"], [[0], [1], [0]], [decoder]),
    }

    def critic(tree, weights):
        return fill(tree, np.array(weights, np.float32)[..., None], np.zeros((2, 1)))

    return state._replace(
        key=KEY,
        actor=state.actor._replace(params=fill(state.actor.params, [[mean, 0]], [constant, log_std])),
        vae=state.vae._replace(params={"params": vae}),
        critic=state.critic._replace(params=critic(state.critic.params, critics)),
        target_critic=critic(state.target_critic, targets),
    )


def rows(obs=0.0, action=0.0, reward=0.0, next_obs=0.0, terminal=(0.0, 0.0)):
    column = lambda x: jnp.full((len(terminal), 1), x, jnp.float32)  # noqa: E731
    return Transition(column(obs), column(action), column(reward)[:, 0], column(next_obs), jnp.float32(terminal))


def with_log_alpha(state, log_alpha):
    return state._replace(log_alpha=state.log_alpha._replace(params=jnp.float32(log_alpha)))


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


# --- Maximum mean discrepancy ------------------------------------------------------------------------------


def points(*x):
    return jnp.float32(x)[:, None]  # (samples, action_dim)


@pytest.mark.parametrize("kernel, sigma, value", [("laplacian", 10.0, 0.312317), ("gaussian", 20.0, 0.222219)])
def test_mmd_of_two_points(kernel, sigma, value):
    # x = 0, y = 1: sqrt(2 - 2 exp(-1 / (2 sigma)) + 1e-6): e^-0.05 = 0.951229, e^-0.025 = 0.975310
    np.testing.assert_allclose(bear.mmd(points(0), points(1), kernel, sigma), value, rtol=1e-5)
    # Two dimensions, x = (0, 0), y = (1, 2): |x - y|_1 = 3, |x - y|^2 = 5
    two = bear.mmd(jnp.zeros((1, 2)), jnp.array([[1.0, 2.0]]), kernel, sigma)
    distance = {"laplacian": 3, "gaussian": 5}[kernel]
    np.testing.assert_allclose(two, np.sqrt(2 - 2 * np.exp(-distance / (2 * sigma)) + 1e-6), rtol=1e-5)


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_mmd_of_a_set_and_itself(kernel):
    x = jax.random.normal(KEY, (4, 7, 3))  # (samples, states, action_dim)
    value, slope = jax.value_and_grad(lambda x: bear.mmd(x, jax.lax.stop_gradient(x), kernel, 20.0).sum())(x)
    np.testing.assert_allclose(value, 7 * 1e-3, rtol=0.1)  # sqrt(1e-6); the three means cancel to some 1e-7
    assert np.isfinite(slope).all()
    one = bear.mmd(x[:1], x[:1], kernel, 20.0)
    np.testing.assert_allclose(one, np.full(7, 1e-3), rtol=1e-5)


def test_mmd_counts_pairs_of_a_sample_and_itself():
    # x = {0, 1}, y = {0, 0}, k = exp(-1 / 20) = 0.951229: (1 + k) / 2 - 2 (1 + k) / 2 + 1 = (1 - k) / 2 = 0.024385
    np.testing.assert_allclose(bear.mmd(points(0, 1), points(0, 0), "laplacian", 10.0), 0.156161, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_mmd_is_symmetric_and_does_not_see_the_order(kernel):
    x, y = jax.random.normal(KEY, (2, 5, 3, 2))
    forward, back, shuffled = (bear.mmd(*xy, kernel, 1.0) for xy in ((x, y), (y, x), (x[::-1], y[jnp.arange(5) - 2])))
    np.testing.assert_allclose(back, forward, rtol=1e-4)
    np.testing.assert_allclose(shuffled, forward, rtol=1e-4)


# --- Critic ------------------------------------------------------------------------------------------------


def test_critics_are_mixed_before_the_maximum():
    # Two actions, Q_1 = (1, 5), Q_2 = (3, 2): mixes 0.75 * 1 + 0.25 * 3 = 1.5 and 2.75. The mix of maxima would be 3.5.
    np.testing.assert_allclose(bear.mix(jnp.array([[1.0, 5.0], [3.0, 2.0]]), 0.75), [1.5, 2.75])


def test_target_mixes_before_its_maximum():
    # Q'_1 = 1 + 3 a', Q'_2 = 1 - 3 a': every mix is 1 - 1.5 |a'|, at most 1. Samples near both bounds have maxima of 4.
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, actor=(0, 0, 2.0), targets=[[1, 3], [1, -3]])
    _, info = jax.jit(agent.update)(state, rows(next_obs=1.0, terminal=np.zeros(64)))
    assert info["critic_loss"] < 2 * 0.99**2


def test_target(no_noise):
    # pi(s') = tanh(0.8 * 0.5) = 0.379949, target critics 2 s' + 3 a' = 2.139847 and 2 s' + a' = 1.379949:
    # 0.75 * 1.379949 + 0.25 * 2.139847 = 1.569923, y = 1 + 0.99 * 1.569923 = 2.554224; 1 at the terminal. Q = 0.
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, actor=(0.8, 0, -1), targets=[[2, 3], [2, 1]])
    _, info = jax.jit(agent.update)(state, rows(obs=-0.5, reward=1.0, next_obs=0.5, terminal=(0.0, 1.0)))
    np.testing.assert_allclose(info["critic_loss"], 2 * (2.554224**2 + 1) / 2, rtol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_target_is_the_maximum_over_samples(num_samples):
    # a' = tanh of N(0, e^4): near -1 or 1, the largest of n at -1 with a chance of 2^-n. Q' = 1 + a' is 0 or 2
    agent = bear.make_agent(dataclasses.replace(LINEAR, num_samples=num_samples), Spec(1, 1))
    state = linear_state(agent, actor=(0, 0, 2.0), targets=[[1, 1], [1, 1]])
    _, info = jax.jit(agent.update)(state, rows(next_obs=1.0, terminal=np.zeros(4096)))
    np.testing.assert_allclose(info["critic_loss"], 2 * (1 - 2.0**-num_samples) * (0.99 * 2) ** 2, rtol=0.1)


# --- Behaviour model ---------------------------------------------------------------------------------------


def test_vae_loss(no_noise):
    # Posterior N(0.3, (e^0.2)^2): KL = (0.09 + e^0.4 - 1 - 0.4) / 2 = 0.090912 in each latent dimension, and its sample
    # is 0.3: recon = tanh(0.5 + 0.3) = 0.664037, a = 0.1: 0.318138. Loss = 0.318138 + 0.5 * 0.090912.
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, decoder=0.5, encoder=(0.3, 0.2))
    _, info = jax.jit(agent.update)(state, rows(action=0.1))
    np.testing.assert_allclose([info["kl"], info["recon_loss"]], [0.090912, 0.318138], rtol=1e-4)
    np.testing.assert_allclose(info["vae_loss"], 0.318138 + 0.5 * 0.090912, rtol=1e-4)


def test_the_mmd_does_not_train_the_behaviour_model():
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    update = jax.jit(agent.update)
    weak, strong = (update(with_log_alpha(linear_state(agent, decoder=0.5), x), rows(action=0.1))[0] for x in (-5, 9))
    chex.assert_trees_all_equal(weak.vae, strong.vae)


def test_latents_and_the_policys_log_std_are_clipped(monkeypatch):
    # All noise is 9. Behaviour: z = 0.5. Policy: 0.5 + 9 e^-5, as its log std of -9 is clipped to -5. MMD with their
    # distance 9 e^-5 = 0.060642
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args, **kwargs: jnp.full(shape, 9.0))
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    _, info = jax.jit(agent.update)(linear_state(agent, actor=(0, 0.5, -9)), rows())
    np.testing.assert_allclose(info["mmd"], np.sqrt(2 - 2 * np.exp(-0.060642 / 20) + 1e-6), rtol=1e-3)


# --- Policy and its constraint -----------------------------------------------------------------------------


def test_actors_loss_and_its_gradient(no_noise):
    # Before the tanh the policy is at u = 0.8 * 0.5 + 1.6 = 2 and the behaviour at 0: k = exp(-2 / 20) = 0.904837,
    # MMD = sqrt(2 - 2 k + 1e-6) = 0.436266. (Between the actions themselves, tanh 2 = 0.964028 and 0, it is 0.306661.)
    # Q = min(a, 3 + a) at a = tanh 2. log alpha = log 2: L = 2 (0.436266 - 0.05) - 0.964028 = -0.191496.
    # dMMD/du = (2 k / 20) / (2 MMD) = 0.103702; dL/du = 2 * 0.103702 - (1 - tanh(2)^2) = 0.136753
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, actor=(0.8, 1.6, -1), critics=[[6, 1], [0, 1]])
    after, info = jax.jit(agent.update)(with_log_alpha(state, np.log(2)), rows(obs=0.5))
    np.testing.assert_allclose(info["mmd"], 0.436266, rtol=1e-4)
    np.testing.assert_allclose(info["actor_loss"], -0.191496, rtol=1e-3)
    bias, kernel = jax.tree.leaves(gradient(after.actor))
    np.testing.assert_allclose([bias[0], kernel[0, 0]], [0.136753, 0.5 * 0.136753], rtol=1e-3)


def test_mmd_of_many_samples():
    # Policy N(0, 1) before the tanh, behaviour at 0, k = exp(-d^2 / 2): E k(u, 0) = 1 / sqrt(2), and of two samples
    # E k(u, u') = 1 / sqrt(3): MMD^2 = 1/n + (1 - 1/n) 0.577350 - 1.414214 + 1 = 0.169741 with n = 64; n = 1: 0.585786
    cfg = dataclasses.replace(LINEAR, kernel="gaussian", mmd_sigma=1.0, num_mmd_samples=64, latent_clip=0.0)
    agent = bear.make_agent(cfg, Spec(1, 1))
    _, info = jax.jit(agent.update)(linear_state(agent, actor=(0, 0, 0)), rows(terminal=np.zeros(512)))
    np.testing.assert_allclose(info["mmd"], np.sqrt(0.169741), rtol=0.03)


def test_q_is_asked_for_one_sample_of_the_policy():
    # alpha = 0 and Q = a, pi = tanh of N(1, 1): L = -E[tanh(1 + eps)] = -0.5504; of the mean of four samples, -0.6891
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = with_log_alpha(linear_state(agent, actor=(0, 1, 0), critics=[[0, 1]] * 2), -jnp.inf)
    _, info = jax.jit(agent.update)(state, rows(terminal=np.zeros(4096)))
    np.testing.assert_allclose(info["actor_loss"], -0.5504, atol=0.03)


def test_the_first_phase_trains_q_and_its_target():
    agent = bear.make_agent(dataclasses.replace(LINEAR, learning_rate=0.1), Spec(1, 1))
    state = linear_state(agent)
    after, _ = jax.jit(agent.pretrain)(state, rows(obs=1.0, action=0.5, reward=1.0))
    assert all((x > 0).all() for x in jax.tree.leaves((after.critic.params, after.target_critic)))  # from 0 up to y = 1


def test_no_gradient_of_q_reaches_the_policy_in_the_first_phase():
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    batch = rows(obs=0.5, terminal=(1.0, 1.0))
    for phase, same in ((agent.pretrain, True), (agent.update, False)):
        step = jax.jit(phase)
        one, other = (
            gradient(step(linear_state(agent, critics=c), batch)[0].actor) for c in ([[0, 1]] * 2, [[5, -9]] * 2)
        )
        assert same == all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_without_constraint_and_maximum_it_is_brac_without_a_penalty(no_noise):
    """alpha = 0, one sample, min_weight 1; BRAC's alpha 0: the actor-critic of the smaller Q, SAC without entropy."""
    rates = dict(learning_rate=0.1, actor_learning_rate=0.1, hidden=())
    agent = bear.make_agent(dataclasses.replace(LINEAR, **rates, num_samples=1, min_weight=1.0), Spec(1, 1))
    other = brac.make_agent(brac.Config(**rates, alpha=0.0), Spec(1, 1))
    state = linear_state(agent, (0.8, 0.3, -1), critics=[[2, 1], [-1, 3]], targets=[[2, 3], [2, 1]])
    state = with_log_alpha(state, -jnp.inf)
    shapes = jax.eval_shape(other.init, KEY)._replace(key=None)
    same = {name: getattr(state, name) for name in ("key", "actor", "critic", "target_critic")}
    other_state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(**same)
    batch = rows(obs=-0.5, action=0.1, reward=1.0, next_obs=0.5, terminal=(0.0, 1.0))
    ours, theirs = jax.jit(agent.update)(state, batch)[0], jax.jit(other.update)(other_state, batch)[0]
    for name in ("actor", "critic", "target_critic"):
        leaves = (jax.tree.leaves(getattr(state, name)) for state in (ours, theirs))
        chex.assert_trees_all_close(*leaves, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("phase", ["pretrain", "update"])
def test_alpha_rises_where_the_mmd_is_above_its_threshold(no_noise, phase):
    # MMD = 0.436266 as above. d/dlog alpha of alpha (MMD - threshold), at alpha = 2, is 2 (MMD - threshold); Adam's
    # first step is the learning rate; log alpha stays in [-5, 10].
    cfg = dataclasses.replace(LINEAR, alpha_learning_rate=0.1)
    state = linear_state(bear.make_agent(cfg, Spec(1, 1)), actor=(0.8, 1.6, -1))

    @jax.jit
    def step(threshold, log_alpha):
        agent = bear.make_agent(dataclasses.replace(cfg, mmd_threshold=threshold), Spec(1, 1))
        return getattr(agent, phase)(with_log_alpha(state, log_alpha), rows(obs=0.5))

    for threshold, first, second in ((0.4, 0.0, 0.1), (0.5, 0.0, -0.1), (0.5, -4.95, -5.0), (0.4, 9.95, 10.0)):
        after, info = step(threshold, first)
        np.testing.assert_allclose(after.log_alpha.params, second, rtol=1e-4)
        np.testing.assert_allclose(info["alpha"], np.exp(first), rtol=1e-4)
        np.testing.assert_allclose(gradient(after.log_alpha), -np.exp(first) * (0.436266 - threshold), rtol=1e-2)


# --- Acting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_act_is_the_best_of_many_samples_by_the_first_critic(sign):
    # pi = tanh of N(0, 1): 100 samples reach tanh(+-1.28) with a chance of 1 - 0.9^100
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, actor=(0, 0, 0), critics=[[0, sign], [0, -9 * sign]])
    action = jax.jit(agent.act)(state, jnp.zeros((5, 1)), KEY)
    assert (sign * action > np.tanh(1.28)).all() and len(np.unique(action)) == 5


def test_what_it_believes_is_the_targets_mix():
    agent = bear.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, critics=[[0, 4], [0, 8]])
    np.testing.assert_allclose(agent.q(state, jnp.ones((1, 1)), jnp.ones((1, 1))), [0.75 * 4 + 0.25 * 8])


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        bear.make_agent(bear.Config(), Spec(3, 4, discrete=True))
