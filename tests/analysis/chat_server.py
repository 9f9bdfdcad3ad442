"""A small server that speaks the chat-completions protocol, for the llm judge: it answers right unless told to misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def right(known: dict[str, str]) -> str:
    """What a simple-minded judge says: an event is named where its last word is in the caption; "unicorn" is invented."""
    said = {key: float(bool(known[key]) and known[key].split()[-1] in known["caption"]) for key in ("picture", "sound")}
    made_up = ["a unicorn"] if "unicorn" in known["caption"] else []
    return json.dumps({"video": said["picture"], "audio": said["sound"], "invented_video": made_up, "invented_audio": []})


def completion(text: str, finish: str = "stop") -> bytes:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}).encode()


class ChatServer:
    """`misbehave(server, handler, known, count)` may answer a request itself (and return True); `count`: how often this prompt came before.

    requests: every body; asked: caption -> how often its first prompt came; at: when requests came; busy / busiest: requests at the same time.
    """

    def __init__(self, misbehave=None, seconds: float = 0.0):
        self.misbehave, self.seconds = misbehave, seconds
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.asked: Counter[str] = Counter()
        self.at: list[float] = []
        self.busy = self.busiest = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                known = json.loads(body["messages"][1]["content"])
                key = known["caption"] + (" (again)" if len(body["messages"]) > 2 else "")
                with outer._lock:
                    outer.requests.append(body)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    outer.at.append(time.monotonic())
                    count = outer.asked[key]
                    outer.asked[key] += 1
                    outer.busy += 1
                    outer.busiest = max(outer.busiest, outer.busy)
                try:
                    time.sleep(outer.seconds)
                    if self.path != "/v1/chat/completions":
                        self.send(404, b'{"error": {"message": "no such path"}}')
                    elif not (outer.misbehave and outer.misbehave(self, body, known, count)):
                        self.send(200, completion(right(known)))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed or gave up
                finally:
                    with outer._lock:
                        outer.busy -= 1

            def send(self, status: int, content: bytes, kind: str = "application/json", length: int | None = None, **headers: str):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content) if length is None else length))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
