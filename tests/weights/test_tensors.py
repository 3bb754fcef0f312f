"""Single tensors of a file: what their types cannot hold, and scales that belong to nothing."""

import pytest
import torch
from conftest import tiny_mblip
from safetensors.torch import load_file, save_file

from nanomblip.weights import tensors
from nanomblip.weights.files import open_safetensors
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.load import load_mblip
from nanomblip.weights.save import save_mblip
from nanomblip.weights.tensors import blocks_of, convert, same_tensor

HEAD, NORM, PATCH = "language_model.lm_head.weight", "language_model.encoder.final_layer_norm.weight", "vision_model.embeddings.patch_embedding.weight"


def edit(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize("options", [{}, dict(llm_dtype="bf16"), dict(llm_dtype="int8"), dict(dtype=torch.float16)], ids=str)
@pytest.mark.parametrize("number,fits", [(1e300, False), (-1e39, False), (3e38, True), (1e-300, True)])
def test_a_float64_beyond_the_range_of_what_it_becomes_is_refused(tmp_path, options, number, fits):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    edit(tmp_path, lambda t: (t.update({HEAD: t[HEAD].double()}), t[HEAD].__setitem__((5, 5), number)))
    if fits and (number < 1 or options in ({}, dict(llm_dtype="bf16"))):
        assert load_mblip(tmp_path, **options).mt5.lm_head.weight.isfinite().all()
        return
    with pytest.raises(WeightsError, match="lm_head.*(beyond its range|cannot become int8)") as error:
        load_mblip(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_float64_is_read_as_the_nearest_float(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK", 100)
    values = torch.randn(37, 11, dtype=torch.float64)
    save_file({"x": values}, tmp_path / "x.safetensors")
    out = torch.empty(37, 11)
    convert(tmp_path / "x.safetensors", "x", out)
    assert torch.equal(out, values.float())
    assert torch.equal(torch.cat([block for _, block in blocks_of(tmp_path / "x.safetensors", "x", (37, 11))]), values)
    save_file({"x": values, "y": values.float(), "z": values.flip(0)}, tmp_path / "y.safetensors")
    assert [same_tensor(tmp_path / "x.safetensors", "x", tmp_path / "y.safetensors", key) for key in "xyz"] == [True, False, False]


@pytest.mark.parametrize("key", [HEAD, NORM, PATCH, "language_model.shared.weight", "qformer.layernorm.weight", "language_projection.weight"])
def test_scales_beside_floats_are_refused(tmp_path, key):
    save_mblip(tiny_mblip(), tmp_path, image_token=66)
    scale = key.removesuffix("weight") + "SCB"
    edit(tmp_path, lambda t: t.update({scale: torch.ones(len(t[key]))}))
    for options in ({}, dict(llm_dtype="int8", vision_dtype="int8"), dict(llm_dtype="bf16")):
        with pytest.raises(WeightsError, match=f"{key} is F32, and {scale} beside it scales int8"):
            load_mblip(tmp_path, **options)
    with open_safetensors(tmp_path / "model.safetensors") as file:
        assert scale in file.keys()  # noqa: SIM118
