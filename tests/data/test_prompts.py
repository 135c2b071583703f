import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pec_jax.data import prompts as prompts_lib
from pec_jax.data.prompts import Prompt, PromptError, checksum, load_prompts, read_prompts

SHARED = Path(__file__).parents[3] / "shared" / "data" / "prompts"
# name -> (number of prompts, first prompt)
REAL_SETS = {
    "drawbench.txt": (
        1000,
        "New York Skyline with 'Google Research Pizza Cafe' written with fireworks on the sky.",
    ),
    "geneval.jsonl": (2212, "a photo of two wine glasses"),
    "ocr.txt": (1018, "A high-fashion runway with a sleek"),
    "pickscore_sfw.txt": (1024, "gold tip pyramid in the night"),
}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def real_set(name, tmp_path):
    """A real prompt set, or, where the checkout lies alone, one of the same size and kind."""
    if (SHARED / name).is_file():
        return SHARED / name
    count, first = REAL_SETS[name]
    texts = [first] + [f"prompt {i} of {name}, with “quotes” and ünïcödé" for i in range(1, count)]
    if name.endswith(".jsonl"):
        texts = [json.dumps({"tag": "counting", "include": [{"n": 2}], "prompt": t}) for t in texts]
    return write(tmp_path / name, "\n".join(texts))


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_sets(name, tmp_path, cache):
    path = real_set(name, tmp_path)
    source = load_prompts(path, cache)
    count, first = REAL_SETS[name]
    assert len(source) == count
    assert source[0].text.startswith(first)
    assert list(source) == list(read_prompts(path))  # the order of the file, nothing lost
    if name == "geneval.jsonl":
        assert source[0].metadata["tag"] == "counting" and "prompt" not in source[0].metadata
        assert isinstance(source[0].metadata["include"][0], dict)


def test_text_lines(tmp_path, cache):
    path = write(
        tmp_path / "p.txt", b"\xef\xbb\xbf a cat \r\n\n\t\nein B\xc3\xa4r\xe2\x80\xa8x\nlast"
    )
    assert list(load_prompts(path, cache)) == [
        Prompt("a cat"),
        Prompt("ein Bär\u2028x"),
        Prompt("last"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_ends_of_lines(tmp_path, cache, end):
    lines = ["a red circle", "", "a star", "ein Bär"]
    expected = [line for line in lines if line]
    text = write(tmp_path / "p.txt", end.join(lines))
    assert [p.text for p in load_prompts(text, cache)] == expected
    objects = write(tmp_path / "p.jsonl", end.join(json.dumps({"prompt": t}) for t in expected))
    assert [p.text for p in load_prompts(objects, cache)] == expected


def test_a_prompt_may_have_its_own_negative(tmp_path, cache):
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "negative_prompt": "blue"}\n{"prompt": "b", "negative_prompt": ""}\n'
        '{"prompt": "c \\ud83d\\ude00"}',
    )
    source = load_prompts(path, cache)
    assert [p.negative for p in source] == ["blue", "", None]
    assert source[2].text == "c \U0001f600"
    assert source[0].metadata == {"negative_prompt": "blue"}  # kept, for what is written of it


def test_random_access(tmp_path, cache):
    source = load_prompts(write(tmp_path / "p.txt", "a\nb\nc\n"), cache)
    assert source[-1] == Prompt("c")
    assert [p.text for p in source[1:]] == ["b", "c"]
    with pytest.raises(IndexError, match="Prompt 3 of a set of 3"):
        source[3]


def test_second_start_reads_the_cache_and_an_edit_is_noticed(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "p.txt", "a\nb\n")
    load_prompts(path, cache)
    files = sorted(cache.rglob("*"))
    stamps = [file.stat().st_mtime_ns for file in files]
    load_prompts(path, cache)
    assert sorted(cache.rglob("*")) == files
    assert [file.stat().st_mtime_ns for file in files] == stamps
    before = checksum(path)
    write(path, "a\nc\n")
    assert checksum(path) != before
    assert [p.text for p in load_prompts(path, cache)] == ["a", "c"]
    monkeypatch.setenv("PEC_JAX_CACHE", str(tmp_path / "elsewhere"))
    load_prompts(path)
    assert list((tmp_path / "elsewhere" / "prompts").iterdir())


def test_same_content_as_another_kind_is_another_set(tmp_path):
    line = '{"prompt": "a cat"}'
    assert checksum(write(tmp_path / "p.txt", line)) != checksum(write(tmp_path / "p.jsonl", line))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"", "is empty"),
        ("p.txt", b"\n  \n", "is empty"),
        ("p.jsonl", b"\n", "is empty"),
        ("p.txt", b"fine\ncaf\xe9\n", "line 2: byte 4 is not UTF-8"),
        ("p.txt", b"caf\xe9\n", "line 1: byte 4 is not UTF-8. .*iconv -f CP1252 -t UTF-8 p.txt"),
        ("p.txt", "fine".encode("utf-16"), "is UTF-16, .*iconv -f UTF-16 -t UTF-8 p.txt"),
        ("p.txt", b"\xfe\xff" + "fine".encode("utf-16-be"), "iconv -f UTF-16 -t UTF-8"),
        ("p.txt", "fine".encode("utf-16-le"), "iconv -f UTF-16LE -t UTF-8"),
        ("p.jsonl", '{"prompt": "ä"}'.encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8 p.jsonl"),
        ("p.txt", "fine".encode("utf-32"), "iconv -f UTF-32 -t UTF-8"),
        ("p.txt", b"fine\nb\0d\n", "line 2: holds a zero byte"),
        ("p.txt", b"fine\n\n" + b"x" * 10_001 + b"\n", "line 3: longer than 10000"),
        ("p.txt", b"x" * 200_000, "line 1: longer than 10000"),
        ("p.txt", "ä€".encode() * 30_000, "line 1: longer than 10000"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        ("p.jsonl", b"[" * 9000, "line 1: not valid JSON"),
        ("p.jsonl", b'["a"]', "line 1: not a JSON object"),
        ("p.jsonl", b'{"text": "a"}', 'line 1: the field "prompt"'),
        ("p.jsonl", b'{"prompt": 3}', 'line 1: the field "prompt"'),
        ("p.jsonl", b'{"prompt": " "}', 'line 1: the field "prompt"'),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "a \\ud83d b"}', r"line 2: \\ud83d is one half"),
        ("p.jsonl", b'{"prompt": "a", "note": ["\\udc00"]}', r"line 1: \\udc00 is one half"),
        ("p.jsonl", b'{"prompt": "a", "\\udfff": 1}', r"line 1: \\udfff is one half"),
        ("p.jsonl", b'{"prompt": "a \xed\xa0\xbd"}', "line 1: byte 15 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a", "negative_prompt": 3}', 'the field "negative_prompt"'),
        ("p.csv", b"a", "must end in .txt or .jsonl"),
    ],
)
def test_bad_files(tmp_path, cache, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(PromptError, match=message) as error:
        load_prompts(path, cache)
    assert str(path) in str(error.value)
    assert not list(cache.rglob("*.json"))  # nothing half-made stays behind


def test_line_of_the_longest_length_is_fine(tmp_path):
    text = "ä" * 10_000
    assert list(read_prompts(write(tmp_path / "p.txt", text + "\r\n"))) == [Prompt(text)]


def test_missing_file(tmp_path, cache):
    with pytest.raises(PromptError, match=r"nowhere\.txt does not exist"):
        load_prompts(tmp_path / "nowhere.txt", cache)
    with pytest.raises(PromptError, match="is a directory"):
        load_prompts(tmp_path, cache)


def test_too_many_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts_lib, "MAX_PROMPTS", 2)
    path = write(tmp_path / "p.txt", "a\nb\nc\n")
    with pytest.raises(PromptError, match="more than 2 prompts"):
        list(read_prompts(path))


def test_cache_that_cannot_be_written(tmp_path):
    path = write(tmp_path / "p.txt", "a\n")
    blocked = write(tmp_path / "file", "in the way")
    with pytest.raises(PromptError, match="PEC_JAX_CACHE"):
        load_prompts(path, blocked / "cache")


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_broken_cache_is_reported(tmp_path, cache, damage):
    path = write(tmp_path / "p.txt", "\n".join(f"prompt {i}" for i in range(100)))
    load_prompts(path, cache)
    (records,) = cache.rglob("*array_record*")
    if damage == "truncate":
        os.truncate(records, records.stat().st_size // 2)
    else:
        records.unlink()
    with pytest.raises(PromptError, match=r"is broken.*Delete that directory"):
        load_prompts(path, cache)


def test_quiet_and_without_tensorflow(tmp_path, cache):
    """A person sees no noise of TFDS, and does not wait for TensorFlow to load."""
    path = write(tmp_path / "p.txt", "a\nb\n")
    code = (
        "import sys\n"
        "from pec_jax.data.prompts import load_prompts\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"assert load_prompts({str(path)!r}, {str(cache)!r})[1].text == 'b'\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    root = Path(prompts_lib.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_two_starts_at_once(tmp_path, cache):
    """The one that comes second to the renaming reads what the first has made."""
    from pec_jax.data import prompt_builder

    path = write(tmp_path / "p.txt", "a\nb\n")
    late = prompt_builder.PromptBuilder(path=path, data_dir=cache / checksum(path)[:32])
    original = late._download_and_prepare

    def overtaken(**kwargs):
        load_prompts(path, cache)
        original(**kwargs)

    late._download_and_prepare = overtaken
    prompt_builder._prepare(late)
    assert len(late.as_data_source(split=prompt_builder.SPLIT)) == 2
