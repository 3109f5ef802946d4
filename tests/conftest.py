"""For all rooms: the order of the tests, and a Hub on this machine.

The Hub speaks the protocol to the real client, and misbehaves where a test says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

os.environ.setdefault(
    "HF_HUB_DISABLE_XET", "1"
)  # read when huggingface_hub is first imported; xet has another protocol


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test come first: started last, one would keep a single worker busy at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


Files = dict[str, bytes]
LARGE = (".safetensors", ".parquet", ".gguf", ".png")


@dataclass
class Repo:
    """Commits are (title, files), the first one the Hub's own; ids are git-like."""

    private: bool = True
    gated: bool | str = False
    commits: list[tuple[str, Files]] = field(
        default_factory=lambda: [("initial commit", {".gitattributes": b"*.bin\n"})]
    )

    def id(self, number: int = -1) -> str:
        return hashlib.sha1(f"{id(self)}:{number % len(self.commits)}".encode()).hexdigest()

    @property
    def files(self) -> Files:
        return self.commits[-1][1]

    def at(self, revision: str) -> Files | None:
        names = {self.id(number): files for number, (_, files) in enumerate(self.commits)}
        return (names | {"main": self.files}).get(revision)


class LocalHub:
    """What it holds, what it was asked, and which faults are to come."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}  # ("models", "owner/name")
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.collections: dict[str, dict] = {}
        self.tokens = {"hf_writer": "write", "hf_reader": "read"}
        self.asked: list[str] = []  # "METHOD /path"
        self.authorizations: list[str | None] = []  # what came with each
        self.sent: Counter[str] = Counter()  # how often an object, or a part of it, arrived whole
        self.faults: list[list] = []  # [pattern, times, status, headers]
        self.cut: set[str] = set()  # objects whose upload breaks off half-way
        self.lost = 0  # of so many commits the answer never arrives
        self.damaged: set[str] = set()  # objects that come back with a byte changed
        self.part_bytes = 100_000  # a larger object goes up in parts of this size
        self.parts: dict[str, dict[int, bytes]] = {}
        self.on_cut = lambda: None
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def add(self, kind: str, name: str, files: Files, *, private: bool = False, gated: bool | str = False) -> Repo:
        """A repository that is there already."""
        repo = self.repos[kind, name] = Repo(private, gated)
        repo.commits.append(("files", files))
        return repo

    def fail(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next requests whose "METHOD /path" matches with a status; headers as Retry_After."""
        self.faults.append([pattern, times, status, {key.replace("_", "-"): value for key, value in headers.items()}])

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.asked)


class Handler(BaseHTTPRequestHandler):
    """The routes; each is (methods, pattern, function)."""

    protocol_version = "HTTP/1.1"
    hub: LocalHub

    def handle_one(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.asked.append(line)
            self.hub.authorizations.append(self.headers.get("Authorization"))
            for fault in self.hub.faults:
                if fault[1] and re.search(fault[0], line):
                    fault[1] -= 1
                    self.body()
                    return self.answer(fault[2], {"error": "a fault"}, {"X-Error-Message": "a fault", **fault[3]})
        for pattern, function in ROUTES:
            if match := re.fullmatch(pattern, line):
                return function(self, *match.groups())
        return self.answer(404, {"error": "no such route"})

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = handle_one

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def json(self) -> dict:
        return json.loads(self.body() or b"{}")

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass

    @property
    def role(self) -> str | None:
        return self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def repo(self, kind: str, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after an answer: hidden ones are not there, as on the Hub."""
        found = self.hub.repos.get((kind, name))
        if found is None or (found.private and not self.role):
            self.body()
            status = 404 if self.role else 401
            self.answer(status, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif write and self.role != "write":
            self.body()
            self.answer(403, {"error": "no right to write"}, {"X-Error-Message": "no right to write"})
        else:
            return found
        return None


def whoami(self: Handler) -> None:
    if self.role:
        self.answer(200, {"name": "alice", "type": "user", "auth": {"accessToken": {"role": self.role}}})
    else:
        message = "Invalid credentials in Authorization header"
        self.answer(401, {"error": message}, {"X-Error-Message": message})


def create(self: Handler) -> None:
    wanted = self.json()
    name = f"{wanted.get('organization') or 'alice'}/{wanted['name']}"
    key = (f"{wanted.get('type') or 'model'}s", name)
    if self.role != "write":
        return self.answer(403, {"error": "no right"}, {"X-Error-Message": "no right to write"})
    if key in self.hub.repos:
        return self.answer(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"})
    self.hub.repos[key] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
    prefix = "datasets/" if key[0] == "datasets" else ""
    return self.answer(200, {"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name})


def info(self: Handler, kind: str, name: str, revision: str | None) -> None:
    if (repo := self.repo(kind, name)) is None:
        return None
    if repo.at(revision or "main") is None:
        return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
    commit = revision if revision and len(revision) == 40 else repo.id()
    siblings = [{"rfilename": path} for path in repo.at(commit) or {}]
    about = {"id": name, "sha": commit, "private": repo.private, "gated": repo.gated, "siblings": siblings}
    return self.answer(200, about)


def auth_check(self: Handler, kind: str, name: str) -> None:
    if repo := self.repo(kind, name):
        if repo.gated and not self.role:
            return self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        return self.answer(200, {})
    return None


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE) or size > 1_000_000


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def listed(path: str, data: bytes) -> dict:
    row: dict = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
    if is_large(path, len(data)):
        row["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return row


def tree(self: Handler, kind: str, name: str, revision: str) -> None:
    if (repo := self.repo(kind, name)) is None:
        return None
    files = repo.at(revision)
    if files is None:
        return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
    folders = {path.rpartition("/")[0] for path in files if "/" in path}
    rows = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
    return self.answer(200, [*rows, *(listed(path, data) for path, data in sorted(files.items()))])


def preupload(self: Handler, kind: str, name: str, revision: str) -> None:
    if (repo := self.repo(kind, name, write=True)) is None:
        return
    rows = []
    for file in self.json()["files"]:
        large, there = is_large(file["path"], file["size"]), repo.files.get(file["path"])
        row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        if there is not None:
            row["oid"] = hashlib.sha256(there).hexdigest() if large else git_sha1(there)
        rows.append(row)
    self.answer(200, {"files": rows})


def batch(self: Handler, prefix: str | None, name: str) -> None:
    if self.repo("datasets" if prefix else "models", name, write=True) is None:
        return
    rows = []
    for wanted in self.json()["objects"]:
        row, oid = dict(wanted), wanted["oid"]
        if oid not in self.hub.objects:
            here, header = f"{self.hub.url}/storage/{oid}", {}
            if wanted["size"] > self.hub.part_bytes:
                count = -(-wanted["size"] // self.hub.part_bytes)
                header = {str(part): f"{here}/{part}?signature=secret" for part in range(1, count + 1)}
                header["chunk_size"] = str(self.hub.part_bytes)
            verify = {"href": f"{self.hub.url}/storage/{oid}/verify"}
            row["actions"] = {"upload": {"href": f"{here}?signature=secret", "header": header}, "verify": verify}
        rows.append(row)
    self.answer(200, {"transfer": "multipart", "objects": rows})


def put(self: Handler, oid: str, part: str | None) -> None:
    if oid in self.hub.cut:
        self.rfile.read(int(self.headers["Content-Length"]) // 2)
        self.close_connection = True
        self.connection.close()
        self.hub.on_cut()
        return
    data = self.body()
    with self.hub.lock:
        self.hub.sent[oid] += 1
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = data
        elif hashlib.sha256(data).hexdigest() == oid:
            self.hub.objects[oid] = data
    self.answer(200, b"", {"ETag": f'"{hashlib.md5(data).hexdigest()}"'})


def complete(self: Handler, oid: str) -> None:
    parts = self.hub.parts.get(oid, {})
    etags = [f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"' for part in self.json()["parts"]]
    assert len(etags) == len(parts)
    data = b"".join(parts[number] for number in sorted(parts))
    if hashlib.sha256(data).hexdigest() != oid:
        return self.answer(400, {"error": "the parts don't make the object"})
    self.hub.objects[oid] = data
    return self.answer(200, {})


def verify(self: Handler, oid: str) -> None:
    wanted, there = self.json(), self.hub.objects.get(oid)
    fine = there is not None and len(there) == wanted["size"]
    self.answer(200 if fine else 404, {} if fine else {"error": "the object is not there"})


def commit(self: Handler, kind: str, name: str, revision: str) -> None:
    if (repo := self.repo(kind, name, write=True)) is None:
        return None
    lines = [json.loads(line) for line in self.body().splitlines()]
    header, files = lines[0]["value"], dict(repo.files)
    if header.get("parentCommit") not in (None, repo.id()):
        return self.answer(412, {"error": "the parent is not the head"})
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in self.hub.objects:
                return self.answer(400, {"error": f"there is no object for {value['path']}"})
            files[value["path"]] = self.hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    with self.hub.lock:
        repo.commits.append((header["summary"], files))
        if self.hub.lost:
            self.hub.lost -= 1
            self.close_connection = True
            return self.connection.close()
    return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.id()}", "commitOid": repo.id()})


def resolve(self: Handler, prefix: str | None, name: str, revision: str, path: str) -> None:
    kind = "datasets" if prefix else "models"
    if (repo := self.repo(kind, name)) is None:
        return None
    if repo.gated and not self.role:
        return self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
    files = repo.at(revision)
    if files is None or path not in files:
        code = "RevisionNotFound" if files is None else "EntryNotFound"
        return self.answer(404, {"error": code}, {"X-Error-Code": code})
    data = files[path]
    oid = hashlib.sha256(data).hexdigest()
    headers = {"X-Repo-Commit": revision if len(revision) == 40 else repo.id(), "ETag": f'"{git_sha1(data)}"'}
    if is_large(path, len(data)):
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "ETag": f'"{oid}"'}
    if oid in self.hub.damaged:
        data = data[:-1] + bytes([data[-1] ^ 1])
    return self.answer(200, data, headers)


def validate_yaml(self: Handler) -> None:
    head = re.match(r"---\n(.*?)\n---\n", self.json()["content"], re.DOTALL)
    metadata = yaml.safe_load(head[1]) if head else {}
    errors = [] if metadata.get("license") else [{"message": '"license" is required'}]
    self.answer(400 if errors else 200, {"errors": errors, "warnings": []})


def settings(self: Handler, kind: str, name: str) -> None:
    if repo := self.repo(kind, name, write=True):
        repo.private = self.json().get("visibility") == "private"
        self.answer(200, {})


def shown(slug: str, collection: dict) -> dict:
    items = [
        {"_id": str(number), "position": number, "type": kind, "id": name, "repoType": kind}
        for number, (name, kind) in enumerate(collection["items"])
    ]
    about = {"slug": slug, "owner": {"name": "alice"}, "lastUpdated": "2026-01-01T00:00:00.000Z", "upvotes": 0}
    return {**about, "position": 0, "theme": "blue", **collection, "items": items}


def list_collections(self: Handler) -> None:
    rows = [shown(slug, one) for slug, one in self.hub.collections.items()]
    self.answer(200, [{key: value for key, value in row.items() if key != "position"} for row in rows])


def create_collection(self: Handler) -> None:
    wanted = self.json()
    slug = f"{wanted['namespace']}/{wanted['title'].lower().replace(' ', '-')}-{len(self.hub.collections):024x}"
    self.hub.collections[slug] = {"title": wanted["title"], "private": wanted["private"], "items": []}
    self.answer(200, shown(slug, self.hub.collections[slug]))


def collection(self: Handler, slug: str) -> None:
    changes, found = self.json(), self.hub.collections[slug]
    found |= changes
    self.answer(200, {"data": shown(slug, found)} if changes else shown(slug, found))


def add_item(self: Handler, slug: str) -> None:
    wanted, found = self.json()["item"], self.hub.collections[slug]
    item = (wanted["id"], wanted["type"])
    if item in found["items"]:
        return self.answer(409, {"error": "it is in there"})
    found["items"].append(item)
    return self.answer(200, shown(slug, found))


API = r"/api/(models|datasets)/([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", whoami),
    (r"POST /api/repos/create", create),
    (rf"GET {API}(?:/revision/(\w+))?", info),
    (rf"(?:GET|HEAD) {API}/auth-check", auth_check),
    (rf"GET {API}/tree/(\w+)", tree),
    (rf"POST {API}/preupload/(\w+)", preupload),
    (rf"POST {API}/commit/(\w+)", commit),
    (rf"PUT {API}/settings", settings),
    (r"POST /(datasets/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", batch),
    (r"PUT /storage/(\w+)(?:/(\d+))?", put),
    (r"POST /storage/(\w+)", complete),
    (r"POST /storage/(\w+)/verify", verify),
    (r"(?:GET|HEAD) /(datasets/)?([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", resolve),
    (r"POST /api/validate-yaml", validate_yaml),
    (r"GET /api/collections", list_collections),
    (r"POST /api/collections", create_collection),
    (r"(?:GET|PATCH) /api/collections/([\w/-]+)", collection),
    (r"POST /api/collections/([\w/-]+)/items", add_item),
]


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """A Hub of its own for the test; clients find it through ``hub.url``."""
    local = LocalHub()
    yield local
    local.server.shutdown()
    local.server.server_close()
