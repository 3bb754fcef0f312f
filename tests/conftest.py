"""What several tests share: tiny models with every parameter randomised, and the same model inside transformers."""

import io
import json
import os
import random
from dataclasses import replace

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracles must not look for anything on the network
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from nanomblip.data import filters
from nanomblip.data.emoji import load_names
from nanomblip.data.language_id import LanguageID
from nanomblip.model.mblip import MBLIP, MBLIPConfig
from nanomblip.model.mt5 import MT5Config
from nanomblip.model.nllb import NLLB, NLLBConfig
from nanomblip.model.qformer import QFormerConfig
from nanomblip.model.vit import ViTConfig
from nanomblip.weights.nllb import nllb_names
from nanomblip.weights.save import save_mblip

torch.set_num_threads(1)  # the models here are tiny: threads would only wait for each other

# Odd on purpose: heads x head width differs from the width, encoder and decoder differ in depth, cross-attention
# in every second of three Q-Former layers, distances beyond the last bucket.
TINY = MBLIPConfig(
    vit=ViTConfig(image_size=20, patch_size=5, width=24, layers=2, heads=3, mlp=40),
    qformer=QFormerConfig(width=20, layers=3, heads=2, mlp=28, vision_width=24),
    mt5=MT5Config(vocab=67, width=28, heads=3, head_width=8, mlp=36, layers=2, decoder_layers=3, buckets=8, max_distance=10),
    queries=5,
)


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.15) -> torch.nn.Module:
    """Give every parameter its own random values, norms (around 1), biases, bias tables and lm_head included."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * std)
            if "norm" in name and name.endswith("weight"):
                p.add_(1.0)
    return model


def tiny_mblip(cfg: MBLIPConfig = TINY, seed: int = 0, std: float = 0.15) -> MBLIP:
    return randomise(MBLIP(cfg), seed, std).eval()


def in_transformers(model: MBLIP, folder):
    """The same model as transformers sees it: saved by our writer, opened by theirs."""
    from transformers import Blip2ForConditionalGeneration

    save_mblip(model, folder, image_token=model.cfg.mt5.vocab - 1)
    return Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def transformers_inputs(model: MBLIP, prompt, prompt_mask, images: int = 1):
    """Prompt and mask with the placeholders that transformers replaces by picture vectors in front."""
    B, places = prompt.shape[0], images * model.cfg.queries
    ids = torch.cat([torch.full((B, places), model.cfg.mt5.vocab - 1), prompt], dim=1)
    return ids, torch.cat([torch.ones(B, places, dtype=torch.long), prompt_mask.long()], dim=1)


@pytest.fixture
def batch():
    """Two pictures a sample, ragged prompts and labels, for the TINY config."""
    generator = torch.Generator().manual_seed(1)
    cfg = TINY
    image = torch.randn(3, 1, 3, cfg.vit.image_size, cfg.vit.image_size, generator=generator)
    prompt = torch.randint(3, cfg.mt5.vocab - 1, (3, 9), generator=generator)
    labels = torch.randint(3, cfg.mt5.vocab - 1, (3, 12), generator=generator)
    for row, (s, t) in enumerate(((9, 4), (6, 12), (2, 7))):
        prompt[row, s - 1], prompt[row, s:] = 1, 0
        labels[row, t - 1], labels[row, t:] = 1, -100
    return dict(image=image, prompt=prompt, prompt_mask=prompt != 0, labels=labels)


# Odd on purpose as well: encoder and decoder differ in depth, heads and feed-forward.
TINY_NLLB = NLLBConfig(vocab=83, width=24, heads=3, decoder_heads=2, mlp=40, decoder_mlp=28, layers=2, decoder_layers=3)


def tiny_nllb(cfg: NLLBConfig = TINY_NLLB, seed: int = 0, std: float = 0.15) -> NLLB:
    return randomise(NLLB(cfg), seed, std).eval()


def save_nllb(model: NLLB, folder, **more):
    """Write a translator into a folder as transformers would, by transformers; returns theirs. more: for its config.json."""
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    c = model.cfg
    theirs = M2M100ForConditionalGeneration(M2M100Config(**dict(
        vocab_size=c.vocab, d_model=c.width, encoder_attention_heads=c.heads, decoder_attention_heads=c.decoder_heads,
        encoder_ffn_dim=c.mlp, decoder_ffn_dim=c.decoder_mlp, encoder_layers=c.layers, decoder_layers=c.decoder_layers,
        max_position_embeddings=16) | more)).eval()  # fmt: skip
    state = {key: model.get_parameter(mine).detach() for mine, key in nllb_names(model).items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and all("embed" in key or "lm_head" in key for key in missing)  # tied to model.shared
    theirs.save_pretrained(folder)
    return theirs


SENTENCES = (
    "The quick brown fox jumps over the lazy dog near the river bank. A man is riding a horse on the beach, and two "
    "children play with a red ball. What is in this picture? There are 15 cats; they're sleeping (all day)! Größe über "
    "façade naïve année. Ένας σκύλος τρέχει. Собака бежит по пляжу."
).split()


@pytest.fixture(scope="session")
def nllb_tokens(tmp_path_factory):
    """A BPE model of 400 tokens like NLLB's: no padding, nmt_nfkc."""
    rng, model = random.Random(0), io.BytesIO()
    texts = [" ".join(rng.choices(SENTENCES, k=rng.randint(3, 12))) for _ in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=400, unk_id=0, bos_id=1, eos_id=2,
        pad_id=-1, normalization_rule_name="nmt_nfkc", character_coverage=1.0, num_threads=1, minloglevel=1)  # fmt: skip
    path = tmp_path_factory.mktemp("spm") / "sentencepiece.bpe.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def nllb_folder(nllb_tokens, tmp_path_factory):
    """A whole translator with random weights, in the official layout."""
    folder = tmp_path_factory.mktemp("nllb")
    model = tiny_nllb(replace(TINY_NLLB, vocab=401 + 202 + 3), std=0.3)
    save_file({key: model.get_parameter(mine).detach() for mine, key in nllb_names(model).items()}, folder / "model.safetensors")
    c = model.cfg
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="m2m_100", vocab_size=c.vocab, d_model=c.width, encoder_attention_heads=c.heads, decoder_attention_heads=c.decoder_heads,
        encoder_ffn_dim=c.mlp, decoder_ffn_dim=c.decoder_mlp, encoder_layers=c.layers, decoder_layers=c.decoder_layers)))  # fmt: skip
    (folder / "sentencepiece.bpe.model").write_bytes(nllb_tokens.read_bytes())
    return folder


@pytest.fixture(scope="module")
def three_languages():
    """A judge of three languages instead of 95, which takes no time to make."""
    small = LanguageID({lang: load_names()[lang] for lang in ("en", "de", "sw")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filters, "sentence_id", lambda: small)
        yield
