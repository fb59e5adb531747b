"""The learner's idle time with and without lookahead, and what the loop itself costs a round.

    python bench/overlap.py [idle] [generators] [prompts] [--rounds 5] [--largest 100000]

Generation, judging and learning are timed waits in Ray actors (bench/_standins.py); the loop, its ledger, sealed files,
fleet, judge pool and weight plane are the real ones. Needs no model; about three minutes, most of them waiting.

`idle`: the share of the time in which the learner does not train, for generation faster than, as fast as and slower
than learning. `generators` and `prompts`: all waits are zero, so a round is what the loop costs. Writing, hashing and
reading back a round's files and handing its pairs to the learner's actor grow with the data whatever the loop does, and
stand in columns of their own.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from _standins import MAX_ACTORS, Shape, StandIns, Waits
from _stopwatch import Stopwatch

from actors.cluster import connect
from rlhf.config.system import Cluster
from rlhf.rounds import online
from rlhf.rounds.controller import run_rounds

LEARN_S = 2.0
GENERATORS = (1, 4, 16, 64, 256)
PROMPTS = (32, 100, 1_000, 10_000, 100_000)
PARTS = ("idle", "generators", "prompts")


def events(run_dir: Path, kind: str) -> list[dict[str, float]]:
    """The lines of one kind in metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def idle_share(spans: list[tuple[float, float]]) -> float:
    """Share of the time between the first training's start and the last one's end in which none ran."""
    busy = sum(end - start for start, end in spans)
    return 1.0 - busy / (spans[-1][1] - spans[0][0])


def least_idle(generate: float, learn: float, lookahead: int) -> float:
    """The idle share of a loop that costs nothing."""
    return generate / (generate + learn) if lookahead == 0 else max(0.0, 1.0 - learn / generate)


def idle_table(standins: StandIns, folder: Path, rounds: int) -> None:
    """Generation at 0.75, 1 and 1.25 of learning, with and without lookahead."""
    waits = Waits(judge=0.1, learn=LEARN_S)
    print(f"\nLearning {LEARN_S} s and judging {waits.judge} s a batch, {rounds} rounds of 64 prompts\n")
    print("| generation, s | lookahead | learner idle | of a free loop | waits for pairs, s a round |")
    print("| --- | --- | --- | --- | --- |")
    for lookahead in (0, 1):
        for ratio in (0.75, 1.0, 1.25):
            shape = Shape(prompts=64, rounds=rounds, lookahead=lookahead)
            sampled = replace(waits, generate=ratio * LEARN_S - waits.judge)
            run_dir = folder / f"idle-{lookahead}-{ratio}"
            spans = run(standins, shape, sampled, run_dir)[1]
            # The first round is always waited for.
            waiting = statistics.median(event["timing_s/idle"] for event in events(run_dir, "round")[1:])
            least = least_idle(ratio * LEARN_S, LEARN_S, lookahead)
            idle = idle_share(spans[int(lookahead) :])
            print(f"| {ratio * LEARN_S:.1f} | {lookahead} | {idle:.1%} | {least:.1%} | {waiting:.3f} |", flush=True)


def run(
    standins: StandIns, shape: Shape, waits: Waits, run_dir: Path
) -> tuple[list[float], list[tuple[float, float]], list[float]]:
    """Run the loop to its end: when each round ended, when the learner trained, and how long pairs took to reach it."""
    import ray

    system, config, learner = standins.system(shape, waits, run_dir)
    asyncio.run(run_rounds(system, config))
    spans = ray.get(learner.handle.spans.remote())
    ends = [event["time"] for event in events(run_dir, "round")]
    return ends, spans, [start - called for called, (start, _) in zip(learner.called, spans, strict=True)]


def overhead(standins: StandIns, shape: Shape, run_dir: Path, watch: Stopwatch) -> tuple[float, float, float]:
    """Median seconds of a round without waits, of its files, and of handing its pairs over; the first is left out."""
    watch.seconds.clear()
    ends, _, handed = run(standins, shape, Waits(), run_dir)
    files = [sum(calls) for calls in zip(*watch.seconds.values(), strict=True)]
    walls = [end - start for start, end in itertools.pairwise(ends)]
    return statistics.median(walls), statistics.median(files[1:]), statistics.median(handed[1:])


def overhead_table(standins: StandIns, folder: Path, shapes: list[Shape]) -> list[tuple[int, float]]:
    """A row for each shape; returns prompts and the loop's seconds."""
    watch = Stopwatch()
    for name in ("_write", "seal_pairs", "read_sealed"):
        watch.wrap(online, name, name)
    print("| generators | prompts | round, ms | files, ms | hand-over, ms | loop, ms | loop, µs a prompt |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    found = []
    for shape in shapes:
        run_dir = folder / f"overhead-{shape.generators}-{shape.prompts}"
        total, files, handed = overhead(standins, shape, run_dir, watch)
        loop = total - files - handed
        cells = [f"{seconds * 1e3:.1f}" for seconds in (total, files, handed, loop)]
        cells.append(f"{loop / shape.prompts * 1e6:.0f}")
        print(f"| {shape.generators} | {shape.prompts} | " + " | ".join(cells) + " |", flush=True)
        found.append((shape.prompts, loop))
    return found


def growth(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Seconds a round and seconds a prompt, from the smallest and the largest round."""
    (few, short), (many, long) = min(points), max(points)
    slope = (long - short) / (many - few)
    return short - few * slope, slope


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; all of them by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--largest", type=int, default=PROMPTS[-1], help="prompts of the largest round")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    parts, rounds = options.parts or PARTS, options.rounds
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-overlap-") as temporary,
        connect("bench-overlap", Cluster(), 512 << 20),
    ):
        folder = Path(temporary)
        standins = StandIns(MAX_ACTORS - 2)
        # Workers start and import; none of it is a round's.
        run(standins, Shape(generators=64, rounds=2), Waits(), folder / "warm-up")
        if "idle" in parts:
            idle_table(standins, folder, rounds + 1)
        if "generators" in parts:
            print("\nGenerators, 32 prompts of 2 responses\n")
            overhead_table(standins, folder / "g", [Shape(n, 32, rounds=rounds + 1) for n in GENERATORS])
        if "prompts" in parts:
            print("\nPrompts of 2 responses, 256 generators\n")
            sizes = [n for n in PROMPTS if n <= options.largest]
            points = overhead_table(standins, folder / "p", [Shape(256, n, rounds=rounds + 1) for n in sizes])
            fixed, slope = growth(points)
            print(f"\nloop: {fixed * 1e3:.0f} ms a round + {slope * 1e6:.0f} µs a prompt")


if __name__ == "__main__":
    main()
