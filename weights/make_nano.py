"""Make what nano starts from: `python weights/make_nano.py mt0` and `python weights/make_nano.py blip2`.

A run of train.py on the two becomes weights/nano/aligned by `python weights/make_nano.py aligned --init out/RUN`.

mBLIP joins two models that took others months. This script makes both in miniature, from the embedded data alone:

  mt0    an mT5 that has read the names of all things in all 85 languages as text and follows English instructions which
         name the language of the answer; it has never seen a picture. (--read: it reads other languages too; --instruct: the
         task mixture's instructions, asked of things described in text)
  blip2  a ViT, a Q-Former and a projection in front of a small T5 that writes English only: it can see, and has never
         read another language (--icons: with more English pictures than the embedded ones)

To train a finished mt0 further (--init), give gentle rates: --lr 5e-4 --muon_lr 0.001. The size of Muon's updates does not
depend on the gradient, and at the rates for random weights they overwrite the names within a hundred steps.

Either can be stopped at any moment and goes on where it was (the same command again); a kill costs at most the time since
the last save. What it has reached is written to weights/nano/<stage> in the official layout, as fp16, with its record.
"""

import random
import shutil
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanomblip.data.emoji import HELD_OUT_LANGS, Emoji, load_emoji, load_udhr, unit_hash  # noqa: E402
from nanomblip.data.image import ImageConfig, redraw  # noqa: E402
from nanomblip.data.language_id import LanguageID  # noqa: E402
from nanomblip.data.languages import LANGUAGES  # noqa: E402
from nanomblip.data.mixture import LABELS, NEEDS, TASKS, parse_tasks  # noqa: E402
from nanomblip.data.prompts import CAPTION, KEYWORDS, NAMING  # noqa: E402
from nanomblip.data.scripts import normal  # noqa: E402
from nanomblip.data.tokenizer import Tokenizer, pad_rows  # noqa: E402
from nanomblip.flags import flag, parse_flags, run_main  # noqa: E402
from nanomblip.measure.emoji_splits import answer, mean, questions, score  # noqa: E402
from nanomblip.model.attention import attend_path  # noqa: E402
from nanomblip.model.generate import Decoding, write  # noqa: E402
from nanomblip.model.int8_kernels import has_bf16  # noqa: E402
from nanomblip.model.mblip import MBLIP, PRESETS  # noqa: E402
from nanomblip.model.mt5 import MT5, MT5Attention  # noqa: E402
from nanomblip.model.qformer import QFormerAttention  # noqa: E402
from nanomblip.model.vit import ViTAttention  # noqa: E402
from nanomblip.training.optimizers import Muon  # noqa: E402
from nanomblip.training.state import Interrupt, Log, State, remove_leftovers  # noqa: E402
from nanomblip.training.warmup import name_places, name_scores, names_loss  # noqa: E402
from nanomblip.weights.adapter import load_adapter  # noqa: E402
from nanomblip.weights.files import RunLock, read_json, write_json  # noqa: E402
from nanomblip.weights.load import load_mblip, load_mt5  # noqa: E402
from nanomblip.weights.save import save_mblip, save_mt5, save_trained  # noqa: E402


@dataclass(frozen=True)
class Config:
    steps: int = flag(0, "optimizer steps; 0 = 6000 for mt0, 18000 for blip2")
    batch: int = flag(0, "examples in a step; 0 = 512 for mt0, 128 for blip2")
    lr: float = flag(0.0, "AdamW's peak learning rate: embedding, head, norms, position tables; 0 = 1e-3 for mt0, 2e-3 for blip2")
    muon_lr: float = flag(0.0, "Muon's peak learning rate: the matrices inside the blocks; 0 = 0.01 for mt0, 0.02 for blip2")
    muon_decay: float = flag(0.3, "Muon's weight decay: singular values stay near its inverse (twice that in matrices four times as high as wide)")
    warmup: int = flag(100, "steps of linear warm-up")
    decay: float = flag(0.9, "share of a phase's steps, at its end, in which the rates fall to 0 in a straight line")
    concepts: str = flag("core", "vocabulary: core or all", ("core", "all"))
    seed: int = flag(0, "of everything random")
    bf16: str = flag("auto", "matrix products in bf16 (autocast): auto = where the processor has instructions for them", ("auto", "on", "off"))
    save_every: float = flag(120.0, "seconds between saves")
    eval_every: int = flag(1000, "steps between looks at the exact match")
    init: str = flag("", "folder with weights to start from, such as weights/nano/mt0 of an earlier, shorter run; default: random")
    icons: str = flag("", "blip2: file of build_icons.py with more English pictures; default: the embedded pictures alone")
    instruct: float = flag(0.0, "mt0: share of the examples that are instructions about a thing described in text (`Instructions`)")
    read: float = flag(0.0, "mt0: share of the examples that read a name in another language and write it in English")
    tasks: str = flag("choice:2,match:4,exists:4,yes_no:4,category:2,question:0.3,keywords:0.7", "mt0: tasks of these, as train.py's --tasks")
    blur: float = flag(3.0, "mt0: largest standard deviation of the noise on a blurred name (tokens have 1); 0 = no noise and no mixing")
    contrast: float = flag(0.86, "blip2: share of the steps, the first ones, that train the ViT; 0 keeps the one of --init")
    redraw: float = flag(1.0, "blip2: how strongly the pictures are redrawn once half of the first phase is over; half as strongly for the Q-Former")
    work: str = flag("out/make_nano", "folder for the state between calls")
    out: str = flag("weights/nano", "folder for the result")

    def __post_init__(self):
        for name in ("contrast", "redraw", "instruct", "read"):
            if not 0 <= getattr(self, name) <= 1:  # written so that nan fails too
                raise ValueError(f"--{name} {getattr(self, name)}: between 0 and 1")
        if self.instruct + self.read > 1:
            raise ValueError(f"--instruct {self.instruct} --read {self.read}: shares of one whole, together at most 1")
        if not 0 <= self.blur < float("inf"):
            raise ValueError(f"--blur {self.blur}: a standard deviation, 0 or above")
        parse_tasks(self.tasks)
        if not 0 < self.decay <= 1:
            raise ValueError(f"--decay {self.decay}: above 0, at most 1")
        if not self.contrast and not self.init:
            raise ValueError("--contrast 0: trains no ViT; give --init a folder that has one")


# Instructions for text, and how often; {x} is a name in some language, {L} the language wanted. The last four are what
# re-alignment will use: mBLIP's own prompts, behind a description instead of behind a picture, or behind a blurred name (`Texts.pool`).
TRANSLATE = {"{x} in {L}:": 6, "Translate to {L}: {x}": 1, "{x}. {caption}": 3, "{x}. {naming}": 1,
             "{blurred}{caption}": 6, "{blurred}{naming}": 1}  # fmt: skip
# What stands where the picture's vectors will when an instruction of the task mixture is read as text, and how often. {stretched}: the
# English name's tokens over the Q places; {blurred}: the same under noise; {x}: the name in some language; {words}: English keywords.
DESCRIBE = {"{stretched}": 5, "{blurred}": 2, "{x}. ": 5, "{words}. ": 1, "{x}: {words}. ": 1}
GROUPS = ("english", "other", "held_out_things", "held_out_languages")  # of questions to test with
SCORED = ("choice", "match", "category", "exists", "yes_no")  # tasks with one right answer
POOL = 64  # batches whose examples are drawn, and sorted by length, together
FLOOR = 0.1  # a name that is known well is still drawn a tenth as often as one that is not
SPEAK = 0.4  # of blip2's steps after those for the ViT are its last phase, the only one in which its T5 runs
MIX = 0.5  # largest share of other names in it: a picture that could be two things has the mean of both (`mix_names`)
ENGLISH = 8  # times as often as a name in another language is an English one written: instructions are English, and so is most of what mT0 read
SCORES = 4.0  # largest deviation of attention's scores over the keys (`cap_scores`)
SHARES = (0.5, 0.3, 0.2)  # of blip2's pictures, if there are icons: embedded ones, icons of the same concepts, icons of other things
SPAN = 0.15  # of running text is hidden, in spans of about three pieces (T5, section 3.1.4)


class Instructions:
    """The task mixture (data/mixture.py) asked of a thing that is described in text: to nano what xP3 was to mT0.

    Prompts and targets are the mixture's own; a description takes the picture's place. A tenth of the concepts (by hash)
    and the languages of HELD_OUT_LANGS occur in none of it, neither as the thing, nor as an option, nor in a description:
    they are what the instructions are tested on. The language model still reads their names, keywords and categories (`Texts`).
    """

    def __init__(self, emoji: Emoji, tokenizer: Tokenizer, tasks: dict[str, float]):
        self.emoji, self.tokenizer, self.tasks = emoji, tokenizer, tasks
        self.concepts = {}  # (language, held out?) -> concepts that have a name in the language
        for lang, of_lang in emoji.names.items():
            for c in emoji.concepts:
                if c in of_lang:
                    self.concepts.setdefault((lang, unit_hash("instruct", c) < 0.1), []).append(c)
        self.langs = [lang for lang in emoji.langs if lang not in HELD_OUT_LANGS]
        self.lang_weights = [ENGLISH if lang == "en" else 1 for lang in self.langs]

    def ask(self, rng: random.Random, task: str, lang: str, held_out: bool = False):
        """(concept, prompt, target) of a task in a language, about a thing and among things that are held out or are not; None
        where the language has no text for it."""
        if any(phrase not in self.emoji.phrases[lang] for phrase in NEEDS.get(task, ())):
            return None
        pool = self.concepts[lang, held_out]
        concept = rng.choice(pool)
        pair = TASKS[task](self.emoji, concept, lang, rng, pool)
        return pair and (concept, *pair)

    def describe(self, rng: random.Random, concept: str, lang: str, template: str) -> tuple[list[int], str, int]:
        """Token ids, and the text to follow them, that describe a concept; and how many of the ids are to be blurred."""
        english = self.emoji.names["en"][concept]
        if template in ("{stretched}", "{blurred}"):
            places = name_places(self.tokenizer, [english], PRESETS["nano"].queries)[0].tolist()
            return places, "", len(places) if template == "{blurred}" else 0
        source = rng.choices(("en", lang, rng.choice(self.langs)), (2, 2, 1))[0]
        words = self.emoji.keywords["en"].get(concept, (english,))
        words = ", ".join(rng.sample(words, min(len(words), 4)))
        return [], template.format(x=self.emoji.names[source].get(concept, english), words=words), 0

    def example(self, rng: random.Random) -> tuple[list[int], list[int], int, int]:
        """As `Texts.example`."""
        asked = None
        while asked is None:  # what has no text for a task gives way to another task and language
            (task,), (lang,) = rng.choices(list(self.tasks), self.tasks.values()), rng.choices(self.langs, self.lang_weights)
            asked = self.ask(rng, task, lang)
        concept, prompt, target = asked
        (template,) = rng.choices(list(DESCRIBE), DESCRIBE.values())
        ids, text, blurred = self.describe(rng, concept, lang, template)
        return ids + self.tokenizer.encode(text + prompt), self.tokenizer.encode(target), -1, blurred

    def questions(self, task: str, group: str, limit: int) -> list[tuple[list[int], str]]:
        """Prompt ids and answer of `limit` questions to test with, the thing described by its English name in the picture's places."""
        langs = dict(english=["en"], held_out_languages=HELD_OUT_LANGS).get(group, [lang for lang in self.langs if lang != "en"])
        found = []
        for i in range(10 * limit):
            rng = random.Random(f"{task}/{group}/{i}")
            lang = langs[i % len(langs)]
            asked = self.ask(rng, task, lang, group == "held_out_things")
            if asked is not None and len(found) < limit:
                ids, _, _ = self.describe(rng, asked[0], lang, "{stretched}")
                found.append((ids + self.tokenizer.encode(asked[1]), asked[2]))
        return found


def score_tasks(model: MT5, instructions: Instructions, limit: int) -> dict[str, dict[str, float]]:
    """Task -> group of GROUPS -> share of `limit` questions answered exactly."""
    items = {(task, group): instructions.questions(task, group, limit) for task in SCORED for group in GROUPS}
    answers = iter(translate(model, instructions.tokenizer, [ids for asked in items.values() for ids, _ in asked]))
    shares = {task: {} for task in SCORED}
    for (task, group), asked in items.items():
        shares[task][group] = mean(normal(next(answers)) == normal(answer) for _, answer in asked)
    return shares


class Texts:
    """The endless stream of text examples, a pure function of (seed, number of the pool) and of what is known by then.

    Of 20 examples 17 translate a name into another language (from English nine times in ten, else from any), 1 goes
    between a name and its keywords, 1 says a thing's category or translates the words for yes, no and the categories, and 1
    fills hidden spans of the Declaration of Human Rights. Every (language, concept) pair occurs, those held out from
    re-alignment included: the language model has read everything, as mT0 has. A `share` of all examples are instructions.

    `loss` float (2 * pairs,) is the running loss of each name in nats per token, 1 at the start: of writing it, then of reading it,
    that is of writing the thing's English name instead (a share `read` of the examples). A name is drawn in proportion to it,
    between FLOOR and 1: time goes to what is not known yet (prioritised sampling, Schaul et al. 2016, section 3.3);
    and an English one ENGLISH times as often as that.
    """

    def __init__(self, emoji: Emoji, tokenizer: Tokenizer, vocab: int, seed: int, instructions: Instructions | None = None,
                 share: float = 0.0, blur: float = 3.0, read: float = 0.0):  # fmt: skip
        self.emoji, self.tokenizer, self.seed, self.last = emoji, tokenizer, seed, vocab - 1
        self.instructions, self.share, self.blur, self.read = instructions, share, blur, read
        self.langs = list(emoji.langs)
        self.pairs = [(lang, concept) for lang, of_lang in emoji.names.items() for concept in of_lang]
        self.english = torch.tensor([lang == "en" for lang, _ in self.pairs])
        self.loss = torch.ones(2 * len(self.pairs))
        self.paragraphs = [text for texts in load_udhr().values() for text in texts]

    def example(self, rng: random.Random, pair: int) -> tuple[list[int], list[int], int, int]:
        """Prompt ids, target ids, where in `loss` the name is (-1: nowhere), and how many pieces at the prompt's start are to be blurred."""
        if pair >= len(self.pairs):
            lang, concept = self.pairs[pair - len(self.pairs)]
            prompt = self.translation(rng, self.emoji.names[lang][concept], "English", [t for t in TRANSLATE if "{x}" in t])
            return self.tokenizer.encode(prompt, 48), self.tokenizer.encode(self.emoji.names["en"][concept], 48), pair, 0
        kind = rng.randrange(20)
        if kind == 0:
            return *self.spans(rng), -1, 0
        blurred = []
        lang, concept = self.pairs[pair]
        if kind == 2 and (fact := self.fact(rng, lang, concept)):
            return *(self.tokenizer.encode(text, 48) for text in fact), -1, 0
        L, name, words = LANGUAGES[lang].name, self.emoji.names[lang][concept], self.emoji.keywords[lang].get(concept)
        if kind == 1 and words:
            some = ", ".join(rng.sample(words, min(len(words), 4)))
            if rng.random() < 0.5:
                prompt, target, pair = f"List keywords in {L}: {name}", some, -1
            else:
                prompt, target = f"Name it in {L}: {some}", name
        else:
            source = "en" if rng.random() < 0.9 else rng.choice(self.langs)
            x = self.emoji.names[source].get(concept) or self.emoji.names["en"][concept]
            template = self.translation(rng, x, L, TRANSLATE)
            prompt, target = template.removeprefix("{blurred}"), name
            if template.startswith("{blurred}"):
                blurred = name_places(self.tokenizer, [x], PRESETS["nano"].queries)[0].tolist()
        return blurred + self.tokenizer.encode(prompt, 48), self.tokenizer.encode(target, 48), pair, len(blurred)

    def translation(self, rng: random.Random, x: str, L: str, templates) -> str:
        """One of the prompts of TRANSLATE, filled in, but for "{blurred}" at its start."""
        (template,) = rng.choices(list(templates), [TRANSLATE[t] for t in templates])
        more = dict(caption=rng.choice(CAPTION).format(L=L), naming=rng.choice(NAMING).format(L=L))
        return template.format(L=L, x=x, blurred="{blurred}", **more)

    def fact(self, rng: random.Random, lang: str, concept: str) -> tuple[str, str] | None:
        """What CLDR calls a thing's category, or yes, no and the categories themselves, in a language: prompt, target."""
        english, phrases, L = self.emoji.phrases["en"], self.emoji.phrases[lang], LANGUAGES[lang].name
        words = [(english[key], phrases.get(key)) for key in ("yes", "no")]
        labels = phrases.get("labels", {})
        words += [(english["labels"][key], labels.get(key)) for key in LABELS.values()]
        x, target = rng.choice(words)
        prompt = f"{x} in {L}:"
        if rng.random() < 0.6:
            prompt, target = f"Category in {L}: {self.emoji.names['en'][concept]}", labels.get(LABELS[self.emoji.category[concept]])
        return (prompt, target) if target else None

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

    def pool(self, number: int, batch: int, parts: int = 1) -> list[tuple]:
        """POOL batches in `parts` each: (prompt long (B, S), labels long (B, T) with -100 as padding, pair long (B,), noise, scale float (B, S, 1), seed).

        What the language model is to read is (embedded prompt + noise * N(0, 1)) * scale: 0 and 1, but for blurred names (into which `mix_names` mixes others first). These stand where the
        Q vectors of a picture will, one name over Q places as in `warmup.py`, with noise of one deviation up to `blur`, at a length
        between 0.4 and 1.2 of that of a token: so are the vectors that a Q-Former reaches (cosine 0.2 to 0.4 with the tokens). seed: of the noise.

        Each part has prompts of about the same length, and targets: sorted by the one, then each sixteenth by the other. Without that,
        padding doubles the work. The parts of a batch are of different lengths, so of different tasks.
        """
        rng = random.Random(f"{self.seed}/text/{number}")
        writing, reading = self.loss.clamp(FLOOR, 1.0).chunk(2)  # (pairs,)
        weights = [(torch.where(self.english, ENGLISH, 1) * writing).cumsum(0).tolist(), torch.where(self.english, 0, reading).cumsum(0).tolist()]
        N, rows = len(self.pairs), []
        for draw in (rng.random() for _ in range(POOL * batch)):
            if draw < self.share:
                rows.append(self.instructions.example(rng))
                continue
            reads = draw < self.share + self.read
            (pair,) = rng.choices(range(N), cum_weights=weights[reads])
            rows.append(self.example(rng, pair + N * reads))
        rows.sort(key=lambda row: len(row[0]))
        share = max(1, len(rows) // 16)
        rows = [row for i in range(0, len(rows), share) for row in sorted(rows[i : i + share], key=lambda row: len(row[1]))]
        size = batch // parts
        cut = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(cut)
        batches = []
        for part in cut:
            prompt, labels = pad_rows([p for p, _, _, _ in part], Tokenizer.pad), pad_rows([t for _, t, _, _ in part], -100)
            places = torch.tensor([places if self.blur else 0 for _, _, _, places in part])  # (B,)
            blurred = torch.arange(prompt.shape[1]) < places[:, None]  # (B, S)
            noise = torch.tensor([[rng.uniform(0, self.blur)] for _ in part]) * blurred  # (B, S)
            length = torch.tensor([[rng.uniform(0.4, 1.2)] for _ in part])  # (B, 1)
            scale = torch.where(blurred, length / (1 + noise.square()).sqrt(), 1.0)  # (B, S)
            pair = torch.tensor([pair for _, _, pair, _ in part])
            batches.append((prompt, labels, pair, noise[:, :, None], scale[:, :, None], rng.getrandbits(60)))
        return batches

    def note(self, pair: torch.Tensor, loss: torch.Tensor) -> None:
        """Update the running losses: pair long (B,), loss float (B,)."""
        known = pair >= 0
        self.loss[pair[known]] = 0.5 * self.loss[pair[known]] + 0.5 * loss[known]


def rate(cfg: Config, step: int, starts: list[int]) -> float:
    """Share of the peak rate: in each phase a warm-up, a plateau, a straight line to 0. A plateau can be made longer afterwards.

    starts: first step of each phase, ascending, from 0.
    """
    start = max(s for s in starts if s <= step)
    end = min((s for s in starts if s > step), default=cfg.steps)
    return min(1.0, (step - start + 1) / cfg.warmup, (end - step) / (cfg.decay * (end - start)))


@torch.no_grad()
def translate(model: MT5, tokenizer: Tokenizer, prompts: list[str | list[int]], batch: int = 512) -> list[str]:
    """Greedy answers to prompts: texts or token ids."""
    model.eval()
    answers = []
    for i in range(0, len(prompts), batch):
        ids = [tokenizer.encode(p) if isinstance(p, str) else p for p in prompts[i : i + batch]]
        prompt = pad_rows(ids, Tokenizer.pad)
        mask = prompt != Tokenizer.pad
        memory = model.encode(model.embed(prompt), mask)  # (B, S, D)
        start = prompt.new_full((len(prompt), 1), model.cfg.pad)
        found = write(model, memory, mask, start, Decoding(max_new_tokens=24), vocab=len(tokenizer))
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


def read_match(model: MT5, tokenizer: Tokenizer, emoji: Emoji, limit: int) -> float:
    """Share of names in other languages of which the thing's English name is written, `limit` concepts a language chosen by hash."""
    asked = [(of_lang[c], emoji.names["en"][c]) for lang, of_lang in emoji.names.items() if lang != "en"
             for c in sorted(of_lang, key=lambda c: unit_hash("mt0", lang, c))[:limit]]  # fmt: skip
    texts = translate(model, tokenizer, [f"{name}. {CAPTION[0].format(L='English')}" for name, _ in asked])
    return mean(normal(text) == normal(english) for text, (_, english) in zip(texts, asked))


def report(exact: dict[str, float]) -> dict:
    """What a stage's test says, as it is recorded: the shares by language, and their mean."""
    return dict(exact_match=mean(exact.values()), exact_match_by_language=exact)


class Pictures:
    """The endless stream of (picture, English prompt, English target): the training pictures of the eight artists, and icons.

    Four targets in five are the name, the others a few keywords (icons: always the name). The pictures are redrawn at each look
    (`redraw`), so that what is learned is the thing and not an artist's hand.

    `names` are the English names of the concepts, in their order, and those only icons have. icons: a file of build_icons.py, or "".
    """

    def __init__(self, emoji: Emoji, tokenizer: Tokenizer, image: ImageConfig, seed: int, icons: str = ""):
        self.emoji, self.tokenizer, self.image, self.seed = emoji, tokenizer, image, seed
        self.names = [emoji.names["en"][concept] for concept in emoji.concepts]
        index = {concept: i for i, concept in enumerate(emoji.concepts)}
        self.concept = [index[concept] for concept, _ in emoji.cells]  # of each picture, its number in `names`
        self.pixels, self.sources = list(emoji.pictures), [emoji.cells_in("train")]
        if icons:
            try:
                with np.load(icons) as file:  # no pickle: numpy's default
                    labels, pictures = file["names"].tolist(), file["pictures"]
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # numpy's own advice for some of these is to unpickle
                raise ValueError(f"--icons {icons}: missing, damaged or not of build_icons.py; make it with: python weights/build_icons.py") from None
            self.names += sorted(set(labels) - set(self.names))
            number = {name: i for i, name in enumerate(self.names)}
            new = range(len(self.pixels), len(self.pixels) + len(labels))
            self.pixels += list(pictures)
            self.concept += [number[label] for label in labels]
            known = [self.concept[i] < len(emoji.concepts) for i in new]
            self.sources += [[i for i, yes in zip(new, known) if yes], [i for i, yes in zip(new, known) if not yes]]

    def pool(self, number: int, batch: int, strength: float = 1.0, blend: bool = False):
        """POOL batches of (image float (B, 1, 3, size, size), prompt long (B, S), labels long (B, T), target float (B, C)).

        Texts of about the same length come together. target: shares of the C `names` that are in the picture. strength: of the redrawing, 0..1. blend: half of the pictures have another one of the batch mixed in, by any share
        (mixup, Zhang et al. 2018); prompt and labels are the first one's.
        """
        rng = random.Random(f"{self.seed}/pictures/{number}")
        rows = []
        for source in rng.choices(self.sources, SHARES[: len(self.sources)], k=POOL * batch):
            picture = rng.choice(source)
            words = self.emoji.keywords["en"].get(self.emoji.cells[picture][0]) if picture < len(self.emoji.cells) else None
            if words and rng.random() < 0.2:
                prompt, target = KEYWORDS[0].format(L="English"), ", ".join(rng.sample(words, min(len(words), 4)))
            else:
                prompt, target = rng.choice(CAPTION).format(L="English"), self.names[self.concept[picture]]
            rows.append((picture, self.tokenizer.encode(prompt, 48), self.tokenizer.encode(target, 48)))
        rows.sort(key=lambda row: len(row[2]))
        parts = [rows[i : i + batch] for i in range(0, len(rows), batch)]
        rng.shuffle(parts)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        for part in parts:  # one at a time: a pool of pictures would be 200 MB
            pictures = [picture for picture, _, _ in part]
            raw = torch.from_numpy(np.stack([self.pixels[picture] for picture in pictures])).permute(0, 3, 1, 2).float() / 255
            image = self.normalise(redraw(raw, generator, strength))  # (B, 3, size, size)
            target = F.one_hot(torch.tensor([self.concept[picture] for picture in pictures]), len(self.names)).float()  # (B, C)
            if blend:
                share = torch.rand(len(part), generator=generator) * (torch.rand(len(part), generator=generator) < 0.5)
                image = torch.lerp(image, image.roll(1, 0), share[:, None, None, None])
                target = torch.lerp(target, target.roll(1, 0), share[:, None])
            yield image[:, None], pad_rows([p for _, p, _ in part], Tokenizer.pad), pad_rows([t for _, _, t in part], -100), target

    def normalise(self, image: torch.Tensor) -> torch.Tensor:
        """Float (B, 3, H, W) in 0..1 -> what the ViT reads."""
        return (image - torch.tensor(self.image.mean)[:, None, None]) / torch.tensor(self.image.std)[:, None, None]


class MakeMT0:
    """What the loop needs to know of this stage: the model, its batches, its loss, its test, how it is saved."""

    steps, batch, unit = 6000, 512, "of English names translated exactly, mean of all languages"
    phases, rates, parts = (0.0,), dict(lr=1e-3, muon_lr=0.01), 4
    load = staticmethod(load_mt5)

    def __init__(self, emoji: Emoji, tokenizer: Tokenizer, cfg: Config):
        self.emoji, self.tokenizer = emoji, tokenizer
        self.model = MT5(PRESETS["nano"].mt5)
        self.trained = self.model
        self.instructions = Instructions(emoji, tokenizer, parse_tasks(cfg.tasks)) if cfg.instruct else None
        self.texts = Texts(emoji, tokenizer, self.model.cfg.vocab, cfg.seed, self.instructions, cfg.instruct, cfg.blur, cfg.read)
        self.extra = dict(loss=self.texts.loss)

    def begin(self, phase: int) -> list[nn.Parameter]:
        return []  # nothing is drawn anew

    def pool(self, number, batch, done):
        return self.texts.pool(number, batch, self.parts)

    def loss(self, done, prompt, labels, pair, noise, scale, seed):
        generator = torch.Generator().manual_seed(seed)
        embedded = mix_names(self.model.embed(prompt), noise[:, 0, 0] > 0, generator)  # (B, S, D)
        embedded = (embedded + noise * torch.randn(embedded.shape, generator=generator)) * scale
        loss, losses = caption_loss(self.model, embedded, prompt != Tokenizer.pad, labels)
        real = labels != -100
        self.texts.note(pair, torch.zeros(labels.shape).masked_scatter(real, losses).sum(1) / real.sum(1))
        return loss

    def test(self, quick: bool, done: float) -> dict:
        exact = exact_match(self.model, self.tokenizer, self.emoji, 20 if quick else 100)
        found = report(exact) | dict(read_match=read_match(self.model, self.tokenizer, self.emoji, 5 if quick else 50))
        if self.instructions:
            found["tasks"] = score_tasks(self.model, self.instructions, 100 if quick else 500)
        return found

    def save(self, out: Path):
        save_mt5(self.model, out, torch.float16)


class MakeBLIP2:
    """As MakeMT0; the T5 behind the pictures is small and writes English only, the stand-in for flan-t5.

    Three phases. First the ViT (the stand-in for EVA-CLIP): the mean of its vectors, and the eight of a Q-Former side by side, are each to
    tell a picture's name from all others. With some hundred names each can have a vector of its own, so this is a linear classifier.
    Redrawing grows from a third of its strength to all of it (`--redraw`) in the first half, and is half of it afterwards. Then the ViT is frozen, and as in BLIP-2
    (Li et al. 2023, sections 3.2 and 3.3) a fresh Q-Former learns in two phases: to bring pictures near their names, each vector imitating its piece of the T5's
    embedded name (`warmup.py`), and to say it through the T5, while it goes on imitating. Fresh, because one that a classifier has read was a worse
    start than random weights (weights/LOG.md, "A Q-Former to start from").
    """

    steps, batch, unit = 18000, 128, "of the validation pictures named exactly in English"
    rates, parts = dict(lr=2e-3, muon_lr=0.02), 1
    load = staticmethod(load_mblip)
    extra = {}

    def __init__(self, emoji: Emoji, tokenizer: Tokenizer, cfg: Config):
        self.emoji, self.tokenizer = emoji, tokenizer
        nano = PRESETS["nano"]
        small = dict(width=nano.mt5.width * 2 // 3, heads=nano.mt5.heads * 2 // 3, layers=1, decoder_layers=1)
        self.model = MBLIP(replace(nano, mt5=replace(nano.mt5, **small)))
        self.image, self.strength, self.seed = ImageConfig(size=nano.vit.image_size), cfg.redraw, cfg.seed
        self.phases = (0.0, cfg.contrast, 1 - SPEAK * (1 - cfg.contrast))
        self.pictures = Pictures(emoji, tokenizer, self.image, cfg.seed, cfg.icons)
        self.places = name_places(tokenizer, self.pictures.names, nano.queries)  # (C, Q)
        C = len(self.pictures.names)
        self.heads = nn.ModuleDict(dict(vit=nn.Linear(nano.vit.width, C), qformer=nn.Linear(nano.queries * nano.qformer.width, C)))
        self.trained = nn.ModuleDict(dict(model=self.model, heads=self.heads))

    def begin(self, phase: int) -> list[nn.Parameter]:
        """Before the first step of a phase; returns the parameters that are new, whose optimizers have nothing to remember."""
        if phase != 1:
            return []
        torch.manual_seed(self.seed)
        self.model.qformer.init_weights()
        nn.init.normal_(self.model.queries)
        self.model.init_projection()
        return [*self.model.qformer.parameters(), self.model.queries, *self.model.proj.parameters()]

    def pool(self, number, batch, done):
        _, see, _ = self.phases
        sees = done < see
        strength = min(1.0, 1 / 3 + 4 / 3 * done / see) if sees else 0.5
        return self.pictures.pool(number, batch, self.strength * strength, blend=sees)

    def logits(self, image) -> dict[str, torch.Tensor]:
        """image float (B, 1, 3, size, size) -> for ViT and Q-Former (B, C), one logit a concept."""
        features = self.model.image_features(image)[:, 0]  # (B, N, Dv)
        summary = self.model.qformer(self.model.queries.expand(len(features), -1, -1), features)  # (B, Q, Dq)
        return {name: self.heads[name](x).float() for name, x in dict(vit=features.mean(1), qformer=summary.flatten(1)).items()}

    def loss(self, done, image, prompt, labels, target):
        _, see, speak = self.phases
        if done < see:
            return sum(F.cross_entropy(logits, target) for logits in self.logits(image).values())
        with torch.no_grad():
            features = self.model.image_features(image)
        visual = self.model.image_tokens(features)  # (B, Q, D)
        names = self.model.mt5.embed_tokens(self.places).detach().float()  # (C, Q, D)
        imitation = names_loss(visual, target.argmax(1), names)
        if done < speak:
            return imitation
        mask = F.pad(prompt != Tokenizer.pad, (visual.shape[1], 0), value=True)  # (B, L)
        text = torch.cat([visual.float(), self.model.mt5.embed(prompt)], dim=1)  # (B, L, D)
        return caption_loss(self.model.mt5, text, mask, labels)[0] + imitation

    def test(self, quick: bool, done: float) -> dict:
        """On the validation pictures only: the test pictures are for the trained whole.

        Share right: in the first phase by the Q-Former's classifier, in the second by the nearest name, in the third as written by the T5.
        """
        self.model.eval()
        _, see, speak = self.phases
        if done < speak:
            cells = self.emoji.cells_in("val")
            raw = torch.from_numpy(self.emoji.pictures[cells]).permute(0, 3, 1, 2).float() / 255
            image = self.pictures.normalise(raw)[:, None]
            with torch.no_grad():
                if done < see:
                    scores = self.logits(image)["qformer"]
                else:
                    scores = name_scores(self.model.encode_image(image), self.model.mt5.embed_tokens(self.places).float())
            found = scores[:, : len(self.emoji.concepts)].argmax(1)
            return report({"en": mean(self.pictures.concept[cell] == i for cell, i in zip(cells, found.tolist()))})
        items = questions(self.emoji, "validation", ["en"], 0)
        answers = answer(self.model, self.tokenizer, self.image, self.emoji, items)
        return report({lang: r["exact"] for lang, r in score(self.emoji, items, answers, LanguageID({"en": self.emoji.names["en"]})).items()})

    def save(self, out: Path):
        save_mblip(self.model, out, image_token=len(self.tokenizer), languages=["en"], dtype=torch.float16)
        write_json(out / "preprocessor_config.json", self.image.to_hf())


def mix_names(embedded: torch.Tensor, blurred: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mix other names into the blurred ones: embedded float (B, S, D), blurred bool (B,), whose first Q places hold a name -> the same shape.

    Of a picture that could be several things imitation's squares are least at sum_c p(c | picture) T_c, the mean of their names. So each name T becomes

        (1 - s) T + s ((1 - u) T_rival + u T_mean)        s uniform in 0..MIX, u in 0..1

    with another name of the batch as the rival, and the mean over the batch's names.
    """
    rows, Q = blurred.nonzero()[:, 0], PRESETS["nano"].queries
    if not len(rows):  # then the batch may have fewer than Q places
        return embedded
    names = embedded[rows, :Q]  # (R, Q, D)
    share, spread = torch.rand(2, len(rows), 1, 1, generator=generator)
    others = torch.lerp(names[torch.randperm(len(rows), generator=generator)], names.mean(0, keepdim=True), spread)
    return embedded.index_put((rows[:, None], torch.arange(Q)), torch.lerp(names, others, MIX * share))


def caption_loss(mt5: MT5, embedded, mask, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the real labels: embedded float (B, L, D), mask bool (B, L), labels long (B, T) -> its mean, and each (pieces,)."""
    real = labels != -100
    hidden = mt5.decoder(mt5.embed(mt5.shift_right(labels)), mt5.encode(embedded, mask), mask)  # (B, T, D)
    return HeadLoss.apply(hidden[real], mt5.lm_head.weight, labels[real])  # the head sees real places only


@torch.no_grad()
def cap_scores(model: nn.Module) -> None:
    """Scale q and k of each attention down where scores on inputs of deviation 1 would deviate by more than SCORES.

    With W_q, W_k (H*K, D) a component of q has the variance |W_q|^2 / HK (Frobenius norm), and a score, the sum of K products,
    the deviation sqrt(K) |W_q| |W_k| / HK; ViT and Q-Former divide it by sqrt(K) (Vaswani et al. 2017, equation 1), T5 does not.

    Muon gives q and k growth at a constant rate, and once a softmax sees scores far apart it looks at one key, whatever the input, and passes
    hardly any gradient on: nano trained for 14,000 steps in that state, 1.1 keys of 14 looked at, before it was noticed. (QK-Clip, Kimi Team
    2025, section 2.1, measures the scores themselves; the norms do without a forward pass.) Dividing q by 32 then raised the loss by 3.5 %.
    """
    for m in model.modules():
        if isinstance(m, ViTAttention):
            D = m.qkv.in_features
            q, k, biases, scaled = m.qkv.weight[:D], m.qkv.weight[D : 2 * D], (m.qkv.bias[:D], m.qkv.bias[D : 2 * D]), True  # (D, D)
        elif isinstance(m, (QFormerAttention, MT5Attention)):
            q, k, scaled = m.q.weight, m.k.weight, isinstance(m, QFormerAttention)
            biases = (m.q.bias, m.k.bias) if scaled else ()
        else:
            continue
        deviation = q.norm() * k.norm() / len(q) * (1 if scaled else (len(q) / m.heads) ** 0.5)
        factor = (SCORES / deviation).clamp(max=1).sqrt()
        for t in (q, k, *biases):
            t.mul_(factor)


class HeadLoss(torch.autograd.Function):
    """The head and its cross-entropy, 256 pieces at a time: the (pieces, V) logits never exist as a whole.

    They and their gradients would be the largest tensors of a step by far, and writing memory that is not in the cache costs
    more here than the matrix products do: a step of `mt0` takes two thirds of the time. hidden float (P, D), weight (V, D), labels long (P,) ->
    the mean in nats, which has a gradient, and the single losses (P,), which have none.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else hidden.dtype
        x, w = hidden.to(dtype), weight.to(dtype)
        dx, dw, losses = torch.empty_like(x), torch.zeros_like(weight), torch.empty(len(x))
        for i in range(0, len(x), 256):
            part, label = x[i : i + 256], labels[i : i + 256]
            logits = (part @ w.T).float()  # (256, V)
            logits -= logits.logsumexp(1, keepdim=True)
            losses[i : i + 256] = -logits.gather(1, label[:, None])[:, 0]
            grad = logits.exp_()  # softmax - one-hot, the gradient of cross-entropy by the logits
            grad[torch.arange(len(label)), label] -= 1
            grad = (grad / len(x)).to(dtype)
            dx[i : i + 256] = grad @ w
            dw += grad.T @ part
        ctx.save_for_backward(dx, dw)
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx, grad, _):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None


def keep_trained(run: Path, out: Path) -> None:
    """Write the trained parts of a run that started from weights/nano/{blip2,mt0} to out/aligned, on top of these two."""
    model, record = load_mblip(run), read_json(run / "record.json")
    started = dict(load_mblip(out / "blip2").vit.named_parameters(prefix="vit"))
    trained = [name for name, p in model.named_parameters() if not name.startswith("mt5.") and not (name in started and torch.equal(p, started[name]))]
    model.mt5 = load_mt5(out / "mt0")  # the run's has its LoRA merged
    adapter = "adapter" if (run / "adapter").exists() else ""
    if adapter:
        load_adapter(model.mt5, run / "adapter")
    config = read_json(run / "config.json")
    save_trained(model, out / "aligned", trained, "../blip2", "../mt0", config["image_token_index"], config["languages"], adapter=adapter)
    for name in ("preprocessor_config.json", "spiece.model"):
        shutil.copyfile(run / name, out / "aligned" / name)
    write_json(out / "aligned" / "record.json", record)
    print(f"{len(trained)} trained tensors; {out / 'aligned'}")


STAGES = {"mt0": MakeMT0, "blip2": MakeBLIP2}


def build_optimizers(model: nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW for embedding, head, norms and position tables, Muon for the matrices inside the blocks."""
    hidden = [m.weight for path, m in model.named_modules() if isinstance(m, nn.Linear) and ".blocks." in path]
    is_hidden = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in is_hidden]
    return [torch.optim.AdamW(rest, lr=cfg.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            Muon(hidden, lr=cfg.muon_lr, weight_decay=cfg.muon_decay)]  # fmt: skip


def train(stage, cfg: Config, work: Path) -> tuple[int, float, int]:
    """Train a stage from its last saved state on, to the last step or a signal: (steps done, seconds, the signal or 0)."""
    model = stage.trained
    optimizers = build_optimizers(model, cfg)
    bf16 = cfg.bf16 == "on" or (cfg.bf16 == "auto" and has_bf16())
    remove_leftovers(work)
    state = State(work, model, optimizers, stage.extra)
    step, seconds = state.load()
    log = Log(work / "loss.csv", ("step", "loss"), step)
    tests = Log(work / "exact.csv", ("step", "exact_match"), step)
    interrupt, last_save = Interrupt(), time.time()
    starts = [round(share * cfg.steps) // POOL * POOL if share < 1 else cfg.steps for share in stage.phases]  # a phase begins with a pool
    bar = tqdm(total=cfg.steps, initial=step, unit="step", smoothing=0.05)

    while step < cfg.steps and not interrupt.signal:  # one pool a turn: its content depends on the running losses
        for p in (p for phase, start in enumerate(starts) if step == start for p in stage.begin(phase)):
            for optimizer in optimizers:
                optimizer.state.pop(p, None)
        done = max(step / cfg.steps, *(share for share, start in zip(stage.phases, starts) if start <= step))
        pool = iter(stage.pool(step // POOL, cfg.batch, done))
        for _ in range(min(POOL, cfg.steps - step)):
            started, total = time.time(), 0.0
            for optimizer, peak in zip(optimizers, (cfg.lr, cfg.muon_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = peak * rate(cfg, step, starts)
            model.train()
            for tensors in islice(pool, stage.parts):
                # Written out, attention of a few places in bf16 takes less time than torch's fused kernel, whose backward pass is slow.
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16), attend_path("written" if bf16 else "fast"):
                    loss = stage.loss(done, *tensors) / stage.parts
                loss.backward()
                total += loss.item()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            cap_scores(model)
            step += 1
            seconds += time.time() - started
            log.add(step, f"{total:.6f}")
            bar.update(1)
            bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
        if step // cfg.eval_every > (step - POOL) // cfg.eval_every:
            found = stage.test(quick=True, done=step / cfg.steps)
            tests.add(step, f"{found['exact_match']:.4f}")
            bar.write(str({name: value for name, value in found.items() if name != "exact_match_by_language"}))
        if time.time() - last_save > cfg.save_every:
            state.save(step, seconds)
            last_save = time.time()
    bar.close()
    state.save(step, seconds)
    interrupt.release()
    return step, seconds, interrupt.signal


def main(argv: list[str]) -> int:
    known = (*STAGES, "aligned")
    cfg = parse_flags(Config, argv[1:] if argv[:1] and argv[0] in known else argv, "Make what nano starts from: mt0 or blip2.")
    if not argv or argv[0] not in known:
        raise ValueError(f"give what to make first: {', '.join(known)}")
    name = argv[0]
    if name == "aligned":
        keep_trained(Path(cfg.init), Path(cfg.out))
        return 0
    work, out = Path(cfg.work) / name, Path(cfg.out) / name
    emoji, tokenizer = load_emoji(cfg.concepts), Tokenizer(ROOT / "data" / "spiece.model")
    torch.manual_seed(cfg.seed)
    stage = STAGES[name](emoji, tokenizer, cfg)
    cfg = replace(cfg, steps=cfg.steps or stage.steps, batch=cfg.batch or stage.batch)
    cfg = replace(cfg, **{name: value for name, value in stage.rates.items() if not getattr(cfg, name)})
    stage.model.init_weights()
    if cfg.init:  # the optimizers' memory and the running losses are not in it: both come back within a few hundred steps
        stage.model.load_state_dict(stage.load(Path(cfg.init)).state_dict())
    work.mkdir(parents=True, exist_ok=True)
    lock = RunLock(work)  # noqa: F841, held until main returns
    step, seconds, stopped = train(stage, cfg, work)

    found = stage.test(quick=False, done=step / cfg.steps)
    stage.save(out)
    shutil.copyfile(tokenizer.path, out / "spiece.model")
    config = {key: value for key, value in asdict(cfg).items() if key not in ("work", "out")}  # where, not what
    record = dict(config=config, steps_done=step, examples_seen=step * cfg.batch, seconds=round(seconds), torch=torch.__version__) | found
    write_json(out / "record.json", record)
    print(f"{step} steps: {100 * record['exact_match']:.1f} % {stage.unit}; {out}")
    return 128 + stopped if stopped else 0


if __name__ == "__main__":
    run_main(main)
