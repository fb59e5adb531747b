"""`python -m tests.chaos.relayed train ...` is `rlhf train ...` with the smallest fleet behind relays too."""

import actors.launch
from rlhf.cli import run

if __name__ == "__main__":
    actors.launch.DIRECT = 0
    run()
