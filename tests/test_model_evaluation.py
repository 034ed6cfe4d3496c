"""Evaluation in a fitted model, against numbers worked out by hand."""

import dataclasses

import chain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain import D1

from algos import iql
from algos import model_evaluation as ope
from common.datasets import Transition
from common.environments import Interface, Spec

SMALL = dict(num_updates=250, eval_interval=250, log_interval=250, eval_episodes=0, hidden=(16,), batch_size=64)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """The folder of a run whose seed 0 is PI and seed 1 MU, and the name of a dataset with MU's frequencies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        dataset = chain.write(D1 * 10)
        yield chain.train(tmp_path_factory.mktemp("policy"), dataset), dataset


# --- Counts ------------------------------------------------------------------------------------------------


def rows(next_state=(0, 1, 0, 0), reward=(1, 0.5, 0, 2), terminal=(1, 0, 1, 1), kept=(0, 1, 2, 3)):
    """Each (state, action) once, as rows of one-hot states: by default of the chain."""
    eye, kept = np.eye(2, dtype=np.float32), list(kept)
    obs, next_obs = eye[[0, 0, 1, 1]][kept], eye[list(next_state)][kept]
    reward, terminal = np.array(reward, np.float32)[kept], np.array(terminal, np.float32)[kept]
    data = Transition(obs, np.array([0, 1, 0, 1])[kept], reward, next_obs, terminal)
    return data._replace(start=np.array([1.0, 1, 0, 0])[kept])


def value(data, pi, horizon, discount=0.9, weight=None, **options):
    weight = jnp.ones(len(data.reward)) if weight is None else jnp.array(weight, float)
    q = ope.counted(data, weight, jnp.array(pi), discount, horizon, **options)
    return float(ope.at_starts(data, weight, jnp.array(pi), q))


def test_the_chain():
    # V(s0) = 0.6 after one step, 1.464 after two, which stays. The behaviour: 0.75, and 1.2
    for pi, right in ((chain.PI, (0.6, 1.464, 1.464)), (chain.MU, (0.75, 1.2, 1.2))):
        for horizon, v in zip((1, 2, 9), right, strict=True):
            assert value(rows(), pi, horizon) == pytest.approx(v, abs=1e-6)
    # Where nobody went on in s1, it brings nothing there, and 0.8 * 0.6 of the episodes want to
    unseen = rows(kept=[0, 1, 2])
    assert value(unseen, chain.PI, 5) == pytest.approx(0.6, abs=1e-6)
    nothing = unseen._replace(reward=np.zeros(3, np.float32))
    assert value(nothing, chain.PI, 5, 1.0, unseen=1.0) == pytest.approx(0.48, abs=1e-6)
    assert value(nothing, chain.PI, 1, 1.0, unseen=1.0) == 0  # one step: what would be done in s1 is not done
    assert value(nothing, chain.PI, 5, 1.0) == 0


def test_values_without_an_end():
    m2 = rows((0, 1, 0, 1), (0, 1, 2, 0), (0, 0, 0, 0))
    pi = [[0.25, 0.75], [1.0, 0.0]]
    right = {1: 0.75, 2: 2.26875, 5: 4.900483, 10: 8.060585, 50: 12.471051, 400: 12.537313}
    for horizon, v in right.items():
        assert value(m2, pi, horizon) == pytest.approx(v, abs=1e-4), horizon


def test_weights_count_rows():
    # s0 stops with 1 in a row of weight 3 and with 5 in one of weight 1: 2. Starts of weight 3 and 1 in s0 and s1
    data = rows((0, 0, 0, 0), (1, 5, 0, 8), (1, 1, 1, 1))._replace(action=np.array([0, 0, 0, 0]))
    pi = [[1.0, 0.0], [1.0, 0.0]]
    assert value(data, pi, 3, weight=[3, 1, 0, 0]) == pytest.approx(2)
    data = data._replace(start=np.array([1.0, 0, 0, 1]))
    assert value(data, pi, 3, weight=[3, 0, 0, 1]) == pytest.approx((3 * 1 + 8) / 4)


def test_every_run_of_a_folder_is_counted(policy, tmp_path, capsys):
    cfg = ope.Config(policy[1], policy=policy[0], act="sample", discount=0.9, num_seeds=4, horizon=5, out=str(tmp_path))
    summary = ope.main(dataclasses.replace(cfg, **SMALL))
    np.testing.assert_allclose(summary["estimate"], [1.464, 1.2, 1.464, 1.2], atol=1e-5)
    # Frequencies of actions do not matter, and in the chain the rest is certain: no resample has another model
    np.testing.assert_allclose(summary["estimate_low"], summary["estimate"], atol=1e-5)
    assert summary["unseen"] == [0.0] * 4 and summary["true_value"] == [None] * 4
    said = capsys.readouterr().out
    assert "discount 0.9, of 5 steps (the data's longest episode has 2)" in said and said.count("0% leave") == 4
    again = ope.restore(tmp_path, run=None)
    q = again.q(np.eye(2, dtype=np.float32)[None].repeat(4, 0), np.ones((4, 2), int))
    np.testing.assert_allclose(q[0], [1.58, 2], atol=1e-5)


# --- Networks ----------------------------------------------------------------------------------------------

ONE = Spec(1, 1)


def by_hand(cfg, bias, obs_kernel=(0.0, 0.0, 0.0), limits=9.0, log_var=-1e3):
    """(agent, state) of members that are one linear layer: outputs are change, reward, two log-variances and end.

    bias: (members, 3) of change, reward and end's logit; obs_kernel: how these depend on the observation; limits: the
    largest observation and reward, and less 0 the smallest; log_var: by default as low as the bound, -10, lets it be.
    """
    agent = ope.make_agent(cfg, ONE)
    state = agent.init(jax.random.key(0))
    bias = np.array(bias, np.float32)
    outputs = np.full((cfg.num_members, 5), log_var, np.float32)
    outputs[:, [0, 1, 4]] = bias
    kernel = np.zeros((cfg.num_members, 2, 5), np.float32)
    kernel[:, 0, [0, 1, 4]] = obs_kernel

    def weights(path, old):
        name = jax.tree_util.keystr(path)
        return jnp.array(kernel if "kernel" in name else outputs if "bias" in name else old)

    params = jax.tree_util.tree_map_with_path(weights, state.model.params)
    limits = tuple(sign * jnp.broadcast_to(jnp.array(limits), (2,)) for sign in (-1, 1))
    return agent, state._replace(model=state.model._replace(params=params), snapshot=params, limits=limits)


def test_a_roll_out_pays_for_every_step_that_it_takes():
    # The end has probability 1/4 after each step, whose own reward counts: 2 (1 + 0.9 * 3/4 + (0.9 * 3/4)^2)
    cfg = ope.Config(hidden=(), num_members=1, horizon=3, discount=0.9)
    agent, state = by_hand(cfg, [[1.0, 2.0, -np.log(3)]])
    factor = 0.9 * 0.75
    found = agent.q(state, jnp.zeros((4, 1)), jnp.zeros((4, 1)))
    np.testing.assert_allclose(found, 2 * (1 + factor + factor**2), rtol=1e-5)


def test_what_the_model_says_stays_within_the_data():
    # A reward of the observation, which goes 1, 2, 3 and no further
    cfg = ope.Config(hidden=(), num_members=1, horizon=4, discount=0.9)
    agent, state = by_hand(cfg, [[1.0, 0.0, -50.0]], (0.0, 1.0, 0.0), limits=(3.0, 1e6))
    found = agent.q(state, jnp.ones((3, 1)), jnp.zeros((3, 1)))
    np.testing.assert_allclose(found, 1 + 0.9 * 2 + 0.81 * 3 + 0.729 * 3, atol=0.1)  # with a noise of e^-5
    # A reward of at most 3 in states that go from 100 to 103
    agent, state = by_hand(cfg, [[1.0, 0.0, -50.0]], (0.0, 1.0, 0.0), limits=(1e6, 3.0))
    found = agent.q(state, jnp.full((3, 1), 100.0), jnp.zeros((3, 1)))
    np.testing.assert_allclose(found, 3 * (1 + 0.9 + 0.81 + 0.729), rtol=1e-3)


def test_the_next_state_is_drawn_with_the_members_deviation():
    # log sigma^2 = 0.5 - log(1 + e^(0.5 + 1)) = -1.2014 below the upper bound: sigma = 0.5484. The reward is the state
    cfg = ope.Config(hidden=(), num_members=1, horizon=2, discount=0.9)
    agent, state = by_hand(cfg, [[0.0, 0.0, -50.0]], (0.0, 1.0, 0.0), log_var=-1.0)
    found = jax.jit(agent.q)(state, jnp.zeros((4000, 1)), jnp.zeros((4000, 1)))
    assert found.mean() == pytest.approx(0, abs=0.03) and found.std() == pytest.approx(0.9 * 0.5484, rel=0.05)


def test_a_roll_out_takes_the_policys_actions_in_the_snapshot(monkeypatch):
    # The reward is the action: 3 at first, then the policy's, 5. A newer model, which is no snapshot, is not asked
    cfg = ope.Config(hidden=(), num_members=1, horizon=3, discount=0.5)
    monkeypatch.setattr(ope, "evaluated", lambda cfg, spec: ((), type("Pi", (), {"act": staticmethod(five)})))
    agent, state = by_hand(cfg, [[0.0, 0.0, -50.0]])
    kernel = jnp.zeros((1, 2, 5)).at[0, 1, 1].set(1.0)
    state = state._replace(snapshot=jax.tree.map(lambda x: kernel if x.shape == kernel.shape else x, state.snapshot))
    found = agent.q(state, jnp.zeros((2, 1)), jnp.full((2, 1), 3.0))
    np.testing.assert_allclose(found, 3 + 0.5 * 5 + 0.25 * 5, rtol=1e-5)


def five(state, obs, key):
    return jnp.full((len(obs), 1), 5.0)


def test_members_share_the_rows_out_in_blocks():
    cfg = ope.Config(hidden=(), num_members=3, horizon=1)
    agent, state = by_hand(cfg, [[0.0, i, -50.0] for i in range(3)])
    found = agent.q(state, jnp.zeros((6, 1)), jnp.zeros((6, 1)))
    np.testing.assert_allclose(found, [0, 0, 1, 1, 2, 2], atol=1e-5)


def test_members_have_weights_of_whole_episodes():
    cfg = ope.Config(num_members=3)
    episode = np.repeat(np.arange(2000), 2)
    held, weight = jax.jit(lambda x: ope.bootstrap(cfg, x))(episode)
    np.testing.assert_array_equal(held[::2], held[1::2])
    np.testing.assert_array_equal(weight[:, ::2], weight[:, 1::2])
    assert held.mean() == pytest.approx(0.1, abs=0.03)
    assert np.all(weight[:, held] == 0) and weight[:, ~held].mean() == pytest.approx(1, abs=0.05)
    assert np.corrcoef(weight[:, ~held]).max(where=~np.eye(3, dtype=bool), initial=-1) < 0.1  # each member its own
    other, _ = ope.bootstrap(dataclasses.replace(cfg, seed=1), episode)
    assert np.any(other != held)


def test_snapshots_are_of_the_smallest_errors_on_episodes_held_out():
    # Members that expect a change of 1, 2 and 3 where it is 2, with the variance e^-10: (1 e^10 + 0) / 2 - 10, and -10
    cfg = ope.Config(hidden=(), num_members=3)
    agent, state = by_hand(cfg, [[i, 5.0, -50.0] for i in (1.0, 2.0, 3.0)])
    n = np.zeros((40, 1), np.float32)
    action = np.arange(40)[:, None] % 2 * 1.0  # of which the model knows nothing
    data = Transition(n, action, n[:, 0] + 5, n + 2, n[:, 0], episode=np.arange(40))
    held, _ = ope.bootstrap(cfg, data.episode)
    assert 0 < held.sum() < 40
    data = data._replace(next_obs=jnp.where(held[:, None], data.next_obs, 100.0))  # which the others do not change
    old = jax.tree.map(jnp.zeros_like, state.snapshot)
    state, _ = agent.prepare(state._replace(snapshot=old, error=jnp.array([2e4, 2e4, 1e4])), data)
    np.testing.assert_allclose(state.error, [np.exp(10) / 2 - 10, -10, 1e4], rtol=1e-5)
    bias = next(x for path, x in jax.tree_util.tree_leaves_with_path(state.snapshot) if path[-1].key == "bias")
    np.testing.assert_allclose(bias[:, 0], [1, 2, 0])
    np.testing.assert_allclose(np.stack(state.limits), [[2, 5], [100, 5]])
    np.testing.assert_allclose(np.stack(state.scale), [[0, 0.5], [1, 0.5]], atol=1e-6)  # a constant is not stretched
    # Of few episodes none is held out: there is no error, and the newest parameters are played
    few = next(k for k in range(100) if not ope.bootstrap(cfg, np.arange(k, k + 2))[0].any())
    data = jax.tree.map(lambda x: x[:2], data)._replace(episode=np.arange(few, few + 2))
    state, _ = agent.prepare(state._replace(snapshot=old), data)
    bias = next(x for path, x in jax.tree_util.tree_leaves_with_path(state.snapshot) if path[-1].key == "bias")
    np.testing.assert_allclose(bias[:, 0], [1, 2, 3])
    assert np.isfinite(state.error).all()


def test_the_loss_of_a_row_is_its_likelihood():
    """One member with the change 1, the reward 2, the end's logit log 3 and variances e^v, on two rows. Row 0 goes from
    3 to 7 and has the reward 5; row 1 ends, so that its change, to 9, counts for nothing.

    v is 0 below the upper bound: 0.5 - log(1 + e^0.5) = -0.4741. Row 0: ((1 - 4)^2 + (2 - 5)^2) / 2 e^-v + v, and
    log 4 for no end. Row 1: ((2 - 5)^2 / 2) e^-v + v / 2, and log(4 / 3) for the end."""
    cfg = ope.Config(hidden=(), num_members=1, bound_weight=0.01, weight_decay=0.0)
    agent, state = by_hand(cfg, [[1.0, 2.0, np.log(3)]], log_var=0.0)
    n, obs = np.zeros((2, 1), np.float32), np.array([[3.0], [0.0]], np.float32)
    episode = next(k for k in range(100) if not ope.bootstrap(cfg, np.array([k]))[0].any())  # that is not held out
    rows = Transition(obs, n, np.array([5, 5.0]), np.array([[7], [9.0]]), np.array([0, 1.0]))
    rows = rows._replace(episode=np.full(2, episode))
    weight = float(ope.bootstrap(cfg, rows.episode)[1][0, 0])
    v = 0.5 - np.log(1 + np.exp(0.5))
    v = -10 + np.log(1 + np.exp(v + 10))
    right = (9 * np.exp(-v) + v + np.log(4) + 4.5 * np.exp(-v) + v / 2 + np.log(4 / 3)) / 2
    _, info = agent.update(state, rows)
    assert info["model_nll"] == pytest.approx(weight * right, rel=1e-4)
    assert info["model_loss"] == pytest.approx(weight * right + 0.01 * 2 * 10.5, rel=1e-4)  # bounds from -10 to 0.5


def test_the_estimate_of_members_and_its_interval():
    estimates = ope.Estimates.__new__(ope.Estimates)
    value, low, high, _ = estimates.of_members(np.array([[1.0, 1.0, 1.0], [3.0, 3.0, 3.0]]))
    assert (value, low, high) == (2, 1, 3)  # both members, or one of them twice
    value, low, high, _ = estimates.of_members(np.array([[0.0, 6.0]]))
    assert (value, low, high) == (3, 0, 6)  # both starts, or one of them twice
    value, low, high, _ = estimates.of_members(np.arange(2.0)[None].repeat(200, axis=1))  # 400 starts, of 0 and 1
    np.testing.assert_allclose([low, value, high], [0.5 - 1.96 * 0.025, 0.5, 0.5 + 1.96 * 0.025], atol=0.004)


def test_networks_find_the_value_of_the_chain(policy, tmp_path, monkeypatch, optimised):
    monkeypatch.setattr(ope, "countable", lambda interface: False)
    cfg = ope.Config(policy[1], policy=policy[0], act="sample", discount=0.9, num_seeds=2, horizon=3, out=str(tmp_path))
    counts = dict(num_updates=1000, eval_interval=1000)
    summary = ope.main(dataclasses.replace(cfg, **SMALL | counts))
    np.testing.assert_allclose(summary["estimate"], [1.464, 1.2], atol=0.2)
    assert summary["estimate"][0] > summary["estimate"][1] + 0.1 and summary["unseen"] == [None, None]


# --- What is refused, and what it is compared with -----------------------------------------------------------


def test_the_true_value_has_as_many_steps_as_the_model():
    asked = []

    class Env:
        interface, dataset_id = Interface([1], {"low": [-1.0], "high": [1.0], "dtype": "float32"}, [0.0], [1.0]), "x-v0"
        fingerprint = {}

        def measure(self, policy, q, seeds, num_episodes, **options):
            asked.append(options)
            return {"true_value": np.full(len(seeds), 7.0)}

    n = np.zeros((3, 1), np.float32)
    data = Transition(n, n, n[:, 0], n, n[:, 0], start=np.array([1.0, 0, 1]), episode=np.array([0, 0, 1]))
    runs = type(
        "Runs",
        (),
        {"runs": [{"seed": 0, "grid": {}}], "interface": Env.interface, "fields": {}, "states": (), "digest": ""},
    )()
    runs.every = lambda function: lambda fields, states, shared: np.zeros((1, 2, 2, 1))  # (runs, members, starts, 1)
    env = ope.Estimates(ope.Config(horizon=30, num_members=2), Env(), runs, data)
    found = env.measure(None, lambda obs, action: np.arange(4.0)[None], [0], 1, discount=0.9)
    assert asked[0]["max_steps"] == 30 and found["true_value"] == [7] and found["estimate"] == [1.5]
    env.measure(None, lambda obs, action: np.zeros((1, 4)), [0], 1, max_steps=12)
    assert asked[1]["max_steps"] == 12


def test_the_policy_sees_its_own_observations_and_the_data_its_own_actions(monkeypatch):
    """A policy of data with another normalisation and other bounds, on the data as they are."""
    own = Interface([1], {"low": [0.0], "high": [4.0], "dtype": "float32"}, [5.0], [2.0], [True, []])
    theirs = Interface([1], {"low": [-10.0], "high": [10.0], "dtype": "float32"}, [0.0], [1.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1, act="sample"), own, {})
    runs.states, runs.digest = runs.init(), "of the policy"
    raw, action = np.array([[3.0], [6.0], [9.0], [5.0]], np.float32), np.array([[-0.2], [0.1], [0.9], [0]], np.float32)
    data = Transition(raw, action, np.ones(4, np.float32), raw + 1, np.zeros(4), episode=np.array([0, 0, 1, 2]))

    class Env:
        interface, dataset_id, fingerprint = theirs, "some/data-v0", {"hash": "of the data"}

        def measure(self, policy, q, seeds, num_episodes, **options):
            acted, _ = policy(raw[None], 0, None, np.zeros((1, 4), np.float32))
            return {"acted": acted, "true_value": np.zeros(1)}

    monkeypatch.setattr(ope, "frozen", lambda folder, act: (runs, iql.make_agent, None))
    started = data._replace(start=np.array([1.0, 0, 1, 1]))
    monkeypatch.setattr(ope, "load_dataset", lambda *args, **options: (started, Env()))
    cfg = ope.Config(policy="x", num_seeds=1, num_members=3, max_starts=2)
    dataset, env = ope.load_data(cfg)
    np.testing.assert_allclose(dataset.obs[:, 0], [-1, 0.5, 2, 0])
    np.testing.assert_allclose(dataset.next_obs[:, 0], [-0.5, 1, 2.5, 0.5])
    np.testing.assert_allclose(dataset.action[:, 0], [-2, -0.5, 3.5, -1])  # -2, 1, 9 and 0 where the bounds are 0 and 4
    assert env.fingerprint == {"hash": "of the data", "policy": "of the policy"}
    np.testing.assert_allclose(env.first[:, 0], [-1, 0])  # two of the three starts, of all of the data
    assert env.actions.shape == (1, 3, 2, 1) and len(np.unique(env.actions)) == 6  # each member draws its own
    asked = []
    columns = env.measure(runs.act, lambda *at: asked.append(at) or np.arange(6.0)[None], [0], 2)
    mean = np.asarray(runs.act((raw[None] - 5) / 2, 0, None, np.zeros((1, 4), np.float32))[0])
    np.testing.assert_allclose(10 * columns["acted"], 2 + 2 * mean, rtol=1e-4)
    ((obs, actions),) = asked  # members are blocks
    np.testing.assert_allclose(obs[0, :, 0], [-1, 0] * 3)
    np.testing.assert_allclose(actions[0], env.actions[0].reshape(6, 1))
    assert columns["estimate"] == [2.5] == columns["believed_value"]
    with pytest.raises(SystemExit, match="other observations or actions"):
        Env.interface = theirs._replace(observation=[2])
        ope.load_data(cfg)


def test_a_policy_with_a_memory_has_no_value_of_a_state(monkeypatch):
    own = Interface([1], {"low": [0.0], "high": [4.0], "dtype": "float32"}, [5.0], [2.0])
    runs = iql.Runs(iql.Config(hidden=(4,), num_seeds=1), own, {})
    rows = runs.init()._replace(key=np.zeros((1, 2), np.uint32)), runs.fields
    remembers = type("Agent", (), {"act_with_memory": None})
    monkeypatch.setattr(ope, "frozen", lambda folder, act: (runs, lambda cfg, spec: remembers, rows))
    with pytest.raises(SystemExit, match="has a memory"):
        ope.make_agent(ope.Config(policy="x"), own.spec)


def test_what_is_unseen_and_the_interval_of_counts():
    """Two episodes: one stops in s0, the other goes to s1 and stops there. PI would go on there: 0.8 * 0.6 = 0.48."""
    eye = np.eye(2, dtype=np.float32)
    data = Transition(eye[[0, 0, 1]], np.array([0, 1, 0]), np.array([1, 0.5, 0]), eye[[0, 1, 0]], np.array([1, 0, 1.0]))
    estimates = ope.Estimates.__new__(ope.Estimates)
    estimates.cfg, estimates.dataset = ope.Config(horizon=5), data._replace(start=np.array([1.0, 1, 0]))
    value, low, high, unseen = estimates.of_counts(jnp.array(chain.PI), 0.9)
    assert unseen == pytest.approx(0.48)  # whatever the discount is
    # The first episode twice: 0.2; the second twice: 0.8 * 0.5 = 0.4; both: 0.6
    np.testing.assert_allclose([value, low, high], [0.6, 0.2, 0.6], rtol=1e-5)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"policy": ""}, "python algos/iql.py --dataset"),
        ({"policy": "nowhere"}, "holds no run"),
        ({"num_seeds": 3}, "holds 2 runs: evaluate all of them with --num-seeds 2"),
        ({"horizon": 0}, "horizon must be from 1"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(policy, changes, sentence):
    with pytest.raises(SystemExit, match=sentence) as error:
        ope.main(ope.Config(**{"policy": policy[0], "dataset": policy[1], **SMALL} | changes))
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
