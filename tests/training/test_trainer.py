"""Whole runs: what they write, that they compile once, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from pec_jax.config.registry import REWARDS
from pec_jax.errors import RunError
from pec_jax.rewards import register
from pec_jax.rewards.host import host_reward
from pec_jax.training import trainer as train_lib
from tests.conftest import ROOT, small_config_dict

METRICS = {
    "reward/mean",
    "reward/std",
    "reward/pickscore",
    "entropy/policy",
    "entropy/policy_mc",
    "entropy/perceptual",
    "diversity/variance_perceptual",
    "diversity/variance_latent",
    "diversity/variance_pixel",
    "diversity/variance_reward",
    "policy/ratio_max_deviation",
    "policy/clip_fraction",
    "policy/kl",
    "policy/grad_norm",
    "advantage/prob_max",
    "advantage/prob_min",
    "time/step_seconds",
    "time/images_per_second",
}

# The small config as flags, for runs in processes of their own.
SMALL = [
    "--config=configs/shapes_pec.py",
    "--config.num_iterations=8",
    "--config.trainable.rank=4",
    "--config.sampler.num_steps=3",
    "--config.batch.groups=2",
    "--config.batch.group_size=4",
    "--config.perception.k=1",
    "--config.eval.num_prompts=2",
    "--config.eval.groups=2",
    "--config.eval.images_per_prompt=2",
    "--config.eval.num_steps=2",
    "--config.eval.sample_rows=1",
    "--config.eval.sample_columns=2",
    "--config.schedule.checkpoint_every=3",
    "--config.schedule.sample_every=0",
]


def read_metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 4 iterations: (directory, result, what was compiled after the first).

    From the second iteration on, evaluations, samples and checkpoints included, an implicit
    transfer between host and device is an error.
    """
    directory = tmp_path_factory.mktemp("run")
    compiled = []

    def listen(event, seconds, **about):
        if event.endswith("backend_compile_duration"):
            compiled.append(about)

    class Run(train_lib._Run):
        def loop(self, stop):
            agreed = stop.agreed

            def guarded(iteration):
                if iteration == 1:
                    compiled.clear()
                    jax.config.update("jax_transfer_guard", "disallow")
                return agreed(iteration)

            stop.agreed = guarded
            return super().loop(stop)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_lib, "_Run", Run)
            # No other test has evaluated this base model: the evaluator compiles at the start.
            patch.setenv("PEC_JAX_CACHE", str(tmp_path_factory.mktemp("own")))
            result = train_lib.train(small_config_dict(), directory)
    finally:
        jax.config.update("jax_transfer_guard", "allow")
        jax.monitoring.unregister_event_duration_listener(listen)
    return directory, result, compiled


def test_a_run_directory_holds_what_it_should(finished):
    directory, result, _ = finished
    lines = read_metrics(directory)
    steps = [line for line in lines if "reward/mean" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert set(steps[0]) >= METRICS
    assert any("quality/pickscore" in line for line in lines)  # evaluation in between
    assert sorted(p.name for p in (directory / "samples").iterdir()) == [
        "step_000000.png",
        "step_000002.png",
        "step_000004.png",
    ]
    with Image.open(directory / "samples" / "step_000004.png") as sheet:
        assert np.asarray(sheet).std() > 1
    assert json.loads((directory / "eval.json").read_text()) == result
    assert result["iterations"] == 4 and result["seed"] == 0
    for name in ("quality/pickscore", "diversity/pairwise_l2_dino", "diversity/vendi_clip"):
        assert result[f"{name}/low"] <= result[name] <= result[f"{name}/high"]
        assert f"base/{name}" in result
    assert result["distance/frechet_dino"] > 0 and "base/distance/frechet_dino" not in result
    assert {p.name for p in directory.glob("eval_base.*")} == {
        "eval_base.json",
        "eval_base.safetensors",
    }
    assert json.loads((directory / "config.json").read_text())["batch"]["groups"] == 2
    assert list(directory.glob("events.out.tfevents*"))
    assert {p.name for p in (directory / "checkpoints").iterdir() if p.name.isdigit()} == {"2", "4"}


def test_nothing_is_compiled_after_the_first_iteration(finished):
    assert finished[2] == []


def test_the_policy_entropy_stays_constant(finished):
    steps = [line for line in read_metrics(finished[0]) if "reward/mean" in line]
    values = [line["entropy/policy"] for line in steps]
    assert max(values) - min(values) < 1e-6
    assert all(line["policy/ratio_max_deviation"] == 0 for line in steps)


def test_a_finished_run_started_again_changes_nothing(finished):
    directory, result, _ = finished
    before = (directory / "metrics.jsonl").read_text()
    again = train_lib.train(small_config_dict(), directory)
    assert again == result
    assert (directory / "metrics.jsonl").read_text() == before


def test_a_work_directory_of_another_config_is_refused(finished):
    config = small_config_dict()
    config.optimizer.learning_rate = 0.125
    with pytest.raises(RunError) as error:
        train_lib.train(config, finished[0])
    assert "config.optimizer.learning_rate: 0.003 there, 0.125 now" in str(error.value)
    assert "--allow_config_change" in str(error.value)


def start(directory, cache, *flags):
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(cache))
    command = [sys.executable, "-m", "pec_jax.main", *SMALL, f"--workdir={directory}", *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def remote():
    """Flags that add the reward of launch/reward_server.py, which runs meanwhile."""
    command = [sys.executable, ROOT / "launch" / "reward_server.py", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        url = server.stdout.readline().strip()
        yield ["--config.rewards.remote.weight=0.5", f"--config.rewards.remote.url={url}"]
        server.kill()


def finish(process):
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_for_line(directory, process, step):
    """Blocks until `metrics.jsonl` has the line of iteration `step`."""
    path = directory / "metrics.jsonl"
    for _ in range(6000):
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no line of iteration {step}")


def stored_state(directory, step):
    """All numbers of a checkpoint, by name."""
    import orbax.checkpoint as ocp

    tree = ocp.StandardCheckpointer().restore(directory / "checkpoints" / str(step) / "state")
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, own_cache, remote):
    """SIGTERM, then kill -9, then to the end: bit for bit the run that was left alone.

    A server judges as well: what was under way when the run died is asked again.
    """
    alone, hurt = tmp_path / "alone", tmp_path / "hurt"
    code, output = finish(start(alone, own_cache, *remote))
    assert code == 0, output

    process = start(hurt, own_cache, *remote)
    wait_for_line(hurt, process, 1)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 0, output
    assert "the same command resumes it" in output
    assert not (hurt / "eval.json").exists()

    process = start(hurt, own_cache, *remote)
    wait_for_line(hurt, process, 5)
    process.kill()
    finish(process)

    code, output = finish(start(hurt, own_cache, *remote))
    assert code == 0, output
    assert "Resuming after iteration" in output
    assert without_times(read_metrics(hurt)) == without_times(read_metrics(alone))
    expected, found = stored_state(alone, 8), stored_state(hurt, 8)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert (hurt / "eval.json").read_text() == (alone / "eval.json").read_text()


def test_a_run_that_only_meets_nans_stops_with_its_checkpoint_in_place(tmp_path):
    config = small_config_dict()
    # Near float32's end: after 1e30 norms and softmax kept some losses finite.
    config.optimizer.update({"learning_rate": 1e38, "max_skipped": 2, "grad_clip": 0.0})
    config.num_iterations = 8
    config.schedule.update({"checkpoint_every": 1, "eval_every": 0, "sample_every": 0})
    with pytest.raises(RunError, match=r"updates in a row were not finite|could not judge 100%"):
        train_lib.train(config, tmp_path)
    assert any(p.name.isdigit() for p in (tmp_path / "checkpoints").iterdir())


def test_a_judge_that_raises_stops_a_run_by_name_and_it_goes_on(tmp_path, monkeypatch):
    """In the base evaluation, and in the second iteration."""
    monkeypatch.setattr(REWARDS, "_entries", {name: REWARDS[name] for name in REWARDS})
    calls, at = [], {1}

    def judge(images, prompts):
        calls.append(len(images))
        if len(calls) in at:
            raise LookupError("no key")
        return images.mean((1, 2, 3)) / 255

    register("broken")(lambda options, networks: host_reward("broken", judge))
    config = small_config_dict()
    config.rewards = {**config.rewards.to_dict(), "broken": {"weight": 1.0}}
    config.rewards.pickscore.weight = 0.0
    config.num_iterations = 2
    config.schedule.update({"checkpoint_every": 1, "eval_every": 0, "sample_every": 0})
    message = r"the reward 'broken' failed on \d+ images: LookupError: no key \(.*test_trainer.py"
    with pytest.raises(RunError, match=message):
        train_lib.train(config, tmp_path)
    assert not (tmp_path / "eval_base.json").exists()
    calls.clear()
    at = {4}  # 1 and 2 evaluate the base model
    with pytest.raises(RunError, match=message):
        train_lib.train(config, tmp_path)
    at = set()
    assert train_lib.train(config, tmp_path)["iterations"] == 2
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_judge_that_fails_is_left_out_and_stops_a_run_that_it_fails_too_often(
    tmp_path, monkeypatch, caplog
):
    """One of eight images is left out; four of eight are too many; then the run goes on."""
    monkeypatch.setattr(REWARDS, "_entries", {name: REWARDS[name] for name in REWARDS})
    failing = {"images": 1, "calls": 0, "at": (4, 5)}  # calls 1 and 2 evaluate the base model

    def judge(images, prompts):
        failing["calls"] += 1
        scores = images.mean((1, 2, 3)) / 255
        if failing["calls"] in failing["at"]:
            scores[: failing["images"]] = np.nan
        return scores

    register("flaky")(lambda options, networks: host_reward("flaky", judge))
    config = small_config_dict()
    config.rewards = {**config.rewards.to_dict(), "flaky": {"weight": 1.0}}
    config.rewards.pickscore.weight = 0.0
    config.num_iterations = 4
    config.schedule.update({"checkpoint_every": 1, "eval_every": 0, "sample_every": 0})
    config.schedule.log_every = 1
    train_lib.train(config, tmp_path / "few")
    lines = read_metrics(tmp_path / "few")
    assert [line["failures/flaky"] for line in lines] == [0.0, 0.125, 0.125, 0.0]
    assert all(line["policy/skipped"] == 0.0 and line["policy/grad_norm"] > 0 for line in lines)
    assert all(line["time/step_seconds"] > 0.01 for line in lines)  # the last one's too

    failing.update({"images": 4, "calls": 0, "at": (4,)})
    message = r"'flaky' could not judge 50% of the images of iteration 2, .*max_failures = 25%"
    with pytest.raises(RunError, match=message):
        train_lib.train(config, tmp_path / "many")
    result = train_lib.train(config, tmp_path / "many")
    assert result["iterations"] == 4
    steps = [line["step"] for line in read_metrics(tmp_path / "many")]
    assert steps == [1, 2, 3, 4]
