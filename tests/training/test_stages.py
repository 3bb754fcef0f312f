"""stages.py, optimizers.py, features.py: which rates, which groups, which loss, which noise."""

import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, tiny_mblip

from nanomblip.data.emoji import load_emoji
from nanomblip.data.image import ImageConfig
from nanomblip.data.languages import parse_lang_mix
from nanomblip.data.mixture import Batches, Mixture, parse_tasks
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model import mblip
from nanomblip.model.lora import add_lora
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.training import config as recipe
from nanomblip.training.config import CHOICES, LARGE, SCALE, Config, resolve
from nanomblip.training.features import CachedFeatures, Loader
from nanomblip.training.optimizers import MUON_LR, WEIGHT_DECAY, build_optimizers
from nanomblip.training.parts import EVERYTHING, STAGE2, add_checkpointing, mark_trainable, model_parts
from nanomblip.training.stages import NamesLoss, Stage, build_stages, language_loss, uses_bf16

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
NANO = resolve(Config(), 0)


@pytest.fixture(scope="module")
def batches():
    emoji = load_emoji("core")
    mixture = Mixture(emoji, parse_lang_mix("en,sw", emoji.langs), parse_tasks("caption,match"), 3, share=0.02)
    return Batches(mixture, Tokenizer(ROOT / "data" / "spiece.model"), ImageConfig(size=TINY.vit.image_size), 4, views=2)


def groups_of(model, rate=1.0, muon=False):
    mark_trainable(model, EVERYTHING)
    rate_of = {p: rate for p in model.parameters()}
    names = {id(p): name for name, p in model.named_parameters()}
    return [({names[id(p)] for p in group["params"]}, group) for o in build_optimizers(model, rate_of, muon, 0.98) for group in o.param_groups]


def test_weight_decay_goes_by_module_type():
    groups = groups_of(tiny_mblip())
    decayed = set().union(*(names for names, group in groups if group["weight_decay"] == 0.1))
    rest = set().union(*(names for names, group in groups if group["weight_decay"] == 0))
    assert len(rest) + len(decayed) == len(dict(tiny_mblip().named_parameters()))
    tables = {"queries", "vit.pos_embed", "vit.cls_token", "mt5.encoder.bias.weight", "mt5.decoder.bias.weight"}
    assert tables | {"qformer.norm.weight", "proj.bias"} <= rest
    assert all("norm" in n or n.endswith("bias") or n in tables for n in rest)
    assert all("norm" not in n and n.endswith("weight") for n in decayed)


def test_muon_gets_the_matrices_inside_the_towers_and_adamw_the_rest():
    model = tiny_mblip()
    *adamw, (of_muon, group) = groups_of(model, muon=True)
    assert of_muon == {n for n, p in model.named_parameters() if ".blocks." in n and p.ndim == 2} and group["peak"] == MUON_LR
    assert len(of_muon) + sum(len(names) for names, _ in adamw) == len(list(model.parameters()))


def test_each_stage_has_its_own_parts_rates_and_cosine(batches):
    model = tiny_mblip()
    add_lora(model.mt5, "all", 2)
    cfg = replace(NANO, steps=100, warmup_steps=40, lr_warmup=10, warmup="projection", lr=0.1, qformer_lr=0.01, lora_lr=1.0, warmup_lr=3.0)
    one, two = build_stages(cfg, model, None, None, batches, batches)
    assert (one.first, one.last, two.first, two.last) == (0, 40, 40, 100) and one.rates == {"projection": 3.0}
    assert two.rates == {"Q-Former": 0.01, "queries": 0.01, "projection": 0.1, "LoRA": 1.0} and set(two.rates) == set(STAGE2)
    for stage in (one, two):
        (optimizer,) = stage.begin(model, cfg)
        assert {part for part, ps in model_parts(model).items() if any(p.requires_grad for p in ps)} == set(stage.rates)
        shares = [stage.set_rates(step) for step in range(stage.first, stage.last)]
        assert shares[0] == 0.1 and shares[9] == shares[10] == 1.0 and shares[-1] < 0.01
        assert all(a > b for a, b in zip(shares[10:], shares[11:]))
        assert {group["lr"] / group["peak"] for group in optimizer.param_groups} == {shares[-1]}
        assert {group["peak"] for group in optimizer.param_groups} == set(stage.rates.values())
    frozen = build_stages(replace(cfg, qformer_lr=0, lora="none", warmup="none", warmup_steps=0), model, None, None, batches, batches)
    assert [stage.rates for stage in frozen] == [{"projection": 0.1}]
    (whole,) = build_stages(replace(cfg, init="random", warmup="none", warmup_steps=None, lora="none"), model, None, None, batches, batches)
    assert set(whole.rates) == set(EVERYTHING) and whole.muon


@pytest.mark.parametrize("few", [2, 256], ids=["in parts", "at once"])
def test_the_language_loss_is_that_of_forward(monkeypatch, batch, few):
    monkeypatch.setattr(mblip, "LOGITS", 0)
    monkeypatch.setattr(mblip, "FEWEST", few)
    model = tiny_mblip()
    features = model.image_features(batch["image"])
    _, expected = model(None, batch["prompt"], batch["labels"], features=features)
    loss = language_loss(model, batch, features)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, model.proj.weight, retain_graph=True)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)
    loss = model.loss(features, batch["prompt"], batch["labels"])
    before = loss.item()
    mark_trainable(model, EVERYTHING)
    add_checkpointing(model)
    loss = model.loss(features, batch["prompt"], batch["labels"])
    loss.backward()
    assert loss.item() == pytest.approx(before) and all(p.grad is not None for p in model.qformer.parameters())


def test_the_names_loss_is_least_at_the_names_themselves():
    emoji, tokenizer = load_emoji("core"), Tokenizer(ROOT / "data" / "spiece.model")
    model = MBLIP(PRESETS["nano"])
    model.init_weights()
    loss = NamesLoss(model, tokenizer, emoji)
    picture = torch.tensor([0, 700, 1500])
    model.image_tokens = lambda features: features
    exact = loss.table[loss.concept[picture]]
    right, other = loss(model, dict(picture=picture), exact), loss(model, dict(picture=picture), exact.roll(1, 0))
    near = loss(model, dict(picture=picture), exact + 0.1 * torch.randn_like(exact))
    assert max(right, near) < other / 10


def test_noise_on_what_the_vit_sees_is_as_strong_as_asked(batches):
    """In a picture between none and this times the standard deviation over pictures; 0 leaves it as it is."""
    model = tiny_mblip()
    batch = batches[0]
    clean, noisy = (CachedFeatures(model, batches, CPU, noise)(batch)[:, 0] for noise in (0.0, 2.0))  # (B, N, Dv)
    again = CachedFeatures(model, batches, CPU)
    assert torch.equal(again(batch)[:, 0], clean) and not again.noise.any()
    deviation = again.cache.float().std((0, 1))
    added = torch.stack([(CachedFeatures.__call__(loud, batch)[:, 0] - clean) / deviation for loud in [CachedFeatures(model, batches, CPU, 2.0)] for _ in range(30)])
    strength = added.flatten(2).std(2).flatten()  # of each picture and draw
    assert 0 <= strength.min() < 0.3 and 1.7 < strength.max() < 2.4 and 0.8 < strength.mean() < 1.2 and not torch.equal(clean, noisy)
    with pytest.raises(ValueError, match="--views 2: a cache .* GB"):
        vit = replace(TINY.vit, width=24_000_000)
        CachedFeatures(type("Model", (), dict(cfg=replace(TINY, vit=vit, qformer=replace(TINY.qformer, vision_width=vit.width))))(), batches, CPU)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_loader_workers_see_the_same_data_however_they_start(batches, start):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(start, force=True)
    try:
        loader = Loader(batches, 5, 1, CPU)
        for number in (5, 6):
            mine, theirs = batches[number], next(loader)
            assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_the_official_sizes_take_the_papers_choices_and_scale():
    large = resolve(Config(), LARGE + 1)
    assert {name: getattr(large, name) for name in CHOICES} == {name: row[1] for name, row in CHOICES.items()}
    assert {name: getattr(large, name) for name in SCALE} == {name: row[1] for name, row in SCALE.items()}
    assert large.batch * large.accumulate == 128 and large.lora_lr == 20 * large.qformer_lr and (large.lora_r, large.lora_alpha) == (8, 16)
    assert abs(large.stage1_steps - 8000) < 10 and (WEIGHT_DECAY, recipe.CLIP) == (0.1, 1.0)
    paper = resolve(Config(recipe="paper"), 0)
    assert paper.warmup == "projection" and paper.int8 and paper.noise == paper.redraw == 0 and paper.steps == SCALE["steps"][0]
    assert resolve(Config(lora_lr=0.5, steps=7), LARGE + 1).lora_lr == 0.5, "a flag goes before the recipe"
    rates = lambda cfg: (cfg.lr, cfg.qformer_lr, cfg.lora_lr)
    assert rates(NANO) == rates(large), "stage 2 after the names warm-up has the paper's own rates"
    assert rates(paper) == rates(resolve(Config(warmup="none"), 0)) != rates(NANO), "without it, higher ones"
    assert rates(resolve(Config(warmup="projection"), LARGE + 1)) == rates(large) == rates(resolve(Config(init="out/x"), 0))


def test_a_stage_knows_its_rates_for_the_table():
    stage = Stage("x", 0, 1, {"projection": 0.5}, False, None, None)
    assert stage.column(tiny_mblip()) == ["", "", "", "0.5", ""]


def test_bf16_is_where_there_are_instructions_for_it(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has in (False, True):
        monkeypatch.setattr("nanomblip.training.stages.has_bf16", lambda device: has)
        assert uses_bf16(Config(), gpu) is uses_bf16(Config(), cpu) is uses_bf16(Config(int8=True), gpu) is has
        assert not uses_bf16(Config(int8=True), cpu) and not uses_bf16(Config(bf16="off"), gpu)
        assert uses_bf16(Config(bf16="on"), cpu)
    assert uses_bf16(Config(bf16="on"), gpu)
    monkeypatch.setattr("nanomblip.training.stages.has_bf16", lambda device: False)
    with pytest.raises(ValueError, match="--bf16 on: this GPU has no instructions for bf16"):
        uses_bf16(Config(bf16="on"), gpu)
