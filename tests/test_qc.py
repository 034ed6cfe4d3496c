"""Q-chunking against numbers worked out by hand. With hidden=() every network is linear. Its flow is FQL's: the exact
velocities of its sampler are in tests/test_fql.py, and one text for both samplers is asked for here.
"""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import fql, qc
from common.datasets import Transition
from common.environments import Interface, Spec

SPEC = Spec(1, 2)
STILL = dict(hidden=(), learning_rate=0.0, flow_steps=2, num_samples=4)
LINEAR = qc.Config(**STILL, horizon=3)
N = 64  # rows of a batch


@functools.partial(jax.jit, static_argnames="cfg")
def update(cfg, floats, state, batch):
    """One update, compiled once for all values of the `floats` of its Config."""
    return qc.make_agent(dataclasses.replace(cfg, **floats), SPEC).update(state, batch)


def put(tree, kernel=0.0, bias=0.0):
    """A linear network, or an ensemble of two, with these numbers, broadcast to (.., inputs, outputs)."""

    def leaf(path, x):
        new = kernel if path[-1].key == "kernel" else bias
        return jnp.broadcast_to(jnp.array(new, jnp.float32), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def linear_state(cfg=LINEAR, actor=(), flow=(), critic=(), target_critic=()):
    """Each network is 0 but for the (kernel, bias) given; inputs are [s, z], [s, x, t] and [s, A], A 3 x 2 numbers."""
    shapes = jax.eval_shape(qc.make_agent(cfg, SPEC).init, jax.random.key(0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes._replace(key=None))
    networks = {}
    for name, numbers in {"actor": actor, "flow": flow, "critic": critic}.items():
        if getattr(state, name) is not None:
            networks[name] = getattr(state, name)._replace(params=put(getattr(shapes, name).params, *numbers))
    target = put(shapes.target_critic, *target_critic)
    return state._replace(key=jax.random.key(0), target_critic=target, **networks)


def batch_of(obs=0, action=(0,) * 6, reward=0, next_obs=0, terminal=0, valid=(1, 1, 1)):
    """Each column, of one row or of some, is repeated to N rows."""
    rows = lambda x, *shape: jnp.resize(jnp.float32(x), (N, *shape))  # noqa: E731
    action, valid = rows(action, np.shape(action)[-1]), rows(valid, np.shape(valid)[-1])
    return qc.Batch(rows(obs, 1), action, rows(reward), rows(next_obs, 1), rows(terminal), valid)


# --- Windows -------------------------------------------------------------------------------------------------


def windows(monkeypatch, lengths, reward, terminal, **changes):
    """The window of every row i of episodes with these lengths; obs is i, action (i + 100, i + 200), next_obs i + 1."""
    n = sum(lengths)
    label, end = jnp.arange(n, dtype=jnp.float32)[:, None], np.repeat(np.cumsum(lengths) - 1, lengths)
    action = jnp.concatenate([label + 100, label + 200], axis=1)
    data = Transition(label, action, jnp.float32(reward), label + 1, jnp.float32(terminal), end=jnp.int32(end))
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.arange(n))
    return qc.draw(jax.random.key(0), data, None, qc.Config(batch_size=n, **changes))


def test_windows_are_rows_of_one_episode_in_their_order(monkeypatch):
    lengths = [4, 2, 5]
    batch = windows(monkeypatch, lengths, np.zeros(11), np.zeros(11), horizon=3)
    first = 0
    for length in lengths:
        for t in range(length):
            rows = [first + min(t + k, length - 1) for k in range(3)]
            row = first + t
            assert batch.obs[row, 0] == row and batch.next_obs[row, 0] == rows[-1] + 1
            np.testing.assert_array_equal(batch.action[row], [x for k in rows for x in (100 + k, 200 + k)])
            np.testing.assert_array_equal(batch.valid[row], [t + k < length for k in range(3)])
        first += length
    # The last row ends the episode in rows 1 and 8: these windows are whole, those after them are not
    np.testing.assert_array_equal(batch.valid[:, -1], [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0])


@pytest.mark.parametrize("horizon, total, power", [(5, -4.900995, 0.950990), (25, -22.217864, 0.777821)])
def test_rewards_of_a_window_are_discounted_and_its_value_is_too(monkeypatch, horizon, total, power):
    # -1 in each of h rows: -(1 - 0.99^h) / (1 - 0.99). Target critics 7, Q = 0: the loss is (R + 0.99^h * 7)^2
    batch = windows(monkeypatch, [horizon], -np.ones(horizon), np.zeros(horizon), horizon=horizon)
    np.testing.assert_allclose(batch.reward[0], total, rtol=1e-6)
    cfg = qc.Config(**STILL, horizon=horizon)
    state = linear_state(cfg, target_critic=(0.0, 7.0))
    whole = batch_of(reward=total, action=(0,) * 2 * horizon, valid=(1,) * horizon)
    _, info = update(cfg, {}, state, whole)
    np.testing.assert_allclose(info["critic_loss"], (total + power * 7) ** 2, rtol=1e-4)


def test_nothing_is_earned_after_a_terminal_row_though_the_episode_goes_on(monkeypatch):
    # Success in row 2 of 5: -1 - 0.99 - 0.9801 = -2.9701. The reference has -4.900995. Nor is there a value after it
    batch = windows(monkeypatch, [6], -np.ones(6), [0, 0, 1, 0, 0, 0], horizon=5)
    np.testing.assert_allclose(batch.reward[:3], [-2.9701, -1.99, -1], rtol=1e-6)
    np.testing.assert_array_equal(batch.terminal, [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.valid[0], np.ones(5))  # its actions are cloned


def test_a_terminal_row_ends_what_is_before_it_in_the_window_and_no_other(monkeypatch):
    batch = windows(monkeypatch, [3, 3], [1, 2, 4, 8, 16, 32], [0, 0, 1, 0, 0, 0], horizon=2, discount=0.5)
    np.testing.assert_allclose(batch.reward[jnp.array([0, 1, 3, 4])], [1 + 1, 2 + 2, 8 + 8, 16 + 16])
    np.testing.assert_array_equal(batch.terminal[jnp.array([0, 1, 3, 4])], [0, 1, 0, 0])


def test_the_data_have_the_ends_of_episodes(monkeypatch):
    asked, data = {}, Transition(*np.zeros((5, 6)), end=np.array([0, 5, 5, 5, 5, 5]))
    monkeypatch.setattr(qc, "load_dataset", lambda name, **options: (asked.update(options), data, "env")[1:])
    assert qc.load_data(qc.Config(reward_shift=-3.0, horizon=5)) == (data, "env")
    assert asked == {"columns": ("end",), "reward_shift": -3.0}
    with pytest.raises(SystemExit, match="^horizon must be at most 5, the length of the longest episode"):
        qc.load_data(qc.Config(horizon=6))


# --- Losses --------------------------------------------------------------------------------------------------


def test_critics_learn_of_whole_windows_alone():
    # y = 2 + 0.99^3 * 0 and Q = 0: 4 in each row; half of the windows lack their last row: the mean over all rows is 2
    batch = batch_of(reward=2, valid=[(1, 1, 1), (1, 1, 0)])
    _, info = update(LINEAR, {}, linear_state(), batch)
    np.testing.assert_allclose(info["critic_loss"], 2.0, rtol=1e-6)
    _, info = update(LINEAR, {}, linear_state(target_critic=(0.0, [[1.0], [4.0]])), batch_of(terminal=(0, 1)))
    np.testing.assert_allclose(info["critic_loss"], (0.99**3 * 2.5) ** 2 / 2, rtol=1e-5)


def test_what_is_beyond_the_episode_is_not_cloned(monkeypatch):
    # z0 = 0.4, v = 0, a = (1, -1 | 0, 0 | 9, 9): squared errors 0.36, 1.96 | 0.16, 0.16 | masked; the mean over all six
    monkeypatch.setattr(jax.random, "normal", lambda key, shape=(), *args: jnp.full(shape, 0.4))
    cfg = dataclasses.replace(LINEAR, flow_steps=3)  # of no other test: traced anew
    _, info = update(cfg, {}, linear_state(), batch_of(action=(1, -1, 0, 0, 9, 9), valid=(1, 1, 0)))
    np.testing.assert_allclose(info["flow_loss"], (0.36 + 1.96 + 0.16 + 0.16) / 6, rtol=1e-5)


def test_the_one_step_policy_climbs_the_mean_of_the_critics_whatever_q_agg_is():
    # Critics 1 and 3: the actor's loss is alpha times the distance, minus 2
    cfg = dataclasses.replace(LINEAR, policy="one-step", q_agg="min")
    _, info = update(cfg, {"alpha": 7.0}, linear_state(cfg, critic=(0.0, [[1.0], [3.0]])), batch_of())
    np.testing.assert_allclose(info["actor_loss"], 7 * info["distill_loss"] - 2, rtol=1e-5)


# --- The best of N -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_the_next_chunk_is_the_critics_choice_and_the_targets_value(q_agg, monkeypatch):
    # Four noises: chunks of six equal numbers c = -0.9, -0.3, 0.3, 0.6 (v = 0). Critics 3 c and -c: their mean, c, is
    # largest at 0.6; their minimum, -2.7, -0.9, -0.3, -0.6, at 0.3. Both target critics are -10 c: -6, or -3
    grid = jnp.array([-0.9, -0.3, 0.3, 0.6])[:, None, None]
    monkeypatch.setattr(
        jax.random, "normal", lambda key, shape=(), *args: jnp.zeros(shape) + (grid if len(shape) == 3 else 0)
    )
    cfg = dataclasses.replace(LINEAR, q_agg=q_agg, flow_steps=1)
    kernel = np.ones((7, 1)) / 6 * (np.arange(7) > 0)[:, None]
    state = linear_state(cfg, critic=(np.stack([3 * kernel, -kernel]),), target_critic=(-10 * kernel,))
    _, info = update(cfg, {}, state, batch_of(terminal=0))
    np.testing.assert_allclose(info["critic_loss"], (0.99**3 * 10 * {"mean": 0.6, "min": 0.3}[q_agg]) ** 2, rtol=1e-4)


def half_flow():
    """v = x / 2: two Euler steps make 1.25^2 times the noise."""
    return np.concatenate([np.zeros((1, 6)), np.eye(6) / 2, np.zeros((1, 6))])


def test_one_sample_is_the_flow_itself():
    cfg = dataclasses.replace(LINEAR, num_samples=1)
    obs, key = jnp.zeros((3, 1)), jax.random.key(3)
    expected = jnp.clip(1.5625 * jax.random.normal(key, (1, 3, 6))[0], -1, 1)
    for slope in (-1.0, 1.0):
        state = linear_state(cfg, flow=(half_flow(),), critic=(slope,))
        agent = qc.make_agent(cfg, SPEC)
        np.testing.assert_allclose(agent.act(state, obs, key), expected[:, :2], rtol=1e-5)
        _, (queue, taken) = agent.act_with_memory(state, obs, key, None, None)
        np.testing.assert_allclose(queue, [expected[:, 2 * k : 2 * k + 2] for k in range(3)], rtol=1e-5)
        assert taken == 1


def test_the_sampler_is_fqls():
    assert inspect.getsource(qc.euler) == inspect.getsource(fql.euler)


# --- Acting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["best-of-n", "one-step"])
def test_a_chunk_is_taken_to_its_end_without_looking(policy):
    """Seven steps of three episodes with chunks of three actions: new ones at 0, 3 and 6, whatever is seen between."""
    cfg = dataclasses.replace(LINEAR, policy=policy)
    agent = qc.make_agent(cfg, SPEC)
    actor = np.concatenate([np.full((1, 6), 0.1), np.eye(6)])
    state = linear_state(cfg, actor=(actor,), flow=(half_flow(),), critic=(1.0,))
    keys, obs = jax.random.split(jax.random.key(5), 7), jax.random.normal(jax.random.key(6), (7, 3, 1))
    act = jax.jit(agent.act_with_memory)
    memory, played, reward = None, [], jnp.zeros(3)
    for t in range(7):
        action, memory = act(state, obs[t], keys[t], memory, reward)
        played.append(action)
        if t % 3 == 0:
            np.testing.assert_array_equal(action, agent.act(state, obs[t], keys[t]))
            queue = memory[0]
        np.testing.assert_array_equal(action, queue[t % 3])
        np.testing.assert_array_equal(memory[0], queue)
    assert len(np.unique(np.array(played))) > 15  # many are clipped; no action is the last one again
    again, _ = act(state, obs[1], keys[1], None, reward)  # another episode: nothing is left of the chunk of this one
    np.testing.assert_array_equal(again, agent.act(state, obs[1], keys[1]))


@pytest.mark.parametrize("episodes", [(), (3,)], ids=["one", "three"])
def test_a_restored_policy_remembers_its_chunk(episodes, tmp_path):
    """From a folder: steps 0 to 2 are the chunk of what step 0 saw, 3 and 4 that of step 3; then a new episode begins.

    Of three episodes the first has ended in step 1, so that its observation stands still: the others do not notice.
    """
    box = Interface([1], {"low": [-2.0] * 2, "high": [2.0] * 2, "dtype": "float32"}, [0.0], [1.0])
    cfg = dataclasses.replace(LINEAR, hidden=(8,), num_seeds=1)
    runs = qc.Runs(cfg, box, {})
    runs.states = runs.init()
    config = {"algo": "qc", **dataclasses.asdict(cfg), "grid": {}}
    qc.write(tmp_path / "config.json", {"config": config, "interface": list(box)})
    runs.save(tmp_path)
    policy, agent = qc.restore(tmp_path), qc.make_agent(cfg, SPEC)
    state = jax.tree.map(lambda x: x[0], runs.states)
    obs = np.random.default_rng(0).normal(size=(5, *episodes, 1)).astype(np.float32)
    obs[1:, :1] = obs[1, :1] if episodes else obs[1:, :1]
    for call, (row, taken) in enumerate([(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (1, 0), (2, 1)]):
        action = policy(obs[row], None if call in (0, 5) else np.zeros(episodes))
        if taken == 0:
            _, (queue, _) = qc.act_at(cfg, agent, state, obs[row].reshape(-1, 1), None, None, call)
        np.testing.assert_allclose(action, 2 * queue[taken].reshape(*episodes, 2), rtol=1e-4, atol=1e-5)


# --- Limits --------------------------------------------------------------------------------------------------


def test_chunks_of_one_action_are_fql():
    """Draws and whole updates, terminal rows and ends of episodes included."""
    small = dict(hidden=(8,), flow_steps=2, alpha=10.0, batch_size=16)
    ours = qc.make_agent(cfg := qc.Config(**small, horizon=1, policy="one-step"), SPEC)
    theirs = fql.make_agent(their_cfg := fql.Config(**small), SPEC)
    k = jax.random.split(jax.random.key(1), 4)
    data = Transition(
        obs=jax.random.normal(k[0], (40, 1)),
        action=jax.random.uniform(k[1], (40, 2), minval=-1.0),
        reward=jax.random.normal(k[2], (40,)),
        next_obs=jax.random.normal(k[3], (40, 1)),
        terminal=(jnp.arange(40) % 7 == 3).astype(jnp.float32),
        end=jnp.arange(40) // 8 * 8 + 7,
    )

    def steps(module, agent, cfg):
        def step(state, key):
            state, info = agent.update(state, module.draw(key, data, state, cfg))
            return state, info["critic_loss"]

        return jax.jit(lambda key: jax.lax.scan(step, agent.init(key), jax.random.split(k[0], 3)))

    (a, losses), (b, their_losses) = steps(qc, ours, cfg)(k[3]), steps(fql, theirs, their_cfg)(k[3])
    np.testing.assert_allclose(losses, their_losses, rtol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    for name in ("actor", "flow", "critic"):
        jax.tree.map(close, getattr(a, name).params, getattr(b, name).params)
    jax.tree.map(close, a.target_critic, b.target_critic)


def test_discrete_actions_are_refused_in_one_sentence():
    with pytest.raises(SystemExit, match="QC needs continuous actions"):
        qc.make_agent(qc.Config(), Spec(3, 4, discrete=True))
