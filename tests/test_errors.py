"""What a person sees on the terminal."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from pec_jax.errors import LONGEST, has_tpu, shown


def pci(root, vendor, kind):
    device = root / "sys/bus/pci/devices/0000:00:04.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")


class TestHasTpu:
    def test_nothing(self, tmp_path):
        assert not has_tpu(tmp_path)

    @pytest.mark.parametrize("name", ["dev/accel0", "dev/vfio/3"])
    def test_device_files(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        assert has_tpu(tmp_path)

    @pytest.mark.parametrize(
        ("vendor", "kind", "expected"),
        [
            ("0x1ae0", "0x088000", True),
            ("0x1ae0", "0xff0000", True),
            ("0x1ae0", "0x020000", False),  # gVNIC
            ("0x1ae0", "0x010802", False),  # a disk
            ("0x10de", "0x030200", False),
        ],
    )
    def test_pci(self, tmp_path, vendor, kind, expected):
        pci(tmp_path, vendor, kind)
        assert has_tpu(tmp_path) == expected


@pytest.mark.skipif(
    has_tpu() or not importlib.util.find_spec("libtpu"), reason="needs libtpu and no TPU"
)
@pytest.mark.parametrize("ask", ["jax.devices()", "topologies.get_topology_desc('v5e:2x2', 'tpu')"])
def test_libtpu_is_silent_where_there_is_no_tpu(ask):
    code = (
        "from pec_jax.errors import quiet_libraries; quiet_libraries()\n"
        f"import jax\nfrom jax.experimental import topologies\n{ask}\n"
        "assert jax.default_backend() != 'tpu'"
    )
    hidden = ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # others may hold it, and it would not start
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr) == (0, "")


class TestShown:
    def test_what_moves_the_cursor_is_replaced(self):
        assert shown("a\x1b[31m\x07\r\n\N{SNOWMAN}") == "a�[31m��\n\N{SNOWMAN}"

    def test_of_a_long_text_the_ends_are_left(self):
        text = "a" * LONGEST + "b" * LONGEST
        assert shown("a" * LONGEST) == "a" * LONGEST
        assert (
            shown(text) == f"{text[: LONGEST // 2]} [{LONGEST} characters] {text[-LONGEST // 2 :]}"
        )

    def test_lone_surrogates_can_be_printed(self):
        assert shown("\udcff").encode() == "�".encode()


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_save_that_failed_ends_though_a_thread_waits():
    """As those of orbax, for what will not come."""
    code = (
        "import threading, time\n"
        "from pec_jax.errors import SaveError, exit_on_user_error\n"
        "threading.Thread(target=time.sleep, args=(3600,)).start()\n"
        "with exit_on_user_error():\n"
        "    raise SaveError('no room')"
    )
    done = python(code)
    assert (done.returncode, done.stderr) == (2, "Error: no room\n")


def test_traces_of_libraries_for_what_is_said_in_a_sentence_are_left_out():
    code = (
        "from absl import logging; logging.use_absl_handler()\n"
        "from pec_jax.errors import quiet_libraries; quiet_libraries()\n"
        "for error in (OSError(30, 'Read-only'), ValueError('a bug')):\n"
        "    try:\n"
        "        raise error\n"
        "    except Exception:\n"
        "        logging.exception('failed')"
    )
    assert python(code).stderr.count("Traceback") == 1
