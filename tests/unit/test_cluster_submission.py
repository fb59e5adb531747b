"""What a run takes along to a cluster: paths, data files, its code as a package, names of variables."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf import submission
from rlhf.config import RunConfig, load_run
from rlhf.errors import InputError
from rlhf.submission import check_environment, make_bundle, portable_config

ABSENT = "/nowhere-on-this-machine"


def config(tmp_path: Path, shared: tuple[str, ...] = (), **changes: Any) -> Any:
    document: dict[str, Any] = {
        "name": "run",
        "output_dir": f"{ABSENT}/runs",
        "policy": {"path": "org/model"},
        "prompts": {"path": "org/prompts"},
        "cluster": {"shared": list(shared), "temp_dir": "/tmp/x"},
    }
    document |= changes
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in document.items() if value is not None}))
    return load_run(file)


def refused(tmp_path: Path, shared: tuple[str, ...] = (), **changes: Any) -> str:
    with pytest.raises(InputError) as error:
        portable_config(config(tmp_path, shared, **changes), tmp_path / "inputs")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_the_cluster_has_stays_as_it_is(tmp_path: Path) -> None:
    found = portable_config(config(tmp_path), tmp_path / "inputs")
    assert found["output_dir"] == f"{ABSENT}/runs"
    assert found["policy"]["path"] == "org/model"
    assert found["prompts"]["path"] == "org/prompts"
    assert not (tmp_path / "inputs").exists()


def test_the_job_joins_the_cluster_it_runs_in(tmp_path: Path) -> None:
    found = portable_config(config(tmp_path), tmp_path / "inputs")
    assert found["cluster"]["address"] == "auto"
    assert found["cluster"]["temp_dir"] is None
    assert RunConfig.model_validate(found)


def test_relative_paths_below_a_shared_folder_become_absolute(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").write_text("{}")
    found = portable_config(
        config(
            tmp_path,
            (str(tmp_path),),
            output_dir="runs",
            policy={"path": "./model"},
            prompts={"path": "prompts.jsonl", "eval": {"path": "sub/../prompts.jsonl"}},
        ),
        tmp_path / "inputs",
    )
    assert found["output_dir"] == str(tmp_path / "runs")
    assert found["policy"]["path"] == str(tmp_path / "model")
    assert found["prompts"]["path"] == found["prompts"]["eval"]["path"] == str(tmp_path / "prompts.jsonl")
    assert not (tmp_path / "inputs").exists()


def test_a_folder_beside_a_shared_one_is_not_in_it(tmp_path: Path) -> None:
    (tmp_path / "shared-not").mkdir()
    text = refused(tmp_path, (str(tmp_path / "shared"),), policy={"path": str(tmp_path / "shared-not")})
    assert text.startswith(f"policy.path = '{tmp_path}/shared-not': ")
    assert "cluster.shared" in text


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("output_dir", {"output_dir": "runs"}),
        ("policy.path", {"policy": {"path": "HERE"}}),
        ("judge.path", {"judge": {"type": "pair_model", "path": "HERE"}}),
        ("eval_judge.path", {"eval_judge": {"type": "reward_model", "path": "HERE"}}),
        (
            "judge.members.1.judge.path",
            {
                "judge": {
                    "type": "ensemble",
                    "members": [{"judge": {"type": "sentiment"}}, {"judge": {"type": "pair_model", "path": "HERE"}}],
                }
            },
        ),
        ("prompts.path", {"prompts": {"path": "HERE"}}),
        ("prompts.eval.path", {"prompts": {"path": "org/prompts", "eval": {"path": "HERE"}}}),
    ],
)
def test_a_folder_of_this_machine_is_refused_by_its_key(tmp_path: Path, key: str, changes: dict[str, Any]) -> None:
    text = json.loads(json.dumps(changes).replace("HERE", str(tmp_path)))
    assert refused(tmp_path, **text).startswith(f"{key} = ")


@pytest.mark.parametrize("path", ["./missing", "prompts.jsonl", "a/b/c", "data/prompts.parquet"])
def test_a_relative_path_that_is_nowhere_is_refused(tmp_path: Path, path: str) -> None:
    assert "does not exist" in refused(tmp_path, prompts={"path": path})


def test_data_files_travel_under_their_content(tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    names = []
    for text in ("one", "two", "one"):
        data.write_text(text)
        inputs = tmp_path / f"{len(names)}" / "inputs"
        inputs.parent.mkdir()
        found = portable_config(config(tmp_path, prompts={"path": str(data), "eval": {"path": str(data)}}), inputs)
        names.append(found["prompts"]["path"])
        assert found["prompts"]["eval"]["path"] == names[-1]
        assert (inputs.parent / names[-1]).read_text() == text
    assert names[0] == names[2] != names[1]
    assert names[0].endswith("-prompts.jsonl")


def test_data_files_of_a_preference_set_travel(tmp_path: Path) -> None:
    data, held_out = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    data.write_text("a")
    held_out.write_text("b")
    preferences = {"path": str(data), "held_out": {"path": str(held_out)}}
    found = portable_config(config(tmp_path, prompts=None, preferences=preferences), tmp_path / "inputs")
    assert {path.read_text() for path in (tmp_path / "inputs").iterdir()} == {"a", "b"}
    assert found["preferences"]["held_out"]["path"].endswith("-b.jsonl")


def test_large_data_does_not_travel(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(submission, "MAX_INPUTS", 5)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("123")
    prompts = {"path": str(tmp_path / "a.jsonl"), "eval": {"path": str(tmp_path / "a.jsonl")}}
    portable_config(config(tmp_path, prompts=prompts), tmp_path / "inputs")  # One file, counted once.
    prompts["eval"] = {"path": str(tmp_path / "b.jsonl")}
    assert refused(tmp_path, prompts=prompts).startswith("prompts.eval.path = ")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    tmp_path = tmp_path_factory.mktemp("bundle")
    package = tmp_path / "my_judge.py"
    package.write_text("def score(messages, response, reference):\n    return 1.0\n")
    folder = tmp_path / "job"
    folder.mkdir()
    return make_bundle(config(tmp_path), folder, [package])


def test_a_bundle_is_the_project_with_its_metadata(bundled: Any) -> None:
    (found,) = importlib.metadata.distributions(name="rlhf", path=[str(bundled.folder)])
    entry = {(point.group, point.value) for point in found.entry_points}
    assert ("vllm.general_plugins", "actors.engine.plugin:register") in entry
    assert found.version == bundled.metadata["rlhf_version"]


def test_a_job_runs_the_code_of_its_bundle(bundled: Any) -> None:
    program = "import rlhf, actors, my_judge, importlib.metadata as m; print(rlhf.__file__); print(actors.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=bundled.folder, capture_output=True, text=True, check=True
    )
    assert all(Path(line).is_relative_to(bundled.folder) for line in done.stdout.split())


def test_a_bundle_holds_every_module_and_data_file(bundled: Any) -> None:
    for package in ("rlhf", "actors"):
        for file in Path(package).rglob("*"):
            if file.suffix in (".py", ".jsonl", ".html", ".typed") and "__pycache__" not in file.parts:
                assert (bundled.folder / file).read_bytes() == file.read_bytes()


def test_metadata_name_run_version_and_config_and_hold_no_more(bundled: Any) -> None:
    assert bundled.metadata.keys() == {"run", "config_sha256", "rlhf_version"}
    assert bundled.metadata["run"] == "run"
    read = load_run(bundled.folder / "config.yaml")
    assert read.policy.path == "org/model"


def test_the_hash_follows_the_config(tmp_path: Path) -> None:
    digests = set()
    for index, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(index)
        folder.mkdir()
        digests.add(make_bundle(config(tmp_path, seed=seed), folder, installed=True).metadata["config_sha256"])
        assert {path.name for path in folder.iterdir()} == {"config.yaml"}
    assert len(digests) == 2


@pytest.mark.parametrize(("name", "reason"), [("missing.py", "no such"), ("rlhf", "already"), ("notes.txt", "no such")])
def test_a_package_that_cannot_be_taken_along_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    folder = tmp_path / "job"
    (folder / "rlhf").mkdir(parents=True)
    (tmp_path / "rlhf").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=f"--package .*{reason}"):
        make_bundle(config(tmp_path), folder, [tmp_path / name], installed=True)


def test_without_sources_the_user_is_told_of_installed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(submission, "SOURCES", ("not-there.toml",))
    with pytest.raises(InputError, match="--installed"):
        make_bundle(config(tmp_path), tmp_path)


def test_variables_are_asked_for_by_name(monkeypatch: Any) -> None:
    monkeypatch.setenv("RLHF_TEST_THERE", "x")
    monkeypatch.delenv("RLHF_TEST_GONE", raising=False)
    monkeypatch.setenv("RLHF_TEST_EMPTY", "")
    check_environment(["RLHF_TEST_THERE"])
    with pytest.raises(InputError, match=r"^cluster\.env: RLHF_TEST_GONE, RLHF_TEST_EMPTY not set"):
        check_environment(["RLHF_TEST_THERE", "RLHF_TEST_GONE", "RLHF_TEST_EMPTY"])


def test_a_value_in_place_of_a_name_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cluster\.env\.0") as error:
        config(tmp_path, cluster={"env": ["WANDB_API_KEY=f00dface"]})
    assert "f00dface" not in str(error.value)


def test_a_relative_shared_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cluster\.shared\.0 'data': expected an absolute path"):
        config(tmp_path, ("data",))


@given(st.lists(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=5), min_size=1, max_size=4))
def test_below_a_shared_folder_every_path_is_the_shells(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    found = submission._portable(f"{path}/../{parts[-1]}", "k", "model", [Path("/")], Path("inputs"), {})
    assert found == path
