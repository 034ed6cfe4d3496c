"""Numbers of d3rlpy 2.8.1 that tests/test_parity.py compares our files with: its own losses and its own gradients.

Writes bc.npz, bc_discrete.npz, bc_gaussian.npz, iql.npz, td3_bc.npz, awac.npz, crr.npz, crr_binary.npz, sac.npz,
cql.npz and provenance.json beside this file. It needs an environment of its own: d3rlpy brings torch and an old gym:

    python -m venv /tmp/d3 && . /tmp/d3/bin/activate
    pip install torch==2.13.0 d3rlpy==2.8.1
    python tests/parity/d3rlpy_reference.py

Every loss below is a call into d3rlpy, and every gradient is torch's: no formula is written out here. Keys of an .npz:
    actor/0/kernel            weights, layer 0 first; kernels are (in, out), as in flax
    critic/1/0/bias           layer 0 of critic number 1; likewise target_critic/...; value/... and target_actor/...
    batch/obs                 16 transitions
    batch/noise               standard normal, of the policy's samples (AWAC, CRR, SAC, CQL), the same for each of them
    batch/uniform             the uniform actions of CQL, the same for each of them
    log_alpha                 one number; likewise log_multiplier, and grad/ of both
    loss/critic               one number
    grad/critic/1/0/bias      gradient of the loss of the network it names
    polyak/critic/1/0/bias    the target network after one Polyak step
    after/actor/0/kernel      the network after `num_updates` whole updates of d3rlpy
    start/actor/log_std       takes the place of actor/log_std in those updates

Weights and batches are float32. d3rlpy then computes in float64 and the results are rounded to float32, so that the
bytes do not depend on the order in which a CPU sums.
"""

import contextlib
import json
import pathlib
import platform
import unittest.mock

import d3rlpy
import numpy as np
import torch
from d3rlpy.models import VectorEncoderFactory
from d3rlpy.torch_utility import TorchMiniBatch

SEED = 0
OBS_DIM, ACTION_DIM, NUM_ACTIONS, HIDDEN, BATCH = 3, 2, 4, (8, 8), 16
OUT = pathlib.Path(__file__).parent

# Hyper-parameters, in d3rlpy's names. Mostly not its defaults: a number written into an algorithm must not agree by
# luck.
CONFIG = {
    "bc": {"policy_type": "deterministic"},
    "bc_discrete": {"beta": 0.0},
    "bc_gaussian": {"weight_temp": 0.0},  # of IQL: every weight is exp(0)
    "iql": {"gamma": 0.9, "tau": 0.1, "n_critics": 2, "expectile": 0.8, "weight_temp": 2.0, "max_weight": 10.0},
    "td3_bc": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "alpha": 2.5, "update_actor_interval": 2,
        "target_smoothing_sigma": 0.0, "target_smoothing_clip": 0.5,
    },
    "awac": {"gamma": 0.9, "tau": 0.1, "n_critics": 2, "lam": 0.5, "n_action_samples": 3},
    "crr": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "beta": 0.5, "n_action_samples": 3, "advantage_type": "mean",
        "weight_type": "exp", "max_weight": 10.0, "target_update_type": "soft",
    },
    "crr_binary": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "n_action_samples": 3, "advantage_type": "max",
        "weight_type": "binary", "target_update_type": "soft",
    },
    "sac": {"gamma": 0.9, "tau": 0.1, "n_critics": 2, "initial_temperature": 0.5},
    "cql": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "initial_temperature": 0.5, "initial_alpha": 2.0,
        "conservative_weight": 0.7, "alpha_threshold": 0.0, "n_action_samples": 3, "soft_q_backup": True,
    },
}  # fmt: skip

# The `after/` arrays: whole updates with a large step, where the order of the networks inside an update shows.
# IQL's target critic stands still in them, because d3rlpy's online critic is not ours (departure "IQL, order"), and so
# does its log-std, beyond its bound on both sides, because d3rlpy's Adam works on another parameter ("IQL, log-std").
AFTER = {
    "iql": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.0},
    "td3_bc": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1, "first_grad_step": 1},
    "awac": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
    "crr": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
    "sac": {"num_updates": 1, "learning_rate": 0.01, "tau": 0.1},  # one, as the temperature moves in ours
    "cql": {"num_updates": 1, "learning_rate": 0.01, "tau": 0.1},
}

# ours = factor * d3rlpy's, for losses and gradients alike.
FACTORS = {
    "bc": {"actor": 1.0},
    "bc_discrete": {"actor": 1.0},
    "bc_gaussian": {"actor": 1.0},
    "iql": {"value": 1.0, "actor": 1.0, "critic": 1.0},
    "td3_bc": {"actor": 1.0, "critic": 1.0},
    "awac": {"actor": 1.0, "critic": 1.0},
    "crr": {"actor": 1.0, "critic": 1.0},
    "crr_binary": {"actor": 1.0, "critic": 1.0},
    "sac": {"actor": 1.0, "critic": 1.0},
    "cql": {"actor": 1.0, "critic": 1.0},
}

DEPARTURES = [
    {
        "what": "IQL, order",
        "where": "algos/qlearning/torch/iql_impl.py:90-92, algos/qlearning/torch/ddpg_impl.py:101-106 and 140-146",
        "d3rlpy": "Q and V step together, y = r + gamma V_old(s'); the actor then reads V_new and the old target Q",
        "reference": "ikostrikov/implicit_q_learning learner.py: V, pi, Q, target; y = r + gamma V_new(s')",
        "handled": "losses and gradients at learning rate 0; `after/` holds V and pi only, the target Q held still",
    },
    {
        "what": "IQL, one optimiser",
        "where": "algos/qlearning/iql.py:155-161, algos/qlearning/torch/iql_impl.py:85",
        "d3rlpy": "one Adam on q_loss + v_loss; y and the Q of v_loss carry no gradient, so the two do not mix",
        "reference": "one Adam for each",
        "handled": "nothing to do: Adam is per coordinate",
    },
    {
        "what": "IQL, log-std",
        "where": "models/torch/policies.py:135-139, algos/qlearning/iql.py:119-120",
        "d3rlpy": "log_std = -5 + 7 sigmoid(p), p starts at 0, so the first std is exp(-1.5) = 0.22",
        "reference": "policy.py: log_std = clip(p, -5, 2), p starts at 0, so the first std is 1",
        "handled": "p is chosen for an equal log_std; the gradient is taken at log_std, where clip has slope 1",
    },
    {
        "what": "IQL, constant actor learning rate",
        "where": "algos/qlearning/iql.py:86, optimizers/optimizers.py:124-126",
        "d3rlpy": "no schedule by default",
        "reference": "learner.py: cosine decay to 0 over the run, of the actor only",
        "handled": "not compared",
    },
    {
        "what": "TD3+BC, first actor update",
        "where": "algos/qlearning/torch/td3_impl.py:71, algos/qlearning/base.py:878-879, base.py:230",
        "d3rlpy": "grad_step starts at 0: the actor and the targets move at updates 1, 3, 5, ...",
        "reference": "sfujim/TD3_BC TD3_BC.py: total_it is 1 at the first test, so at updates 2, 4, 6, ...",
        "handled": "this script passes grad_step from 1",
    },
    {
        "what": "TD3+BC, lambda",
        "where": "algos/qlearning/torch/td3_plus_bc_impl.py:58-61",
        "d3rlpy": "mean |Q1(s, pi(s))|; its docstring (td3_plus_bc.py:36) and eq. 5 of the paper have |Q(s, a)|",
        "reference": "TD3_BC.py: |Q1(s, pi(s))|",
        "handled": "nothing to do",
    },
    {
        "what": "TD3+BC, noise",
        "where": "algos/qlearning/torch/td3_impl.py:50-56",
        "d3rlpy": "clip(sigma eps, +-c), then the action clipped to +-1, as the paper",
        "reference": "the same",
        "handled": "sigma = 0: two libraries cannot draw the same eps; the clip at +-c is not compared",
    },
    {
        "what": "AWAC and CRR, samples of the policy",
        "where": "models/torch/distributions.py:61 and 72",
        "d3rlpy": "fresh noise for every sample, Gaussian samples clipped to +-1",
        "reference": "the same, without the clip",
        "handled": "both libraries add `batch/noise` to the mean, the same at s, at s' and for every sample",
    },
    {
        "what": "AWAC, entropy in the target",
        "where": "algos/qlearning/awac.py:144, algos/qlearning/torch/sac_impl.py:116-128",
        "d3rlpy": "SAC's target at temperature exp(0) = 1: y = r + gamma (Q'(s', a') - log pi(a'|s'))",
        "reference": "rlkit examples/awac/mujoco/awac1.py: alpha = 0, no entropy",
        "handled": "this script sets the log-temperature to -infinity",
    },
    {
        "what": "AWAC, distribution in the target",
        "where": "algos/qlearning/torch/sac_impl.py:118, algos/qlearning/torch/awac_impl.py:57 and 83",
        "d3rlpy": "a' = tanh(mu + sigma noise) in the target; a = tanh(mu) + sigma noise in V and in the likelihood",
        "reference": "one Gaussian for all of them",
        "handled": "noise = 0 for AWAC, where the two agree",
    },
    {
        "what": "AWAC, weights",
        "where": "algos/qlearning/torch/awac_impl.py:61 and 104-106",
        "d3rlpy": "softmax of A / lambda over the batch, times its size; the loss is a sum over the batch",
        "reference": "rlkit awac_trainer.py: the same weights, and a mean; the paper: exp(A / lambda)",
        "handled": "this script replaces its softmax by exp, and the sum over the batch by a mean",
    },
    {
        "what": "AWAC, log-std",
        "where": "algos/qlearning/awac.py:108-110, models/torch/policies.py:135-139",
        "d3rlpy": "log_std = -6 + 6 sigmoid(p), p starts at 0, as rlkit: the first std is exp(-3) = 0.05",
        "reference": "the same; ours is IQL's",
        "handled": "the bounds are set to IQL's -5 and 2, then as for IQL",
    },
    {
        "what": "CRR, critic",
        "where": "algos/qlearning/torch/crr_impl.py:115-130 and 138-142, algos/qlearning/crr.py:119",
        "d3rlpy": "one critic by default; of several, the mean in the advantage and the smallest in the target",
        "reference": "acme: one distributional critic; ours: the smaller of two in both",
        "handled": "two critics with the same weights, where mean and minimum agree, and two different targets",
    },
    {
        "what": "CRR, log-std",
        "where": "algos/qlearning/crr.py:139-145, models/torch/policies.py:140-143",
        "d3rlpy": "a linear layer of the hidden units, clipped to -20 and 2",
        "reference": "the paper: a mixture of Gaussians; ours is IQL's, a parameter",
        "handled": "kernel 0 and not trained; its bias is our log_std",
    },
    {
        "what": "CRR, acting",
        "where": "algos/qlearning/torch/crr_impl.py:144-171",
        "d3rlpy": "an action resampled among samples of the policy by softmax(Q)",
        "reference": "the same (the paper's critic-weighted policy); ours acts by the mode",
        "handled": "not compared",
    },
    {
        "what": "CRR, targets",
        "where": "algos/qlearning/crr.py:120-122",
        "d3rlpy": "copied every 100 updates by default",
        "reference": "acme: the same; ours: a Polyak step in every update",
        "handled": "target_update_type soft",
    },
    {
        "what": "SAC and CQL, loss of the temperature",
        "where": "algos/qlearning/torch/sac_impl.py:106-114",
        "d3rlpy": "-alpha mean(log pi + H), a gradient with respect to log(alpha) that is alpha times rlkit's",
        "reference": "rlkit sac.py: -log(alpha) mean(log pi + H)",
        "handled": "the gradient is compared after a division by alpha",
    },
    {
        "what": "SAC and CQL, order",
        "where": "algos/qlearning/torch/sac_impl.py:89-104, algos/qlearning/torch/cql_impl.py:98-105",
        "d3rlpy": "Q (CQL: after the multiplier), alpha, the policy with the new Q and the new alpha, the target",
        "reference": "rlkit and CQL: all gradients at the old networks; ours: Q, (multiplier,) policy, alpha, target",
        "handled": "temperature and multiplier stand still in d3rlpy, and `after/` is of one update",
    },
    {
        "what": "SAC and CQL, samples",
        "where": "models/torch/distributions.py:125-156, algos/qlearning/torch/cql_impl.py:160",
        "d3rlpy": "fresh noise for every sample, fresh uniform actions",
        "reference": "the same",
        "handled": "both libraries use `batch/noise` and `batch/uniform` for all samples of a transition",
    },
    {
        "what": "CQL, next action",
        "where": "algos/qlearning/torch/cql_impl.py:217-222, algos/qlearning/cql.py:124",
        "d3rlpy": "tanh of the mean where y has no entropy (its default)",
        "reference": "CQL cql.py: sampled, with and without the entropy",
        "handled": "soft_q_backup, with which both sample; ours: backup_entropy",
    },
    {
        "what": "CQL, max-Q backup",
        "where": "algos/qlearning/torch/cql_impl.py:207-215",
        "d3rlpy": "the best action of the smaller critic",
        "reference": "CQL cql.py: the smaller of each critic's best",
        "handled": "not compared",
    },
    {
        "what": "CQL, threshold of the multiplier",
        "where": "algos/qlearning/torch/cql_impl.py:191",
        "d3rlpy": "alpha weight (gap - threshold) is in the critics' loss",
        "reference": "CQL cql.py: alpha (weight gap - threshold), likewise; ours leaves the constant out",
        "handled": "alpha_threshold 0",
    },
    {
        "what": "BC, mean over action dimensions",
        "where": "models/torch/imitators.py:197 (F.mse_loss)",
        "d3rlpy": "mean over the batch and over the action dimensions",
        "reference": "no canonical one",
        "handled": "factor `bc`",
    },
    {
        "what": "BC, stochastic policy",
        "where": "models/torch/imitators.py:200-204",
        "d3rlpy": "mean squared error of a clipped sample, not the likelihood: the smallest std wins",
        "reference": "-mean log pi(a|s)",
        "handled": "bc_gaussian.npz is d3rlpy's IQL actor loss at weight_temp 0, which is that",
    },
    {
        "what": "DiscreteBC, penalty",
        "where": "models/torch/imitators.py:183-186, models/torch/policies.py:158, algos/qlearning/bc.py:151",
        "d3rlpy": "adds beta mean(logits^2), beta 0.5; torch's Categorical has made them log-probabilities",
        "reference": "cross-entropy alone",
        "handled": "beta = 0",
    },
]


# --- Weights and batch ------------------------------------------------------------------------------


def linears(module):
    """The linear layers in the order of the forward pass; d3rlpy registers the encoder before the head."""
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


def fill(rng, module, gain=1.0):
    """Normal weights of std gain sqrt(2 / fan_in), non-zero biases, from numpy: torch's streams change."""
    for linear in linears(module):
        kernel = rng.normal(size=(linear.in_features, linear.out_features)) * gain * np.sqrt(2 / linear.in_features)
        bias = 0.3 * rng.normal(size=linear.out_features)
        linear.weight.data = double(kernel).T.contiguous()
        linear.bias.data = double(bias)


def double(x):
    """float64, with the value that float32 keeps."""
    return torch.tensor(np.asarray(x, np.float32).astype(np.float64))


def column(x):
    """d3rlpy keeps a number per transition as (batch, 1)."""
    return double(x)[:, None]


def save_arrays(out, prefix, module, grad=False):
    """`prefix/layer/kernel` and `prefix/layer/bias` of a network, or `prefix/critic/layer/...` of an ensemble."""
    if isinstance(module, torch.nn.ModuleList):
        for i, member in enumerate(module):
            save_arrays(out, f"{prefix}/{i}", member, grad)
        return
    for i, linear in enumerate(linears(module)):
        for name, parameter in (("kernel", linear.weight), ("bias", linear.bias)):
            values = parameter.grad if grad else parameter.detach()
            out[f"{prefix}/{i}/{name}"] = values.numpy().T.copy()  # a copy: torch goes on writing to its own


def make_batch(rng, out, discrete=False):
    obs, next_obs = rng.normal(size=(2, BATCH, OBS_DIM))
    action = rng.randint(NUM_ACTIONS, size=BATCH) if discrete else rng.uniform(-0.95, 0.95, size=(BATCH, ACTION_DIM))
    reward = rng.normal(size=BATCH)
    terminal = (np.arange(BATCH) % 4 == 1).astype(np.float32)
    out.update({
        "batch/obs": obs, "batch/action": action, "batch/reward": reward, "batch/next_obs": next_obs,
        "batch/terminal": terminal,
    })  # fmt: skip
    return TorchMiniBatch(
        observations=double(obs),
        actions=column(action).long() if discrete else double(action),
        rewards=column(reward),
        next_observations=double(next_obs),
        next_actions=column(np.zeros(BATCH)),  # not read by these algorithms
        returns_to_go=column(np.zeros(BATCH)),  # likewise
        terminals=column(terminal),
        intervals=column(np.ones(BATCH)),  # one-step targets
        device="cpu",
    )


def build(config, num_outputs=ACTION_DIM):
    """d3rlpy's own implementation object, its networks built by its own factories."""
    algo = config.create(device="cpu:0")
    algo.create_impl((OBS_DIM,), num_outputs)
    return algo.impl


def encoder():
    return VectorEncoderFactory(hidden_units=list(HIDDEN), activation="relu")


# --- One function per algorithm -----------------------------------------------------------------------


def bc():
    out, rng = {}, np.random.RandomState(SEED)  # RandomState: numpy has frozen its streams
    impl = build(d3rlpy.algos.BCConfig(encoder_factory=encoder(), **CONFIG["bc"]))
    fill(rng, impl.modules.imitator)
    save_arrays(out, "actor", impl.modules.imitator)
    batch = make_batch(rng, out)
    out["loss/actor"] = impl.compute_imitator_grad(batch).loss.item()
    save_arrays(out, "grad/actor", impl.modules.imitator, grad=True)
    return out


def bc_discrete():
    out, rng = {}, np.random.RandomState(SEED + 1)
    config = d3rlpy.algos.DiscreteBCConfig(encoder_factory=encoder(), **CONFIG["bc_discrete"])
    impl = build(config, NUM_ACTIONS)
    fill(rng, impl.modules.imitator)
    save_arrays(out, "actor", impl.modules.imitator)
    batch = make_batch(rng, out, discrete=True)
    out["loss/actor"] = impl.compute_imitator_grad(batch).loss.item()
    save_arrays(out, "grad/actor", impl.modules.imitator, grad=True)
    return out


def build_iql(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.IQLConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            value_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            **config,
        )
    )
    m = impl.modules
    fill(rng, m.policy)
    fill(rng, m.q_funcs, 1.3)
    fill(rng, m.targ_q_funcs, 1.3)
    fill(rng, m.value_func, 1.3)
    log_std = double(rng.uniform(-1, 0.3, size=(1, ACTION_DIM)))
    m.policy._logstd.data = torch.logit((log_std + 5) / 7)  # models/torch/policies.py:137-139, inverted
    return impl, log_std


def save_iql_actor(out, impl, batch, log_std):
    policy = impl.modules.policy
    save_arrays(out, "actor", policy)
    out["actor/log_std"] = log_std[0].numpy()
    action = policy(batch.observations)
    np.testing.assert_allclose(action.logstd.detach(), log_std, rtol=1e-12)
    action.logstd.retain_grad()  # the gradient at log_std itself, without d3rlpy's sigmoid
    loss = impl.compute_actor_loss(batch, action)
    loss.actor_loss.backward()
    out["loss/actor"] = loss.actor_loss.item()
    save_arrays(out, "grad/actor", policy, grad=True)
    out["grad/actor/log_std"] = action.logstd.grad[0].numpy()


def bc_gaussian():
    """The likelihood loss, which d3rlpy has in IQL only."""
    out, rng = {}, np.random.RandomState(SEED + 3)
    impl, log_std = build_iql(rng, CONFIG["bc_gaussian"])
    save_iql_actor(out, impl, make_batch(rng, out), log_std)
    return out


def iql():
    out, rng = {}, np.random.RandomState(SEED + 2)
    impl, log_std = build_iql(rng, CONFIG["iql"])
    m = impl.modules
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    save_arrays(out, "value", m.value_func)
    batch = make_batch(rng, out)

    loss = impl.compute_critic_grad(batch)  # compute_target, compute_critic_loss, backward
    out["loss/critic"], out["loss/value"] = loss.q_loss.item(), loss.v_loss.item()
    save_arrays(out, "grad/critic", m.q_funcs, grad=True)
    save_arrays(out, "grad/value", m.value_func, grad=True)

    save_iql_actor(out, impl, batch, log_std)

    with torch.no_grad():  # the batch must reach every branch of the losses
        weight = impl._compute_weight(batch)
        target_q = torch.stack([q(batch.observations, batch.actions).q_value for q in m.targ_q_funcs])
    assert 2 <= (weight == CONFIG["iql"]["max_weight"]).sum() <= BATCH // 2, "clipped weights"
    assert 4 <= (weight < 1).sum() <= BATCH - 4, "advantages of both signs"
    assert 4 <= (target_q[0] < target_q[1]).sum() <= BATCH - 4, "either critic is the smaller one"

    impl.update_critic_target()
    save_arrays(out, "polyak/critic", m.targ_q_funcs)

    after = AFTER["iql"]
    config = {**CONFIG["iql"], "tau": after["tau"]}
    impl, _ = build_iql(np.random.RandomState(SEED + 2), config, after["learning_rate"])
    impl.modules.policy._logstd.data.fill_(50.0)  # a sigmoid of 1 in float64: log_std is 2, with gradient 0
    out["start/actor/log_std"] = np.full(ACTION_DIM, 3.0)  # clipped to 2, with gradient 0
    for step in range(after["num_updates"]):
        impl.update(batch, step)
    save_arrays(out, "after/value", impl.modules.value_func)
    save_arrays(out, "after/actor", impl.modules.policy)
    return out


def build_td3_bc(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.TD3PlusBCConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            **config,
        )
    )
    m = impl.modules
    fill(rng, m.policy)
    fill(rng, m.targ_policy)
    fill(rng, m.q_funcs, 1.3)
    fill(rng, m.targ_q_funcs, 1.3)
    return impl


def td3_bc():
    out, rng = {}, np.random.RandomState(SEED + 4)
    impl = build_td3_bc(rng, CONFIG["td3_bc"])
    m = impl.modules
    save_arrays(out, "actor", m.policy)
    save_arrays(out, "target_actor", m.targ_policy)
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    batch = make_batch(rng, out)

    out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
    save_arrays(out, "grad/critic", m.q_funcs, grad=True)
    out["loss/actor"] = impl.compute_actor_grad(batch).actor_loss.item()
    save_arrays(out, "grad/actor", m.policy, grad=True)

    with torch.no_grad():  # the batch must reach every branch of the losses
        q1 = m.q_funcs[0](batch.observations, m.policy(batch.observations).squashed_mu).q_value
        next_action = m.targ_policy(batch.next_observations).squashed_mu
        next_q = torch.stack([q(batch.next_observations, next_action).q_value for q in m.targ_q_funcs])
    assert 4 <= (q1 < 0).sum() <= BATCH - 4, "Q1(s, pi(s)) of both signs"
    assert 4 <= (next_q[0] < next_q[1]).sum() <= BATCH - 4, "either critic is the smaller one"

    impl.update_critic_target()
    impl.update_actor_target()
    save_arrays(out, "polyak/critic", m.targ_q_funcs)
    save_arrays(out, "polyak/actor", m.targ_policy)

    after = AFTER["td3_bc"]
    config = {**CONFIG["td3_bc"], "tau": after["tau"]}
    impl = build_td3_bc(np.random.RandomState(SEED + 4), config, after["learning_rate"])
    for step in range(after["num_updates"]):
        impl.update(batch, after["first_grad_step"] + step)
    save_arrays(out, "after/actor", impl.modules.policy)
    save_arrays(out, "after/critic", impl.modules.q_funcs)
    save_arrays(out, "after/target_actor", impl.modules.targ_policy)
    save_arrays(out, "after/target_critic", impl.modules.targ_q_funcs)
    return out


@contextlib.contextmanager
def fixed_noise(noise):
    """Every sample of a Gaussian is its mean plus this times its standard deviation, whatever the number of samples."""

    def rsample(self, sample_shape=()):
        return (self.loc + self.scale * noise).expand(*sample_shape, *self.loc.shape)

    with unittest.mock.patch.object(torch.distributions.Normal, "rsample", rsample):
        yield


def build_awac(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.AWACConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            **config,
        )
    )
    m = impl.modules
    fill(rng, m.policy)
    fill(rng, m.q_funcs, 1.3)
    fill(rng, m.targ_q_funcs, 1.3)
    m.log_temp._parameter.data.fill_(-np.inf)  # no entropy in the target
    m.policy._min_logstd, m.policy._max_logstd = -5.0, 2.0
    log_std = double(rng.uniform(-1, 0.3, size=(1, ACTION_DIM)))
    m.policy._logstd.data = torch.logit((log_std + 5) / 7)
    return impl, log_std


def exp_as_softmax(x, dim):
    """For the softmax over the batch in AWAC's weights; d3rlpy multiplies by the size of the batch and sums over it."""
    return torch.exp(x) / x.shape[dim] ** 2


def awac():
    out, rng = {}, np.random.RandomState(SEED + 6)
    impl, log_std = build_awac(rng, CONFIG["awac"])
    m = impl.modules
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    batch = make_batch(rng, out)
    out["batch/noise"] = np.zeros((BATCH, ACTION_DIM))

    softmax = unittest.mock.patch.object(torch.nn.functional, "softmax", exp_as_softmax)
    with fixed_noise(double(out["batch/noise"])), softmax:
        out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
        save_arrays(out, "grad/critic", m.q_funcs, grad=True)
        save_iql_actor(out, impl, batch, log_std)
        weight = impl._compute_weights(batch.observations, batch.actions)
        assert 4 <= (BATCH * weight < 1).sum() <= BATCH - 4, "advantages of both signs"
        impl.update_critic_target()
        save_arrays(out, "polyak/critic", m.targ_q_funcs)

        after = AFTER["awac"]
        config = {**CONFIG["awac"], "tau": after["tau"]}
        impl, _ = build_awac(np.random.RandomState(SEED + 6), config, after["learning_rate"])
        impl.modules.policy._logstd.data.fill_(50.0)  # as for IQL
        out["start/actor/log_std"] = np.full(ACTION_DIM, 3.0)
        for step in range(after["num_updates"]):
            impl.update(batch, step)
    save_arrays(out, "after/actor", impl.modules.policy)
    save_arrays(out, "after/critic", impl.modules.q_funcs)
    save_arrays(out, "after/target_critic", impl.modules.targ_q_funcs)
    return out


def build_crr(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.CRRConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            **config,
        )
    )
    m = impl.modules
    for policy in (m.policy, m.targ_policy):
        fill(rng, policy)
        policy._logstd.weight.data.fill_(0.0)
        policy._logstd.weight.requires_grad_(False)
        policy._logstd.bias.data = double(rng.uniform(-1.5, -0.5, size=ACTION_DIM))
    fill(rng, m.q_funcs[0], 1.3)
    m.q_funcs[1].load_state_dict(m.q_funcs[0].state_dict())
    fill(rng, m.targ_q_funcs, 1.3)
    return impl


def save_crr_policy(out, prefix, policy, grad=False):
    """Its layers without the last, the log-std, whose bias is ours."""
    layers = torch.nn.Sequential(*linears(policy)[:-1])
    save_arrays(out, prefix, layers, grad)
    bias = policy._logstd.bias
    out[f"{prefix}/log_std"] = (bias.grad if grad else bias.detach()).numpy().copy()


def crr(name="crr"):
    out, rng = {}, np.random.RandomState(SEED + 7)
    impl = build_crr(rng, CONFIG[name])
    m = impl.modules
    save_crr_policy(out, "actor", m.policy)
    save_crr_policy(out, "target_actor", m.targ_policy)
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    batch = make_batch(rng, out)
    out["batch/noise"] = rng.normal(size=(BATCH, ACTION_DIM))

    with fixed_noise(double(out["batch/noise"])):
        out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
        save_arrays(out, "grad/critic", m.q_funcs, grad=True)
        out["loss/actor"] = impl.compute_actor_grad(batch).actor_loss.item()
        save_crr_policy(out, "grad/actor", m.policy, grad=True)

        weight = impl._compute_weight(batch.observations, batch.actions)
        next_action = d3rlpy.models.torch.build_gaussian_distribution(m.targ_policy(batch.next_observations)).sample()
        next_q = torch.stack([q(batch.next_observations, next_action).q_value for q in m.targ_q_funcs])
        assert 4 <= (weight < 1).sum() <= BATCH - 4, "advantages of both signs"
        assert name == "crr_binary" or 1 <= (weight == CONFIG[name]["max_weight"]).sum() <= 8, "clipped weights"
        assert 2 <= (next_action.abs() == 1).any(dim=1).sum() <= BATCH - 2, "clipped actions"
        assert 4 <= (next_q[0] < next_q[1]).sum() <= BATCH - 4, "either critic is the smaller one"

        impl.update_critic_target()
        impl.update_actor_target()
        save_arrays(out, "polyak/critic", m.targ_q_funcs)
        save_crr_policy(out, "polyak/actor", m.targ_policy)
        if name not in AFTER:
            return out

        after = AFTER[name]
        config = {**CONFIG[name], "tau": after["tau"]}
        impl = build_crr(np.random.RandomState(SEED + 7), config, after["learning_rate"])
        for step in range(after["num_updates"]):
            impl.update(batch, step)
    save_crr_policy(out, "after/actor", impl.modules.policy)
    save_crr_policy(out, "after/target_actor", impl.modules.targ_policy)
    save_arrays(out, "after/critic", impl.modules.q_funcs)
    save_arrays(out, "after/target_critic", impl.modules.targ_q_funcs)
    return out


def crr_binary():
    """The other filter and the other baseline, from the same weights and batch."""
    return crr("crr_binary")


def build_sac(rng, config, learning_rate=0.0):
    """SAC, or CQL where the configuration has a weight. Rates that are not 0 give d3rlpy's multipliers an optimiser."""
    is_cql = "conservative_weight" in config
    impl = build(
        (d3rlpy.algos.CQLConfig if is_cql else d3rlpy.algos.SACConfig)(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            temp_learning_rate=1e-30,
            **({"alpha_learning_rate": 1e-30} if is_cql else {}),
            **config,
        )
    )
    m = impl.modules
    fill(rng, m.policy)
    fill(rng, m.q_funcs, 1.3)
    fill(rng, m.targ_q_funcs, 1.3)
    return impl


def save_sac_policy(out, prefix, policy, grad=False):
    """Mean and log-std are one layer in ours."""
    layers = linears(policy)
    save_arrays(out, prefix, torch.nn.Sequential(*layers[:-2]), grad)
    heads = {}
    save_arrays(heads, "head", torch.nn.Sequential(policy._mu, policy._logstd), grad)
    for name in ("kernel", "bias"):
        both = [heads[f"head/{i}/{name}"] for i in (0, 1)]
        out[f"{prefix}/{len(layers) - 2}/{name}"] = np.concatenate(both, axis=-1)


@contextlib.contextmanager
def fixed_uniform(actions):
    """CQL's uniform actions: these (batch, action_dim), repeated for its samples."""

    def uniform_(self, low, high):
        assert (low, high) == (-1.0, 1.0)
        return actions.repeat_interleave(len(self) // len(actions), dim=0)

    with unittest.mock.patch.object(torch.Tensor, "uniform_", uniform_):
        yield


def sac(name="sac"):
    out, rng = {}, np.random.RandomState(SEED + 31)
    impl = build_sac(rng, CONFIG[name])
    m = impl.modules
    save_sac_policy(out, "actor", m.policy)
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    out["log_alpha"] = m.log_temp._parameter.item()
    batch = make_batch(rng, out)
    out["batch/noise"] = rng.normal(size=(BATCH, ACTION_DIM))
    out["batch/uniform"] = rng.uniform(-1, 1, size=(BATCH, ACTION_DIM))

    after = AFTER[name]
    config = {**CONFIG[name], "tau": after["tau"]}
    stepped = build_sac(np.random.RandomState(SEED + 31), config, after["learning_rate"])

    with fixed_noise(double(out["batch/noise"])), fixed_uniform(double(out["batch/uniform"])):
        out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
        save_arrays(out, "grad/critic", m.q_funcs, grad=True)
        out["loss/actor"] = impl.compute_actor_grad(batch).actor_loss.item()
        save_sac_policy(out, "grad/actor", m.policy, grad=True)

        pi, next_pi = map(m.policy, (batch.observations, batch.next_observations))
        pi, next_pi = map(d3rlpy.models.torch.build_squashed_gaussian_distribution, (pi, next_pi))
        action, log_prob = pi.sample_with_log_prob()
        impl.update_temp(log_prob)
        out["grad/log_alpha"] = m.log_temp._parameter.grad.item()
        if name == "cql":
            columns = batch.observations, batch.actions, batch.next_observations, batch.returns_to_go
            impl.update_alpha(impl._compute_conservative_loss(*columns).detach())
            out["log_multiplier"] = m.log_alpha._parameter.item()
            out["grad/log_multiplier"] = m.log_alpha._parameter.grad.item()

        with torch.no_grad():  # the batch must reach every branch of the losses
            q = torch.stack([q(batch.observations, action).q_value for q in m.q_funcs])
            next_q = torch.stack([q(batch.next_observations, next_pi.sample()).q_value for q in m.targ_q_funcs])
        assert 2 <= (q[0] < q[1]).sum() <= BATCH - 2, "either critic is the smaller one"
        assert 2 <= (next_q[0] < next_q[1]).sum() <= BATCH - 2, "either critic is the smaller one"

        impl.update_critic_target()
        save_arrays(out, "polyak/critic", m.targ_q_funcs)

        for step in range(after["num_updates"]):
            stepped.update(batch, step)
    save_sac_policy(out, "after/actor", stepped.modules.policy)
    save_arrays(out, "after/critic", stepped.modules.q_funcs)
    save_arrays(out, "after/target_critic", stepped.modules.targ_q_funcs)
    return out


def cql():
    """From the same weights and batch."""
    return sac("cql")


def main():
    assert d3rlpy.__version__ == "2.8.1", d3rlpy.__version__  # the departures below were read in this version
    torch.set_default_dtype(torch.float64)
    for algorithm in (bc, bc_discrete, bc_gaussian, iql, td3_bc, awac, crr, crr_binary, sac, cql):
        arrays = algorithm()
        # savez stores every member with the date 1980-01-01: the same arrays are the same bytes
        np.savez(OUT / f"{algorithm.__name__}.npz", **{k: np.asarray(v, np.float32) for k, v in arrays.items()})
    provenance = {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "d3rlpy": d3rlpy.__version__,
            "numpy": np.__version__,
        },
        "seed": SEED,
        "config": CONFIG,
        "after": AFTER,
        "factors": FACTORS,
        "departures": DEPARTURES,
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


if __name__ == "__main__":
    main()
