"""The command score: the numbers of a run's own evaluation, other folders, and interruptions."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from pec_jax.config import ConfigError, registry
from pec_jax.config.schema import from_config_dict
from pec_jax.distributed.mesh import active, make_mesh, put_replicated
from pec_jax.errors import RunError
from pec_jax.evaluation import scoring
from pec_jax.inference import score
from pec_jax.rewards import register
from pec_jax.rewards.host import host_reward
from pec_jax.training.build import EVAL_STREAM, build, stream_key
from pec_jax.training.evaluator import Evaluator
from pec_jax.training.metric_writer import save_png, to_picture
from tests.conftest import small_config_dict

REWARDS = ("pickscore", "clip", "attributes", "hps")
SPACES = ("dino", "clip", "pickscore")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The images of an evaluation as files, and what it says of them."""
    root = tmp_path_factory.mktemp("images")
    config = small_config_dict()
    for name in REWARDS:
        config.rewards[name].evaluate = True
    for name in SPACES:
        config.encoders[name].evaluate = True
    config.eval.update({"num_prompts": 3, "groups": 3, "images_per_prompt": 5, "num_steps": 3})
    config = from_config_dict(config)
    mesh = make_mesh(config)
    with active(mesh, config):
        experiment = build(config)
        frozen, params = (put_replicated(t, mesh) for t in (experiment.frozen, experiment.params))
        key = put_replicated(stream_key(config, EVAL_STREAM), mesh)
        evaluator = Evaluator(experiment, key, mesh)
        numbers = evaluator(params, frozen).numbers
        batch = evaluator._batch(experiment.tables["heldout"], 0)
        images = jax.device_get(evaluator._draw(params, frozen, batch, evaluator._keys[0]))
    lines = []
    for prompt, row in zip(experiment.prompts["heldout"], images):
        for image in row:
            name = f"{len(lines):03d}.png"
            save_png(root / name, to_picture(image))
            lines.append(json.dumps({"file": name, "prompt": prompt.text, **prompt.metadata}))
    (root / "images.jsonl").write_text("\n".join(lines))
    return root, numbers


def request(root, **changes):
    values = {"images": root, "prompts": None, "rewards": REWARDS, "spaces": SPACES}
    return score.Request(**values | {"pipeline": "shapes", "batch_size": 4} | changes)


def test_the_numbers_of_the_evaluation_come_back(evaluated, tmp_path):
    root, expected = evaluated
    found = score.run(request(root), tmp_path)
    compared = [name for name in expected if name.startswith(("quality/", "diversity/"))]
    assert len(compared) > 40
    for name in compared:
        # Batches of another size are rounded differently; the reward's own unit is about 1.
        assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5), name
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert len(rows) == 15 and list(rows[0])[:4] == ["file", "prompt", "pickscore", "clip"]
    mean = np.mean([float(row["pickscore"]) for row in rows])
    assert mean == pytest.approx(expected["quality/pickscore"], rel=1e-4)
    summary = {row["metric"]: row for row in csv.DictReader((tmp_path / "summary.csv").open())}
    assert float(summary["diversity/vendi_dino"]["low"]) <= found["diversity/vendi_dino"]
    assert "15 images of 3 prompts, 5 per prompt" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / scoring.FINISHED).exists()


def test_an_interrupted_command_goes_on_where_it_stopped(evaluated, tmp_path, monkeypatch):
    root, _ = evaluated
    one = request(root, rewards=("clip",), spaces=())
    whole = score.run(one, tmp_path / "whole")
    read = scoring.read_images
    calls = []

    def stops(image_set, numbers):
        calls.append(list(numbers))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(image_set, numbers)

    monkeypatch.setattr(scoring, "read_images", stops)
    with pytest.raises(KeyboardInterrupt):
        score.run(one, tmp_path / "cut")
    with pytest.raises(RunError, match="holds unfinished scores of other images"):
        score.run(request(root, rewards=("hps",), spaces=()), tmp_path / "cut")
    damaged = tmp_path / "cut" / scoring.FINISHED / "000001.npz"
    damaged.write_bytes(damaged.read_bytes()[:50])
    again = score.run(one, tmp_path / "cut")
    assert again == whole
    assert calls[3:] == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 12]]
    for name in ("scores.csv", "summary.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_groups_of_different_sizes_and_images_of_different_sizes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(64, 64), (64, 64), (64, 96), (80, 64), (64, 64), (64, 64), (48, 48)]
    lines = []
    for i, (size, prompt) in enumerate(zip(shapes, "aabbbcc")):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file": f"{i}.png", "prompt": prompt}))
    lines.append(json.dumps({"file": "0.png", "prompt": "alone"}))
    (tmp_path / "images.jsonl").write_text("\n".join(lines))
    found = score.run(request(tmp_path, rewards=("clip",), spaces=("dino",)), tmp_path / "out")
    assert {"quality/clip", "diversity/vendi_dino"} <= set(found)
    assert 1.0 <= found["diversity/vendi_dino"] <= 3.0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "8 images of 4 prompts, 1 to 3 per prompt" in text


def test_one_name_with_two_models_has_two_columns(evaluated, tmp_path):
    root, _ = evaluated
    from pec_jax.families.locate import SHAPES_DIRECTORY

    models = [SHAPES_DIRECTORY / "encoders" / name for name in ("clip", "pickscore")]
    rewards = tuple(f"clip:{model},scale={s}" for model, s in zip(models, ("cosine", "score/26")))
    found = score.run(request(root, rewards=rewards, spaces=(), pipeline=None), tmp_path)
    assert {f"quality/clip:{model}" for model in models} <= set(found)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rewards": (), "spaces": ()}, "Nothing to measure"),
        ({"rewards": ("clip",), "pipeline": None}, "--reward=clip names no model"),
        ({"spaces": ("dino", "dino")}, "--space=dino: is given twice"),
        ({"rewards": ("clip,scale",)}, "not of the form FIELD=VALUE"),
        ({"rewards": ("clip,scale=logits",)}, "unknown value 'logits'"),
    ],
)
def test_a_mistake_is_answered_with_its_flag(evaluated, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        score.run(request(evaluated[0], **changes), tmp_path)


def test_a_judge_that_raises_is_told_by_name(evaluated, tmp_path, monkeypatch):
    def judge(images, prompts):
        raise LookupError("no key")

    monkeypatch.setattr(
        registry.REWARDS, "_entries", {name: registry.REWARDS[name] for name in registry.REWARDS}
    )
    register("broken")(lambda options, networks: host_reward("broken", judge))
    with pytest.raises(RunError, match="the reward 'broken' failed on 4 images: LookupError"):
        score.run(request(evaluated[0], rewards=("broken",), spaces=()), tmp_path)


def test_the_command_answers_a_typo_within_a_sentence(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pec_jax.score",
            "--images=nowhere",
            "--reward=attributes",
            "--out=o",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "nowhere: no such directory of images" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "o").exists()
