"""A small Hub on 127.0.0.1: the parts of its protocol that huggingface_hub uses to create, upload, tag and download.

It keeps everything in memory, notes every request, and fails where a test asks it to.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_" + "t" * 34
LARGE = 10_000  # bytes from which a file goes the way of large ones
PART = 30_000  # bytes from which a large file is sent in parts
DROP = "drop"


@dataclass
class Repo:
    """Commits are snapshots; branches and tags name one."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or self.tags.get(revision) or (revision if revision in self.commits else None)


def oid_of(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class HubServer(ThreadingHTTPServer):
    """`faults` maps "METHOD regular expression" to answers, taken one by one: a status with a message, or DROP."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.faults: dict[str, list] = {}

    def fault(self, request: str) -> object:
        for pattern, answers in self.faults.items():
            if answers and re.match(pattern, request):
                return answers.pop(0)
        return None

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the game."""


@contextmanager
def hub_server():
    """A Hub that listens in a thread of its own."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(10)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    server: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        fault = self.server.fault(request)
        if fault == DROP:
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None:
            self.answer(*fault)
            return
        for route, answer in ROUTES:
            if found := re.fullmatch(route, request):
                answer(self, *found.groups())
                return
        self.answer(404, f"no route for {request}")

    do_GET = do_HEAD = do_POST = do_PUT = do

    def answer(self, status: int, content: object = None, **headers: str) -> None:
        if status >= 400:
            headers |= {"X-Error-Message": str(content)}
            content = {"error": content, "errors": [{"message": content}]}
        data = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def may(self) -> bool:
        """Whether the request carries the token; says no if it does not."""
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, "Invalid credentials in Authorization header")
        return False

    def repo(self, repo_id: str) -> Repo | None:
        if not self.may():
            return None
        if repo_id not in self.server.repos:
            self.answer(404, "Repository not found", X_Error_Code="RepoNotFound")
        return self.server.repos.get(repo_id)

    def snapshot(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if (repo := self.repo(repo_id)) is None:
            return None
        if (sha := repo.find(revision)) is None:
            self.answer(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
            return None
        return sha, repo.commits[sha]

    # Answers

    def whoami(self) -> None:
        if self.may():
            self.answer(200, {"name": "alice", "type": "user"})

    def validate(self) -> None:
        metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        if "license" not in metadata or not re.fullmatch(r"[\w.-]+", metadata["license"]):
            self.answer(400, '"license" must be one of the licenses of the Hub')
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        if not self.may():
            return
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization']}/{wanted['name']}"
        if repo_id in self.server.repos:
            self.answer(409, "You already created this model repo")
            return
        repo = self.server.repos[repo_id] = Repo(wanted["visibility"] == "private")
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.answer(200, {"url": f"{self.server.endpoint}/{repo_id}"})

    def info(self, repo_id: str, revision: str | None = None) -> None:
        if (found := self.snapshot(repo_id, revision or "main")) is not None:
            sha, files = found
            private = self.server.repos[repo_id].private
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, {"id": repo_id, "sha": sha, "private": private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        if (found := self.snapshot(repo_id, revision)) is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": oid_of(content)}
                for name, content in found[1].items()
            ]
            self.answer(200, entries)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        if (found := self.snapshot(repo_id, revision)) is not None:
            sha, files = found
            self.answer(200, files[name], ETag=f'"{oid_of(files[name])}"', X_Repo_Commit=sha)

    def branch(self, repo_id: str, name: str) -> None:
        if (repo := self.repo(repo_id)) is not None:
            if name in repo.refs:
                self.answer(409, "Reference already exists")
            else:
                repo.refs[name] = repo.refs["main"]
                self.answer(200)

    def tag(self, repo_id: str, revision: str) -> None:
        if (repo := self.repo(repo_id)) is not None:
            name = json.loads(self.body)["tag"]
            if name in repo.tags:
                self.answer(409, "Tag reference exists already")
            else:
                repo.tags[name] = repo.find(revision)
                self.answer(200)

    def preupload(self, repo_id: str, revision: str) -> None:
        if (found := self.snapshot(repo_id, revision)) is not None:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": self.known_oid(found[1].get(file["path"]), file["size"]),
                }
                for file in json.loads(self.body)["files"]
            ]
            self.answer(200, {"files": files})

    @staticmethod
    def known_oid(content: bytes | None, size: int) -> str | None:
        if content is None:
            return None
        return hashlib.sha256(content).hexdigest() if size >= LARGE else oid_of(content)

    def batch(self, repo_id: str) -> None:
        if self.repo(repo_id) is None:
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            actions = {}
            if oid not in self.server.large:
                href = f"{self.server.endpoint}/large/{oid}"
                header = {}
                if size > PART:
                    count = -(-size // PART)
                    header = {str(i): f"{href}/{i}" for i in range(1, count + 1)} | {"chunk_size": str(PART)}
                actions = {"actions": {"upload": {"href": href, "header": header}}}
            objects.append({"oid": oid, "size": size, **actions})
        self.answer(200, {"objects": objects})

    def put(self, oid: str, part: str | None = None) -> None:
        if part is not None:
            self.server.parts.setdefault(oid, {})[int(part)] = self.body
        else:
            self.keep(oid, self.body)
        self.answer(200, ETag=f'"{part}"')

    def join(self, oid: str) -> None:
        parts = self.server.parts.pop(oid)
        self.keep(oid, b"".join(parts[number] for number in sorted(parts)))
        self.answer(200)

    def keep(self, oid: str, content: bytes) -> None:
        assert hashlib.sha256(content).hexdigest() == oid
        self.server.large[oid] = content

    def commit(self, repo_id: str, revision: str) -> None:
        if (found := self.snapshot(repo_id, revision)) is None:
            return
        sha, files = found
        files, repo = dict(files), self.server.repos[repo_id]
        lines = [json.loads(line) for line in self.body.splitlines()]
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header" and value.get("parentCommit", sha) != sha:
                self.answer(412, "A commit has happened since. Please refresh and try again.")
                return
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        proposed = "create_pr=1" in urlsplit(self.path).query
        sha = repo.commit("refs/pr/1" if proposed else revision, files)
        url = f"{self.server.endpoint}/{repo_id}"
        request = f"{url}/discussions/1" if proposed else None
        self.answer(200, {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": request})


REPO = "/([^/]+/[^/]+)"
ROUTES = (
    ("GET /api/whoami-v2", Handler.whoami),
    ("POST /api/validate-yaml", Handler.validate),
    ("POST /api/repos/create", Handler.create),
    (f"GET /api/models{REPO}", Handler.info),
    (f"GET /api/models{REPO}/revision/(.+)", Handler.info),
    (f"GET /api/models{REPO}/tree/(.+)", Handler.tree),
    (f"POST /api/models{REPO}/branch/(.+)", Handler.branch),
    (f"POST /api/models{REPO}/tag/(.+)", Handler.tag),
    (f"POST /api/models{REPO}/preupload/(.+)", Handler.preupload),
    (f"POST /api/models{REPO}/commit/(.+)", Handler.commit),
    (rf"POST {REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT /large/([0-9a-f]+)", Handler.put),
    ("PUT /large/([0-9a-f]+)/([0-9]+)", Handler.put),
    ("POST /large/([0-9a-f]+)", Handler.join),
    (f"(?:GET|HEAD) {REPO}/resolve/([^/]+)/(.+)", Handler.resolve),
)
