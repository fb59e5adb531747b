"""Secrets are kept out of everything that is written: promise 7."""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
_SECRET_KEY = re.compile(
    r"(^|[_-])(api_?key|key|token|secret|password|passwd|credentials?|authorization)s?$", re.IGNORECASE
)
_SECRET_ENV = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
_MIN_SECRET = 8


def redact(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of a nest of dicts and lists in which no string can be a secret.

    Hidden are: strings under a key that names a secret (`api_key`, `hf_token`, ...), logins inside URLs, and any
    occurrence of the value of an environment variable whose name ends in KEY, TOKEN, SECRET, ...
    """
    environ = os.environ if environ is None else environ
    secrets = sorted(
        (text for name, text in environ.items() if _SECRET_ENV.search(name.upper()) and len(text) >= _MIN_SECRET),
        key=len,
        reverse=True,
    )
    return _redact(value, secrets)


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(item, str) and item and _SECRET_KEY.search(str(key)) else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redact(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REDACTED)
        return _URL_LOGIN.sub(REDACTED, value)
    return value
