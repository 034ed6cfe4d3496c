"""On the U-maze, which no trajectory of the data solves: IQL stitches, and cloning the same data does not."""

import jax
import numpy as np
import pytest

from algos import bc, iql


@pytest.mark.parametrize("algo, lowest, highest", [(iql, 0.9, 1.0), (bc, 0.0, 0.2)], ids=["iql", "bc"])
def test_stitching(umaze, optimised, algo, lowest, highest):
    cfg = algo.Config(num_updates=6_000, log_interval=6_000)
    dataset, env = algo.load_data(cfg)
    agent = algo.make_agent(cfg, env.spec)
    state, _ = jax.jit(algo.make_train(cfg, agent))(jax.jit(agent.init)(jax.random.key(0)), dataset)
    act = jax.jit(agent.act)
    play = env.evaluate(lambda obs, *_: (act(state, obs[0], jax.random.key(0))[None], None), [0], num_episodes=20)
    assert lowest <= np.mean(play.returns) <= highest
