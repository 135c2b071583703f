"""A stand-in for gs:// on this machine, for tests: objects are files under $FAKE_BUCKET_ROOT.

It keeps the rules of an object store that programs for disks break: an object appears whole when
its upload ends, nothing can be appended to, opened for changes or locked, and a local program that
is given the address finds nothing. Requests that break them are errors.

    FAKE_BUCKET_ROOT=DIR python -m tests.fake_bucket pec_jax.main --workdir=gs://bucket/run ...

runs a command with it. What it replaces: etils' backend of gs://; tensorstore's driver for the
arrays of orbax, by its driver for files; google-cloud-storage, which orbax asks for the kind of
the bucket; and the file system of TensorBoard's events.
"""

from __future__ import annotations

import contextlib
import io as stdio
import os
import pathlib
import runpy
import shutil
import sys
import types

ROOT = "FAKE_BUCKET_ROOT"
SCHEME = "gs://"


def local(path) -> pathlib.Path:
    """Where an object lies on this machine."""
    text = os.fspath(path)
    assert text.startswith(SCHEME), text
    return pathlib.Path(os.environ[ROOT]) / text.removeprefix(SCHEME)


class _Upload(stdio.BytesIO):
    """Bytes on their way: they become an object when the upload is closed without an error."""

    def __init__(self, target: pathlib.Path):
        super().__init__()
        self._target = target

    def __exit__(self, kind, *about):
        if kind is None:
            self.close()

    def close(self):
        if not self.closed:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._target.with_name(f"{self._target.name}.upload.{os.getpid()}")
            temporary.write_bytes(self.getvalue())
            temporary.replace(self._target)
        super().close()


class _TextUpload(_Upload):
    def write(self, text):
        return super().write(text.encode("utf-8"))


def make_backend():
    """An etils backend for gs:// over $FAKE_BUCKET_ROOT."""
    from etils.epath import backend as backends

    def either(path):
        return local(path) if os.fspath(path).startswith(SCHEME) else pathlib.Path(path)

    class Backend(backends._OsPathBackend):
        def open(self, path, mode):
            if "w" in mode:
                return (_Upload if "b" in mode else _TextUpload)(local(path))
            if mode.strip("b") != "r":
                raise NotImplementedError(f"{path}: an object cannot be opened with mode {mode!r}")
            return super().open(local(path), mode)

        def exists(self, path):
            return local(path).exists()

        def isdir(self, path):
            return local(path).is_dir()

        def listdir(self, path):
            return super().listdir(local(path))

        def glob(self, path):
            root = os.environ[ROOT].rstrip("/") + "/"
            return [SCHEME + found.removeprefix(root) for found in super().glob(str(local(path)))]

        def walk(self, top, *, top_down=True, on_error=None):
            root = os.environ[ROOT].rstrip("/") + "/"
            for where, *rest in super().walk(local(top), top_down=top_down, on_error=on_error):
                yield SCHEME + os.fspath(where).removeprefix(root), *rest

        def makedirs(self, path, *, exist_ok=False, mode=None):
            super().makedirs(local(path), exist_ok=exist_ok, mode=mode)

        def mkdir(self, path, *, exist_ok=False, mode=None):
            super().makedirs(local(path), exist_ok=exist_ok, mode=mode)

        def rmtree(self, path):
            shutil.rmtree(local(path))
            self._prune(local(path).parent)

        def remove(self, path):
            super().remove(local(path))
            self._prune(local(path).parent)

        def rename(self, path, dst):
            super().rename(local(path), local(dst))

        def replace(self, path, dst):
            super().replace(local(path), local(dst))

        def copy(self, path, dst, overwrite):
            if os.fspath(dst).startswith(SCHEME):
                with self.open(dst, "wb") as upload:
                    upload.write(either(path).read_bytes())
            else:
                super().copy(local(path), dst, overwrite)

        def stat(self, path):
            return super().stat(local(path))

        @staticmethod
        def _prune(directory):
            """There are no empty directories in a bucket."""
            root = pathlib.Path(os.environ[ROOT])
            with contextlib.suppress(OSError):
                while root in directory.parents:
                    directory.rmdir()
                    directory = directory.parent

    return Backend()


def install(patch=None) -> None:
    """Replaces gs:// in this process; for the time of a test if pytest's `monkeypatch` is given."""
    from clu import metric_writers
    from etils.epath import backend as backends
    from etils.epath import gpath
    from orbax.checkpoint._src.path import gcs_utils

    replace = patch.setattr if patch else setattr
    backend = make_backend()

    def choose(self):
        return backend if self._uri_scheme == "gs" else backends.os_backend

    replace(gpath._GPath, "_backend", property(choose))
    replace(gpath, "_GCS_BACKENDS", frozenset({backend}))
    replace(
        gcs_utils,
        "get_kvstore_for_gcs",
        lambda path: {"driver": "file", "path": str(local(path)) + ("/" * path.endswith("/"))},
    )
    events = metric_writers.SummaryWriter

    def event_writer(directory):
        return events(str(local(directory)) if directory.startswith(SCHEME) else directory)

    replace(metric_writers, "SummaryWriter", event_writer)
    storage = types.ModuleType("google.cloud.storage")
    storage.Client = lambda: types.SimpleNamespace(get_bucket=lambda name: types.SimpleNamespace())
    cloud = types.ModuleType("google.cloud")
    cloud.storage = storage
    for module in (cloud, storage):
        if patch:
            patch.setitem(sys.modules, module.__name__, module)
        else:
            sys.modules[module.__name__] = module


if __name__ == "__main__":
    install()
    module = sys.argv[1]
    sys.argv = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
