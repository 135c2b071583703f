"""Config files: found by name and by path, importing each other from anywhere."""

from __future__ import annotations

import os
import sys

import pytest

from pec_jax.config import files
from pec_jax.config.files import load_config
from pec_jax.config.user_file import UserFileError
from pec_jax.configs import shapes_grpo

OWN = """
from {package} import shapes_pec

def get_config():
    config = shapes_pec.get_config()
    config.num_iterations = 7
    return config
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run from another directory, with nothing importable that only a clone has."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    root = str(files.SHIPPED.parent)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and os.path.abspath(p) != root])
    yield
    assert not any(isinstance(finder, files._ConfigsFinder) for finder in sys.meta_path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", files.shipped_names())
def test_every_shipped_config_loads_by_its_name(name):
    config = load_config(name)
    assert config.is_locked and (config.num_iterations > 0 or name == "eval_paper")


def test_those_are_the_files_of_the_folder():
    assert "shapes_pec" in files.shipped_names() and "sd3_pec" in files.shipped_names()
    assert "base" not in files.shipped_names()
    assert load_config(str(files.SHIPPED / "sd3_pec.py")) == load_config("sd3_pec")


@pytest.mark.parametrize("package", ["configs", "pec_jax.configs"])
@pytest.mark.parametrize("directory", ["exp", "configs", "a b"])
def test_an_own_config_builds_on_a_shipped_one_from_anywhere(tmp_path, package, directory):
    own = write(tmp_path / directory / "mine.py", OWN.format(package=package))
    link = tmp_path / "link.py"
    link.symlink_to(own)
    for path in (own, os.path.relpath(own), link):
        assert load_config(str(path)).num_iterations == 7


def test_both_names_are_one_module(tmp_path):
    before = {name for name in sys.modules if name.partition(".")[0] == "configs"}
    path = write(
        tmp_path / "mine.py",
        "import sys\nimport configs.shapes_grpo as a\nimport pec_jax.configs.shapes_grpo as b\n"
        "from configs import shapes_grpo as c\nassert a is b is c\n"
        "assert sys.modules['configs.shapes_grpo'] is a\n"
        "assert a.__spec__.name == 'pec_jax.configs.shapes_grpo'\n"
        "get_config = a.get_config\n",
    )
    assert load_config(str(path)) == shapes_grpo.get_config()
    assert {name for name in sys.modules if name.partition(".")[0] == "configs"} == before


def test_neighbours_in_a_directory_configs_come_first_and_are_read_anew(tmp_path):
    for project, seed in (("one", 1), ("two", 2)):
        folder = tmp_path / project / "configs"
        write(folder / "shapes_grpo.py", f"SEED = {seed}\n")
        # A folder's own base must not come between shipped configs.
        write(folder / "base.py", "raise RuntimeError('not meant')\n")
        write(
            folder / "mine.py",
            "from configs import shapes_grpo, shapes_pec\n\ndef get_config():\n"
            "    config = shapes_pec.get_config()\n    config.seed = shapes_grpo.SEED\n"
            "    return config\n",
        )
        assert load_config(str(folder / "mine.py")).seed == seed


def test_a_copy_that_imports_the_original_of_its_name_does_not_mean_itself(tmp_path):
    path = write(tmp_path / "configs" / "shapes_pec.py", OWN.format(package="configs"))
    assert load_config(str(path)).num_iterations == 7


def test_text_behind_a_colon_is_an_argument(tmp_path):
    text = OWN.format(package="configs").replace("get_config():", "get_config(n):", 1)
    path = write(tmp_path / "mine.py", text.replace("= 7", "= int(n)"))
    assert load_config(f"{path}:5").num_iterations == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shapes_pek", ["'shapes_pek'", "Did you mean 'shapes_pec'", "sd3_grpo"]),
        ("", ["unknown config ''", "shapes_pec"]),
        ("configs/shapes_pec.py", ["does not exist", "--config=shapes_pec"]),
        ("no/such.py", ["no/such.py does not exist", "shapes_pec, shapes_study"]),
        (".", ["is a directory"]),
        ("text.toml", ["text.toml is not Python", ".py"]),
        ("none.py", ["none.py has no function get_config()"]),
        ("dict.py", ["dict.py", "returns dict, not a ConfigDict", "base"]),
        ("field.py", ["field.py, line 4", "lr"]),
        ("inside.py", ["beside.py, line 2", "ZeroDivisionError"]),
    ],
)
def test_a_config_that_cannot_be_used_is_answered(name, words, tmp_path):
    write(tmp_path / "cwd" / "text.toml", "a = 1\n")
    write(tmp_path / "cwd" / "none.py", "get_config = 3\n")
    write(tmp_path / "cwd" / "dict.py", "def get_config():\n    return {}\n")
    write(
        tmp_path / "cwd" / "field.py",
        "from configs import shapes_pec\ndef get_config():\n"
        "    config = shapes_pec.get_config()\n    config.optimizer.lr = 1\n",
    )
    write(tmp_path / "cwd" / "beside.py", "def f():\n    return 1 / 0\n")
    write(tmp_path / "cwd" / "inside.py", "import beside\n\nbeside.f()\n")
    sys.path.insert(0, str(tmp_path / "cwd"))  # of the list that `elsewhere` takes away
    with pytest.raises(UserFileError) as error:
        load_config(name)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
