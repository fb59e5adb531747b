"""`rlhf judge`: measure a judge, score files with it. Importing this loads neither torch, ray, vllm nor deepspeed."""

import importlib
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from rlhf.config import JudgeRun, load_judge_config, load_judge_training
from rlhf.errors import InputError, naming

if TYPE_CHECKING:
    from rich.progress import Task

    from rlhf.judging.score_lines import Tally
    from rlhf.ports import Judge

T = TypeVar("T")
Format = Literal["auto", "explicit", "implicit", "hh_rlhf", "labelled"]
Ties = Literal["half", "lost"]

judge_app = typer.Typer(name="judge", help="Measure, use and train a judge.", no_args_is_help=True)
Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with a judge section, or a run's.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.path=value ...]", help="Keys set over the file, values in YAML.")
]


@judge_app.command()
def bench(
    config: Config,
    data: Annotated[str, typer.Option(metavar="FILE", help="Preference pairs: a file or a Hugging Face dataset id.")],
    overrides: Overrides = None,
    format: Annotated[Format, typer.Option(help="Layout of the pairs.")] = "auto",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face dataset.")] = "train",
    name: Annotated[str | None, typer.Option(help="Configuration name of a Hugging Face dataset.")] = None,
    subset_column: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column of the subsets; default: subset, if there is one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Use the first N pairs only.")] = None,
    ties: Annotated[Ties, typer.Option(help="A tie counts half, or is lost.")] = "half",
    json_out: Annotated[
        str | None, typer.Option("--json", metavar="OUT", help="Write the report as JSON; - is stdout.")
    ] = None,
) -> None:
    """Accuracy, calibration and habits of a judge on pairs with a known better response."""
    from rich.console import Console

    from rlhf.data.preferences import load_preferences
    from rlhf.evaluation.bench_table import show_bench
    from rlhf.evaluation.judge_bench import bench as run_bench
    from rlhf.files import write_atomic

    resolved = load_judge_config(config, overrides or ())
    target = None if json_out in (None, "-") else Path(str(json_out))
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise InputError(f"--json {target}: not a file in a folder that exists; create the folder first")
    found = load_preferences(data, split=split, name=name, format=format, subset_column=subset_column)
    examples = found.examples[:limit]

    async def work(judge: "Judge") -> Any:
        with _progress("judging", len(examples), 0) as advance:
            return await run_bench(judge, examples, advance, ties)

    report = _with_judge(config, resolved, work, "nothing is written; the same command starts over")
    source = {"path": data, "split": split, "name": name, "examples": len(examples), "dropped": found.dropped}
    whole = {"judge": resolved.judge.model_dump(mode="json"), "data": source, **report.to_json()}
    text = json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    if json_out == "-":
        print(text, end="")
    elif target is not None:
        write_atomic(target, text.encode())
    show_bench(report, Console(stderr=json_out == "-"))


@judge_app.command()
def score(
    config: Config,
    input: Annotated[Path, typer.Option(metavar="FILE", help="JSONL of prompt, a and b (optionally .gz).")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="JSONL to write; continued if it is there.")],
    overrides: Overrides = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Write a malformed line as invalid instead of stopping before the start.")
    ] = False,
    retry_invalid: Annotated[
        bool, typer.Option("--retry-invalid", help="First judge again the lines that are invalid in the output.")
    ] = False,
) -> None:
    """Score a file of comparisons; started again after a stop, it goes on where it was."""
    from rlhf.judging import score_file, score_retry

    resolved = load_judge_config(config, overrides or ())
    with naming(config):
        identity = _identity(resolved)
    min_valid = resolved.judge.health.min_valid
    with score_file.open_job(input, output, identity, skip_bad=skip_bad) as job:
        again = score_retry.count_again(job) if retry_invalid else 0
        if job.done == job.total and not again:
            written = score_retry.written_tally(job)
            print(f"{output}: all {job.total} lines are scored; nothing to do{_invalid(written)}")
            return

        async def work(judge: "Judge") -> tuple["Tally | None", "Tally"]:
            retried = None
            if again:
                with _progress("judging again", again, 0) as advance:
                    retried = await score_retry.retry_invalid(judge, job, advance, min_valid=min_valid)
            with _progress("scoring", job.total, job.done) as advance:
                return retried, await score_file.score(judge, job, advance, min_valid=min_valid)

        then = f"the same command goes on behind the last line of {output}"
        retried, new = _with_judge(config, resolved, work, then)
    if retried is not None:
        print(f"{output}: {retried.total} lines judged again ({retried}){_invalid(retried)}")
    print(f"{output}: {new.total} lines scored ({new}), {job.done} were there before{_invalid(new)}")


def _invalid(tally: "Tally") -> str:
    """Why lines are invalid, and what to do about it."""
    if not tally.invalid:
        return ""
    retry = "; --retry-invalid judges them again" if tally.invalid > tally.bad else ""
    return f"; {tally.invalid} invalid, {tally.common_reason()}{retry}"


@judge_app.command()
def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the training.")],
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Empty the run directory and start over.")] = False,
) -> None:
    """Train a pair-preference judge on preference pairs, or go on with a training that is not finished."""
    resolved = load_judge_training(config, overrides or ())
    with naming(config):
        importlib.import_module("actors.judge_training").train_judge(resolved, fresh=fresh)


def _with_judge(config: str, resolved: JudgeRun, work: Callable[["Judge"], Awaitable[T]], then: str) -> T:
    """`then` tells a user who stopped the command how it goes on."""
    with naming(config):
        result: T = importlib.import_module("actors.judging").run_with_judge(resolved, work, then)
    return result


def _identity(config: JudgeRun) -> str:
    """What the verdicts depend on: the identities of the judges, and how an ensemble puts them together."""
    from rlhf.config.judge import EngineJudge, EnsembleJudge, single_judges
    from rlhf.inputs import judge_folder
    from rlhf.judging.cache import judge_identity

    identities = []
    for key, judge in single_judges(config.judge):
        if isinstance(judge, EngineJudge):
            judge = judge.model_copy(update={"path": str(judge_folder(judge, key))})
        identities.append(judge_identity(judge))
    if not isinstance(config.judge, EnsembleJudge):
        return identities[0]
    weights = [member.weight for member in config.judge.members]
    return json.dumps([config.judge.method, config.judge.quorum, weights, identities])


@contextmanager
def _progress(name: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr with the rate and the time left; yields what moves it on."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: "Task") -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.1f}/s")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda amount: bar.advance(task, amount)
