"""The commands from outside: help, mistakes, plugins, and how long each answer takes.

What all commands share is tested here in subprocesses, few of them; what a config file, a plugin
or an override may be is tested in tests/config.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from configs import base
from pec_jax.__main__ import commands
from pec_jax.command_line import values_of
from pec_jax.config.changes import flatten
from pec_jax.config.describe import describe
from tests.conftest import ROOT

COMMANDS = sorted(commands())
# A second is asked for, which an idle core keeps tenfold; here others may hold the cores, so CPU
# time is measured. Importing jax alone takes longer than that.
HELP_SECONDS = 1.0
FIELDS_SECONDS = 4.0  # with the fields of configs, which stand in the modules that define them
SLOW_LIBRARIES = ("jax", "flax", "tensorflow", "orbax", "transformers", "scipy", "matplotlib")


def run(*arguments, cwd=ROOT, **environment):
    """(exit status, standard output, standard error) of `python -m ...`."""
    process = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=dict(os.environ, PYTHONPATH=str(ROOT), **environment),
        capture_output=True,
        text=True,
        timeout=100,
    )
    return process.returncode, process.stdout, process.stderr


def cpu_seconds():
    times = os.times()
    return times.children_user + times.children_system


def test_the_commands_are_listed_with_what_they_do():
    code, out, _ = run("pec_jax", cwd="/")
    assert code == 0
    assert {"main", "sample", "export", "compare", "aot", "embed", "pretrain", "tiny"} <= set(
        COMMANDS
    )
    for name, what in commands().items():
        assert re.search(rf"^  {name} +{re.escape(what)}$", out, re.MULTILINE)
        assert len(what) > 10


def test_an_unknown_command_is_answered():
    code, out, error = run("pec_jax", "mian", "--config=shapes_pec")
    assert (code, out) == (2, "")
    assert error.startswith("Error: unknown command 'mian'. Did you mean 'main'? Valid: aot, ")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_and_at_once(command):
    before = cpu_seconds()
    code, out, error = run(f"pec_jax.{command}", "--help")
    with_fields = command in ("main", "aot")
    assert cpu_seconds() - before < (FIELDS_SECONDS if with_fields else HELP_SECONDS)
    assert code == 0 and error == ""
    assert ("Fields, each set by --config.FIELD=VALUE" in out) == with_fields
    source = (ROOT / "pec_jax" / f"{command}.py").read_text()
    defined = re.findall(r'(?:DEFINE_\w+|required_string|bounded_float)\(\s*"(\w+)"', source)
    defined += ["seed"] if "define_seed" in source else []
    defined += ["config", "plugin"] if "define_config" in source else []
    assert defined
    for flag in defined:
        assert re.search(rf"^  --(\[no\])?{flag}:", out, re.MULTILINE), flag


def test_help_has_every_field_of_a_config():
    fields = flatten(base.get_config().to_dict())
    text = describe()
    shown = set(re.findall(r"^  (\S+)$", text, re.MULTILINE))
    assert shown == {name for name in fields if not name.startswith("mesh.rules.")} | {"mesh.rules"}
    assert "  eval.num_steps\n      int, 2 to 1000. ODE steps. [40]\n" in text
    assert "Shipped configs: eval_paper, flux_grpo" in text


def test_a_subcommand_is_the_module():
    assert run("pec_jax", "tiny", "--help") == run("pec_jax.tiny", "--help")
    flags = ("--out=x", "--family=sd4")
    assert run("pec_jax", "tiny", *flags) == run("pec_jax.tiny", *flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_the_slow_libraries_for_its_flags(command):
    code = (
        f"import sys, pec_jax.{command}; print([n for n in {SLOW_LIBRARIES} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


SAMPLE = ("pec_jax.sample", "--prompt=a", "--out=no_such_directory")
MAIN = ("pec_jax.main", "--workdir=no_such_directory", "--config=shapes_pec")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            (*MAIN, "--config.optimizer.lr=1"),
            r"config\.optimizer has no .* mean .*learning_rate\?.*",
        ),
        ((*MAIN, "--config.optimizer.lr", "1"), r"config\.optimizer has no .*learning_rate\?.*"),
        ((*MAIN, "--config.seed=fast"), r"--config\.seed=fast: .*"),
        ((*MAIN, "--config.batch.group_size=1"), r".*group_size.* at least 2.*"),
        ((*MAIN, "--config.sampler.num_steps=1"), r".*num_steps.* at least 2.*"),
        ((*MAIN, "--workdr=x"), r".*'workdr'\. Did you mean: workdir .*"),
        ((*MAIN, "x"), r"unexpected arguments: x\."),
        ((*MAIN, "--process_id=1"), r"--process_id means nothing without --distributed\."),
        ((*MAIN, "--plugin=no.py"), r"plugin no\.py does not exist\."),
        ((*MAIN, "--flagfile=no"), r".*flagfile.*no.*"),
        (MAIN[:2], r"--config is missing; see --help\."),
        (MAIN[::2], r"--workdir is missing; see --help\."),
        ((*MAIN, "--workdir="), r"--workdir=: must not be empty\."),
        (("pec_jax.main", "--config=pyproject.toml"), r".*pyproject\.toml is not Python.*"),
        (("pec_jax.main", "--config=no/such.py"), r".*no/such\.py does not exist.*"),
        (("pec_jax.aot", "--config=shapes_pek"), r".* Did you mean 'shapes_pec'\?.*"),
        (("pec_jax.sample", "--out=x"), r"--prompt or --prompts is missing.*"),
        (("pec_jax.score", "--out=x"), r"--images is missing.*"),
        (("pec_jax.score", "--out=x", "--images=y", "--dtype=e"), r"--dtype=e: .*bfloat16.*"),
        (("pec_jax.convert", "--out=x"), r"--file is missing.*"),
        (("pec_jax.sample", "--out=x", "--prompt=a", "b"), r".*arguments: b\. Quote the prompt\."),
        (("pec_jax.sample", "--out=x", "--prompt=a", "--sampler=e"), r"--sampler=e: .*flow_sde.*"),
        (("pec_jax.export", "--kind=l", "--workdir=x", "--out=x"), r"--kind=l: .*transformer.*"),
        (("pec_jax.compare", "--out=x"), r"give either run directories or --table.*"),
        (("pec_jax.embed", "--out=x"), r"--prompts is missing.*"),
        (("pec_jax.tiny", "--out=x", "--seed=a"), r"--seed=a: .*"),
        ((*SAMPLE, "--seed=4294967296"), r"--seed=4294967296: .*4294967295.*"),
        ((*SAMPLE, "--seed=-1"), r"--seed=-1: .*0.*"),
        ((*SAMPLE, "--guidance=nan"), r"--guidance=nan: must be a number from 0 to 100\."),
        ((*SAMPLE, "--guidance=inf"), r"--guidance=inf: .*100.*"),
        ((*SAMPLE, "--noise_level=nan"), r"--noise_level=nan: must be a number from 0 to 10\."),
        ((*MAIN, "--config.rewards.ocr=1.0"), r"config\.rewards\.ocr is a section.*\.weight=.*"),
        ((*MAIN, "--config.trainable.targets=('(',)"), r"config\.trainable\.targets: .*"),
        ((*MAIN, "--log=wandbb"), r"--log: .*'wandb'.*"),
        (("pec_jax.pretrain", "--out=x", "--stages=vea"), r"--stages=.*vae.*"),
    ],
)
def test_a_mistake_is_one_sentence_status_2_and_at_once(arguments, sentence):
    before = cpu_seconds()
    code, out, error = run(*arguments)
    assert cpu_seconds() - before < 2.0
    assert (code, out) == (2, "")
    assert re.fullmatch(f"Error: {sentence}\n", error), error
    assert not (ROOT / "no_such_directory").exists() and not (ROOT / "x").exists()


def test_a_stack_trace_is_kept_for_those_who_ask():
    code, _, error = run(*MAIN, "--plugin=no.py", "--verbosity=1")
    assert code == 1 and "Traceback" in error and "no.py does not exist" in error


def test_plugins_run_before_the_config_file_whatever_the_order_of_flags(tmp_path):
    (tmp_path / "warmth.py").write_text("import builtins\nbuiltins.WARMTH = 2\n")
    (tmp_path / "own.py").write_text(
        "from configs import shapes_pec\n\ndef get_config():\n"
        "    config = shapes_pec.get_config()\n    config.batch.group_size = WARMTH - 1\n"
        "    return config\n"
    )
    flags = ("--config=own.py", "--workdir=run", "--plugin=warmth.py", "--plugin", "./warmth.py")
    code, _, error = run("pec_jax.main", *flags, cwd=tmp_path)
    assert code == 2 and "group_size is 1" in error  # so get_config saw what the plugin did


def test_values_of_a_flag_before_parsing():
    argv = ["--plugin=a", "-plugin", "b", "--plugins=c", "--x=--plugin=d", "--", "--plugin=e"]
    assert list(values_of("plugin", argv)) == ["a", "b"]
    assert list(values_of("plugin", ["--plugin"])) == [""]


def test_importing_the_package_is_cheap_and_its_names_come_when_used():
    code = (
        "import sys, pec_jax; heavy = [n for n in sys.modules if n in ('jax', 'numpy', 'absl')];"
        "assert not heavy, heavy; config = pec_jax.load_config('shapes_pec');"
        "assert 'tensorflow' not in sys.modules; print(config.seed)"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr
    assert time.monotonic() - start < 10


def test_every_public_name_exists():
    import pec_jax

    for name in pec_jax.__all__:
        assert getattr(pec_jax, name) is not None
        assert name in dir(pec_jax)
    assert pec_jax.train is sys.modules["pec_jax.training.trainer"].train
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        pec_jax.trian  # noqa: B018
