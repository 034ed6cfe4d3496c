"""FQE against numbers worked out by hand, and policies read from their folders."""

import dataclasses
import json

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain import D1, Q_PI

from algos import fqe, iql
from common.datasets import Transition
from common.environments import Interface, Spec

PI = jnp.log(jnp.asarray(chain.PI))
SMALL = dict(hidden=(16,), batch_size=32, num_updates=100, eval_interval=100, log_interval=100, eval_episodes=0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run whose seed 0 is PI and seed 1 MU, and the name of a dataset with MU's frequencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        dataset = chain.write(D1)
        yield chain.train(tmp_path_factory.mktemp("policy"), dataset), dataset


def rows(without=()):
    """Each (state, action) of the chain once, in one-hot states."""
    kept = [k for k in range(4) if k not in without]
    state, action = np.array([0, 0, 1, 1])[kept], np.array([0, 1, 0, 1])[kept]
    reward, terminal = np.array([1, 0.5, 0, 2], np.float32)[kept], np.array([1, 0, 1, 1], np.float32)[kept]
    eye = np.eye(2, dtype=np.float32)
    return Transition(eye[state], action, reward, eye[np.ones(len(kept), int)], terminal, episode=np.arange(len(kept)))


def sweeps(cfg, data, number):
    """Q (2, 2) after each of `number` exact sweeps from 0: the critic is fitted wholly before its target is renewed."""
    agent = fqe.make_agent(dataclasses.replace(cfg, tau=0.0), Spec(2, 2, True))
    state = agent.init(jax.random.key(0))
    critic = state.critic._replace(params=jax.tree.map(jnp.zeros_like, state.critic.params))
    state = state._replace(critic=critic, target_critic=critic.params)  # one linear layer on one-hot states: a table

    def step(state, _):  # without the bias, which one-hot states share
        state, _ = agent.update(state, data)
        params = jax.tree.map(lambda x: x if x.ndim > 2 else jnp.zeros_like(x), state.critic.params)
        return state._replace(critic=state.critic._replace(params=params)), None

    @jax.jit
    def sweep(state):
        state, _ = jax.lax.scan(step, state, length=1500)
        return state._replace(target_critic=state.critic.params)

    found = []
    for _ in range(number):
        state = sweep(state)
        found.append(jnp.stack([agent.q(state, jnp.eye(2), jnp.full(2, a)) for a in range(2)], axis=1))
    return np.array(found)


def test_sweeps_on_the_chain(policy, optimised):
    # From 0: Q = r after one sweep, V(s0) = 0.2 + 0.8 * 0.5 = 0.6. After two Q(s0, go) = 0.5 + 0.9 * 0.6 * 2 = 1.58 and
    # V(s0) = 1.464, which stays. Where (s1, go) is not in the data its Q stays 0, and V(s0) 0.6.
    cfg = fqe.Config(policy=policy[0], act="sample", discount=0.9, hidden=(), learning_rate=0.02)
    found = sweeps(cfg, rows(), 3)
    v = (chain.PI * found)[:, 0].sum(axis=-1)
    np.testing.assert_allclose(v, [0.6, 1.464, 1.464], atol=1e-3)
    np.testing.assert_allclose(found[-1], Q_PI, atol=2e-3)
    unseen = sweeps(cfg, rows(without=[3]), 2)
    np.testing.assert_allclose((chain.PI * unseen)[:, 0].sum(axis=-1), [0.6, 0.6], atol=1e-3)


def test_time_outs_go_on_and_the_next_action_is_the_policys(policy):
    """The target of a row, from its loss where the critic is 0: (r + discount (1 - d) E_{a' ~ pi} Qbar(s', a'))^2."""
    for seed, act, next_v in ((0, "sample", 0.4 * 3 + 0.6 * 5), (1, "sample", 4.0), (0, "mode", 5.0)):
        cfg = fqe.Config(policy=policy[0], act=act, discount=0.9, hidden=(), seed=seed)
        agent = fqe.make_agent(cfg, Spec(2, 2, True))
        state = agent.init(jax.random.key(0))
        zero = state.critic._replace(params=jax.tree.map(jnp.zeros_like, state.critic.params))
        table = jnp.array([[1.0, 2.0], [3.0, 5.0]])  # Qbar(s, a)
        target = jax.tree.map(lambda x, t=table: jnp.broadcast_to(t, x.shape) if x.ndim > 2 else x, zero.params)
        state = state._replace(critic=zero, target_critic=target)
        for terminal in (0.0, 1.0):
            batch = jax.tree.map(lambda x: x[1:2], rows())._replace(terminal=jnp.array([terminal]))
            loss = agent.update(state, batch)[1]["critic_loss"]
            assert loss == pytest.approx((0.5 + 0.9 * (1 - terminal) * next_v) ** 2, rel=1e-5), (seed, act, terminal)


def test_every_run_of_a_folder_is_estimated_by_the_first_observations(policy, tmp_path, capsys):
    # Over all rows instead of the first ones, V would be (4 * 1.464 + 2 * 1.2) / 6 = 1.376
    cfg = fqe.Config(policy[1], policy=policy[0], act="sample", discount=0.9, num_seeds=4, out=str(tmp_path))
    cfg = dataclasses.replace(cfg, **SMALL | dict(num_updates=1500, eval_interval=1500, log_interval=1500))
    summary = fqe.main(cfg)
    np.testing.assert_allclose(summary["estimate"], [1.464, 1.2, 1.464, 1.2], atol=0.01)
    said = capsys.readouterr().out
    assert "discount 0.9" in said and "raw rewards" in said and "no horizon" in said and "REJECTED" not in said
    assert summary["true_value"] == [None] * 4
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["estimate"] == pytest.approx(1.2, abs=0.01)
    again = fqe.restore(tmp_path, run=None)  # its act is the evaluated policy's, its q the estimate
    actions, _ = again.act(
        np.broadcast_to(np.eye(2, dtype=np.float32), (4, 2, 2)), 0, None, np.zeros((4, 2), np.float32)
    )
    assert actions.shape == (4, 2)
    np.testing.assert_allclose(again.q(np.eye(2)[None].repeat(4, 0), np.ones((4, 2), int))[0], [1.58, 2], atol=0.02)


def test_folds_leave_their_episodes_out_of_the_fit(policy):
    """Seeds 0 and 1 have runs 0 and 1 without fold 0, seeds 2 and 3 without fold 1; the seeds of a run share no row."""
    data = rows()
    for seed, used in ((0, [1, 3]), (1, [1, 3]), (2, [0, 2]), (3, [0, 2])):
        cfg = fqe.Config(policy=policy[0], act="sample", hidden=(), folds=2, seed=seed)
        agent = fqe.make_agent(cfg, Spec(2, 2, True))
        state = agent.init(jax.random.key(0))
        whole = agent.update(state, data)[1]["critic_loss"]
        kept = jax.tree.map(lambda x, used=used: x[jnp.array(used)], data)
        assert agent.update(state, kept)[1]["critic_loss"] == pytest.approx(float(whole), rel=1e-5)


def test_continuous_actions_are_drawn(tmp_path, monkeypatch):
    # pi = N(0, 1) of the policy without a folder, Q(s, a) = a: draws are averaged in each row, and differ in each
    cfg = fqe.Config(act="sample", hidden=(), num_samples=64)
    agent = fqe.make_agent(cfg, Spec(1, 1))
    state = agent.init(jax.random.key(0))
    state = state._replace(critic=state.critic._replace(params=jax.tree.map(jnp.zeros_like, state.critic.params)))
    kernel = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim > 2 else x, state.critic.params)
    batch = Transition(
        jnp.zeros((500, 1)),
        jnp.zeros((500, 1)),
        jnp.zeros(500),
        jnp.zeros((500, 1)),
        jnp.zeros(500),
        episode=jnp.arange(500),
    )
    loss = jax.jit(agent.update)(state._replace(target_critic=kernel), batch)[1]["critic_loss"]
    assert loss / 0.99**2 == pytest.approx(1 / 64, rel=0.3)  # the variance of a mean of 64 draws
    one = fqe.make_agent(dataclasses.replace(cfg, num_samples=1), Spec(1, 1))
    loss = jax.jit(one.update)(state._replace(target_critic=kernel), batch)[1]["critic_loss"]
    assert loss / 0.99**2 == pytest.approx(1, rel=0.3)


def test_the_policy_sees_its_own_observations_and_the_data_its_own_actions(monkeypatch):
    """A policy of data with another normalisation and other bounds, on the data as they are."""
    own = Interface([1], {"low": [0.0], "high": [4.0], "dtype": "float32"}, [5.0], [2.0], [True, []])
    theirs = Interface([1], {"low": [-10.0], "high": [10.0], "dtype": "float32"}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1), own, {})
    runs.states, runs.digest = runs.init(), "of the policy"
    raw, action = np.array([[3.0], [6.0], [9.0]], np.float32), np.array([[-0.2], [0.1], [0.9]], np.float32)
    data = Transition(raw, action, np.ones(3, np.float32), raw + 1, np.zeros(3), episode=np.array([0, 0, 1]))

    class Env:
        interface, dataset_id, fingerprint = theirs, "some/data-v0", {"hash": "of the data"}

        def measure(self, policy, q, seeds, num_episodes, **options):
            acted, _ = policy(raw[None], 0, None, np.zeros((1, 3), np.float32))
            return {"acted": acted, "believed": q(raw[None], acted)}

    monkeypatch.setattr(fqe, "frozen", lambda folder, act: (runs, iql.make_agent, None))
    monkeypatch.setattr(fqe, "load_dataset", lambda *args, **options: (data, Env()))
    dataset, env = fqe.load_data(fqe.Config(policy="x", num_seeds=1))
    np.testing.assert_allclose(dataset.obs[:, 0], [-1, 0.5, 2])
    assert not [x for x in jax.tree.leaves(dataset) if x.ctypes.data % 64]  # aligned: all CPU devices share them
    np.testing.assert_allclose(dataset.next_obs[:, 0], [-0.5, 1, 2.5])
    np.testing.assert_allclose(dataset.action[:, 0], [-2, -0.5, 3.5])  # -2, 1 and 9 where the bounds are 0 and 4
    assert env.fingerprint == {"hash": "of the data", "policy": "of the policy"}
    columns = env.measure(runs.act, lambda obs, action: obs[..., 0] + 10 * action[..., 0], [0], 2)
    mean = np.asarray(runs.act((raw[None] - 5) / 2, 0, None, np.zeros((1, 3), np.float32))[0])
    np.testing.assert_allclose(10 * columns["acted"], 2 + 2 * mean, rtol=1e-4)
    np.testing.assert_allclose(columns["believed"], (raw[:, 0] - 5) / 2 + 10 * mean[..., 0], rtol=1e-3)
    first = [0, 2]  # V of the two first observations: the mode's value
    right = ((raw[first, 0] - 5) / 2 + 10 * mean[0, first, 0]).mean()
    assert columns["estimate"][0] == pytest.approx(right, rel=1e-3)
    assert columns["estimate_low"][0] <= columns["estimate"][0] <= columns["estimate_high"][0]
    summary = {"seeds": [0], "grid": [{}], "estimate": [200.0], "estimate_low": [1.0], "estimate_high": [2.0]}
    assert "REJECTED" in env.sentence(summary | {"true_value": [None]})  # rewards of 1 allow 100
    with pytest.raises(SystemExit, match="other observations or actions"):
        Env.interface = theirs._replace(observation=[2])
        fqe.load_data(fqe.Config(policy="x", num_seeds=1))


class Runs:
    """Of a policy of two actions that always takes the first."""

    interface, runs, digest = Interface([1], {"n": 2, "start": 0}, [0.0], [1.0]), [{"seed": 0, "grid": {}}], ""
    fields, states = {}, ()

    def every(self, function):
        def of_runs(fields, rows, shared):
            n = len(shared["obs"])
            return np.zeros((1, 1, n), int), np.ones((1, 1, n))

        return of_runs


def test_a_resample_has_as_many_episodes_as_the_data():
    # 100 episodes, half of which begin where V is 1: a mean of 0.5, of deviation 0.05
    n = np.arange(100.0, dtype=np.float32)
    data = Transition(n[:, None] % 2, n.astype(int), n, n[:, None], np.ones(100), episode=np.arange(100))
    env = type("Env", (), {"fingerprint": {}, "interface": Runs.interface})()
    env.measure = lambda policy, q, **options: {}
    found = fqe.Estimates(fqe.Config(), env, Runs(), data).measure(None, lambda obs, action: obs[..., 0], [0], 1)
    ends = [found["estimate_low"][0], found["estimate"][0], found["estimate_high"][0]]
    np.testing.assert_allclose(ends, [0.4, 0.5, 0.6], atol=0.011)
    with pytest.raises(SystemExit, match="use --discount below 1"):
        fqe.Estimates(fqe.Config(discount=1.0), env, Runs(), data._replace(terminal=np.zeros(100)))
    fqe.Estimates(fqe.Config(discount=1.0), env, Runs(), data)


def test_folds_are_of_whole_episodes_at_random(monkeypatch):
    episode = np.repeat(np.arange(300), 2)
    n = np.zeros((600, 1), np.float32)
    data, env = Transition(n, n[:, 0].astype(int), n[:, 0], n, n[:, 0], episode=episode), type("Env", (), {})()
    env.interface, env.fingerprint = Runs.interface, {}
    monkeypatch.setattr(fqe, "frozen", lambda folder, act: (Runs(), None, None))
    monkeypatch.setattr(fqe, "load_dataset", lambda *args, **options: (data, env))
    number = fqe.load_data(fqe.Config(policy="x", num_seeds=2, folds=2))[0].episode
    np.testing.assert_array_equal(number[::2], number[1::2])
    assert sorted(number[::2]) == list(range(300))
    assert abs(np.corrcoef(number[::2] % 2, np.arange(300) % 2)[0, 1]) < 0.2


def test_a_policy_with_a_memory_has_no_value_of_a_state(monkeypatch):
    own = Interface([1], {"n": 2, "start": 0}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1), own, {})
    rows = runs.init()._replace(key=np.zeros((1, 2), np.uint32)), runs.fields
    remembers = type("Agent", (), {"act_with_memory": None})
    monkeypatch.setattr(fqe, "frozen", lambda folder, act: (runs, lambda cfg, spec: remembers, rows))
    with pytest.raises(SystemExit, match="has a memory"):
        fqe.make_agent(fqe.Config(policy="x"), own.spec)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"policy": ""}, "python algos/iql.py --dataset"),
        ({"policy": "nowhere"}, "holds no run"),
        ({"num_seeds": 3}, "holds 2 runs: evaluate all of them with --num-seeds 2"),
        ({"num_seeds": 2, "folds": 2}, "--num-seeds 4"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(policy, changes, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        fqe.main(fqe.Config(**{"policy": policy[0], "dataset": policy[1], **SMALL} | changes))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
