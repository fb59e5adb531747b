"""Patches of packed buffers: any difference comes back exactly, small ones are small, damaged ones are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.weights.sparse import HEADER, apply, encode
from rlhf.errors import PayloadError


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 99))
def test_any_difference_comes_back(words, density, seed):
    rng = np.random.default_rng(seed)
    old = rng.integers(0, 2**16, words, dtype=np.uint16)
    new = np.where(rng.random(words) < density, rng.integers(0, 2**16, words, dtype=np.uint16), old)
    base = old.view(np.uint8).copy()
    patch = encode(old.view(np.uint8), new.view(np.uint8))
    assert (patch.changed, patch.words) == (int((old != new).sum()), words)
    apply(base, patch.data)
    assert np.array_equal(base, new.view(np.uint8))


@pytest.mark.parametrize("place", [0, 1, 253, 254, 255, 256, 509, 510, 511, 1999])
def test_gaps_around_the_escape(place):
    old, new = np.zeros(4000, dtype=np.uint8), np.zeros(4000, dtype=np.uint8)
    new[2 * place] = 7
    patch = encode(old, new)
    assert len(patch.data) == HEADER + place // 255 + 1 + 2
    apply(old, patch.data)
    assert np.array_equal(old, new)


def test_no_change_is_a_header():
    same = np.arange(64, dtype=np.uint8)
    patch = encode(same, same.copy())
    assert (len(patch.data), patch.changed) == (HEADER, 0)
    base = same.copy()
    apply(base, patch.data)
    assert np.array_equal(base, same)


@pytest.mark.parametrize("density", [0.01, 0.03, 0.08])
def test_a_few_changes_take_an_eighth_of_the_bytes_at_most(density):
    rng = np.random.default_rng(0)
    old = np.zeros(200_000, dtype=np.uint16)
    new = (rng.random(len(old)) < density).astype(np.uint16)
    data = encode(old.view(np.uint8), new.view(np.uint8)).data
    assert len(data) <= old.nbytes / 8
    # A gap takes a byte and a value two, but for the escapes of gaps of 255 and more: one in density (1 - d)^255.
    assert len(data) == pytest.approx(new.sum() * (3 + (1 - density) ** 255 / (1 - (1 - density) ** 255)), rel=0.02)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "header does not agree"),
        (lambda data: data[:5], "header does not agree"),
        (lambda data: np.concatenate([data[:HEADER], np.uint8([255]), data[HEADER + 1 :]]), "gaps for"),
        (lambda data: np.concatenate([data[:HEADER], np.uint8([200]), data[HEADER + 1 :]]), "word 2"),
    ],
)
def test_a_damaged_patch_is_refused(damage, message):
    old, new = np.zeros(128, dtype=np.uint8), np.zeros(128, dtype=np.uint8)
    new[[10, 60]] = 1
    with pytest.raises(PayloadError, match=message):
        apply(old.copy(), damage(encode(old, new).data))
