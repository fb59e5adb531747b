"""configs/recipes: they validate, fit their GPUs and nodes, and their headers say what `rlhf validate` computes."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.cluster import ClusterInfo
from actors.judge_launch import JudgeLauncher
from actors.launch import Launcher
from actors.placement import Patience, share
from rlhf import cli
from rlhf.config import RunConfig, load_config
from rlhf.errors import InputError, RLHFError
from rlhf.planning import Plan, make_plan, model_size
from rlhf.submission import portable_config
from tests import recipes

GIB = 1 << 30
GPU = 80e9 / GIB
"""GiB of a GPU of 80 GB, taken at its word: most have 79 and more."""

QWEN25_3B = recipes.QWEN25_1_5B | {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
}  # fmt: skip
KINDS: list[tuple[dict[str, Any], int]] = [
    (recipes.QWEN25_1_5B, 1_543_714_304),
    (QWEN25_3B, 3_085_938_688),
    (recipes.LLAMA3_8B, 8_030_261_248),
    (recipes.LLAMA33_70B, 70_553_706_496),
]
"""Architectures and their parameters, which the model cards give as 1.54B, 3.09B, 8.03B and 70.6B."""


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], str]:
    """Folders of models by architecture, each written once."""
    top, written = tmp_path_factory.mktemp("models"), {}

    def find(architecture: dict[str, Any]) -> str:
        key = str(architecture)
        if key not in written:
            written[key] = recipes.write_model(top / str(len(written)), architecture)
        return written[key]

    return find


@pytest.fixture
def with_models(folder_of: Callable[[dict[str, Any]], str]) -> Callable[[str], list[str]]:
    """Overrides that name folders of a recipe's models."""

    def overrides(name: str) -> list[str]:
        policy, judge = recipes.MODELS[name]
        return [f"policy.path={folder_of(policy)}", f"judge.path={folder_of(judge)}"]

    return overrides


def claimed(number: float, computed: float) -> bool:
    """Does a header's rounded number stand for this one?"""
    return abs(number - computed) <= max(0.06, 0.02 * computed)


def gpu_bytes(plan: Plan, role: str) -> int:
    """Bytes of one GPU in a role's turn, or all the time."""
    turns = {turn.name: turn.total for turn in plan.turns}
    return turns[role] if turns else next(found.total for found in plan.roles if found.name == role)


@pytest.mark.parametrize(("architecture", "parameters"), KINDS)
def test_models_are_those_of_the_cards(folder_of: Any, architecture: dict[str, Any], parameters: int) -> None:
    assert model_size(folder_of(architecture), "policy.path").parameters == parameters


@pytest.mark.parametrize("name", recipes.NAMES)
def test_the_header_says_what_is_computed_and_it_fits(name: str, with_models: Any) -> None:
    header = recipes.header(name)
    plan = make_plan(load_config(recipes.path(name), with_models(name)))
    roles = {role.name: role for role in plan.roles}
    assert plan.device == "cuda"
    assert roles.keys() == header.memory.keys()
    for role, figures in header.memory.items():
        assert (figures.actors, figures.gpus) == (roles[role].actors, roles[role].gpus)
        assert claimed(figures.gpu_gib, gpu_bytes(plan, role) / GIB), role
        assert claimed(figures.cpu_gib, roles[role].host_total / GIB), role
        assert gpu_bytes(plan, role) / GIB < 0.9 * GPU
    for turn in plan.turns:
        assert turn.total / GIB < 0.9 * GPU
    # The drawing holds every actor, and its nodes have the CPUs and the memory for them.
    drawn = header.roles()
    for role in roles.values():
        assert sum(node[role.name] for node in drawn) == role.actors * role.gpus
    for node in drawn:
        there = {role: node[role] // roles[role].gpus for role in node}
        assert sum(count * roles[role].cpus for role, count in there.items()) <= header.cpus
        host = sum(count * roles[role].host_total for role, count in there.items())
        assert (host + plan.object_store / len(drawn)) / GIB <= header.node_gib


def test_a_policy_of_3b_fits_the_one_gpu_too(folder_of: Any) -> None:
    models = [f"policy.path={folder_of(QWEN25_3B)}", f"judge.path={folder_of(recipes.LLAMA3_8B)}"]
    plan = make_plan(load_config(recipes.path("one-gpu"), models))
    assert max(turn.total for turn in plan.turns) / GIB < GPU
    assert plan.total / GIB <= recipes.header("one-gpu").node_gib


def test_eight_gpus_fit_in_turns_too(with_models: Any) -> None:
    header = recipes.header("eight-gpus")
    assert len(header.turns) == 4
    plan = make_plan(load_config(recipes.path("eight-gpus"), [*with_models("eight-gpus"), *header.turns]))
    assert claimed(51, max(turn.total for turn in plan.turns) / GIB)
    assert claimed(780, plan.total / GIB)


def test_the_eight_gpu_recipe_is_the_published_one() -> None:
    """RLHFlow/Online-RLHF, "RLHF Workflow" (TMLR 2024)."""
    found = load_config(recipes.path("eight-gpus")).model_dump(mode="json")
    expected: dict[str, dict[str, Any]] = {
        "rounds": {"count": 3, "prompts": 20_000, "lookahead": 0},
        "generator": {"samples": 4, "sampling": {"temperature": 1.0, "top_p": 1.0, "max_tokens": 2048}},
        "pairing": {"strategy": "best_vs_worst", "min_margin": 0.0},
        "learner": {"batch_size": 128, "epochs": 2},
    }
    assert {top: {key: found[top][key] for key in keys} for top, keys in expected.items()} == expected
    optimizer, learner = found["learner"]["optimizer"], found["learner"]
    assert (optimizer["lr"], optimizer["schedule"], optimizer["warmup_ratio"]) == (5e-7, "cosine", 0.0)
    assert (learner["loss"]["type"], learner["loss"]["beta"]) == ("sigmoid", 0.1)
    assert learner["reference"]["policy"] == "initial"
    assert (found["prompts"]["max_tokens"], found["judge"]["type"]) == (1000, "pair_model")


@pytest.mark.parametrize("name", recipes.NAMES)
def test_the_commands_of_the_header_work(
    name: str, with_models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    root = Path.cwd()
    commands = [shlex.split(command) for command in recipes.header(name).commands]
    assert {command[1] for command in commands if command[0] == "rlhf"} >= {"validate", "submit"}
    # What the recipe says the user brings: a file of prompts beside it.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/prompts.jsonl").write_text('{"context_messages": [{"role": "user", "content": "Hi"}]}\n')
    for command in commands:
        file = next(part for part in command if part.startswith("configs/"))
        overrides = [part for part in command if "=" in part and not part.startswith("-")]
        config = load_config(root / file, overrides)
        if command[1] == "submit":
            found = portable_config(config, tmp_path / "inputs")
            assert found["output_dir"].startswith("/shared/")
    local = [f"prompts.path={root}/configs/prompts/train.jsonl", "prompts.column=prompt"]
    local += [f"prompts.eval.path={root}/configs/prompts/eval.jsonl", "prompts.eval.column=prompt"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", str(root / recipes.path(name)), *with_models(name), *local])
    shown = capsys.readouterr()
    assert not ended.value.code, shown.err
    assert "Placement and memory (cuda)" in shown.out


def test_four_nodes_refuse_models_that_are_not_shared(tmp_path: Path) -> None:
    config = load_config(recipes.path("four-nodes"), [f"policy.path={tmp_path}"])
    with pytest.raises(InputError, match=r"policy.path = .* list that folder in cluster.shared"):
        portable_config(config, tmp_path / "inputs")


class Table:
    """Keeps the last table."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.rows = [dict(zip(columns, row, strict=True)) for row in rows]


def ask(config: RunConfig, nodes: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a run shows of its roles before it starts, on a cluster of these nodes."""
    cluster = ClusterInfo("recipes", "cuda", private=False)
    launcher = Launcher(config, cluster, "policy", {})
    judges = JudgeLauncher(cluster, config.cluster, 0, None, lambda message: None)
    table: Any = Table()
    monkeypatch.setattr("actors.launch.live_nodes", lambda: nodes)
    monkeypatch.setattr("actors.placement.live_nodes", lambda: nodes)
    sharing, alone = launcher._roles(judges, {"judge": config.judge})
    launcher._preflight(Patience(1.0), table, [share(sharing), *alone] if sharing else alone)
    return table.rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one-gpu", r"1 generator \+ learner \+ judge actors of 12 CPU \+ 1 GPU where 0 fit; 1 GPU in all"),
        ("eight-gpus", "8 GPU in all where there are 7"),
        ("four-nodes", "32 GPU in all where there are 31"),
    ],
)
def test_a_run_asks_for_the_drawn_nodes_and_no_gpu_less_will_do(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, header = load_config(recipes.path(name)), recipes.header(name)
    nodes = [{"CPU": float(header.cpus), "GPU": float(count)} for count in header.gpus()]
    table = ask(config, nodes, monkeypatch)
    assert all(row["fit"] == row["actors"] for row in table)
    found = {part: int(row["actors"]) for row in table for part in row["role"].split(" + ")}
    assert found == {role: figures.actors for role, figures in header.memory.items()}
    nodes[-1]["GPU"] -= 1
    with pytest.raises(RLHFError, match=message):
        ask(config, nodes, monkeypatch)


@pytest.mark.parametrize(
    ("name", "manifest"), [("eight-gpus", "cluster/rayjob.yaml"), ("four-nodes", "cluster/raycluster.yaml")]
)
def test_the_nodes_are_those_of_the_manifests(name: str, manifest: str) -> None:
    header = recipes.header(name)
    assert manifest in Path(recipes.path(name)).read_text()
    specs = [document.get("spec", {}) for document in yaml.safe_load_all(Path(manifest).read_text())]
    spec = next(s for s in (s.get("rayClusterSpec", s) for s in specs) if "workerGroupSpecs" in s)
    pool = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    (worker,) = pool["template"]["spec"]["containers"]
    asked = worker["resources"]["requests"]
    assert pool["maxReplicas"] == len(header.nodes)
    assert (asked["cpu"], asked["memory"]) == (str(header.cpus), f"{header.node_gib:.0f}Gi")
    assert {int(asked["nvidia.com/gpu"])} == set(header.gpus())
