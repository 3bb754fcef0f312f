"""What a run leaves on disk: its state, the model in the official layout, and its LoRA as an adapter.

Of several processes rank 0 alone writes.
"""

import os
import shutil
from pathlib import Path

from nanomblip.model.lora import lora_layers
from nanomblip.training.config import LARGE
from nanomblip.training.distributed import rank
from nanomblip.training.parts import model_parts, parameter_count
from nanomblip.training.setup import Start
from nanomblip.training.state import State
from nanomblip.weights.adapter import save_adapter
from nanomblip.weights.files import write_json
from nanomblip.weights.save import frozen_fingerprint, save_mblip, save_merged, save_trained


class Saver:
    """Writes a run's folder. Of a large model trained on two bases the trained parts alone are written, and where
    the bases are; of others the whole model, with LoRA merged into the weights as they were before int8."""

    def __init__(self, folder: Path, start: Start, state: State, languages):
        self.folder, self.start, self.state, self.languages = folder, start, state, languages
        self.trained = [name for name in state.trained if not name.startswith("mt5.")]
        count = parameter_count(t for tensors in model_parts(start.model).values() for t in tensors)
        self.parts_only = start.bases is not None and count > LARGE
        if self.parts_only:
            self.fingerprint = frozen_fingerprint(start.model, self.trained, *start.bases)

    def begin(self, config: dict | None) -> None:
        """What is known before the first step: how pictures and texts are read, and the config of a new run."""
        if config is not None:
            self.write("train.json", config)
        self.write("preprocessor_config.json", self.start.image.to_hf())
        if not rank():
            shutil.copyfile(self.start.tokenizer.path, self.folder / "spiece.model")

    def write(self, name: str, value: dict) -> None:
        if not rank():
            write_json(self.folder / name, value)

    def save(self, step: int, seconds: float, last: bool = False) -> None:
        """Everything after so many steps; each file is whole at every moment."""
        if rank():
            return
        self.state.save(step, seconds)
        if last:
            self.state.older.unlink(missing_ok=True)  # it was for accidents on the way
        start, tokens = self.start, len(self.start.tokenizer)
        if self.parts_only:
            bases = [os.path.relpath(base.resolve(), self.folder.resolve()) for base in start.bases]
            save_trained(start.model, self.folder, self.trained, *bases, tokens, self.languages, self.fingerprint)
        elif start.rounded or lora_layers(start.model.mt5):
            save_merged(start.model, self.folder, tokens, start.bases or start.source, self.languages)
        else:
            save_mblip(start.model, self.folder, image_token=tokens, languages=self.languages)
        if lora_layers(start.model.mt5):
            save_adapter(start.model.mt5, self.folder / "adapter")

    def command(self) -> str:
        """How to caption a picture with what was saved."""
        adapted = self.parts_only and lora_layers(self.start.model.mt5)
        return f"python sample.py --model {self.folder}" + f" --adapter {self.folder}/adapter" * bool(adapted)
