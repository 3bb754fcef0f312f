"""The translator's tokenizer: ids against transformers' own, the published ids of two sentences, languages, unknown tokens."""

import random
import struct

import pytest
import sentencepiece
import torch
from conftest import SENTENCES

from nanomblip.data.emoji import load_emoji
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.nllb_tokenizer import NLLB_CODES, NLLBTokenizer
from nanomblip.data.tokenizer import _normalizer


@pytest.fixture(scope="module")
def path(nllb_tokens):
    return nllb_tokens


@pytest.fixture(scope="module")
def tokenizer(path):
    return NLLBTokenizer(path)


def in_transformers(path, **kwargs):
    """Theirs from the same file, without protobuf: it wants vocabulary and merges, the languages with their ids."""
    from transformers import NllbTokenizer

    pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    texts = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    vocab = {text: i for i, text in enumerate(["<s>", "<pad>", "</s>", "<unk>", *texts[3:], *NLLB_CODES, "<mask>"])}
    merges = [(t[:i], t[i:]) for t in texts[3:] for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    theirs = NllbTokenizer(vocab=vocab, merges=merges, _spm_precompiled_charsmap=_normalizer(path.read_bytes())[0], **kwargs)
    assert theirs.convert_tokens_to_ids("eng_Latn") == len(texts) + 1 + 46 and theirs.convert_tokens_to_ids("<mask>") == len(texts) + 203
    return theirs


TEXTS = [
    "A man is riding a horse on the beach.", "", " ", "  spaces   inside  and around ", "a\u00a0b\u3000c", "ﬁne ﬂags Ⅳ ①", "e\u0301te\u0301",
    "tab\tand\nnewline", "鸡 鹰", "鸡鹰鸽裤 a 鸡", "“curly” – dash…", "Größe ÜBER", "ＦＵＬＬ width", "0123456789", "they're (all)!?", "👩\u200d🚀", "ß" * 50,
]  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
def test_ids_equal_transformers(path, legacy):
    tokenizer, theirs = NLLBTokenizer(path, legacy), in_transformers(path, legacy_behaviour=legacy)
    rng = random.Random(1)
    words = SENTENCES + ["鸡", "ﬁ", "ﷺ", "xyzzy", "\u00a0", "½"]
    texts = TEXTS + [" ".join(rng.choices(words, k=rng.randint(1, 15))) for _ in range(300)]
    for lang in ("en", "fr", "zh", "sw"):
        theirs.src_lang = LANGUAGES[lang].nllb
        for text in texts:  # theirs makes a token of spaces at the end
            assert tokenizer.encode(text, lang) == theirs(text.strip())["input_ids"], text
    for text in texts:
        assert tokenizer.encode(text + " \n") == tokenizer.encode(text)


def test_names_of_pictures_in_many_languages_equal_transformers(path):
    tokenizer, theirs = NLLBTokenizer(path), in_transformers(path)
    for lang, names in list(load_emoji("all").names.items())[::9]:
        for name in list(names.values())[:40]:
            assert tokenizer.encode(name)[1:] == theirs(name.strip())["input_ids"][1:], (lang, name)


def varint(n):
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A model of 256,000 pieces, the words of two sentences where NLLB-200's own has them, written as protobuf by hand."""
    golden = {"▁How": 13374, "▁was": 1398, "▁your": 4260, "▁day": 4039, "?": 248130, "▁UN": 16297, "▁Chief": 134408, "▁says": 25653,
              "▁there": 6370, "▁is": 248, "▁no": 254, "▁military": 103929, "▁solution": 94995, "▁in": 108, "▁Syria": 49486}  # fmt: skip
    words = {i - 1: text for text, i in golden.items()} | {0: "<unk>", 1: "<s>", 2: "</s>"}
    out = bytearray()
    for i in range(256_000):
        text = words.get(i, f"<{i}>").encode()
        kind = {0: 2, 1: 3, 2: 3}.get(i, 1)  # unknown, control, normal
        piece = b"\x0a" + varint(len(text)) + text + b"\x15" + struct.pack("<f", -1.0) + b"\x18" + varint(kind)
        out += b"\x0a" + varint(len(piece)) + piece
    path = tmp_path_factory.mktemp("full") / "sentencepiece.bpe.model"
    path.write_bytes(out)
    return path


@pytest.mark.parametrize("text, ids", [
    ("How was your day?", [13374, 1398, 4260, 4039, 248130]),
    ("UN Chief says there is no military solution in Syria", [16297, 134408, 25653, 6370, 248, 254, 103929, 94995, 108, 49486]),
])  # fmt: skip
def test_published_ids(full_size, text, ids):
    """With the real file these two sentences have these ids; here their words stand at the same places."""
    assert NLLBTokenizer(full_size).encode(text) == [256047, *ids, 2]
    assert NLLBTokenizer(full_size, legacy=True).encode(text) == [*ids, 2, 256047]
    assert NLLBTokenizer(full_size).decode([*ids, 2]) == text


def test_languages_of_the_real_size(full_size):
    tokenizer = NLLBTokenizer(full_size)
    assert len(tokenizer) == 256_001
    ids = [tokenizer.language(code) for code in NLLB_CODES]
    assert ids == list(range(256_001, 256_203))
    assert [tokenizer.language(c) for c in ("en", "eng_Latn", "zu", "zul_Latn", "ace_Arab")] == [256047, 256047, 256202, 256202, 256001]


def test_codes_equal_transformers_and_have_all_languages_of_mblip():
    from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES

    assert NLLB_CODES == FAIRSEQ_LANGUAGE_CODES and len(set(NLLB_CODES)) == 202
    assert {lang.nllb for lang in LANGUAGES.values()} < set(NLLB_CODES)
    assert len({lang.nllb for lang in LANGUAGES.values()}) == 96  # 95 and English


@pytest.mark.parametrize("code", ["xx", "swa_Latn", "", "Swahili", "EN", "</s>"])
def test_unknown_languages(tokenizer, code):
    with pytest.raises(ValueError, match="unknown language"):
        tokenizer.encode("a man", code)


def test_unknown_tokens_are_counted_and_shown(tokenizer):
    ids = tokenizer.encode("a 鸡鹰 dog 鸽 horse")
    assert tokenizer.unknown(ids) == 2 and tokenizer.unknown(torch.tensor(ids)) == 2
    assert tokenizer.decode(ids).count("\u2047") == 2 and "horse" in tokenizer.decode(ids)
    assert tokenizer.unknown(tokenizer.encode("a dog")) == 0


@pytest.mark.parametrize("text", ["</s> a", "<mask>", "eng_Latn", "<s><pad><unk>", "a\0b", "\udcff bad byte"])
def test_special_tokens_never_come_out_of_a_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.language("en") and ids[-1] == 2 and all(3 <= i < len(tokenizer) for i in ids[1:-1])


def test_decoding_gives_the_text_back(tokenizer):
    text = "A man is riding a horse on the beach."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode([0, 1, *ids[1:-1], 1, 2, *ids, 5]) == text
    assert tokenizer.decode(torch.tensor(ids)) == text and tokenizer.decode([]) == tokenizer.decode([2, 7]) == ""
    assert tokenizer.decode([len(tokenizer) + 204, *ids]) == text  # rows beyond


def test_batches_are_padded_on_the_right_with_one(tokenizer):
    batch = tokenizer.batch(["a dog", "a man is riding a horse"], "fr")
    assert batch.dtype == torch.long and batch[0, -1] == 1 and batch[1, -1] == 2
    assert (batch[:, 0] == tokenizer.language("fra_Latn")).all()
    assert (NLLBTokenizer(tokenizer.path, legacy=True).batch(["a dog"], "fr")[0, -2:] == torch.tensor([2, tokenizer.language("fr")])).all()


@pytest.mark.parametrize("data", [b"", b"not a model", None])
def test_a_damaged_model_is_one_clear_error(tmp_path, data):
    path = tmp_path / "sentencepiece.bpe.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match="sentencepiece.bpe.model"):
        NLLBTokenizer(path)


def test_the_tokenizer_of_mt5_is_refused():
    from nanomblip.data.emoji import ROOT

    with pytest.raises(ValueError, match="NLLB's are"):
        NLLBTokenizer(ROOT / "spiece.model")
