"""benchmarks/speed.py: which rows it measures, and how it names them. The numbers themselves need a quiet machine."""

import pytest
from test_readme import load_speed

speed = load_speed()


def test_set_makes_a_row_for_each_combination_of_values():
    assert speed.combinations(()) == [{}]
    rows = speed.combinations(("num-critics=10,500", "hidden=[8,8]", "normalize_obs=false", "mode=exp"))
    rest = {"hidden": [8, 8], "normalize_obs": False, "mode": "exp"}
    assert rows == [{"num_critics": 10, **rest}, {"num_critics": 500, **rest}]
    assert speed.label("sac_n", {"num_critics": 10}) == "sac_n num_critics=10" and speed.label("bc", {}) == "bc"


@pytest.mark.parametrize("bad", ["num_critics", "num_critics=", "=3"])
def test_a_setting_without_a_field_or_a_value_is_refused(bad):
    with pytest.raises(SystemExit, match="FIELD=VALUE"):
        speed.combinations((bad,))


def test_a_field_that_the_algorithm_does_not_have_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="bc has no setting num_critics."):
        speed.worker("bc", {"num_critics": 10}, 1, 10, str(tmp_path))
