import gc
import os
import pathlib
import subprocess

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")  # (n,) against (n, 1) is an error, not a matrix
jax.config.update("jax_disable_most_optimizations", True)  # tiny networks: nearly all time is compilation
gc.set_threshold(100_000)  # tracing makes many small objects: to look for cycles among them took a tenth of the time
if jax.__version_info__[:2] == (0, 10):  # XLA ends the process at a flag that it does not know, and versions differ
    # A fourth of the compilation; it must be said before the first one. Processes that tests start inherit it
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick} --xla_cpu_parallel_codegen_split_count=1"


GOALS = {"gcbc", "gcivl", "gciql", "hiql", "qrl", "crl", "gc_td3_bc", "actionable_models"}  # need data for goals
# Files that take a policy and learn none
EVALUATORS = {"fqe", "importance_sampling", "doubly_robust", "dice", "model_evaluation"}


def project_algos():
    """Names of the files in algos/ that git knows, and of all where there is no git. A file that somebody only tries
    out must satisfy the contract tests, but neither README nor protocols nor tables need have it."""
    root = pathlib.Path(__file__).parents[1]
    listed = subprocess.run(["git", "ls-files", "algos"], cwd=root, capture_output=True, text=True, check=False).stdout
    files = [root / name for name in listed.splitlines()] or (root / "algos").iterdir()
    return sorted(path.stem for path in files if path.suffix == ".py" and path.stem != "__init__")


def pytest_collection_modifyitems(items):
    """Under pytest-xdist's --dist loadgroup, tests that share a compiled algorithm or a run stay in one worker.

    Workers take the groups in this order. The small ones, of one algorithm each, come last: so all workers end at once.
    """

    def algorithm(item):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.path.stem not in ("test_contract", "test_run"):
            return ""
        return params["case"][0] if "case" in params else params.get("name", params.get("algo", ""))

    for item in items:
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{algorithm(item)}"))
    items.sort(key=lambda item: algorithm(item) != "")


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
def root(tmp_path, monkeypatch):
    """An empty Minari root."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def optimised():
    """XLA's optimisations, for tests that train for thousands of updates."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
