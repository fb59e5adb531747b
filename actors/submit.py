"""Jobs of a Ray cluster, over its job API: submit, follow, look after. Loaded by name when `rlhf submit` runs."""

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, cast
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from actors.tokens import Token, read_token, refusal
from rlhf.errors import InputError, RLHFError
from rlhf.submission import CONFIG, Bundle

CONNECT_S = 5.0
FIRST_ANSWER_S = 8.0
ANSWER_S = 60.0
"""Seconds for a connection, for its first answer and for others; Ray's client would wait for ever."""

POLL_S = 1.0
REPORT_S = 10.0
LOST_S = 60.0
"""Seconds between two looks at a job, between two reports of one that has not started, and without an answer from the
cluster until following ends."""

DRAIN_S = 10.0
"""Seconds for the rest of the log of a job that has ended."""

STOPPED_CODE = 143

for _name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
    logging.getLogger(f"ray.{_name}").setLevel(logging.WARNING)  # They tell of uploads and closed connections.
_LONGEST_MESSAGE = 600
_OTHERS = (
    KeyError, TypeError, ValueError, RuntimeError, requests.JSONDecodeError, requests.TooManyRedirects,
    requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError,
)  # fmt: skip
"""What Ray's client makes of an answer that is not Ray's, when it asks for the version; a 404 is a `RuntimeError`."""


class Client(JobSubmissionClient):
    """Ray's client with deadlines, and with `address` in place of what the environment says."""

    def __init__(self, address: str, token: Token | None):
        self.token_source = token.source if token else None
        self._patience = FIRST_ANSWER_S
        # Ray lets this variable win over the argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = address
        super().__init__(address, headers={"Authorization": f"Bearer {token.text}"} if token else None)
        self._patience = ANSWER_S

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, timeout=(CONNECT_S, self._patience), **options)


def connect(address: str) -> Client:
    """A client of the cluster whose dashboard is at `address`, which has answered.

    Raises `InputError` for an address that is none and a token that is missing or wrong, `RLHFError` if nothing
    answers within seconds, or something else than Ray does.
    """
    url, token = _url(address), read_token()
    with _speaking(url, token.source if token else None):
        try:
            return Client(url, token)
        except _OTHERS as error:
            if isinstance(error, RuntimeError) and "404" not in str(error):
                raise
            raise RLHFError(
                f"--address {url}: something else than Ray's dashboard answers there ({type(error).__name__}: "
                f"{_short(str(error))}); give the address of the head's dashboard, whose port is 8265 by default"
            ) from error


def submit(client: Client, run: str, bundle: Bundle, save_s: int, *, fresh: bool = False) -> str:
    """Start `rlhf train` on the bundle as a job; returns its submission id.

    `save_s` is how long a job that is to stop may take to save before it is killed.
    """
    job = f"rlhf-{run}-{uuid4().hex[:8]}"
    environment = {
        # Ray kills a job 3 s after SIGTERM by default, in the middle of its checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": str(save_s),
    }
    with _talking(client):
        return str(
            client.submit_job(
                # exec, so that SIGTERM reaches the run itself and its exit code is the job's.
                entrypoint=f"exec python -m rlhf.cli train {CONFIG}{' --fresh' if fresh else ''}",
                submission_id=job,
                runtime_env={"working_dir": str(bundle.folder), "env_vars": environment},
                metadata=dict(bundle.metadata),
            )
        )


def look_after(address: str, option: str, job: str, *, following: bool) -> int:
    """`rlhf submit --status|--stop|--logs ID`, the last with or without `--follow`; returns the exit code."""
    client = connect(address)
    details = _details(client, job, option)
    if option == "--logs" and following:
        return follow(client, job)
    if option == "--logs":
        with _talking(client):
            sys.stdout.write(client.get_job_logs(job))
        return 0
    if option == "--status":
        print(describe(details))
        return 0
    if details.status.is_terminal():
        print(f"{job}: {details.status} already")
        return 0
    with _talking(client):
        client.stop_job(job)
    print(f"{job}: asked to stop; it saves first (--status {job} shows when it has ended)")
    return 0


def describe(details: Any) -> str:
    """One line on a job: its id, status, run, times, and why it failed."""
    metadata = details.metadata or {}
    parts = [str(details.status)]
    if "run" in metadata:
        parts.append(f"run {metadata['run']} (config {metadata.get('config_sha256', '')[:12]}, "
                     f"rlhf {metadata.get('rlhf_version', '?')})")  # fmt: skip
    for word, stamp in (("started", details.start_time), ("ended", details.end_time)):
        if stamp:
            parts.append(f"{word} {time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(stamp / 1000))}")
    if details.status.is_terminal() and details.driver_exit_code is not None:
        parts.append(f"exit code {details.driver_exit_code}")
    elif details.status != JobStatus.SUCCEEDED and details.message:
        parts.append(_short(details.message))
    return f"{details.submission_id}: {'; '.join(parts)}"


def tell_how_to_go_on(client: Client, job: str) -> None:
    """Print on stderr how to follow and to stop a job."""
    print(_how_to_go_on(client, job), file=sys.stderr, flush=True)


def follow(client: Client, job: str) -> int:
    """Stream a job's log to stdout until it ends; returns the exit code of the job, 143 if it was stopped.

    Raises `RLHFError` when the cluster has not answered for a minute, and with exit code 130 on Ctrl-C; the job runs on
    in both cases, and the message says how to go on following.
    """
    try:
        details = asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        error = RLHFError(f"stopped following; the job runs on: {_how_to_go_on(client, job)}")
        error.exit_code = 130
        raise error from None
    if details.status == JobStatus.SUCCEEDED:
        return 0
    print(f"rlhf: {describe(details)}", file=sys.stderr, flush=True)
    return exit_code(details)


def exit_code(details: Any) -> int:
    """What a shell would show for the ended job: its driver's exit code, 128 + n for signal n, 143 if stopped."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        return STOPPED_CODE
    code = details.driver_exit_code
    return 1 if not code else code if code > 0 else 128 - int(code)


class _Printer:
    """Prints a log that is read again from its start after a broken connection, each character once."""

    def __init__(self, write: Callable[[str], Any]):
        self._write = write
        self._printed = 0
        self._seen = 0

    def restart(self) -> None:
        self._seen = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._printed - self._seen) :]
        self._seen += len(text)
        if new:
            self._printed += len(new)
            self._write(new)


async def _follow(client: Client, job: str) -> Any:
    printer = _Printer(_to_stdout)
    tail: asyncio.Task[None] | None = None
    answered = reported = time.monotonic()
    try:
        while True:
            try:
                details = await asyncio.to_thread(client.get_job_info, job)
                answered = time.monotonic()
            except (OSError, RuntimeError, AuthenticationError, requests.RequestException) as error:
                if time.monotonic() - answered > LOST_S:
                    raise RLHFError(
                        f"{client.get_address()} has not answered for {LOST_S:.0f} s ({_short(str(error))}); the job "
                        f"may still run: {_how_to_go_on(client, job)}"
                    ) from error
                await asyncio.sleep(POLL_S)
                continue
            if details.status == JobStatus.PENDING:
                if time.monotonic() - reported >= REPORT_S:
                    reported = time.monotonic()
                    print(f"rlhf: {describe(details)}", file=sys.stderr, flush=True)
            elif tail is None or (tail.done() and not details.status.is_terminal()):
                # A tail that has ended before the job has lost its connection: begin again.
                printer.restart()
                tail = asyncio.create_task(_tail(client, job, printer))
            if details.status.is_terminal():
                if tail is not None:
                    await asyncio.wait([tail], timeout=DRAIN_S)
                return details
            await asyncio.wait([tail], timeout=POLL_S) if tail else await asyncio.sleep(POLL_S)
            if tail is not None and tail.done():
                await asyncio.sleep(POLL_S / 2)
    finally:
        if tail is not None:
            tail.cancel()
            await asyncio.wait([tail])


async def _tail(client: Client, job: str, printer: _Printer) -> None:
    """The log so far and as it grows; ends with the job, or when the connection breaks."""
    try:
        async with aclosing(cast(AsyncGenerator[str, None], client.tail_job_logs(job))) as chunks:
            async for chunk in chunks:
                printer.add(chunk)
    except (aiohttp.ClientError, OSError, RuntimeError):
        return  # The caller's next look at the job tells what became of the cluster.


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _details(client: Client, job: str, option: str) -> Any:
    with _talking(client):
        try:
            return client.get_job_info(job)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            raise InputError(f"{option} {job}: no job of this id at {client.get_address()}") from error


def _how_to_go_on(client: Client, job: str) -> str:
    at = f"--address {client.get_address()}"
    return f"`rlhf submit --logs {job} --follow {at}` follows it, `rlhf submit --stop {job} {at}` stops it"


def _url(address: str) -> str:
    text = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or parts.scheme == "https")
    except ValueError:  # a port that is no number
        usable = False
    if not usable or "@" in text:
        shown = address.rsplit("@", 1)[-1]
        raise InputError(
            f"--address {shown!r}: expected the URL of Ray's dashboard, such as http://127.0.0.1:8265, without a login"
        )
    return text.rstrip("/")


@contextmanager
def _talking(client: Client) -> Iterator[None]:
    with _speaking(str(client.get_address()), client.token_source):
        yield


@contextmanager
def _speaking(url: str, token_source: str | None) -> Iterator[None]:
    """Turn what a cluster refuses, and a cluster that is not there, into one line that says what to do."""
    try:
        yield
    except AuthenticationError as error:
        raise InputError(f"--address {url}: {refusal(token_source)}") from error
    except requests.HTTPError as error:
        raise RLHFError(f"--address {url}: not a Ray dashboard, or one that is ill ({_short(str(error))})") from error
    except (ConnectionError, requests.ConnectionError, requests.Timeout) as error:
        raise RLHFError(
            f"--address {url}: no Ray dashboard answers there; start the cluster's head (or the port-forward), or give "
            "the address of one that runs"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise RLHFError(f"--address {url}: {_short(str(error))}") from error


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "…"
