"""What a node is compared by, and for which nodes: without a cluster."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import node_checks
from actors.node_checks import PACKAGES, VLLM, Folder, Need, NodeChecks, fits, selects
from actors.node_look import PIECE, look, mark_folder
from actors.preflight import Role
from rlhf.errors import InputError

ROLE = Role("learner", 1, cpus=2, gpus=0, strategy="PACK", labels={"pool": "in(a, b)"})


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({"Resources": {"CPU": 2.0}, "Labels": {"pool": "b"}}, True),
        ({"Resources": {"CPU": 1.0}, "Labels": {"pool": "b"}}, False),
        ({"Resources": {"memory": 9e9}, "Labels": {"pool": "b"}}, False),  # a head without CPUs
        ({"Resources": {"CPU": 2.0}, "Labels": {"pool": "c"}}, False),
        ({"Resources": {"CPU": 2.0}}, False),
    ],
)
def test_nodes_that_can_hold_no_actor_are_known(node: dict[str, Any], expected: bool) -> None:
    assert fits(ROLE, node) is expected


@pytest.mark.parametrize(
    ("selector", "value", "expected"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "a", False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "ab", False),
        ("!in(a, b)", "a", False),
        ("!in(a, b)", "c", True),
    ],
)
def test_selectors_are_rays(selector: str, value: str | None, expected: bool) -> None:
    assert selects(selector, value) is expected


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(5 * PIECE))
    (folder / "notes.md").write_text("not a part of the model")
    return folder


def test_a_mark_tells_models_of_one_size_apart_and_does_not_mind_other_files(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one"), model(tmp_path / "two")
    (two / "notes.md").unlink()
    (two / "logs").mkdir()
    assert mark_folder(str(one)) == mark_folder(str(two))
    for offset in (0, 5 * PIECE // 2 + 1, 5 * PIECE - 1):
        with (two / "model.safetensors").open("r+b") as file:
            file.seek(offset)
            file.write(b"x")
        assert mark_folder(str(one)) != mark_folder(str(two)), offset
        shutil.copy(one / "model.safetensors", two)
        assert mark_folder(str(one)) == mark_folder(str(two))
    assert mark_folder(str(tmp_path / "none")) == "No such file or directory"


def test_what_is_found_here(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: x")
    found = look(PACKAGES | VLLM | {"other": ("surely-not-installed",)}, [str(tmp_path)], str(tmp_path))
    versions = found["versions"]
    assert set(versions) == {*PACKAGES, "vllm", "other", "python"}
    assert versions.pop("other") == ""
    assert all(version[0].isdigit() for version in versions.values()), versions
    assert found["run_dir"] is None
    assert found["config"].startswith("7 ")
    assert len(found["code"]) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"], "the trial was left behind"
    # A folder in which not even root may make a file.
    assert look({}, [], "/proc/self")["run_dir"]
    assert look({}, [], str(tmp_path / "none"))["run_dir"] == "No such file or directory"


NODE = {"NodeID": "0123456789abcdef", "NodeName": "10.0.0.3", "Alive": True, "Resources": {"CPU": 2.0},
        "Labels": {"pool": "a"}}  # fmt: skip
WHERE = "node 10.0.0.3 (01234567)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"versions": {"torch": "2.13.0+cu130"}}, None),
        ({"versions": {"torch": "2.12.0"}}, f"{WHERE} has torch 2.12.0, this process has 2.13.0+cpu; install the same"),
        ({"versions": {"vllm": ""}}, f"{WHERE} has no vllm, this process has 0.32.0; install the same"),
        ({"versions": {"python": "3.12"}}, f"{WHERE} has python 3.12, this process has 3.11; install"),
        ({"code": "0"}, f"{WHERE} has other code of rlhf 0.1.0 than this process; install"),
        ({"models": "No such file or directory"},
         f"policy.path = 'm': {WHERE} cannot read /m (No such file or directory); put it on storage that every node"),
        ({"models": {"config.json": "1 a"}},
         f"policy.path = 'm': on {WHERE} /m holds another model than here (w.safetensors is missing); put it on"),
        ({"models": {"config.json": "1 a", "w.safetensors": "9 z"}},
         f"policy.path = 'm': on {WHERE} /m holds another model than here (w.safetensors differs); put it on"),
        ({"run_dir": "Read-only file system"},
         f"output_dir = 'runs': {WHERE} cannot write /runs/x (Read-only file system); learner ranks write"),
        ({"config": "No such file or directory"},
         f"output_dir = 'runs': on {WHERE} /runs/x is another folder than here (config.yaml differs); learner ranks"),
    ],
)  # fmt: skip
async def test_every_difference_names_node_key_and_remedy(
    change: dict[str, Any], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {
        "versions": {"rlhf": "0.1.0", "torch": "2.13.0+cpu", "vllm": "0.32.0", "python": "3.11"},
        "code": "abc",
        "models": {"/m": {"config.json": "1 a", "w.safetensors": "9 b"}},
        "run_dir": None,
        "config": "5 c",
    }
    there = {name: change.get(name, value) for name, value in here.items()}
    there["versions"] = here["versions"] | change.get("versions", {})
    there["models"] = {"/m": change.get("models", here["models"]["/m"])}

    async def answer(*_: Any) -> dict[str, Any]:
        return there

    monkeypatch.setattr(node_checks, "ray", SimpleNamespace(nodes=lambda: [NODE]))
    monkeypatch.setattr(node_checks.node_look, "look", lambda *_: here)
    need = Need(ROLE, [Folder("policy.path", "m", Path("/m"))], writes=True, packages=VLLM)
    checks = NodeChecks([need], Folder("output_dir", "runs", Path("/runs/x")), lambda text: None)
    monkeypatch.setattr(checks, "_ask", answer)
    if message is None:
        await checks.check_nodes()
        return
    with pytest.raises(InputError) as error:
        await checks.check_nodes()
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("grows", "expected"), [(False, []), (True, ["0123456789abcdef"])])
async def test_a_role_that_fits_no_node_is_left_to_the_preflight(
    grows: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def check(node: str) -> None:
        asked.append(node)

    monkeypatch.setattr(node_checks, "ray", SimpleNamespace(nodes=lambda: [NODE]))
    needs = [Need(ROLE), Need(Role("generator", 1, cpus=64, gpus=0, strategy="PACK"))]
    checks = NodeChecks(needs, None, lambda text: None, grows=grows)
    monkeypatch.setattr(checks, "check_node", check)
    await checks.check_nodes()
    assert asked == expected
