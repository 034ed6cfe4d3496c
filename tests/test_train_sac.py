"""SAC for the behaviour policies: the policy in NumPy, and a training that is stopped and goes on."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from common.networks import TanhGaussianActor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "behaviour"))

import train_sac  # noqa: E402


def test_the_policy_in_numpy_is_the_network():
    actor = TanhGaussianActor(3, (8, 8))
    obs = np.random.default_rng(0).standard_normal((5, 11)).astype(np.float32)
    params = actor.init(jax.random.key(0), obs)
    mean, std = train_sac.forward(train_sac.layers(params), obs)
    expected = actor.apply(params, obs)
    np.testing.assert_allclose(mean, expected.mean, atol=1e-6)
    np.testing.assert_allclose(std, np.exp(expected.log_std), atol=1e-6)


def test_a_training_that_is_stopped_ends_with_the_same_bits(tmp_path, monkeypatch):
    counts = {"num_steps": 600, "random_steps": 200, "early_interval": 200, "save_interval": 150}
    cfg = train_sac.Config("hopper", **counts, hidden=(8,), batch_size=16)
    train_sac.train(cfg, tmp_path / "whole")
    add = train_sac.Replay.add

    def stop(replay, index, *values):
        if index == 450:
            raise KeyboardInterrupt
        add(replay, index, *values)

    monkeypatch.setattr(train_sac.Replay, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        train_sac.train(cfg, tmp_path / "stopped")
    assert (tmp_path / "stopped" / "checkpoint.msgpack").exists()
    monkeypatch.setattr(train_sac.Replay, "add", add)
    train_sac.train(cfg, tmp_path / "stopped")
    for name in train_sac.COLUMNS:
        whole, stopped = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("whole", "stopped"))
        np.testing.assert_array_equal(whole, stopped)
    whole, stopped = (np.load(tmp_path / folder / "snapshots.npz") for folder in ("whole", "stopped"))
    for name in whole.files:
        np.testing.assert_array_equal(whole[name], stopped[name])


def test_policies_are_kept_often_at_first_and_a_training_may_go_on_with_other_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sac, "EARLY", 200)
    cfg = train_sac.Config(
        "hopper", num_steps=400, random_steps=200, early_interval=50, snapshot_interval=100, save_interval=100,
        hidden=(8,), batch_size=16,
    )  # fmt: skip
    train_sac.train(cfg, tmp_path)
    with np.load(tmp_path / "snapshots.npz") as file:
        assert file["step"][:-1].tolist()[:6] == [0, 50, 100, 150, 200, 300]
    train_sac.train(dataclasses.replace(cfg, early_interval=100), tmp_path)  # nothing is left to do
    with pytest.raises(SystemExit, match="other settings"):
        train_sac.train(dataclasses.replace(cfg, seed=1), tmp_path)


def test_a_finished_training_goes_on_as_if_it_had_been_longer(tmp_path):
    cfg = train_sac.Config(
        "hopper", num_steps=700, random_steps=200, early_interval=100, save_interval=150, hidden=(8,), batch_size=16
    )
    train_sac.train(cfg, tmp_path / "long")
    train_sac.train(dataclasses.replace(cfg, num_steps=300), tmp_path / "short")
    train_sac.train(cfg, tmp_path / "short")
    long, short = (np.load(tmp_path / folder / "snapshots.npz") for folder in ("long", "short"))
    for name in long.files:
        np.testing.assert_array_equal(long[name], short[name])
    for name in train_sac.COLUMNS:
        long, short = (np.load(tmp_path / folder / f"{name}.npy") for folder in ("long", "short"))
        np.testing.assert_array_equal(long, short)
