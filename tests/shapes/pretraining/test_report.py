"""The numbers of the model card."""

from __future__ import annotations

from pec_jax.shapes import scenes as shapes
from pec_jax.shapes.pretraining import report


def test_model_card_shows_the_numbers_it_is_given():
    accuracy = dict.fromkeys(shapes.ATTRIBUTES, 0.5) | {"mean": 0.123, "strict": 0.045}
    stages = {name: {"seconds": 61.0} for name in report.STAGES}
    stages["vae"]["psnr_db"] = 31.4
    stages["clip"] |= {"loss": 1.0, "retrieval": 0.5, "retrieval_second": 0.25}
    stages["t5"] |= {"loss": 0.3, "masked_accuracy": 0.7}
    stages["transformer"] |= {"loss": 0.4, "parameters": 1_438_576}
    for name in report.ENCODERS:
        stages[name] |= {
            "pair_accuracy": 0.7,
            "pair_accuracy_best": 0.8,
            "utility_correlation": 0.87,
        }
    stages["dino"] |= {f"knn/{name}": 0.6 for name in shapes.ATTRIBUTES}
    seen = {"entropy": 0.987, "finish": 0.41, "finish_std": 0.2}
    samples = {"10 steps": {"specified": accuracy, "open": seen}}
    card = report.model_card(
        {
            "stages": stages,
            "samples": samples,
            "web": {"finish": 0.4, "finish_std": 0.2},
            "bytes": 12_345_678,
            "seed": 0,
            "steps_scale": 1.0,
        }
    )
    for text in ("31.4 dB", "4.5%", "98.7%", "0.41 ± 0.20", "1.44 M", "12.3 MB", "61 s"):
        assert text in card
    assert "license: apache-2.0" in card
