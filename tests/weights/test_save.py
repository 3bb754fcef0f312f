"""A folder holds one set of weights: what an earlier save left goes, and of two sets the one that transformers takes is read."""

import json
import shutil

import pytest
import torch
from conftest import TINY, tiny_mblip
from safetensors.torch import load_file, save_file

from nanomblip.model.int8 import quantize_linears
from nanomblip.model.lora import add_lora
from nanomblip.weights import save
from nanomblip.weights.adapter import save_adapter
from nanomblip.weights.files import INDEX, SINGLE, digest
from nanomblip.weights.layout import WeightsError, config_to_hf
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.records import RECORD, write_record
from nanomblip.weights.save import save_mblip, save_merged, save_mt5, save_trained, write_tensors
from nanomblip.weights.tensors import held_tensors

SMALL_SHARDS = 120_000


def same(a, b):
    return digest(held_tensors(a)) == digest(held_tensors(b))


def int8_model(seed):
    model = tiny_mblip(seed=seed)
    quantize_linears(model.mt5)
    return model


def bases(folder):
    save_mblip(tiny_mblip(seed=1), folder / "blip2", image_token=66)
    save_mt5(tiny_mblip(seed=2).mt5, folder / "mt0")


def trained_model():
    torch.manual_seed(0)
    model, trained = tiny_mblip(seed=1), []
    model.exchange_language_model(tiny_mblip(seed=2).mt5)
    for name, p in model.named_parameters():
        if not name.startswith(("vit.", "mt5.")):
            trained.append(name)
            p.data = p.data.half().float()
    return model, trained


# Every way to write weights into a folder.
WAYS = {
    "single": lambda folder: save_mblip(tiny_mblip(seed=3), folder, image_token=66),
    "shards": lambda folder: save_mblip(tiny_mblip(seed=4), folder, image_token=66, shard=SMALL_SHARDS),
    "fewer shards": lambda folder: save_mblip(tiny_mblip(seed=5), folder, image_token=66, shard=2 * SMALL_SHARDS),
    "int8": lambda folder: save_mblip(int8_model(6), folder, image_token=66, dtype=None),
    "int8 shards": lambda folder: save_mblip(int8_model(7), folder, image_token=66, dtype=None, shard=SMALL_SHARDS),
    "language model": lambda folder: save_mt5(tiny_mblip(seed=8).mt5, folder),
    "merged": lambda folder: save_merged(tiny_mblip(seed=9), folder, 66, folder),
    "trained": lambda folder: save_trained(*(lambda m, t: (m, folder, t))(*trained_model()), "../blip2", "../mt0", image_token=66),
}


ORDER = ["single", "shards", "single", "int8 shards", "shards", "fewer shards", "shards", "int8", "trained", "shards", "language model", "fetched", "merged",
         "int8 shards", "trained", "int8", "single", "fetched", "trained", "fetched", "fewer shards", "fetched", "int8 shards"]  # fmt: skip


def test_a_save_leaves_nothing_of_an_earlier_one(tmp_path):
    bases(tmp_path)
    used, fresh = tmp_path / "used", {}
    for name in WAYS:
        fresh[name] = tmp_path / name
        WAYS[name](fresh[name])
    used.mkdir()
    (used / "spiece.model").write_bytes(b"not ours to delete")
    (used / "notes.safetensors").write_bytes(b"neither")
    for name in ORDER:
        if name == "fetched":  # shards of a hub, with the record that hub.py writes, and an adapter beside them
            WAYS["shards"](used)
            write_record(used, {p.name: "0" * 64 for p in used.glob("model-*")}, {"repository": "a/b"})
            mt5 = tiny_mblip().mt5
            add_lora(mt5, "qv")
            save_adapter(mt5, used)
            continue
        WAYS[name](used)
        assert {p.name for p in used.iterdir()} == {p.name for p in fresh[name].iterdir()} | {"spiece.model", "notes.safetensors"}
        assert (used / RECORD).exists() == name.startswith("int8")
        load = load_mt5 if name == "language model" else load_mblip
        assert same(load(used), load(fresh[name]))


def test_transformers_opens_what_replaced_shards_and_an_adapter(tmp_path):
    from transformers import Blip2ForConditionalGeneration

    WAYS["shards"](tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "elsewhere"}))
    WAYS["single"](tmp_path)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs.language_model.shared.weight, tiny_mblip(seed=3).mt5.embed.weight)


def test_of_two_sets_the_one_that_transformers_takes(tmp_path):
    from transformers import Blip2ForConditionalGeneration

    save_mblip(tiny_mblip(seed=1), tmp_path / "m", image_token=66, shard=SMALL_SHARDS)
    save_mblip(tiny_mblip(seed=2), tmp_path / "new", image_token=66)
    shutil.copy(tmp_path / "new" / SINGLE, tmp_path / "m")
    assert (tmp_path / "m" / INDEX).exists()
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "m", dtype=torch.float32)
    ours = load_mblip(tmp_path / "m")
    assert torch.equal(ours.mt5.embed.weight, theirs.language_model.shared.weight) and same(ours, tiny_mblip(seed=2))


def test_a_crash_between_two_shards_leaves_no_mixture(tmp_path, monkeypatch):
    WAYS["shards"](tmp_path)
    count = len(list(tmp_path.glob("model-*")))
    real, calls = save.write_tensors, []

    def write(path, entries):
        calls.append(path)
        if len(calls) == 2:
            raise WeightsError("disk full")
        return real(path, entries)

    monkeypatch.setattr(save, "write_tensors", write)
    with pytest.raises(WeightsError, match="disk full"):
        save_mblip(tiny_mblip(seed=9), tmp_path, image_token=66, shard=SMALL_SHARDS)
    assert len(list(tmp_path.glob("model-*"))) == count > 2
    with pytest.raises(WeightsError, match="no model.safetensors and no"):
        load_mblip(tmp_path)


@pytest.mark.parametrize("dtype,number", [(torch.float16, 1e5), (torch.float32, float("inf")), (torch.bfloat16, 3.4e38), (torch.float32, float("nan"))])
def test_a_number_that_a_type_cannot_hold_is_not_written(tmp_path, dtype, number):
    WAYS["single"](tmp_path)
    before, model = (tmp_path / SINGLE).read_bytes(), tiny_mblip()
    model.mt5.lm_head.weight.data[3, 3] = number
    with pytest.raises(WeightsError, match=f"lm_head.weight holds numbers that are not finite; not written as {dtype}"):
        save_mblip(model, tmp_path, image_token=66, dtype=dtype)
    assert (tmp_path / SINGLE).read_bytes() == before and same(load_mblip(tmp_path), tiny_mblip(seed=3))
    with pytest.raises(WeightsError, match="a holds numbers"):
        write_tensors(tmp_path / "x.safetensors", {"a": (dtype, (2,), lambda: [torch.tensor([1.0, number])])})


def test_files_of_another_framework_are_refused(tmp_path):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    tensors = load_file(tmp_path / SINGLE)
    for kind, good in (("pt", True), ("mlx", True), (None, True), ("flax", False), ("tf", False)):
        save_file(tensors, tmp_path / SINGLE, metadata={"format": kind} if kind else {"made_by": "hand"})
        if good:
            assert same(load_mblip(tmp_path), tiny_mblip())
        else:
            with pytest.raises(WeightsError, match=f"format '{kind}'"):
                load_mblip(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config_to_hf(TINY, 66)
