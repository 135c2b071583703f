"""Tokenizers from local files, as AutoTokenizer loads them, without all that it imports."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from pec_jax.errors import FileError
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.tokenizers import load_tokenizer, stored_length
from pec_jax.weights.tensors import WeightsError

TEXTS = ["a small red circle", "", "Zürich, 10% off!", "A  RED\tCircle " * 9]
EMBEDDED = ["tokenizer", "tokenizer_2", "tokenizer_3", "encoders/clip"]


@pytest.fixture
def copy(tmp_path):
    """Of one of the embedded tokenizers, to be changed."""

    def make(name: str = "tokenizer"):
        return shutil.copytree(SHAPES_DIRECTORY / name, tmp_path / name)

    return make


def edit(directory, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize("stored", ["as it is", "by its vocabulary", "of an earlier version"])
def test_as_auto_tokenizer_loads_it(copy, name, stored):
    directory = copy(name)
    if stored == "by its vocabulary":  # as in Stable Diffusion 3's repository
        if not (directory / "vocab.json").exists() and not (directory / "spiece.model").exists():
            pytest.skip("it has no other file")
        (directory / "tokenizer.json").unlink()
    if stored == "of an earlier version":
        kind = "T5TokenizerFast" if name == "tokenizer_3" else "CLIPTokenizerFast"
        edit(directory, tokenizer_class=kind, model_max_length=77)
    ours, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.model_max_length == theirs.model_max_length
    options = {"padding": "max_length", "max_length": 12, "truncation": True}
    assert dict(ours(TEXTS, **options)) == dict(theirs(TEXTS, **options))


def test_a_class_of_another_kind_is_left_to_auto_tokenizer(copy):
    directory = copy()
    edit(directory, tokenizer_class="PreTrainedTokenizerFast")
    theirs = AutoTokenizer.from_pretrained(directory)
    assert type(load_tokenizer(directory)) is type(theirs)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    edit(directory, tokenizer_class="CLIPTokenizer")
    theirs = AutoTokenizer.from_pretrained(directory)
    assert type(load_tokenizer(directory)) is type(theirs)


def test_torch_and_model_configs_are_not_imported():
    program = (
        "import sys; from pec_jax.families.tokenizers import load_tokenizer\n"
        "for path in sys.argv[1:]: load_tokenizer(path)(['a red circle'])\n"
        "print([m for m in ('torch', 'transformers.configuration_utils') if m in sys.modules])"
    )
    paths = [str(SHAPES_DIRECTORY / name) for name in EMBEDDED]
    done = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "no usable tokenizer"),
        ("tokenizer.json", "[]", "must hold a JSON object, not a list"),
        ("tokenizer.json", "5", "must hold a JSON object, not a int"),
        ("tokenizer.json", '{"model": 5}', "no usable tokenizer"),
        ("tokenizer.json", "", "not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object, not a list"),
        ("tokenizer_config.json", "5", "must hold a JSON object, not a int"),
        ("tokenizer_config.json", "nonsense", "not valid JSON"),
        ("tokenizer_config.json", '{"pad_token": 5}', "no usable tokenizer"),
        ("tokenizer_config.json", '{"extra_special_tokens": "x"}', "no usable tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}', "no usable tokenizer"),
        ("special_tokens_map.json", "[]", "must hold a JSON object, not a list"),
    ],
)
def test_a_damaged_file_is_named(copy, name, file, content, message):
    directory = copy(name)
    if content.startswith('{"') and file == "tokenizer_config.json":
        edit(directory, **json.loads(content))
    else:
        (directory / file).write_text(content)
    with pytest.raises(FileError, match=rf"{file}: {message}"):
        load_tokenizer(directory)


@pytest.mark.parametrize("length", ["x", -3, 0, 1, 12.5, True, [12]])
def test_a_length_that_is_none_is_named(copy, length):
    directory = copy()
    edit(directory, model_max_length=length)
    for read in (load_tokenizer, stored_length):
        with pytest.raises(WeightsError, match=r"tokenizer_config\.json: model_max_length = "):
            read(directory)


def test_lengths_that_are_none_or_large(copy):
    directory = copy()
    edit(directory, model_max_length=None)
    assert stored_length(directory) == math.inf and load_tokenizer(directory)
    edit(directory, model_max_length=int(1e30))  # what transformers writes for "any"
    assert stored_length(directory) == 1e30 and load_tokenizer(directory)
    assert stored_length(directory / "nowhere") == math.inf


def test_a_tokenizer_without_words_is_none(copy, tmp_path):
    """transformers would make one that knows two tokens, without a word."""
    directory = copy("tokenizer_3")
    for name in ("tokenizer.json", "spiece.model"):
        (directory / name).unlink()
    with pytest.raises(WeightsError, match=r"tokenizer_3: no usable tokenizer: holds none of"):
        load_tokenizer(directory)
    with pytest.raises(WeightsError, match="nowhere: no such directory"):
        load_tokenizer(tmp_path / "nowhere")
