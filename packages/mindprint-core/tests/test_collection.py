"""The garbage collector rests while libraries are imported and models are built, and is as before afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from mindprint.collection import collection_paused


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_within() -> None:
    before = gc.get_stats()
    with collection_paused():
        kept = [[number] for number in range(5000)]
        assert gc.get_stats() == before
    assert gc.isenabled()
    assert len(kept) == 5000


def test_what_was_made_is_old_afterwards() -> None:
    """Else the next collection, after a few new objects, would look through all of it."""
    with collection_paused():
        kept = [[number] for number in range(5000)]
    assert len(gc.get_objects(generation=0)) < 1000
    assert any(each is kept[7] for each in gc.get_objects(generation=2))


def test_a_cycle_from_within_is_collected_later() -> None:
    class Node:
        pass

    with collection_paused():
        node = Node()
        node.itself = node
        alive = weakref.ref(node)
        del node
        assert alive() is not None
    gc.collect()
    assert alive() is None


def test_an_error_ends_the_pause() -> None:
    with pytest.raises(ValueError, match="within"), collection_paused():
        raise ValueError("within")
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


def test_what_a_program_has_frozen_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with collection_paused():
        pass
    # Frozen objects can still end.
    assert gc.get_freeze_count() > frozen / 2
