"""GenEval as a reward: in a jitted step, with a local server, and with tiny random models."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, SwinConfig
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from pec_jax.config import ConfigError
from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.host import colours, detector, geneval
from pec_jax.perception.networks import Networks
from pec_jax.rewards import geneval as reward_module
from pec_jax.rewards.geneval import GenEvalOptions, Models, flax_colours

CUP = {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}]}
TWO = {"tag": "two_object", "include": [{"class": c, "count": 1} for c in ("cup", "dog")]}
PROMPTS = [Prompt("a photo of a red cup", CUP), Prompt("a photo of a cup and a dog", TWO)]
LABELS = [geneval.CLASSES.index(name) for name in ("cup", "dog")]
NETWORKS = Networks(own=Path(), locate=Path)


def make(**options):
    return REWARDS["geneval"].make(GenEvalOptions(**options), NETWORKS)


class Handler(http.server.BaseHTTPRequestHandler):
    """Sees in every image what `server.found` lists, or answers with what is no JSON."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        found = self.server.found
        body = json.dumps({"detections": [found]}).encode() if found is not None else b"?"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    running.url, running.found = f"http://127.0.0.1:{running.server_port}", []
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def entry(label, **fields):
    return {"label": label, "score": 0.95, "box": [0, 0, 4, 4], "colour": "red", **fields}


def test_scores_of_a_server_in_a_jitted_step(server):
    images = jnp.zeros((2, 3, 8, 8, 3))
    cup, dog = (entry(label) for label in LABELS)
    expected = {  # of the red cup, and of the cup and the dog
        "original": ([1, 1], [1, 0], [0, 1]),
        "strict": ([1, 0], [1, 0], [0, 1]),
        "flow_grpo": ([1, 0], [1, 0.5], [0.5, 1]),
        "fixed": ([1, 0.5], [1, 0.5], [0.5, 1]),
    }
    found = ([cup, dog, dog, dog], [cup], [{**cup, "colour": "blue"}, dog])
    for rule, scores in expected.items():
        reward = make(url=server.url, score=rule)
        rows = reward.prepare({}, PROMPTS)
        score = jax.jit(reward.score)
        for seen, values in zip(found, scores):
            server.found = seen
            result = score({}, images, rows)
            np.testing.assert_allclose(result, np.repeat(np.float32(values), 3).reshape(2, 3))
        assert result.dtype == jnp.float32


def test_a_failure_is_nan(server):
    reward = make(url=server.url)
    rows = reward.prepare({}, PROMPTS)
    server.found = None
    assert np.isnan(reward.score({}, jnp.zeros((2, 3, 8, 8, 3)), rows)).all()


def test_a_colour_that_nobody_names_is_nan_where_it_is_asked_for(server):
    reward = make(url=server.url)
    rows = reward.prepare({}, PROMPTS)
    server.found = [entry(label, colour=None) for label in LABELS]
    scores = np.asarray(reward.score({}, jnp.zeros((2, 3, 8, 8, 3)), rows))
    assert np.isnan(scores[0]).all() and (scores[1] == 1).all()


def test_a_server_that_cannot_be_used_is_refused_at_the_start(server):
    server.found = None
    with pytest.raises(ConfigError, match=r"at http://127.* cannot be used: the answer is not"):
        make(url=server.url).prepare({}, PROMPTS)
    with pytest.raises(ConfigError, match=r"config\.rewards\.geneval\.url is not set"):
        make().prepare({}, PROMPTS)
    with pytest.raises(ConfigError, match="The URL of a reward server is 'localhost'"):
        make(url="localhost").prepare({}, PROMPTS)


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({}, 'the field "tag" is missing'),
        ({**CUP, "include": [{"class": "mug", "count": 1}]}, "unknown class 'mug'"),
    ],
)
def test_prompts_without_usable_metadata_are_refused(metadata, message):
    with pytest.raises(ConfigError, match=f"and those of 'a mug' cannot be used: .*{message}"):
        make(url="http://127.0.0.1:9").prepare({}, [*PROMPTS, Prompt("a mug", metadata)])


def test_a_step_can_be_compiled_without_a_server_or_metadata():
    shapes = make().input_shapes(5)
    assert shapes.shape[0] == 5 and shapes.dtype == np.uint8
    images = jax.ShapeDtypeStruct((5, 2, 8, 8, 3), jnp.float32)
    rows = jax.ShapeDtypeStruct(shapes.shape, shapes.dtype)
    assert jax.eval_shape(make().score, {}, images, rows).shape == (5, 2)


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory):
    """Random weights, and the tokenizer of an encoder that comes with the package."""
    root = tmp_path_factory.mktemp("models") / "clip"
    source = SHAPES_DIRECTORY / "encoders" / "clip"
    shutil.copytree(source, root, ignore=shutil.ignore_patterns("*.safetensors"))
    stored = json.loads((root / "tokenizer_config.json").read_text())
    (root / "tokenizer_config.json").write_text(json.dumps({**stored, "model_max_length": 77}))
    stored = json.loads((root / "preprocessor_config.json").read_text())
    side = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    normalisation = {"image_mean": colours.MEAN.tolist(), "image_std": colours.STD.tolist()}
    stored = {**stored, **side, **normalisation}
    (root / "preprocessor_config.json").write_text(json.dumps(stored))
    ids = json.loads((source / "config.json").read_text())["text_config"]
    ids = {name: ids[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    shared = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    vision = {**shared, "image_size": 32, "patch_size": 8}
    text = {**shared, **ids, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(root)
    return root


def test_colours_in_jax_are_those_in_torch(clip_directory):
    networks = Networks(own=clip_directory.parent, locate=Path)
    encoder = networks.encoder("clip", "")
    in_jax = flax_colours(encoder, networks.variables[encoder.network], side=32)
    in_torch = colours.torch_classifier(clip_directory)
    rng = np.random.default_rng(0)
    crops = []
    for _ in range(60):
        colour, shape = rng.integers(0, 256, 3), (*rng.integers(1, 60, 2), 3)
        crops.append(np.uint8(np.clip(colour + rng.normal(0, 40, shape), 0, 255)))
    names = [str(name) for name in rng.choice(["cup", "tv remote", "computer keyboard"], 60)]
    found = in_torch(crops, names)
    assert in_jax(crops, names) == found
    assert len(set(found)) > 3 and set(found) <= set(geneval.COLOURS)


@pytest.fixture(scope="module")
def detector_directory(tmp_path_factory):
    """Random weights whose classes are cups and dogs, surely."""
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = {"depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4, "out_features": stages}
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(embed_dim=8, **swin),
        num_labels=80,
        num_queries=3,
        **sizes,
        **layers,
    )
    model = Mask2Former(config)
    with torch.no_grad():
        model.class_predictor.bias -= 20
        model.class_predictor.bias[LABELS] = 0.0
        model.class_predictor.weight *= 20
    root = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(root)
    return root


def test_detector_and_colours_in_this_process(detector_directory, clip_directory, monkeypatch):
    monkeypatch.setattr(detector, "LONG_SIDE", 133)
    monkeypatch.setattr(detector, "SHORT_SIDE", 64)
    options = {"detector": "in_process", "model": str(detector_directory)}
    reward = make(**options, clip=str(clip_directory), score="flow_grpo")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 40, 3), dtype=np.uint8)
    rows = reward.prepare({}, PROMPTS)
    scores = jax.jit(reward.score)({}, images / np.float32(255), rows)
    # The same, step by step.
    detect = detector.in_process(detector_directory)
    classify = colours.torch_classifier(clip_directory)
    for p, prompt in enumerate(PROMPTS):
        task = geneval.parse(prompt.metadata)
        for k, found in enumerate(detect(images[p])):
            kept = geneval.keep(found, task.tag)
            assert sum(len(objects) for objects in kept.values()) > 0
            kept = colours.name_colours(images[p, k], task, kept, classify)
            assert scores[p, k] == pytest.approx(geneval.flow_grpo(task, kept), abs=1e-6)


def test_hub_ids_are_pinned_and_located(monkeypatch):
    asked = []

    def locate(name):
        asked.append(name)
        raise FileNotFoundError(name)

    networks = Networks(own=Path(), locate=locate)
    reward = REWARDS["geneval"].make(GenEvalOptions(detector="in_process"), networks)
    assert not asked  # compiling needs no files
    with pytest.raises(FileNotFoundError):
        reward.prepare({}, PROMPTS)
    assert asked == [reward_module.MASK2FORMER] and "@" in reward_module.MASK2FORMER


def test_images_are_judged_one_by_one():
    """Each by its own prompt and its own detections."""
    found = [
        [geneval.Detection(LABELS[0], 0.9, (0.0, 0.0, 2.0, 2.0), colour)] * n
        for n, colour in ((1, "red"), (1, "blue"), (0, None))
    ]
    models = Models(lambda images: [*found, None])
    images = np.zeros((4, 4, 4, 3), np.uint8)
    scores = reward_module.scores(models, "strict", images, PROMPTS[:1] * 4)
    np.testing.assert_array_equal(scores, [1, 0, 0, np.nan])
    assert scores.dtype == np.float32
