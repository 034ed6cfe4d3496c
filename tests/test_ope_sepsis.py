"""Off-policy evaluation where the truth is known exactly: ICU-Sepsis, whose model and behaviour are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import doubly_robust, importance_sampling, model_evaluation
from common.datasets import Transition, load_dataset
from common.recipes import tabular

pytest.importorskip("icu_sepsis")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def sepsis(tmp_path_factory):
    """Rows of the clinicians' episodes as integers, the model, and the clinicians' probabilities."""
    import gymnasium as gym

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        data, _ = load_dataset("stitch/icu-sepsis-10k-v0", columns=("episode",))
    env = gym.make("icu_sepsis:Sepsis/ICU-Sepsis-v2")
    clinicians = env.unwrapped.expert_policy
    ended = clinicians.sum(axis=1, keepdims=True) == 0  # nothing is done after the end
    model, limit = tabular.model_of(env), env.spec.max_episode_steps
    env.close()
    return data, model, limit, np.where(ended, 1 / clinicians.shape[1], clinicians)


def sharper(policy, power):
    """A policy that prefers what it prefers more strongly, and has no more support."""
    return policy**power / (policy**power).sum(axis=1, keepdims=True)


def counted_q(data, policy, discount):
    """Q (S, A) of a policy in the model that the data count; 0 where they have nothing."""
    state, next_state = data.obs.argmax(axis=1), data.next_obs.argmax(axis=1)
    number, reward = np.zeros(policy.shape), np.zeros(policy.shape)
    np.add.at(number, (state, data.action), 1)
    np.add.at(reward, (state, data.action), data.reward)
    q = np.zeros(policy.shape)
    for _ in range(50):
        after = np.zeros(policy.shape)
        np.add.at(after, (state, data.action), discount * (1 - data.terminal) * (policy * q).sum(axis=1)[next_state])
        q = (reward + after) / np.maximum(number, 1)
    return q


def episodes_of(data, pi, mu, q):
    """Padded, with Q (critics, S, A); episode i has the values of critic i mod their number."""
    state, critic = data.obs.argmax(axis=1), data.episode % len(q)
    columns = data.reward.astype(np.float64), np.log(pi)[state, data.action], np.log(mu)[state, data.action]
    columns += q[critic, state, data.action], (pi * q).sum(axis=2)[critic, state], np.ones(len(state), bool)
    return doubly_robust.Episodes(*(doubly_robust.pad(data.episode, x) for x in columns))


@pytest.mark.parametrize("power, discount", [(1.0, 1.0), (1.2, 0.99)])
def test_every_estimate_is_within_its_error_of_the_truth(sepsis, power, discount):
    data, model, limit, mu = sepsis
    pi = sharper(mu, power)
    truth = tabular.expected_return(model, pi, limit, discount)
    folds = [jax.tree.map(lambda x, k=k: x[data.episode % 2 != k], data) for k in range(2)]
    both = episodes_of(data, pi, mu, np.stack([counted_q(x, pi, discount) for x in folds]))  # cross-fitted
    weights = importance_sampling.Episodes(both.reward, both.log_pi, both.log_mu, both.mask)
    for module, episodes in ((importance_sampling, weights), (doubly_robust, both)):
        module.check(episodes)
        with jax.enable_x64(True):
            found = jax.jit(module.estimate)(episodes, np.ones(len(both.reward)), discount)
            samples = jax.jit(module.bootstrap, static_argnums=3)(episodes, discount, jax.random.key(0), 100)
        for name in module.ESTIMATORS.keys() - {"ESS", "DM"}:
            error = float(found[name]) - truth
            assert abs(error) < 4 * np.std(samples[name]), (name, error)
            assert abs(error) < 0.15, (name, error)  # survival is 0.8: the errors are worth something
        assert 10 < found["ESS"] <= len(both.reward) + 1e-6


def test_a_counted_model_is_biased_and_only_a_cross_fitted_one_is_mended(sepsis):
    """Where the data hold nothing, a counted Q is 0, as if the patient died: DM is too low. A Q of the same episodes
    leaves no errors there, so that DR has nothing to weight and stays as low."""
    data, model, limit, mu = sepsis
    pi = sharper(mu, 1.2)
    truth = tabular.expected_return(model, pi, limit)
    folds = [jax.tree.map(lambda x, k=k: x[data.episode % 2 != k], data) for k in range(2)]
    found = {}
    for name, parts in {"same": [data], "crossed": folds}.items():
        episodes = episodes_of(data, pi, mu, np.stack([counted_q(x, pi, 1.0) for x in parts]))
        with jax.enable_x64(True):
            found[name] = jax.jit(doubly_robust.estimate)(episodes, np.ones(len(episodes.reward)), 1.0)
    assert found["same"]["DM"] < truth - 0.1 and found["same"]["DR"] < truth - 0.1
    assert abs(found["crossed"]["DR"] - truth) < 0.1


# --- How often 95 % intervals hold the truth -------------------------------------------------------------------


def play(model, mu, rng, episodes):
    """Rows of episodes of mu, as load_dataset has them, with room for 6,000, and the weights 1 and, of the room, 0."""

    def draw(p):
        return (rng.random((len(p), 1)) > np.cumsum(p, axis=1)).sum(axis=1)

    ended = np.arange(len(mu)) >= len(mu) - 3  # dead, survived, and after either
    state, alive, steps = rng.choice(len(mu), size=episodes, p=model.initial), np.arange(episodes), []
    while len(alive):
        action = draw(mu[state])
        following = draw(model.transition[state, action])
        steps.append(np.stack([alive, np.full(len(alive), len(steps)), state, action, following]))
        state, alive = following[~ended[following]], alive[~ended[following]]
    steps = np.concatenate(steps, axis=1)
    episode, step, state, action, following = np.pad(steps[:, np.lexsort(steps[1::-1])], [(0, 0), (0, 6000)])[:, :6000]
    weight = (np.arange(6000) < steps.shape[1]).astype(np.float32)
    eye, survived = np.eye(len(mu), dtype=np.float32), following == len(mu) - 2
    data = Transition(eye[state], action, weight * survived, eye[following], weight * ended[following])
    return data._replace(episode=episode, start=weight * (step == 0)), weight


def test_how_often_intervals_hold_the_truth(sepsis, optimised):
    """Of 20 data sets of 300 episodes of the clinicians, and a policy that prefers what they prefer more strongly."""
    _, model, limit, mu = sepsis
    pi = sharper(mu, 1.2)
    truth = tabular.expected_return(model, pi, limit, 0.99)

    @jax.jit
    def table(data, weight):
        return model_evaluation.counted(data, weight, jnp.array(pi, jnp.float32), 0.99, 30)

    found, bootstrap = {}, jax.jit(importance_sampling.bootstrap, static_argnums=3)
    for k in range(20):
        rng = np.random.default_rng(k)
        data, weight = play(model, mu, rng, 300)
        real = Transition(*(x if x is None else x[: int(weight.sum())] for x in data))
        first = (pi * table(data, weight)).sum(axis=1)[data.obs.argmax(axis=1)][data.start == 1]
        samples = {"FQE": first[rng.integers(300, size=(1000, 300))].mean(axis=1)}  # of the starts, with this Q
        counts = rng.multinomial(300, np.full(300, 1 / 300), size=60).astype(np.float32)
        values = [(pi * table(data, weight * count[data.episode])).sum(axis=1) for count in counts]
        start = data.obs[data.start == 1].argmax(axis=1)
        samples["counts"] = [count @ value[start] / 300 for count, value in zip(counts, values, strict=True)]
        episodes = episodes_of(real, pi, mu, np.zeros((1, *mu.shape)))
        room = [(0, 0), (0, 100 - episodes.mask.shape[1])]
        weights = [np.pad(x, room) for x in (episodes.reward, episodes.log_pi, episodes.log_mu, episodes.mask)]
        with jax.enable_x64(True):
            weighted = bootstrap(importance_sampling.Episodes(*weights), 0.99, jax.random.key(k), 200)
        for name, sample in (samples | {name: weighted[name] for name in ("IS", "PDIS", "WIS", "PDWIS")}).items():
            low, high = np.percentile(sample, [2.5, 97.5])
            found.setdefault(name, []).append((low <= truth <= high, high - low, np.mean(sample)))
    covered = {name: sum(holds for holds, *_ in rows) for name, rows in found.items()}
    middle = {name: np.mean([centre for *_, centre in rows]) for name, rows in found.items()}
    for name in ("IS", "PDIS", "WIS", "PDWIS"):
        assert 17 <= covered[name] <= 20 and abs(middle[name] - truth) < 0.02, (name, covered, middle)
    # Where the data have nothing, a table says 0: no interval of such a model knows of it
    assert covered["FQE"] == covered["counts"] == 0
    assert truth - 0.5 < middle["counts"] < middle["FQE"] < truth - 0.3
