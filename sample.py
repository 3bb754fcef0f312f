"""Caption pictures: `python sample.py --image data/wolf.png --lang sw`.

`--model mblip-mt0-xl --image photo.jpg --question "What is the man holding?" --lang th` asks the official weights, and
fetches them into weights/ first (hub.py). Answers go to stdout, or with --out as lines of JSON to a file, from which an
interrupted job goes on; all else goes to stderr. A bad picture does not stop the others.
"""

import nanomblip  # isort: skip, before torch: how its threads wait  # noqa: F401
import json
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nanomblip.data.answers import AnswerFile, Shard, Stream, fingerprint, merge
from nanomblip.data.decode import ImageError, is_damaged, list_images, load_image
from nanomblip.data.emoji import ROOT, load_emoji
from nanomblip.data.folder import find_model, load_folder, pick_device, save_folder, spoken
from nanomblip.data.image import image_to_tensor
from nanomblip.data.languages import LANGUAGES, parse_lang
from nanomblip.data.prompts import EVAL_PROMPT
from nanomblip.flags import flag, parse_flags, run_main
from nanomblip.measure.fidelity import language_tokens
from nanomblip.measure.lens import lens, show_lens
from nanomblip.model.generate import DECODING, Decoding, generate
from nanomblip.weights.adapter import load_adapter
from nanomblip.weights.load import DTYPES

MAX_PROMPT = 256  # tokens, the paper's limit in evaluation
QUESTION = "Question: {q} Short answer in {L}:"  # the paper's in evaluation (MaXM; xGQA always asks for English)


@dataclass(frozen=True)
class Config:
    image: list = flag((), "pictures, or folders of pictures", many=True, group="what to ask")
    lang: str = flag("en", "language of the answer: a code, an English name or an alias")
    prompt: str = flag("", f"what to ask, {{L}} = the language's English name; default: {EVAL_PROMPT!r}")
    question: str = flag("", f"a question about the picture, asked as in the paper: {QUESTION!r}")
    together: bool = flag(False, "give all pictures to one question, in order, and answer once")
    model: str = flag("", "nano, mblip-mt0-xl or a folder; default: the newest in out/, or nano", group="the model")
    adapter: str = flag("", "folder with LoRA of the language model, as PEFT or train.py wrote it")
    preset: str = flag("auto", "auto = caption, or greedy with --stream", ("auto", *DECODING), group="the recipe")
    num_beams: int = flag(0, "beams; 0 = as in the preset")
    max_new_tokens: int = flag(0, "longest answer in tokens; 0 = as in the preset")
    num_return: int = flag(1, "answers a picture, best first; needs as many beams")
    force_lang: bool = flag(False, "write only tokens of the language's names (nano) or of its scripts (other models)")
    sample: bool = flag(False, "draw from the distribution instead of taking the most probable")
    temperature: float = flag(1.0, "with --sample: divide the logits by this; above 1 is more random")
    top_p: float = flag(1.0, "with --sample: draw from the fewest tokens that hold this much probability")
    seed: int = flag(0, "with --sample: seed of the draws")
    device: str = flag("auto", "where to compute: auto, cpu or cuda", group="the machine")
    batch: int = flag(16, "pictures at a time")
    vision_dtype: str = flag("auto", "type of the ViT's weights; auto = as stored, int8 above 500 M", ("auto", *DTYPES))
    llm_dtype: str = flag("auto", "type of the language model's weights; auto = likewise", ("auto", *DTYPES))
    out: str = flag("", "write JSON lines to this file; answers that are there already are kept", group="output")
    shard: str = flag("", "i/n: every n-th picture from i on, into a file beside --out; merge/n: join the n files")
    stream: bool = flag(False, "print the answer token by token as it is written; one picture, no beams")
    lens: bool = flag(False, "show on stderr the nearest token to each vector that the language model sees")
    save: str = flag("", "write the loaded model in its present types to this folder; int8 then loads at once")
    merge: str = flag("", "write the model in floats with LoRA merged to this folder, for transformers")


def check_flags(cfg: Config, questions: int, shard: Shard) -> None:
    """ValueError for what can be seen to be wrong before anything is loaded."""
    full = [t for t in (cfg.save, cfg.merge) if t and Path(t).exists() and any(Path(t).iterdir())]
    beams = cfg.num_beams > 1 or cfg.preset in DECODING and DECODING[cfg.preset].num_beams > 1
    for is_wrong, problem in [
        (not cfg.image, "--image is missing; name at least one picture or folder"),
        (cfg.batch < 1, f"--batch {cfg.batch}: at least 1"),
        (not cfg.sample and (cfg.temperature, cfg.top_p) != (1, 1), "--temperature and --top_p need --sample"),
        (cfg.question and cfg.prompt, "--question and --prompt: give one of them"),
        ((cfg.question or cfg.prompt).isspace(), "--question or --prompt is empty; leave it out for a caption"),
        (cfg.stream and (questions > 1 or cfg.out), "--stream goes with one picture or --together, and without --out"),
        (cfg.sample and cfg.num_beams > 1, "--num_beams goes without --sample, which draws one text token by token"),
        (cfg.stream and beams, "--stream goes without beams, which go back on what they wrote; nor with their presets"),
        (cfg.adapter and cfg.save, "--save writes no LoRA; give --merge, or leave --adapter out"),
        (shard.merge and not cfg.out, "--shard merge joins what was written beside --out; give it, too"),
        (shard.count > 1 and (cfg.save or cfg.merge), "--save and --merge are for one process; leave out --shard"),
        (full, f"--save, --merge: {', '.join(full)} is not an empty folder"),
        (not cfg.out and sys.stdout is None, "stdout is closed; give --out FILE for the answers"),
    ]:
        if is_wrong:
            raise ValueError(problem)


def decoding_of(cfg: Config) -> Decoding:
    """The preset with the flags that were given put over it."""
    auto = "greedy" if cfg.sample or (cfg.stream and not cfg.question) else "vqa" if cfg.question else "caption"
    preset = DECODING[auto if cfg.preset == "auto" else cfg.preset]
    changes = {name: given for name in ("num_beams", "max_new_tokens") if (given := getattr(cfg, name))}
    least = max(preset.min_new_tokens, int(cfg.force_lang))  # else silence is the easiest way to obey
    changes |= dict(num_return=cfg.num_return, seed=cfg.seed, min_new_tokens=least)
    changes |= dict(do_sample=True, temperature=cfg.temperature, top_p=cfg.top_p) if cfg.sample else {}
    changes |= dict(num_beams=1) if cfg.sample or cfg.stream else {}
    return replace(preset, **changes)


def say(message: object) -> None:
    print(f"sample.py: {message}", file=sys.stderr)


def unanswered(questions: list, out: AnswerFile, job: dict) -> list:
    """The questions that --out holds no answer to. A picture that is named twice is answered twice."""
    known, todo = Counter(out.begin(job, lambda row: json.dumps(row["image"]))), []
    for name, files in questions:
        known[key := json.dumps(name)] -= 1
        if known[key] < 0:
            todo.append((name, files))
    if len(todo) < len(questions):
        say(f"{len(questions) - len(todo)} of {len(questions)} answers are in {out.path.name} already")
    return todo


def join(cfg: Config, shard: Shard, questions: list) -> int:
    """One file of the answers of all shards; pictures that cannot be read need no answer."""
    files = {json.dumps(name): files for name, files in questions}
    wanted, is_bad = [json.dumps(name) for name, _ in questions], lambda key: is_damaged(load_image, files[key])
    bad = merge(cfg.out, shard, wanted, lambda row: json.dumps(row["image"]), is_bad)
    say(f"{len(questions) - len(bad)} answers in {cfg.out}; {len(bad)} pictures could not be read")
    return 1 if bad else 0


@torch.no_grad()
def main(argv: list[str]) -> int:
    cfg = parse_flags(Config, argv, "Caption pictures in one of many languages.")
    files, left_out = list_images(list(cfg.image)) if cfg.image else ([], "")
    if left_out:
        say(left_out)
    questions = [([str(f) for f in files], files)] if cfg.together else [(str(f), [f]) for f in files]
    shard, count = Shard.parse(cfg.shard), len(questions)
    check_flags(cfg, count, shard)
    if shard.merge:
        return join(cfg, shard, questions)
    if not (questions := shard.of(questions)):
        say(f"--shard {shard.number}/{shard.count}: no picture is left for it")
        return 0
    lang, decoding, device = parse_lang(cfg.lang), decoding_of(cfg), pick_device(cfg.device)
    prompt = QUESTION.replace("{q}", cfg.question) if cfg.question else cfg.prompt or EVAL_PROMPT
    prompt = prompt.replace("{L}", LANGUAGES[lang].name)
    with AnswerFile(shard.path(cfg.out)) if cfg.out else nullcontext() as out:
        folder = find_model(cfg.model)
        parse_lang(lang, spoken(folder))
        tokenizer, pictures, model = load_folder(folder, cfg.vision_dtype, cfg.llm_dtype)
        if cfg.adapter:
            load_adapter(model.mt5, cfg.adapter)
        for target, merged in ((cfg.save, False), (cfg.merge, True)):
            if target:
                save_folder(Path(target), model, folder, merged)
                say(f"wrote {target}")
        model.eval().to(device)
        say(f"weights {folder}, {LANGUAGES[lang].name}")
        if tokenizer.path.read_bytes() == (ROOT / "spiece.model").read_bytes():
            say("nano's weights know drawings of 519 things; photographs: python sample.py --model mblip-mt0-xl ...")
        allowed = language_tokens(tokenizer, lang, load_emoji("all")).to(device) if cfg.force_lang else None  # (V,)
        ids = tokenizer.encode(prompt, MAX_PROMPT)
        if len(ids) < len(tokenizer.encode(prompt, MAX_PROMPT + 1)):
            say(f"the prompt is longer than {MAX_PROMPT} tokens; its end is left out")
        job = dict(lang=lang, prompt=prompt, decoding=asdict(decoding), force_lang=cfg.force_lang)
        todo, bad = questions, []
        if out:
            todo = unanswered(questions, out, job | dict(model=fingerprint(model, tokenizer, pictures)))
        for start in range(0, len(todo), cfg.batch):
            names, images = [], []
            for name, files in todo[start : start + cfg.batch]:
                try:
                    images.append(torch.stack([image_to_tensor(load_image(file), pictures) for file in files]))
                    names.append(name)
                except ImageError as error:
                    bad.append(error)
            if not names:
                continue
            features = model.image_features(torch.stack(images).to(device))  # (B, I, N, Dv)
            if cfg.lens:
                for name, pairs in zip(names, lens(model, model.image_tokens(features), tokenizer)):
                    say(f"{name}: the nearest token to each vector, and its cosine\n{show_lens(pairs)}")
            stream = Stream(tokenizer) if cfg.stream else None
            found = generate(model, None, torch.tensor([ids] * len(names), device=device), features=features,
                             decoding=decoding, vocab=len(tokenizer), allowed=allowed, on_token=stream)  # fmt: skip
            for name, hypotheses in zip(names, found):
                texts = [" ".join(tokenizer.decode(h.ids).split()) for h in hypotheses]
                if out:
                    out.add(image=name, lang=lang, prompt=prompt, text=texts[0], texts=texts)
                elif stream:
                    stream.finish(texts[0])
                else:
                    before = f"{json.dumps(name, ensure_ascii=False)[1:-1]}\t" if count > 1 else ""
                    print("\n".join(before + text for text in texts), flush=True)
    for error in bad:
        say(f"error: {error}")
    if bad and count > 1:
        say(f"{len(bad)} of {len(questions)} pictures could not be read")
    fine = not bad or shard.count > 1  # the merge looks again; torchrun would stop the other processes
    return 0 if fine else 2 if len(bad) == len(questions) else 1


if __name__ == "__main__":
    run_main(main)
