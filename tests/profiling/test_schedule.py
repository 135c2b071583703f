"""The compiler's own estimate, read from HLO text."""

from __future__ import annotations

import pytest

from pec_jax.profiling.chips import CHIPS
from pec_jax.profiling.schedule import longest, schedule


def line(name, operation, cycles=None, source="", rest=""):
    config = f'"estimated_cycles":"{cycles}"' if cycles else ""
    return (
        f"  %{name} = f32[8]{{0}} {operation}(%p){rest}, "
        f'metadata={{op_name="jit(train_step)/{source}"}}, backend_config={{{config}}}'
    )


TPU = "\n".join(
    [
        "HloModule jit_step, is_scheduled=true",
        "",
        "%fused (p: f32[8]) -> f32[8] {",
        "  %p = f32[8]{0} parameter(0)",
        "}",
        "",
        "%body (p: f32[8]) -> f32[8] {",
        "  %p = f32[8]{0} parameter(0)",
        line("a", "fusion", 1000, "while/body/blocks.0:13/ff/dot", ", kind=kOutput, calls=%fused"),
        line("b", "fusion", 300, "while/body/blocks.0:13/norm", ", kind=kLoop, calls=%fused"),
        line("k", "custom-call", None, "attn", ', custom_call_target="tpu_custom_call"'),
        "}",
        "",
        "%condition (p: f32[8]) -> pred[] {",
        "  %limit = s32[]{:T(128)} constant(10)",
        "}",
        "",
        "ENTRY %main (p: f32[8]) -> f32[8] {",
        "  %p = f32[8]{0} parameter(0)",
        "  %loop = f32[8]{0} while(%p), condition=%condition, body=%body",
        line("c", "copy", 2000, "blocks.13:24/ff/dot"),
        "}",
    ]
)


def test_cycles_of_loops_count_as_often_as_they_run():
    """13000 + 2000 cycles at 1.5 GHz are 10 us, and 985000 operations half of the peak's."""
    found = schedule(TPU, CHIPS["v5e"], 985e6)
    assert found.seconds == pytest.approx(10e-6)
    assert found.products == pytest.approx(10000 / 1.5e9)
    assert found.kernels == 10
    assert found.mfu == pytest.approx(0.5)


def test_what_takes_longest():
    found = longest(TPU, CHIPS["v5e"], 2)
    assert [name for name, _ in found] == ["blocks/ff/dot (product)", "blocks/norm (fusion)"]
    assert found[0][1] == pytest.approx(10000 / 1.5e9)
    assert len(longest(TPU, CHIPS["v5e"], 9)) == 3  # a copy is not its product


def test_without_estimates_there_is_none():
    assert schedule("ENTRY %main (p: f32[]) -> f32[] {\n}\n", CHIPS["v5e"], 1.0) is None
    assert schedule(TPU, CHIPS["tpu7x"], 1.0) is None and longest(TPU, CHIPS["tpu7x"], 3) == []


@pytest.mark.parametrize(("name", "units"), [("v4", 8), ("v5e", 4), ("v5p", 8), ("v6e", 16)])
def test_the_clock_is_that_of_the_peak(name, units):
    """Units of 128 x 128; each of v6e's four has 256 x 256."""
    chip = CHIPS[name]
    assert chip.clock * units * 128 * 128 * 2 == pytest.approx(chip.flops, rel=1e-2)
