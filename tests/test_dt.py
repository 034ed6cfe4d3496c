"""The Decision Transformer against numbers worked out by hand: what it reads, what it learns, and how it is played."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from algos import dt
from common.datasets import Transition
from common.environments import Interface, Spec

TINY = dict(hidden=(8,), embed_dim=8, context=4, max_timestep=6, warmup_updates=1, batch_size=4)
SMALL = dict(hidden=(32,), embed_dim=32, max_timestep=4, warmup_updates=20, batch_size=64, dropout=0.0)
SMALL |= dict(num_updates=300, log_interval=300, eval_interval=300)
SPECS = [Spec(3, 2), Spec(3, 4, True)]
KINDS = ["continuous", "discrete"]
KEY = jax.random.key(0)


def normal(state, key=KEY):
    """The state with normal parameters: of those it starts with, many are 0."""
    leaves, tree = jax.tree.flatten(state.actor.params)
    keys = jax.random.split(key, len(leaves))
    params = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return state._replace(actor=state.actor._replace(params=tree.unflatten(params)))


def window(spec, *shape):
    """Random windows of this shape (windows, steps), all of whose steps are real."""
    k = jax.random.split(jax.random.key(5), 3)
    action = jax.random.uniform(k[1], (*shape, 2), minval=-1)
    action = jax.random.randint(k[1], shape, 0, spec.action_dim) if spec.discrete else action
    timestep = jnp.broadcast_to(jnp.arange(shape[-1]), shape)
    obs, to_go = jax.random.normal(k[0], (*shape, 3)), jax.random.normal(k[2], shape)
    return dt.Window(obs, action, to_go, timestep, jnp.ones(shape, bool))


def network(cfg, spec):
    options = cfg.embed_dim, cfg.hidden, cfg.num_heads, cfg.max_timestep, 0.0, spec.discrete
    return jax.jit(dt.DecisionTransformer(spec.action_dim, *options).apply)


def fit(cfg, spec, *episodes):
    """Trained on episodes (obs, action, reward), each a list of steps; the agent, its state and what was drawn of."""
    columns = [np.concatenate([np.asarray(x[i]) for x in episodes]) for i in range(3)]
    lengths = np.array([len(x[0]) for x in episodes])
    to_go = np.concatenate([np.cumsum(np.asarray(x[2], float)[::-1])[::-1] for x in episodes]).astype(np.float32)
    timestep = np.concatenate([np.arange(n) for n in lengths])
    end = np.repeat(np.cumsum(lengths) - 1, lengths)
    obs, action = np.asarray(columns[0], np.float32), columns[1] if spec.discrete else columns[1].astype(np.float32)
    rows = Transition(obs, action, columns[2], obs, to_go, return_to_go=to_go, timestep=timestep, end=end)
    agent = dt.make_agent(cfg, spec)
    state = jax.jit(agent.init)(KEY)
    return agent, jax.jit(dt.make_train(cfg, agent))(state, jax.tree.map(jnp.asarray, rows))[0]


# --- What the network reads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_an_action_reads_what_came_before_it_and_nothing_else(spec):
    """Bit for bit: not the action itself, and no later return, observation or action."""
    cfg = dt.Config(**TINY)
    params = normal(dt.make_agent(cfg, spec).init(KEY)).actor.params
    obs, action, to_go, timestep, _ = window(spec, 2, 4)
    apply = network(cfg, spec)
    base = apply(params, obs, action, to_go, timestep)
    assert base.shape == (2, 4, spec.action_dim)
    for step in range(4):
        changed = (action + 1) % 4 if spec.discrete else action + 1
        changes = {
            "return": ((obs, action, to_go.at[:, step].add(1)), step),  # the step's own, and those after it, read it
            "obs": ((obs.at[:, step].add(1), action, to_go), step),
            "action": ((obs, action.at[:, step].set(changed[:, step]), to_go), step + 1),
        }
        for name, (inputs, first) in changes.items():
            other = apply(params, *inputs, timestep)
            np.testing.assert_array_equal(other[:, :first], base[:, :first], err_msg=f"{name} {step}")
            for later in range(first, 4):
                assert not np.array_equal(other[:, later], base[:, later]), f"{name} {step} {later}"


def test_it_reads_scaled_returns_and_no_difference_between_late_steps():
    # Returns of rewards 1, 2, 3 are 6, 5, 3; with a scale of 1000 the network reads 0.006, 0.005, 0.003
    spec, cfg = SPECS[0], dt.Config(**TINY | {"dropout": 0.0})
    state, batch = normal(dt.make_agent(cfg, spec).init(KEY)), window(spec, 1, 3)
    whole, thousandth = (batch._replace(return_to_go=x * jnp.array([[6.0, 5.0, 3.0]])) for x in (1, 0.001))
    loss = [
        jax.jit(dt.make_agent(dataclasses.replace(cfg, return_scale=scale), spec).update)(state, rows)[1]["actor_loss"]
        for scale, rows in ((1000.0, whole), (1.0, thousandth), (1.0, whole))
    ]
    np.testing.assert_allclose(loss[0], loss[1], rtol=1e-5)
    assert abs(loss[2] - loss[1]) > 1e-3
    apply = network(cfg, spec)
    late = [apply(state.actor.params, *batch[:3], jnp.full((1, 3), t)) for t in (4, 5, 6, 700)]
    assert not np.array_equal(late[0], late[1])
    np.testing.assert_array_equal(late[1], late[2])
    np.testing.assert_array_equal(late[1], late[3])


def test_data_are_normalised_and_returns_are_of_the_rewards_as_they_are(monkeypatch):
    asked = {}
    monkeypatch.setattr(dt, "load_dataset", lambda name, **options: asked.update(options, name=name))
    dt.load_data(dt.Config(dataset="a/b-v0"))
    assert asked == {"name": "a/b-v0", "columns": ("return_to_go", "timestep", "end"), "normalize_obs": True}


# --- Windows --------------------------------------------------------------------------------------------------


def test_windows_begin_at_any_row_and_cross_no_end():
    lengths = np.array([3, 1, 6])
    end, row = np.repeat(np.cumsum(lengths) - 1, lengths), np.arange(10)
    timestep = np.concatenate([np.arange(n) for n in lengths])
    x = jnp.asarray(row, jnp.float32)
    rows = Transition(x[:, None], x[:, None] + 100, x, x[:, None], x, end=end, timestep=timestep, return_to_go=x + 200)
    rows = jax.tree.map(jnp.asarray, rows)
    batch = dt.draw(KEY, rows, None, dt.Config(**TINY | {"batch_size": 20_000}))
    first = np.asarray(batch.obs[:, 0, 0]).astype(int)
    np.testing.assert_allclose(np.bincount(first) / 20_000, 0.1, atol=0.01)  # the last rows, too
    expected = first[:, None] + np.arange(4)
    np.testing.assert_array_equal(batch.valid, expected <= end[first][:, None])
    padded = np.minimum(expected, end[first][:, None])  # with the episode's last row, not with those of the next one
    np.testing.assert_array_equal(batch.obs[..., 0], padded)
    real = np.asarray(batch.valid)
    for column, of in ((batch.obs[..., 0], x), (batch.action[..., 0], x + 100), (batch.return_to_go, x + 200)):
        np.testing.assert_array_equal(np.asarray(column)[real], np.asarray(of)[expected[real]])
    np.testing.assert_array_equal(np.asarray(batch.timestep)[real], timestep[expected[real]])


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_what_stands_behind_the_end_of_an_episode_changes_nothing(spec):
    """Bit for bit, in the loss and in the whole update, with dropout."""
    agent = dt.make_agent(dt.Config(**TINY), spec)
    batch = window(spec, 4, 4)._replace(valid=jnp.arange(4)[None] < jnp.array([[4], [2], [1], [3]]))
    other = jax.tree.map(lambda x: x[::-1] if x.dtype != bool else x, batch)

    def garbage(x, y):
        return jnp.where(batch.valid.reshape(4, 4, *[1] * (x.ndim - 2)), x, y)

    spoilt = dt.Window(*(garbage(x, y) for x, y in zip(batch[:4], other[:4], strict=True)), batch.valid)
    assert not np.array_equal(spoilt.obs, batch.obs)
    state, update = normal(agent.init(KEY)), jax.jit(agent.update)
    (a, info), (b, info_b) = update(state, batch), update(state, spoilt)
    chex.assert_trees_all_equal((a.actor, info), (b.actor, info_b))
    np.testing.assert_allclose(info["valid"], 10 / 16)


def test_every_real_step_counts_the_same():
    # With parameters of 0 the action is 0. A full window of four actions 0.5, and two real ones of 0.1 with padding of
    # 0.9: (4 * 0.25 + 2 * 0.01) / 6 = 0.17. A mean of the windows' means is 0.13; over all eight positions it is 0.1275
    agent = dt.make_agent(dt.Config(**TINY), Spec(3, 2))
    state = jax.tree.map(jnp.zeros_like, agent.init(jax.random.key(0)).actor)
    batch = window(Spec(3, 2), 2, 4)
    action = jnp.array([[0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.9, 0.9]])[..., None] * jnp.ones((1, 1, 2))
    batch = batch._replace(action=action, valid=jnp.array([[True] * 4, [True, True, False, False]]))
    _, info = jax.jit(agent.update)(dt.State(KEY, state), batch)
    np.testing.assert_allclose(info["actor_loss"], 0.17, rtol=1e-5)


def test_the_discrete_loss_is_a_cross_entropy():
    # With parameters of 0 all four actions are as likely: log 4
    agent = dt.make_agent(dt.Config(**TINY), SPECS[1])
    state = jax.tree.map(jnp.zeros_like, agent.init(KEY).actor)
    _, info = jax.jit(agent.update)(dt.State(KEY, state), window(SPECS[1], 2, 4))
    np.testing.assert_allclose(info["actor_loss"], math.log(4), rtol=1e-6)


# --- Optimisation ---------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_linearly_and_then_stays():
    # min((s + 1) / 10000, 1) * 1e-4 in update s = 0, 1, ... Adam's first step has this size where a parameter is 0
    cfg = dt.Config(**TINY | dict(warmup_updates=10_000, learning_rate=1e-4, weight_decay=0.0, max_norm=1e9))
    agent = dt.make_agent(cfg, SPECS[0])
    state, update = agent.init(KEY), jax.jit(agent.update)
    for s, expect in ((0, 1e-8), (4999, 5e-5), (9999, 1e-4), (50_000, 1e-4)):
        clip, (adam, decay, schedule) = state.actor.opt_state
        late = (clip, (adam, decay, schedule._replace(count=jnp.int32(s))))
        new, _ = update(state._replace(actor=state.actor._replace(opt_state=late)), window(SPECS[0], 4, 4))
        bias = new.actor.params["params"]["CausalTransformer_0"]["LayerNorm_2"]["bias"]
        np.testing.assert_allclose(np.abs(bias).max(), expect, rtol=1e-3)


def test_dropout_is_of_updates_alone_and_in_no_grid():
    batch = window(SPECS[0], 4, 4)

    def losses(dropout):
        agent = dt.make_agent(dt.Config(**TINY, dropout=dropout), SPECS[0])
        state, update = normal(agent.init(KEY)), jax.jit(agent.update)
        acted = [jax.jit(agent.act)(state, batch.obs[:, 0], jax.random.key(k)) for k in (0, 1)]
        np.testing.assert_array_equal(*acted)
        return [update(state._replace(key=jax.random.key(k)), batch)[1]["actor_loss"] for k in (0, 1)]

    assert len({float(x) for x in (*losses(0), *losses(0.5))}) == 3
    box = Interface([3], {"low": [-1.0], "high": [1.0], "dtype": "float32"}, [0.0] * 3, [1.0] * 3)
    with pytest.raises(SystemExit, match="^dropout decides what is compiled, so a grid cannot have it"):
        dt.Runs(dt.Config(**TINY), box, {"dropout": [0.0, 0.1]}).init()


def test_tokens_that_heads_cannot_share_are_refused():
    with pytest.raises(SystemExit, match="^embed_dim, 8, must be a multiple of num_heads, 3"):
        dt.make_agent(dt.Config(**TINY, num_heads=3), SPECS[0])


# --- Acting ---------------------------------------------------------------------------------------------------


def play(agent, state, obs, rewards, *garbage):
    """(actions, memories) of the steps of episodes: obs (steps, ..., obs_dim), rewards (steps, ...) after each."""
    act, memory, actions, memories = jax.jit(agent.act_with_memory), None, [], []
    reward = jnp.zeros(obs.shape[1:-1])
    for seen, paid in zip(obs, rewards, strict=True):
        action, memory = act(state, seen, KEY, memory, reward)
        actions.append(action)
        memories.append(memory)
        reward = paid
    return actions, memories


def test_what_is_asked_for_falls_by_what_was_paid():
    # Target 10, rewards 1 and 2: 10, 9, 7; then 3, 1 and 4: 4, 3, -1. A context of 4 forgets 10 and 9
    cfg = dt.Config(**TINY, target_return=10.0)
    agent = dt.make_agent(cfg, SPECS[0])
    rewards = jnp.array([1.0, 2.0, 3.0, 1.0, 4.0, 0.0])[:, None]
    obs = jnp.arange(6.0)[:, None, None] * jnp.ones((1, 1, 3))
    actions, memories = play(agent, agent.init(KEY), obs, rewards)
    asked = [memory.return_to_go[0, : t + 1] for t, memory in enumerate(memories)]
    np.testing.assert_array_equal(asked[2], [10, 9, 7])
    np.testing.assert_array_equal(asked[3], [10, 9, 7, 4])
    np.testing.assert_array_equal(asked[5], [7, 4, 3, -1])
    np.testing.assert_array_equal(memories[5].obs[0, :, 0], [2, 3, 4, 5])
    np.testing.assert_array_equal(memories[5].action[0], jnp.concatenate(actions[2:]))


@pytest.mark.parametrize("spec", SPECS, ids=KINDS)
def test_a_played_step_is_the_network_on_the_last_steps(spec):
    """From the first step, a window of length 1, to one whose first steps are forgotten; timesteps are those of all."""
    cfg = dt.Config(**TINY | {"max_timestep": 20}, target_return=2.0, return_scale=4.0)
    agent = dt.make_agent(cfg, spec)
    state, apply = normal(agent.init(KEY)), network(cfg, spec)
    obs, rewards = jax.random.normal(jax.random.key(1), (7, 2, 3)), jax.random.normal(jax.random.key(2), (7, 2))
    actions, _ = play(agent, state, obs, rewards)
    to_go = 2.0 - jnp.concatenate([jnp.zeros((1, 2)), jnp.cumsum(rewards, axis=0)[:-1]])
    for step in range(7):
        first = max(0, step - 3)
        columns = (obs, jnp.stack(actions), to_go / 4)
        columns = [jnp.moveaxis(x[first : step + 1], 0, 1) for x in columns]
        timestep = jnp.broadcast_to(jnp.arange(first, step + 1), (2, step + 1 - first))
        output = apply(state.actor.params, *columns, timestep)[:, -1]
        expect = output.argmax(axis=-1) if spec.discrete else output
        np.testing.assert_allclose(actions[step], expect, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(agent.act(state, obs[0], KEY), actions[0])


def test_slots_behind_the_present_step_may_hold_anything():
    agent = dt.make_agent(dt.Config(**TINY), SPECS[0])
    state, act = normal(agent.init(KEY)), jax.jit(agent.act_with_memory)
    _, memory = act(state, jnp.ones((2, 3)), KEY, None, jnp.zeros(2))
    spoilt = dt.Memory(*(x.at[:, 1:].add(7.0) for x in memory[:3]), memory.step)
    a, b = (act(state, 2 * jnp.ones((2, 3)), KEY, x, jnp.ones(2))[0] for x in (memory, spoilt))
    np.testing.assert_array_equal(a, b)


def test_a_context_of_one_step():
    cfg = dt.Config(**TINY | {"context": 1}, target_return=3.0)
    agent = dt.make_agent(cfg, SPECS[0])
    state, _ = jax.jit(agent.update)(agent.init(KEY), window(SPECS[0], 4, 1))
    _, memories = play(agent, state, jnp.ones((3, 1, 3)), jnp.ones((3, 1)))
    np.testing.assert_array_equal([memory.return_to_go[0, 0] for memory in memories], [3, 2, 1])


def test_runs_ask_for_their_own_return_and_remember_their_own_episodes():
    """Through Runs.act, as an evaluation plays: two points of a grid, three episodes each."""
    box = Interface([3], {"low": [-1.0] * 2, "high": [1.0] * 2, "dtype": "float32"}, [0.0] * 3, [1.0] * 3)
    cfg = dt.Config(**TINY, num_seeds=1)
    runs = dt.Runs(cfg, box, {"target_return": [1.0, 5.0]})
    runs.states = jax.vmap(normal)(runs.init())
    obs, rewards = np.random.default_rng(0).normal(size=(6, 2, 3, 3)).astype(np.float32), np.ones((2, 3), np.float32)
    memory, played = None, []
    for t in range(6):
        action, memory = runs.act(obs[t], t, memory, rewards * (t > 0))
        played.append(action)
    np.testing.assert_array_equal(memory.return_to_go[:, :, -1], [[-4] * 3, [0] * 3])
    for row, target in enumerate((1.0, 5.0)):
        agent = dt.make_agent(dataclasses.replace(cfg, target_return=target), SPECS[0])
        state = jax.tree.map(lambda x, row=row: x[row], runs.states)
        alone, _ = play(agent, state, jnp.asarray(obs[:, row]), jnp.ones((6, 3)))
        np.testing.assert_allclose(np.stack(played)[:, row], alone, rtol=1e-4, atol=1e-5)


def test_a_restored_policy_remembers_one_episode_or_a_batch_of_them(tmp_path):
    """From a folder: an episode is played alike alone, in a batch, and beside one that has ended and stands still."""
    box = Interface([3], {"low": [-1.0] * 2, "high": [1.0] * 2, "dtype": "float32"}, [0.0] * 3, [1.0] * 3)
    cfg = dt.Config(**TINY, num_seeds=1, target_return=10.0)
    runs = dt.Runs(cfg, box, {})
    runs.states = jax.vmap(normal)(runs.init())
    runs.save(tmp_path)
    config = {"algo": "dt", **dataclasses.asdict(cfg), "grid": {}}
    (tmp_path / "config.json").write_text(json.dumps({"config": config, "interface": list(box)}))
    batch, single = dt.restore(tmp_path), dt.restore(tmp_path)
    obs, rewards = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((6, 2, 3), (6, 2)))
    obs[3:, 0], rewards[3:, 0] = obs[2, 0], rewards[2, 0]  # the first episode has ended
    played = []
    for step in range(6):
        last = {} if step == 0 else {"reward": rewards[step - 1]}
        played.append(batch(obs[step], **last))
        alone = single(obs[step, 1], **{name: float(x[1]) for name, x in last.items()})
        assert alone.shape == (2,)
        np.testing.assert_allclose(alone, played[-1][1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch(obs[0]), played[0], rtol=1e-5)  # without a reward an episode begins
    other = batch(obs[1], rewards[0] + 5)
    assert (np.abs(other - played[1]).max(axis=-1) > 1e-4).all()  # the reward is read


# --- Learning -------------------------------------------------------------------------------------------------


def asking(cfg, spec, state, target, obs=1.0):
    agent = dt.make_agent(dataclasses.replace(cfg, target_return=target), spec)
    return agent.act(state, jnp.full((1, 1), obs), KEY)[0]


def test_what_is_asked_for_is_what_is_done(optimised):
    # One state, episodes of one step: -0.5 earned 0, 0.5 earned 1. Asked for 1 it gives 0.5, for 0 it gives -0.5.
    # Between them nothing is promised, but a continuous network passes what lies between
    cfg, spec = dt.Config(**SMALL, context=1), Spec(1, 1)
    _, state = fit(cfg, spec, ([[1.0]], [[-0.5]], [0.0]), ([[1.0]], [[0.5]], [1.0]))
    for target, low, high in ((1.0, 0.45, 0.55), (0.0, -0.55, -0.45), (0.5, -0.5, 0.5)):
        assert low < asking(cfg, spec, state, target)[0] < high
    _, other = fit(
        dataclasses.replace(cfg, target_return=7.0), spec, ([[1.0]], [[-0.5]], [0.0]), ([[1.0]], [[0.5]], [1.0])
    )
    chex.assert_trees_all_equal(state.actor, other.actor)  # the target is read by acting alone


def test_it_takes_luck_for_skill(optimised):
    """A known failure of all methods that condition on returns, and no defect of this file.

    Action 0 pays 1 half of the time, else 0; action 1 pays 0.8 always. The data take action 0 in nine of ten cases.
    Among those who got 1 all took action 0, which is worth 0.5. Asked for 0.8 it takes action 1.
    """
    cfg, spec = dt.Config(**SMALL, context=1), Spec(1, 2, True)
    lucky = [([[1.0]], [0], [float(i % 2)]) for i in range(18)]
    _, state = fit(cfg, spec, *lucky, *[([[1.0]], [1], [0.8])] * 2)
    assert asking(cfg, spec, state, 1.0) == 0 and asking(cfg, spec, state, 0.8) == 1


def test_it_remembers_what_it_saw(optimised):
    """Only the first observation, +1 or -1, tells what to do in the third step; cloning a state cannot know it."""
    cfg, spec = dt.Config(**SMALL, context=3), Spec(1, 1)
    episodes = [([[s], [0.0], [0.0]], [[0.0], [0.0], [s / 2]], [0.0] * 3) for s in (-1.0, 1.0)]
    agent, state = fit(cfg, spec, *episodes)
    obs = jnp.array([[[-1.0], [1.0]], [[0.0], [0.0]], [[0.0], [0.0]]])
    actions, _ = play(agent, state, obs, jnp.zeros((3, 2)))
    np.testing.assert_allclose(actions[2], [[-0.5], [0.5]], atol=0.1)
