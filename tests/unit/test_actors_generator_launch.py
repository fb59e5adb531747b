"""Where an elastic generator is started again: only on a node that is as the others are."""

from typing import Any

import pytest

from actors.generator_launch import GeneratorLauncher
from rlhf.errors import RLHFError
from rlhf.health import State
from tests.unit.fleet_world import Generator, World, requests, wanted


class Launcher(GeneratorLauncher):
    """Nodes are given out in turn; nothing is started."""

    def __init__(self, nodes: list[str]) -> None:
        self.nodes_given = nodes
        self.calls: list[str] = []
        self.check = self._compare

    async def _compare(self, node: str) -> None:
        self.calls.append(f"check {node}")
        if node == "other":
            raise RLHFError("node other: another vllm")

    async def end(self, name: str) -> None:
        self.calls.append(f"end {name}")

    async def _placed(self, name: str) -> str:
        return self.nodes_given.pop(0)

    async def launch(self, name: str) -> Any:
        self.calls.append(f"launch {name}")
        return Generator(name)


async def test_a_node_is_compared_before_anything_is_started_on_it() -> None:
    launcher = Launcher(["same"])
    assert (await launcher._again("g0")).name == "g0"
    assert launcher.calls == ["end g0", "check same", "launch g0"]
    launcher = Launcher(["other"])
    with pytest.raises(RLHFError, match="another vllm"):
        await launcher._again("g0")
    assert launcher.calls == ["end g0", "check other"]


async def test_a_node_that_is_refused_is_a_start_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.reviving.FIRST_PAUSE_S", 0.01)
    launcher = Launcher(["other", "same"])
    world = await World(Generator("g0", dies_after=3), budget=3).admitted()
    world.fleet._restart = launcher._again
    assert await world.sample(given := requests(4)) == wanted(given)
    assert any("another vllm" in alert for alert in world.alerts)
    assert launcher.calls == ["end g0", "check other", "end g0", "check same", "launch g0"]
    assert world.fleet.state("g0") == State.HEALTHY
