"""The command `rlhf`. Importing it loads neither torch, ray, vllm nor deepspeed."""

import atexit
import faulthandler
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from rlhf import __version__
from rlhf.cli_judge import judge_app
from rlhf.cli_submit import submit
from rlhf.config import OfflineConfig, load_run
from rlhf.errors import RLHFError, naming
from rlhf.submission import check_environment

app = typer.Typer(
    name="rlhf",
    help="Online RLHF: vLLM generators, a preference judge and DeepSpeed DPO learners, from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(judge_app, name="judge")
app.command()(submit)
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.path=value ...]", help="Keys set over the file, values in YAML.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory, runs/<name>.")]


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty the run directory and start over.")] = False,
) -> None:
    """Run to the end, or resume a run directory that is not finished."""
    resolved = load_run(config, overrides or ())
    with naming(config):
        check_environment(resolved.cluster.env)
        if isinstance(resolved, OfflineConfig):
            importlib.import_module("actors.offline").train_preferences(resolved, fresh=fresh)
        else:
            importlib.import_module("actors.app").train(resolved, fresh=fresh)


@app.command()
def validate(config: Config, overrides: Overrides = None) -> None:
    """Print the resolved config, the placement plan and the memory estimate; starts nothing."""
    import yaml
    from rich.console import Console

    from rlhf.planning import check_inputs, make_plan, show_plan

    resolved = load_run(config, overrides or ())
    if isinstance(resolved, OfflineConfig):
        _validate_offline(config, resolved)
        return
    with naming(config):
        notes = check_inputs(resolved)
        plan = make_plan(resolved)
    print(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    show_plan(plan, notes, Console())


def _validate_offline(config: str, resolved: OfflineConfig) -> None:
    """What its data hold, and the plan for the longest of their pairs."""
    import yaml
    from rich.console import Console

    from rlhf.data.chat import load_tokenizer
    from rlhf.data.training_sets import read_preference_data, read_training_set
    from rlhf.modelfiles import local_folder
    from rlhf.planning import make_offline_plan, measure_offline, show_plan

    with naming(config):
        model = local_folder(resolved.policy.path, "policy.path")
        data = read_training_set(resolved.preferences, "preferences")
        remote = resolved.policy.trust_remote_code
        tokenizer = load_tokenizer(str(model), trust_remote_code=remote, key="policy.path")
        anchor, notes = read_preference_data(resolved.anchor, "anchor") if resolved.anchor else ((), ())
        row, long = measure_offline(resolved, data, anchor, tokenizer)
        plan = make_offline_plan(resolved, row)
    print(yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    steps = -(-len(data.train) * resolved.epochs // resolved.learner.batch_size)
    print(f"{len(data.train)} pairs to train on in {steps} steps, {len(data.held_out)} held out")
    show_plan(plan, [*data.notes, *notes, *long], Console())


@app.command()
def export(
    run_dir: RunDir, out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder of the checkpoint.")]
) -> None:
    """Copy the final policy to OUT as a Hugging Face checkpoint with a model card."""
    from rlhf.exporting import export_run

    print(export_run(run_dir, out))


@app.command()
def report(run_dir: RunDir) -> None:
    """Write RUN_DIR/report.html: one self-contained page."""
    from rlhf.exporting import read_run_config

    read_run_config(run_dir)
    written = importlib.import_module("rlhf.monitor.report").write_report(run_dir)
    print(written or run_dir / "report.html")


@app.command("fetch-model")
def fetch_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smollm2-135m")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the model.")],
) -> None:
    """Fetch the small real model of the quickstart and the tests."""
    from rlhf import fetch

    done = fetch.fetch_model(name, out)
    print(f"{out}: {'written' if done else 'already holds a complete model; nothing to do'}")


@app.command()
def version() -> None:
    """Print the version."""
    print(__version__)


class _Terminated(BaseException):
    """SIGTERM outside the run itself, which has its own way to stop."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 bad config or input, 130 SIGINT, 143 SIGTERM.

    Errors of this project end in one line on stderr; any other propagates with its traceback.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        # As a command of its own, typer would print its usage errors and exit with 2 itself.
        app(args=None if arguments is None else list(arguments), prog_name="rlhf")
    except RLHFError as error:
        _fail(" ".join(str(error).split()), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped by SIGINT", 130)
    except SystemExit as exit:
        if exit.code == 130:  # typer turns a KeyboardInterrupt into this
            _fail("stopped by SIGINT", 130)
        raise
    except _Terminated:
        _fail("stopped by SIGTERM", 143)


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def _fail(message: str, code: int) -> None:
    print(f"rlhf: {message}", file=sys.stderr)
    raise SystemExit(code)


def run() -> None:
    """The command line itself: `main`, and an end that Ray's threads cannot spoil."""
    code: object = 0
    try:
        main()
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        if "ray" not in sys.modules:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if "ray" in sys.modules:
        _leave(code)
    sys.exit(code)  # type: ignore[arg-type]


def _leave(code: object) -> NoReturn:
    """End the process without taking Python apart under the threads of Ray and others that may still run: a crash in
    them (seen once: SIGSEGV, after the last line of a run that had failed) would hide the exit code.
    """
    # Whatever fails here, the code is what counts: streams may be closed, or on a disk that is full.
    with suppress(Exception):
        faulthandler.enable()  # for what comes before the end; Ray has taken its own handler away
    with suppress(Exception):
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
    with suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    run()
