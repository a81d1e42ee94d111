"""Checkpoints that are almost the reference run's: other wrappers and sizes, and every odd pickle."""

import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from myllm.errors import UserError
from myllm.hub.import_lf_llm import read_lf_llm

SETTINGS = {"n_vocab": 50_257, "n_ctx": 9, "n_embd": 8, "n_head": 2, "n_layer": 1}


def weights(rows: int = 50_257, prefix: str = "") -> dict[str, torch.Tensor]:
    """Of a model of one layer, 8 wide, with a feed-forward part of 16."""
    block = {
        "norm1.weight": (8,), "norm2.weight": (8,), "attn.qkv_proj.weight": (24, 8), "attn.qkv_proj.bias": (24,),
        "attn.out_proj.weight": (8, 8), "attn.out_proj.bias": (8,), "ffn.net.0.weight": (32, 8),
        "ffn.net.0.bias": (32,), "ffn.net.3.weight": (8, 16), "ffn.net.3.bias": (8,),
    }  # fmt: skip
    shapes = {f"transformer_blocks.0.{name}": shape for name, shape in block.items()}
    shapes |= {"embd.weight": (rows, 8), "norm.weight": (8,)}
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {prefix + name: tensor for name, tensor in (tensors | {"out_proj.weight": tensors["embd.weight"]}).items()}


def write(file: Path, state: object, settings: object = SETTINGS, **more: object) -> Path:
    torch.save({"model_state_dict": state, "hParams": settings, "step": 3} | more, file)
    return file


def zipped(pickled: bytes, file: Path) -> Path:
    """Bytes in place of the pickle of a checkpoint."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", content)
    return file


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes_are_stripped(prefix: str, tmp_path: Path) -> None:
    loaded = read_lf_llm(write(tmp_path / "x.pth", weights(prefix=prefix))).weights
    assert torch.equal(loaded["embedding.weight"], weights()["embd.weight"])
    assert not [name for name in loaded if "module" in name or "_orig" in name]


def test_padded_vocabulary_is_truncated(tmp_path: Path) -> None:
    found = read_lf_llm(write(tmp_path / "x.pth", weights(50_304), SETTINGS | {"n_vocab": 50_304}))
    assert (found.config.vocab_size, len(found.weights["embedding.weight"])) == (50_257, 50_257)
    assert "the model has 50,304 rows for 50,257 tokens; the others are dropped" in found.notes
    with pytest.raises(UserError, match="vocabulary has 50,257 tokens, the model 300"):
        read_lf_llm(write(tmp_path / "x.pth", weights(300), SETTINGS | {"n_vocab": 300}))


def test_numpy_state_is_ignored(tmp_path: Path) -> None:
    """As a scheduler that computes with NumPy, or its random state, leaves behind: harmless, of no use, never made."""
    more = {"scheduler_state_dict": {"rate": np.float64(0.1)}, "random_state": np.random.RandomState(1).get_state()}
    assert read_lf_llm(write(tmp_path / "x.pth", weights(), **more)).config.d_model == 8


@pytest.mark.parametrize(
    ("state", "settings", "message"),
    [
        ([1], SETTINGS, "is not a dict of tensors by name"),
        ({1: torch.ones(1)}, SETTINGS, "is not a dict of tensors by name"),
        ({"embd.weight": 3}, SETTINGS, "is not a dict of tensors by name"),
        ({}, SETTINGS, "does not have the weights of the reference run"),
        ({}, None, "they have no values"),
        ({}, [1], "they have no values"),
    ],
)
def test_misplaced_entries_raise(state: object, settings: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_lf_llm(write(tmp_path / "x.pth", state, settings))


ODD: dict[str, bytes] = {
    "nothing": b"",
    "a call of a class that is not there": b"\x80\x02csrc.params\nHParams\nK\x01\x85R.",
    "a function said to be in its module": b"\x80\x02csrc.params.os\nsystem\nX\x02\x00\x00\x00ls\x85R.",
    "a record made of a number": b"\x80\x02csrc.params\nHParams\n)\x81K\x01b.",
    "a plain class made of the wrong thing": b"\x80\x02ccollections\nOrderedDict\nK\x05\x85R.",
    "nothing but marks": b"\x80\x02" + b"(" * 99_999 + b".",
    "a value that was never kept": b"\x80\x02h\x07.",
    "an older way to call": b"(cposix\nsystem\nX\x02\x00\x00\x00lso.",
    "a newer way to call": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.",
    "nothing at all": pickle.dumps(None, 2),
}


@pytest.mark.parametrize("name", ODD)
def test_malformed_pickles_raise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was run")

    monkeypatch.setattr(os, "system", never)
    with pytest.raises(UserError, match=r"x\.pth"):
        read_lf_llm(zipped(ODD[name], tmp_path / "x.pth"))


def test_corrupted_bytes_load_or_raise(tmp_path: Path) -> None:
    """Whatever byte is another: it is read, or one message says that it cannot be."""
    with zipfile.ZipFile(write(tmp_path / "x.pth", weights())) as archive:
        sound = archive.read("x/data.pkl")
    chance, refused = random.Random(1), 0
    for _ in range(200):
        content = bytearray(sound)
        for _ in range(chance.randint(1, 4)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            read_lf_llm(zipped(bytes(content), tmp_path / "y.pth"))
        except UserError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("damage", [lambda file: file[: len(file) // 2], lambda file: file[:-10], lambda file: b""])
def test_truncated_download_raises(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write(tmp_path / "x.pth", weights())
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        read_lf_llm(file)
