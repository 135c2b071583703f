"""`compare`: from run directories made by hand to table, figures and report."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pec_jax.errors import FileError, RunError
from pec_jax.evaluation import comparison, run_table
from pec_jax.evaluation.table import COMPUTED, normalise

CONFIG = {
    "seed": 0,
    "objective": {"name": "grpo", "grpo": {"clip_low": 1e-4}, "nft": {"beta": 1.0}},
    "constraints": {
        "clip_cov": {"share": 0.0, "space": "latent"},
        "clip_higher": {"ratio": 1.0},
        "kl": {"weight": 0.0},
        "pec": {"weight": 0.0, "unit": "raw"},
        "pec_target": {"target": 0.0},
    },
    "perception": {"encoder": "dino", "estimator": "knn"},
    "rewards": {"pickscore": {"weight": 1.0, "evaluate": False}},
    "encoders": {"dino": {"evaluate": False}, "clip": {"evaluate": False, "model": ""}},
    "schedule": {"log_every": 1},
}


def make_run(directory, seed=0, quality=1.0, diversity=1.0, base=0.5, **changes):
    """A finished run; changes are config fields with __ for the dot."""
    directory.mkdir(parents=True)
    config = copy.deepcopy(CONFIG)
    config["seed"] = seed
    for name, value in changes.items():
        *path, field = name.split("__")
        section = config
        for part in path:
            section = section.setdefault(part, {})
        section[field] = value
    (directory / "config.json").write_text(json.dumps(config))
    numbers = {
        "quality/a": quality + 0.01 * seed,
        "quality/a/low": 0.0,
        "diversity/pairwise_l2_dino": diversity,
    }
    evaluation = {
        **numbers,
        "diversity/variance_dino": 1.0,
        **{f"base/{k}": base for k in numbers},
        "base/diversity/variance_dino": 1.0,
        "seed": seed,
    }
    (directory / "eval.json").write_text(json.dumps(evaluation))
    rng = np.random.default_rng(seed)
    lines = [{"step": 1, "quality/a": 1.0}]
    for i in range(5):
        names = ("reward/mean", "reward/std", "entropy/policy", "entropy/perceptual")
        lines.append({"step": i + 1, **{n: float(rng.normal()) for n in names}})
    lines[-1]["reward/std"] = "nan"
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "samples").mkdir()
    for step, level in ((0, 0), (5, 255)):
        path = directory / "samples" / f"step_{step:06d}.png"
        Image.new("RGB", (8, 8), (level, seed, 0)).save(path)
    return directory


@pytest.fixture
def runs(tmp_path):
    """Three methods, two seeds each."""
    for seed in (0, 1):
        make_run(tmp_path / "runs" / f"none_{seed}", seed, 2.0, 0.1)
        make_run(
            tmp_path / "runs" / f"pec_{seed}", seed, 1.5, 0.9,
            constraints__pec__weight=1.5,
        )  # fmt: skip
        make_run(
            tmp_path / "runs" / f"cov_{seed}", seed, 1.9, 0.2,
            constraints__clip_cov__share=0.2,
        )  # fmt: skip
    return tmp_path / "runs"


def test_seeds_are_gathered_and_rows_named_as_in_the_paper(runs):
    found = run_table.rows_of_runs(run_table.find_runs([runs]))
    labels = [(row.method, row.perceptual_space, row.weight, row.seeds) for row, _ in found]
    assert labels == [
        ("Base", "", "", ["0", "1"]),
        ("Clip-Cov", "latent", "0.2", ["0", "1"]),
        ("Flow-GRPO", "", "", ["0", "1"]),
        ("PEC", "dino", "1.5", ["0", "1"]),
    ]
    rows = normalise([row for row, _ in found])
    assert rows[0].mean("quality/a") == 0.5
    assert rows[2].mean(COMPUTED[0]) == pytest.approx(1.0)


def test_configs_of_one_name_are_told_apart(runs):
    for seed in (0, 1):
        make_run(
            runs / f"pec_gaussian_{seed}", seed,
            constraints__pec__weight=1.5, perception__estimator="gaussian",
        )  # fmt: skip
    found = run_table.rows_of_runs(run_table.find_runs([runs]))
    methods = {row.method for row, _ in found}
    assert "PEC (perception.estimator=gaussian)" in methods
    assert "PEC (perception.estimator=knn)" in methods


def test_a_run_with_another_schedule_is_another_seed_of_the_same(runs):
    make_run(runs / "none_2", 2, schedule__log_every=5)
    found = run_table.rows_of_runs(run_table.find_runs([runs]))
    assert next(r for r, _ in found if r.method == "Flow-GRPO").seeds == ["0", "1", "2"]


def test_what_is_off_does_not_set_a_run_apart(runs):
    """Nor do sections that a plugin added and this run did not use."""
    make_run(
        runs / "none_2", 2, constraints__pec__unit="reward_std", objective__nft__beta=0.1,
        encoders__clip__model="elsewhere", constraints__mine__weight=0.0,
        rewards__warmth={"weight": 0.0, "evaluate": False},
    )  # fmt: skip
    found = run_table.rows_of_runs(run_table.find_runs([runs]))
    assert next(r for r, _ in found if r.method == "Flow-GRPO").seeds == ["0", "1", "2"]
    make_run(runs / "none_3", 3, rewards__warmth={"weight": 0.1, "evaluate": False})
    methods = [row.method for row, _ in run_table.rows_of_runs(run_table.find_runs([runs]))]
    warm = [f"(rewards.warmth.evaluate={a}, rewards.warmth.weight={b})" for a, b in
            (("off", "off"), (False, 0.1))]  # fmt: skip
    assert {f"Flow-GRPO {extra}" for extra in warm} <= set(methods)


def test_a_run_of_an_earlier_version_is_answered_with_a_sentence(runs):
    make_run(runs / "old", constraint={"name": "pec", "weight": 1.5})
    with pytest.raises(RunError, match=r"old/config.json was written by an earlier version"):
        run_table.find_runs([runs])


def test_a_config_that_says_too_little_or_nonsense_is_answered_with_a_sentence(tmp_path):
    run = make_run(tmp_path / "run", constraints__pec__wieght=1.0)
    with pytest.raises(RunError, match=r"this version: .*unknown field 'wieght'"):
        run_table.read_run(run)
    run = make_run(tmp_path / "number", encoders=0)
    with pytest.raises(RunError, match="lacks encoders"):
        run_table.read_run(run)
    (run / "config.json").write_text('{"seed": 0}')
    with pytest.raises(RunError, match="lacks objective, constraints"):
        run_table.read_run(run)


def test_everything_is_written(runs, tmp_path, capsys):
    out = tmp_path / "out"
    comparison.compare_runs([runs], out)
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert names == [
        "figures/quality_diversity.png",
        "figures/reward_entropy.png",
        "figures/training_curves.png",
        "report.html",
        "table.csv",
        "table.md",
    ]
    printed = capsys.readouterr().out
    assert "PEC dino 1.5" in printed and "report.html" in printed


def test_the_report_is_self_contained_and_shows_the_grids(runs, tmp_path, capsys):
    comparison.compare_runs([runs], tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    # Base once, Flow-GRPO and the best before and after training; and the last of the other row.
    assert page.count("data:image/webp;base64,") == 1 + 2 + 2 + 1
    for outside in ("http:", "https:", "<link"):
        assert outside not in page
    assert "±" in page and "PEC dino 1.5 has the greatest overall score" in page


def test_mistakes_are_sentences(runs, tmp_path):
    with pytest.raises(RunError, match="holds none"):
        run_table.find_runs([tmp_path / "nothing"])
    (runs / "none_0" / "eval.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        run_table.find_runs([runs])
    (runs / "none_0" / "eval.json").write_text("[1]")
    with pytest.raises(FileError, match="must hold a JSON object"):
        run_table.find_runs([runs])
    (runs / "none_0" / "eval.json").write_text("{")
    with pytest.raises(FileError, match="not valid JSON"):
        run_table.find_runs([runs])


def test_one_seed_twice_is_refused(runs):
    make_run(runs / "again", 0)
    with pytest.raises(RunError, match="one config with one seed"):
        run_table.rows_of_runs(run_table.find_runs([runs]))


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "pec_jax.compare", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )


def test_the_command(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("method,quality/a,diversity/b\nx,1,2\ny,2,1\n")
    done = command(f"--table={path}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "figures" / "quality_diversity.png").exists()
    wrong = command(f"--table={tmp_path / 'none.csv'}", f"--out={tmp_path / 'out'}")
    assert wrong.returncode == 2 and wrong.stderr.startswith("Error: cannot read")
    assert command(f"--table={path}").returncode != 0


def test_the_command_on_labels_that_are_more_than_text(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        'method,quality/a,diversity/b\n"$\\frac{1}{$",1,2\n<script>,2,1\n"a|\nb",3,3\n=cmd,1,1\n'
    )
    done = command(f"--table={path}", f"--out={tmp_path / 'out'}")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "out" / "table.md").read_text()
    assert "<script>" not in text and r"| a\| b |" in text
    assert {line.count("|") - line.count(r"\|") for line in text.splitlines()[:6]} == {10}
    assert "\n'=cmd," in (tmp_path / "out" / "table.csv").read_text()
    assert (tmp_path / "out" / "report.html").read_text().count("<script") == 2  # ours
    path.write_text("method,quality/a,diversity/b\nx,1,1e308\n")
    wrong = command(f"--table={path}", f"--out={tmp_path / 'out'}")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1


def test_the_command_does_not_wait_for_jax():
    code = "import sys; from pec_jax.evaluation import comparison; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
