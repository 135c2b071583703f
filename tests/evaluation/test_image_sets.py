"""Which images belong to which prompt, and what is said of folders that cannot be read."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pec_jax.data.prompts import PromptError
from pec_jax.evaluation.image_sets import image_size, read_image_set, read_images


def picture(path, level=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, 0, 0)).save(path)


def lines(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))


def test_a_line_per_image(tmp_path):
    for i, name in enumerate(("b.png", "a.png", "c/d.jpg")):
        picture(tmp_path / name, level=i)
    lines(
        tmp_path / "images.jsonl",
        {"file": "b.png", "prompt": "one", "tag": "x"},
        {"file": "a.png", "prompt": "two"},
        {"file": "c/d.jpg", "prompt": "one", "tag": "x"},
    )
    found = read_image_set(tmp_path, None)
    assert found.files == ("b.png", "a.png", "c/d.jpg") and found.groups == (0, 1, 0)
    assert found.prompts[2].metadata == {"tag": "x"} and found.members() == [[0, 2], [1]]
    assert image_size(found, 0) == (6, 8)
    assert read_images(found, [0, 1])[:, 0, 0, 0].tolist() == [0, 1]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_subfolder_per_prompt_in_the_order_of_their_names(tmp_path, suffix):
    for folder in ("2", "10", "9"):
        for name in ("0.png", "1.png"):
            picture(tmp_path / "images" / folder / name, level=int(folder))
    (tmp_path / "images" / "notes").mkdir()
    prompts = tmp_path / f"prompts.{suffix}"
    texts = ("two", "nine", "ten")
    prompts.write_text(
        "\n".join(texts if suffix == "txt" else [json.dumps({"prompt": text}) for text in texts])
    )
    found = read_image_set(tmp_path / "images", prompts)
    assert [p.text for p in found.prompts] == ["two", "two", "nine", "nine", "ten", "ten"]
    assert read_images(found, range(6))[:, 0, 0, 0].tolist() == [2, 2, 9, 9, 10, 10]


def test_genevals_own_layout(tmp_path):
    for i in range(2):
        folder = tmp_path / f"{i:05d}"
        for k in range(3):
            picture(folder / "samples" / f"{k:04d}.png")
        picture(folder / "grid.png")  # its contact sheet
        lines(folder / "metadata.jsonl", {"prompt": f"prompt {i}", "tag": "counting"})
    found = read_image_set(tmp_path, None)
    assert len(found) == 6 and found.groups == (0, 0, 0, 1, 1, 1)
    assert found.prompts[5].text == "prompt 1" and found.prompts[5].metadata["tag"] == "counting"


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(PromptError, match="no such directory"):
        read_image_set(tmp_path / "nowhere", None)
    with pytest.raises(PromptError, match=r"neither images\.jsonl nor a subfolder"):
        read_image_set(tmp_path, None)
    picture(tmp_path / "0" / "a.png")
    with pytest.raises(PromptError, match=r"0: has no metadata\.jsonl"):
        read_image_set(tmp_path, None)
    (tmp_path / "two.txt").write_text("one\ntwo")
    with pytest.raises(PromptError, match=r"has 2 prompts, but .* has 1 subfolders"):
        read_image_set(tmp_path, tmp_path / "two.txt")
    for name, message in (
        ("absent.png", "there is no absent"),
        ("../x.png", "below"),
        (3, "below"),
    ):
        lines(tmp_path / "l.jsonl", {"file": name, "prompt": "a"})
        with pytest.raises(PromptError, match=message):
            read_image_set(tmp_path, tmp_path / "l.jsonl")
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nonsense")
    lines(tmp_path / "l.jsonl", {"file": "bad.png", "prompt": "a"})
    with pytest.raises(PromptError, match=r"bad\.png: not an image"):
        image_size(read_image_set(tmp_path, tmp_path / "l.jsonl"), 0)
