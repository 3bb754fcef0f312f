"""The mixture in other languages: English examples in, translated ones out, in the released format.

    python -m nanomblip.data.builders coco --karpathy dataset_coco.json --texts --out coco.json
    python -m nanomblip.data.translate --input coco.json --to mc4 --out coco_mt.json
    python train.py --mixture coco_mt.json --image_root train2014 ...

Every example gets one language of --to by its share, as in mBLIP, and those that get English stay as they are; with
--every it gets all of them. What is translated are texts (captions, questions, answers), each on its own. Then
builders.fill puts them into a template: templates are never translated and always name the right language. A prompt
for a caption is recognised; examples of other tasks must hold their texts (--texts of builders.py). Reasoning,
explanation, naming and "exists" stay as they are, as in the paper.

    python -m nanomblip.data.translate --model nano --to all --every --out names.json
    python train.py --names names.json

needs nothing that is not here: nano's language model translates the English names of the embedded pictures. Their
image_id is the concept.

Each translation is judged (filters.py). What is rejected is tried in other languages of --to, three in all, or left
out: --rejected. An answer of VQA stays English instead, and the prompt says so.

A block of 16 batches is the unit of work, a line in OUT.jsonl. After Ctrl-C, a full disk or `kill -9` the same command
goes on, and ends with the same bytes (on the same kind of machine). --shard 0/4 does the first quarter of the blocks,
here or elsewhere; --shard merge/4 puts the four parts together and checks that none is missing. Beside OUT,
OUT.rejected.md and .png say what was rejected, by language and rule. The parts may be deleted then.
"""

import glob
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from nanomblip.data.answers import AnswerFile, Shard
from nanomblip.data.filters import Report
from nanomblip.data.folder import pick_device
from nanomblip.data.json_index import JsonExamples
from nanomblip.data.languages import parse_lang_mix
from nanomblip.data.translation import Block, Names, Plan, texts_of
from nanomblip.data.translators import NLLB_NAMES, open_translator
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.weights.files import write_atomic

BATCHES = 16  # in a block


@dataclass(frozen=True)
class Config:
    input: str = flag("emoji", "a file of English examples, or emoji: the English names of the embedded pictures")
    out: str = flag("", "the file to write")
    model: str = flag("nllb-200-distilled-600M", f"{', '.join(NLLB_NAMES)} (fetched), nano, or a folder of either kind")
    to: str = flag("mc4", "languages and their shares, as train.py's --lang_mix; what is English stays so")
    every: bool = flag(False, "every example in every language of --to")
    rejected: str = flag(
        "",
        "what becomes of a rejected translation: other (another language), drop, or keep (nothing is judged); default: "
        "other, with --every drop",
        ("", "other", "drop", "keep"),
    )
    back: bool = flag(False, "translate back as well, and reject what does not come back; twice the time")
    shard: str = flag(
        "", "i/n: do part i of n, from 0 on; merge/n: put the n parts together; default: all, or torchrun's"
    )
    batch: int = flag(32, "sentences at a time")
    num_beams: int = flag(1, "beams; 1 = greedy, as in mBLIP")
    dtype: str = flag("fp32", "type of the weights", ("fp32", "bf16", "int8"))
    legacy: bool = flag(False, "NLLB's sources as transformers wrote them until April 2023, the language last")
    device: str = flag("auto", "auto, cpu or cuda")
    seed: int = flag(42, "of the choice of languages and templates")

    def __post_init__(self):
        if not self.out:
            raise ValueError("--out is missing: the file to write")
        for name, low in dict(batch=1, num_beams=1, seed=0).items():
            if not low <= getattr(self, name) < 2**31:
                raise ValueError(f"--{name} {getattr(self, name)}: at least {low}")
        if self.every and self.rejected == "other":
            raise ValueError("--rejected other with --every: every language is there already; give drop or keep")
        Shard.parse(self.shard)

    def asked(self) -> dict:
        """The flags that the translations depend on, besides input and model."""
        names = ("to", "every", "rejected", "back", "batch", "num_beams", "dtype", "legacy", "seed")
        return {name: getattr(self, name) for name in names}


def part_path(out: str, shard: Shard, number: int | None = None) -> Path:
    """The file of a shard."""
    return shard.path(f"{out}.jsonl", number)


class Progress:
    """A bar over examples with the time left and, from each batch's tokens and seconds, the speed."""

    def __init__(self, title: str, total: int, done: int):
        self.bar = tqdm(total=total, initial=done, unit="example", desc=title, smoothing=0)
        self.tokens = self.seconds = 0

    def __call__(self, tokens: int, seconds: float) -> None:
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        self.bar.set_postfix_str(f"{self.tokens / self.seconds:,.0f} tokens/s")


def run(cfg: Config, shard: Shard) -> None:
    """Do what is missing of a shard."""
    n, this = shard.count, f"--shard {shard.number}/{shard.count}"
    name = f"--input {cfg.input}"
    with tqdm(desc=f"index {name}", unit="B", unit_scale=True, leave=False) as bar:
        rows = Names() if cfg.input == "emoji" else JsonExamples(cfg.input, bar, flag="--input")
    if not len(rows):
        raise ValueError(f"{name}: holds no example")
    with AnswerFile(part_path(cfg.out, shard)) as file:
        translator = open_translator(cfg.model, cfg.dtype, pick_device(cfg.device), cfg.legacy)
        if cfg.back and not translator.both_ways:
            raise ValueError(f"--back with --model {cfg.model}: it only reads English; leave it out, or take an NLLB")
        mix = parse_lang_mix(cfg.to, translator.langs, flag="--to", has="the translator knows")
        plan, size = Plan(len(rows), mix, cfg.every, cfg.seed), BATCHES * cfg.batch
        blocks = -(-len(plan) // size)
        if blocks < n:
            raise ValueError(f"{this}: there are {blocks} blocks of {size} examples, so give at most {blocks}")
        todo = range(blocks * shard.number // n, blocks * (shard.number + 1) // n)
        job = dict(cfg.asked(), **{"input file": rows.contents(), "model": translator.fingerprint})
        done = len(file.begin(job, lambda row: row["block"]))
        place = lambda block: min(len(plan), block * size)  # the number of its first unit
        first, last = place(todo.start), place(todo.stop) - 1
        for k in range(plan[first][0], plan[last][0] + 1) if not done else ():  # said now, and not after days
            texts_of(rows.row(k), f"{name}: example {k:,}")
        progress = Progress(
            "translate" if n == 1 else f"translate {this}", last + 1 - first, place(todo.start + done) - first
        )
        with progress.bar as bar:
            for b in todo[done:]:
                rejected = cfg.rejected or ("drop" if cfg.every else "other")
                block = Block(plan, translator, rejected, cfg.back, cfg.batch, cfg.num_beams, progress)
                block.make(rows, range(place(b), place(b + 1)), name)
                file.add(**cfg.asked(), block=b, of=blocks, **block.line())
                bar.update(place(b + 1) - place(b))


def blocks_of(path: Path, again: str):
    """The lines of a part; ValueError for one that is not whole, with what to do."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else {}
                good = {"job", "block", "of", "rows", "judged", "verdicts", "counts"} <= set(row)
            except (ValueError, TypeError, RecursionError):
                good = False
            if not good:
                raise ValueError(f"{path}: line {number} is not a whole block; {again}")
            yield row


def merged(out: str, shard: Shard, report: Report, counts: Counter):
    """The examples of all parts in their order, each block checked; report and counts are added to."""
    first, block, n = None, 0, shard.count
    for i in range(n):
        path = part_path(out, shard, i)
        again = f"give the command of --shard {i}/{n} again" if n > 1 else "give the same command again"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {again}")
        for row in blocks_of(path, again):
            first = first or row
            if (row["job"], row["of"]) != (first["job"], first["of"]):
                other = f"was made with another model, input or flags than {part_path(out, shard, 0)}"
                raise ValueError(f"{path}: {other}; delete it, and {again}")
            if row["block"] != block:
                raise ValueError(f"{path}: holds block {row['block']} where {block} belongs; delete it, and {again}")
            block += 1
            report.judged.update(row["judged"])
            report.rejected.update({(lang, rule): count for lang, rule, count in row["verdicts"]})
            counts.update(row["counts"])
            yield from row["rows"]
        if first is None or block != first["of"] * (i + 1) // n:
            raise ValueError(f"{path}: is not finished; {again}")


def merge(out: str, shard: Shard) -> None:
    """Write OUT and the report from the parts of all shards; nothing is written when anything is missing."""
    report, counts, langs = Report(), Counter(), Counter()

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            for row in merged(out, shard, report, counts):
                file.write((",\n" if langs else "[\n") + json.dumps(row, ensure_ascii=False))
                langs[row["lang"]] += 1
            file.write("\n]\n" if langs else "[]\n")

    for leftover in Path(out).parent.glob(f".{glob.escape(Path(out).name)}.*.tmp"):
        leftover.unlink()  # of a process that was killed here
    try:
        write_atomic(Path(out), write)
        report.write(Path(out).parent, f"{Path(out).name.removesuffix('.json')}.rejected")
    except FileNotFoundError:
        raise
    except OSError as error:
        advice = "all translations are kept: make room, then give the same command again"
        raise OSError(f"--out {out}: not written ({error.strerror or error}); {advice}") from None
    for what, count in sorted(counts.items()):
        print(f"{count:>12,}  {what}")
    print(f"{langs.total():>12,}  examples written, in {len(langs)} languages, {langs['en']:,} in English\n")
    print("\n".join(report.table().splitlines()[:12]))
    print(f"wrote {out}", file=sys.stderr)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Translate English examples, or the embedded names, into other languages.")
    out = Path(cfg.out)
    if out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: is a folder or a device, not a file")
    if out.exists() and Path(cfg.input).exists() and os.path.samefile(out, cfg.input):
        raise ValueError(f"--out {out}: is the file of --input; give another name")
    shard = Shard.parse(cfg.shard)
    if not shard.merge:
        run(cfg, shard)
    if shard.count == 1 or shard.merge:
        merge(cfg.out, shard)
    else:
        done = f"shard {shard.number} of {shard.count} is done; when all are: the same command"
        print(f"{done} with --shard merge/{shard.count}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_main(main)
