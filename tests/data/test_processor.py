"""Picture settings wherever a folder has them, and what a folder of transformers 5 lacks."""

import json
import shutil
from dataclasses import replace

import pytest

from nanomblip.data.emoji import ROOT
from nanomblip.data.image import ImageConfig
from nanomblip.data.processor import load_image_config, save_processor
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.weights.files import write_json

CFG = ImageConfig(size=20, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.fixture
def folder(tmp_path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    source.mkdir(), folder.mkdir()
    shutil.copyfile(ROOT / "spiece.model", source / "spiece.model")
    write_json(source / "preprocessor_config.json", CFG.to_hf())
    save_processor(folder, source, queries=5)
    return folder


def test_a_folder_of_transformers_5(folder, tmp_path):
    from transformers import Blip2Processor

    Blip2Processor.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert "preprocessor_config.json" not in names and "tokenizer.json" in names and "spiece.model" not in names
    assert load_image_config(tmp_path / "theirs") == CFG == load_image_config(folder)
    with pytest.raises(FileNotFoundError, match="spiece.model: no such tokenizer file; tokenizer.json is not read; copy it .* language model"):
        Tokenizer(tmp_path / "theirs" / "spiece.model")
    shutil.copyfile(ROOT / "spiece.model", tmp_path / "theirs" / "spiece.model")
    (tmp_path / "again").mkdir()
    save_processor(tmp_path / "again", tmp_path / "theirs", queries=5)
    assert load_image_config(tmp_path / "again") == CFG
    again = Blip2Processor.from_pretrained(tmp_path / "again")
    assert tuple(again.image_processor.image_mean) == CFG.mean and again.image_processor.size["height"] == 20


def test_of_two_settings_the_ones_that_transformers_takes(folder):
    from transformers import AutoImageProcessor

    nested = replace(CFG, size=30)
    write_json(folder / "processor_config.json", {"processor_class": "Blip2Processor", "image_processor": nested.to_hf(), "num_query_tokens": 5})
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 30
    assert load_image_config(folder) == nested


@pytest.mark.parametrize("name,content,words", [
    ("processor_config.json", [], "does not hold an object"), ("processor_config.json", "{", "not readable as JSON"),
    ("processor_config.json", {"image_processor": None}, "does not hold an object"), ("preprocessor_config.json", None, "no such file, and no image_processor"),
    ("processor_config.json", {"image_processor": CFG.to_hf() | {"do_pad": True}}, "do_pad"),
])  # fmt: skip
def test_settings_that_cannot_be_read_are_named(folder, name, content, words):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=words) as error:
        load_image_config(folder)
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_says_where_one_is_to_be_had(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such tokenizer file; copy it beside the model's config.json from the language model"):
        Tokenizer(tmp_path / "spiece.model")
