"""Errors that a user can act on. Everything else propagates with its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class RLHFError(Exception):
    """A failed run with a message that is complete in one line; the command exits with 1."""

    exit_code = 1


class InputError(RLHFError):
    """Bad config or input: names the file, the key, the value and what to do; the command exits with 2."""

    exit_code = 2


class DeadlineError(RLHFError):
    """A wait passed its deadline; the message names what it waited for."""


class StorageError(RLHFError):
    """The file system is full, lost or read-only: what is whole stays, and a run goes on from it later."""


class PayloadError(RLHFError):
    """A weight payload failed its checks before the engine was touched: the old version still serves."""


class EngineLostError(RLHFError):
    """An engine failed while loading weights: it cannot be rolled back and has to be replaced."""


class LearnerLostError(RLHFError):
    """A learner rank is gone or hangs: all ranks have to be started again and go on from a checkpoint."""


@contextmanager
def naming(config: str) -> Iterator[None]:
    """Put the config's file name before a complaint about one of its keys."""
    try:
        yield
    except InputError as error:
        text = str(error)
        raise InputError(text if text.startswith(config) else f"{config}: {text}") from error
