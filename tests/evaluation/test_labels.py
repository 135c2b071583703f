"""The label of a run: as in the paper for its rows, and for what the paper does not have."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest

from pec_jax.config.registry import CONSTRAINTS, OBJECTIVES
from pec_jax.evaluation.labels import label_of

PAPER = Path(__file__).with_name("paper_table1.csv")  # arXiv 2605.12112, Table 1, as printed

OFF = {
    "objective": {"name": "grpo", **OBJECTIVES.default_sections()},
    "constraints": CONSTRAINTS.default_sections(),
    "perception": {"encoder": "dino"},
}
# What turns each on.
ON = {
    "kl": {"weight": 0.01},
    "clip_higher": {"ratio": 1.4},
    "entropy_reg": {"weight": 0.5},
    "clip_cov": {"share": 0.25},
    "kl_cov": {"weight": 1.5},
    "pec": {"weight": 0.05},
    "pcvae": {"weight": 0.1},
    "pec_target": {"target": 0.9},
}


def config(objective="grpo", encoder="dino", **constraints):
    made = copy.deepcopy(OFF)
    made["objective"]["name"], made["perception"]["encoder"] = objective, encoder
    for name, section in constraints.items():
        made["constraints"].setdefault(name, {}).update(section)
    return made


def test_the_papers_methods_are_named_as_in_the_paper():
    labels = {name: label_of(config(**{name: ON[name]})) for name in CONSTRAINTS}
    with PAPER.open(encoding="utf-8") as file:
        printed = {row["method"] for row in csv.DictReader(file)}
    named = {label.method for name, label in labels.items() if name != "pec_target"}
    assert named | {label_of(OFF).method, "Flux Dev"} == printed


@pytest.mark.parametrize(
    "made, label",
    [
        (config(), ("Flow-GRPO", "", "")),
        (config(kl=ON["kl"]), ("Flow-GRPO w/ KL", "", "0.01")),
        (config(clip_higher=ON["clip_higher"]), ("Clip-Higher", "", "1.4")),
        (config(pec=ON["pec"]), ("PEC", "dino", "0.05")),
        (config(pec={"weight": 3.0, "space": "latent"}), ("PEC", "latent", "3")),
        (config(pcvae=ON["pcvae"], encoder="clip + dino"), ("PCVAE", "clip + dino", "0.1")),
        (config(pec_target=ON["pec_target"]), ("PEC (target)", "dino", "0.9")),
    ],
)
def test_one_constraint(made, label):
    assert label_of(made) == label


def test_several_constraints_are_joined():
    assert label_of(config(pec=ON["pec"], kl=ON["kl"])) == ("PEC + KL", "dino", "0.05 + 0.01")
    three = config(
        pec=ON["pec"], clip_cov={"share": 0.5, "space": "latent"}, clip_higher={"ratio": 2.0}
    )
    assert label_of(three) == (
        "Clip-Cov + Clip-Higher + PEC", "latent + dino", "0.5 + 2 + 0.05",
    )  # fmt: skip


def test_another_objective_is_named():
    assert label_of(config("nft")).method == "DiffusionNFT"
    assert label_of(config("nft", pec=ON["pec"])).method == "DiffusionNFT + PEC"
    assert label_of(config("nft", kl=ON["kl"])).method == "DiffusionNFT w/ KL"


def test_names_of_a_plugin_that_is_not_loaded_stand_for_themselves():
    mine = config("theirs", mine={"weight": 2.0, "space": "perceptual"}, other={"weight": 0.0})
    assert label_of(mine) == ("theirs + mine", "dino", "2")
    without_weight = config(mine={"share": 2.0})
    assert label_of(without_weight) == ("mine", "", "")
