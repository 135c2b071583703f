"""Which stages of pretraining run side by side, and what a failure leaves."""

from __future__ import annotations

import threading
from pathlib import Path

from pec_jax import pretrain
from pec_jax.shapes.pretraining.loop import Session


def run(monkeypatch, tmp_path, jobs, failing=()):
    """The order of starts and ends, with stages that take no time; and the exit status."""
    lock, events = threading.Lock(), []

    def process(stage, session, slot):
        with lock:
            events.append(("start", stage, slot))
        with lock:
            events.append(("end", stage, slot))
        return 3 if stage in failing else 0

    monkeypatch.setattr(pretrain, "_process", process)
    session = Session(Path(tmp_path), Path(tmp_path))
    return events, pretrain._side_by_side(list(pretrain.STAGES), session, jobs)


def test_a_stage_starts_after_all_that_it_needs(monkeypatch, tmp_path):
    events, status = run(monkeypatch, tmp_path, jobs=2)
    assert status == 0
    place = {(what, stage): i for i, (what, stage, _) in enumerate(events)}
    assert {stage for _, stage in place} == set(pretrain.STAGES)
    for stage, needed in pretrain.NEEDS.items():
        for other in needed:
            assert place["end", other] < place["start", stage]


def test_no_two_stages_share_a_core(monkeypatch, tmp_path):
    taken = set()
    for what, _, slot in run(monkeypatch, tmp_path, jobs=2)[0]:
        assert slot in (0, 1) and (slot in taken) == (what == "end")
        (taken.add if what == "start" else taken.remove)(slot)


def test_after_a_failure_nothing_starts_that_was_not_running(monkeypatch, tmp_path):
    events, status = run(monkeypatch, tmp_path, jobs=1, failing=("clip",))
    assert status == 3
    assert [stage for what, stage, _ in events if what == "start"] == ["skeleton", "vae", "clip"]
