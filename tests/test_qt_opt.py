"""QT-Opt against numbers worked out by hand, and its cross-entropy method (CEM) against known maxima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import qt_opt
from common.datasets import Transition
from common.environments import Spec
from common.networks import Critic


def search(value, key=0, states=256, **changes):
    """CEM for that many states, each on one action."""
    return search_all(value, 1, key, states, **changes)[:, 0]


def search_all(value, action_dim, key=0, states=256, **changes):
    cfg, shape = qt_opt.Config(**changes), (states, action_dim)
    run = lambda key: qt_opt.cem(value, jnp.zeros(shape), jnp.ones(shape), key, cfg)  # noqa: E731
    return jax.jit(run)(jax.random.key(key))


def fixed_noise(monkeypatch, noise):
    """Every round of CEM draws these in every state: (num_samples, action_dim), or (num_samples,) for all of them."""
    noise = jnp.array(noise, jnp.float32)
    noise = noise[:, None] if noise.ndim == 1 else noise
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.broadcast_to(noise, shape))


def fill(tree, kernel, bias):
    """Linear critics: kernel (inputs,) and bias, or a list of one for each critic."""

    def leaf(path, x):
        new = jnp.array(kernel, jnp.float32)[..., None] if "kernel" in jax.tree_util.keystr(path) else bias
        return jnp.broadcast_to(jnp.array(new, jnp.float32), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(online, target, **changes):
    """One observation, one action; (kernel, bias) of critics of (obs, action)."""
    agent = qt_opt.make_agent(qt_opt.Config(hidden=(), **changes), Spec(1, 1))
    state = jax.jit(agent.init)(jax.random.key(0))
    critic = state.critic._replace(params=fill(state.critic.params, *online))
    return agent, state._replace(critic=critic, target_critic=fill(state.target_critic, *target))


def batch_of(reward, terminal=1.0, obs=0.0, next_obs=0.0):
    reward = jnp.array(reward, jnp.float32)
    column = lambda x: jnp.broadcast_to(jnp.float32(x), reward.shape)  # noqa: E731
    return Transition(
        column(obs)[:, None], jnp.zeros((len(reward), 1)), reward, column(next_obs)[:, None], column(terminal)
    )


# --- The cross-entropy method ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_cem_finds_each_states_peak_and_further_rounds_come_closer(scale):
    # Q = -scale (a - c_s)^2. The best of 64 N(0, 1) is some 1 / (64 * 2 * 0.4) = 0.02 off where the density is 0.4; the
    # next Gaussian has a deviation of about 6 / 64 / 0.4 / sqrt(12) = 0.07, so each round is some 15 times closer.
    peak = jnp.linspace(-0.9, 0.9, 256)
    value = lambda action: -scale * (action[..., 0] - peak[:, None]) ** 2  # noqa: E731
    errors = [np.abs(search(value, num_iterations=n) - peak).mean() for n in (1, 2, 3)]
    assert errors[0] < 0.05 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5, errors


def test_cem_is_never_above_the_true_maximum_and_near_it():
    phase = jnp.linspace(0, 6, 256)[:, None]
    wave = lambda a: jnp.sin(9 * a + phase) + 0.3 * jnp.cos(23 * a)  # noqa: E731
    grid = jnp.linspace(-1, 1, 20_001)
    best = wave(grid[None]).max(axis=1)
    found = wave(search(lambda action: wave(action[..., 0]))[:, None])[:, 0]
    assert np.all(found <= best + 1e-4) and np.mean(best - found) < 0.2  # of a range of 2.6: it has many peaks


def test_cem_keeps_to_the_bounds():
    assert np.all(search(lambda action: action[..., 0]) == 1) and np.all(search(lambda action: -action[..., 0]) == -1)


def test_next_rounds_gaussian_is_that_of_the_elites(monkeypatch):
    # Samples -0.6, 0, 0.2, 0.8 and Q = a. All four are elites: mean 0.1, deviation sqrt((0.49 + 0.01) / 2) = 0.5, and
    # the next round's best is 0.1 + 0.5 * 0.8 = 0.5. The best two: mean 0.5, deviation 0.3, so 0.74.
    fixed_noise(monkeypatch, [-0.6, 0.0, 0.2, 0.8])
    for num_elites, expected in ((4, 0.5), (2, 0.74)):
        found = search(lambda action: action[..., 0], states=3, num_samples=4, num_elites=num_elites)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_each_dimension_of_the_action_has_its_own_noise():
    # With one noise for both, every sample would be on the line a_1 = a_2, 0.64 from the peak
    peak = np.float32([[[0.3, -0.6]]])
    found = search_all(lambda action: -((action - peak) ** 2).sum(axis=-1), 2, num_iterations=3)
    assert np.abs(found - peak[0]).mean() < 0.1


def test_each_dimension_of_the_action_has_its_own_deviation(monkeypatch):
    # Q = a_1. The best two are (0.2, 0.4) and (0.8, -0.4): means 0.5 and 0, deviations 0.3 and 0.4, and the next
    # round's best is (0.5 + 0.3 * 0.8, 0 - 0.4 * 0.4)
    fixed_noise(monkeypatch, [[-0.6, 0.0], [0.0, 0.0], [0.2, 0.4], [0.8, -0.4]])
    found = search_all(lambda action: action[..., 0], 2, states=3, num_samples=4, num_elites=2)
    np.testing.assert_allclose(found, [[0.74, -0.16]] * 3, rtol=1e-5)


def test_order_of_the_samples_does_not_matter(monkeypatch):
    noise = np.random.default_rng(0).normal(size=64)
    found = []
    for order in (noise, np.random.default_rng(1).permutation(noise)):
        fixed_noise(monkeypatch, order)
        found.append(search(lambda action: jnp.sin(5 * action[..., 0]), states=1))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_states_are_searched_as_each_would_be_alone(monkeypatch):
    fixed_noise(monkeypatch, np.random.default_rng(0).normal(size=64))
    peak = np.array([[-0.7], [0.1], [0.8]], np.float32)
    together = search(lambda action: -((action[..., 0] - peak) ** 2), states=3)
    alone = [search(lambda action, c=c: -((action[..., 0] - c) ** 2), states=1)[0] for c in peak[:, 0]]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


# --- The update --------------------------------------------------------------------------------------------


def test_on_a_grid_of_actions_it_is_double_q_learning(monkeypatch):
    """With every action enumerated: y = r + discount min_j Q_j(s', argmax_a Q_1(s', a)), and r at a terminal."""
    cfg = qt_opt.Config(hidden=(8,), num_samples=5, num_elites=1, num_iterations=1, discount=0.9)
    agent = qt_opt.make_agent(cfg, Spec(1, 1))
    state = jax.jit(agent.init)(jax.random.key(0))
    rng, n = np.random.default_rng(0), 32
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    state = state._replace(target_critic=jax.tree.map(lambda x: normal(*x.shape), state.target_critic))
    obs, action, next_obs = normal(3, n, 1)
    terminal = np.arange(n) % 3 == 0
    batch = Transition(obs, action, np.ones(n, np.float32), next_obs, terminal.astype(np.float32))
    grid = np.linspace(-1, 1, 5)
    fixed_noise(monkeypatch, grid)
    _, info = jax.jit(agent.update)(state, batch)

    critic = Critic(2, (8,), initializer="torch")
    every = np.broadcast_to(np.float32(grid)[None, :, None], (n, 5, 1))
    next_q = np.array(critic.apply(state.target_critic, np.broadcast_to(next_obs[:, None], (n, 5, 1)), every))
    best = next_q[0].argmax(axis=1)
    chosen = next_q[:, np.arange(n), best].min(axis=0)
    others = next_q[1], next_q.min(axis=0), next_q.mean(axis=0)  # critics that it must not maximise, and do differ
    assert all(np.any(best != q.argmax(axis=1)) for q in others)
    target = 1 + 0.9 * np.where(terminal, 0, chosen)
    q = np.array(critic.apply(state.critic.params, obs, action))
    np.testing.assert_allclose(info["critic_loss"], ((q - target) ** 2).sum(axis=0).mean(), rtol=1e-5)
    np.testing.assert_allclose(info["next_q"], chosen.mean(), rtol=1e-5)


def test_cross_entropy_of_a_sigmoid():
    # logit ln 3: Q = 3/4. Rewards 1, 5 (clipped to 1) and -2 (to 0) at terminals: -ln(3/4), -ln(3/4), -ln(1/4).
    # Not terminal, target logits 0, so Qbar = 1/2 and y = 0.495: -0.495 ln(3/4) - 0.505 ln(1/4).
    agent, state = linear_state(((0, 0), np.log(3)), ((0, 0), 0), cross_entropy=True)
    batch = batch_of([1.0, 5.0, -2.0, 0.0], terminal=jnp.array([1.0, 1.0, 1.0, 0.0]))
    _, info = jax.jit(agent.update)(state, batch)
    high, low = -np.log(0.75), -np.log(0.25)
    expected = 2 * np.mean([high, high, low, 0.495 * high + 0.505 * low])  # summed over the critics
    np.testing.assert_allclose(info["critic_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose([info["q"], info["next_q"]], [0.75, 0.5], rtol=1e-5)
    np.testing.assert_allclose(jax.jit(agent.q)(state, batch.obs, batch.action), 0.75, rtol=1e-5)


def test_it_acts_by_the_averaged_critic_and_believes_the_smaller_online_one():
    # Targets 2a and -a: the first decides, a = 1. Online critics -3a + 1 and -a at that action: the smaller is -2.
    online = [[0, -3], [0, -1]], [[1], [0]]
    agent, state = linear_state(online, ([[0, 2], [0, -1]], 0))
    obs = jnp.zeros((4, 1))
    action = jax.jit(agent.act)(state, obs, jax.random.key(0))
    np.testing.assert_allclose(action, 1)
    np.testing.assert_allclose(jax.jit(agent.q)(state, obs, action), -2)


def test_two_steps_with_a_known_best_action(optimised):
    # s0 -> s1 with reward 0; s1 ends with 1 - 4 (a - 0.3)^2. Actions are uniform, so that nothing need be extrapolated:
    # Q(s0, .) = 0.9 max_a Q(s1, a) = 0.9, and the best action at s1 is 0.3. (Of uniform actions: 0.9 * -0.69.)
    state_index, action = jnp.arange(512) % 2, jax.random.uniform(jax.random.key(5), (512, 1), minval=-1)
    reward = state_index * (1 - 4 * (action[:, 0] - 0.3) ** 2)
    one_hot = jax.nn.one_hot(state_index, 2)
    data = Transition(one_hot, action, reward, 1 - one_hot, state_index.astype(jnp.float32))
    small = dict(hidden=(32,), batch_size=64, log_interval=1000, num_samples=16)
    cfg = qt_opt.Config(**small, learning_rate=1e-2, tau=0.1, discount=0.9)
    agent = qt_opt.make_agent(cfg, Spec(2, 1))
    state, _ = jax.jit(qt_opt.make_train(cfg, agent))(agent.init(jax.random.key(0)), data)
    q = jax.jit(agent.q)(state, jnp.eye(2)[:1].repeat(5, 0), jnp.linspace(-1, 1, 5)[:, None])
    np.testing.assert_allclose(q, 0.9, atol=0.15)
    np.testing.assert_allclose(jax.jit(agent.act)(state, jnp.eye(2)[1:], jax.random.key(0)), [[0.3]], atol=0.1)


def test_what_it_cannot_take_is_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="continuous actions"):
        qt_opt.make_agent(qt_opt.Config(), Spec(3, 4, discrete=True))
    with pytest.raises(SystemExit, match="at most num_samples, not 6 of 4"):
        qt_opt.make_agent(qt_opt.Config(num_samples=4), Spec(3, 2))
