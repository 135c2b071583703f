"""A run in a bucket, from its prompts to its export, by the commands as a person types them.

gs:// is a stand-in (`tests/fake_bucket.py`), so this shows that every file goes through it; what a
real bucket answers, how fast and with whose permission, it cannot show.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.training.hold import FILE
from tests import fake_bucket
from tests.conftest import ROOT
from tests.training.test_trainer import (
    SMALL,
    read_metrics,
    stored_state,
    wait_for_line,
    without_times,
)

RUN = "gs://bucket/runs/pec"
PROMPTS = ("a red cat", "two purple stars", "two cats")


def start(root, module, *flags):
    environment = dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        JAX_COMPILATION_CACHE_DIR=str(root / "cache"),
        PYTHONPATH=str(ROOT),
        **{fake_bucket.ROOT: str(root / "gs")},
    )
    return subprocess.Popen(
        [sys.executable, "-m", "tests.fake_bucket", f"pec_jax.{module}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """The directory that stands for gs://bucket, with prompts and an encoder in it."""
    root = tmp_path_factory.mktemp("bucket")
    directory = root / "gs" / "bucket"
    directory.mkdir(parents=True)
    (directory / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    encoder = directory / "encoders" / "dino"
    encoder.mkdir(parents=True)
    for file in (SHAPES_DIRECTORY / "encoders" / "dino").iterdir():
        (encoder / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(scope="module")
def runs(bucket):
    """(root, a run on this machine, the same in the bucket but killed with -9 and resumed)."""
    root = bucket.parents[1]
    finish(
        start(root, "embed", "--prompts=gs://bucket/prompts.txt", "--out=gs://bucket/embeddings")
    )
    flags = [
        *SMALL,
        "--config.eval.entropy_probes=0",
        "--config.num_iterations=5",
        "--config.schedule.checkpoint_every=2",
        "--config.schedule.keep_checkpoints=2",
        "--config.prompts.train=gs://bucket/prompts.txt",
        "--config.prompts.heldout=gs://bucket/prompts.txt",
        "--config.prompts.embeddings=gs://bucket/embeddings",
        "--config.encoders.dino.model=gs://bucket/encoders/dino",
    ]
    alone, hurt = root / "alone", bucket / "runs" / "pec"
    finish(start(root, "main", *flags, f"--workdir={alone}"))

    process = start(root, "main", *flags, f"--workdir={RUN}")
    wait_for_line(hurt, process, 2)  # lines reach the bucket with the checkpoint that covers them
    while not (hurt / "checkpoints" / "2" / "commit_success.txt").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert not (hurt / "eval.json").exists() and (hurt / FILE).exists()

    output = finish(start(root, "main", *flags, f"--workdir={RUN}"))
    assert "Resuming after iteration" in output
    return root, alone, hurt


def test_killed_and_resumed_it_is_bit_for_bit_the_run_on_a_disk(runs):
    _, alone, hurt = runs
    assert without_times(read_metrics(hurt)) == without_times(read_metrics(alone))
    expected, found = stored_state(alone, 5), stored_state(hurt, 5)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert (hurt / "eval.json").read_bytes() == (alone / "eval.json").read_bytes()


def test_the_directory_is_as_on_a_disk(runs):
    _, alone, hurt = runs

    def names(directory):
        return {p.name for p in directory.iterdir() if not p.name.startswith("events.out")}

    assert names(hurt) == names(alone)
    assert names(hurt / "samples") == names(alone / "samples")
    assert names(hurt / "checkpoints") == names(alone / "checkpoints") == {"4", "5"}
    assert list(hurt.glob("events.out.tfevents*"))


def test_a_refused_start_changes_nothing(runs):
    root, _, hurt = runs
    before = {p: p.read_bytes() for p in hurt.rglob("*") if p.is_file()}
    output = finish(start(root, "main", *SMALL, f"--workdir={RUN}"), code=2)
    assert f"{RUN} was made with another config" in output and "Traceback" not in output
    assert {p: p.read_bytes() for p in hurt.rglob("*") if p.is_file()} == before


def test_sample(runs):
    root, alone, _ = runs
    flags = ["--prompt=a red cat", "--num_images=2", "--num_steps=2"]
    finish(start(root, "sample", *flags, f"--lora={RUN}", "--out=gs://bucket/images"))
    finish(start(root, "sample", *flags, f"--lora={alone}", f"--out={root / 'images'}"))
    images = root / "gs" / "bucket" / "images"
    assert {p.name for p in images.iterdir()} == {p.name for p in (root / "images").iterdir()}
    for file in images.iterdir():
        assert file.read_bytes() == (root / "images" / file.name).read_bytes()
    with Image.open(images / "grid.png") as grid:
        assert np.asarray(grid).std() > 1


def test_export_and_sample_with_it(runs):
    root, alone, _ = runs
    finish(start(root, "export", f"--workdir={RUN}", "--kind=lora", "--out=gs://bucket/lora"))
    finish(start(root, "export", f"--workdir={alone}", "--kind=lora", f"--out={root / 'lora'}"))
    (file,) = (root / "gs" / "bucket" / "lora").glob("*.safetensors")
    assert (file.parent / "README.md").is_file()  # the model card
    found, expected = load_file(file), load_file(root / "lora" / file.name)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    # Once more into the same place, which is recognised as an earlier export.
    finish(start(root, "export", f"--workdir={RUN}", "--kind=lora", "--out=gs://bucket/lora"))
    flags = ["--prompt=a red cat", "--num_images=1", "--num_steps=2"]
    finish(start(root, "sample", *flags, "--lora=gs://bucket/lora", "--out=gs://bucket/more"))
    latents = np.load(root / "gs" / "bucket" / "more" / "latents.npy")
    assert np.isfinite(latents).all()


def test_compare(runs):
    root, alone, _ = runs
    finish(start(root, "compare", RUN, "--out=gs://bucket/comparison"))
    finish(start(root, "compare", str(alone), f"--out={root / 'comparison'}"))
    found = root / "gs" / "bucket" / "comparison"
    assert (found / "table.csv").read_bytes() == (root / "comparison" / "table.csv").read_bytes()
    assert "data:image/webp" in (found / "report.html").read_text()


def test_a_model_directory_in_a_bucket(runs):
    """A genuine pipeline is fetched into the cache, without what a directory may hold besides."""
    root, *_ = runs
    model = root / "gs" / "bucket" / "model"
    finish(start(root, "tiny", "--family=sd3", f"--out={model}"))
    (model / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    flags = ["--prompt=a", "--num_images=1", "--num_steps=1", "--model=gs://bucket/model"]
    output = finish(start(root, "sample", *flags, "--out=gs://bucket/tiny"))
    assert "Fetching gs://bucket/model" in output
    assert (root / "gs" / "bucket" / "tiny" / "00000.png").exists()
    missing = [*flags[:3], "--model=gs://bucket/nothing", "--out=gs://bucket/tiny"]
    output = finish(start(root, "sample", *missing), code=2)
    assert "gs://bucket/nothing: no such directory" in output and "Traceback" not in output
