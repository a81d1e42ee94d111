"""Configs as JSON: there and back, and what does not fit."""

import json
from dataclasses import replace

import pytest

from myllm.config import DataConfig, ModelConfig, RunConfig, from_dict, load_config, to_dict
from myllm.errors import UserError
from myllm.presets import PRESETS, get_preset

BASE = RunConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name, tmp_path):
    config = get_preset(name)
    assert from_dict(to_dict(config), BASE) == config
    assert from_dict(json.loads(json.dumps(to_dict(config))), get_preset("debug")) == config
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert load_config(path, BASE) == config


def test_optional_values_round_trip():
    config = replace(
        BASE,
        model=ModelConfig(n_kv_heads=4, head_dim=32),
        data=DataConfig(dataset="some", target_tokens=5),
    )
    assert from_dict(to_dict(config), BASE) == config


def test_from_dict_keeps_unspecified_values():
    config = from_dict({"train": {"max_steps": 7}, "name": "mine"}, get_preset("debug"))
    expected = replace(get_preset("debug"), name="mine", train=replace(get_preset("debug").train, max_steps=7))
    assert config == expected
    assert from_dict({}, BASE) == BASE


@pytest.mark.parametrize(
    ("values", "path", "expected"),
    [
        ({"data": {"target_tokens": 1e9}}, "data.target_tokens", 1_000_000_000),
        ({"data": {"target_tokens": None}}, "data.target_tokens", None),
        ({"model": {"n_kv_heads": None}}, "model.n_kv_heads", None),
        ({"model": {"n_kv_heads": 2}}, "model.n_kv_heads", 2),
        ({"optim": {"weight_decay": 0}}, "optim.weight_decay", 0.0),
        ({"optim": {"max_lr": 1}}, "optim.max_lr", 1.0),
        ({"eval": {"sample_prompts": ["a", "b"]}}, "eval.sample_prompts", ("a", "b")),
        ({"eval": {"sample_prompts": []}}, "eval.sample_prompts", ()),
        ({"train": {"fresh": True}}, "train.fresh", True),
        ({"model": {"activation": "gelu"}}, "model.activation", "gelu"),
    ],
    ids=str,
)
def test_valid_values_are_converted(values, path, expected):
    part, _, name = path.partition(".")
    got = getattr(getattr(from_dict(values, BASE), part), name)
    assert got == expected
    assert type(got) is type(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"max_steps": True}}, "train.max_steps: expected an integer, found True"),
        ({"train": {"max_steps": 1.5}}, "train.max_steps: expected an integer, found 1.5"),
        ({"train": {"max_steps": "100"}}, "train.max_steps: expected an integer, found '100'"),
        ({"train": {"max_steps": None}}, "train.max_steps: expected an integer, found None"),
        ({"train": {"max_steps": float("inf")}}, "train.max_steps: expected an integer, found inf"),
        ({"data": {"target_tokens": False}}, "data.target_tokens: expected an integer, found False"),
        ({"optim": {"max_lr": "fast"}}, "optim.max_lr: expected a number, found 'fast'"),
        ({"optim": {"max_lr": True}}, "optim.max_lr: expected a number, found True"),
        ({"train": {"fresh": 1}}, "train.fresh: expected true or false, found 1"),
        ({"name": 5}, "name: expected a string, found 5"),
        ({"model": {"activation": "relu"}}, "model.activation: expected one of swiglu, gelu, relu2, found 'relu'"),
        ({"model": {"activation": ["gelu"]}}, "model.activation: expected one of swiglu, gelu, relu2, found ['gelu']"),
        ({"eval": {"sample_prompts": "Once"}}, "eval.sample_prompts: expected a list, found 'Once'"),
        ({"eval": {"sample_prompts": ["a", 3]}}, "eval.sample_prompts: expected a string, found ['a', 3]"),
        ({"model": 12}, "model: expected an object of settings, found 12"),
        ({"model": None}, "model: expected an object of settings, found None"),
        ([1], "the config: expected an object of settings, found [1]"),
        ({"modle": {}}, "modle: unknown key, did you mean 'model'?"),
        ({"model": {"n_layer": 3}}, "model.n_layer: unknown key, did you mean 'n_layers'?"),
        ({"zzzz": 1}, "zzzz: unknown key"),
    ],
    ids=str,
)
def test_invalid_values_raise(values, message):
    with pytest.raises(UserError) as error:
        from_dict(values, BASE)
    header, fault = str(error.value).split("\n")
    assert header == "the config does not fit:"
    assert fault.startswith(f"  - {message}")


def test_reports_all_errors_together():
    values = {
        "nmae": "x",
        "model": {"layers": 2, "d_model": "wide", "n_heads": 4},
        "train": {"max_steps": True},
        "optim": [],
    }
    with pytest.raises(UserError) as error:
        from_dict(values, BASE)
    assert str(error.value).split("\n")[1:] == [
        "  - nmae: unknown key, did you mean 'name'?",
        "  - model.layers: unknown key, did you mean 'n_layers'?",
        "  - model.d_model: expected an integer, found 'wide'",
        "  - train.max_steps: expected an integer, found True",
        "  - optim: expected an object of settings, found []",
    ]


def test_unreadable_config_files_raise(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config .*gone\.json: No such file"):
        load_config(tmp_path / "gone.json", BASE)
    with pytest.raises(UserError, match=r"cannot read the config .*: Is a directory"):
        load_config(tmp_path, BASE)
    path = tmp_path / "config.json"
    for content in (b"{", b"", b"{'a': 1}", b'"\xff"'):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
            load_config(path, BASE)


def test_derived_model_sizes():
    model = ModelConfig(d_model=96, n_heads=6)
    assert (model.kv_heads, model.head_size) == (6, 16)
    assert replace(model, n_kv_heads=2, head_dim=40).kv_heads == 2
    assert replace(model, n_kv_heads=2, head_dim=40).head_size == 40


@pytest.mark.parametrize(
    ("vocab_size", "multiple", "rows"), [(50_257, 128, 50_304), (50_304, 128, 50_304), (50_257, 1, 50_257), (1, 64, 64)]
)
def test_padded_vocabulary(vocab_size, multiple, rows):
    assert ModelConfig(vocab_size=vocab_size, vocab_multiple=multiple).padded_vocab_size == rows
