"""
A stand-in of the Hugging Face Hub on this machine: what `huggingface_hub` 2.4 asks of it for model repositories.

As on the real one, large files lie in a storage of another origin, reached by redirects and signed links. Xet is not
offered: clients need `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote

import yaml


@dataclass(frozen=True)
class User:
    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    def belongs_to(self, namespace: str) -> bool:
        return namespace in (self.name, *self.organisations)


TOKENS = {
    "hf_owner": User("owner", ("org",)),
    "hf_reader": User("reader", ("org",), role="read"),
    "hf_stranger": User("stranger"),
}


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool = False

    @property
    def oid(self) -> str:
        """Of the git blob, which for a large file is a pointer."""
        blob = self.pointer if self.is_lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "https://git-lfs.github.com/spec/v1"
        return f"version {version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)  # sha -> path -> file
    branches: dict[str, str] = field(default_factory=dict)  # name -> sha

    def commit(self, branch: str, files: dict[str, File]) -> str:
        listing = sorted((path, file.oid) for path, file in files.items())
        sha = hashlib.sha1(repr((self.branches.get(branch), len(self.commits), listing)).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str:
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class Refusal(Exception):
    """An answer with an error, as the Hub words it: status, message and the code in `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


class Hub:
    """
    Runs in threads of this process until it is closed.

    Attributes:
        url: the value for `HF_ENDPOINT`.
        repositories: by name, `"org/name"`.
        objects: the storage of large files, by SHA-256.
        requests: all that have arrived.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self._cuts: list[tuple[str, str, int]] = []
        self._servers = [self._serve(HubHandler), self._serve(StorageHandler)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def _serve(self, handler: type) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.hub = self
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def close(self):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def cut(self, method: str, path: str, after: int = 0):
        """Once, hang up on a request whose path matches, when `after` bytes of the file have been transferred."""
        self._cuts.append((method, path, after))

    def take_cut(self, method: str, path: str) -> int | None:
        with self.lock:
            for cut in self._cuts:
                if cut[0] == method and re.fullmatch(cut[1], path):
                    self._cuts.remove(cut)
                    return cut[2]
        return None

    def find(self, method: str, path: str) -> list[Request]:
        """Requests that have arrived; `path` is a pattern."""
        return [request for request in self.requests if request.method == method and re.fullmatch(path, request.path)]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        files = repository.commits[repository.resolve(revision)]
        return {path: file.content for path, file in files.items()}


class Handler(BaseHTTPRequestHandler):
    """What both servers share. Sub-classes map requests to methods with `route`."""

    protocol_version = "HTTP/1.1"  # keeps connections open, as the real one does

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_GET(self):
        self.path, _, self.query = self.path.partition("?")
        self.cut_after = self.hub.take_cut(self.command, self.path)
        self.hub.requests.append(Request(self.command, self.path, self.headers.get("Range")))
        if self.command in ("POST", "PUT") and self.cut_after is not None:
            self.rfile.read(self.cut_after)
            return self.hang_up()
        self.content = self.read_content()
        try:
            respond, arguments = self.find_route()
            respond(self, **arguments)
        except Refusal as refusal:
            self.answer({"error": str(refusal)}, refusal.status, refusal.headers)

    do_HEAD = do_POST = do_PUT = do_GET

    def find_route(self):
        for method in vars(type(self)).values():
            for command, pattern in getattr(method, "routes", ()):
                match = re.fullmatch(pattern, self.path)
                if match and self.command == command:
                    return method, {name: unquote(value) for name, value in match.groupdict("main").items()}
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    def read_content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content: bytes | dict | list, status: int = 200, headers: dict[str, str] | None = None):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: self.cut_after])
        if self.cut_after is not None:
            self.hang_up()

    def answer_file(self, content: bytes, headers: dict[str, str]):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self.answer(content, headers=headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start > end:
            raise Refusal(416, "Range Not Satisfiable")
        headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
        self.answer(content[start : end + 1], 206, headers)

    def hang_up(self):
        self.close_connection = True

    def log_message(self, *args):
        pass


def route(command: str, pattern: str):
    def add(method):
        method.routes = [*getattr(method, "routes", ()), (command, pattern)]
        return method

    return add


class StorageHandler(Handler):
    """The storage of large files: the links to it are signed, so it refuses requests that carry a token, too."""

    def check_signature(self):
        if "Authorization" in self.headers:
            raise Refusal(400, "Only one auth mechanism allowed")
        if "signature" not in parse_qs(self.query):
            raise Refusal(403, "Access Denied")

    @route("GET", r"/(?P<sha256>\w{64})")
    def download(self, sha256: str):
        self.check_signature()
        self.answer_file(self.hub.objects[sha256], {"ETag": f'"{sha256}"'})

    @route("PUT", r"/(?P<sha256>\w{64})")
    def upload(self, sha256: str):
        self.check_signature()
        if hashlib.sha256(self.content).hexdigest() != sha256:
            raise Refusal(400, "The content is not what was announced")
        self.hub.objects[sha256] = self.content
        self.answer(b"")


REPOSITORY = r"(?P<name>[\w.-]+/[\w.-]+)"
API = rf"/api/models/{REPOSITORY}"


class HubHandler(Handler):
    """The API and the files of repositories."""

    def user(self) -> User | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def repository(self, name: str, write: bool = False) -> Repository:
        user, repository = self.user(), self.hub.repositories.get(name)
        is_member = user is not None and user.belongs_to(name.split("/")[0])
        if repository is None or (repository.private and not is_member):
            # Strangers do not learn which private repositories exist.
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_rights(name.split("/")[0], "Forbidden: you must use a write token to upload to a repository.")
        return repository

    def check_rights(self, namespace: str, message: str) -> User:
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.belongs_to(namespace) or user.role != "write":
            raise Refusal(403, message)
        return user

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        user = self.user()
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        organisations = [{"type": "org", "name": name} for name in user.organisations]
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
        self.answer({"type": "user", "name": user.name, "orgs": organisations, "auth": access})

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        block = re.match(r"---\n(.*?)\n---", json.loads(self.content)["content"], re.DOTALL)
        metadata = yaml.safe_load(block[1]) if block else {}
        errors = [
            {"message": f'"{key}" must be a string'}
            for key in ("license", "library_name", "pipeline_tag")
            if not isinstance(metadata.get(key, ""), str)
        ]
        text = "".join(f"{error['message']}\n" for error in errors).encode()
        as_text = self.headers.get("Accept") == "text/plain"
        self.answer(text if as_text else {"errors": errors, "warnings": []}, 400 if errors else 200)

    @route("POST", "/api/repos/create")
    def create_repository(self):
        wanted = json.loads(self.content)
        user = self.user()
        namespace = wanted["organization"] or (user.name if user else "")
        self.check_rights(namespace, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        name = f"{namespace}/{wanted['name']}"
        if name in self.hub.repositories:
            message = "You already created this model repo"
            return self.answer({"error": message, "url": f"{self.hub.url}/{name}"}, 409)
        repository = Repository(private=wanted.get("visibility") == "private")
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")})
        self.hub.repositories[name] = repository
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    @route("GET", API)
    @route("GET", rf"{API}/revision/(?P<revision>[^/]+)")
    def information(self, name: str, revision: str = "main"):
        repository = self.repository(name)
        sha = repository.resolve(revision)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        self.answer({"id": name, "sha": sha, "private": repository.private, "siblings": siblings, "tags": []})

    @route("GET", rf"{API}/refs")
    def references(self, name: str):
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
            for branch, sha in self.repository(name).branches.items()
        ]
        self.answer({"branches": branches, "tags": [], "converts": []})

    @route("POST", rf"{API}/branch/(?P<branch>[^/]+)")
    def create_branch(self, name: str, branch: str):
        repository = self.repository(name, write=True)
        if branch in repository.branches:
            raise Refusal(409, "Reference already exists")
        start = json.loads(self.content).get("startingPoint", "main")
        repository.branches[branch] = repository.resolve(start)
        self.answer(b"", 201)

    @route("GET", rf"{API}/tree/(?P<revision>[^/]+)")
    def tree(self, name: str, revision: str):
        repository = self.repository(name)
        files = repository.commits[repository.resolve(revision)]
        self.answer([self.describe(path, file) for path, file in files.items()])

    @route("POST", rf"{API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, name: str, revision: str):
        repository = self.repository(name)
        files = repository.commits[repository.resolve(revision)]
        wanted = parse_qs(self.content.decode())["paths"]
        self.answer([self.describe(path, files[path]) for path in wanted if path in files])

    @staticmethod
    def describe(path: str, file: File) -> dict:
        entry = {"type": "file", "path": path, "oid": file.oid, "size": len(file.content)}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        return entry

    @route("POST", rf"{API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, name: str, revision: str):
        repository = self.repository(name, write=True)
        present = repository.commits[repository.resolve(revision)]
        answers = []
        for wanted in json.loads(self.content)["files"]:
            path, file = wanted["path"], present.get(wanted["path"])
            mode = "lfs" if path.endswith(".safetensors") else "regular"
            oid = file and (file.sha256 if file.is_lfs else file.oid)
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer({"files": answers})

    @route("POST", rf"/{REPOSITORY}.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str):
        self.repository(name, write=True)
        objects = []
        for wanted in json.loads(self.content)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.storage_url}/{wanted['oid']}?signature=upload"}
                verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify"}
                wanted = wanted | {"actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        self.answer({"transfer": "basic", "objects": objects})

    @route("POST", rf"/{REPOSITORY}.git/info/lfs/objects/verify")
    def lfs_verify(self, name: str):
        self.repository(name, write=True)
        wanted = json.loads(self.content)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "Object not found")
        self.answer({})

    @route("POST", rf"{API}/commit/(?P<revision>[^/]+)")
    def commit(self, name: str, revision: str):
        repository = self.repository(name, write=True)
        if revision not in repository.branches:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        with self.hub.lock:
            files = dict(repository.commits[repository.branches[revision]])
            for line in self.content.splitlines():
                self.apply(json.loads(line), files)
            sha = repository.commit(revision, files)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def apply(self, operation: dict, files: dict[str, File]):
        key, value = operation["key"], operation["value"]
        if key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = File(self.hub.objects[value["oid"]], is_lfs=True)
        elif key != "header":
            raise Refusal(400, f"Not a part of this stand-in: {key}")

    @route("HEAD", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    @route("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str):
        repository = self.repository(name)
        sha = repository.resolve(revision)
        headers = {"X-Repo-Commit": sha}
        file = repository.commits[sha].get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
        if not file.is_lfs:
            return self.answer_file(file.content, headers | {"ETag": f'"{file.oid}"'})
        headers["Location"] = f"{self.hub.storage_url}/{file.sha256}?signature=download"
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        self.answer(b"", 302, headers)
