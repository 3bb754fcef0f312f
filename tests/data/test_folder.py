"""A model's folder as a whole. What --model means is tested through sample.py, where users meet it (tests/test_sample.py)."""

import json

import pytest
import torch
from conftest import tiny_mblip

from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.folder import HERE, find_model, load_folder, save_folder, spoken
from nanomblip.data.image import ImageConfig
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.int8 import Int8Linear
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights.files import write_json
from nanomblip.weights.save import save_mblip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    model = MBLIP(PRESETS["nano"])
    model.init_weights()
    save_mblip(model, path, image_token=8000, languages=["en", "sw"])
    write_json(path / "preprocessor_config.json", ImageConfig(size=64).to_hf())
    (path / "spiece.model").write_bytes((DATA / "spiece.model").read_bytes())
    return path


def test_everything_of_a_folder_comes_back_from_what_is_written(source, tmp_path):
    tokenizer, pictures, model = load_folder(source)
    assert (len(tokenizer), pictures.size, spoken(source)) == (8000, 64, ["en", "sw"]) and not model.training
    save_folder(tmp_path / "whole", model, source, merged=True)
    again, settings, same = load_folder(tmp_path / "whole")
    assert settings == pictures and len(again) == 8000 and spoken(tmp_path / "whole") == ["en", "sw"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    _, _, small = load_folder(source, "int8", "int8")
    save_folder(tmp_path / "int8", small, source, merged=False)
    _, _, same = load_folder(tmp_path / "int8")  # auto: as stored
    assert isinstance(same.mt5.lm_head, Int8Linear) and torch.equal(same.mt5.lm_head.weight, small.mt5.lm_head.weight)


def test_auto_is_int8_above_so_many_parameters(source, monkeypatch):
    assert not any(isinstance(module, Int8Linear) for module in load_folder(source)[2].modules())
    monkeypatch.setattr("nanomblip.data.folder.LARGE", 1_000_000)
    assert isinstance(load_folder(source)[2].mt5.lm_head, Int8Linear)
    assert not any(isinstance(module, Int8Linear) for module in load_folder(source, "fp32", "fp32")[2].modules())


def test_files_that_do_not_go_together_are_named(source, tmp_path):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    write_json(tmp_path / "preprocessor_config.json", ImageConfig(size=20).to_hf())
    with pytest.raises(FileNotFoundError, match="spiece.model"):
        load_folder(tmp_path)
    (tmp_path / "spiece.model").write_bytes((DATA / "spiece.model").read_bytes())
    with pytest.raises(ValueError, match="a tokenizer of 8000 tokens does not go with an embedding of 67 rows"):
        load_folder(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for file in source.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    write_json(other / "preprocessor_config.json", ImageConfig(size=32).to_hf())
    with pytest.raises(ValueError, match="picture settings are for pictures of 32, the ViT wants 64"):
        load_folder(other)
    config = json.loads((other / "config.json").read_text())
    for languages in (5, "sw", [], ["zz"]):
        write_json(other / "config.json", config | dict(languages=languages))
        with pytest.raises(ValueError, match="languages is not a list"):
            spoken(other)
    config.pop("languages")
    write_json(other / "config.json", config)
    assert spoken(other) is None


def test_the_shipped_weights_are_nano():
    assert find_model("nano") == HERE / "weights" / "nano" / "aligned" and len(Tokenizer(find_model("nano") / "spiece.model")) == 8000
    with pytest.raises(FileNotFoundError, match="--model nowhere: no such folder"):
        find_model("nowhere")
