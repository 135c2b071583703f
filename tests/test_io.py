"""Files here and on gs://: whole or not at all, JSON in sentences, copies that are kept."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from pec_jax import io
from pec_jax.errors import FileError
from tests import fake_bucket


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The root of gs:// as this process sees it."""
    root = tmp_path / "buckets"
    root.mkdir()
    monkeypatch.setenv(fake_bucket.ROOT, str(root))
    monkeypatch.setenv(io.CACHE_VARIABLE, str(tmp_path / "cache"))
    fake_bucket.install(monkeypatch)
    return root


@pytest.fixture(params=["disk", "gs"])
def place(request, tmp_path):
    """A directory, once on this machine and once in a bucket."""
    if request.param == "disk":
        return io.path(tmp_path / "run")
    request.getfixturevalue("bucket")
    return io.path("gs://bucket/run")


class TestPath:
    def test_home_and_bucket(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/somebody")
        assert os.fspath(io.path("~/run")) == "/home/somebody/run"
        assert os.fspath(io.path("gs://bucket/run/")) == "gs://bucket/run"
        assert io.is_remote(io.path("gs://bucket/run"))
        assert not io.is_remote(io.path("gs/bucket"))

    @pytest.mark.parametrize("name", ["s3://bucket/run", "file:///tmp/run", "https://x.org/a"])
    def test_other_addresses_are_refused(self, name):
        """They would become the names of local files."""
        with pytest.raises(FileError, match="are not supported; give a local path or gs://"):
            io.path(name)

    def test_an_address_without_a_bucket(self):
        with pytest.raises(FileError, match="names no bucket"):
            io.path("gs://")


class TestJson:
    def test_round_trip(self, place):
        io.write_json(place / "deep" / "config.json", {"a": [1, 2.5, None, "é"]})
        assert io.read_json(place / "deep" / "config.json") == {"a": [1, 2.5, None, "é"]}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "not valid JSON"),
            (b"\xff\xfe", "not valid JSON"),
            (b"[" * 10**6, "not valid JSON"),
            (b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON"),
            (b"[1]", "JSON object, not a list"),
        ],
    )
    def test_damaged(self, place, content, message):
        io.write_bytes(place / "config.json", content)
        with pytest.raises(FileError, match=rf"config\.json.*{message}"):
            io.read_json(place / "config.json")

    def test_missing(self, place):
        with pytest.raises(FileError, match=r"config\.json: no such file"):
            io.read_json(place / "config.json")

    def test_directory_in_its_place(self, tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            io.read_json(tmp_path)

    def test_absurd_size(self, tmp_path):
        path = tmp_path / "config.json"
        with path.open("wb") as handle:
            handle.truncate(2**40)  # sparse: takes no disk
        with pytest.raises(FileError, match="larger than"):
            io.read_json(path)


class TestReplace:
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, place):
        io.write_text(place / "a.txt", "old")

        def fail(temporary):
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            io.replace_file(place / "a.txt", fail)
        assert [p.name for p in place.iterdir()] == ["a.txt"]
        assert (place / "a.txt").read_text() == "old"

    def test_bytes_come_back(self, place):
        data = bytes(range(256)) * 1000
        io.write_bytes(place / "deep" / "b.bin", data)
        assert (place / "deep" / "b.bin").read_bytes() == data


class TestLocalCopy:
    def test_local_files_are_used_as_they_are(self, tmp_path):
        assert io.local_copy(tmp_path / "x") == tmp_path / "x"

    def test_a_file_is_fetched_once_until_it_changes(self, bucket, caplog):
        remote = io.path("gs://bucket/data/prompts.txt")
        io.write_text(remote, "a red cat")
        with caplog.at_level("INFO", logger="absl"):
            first = io.local_copy(remote)
        assert first.read_text() == "a red cat" and first.name == "prompts.txt"
        assert "Fetching gs://bucket/data/prompts.txt" in caplog.text
        caplog.clear()
        assert io.local_copy(remote) == first and not caplog.text
        io.write_text(remote, "a purple cat")
        assert io.local_copy(remote).read_text() == "a purple cat"

    def test_of_a_directory_what_is_asked_for(self, bucket):
        remote = io.path("gs://bucket/model")
        for name in ("config.json", "vae/config.json", "vae/model.safetensors", "vae/model.bin"):
            io.write_text(remote / name, name)
        copy = io.local_copy(remote, ("*.json", "*/*.safetensors"))
        found = sorted(str(p.relative_to(copy)) for p in copy.rglob("*") if p.is_file())
        assert found == ["config.json", "vae/config.json", "vae/model.safetensors"]

    def test_what_is_not_there(self, bucket):
        with pytest.raises(FileNotFoundError):
            io.local_copy(io.path("gs://bucket/nothing"))

    def test_an_interrupted_fetch_leaves_nothing_that_counts(self, bucket, monkeypatch):
        remote = io.path("gs://bucket/model")
        io.write_text(remote / "config.json", "{}")
        monkeypatch.setattr(type(remote), "copy", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            io.local_copy(remote)
        assert not [p for p in (io.cache_directory() / "gs").rglob("*") if p.is_file()]


class TestLineFile:
    @staticmethod
    def until(step):
        return lambda line: json.loads(line)["step"] <= step

    def test_lines_are_kept_and_later_ones_dropped(self, place):
        file = place / "metrics.jsonl"
        lines = io.LineFile(file, keep=self.until(0))
        for step in (1, 2, 3):
            lines.add(json.dumps({"step": step}))
        lines.close()
        lines = io.LineFile(file, keep=self.until(2))
        lines.add('{"step": 4}')
        lines.close()
        assert file.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 4}\n'

    def test_on_a_disk_a_line_is_there_at_once(self, tmp_path):
        lines = io.LineFile(io.path(tmp_path / "run" / "a"), keep=bool)
        lines.add("x")
        assert (tmp_path / "run" / "a").read_text() == "x\n"
        lines.close()

    def test_in_a_bucket_at_a_flush_and_from_time_to_time(self, bucket, monkeypatch):
        file = io.path("gs://bucket/a")
        lines = io.LineFile(file, keep=bool)
        lines.add("x")
        assert not file.exists()
        lines.flush()
        assert file.read_text() == "x\n"
        monkeypatch.setattr(io, "REWRITE_SECONDS", 0.0)
        lines.add("y")
        assert file.read_text() == "x\ny\n"
        lines.close()


def test_the_fake_is_as_strict_as_a_bucket(bucket):
    """Else the tests that use it would show nothing."""
    file = io.path("gs://bucket/a/b")
    with pytest.raises(NotImplementedError, match="cannot be opened with mode"):
        file.open("a")
    with pytest.raises(RuntimeError), file.open("wb") as upload:  # interrupted: no object
        upload.write(b"x")
        raise RuntimeError
    assert not file.exists()
    io.write_text(file, "x")
    assert not pathlib.Path(file).exists()  # nothing under that name on this machine
    file.unlink()
    assert not (bucket / "bucket").exists()  # there are no empty directories
