"""The reader of torch's files: what torch writes is read, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from pec_jax.weights.tensors import WeightsError
from pec_jax.weights.torch_files import DTYPES, TorchFile


def written(tmp_path, content, name="model.pt"):
    path = tmp_path / name
    torch.save(content, path)
    return path


def test_every_type_of_number_is_read(tmp_path):
    torch.manual_seed(0)
    types = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8"]
    tensors = {t: (torch.randn(3, 4) * 9).to(getattr(torch, t)) for t in [*types, "uint8", "bool"]}
    read = TorchFile(written(tmp_path, tensors))
    assert set(read) == set(tensors) and len(read) == len(tensors) == len(DTYPES)
    for name, tensor in tensors.items():
        array = read[name]
        assert str(array.dtype) == name and read.shape(name) == (3, 4)
        expected = tensor.float().numpy() if name == "bfloat16" else tensor.numpy()
        np.testing.assert_array_equal(array.astype(expected.dtype), expected)


def test_views_of_a_shared_storage_keep_their_offsets_and_strides(tmp_path):
    whole = torch.arange(60.0).reshape(3, 4, 5)
    tensors = {
        "whole": whole,
        "part": whole[1:, 2],
        "turned": whole.permute(2, 0, 1),
        "stepped": whole[:, ::2, 1::2],
        "spread": torch.ones(1).expand(2, 3),
        "scalar": torch.tensor(4.5),
        "empty": torch.zeros(0, 7),
    }
    read = TorchFile(written(tmp_path, tensors))
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(read[name], tensor.numpy())


def test_a_trainers_wrapping_is_taken_off(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    path = written(tmp_path, {"state_dict": model.state_dict(), "epoch": 3, "note": "best"})
    read = TorchFile(path)
    assert set(read) == {"0.weight", "0.bias"} and read.file("0.weight") == path
    np.testing.assert_array_equal(read["0.weight"], model[0].weight.detach().numpy())


class Runs:
    """Unpickling it would call a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def repacked(tmp_path, content: bytes, compressed=False):
    """A torch file whose pickle is another."""
    source = written(tmp_path, {"a": torch.ones(2)}, "source.pt")
    path = tmp_path / "hostile.pt"
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", kind) as new:
        for info in old.infolist():
            data = content if info.filename.endswith("data.pkl") else old.read(info)
            new.writestr(info.filename, data, compress_type=kind)
    return path


HOSTILE = {
    "system": lambda path: pickle.dumps({"a": Runs(os.system, f"touch {path}")}),
    "open": lambda path: pickle.dumps([Runs(open, str(path), "w")]),
    "eval": lambda path: pickle.dumps(Runs(eval, f"open({str(path)!r}, 'w')")),
    "getattr": lambda path: pickle.dumps(Runs(getattr, "text", "upper")),
    "import": lambda path: pickle.dumps(Runs(__import__, "antigravity")),
    "builtin by another name": lambda path: b"c__builtin__\neval\n(S'1'\ntR.",
    "torch's own loader": lambda path: b"ctorch\nload\n(S'x'\ntR.",
    "nested in torch": lambda path: b"ctorch.serialization\nos.system\n(S'true'\ntR.",
    "dotted name": lambda path: b"\x80\x04\x8c\x0bcollections\x8c\x12OrderedDict.update\x93.",
    "extension": lambda path: b"\x82\x01.",
    "a storage that is called": lambda path: b"ctorch\nFloatStorage\n(I1\ntR.",
    "a persistent id that is none": lambda path: b"S'storage'\nQ.",
    "truncated": lambda path: pickle.dumps({"a": [1, 2, 3]})[:-4],
    "no pickle": lambda path: b"\xff\x00hello",
    "deep": lambda path: b"(" * 100_000 + b".",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_is_run(tmp_path, name):
    mark = tmp_path / "ran"
    with pytest.raises(WeightsError, match=r"hostile\.pt"):
        TorchFile(repacked(tmp_path, HOSTILE[name](mark)))
    assert not mark.exists()


def test_what_would_take_any_memory_is_refused(tmp_path):
    path = written(tmp_path, {"a": torch.ones(1).expand(2**25)})
    with pytest.raises(WeightsError, match="'a' repeats few numbers many times"):
        TorchFile(path)
    with pytest.raises(WeightsError, match="a memo of number 4294967295"):
        TorchFile(repacked(tmp_path, b"\x80\x02}r\xff\xff\xff\xff."))


def test_a_directory_that_is_no_text_is_refused(tmp_path):
    path = written(tmp_path, {"a": torch.ones(2)})
    data = path.read_bytes()
    at = data.rindex(b"model/data/0")  # in the directory at the end
    path.write_bytes(data[:at] + b"\xed" + data[at + 1 :])
    with pytest.raises(WeightsError, match=r"model\.pt: .*not a zip file"):
        TorchFile(path)


def test_a_list_is_no_model(tmp_path):
    with pytest.raises(WeightsError, match="no dictionary of tensors"):
        TorchFile(written(tmp_path, [torch.ones(2)]))


def tensor_pickle(numbers: int, offset: int, shape: str, strides: str) -> bytes:
    """{"a": a tensor} of a storage of as many float32."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI{numbers}\ntQ".encode()
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
    rebuilt += f"I{offset}\n({shape}t({strides}tI00\nccollections\nOrderedDict\n(tRtR".encode()
    return b"(S'a'\n" + rebuilt + b"d."


def test_the_pickle_by_hand_is_a_tensor(tmp_path):
    read = TorchFile(repacked(tmp_path, tensor_pickle(2, 0, "I2\n", "I1\n")))
    np.testing.assert_array_equal(read["a"], [1.0, 1.0])


@pytest.mark.parametrize(
    "numbers, offset, shape, strides",
    [
        (2, 1, "I2\n", "I1\n"),  # past the end
        (2, 0, "I3\n", "I1\n"),
        (2, 0, "I2\n", "I-1\n"),
        (2, -1, "I1\n", "I1\n"),
        (2, 0, "I2\n", "I1\nI1\n"),
        (9, 0, "I2\n", "I1\n"),  # a storage larger than its file
        (2, 0, "I-2\n", "I1\n"),
        (2, 0, "I2\n", "I4611686018427387904\n"),
    ],
)
def test_a_view_outside_of_its_data_is_refused(tmp_path, numbers, offset, shape, strides):
    with pytest.raises(WeightsError, match="reaches outside its data"):
        TorchFile(repacked(tmp_path, tensor_pickle(numbers, offset, shape, strides)))


def test_other_files_are_named(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    whole = written(tmp_path, {"a": torch.ones(2000)}).read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("old.pt", "text.pt", "zip.pt", "cut.pt", "absent.pt"):
        with pytest.raises(WeightsError, match=name):
            TorchFile(tmp_path / name)
    bomb = repacked(tmp_path, pickle.dumps({}), compressed=True)
    with pytest.raises(WeightsError, match="compressed"):
        TorchFile(bomb)
