"""Checkpoint folders: whole or not there, and a damaged one is named and passed over."""

import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.rounds.checkpoints import MANIFEST, CheckpointStore

FILES = {"rank-0.pt": b"x" * 1000, "state/optimizer.bin": bytes(range(256)), "cursor.json": b"{}"}


@pytest.fixture(autouse=True)
def _no_flushes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushing is proved in test_files; here it would only cost time on a busy disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


class Kill(BaseException):
    """Stands for the end of the process at this line."""


def write(store: CheckpointStore, round: int) -> None:
    staging = store.stage(round)
    for name, data in FILES.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(data + str(round).encode())
    store.commit(round)


def newest(store: CheckpointStore) -> tuple[int, list[str]]:
    warnings: list[str] = []
    return store.newest(warnings.append), warnings


def test_an_empty_run_has_none(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    assert store.rounds() == []
    assert newest(store) == (0, [])


def test_commit_puts_the_whole_folder_in_place(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 7)
    assert store.path(7) == tmp_path / "checkpoints" / "round-0007"
    assert (store.path(7) / "state" / "optimizer.bin").read_bytes() == FILES["state/optimizer.bin"] + b"7"
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["round-0007"]
    assert newest(store) == (7, [])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep)
    for round in (1, 2, 9, 10, 11):
        write(store, round)
    assert store.rounds() == [1, 2, 9, 10, 11][-keep:]
    assert newest(store) == (11, [])


def test_a_round_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    (store.path(1) / "extra").write_text("from the first try")
    write(store, 1)
    assert store.rounds() == [1]
    assert not (store.path(1) / "extra").exists()
    assert newest(store) == (1, [])


def test_left_overs_of_a_killed_save_are_ignored_and_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    (store.stage(2) / "half").write_bytes(b"x")
    assert CheckpointStore(tmp_path, 2).rounds() == [1]
    assert newest(CheckpointStore(tmp_path, 2)) == (1, [])
    assert list(store.stage(2).iterdir()) == []


def test_a_kill_before_the_rename_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the rename of the folder has happened: the manifest lies in the staging folder."""
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    rename = Path.rename

    def killed_at_the_folder(self: Path, target: Path) -> Path:
        if self.is_dir():
            raise Kill
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed_at_the_folder)
        with pytest.raises(Kill):
            write(store, 2)
    again = CheckpointStore(tmp_path, keep=1)
    assert newest(again) == (1, [])
    write(again, 2)
    assert newest(again) == (2, [])
    assert again.rounds() == [2]


def _truncate(folder: Path) -> None:
    os.truncate(folder / "rank-0.pt", 999)


def _flip(folder: Path) -> None:
    data = bytearray((folder / "state" / "optimizer.bin").read_bytes())
    data[128] ^= 1
    (folder / "state" / "optimizer.bin").write_bytes(bytes(data))


def _remove(folder: Path) -> None:
    (folder / "cursor.json").unlink()


def _no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _empty_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 0)


def _empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, "rank-0.pt has 999 bytes, 1001 were written"),
    (_flip, "state/optimizer.bin is damaged"),
    (_remove, "cursor.json is missing"),
    (_no_manifest, "manifest"),
    (_empty_manifest, "manifest"),
    (_empty_folder, "manifest"),
]


@pytest.mark.parametrize(("damage", "named"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    damage: Callable[[Path], None], named: str, tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    write(store, 2)
    damage(store.path(2))
    found, [warning] = newest(store)
    assert found == 1
    assert str(store.path(2)) in warning
    assert named in warning
    assert "\n" not in warning


def test_all_damaged_means_starting_from_round_0(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    write(store, 2)
    _flip(store.path(1))
    _remove(store.path(2))
    found, warnings = newest(store)
    assert found == 0
    assert ["round-0002" in warnings[0], "round-0001" in warnings[1], len(warnings)] == [True, True, 2]


def test_no_flipped_byte_of_a_manifest_is_a_crash(tmp_path: Path) -> None:
    """A changed manifest is passed over with a reason (a changed blank may pass); it never ends in a traceback."""
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    file = store.path(1) / MANIFEST
    whole = file.read_bytes()
    noticed = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 7
        file.write_bytes(bytes(damaged))
        noticed += store.problem(1) is not None
    assert noticed > 0.7 * len(whole)


@pytest.mark.parametrize("content", ["[]", "null", '{"files": []}', '{"files": {"rank-0.pt": 3}}', '{"round": 1}'])
def test_json_that_is_no_manifest_is_passed_over(content: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    (store.path(1) / MANIFEST).write_text(content)
    found, [warning] = newest(store)
    assert found == 0
    assert "manifest" in warning


def test_large_files_are_hashed_and_checked_through_a_small_buffer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    (store.stage(1) / "weights.bin").write_bytes(bytes(40 << 20))
    tracemalloc.start()
    try:
        store.commit(1)
        assert newest(store) == (1, [])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
