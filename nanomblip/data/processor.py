"""What stands beside the weights of a folder: the tokenizer and the picture settings."""

from pathlib import Path

from nanomblip.data.image import ImageConfig
from nanomblip.data.tokenizer import Tokenizer, to_hf
from nanomblip.weights.files import read_json, write_atomic, write_json
from nanomblip.weights.layout import WeightsError

PICTURES, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def load_image_config(folder: Path) -> ImageConfig:
    """The picture settings of a folder, wherever it has them: `image_processor` of its processor_config.json, where
    transformers 5 writes them and looks first, or its preprocessor_config.json. ValueError names what is not there or
    not implemented."""
    return ImageConfig.from_hf(_picture_settings(Path(folder)))


def _picture_settings(folder: Path) -> dict:
    if (folder / PROCESSOR).exists():
        processor = read_json(folder / PROCESSOR)
        if not isinstance(processor, dict):
            raise WeightsError(f"{folder / PROCESSOR}: does not hold an object")
        if "image_processor" in processor:
            return processor["image_processor"]
    if not (folder / PICTURES).exists():
        raise WeightsError(f"{folder / PICTURES}: no such file, and no image_processor in {PROCESSOR}")
    return read_json(folder / PICTURES)


def save_processor(folder: Path, source: Path, queries: int) -> None:
    """Write what belongs beside the weights: tokenizer and picture settings of the folder `source`, for us and for
    transformers' Blip2Processor."""
    tokenizer = Tokenizer(source / "spiece.model")
    pictures = _picture_settings(source)
    write_atomic(folder / "spiece.model", lambda path: path.write_bytes(tokenizer.path.read_bytes()))
    write_json(folder / PICTURES, pictures)
    write_json(folder / PROCESSOR, dict(processor_class="Blip2Processor", num_query_tokens=queries))
    for name, content in to_hf(tokenizer, image_token=len(tokenizer)).items():
        write_json(folder / name, content)
