"""QRL against numbers worked out by hand. (The forms of the distance are in test_networks.py.)"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import walks

from algos import gcbc, qrl
from common.environments import Spec

KEY = jax.random.key(0)
SMALL = dict(batch_size=16, hidden=(8,), latent_dim=16)
TASK = Spec(3, 2, goal_dim=3)


def random_batch(n=8):
    k = jax.random.split(KEY, 5)
    states = [jax.random.normal(k[i], (n, 3)) for i in range(4)]
    return qrl.Batch(states[0], jax.random.uniform(k[4], (n, 2), minval=-1), *states[1:])


def one_update(change=lambda state: state, batch=None, **options):
    agent = qrl.make_agent(qrl.Config(**SMALL, **options), TASK)
    return jax.jit(agent.update)(change(jax.jit(agent.init)(KEY)), random_batch() if batch is None else batch)


def test_the_push_fades():
    # -sigmoid(5 - d / 100)
    slope = jax.vmap(jax.grad(lambda d: qrl.push_apart(d)))(jnp.array([0.0, 100, 500, 1000]))
    np.testing.assert_allclose(slope, [-0.9933, -0.9820, -0.5, -0.0067], atol=1e-4)


class Edges(nn.Module):
    """A chain whose edges are the parameters, in the place of the quasimetric: d(i, j) sums them from i to j > i."""

    hidden: tuple
    latent_dim: int
    kind: str

    @nn.compact
    def between(self, x, y):
        n = x.shape[-1]
        edges = self.param("edges", nn.initializers.ones, (n - 1,))
        i, j = x.argmax(axis=-1)[..., None], y.argmax(axis=-1)[..., None]
        at = jnp.broadcast_to(jnp.arange(n - 1), (*i.shape[:-1], n - 1))
        return jnp.where((at >= i) & (at < j), edges.reshape((1,) * (at.ndim - 1) + (-1,)), 0.0).sum(axis=-1)

    def __call__(self, x, y):
        return self.between(x, y)

    def encode(self, x):
        return x


@pytest.mark.parametrize("epsilon, whole", [(0.05, 4.87706), (0.0625, 4.98058)])
def test_distances_of_a_chain(monkeypatch, epsilon, whole):
    """All are too long by what the constraint allows, and in the right order."""
    # Ten pairs i < j of 0 .. 4; edge e is in w = (4, 6, 6, 4) of them. The gain of an edge grows with w, its cost with
    # (e - 1)^2 / 4: e = 1 + c w, and the mean square is epsilon: c = sqrt(4 epsilon / 104).
    monkeypatch.setattr(qrl, "Quasimetric", Edges)
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)] * 2
    state, goal = (walks.one_hot([pair[k] for pair in pairs], 5) for k in (0, 1))
    step = jnp.arange(20) % 4  # each edge equally often
    obs, next_obs, action = walks.one_hot(step, 5), walks.one_hot(step + 1, 5), jnp.zeros(20, int)
    # Half of the rows have a pair and no step, half a step and no pair: both means are half of those above
    parts = qrl.Batch(state, action, state, obs, goal), qrl.Batch(obs, action, next_obs, obs, obs)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    cfg = qrl.Config(hidden=(4,), extraction="awr", epsilon=epsilon / 2, learning_rate=3e-3)
    agent = qrl.make_agent(cfg, Spec(5, 2, True, goal_dim=5))
    start = jax.jit(agent.init)(KEY)
    run = jax.jit(lambda state: jax.lax.scan(lambda s, _: agent.update(s, both), state, length=6000))
    edges = run(start)[0].distance.params["d"]["params"]["edges"]
    c = (4 * epsilon / 104) ** 0.5
    np.testing.assert_allclose(edges, 1 + c * np.array([4, 6, 6, 4]), atol=0.02)
    np.testing.assert_allclose(edges.sum(), whole, atol=0.03)


def test_the_multiplier_rises_where_steps_are_too_long():
    for epsilon, sign in ((1e-6, 1), (1e6, -1)):
        state, info = one_update(epsilon=epsilon)
        assert info["excess"] > 1e-6 and np.sign(state.multiplier.params) == sign
    # and it weighs the excess, while its own loss moves it alone
    a, b = (one_update(epsilon=x)[0] for x in (1e-6, 1e6))
    chex.assert_trees_all_equal(a.distance, b.distance)
    strict = one_update(lambda s: s._replace(multiplier=s.multiplier._replace(params=jnp.array(5.0))))[0]
    assert walks.differ(strict.distance.params, a.distance.params)


@pytest.mark.parametrize("kind", ["iqe", "mrn"])
def test_losses_by_their_definitions(kind):
    b, options = random_batch(), dict(quasimetric=kind, alpha=0.3)
    old = jax.jit(qrl.make_agent(qrl.Config(**SMALL, **options), TASK).init)(KEY)
    info = one_update(**options)[1]
    network, dynamics = qrl.Quasimetric((8,), 16, kind), qrl.GoalEncoder(16, (8,))

    def d(x, y, method="__call__"):
        return network.apply(old.distance.params["d"], x, y, method=method)

    z, next_z, goal_z = (
        network.apply(old.distance.params["d"], x, method="encode") for x in (b.obs, b.next_obs, b.actor_goal)
    )
    excess = np.mean(np.maximum(d(b.obs, b.next_obs) - 1, 0) ** 2)
    predicted = z + dynamics.apply(old.distance.params["T"], z, b.action)
    latent = (d(next_z, predicted, "between") + d(predicted, next_z, "between")).mean() / 2
    push = np.mean(100 * np.logaddexp(0, 5 - d(b.obs, b.goal) / 100))
    np.testing.assert_allclose(info["distance_loss"], push + excess + latent, rtol=1e-5)
    np.testing.assert_allclose(info["multiplier_loss"], 0.05 - excess, rtol=1e-3, atol=1e-6)
    pi = qrl.GoalActor(2, (8,)).apply(old.actor.params, b.obs, b.actor_goal)
    q = -d(z + dynamics.apply(old.distance.params["T"], z, pi.mean), goal_z, "between")
    expected = -q.mean() / np.abs(q).mean() - 0.3 * pi.log_prob(b.action).mean()
    np.testing.assert_allclose(info["actor_loss"], expected, rtol=1e-4)


def test_a_step_nearer_weighs_more():
    """AWR: A = d(s, g) - d(s', g), never the other way round; alpha 0 is GCBC."""
    b, options = random_batch(), dict(extraction="awr", alpha=3.0)
    old = jax.jit(qrl.make_agent(qrl.Config(**SMALL, **options), TASK).init)(KEY)
    params, d = old.distance.params["d"], qrl.Quasimetric((8,), 16)
    advantage = d.apply(params, b.obs, b.actor_goal) - d.apply(params, b.next_obs, b.actor_goal)
    log_prob = qrl.GoalActor(2, (8,)).apply(old.actor.params, b.obs, b.actor_goal).log_prob(b.action)
    expected = -np.mean(np.minimum(np.exp(3 * advantage), 100) * log_prob)
    np.testing.assert_allclose(one_update(**options)[1]["actor_loss"], expected, rtol=1e-4)
    agent = gcbc.make_agent(gcbc.Config(batch_size=16, hidden=(8,)), TASK)
    clone = jax.jit(agent.update)(jax.jit(agent.init)(KEY), gcbc.Batch(b.obs, b.action, b.actor_goal))[0]
    chex.assert_trees_all_equal(clone.actor.params, one_update(extraction="awr", alpha=0.0)[0].actor.params)


def test_a_ring_is_longer_one_way(optimised):
    """Five states in a ring that is walked one way: 0 to 4 takes four steps, 4 to 0 one."""
    data = walks.rows([[0, 1, 2, 3, 4, 0] * 3], size=5)
    cfg = qrl.Config(batch_size=64, hidden=(32,), latent_dim=32, extraction="awr", learning_rate=3e-3)
    _, state = walks.train(qrl, cfg, Spec(5, 2, True, goal_dim=5), data, 1500)
    d = qrl.Quasimetric((32,), 32)
    there, back = (d.apply(state.distance.params["d"], *walks.one_hot(pair, 5)) for pair in ([0, 4], [4, 0]))
    assert 3 < there < 6 and back < 2


def test_walks_that_never_met_are_joined_by_the_triangle(optimised):
    """0-1-2-(3) and 2-3-4-(5): no walk has 0 and 4, but each step has a length. Nothing leads back: that is far."""
    cfg = qrl.Config(batch_size=64, hidden=(32,), latent_dim=32, extraction="awr", learning_rate=3e-3)
    _, state = walks.train(qrl, cfg, Spec(6, 2, True, goal_dim=6), walks.rows(walks.STITCH), 1500)
    d = jax.jit(qrl.Quasimetric((32,), 32).apply)
    there = np.array([d(state.distance.params["d"], *walks.one_hot([i, 4])) for i in range(4)])
    np.testing.assert_allclose(there, [4, 3, 2, 1], rtol=0.35)
    assert np.all(np.diff(there) < -0.5) and d(state.distance.params["d"], *walks.one_hot([4, 0])) > 20


def test_parts_of_observations_are_no_goals():
    with pytest.raises(SystemExit, match="whole observations as goals"):
        qrl.make_agent(qrl.Config(**SMALL), Spec(3, 2, goal_dim=2))
    with pytest.raises(SystemExit, match="multiple of 8"):
        qrl.make_agent(qrl.Config(hidden=(8,), latent_dim=12), TASK)
