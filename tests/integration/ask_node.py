"""Asks the node `odd` what it has: python -m tests.integration.ask_node ADDRESS MODEL HIDDEN CLOSED

MODEL is a folder that all nodes have, HIDDEN one that `odd` does not see, CLOSED one that it cannot write. Prints what
`NodeChecks` has against the node, as JSON by case; null for nothing.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import ray

from actors.node_checks import VLLM, Folder, Need, NodeChecks
from actors.preflight import Role
from rlhf.errors import RLHFError

WAIT_S = 60.0


async def ask(need: Need, output: Folder, node: str | None) -> str | None:
    """What one check says, of all nodes if none is given."""
    checks = NodeChecks([need], output, lambda message: None)
    try:
        await (checks.check_node(node) if node else checks.check_nodes())
    except RLHFError as error:
        return str(error)
    return None


async def main(model: Path, hidden: Path, closed: Path) -> dict[str, str | None]:
    """All cases, one after the other."""
    until = time.monotonic() + WAIT_S
    while not (odd := [n["NodeID"] for n in ray.nodes() if n["NodeName"] == "odd" and n["Alive"]]):
        if time.monotonic() > until:
            raise TimeoutError("the node did not come")
        await asyncio.sleep(0.2)
    role = Role("learner", 1, 1, 0, "PACK", {"odd": 1})
    there, not_there = (Folder("policy.path", "m", path) for path in (model, hidden))
    output = Folder("output_dir", "runs", closed / "tiny")
    training = Role("learner", 1, 1, 0, "PACK", {"training": 1})
    return {
        "elsewhere": await ask(Need(training, [not_there], writes=True, packages=VLLM), output, None),
        "versions": await ask(Need(role, [there], packages=VLLM), output, None),
        "model": await ask(Need(role, [there, not_there], writes=True), output, odd[0]),
        "output": await ask(Need(role, [there], writes=True), output, odd[0]),
    }


if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    print(json.dumps(asyncio.run(main(*map(Path, sys.argv[2:])))))
    ray.shutdown()
