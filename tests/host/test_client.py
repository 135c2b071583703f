"""The client against a real server on the loopback interface that misbehaves in every known way."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pec_jax.config import ConfigError
from pec_jax.host import client
from pec_jax.host.client import Failure, Options, get, post

KEY = "sk-secret-0123456789"


class Handler(BaseHTTPRequestHandler):
    """The path says how to misbehave; answers repeat the question."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.answer({"path": self.path})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        state = self.server.state
        with state["lock"]:
            seen = state["seen"][body] = state["seen"].get(body, 0) + 1
            state["requests"].append((self.path, dict(self.headers)))
            state["clients"].add(self.client_address)
            state["now"] += 1
            state["most"] = max(state["most"], state["now"])
        try:
            getattr(self, self.path.strip("/"))(json.loads(body), seen)
        except OSError:  # the client hung up, as it should
            self.close_connection = True
        finally:
            with state["lock"]:
                state["now"] -= 1

    def answer(self, content, status=200, headers=(), kind="application/json"):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind), ("Content-Length", str(len(body))), *headers
        ):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def ok(self, question, seen):
        self.answer({"got": question})

    def slow(self, question, seen):
        time.sleep(0.1)
        self.ok(question, seen)

    def busy(self, question, seen):
        if seen == 1:
            return self.answer({}, 429, [("Retry-After", "1")])
        self.ok(question, seen)

    def flaky(self, question, seen):
        if seen <= 2:
            return self.answer({"error": "out of memory"}, 500)
        self.ok(question, seen)

    def down(self, question, seen):
        self.answer({"error": "out of memory"}, 500)

    def odd(self, question, seen):
        """Even questions are answered, odd ones refused."""
        self.answer({"got": question} if question % 2 == 0 else {}, 200 + question % 2 * 222)

    def hang(self, question, seen):
        self.server.state["stop"].wait(60)

    def malformed(self, question, seen):
        self.answer(b'{"got": 1')

    def deep(self, question, seen):
        self.answer(b"[" * 200_000)

    def latin(self, question, seen):
        self.answer('{"got": "ü"}'.encode("latin-1"))

    def nothing(self, question, seen):
        self.answer(b"")

    def html(self, question, seen):
        self.answer({"got": question}, kind="text/html; charset=utf-8")

    def huge(self, question, seen):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(2**30))
        self.end_headers()
        self.pour(b" " * 2**16, 2**14)

    def endless(self, question, seen):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        self.pour(b" " * 2**16, 2**14)

    def bomb(self, question, seen):
        """A gigabyte of spaces in a megabyte of gzip."""
        packer = zlib.compressobj(1, wbits=31)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(2**10):
            self.pour(packer.compress(b" " * 2**20), 1)

    def pour(self, block, times):
        for _ in range(times):
            self.wfile.write(block)
            self.server.state["poured"] += len(block)

    def trickle(self, question, seen):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.drip(b" " * 1000)

    def trickle_header(self, question, seen):
        self.wfile.flush()
        self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000)

    def drip(self, data):
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.state["stop"].wait(0.05):
                return

    def hang_up(self, question, seen):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def noise(self, question, seen):
        self.wfile.write(b"\x00\x01 this is not HTTP\r\n\r\n")
        self.close_connection = True

    def redirect(self, question, seen):
        self.answer({}, 307, [("Location", "/ok")])

    def echo(self, question, seen):
        """An error that repeats what it was sent, the API key with it."""
        self.answer({"error": f"bad\n\x1b[31m header {self.headers['Authorization']}"}, 401)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Connections that break are what is tested."""


@pytest.fixture
def server():
    """A server of its own for each test: `.url`, and `.state` of what it has seen."""
    server = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.state = {
        "lock": threading.Lock(), "stop": threading.Event(), "seen": {}, "requests": [],
        "clients": set(), "poured": 0, "now": 0, "most": 0,
    }  # fmt: skip
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.state["stop"].set()
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    """Back-off in milliseconds; the longest wait between tries is two seconds."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(client, "LONGEST_WAIT", 2.0)


def options(server, **changes):
    return Options(**{"url": server.url, "timeout": 5.0, "tries": 3, "concurrency": 4, **changes})


def seconds(function):
    """(what it returns, how long it took)."""
    start = time.monotonic()
    result = function()
    return result, time.monotonic() - start


def test_answers_come_in_the_order_of_the_questions(server):
    assert post(options(server), "/ok", range(50)) == [{"got": i} for i in range(50)]
    assert get(options(server), "/health") == {"path": "/health"}
    assert post(options(server), "/ok", []) == []


def test_questions_are_asked_at_once_but_not_more_than_allowed(server):
    asked = options(server, concurrency=8)
    post(asked, "/ok", [0])
    answers, time_taken = seconds(lambda: post(asked, "/slow", range(32)))
    assert answers == [{"got": i} for i in range(32)]
    assert time_taken < 32 * 0.1 / 2  # 0.4 s on a machine with nothing else to do
    assert server.state["most"] == 8


def test_connections_are_reused_between_calls(server):
    for _ in range(5):
        post(options(server, concurrency=2), "/ok", range(10))
    assert len(server.state["clients"]) <= 2


def test_calls_from_several_threads_share_the_limit(server):
    asked, found = options(server, concurrency=3), {}

    def call(name):
        found[name] = post(asked, "/slow", [[name, i] for i in range(5)])

    threads = [threading.Thread(target=call, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {n: [{"got": [n, i]} for i in range(5)] for n in range(4)}
    assert server.state["most"] == 3


def test_payloads_are_made_while_earlier_ones_are_under_way(server):
    ahead = []

    def payloads():
        for i in range(20):
            ahead.append(i - len(server.state["seen"]))
            yield i

    post(options(server, concurrency=2), "/slow", payloads())
    assert max(ahead) <= 3  # two in flight, one waiting for its turn


def test_retry_after_is_honoured(server):
    answers, time_taken = seconds(lambda: post(options(server), "/busy", [1, 2]))
    assert answers == [{"got": 1}, {"got": 2}]
    assert 1.0 <= time_taken < 3.0


def test_server_errors_are_asked_again(server):
    assert post(options(server), "/flaky", [1, 2, 3]) == [{"got": 1}, {"got": 2}, {"got": 3}]
    assert set(server.state["seen"].values()) == {3}


def test_a_server_that_stays_down_is_a_failure_after_all_tries(server):
    (answer,) = post(options(server), "/down", [1])
    assert answer == Failure("HTTP 500, in each of 3 tries", unavailable=True)
    assert server.state["seen"] == {b"1": 3}


def test_other_client_errors_are_not_asked_again_and_leave_the_rest_alone(server):
    answers = post(options(server), "/odd", range(8))
    assert answers[::2] == [{"got": i} for i in range(0, 8, 2)]
    assert answers[1::2] == [Failure("HTTP 422: {}")] * 4
    assert set(server.state["seen"].values()) == {1}


@pytest.mark.parametrize("path", ["/hang", "/trickle", "/trickle_header"])
def test_the_deadline_holds_over_the_whole_try(server, path):
    asked = options(server, timeout=0.5, tries=2)
    (answer,), time_taken = seconds(lambda: post(asked, path, [1]))
    assert answer == Failure("no complete answer within 0.5 s, in each of 2 tries", True)
    assert 1.0 <= time_taken < 2.0


def test_a_dead_server_costs_the_time_of_one_question(server):
    asked = options(server, timeout=0.5, tries=2, concurrency=4)
    answers, time_taken = seconds(lambda: post(asked, "/hang", range(40)))
    assert len(answers) == 40 and all(answer.unavailable for answer in answers)
    assert answers[-1].reason == "4 requests in a row had failed already"
    assert time_taken < 2.0  # three tries of half a second, not twenty
    assert post(asked, "/ok", [1]) == [{"got": 1}]  # the next call tries again


@pytest.mark.parametrize(
    "path, reason",
    [
        ("/malformed", "the answer is not valid JSON"),
        ("/deep", "the answer is not valid JSON"),
        ("/latin", "the answer is not valid JSON"),
        ("/nothing", "the answer is not valid JSON"),
        ("/html", "the answer is of type 'text/html', not JSON"),
        ("/redirect", "HTTP 307, a redirect, which is not followed: give the final URL"),
    ],
)
def test_a_bad_answer_is_a_failure_and_not_asked_again(server, path, reason):
    assert post(options(server), path, [1]) == [Failure(reason)]
    assert [request[0] for request in server.state["requests"]] == [path]


@pytest.mark.parametrize("path", ["/huge", "/endless", "/bomb"])
def test_an_answer_without_end_is_cut_off(server, path):
    asked = options(server, max_bytes=2**20, timeout=20.0)
    tracemalloc.start()
    try:
        (answer,), time_taken = seconds(lambda: post(asked, path, [1]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer == Failure("the answer is longer than 1048576 bytes")
    assert peak < 16 * 2**20 and time_taken < 5.0
    assert server.state["poured"] < 64 * 2**20  # what fits in the buffers of sockets


@pytest.mark.parametrize("path", ["/hang_up", "/noise"])
def test_a_broken_connection_is_asked_again(server, path):
    (answer,) = post(options(server), path, [1])
    assert "the connection broke" in answer.reason and answer.unavailable
    assert server.state["seen"] == {b"1": 3}


def test_nobody_there_is_a_failure():
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        asked = Options(url=f"http://127.0.0.1:{taken.getsockname()[1]}", timeout=5.0)
        answers, time_taken = seconds(lambda: [*post(asked, "/ok", [1, 2]), get(asked, "/health")])
    reason = "no connection to the server, in each of 3 tries"
    assert answers == [Failure(reason, unavailable=True)] * 3
    assert time_taken < 2.0


def test_the_key_is_sent_and_told_nobody(server, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    caplog.set_level(logging.DEBUG)
    asked = options(server, key_variable="JUDGE_KEY", timeout=0.3)
    assert post(asked, "/ok", [1]) == [{"got": 1}]
    assert server.state["requests"][0][1]["Authorization"] == f"Bearer {KEY}"
    paths = ("/echo", "/down", "/hang", "/redirect", "/hang_up", "/html")
    answers = [post(asked, path, [2])[0] for path in paths]
    assert all(isinstance(answer, Failure) for answer in answers)
    assert answers[0].reason.startswith("HTTP 401: ") and "Bearer ***" in answers[0].reason
    assert answers[0].reason.isprintable()
    assert KEY not in repr(answers) + repr(asked) + caplog.text


def test_no_key_is_sent_unasked(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    post(options(server), "/ok", [1])
    assert "Authorization" not in server.state["requests"][0][1]


@pytest.mark.parametrize("value", [None, "", "a\nb", "schlüssel", "a\x7f"])
def test_a_key_that_cannot_be_sent_is_a_failure_without_its_value(server, monkeypatch, value):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    (answer,) = post(options(server, key_variable="JUDGE_KEY"), "/ok", [1])
    assert "JUDGE_KEY" in answer.reason and (not value or value not in answer.reason)
    assert not server.state["requests"]


def test_a_proxy_in_the_environment_does_not_catch_the_loopback(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert post(options(server), "/ok", [1]) == [{"got": 1}]


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host", "http://", "http://host:port", "http://host:99999",
     "http://host/?q=1", "http://host/#a", "http://ho st", "http://[::1", "file:///etc/passwd"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError, match=r"must be http://HOST:PORT or https://HOST\."):
        Options(url=url)


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="belongs in the environment") as caught:
        Options(url=f"http://me:{KEY}@host:8000")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "header, low, high",
    [("3", 3, 3), ("0", 0, 0), ("9" * 400, 1e6, 1e9), ("soon", 0, 0), ("-5", 0, 0), ("", 0, 0),
     (formatdate(0, usegmt=True), 0, 0), ("Wed, 21 Oct 2015 07:28:00", 0, 0)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(header, low, high):
    assert low <= client._seconds(header) <= high
    assert 90 <= client._seconds(formatdate(time.time() + 100, usegmt=True)) <= 100


def test_waits_double_and_are_bounded(monkeypatch):
    monkeypatch.undo()  # the real waits
    for number in range(1, 12):
        full = min(0.5 * 2 ** (number - 1), 8.0)
        waits = [client._wait(number, "") for _ in range(50)]
        assert full / 2 <= min(waits) <= max(waits) <= full
        assert client._wait(number, "100000") == 30.0


def test_it_works_without_jax():
    code = (
        "import sys; from pec_jax.host import client, judges, protocol; "
        "print(sorted({'jax', 'flax', 'torch', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
