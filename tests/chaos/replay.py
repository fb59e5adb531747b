"""The learner alone on the sealed pairs of a run: `python replay.py RUN_DIR RANK WORLD_SIZE PORT` is one rank.

No Ray, no generators, no checkpoints: what it leaves in RUN_DIR/replayed is what a learner makes of the rounds that
nobody disturbs. Threads and ranks are the run's.
"""

import sys
from pathlib import Path

import torch
import yaml

from rlhf.config import RunConfig
from rlhf.rounds.ledger import Ledger
from rlhf.rounds.sealing import read_sealed


def run_config(run_dir: Path) -> RunConfig:
    """The resolved config that a run directory keeps."""
    document = yaml.safe_load((run_dir / "config.yaml").read_text())
    return RunConfig.model_validate({key: document[key] for key in document if key not in ("versions", "history")})


def main(run_dir: Path, rank: int, world_size: int, port: int) -> None:
    from tests.integration.ranks import start_learner

    torch.set_num_threads(1)
    config, ledger = run_config(run_dir), Ledger(run_dir)
    learner = start_learner(config, rank, world_size, port)
    for round in range(1, config.rounds.count + 1):
        digest = ledger.manifest(round)["pairs"]["sha256"]
        for _ in learner.steps(read_sealed(ledger.folder(round) / "pairs.parquet", round, digest)):
            pass
    learner.export_hf(run_dir / "replayed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
