"""The collector of cycles during a run."""

import gc
import weakref

import pytest

from rlhf.rounds.garbage import ALL_EVERY, YOUNG, collect, seldom_collected


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_it_is_as_before_afterwards_also_after_an_error() -> None:
    before = gc.get_threshold()

    def fail() -> None:
        with seldom_collected():
            assert gc.get_threshold()[0] == YOUNG > before[0]
            assert gc.get_freeze_count() > 0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_cycles_are_still_found() -> None:
    with seldom_collected():
        node = weakref.ref(Node())
        kept = [[] for _ in range(YOUNG + 1000)]
        assert node() is None, len(kept)


def test_a_round_leaves_nothing_behind() -> None:
    with seldom_collected():
        node = weakref.ref(Node())
        assert node() is not None
        collect(1)
        assert node() is None
        old = Node()
        gc.collect()
        node = weakref.ref(old)
        del old
        collect(1)
        assert node() is not None
        collect(ALL_EVERY)
        assert node() is None
