"""A verdict cache by content: the same comparison is judged once, in this run and after a restart of it."""

import asyncio
import hashlib
import json
import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from rlhf.config.judge import RUNNING, EngineJudge, PooledJudge
from rlhf.judging.verdicts import check_complete
from rlhf.ports import Judge
from rlhf.records import Comparison, Verdict, VerdictState

_CODE = 1
"""Raise it when a judge's own code changes what it answers: older verdicts then no longer count."""

_SMALL = 32 << 20
"""Model files up to this many bytes (config, tokenizer, chat template) are fingerprinted by content."""

PAUSE_S = 30.0
"""How long a file that cannot be used (a full disk, another process's lock) is left alone."""

_LOCK_S = 0.2
"""How long SQLite waits for another process's lock: the event loop waits with it."""

_UNUSABLE = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
)
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR_SHORT_READ)

_MIRROR = {VerdictState.WIN: VerdictState.LOSE, VerdictState.LOSE: VerdictState.WIN}


def mirror(verdict: Verdict, comparison: Comparison) -> Verdict:
    """The verdict on (a, b) as one on `comparison`, which is (b, a): p'_ab = 1 - p_ba, scores and state swapped."""
    return replace(
        verdict,
        comparison=comparison,
        p_ab=1.0 - verdict.p_ba,
        p_ba=1.0 - verdict.p_ab,
        state=_MIRROR.get(verdict.state, verdict.state),
        score_a=verdict.score_b,
        score_b=verdict.score_a,
        reason=f"(A and B swapped) {verdict.reason}" if verdict.reason else "",
    )


class CachedJudge:
    """A `Judge` that asks another one only what it has not asked before, in either order.

    Verdicts are kept in an SQLite file under SHA-256 keys of identity, conversation, reference and both texts; a
    verdict on (a, b) answers (b, a) mirrored. INVALID is never kept: what failed is tried again. Comparisons that are
    asked twice at the same time are judged once. While the file cannot be used, verdicts go uncached. `hits` counts
    the comparisons that did not reach the judge.
    """

    def __init__(self, judge: Judge, path: Path, identity: str, alert: Callable[[str], None] | None = None) -> None:
        """`identity` is `judge_identity` of the judge's config.

        The file is created where it is missing. Several processes may share it; a damaged one is put aside. `alert`
        (default: a warning) hears of a damaged file, and once of one that cannot be used.
        """
        self.hits = 0
        self._judge = judge
        self._identity = identity
        self._store = _Store(path, alert or (lambda message: warnings.warn(message, stacklevel=2)))
        self._under_way: dict[bytes, asyncio.Future[Verdict]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def compare(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict a comparison, in order; raises what the judge raises, to all who wait for that verdict."""
        keys = [comparison_key(self._identity, comparison) for comparison in comparisons]
        answers: dict[bytes, Verdict | asyncio.Future[Verdict]] = {}
        new: dict[bytes, Comparison] = {}
        for key, comparison in zip(keys, comparisons, strict=True):
            if key in answers or key in new:
                continue
            answer = self._under_way.get(key) or self._store.get(key, comparison)
            if answer is None:
                new[key] = comparison
            else:
                answers[key] = answer
        self.hits += len(comparisons) - len(new)
        answers |= self._start(new)
        verdicts = []
        for key, comparison in zip(keys, comparisons, strict=True):
            answer = answers[key]
            # Shielded: a caller that is stopped must not stop others who wait for the same verdict.
            verdict = answer if isinstance(answer, Verdict) else await asyncio.shield(answer)
            verdicts.append(_answer(verdict, comparison))
        return verdicts

    def close(self) -> None:
        """Close the file; what was judged is in it already."""
        self._store.close()

    def _start(self, new: dict[bytes, Comparison]) -> "dict[bytes, asyncio.Future[Verdict]]":
        """Have `new` judged in a task that no caller owns."""
        loop = asyncio.get_running_loop()
        futures: dict[bytes, asyncio.Future[Verdict]] = {key: loop.create_future() for key in new}
        if new:
            self._under_way |= futures
            task = loop.create_task(self._ask(list(new.values()), futures))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return futures

    async def _ask(self, new: list[Comparison], futures: "dict[bytes, asyncio.Future[Verdict]]") -> None:
        try:
            verdicts = await self._judge.compare(new)
            check_complete(new, verdicts)
            self._store.put(dict(zip(futures, verdicts, strict=True)))
            for future, verdict in zip(futures.values(), verdicts, strict=True):
                future.set_result(verdict)
        except asyncio.CancelledError:
            for future in futures.values():
                future.cancel()
            raise
        except Exception as error:
            for future in futures.values():
                future.set_exception(error)
                future.exception()  # fetched once: asyncio logs an error that no caller is left to take
        finally:
            for key in futures:
                del self._under_way[key]


def comparison_key(identity: str, comparison: Comparison) -> bytes:
    """SHA-256 over what a verdict depends on; (a, b) and (b, a) share it."""
    content = [identity, comparison.messages, sorted((comparison.a, comparison.b)), comparison.reference]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def judge_identity(config: PooledJudge) -> str:
    """What makes two judges answer alike: the config's fields that matter, as JSON, and the model's fingerprint.

    The path of a local model folder is replaced by `folder_fingerprint`, so a folder that moves keeps its verdicts
    and one that is retrained in place does not. A `python` judge's code is not part of it: keep its cache off while
    the function still changes.
    """
    fields = config.model_dump(mode="json", exclude=RUNNING)
    if isinstance(config, EngineJudge) and config.path and Path(config.path).is_dir():
        fields["path"] = folder_fingerprint(Path(config.path))
    return json.dumps({"code": _CODE, **fields}, sort_keys=True)


def folder_fingerprint(folder: Path) -> str:
    """SHA-256 over the names of a model's files with the content of small ones, the size and mtime of weights.

    Reading the weights would cost many seconds at every start, and their safetensors header is the same before and
    after training; a time that changes without need (a copy) only costs judging again.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.suffix == ".md":
            continue
        status = file.stat()
        weights = file.suffix in (".safetensors", ".bin", ".gguf") or status.st_size > _SMALL
        content = str(status.st_mtime_ns) if weights else hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(json.dumps([file.name, status.st_size, content]).encode())
    return f"sha256:{digest.hexdigest()}"


def _answer(verdict: Verdict, comparison: Comparison) -> Verdict:
    """A verdict on the same two texts, in whatever order, as one on `comparison`."""
    if (verdict.comparison.a, verdict.comparison.b) == (comparison.a, comparison.b):
        return replace(verdict, comparison=comparison)
    return mirror(verdict, comparison)


_Action = Callable[[sqlite3.Connection], Any]


class _Store:
    """Verdicts by key in one SQLite file; calls take microseconds, so they run on the event loop."""

    def __init__(self, path: Path, alert: Callable[[str], None]) -> None:
        self._path = path
        self._alert = alert
        self._connection: sqlite3.Connection | None = None
        self._resume_at = 0.0
        self._told = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._guarded(lambda _: None)

    def get(self, key: bytes, comparison: Comparison) -> Verdict | None:
        """The verdict kept under `key`, in the order it was judged in."""
        found: Verdict | None = self._guarded(lambda connection: _get(connection, key, comparison))
        return found

    def put(self, verdicts: dict[bytes, Verdict]) -> None:
        """Keep all that is valid, in one transaction."""
        rows = []
        for key, verdict in verdicts.items():
            if verdict.state is not VerdictState.INVALID:
                value = _encode(verdict)
                rows.append((key, value, _checksum(key, value)))
        if rows:
            self._guarded(lambda connection: _put(connection, rows))

    def close(self) -> None:
        """Close the file."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _guarded(self, action: _Action) -> Any:
        """Do `action`; None while the file cannot be used: a cache must cost neither the run nor its time."""
        if time.monotonic() < self._resume_at:
            return None
        try:
            return self._repaired(action)
        except sqlite3.OperationalError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the kind, without its details
            if code not in _UNUSABLE or (code == sqlite3.SQLITE_CANTOPEN and self._connection is None):
                raise
            self._resume_at = time.monotonic() + PAUSE_S
            if not self._told:
                self._told = True
                self._alert(f"{self._path}: the verdict cache cannot be used ({error}); verdicts go uncached meanwhile")
        return None

    def _repaired(self, action: _Action) -> Any:
        """Do `action`; where the file turns out to be damaged, put it aside and do it on an empty one."""
        try:
            return action(self._opened())
        except (sqlite3.DatabaseError, _DamagedRow) as error:
            self._put_aside(error)
        return action(self._opened())

    def _opened(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = _connect(self._path)
        return self._connection

    def _put_aside(self, error: Exception) -> None:
        """Rename the file if `error` means that it is damaged; raise `error` if not (a full disk, say)."""
        if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) not in _DAMAGED:
            raise error
        self.close()
        aside = self._path.with_name(self._path.name + ".damaged")
        # The journal first: it would be played back into the new file.
        Path(f"{self._path}-journal").unlink(missing_ok=True)
        os.replace(self._path, aside)
        self._alert(
            f"{self._path}: the verdict cache is damaged ({error}); it is kept as {aside.name} and an empty one begun"
        )


class _DamagedRow(Exception):
    """A row that is not what was written."""

    def __str__(self) -> str:
        return "a verdict fails its checksum"


def _connect(path: Path) -> sqlite3.Connection:
    # Other threads never touch it: the check is off because a judge may be built off the loop's thread.
    connection = sqlite3.connect(path, timeout=_LOCK_S, check_same_thread=False, isolation_level=None)
    try:
        # A rollback journal, because a write-ahead log needs memory that network file systems do not share; no
        # flushes, because a killed process loses nothing without them, and a power cut can at worst cost the cache.
        connection.execute("PRAGMA journal_mode = TRUNCATE")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, value TEXT NOT NULL, checksum BLOB NOT NULL)"
            " WITHOUT ROWID"
        )
    except BaseException:
        connection.close()
        raise
    return connection


def _get(connection: sqlite3.Connection, key: bytes, comparison: Comparison) -> Verdict | None:
    row = connection.execute("SELECT value, checksum FROM verdicts WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    value, checksum = row
    if checksum != _checksum(key, value):
        raise _DamagedRow
    return _decode(value, comparison)


def _put(connection: sqlite3.Connection, rows: list[tuple[bytes, str, bytes]]) -> None:
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", rows)


def _checksum(key: bytes, value: Any) -> bytes:
    return hashlib.sha256(key + str(value).encode()).digest()[:8]


def _encode(verdict: Verdict) -> str:
    """JSON of a verdict, without texts: only whether they were judged in ascending order."""
    ascending = verdict.comparison.a <= verdict.comparison.b
    numbers = [verdict.p_ab, verdict.p_ba, verdict.score_a, verdict.score_b]
    return json.dumps([ascending, *numbers, verdict.state, verdict.reason, verdict.truncated])


def _decode(value: str, comparison: Comparison) -> Verdict:
    ascending, p_ab, p_ba, score_a, score_b, state, reason, truncated = json.loads(value)
    low, high = sorted((comparison.a, comparison.b))
    a, b = (low, high) if ascending else (high, low)
    asked = replace(comparison, a=a, b=b)
    return Verdict(asked, p_ab, p_ba, VerdictState(state), score_a, score_b, reason, truncated)
