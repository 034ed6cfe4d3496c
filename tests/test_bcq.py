"""BCQ against numbers worked out by hand. With hidden=() every network is linear, so that they can be."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bcq, emaq
from common.datasets import Transition
from common.environments import Spec
from common.networks import VAE

CHOOSE = 1e6  # of a decoder: tanh(1e6 z) is -1 or 1, each with probability 1/2, whatever the clip of z


@functools.cache
def program(num_samples, num_act_samples):
    """A state of zeros, update and act of linear networks with one observation and one action, so two latents.

    The floats of Config are arguments, so that few programs are compiled.
    """

    def agent(floats):
        cfg = bcq.Config(hidden=(), vae_hidden=(), num_samples=num_samples, num_act_samples=num_act_samples)
        return bcq.make_agent(dataclasses.replace(cfg, **floats), Spec(1, 1))

    shapes = jax.eval_shape(agent({}).init, jax.random.key(0))._replace(key=None)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(key=jax.random.key(0))
    update = jax.jit(lambda floats, state, batch: agent(floats).update(state, batch))
    return state, update, jax.jit(lambda floats, state, obs, key: agent(floats).act(state, obs, key))


def fill(tree, kernel, bias=0.0):
    """Linear layers with this kernel (inputs,) for each output, the same for every member of an ensemble."""

    def leaf(path, x):
        new = jnp.array(kernel, jnp.float32)[:, None] if "kernel" in jax.tree_util.keystr(path) else jnp.float32(bias)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_agent(
    decoder=(0.0, 0.0, 0.0),
    perturbation=(0.0, 0.0, 0.0),
    critics=((0.0, 0.0, 0.0),) * 2,
    num_samples=32,
    num_act_samples=32,
    **changes,
):
    """(update, act, state) whose networks do not move within an update, but for `changes` of Config's floats.

    `decoder`: weights of obs and of the first latent, and bias; `perturbation` and each of `critics`: weights of obs
    and action, and bias. `target_perturbation` and `target_critics` among the changes: where they are others.
    """
    state, update, act = program(num_samples, num_act_samples)
    targets = {name: changes.pop(f"target_{name}", None) for name in ("perturbation", "critics")}
    floats = {f.name: getattr(bcq.Config(), f.name) for f in dataclasses.fields(bcq.Config) if f.type == "float"}
    floats = {name: jnp.float32(x) for name, x in (floats | {"learning_rate": 0.0} | changes).items()}
    vae = jax.tree.map(lambda x: x, state.vae.params)  # a copy
    vae["params"]["decoder"] = fill(vae["params"]["decoder"], (*decoder[:2], 0.0), decoder[2])

    def perturbation_of(weights):
        return fill(state.target_perturbation, weights[:2], weights[2])

    def critics_of(rows):
        members = [fill(jax.tree.map(lambda x: x[:1], state.target_critic), row[:2], row[2]) for row in rows]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *members)

    state = state._replace(
        vae=state.vae._replace(params=vae),
        perturbation=state.perturbation._replace(params=perturbation_of(perturbation)),
        critic=state.critic._replace(params=critics_of(critics)),
        target_perturbation=perturbation_of(targets["perturbation"] or perturbation),
        target_critic=critics_of(targets["critics"] or critics),
    )
    return functools.partial(update, floats), functools.partial(act, floats), state


def batch_of(obs, action, reward=0.0, next_obs=0.0, terminal=0.0):
    n = len(obs)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    obs, action = jnp.array(obs)[:, None], jnp.broadcast_to(jnp.float32(action), (n,))[:, None]
    return Transition(obs, action, column(reward), column(next_obs)[:, None], column(terminal))


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


# --- The VAE ---------------------------------------------------------------------------------------------


def test_vae_loss_has_means_over_dimensions():
    # Two action dimensions, four latents. Zero networks but for the encoder's bias: mean 1, log std log 2.
    # KL of one latent = (1 + 4 - 1 - 2 log 2) / 2 = 1.306853, and so is its mean over latents.
    # The decoder gives 0: error = (0.2^2 + 0.6^2) / 2 = 0.2. Loss = 0.2 + 0.5 * 1.306853.
    agent = bcq.make_agent(bcq.Config(hidden=(), vae_hidden=()), Spec(1, 2))
    shapes = jax.eval_shape(agent.init, jax.random.key(0))._replace(key=None)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)._replace(key=jax.random.key(0))
    encoder_bias(state.vae.params)["bias"] = jnp.array([1.0] * 4 + [np.log(2.0)] * 4)
    batch = batch_of([1.0, 2.0], 0.0)._replace(action=jnp.array([[0.2, 0.6], [0.6, 0.2]]))
    _, info = jax.jit(agent.update)(state, batch)
    np.testing.assert_allclose(info["kl"], 2 - np.log(2), rtol=1e-5)
    np.testing.assert_allclose(info["recon_loss"], 0.2, rtol=1e-5)
    np.testing.assert_allclose(info["vae_loss"], 0.2 + 0.5 * (2 - np.log(2)), rtol=1e-5)


def encoder_bias(vae_params):
    (layer,) = vae_params["params"]["encoder"].values()
    return layer["linear"]


def test_vae_reconstructs_from_the_posterior_unclipped():
    # Posterior mean 3, std exp(-4): z = 3, far outside the clip of generated latents; decoder tanh(z / 3) = tanh(1).
    update, _, state = linear_agent(decoder=(0.0, 1 / 3, 0.0))
    encoder_bias(state.vae.params)["bias"] = jnp.array([3.0, 0.0, -9.0, 0.0])  # log std clipped to -4
    _, info = update(state, batch_of([0.0] * 64, 0.5))
    np.testing.assert_allclose(info["recon_loss"], (np.tanh(1) - 0.5) ** 2, rtol=0.02)
    # one latent: (9 + exp(-8) - 1 + 8) / 2, the other 0
    np.testing.assert_allclose(info["kl"], (16 + np.exp(-8)) / 2 / 2, rtol=1e-5)


def test_critics_and_perturbation_do_not_move_the_vae():
    batch = batch_of([0.3, -2.0], jnp.array([0.5, -0.2]), reward=1.0, next_obs=1.0)
    vaes = []
    for scale in (0.0, 3.0):
        update, _, state = linear_agent(
            (0.3, 1.0, 0.1), (scale,) * 3, ((scale, -scale, scale),) * 2, learning_rate=1e-3
        )
        vaes.append(update(state, batch._replace(reward=scale * batch.reward))[0].vae)
    chex.assert_trees_all_equal(*vaes)
    assert any(jnp.any(g != 0) for g in jax.tree.leaves(gradient(vaes[0])))


# --- Proposals -------------------------------------------------------------------------------------------


def test_generated_latents_are_clipped():
    # a = tanh(z), Q1 = a: of 32 proposals the best has z = 0.5 exactly but with probability (1 - 0.31)^32 = 7e-6
    _, act, state = linear_agent((0.0, 1.0, 0.0), critics=((0.0, 1.0, 0.0),) * 2, phi=0.0)
    np.testing.assert_allclose(act(state, jnp.zeros((32, 1)), jax.random.key(1)), np.tanh(0.5), rtol=1e-6)


@pytest.mark.parametrize("weight, expect", [(0.0, 0.0), (1e6, 0.05), (-1e6, -0.05)])
def test_a_perturbation_is_at_most_phi(weight, expect):
    # VAE action tanh(0.3 s); perturbation phi tanh(weight), within phi of it on either side
    _, act, state = linear_agent((0.3, 0.0, 0.0), (0.0, 0.0, weight))
    obs = jnp.linspace(-1, 1, 32)[:, None]
    np.testing.assert_allclose(act(state, obs, jax.random.key(1)), np.tanh(0.3 * obs) + expect, rtol=1e-5, atol=1e-6)


def test_a_perturbed_action_is_within_the_bounds():
    _, act, state = linear_agent((0.0, 0.0, 9.0), (0.0, 0.0, 9.0))
    np.testing.assert_array_equal(act(state, jnp.zeros((32, 1)), jax.random.key(1)), np.ones((32, 1)))


def test_phi_zero_is_the_vaes_action_exactly():
    _, act, state = linear_agent((0.7, 1.0, 0.2), (3.0, 1.0, 2.0), phi=0.0, latent_clip=0.0)
    obs = jnp.linspace(-1, 1, 32)[:, None]
    decoded = VAE(1, 2, ()).apply(state.vae.params, obs, jnp.zeros((32, 2)), method="decode")
    np.testing.assert_array_equal(act(state, obs, jax.random.key(1)), decoded)


# --- The target ------------------------------------------------------------------------------------------

# Two proposals, -1 and 1, of which target Q1 = 3 + 2 a is (1, 5) and target Q2 = 2.5 - a / 2 is (3, 2)
TWO = dict(decoder=(0.0, CHOOSE, 0.0), target_critics=((0.0, 2.0, 3.0), (0.0, -0.5, 2.5)), phi=0.0)


@pytest.mark.parametrize("min_weight, next_q", [(0.75, 2.75), (1.0, 2.0), (0.0, 5.0)])
def test_critics_are_mixed_before_the_maximum(min_weight, next_q):
    # Mixed by 0.75: (0.75 * 1 + 0.25 * 3, 0.75 * 2 + 0.25 * 5) = (1.5, 2.75), the larger 2.75. (The mix of the two
    # maxima, 0.75 * 3 + 0.25 * 5 = 3.5, is wrong.) By 1: the larger of the minima (1, 2), clipped double Q. By 0: 5.
    # y = 1 + 0.99 next_q where the episode goes on, 1 at a terminal; Q = 0, so that the loss is 2 critics * mean(y^2).
    # That all 32 proposals are alike has probability 2^-31.
    update, _, state = linear_agent(**TWO, min_weight=min_weight)
    _, info = update(state, batch_of([0.0, 0.0], 0.0, reward=1.0, terminal=jnp.array([0.0, 1.0])))
    np.testing.assert_allclose(info["critic_loss"], 2 * ((1 + 0.99 * next_q) ** 2 + 1) / 2, rtol=1e-5)


def test_the_value_it_believes_is_mixed_as_the_target_is():
    _, _, state = linear_agent(critics=TWO["target_critics"])
    agent = bcq.make_agent(bcq.Config(hidden=(), vae_hidden=()), Spec(1, 1))
    q = agent.q(state, jnp.zeros((2, 1)), jnp.array([[-1.0], [1.0]]))
    np.testing.assert_allclose(q, [1.5, 2.75], rtol=1e-6)


def test_one_sample_in_the_target_and_many_in_acting():
    # Proposals -1 or 1 and Q = a: the value of one is -1 or 1, the maximum of 32 is 1. The gradient of the bias of an
    # online critic at Q = 0 is -2 mean(y), y = 0.99 of that value.
    def bias_of(state):
        (g,) = (g for p, g in jax.tree_util.tree_leaves_with_path(gradient(state)) if "bias" in jax.tree_util.keystr(p))
        return g

    ones = dict(decoder=(0.0, CHOOSE, 0.0), target_critics=((0.0, 1.0, 0.0),) * 2, phi=0.0)
    batch = batch_of([0.0] * 512, 0.0)
    for num, mean in ((1, 0.0), (32, 1.0)):
        update, _, state = linear_agent(**ones, num_samples=num, num_act_samples=33 - num)
        after, _ = update(state, batch)
        np.testing.assert_allclose(bias_of(after.critic), -2 * 0.99 * mean, atol=0.4)  # four standard errors: 0.35
        act = linear_agent(**ones, num_samples=33 - num, num_act_samples=num)[1]
        state = state._replace(critic=state.critic._replace(params=state.target_critic))
        np.testing.assert_allclose(act(state, batch.obs, jax.random.key(1)).mean(), mean, atol=0.2)


def test_phi_large_with_one_sample_is_ddpg():
    # The VAE gives 0 and phi tanh(f) is any action: y = r + 0.99 Qbar(s', tanh(f_target(s'))), and the perturbation
    # climbs Q1(s, tanh(f(s))): with f = 0.4 s + 0.1 and Q1 = s + 2 a the gradient of f's bias is -2 mean(1 - tanh(f)^2)
    update, _, state = linear_agent(
        perturbation=(0.4, 0.0, 0.1),
        critics=((1.0, 2.0, 0.0), (5.0, -3.0, 1.0)),
        target_perturbation=(-0.3, 0.0, 0.7),
        target_critics=((1.0, 1.5, 0.0),) * 2,
        phi=1.0,
        num_samples=1,
    )
    obs, next_obs = np.float32([0.5, -1.0, 2.0]), np.float32([1.0, 0.2, -2.0])
    after, info = update(state, batch_of(obs, 0.0, reward=0.5, next_obs=next_obs))
    y = 0.5 + 0.99 * (next_obs + 1.5 * np.tanh(-0.3 * next_obs + 0.7))
    expect = np.mean((obs - y) ** 2 + (5 * obs + 1 - y) ** 2)
    np.testing.assert_allclose(info["critic_loss"], expect, rtol=1e-5)
    action = np.tanh(0.4 * obs + 0.1)
    np.testing.assert_allclose(info["perturbation_loss"], -np.mean(obs + 2 * action), rtol=1e-5)
    grads = {jax.tree_util.keystr(p): g for p, g in jax.tree_util.tree_leaves_with_path(gradient(after.perturbation))}
    (bias,) = (g for name, g in grads.items() if "bias" in name)
    np.testing.assert_allclose(bias, [-2 * np.mean(1 - action**2)], rtol=1e-5)


# --- The perturbation and acting ---------------------------------------------------------------------------


def test_only_the_first_critic_moves_the_perturbation_and_chooses_the_action():
    batch = batch_of(jnp.linspace(-1, 1, 32), 0.0)
    results = []
    for second in ((0.0, 1.0, 0.0), (3.0, -5.0, 1.0)):
        update, act, state = linear_agent((0.0, 1.0, 0.0), (0.2, 0.1, 0.1), ((0.0, 1.0, 0.0), second))
        results.append((gradient(update(state, batch)[0].perturbation), act(state, batch.obs, jax.random.key(1))))
    chex.assert_trees_all_equal(*results)
    assert all(jnp.all(g != 0) for g in jax.tree.leaves(results[0][0]))


def test_the_policy_perturbs_by_the_online_network():
    _, act, state = linear_agent(perturbation=(0.0, 0.0, 9.0), target_perturbation=(0.0, 0.0, -9.0))
    np.testing.assert_allclose(act(state, jnp.zeros((32, 1)), jax.random.key(1)), 0.05, rtol=1e-5)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        bcq.make_agent(bcq.Config(), Spec(3, 4, discrete=True))


# --- EMaQ ------------------------------------------------------------------------------------------------


class VAEBehaviour(VAE):
    """BCQ's generator where EMaQ has its autoregressive model: the same latents from the same key."""

    def __call__(self, obs, action):
        return self.decode(obs, self.encode(obs, action).mean)

    def sample(self, obs, key):
        z = jax.random.normal(key, (*obs.shape[:-1], self.latent_dim))
        return self.decode(obs, jnp.clip(z, -0.5, 0.5))


def test_phi_zero_is_emaq_with_the_vae_bit_for_bit(monkeypatch):
    """Compared over three whole updates: the critics, their optimiser and their targets; then the actions.

    EMaQ's model does not change in its second phase, BCQ's VAE does in every update: EMaQ is given, before each
    update, the VAE that BCQ had after its step in it. BCQ chooses by the first critic, EMaQ by the mixture that is in
    the target: the same where both critics are equal.
    """
    spec, shared = Spec(3, 2), dict(hidden=(8, 8), num_samples=5, min_weight=0.75, tau=0.1)
    monkeypatch.setattr(emaq, "AutoregressiveActor", lambda action_dim, bins, hidden: VAEBehaviour(action_dim, 4, (8,)))
    agents = (
        bcq.make_agent(bcq.Config(**shared, phi=0.0, vae_hidden=(8,), num_act_samples=5), spec),
        emaq.make_agent(emaq.Config(**shared, num_critics=2), spec),
    )
    (bcq_update, bcq_act), (emaq_update, emaq_act) = ((jax.jit(a.update), jax.jit(a.act)) for a in agents)
    state, other = (jax.jit(agent.init)(jax.random.key(0)) for agent in agents)
    other = other._replace(critic=state.critic, target_critic=state.target_critic)
    rng = np.random.default_rng(0)
    columns = [rng.normal(size=shape).astype(np.float32) for shape in ((16, 3), (16, 2), (16,), (16, 3))]
    batch = Transition(*columns, terminal=np.float32(np.arange(16) % 4 == 0))
    batch = batch._replace(action=np.tanh(batch.action))
    for i in range(3):
        key = jax.random.key(i)
        state, _ = bcq_update(state._replace(key=key), batch)
        other = other._replace(behaviour=other.behaviour._replace(params=state.vae.params), key=key)
        other, _ = emaq_update(other, batch)
        ours, theirs = (jax.tree.leaves((x.critic, x.target_critic)) for x in (state, other))
        chex.assert_trees_all_equal(ours, theirs)
    equal = jax.tree.map(lambda x: jnp.stack([x[0], x[0]]), state.critic.params)
    state, other = (s._replace(critic=s.critic._replace(params=equal)) for s in (state, other))
    key = jax.random.key(5)
    chex.assert_trees_all_equal(bcq_act(state, batch.obs, key), emaq_act(other, batch.obs, key))
