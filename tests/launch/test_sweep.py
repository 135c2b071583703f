"""The sweep: grids, what is skipped, what fails, and being killed; with a stand-in for training."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pec_jax.config import to_dict
from pec_jax.errors import RunError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sweep():
    """launch/ is not a package: its files find one another as scripts do."""
    sys.path.insert(0, str(ROOT / "launch"))
    yield importlib.import_module("sweep")
    sys.path.remove(str(ROOT / "launch"))


@pytest.mark.parametrize(
    "text, values",
    [
        ("1", ["1"]),
        ("a,b,c", ["a", "b", "c"]),
        ("(0.5,1.0),(0.8, 1.0)", ["(0.5,1.0)", "(0.8, 1.0)"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("dino + 0.5 * clip, dino", ["dino + 0.5 * clip", "dino"]),
    ],
)
def test_values_are_split_outside_of_brackets(sweep, text, values):
    assert sweep.split_values(text) == values


@pytest.mark.parametrize("text", ["", "a,,b", "(1,2", "'a"])
def test_what_is_no_list_is_refused(sweep, text):
    with pytest.raises(ValueError, match="not a list of values"):
        sweep.split_values(text)


def test_the_grid_is_the_product_and_names_what_varies(sweep, tmp_path):
    jobs = sweep.grid(
        Path("c.py"), tmp_path, {"a.b": ["1", "2"], "seed": ["0", "1", "2"]}, {"x": "y"}
    )
    assert [job.directory.name for job in jobs] == [
        f"a.b={a}_seed={s}" for a in "12" for s in "012"
    ]
    assert jobs[0].command[2:] == [
        "pec_jax.main", "--config=c.py", f"--workdir={jobs[0].directory}",
        "--config.x=y", "--config.a.b=1", "--config.seed=0",
    ]  # fmt: skip


def test_overrides_are_taken_out_of_the_flags(sweep):
    rest, overrides = sweep.take_overrides(
        ["s.py", "--config=f.py", "--config.a=1,2", "--jobs=2", "--config.b", "x"]
    )
    assert rest == ["s.py", "--config=f.py", "--jobs=2"]
    assert overrides == {"a": "1,2", "b": "x"}


class FakeJob:
    """Writes eval.json, after a while or not at all."""

    def __init__(self, directory, script):
        self.directory, self.command = directory, [sys.executable, "-c", script]

    @property
    def finished(self):
        return (self.directory / "eval.json").exists()


def fake(directory, script=""):
    done = f"import pathlib; pathlib.Path({str(directory / 'eval.json')!r}).write_text('x')"
    return FakeJob(directory, script or done)


def test_finished_jobs_are_skipped_and_failures_do_not_stop_the_rest(sweep, tmp_path, capsys):
    jobs = [
        fake(tmp_path / "a"),
        fake(tmp_path / "b", "import sys; print('why'); sys.exit(3)"),
        fake(tmp_path / "c"),
    ]
    failed = sweep.run_jobs(jobs, 2)
    assert [job.directory.name for job in failed] == ["b"]
    assert "why" in (tmp_path / "b" / "log.txt").read_text()
    assert jobs[0].finished and jobs[2].finished
    capsys.readouterr()
    assert sweep.run_jobs([jobs[0], jobs[2]], 1) == []
    assert "2 runs, 2 of them finished before." in capsys.readouterr().out


def test_print_shows_commands_and_runs_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "sweep.py", f"--config={ROOT}/configs/shapes_pec.py",
         f"--runs={tmp_path}", "--print", "--config.seed=0,1",
         "--config.constraints.pec.weight=0.5,1", "--config.num_iterations=3"],
        capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and not list(tmp_path.iterdir())
    assert all("--config.num_iterations=3" in line for line in lines)
    assert "--config.constraints.pec.weight=1" in lines[-1] and "--config.seed=1" in lines[-1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=no.py"], "no.py does not exist"),
        (
            [f"--config={ROOT}/configs/shapes_pec.py", "--config.sed=1,2"],
            "Did you mean config.seed?",
        ),
        (["--config=shapes_pec", "--config.seed=1,-2"], "it must be at least 0"),
        (["--config=shapes_pec", "--config.batch.group_size=4,x"], "x"),
        (["--config=shapes_pec", "--plugin=no.py"], "plugin"),
        ([], "--config is missing"),
        ([f"--config={ROOT}/configs/shapes_pec.py", "--config.seed=1,,2"], "not a list of values"),
    ],
)
def test_mistakes_are_sentences(tmp_path, arguments, words):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "sweep.py", f"--runs={tmp_path}", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def finish(job, iterations, ended=True):
    """What a run leaves behind, of two seconds an iteration."""
    job.directory.mkdir(parents=True)
    steps = [
        {"step": i + 1, "reward/mean": 0.5, "time/step_seconds": 2.0} for i in range(iterations)
    ]
    lines = [
        *map(json.dumps, steps),
        '{"step": 1, "quality/pickscore": 0.5}',
        '{"reward/mean": 1, "st',
    ]
    (job.directory / "metrics.jsonl").write_text("\n".join(lines))
    if ended:
        (job.directory / "eval.json").write_text(json.dumps({"iterations": iterations}))


def test_the_plan_is_one_screen(sweep, tmp_path):
    axes = {"constraints.pec.weight": ["1", "2"], "seed": ["0", "1", "2"]}
    fixed = {"num_iterations": "60"}
    jobs = sweep.grid(ROOT / "configs" / "shapes_pec.py", tmp_path, axes, fixed)
    configs = sweep.check(jobs)
    assert {c.constraints["pec"].weight for c in configs} == {1.0, 2.0}
    assert "left" not in sweep.plan(jobs, configs, axes, 2)
    finish(jobs[0], 60)
    finish(jobs[1], 30, ended=False)
    finish(jobs[2], 30)  # finished when the runs were shorter
    (jobs[3].directory).mkdir()
    (jobs[3].directory / "log.txt").write_text("10:00 Loading\nError: no space left on device\n")
    assert sweep.plan(jobs, configs, axes, 2).splitlines() == [
        "constraints.pec.weight  1  2",
        "seed                    0  1  2",
        "6 runs: 1 finished, 2 begun, 3 to start",
        f"  {jobs[1].directory.name}: 30 of 60 iterations",
        f"  {jobs[2].directory.name}: 30 of 60 iterations",
        f"  {jobs[3].directory.name} ended with Error: no space left on device",
        "about 4 min left, 2 at a time",
    ]


def test_a_directory_of_another_config_is_refused_and_a_longer_run_is_not(sweep, tmp_path):
    path = ROOT / "configs" / "shapes_pec.py"
    (job,) = sweep.grid(path, tmp_path, {"seed": ["0"]}, {"num_iterations": "3"})
    (config,) = sweep.check([job])
    job.directory.mkdir()
    (job.directory / "config.json").write_text(json.dumps(to_dict(config)))
    (longer,) = sweep.grid(path, tmp_path, {"seed": ["0"]}, {"num_iterations": "5"})
    assert sweep.check([longer])[0].num_iterations == 5
    (other,) = sweep.grid(path, tmp_path, {"seed": ["0"]}, {"batch.groups": "8"})
    with pytest.raises(RunError, match=r"config\.batch\.groups: 6 there, 8 now"):
        sweep.check([other])


def test_plugins_go_to_the_runs(sweep, tmp_path):
    (job,) = sweep.grid(Path("c.py"), tmp_path, {}, {}, ["/a/p.py"])
    assert job.command[2:4] == ["pec_jax.main", "--plugin=/a/p.py"]


def test_a_killed_sweep_ends_its_runs_and_resumes_later(tmp_path):
    """The stand-in run stops when told to, as a training run does; the next call finishes it."""
    script = tmp_path / "go.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT / "launch")!r})
        from pathlib import Path
        import jobs

        class Job:
            directory = Path({str(tmp_path / "run")!r})
            command = [sys.executable, "-c", (
                "import signal,sys,time,pathlib;"
                "signal.signal(15, lambda *a: sys.exit(0));"
                "d=pathlib.Path({str(tmp_path / "run")!r});"
                "again=(d/'started').exists(); (d/'started').write_text('');"
                "time.sleep(0 if again else 60); (d/'eval.json').write_text('')"
            )]
            finished = property(lambda self: (self.directory / "eval.json").exists())

        print(jobs.run_jobs([Job()], 1))
        """)
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    for _ in range(200):
        if (tmp_path / "run" / "started").exists():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    assert "Stopping after" in output
    assert not (tmp_path / "run" / "eval.json").exists()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=30)
    assert done.stdout.strip().endswith("[]") and (tmp_path / "run" / "eval.json").exists()
