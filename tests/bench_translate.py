"""Tokens a second of the translator beside transformers and CTranslate2: `python tests/bench_translate.py`.

Random weights of the 600M's shape, the same on all sides, are written to --folder once (2.5 GB, and 0.6 GB for CTranslate2). Each side
is a process of its own: ours in fp32, in bf16 where the processor has instructions for it, and in int8; transformers in fp32 and bf16;
CTranslate2 in int8 if it is installed (pip install ctranslate2). All write --tokens tokens, greedily, for --sentences sentences of 12 to 30
tokens. They work in turns, so that all meet the same machine; the best of --rounds turns counts. Peak memory is read from outside: of the work alone, and with
the loading. About 10 GB of memory.

Not collected by pytest.
"""

import importlib.util
import multiprocessing
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file

from nanomblip.data.nllb_tokenizer import NLLB_CODES
from nanomblip.data.tokenizer import pad_rows
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.model.generate import Decoding
from nanomblip.model.int8_kernels import has_bf16
from nanomblip.model.nllb import NLLB, NLLB_PRESETS, NLLBConfig, translate_tokens
from nanomblip.weights.nllb import load_nllb, nllb_names

SIZES = {"600M": NLLB_PRESETS["nllb-200-distilled-600M"],
         "tiny": NLLBConfig(vocab=2206, width=64, heads=4, decoder_heads=4, mlp=128, decoder_mlp=128, layers=2, decoder_layers=2)}  # fmt: skip


@dataclass(frozen=True)
class Config:
    size: str = flag("600M", "tiny: to see that it works", tuple(SIZES))
    folder: str = flag("out/bench_translate", "where the random weights are kept")
    sentences: int = flag(32, "at a time")
    tokens: int = flag(40, "to be written for each")
    rounds: int = flag(3, "turns of each side, after one that does not count")
    sides: str = flag("", "some of the sides, separated by commas; nothing: all that can run here")

    def all_sides(self) -> list[str]:
        bf16, ct2 = has_bf16(torch.device("cpu")), importlib.util.find_spec("ctranslate2") is not None
        sides = ["ours fp32", *["ours bf16"] * bf16, "ours int8", "transformers fp32", *["transformers bf16"] * bf16, *["ctranslate2 int8"] * ct2]
        return [side.strip() for side in self.sides.split(",")] if self.sides else sides


def sources(cfg: Config) -> list[list[int]]:
    """[English] tokens </s>, the longest first."""
    rng, text = random.Random(0), SIZES[cfg.size].vocab - 205
    rows = [[text + NLLB_CODES.index("eng_Latn"), *(rng.randrange(4, text) for _ in range(rng.randint(12, 30))), 2] for _ in range(cfg.sentences)]
    return sorted(rows, key=len, reverse=True)


def target(cfg: Config) -> int:
    return SIZES[cfg.size].vocab - 205 + NLLB_CODES.index("swh_Latn")


# ------------------------------------------------------------------------------------------------------------ the sides


def make_folder(cfg: Config, folder: Path) -> None:
    """Random weights in the official layout."""
    from transformers import M2M100Config

    size = SIZES[cfg.size]
    torch.manual_seed(0)
    model = NLLB(size)
    with torch.no_grad():  # scores of the size that trained ones have; torch's default embedding is sqrt(D) too large
        model.embed.weight.mul_(size.width**-0.5)
    hf = M2M100Config(vocab_size=size.vocab, d_model=size.width, encoder_attention_heads=size.heads, decoder_attention_heads=size.decoder_heads,
                      encoder_ffn_dim=size.mlp, decoder_ffn_dim=size.decoder_mlp, encoder_layers=size.layers, decoder_layers=size.decoder_layers)  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: model.get_parameter(mine).detach() for mine, key in nllb_names(model).items()}, folder / "model.safetensors", {"format": "pt"})
    hf.save_pretrained(folder)  # last: from then on the folder is whole


def make_ctranslate2(folder: Path) -> None:
    """The same in CTranslate2's format, by its own converter; token i is called "t<i>"."""
    from ctranslate2.converters.transformers import M2M100Loader
    from transformers import M2M100ForConditionalGeneration

    with torch.no_grad():
        model = M2M100ForConditionalGeneration.from_pretrained(folder)
        spec = M2M100Loader().get_model_spec(model)
        names = [f"t{i}" for i in range(model.config.vocab_size)]
        spec.register_source_vocabulary(names)
        spec.register_target_vocabulary(names)
        spec.config.bos_token, spec.config.eos_token, spec.config.unk_token, spec.config.decoder_start_token = "t0", "t2", "t3", "t2"
        spec.validate()
        spec.optimize(quantization="int8")
    (folder / "ctranslate2").mkdir(exist_ok=True)
    spec.save(str(folder / "ctranslate2"))


def build(side: str, cfg: Config):
    """A function that translates and returns how many tokens were written, the language's own not counted."""
    who, kind = side.split()
    folder, rows, lang, count = Path(cfg.folder) / cfg.size, sources(cfg), target(cfg), cfg.tokens
    source = pad_rows(rows, 1)
    if who == "ours":
        model, langs = load_nllb(folder, llm_dtype=kind), torch.full((len(rows),), lang)
        decoding = Decoding(min_new_tokens=count + 1, max_new_tokens=count + 1)  # with the language's token
        return lambda: sum(len(best[0].ids) for best in translate_tokens(model, source, langs, decoding, vocab=SIZES[cfg.size].vocab - 205))
    if who == "transformers":
        from transformers import M2M100ForConditionalGeneration

        model = M2M100ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16 if kind == "bf16" else torch.float32).eval()
        limits = dict(min_new_tokens=count + 1, max_new_tokens=count + 1, num_beams=1, do_sample=False, forced_bos_token_id=lang)

        @torch.no_grad()
        def work():
            return (model.generate(input_ids=source, attention_mask=source.ne(1).long(), **limits).shape[1] - 2) * len(rows)

        return work
    import ctranslate2

    threads = torch.get_num_threads()
    model = ctranslate2.Translator(str(folder / "ctranslate2"), compute_type=kind, inter_threads=1, intra_threads=threads)
    named, prefix = [[f"t{i}" for i in row] for row in rows], [[f"t{lang}"]] * len(rows)
    limits = dict(beam_size=1, min_decoding_length=count + 1, max_decoding_length=count + 1)  # with the prefix
    return lambda: sum(len(found.hypotheses[0]) - 1 for found in model.translate_batch(named, target_prefix=prefix, **limits))


# ------------------------------------------------------------------------------------------------------------- in turns


def child(side: str, cfg: Config, pipe) -> None:
    work = build(side, cfg)
    pipe.send("ready")
    while pipe.recv():
        start = time.perf_counter(), time.process_time()
        tokens = work()
        pipe.send((time.perf_counter() - start[0], time.process_time() - start[1], tokens))


def make_all(cfg: Config, folder: Path, with_ctranslate2: bool) -> None:
    if not (folder / "config.json").exists():
        make_folder(cfg, folder)
    if with_ctranslate2 and not (folder / "ctranslate2" / "model.bin").exists():
        make_ctranslate2(folder)


def memory_mb(pid: int, what: str) -> float:
    return int(re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure the translator's speed and memory beside others.")
    sides, context, folder = cfg.all_sides(), multiprocessing.get_context("spawn"), Path(cfg.folder) / cfg.size
    maker = context.Process(target=make_all, args=(cfg, folder, any("ctranslate2" in side for side in sides)))
    maker.start()  # its memory goes with it
    maker.join()
    if maker.exitcode:
        raise ValueError(f"--folder {folder}: the weights could not be made; see above")
    pipes, processes, made = {}, {}, {}
    for side in sides:  # one after the other, so that their loading does not disturb each other
        pipes[side], end = context.Pipe()
        processes[side] = context.Process(target=child, args=(side, cfg, end), daemon=True)
        processes[side].start()
        end.close()
        pipes[side].recv()
        made[side] = memory_mb(processes[side].pid, "VmHWM")
        Path(f"/proc/{processes[side].pid}/clear_refs").write_text("5")  # the peak is counted anew from here
    results = {side: [] for side in sides}
    for turn in range(1 + cfg.rounds):
        for side in sides:
            pipes[side].send("go")
            result = pipes[side].recv()
            results[side] += [result] if turn else []
    print(f"{cfg.size}, {torch.get_num_threads()} threads, {cfg.sentences} sentences, {cfg.tokens} tokens each, best of {cfg.rounds}")
    print(f"{'side':<20}{'tokens/s':>10}{'by the processor':>18}{'tokens':>8}{'MB at work':>12}{'with loading':>14}{'of the first':>14}")
    rate = {side: max(tokens / clock for clock, _, tokens in of_side) for side, of_side in results.items()}
    for side, of_side in results.items():
        cpu = max(tokens / seconds for _, seconds, tokens in of_side)
        peak = memory_mb(processes[side].pid, "VmHWM")
        print(f"{side:<20}{rate[side]:>10.1f}{cpu:>18.1f}{of_side[0][2]:>8}{peak:>12.0f}{max(made[side], peak):>14.0f}{rate[side] / rate[sides[0]]:>14.2f}")
        pipes[side].send(None)
    return 0


if __name__ == "__main__":
    run_main(main)
