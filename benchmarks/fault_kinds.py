"""What is done to a run, kind by kind, and what has to come of it; for `faults.py`.

Each function hurts one run of its own and returns what happened. A run may go on as if nothing had
been (`resumed`), or be answered with a sentence (`told`), where the kind allows that; anything else
is a failure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.fault_runs import HALF, LENGTH, Ended, Lab, Process, difference

RESUMED, TOLD = "resumed", "told"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a fault.

    Attributes:
        result: RESUMED, TOLD, or "FAILED: " and why.
        detail: what was done.
        phase: of the run that was hurt.
        seconds: until the hurt process had ended.
        code: its exit status.
    """

    result: str
    detail: str
    phase: str
    seconds: float
    code: int | None


class FaultError(Exception):
    """Something came of a fault that may not."""


def kill_at_random(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """kill -9 at any moment from the start to the end."""
    process = lab.start(place)
    after = rng.uniform(0, _duration(lab))
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.popen.wait(after)
    process.popen.kill()
    return _goes_on(lab, place, process.wait(), f"after {after:.2f} s")


def kill_in_checkpoint(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """kill -9 while a checkpoint is being written."""
    step = rng.choice((2, 4, 6, 8))

    def writing() -> bool:
        names = [path.name for path in (place / "checkpoints").glob("*")]
        return any(name != str(step) and name.startswith(f"{step}.") for name in names)

    return _kill_when(lab, rng, place, writing, f"of iteration {step}", within=0.02)


def kill_before_checkpoint(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """kill -9 when the metrics of an iteration are written and its checkpoint is not."""
    step = rng.choice((2, 4, 6, 8))

    def between() -> bool:
        return _has_line(place, step) and not (place / "checkpoints" / str(step)).exists()

    return _kill_when(lab, rng, place, between, f"of iteration {step}", within=0.0)


def kill_in_evaluation(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """kill -9 in an evaluation on the way, or in the sample grid before it."""
    step = rng.choice((3, 6))
    return _kill_when(lab, rng, place, lambda: _has_line(place, step), f"{step}", within=0.3)


def kill_at_the_end(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """kill -9 between the last checkpoint and the end: samples, evaluation, eval.json."""
    last = place / "checkpoints" / str(LENGTH)
    return _kill_when(lab, rng, place, last.exists, "", within=2.0)


def stop_once(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """SIGTERM, SIGINT or SIGHUP at any moment."""
    process, which = lab.start(place), _signal(rng)
    after = rng.uniform(0, _duration(lab))
    _send_after(process, which, after)
    ended = process.wait(60)
    _ended_in_order(ended, which)
    return _goes_on(lab, place, ended, f"{which.name} after {after:.2f} s")


def stop_twice(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """The same signal twice within a second: it ends at once, without a checkpoint."""
    process, which = lab.start(place), _signal(rng)
    after, again = rng.uniform(0, _duration(lab)), rng.uniform(0, 1)
    _send_after(process, which, after)
    _send_after(process, which, again)
    ended = process.wait(60)
    _ended_in_order(ended, which)
    return _goes_on(
        lab, place, ended, f"{which.name} after {after:.2f} s, again {again:.2f} s later"
    )


def full_disk(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """The disk is full at some point of the run, and later has room."""
    whole = sum(path.stat().st_size for path in lab.reference().rglob("*") if path.is_file())
    size = int(rng.uniform(0.02, 0.9) * whole)
    with _disk(place, size):
        ended = lab.start(place / "run").wait()
        _mount("remount", f"size={20 * whole}", place)
        if ended.code != 0:
            _must(ended.is_sentence and "full" in ended.errors[0], "no sentence", ended)
        return _goes_on(lab, place / "run", ended, f"{size} of {whole} bytes")


def read_only_start(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """A run halfway through lies on a disk that cannot be written."""
    with _disk(place, 2**28):
        lab.halfway(place / "run")
        _mount("remount", "ro", place)
        ended = lab.start(place / "run").wait()
        _must(ended.is_sentence, "no sentence", ended)
        _mount("remount", "rw", place)
        return _goes_on(lab, place / "run", ended, "read-only at the start")


def read_only_checkpoints(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """The directory of checkpoints becomes read-only during the run."""
    process, step = lab.start(place), rng.randint(1, 6)
    _wait_until(process, lambda: _has_line(place, step))
    (place / "checkpoints").mkdir(exist_ok=True)
    _mount("", "ro", place / "checkpoints")
    try:
        ended = process.wait()
    finally:
        subprocess.run(["umount", "--lazy", place / "checkpoints"], check=True)
    _must(ended.is_sentence, "no sentence", ended)
    return _goes_on(lab, place, ended, f"after iteration {step}")


def vanished(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """The directory is deleted or moved away during the run, and comes back or not."""
    process, step = lab.start(place), rng.randint(1, 6)
    comes_back = rng.random() < 0.5
    _wait_until(process, lambda: _has_line(place, step))
    aside = place.with_name(f"{place.name}_aside")
    place.rename(aside)
    ended = process.wait()
    _must(ended.is_sentence, "no sentence", ended)
    shutil.rmtree(place, ignore_errors=True)
    if comes_back:
        aside.rename(place)
    detail = f"after iteration {step}, {'comes back' if comes_back else 'for good'}"
    return _goes_on(lab, place, ended, detail)


def damaged_checkpoint(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """A file of the newest checkpoint is truncated, emptied, missing, or has a bit flipped."""
    lab.halfway(place)
    newest = place / "checkpoints" / str(HALF)
    return _resumed_or_told(lab, place, damage(rng, rng.choice(_files(newest))))


def damaged_checkpoints(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """A file of each checkpoint is damaged likewise."""
    lab.halfway(place)
    details = []
    for step in sorted((place / "checkpoints").iterdir()):
        details.append(damage(rng, rng.choice(_files(step))))
    return _resumed_or_told(lab, place, "; ".join(details))


def damaged_json(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """A file of JSON, or the base evaluation's moments, is garbled."""
    lab.halfway(place)
    (place / ".holder.json").write_text('{"host": "elsewhere", "pid": 1, "beat": 1.0}')
    names = ["config.json", "eval_base.json", "eval_base.safetensors", "eval.json", ".holder.json"]
    path = place / rng.choice(names)
    content = {
        "garbled": b'{"a": ',
        "empty": b"",
        "zeros": b"\0" * path.stat().st_size,
        "no text": bytes(rng.randrange(256) for _ in range(200)),
        "a list": b"[1, 2]",
        "half": path.read_bytes()[: path.stat().st_size // 2],
    }
    how = rng.choice(list(content))
    path.write_bytes(content[how])
    return _resumed_or_told(lab, place, f"{path.name}: {how}")


def damaged_metrics(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """metrics.jsonl is torn, filled with zeros, or lacks lines."""
    lab.halfway(place)
    path = place / "metrics.jsonl"
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    kinds = {
        "torn in a line beyond the checkpoint": text + lines[-1][:40],
        "zeros at the end": text + b"\0" * 4096,
        "torn in the last line": text[:-20],
        "a line less": b"".join(lines[:1] + lines[2:]),
        "a line twice": b"".join([*lines, lines[-1]]),
        "empty": b"",
        "no text": text + bytes([255, 254, 10]),
    }
    how = rng.choice(list(kinds))
    path.write_bytes(kinds[how])
    return _resumed_or_told(lab, place, how, metrics=False)


def two_in_one_directory(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """A second process is refused, and the first does not notice."""
    first = lab.start(place)
    after = rng.uniform(0, 0.9 * _duration(lab))
    with contextlib.suppress(subprocess.TimeoutExpired):
        first.popen.wait(after)
    second = lab.start(place)
    refused, ended = second.wait(60), first.wait()
    if ended.code == 0:
        loser = refused
    else:  # started almost at once, the second was faster
        loser, ended = ended, refused
    _must(loser.is_sentence or loser.code == 0, "no sentence", loser)
    return _goes_on(lab, place, ended, f"{after:.2f} s apart")


def one_of_two(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """One of two processes that train together is killed."""
    return _one_of(2, lab, rng, place)


def one_of_four(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """One of four processes that train together is killed."""
    return _one_of(4, lab, rng, place)


def judge_goes_wrong(lab: Lab, rng: random.Random, place: Path) -> Outcome:
    """A reward on the host raises, exits, hangs, or returns what is no score."""
    kinds = ("raises", "exits", "hangs", "nan", "infinite", "too few", "words", "nothing")
    kind, call = rng.choice(kinds), str(rng.randint(1, 9))
    fault = {"FAULT_KIND": kind, "FAULT_CALL": call}
    ended = lab.start(place, judged=True, environment=fault).wait()
    if ended.code != 0:
        _must(ended.is_sentence and "'faulty'" in ended.errors[0], "no sentence", ended)
    alone, detail = lab.reference(judged=True), f"{kind} at call {call}"
    outcome = _goes_on(lab, place, ended, detail, alone=alone, judge="faulty")
    if difference(place, alone):  # an evaluation goes on without it, and says so in the metrics
        return dataclasses.replace(outcome, result=TOLD)
    return outcome


# The kinds, with how many faults each has in a whole campaign and in a quick one.
KINDS: dict[str, tuple[Callable[[Lab, random.Random, Path], Outcome], int, int]] = {
    f.__name__: (f, whole, quick)
    for f, whole, quick in (
        (kill_at_random, 80, 2),
        (kill_in_checkpoint, 24, 1),
        (kill_before_checkpoint, 16, 0),
        (kill_in_evaluation, 12, 0),
        (kill_at_the_end, 16, 1),
        (stop_once, 30, 1),
        (stop_twice, 18, 0),
        (full_disk, 16, 1),
        (read_only_start, 2, 0),
        (read_only_checkpoints, 6, 0),
        (vanished, 8, 0),
        (damaged_checkpoint, 32, 2),
        (damaged_checkpoints, 8, 1),
        (damaged_json, 24, 2),
        (damaged_metrics, 14, 1),
        (two_in_one_directory, 6, 0),
        (one_of_two, 6, 0),
        (one_of_four, 3, 0),
        (judge_goes_wrong, 12, 1),
    )
}


def damage(rng: random.Random, path: Path) -> str:
    """Damages a file; returns what was done."""
    data = path.read_bytes()
    how = rng.choice(("truncated", "emptied", "missing", "a bit flipped"))
    if how == "missing":
        path.unlink()
    elif how == "a bit flipped" and data:
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    else:
        path.write_bytes(data[: len(data) // 2] if how == "truncated" else b"")
    return f"{path.relative_to(path.parents[1])} {how}"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _resumed_or_told(lab: Lab, place: Path, detail: str, *, metrics: bool = True) -> Outcome:
    """A damaged directory: the run goes on as ever, or the damage is answered with a sentence."""
    ended = lab.start(place).wait()
    if ended.code == 0:
        different = difference(place, lab.reference(), metrics=metrics)
        _must(not different, f"another result: {different}", ended)
        return Outcome(RESUMED, detail, "starting", ended.seconds, ended.code)
    _must(ended.is_sentence, "no sentence", ended)
    return Outcome(TOLD, detail, "starting", ended.seconds, ended.code)


def _goes_on(
    lab: Lab,
    place: Path,
    hurt: Ended,
    detail: str,
    *,
    alone: Path | None = None,
    judge: str = "",
) -> Outcome:
    """The same command again: the result is that of a run which was left alone."""
    ended = lab.start(place, judged=bool(judge)).wait()
    _must(ended.code == 0 and not ended.has_trace, "the same command does not go on", ended)
    different = difference(place, alone or lab.reference(), judge=judge)
    _must(not different, f"another result: {different}", ended)
    return Outcome(RESUMED, detail, hurt.phase, hurt.seconds, hurt.code)


def _one_of(count: int, lab: Lab, rng: random.Random, place: Path) -> Outcome:
    alone = lab.reference(count=count)
    processes = lab.start_several(place, count)
    victim = rng.randrange(count)
    step = rng.randint(1, LENGTH - 1)
    _wait_until(processes[victim], lambda: _has_line(place, step))
    processes[victim].popen.kill()
    ended = [process.wait() for process in processes]
    for i, one in enumerate(ended):
        _must(one.code is not None, "did not end", one)
        _must(i == victim or one.code != 0, "went on alone", one)
    again = [process.wait() for process in lab.start_several(place, count)]
    for one in again:
        _must(one.code == 0, "the same command does not go on", one)
    different = difference(place, alone)
    _must(not different, f"another result: {different}", again[0])
    others = [one for i, one in enumerate(ended) if i != victim]
    told = sum(one.is_sentence for one in others)
    detail = f"process {victim} after iteration {step}; {told} of {len(others)} ended in a sentence"
    return Outcome(RESUMED, detail, "training", sum(one.seconds for one in ended), others[0].code)


def _kill_when(
    lab: Lab,
    rng: random.Random,
    place: Path,
    when: Callable[[], bool],
    detail: str,
    *,
    within: float,
) -> Outcome:
    process = lab.start(place)
    _wait_until(process, when, pause=0.0005)
    after = rng.uniform(0, within)
    time.sleep(after)
    process.popen.kill()
    return _goes_on(lab, place, process.wait(), f"{detail} {after:.3f} s".strip())


def _wait_until(process: Process, when: Callable[[], bool], *, pause: float = 0.01) -> None:
    """Until it is so, or the process has ended."""
    while process.popen.poll() is None and not when():
        time.sleep(pause)


def _has_line(place: Path, step: int) -> bool:
    with contextlib.suppress(OSError):
        return f'"step": {step},' in (place / "metrics.jsonl").read_text(errors="replace")
    return False


def _signal(rng: random.Random) -> signal.Signals:
    return rng.choice((signal.SIGTERM, signal.SIGINT, signal.SIGHUP))


def _send_after(process: Process, which: signal.Signals, seconds: float) -> None:
    try:
        process.popen.wait(seconds)
    except subprocess.TimeoutExpired:
        process.popen.send_signal(which)


def _ended_in_order(ended: Ended, which: signal.Signals) -> None:
    """By itself with a word, or by the signal, as programs do that have only begun."""
    _must(ended.code is not None, "did not end within 60 s", ended)
    _must(not ended.has_trace, "a stack trace", ended)
    allowed = (0, 2, -which.value, 128 + which.value, 1)
    _must(ended.code in allowed, f"status {ended.code}", ended)


def _duration(lab: Lab) -> float:
    """Seconds that a run takes, about, with all programs compiled before."""
    path = lab.scratch / "duration"
    if not path.exists():
        lab.reference()
        place = lab.scratch / "timed"
        shutil.rmtree(place, ignore_errors=True)
        path.write_text(str(lab.start(place).wait().seconds))
    return float(path.read_text())


@contextlib.contextmanager
def _disk(place: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes, mounted at `place`; only root may do that."""
    place.mkdir(parents=True)
    _mount("", f"size={size}", place)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _mount(what: str, options: str, place: Path) -> None:
    joined = ",".join(filter(None, (what, options)))
    subprocess.run(["mount", "-t", "tmpfs", "-o", joined, "none", place], check=True)


def _must(truth: bool, otherwise: str, ended: Ended) -> None:
    if not truth:
        raise FaultError(f"{otherwise} (status {ended.code}): {ended.output[-1500:]}")
