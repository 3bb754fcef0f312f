"""Official weights from the Hugging Face hub, politely: once, in pieces that survive an interruption, and checked.

    GET {endpoint}/api/models/{repository}/revision/{revision}?blobs=true    the commit, and of each file its size and hash
    GET {endpoint}/{repository}/resolve/{commit}/{file}                      its bytes, behind a redirect to a storage host

Only what is needed is fetched: config, tokenizer, picture settings and safetensors. A file grows under a temporary name that
carries its hash; when the connection is cut, or the process, the next request asks for the rest (`Range`). It gets its real name only
when size and hash (sha256 of large files, git's sha1 of small ones) are those that the hub promised. `sha256.json` is written last; from
then on nothing is asked of the network.

HF_ENDPOINT names a mirror, HF_TOKEN goes to that host and to no other, with HF_HUB_OFFLINE=1 nothing is asked at all.
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

from nanomblip.weights.files import RunLock, is_plain_name
from nanomblip.weights.load import INDEX, SINGLE, weight_map
from nanomblip.weights.records import RECORD, read_record, write_record

# Name -> repository and revision. A branch can move, so the commit that it meant is kept in the record of the folder; see weights/README.md.
MODELS = {
    "mblip-mt0-xl": ("Gregor/mblip-mt0-xl", "main"),
    "blip2-flan-t5-xl": ("Salesforce/blip2-flan-t5-xl", "main"),
    **{f"mt0-{size}": (f"bigscience/mt0-{size}", "main") for size in ("small", "base", "large", "xl", "xxl")},
    "nllb-200-distilled-600M": ("facebook/nllb-200-distilled-600M", "refs/pr/29"),
    "nllb-200-distilled-1.3B": ("facebook/nllb-200-distilled-1.3B", "refs/pr/5"),
    "nllb-200-1.3B": ("facebook/nllb-200-1.3B", "refs/pr/5"),
    "nllb-200-3.3B": ("facebook/nllb-200-3.3B", "refs/pr/10"),
}
# The translators have only pickles on main. These branches hold what the hub's own bot made of them. Something else
# could be put there, so here is what it was: the start of the commit, and the sha256 of the weights where it is known.
PINNED = {
    "nllb-200-distilled-600M": ("38bd1c6", "ca41e084084466b348cdc519f9762bcfc6c352f35c2fbee5588194de8da63da8"),
    "nllb-200-distilled-1.3B": ("f9e6ff7", None),
    "nllb-200-1.3B": ("05f78f6", "ec6bf30b411f1714657b558ccc2ecc41d9b341c631f38a39fbcb4ec104d34796"),
    "nllb-200-3.3B": ("f046cc4", None),
}
NLLB_TOKENIZER = (4_852_054, "14bb8dfb35c0ffdea7bc01e56cea38b9e3d5efcdcb9c251d6b40538e1aab555a")  # of all four
WANTED = ("config.json", "preprocessor_config.json", "processor_config.json", "spiece.model", "sentencepiece.bpe.model",
          "tokenizer_config.json", "special_tokens_map.json")  # fmt: skip

TIMEOUT = (10, 60)  # seconds to connect, and between two pieces; requests itself would wait for ever
TRIES = 6  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second try, doubled each time
LONGEST_WAIT = 120.0  # seconds, whatever Retry-After says
CHUNK = 1 << 20
LARGEST_JSON = 50_000_000  # bytes of an answer that is kept in memory, and of any file but the weights


class HubError(ValueError):
    """A download that did not succeed; the message names the file, what happened and what to do."""


class _Token(requests.auth.AuthBase):
    """Puts HF_TOKEN on a request (as a header alone, requests would prefer ~/.netrc); requests drops it at a redirect to another host."""

    def __call__(self, request):
        if token := os.environ.get("HF_TOKEN", "").strip():
            request.headers["Authorization"] = f"Bearer {token}"
        return request


def is_offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def is_complete(folder: Path) -> bool:
    """Whether a folder has all its weights: every file of its record, or without one (copied by hand) every file of its index."""
    if (folder / RECORD).exists():
        return all((folder / name).is_file() for name in read_record(folder)["files"])
    if not (folder / "config.json").is_file():
        return False
    names = set(weight_map(folder / INDEX).values()) if (folder / INDEX).is_file() else {SINGLE}
    return all((folder / name).is_file() for name in names)


def download(name: str, folder: Path, skip: str | None = None) -> Path:
    """Make `folder` hold the official model `name` (one of MODELS, or owner/repository, or owner/repository@revision); returns it.

    skip: a shard that holds only keys starting with this is left out ("language_model." when only the ViT and the Q-Former are of use).
    Does nothing when the folder is complete. Raises HubError.
    """
    folder = Path(folder)
    if is_complete(folder):
        return folder
    short, _, revision = name.partition("@")
    repository, pinned = MODELS.get(short, (short, "main"))
    revision = asked = revision or pinned
    if (
        not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository)
        or not re.fullmatch(r"[\w-][\w./-]*", revision)
        or ".." in revision
    ):
        raise HubError(f"{name!r}: not the name of a model; give {', '.join(MODELS)} or owner/repository@revision")
    if is_offline():
        raise HubError(
            f"{folder}: not complete, and HF_HUB_OFFLINE forbids to download {repository}; unset it, or copy the files there"
        )
    if (
        folder / RECORD
    ).exists():  # some of its files were deleted: they come back as they were, wherever the branch is now
        source = read_record(folder)["source"]
        if (source.get("repository"), source.get("revision")) == (repository, revision):
            revision = source["commit"]
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise HubError(f"HF_ENDPOINT={endpoint}: must start with https:// or http://")

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
                _check_pinned(short, commit, offered)
            where = f"{endpoint}/{repository}/resolve/{commit}"
            files = {}
            get = lambda name: files.update(
                {name: _fetch(session, f"{where}/{quote(name)}", folder, name, *offered[name])}
            )
            for small in (*WANTED, INDEX):
                if small in offered:
                    if offered[small][0] > LARGEST_JSON:
                        raise HubError(f"{repository}: {small} has {offered[small][0]:,} bytes, which cannot be right")
                    get(small)
            for shard in (shards := _shards(folder, repository, offered, skip)):
                left = sum(offered[s][0] - _have(folder, s, offered[s][1]) for s in shards if s not in files)
                if left > (free := shutil.disk_usage(folder).free):
                    raise HubError(
                        f"{folder}: {left / 1e9:.1f} GB are still to come and {free / 1e9:.1f} GB are free; make room, then try again"
                    )
                get(shard)
        write_record(folder, files, dict(repository=repository, revision=asked, commit=commit))
    finally:
        del lock  # else it would live as long as the traceback of an error
    return folder


def _list_files(session, endpoint: str, repository: str, revision: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The commit that a revision means, and its files: name -> size and hash, 64 hex digits of sha256 or 40 of git's sha1."""
    url = f"{endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
    reply = _with_patience(lambda: _get_json(session, url), f"{repository}@{revision}")
    try:
        commit = reply["sha"]
        files = {f["rfilename"]: (f["lfs"]["size"], f["lfs"]["sha256"]) if f.get("lfs") else (f["size"], f["blobId"])
                 for f in reply["siblings"]}  # fmt: skip
        # Names with a slash are files in subfolders, of which none is needed.
        files = {name: entry for name, entry in files.items() if is_plain_name(name)}
        fits = re.fullmatch("[0-9a-f]{40}", commit) and all(
            type(size) is int and size >= 0 and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) for size, digest in files.values())  # fmt: skip
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise HubError(
            f"{url}: the answer is not a list of files with sizes and hashes; is HF_ENDPOINT a copy of the hub?"
        )
    if "config.json" not in files:
        raise HubError(f"{repository}@{revision}: has no config.json, so it is not a model in the official layout")
    return commit, files


def _check_pinned(name: str, commit: str, offered: dict[str, tuple[int, str]]) -> None:
    """Raise HubError unless a branch has the known tokenizer and weights (or commit, where their sha256 is unknown)."""
    start, sha = PINNED[name]
    same = offered.get(SINGLE, (0, ""))[1] == sha if sha else commit.startswith(start)
    if not same or offered.get("sentencepiece.bpe.model") != NLLB_TOKENIZER:
        repository, revision = MODELS[name]
        raise HubError(
            f"{repository}@{revision}: has other files than it had (now at commit {commit}, once at {start}...); "
            f"look at them there, and if you trust them ask for {repository}@{commit}"
        )


def _shards(folder: Path, repository: str, offered: dict, skip: str | None) -> list[str]:
    """Names of the safetensors files to fetch."""
    if INDEX in offered:
        keys_of = {}
        for key, shard in weight_map(folder / INDEX).items():
            keys_of.setdefault(shard, []).append(key)
        shards = sorted(
            s for s, keys in keys_of.items() if skip is None or not all(key.startswith(skip) for key in keys)
        )
        if absent := [s for s in shards if s not in offered]:
            raise HubError(f"{repository}: its index names {absent[0]}, which is not there")
        return shards
    if SINGLE in offered:
        return [SINGLE]
    pickles = sorted(name for name in offered if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    found = (
        f"only {pickles[0]}, a pickle, which can run code when opened and is never fetched" if pickles else "no weights"
    )
    raise HubError(
        f"{repository}: {found}; give a revision with safetensors, as in {repository}@refs/pr/1, or copy the pickle "
        f"beside config.json and convert it, if you trust it: python -m nanomblip.weights.convert {folder}"
    )


def _part(folder: Path, name: str, digest: str) -> Path:
    return folder / f".{name}.{digest[:16]}.part"


def _have(folder: Path, name: str, digest: str) -> int:
    """Bytes of a file that are here already."""
    path = next((p for p in (folder / name, _part(folder, name, digest)) if p.is_file()), None)
    return path.stat().st_size if path else 0


class _Hash:
    """The hash that the hub gives for a file (git's sha1 of "blob <size>\\0" + content, or sha256), and always our own sha256."""

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
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
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
                sha, have = (
                    _Hash(size, digest),
                    0,
                )  # 200, or another place: the range was ignored, this is the file from its start
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
    with _open(session, url, {}) as reply:
        text = b""
        for data in reply.iter_content(CHUNK):
            text += data
            if len(text) > LARGEST_JSON:
                raise HubError(
                    f"{url}: the answer has more than {LARGEST_JSON:,} bytes; is HF_ENDPOINT a copy of the hub?"
                )
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise HubError(
                f"{url}: the answer is not JSON; is HF_ENDPOINT a copy of the hub, or does a login page stand in between?"
            ) from None


def _open(session, url: str, headers: dict):
    """Send a request and look at its status: a reply with a body worth reading, _Again, or HubError for what will not change."""
    reply = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    status = reply.status_code
    if status in (200, 206) and reply.headers.get("Content-Encoding", "identity") == "identity":
        return reply
    reply.close()
    if status in (401, 403):
        token = (
            "HF_TOKEN is not accepted" if os.environ.get("HF_TOKEN", "").strip() else "it wants a token: set HF_TOKEN"
        )
        raise HubError(f"{url}: {status}, {token}; or the name is wrong, which the hub does not tell apart")
    if status in (404, 410):
        raise HubError(f"{url}: {status}, no such repository, revision or file")
    if status in (200, 206, 408, 416, 425, 429) or status >= 500:
        seconds = reply.headers.get("Retry-After", "")
        wait = float(seconds) if seconds.isdecimal() else 0.0
        raise _Again("compressed, though that was declined" if status < 300 else f"status {status}", wait, status)
    raise HubError(f"{url}: status {status}")


def _with_patience(request, what: str, progress=lambda: 0):
    """Call `request` until it succeeds. HubError when the bytes that `progress()` counts did not grow in TRIES calls in a row, or were
    thrown away TRIES times."""
    idle, thrown, before = 0, 0, progress()
    while True:
        try:
            return request()
        except (_Again, requests.RequestException) as error:
            reason, wait = " ".join(str(error).split())[:200], getattr(error, "wait", 0.0)
            if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects)):
                raise HubError(f"{what}: {reason}") from None
        except OSError as error:
            raise HubError(
                f"{what}: cannot be written ({error}); what came so far is kept, try again when there is room"
            ) from None
        now = progress()
        idle, thrown, before = 0 if now > before else idle + 1, thrown + (now < before), now
        if max(idle, thrown) >= TRIES:
            raise HubError(
                f"{what}: given up after {TRIES} tries in vain, the last: {reason}; what came so far is kept, try again later"
            )
        time.sleep(min(max(wait, BACKOFF * 2 ** max(0, idle - 1)), LONGEST_WAIT))
