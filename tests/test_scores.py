"""benchmarks/scores.md: what it says of a table is in the committed result files."""

import json
import pathlib

import numpy as np

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
WORDS = " ".join((BENCHMARKS / "scores.md").read_text().split())


def lines(cell, evaluation=-1):
    """Of each seed, its line of an evaluation."""
    text = (BENCHMARKS / "results" / cell / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    step = sorted({row["step"] for row in rows})[evaluation]
    return [row for row in rows if row["step"] == step]


def column(cell, name, evaluation=-1):
    return np.concatenate([np.atleast_1d(row[name]) for row in lines(cell, evaluation)])


def both_ends(numbers, places=0):
    return f"{min(numbers):.{places}f} to {max(numbers):.{places}f}".replace("-", "−")


def test_play():
    def solved(method, evaluation=-1):  # -1 in each of 200 steps until then
        return (column(f"play/cube-single-play-100k-v0/{method}", "returns", evaluation) > -200).sum()

    last = {name: solved(name) for name in ("fql", "iql", "qc", "qc-fql", "idql", "ifql", "edp")}
    assert last["iql"] == last["qc"]
    text = "FQL puts the cube to its place in {fql} of them, IQL and QC in {iql}, QC-FQL in {qc-fql}, EDP in {edp}, "
    rest = (
        f"IDQL in {last['idql']}, IFQL in {last['ifql']}, Diffusion-QL in {solved('diffusion_ql')}, and BC and ReBRAC"
    )
    assert text.format(**last) + rest in WORDS and solved("bc") == solved("rebrac") == 0
    first = {name: solved(name, 0) for name in last}
    text = "QC had solved {qc} episodes and QC-FQL {qc-fql}, IQL and EDP {iql}, IDQL {idql}, IFQL {ifql}, and FQL none"
    assert text.format(**first) in WORDS and first["fql"] == 0 and first["edp"] == first["iql"]
    cube = "play/cube-single-play-100k-v0"
    early = {name: column(f"{cube}/{name}", "score", 0) for name in ("qc", "qc-fql", "fql")}
    assert (early["qc"] > 0).sum() == 2 and min(early["qc-fql"]) > 0 == max(early["fql"])
    low = -np.concatenate([column(f"{cube}/{name}", "believed_value") for name in ("rebrac", "diffusion_ql", "edp")])
    assert f"EDP believe −{min(low):.0f} to −{max(low):.0f} on the cube" in WORDS and min(low) > 100
    smaller, mean = (-column(f"{folder}/fql", "believed_value", 0) for folder in ("trials/q-agg-min/" + cube[5:], cube))
    assert f"(`q_agg`) believes −{min(smaller):.0f} to −{max(smaller):.0f} after 10,000 updates" in WORDS
    gets = set(column(f"{cube}/fql", "true_value", 0).round())
    assert f"believes −{min(mean):.0f} to −{max(mean):.0f} then, and its policies get −87." in WORDS and gets == {-87}
    puzzle = {name: column(f"play/puzzle-3x3-play-200k-v0/{name}", "score") for name in ("fql", "iql")}
    worst = f"({min(puzzle['fql']):.1f}) is a little below the best of IQL's ({max(puzzle['iql']):.1f})"
    assert worst in WORDS and f"the worst of IQL's (−{-min(puzzle['iql']):.1f})" in WORDS
    nothing = max(column("play/scene-play-200k-v0/iql", "returns"))

    def differ(method):  # episodes of more and of less than one in which nothing is touched
        returns = column(f"play/scene-play-200k-v0/{method}", "returns")
        assert returns.size == 30
        return (returns > nothing).sum(), (returns < nothing).sum()

    assert differ("iql") == (0, 1) and "In 29 of 30 episodes IQL earns" in WORDS
    assert differ("idql") == differ("ifql") == (0, 0)
    (fql, fql_less), (chunks, chunks_less) = differ("fql"), differ("qc-fql")
    assert f"FQL earns more in {fql} episodes, and less in {fql_less}; QC-FQL more in {chunks}, and less in" in WORDS
    below = [column(f"play/scene-play-200k-v0/{name}", "score").mean() for name in ("edp", "diffusion_ql")]
    assert f"less in {chunks_less}. EDP and Diffusion-QL have −{-below[0]:.1f} and −{-below[1]:.1f}." in WORDS


def test_images():
    def of(game, method, name="score"):
        return column(f"images/minatar-{game}-mixed-v0/{method}", name)

    for game in ("breakout", "space-invaders"):
        assert all(of(game, name).mean() > of(game, "bc").mean() for name in ("iql", "cql_discrete", "bcq_discrete"))
    iql, bc = of("breakout", "iql"), of("breakout", "bc")
    assert f"({min(iql):.1f}) is above the best of cloning ({max(bc):.1f})" in WORDS
    assert min(of("space-invaders", "dqn")) >= 100 <= min(of("space-invaders", "bcq_discrete"))
    assert max(of("space-invaders", "bc")) < 66
    believed, true = (of("space-invaders", "dqn", name) for name in ("believed_value", "true_value"))
    assert f"believes {believed.mean():.1f} where its policy gets {both_ends(true)}" in WORDS
    believed, true = (of("breakout", "dqn", name) for name in ("believed_value", "true_value"))
    assert f"believes {both_ends(believed, 1)} and gets {both_ends(true, 1)}" in WORDS


def test_atari():
    methods = "bc", "bcq_discrete", "cql_discrete", "iql"
    bc, *_, iql = (lines(f"atari/atari-pong-scripted-v0/{method}")[0] for method in methods)
    assert all((column(f"atari/atari-pong-scripted-v0/{method}", "returns") == -21).all() for method in methods)
    assert f"The loss of BC is {bc['actor_loss']:.2f}" in WORDS and abs(bc["actor_loss"] + iql["log_prob"]) < 0.01


def test_driving():
    def of(method, name):
        return column(f"driving/driving-highway-mixed-5k-v0/{method}", name)

    assert f"each earns {min(of('iql', 'returns')):.0f} to {max(of('iql', 'returns')):.1f}" in WORDS
    believed, true = of("cql_discrete", "believed_value"), of("cql_discrete", "true_value")
    assert f"values of {both_ends(believed)}, where its episodes earn {both_ends(true)}, discounted" in WORDS


def test_hands():
    def of(data, method, name="score", evaluation=-1):
        return column(f"hands/adroit-{data}-100k-v0/{method}", name, evaluation)

    iql = [f"{of(f'{task}-expert', 'iql').mean():.1f}" for task in ("door", "hammer")]
    assert f"({iql[0]} and {iql[1]}, published" in WORDS
    assert f"On hammer its seeds go from {both_ends(of('hammer-expert', 'bc'), 1)}" in WORDS
    cloned = [f"{task}-cloned" for task in ("door", "hammer", "relocate")]
    falls = [of(data, "iql") < of(data, "iql", evaluation=0) for data in cloned]
    grows = [of(data, "iql", "believed_value") / of(data, "iql", "believed_value", 0) for data in cloned]
    assert np.sum(falls) == 8 and f"become {both_ends(np.concatenate(grows), 1)} times as large" in WORDS
    rebrac = [f"{of(f'{task}-expert', 'rebrac').mean():.1f}" for task in ("door", "hammer")]
    assert f"it has {rebrac[0]} and {rebrac[1]}, where" in WORDS
    assert f"(`bc_loss`) is {of('door-expert', 'rebrac', 'bc_loss').mean():.1f} on door" in WORDS
    believed, true = (of("door-expert", "rebrac", name) for name in ("believed_value", "true_value"))
    assert f"{both_ends(believed)} where door's episodes start, and its policy gets {both_ends(true)}" in WORDS
