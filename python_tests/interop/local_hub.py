"""A stand-in for the Hugging Face hub: the part of its API that huggingface_hub calls for files."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "a" * 40


class LocalHub:
    """Repositories as files by path, behind `address`."""

    def __init__(self):
        self.files = {}  # by owner/name, content by path
        self.downloads = []
        server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server = server
        self.address = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def send(self, code, content=b"", **headers):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self):
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    name = "/".join(parts[2:4])
                    if name not in hub.files:
                        return self.send(404, {"error": "none"}, X_Error_Code="RepoNotFound")
                    siblings = [{"rfilename": path} for path in hub.files[name]]
                    tree = [
                        {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                        for path, content in hub.files[name].items()
                    ]
                    if "tree" in parts:
                        return self.send(200, tree)
                    return self.send(200, {"id": name, "sha": SHA, "siblings": siblings})
                if len(parts) > 4 and parts[2] == "resolve":
                    content = hub.files.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
                    if content is not None:
                        if self.command == "GET":
                            hub.downloads.append("/".join(parts[4:]))
                        tag = hashlib.sha1(content).hexdigest()
                        return self.send(200, content, ETag=f'"{tag}"', X_Repo_Commit=SHA)
                return self.send(404, b"", X_Error_Code="EntryNotFound")

            do_HEAD = do_GET

            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while count := int(self.rfile.readline(), 16):
                        body += self.rfile.read(count)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(size)
                parts = self.path.split("?")[0].strip("/").split("/")
                if parts[-1] == "create":
                    asked = json.loads(body)
                    name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
                    hub.files.setdefault(name, {})
                    return self.send(200, {"url": f"{hub.address}/{name}"})
                if parts[-1] == "validate-yaml":
                    return self.send(200, {"errors": [], "warnings": []})
                name = "/".join(parts[2:4])
                if parts[4] == "preupload":
                    files = [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in json.loads(body)["files"]
                    ]
                    return self.send(200, {"files": files})
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        content = base64.b64decode(entry["value"]["content"])
                        hub.files[name][entry["value"]["path"]] = content
                address = f"{hub.address}/{name}/commit/{SHA}"
                return self.send(200, {"commitUrl": address, "commitOid": SHA})

        return Handler
