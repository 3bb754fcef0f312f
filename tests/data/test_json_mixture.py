"""Mixture files: what is read is what stands in the file, damage is named by byte, memory stays flat, pictures stay inside."""

import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from nanomblip.data import json_index
from nanomblip.data.decode import ImageError
from nanomblip.data.emoji import ROOT as DATA
from nanomblip.data.image import ImageConfig
from nanomblip.data.json_index import JsonExamples, MixtureError, build_index, scan
from nanomblip.data.json_mixture import (
    JsonBatches,
    JsonMixture,
    image_path,
    is_relative_name,
    may_mirror,
    parse_mixture,
    shuffled,  # fmt: skip
    speaks_of_sides,
    unusable_pictures,
)
from nanomblip.data.tokenizer import Tokenizer
from nanomblip.model.mblip import PRESETS

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["a cat", 'Does "x" fit?', "बिल्ली", "猫\n", "back\\slash", "tab\t", "é", "😀", "#", "]", "},{", "[", "\u2028"]


def make_rows(n, seed=0):
    rng = random.Random(seed)
    text = lambda: " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
    return [dict(context=text(), label=text(), image_id=f"{i:06d}.jpg") for i in range(n)]


def write(path, rows, **options):
    path.write_text(json.dumps(rows, **options), encoding="utf-8")
    return path


@pytest.mark.parametrize("options", [{}, dict(ensure_ascii=False), dict(indent=2), dict(separators=(",", ":"), ensure_ascii=False)], ids=str)
@pytest.mark.parametrize("chunk", [7, 64, 1 << 20])
def test_every_example_reads_back(tmp_path, monkeypatch, options, chunk):
    monkeypatch.setattr(json_index, "CHUNK", chunk)  # characters and objects cut at every place
    rows = make_rows(120)
    path = write(tmp_path / "m.json", rows, **options)
    examples = JsonExamples(path)
    assert len(examples) == 120
    assert [examples[i] for i in range(120)] == [(r["context"], r["label"], r["image_id"]) for r in rows]
    data = path.read_bytes()
    assert all(data[start : start + 1] == b"{" for start in list(scan(path))[:-1]) and data[list(scan(path))[-1] :][:1] == b"]"


def test_other_fields_a_bom_and_an_empty_array(tmp_path):
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([dict(context="q", label="a", image_id="1", text_label=["x", {"y": 1}])]).encode())
    assert JsonExamples(tmp_path / "bom.json")[0] == ("q", "a", "1")
    assert len(JsonExamples(write(tmp_path / "none.json", []))) == 0
    with pytest.raises(MixtureError, match="no example"):
        JsonMixture([(str(tmp_path / "none.json"), None)], 0)
    with pytest.raises(MixtureError, match="no such file"):
        JsonExamples(tmp_path / "missing.json")


def test_a_row_with_a_hash_sign_is_kept(tmp_path):
    """The original drops VQA rows whose question contains "#"."""
    path = write(tmp_path / "m.json", [dict(context="Is it #1? Short Hindi answer:", label="हाँ", image_id="a.jpg")])
    assert JsonExamples(path)[0][0] == "Is it #1? Short Hindi answer:"


GOOD = '{"context": "q", "label": "é", "image_id": "1.jpg"}'


@pytest.mark.parametrize("text,byte,problem", [
    (f"[{GOOD}, {GOOD}", None, "ends in the middle"), (f"[{GOOD}, ", None, "ends in the middle"), (f"[{GOOD}, {GOOD[:-3]}", None, "ends in the middle"),
    (f"[{GOOD} {GOOD}]", 1 + len(GOOD.encode()) + 1, "expected ,"), (f"[{GOOD}, 7]", 1 + len(GOOD.encode()) + 2, "not an object"),
    (f"[{GOOD}, {GOOD[:20]}x]", None, "not JSON|ends in"), (f"[{GOOD}] x", 1 + len(GOOD.encode()) + 2, "something follows"),
    (GOOD, 0, r"does not begin with \["), ("", 0, r"does not begin with \["), (f"[{GOOD}, {GOOD.replace('label', 'lable')}]", None, "'label' is missing"),
    (f'[{GOOD}, {GOOD.replace(chr(34) + "é" + chr(34), "3")}]', None, "'label' is not a text"),
    (f'[{GOOD.replace("é", chr(92) + "ud800")}]', 1, "surrogate"), ("[" + "[" * 100_000, None, "not JSON|ends in|not an object"),
    (f"[{GOOD},, {GOOD}]", 1 + len(GOOD.encode()) + 1, "not JSON"), (f"[{GOOD},]", 1 + len(GOOD.encode()) + 1, "not JSON"),
])  # fmt: skip
def test_damage_is_named_by_file_and_byte(tmp_path, text, byte, problem):
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MixtureError, match=problem) as error:
        JsonExamples(path)
    assert str(path) in str(error.value) and "byte" in str(error.value) and "\n" not in str(error.value)
    if byte is not None:
        assert f"byte {byte:,}:" in str(error.value)
    assert not path.with_name("bad.json.index").exists()


def test_bytes_that_are_not_utf8_are_named(tmp_path, monkeypatch):
    for chunk in (5, 1 << 20):
        monkeypatch.setattr(json_index, "CHUNK", chunk)
        (tmp_path / "m.json").write_bytes(f"[{GOOD}, ".encode() + b'{"context": "\xff"}]')
        with pytest.raises(MixtureError, match=f"byte {1 + len(GOOD.encode()) + 2 + 13:,}: not UTF-8"):
            JsonExamples(tmp_path / "m.json")


def test_random_damage_never_ends_in_another_error(tmp_path):
    rng, data = random.Random(0), json.dumps(make_rows(20), ensure_ascii=False).encode()
    path = tmp_path / "m.json"
    for _ in range(400):
        bad = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(bad))
            bad[at : at + rng.randint(0, 2)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 2)))
        path.write_bytes(bad)
        try:
            examples = JsonExamples(path)
            rows = [examples[i] for i in range(len(examples))]
            assert rows == [tuple(r[f] for f in json_index.FIELDS) for r in json.loads(bad)]
        except MixtureError as error:
            assert str(path) in str(error)


def test_the_sidecar_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(json_index, "build_index", lambda *args: built.append(1) or build_index(*args))
    path = write(tmp_path / "m.json", make_rows(50))
    JsonExamples(path), JsonExamples(path)
    assert len(built) == 1
    info = path.stat()
    rows = make_rows(50)
    rows[7]["label"] = rows[7]["label"][::-1]  # same size, and the same time below: the content tells
    write(path, rows)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_size == info.st_size and JsonExamples(path)[7][1] == rows[7]["label"] and len(built) == 2
    sidecar = path.with_name("m.json.index")
    for damage in (b"", b"{}", b"\xff" * 5000, sidecar.read_bytes()[:-8]):
        sidecar.write_bytes(damage)
        assert JsonExamples(path)[49][2] == "000049.jpg"
    assert len(built) == 6
    os.utime(path)  # a new time alone is reason enough
    JsonExamples(path)
    assert len(built) == 7


def test_a_file_that_changes_under_a_run_is_noticed(tmp_path):
    path = write(tmp_path / "m.json", make_rows(50))
    examples = JsonExamples(path)
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(MixtureError, match="example 3, byte .* changed after"):
        examples[3]


# ---- the stream ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    order = [shuffled(i, n, "a") for i in range(n)]
    assert sorted(order) == list(range(n))
    if n >= 10:
        assert order != list(range(n)) and order != [shuffled(i, n, "b") for i in range(n)]


def test_shuffled_looks_like_chance():
    n, quarters = 4000, Counter()
    for i in range(n):
        quarters[4 * i // n, 4 * shuffled(i, n, "k") // n] += 1
    assert all(abs(count - n / 16) < 5 * (n / 16) ** 0.5 for count in quarters.values()) and len(quarters) == 16


@pytest.fixture
def two(tmp_path):
    a = write(tmp_path / "a.json", [dict(context="Caption the image in German.", label=f"Bild {i}", image_id=f"{i}") for i in range(30)])
    b = write(tmp_path / "b.json", [dict(context=f"Q{i}?", label=f"yes {i}", image_id=f"{i}.png") for i in range(70)])
    return str(a), str(b)


def test_without_weights_an_epoch_shows_every_example_of_all_files_once(two):
    mixture = JsonMixture([(two[0], None), (two[1], None)], 3)
    epochs = [[mixture.example(e * 1000 + i) for i in range(1000)] for e in range(2)]  # ten epochs of 100 each
    for epoch in epochs:
        assert Counter(e.picture for e in epoch) == {row: 10 for row in range(100)}
    assert epochs[0] != epochs[1] and mixture.shares() == [0.3, 0.7] and len(mixture) == 100
    other = JsonMixture([(two[0], None), (two[1], None)], 3)
    assert [other.example(i) for i in (999, 5, 1700)] == [mixture.example(i) for i in (999, 5, 1700)]
    assert JsonMixture([(two[0], None), (two[1], None)], 4).example(5) != mixture.example(5)


def test_weights_are_exact_in_every_block(two):
    mixture = JsonMixture(parse_mixture(f"{two[0]}:1, {two[1]}:3"), 0)
    for block in range(3):
        drawn = [mixture.example(block * 1000 + i) for i in range(1000)]
        assert sum(e.picture < 30 for e in drawn) == 250 and mixture.shares() == [0.25, 0.75]
    assert max(Counter(e.picture for e in drawn).values()) <= -(-750 // 70) + 1  # each file is gone through, not drawn from
    assert JsonMixture(parse_mixture(f"{two[0]}:2,{two[1]}"), 0).shares() == [0.667, 0.333]


@pytest.mark.parametrize("spec", ["", ",", "a.json,", "a.json:0", "a.json:-1", "a.json:inf", ":2"])
def test_bad_mixture_specs_are_refused_by_flag(spec):
    with pytest.raises(ValueError, match="--mixture"):
        parse_mixture(spec)


def test_a_colon_may_belong_to_the_name():
    assert parse_mixture("c:/x/a.json,b.json:2,d") == [("c:/x/a.json", None), ("b.json", 2.0), ("d", None)]


def test_only_captions_that_speak_of_no_side_are_mirrored():
    assert may_mirror("Caption the image in former Hebrew.", "חתול") and may_mirror("Short Scottish Gaelic image caption: ", "cat")
    assert may_mirror("Caption the image.", "a cat")
    for context in ("Is it left? Short German answer:", 'Does "a cat" accurately describe the image?', "Describe the image in detail.", "Bildunterschrift:"):
        assert not may_mirror(context, "a cat")
    for label in ("a cat on the left", "Ein Hund mit dem linken Ohr", "左边的猫", "แมวทางซ้าย", "un chien à droite", "बाईं ओर एक बिल्ली", "paka kushoto"):
        assert speaks_of_sides(label) and not may_mirror("Caption the image in Thai.", label)
    assert not any(map(speaks_of_sides, ("a black dog", "ein Hund", "猫", "แมว", "un perro", "")))


# ---- pictures -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "images"
    (root / "n01").mkdir(parents=True)
    for i, name in enumerate(["0.jpg", "1.jpg", "n01/2.png", "3.jpg"]):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(root / name)
    (tmp_path / "secret.jpg").write_bytes((root / "0.jpg").read_bytes())
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "up").symlink_to(tmp_path)
    (root / "in.jpg").symlink_to(root / "1.jpg")
    (root / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    return root


HOSTILE = ["../secret.jpg", "n01/../../secret.jpg", "/etc/passwd", "out.jpg", "up/secret.jpg", "0\0.jpg", "C:\\x.jpg", "C:/x.jpg", "c:x.jpg", "\\\\host\\x.jpg",
           "http://x.org/0.jpg", "file:///etc/passwd", "n01\\..\\0.jpg", "", ".", "..", "n01/", "./0.jpg", "n01//2.png", "a\n0.jpg", "x" * 5000, "no.jpg", "n01"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name[:12]))
def test_an_image_id_cannot_leave_the_root(pictures, name):
    with pytest.raises(ImageError, match="image_id") as error:
        image_path(pictures, name)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()


def test_good_ids_and_links_inside_are_found_and_jpg_is_added(pictures, tmp_path):
    for name, file in {"0.jpg": "0.jpg", "0": "0.jpg", "n01/2.png": "n01/2.png", "in.jpg": "1.jpg"}.items():
        assert image_path(pictures, name) == pictures / file
    (tmp_path / "link").symlink_to(pictures)  # the root itself may be a link
    assert image_path(tmp_path / "link", "0") == pictures / "0.jpg"


@pytest.mark.parametrize("name", ["Screenshot 2024-05-01 at 10.15.30\u202fAM.png", "12:30.jpg", "what? *.jpg", 'a "b" <c>|d.jpg', "a\u200eb.jpg",
                                  "back\\slash.jpg", "tab\t.jpg", "n01/x\u00a0y.jpeg", "10.15.30\u202fAM.jpg"])  # fmt: skip
def test_names_that_the_file_system_allows_are_read(pictures, name):
    (pictures / name).write_bytes((pictures / "0.jpg").read_bytes())
    assert image_path(pictures, name) == pictures / name
    assert image_path(pictures, name.removesuffix(".jpg")) == pictures / name


def test_windows_has_rules_of_its_own():
    for name in ("C:\\x.jpg", "c:x.jpg", "a:stream.jpg", "..\\x.jpg", "\\\\host\\x.jpg", "x?.jpg", "a\tb.jpg", ".. /x.jpg", "x.jpg.", "x.jpg "):
        assert not is_relative_name(name, windows=True) and (is_relative_name(name, windows=False)), name
    for name in ("", "/x", "a//b", "../x", "a/..", "./x", "x\0.jpg", "x/", "x" * 5000, "half \ud83d.jpg"):
        assert not is_relative_name(name, windows=True) and not is_relative_name(name, windows=False), name
    for name in ("x.jpg", "n01/x y.jpg", "a\u202fb.png", "猫.jpg", "...x.jpg"):
        assert is_relative_name(name, windows=True) and is_relative_name(name, windows=False), name


def test_accents_are_found_in_either_unicode_form(pictures):
    for folder, stem in (("é", "ü"), ("é", "u\u0308"), ("e\u0301x", "ü"), ("n01", "한글")):
        for form in ("NFC", "NFD"):
            (pictures / folder).mkdir(exist_ok=True)
            there = pictures / folder / f"{unicodedata.normalize(form, stem)}.jpg"
            there.write_bytes((pictures / "0.jpg").read_bytes())
            for asked in ("NFC", "NFD"):
                for name in (f"{folder}/{stem}.jpg", f"{folder}/{stem}"):
                    assert image_path(pictures, unicodedata.normalize(asked, name)) == there
            there.unlink()
    (pictures / "é.jpg").write_bytes(b"1")
    (pictures / "e\u0301.jpg").write_bytes(b"2")  # both: the one that was named
    assert [image_path(pictures, name).read_bytes() for name in ("é", "e\u0301.jpg")] == [b"1", b"2"]
    with pytest.raises(ImageError, match="no such file"):  # not the same letters
        image_path(pictures, "É.jpg")


def test_letter_case_counts_and_other_extensions_are_looked_for_as_they_stand(pictures):
    (pictures / "IMG.JPG").write_bytes(b"x")
    assert image_path(pictures, "IMG.JPG") == pictures / "IMG.JPG"
    if not (pictures / "img.jpg").exists():  # a file system that tells them apart
        with pytest.raises(ImageError, match="no such file"):
            image_path(pictures, "IMG.jpg")
    for name in ("a.heic", "b.jfif", "c.jpe", "plain"):
        (pictures / name).write_bytes(b"x")
        assert image_path(pictures, name) == pictures / name
    (pictures / "plain.jpg").write_bytes(b"x")
    assert image_path(pictures, "plain") == pictures / "plain.jpg"
    (pictures / "dir.x").symlink_to("/")
    (pictures / "passwd").symlink_to("/etc/passwd")
    for name in ("passwd", "dir.x/etc/passwd", "dir.x/etc/hosts"):  # not as they stand if that is outside
        with pytest.raises(ImageError, match="leads outside|no such file"):
            image_path(pictures, name)


def test_generated_names_open_nothing_outside(pictures):
    rng, parts = random.Random(0), ["..", ".", "n01", "up", "0.jpg", "secret", "etc", "", "~", "out", "C:", "\0", "in.jpg", "images", "%2e%2e"]
    real = os.path.realpath(pictures)
    found = 0
    for _ in range(10_000):
        name = rng.choice(["", "/", "\\"]) * rng.randint(0, 1) + rng.choice("/\\//").join(rng.choice(parts) for _ in range(rng.randint(1, 5)))
        try:
            path = str(image_path(pictures, name))
        except ImageError:
            continue
        assert os.path.realpath(path) == path and path.startswith(real + "/"), name
        found += 1
    assert found > 10


@pytest.fixture
def tokenizer():
    return Tokenizer(DATA / "spiece.model")


def mixture_with(tmp_path, ids):
    rows = [dict(context="Caption the image in German.", label=f"Bild Nummer {i}", image_id=name) for i, name in enumerate(ids)]
    return JsonMixture([(str(write(tmp_path / "m.json", rows)), None)], 0)


def test_batches_take_another_example_for_an_unusable_picture_and_say_so(tmp_path, pictures, tokenizer):
    mixture = mixture_with(tmp_path, ["0", "1", "n01/2.png", "3", "bad.jpg", "no.jpg", "../secret.jpg", "bad.jpg"])
    b = JsonBatches(mixture, tokenizer, ImageConfig(size=64), 8, pictures, tmp_path / "r.tsv", pool=2)
    for m in range(4):
        batch = b[m]
        assert batch["image"].shape == (8, 1, 3, 64, 64) and set(batch["picture"].tolist()) <= {0, 1, 2, 3}
        assert batch["image"].flatten(1).std(1).min() > 0.5, "no picture is black"
        for row, labels in zip(batch["picture"].tolist(), batch["labels"]):
            assert tokenizer.decode([i for i in labels.tolist() if i >= 0]) == f"Bild Nummer {row}"
    report = unusable_pictures(tmp_path / "r.tsv")
    assert report.startswith("3 pictures could not be used") and "no.jpg" in report and "bad.jpg" in report and "secret" in report
    assert unusable_pictures(tmp_path / "none.tsv") == "" and "... and 2 more" in unusable_pictures(tmp_path / "r.tsv", show=1)
    again = JsonBatches(mixture, tokenizer, ImageConfig(size=64), 8, pictures, tmp_path / "r.tsv", pool=2)
    loader = torch.utils.data.DataLoader(again, batch_size=None, sampler=range(4), num_workers=2)
    for mine, theirs in zip([b[m] for m in range(4)], loader, strict=True):
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert unusable_pictures(tmp_path / "r.tsv").startswith("3 pictures"), "each is counted once, whoever met it"


def test_a_wrong_image_root_stops_with_the_reason(tmp_path, pictures, tokenizer):
    mixture = mixture_with(tmp_path, ["x1", "x2"])
    with pytest.raises(ValueError, match="image_root.*no such folder"):
        JsonBatches(mixture, tokenizer, ImageConfig(size=64), 2, tmp_path / "nowhere", tmp_path / "r.tsv")
    with pytest.raises(ValueError, match="image_root.*20 examples in a row.*no such file"):
        JsonBatches(mixture, tokenizer, ImageConfig(size=64), 2, pictures, tmp_path / "r.tsv")[0]


def test_train_goes_through_a_mixture_file(tmp_path, pictures, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mixture_with(tmp_path, ["0", "no.jpg", "no2.jpg"])
    nano = PRESETS["nano"]
    small = replace(nano, vit=replace(nano.vit, width=16, layers=1, heads=2, mlp=16), queries=2,
                    qformer=replace(nano.qformer, width=16, layers=1, heads=2, mlp=16, vision_width=16),
                    mt5=replace(nano.mt5, width=16, heads=2, head_width=8, mlp=16, layers=1, decoder_layers=1))  # fmt: skip
    monkeypatch.setitem(PRESETS, "nano", small)
    monkeypatch.setattr(train, "LanguageID", lambda names: None)
    flags = ["--steps", "2", "--lr_warmup", "0", "--batch", "4", "--eval_pictures", "1", "--eval_every", "0", "--init", "random"]
    flags += ["--mixture", "m.json:2", "--image_root", "images", "--name", "r"]
    monkeypatch.setattr(train, "evaluate", lambda *args, **kwargs: ({}, []))  # what comes after training is tested elsewhere
    assert train.main(flags) == 0
    out, err = capsys.readouterr()
    assert "3 examples of m.json:2" in out and "could not be used" in err and "no.jpg" in err
    assert len(json.loads(Path("out/r/mixture.json").read_text())) == 1
    with pytest.raises(ValueError, match="--mixture and --image_root go together"):
        train.main(["--mixture", "m.json"])
    mixture_with(tmp_path, ["0", "1"])
    with pytest.raises(MixtureError, match="changed since the run began"):
        train.main(["--resume", "out/r"])


def test_memory_stays_flat(tmp_path):
    """Many examples in another process: as a parsed list they would take several hundred bytes each."""
    rows = make_rows(400)
    with open(tmp_path / "big.json", "w") as file:
        file.write("[" + ", ".join(json.dumps(rows[i % 400]) for i in range(100_000)) + "]")
    code = (
        "import resource, random\n"
        "from nanomblip.data.json_index import JsonExamples\n"
        "base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "e = JsonExamples('big.json')\n"
        "for _ in range(1000): e[random.randrange(len(e))]\n"
        "print(len(e), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    count, grown = map(int, run.stdout.split())
    assert count == 100_000 and grown * (1 if sys.platform == "darwin" else 1024) < 40e6
