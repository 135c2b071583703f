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


def test_an_interrupt_keeps_the_rounds_that_are_complete():
    turns = iter([1, 1, 1, 1, 0])  # of both contestants; the last is the third round's first

    def contestant():
        if not next(turns):
            raise KeyboardInterrupt

    seconds, _ = timing.interleave({"a": contestant, "b": contestant}, 20)
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_an_interrupt_before_any_round_is_one():
    def contestant():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.interleave({"a": contestant}, 20)


def test_kernels_are_counted_by_name():
    class Executable:
        def as_text(self):
            return """%a = custom-call(%b), custom_call_target="__cudnn$fmhaSoftmax", foo
                %c = fusion(%a), backend_config={"kind":"__triton_gemm"}
                %d = fusion(%a), backend_config={"kind":"__triton_gemm"}, kind=kCustom"""

    assert timing.library_kernels(Executable()) == {"__cudnn$fmhaSoftmax": 1, "__triton_gemm": 2}
