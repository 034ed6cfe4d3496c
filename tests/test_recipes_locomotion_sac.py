"""The locomotion datasets v1: their policies are SAC's, chosen by D4RL's definitions, and what is missing is named."""

import contextlib
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import flax
import jax
import minari
import numpy as np
import pytest
import tyro

from common import recipes
from common.datasets import DatasetError, load_dataset
from common.environments import D4RL_REFERENCE_SCORES
from common.networks import TanhGaussianActor
from common.recipes import locomotion, locomotion_sac, rollouts

BEHAVIOUR = Path(__file__).parents[1] / "benchmarks" / "behaviour"
sys.path.insert(0, str(BEHAVIOUR))

import measure_sac  # noqa: E402
import train_sac  # noqa: E402

WIDTHS = {"w0": (11, 8), "b0": (8,), "w1": (8, 8), "b1": (8,), "w2": (8, 6), "b2": (6,)}  # of hopper


def random_weights(number, scale=1.0):
    rng = np.random.default_rng(0)
    return {name: scale * rng.standard_normal((number, *shape)).astype(np.float32) for name, shape in WIDTHS.items()}


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """A behaviour file of hopper alone, of four policies, of which the third is medium; and a Minari root."""
    steps = np.array([10, 30, 50, 90])
    weights = {name: array.astype(np.float16) for name, array in random_weights(4).items()}
    np.savez_compressed(tmp_path / "hopper-sac.npz", **weights, step=steps, medium=2, expert_return=np.ones(1))
    monkeypatch.setattr(locomotion_sac, "BEHAVIOUR", tmp_path)
    locomotion_sac.load.cache_clear(), locomotion_sac.policy.cache_clear()
    # Other processes would look for the file in its own place
    monkeypatch.setattr(rollouts, "processes", lambda number: contextlib.nullcontext(map))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    yield tmp_path
    locomotion_sac.load.cache_clear(), locomotion_sac.policy.cache_clear()


# --- Policies ---------------------------------------------------------------------------------------


def test_the_policy_is_the_network_that_was_trained():
    actor = TanhGaussianActor(3, (8, 8))
    obs = 3 * np.random.default_rng(0).standard_normal((50, 11))
    params = jax.tree.map(lambda x: 3 * x, actor.init(jax.random.key(0), obs))  # some log std are out of their bounds
    policy = locomotion_sac.Policy(*train_sac.layers(params).values())
    expected = actor.apply(params, obs)
    mean, std = policy.gaussian(obs)
    np.testing.assert_allclose(mean, expected.mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(std, np.exp(expected.log_std), rtol=1e-4)
    assert abs(std.max() - np.exp(2)) < 1e-5  # some are at the bound
    for ours, theirs in zip(
        (mean, std), train_sac.forward(train_sac.layers(params), obs.astype(np.float32)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_actions_are_squashed_draws():
    """By hand: no hidden weight, so that mean and log std are the last bias: 0.5 and log(0.2)."""
    arrays = {name: np.zeros(shape, np.float32) for name, shape in WIDTHS.items()}
    arrays["b2"] = np.array([0.5] * 3 + [np.log(0.2)] * 3, np.float32)
    policy, rng = locomotion_sac.Policy(**arrays), np.random.default_rng(0)
    actions = np.stack([policy.act(np.zeros(11), rng) for _ in range(2000)])
    before = np.arctanh(actions)
    np.testing.assert_allclose(before.mean(0), 0.5, atol=4 * 0.2 / 2000**0.5)
    np.testing.assert_allclose(before.std(0), 0.2, rtol=4 / 4000**0.5)
    assert np.corrcoef(before.T)[0, 1] < 0.1


def test_actions_of_v0_are_the_draws_that_they_were():
    policy, obs = locomotion.policy("hopper", 3), np.linspace(-1, 1, 11)
    expected = np.clip(policy.mean(obs) + policy.std * np.random.default_rng(5).standard_normal(3), -1, 1)
    np.testing.assert_array_equal(policy.act(obs, np.random.default_rng(5)), expected)


# --- Recipes ----------------------------------------------------------------------------------------


def test_qualities_are_of_the_right_policies(hopper):
    """A policy every 20 steps, and the first after 10: half an interval of uniform actions rounds to none."""
    assert locomotion_sac.snapshots("hopper", 1, "random") == [None]
    assert locomotion_sac.snapshots("hopper", 1, "medium") == [2]
    assert locomotion_sac.snapshots("hopper", 1, "medium-expert") == [2, 3]
    assert locomotion_sac.snapshots("hopper", 1, "expert") == [3]
    assert locomotion_sac.snapshots("hopper", 1, "medium-replay") == [0, 1, 2]
    locomotion_sac.load("hopper", 1)["step"] = np.array([40, 60, 80, 90])  # two intervals
    assert locomotion_sac.snapshots("hopper", 1, "medium-replay") == [None, None, 0, 1, 2]


@pytest.mark.parametrize("version", [1, 2])
def test_a_dataset_holds_equal_parts_of_its_policies_and_scores_on_d4rls_scale(hopper, version):
    if version == 2:  # there are the policies of this version alone
        (hopper / "hopper-sac.npz").rename(hopper / "hopper-sac-v2.npz")
    data = hopper / "data"
    locomotion_sac.write("hopper", version, "medium-expert", f"stitch/hopper-medium-expert-v{version}", data, 400)
    dataset = minari.MinariDataset(data)
    episodes, steps = list(dataset), 0
    assert sum(len(e.actions) for e in episodes) == 400
    found = []
    for e in episodes:
        likelihood = []
        for i in (2, 3):
            mean, std = locomotion_sac.policy("hopper", i, version).gaussian(e.observations[:-1])
            inside = np.abs(e.actions) < 0.999
            residual = (np.arctanh(np.where(inside, e.actions, 0)) - mean) / std
            likelihood.append((-0.5 * residual**2 - np.log(std))[inside].sum())
        found.append(2 + int(np.argmax(likelihood)))
        steps += len(e.actions)
        if steps == 200:
            assert set(found) == {2}
            found = []
        assert e.actions.dtype == np.float32 and np.abs(e.actions).max() <= 1
    assert set(found) == {3}
    low, high = dataset.storage.metadata["ref_min_score"], dataset.storage.metadata["ref_max_score"]
    assert (low, high) == D4RL_REFERENCE_SCORES["mujoco/hopper/"]


def test_a_dataset_says_which_medium_policy_it_is_of(monkeypatch):
    said = []
    monkeypatch.setattr(locomotion_sac.storage, "write", lambda *_, description, **__: said.append(description))
    for version in (1, 2):
        locomotion_sac.write("walker2d", version, "medium", f"stitch/walker2d-medium-v{version}", None, 10)
    first, second = said
    assert "whose return is a third of an expert's." in first and "that scores 63.2 or more" in second


def test_reference_scores_are_d4rls():
    for task in locomotion.TASKS:
        assert locomotion_sac.REFERENCE_SCORES[task] == D4RL_REFERENCE_SCORES[f"mujoco/{task}/"]


def test_tasks_with_a_behaviour_file_are_offered_and_others_end_in_one_sentence(hopper, monkeypatch):
    assert [x for x in locomotion_sac.VERSIONS if locomotion_sac.qualities(*x)] == [("hopper", 1)]
    monkeypatch.setattr(recipes, "RECIPES", {k: v for k, v in recipes.RECIPES.items() if k.endswith("-v0")})
    for name in ("walker2d-medium-replay-v1", "walker2d-medium-replay-20k-v1", "walker2d-medium-replay-v2"):
        name = f"stitch/{name}"
        v0 = name[:-1] + "0"
        with pytest.raises(ValueError, match=rf"^{name} needs the policies .* on walker2d, .* yet: use {v0},.*\.$"):
            recipes.build(name)
        with pytest.raises(DatasetError, match=f"^{name} needs the policies .*use {v0}"):
            load_dataset(name)
    for name in ("stitch/walker2d-middling-v1", "stitch/ant-medium-v1", "stitch/hopper-medium-v2"):
        with pytest.raises(ValueError, match="No recipe"):
            recipes.build(name)


def test_a_training_without_an_expert_offers_the_data_that_need_none(hopper, monkeypatch):
    arrays = {name: array[:3] for name, array in locomotion_sac.load("hopper", 1).items() if name[0] in "wb"}
    np.savez_compressed(hopper / "hopper-sac.npz", **arrays, step=np.array([10, 30, 50]), medium=2)
    assert locomotion_sac.qualities("hopper", 1) == ["random", "medium", "medium-replay"]
    locomotion_sac.load.cache_clear()
    assert locomotion_sac.snapshots("hopper", 1, "medium-replay") == [0, 1, 2]
    monkeypatch.setattr(recipes, "RECIPES", {k: v for k, v in recipes.RECIPES.items() if not k.endswith("expert-v1")})
    with pytest.raises(ValueError, match=r"^stitch/hopper-medium-expert-v1 needs the expert policy that SAC trained"):
        recipes.build("stitch/hopper-medium-expert-v1")


def test_every_quality_of_a_committed_task_has_a_recipe_of_a_million_transitions():
    offered = [name for name in recipes.RECIPES if not name.endswith("-v0")]
    assert sorted(offered) == sorted(
        f"stitch/{task}-{quality}-v{version}"
        for task, version in locomotion_sac.VERSIONS
        for quality in locomotion_sac.qualities(task, version)
    )
    for name in offered:
        assert recipes.find(name).num_transitions == 1_000_000
        assert recipes.find(name.replace("-v", "-20k-v")).num_transitions == 20_000


def test_the_versions_of_a_task_differ_in_the_medium_policy_alone():
    first, second = (locomotion_sac.load("walker2d", version) for version in (1, 2))
    np.testing.assert_array_equal(first["curve_return"], second["curve_return"])  # of one training
    np.testing.assert_array_equal(first["expert_return"], second["expert_return"])
    assert first["step"][first["medium"]] < second["step"][second["medium"]]
    assert first["medium_return"].mean() < second["medium_return"].mean()
    # Each recipe has the policies of its own version
    for version in (1, 2):
        write = recipes.find(f"stitch/walker2d-medium-replay-v{version}").write
        assert write.args == ("walker2d", version, "medium-replay")


@pytest.mark.parametrize("task, version", [x for x in locomotion_sac.VERSIONS if locomotion_sac.qualities(*x)])
def test_committed_policies_are_those_of_their_definitions(task, version):
    behaviour, name = locomotion_sac.load(task, version), locomotion_sac.name_of(task, version)
    record = json.loads((BEHAVIOUR / f"{name}.json").read_text())
    assert "dirty" not in record["commit"] and record["training"]["config"]["task"] == task
    command = shlex.split(record["training"]["command"])
    assert command[:2] == ["python", "benchmarks/behaviour/train_sac.py"]
    trained = dataclasses.asdict(tyro.cli(train_sac.Config, args=command[2:]))
    assert json.loads(json.dumps(trained)) == record["training"]["config"]
    random_steps, mean = record["training"]["config"]["random_steps"], behaviour["curve_return"].mean(1)
    command = shlex.split(record["command"])
    assert command[:2] == ["python", "benchmarks/behaviour/measure_sac.py"]
    measured = tyro.cli(measure_sac.Config, args=command[2:])
    assert (measured.task, measured.version) == (task, version)
    bar = measured.expert_return or measure_sac.EXPERT_RETURNS[task]
    levels = measure_sac.MEDIUM_RETURNS[task, version], bar
    kept, medium = measure_sac.choose(behaviour["curve_step"], mean, random_steps, *levels)
    np.testing.assert_array_equal(behaviour["step"], behaviour["curve_step"][kept])
    assert medium == behaviour["medium"] == measure_sac.REPLAY - 1
    names = ["medium", "expert"][: len(kept) - medium]
    assert locomotion_sac.qualities(task, version) == [
        x for x in locomotion_sac.QUALITIES if x.split("-")[-1] in ("random", "replay", *names)
    ]
    assert all(behaviour[name].dtype == np.float16 for name in locomotion_sac.Policy._fields)
    np.testing.assert_allclose(
        [policy["return_mean"] for policy in record["policies"]], behaviour["return"].mean(1), atol=0.051
    )
    assert [name for name in ("medium", "expert") if name in record] == names
    for which in names:
        assert abs(record[which]["return_mean"] - behaviour[f"{which}_return"].mean()) < 0.051
    assert (BEHAVIOUR / f"{name}.png").exists()
    low, high = locomotion_sac.REFERENCE_SCORES[task]
    score = 100 * (record["medium"]["return_mean"] - low) / (high - low)
    words = " ".join(locomotion_sac.__doc__.split())
    said = re.search(r"scores ([\d.]+), ([\d.]+) and ([\d.]+) on hopper, walker2d and halfcheetah", words)
    if "expert" in record:
        assert re.search(rf"Over 100 episodes .*{task}'s (has )?{record['expert']['return_mean']:.0f}\b", words)
    if version == 1:
        assert f"{score:.1f}" == said[1 + ["hopper", "walker2d", "halfcheetah"].index(task)]
    else:
        assert f"scores 63.2 or more; it scores {score:.1f} over 100." in words
        assert abs(levels[0] - (low + 0.632 * (high - low))) < 1e-6


# --- Which policies are kept ------------------------------------------------------------------------


def test_the_choice_is_d4rls():
    """Of a policy each 10 steps, of which two never acted: the expert is the last one at 90 or more, not the last
    of all; medium is the first one at 31 or more that acted."""
    steps, returns = np.arange(0, 1000, 10), np.arange(100.0)
    returns[93:] = 80
    returns[96] = 93.0
    returns[1] = 70.0  # chance, of a policy that has not acted
    kept, medium = measure_sac.choose(steps, returns, 20, 31, 90)
    assert steps[kept[-1]] == 960 and steps[kept[medium]] == 310
    assert medium == 29 and kept[:30].tolist() == list(range(2, 32))


def test_the_choice_is_d4rls_at_the_edge():
    steps, returns = np.arange(0, 1000, 10), np.arange(100.0)
    kept, medium = measure_sac.choose(steps, returns, 0, 33, 99)
    assert steps[kept[-1]] == 990 and steps[kept[medium]] == 330
    assert len(kept) == 31 and (np.diff(kept) > 0).all() and kept[0] == 0
    assert np.diff(kept[:30]).max() <= 2  # evenly


def test_a_replay_is_even_over_the_steps_where_policies_were_kept_more_often_at_first():
    steps = np.concatenate([np.arange(0, 300, 2), np.arange(300, 1001, 10)])
    kept, medium = measure_sac.choose(steps, steps.astype(float), 10, 1000 / 3, 1000)
    assert steps[kept[0]] == 10 and steps[kept[medium]] == 340
    assert np.abs(steps[kept[:30]] - np.linspace(10, 340, 30)).max() <= 5


@pytest.mark.parametrize(
    "level, sentence",
    [
        (33, r"The medium policy is that of step 330, and 24 policies .* train again with --early-interval 7 or less"),
        (500, r"No policy that acted has a mean return of 500; the best of all has 99, at step 990: train longer"),
    ],
)
def test_what_a_training_lacks_is_said_in_one_sentence(level, sentence):
    with pytest.raises(SystemExit, match=sentence):
        measure_sac.choose(np.arange(0, 1000, 10), np.arange(100.0), 100, level, 99)


def test_a_training_of_uniform_actions_alone_has_no_medium_policy():
    with pytest.raises(SystemExit, match="No policy that acted has a mean return of 0; .* train longer"):
        measure_sac.choose(np.arange(0, 100, 10), np.arange(10.0), 100, 0, 9)


def test_without_an_expert_the_medium_policy_is_the_same():
    steps, returns = np.arange(0, 1000, 10), np.arange(100.0)
    kept, medium = measure_sac.choose(steps, returns, 0, 33, 100)  # no policy has a return of 100
    later, _ = measure_sac.choose(np.arange(0, 1200, 10), np.arange(120.0), 0, 33, 100)
    assert steps[kept[-1]] == 330 and medium == 29 and kept.tolist() == later[:-1].tolist()


def test_a_finished_training_becomes_the_three_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locomotion_sac, "BEHAVIOUR", tmp_path)
    monkeypatch.setattr(measure_sac, "HERE", tmp_path)
    for name, value in {"REPLAY": 3, "CURVE_EPISODES": 2, "REFERENCE_EPISODES": 2}.items():
        monkeypatch.setattr(measure_sac, name, value)
    training, steps = tmp_path / "training", np.array([0, 10, 20, 30, 40])
    training.mkdir()
    weights = random_weights(5, 0.3)
    np.savez(training / "snapshots.npz", **weights, step=steps)
    config = {"task": "hopper", "num_steps": 40, "random_steps": 10}
    progress = {"commit": "abc", "command": "/a/place on one machine", "versions": {"jax": "0"}, "step": 40}
    (training / "progress.json").write_text(json.dumps(progress))

    def save(**changes):
        saved = {"config": json.dumps(config | changes), "step": 40, "seconds": 7.0}
        (training / "checkpoint.msgpack").write_bytes(flax.serialization.msgpack_serialize(saved))

    cfg = measure_sac.Config("hopper", str(training), expert_return=0.1)
    with pytest.raises(SystemExit, match="holds no training of hopper"):
        measure_sac.main(cfg)
    for changes in ({"task": "walker2d"}, {"num_steps": 50}):
        save(**changes)
        with pytest.raises(SystemExit, match="name a finished one of hopper"):
            measure_sac.main(cfg)
    save()
    monkeypatch.setattr(measure_sac, "choose", lambda *_: (np.array([1, 2, 3, 4]), 2))
    measure_sac.main(cfg)
    with np.load(tmp_path / "hopper-sac.npz") as file:
        kept = dict(file)
    assert kept["step"].tolist() == [10, 20, 30, 40] and kept["medium"] == 2 and kept["w0"].dtype == np.float16
    np.testing.assert_array_equal(kept["w1"], weights["w1"][1:].astype(np.float16))
    assert kept["return"].shape == (4, 2) and kept["curve_return"].shape == (5, 2)
    np.testing.assert_array_equal(kept["return"], kept["curve_return"][1:])
    # What is measured are the policies that are kept, in half precision
    policy = locomotion_sac.Policy(*(kept[name][2].astype(np.float32) for name in locomotion_sac.Policy._fields))
    env = locomotion.make_env("hopper")
    again = locomotion.rollout(env, policy, (measure_sac.EVAL_SEED, 1)).rewards.sum()
    env.close()
    np.testing.assert_allclose(kept["medium_return"][1], again, rtol=1e-6)
    record = json.loads((tmp_path / "hopper-sac.json").read_text())
    assert record["medium"]["step"] == 30 and record["expert"]["step"] == 40
    assert record["training"]["config"] == config and record["training"]["commit"] == "abc"
    assert record["training"]["command"].endswith("--task hopper --num-steps 40 --random-steps 10")
    assert str(tmp_path) not in json.dumps(record) and "place on" not in json.dumps(record)
    assert record["command"] == "python benchmarks/behaviour/measure_sac.py --task hopper --expert-return 0.1"
    # Without an expert
    monkeypatch.setattr(measure_sac, "choose", lambda *_: (np.array([1, 2, 3]), 2))
    measure_sac.main(cfg)
    with np.load(tmp_path / "hopper-sac.npz") as file:
        assert file["step"].tolist() == [10, 20, 30] and "expert_return" not in file.files
        np.testing.assert_array_equal(file["medium_return"], kept["medium_return"])
    record = json.loads((tmp_path / "hopper-sac.json").read_text())
    assert record["medium"]["step"] == 30 and "expert" not in record
    # Another version has files of its own, and a level of its own
    with pytest.raises(SystemExit, match="^hopper has no version 2: use --version 1.$"):
        measure_sac.main(dataclasses.replace(cfg, version=2))
    monkeypatch.setitem(measure_sac.MEDIUM_RETURNS, ("hopper", 2), 7.0)
    levels = []
    monkeypatch.setattr(measure_sac, "choose", lambda *args: levels.append(args[3]) or (np.array([2, 3, 4]), 2))
    before = {file.name: file.read_bytes() for file in tmp_path.glob("hopper-sac*")}
    measure_sac.main(dataclasses.replace(cfg, version=2))
    assert levels == [7.0] and {name: (tmp_path / name).read_bytes() for name in before} == before
    assert json.loads((tmp_path / "hopper-sac-v2.json").read_text())["command"].endswith("0.1 --version 2")
    assert (tmp_path / "hopper-sac-v2.png").exists()
    with np.load(tmp_path / "hopper-sac-v2.npz") as file:
        assert file["step"].tolist() == [20, 30, 40]
    # A second time plays what has no returns yet
    monkeypatch.setattr(measure_sac, "play", lambda task, policies, episodes: np.full((len(policies), episodes), 7.0))
    policies, file = [None] * 6, training / "returns.npz"
    curve = measure_sac.curve_of("hopper", policies[:5], steps, file)
    np.testing.assert_array_equal(curve, kept["curve_return"])
    curve = measure_sac.curve_of("hopper", policies, np.append(steps, 50), file)
    np.testing.assert_array_equal(curve, np.vstack([kept["curve_return"], [7, 7]]))
    assert (tmp_path / "hopper-sac.png").exists()
    printed = capsys.readouterr().out
    assert "expert: {'step': 40" in printed and "expert: none yet" in printed
