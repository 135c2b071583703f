"""Pipeline directories written by diffusers, read by us, and the other way round."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from copy import deepcopy

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from pec_jax.config import ConfigError
from pec_jax.errors import FileError
from pec_jax.families import networks
from pec_jax.families.networks import AUTOENCODER_KL, load_network, save_network
from pec_jax.families.pipeline import load_pipeline, load_transformer
from pec_jax.families.tiny import write_transformer
from pec_jax.io import read_json
from pec_jax.shapes.pretraining import tokenizers
from pec_jax.weights.tensors import WeightsError, read_tensors
from tests.weights.test_single_files import ALL_IN_ONE, checkpoint, sd3_shapes

CAPTIONS = ["a small red cat in the snow", "two large blue houses at the top", "a thing"]


def text_parts(root):
    """Tokenizers and text encoders of the smallest kind."""
    tokenizers.write_clip_tokenizer(root / "tokenizer", CAPTIONS, tokenizers.END)
    tokenizers.write_clip_tokenizer(root / "tokenizer_2", CAPTIONS, "!")
    tokenizers.write_t5_tokenizer(root / "tokenizer_3", CAPTIONS)
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    found = {name: AutoTokenizer.from_pretrained(root / name) for name in names}
    clip = CLIPTextConfig(
        vocab_size=len(found["tokenizer"]),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizers.MAX_LENGTH,
        projection_dim=12,
        eos_token_id=len(found["tokenizer"]) - 1,
    )
    t5 = T5Config(
        vocab_size=len(found["tokenizer_3"]),
        d_model=40,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return found | {
        "text_encoder": CLIPTextModelWithProjection(clip),
        "text_encoder_2": CLIPTextModelWithProjection(clip),
        "text_encoder_3": T5EncoderModel(t5),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A whole pipeline, saved by diffusers itself."""
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        latent_channels=3,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **text_parts(tmp_path_factory.mktemp("text")),
    )
    root = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(root)
    return root, transformer.eval(), vae.eval()


@pytest.fixture
def copy(saved, tmp_path):
    """The same directory, to be damaged."""
    return shutil.copytree(saved[0], tmp_path / "pipeline")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class TestLoad:
    def test_facts_of_the_pipeline(self, saved):
        pipeline = load_pipeline(saved[0], text=False)
        assert pipeline.text is None
        assert pipeline.scheduler["shift"] == 3.0
        assert pipeline.vae_scale_factor == 2
        assert pipeline.latent_channels == 3
        assert pipeline.default_size == 8
        assert pipeline.vae.config.shift_factor == 0.1
        for leaf in jax.tree.leaves((pipeline.transformer_variables, pipeline.vae_variables)):
            assert isinstance(leaf, np.ndarray)
            assert leaf.dtype == np.float32

    def test_sizes(self, saved):
        pipeline = load_pipeline(saved[0], text=False)
        assert pipeline.latent_shape() == (4, 4, 3)
        assert pipeline.latent_shape(12, 0) == (6, 4, 3)
        with pytest.raises(ConfigError, match=r"width is 10 .*multiples of 4, such as 8\."):
            pipeline.latent_shape(12, 10)

    def test_schedule_and_images_are_those_of_diffusers(self, saved):
        pipeline = load_pipeline(saved[0], text=False)
        theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(saved[0] / "scheduler")
        theirs.set_timesteps(7)
        found = pipeline.sigmas(7, pipeline.latent_shape())
        np.testing.assert_allclose(found, theirs.sigmas.numpy(), atol=1.2e-7)
        latents = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
        with torch.no_grad():
            decoded = saved[2].decode(torch.from_numpy(latents) / 1.5 + 0.1).sample
        expected = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        images = pipeline.decode(pipeline.vae_variables, jnp.asarray(np.moveaxis(latents, 1, -1)))
        np.testing.assert_allclose(images, expected, atol=1e-5)

    def test_text_conditions_the_transformer(self, saved):
        pipeline = load_pipeline(saved[0])
        conditioning = pipeline.text.encode(CAPTIONS[:2])
        velocity = jax.jit(pipeline.transformer.apply)(
            pipeline.transformer_variables,
            jnp.ones((2, 4, 4, 3)),
            jnp.full((2,), 500.0),
            conditioning.tokens,
            conditioning.pooled,
        )
        theirs = saved[1]
        with torch.no_grad():
            expected = theirs(
                hidden_states=torch.ones(2, 3, 4, 4),
                timestep=torch.full((2,), 500.0),
                encoder_hidden_states=torch.from_numpy(np.array(conditioning.tokens)),
                pooled_projections=torch.from_numpy(np.array(conditioning.pooled)),
            ).sample.permute(0, 2, 3, 1)
        assert np.abs(velocity - expected.numpy()).max() < 1e-5 * expected.abs().max()

    def test_precisions_are_apart(self, saved):
        pipeline = load_pipeline(
            saved[0], jnp.bfloat16, text=False, param_dtype=jnp.bfloat16, remat="full"
        )
        assert pipeline.transformer.dtype == jnp.bfloat16
        assert pipeline.transformer.remat == "full"
        assert pipeline.vae.dtype == jnp.float32
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(pipeline.transformer_variables)}
        assert dtypes == {np.dtype(jnp.bfloat16)}
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(pipeline.vae_variables)}
        assert dtypes == {np.dtype("float32")}

    def test_sharded_transformer(self, saved, copy):
        shutil.rmtree(copy / "transformer")
        saved[1].save_pretrained(copy / "transformer", max_shard_size="20KB")
        shards = sorted((copy / "transformer").glob("*.safetensors"))
        assert len(shards) > 1
        ours = load_pipeline(copy, text=False).transformer_variables
        whole = load_pipeline(saved[0], text=False).transformer_variables
        jax.tree.map(np.testing.assert_array_equal, ours, whole)
        shards[-1].unlink()
        with pytest.raises(WeightsError, match=rf"{shards[-1].name}: missing shard"):
            load_pipeline(copy, text=False)

    def test_a_variant_is_preferred_where_there_is_one(self, saved, copy):
        half = deepcopy(saved[1]).half()
        half.save_pretrained(copy / "transformer", variant="fp16", max_shard_size="20KB")
        assert list((copy / "transformer").glob("*.safetensors.index.fp16.json"))
        ours = load_pipeline(copy, text=False, variant="fp16")
        whole = load_pipeline(copy, text=False)
        for a, b in zip(
            jax.tree.leaves(ours.transformer_variables),
            jax.tree.leaves(whole.transformer_variables),
        ):
            np.testing.assert_array_equal(a, b.astype(np.float16).astype(np.float32))
        jax.tree.map(np.testing.assert_array_equal, ours.vae_variables, whole.vae_variables)

    def test_onto_devices(self, saved):
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = load_pipeline(saved[0], text=False, sharding=sharding).transformer_variables
        host = load_pipeline(saved[0], text=False).transformer_variables
        assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(placed))
        jax.tree.map(np.testing.assert_array_equal, placed, host)


LOAD = """
import resource, sys
import jax, jax.numpy as jnp
from pec_jax.families.pipeline import load_transformer
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_, variables = load_transformer(sys.argv[1], param_dtype=jnp.bfloat16, sharding=sharding)
jax.block_until_ready(variables)
size = sum(a.nbytes for a in jax.tree.leaves(variables))
print(size, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_loading_takes_little_more_memory_than_the_weights(tmp_path):
    """350 MB of weights in one file: neither the file nor a second copy stays in memory."""
    config = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 2,
        "num_single_layers": 6,
        "num_attention_heads": 8,
    }
    write_transformer(tmp_path, config, dtype=jnp.bfloat16)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    size, peak = map(int, done.stdout.split())
    assert size > 3e8
    assert peak < size + 1.2e8  # one tensor, its transpose, and what imports and XLA take


class TestSave:
    def test_diffusers_reads_what_we_write(self, saved, tmp_path):
        root, theirs, _ = saved
        module, variables = load_transformer(root / "transformer")
        save_network(tmp_path, read_json(root / "transformer" / "config.json"), variables)
        reloaded = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
        for name, tensor in theirs.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor), name
        again, same = load_transformer(tmp_path)
        assert again == module
        jax.tree.map(np.testing.assert_array_equal, same, variables)

    def test_stem_and_adapters(self, saved, tmp_path):
        _, variables = load_network(AUTOENCODER_KL, saved[0] / "vae")
        save_network(tmp_path, {"a": 1}, {**variables, "lora": {"x": np.ones(2)}}, "model")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
        assert set(read_tensors(tmp_path)) == set(saved[2].state_dict())


class TestClearErrors:
    def test_no_such_directory(self, tmp_path):
        with pytest.raises(WeightsError, match="nowhere: no such model directory"):
            load_pipeline(tmp_path / "nowhere")

    def test_not_a_pipeline(self, tmp_path):
        with pytest.raises(FileError, match=r"model_index\.json: no such file"):
            load_pipeline(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"_class_name": "OtherPipeline"},
                "OtherPipeline; supported: StableDiffusion3Pipeline",
            ),
            ({"_class_name": "FluxPipeline"}, "transformer is a SD3.*; supported: Flux"),
            ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer is a Flux"),
            ({"vae": [None, None]}, "vae is absent"),
            ({"scheduler": "FlowMatchEulerDiscreteScheduler"}, "scheduler is absent"),
            ({"text_encoder_2": [None, None]}, "text_encoder_2 is absent"),
        ],
    )
    def test_index(self, copy, change, message):
        edit(copy / "model_index.json", **change)
        with pytest.raises(WeightsError, match=rf"model_index\.json.*{message}"):
            load_pipeline(copy)

    def test_text_classes_do_not_matter_without_text(self, copy):
        edit(copy / "model_index.json", text_encoder_3=[None, None])
        shutil.rmtree(copy / "text_encoder_3")
        assert load_pipeline(copy, text=False).text is None

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("transformer", {"_class_name": "Other"}, "is a Other; supported: SD3Transformer"),
            ("transformer", {"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
            ("transformer", {"num_layers": "3"}, "num_layers = '3' .* whole number from 1 to 1000"),
            ("transformer", {"num_layers": 10**12}, "num_layers = 1000000000000"),
            ("transformer", {"patch_size": 64}, "sample_size 4 must be at least patch_size 64"),
            ("transformer", {"caption_projection_dim": None}, "caption_projection_dim 1152"),
            ("transformer", {"pos_embed_max_size": 10**6}, "pos_embed_max_size = 1000000"),
            ("transformer", {"quantization_config": {"a": 1}}, "quantization_config is not"),
            ("transformer", {"dual_attention_layers": ["x"]}, "dual_attention_layers"),
            ("vae", {"block_out_channels": 8}, "block_out_channels = 8 .* a list"),
            ("vae", {"scaling_factor": float("nan")}, "scaling_factor = nan .* a finite number"),
            ("vae", {"norm_num_groups": 0}, "norm_num_groups = 0 .* from 1"),
            ("vae", {"use_quant_conv": "no"}, "use_quant_conv = 'no' .* true or false"),
        ],
    )
    def test_config(self, copy, file, change, message):
        edit(copy / file / "config.json", **change)
        with pytest.raises(WeightsError, match=rf"{file}/config\.json: .*({message})"):
            load_pipeline(copy, text=False)

    def test_weights_of_another_config(self, copy):
        edit(copy / "transformer" / "config.json", num_layers=4)
        with pytest.raises(WeightsError, match=r"transformer: .*missing.*'transformer_blocks\.2"):
            load_pipeline(copy, text=False)
        edit(copy / "transformer" / "config.json", num_layers=3, pooled_projection_dim=25)
        message = r"text_embedder\.linear_1\.weight' has shape \[16, 24\], expected \[16, 25\]"
        with pytest.raises(WeightsError, match=message):
            load_pipeline(copy, text=False)

    def test_parts_of_different_models(self, saved, copy):
        config = dict(saved[2].config) | {"latent_channels": 4}
        shutil.rmtree(copy / "vae")
        diffusers.AutoencoderKL.from_config(config).save_pretrained(copy / "vae")
        with pytest.raises(WeightsError, match="the autoencoder has 4"):
            load_pipeline(copy, text=False)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shift": "x"}, "shift = 'x' .* a number from 0.01 to 100"),
            ({"shift": None}, "shift = None"),
            ({"num_train_timesteps": 0}, "num_train_timesteps = 0"),
        ],
    )
    def test_scheduler(self, copy, change, message):
        edit(copy / "scheduler" / "scheduler_config.json", **change)
        with pytest.raises(WeightsError, match=rf"scheduler/scheduler_config\.json: {message}"):
            load_pipeline(copy, text=False)

    @pytest.mark.parametrize(
        ("part", "remedy"),
        [
            ("scheduler", "fetch the directory scheduler$"),
            ("transformer", "fetch the directory transformer$"),
            ("vae", "fetch the directory vae$"),
            ("tokenizer_2", "fetch the directory tokenizer_2$"),
            ("text_encoder", "fetch the directory text_encoder$"),
            (
                "text_encoder_3",
                r'fetch .* or write "text_encoder_3": \[null, null\] and '
                r'"tokenizer_3": \[null, null\]',
            ),
        ],
    )
    def test_a_part_that_is_not_there(self, copy, part, remedy):
        shutil.rmtree(copy / part)
        message = rf"model_index\.json: names {part}, which is not there: {remedy}"
        with pytest.raises(WeightsError, match=message):
            load_pipeline(copy)

    def test_without_t5_as_the_remedy_says(self, copy):
        shutil.rmtree(copy / "text_encoder_3")
        absent = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
        edit(copy / "model_index.json", **absent)
        assert set(load_pipeline(copy).text.towers) == {"clip", "clip_2"}

    def test_everything_is_checked_before_any_weights_are_read(self, copy, monkeypatch):
        monkeypatch.setattr(networks, "from_torch", lambda *args, **kwargs: pytest.fail("read"))
        edit(copy / "text_encoder_3" / "config.json", num_layers=10**7)
        with pytest.raises(WeightsError, match=r"text_encoder_3/config\.json: num_layers = 1000"):
            load_pipeline(copy)
        edit(copy / "text_encoder_3" / "config.json", num_layers=2)
        with pytest.raises(WeightsError, match=r"text_encoder_3: .* missing.*block\.1"):
            load_pipeline(copy)


class TestTransformer:
    """One in place of the pipeline's own."""

    @pytest.fixture(scope="class")
    def files(self, saved, tmp_path_factory):
        """A file by the publisher's names, and what diffusers makes of it, as a directory."""
        root = tmp_path_factory.mktemp("transformer")
        config = dict(saved[1].config)
        state = checkpoint(sd3_shapes(config), torch.float32, ALL_IN_ONE)
        save_file(state, root / "sd3.5_tiny.safetensors")
        torch.save(state, root / "sd3.5_tiny.pt")
        theirs = deepcopy(saved[1])
        theirs.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(state))
        theirs.save_pretrained(root / "directory")
        return root

    @pytest.mark.parametrize("name", ["sd3.5_tiny.safetensors", "sd3.5_tiny.pt"])
    def test_a_file_is_what_diffusers_makes_of_it(self, saved, files, name):
        ours = load_pipeline(saved[0], text=False, transformer=files / name)
        theirs = load_pipeline(saved[0], text=False, transformer=files / "directory")
        own = load_pipeline(saved[0], text=False)
        same = jax.tree.map(np.array_equal, ours.transformer_variables, own.transformer_variables)
        assert not any(jax.tree.leaves(same["params"]))
        jax.tree.map(
            np.testing.assert_array_equal,
            ours.transformer_variables,
            theirs.transformer_variables,
        )
        jax.tree.map(np.testing.assert_array_equal, ours.vae_variables, own.vae_variables)

    def test_the_pipelines_own_need_not_be_there(self, copy, files):
        file = files / "sd3.5_tiny.safetensors"
        (copy / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        load_pipeline(copy, text=False, transformer=file)
        edit(copy / "transformer" / "config.json", num_layers=4)
        with pytest.raises(WeightsError, match=r"sd3\.5_tiny\.safetensors: .* missing"):
            load_pipeline(copy, text=False, transformer=file)

    def test_what_is_none(self, saved, files, tmp_path):
        flux = tmp_path / "flux1-dev.safetensors"
        save_file({"double_blocks.0.img_attn.qkv.bias": torch.ones(3)}, flux)
        gguf = tmp_path / "flux1-dev-Q4_0.gguf"
        gguf.write_bytes(b"GGUF")
        for path, message in (
            (flux, "holds the transformer of a FluxPipeline, but .* is a StableDiffusion3Pipeline"),
            (gguf, "GGUF is not supported: use the safetensors that .*stable-diffusion-3.5-medium"),
            (saved[0], r"is a whole pipeline; its transformer alone is .*/transformer"),
            (tmp_path / "nothing", "no such file or directory"),
        ):
            with pytest.raises(WeightsError, match=f"{path.name}: {message}"):
                load_pipeline(saved[0], text=False, transformer=path)
