"""Names that become folders."""

import re


def folder_name(value: str) -> str:
    """`value` if it can name a run's folder; raises `ValueError` otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise ValueError("expected 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return value
