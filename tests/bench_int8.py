"""What int8 and LoRA cost and save at full width: `python tests/bench_int8.py --part layers` (or decode, vision, train).

    layers   one layer: time by rows against fp32; error on planted outliers against bitsandbytes
    decode   greedy and 5 beams: ours in int8 against transformers and CTranslate2 (which takes token ids alone)
    vision   the image encoder, 39 layers, one picture and --pictures: ours in int8 against transformers
    train    a LoRA step, 8 x (64 + 32) pieces: ours over int8 against transformers + peft, and over bitsandbytes' int8

In the last three each side is a process of its own with the same random weights (but for the biases in vision) in the widths of mT0-XL (2048, 5120, 32 heads, 250,112
pieces) and --layers layers in each stack, or of BLIP-2's ViT-g; six columns of outliers are planted by the norms. The sides work in turns,
so that all meet the same machine; the first turn is the first work that a process does with its model, and of the --rounds that follow the
best counts, by the clock and by the processor's time (on a busy machine only the latter means something). Peak memory is read from
outside, of the work alone and with the model's making. About 10 GB of memory.

Not collected by pytest.
"""

import multiprocessing
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn as nn

from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.model import int8
from nanomblip.model import int8_kernels as kernels
from nanomblip.model.generate import Decoding, write
from nanomblip.model.int8 import Int8Linear
from nanomblip.model.lora import add_lora
from nanomblip.model.mt5 import MT5, MT5Config
from nanomblip.model.vit import ViT, ViTConfig
from nanomblip.weights.layout import mt5_config_to_hf


@dataclass(frozen=True)
class Config:
    part: str = flag("layers", "what to measure", ("layers", "decode", "vision", "train"))
    sides: str = flag("", "whom to compare with; '' = decode: transformers bf16,ctranslate2 int8; vision: transformers bf16; train: peft bf16; also fp32")
    layers: int = flag(2, "layers of each stack in decode and train")
    pieces: int = flag(16, "pieces to write in decode")
    pictures: int = flag(8, "pictures at a time in vision")
    rounds: int = flag(3, "turns of each side, after a first")
    shapes: str = flag("2048x5120,5120x2048,2048x250112", "in layers: inputs x outputs")
    rows: str = flag("1,2,4,8,16,32,64,128,256,512,1024", "in layers: how many rows")


# ------------------------------------------------------------------------------------------------------- a single layer


def seconds(work, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def bench_layers(cfg: Config) -> None:
    print(f"{torch.get_num_threads()} threads; int_mm {kernels.has_int_mm()}, AMX {kernels.has_amx()}, bf16 {kernels.has_bf16()}")
    print("milliseconds; in brackets: with 6 columns of outliers; back: gradient of the input")
    for shape in cfg.shapes.split(","):
        width, out = map(int, shape.split("x"))
        copies = max(1, 400_000_000 // (width * out))  # as in a model, the weights are not in the processor's cache
        weights = [nn.Linear(width, out, bias=False).requires_grad_(False) for _ in range(max(1, copies // 4))]
        layers = [Int8Linear(weights[i % len(weights)]) for i in range(copies)]
        print(f"{shape}: {weights[0].weight.nbytes / 4e6:.0f} MB in int8")
        print(f"{'rows':>5}{'fp32':>9}{'int8':>9}{'(outliers)':>12}{'back fp32':>12}{'back':>9}")
        for rows in map(int, cfg.rows.split(",")):
            x, g = torch.randn(rows, width).clamp(-5, 5), torch.randn(rows, out)
            y = x.clone()
            y[:, :6] *= 30
            each = lambda work, many: seconds(lambda: [work(one) for one in many], cfg.rounds) / len(many) * 1e3
            with torch.no_grad():
                t = [each(lambda linear: linear(x), weights), each(lambda layer: layer(x), layers), each(lambda layer: layer(y), layers),
                     each(lambda linear: g @ linear.weight, weights),
                     each(lambda layer: kernels.input_gradient(g, layer.weight, layer.SCB), layers)]  # fmt: skip
            print(f"{rows:>5}{t[0]:>9.2f}{t[1]:>9.2f}{f'({t[2]:.2f})':>12}{t[3]:>12.2f}{t[4]:>9.2f}", flush=True)
    bench_errors()


def bench_errors() -> None:
    import bitsandbytes

    print("\nrelative error of a 2048 -> 5120 layer against fp32, 32 rows, columns with outliers 20 times the rest")
    for outliers in (0, 1, 6, 50):
        errors = {}
        for seed in range(4):
            torch.manual_seed(seed)
            linear, x = nn.Linear(2048, 5120, bias=False), torch.randn(32, 2048)
            x[:, torch.randperm(2048)[:outliers]] *= 20
            theirs = bitsandbytes.nn.Linear8bitLt(2048, 5120, bias=False, has_fp16_weights=False, threshold=6.0)
            theirs.load_state_dict(linear.state_dict())
            theirs = theirs.to("cpu").eval()
            with torch.no_grad():
                exact = linear(x)
                for name, y in dict(ours=Int8Linear(linear)(x), bitsandbytes=theirs(x.half()).float()).items():
                    errors.setdefault(name, []).append(((y - exact).norm() / exact.norm()).item())
        print(f"{outliers:>3} columns: " + ", ".join(f"{name} {sum(e) / len(e):.5f}" for name, e in errors.items()))


# ------------------------------------------------------------------------------------------- models, one in each process


def noise(shape) -> torch.Tensor:
    """Normal numbers, of which the same four million come again and again, at other places of a row: 512 million fresh ones take a while."""
    some, count = torch.randn(4_000_037, generator=torch.Generator().manual_seed(0)), torch.Size(shape).numel()
    return some.repeat(-(-count // len(some)))[:count].view(shape)


def fill(linears: dict[str, nn.Linear], put) -> None:
    """Give each layer of a meta model the weight of its name, one at a time; put(name, weight) decides how it is held."""
    for name in sorted(linears):
        put(name, noise(linears[name].weight.shape).mul_(linears[name].in_features ** -0.5))


def finish(model: nn.Module) -> None:
    """What is still on the meta device: norms, with outliers in six columns, bias tables and the embedding."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta:
                value = torch.ones(p.shape) if p.ndim == 1 else noise(p.shape)
                if p.ndim == 1:
                    value[:6] = 10.0
                setattr(module, name, nn.Parameter(value, requires_grad=False))


def build_ours(cfg: Config):
    with torch.device("meta"):
        model = ViT(ViTConfig()) if cfg.part == "vision" else MT5(MT5Config(layers=cfg.layers, decoder_layers=cfg.layers, dropout=0.0))

    def put(name, weight):
        owner, _, leaf = name.rpartition(".")
        codes, scale = map(torch.cat, zip(*(int8.quantize_rows(rows.half()) for rows in weight.split(8192))))
        bias = model.get_submodule(name).bias
        bias = None if bias is None else torch.zeros(bias.shape)
        setattr(model.get_submodule(owner), leaf, Int8Linear.from_tensors(codes, scale, bias))

    fill({name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}, put)
    finish(model)
    if cfg.part == "vision":
        return model.eval()
    mt5 = model
    mt5.embed.bfloat16()  # as load_mblip holds it beside int8
    if cfg.part == "train":
        add_lora(mt5, "all", r=8, alpha=16.0)
    return mt5


def build_theirs(cfg: Config, side: str):
    """transformers, which never quantises wo and lm_head; with peft in train; or CTranslate2, from the weights of transformers."""
    from transformers import Blip2VisionConfig, Blip2VisionModel, MT5ForConditionalGeneration
    from transformers import MT5Config as HFConfig

    hf = mt5_config_to_hf(MT5Config(layers=cfg.layers, decoder_layers=cfg.layers, dropout=0.0))
    dtype = torch.bfloat16 if "bf16" in side else torch.float32
    with torch.device("meta"):
        if cfg.part == "vision":
            model = Blip2VisionModel(Blip2VisionConfig())
        else:
            model = MT5ForConditionalGeneration(HFConfig(**{k: v for k, v in hf.items() if k != "model_type"}))

    def put(name, weight):
        linear = model.get_submodule(name)
        if "bitsandbytes" in side and not name.endswith(("wo", "lm_head")):
            from bitsandbytes.nn import Int8Params, Linear8bitLt

            owner, _, leaf = name.rpartition(".")
            linear = Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
            linear.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            setattr(model.get_submodule(owner), leaf, linear.to("cpu"))
        else:
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)

    fill({name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}, put)
    finish(model)
    model.to(dtype)
    if cfg.part == "vision":
        return model.eval()
    model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    if "ctranslate2" in side:
        return to_ctranslate2(model)
    if cfg.part == "train":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"]))
    return model


def to_ctranslate2(model):
    """What its converter does, but for the tokenizer: the tokens are called by their numbers."""
    import ctranslate2
    from ctranslate2.converters.transformers import MT5Loader

    class Loader(MT5Loader):
        def get_vocabulary(self, model, tokenizer):
            return ["<pad>", "</s>", "<unk>", *map(str, range(3, model.config.vocab_size))]

        def set_vocabulary(self, spec, tokens):
            spec.register_source_vocabulary(tokens)
            spec.register_target_vocabulary(tokens)

    loader = Loader()
    spec = loader.get_model_spec(model)
    loader.set_vocabulary(spec, loader.get_vocabulary(model, None))
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token, spec.config.decoder_start_token = "<pad>", "</s>", "<unk>", "<pad>"
    spec.validate()
    spec.optimize(quantization="int8")
    with tempfile.TemporaryDirectory() as folder:
        spec.save(folder)
        return ctranslate2.Translator(folder, device="cpu", compute_type="int8", inter_threads=1, intra_threads=torch.get_num_threads())


def piece_ids(rows: int, count: int) -> torch.Tensor:
    return torch.randint(2, 250_000, (rows, count), generator=torch.Generator().manual_seed(0))


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def work_ours(cfg: Config, model, job: str):
    if cfg.part == "vision":
        image = pictures(int(job))
        return torch.no_grad()(lambda: model(image)[0, 0, 0].item())
    if job == "train":
        prompt, labels = piece_ids(8, 64), piece_ids(8, 32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step():
            logits = model.decode(model.shift_right(labels), model.encode(model.embed_tokens(prompt), prompt > 0), prompt > 0)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step
    prompt, beams = piece_ids(1, 64), 1 if job == "greedy" else 5
    decoding = Decoding(num_beams=beams, min_new_tokens=cfg.pieces, max_new_tokens=cfg.pieces)

    @torch.no_grad()
    def work():
        memory = model.encode(model.embed_tokens(prompt), prompt > 0)
        found = write(model, memory, prompt > 0, torch.zeros(1, 1, dtype=torch.long), decoding)
        return len(found[0][0].ids)

    return work


def work_theirs(cfg: Config, model, job: str, autocast: bool):
    if cfg.part == "vision":
        image = pictures(int(job)).to(next(model.parameters()).dtype)
        return torch.no_grad()(lambda: model(image).last_hidden_state[0, 0, 0].item())
    if job == "train":
        model.train()
        prompt, labels = piece_ids(8, 64), piece_ids(8, 32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def step():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=prompt, attention_mask=torch.ones_like(prompt), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step
    prompt, beams = piece_ids(1, 64), 1 if job == "greedy" else 5
    if not isinstance(model, nn.Module):
        source, count = [[str(i) for i in prompt[0].tolist()]], cfg.pieces
        return lambda: len(model.translate_batch(source, beam_size=beams, min_decoding_length=count, max_decoding_length=count)[0].hypotheses[0])
    model.eval()

    @torch.no_grad()
    def write():
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), num_beams=beams, do_sample=False, use_cache=True,
                             min_new_tokens=cfg.pieces, max_new_tokens=cfg.pieces)  # fmt: skip
        return out.shape[1] - 1

    return write


def child(side: str, cfg: Config, pipe) -> None:
    """Build a model, then do a job each time the parent says so; answers with seconds by the clock, by the processor, and what came out."""
    torch.manual_seed(0)
    model, jobs = build_ours(cfg) if side == "ours" else build_theirs(cfg, side), {}
    make = work_ours if side == "ours" else lambda *job: work_theirs(*job, autocast="bf16" in side)
    pipe.send("ready")
    while job := pipe.recv():
        work = jobs.setdefault(job, make(cfg, model, job))
        start = time.perf_counter(), time.process_time()
        out = work()
        pipe.send((time.perf_counter() - start[0], time.process_time() - start[1], out))


def peak_mb(pid: int) -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def read_rate() -> float:
    """GB a second in which the memory can be read, all threads together."""
    block = torch.ones(1 << 27)
    return block.nbytes / seconds(block.sum, 5) / 1e9


def bench_sides(cfg: Config, sides: list[str], jobs: list[str]) -> None:
    """Let the sides do each job in turns."""
    context, pipes, processes = multiprocessing.get_context("spawn"), {}, {}
    for side in sides:  # one after the other, so that their makings do not disturb each other
        pipes[side], end = context.Pipe()
        processes[side] = context.Process(target=child, args=(side, cfg, end), daemon=True)
        processes[side].start()
        pipes[side].recv()
    made = {side: peak_mb(p.pid) for side, p in processes.items()}
    for p in processes.values():
        Path(f"/proc/{p.pid}/clear_refs").write_text("5")  # the peak is counted anew from here
    for job in jobs:
        times = {side: [] for side in sides}
        for _ in range(1 + cfg.rounds):
            for side in sides:
                pipes[side].send(job)
                times[side].append(pipes[side].recv())
        for what, turns in (("first", slice(1)), ("later", slice(1, None))):
            best = {side: [min(t[i] for t in results[turns]) for i in (0, 1)] for side, results in times.items()}
            for side in sides:
                clock, cpu = best[side]
                print(f"{job:>7} {what} {side:<24}{clock:>9.2f} s {cpu:>9.2f} s of the processor" + (
                    "" if side == "ours" else f"; ours is {clock / best['ours'][0]:.2f} times as fast by the clock, {cpu / best['ours'][1]:.2f} by the processor")
                    + f"  [{times[side][-1][2]:.6g}]", flush=True)  # fmt: skip
    for side in sides:
        peak = peak_mb(processes[side].pid)
        print(f"memory {side:<25}{peak:>9.0f} MB at work, {max(made[side], peak):.0f} MB with its making")
        pipes[side].send(None)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure int8 and LoRA at mT0-XL's widths.")
    if cfg.part == "layers":
        bench_layers(cfg)
    elif cfg.part == "decode":
        rate = read_rate()
        each = 8 * 2048**2 - 2 * 2048**2 + 3 * 2048 * 5120  # a decoder layer, but for the keys and values of the encoder's output
        weights = cfg.layers * each + 2048 * 250_112
        print(f"{torch.get_num_threads()} threads; memory is read at {rate:.1f} GB/s: at least {weights / rate / 1e6:.0f} ms a piece for "
              f"{weights / 1e6:.0f} MB in int8, {4 * weights / rate / 1e6:.0f} ms for four times as much in fp32")  # fmt: skip
        print(f"{cfg.pieces} pieces after 64, {cfg.layers} + {cfg.layers} layers; [pieces written]")
        bench_sides(cfg, ["ours", *(cfg.sides or "transformers bf16,ctranslate2 int8").split(",")], ["greedy", "5 beams"])
    elif cfg.part == "vision":
        print(f"{torch.get_num_threads()} threads; pictures at a time; [a number of the result]")
        bench_sides(cfg, ["ours", *(cfg.sides or "transformers bf16").split(",")], ["1", str(cfg.pictures)])
    else:
        print(f"{torch.get_num_threads()} threads, {cfg.layers} + {cfg.layers} layers; [loss]")
        bench_sides(cfg, ["ours", *(cfg.sides or "peft bf16").split(",")], ["train"])
    return 0


if __name__ == "__main__":
    run_main(main)
