"""The two stages of re-alignment (Geigle et al. 2023, section 4): what each trains, by which loss, at which rates,
for how long.

    stage 1, the warm-up    the fresh projection alone, by the language model's loss   --warmup projection, the paper's
                            or projection, queries and Q-Former, by `names_loss`       --warmup names, nano's
    stage 2                 LoRA, projection, queries and Q-Former, by the language model's loss on the task mixture

Each has optimizers of its own, with a linear warm-up and a cosine decay of the learning rate.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from nanomblip.data.emoji import Emoji
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.attention import attend_path
from nanomblip.model.int8_kernels import has_bf16
from nanomblip.model.mblip import MBLIP
from nanomblip.training.config import Config
from nanomblip.training.optimizers import build_optimizers
from nanomblip.training.parts import EVERYTHING, WARMUP, mark_trainable, model_parts
from nanomblip.training.warmup import name_places, names_loss


@dataclass
class Stage:
    """Steps first, first + 1 ... last - 1 of a run.

    rates: part -> peak learning rate, of the parts that are trained; muon: Muon for the matrices inside the towers,
    at a rate of its own. loss: (model, batch, features (B, I, N, Dv)) -> a number to be made small.
    """

    title: str
    first: int
    last: int
    rates: dict[str, float]
    muon: bool
    loss: Callable
    batches: torch.utils.data.Dataset

    def begin(self, model: MBLIP, cfg: Config) -> list[torch.optim.Optimizer]:
        """Freeze everything but the parts of this stage, and return fresh optimizers for these."""
        self.warm = cfg.lr_warmup
        mark_trainable(model, tuple(self.rates))
        rate_of = {p: self.rates[part] for part in self.rates for p in model_parts(model)[part]}
        self.optimizers = build_optimizers(model, rate_of, self.muon, cfg.beta2)
        return self.optimizers

    def set_rates(self, step: int) -> float:
        """Give the optimizers the learning rates of a step; returns the share of the peak: up in a straight line,
        then a cosine to 0."""
        done = step - self.first
        if done < self.warm:
            share = (done + 1) / self.warm
        else:
            share = 0.5 * (1 + math.cos(math.pi * (done - self.warm) / max(1, self.last - self.first - self.warm)))
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * share
        return share

    def column(self, model: MBLIP) -> list[str]:
        """For the table of parts: the peak rate of each part, "" where it is frozen."""
        return [f"{self.rates[part]:g}" if part in self.rates else "" for part in model_parts(model)]


def language_loss(model: MBLIP, batch: dict, features: torch.Tensor) -> torch.Tensor:
    """Cross-entropy per token of the answer, in nats, given the picture and the prompt: the paper's loss."""
    return model.loss(features, batch["prompt"], batch["labels"])


class NamesLoss:
    """`names_loss` of the embedded pictures: stage 1 of nano."""

    def __init__(self, model: MBLIP, tokenizer: Tokenizer, emoji: Emoji):
        device = model.queries.device
        english = [emoji.names["en"][concept] for concept in emoji.concepts]
        places = name_places(tokenizer, english, model.cfg.queries).to(device)  # (C, Q)
        self.table = model.mt5.embed_tokens(places).detach().float()  # (C, Q, D)
        index = {concept: i for i, concept in enumerate(emoji.concepts)}
        self.concept = torch.tensor([index[concept] for concept, _ in emoji.cells], device=device)  # of each picture

    def __call__(self, model: MBLIP, batch: dict, features: torch.Tensor) -> torch.Tensor:
        return names_loss(model.image_tokens(features), self.concept[batch["picture"]], self.table)


def build_stages(cfg: Config, model: MBLIP, tokenizer: Tokenizer, emoji: Emoji, captions, mixture) -> list[Stage]:
    """The stages of a run that have steps. captions, mixture: the batches of stage 1 and of stage 2."""
    if cfg.init == "random":
        rates = dict.fromkeys(EVERYTHING, cfg.warmup_lr)
        return [Stage("everything, from random weights", 0, cfg.steps, rates, True, language_loss, mixture)]
    rates = {"Q-Former": cfg.qformer_lr, "queries": cfg.qformer_lr, "projection": cfg.lr}
    rates |= {"LoRA": cfg.lora_lr} if cfg.lora != "none" else {}
    rates = {part: rate for part, rate in rates.items() if rate}
    names, first = cfg.warmup == "names", cfg.stage1_steps
    stages = [Stage("stage 2", first, cfg.steps, rates, False, language_loss, mixture)]
    if first:
        loss = NamesLoss(model, tokenizer, emoji) if names else language_loss
        rates = dict.fromkeys(WARMUP[cfg.warmup], cfg.warmup_lr)
        stages.insert(0, Stage(f"stage 1: {cfg.warmup}", 0, first, rates, names, loss, captions))
    return [stage for stage in stages if stage.first < stage.last]


def uses_bf16(cfg: Config, device: torch.device) -> bool:
    """What `--bf16` means on a device. ValueError for bf16 on a GPU that has no instructions for it.

    auto: bf16 where there are instructions, but beside int8 layers on GPUs only: on a CPU these have their own types.
    """
    if cfg.bf16 == "on" and device.type == "cuda" and not has_bf16(device):
        raise ValueError("--bf16 on: this GPU has no instructions for bf16; give --bf16 off, which computes in fp32")
    auto = cfg.bf16 == "auto" and has_bf16(device) and (device.type == "cuda" or not cfg.int8)
    return cfg.bf16 == "on" or auto


@contextmanager
def precision(device: torch.device, bf16: bool):
    """Matrix products of what is inside in bf16, or everything in fp32. The backward pass belongs inside, because
    checkpointing runs attention there once more. In bf16 on a CPU attention of a few places takes less time written
    out than in torch's fused kernel."""
    with (
        attend_path("written" if bf16 and device.type == "cpu" else "fast"),
        torch.autocast(device.type, torch.bfloat16, enabled=bf16),
    ):
        yield
