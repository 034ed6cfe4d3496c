"""The other side of `speed.py --against d3rlpy`, which starts it in an environment that has d3rlpy 2.8.1 and torch.

    python -m venv /tmp/d3 && /tmp/d3/bin/pip install torch==2.13.0 d3rlpy==2.8.1

d3rlpy as its user gets it: its own `fit` on its own replay buffer, on the CPU with torch's default number of threads.
Log files, log lines and the progress bar are off. Its hyper-parameters are its defaults but for the shapes of speed.py;
the networks are then the same in number and size as ours. Its BC regresses a deterministic policy, ours a Gaussian.
"""

import importlib.metadata
import json
import logging
import platform
import sys
import time

import d3rlpy
import numpy as np
import structlog
import torch

structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
CONFIGS = {"bc": d3rlpy.algos.BCConfig, "iql": d3rlpy.algos.IQLConfig, "td3_bc": d3rlpy.algos.TD3PlusBCConfig}


def main(algo, updates, obs_dim, action_dim, hidden, batch_size, rows):
    if algo not in CONFIGS:
        raise SystemExit(f"d3rlpy's counterpart of {algo} is not known here: choose from {', '.join(CONFIGS)}.")
    config = CONFIGS[algo](batch_size=batch_size)
    encoder = d3rlpy.models.VectorEncoderFactory(hidden)
    for field in ("encoder_factory", "actor_encoder_factory", "critic_encoder_factory", "value_encoder_factory"):
        if hasattr(config, field):
            setattr(config, field, encoder)
    rng = np.random.default_rng(0)
    dataset = d3rlpy.dataset.MDPDataset(
        observations=rng.standard_normal((rows, obs_dim), np.float32),
        actions=rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        rewards=rng.standard_normal(rows, np.float32),
        terminals=np.zeros(rows, np.float32),
        timeouts=(np.arange(1, rows + 1) % 1_000 == 0).astype(np.float32),
    )
    algorithm = config.create(device="cpu")

    def fit(steps):
        algorithm.fit(
            dataset,
            n_steps=steps,
            n_steps_per_epoch=steps,
            logger_adapter=d3rlpy.logging.NoopAdapterFactory(),
            show_progress=False,
        )

    fit(10)  # builds the networks
    for question in sys.stdin:
        if question == "about\n":
            versions = {name: importlib.metadata.version(name) for name in ("d3rlpy", "torch", "numpy")}
            answer = {"python": platform.python_version(), **versions, "threads": torch.get_num_threads()}
        elif question == "train\n":
            begun = time.perf_counter()
            fit(updates)
            answer = updates / (time.perf_counter() - begun)
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
