"""JSON over HTTP to one server, by the standard library: no proxy, no redirect, no retry of what was answered.

A prompt goes to the address that the recipe names and to no other. Messages name the address and the kind of failure;
what a server says is quoted only where it was told nothing private.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from ..errors import EngineError
from ..printable import printable
from ..settings.engine import is_loopback

AT_ONCE = 64  # requests that are under way together; the server puts them into batches
PATIENCE = 600.0  # seconds until an answer begins


class Wire:
    """One server.

    Args:
        only_here: whether its address must be this machine's own, whatever its name leads to.
    """

    def __init__(self, url: str, *, only_here: bool) -> None:
        parts = urlsplit(url)
        self.url, self.only_here = url, only_here
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = parts.hostname or "", parts.port
        self._own = threading.local()

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON (None if it is none) of a POST of `body`, or of a GET without one.

        Raises:
            EngineError: nobody answers, or the address is not this machine's although it must be.
        """
        is_new = not hasattr(self._own, "connection")
        try:
            return self._exchange(path, body)
        except (OSError, HTTPException) as error:
            self.close()
            if is_new or isinstance(error, TimeoutError):
                raise self._silence(error) from None
        try:  # the server had closed a connection that was kept
            return self._exchange(path, body)
        except (OSError, HTTPException) as error:
            self.close()
            raise self._silence(error) from None

    def ask_each(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[tuple[int, Any]]:
        """The same of several, in their order, some of them at once.

        Raises:
            EngineError: one has no answer.
        """

        ended = threading.Event()

        def share(first: int) -> list[tuple[int, Any]]:
            try:
                return [self.ask(path, body) for body in bodies[first::workers] if not ended.is_set()]
            finally:
                self.close()

        workers = min(AT_ONCE, len(bodies))
        if workers == 0:
            return []
        with ThreadPoolExecutor(workers) as pool:
            try:
                shares = list(pool.map(share, range(workers)))
            finally:
                ended.set()  # after a failure or an interruption the others ask for nothing more
        return [shares[number % workers][number // workers] for number in range(len(bodies))]

    def told(self, path: str, body: dict[str, Any] | None, doing: str) -> Any:
        """The JSON of an answer that must be 200, to something that is not private.

        Raises:
            EngineError: it is not; with what the server says.
        """
        status, value = self.ask(path, body)
        if status != 200:
            raise EngineError(f"the rollout engine at {self.url} refused {doing} ({status}): {_message(value)}")
        return value

    def close(self) -> None:
        """Ends this thread's connection."""
        connection = self._own.__dict__.pop("connection", None)
        if connection is not None:
            connection.close()

    def _exchange(self, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        connection = self._connected()
        text = None if body is None else json.dumps(body).encode()
        headers = {} if text is None else {"Content-Type": "application/json"}
        connection.request("GET" if text is None else "POST", path, text, headers)
        answer = connection.getresponse()
        content = answer.read()
        try:
            return answer.status, json.loads(content)
        except (ValueError, RecursionError):
            return answer.status, None

    def _connected(self) -> HTTPConnection:
        if not hasattr(self._own, "connection"):
            connection = self._kind(self._host, self._port, timeout=PATIENCE)
            connection.connect()
            peer = str(connection.sock.getpeername()[0])
            if self.only_here and not is_loopback(peer):
                connection.close()
                raise EngineError(
                    f"the rollout engine's address {self.url} leads to another machine: name it by number."
                )
            self._own.connection = connection
        found: HTTPConnection = self._own.connection
        return found

    def _silence(self, error: Exception) -> EngineError:
        return EngineError(
            f"the rollout engine at {self.url} does not answer ({type(error).__name__}): start it, and the same "
            "command goes on."
        )


def _message(value: Any) -> str:
    """What a server says of a failure, fit to be shown."""
    found = value.get("error", value) if isinstance(value, dict) else value
    found = found.get("message", found) if isinstance(found, dict) else found
    return printable(str(found)[:300])
