"""How well an image shows a text: OCR in worker processes, and the score of flow_grpo.

The engine is RapidOCR (PP-OCRv6 small, ONNX), whose wheel carries its models. Each worker process
has one engine and never imports JAX. A worker is a new interpreter and not a fork, because the
program that asks runs JAX's threads; nor does it import the program's main module, which a worker
of `multiprocessing` would run anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from pec_jax.errors import RunError

PACKAGES = ("rapidocr", "onnxruntime")
INSTALL = "pip install 'pec_jax[ocr]'"
DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
START_SECONDS = 120.0  # for a worker to import and load everything
ATTEMPTS = 2  # a worker may die through no fault of the image, for want of memory for instance
WARNINGS = 10

_QUOTED = re.compile(
    '"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|»([^«]*)«|「([^」]*)」'  # the leftmost pair
)


def target_text(prompt: str) -> str:
    """The text between the first pair of quotes, as it stands; '' if there is none.

    Quotes are the straight double ones and, beyond flow_grpo, “ ”, „ “, „ ”, « », » « and 「 」.
    Apostrophes and single quotes are none, nor is a quote that is not closed.
    """
    match = _QUOTED.search(prompt)
    return match[match.lastindex or 0] if match else ""


def is_readable(target: str) -> bool:
    """Whether anything is left of a target to compare with."""
    return bool(target.strip())


def ocr_score(read: str, target: str) -> float:
    """1 - min(d, n) / n, where n is the length of the target and d the distance to what was read.

    Both texts are compared without spaces (U+0020) and in lower case. d is 0 if the target occurs
    in what was read, whatever surrounds it, else the Levenshtein distance.

    Args:
        read: all lines that were read, joined.
        target: what the image shall show.

    Returns:
        In [0, 1].

    Raises:
        ValueError: the target is empty.

    Source: `yifan123/flow_grpo: flow_grpo/ocr.py`.
    """
    read, target = _comparable(read), _comparable(target)
    if not target:
        raise ValueError("The target text is empty, and nothing can be compared with it.")
    distance = 0 if target in read else levenshtein(read, target)
    return 1.0 - min(distance, len(target)) / len(target)


def _comparable(text: str) -> str:
    return text.replace(" ", "").lower()


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(b) + 1))  # distances of what precedes in `a` to each beginning of `b`
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            substituted = diagonal + (left != right)
            diagonal = row[j]
            row[j] = min(substituted, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def missing_packages() -> list[str]:
    """Those of the engine that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


@dataclasses.dataclass(frozen=True)
class Engine:
    """How images are read.

    Attributes:
        threads: of one engine.
        limit_side_len: the detector enlarges an image whose shorter side has fewer pixels. Half the
            time of RapidOCR's 736, and what PaddleOCR 2.9.1 does with 512x512: nothing.
        text_score: lines of a lower confidence, in [0, 1], are dropped; 0.5 in PaddleOCR 2.9.1 too.
    """

    threads: int = 1
    limit_side_len: int = 512
    text_score: float = 0.5


def load(engine: Engine) -> Callable[[np.ndarray], str]:
    """The engine in this process.

    Returns:
        Image [H, W, 3] uint8, RGB -> its lines from top to bottom, joined without a separator.

    Raises:
        ImportError: a package is missing.
        FileNotFoundError: the wheel carries other models.
    """
    import cv2
    import rapidocr

    cv2.setNumThreads(engine.threads)
    # A model given by its file is never downloaded, nor exchanged by a later release.
    models = Path(rapidocr.__file__).parent / "models"
    rapid: Any = rapidocr.RapidOCR(
        params={
            "Global.use_cls": False,  # no search for lines that stand upside down
            "Global.text_score": engine.text_score,
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": engine.threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.model_path": str(models / DETECTOR),
            "Det.limit_side_len": engine.limit_side_len,
            "Rec.model_path": str(models / RECOGNISER),
        }
    )

    def read(image: np.ndarray) -> str:
        lines = rapid(np.ascontiguousarray(image[..., ::-1])).txts  # as BGR
        return "".join(lines or ())

    # Models are loaded when first needed, the recogniser when there is something to recognise.
    word = cv2.putText(np.zeros((128, 128, 3), np.uint8), "Hello", (8, 80), 0, 1.2, [255] * 3, 3)
    read(word)
    return read


def serve(descriptor: int) -> None:
    """What a worker runs until the connection ends.

    It is sent an `Engine`, then images, and answers each with (text or None, what went wrong).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program to answer
    # Errors of the connection mean that the program has ended.
    with contextlib.suppress(EOFError, OSError), Connection(descriptor) as connection:
        read, problem = _attempt(load, connection.recv())
        connection.send((None, problem))
        while read:
            connection.send(_attempt(read, connection.recv()))


def _attempt(function: Callable[[Any], Any], argument: Any) -> tuple[Any, str]:
    try:
        return function(argument), ""
    except Exception as error:
        # ONNX Runtime's messages are whole stack traces.
        return None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"


class _Worker:
    """One process and its connection; used by one thread at a time."""

    def __init__(self, engine: Engine, timeout: float):
        self._engine = engine
        self._timeout = timeout
        self._running: tuple[subprocess.Popen, Connection] | None = None

    def read(self, image: np.ndarray) -> str | None:
        """The text of an image [H, W, 3]; None if it cannot be had."""
        text: str | None = None
        problem = ""
        for _ in range(ATTEMPTS):
            try:
                if self._running is None:
                    self._start()
                text, problem = self._ask(image, self._timeout)
                break
            except OSError as error:
                problem = str(error)
                if isinstance(error, TimeoutError):
                    break
        if problem:
            message = "An image could not be read by OCR and has no score: %s"
            logging.log_first_n(logging.WARNING, message, WARNINGS, problem)
        return text

    def stop(self) -> None:
        if self._running is not None:
            process, connection = self._running
            self._running = None
            connection.close()
            process.kill()
            process.wait()

    def _start(self) -> None:
        """Raises RunError if the engine cannot be loaded, OSError if the process dies."""
        ours, theirs = multiprocessing.Pipe()
        command = f"from pec_jax.host import ocr; ocr.serve({theirs.fileno()})"
        # Modules are found where this process finds them.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", command],
                stdin=subprocess.DEVNULL,
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        self._running = process, ours
        _, problem = self._ask(self._engine, START_SECONDS)
        if problem:
            self.stop()
            raise RunError(f"The OCR engine cannot be loaded ({problem}). Install it: {INSTALL}.")

    def _ask(self, message: Any, seconds: float) -> tuple[str | None, str]:
        """Raises TimeoutError or ConnectionError, after which there is no process any more."""
        assert self._running is not None
        process, connection = self._running
        # Ends a transfer that stalls as well as a computation.
        timer = threading.Timer(seconds, process.kill)
        timer.daemon = True
        begin = time.monotonic()
        timer.start()
        try:
            connection.send(message)
            return connection.recv()
        except (EOFError, OSError) as error:
            self.stop()
            if time.monotonic() - begin >= seconds:
                raise TimeoutError(f"no answer within {seconds:g} s") from error
            raise ConnectionError(f"the worker ended (status {process.returncode})") from error
        finally:
            timer.cancel()


class Readers:
    """Worker processes that read images; each starts when first needed.

    They end with this object or the program. Several threads may use it at once.
    """

    def __init__(self, engine: Engine, workers: int = 0, timeout: float = 60.0):
        """Starts none yet.

        Args:
            engine: how to read.
            workers: number of processes; 0 gives every core a thread.
            timeout: seconds after which an image is given up and its worker replaced.
        """
        count = workers or max(1, _cores() // engine.threads)
        processes = [_Worker(engine, timeout) for _ in range(count)]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in processes:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="ocr")
        self.close = weakref.finalize(self, _stop_all, processes)

    def read(self, images: Sequence[np.ndarray] | np.ndarray) -> list[str | None]:
        """Reads N images.

        Args:
            images: [N, H, W, 3] uint8, RGB.

        Returns:
            N texts in the order of the images, '' where none was seen, None where an image could
            not be read: its worker failed, died twice or took too long.

        Raises:
            RunError: the engine cannot be loaded.
        """
        return list(self._threads.map(self._read, images))

    def _read(self, image: np.ndarray) -> str | None:
        worker = self._idle.get()
        try:
            return worker.read(image)
        finally:
            self._idle.put(worker)


def _stop_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.stop()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
