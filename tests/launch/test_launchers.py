"""The launchers, as far as one can know without the machines they are for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SHELL = ("launch/run.sh", "launch/tpu_vm.sh", "launch/slurm.sbatch", "benchmarks/gpu.sh")
YAML = ("jobset", "skypilot")
ODD = """--config.a.b=two words, 'single', "double", $HOME `id` \\ * é"""


@pytest.fixture(scope="module")
def local():
    """launch/ is not a package: loaded from its file."""
    spec = importlib.util.spec_from_file_location("local", LAUNCH / "local.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip())
    path.chmod(0o755)
    return path


# What is written.


@pytest.mark.parametrize("name", SHELL)
def test_shell_is_clean(name):
    """Not skipped where shellcheck is missing: the extra `test` installs it."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (["bash", "-n"], ["shellcheck"]):
        done = subprocess.run(
            [*command, ROOT / name], env={"PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", YAML)
def test_yaml_is_of_its_kind(name):
    schema = json.loads((Path(__file__).parent / f"{name}_schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    task = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text())
    jsonschema.validate(task, schema)


def test_the_slice_of_the_jobset_is_whole():
    """Hosts times chips of a host are the chips of the topology."""
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    rows, columns = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert spec["parallelism"] * chips == int(rows) * int(columns)
    assert spec["completions"] == spec["parallelism"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    [workdir] = [a for a in container["command"] if a.startswith("--workdir=")]
    assert workdir.removeprefix("--workdir=").startswith(mount["mountPath"] + "/")


def test_shell_in_yaml_is_shell():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    for text in (task["setup"], task["run"]):
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def flags_of_main() -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pec_jax.main", "--helpfull"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return set(re.findall(r"^  --(?:\[no\])?(\w+):", done.stdout, re.MULTILINE))


def test_flags_and_configs_exist(local):
    """Of what follows the name of the program, on one line or, in YAML, down the list."""
    known = flags_of_main()
    used = set(re.findall(r"--(\w+)", " ".join(local.commands(2, [])[0])))
    configs = set()
    for name in (*SHELL, *(f"launch/{name}.yaml" for name in YAML)):
        text = (ROOT / name).read_text()
        configs |= set(re.findall(r"configs/\w+\.py", text))
        text = re.sub(r"\\\n#?", " ", text)  # one command a line, also where it is a comment
        text = re.sub(r"\n\s+- (?=--)", " ", re.sub(r" #.*", "", text))
        for rest in re.findall(r"(?:launch/run\.sh|pec_jax\.main|tpu_vm\.sh start)(.*)", text):
            used |= set(re.findall(r"--(\w+)", rest))
    assert used - known == set()
    assert used >= {"config", "workdir", "distributed", "coordinator", "num_processes"}
    assert configs and all((ROOT / config).is_file() for config in configs)


def test_no_secrets():
    """Nothing that looks like a key, nor a variable that is given one."""
    looks_like = re.compile(
        r"AIza[\w-]{30}|hf_\w{20}|gh[pousr]_\w{20}|AKIA\w{16}|-----BEGIN|[A-Za-z0-9+]{40}"
        r"|(?i:token|secret|password|api_?key)\w*\s*[=:]\s*[^\s$]"
    )
    for path in LAUNCH.iterdir():
        if path.is_file():
            found = looks_like.search(re.sub(r"https?://\S+", "", path.read_text()))
            assert found is None, f"{path.name}: {found.group()}"


# run.sh


@pytest.fixture
def stand_in(tmp_path):
    """A `python` that writes down its arguments and does what $SCRIPT says; an environment."""
    executable(
        tmp_path / "bin" / "python",
        f"""
        #!{sys.executable}
        import json, os, pathlib, sys
        names = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "XLA_PYTHON_CLIENT_MEM_FRACTION")
        seen = {{"arguments": sys.argv[1:], **{{n: os.environ[n] for n in names}}}}
        pathlib.Path({str(tmp_path / "seen.json")!r}).write_text(json.dumps(seen))
        exec(os.environ.get("SCRIPT", ""))
        """,
    )
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    return environment


def seen(tmp_path):
    return json.loads((tmp_path / "seen.json").read_text())


def test_a_process_gets_its_arguments_and_environment(stand_in, tmp_path):
    workdir = tmp_path / "runs" / "one"
    workdir.mkdir(parents=True)
    (workdir / "eval.json").write_text("{}")
    command = ["bash", LAUNCH / "run.sh", "--config=c.py", f"--workdir={workdir}", ODD]
    environment = stand_in | {"XLA_FLAGS": "--mine"}
    assert subprocess.run(command, env=environment).returncode == 0
    got = seen(tmp_path)
    assert got["arguments"] == ["-m", "pec_jax.main", "--config=c.py", f"--workdir={workdir}", ODD]
    assert got["XLA_FLAGS"].endswith(" --mine")  # the last one wins
    assert got["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "runs" / "compilation_cache")


@pytest.mark.parametrize("script, status", [("", 75), ("sys.exit(3)", 3)])
def test_what_has_not_ended_is_no_success(stand_in, tmp_path, script, status):
    command = ["bash", LAUNCH / "run.sh", f"--workdir={tmp_path}"]
    assert subprocess.run(command, env=stand_in | {"SCRIPT": script}).returncode == status


def test_a_workdir_is_needed(stand_in):
    done = subprocess.run(["bash", LAUNCH / "run.sh"], env=stand_in, capture_output=True)
    assert done.returncode == 2 and b"--workdir" in done.stderr


def test_sigterm_reaches_training_which_may_take_its_time(stand_in, tmp_path):
    """Twice, since Slurm signals every process of a step, and the script passes it on."""
    script = f"""
import signal, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path({str(tmp_path / "up")!r}).touch()
time.sleep(60)
"""
    process = subprocess.Popen(
        ["bash", LAUNCH / "run.sh", f"--workdir={tmp_path}"], env=stand_in | {"SCRIPT": script}
    )
    wait_for((tmp_path / "up").exists)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 75
    assert (tmp_path / "saved").exists()


def test_the_flags_of_the_compiler_exist(tmp_path):
    """An unknown one would end every run as it starts; jaxlib knows those of all platforms."""
    text = (LAUNCH / "run.sh").read_text()
    [flags] = re.findall(r'^export XLA_FLAGS="(.*) \$\{XLA_FLAGS', text, re.MULTILINE)
    for value, good in ((flags, True), ("--xla_gpu_no_such_flag=true", False)):
        environment = os.environ | {"XLA_FLAGS": value, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path)
        assert (done.returncode == 0) == good, done.stderr.decode()


# tpu_vm.sh


@pytest.fixture
def cloud(tmp_path, stand_in):
    """A `gcloud` that copies to, and runs a shell in, a home of ours, where nothing installs."""
    home = tmp_path / "host"
    executable(
        tmp_path / "bin" / "gcloud",
        f"""
        #!{sys.executable}
        import json, os, pathlib, shutil, subprocess, sys
        arguments = sys.argv[1:]
        with open({str(tmp_path / "gcloud.jsonl")!r}, "a") as log:
            log.write(json.dumps(arguments) + "\\n")
        home = {str(home)!r}
        if "scp" in arguments:
            shutil.copy(arguments[4], os.path.join(home, arguments[5].partition(":")[2]))
        for argument in arguments:
            if argument.startswith("--command="):
                environment = os.environ | {{"HOME": home, "USER": "me"}}
                sys.exit(subprocess.run(
                    ["bash", "-c", argument.partition("=")[2]], cwd=home, env=environment
                ).returncode)
        """,
    )
    for name in ("python3", "sudo"):
        executable(tmp_path / "bin" / name, "#!/bin/sh\n[ -t 0 ] || cat >/dev/null\n")
    executable(home / ".local" / "bin" / "uv", "#!/bin/sh\nexit 0\n")
    (home / "pec_jax_venv" / "bin").mkdir(parents=True)
    (home / "pec_jax_venv" / "bin" / "activate").touch()
    # Its process number lies in /tmp on a host: here beside the other files.
    script = (LAUNCH / "tpu_vm.sh").read_text().replace("/tmp/pec_jax.pid", f"{home}/pid")
    directory = tmp_path / "repository" / "launch"
    executable(directory / "tpu_vm.sh", script)
    (directory / "run.sh").write_text((LAUNCH / "run.sh").read_text())
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *arguments], cwd=directory.parent, check=True)
    return stand_in | {"NAME": "my tpu", "ZONE": "z", "PROJECT": "p"}


def tpu_vm(cloud, tmp_path, *arguments):
    script = tmp_path / "repository" / "launch" / "tpu_vm.sh"
    return subprocess.run(
        ["bash", script, *arguments], env=cloud, capture_output=True, text=True, timeout=30
    )


def test_a_pod_gets_the_command_as_it_was_given(cloud, tmp_path):
    running = "import time; time.sleep(60)"
    arguments = ["--config=configs/sd3_pec.py", f"--workdir={tmp_path}/runs/a b", ODD]
    done = tpu_vm(cloud | {"SCRIPT": running}, tmp_path, "start", *arguments)
    assert done.returncode == 0, done.stderr
    wait_for((tmp_path / "seen.json").exists)
    wait_for(lambda: (tmp_path / "seen.json").read_text().endswith("}"))
    expected = ["-m", "pec_jax.main", "--distributed", *arguments]
    assert seen(tmp_path)["arguments"] == expected
    calls = [json.loads(line) for line in (tmp_path / "gcloud.jsonl").read_text().splitlines()]
    assert all("my tpu" in call[4] or "my tpu" in call[5] for call in calls)
    assert all({"--worker=all", "--zone=z", "--project=p"} <= set(call) for call in calls)

    again = tpu_vm(cloud, tmp_path, "start", *arguments)
    assert again.returncode == 0 and "runs already" in again.stdout
    stopped = tpu_vm(cloud, tmp_path, "stop")
    assert stopped.returncode == 0 and "does not" not in stopped.stdout
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "host" / "pid").read_text()), 0)
    assert "does not run" in tpu_vm(cloud, tmp_path, "stop").stdout


def test_a_pod_needs_a_name(cloud, tmp_path):
    assert tpu_vm(cloud, tmp_path, "--help").stdout.startswith("Trains on a Cloud TPU VM")
    assert tpu_vm(cloud, tmp_path, "begin").returncode == 2
    nameless = tpu_vm({k: v for k, v in cloud.items() if k != "NAME"}, tmp_path, "stop")
    assert nameless.returncode != 0 and "NAME: see --help" in nameless.stderr


# slurm.sbatch


@pytest.mark.parametrize("status, requeued", [(0, False), (75, True), (2, False)])
def test_slurm_queues_again_what_stopped_before_its_end(stand_in, tmp_path, status, requeued):
    log = tmp_path / "log.jsonl"
    for name, code in (("srun", status), ("scontrol", 0)):
        executable(
            tmp_path / "bin" / name,
            f"""
            #!{sys.executable}
            import json, sys
            with open({str(log)!r}, "a") as log:
                log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
            sys.exit({code})
            """,
        )
    executable(tmp_path / ".venv" / "bin" / "activate", "")
    environment = stand_in | {
        "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_CPUS_PER_TASK": "8", "SLURM_JOB_ID": "42",
    }  # fmt: skip
    command = ["bash", LAUNCH / "slurm.sbatch", "--workdir=w", ODD]
    assert subprocess.run(command, env=environment).returncode == status
    srun, *rest = [json.loads(line) for line in log.read_text().splitlines()]
    assert srun[-4:] == ["launch/run.sh", "--distributed", "--workdir=w", ODD]
    assert (rest == [["scontrol", "requeue", "42"]]) == requeued


# local.py


def start_local(tmp_path, scripts):
    """launch/local.py with these scripts in the place of training."""
    go = tmp_path / "go.py"
    go.write_text(
        f"import sys; sys.path.insert(0, {str(LAUNCH)!r}); import local\n"
        f"sys.exit(local.run([[sys.executable, '-c', s] for s in {scripts!r}]))\n"
    )
    return subprocess.Popen(
        [sys.executable, go], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_local_prefixes_and_succeeds(tmp_path):
    script = "import os; print('device', os.environ['JAX_LOCAL_DEVICE_IDS'])"
    process = start_local(tmp_path, [script, script])
    output, _ = process.communicate(timeout=20)
    assert sorted(output.splitlines()) == ["[0] device 0", "[1] device 1"]
    assert process.returncode == 0


def test_local_stops_the_others_when_one_fails(tmp_path):
    start = time.monotonic()
    process = start_local(tmp_path, ["import time; time.sleep(60)", "import sys; sys.exit(3)"])
    process.communicate(timeout=20)
    assert process.returncode == 3 and time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("end", "status", "sentence"),
    [
        ("sys.exit(3)", 3, "process 1 ended with status 3; its last lines say why."),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "process 1 was killed by SIGKILL (status 137), as the system does when memory runs "
            "out.",
        ),
        ("os.kill(os.getpid(), 11)", 139, "process 1 was killed by SIGSEGV (status 139)."),
        ("os.kill(os.getpid(), 40)", 168, "process 1 was killed by signal 40 (status 168)."),
    ],
)
def test_local_says_which_one_failed(tmp_path, end, status, sentence):
    script = f"import os, signal, sys; {end}"
    process = start_local(tmp_path, ["import time; time.sleep(60)", script])
    _, error = process.communicate(timeout=20)
    assert process.returncode == status
    assert error == f"Error: {sentence} The others are stopped.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(tmp_path, number):
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)))\n"
        "print('up', flush=True); time.sleep(60)"
    )
    process = start_local(tmp_path, [script, script])
    assert {process.stdout.readline(), process.stdout.readline()} == {"[0] up\n", "[1] up\n"}
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert sorted(output.splitlines()) == ["[0] saved", "[1] saved"]
    assert process.returncode == 0


def test_local_kills_at_the_second_signal(tmp_path):
    script = (
        "import signal, time; signal.signal(15, signal.SIG_IGN)\n"
        "print('up', flush=True); time.sleep(60)"
    )
    process = start_local(tmp_path, [script])
    assert process.stdout.readline() == "[0] up\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL and not error


def test_local_starts_main():
    done = subprocess.run(
        [sys.executable, LAUNCH / "local.py", "2", "--workdir=nowhere"],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2 and "--config is missing" in done.stdout
    nothing = subprocess.run([sys.executable, LAUNCH / "local.py"], capture_output=True, text=True)
    assert nothing.returncode == 2 and "launch/local.py 2" in nothing.stderr
