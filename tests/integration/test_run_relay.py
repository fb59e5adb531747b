"""A whole run whose generators are too many to be called one by one."""

import psutil
import pytest

from actors.relay import DIRECT


def relays() -> int:
    """Relay processes on this machine: Ray names a process after its actor's class."""
    return sum("ray::Relay" in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fleet_of_nine_is_served_by_a_relay(system):
    seen: list[int] = []
    assert relays() == 0

    def watch(path: object) -> bool:
        if len(seen) < 1000 and (found := relays()):
            seen.append(found)
        return False

    system.config["evaluation"] = {"every": 0}
    system.config["prompts"].pop("eval")
    system.config["rounds"] = {"count": 2, "prompts": 20}
    run = system.train(f"generator.replicas={DIRECT + 1}", "generator.cpus=1", stop=watch, timeout=800)
    assert (run.code, run.stderr) == (0, "")
    assert set(seen) == {1}
    assert [event["fleet/members"] for event in run.events("round")] == [DIRECT + 1] * 2
    assert [event["fleet/restarts"] for event in run.events("round")] == [0, 0]
    assert [run.manifest(round)["state"] for round in (1, 2)] == ["PUBLISHED"] * 2
