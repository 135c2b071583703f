"""The numbers of the model card."""

from __future__ import annotations

import numpy as np

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import report


def test_color_entropy_is_relative_to_a_flat_histogram():
    np.testing.assert_allclose(report.color_entropy(np.repeat(np.arange(8), 5)), 1.0)
    np.testing.assert_allclose(report.color_entropy(np.array([3, 3, 5, 5])), 1 / 3)
    assert report.color_entropy(np.array([2, 2])) == 0.0
    assert report.color_entropy(np.array([], int)) == 0.0


def test_model_card_shows_the_numbers_it_is_given():
    accuracy = dict.fromkeys(shapes.ATTRIBUTES, 0.5) | {"mean": 0.123, "strict": 0.045}
    stages = {name: {"seconds": 61.0} for name in report.STAGES}
    stages["vae"]["psnr_db"] = 31.4
    stages["clip"] |= {"loss": 1.0, "retrieval_640": 0.5, "retrieval_640_second": 0.25}
    stages["t5"] |= {"loss": 0.3, "masked_accuracy": 0.7}
    stages["transformer"] |= {"loss": 0.4, "parameters": 1_438_576}
    stages["pickscore"] |= {"pair_accuracy": 0.7, "pair_accuracy_best": 0.8, "order_accuracy": 0.9}
    stages["dino"] |= {f"knn/{name}": 0.6 for name in shapes.ATTRIBUTES}
    samples = {"10 steps": {"specified": accuracy, "open": {"color_entropy": 0.987}}}
    card = report.model_card(
        {"stages": stages, "samples": samples, "bytes": 12_345_678, "seed": 0, "steps_scale": 1.0}
    )
    for text in ("31.4 dB", "12.3%", "4.5%", "98.7%", "1.44 M", "12.3 MB", "61 s"):
        assert text in card
    assert "max_sequence_length=14" in card
    assert "license: apache-2.0" in card
