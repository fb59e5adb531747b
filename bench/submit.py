"""What `rlhf submit --follow` adds to `rlhf train`, and how soon a refusal comes.

    python bench/submit.py [--repeats 5]

Starts a Ray head with a token on this machine and runs one config both ways in turn: a tiny random model, one round.
Taken is the time from the start of the command to the first optimizer step in metrics.jsonl, by the wall clock. Then
what cannot work is submitted: a wrong token, none, a head that is gone or silent, another service, an impossible
placement. Needs the small model's tokenizer (`make model`); about a minute a repeat on two cores.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import yaml
from growth import write_config

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the nodes of the tests

from tests.integration.ray_nodes import RayNodes, free_port  # noqa: E402

LIMIT_S = 300


def rlhf(*arguments: str, environment: dict[str, str], expected: int = 0) -> float:
    """Run the command to its end; returns when it was started. Ends this process if it does not exit as expected."""
    started = time.time()
    command = [sys.executable, "-m", "rlhf.cli", *arguments]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    if done.returncode != expected:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
    return started


def first_step(run_dir: Path) -> float:
    """When the first step was logged."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return next(event["time"] for event in map(json.loads, lines) if event["event"] == "step")


def configure(folder: Path) -> Path:
    """A config that runs both ways, with the same threads."""
    file = write_config(folder, 1)
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    config["generator"]["cpus"] = config["learner"]["cpus"] = 1
    config["evaluation"] = {"every": 0}
    config["cluster"] = {"device": "cpu", "shared": [str(folder)]}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def overhead(nodes: RayNodes, folder: Path, repeats: int) -> None:
    """Print seconds to the first step, both ways."""
    file = str(configure(folder))
    ways = {
        "rlhf train": (("train", file), dict(os.environ)),
        "rlhf submit --follow": (("submit", file, "--address", nodes.address, "--follow"), nodes.environment),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for way, (name, (arguments, environment)) in enumerate(ways.items()):
            run = f"run-{repeat}-{way}"
            started = rlhf(*arguments, f"name={run}", environment=environment | {"HF_HUB_OFFLINE": "1"})
            seconds[name].append(first_step(folder / run) - started)
            print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    print("| command | to the first step, s (median) | least | most |\n| --- | --- | --- | --- |")
    for name, found in seconds.items():
        print(f"| `{name}` | {statistics.median(found):.1f} | {min(found):.1f} | {max(found):.1f} |")
    train, submit = (statistics.median(found) for found in seconds.values())
    print(f"\nSubmitting adds {submit - train:.1f} s, by the medians of {repeats}.\n")


@contextmanager
def silent() -> Iterator[str]:
    """A port that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


class Quiet(SimpleHTTPRequestHandler):
    """A web server that logs nothing."""

    def log_message(self, *_: object) -> None:
        """Nothing."""


@contextmanager
def another() -> Iterator[str]:
    """A web server that is not Ray's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def refusals(nodes: RayNodes, folder: Path) -> None:
    """Print seconds from the start of the command to its end, for what cannot work."""
    file, environment = str(folder / "config.yaml"), nodes.environment
    untold = {name: value for name, value in environment.items() if name != "RAY_AUTH_TOKEN"}

    def submit(address: str, code: int, with_environment: dict[str, str] = environment, *more: str) -> float:
        arguments = ("submit", file, *more, "--address", address, "--follow")
        started = rlhf(*arguments, environment=with_environment, expected=code)
        return time.time() - started

    cases: dict[str, Callable[[], float]] = {
        "wrong token": lambda: submit(nodes.address, 2, environment | {"RAY_AUTH_TOKEN": "wrong"}),
        "no token": lambda: submit(nodes.address, 2, untold),
        "nothing listens there": lambda: submit(f"http://127.0.0.1:{free_port()}", 1),
        "impossible placement": lambda: submit(
            nodes.address, 1, environment, "name=never", "cluster.placement.learner.resources={nowhere: 1}"
        ),
    }
    print("| refused | after, s |\n| --- | --- |")
    for name, case in cases.items():
        print(f"| {name} | {case():.1f} |", flush=True)
    for name, server in {"a port that is silent": silent, "another service": another}.items():
        with server() as address:
            print(f"| {name} | {submit(address, 1):.1f} |", flush=True)


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-submit-") as scratch:
        folder = Path(scratch)
        (folder / "home").mkdir()
        with RayNodes(folder / "home") as nodes:
            overhead(nodes, folder, options.repeats)
            refusals(nodes, folder)


if __name__ == "__main__":
    main()
