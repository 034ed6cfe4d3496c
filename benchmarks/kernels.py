"""What an accelerator would run for one update of each algorithm, read off its compiled program, without one.

    pip install -e '.[aot]'                                          # the CUDA compiler of JAX's own version, 182 MB
    python benchmarks/kernels.py                                     # every algorithm on an H100, 1 and 16 seeds
    python benchmarks/kernels.py --target v5e --algos iql td3_bc     # on a TPU v5e: pip install libtpu

Small networks are launch-bound on a GPU: how long an update takes is about the number of its kernels. JAX compiles for
a device that is not there, so they can be counted anywhere. The program is the one that an algorithm file's own `main`
trains with, at speed.py's shapes. Autotuning is off: without the device, no kernel can be chosen by timing it.

What is read off the optimised program, in its loop of updates, which is the only one that runs so often:
- Kernels of one update, the mean where updates take turns. On a TPU: instructions. What is done once in many updates
  (AWR's relabelling, a model's roll-outs) is not in it.
- Matrix products among them, and their FLOPs, of all seeds together. A product with a vector is a reduction to the
  compiler and is not counted.
- Conditionals and transfers to the host, which stop the device until the host has answered. There should be none.
- Dataset copies: kernels anywhere in the program whose result is as long as the dataset. There should be none, but for
  what a preparation computes itself: columns (AWR), or row numbers in the order in which roll-outs begin (MBPO and its
  relatives).
- Where Triton finds no tile for a product (DT's attention), it is not used. With a device, autotuning would decide.
- Donated bytes: of the state that the new one replaces in place. Were it not all of it, a state would be held twice.

A program takes 5 to 80 s. The result file is written after each; rows of the same program and versions are kept, and
only what has changed is compiled again.

Where these wheels are installed and no GPU is, JAX prints at every start that it cannot load CUDA, and uses the CPU:
install them into a virtual environment of their own, or set JAX_PLATFORMS=cpu.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

import speed  # benchmarks/speed.py
import tyro

HERE = Path(__file__).resolve().parent
UPDATES = 1_000  # of the compiled call
PREPARED = 251  # updates of one preparation: a prime, so that no loop of a preparation runs as often
EVALUATORS = ("fqe",)  # their programs hold a policy
ALGOS = tuple(sorted({*speed.ALGOS, *EVALUATORS}))


class Target(NamedTuple):
    name: str
    packages: tuple[str, ...]  # whose versions decide what is compiled
    environment: dict[str, str]  # of the process, before JAX is imported
    topology: dict  # arguments of jax.experimental.topologies.get_topology_desc


TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB",
        ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt"),
        {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": "--xla_gpu_autotune_level=0"},
        {"platform": "cuda", "topology": "1x1x1", "target_config": (HERE / "h100.txtpb").read_text()},
    ),
    "v5e": Target(
        "TPU v5e",
        ("jax", "jaxlib", "libtpu"),
        {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"},
        {"platform": "tpu", "topology_name": "v5e:1x1x1", "chips_per_host_bounds": (1, 1, 1)},
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    algos: tuple[str, ...] = ALGOS  # files in algos/
    seeds: tuple[int, ...] = (1, 16)  # numbers of seeds trained together
    target: Literal["h100", "v5e"] = "h100"  # the device that need not be there
    out: str = ""  # the result file; by default benchmarks/results/kernels-TARGET.json, with the table in kernels.md


def main(options: Options):
    unknown = [name for name in options.algos if name not in ALGOS]
    if unknown:
        raise SystemExit(f"There is no algos/{unknown[0]}.py: choose from {', '.join(ALGOS)}.")
    target = TARGETS[options.target]
    versions = versions_of(target)
    # The host's own JAX computes nothing, and must not take a GPU that is there
    os.environ.update(target.environment | {"JAX_PLATFORMS": "cpu"})
    out = Path(options.out or HERE / "results" / f"kernels-{options.target}.json")
    old = json.loads(out.read_text()) if out.exists() else {"results": []}
    rows = {(row["algo"], row["seeds"]): row for row in old["results"] if old["versions"] == versions}
    commit = subprocess.getoutput(f"git -C {HERE} describe --always --dirty --abbrev=40")  # not with our own file in it
    for algo, seeds in itertools.product(options.algos, options.seeds):
        started = time.perf_counter()
        program, *about = lowered(algo, seeds, target)
        name = hashlib.sha256(f"{program.as_text()}{target.topology}".encode()).hexdigest()[:16]
        if rows.get((algo, seeds), {}).get("program") == name:
            continue
        program = compiled(program)
        numbers = read(program.as_text(), program.memory_analysis(), *about)
        rows[algo, seeds] = row = {"algo": algo, "seeds": seeds, **numbers, "program": name}
        print(f"{algo}, {seeds}: {row['kernels']:g} kernels, {time.perf_counter() - started:.0f} s", file=sys.stderr)
        report = {
            "command": " ".join(sys.argv),
            "commit": commit,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": target.name,
            "versions": versions,
            "shape": speed.SHAPE,
            "results": [rows[key] for key in sorted(rows)],
        }
        speed.write(out, report)
    report = json.loads(out.read_text())
    print(f"{table(report)}\n\nWritten to {out}")
    if not options.out:
        write_page(options.target, report)


def versions_of(target):
    versions = {}
    for name in target.packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
        wanted = versions["jax"] if name.startswith("jax-cuda") else versions.get(name)
        if versions.get(name) != wanted or wanted is None:
            wanted = f"{name}=={wanted}" if wanted else name
            raise SystemExit(f"Compiling for a {target.name} needs {wanted}: pip install --no-deps {wanted}")
    return versions


# --- The program -----------------------------------------------------------------------------------------


def compiled(program):
    """Compiled; without Triton where that has no tile for a product, and no autotuner looks for another way."""
    import jax

    try:
        return program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        return program.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def lowered(algo: str, seeds: int, target: Target):
    """The file's own program, not yet compiled, bytes of its state, rounds of its loop, and updates in a round."""
    import jax
    from jax.experimental import topologies

    setting = {"policy": policy(seeds)} if algo in EVALUATORS else {}
    module, cfg, interface, dataset = speed.problem(algo, setting, num_seeds=seeds, log_interval=UPDATES)
    if hasattr(cfg, "prepare_interval"):
        cfg = dataclasses.replace(cfg, prepare_interval=PREPARED, log_interval=4 * PREPARED)
    runs = module.Runs(cfg, interface, {})
    runs.states = jax.eval_shape(runs.init)
    (device,) = topologies.get_topology_desc(**target.topology).devices
    runs.mesh = jax.sharding.Mesh([device], runs.mesh.axis_names)
    program = runs.lower("update", {"dataset": dataset})
    cycle = len(getattr(module.make_agent(cfg, interface.spec), "cycle", "1"))
    rounds = getattr(cfg, "prepare_interval", UPDATES) // cycle
    return program, state_bytes(runs.states), rounds, cycle


def policy(seeds: int):
    """The run folder of an untrained BC policy for each seed, which an evaluator reads."""
    bc, cfg, interface, _ = speed.problem("bc", {}, num_seeds=seeds)
    runs, folder = bc.Runs(cfg, interface, {}), Path(tempfile.mkdtemp())
    runs.states = runs.init()
    runs.save(folder)
    config = {"algo": "bc", **dataclasses.asdict(cfg), "grid": {}}
    bc.write(folder / "config.json", {"config": config, "interface": list(interface)})
    return str(folder)


def state_bytes(states):
    import jax

    def size(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.eval_shape(jax.random.key_data, x)
        return math.prod(x.shape) * x.dtype.itemsize

    return sum(map(size, jax.tree.leaves(states)))


# --- Reading it ------------------------------------------------------------------------------------------

CONTROL = {"while", "call", "conditional"}  # they run computations of kernels; whatever else runs any is one kernel
NO_KERNEL = CONTROL | {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "opt-barrier",
                       "copy-done", "async-done", "async-update"}  # fmt: skip
TO_HOST = {"infeed", "outfeed", "send", "recv"}


class Instruction(NamedTuple):
    name: str
    shape: str  # "f32[256,17]{1,0}", or "(s32[], f32[2])" of several results
    opcode: str
    rest: str  # operands and attributes


def computations(text):
    """{name: instructions} of an HLO module's text; the program itself is "ENTRY"."""
    found, lines = {}, None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif one := re.match(r" +(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)", line):
            lines.append(Instruction(*one.groups()))
    return found


def called(one):
    """Names of the computations that an instruction runs as a part of itself."""
    names = re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)", one.rest)
    branches = re.search(r"branch_computations=\{(.*?)\}", one.rest)
    return names + re.findall(r"[\w.-]+", branches[1] if branches else "")


def trips(one):
    """How often a `while` runs its body; 1 where that is not known before it runs, and for anything else."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.rest)
    return int(known[1]) if known else 1


def walk(program, name, count=1, inside=False):
    """Yields (instruction, computation, how often it runs, whether it starts a kernel) of all that `name` runs.

    The branches of a conditional count as if all of them ran.
    """
    for one in program[name]:
        yield one, name, count, not inside and one.opcode not in NO_KERNEL
        for sub in called(one):
            yield from walk(program, sub, count * trips(one), inside or one.opcode not in CONTROL)


def sizes(shape):
    """[[256, 17]] of "f32[256,17]{1,0}": one list for each result."""
    return [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w\[([\d,]*)\]", shape)]


def is_product(one):
    return one.opcode in ("dot", "convolution") or "gemm" in one.rest and one.opcode == "custom-call"


def product_flops(one, shapes):
    """FLOPs of a matrix product, a multiplication and an addition counting one each; `shapes` by instruction's name."""
    left, right = [sizes(shapes[name])[0] for name in re.findall(r"%([\w.-]+)", one.rest)[:2]]
    out = sizes(one.shape)[0]
    if one.opcode == "convolution":  # a TPU's form of a product: dim_labels=bf_io->bf, i the contracted axis
        return 2 * math.prod(out) * right[re.search(r"dim_labels=\w+_(\w+)->", one.rest)[1].index("i")]
    axes = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{[]([\d,"]*)', one.rest)[1].replace('"', "")
    return 2 * math.prod(out) * math.prod(left[int(axis)] for axis in axes.split(","))


def read(text, memory, state_size, rounds, cycle):
    """The numbers of one program. Its loop of updates is the one that runs `rounds` times, with `cycle` in each."""
    program = computations(text)
    shapes = {name: {one.name: one.shape for one in ones} for name, ones in program.items()}
    loops = [one for one, *_ in walk(program, "ENTRY") if one.opcode == "while"]
    loops = [one for one in loops if trips(one) == rounds] or [one for one in loops if trips(one) == 1]  # as on a TPU
    if len(loops) != 1:
        raise SystemExit(f"{len(loops)} loops of the program may be the one of {rounds} rounds of updates.")
    (body,) = called(loops[0])
    loop = list(walk(program, body))
    products = [(product_flops(one, shapes[home]), count) for one, home, count, _ in loop if is_product(one)]
    return {
        "kernels": sum(count for _, _, count, starts in loop if starts) / cycle,
        "products": sum(count for _, count in products) / cycle,
        "flops": sum(flops * count for flops, count in products) / cycle,
        "temporary_bytes": memory.temp_size_in_bytes,
        "conditionals": sum(one.opcode == "conditional" for one, *_ in loop),
        "host_transfers": sum(map(to_host, (one for one, *_ in loop))),
        "dataset_copies": sum(starts and long(one) for one, _, _, starts in walk(program, "ENTRY")),
        "donated_bytes": memory.alias_size_in_bytes,
        "state_bytes": state_size,
    }


def long(one):
    """Whether a result is as long as the dataset, or a multiple of it, as a flat copy would be."""
    return any(n and n % speed.SHAPE["rows"] == 0 for dims in sizes(one.shape) for n in dims)


def to_host(one):
    """Whether an instruction waits for the host: its own kind, a callback, or a copy to the host's memory, S(5)."""
    copied = one.opcode in ("copy", "copy-start") and "S(5)" in one.shape
    return copied or one.opcode in TO_HOST or "callback" in one.rest


# --- The table -------------------------------------------------------------------------------------------


def table(report):
    """The results as Markdown, a line for each algorithm and number of seeds."""
    head = ["algorithm", "seeds", "kernels", "matrix products", "their MFLOPs", "temporary MB", "state MB"]
    lines = [head, ["---"] + ["--:"] * (len(head) - 1)]
    for row in report["results"]:
        numbers = [
            f"{row['flops'] / 1e6:,.0f}",
            *(f"{row[name] / 1e6:,.1f}" for name in ("temporary_bytes", "state_bytes")),
        ]
        lines.append([row["algo"], str(row["seeds"]), f"{row['kernels']:g}", f"{row['products']:g}", *numbers])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    foot = f"Compiled for: {report['device']}, on {report['date'][:10]}. {versions}. {faults(report)}"
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot


def faults(report):
    """One sentence on what no program should have."""
    found = {"conditionals": [], "host_transfers": [], "dataset_copies": []}
    for row, name in itertools.product(report["results"], found):
        found[name] += [f"{row['algo']} ({row['seeds']}): {row[name]}"] if row[name] else []
    said = [f"{name.replace('_', ' ')}: {', '.join(rows) or 'none'}" for name, rows in found.items()]
    # More is no fault: a TPU's bytes have the padding of its tiles
    kept = [f"{x['algo']} ({x['seeds']})" for x in report["results"] if x["donated_bytes"] < x["state_bytes"]]
    return f"{'; '.join(said).capitalize()}; state not donated whole: {', '.join(kept) or 'none'}."


def write_page(target, report, page=HERE / "kernels.md"):
    """Puts the table between the target's marks of the page."""
    begin, end = (f"<!-- kernels:{target}:{which} -->" for which in ("begin", "end"))
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{table(report)}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    os.nice(19)  # a background job of some minutes
    main(tyro.cli(Options, description=__doc__.splitlines()[0]))
