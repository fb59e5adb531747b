"""A small disk of its own that can be filled, and damage to files."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE_MB = 1024
"""Room for four checkpoints of the tiny model, 80 MB each, and its policy."""


class Disk:
    """A folder; where this process may mount one, a file system of its own that can run full."""

    def __init__(self, path: Path):
        self.path = path
        self.can_fill = False

    def __enter__(self) -> "Disk":
        self.path.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "tmpfs", str(self.path)]
        self.can_fill = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.can_fill:
            subprocess.run(["umount", "-l", str(self.path)], check=True)

    @contextmanager
    def full(self) -> Iterator[None]:
        """No byte is free inside."""
        ballast = self.path / "ballast"
        try:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(1 << 20))
                except OSError:
                    pass
            yield
        finally:
            ballast.unlink()


def flip(path: Path, where: float) -> None:
    """Turn one bit around, at `where` (0 to 1) of the file's length."""
    with path.open("r+b") as file:
        position = int(where * path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def truncate(path: Path) -> None:
    """Cut a file in half."""
    os.truncate(path, path.stat().st_size // 2)
