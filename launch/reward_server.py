"""An example of a reward server: the standard library, and one function to replace.

    python launch/reward_server.py --port=8000
    python -m pec_jax.main --config=... --config.rewards.remote.weight=1 \\
        --config.rewards.remote.url=http://localhost:8000

The reward here is compressibility: minus the bytes of the PNG per pixel, so that plain images score
high. The protocol is described in docs/remote_rewards.md.
"""

import argparse
import base64
import json
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MAX_BYTES = 2**28  # of a request
one_at_a_time = threading.Lock()  # requests come in several threads, most models want one


# Load your own model here, once.


def judge(images: list[bytes], prompts: list[str], metadata: list[dict]) -> list[float | None]:
    """Your own model goes here: one number per image, None where it cannot judge.

    An image is a PNG file; with Pillow: Image.open(io.BytesIO(image)).
    """
    return [compressibility(image) for image in images]


def compressibility(png: bytes) -> float | None:
    """Minus the bytes per pixel."""
    if len(png) < 24 or not png.startswith(b"\x89PNG"):
        return None
    width, height = struct.unpack(">II", png[16:24])
    return -len(png) / (width * height) if width * height else None


class Handler(BaseHTTPRequestHandler):
    """GET /health and POST /score."""

    protocol_version = "HTTP/1.1"  # connections stay open between requests
    disable_nagle_algorithm = True
    timeout = 600  # seconds until an idle connection is closed

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(200, {"name": "compressibility", "version": 1})
        else:
            self.answer(404, {"error": "there are GET /health and POST /score"})

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        if self.path != "/score" or not size.isdecimal() or int(size) > MAX_BYTES:
            self.close_connection = True  # the body stays unread
            return self.answer(400, {"error": f"POST /score with at most {MAX_BYTES} bytes"})
        try:
            request = json.loads(self.rfile.read(int(size)))
            images = [base64.b64decode(image, validate=True) for image in request["images"]]
            prompts, metadata = request["prompts"], request["metadata"]
            if request["version"] != 1 or not len(images) == len(prompts) == len(metadata):
                raise ValueError("another version, or lists of different lengths")
        except (ValueError, TypeError, KeyError) as error:
            return self.answer(400, {"error": f"not a request of version 1: {error!r}"})
        with one_at_a_time:
            scores = judge(images, prompts, metadata)
        self.answer(200, {"scores": scores})

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing per request."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in")
    options = parser.parse_args()
    server = ThreadingHTTPServer((options.host, options.port), Handler)
    print(f"http://{options.host}:{server.server_port}", flush=True)
    server.serve_forever()
