"""Where vLLM leaves its sockets and files."""

import os
import tempfile
from pathlib import Path

from ray._private import worker


def leave_files_with_ray() -> None:
    """Make a folder beside Ray's own on this node the temporary folder of this process and of those that it starts.

    vLLM opens sockets and a rendezvous file for each engine and takes none of them away, the less when it is killed.
    With Ray's they go when Ray's temporary folder goes. A socket's path may have 107 characters; Ray's own paths are
    longer than those in this folder. Outside of a Ray worker nothing changes.
    """
    node = worker._global_node
    if node is None:
        return
    # Of this user alone: clusters of several users on one machine have Ray's folder in common.
    folder = Path(node.get_temp_dir_path()) / f"engines-{os.getuid()}"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
