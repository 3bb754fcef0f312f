"""The parts of stress.py that damage files: weights, pictures, mixtures and benchmarks; and the names that files hold.

Each part is a generator: it makes what it needs in `folder`, yields case(rng) -> outcome, and tidies up. `notes` counts what else is
worth telling.
"""

import copy
import hashlib
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from conftest import TINY, tiny_mblip
from PIL import Image, features
from safetensors.torch import load_file, save_file
from stress_damage import Failure, damage_bytes, damage_file, damage_json, refused
from stress_runs import hub_server, repository

from nanomblip.data.decode import ImageError, load_image
from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.emoji import load_emoji
from nanomblip.data.json_index import JsonExamples
from nanomblip.data.json_mixture import JsonMixture, image_path
from nanomblip.measure.benchmarks import read_benchmark
from nanomblip.model.lora import add_lora, lora_layers
from nanomblip.weights import hub
from nanomblip.weights.adapter import load_adapter, save_adapter
from nanomblip.weights.files import INDEX, SINGLE
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.records import RECORD, write_record
from nanomblip.weights.save import save_mblip, save_mt5, save_trained

# As small as a model can be that has every kind of layer: a load takes milliseconds.
SMALL = replace(TINY, vit=replace(TINY.vit, layers=1), qformer=replace(TINY.qformer, layers=2),
                mt5=replace(TINY.mt5, layers=1, decoder_layers=1))  # fmt: skip


def numbers(model: torch.nn.Module) -> tuple:
    """All that decides what a model computes: config, tensors, and the numbers that LoRA and int8 layers have beside them."""
    beside = [getattr(m, key) for m in model.modules() for key in ("scale", "dropout", "threshold") if isinstance(getattr(m, key, None), float)]
    # Copies, since what is loaded is a view of the mapped file, which is about to change.
    return model.cfg, beside, {name: t.clone() for name, t in model.state_dict().items()}


def same(a: tuple, b: tuple) -> bool:
    return a[:2] == b[:2] and a[2].keys() == b[2].keys() and all(x.dtype == b[2][k].dtype and torch.equal(x, b[2][k]) for k, x in a[2].items())


# What no reader can notice in a folder without sha256.json.
ACCEPTED = dict(json="a value of a config that no shape of a tensor tells", header="tensors of one shape and type that changed places",
                number="a flipped bit that leaves a finite number", file="a file as it is in another folder")  # fmt: skip


def make_folders(folder: Path) -> dict:
    """Name -> (how its numbers are read, the ways to load it, files that are hashed): the kinds of folders that `weights` damages."""
    model = tiny_mblip(SMALL)
    save_mblip(model, folder / "single", image_token=66)
    save_mblip(model, folder / "fetched", image_token=66, shard=60_000)
    files = [path.name for path in (folder / "fetched").iterdir()]
    write_record(
        folder / "fetched", {name: hashlib.sha256((folder / "fetched" / name).read_bytes()).hexdigest() for name in files}, {"source": "hub"}
    )
    save_mblip(load_mblip(folder / "single", vision_dtype="int8", llm_dtype="int8"), folder / "int8", image_token=66)
    save_mt5(model.mt5, folder / "mt5")
    bridge = [name for name, _ in model.named_parameters() if not name.startswith(("vit.", "mt5."))]
    save_trained(load_mblip(folder / "single"), folder / "trained", bridge, "../single", "../mt5", 66)
    adapted, bare = load_mt5(folder / "mt5"), load_mt5(folder / "mt5")
    add_lora(adapted, "all", 4, 8.0, 0.1)
    for layer in lora_layers(adapted).values():
        torch.nn.init.constant_(layer.B, 0.1)
    save_adapter(adapted, folder / "adapter")

    def with_adapter(path):
        before = numbers(bare)
        try:
            load_adapter(bare, path)
        except ValueError:
            if lora_layers(bare) or not same(before, numbers(bare)):
                raise Failure("the model was changed by an adapter that was refused") from None
            raise
        found = numbers(bare)
        for place, layer in lora_layers(bare).items():
            owner, _, leaf = place.rpartition(".")
            setattr(bare.get_submodule(owner), leaf, layer.base)
        return found

    whole, alone = (lambda path, **how: numbers(load_mblip(path, **how))), (lambda path, **how: numbers(load_mt5(path, **how)))
    ways, everything = (
        [{}, {}, dict(llm_dtype="int8", vision_dtype="bf16")],
        lambda name: {path.name for path in (folder / name).iterdir()} - {RECORD},
    )
    return dict(single=(whole, ways, set()), fetched=(whole, ways, everything("fetched")), int8=(whole, [{}], {SINGLE}),
                mt5=(alone, [{}, {}, dict(llm_dtype="int8")], set()), trained=(whole, [{}], everything("trained")),
                adapter=(with_adapter, [{}], set()))  # fmt: skip


def weights(folder: Path, notes: Counter):
    skipped = {cls: cls.reset_parameters for cls in (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d, torch.nn.LayerNorm)}
    for cls in skipped:  # half of a load's time, for numbers that the file overwrites
        cls.reset_parameters = lambda self: None
    kinds = make_folders(folder)
    good = {kind: {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / kind).iterdir()} for kind in kinds}
    want = {kind: [read(folder / kind, **way) for way in ways] for kind, (read, ways, _) in kinds.items()}

    def put(path: Path, data: bytes | None):
        path.write_bytes(data) if data is not None else path.unlink(missing_ok=True)

    def case(rng):
        kind = rng.choice((*["single"] * 3, *["fetched"] * 6, "int8", "int8", *["mt5"] * 6, "trained", *["adapter"] * 5))
        (read, ways, hashed), name = kinds[kind], rng.choice(sorted(good[kind]))
        which, (data, what) = rng.randrange(len(ways)), damage_file(name, good[kind][name][0], rng)
        put(folder / kind / name, data)
        try:
            found = read(folder / kind, **ways[which])
        except ValueError as error:
            return refused(error, folder / kind, name)
        finally:
            for back in {name, RECORD} & set(good[kind]):  # the record is written anew when only a file's time has changed
                put(folder / kind / back, good[kind][back][0])
                os.utime(folder / kind / back, ns=(good[kind][back][1],) * 2)
        if same(found, want[kind][which]):
            return "identical"
        if name in hashed or name == INDEX:
            raise Failure(f"{kind}/{name}: {what} damaged, other numbers, and no error")
        return f"accepted: {ACCEPTED[what]}"

    try:
        yield case
    finally:
        for cls, reset in skipped.items():
            cls.reset_parameters = reset


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pictures(folder: Path, notes: Counter):
    cell = Image.fromarray(load_emoji("core").pictures[7])
    alpha, palette, grey = Image.merge("RGBA", (*cell.split(), cell.split()[0])), cell.convert("P"), np.asarray(cell.convert("L"))
    deep, floats = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.float32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "title"
    seeds = [encoded(cell, "JPEG", exif=exif), encoded(cell, "JPEG", progressive=True), encoded(cell.convert("CMYK"), "JPEG"),
             encoded(cell, "PNG", exif=exif), encoded(alpha, "PNG"), encoded(palette, "PNG", transparency=3), encoded(deep, "PNG"),
             encoded(cell, "PNG", save_all=True, append_images=[alpha]), encoded(cell, "WEBP", exif=exif), encoded(alpha, "WEBP", lossless=True),
             encoded(palette, "GIF", save_all=True, append_images=[cell]), encoded(cell, "BMP"), encoded(alpha, "BMP"), encoded(palette, "BMP"),
             encoded(cell, "TIFF"), encoded(deep, "TIFF", compression="tiff_adobe_deflate"), encoded(cell, "TIFF", compression="jpeg"),
             encoded(cell.convert("1"), "TIFF", compression="group4"), encoded(floats, "TIFF"),
             encoded(cell, "TIFF", compression="tiff_lzw", exif=exif),
             encoded(cell, "PPM"), encoded(deep, "PPM"), encoded(cell, "ICO")]  # fmt: skip
    seeds += [encoded(cell, name) for name, there in (("AVIF", "avif"), ("JPEG2000", "jpg_2000")) if features.check(there)]
    path, want = folder / "picture", []

    def read():
        image = load_image(path)
        if image.mode != "RGB" or image.width * image.height == 0:
            raise Failure(f"a picture of mode {image.mode} and size {image.size}")
        return image.size, image.tobytes()

    for seed in seeds:
        path.write_bytes(seed)
        try:
            want.append(read())
        except ImageError:  # a format that is not read; its damaged files must be refused as well
            want.append(None)

    def case(rng):
        which = rng.randrange(len(seeds))
        path.write_bytes(damage_bytes(seeds[which], rng))
        try:
            found = read()
        except ImageError as error:
            return refused(error, path)
        return "identical" if found == want[which] else "accepted: other pixels, where a format has no checksum or none that is looked at"

    yield case


def _lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


ROWS = [dict(context=f"Caption {i} é?", label="猫 ]}, \\" * (i % 3), image_id=f"{i:03d}.jpg") for i in range(12)]
# Task of a benchmark, or a mixture -> file -> text. A sidecar is the mixture's index, which is damaged instead.
TASKS = dict(
    xm3600={"captions.jsonl": _lines({"image/key": "0a", "image/locale": "de", "de": {"caption": ["Hund"]}, "hr": {"caption": ["Pas", "psa"]}})},
    xflickrco={"de/test.jsonl": _lines({"sentences": ["Zwei", "Leute"], "img_path": "10.jpg"}, {"sentences": ["b"], "img_path": "1.jpg"})},
    xgqa={"q_bn.json": json.dumps({"205": {"answer": "no", "imageId": "n1", "question": "?"}, "6": {"answer": "a", "imageId": "2", "question": "q"}})},
    maxm={"maxm_v1_iw.json": json.dumps({"split": "iw", "annotations": [
        {"image_id": "0", "qa_pairs": [{"question": "?", "processed_answers": ["2", "3"]}]}]})},
    vqav2={"v2_val2014_questions.json": json.dumps({"data_subtype": "val2014", "questions": [{"image_id": 26, "question": "?", "question_id": 1}]}),
           "annotations.json": json.dumps({"annotations": [{"image_id": 26, "question_id": 1, "answers": [{"answer": "yes"}, {"answer": "no"}]}]})},
    xvnli={"ru/test.jsonl": _lines({"gold_label": "entailment", "Flikr30kID": "4.jpg", "sentence2": "Frau"},
                                   {"gold_label": "-", "Flikr30kID": "4", "sentence2": "a"})},
    marvl={"marvl-sw.jsonl": _lines(*({"concept": "39", "language": "sw", "caption": "P", "left_img": "8.jpg", "right_img": "2.jpg", "label": label}
                                      for label in (True, False)))},
    pope={"coco.jsonl": _lines(*({"question_id": i, "image": "C.jpg", "text": "Is it?", "label": label} for i, label in enumerate(("yes", "no"))))},
    mixture={"mixture.json": json.dumps(ROWS, ensure_ascii=False, indent=1)}, sidecar={"mixture.json": json.dumps(ROWS)},
)  # fmt: skip


def json_files(folder: Path, notes: Counter):
    for task, files in TASKS.items():
        for name, text in files.items():
            (folder / task / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / task / name).write_text(text, encoding="utf-8")
    sidecar = folder / "sidecar" / "mixture.json.index"
    JsonExamples(sidecar.with_suffix(""))
    index = sidecar.read_bytes()

    def read(task: str):
        if task in ("mixture", "sidecar"):
            mixture = JsonMixture([(str(folder / task / "mixture.json"), None)], 0)
            return [mixture.files[0][i] for i in range(len(mixture))], [mixture.example(i) for i in range(5)]
        items = read_benchmark(task, [str(folder / task / name) for name in TASKS[task]])
        for item in items:
            if not item.labels or not all(isinstance(text, str) for text in (*item.images, item.lang, item.prompt, *item.labels)):
                raise Failure(f"a question that cannot be asked or scored: {item}")
        return items

    want = {task: read(task) for task in TASKS}

    def case(rng):
        task = rng.choice((*TASKS, "mixture", "mixture", "sidecar"))
        name = rng.choice(list(TASKS[task]))
        path, text = folder / task / name, TASKS[task][name]
        if task == "sidecar":
            sidecar.write_bytes(damage_bytes(index, rng))
        elif rng.random() < 0.5:
            path.write_bytes(damage_bytes(text.encode(), rng))
        elif name.endswith(".jsonl"):
            path.write_text(_lines(*damage_json([json.loads(line) for line in text.splitlines()], rng)), encoding="utf-8")
        else:
            path.write_text(json.dumps(damage_json(json.loads(text), rng)))
        try:
            found = read(task)
        except (ValueError, FileNotFoundError) as error:
            return refused(error, path)
        finally:
            (folder / "mixture" / "mixture.json.index").unlink(missing_ok=True)
            if task != "sidecar":
                path.write_text(text, encoding="utf-8")
        return "identical" if found == want[task] else "accepted: other texts, in a file of the right form"

    yield case


# -------------------------------------------------------------------------------------------------------------- names

SEEN = None  # while `watching`: the files that were opened
READ_ANYWHERE = [os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, DATA.parent, "/proc", "/dev/null")]
ONE, TWO = ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.truncate", "os.chmod"), ("os.rename", "os.link", "os.symlink")


def _audit(event, args):
    if SEEN is not None and event in ONE + TWO:
        SEEN.extend(os.fsdecode(path) for path in args[: 1 + (event in TWO)] if isinstance(path, (str, bytes, os.PathLike)))


@contextmanager
def watching(root: Path):
    """Failure when the block opens, lists or changes a file that is neither below `root` nor Python's or this repository's own."""
    global SEEN
    if not getattr(_audit, "added", False):  # a hook stays for ever
        sys.addaudithook(_audit)
        _audit.added = True
    SEEN, inside = [], [os.path.realpath(root), *READ_ANYWHERE]
    try:
        yield
    finally:
        seen, SEEN = SEEN, None
        for path in seen:
            real = os.path.realpath(path)
            if not any(real == place or real.startswith(place + os.sep) for place in inside):
                raise Failure(f"{path} was opened")


@contextmanager
def audited_safetensors():
    """safetensors opens its files in Rust, where no audit hook looks: let each `safe_open` of the package say so."""
    opened = {module: module.safe_open for key, module in list(sys.modules.items()) if key.startswith("nanomblip.") and hasattr(module, "safe_open")}
    for module, real in opened.items():
        module.safe_open = lambda path, *args, real=real, **more: (sys.audit("open", path, None, 0), real(path, *args, **more))[1]
    try:
        yield
    finally:
        for module, real in opened.items():
            module.safe_open = real


NAME_PARTS = ["..", "..", ".", "up", "outside", "root", "secret.jpg", "secret", "model.safetensors", "", "~", "C:", "a\0", "%2e%2e", "\u202e",
              "\uff0e\uff0e", "\\..", "etc", "passwd", "nul", "out.jpg", "in.jpg", "{}", "$HOME", "*"]  # fmt: skip


def hostile(rng: random.Random, outside: Path) -> str:
    """A name that leads out of its folder, to a file that is there if nothing stops it, or that looks like one."""
    if rng.random() < 0.4:
        start = rng.choice(["../", "../../", "up/", "./up/", "x/../../", f"{outside.parent}/"])
        return rng.choice([f"{start}outside/{rng.choice(['secret.jpg', 'model.safetensors', 'config.json'])}", "/etc/passwd", "out.jpg", "out"])
    start = rng.choice(["", "", "", "/", "\\", "//", "file:///", "C:\\", "/etc/"])
    return (
        start
        + rng.choice("///\\").join(rng.choice(NAME_PARTS) for _ in range(rng.randint(1, 5)))
        + rng.choice(["", "", ".safetensors", ".jpg", "\n"])
    )


def names(folder: Path, notes: Counter):
    root, outside = folder / "root", folder / "outside"
    save_mblip(tiny_mblip(SMALL), root / "m", image_token=66, shard=60_000)
    (root / "m" / RECORD).touch()
    save_mblip(tiny_mblip(SMALL), outside, image_token=66)
    Image.new("RGB", (8, 8)).save(outside / "secret.jpg")
    Image.new("RGB", (8, 8)).save(root / "in.jpg")
    (root / "out.jpg").symlink_to(outside / "secret.jpg")
    (root / "up").symlink_to(folder)
    mt5 = load_mblip(outside).mt5
    add_lora(mt5, "all", 2)
    save_adapter(mt5, root / "adapter")
    tensors, config = load_file(root / "adapter" / "adapter_model.safetensors"), json.loads((root / "adapter" / "adapter_config.json").read_text())
    shards = json.loads((root / "m" / INDEX).read_text())
    bare, files = load_mblip(outside).mt5, repository()

    def picture(name, rng):
        load_image(image_path(root, name))

    def mixture(name, rng):
        (root / "m.json").write_text(json.dumps([dict(context="?", label="!", image_id=name)]))
        (root / "m.json.index").unlink(missing_ok=True)
        picture(JsonMixture([(str(root / "m.json"), None)], 0).image_id(0), rng)

    def benchmark(name, rng):
        (root / "b.jsonl").write_text(
            json.dumps({"concept": name, "language": "sw", "caption": "?", "left_img": name, "right_img": name, "label": True})
        )
        for image in read_benchmark("marvl", [str(root / "b.jsonl")])[0].images:
            picture(image, rng)

    def shard(name, rng):
        (root / "m" / RECORD).unlink(missing_ok=True)
        share = rng.choice((0, 0.9))
        (root / "m" / INDEX).write_text(
            json.dumps({"weight_map": {key: name if rng.random() >= share else old for key, old in shards["weight_map"].items()}})
        )
        load_mblip(root / "m")

    def manifest(name, rng):
        (root / "m" / INDEX).write_text(json.dumps(shards))
        (root / "m" / RECORD).write_text(json.dumps(dict(source={}, files={name: dict(size=1, sha256="0" * 64, mtime_ns=1)})))
        load_mblip(root / "m")

    def adapter(name, rng):
        changed, key = dict(tensors), rng.choice(sorted(tensors))
        where = rng.choice(("base_model_name_or_path", "target_modules", "peft_type", "key"))
        if where == "key":
            changed[name] = changed.pop(key)
        save_file(changed, root / "adapter" / "adapter_model.safetensors")
        more = {where: [name] if where == "target_modules" else name} if where != "key" else {}
        (root / "adapter" / "adapter_config.json").write_text(json.dumps(config | more))
        load_adapter(copy.deepcopy(bare), root / "adapter")

    def listing(name, rng):
        served = dict(files, **{name: b"from outside"})
        if rng.random() < 0.5:
            served[INDEX] = json.dumps({"weight_map": {"a": name, "b": "model-00001-of-00002.safetensors"}}).encode()
        server.files = served
        shutil.rmtree(root / "fetched", ignore_errors=True)
        hub.download("owner/name", root / "fetched")

    uses = [*[picture, mixture, benchmark, shard, manifest, adapter] * 3, listing]

    def case(rng):
        name, use = hostile(rng, outside), rng.choice(uses)
        notes[use.__name__] += 1
        with watching(root):
            try:
                use(name, rng)
            except (ValueError, FileNotFoundError) as error:
                return refused(error, root, "image_id", "config.json", "owner/name")
        return "accepted: a name inside the root, or one that is never opened"

    with audited_safetensors(), hub_server(files, []) as (server, _):
        yield case
