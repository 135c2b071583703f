"""The command line: mistakes are answered with a sentence, never with a stack trace."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pec_jax.config.schema import from_config_dict
from pec_jax.training.build import build
from tests.conftest import ROOT

SHAPES = "--config=configs/shapes_pec.py"


def run(module, *flags, cwd=ROOT):
    """(exit status, everything printed) of a command."""
    process = subprocess.run(
        [sys.executable, "-m", module, *flags],
        cwd=cwd,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stdout + process.stderr


def test_a_name_that_only_the_package_knows_is_answered(tmp_path):
    code, output = run(
        "pec_jax.main", SHAPES, f"--workdir={tmp_path}", "--config.constraints.pecc.weight=1"
    )
    assert code == 2 and "Traceback" not in output
    for word in ("'pecc'", "Did you mean config.constraints.pec", "kl", "pcvae"):
        assert word in output


# field, value, words that the answer must contain
MISTAKES = [
    ("perception.estimator", "knnn", ["'knnn'", "gaussian", "knn", "logdet"]),
    ("perception.encoder", "dinoo", ["'dinoo'", "clip", "dino", "pickscore"]),
    ("sampler.kernel", "sde", ["'sde'", "cps", "dance_sde", "flow_sde", "ode"]),
    ("rewards", {"beauty": 1.0}, ["'beauty'", "attributes", "clip", "pickscore"]),
    ("prompts.train", "no/such.txt", ["no/such.txt"]),
    ("prompts.train", "shapes/nothing", ["shapes/nothing", "shapes/train_open"]),
    ("model.path", "/no/such/model", ["/no/such/model"]),
    ("trainable.targets", ("nothing_like_this$",), ["nothing_like_this"]),
    ("model.height", 33, ["height", "33", "multiples of 16"]),
]


@pytest.mark.parametrize(("path", "value", "words"), MISTAKES)
def test_a_name_that_does_not_exist_is_answered_with_those_that_do(
    small_config, path, value, words
):
    values = small_config.to_dict()
    *sections, field = path.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[field] = value
    with pytest.raises(ValueError) as error:
        build(from_config_dict(values))
    for word in words:
        assert word in str(error.value)


def test_a_work_directory_that_is_a_file_is_answered(tmp_path):
    (tmp_path / "file").write_text("mine")
    code, output = run("pec_jax.main", SHAPES, f"--workdir={tmp_path / 'file'}")
    assert code == 2 and "file is a file. Give the name of a directory" in output
    assert "Traceback" not in output and (tmp_path / "file").read_text() == "mine"


def test_what_a_bucket_answers_is_a_sentence(capsys):
    """tensorflow, which opens gs://, has errors of its own."""
    from tensorflow.errors import PermissionDeniedError

    from pec_jax.errors import exit_on_user_error

    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise PermissionDeniedError(None, None, "no access to gs://bucket/run\nmore")
    assert ended.value.code == 2
    words = "Error: the bucket cannot be used: no access to gs://bucket/run. Check"
    assert capsys.readouterr().err.startswith(words)


def test_a_read_only_work_directory_is_answered():
    code, output = run("pec_jax.main", SHAPES, "--workdir=/proc/nothing/here")
    assert code != 0 and "/proc/nothing" in output and "Traceback" not in output


def test_a_full_disk_is_answered(tmp_path):
    """A limit on the size of files stands in for the end of the disk: writes fail half-way."""
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000));"
        f"sys.argv = ['main', {SHAPES!r}, '--workdir={tmp_path}/run'];"
        "from pec_jax import main; main.run()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    output = process.stdout + process.stderr
    assert process.returncode != 0
    assert "Traceback" not in output, output
    assert "Error:" in output
    assert not (tmp_path / "run").exists()  # a start that failed leaves nothing


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model=/no/such/model", "--prompt=a cat"], ["/no/such/model"]),
        (["--prompt=a cat", "--height=33"], ["height", "33"]),
        (["--prompt=a cat", "--lora=/no/such/run"], ["/no/such/run", "run directory"]),
        (["--prompt=a cat", "--init_latents=/no/such.npy"], ["/no/such.npy"]),
    ],
)
def test_mistakes_in_sampling_are_answered(tmp_path, flags, words):
    code, output = run("pec_jax.sample", f"--out={tmp_path}", *flags)
    assert code != 0 and "Traceback" not in output
    for word in words:
        assert word in output
