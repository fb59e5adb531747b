"""The token of a cluster's clients."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.errors import InputError


@dataclass(frozen=True)
class Token:
    """A token and where it was found."""

    text: str = field(repr=False)
    source: str


def read_token() -> Token | None:
    """The token of Ray's clients: `RAY_AUTH_TOKEN`, the file at `RAY_AUTH_TOKEN_PATH`, `~/.ray/auth_token`; or none.

    Read here, because Ray's own loader ends the process where the file cannot be read. Raises `InputError`.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if text := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return Token(text, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if not named:
            return None
        raise InputError(f"RAY_AUTH_TOKEN_PATH = {named}: cannot read the token: {error}") from error
    if named and not text:
        raise InputError(f"RAY_AUTH_TOKEN_PATH = {named}: the file is empty; it holds the cluster's token")
    return Token(text, str(file)) if text else None


def refusal(source: str | None) -> str:
    """What to say where a cluster did not take the token from `source`, None for no token."""
    where = "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token"
    if source:
        return f"the cluster refused the token of {source}; put the one it was started with into {where}"
    return f"the cluster asks for a token and none was found; put it into {where}"
