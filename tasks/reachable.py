"""Whether anything listens at an address, asked before a library is: libraries try again for minutes, and log it."""

from __future__ import annotations

import socket

from mergecore.errors import masked

SECONDS = 5.0
"""How long a machine may take to accept a connection."""


def unreachable(host: str, port: int) -> str:
    """Return why nothing can be reached at a host and port, as half a sentence; '' where something listens."""
    try:
        with socket.create_connection((host, port), timeout=SECONDS):
            return ""
    except socket.gaierror:
        return f"no host '{masked(host)}' is known"
    except TimeoutError:
        return f"{masked(host)}:{port} did not answer within {SECONDS:g} s"
    except (OSError, ValueError, OverflowError) as error:
        return f"no connection to {masked(host)}:{port} ({getattr(error, 'strerror', None) or error})"
