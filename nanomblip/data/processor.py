"""What stands beside the weights of a folder: the tokenizer and the picture settings."""

from pathlib import Path

from nanomblip.data.tokenizer import Tokenizer, to_hf
from nanomblip.weights.files import read_json, write_atomic, write_json


def save_processor(folder: Path, source: Path, queries: int) -> None:
    """Write what belongs beside the weights: tokenizer and picture settings of the folder `source`, for us and for transformers' Blip2Processor."""
    tokenizer = Tokenizer(source / "spiece.model")
    pictures = read_json(source / "preprocessor_config.json")
    write_atomic(folder / "spiece.model", lambda path: path.write_bytes(tokenizer.path.read_bytes()))
    write_json(folder / "preprocessor_config.json", pictures)
    write_json(folder / "processor_config.json", dict(processor_class="Blip2Processor", num_query_tokens=queries))
    for name, content in to_hf(tokenizer, image_token=len(tokenizer)).items():
        write_json(folder / name, content)
