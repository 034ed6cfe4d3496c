"""benchmarks/kernels.py: what it reads off a compiled program, and what the programs of two files must not have."""

import importlib.metadata
import json
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from conftest import EVALUATORS, project_algos

TRAIN_NOTHING = EVALUATORS - {"fqe"}

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts that import each other as they do when they are run

import kernels  # noqa: E402

# A loop of 1,000 rounds. One round: a product in a fusion (2 * 8 * 4 * 3 FLOPs), a reduction, a call of two kernels, a
# loop of 3 rounds with one product by a library (2 * 2 * 5 * 6 FLOPs), and what no program should have: a conditional
# with a kernel in each branch, an outfeed, a callback and a copy to the host. That is 1 + 1 + 2 + 3 + 2 + 3 kernels.
# Before the loop, the dataset of 100,000 rows is transposed, and copied flat; the loop's own state is not counted.
PROGRAM = """\
HloModule jit_train, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%product (left: f32[8,3], right: f32[3,4]) -> f32[8,4] {
  %left = f32[8,3]{1,0} parameter(0)
  %right = f32[3,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0:T(8,128)} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%two (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %negate.1 = f32[8,4]{1,0} negate(%x)
  ROOT %copy.1 = f32[8,4]{0,1} copy(%negate.1)
}

%inner (state: (s32[], f32[2,6])) -> (s32[], f32[2,6]) {
  %state = (s32[], f32[2,6]{1,0}) parameter(0)
  %wide = f32[2,6]{1,0} get-tuple-element(%state), index=1
  %square = f32[6,5]{1,0} constant({...})
  %library = (f32[2,5]{1,0}, s8[64]{0}) custom-call(%wide, %square), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %pair = (s32[], f32[2,6]{1,0}) tuple(%state, %wide)
}

%yes (x: f32[]) -> f32[] {
  ROOT %negate.2 = f32[] negate(%x)
}

%no (x: f32[]) -> f32[] {
  ROOT %abs.1 = f32[] abs(%x)
}

%body (state: (s32[], f32[8,3], /*index=2*/f32[3,4])) -> (s32[], f32[8,3], f32[3,4]) {
  %state.1 = (s32[], f32[8,3]{1,0}, /*index=2*/f32[3,4]{1,0}) parameter(0)
  %p = f32[8,3]{1,0} get-tuple-element(%state.1), index=1
  %fusion.1 = f32[8,4]{1,0} fusion(%p, %q), kind=kCustom, calls=%product
  %reduce.1 = f32[] reduce(%fusion.1, %zero), dimensions={0,1}, to_apply=%sum
  %call.1 = f32[8,4]{1,0} call(%fusion.1), to_apply=%two
  %while.2 = (s32[], f32[2,6]{1,0}) while(%start), condition=%three, body=%inner, \
backend_config={"known_trip_count":{"n":"3"}}
  %conditional.1 = f32[] conditional(%flag, %reduce.1, %reduce.1), branch_computations={%yes, %no}
  %outfeed.1 = token[] outfeed(%reduce.1, %token)
  %callback.1 = () custom-call(%reduce.1), custom_call_target="xla_ffi_python_gpu_callback"
  %copy-start.1 = (f32[]{:S(5)}, f32[], u32[]) copy-start(%reduce.1)
  %copy-done.1 = f32[]{:S(5)} copy-done(%copy-start.1)
  ROOT %tuple.1 = (s32[], f32[8,3]{1,0}, f32[3,4]{1,0}) tuple(%i, %p, %q)
}

ENTRY %main (dataset: f32[100000,17], state: f32[8,3]) -> (s32[], f32[8,3], f32[3,4]) {
  %dataset = f32[100000,17]{1,0} parameter(0)
  %transpose.1 = f32[17,100000]{1,0} transpose(%dataset), dimensions={1,0}
  %flat = f32[1700000]{0} copy(%dataset)
  %while.3 = (s32[], f32[8,3]{1,0}) while(%other), condition=%more, body=%inner, \
backend_config={"known_trip_count":{"n":"7"}}
  ROOT %while.1 = (s32[], f32[8,3]{1,0}, /*index=2*/f32[3,4]{1,0}) while(%state), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"1000"},"known_init_step":{"init":"0","step":"1"}}
}
"""
MEMORY = SimpleNamespace(temp_size_in_bytes=640, alias_size_in_bytes=96)
READ = {
    "kernels": 12,
    "products": 4,
    "flops": 2 * 8 * 4 * 3 + 3 * 2 * 2 * 5 * 6,
    "temporary_bytes": 640,
    "conditionals": 1,
    "host_transfers": 3,
    "dataset_copies": 2,
    "donated_bytes": 96,
    "state_bytes": 96,
}


def test_a_program_of_known_numbers():
    assert kernels.read(PROGRAM, MEMORY, 96, rounds=1_000, cycle=1) == READ


def test_numbers_are_those_of_one_update_where_updates_take_turns():
    read = kernels.read(PROGRAM, MEMORY, 96, rounds=1_000, cycle=2)
    assert read["kernels"] == 6 and read["products"] == 2 and read["flops"] == READ["flops"] / 2
    assert read["temporary_bytes"] == 640 and read["conditionals"] == 1


def test_a_program_that_does_not_say_how_often_its_loop_runs():
    """As a TPU's; the other loop runs 7 times and so is none of the updates."""
    assert kernels.read(PROGRAM.replace('"known_trip_count":{"n":"1000"},', ""), MEMORY, 96, 1_000, 1) == READ


def test_a_loop_that_does_not_say_how_often_it_runs_is_not_that_of_the_updates_where_another_says_so():
    """As MOReL's preparation has one."""
    assert kernels.read(PROGRAM.replace('"known_trip_count":{"n":"7"}', ""), MEMORY, 96, 1_000, 1) == READ


def test_two_loops_that_may_be_that_of_the_updates_are_refused():
    for known in ('"known_trip_count":{"n":"1000"}', ""):
        program = PROGRAM.replace('"known_trip_count":{"n":"7"}', known)
        program = program.replace('"known_trip_count":{"n":"1000"},', known and f"{known},")
        with pytest.raises(SystemExit, match="2 loops of the program may be the one of 1000 rounds"):
            kernels.read(program, MEMORY, 96, 1_000, 1)


@pytest.mark.parametrize("n", ["999", "500"])
def test_a_program_without_a_loop_of_updates_is_refused(n):
    with pytest.raises(SystemExit, match="0 loops"):
        kernels.read(PROGRAM.replace('"n":"1000"', f'"n":"{n}"'), MEMORY, 96, 1_000, 1)


def test_a_loop_of_updates_within_another():
    """Where something is prepared before every 250 updates, 4 times."""
    program = PROGRAM.replace("while.1 =", "while.4 =").replace("body=%body", "body=%outer").replace('"1000"', '"4"')
    outer = """\
%outer (state: (s32[], f32[8,3])) -> (s32[], f32[8,3]) {
  %prepared = f32[100000]{0} negate(%reward)
  ROOT %while.1 = (s32[], f32[8,3]{1,0}) while(%state), condition=%less, body=%body, \
backend_config={"known_trip_count":{"n":"250"}}
}
"""
    program = program.replace("ENTRY", outer + "\nENTRY")
    assert kernels.read(program, MEMORY, 96, rounds=250, cycle=1) == READ | {"dataset_copies": 3}


def test_a_product_of_a_tpu():
    """(256, 2, 128) of (256, 2, 17) and, for each of two critics, (17, 128): 2 * 256 * 2 * 128 * 17 FLOPs."""
    rest = "%x, %kernel), window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_0io->b0f"
    one = kernels.Instruction("convolution.1", "f32[256,2,128]{2,0,1}", "convolution", rest)
    shapes = {"x": "f32[256,17,2]{0,1,2}", "kernel": "f32[2,17,128]{2,1,0}"}
    assert kernels.is_product(one) and kernels.product_flops(one, shapes) == 2 * 256 * 2 * 128 * 17


def test_bytes_of_a_state():
    """Four float32, an int32, and for each of two seeds a key of two uint32."""
    states = {"params": jnp.zeros(4), "count": jnp.int32(0), "key": jax.random.split(jax.random.key(0))}
    assert kernels.state_bytes(states) == 16 + 4 + 2 * 8


# --- The result file ---------------------------------------------------------------------------------------


class Lowered:
    """In the place of a program: it compiles to PROGRAM, and says so in `compiled`."""

    compiled, change = [], ""  # (algo, seeds) of what was compiled; what has changed in the text of every program

    def __init__(self, algo, seeds):
        self.of = algo, seeds

    def as_text(self):
        return f"{self.of}{Lowered.change}"

    def compile(self):
        Lowered.compiled.append(self.of)
        return SimpleNamespace(as_text=lambda: PROGRAM, memory_analysis=lambda: MEMORY)


@pytest.fixture
def compiled(monkeypatch):
    """`main`'s programs, without compiling: the list of those that it compiles."""
    monkeypatch.setattr(Lowered, "compiled", [])
    monkeypatch.setattr(Lowered, "change", "")
    monkeypatch.setattr(kernels, "lowered", lambda algo, seeds, target: (Lowered(algo, seeds), 96, 1_000, 1))
    monkeypatch.setattr(kernels, "versions_of", lambda target: {"jax": "1"})
    monkeypatch.setattr(kernels.os, "environ", {})
    return Lowered.compiled


def run(out, *algos, seeds=(1, 16)):
    kernels.main(kernels.Options(algos=algos, seeds=seeds, out=str(out)))
    return json.loads(out.read_text())["results"]


def test_rows_of_the_same_program_and_versions_are_kept(compiled, tmp_path, monkeypatch):
    out = tmp_path / "kernels.json"
    rows = run(out, "bc", "iql")
    assert [(row["algo"], row["seeds"]) for row in rows] == compiled == [("bc", 1), ("bc", 16), ("iql", 1), ("iql", 16)]
    assert {name: rows[0][name] for name in READ} == READ

    compiled.clear()
    assert run(out, "bc") == rows and compiled == []  # those of IQL are not lost
    monkeypatch.setattr(Lowered, "change", "one line")
    assert run(out, "iql")[:2] == rows[:2] and compiled == [("iql", 1), ("iql", 16)]
    compiled.clear()
    monkeypatch.setattr(kernels, "versions_of", lambda target: {"jax": "2"})
    assert len(run(out, "bc")) == 2 and compiled == [("bc", 1), ("bc", 16)]


def test_what_is_read_is_written_at_once(compiled, tmp_path, monkeypatch):
    def fails_at_16(self, before=Lowered.compile):
        if self.of[1] == 16:
            raise RuntimeError("killed")
        return before(self)

    monkeypatch.setattr(Lowered, "compile", fails_at_16)
    with pytest.raises(RuntimeError):
        run(tmp_path / "kernels.json", "bc")
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.json"]
    assert [row["seeds"] for row in json.loads((tmp_path / "kernels.json").read_text())["results"]] == [1]


@pytest.mark.parametrize(
    "target, installed, sentence",
    [
        (
            "h100",
            {},
            "A NVIDIA H100 80GB needs jax-cuda12-plugin==0.9.9: pip install --no-deps jax-cuda12-plugin==0.9.9",
        ),
        ("h100", {"jax-cuda12-plugin": "0.9.8"}, "jax-cuda12-plugin==0.9.9"),
        ("h100", {"jax-cuda12-plugin": "0.9.9"}, "jax-cuda12-pjrt==0.9.9"),
        ("v5e", {}, "a TPU v5e needs libtpu: pip install --no-deps libtpu"),
    ],
)
def test_missing_wheels_are_named(target, installed, sentence, monkeypatch):
    def version(name):
        if name not in installed | {"jax": "", "jaxlib": ""}:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name, "0.9.9")

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit, match=f"(?i){sentence}$"):
        kernels.versions_of(kernels.TARGETS[target])
    installed |= {"jax-cuda12-plugin": "0.9.9", "jax-cuda12-pjrt": "0.9.9", "libtpu": "0.0.1"}
    assert kernels.versions_of(kernels.TARGETS[target])["jax"] == "0.9.9"


def test_the_table_says_what_a_program_should_not_have():
    row = {"algo": "bc", "seeds": 16, **READ, "flops": 1.5e6, "temporary_bytes": 2_500_000, "state_bytes": 4_000_000}
    report = {"results": [row], "device": "D", "date": "2026-01-02T03", "versions": {"jax": "1"}}
    text = kernels.table(report)
    assert "| bc | 16 | 12 | 4 | 2 | 2.5 | 4.0 |" in text
    assert "Conditionals: bc (16): 1; host transfers: bc (16): 3; dataset copies: bc (16): 2; state not donated whole: bc (16)" in text  # fmt: skip  # noqa: E501
    clean = row | {"conditionals": 0, "host_transfers": 0, "dataset_copies": 0, "donated_bytes": 4_000_000}
    assert "Conditionals: none; host transfers: none; dataset copies: none; state not donated whole: none." in (
        kernels.table(report | {"results": [clean]})
    )


def test_the_page_shows_the_result_files():
    page = (ROOT / "benchmarks" / "kernels.md").read_text()
    for target in kernels.TARGETS:
        report = json.loads((RESULTS / f"kernels-{target}.json").read_text())
        assert f"<!-- kernels:{target}:begin -->\n{kernels.table(report)}\n<!-- kernels:{target}:end -->" in page
        assert "dirty" not in report["commit"]


# --- The files' own programs -------------------------------------------------------------------------------

# Kernels of 1 and 16 seeds: no more than these, whatever is committed
AT_MOST = {
    "iql": (92, 72),
    "td3_bc": (60, 50),
    "cql": (109, 94),
    "sac_n": (89, 78),
    "edac": (100, 101),
    "bcq": (161, 122),
}


def committed():
    rows = json.loads((RESULTS / "kernels-h100.json").read_text())["results"]
    return {(row["algo"], row["seeds"]): row for row in rows}


def test_committed_numbers_are_complete_and_no_more_than_agreed():
    rows = committed()
    assert set(kernels.ALGOS) & set(project_algos()) == set(project_algos()) - TRAIN_NOTHING
    algos = set(project_algos()) - TRAIN_NOTHING
    assert set(rows) == {(algo, seeds) for algo in algos for seeds in (1, 16)}
    for algo, limits in AT_MOST.items():
        for seeds, limit in zip((1, 16), limits, strict=True):
            assert rows[algo, seeds]["kernels"] <= limit, (algo, seeds)


def test_the_loop_of_updates_is_told_apart_by_a_number_of_its_own(monkeypatch):
    """Where something is prepared, 251 rounds; else 1,000 in all. What an evaluator evaluates is made for it."""
    device = jax.devices()[0]
    monkeypatch.setattr(
        "jax.experimental.topologies.get_topology_desc", lambda **options: SimpleNamespace(devices=[device])
    )
    target = kernels.Target("here", (), {}, {})
    about = {algo: kernels.lowered(algo, 2, target) for algo in ("bc", "td3_bc", "awr", "fqe")}
    assert {algo: x[2:] for algo, x in about.items()} == {
        "bc": (1_000, 1), "td3_bc": (500, 2), "awr": (251, 1), "fqe": (1_000, 1)
    }  # fmt: skip
    for algo, (program, size, rounds, _) in about.items():
        text = program.as_text()  # StableHLO: a loop ends where its counter is no longer less than a constant
        assert len(re.findall(rf"stablehlo.constant dense<{rounds}> : tensor<i32>", text)) == 1, algo
        assert size > 2 * 4 * 256 * 256, algo


def wheels():
    try:
        kernels.versions_of(kernels.TARGETS["h100"])
    except SystemExit as missing:
        return str(missing)


@pytest.mark.parametrize("algo", ["iql", "td3_bc"])
def test_programs_for_an_h100(algo, tmp_path):
    """In a process of its own: the compiler reads its options when JAX starts."""
    if wheels():
        pytest.skip(wheels())
    command = [sys.executable, ROOT / "benchmarks" / "kernels.py", "--algos", algo, "--out", tmp_path / "kernels.json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert [row["seeds"] for row in rows] == [1, 16]
    for row in rows:
        assert row["conditionals"] == row["host_transfers"] == row["dataset_copies"] == 0
        assert row["donated_bytes"] == row["state_bytes"] > 2_000_000 * row["seeds"]
        assert row["kernels"] <= committed()[algo, row["seeds"]]["kernels"]
