"""The documentation says what is so: commands, flags, fields, messages, links and navigation.

`mkdocs build --strict` (`.ci/run docs`) checks what needs the site: anchors and docstrings.
"""

from __future__ import annotations

import ast
import functools
import json
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import setuptools
import yaml

import pec_jax
from pec_jax.__main__ import commands as known_commands
from pec_jax.config import from_config_dict
from pec_jax.config.files import load_config, shipped_names
from pec_jax.config.overrides import check_overrides, overridden
from pec_jax.config.registry import CONSTRAINTS, ENCODERS, OBJECTIVES, REWARDS
from pec_jax.config.user_file import import_plugins
from pec_jax.evaluation.judge_specs import parse_specs
from pec_jax.training import build
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
SEPARATORS = ("&&", "||", "|", ";")
POSITIONAL = ("compare.py", "local.py")  # take arguments that are no flags
PLACEHOLDER = "..."  # for a config of the reader's


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> Iterator[str]:
    """The fenced blocks of a language."""
    for margin, name, body in FENCE.findall(text_of(page)):
        if name == language:
            yield re.sub(rf"^{margin}", "", body, flags=re.MULTILINE)


# Navigation and links.


class _Loader(yaml.SafeLoader):
    """Of mkdocs.yml, which has tags of mkdocs' own."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def navigation() -> list[str]:
    """All pages of the navigation, in order."""

    def leaves(entry) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
            return
        for child in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(child)

    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=_Loader)
    return list(leaves(config["nav"]))


def test_the_navigation_has_every_page_once_and_no_other():
    assert sorted(navigation()) == PAGES


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_and_pictures_resolve(page):
    prose = FENCE.sub("", text_of(page))
    for target in LINK.findall(prose):
        path = target.partition("#")[0]
        if path and "://" not in path:
            assert (DOCS / page).parent.joinpath(path).resolve().exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_docstrings_are_of_modules_there_are(page):
    for module in re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


# Commands.


def commands(page: str) -> Iterator[list[str]]:
    """The shell commands of a page that run this package, as lists of words."""
    for body in blocks(page, "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            command: list[str] = []
            for word in [*shlex.split(line, comments=True), ";"]:
                if word in SEPARATORS:
                    if _is_ours(command):
                        yield command
                    command = []
                elif command or not re.match(r"[A-Z_]+=", word):
                    command.append(word)


def _is_ours(command: Sequence[str]) -> bool:
    start = " ".join(command)
    return start.startswith(("python -m pec_jax", "pec-jax", "python launch/"))


def program(command: Sequence[str]) -> tuple[Path, list[str]]:
    """The file that a command runs, and its arguments."""
    if command[0] == "pec-jax":
        command = ["python", "-m", f"pec_jax.{command[1]}", *command[2:]]
    if command[1] != "-m":
        return ROOT / command[1], list(command[2:])
    path = ROOT / command[2].replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py"), list(command[3:])


DEFINERS = ("required_string", "bounded_float", "add_argument")


@functools.cache
def flags_of(path: Path) -> frozenset[str]:
    """The flags that a program defines, read from its source, since absl would mix them up."""
    if path.name == "local.py":
        return flags_of(ROOT / "pec_jax" / "main.py")  # hands them on
    if path.name == "__main__.py":
        return frozenset({"help", "version"})
    found = {"help", "verbosity"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func).rpartition(".")[2]
        if function in ("define_config", "define_plugin"):
            found |= {"config", "plugin"} if function == "define_config" else {"plugin"}
        elif function == "define_seed":
            found |= {"seed"}
        elif function.startswith("DEFINE_") or function in DEFINERS:
            name = ast.literal_eval(node.args[0]).lstrip("-")
            found |= {name, f"no{name}"} if function == "DEFINE_bool" else {name}
    return frozenset(found)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Holds the Python files that pages show; what they register is gone after the test."""
    for registry in (CONSTRAINTS, ENCODERS, OBJECTIVES, REWARDS):
        entries = {name: registry[name] for name in registry}
        monkeypatch.setattr(registry, "_entries", entries)
    monkeypatch.setattr(sys, "path", [*sys.path])  # plugins add their directory
    for page in PAGES:
        for body in blocks(page, "python"):
            if match := re.match(r"# (\w+\.py)\n", body):
                (tmp_path / match[1]).write_text(body, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))])
def test_commands_are_accepted(page, files):
    for command in commands(page):
        path, arguments = program(command)
        assert path.is_file(), command
        values: dict[str, list[str]] = {}
        for argument in arguments:
            name, _, value = argument.partition("=")
            if not argument.startswith("-"):
                assert path.name in POSITIONAL, (argument, command)
            elif not name.startswith("--config."):
                assert name.removeprefix("--") in flags_of(path), (argument, command)
                values.setdefault(name, []).append(value)
        import_plugins([str(files / plugin) for plugin in values.get("--plugin", [])])
        parse_specs(values.get("--reward", []), REWARDS, "--reward")
        parse_specs(values.get("--space", []), ENCODERS, "--space")
        if "--config" in values:
            check_config(values["--config"][0], arguments, files, sweep=path.name == "sweep.py")


def check_config(name: str, arguments: Sequence[str], files: Path, *, sweep: bool) -> None:
    """Raises ConfigError where a run would; reads no model and no prompts."""
    own = files / name
    shared = load_config("base" if name == PLACEHOLDER else str(own) if own.exists() else name)
    check_overrides(shared, arguments)
    fields = {}
    for argument in arguments:
        if argument.startswith("--config."):
            field, equals, value = argument.removeprefix("--config.").partition("=")
            fields[field] = value if equals else "True"
    if not sweep:
        build.check(from_config_dict(overridden(shared, fields)))
        return
    for field, text in fields.items():
        for value in re.split(r",(?![^(]*\))", text):  # between the commas outside of brackets
            build.check(from_config_dict(overridden(shared, {field: value})))


def test_every_shipped_config_is_on_some_page():
    text = "".join(map(text_of, PAGES))
    assert [name for name in shipped_names() if name not in text] == []


def test_a_command_that_does_not_exist_is_noticed(files):
    """The checks above see what they are meant to see."""
    assert "no_such_flag" not in flags_of(ROOT / "pec_jax" / "sample.py")
    assert {"nouse_ema", "lora", "out"} <= flags_of(ROOT / "pec_jax" / "sample.py")
    assert {"plugin", "jobs", "print"} <= flags_of(ROOT / "launch" / "sweep.py")
    with pytest.raises(ValueError, match="weihgt"):
        check_config("shapes_pec", ["--config.constraints.pec.weihgt=1"], files, sweep=False)
    with pytest.raises(ValueError, match="at least"):
        check_config("shapes_pec", ["--config.seed=0,-1"], files, sweep=True)


# What is listed.


def _cells(page: str, column: int = 0) -> list[str]:
    """The cells of a column that are code and nothing else."""
    rows = [line.split(" | ") for line in text_of(page).splitlines() if line.startswith("| ")]
    cells = [row[column].strip("| ") for row in rows if len(row) > column]
    return [match[1] for cell in cells if (match := re.fullmatch(r"`([^`]+)`", cell))]


def test_every_command_is_in_the_reference():
    assert set(known_commands()) <= set(_cells("reference/index.md"))


def test_every_extra_is_on_the_page_about_installing(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(given["extras_require"]) <= set(_cells("install.md"))


def test_the_citation_is_of_this_version():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(found["version"]) == pec_jax.__version__
    assert "2605.12112" in found["references"][0]["url"]


def test_the_table_of_tpu_slices_is_what_was_compiled():
    """Peak and bound of each row of memory_and_cost.md, and no compiled slice is left out."""
    row = re.compile(
        r"\| `(\w+)_pec`([\w ,*]*)\| (\d+) \| (v\w+)-([\d, -]+) \| fsdp \d+ \| \w+ "
        r"\| ([\d.]+) \| ([\d.]+) \| (\d+) \|"
    )
    seen = set()
    for model, kind, pixels, chip, sizes, peak, memory, bound in row.findall(
        text_of("memory_and_cost.md")
    ):
        trained = "full" if "all weights" in kind else "lora"
        for size in sizes.replace("-", "").split(", "):
            name = f"{model}_pec_{trained}_{pixels}px_{chip}-{size}.json"
            found = json.loads((DOCS / "results" / "scaling" / name).read_text(encoding="utf-8"))
            assert f"{found['bytes_per_chip']['peak'] / 1e9:.2f}" == peak, name
            assert f"{found['hbm_bytes'] / 1e9:.1f}" == memory, name
            assert f"{found['roofline']['seconds']:.0f}" == bound, name
            assert ("*" in kind) == (found["parameters"]["trainable"] == 23_887_872), name
            seen.add(name)
    assert seen == {path.name for path in (DOCS / "results" / "scaling").glob("*.json")}


@pytest.mark.parametrize("name", ["sd3_pec", "sd3_pec_fast", "flux_pec", "flux_pec_fast"])
def test_the_fast_recipes_cost_is_what_was_compiled(name):
    page = (DOCS / "results" / "time_to_quality" / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}`.*?\| (.*) \|$", page, re.MULTILINE)
    path = DOCS / "results" / "config_memory" / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert row.split(" | ") == [
        f"{found['flops']['analytic'] / 1e15:.2f}",
        f"{found['roofline']['seconds']:.0f}",
        f"{found['schedule']['seconds']:.0f}",
        f"{found['bytes_per_chip']['peak'] / 1e9:.2f}",
    ]


@functools.cache
def sentences() -> list[str]:
    """All strings of the package; what is filled in is a zero byte."""
    found = []
    for path in (ROOT / "pec_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("message", _cells("troubleshooting.md"))
def test_messages_are_those_of_the_code(message):
    parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(pattern.search(sentence) for sentence in sentences())
