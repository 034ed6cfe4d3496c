"""Exact returns in a finite MDP whose dynamics are known, by dynamic programming."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import gymnasium as gym


class Model(NamedTuple):
    """A finite MDP of S states and A actions. Terminal states lead to themselves or one another, and pay nothing."""

    transition: np.ndarray  # (S, A, S): p(s' | s, a)
    reward: np.ndarray  # (S, A): expected
    initial: np.ndarray  # (S,): p(s_0)


def dynamics_of(env: gym.Env) -> dict | None:
    """The arrays of an environment that is a finite MDP and shows it, as icu-sepsis' does: a dict with these keys."""
    dynamics = getattr(env.unwrapped, "dynamics", None)
    return dynamics if isinstance(dynamics, dict) and {"tx_mat", "r_mat", "d_0"} <= dynamics.keys() else None


def model_of(env: gym.Env) -> Model | None:
    dynamics = dynamics_of(env)
    if dynamics is None:
        return None
    transition = dynamics["tx_mat"]
    return Model(transition, np.einsum("sat,sat->sa", transition, dynamics["r_mat"]), dynamics["d_0"])


def twin(env: gym.Env) -> gym.Env | None:
    """Another environment of the same finite MDP, with the same arrays: those of ICU-Sepsis are 205 MB."""
    dynamics = dynamics_of(env)
    return dynamics and copy.deepcopy(env, {id(part): part for part in dynamics.values()})


def expected_return(model: Model, policy: np.ndarray, num_steps: int, discount: float = 1.0) -> float:
    """Expected discounted sum of the first `num_steps` rewards of `policy`, probabilities pi(a | s), shape (S, A)."""
    transition = (policy[:, None] @ model.transition)[:, 0]  # sum_a pi(a | s) p(s' | s, a), shape (S, S)
    reward = (policy * model.reward).sum(axis=-1)
    value = np.zeros(len(reward))
    for _ in range(num_steps):
        value = reward + discount * transition @ value
    return float(model.initial @ value)


def optimal_return(model: Model, num_steps: int) -> float:
    """The largest expected sum of `num_steps` rewards, by value iteration."""
    value = np.zeros(len(model.initial))
    for _ in range(num_steps):
        value = (model.reward + model.transition @ value).max(axis=-1)
    return float(model.initial @ value)


def evaluate(model, policy, interface, num_seeds, num_episodes, num_steps, discount, reward_scale, reward_shift):
    """What environments.Evaluation holds, exactly: each seed's expected return stands for each of its episodes.

    The policy is called on all S states in the place of the episodes, at steps 0 .. num_episodes - 1: if it is
    stochastic, its probabilities are the frequencies of these draws. The starts are all states, with their
    probabilities. With a reward_shift the value is NaN: the model does not say where the rewards end. None where the
    policy remembers its episode: then it is no function of the state, and must be played.
    """
    obs = interface.observe(np.arange(len(model.initial)) + interface.observation["start"])
    obs = np.broadcast_to(obs, (num_seeds, *obs.shape))
    rewards = np.zeros(obs.shape[:2], np.float32)
    draws = []  # (episodes, seeds, S)
    for step in range(num_episodes):
        action, memory = policy(obs, step, None, rewards)
        if memory is not None:  # at the first call: a thousand memories of all states would fill the machine
            return None
        draws.append(action)
    probs = np.eye(model.reward.shape[1])[np.stack(draws)].mean(axis=0)
    returns = np.array([expected_return(model, pi, num_steps) for pi in probs])
    values = [expected_return(model, pi, num_steps, g) for pi, g in zip(probs, discount, strict=True)]
    values = reward_scale * np.array(values) if reward_shift == 0 else np.full(num_seeds, np.nan)
    return np.repeat(returns[:, None], num_episodes, axis=1), values, obs, draws[0], model.initial
