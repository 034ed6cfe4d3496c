"""IDQL against numbers worked out by hand: its sampler with an exact model, its choice of an action, and its limits."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import modes
import numpy as np
import pytest
from modes import ABAR, BETA, set_layers

from algos import idql, iql
from common.datasets import Transition
from common.environments import Spec

# --- Schedule and sampler ------------------------------------------------------------------------------------


def test_the_schedule_of_five_steps():
    """beta_t = 1 - exp(-bmin / T - (bmax - bmin) (2 t - 1) / (2 T^2))"""
    steps = idql.schedule(5)
    np.testing.assert_allclose(steps.beta, BETA, rtol=1e-5)
    np.testing.assert_allclose(steps.signal, np.sqrt(ABAR), rtol=1e-4)
    np.testing.assert_allclose(steps.noise, np.sqrt(1 - ABAR), rtol=1e-5)
    np.testing.assert_allclose(idql.schedule(100).signal[-1] ** 2, 0.0064093, rtol=1e-4)  # exp(-0.1 - 9.9 / 2)


def test_noise_is_added_by_the_step_of_each_row():
    # At the third step 0.398121 * 0.5 + 0.917333 * 1
    action, noise = jnp.array([[0.5, 0.5], [0.5, -0.5]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
    noisy = idql.add_noise(action, noise, jnp.array([2, 0]), 5)
    np.testing.assert_allclose(noisy, [[1.116393, 0.199061], [0.448365, 0.442577 - 0.448365]], rtol=1e-5)


@pytest.mark.parametrize(
    "num_steps, expect", [(5, (0.7308, 0.2079, 0.3393)), (20, (0.7322, 0.2320, 0.4376)), (50, (0.7492, 0.2492, 0.4335))]
)
def test_samples_of_an_exact_model(num_steps, expect):
    """Integrals over this sampler's transitions; Diffusion-QL's, which clips otherwise, has 0.82 at five steps."""
    steps = idql.schedule(num_steps)

    def predict(x, t):
        return modes.exact(x, steps.signal[t][..., None], steps.noise[t][..., None])

    action = jax.jit(lambda key: idql.sample(predict, key, (100_000, 1), num_steps))(jax.random.key(0))
    np.testing.assert_allclose(modes.of_samples(action), expect, atol=0.005)
    assert np.abs(action).max() <= 1


def test_a_point_is_hit_from_every_noise():
    steps = idql.schedule(5)

    def predict(x, t):
        return (x - steps.signal[t][..., None] * 0.3) / steps.noise[t][..., None]

    np.testing.assert_allclose(idql.sample(predict, jax.random.key(0), (100, 2), 5), 0.3, atol=1e-5)


def test_noise_is_clipped_into_the_box_after_each_step():
    # A model that sees no noise takes nothing away: x only grows, by 1 / sqrt(1 - beta), beyond the box in 95 % of the
    # draws. Clipped at each step, it is on a bound in 67 % of them, a Monte Carlo in NumPy says
    action = idql.sample(lambda x, t: jnp.zeros_like(x), jax.random.key(0), (20_000, 1), 5)
    np.testing.assert_allclose(np.mean(np.abs(action) == 1), 0.67125, atol=0.01)


# --- Training ------------------------------------------------------------------------------------------------

SPEC = Spec(3, 2)
SMALL = {"hidden": (8,), "actor_hidden": (8,), "num_updates": 100}


def random_batch(key, n=16):
    k = jax.random.split(key, 5)
    obs, next_obs = (jax.random.normal(k[i], (n, 3)) for i in (0, 1))
    action = jax.random.uniform(k[2], (n, 2), minval=-1)
    terminal = jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(obs, action, jax.random.normal(k[3], (n,)), next_obs, terminal)


@functools.cache
def program():
    """A fresh state, the agent's jitted update, and a batch."""
    agent = idql.make_agent(idql.Config(**SMALL), SPEC)
    return jax.jit(agent.init)(jax.random.key(0)), jax.jit(agent.update), random_batch(jax.random.key(1))


def test_its_values_are_those_of_iql():
    """From the same weights: whatever the policy is, the values do not read it."""
    state, update, batch = program()
    agent = iql.make_agent(iql.Config(hidden=(8,), num_updates=100), SPEC)
    theirs = jax.jit(agent.init)(jax.random.key(0))
    names = ("critic", "target_critic", "value")
    theirs = theirs._replace(**{name: getattr(state, name) for name in names})
    iql_update = jax.jit(agent.update)
    for _ in range(3):
        state, info = update(state, batch)
        theirs, iql_info = iql_update(theirs, batch)
    for name in names:
        ours, other = (jax.tree.leaves(getattr(x, name)) for x in (state, theirs))
        chex.assert_trees_all_close(ours, other, rtol=1e-5, atol=1e-7)
    for name in ("value_loss", "critic_loss", "v", "q"):
        np.testing.assert_allclose(info[name], iql_info[name], rtol=1e-6)


def test_its_policy_reads_no_value():
    state, update, batch = program()
    larger = jax.tree.map(lambda x: 100 * x, (state.critic.params, state.target_critic, state.value.params))
    other = state._replace(
        critic=state.critic._replace(params=larger[0]),
        target_critic=larger[1],
        value=state.value._replace(params=larger[2]),
    )
    new, also = (update(x, batch)[0] for x in (state, other))
    chex.assert_trees_all_equal((new.actor, new.target_actor), (also.actor, also.target_actor))


def test_the_average_of_the_actor_moves_by_its_own_step():
    state, update, batch = program()
    new, _ = update(state, batch)
    expect = jax.tree.map(lambda x, y: 0.001 * x + 0.999 * y, new.actor.params, state.target_actor)
    chex.assert_trees_all_close(new.target_actor, expect, rtol=1e-6)
    expect = jax.tree.map(lambda x, y: 0.05 * x + 0.95 * y, new.critic.params, state.target_critic)
    chex.assert_trees_all_close(new.target_critic, expect, rtol=1e-6)


def test_cloning_is_a_sum_over_the_dimensions(monkeypatch):
    # The network says 0, and all noise is 0.5: 2 * 0.25
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.full(shape, 0.5))
    state, _, batch = program()
    zeros = jax.tree.map(jnp.zeros_like, state.actor.params)
    update = jax.jit(idql.make_agent(idql.Config(**SMALL), SPEC).update)
    _, info = update(state._replace(actor=state.actor._replace(params=zeros)), batch)
    np.testing.assert_allclose(info["actor_loss"], 0.5, rtol=1e-5)


class Echo:
    """A network without parameters, which predicts that the noise is what it is shown."""

    def init(self, key, *inputs):
        return {}

    def apply(self, params, obs, noisy, t, **options):
        return noisy


def test_the_clone_learns_every_step_alike(monkeypatch):
    # With x_t = eps + t and a network that returns x_t, the squared error is t^2. For t = 0 .. 4, all as
    # likely, its mean is 30 / 5 = 6; without the last step it is 3.5, without the first one 7.5.
    # The action has two dimensions, over which the loss is a sum
    monkeypatch.setattr(idql, "NoiseResNet", lambda *sizes: Echo())
    monkeypatch.setattr(idql, "add_noise", lambda action, noise, t, num_steps: noise + t[..., None])
    agent = idql.make_agent(idql.Config(**SMALL), SPEC)
    _, info = jax.jit(agent.update)(agent.init(jax.random.key(0)), random_batch(jax.random.key(1), 10_000))
    np.testing.assert_allclose(info["actor_loss"], 2 * 6, atol=0.6)


def test_the_rate_of_the_clone_falls_to_0_along_a_cosine_and_those_of_the_values_stay():
    # Adam's first step has the size of the rate. Half of the way it is half of 1e-3, at a fourth (1 + cos(pi / 4)) / 2
    state, update, batch = program()
    for done, share in ((0, 1), (25, 0.853553), (50, 0.5), (100, 0)):
        adam, decay, rate = state.actor.opt_state
        late = state.actor._replace(opt_state=(adam, decay, rate._replace(count=jnp.int32(done))))
        new, _ = update(state._replace(actor=late), batch)
        sizes = {}
        for name in ("actor", "value"):
            old, moved = (getattr(x, name).params["params"] for x in (state, new))
            layer = "Dense_3" if name == "actor" else "MLP_0"
            steps = jax.tree.map(lambda x, y: np.abs(x - y).max(), old[layer], moved[layer])
            (sizes[name],) = [
                x for path, x in jax.tree_util.tree_leaves_with_path(steps)
                if jax.tree_util.keystr(path).endswith("['bias']") and "Dense_0" not in jax.tree_util.keystr(path)
            ]  # fmt: skip
        np.testing.assert_allclose(sizes["actor"], 1e-3 * share, rtol=1e-3, atol=1e-9)
        np.testing.assert_allclose(sizes["value"], 1e-3, rtol=1e-3)


# --- Acting: two actions, -1 and 1 with probabilities 3/4 and 1/4, worth 1 and 2 --------------------------------------
# With one step, a = clip((x - sqrt(1 - abar) eps) / sqrt(abar)) of x ~ N(0, 1). For eps = 6745 - 10,000 x it is the
# sign of x - 0.6745, the third quartile. The network reads x + 100, where Mish changes nothing any more.


def two_actions(value=0.0, n=4000, **fields):
    cfg = idql.Config(hidden=(), actor_hidden=(1,), num_steps=1, **fields)
    agent = idql.make_agent(cfg, Spec(1, 1))
    shapes = jax.eval_shape(agent.init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    parts = {"['params']['Dense_0']['linear']['kernel']": jnp.zeros((130, 1)).at[0].set(1.0)}
    parts |= {"['params']['Dense_0']['linear']['bias']": 100.0}
    parts |= {"['params']['Dense_3']['linear']['kernel']": -1e4, "['params']['Dense_3']['linear']['bias']": 1e6 + 6745}
    critics = {"kernel": jnp.array([[[0.0], [0.5]]] * 2), "bias": jnp.array([[1.5], [9.0]])}  # min: 1.5 + a / 2
    state = state._replace(
        target_actor=set_layers(state.target_actor, parts),
        target_critic=set_layers(state.target_critic, critics),
        value=state.value._replace(params=set_layers(state.value.params, {"bias": value})),
    )
    return np.asarray(jax.jit(agent.act)(state, jnp.zeros((n, 1)), jax.random.key(0)))


@pytest.mark.parametrize("num_samples, best", [(1, 0.25), (2, 0.4375), (4, 0.68359), (16, 0.98998)])
def test_it_takes_the_best_of_its_draws(num_samples, best):
    # 1 - (3/4)^N
    action = two_actions(num_samples=num_samples)
    assert np.mean(np.abs(action) == 1) > 0.99
    np.testing.assert_allclose(np.mean(action > 0), best, atol=0.03)


@pytest.mark.parametrize("expectile, better", [(0.5, 0.25), (0.7, 0.4375), (0.9, 0.75)])
def test_iqls_own_policy_weighs_its_draws_by_the_expectile(expectile, better):
    # With V between the two, P(1) = tau / 4 / (tau / 4 + (1 - tau) 3 / 4). At 1/2 it is the cloned policy.
    action = two_actions(1.5, 1000, num_samples=100, choice="implicit", expectile=expectile)
    np.testing.assert_allclose(np.mean(action > 0), better, atol=0.05)


# --- A small problem -----------------------------------------------------------------------------------------


def test_it_learns_both_modes_and_takes_the_rare_one_that_is_better(optimised):
    """Two modes, each an episode of one step. Only -1/2 earns a reward, and a fourth of the data is of it."""
    action, obs = modes.data(64), jnp.zeros((64, 1))
    data = Transition(obs, action, jnp.where(action[:, 0] < 0, 1.0, 0.0), obs, jnp.ones(64))
    steps = {"num_steps": 20, "actor_tau": 0.01, "dropout": 0.0, "log_interval": 1500, "num_updates": 1500}
    cfg = idql.Config(hidden=(32,), actor_hidden=(32,), **steps)
    agents = [idql.make_agent(dataclasses.replace(cfg, num_samples=n), Spec(1, 1)) for n in (1, 16)]

    @jax.jit
    def train():
        state, _ = idql.make_train(cfg, agents[0])(agents[0].init(jax.random.key(0)), data)
        return [agent.act(state, jnp.zeros((2000, 1)), jax.random.key(1)) for agent in agents]

    cloned, best = train()
    # One Gaussian of the modes' mean and deviation would have 37.6 % of its draws between -0.25 and 0.25
    assert 0.68 < np.mean(cloned > 0) < 0.80 and np.mean(np.abs(cloned) < 0.25) < 0.10
    assert np.mean(best < -0.25) > 0.95 and np.abs(best + 0.5).mean() < 0.2
