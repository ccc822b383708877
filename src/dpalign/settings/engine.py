"""Who samples the completions of a stage: this process, or a server."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..domains import shown
from ..errors import DPAlignError


@dataclass
class EngineConfig:
    """What samples the completions of a stage that trains: this process, or a server with vLLM's completions API.

    Args:
        url: of the server: `http://127.0.0.1:8000`, say; default: this process samples. It is sent private prompts.
        model: the name under which it serves the model; default: the first that it lists.
        is_trusted: declares that everybody who can read what the server, or the network between, is sent may read the
            private prompts. Without it the address must be this machine's own (127.0.0.1, localhost, ::1).
        folder: where adapters are written for the server to load, by the same path there and here; default: a
            temporary folder.
    """

    url: str | None = None
    model: str | None = None
    is_trusted: bool = False
    folder: str | None = None

    @property
    def is_here(self) -> bool:
        """Whether its address is this machine's own."""
        return self.url is not None and is_loopback(urlsplit(self.url).hostname or "")

    def validate(self) -> None:
        """Raises DPAlignError for an address that cannot be, or that private prompts must not be sent to."""
        if self.url is None:
            given = [name for name in ("model", "is_trusted", "folder") if getattr(self, name)]
            if given:
                raise DPAlignError(f"{', '.join(given)} is of a server that samples: give its url, or leave it out.")
            return
        if not _is_address(self.url):
            raise DPAlignError(f"url {shown(self.url)}: expected http://HOST:PORT or https://HOST:PORT.")
        if not self.is_here and not self.is_trusted:
            raise DPAlignError(
                f"url {shown(self.url)} is not this machine's own, and private prompts would be sent there: declare "
                "is_trusted if everybody who can read them there may, or serve at 127.0.0.1."
            )


def is_loopback(host: str) -> bool:
    """Whether a host, by name or number, is this machine for itself alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_address(url: str) -> bool:
    """Whether a URL has a scheme, a host and a port, and no name, password or path, which a recipe would show."""
    try:
        parts = urlsplit(url)
        has_port = parts.port is not None
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment or parts.path.strip("/"))
    return parts.scheme in ("http", "https") and bool(parts.hostname) and has_port and plain
