"""Whose turn it is, and what is made of the seconds."""

from __future__ import annotations

import pytest

from benchmarks import timing


def test_every_round_times_all_and_begins_with_another():
    order = []
    contestants = {
        name: lambda name=name: order.append(name) or ({"part": 1.0} if name == "b" else None)
        for name in "abc"
    }
    seconds, parts = timing.interleave(contestants, 4)
    assert "".join(order) == "abcbcacababc"
    assert all(len(times) == 4 and min(times) >= 0 for times in seconds.values())
    assert parts == {"a": [], "b": [{"part": 1.0}] * 4, "c": []}


def test_medians_and_ratios():
    found = timing.summary([3.0, 1.0, 2.0])
    assert found == {"median_s": 2.0, "quartile_1_s": 1.5, "quartile_3_s": 2.5}
    found = timing.ratio([2.0, 2.0, 9.0], [1.0, 4.0, 3.0])
    assert found == {"of_medians": pytest.approx(2 / 3), "median_of_rounds": 2.0}
