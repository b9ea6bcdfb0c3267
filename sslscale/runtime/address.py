"""What is asked before a Ray cluster is: which one, whether anything answers there, and whether there is a token."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 5.0


def cluster_address(given: str | None) -> str | None:
    """The cluster to join: the one `given`, else RAY_ADDRESS, which a submitted job has.

    None where there is neither, and for `local`: Ray's word for a cluster of its own on this machine.
    """
    address = given or os.environ.get("RAY_ADDRESS") or "local"
    return None if address == "local" else address


def unreachable(address: str) -> str | None:
    """Why `host:port` or `ray://host:port` cannot be reached; None where something listens, and for `auto`."""
    if address == "auto":
        return None
    try:
        parts = urlsplit(f"//{address.rpartition('://')[2]}")
        if parts.hostname is None or parts.port is None:
            return "not of the form host:port"
        socket.create_connection((parts.hostname, parts.port), timeout=_TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def use_token() -> None:
    """Ray's job client sends a cluster's token only when it is told to; where there is one, tell it.

    Read when Ray is imported, so it has to be called before.
    """
    if "RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
