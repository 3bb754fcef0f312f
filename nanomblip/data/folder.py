"""A model's folder as a whole: which one a name means, what it speaks, everything in it loaded, checked, written.

A folder in the official layout holds config.json, model.safetensors (or shards with an index), spiece.model and
preprocessor_config.json.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from nanomblip.data.languages import LANGUAGES
from nanomblip.data.processor import load_image_config, save_processor
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.mblip import MBLIP, PRESETS
from nanomblip.weights.files import read_json
from nanomblip.weights.hub import MODELS, download
from nanomblip.weights.load import load_mblip
from nanomblip.weights.save import save_mblip, save_merged, stored_parameters

HERE = Path(__file__).resolve().parents[2]
LARGE = 500_000_000  # parameters, from which on the type "auto" saves memory


def find_model(name: str) -> Path:
    """The folder that --model means; FileNotFoundError says what to run when there is none."""
    if name and Path(name).is_dir():
        return Path(name)
    if name == "":
        files = [path for path in Path("out").glob("*/model.safetensors") if (path.parent / "config.json").exists()]
        if files:
            return max(files, key=lambda path: path.stat().st_mtime).parent
    if name in ("", "nano"):
        shipped = HERE / "weights" / "nano" / "aligned"
        if (shipped / "config.json").exists():
            return shipped
        raise FileNotFoundError("no trained weights here yet; make some with: python train.py --lang_mix all")
    if name in MODELS and name.startswith("mblip"):
        return download(name, HERE / "weights" / name)
    if name in PRESETS:
        way_out = f"train them with train.py --llm {name.removeprefix('mblip-')}"
        raise FileNotFoundError(f"--model {name}: no such weights were published; {way_out}")
    raise FileNotFoundError(f"--model {name}: no such folder, and neither nano nor mblip-mt0-xl")


def pick_device(name: str) -> torch.device:
    """The device that `--device` means: auto takes CUDA where there is one; ValueError for what this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))  # torchrun's number of this process on this machine
    if name not in ("cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"--device {name}: not here; give auto, cpu" + (" or cuda" if torch.cuda.is_available() else "")
        )
    if name == "cuda":
        if local >= (count := torch.cuda.device_count()):
            raise ValueError(f"process {local + 1} of this machine, which has {count} GPUs: --nproc_per_node {count}")
        torch.cuda.set_device(local)
        if find_spec("bitsandbytes") is None:
            print("bitsandbytes is not installed: int8 layers are slow on this GPU; pip install it", file=sys.stderr)
    return torch.device(name)


def spoken(folder: Path) -> list[str] | None:
    """The languages that a model says it was trained to answer in; None (the official ones do not say) means all 96."""
    config = read_json(folder / "config.json")
    langs = config.get("languages") if isinstance(config, dict) else None
    if langs is not None and not (isinstance(langs, list) and langs and all(code in LANGUAGES for code in langs)):
        raise ValueError(f"{folder / 'config.json'}: languages is not a list of language codes")
    return langs


def load_folder(folder: Path, vision_dtype: str = "auto", llm_dtype: str = "auto"):
    """Tokenizer, picture settings and model of a folder: (Tokenizer, ImageConfig, MBLIP).

    vision_dtype, llm_dtype: fp32, bf16, int8, or auto = as stored, and int8 for a model of more than LARGE parameters.
    ValueError (WeightsError) naming the file that is missing, damaged or does not go with the others.
    """
    config = read_json(folder / "config.json")
    tokenizer, pictures = Tokenizer(folder / "spiece.model"), load_image_config(folder)
    as_stored = not isinstance(config, dict) or "quantization_config" in config or stored_parameters(folder) <= LARGE
    auto = None if as_stored else "int8"
    vision, llm = (auto if dtype == "auto" else dtype for dtype in (vision_dtype, llm_dtype))
    model = load_mblip(folder, vision_dtype=vision, llm_dtype=llm)
    if len(tokenizer) > (rows := model.cfg.mt5.vocab):
        raise ValueError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens does not go with an embedding of {rows} rows"
        )
    if pictures.size != (wanted := model.cfg.vit.image_size):
        problem = f"its picture settings are for pictures of {pictures.size}, the ViT wants {wanted}"
        raise ValueError(f"{folder}: {problem}")
    return tokenizer, pictures, model


def save_folder(target: Path, model: MBLIP, source: Path, merged: bool) -> None:
    """Write a model that was loaded from `source`, with everything else that a folder has.

    merged: in floats, with LoRA merged into them, for transformers; else as it is held (int8 stays int8).
    """
    load_image_config(source)  # before the long part
    about = dict(image_token=len(Tokenizer(source / "spiece.model")), languages=spoken(source))
    if merged:
        save_merged(model, target, source=source, **about)
    else:
        save_mblip(model, target, dtype=None, **about)
    save_processor(target, source, model.cfg.queries)
