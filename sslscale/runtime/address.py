"""Whether anything answers at a Ray cluster's address: Ray itself tries for a minute before it says no."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 5.0


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
