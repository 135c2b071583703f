"""The example of a reward server: it runs as its docstring says, and answers what it should."""

from __future__ import annotations

import ast
import io
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pec_jax.host import client, protocol

FILE = Path(__file__).parents[2] / "launch" / "reward_server.py"


@pytest.fixture(scope="module")
def url():
    """The address of a server that runs meanwhile."""
    process = subprocess.Popen(
        [sys.executable, FILE, "--port=0"], stdout=subprocess.PIPE, text=True
    )
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(10)
    process.stdout.close()


def png(level, size=(5, 7)):
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def ask(url, body, path="/score"):
    """(status, decoded answer) of a POST by another client than ours."""
    request = urllib.request.Request(url + path, data=body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_speaks_the_protocol(url):
    options = client.Options(url=url)
    assert protocol.read_health(client.get(options, protocol.HEALTH)) == "compressibility"
    images = [png(0), b"no PNG", png(200, (64, 64))]
    payload = protocol.request(images, ["a", "b", "c"], [{}, {}, {}])
    (answer,) = client.post(options, protocol.SCORE, [payload])
    first, second, third = protocol.read_scores(answer, 3)
    assert (first, third) == (-len(images[0]) / 35, -len(images[2]) / 64**2)
    assert isinstance(second, client.Failure)
    assert ask(url, json.dumps(payload).encode()) == (200, answer)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"3", b"{}", b"\xff", json.dumps({"version": 1}).encode(),
     json.dumps(protocol.request([b""], ["a"], [{}]) | {"version": 2}).encode(),
     json.dumps(protocol.request([b""], ["a"], [{}]) | {"prompts": []}).encode(),
     json.dumps(protocol.request([b""], ["a"], [{}]) | {"images": ["%"]}).encode(),
     json.dumps(protocol.request([b""], ["a"], [{}]) | {"images": 1}).encode()],
)  # fmt: skip
def test_another_request_is_refused_with_a_reason(url, body):
    status, answer = ask(url, body)
    assert status == 400 and answer["error"]


def test_another_path_is_refused(url):
    assert ask(url, b"{}", "/other")[0] == 400
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(url + "/other", timeout=10)


def test_a_body_that_is_too_large_is_refused_unread(url):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000000\r\n\r\n"
        )
        received = b""
        while piece := connection.recv(4096):
            received += piece
    assert received.startswith(b"HTTP/1.1 400 ")


def test_it_needs_the_standard_library_only():
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert modules <= sys.stdlib_module_names
