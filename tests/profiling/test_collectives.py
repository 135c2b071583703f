"""Collectives read from HLO text: kinds, bytes, loops, asynchronous pairs."""

from __future__ import annotations

from pec_jax.profiling.chips import CHIPS, roofline
from pec_jax.profiling.collectives import collectives

HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[], bf16[8,16]) parameter(0)
  %w = bf16[2,16]{1,0} get-tuple-element(%p), index=1
  %gather = bf16[8,16]{1,0:T(8,128)} all-gather(%w), channel_id=1, dimensions={0}
  ROOT %t = (s32[], bf16[8,16]) tuple(%p, %gather)
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %loop = (s32[], bf16[8,16]) while(%a), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), channel_id=2, dimensions={0}
  %done = f32[16]{0} all-gather-done(%start)
  ROOT %r = f32[4]{0} all-reduce(%a), channel_id=3, to_apply=%add
}
"""  # noqa: E501


def test_kinds_bytes_and_loops():
    found = collectives(HLO)
    assert set(found) == {"all-gather", "all-reduce"}
    assert found["all-gather"] == (24 + 1, 24 * 8 * 16 * 2 + 16 * 4)
    assert found["all-reduce"] == (1, 4 * 4)


# As TPU programs have it: the loop's length stands in its condition, an asynchronous collective is
# spread over fusions that share its channel, and a kernel's text goes over several lines.
TPU = """HloModule jit_step, is_scheduled=true

%begin (p: bf16[2,16]) -> bf16[8,16] {
  %p = bf16[2,16]{1,0} parameter(0)
  %gather.1 = bf16[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%end (p: bf16[2,16]) -> bf16[8,16] {
  %p = bf16[2,16]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,16]{1,0:T(8,128)} all-gather(%p), channel_id=7, dimensions={0}
}

%body (p: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %p = (s32[]{:T(128)}, bf16[2,16]{1,0}) parameter(0)
  %kernel = bf16[2,16]{1,0} custom-call(%p), backend_config="module {
} more"
  %start = bf16[8,16]{1,0} fusion(%kernel), kind=kCustom, calls=%begin
  %done = bf16[8,16]{1,0} fusion(%start), kind=kCustom, calls=%end
}

%condition (p: (s32[], bf16[2,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(13)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %c = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[2,16]) -> (s32[], bf16[2,16]) {
  %a = bf16[2,16]{1,0} parameter(0)
  ROOT %loop = (s32[], bf16[2,16]) while(%a), condition=%condition, body=%body
}
"""


def test_loops_and_asynchronous_collectives_of_tpu_programs():
    assert collectives(TPU) == {"all-gather": (13, 13 * 8 * 16 * 2)}


def test_no_collectives():
    lonely = "ENTRY %main (a: f32[4]) -> f32[4] {\n  ROOT %a = f32[4] parameter(0)\n}"
    assert collectives(lonely) == {}


def test_the_longest_of_the_three_times_bounds_the_step():
    chip = CHIPS["v5e"]
    bound = roofline(chip, 2 * chip.flops, chip.hbm_bandwidth, chip.ici_bandwidth)
    assert bound == (2.0, 1.0, "compute")
    bound = roofline(chip, chip.flops, chip.hbm_bandwidth, 4 * chip.ici_bandwidth)
    assert bound == (4.0, 0.25, "collectives")
