"""Text to token ids and back: a thin wrapper around SentencePiece (Kudo & Richardson 2018), ids as in mT5.

pad = 0, eos = 1, unk = 2; there is no bos. Every encoded text ends with eos, and truncation never cuts it off.
"""

import base64
from pathlib import Path

import sentencepiece
import torch


class Tokenizer:
    """The tokens of one `spiece.model` file.

    `len(tokenizer)` is their number; a model's embedding may have a few rows more, which never come out of
    a text and cannot be decoded. Raises FileNotFoundError or ValueError naming the file when it cannot be read.
    """

    pad, eos, unk = 0, 1, 2

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.sentencepiece = open_sentencepiece(self.path)
        ids = self.sentencepiece.pad_id(), self.sentencepiece.eos_id(), self.sentencepiece.unk_id()
        if ids != (self.pad, self.eos, self.unk):
            raise ValueError(f"{path}: pad, eos, unk have ids {ids}, mT5's are (0, 1, 2)")

    def __len__(self) -> int:
        return self.sentencepiece.get_piece_size()

    def encode(self, text: str, max_length: int = 128) -> list[int]:
        """Token ids of a text, eos last; at most `max_length` of them (the paper's 128 in training)."""
        return self.sentencepiece.encode(valid_text(text))[: max_length - 1] + [self.eos]

    def decode(self, ids) -> str:
        """The text of token ids, up to the first eos; pad and rows beyond the tokenizer are left out."""
        kept = []
        for i in ids:
            if i == self.eos:
                break
            if i != self.pad and i < len(self):
                kept.append(int(i))
        return self.sentencepiece.decode(kept)

    def batch(self, texts: list[str], max_length: int = 128):
        """Several prompts as one padded tensor: long (B, S), right-padded with pad."""
        return pad_rows([self.encode(text, max_length) for text in texts], self.pad)


def open_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The SentencePiece model of a file; FileNotFoundError or ValueError naming the file when it cannot be read."""
    if not path.is_file():
        beside = "; tokenizer.json is not read" if path.with_name("tokenizer.json").exists() else ""
        raise FileNotFoundError(
            f"{path}: no such tokenizer file{beside}; copy it beside the model's config.json from the language "
            "model that it was made from (google/mt5-*, bigscience/mt0-* and google/flan-t5-* on the hub have it)"
        )
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        model.eos_id()  # fails where the file was empty
    except (RuntimeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not a SentencePiece model ({str(error).strip()})") from None
    return model


def valid_text(text: str) -> str:
    """Text that SentencePiece can take: a byte of the command line that is not UTF-8 arrives as a lone surrogate."""
    return text.encode("utf-8", "replace").decode("utf-8")


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of ids of different lengths as one long tensor (B, longest), filled up on the right with `value`."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out


def to_hf(tokenizer: Tokenizer, image_token: int) -> dict[str, dict]:
    """The same tokenizer as transformers reads it, without protobuf: contents of tokenizer.json and
    tokenizer_config.json.

    image_token: id of the token "<image>" that transformers puts in place of the picture's vectors, see
    `layout.config_to_hf`.
    """
    model, n = tokenizer.sentencepiece, len(tokenizer)
    special = [
        (0, model.id_to_piece(0)),
        (1, model.id_to_piece(1)),
        (2, model.id_to_piece(2)),
        (image_token, "<image>"),
    ]
    added = [
        dict(id=i, content=text, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i, text in special
    ]
    charsmap, squeeze = _normalizer(tokenizer.path.read_bytes())
    normalizers = (
        [dict(type="Precompiled", precompiled_charsmap=base64.b64encode(charsmap).decode())] if charsmap else []
    )
    if squeeze:
        normalizers += [
            dict(type="Strip", strip_left=True, strip_right=True),
            dict(type="Replace", pattern=dict(Regex=" {2,}"), content=" "),
        ]
    space = dict(type="Metaspace", replacement="▁", prepend_scheme="always", split=True)
    eos = dict(SpecialToken=dict(id=model.id_to_piece(1), type_id=0))
    sequence = lambda which, type_id: dict(Sequence=dict(id=which, type_id=type_id))
    unigram = dict(type="Unigram", unk_id=2, byte_fallback=any(model.is_byte(i) for i in range(min(n, 1000))),
                 vocab=[[model.id_to_piece(i), model.get_score(i)] for i in range(n)])  # fmt: skip
    decoder = dict(type="Sequence", decoders=[dict(type="ByteFallback"), space]) if model["byte_fallback"] else space
    single, ending = [sequence("A", 0), eos], {special[1][1]: dict(id=special[1][1], ids=[1], tokens=[special[1][1]])}
    pair = [*single, sequence("B", 0), eos]
    return {
        "tokenizer.json": dict(
            version="1.0", truncation=None, padding=None, added_tokens=added, pre_tokenizer=space, decoder=decoder,
            model=unigram, normalizer=dict(type="Sequence", normalizers=normalizers) if normalizers else None,
            post_processor=dict(type="TemplateProcessing", single=single, pair=pair, special_tokens=ending)),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", processor_class="Blip2Processor", pad_token=special[0][1],
            eos_token=special[1][1], unk_token=special[2][1], clean_up_tokenization_spaces=False),
    }  # fmt: skip


def _normalizer(model: bytes) -> tuple[bytes, bool]:
    """What a SentencePiece model does to a text first: its table of characters (field 2 of its field 3) and whether
    spaces are squeezed (field 4 there, by default true). The file is a protobuf message: a list of numbered fields,
    numbers in 7 bits a byte."""
    spec = dict(_fields(dict(_fields(model)).get(3, b"")))
    return spec.get(2, b""), bool(spec.get(4, 1))


def _fields(message: bytes):
    """Number and value of each field of a protobuf message: int, or bytes."""
    at = 0

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        yield key >> 3, message[at : at + size]
        at += size
