"""FQL against numbers worked out by hand. With hidden=() every network is linear, its outputs too."""

import dataclasses
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import fql
from common.datasets import Transition
from common.environments import Spec
from common.networks import Velocity

SPEC = Spec(1, 2)
LINEAR = fql.Config(hidden=(), learning_rate=0.0)
N = 1024  # rows of a batch


@functools.partial(jax.jit, static_argnames=("cfg", "spec"))
def update(cfg, floats, state, batch, spec=SPEC):
    """One update, compiled once for all values of the `floats` of its Config."""
    return fql.make_agent(dataclasses.replace(cfg, **floats), spec).update(state, batch)


def put(tree, kernel=0.0, bias=0.0):
    """A linear network, or an ensemble of two, with these numbers, broadcast to (.., inputs, outputs)."""

    def leaf(path, x):
        new = kernel if path[-1].key == "kernel" else bias
        return jnp.broadcast_to(jnp.array(new, jnp.float32), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(actor=(), flow=(), critic=(), target_critic=(), spec=SPEC):
    """Each network is 0 but for the (kernel, bias) given; inputs are [s, z], [s, x, t] and [s, a]."""
    shapes = jax.eval_shape(fql.make_agent(LINEAR, spec).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    given = {"actor": actor, "flow": flow, "critic": critic}
    networks = {}
    for name, numbers in given.items():
        networks[name] = getattr(state, name)._replace(params=put(getattr(shapes, name).params, *numbers))
    target = put(shapes.target_critic, *target_critic)
    return state._replace(key=jax.random.key(0), target_critic=target, **networks)


def batch_of(obs=0, action=(0, 0), reward=0, next_obs=0, terminal=0, dim=2):
    """Each column, of one row or of some, is repeated to N rows."""
    rows = lambda x, *shape: jnp.resize(jnp.float32(x), (N, *shape))  # noqa: E731
    return Transition(rows(obs, 1), rows(action, dim), rows(reward), rows(next_obs, 1), rows(terminal))


def bias_gradient(trainable):
    leaves = jax.tree_util.tree_leaves_with_path(trainable.opt_state[0].mu)  # after one update of Adam, (1 - b1) g
    (mu,) = [x for path, x in leaves if path[-1].key == "bias"]
    return mu / 0.1


# --- The sampler, with exact velocities: no training ---------------------------------------------------------


def two_modes(x, t):
    """Exact velocity of data that are +0.5 with probability 3/4, else -0.5: v = (E[a|x] - x) / (1 - t).

    p(x|a) is normal, mean t a, deviation 1 - t: log-odds of +0.5 are ln 3 + t x / (1 - t)^2, and E[a|x] is 0.5 tanh of
    half of them.
    """
    return (0.5 * jnp.tanh(0.5 * (t * x / (1 - t) ** 2 + jnp.log(3.0))) - x) / (1 - t)


def noises():
    """The quantiles of N(0, 1) at 100,000 equal steps: as good as any number of samples."""
    return jax.scipy.special.ndtri((jnp.arange(100_000) + 0.5) / 100_000)[:, None]


@pytest.mark.parametrize(
    "steps, positive, mean, std",  # by quadrature; the exact map would have 0.75, 0.25, 0.4330
    [(1, 1.0, 0.25, 0.0), (2, 0.91127, 0.25535, 0.16425), (5, 0.78318, 0.27718, 0.37307)]
    + [(10, 0.76437, 0.26433, 0.42221), (20, 0.75669, 0.25669, 0.42907), (100, 0.75127, 0.25127, 0.43228)],
)
def test_euler_steps_of_the_exact_velocity_of_two_modes(steps, positive, mean, std):
    x = jax.jit(fql.euler, static_argnums=(0, 2))(two_modes, noises(), steps)
    np.testing.assert_allclose([(x > 0).mean(), x.mean(), x.std()], [positive, mean, std], atol=5e-4)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_a_point_mass_is_reached_from_every_noise(steps):
    x = fql.euler(lambda x, t: (0.7 - x) / (1 - t), noises()[::1000], steps)
    np.testing.assert_allclose(x, jnp.full_like(x, 0.7), atol=1e-5)


class ExactFlow:
    """In the place of Velocity: the flow's is the exact one of two modes, the one-step policy's is the network."""

    def __init__(self, action_dim, hidden):
        self.network = Velocity(action_dim, hidden)

    def init(self, *inputs):
        return self.network.init(*inputs)

    def apply(self, params, obs, x, *time):
        return two_modes(x, *time) if time else self.network.apply(params, obs, x)


ONE = Spec(1, 1)


def test_losses_with_the_exact_flow_of_two_modes(monkeypatch):
    """At its optimum the loss of the flow is not 0; the policy is pulled to where the flow's ten steps lead."""
    # E[ Var(a - z0 | x_t) ] = 0.4014 by quadrature over z0, a and t: many (z0, a) pass through one x_t. Ten steps have
    # mean 0.26433 and deviation 0.42221: a policy that is this mean everywhere is 0.42221^2 = 0.1783 off, and from the
    # data's two modes it would be 0.1877 off. Standard errors are 0.002 and 0.001.
    monkeypatch.setattr(fql, "Velocity", ExactFlow)
    cfg = dataclasses.replace(LINEAR, q_agg="min")  # of no other test: compiled anew
    action = jnp.where(jnp.arange(4096) % 4 < 3, 0.5, -0.5)[:, None]
    batch = Transition(jnp.zeros((4096, 1)), action, jnp.zeros(4096), jnp.zeros((4096, 1)), jnp.zeros(4096))
    state = linear_state(actor=(0.0, 0.26433), spec=ONE)
    infos = [update(cfg, {}, state._replace(key=jax.random.key(k)), batch, ONE)[1] for k in range(10)]
    np.testing.assert_allclose(np.mean([info["flow_loss"] for info in infos]), 0.4014, atol=0.008)
    np.testing.assert_allclose(np.mean([info["distill_loss"] for info in infos]), 0.1783, atol=0.004)


def test_without_q_policy_and_flow_have_the_same_noise():
    # One Euler step of v = 0 leaves the noise where it is, and a policy that is z is off by the clip alone: the mean of
    # (z - clip(z))^2 is 0.1505. Of two different noises it would be 1.5.
    state = linear_state(actor=([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],))
    cfg = dataclasses.replace(LINEAR, flow_steps=1)
    _, info = update(cfg, {"alpha": 1.0}, state, batch_of())
    np.testing.assert_allclose(info["distill_loss"], 0.1505, atol=0.04)


def test_a_learned_flow_has_both_modes_in_their_proportion(optimised):
    """A Gaussian of the same mean and variance would have 37.6 % of its actions within 0.25 of 0."""
    cfg = fql.Config(hidden=(32, 32), learning_rate=1e-2, flow_steps=1)
    agent = fql.make_agent(cfg, ONE)
    batch = jax.tree.map(lambda x: x[:256], batch_of(action=(0.5, 0.5, 0.5, -0.5), dim=1))
    train = jax.jit(lambda state: jax.lax.scan(lambda s, _: agent.update(s, batch), state, length=800)[0])
    state = train(jax.jit(agent.init)(jax.random.key(0)))
    flow, obs = Velocity(1, cfg.hidden), jnp.zeros((10_000, 1))
    x = jax.jit(lambda z: fql.euler(lambda x, t: flow.apply(state.flow.params, obs, x, t), z, 20))(noises()[::10])
    assert 0.70 < np.mean(x > 0) < 0.80 and np.mean(np.abs(x) < 0.25) < 0.05


# --- Losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_agg, value", [("mean", 2.0), ("min", 1.0)])
def test_target_takes_the_mean_of_the_target_critics_or_their_minimum(q_agg, value):
    # Target critics 1 and 3: y = 0.5 + 0.99 * 2, or * 1; at a terminal 0.5. Q = 0: L is the mean over rows AND critics
    cfg = dataclasses.replace(LINEAR, q_agg=q_agg)
    state = linear_state(target_critic=(0.0, [[1.0], [3.0]]))
    _, info = update(cfg, {}, state, batch_of(reward=0.5, terminal=(0, 1)))
    np.testing.assert_allclose(info["critic_loss"], ((0.5 + 0.99 * value) ** 2 + 0.5**2) / 2, rtol=1e-5)
    state = linear_state(critic=(0.0, [[1.0], [3.0]]))
    np.testing.assert_allclose(fql.make_agent(cfg, SPEC).q(state, jnp.ones((1, 1)), jnp.ones((1, 2))), [value])


def test_targets_action_is_the_one_step_policys_clipped():
    # mu = (5, -0.5 + 0.1 s'): at s' = 3 clipped (1, -0.2). Q' = s' + a_1 + 10 a_2: 3 + 1 - 2 = 2, y = 0.99 * 2
    state = linear_state(
        actor=([[0.0, 0.1], [0.0, 0.0], [0.0, 0.0]], [5.0, -0.5]), target_critic=([[1.0], [1.0], [10.0]],)
    )
    _, info = update(LINEAR, {}, state, batch_of(next_obs=3))
    np.testing.assert_allclose(info["critic_loss"], 1.98**2, rtol=1e-5)


def test_the_targets_noise_is_of_each_row_and_dimension():
    # mu = 10 z, clipped: +-1 in each dimension. Q' = a_1 - a_2 is 0 in half of the rows, +-2 in the others
    identity = [[0.0, 0.0], [1000.0, 0.0], [0.0, 1000.0]]
    state = linear_state(actor=(identity,), target_critic=([[0.0], [1.0], [-1.0]],))
    _, info = update(LINEAR, {}, state, batch_of())
    np.testing.assert_allclose(info["critic_loss"], 0.99**2 * 2, rtol=0.15)


def test_losses_of_flow_and_policy_by_hand(monkeypatch):
    # Every noise is 0.4, t = 0.25. a = (1, -1): x_t = 0.75 * 0.4 + 0.25 a = (0.55, 0.05). v = x + 2 t = (1.05, 0.55),
    # a - z0 = (0.6, -1.4): errors 0.45 and 1.95, the mean of their squares 2.0025.
    # Two Euler steps: 0.4 + 0.4 / 2 = 0.6, then 0.6 + (0.6 + 2 * 0.5) / 2 = 1.4, clipped 1. mu = (1.5, 0.5) is not
    # clipped here: |mu - m|^2 / 2 = 0.25. Critics a_1 + 2 a_2 and that + 4, at (1, 0.5), which is clipped: 2 and 6.
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args: jnp.full(shape, 0.4))
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(), *args: jnp.full(shape, 0.25))
    cfg = dataclasses.replace(LINEAR, flow_steps=2)
    state = linear_state(
        actor=(0.0, [1.5, 0.5]),
        flow=([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [2.0, 2.0]],),
        critic=([[0.0], [1.0], [2.0]], [[0.0], [4.0]]),
    )
    _, info = update(cfg, {"alpha": 10.0}, state, batch_of(action=(1, -1)))
    np.testing.assert_allclose(info["flow_loss"], 2.0025, rtol=1e-5)
    np.testing.assert_allclose([info["distill_loss"], info["actor_loss"]], [0.25, 10 * 0.25 - 4], rtol=1e-5)


@pytest.mark.parametrize("dim, shift", [(1, 0.05), (6, 0.3)])
def test_a_linear_q_moves_the_policy_by_its_slope_times_dimensions_over_twice_alpha(dim, shift):
    # One Euler step of v = 0.2 - x leads every z to m = 0.2. Q = sum of the a_i: the gradient of mu_i is
    # 2 alpha (mu_i - m) / n - 1, which is 0 at mu_i = 0.2 + n / (2 alpha): by 0.05 or 0.3 away with alpha 10.
    spec = Spec(1, dim)
    cfg = dataclasses.replace(LINEAR, flow_steps=1)
    velocity = np.concatenate([np.zeros((1, dim)), -np.eye(dim), np.zeros((1, dim))])
    slope = np.ones((dim + 1, 1)) * (np.arange(dim + 1) > 0)[:, None]
    for at, gradient in ((0.2 + shift, 0.0), (0.2, -1.0), (1.5, 2 * 10 * (1.5 - 0.2) / dim)):  # the last beyond the box
        state = linear_state(actor=(0.0, at), flow=(velocity, 0.2), critic=(slope,), spec=spec)
        after, _ = update(cfg, {"alpha": 10.0}, state, batch_of(action=[0.0] * dim, dim=dim), spec)
        np.testing.assert_allclose(bias_gradient(after.actor), np.full(dim, gradient), rtol=1e-4, atol=1e-5)


class Parabola:
    """In the place of Critic: Q = -k/2 (a - b)^2 with k = 2 and b = 1."""

    def __init__(self, *args, **kwargs):
        pass

    def init(self, *inputs):
        return {"k": jnp.full((2,), 2.0)}

    def apply(self, params, obs, action):
        return -params["k"][:, None] / 2 * ((action - 1) ** 2).sum(axis=-1)[None]


def test_a_curved_q_and_the_flow_meet_in_between(monkeypatch):
    # alpha (a - m)^2 + k/2 (a - b)^2 is least at (2 alpha m + k b) / (2 alpha + k) = (8 + 2) / 22, with m = 0.4
    state = linear_state(actor=(0.0, 10 / 22), flow=([[0.0], [-1.0], [0.0]], 0.4), spec=ONE)
    monkeypatch.setattr(fql, "Critic", Parabola)
    k = Parabola().init()
    state = state._replace(critic=fql.Trainable(k, fql.optax.adam(0.0).init(k)), target_critic=k)
    cfg = dataclasses.replace(LINEAR, flow_steps=1, q_agg="min")  # of no other test: compiled anew
    after, _ = update(cfg, {"alpha": 10.0}, state, batch_of(action=(0,), dim=1), ONE)
    np.testing.assert_allclose(bias_gradient(after.actor), [0.0], atol=1e-5)
    np.testing.assert_allclose(10 / 22, 0.454545, atol=1e-6)


SMALL = fql.Config(hidden=(8, 8), flow_steps=2)
init = jax.jit(fql.make_agent(SMALL, SPEC).init)


def random_state(seed):
    return init(jax.random.key(seed))._replace(key=jax.random.key(0))


def small_update(state, batch, alpha=10.0, learning_rate=0.1):
    return update(SMALL, {"alpha": alpha, "learning_rate": learning_rate}, state, batch)[0]


def test_each_network_descends_its_own_loss_alone():
    """The flow does not feel Q nor alpha nor the policy; the policy and the critics do not feel the flow's loss."""
    state, other = random_state(0), random_state(1)
    uniform = jax.random.uniform(jax.random.key(2), (2, N, 2), minval=-1)
    batch = batch_of(obs=np.linspace(-1, 1, 7), reward=1)._replace(action=uniform[0])
    base = small_update(state, batch)
    strange = state._replace(actor=other.actor, critic=other.critic, target_critic=other.target_critic)
    after = small_update(strange, batch._replace(reward=-batch.reward), alpha=1.0)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(base.flow, after.flow)
    after = small_update(state, batch._replace(action=uniform[1]))
    same(base.actor, after.actor)  # which reads no action of the data
    after = small_update(state._replace(flow=other.flow), batch)
    same(base.critic, after.critic)


def test_all_losses_read_the_networks_from_before_the_update():
    """One Adam on the sum of the losses is three Adams, each on its own, if all of them start from the same place."""
    state = random_state(0)
    batch = batch_of(obs=np.linspace(-1, 1, 7), action=np.linspace(-1, 1, 10), reward=1)
    still, moved = (small_update(state, batch, learning_rate=rate) for rate in (0.0, 0.1))
    for name in ("actor", "flow", "critic"):  # gradients, in Adam's moments, do not know how far the others went
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8)
        jax.tree.map(close, getattr(still, name).opt_state[0].mu, getattr(moved, name).opt_state[0].mu)


def test_every_action_is_drawn_and_within_the_box():
    agent, obs = fql.make_agent(fql.Config(hidden=()), SPEC), jnp.zeros((4, 1))
    state = linear_state(actor=([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], 0.5))
    a, b = (agent.act(state, obs, jax.random.key(k)) for k in (0, 1))
    assert not np.any((a == b) & (np.abs(a) < 1)) and len(np.unique(a)) > 4
    np.testing.assert_allclose(a, np.clip(0.5 + jax.random.normal(jax.random.key(0), (4, 2)), -1, 1), rtol=1e-5)


def test_networks_of_the_reference():
    """LayerNorm in the critics alone, kernels within sqrt(6 / (inputs + outputs)), biases 0, in every layer."""
    state = random_state(0)
    for network, layer_norm in ((state.actor, False), (state.flow, False), (state.critic, True)):
        layers = flax.traverse_util.flatten_dict(network.params, sep="/")
        assert any("LayerNorm" in name for name in layers) == layer_norm
        for name, x in layers.items():
            if name.endswith("kernel"):
                bound = (6 / sum(x.shape[-2:])) ** 0.5
                assert 0.6 * bound < jnp.abs(x).max() <= bound, name
            elif name.endswith("linear/bias"):
                np.testing.assert_array_equal(x, np.zeros_like(x))


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="FQL needs continuous actions"):
        fql.make_agent(fql.Config(), Spec(3, 4, discrete=True))
