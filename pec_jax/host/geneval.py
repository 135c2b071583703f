"""GenEval's rules: does an image show the objects that its prompt asks for?

Pure functions of what a detector found. A prompt asks for classes of COCO in `include`, each with a
count, perhaps with a colour or with a position relative to an earlier entry. There are four rules:

* `original`, of the evaluation: at least that many, and no class of `exclude` in its count;
* `strict`, of Flow-GRPO: exactly that many; `exclude` is not looked at;
* `flow_grpo`, its partial score: the mean of the terms of all entries. An entry has the terms
    1 - |count - found| / count                  always,
    0                                            if found != count and a colour or a position was
                                                 asked,
    1 - |count - found of the colour| / count    if found = count and a colour was asked,
    1, preceded by a 0 if a pair violates it     if all that is right and a position was asked;
                                                 only a 0 if the object to refer to is not matched.
  It is not bounded below (16 found for 1 give -14), and a position that is violated adds the terms
  0 and 1 where 0 alone was meant.
* `fixed`, without these two faults: every count, colour and position asked for is one term in
  [0, 1]. A count has max(0, 1 - |count - found| / count). A colour has the same of the objects of
  that colour, or 0 if found != count. A position has 1 if it holds for objects whose number and
  colour are right, else 0. The mean is 1 exactly where `strict` holds.

Source: Ghosh et al. 2023, arXiv 2310.11513; `djghosh13/geneval@af4902f:evaluation/
evaluate_images.py, summary_scores.py`; `yifan123/reward-server@92ac29f:reward_server/gen_eval.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pec_jax.config import unknown

# COCO's classes by index, as GenEval spells them: 64, 65 and 66 are COCO's mouse, remote, keyboard.
CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
    fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow,
    elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee,
    skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
    tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich,
    orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed,
    dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
    microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
    hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)
COLOURS = (
    *("red", "orange", "yellow", "green", "blue"),
    *("purple", "pink", "brown", "black", "white"),
)
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD = 0.3  # scores above it are kept
COUNTING_THRESHOLD = 0.9  # the same, for the tag "counting"
MAX_OBJECTS = 16  # kept of a class
POSITION_MARGIN = 0.1  # share of the summed sizes by which two centres must differ at least


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object that a detector found.

    Attributes:
        label: index of its class, 0..79.
        score: confidence in [0, 1].
        box: (x0, y0, x1, y1) in pixels from the top left corner; x1 and y1 lie outside.
        colour: one of `COLOURS`, or None if nobody has looked.
        mask: [H, W] bool, its pixels; None if unknown. No rule looks at it.
    """

    label: int
    score: float
    box: tuple[float, float, float, float]
    colour: str | None = None
    mask: np.ndarray | None = dataclasses.field(default=None, repr=False, compare=False)


Found = Mapping[int, Sequence[Detection]]  # class -> what was found of it, best first


@dataclasses.dataclass(frozen=True)
class Clause:
    """One entry of `include` or `exclude`.

    Attributes:
        label: index of the class.
        count: how many, at least 1.
        colour: one of `COLOURS`; None for any.
        position: (one of `RELATIONS`, index of an earlier clause); None for anywhere.
    """

    label: int
    count: int
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """What a prompt asks for."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse(metadata: Mapping[str, Any]) -> Task:
    """Reads a prompt's metadata.

    Args:
        metadata: "tag", "include" and perhaps "exclude", as in GenEval's
            evaluation_metadata.jsonl; other fields are ignored.

    Raises:
        ValueError: something is missing or malformed; the message is one sentence.
    """
    if missing := [name for name in ("tag", "include") if name not in metadata]:
        raise ValueError(f'the field "{missing[0]}" is missing; use a .jsonl file that has it.')
    tag = metadata["tag"]
    if tag not in TAGS:
        raise ValueError('the field "tag": ' + unknown("value", str(tag), TAGS))
    sections = {name: metadata.get(name, []) for name in ("include", "exclude")}
    for name, entries in sections.items():
        if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
            raise ValueError(f'the field "{name}" must be a list of objects, not {entries!r}.')
    if not sections["include"]:
        raise ValueError('the field "include" must name at least one object.')
    parsed = {
        name: tuple(_parse_clause(entry, i, name) for i, entry in enumerate(entries))
        for name, entries in sections.items()
    }
    return Task(tag, **parsed)


def _parse_clause(entry: Mapping[str, Any], index: int, section: str) -> Clause:
    """Entry `index` of a section."""
    where = f"{section}[{index}]"
    fields = ("class", "count") if section == "exclude" else ("class", "count", "color", "position")
    for key in entry:
        if key not in fields:
            raise ValueError(f"{where}: " + unknown("field", key, fields))
    name, count, colour = entry.get("class"), entry.get("count"), entry.get("color")
    if name not in CLASSES:
        raise ValueError(f"{where}: " + unknown("class", str(name), CLASSES))
    if type(count) is not int or count < 1:
        raise ValueError(f"{where}: the count must be a whole number of at least 1, not {count!r}.")
    if "color" in entry and colour not in COLOURS:
        raise ValueError(f"{where}: " + unknown("color", str(colour), COLOURS))
    position = _parse_position(entry["position"], index, where) if "position" in entry else None
    return Clause(CLASSES.index(name), count, colour, position)


def _parse_position(value: Any, index: int, where: str) -> tuple[str, int]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{where}: a position must be [relation, index], not {value!r}.")
    relation, target = value
    if relation not in RELATIONS:
        raise ValueError(f"{where}: " + unknown("relation", str(relation), RELATIONS))
    if type(target) is not int or not 0 <= target < index:
        raise ValueError(
            f"{where}: a position must refer to the index of an earlier entry, not {target!r}."
        )
    return relation, target


def keep(detections: Iterable[Detection], tag: str) -> dict[int, list[Detection]]:
    """The detections that count: above the tag's threshold, at most 16 of a class, best first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    kept: dict[int, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        same = kept.setdefault(detection.label, [])
        if detection.score > threshold and len(same) < MAX_OBJECTS:
            same.append(detection)
    return kept


def relations(a: Detection, b: Detection) -> set[str]:
    """Where `a` is, seen from `b`: none, one or two of `RELATIONS`.

    Per axis, the centres' offset o becomes o' = sign(o) max(|o| - 0.1 (size_a + size_b), 0); `a` is
    on the side where o' exceeds half the length of o.
    """
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):  # x, y
        o = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        sizes = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        offset.append(o)
        beyond.append(math.copysign(max(abs(o) - POSITION_MARGIN * sizes, 0.0), o))
    if all(abs(o) < 1e-3 for o in beyond):
        return set()
    dx, dy = (o / math.hypot(*offset) for o in beyond)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


def _holds(relation: str, objects: Sequence[Detection], targets: Sequence[Detection]) -> bool:
    """Whether every object has the relation to every target."""
    return all(relation in relations(a, b) for a in objects for b in targets)


def _of_colour(objects: Sequence[Detection], colour: str) -> int:
    """How many are of the colour; ValueError if one's colour is not known."""
    if any(o.colour is None for o in objects):
        raise ValueError(f"the colour of a {CLASSES[objects[0].label]!r} is not known.")
    return sum(o.colour == colour for o in objects)


def need_colour(task: Task, found: Found) -> list[tuple[int, int]]:
    """Which detections must have a colour before a rule is applied: (class, index)."""
    asked = [c for c in task.include if c.colour and len(found.get(c.label, ())) >= c.count]
    return sorted({(c.label, i) for c in asked for i in range(c.count)})


def original(task: Task, found: Found) -> bool:
    """Whether the image is correct by the rule of the evaluation."""
    groups: list[Sequence[Detection]] = []  # per clause its objects, none if they do not match
    for clause in task.include:
        objects = found.get(clause.label, ())[: clause.count]
        matched = len(objects) == clause.count
        if matched and clause.colour:
            matched = _of_colour(objects, clause.colour) == clause.count
        if matched and clause.position:
            relation, target = clause.position
            matched = bool(groups[target]) and _holds(relation, objects, groups[target])
        groups.append(objects if matched else ())
    return all(groups) and all(len(found.get(c.label, ())) < c.count for c in task.exclude)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """One clause, by the exact counts of Flow-GRPO."""

    found: int
    of_colour: int | None = None  # None where no colour was compared
    position: str = ""  # "right", "violated" or "no target"; "" where none was compared
    matched: bool = False


def _outcomes(task: Task, found: Found) -> list[_Outcome]:
    groups: list[Sequence[Detection]] = []  # as in `original`
    outcomes: list[_Outcome] = []
    for clause in task.include:
        objects = found.get(clause.label, ())
        outcome = _Outcome(len(objects), matched=len(objects) == clause.count)
        if outcome.matched and clause.colour:
            n = _of_colour(objects, clause.colour)
            outcome = dataclasses.replace(outcome, of_colour=n, matched=n == clause.count)
        if outcome.matched and clause.position:
            relation, target = clause.position
            right = _holds(relation, objects, groups[target])
            position = ("right" if right else "violated") if groups[target] else "no target"
            outcome = dataclasses.replace(outcome, position=position, matched=position == "right")
        outcomes.append(outcome)
        groups.append(objects if outcome.matched else ())
    return outcomes


def strict(task: Task, found: Found) -> bool:
    """Whether exactly what was asked for is there, by Flow-GRPO's rule."""
    return all(outcome.matched for outcome in _outcomes(task, found))


def _share(count: int, found: int) -> float:
    return 1 - abs(count - found) / count


def flow_grpo(task: Task, found: Found) -> float:
    """Flow-GRPO's partial score, at most 1, with its two faults."""
    terms: list[float] = []
    for clause, outcome in zip(task.include, _outcomes(task, found)):
        terms.append(_share(clause.count, outcome.found))
        if outcome.found != clause.count and (clause.colour or clause.position):
            terms.append(0.0)
        if outcome.of_colour is not None:
            terms.append(_share(clause.count, outcome.of_colour))
        after = {"": [], "right": [1.0], "violated": [0.0, 1.0], "no target": [0.0]}
        terms += after[outcome.position]
    return sum(terms) / len(terms)


def fixed(task: Task, found: Found) -> float:
    """The partial score without the two faults, in [0, 1]."""
    terms: list[float] = []
    for clause, outcome in zip(task.include, _outcomes(task, found)):
        terms.append(max(0.0, _share(clause.count, outcome.found)))
        if clause.colour:
            n = outcome.of_colour
            terms.append(0.0 if n is None else max(0.0, _share(clause.count, n)))
        if clause.position:
            terms.append(float(outcome.position == "right"))
    return sum(terms) / len(terms)


RULES: dict[str, Callable[[Task, Found], float]] = {
    rule.__name__: rule for rule in (original, strict, flow_grpo, fixed)
}


def summary(tags: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    """Accuracies of an evaluation.

    Args:
        tags: of N images.
        scores: N verdicts of `original` (or `strict`); NaN leaves an image out.

    Returns:
        Tag -> mean score, and "overall", the mean over the tags. NaN where no image was judged.
    """
    by_tag: dict[str, list[float]] = {tag: [] for tag in tags}
    for tag, score in zip(tags, scores, strict=True):
        if not math.isnan(score):
            by_tag[tag].append(float(score))
    means = {tag: sum(s) / len(s) if s else math.nan for tag, s in by_tag.items()}
    return means | {"overall": sum(means.values()) / len(means) if means else math.nan}
