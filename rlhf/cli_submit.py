"""`rlhf submit`: a run as a Ray job. Importing this loads neither torch, ray, vllm nor deepspeed."""

import importlib
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf.config import load_run
from rlhf.errors import InputError, naming


def submit(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file of the run.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.path=value ...]", help="Keys set over the file, values in YAML.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard, such as http://127.0.0.1:8265."
        ),
    ] = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Stream the log; the exit code is the job's. Ctrl-C leaves the job running."),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty the run directory and start over.")] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Use the rlhf that the cluster's image has; send none.")
    ] = False,
    package: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Folder or .py file that the job can import; may be given more than once."),
    ] = None,
    status: Annotated[str | None, typer.Option(metavar="ID", help="Print what became of a job.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop a job after a clean save.")] = None,
    logs: Annotated[str | None, typer.Option(metavar="ID", help="Print a job's log; --follow goes on with it.")] = None,
) -> None:
    """Run CONFIG as a job of a Ray cluster, or look after one that is there."""
    asked = {"--status": status, "--stop": stop, "--logs": logs}
    given = {option: job for option, job in asked.items() if job is not None}
    if len(given) + (config is not None) != 1:
        raise InputError("rlhf submit: give one of CONFIG, --status ID, --stop ID and --logs ID")
    if address is None:
        raise InputError("--address: give the URL of Ray's dashboard, such as http://127.0.0.1:8265")
    jobs: Any = importlib.import_module("actors.submit")
    if config is None:
        ((option, job),) = given.items()
        code = jobs.look_after(address, option, job, following=follow)
    else:
        code = _submit(jobs, config, overrides or [], address, follow, fresh, installed, package or [])
    raise typer.Exit(code)


def _submit(
    jobs: Any,
    config: str,
    overrides: list[str],
    address: str,
    follow: bool,
    fresh: bool,
    installed: bool,
    packages: list[Path],
) -> int:
    from rlhf.submission import make_bundle

    resolved = load_run(config, overrides)
    client = jobs.connect(address)  # A head that is gone, or a wrong token, is told before anything is packed.
    with tempfile.TemporaryDirectory(prefix="rlhf-job-") as folder:
        with naming(config):
            bundle = make_bundle(resolved, Path(folder), packages, installed=installed)
        save_s = int(resolved.cluster.deadlines.checkpoint)
        job: str = jobs.submit(client, resolved.name, bundle, save_s, fresh=fresh)
    print(job, flush=True)
    if not follow:
        jobs.tell_how_to_go_on(client, job)
        return 0
    code: int = jobs.follow(client, job)
    return code
