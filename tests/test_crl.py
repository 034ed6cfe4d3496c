"""CRL against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import walks

from algos import crl, gcbc
from common.environments import Spec

KEY = jax.random.key(0)
SMALL = dict(batch_size=16, hidden=(8,), latent_dim=8)
TASK = Spec(3, 2, goal_dim=3)


def random_batch(n=8):
    k = jax.random.split(KEY, 4)
    obs, actor_goal, goal = (jax.random.normal(k[i], (n, 3)) for i in range(3))
    return crl.Batch(obs, jax.random.uniform(k[3], (n, 2), minval=-1), actor_goal, goal)


def one_update(batch=None, **options):
    agent = crl.make_agent(crl.Config(**SMALL, **options), TASK)
    return jax.jit(agent.update)(jax.jit(agent.init)(KEY), random_batch() if batch is None else batch)


def test_loss_by_hand():
    # Logits 0: log 2 in every cell. One member of two rows, (2, -1; 0.5, 1): softplus(-2), softplus(-1),
    # softplus(0.5), softplus(-1) = 0.126928, 0.313262, 0.974077, 0.313262; their mean is 0.431882.
    np.testing.assert_allclose(crl.contrastive_loss(jnp.zeros((2, 5, 5))), np.log(2), rtol=1e-6)
    loss = crl.contrastive_loss(jnp.array([[[2.0, -1.0], [0.5, 1.0]]]))
    np.testing.assert_allclose(loss, 0.431882, rtol=1e-5)
    # A batch of one has no negatives: its logit rises without end
    assert jax.grad(crl.contrastive_loss)(jnp.full((1, 1, 1), 5.0)) < 0


def test_the_order_of_a_batch_does_not_matter():
    b = random_batch()
    order = jax.random.permutation(jax.random.key(3), 8)
    a = one_update(b)[1]["critic_loss"]
    np.testing.assert_allclose(a, one_update(jax.tree.map(lambda x: x[order], b))[1]["critic_loss"], rtol=1e-5)
    other = one_update(b._replace(goal=b.goal[order]))[1]["critic_loss"]  # pairs that do not belong together
    assert abs(a - other) > 1e-4


# One episode, rows 0 .. 4, discount 0.9: p(g | row) is geometric, with the tail on the last row
FUTURE = np.array(
    [[0, 0.1, 0.09, 0.081, 0.729], [0, 0, 0.1, 0.09, 0.81], [0, 0, 0, 0.1, 0.9], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
)


def test_its_optimum_is_the_log_ratio_less_the_negatives():
    """log(p(g|s, a) / p(g)) - log(B - 1): there, the mean gradient over many batches is nothing."""
    data, size, number = walks.rows(walks.C5, size=6), 64, 4000
    draw = jax.vmap(lambda key: crl.draw(key, data, None, crl.Config(batch_size=size, discount=0.9)))
    b = jax.jit(draw)(jax.random.split(KEY, number))
    row, goal = walks.state_of(b.obs), walks.state_of(b.goal)
    for i in range(5):
        np.testing.assert_allclose(walks.frequencies(goal[row == i], 5), FUTURE[i], atol=0.005)
    share = FUTURE.mean(axis=0)
    np.testing.assert_allclose(share, [0, 0.02, 0.038, 0.0542, 0.8878])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(FUTURE > 0, np.log(FUTURE / share), -30)
    np.testing.assert_allclose(ratio[0, 1:], [1.60944, 0.86222, 0.40177, -0.19707], atol=1e-5)
    np.testing.assert_allclose(ratio[1, 2:], [0.96758, 0.50713, -0.09171], atol=1e-5)

    def mean_loss(table):
        return jax.vmap(lambda r, g: crl.contrastive_loss(table[r][:, g][None]))(row, goal).mean()

    optimum = jnp.array(np.where(FUTURE > 0, ratio - np.log(size - 1), -30), jnp.float32)
    at, off = (np.asarray(jax.jit(jax.grad(mean_loss))(optimum + by)) for by in (0.0, np.log(size - 1)))
    assert np.abs(at).max() < 2e-5 and np.abs(off).max() > 20 * np.abs(at).max()


def test_walks_that_never_met_stay_apart():
    """No pair of 0 and a goal of the other episode is ever a positive example: CRL stitches nothing."""
    b = crl.draw(KEY, walks.rows(walks.STITCH), None, crl.Config(batch_size=3000, discount=0.9))
    assert set(walks.state_of(b.goal)[walks.state_of(b.obs) == 0]) == {1, 2}


def test_policies_by_their_definitions():
    b = random_batch()
    critic, value, actor = crl.Bilinear(2, (8,), 8), crl.Bilinear(1, (8,), 8), crl.GoalActor(2, (8,))
    for extraction, alpha in (("ddpgbc", 0.3), ("awr", 2.0)):
        old = jax.jit(crl.make_agent(crl.Config(**SMALL, extraction=extraction), TASK).init)(KEY)
        pi = actor.apply(old.actor.params, b.obs, b.actor_goal)
        log_prob = pi.log_prob(b.action)
        if extraction == "awr":
            q = critic.apply(old.critic.params, b.actor_goal, b.obs, b.action).min(axis=0)
            weight = np.exp(2 * (q - value.apply(old.value.params, b.actor_goal, b.obs)[0]))
            expected = -np.mean(weight * log_prob)
        else:
            assert old.value is None
            q = critic.apply(old.critic.params, b.actor_goal, b.obs, pi.mean).min(axis=0)
            expected = -q.mean() / np.abs(q).mean() - 0.3 * log_prob.mean()
        info = one_update(extraction=extraction, alpha=alpha)[1]
        np.testing.assert_allclose(info["actor_loss"], expected, rtol=1e-4)


def test_alpha_zero_is_cloning_bit_for_bit():
    b = random_batch()
    agent = gcbc.make_agent(gcbc.Config(batch_size=16, hidden=(8,)), TASK)
    clone = jax.jit(agent.update)(jax.jit(agent.init)(KEY), gcbc.Batch(b.obs, b.action, b.actor_goal))[0]
    chex.assert_trees_all_equal(clone.actor.params, one_update(extraction="awr", alpha=0.0)[0].actor.params)
