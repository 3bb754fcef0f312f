"""Reading a picture's vectors: under each of them, the token whose embedding points most nearly the same way.

The Q-Former hands the language model I*Q vectors of its own width D, which stand where embedded tokens would. So each
can be held against the embedding: the token t with the largest cosine v . e_t / (|v| |e_t|). After re-alignment they
spell what the model sees: under nano's eight vectors of a bicycle stands bi bi c c y c c le.
"""

import torch
import torch.nn.functional as F

from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.mblip import MBLIP

ROWS = 4096  # of the embedding at a time: 250,000 rows of 2048 bf16 numbers are never copied to fp32 as a whole


@torch.no_grad()
def lens(model: MBLIP, visual: torch.Tensor, tokenizer: Tokenizer) -> list[list[tuple[str, float]]]:
    """The nearest token to each vector and its cosine: visual (B, I*Q, D) -> B lists of I*Q pairs.

    visual: from `model.encode_image`, of any floating type and length. Only tokens of the tokenizer are looked at, not
    the rows that an embedding has beyond; of equally near ones the first is taken. A vector of zeros has cosine 0.
    """
    B, L, D = visual.shape
    table = model.mt5.embed.weight[: len(tokenizer)]  # (V, D)
    x = F.normalize(visual.reshape(B * L, D).float(), dim=-1)  # (B*L, D)
    best, ids = x.new_full((B * L,), -2.0), torch.zeros(B * L, dtype=torch.long, device=x.device)
    for start in range(0, len(table), ROWS):
        cosines = x @ F.normalize(table[start : start + ROWS].float(), dim=-1).T  # (B*L, rows)
        top = cosines.amax(-1)
        ids = torch.where(top > best, start + cosines.argmax(-1), ids)  # argmax: the first of equal ones
        best = torch.maximum(best, top)
    texts = [tokenizer.sentencepiece.id_to_piece(i) for i in ids.tolist()]
    pairs = list(zip(texts, best.clamp(-1, 1).tolist()))
    return [pairs[row * L : (row + 1) * L] for row in range(B)]


def show_lens(pairs: list[tuple[str, float]], columns: int = 8) -> str:
    """One picture's vectors for people: `columns` of them a line, token and cosine, and the number of the first."""
    cells = [f"{text} {cosine:.2f}" for text, cosine in pairs]
    rows = range(0, len(cells), columns)
    return "\n".join(
        f"{row:5}  " + "  ".join(f"{cell:<14}" for cell in cells[row : row + columns]).rstrip() for row in rows
    )
