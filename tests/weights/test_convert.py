"""From pickles to safetensors: every number arrives, and nothing but plain tensors does."""

import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import save_nllb, tiny_mblip, tiny_nllb
from safetensors.torch import load_file

from nanomblip.weights import convert as module
from nanomblip.weights.adapter import load_adapter, save_adapter
from nanomblip.weights.convert import convert
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.load import load_mblip, load_mt5
from nanomblip.weights.nllb import load_nllb, nllb_names
from nanomblip.weights.records import RECORD, read_record

ROOT = Path(__file__).resolve().parents[2]


def tensors(seed=0):
    """Of every type that is taken, without dimensions, empty, not contiguous, with the smallest and largest numbers."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(7, 5, generator=g)
    odd = torch.tensor([0.0, -0.0, 1e-45, 3.4e38, 3.4e38])
    return OrderedDict(a=a, half=a.half(), brain=a.bfloat16(), int8=(a * 9).to(torch.int8), byte=(a * 9).abs().byte(), odd=odd,
                       turned=torch.randn(4, 6, generator=g).T, part=torch.randn(9, 9, generator=g)[2:5, 1:8:3], point=torch.tensor(3.0),
                       none=torch.zeros(0, 4), parameter=torch.nn.Parameter(a + 1))  # fmt: skip


def same(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert got[key].dtype == want[key].dtype and got[key].shape == want[key].shape
        a, b = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (got[key], want[key]))
        assert torch.equal(a, b), key
    return True


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def sha(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_every_number_arrives(tmp_path):
    want = tensors()
    torch.save(want, tmp_path / "pytorch_model.bin")
    done = convert(tmp_path)
    assert names(tmp_path) == ["model.safetensors", "pytorch_model.bin", RECORD]
    assert same(load_file(tmp_path / "model.safetensors"), want)
    record = read_record(tmp_path)
    assert done == {"model.safetensors": sha(tmp_path / "model.safetensors")}
    assert record["files"]["model.safetensors"]["sha256"] == done["model.safetensors"]
    assert record["source"] == {"converted_from": {"pytorch_model.bin": sha(tmp_path / "pytorch_model.bin")}}
    with pytest.raises(WeightsError, match="has model.safetensors already"):
        convert(tmp_path)


def test_shards_in_and_out(tmp_path):
    want = {f"layer.{i}.weight": torch.randn(10, 10) for i in range(12)}
    where = {key: f"pytorch_model-0000{i % 3 + 1}-of-00003.bin" for i, key in enumerate(want)}
    for name in set(where.values()):
        torch.save({key: t for key, t in want.items() if where[key] == name}, tmp_path / name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps(dict(metadata={}, weight_map=where)))
    done = convert(tmp_path, shard=1000)
    assert len(done) == 6 and set(done) < set(names(tmp_path))
    found = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert same({key: load_file(tmp_path / name)[key] for key, name in found.items()}, want)
    assert set(read_record(tmp_path)["source"]["converted_from"]) == set(where.values())
    with pytest.raises(WeightsError, match="has model.safetensors.index.json already"):
        convert(tmp_path)


@pytest.mark.parametrize("edit, words", [
    (lambda w: w.update(extra="pytorch_model-1.bin"), "disagrees with pytorch_model-1.bin about 'extra'"),
    (lambda w: w.pop("a"), "disagrees with pytorch_model-1.bin about 'a'"),
    (lambda w: w.update(a="pytorch_model-9.bin"), "disagrees|no such file"), (lambda w: w.update(a="../model.bin"), "no weight_map"),
    (lambda w: w.update(a=7), "no weight_map"), (lambda w: w.clear(), "no weight_map"), (lambda w: w.update(a="model.safetensors"), "no weight_map"),
])  # fmt: skip
def test_an_index_that_is_wrong(tmp_path, edit, words):
    torch.save(dict(a=torch.zeros(2), b=torch.ones(2)), tmp_path / "pytorch_model-1.bin")
    where = dict(a="pytorch_model-1.bin", b="pytorch_model-1.bin")
    edit(where)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(dict(weight_map=where)))
    before = names(tmp_path)
    with pytest.raises(WeightsError, match=words):
        convert(tmp_path)
    assert names(tmp_path) == before


def test_shared_memory_is_written_once_under_its_first_name(tmp_path):
    one, other = torch.randn(50, 8), torch.randn(50, 8)
    saved = OrderedDict([("shared", one), ("head", one), ("turned", one.T), ("top", one[:20]), ("other", other), ("copy", one.clone())])
    torch.save(saved, tmp_path / "pytorch_model.bin")
    convert(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert same(found, {key: t for key, t in saved.items() if key != "head"})


def test_a_translator_that_has_only_a_pickle(tmp_path):
    theirs = save_nllb(tiny_nllb(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = theirs.state_dict()
    assert sum("embed_tokens" in key or key == "lm_head.weight" for key in state) == 3  # and model.shared.weight: four names
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickle.*python -m nanomblip.weights.convert"):
        load_nllb(tmp_path)
    convert(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(nllb_names(tiny_nllb()).values())  # the first of the four
    assert all(torch.equal(a, b) for a, b in zip(load_nllb(tmp_path).parameters(), tiny_nllb().parameters(), strict=True))


def test_a_whole_mblip_and_its_language_model(tmp_path):
    from nanomblip.weights.save import save_mblip, save_mt5

    whole = "whole", lambda folder: save_mblip(tiny_mblip(), folder, image_token=66), load_mblip
    alone = "mt5", lambda folder: save_mt5(tiny_mblip().mt5, folder), load_mt5
    for name, save, load in (whole, alone):
        folder = tmp_path / name
        save(folder)
        want = load(folder)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(WeightsError, match="pickle.*python -m nanomblip.weights.convert"):
            load(folder)
        convert(folder)
        assert all(torch.equal(a, b) for a, b in zip(load(folder).parameters(), want.parameters(), strict=True))


def test_an_adapter_beside_a_model(tmp_path):
    from nanomblip.model.lora import add_lora

    mt5 = tiny_mblip().mt5
    add_lora(mt5, "qv", r=2, alpha=4, dropout=0.0)
    save_adapter(mt5, tmp_path)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="pickle.*python -m nanomblip.weights.convert"):
        load_adapter(tiny_mblip().mt5, tmp_path)
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    assert sorted(convert(tmp_path)) == ["adapter_model.safetensors", "model.safetensors"]
    load_adapter(tiny_mblip().mt5, tmp_path)
    assert sorted(read_record(tmp_path)["files"]) == ["adapter_model.safetensors", "model.safetensors"]


class Runs:
    """Unpickled without care, it calls `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def zip_of(data_pkl: bytes, path: Path, compress=zipfile.ZIP_STORED, **storages):
    """What torch.save writes, with a pickle of our own."""
    with zipfile.ZipFile(path, "w", compress) as z:
        for name, data in {"data.pkl": data_pkl, "byteorder": b"little", "version": b"3\n", **{f"data/{k}": v for k, v in storages.items()}}.items():
            z.writestr(f"archive/{name}", data)


def expanded(shape):
    return torch.zeros(1).expand(shape)


HOSTILE = {
    "os.system": (lambda f: {"a": Runs(os.system, f"touch {f}/ran")}, r"wants to run (posix|os)\.system"),
    "beside a tensor": (lambda f: {"a": torch.zeros(3), "b": Runs(os.system, f"touch {f}/ran")}, "wants to run"),
    "as the whole": (lambda f: Runs(os.system, f"touch {f}/ran"), "wants to run"),
    "as a key": (lambda f: {Runs(os.mkdir, f"{f}/ran"): torch.zeros(3)}, "wants to run"),
    "eval": (lambda f: {"a": Runs(eval, f"open('{f}/ran', 'w')")}, "wants to run .*eval"),
    "a tensor of ours": (lambda f: {"a": Runs(torch.load, f"{f}/other.bin")}, "wants to run"),
    "a module": (lambda f: torch.nn.Linear(2, 3), "wants to run .*Linear"),
    "numpy": (lambda f: {"a": torch.zeros(2).numpy()}, "wants to run numpy"),
    "a state dict inside": (lambda f: {"state_dict": {"a": torch.zeros(3)}}, "state_dict is a dict, not a tensor"),
    "a number": (lambda f: {"a": torch.zeros(3), "epoch": 3}, "epoch is a int, not a tensor"),
    "a list": (lambda f: {"a": [torch.zeros(3)]}, "a is a list"),
    "text": (lambda f: {"a": "x" * 99}, "a is a str"),
    "nothing": (lambda f: {"a": None}, "a is a NoneType"),
    "a list of tensors": (lambda f: [torch.zeros(3)], "holds a list, not tensors"),
    "a tensor alone": (lambda f: torch.zeros(3), "holds a Tensor, not tensors"),
    "no tensors": (lambda f: {}, "holds no tensors"),
    "a numbered tensor": (lambda f: {3: torch.zeros(3)}, "3 is not the name"),
    "metadata": (lambda f: {"__metadata__": torch.zeros(3)}, "__metadata__' is not the name"),
    "a name with a new line": (lambda f: {"a\nb": torch.zeros(3)}, "is not the name"),
    "sparse": (lambda f: {"a": torch.eye(4).to_sparse()}, "a is a tensor in a special form"),
    "sparse rows": (lambda f: {"a": torch.eye(4).to_sparse_csr()}, "a is a tensor in a special form"),
    "quantised": (lambda f: {"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, "a is a tensor in a special form"),
    "on no device": (lambda f: {"a": torch.zeros(4, device="meta")}, "a is a tensor without numbers"),
    "complex": (lambda f: {"a": torch.zeros(4, dtype=torch.complex64)}, "a is of type torch.complex64"),
    "negative by a bit": (lambda f: {"a": torch.zeros(4, dtype=torch.complex64).conj().imag}, "a is a tensor in a special form"),
    "not a number": (lambda f: {"a": torch.zeros(9), "b": torch.tensor([1.0, float("nan")])}, "b is damaged: .* not finite"),
    "infinite": (lambda f: {"a": torch.tensor(float("-inf")).bfloat16()}, "a is damaged: .* not finite"),
    "whole numbers": (lambda f: {"a": torch.arange(4)}, "a is of type torch.int64"),
    "one number as a million": (lambda f: {"a": expanded((1000, 1000))}, "a is larger"),
    "one number as 4 EB": (lambda f: {"a": expanded((2**30, 2**30))}, "a is larger"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_plain_tensor_is_refused_and_nothing_runs(tmp_path, case):
    make, words = HOSTILE[case]
    torch.save(make(tmp_path), tmp_path / "pytorch_model.bin")
    before = names(tmp_path)
    with pytest.raises(WeightsError, match=words) as caught:
        convert(tmp_path)
    assert names(tmp_path) == before and "ran" not in before
    text = str(caught.value)
    assert "\n" not in text and "pytorch_model.bin" in text and "weights_only" not in text  # none of torch's advice to switch it off


@pytest.mark.parametrize("data", [
    b"cos\nsystem\n(S'touch ran'\ntR.", b"", b"\x80\x02}", b"\x80\x02]\x8c\x01a" + b"(" * 5000 + b".", b"\x80\x04\x95" + b"\xff" * 8 + b".",
    pickle.dumps({"a": 1})[:-1], b"\x80\x02N.", b"c__builtin__\neval\n.", b"\x80\x02cbuiltins\nexec\nX\x01\x00\x00\x001\x85R.",
])  # fmt: skip
def test_pickles_made_by_hand(tmp_path, data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zip_of(data, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pytorch_model.bin"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").write_bytes(data)  # without the zip around it, as before torch 1.6
    with pytest.raises(WeightsError, match="cut off, damaged, or written before torch 1.6"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_files_of_before_torch_1_6_are_refused(tmp_path):
    torch.save(tensors(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="before torch 1.6"):
        convert(tmp_path)


def test_compressed_archives_are_refused(tmp_path):
    """A few bytes could fill the memory, and the loader would map them as they stand."""
    torch.save({"a": torch.zeros(1000)}, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as z:
        for name in source.namelist():
            z.writestr(name, source.read(name))
    with pytest.raises(WeightsError, match="compressed"):
        convert(tmp_path)


def test_cut_at_any_byte(tmp_path):
    torch.save(tensors(), buffer := io.BytesIO())
    data, path, rng = buffer.getvalue(), tmp_path / "pytorch_model.bin", random.Random(0)
    for n in [0, 1, len(data) - 1, len(data) - 22, *(rng.randrange(len(data)) for _ in range(60))]:
        path.write_bytes(data[:n])
        with pytest.raises(WeightsError, match="cut off, damaged"):
            convert(tmp_path)
        assert names(tmp_path) == ["pytorch_model.bin"]


def test_a_bit_that_flips_is_noticed_or_does_not_matter(tmp_path):
    want = tensors()
    torch.save(want, buffer := io.BytesIO())
    data, path, rng, refused = bytearray(buffer.getvalue()), tmp_path / "pytorch_model.bin", random.Random(1), 0
    for _ in range(150):
        i, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[i] ^= bit
        path.write_bytes(data)
        data[i] ^= bit
        try:
            convert(tmp_path)
        except WeightsError:
            refused += 1
            assert names(tmp_path) == ["pytorch_model.bin"]
        else:  # in the padding between its files, or in a date
            assert same(load_file(tmp_path / "model.safetensors"), want)
            (tmp_path / "model.safetensors").unlink()
            (tmp_path / RECORD).unlink()
    assert refused > 20


def test_a_disk_that_writes_something_else_is_noticed(tmp_path, monkeypatch):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    write = module.write_shards

    def bad(folder, entries, shard):
        done = write(folder, entries, shard)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        return done

    monkeypatch.setattr(module, "write_shards", bad)
    with pytest.raises(WeightsError, match="is not what was written"):
        convert(tmp_path)
    lost = lambda folder, entries, shard: write(folder, {key: e for key, e in entries.items() if key != "part"}, shard)
    monkeypatch.setattr(module, "write_shards", lost)
    with pytest.raises(WeightsError, match="1 tensor.*'part'"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_a_full_disk_and_an_old_torch(tmp_path, monkeypatch):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    with monkeypatch.context() as m:
        m.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=100)))
        with pytest.raises(WeightsError, match="are needed"):
            convert(tmp_path)
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(WeightsError, match="2.6 or newer"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_what_an_interrupted_call_left_behind_goes_away(tmp_path):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    (tmp_path / module.STAGING).mkdir()
    (tmp_path / module.STAGING / "model-00001-of-00009.safetensors").write_bytes(b"half")
    convert(tmp_path)
    assert names(tmp_path) == ["model.safetensors", "pytorch_model.bin", RECORD]


def test_folders_without_pickles(tmp_path):
    with pytest.raises(WeightsError, match="has none of pytorch_model.bin"):
        convert(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(WeightsError, match="give the file"):
        convert(tmp_path)
    with pytest.raises(WeightsError, match="no such folder"):
        convert(tmp_path / "elsewhere")


def test_the_command(tmp_path, capsys):
    torch.save(tensors(), tmp_path / "pytorch_model.bin")
    words = [sys.executable, "-m", "nanomblip.weights.convert", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and sha(tmp_path / "model.safetensors") in done.stderr and done.stdout == ""
    again = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "already" in again.stderr
    for argv in ([], ["--force", str(tmp_path)], ["--force"], ["a", "b"]):
        with pytest.raises(ValueError, match="python -m nanomblip.weights.convert FOLDER"):
            module.main(argv)
    assert module.main(["--help"]) == 0 and "python -m" in capsys.readouterr().out


def test_weights_stay_on_the_disk(tmp_path):
    """What the process holds besides mapped files (RssAnon) does not grow by the 128 MB of weights."""
    state = {f"w{i}": torch.full((2048, 2048), float(i)) for i in range(8)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    code = (
        "import sys, threading, time\nfrom nanomblip.weights.convert import convert\n"
        "held = lambda: int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1]) // 1024\n"
        "before, seen, done = held(), [], threading.Event()\n"
        "watch = threading.Thread(target=lambda: [seen.append(held()) or time.sleep(0.005) for _ in iter(done.is_set, True)])\n"
        "watch.start()\nconvert(sys.argv[1], shard=2**25)\ndone.set()\nprint(max(seen) - before, len(seen))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True)
    more, looks = map(int, done.stdout.split())
    assert more < 50 and looks > 3
    found = {key: t for path in sorted(tmp_path.glob("*.safetensors")) for key, t in load_file(path).items()}
    assert same(found, state) and len(list(tmp_path.glob("*.safetensors"))) == 4
