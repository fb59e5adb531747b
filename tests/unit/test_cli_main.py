"""Exit codes, one-line errors and what each light command prints."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rlhf import cli
from rlhf.errors import InputError, RLHFError

QUICKSTART = "configs/quickstart.yaml"
JUDGES = "'sentiment', 'pair_model', 'reward_model', 'llm', 'verifier', 'python', 'safety', 'ensemble'"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlhf.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "200"},
    )


def exits(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    code = caught.value.code
    return 0 if code is None else int(code)


@pytest.fixture(autouse=True)
def _sigterm_as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def use_app(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Put a module `actors.app` with the given `train` in the place of the real one, which would start Ray."""
    package = folder / "actors"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "app.py").write_text(f"from rlhf.errors import *\ndef train(config, fresh=False):\n    {body}\n")
    for name in [name for name in sys.modules if name == "actors" or name.startswith("actors.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))


def test_version() -> None:
    done = run("version")
    assert (done.returncode, done.stdout, done.stderr) == (0, "0.1.0\n", "")


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "--nope", "x.yaml"], ["export", "a"]])
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Usage: rlhf" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bad_config_is_one_line_on_stderr_and_exit_2() -> None:
    done = run("train", QUICKSTART, "judge.type=pm")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (f"rlhf: configs/quickstart.yaml: judge.type = 'pm': expected one of {JUDGES}\n")


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise RLHFError('the run\\nfailed')", 1, "rlhf: the run failed\n"),
        ("raise DeadlineError('waited 3 s for generator-0')", 1, "rlhf: waited 3 s for generator-0\n"),
        (
            "raise InputError('policy.path = 1: no')",
            2,
            "rlhf: configs/quickstart.yaml: policy.path = 1: no\n",
        ),
        (
            "raise InputError('configs/quickstart.yaml: x')",
            2,
            "rlhf: configs/quickstart.yaml: x\n",
        ),
        ("raise KeyboardInterrupt", 130, "rlhf: stopped by SIGINT\n"),
        ("import os; os.kill(os.getpid(), 15); import time; time.sleep(5)", 143, "rlhf: stopped by SIGTERM\n"),
        ("return None", 0, ""),
    ],
)
def test_how_a_run_ends_is_its_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    body: str,
    code: int,
    line: str,
) -> None:
    use_app(monkeypatch, tmp_path, body)
    assert exits(["train", QUICKSTART]) == code
    assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_app(monkeypatch, tmp_path, "raise ZeroDivisionError('a defect')")
    with pytest.raises(ZeroDivisionError, match="a defect"):
        cli.main(["train", QUICKSTART])


def test_train_hands_over_the_resolved_config_and_fresh(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    use_app(monkeypatch, tmp_path, "print(config.name, config.rounds.count, fresh)")
    assert exits(["train", QUICKSTART, "name=hh", "--fresh", "rounds.count=2"]) == 0
    assert exits(["train", QUICKSTART]) == 0
    assert capsys.readouterr().out == "hh 2 True\nquickstart 8 False\n"


def test_sigterm_while_the_command_is_still_loading(tmp_path: Path) -> None:
    fifo = tmp_path / "c.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", "train", str(fifo)], stderr=subprocess.PIPE, text=True
    )
    # Opening the other end succeeds once the command, its handler set, reads its config: it waits there.
    with fifo.open("w"):
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (143, "rlhf: stopped by SIGTERM\n")


def test_validate_prints_a_config_that_loads_and_the_plan() -> None:
    done = run("validate", QUICKSTART, "rounds.count=3")
    assert done.returncode == 0, done.stderr
    text, _, plan = done.stdout.partition("Placement and memory")
    resolved = yaml.safe_load(text)
    assert (resolved["rounds"]["count"], resolved["cluster"]["deadlines"]["start"]) == (3, 900)
    assert all(role in plan for role in ("generator", "judge", "learner", "object store"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("prompts.path=none.jsonl", ("prompts.path = none.jsonl", "no such file")),
        ("prompts.column=zz", ("prompts.column = zz", "its columns: prompt")),
        ("prompts.eval.path=none.jsonl", ("prompts.eval.path = none.jsonl", "no such file")),
        ("policy.path=./none", ("policy.path = './none'", "no model there")),
        ("policy.path=configs", ("policy.path = 'configs'", "no model there")),
    ],
)
def test_validate_finds_missing_inputs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert exits(["validate", QUICKSTART, override]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("rlhf: configs/quickstart.yaml: ")
    assert all(word in captured.err for word in words)


def test_report_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exits(["report", str(tmp_path)]) == 2
    assert "it has no config.yaml" in capsys.readouterr().err


def test_every_error_of_the_project_has_an_exit_code_of_the_contract() -> None:
    def below(kind: type[RLHFError]) -> set[type[RLHFError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert {kind.exit_code for kind in below(RLHFError)} <= {1, 2, 143}
    assert InputError.exit_code == 2
