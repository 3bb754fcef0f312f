"""Caption pictures: `python sample.py --image data/cat.png --lang sw`.

    python sample.py --model mblip-mt0-xl --image photo.jpg --question "What is the man holding?" --lang th

fetches the official weights into weights/ once (hub.py) and asks them. The text goes to stdout, one line a picture; which weights were used, and anything that went wrong, to stderr. With
several pictures a bad one is reported at the end and the rest still answered (exit status 1 then).
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanomblip.data.decode import ImageError, list_images, load_image
from nanomblip.data.emoji import load_emoji
from nanomblip.data.image import image_to_tensor
from nanomblip.data.languages import LANGUAGES, parse_lang
from nanomblip.data.processor import load_image_config, save_processor
from nanomblip.data.prompts import EVAL_PROMPT
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.measure.fidelity import language_pieces
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.training.state import pick_device
from nanomblip.weights.adapter import load_adapter
from nanomblip.weights.files import read_json, write_atomic
from nanomblip.weights.hub import MODELS, download
from nanomblip.weights.load import DTYPES, load_mblip
from nanomblip.weights.save import save_mblip, save_merged, stored_parameters

HERE = Path(__file__).resolve().parent
MAX_PROMPT = 256  # pieces, the paper's limit in evaluation
QUESTION = "Question: {q} Short answer in {L}:"  # the paper's in evaluation (MaXM; xGQA always asks for English)
LARGE = 500_000_000  # parameters, from which on `--vision_dtype auto` and `--llm_dtype auto` save memory


@dataclass(frozen=True)
class Config:
    image: list = flag((), "pictures, or folders of pictures", many=True)
    lang: str = flag("en", "language of the answer: a code, an English name or an alias")
    force_lang: bool = flag(
        False, "write only pieces that the language can use: its words for nano, its script for other tokenizers"
    )
    prompt: str = flag("", f"what to ask, {{L}} = the language's English name; default: {EVAL_PROMPT!r}")
    question: str = flag("", f"a question about the picture, asked as in the paper: {QUESTION!r}")
    together: bool = flag(
        False, "all pictures are one question's: the model sees them one after the other and answers once"
    )
    model: str = flag("", "a run folder, a folder in the official layout, nano, or the name of an official checkpoint, which is fetched into "
                          "weights/; default: the newest run in out/, else weights/nano if it is there")  # fmt: skip
    adapter: str = flag("", "folder with LoRA of the language model, as peft or train.py wrote it")
    vision_dtype: str = flag("auto", "type of the ViT's weights; auto = as stored, and int8 for a model of more than 500 million parameters",
                             ("auto", *DTYPES))  # fmt: skip
    llm_dtype: str = flag("auto", "type of the language model's weights; auto = likewise", ("auto", *DTYPES))
    save: str = flag(
        "", "also write the model as it is held (int8 stays int8, and loads at once the next time) to this folder"
    )
    merge: str = flag("", "also write the whole model in floats with LoRA merged, for transformers, to this folder")
    preset: str = flag("auto", "decoding settings, of which the flags below override single ones; auto = the paper's five beams, vqa with "
                             "--question and caption without; greedy with --stream or --sample",
                       ("auto", *DECODING))  # fmt: skip
    num_beams: int = flag(0, "beams; 0 = as in the preset")
    max_new_tokens: int = flag(0, "longest answer in pieces; 0 = as in the preset")
    num_return: int = flag(1, "how many answers a picture, best first; needs as many beams")
    stream: bool = flag(False, "print the answer piece by piece as it is written; for one picture, without beams")
    sample: bool = flag(False, "draw from the distribution instead of taking the most probable")
    temperature: float = flag(1.0, "with --sample: above 1 is wilder")
    top_p: float = flag(1.0, "with --sample: keep the fewest pieces that hold this much probability")
    length_penalty: float = flag(float("nan"), "with beams: above 0 favours long answers; nan = as in the preset")
    repetition_penalty: float = flag(float("nan"), "above 1 avoids repeating; nan = as in the preset")
    seed: int = flag(0, "of --sample")
    batch: int = flag(16, "pictures at a time")
    out: str = flag("", "write the answers as JSON lines to this file instead of stdout")
    device: str = flag("auto", "auto, cpu or cuda")


def find_model(name: str) -> Path:
    """The folder that --model means; FileNotFoundError says what to run when there is none."""
    shipped, runs = HERE / "weights" / "nano" / "aligned", Path("out")
    if name and Path(name).is_dir():
        return Path(name)
    if name == "":
        done = [path.parent for path in runs.glob("*/model.safetensors") if (path.parent / "config.json").exists()]
        if done:
            return max(done, key=lambda run: (run / "model.safetensors").stat().st_mtime)
    if name in ("", "nano") and (shipped / "config.json").exists():
        return shipped
    if name in MODELS and name.startswith("mblip"):
        return download(name, HERE / "weights" / name)
    if name in PRESETS and name != "nano":
        raise FileNotFoundError(
            f"--model {name}: no such weights were published; train them with train.py --llm {name.removeprefix('mblip-')}"
        )
    if name in ("", "nano"):
        raise FileNotFoundError(
            "no trained weights here yet; make some with: python train.py --lang_mix all (about ten minutes)"
        )
    raise FileNotFoundError(f"--model {name}: no such folder, and neither nano nor mblip-mt0-xl")


def spoken(folder: Path) -> list[str] | None:
    """The languages that a model says it was trained to answer in; None (the official ones do not say) means all 96."""
    config = read_json(folder / "config.json")
    languages = config.get("languages") if isinstance(config, dict) else None
    if languages is not None and not (
        isinstance(languages, list) and languages and all(code in LANGUAGES for code in languages)
    ):
        raise ValueError(f"{folder / 'config.json'}: languages is not a list of language codes")
    return languages


def decoding_of(cfg: Config) -> Decoding:
    """The preset with the flags that were given put over it."""
    changes = {name: getattr(cfg, name) for name in ("num_beams", "max_new_tokens") if getattr(cfg, name)}
    changes |= {
        n: getattr(cfg, n) for n in ("length_penalty", "repetition_penalty") if getattr(cfg, n) == getattr(cfg, n)
    }
    changes |= dict(num_return=cfg.num_return, seed=cfg.seed)
    if cfg.sample:
        changes |= dict(do_sample=True, temperature=cfg.temperature, top_p=cfg.top_p, num_beams=1)
    elif (cfg.temperature, cfg.top_p) != (1.0, 1.0):
        raise ValueError("--temperature and --top_p change nothing without --sample")
    preset = cfg.preset
    if preset == "auto":
        preset = "greedy" if cfg.sample or (cfg.stream and not cfg.question) else "vqa" if cfg.question else "caption"
    if cfg.stream:
        changes["num_beams"] = 1
        if cfg.num_beams > 1 or cfg.preset in DECODING and DECODING[cfg.preset].num_beams > 1:
            raise ValueError(
                "--stream goes without beams: they go back on what they wrote; leave out --num_beams and --preset"
            )
    if cfg.force_lang:  # else silence is the easiest way to obey
        changes |= dict(min_new_tokens=max(1, DECODING[preset].min_new_tokens))
    return replace(DECODING[preset], **changes)


def types(cfg: Config, folder: Path) -> dict[str, str | None]:
    """The arguments of `load_mblip` for --vision_dtype and --llm_dtype; None = as the file has it, or fp32."""
    config = read_json(folder / "config.json")
    auto = None
    if isinstance(config, dict) and "quantization_config" not in config:
        auto = "int8" if stored_parameters(folder) > LARGE else None
    return {
        name: auto if getattr(cfg, name) == "auto" else getattr(cfg, name) for name in ("vision_dtype", "llm_dtype")
    }


class Stream:
    """Prints what is new of a text each time it has grown."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.shown = tokenizer, ""

    def __call__(self, ids: list[int]):
        text = " ".join(
            self.tokenizer.decode(ids).rstrip("\ufffd").split()
        )  # a letter of several bytes may not be complete yet
        if text.startswith(self.shown):
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text


def write_folder(model: MBLIP, target: Path, folder: Path, pieces: int, merged: bool) -> None:
    """Write the model of `folder` to `target`, with everything else that a folder in the official layout has."""
    load_image_config(folder)  # before the long part
    if merged:
        save_merged(model, target, image_token=pieces, source=folder, languages=spoken(folder))
    else:
        save_mblip(model, target, image_token=pieces, languages=spoken(folder), dtype=None)
    save_processor(target, folder, model.cfg.queries)
    print(f"sample.py: wrote {target}", file=sys.stderr)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Caption pictures in one of many languages.")
    if not cfg.image:
        raise ValueError("--image is missing; name at least one picture or folder")
    files, left_out = list_images(list(cfg.image))
    if left_out:
        print(f"sample.py: {left_out}", file=sys.stderr)
    folder, decoding = find_model(cfg.model), decoding_of(cfg)
    lang = parse_lang(cfg.lang, spoken(folder))
    device = pick_device(cfg.device)
    if cfg.batch < 1:
        raise ValueError(f"--batch {cfg.batch}: at least 1")
    if cfg.sample and cfg.num_beams > 1:
        raise ValueError("--num_beams goes without --sample: a sample is one text, drawn piece by piece")
    out = Path(cfg.out).resolve() if cfg.out else None  # behind a symbolic link, its target
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"--out {cfg.out}: " + ("is a folder" if out.is_dir() else "its folder does not exist"))
    if cfg.question and cfg.prompt:
        raise ValueError("--question and --prompt: give one of them")
    question = QUESTION.replace("{q}", cfg.question) if cfg.question.strip() else cfg.prompt or EVAL_PROMPT
    question = question.replace("{L}", LANGUAGES[lang].name)
    if not question.strip() or (cfg.question and not cfg.question.strip()):
        raise ValueError("--prompt or --question is empty; leave it out for a caption")
    groups = [files] if cfg.together else [[file] for file in files]
    if cfg.stream and (len(groups) > 1 or out is not None):
        raise ValueError("--stream goes with one picture, or with --together, and without --out")
    if cfg.adapter and cfg.save:
        raise ValueError("--save writes no LoRA; give --merge, or leave --adapter out")
    for name in ("save", "merge"):
        if (target := getattr(cfg, name)) and Path(target).exists() and any(Path(target).iterdir()):
            raise ValueError(f"--{name} {target}: is not an empty folder")

    tokenizer = Tokenizer(folder / "spiece.model")
    size = load_image_config(folder)
    model = load_mblip(folder, **types(cfg, folder))
    if cfg.adapter:
        load_adapter(model.mt5, cfg.adapter)
        model.eval()
    for name in ("save", "merge"):
        if target := getattr(cfg, name):
            write_folder(model, Path(target), folder, len(tokenizer), merged=name == "merge")
    model.to(device)
    if len(tokenizer) > model.cfg.mt5.vocab:
        raise ValueError(
            f"{folder}: a tokenizer of {len(tokenizer)} pieces does not go with an embedding of {model.cfg.mt5.vocab} rows"
        )
    if size.size != model.cfg.vit.image_size:
        raise ValueError(
            f"{folder}: its picture settings are for pictures of {size.size}, the ViT wants {model.cfg.vit.image_size}"
        )
    print(f"sample.py: weights {folder}, {LANGUAGES[lang].name}", file=sys.stderr)
    allowed = language_pieces(tokenizer, lang, load_emoji("all")).to(device) if cfg.force_lang else None  # (V,)
    ids = tokenizer.encode(question, MAX_PROMPT)
    if len(ids) < len(tokenizer.encode(question, MAX_PROMPT + 1)):
        print(f"sample.py: the prompt is longer than {MAX_PROMPT} pieces; its end is left out", file=sys.stderr)

    lines, bad = [], []
    for start in range(0, len(groups), cfg.batch):
        good, images = [], []
        for group in groups[start : start + cfg.batch]:
            try:
                images.append(torch.stack([image_to_tensor(load_image(file), size) for file in group]))
                good.append(group)
            except ImageError as error:
                bad.append(error)
        if not good:
            continue
        prompt = torch.tensor([ids] * len(good), device=device)
        stream = Stream(tokenizer) if cfg.stream else None
        found = generate(model, torch.stack(images).to(device), prompt, decoding=decoding, vocab=len(tokenizer), allowed=allowed,
                         on_token=stream)  # fmt: skip
        for group, hypotheses in zip(good, found):
            texts = [" ".join(tokenizer.decode(h.ids).split()) for h in hypotheses]
            names = [str(file) for file in group]
            lines.append(json.dumps(dict(image=names if cfg.together else names[0], lang=lang, prompt=question, text=texts[0], texts=texts),
                                    ensure_ascii=False))  # fmt: skip
            if stream is not None:
                print(
                    texts[0][len(stream.shown) :] if texts[0].startswith(stream.shown) else f"\n{texts[0]}", flush=True
                )
            elif not cfg.out:
                for text in texts:
                    print(
                        text if len(groups) == 1 else f"{json.dumps(names[0], ensure_ascii=False)[1:-1]}\t{text}",
                        flush=True,
                    )
    if out is not None:
        # A file name that is not UTF-8 holds lone surrogates; "\udcff" is what JSON itself writes for them.
        data = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        if out.exists() and not out.is_file():  # a pipe or a device: nothing to replace
            out.write_bytes(data)
        else:
            write_atomic(out, lambda path: path.write_bytes(data))
    for error in bad:
        print(f"sample.py: error: {error}", file=sys.stderr)
    if len(groups) > 1 and bad:
        print(f"sample.py: {len(bad)} of {len(groups)} pictures could not be read", file=sys.stderr)
    return 0 if not bad else 2 if len(bad) == len(groups) else 1


if __name__ == "__main__":
    run_main(main)
