"""EMRL against numbers worked out by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import bc, emrl
from common.datasets import Transition
from common.environments import Spec

CFG = emrl.Config(hidden=(), learning_rate=0.03, target="reward")  # no hidden layer: a table, one row per state


def zeros(agent):
    """A state whose parameters are all 0: logits 0, mean 0. (What is learned here does not depend on the start.)"""
    state = jax.eval_shape(agent.init, jax.random.key(0))
    return state._replace(key=jax.random.key(0), actor=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state.actor))


def fit(cfg, spec, data):
    """Train on the whole data at once, which leaves no noise. Returns the policy's parameters."""
    agent = emrl.make_agent(cfg, spec)
    step = lambda state, _: (agent.update(state, data)[0], None)  # noqa: E731
    return jax.lax.scan(step, zeros(agent), length=1000)[0].actor.params


def probabilities(params, num_states=1):
    return jax.nn.softmax(emrl.CategoricalActor(2, ()).apply(params, jnp.eye(num_states)).logits)


def one_state(action, weight):
    n = len(action)
    action = jnp.array(action)
    obs = jnp.ones((n, 1))
    return Transition(obs, action, jnp.array(weight, jnp.float32), obs, jnp.ones(n))


def test_bandits():
    # pi(a) = mu(a) E[w|a] / E[w], for arms 0 and 1:
    problems = {
        # mu = (0.75, 0.25), rewards (1, 2): 0.5 / 1.25
        0.4: ([0, 0, 0, 1], [1, 1, 1, 2]),
        # the same with 1 added to each reward: 0.75 / 2.25. A shift is another problem
        1 / 3: ([0, 0, 0, 1], [2, 2, 2, 3]),
        # equal rewards: behaviour cloning
        0.25: ([0, 0, 0, 1], [1, 1, 1, 1]),
        # mu = (0.5, 0.5), rewards (0.9, 0.1)
        0.1: ([0, 0, 1, 1], [0.9, 0.9, 0.1, 0.1]),
        # arm 1 pays 0 or 1.8: its mean 0.9 counts, 0.9 / 1.9, and not that it is risky
        0.9 / 1.9: ([0, 0, 1, 1], [1, 1, 0, 1.8]),
    }
    data = [one_state(*problem) for problem in problems.values()]
    data += [data[0]._replace(reward=1000 * data[0].reward)]  # a factor changes nothing
    data = jax.tree.map(lambda *x: jnp.stack(x), *data)
    params = jax.jit(jax.vmap(lambda data: fit(CFG, Spec(1, 2, True), data)))(data)
    pi = jax.vmap(probabilities)(params)[:, 0, 1]
    np.testing.assert_allclose(pi, [*problems, 0.4], atol=1e-3)


def chain():
    # s0: stop -> reward 1, end; go -> 0, s1. s1: stop -> 0, end; go -> 2, end. Uniform data, discount 0.9.
    # Episodes: (stop), (stop), (go, stop), (go, go); go in s0 is followed by a return of 0 or of 0.9 * 2
    state = jnp.array([0, 0, 0, 1, 0, 1])
    action = jnp.array([0, 0, 1, 0, 1, 1])
    reward = jnp.array([1.0, 1.0, 0.0, 0.0, 0.0, 2.0])
    to_go = jnp.array([1.0, 1.0, 0.0, 0.0, 1.8, 2.0])
    terminal = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    obs = jax.nn.one_hot(state, 2)
    return Transition(obs, action, reward, jnp.zeros_like(obs), terminal, return_to_go=to_go)


@pytest.mark.parametrize(
    ("target", "go"),
    [
        ("reward", [0, 1]),  # what pays at once
        ("return_to_go", [0.9 / 1.9, 1]),  # E[G|s0, go] = (0 + 1.8) / 2 = 0.9, E[G|s0, stop] = 1
    ],
)
def test_two_state_chain(target, go):
    cfg = emrl.Config(hidden=(), learning_rate=0.03, target=target)
    params = jax.jit(lambda data: fit(cfg, Spec(2, 2, True), data))(chain())
    np.testing.assert_allclose(probabilities(params, 2)[:, 1], go, atol=5e-3)  # 0 and 1 are limits


def test_gaussian():
    # Actions -0.5 and 0.5 with weights 1 and 3: mean (-0.5 + 3 * 0.5) / 4 = 0.25, variance 0.25 - 0.25^2 = 0.1875
    params = jax.jit(lambda data: fit(CFG, Spec(1, 1), data))(one_state([[-0.5], [0.5]], [1, 3]))
    pi = emrl.GaussianActor(1, ()).apply(params, jnp.ones((1, 1)))
    np.testing.assert_allclose(pi.mean, [[0.25]], atol=1e-3)
    np.testing.assert_allclose(pi.log_std, [[0.5 * np.log(0.1875)]], atol=1e-3)


def test_loss_is_not_normalised_within_the_batch():
    # Logits 0, so log pi = log 0.5 for both arms; weights 1 and 3: loss 2 log 2, and 4 log 2 with twice the weights
    agent = emrl.make_agent(CFG, Spec(1, 2, True))
    for factor in (1, 2):
        _, info = jax.jit(agent.update)(zeros(agent), one_state([0, 1], [factor, 3 * factor]))
        np.testing.assert_allclose(info["actor_loss"], 2 * factor * np.log(2), rtol=1e-6)
        np.testing.assert_allclose(info["weight"], 2 * factor, rtol=1e-6)


def test_weight_zero_teaches_nothing():
    # A batch without a reward leaves the policy as it is (Adam's first step is the rate times the gradient's sign)
    agent = emrl.make_agent(CFG, Spec(1, 1))
    new, _ = jax.jit(agent.update)(zeros(agent), one_state([[-0.5], [0.5]], [0, 0]))
    chex.assert_trees_all_equal(new.actor.params, zeros(agent).actor.params)


@pytest.mark.parametrize("discrete", [False, True])
def test_equal_weights_are_behaviour_cloning_bit_for_bit(discrete, loaded):
    k = jax.random.split(jax.random.key(1), 2)
    action = jax.random.randint(k[1], (8,), 0, 3) if discrete else jax.random.uniform(k[1], (8, 2), minval=-1)
    obs = jax.random.normal(k[0], (8, 3))
    loaded(Transition(obs, action, np.full(8, 7.0, np.float32), obs, jnp.zeros(8)))
    batch, _ = emrl.load_data(CFG)

    def updated(algo, **changes):
        agent = algo.make_agent(algo.Config(hidden=(), **changes), Spec(3, 3 if discrete else 2, discrete))
        return agent.update(agent.init(jax.random.key(0)), batch)[0].actor.params

    chex.assert_trees_all_equal(*jax.jit(lambda: (updated(emrl, target="reward"), updated(bc)))())


# --- What load_data does with the dataset -----------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch):
    """load_dataset returns these arrays; the dictionary has the arguments it was called with."""

    def load(data):
        arguments = {}
        monkeypatch.setattr(emrl, "load_dataset", lambda name, **kw: arguments.update(kw) or (data, None))
        return arguments

    return load


def rows(reward, to_go):
    n = np.zeros(len(reward), np.float32)
    return Transition(n, n, np.array(reward, np.float32), n, n, return_to_go=np.array(to_go, np.float32))


def test_weights_are_divided_by_their_mean_over_the_dataset(loaded):
    # A sparse reward: the mean of (0, 0, 0, 1e-6) is 0.25e-6, of the returns (0, 1, 2, 1) it is 1
    arguments = loaded(rows([0, 0, 0, 1e-6], [0, 1, 2, 1]))
    data, _ = emrl.load_data(emrl.Config(target="reward", discount=0.9, reward_shift=0.5))
    np.testing.assert_allclose(data.reward, [0, 0, 0, 4], rtol=1e-6)
    assert arguments == {"columns": ("return_to_go",), "discount": 0.9, "reward_shift": 0.5}
    loaded(rows([0, 0, 0, 1e-6], [0, 2, 4, 2]))
    data, _ = emrl.load_data(emrl.Config(target="return_to_go"))
    np.testing.assert_allclose(data.return_to_go, [0, 1, 2, 1], rtol=1e-6)


def test_negative_weights_are_refused_in_one_sentence(loaded):
    loaded(rows([-1, 0], [0, 0.5]))
    with pytest.raises(SystemExit, match=r"reward of .* is in \[-1, 0\]: raise --reward-shift .* now -1\)") as error:
        emrl.load_data(emrl.Config(target="reward"))
    assert "\n" not in str(error.value)
    emrl.load_data(emrl.Config(target="return_to_go"))  # only what is a weight must not be negative
    loaded(rows([0, 1], [-0.5, 1]))
    with pytest.raises(SystemExit, match=r"return_to_go of .* is in \[-0.5, 1\]"):
        emrl.load_data(emrl.Config(target="return_to_go"))


def test_weights_that_are_all_zero_are_refused(loaded):
    loaded(rows([0, 0], [0, 0]))
    with pytest.raises(SystemExit, match="all 0"):
        emrl.load_data(emrl.Config())
