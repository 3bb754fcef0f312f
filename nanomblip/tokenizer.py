"""Text to piece ids and back: a thin wrapper around SentencePiece (Kudo & Richardson 2018), ids as in mT5.

pad = 0, eos = 1, unk = 2; there is no bos. Every encoded text ends with eos, and truncation never cuts it off.
"""

from pathlib import Path

import sentencepiece
import torch


class Tokenizer:
    """The pieces of one `spiece.model` file.

    `len(tokenizer)` is the number of pieces; a model's embedding may have a few rows more, which never come out of
    a text and cannot be decoded. Raises FileNotFoundError or ValueError naming the file when it cannot be read.
    """

    pad, eos, unk = 0, 1, 2

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such tokenizer file; it belongs beside the model's config.json")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
            ids = self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()
        except (RuntimeError, UnicodeDecodeError, OSError) as error:
            raise ValueError(f"{path}: damaged, or not a SentencePiece model ({str(error).strip()})") from None
        if ids != (self.pad, self.eos, self.unk):
            raise ValueError(f"{path}: pad, eos, unk have ids {ids}, mT5's are (0, 1, 2)")

    def __len__(self) -> int:
        return self.pieces.get_piece_size()

    def encode(self, text: str, max_length: int = 128) -> list[int]:
        """Piece ids of a text, eos last; at most `max_length` of them (the paper's 128 in training)."""
        # A byte of the command line that is not UTF-8 arrives as a lone surrogate, which SentencePiece cannot take.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return self.pieces.encode(text)[: max_length - 1] + [self.eos]

    def decode(self, ids) -> str:
        """The text of piece ids, up to the first eos; pad and rows beyond the tokenizer are left out."""
        kept = []
        for i in ids:
            if i == self.eos:
                break
            if i != self.pad and i < len(self):
                kept.append(int(i))
        return self.pieces.decode(kept)

    def batch(self, texts: list[str], max_length: int = 128):
        """Several prompts as one padded tensor: long (B, S), right-padded with pad."""
        return pad_rows([self.encode(text, max_length) for text in texts], self.pad)


def pad_rows(rows: list[list[int]], value: int) -> torch.Tensor:
    """Rows of ids of different lengths as one long tensor (B, longest), filled up on the right with `value`."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row)
    return out
