"""`python -m tests.chaos.named_actors ADDRESS` answers every line on stdin with the living named actors, as JSON.

A process of its own, since Ray reads its token once in a process. It asks the GCS and is no driver: that starts no
worker and costs no second.
"""

import json
import sys

from ray._raylet import GcsClientOptions, GlobalStateAccessor
from ray.core.generated.gcs_pb2 import ActorTableData


def main(address: str) -> None:
    accessor = GlobalStateAccessor(GcsClientOptions.create(address, None, True, True))
    if not accessor.connect():
        sys.exit(f"no GCS at {address}")
    print("{}", flush=True)
    for _ in sys.stdin:
        print(json.dumps(named_actors(accessor)), flush=True)


def named_actors(accessor: GlobalStateAccessor) -> dict[str, int]:
    """Process id by name, of the job that started last; relays have no names and are told by their class."""
    found = [ActorTableData.FromString(row) for row in accessor.get_actor_table(None, None)]
    alive = [
        (actor.name or actor.class_name, actor)
        for actor in found
        if actor.state == ActorTableData.ALIVE and (actor.name or actor.class_name == "Relay")
    ]
    jobs = [int.from_bytes(actor.job_id, "little") for _, actor in alive]
    return {name: actor.pid for (name, actor), job in zip(alive, jobs, strict=True) if job == max(jobs)}


if __name__ == "__main__":
    main(sys.argv[1])
