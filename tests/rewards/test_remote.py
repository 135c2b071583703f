"""Rewards over HTTP, under jit: numbers of the right images, and servers that are not there."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from PIL import Image

from pec_jax.config import ConfigError
from pec_jax.config.fields import build
from pec_jax.config.registry import REWARDS
from pec_jax.data.prompts import Prompt
from pec_jax.host import client

SERVER = Path(__file__).parents[2] / "launch" / "reward_server.py"
PROMPTS = [Prompt("a red cat"), Prompt("ein großer Hund", {"tag": "colors"}), Prompt("x" * 300)]
LEVELS = np.array([[0, 17], [34, 51], [255, 128]])  # of three groups of two images


def reward(name, **fields):
    """The reward of a section with these fields."""
    definition = REWARDS[name]
    return definition.make(build(definition.options, fields, f"config.rewards.{name}"), None)


def images(levels, size=8):
    """[P, K, size, size, 3] fp32, each of one grey level."""
    return jnp.broadcast_to((levels / 255)[..., None, None, None], (*levels.shape, size, size, 3))


def score(made, pictures=None, prompts=PROMPTS):
    """Scores under jit [P, K]."""
    pictures = images(LEVELS) if pictures is None else pictures
    return np.asarray(jax.jit(made.score)({}, pictures, made.prepare({}, prompts)))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)


def start(code):
    """(process, address) of a server that prints its address."""
    process = subprocess.Popen([sys.executable, *code], stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def stop(process):
    process.kill()
    process.wait(10)
    process.stdout.close()


@pytest.fixture(scope="module")
def example():
    """The address of launch/reward_server.py."""
    process, url = start([SERVER, "--port=0"])
    yield url
    stop(process)


def compressed_size(pixels):
    """Bytes of the PNG of an image, as the documentation says it is sent."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.tell()


def test_the_example_server_gives_the_numbers(example):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 16, 24, 3), np.uint8)
    pixels[1, 1] = 7  # a plain image
    expected = [[-compressed_size(image) / (16 * 24) for image in group] for group in pixels]
    for batch in (1, 4, 100):
        made = reward("remote", url=example, batch=batch)
        found = score(made, jnp.asarray(pixels, jnp.float32) / 255)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert found.dtype == np.float32 and made.name == "remote"
    assert found[1, 1] == found.max()


DIES = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("server", sys.argv[1])
server = importlib.util.module_from_spec(spec)
spec.loader.exec_module(server)
judged = 0

def judge(images, prompts, metadata):
    global judged
    if judged == 3:
        os._exit(1)
    judged += 1
    return [float(len(prompts[0]))]

server.judge = judge
found = server.ThreadingHTTPServer(("127.0.0.1", 0), server.Handler)
print(f"http://127.0.0.1:{found.server_port}", flush=True)
found.serve_forever()
"""


def test_a_server_that_dies_leaves_nan_for_the_rest():
    process, url = start(["-c", DIES, str(SERVER)])
    made = reward("remote", url=url, batch=1, concurrency=1, timeout=5.0)
    try:
        rows = made.prepare({}, PROMPTS)
        begun = time.monotonic()
        found = np.asarray(jax.jit(made.score)({}, images(LEVELS), rows))
        np.testing.assert_array_equal(found, [[9, 9], [15, np.nan], [np.nan, np.nan]])
        again = np.asarray(jax.jit(made.score)({}, images(LEVELS), rows))
        assert np.isnan(again).all() and time.monotonic() - begun < 10
    finally:
        stop(process)


class Chat(BaseHTTPRequestHandler):
    """A model that sees the mean level of an image and answers as the test wants."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.server.asked.append(self.path)
        self.answer(self.server.listing)

    def do_POST(self):
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, payload, self.headers.get("Authorization")))
        parts = payload["messages"][-1]["content"]
        data = next(p["image_url"]["url"] for p in parts if p["type"] == "image_url")
        file = io.BytesIO(base64.b64decode(data.partition("base64,")[2], validate=True))
        with Image.open(file) as image:
            seen = (image.format, float(np.asarray(image.convert("RGB")).mean()))
        question = next(p["text"] for p in reversed(parts) if p["type"] == "text")
        self.answer({"choices": [self.server.reply(seen, question)]})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def chat():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.asked, server.listing = [], {"object": "list", "data": [{"id": "UnifiedReward"}]}
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_unified_reward_judges_each_image_with_its_prompt(chat, suffix, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-1")

    def reply(seen, question):
        caption = question.rpartition("Text Caption: [")[2].removesuffix("]")
        axes = (1 + 4 * seen[1] / 255, 1 + len(caption) / 100, 3)
        names = ("Alignment", "Coherence", "Style")
        text = "\n".join(f"{n} Score (1-5): {a!r}" for n, a in zip(names, axes))
        return {"message": {"content": text}}

    chat.reply = reply
    found = score(reward("unified_reward", url=chat.url + suffix, key_variable="JUDGE_KEY"))
    lengths = np.array([len(prompt.text) for prompt in PROMPTS])[:, None] / 100
    expected = ((1 + 4 * LEVELS / 255) + (1 + lengths) + 3) / 3
    np.testing.assert_allclose(found, (expected - 1) / 4, rtol=1e-5)
    posts = [item for item in chat.asked if isinstance(item, tuple)]
    assert {(path, key) for path, _, key in posts} == {("/v1/chat/completions", "Bearer sk-1")}
    assert {payload["model"] for _, payload, _ in posts} == {"UnifiedReward"}


@pytest.mark.parametrize("image_format", ["png", "jpeg"])
def test_the_yes_no_judge_asks_its_question_of_the_format_chosen(chat, image_format):
    formats = set()

    def reply(seen, question):
        formats.add(seen[0])
        yes = np.log((seen[1] + 1) / 300 + 1e-9)
        top = [{"token": "Yes", "logprob": yes}, {"token": " no", "logprob": np.log(0.1)}]
        if question != "Is ein großer Hund here?":
            return {"message": {"content": "Yes"}, "logprobs": None}
        return {"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}

    chat.reply = reply
    fields = {"model": "UnifiedReward", "question": "Is {prompt} here?"}
    found = score(reward("vlm_judge", url=chat.url, image_format=image_format, **fields))
    yes = (LEVELS[1] + 1) / 300
    np.testing.assert_allclose(found[1], yes / (yes + 0.1), rtol=1e-4)
    assert np.isnan(found[[0, 2]]).all() and formats == {image_format.upper()}


def test_a_failure_is_nan_and_said_once_a_call(chat, monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    chat.reply = lambda seen, question: {
        "message": {"content": "Final Score: 3" if seen[1] != 51 else "I had rather not."}
    }
    found = score(reward("unified_reward", url=chat.url, judge="score"))
    np.testing.assert_array_equal(found, np.where(LEVELS == 51, np.nan, 3.0))
    assert said == [
        "unified_reward: 1 of 6 images could not be judged; "
        "1 because the answer has no 'Final Score:' with a number."
    ]


def test_the_server_is_checked_once(chat):
    made = reward("unified_reward", url=chat.url)
    for _ in range(3):
        made.prepare({}, PROMPTS)
    assert chat.asked == ["/v1/models"]


@pytest.mark.parametrize("name", ["remote", "unified_reward", "vlm_judge"])
def test_a_run_does_not_start_without_its_server(name):
    with pytest.raises(ConfigError, match=rf"config\.rewards\.{name}\.url is not set"):
        reward(name).prepare({}, PROMPTS)
    with pytest.raises(ConfigError, match="must be http://HOST:PORT"):
        reward(name, url="localhost:8000").prepare({}, PROMPTS)
    with pytest.raises(ConfigError, match=f"{name} at http://127.0.0.1:9 cannot be used: no conn"):
        reward(name, url="http://127.0.0.1:9").prepare({}, PROMPTS)


def test_a_run_does_not_start_with_another_server_or_model(chat):
    with pytest.raises(ConfigError, match="GET /health does not answer with a name"):
        reward("remote", url=chat.url).prepare({}, PROMPTS)
    with pytest.raises(ConfigError, match=r"it has no model 'Qwen' \(but UnifiedReward\)"):
        reward("vlm_judge", url=chat.url, model="Qwen").prepare({}, PROMPTS)
    with pytest.raises(ConfigError, match="variable NO_SUCH_KEY is not set"):
        reward("unified_reward", url=chat.url, key_variable="NO_SUCH_KEY").prepare({}, PROMPTS)


@pytest.mark.parametrize("name", ["remote", "unified_reward", "vlm_judge"])
def test_a_step_can_be_compiled_without_the_server(name):
    made = reward(name)
    inputs = made.input_shapes(3)
    assert inputs.shape[0] == 3 and inputs.dtype == np.uint8
    shapes = jax.ShapeDtypeStruct((3, 2, 8, 8, 3), jnp.float32)
    assert jax.eval_shape(made.score, {}, shapes, inputs).shape == (3, 2)


@pytest.mark.parametrize("fields", [{"judge": "yes_no"}, {"timeout": 0}, {"tries": 0}])
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError):
        reward("unified_reward", **fields)
