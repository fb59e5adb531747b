"""A real run on two nodes, and the faults of a schedule done to it."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.chaos.cluster import TwoNodes, below
from tests.chaos.disk import Disk, flip, truncate
from tests.chaos.schedule import DAMAGES, Fault, Kind, Moment
from tests.chaos.watching import View, Watch
from tests.integration.conftest import ROOT

POLL_S = 0.015
MOMENT_S = 900.0
"""The longest wait for a moment and for somebody to hit; to start again all that was lost takes half a minute, but ten
times that on a machine that has other work."""

END_S = 300.0
"""The longest that a run may take to its end after the last fault, or to end by itself on a full disk."""

UNEXPECTED = 5
"""Ends of the controller that no fault explains before a run is given up."""

ACTORS = {Kind.JUDGE: "judge-0", Kind.LEARNER_0: "learner-0", Kind.LEARNER_1: "learner-1", Kind.RELAY: "Relay"}


@dataclass
class Injection:
    """A fault that was done: when, what the run was doing, and what became of it."""

    fault: Fault
    at_s: float
    found: list[str]
    recovered_s: float | None = None
    """Until a step was taken that had not been taken before; None if the run had no step left."""
    steps_again: int = 0
    """Steps taken again because of it, and of faults that followed before it had been got over."""


@dataclass
class Outcome:
    """What a run went through, and where its files are."""

    run_dir: Path
    injections: list[Injection] = field(default_factory=list)
    missed: list[Fault] = field(default_factory=list)
    """Faults whose moment, or whose victim, did not come while the run lasted."""
    starts: int = 0
    """Of the controller."""
    nodes: int = 0
    """Starts of the second node after the first."""
    failed_starts: list[str] = field(default_factory=list)
    """Ends of the controller before all its actors were there: somebody died who was being started."""
    unexpected: list[str] = field(default_factory=list)
    """Other ends of the controller that no fault explains, by their last line."""
    strays: list[str] = field(default_factory=list)
    """Processes that outlived their node or their run."""
    seconds: float = 0.0
    sealed: dict[int, str] = field(default_factory=dict)


class Harness:
    """One run: starts it, does it harm, starts it again, until it is done."""

    def __init__(self, cluster: TwoNodes, folder: Path, config: dict[str, Any], disk: Disk, command: str = "rlhf.cli"):
        """`command` is the module that is run as `rlhf`."""
        self._cluster = cluster
        self._command = command
        self._folder = folder
        self._disk = disk
        run_dir = Path(config["output_dir"]) / config["name"]
        batch = config["learner"]["batch_size"]
        self._watch = Watch(run_dir, batch, Path(config["judge"]["options"]["note"]))
        self._config = folder / "config.yaml"
        self._config.write_text(
            yaml.safe_dump({**config, "cluster": {**config["cluster"], "address": cluster.address}})
        )
        self.outcome = Outcome(run_dir)
        self._begun = time.monotonic()
        self._most = self._last = 0
        self._looked = 0.0

    def run(self, faults: Sequence[Fault]) -> Outcome:
        """Do all faults, in order, and let the run end."""
        self._start()
        try:
            for fault in faults:
                if self._await(fault):
                    self._inject(fault)
                else:
                    self.outcome.missed.append(fault)
            until = time.monotonic() + END_S
            while not self._ended():
                if time.monotonic() > until:
                    raise TimeoutError(f"the run did not end within {END_S:.0f} s of the last fault\n{self._tail()}")
                self._tick()
                time.sleep(0.1)
        finally:
            self._kill(self._controller.pid)
        self._tick()
        self.outcome.seconds = time.monotonic() - self._begun
        self.outcome.sealed = self._watch.sealed
        self.outcome.strays = self._cluster.alive(30)
        return self.outcome

    def _await(self, fault: Fault) -> bool:
        """Wait for the fault's moment, with somebody there to hit; False if the run ended before."""
        until, soon = time.monotonic() + MOMENT_S, time.monotonic() + fault.delay_s
        while time.monotonic() < until:
            if self._ended():
                return False
            view = self._tick()
            if fault.moment == Moment.RECOVERING:
                ready = time.monotonic() >= soon
            else:
                ready = view.round >= fault.round and fault.moment in view.moments and self._is_up(view)
            if not ready:
                time.sleep(POLL_S)
            elif self._victims(fault) is None:
                time.sleep(0.2)  # nobody to hit: somebody is being started
            else:
                if fault.moment != Moment.RECOVERING:
                    time.sleep(fault.delay_s)
                return True
        return False

    def _inject(self, fault: Fault) -> None:
        self._cluster.look()
        victims = self._victims(fault) or []
        doing = sorted(self._tick().moments)
        self.outcome.injections.append(Injection(fault, time.monotonic() - self._begun, doing))
        if fault.kind == Kind.FULL_DISK:
            self._fill()
        else:
            for pid in victims:
                self._kill(pid)
        if fault.kind in (Kind.RAYLET, Kind.NODE):
            self._cluster.reap_second()
            self._cluster.start_second()
            self.outcome.nodes += 1
        if fault.kind == Kind.CONTROLLER or fault.kind in DAMAGES:
            self._controller.wait()
            if fault.kind in DAMAGES:
                self._damage(fault)
            self._start()

    def _victims(self, fault: Fault) -> list[int] | None:
        """Who is to be killed; None if there is nobody, or nothing to be damaged."""
        if fault.kind in (Kind.CONTROLLER, Kind.FULL_DISK):
            return [self._controller.pid]
        if fault.kind in DAMAGES:
            return [self._controller.pid] if self._files(fault) else None
        if fault.kind in (Kind.RAYLET, Kind.NODE):
            raylet = self._cluster.raylet()
            if raylet is None:
                return None
            node = self._cluster.second_node() if fault.kind == Kind.NODE else []
            return [raylet.pid, *(process.pid for process in node if process.pid != raylet.pid)]
        return self._actor(fault)

    def _actor(self, fault: Fault) -> list[int] | None:
        actors = self._cluster.actors()
        if fault.kind in ACTORS:
            pid = actors.get(ACTORS[fault.kind])
            return [pid] if pid else None
        names = sorted(name for name in actors if name.startswith("generator-"))
        if not names:
            return None
        pid = actors[names[int(fault.choice * len(names))]]
        if fault.kind == Kind.GENERATOR:
            return [pid]
        engines = [process.pid for process in below(pid)]
        return engines or None

    def _files(self, fault: Fault) -> list[Path]:
        """What may be damaged: files of the newest checkpoint, or sealed files of the rounds."""
        run_dir = self.outcome.run_dir
        if fault.kind == Kind.FLIPPED_SEALED:
            return sorted(path for n in self._watch.sealed for path in run_dir.glob(f"rounds/{n:04d}/pairs.parquet"))
        folders = sorted(path for path in run_dir.glob("checkpoints/round-*") if path.suffix != ".tmp")
        newest = folders[-1].rglob("*") if folders else ()
        return sorted(path for path in newest if path.is_file() and path.name != "manifest.json")

    def _damage(self, fault: Fault) -> None:
        files = self._files(fault)
        path = files[int(fault.choice * len(files))]
        if fault.kind == Kind.TRUNCATED_CHECKPOINT:
            truncate(path)
        else:
            flip(path, fault.choice)

    def _fill(self) -> None:
        """The disk is full until the run has ended of it, or until that can be seen not to happen; then it goes on."""
        with self._disk.full():
            try:
                code = self._controller.wait(END_S)
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"the run did not end on a full disk\n{self._tail()}") from None
        if code != 1 or "cannot be written" not in self._last_line():
            self.outcome.unexpected.append(f"on a full disk, code {code}: {self._last_line()}")
        self._start()

    def _start(self) -> None:
        self.outcome.starts += 1
        self._before = self._rewritten()
        with self._file("stdout").open("a") as out, self._file("stderr").open("a") as err:
            self._controller = subprocess.Popen(
                [sys.executable, "-m", self._command, "train", str(self._config)],
                env=self._cluster.environment, cwd=ROOT, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        self._cluster.track(self._controller.pid)

    def _ended(self) -> bool:
        """Is the run done? A controller that ended otherwise, which no fault explains, is started again."""
        code = self._controller.poll()
        if code is None or code == 0:
            return code == 0
        ends = self.outcome.unexpected if self._is_up(self._watch.look()) else self.outcome.failed_starts
        ends.append(f"code {code}: {self._last_line()}")
        if len(ends) >= UNEXPECTED:
            raise RuntimeError("the run keeps ending:\n" + "\n".join(ends) + f"\n{self._tail()}")
        self._start()
        return False

    def _tick(self) -> View:
        """Look at the run, and write down what has been lost and got over."""
        view = self._watch.look()
        injections = self.outcome.injections
        if view.steps < self._last and injections:
            injections[-1].steps_again += self._last - view.steps
        if view.steps > self._most:
            self._most = view.steps
            for injection in injections:
                if injection.recovered_s is None:
                    injection.recovered_s = time.monotonic() - self._begun - injection.at_s
        self._last = view.steps
        if time.monotonic() > self._looked + 1:
            self._cluster.keep_second()
            self._cluster.look()
            self._looked = time.monotonic()
        return view

    def _is_up(self, view: View) -> bool:
        """Has the controller got past its start? It rewinds the metrics once all actors are there."""
        return view.round > 0 and self._rewritten() != self._before

    def _rewritten(self) -> int:
        path = self.outcome.run_dir / "metrics.jsonl"
        with suppress(FileNotFoundError):
            return path.stat().st_ino
        return 0

    def _kill(self, pid: int) -> None:
        with suppress(psutil.NoSuchProcess):
            psutil.Process(pid).send_signal(signal.SIGKILL)

    def _file(self, name: str) -> Path:
        return self._folder / name

    def _last_line(self) -> str:
        lines = self._file("stderr").read_text().strip().splitlines()
        return lines[-1] if lines else ""

    def _tail(self) -> str:
        return self._file("stderr").read_text()[-3000:]
