"""Whose address it is."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether a name in an address means our own machine; a proxy has no way there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
