"""Damage to files: bytes, values and keys of JSON, headers of tensors, the pickle of a `.pt`."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

DEEP = "\0deep"  # stands for JSON that is nested deeper than any reader recurses
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), "", "a", "0", "x" * 100_000, "../../etc/passwd", "/etc/passwd",
    "~", "gs://bucket/a", "https://example.com/a", "\x1b[31mred", "\x00", "\ud800", "a\nb",
    "\u202e", "__class__", "torch.nn.Linear", "float64", "int8", "(a+)+$", "[", "%s%n", "<script>",
    [], [[]], [None], [1, 2], ["a"], {}, {"": None}, {"a": {"b": []}}, list(range(10**4)), DEEP,
)  # fmt: skip


class Edit(NamedTuple):
    """One change; which file, place and value the numbers mean depends on the files."""

    kind: int
    file: int
    place: int
    value: int


number = st.integers(0, 2**32 - 1)
edits = st.lists(
    st.builds(Edit, st.integers(0, 15), number, number, number), min_size=1, max_size=6
)


def apply(edit: Edit, files: list[Path]) -> None:
    """Makes one change to one of the files."""
    path = files[edit.file % len(files)]
    if not path.exists():
        return
    data = path.read_bytes()
    structured = _BY_SUFFIX.get(path.suffix)
    try:
        if structured and edit.kind >= 5:
            data = structured(data, edit)
        else:
            data = _BYTES[edit.kind % len(_BYTES)](data, edit)
    except Exception:  # an edit before has damaged it: zip and JSON complain in many ways
        data = _BYTES[edit.kind % len(_BYTES)](data, edit)
    if edit.kind == 4 and edit.value % 8 == 0:
        path.unlink()
    else:
        path.write_bytes(data)


def _flipped(data: bytes, edit: Edit) -> bytes:
    if not data:
        return b"\0"
    place = edit.place % len(data)
    return data[:place] + bytes([data[place] ^ (1 << edit.value % 8)]) + data[place + 1 :]


def _cut(data: bytes, edit: Edit) -> bytes:
    return data[: edit.place % (len(data) + 1)]


def _inserted(data: bytes, edit: Edit) -> bytes:
    place = edit.place % (len(data) + 1)
    return data[:place] + _PIECES[edit.value % len(_PIECES)] + data[place:]


def _removed(data: bytes, edit: Edit) -> bytes:
    place = edit.place % (len(data) + 1)
    return data[:place] + data[place + edit.value % 64 :]


def _repeated(data: bytes, edit: Edit) -> bytes:
    place = edit.place % (len(data) + 1)
    return data[:place] + data[place : place + edit.value % 256] * 3 + data[place:]


_PIECES = (
    b"\0" * 64, b"\xff" * 8, b"\n", b"\r\n", b",", b'"', b"{", b"]", b"\xef\xbb\xbf", b"\xff\xfe",
    b"\x1b]0;title\x07", b"=cmd|' /C calc'!A0", b"9" * 400, b"1e999", b"-", b"NaN", b"..", b"/",
    "\N{SNOWMAN}".encode(), b"\xed\xa0\x80", b"a" * 70_000, b"\n" * 1000, b"\x80\x04.",
)  # fmt: skip
_BYTES = (_flipped, _cut, _inserted, _removed, _repeated)


def _json(data: bytes, edit: Edit) -> bytes:
    return _dumped(_changed(json.loads(data), edit))


def _lines(data: bytes, edit: Edit) -> bytes:
    lines = data.split(b"\n")
    which = edit.file // 7 % len(lines)
    lines[which] = _json(lines[which] or b"{}", edit)
    return b"\n".join(lines)


def _safetensors(data: bytes, edit: Edit) -> bytes:
    """The header is changed, its length is right."""
    (length,) = struct.unpack("<Q", data[:8])
    header = _dumped(_changed(json.loads(data[8 : 8 + length]), edit))
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def _npy(data: bytes, edit: Edit) -> bytes:
    """The header's text is changed, its length is right."""
    (length,) = struct.unpack("<H", data[8:10])
    header = data[10 : 10 + length]
    words = re.findall(rb"[\w.<>|-]+|.", header)
    choices = (b"True", b"|O", b"<f4", b"<c16", b"<U9", b"-1", b"999999999999", b"0", b"(", b"os")
    words[edit.place % len(words)] = choices[edit.value % len(choices)]
    changed = b"".join(words)
    return data[:8] + struct.pack("<H", len(changed)) + changed + data[10 + length :]


def _torch(data: bytes, edit: Edit) -> bytes:
    """A file of the archive is changed, its checksum is right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    pickles = [name for name in held if name.endswith("data.pkl")]
    name = pickles[0] if edit.kind % 4 and pickles else list(held)[edit.place % len(held)]
    if edit.kind == 15:
        held[name] = PICKLES[edit.value % len(PICKLES)]
    else:
        held[name] = _BYTES[edit.value % len(_BYTES)](held[name], edit)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, content)
    return out.getvalue()


PICKLES = (
    b"cos\nsystem\n(S'touch pwned'\ntR.",
    b"cbuiltins\neval\n(S'1'\ntR.",
    b"cposix\nsystem\n(S'touch pwned'\ntR.",
    b"c__builtin__\n__import__\n(S'os'\ntR.",
    b"ctorch._utils\n_rebuild_tensor_v2\n(tR.",
    b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'x'\ntR.",
    b"\x80\x02]" + b"h\x00" * 1000 + b".",
    b"\x80\x02}q\x00" + b"(" * 100_000 + b".",
    b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"I" + b"9" * 100_000 + b"\n.",
    b"cnumpy\ncore\n.",
)

_BY_SUFFIX: dict[str, Callable[[bytes, Edit], bytes]] = {
    ".json": _json,
    ".jsonl": _lines,
    ".safetensors": _safetensors,
    ".npy": _npy,
    ".pt": _torch,
}


def _changed(tree: Any, edit: Edit) -> Any:
    """One of the tree's values is replaced, removed, renamed or moved."""
    places = list(_places(tree))
    if not places:
        return VALUES[edit.value % len(VALUES)]
    parent, key = places[edit.place % len(places)]
    how = edit.kind % 5
    if how == 0:
        del parent[key]
    elif how == 1 and isinstance(parent, dict):
        parent[str(VALUES[edit.value % len(VALUES)])[:1000]] = parent.pop(key)
    elif how == 2:
        other_parent, other = places[edit.value % len(places)]
        parent[key] = json.loads(json.dumps(other_parent[other]))
    else:
        parent[key] = VALUES[edit.value % len(VALUES)]
    return tree


def _places(tree: Any) -> Any:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def _dumped(tree: Any) -> bytes:
    text = json.dumps(tree)
    return text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000).encode("utf-8", "replace")
