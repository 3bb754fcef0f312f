"""Names by a translator, and planted errors, in place of the human names of the embedded pictures."""

import json

import pytest

from nanomblip.data.emoji import load_emoji, pair_split
from nanomblip.data.json_index import MixtureError
from nanomblip.data.names import load_translated, with_errors, with_translated


@pytest.fixture(scope="module")
def emoji():
    return load_emoji("core")


def names_file(tmp_path, rows):
    path = tmp_path / "names.json"
    path.write_text(json.dumps(rows))
    return load_translated(path)


def row(lang="sw", concept="1f408", name="paka"):
    return dict(context="", label=name, image_id=concept, lang=lang)


def test_the_names_of_a_file_replace_the_human_ones_but_for_english(emoji, tmp_path):
    got = with_translated(emoji, names_file(tmp_path, [row(), row("de", name="Mieze"), row("en", name="kitty"), row("ceb", name="iring")]))
    assert got.names == {"de": {"1f408": "Mieze"}, "en": emoji.names["en"], "sw": {"1f408": "paka"}}
    assert list(got.names) == ["de", "en", "sw"] and got.phrases is emoji.phrases and len(emoji.names["sw"]) > 500


@pytest.mark.parametrize("bad", [row(lang="xx"), row(concept="COCO_1.jpg"), row(name=" "), dict(context="", label="a", image_id="1f408")])
def test_a_file_of_something_else(emoji, tmp_path, bad):
    with pytest.raises(ValueError, match="--names .*names.json: example 1 is no name of an embedded picture; .*translate --input emoji"):
        with_translated(emoji, names_file(tmp_path, [row(), bad]))
    with pytest.raises(MixtureError, match="--names .*no such file"):
        load_translated(tmp_path / "none.json")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_planted_errors_are_names_of_other_things_and_as_many_as_asked_for(emoji, share):
    got, changed, trained = with_errors(emoji, share), 0, 0
    for lang, of_lang in emoji.names.items():
        assert list(got.names[lang]) == list(of_lang) and set(got.names[lang].values()) <= set(of_lang.values())
        for concept, name in of_lang.items():
            if lang == "en" or pair_split(lang, concept) != "train":
                assert got.names[lang][concept] == name
            else:
                changed, trained = changed + (got.names[lang][concept] != name), trained + 1
    assert abs(changed / trained - share) < 0.01


def test_fewer_errors_are_some_of_more(emoji):
    few, many = with_errors(emoji, 0.1).names["sw"], with_errors(emoji, 0.3).names["sw"]
    assert all(many[c] == name for c, name in few.items() if name != emoji.names["sw"][c])
