"""What importing a part may load, and which part may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers")


def loaded_by(module: str) -> set[str]:
    """Top-level names of the modules that a fresh process has after importing `module`."""
    code = f"import sys, {module}; print(' '.join({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["rlhf.config", "rlhf.cli", "rlhf.planning", "rlhf.exporting", "rlhf.fetch"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    loaded = loaded_by(module)
    assert module.partition(".")[0] in loaded
    assert not loaded & set(HEAVY)


def imports(path: Path) -> Iterator[str]:
    """Top-level names that a file imports anywhere, by statement or by importlib with a constant."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value.partition(".")[0]


def importers(package: str) -> set[str]:
    files = [*Path("rlhf").rglob("*.py"), *Path("actors").rglob("*.py")]
    assert len(files) > 20
    return {path.as_posix() for path in files if package in imports(path)}


def test_ray_is_imported_below_actors_only() -> None:
    found = importers("ray")
    assert found
    assert all(path.startswith("actors/") for path in found), found


def test_vllm_is_imported_in_its_adapter_only() -> None:
    found = importers("vllm")
    assert found
    assert all(path.startswith("actors/engine/") for path in found), found


def test_deepspeed_is_imported_in_one_file() -> None:
    assert importers("deepspeed") == {"rlhf/learning/engine.py"}


def test_only_the_command_line_reaches_from_rlhf_into_actors() -> None:
    commands = {"rlhf/cli.py", "rlhf/cli_judge.py", "rlhf/cli_submit.py"}
    assert {path for path in importers("actors") if path.startswith("rlhf/")} == commands
