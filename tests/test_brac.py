"""BRAC against numbers worked out by hand. With hidden=() every network is linear, so that they can be."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import brac
from common.datasets import Transition
from common.environments import Spec
from common.networks import Categorical, CategoricalActor, DiscreteCritic, TanhNormal

LINEAR = brac.Config(hidden=(), learning_rate=0.0, actor_learning_rate=0.0, alpha=2.0, num_samples=2)
KEY = jax.random.key(0)


@pytest.fixture
def no_noise(monkeypatch):
    """Every sample of a policy is its mode."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args, **kwargs: jnp.zeros(shape))


def fill(tree, kernel, bias):
    """Linear networks with this kernel (inputs, outputs) and this bias (outputs,)."""
    values = {"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)}
    return jax.tree_util.tree_map_with_path(lambda path, x: values[path[-1].key].reshape(x.shape), tree)


def zeros(agent):
    shapes = jax.eval_shape(agent.init, KEY)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    return state._replace(key=KEY)


def normals(tree, seed):
    """Random parameters, at no cost of compiling an initialisation."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), tree)


def random_state(agent, behaviour_seed=3):
    state = zeros(agent)
    return state._replace(
        behaviour=state.behaviour._replace(params=normals(state.behaviour.params, behaviour_seed)),
        actor=state.actor._replace(params=normals(state.actor.params, 0)),
        critic=state.critic._replace(params=normals(state.critic.params, 1)),
        target_critic=normals(state.target_critic, 2),
    )


def linear_state(agent, actor, behaviour, critics=((0, 0), (0, 0)), target_critics=((0, 0), (0, 0))):
    """One observation, one action. A policy (m, l) is tanh of N(m * obs, exp(l)^2), critic j critics[j] @ (obs, a)."""
    state = zeros(agent)

    def policy(trainable, mean, log_std):
        return trainable._replace(params=fill(trainable.params, [[mean, 0]], [0, log_std]))

    def critic(tree, weights):
        return fill(tree, np.array(weights, np.float32)[..., None], np.zeros((2, 1)))

    return state._replace(
        actor=policy(state.actor, *actor),
        behaviour=policy(state.behaviour, *behaviour),
        critic=state.critic._replace(params=critic(state.critic.params, critics)),
        target_critic=critic(state.target_critic, target_critics),
    )


def rows(obs=0.0, action=0.0, reward=0.0, next_obs=0.0, terminal=(0.0, 0.0)):
    column = lambda x: jnp.full((len(terminal), 1), x, jnp.float32)  # noqa: E731
    return Transition(column(obs), column(action), column(reward)[:, 0], column(next_obs), jnp.float32(terminal))


def repeat(update, state, batch, times):
    return jax.jit(lambda: jax.lax.scan(lambda state, _: (update(state, batch)[0], None), state, length=times)[0])()


def gradient(trainable):
    return jax.tree.map(lambda m: m / 0.1, trainable.opt_state[0].mu)  # after one update of Adam, mu = (1 - b1) g


# --- Divergences -----------------------------------------------------------------------------------------


def test_kl_of_squashed_gaussians_is_that_of_the_gaussians():
    # The tanh is the same map for both. KL(N(0.5, 0.5^2), N(-0.2, 0.8^2)) = log(0.8 / 0.5) + (0.25 + 0.49) / 1.28 - 1/2
    # = 0.548129 for each of two dimensions; the other direction is 0.549996 + 0.98: it is not symmetric.
    pi, b = (TanhNormal(jnp.full(2, m), jnp.full(2, jnp.log(s))) for m, s in ((0.5, 0.5), (-0.2, 0.8)))
    d = jax.jit(brac.kl, static_argnums=3)(pi, b, KEY, 50_000)
    np.testing.assert_allclose(d, 2 * 0.548129, rtol=0.02)
    reverse = jax.jit(brac.kl, static_argnums=3)(b, pi, KEY, 50_000)
    np.testing.assert_allclose(reverse, 2 * (np.log(0.5 / 0.8) + (0.64 + 0.49) / 0.5 - 0.5), rtol=0.02)


def test_kl_from_itself_is_zero():
    pi = TanhNormal(jnp.zeros((5, 2)), jnp.full((5, 2), -1.0))
    np.testing.assert_allclose(jax.jit(brac.kl, static_argnums=3)(pi, pi, KEY, 4), np.zeros(5), atol=1e-4)


def test_kl_is_a_mean_over_samples():
    # Of equal standard deviations: log pi - log b = D + (difference / sigma) eps, here 1/2 + eps: variance 1 / n
    pi, b = (TanhNormal(jnp.full((4096, 1), m), jnp.zeros((4096, 1))) for m in (0.0, 1.0))
    for n in (1, 16):
        d = jax.jit(brac.kl, static_argnums=3)(pi, b, KEY, n)
        np.testing.assert_allclose([d.mean(), d.std()], [0.5, n**-0.5], atol=0.07)


def test_behaviour_is_asked_of_actions_inside_the_bounds(no_noise):
    # pi's sample is tanh(9), 1 in float32: b = N(0, 1) is asked at 0.999, u = artanh(0.999) = 3.8002, and pi at u = 9
    pi, b = (TanhNormal(jnp.full(1, m), jnp.zeros(1)) for m in (9.0, 0.0))
    log_slope = np.log(4) - 18 - 2 * np.log1p(np.exp(-18))  # log(1 - tanh(9)^2)
    expected = -log_slope - (-0.5 * np.arctanh(0.999) ** 2 - np.log(1 - 0.999**2))  # -log sqrt(2 pi) of both cancel
    np.testing.assert_allclose(brac.kl(pi, b, KEY, 1), expected, rtol=1e-4)


def test_mmd_of_points():
    # Policies at tanh(+-9) = +-1 in two dimensions: distance 4, MMD^2 = 1 - 2 exp(-4 / 20) + 1 = 0.362538
    pi, b = (TanhNormal(jnp.full((3, 2), m), jnp.full((3, 2), -20.0)) for m in (9.0, -9.0))
    mmd = jax.jit(brac.mmd, static_argnums=3)
    np.testing.assert_allclose(mmd(pi, b, KEY, 4), np.full(3, 0.362538), rtol=1e-5)
    np.testing.assert_allclose(mmd(pi, pi, KEY, 4), np.zeros(3), atol=1e-6)


def test_mmd_counts_all_pairs_and_draws_both_sets():
    # pi = b spread evenly over tanh(+-9) = +-1: k = 1 or exp(-2 / 20), the mean over different samples
    # m = (1 + e^-0.1) / 2. A pair with itself has 1: E MMD^2 = 2 (1/n + (1 - 1/n) m) - 2 m = 2 (1 - m) / n
    pi = TanhNormal(jnp.zeros((4096, 1)), jnp.full((4096, 1), 9.0))
    for n in (1, 4):
        d = jax.jit(brac.mmd, static_argnums=3)(pi, pi, KEY, n)
        np.testing.assert_allclose(d.mean(), (1 - np.exp(-0.1)) / n, rtol=0.05)


def test_exact_kl():
    # 0.75 log(0.75 / 0.5) + 0.25 log(0.25 / 0.5) = 0.130812; logits need no normalisation
    pi, b = Categorical(jnp.log(jnp.array([3.0, 1.0]))), Categorical(jnp.array([7.0, 7.0]))
    np.testing.assert_allclose(brac.exact_kl(pi, b), 0.130812, rtol=1e-5)


# --- First phase -----------------------------------------------------------------------------------------


def test_cloning_finds_the_datas_gaussian(optimised):
    # artanh of the actions is 0.8 or -0.2 in equal parts: mean 0.3, standard deviation 0.5
    data = rows(obs=1.0, terminal=jnp.ones(64))
    data = data._replace(action=jnp.tanh(0.3 + 0.5 * jnp.array([1.0, -1.0] * 32))[:, None])
    agent = brac.make_agent(dataclasses.replace(LINEAR, learning_rate=1e-2), Spec(1, 1))
    state = repeat(agent.pretrain, linear_state(agent, (0, 0), (0, 0)), data, 500)
    chex.assert_trees_all_equal(state.actor.params, state.behaviour.params)  # the policy starts as the clone
    bias, kernel = jax.tree.leaves(state.behaviour.params)
    np.testing.assert_allclose(bias + kernel[0], [0.3, np.log(0.5)], atol=0.01)
    assert state.entropy_weight == 0  # its entropy is above -1


@pytest.mark.parametrize(
    "log_std, weight, slope", [(-5, 3 + 0.1 * (5 - 0.918939 - 1), -2), (0, 3 - 0.1 * 1.918939, -2)]
)
def test_the_clones_entropy_is_kept_at_minus_one(no_noise, log_std, weight, slope):
    # b = tanh of N(0, exp(l)^2), its sample 0: the estimate of its entropy is l + log(2 pi) / 2 = l + 0.918939. Dual
    # ascent on the weight, 3: less 0.1 (entropy + 1). -log b(0) - 3 entropy has the slope 1 - 3 in l.
    agent = brac.make_agent(dataclasses.replace(LINEAR, learning_rate=0.1), Spec(1, 1))
    state = linear_state(agent, (0, 0), (0, log_std + 1e-3))._replace(entropy_weight=jnp.float32(3))
    after, info = jax.jit(agent.pretrain)(state, rows())
    np.testing.assert_allclose(info["entropy"], log_std + 0.918939, rtol=1e-2)
    np.testing.assert_allclose(after.entropy_weight, weight, rtol=1e-3)
    np.testing.assert_allclose(jax.tree.leaves(gradient(after.behaviour))[0][1], slope, rtol=1e-4)


def test_the_clones_entropy_is_that_of_its_own_actions(no_noise):
    # b = tanh of N(0, 1) with the sample 0, of density 1 / sqrt(2 pi), wherever the data's action is
    agent = brac.make_agent(LINEAR, Spec(1, 1))
    _, info = jax.jit(agent.pretrain)(linear_state(agent, (0, 0), (0, 0)), rows(action=0.5))
    np.testing.assert_allclose(info["entropy"], 0.918939, rtol=1e-5)


def test_data_on_the_bounds_are_cloned_inside_them():
    # b = tanh of N(0, 1), a = 1: its density at 0.999
    agent = brac.make_agent(LINEAR, Spec(1, 1))
    _, info = jax.jit(agent.pretrain)(linear_state(agent, (0, 0), (0, 0)), rows(action=1.0))
    expected = -0.5 * np.arctanh(0.999) ** 2 - 0.5 * np.log(2 * np.pi) - np.log(1 - 0.999**2)
    np.testing.assert_allclose(info["log_prob"], expected, rtol=1e-3)


# --- Second phase ----------------------------------------------------------------------------------------


def one_state():
    """Spec sheet M1: one state, arm 0 pays 1, arm 1 pays 0, for ever; the data take both equally often."""
    action = jnp.arange(2)
    return Transition(jnp.ones((2, 1)), action, 1.0 - action, jnp.ones((2, 1)), jnp.zeros(2))


@pytest.mark.parametrize("value_penalty, value", [(True, 6.20115), (False, 7.31059)])
def test_one_state_for_ever(value_penalty, value, optimised):
    # b = (1/2, 1/2), alpha = 1, discount 0.9. Q = (1 + 0.9 V, 0.9 V): pi = b exp(Q) / Z = (0.731059, 0.268941).
    # BRAC-v: V = log sum_a b exp(Q) = 0.9 V + log((e + 1) / 2), V = 6.20115. BRAC-p: V = 0.731059 + 0.9 V = 7.31059.
    # alpha = 1000: pi = b, and both are 1/2 + 0.9 V = 5.
    cfg = dataclasses.replace(LINEAR, discount=0.9, tau=0.1, value_penalty=value_penalty)
    cfg = dataclasses.replace(cfg, learning_rate=1e-2, actor_learning_rate=1e-2)

    def one(alpha):
        agent = brac.make_agent(dataclasses.replace(cfg, alpha=alpha), Spec(1, 2, True))
        state = repeat(agent.pretrain, random_state(agent), one_state(), 1000)
        state = repeat(agent.update, state, one_state(), 3000)
        pi, b = (CategoricalActor(2, ()).apply(x.params, jnp.ones(1)) for x in (state.actor, state.behaviour))
        q = DiscreteCritic(2, 2, ()).apply(state.critic.params, jnp.ones(1)).min(axis=0)
        v = (jax.nn.softmax(pi.logits) * q).sum() - value_penalty * alpha * brac.exact_kl(pi, b)
        return jax.nn.softmax(pi.logits)[0], v, jax.nn.softmax(b.logits)[0]

    pi, v, b = jax.vmap(one)(jnp.array([1.0, 1000.0]))
    np.testing.assert_allclose(b, [0.5, 0.5], atol=1e-3)
    np.testing.assert_allclose(pi, [0.731059, 0.5], atol=2e-3)
    np.testing.assert_allclose(v, [value, 5], rtol=2e-3)


@pytest.mark.parametrize("value_penalty, value", [(True, 6.20115), (False, 7.31059)])
def test_the_fixed_point_of_one_state_stands_still(value_penalty, value):
    agent = brac.make_agent(
        dataclasses.replace(LINEAR, alpha=1.0, discount=0.9, value_penalty=value_penalty), Spec(1, 2, True)
    )
    state = zeros(agent)  # b is uniform
    critic = fill(state.target_critic, np.zeros((2, 1, 2)), [[1 + 0.9 * value, 0.9 * value]] * 2)
    state = state._replace(
        actor=state.actor._replace(params=fill(state.actor.params, [[0, 0]], [1, 0])),
        critic=state.critic._replace(params=critic),
        target_critic=critic,
    )
    after, info = jax.jit(agent.update)(state, one_state())
    np.testing.assert_allclose(info["critic_loss"], 0, atol=1e-8)
    for g in jax.tree.leaves(gradient(after.actor)):
        np.testing.assert_allclose(g, np.zeros_like(g), atol=1e-5)


@pytest.mark.parametrize("divergence", ["kl", "mmd"])
def test_target(no_noise, divergence):
    # Samples are modes. At s' = 0.5 pi = tanh of N(0.4, e^-2), b = tanh of N(0.2, e^-1): log pi - log b at 0.4 is
    # 1 - 0.5 + 0.2^2 e / 2 = 0.554366; at s = 0 it is 0.5. MMD^2 = 2 - 2 exp(-(tanh 0.4 - tanh 0.2) / 20); 0 at s = 0.
    # Q' = min(2 s' + 3 a', 2 s' + a') = 1 + tanh 0.4 = 1.379949. y = 1 + 0.99 (Q' - 2 D), 1 at the terminal; Q = 0.
    # BRAC-v less BRAC-p is -discount (1 - terminal) alpha D(s').
    d = {"kl": 0.554366, "mmd": 2 - 2 * np.exp(-(np.tanh(0.4) - np.tanh(0.2)) / 20)}[divergence]
    for value_penalty in (True, False):
        cfg = dataclasses.replace(LINEAR, divergence=divergence, value_penalty=value_penalty)
        agent = brac.make_agent(cfg, Spec(1, 1))
        state = linear_state(agent, (0.8, -1), (0.4, -0.5), target_critics=[[2, 3], [2, 1]])
        _, info = jax.jit(agent.update)(state, rows(obs=0.0, reward=1.0, next_obs=0.5, terminal=(0.0, 1.0)))
        y = 1 + 0.99 * (1 + np.tanh(0.4) - value_penalty * 2 * d)
        np.testing.assert_allclose(info["critic_loss"], 2 * (y**2 + 1) / 2, rtol=1e-4)  # two critics, mean of two rows
        np.testing.assert_allclose(info["divergence"], {"kl": 0.5, "mmd": 0}[divergence], atol=1e-6)


def test_actors_loss_and_its_gradient(no_noise):
    # At s = 0.5 as above: D = 0.554366. Q = min(a, s + 2 a) at a = tanh 0.4 = 0.379949: the first, and dQ/da = 1.
    # L = 2 D - 0.379949 = 0.728783. dL/du = 2 * 0.2 e - (1 - a^2) = 0.231674, as pi's density moves with its sample;
    # the kernel of the mean has s = 0.5 times it, the bias of the log standard deviation has -2.
    agent = brac.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, (0.8, -1), (0.4, -0.5), critics=[[0, 1], [1, 2]])
    after, info = jax.jit(agent.update)(state, rows(obs=0.5))
    np.testing.assert_allclose(info["divergence"], 0.554366, rtol=1e-4)
    np.testing.assert_allclose(info["actor_loss"], 0.728783, rtol=1e-4)
    bias, kernel = jax.tree.leaves(gradient(after.actor))
    np.testing.assert_allclose([*bias, kernel[0, 0]], [0.231674, -2, 0.5 * 0.231674], rtol=1e-3)


def test_q_is_asked_for_samples_of_the_policy():
    # alpha = 0, Q = Q' = a, pi = tanh of N(s, 1), s' = 0 and s = 1; the data's action is 0. L_Q = 2 (0.99^2 E[t^2]),
    # t = tanh(eps), and L_pi = -E[t], t = tanh(1 + eps), of the slope -E[(1 - t^2) eps] in log std. At the mode L_Q and
    # that slope are 0.
    eps = np.random.default_rng(0).normal(size=1_000_000)
    t = np.tanh(1 + eps)
    agent = brac.make_agent(dataclasses.replace(LINEAR, alpha=0.0), Spec(1, 1))
    state = linear_state(agent, (1, 0), (0, 0), [[0, 1], [0, 1]], [[0, 1], [0, 1]])
    after, info = jax.jit(agent.update)(state, rows(obs=1.0, terminal=np.zeros(16384)))
    np.testing.assert_allclose(info["critic_loss"], 2 * 0.99**2 * (np.tanh(eps) ** 2).mean(), rtol=0.03)
    np.testing.assert_allclose(info["actor_loss"], -t.mean(), rtol=0.03)
    slope = jax.tree.leaves(gradient(after.actor))[0][1]
    np.testing.assert_allclose(slope, -((1 - t**2) * eps).mean(), atol=0.02)  # 0.266


def test_the_policys_log_std_is_at_least_minus_five(no_noise):
    # log pi(0) - log b(0), of standard deviations e^-5 and 1
    agent = brac.make_agent(LINEAR, Spec(1, 1))
    _, info = jax.jit(agent.update)(linear_state(agent, (0, -9), (0, 0)), rows())
    np.testing.assert_allclose(info["divergence"], 5, rtol=1e-5)


def test_what_it_believes_is_the_smaller_critic():
    agent = brac.make_agent(LINEAR, Spec(1, 1))
    state = linear_state(agent, (0, 0), (0, 0), critics=[[0, 1], [0, 2]])
    np.testing.assert_allclose(agent.q(state, jnp.zeros((1, 1)), jnp.ones((1, 1))), [1])


def random_batch(discrete, n=8):
    k = jax.random.split(jax.random.key(1), 5)
    action = jax.random.randint(k[1], (n,), 0, 3) if discrete else jax.random.uniform(k[1], (n, 2), minval=-1)
    reward, terminal = jax.random.normal(k[2], (n,)), jax.random.bernoulli(k[4], 0.3, (n,)).astype(jnp.float32)
    return Transition(jax.random.normal(k[0], (n, 3)), action, reward, jax.random.normal(k[3], (n, 3)), terminal)


@pytest.mark.parametrize("discrete", [False, True])
def test_without_weight_behaviour_does_not_matter(discrete):
    """alpha = 0: the actor-critic of the smaller Q, of which BRAC-v and BRAC-p are the same."""
    spec, batch = Spec(3, 3 if discrete else 2, discrete), random_batch(discrete)

    def one(value_penalty, behaviour_seeds):
        agent = brac.make_agent(brac.Config(hidden=(8,), alpha=0.0, value_penalty=value_penalty), spec)
        update = jax.jit(agent.update)
        states = [update(random_state(agent, seed), batch)[0] for seed in behaviour_seeds]
        return [(gradient(s.actor), gradient(s.critic), s.actor.params, s.critic.params) for s in states]

    first, second = one(True, (3, 4))
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_close(first[:2], one(False, (3,))[0][:2], rtol=1e-4, atol=1e-6)


EIGHT = brac.Config(hidden=(8,), learning_rate=0.1, alpha=0.7)
NETS = CategoricalActor(3, (8,)), DiscreteCritic(3, 2, (8,))


@functools.cache
def discrete_step():
    """One large step of BRAC-v on random discrete data, its target critic and its b apart from the other networks."""
    agent, batch = brac.make_agent(EIGHT, Spec(3, 3, True)), random_batch(discrete=True)
    before = random_state(agent)
    return before, batch, *jax.jit(agent.update)(before, batch)


def test_order_of_one_update():
    """Q from the target critic and the policy from before; then pi with the new Q; b stays as it is."""
    before, batch, after, info = discrete_step()
    actor, critic = NETS

    def value(actor_params, critic_params, obs):
        log_pi = jax.nn.log_softmax(actor.apply(actor_params, obs).logits)
        log_b = jax.nn.log_softmax(actor.apply(before.behaviour.params, obs).logits)
        q = critic.apply(critic_params, obs).min(axis=0)
        return (jnp.exp(log_pi) * (q - 0.7 * (log_pi - log_b))).sum(axis=-1)

    next_v = value(before.actor.params, before.target_critic, batch.next_obs)
    target = batch.reward + 0.99 * (1 - batch.terminal) * next_v
    loss = ((critic.apply(before.critic.params, batch.obs, batch.action) - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-5)
    grad = jax.grad(lambda p: -value(p, after.critic.params, batch.obs).mean())(before.actor.params)
    chex.assert_trees_all_close(gradient(after.actor), grad, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal(after.behaviour, before.behaviour)


def test_uniform_behaviour_is_sac():
    """KL(pi, uniform) = log n - entropy of pi: discrete SAC at the temperature alpha, less alpha log n in each step."""
    agent, batch = brac.make_agent(EIGHT, Spec(3, 3, True)), random_batch(discrete=True)
    before, _, _, _ = discrete_step()
    uniform = before._replace(behaviour=jax.tree.map(jnp.zeros_like, before.behaviour))
    after, info = jax.jit(agent.update)(uniform, batch)
    actor, critic = NETS

    def soft_value(actor_params, critic_params, obs):
        pi = actor.apply(actor_params, obs)
        q = critic.apply(critic_params, obs).min(axis=0)
        return (jax.nn.softmax(pi.logits) * q).sum(axis=-1) + 0.7 * pi.entropy()

    next_v = soft_value(before.actor.params, before.target_critic, batch.next_obs) - 0.7 * np.log(3)
    target = batch.reward + 0.99 * (1 - batch.terminal) * next_v
    loss = ((critic.apply(before.critic.params, batch.obs, batch.action) - target[None]) ** 2).sum(axis=0).mean()
    np.testing.assert_allclose(info["critic_loss"], loss, rtol=1e-5)
    grad = jax.grad(lambda p: -soft_value(p, after.critic.params, batch.obs).mean())(before.actor.params)
    chex.assert_trees_all_close(gradient(after.actor), grad, rtol=1e-4, atol=1e-6)


def test_a_learned_weight_rises_where_the_divergence_is_too_large(no_noise):
    # D = 0.554366 as above. Adam's first step is the learning rate, 0.1; the weight stays in [0, 500].
    cfg = dataclasses.replace(LINEAR, learning_rate=0.1, target_divergence=0.1)
    state = linear_state(brac.make_agent(cfg, Spec(1, 1)), (0.8, -1), (0.4, -0.5))

    @jax.jit
    def step(target_divergence, alpha):
        agent = brac.make_agent(dataclasses.replace(cfg, target_divergence=target_divergence), Spec(1, 1))
        return agent.update(state._replace(alpha=state.alpha._replace(params=alpha)), rows(obs=0.5))

    for target_divergence, first, second in ((0.5, 2.0, 2.1), (0.6, 2.0, 1.9), (0.6, 0.05, 0.0), (0.5, 499.99, 500.0)):
        after, info = step(target_divergence, first)
        np.testing.assert_allclose(info["alpha"], first, rtol=1e-6)
        np.testing.assert_allclose(after.alpha.params, second, rtol=1e-4, atol=1e-6)


def test_the_learned_weight_is_the_one_in_use(no_noise):
    cfg = dataclasses.replace(LINEAR, alpha=5.0, target_divergence=0.1)
    agent = brac.make_agent(cfg, Spec(1, 1))
    state = linear_state(agent, (0.8, -1), (0.4, -0.5))
    state = state._replace(alpha=state.alpha._replace(params=jnp.float32(2)))
    _, info = jax.jit(agent.update)(state, rows(obs=0.5, next_obs=0.5))
    np.testing.assert_allclose(info["actor_loss"], 2 * 0.554366, rtol=1e-3)  # Q = 0
    np.testing.assert_allclose(info["critic_loss"], 2 * (0.99 * 2 * 0.554366) ** 2, rtol=1e-3)


def test_mmd_of_discrete_actions_is_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="--divergence kl"):
        brac.make_agent(brac.Config(divergence="mmd"), Spec(3, 4, discrete=True))
