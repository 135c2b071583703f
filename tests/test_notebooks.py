"""Both notebooks run from their first cell to their last, and keep their pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from pec_jax.families.tiny import write_pipeline

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def execute(name, monkeypatch, **environment):
    """The executed notebook; a cell that fails raises."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute()
    return notebook


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_quickstart_shows_the_collapse_and_the_cure_in_ten_minutes(monkeypatch, tmp_path):
    start = time.monotonic()
    notebook = execute("quickstart.ipynb", monkeypatch, PEC_JAX_NOTEBOOK_OUT=str(tmp_path))
    assert time.monotonic() - start < 600
    assert pictures(notebook) >= 6
    kept = {}
    for name in ("grpo", "pec"):
        result = json.loads((tmp_path / "runs" / name / "eval.json").read_text())
        assert result["quality/pickscore"] > result["base/quality/pickscore"]
        variance = "diversity/variance_dino"
        kept[name] = result[variance] / result[f"base/{variance}"]
    assert kept["grpo"] < kept["pec"]
    assert (tmp_path / "compare" / "report.html").exists()


def test_the_colab_notebook_runs_on_a_tiny_pipeline(monkeypatch, tmp_path):
    settings = {
        "model": str(write_pipeline(tmp_path / "model", "sd3")),
        "pickscore": "",
        "dino": "",
        "out": str(tmp_path / "out"),
        "size": 32,
        "dtype": "float32",
        "t5_length": 16,
        "iterations": 2,
        "steps": 3,
        "eval_steps": 3,
    }
    notebook = execute("colab_tpu_sd3.ipynb", monkeypatch, PEC_JAX_NOTEBOOK=json.dumps(settings))
    assert pictures(notebook) >= 2
    assert list((tmp_path / "out" / "lora").glob("*.safetensors"))


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.name)
def test_the_pictures_are_in_the_file(path):
    """So that it can be read without running it."""
    notebook = nbformat.read(path, as_version=4)
    assert pictures(notebook) >= 2
    text = path.read_text(encoding="utf-8")
    assert "Traceback" not in text and str(Path.home()) not in text
