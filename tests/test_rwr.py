"""RWR against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, rwr
from common.datasets import Transition
from common.environments import Spec


def zeros(agent):
    """A state whose parameters are all 0: logits 0, mean 0. (What is learned here does not depend on the start.)"""
    state = jax.eval_shape(agent.init, jax.random.key(0))
    return state._replace(key=jax.random.key(0), actor=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.actor))


def fit(cfg, spec, data):
    """Train on the whole data at once, which leaves no noise. Returns the policy's parameters."""
    agent = rwr.make_agent(cfg, spec)
    step = lambda state, _: (agent.update(state, data)[0], None)  # noqa: E731
    return jax.lax.scan(step, zeros(agent), length=1000)[0].actor.params


def config(beta, **changes):
    """No hidden layer: the policy is a table, one row per state."""
    return rwr.Config(**(dict(hidden=(), learning_rate=0.03, target="reward", beta=beta) | changes))


def probabilities(params, num_states=1):
    return jax.nn.softmax(rwr.CategoricalActor(2, ()).apply(params, jnp.eye(num_states)).logits)


def one_state(action, x):
    n = len(action)
    obs = jnp.ones((n, 1))
    return Transition(obs, jnp.array(action), jnp.array(x, jnp.float32), obs, jnp.ones(n))


def test_bandits():
    # pi(a) is proportional to mu(a) E[exp(beta x)|a], for arms 0 and 1
    bandit = one_state([0, 0, 0, 1], [1, 1, 1, 2])  # mu = (0.75, 0.25), x = (1, 2): pi(1) = 1 / (1 + 3 exp(-beta))
    shifted = bandit._replace(reward=bandit.reward - 2)  # a constant changes nothing
    # mu = (0.5, 0.5); arm 0 pays 1; arm 1 pays 0 or 1.8, on average less: it is nevertheless preferred,
    # e = 2.7183 against (1 + e^1.8) / 2 = 3.5248: 0.564595 (of the means it would be 0.475021)
    risky = one_state([0, 0, 1, 1], [1, 1, 0, 1.8])
    problems = [
        (1, bandit, 0.475367),
        (1, shifted, 0.475367),
        (2, bandit, 0.711235),
        (0, bandit, 0.25),  # behaviour cloning
        (50, shifted, 1.0),  # the best of the data
        (1, risky, 0.564595),
    ]
    beta, data, expected = zip(*problems, strict=True)
    data = jax.tree.map(lambda *x: jnp.stack(x), *data)
    train = jax.jit(jax.vmap(lambda beta, data: fit(config(beta), Spec(1, 2, True), data)))
    pi = jax.vmap(probabilities)(train(jnp.array(beta, jnp.float32), data))[:, 0, 1]
    np.testing.assert_allclose(pi, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("target", "go"),
    [
        # E[exp(G)|s0, go] = (1 + e^1.8) / 2 against e: 0.564595; s1: e^2 against 1: 0.880797
        ("return_to_go", [0.564595, 0.880797]),
        # s0: 1 against e: 0.268941; s1 as before
        ("reward", [0.268941, 0.880797]),
    ],
)
def test_two_state_chain(target, go):
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform data, discount 0.9.
    # Episodes: (stop), (stop), (go, stop), (go, go); go in s0 is followed by a return of 0 or of 0.9 * 2
    obs = jax.nn.one_hot(jnp.array([0, 0, 0, 1, 0, 1]), 2)
    action = jnp.array([0, 0, 1, 0, 1, 1])
    reward = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    to_go = jnp.array([1.0, 1.0, 0.0, 0.0, 1.8, 2.0])
    terminal = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    data = Transition(obs, action, reward, jnp.zeros_like(obs), terminal, return_to_go=to_go)
    params = jax.jit(lambda data: fit(config(1.0, target=target), Spec(2, 2, True), data))(data)
    np.testing.assert_allclose(probabilities(params, 2)[:, 1], go, atol=1e-3)


def test_gaussian():
    # Actions -0.5 and 0.5, x = 0 and 1, beta = ln 3: weights 1 and 3. Mean (-0.5 + 3 * 0.5) / 4 = 0.25,
    # variance 0.25 - 0.25^2 = 0.1875
    data = one_state([[-0.5], [0.5]], [0, 1])
    params = jax.jit(lambda data: fit(config(np.log(3.0)), Spec(1, 1), data))(data)
    pi = rwr.GaussianActor(1, ()).apply(params, jnp.ones((1, 1)))
    np.testing.assert_allclose(pi.mean, [[0.25]], atol=1e-3)
    np.testing.assert_allclose(pi.log_std, [[0.5 * np.log(0.1875)]], atol=1e-3)


@pytest.mark.parametrize("discrete", [False, True])
def test_beta_zero_is_behaviour_cloning_bit_for_bit(discrete):
    k = jax.random.split(jax.random.key(1), 3)
    action = jax.random.randint(k[1], (8,), 0, 3) if discrete else jax.random.uniform(k[1], (8, 2), minval=-1)
    obs = jax.random.normal(k[0], (8, 3))
    batch = Transition(obs, action, jax.random.normal(k[2], (8,)), obs, jnp.zeros(8))

    def updated(algo, **changes):
        agent = algo.make_agent(algo.Config(hidden=(), **changes), Spec(3, 3 if discrete else 2, discrete))
        return agent.update(agent.init(jax.random.key(0)), batch)[0].actor.params

    chex.assert_trees_all_equal(*jax.jit(lambda: (updated(rwr, beta=0.0, target="reward"), updated(bc)))())


def test_effective_sample_size():
    # (sum w)^2 / sum w^2. Weights 1 and 3: 16 / 10; equal: their number; one above all: 1, at any size of the numbers
    ess = rwr.effective_sample_size
    np.testing.assert_allclose(ess(jnp.log(jnp.array([1.0, 3.0]))), 1.6, rtol=1e-5)
    np.testing.assert_allclose(ess(jnp.full(5, -1e4)), 5, rtol=1e-5)
    np.testing.assert_allclose(ess(jnp.array([0.0, -1e4, -1e4])), 1, rtol=1e-5)


def test_loss_is_not_normalised_within_the_batch():
    # Logits 0, so log pi = log 0.5 for both arms; x = 0 and -ln 3 with beta = 1: weights 1 and 1/3, loss (2/3) log 2.
    # The same batch one lower: all times 1/e, for rows of different batches are compared with each other
    agent = rwr.make_agent(config(1.0), Spec(1, 2, True))
    for shift in (0, -1):
        _, info = jax.jit(agent.update)(zeros(agent), one_state([0, 1], [shift, shift - np.log(3)]))
        np.testing.assert_allclose(info["actor_loss"], np.exp(shift) * 2 / 3 * np.log(2), rtol=1e-5)
        np.testing.assert_allclose(info["weight"], np.exp(shift) * 2 / 3, rtol=1e-5)
        np.testing.assert_allclose(info["ess"], 1.6, rtol=1e-5)


@pytest.mark.parametrize("target", ["reward", "return_to_go"])
def test_load_data_subtracts_the_largest_of_the_dataset(monkeypatch, target):
    """So that exp cannot overflow, whatever the scale of the rewards; and then a huge batch trains."""
    arguments = {}
    data = one_state([0, 1], [1e4, -1e4])._replace(return_to_go=np.array([-3e4, 2e4], np.float32))
    monkeypatch.setattr(rwr, "load_dataset", lambda name, **kw: arguments.update(kw) or (data, None))
    data, _ = rwr.load_data(config(1.0, target=target, discount=0.9))
    np.testing.assert_array_equal(getattr(data, target), [0, -2e4] if target == "reward" else [-5e4, 0])
    assert arguments == {"columns": ("return_to_go",), "discount": 0.9}
    agent = rwr.make_agent(config(1.0, target=target), Spec(1, 2, True))
    state, info = jax.jit(agent.update)(zeros(agent), data)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.actor.params, info)))
    np.testing.assert_allclose(info["ess"], 1)
