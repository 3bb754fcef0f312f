"""Caption pictures: `python sample.py --image data/cat.png --lang sw`.

The text goes to stdout, one line a picture; which weights were used, and anything that went wrong, to stderr. With
several pictures a bad one is reported at the end and the rest still answered (exit status 1 then).
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nanomblip.emoji import load_emoji
from nanomblip.fidelity import language_pieces
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.generate import DECODING, Decoding, generate
from nanomblip.image import ImageConfig, ImageError, image_to_tensor, list_images, load_image
from nanomblip.languages import LANGUAGES, parse_lang
from nanomblip.mblip import PRESETS
from nanomblip.prompts import EVAL_PROMPT
from nanomblip.runs import pick_device
from nanomblip.tokenizer import Tokenizer
from nanomblip.weights import load_mblip, read_json, write_atomic

HERE = Path(__file__).resolve().parent
MAX_PROMPT = 256  # pieces, the paper's limit in evaluation


@dataclass(frozen=True)
class Config:
    image: list = flag((), "pictures, or folders of pictures", many=True)
    lang: str = flag("en", "language of the answer: a code, an English name or an alias")
    force_lang: bool = flag(False, "write only pieces that the language can use: its words for nano, its script for other tokenizers")
    prompt: str = flag("", f"what to ask, {{L}} = the language's English name; default: {EVAL_PROMPT!r}")
    model: str = flag("", "a run folder, a folder in the official layout, nano, or the name of an official checkpoint; "
                          "default: weights/nano if it is there, else the newest run in out/")  # fmt: skip
    preset: str = flag("greedy", "decoding settings, of which the flags below override single ones", tuple(DECODING))
    num_beams: int = flag(0, "beams; 0 = as in the preset")
    max_new_tokens: int = flag(0, "longest answer in pieces; 0 = as in the preset")
    num_return: int = flag(1, "how many answers a picture, best first; needs as many beams")
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
    if name in PRESETS and (HERE / "weights" / name / "config.json").exists():
        return HERE / "weights" / name
    if name in PRESETS and name != "nano":
        raise FileNotFoundError(f"--model {name}: put its config.json, safetensors, spiece.model and preprocessor_config.json "
                                f"(Gregor/{name} on the Hugging Face hub) into weights/{name}")  # fmt: skip
    if name in ("", "nano"):
        raise FileNotFoundError("no trained weights here yet; make some with: python train.py --lang_mix all (about ten minutes)")
    raise FileNotFoundError(f"--model {name}: no such folder, and none of {', '.join(PRESETS)}")


def spoken(folder: Path) -> list[str] | None:
    """The languages that a model says it was trained to answer in; None (the official ones do not say) means all 96."""
    config = read_json(folder / "config.json")
    languages = config.get("languages") if isinstance(config, dict) else None
    if languages is not None and not (isinstance(languages, list) and languages and all(code in LANGUAGES for code in languages)):
        raise ValueError(f"{folder / 'config.json'}: languages is not a list of language codes")
    return languages


def decoding_of(cfg: Config) -> Decoding:
    """The preset with the flags that were given put over it."""
    changes = {name: getattr(cfg, name) for name in ("num_beams", "max_new_tokens") if getattr(cfg, name)}
    changes |= {n: getattr(cfg, n) for n in ("length_penalty", "repetition_penalty") if getattr(cfg, n) == getattr(cfg, n)}
    changes |= dict(num_return=cfg.num_return, seed=cfg.seed)
    if cfg.sample:
        changes |= dict(do_sample=True, temperature=cfg.temperature, top_p=cfg.top_p, num_beams=1)
    elif (cfg.temperature, cfg.top_p) != (1.0, 1.0):
        raise ValueError("--temperature and --top_p change nothing without --sample")
    if cfg.force_lang:  # else silence is the easiest way to obey
        changes |= dict(min_new_tokens=max(1, DECODING[cfg.preset].min_new_tokens))
    return replace(DECODING[cfg.preset], **changes)


def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Caption pictures in one of many languages.")
    if not cfg.image:
        raise ValueError("--image is missing; name at least one picture or folder")
    files = list_images(list(cfg.image))
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
    question = (cfg.prompt or EVAL_PROMPT).replace("{L}", LANGUAGES[lang].name)
    if not question.strip():
        raise ValueError("--prompt is empty; leave it out for a caption")

    tokenizer = Tokenizer(folder / "spiece.model")
    size = ImageConfig.from_hf(read_json(folder / "preprocessor_config.json"))
    model = load_mblip(folder).to(device)
    if size.size != model.cfg.vit.image_size:
        raise ValueError(f"{folder}: preprocessor_config.json makes pictures of {size.size}, the ViT wants {model.cfg.vit.image_size}")
    print(f"sample.py: weights {folder}, {LANGUAGES[lang].name}", file=sys.stderr)
    allowed = language_pieces(tokenizer, lang, load_emoji("all")).to(device) if cfg.force_lang else None  # (V,)
    ids = tokenizer.encode(question, MAX_PROMPT)
    if len(ids) < len(tokenizer.encode(question, MAX_PROMPT + 1)):
        print(f"sample.py: the prompt is longer than {MAX_PROMPT} pieces; its end is left out", file=sys.stderr)

    lines, bad = [], []
    for start in range(0, len(files), cfg.batch):
        good, images = [], []
        for file in files[start : start + cfg.batch]:
            try:
                images.append(image_to_tensor(load_image(file), size))
                good.append(file)
            except ImageError as error:
                bad.append(error)
        if not good:
            continue
        prompt = torch.tensor([ids] * len(good), device=device)
        found = generate(model, torch.stack(images)[:, None].to(device), prompt, decoding=decoding, vocab=len(tokenizer),
                         allowed=allowed)  # fmt: skip
        for file, hypotheses in zip(good, found):
            texts = [" ".join(tokenizer.decode(h.ids).split()) for h in hypotheses]
            lines.append(json.dumps(dict(image=str(file), lang=lang, prompt=question, text=texts[0], texts=texts), ensure_ascii=False))
            if not cfg.out:
                for text in texts:
                    print(text if len(files) == 1 else f"{json.dumps(str(file), ensure_ascii=False)[1:-1]}\t{text}", flush=True)
    if out is not None:
        # A file name that is not UTF-8 holds lone surrogates; "\udcff" is what JSON itself writes for them.
        data = "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace")
        if out.exists() and not out.is_file():  # a pipe or a device: nothing to replace
            out.write_bytes(data)
        else:
            write_atomic(out, lambda path: path.write_bytes(data))
    for error in bad:
        print(f"sample.py: error: {error}", file=sys.stderr)
    if len(files) > 1 and bad:
        print(f"sample.py: {len(bad)} of {len(files)} pictures could not be read", file=sys.stderr)
    return 0 if not bad else 2 if len(bad) == len(files) else 1


if __name__ == "__main__":
    run_main(main)
