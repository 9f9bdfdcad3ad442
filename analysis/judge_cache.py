"""Replies of a judge that could be read, kept on disk as they come, so that a killed run asks nothing twice.

    with ReplyCache(Path("findings.replies.jsonl")) as cache:
        key = request_key({"base_url": …, "model": …, "messages": …})
        cache.get(key)                       # None, or the reply
        cache.put(key, Reply("…", "stop"))   # appended and synced before it returns

One JSON object a line: key (sha256 of endpoint, model and messages), reply (its text as it came), finish (why the model stopped). A last line without
its end, as a kill leaves it, is dropped at opening. One process at a time: a second one that opens the file is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class CacheError(ValueError):
    """A cache file that cannot be used. The message names it and says what to do."""


class Reply(NamedTuple):
    """What an endpoint sent: the text as it came, and its finish reason ("stop" where the model ended by itself)."""

    text: str
    finish: str


def request_key(request: Mapping[str, Any]) -> str:
    """sha256 of what a request says."""
    return hashlib.sha256(json.dumps(request, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ReplyCache:
    """The file, open for as long as the judge asks. Safe to use from several threads."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, Reply] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def _read(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(f"{self.path} is in use by another judge. Wait for it, or name another file with --cache.") from None
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self._replies[row["key"]] = Reply(str(row["reply"]), str(row["finish"]))
            except (ValueError, KeyError, TypeError):
                raise CacheError(
                    f"{self.path} line {number} is no cached reply. Remove the line (its question is then asked again), or name another --cache."
                ) from None

    def get(self, key: str) -> Reply | None:
        """The reply to the request with this key, if it was answered before."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply. It is on the disk when this returns."""
        line = json.dumps({"key": key, "reply": reply.text, "finish": reply.finish}, ensure_ascii=False) + "\n"
        with self._lock:
            _write_all(self._file, line.encode())
            os.fsync(self._file)
            self._replies[key] = reply

    def __len__(self) -> int:
        return len(self._replies)

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _write_all(file: int, content: bytes) -> None:
    while content:
        content = content[os.write(file, content) :]
