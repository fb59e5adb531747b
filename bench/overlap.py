"""The learner's idle time with and without lookahead, and what the loop itself costs a round.

    python bench/overlap.py [idle] [generators] [prompts] [tokens] [--rounds 5] [--largest 100000]

Generation, judging and learning are timed waits in Ray actors (bench/_standins.py); the loop, its ledger, sealed files,
fleet, relays, judge pool and weight plane are the real ones. Needs no model; about ten minutes.

`idle`: the share of the time in which the learner does not train, for generation faster than, as fast as and slower
than learning. `generators` and `prompts`: all waits are zero, so a round is what the loop costs. Writing, hashing and
reading back a round's files and handing its pairs to the learner's actor grow with the data whatever the loop does, and
stand in columns of their own. Here all the actors share the driver's cores, which they do not elsewhere: the driver's
own processor time, without the files, is in the last columns: that of all its threads, Ray's too, and that of the
thread that runs the loop, which is what a round waits for where the actors have cores of their own. `tokens`: what
longer responses add, to files and memory too.
"""

import argparse
import asyncio
import ctypes
import itertools
import json
import shutil
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import ray
from _standins import MAX_ACTORS, ClockedGroup, Mark, Shape, StandIns, Waits
from _stopwatch import Stopwatch

from actors.cluster import connect
from actors.relay import MEMBERS
from rlhf.config.system import Cluster
from rlhf.rounds import online
from rlhf.rounds.controller import run_rounds
from rlhf.rounds.ledger import Ledger

LEARN_S = 2.0
GENERATORS = (1, 4, 16, 64, 256)
PROMPTS = (32, 100, 1_000, 10_000, 100_000)
TOKENS = (16, 128, 512, 2048)
PARTS = ("idle", "generators", "prompts", "tokens")
MEMORY = Path("/dev/shm")


Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class Cost:
    """Seconds of a round without waits: all of it, its files, handing its pairs over; the driver's processor without
    what files take of it, in all threads and in the loop's own, and what files take."""

    round: float
    files: float
    handed: float
    processor: float
    thread: float
    files_processor: float

    @property
    def loop(self) -> float:
        """What is neither files nor hand-over."""
        return self.round - self.files - self.handed


def events(run_dir: Path, kind: str) -> list[dict[str, float]]:
    """The lines of one kind in metrics.jsonl."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def idle_share(spans: Spans) -> float:
    """Share of the time between the first training's end and the last one's in which none ran."""
    busy = sum(end - start for start, end in spans[1:])
    return 1.0 - busy / (spans[-1][1] - spans[0][1])


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
            _, spans = run(standins, shape, sampled, run_dir)
            # The first round is always waited for.
            waiting = statistics.median(event["timing_s/idle"] for event in events(run_dir, "round")[1:])
            least = least_idle(ratio * LEARN_S, LEARN_S, lookahead)
            idle = idle_share(spans)
            print(f"| {ratio * LEARN_S:.1f} | {lookahead} | {idle:.1%} | {least:.1%} | {waiting:.3f} |", flush=True)


def run(
    standins: StandIns, shape: Shape, waits: Waits, run_dir: Path, watch: Stopwatch | None = None
) -> tuple[ClockedGroup, Spans]:
    """Run the loop to its end: the learner's driver side, and when its actor trained. `watch` clocks the files."""
    system, config, learner = standins.system(shape, waits, run_dir)
    if watch:
        learner.files = watch.totals
    asyncio.run(run_rounds(system, config))
    return learner, ray.get(learner.handle.spans.remote())


def overhead(standins: StandIns, shape: Shape, run_dir: Path, watch: Stopwatch) -> Cost:
    """Medians over the rounds but the first; a round lasts from one call of the learner to the next."""
    learner, spans = run(standins, shape, Waits(), run_dir, watch)
    marks = learner.marks
    handed = [start - mark.at for mark, (start, _) in zip(marks, spans, strict=True)]
    spent = [Mark(*(after - before for before, after in zip(*pair, strict=True))) for pair in itertools.pairwise(marks)]
    return Cost(
        round=statistics.median(each.at for each in spent),
        files=statistics.median(each.files for each in spent),
        handed=statistics.median(handed[1:]),
        processor=statistics.median(each.processor - each.files_processor for each in spent),
        thread=statistics.median(each.thread - each.files_thread for each in spent),
        files_processor=statistics.median(each.files_processor for each in spent),
    )


def files_watch() -> Stopwatch:
    """Clocks whatever is written, hashed and read back of a round."""
    watch = Stopwatch()
    for name in ("_write", "seal_pairs", "read_sealed"):
        watch.wrap(online, name, name)
    watch.wrap(Ledger, "commit", "commit")
    return watch


def overhead_table(standins: StandIns, folder: Path, shapes: list[Shape]) -> list[tuple[int, Cost]]:
    """A row for each shape; returns prompts and costs."""
    watch = files_watch()
    print("| generators | prompts | round, ms | files | hand-over | loop | driver's processor | that of its loop |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    found = []
    for shape in shapes:
        run_dir = folder / f"overhead-{shape.generators}-{shape.prompts}"
        cost = overhead(standins, shape, run_dir, watch)
        shutil.rmtree(run_dir)
        seconds = (cost.round, cost.files, cost.handed, cost.loop, cost.processor, cost.thread)
        cells = " | ".join(f"{each * 1e3:.1f}" for each in seconds)
        print(f"| {shape.generators} | {shape.prompts} | {cells} |", flush=True)
        found.append((shape.prompts, cost))
    return found


def tokens_table(standins: StandIns, folder: Path, rounds: int) -> None:
    """What each prompt costs by the length of its responses."""
    watch, prompts, before = files_watch(), 4_000, peak_bytes(reset=True)
    print("| tokens a response | round | hand-over | driver's processor | that of its files | driver's memory, kB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for tokens in TOKENS:
        shape = Shape(4, prompts, tokens=tokens, rounds=rounds + 1)
        peak_bytes(reset=True)
        cost = overhead(standins, shape, folder / f"tokens-{tokens}", watch)
        grown = (peak_bytes() - before) / prompts
        shutil.rmtree(folder / f"tokens-{tokens}")
        seconds = (cost.round, cost.handed, cost.processor, cost.files_processor)
        cells = " | ".join(f"{each / prompts * 1e6:.0f}" for each in seconds)
        print(f"| {tokens} | {cells} | {grown / 1e3:.1f} |", flush=True)


def peak_bytes(reset: bool = False) -> int:
    """The most memory that this process has had since the last reset; after one what it has."""
    if reset:
        # What larger rounds have left would hide what is taken.
        pa.default_memory_pool().release_unused()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))


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
    parser.add_argument("--folder", help="of the runs' files; by default in memory, so that no disk is measured")
    options = parser.parse_args()
    if options.folder is None and MEMORY.is_dir():
        options.folder = MEMORY
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    parts, rounds = options.parts or PARTS, options.rounds
    with (
        tempfile.TemporaryDirectory(prefix="rlhf-overlap-", dir=options.folder) as temporary,
        connect("bench-overlap", Cluster(), 512 << 20),
    ):
        folder = Path(temporary)
        # Besides them a judge, a learner, and the relays of the largest fleet.
        standins = StandIns(MAX_ACTORS - 2 - GENERATORS[-1] // MEMBERS)
        # Workers start and import; none of it is a round's.
        run(standins, Shape(generators=64, rounds=2), Waits(), folder / "warm-up")
        if "tokens" in parts:
            print("\nMicroseconds a prompt of 2 responses, 4,000 prompts, 4 generators\n")
            tokens_table(standins, folder, rounds)
        if "idle" in parts:
            idle_table(standins, folder, rounds + 1)
        if "generators" in parts:
            print("\nGenerators, 32 prompts of 2 responses\n")
            overhead_table(standins, folder / "g", [Shape(n, 32, rounds=rounds + 1) for n in GENERATORS])
        if "prompts" in parts:
            print("\nPrompts of 2 responses, 256 generators\n")
            sizes = [n for n in PROMPTS if n <= options.largest]
            costs = overhead_table(standins, folder / "p", [Shape(256, n, rounds=rounds + 1) for n in sizes])
            for name in ("loop", "processor", "thread"):
                fixed, slope = growth([(prompts, getattr(cost, name)) for prompts, cost in costs])
                print(f"\n{name}: {fixed * 1e3:.0f} ms a round + {slope * 1e6:.0f} µs a prompt")


if __name__ == "__main__":
    main()
