"""JSON over HTTP, asked again where a server fails: time-outs, waits that double, and what is no answer."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self, TypeVar

import urllib3

from lit_align.errors import ConfigError, check_not_negative, check_positive, tell

Answer = TypeVar("Answer")

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the second try, and at most; each wait is twice the one before."""

SILENT = 4
"""Tries after which it is told that a server does not answer: some 4 seconds, where it refuses at once."""

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Statuses after which another try may succeed: time-outs, too many requests, errors of the server."""

CHUNK = 1 << 16

JSON = {"content-type": "application/json", "accept": "application/json"}


class Unanswered(ConnectionError):
    """A server did not answer, or not what was asked, as often as it was asked."""


class NoAnswer(ValueError):
    """What a server said cannot be an answer: it is asked again."""


class Server:
    """A server that answers JSON with JSON.

    Args:
        url: Where it is, with ``http://`` or ``https://``.
        timeout: Seconds for one try, from the first byte that is sent to the last that comes.
        retries: Tries after the first.
        connections: At the same time.
        headers: Further headers of each request.

    Raises:
        ConfigError: The address is none, or a number cannot work.
    """

    def __init__(
        self,
        url: str,
        timeout: float = 60.0,
        retries: int = 8,
        connections: int = 4,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url: {url!r} is not an address; give http://HOST:PORT or https://HOST.")
        check_positive({"timeout": timeout, "connections": connections})
        check_not_negative({"retries": retries})
        self.url, self.timeout, self.retries = url.rstrip("/"), timeout, retries
        self.headers = {**JSON, **(headers or {})}
        self.connections = connections
        self.first_wait = FIRST_WAIT
        self._stopped = threading.Event()
        self._open = urllib3.PoolManager(maxsize=connections, retries=False)

    def renewed(self) -> Self:
        """The same server over connections of its own."""
        return type(self)(self.url, self.timeout, self.retries, self.connections, self.headers)

    def stop(self) -> None:
        """Give up what is being asked now, in every thread: there are no further tries."""
        self._stopped.set()
        self._stopped = threading.Event()

    def ask(self, path: str, body: Any, read: Callable[[Any], Answer]) -> Answer:
        """Send JSON and read the answer, until there is one.

        Args:
            path: After the address.
            body: What is sent; None asks with GET.
            read: Reads the decoded answer; it raises :class:`NoAnswer` where it is none.

        Returns:
            What ``read`` returns.

        Raises:
            ConfigError: The server refuses what was asked: it would again.
            Unanswered: All tries failed.
        """
        sent = None if body is None else json.dumps(body).encode()
        reason, stopped = "", self._stopped
        for attempt in range(self.retries + 1):
            if attempt == SILENT:
                left = f"{self.retries + 1 - attempt} more times"
                tell(f"{self.url}{path} has not answered yet ({reason[:300]}); it is asked {left}")
            if attempt and stopped.wait(min(self.first_wait * 2 ** (attempt - 1), LONGEST_WAIT)):
                break
            try:
                return read(self._once(path, sent))
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                if isinstance(error, ConfigError):
                    raise
                reason = " ".join(str(error).split()) or type(error).__name__
        tries = "1 try" if self.retries == 0 else f"{self.retries + 1} tries"
        raise Unanswered(f"{self.url}{path} did not answer in {tries}; the last one: {reason[:300]}")

    def _once(self, path: str, sent: bytes | None) -> Any:
        """One try."""
        until = time.monotonic() + self.timeout
        response = self._open.request(
            "GET" if sent is None else "POST",
            self.url + path,
            body=sent,
            headers=self.headers,
            timeout=urllib3.Timeout(total=self.timeout),
            preload_content=False,
        )
        try:
            parts: list[bytes] = []
            while part := response.read1(CHUNK):  # what is there, and not all of a chunk
                parts.append(part)
                if time.monotonic() > until:  # a server that sends a byte now and then
                    raise NoAnswer(f"it took longer than {self.timeout:g} s")
            text = b"".join(parts)
        except BaseException:
            response.close()  # the rest of the answer must not begin the next one
            raise
        response.release_conn()
        if response.status in AGAIN:
            raise NoAnswer(f"status {response.status} ({_said(text)})")
        if response.status >= 300:
            raise ConfigError(f"{self.url}{path} refuses: status {response.status} ({_said(text)}).")
        return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> None:
    """NaN and Infinity are not JSON: an image without a score is null."""
    raise NoAnswer(f"it sent {name}, which is not a number; null is an image without a score")


def _said(text: bytes) -> str:
    """What a server says of an error."""
    said = text.decode(errors="replace")
    try:
        held = json.loads(said)
        error = held["error"]
        said = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(said.split())[:300] or "no reason"
