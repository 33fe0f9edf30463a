"""A small web server for tests of downloads."""

import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextlib.contextmanager
def serving(pages, lengths=None):
    """(URL, list of the paths asked for) of a server on the loopback interface.

    pages: {path: bytes}, 404 for any other path; lengths: {path: Content-Length that it announces}, for those cut on the way.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if self.path in pages else 404)
            if self.path in (lengths or {}):
                self.send_header("Content-Length", str(lengths[self.path]))
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
