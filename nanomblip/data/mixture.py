"""Training examples: a picture, an English instruction that names a language, and a text in that language.

mBLIP trains on a mixture of tasks whose prompts stay English while the targets are translated (arXiv 2307.06930,
section 3.2). Here the paper's templates (prompts.py) are filled with what people wrote: the names, keywords and
phrases of the embedded data (emoji.py). json_mixture.py does the same job for the paper's own data.

Every choice (order, language, task, template, crop) is a pure function of (seed, epoch, index): example 12,345 is the
same whoever asks for it, so the number of loader workers, a resumed run or another batch size cannot change the data.
Several processes share one stream: process `rank` of `world` takes every world-th micro-batch of it.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from nanomblip.data import prompts
from nanomblip.data.emoji import Emoji, pair_split, unit_hash
from nanomblip.data.image import ImageConfig, augment_image, image_to_tensor, redraw
from nanomblip.data.languages import LANGUAGES
from nanomblip.data.tokenizer import Tokenizer, pad_rows


@dataclass(frozen=True)
class Example:
    """One line of the mixture: `picture` indexes `emoji.pictures`, `key` seeds whatever is still to be drawn for it."""

    picture: int
    lang: str
    task: str
    prompt: str
    target: str
    key: str


# Each task: (emoji, concept, language, rng, concepts with a usable name in the language) -> (prompt, target), or
# None where the language has no text for it. NEEDS says which phrases of CLDR it takes.


def caption(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "Caption the image in Swahili." -> the name."""
    return prompts.caption(rng, LANGUAGES[lang].name, emoji.names[lang][concept])


def naming(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "What is in the image? Answer briefly in Swahili." -> the name."""
    return prompts.naming(rng, LANGUAGES[lang].name, emoji.names[lang][concept])


def match(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """Does this caption fit? -> English yes or no. Half of the time it is another concept's name in the same
    language."""
    names, fits, other = emoji.names[lang], rng.random() < 0.5, rng.choice(pool)
    name = names[concept if fits else other]
    return prompts.match(rng, name, name == names[concept])


def exists(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "Is there a paka?" -> English yes or no: half true, a quarter another thing, a quarter the next one in
    Unicode's order, in which neighbours are related. The paper's ImageNet task does so with classes."""
    names, draw = emoji.names[lang], rng.random()
    other = rng.choice(pool) if draw < 0.75 else pool[(pool.index(concept) + 1) % len(pool)]
    name = names[concept if draw < 0.5 else other]
    return prompts.exists(rng, name, name == names[concept])


def yes_no(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "paka? Short Swahili answer:" -> CLDR's word for yes or no in the language."""
    names, phrases = emoji.names[lang], emoji.phrases[lang]
    name = names[concept if rng.random() < 0.5 else rng.choice(pool)]
    return prompts.vqa(rng, LANGUAGES[lang].name, f"{name}?", phrases["yes" if name == names[concept] else "no"])


def three_options(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]) -> str | None:
    """ "A, B or C?" in the language, by CLDR's own list pattern; the concept's name is one of the three."""
    names = emoji.names[lang]
    options = [names[concept]] + [names[rng.choice(pool)] for _ in range(2)]
    return emoji.phrases[lang]["or3"].format(*rng.sample(options, 3)) + "?" if len(set(options)) == 3 else None


def choice(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "A, B or C?" -> the name among the three."""
    asked = three_options(emoji, concept, lang, rng, pool)
    return None if asked is None else prompts.vqa(rng, LANGUAGES[lang].name, asked, emoji.names[lang][concept])


def question(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """'What is a Swahili question for the image with the answer "paka"?' -> "A, B or C?"."""
    asked = three_options(emoji, concept, lang, rng, pool)
    return None if asked is None else prompts.question(rng, LANGUAGES[lang].name, asked, emoji.names[lang][concept])


# Unicode's five categories of concrete things -> the key of CLDR's word for them.
LABELS = {"Animals & Nature": "animals_nature", "Food & Drink": "food_drink", "Travel & Places": "travel_places",
          "Activities": "activities", "Objects": "objects"}  # fmt: skip


def category(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "object, food & drink or activity?" in the language -> the right one, in CLDR's words."""
    labels = emoji.phrases[lang]["labels"]
    right = labels[LABELS[emoji.category[concept]]]
    others = sorted({labels[key] for key in LABELS.values()} - {right})
    asked = emoji.phrases[lang]["or3"].format(*rng.sample([right, *rng.sample(others, 2)], 3)) + "?"
    return prompts.vqa(rng, LANGUAGES[lang].name, asked, right)


def keywords(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """ "List keywords for the image in Swahili." -> up to four of CLDR's keywords."""
    words = emoji.keywords[lang].get(concept)
    return (rng.choice(prompts.KEYWORDS).format(L=LANGUAGES[lang].name), ", ".join(words[:4])) if words else None


TASKS = {"caption": caption, "naming": naming, "match": match, "choice": choice, "keywords": keywords,
         "category": category, "question": question, "exists": exists, "yes_no": yes_no}  # fmt: skip
NEEDS = {"choice": ("or3",), "question": ("or3",), "category": ("or3", "labels"), "yes_no": ("yes", "no")}
NOT_EMBEDDED = ("vqa", "reasoning", "explanation", "detail", "conversation")  # the paper's other families


def parse_tasks(spec: str) -> dict[str, float]:
    """Task probabilities from `--tasks`: "caption", "caption,match" (equal shares) or "caption:3,match:1"."""
    weights = {}
    for item in spec.split(","):
        name, _, number = item.strip().partition(":")
        if name in NOT_EMBEDDED:
            raise ValueError(
                f"--tasks {spec!r}: nobody wrote texts for {name} about the embedded pictures; give them by --mixture"
            )
        if name not in TASKS or name in weights:
            raise ValueError(f"--tasks {spec!r}: {name!r} is given twice or is none of {', '.join(TASKS)}")
        try:
            weights[name] = float(number or 1)
        except ValueError:
            raise ValueError(f"--tasks {spec!r}: {number!r} is not a number") from None
        if not 0 < weights[name] < float("inf"):
            raise ValueError(f"--tasks {spec!r}: the weight of {name} must be positive")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class Mixture:
    """The endless stream of training examples.

    emoji: the data; langs and tasks: probabilities, summing to 1; seed: of the run; split: which pictures ("train" or
    "val"); with split "train", only (language, concept) pairs of the train split appear, as targets or in a question.
    share: of the pictures that are used, chosen by hash, so that a smaller share is part of a larger one.
    One epoch shows every picture once, each with one task in one language.
    """

    def __init__(
        self,
        emoji: Emoji,
        langs: dict[str, float],
        tasks: dict[str, float],
        seed: int,
        split: str = "train",
        share: float = 1.0,
    ):
        self.emoji, self.seed = emoji, seed
        self.langs, self.lang_weights = list(langs), list(langs.values())
        self.tasks, self.task_weights = list(tasks), list(tasks.values())
        self.cells = [p for p in emoji.cells_in(split) if share == 1 or unit_hash("share", *emoji.cells[p]) < share]
        # The concepts that may be asked for in each language, in Unicode's order.
        self.usable = {
            lang: [c for c in emoji.concepts if c in emoji.names[lang] and pair_split(lang, c) == "train"]
            for lang in langs
        }
        self.is_usable = {lang: set(concepts) for lang, concepts in self.usable.items()}
        shown = {emoji.cells[p][0] for p in self.cells}
        if not all(shown & concepts for concepts in self.is_usable.values()):
            raise ValueError(
                f"--data_share {share}: {len(self.cells)} pictures are too few, a language has no name for any of them"
            )
        self._remember()

    def _remember(self) -> None:
        self.order = lru_cache(maxsize=4)(self._order)
        self.available = lru_cache(maxsize=None)(self.has)

    def __getstate__(self):  # to a loader worker that is not a fork: what is remembered stays behind
        return {key: value for key, value in self.__dict__.items() if key not in ("order", "available")}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._remember()

    def has(self, task: str, lang: str) -> bool:
        """Does CLDR have the phrases that a task needs in a language?"""
        if task in ("choice", "question") and len({self.emoji.names[lang][c] for c in self.usable[lang]}) < 3:
            return False
        if task == "keywords":
            return any(
                self.emoji.cells[p][0] in self.is_usable[lang] & set(self.emoji.keywords.get(lang, ()))
                for p in self.cells
            )
        return all(phrase in self.emoji.phrases.get(lang, {}) for phrase in NEEDS.get(task, ()))

    def shares(self) -> dict[tuple[str, str], float]:
        """The exact probability of each (language, task) in the stream: the stated ones, but that a language without
        the phrases for a task gets captions instead, so that its own share stays what was asked for."""
        shares = {}
        for lang, p in zip(self.langs, self.lang_weights):
            for task, q in zip(self.tasks, self.task_weights):
                key = lang, task if self.has(task, lang) else "caption"
                shares[key] = shares.get(key, 0) + p * q
        return shares

    def __len__(self) -> int:
        """Examples in an epoch: one a picture."""
        return len(self.cells)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.cells))

    def example(self, index: int) -> Example:
        """Example number `index` (0, 1, 2 ... across epochs)."""
        epoch, i = divmod(index, len(self))
        key = f"{self.seed}/{epoch}/{i}"
        rng = random.Random(key)
        lang = rng.choices(self.langs, self.lang_weights)[0]
        task = rng.choices(self.tasks, self.task_weights)[0]
        picture = self.cells[self.order(epoch)[i]]
        task = task if task == "caption" or self.available(task, lang) else "caption"
        while True:
            # Language and task are drawn first and kept, so their shares are exact; a picture whose name is held
            # out in the language, or that has no text for the task in it, gives way.
            while (concept := self.emoji.cells[picture][0]) not in self.is_usable[lang]:
                picture = rng.choice(self.cells)
            pair = TASKS[task](self.emoji, concept, lang, rng, self.usable[lang])
            if pair is not None:
                return Example(picture, lang, task, *pair, key)
            picture = rng.choice(self.cells)


class Batches(torch.utils.data.Dataset):
    """Micro-batches of a mixture by number, with prompts and targets of about the same length in each.

    Prompts of the tasks differ in length, and so do names: batches drawn as they come are mostly padding. So `pool`
    batches' worth of examples are sorted by the prompt's length in steps of 16 tokens, then by the target's, cut
    into batches, and the batches shuffled, again as a function of (seed, pool number).

    batch m -> dict of tensors: picture long (B,), view long (B,), prompt long (B, S), labels long (B, T) with -100 as
    padding, and image float32 (B, 1, 3, size, size) unless `views`: then the pictures' features are cached elsewhere in
    `views` different views, and view says which. A view is a random crop, crop the smallest share of the area in it;
    or, if redraw is above 0, the picture redrawn with that strength (`image.redraw`).
    Process `rank` of `world` has batch m * world + rank of the common stream as its m-th.
    """

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, image: ImageConfig, batch: int, views: int = 0,
                 pool: int = 32, crop: float = 0.5, rank: int = 0, world: int = 1, redraw: float = 0.0):  # fmt: skip
        assert 0 <= rank < world, f"process {rank} of {world}"
        if world > len(mixture):
            raise ValueError(f"{world} processes for {len(mixture)} pictures: start fewer")
        self.mixture, self.tokenizer, self.image = mixture, tokenizer, image
        self.batch, self.views, self.pool, self.crop, self.rank, self.world = batch, views, pool, crop, rank, world
        self.redraw = redraw
        self._remember()

    def _remember(self) -> None:
        self.pool_of = lru_cache(maxsize=2)(self._pool)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "pool_of"}

    def __setstate__(self, state):
        self.__dict__ |= state
        self._remember()

    def _pool(self, number: int) -> list[list[tuple]]:
        first = number * self.pool * self.batch
        rows = []
        for index in range(first, first + self.pool * self.batch):
            example = self.mixture.example(index)
            rows.append((example, self.tokenizer.encode(example.prompt), self.tokenizer.encode(example.target)))
        rows.sort(key=lambda row: (len(row[1]) // 16, len(row[2]), len(row[1])))  # stable: ties stay in drawn order
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        random.Random(f"{self.mixture.seed}/pool/{number}").shuffle(batches)
        return batches

    def __getitem__(self, m: int) -> dict[str, torch.Tensor]:
        number, i = divmod(m * self.world + self.rank, self.pool)
        rows = self.pool_of(number)[i]
        out = dict(
            picture=torch.tensor([example.picture for example, _, _ in rows]),
            prompt=pad_rows([prompt for _, prompt, _ in rows], self.tokenizer.pad),
            labels=pad_rows([target for _, _, target in rows], -100),
        )
        rngs = [random.Random(f"{example.key}/view") for example, _, _ in rows]
        if self.views:
            out["view"] = torch.tensor([rng.randrange(self.views) for rng in rngs])
        else:
            out["image"] = torch.stack([self.augmented(e.picture, rng, e.task) for (e, _, _), rng in zip(rows, rngs)])[
                :, None
            ]
        return out

    def augmented(self, picture: int, rng: random.Random, task: str = "caption") -> torch.Tensor:
        """A random view of an embedded picture, mirrored half of the time for captions: float32 (3, size, size)."""
        pixels, flip = self.mixture.emoji.pictures[picture], task == "caption"
        if not self.redraw:
            return augment_image(Image.fromarray(pixels), self.image, rng, flip=flip, area=self.crop)
        generator = torch.Generator().manual_seed(rng.getrandbits(60))
        drawn = redraw(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255, generator, self.redraw, flip)[
            0
        ]  # (3, H, W)
        return image_to_tensor(Image.fromarray((255 * drawn).round().byte().permute(1, 2, 0).numpy()), self.image)
