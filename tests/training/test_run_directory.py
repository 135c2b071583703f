"""Starting in a run directory: one holder, and a start that does not succeed changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from pec_jax import io
from pec_jax.config.schema import from_config_dict
from pec_jax.errors import FileError, RunError
from pec_jax.training import base_evaluation, record
from pec_jax.training import hold as hold_lib
from pec_jax.training import trainer as train_lib
from pec_jax.training.evaluator import Evaluation
from pec_jax.training.hold import Hold
from pec_jax.training.learned import run_config
from pec_jax.training.run_directory import RunDirectory
from tests import fake_bucket
from tests.conftest import ROOT, small_config_dict, tree_hash

HOLDER = """
import sys, time
from pec_jax import io
from pec_jax.training.hold import Hold
if sys.argv[1].startswith("gs://"):
    from tests import fake_bucket
    fake_bucket.install()
hold = Hold(io.path(sys.argv[1]))
hold.take()
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["disk", "gs"])
def place(request, tmp_path, monkeypatch):
    """An existing run directory, once on this machine and once in a bucket."""
    monkeypatch.setattr(hold_lib, "SETTLE_SECONDS", 0.2)
    if request.param == "disk":
        path = io.path(tmp_path / "run")
    else:
        monkeypatch.setenv(fake_bucket.ROOT, str(tmp_path / "buckets"))
        fake_bucket.install(monkeypatch)
        path = io.path("gs://bucket/run")
    io.write_text(path / "notes.txt", "x")
    return path


def files(place):
    """Name -> content of a directory's files."""
    return {path.name: path.read_bytes() for path in place.iterdir()}


def holder(**changes):
    """What a live holder on another machine has written down."""
    values = {
        "token": "t",
        "host": "elsewhere",
        "pid": 12,
        "start": "b/1",
        "since": "2026-01-02 03:04:05 +0000",
        "beat": time.time(),
    }
    return (json.dumps(values | changes) + "\n").encode()


@pytest.fixture
def config():
    return from_config_dict(small_config_dict())


class TestHold:
    def test_a_second_process_is_told_who_holds_it_until_the_first_is_killed(self, place):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, os.fspath(place)],
            cwd=ROOT,
            env=dict(os.environ, PYTHONPATH=str(ROOT)),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout.readline() == "taken\n"
            before = files(place)
            with pytest.raises(RunError) as error:
                Hold(place).take()
            for word in (str(place), f"process {process.pid} on ", "since 20", "--workdir"):
                assert word in str(error.value)
            assert files(place) == before
        finally:
            process.kill()
            process.wait()
        ours = Hold(place)  # kill -9 leaves the file, and nobody has to wait
        start = time.monotonic()
        ours.take()
        assert time.monotonic() - start < 5
        assert json.loads((place / hold_lib.FILE).read_bytes())["pid"] == os.getpid()
        ours.release(restore=False)
        assert list(files(place)) == ["notes.txt"]

    def test_one_process_holds_a_directory_once(self, place):
        first = Hold(place)
        first.take()
        with pytest.raises(RunError, match=f"process {os.getpid()} on"):
            Hold(place).take()
        first.release(restore=False)
        second = Hold(place)
        second.take()
        second.release(restore=False)

    def test_a_live_holder_elsewhere_is_recognised_by_its_sign_of_life(self, place, monkeypatch):
        monkeypatch.setattr(hold_lib, "_POLL_SECONDS", 0.05)
        io.write_bytes(place / hold_lib.FILE, holder())
        beat = threading.Timer(
            0.5, lambda: io.write_bytes(place / hold_lib.FILE, holder(beat=time.time() + 1))
        )
        beat.start()
        with pytest.raises(RunError, match="process 12 on elsewhere"):
            Hold(place).take()
        beat.join()

    def test_a_silent_holder_elsewhere_is_taken_for_dead_after_the_timeout(
        self, place, monkeypatch
    ):
        monkeypatch.setattr(hold_lib, "_POLL_SECONDS", 0.05)
        monkeypatch.setattr(hold_lib, "TIMEOUT_SECONDS", 2.0)
        io.write_bytes(place / hold_lib.FILE, holder())
        ours, start = Hold(place), time.monotonic()
        ours.take()
        assert 1.5 < time.monotonic() - start < 10
        ours.release(restore=True)
        assert (place / hold_lib.FILE).read_bytes()  # restored: nothing was changed
        io.write_bytes(place / hold_lib.FILE, holder(beat=time.time() - 100))
        ours, start = Hold(place), time.monotonic()
        ours.take()
        assert time.monotonic() - start < 1
        ours.release(restore=False)

    def test_a_number_that_another_process_got_is_not_mistaken(self, place):
        """After a restart of the machine the holder's pid may be anybody's, even ours."""
        host = hold_lib._process()["host"]
        io.write_bytes(place / hold_lib.FILE, holder(host=host, pid=os.getpid(), start="boot/1"))
        ours = Hold(place)
        ours.take()
        ours.release(restore=False)

    @pytest.mark.parametrize("content", [b"{", b"[1]", b'{"host": 1}', b"\xff"])
    def test_a_half_written_file_holds_nobody(self, place, content):
        io.write_bytes(place / hold_lib.FILE, content)
        ours = Hold(place)
        ours.take()
        ours.release(restore=True)
        assert (place / hold_lib.FILE).read_bytes() == content

    def test_signs_of_life_are_given_and_a_lost_hold_is_noticed(self, place, monkeypatch):
        monkeypatch.setattr(hold_lib, "HEARTBEAT_SECONDS", 0.1)
        ours = Hold(place)
        ours.take()
        first = json.loads((place / hold_lib.FILE).read_bytes())["beat"]
        time.sleep(0.5)
        assert json.loads((place / hold_lib.FILE).read_bytes())["beat"] > first
        ours.check()
        theirs = holder()
        if io.is_remote(place):
            io.write_bytes(place / hold_lib.FILE, theirs)
        else:
            (place / hold_lib.FILE).write_bytes(theirs)
        time.sleep(0.5)
        with pytest.raises(RunError, match="another process has taken"):
            ours.check()
        ours.release(restore=False)
        assert (place / hold_lib.FILE).read_bytes() == theirs

    @pytest.mark.parametrize("another", [False, True])
    def test_a_directory_that_is_moved_away_is_noticed(self, tmp_path, another):
        place, aside = tmp_path / "run", tmp_path / "aside"
        place.mkdir()
        ours = Hold(io.path(place))
        ours.take()
        ours.check()
        place.rename(aside)
        if another:
            place.mkdir()
            (place / hold_lib.FILE).write_bytes(holder())
        with pytest.raises(RunError, match="another process" if another else "moved or deleted"):
            ours.check()
        ours.release(restore=False)
        assert (place / hold_lib.FILE).exists() == another  # not ours to delete
        again = Hold(io.path(aside))  # the lock went with the directory
        again.take()
        again.release(restore=False)

    def test_of_several_at_once_one_wins(self, place):
        holds, winners = [Hold(place) for _ in range(4)], []

        def take(hold):
            try:
                hold.take()
                winners.append(hold)
            except RunError:
                pass

        threads = [threading.Thread(target=take, args=[hold]) for hold in holds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(winners) == 1
        winners[0].release(restore=False)


class TestStart:
    def test_a_start_that_is_not_committed_leaves_no_directory(self, tmp_path, config):
        with pytest.raises(ZeroDivisionError), RunDirectory(tmp_path / "a" / "b") as directory:
            directory.start(config)
            assert (tmp_path / "a" / "b").is_dir()
            raise ZeroDivisionError
        assert not list(tmp_path.iterdir())

    def test_in_a_bucket_neither(self, tmp_path, monkeypatch, config):
        monkeypatch.setattr(hold_lib, "SETTLE_SECONDS", 0.0)
        monkeypatch.setenv(fake_bucket.ROOT, str(tmp_path))
        fake_bucket.install(monkeypatch)
        with RunDirectory("gs://bucket/a/b") as directory:
            directory.start(config)
            assert (tmp_path / "bucket" / "a" / "b" / hold_lib.FILE).exists()
        assert not list(tmp_path.iterdir())

    def test_a_committed_one_leaves_its_config(self, tmp_path, config):
        with RunDirectory(tmp_path / "run") as directory:
            directory.start(config)
            directory.commit(config)
        assert list(tree_hash(tmp_path / "run")) == ["config.json"]
        assert run_config(tmp_path / "run") == config
        before = (tmp_path / "run" / "config.json").stat().st_mtime_ns
        with RunDirectory(tmp_path / "run") as directory:
            directory.start(config)
            directory.commit(config)
        assert (tmp_path / "run" / "config.json").stat().st_mtime_ns == before

    def test_a_bucket_without_its_library_is_refused(self, tmp_path, monkeypatch, config):
        monkeypatch.setenv(fake_bucket.ROOT, str(tmp_path))
        fake_bucket.install(monkeypatch)
        monkeypatch.setitem(sys.modules, "google.cloud", None)
        with (
            pytest.raises(RunError, match=r"pip install 'pec_jax\[gcs\]'"),
            RunDirectory("gs://bucket/run") as directory,
        ):
            directory.start(config)

    def test_another_kind_of_address_is_refused(self):
        with pytest.raises(FileError, match="s3://"):
            RunDirectory("s3://bucket/run")

    @pytest.mark.parametrize("content", ["[1]", "null", "3", "{", "\x00"])
    def test_a_config_that_cannot_be_read_is_answered(self, tmp_path, config, content):
        (tmp_path / "config.json").write_text(content)
        before = tree_hash(tmp_path)
        with (
            pytest.raises(RunError, match=r"config\.json.*new --workdir"),
            RunDirectory(tmp_path) as directory,
        ):
            directory.start(config)
        assert tree_hash(tmp_path) == before

    @pytest.mark.parametrize("name", ["file", "file/below"])
    def test_a_file_is_not_a_directory(self, tmp_path, config, name):
        (tmp_path / "file").write_text("mine")
        with (
            pytest.raises(RunError, match=r"file is a file\. Give the name of a directory"),
            RunDirectory(tmp_path / name) as directory,
        ):
            directory.start(config)
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_directory_that_cannot_be_made_is_answered(self, config):
        with (
            pytest.raises(RunError, match=r"--workdir=/proc/nothing/here cannot be written"),
            RunDirectory("/proc/nothing/here") as directory,
        ):
            directory.start(config)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two iterations, with what a killed run may leave beside it."""
    directory = tmp_path_factory.mktemp("run")
    train_lib.train(tiny_config(), directory)
    (directory / hold_lib.FILE).write_bytes(holder(host=hold_lib._process()["host"], pid=2**22))
    (directory / "checkpoints" / "3.orbax-checkpoint-tmp-7").mkdir()
    return directory


def tiny_config():
    config = small_config_dict()
    config.num_iterations = 2
    config.eval.update({"num_prompts": 2, "entropy_probes": 0})
    config.schedule.update({"eval_every": 0, "sample_every": 0})
    return config


def changed(path, value):
    """The config with one field changed, as nested dicts."""
    values = tiny_config().to_dict()
    *sections, field = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[field] = value
    return values


REFUSED = {
    "another config": (("optimizer.learning_rate", 0.125), False, ["0.003 there, 0.125 now"]),
    "another rank": (
        ("trainable.rank", 2),
        True,
        ["holds other arrays", "needs a new run", "config.trainable.rank: 4 there, 2 now"],
    ),
    "another mode": (
        ("trainable.mode", "full"),
        True,
        ["holds other arrays", "config.trainable.mode: 'lora' there, 'full' now"],
    ),
    "unknown reward": (("rewards", {"beauty": 1.0}), True, ["'beauty'", "pickscore"]),
    "no such model": (("model.path", "/no/such/model"), True, ["/no/such/model"]),
    "no such prompts": (("prompts.train", "no/such.txt"), True, ["no/such.txt"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_start_changes_no_byte_of_a_run(finished, case):
    (path, value), allow, words = REFUSED[case]
    before = tree_hash(finished)
    with pytest.raises((ValueError, RunError)) as error:
        train_lib.train(changed(path, value), finished, allow_config_change=allow)
    assert tree_hash(finished) == before
    for word in words:
        assert word in str(error.value)
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("case", ["unknown reward", "no such model", "no such prompts"])
def test_a_refused_start_leaves_no_new_directory(tmp_path, case):
    with pytest.raises((ValueError, RunError)):
        train_lib.train(changed(*REFUSED[case][0]), tmp_path / "new" / "run")
    assert not list(tmp_path.iterdir())


def test_a_held_directory_is_refused_and_unchanged(finished):
    other = Hold(io.path(finished))
    other.take()
    before = tree_hash(finished)
    with pytest.raises(RunError, match="is in use by process"):
        train_lib.train(tiny_config(), finished)
    assert tree_hash(finished) == before
    other.release(restore=True)


def metrics_of(directory):
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    trained = [line for line in lines if "reward/mean" in line]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in trained]


def test_a_finished_run_goes_on_as_one_that_was_longer(tmp_path):
    """Bit for bit; what is evaluated may change on the way, and the base is evaluated so too."""
    short, long = tiny_config(), tiny_config()
    long.num_iterations = 4
    long.eval.num_prompts = 3
    long.schedule.log_every = 1
    first = train_lib.train(short, tmp_path / "grown")
    grown = train_lib.train(long, tmp_path / "grown")
    straight = train_lib.train(long, tmp_path / "straight")
    assert grown == straight
    assert metrics_of(tmp_path / "grown") == metrics_of(tmp_path / "straight")
    assert json.loads((tmp_path / "grown" / "eval_step_000002.json").read_text()) == first
    assert (first["base/count/prompts"], grown["base/count/prompts"]) == (2, 3)


def test_a_run_cannot_become_shorter_than_it_is(finished):
    before = tree_hash(finished)
    with pytest.raises(RunError, match=r"has 2 iterations already.*at least 2"):
        train_lib.train(changed("num_iterations", 1), finished)
    assert tree_hash(finished) == before


class TestRecord:
    """What the files of a run say together."""

    def write(self, directory, steps, ended=False):
        files = RunDirectory(directory)
        lines = [json.dumps({"step": step, "reward/mean": 0.5}) for step in steps]
        files.metrics_file.write_text("\n".join([*lines, '{"step": 9, "quality/a": 1}', '{"st']))
        if ended:
            files.evaluation_file.write_text("{}")
        return files

    @pytest.mark.parametrize(
        ("steps", "every", "words"),
        [
            ([1, 2, 3, 4], 1, ""),
            ([1, 2, 3, 4, 5, 5], 1, ""),  # what comes after the checkpoint is dropped anyway
            ([2, 4], 2, ""),
            ([1], 1, "lacks 3 of the lines up to iteration 4 (the first: 2)"),
            ([], 1, "lacks 4 of the lines"),
            ([1, 2, 1, 2, 3, 4], 1, "repeats 2 of the lines up to iteration 4 (the first: 1)"),
            ([2, 4, 4], 1, "lacks 2 of the lines up to iteration 4 (the first: 1) and repeats 1"),
        ],
    )
    def test_lines_that_are_missing_or_doubled_are_named(self, tmp_path, steps, every, words):
        found = record.gap(self.write(tmp_path, steps), 4, every)
        assert words in found and bool(words) == bool(found)

    def test_bytes_that_are_no_text_are_a_missing_line(self, tmp_path):
        files = self.write(tmp_path, [1, 2])
        files.metrics_file.write_bytes(b"\xff" + files.metrics_file.read_bytes())
        assert "lacks 1 of the lines up to iteration 2 (the first: 1)" in record.gap(files, 2, 1)

    @pytest.mark.parametrize(
        ("steps", "ended", "every", "words"),
        [
            ([1, 2, 3], False, 2, None),  # killed before its first checkpoint was on disk
            ([1, 2, 3, 4], False, 2, None),  # the second found that the first was not written
            ([1, 2, 3, 4, 5], False, 0, None),
            ([1, 2, 3, 4, 5], False, 2, "metrics up to iteration 5"),
            ([1, 2], True, 0, "a final evaluation"),
        ],
    )
    def test_lost_checkpoints_are_no_new_run(self, tmp_path, steps, ended, every, words):
        files = self.write(tmp_path, steps, ended)
        if words is None:
            record.check_new(files, every)
            return
        with pytest.raises(RunError, match=words):
            record.check_new(files, every)

    def test_a_run_without_its_checkpoints_is_left_as_it_is(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        before = tree_hash(tmp_path / "run")
        with pytest.raises(RunError, match="its checkpoints have been removed"):
            train_lib.train(tiny_config(), tmp_path / "run")
        assert tree_hash(tmp_path / "run") == before

    @pytest.mark.parametrize("text", ["", "{", "\0\0", "[1]", "{}", '{"quality/pickscore": "x"}'])
    def test_a_damaged_base_evaluation_is_made_anew(self, tmp_path, text):
        kept = Evaluation({"quality/a": 0.5}, {})
        base_evaluation.write(tmp_path, kept)
        assert base_evaluation.read_intact(tmp_path).numbers == kept.numbers
        (tmp_path / "eval_base.json").write_text(text)
        assert base_evaluation.read_intact(tmp_path) is None
        base_evaluation.write(tmp_path, kept)
        (tmp_path / "eval_base.safetensors").write_bytes(b"torn")
        assert base_evaluation.read_intact(tmp_path) is None
