"""A ClearML server that takes everything, of the few calls that Task.init, reporting and close make; it keeps what it was sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def token():
    """An unsigned JSON web token with the claims that the ClearML client reads."""
    parts = (
        {"alg": "none", "typ": "JWT"},
        {"exp": 2**31, "api_version": "2.23", "server_version": "2.0.0", "env": "test", "feature_set": "basic"},
    )
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + "."


class ClearMLServer:
    """Serves on a free port of the loopback interface while used as a context manager; `requests` holds (call, body) pairs.

    With another `status` it refuses everything; from the first call `dies_after` on it takes requests and does not answer.
    """

    def __init__(self, status=200, dies_after=None):
        self.requests = []
        self.tasks = {}
        self.dead, self.closing = threading.Event(), threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                call = self.path.rsplit("/", 1)[-1].split("?")[0]
                if call == dies_after:
                    server.dead.set()
                if server.dead.is_set():
                    server.closing.wait()
                    return
                server.requests.append((call, body.decode(errors="replace")))
                data = server.answer(call, body) if status == 200 else {}
                meta = {"id": "0" * 32, "result_code": status, "result_subcode": 0, "result_msg": "OK" if status == 200 else "refused"}
                answer = json.dumps({"meta": meta, "data": data}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_POST = do_PUT = do_GET

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def answer(self, call, body):
        """The data of an answer. A task is in progress from its start on, else the client would end the process after half a minute."""
        request = json.loads(body) if body.startswith(b"{") and call.startswith("tasks.") else {}
        task = self.tasks.get(request.get("task"), {})
        if call == "auth.login":
            return {"token": token()}
        if call == "projects.get_all":
            return {"projects": []}
        if call == "projects.create":
            return {"id": "p" * 32}
        if call == "projects.get_by_id":
            return {"project": {"id": "p" * 32, "name": "cookbook"}}
        if call == "tasks.create":
            identity = f"{len(self.tasks):032}"
            self.tasks[identity] = {**request, "id": identity, "status": "created", "company": "c", "user": "u"}
            return {"id": identity}
        if call in ("tasks.started", "tasks.completed") and task:
            task["status"] = {"tasks.started": "in_progress", "tasks.completed": "completed"}[call]
        if call == "tasks.get_by_id":
            return {"task": task}
        if call == "tasks.get_all":
            return {"tasks": [self.tasks[identity] for identity in request.get("id", []) if identity in self.tasks]}
        if call == "events.add_batch":
            return {"added": body.count(b"\n"), "errors": 0, "errors_info": {}}
        return {"updated": 1, "fields": {}, "started": 1}

    def __enter__(self):
        self.thread = threading.Thread(target=self.http.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()
