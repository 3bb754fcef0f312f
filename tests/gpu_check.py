"""Does a GPU compute what the CPU computes, and what does the official size cost there?

    python tests/gpu_check.py            prints a table, exit status 1 if a line is a fault; without a GPU it says so: 0

1. nano in fp32 against the CPU: logits, gradients, captions of five beams
2. an int8 layer of the official width against the reference path
3. a step of LoRA over int8 at full size: random weights in the shapes of mBLIP mT0-XL, 8 x (32 + 64 + 32) tokens; and the
   language model's part of it beside transformers + peft + bitsandbytes, where these are installed
4. a caption of 20 tokens with five beams at full size
5. the default run of train.py, and what it reaches

Not collected by pytest; tests/test_gpu_check.py calls each part on the CPU, at small sizes.
"""

import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.nn as nn
from PIL import Image

from nanomblip.data.emoji import load_emoji
from nanomblip.data.image import image_to_tensor
from nanomblip.data.processor import load_image_config
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.model.int8 import Int8Linear
from nanomblip.model.int8_kernels import int8_path
from nanomblip.model.lora import add_lora
from nanomblip.model.mblip import MBLIP, PRESETS, MBLIPConfig
from nanomblip.training.config import Config
from nanomblip.training.parts import STAGE2, add_checkpointing
from nanomblip.training.stages import Stage, language_loss, precision, uses_bf16
from nanomblip.weights.load import load_mblip

NANO = ROOT / "weights" / "nano" / "aligned"
OFFICIAL = PRESETS["mblip-mt0-xl"]
RUN_SECONDS = 200  # for the default run
ENGLISH = 40.0  # percent of the held-out pictures that it names right at least; on a CPU it names 57


class Table:
    """Lines that people read, and whether one of them was a fault."""

    def __init__(self):
        self.faults = 0

    def __call__(self, what: str, value: float, unit: str = "", most: float | None = None, least: float | None = None):
        right = (most is None or value <= most) and (least is None or value >= least)  # nan is never right
        right = right and value == value
        self.faults += not right
        wanted = "" if most is None and least is None else f"at most {most:g}" if least is None else f"at least {least:g}"
        print(f"{what:<58}{value:>14.6g} {unit:<12}{wanted:<18}{'' if right else 'FAULT'}".rstrip(), flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_gb(device: torch.device) -> float:
    """The most memory that tensors took since the last call; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


def seconds(work, device: torch.device, rounds: int = 3) -> float:
    """Of one call, after one that does not count."""
    work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / rounds


# ----------------------------------------------------------------------------------------------------- nano and int8


def nano_pictures(count: int):
    """Tokenizer, float (count, 1, 3, 64, 64) of held-out pictures, and their English names as labels."""
    emoji, tokenizer, image = load_emoji("core"), Tokenizer(NANO / "spiece.model"), load_image_config(NANO)
    cells = emoji.cells_in("test")[:: max(1, len(emoji.cells_in("test")) // count)][:count]
    seen = torch.stack([image_to_tensor(Image.fromarray(emoji.pictures[p]), image) for p in cells])[:, None]
    names = tokenizer.batch([emoji.names["en"][emoji.cells[p][0]] for p in cells])
    return tokenizer, seen, names.masked_fill(names == tokenizer.pad, -100)


def compare_nano(table: Table, device: torch.device, count: int = 64) -> None:
    tokenizer, image, labels = nano_pictures(count)
    prompt = tokenizer.batch(["Caption the image in English."] * count)
    results = {}
    for name, where in (("cpu", torch.device("cpu")), ("here", device)):
        model = load_mblip(NANO).eval().to(where)
        logits, loss = model(image.to(where), prompt.to(where), labels.to(where))
        loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            found = generate(model, image.to(where), prompt.to(where), vocab=len(tokenizer), decoding=DECODING["caption"])
        results[name] = logits.detach().cpu(), grads, [best[0].ids for best in found]
    (logits, grads, texts), (logits2, grads2, texts2) = results.values()
    same = 100 * sum(a == b for a, b in zip(texts, texts2)) / count
    table("nano, logits in fp32: largest difference", (logits - logits2).abs().max().item(), "", most=1e-3)
    table("nano, gradients: difference", ((grads - grads2).norm() / grads.norm()).item(), "of the norm", most=1e-4)
    table(f"nano, {count} captions of five beams: the same texts", same, "%", least=95)


def compare_int8(table: Table, device: torch.device, width: int = 2048, out: int = 5120) -> None:
    """With outliers and without, few rows and many, and the gradient, against the readable path on the CPU."""
    torch.manual_seed(0)
    layer = Int8Linear(nn.Linear(width, out))
    other = Int8Linear.from_tensors(layer.weight.to(device), layer.SCB.to(device), layer.bias.to(device))
    for rows in (1, 5, 1024):
        x = torch.randn(rows, width)
        x[:, :6] *= 30
        a, b = x.clone().requires_grad_(), x.to(device).requires_grad_()
        with int8_path("reference"):
            y = layer(a)
            y.square().sum().backward()
        z = other(b)
        z.square().sum().backward()
        error = lambda mine, theirs: ((mine.cpu() - theirs).norm() / theirs.norm()).item()
        table(f"int8, {rows} rows: difference of the product", error(z.detach(), y.detach()), "of the norm", most=1e-5)
        table(f"int8, {rows} rows: difference of the gradient", error(b.grad, a.grad), "of the norm", most=1e-2)


# -------------------------------------------------------------------------------------------------- the official size


def random_model(sizes: MBLIPConfig, device: torch.device, kind: torch.dtype) -> MBLIP:
    """A model of random weights, each made where it stays: language model in int8, ViT and embedding in `kind`, the
    rest in fp32."""
    with torch.device("meta"):
        model = MBLIP(sizes)
    for path, module in list(model.mt5.named_modules()):
        if isinstance(module, nn.Linear):
            codes = torch.randint(-127, 128, module.weight.shape, dtype=torch.int8, device=device)
            scale = torch.full((len(codes),), 1.7 * module.in_features**-0.5, device=device)  # standard deviation 1 / sqrt(in)
            owner, _, leaf = path.rpartition(".")
            setattr(model.mt5.get_submodule(owner), leaf, Int8Linear.from_tensors(codes, scale))
    for path, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            dtype = kind if path.startswith("vit") or path == "mt5.embed" else torch.float32
            is_norm = name == "weight" and p.ndim == 1
            value = torch.ones(p.shape, device=device, dtype=dtype)
            if not is_norm:
                value.normal_(std=0.02 if p.ndim == 1 else p[0].numel() ** -0.5)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return model


def full_size(table: Table, device: torch.device, sizes: MBLIPConfig = OFFICIAL, batch: int = 8, tokens=(64, 32)) -> None:
    """A training step (stage 2, the paper's rates) and a caption."""
    torch.manual_seed(0)
    cfg = Config(int8=True, lr_warmup=0, beta2=0.999, bf16="auto" if device.type == "cuda" else "off")
    bf16 = uses_bf16(cfg, device)
    model = random_model(sizes, device, torch.bfloat16 if bf16 else torch.float32)
    add_lora(model.mt5, "all", 8, 16.0, 0.05)
    rates = dict.fromkeys(STAGE2, 1e-5) | {"LoRA": 2e-4}
    stage = Stage("check", 0, 100, rates, False, language_loss, None)
    (optimizer,) = stage.begin(model, cfg)
    size, (S, T) = sizes.vit.image_size, tokens
    draw = lambda count: torch.randint(3, sizes.mt5.vocab - 1, (batch, count), device=device)
    data, image = dict(prompt=draw(S), labels=draw(T)), torch.randn(batch, 1, 3, size, size, device=device)
    losses = []

    def step():
        stage.set_rates(len(losses))
        with precision(device, bf16):
            with torch.no_grad():
                features = model.image_features(image)
            loss = stage.loss(model.train(), data, features)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())

    count = batch * (sizes.queries + S + T)
    for name, change in (("", lambda: None), (", with --checkpointing", lambda: add_checkpointing(model))):
        change()
        peak_gb(device)
        spent = seconds(step, device)
        table(f"full size, a step of {count} tokens{name}", count / spent, "tokens/s")
        table(f"full size, a step{name}: peak", peak_gb(device), "GB")
    table("full size, loss of the steps: the last less the first", losses[-1] - losses[0], "nats", most=0.0)
    del optimizer, stage
    model.requires_grad_(False).eval()
    prompt, decoding = draw(10)[:1], Decoding(num_beams=5, min_new_tokens=20, max_new_tokens=20)
    with torch.no_grad(), precision(device, bf16):
        spent = seconds(lambda: generate(model, image[:1], prompt, decoding=decoding), device, 1)
    table("full size, a caption of 20 tokens, five beams", spent, "s")
    table("full size, a caption: peak", peak_gb(device), "GB")


def beside_peft(table: Table, device: torch.device, layers: int = 24, batch: int = 8, tokens=(96, 32)) -> None:
    """The step of the language model alone, ours and that of transformers + peft + bitsandbytes."""
    import bench_int8

    cfg = bench_int8.Config(part="train", layers=layers)
    prompt, labels = (torch.randint(2, 250_000, (batch, count), device=device) for count in tokens)
    bf16 = uses_bf16(Config(int8=True), device)
    for name, build in (("ours", lambda: bench_int8.build_ours(cfg, lora=True)),
                        ("peft + bitsandbytes", lambda: bench_int8.build_theirs(cfg, lora=True, bnb=True))):  # fmt: skip
        model = build().to(device).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step():
            with precision(device, bf16):
                if name == "ours":
                    memory = model.encode(model.embed_tokens(prompt), prompt > 0)
                    logits = model.decode(model.shift_right(labels), memory, prompt > 0)
                    loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
                else:
                    loss = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), labels=labels).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        peak_gb(device)
        spent = seconds(step, device)
        table(f"language model alone, LoRA over int8, {name}", batch * sum(tokens) / spent, "tokens/s")
        table(f"language model alone, {name}: peak", peak_gb(device), "GB")
        del model, optimizer


def default_run(table: Table, *flags: str, least: float = ENGLISH) -> None:
    """train.py as it is, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), "--out", folder, "--name", "r", "--eval_every", "0", *flags]
        start = time.time()
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=RUN_SECONDS)
        except subprocess.TimeoutExpired:
            return table("default run of train.py", RUN_SECONDS, "s", most=RUN_SECONDS - 1)
        table("default run of train.py: exit status", done.returncode, most=0)
        if done.returncode == 0:
            record = json.loads((Path(folder) / "r" / "record.json").read_text())
            english, other = (100 * record["summary"]["pictures"][of]["exact"] for of in ("english", "other"))
            table("default run of train.py, all of it", time.time() - start, "s")
            table("default run: held-out pictures named in English", english, "%", least=least)
            table("default run: in the other languages", other, "%")


def main() -> int:
    if not torch.cuda.is_available():
        print("gpu_check: there is no GPU here; nothing was checked")
        return 0
    device, table = torch.device("cuda"), Table()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is to mean fp32
    missing = [name for name in ("bitsandbytes", "transformers", "peft") if find_spec(name) is None]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}" + f"; not installed: {', '.join(missing)}" * bool(missing))
    compare_nano(table, device)
    compare_int8(table, device)
    full_size(table, device)
    torch.cuda.empty_cache()
    if not missing:
        beside_peft(table, device)
        torch.cuda.empty_cache()
    default_run(table)
    print(f"{table.faults} faults")
    return 1 if table.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
