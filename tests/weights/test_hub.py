"""The downloader against a server on this machine that does everything wrong that servers do."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest
import requests
from conftest import tiny_mblip

from nanomblip.weights import catalogue, files, hub
from nanomblip.weights.hub import HubError, download
from nanomblip.weights.layout import WeightsError
from nanomblip.weights.load import load_mblip, load_vision
from nanomblip.weights.records import RECORD, read_record
from nanomblip.weights.save import save_mblip

ROOT = Path(__file__).resolve().parents[2]
COMMIT, OTHER_COMMIT = "c0ffee" * 6 + "c0ff", "0" * 40


class Server:
    """Some of the hub's API. `faults` is a list of functions (handler, file name, bytes) -> bool, the first of which treats the next request
    for a file and says whether it answered; `seen` are all requests."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.seen, self.commit = files, [], [], COMMIT
        self.list_status, self.token, self.storage = 200, None, None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                outer.seen.append((self.path, dict(self.headers)))
                try:
                    outer.answer(self)
                except ConnectionError:  # the client went away
                    pass

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def close(self):
        self.http.shutdown()
        self.http.server_close()

    def reply(self, handler, status, body=b"", promised=None, **headers):
        handler.send_response(status)
        for key, value in headers.items():
            handler.send_header(key.replace("_", "-"), str(value))
        handler.send_header("Content-Length", str(len(body) if promised is None else promised))
        handler.end_headers()
        handler.wfile.write(body)
        if promised is not None and promised != len(body):
            handler.wfile.flush()
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)

    def listing(self):
        siblings = []
        for name, data in self.files.items():
            entry = dict(rfilename=name, size=len(data), blobId=hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())
            if name.endswith((".safetensors", ".model", ".bin")):
                entry["lfs"] = dict(size=len(data), sha256=hashlib.sha256(data).hexdigest(), pointerSize=134)
            siblings.append(entry)
        return dict(sha=self.commit, siblings=siblings)

    def answer(self, handler):
        path = handler.path.split("?")[0]
        if self.token is not None and handler.headers.get("Authorization") != f"Bearer {self.token}" and self.storage is None:
            return self.reply(handler, 401)
        if path.startswith("/api/"):
            return self.reply(handler, self.list_status, json.dumps(self.listing()).encode())
        name = path.rpartition("/")[2]
        if self.storage is not None:
            return self.reply(handler, 302, Location=f"{self.storage}/storage/{name}?signature=1")
        data = self.files[name]
        if self.faults and self.faults.pop(0)(self, handler, name, data):
            return None
        self.serve(handler, data)

    def serve(self, handler, data, cut=None):
        """The bytes that were asked for, of which only `cut` come."""
        start = handler.headers.get("Range")
        if start is None:
            return self.reply(handler, 200, data[:cut], len(data))
        start = int(start.removeprefix("bytes=").rstrip("-"))
        if start >= len(data):
            return self.reply(handler, 416)
        rest = data[start:]
        return self.reply(handler, 206, rest[:cut], len(rest), Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")


def cut(n):
    return lambda server, handler, name, data: server.serve(handler, data, n) or True


def status(code, **headers):
    return lambda server, handler, name, data: server.reply(handler, code, b"sorry", **headers) or True


def wrong_bytes(server, handler, name, data):
    return server.serve(handler, bytes([data[0] ^ 1]) + data[1:-1] + bytes([data[-1] ^ 1])) or True


def ignore_range(server, handler, name, data):
    return server.reply(handler, 200, data) or True


def cut_and_ignore_range(n):
    return lambda server, handler, name, data: server.reply(handler, 200, data[:n], len(data)) or True


def too_much(server, handler, name, data):
    return server.reply(handler, 200, data + b"and more") or True


def other_part(server, handler, name, data):
    return server.reply(handler, 206, data[:10], Content_Range=f"bytes 0-9/{len(data)}") or True


def compressed(server, handler, name, data):
    import gzip

    return server.reply(handler, 200, gzip.compress(data), Content_Encoding="gzip") or True


def stall(server, handler, name, data):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:1000])
    handler.wfile.flush()
    time.sleep(1.0)
    handler.close_connection = True
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model in three files, as they lie on the hub."""
    folder = tmp_path_factory.mktemp("model")
    save_mblip(tiny_mblip(), folder, image_token=66, shard=110_000)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len([name for name in files if name.endswith(".safetensors")]) == 3
    return files | {"spiece.model": b"pieces" * 100, "preprocessor_config.json": b"{}", "pytorch_model.bin": b"pickle", ".gitattributes": b"x",
                    "README.md": b"words"}  # fmt: skip


@pytest.fixture
def server(model, monkeypatch):
    server = Server(dict(model))
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(hub, "BACKOFF", 0.0)
    monkeypatch.setattr(hub, "CHUNK", 1000)
    monkeypatch.setattr(hub, "TIMEOUT", (2, 0.3))
    yield server
    server.close()


WEIGHTS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
FETCHED = sorted(["config.json", "preprocessor_config.json", "spiece.model", "model.safetensors.index.json", *WEIGHTS])


def check(folder, server):
    """Every file is there to the bit, nothing else is, and the record says where it comes from."""
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FETCHED, RECORD])
    assert all((folder / name).read_bytes() == server.files[name] for name in FETCHED)
    record = read_record(folder)
    assert {name: entry["sha256"] for name, entry in record["files"].items()} == {
        name: hashlib.sha256(server.files[name]).hexdigest() for name in FETCHED}  # fmt: skip


def test_a_model_is_fetched_once_and_loads(server, tmp_path):
    folder = download("owner/name", tmp_path / "m")
    check(folder, server)
    assert read_record(folder)["source"] == dict(repository="owner/name", revision="main", commit=COMMIT)
    load_mblip(folder)
    paths = [path for path, _ in server.seen]
    assert paths[0] == "/api/models/owner/name/revision/main?blobs=true" and len(paths) == 1 + len(FETCHED)
    assert all(f"/owner/name/resolve/{COMMIT}/" in path for path in paths[1:])
    download("owner/name", folder)
    assert len(server.seen) == len(paths)


def test_hundreds_of_cuts_at_random_offsets_cost_no_byte_twice(server, tmp_path):
    rng = random.Random(0)
    for run in range(25):
        server.seen.clear()
        server.faults = [cut(rng.randrange(1, 40_000)) for _ in range(rng.randrange(8, 40))]
        check(download("owner/name", tmp_path / f"m{run}"), server)
    ranges = [headers.get("Range") for _, headers in server.seen]
    assert any(ranges) and all(r is None or int(r[6:-1]) > 0 for r in ranges)


@pytest.mark.parametrize("faults", [
    [cut(30_000), ignore_range], [cut(500), cut_and_ignore_range(400), cut_and_ignore_range(10)], [wrong_bytes], [cut(30_000), wrong_bytes],
    [too_much], [cut(1000), other_part], [compressed], [stall], [status(429, Retry_After=0)], [status(500), status(503), status(502)],
    [status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")], [cut(1000), status(416)], [cut(0), cut(0), cut(0)],
])  # fmt: skip
def test_one_fault_after_the_other_and_still_the_right_bytes(server, tmp_path, faults):
    small = ["config.json", "preprocessor_config.json", "spiece.model", "model.safetensors.index.json"]
    server.faults = [lambda *args: False] * len(small) + faults
    check(download("owner/name", tmp_path / "m"), server)


@pytest.mark.parametrize("fault,words", [(status(500), "status 500"), (wrong_bytes, "promises"), (cut(0), "in vain"), (ignore_range, None),
                                         (too_much, "more than the promised"), (status(403), "403, it wants a token: set HF_TOKEN"),
                                         (status(404), "404, no such"), (status(416), "416"), (status(418), "418"), (compressed, "compressed")])  # fmt: skip
def test_a_fault_that_stays_is_one_line_and_nothing_has_its_real_name(server, tmp_path, fault, words):
    server.faults = [fault] * 1000
    if words is None:
        return check(download("owner/name", tmp_path / "m"), server)
    with pytest.raises(HubError, match=words) as error:
        download("owner/name", tmp_path / "m")
    assert "\n" not in str(error.value) and len(server.seen) < 20
    assert all(path.name.startswith(".") for path in (tmp_path / "m").iterdir())
    server.faults = []  # the server is mended: the same call succeeds
    check(download("owner/name", tmp_path / "m"), server)


def test_the_wait_grows_and_the_server_may_ask_for_more(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(hub, "BACKOFF", 1.0)
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    server.faults = [status(503)] * 3 + [status(429, Retry_After=40), status(429, Retry_After=9999)]
    check(download("owner/name", tmp_path / "m"), server)
    assert waits == [1, 2, 4, 40, hub.LONGEST_WAIT]


@pytest.mark.parametrize("listed,words", [(401, "set HF_TOKEN"), (404, "no such repository"), (500, "in vain")])
def test_the_list_itself_can_fail(server, tmp_path, listed, words):
    server.list_status = listed
    with pytest.raises(HubError, match=words):
        download("owner/name", tmp_path / "m")


@pytest.mark.parametrize("answer", ["[]", "{}", "<html>", '{"sha": 5, "siblings": []}', '{"sha": "%s", "siblings": [{}]}' % COMMIT, "[" * 100_000,
                                    '{"sha": "%s", "siblings": [{"rfilename": "config.json", "size": -1, "blobId": "00"}]}' % COMMIT])  # fmt: skip
def test_a_strange_list_is_refused(server, tmp_path, answer, monkeypatch):
    monkeypatch.setattr(server, "listing", lambda: None)
    monkeypatch.setattr(json, "dumps", lambda value: answer)
    with pytest.raises(HubError, match="HF_ENDPOINT"):
        download("owner/name", tmp_path / "m")


def test_the_token_goes_to_the_endpoint_only(server, model, tmp_path, monkeypatch):
    storage = Server(dict(model))
    try:
        server.storage = storage.url.replace("127.0.0.1", "localhost")
        monkeypatch.setenv("HF_TOKEN", "secret")
        check(download("owner/name", tmp_path / "m"), server)
        assert all(headers.get("Authorization") == "Bearer secret" for _, headers in server.seen)
        assert len(storage.seen) == len(FETCHED) and "secret" not in json.dumps(storage.seen)
    finally:
        storage.close()


def test_a_token_that_is_not_accepted_is_told_from_one_that_is_missing(server, tmp_path, monkeypatch):
    server.token = "right"
    with pytest.raises(HubError, match="set HF_TOKEN"):
        download("owner/name", tmp_path / "m")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(HubError, match="not accepted"):
        download("owner/name", tmp_path / "m")
    monkeypatch.setenv("HF_TOKEN", "right")
    check(download("owner/name", tmp_path / "m"), server)


def test_offline_asks_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        download("owner/name", tmp_path / "m")
    assert not server.seen and not (tmp_path / "m").exists()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    download("owner/name", tmp_path / "m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "socket", None)
    download("owner/name", tmp_path / "m")


def test_a_deleted_file_comes_back_from_the_same_commit(server, tmp_path):
    folder = download("owner/name", tmp_path / "m")
    server.commit, server.files["config.json"] = OTHER_COMMIT, b"{}"
    (folder / WEIGHTS[1]).unlink()
    server.seen.clear()
    with pytest.MonkeyPatch.context() as patch:  # the server shows an old commit as it was
        patch.setattr(server, "files", dict(server.files, **{"config.json": (folder / "config.json").read_bytes()}))
        patch.setattr(server, "commit", COMMIT)
        check(download("owner/name", folder), server)
    assert f"revision/{COMMIT}" in server.seen[0][0] and [path.rpartition("/")[2] for path, _ in server.seen[1:]] == [WEIGHTS[1]]


def test_a_new_version_throws_the_old_half_away(server, tmp_path):
    server.faults = [lambda *args: False] * 4 + [cut(30_000)] + [status(404)]
    with pytest.raises(HubError):
        download("owner/name", tmp_path / "m")
    (half,) = (tmp_path / "m").glob(".*.part")
    assert half.stat().st_size > 1000
    server.files[WEIGHTS[0]] = server.files[WEIGHTS[0]][:-4] + b"abcd"
    check(download("owner/name", tmp_path / "m"), server)


def test_shards_of_the_language_model_alone_are_left_out(server, tmp_path):
    where = json.loads(server.files["model.safetensors.index.json"])["weight_map"]
    folder = download("owner/name", tmp_path / "m", skip="language_")
    absent = {name for name in WEIGHTS if all(key.startswith("language_") for key, shard in where.items() if shard == name)}
    assert absent and {path.name for path in folder.glob("*.safetensors")} == set(WEIGHTS) - absent
    load_vision(folder, tiny_mblip().mt5)
    with pytest.raises(WeightsError, match="no such file"):
        load_mblip(folder)


def test_only_pickles_and_no_weights_at_all(server, tmp_path):
    for name in (*WEIGHTS, "model.safetensors.index.json"):
        server.files.pop(name)
    with pytest.raises(HubError, match="pickle.*python -m nanomblip.weights.convert"):
        download("owner/name", tmp_path / "m")
    server.files.pop("pytorch_model.bin")
    with pytest.raises(HubError, match="no weights"):
        download("owner/name", tmp_path / "m")


@pytest.mark.parametrize("name", ["../up.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "C:x.safetensors", ".hidden.safetensors", "a\0.safetensors",
                                  "sub/x.safetensors", "..", "config.json"])  # fmt: skip
def test_no_file_outside_the_folder_is_written(server, tmp_path, name):
    index = json.loads(server.files["model.safetensors.index.json"])
    index["weight_map"] = {key: name for key in index["weight_map"]}
    server.files["model.safetensors.index.json"] = json.dumps(index).encode()
    server.files[name] = b"evil" if name != "config.json" else server.files[name]
    with pytest.raises((HubError, WeightsError), match="plain name"):
        download("owner/name", tmp_path / "deep" / "m")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"] and [p.name for p in (tmp_path / "deep").iterdir()] == ["m"]


@pytest.mark.parametrize("name", ["../../etc", "nobody", "a/b/c", "a/b@../x", "a/b@x y", "a b/c", "-/..", "owner/name@"])
def test_names_of_models(server, tmp_path, name):
    if name == "owner/name@":
        return check(download(name, tmp_path / "m"), server)
    with pytest.raises(HubError, match="not the name of a model"):
        download(name, tmp_path / "m")
    assert not server.seen


def test_a_revision_with_a_slash(server, tmp_path):
    download("owner/name@refs/pr/1", tmp_path / "m")
    assert server.seen[0][0].startswith("/api/models/owner/name/revision/refs%2Fpr%2F1?")


def test_a_full_disk_keeps_what_came(server, tmp_path, monkeypatch):
    class Usage:
        total, free = 10**9, 50_000

    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda folder: Usage)
        with pytest.raises(HubError, match="make room"):
            download("owner/name", tmp_path / "m")
    resource = pytest.importorskip("resource")
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        with pytest.raises(HubError, match="cannot be written.*is kept"):
            download("owner/name", tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list((tmp_path / "m").glob("*.safetensors"))
    check(download("owner/name", tmp_path / "m"), server)


def test_killed_while_downloading_and_called_again(server, tmp_path):
    """A real process, killed in the middle of a file: the next one goes on from there."""

    def slow(reached, server, handler, name, data):
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        handler.send_header("Content-Length", str(len(data) - start))
        handler.end_headers()
        for i in range(start, len(data), 1000):
            handler.wfile.write(data[i : i + 1000])
            handler.wfile.flush()
            if i - start > 5000:
                reached.set()
            time.sleep(0.02)
        return True

    code = "import sys; from nanomblip.weights import hub; hub.CHUNK = 1000; hub.download('owner/name', sys.argv[1])"
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        reached = threading.Event()
        server.faults = [lambda *args: False] * (0 if (tmp_path / "m").exists() else 4) + [partial(slow, reached)] * 10
        child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m")], env=environ, stderr=subprocess.DEVNULL)
        assert reached.wait(30)
        with pytest.raises(HubError, match="another process"):
            download("owner/name", tmp_path / "m")
        child.kill()
        child.wait()
        assert list((tmp_path / "m").glob(".*.part")) and not (tmp_path / "m" / RECORD).exists()
    server.faults = []
    server.seen.clear()
    check(download("owner/name", tmp_path / "m"), server)
    assert any("Range" in headers for _, headers in server.seen)


def test_a_file_that_was_touched_since_is_hashed(server, tmp_path):
    folder = download("owner/name", tmp_path / "m")
    path = folder / WEIGHTS[0]
    os.utime(path, (1, 1))
    load_mblip(folder)  # touched, not changed
    assert read_record(folder)["files"][WEIGHTS[0]]["mtime_ns"] == 1_000_000_000
    data = bytearray(path.read_bytes())
    rng = random.Random(1)
    for _ in range(100):  # one bit anywhere in the data, which leaves a valid file of finite numbers or not
        i, bit = rng.randrange(2000, len(data)), 1 << rng.randrange(8)
        data[i] ^= bit
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="sha256"):
            load_mblip(folder)
        data[i] ^= bit
    path.write_bytes(data)
    load_mblip(folder)


# -------------------------------------------------------------------------------------------------------- secrets

TOKEN = "hf_" + "Zx9+/kQ" * 5


def everything_of(error: BaseException) -> str:
    """All that any printer of tracebacks could show of an error: itself, and what it is chained to, suppressed or not."""
    text, seen = "", set()
    todo = [error]
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        text += "".join(traceback.format_exception(one, chain=False)) + repr(one) + repr(one.__dict__)
        todo += [one.__cause__, one.__context__]
    return text


def secrets_in(text: str) -> list[str]:
    return [form for form in (TOKEN, quote(TOKEN), quote(TOKEN, safe=""), TOKEN[3:15], "hunter2") if form in text]


def echo(*parts):
    """What the server was given, where it should not say it."""

    def fault(server, handler, name, data):
        given = handler.headers.get("Authorization", "")
        if "body" in parts:
            return server.reply(handler, 403, given.encode()) or True
        if "reason" in parts:
            handler.send_response(418, given)
            handler.end_headers()
            handler.close_connection = True
            return True
        return server.reply(handler, 302, Location=parts[0].format(token=quote(given.removeprefix("Bearer ")))) or True

    return fault


def cut_then_refuse(server, handler, name, data):
    return (server.serve(handler, data, 100) if "Range" not in handler.headers else server.reply(handler, 403)) or True


def drop(server, handler, name, data):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


@pytest.mark.parametrize("fault", [
    status(401), status(403), status(404), status(500), status(418), status(407), status(429, Retry_After="1" * 400), wrong_bytes, cut(0),
    cut_then_refuse, drop, compressed, too_much, other_part, echo("body"), echo("reason"), echo("http://localhost:1/{token}?token={token}"),
    echo("http://localhost:1/plain"), echo("ftp://other/{token}"),
    echo("http://user:{token}@localhost:1/"), echo("http://{token}.invalid/"), echo("http://[{token}/"), echo("//"),
])  # fmt: skip
@pytest.mark.parametrize("listing", [False, True])
def test_no_failure_shows_the_token_anywhere(server, tmp_path, monkeypatch, capfd, fault, listing):
    """In no line, no traceback (chained or not) and no file: whatever fails, when the list is asked for and when a file is."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(hub, "LONGEST_WAIT", 0.0)
    server.faults = [fault] * 1000
    if listing:
        monkeypatch.setattr(server, "answer", lambda handler: fault(server, handler, "list", b"{}" * 1000))
    with pytest.raises(HubError) as error:
        download("owner/name", tmp_path / "m")
    shown = everything_of(error.value) + "".join(capfd.readouterr())
    assert any(headers.get("Authorization") == f"Bearer {TOKEN}" for _, headers in server.seen)
    assert not secrets_in(shown) and "\n" not in str(error.value)
    for path in tmp_path.rglob("*"):
        assert not secrets_in(str(path)) and not (path.is_file() and secrets_in(path.read_bytes().decode("latin-1")))


@pytest.mark.parametrize("answer", ["Bearer TOKEN", '{"error": "TOKEN"}', '{"sha": "TOKEN", "siblings": []}',
                                    '{"sha": "%s", "siblings": [{"rfilename": "TOKEN.bin", "size": 1, "blobId": "%s"}, {"rfilename": '
                                    '"config.json", "size": 2, "blobId": "9e26dfeeb6e641a33dae4961196235bdb965b21b"}]}' % (COMMIT, "0" * 40)])  # fmt: skip
def test_no_list_that_echoes_the_token_shows_it(server, tmp_path, monkeypatch, capfd, answer):
    token = "hf_abcdefgh12345678"
    monkeypatch.setenv("HF_TOKEN", token)
    listing = answer.replace("TOKEN", token).encode()
    monkeypatch.setattr(server, "answer", lambda handler: server.reply(handler, 200, listing if "/api/" in handler.path else b"{}"))
    with pytest.raises(HubError) as error:
        download("owner/name", tmp_path / "m")
    assert token[3:11] not in everything_of(error.value) + "".join(capfd.readouterr())


@pytest.mark.parametrize("token", ["hf_a\nhf_b", "hf_a\rX: y", "hf_a b", "hf_\0", "hf_ü", "hf_…", "\ufeffhf_a", "hf_a\thf_b", "hf_\x7f"])
def test_a_token_that_cannot_be_sent_is_refused_before_it_is(server, tmp_path, monkeypatch, capfd, token):
    monkeypatch.setattr(hub.os, "environ", os.environ | {"HF_TOKEN": token})  # a NUL cannot be in a real one
    with pytest.raises(HubError, match="HF_TOKEN: .* copy it again") as error:
        download("owner/name", tmp_path / "m")
    shown = everything_of(error.value) + "".join(capfd.readouterr())
    assert "hf_" not in shown and not server.seen and not (tmp_path / "m").exists()


def test_space_around_a_token_is_taken_off(server, tmp_path, monkeypatch):
    server.token = TOKEN
    monkeypatch.setenv("HF_TOKEN", f" {TOKEN}\r\n")
    monkeypatch.setenv("HF_ENDPOINT", f" {server.url}/\n")
    check(download("owner/name", tmp_path / "m"), server)


def test_half_a_token_at_the_end_of_a_long_message_is_one_too(server, tmp_path, monkeypatch):
    """Long messages of the network are cut: the token goes first."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for pad in range(60, 260, 7):
        monkeypatch.setattr(hub.requests.Session, "get", lambda *args, **more: fail_with(requests.ConnectionError("x" * pad + TOKEN)))
        with pytest.raises(HubError) as error:
            download("owner/name", tmp_path / "m")
        assert TOKEN[:6] not in str(error.value)


def fail_with(error):
    raise error


# ---------------------------------------------------------------------------------- mistakes that no patience mends


def once(server, tmp_path, monkeypatch, **environ):
    """The error of one call in an environment, after which it must not have waited."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    with pytest.raises(HubError) as error:
        download("owner/name", tmp_path / "m")
    assert not waits and "\n" not in str(error.value) and not secrets_in(everything_of(error.value))
    return str(error.value)


@pytest.mark.parametrize("proxy", ["http:///", "http://user:hunter2@proxy:notaport", "ftp://user:hunter2@127.0.0.1:1", "http://exa mple:3",
                                   "http://user:hunter2@[::1"])  # fmt: skip
def test_a_proxy_that_cannot_be_is_said_at_once(server, tmp_path, monkeypatch, proxy):
    assert "the proxy" in once(server, tmp_path, monkeypatch, HTTP_PROXY=proxy) and not server.seen


def test_a_socks_proxy_without_pysocks_says_what_to_install(server, tmp_path, monkeypatch):
    def missing(*args, **kwargs):  # as requests.adapters has it where PySocks is not there
        raise requests.exceptions.InvalidSchema("Missing dependencies for SOCKS support.")

    monkeypatch.setattr(requests.adapters, "SOCKSProxyManager", missing)
    assert "pip install PySocks" in once(server, tmp_path, monkeypatch, HTTP_PROXY="socks5://user:hunter2@127.0.0.1:1080")


@pytest.mark.parametrize("endpoint", ["https://", "http://127.0.0.1:999999", "http://exa mple", "http://.foo", "http://[::1", "http://*",
                                      f"http://{'a' * 70}.com", "http://user:hunter2@[::1"])  # fmt: skip
def test_an_endpoint_that_cannot_be_is_said_at_once(server, tmp_path, monkeypatch, endpoint):
    assert "HF_ENDPOINT" in once(server, tmp_path, monkeypatch, HF_ENDPOINT=endpoint)


def test_certificates_are_said_at_once(server, tmp_path, monkeypatch):
    plain = server.url.replace("http://", "https://")
    assert "certificates" in once(server, tmp_path, monkeypatch, HF_ENDPOINT=plain)  # no TLS behind it
    assert "CA certificate" in once(server, tmp_path, monkeypatch, HF_ENDPOINT=plain, REQUESTS_CA_BUNDLE="/nowhere")


def test_a_certificate_that_nobody_signed(server, tmp_path, monkeypatch):
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {cert} -days 2 -subj /CN=localhost"
    if not shutil.which("openssl") or subprocess.run(command.split(), capture_output=True).returncode:
        pytest.skip("openssl is not here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    secure = Server({})
    secure.http.socket = context.wrap_socket(secure.http.socket, server_side=True)
    try:
        url = secure.url.replace("http://127.0.0.1", "https://localhost")
        assert "CERTIFICATE_VERIFY_FAILED" in once(server, tmp_path, monkeypatch, HF_ENDPOINT=url)
    finally:
        secure.close()


def test_a_proxy_that_forbids_and_one_that_is_not_there(server, tmp_path, monkeypatch):
    class Proxy(BaseHTTPRequestHandler):
        def do_CONNECT(self):
            self.send_response(407)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
    try:
        where = f"http://user:hunter2@127.0.0.1:{proxy.server_port}"
        assert "407" in once(server, tmp_path, monkeypatch, HTTPS_PROXY=where, HF_ENDPOINT="https://hub.invalid")
    finally:
        proxy.shutdown()
        proxy.server_close()
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    with pytest.raises(HubError, match="given up after 6 tries") as error:  # the proxy may come back
        download("owner/name", tmp_path / "m")
    assert len(waits) == hub.TRIES - 1 and not secrets_in(everything_of(error.value))


def test_a_file_system_without_locks_without_fsync_and_without_a_size(server, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    class Usage:
        total = free = 0

    for module, call in ((files.fcntl, "flock"), (files.os, "fsync"), (files.Path, "chmod"), (hub.shutil, "disk_usage")):
        monkeypatch.setattr(module, call, fail)
    check(download("owner/name", tmp_path / "m"), server)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda folder: Usage)
    check(download("owner/name", tmp_path / "n"), server)


@pytest.mark.parametrize("name", list(catalogue.PINNED))
def test_translators_come_from_their_pinned_branches(server, tmp_path, monkeypatch, name):
    """Of the weights the sha256 is known, or the commit; of the tokenizer always the sha256."""
    start, known = catalogue.PINNED[name]
    server.files = {"config.json": b"{}", "sentencepiece.bpe.model": b"tokens" * 99, "model.safetensors": b"weights" * 99, "pytorch_model.bin": b"x"}
    sha = lambda file: hashlib.sha256(server.files[file]).hexdigest()
    monkeypatch.setattr(catalogue, "NLLB_TOKENIZER", (594, sha("sentencepiece.bpe.model")))
    monkeypatch.setitem(catalogue.PINNED, name, (start, known and sha("model.safetensors")))
    server.commit = OTHER_COMMIT if known else start + OTHER_COMMIT[7:]
    folder = download(name, tmp_path / "m")
    repository, revision = catalogue.MODELS[name]
    assert server.seen[0][0] == f"/api/models/{repository}/revision/{revision.replace('/', '%2F')}?blobs=true"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "sentencepiece.bpe.model", RECORD]
    good = dict(server.files)
    for file in ["sentencepiece.bpe.model"] + ["model.safetensors"] * bool(known):
        server.files = good | {file: good[file][:-1] + b"!"}
        with pytest.raises(HubError, match=f"other files.*ask for {repository}@{server.commit}"):
            download(name, tmp_path / "other")
    server.files = good
    if not known:
        server.commit = OTHER_COMMIT
        with pytest.raises(HubError, match="other files"):
            download(name, tmp_path / "other")
    download(f"{repository}@{server.commit}", tmp_path / "other")  # by its commit it is taken as it is
