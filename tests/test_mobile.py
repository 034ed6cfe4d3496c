"""MOBILE against numbers worked out by hand. What it shares with MBPO is tested there; here, that it is shared."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_mbpo
from test_mbpo import KEY, KNOWN, rows

from algos import mbpo, mobile

FIVE = dataclasses.replace(test_mbpo.LINEAR, num_members=5, num_elites=5)
LINEAR = mobile.Config(**dataclasses.asdict(FIVE), num_samples=3)


def as_ours(state):
    """MBPO's state, as MOBILE's."""
    ours = {name: mobile.Trainable(*x) if hasattr(x, "params") else x for name, x in state._asdict().items()}
    return mobile.State(**ours | {"buffer": mobile.Buffer(*state.buffer)})


def split_state(steps=range(5), noise=-1e3, slopes=(1.0, 1.0), low=test_mbpo.QUIET):
    """From s, member i leads to s + steps[i]; critic j of the targets is slopes[j] s', and the critics are 0."""
    bias = np.array([[step, 0.0, noise, noise] for step in steps])
    config = dataclasses.replace(FIVE, num_members=len(bias), num_elites=len(bias))
    state = as_ours(test_mbpo.linear_state(config, bias=bias, low=low))
    kernel = jnp.zeros((2, 2, 1)).at[:, 0, 0].set(jnp.array(slopes))
    target = jax.tree_util.tree_map_with_path(
        lambda path, x: kernel if path[-1].key == "kernel" else x, state.target_critic
    )
    return state._replace(target_critic=target)


def update(cfg, state, batch):
    return jax.jit(mobile.make_agent(cfg, KNOWN).update)(state, batch)[1]


def test_inconsistency_is_the_deviation_over_elites_of_means_over_samples():
    # 0, 1, 2, 3, 4: sqrt(10 / 4), not sqrt(10 / 5). The means of the samples differ as little as the members do
    five = jnp.arange(5.0)[:, None, None]
    np.testing.assert_allclose(mobile.inconsistency(five), [1.581139], rtol=1e-6)
    samples = five + jnp.array([-7.0, 0.0, 7.0])[None, :, None] + jnp.zeros((5, 3, 2))
    np.testing.assert_allclose(mobile.inconsistency(samples), [1.581139] * 2, rtol=1e-6)


def test_the_target_of_an_imagined_row():
    # y = r - beta U + gamma (1 - d) min Q', of target critics s' and 2 s'. The members lead from s = 0 to 0, 1, 2, 3
    # and 4, whose smaller values are these: U = 1.581139. The row leads to 10. With r = 1 and beta = 0.5, y = 0.209431
    # where it ends the episode, and else 0.9 * 10 more
    cfg = dataclasses.replace(LINEAR, penalty=0.5, discount=0.9, real_ratio=0.0)
    for terminal, target in ((1.0, 0.209431), (0.0, 9.209431)):
        info = update(
            cfg, split_state(slopes=(1.0, 2.0)), rows(np.zeros(8), reward=1.0, next_obs=10.0, terminal=terminal)
        )
        np.testing.assert_allclose(info["inconsistency"], 1.581139, rtol=1e-5)
        np.testing.assert_allclose(info["critic_loss"], 2 * target**2, rtol=1e-4)  # Q = 0, summed over the critics


def test_the_target_is_cut_at_0_where_it_is_asked_for():
    # y = -1 - 0.5 U < 0
    for clip, target in ((False, -1 - 0.790569), (True, 0.0)):
        cfg = dataclasses.replace(LINEAR, penalty=0.5, real_ratio=0.0, clip_target=clip)
        info = update(cfg, split_state(), rows(np.zeros(8), reward=-1.0, terminal=1.0))
        np.testing.assert_allclose(info["critic_loss"], 2 * target**2, rtol=1e-4)


def test_rows_of_the_data_are_not_doubted():
    # 2 of 8 rows are real: y = 1 there, and 1 - 0.5 * 1.581139 in the others; the mean of U is of these alone
    cfg = dataclasses.replace(LINEAR, penalty=0.5, real_ratio=0.25)
    info = update(cfg, split_state(), rows(np.zeros(8), reward=1.0, terminal=1.0))
    np.testing.assert_allclose(info["critic_loss"], 2 * (2 + 6 * 0.209431**2) / 8, rtol=1e-4)
    np.testing.assert_allclose(info["inconsistency"], 1.581139, rtol=1e-5)
    cfg = dataclasses.replace(cfg, real_ratio=1.0)
    assert update(cfg, split_state(), rows(np.zeros(8), reward=1.0, terminal=1.0))["inconsistency"] == 0


def test_what_the_members_disagree_on_does_not_count_where_it_is_worth_the_same():
    # A value that is the same everywhere. Equal members without noise
    for state in (split_state(slopes=(0.0, 0.0)), split_state(steps=[3.0] * 5)):
        assert update(LINEAR, state, rows(np.zeros(8)))["inconsistency"] == 0


def test_next_values_are_of_the_policys_actions_there():
    # Q' = a and pi = tanh(s), without noise. The members lead to 0, 1, 2, 3 and 4; the row's own action is 0
    state = split_state(slopes=(0.0, 0.0))
    slope = lambda at: lambda path, x: x.at[at].set(1.0) if path[-1].key == "kernel" else x  # noqa: E731
    actor = jax.tree_util.tree_map_with_path(slope((0, 0)), state.actor.params)
    target = jax.tree_util.tree_map_with_path(slope((slice(None), 1, 0)), state.target_critic)
    state = state._replace(actor=state.actor._replace(params=actor), target_critic=target)
    cfg = dataclasses.replace(LINEAR, real_ratio=0.0)
    expect = np.tanh(np.arange(5)).std(ddof=1)
    np.testing.assert_allclose(update(cfg, state, rows(np.zeros(8)))["inconsistency"], expect, rtol=1e-4)


def test_the_temperature_has_no_upper_bound():
    state = split_state()
    state = state._replace(log_alpha=state.log_alpha._replace(params=jnp.float32(2.0)))
    np.testing.assert_allclose(update(LINEAR, state, rows(np.zeros(8)))["alpha"], np.exp(2), rtol=1e-5)


def test_only_elites_are_asked():
    cfg = dataclasses.replace(LINEAR, num_elites=2, real_ratio=0.0)
    state = split_state()._replace(error=jnp.array([5.0, 1.0, 4.0, 3.0, 2.0]))  # members 1 and 4: 3 apart
    np.testing.assert_allclose(update(cfg, state, rows(np.zeros(8)))["inconsistency"], 3 / 2**0.5, rtol=1e-5)


def test_next_states_are_drawn():
    # Equal members of deviation 2. The mean of n draws has 2 / sqrt(n), and so has U, about: c4(5) = 0.94 of it
    wide = lambda x: {"params": {**x["params"], "max_log_var": -x["params"]["min_log_var"]}}  # noqa: E731
    state = split_state(steps=[0.0] * 5, noise=2 * np.log(2))
    state = state._replace(snapshot=wide(state.snapshot))
    for samples in (1, 16):
        cfg = dataclasses.replace(LINEAR, num_samples=samples, batch_size=512, real_ratio=0.0)
        value = update(cfg, state, rows(np.zeros(512)))["inconsistency"]
        np.testing.assert_allclose(value, 0.94 * 2 / samples**0.5, rtol=0.08)


def test_stored_rewards_are_as_imagined():
    cfg = dataclasses.replace(LINEAR, penalty=100.0)
    state = jax.jit(lambda state: mobile.make_agent(cfg, KNOWN).prepare(state, rows(np.ones(20)))[0])(split_state())
    np.testing.assert_allclose(state.buffer.rows.reward[: int(state.buffer.size)], 0, atol=1e-6)


def test_with_beta_0_it_is_mbpo_bit_for_bit():
    changes = dict(hidden=(8,), model_hidden=(8,), learning_rate=1e-3)
    own = dict(penalty=0.0, backup_entropy=True, actor_learning_rate=1e-3)
    ours = dataclasses.replace(LINEAR, **changes, **own)
    theirs = mbpo.Config(**{f.name: getattr(ours, f.name) for f in dataclasses.fields(mbpo.Config)})
    rng = np.random.default_rng(0)
    data = rows(*rng.normal(size=(4, 40)), terminal=np.arange(40) % 5 == 0)
    without = jax.jit(mbpo.make_agent(theirs, KNOWN).init)(KEY)
    with_0 = as_ours(without)
    for phase in ("pretrain", "update"):
        with_0, _ = jax.jit(mobile.make_train(ours, mobile.make_agent(ours, KNOWN), phase))(with_0, data)
        without, _ = jax.jit(mbpo.make_train(theirs, mbpo.make_agent(theirs, KNOWN), phase))(without, data)
    for name in set(mbpo.State._fields) - {"key", "report"}:
        chex.assert_trees_all_equal(*(jax.tree.leaves(getattr(state, name)) for state in (with_0, without)))


def test_one_elite_cannot_be_inconsistent():
    with pytest.raises(SystemExit, match="num_elites of at least 2"):
        mobile.make_agent(dataclasses.replace(LINEAR, num_elites=1), KNOWN)
