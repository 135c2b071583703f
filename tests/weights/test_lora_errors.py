"""LoRA files that must be refused, each with a sentence, and which file of a directory is read."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_transformer
from pec_jax.weights.lora_files import FILE_NAMES
from pec_jax.weights.lora_reader import read_lora
from pec_jax.weights.tensors import WeightsError

Q, K = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"
LAYER = {
    f"transformer.{Q}.lora_A.weight": np.ones((2, 128), np.float32),
    f"transformer.{Q}.lora_B.weight": np.ones((128, 2), np.float32),
}
SETTINGS = {"r": 2, "lora_alpha": 4}
OTHER_KINDS = {  # the end of a tensor's name -> what the message calls it
    "lokr_w1": "LoKr",
    "hada_w1_a": "LoHa",
    "oft_R.weight": "OFT",
    "dora_scale": "DoRA as LyCORIS",
    "lora_mid.weight": "convolutions",
    "diff_b": "whole tensor",
    "norm.query_norm.scale": "control LoRAs",
}


def save(directory, tensors=LAYER, settings=SETTINGS):
    """A LoRA file with what a test puts in it."""
    text = json.dumps({f"transformer.{k}": v for k, v in settings.items()})
    save_file(tensors, directory / FILE_NAMES[0], {"lora_adapter_metadata": text})
    return directory / FILE_NAMES[0]


@pytest.fixture(scope="module")
def params():
    return load_transformer(SHAPES_DIRECTORY / "transformer")[1]["params"]


def renamed(old: str, new: str):
    return {name.replace(old, new): value for name, value in LAYER.items()}


class TestClearErrors:
    def test_the_file_they_start_from_is_fine(self, tmp_path, params):
        factors = read_lora(save(tmp_path), params).factors
        adapter = factors["transformer_blocks.0:2"]["attn"]["to_q"]
        assert adapter["a"].shape == (2, 128, 2) and adapter["b"].shape == (2, 2, 128)
        assert adapter["b"][0].min() == 2.0 and not adapter["a"][1].any()

    @pytest.mark.parametrize(
        ("tensors", "words"),
        [
            (renamed("to_q", "to_query"), ["to_query", "context_embedder", "another model"]),
            (renamed("s.0.", "s.7."), ["transformer_blocks.7.attn.to_q", "does not have"]),
            (dict(list(LAYER.items())[:1]), [Q, "lacks its lora_B.weight"]),
            (dict(list(LAYER.items())[1:]), [Q, "lacks its lora_A.weight"]),
            (LAYER | {f"transformer.{K}.alpha": np.float32(1)}, [K, "lacks its lora_A"]),
            (LAYER | {f"transformer.{Q}.lora_A.weight": np.ones((3, 128))}, [Q, r"\[3, 128\]"]),
            (LAYER | {f"transformer.{Q}.lora_A.weight": np.ones((2, 97))}, [Q, r"\[2, 97\]"]),
            (LAYER | {f"transformer.{Q}.lora_A.weight": np.ones(128)}, [Q, r"\[128\]"]),
            (LAYER | {f"transformer.{Q}.lora_A.weight": np.float32(1)}, [Q, r"shape \[\]"]),
            (
                {
                    f"transformer.{Q}.lora_A.weight": np.ones((5000, 128), np.float16),
                    f"transformer.{Q}.lora_B.weight": np.ones((128, 5000), np.float16),
                },
                [Q, "r from 1 to 4096"],
            ),
            (
                {
                    f"transformer.{Q}.lora_A.weight": np.ones((0, 128)),
                    f"transformer.{Q}.lora_B.weight": np.ones((128, 0)),
                },
                [Q, r"\[0, 128\]"],
            ),
            (LAYER | {"text_encoder.x.lora_A.weight": np.ones(1)}, ["text encoder", "without"]),
            (LAYER | {"lora_te1_x.lora_down.weight": np.ones(1)}, ["text encoder"]),
            (renamed("lora_A", "lora_C"), [r"lora_C\.weight", "none of MODULE"]),
            (
                LAYER | {f"transformer.{Q}.lora_magnitude_vector": np.ones(128)},
                ["use_dora is not set", "magnitude"],
            ),
            (
                LAYER | {f"transformer.{Q}.lora_B.bias": np.ones(128)},
                ["lora_bias is not set", r"lora_B\.bias"],
            ),
            (LAYER | {f"{Q}.lora_A.weight": np.ones((2, 128))}, [Q, "twice"]),
            (LAYER | {f"transformer.{Q}.lora_A.new.weight": np.ones((2, 128))}, ["twice", "new"]),
            (LAYER | {f"transformer.{Q}.alpha": np.float32(1)}, ["alpha twice"]),
            (LAYER | {f"transformer.{Q}.alpha": np.ones(3)}, [Q, "one number"]),
            ({}, ["holds no tensors"]),
            *(
                (LAYER | {f"transformer.{Q}.{name}": np.ones(2)}, [name, kind])
                for name, kind in OTHER_KINDS.items()
            ),
        ],
    )
    def test_tensors(self, tmp_path, params, tensors, words):
        path = save(tmp_path, {k: np.asarray(v) for k, v in tensors.items()})
        for word in words:
            with pytest.raises(WeightsError, match=rf"{FILE_NAMES[0]}: .*{word}"):
                read_lora(path, params)

    @pytest.mark.parametrize(
        ("settings", "word"),
        [
            ({"lora_alpha": None}, "lora_alpha None must be a number"),
            ({"lora_alpha": True}, "lora_alpha True"),
            ({"lora_alpha": float("nan")}, "lora_alpha nan"),
            ({"lora_alpha": 10**400}, "lora_alpha 1000"),
            ({"alpha_pattern": [1]}, r"alpha_pattern \[1\] must be an object"),
            ({"alpha_pattern": {"to_q": "x"}}, "alpha_pattern 'x' must be a number"),
            ({"alpha_pattern": {"(a+)+$": 1}}, r"alpha_pattern '\(a\+\)\+\$' is not supported"),
            ({"r": 8}, "has rank 2, but the adapter's settings say 8"),
            ({"r": None}, "r None must be a number"),
        ],
    )
    def test_settings(self, tmp_path, params, settings, word):
        path = save(tmp_path, settings=SETTINGS | settings)
        with pytest.raises(WeightsError, match=rf"{FILE_NAMES[0]}: .*{word}"):
            read_lora(path, params)

    @pytest.mark.parametrize("text", ["{", "[1]", "[" * 10**5])
    def test_settings_that_are_no_json_object(self, tmp_path, params, text):
        path = tmp_path / FILE_NAMES[0]
        save_file(LAYER, path, {"lora_adapter_metadata": text})
        with pytest.raises(WeightsError, match="lora_adapter_metadata"):
            read_lora(path, params)

    @pytest.mark.parametrize("keep", [0, 4, 40, -1])
    def test_truncated_file(self, tmp_path, params, keep):
        path = save(tmp_path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(WeightsError, match=rf"{FILE_NAMES[0]}: truncated"):
            read_lora(tmp_path, params)

    @pytest.mark.parametrize("directory", [True, False])
    def test_pickle(self, tmp_path, params, directory):
        path = tmp_path / "pytorch_lora_weights.bin"
        path.write_bytes(b"\x80\x04.")
        with pytest.raises(WeightsError, match=r"weights\.bin: a pickle.*pec_jax\.convert"):
            read_lora(tmp_path if directory else path, params)

    def test_nothing_there(self, tmp_path, params):
        with pytest.raises(WeightsError, match="holds no LoRA"):
            read_lora(tmp_path, params)
        with pytest.raises(WeightsError, match="nowhere: no such LoRA file or directory"):
            read_lora(tmp_path / "nowhere", params)

    def test_which_file_of_a_directory(self, tmp_path, params):
        save(tmp_path).rename(tmp_path / "style.safetensors")
        expected = read_lora(tmp_path, params).factors  # the only one
        (tmp_path / "other.safetensors").write_bytes(b"")
        with pytest.raises(
            WeightsError, match=r"holds other\.safetensors, style\.safetensors; give"
        ):
            read_lora(tmp_path, params)
        save(tmp_path)
        found = read_lora(tmp_path, params).factors
        jax.tree.map(np.testing.assert_array_equal, found, expected)
