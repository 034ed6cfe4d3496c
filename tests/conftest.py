import pathlib
import subprocess

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # (n,) against (n, 1) is an error, not a matrix
jax.config.update("jax_disable_most_optimizations", True)  # tiny networks: nearly all time is compilation


GOALS = {"gcbc", "gcivl", "gciql", "hiql", "qrl", "crl", "gc_td3_bc", "actionable_models"}  # need data for goals
EVALUATORS = {"fqe", "importance_sampling", "doubly_robust"}  # files that take a policy and learn none


def project_algos():
    """Names of the files in algos/ that git knows, and of all where there is no git. A file that somebody only tries
    out must satisfy the contract tests, but neither README nor protocols nor tables need have it."""
    root = pathlib.Path(__file__).parents[1]
    listed = subprocess.run(["git", "ls-files", "algos"], cwd=root, capture_output=True, text=True, check=False).stdout
    files = [root / name for name in listed.splitlines()] or (root / "algos").iterdir()
    return sorted(path.stem for path in files if path.suffix == ".py" and path.stem != "__init__")


def pytest_collection_modifyitems(items):
    """Under pytest-xdist's --dist loadgroup, tests that share a compiled algorithm or a run stay in one worker."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        of = params["case"][0] if "case" in params else ""
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{of}"))


@pytest.fixture(scope="session")
def umaze(tmp_path_factory):
    """The U-maze dataset, built once per session in a Minari root of its own."""
    import minari

    from common import recipes

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        recipes.build("stitch/pointmaze-umaze-v0")
        yield minari.load_dataset("stitch/pointmaze-umaze-v0")


@pytest.fixture
def optimised():
    """XLA's optimisations, for tests that train for thousands of updates."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
