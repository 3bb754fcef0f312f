"""Masks of languages: every word of the language stays possible, other scripts do not, and generation obeys."""

import random
import shutil

import pytest
import sentencepiece
import torch
from conftest import randomise

from nanomblip.data.emoji import ROOT, load_emoji
from nanomblip.data.image import ImageConfig
from nanomblip.data.language_id import LanguageID
from nanomblip.data.languages import script_group
from nanomblip.data.scripts import script_of, script_share
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.measure.emoji_splits import answer, questions, score
from nanomblip.measure.fidelity import language_masks, language_tokens, letters_of
from nanomblip.model.mblip import MBLIP, PRESETS


@pytest.fixture(scope="module")
def emoji():
    return load_emoji("core")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ROOT / "spiece.model")


@pytest.fixture(scope="module")
def masks(emoji, tokenizer):
    return language_masks(tokenizer, ["de", "fil", "ru", "ar", "ja", "ko", "ta", "hi", "th", "km"], emoji)


def writable(tokenizer, mask, text):
    return mask[tokenizer.sentencepiece.encode(text)].all().item()


def test_every_name_of_a_language_can_be_written_and_few_english_ones_outside_latin(emoji, tokenizer, masks):
    english = list(emoji.names["en"].values())
    left = {}
    for lang, mask in masks.items():
        assert mask.shape == (len(tokenizer),) and not mask[tokenizer.pad] and not mask[tokenizer.unk]
        own = [writable(tokenizer, mask, name) for name in emoji.names[lang].values()]  # but "LED" and the like in another script
        assert sum(own) / len(own) > 0.99 and (sum(own) == len(own) or script_group(lang) != "Latin"), lang
        left.setdefault(script_group(lang), []).append(sum(writable(tokenizer, mask, n) for n in english) / len(english))
    mean = {group: sum(shares) / len(shares) for group, shares in left.items()}
    assert mean["Indic"] == mean["SE Asian"] == mean["Cyrillic"] == mean["Arabic"] == mean["CJK"] == 0
    assert 0.2 < mean["Latin"], "a mask of a Latin language still lets a good part of the English words through"


@pytest.mark.parametrize("char,script", [("a", "Latn"), ("ß", "Latn"), ("ж", "Cyrl"), ("ا", "Arab"), ("한", "Hang"), ("ﾊ", "Kana"), ("ー", "Kana"),
                                         ("の", "Hira"), ("猫", "Hani"), ("々", "Hani"), ("ְ", "Hebr"), ("ि", "Deva"), ("߷", None), ("ߊ", "Zyyy"),
                                         ("1", None), ("२", None), ("，", None), ("\u0301", None), ("▁", None), ("Ａ", "Latn")])  # fmt: skip
def test_scripts_of_characters(char, script):
    assert script_of(char) == script


def test_names_are_in_the_script_of_their_language(emoji):
    for lang, of_lang in emoji.names.items():
        shares = [s for s in (script_share(name, lang) for name in of_lang.values()) if s is not None]
        assert sum(shares) / len(shares) > 0.99, lang
    assert script_share("cat", "th") == 0 and script_share("แมว cat", "th") == 0.5 and script_share("12 !", "th") is None


def test_letters_of_languages_that_share_a_script_differ(emoji):
    assert "ß" in letters_of(emoji, "de") and "ß" not in letters_of(emoji, "en") and "q" in letters_of(emoji, "de")
    assert "ё" in letters_of(emoji, "ru") and "і" in letters_of(emoji, "uk") and "і" not in letters_of(emoji, "ru")
    assert "پ" in letters_of(emoji, "fa") and "پ" not in letters_of(emoji, "ar")
    assert "ก" in letters_of(emoji, "th") and not {"a", "ж"} & letters_of(emoji, "th")
    for lang in ("ku", "yi", "ceb", "zh", "ja", "am"):  # some without names: by their scripts and the Declaration of Human Rights
        assert len(letters_of(emoji, lang)) > 20, lang


@pytest.fixture(scope="module")
def other_tokenizer(emoji, tmp_path_factory):
    """A tokenizer that is not nano's, with pieces of many scripts and bytes, as the official one has."""
    folder = tmp_path_factory.mktemp("pieces")
    text = [name for lang in ("en", "de", "ru", "uk", "th", "hi", "ar", "ja", "zh") for name in emoji.names[lang].values()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 2), model_prefix=str(folder / "m"), vocab_size=2600, byte_fallback=True, pad_id=0, eos_id=1, unk_id=2,
        bos_id=-1, minloglevel=2, character_coverage=0.98)  # fmt: skip
    return Tokenizer(folder / "m.model")


def test_by_script_for_any_other_tokenizer(emoji, other_tokenizer):
    t = other_tokenizer
    masks = {lang: language_tokens(t, lang, emoji) for lang in ("en", "de", "ru", "th", "hi", "ja", "zh", "yi", "ceb")}
    for lang, mask in masks.items():
        for i in mask.nonzero()[:, 0].tolist():
            piece = t.sentencepiece.id_to_piece(i)
            assert t.sentencepiece.is_byte(i) or script_share(piece, lang) in (None, 1.0), (lang, piece)
    for lang in ("en", "de", "ru", "th", "hi", "zh"):
        names = list(emoji.names[lang].values())
        own = sum(writable(t, masks[lang], name) for name in names) / len(names)
        assert own > 0.98, (lang, own)
    english = list(emoji.names["en"].values())
    for lang in ("ru", "th", "hi", "ja", "zh"):
        assert sum(writable(t, masks[lang], name) for name in english) == 0, lang
    bytes_of = lambda mask: {int(t.sentencepiece.id_to_piece(i)[3:-1], 16) for i in mask.nonzero()[:, 0].tolist() if t.sentencepiece.is_byte(i)}
    assert 0xE0 in bytes_of(masks["th"]) and 0xD0 not in bytes_of(masks["th"]) and 0xD0 in bytes_of(masks["ru"])
    assert not masks["zh"][t.pad] and not masks["zh"][t.unk] and not masks["zh"][t.eos]


def test_nano_cannot_be_kept_to_a_language_of_which_it_has_no_text(emoji, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="force_lang.*Cebuano"):
        language_tokens(tokenizer, "ceb", emoji)
    shutil.copyfile(tokenizer.path, tmp_path / "spiece.model")  # beside a model it is a copy
    assert torch.equal(language_tokens(Tokenizer(tmp_path / "spiece.model"), "th", emoji), language_tokens(tokenizer, "th", emoji))


def test_a_model_that_knows_nothing_writes_only_the_pieces_of_the_language(emoji, tokenizer, masks):
    model = randomise(MBLIP(PRESETS["nano"]), std=0.3)
    image, judge = ImageConfig(size=64), LanguageID(emoji.names)
    langs = ["ta", "th", "ru", "de", "ja"]
    items = [item for lang in langs for item in questions(emoji, "pictures", [lang], 4)]
    random.Random(0).shuffle(items)  # languages mixed in one batch
    free = answer(model, tokenizer, image, emoji, items)
    kept = answer(model, tokenizer, image, emoji, items, masks=masks)
    for (_, lang), text in zip(items, kept):
        assert script_share(text, lang) in (None, 1.0), (lang, text)
    rate = lambda answers: sum(row["in_language"] for row in score(emoji, items, answers, judge).values()) / len(langs)
    assert rate(kept) > rate(free)
    share = lambda answers: sum(script_share(text, lang) or 0 for (_, lang), text in zip(items, answers)) / len(items)
    assert share(kept) > 0.9 > share(free)
