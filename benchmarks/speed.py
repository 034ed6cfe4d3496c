"""How fast the algorithms train on this machine, beside what its matrix products would allow.

    python benchmarks/speed.py                                             # every algorithm, 1 and 8 seeds
    python benchmarks/speed.py --algos iql --seeds 1 --against d3rlpy --python /tmp/d3/bin/python
    python benchmarks/speed.py --algos sac_n edac --seeds 1 --set num_critics=10,50,500    # a row for each

What is measured, at obs 17, action 6 (6 discrete ones, where an algorithm takes no others), hidden 256-256, batch 256,
float32, on 100,000 random transitions:
- Updates per second, of all seeds together, of the program that an algorithm file's own `main` trains with.
  Evaluation, checkpoints and data loading are outside.
- The share of the matrix-product bound. The bound is the rate (FLOP/s) of a 2048 x 2048 x 2048 float32 product, at
  JAX's default precision, over the FLOPs of the matrix products in one update, a mean where updates take turns. The
  rate is the mean of those of two seconds just before and just after each repetition, so that a machine that slows
  down or speeds up, or whose cores others use as well, does so for both.
- Of files that prepare something from the whole dataset along the way (roll-outs in a model, AWR's relabelling): the
  share of the time that this takes. It is in the updates per second, and its products are not in the bound.
- Time to the first update: from the start of a fresh process until one update is done, imports included, with an empty
  compilation cache (cold) and with the one that this left (warm). Loading a dataset, which `main` does, is not in it.
- Peak memory of that process until then, with its 20 MB of random data, and of its accelerator.
- Environment steps per second of an evaluation (16 seeds x 10 episodes of HalfCheetah's first 200 steps, random
  actions), with 1 worker process and with one for each core. No algorithm is in it.

Every (algorithm, number of seeds) runs in processes of its own, since the number of devices of a CPU is fixed once JAX
has started. `--against d3rlpy` runs speed_d3rlpy.py in another Python environment, in turn with ours: ours, theirs,
ours, theirs, ... The processes wait for a line on stdin and do nothing else, so only one of them computes at a time.
"""

import dataclasses
import datetime
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Literal

import tyro

HERE = Path(__file__).resolve().parent
# Files that train by themselves. Three evaluators train, but for the policy of another run, which may be of any size:
# their time would be that of this policy. importance_sampling.py and doubly_robust.py train nothing
EVALUATORS = {"dice", "fqe", "model_evaluation"}
TEXTS = {path.stem: path.read_text() for path in (HERE.parent / "algos").glob("*.py")}
ALGOS = tuple(sorted(name for name, text in TEXTS.items() if "# --- Training" in text and name not in EVALUATORS))
SHAPE = {"obs_dim": 17, "action_dim": 6, "hidden": [256, 256], "batch_size": 256, "rows": 100_000}


@dataclasses.dataclass(frozen=True)
class Options:
    algos: tuple[str, ...] = ALGOS  # files in algos/
    seeds: tuple[int, ...] = (1, 8)  # numbers of seeds trained together
    set: tuple[str, ...] = ()  # FIELD=VALUE[,VALUE...]: fields of Config; a row for each combination of values
    updates: int = 0  # of all seeds together in one repetition; 0: 1,000 on a CPU, 50,000 on an accelerator
    repeats: int = 5  # repetitions; the tables show their medians
    against: Literal["none", "d3rlpy"] = "none"  # another library, run in turn with ours
    python: str = ""  # the Python that has it
    against_updates: int = 150  # its updates in one repetition
    environment: str = (
        "stitch/halfcheetah-medium-20k-v0"  # whose environment is stepped: its episodes all end at the limit. "": none
    )
    out: str = ""  # the result file; by default benchmarks/results/speed-DEVICE.json


# --- The parent: starts processes, asks them in turn, writes the result; never imports JAX --------------------


def main(options: Options):
    unknown = [name for name in options.algos if name not in ALGOS]
    if unknown:
        raise SystemExit(f"There is no algos/{unknown[0]}.py: choose from {', '.join(ALGOS)}.")
    if min(options.seeds) < 1 or options.repeats < 1 or options.updates < 0 or options.against_updates < 1:
        raise SystemExit("--seeds, --repeats and --against-updates must be positive, and --updates not negative.")
    if options.against == "d3rlpy" and (not options.python or options.repeats < 3):
        raise SystemExit("--against d3rlpy needs --python, a Python that has d3rlpy, and at least 3 --repeats.")
    if options.against != "none" and options.set:
        raise SystemExit("--set changes our side alone, so that --against would compare different things: take one.")
    settings = combinations(options.set)
    started, load = time.time(), os.getloadavg()[0]
    if load > 0.5:
        print(f"Other programs are running (load average {load:.1f}): expect low and uneven numbers.", file=sys.stderr)
    commit = subprocess.getoutput(f"git -C {HERE} describe --always --dirty --abbrev=40")
    results, stepping = [], environment_steps(options) if options.environment else None
    for algo, setting, seeds in itertools.product(options.algos, settings, options.seeds):
        print(f"{label(algo, setting)}, {seeds} seed{'s' * (seeds > 1)} ...", file=sys.stderr, flush=True)
        about, row = measure(algo, setting, seeds, options)
        results.append(row)
        report = {
            "command": " ".join(sys.argv),
            "commit": commit,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": about["device"],
            "processor": processor(),
            "cores": os.cpu_count(),
            "load_average": {"before": load, "after": os.getloadavg()[0]},  # before: near 0 on a quiet machine
            "versions": about["versions"],
            "shape": SHAPE,
            "seconds": round(time.time() - started),
            "environment": stepping,
            "results": results,
        }
        slug = "".join(c if c.isalnum() else "-" for c in about["device"].lower())
        out = Path(options.out or HERE / "results" / f"speed-{slug}.json")
        write(out, report)
    print(f"{table(report)}\n\nWritten to {out}")


def write(out: Path, report: dict):
    """After each row and in one step, so that a run that ends early leaves a whole file of what it measured."""
    out.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.part").write_text(json.dumps(report, indent=2) + "\n")
    os.replace(f"{out}.part", out)


def combinations(chosen):
    """[{"num_critics": 10}, {"num_critics": 50}] of ("num_critics=10,50",); values are JSON or else words."""
    fields = {}
    for setting in chosen:
        name, separator, values = setting.partition("=")
        if not (name and separator and values):
            raise SystemExit(f"--set takes FIELD=VALUE[,VALUE...], not {setting}.")
        try:
            fields[name.replace("-", "_")] = json.loads(f"[{values}]")
        except json.JSONDecodeError:
            fields[name.replace("-", "_")] = values.split(",")
    return [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]


def label(algo, setting):
    return " ".join([algo, *(f"{name}={value}" for name, value in setting.items())])


def measure(algo, setting, seeds, options):
    """(device and versions, one row of the results). Its lists have one number for each repetition."""
    with tempfile.TemporaryDirectory() as cache:
        job = {"algo": algo, "setting": setting, "seeds": seeds, "updates": options.updates, "cache": cache}
        command = [sys.executable, __file__, "worker", json.dumps(job)]
        first = Worker(command)
        cold = first.ask("first")
        first.close()
        ours = Worker(command)
        warm = ours.ask("first")
        about = ours.ask("about")
        theirs = None
        if options.against == "d3rlpy":
            job = json.dumps({"algo": algo, "updates": options.against_updates, **SHAPE})
            theirs = Worker([options.python, str(HERE / "speed_d3rlpy.py"), job])
            versions, their_rate = theirs.ask("about"), []
        product_rate, our_rate, prepares = [ours.ask("product")], [], []
        for _ in range(options.repeats):
            our_rate.append(ours.ask("train"))
            if about["prepares"]:
                prepares.append(ours.ask("prepare"))
            product_rate.append(ours.ask("product"))
            if theirs:
                their_rate.append(theirs.ask("train"))
        ours.close()

    bound = bounds(product_rate, about["flops_per_update"])
    row = {
        "algo": algo,
        "setting": setting,
        "seeds": seeds,
        "devices": about["devices"],
        "updates_per_repetition": about["updates_per_repetition"],  # of all seeds together
        "flops_per_update": about["flops_per_update"],  # of one seed's matrix products
        "updates_per_second": our_rate,  # of all seeds together
        "product_flops_per_second": product_rate,  # before the first repetition and after each
        "bound_updates_per_second": bound,
        "share_of_bound": ratios(our_rate, bound),
        "first_update_seconds": {"cold": cold["seconds"], "warm": warm["seconds"]},
        "peak_memory_mb": {"cold": cold["memory_mb"], "warm": warm["memory_mb"]},
        "peak_device_memory_mb": cold["device_memory_mb"],  # None on a CPU
    }
    if prepares:
        row["prepare_share"] = prepare_share(prepares, about["prepares"], about["updates_per_repetition"], our_rate)
    if theirs:
        theirs.close()
        row["d3rlpy"] = {
            "updates_per_repetition": options.against_updates,
            "versions": versions,
            "updates_per_second": their_rate,
            "ratio_of_each_pair": ratios(our_rate, their_rate),
            "ratio_of_medians": statistics.median(our_rate) / statistics.median(their_rate),
        }
    return about, row


def bounds(product_rate, flops):
    """Updates per second that the products allow, one for each repetition: it lies between two measured rates."""
    return [statistics.mean(pair) / flops for pair in itertools.pairwise(product_rate)]


def ratios(ours, others):
    return [a / b for a, b in zip(ours, others, strict=True)]


def prepare_share(seconds, times, updates, rates):
    """Share of each repetition that its preparations take: `times` of these `seconds`, measured beside it."""
    return [one * times / (updates / rate) for one, rate in zip(seconds, rates, strict=True)]


def environment_steps(options):
    """Steps per second of the evaluation of `options.environment`, one number for each repetition. The numbers of
    workers take turns, so that what a machine does besides slows them all."""
    rates, workers = {str(number): [] for number in sorted({1, os.cpu_count()})}, []
    for number in rates:
        job = json.dumps({"dataset": options.environment, "workers": int(number)})
        workers.append(Worker([sys.executable, __file__, "environment", job]))
    for _ in range(options.repeats):
        for number, worker in zip(rates, workers, strict=True):
            rates[number].append(worker.ask("step"))
    for worker in workers:
        worker.close()
    return {"dataset": options.environment, "steps_per_second": rates}


class Worker:
    """A process that answers each line on its stdin with one line of JSON; what else it prints is passed over."""

    def __init__(self, command):
        # The time of the start goes along: a process cannot tell how long it took to come to life
        environ = os.environ | {"STITCH_STARTED": repr(time.time())}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)

    def ask(self, question):
        try:
            self.process.stdin.write(question + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the loop below finds its output at an end
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        status = self.process.wait()
        raise SystemExit(f"{' '.join(self.process.args[:3])} ended with status {status}: its message is above.")

    def close(self):
        self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()


def processor():
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def table(report):
    """The results as Markdown, fastest first: medians of the repetitions and, in brackets, the lowest and highest."""
    rows = sorted(report["results"], key=lambda row: -statistics.median(row["updates_per_second"]))
    head = ["algorithm", "seeds", "updates/s, all seeds", "of the matrix-product bound", "first update: cold, warm",
            "peak memory"]  # fmt: skip
    prepares = any("prepare_share" in row for row in rows)
    if prepares:
        head.insert(3, "of it, roll-outs or relabelling")
    if "d3rlpy" in rows[0]:
        head += ["d3rlpy on the CPU, 1 seed, updates/s", "ours / d3rlpy"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        seconds, memory = row["first_update_seconds"], f"{row['peak_memory_mb']['cold']:,.0f} MB"
        if row["peak_device_memory_mb"] is not None:
            memory += f", device {row['peak_device_memory_mb']:,.0f} MB"
        rate, share = spread(row["updates_per_second"]), spread(row["share_of_bound"], ".0%")
        first_update = f"{seconds['cold']:.1f} s, {seconds['warm']:.1f} s"
        cells = [label(row["algo"], row.get("setting", {})), str(row["seeds"]), rate, share, first_update, memory]
        if prepares:
            cells.insert(3, spread(row["prepare_share"], ".0%") if "prepare_share" in row else "–")
        if "d3rlpy" in row:
            pairs = row["d3rlpy"]["ratio_of_each_pair"]
            ratio = f"{row['d3rlpy']['ratio_of_medians']:.1f} ({min(pairs):.1f} to {max(pairs):.1f})"
            cells += [spread(row["d3rlpy"]["updates_per_second"]), ratio]
        lines.append(cells)
    products = [rate / 1e9 for row in rows for rate in row["product_flops_per_second"]]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    foot = (
        f"Medians of {len(rows[0]['updates_per_second'])} repetitions (lowest to highest), on {report['date'][:10]}. "
        f"Device: {report['device']}; {report['processor']}, {report['cores']} cores. {versions}. "
        f"A 2048-cubed float32 product: {spread(products)} GFLOP/s."
    )
    if report.get("environment"):
        rates = report["environment"]["steps_per_second"]
        said = "; ".join(f"{spread(rate)} with {n} worker{'s' * (n != '1')}" for n, rate in rates.items())
        foot += f" Environment steps/s of `{report['environment']['dataset']}`: {said}"
        alone, *together = rates.values()
        for rate in together:  # as measured in turn
            ratios = [one / other for one, other in zip(rate, alone, strict=True)]
            foot += f", {spread(ratios, '.2f')} times as many"
        foot += "."
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + foot


def spread(values, form=None):
    form = form or (",.0f" if min(values) >= 10 else ",.1f")
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


# --- A worker: one algorithm and number of seeds ----------------------------------------------------------


def problem(algo: str, setting: dict, **counts):
    """(module of algos/, its Config at SHAPE, Interface, random dataset): the actions are continuous where they may be.

    `setting` are fields of Config that a user asked for, and `counts` ours.
    """
    sys.path.insert(0, str(HERE.parent))  # this checkout, installed or not
    import numpy as np

    from common.datasets import Transition
    from common.environments import Interface

    module = importlib.import_module(f"algos.{algo}")
    unknown = setting.keys() - {field.name for field in dataclasses.fields(module.Config)}
    if unknown:
        raise SystemExit(f"{algo} has no setting {', '.join(sorted(unknown))}.")
    cfg = module.Config(batch_size=SHAPE["batch_size"], hidden=tuple(SHAPE["hidden"]), num_updates=1_000_000, **counts)
    setting = {name: tuple(value) if isinstance(value, list) else value for name, value in setting.items()}
    cfg = dataclasses.replace(cfg, **setting)
    part = getattr(cfg, "prepare_interval", getattr(cfg, "policy_delay", 1))  # log_interval is a multiple of it
    cfg = dataclasses.replace(cfg, log_interval=-(-cfg.log_interval // part) * part)
    obs_dim, action_dim, rows = SHAPE["obs_dim"], SHAPE["action_dim"], SHAPE["rows"]
    box = {"low": [-1.0] * action_dim, "high": [1.0] * action_dim, "dtype": "float32"}
    goal = [obs_dim] if "goals=True" in TEXTS[algo] else None  # a whole observation, behind that of the policy
    width = 2 * obs_dim if goal else obs_dim
    as_it_is = [0.0] * width, [1.0] * width
    interface = Interface([obs_dim], box, *as_it_is, goal=goal)
    try:
        module.make_agent(cfg, interface.spec)
    except SystemExit as refusal:
        if "needs discrete actions" not in str(refusal):
            raise
        interface = Interface([obs_dim], {"n": action_dim, "start": 0}, *as_it_is, goal=goal)
    rng = np.random.default_rng(0)

    def actions():
        if interface.spec.discrete:
            return rng.integers(action_dim, size=rows, dtype=np.int32)
        return rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32)

    dataset = Transition(
        obs=rng.standard_normal((rows, obs_dim), np.float32),
        action=actions(),
        reward=rng.standard_normal(rows, np.float32),
        next_obs=rng.standard_normal((rows, obs_dim), np.float32),
        terminal=(rng.random(rows) < 0.001).astype(np.float32),
        # The optional columns, whether the algorithm needs them or not: XLA drops what no update reads
        next_action=actions(),
        episode=np.arange(rows, dtype=np.int32) // 1_000,
        return_to_go=rng.standard_normal(rows, np.float32),
        end=np.minimum(np.arange(rows, dtype=np.int32) // 1_000 * 1_000 + 999, rows - 1),
        timestep=np.arange(rows, dtype=np.int32) % 1_000,
    )
    return module, cfg, interface, dataset


def trainer(module, cfg, interface, dataset):
    """(devices, step, prepare): `step()` makes log_interval updates of each seed, as the file's `main` does.

    `prepare()` is the part of it that comes before every prepare_interval updates; None where there is none.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    runs = module.Runs(cfg, interface, {})
    runs.states = runs.init()
    shared = {"dataset": jax.device_put(dataset, NamedSharding(runs.mesh, PartitionSpec()))}
    train = runs.lower("update", shared).compile()

    def step():
        runs.states, metrics = train(runs.fields, (runs.states,), shared)
        return runs.states, metrics

    def prepare():
        return preparation(runs.fields, (runs.states,), shared)

    preparation = runs.every(lambda cfg, agent, state, dataset: agent.prepare(state, dataset)[0])
    return list(runs.mesh.devices), step, prepare if "prepare" in module.Agent._fields else None


def worker(algo: str, setting: dict, seeds: int, updates: int, cache: str):
    """Trains as the algorithm file's `main` does, on random data, when its stdin says so."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_num_cpu_devices", math.gcd(seeds, os.cpu_count()))
    jax.config.update("jax_compilation_cache_dir", cache)
    on_cpu = jax.default_backend() == "cpu"
    each = max(1, (updates or (1_000 if on_cpu else 50_000)) // seeds)  # updates of one seed in a compiled call
    module, cfg, interface, dataset = problem(algo, setting, num_seeds=seeds, log_interval=each)
    each = cfg.log_interval
    devices, step, prepare = trainer(module, cfg, interface, dataset)
    ready = time.time()
    first = first_update(float(os.environ["STITCH_STARTED"]), ready, seconds_of(step), each)
    in_use = [device.memory_stats() for device in devices]
    peaks = [stats["peak_bytes_in_use"] / 2**20 for stats in in_use if stats]
    memory = {"memory_mb": peak_memory_mb(), "device_memory_mb": max(peaks, default=None)}

    # A CPU's products run on all its cores, whatever the number of devices that JAX splits it into
    side, in_a_row = 2048, 1 if on_cpu else 50  # an accelerator is done with one before the next is sent
    matrix = jnp.asarray(np.random.default_rng(0).standard_normal((side, side), np.float32)) / side**0.5

    @jax.jit
    def products(x):
        for _ in range(in_a_row):
            x = x @ matrix
        return x

    jax.block_until_ready(products(matrix))

    for question in sys.stdin:
        if question == "first\n":
            answer = {"seconds": first, **memory}
        elif question == "about\n":
            packages = ("jax", "jaxlib", "flax", "optax", "numpy")
            versions = {name: importlib.metadata.version(name) for name in packages}
            answer = {
                "device": devices[0].device_kind,
                "devices": len(devices),
                "versions": {"python": platform.python_version(), **versions},
                "updates_per_repetition": each * seeds,
                "prepares": each // cfg.prepare_interval if prepare else 0,  # in a repetition
                "flops_per_update": flops_per_update(module.make_agent(cfg, interface.spec), module.draw, dataset, cfg),
            }
        elif question == "train\n":
            answer = updates_per_second(each, seeds, seconds_of(step))
        elif question == "prepare\n":
            answer = min(seconds_of(prepare) for _ in range(2))  # the first of them may compile it
        elif question == "product\n":
            # For seconds on end, as the training: the best of a few would be the machine's best moment
            count, seconds = 0, 0.0
            while seconds < 2:
                seconds += seconds_of(lambda: products(matrix))
                count += in_a_row
            answer = product_flops_per_second(side, count, seconds, 1 if on_cpu else len(devices))
        print("ANSWER " + json.dumps(answer), flush=True)


def seconds_of(call, clock=time.perf_counter):
    """Seconds until the result of `call()` is there: JAX hands it back before it is computed."""
    import jax

    begun = clock()
    jax.block_until_ready(call())
    return clock() - begun


def first_update(started, ready, seconds, updates):
    """Seconds from a process's start to its first update, one of `updates` equal ones in a call that took `seconds`."""
    return ready - started + seconds / updates


def updates_per_second(updates, seeds, seconds):
    """Of all seeds together, each of which made `updates`."""
    return updates * seeds / seconds


def product_flops_per_second(side, count, seconds, devices):
    """The rate of all devices, one of which made `count` products of side x side matrices."""
    return 2 * side**3 * count / seconds * devices


def environment(dataset: str, workers: int):
    """Plays evaluation episodes with random actions when its stdin says so, and answers with steps per second."""
    sys.path.insert(0, str(HERE.parent))
    import numpy as np

    from common.datasets import load_dataset

    _, env = load_dataset(dataset)
    env.num_workers = workers
    rng, steps = np.random.default_rng(0), 0

    def policy(obs, step, memory, last_rewards):
        nonlocal steps
        steps += obs.shape[0] * obs.shape[1]  # no episode of HalfCheetah ends before
        return rng.uniform(-1, 1, (*obs.shape[:2], env.spec.action_dim)).astype(np.float32), memory

    play = partial(env.evaluate, policy, range(16), 10, max_steps=200)
    play()  # makes the environments
    for _ in sys.stdin:
        steps, begun = 0, time.perf_counter()
        play()
        print("ANSWER " + json.dumps(steps / (time.perf_counter() - begun)), flush=True)


def peak_memory_mb():
    """The most memory that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def flops_per_update(agent, draw, dataset, cfg):
    """FLOPs of the matrix products of one seed's update: the mean of those that take turns in a file with a delay."""
    import jax

    key = jax.random.key(0)
    state = jax.eval_shape(agent.init, key)
    prepare = getattr(agent, "prepare", lambda *unchanged: unchanged)
    _, rows = jax.eval_shape(prepare, state, dataset)
    draw = getattr(agent, "draw", draw)
    batch = jax.eval_shape(lambda *args: draw(*args, cfg), key, rows, state)  # of goals or windows, where it has them
    cycle = getattr(agent, "cycle", (agent.update,))
    return statistics.mean(product_flops(jax.make_jaxpr(update)(state, batch).jaxpr) for update in cycle)


def product_flops(jaxpr):
    """FLOPs of the matrix products in a jaxpr, a multiplication and an addition counting one each."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(product_flops(sub) for value in eqn.params.values() for sub in jaxprs(value))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "scan":
            total += inner * eqn.params["length"]
        elif eqn.primitive.name in ("while", "cond") and inner:
            name = eqn.primitive.name
            raise SystemExit(f"The update has matrix products in a {name}: their number is not known from shapes.")
        else:
            total += inner
    return total


def jaxprs(value):
    """The jaxprs in one parameter of an equation."""
    values = value if isinstance(value, tuple | list) else [value]
    values = [getattr(v, "jaxpr", v) for v in values]  # of a ClosedJaxpr
    return [v for v in values if hasattr(v, "eqns")]


if __name__ == "__main__":
    if sys.argv[1:2] in (["worker"], ["environment"]):
        {"worker": worker, "environment": environment}[sys.argv[1]](**json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Options, description=__doc__.splitlines()[0]))
