"""Make nano's language model: `python weights/make_nano.py mt0`.

mBLIP starts from two models that took others months: BLIP-2, which can see and speaks English, and mT0, which knows many
languages and has never seen a picture. This script makes the second of them in miniature, from the embedded data alone:
an mT5 that has read the names of all things in all 85 languages as text and follows English instructions which name the
language of the answer. (The first is still to come.)

It can be stopped at any moment and goes on where it was (the same command again); a kill costs at most the time since
the last save. What it has reached is written to weights/nano/mt0 in the official layout, as fp16, with its record.
"""

import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanomblip.emoji import Emoji, load_emoji, load_udhr, unit_hash  # noqa: E402
from nanomblip.evaluate import mean, normal  # noqa: E402
from nanomblip.flags import flag, parse_flags, run_main  # noqa: E402
from nanomblip.generate import Decoding, write_one_each  # noqa: E402
from nanomblip.languages import LANGUAGES  # noqa: E402
from nanomblip.mblip import PRESETS  # noqa: E402
from nanomblip.mixture import CAPTION, NAMING  # noqa: E402
from nanomblip.mt5 import MT5  # noqa: E402
from nanomblip.runs import Interrupt, Log, RunLock, State, keep_memory, remove_leftovers  # noqa: E402
from nanomblip.tokenizer import Tokenizer, pad_rows  # noqa: E402
from nanomblip.weights import save_mt5, write_json  # noqa: E402


@dataclass(frozen=True)
class Config:
    stage: str = flag("mt0", "which model to make", ("mt0",))
    steps: int = flag(9000, "optimizer steps")
    batch: int = flag(256, "examples in a step")
    lr: float = flag(2e-3, "AdamW's peak learning rate: embedding, head, norms, position tables")
    muon_lr: float = flag(0.02, "Muon's peak learning rate: the matrices inside the blocks")
    warmup: int = flag(100, "steps of linear warm-up")
    decay: float = flag(0.3, "share of the steps, at the end, in which the rates fall to 0 in a straight line")
    concepts: str = flag("core", "vocabulary: core or all", ("core", "all"))
    seed: int = flag(0, "of everything random")
    bf16: bool = flag(True, "matrix products in bf16 (autocast); --no_bf16 where the processor has no instructions for it")
    save_every: float = flag(120.0, "seconds between saves")
    eval_every: int = flag(1000, "steps between looks at the exact match")
    work: str = flag("out/make_nano", "folder for the state between calls")
    out: str = flag("weights/nano", "folder for the result")


# Instructions for text; {x} is a name in some language, {L} the language wanted. The last two are what re-alignment will
# use: mBLIP's own prompts, behind a description instead of behind a picture.
TRANSLATE = {"{x}. {caption}": 6, "{x} in {L}:": 3, "Translate to {L}: {x}": 1, "What is the {L} word for {x}?": 1, "{x}. {naming}": 1}
POOL = 64  # batches whose examples are drawn, and sorted by length, together
FLOOR = 0.1  # a name that is known well is still drawn a tenth as often as one that is not
SPAN = 0.15  # of running text is hidden, in spans of about three pieces (T5, section 3.1.4)


class Texts:
    """The endless stream of text examples, a pure function of (seed, number of the pool) and of what is known by then.

    Of 20 examples 17 translate a name into another language (from English two times in three, else from any), 2 go
    between a name and its keywords, and 1 fills hidden spans of the Declaration of Human Rights. Every (language, concept)
    pair occurs, those held out from re-alignment included: the language model has read everything, as mT0 has.

    `loss` float (pairs,) is the running loss of each name in nats a piece, 1 at the start. A name is drawn in proportion
    to it, between FLOOR and 1: time goes to what is not known yet (prioritised sampling, Schaul et al. 2016, section 3.3).
    """

    def __init__(self, emoji: Emoji, tokenizer: Tokenizer, vocab: int, seed: int):
        self.emoji, self.tokenizer, self.seed, self.last = emoji, tokenizer, seed, vocab - 1
        self.langs = list(emoji.langs)
        self.pairs = [(lang, concept) for lang, of_lang in emoji.names.items() for concept in of_lang]
        self.loss = torch.ones(len(self.pairs))
        self.paragraphs = [text for texts in load_udhr().values() for text in texts]

    def example(self, rng: random.Random, pair: int) -> tuple[list[int], list[int], int]:
        """Prompt ids, target ids, and the pair whose name is the target (-1: none)."""
        kind = rng.randrange(20)
        if kind == 0:
            return *self.spans(rng), -1
        lang, concept = self.pairs[pair]
        L, name, words = LANGUAGES[lang].name, self.emoji.names[lang][concept], self.emoji.keywords[lang].get(concept)
        if kind <= 2 and words:
            some = ", ".join(rng.sample(words, min(len(words), 4)))
            if rng.random() < 0.5:
                prompt, target, pair = f"List keywords in {L}: {name}", some, -1
            else:
                prompt, target = f"Name it in {L}: {some}", name
        else:
            source = "en" if rng.random() < 2 / 3 else rng.choice(self.langs)
            x = self.emoji.names[source].get(concept) or self.emoji.names["en"][concept]
            more = dict(caption=rng.choice(CAPTION).format(L=L), naming=rng.choice(NAMING).format(L=L))
            (template,) = rng.choices(list(TRANSLATE), TRANSLATE.values())
            prompt, target = template.format(L=L, x=x, **more), name
        return self.tokenizer.encode(prompt, 48), self.tokenizer.encode(target, 48), pair

    def spans(self, rng: random.Random):
        """Span corruption: hidden spans become sentinels, counted down from the last row of the matrix as in mT5."""
        ids = self.tokenizer.encode(rng.choice(self.paragraphs), 10_000)[:-1]
        start = rng.randrange(max(1, len(ids) - 24))
        prompt, target, sentinel, i = [], [], self.last, 0
        ids = ids[start : start + 24]
        while i < len(ids):
            if rng.random() < SPAN / 3:
                n = rng.randint(1, 5)
                prompt.append(sentinel)
                target += [sentinel, *ids[i : i + n]]
                sentinel, i = sentinel - 1, i + n
            else:
                prompt.append(ids[i])
                i += 1
        return [*prompt, Tokenizer.eos], [*target, sentinel, Tokenizer.eos]

    def pool(self, number: int, batch: int) -> list[tuple]:
        """POOL batches of (prompt long (B, S), labels long (B, T) with -100 as padding, pair long (B,)).

        Sorted by the target's length, then each sixteenth by the prompt's: without that, padding doubles the encoder's work.
        """
        rng = random.Random(f"{self.seed}/text/{number}")
        drawn = rng.choices(range(len(self.pairs)), self.loss.clamp(FLOOR, 1.0).tolist(), k=POOL * batch)
        rows = sorted((self.example(rng, pair) for pair in drawn), key=lambda row: len(row[1]))
        share = POOL * batch // 16
        rows = [row for i in range(0, len(rows), share) for row in sorted(rows[i : i + share], key=lambda row: len(row[0]))]
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(parts)
        return [(pad_rows([p for p, _, _ in part], Tokenizer.pad), pad_rows([t for _, t, _ in part], -100),
                 torch.tensor([pair for _, _, pair in part])) for part in parts]  # fmt: skip

    def note(self, pair: torch.Tensor, loss: torch.Tensor) -> None:
        """Update the running losses: pair long (B,), loss float (B,)."""
        known = pair >= 0
        self.loss[pair[known]] = 0.5 * self.loss[pair[known]] + 0.5 * loss[known]


def rate(cfg: Config, step: int) -> float:
    """Share of the peak rate: warm-up, a plateau, a straight line to 0. A plateau can be made longer afterwards."""
    return min(1.0, (step + 1) / cfg.warmup, (cfg.steps - step) / (cfg.decay * cfg.steps))


@torch.no_grad()
def translate(model: MT5, tokenizer: Tokenizer, prompts: list[str], batch: int = 512) -> list[str]:
    """Greedy answers to text prompts."""
    model.eval()
    answers = []
    for i in range(0, len(prompts), batch):
        prompt = tokenizer.batch(prompts[i : i + batch])
        mask = prompt != Tokenizer.pad
        memory = model.encode(model.embed(prompt), mask)  # (B, S, D)
        may = (torch.arange(model.cfg.vocab) < len(tokenizer)).expand(len(prompt), -1)  # (B, V), pieces only
        found = write_one_each(model, memory, mask, may, Decoding(max_new_tokens=24), [0] * len(prompt), None)
        answers += [tokenizer.decode(best[0].ids) for best in found]
    return answers


def exact_match(model: MT5, tokenizer: Tokenizer, emoji: Emoji, limit: int) -> dict[str, float]:
    """Language -> share of English names translated exactly, on `limit` concepts a language chosen by hash.

    All of them were read in training: this asks how much of what it has read it knows.
    """
    asked = {lang: sorted(of_lang, key=lambda c: unit_hash("mt0", lang, c))[:limit] for lang, of_lang in emoji.names.items()}
    items = [(lang, c) for lang, cs in asked.items() for c in cs]
    prompts = [f"{emoji.names['en'][c]}. {CAPTION[0].format(L=LANGUAGES[lang].name)}" for lang, c in items]
    right = {lang: [] for lang in asked}
    for (lang, c), text in zip(items, translate(model, tokenizer, prompts)):
        right[lang].append(normal(text) == normal(emoji.names[lang][c]))
    return {lang: mean(values) for lang, values in right.items()}


def main(argv: list[str]) -> int:
    keep_memory()
    cfg = parse_flags(Config, argv[1:] if argv[:1] == ["mt0"] else argv, "Make nano's language model.")
    work, out = Path(cfg.work) / cfg.stage, Path(cfg.out) / cfg.stage
    emoji, tokenizer = load_emoji(cfg.concepts), Tokenizer(ROOT / "data" / "spiece.model")
    torch.manual_seed(cfg.seed)
    model = MT5(PRESETS["nano"].mt5)
    model.init_weights()
    texts = Texts(emoji, tokenizer, model.cfg.vocab, cfg.seed)

    hidden = [m.weight for path, m in model.named_modules() if isinstance(m, nn.Linear) and ".blocks." in path]
    is_hidden = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in is_hidden]
    optimizers = [torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
                  torch.optim.Muon(hidden, lr=cfg.muon_lr, momentum=0.95, weight_decay=0.01)]  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    lock = RunLock(work)  # noqa: F841, held until main returns
    remove_leftovers(work)
    state = State(work, model, optimizers, dict(loss=texts.loss))
    step, seconds = state.load()
    log = Log(work / "loss.csv", ("step", "loss"), step)
    tests = Log(work / "exact.csv", ("step", "exact_match"), step)
    interrupt, last_save = Interrupt(), time.time()
    bar = tqdm(total=cfg.steps, initial=step, unit="step", smoothing=0.05)

    while step < cfg.steps and not interrupt.signal:  # one pool a turn: its content depends on the running losses
        for prompt, labels, pair in texts.pool(step // POOL, cfg.batch)[: cfg.steps - step]:
            started = time.time()
            for optimizer, peak in zip(optimizers, (cfg.lr, cfg.muon_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate(cfg, step)
            model.train()
            mask, real = prompt != Tokenizer.pad, labels != -100
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.bf16):
                memory = model.encode(model.embed(prompt), mask)
                hidden_states = model.decoder(model.embed(model.shift_right(labels)), memory, mask)  # (B, T, D)
                logits = model.lm_head(hidden_states[real]).float()  # (pieces, V): the head sees real places only
            losses = F.cross_entropy(logits, labels[real], reduction="none")
            loss = losses.mean()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            texts.note(pair, torch.zeros(labels.shape).masked_scatter(real, losses.detach()).sum(1) / real.sum(1))
            step += 1
            seconds += time.time() - started
            log.add(step, f"{loss.item():.6f}")
            bar.update(1)
            bar.set_postfix_str(f"loss {loss.item():.3f}, running {texts.loss.mean():.3f}", refresh=False)
        if step // cfg.eval_every > (step - POOL) // cfg.eval_every:
            tests.add(step, f"{mean(exact_match(model, tokenizer, emoji, 20).values()):.4f}")
        if time.time() - last_save > cfg.save_every:
            state.save(step, seconds)
            last_save = time.time()
    bar.close()
    state.save(step, seconds)
    interrupt.release()

    exact = exact_match(model, tokenizer, emoji, 100)
    save_mt5(model, out, torch.float16)
    shutil.copyfile(tokenizer.path, out / "spiece.model")
    record = dict(config=asdict(cfg), steps_done=step, examples_seen=step * cfg.batch, seconds=round(seconds), torch=torch.__version__,
                  exact_match=mean(exact.values()), exact_match_by_language=exact)  # fmt: skip
    write_json(out / "record.json", record)
    print(f"{step} steps: {100 * record['exact_match']:.1f} % of English names translated exactly, mean of {len(exact)} languages; {out}")
    return 128 + interrupt.signal if interrupt.signal else 0


if __name__ == "__main__":
    run_main(main)
