"""The tiny model of the integration tests."""

from tests.integration.conftest import tiny_model

__all__ = ["tiny_model"]
