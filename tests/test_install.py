"""Whether the requirements can be met where users are; nothing is installed.

uv resolves them for other platforms by their own markers, which pip does not evaluate there.
Windows users work under WSL, which is Linux on x86-64.
"""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys

import pytest
import setuptools

from tests.conftest import ROOT

pytestmark = pytest.mark.wheel

PLATFORMS = {
    "aarch64-apple-darwin": "tensorflow",
    "aarch64-unknown-linux-gnu": "tensorflow",
    "x86_64-unknown-linux-gnu": "tensorflow-cpu",
}
PYTHONS = ("3.11", "3.12", "3.13")
# Pure Python, published as source alone; everything else must be there as a wheel.
FROM_SOURCE = "promise"


@pytest.fixture
def requirements(monkeypatch):
    """Of setup.py as it is: what is installed may be older."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return given["install_requires"]


@pytest.mark.parametrize("platform, python", itertools.product(PLATFORMS, PYTHONS))
def test_every_platform_has_wheels_of_all_requirements(tmp_path, requirements, platform, python):
    (tmp_path / "requirements.in").write_text("\n".join(requirements))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "requirements.in"),
            *("--python-platform", platform, "--python-version", python),
            *("--only-binary", ":all:", "--no-binary", FROM_SOURCE),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = dict(re.findall(r"^([\w.-]+)==(\S+)", done.stdout, re.MULTILINE))
    tensorflows = {name for name in found if name in ("tensorflow", "tensorflow-cpu")}
    assert tensorflows == {PLATFORMS[platform]}
    assert {"jax", "jaxlib", "flax", "orbax-checkpoint", "array-record"} <= set(found)
