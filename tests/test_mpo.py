"""MPO against numbers worked out by hand."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, mpo
from common.datasets import Transition
from common.environments import Spec
from common.networks import Categorical, CategoricalActor, DiscreteCritic, GaussianActor, Normal

EIGHT = mpo.Config(hidden=(8,), learning_rate=0.1, num_samples=3)


def random_batch(discrete=False, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(jax.random.normal(k[0], (n, 3)), action, reward, jax.random.normal(k[3], (n, 3)), terminal)


@functools.cache
def small(discrete, prior=False):
    """Agent, and a state whose targets differ from the networks."""
    agent = mpo.make_agent(dataclasses.replace(EIGHT, prior=prior), Spec(3, 3 if discrete else 2, discrete))
    state = jax.jit(agent.init)(jax.random.key(0))
    state = state._replace(
        target_actor=jax.tree.map(lambda x: 1.2 * x - 0.1, state.target_actor),
        target_critic=jax.tree.map(lambda x: 3 * x, state.target_critic),
    )
    return agent._replace(update=jax.jit(agent.update)), state


def fill(tree, **values):
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.broadcast_to(jnp.float32(values[path[-1].key]), x.shape), tree
    )


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


# --- E-step ----------------------------------------------------------------------------------------------


def two_arms(epsilon, num_updates):
    """Metrics after steps of eta alone, from 1: one state, Q = (1, 2), the policy (0.75, 0.25)."""
    cfg = mpo.Config(hidden=(), learning_rate=0.0, epsilon=epsilon)
    agent = mpo.make_agent(cfg, Spec(1, 2, True))
    state = agent.init(jax.random.key(0))
    actor = fill(state.target_actor, kernel=[[np.log(3.0), 0.0]], bias=0.0)
    critic = fill(state.target_critic, kernel=[[1.0, 2.0]], bias=0.0)
    state = state._replace(
        actor=state.actor._replace(params=actor),
        critic=state.critic._replace(params=critic),
        target_actor=actor,
        target_critic=critic,
    )
    ones = jnp.ones((4, 1))
    batch = Transition(ones, jnp.array([0, 0, 0, 1]), jnp.zeros(4), ones, jnp.ones(4))
    _, info = jax.lax.scan(lambda state, _: agent.update(state, batch), state, length=num_updates)
    return jax.tree.map(lambda x: x[-1], info)


def test_temperature_is_where_the_ball_is_touched():
    # g(eta) = eta epsilon + eta log(0.75 e^(1 / eta) + 0.25 e^(2 / eta)), minimal at
    #   epsilon 0.01: eta 3.210563; 0.1: 1.081238; 0.5: 0.481303. There KL(q||pi) = epsilon and g is the best E_q[Q] in
    #   the ball: 1.312783, 1.456672, 1.726926. From epsilon = ln 4 on, q = (0, 1) is in the ball: eta -> 0.
    epsilon = jnp.array([0.01, 0.1, 0.5, 2.0])
    info = jax.jit(jax.vmap(lambda epsilon: two_arms(epsilon, 2000)))(epsilon)
    np.testing.assert_allclose(info["eta"][:3], [3.210563, 1.081238, 0.481303], rtol=0.01)
    np.testing.assert_allclose(info["kl"][:3], epsilon[:3], rtol=0.02)
    np.testing.assert_allclose(info["eta_loss"][:3], [1.312783, 1.456672, 1.726926], rtol=1e-4)
    assert info["eta"][3] < 0.05
    np.testing.assert_allclose(info["kl"][3], np.log(4), rtol=1e-3)


def test_weights_of_samples():
    # Of two samples with Q = 0 and 1 at eta = 1 / ln 3: 1 to 3; at eta = infinity they are equal
    q, log_mass = jnp.array([[0.0], [1.0]]), jnp.full((2, 1), -jnp.log(2.0))
    weight, log_sum = mpo.reweigh(q, log_mass, 1 / jnp.log(3.0))
    np.testing.assert_allclose(weight[:, 0], [0.25, 0.75], rtol=1e-5)
    np.testing.assert_allclose(log_sum, [np.log(2)], rtol=1e-5)  # of (1 + 3) / 2
    np.testing.assert_allclose(mpo.reweigh(q, log_mass, 1e9)[0][:, 0], [0.5, 0.5], rtol=1e-6)
    assert np.isfinite(mpo.reweigh(1e6 * q, log_mass, 1e-3)[0]).all()


# --- M-step ----------------------------------------------------------------------------------------------


def test_divergences():
    # Means 0.1 apart at deviation 0.5: 0.1^2 / (2 0.5^2) = 0.02. From 0.5 to 0.6: ln(0.6 / 0.5) + 0.25 / 0.72 - 1 / 2.
    # A change of the mean is not seen by the deviation's KL, and the reverse.
    old = Normal(jnp.zeros((1, 2)), jnp.full((1, 2), np.log(0.5)))
    new = Normal(jnp.array([[0.1, 0.0]]), jnp.log(jnp.array([[0.6, 0.5]])))
    kl = {name: mpo.kl_divergence(old, part) for name, part in mpo.decouple(old, new).items()}
    np.testing.assert_allclose(kl["mean"], [[0.02, 0.0]], atol=1e-6)
    np.testing.assert_allclose(kl["std"], [[0.029544, 0.0]], atol=1e-6)
    # (1/2, 1/2) to (1/4, 3/4): 0.5 ln 2 + 0.5 ln(2 / 3)
    old, new = (Categorical(jnp.log(jnp.array([p]))) for p in ([0.5, 0.5], [0.25, 0.75]))
    np.testing.assert_allclose(mpo.kl_divergence(old, mpo.decouple(old, new)["policy"]), [[0.143841]], rtol=1e-5)


def test_mean_and_deviation_are_fitted_apart():
    # Actions -0.5 and 0.5 weigh 1 to 3, the old policy is N(0, 2). The mean's best is 0.25 whatever the deviation; the
    # deviation's best is 0.5, that of the actions round the OLD mean (round the new one it would be 0.4330).
    action, weight = jnp.array([[[-0.5]], [[0.5]]]), jnp.array([[0.25], [0.75]])
    old = Normal(jnp.zeros((1, 1)), jnp.full((1, 1), np.log(2.0)))

    def loss(mean, log_std):
        parts = mpo.decouple(old, Normal(mean, log_std)).values()
        return -(weight * sum(jax.vmap(part.log_prob)(action) for part in parts)).sum()

    slopes = jax.grad(loss, (0, 1))(jnp.full((1, 1), 0.25), jnp.full((1, 1), np.log(0.5)))
    np.testing.assert_allclose(jnp.stack(slopes), 0, atol=1e-6)


@pytest.mark.parametrize("discrete", [False, True])
def test_order_of_one_update(discrete):
    """Q from the targets; eta; pi with the weights by the new eta; alpha by the KL of the new pi. Plain formulas."""
    (agent, before), batch = small(discrete), random_batch(discrete)
    after, info = agent.update(before, batch)
    rows, cfg = np.arange(8), EIGHT
    actor = CategoricalActor(3, (8,)) if discrete else GaussianActor(2, (8,))
    _, key_next, key_action = jax.random.split(before.key, 3)

    def q(params, obs, action):
        if discrete:
            return DiscreteCritic(3, 2, (8,)).apply(params, obs)[:, rows, action]
        return mpo.Critic(2, (8,)).apply(params, obs, action)

    def drawn(obs, key):  # (samples, 8, ...), their shares and their values
        pi = actor.apply(before.target_actor, obs)
        if discrete:
            action, share = jnp.repeat(jnp.arange(3)[:, None], 8, axis=1), jax.nn.softmax(pi.logits).T
        else:
            noise = jnp.stack([jax.random.normal(k, (8, 2)) for k in jax.random.split(key, 3)])
            action, share = pi.mean[None] + jnp.exp(pi.log_std)[None] * noise, jnp.full((3, 8), 1 / 3)
        inside = action if discrete else jnp.clip(action, -1, 1)
        return action, share, jnp.stack([q(before.target_critic, obs, a).min(axis=0) for a in inside])

    drawn = jax.jit(drawn)
    _, share, next_q = drawn(batch.next_obs, key_next)
    target = batch.reward + 0.99 * (1 - batch.terminal) * (share * next_q).sum(axis=0)
    loss = ((q(before.critic.params, batch.obs, batch.action) - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-4)

    action, share, q_of_samples = drawn(batch.obs, key_action)
    eta = 1.0
    g = eta * (cfg.epsilon + np.log((share * np.exp(q_of_samples / eta)).sum(axis=0)).mean())
    np.testing.assert_allclose(info["eta_loss"], g, rtol=1e-4)
    np.testing.assert_allclose(info["eta"], eta, rtol=1e-5)
    np.testing.assert_allclose(after.eta.params, -np.sign(gradient(after.eta)) * 0.01, rtol=1e-5)

    weight = share * np.exp(q_of_samples / np.exp(after.eta.params))
    weight /= weight.sum(axis=0)[None]
    old, alpha = actor.apply(before.target_actor, batch.obs), np.log(1 + np.exp(10.0))

    def divergences(params):
        pi = actor.apply(params, batch.obs)
        if discrete:
            p, log_p = jax.nn.softmax(old.logits), jax.nn.log_softmax(old.logits)
            return [(p * (log_p - jax.nn.log_softmax(pi.logits))).sum(axis=-1).mean()]
        by_mean = (pi.mean - old.mean) ** 2 / (2 * jnp.exp(2 * old.log_std))
        by_std = pi.log_std - old.log_std + jnp.exp(2 * (old.log_std - pi.log_std)) / 2 - 1 / 2
        return [by_mean.mean(axis=0).sum(), by_std.mean(axis=0).sum()]

    def actor_loss(params):
        pi = actor.apply(params, batch.obs)
        parts = [pi] if discrete else [Normal(pi.mean, old.log_std), Normal(old.mean, pi.log_std)]
        cross_entropy = -sum((weight * jnp.stack([p.log_prob(a) for a in action])).sum(axis=0).mean() for p in parts)
        return cross_entropy + alpha * sum(divergences(params))

    loss, grad = jax.jit(jax.value_and_grad(actor_loss))(before.actor.params)
    np.testing.assert_allclose(info["actor_loss"], loss, rtol=1e-4)
    chex.assert_trees_all_close(gradient(after.actor), grad, rtol=1e-3, atol=1e-5)

    epsilons = [cfg.epsilon_mean] if discrete else [cfg.epsilon_mean, cfg.epsilon_std]
    dims = 1 if discrete else 2
    loss = sum(alpha * (dims * e - kl) for e, kl in zip(epsilons, divergences(after.actor.params), strict=True))
    np.testing.assert_allclose(info["alpha_loss"], loss, rtol=1e-3)


def test_a_multiplier_rises_where_its_bound_is_broken():
    # At learning rate 0 nothing moves: KL 0, and both multipliers fall, by Adam's first step 0.01. After a step of 0.1
    # in every weight both bounds are broken and both rise.
    (_, state), batch = small(discrete=False), random_batch()
    state = state._replace(target_actor=state.actor.params)

    def alpha_after(learning_rate):
        agent = mpo.make_agent(dataclasses.replace(EIGHT, learning_rate=learning_rate), Spec(3, 2))
        return agent.update(state, batch)[0].alpha.params

    alpha = jax.jit(jax.vmap(alpha_after))(jnp.array([0.0, 0.1]))
    expect = jnp.array([[9.99] * 2, [10.01] * 2])
    chex.assert_trees_all_close(alpha, {"mean": expect, "std": expect})


# --- Whole runs ------------------------------------------------------------------------------------------


def train(cfg, spec, data, **floats):
    cfg = dataclasses.replace(cfg, **floats)
    agent = mpo.make_agent(cfg, spec)
    return mpo.make_train(cfg, agent)(agent.init(jax.random.key(0)), data)


@pytest.mark.parametrize(
    "prior, q_go, expect", [(False, 1.8, [1, 1, 1]), (True, 1.4939, [0.5966, 0.8299, 0.4241])], ids=["plain", "prior"]
)
def test_bandit_and_chain(optimised, prior, q_go, expect):
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform data, discount 0.9.
    # s2, a bandit: arms of reward 1 and 2 taken with mu = (0.75, 0.25).
    # Plain: each policy is better than the last within the ball round it, until it takes the best actions only.
    # Prior: q ~ mu exp(Q / eta) with the one eta at which its KL from mu, 0.1, is a mean over the rows' states (1/4,
    # 1/4, 1/2): 1.261647. pi(go|s1) = sigmoid(2 / eta), Q(s0, go) = 1.8 pi(go|s1), pi(go|s0) = sigmoid((Q - 1) / eta),
    # pi(1|s2) = e^(1 / eta) / (3 + e^(1 / eta)).
    row = jnp.arange(64) % 8
    state, action = jnp.array([0, 0, 1, 1, 2, 2, 2, 2])[row], jnp.array([0, 1, 0, 1, 0, 0, 0, 1])[row]
    reward = jnp.array([1.0, 0.0, 0.0, 2.0, 1.0, 1.0, 1.0, 2.0])[row]
    terminal = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])[row]
    data = Transition(jax.nn.one_hot(state, 3), action, reward, jax.nn.one_hot(jnp.ones_like(row), 3), terminal)
    cfg = mpo.Config(batch_size=512, hidden=(32,), learning_rate=3e-3, tau=0.05, prior=prior, log_interval=1500)
    state, _ = jax.jit(lambda: train(cfg, Spec(3, 2, True), data, discount=0.9))()
    q = DiscreteCritic(2, 2, cfg.hidden).apply(state.critic.params, jnp.eye(3)).min(axis=0)
    np.testing.assert_allclose(q, [[1, q_go], [0, 2], [1, 2]], atol=0.03)
    pi = jax.nn.softmax(CategoricalActor(2, cfg.hidden).apply(state.actor.params, jnp.eye(3)).logits)[:, 1]
    np.testing.assert_allclose(pi, expect, atol=0.02)


def test_plain_mpo_leaves_the_data_and_a_prior_does_not(optimised):
    # Actions -0.25 and 0.25 with reward a: a linear Q = a. The policy's mean goes where no data are, to the bound.
    # Round the clone N(0, 0.25^2), q = N(0.25^2 / eta, 0.25^2) with KL = 0.25^2 / (2 eta^2) = 0.1: its mean is
    # 0.25 sqrt(0.2) = 0.1118. The deviation round it stays 0.25.
    action = jnp.array([[-0.25], [0.25]])
    data = Transition(jnp.ones((2, 1)), action, action[:, 0], jnp.ones((2, 1)), jnp.ones(2))
    pis = []
    for prior in (False, True):
        cfg = mpo.Config(hidden=(), learning_rate=3e-3, tau=0.05, num_samples=16, log_interval=2500, prior=prior)
        state, _ = jax.jit(functools.partial(train, cfg, Spec(1, 1), data))(epsilon_std=1e-3)
        pis.append(GaussianActor(1, ()).apply(state.actor.params, jnp.ones(1)))
    assert pis[0].mean > 0.8
    np.testing.assert_allclose(pis[1].mean, 0.1118, atol=0.02)
    np.testing.assert_allclose(jnp.exp(pis[1].log_std), 0.25, atol=0.03)


# --- The prior -------------------------------------------------------------------------------------------


def test_the_prior_is_behaviour_cloning_bit_for_bit():
    (agent, state), batch = small(discrete=False, prior=True), random_batch()
    cloner = bc.make_agent(bc.Config(hidden=(8,), learning_rate=0.1), Spec(3, 2))
    clone = jax.jit(cloner.init)(jax.random.key(5))
    new, info = agent.update(state._replace(prior=state.prior._replace(params=clone.actor.params)), batch)
    cloned, bc_info = jax.jit(cloner.update)(clone, batch)
    chex.assert_trees_all_equal(new.prior.params, cloned.actor.params)
    np.testing.assert_array_equal(info["prior_loss"], bc_info["actor_loss"])


def test_with_a_prior_the_state_keeps_its_form_and_no_key_is_used_twice():
    agent = mpo.make_agent(dataclasses.replace(EIGHT, prior=True), Spec(3, 2))
    with jax.debug_key_reuse(True):
        before = jax.eval_shape(agent.init, jax.random.key(0))
        after, _ = jax.eval_shape(agent.update, before, random_batch())
    chex.assert_trees_all_equal_shapes_and_dtypes(before, after)


# --- Evaluation of the policy ----------------------------------------------------------------------------


def test_q_is_asked_of_actions_within_their_bounds():
    # Policy N(0, e^2), Qbar(s, a) = a, one sample: at +-1 most of the time, and never beyond; so is y = 0.99 a', and
    # the E-step's Q, whose mean is eta_loss where eta epsilon and KL are 0
    agent = mpo.make_agent(mpo.Config(hidden=(), num_samples=1), Spec(1, 1))
    state = agent.init(jax.random.key(0))
    critic = fill(state.target_critic, kernel=[[0.0], [1.0]], bias=0.0)
    state = state._replace(
        critic=state.critic._replace(params=fill(critic, kernel=0.0, bias=0.0)),
        target_actor=fill(state.target_actor, kernel=0.0, bias=0.0, log_std=2.0),
        target_critic=critic,
    )
    rows = jnp.ones((4096, 1))
    _, info = jax.jit(agent.update)(state, Transition(rows, 0 * rows, jnp.zeros(4096), rows, jnp.zeros(4096)))
    assert 0.8 < info["critic_loss"] / (2 * 0.99**2) < 1
