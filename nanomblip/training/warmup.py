"""Nano's warm-up: a picture's vectors first learn to look like the English name of what it shows.

A frozen language model understands vectors that it has met, its embedded tokens, and little else; and through all
of its layers the gradient that a fresh projection gets says little about where those are. But they are known: they
are the rows of its embedding. So before the language model is asked at all, each picture's Q vectors v are pulled
towards the embedded English name T_c of its concept c,

    loss = 2 |v - T_c|^2 / (Q D)  -  log softmax_c ( (v . T_c - |T_c|^2 / 2) / (D tau^2) )        tau = 1

The second term is the probability that v is T_c blurred by Gaussian noise, among the names of all concepts: it asks
for what tells names apart, where the first asks for all of it. The language model does not run, so a step costs a
third. mBLIP has no such stage: it warms up the projection alone, by the language model's loss (`--warmup
projection`). BLIP-2's own first stage, which contrasts pictures with texts, is its relative. What was tried around
it: weights/LOG.md.
"""

import torch
import torch.nn.functional as F

from nanomblip.data.tokenizer import Tokenizer

TAU = 1.0


def name_places(tokenizer: Tokenizer, names: list[str], queries: int) -> torch.Tensor:
    """Each name's tokens stretched evenly over the Q places: long (C, Q). Of a name with more tokens the first Q
    are left."""
    rows = [tokenizer.encode(name, queries + 1)[:-1] for name in names]
    return torch.tensor([[row[i * len(row) // queries] for i in range(queries)] for row in rows])


def name_scores(visual: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """How near each name is, the logits of the equation above: visual float (B, Q, D), table float (C, Q, D) -> (B,
    C)."""
    v, t = visual.float().flatten(1), table.flatten(1)  # (B, Q*D), (C, Q*D)
    return (v @ t.T - t.square().sum(1) / 2) / (table.shape[-1] * TAU**2)


def names_loss(visual: torch.Tensor, concept: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The equation above, mean over the batch: visual float (B, Q, D), concept long (B,), table float (C, Q, D),
    one row a concept."""
    return 2 * F.mse_loss(visual.float(), table[concept]) + F.cross_entropy(name_scores(visual, table), concept)
