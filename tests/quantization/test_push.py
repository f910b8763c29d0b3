"""Pushed to a Hub and loaded from it, twice. The Hub is a small server on the loopback interface."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from quantization_cases import llama

from hfext.quantization import RTNConfig, quantize

FILES: dict[str, dict[str, bytes]] = {}
OBJECTS: dict[str, bytes] = {}


class Hub(BaseHTTPRequestHandler):
    """The routes that an upload and a download of a model repository use."""

    def log_message(self, *args):
        pass

    def send(self, body=b"", status=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    @property
    def base(self):
        return f"http://{self.headers['Host']}"

    def do_POST(self):
        data, path = self.body(), self.path
        if path == "/api/repos/create":
            name = json.loads(data)["name"]
            repo = f"{json.loads(data).get('organization') or 'user'}/{name}"
            FILES.setdefault(repo, {})
            self.send({"url": f"{self.base}/{repo}", "name": repo, "id": repo})
        elif path == "/api/validate-yaml":
            self.send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(data)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False} for f in files
            ]  # fmt: skip
            self.send({"files": modes})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(data)["objects"]
            actions = [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.base}/objects/{o['oid']}", "header": {}}}} for o in wanted
            ]  # fmt: skip
            self.send({"transfer": "basic", "objects": actions}, Content_Type="application/vnd.git-lfs+json")
        elif "/commit/" in path:
            repo = re.match(r"/api/models/(.+)/commit/", path)[1]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    FILES[repo][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    FILES[repo][value["path"]] = OBJECTS[value["oid"]]
            self.send(
                {"commitUrl": f"{self.base}/{repo}/commit/{sha(repo)}", "commitOid": sha(repo), "pullRequestUrl": None}
            )
        else:
            self.send({"error": path}, 404)

    def do_PUT(self):
        OBJECTS[self.path.rpartition("/")[2]] = self.body()
        self.send()

    def do_GET(self):
        api = re.fullmatch(r"/api/models/([^/]+/[^/?]+)(/tree/[^?]*|/revision/[^?]*)?(\?.*)?", self.path)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/([^?]+)(\?.*)?", self.path)
        if api and api[1] in FILES:
            tree = [{"type": "file", "path": p, "size": len(x), "oid": etag(x)} for p, x in FILES[api[1]].items()]
            names = [{"rfilename": p} for p in FILES[api[1]]]
            about = {
                "id": api[1],
                "modelId": api[1],
                "sha": sha(api[1]),
                "siblings": names,
                "tags": [],
                "private": False,
            }
            self.send(tree if api[2] and "tree" in api[2] else about, Content_Type="application/json")
        elif found and found[2] in FILES.get(found[1], {}):
            content = FILES[found[1]][found[2]]
            self.send(content, ETag=f'"{etag(content)}"', X_Repo_Commit=sha(found[1]))
        else:
            self.send({"error": "not found"}, 404, X_Error_Code="EntryNotFound" if found else "RepoNotFound")

    do_HEAD = do_GET


def etag(content):
    return hashlib.sha256(content).hexdigest()


def sha(repo):
    return hashlib.sha1(json.dumps(sorted((p, etag(x)) for p, x in FILES[repo].items())).encode()).hexdigest()


SCRIPT = """
import sys, torch, hfext
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 40)[None]
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
want = model(ids).logits
for name in ("user/first", "user/second"):
    model.push_to_hub(name, token="hf_none")
    model = AutoModelForCausalLM.from_pretrained(name)
    assert torch.equal(model(ids).logits, want), name
print("equal, twice")
"""


@pytest.mark.slow
def test_pushed_and_loaded_twice_it_is_bit_equal(tmp_path):
    quantize(llama(attention_bias=True), RTNConfig(bits=3, group_size=16)).save_pretrained(tmp_path / "packed")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
            "no_proxy": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "packed")],
            env=environment, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
    finally:
        server.shutdown()
    assert done.returncode == 0 and "equal, twice" in done.stdout, done.stderr[-2000:]
    assert set(FILES) == {"user/first", "user/second"} and "model.safetensors" in FILES["user/second"]
