"""The probe's error: what rounding does is let through, what a stale tensor does is not."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.weights.probe import probe_error

LOGPROBS = st.lists(st.floats(-20, -1e-3), min_size=1, max_size=64)


@given(LOGPROBS, st.integers(0, 2**32 - 1))
def test_rounding_in_proportion_to_size_stays_small(logprobs, seed):
    # Logits and normaliser of size up to 32 in bfloat16: half a unit in the last place each, 2^-9 relative.
    noise = np.random.default_rng(seed).uniform(-1, 1, len(logprobs)) * 2 * 32 * 2.0**-9
    assert probe_error(np.asarray(logprobs) + noise, logprobs).relative <= 0.126


@given(LOGPROBS)
def test_errors_have_their_closed_form(logprobs):
    error = probe_error([value - 1 for value in logprobs], logprobs)
    assert error.absolute == pytest.approx(1.0)
    assert error.relative == pytest.approx(np.mean([1 / max(1, -value) for value in logprobs]))


def test_a_missing_log_prob_is_no_proof():
    assert math.isnan(probe_error([float("nan"), -1.0], [-1.0, -1.0]).relative)
