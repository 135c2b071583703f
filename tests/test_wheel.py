"""What users install: the wheel, by itself, used from an empty directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from pec_jax.rewards import base
from tests.conftest import ROOT

pytestmark = pytest.mark.wheel

# One iteration of the smallest run that is one.
TINY = [
    f"--config.{field}"
    for field in (
        "num_iterations=1",
        "batch.groups=2",
        "batch.group_size=4",
        "sampler.num_steps=3",
        "trainable.rank=4",
        "eval.num_prompts=2",
        "eval.groups=2",
        "eval.images_per_prompt=4",
        "eval.num_steps=3",
        "eval.sample_rows=2",
        "eval.sample_columns=3",
        "eval.entropy_probes=0",
    )
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT), "-w"]
    subprocess.run([*build, str(out)], check=True, timeout=300)
    return next(out.glob("pec_jax-*.whl"))


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory):
    """`bin` of an environment with the wheel, which borrows its requirements from this one."""
    venv = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=300)
    python = venv / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    # A directory on the path, whose own .pth files are not read: an editable install of the clone
    # does not come along.
    with open(os.path.join(site, "borrowed.pth"), "w", encoding="utf-8") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", wheel]
    subprocess.run(install, check=True, timeout=300)
    return venv / "bin"


@pytest.fixture
def run(binaries, tmp_path, monkeypatch):
    """Runs a command of that environment in an empty directory."""
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def run(program, *arguments):
        process = subprocess.run(
            [binaries / program, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        return process.returncode, process.stdout, process.stderr

    return run


def test_the_wheel_holds_the_package_and_its_configs_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "configs").glob("*.py"):
        assert f"pec_jax/configs/{path.name}" in names
    for path in (ROOT / "pec_jax").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pec_jax"}
    assert "pec_jax/shapes/assets/model_index.json" in names


def test_the_source_distribution_holds_what_a_clone_builds_from(tmp_path):
    build = [sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, timeout=300, capture_output=True)
    (path,) = tmp_path.glob("pec_jax-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("setup.py", "README.md", "LICENSE", "configs/base.py", "pec_jax/main.py"):
        assert name in names
    assert "pec_jax/shapes/assets/model_index.json" in names
    top = {name.split("/")[0] for name in names} - {""}
    assert not top & {"build", "docs", "runs", "tests"} and {"configs", "pec_jax"} <= top


def test_the_metadata_is_what_an_index_shows(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
        assert "pec_jax/py.typed" in archive.namelist()
    for line in (
        "License: Apache-2.0",
        "Requires-Python: >=3.11",
        "Project-URL: Paper, https://arxiv.org/abs/2605.12112",
        "Classifier: Programming Language :: Python :: 3.13",
        "Description-Content-Type: text/markdown",
    ):
        assert line in text, line


def test_it_is_the_wheel_that_is_imported(run):
    _, out, error = run("python", "-c", "import pec_jax; print(pec_jax.__file__)")
    assert "site-packages" in out and str(ROOT) not in out, error


def test_the_commands_and_their_help(run):
    code, out, _ = run("pec-jax")
    assert code == 0 and "\n  main " in out
    names = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert len(names) >= 8
    for name in names:
        code, out, error = run("pec-jax", name, "--help")
        assert code == 0 and "--out" in out + "--out" * (name in ("main", "aot")), error


def test_shipped_configs_are_found_and_listed(run):
    code, _, error = run("pec-jax", "main", "--config=shapes_pek", "--workdir=run")
    assert code == 2 and "Did you mean 'shapes_pec'" in error and "sd3_grpo" in error


def test_a_run_from_an_empty_directory(run, tmp_path):
    # The reward that `rewards.base` shows, with its own option.
    (tmp_path / "warmth.py").write_text(re.search(r"```python\n(.*?)```", base.__doc__, re.S)[1])
    options = ("--config.rewards.warmth.weight=0.5", "--config.rewards.warmth.gain=2")
    flags = ("--workdir=run", "--plugin=warmth.py", *options, *TINY)
    code, _, error = run("python", "-m", "pec_jax.main", "--config=shapes_pec", *flags)
    assert code == 0, error
    (line,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert -2 < json.loads(line)["reward/warmth"] < 2
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["quality/pickscore"] > 0
    # The same again with a config of one's own, which builds on a shipped one, finds it finished.
    (tmp_path / "own.py").write_text(
        "from configs import shapes_pec\n\nget_config = shapes_pec.get_config\n"
    )
    code, _, error = run("pec-jax", "main", "--config=own.py", *flags)
    assert code == 0, error
