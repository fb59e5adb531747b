"""Secrets are kept out of everything that is written: promise 7. Light: the config imports it."""

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
_PASSWORD = re.compile(r"(api_?key|secret|passwd|password|passphrase|credential|authorization)s?$")
_KEY = re.compile(r"(^|[^a-z0-9])(key|token|auth|bearer|cookie|pwd)s?$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_NO_SECRET = re.compile(
    r"max_(\w+_)?tokens|classifier_from_token"
    r"|(bos|eos|pad|unk|sep|cls|mask|image|audio|video|stop|start|end|special|think)_tokens?$"
)
"""Counts of tokens and words of a vocabulary."""
_SECRET_ENV = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$")
_URL_LOGIN = re.compile(r"(?<=://)[^/@\s]+:[^/@\s]+(?=@)")
_MIN_SECRET = 8


def names_secret(key: str, value: Any) -> bool:
    """Is this key the name of a secret (`api_key`, `hf_token`, `X-Api-Key`, `apiKey`, ...) and may the value be one?

    Nothing, true and false never are; under `key`, `token` and their like only what holds text is.
    """
    name = _CAMEL.sub("_", key).lower()
    if _NO_SECRET.search(name):
        return False
    if _PASSWORD.search(name):
        return _holds(value, (str, int, float))
    return bool(_KEY.search(name)) and _holds(value, (str,))


def find_secret(value: Any) -> str | None:
    """Where a nest of dicts and lists has a key that names a secret, or a URL with a login: `headers.Authorization`."""
    items = (
        enumerate(value) if isinstance(value, (list, tuple)) else value.items() if isinstance(value, Mapping) else ()
    )
    for key, item in items:
        if isinstance(key, str) and names_secret(key, item):
            return key
        if isinstance(item, str) and _URL_LOGIN.search(item):
            return str(key)
        if (inner := find_secret(item)) is not None:
            return f"{key}.{inner}"
    return None


def redact(value: Any, environ: Mapping[str, str] | None = None) -> Any:
    """A copy of a nest of dicts and lists in which no string can be a secret.

    Hidden are: values under a key that names a secret, logins inside URLs, and any occurrence of the value of an
    environment variable whose name ends in KEY, TOKEN, SECRET, ...
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
            key: REDACTED if names_secret(str(key), item) else _redact(item, secrets) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_redact(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REDACTED)
        return _URL_LOGIN.sub(REDACTED, value)
    return value


def _holds(value: Any, kinds: tuple[type, ...]) -> bool:
    """Is there anything of these kinds in it, other than true, false and empty text?"""
    if isinstance(value, Mapping):
        return any(_holds(item, kinds) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds(item, kinds) for item in value)
    return isinstance(value, kinds) and not isinstance(value, bool) and value != ""
