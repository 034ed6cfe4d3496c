"""ICU-Sepsis: the treatment of sepsis as a finite MDP, whose policies are evaluated exactly.

Choudhary, Gupta & Thomas (2024), https://arxiv.org/abs/2406.05646; package icu-sepsis. 716 states (patient clusters;
the last three are death, survival and what follows them) and 25 actions (five levels each of fluids and vasopressors),
with dynamics estimated from the intensive-care records of MIMIC-III. Reward is 1 where the patient survives and 0
elsewhere, so the return of a policy is its survival rate.

Clinicians act in the data: the package's estimate of their policy. No action is forbidden. Those that the records hold
too rarely in a state ("inadmissible", on average 22 of the 25) have the mean of the other actions' transitions there:
they are neither punished nor removed, and clinicians take them too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.recipes import rollouts, storage, tabular


def icu_sepsis(dataset_id: str, data_path: Path, num_transitions: int) -> None:
    """Episodes of the clinicians' policy. The uniformly random policy scores 0, the optimal one 100, both exactly."""
    import gymnasium as gym

    env = gym.make("icu_sepsis:Sepsis/ICU-Sepsis-v2")
    num_actions, time_limit = int(env.action_space.n), env.spec.max_episode_steps
    clinicians = env.unwrapped.expert_policy  # (S, A); all 0 in the terminal states
    model = tabular.model_of(env)
    uniform = np.full_like(clinicians, 1 / num_actions)
    low, high = tabular.expected_return(model, uniform, time_limit), tabular.optimal_return(model, time_limit)
    survival = tabular.expected_return(model, clinicians, time_limit)
    score = 100 * (survival - low) / (high - low)

    def behaviour(state, rng, progress):
        return int(rng.choice(num_actions, p=clinicians[state]))

    storage.write(
        dataset_id,
        data_path,
        rollouts.collect(env, behaviour, num_transitions, desc=dataset_id),
        env,
        env,
        reference_scores=(low, high),
        algorithm_name="Clinicians' policy of icu-sepsis",
        code_permalink="common/recipes/sepsis.py",
        description=f"Treatment of sepsis by clinicians' policy, whose survival rate is {survival:.4f} and whose score "
        f"is {score:.2f}; the uniformly random policy ({low:.4f}) scores 0 and the optimal one ({high:.4f}) 100.",
        requirements=["icu-sepsis>=2.0.1"],
    )
    env.close()
