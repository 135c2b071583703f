"""The OCR score, and worker processes that read real images and fail in every way they can."""

from __future__ import annotations

import functools
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from pec_jax.errors import RunError
from pec_jax.host import ocr

FAST = ocr.Engine(limit_side_len=128)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('A sign with "Open 24/7", and "Closed"', "Open 24/7"),
        ('A sign with “Open” and "Closed"', "Open"),
        ("Ein Schild mit „Offen“", "Offen"),
        ("Szyld z napisem „Otwarte”", "Otwarte"),
        ("Un panneau « Ouvert »", " Ouvert "),
        ("Ein Schild »Offen« und »Zu«", "Offen"),
        ("看板「営業中」", "営業中"),
        ("The dog's \"It's mine\" shirt", "It's mine"),
        ('A 12" tablet that shows “Hello”', "Hello"),
        ('Empty "" before "full"', ""),
        ("A dog's 'bowl' on a 12\" plate", ""),
        ("A sign", ""),
        ("", ""),
    ],
)
def test_the_target_stands_between_the_first_pair_of_quotes(prompt, target):
    assert ocr.target_text(prompt) == target


def test_the_target_between_straight_quotes_is_that_of_flow_grpo():
    for prompt in ['a "b" c', '"b"', 'x "b c." y "d"', "it's \"Joe's\" bar"]:
        assert ocr.target_text(prompt) == prompt.split('"')[1]


def test_a_target_without_a_letter_is_not_readable():
    assert ocr.is_readable(" a ")
    assert not any(ocr.is_readable(text) for text in ("", " ", "\t "))


@functools.cache
def edits(a, b):
    """Levenshtein's recursive definition."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return edits(a[1:], b[1:])
    return 1 + min(edits(a[1:], b), edits(a, b[1:]), edits(a[1:], b[1:]))


def test_the_score_is_the_formula_on_random_texts():
    draw = random.Random(0)
    for _ in range(3000):
        read, target = ("".join(draw.choices("aAbBc ", k=draw.randint(0, 9))) for _ in range(2))
        a, b = ("".join(c for c in text if c != " ").lower() for text in (read, target))
        if not b:
            continue
        assert ocr.levenshtein(a, b) == edits(a, b)
        expected = 1.0 if b in a else max(0.0, 1 - edits(a, b) / len(b))
        assert ocr.ocr_score(read, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("", "abc", 0.0),
        ("abc", "abc", 1.0),
        ("A B C", "a bC", 1.0),
        ("before abc after", "abc", 1.0),  # what else is there costs nothing
        ("ab", "abc", 2 / 3),
        ("abxc", "abc", 2 / 3),
        ("axc", "abc", 2 / 3),
        ("zzzzzzzz", "abc", 0.0),  # a distance of 8 counts as 3
        ("a\tbc", "abc", 2 / 3),  # no other white space is removed
    ],
)
def test_the_score_of(read, target, score):
    assert ocr.ocr_score(read, target) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("target", ["", "  "])
def test_there_is_no_score_without_a_target(target):
    with pytest.raises(ValueError, match="target text is empty"):
        ocr.ocr_score("abc", target)


def picture(text, size=(128, 384), letters=48):
    """A line of text, dark blue on cream; [H, W, 3] uint8."""
    image = Image.new("RGB", size[::-1], (250, 240, 200))
    at = (16, size[0] // 2 - letters // 2)
    ImageDraw.Draw(image).text(at, text, (20, 30, 90), ImageFont.load_default(size=letters))
    return np.asarray(image)


def worker_pids():
    """The worker processes of this process, as Linux lists them."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"ocr.serve" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(scope="module")
def readers():
    made = ocr.Readers(FAST, workers=2)
    yield made
    made.close()


def test_scores_of_what_is_read_in_pictures(readers):
    drawn = ["Hello World", "Hallo World", "", "Hello", "say Hello World now"]
    texts = readers.read([picture(text, (128, 512), 40) for text in drawn])
    scores = [ocr.ocr_score(text, "Hello World") for text in texts]
    np.testing.assert_allclose(scores, [1.0, 0.9, 0.0, 0.5, 1.0])


def test_texts_come_in_the_order_of_the_pictures(readers):
    # Sizes differ, so that two workers finish in another order than they began.
    words = ["north", "east", "south", "west", "up", "down"]
    sides = [512, 128, 384, 128, 256, 128]
    texts = readers.read([picture(w, (side, 384)) for w, side in zip(words, sides)])
    assert [text.lower() for text in texts] == words
    assert len(worker_pids()) == 2


def test_lines_are_joined_from_top_to_bottom(readers):
    lines = np.concatenate([picture("first"), picture("second")])
    assert readers.read([lines])[0].lower() == "firstsecond"


def test_lines_of_less_confidence_are_dropped():
    certain = ocr.Readers(ocr.Engine(limit_side_len=128, text_score=1.0), workers=1)
    assert certain.read([picture("Hello")]) == [""]
    certain.close()


def test_several_threads_may_ask_at_once(readers):
    found = {}

    def ask(word):
        found[word] = readers.read([picture(word)])

    threads = [threading.Thread(target=ask, args=(word,)) for word in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {word: [word] for word in ("one", "two", "three")}


def test_an_engine_that_fails_leaves_the_picture_unread_and_goes_on(readers):
    readers.read([picture("Hello")] * 2)
    before = worker_pids()
    five_channels = np.zeros((64, 64, 5), np.uint8)
    assert readers.read([picture("Hello"), five_channels]) == ["Hello", None]
    assert sorted(worker_pids()) == sorted(before)


def test_a_worker_that_was_killed_is_replaced_and_the_picture_read(readers):
    readers.read([picture("Hello")] * 2)
    before = worker_pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert readers.read([picture("Hello"), picture("World")]) == ["Hello", "World"]
    assert len(worker_pids()) == 2 and not set(worker_pids()) & set(before)


def test_a_picture_whose_workers_all_die_is_unread(readers):
    begun, over = threading.Event(), threading.Event()

    def kill_all():
        while not over.wait(0.05):
            for pid in worker_pids():
                os.kill(pid, signal.SIGKILL)
            begun.set()

    killer = threading.Thread(target=kill_all)
    killer.start()
    begun.wait()  # a worker that runs already would be faster than the first round
    try:
        assert readers.read([picture("Hello")]) == [None]
    finally:
        over.set()
        killer.join()
    assert readers.read([picture("Hello")]) == ["Hello"]


def test_a_worker_that_does_not_answer_is_given_up():
    before = set(worker_pids())
    stalled = ocr.Readers(FAST, workers=1, timeout=5.0)
    assert stalled.read([picture("Hello")]) == ["Hello"]
    (pid,) = set(worker_pids()) - before
    os.kill(pid, signal.SIGSTOP)
    begin = time.monotonic()
    # So large that handing it over stalls as well.
    assert stalled.read([picture("Hello", (1024, 1024))]) == [None]
    assert 5 <= time.monotonic() - begin < 10
    assert set(worker_pids()) == before
    stalled.close()


def test_a_picture_that_takes_too_long_is_given_up():
    hurried = ocr.Readers(FAST, workers=1, timeout=0.01)
    assert hurried.read([picture("Hello", (1024, 1024))] * 2) == [None, None]
    hurried.close()


def test_workers_import_neither_jax_nor_what_brings_it(readers):
    readers.read([picture("Hello")])
    loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in worker_pids()]
    assert loaded and all("onnxruntime" in maps and "jaxlib" not in maps for maps in loaded)


def test_the_engine_needs_no_network_and_no_jax():
    script = """
import sys
calls, names = [], ("socket.connect", "socket.getaddrinfo", "socket.sendto")
sys.addaudithook(lambda event, args: event in names and calls.append(event))
import numpy as np
from pec_jax.host import ocr
ocr.load(ocr.Engine(limit_side_len=128))(np.zeros((64, 64, 3), np.uint8))
print(calls, sorted({"jax", "jaxlib", "flax", "tensorflow", "torch"} & set(sys.modules)))
"""
    assert run_python("-c", script) == "[] []\n"


def test_workers_do_not_run_the_program_again_and_end_with_it(tmp_path):
    program = tmp_path / "program.py"  # with nothing that guards its main part
    program.write_text(
        "import numpy as np\n"
        "from pec_jax.host import ocr\n"
        "readers = ocr.Readers(ocr.Engine(limit_side_len=128), workers=1)\n"
        "print(readers.read(np.zeros((1, 64, 64, 3), np.uint8)))\n"
    )
    assert run_python(program) == "['']\n"


def test_workers_end_with_their_owner():
    before = set(worker_pids())
    readers = ocr.Readers(FAST, workers=1)
    assert not set(worker_pids()) - before  # none before it is needed
    readers.read([picture("Hello")])
    assert len(set(worker_pids()) - before) == 1
    del readers
    gc.collect()
    assert not set(worker_pids()) - before


def test_an_engine_that_cannot_be_loaded_is_an_error(tmp_path, monkeypatch):
    for name in ocr.PACKAGES:
        (tmp_path / f"{name}.py").write_text("raise ImportError('it is broken')")
    (tmp_path / "cv2.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RunError, match=r"cannot be loaded \(ImportError: it is broken\).*\[ocr\]"):
        ocr.Readers(FAST, workers=1).read([picture("Hello")])


def run_python(*arguments):
    """What a Python of its own prints."""
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    ).stdout
