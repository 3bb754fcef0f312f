"""Reading and writing the official layout: round trips, files by transformers, and everything that must be refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, in_transformers, tiny_mblip
from safetensors.torch import load_file, save_file

from nanomblip.model.mblip import PRESETS, MBLIPConfig
from nanomblip.weights.files import digest, save_tensors
from nanomblip.weights.layout import WeightsError, config_from_hf, config_to_hf
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.save import save_mblip, save_mt5, save_trained

SHARED, HEAD = "language_model.shared.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    save_mblip(tiny_mblip(), folder, image_token=66)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def same(a, b):
    return digest(dict(a.named_parameters())) == digest(dict(b.named_parameters()))


def test_round_trip_is_exact(folder):
    model = tiny_mblip()
    again = load_mblip(folder)
    assert same(model, again) and again.cfg == model.cfg and not again.training


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_the_official_form(name):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(PRESETS[name], 0)))) == PRESETS[name]


def test_a_sparse_config_gets_the_official_defaults():
    """Hub configs store differences only: this is all that BLIP-2 with an mT5-small would need to say."""
    cfg = config_from_hf({"model_type": "blip-2", "vision_config": {}, "qformer_config": {}, "text_config": {"model_type": "mt5"}})
    assert cfg == PRESETS["mblip-mt0-small"]


@pytest.mark.parametrize("max_shard_size", ["20KB", "5GB"])
def test_files_written_by_transformers_load(folder, tmp_path, max_shard_size):
    model = load_mblip(folder)
    theirs = in_transformers(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    assert same(model, load_mblip(tmp_path / "theirs"))


def test_the_shared_embedding_under_other_names(folder):
    def rename(t):
        t["language_model.encoder.embed_tokens.weight"] = t["language_model.decoder.embed_tokens.weight"] = t.pop(SHARED)

    model = load_mblip(folder)
    edit(folder, lambda t: t.update({"language_model.encoder.embed_tokens.weight": t[SHARED].clone()}))
    assert same(model, load_mblip(folder))
    edit(folder, lambda t: t.pop("language_model.encoder.embed_tokens.weight"))
    edit(folder, lambda t: t.update({"language_model.decoder.embed_tokens.weight": t.pop(SHARED)}))
    assert same(model, load_mblip(folder))
    assert not torch.equal(model.mt5.embed.weight, model.mt5.lm_head.weight)


def test_fp16_files_are_read_into_the_wanted_type(folder):
    edit(folder, lambda t: t.update({key: value.half() for key, value in t.items()}))
    assert load_mblip(folder).mt5.lm_head.weight.dtype == torch.float32
    assert load_mblip(folder, dtype=torch.bfloat16).vit.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("change,words", [
    (lambda t: t.pop(HEAD), "missing.*lm_head"),
    (lambda t: t.pop("query_tokens"), "missing.*query_tokens"),
    (lambda t: t.update(extra=torch.zeros(1)), "unknown.*extra"),
    (lambda t: t.update({HEAD: torch.zeros(67, 27)}), r"lm_head.*\(67, 27\).*\(67, 28\)"),
    (lambda t: t.update({HEAD: torch.zeros(67, 28, dtype=torch.int8)}), "int8"),
    (lambda t: t.update({"language_model.encoder.embed_tokens.weight": torch.zeros(67, 28)}), "embed_tokens.*differs"),
])  # fmt: skip
def test_wrong_tensors_are_named(folder, change, words):
    edit(folder, change)
    with pytest.raises(WeightsError, match=words):
        load_mblip(folder)


@pytest.mark.parametrize("part,key,value", [
    ("vision_config", "hidden_act", "gelu_new"), ("vision_config", "qkv_bias", False), ("vision_config", "hidden_size", "24"),
    ("vision_config", "num_attention_heads", 0), ("vision_config", "patch_size", 7), ("vision_config", "image_size", -1),
    ("qformer_config", "hidden_act", "relu"), ("qformer_config", "use_qformer_text_input", True),
    ("qformer_config", "encoder_hidden_size", 25), ("qformer_config", "num_attention_heads", 3),
    ("text_config", "model_type", "opt"), ("text_config", "model_type", None), ("text_config", "feed_forward_proj", "relu"), ("text_config", "dense_act_fn", "silu"),
    ("text_config", "decoder_start_token_id", 2), ("text_config", "scale_decoder_outputs", True),
    ("text_config", "d_model", True), (None, "model_type", "blip"), (None, "num_query_tokens", 0), (None, "text_config", []),
])  # fmt: skip
def test_configs_that_are_not_implemented_are_refused(part, key, value):
    hf = config_to_hf(TINY, 66)
    (hf[part] if part else hf)[key] = value
    with pytest.raises(WeightsError):
        config_from_hf(hf)


def test_a_t5_keeps_its_erf_gelu_and_must_be_untied():
    hf = config_to_hf(replace(TINY, mt5=replace(TINY.mt5, gelu="none")), 66)
    hf["text_config"]["model_type"] = "t5"
    assert config_from_hf(hf).mt5.gelu == "none"
    hf["text_config"]["tie_word_embeddings"] = True
    with pytest.raises(WeightsError, match="tie_word_embeddings"):
        config_from_hf(hf)


@pytest.mark.parametrize("damage", ["truncate", "empty", "text", "pointer", "header", "missing", "config", "config cut", "none"])
def test_damaged_files_are_one_clear_error(folder, damage):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    if damage == "none":
        shutil.rmtree(folder)
    elif damage == "missing":
        path.unlink()
    elif damage == "config":
        (folder / "config.json").unlink()
    elif damage == "config cut":
        (folder / "config.json").write_text("{" + '"a": [')
    else:
        path.write_bytes({"truncate": data[:-7], "empty": b"", "text": b"<html>404</html>",
                          "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                          "header": b"\xff" * 8 + data[8:]}[damage])  # fmt: skip
    with pytest.raises(WeightsError) as error:
        load_mblip(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value).strip()


def test_five_hundred_mutations_never_escape_as_another_error(folder):
    """A flipped byte of the header is refused, or leaves the same model; one in the data is a matter for a sha256."""
    path, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    data, model = path.read_bytes(), load_mblip(folder)
    header = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for _ in range(500):
        i, value = torch.randint(0, header, (), generator=generator).item(), torch.randint(0, 256, (), generator=generator).item()
        path.write_bytes(data[:i] + bytes([value]) + data[i + 1 :])
        try:
            assert same(model, load_mblip(folder))
        except WeightsError:
            refused += 1
    assert refused > 400


def test_an_index_cannot_lead_out_of_the_folder_or_disagree(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    keys = list(load_file(folder / "a.safetensors"))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, "a.safetensors")}))
    assert same(load_mblip(folder), tiny_mblip())
    for name, words in (("../a.safetensors", "plain name"), ("/etc/a.safetensors", "plain name"), ("b.safetensors", "no such file")):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
        with pytest.raises(WeightsError, match=words):
            load_mblip(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys[1:], "a.safetensors")}))
    with pytest.raises(WeightsError, match="disagrees"):
        load_mblip(folder)


def test_pickles_are_refused_unopened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo boom'\ntR.")
    with pytest.raises(WeightsError, match="pickle"):
        load_mblip(folder)


def test_a_failed_write_leaves_the_old_file(folder):
    resource = pytest.importorskip("resource")
    import signal

    path = folder / "model.safetensors"
    before = path.read_bytes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))  # as good as a full disk
        with pytest.raises(WeightsError, match="untouched"):
            save_tensors(path, {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_language_model_by_itself_goes_both_ways(tmp_path):
    from transformers import MT5ForConditionalGeneration

    model = tiny_mblip().mt5
    save_mt5(model, tmp_path / "ours")
    theirs = MT5ForConditionalGeneration.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    prompt, ids = torch.randint(2, 60, (2, 5)), torch.randint(2, 60, (2, 4))
    want = theirs(input_ids=prompt, attention_mask=torch.ones_like(prompt), decoder_input_ids=ids).logits
    torch.testing.assert_close(model(prompt, prompt > 0, ids), want, atol=1e-5, rtol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(model, load_mt5(tmp_path / "theirs"))
    with pytest.raises(WeightsError, match="blip-2"):
        load_mblip(tmp_path / "ours")


def test_the_default_config_is_the_official_xl():
    assert MBLIPConfig() == PRESETS["mblip-mt0-xl"]


@pytest.fixture
def on_bases(tmp_path):
    """A model whose Q-Former, queries and projection were trained in front of another frozen language model, and its folder."""
    sees, reads = tiny_mblip(seed=1), tiny_mblip(replace(TINY, mt5=replace(TINY.mt5, width=32)), seed=2).mt5
    save_mblip(sees, tmp_path / "blip2", image_token=66)
    save_mt5(reads, tmp_path / "mt0")
    sees.exchange_language_model(reads)
    trained = [name for name, _ in sees.named_parameters() if not name.startswith(("vit.", "mt5."))]
    with torch.no_grad():
        for name in trained:
            sees.get_parameter(name).copy_(torch.randn_like(sees.get_parameter(name)).half())
    save_trained(sees, tmp_path / "aligned", trained, "../blip2", "../mt0", image_token=66, languages=["sw"])
    return sees, tmp_path / "aligned"


def test_trained_parts_come_back_on_top_of_their_bases(on_bases):
    model, folder = on_bases
    assert same(load_mblip(folder), model)
    assert len(load_file(folder / "model.safetensors")) == sum(1 for n, _ in model.named_parameters() if not n.startswith(("vit.", "mt5.")))
    assert json.loads((folder / "config.json").read_text())["languages"] == ["sw"]


@pytest.mark.parametrize("damage,message", [("base", "was trained on other weights"), ("bits", "sha256"), ("unknown", "1 unknown key"),
                                            ("bases", "bases must name"), ("absolute", "config.json: bases must name.*relative"), ("gone", "no such folder"), ("long", "no such folder"), ("config", "another model")])  # fmt: skip
def test_trained_parts_refuse_other_bases_and_damage(on_bases, damage, message):
    _, folder = on_bases
    config = json.loads((folder / "config.json").read_text())
    if damage == "base":
        edit(folder.parent / "mt0", lambda t: t["lm_head.weight"].mul_(1.01))
    elif damage == "bits":
        edit(folder, lambda t: t["query_tokens"].neg_())
    elif damage == "unknown":
        edit(folder, lambda t: t.update(other=torch.zeros(1)))
    elif damage == "bases":
        config["bases"].pop("sha256")
    elif damage == "long":
        config["bases"]["vision"] = "é" * 300
    elif damage == "absolute":
        config["bases"]["vision"] = str((folder.parent / "mt0").resolve())
    elif damage == "gone":
        shutil.rmtree(folder.parent / "mt0")
    else:
        config["qformer_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=message):
        load_mblip(folder)


def test_damaged_shipped_weights_say_how_to_restore_them(monkeypatch, tmp_path):
    from nanomblip.weights import load

    monkeypatch.setattr(load, "__file__", str(tmp_path / "nanomblip" / "weights" / "load.py"))
    save_mblip(tiny_mblip(), tmp_path / "weights" / "nano" / "blip2", image_token=66)
    edit(tmp_path / "weights" / "nano" / "blip2", lambda t: t.pop(HEAD))
    with pytest.raises(WeightsError, match="git checkout -- weights/nano"):
        load_mblip(tmp_path / "weights" / "nano" / "blip2")
