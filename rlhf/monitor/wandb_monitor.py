"""Weights & Biases, online or offline, its files inside the run directory."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlhf.errors import InputError
from rlhf.files import write_atomic
from rlhf.monitor.monitored import Monitored
from rlhf.monitor.redact import redact
from rlhf.monitor.sink import Cell, Event

ID_FILE = "wandb_id"
_AXES = {"step": "step", "round": "round", "eval": "eval_round"}
_TITLE = 63  # W&B refuses an alert title of 64 characters


class WandbSink:
    """One W&B run a run directory: its id is kept in RUN_DIR/wandb_id, so a resumed run goes on in it.

    A metric is drawn against the axis of its event: `step`, `round` or `eval_round`. W&B keeps what was sent: a
    round that is replayed after a kill is sent again and appears twice there.

    `warn` is told, once, when W&B stops taking data; the run goes on. Raises `InputError` if W&B cannot start.
    """

    def __init__(self, config: Monitored, run_dir: Path, warn: Callable[[str], None], *, timeout: float = 60.0) -> None:
        self._warn = warn
        self._broken = False
        self._defined: set[str] = set()
        mode = config.monitor.wandb.mode
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise InputError(
                "monitor.wandb.mode = 'online': no API key in the environment; "
                "export WANDB_API_KEY or use monitor.wandb.mode=offline"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run: Any = _start(config, run_dir, timeout)
        for axis in _AXES.values():
            self._run.define_metric(axis, hidden=True)

    def log(self, event: Event) -> None:
        """Send the numbers of one event; what is null has no point."""
        self._survive(self._log, event)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Send a table as `tables/<name>`."""
        self._survive(self._table, name, columns, rows)

    def alert(self, message: str) -> None:
        """Send an alert of level WARN."""
        self._survive(self._alert, message)

    def close(self, exit_code: int) -> None:
        """Upload what is left, within the timeout; the rest stays on disk for `wandb sync`.

        W&B's service process may still be writing its log when this returns; W&B waits for it when Python exits.
        `wandb.teardown()` would wait here, but would end any other W&B run of the process too.
        """
        if self._run is not None:
            run, self._run = self._run, None
            self._survive(run.finish, exit_code=exit_code)

    def _log(self, event: Event) -> None:
        axis = _AXES.get(event.event, "round")
        values = {name: value for name, value in event.metrics.items() if value is not None}
        for name in values.keys() - self._defined:
            self._run.define_metric(name, step_metric=axis)
            self._defined.add(name)
        self._run.log({axis: event.round if event.step is None else event.step, **values})

    def _table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        import wandb

        table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
        self._run.log({f"tables/{name}": table})

    def _alert(self, message: str) -> None:
        self._run.alert(title=message[:_TITLE], text=message, level="WARN")

    def _survive(self, call: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Metrics are also in metrics.jsonl: no fault of W&B is worth a run."""
        if self._broken:
            return
        try:
            call(*args, **kwargs)
        except Exception as error:
            self._broken = True
            self._warn(f"W&B stopped taking data ({_one_line(error)}); the run goes on, metrics.jsonl has everything")


def _start(config: Monitored, run_dir: Path, timeout: float) -> Any:
    import wandb

    section = config.monitor.wandb
    id_file = run_dir / ID_FILE
    run_id = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else ""
    settings = wandb.Settings(
        silent=True,
        console="off",  # the progress bars are no log
        disable_git=True,
        save_code=False,
        x_disable_meta=True,  # it holds the command line, in which an override may carry a secret
        init_timeout=timeout,
        login_timeout=timeout,
        finish_timeout=timeout,
    )
    try:
        run = wandb.init(
            project=section.project,
            entity=section.entity,
            group=section.group,
            tags=list(section.tags),
            name=config.name,
            mode=section.mode,
            dir=str(run_dir),
            id=run_id or None,
            resume="allow" if run_id else None,
            config=redact(config.model_dump(mode="json")),
            settings=settings,
        )
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise InputError(
            f"monitor.wandb.mode = {section.mode!r}: W&B did not start ({_one_line(error)}); "
            "check WANDB_API_KEY, monitor.wandb and the network, or use monitor.wandb.mode=offline"
        ) from error
    if not run_id:
        write_atomic(id_file, f"{run.id}\n".encode())
    return run


def _one_line(error: Exception) -> str:
    return " ".join(str(redact(str(error))).split())[:200] or type(error).__name__
