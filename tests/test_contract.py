"""What every algorithm must satisfy, whatever it learns: each test runs over every file in algos/.

Everything is jitted, on networks of one hidden layer of 8 units, and compiled once per algorithm and action kind. A new
file in algos/ is under test as soon as it exists; nothing is to be registered.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
import types
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from conftest import EVALUATORS, project_algos

from common.datasets import Transition, aligned
from common.environments import Spec

ROOT = pathlib.Path(__file__).parents[1]
# Scripts of array functions, which train nothing: their own tests hold them to padding, order and bad input
TRAIN_NOTHING = {"importance_sampling", "doubly_robust"}
ALGOS = sorted({p.stem for p in (ROOT / "algos").glob("*.py")} - {"__init__"} - TRAIN_NOTHING)
CONTINUOUS, DISCRETE = Spec(3, 2), Spec(3, 4, discrete=True)
IMAGES = Spec(5 * 6 * 4, 4, discrete=True, obs_shape=(5, 6, 4))  # stacks of two images with two channels
# Files that learn to reach goals: `draw` finds them in the data, and the policy is handed (obs, goal)
GOALS = {name for name in ALGOS if "goals=True" in (ROOT / "algos" / f"{name}.py").read_text()}
ROOMS = ("datasets", "environments", "networks", "stepper")  # of common/; the first two share its layouts
N, B = 64, 16  # rows of the data and of a batch
# What papers do on purpose, and a test would take for a defect
# Weights relative to the batch's own scale
RELATIVE = {"marwil", "reps", "td3_bc", "td3_awr", "rebrac", "spot", "gc_td3_bc", "gciql", "qrl", "crl"}
RELATIVE |= {"diffusion_ql", "edp"}
PROPOSES = dict.fromkeys(("cql", "cal_ql", "wsrl", "combo"), {"weight": 0.0})  # pi(.|s') proposes in every row
PROPOSES["mobile"] = {"penalty": 0.0}  # its doubt asks a model that is measured on these rows before
# Pushes values up, or doubts them, in a part of the rows alone. This makes it all of them, or none
ALL_REAL = dict.fromkeys(("combo", "mobile"), {"real_ratio": 1.0})
NEEDS = dict.fromkeys(("cql", "cal_ql"), {"lagrange": True})  # options without which a float of theirs does nothing
ACTS_ON_SAMPLES = {"bcq", "bear", "emaq", "qt_opt", "actionable_models"}  # act takes the best of actions that it draws
ACTS_ON_SAMPLES |= {"diffusion_ql", "edp", "idql"}
ACTS_ON_SAMPLES |= {"fql", "ifql", "qc"}  # or the one that it draws
MIXES = {"bcq", "bear", "emaq"}  # q is min_weight of the smaller critic, and the rest of the larger one
MEANS = {"fql"}  # q is the mean of the critics: its paper believes that
ACTS_BY_TARGETS = {"qt_opt", "diffusion_ql", "idql"}  # the averaged critic is the one that its paper acts by
ACTS_BY_AVERAGE = {"idql"}  # and the averaged policy acts, which moves by actor_tau
RELABELS = {"awr"}  # its returns are made anew while it trains
OF_BELIEFS = {"model_evaluation": {"discount"}}  # floats of what it believes, and not of what it fits
AWR = {"extraction": "awr"}  # the way to a policy that discrete actions allow, beside that of the defaults
EXTRACTS = {"gciql", "qrl", "crl"}  # have both
NEGATIVES = {"crl"}  # the other rows of a batch are the negative examples of each row
CHUNKS = {"qc"}  # its critics value several actions at once, of which an evaluation has one: it has no q
LOG_RATIO = {"crl"}  # its critic is the logarithm of a ratio of probabilities, and no return
NONE_BELOW_0 = {"actionable_models"}  # its targets are at least 0, and so is what it starts from in these tests
SHARES = {"hiql": "v"}  # this part of the network alone has a slow copy: both read the same goals
SUCCESS = {"gciql": lambda c: (1 - c.discount) / c.discount, "gc_td3_bc": lambda c: 1 - c.discount}  # q's unit: see q
GAUSSIAN = {"epsilon_std", "init_std"}  # floats of a Gaussian: discrete actions have no use for them
ONLINE = {"exploration_noise", "offline_ratio", "online_weight", "end_weight"}  # read on-line alone: test_online.py
ASKS_FOR = {"rvs": {"target"}, "dt": {"target_return"}}  # floats that say what to act for; training does not read them
STATIC = {"dt": {"dropout"}}  # a float that flax compares with 0, so that no sweep has it: make_agent says so
WINDOWS = {"dt", "qc"}  # `draw` makes a batch of whole windows of rows
STEPS = {"dt"}  # the loss of a batch is the mean over the steps of its windows, which have no rewards: tests/test_dt.py
MOVES_TARGETS = {"rlpd"}  # with each of its critic updates


class Case(NamedTuple):
    algo: Any  # module
    cfg: Any
    spec: Spec
    agent: Any  # jitted init, update, act
    train: Any  # jitted, 10 updates
    pretrain: Any  # the same of the first phase; does nothing where there is none
    state: Any
    data: Transition
    batch: Any  # a Transition, or what `draw` makes of one where rows have goals or are windows
    obs: Any  # (N, obs_dim + goal_dim): what the policy is handed


def load(name):
    return importlib.import_module(f"algos.{name}")


def config(algo, **changes):
    small = dict(num_updates=40, eval_interval=10, log_interval=10, batch_size=B)
    fields = {f.name for f in dataclasses.fields(algo.Config)}
    small |= {name: (8,) for name in fields if name.endswith("hidden")}
    counts = dict(prepare_interval=5, num_members=3, num_elites=2, rollout_batch_size=16, horizon=2, buffer_size=64,
                  real_ratio=0.5, policy_delay=2, latent_dim=16, subgoal_steps=3, context=3, embed_dim=8,
                  max_timestep=6, warmup_updates=2, ema_interval=1, flow_steps=2)  # fmt: skip
    small |= {name: value for name, value in counts.items() if name in fields}
    return algo.Config(**(small | changes))


def name_of(algo):
    return algo.__name__.removeprefix("algos.")


def of(algo, spec):
    """The spec of a task, with goals that are whole observations where the file learns to reach goals."""
    return spec._replace(goal_dim=spec.obs_dim) if name_of(algo) in GOALS else spec


def takes(algo, spec, **options):
    try:
        algo.make_agent(config(algo, **options), of(algo, spec))
    except SystemExit:
        return False
    return True


def random_data(spec, key):
    k = jax.random.split(key, 7)
    if spec.discrete:
        action, next_action = (jax.random.randint(k[i], (N,), 0, spec.action_dim) for i in (1, 5))
    else:
        action, next_action = (jax.random.uniform(k[i], (N, spec.action_dim), minval=-1) for i in (1, 5))
    if spec.obs_shape:  # all of one episode, after whose last row there is one image more
        frames = jax.random.randint(k[0], (N + 1, *spec.obs_shape[:2], 2), 0, 256).astype(jnp.uint8)
        window = jnp.maximum(jnp.arange(N)[:, None] + jnp.array([[-1, 0, 1]]), 0)
        return random_data(DISCRETE, key)._replace(obs=None, next_obs=None, frames=frames, window=window)
    return Transition(
        obs=jax.random.normal(k[0], (N, spec.obs_dim)),
        action=action,
        reward=jax.random.normal(k[2], (N,)),
        next_obs=jax.random.normal(k[3], (N, spec.obs_dim)),
        terminal=jax.random.bernoulli(k[4], 0.2, (N,)).astype(jnp.float32),
        next_action=next_action,
        episode=jnp.arange(N) // 8,
        end=jnp.arange(N) // 8 * 8 + 7,
        return_to_go=jax.random.normal(k[6], (N,)),
        start=(jnp.arange(N) % 8 == 0).astype(jnp.float32),
        timestep=jnp.arange(N) % 8,
    )


CASES = [(name, spec, {}) for name in ALGOS for spec in (CONTINUOUS, DISCRETE) if takes(load(name), spec)]
CASES += [(name, spec, AWR) for name in sorted(EXTRACTS) for spec in (CONTINUOUS, DISCRETE)]
CASES += [("qc", CONTINUOUS, {"policy": "one-step"})]
CASES += [(name, IMAGES, {"encoder": "minatar"}) for name in ("dqn", "cql_discrete") if name in ALGOS]
CASES += [(name, IMAGES, {"encoder": "minatar", "random_shift": 1}) for name in ("bc", "iql") if name in ALGOS]


def id_of(name, spec, options):
    return "-".join([name, "discrete" if spec.discrete else "continuous", *map(str, options.values())])


@pytest.fixture(scope="module", params=CASES, ids=[id_of(*case) for case in CASES])
def case(request):
    name, spec, options = request.param
    algo = load(name)
    cfg, spec = config(algo, **options), of(algo, spec)
    agent = algo.make_agent(cfg, spec)
    agent = jitted(agent)
    data = random_data(spec, jax.random.key(7))
    train, pretrain = jax.jit(algo.make_train(cfg, agent)), lambda state, data: (state, {})
    if hasattr(agent, "pretrain"):
        pretrain = jax.jit(algo.make_train(cfg, agent, "pretrain"))
    state = lifted(name, agent.init(jax.random.key(0)))
    batch, obs = data.take(np.arange(B)), data.take(np.arange(N)).obs
    if name in GOALS | WINDOWS:
        batch = algo.draw(jax.random.key(1), data, state, cfg)
    if name in GOALS:
        obs = jnp.concatenate([obs, obs[::-1]], axis=-1)
    return Case(algo, cfg, spec, agent, train, pretrain, state, data, batch, obs)


def lifted(name, state):
    """The state as it is or, where values that are hardly trained are cut at 0, with critics that say 0.5 more."""
    if name not in NONE_BELOW_0:
        return state

    def lift(path, x):
        last_bias = all(part in jax.tree_util.keystr(path) for part in ("Dense_1", "bias"))
        return x + 0.5 if last_bias else x

    critic = jax.tree_util.tree_map_with_path(lift, state.critic.params)
    return state._replace(critic=state.critic._replace(params=critic), target_critic=critic)


def jitted(agent):
    """The agent with each of its functions compiled once; a field may also hold None or a list of functions.

    What draws stays as it is: it takes a Config.
    """
    fields = agent._asdict().items()
    return type(agent)(**{name: x if name.endswith("draw") else jax.tree.map(jax.jit, x) for name, x in fields})


@pytest.fixture(params=ALGOS)
def algo(request):
    return load(request.param)


def networks(state):
    return {name: x for name, x in state._asdict().items() if hasattr(x, "params") or name.startswith("target_")}


def params(network):
    return getattr(network, "params", network)


def differ(a, b):
    return any(not np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def updated(case, state, batch):
    """The state after one whole update, of which every network is a part."""
    if hasattr(case.agent, "prepare"):
        state, batch = case.agent.prepare(state, batch)
    return case.agent.update(state, batch)[0]


def pretrained(algo, cfg, agent, state, data):
    """The state after the first phase of training, where there is one."""
    return algo.make_train(cfg, agent, "pretrain")(state, data)[0] if hasattr(agent, "pretrain") else state


# --- State -----------------------------------------------------------------------------------------------


def test_update_keeps_structure_shapes_and_dtypes(case):
    for update in {case.agent.update, getattr(case.agent, "pretrain", case.agent.update)}:
        new, metrics = jax.eval_shape(update, case.state, case.batch)
        chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(lambda s: s, case.state), new)
        assert metrics and all(m.shape == () for m in metrics.values())
        taken = {"step", "seed", "grid", "score", "returns", "believed_value", "true_value", "diverged"}
        assert not metrics.keys() & taken  # they would hide what a line of metrics.jsonl has by that name


def test_state_holds_arrays_only(case):
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(case.state))
    other = case.algo.make_agent(case.cfg, case.spec)  # a function or optimiser in the treedef would differ
    assert jax.tree.structure(jax.eval_shape(other.init, jax.random.key(0))) == jax.tree.structure(case.state)


def test_training_compiles_once(case):
    chex.clear_trace_counter()
    train = jax.jit(chex.assert_max_traces(case.algo.make_train(case.cfg, case.agent), n=1))
    state = case.state
    for _ in range(3):
        state, _ = jax.eval_shape(train, state, case.data)  # traced as if it ran: what comes out goes in again


# --- Keys and seeds --------------------------------------------------------------------------------------


def test_same_key_same_result_other_key_other_result(case):
    a, b, c = (networks(case.train(case.agent.init(jax.random.key(k)), case.data)[0]) for k in (0, 0, 1))
    chex.assert_trees_all_equal(a, b)
    assert all(differ(a[name], c[name]) for name in a)


def test_every_initial_kernel_depends_on_the_key(case):
    a, c = networks(case.agent.init(jax.random.key(0))), networks(case.agent.init(jax.random.key(1)))
    for name in a:
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(params(a[name])), jax.tree.leaves(params(c[name])), strict=True
        ):
            assert "kernel" not in jax.tree_util.keystr(path) or not np.array_equal(x, y), (name, path)


def test_batches_follow_the_key_of_the_state(case):
    a, b = (case.state._replace(key=jax.random.key(k)) for k in (5, 6))
    assert differ(networks(case.train(a, case.data)[0]), networks(case.train(b, case.data)[0]))


def test_no_key_is_used_twice(case):
    """JAX's own checker; it sees typed keys (`jax.random.key`) only, and needs no compilation."""
    agent = case.algo.make_agent(case.cfg, case.spec)
    with jax.debug_key_reuse(True):
        state = jax.eval_shape(agent.init, jax.random.key(0))
        jax.eval_shape(case.algo.make_train(case.cfg, agent), state, case.data)
        jax.eval_shape(lambda state: pretrained(case.algo, case.cfg, agent, state, case.data), state)
        jax.eval_shape(agent.act, state, case.obs, jax.random.key(0))


def traced_floats(case):
    """The float fields that a sweep may vmap: those that `load_data` does not read while it makes the arrays."""
    tree = ast.parse(inspect.getsource(case.algo.load_data))
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "cfg"}
    read |= ONLINE | STATIC.get(name_of(case.algo), set()) | (GAUSSIAN if case.spec.discrete else set())
    read |= OF_BELIEFS.get(name_of(case.algo), set()) | ASKS_FOR.get(name_of(case.algo), set())
    extracts_by_weights = getattr(case.cfg, "extraction", "awr") == "awr"
    read |= set() if extracts_by_weights else {"max_weight"}
    read |= {"alpha"} if getattr(case.cfg, "policy", "") == "best-of-n" else set()
    fields = {f.name: getattr(case.cfg, f.name) for f in dataclasses.fields(case.cfg)}
    return {name: x for name, x in fields.items() if isinstance(x, float) and name not in read}


@pytest.fixture(scope="module")
def rows(case):
    """Runs in one program, and what each of them changes: nothing, each float in turn, and, in the last, the seed."""
    base = traced_floats(case)
    changed = ["nothing", *base, "seed"]
    values = {name: np.full(len(changed), x, np.float32) for name, x in base.items()}
    for row, name in enumerate(base, start=1):
        # a clip and a filter must bind on values hardly trained yet
        values[name][row] *= {"max_weight": 0.001, "threshold": 3.0}.get(name, 0.1)
    seeds = np.zeros(len(changed), np.int32)
    seeds[-1] = 1

    def one(floats, seed):
        cfg = dataclasses.replace(needed(case), **floats)
        agent = case.algo.make_agent(cfg, case.spec)
        state = lifted(name_of(case.algo), agent.init(jax.random.key(seed)))
        state = pretrained(case.algo, cfg, agent, state, large(case))
        return networks(case.algo.make_train(cfg, agent)(state, large(case))[0])

    results = jax.device_get(jax.jit(jax.vmap(one))(values, seeds))
    return {name: jax.tree.map(lambda x, row=row: x[row], results) for row, name in enumerate(changed)}


def large(case):
    """Data with rewards, and values, of a size at which clips such as max_weight bind."""
    return case.data._replace(reward=20 * case.data.reward)


def needed(case):
    """The configuration in which every float of its does something."""
    return dataclasses.replace(case.cfg, **NEEDS.get(case.algo.__name__.removeprefix("algos."), {}))


def test_every_float_of_the_config_vmaps_and_matters(case, rows):
    for name in rows.keys() - {"nothing", "seed"}:
        assert differ(rows["nothing"], rows[name]), f"{name} changes nothing"


def test_vmapped_seeds_match_a_loop(case, rows):
    """The seed's run among others is that run alone: a number that one row took from another would show in it."""
    if needed(case) != case.cfg:
        agent = jitted(case.algo.make_agent(needed(case), case.spec))
        case = case._replace(agent=agent, train=jax.jit(case.algo.make_train(needed(case), agent)))
    state, _ = case.pretrain(lifted(name_of(case.algo), case.agent.init(jax.random.key(1))), large(case))
    alone = networks(case.train(state, large(case))[0])
    chex.assert_trees_all_close(rows["seed"], alone, rtol=2e-3, atol=2e-5)


# --- Losses, targets, networks ---------------------------------------------------------------------------


def test_what_follows_a_terminal_is_never_read(case):
    if changes := PROPOSES.get(case.algo.__name__.removeprefix("algos.")):
        agent = case.algo.make_agent(dataclasses.replace(case.cfg, **changes), case.spec)
        case = case._replace(agent=agent._replace(update=jax.jit(agent.update)))
    batch = mark(case, 1.0)
    if batch is None:
        pytest.skip("learns no values of what follows")
    garbage = batch._replace(next_obs=1e3 + batch.next_obs)
    if batch.__class__ is Transition and batch.next_action is not None:
        garbage = garbage._replace(next_action=jnp.zeros_like(batch.next_action))
    a, b = (updated(case, case.state, x) for x in (batch, garbage))
    chex.assert_trees_all_equal(*map(networks_of_values if hasattr(batch, "mask") else networks, (a, b)))


def networks_of_values(state):
    """But for policies: these compare a state with the next one whether or not the value's goal was reached."""
    return {name: x for name, x in networks(state).items() if "actor" not in name}


def mark(case, terminal):
    """The batch whose rows all are, or are not, the last of their task: a reached goal is an end. None: it has none."""
    batch = case.batch
    if hasattr(batch, "mask"):
        return batch._replace(mask=jnp.full(B, 1 - terminal))
    return batch._replace(terminal=jnp.full(B, terminal)) if hasattr(batch, "terminal") else None


def test_what_follows_a_time_out_is_read(case):
    if not any(name.startswith(("critic", "value")) for name in case.state._fields):
        pytest.skip("learns no values")
    if getattr(case.cfg, "td", True) is False:
        pytest.skip("its values are of whole returns")
    batch = mark(case, 0.0)
    if batch is None:
        pytest.skip("its values are of goals that came later")
    a, b = (updated(case, case.state, x) for x in (batch, batch._replace(next_obs=1 + batch.next_obs)))
    assert differ(networks(a), networks(b))


def test_loss_of_a_batch_is_the_mean_over_its_rows(case, monkeypatch):
    """Each transition has its own weight and target: an accidental (B, B) broadcast breaks this."""
    # Nothing moves within the update, and no noise is drawn: a row's loss depends on that row alone
    for draw in ("normal", "uniform"):
        monkeypatch.setattr(jax.random, draw, lambda key, shape=(), *args, **kwargs: jnp.zeros(shape))
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, *args, **kwargs: jnp.full(shape, low))
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits, axis=-1, **kwargs: logits.argmax(axis=axis))
    still = {f.name: 0.0 for f in dataclasses.fields(case.cfg) if f.name.endswith("learning_rate")}
    still |= ALL_REAL.get(case.algo.__name__.removeprefix("algos."), {})
    update = jax.jit(case.algo.make_agent(dataclasses.replace(case.cfg, **still), case.spec).update)

    def losses(batch):
        metrics = update(case.state, batch)[1]
        return {name: x for name, x in metrics.items() if name.endswith("_loss")}

    whole = losses(case.batch)
    batch = jax.device_get(case.batch)  # NumPy repeats a row without a compilation
    rows = [losses(jax.tree.map(lambda x, i=i: np.stack([x[i]] * B), batch)) for i in range(B)]
    for name in whole:
        relative = (
            name == "actor_loss"
            and name_of(case.algo) in RELATIVE | STEPS
            and not getattr(case.cfg, "extraction", 0) == "awr"
        )
        if not relative and not (name_of(case.algo) in NEGATIVES and name != "actor_loss"):
            np.testing.assert_allclose(whole[name], np.mean([r[name] for r in rows]), rtol=1e-4, err_msg=name)


def test_targets_start_equal_and_move_by_tau(case):
    part = SHARES.get(name_of(case.algo))

    def online_of(state, name):
        online = params(getattr(state, name.removeprefix("target_")))
        return online[part] if part else online

    for name in (n for n in case.state._fields if n.startswith("target_")):
        chex.assert_trees_all_equal(getattr(case.state, name), online_of(case.state, name))
    before = updated(case, case.state, case.batch)  # now online and target differ
    after = updated(case, before, case.batch)
    for name in (n for n in case.state._fields if n.startswith("target_")):
        online, old = online_of(after, name), getattr(before, name)
        average = name == "target_actor" and name_of(case.algo) in ACTS_BY_AVERAGE
        tau = case.cfg.actor_tau if average else case.cfg.tau
        expect = jax.tree.map(lambda o, t, tau=tau: tau * o + (1 - tau) * t, online, old)
        chex.assert_trees_all_close(getattr(after, name), expect, rtol=1e-5, atol=1e-7)
        assert differ(getattr(after, name), old)


def test_a_delayed_network_moves_in_its_turn_alone(case):
    """Of the updates that take turns, the last is the whole one; the others move the critic, and no target."""
    if not hasattr(case.agent, "cycle"):
        pytest.skip("every update is a whole one")
    *partial, whole = case.agent.cycle
    assert len(partial) == case.cfg.policy_delay - 1 == 1
    assert whole.__wrapped__ is case.agent.update.__wrapped__  # each jitted by itself
    state, info = partial[0](case.state, case.batch)
    moved = {name for name, x in networks(state).items() if differ(x, networks(case.state)[name])}
    targets = {"target_critic"} if case.algo.__name__.removeprefix("algos.") in MOVES_TARGETS else set()
    assert moved == {"critic"} | targets and set(info) < set(whole(case.state, case.batch)[1])
    # The critic is the same after its own update and after a whole one
    chex.assert_trees_all_equal(state.critic, whole(case.state, case.batch)[0].critic)
    three = case.algo.make_agent(dataclasses.replace(case.cfg, policy_delay=3), case.spec)
    assert len(three.cycle) == 3 and three.cycle[0] is three.cycle[1] is not three.update


def test_every_network_learns(case):
    before, _ = case.pretrain(case.state, case.data)
    after = updated(case, before, case.batch)
    for name, before in networks(case.state).items():
        for (path, x), y in zip(
            jax.tree_util.tree_leaves_with_path(params(before)),
            jax.tree.leaves(params(getattr(after, name))),
            strict=True,
        ):
            assert not np.array_equal(x, y), (name, path)


# --- Acting ----------------------------------------------------------------------------------------------


def test_act_is_in_bounds_and_deterministic_where_the_paper_is(case):
    far = case.obs if case.spec.obs_shape else 1e3 * case.obs
    a, b = (case.agent.act(case.state, far, jax.random.key(k)) for k in (0, 1))
    assert case.algo.__name__.removeprefix("algos.") in ACTS_ON_SAMPLES or np.array_equal(a, b)
    chex.assert_equal_shape([a, case.data.action])
    if case.spec.discrete:
        assert a.dtype == jnp.int32 and a.min() >= 0 and a.max() < case.spec.action_dim
    else:
        assert np.all(np.abs(a) <= 1)


def test_act_takes_any_number_of_leading_axes(case):
    obs = case.obs.reshape(4, N // 4, *case.obs.shape[1:])
    flat = case.agent.act(case.state, case.obs, jax.random.key(0))
    deep = case.agent.act(case.state, obs, jax.random.key(0))
    chex.assert_equal_shape([deep.reshape(flat.shape), flat])
    if case.algo.__name__.removeprefix("algos.") not in ACTS_ON_SAMPLES:
        np.testing.assert_allclose(deep.reshape(flat.shape), flat, rtol=1e-5, atol=1e-6)


def test_what_it_believes_is_a_number_for_each_state_and_depends_on_the_action(case):
    if not hasattr(case.agent, "q"):
        learns_q = "critic" in case.state._fields and name_of(case.algo) not in LOG_RATIO | CHUNKS
        assert not learns_q, "it learns a Q-function: the Agent needs a q"
        pytest.skip("learns no Q-function")
    q = case.agent.q(case.state, case.obs, case.data.action)
    assert q.shape == (N,) and differ(q, case.agent.q(case.state, case.obs, case.data.next_action))


def test_what_it_believes_is_the_smaller_of_its_critics(case):
    """One critic's last bias raised far above the other changes nothing, lowered it carries the value down with it."""
    critics = getattr(case.state, "critic", None)
    leaves = [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params(critics))]
    last, bias = [(path, x) for path, x in leaves if path.endswith("['linear']['bias']")][-1] if leaves else ("", None)
    if not hasattr(case.agent, "q") or bias is None or bias.ndim == 1 or len(bias) == 1:
        pytest.skip("learns no Q-function, or a single one")

    def shifted(by):
        """The state whose critics but the first say `by` more than they did."""

        def move(path, x):
            return x.at[1:].add(by) if jax.tree_util.keystr(path) == last else x

        tree = jax.tree_util.tree_map_with_path(move, params(critics))
        return case.state._replace(critic=critics._replace(params=tree))

    at = case.obs, case.data.action
    low, high, far = (case.agent.q(shifted(by), *at) for by in (-1e3, 1e3, 2e3))
    smaller = case.cfg.min_weight if case.algo.__name__.removeprefix("algos.") in MIXES else 1.0
    smaller = 0.5 if name_of(case.algo) in MEANS else smaller
    if case.algo.__name__.endswith("qt_opt"):  # a sigmoid: its values have bounds
        assert np.all(low < 0.01 * high)
        np.testing.assert_allclose(high, far, rtol=1e-5)
    else:
        unit = SUCCESS.get(name_of(case.algo), lambda cfg: 1.0)(case.cfg)
        assert np.all(low < -500 * smaller * unit)
        np.testing.assert_allclose((far - high) / 1e3, 1 - smaller, atol=1e-3)


def test_the_policy_is_what_acts(case):
    """Where the policy has a density: act is its mode, and a draw of it with act="sample"."""
    if getattr(case.agent, "policy", None) is None:
        assert not hasattr(case.cfg, "act"), "without a density there is nothing to choose"
        pytest.skip("the policy has no density")
    obs, key = case.obs, jax.random.key(0)
    pi = case.agent.policy(case.state, obs)
    np.testing.assert_allclose(case.agent.act(case.state, obs, key), pi.mode(), rtol=1e-5, atol=1e-6)
    sampling = case.algo.make_agent(dataclasses.replace(case.cfg, act="sample"), case.spec)
    a, b, c = (jax.jit(sampling.act)(case.state, obs, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert differ(a, c) and np.abs(a - pi.mode()).max() > 0.1
    assert pi.log_prob(case.data.action).shape == (N,)


def test_it_acts_and_believes_by_the_networks_it_trains(case):
    """Not by their slow copies and, where there is a policy, by that and not by the clone that it is held to."""
    name, rng = case.algo.__name__.removeprefix("algos."), np.random.default_rng(0)

    def depends(function, network, *args):
        old = getattr(case.state, network)
        new = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params(old))
        new = old._replace(params=new) if hasattr(old, "params") else new
        return differ(function(case.state, *args), function(case.state._replace(**{network: new}), *args))

    trained = networks(case.state).keys()
    targets = {network for network in trained if network.startswith("target_")}
    copies = targets | (trained & {"behaviour", "prior"} if "actor" in trained else set())
    for network in copies if name not in ACTS_BY_TARGETS else ():
        assert not depends(case.agent.act, network, case.obs, jax.random.key(0)), network
    for network in (x for x in trained if x in ("actor", "high_actor")):
        network = "target_actor" if name in ACTS_BY_AVERAGE else network
        assert depends(case.agent.act, network, case.obs, jax.random.key(0)), network
    for network in targets if hasattr(case.agent, "q") else ():
        assert not depends(case.agent.q, network, case.obs, case.data.action), network


def test_actions_it_cannot_take_are_refused_in_one_sentence(algo):
    """By make_agent, before any compilation; a file that takes neither kind would be in no test."""
    refused = [spec for spec in (CONTINUOUS, DISCRETE) if not takes(algo, spec)]
    assert len(refused) < 2
    for spec in (of(algo, spec) for spec in refused):
        with pytest.raises(SystemExit, match=f"{'continuous' if spec.discrete else 'discrete'} actions") as error:
            algo.make_agent(config(algo), spec)
        assert isinstance(error.value.code, str) and "\n" not in error.value.code


# --- The training loop -----------------------------------------------------------------------------------


def seams(name):
    return frozenset(load(name).Agent._fields) & {"draw", "prepare", "cycle", "pretrain"}


# The training text is the same in every file: one file for each set of seams runs it
FIRST_WITH = {seams(name): name for name in reversed(ALGOS)}


@pytest.mark.parametrize("name", sorted(FIRST_WITH.values()))
def test_how_often_we_look_does_not_change_training(name):
    algo, cfg = load(name), config(load(name))
    agent = algo.make_agent(cfg, spec := of(algo, CONTINUOUS if takes(algo, CONTINUOUS) else DISCRETE))
    data, state = random_data(spec, jax.random.key(7)), jax.jit(agent.init)(jax.random.key(0))
    for phase in ("pretrain", "update") if hasattr(agent, "pretrain") else ("update",):
        train = jax.jit(algo.make_train(cfg, agent, phase))
        once = algo.make_train(dataclasses.replace(cfg, log_interval=20, eval_interval=20), agent, phase)
        once, _ = jax.jit(once)(state, data)
        state, _ = train(train(state, data)[0], data)
        chex.assert_trees_all_equal(networks(once), networks(state))


@pytest.mark.parametrize("name", ALGOS)
def test_the_algorithm_does_not_know_how_often_we_look(name):
    """What is above the training text, `check` apart, reads neither interval: so the test above speaks for it."""
    own = source(name).partition("# --- Training: the same in every file")[0]
    functions = [n for n in ast.parse(own).body if isinstance(n, ast.FunctionDef) and n.name != "check"]
    for function in functions:
        names = {n.attr for n in ast.walk(function) if isinstance(n, ast.Attribute)}
        assert not names & {"log_interval", "eval_interval"}, function.name


def test_batches_are_aligned_and_cover_the_data(algo):
    """The training loop alone, with an agent that only counts what it is shown."""
    if name_of(algo) in STEPS:
        pytest.skip("its batches are of windows: tests/test_dt.py")
    ids = jnp.arange(N, dtype=jnp.float32)
    data = Transition(ids[:, None], ids[:, None] + 100, ids + 200, ids[:, None] + 300, ids + 400)
    if name_of(algo) in GOALS | WINDOWS:  # these rows are not read, as another test asks, and not handed on
        data = data._replace(end=jnp.arange(N) // 8 * 8 + 7)

    class Seen(NamedTuple):
        key: Any
        count: Any

    def update(state, b):
        columns = [b.action[:, 0] - 100]
        columns += [b.next_obs[:, 0] - 300] if hasattr(b, "next_obs") else []
        columns += [b.reward - 200, b.terminal - 400] if name_of(algo) not in GOALS else []
        aligned = jnp.all(jnp.stack(columns) == b.obs[:, 0][None])
        return Seen(state.key, state.count.at[b.obs[:, 0].astype(int)].add(1)), {"aligned": aligned.astype(jnp.float32)}

    one = {"horizon": 1} if name_of(algo) in WINDOWS else {}  # windows that are rows
    cfg = config(algo, log_interval=200, eval_interval=200, num_updates=200, **one)
    train = jax.jit(algo.make_train(cfg, types.SimpleNamespace(update=update)))
    state, metrics = train(Seen(jax.random.key(0), jnp.zeros(N)), data)
    assert metrics["aligned"] == 1 and state.count.sum() == 200 * B
    assert state.count.min() > 0.5 * 200 * B / N and state.count.max() < 1.5 * 200 * B / N


def test_the_dataset_is_an_argument_of_the_compiled_program(case):
    """Closed over, a million transitions would be constants of the program and seconds of compilation."""
    big = jax.tree.map(lambda x: np.concatenate([x] * 64), jax.device_get(case.data))
    text = [case.train.lower(case.state, data).as_text() for data in (case.data, big)]
    assert len(text[1]) < 1.1 * len(text[0])


@pytest.mark.parametrize("name", ALGOS)
def test_every_option_of_the_data_reaches_them(name, monkeypatch):
    """Each field of Config that names an option of load_dataset is handed on, and the discount of whole returns is."""
    if name in EVALUATORS:
        pytest.skip(f"its data are of its policy's folder, in tests/test_{name}.py")
    algo, calls = load(name), []

    def record(dataset_id, **options):
        calls.append({"dataset_id": dataset_id, **options})
        n = np.zeros(8, np.float32)
        columns = dict(episode=np.arange(8), return_to_go=n + np.arange(1, 9), timestep=np.zeros(8, int))
        columns |= dict(end=np.full(8, 7))  # long enough for every window
        return Transition(n[:, None], n[:, None], n, n[:, None], n, **columns), None

    monkeypatch.setattr(algo, "load_dataset", record)
    fields = {f.name for f in dataclasses.fields(algo.Config)}
    changes = {"dataset": "my/data-v0", "normalize_obs": None, "normalize_reward": None, "reward_shift": 0.5}
    for field, value in changes.items():
        if field in fields:
            value = not getattr(algo.Config(), field) if value is None else value
            algo.load_data(dataclasses.replace(algo.Config(), **{field: value}))
            assert calls[-1]["dataset_id" if field == "dataset" else field] == value, field
    algo.load_data(dataclasses.replace(algo.Config(), **({"discount": 0.5} if "discount" in fields else {})))
    if "return_to_go" in calls[-1].get("columns", ()) and name not in RELABELS:
        assert calls[-1].get("discount", 1.0) == (0.5 if "discount" in fields else 1.0)


@pytest.mark.parametrize("name", ALGOS)
def test_the_data_that_a_file_makes_are_aligned_as_those_that_it_loads(name, monkeypatch):
    """All CPU devices share such arrays. Others begin there by chance, one in a few."""
    if name in EVALUATORS:
        pytest.skip("its data are of its policy's folder, in its own tests")
    algo = load(name)
    ends = {"start": np.zeros(N, int), "end": np.full(N, N - 1)}
    data = jax.device_get(random_data(CONTINUOUS, jax.random.key(0)))._replace(**ends)
    data = jax.tree.map(aligned, data._replace(reward=np.abs(data.reward), return_to_go=np.abs(data.return_to_go)))
    monkeypatch.setattr(algo, "load_dataset", lambda *_, **__: (data, None))
    part = {"top_fraction": 0.5} if "top_fraction" in algo.Config.__dataclass_fields__ else {}
    arrays = [jax.tree.leaves(algo.load_data(dataclasses.replace(algo.Config(), **part))[0]) for _ in range(9)]
    assert not {x.ctypes.data % 64 for x in itertools.chain(*arrays)} - {0}


# --- Goals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(GOALS))
def test_rewards_and_ends_of_the_data_are_not_read(name):
    """Where a file learns to reach goals: its data may have none. (Instead of what follows a terminal of the data.)"""
    algo = load(name)
    cfg, data = config(algo), random_data(of(algo, CONTINUOUS), jax.random.key(7))
    nothing = data._replace(reward=jnp.full(N, jnp.nan), terminal=jnp.full(N, jnp.nan), next_action=None)
    a, b = (algo.draw(jax.random.key(1), x, None, cfg) for x in (data, nothing._replace(episode=None)))
    chex.assert_trees_all_equal(a, b)
    chex.assert_tree_all_finite(b)


@pytest.mark.parametrize("name", sorted(GOALS))
def test_goals_are_what_rows_have_achieved_and_cross_no_episode(name):
    """Goals that lie ahead are of the row's episode, random ones of any; each is what its row has achieved."""
    algo = load(name)
    data = random_data(of(algo, CONTINUOUS), jax.random.key(7))
    data = data._replace(obs=jnp.arange(N, dtype=jnp.float32)[:, None] + jnp.zeros((1, 3)))
    if name != "qrl":  # whose goals are whole observations
        data = data._replace(achieved=data.obs[:, :1] + 0.5)

    def goals(p):
        shares = {f.name: p for f in dataclasses.fields(algo.Config) if f.name.endswith("p_future")}
        shares |= {"p_current": 0.0} if "p_current" in {f.name for f in dataclasses.fields(algo.Config)} else {}
        batch = algo.draw(jax.random.key(1), data, None, config(algo, batch_size=512, **shares))
        found = [x for field, x in batch._asdict().items() if field.endswith("goal")]
        index = batch.obs[:, 0]
        if not found:  # behind the observation
            found = [batch.obs[:, 3:]]
        offset = 0.0 if name == "qrl" else 0.5
        return index, {x.shape[-1] for x in found}, [x[:, 0] - offset for x in found]

    index, widths, ahead = goals(1.0)
    assert widths == {3 if name == "qrl" else 1}
    drawn = ahead[:1] if name in ("qrl",) else ahead  # the other goal of qrl is random always
    last = index % 8 == 7
    for goal in drawn:
        if name in ("gc_td3_bc", "actionable_models"):  # in the last row there is none ahead, and any will do
            assert np.all((goal > index) | last) and np.all((goal // 8 == index // 8) | last)
        else:
            assert np.all((goal > index) | (last & (goal == index))) and np.all(goal // 8 == index // 8)
    index, _, anywhere = goals(0.0)
    goal = anywhere[1] if name == "hiql" else anywhere[0]  # its first lies some steps ahead always
    assert np.mean(goal // 8 == index // 8) < 0.25 and len(np.unique(goal)) > 50


# --- The files -------------------------------------------------------------------------------------------


def test_import_has_no_side_effects():
    code = f"""
import importlib, os, sys
import chex, flax.linen, jax, optax, tyro  # jax sets a variable of its own
from jax._src import xla_bridge
sys.argv = ["x", "--bogus"]
before = dict(os.environ)
for name in {ALGOS}:
    importlib.import_module("algos." + name)
    assert dict(os.environ) == before, name
    assert "minari" not in sys.modules and "gymnasium" not in sys.modules, name
    assert not xla_bridge._backends, name + " started a device backend"
"""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}  # ours may be spoilt already
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


def source(name):
    return (ROOT / "algos" / f"{name}.py").read_text()


def shared_texts(text):
    """(training, online) of a file: the second is empty where a method does not learn on-line."""
    text = text[text.index("# --- Training: the same in every file") : text.index('\n\nif __name__ == "__main__":')]
    training, _, online = text.partition("\n\n# --- Online: the same in every file that has it")
    return training, online


@pytest.mark.parametrize("name", ALGOS)
def test_shared_blocks_are_identical(name):
    """Training, main and the Experiment fields are the same text in every file, comments included."""

    def blocks(text):
        training, _ = shared_texts(text)
        experiment = text[text.index("    # Experiment\n") : text.index("    # Optimisation\n")]
        experiment = re.sub('dataset: str = "[^"]*"', "", experiment)  # some take discrete actions only
        nodes = {n.name: ast.get_source_segment(text, n) for n in ast.parse(text).body if hasattr(n, "name")}
        seams = "policy|q|pretrain|(online_)?cycle|(pretrain_)?(draw|prepare)|act_with_memory|explore|label"
        own = re.compile(rf" +({seams}):")
        agent = [line.split("  #")[0] for line in nodes["Agent"].splitlines() if not own.match(line)]
        return training, experiment, nodes["check"], nodes["Trainable"], nodes["descend"], agent

    assert blocks(source(name)) == blocks(source("iql"))


@pytest.mark.parametrize("name", ALGOS)
def test_a_file_that_learns_on_line_has_all_of_the_second_shared_text(name):
    """And a file without `online_steps` has none of it, nor the class that main would ask for."""
    _, online = shared_texts(source(name))
    assert online == (shared_texts(source("iql"))[1] if hasattr(load(name).Config, "online_steps") else "")
    assert hasattr(load(name), "Online") == hasattr(load(name), "draw_online") == bool(online)


def test_the_shared_texts_stay_short():
    """A reader of each of these files passes them: main is a screen, and so is every function."""
    training, online = shared_texts(source("iql"))
    assert len(training.splitlines()) <= 210 and 1 < len(online.splitlines()) <= 100
    for node in ast.walk(ast.parse(training + online.partition("\n")[2])):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("name", ALGOS)
def test_imports_no_sibling(name):
    modules = [n.module for n in ast.walk(ast.parse(source(name))) if isinstance(n, ast.ImportFrom)]
    assert not [m for m in modules if m and m.startswith("algos")]
    rooms = {f"common.{room}" for room in ROOMS if room != "stepper" or shared_texts(source(name))[1]}
    assert {m for m in modules if m and m.startswith("common")} == rooms


@pytest.mark.parametrize("name", ALGOS)
def test_docstring_says_where_it_comes_from(name):
    doc = ast.get_docstring(ast.parse(source(name)))
    for heading in (
        "Paper",
        "Reference",
        "From equation to code",
        "Order of one update",
        "Hyper-parameters",
        "Deviations",
        "Run",
    ):
        assert f"\n{heading}" in doc, heading
    assert len(doc.splitlines()) <= 28


@pytest.mark.parametrize("name", ALGOS)
def test_every_config_field_has_a_comment_that_becomes_help(name):
    lines = source(name).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class Config"))
    for line in lines[start + 1 :]:
        if line and not line.startswith(" "):
            break
        if ":" in line.split("#")[0]:
            assert "  # " in line, line


def test_page_names_every_config_field_and_metric(case):
    page = (ROOT / "algos" / f"{case.algo.__name__.split('.')[1]}.md").read_text()
    names = [f.name for f in dataclasses.fields(case.cfg)]
    for update in {case.agent.update, getattr(case.agent, "pretrain", case.agent.update)}:
        names += list(jax.eval_shape(update, case.state, case.batch)[1])
    names += ["diverged", *(("believed_value", "true_value") if hasattr(case.agent, "q") else ())]  # main logs them
    assert not [n for n in names if f"`{n}`" not in page]


@pytest.mark.parametrize("name", ALGOS)
def test_defaults_are_those_of_the_page(name):
    """The page's table has each default beside the reference's value: a default that moves must move there too."""
    config = load(name).Config()
    page = (ROOT / "algos" / f"{name}.md").read_text()
    table = re.search(r"^\| field \| default \|(.*?)\n\n", page, re.M | re.S).group(1)
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|", table, re.M)
    written = {}
    for fields, defaults in rows:
        fields = re.findall(r"`(\w+)`", fields)
        defaults = re.split(r", (?![^(]*\))", defaults)
        if set(fields) <= {f.name for f in dataclasses.fields(config)}:
            assert len(fields) == len(defaults) or len(defaults) == 1, (fields, defaults)
            written |= dict(zip(fields, defaults * (len(fields) if len(defaults) == 1 else 1), strict=True))
    for field, text in written.items():
        text = text.strip("` ").replace("−", "-").replace("–", "-")
        text = {"no": "False", "yes": "True", "none": "None", "not set": "None", "empty": ""}.get(text, text)
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
        default = getattr(config, field)
        assert str(default) == text or float(default) == float(text), (field, text)
    experiment = source(name)[source(name).index("    # Experiment\n") : source(name).index("    # Optimisation\n")]
    own = {f.name for f in dataclasses.fields(config) if f"    {f.name}: " not in experiment} - {"act"}
    assert own <= written.keys(), own - written.keys()


def test_common_holds_data_and_networks_only():
    files = {p.relative_to(ROOT / "common").as_posix() for p in (ROOT / "common").rglob("*.py")}
    assert {f for f in files if not f.startswith("recipes/")} == {
        "__init__.py",
        "layouts.py",
        *(f"{room}.py" for room in ROOMS),
    }


@pytest.mark.parametrize("name", ALGOS)
def test_help_shows_every_field_and_a_misspelt_option_is_an_error(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = load(name).Config
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(config, args=["--help"])
    shown = capsys.readouterr().out
    for field in dataclasses.fields(config):
        assert "--" + field.name.replace("_", "-").strip("-") in shown, field.name
    with pytest.raises(SystemExit) as error:
        tyro.cli(config, args=["--lerning-rate", "1"])
    assert error.value.code not in (None, 0) and "lerning" in "".join(capsys.readouterr())


@pytest.mark.parametrize("name", ALGOS)
def test_the_defaults_and_the_command_of_the_docstring_pass_its_own_check(name):
    """No other test trains with a file's defaults: counts that do not divide each other would be found by users."""
    algo = load(name)
    algo.check(algo.Config(), {})
    (named, options), *_ = re.findall(r"python algos/(\w+)\.py(.*)", ast.get_docstring(ast.parse(source(name))), re.S)
    assert named == name or name not in project_algos()  # a fork may still have the words of its original
    algo.check(tyro.cli(algo.Config, args=options.split()), {})


@pytest.mark.parametrize("name", ALGOS)
def test_a_file_is_a_script(name):
    last = ast.unparse(ast.parse(source(name)).body[-1])
    assert last == "if __name__ == '__main__':\n    main(tyro.cli(Config, description=__doc__.partition('\\n\\n')[0]))"


def test_config_is_json():
    for name in ALGOS:
        json.dumps(dataclasses.asdict(load(name).Config()))
