"""JSON over HTTP to a judge on another machine: concurrency, retries, deadlines.

All requests of the process run in one background thread with an asyncio event loop, because only
there one deadline can hold over a whole try: connecting, sending, and however slowly the answer
comes. Functions here may be called from any other thread, and from several at once.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import functools
import ipaddress
import json
import os
import random
import threading
import urllib.parse
from collections.abc import Coroutine, Iterable
from typing import Any

from pec_jax.config.errors import ConfigError

RETRIED = (408, 409, 429)  # and everything from 500 on
FIRST_WAIT, LONGEST_BACK_OFF = 0.5, 8.0  # seconds before a further try; doubled each time
LONGEST_WAIT = 30.0  # seconds; a longer Retry-After is cut to it
ERROR_BYTES = 4096  # of an error's body that are read
ERROR_CHARS = 200  # of an error's body that are quoted

_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Options:
    """How to talk to one server.

    Attributes:
        url: http://HOST:PORT or https://HOST, with or without a path.
        timeout: seconds for one try, from connecting to the last byte of the answer.
        tries: how often a question is asked before it counts as failed, at least 1.
        concurrency: requests in flight at once, in this process.
        max_bytes: of a decoded answer; a longer one is cut off and counts as failed.
        key_variable: environment variable that holds the API key; '' sends none.

    Raises:
        ConfigError: a URL that cannot be used.
    """

    url: str
    timeout: float = 60.0
    tries: int = 3
    concurrency: int = 8
    max_bytes: int = 2**20
    key_variable: str = ""

    def __post_init__(self) -> None:
        _check_url(self.url)


@dataclasses.dataclass(frozen=True)
class Failure:
    """A question without a usable answer.

    Attributes:
        reason: a clause without a full stop; never contains the API key.
        unavailable: all tries were used up, so that another question would hardly fare better.
    """

    reason: str
    unavailable: bool = False


@dataclasses.dataclass(frozen=True)
class _Again:
    """A try that may be repeated."""

    reason: str
    retry_after: str = ""  # the header


@dataclasses.dataclass(frozen=True)
class _Question:
    """One request."""

    method: str
    path: str
    body: bytes | None = None


@dataclasses.dataclass(frozen=True)
class _Server:
    """What is kept between calls with the same options."""

    options: Options
    http: Any  # httpx2.AsyncClient, with its pool of connections
    slots: threading.BoundedSemaphore


@dataclasses.dataclass
class _Streak:
    """Questions of one call that were lost in a row."""

    lost: int = 0


def post(options: Options, path: str, payloads: Iterable[Any]) -> list[Any]:
    """Posts every payload and returns the decoded answers.

    At most `concurrency` requests are in flight at once, over all calls with the same options. The
    next payload is taken from the iterable while earlier ones are under way. A question is asked
    again after 408, 409, 429, 5xx, a broken connection or a timeout. Redirects are not followed,
    since the API key must not travel.

    Time: one question takes at most `tries * timeout + (tries - 1) * LONGEST_WAIT` seconds, and N
    of them ceil(N / concurrency) times that. Once `concurrency` questions in a row have used up all
    their tries, the rest of the call gets no further try: a dead server costs the time of one
    question and one try.

    Args:
        options: of the server.
        path: appended to the URL, such as "/score".
        payloads: N objects that JSON can hold.

    Returns:
        N answers in the order of the payloads: decoded JSON or a `Failure`.

    Raises:
        ConfigError: httpx2 is not installed.
    """
    server, streak = _server(options), _Streak()
    futures = []
    for payload in payloads:
        question = _Question("POST", path, json.dumps(payload).encode())
        server.slots.acquire()
        future = _submit(_ask(server, question, streak))
        future.add_done_callback(lambda _: server.slots.release())
        futures.append(future)
    return [future.result() for future in futures]


def get(options: Options, path: str) -> Any:
    """What a GET answers, decoded, or a `Failure`; as `post` in all else."""
    return _submit(_ask(_server(options), _Question("GET", path), _Streak())).result()


def _check_url(url: str) -> None:
    """Raises ConfigError for what is not an address of a server."""
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise _unusable(repr(url)) from None
    if "@" in parts.netloc:
        # Not quoted, for it may hold a password.
        raise _unusable("one with a user name; an API key belongs in the environment")
    if not usable or parts.query or parts.fragment or url != "".join(url.split()):
        raise _unusable(repr(url))


def _unusable(what: str) -> ConfigError:
    return ConfigError(
        f"The URL of a reward server is {what}; it must be http://HOST:PORT or https://HOST."
    )


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all requests, running in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward servers", daemon=True).start()
    return loop


def _submit(coroutine: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
    with _lock:
        loop = _loop()
    return asyncio.run_coroutine_threadsafe(coroutine, loop)


def _server(options: Options) -> _Server:
    with _lock:
        return _new_server(options)


@functools.cache
def _new_server(options: Options) -> _Server:
    try:
        import httpx2
    except ImportError as error:
        raise ConfigError(
            "Remote rewards need the package httpx2: pip install 'pec_jax[remote]'."
        ) from error
    http = httpx2.AsyncClient(
        timeout=None,  # the deadline of a whole try is ours
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=options.concurrency),
        # A proxy in the environment is not meant for a server on this machine.
        trust_env=not _is_loopback(options.url),
        follow_redirects=False,
    )
    return _Server(options, http, threading.BoundedSemaphore(options.concurrency))


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


async def _ask(server: _Server, question: _Question, streak: _Streak) -> Any:
    """Tries until there is an answer, or a failure that another try would not change."""
    options, key = server.options, _key(server.options)
    if isinstance(key, Failure):
        return key
    outcome: Any = None
    for number in range(options.tries):
        if isinstance(outcome, _Again):
            await asyncio.sleep(_wait(number, outcome.retry_after))
        if streak.lost >= options.concurrency:
            return Failure(f"{streak.lost} requests in a row had failed already", unavailable=True)
        outcome = await _try(server, question, key)
        if not isinstance(outcome, _Again):
            streak.lost = 0
            return outcome
    streak.lost += 1
    return Failure(f"{outcome.reason}, in each of {options.tries} tries", unavailable=True)


def _key(options: Options) -> str | Failure:
    """The API key, '' for none."""
    name = options.key_variable
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        return Failure(f"the environment variable {name} is not set")
    if not (key.isascii() and key.isprintable()):
        return Failure(f"the environment variable {name} holds characters no API key has")
    return key


def _wait(number: int, retry_after: str) -> float:
    """Seconds before try `number`, counted from 0; at most LONGEST_WAIT."""
    back_off = min(FIRST_WAIT * 2.0 ** (number - 1), LONGEST_BACK_OFF)
    # Jitter, so that requests which failed together do not come back together.
    return max(back_off * random.uniform(0.5, 1.0), min(_seconds(retry_after), LONGEST_WAIT))


def _seconds(retry_after: str) -> float:
    """What a Retry-After header asks for, in seconds or as a date; 0 if it says neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after[:9])
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (TypeError, ValueError):  # no date, or one without a time zone
        return 0.0


async def _try(server: _Server, question: _Question, key: str) -> Any:
    """One request -> decoded JSON, a `Failure`, or `_Again`."""
    import httpx2

    # Answers are short; what comes compressed all the same is decoded piece by piece.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    options, url = server.options, server.options.url.rstrip("/") + question.path
    try:
        async with (
            asyncio.timeout(options.timeout),
            server.http.stream(
                question.method, url, content=question.body, headers=headers
            ) as response,
        ):
            return await _read(response, options.max_bytes, key)
    except TimeoutError:
        return _Again(f"no complete answer within {options.timeout:g} s")
    # Only the kind of an error is reported: its text may quote a header, and so the key.
    except httpx2.ConnectError:
        return _Again("no connection to the server")
    except httpx2.TransportError as error:
        return _Again(f"the connection broke ({type(error).__name__})")
    except Exception as error:  # whatever else a broken answer provokes in the library
        return Failure(f"the answer cannot be read ({type(error).__name__})")


async def _read(response: Any, max_bytes: int, key: str) -> Any:
    """The decoded body, a `Failure`, or `_Again`."""
    status = response.status_code
    if status in RETRIED or status >= 500:
        return _Again(f"HTTP {status}", response.headers.get("retry-after", ""))
    if 300 <= status < 400:
        return Failure(f"HTTP {status}, a redirect, which is not followed: give the final URL")
    if status != 200:
        text = (await _body(response, ERROR_BYTES))[:ERROR_BYTES].decode("utf-8", "replace")
        text = text.replace(key, "***") if key else text
        text = "".join(c if c.isprintable() else " " for c in text)
        return Failure(f"HTTP {status}: {' '.join(text.split())[:ERROR_CHARS] or 'no message'}")
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind != "application/json" and not kind.endswith("+json"):
        return Failure(f"the answer is of type {kind[:50]!r}, not JSON")
    body = await _body(response, max_bytes)
    if len(body) > max_bytes:
        return Failure(f"the answer is longer than {max_bytes} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return Failure("the answer is not valid JSON")


async def _body(response: Any, limit: int) -> bytes:
    """The decoded body; of one longer than `limit` bytes, its beginning, itself longer."""
    body = bytearray()
    async with contextlib.aclosing(response.aiter_bytes()) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > limit:
                break
    return bytes(body)
