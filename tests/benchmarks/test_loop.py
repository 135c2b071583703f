"""Which iterations the loop's benchmark compares."""

from __future__ import annotations

import pytest

from benchmarks import loop


@pytest.mark.parametrize(
    "number, kind",
    [
        (2, loop.AFTER_LOG),
        (5, loop.AFTER_LOG),
        (6, loop.AFTER_CHECKPOINT),
        (11, ""),  # samples were drawn before it
        (21, ""),  # and an evaluation made
        (36, loop.AFTER_CHECKPOINT),
    ],
)
def test_iterations_are_told_apart_by_what_came_before(number, kind):
    assert loop.kind_of(number) == kind
