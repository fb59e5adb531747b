"""A disk that is really full: one clear line, nothing half-written is trusted, and with room again the run ends right.

The disk is a file system of its own, in memory; where one may not be mounted the tests are skipped.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlhf.errors import InputError, RLHFError, StorageError
from rlhf.files import write_atomic, writing
from rlhf.monitor.jsonl import JsonlSink, read_records
from rlhf.monitor.sink import Event
from rlhf.rounds.checkpoints import CheckpointStore
from tests.unit.rounds_world import World, check_finished, make_config, run
from tests.unit.test_rounds_run_directory import begin, planned

POINTS = ["sample", "response", "judge", "train 2", "publish 2", "serve 2", "saved round-0001", "saved round-0002"]
"""Moments from which on the disk is full: before a round is sealed, before a checkpoint is in place, and others."""


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files; it has no part in how a full disk answers here."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    # Lazily: torch leaves a file open that it could not write to its end.
    subprocess.run(["umount", "--lazy", path], check=True)


def fill(disk: Path) -> Path:
    """Write until there is no room at all."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


@contextmanager
def one_line(*named: str) -> Iterator[None]:
    with pytest.raises(RLHFError) as error:
        yield
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (*named, "cannot be written", "make room")), message


@pytest.mark.parametrize("point", POINTS)
async def test_the_run_ends_and_goes_on_when_there_is_room_again(point: str, disk: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    await run(World(), make_config(rounds__lookahead=1), whole)

    def full(event: str) -> None:
        if event == point or event == f"{point}.tmp":
            fill(disk)

    run_dir = disk / "run"
    with pytest.raises((ExceptionGroup, StorageError, OSError)) as error:
        await run(World(full), make_config(rounds__lookahead=1), run_dir)
    failed = error.value.exceptions if isinstance(error.value, ExceptionGroup) else [error.value]
    assert all(isinstance(item, OSError | StorageError) for item in failed)
    with pytest.raises((ExceptionGroup, StorageError, OSError)):  # and once more while it is full
        await run(World(), make_config(rounds__lookahead=1), run_dir)
    (disk / "ballast").unlink()
    await run(World(), make_config(rounds__lookahead=1), run_dir)
    assert check_finished(run_dir, 3) == check_finished(whole, 3)
    assert not list(run_dir.glob("checkpoints/*.tmp"))


async def test_the_line_names_the_file_of_the_round(disk: Path) -> None:
    def full(event: str) -> None:
        if event == "judge":
            fill(disk)

    with pytest.raises(ExceptionGroup) as error:
        await run(World(full), make_config(), disk / "run")
    assert error.group_contains(StorageError, match=r"rounds/0001/rollouts\.parquet: cannot be written \(No space left")


def test_an_atomic_write_leaves_what_was_there(disk: Path) -> None:
    path = disk / "file"
    write_atomic(path, b"old")
    ballast = fill(disk)
    with one_line(str(path), "No space left on device"):
        write_atomic(path, b"new" * 10_000)
    assert path.read_bytes() == b"old"
    ballast.unlink()
    write_atomic(path, b"new" * 10_000)
    assert path.read_bytes() == b"new" * 10_000


def test_metrics_have_whole_lines_only_and_go_on(disk: Path) -> None:
    sink = JsonlSink(disk / "run")
    sink.log(Event("round", 0, None, 1.0, {"x": 0.5}))
    ballast = fill(disk)
    os.truncate(ballast, ballast.stat().st_size - 5000)  # room for some lines, not for all
    logged = 0
    with one_line("metrics.jsonl"):
        for number in range(1, 1000):
            sink.log(Event("round", number, None, 1.0, {f"metric/{n}": number + n / 7 for n in range(20)}))
            logged = number
    assert logged > 2
    assert [record["round"] for record in read_records(sink.path)] == list(range(logged + 1))
    assert sink.path.read_bytes().endswith(b"}\n")
    with one_line("metrics.jsonl"):
        sink.log(Event("round", logged + 1, None, 1.0, {"y" * 5000: 1}))
    ballast.unlink()
    sink.log(Event("round", logged + 1, None, 1.0, {"x": 2}))
    sink.close(0)
    assert [record["round"] for record in read_records(sink.path)] == list(range(logged + 2))


@pytest.mark.parametrize("numbers", [1, 1 << 19])
def test_torch_says_no_error_number_but_the_file_is_named(numbers: int, disk: Path) -> None:
    """Its writer tells a small archive and a large one that do not fit in different words."""
    if numbers == 1:
        fill(disk)
    with one_line(str(disk / "folder"), "; 0 MiB free"), writing(disk / "folder"):
        torch.save({"x": torch.zeros(numbers)}, disk / "state.pt")


def test_other_errors_pass_as_they_are() -> None:
    for error in (RuntimeError("shape mismatch"), FileNotFoundError(2, "no such file"), KeyError("x")):
        with pytest.raises(type(error)) as found, writing(Path("x")):
            raise error
        assert found.value is error


def test_a_checkpoint_that_did_not_fit_makes_room_for_the_next_try(disk: Path) -> None:
    store = CheckpointStore(disk, keep=1)
    (store.stage(1) / "state").write_bytes(b"1" * 300_000)
    store.commit(1)
    (store.stage(2) / "state").write_bytes(b"2" * 300_000)
    fill(disk)
    with one_line("round-0002.tmp"):
        store.commit(2)
    assert CheckpointStore(disk, keep=1).newest(pytest.fail) == 1
    assert not list(disk.glob("checkpoints/*.tmp"))


def test_a_full_disk_at_the_start_is_bad_input(disk: Path) -> None:
    path = planned(disk)
    before = (path / "config.yaml").read_bytes()
    ballast = fill(disk)
    with pytest.raises(InputError, match=r"^output_dir = .*config\.yaml: cannot be written \(No space left"):
        begin(disk, rounds={"count": 20})
    assert (path / "config.yaml").read_bytes() == before
    ballast.unlink()
    begin(disk, rounds={"count": 20})


def test_a_disk_that_has_become_read_only_is_bad_input(disk: Path) -> None:
    planned(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(InputError, match=r"output_dir = .*Read-only file system"):
        begin(disk)


def test_the_size_a_process_may_write_is_a_limit_too(tmp_path: Path) -> None:
    """`ulimit -f`, which needs no mount."""
    script = (
        "import resource; from pathlib import Path; from rlhf.files import write_atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"write_atomic(Path({str(tmp_path / 'file')!r}), b'x' * 2000)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "StorageError" in done.stderr
    assert "file: cannot be written (File too large)" in done.stderr
    assert not (tmp_path / "file").exists()
