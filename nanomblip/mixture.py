"""Training examples: a picture, an English instruction that names a language, and a text in that language.

mBLIP trains on a mixture of tasks whose prompts stay English while the targets are translated (arXiv 2307.06930, section
3.2). The prompt templates below are the model's interface, so they are the paper's, letter by letter; the targets are the
human-made names and keywords of the embedded data (emoji.py).

Every choice (order, language, task, template, crop) is a pure function of (seed, epoch, index): example 12,345 is the
same whoever asks for it, so the number of loader workers, a resumed run or another batch size cannot change the data.
"""

import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from nanomblip.emoji import Emoji, pair_split
from nanomblip.image import ImageConfig, augment_image
from nanomblip.languages import LANGUAGES
from nanomblip.tokenizer import Tokenizer, pad_rows

CAPTION = (
    "Caption the image in {L}.",
    "Short {L} image caption: ",
    "Image caption (in {L}): ",
    "Briefly describe the image in {L}.",
    "Write a short {L} image description.",
    "Summarize the image in {L}.",
)
NAMING = (
    "What is the main focus of the image? Short {L} answer:",
    "What is in the image? Answer briefly in {L}.",
    "This is an image of what? Answer briefly in {L}.",
    "What is the central object in the image? Give a short {L} answer.",
    "The focus of the image is of what? Short {L} answer:",
    "Question: This is an image of what? Answer briefly in {L}.",
    "What is at the center of this picture? Short {L} answer:",
    "Give a short answer in {L} to the following question. What is the main thing shown in the image?",
    "Complete the sentence in {L}. This is a photo of a",
    "Name the main thing of this photo in {L}:",
    "In less than 3 words in {L}, what can be seen in this image?",
)
MATCH = (  # prompt, target if the caption fits, target if not; the answers stay English, as in mBLIP
    ('Does "{c}" accurately describe the image?', "Yes, it does.", "No, it does not."),
    ('Does the caption "{c}" fit the picture?', "Yes, it does.", "No, it does not."),
    ('Does  "{c}" correctly summarize the image?', "Yes, it does.", "No, it does not."),
    ("Decide if the following caption accurately describes the image: {c}. Answer:", "Yes, it does.", "No, it does not."),
    ('Is "{c}" a good image description?', "Yes, it is.", "No, it is not."),
    ('Is "{c}" a correct caption for the picture?', "Yes, it is.", "No, it is not."),
    ('Is the caption "{c}" a good match for the image?', "Yes, it is.", "No, it is not."),
    ("Is this caption a good match for the picture? {c}. Answer: ", "Yes, it is.", "No, it is not."),
    ("Decide if this captions is a correct summary of the image: {c}.", "Yes, it is.", "No, it is not."),
    ('Would "{c}" be a good image summary?', "Yes, it would.", "No, it would not."),
    ('Would the caption "{c}" fit the picture?', "Yes, it would.", "No, it would not."),
    ('Could you use "{c}" as a caption for the image?', "Yes, you could.", "No, you could not."),
)
KEYWORDS = ("List keywords for the image in {L}.",)  # ours: the paper has no such task
CHOICE = ("{q} Short {L} answer:", "Question: {q} Brief answer (in {L}):", "Briefly answer in {L}. {q}")  # VQA templates

EVAL_PROMPT = CAPTION[0]  # what evaluation and sample.py ask by default


@dataclass(frozen=True)
class Example:
    """One line of the mixture: `picture` indexes `emoji.pictures`, `key` seeds whatever is still to be drawn for it."""

    picture: int
    lang: str
    task: str
    prompt: str
    target: str
    key: str


def caption(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """"Caption the image in Swahili." -> the name."""
    return rng.choice(CAPTION).format(L=LANGUAGES[lang].name), emoji.names[lang][concept]


def naming(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """"What is in the image? Answer briefly in Swahili." -> the name."""
    return rng.choice(NAMING).format(L=LANGUAGES[lang].name), emoji.names[lang][concept]


def match(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """Does this caption fit? Half of the time it is another concept's name in the same language."""
    prompt, yes, no = rng.choice(MATCH)
    fits, other = rng.random() < 0.5, rng.choice(pool)
    name = emoji.names[lang][concept if fits else other]
    return prompt.format(c=name), yes if name == emoji.names[lang][concept] else no


def choice(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """"A, B or C?" in the language, by CLDR's own list pattern -> the name among the three; None where CLDR has none."""
    pattern = emoji.phrases.get(lang, {}).get("or3")
    names = emoji.names[lang]
    options = [names[concept]] + [names[rng.choice(pool)] for _ in range(2)]
    if pattern is None or len(set(options)) < 3:
        return None
    question = pattern.format(*rng.sample(options, 3)) + "?"
    return rng.choice(CHOICE).format(q=question, L=LANGUAGES[lang].name), names[concept]


def keywords(emoji: Emoji, concept: str, lang: str, rng: random.Random, pool: list[str]):
    """"List keywords for the image in Swahili." -> up to four of CLDR's keywords; None where it has none."""
    words = emoji.keywords[lang].get(concept)
    return (rng.choice(KEYWORDS).format(L=LANGUAGES[lang].name), ", ".join(words[:4])) if words else None


# name on the command line -> function(emoji, concept, lang, rng, concepts with a usable name) -> (prompt, target) or None
TASKS = {"caption": caption, "naming": naming, "match": match, "choice": choice, "keywords": keywords}


def parse_tasks(spec: str) -> dict[str, float]:
    """Task probabilities from `--tasks`: "caption", "caption,match" (equal shares) or "caption:3,match:1"."""
    weights = {}
    for item in spec.split(","):
        name, _, number = item.strip().partition(":")
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
    One epoch shows every picture once, each with one task in one language.
    """

    def __init__(self, emoji: Emoji, langs: dict[str, float], tasks: dict[str, float], seed: int, split: str = "train"):
        self.emoji, self.seed = emoji, seed
        self.langs, self.lang_weights = list(langs), list(langs.values())
        self.tasks, self.task_weights = list(tasks), list(tasks.values())
        self.cells = emoji.cells_in(split)
        # The concepts that may be asked for in each language.
        self.usable = {lang: [c for c in emoji.names[lang] if pair_split(lang, c) == "train"] for lang in langs}
        self.is_usable = {lang: set(concepts) for lang, concepts in self.usable.items()}
        self.order = lru_cache(maxsize=4)(self._order)

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
        # The language is drawn first and kept, so its share is exact; a picture whose name is held out in it gives way.
        while self.emoji.cells[picture][0] not in self.is_usable[lang]:
            picture = rng.choice(self.cells)
        args = self.emoji, self.emoji.cells[picture][0], lang, rng, self.usable[lang]
        pair = TASKS[task](*args)
        if pair is None:  # CLDR has no text for this task here
            task, pair = "caption", caption(*args)
        return Example(picture, lang, task, *pair, key)


class Batches(torch.utils.data.Dataset):
    """Micro-batches of a mixture by number, with targets of about the same length in each.

    Names differ in length: drawn as they come, a batch of 64 has 2.8 places for each real piece; sorted, 1.1. So `pool`
    batches' worth of examples are sorted by target length, cut into batches, and the batches shuffled, again as a
    function of (seed, pool number).

    batch m -> dict of tensors: picture long (B,), view long (B,), prompt long (B, S), labels long (B, T) with -100 as
    padding, and image float32 (B, 1, 3, size, size) unless `views`: then the pictures' features are cached elsewhere in
    `views` different crops, and view says which. crop: the smallest share of a picture's area in a random crop.
    """

    def __init__(self, mixture: Mixture, tokenizer: Tokenizer, image: ImageConfig, batch: int, views: int = 0, pool: int = 32,
                 crop: float = 0.5):  # fmt: skip
        self.mixture, self.tokenizer, self.image = mixture, tokenizer, image
        self.batch, self.views, self.pool, self.crop = batch, views, pool, crop
        self.pool_of = lru_cache(maxsize=2)(self._pool)

    def _pool(self, number: int) -> list[list[tuple]]:
        first = number * self.pool * self.batch
        rows = []
        for index in range(first, first + self.pool * self.batch):
            example = self.mixture.example(index)
            rows.append((example, self.tokenizer.encode(example.prompt), self.tokenizer.encode(example.target)))
        rows.sort(key=lambda row: (len(row[2]), len(row[1])))  # stable: ties stay in drawn order
        batches = [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]
        random.Random(f"{self.mixture.seed}/pool/{number}").shuffle(batches)
        return batches

    def __getitem__(self, m: int) -> dict[str, torch.Tensor]:
        number, i = divmod(m, self.pool)
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
            out["image"] = torch.stack([self.augmented(e.picture, rng, e.task) for (e, _, _), rng in zip(rows, rngs)])[:, None]
        return out

    def augmented(self, picture: int, rng: random.Random, task: str = "caption") -> torch.Tensor:
        """A random crop of an embedded picture, mirrored half of the time for captions: float32 (3, size, size)."""
        return augment_image(Image.fromarray(self.mixture.emoji.pictures[picture]), self.image, rng, flip=task == "caption", area=self.crop)
