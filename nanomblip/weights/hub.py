"""Official weights from the Hugging Face hub, politely: once, in parts that survive an interruption, and checked.

    GET {endpoint}/api/models/{repository}/revision/{revision}?blobs=true    the commit; size and hash of each file
    GET {endpoint}/{repository}/resolve/{commit}/{file}                      its bytes, behind a redirect

Only what is needed is fetched: config, tokenizer, picture settings and safetensors. A file grows under a temporary name
that carries its hash; when the connection is cut, or the process, the next request asks for the rest (`Range`). It gets
its real name only when size and hash (sha256 of large files, git's sha1 of small ones) are those that the hub promised.
`sha256.json` is written last; from then on nothing is asked of the network.

HF_ENDPOINT names a mirror. HF_TOKEN goes to that host and to no other, and into no message. With HF_HUB_OFFLINE=1
nothing is asked at all.
"""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from urllib.parse import quote

import requests
from tqdm import tqdm

from nanomblip.weights.catalogue import MODELS, PINNED, WANTED, HubError, check_pinned
from nanomblip.weights.files import INDEX, SINGLE, RunLock, is_plain_name, put_in_place, weight_map
from nanomblip.weights.records import RECORD, read_record, write_record

TIMEOUT = (10, 60)  # seconds to connect, and between two reads; requests itself would wait for ever
TRIES = 6  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second try, doubled each time
LONGEST_WAIT = 120.0  # seconds, whatever Retry-After says
CHUNK = 1 << 20
LARGEST_JSON = 50_000_000  # bytes of an answer that is kept in memory, and of any file but the weights


def _token() -> str:
    """HF_TOKEN, or ""; HubError (which does not say it) for one that cannot be sent."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):  # printable ASCII
        raise HubError("HF_TOKEN: holds a space, a line feed or another character that no token has; copy it again")
    return token


def _without_secrets(text: str) -> str:
    """A message without HF_TOKEN, which servers may echo, and without names and passwords in front of hosts."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        for form in {token, quote(token), quote(token, safe="")}:
            text = text.replace(form, "(HF_TOKEN)")
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


class _Token(requests.auth.AuthBase):
    """Puts HF_TOKEN on a request (as a header alone, requests would prefer ~/.netrc); requests drops it at a redirect
    to another host."""

    def __call__(self, request):
        if token := _token():
            request.headers["Authorization"] = f"Bearer {token}"
        return request


def is_offline() -> bool:
    given = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in given)


def is_complete(folder: Path) -> bool:
    """Whether a folder has all its weights: every file of its record, or without one (copied by hand) of its index."""
    if (folder / RECORD).exists():
        return all((folder / name).is_file() for name in read_record(folder)["files"])
    if not (folder / "config.json").is_file():
        return False
    names = set(weight_map(folder / INDEX).values()) if (folder / INDEX).is_file() else {SINGLE}
    return all((folder / name).is_file() for name in names)


def download(name: str, folder: Path, skip: str | None = None) -> Path:
    """Make `folder` hold an official model; returns it.

    name: one of MODELS, or owner/repository, or owner/repository@revision. skip: a shard that holds only keys starting
    with this is left out ("language_model." when only the ViT and the Q-Former are of use).
    Does nothing when the folder is complete. Raises HubError, in one line and without HF_TOKEN.
    """
    folder = Path(folder)
    try:
        if not is_complete(folder):
            _download(name, folder, skip)
        return folder
    except ValueError as error:
        problem = _without_secrets(" ".join(str(error).split()))
    raise HubError(problem)  # not inside `except`: what requests raises holds the request with its headers


def _download(name: str, folder: Path, skip: str | None) -> None:
    """`download` into a folder that is not complete."""
    short, _, revision = name.partition("@")
    repository, pinned = MODELS.get(short, (short, "main"))
    revision = asked = revision or pinned
    plain = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository) and re.fullmatch(r"[\w-][\w./-]*", revision)
    if not plain or ".." in revision:
        raise HubError(f"{name!r}: not the name of a model; give {', '.join(MODELS)} or owner/repository@revision")
    if is_offline():
        way_out = "unset it, or copy the files there"
        raise HubError(f"{folder}: not complete, and HF_HUB_OFFLINE forbids to download {repository}; {way_out}")
    if (folder / RECORD).exists():
        # Some of its files were deleted: they come back as they were, wherever the branch is now.
        source = read_record(folder)["source"]
        if (source.get("repository"), source.get("revision")) == (repository, revision):
            revision = source["commit"]
    endpoint = (os.environ.get("HF_ENDPOINT", "").strip() or "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise HubError(f"HF_ENDPOINT={endpoint}: must start with https:// or http://")
    _token()

    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(folder)
    except ValueError:
        raise HubError(f"{folder}: another process downloads into it; wait for it or stop it") from None
    try:
        with requests.Session() as session:
            session.auth = _Token()
            session.headers.update({"User-Agent": "nanomblip", "Accept-Encoding": "identity"})
            commit, offered = _list_files(session, endpoint, repository, revision)
            if short in PINNED and asked == pinned:
                check_pinned(short, commit, offered)
            files = _fetch_all(session, f"{endpoint}/{repository}/resolve/{commit}", folder, repository, offered, skip)
        write_record(folder, files, dict(repository=repository, revision=asked, commit=commit))
    finally:
        del lock  # else it would live as long as the traceback of an error


def _fetch_all(session, where: str, folder: Path, repository: str, offered: dict, skip: str | None) -> dict[str, str]:
    """Fetch the small files, then the shards if there is room for them; name -> sha256 of each."""
    files = {}
    for small in (*WANTED, INDEX):
        if small in offered:
            if offered[small][0] > LARGEST_JSON:
                raise HubError(f"{repository}: {small} has {offered[small][0]:,} bytes, which cannot be right")
            files[small] = _fetch(session, f"{where}/{quote(small)}", folder, small, *offered[small])
    for shard in (shards := _shards(folder, repository, offered, skip)):
        left = sum(offered[s][0] - _have(folder, s, offered[s][1]) for s in shards if s not in files)
        if left > (free := _free(folder)):
            room = f"{left / 1e9:.1f} GB are still to come and {free / 1e9:.1f} GB are free"
            raise HubError(f"{folder}: {room}; make room, then try again")
        files[shard] = _fetch(session, f"{where}/{quote(shard)}", folder, shard, *offered[shard])
    return files


def _free(folder: Path) -> float:
    """Bytes that a disk has room for; infinite where the file system does not say (an error, or a size of 0)."""
    try:
        usage = shutil.disk_usage(folder)
        return usage.free if usage.total else float("inf")
    except OSError:
        return float("inf")


def _list_files(session, endpoint: str, repository: str, revision: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The commit that a revision means, and its files: name -> size and hash (64 hex digits of sha256, 40 of git's)."""
    url = f"{endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    reply = _with_patience(lambda: _get_json(session, url), f"{repository}@{revision}")
    try:
        commit = reply["sha"]
        files = {}
        for file in reply["siblings"]:
            if is_plain_name(file["rfilename"]):  # with a slash: in a subfolder, of which none is needed
                lfs = file.get("lfs")
                files[file["rfilename"]] = (lfs["size"], lfs["sha256"]) if lfs else (file["size"], file["blobId"])
        fits = re.fullmatch("[0-9a-f]{40}", commit) and all(
            type(size) is int and size >= 0 and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest)
            for size, digest in files.values()
        )
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise HubError(
            f"{url}: the answer is not a list of files with sizes and hashes; is HF_ENDPOINT a copy of the hub?"
        )
    if "config.json" not in files:
        raise HubError(f"{repository}@{revision}: has no config.json, so it is not a model in the official layout")
    return commit, files


def _shards(folder: Path, repository: str, offered: dict, skip: str | None) -> list[str]:
    """Names of the safetensors files to fetch."""
    if INDEX in offered:
        keys_of = {}
        for key, shard in weight_map(folder / INDEX).items():
            keys_of.setdefault(shard, []).append(key)
        wanted = lambda keys: skip is None or not all(key.startswith(skip) for key in keys)
        shards = sorted(shard for shard, keys in keys_of.items() if wanted(keys))
        if absent := [s for s in shards if s not in offered]:
            raise HubError(f"{repository}: its index names {absent[0]}, which is not there")
        return shards
    if SINGLE in offered:
        return [SINGLE]
    pickles = sorted(name for name in offered if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    found = f"only {pickles[0]}, a pickle, which can run code and is never fetched" if pickles else "no weights"
    convert = (
        f"copy the pickle to {folder} and convert it, if you trust it: python -m nanomblip.weights.convert {folder}"
    )
    raise HubError(
        f"{repository}: {found}; give a revision with safetensors, as in {repository}@refs/pr/1, or {convert}"
    )


def _part(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest[:16]}.part"


def _have(folder: Path, name: str, digest: str) -> int:
    """Bytes of a file that are here already."""
    path = next((p for p in (folder / name, _part(folder, name, digest)) if p.is_file()), None)
    return path.stat().st_size if path else 0


class _Hash:
    """The hash that the hub gives for a file (git's sha1 of "blob <size>\\0" + content, or sha256), and our sha256."""

    def __init__(self, size: int, digest: str):
        self.own, self.git = hashlib.sha256(), hashlib.sha1(f"blob {size}\0".encode()) if len(digest) == 40 else None

    def update(self, data: bytes) -> None:
        self.own.update(data)
        if self.git is not None:
            self.git.update(data)

    def update_from(self, path: Path) -> None:
        with open(path, "rb") as file:
            while data := file.read(CHUNK):
                self.update(data)

    def hexdigest(self) -> str:
        return (self.own if self.git is None else self.git).hexdigest()


def _fetch(session, url: str, folder: Path, name: str, size: int, digest: str) -> str:
    """Make folder/name hold the promised bytes; returns their sha256. Goes on with what an earlier call left behind."""
    path, part = folder / name, _part(folder, name, digest)
    if path.is_file() and path.stat().st_size == size:
        sha = _Hash(size, digest)
        sha.update_from(path)
        if sha.hexdigest() == digest:
            return sha.own.hexdigest()
    for old in folder.glob(f".{name}.*.part"):
        if old != part:  # of another version of this file
            old.unlink()
    with tqdm(total=size, desc=name, unit="B", unit_scale=True, disable=None if size > CHUNK else True) as bar:
        sha = _with_patience(
            lambda: _rest(session, url, part, size, digest, bar), name, lambda: _have(folder, name, digest)
        )
    put_in_place(part, path)
    return sha


class _Again(Exception):
    """This request did not work, the next one may; `wait` are the seconds that the server asked for."""

    def __init__(self, message: str, wait: float = 0.0, status: int = 0):
        super().__init__(message)
        self.wait, self.status = wait, status


def _rest(session, url: str, part: Path, size: int, digest: str, bar) -> str:
    """Ask for what is missing of a file and append it; returns the sha256 of the whole. Raises _Again."""
    sha, have = _Hash(size, digest), 0
    if part.exists():
        have = part.stat().st_size
        if have > size:
            part.unlink()
            have = 0
        else:
            sha.update_from(part)
    bar.n = have
    bar.refresh()
    if have < size or not part.exists():
        try:
            reply = _open(session, url, {"Range": f"bytes={have}-"} if have else {})
        except _Again as again:
            if again.status == 416:  # this server cannot go on from there
                part.unlink(missing_ok=True)
            raise
        with reply:
            if have and not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                # 200, or another place: the range was ignored, this is the file from its start.
                sha, have = _Hash(size, digest), 0
                if reply.status_code == 206:
                    raise _Again("the server sent another part than the one asked for")
                bar.n = 0
            with open(part, "ab" if have else "wb") as file:
                for data in reply.iter_content(CHUNK):
                    have += len(data)
                    if have > size:
                        break
                    file.write(data)
                    sha.update(data)
                    bar.update(len(data))
        if have > size:
            part.unlink()
            raise _Again(f"more than the promised {size:,} bytes came")
        if have < size:
            raise _Again(f"the connection ended after {have:,} of {size:,} bytes")
    if sha.hexdigest() != digest:
        part.unlink(missing_ok=True)
        raise _Again(f"its hash is {sha.hexdigest()}, the hub promises {digest}")
    return sha.own.hexdigest()


def _get_json(session, url: str):
    copy = "is HF_ENDPOINT a copy of the hub"
    with _open(session, url, {}) as reply:
        text = b""
        for data in reply.iter_content(CHUNK):
            text += data
            if len(text) > LARGEST_JSON:
                raise HubError(f"{url}: the answer has more than {LARGEST_JSON:,} bytes; {copy}?")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise HubError(f"{url}: the answer is not JSON; {copy}, or is a login page in between?") from None


def _open(session, url: str, headers: dict):
    """Send a request and look at its status: a reply with a body worth reading, _Again, or HubError for what stays."""
    try:
        reply = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (OSError, ValueError) as error:  # requests.RequestException is an OSError
        if _may_pass(error):
            raise
        advice = (
            "pip install PySocks" if "SOCKS" in str(error) else "HF_ENDPOINT, the proxy or the certificates are wrong"
        )
        raise HubError(f"{url}: {_short(error)}; {advice}") from None
    status = reply.status_code
    if status in (200, 206) and reply.headers.get("Content-Encoding", "identity") == "identity":
        return reply
    reply.close()
    if status in (401, 403):
        token = "HF_TOKEN is not accepted" if _token() else "it wants a token: set HF_TOKEN"
        raise HubError(f"{url}: {status}, {token}; or the name is wrong, which the hub does not tell apart")
    if status in (404, 410):
        raise HubError(f"{url}: {status}, no such repository, revision or file")
    if status in (200, 206, 408, 416, 425, 429) or status >= 500:
        seconds = reply.headers.get("Retry-After", "")
        wait = float(seconds) if seconds.isdecimal() else 0.0
        raise _Again("compressed, though that was declined" if status < 300 else f"status {status}", wait, status)
    raise HubError(f"{url}: status {status}")


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: what the network does passes, what was set up wrongly stays.

    requests says a ValueError for what it cannot even try (an address, a scheme, SOCKS without PySocks), and an OSError
    of another kind for files of certificates that are not there.
    """
    if isinstance(error, (ValueError, requests.exceptions.TooManyRedirects)):
        return False
    if isinstance(error, requests.exceptions.SSLError):  # a certificate, another protocol; EOF: cut
        return "EOF" in str(error)
    if isinstance(error, requests.exceptions.ProxyError):  # a login is missing, or the host is forbidden
        return not re.search(r"Tunnel connection failed: 4\d\d", str(error))
    return isinstance(error, requests.RequestException)


def _short(error: Exception) -> str:
    """What went wrong, in one line: urllib3 puts the cause behind the address."""
    text = _without_secrets(" ".join(str(error).split()))  # before it is cut: half a token is a secret too
    return text[text.find("(Caused by") + 1 :][:250]


def _with_patience(request, what: str, progress=lambda: 0):
    """Call `request` until it succeeds. HubError when the bytes that `progress()` counts did not grow in TRIES calls in
    a row, or were thrown away TRIES times."""
    idle, thrown, before = 0, 0, progress()
    while True:
        try:
            return request()
        except (_Again, requests.RequestException) as error:
            reason, wait = _short(error), getattr(error, "wait", 0.0)
        except OSError as error:
            kept = "what came so far is kept, try again when there is room"
            raise HubError(f"{what}: cannot be written ({error}); {kept}") from None
        now = progress()
        idle, thrown, before = 0 if now > before else idle + 1, thrown + (now < before), now
        if max(idle, thrown) >= TRIES:
            kept = "what came so far is kept, try again later"
            raise HubError(f"{what}: given up after {TRIES} tries in vain, the last: {reason}; {kept}")
        time.sleep(min(max(wait, BACKOFF * 2 ** max(0, idle - 1)), LONGEST_WAIT))
