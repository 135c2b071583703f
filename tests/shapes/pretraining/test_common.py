"""What the stages share."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pec_jax.models.clip import CLIPConfig, CLIPModel
from pec_jax.models.layers import Dense
from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import common, skeleton


def test_captions_of_every_openness_are_common_and_true():
    key = jax.random.key(0)
    attributes = shapes.fill_open(key, jnp.full((2000, 6), shapes.OPEN))
    named = np.asarray(common.hide_some(jax.random.fold_in(key, 1), attributes, 0.3))
    kept = named >= 0
    np.testing.assert_array_equal(named[kept], np.asarray(attributes)[kept])
    share = np.bincount(kept.sum(-1), minlength=7) / 2000
    assert share.min() > 0.06  # each number of named attributes, none to six
    assert 0.3 < share[6] < 0.5


def test_augmentation_is_light_and_stays_in_range():
    images = common.draw_pictures(jax.random.key(0), 64).images
    augmented = common.augment(jax.random.key(1), images)
    assert float(augmented.min()) >= 0.0
    assert float(augmented.max()) <= 1.0
    change = float(jnp.mean(jnp.abs(augmented - images)))
    assert 0.002 < change < 0.02


def test_pictures_show_every_value_and_many_finishes():
    drawn = common.draw_pictures(jax.random.key(0), 512)
    assert drawn.images.shape == (512, 64, 64, 3)
    for i, values in enumerate(shapes.VALUES):
        assert set(np.asarray(drawn.attributes)[:, i]) == set(range(len(values)))
    assert np.asarray(drawn.defects).std(0).min() > 0.2


def test_flat_dense_changes_speed_only():
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    layer = Dense(4)
    variables = common.initialise(layer, jax.random.key(1), x)
    with nn.intercept_methods(common.flat_dense):
        flat = layer.apply(variables, x)
    np.testing.assert_allclose(flat, layer.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_saved_clip_reads_back_and_keeps_its_scalar(tmp_path):
    from safetensors import safe_open

    text = skeleton.text_config(40, 39, "quick_gelu")
    config = {"text_config": text, "vision_config": skeleton.CLIP_VISION, "projection_dim": 64}
    module = CLIPModel(CLIPConfig.from_dict(config))
    inputs = (np.zeros((1, 12), np.int32), jnp.zeros((1, 64, 64, 3)))
    variables = common.initialise(module, jax.random.key(0), *inputs)
    size = common.save(tmp_path, variables, "model")
    assert size == sum(2 * p.size for p in jax.tree.leaves(variables))  # half precision
    back = common.load(tmp_path, module, "model", *inputs)
    halves = jax.tree.map(lambda p: np.float32(np.float16(p)), variables)
    jax.tree.map(np.testing.assert_array_equal, halves, back)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.get_slice("logit_scale").get_shape() == []
        assert file.metadata() == {"format": "pt"}


def test_only_position_embeddings_of_images_are_widened():
    module = CLIPModel(
        CLIPConfig.from_dict(
            {
                "text_config": skeleton.text_config(40, 39, "gelu"),
                "vision_config": skeleton.CLIP_VISION,
                "projection_dim": 64,
            }
        )
    )
    inputs = (np.zeros((1, 12), np.int32), jnp.zeros((1, 64, 64, 3)))
    before = common.initialise(module, jax.random.key(0), *inputs)["params"]
    after = common.spread_positions(before)
    changed = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after))
        if not np.array_equal(a, b)
    ]
    assert len(changed) == 1
    assert "vision_model" in changed[0]
    assert "position_embedding" in changed[0]
