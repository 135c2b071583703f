"""LoRA files against diffusers and PEFT, in both directions."""

from __future__ import annotations

import subprocess
import sys

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from pec_jax.errors import FileError
from pec_jax.families.locate import SHAPES_DIRECTORY
from pec_jax.families.pipeline import load_pipeline
from pec_jax.inference import draw as sampling
from pec_jax.models import lora
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.weights.lora_files import FILE_NAMES, find_lora, write_lora
from pec_jax.weights.lora_reader import read_lora
from pec_jax.weights.tensors import WeightsError, read_metadata
from tests.conftest import ROOT

# Attention, feed-forward and modulation of scanned runs, and a layer outside of them.
PATTERNS = (r"attn2?\.to_(q|k|v)$", r"\.ff\.net", r"norm1\.linear$", r"^proj_out$")
ALL = (r".",)
PROMPTS = ("a small red cat in the snow", "two large blue stars at the top")
LENGTH = tokenizers.MAX_LENGTH  # of the embedded T5
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 6,
    "axes_dims_rope": (2, 2, 4),
}


@pytest.fixture(scope="module", autouse=True)
def exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def ours():
    return load_pipeline(SHAPES_DIRECTORY)


@pytest.fixture(scope="module")
def params(ours):
    return ours.transformer_variables["params"]


@pytest.fixture(scope="module")
def apply(ours):
    return jax.jit(ours.transformer.apply)


@pytest.fixture(scope="module")
def pipe():
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(SHAPES_DIRECTORY)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_lora(params, patterns=PATTERNS, rank: int = 3, scale: float = 0.1):
    """Adapters as after a training: b is not zero."""
    rng = np.random.default_rng(0)
    tree = lora.init(params, patterns, rank, jax.random.key(0))
    return jax.tree.map(lambda a: a + scale * rng.normal(size=a.shape).astype(np.float32), tree)


def relative(a, b):
    """Largest difference in units of the reference's standard deviation."""
    return np.abs(np.asarray(a) - np.asarray(b)).max() / np.asarray(b).std()


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


class TestWrite:
    @pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (3, 2.0)])
    def test_diffusers_samples_what_we_sample(self, tmp_path, ours, pipe, params, rank, alpha):
        adapter = random_lora(params, rank=rank)
        write_lora(tmp_path, adapter, alpha)
        noise = np.random.default_rng(1).normal(size=(2, 16, 16, 4)).astype(np.float32)

        def theirs():
            return pipe(
                list(PROMPTS),
                latents=torch.from_numpy(noise.transpose(0, 3, 1, 2)),
                num_inference_steps=4,
                guidance_scale=4.5,
                max_sequence_length=LENGTH,
                output_type="latent",
            ).images.numpy()

        base = theirs()
        pipe.load_lora_weights(tmp_path)
        expected = theirs()
        pipe.unload_lora_weights()

        request = sampling.Request(
            model="shapes", prompts=PROMPTS, num_images=1, num_steps=4, guidance=4.5
        )
        variables = {**ours.transformer_variables, "lora": lora.scaled(adapter, alpha, rank)}
        found, _ = sampling.draw(request, ours, variables, noise)
        assert relative(base, expected) > 0.1
        assert relative(found.transpose(0, 3, 1, 2), expected) < 1e-3

    @pytest.mark.parametrize("patterns", [PATTERNS, ALL], ids=["some", "all"])
    def test_round_trip(self, tmp_path, params, patterns):
        adapter = random_lora(params, patterns)
        path = write_lora(tmp_path, adapter, 7.5, {"note": "x"})
        assert path == tmp_path / FILE_NAMES[0]
        assert {"format": "pt", "note": "x"}.items() <= read_metadata(path).items()
        same(read_lora(tmp_path, params).factors, lora.scaled(adapter, 7.5, 3))
        same(read_lora(path, jax.eval_shape(lambda: params)).factors, lora.scaled(adapter, 7.5, 3))

    def test_bfloat16(self, tmp_path, params):
        adapter = jax.tree.map(lambda a: a.astype(jnp.bfloat16), random_lora(params))
        write_lora(tmp_path, adapter, 3.0)
        found = read_lora(tmp_path, params).factors
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
        same(found, jax.tree.map(lambda a: np.asarray(a, np.float32), adapter))

    def test_several_ranks_are_refused(self, tmp_path, params):
        adapter = random_lora(params) | random_lora(params, (r"^context_embedder$",), 2)
        with pytest.raises(ValueError, match=r"one rank, not \[2, 3\]"):
            write_lora(tmp_path, adapter, 3.0)
        assert not list(tmp_path.iterdir())


def shuffle(model):
    """Every parameter of the adapters away from zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))


def save_for_a_pipeline(model, directory, settings: bool = True):
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        directory,
        transformer_lora_layers=peft.get_peft_model_state_dict(model, adapter_name="default"),
        transformer_lora_adapter_metadata=(
            model.peft_config["default"].to_dict() if settings else None
        ),
    )


def save_the_adapter(model, directory):
    model.save_lora_adapter(directory)


SEVERAL = ["to_q", "to_k", "net.0.proj", "norm1.linear"]
CONFIGS = {
    "alpha over rank": {"r": 4, "lora_alpha": 6, "target_modules": SEVERAL},
    "all linear layers": {"r": 2, "lora_alpha": 1, "target_modules": "all-linear"},
    "some layers of a run": {
        "r": 3,
        "lora_alpha": 4.5,
        "target_modules": [
            "transformer_blocks.1.attn.to_q",
            "transformer_blocks.2.attn.to_v",
            "proj_out",
        ],
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": SEVERAL,
        "rank_pattern": {"to_q": 2, "transformer_blocks.3.attn.to_k": 7},
        "alpha_pattern": {
            "to_k": 3,
            "^transformer_blocks.1.attn.to_q": 5,
            "ttn.to_q": 50,
        },  # the last: half a name
    },
    "rank stabilised": {"r": 4, "lora_alpha": 3, "target_modules": SEVERAL, "use_rslora": True},
}


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
class TestReadWhatPeftTrained:
    """A torch transformer with PEFT's own adapter against ours with the file."""

    @pytest.fixture
    def model(self):
        return diffusers.SD3Transformer2DModel.from_pretrained(
            SHAPES_DIRECTORY / "transformer"
        ).eval()

    def compare(self, model, ours, apply, path):
        rng = np.random.default_rng(0)
        latents, tokens, pooled = (
            rng.normal(size=shape).astype(np.float32)
            for shape in ((2, 16, 16, 4), (2, LENGTH, 128), (2, 128))
        )
        timestep = np.asarray([900.0, 300.0], np.float32)

        with torch.no_grad():
            expected = model(
                torch.from_numpy(latents.transpose(0, 3, 1, 2)),
                torch.from_numpy(tokens),
                torch.from_numpy(pooled),
                torch.from_numpy(timestep),
            ).sample

        variables = ours.transformer_variables

        def velocity(params):
            v = apply({**variables, "params": params}, latents, timestep, tokens, pooled)
            return np.transpose(v, (0, 3, 1, 2))

        # Merged, so that one compiled network serves every shape of adapter.
        adapter = read_lora(path, variables["params"])
        found = velocity(lora.merge(variables["params"], adapter.factors))
        assert relative(velocity(variables["params"]), expected) > 0.01
        assert relative(found, expected) < 1e-5

    @pytest.mark.parametrize("save", [save_for_a_pipeline, save_the_adapter])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_velocity(self, tmp_path, ours, apply, model, name, save):
        model.add_adapter(peft.LoraConfig(**CONFIGS[name]))
        shuffle(model)
        save(model, tmp_path)
        self.compare(model, ours, apply, tmp_path)

    def test_the_format_of_peft_itself(self, tmp_path, ours, apply, model):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**CONFIGS["patterns"]))
        shuffle(wrapped)
        wrapped.save_pretrained(tmp_path)
        self.compare(wrapped, ours, apply, tmp_path)
        (tmp_path / "adapter_config.json").unlink()
        with pytest.raises(FileError, match=r"adapter_config\.json: no such file"):
            read_lora(tmp_path, ours.transformer_variables["params"])

    def test_a_file_without_alpha_means_rank(self, tmp_path, ours, apply, model):
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=SEVERAL))
        shuffle(model)
        save_for_a_pipeline(model, tmp_path, settings=False)
        self.compare(model, ours, apply, tmp_path)


class TestFlux:
    """The loader of FLUX.1, which keeps alpha in other places, at its own module names."""

    @pytest.fixture
    def pipe(self):
        parts = dict.fromkeys(
            ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"), None
        )
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            transformer=diffusers.FluxTransformer2DModel(**FLUX),
            **parts,
        )

    @pytest.fixture
    def params(self):
        """Kernels of some layers, as our networks name them."""
        shape = jax.ShapeDtypeStruct
        return {
            "transformer_blocks.0:2": {
                "attn": {"to_q": {"kernel": shape((2, 16, 16), jnp.float32)}}
            },
            "single_transformer_blocks.0:2": {
                "proj_out": {"kernel": shape((2, 80, 16), jnp.float32)}
            },
            "proj_out": {"kernel": shape((16, 4), jnp.float32)},
        }

    @staticmethod
    def updates(pipe, params):
        """Module -> the update of its kernel [in, out] that diffusers applies."""
        return {
            name: pipe.transformer.get_submodule(name).get_delta_weight("default_0").T.numpy()
            for names in lora.linear_layers(params).values()
            for name in names
        }

    @staticmethod
    def ours(adapter, params):
        products = {}
        for path, names in lora.linear_layers(params).items():
            leaf = adapter
            for part in path:
                leaf = leaf[part]
            product = np.matmul(leaf["a"], leaf["b"])
            products |= zip(names, product if product.ndim == 3 else [product])
        return products

    @torch.no_grad()
    def test_written(self, tmp_path, pipe, params):
        adapter = random_lora(params, ALL)
        write_lora(tmp_path, adapter, 7.5)
        pipe.load_lora_weights(tmp_path)
        found = self.ours(lora.scaled(adapter, 7.5, 3), params)
        expected = self.updates(pipe, params)
        assert found.keys() == expected.keys() and len(found) == 5
        for name, update in expected.items():
            np.testing.assert_allclose(found[name], update, atol=1e-6, err_msg=name)

    @torch.no_grad()
    def test_alpha_as_tensors(self, tmp_path, pipe, params):
        write_lora(tmp_path, random_lora(params, ALL), 3.0)
        tensors = load_file(tmp_path / FILE_NAMES[0])
        tensors = {k: v[:2] if "lora_A" in k else v[:, :2] for k, v in tensors.items()}
        first = "transformer.transformer_blocks.1.attn.to_q"
        tensors[f"{first}.lora_A.weight"] = np.ones((4, 16), np.float32)
        tensors[f"{first}.lora_B.weight"] = np.ones((16, 4), np.float32)
        modules = {k.rsplit(".", 2)[0] for k in tensors}
        alphas = {f"{m}.alpha": np.float32(1.0 if m == first else 6.0) for m in modules}
        tensors = {k: np.ascontiguousarray(v) for k, v in (tensors | alphas).items()}
        save_file(tensors, tmp_path / FILE_NAMES[0])

        pipe.load_lora_weights(tmp_path)
        adapter = read_lora(tmp_path, params).factors
        assert adapter["transformer_blocks.0:2"]["attn"]["to_q"]["a"].shape == (2, 16, 4)
        found = self.ours(adapter, params)
        for name, update in self.updates(pipe, params).items():
            np.testing.assert_allclose(found[name], update, atol=1e-6, err_msg=name)


class TestFind:
    """Which file a path stands for, and what is said of a path that stands for none."""

    @pytest.fixture
    def run(self, tmp_path):
        """As Flow-GRPO leaves its checkpoints."""
        for step in (30, 60):
            place = tmp_path / f"checkpoint-{step}" / "lora"
            place.mkdir(parents=True)
            save_file({"x": np.ones(1)}, place / FILE_NAMES[1])
            (place.parent / "optimizer.bin").write_bytes(b"")
        return tmp_path

    def test_a_checkpoint_of_flow_grpo(self, run):
        place = run / "checkpoint-60" / "lora"
        assert find_lora(run / "checkpoint-60") == find_lora(place) == place / FILE_NAMES[1]

    def test_its_run_lists_the_checkpoints(self, run):
        with pytest.raises(WeightsError, match="one of its directories: checkpoint-30, checkpoint"):
            find_lora(run)

    def test_the_advice_for_a_pickle(self, tmp_path, params):
        adapter = random_lora(params)
        path = write_lora(tmp_path, adapter, 3.0)
        tensors = {name: torch.from_numpy(value) for name, value in load_file(path).items()}
        path.unlink()
        torch.save(tensors, tmp_path / "pytorch_lora_weights.bin")
        with pytest.raises(WeightsError, match=r"a pickle.*: python -m pec_jax\.convert") as error:
            read_lora(tmp_path, params)
        command = str(error.value).split(": ")[-1].split()
        subprocess.run([sys.executable, *command[1:]], cwd=ROOT, check=True, capture_output=True)
        same(read_lora(tmp_path, params).factors, lora.scaled(adapter, 3.0, 3))
