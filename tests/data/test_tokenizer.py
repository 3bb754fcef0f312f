"""The tokenizer wrapper and the shipped nano model of 8,000 pieces."""

import pytest
import torch

from nanomblip.data.emoji import ROOT, load_emoji
from nanomblip.data.tokenizer import Tokenizer, pad_rows


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(ROOT / "spiece.model")


def test_ids_are_those_of_mt5(tokenizer):
    assert len(tokenizer) == 8000
    assert [tokenizer.sentencepiece.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]


def test_every_name_comes_back_as_people_wrote_it(tokenizer):
    names = [name for of_lang in load_emoji("all").names.values() for name in of_lang.values()]
    assert len(names) > 70_000
    assert [name for name in names if tokenizer.decode(tokenizer.encode(name)) != name] == []


@pytest.mark.parametrize("text", ["", " ", "a\0b", "👩\u200d🚀 zwj", "می‌خواهم", "</s><pad>", "e\u0301" * 50, "\u202egnirts", "\udcff bad byte"])
def test_odd_text_becomes_pieces_and_never_ends_early(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[-1] == 1 and 0 not in ids and 1 not in ids[:-1] and 2 not in ids
    tokenizer.decode(ids)


def test_long_text_is_cut_before_its_eos(tokenizer):
    ids = tokenizer.encode("cat " * 100_000, max_length=32)
    assert len(ids) == 32 and ids[-1] == 1


def test_decoding_stops_at_eos_and_skips_what_is_no_piece(tokenizer):
    ids = tokenizer.encode("red apple")
    assert tokenizer.decode([0, *ids[:-1], 8063, 0, 1, *ids]) == "red apple"
    assert tokenizer.decode(torch.tensor([0, *ids])) == "red apple"


def test_batches_are_padded_on_the_right(tokenizer):
    batch = tokenizer.batch(["cat", "a much longer text"])
    assert batch.dtype == torch.long and batch[0, -1] == 0 and batch[1, -1] == 1
    assert pad_rows([[5], [6, 7]], -100).tolist() == [[5, -100], [6, 7]]


@pytest.mark.parametrize("data", [b"", b"not a model", None])
def test_a_damaged_model_is_one_clear_error(tmp_path, data):
    path = tmp_path / "spiece.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises((ValueError, FileNotFoundError), match="spiece.model"):
        Tokenizer(path)


def test_transformers_reads_our_tokenizer_without_protobuf(tmp_path):
    """The same ids for every name in every language, and for odd spaces; the picture's piece comes after ours."""
    import json

    from transformers import AutoTokenizer

    from nanomblip.data.tokenizer import to_hf

    ours = Tokenizer(ROOT / "spiece.model")
    for name, content in to_hf(ours, image_token=len(ours)).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [str(n) for names in load_emoji("core").names.values() for n in names.values()][::7]
    texts += ["Caption the image in Swahili.", "  paka   mweusi ", "猫", "a\tb\nc", "👩\u200d🚀", "x" * 300, ""]
    for text in texts:
        assert theirs(text).input_ids == ours.encode(text, 10_000), text
    assert theirs("<image>").input_ids == [len(ours), 1] and len(texts) > 1000


def test_transformers_reads_a_tokenizer_that_normalises(tmp_path):
    """mT5's own does (nmt_nfkc) and has bytes for what it does not know; this one is made like it."""
    import json

    import sentencepiece
    from transformers import AutoTokenizer

    from nanomblip.data.tokenizer import to_hf

    names = [name for names in load_emoji("core").names.values() for name in names.values()]
    (tmp_path / "text").write_text("\n".join(names[::5]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "spiece"), vocab_size=3000, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        byte_fallback=True, character_coverage=0.99, normalization_rule_name="nmt_nfkc", minloglevel=2, hard_vocab_limit=False)  # fmt: skip
    ours = Tokenizer(tmp_path / "spiece.model")
    for name, content in to_hf(ours, image_token=len(ours)).items():
        (tmp_path / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*names[1::9], "Caption  the image in Ｓｗａｈｉｌｉ.", " a\tb ", "猫ﬁ①", "ñandú ㎏", "👩🚀"]:
        assert theirs(text).input_ids == ours.encode(text, 10_000), text
