"""From the names of models and prompt sets to their files."""

from __future__ import annotations

import pytest

from pec_jax.config import ConfigError
from pec_jax.data.prompts import read_prompts
from pec_jax.families.locate import (
    pipeline_directory,
    prompt_file,
    prompt_files,
    transformer_path,
)
from pec_jax.weights.tensors import WeightsError


def test_an_embedded_set_and_a_file(tmp_path):
    assert prompt_file("shapes/train_open").name == "train_open.txt"
    assert str(prompt_file(str(tmp_path / "a.txt"))) == str(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"unknown prompt set 'shapes/train_opn'\. Did you mean"):
        prompt_file("shapes/train_opn")


def test_flow_grpos_directories_are_read_as_they_are(tmp_path):
    ocr, geneval = tmp_path / "ocr", tmp_path / "geneval"
    ocr.mkdir()
    geneval.mkdir()
    for split in ("train", "test"):
        (ocr / f"{split}.txt").write_text(f'A sign that says "{split}"\n')
        line = (
            '{"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "two cows"}'
        )
        (geneval / f"{split}_metadata.jsonl").write_text(line + "\n")
    (geneval / "train.txt").write_text("not these\n")
    assert prompt_file(str(ocr)).name == "train.txt"
    assert prompt_file(str(ocr), "test").name == "test.txt"
    assert [file.name for file in prompt_files(str(ocr))] == ["train.txt", "test.txt"]
    (prompt,) = read_prompts(prompt_file(str(geneval)))
    assert prompt.text == "two cows"
    assert prompt.metadata == {"tag": "counting", "include": [{"class": "cow", "count": 2}]}


def test_a_directory_without_such_a_file_is_named(tmp_path):
    (tmp_path / "train.txt").write_text("a\n")
    assert len(prompt_files(str(tmp_path))) == 1
    with pytest.raises(ConfigError, match=r"does not hold test_metadata\.jsonl or test\.txt"):
        prompt_file(str(tmp_path), "test")


def test_a_file_as_the_pipeline_is_told_how_to_use_it(tmp_path):
    file = tmp_path / "sd3.5_medium.safetensors"
    file.write_text("")
    message = r"sd3\.5_medium\.safetensors: is a file, .* config\.model\.transformer, and as"
    with pytest.raises(WeightsError, match=message):
        pipeline_directory(str(file))


def test_a_transformer_in_place_of_the_pipelines_own(tmp_path):
    file = tmp_path / "flux1-dev.safetensors"
    file.write_text("")
    assert transformer_path("") is None
    assert transformer_path(str(file)) == file
    assert transformer_path(str(tmp_path)) == tmp_path
    with pytest.raises(WeightsError, match="nowhere: no such directory"):
        transformer_path("nowhere")
    # Shapes are those of the pipeline, unless a directory says others.
    assert transformer_path(str(file), weights=False) is None
    assert transformer_path("nowhere", weights=False) is None
    assert transformer_path(str(tmp_path), weights=False) == tmp_path
