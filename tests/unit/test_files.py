"""Durable writes: the old content or the new one, never a mixture, and the right things flushed in the right order."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.files import rename_durable, sync_file, sync_folder, write_atomic, write_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


class Kill(BaseException):
    """Stands for the end of the process at this line."""


def test_write_replaces_the_whole_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"a longer first content")
    write_atomic(path, b"short\x00")
    assert path.read_bytes() == b"short\x00"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_left_over_temporary_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.json.tmp").write_bytes(b"half of something much longer than what comes next")
    write_json(tmp_path / "a.json", {"b": 1})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"b": 1}
    assert not (tmp_path / "a.json.tmp").exists()


def test_a_kill_before_the_rename_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"state": "old"})

    def killed(*_: object) -> None:
        raise Kill

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, killed)
        monkeypatch.setattr(os, name, killed)
    with pytest.raises(Kill):
        write_json(path, {"state": "new"})
    assert json.loads(path.read_text()) == {"state": "old"}


def test_data_is_on_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that reaches the disk before the data would leave an empty file after a power cut."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        # What the flush can see: bytes still in a Python buffer would be missing.
        events.append("folder" if target.is_dir() else f"{target.name}:{target.stat().st_size}")
        fsync(descriptor)

    def recorded_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    write_atomic(tmp_path / "a", b"12345")
    assert events == ["a.tmp:5", "rename", "folder"]


def test_folders_are_renamed_too(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text("x")
    rename_durable(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "file").read_text() == "x"
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("sync", [sync_file, sync_folder])
def test_flushing_what_is_not_there_is_an_error(sync: object, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nothing")  # type: ignore[operator]
    sync(tmp_path)  # type: ignore[operator]
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_not_json_and_touches_nothing(value: float, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": value})
    assert json.loads(path.read_text()) == {"x": 1.0}


@given(value=JSON)
def test_json_round_trip(value: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "round-trip.json"
    write_json(path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == value
