"""The Hub on 127.0.0.1: the routes that `huggingface_hub` uses, repositories in memory, and faults on demand.

    with OfflineHub() as hub:
        hub.fail("POST", "/commit/", "drop")       # the first request whose path holds "/commit/" loses its line
        HfApi(endpoint=hub.url, token="hf_test").create_repo("user/name")

Kinds of fault: `drop` (the line is cut before an answer), `drop_after` (cut when the request was carried out), `500`,
`429` (with Retry-After), `401`, `403`, `404`, `truncate` (half of an answer), `garble` (other bytes, also of what is
sent). An answer that refuses repeats the token that came with the request, as a careless proxy does.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_onlyForTests"
LARGE = (".safetensors", ".npz", ".bin", ".png")


class OfflineHub:
    """`repos[id]["refs"][branch]` is a list of commits, each {"id": ..., "files": {path: bytes}}, the newest last."""

    def __init__(self):
        self.repos, self.blobs, self.log, self.faults = {}, {}, [], []
        self.tokens, self.slept = set(), []
        self.retry_after = "0"
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def fail(self, method: str, path: str, kind: str, times: int = 1, after: int = 0) -> None:
        """The requests number `after` + 1 to `after` + `times` of this kind meet a fault."""
        self.faults.append({"method": method, "path": path, "kind": kind, "left": times, "after": after})

    def fault_for(self, method: str, path: str) -> str | None:
        with self.lock:
            for fault in self.faults:
                if fault["method"] == method and fault["path"] in path:
                    if fault["after"]:
                        fault["after"] -= 1
                    elif fault["left"]:
                        fault["left"] -= 1
                        return fault["kind"]
        return None

    def add(self, repo_id: str, files: dict[str, bytes | str], **about) -> None:
        """A repository that is there from the start; `gated="manual"` restricts it."""
        files = {name: data.encode() if isinstance(data, str) else data for name, data in files.items()}
        first = {"id": _commit_id(repo_id.encode(), *files.values()), "files": files}
        self.repos[repo_id] = {"refs": {"main": [first]}, "private": False, "pulls": 0, **about}

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """What a visitor sees."""
        repo = self.repos.get(repo_id)
        return dict(repo["refs"][branch][-1]["files"]) if repo and branch in repo["refs"] else {}

    def commits(self, repo_id: str, branch: str = "main") -> int:
        """Commits after the empty first one."""
        return len(self.repos[repo_id]["refs"][branch]) - 1 if repo_id in self.repos else 0

    def find(self, repo_id: str, revision: str) -> dict | None:
        repo = self.repos.get(repo_id)
        if repo is None:
            return None
        if revision in repo["refs"]:
            return repo["refs"][revision][-1]
        return next((c for commits in repo["refs"].values() for c in commits if c["id"] == revision), None)


def _commit_id(*parts: bytes) -> str:
    return hashlib.sha1(b"\0".join(parts)).hexdigest()


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: OfflineHub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # Head and body are two writes: without this each answer waits for the client's acknowledgement.
        disable_nagle_algorithm = True

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.serve("GET")

        def do_HEAD(self):
            self.serve("HEAD")

        def do_POST(self):
            self.serve("POST")

        def do_PUT(self):
            self.serve("PUT")

        def serve(self, method):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if method in ("POST", "PUT") else b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            kind = hub.fault_for(method, path)
            hub.log.append((method, path, kind))
            came = self.headers.get("Authorization") or ""
            hub.tokens.add(came.removeprefix("Bearer "))
            if kind == "drop":
                return self.cut()
            if kind in ("401", "403", "404"):
                return self.answer(int(kind), {"error": f"status {kind}: {came}"}, head=method == "HEAD")
            if kind == "429":
                return self.answer(
                    429,
                    {"error": f"too many requests: {came}"},
                    {"Retry-After": hub.retry_after},
                    head=method == "HEAD",
                )
            if kind == "500":
                return self.answer(500, {"error": f"the server stumbled: {came}"}, head=method == "HEAD")
            if kind == "garble" and method == "PUT":
                body = bytes(len(body))
            with hub.lock:
                status, content, headers = self.route(method, path, query, body)
            if kind == "drop_after":
                return self.cut()
            self.answer(status, content, headers, kind, head=method == "HEAD")

        def cut(self):
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

        def answer(self, status, content=b"", headers=None, kind=None, head=False):
            if not isinstance(content, bytes):
                content, headers = (
                    json.dumps(content).encode(),
                    {"Content-Type": "application/json", **(headers or {})},
                )
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if head:
                return
            if kind == "garble":
                content = bytes(len(content))
            self.wfile.write(content[: len(content) // 2] if kind == "truncate" else content)
            if kind == "truncate":
                self.wfile.flush()
                self.cut()

        def route(self, method, path, query, body):
            if method == "POST" and path == "/api/repos/create":
                return self.create(json.loads(body))
            if path == "/api/validate-yaml":
                return 200, {"errors": [], "warnings": []}, {}
            if path == "/api/whoami-v2":
                return 200, {"name": "user", "type": "user", "orgs": []}, {}
            if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                return self.batch(found[1], json.loads(body))
            if found := re.fullmatch(r"/lfs/(\w+)", path):
                if hashlib.sha256(body).hexdigest() != found[1]:
                    return 400, {"error": "the content has another sha256"}, {}
                hub.blobs[found[1]] = body
                return 200, {}, {}
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                return self.resolve(*found.groups())
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([\w-]+)(?:/(.+))?)?", path):
                repo_id, what, rest = found.groups()
                if repo_id not in hub.repos:
                    return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
                return self.model(method, repo_id, what, rest, query, body)
            return 404, {"error": f"no route {path}"}, {}

        def create(self, wanted):
            name = f"{wanted.get('organization') or 'user'}/{wanted['name'].split('/')[-1]}"
            if name in hub.repos:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, {}
            first = {"id": _commit_id(name.encode()), "files": {}}
            hub.repos[name] = {"refs": {"main": [first]}, "private": "private" in str(wanted), "pulls": 0}
            return 200, {"url": f"{hub.url}/{name}", "name": name, "id": name}, {}

        def batch(self, repo_id, wanted):
            objects = []
            for about in wanted["objects"]:
                entry = {"oid": about["oid"], "size": about["size"]}
                if about["oid"] not in hub.blobs:
                    entry["actions"] = {"upload": {"href": f"{hub.url}/lfs/{about['oid']}"}}
                objects.append(entry)
            return 200, {"transfer": "basic", "objects": objects}, {}

        def model(self, method, repo_id, what, rest, query, body):
            repo = hub.repos[repo_id]
            revision = rest if what == "revision" else "main"
            if what in (None, "revision"):
                commit = hub.find(repo_id, revision)
                if commit is None:
                    return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
                siblings = [self.sibling(name, data) for name, data in commit["files"].items()]
                about = {"id": repo_id, "sha": commit["id"], "siblings": siblings, "tags": [], "downloads": 0}
                about |= {
                    "private": repo["private"],
                    "modelId": repo_id,
                    "likes": 0,
                    "gated": repo.get("gated", False),
                }
                card = re.match(rb"---\n(.*?)\n---", commit["files"].get("README.md", b""), re.DOTALL)
                return 200, about | ({"cardData": yaml.safe_load(card[1])} if card else {}), {}
            if what == "branch":
                if rest in repo["refs"]:
                    return 409, {"error": "Reference already exists"}, {}
                repo["refs"][rest] = list(repo["refs"]["main"])
                return 200, {}, {}
            if what == "preupload":
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return 200, {"files": files}, {}
            if what == "tree":
                commit = hub.find(repo_id, rest.split("/")[0])
                return 200, [self.entry(name, data) for name, data in commit["files"].items()], {}
            if what == "paths-info":
                commit = hub.find(repo_id, rest)
                wanted = parse_qs(body.decode()).get("paths", []) or json.loads(body or b"{}").get("paths", [])
                files = commit["files"] if commit else {}
                return 200, [self.entry(name, files[name]) for name in wanted if name in files], {}
            if what == "commit":
                return self.commit(repo_id, rest, query, body)
            return 404, {"error": f"no route for {what}"}, {}

        def sibling(self, name, data):
            entry = self.entry(name, data)
            about = {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                about["lfs"] = {"sha256": entry["lfs"]["oid"], "size": len(data), "pointerSize": 130}
            return about

        def entry(self, name, data):
            about = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
            if name.endswith(LARGE):
                digest = hashlib.sha256(data).hexdigest()
                about["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            return about

        def commit(self, repo_id, branch, query, body):
            repo = hub.repos[repo_id]
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            header = next(line["value"] for line in lines if line["key"] == "header")
            if query.get("create_pr", ["0"])[0] in ("1", "true", "True"):
                repo["pulls"] += 1
                branch, base = f"refs/pr/{repo['pulls']}", branch
                repo["refs"][branch] = list(repo["refs"][base])
            if branch not in repo["refs"]:
                return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            head = repo["refs"][branch][-1]
            if header.get("parentCommit") not in (None, head["id"]):
                return 412, {"error": "A commit has happened since. Please refresh and try again."}, {}
            files = dict(head["files"])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in hub.blobs:
                        return 400, {"error": f"LFS pointer of {value['path']} points to nothing"}, {}
                    files[value["path"]] = hub.blobs[value["oid"]]
            oid = _commit_id(head["id"].encode(), body)
            repo["refs"][branch].append({"id": oid, "files": files, "message": header["summary"]})
            answer = {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{hub.url}/{repo_id}/commit/{oid}",
                "hookOutput": "",
            }
            if branch.startswith("refs/pr/"):
                answer["pullRequestUrl"] = f"{hub.url}/{repo_id}/discussions/{repo['pulls']}"
            return 200, answer, {}

        def resolve(self, repo_id, revision, name):
            if repo_id not in hub.repos:
                return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            commit = hub.find(repo_id, revision)
            if commit is None:
                return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            headers = {"X-Repo-Commit": commit["id"]}
            if name not in commit["files"]:
                return 404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
            data = commit["files"][name]
            large = name.endswith(LARGE)
            etag = hashlib.sha256(data).hexdigest() if large else _blob_id(data)
            headers |= {"ETag": f'"{etag}"', "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"}
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return 206, data[first : last + 1], headers
            return 200, data, headers

    return Handler
