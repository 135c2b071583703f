"""Detectors: Mask2Former's outputs against loops, a tiny one end to end, and bad servers."""

from __future__ import annotations

import base64
import http.server
import io
import json
import logging
import math
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, Mask2FormerConfig, SwinConfig
from transformers import Mask2FormerForUniversalSegmentation as Mask2Former

from pec_jax.config import ConfigError
from pec_jax.errors import FileError
from pec_jax.host import client, detector
from pec_jax.host.geneval import Detection

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "height, width, resized, padded",
    [
        (512, 512, (800, 800), (800, 800)),
        (1024, 1024, (800, 800), (800, 800)),
        (480, 640, (800, 1067), (800, 1088)),
        (300, 600, (667, 1333), (672, 1344)),
        (600, 300, (1333, 667), (1344, 672)),
    ],
)
def test_sizes_are_as_large_as_fits(height, width, resized, padded):
    assert detector.sizes_of(height, width) == detector.Sizes((height, width), resized, padded)


def test_preprocessing_resizes_normalises_and_pads():
    image = RNG.integers(0, 256, (30, 60, 3), dtype=np.uint8)
    sizes = detector.sizes_of(30, 60)
    pixels = detector.preprocess(image, sizes)
    assert pixels.shape == (3, 672, 1344) and pixels.dtype == np.float32
    assert not pixels[:, 667:].any() and not pixels[:, :, 1333:].any()
    # Enlarged images are interpolated between the four nearest centres, in whole levels.
    rows, columns = bilinear(30, 667), bilinear(60, 1333)
    levels = np.moveaxis(rows @ np.moveaxis(image.astype(float), 2, 0) @ columns.T, 0, 2)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    found = (pixels[:, :667, :1333].transpose(1, 2, 0) * std + mean) * 255
    assert np.abs(found - levels).max() < 1.01
    # The first channel is red.
    red = np.broadcast_to(np.uint8([255, 0, 0]), (30, 60, 3))
    assert detector.preprocess(red, sizes)[:, 0, 0] == pytest.approx((np.eye(3)[0] - mean) / std)


def bilinear(old, new):
    """Matrix [new, old] of linear interpolation at pixel centres, the borders repeated."""
    matrix = np.zeros((new, old))
    for i in range(new):
        x = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(x), old - 2)
        matrix[i, low], matrix[i, low + 1] = low + 1 - x, x - low
    return matrix


def by_loops(class_logits, mask_logits, sizes):
    """The definition, in float64: resize, crop, resize, and all pairs of a query and a class."""
    (height, width), (h, w) = sizes.original, sizes.resized
    up = [bilinear(n, m) for n, m in zip(mask_logits.shape[1:], sizes.padded)]
    down = [bilinear(n, m) for n, m in zip((h, w), (height, width))]
    pairs = []
    for query, logits in enumerate(class_logits):
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        padded = up[0] @ mask_logits[query] @ up[1].T
        mask = down[0] @ padded[:h, :w] @ down[1].T
        total, pixels = 0.0, []
        for y in range(height):
            for x in range(width):
                if mask[y, x] > 0:
                    total += 1 / (1 + math.exp(-mask[y, x]))
                    pixels.append((x, y))
        for label, probability in enumerate(probabilities[:-1]):
            pairs.append((probability, label, total / (len(pixels) + 1e-6), pixels))
    pairs.sort(key=lambda pair: -pair[0])
    found = []
    for probability, label, quality, pixels in pairs[:100]:
        if probability * quality > 0.3:
            xs, ys = zip(*pixels)
            box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            found.append((probability * quality, label, box, len(pixels)))
    return sorted(found, key=lambda one: -one[0])


def random_outputs(rng, queries, classes):
    """Logits of which several queries are sure enough, some of two classes; and sizes."""
    class_logits = rng.normal(size=(queries, classes + 1))
    for logits in class_logits[: queries * 2 // 3]:
        logits[rng.integers(classes, size=2)] += rng.uniform(3, 9)
    # Blobs: smooth masks, a few of which are empty.
    centres = rng.uniform(0, 1, (queries, 2, 1, 1))
    y, x = np.linspace(0, 1, 6)[:, None], np.linspace(0, 1, 8)[None]
    distance = np.hypot(y - centres[:, 0], x - centres[:, 1])
    mask_logits = 20 * (rng.uniform(-0.05, 0.6, (queries, 1, 1)) - distance)
    return class_logits, mask_logits, detector.Sizes((25, 30), (22, 31), (24, 32))


@pytest.mark.parametrize("seed", range(5))
def test_outputs_are_read_as_by_loops(seed):
    rng = np.random.default_rng(seed)
    class_logits, mask_logits, sizes = random_outputs(rng, 12, 80)
    found = detector.read_outputs(torch.tensor(class_logits), torch.tensor(mask_logits), sizes)
    expected = by_loops(class_logits, mask_logits, sizes)
    assert len(found) == len(expected) > 1
    assert [one.score for one in found] == pytest.approx([e[0] for e in expected], abs=1e-5)
    assert [(one.label, one.box) for one in found] == [(e[1], e[2]) for e in expected]
    assert [int(one.mask.sum()) for one in found] == [e[3] for e in expected]
    assert all(one.mask.shape == (25, 30) and one.colour is None for one in found)


def test_at_most_a_hundred_pairs_are_read():
    class_logits = torch.full((150, 3), -20.0)
    class_logits[:, 0] = torch.linspace(0, 5, 150)
    mask_logits, sizes = torch.full((150, 2, 2), 9.0), detector.Sizes((8, 8), (8, 8), (8, 8))
    assert len(detector.read_outputs(class_logits, mask_logits, sizes)) == 100


def test_nothing_sure_enough_is_nothing_found():
    class_logits, mask_logits, sizes = random_outputs(RNG, 12, 80)
    nothing = torch.tensor(class_logits) * 0
    assert detector.read_outputs(nothing, torch.tensor(mask_logits), sizes) == []
    empty = -torch.ones(mask_logits.shape)
    assert detector.read_outputs(torch.tensor(class_logits), empty, sizes) == []


def tiny_mask2former(classes=80):
    """Random weights; sure of its classes, or there would be nothing to see."""
    torch.manual_seed(0)
    swin = SwinConfig(
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    names = ("feature_size", "mask_feature_size", "hidden_dim")
    config = Mask2FormerConfig(
        backbone_config=swin,
        num_labels=classes,
        num_queries=10,
        **dict.fromkeys(names, 32),
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
    )
    model = Mask2Former(config).eval()
    with torch.no_grad():
        model.class_predictor.weight *= 40
    return model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("mask2former")
    tiny_mask2former().save_pretrained(root)
    return root


@pytest.fixture
def small_sides(monkeypatch):
    """So that the network sees 133 x 80 pixels at most."""
    monkeypatch.setattr(detector, "LONG_SIDE", 133)
    monkeypatch.setattr(detector, "SHORT_SIDE", 80)


def test_mask2former_in_this_process(directory, small_sides):
    images = RNG.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    images[1] = 0
    found = detector.in_process(directory)(images)
    assert len(found) == 3 and all(found)
    for one in found:
        scores = [d.score for d in one]
        assert scores == sorted(scores, reverse=True) and 0.3 < scores[-1] <= scores[0] <= 1
        for d in one:
            x0, y0, x1, y1 = d.box
            assert 0 <= x0 < x1 <= 50 and 0 <= y0 < y1 <= 40 and 0 <= d.label < 80
            assert d.mask.shape == (40, 50) and d.mask.dtype == bool
            assert not d.mask[:, : int(x0)].any() and not d.mask[int(y1) :].any()
    # The same by hand, from the pixels to the loops; and images do not influence each other.
    sizes = detector.sizes_of(40, 50)
    assert sizes.padded == (96, 128)
    pixels = torch.from_numpy(np.stack([detector.preprocess(i, sizes) for i in images[::2]]))
    with torch.no_grad():
        outputs = tiny_mask2former()(pixel_values=pixels)
    logits = outputs.class_queries_logits, outputs.masks_queries_logits
    for one, classes, masks in zip(found[::2], *logits):
        expected = by_loops(np.float64(classes), np.float64(masks), sizes)
        assert [d.label for d in one] == [e[1] for e in expected]
        assert [d.score for d in one] == pytest.approx([e[0] for e in expected], abs=1e-4)


def test_a_detector_of_other_classes_is_refused(tmp_path):
    tiny_mask2former(classes=5).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="a detector of 5 classes, but GenEval needs COCO's 80"):
        detector.in_process(tmp_path)


def test_a_directory_of_something_else_is_refused(tmp_path, directory):
    with pytest.raises(FileError, match="no Mask2Former"):
        detector.in_process(tmp_path)
    side = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPModel(CLIPConfig(text_config=side, vision_config=side)).save_pretrained(tmp_path / "clip")
    with pytest.raises(FileError, match="no Mask2Former"):
        detector.in_process(tmp_path / "clip")
    with pytest.raises(FileError, match="no CLIPModel"):
        detector.load_torch_model("CLIPModel", directory, "cpu")


def test_a_device_that_is_not_there_is_refused(directory):
    with pytest.raises(ConfigError, match="torch has no 'cuda:99' here"):
        detector.in_process(directory, "cuda:99")


def test_without_torch_the_extra_is_named(monkeypatch, directory):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"pip install 'pec_jax\[geneval\]'"):
        detector.in_process(directory)


# Servers.


def to_png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


MASK = np.zeros((6, 8), np.uint8)
MASK[1:4, 2:5] = 255
GOOD = {"label": 15, "score": 0.9, "box": [2, 1, 5, 4.5], "colour": "red", "mask": to_png(MASK)}
BARE = {"label": 0, "score": 0.4, "box": [0, 0, 8, 6]}
IMAGES = RNG.integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as `server.answer` says, (request, number) -> status and body."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.server.answer(request)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A server of this test's own; `ask(answer)` detects in IMAGES while it answers so."""
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()

    def ask(answer, timeout=10.0, max_bytes=detector.MAX_ANSWER):
        running.answer = answer
        url = f"http://127.0.0.1:{running.server_port}/detect"
        options = client.Options(url, timeout=timeout, tries=1, max_bytes=max_bytes)
        return detector.over_http(options)(IMAGES)

    yield ask
    running.shutdown()
    thread.join()
    running.server_close()


def one_list(*entries):
    return json.dumps({"detections": [list(entries)]}).encode()


def decode(request):
    (png,) = request["images"]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_a_server_sees_every_image_and_its_detections_are_taken(server):
    asked = []

    def answer(request):
        index = int(np.flatnonzero([(decode(request) == image).all() for image in IMAGES])[0])
        asked.append((index, request["threshold"]))
        return 200, one_list(*[GOOD, BARE, {**BARE, "score": 0.3}][: index + 1])

    found = server(answer)
    assert sorted(asked) == [(0, 0.3), (1, 0.3), (2, 0.3), (3, 0.3)]
    cat = Detection(15, 0.9, (2.0, 1.0, 5.0, 4.5), "red")
    bare = Detection(0, 0.4, (0.0, 0.0, 8.0, 6.0))
    # What is not above the threshold does not count.
    assert found == [[cat], [cat, bare], [cat, bare], [cat, bare]]
    np.testing.assert_array_equal(found[1][0].mask, MASK > 0)
    assert found[1][1].mask is None


def test_nothing_found_is_not_a_failure(server):
    assert server(lambda request: (200, one_list())) == [[], [], [], []]


def changed(**fields):
    return one_list(GOOD, {**GOOD, **fields})


BAD = {
    "not JSON": b"{",
    "no object": b"[]",
    "no detections": b'{"detection": []}',
    "no list": b'{"detections": {}}',
    "too few lists": b'{"detections": []}',
    "too many lists": b'{"detections": [[], []]}',
    "null for the image": b'{"detections": [null]}',
    "too many": one_list(*[BARE] * 301),
    "a detection that is a list": one_list([1, 2]),
    "no label": one_list({"score": 0.5, "box": [0, 0, 1, 1]}),
    "a label too large": changed(label=80),
    "a negative label": changed(label=-1),
    "a label with a fraction": changed(label=1.0),
    "a true label": changed(label=True),
    "no score": one_list({"label": 1, "box": [0, 0, 1, 1]}),
    "a score above 1": changed(score=1.5),
    "a score that is not a number": changed(score=math.nan),
    "a score as text": changed(score="0.9"),
    "a huge score": changed(score=10**400),
    "three numbers": changed(box=[0, 0, 1]),
    "an infinite box": changed(box=[0, 0, math.inf, 1]),
    "a box of width and height": changed(box=[5, 4, 2, 1]),
    "a box outside": changed(box=[0, 0, 8, 60]),
    "an unknown colour": changed(colour="grey"),
    "a colour that is a list": changed(colour=["red"]),
    "a mask that is not base64": changed(mask="***"),
    "a mask that is a number": changed(mask=3),
    "a mask that is not a PNG": changed(mask=base64.b64encode(b"GIF89a").decode()),
    "a broken PNG": changed(mask=to_png(MASK)[:60]),
    "a mask of another size": changed(mask=to_png(MASK.T.copy())),
    "a mask in colour": changed(mask=to_png(np.zeros((6, 8, 3), np.uint8))),
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_a_bad_answer_leaves_out_its_image_alone(server, body, caplog):
    def answer(request):
        return 200, body if (decode(request) == IMAGES[2]).all() else one_list(BARE)

    with caplog.at_level(logging.WARNING):
        found = server(answer)
    assert [one is None for one in found] == [False, False, True, False]
    assert "failed on 1 of 4 images, first because " in caplog.text


@pytest.mark.parametrize("status", [302, 307, 400, 404, 500])
def test_other_statuses_are_failures(server, status):
    paths = []
    assert server(lambda request: (status, paths.append(1) or one_list(BARE))) == [None] * 4
    assert len(paths) == 4  # a redirect is not followed


def test_a_server_that_hangs_is_a_failure(server):
    release = threading.Event()

    def answer(request):
        release.wait(20)
        return 200, one_list()

    start = time.monotonic()
    try:
        assert server(answer, timeout=0.5) == [None] * 4
    finally:
        release.set()
    assert time.monotonic() - start < 10


def test_a_huge_answer_is_a_failure(server):
    body = one_list(*[BARE] * 100)
    assert server(lambda request: (200, body), max_bytes=len(body)) != [None] * 4
    assert server(lambda request: (200, body), max_bytes=len(body) - 1) == [None] * 4


def test_no_server_is_a_failure():
    options = client.Options("http://127.0.0.1:9", timeout=2.0, tries=1)
    assert detector.over_http(options)(IMAGES) == [None] * 4
