"""Sentences: cut, translated in batches of one length, and joined; NLLB and a prompted language model behind one interface."""

import random
import string

import pytest
import torch

from nanomblip.data.emoji import load_names
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.nllb_tokenizer import NLLB_CODES, NLLBTokenizer
from nanomblip.data.translators import (
    NLLBTranslator,
    PromptedTranslator,
    cut_long,
    join,
    open_translator,
    plain,
    split_sentences,
    split_text,
    translate,
)
from nanomblip.model.generate import Decoding
from nanomblip.model.nllb import translate_tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nllb(nllb_folder):
    return NLLBTranslator(nllb_folder, "fp32", CPU)


@pytest.fixture(scope="module")
def nano():
    return open_translator("nano", "fp32", CPU)


@pytest.mark.parametrize("text,sentences", [
    ("A cat. A dog.", ["A cat.", "A dog."]), ("a cat. a dog.", ["a cat. a dog."]), ("No end", ["No end"]), ("", [""]),
    ("Is it red? No! It is blue.", ["Is it red?", "No!", "It is blue."]),
    ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
    ("Mr. Smith met Dr. Jones at 3.5 p.m. in St. Louis.", ["Mr. Smith met Dr. Jones at 3.5 p.m. in St. Louis."]),
    ("J. R. R. Tolkien lived in the U.S. Army barracks.", ["J. R. R. Tolkien lived in the U.S. Army barracks."]),
    ("It costs $3.50. It is cheap (very). \"Yes\" is an answer.", ["It costs $3.50.", "It is cheap (very).", '"Yes" is an answer.']),
    ("First line\nsecond line\n\nThird. Fourth", ["First line", "second line", "Third.", "Fourth"]),
    ("Wait... What? See No. 5 and e.g. New York.", ["Wait...", "What?", "See No. 5 and e.g. New York."]),
])  # fmt: skip
def test_sentences(text, sentences):
    parts = split_sentences(text)
    assert parts[::2] == sentences and "".join(parts) == text


def test_whatever_is_split_can_be_put_together_again_and_is_short_enough():
    rng, alphabet = random.Random(0), string.ascii_letters + "  ..,;!?\n\"'(1" + "é猫"
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 300)))
        longest = rng.randrange(1, 40)
        parts, cut = split_text(text, len, longest)
        assert "".join(parts) == text and len(parts) % 2 == 1 and all(len(part) <= longest for part in parts[::2])
        assert cut == sum(len(part) > longest for part in split_sentences(text)[::2])


def test_a_long_sentence_is_cut_at_a_comma_near_its_middle_else_at_a_space_else_anywhere():
    words = lambda text: len(text.split())
    assert cut_long("one two, three four five six, seven eight", words, 6) == ["one two, three four five six,", " ", "seven eight"]
    assert cut_long("one, two three four five six seven", words, 4) == ["one, two three four", " ", "five six seven"]
    assert cut_long("x" * 10, len, 5) == ["x" * 5, "", "x" * 5] and cut_long("short", len, 5) == ["short"]


def test_joined_as_the_language_is_written():
    parts = ["A.", " ", "  B  c. ", "\n \n", "D.", "", "E"]
    assert join(parts, "de") == "A. B c.\nD.E" and join(parts, "zh") == join(parts, "ja") == "A.B c.\nD.E"


def test_what_nllb_has_no_token_for_is_made_plain(nllb):
    text = "“It’s a dog’s life” – ‘yes’… \u200bsaid\u00a0the\tcat\x00\ud800"
    assert nllb.clean(text) == "\"It's a dog's life\" - 'yes'... said the cat" and plain(" a\r\nb\u2028c ") == "a \nb\nc"
    assert PromptedTranslator.clean(None, "the crow’s “nest”") == "the crow’s “nest”"  # as it was read


def test_a_batch_changes_nothing_and_equal_sentences_are_translated_once(nllb):
    texts = ["A man is riding a horse on the beach.", "What is in this picture?", "There are 15 cats", "children play with a red ball"]
    items = [(text, "en", lang) for text in texts for lang in ("sw", "zh", "de")]
    asked = []
    whole = translate(nllb, [*items, *items], 5, progress=lambda tokens, seconds: asked.append((tokens, seconds)))
    assert len(asked) == 3 and sum(tokens for tokens, _ in asked) == sum(w.tokens for w in whole.values()) and list(asked)[0][1] > 0
    assert set(whole) == set(items) and translate(nllb, reversed(items), 5) == whole
    tokenizer, model = nllb.tokenizer, nllb.model
    for text, source, target in items:
        ids = torch.tensor([tokenizer.encode(text)])
        decoding = Decoding(max_new_tokens=10 + 3 * max(len(tokenizer.encode(t)) for t in texts))
        best = translate_tokens(model, ids, torch.tensor([tokenizer.language(target)]), decoding, vocab=len(tokenizer))[0][0]
        got = whole[text, source, target]
        same = min(len(tokenizer.decode(best.ids)), len(got.text))  # the batch has the limit of its longest
        assert got.text[:same] == tokenizer.decode(best.ids)[:same]
        assert got.ended or got.tokens >= 10, "cut off by the limit alone"


def test_unknown_tokens_and_texts_that_do_not_end_are_counted(nllb):
    class Fixed:
        tokenizer = nllb.tokenizer
        encode = staticmethod(nllb.encode)

        def write(self, rows, targets, decoding):
            from nanomblip.model.generate import Hypothesis

            return [Hypothesis([3, 10, 3], 0.0, False) for _ in rows]

    (got,) = translate(Fixed(), [("A man", "en", "sw")], 4).values()
    assert got.unknown == 2 and not got.ended and got.tokens == 3 and "⁇" in got.text


def test_the_sources_language_comes_first_or_with_legacy_last(nllb_folder, nllb):
    legacy = NLLBTranslator(nllb_folder, "fp32", CPU, legacy=True)
    one, two = (t.encode("A man", "en", "sw") for t in (nllb, legacy))
    english = nllb.tokenizer.language("en")
    assert one[0] == english == two[-1] and one[1:] == two[:-1]
    assert nllb.encode("x", "sw", "en")[0] == nllb.tokenizer.language("sw") and nllb.langs == tuple(LANGUAGES)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_other_types(nllb_folder, dtype):
    translator = NLLBTranslator(nllb_folder, dtype, CPU)
    assert len(translate(translator, [("A man", "en", "sw"), ("A red ball", "en", "th")], 2, num_beams=2)) == 2


def test_a_language_model_is_asked_in_words_and_knows_the_languages_that_have_names(nano):
    ids = nano.encode("red apple", "en", "sw")
    assert nano.tokenizer.decode(ids) == "red apple in Swahili:" and set(nano.langs) == set(load_names()) and len(nano.langs) == 85
    found = translate(nano, [("cat", "en", lang) for lang in ("de", "fr", "en")], 2)
    assert all(w.text and w.ended and not w.unknown for w in found.values())


def test_models_that_are_none(nllb_folder, tmp_path):
    for name, words in (("no/such", "--model no/such: no such folder.*nano, nllb-200-distilled-600M"), (str(tmp_path), "config.json: no such file")):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            open_translator(name, "fp32", CPU)
    for content, words in (('{"model_type": "bert"}', "type 'bert', neither"), ("[]", "type None"), ("{", "not readable")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            open_translator(str(tmp_path), "fp32", CPU)
    with pytest.raises(ValueError, match="--legacy"):
        open_translator("nano", "fp32", CPU, legacy=True)
    for path in nllb_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sentencepiece.bpe.model").unlink()
    with pytest.raises(FileNotFoundError, match="sentencepiece.bpe.model: no such tokenizer"):
        open_translator(str(tmp_path), "fp32", CPU)


def test_a_tokenizer_and_a_model_that_do_not_belong_together(nllb_folder, monkeypatch):
    monkeypatch.setattr(NLLBTokenizer, "__len__", lambda self: 405)
    with pytest.raises(ValueError, match=f"405 tokens of text and {len(NLLB_CODES)} languages, its model 606 rows"):
        NLLBTranslator(nllb_folder, "fp32", CPU)
