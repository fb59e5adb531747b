"""How the process of a command ends: its exit code survives threads that crash while Python is taken apart."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

BEGIN = """
import atexit, os, signal, sys, types
import rlhf.cli as cli

class Crash:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGSEGV):
        kill(process, number)

crash = Crash()  # dropped when Python is taken apart, as what other threads still use is
atexit.register(print, "said at exit")
"""
WITH_RAY = BEGIN + "sys.modules['ray'] = types.ModuleType('ray')\n"


def end(begin: str, main: str) -> subprocess.CompletedProcess[str]:
    code = f"{begin}\ndef main():\n    print('last line', end='')\n    {main}\ncli.main = main\ncli.run()\n"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("main", "code"), [("sys.exit(1)", 1), ("sys.exit(143)", 143), ("sys.exit()", 0), ("pass", 0)])
def test_the_exit_code_survives_a_crash_while_python_is_taken_apart(main: str, code: int) -> None:
    done = end(WITH_RAY, main)
    assert (done.returncode, done.stdout, done.stderr) == (code, "last linesaid at exit\n", "")


def test_the_crash_is_real() -> None:
    assert end(BEGIN, "sys.exit(1)").returncode == -signal.SIGSEGV


def test_an_unexpected_error_keeps_its_traceback() -> None:
    done = end(WITH_RAY, "raise KeyError('what')")
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'what'\n")


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "1>/dev/full", "1>&- 2>&-"])
def test_the_exit_code_survives_closed_and_full_streams(closed: str, tmp_path: Path) -> None:
    script = tmp_path / "end.py"
    script.write_text(f"{WITH_RAY}\ncli.main = lambda: sys.exit(143)\nprint('out')\ncli.run()\n")
    # Buffered, as output into a file is: what was printed meets the full disk at the end.
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    command = ["bash", "-c", f"{sys.executable} {script} {closed}"]
    done = subprocess.run(command, capture_output=True, check=False, env=buffered)
    assert done.returncode == 143


def test_a_text_in_place_of_a_code_is_shown() -> None:
    done = end(WITH_RAY, "sys.exit('what went wrong')")
    assert (done.returncode, done.stderr) == (1, "what went wrong\n")
