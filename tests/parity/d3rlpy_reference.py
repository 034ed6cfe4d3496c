"""Numbers of d3rlpy 2.8.1 that tests/test_parity.py compares our files with: its own losses and its own gradients.

Writes NAME.npz for each name of CONFIG, and provenance.json, beside this file. It needs an environment of its own,
because d3rlpy brings torch and an old gym:

    python -m venv /tmp/d3 && . /tmp/d3/bin/activate
    pip install torch==2.13.0 d3rlpy==2.8.1
    python tests/parity/d3rlpy_reference.py

Every loss below is a call into d3rlpy, and every gradient is torch's: no formula is written out here. Keys of an .npz:
    actor/0/kernel            weights, layer 0 first; kernels are (in, out), as in flax
    critic/1/0/bias           layer 0 of critic number 1; likewise target_critic/...; value/... and target_actor/...
    critic/1/norm_0/scale     LayerNorm of layer 0 (ReBRAC)
    batch/obs                 16 transitions
    batch/noise               standard normal, of a policy's samples (AWAC, CRR, SAC, CQL, BEAR), of BCQ's posterior
    batch/posterior_noise     of the VAE's reconstruction (BEAR); batch/prior_noise: of its prior samples, on axis 0
    batch/latent              standard normal, of BCQ's prior, for each candidate
    act                       actions of the policy (BCQ)
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
import dataclasses
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
    "td3": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "update_actor_interval": 2,
        "target_smoothing_sigma": 0.0, "target_smoothing_clip": 0.5,
    },
    "ddpg": {"gamma": 0.9, "tau": 0.1, "n_critics": 1},
    "rebrac": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "actor_beta": 0.3, "critic_beta": 0.4, "update_actor_interval": 2,
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
    "sac_n": {"gamma": 0.9, "tau": 0.1, "n_critics": 5, "initial_temperature": 0.5},  # of SAC
    "bcq": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "n_action_samples": 6, "lam": 0.6, "action_flexibility": 0.3,
        "beta": 0.7,
    },
    "dqn": {"gamma": 0.9, "target_update_interval": 1},
    "double_dqn": {"gamma": 0.9, "target_update_interval": 1},
    "bcq_discrete": {
        "gamma": 0.9, "target_update_interval": 1, "action_flexibility": 0.4, "beta": 0.0, "share_encoder": False,
    },
    "cql_discrete": {"gamma": 0.9, "target_update_interval": 1, "alpha": 0.7},
    "cql_quantiles": {"gamma": 0.9, "target_update_interval": 1, "alpha": 0.7},
    "bear": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "alpha_threshold": 0.7, "lam": 0.6, "n_target_samples": 3,
        "n_mmd_action_samples": 4, "mmd_kernel": "laplacian", "mmd_sigma": 3.0, "vae_kl_weight": 0.3,
        "initial_temperature": 1.0, "warmup_steps": 0,
    },
    "sac": {"gamma": 0.9, "tau": 0.1, "n_critics": 2, "initial_temperature": 0.5},
    "cql": {
        "gamma": 0.9, "tau": 0.1, "n_critics": 2, "initial_temperature": 0.5, "initial_alpha": 2.0,
        "conservative_weight": 0.7, "alpha_threshold": 0.0, "n_action_samples": 3, "soft_q_backup": True,
    },
}  # fmt: skip
NUM_QUANTILES = 3

# The `after/` arrays: whole updates with a large step, where the order of the networks inside an update shows.
# IQL's target critic stands still in them, because d3rlpy's online critic is not ours (departure "IQL, order"), and so
# does its log-std, beyond its bound on both sides, because d3rlpy's Adam works on another parameter ("IQL, log-std").
AFTER = {
    "iql": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.0},
    "td3_bc": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1, "first_grad_step": 1},
    "td3": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1, "first_grad_step": 1},
    "ddpg": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1, "first_grad_step": 1},
    "rebrac": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1, "first_grad_step": 1},
    "awac": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
    "crr": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
    "sac_n": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
    "bcq": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
    "dqn": {"num_updates": 4, "learning_rate": 0.01, "tau": 1.0},
    "double_dqn": {"num_updates": 4, "learning_rate": 0.01, "tau": 1.0},
    "bcq_discrete": {"num_updates": 4, "learning_rate": 0.01, "tau": 1.0},
    "cql_discrete": {"num_updates": 4, "learning_rate": 0.01, "tau": 1.0},
    "cql_quantiles": {"num_updates": 4, "learning_rate": 0.01, "tau": 1.0},
    "bear": {"num_updates": 4, "learning_rate": 0.01, "tau": 0.1},
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
    "td3": {"actor": 1.0, "critic": 1.0},
    "ddpg": {"actor": 1.0, "critic": 1.0},
    "rebrac": {"actor": 1.0, "critic": 1.0},
    "awac": {"actor": 1.0, "critic": 1.0},
    "crr": {"actor": 1.0, "critic": 1.0},
    "crr_binary": {"actor": 1.0, "critic": 1.0},
    "sac_n": {"actor": 1.0, "critic": 1.0},
    "bcq": {"vae": 1.0, "critic": 1.0, "perturbation": 1.0},
    "dqn": {"critic": 1.0},
    "double_dqn": {"critic": 1.0},
    "bcq_discrete": {"actor": 1.0, "critic": 1.0},
    "cql_discrete": {"critic": 1.0},
    "cql_quantiles": {"critic": 1.0},
    "bear": {"vae": 1.0, "actor": 1.0, "critic": 1.0},
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
        "what": "TD3, TD3+BC and ReBRAC, first actor update",
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
        "what": "TD3, TD3+BC and ReBRAC, noise",
        "where": "algos/qlearning/torch/td3_impl.py:50-56",
        "d3rlpy": "clip(sigma eps, +-c), then the action clipped to +-1, as the paper",
        "reference": "the same",
        "handled": "sigma = 0: two libraries cannot draw the same eps; the clip at +-c is not compared",
    },
    {
        "what": "ReBRAC, networks",
        "where": "algos/qlearning/rebrac.py:79-80, models/encoders.py:220-238, models/torch/encoders.py:226-227",
        "d3rlpy": "two hidden layers without LayerNorm by default; with it, after the ReLU, epsilon 1e-5",
        "reference": "CORL rebrac.py: three, with LayerNorm after the ReLU in the critics, flax's epsilon 1e-6",
        "handled": "this script asks for LayerNorm in the critics and sets its epsilon",
    },
    {
        "what": "ReBRAC, target policy",
        "where": "algos/qlearning/torch/td3_impl.py:71-74",
        "d3rlpy": "moves towards the policy after its step, as ours",
        "reference": "CORL rebrac.py: towards the policy before its step",
        "handled": "nothing to do",
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
        "what": "SAC-N, temperature",
        "where": "algos/qlearning/torch/sac_impl.py:85-91 and 101-110",
        "d3rlpy": "alpha times the constraint, stepped before the policy's loss, which reads the new alpha",
        "reference": "snu-mllab/EDAC sac.py: log(alpha) times the constraint, and the alpha of before in all losses",
        "handled": "its temperature is not trained, ours is put back after every update; its loss is not compared",
    },
    {
        "what": "SAC-N, log-std",
        "where": "models/torch/policies.py:119 and 140-143",
        "d3rlpy": "a linear layer of its own beside the mean's, clipped to -20 and 2",
        "reference": "snu-mllab/EDAC: clipped to -5 and 2; ours is one layer with both, clipped as d3rlpy's",
        "handled": "the two layers side by side are ours",
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
    {
        "what": "BCQ, tanh of the decoder",
        "where": "models/torch/imitators.py:87-90 and 93-99",
        "d3rlpy": "with_squash means the opposite: the default True leaves the tanh out, in the loss and in candidates",
        "reference": "sfujim/BCQ BCQ.py: tanh in both",
        "handled": "this script has the decoder apply its tanh",
    },
    {
        "what": "BCQ, numbers of candidates",
        "where": "algos/qlearning/torch/bcq_impl.py:144-146, algos/qlearning/bcq.py:159",
        "d3rlpy": "one n_action_samples, 100, in the target and in acting",
        "reference": "10 in the target, 100 in acting",
        "handled": "the target is compared; in acting the numbers are set equal",
    },
    {
        "what": "BCQ, latents",
        "where": "models/torch/imitators.py:144, algos/qlearning/torch/bcq_impl.py:116-120 and 158-162",
        "d3rlpy": "fresh noise for the posterior, for the candidates and for the perturbation",
        "reference": "the same",
        "handled": "both libraries have `batch/noise`, `batch/latent` and the first of these; all are clipped alike",
    },
    {
        "what": "DQN, DiscreteBCQ and DiscreteCQL, targets",
        "where": "algos/qlearning/torch/dqn_impl.py:77-78 and 122-123",
        "d3rlpy": "copied every `target_update_interval` updates, by default 8000, and after the first",
        "reference": "the papers: copied; sfujim/BCQ on vectors and ours: a Polyak step in every update",
        "handled": "copied after each update, which is tau = 1",
    },
    {
        "what": "DiscreteBCQ, one encoder",
        "where": "algos/qlearning/bcq.py, share_encoder",
        "d3rlpy": "Q and the clone share their hidden layers by default",
        "reference": "sfujim/BCQ discrete_BCQ.py: shared for images, separate for vectors",
        "handled": "share_encoder = False",
    },
    {
        "what": "DiscreteBCQ, penalty",
        "where": "models/torch/imitators.py:183-186",
        "d3rlpy": "0.5 mean(log-probabilities^2), as DiscreteBC",
        "reference": "sfujim/BCQ discrete_BCQ.py: 0.01 mean(logits^2)",
        "handled": "beta = 0 and logit_penalty = 0",
    },
    {
        "what": "DiscreteBCQ, mask",
        "where": "algos/qlearning/torch/bcq_impl.py:291-301",
        "d3rlpy": "G / max G > threshold; argmax of (Q - min Q + 1e-5) times the mask",
        "reference": "sfujim/BCQ discrete_BCQ.py: the same comparison, Q - 1e8 where it fails; ours: >=",
        "handled": "nothing to do: there are no ties in the batch",
    },
    {
        "what": "DiscreteCQL, double",
        "where": "algos/qlearning/torch/cql_impl.py:243 (DoubleDQNImpl)",
        "d3rlpy": "the online critic chooses the action of the target",
        "reference": "aviralkumar2907/CQL quantile_agent.py: the target critic does",
        "handled": "double = True",
    },
    {
        "what": "DiscreteCQL, order of the quantiles",
        "where": "models/torch/q_functions/qr_q_function.py:62-63",
        "d3rlpy": "output a n + i of the last layer is quantile i of action a",
        "reference": "ours: output i A + a",
        "handled": "the last layer is written in our order",
    },
    {
        "what": "BEAR, temperature",
        "where": "algos/qlearning/torch/bear_impl.py:132 and 268-269, algos/qlearning/torch/sac_impl.py:86-104",
        "d3rlpy": "SAC's entropy term at a learned temperature, from 1 on, in the target and in the actor's loss",
        "reference": "rlkit/torch/sac/bear.py of rail-berkeley/d4rl_evaluations: none",
        "handled": "this script sets the log-temperature to -infinity",
    },
    {
        "what": "BEAR, MMD gradient",
        "where": "algos/qlearning/torch/bear_impl.py:133-137 and 184-191, algos/qlearning/torch/ddpg_impl.py:126-131",
        "d3rlpy": "the step on log alpha leaves minus the MMD term's gradient in the actor, whose own step adds it "
        "again: after the warm-up the constraint has no effect on the policy",
        "reference": "gradients are cleared between the two",
        "handled": "this script clears the actor's gradients after the step on log alpha",
    },
    {
        "what": "BEAR, squashing of the VAE",
        "where": "models/torch/imitators.py:86-92",
        "d3rlpy": "with_squash is inverted: no tanh in the reconstruction; in the MMD one for the VAE, none for pi",
        "reference": "tanh in the reconstruction, both sides of the MMD before the tanh",
        "handled": "this script inverts the argument once more",
    },
    {
        "what": "BEAR, alpha",
        "where": "algos/qlearning/bear.py:241-245, algos/qlearning/torch/bear_impl.py:306-311",
        "d3rlpy": "Adam for log alpha has the actor's learning rate; no step of it in the warm-up",
        "reference": "a learning rate of its own, 1e-3, and a step in every update",
        "handled": "one learning rate for all; no warm-up",
    },
    {
        "what": "BEAR, order",
        "where": "algos/qlearning/torch/bear_impl.py:302-313",
        "d3rlpy": "VAE, Q, pi with the new Q, log alpha, target, as ours",
        "reference": "pi with the Q from before this update",
        "handled": "nothing to do",
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
]


# --- Weights and batch ------------------------------------------------------------------------------


def linears(module):
    """The linear layers in the order of the forward pass; d3rlpy registers the encoder before the head."""
    return [m for m in module.modules() if isinstance(m, torch.nn.Linear)]


def layer_norms(module):
    return [m for m in module.modules() if isinstance(m, torch.nn.LayerNorm)]


def fill(rng, module, gain=1.0):
    """Normal weights of std gain sqrt(2 / fan_in), non-zero biases, from numpy: torch's streams change."""
    for linear in linears(module):
        kernel = rng.normal(size=(linear.in_features, linear.out_features)) * gain * np.sqrt(2 / linear.in_features)
        bias = 0.3 * rng.normal(size=linear.out_features)
        linear.weight.data = double(kernel).T.contiguous()
        linear.bias.data = double(bias)
    for norm in layer_norms(module):
        norm.eps = 1e-6  # flax's
        norm.weight.data = double(1 + 0.3 * rng.normal(size=norm.normalized_shape))
        norm.bias.data = double(0.3 * rng.normal(size=norm.normalized_shape))


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
    named = [(f"{i}", "kernel", linear) for i, linear in enumerate(linears(module))]
    named += [(f"norm_{i}", "scale", norm) for i, norm in enumerate(layer_norms(module))]
    for layer, weight, m in named:
        for name, parameter in ((weight, m.weight), ("bias", m.bias)):
            values = parameter.grad if grad else parameter.detach()
            out[f"{prefix}/{layer}/{name}"] = values.numpy().T.copy()  # a copy: torch goes on writing to its own


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


def encoder(**options):
    return VectorEncoderFactory(hidden_units=list(HIDDEN), activation="relu", **options)


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


TD3_FAMILY = {
    "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
    "td3": d3rlpy.algos.TD3Config,
    "ddpg": d3rlpy.algos.DDPGConfig,
    "rebrac": d3rlpy.algos.ReBRACConfig,
}


def build_td3(name, rng, config, learning_rate=0.0):
    impl = build(
        TD3_FAMILY[name](
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(use_layer_norm=name == "rebrac"),
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


def td3_bc(name="td3_bc", seed=SEED + 4):
    out, rng = {}, np.random.RandomState(seed)
    impl = build_td3(name, rng, CONFIG[name])
    m = impl.modules
    save_arrays(out, "actor", m.policy)
    save_arrays(out, "target_actor", m.targ_policy)
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    batch = make_batch(rng, out)
    if name == "rebrac":
        out["batch/next_action"] = rng.uniform(-0.95, 0.95, size=(BATCH, ACTION_DIM))
        batch = dataclasses.replace(batch, next_actions=double(out["batch/next_action"]))

    out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
    save_arrays(out, "grad/critic", m.q_funcs, grad=True)
    out["loss/actor"] = impl.compute_actor_grad(batch).actor_loss.item()
    save_arrays(out, "grad/actor", m.policy, grad=True)

    with torch.no_grad():  # the batch must reach every branch of the losses
        action = m.policy(batch.observations).squashed_mu
        q = torch.stack([q(batch.observations, action).q_value for q in m.q_funcs])
        next_action = m.targ_policy(batch.next_observations).squashed_mu
        next_q = torch.stack([q(batch.next_observations, next_action).q_value for q in m.targ_q_funcs])
    assert 4 <= (q[0] < 0).sum() <= BATCH - 4, "Q1(s, pi(s)) of both signs"
    assert name != "rebrac" or 4 <= (q[0] < q[1]).sum() <= BATCH - 4, "either critic is the smaller one"
    assert name == "ddpg" or 4 <= (next_q[0] < next_q[1]).sum() <= BATCH - 4, "either target critic is the smaller one"

    impl.update_critic_target()
    impl.update_actor_target()
    save_arrays(out, "polyak/critic", m.targ_q_funcs)
    save_arrays(out, "polyak/actor", m.targ_policy)

    after = AFTER[name]
    config = {**CONFIG[name], "tau": after["tau"]}
    impl = build_td3(name, np.random.RandomState(seed), config, after["learning_rate"])
    for step in range(after["num_updates"]):
        impl.update(batch, after["first_grad_step"] + step)
    save_arrays(out, "after/actor", impl.modules.policy)
    save_arrays(out, "after/critic", impl.modules.q_funcs)
    save_arrays(out, "after/target_actor", impl.modules.targ_policy)
    save_arrays(out, "after/target_critic", impl.modules.targ_q_funcs)
    return out


def td3():
    return td3_bc("td3", SEED + 8)


def ddpg():
    return td3_bc("ddpg", SEED + 9)


def rebrac():
    return td3_bc("rebrac", SEED + 11)


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


@contextlib.contextmanager
def fixed_noises(out):
    """As fixed_noise, for the policy and the VAE's posterior, told apart by their sizes, and for the VAE's prior."""
    noise = {ACTION_DIM: double(out["batch/noise"]), 2 * ACTION_DIM: double(out["batch/posterior_noise"])}
    prior = double(out["batch/prior_noise"])

    def rsample(self, sample_shape=()):
        return (self.loc + self.scale * noise[self.loc.shape[-1]]).expand(*sample_shape, *self.loc.shape)

    def randn(shape, device):
        return prior.reshape(shape)

    normal = unittest.mock.patch.object(torch.distributions.Normal, "rsample", rsample)
    with normal, unittest.mock.patch.object(torch, "randn", randn):
        yield


@contextlib.contextmanager
def bear_as_published():
    """Takes out two departures: the inverted squashing, and the gradient that the step on log alpha leaves behind."""
    decoder, implementation = d3rlpy.models.torch.VAEDecoder, d3rlpy.algos.qlearning.torch.BEARImpl
    forward, update_alpha = decoder.forward, implementation.update_alpha

    def unsquash(self, x, latent, with_squash):
        return forward(self, x, latent, not with_squash)

    def update_alpha_alone(self, mmd_loss):
        update_alpha(self, mmd_loss)
        self._modules.actor_optim.zero_grad()

    squash = unittest.mock.patch.object(decoder, "forward", unsquash)
    with squash, unittest.mock.patch.object(implementation, "update_alpha", update_alpha_alone):
        yield


def build_bear(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.BEARConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            imitator_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            imitator_learning_rate=learning_rate,
            temp_learning_rate=learning_rate,
            alpha_learning_rate=learning_rate,
            **config,
        )
    )
    m = impl.modules
    for network in (m.policy, m.vae_encoder, m.vae_decoder):
        fill(rng, network)
    for network in (m.q_funcs, m.targ_q_funcs):
        fill(rng, network, 1.3)
    m.log_alpha._parameter.data.fill_(0.4)
    m.log_temp._parameter.data.fill_(-np.inf)  # no entropy in the target and in the actor's loss
    return impl


def save_two_heads(out, prefix, module, grad=False):
    """A network whose last two layers, mean and log-std, are one layer of ours."""
    *hidden, mean, log_std = linears(module)
    save_arrays(out, prefix, torch.nn.Sequential(*hidden), grad)
    for name in ("weight", "bias"):
        heads = [getattr(head, name) for head in (mean, log_std)]
        heads = [(head.grad if grad else head.detach()).numpy().T for head in heads]
        key = {"weight": "kernel", "bias": "bias"}[name]
        out[f"{prefix}/{len(hidden)}/{key}"] = np.concatenate(heads, axis=-1)


def save_bear(out, prefix, impl):
    m = impl.modules
    save_two_heads(out, f"{prefix}actor", m.policy)
    save_two_heads(out, f"{prefix}vae/encoder", m.vae_encoder)
    save_arrays(out, f"{prefix}vae/decoder", m.vae_decoder)
    save_arrays(out, f"{prefix}critic", m.q_funcs)
    save_arrays(out, f"{prefix}target_critic", m.targ_q_funcs)
    out[f"{prefix}log_alpha"] = m.log_alpha._parameter.detach().numpy()[0, 0].copy()


def bear():
    out, rng = {}, np.random.RandomState(SEED + 20)
    impl = build_bear(rng, CONFIG["bear"])
    m = impl.modules
    save_bear(out, "", impl)
    batch = make_batch(rng, out)
    out["batch/noise"] = rng.normal(size=(BATCH, ACTION_DIM))
    out["batch/posterior_noise"] = rng.normal(size=(BATCH, 2 * ACTION_DIM))
    out["batch/prior_noise"] = rng.normal(size=(CONFIG["bear"]["n_mmd_action_samples"], BATCH, 2 * ACTION_DIM))

    with fixed_noises(out), bear_as_published():
        out["loss/vae"] = impl.compute_imitator_grad(batch)["loss"].item()
        save_two_heads(out, "grad/vae/encoder", m.vae_encoder, grad=True)
        save_arrays(out, "grad/vae/decoder", m.vae_decoder, grad=True)
        out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
        save_arrays(out, "grad/critic", m.q_funcs, grad=True)
        out["loss/actor"] = impl.compute_actor_grad(batch).actor_loss.item()
        save_two_heads(out, "grad/actor", m.policy, grad=True)

        with torch.no_grad():  # the batch must reach every branch of the losses
            policy = d3rlpy.models.torch.build_squashed_gaussian_distribution
            action = policy(m.policy(batch.observations)).sample()
            next_action = policy(m.policy(batch.next_observations)).sample()
            q = torch.stack([q(batch.observations, action).q_value for q in m.q_funcs])
            next_q = torch.stack([q(batch.next_observations, next_action).q_value for q in m.targ_q_funcs])
            mmd = impl._compute_mmd(batch.observations)
        assert 4 <= (q[0] < q[1]).sum() <= BATCH - 4, "either critic is the smaller one"
        assert 4 <= (next_q[0] < next_q[1]).sum() <= BATCH - 4, "likewise of the targets"
        assert 4 <= (mmd > CONFIG["bear"]["alpha_threshold"]).sum() <= BATCH - 4, "constraints violated and not"
        assert (np.abs(out["batch/prior_noise"]) > 0.5).any(), "clipped latents"

        impl.update_critic_target()
        save_arrays(out, "polyak/critic", m.targ_q_funcs)

        after = AFTER["bear"]
        config = {**CONFIG["bear"], "tau": after["tau"]}
        impl = build_bear(np.random.RandomState(SEED + 20), config, after["learning_rate"])
        for step in range(after["num_updates"]):
            impl.update(batch, step)
    save_bear(out, "after/", impl)
    return out


def build_q(name, rng, learning_rate=0.0):
    """DQN or one of its descendants, whose critic and target critic differ."""
    config = {
        "dqn": d3rlpy.algos.DQNConfig,
        "double_dqn": d3rlpy.algos.DoubleDQNConfig,
        "bcq_discrete": d3rlpy.algos.DiscreteBCQConfig,
        "cql_discrete": d3rlpy.algos.DiscreteCQLConfig,
        "cql_quantiles": d3rlpy.algos.DiscreteCQLConfig,
    }[name]
    more = {}
    if name == "cql_quantiles":
        more["q_func_factory"] = d3rlpy.models.QRQFunctionFactory(n_quantiles=NUM_QUANTILES)
    impl = build(config(encoder_factory=encoder(), learning_rate=learning_rate, **CONFIG[name], **more), NUM_ACTIONS)
    fill(rng, impl.modules.q_funcs, 1.3)
    fill(rng, impl.modules.targ_q_funcs, 1.3)
    if name == "bcq_discrete":
        fill(rng, impl.modules.imitator)
    return impl


def save_q(out, prefix, q_funcs, grad=False):
    """The critic of an ensemble of one; the last layer in our order: all actions of the first quantile come first."""
    (q_func,) = q_funcs
    save_arrays(out, prefix, q_func, grad)
    last = f"{prefix}/{len(HIDDEN)}"
    for name in ("kernel", "bias"):
        x = out[f"{last}/{name}"]
        x = x.reshape(*x.shape[:-1], NUM_ACTIONS, -1)
        out[f"{last}/{name}"] = x.swapaxes(-1, -2).reshape(*x.shape[:-2], -1)


def q_learning(name, seed):
    out, rng = {}, np.random.RandomState(seed)
    impl = build_q(name, rng)
    m = impl.modules
    save_q(out, "critic", m.q_funcs)
    save_q(out, "target_critic", m.targ_q_funcs)
    if name == "bcq_discrete":
        save_arrays(out, "actor", m.imitator)
    batch = make_batch(rng, out, discrete=True)

    loss = impl.compute_grad(batch)
    save_q(out, "grad/critic", m.q_funcs, grad=True)
    out["loss/critic"] = (loss.td_loss if name == "bcq_discrete" else loss.loss).item()
    if name == "bcq_discrete":
        out["loss/actor"] = loss.imitator_loss.item()
        save_arrays(out, "grad/actor", m.imitator, grad=True)

    with torch.no_grad():  # the batch must reach every branch of the losses
        q, target_q = (f(batch.next_observations).q_value for f in (m.q_funcs[0], m.targ_q_funcs[0]))
        chosen = impl.inner_predict_best_action(batch.next_observations)
        value = m.q_funcs[0](batch.observations).q_value.gather(1, batch.actions)
        next_q = target_q.gather(1, chosen[:, None])
        error = value - batch.rewards - CONFIG[name]["gamma"] * (1 - batch.terminals) * next_q
    assert 4 <= (q.argmax(dim=1) != target_q.argmax(dim=1)).sum(), "double and plain differ"
    assert 3 <= (error.abs() < 1).sum() <= BATCH - 3, "both parts of the Huber loss"
    assert name != "bcq_discrete" or 4 <= (chosen != q.argmax(dim=1)).sum() <= BATCH - 4, "unlikely actions"

    impl.update_target()
    save_q(out, "polyak/critic", m.targ_q_funcs)

    after = AFTER[name]
    impl = build_q(name, np.random.RandomState(seed), after["learning_rate"])
    for step in range(after["num_updates"]):
        impl.update(batch, step)
    save_q(out, "after/critic", impl.modules.q_funcs)
    save_q(out, "after/target_critic", impl.modules.targ_q_funcs)
    if name == "bcq_discrete":
        save_arrays(out, "after/actor", impl.modules.imitator)
    return out


def dqn():
    return q_learning("dqn", SEED + 9)


def double_dqn():
    return q_learning("double_dqn", SEED + 9)


def bcq_discrete():
    return q_learning("bcq_discrete", SEED + 12)


def cql_discrete():
    return q_learning("cql_discrete", SEED + 9)


def cql_quantiles():
    return q_learning("cql_quantiles", SEED + 9)


@contextlib.contextmanager
def fixed_latents(latent):
    """Latents (candidates, batch, ...) where d3rlpy draws some; for the perturbation's one candidate, the first."""

    def randn(rows, size, **kwargs):
        num = rows // latent.shape[1]  # the candidates of one state follow each other
        return latent[:num].transpose(0, 1).reshape(rows, size)

    with unittest.mock.patch.object(torch, "randn", randn):
        yield


def squashed(self, x, latent, with_squash=True):
    """For VAEDecoder.__call__: with its tanh."""
    return torch.nn.Module.__call__(self, x, latent, False)


def build_bcq(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.BCQConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            imitator_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            imitator_learning_rate=learning_rate,
            **config,
        )
    )
    m = impl.modules
    for module in (m.vae_encoder, m.vae_decoder, m.policy, m.targ_policy):
        fill(rng, module)
    fill(rng, m.q_funcs, 1.3)
    fill(rng, m.targ_q_funcs, 1.3)
    return impl


def save_vae(out, prefix, modules, grad=False):
    """Its encoder's two heads, mean and log-std, are one layer of ours."""
    *layers, mean, log_std = linears(modules.vae_encoder)
    save_arrays(out, f"{prefix}/encoder", torch.nn.Sequential(*layers), grad)
    heads = {}
    for i, head in enumerate((mean, log_std)):
        save_arrays(heads, str(i), head, grad)
    for name in ("kernel", "bias"):
        out[f"{prefix}/encoder/{len(layers)}/{name}"] = np.concatenate(
            [heads[f"{i}/0/{name}"] for i in (0, 1)], axis=-1
        )
    save_arrays(out, f"{prefix}/decoder", modules.vae_decoder, grad)


def bcq():
    out, rng = {}, np.random.RandomState(SEED + 8)
    impl = build_bcq(rng, CONFIG["bcq"])
    m = impl.modules
    save_vae(out, "vae", m)
    save_arrays(out, "perturbation", m.policy)
    save_arrays(out, "target_perturbation", m.targ_policy)
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    batch = make_batch(rng, out)
    out["batch/noise"] = rng.normal(size=(BATCH, 2 * ACTION_DIM))
    out["batch/latent"] = rng.normal(size=(CONFIG["bcq"]["n_action_samples"], BATCH, 2 * ACTION_DIM))
    noise, latent = double(out["batch/noise"]), double(out["batch/latent"])

    decoder = type(m.vae_decoder)
    assert (m.vae_decoder(batch.observations, latent[0]).abs() > 1).any(), "departure: no tanh by default"
    with fixed_noise(noise), fixed_latents(latent), unittest.mock.patch.object(decoder, "__call__", squashed):
        out["loss/vae"] = impl.compute_imitator_grad(batch)["loss"].item()
        save_vae(out, "grad/vae", m, grad=True)
        out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
        save_arrays(out, "grad/critic", m.q_funcs, grad=True)
        out["loss/perturbation"] = impl.compute_actor_grad(batch).actor_loss.item()
        save_arrays(out, "grad/perturbation", m.policy, grad=True)
        with torch.no_grad():  # the batch must reach every branch of the losses
            out["act"] = impl.inner_predict_best_action(batch.observations).numpy()
            log_std = m.vae_encoder(batch.observations, batch.actions).scale.log()
            repeated = impl._repeat_observation(batch.next_observations)
            action = impl._sample_repeated_action(repeated, True)
            next_q = torch.stack([q(repeated.flatten(0, 1), action.flatten(0, 1)).q_value for q in m.targ_q_funcs])
        next_q = next_q.reshape(2, BATCH, -1)
        mixed = 0.6 * next_q.amin(dim=0) + 0.4 * next_q.amax(dim=0)
        wrong = 0.6 * next_q.amax(dim=2).amin(dim=0) + 0.4 * next_q.amax(dim=2).amax(dim=0)
        assert len(mixed.argmax(dim=1).unique()) >= 4, "different candidates are the best"
        assert (mixed.amax(dim=1) < wrong - 1e-3).sum() >= 4, "mixing the maxima would be another number"
        assert 2 <= (action.abs() == 1).any(dim=2).sum() <= 6 * BATCH - 2, "clipped actions"
        assert log_std.std() > 0.1, "posteriors differ"

        impl.update_critic_target()
        impl.update_actor_target()
        save_arrays(out, "polyak/critic", m.targ_q_funcs)
        save_arrays(out, "polyak/perturbation", m.targ_policy)

        after = AFTER["bcq"]
        config = {**CONFIG["bcq"], "tau": after["tau"]}
        impl = build_bcq(np.random.RandomState(SEED + 8), config, after["learning_rate"])
        for step in range(after["num_updates"]):
            impl.update(batch, step)
    save_vae(out, "after/vae", impl.modules)
    save_arrays(out, "after/perturbation", impl.modules.policy)
    save_arrays(out, "after/critic", impl.modules.q_funcs)
    save_arrays(out, "after/target_perturbation", impl.modules.targ_policy)
    save_arrays(out, "after/target_critic", impl.modules.targ_q_funcs)
    return out


def build_sac_n(rng, config, learning_rate=0.0):
    impl = build(
        d3rlpy.algos.SACConfig(
            actor_encoder_factory=encoder(),
            critic_encoder_factory=encoder(),
            actor_learning_rate=learning_rate,
            critic_learning_rate=learning_rate,
            temp_learning_rate=0.0,
            **config,
        )
    )
    m = impl.modules
    fill(rng, m.policy)
    fill(rng, m.q_funcs, 1.3)
    fill(rng, m.targ_q_funcs, 1.3)
    return impl


def save_squashed_policy(out, prefix, policy, grad=False):
    """Its last two layers, the mean's and the log-std's, are one of ours."""
    layers = {}
    save_arrays(layers, prefix, policy, grad)
    last = len(HIDDEN)
    for name in ("kernel", "bias"):
        heads = [layers.pop(f"{prefix}/{last + i}/{name}") for i in range(2)]
        layers[f"{prefix}/{last}/{name}"] = np.concatenate(heads, axis=-1)
    out.update(layers)


def sac_n():
    out, rng = {}, np.random.RandomState(SEED + 9)
    impl = build_sac_n(rng, CONFIG["sac_n"])
    m = impl.modules
    save_squashed_policy(out, "actor", m.policy)
    save_arrays(out, "critic", m.q_funcs)
    save_arrays(out, "target_critic", m.targ_q_funcs)
    out["log_alpha"] = np.log(CONFIG["sac_n"]["initial_temperature"])
    batch = make_batch(rng, out)
    out["batch/noise"] = rng.normal(size=(BATCH, ACTION_DIM))

    with fixed_noise(double(out["batch/noise"])):
        out["loss/critic"] = impl.compute_critic_grad(batch).critic_loss.item()
        save_arrays(out, "grad/critic", m.q_funcs, grad=True)
        out["loss/actor"] = impl.compute_actor_grad(batch).actor_loss.item()
        save_squashed_policy(out, "grad/actor", m.policy, grad=True)

        with torch.no_grad():  # the batch must reach every branch of the losses
            sample = d3rlpy.models.torch.build_squashed_gaussian_distribution
            action = sample(m.policy(batch.observations)).sample()
            next_action = sample(m.policy(batch.next_observations)).sample()
            q = torch.stack([q(batch.observations, action).q_value for q in m.q_funcs])
            next_q = torch.stack([q(batch.next_observations, next_action).q_value for q in m.targ_q_funcs])
        for smallest in (q.argmin(dim=0), next_q.argmin(dim=0)):
            assert len(smallest.unique()) >= 3, "now one critic is the smallest, now another"

        impl.update_critic_target()
        save_arrays(out, "polyak/critic", m.targ_q_funcs)

        after = AFTER["sac_n"]
        config = {**CONFIG["sac_n"], "tau": after["tau"]}
        impl = build_sac_n(np.random.RandomState(SEED + 9), config, after["learning_rate"])
        for step in range(after["num_updates"]):
            impl.update(batch, step)
    save_squashed_policy(out, "after/actor", impl.modules.policy)
    save_arrays(out, "after/critic", impl.modules.q_funcs)
    save_arrays(out, "after/target_critic", impl.modules.targ_q_funcs)
    return out


def main():
    assert d3rlpy.__version__ == "2.8.1", d3rlpy.__version__  # the departures below were read in this version
    torch.set_default_dtype(torch.float64)
    for name in CONFIG:
        arrays = globals()[name]()  # the function of that name
        # savez stores every member with the date 1980-01-01: the same arrays are the same bytes
        np.savez(OUT / f"{name}.npz", **{k: np.asarray(v, np.float32) for k, v in arrays.items()})
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


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()


if __name__ == "__main__":
    main()
