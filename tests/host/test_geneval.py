"""GenEval's rules against a second reading of the published evaluation, and cases by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from pec_jax.host import geneval
from pec_jax.host.geneval import CLASSES, COLOURS, RELATIONS, RULES, Detection

# One line of each tag of GenEval's evaluation_metadata.jsonl.
LINES = """
{"tag": "single_object", "include": [{"class": "bowl", "count": 1}], "prompt": "a photo of a bowl"}
{"tag": "two_object", "include": [{"class": "bowl", "count": 1}, {"class": "skis", "count": 1}], "prompt": "a photo of a bowl and a skis"}
{"tag": "counting", "include": [{"class": "wine glass", "count": 2}], "exclude": [{"class": "wine glass", "count": 3}], "prompt": "a photo of two wine glasses"}
{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "purple"}], "prompt": "a photo of a purple cup"}
{"tag": "position", "include": [{"class": "laptop", "count": 1}, {"class": "cow", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a cow right of a laptop"}
{"tag": "color_attr", "include": [{"class": "handbag", "count": 1, "color": "pink"}, {"class": "scissors", "count": 1, "color": "black"}], "prompt": "a photo of a pink handbag and a black scissors"}
""".strip().splitlines()  # noqa: E501
PROMPTS = {line["tag"]: line for line in map(json.loads, LINES)}


def test_a_line_of_each_tag_is_read():
    assert tuple(PROMPTS) == geneval.TAGS
    tasks = [geneval.parse(line) for line in PROMPTS.values()]
    assert [len(task.include) for task in tasks] == [1, 2, 1, 1, 2, 2]
    position, attributes = tasks[4:]
    assert position.include[1] == geneval.Clause(CLASSES.index("cow"), 1, None, ("right of", 0))
    assert [clause.colour for clause in attributes.include] == ["pink", "black"]
    assert tasks[2].exclude == (geneval.Clause(CLASSES.index("wine glass"), 3),)


def test_the_classes_are_those_of_coco_in_order():
    assert len(set(CLASSES)) == 80
    known = {0: "person", 2: "car", 14: "bird", 39: "bottle", 62: "tv", 79: "toothbrush"}
    renamed = {64: "computer mouse", 65: "tv remote", 66: "computer keyboard"}
    assert {i: CLASSES[i] for i in known | renamed} == known | renamed


CAT = {"class": "cat", "count": 1}
MALFORMED = {
    "no tag": ({"include": [CAT]}, '"tag" is missing'),
    "no include": ({"tag": "counting"}, '"include" is missing'),
    "an unknown tag": ({"tag": "colours", "include": [CAT]}, "Did you mean 'colors'"),
    "nothing asked for": ({"tag": "colors", "include": []}, "at least one object"),
    "not a list": ({"tag": "colors", "include": CAT}, "must be a list"),
    "not an object": ({"tag": "colors", "include": ["cat"]}, "must be a list of objects"),
    "an unknown class": ([{"class": "mouse", "count": 1}], r"include\[0\].*'mouse'"),
    "a class that is a list": ([{"class": ["cat"], "count": 1}], "unknown class"),
    "no count": ([CAT, {"class": "dog"}], r"include\[1\]: the count .* not None"),
    "a count of 0": ([{"class": "dog", "count": 0}], "at least 1, not 0"),
    "a true count": ([{"class": "dog", "count": True}], "not True"),
    "an unknown colour": ([{**CAT, "color": "grey"}], "unknown color 'grey'"),
    "a null colour": ([{**CAT, "color": None}], "unknown color"),
    "another spelling": ([{**CAT, "colour": "red"}], "Did you mean 'color'"),
    "an unknown relation": ([CAT, {**CAT, "position": ["near", 0]}], "unknown relation 'near'"),
    "its own index": ([CAT, {**CAT, "position": ["above", 1]}], "earlier entry, not 1"),
    "a negative index": ([CAT, {**CAT, "position": ["above", -1]}], "earlier entry, not -1"),
    "half a position": ([CAT, {**CAT, "position": ["above"]}], "must be"),
    "a colour excluded": (
        {"tag": "counting", "include": [CAT], "exclude": [{**CAT, "color": "red"}]},
        r"exclude\[0\]: unknown field 'color'",
    ),
}


@pytest.mark.parametrize("metadata, message", MALFORMED.values(), ids=MALFORMED)
def test_malformed_metadata_are_refused(metadata, message):
    if isinstance(metadata, list):
        metadata = {"tag": "two_object", "include": metadata}
    with pytest.raises(ValueError, match=message):
        geneval.parse(metadata)


# The second reading: names instead of indices, plain dictionaries, NumPy for positions.


def published_keep(detections, tag):
    """Class name -> detections above the threshold, sorted, at most 16."""
    result = {}
    for index, name in enumerate(CLASSES):
        mine = [d for d in detections if d.label == index]
        order = np.argsort([-d.score for d in mine], kind="stable")
        above = [mine[i] for i in order if mine[i].score > (0.9 if tag == "counting" else 0.3)]
        if above:
            result[name] = above[:16]
    return result


def published_relation(relation, a, b):
    """Whether the relation is among those between two boxes."""
    corners = np.array([a.box, b.box]).reshape(2, 2, 2)  # object, corner, axis
    centre, size = corners.mean(1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centre[0] - centre[1]
    revised = np.sign(offset) * np.clip(np.abs(offset) - 0.1 * size.sum(0), 0, None)
    if (np.abs(revised) < 1e-3).all():
        return False
    x, y = revised / np.sqrt(np.sum(offset**2))
    if relation in ("left of", "right of"):
        return x < -0.5 if relation == "left of" else x > 0.5
    return y < -0.5 if relation == "above" else y > 0.5


def published_original(objects, metadata):
    """Correct or not, by the evaluation: with `count` the best of each class are compared."""
    correct, matched = True, {}
    for i, wanted in enumerate(metadata["include"]):
        n = wanted["count"]
        mine = objects.get(wanted["class"], [])[:n]
        good = len(mine) >= n
        if good and "color" in wanted:
            good = [d.colour for d in mine].count(wanted["color"]) >= n
        if good and "position" in wanted:
            relation, target = wanted["position"]
            if target not in matched:
                good = False
            else:
                for a in mine:
                    for b in matched[target]:
                        good = good and published_relation(relation, a, b)
        if good:
            matched[i] = mine
        correct = correct and good
    for unwanted in metadata.get("exclude", []):
        if len(objects.get(unwanted["class"], [])) >= unwanted["count"]:
            correct = False
    return correct


def published_reward(objects, metadata, repaired=False):
    """(strict, partial score) of Flow-GRPO; `repaired` as the module defines `fixed`."""
    strict, rewards, matched = True, [], {}
    for i, wanted in enumerate(metadata["include"]):
        n, mine = wanted["count"], objects.get(wanted["class"], [])
        good = len(mine) == n
        rewards.append(1 - abs(n - len(mine)) / n)
        if not good:
            asked = [key for key in ("color", "position") if key in wanted]
            rewards += [0.0] * (len(asked) if repaired else bool(asked))
        if good and "color" in wanted:
            right = [d.colour for d in mine].count(wanted["color"])
            rewards.append(1 - abs(n - right) / n)
            good = right == n
            if not good and repaired and "position" in wanted:
                rewards.append(0.0)
        if good and "position" in wanted:
            relation, target = wanted["position"]
            if target not in matched:
                good = False
                rewards.append(0.0)
            else:
                pairs = [(a, b) for a in mine for b in matched[target]]
                good = all(published_relation(relation, a, b) for a, b in pairs)
                rewards += [float(good)] if repaired else [1.0] if good else [0.0, 1.0]
        if good:
            matched[i] = mine
        strict = strict and good
    if repaired:
        rewards = [min(max(r, 0.0), 1.0) for r in rewards]
    return strict, sum(rewards) / len(rewards)


def random_metadata(rng, tag):
    """As GenEval's prompts of that tag, with now and then a second attribute or a larger count."""
    names = list(rng.choice(CLASSES, 3, replace=False))
    entries = [{"class": str(name), "count": 1} for name in names]
    entries = entries[: 1 if tag in ("single_object", "counting", "colors") else 2]
    if tag in ("colors", "color_attr"):
        for entry in entries:
            entry["color"] = str(rng.choice(COLOURS[:2]))
    if tag == "position":
        entries[1]["position"] = [str(rng.choice(RELATIONS)), 0]
    if rng.random() < 0.3 and len(entries) > 1:
        entries[0]["color"] = "red"
        entries[1]["count"], entries[1]["color"] = 2, "red"
        entries.append({"class": str(names[2]), "count": 1, "position": ["left of", 1]})
    metadata = {"tag": tag, "include": entries}
    if tag == "counting":
        entries[0]["count"] = int(rng.integers(2, 5))
        metadata["exclude"] = [{"class": entries[0]["class"], "count": entries[0]["count"] + 1}]
    return metadata


def random_detections(rng, metadata):
    """Often what was asked for, often not; sometimes far too much."""
    detections = []
    for entry in metadata["include"]:
        n = entry["count"] + int(
            rng.choice([-1, 0, 0, 0, 0, 1, 20], p=[0.1, *[0.2] * 4, 0.07, 0.03])
        )
        for _ in range(n + int(rng.integers(3))):
            kept = rng.random() < 0.8
            score = rng.uniform(0.9, 1.0) if kept else rng.choice([0.1, 0.3, 0.31, 0.9])
            x, y = rng.integers(0, 40, 2)
            box = (x, y, x + rng.integers(1, 20), y + rng.integers(1, 20))
            colour = str(rng.choice([entry.get("color", "red"), "orange"], p=[0.8, 0.2]))
            label = CLASSES.index(entry["class"])
            detections.append(Detection(label, float(score), tuple(map(float, box)), colour))
    return [detections[i] for i in rng.permutation(len(detections))]


def test_random_detections_are_judged_as_published():
    rng = np.random.default_rng(0)
    judged = {rule: [] for rule in RULES}
    for i in range(600):
        metadata = random_metadata(rng, geneval.TAGS[i % 6])
        detections = random_detections(rng, metadata)
        task, found = geneval.parse(metadata), geneval.keep(detections, metadata["tag"])
        objects = published_keep(detections, metadata["tag"])
        strict, partial = published_reward(objects, metadata)
        expected = {
            "original": published_original(objects, metadata),
            "strict": strict,
            "flow_grpo": partial,
            "fixed": published_reward(objects, metadata, repaired=True)[1],
        }
        scores = {rule: verdict(task, found) for rule, verdict in RULES.items()}
        assert scores == pytest.approx(expected, abs=1e-12), (i, metadata, detections)
        assert 0 <= scores["fixed"] <= 1 and (scores["fixed"] == 1) == strict
        assert scores["flow_grpo"] <= 1 and (scores["flow_grpo"] == 1) == strict
        assert scores["original"] or not strict
        for rule, score in scores.items():
            judged[rule].append(score)
    assert 100 < sum(judged["strict"]) < sum(judged["original"]) < 500
    assert min(judged["flow_grpo"]) < -1 and len({*judged["fixed"]}) > 8


def objects(name, *boxes, colour="red", score=0.95):
    """Detections of one class, one for each box or number of boxes."""
    boxes = [(0.0, 0.0, 4.0, 4.0)] * boxes[0] if boxes and isinstance(boxes[0], int) else boxes
    return [Detection(CLASSES.index(name), score, box, colour) for box in boxes]


def judge(metadata, *detections):
    task = geneval.parse(metadata)
    found = geneval.keep([d for group in detections for d in group], task.tag)
    return {rule: verdict(task, found) for rule, verdict in RULES.items()}


def verdicts(original, strict, flow_grpo, fixed):
    return pytest.approx(dict(zip(RULES, (original, strict, flow_grpo, fixed))))


def test_a_single_object():
    one = PROMPTS["single_object"]
    assert judge(one) == verdicts(0, 0, 0, 0)
    assert judge(one, objects("bowl", 1)) == verdicts(1, 1, 1, 1)
    assert judge(one, objects("bowl", 2)) == verdicts(1, 0, 0, 0)
    assert judge(one, objects("cup", 1)) == verdicts(0, 0, 0, 0)


def test_sixteen_for_one_score_minus_fourteen_in_flow_grpo_alone():
    one = PROMPTS["single_object"]
    assert judge(one, objects("bowl", 16)) == verdicts(1, 0, -14, 0)
    assert judge(one, objects("bowl", 30)) == verdicts(1, 0, -14, 0)  # only 16 are kept


def test_two_objects():
    two = PROMPTS["two_object"]
    assert judge(two, objects("bowl", 1)) == verdicts(0, 0, 0.5, 0.5)
    assert judge(two, objects("bowl", 1), objects("skis", 1)) == verdicts(1, 1, 1, 1)
    assert judge(two, objects("bowl", 1), objects("skis", 3)) == verdicts(1, 0, 0, 0.5)


def test_counting_takes_sure_detections_and_no_more_than_asked():
    two = PROMPTS["counting"]
    assert judge(two, objects("wine glass", 2)) == verdicts(1, 1, 1, 1)
    assert judge(two, objects("wine glass", 1)) == verdicts(0, 0, 0.5, 0.5)
    assert judge(two, objects("wine glass", 3)) == verdicts(0, 0, 0.5, 0.5)
    unsure = objects("wine glass", 1, score=0.9)
    assert judge(two, objects("wine glass", 2), unsure) == verdicts(1, 1, 1, 1)
    assert judge(two, unsure, unsure) == verdicts(0, 0, 0, 0)


def test_other_tags_take_less_sure_ones():
    one = PROMPTS["single_object"]
    assert judge(one, objects("bowl", 1, score=0.31))["strict"]
    assert not judge(one, objects("bowl", 1, score=0.3))["strict"]


def test_colours():
    purple = PROMPTS["colors"]
    assert judge(purple, objects("cup", 1, colour="purple")) == verdicts(1, 1, 1, 1)
    assert judge(purple, objects("cup", 1, colour="red")) == verdicts(0, 0, 0.5, 0.5)
    assert judge(purple) == verdicts(0, 0, 0, 0)
    # Of two, the evaluation looks at the better one; Flow-GRPO at none.
    better = objects("cup", 1, colour="purple", score=0.99)
    assert judge(purple, objects("cup", 1), better) == verdicts(1, 0, 0, 0)


def test_two_colours():
    both = PROMPTS["color_attr"]
    pink, black = (
        objects(*o, colour=c) for o, c in ((("handbag", 1), "pink"), (("scissors", 1), "black"))
    )
    assert judge(both, pink, black) == verdicts(1, 1, 1, 1)
    assert judge(both, pink, objects("scissors", 1)) == verdicts(0, 0, 0.75, 0.75)
    assert judge(both, pink) == verdicts(0, 0, 0.5, 0.5)


LAPTOP = objects("laptop", (0.0, 0.0, 10.0, 10.0))


def test_a_violated_position_scores_half_in_flow_grpo_and_nothing_when_fixed():
    right = PROMPTS["position"]
    cow = objects("cow", (30.0, 0.0, 40.0, 10.0))
    assert judge(right, LAPTOP, cow) == verdicts(1, 1, 1, 1)
    wrong = objects("cow", (0.0, 30.0, 10.0, 40.0))
    # Terms: two counts, and 0 and 1 for the position; two counts and 0.
    assert judge(right, LAPTOP, wrong) == verdicts(0, 0, 3 / 4, 2 / 3)
    assert judge(right, cow) == verdicts(0, 0, 1 / 3, 1 / 3)  # nothing to be right of
    assert judge(right, LAPTOP) == verdicts(0, 0, 1 / 3, 1 / 3)
    # The evaluation compares the best ones of each.
    assert judge(right, LAPTOP, cow, objects("cow", (0.0, 0.0, 1.0, 1.0), score=0.5)) == verdicts(
        1, 0, 1 / 3, 1 / 3
    )


def test_every_pair_must_have_the_relation():
    metadata = {
        "tag": "position",
        "include": [
            {"class": "laptop", "count": 1},
            {"class": "cow", "count": 2, "position": ["right of", 0]},
        ],
    }
    right, left = (30.0, 0.0, 40.0, 10.0), (-30.0, 0.0, -20.0, 10.0)
    assert judge(metadata, LAPTOP, objects("cow", right, right))["original"]
    assert not judge(metadata, LAPTOP, objects("cow", right, left))["original"]


def relations(x, y, half=0.0):
    """Of a box whose centre is at (x, y) to one at the origin, both of that half size."""
    a = Detection(0, 1.0, (x - half, y - half, x + half, y + half))
    return geneval.relations(a, Detection(0, 1.0, (-half, -half, half, half)))


def test_relations_in_the_image_with_y_downwards():
    assert relations(9, 0) == {"right of"} and relations(-9, 0) == {"left of"}
    assert relations(0, 9) == {"below"} and relations(0, -9) == {"above"}
    assert relations(9, 9) == {"right of", "below"}
    assert relations(-9, 9 * math.tan(math.radians(29))) == {"left of"}
    assert relations(-9, 9 * math.tan(math.radians(31))) == {"left of", "below"}
    assert relations(0, 0) == set() == relations(0, 0, half=5)


def test_the_margin_is_a_tenth_of_both_sizes():
    # Of two boxes with sides 10 it is 2, and half the offset must remain: from 4 on.
    assert relations(2, 0, half=5) == set() == relations(4, 0, half=5)
    assert relations(4.01, 0, half=5) == {"right of"}
    assert relations(0, -4.01, half=5) == {"above"}
    # What is left of the offset counts as nothing below a thousandth of a pixel.
    assert relations(0.0009, 0) == set() and relations(0.0011, 0) == {"right of"}


def test_equal_scores_keep_the_detectors_order():
    first, second = objects("cup", 1, colour="purple"), objects("cup", 1, colour="red")
    assert judge(PROMPTS["colors"], first, second)["original"]
    assert not judge(PROMPTS["colors"], second, first)["original"]


def test_what_has_no_colour_is_not_judged_by_it():
    task = geneval.parse(PROMPTS["colors"])
    found = geneval.keep(objects("cup", 1, colour=None), task.tag)
    assert geneval.need_colour(task, found) == [(CLASSES.index("cup"), 0)]
    for verdict in RULES.values():
        with pytest.raises(ValueError, match="the colour of a 'cup' is not known"):
            verdict(task, found)
    assert geneval.need_colour(task, {}) == []
    assert geneval.need_colour(geneval.parse(PROMPTS["single_object"]), found) == []


def test_the_summary_is_the_mean_over_tags():
    tags = ["colors"] * 4 + ["position"] + ["counting"] * 2
    scores = [True, False, False, False, True, 0.0, math.nan]
    means = {"colors": 0.25, "position": 1.0, "counting": 0.0}
    assert geneval.summary(tags, scores) == {**means, "overall": pytest.approx(1.25 / 3)}
    assert math.isnan(geneval.summary(["colors"], [math.nan])["overall"])


def test_nothing_of_jax_is_imported():
    code = """
import sys
from pec_jax.host import colours, detector, geneval
print([name for name in ("jax", "flax", "torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
