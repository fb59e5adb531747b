"""The tiny model of the integration tests, and the summary that is printed at the end."""

from typing import Any

import pytest

from tests.chaos.summary import table
from tests.integration.conftest import tiny_model

__all__ = ["tiny_model"]

SUMMARIES: list[dict[str, Any]] = []


@pytest.fixture
def summaries() -> list[dict[str, Any]]:
    """Summaries of the chaos runs of this session."""
    return SUMMARIES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SUMMARIES:
        terminalreporter.section("chaos")
        terminalreporter.write_line(table(SUMMARIES))
