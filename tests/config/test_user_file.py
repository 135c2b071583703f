"""Plugins: run once, shadowing nothing; whatever goes wrong is answered by its place."""

from __future__ import annotations

import json
import sys

import pytest

from pec_jax.config.user_file import UserFileError, import_plugins


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.fixture(autouse=True)
def undone(monkeypatch):
    """What plugins leave in the interpreter goes with the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_plugin_runs_once_by_whichever_path_it_is_named(tmp_path):
    log = tmp_path / "log"
    plugin = write(tmp_path / "warmth.py", f"open({str(log)!r}, 'a').write('x')\n")
    link = tmp_path / "link.py"
    link.symlink_to(plugin)
    import_plugins([plugin, str(tmp_path / "." / "warmth.py"), str(link)])
    import_plugins([plugin])
    assert log.read_text() == "x"


def test_plugins_of_one_name_in_two_directories_both_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "same.py", f"open({str(tmp_path / name / 'ran')!r}, 'w')\n")
    import_plugins([str(tmp_path / "a" / "same.py"), str(tmp_path / "b" / "same.py")])
    assert (tmp_path / "a" / "ran").exists() and (tmp_path / "b" / "ran").exists()


def test_a_plugin_shadows_nothing_and_may_import_its_neighbours(tmp_path):
    write(tmp_path / "colorsys.py", "raise RuntimeError('the library was meant')\n")
    write(tmp_path / "network_of_mine.py", "DEPTH = 3\n")
    text = "import colorsys, json\nfrom network_of_mine import DEPTH\nassert json.dumps(DEPTH)\n"
    sys.modules.pop("colorsys", None)
    import_plugins([write(tmp_path / "json.py", text)])
    assert sys.modules["json"] is json and "network_of_mine" in sys.modules


def test_dataclasses_of_a_plugin_resolve_their_annotations(tmp_path):
    text = (
        "from __future__ import annotations\nimport dataclasses, typing\n"
        "@dataclasses.dataclass\nclass Options:\n    sub: Sub\n"
        "class Sub: pass\nassert typing.get_type_hints(Options)['sub'] is Sub\n"
    )
    import_plugins([write(tmp_path / "typed.py", text)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["does not exist"]),
        ("x = 1\nx = (\n", ["line 2", "SyntaxError", "never closed"]),
        ("import numpi\n", ["line 1", "ModuleNotFoundError", "numpi"]),
        ("def f():\n    raise KeyError('color')\n\nf()\n", ["line 2", "KeyError: 'color'"]),
        ("import sys\nsys.exit(3)\n", ["line 2", "SystemExit"]),
        ("import json\n\njson.loads('{')\n", ["line 3", "JSONDecodeError"]),
    ],
)
def test_a_plugin_that_fails_is_answered_by_its_place(tmp_path, text, words):
    path = tmp_path / "warmth.py"
    if text is not None:
        path.write_text(text)
    for _ in range(2):  # a failure leaves nothing behind that the next attempt would take for it
        with pytest.raises(UserFileError) as error:
            import_plugins([str(path)])
        assert all(word in str(error.value) for word in [f"plugin {path}", *words])
