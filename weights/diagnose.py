"""Where a re-aligned nano loses what it does not get right: `python weights/diagnose.py --model out/RUN`.

Two tables, which the model card (weights/README.md) shows. Of held-out pictures and of two artists that were never trained on, in English:

    vit        a linear probe on the ViT's vectors, side by side        what the frozen image encoder sees
    qformer    the same on the vectors of the Q-Former of --vision      what BLIP-2 had made of it
    nearest    the name nearest to the re-aligned vectors               what the language model is given (`warmup.name_scores`)
    written    the language model's caption, five beams                 what it makes of that

and the loss of the human names, over all languages, behind what takes a picture's place. The probe is a ridge regression from the
training pictures to the concepts (one-hot); its strength is chosen on the validation pictures. The record of the
shipped weights is weights/records/diagnosis.json.
"""

import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanomblip.data.emoji import Emoji, load_emoji, pair_split, unit_hash  # noqa: E402
from nanomblip.data.image import ImageConfig, image_to_tensor  # noqa: E402
from nanomblip.data.language_id import LanguageID  # noqa: E402
from nanomblip.data.languages import LANGUAGES  # noqa: E402
from nanomblip.data.processor import load_image_config  # noqa: E402
from nanomblip.data.prompts import EVAL_PROMPT  # noqa: E402
from nanomblip.data.tokenizer import Tokenizer, pad_rows  # noqa: E402
from nanomblip.flags import flag, parse_flags, run_main  # noqa: E402
from nanomblip.measure.emoji_splits import answer, questions, score  # noqa: E402
from nanomblip.model.generate import DECODING  # noqa: E402
from nanomblip.model.mblip import MBLIP  # noqa: E402
from nanomblip.training.warmup import name_places, name_scores  # noqa: E402
from nanomblip.weights.files import write_json  # noqa: E402
from nanomblip.weights.load import load_mblip  # noqa: E402

SPLITS = ("pictures", "openmoji", "streamline")  # as `evaluate.questions` has them
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the mean square of an input times the number of pictures


@dataclass(frozen=True)
class Config:
    model: str = flag("weights/nano/aligned", "a run folder, or another one in the official layout")
    vision: str = flag("weights/nano/blip2", "the BLIP-2 that it was re-aligned from")
    names: int = flag(20, "names a language in the table of losses")
    out: str = flag("", "the JSON record; default: diagnosis.json in the model's folder")

    def __post_init__(self):
        if self.names < 1:
            raise ValueError(f"--names {self.names}: at least 1")


def probe(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor], classes: int) -> dict[str, float]:
    """Ridge regression, x[split] float (P, F) to the one-hot of y[split] long (P,): split -> share right.

    Fitted on "train", its strength chosen on "validation" (Hastie et al., The Elements of Statistical Learning, equation 3.44).
    """
    mean = x["train"].mean(0)
    X, Y = (x["train"] - mean).double(), F.one_hot(y["train"], classes).double()
    right = lambda split, W: ((x[split] - mean).double() @ W + Y.mean(0)).argmax(1).eq(y[split]).double().mean().item()
    gram, eye, unit = X.T @ X, torch.eye(X.shape[1]).double(), X.square().mean() * len(X)
    found = [torch.linalg.solve(gram + ridge * unit * eye, X.T @ (Y - Y.mean(0))) for ridge in RIDGES]
    best = max(found, key=lambda W: right("validation", W))
    return {split: right(split, best) for split in x if split != "train"}


@torch.no_grad()
def in_english(model: MBLIP, seeing: MBLIP, tokenizer: Tokenizer, image: ImageConfig, emoji: Emoji) -> dict[str, dict[str, float]]:
    """row of the first table -> split -> share right (and the cosine between a picture's vectors and its name)."""
    cells = {split: [p for p, _ in questions(emoji, split, ("en",), 0)] for split in ("validation", *SPLITS)}
    cells["train"] = emoji.cells_in("train")
    index = {concept: i for i, concept in enumerate(emoji.concepts)}
    y = {split: torch.tensor([index[emoji.cells[p][0]] for p in some]) for split, some in cells.items()}
    rows = {name: {} for name in ("vit", "vit mean", "qformer", "nearest", "cosine", "written")}
    vit, qformer, aligned = {}, {}, {}
    for split, some in cells.items():
        features = torch.cat([seeing.image_features(look(emoji, image, some[i : i + 256])) for i in range(0, len(some), 256)])  # (P, 1, N, Dv)
        vit[split] = features[:, 0]  # (P, N, Dv)
        qformer[split] = seeing.qformer(seeing.queries.expand(len(some), -1, -1), features[:, 0])  # (P, Q, Dq)
        aligned[split] = torch.cat([model.image_tokens(model.image_features(look(emoji, image, some[i : i + 256]))) for i in range(0, len(some), 256)])
    rows["vit"] = probe({split: x.flatten(1) for split, x in vit.items()}, y, len(index))
    rows["vit mean"] = probe({split: x.mean(1) for split, x in vit.items()}, y, len(index))
    rows["qformer"] = probe({split: x.flatten(1) for split, x in qformer.items()}, y, len(index))
    table = name_table(model, tokenizer, [emoji.names["en"][concept] for concept in emoji.concepts])  # (C, Q, D)
    language_id = LanguageID({"en": emoji.names["en"]})
    for split in ("validation", *SPLITS):
        rows["nearest"][split] = name_scores(aligned[split], table).argmax(1).eq(y[split]).float().mean().item()
        rows["cosine"][split] = F.cosine_similarity(aligned[split].flatten(1), table[y[split]].flatten(1)).mean().item()
        items = [(p, "en") for p in cells[split]]
        texts = answer(model, tokenizer, image, emoji, items, decoding=DECODING["caption"])
        rows["written"][split] = score(emoji, items, texts, language_id)["en"]["exact"]
    return rows


@torch.no_grad()
def losses(model: MBLIP, tokenizer: Tokenizer, image: ImageConfig, emoji: Emoji, names: int) -> dict[str, float]:
    """What takes the picture's place -> loss of the human names in nats per token, mean over languages; `names` of each, of the train split."""
    concepts, rng = list(emoji.concepts), random.Random(0)
    table = name_table(model, tokenizer, [emoji.names["en"][concept] for concept in concepts])
    index = {concept: i for i, concept in enumerate(concepts)}
    by_split = {split: {} for split in ("train", "test")}
    for split, some in by_split.items():
        for p in emoji.cells_in(split):
            some.setdefault(emoji.cells[p][0], []).append(p)
    sums = {name: [] for name in ("right name", "training picture", "held-out picture", "another picture", "another name")}
    for lang in emoji.langs:
        usable = [c for c in concepts if c in emoji.names[lang] and pair_split(lang, c) == "train" and c in by_split["test"]]
        chosen = sorted(usable, key=lambda c: unit_hash("diagnosis", lang, c))[:names]
        labels = pad_rows([tokenizer.encode(emoji.names[lang][c]) for c in chosen], -100)
        prompt = tokenizer.batch([EVAL_PROMPT.format(L=LANGUAGES[lang].name)] * len(chosen))
        own = torch.tensor([index[c] for c in chosen])
        others = torch.tensor([rng.choice([i for i in range(len(concepts)) if i != c]) for c in own.tolist()])
        shown = lambda split, some: model.image_tokens(model.image_features(look(emoji, image, [rng.choice(by_split[split][c]) for c in some])))
        given = {"right name": table[own], "training picture": shown("train", chosen), "held-out picture": shown("test", chosen),
                 "another picture": shown("train", [concepts[i] for i in others.tolist()]), "another name": table[others]}  # fmt: skip
        for name, visual in given.items():
            sums[name].append(model(None, prompt, labels, visual=visual)[1].item())
    return {name: sum(xs) / len(xs) for name, xs in sums.items()}


def look(emoji: Emoji, image: ImageConfig, cells: list[int]) -> torch.Tensor:
    """Embedded pictures as the model wants them: float32 (P, 1, 3, size, size)."""
    return torch.stack([image_to_tensor(Image.fromarray(emoji.pictures[p]), image) for p in cells])[:, None]


def name_table(model: MBLIP, tokenizer: Tokenizer, names: list[str]) -> torch.Tensor:
    """Each name's embedded pieces, stretched over the places of a picture's vectors: float32 (C, Q, D)."""
    return model.mt5.embed_tokens(name_places(tokenizer, names, model.cfg.queries)).detach().float()


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Measure vision, alignment and language model of a re-aligned nano apart.")
    model, seeing = load_mblip(Path(cfg.model)).eval(), load_mblip(Path(cfg.vision)).eval()
    image = load_image_config(Path(cfg.model))
    emoji, tokenizer = load_emoji("core"), Tokenizer(Path(cfg.model) / "spiece.model")
    if not model.cfg.vit.image_size == seeing.cfg.vit.image_size == image.size == emoji.pictures.shape[1]:
        raise ValueError(f"--model {cfg.model}, --vision {cfg.vision}: both are to be models for pictures of {emoji.pictures.shape[1]}, as nano is")
    rows = in_english(model, seeing, tokenizer, image, emoji)
    print("in English, percent".ljust(24) + "".join(split.rjust(12) for split in SPLITS))
    for name, row in rows.items():
        print(name.ljust(24) + "".join(f"{100 * row[split]:12.1f}" for split in SPLITS))
    of_names = losses(model, tokenizer, image, emoji, cfg.names)
    print("\nloss of the human names, nats per token\n" + "\n".join(f"{name.ljust(24)}{loss:12.3f}" for name, loss in of_names.items()))
    write_json(Path(cfg.out) if cfg.out else Path(cfg.model) / "diagnosis.json",
               dict(config={k: v for k, v in asdict(cfg).items() if k != "out"}, english=rows, losses=of_names, torch=torch.__version__))  # fmt: skip
    return 0


if __name__ == "__main__":
    run_main(main)
