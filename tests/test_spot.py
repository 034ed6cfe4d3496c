"""SPOT against numbers worked out by hand, and against TD3+BC. With hidden=() every network is linear."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import spot, td3_bc
from common.datasets import Transition
from common.environments import Spec
from common.networks import Normal

LINEAR = dict(hidden=(), vae_hidden=(), policy_noise=0.0, policy_delay=1, learning_rate=0.0)


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def fill(tree, kernel, bias=0.0):
    """Linear networks with this kernel (inputs,) for one output, the same for every member of an ensemble."""

    def leaf(path, x):
        new = jnp.array(kernel, jnp.float32)[:, None] if "kernel" in jax.tree_util.keystr(path) else jnp.float32(bias)
        return jnp.broadcast_to(new, x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def batch_of(obs, action=0.0, reward=0.0, terminal=1.0):
    n = len(obs)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), (n,))  # noqa: E731
    obs, action = jnp.array(obs)[:, None], column(action)[:, None]
    return Transition(obs, action, column(reward), jnp.zeros((n, 1)), column(terminal))


def linear(algo, actor=0.0, critic=(0.0, 0.0), **changes):
    """One observation, one action: pi = tanh(actor), Q_j = critic . (obs, action); a VAE that says N(0, 1) and 0."""
    cfg = algo.Config(**{name: x for name, x in (LINEAR | changes).items() if hasattr(algo.Config, name)})
    agent = algo.make_agent(cfg, Spec(1, 1))
    state = jax.jit(agent.init)(jax.random.key(0))
    state = state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, (0.0,), actor)),
        critic=state.critic._replace(params=fill(state.critic.params, critic)),
    )
    if algo is spot:
        state = state._replace(vae=state.vae._replace(params=zeros(state.vae.params)))
    return agent, state


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


def bias_of(tree):
    (bias,) = [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if "bias" in jax.tree_util.keystr(path)]
    return bias


def test_improbability_has_means_over_dimensions():
    # Errors (0.5, -0.3): mean of squares 0.17. KL of each latent N(1, 2^2): (1 + 4 - 1 - 2 log 2) / 2 = 2 - log 2
    posterior = Normal(jnp.ones((1, 4)), jnp.full((1, 4), jnp.log(2.0)))
    p = spot.improbability(jnp.array([[0.5, 0.1]]), jnp.array([[0.0, 0.4]]), posterior, 0.5)
    np.testing.assert_allclose(p, [0.17 + 0.5 * (2 - np.log(2))], rtol=1e-6)


def test_improbability_is_a_falling_line_of_the_lower_bound():
    # log N(a; g, v) summed over n = 2 dimensions, v = 0.4 / 4, less the KL of 4 latents: -2 n / 0.4 P - log(2 pi v)
    recon, action, v = np.array([0.5, 0.1]), np.array([0.0, 0.4]), 0.1
    kl = 4 * (2 - np.log(2))
    bound = (-((action - recon) ** 2) / (2 * v) - 0.5 * np.log(2 * np.pi * v)).sum() - kl
    posterior = Normal(jnp.ones(4), jnp.full(4, jnp.log(2.0)))
    p = spot.improbability(jnp.array(recon), jnp.array(action), posterior, 0.4)
    np.testing.assert_allclose(-10 * p - np.log(2 * np.pi * v), bound, rtol=1e-5)


def test_the_model_knows_two_ways_and_nothing_between_them():
    """Half of the data go left and half right. Their mean, which cloning would take, is improbable."""
    cfg = spot.Config(vae_hidden=(32, 32), batch_size=64, log_interval=1500, eval_interval=1500)
    agent = spot.make_agent(cfg, Spec(1, 1))
    data = batch_of([0.0] * 64, jnp.where(jnp.arange(64) < 32, 0.8, -0.8))
    train = jax.jit(spot.make_train(cfg, agent, "pretrain"))
    state, info = train(jax.jit(agent.init)(jax.random.key(0)), data)
    assert set(info) == {"vae_loss"}
    vae, obs = spot.VAE(1, 2, (32, 32)), jnp.zeros((500, 1))

    def cost(action):
        action = jnp.full((500, 1), action)
        recon, posterior = vae.apply(state.vae.params, obs, action, jax.random.key(1))
        return spot.improbability(recon, action, posterior, 0.5)

    left, middle, right = (cost(a).mean() for a in (-0.8, 0.0, 0.8))
    assert middle > 1.5 * max(left, right)


def test_the_actors_loss_and_its_gradient():
    # Q = 3 + a at s = 3, pi = tanh(0.5) = p; the VAE's answer is 0 and its posterior the prior: P = p^2.
    # L = -Q / |Q| + lambda p^2 = -1 + 2 p^2; dL/db = (-1 / (3 + p) + 4 p) (1 - p^2): |Q| is not differentiated
    agent, state = linear(spot, 0.5, (1.0, 1.0), weight=2.0)
    after, info = jax.jit(agent.update)(state, batch_of([3.0, 3.0]))
    p = np.tanh(0.5)
    np.testing.assert_allclose(info["improbability"], p**2, rtol=1e-5)
    np.testing.assert_allclose(info["actor_loss"], -1 + 2 * p**2, rtol=1e-4)
    np.testing.assert_allclose(bias_of(gradient(after.actor)), [(-1 / (3 + p) + 4 * p) * (1 - p**2)], rtol=1e-5)


def test_only_the_first_critic_moves_the_actor():
    agent, state = linear(spot, 0.2, (0.5, 1.0))
    second = jax.tree.map(lambda x: x.at[1].set(-5 * x[1]), state.critic.params)
    other = state._replace(critic=state.critic._replace(params=second))
    one, two = (jax.jit(agent.update)(x, batch_of([1.0, 2.0]))[0] for x in (state, other))
    chex.assert_trees_all_equal(gradient(one.actor), gradient(two.actor))


def test_the_policy_is_pulled_by_the_posterior_too():
    # An encoder whose means are 1.5 a: the KL adds 0.5 (1.5 a)^2 / 2, of which dP/da has 0.5 * 2.25 a beside 2 a
    agent, state = linear(spot, 0.5, (1.0, 0.0), weight=1.0)
    params = state.vae.params
    (layer,) = params["params"]["encoder"].values()
    layer = layer.get("linear", layer)
    layer["kernel"] = layer["kernel"].at[1, :2].set(1.5)
    after, info = jax.jit(agent.update)(state._replace(vae=state.vae._replace(params=params)), batch_of([3.0, 3.0]))
    p = np.tanh(0.5)
    np.testing.assert_allclose(info["improbability"], p**2 + 0.25 * 2.25 * p**2, rtol=1e-5)
    np.testing.assert_allclose(bias_of(gradient(after.actor)), [(2 + 1.125) * p * (1 - p**2)], rtol=1e-4)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_with_a_model_of_one_action_it_is_td3_bc(noise):
    """Where the model knows 0 alone, P = pi^2: it is lambda times TD3+BC's on data of action 0, alpha = 1 / lambda."""
    both = dict(
        weight=0.25,
        alpha=4.0,
        learning_rate=1e-3,
        actor_learning_rate=1e-3,
        policy_noise=noise,
        tau=0.005,
        normalize_obs=True,
    )
    rows = batch_of([0.3, -2.0, 1.1], 0.0, jnp.array([0.4, 1.0, -1.0]), terminal=jnp.array([0.0, 1.0, 0.0]))
    (agent, state), (theirs, same) = (linear(algo, 0.3, (0.7, 1.3), **both) for algo in (spot, td3_bc))
    ours, our_info = jax.jit(agent.update)(state, rows)
    same, info = jax.jit(theirs.update)(same._replace(key=state.key), rows)
    for name in ("critic", "target_critic"):
        jax.tree.map(np.testing.assert_array_equal, *(jax.tree.leaves(getattr(x, name)) for x in (ours, same)))
    np.testing.assert_allclose(our_info["critic_loss"], info["critic_loss"], rtol=1e-6)
    np.testing.assert_allclose(our_info["actor_loss"], 0.25 * info["actor_loss"], rtol=1e-5)
    expect = jax.tree.leaves(jax.tree.map(lambda x: 0.25 * x, gradient(same.actor)))
    chex.assert_trees_all_close(jax.tree.leaves(gradient(ours.actor)), expect, rtol=1e-4)


@pytest.mark.parametrize("share, factor", [(0.0, 1.0), (0.2, 0.8), (0.5, 0.5), (0.8, 0.2), (1.0, 0.2), (3.0, 0.2)])
def test_what_is_left_of_lambda(share, factor):
    np.testing.assert_allclose(spot.weight_at(0.25, 0.2, share * 1_000_000, 1_000_000), 0.25 * factor, rtol=1e-6)


def test_lambda_falls_with_the_updates_on_line_and_with_no_others():
    # 10 updates in turns of 2, decay_updates 20: of the actor's, the 2nd, 4th .. 10th, the mean is 1 - 6 / 20
    cfg = spot.Config(hidden=(8,), vae_hidden=(8,), batch_size=8, weight=0.5, decay_updates=20, log_interval=10)
    agent = spot.make_agent(cfg, Spec(1, 1))
    data = batch_of(np.linspace(-1, 1, 8), 0.1, 1.0)
    state, info = jax.jit(spot.make_train(cfg, agent))(jax.jit(agent.init)(jax.random.key(0)), data)
    assert state.online_updates == 0 and info["weight"] == 0.5
    ring = spot.Ring(jax.tree.map(lambda x: x[None], data), jnp.array([8]))
    learn = jax.jit(lambda *at: spot.learn(cfg, agent, *at))
    (state, _), info = learn(state, 0, data, ring)
    assert state.online_updates == 10
    np.testing.assert_allclose(info["weight"], 0.5 * 0.7, rtol=1e-6)
    (state, _), info = learn(state, 0, data, ring)  # 1 - 16 / 20, but at least 0.2: 0.4, 0.3, 0.2, 0.2, 0.2
    np.testing.assert_allclose(info["weight"], 0.5 * 0.26, rtol=1e-6)
    actor_steps = state.actor.opt_state[0].count
    assert actor_steps == 5 + 5 + 5, "and Adam goes on with its moments where it was"


def test_the_model_is_fitted_in_the_first_phase_alone():
    cfg = spot.Config(hidden=(8,), vae_hidden=(8,))
    agent = spot.make_agent(cfg, Spec(1, 1))
    state, rows = jax.jit(agent.init)(jax.random.key(0)), batch_of([0.3, -2.0], 0.5, 1.0, 0.0)
    before, _ = jax.jit(agent.pretrain)(state, rows)
    for name in ("actor", "critic", "target_actor", "target_critic"):
        chex.assert_trees_all_equal(getattr(before, name), getattr(state, name))
    assert not np.array_equal(*(jax.tree.leaves(x.vae.params)[-1] for x in (before, state)))
    for turn in (*agent.cycle, *agent.online_cycle):
        chex.assert_trees_all_equal(jax.jit(turn)(before, rows)[0].vae, before.vae)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        spot.make_agent(spot.Config(), Spec(3, 4, discrete=True))
