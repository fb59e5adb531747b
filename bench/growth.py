"""Does anything grow? Memory, files and object-store bytes of all processes of a run over many rounds.

    python bench/growth.py [--rounds 200] [--skip 40]

A tiny random model with every real part: vLLM engine, judge, DeepSpeed learner, checkpoints, weight updates; two
prompts a round. Once a round's metrics are in, /proc is read of the run's process and all below it, and Ray is asked
for what its object store holds. The first rounds are left out: allocators, caches and lazily imported code fill up
there. Needs the small model's tokenizer (`make model`); about two seconds a round.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import psutil
import yaml
from _regression import slope, sparkline

TOKENIZER = "models/smollm2-135m-instruct"
BLOCK = 8
POLL_S = 0.2
LEAST_HEAP = 50e6


@dataclass(frozen=True)
class Usage:
    """Of all processes of a run. `anonymous` is memory that no file backs: heaps and stacks, where leaks show;
    `heaps` are its bytes by process, of those that hold most; `names` are threads by process and name."""

    resident: float
    anonymous: float
    files: float
    threads: float
    processes: float
    store: float
    heaps: dict[str, float] = field(default_factory=dict)
    names: Counter[str] = field(default_factory=Counter)


NAMES = tuple(column.name for column in fields(Usage) if column.name not in ("heaps", "names"))
COUNTS = ("files", "threads", "processes")


def make_model(path: Path) -> None:
    """Two layers of random weights under the small model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(path)


def write_config(folder: Path, rounds: int) -> Path:
    """A run of `rounds` rounds under `folder`."""
    make_model(folder / "model")
    topics = ("rain", "bread", "a cat", "trains", "the sea", "tea", "books", "snow")
    rows = [json.dumps({"prompt": f"Tell me {how} {topic}."}) for topic in topics for how in ("about", "a story of")]
    (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = {
        "name": "growth",
        "output_dir": str(folder),
        "policy": {"path": str(folder / "model"), "dtype": "float32"},
        "prompts": {"path": str(folder / "prompts.jsonl"), "max_tokens": 64},
        "rounds": {"count": rounds, "prompts": 2},
        "generator": {"samples": 2, "sampling": {"max_tokens": 12}, "engine": {"kv_cache_memory_bytes": 64 << 20}},
        "judge": {"type": "sentiment"},
        "pairing": {"min_margin": 0.0},
        "learner": {"batch_size": 2, "micro_batch_size": 2, "max_length": 128},
        "checkpoint": {"every": 10},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def usage(processes: Sequence[psutil.Process], store: float) -> Usage:
    """Sums over processes; one that ends meanwhile counts as nothing."""
    found = {process: row for process in processes if (row := _usage(process.pid))}
    sums = (float(sum(column)) for column in zip(*found.values(), strict=True))
    heaps = {f"{title(process)} {process.pid}": float(row[1]) for process, row in found.items() if row[1] > LEAST_HEAP}
    names = Counter(f"{title(process)} {process.pid}: {name}" for process in found for name in threads(process.pid))
    return Usage(*sums, processes=len(found), store=store, heaps=heaps, names=names)


def threads(pid: int) -> list[str]:
    """What the threads of a process are called; numbers at the end, of pools, are left out."""
    found = []
    for file in Path("/proc", str(pid), "task").glob("*/comm"):
        try:
            found.append(file.read_text().strip().rstrip("0123456789"))
        except OSError:  # it ended
            continue
    return found


def title(process: psutil.Process) -> str:
    """What a process calls itself; Ray's workers have actor and method for a command line, of which the actor stays."""
    try:
        name = Path(process.cmdline()[0].split()[0]).name
        return name.partition(".")[0] if name.startswith("ray::") else name
    except (psutil.Error, IndexError):
        return "ended"


def _usage(pid: int) -> tuple[int, int, int, int] | None:
    """Resident and anonymous bytes, open files and threads of a process."""
    folder = Path("/proc", str(pid))
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        files = len(os.listdir(folder / "fd"))
        resident, anonymous = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    except (OSError, KeyError):  # it ended, or is a zombie, which has no memory
        return None
    return resident, anonymous, files, int(status["Threads"])


def store_reader(processes: Sequence[psutil.Process]) -> Callable[[], float]:
    """Asks the run's own Ray for the bytes that its object store holds."""
    # A Ray that a process starts for itself asks for the user's token, but nobody else is told so.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray._private.internal_api import get_memory_info_reply
    from ray._private.state import GlobalState
    from ray._raylet import GcsClientOptions

    flag = "--gcs-address="
    raylet = next(process for process in processes if process.name() == "raylet")
    address = next(word.removeprefix(flag) for word in raylet.cmdline() if word.startswith(flag))
    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    return lambda: float(get_memory_info_reply(state).store_stats.object_store_bytes_used)


def rounds_done(metrics: Path) -> int:
    """Rounds whose metrics have been written."""
    return metrics.read_text(encoding="utf-8").count('"event": "round"') if metrics.exists() else 0


def watch(run: subprocess.Popen[bytes], metrics: Path) -> list[tuple[int, Usage]]:
    """What was in use after each round."""
    root, store, found = psutil.Process(run.pid), None, []
    while run.poll() is None:
        time.sleep(POLL_S)
        done = rounds_done(metrics)
        if done > (found[-1][0] if found else 0):
            processes = [root, *root.children(recursive=True)]
            store = store or store_reader(processes)
            found.append((done, usage(processes, store())))
    return found


def report(found: Sequence[tuple[int, Usage]], skip: int) -> str:
    """A row for each resource: its mean at the start and at the end, slope with interval, and a plot."""
    kept = [(number, use) for number, use in found if number > skip]
    rounds = [float(number) for number, _ in kept]
    table = {name: [getattr(use, name) for _, use in kept] for name in NAMES}
    whole = [name for name in kept[0][1].heaps if all(name in use.heaps for _, use in kept)]
    table |= {f"anonymous, {name}": [use.heaps[name] for _, use in kept] for name in sorted(whole)}
    lines = [
        f"rounds {kept[0][0]} to {kept[-1][0]}, one reading a round, slopes from means of {BLOCK}\n",
        "| of all processes | first | last | slope a round | 95 % interval | least to most over the rounds |",
        "|" + " --- |" * 6,
    ]
    for name, values in table.items():
        unit, scale = ("", 1.0) if name in COUNTS else ("MB", 1e6)
        scaled = [value / scale for value in values]
        fit = slope(rounds, scaled, BLOCK)
        ends = [sum(part) / len(part) for part in (scaled[:BLOCK], scaled[-BLOCK:])]
        cells = [f"{name} {unit}".strip(), *(f"{end:.1f}" for end in ends), f"{fit.value:+.4f}"]
        lines.append("| " + " | ".join([*cells, f"{fit.low:+.4f} to {fit.high:+.4f}", sparkline(scaled)]) + " |")
    return "\n".join([*lines, "", more_threads(kept[0][1].names, kept[-1][1].names)])


def more_threads(first: Counter[str], last: Counter[str]) -> str:
    """Which threads are more at the end than at the start."""
    grown = [f"{name} {first[name]} to {count}" for name, count in sorted(last.items()) if count > first[name]]
    return f"more threads: {'; '.join(grown) or 'none'}"


def main() -> None:
    """Run, watch, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--skip", type=int, help="rounds left out at the start; a fifth of all by default")
    options = parser.parse_args()
    skip = options.rounds // 5 if options.skip is None else options.skip
    if options.rounds - skip < 3 * BLOCK:
        parser.error(f"--rounds {options.rounds} --skip {skip}: {3 * BLOCK} rounds at least have to be left")
    with tempfile.TemporaryDirectory(prefix="rlhf-growth-") as temporary:
        folder = Path(temporary)
        command = [sys.executable, "-m", "rlhf.cli", "train", str(write_config(folder, options.rounds))]
        with (folder / "log.txt").open("wb") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                found = watch(run, folder / "growth" / "metrics.jsonl")
            finally:
                run.terminate()
                run.wait()
        if run.returncode:
            raise SystemExit(f"the run failed with {run.returncode}:\n{(folder / 'log.txt').read_text()[-2000:]}")
    print(report(found, skip))


if __name__ == "__main__":
    main()
