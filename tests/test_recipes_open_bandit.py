"""The Open Bandit sample: real logged data, and the numbers that every estimator must find in them.

The sums over the logs are exact. Of BTS as it was when the week began only draws are known, which are obp's own.
"""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from algos import doubly_robust, importance_sampling
from common.datasets import load_dataset
from common.recipes import open_bandit


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A folder with the wheel, in which the tests run."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "obp==0.4.1", "--dest", str(folder)]
    if subprocess.run(command, capture_output=True, timeout=300).returncode:
        pytest.skip("obp 0.4.1 cannot be downloaded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "minari"))
        os.makedirs(folder / "minari")
        yield folder


def estimates(pi, rows):
    """Importance sampling of a policy with the probability `pi` (n,) of each row's item."""
    n = len(pi)
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        columns = rows["click"], np.log(pi), np.log(rows["propensity"])
        episodes = importance_sampling.Episodes(*(x[:, None] for x in columns), np.ones((n, 1), bool))
        importance_sampling.check(episodes)
        return jax.tree.map(float, importance_sampling.estimate(episodes, np.ones(n), 1.0))


@pytest.mark.parametrize(
    "campaign, clicks, sum_of_clicks, sum_of_weights, size",
    [
        ("all", (38, 42), 23.596395, 10111.0917, 340.4),
        ("men", (46, 69), 30.086263, 9433.1363, 655.7),
        ("women", (46, 46), 74.375775, 31341.9002, 2.1),  # one row has the propensity 1e-6, and a weight of 21,739
    ],
)
def test_random_items_from_the_log_of_bts(wheel, campaign, clicks, sum_of_clicks, sum_of_weights, size):
    logs = [open_bandit.read(log, campaign) for log in ("random", "bts")]
    assert tuple(int(x["click"].sum()) for x in logs) == clicks and [len(x["item"]) for x in logs] == [10_000] * 2
    items = open_bandit.CAMPAIGNS[campaign]
    np.testing.assert_allclose(logs[0]["propensity"], 1 / items, rtol=1e-4)
    found = estimates(np.full(10_000, 1 / items), logs[1])
    assert 10_000 * found["IS"] == pytest.approx(sum_of_clicks, abs=1e-5)
    assert found["WIS"] == pytest.approx(sum_of_clicks / sum_of_weights, rel=1e-7)
    assert found["PDIS"] == pytest.approx(found["IS"]) and found["PDWIS"] == pytest.approx(found["WIS"])
    assert found["ESS"] == pytest.approx(size, abs=0.05)
    itself = estimates(logs[1]["propensity"], logs[1])
    assert itself["IS"] == pytest.approx(clicks[1] / 10_000) and itself["ESS"] == pytest.approx(10_000)


@pytest.mark.parametrize(
    "campaign, ipw, snipw, size, dm, dr, dr_constant",
    [
        ("all", 0.00455288, 0.0047758, 1639.5, 0.0045661, 0.0048693, 0.0047303),
        ("men", 0.00453356, 0.0046042, 2467.4, 0.0051529, 0.0046366, 0.0046042),
        ("women", 0.00681347, 0.0068110, 1954.3, 0.0068099, 0.0067979, 0.0068118),
    ],
)
def test_bts_from_the_log_of_random_items(wheel, campaign, ipw, snipw, size, dm, dr, dr_constant):
    rows, pi = open_bandit.read("random", campaign), open_bandit.thompson_sampling(campaign)
    np.testing.assert_allclose(pi.sum(axis=0), 1)
    if campaign == "all":
        np.testing.assert_allclose(pi[[0, 79]], [[0.01078, 0.00931, 0.00917], [0.0582, 0.07603, 0.07998]], atol=1e-9)
    found = estimates(pi[rows["item"], rows["position"]], rows)
    assert (found["IS"], found["WIS"]) == pytest.approx((ipw, snipw), abs=5.1e-8)
    assert found["ESS"] == pytest.approx(size, abs=0.051)
    # The model: an item's share of clicks in this log, whatever the user and the position; or one number for all
    count = np.bincount(rows["item"], minlength=len(pi))
    clicked = np.bincount(rows["item"], weights=rows["click"], minlength=len(pi)) / count
    for q, right in ((clicked, {"DM": dm, "DR": dr}), (np.full(len(pi), rows["click"].mean()), {"DR": dr_constant})):
        columns = rows["click"], np.log(pi[rows["item"], rows["position"]]), np.log(rows["propensity"])
        columns += q[rows["item"]], (pi.T @ q)[rows["position"]]
        with jax.enable_x64(True):
            episodes = doubly_robust.Episodes(*(x[:, None] for x in columns), np.ones((10_000, 1), bool))
            model = doubly_robust.estimate(episodes, np.ones(10_000), 1.0)
        for name, value in right.items():
            assert float(model[name]) == pytest.approx(value, abs=5.1e-8), name


def test_the_dataset_has_one_step_episodes_with_propensities(wheel):
    rows = open_bandit.read("bts", "men")
    data, env = load_dataset("stitch/open-bandit-bts-men-1k-v0", columns=("propensity", "episode"))
    np.testing.assert_array_equal(data.action, rows["item"][:1000])
    np.testing.assert_array_equal(data.reward, rows["click"][:1000])
    np.testing.assert_allclose(data.propensity, rows["propensity"][:1000], rtol=1e-6)
    np.testing.assert_array_equal(data.obs, rows["obs"][:1000])
    assert data.terminal.all() and data.episode[-1] == 999 and env.spec.action_dim == 34
    assert (data.obs.sum(axis=1) == 5).all() and data.obs.shape[1] == open_bandit.read("random", "men")["obs"].shape[1]
    with pytest.raises(SystemExit, match="has 10,000 rows"):
        load_dataset("stitch/open-bandit-bts-men-20k-v0")


def test_without_the_wheel_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="pip download --no-deps obp==0.4.1"):
        load_dataset("stitch/open-bandit-bts-men-v0")
