"""The address of the server, the Host and Origin headers that it accepts, and what its page may load."""

import base64
import hashlib
import re
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from myllm.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free port.

    Raises:
        UserError: the address does not exist on this machine, or the port is in use or not allowed.
    """
    if not 0 <= port <= 65_535:
        raise UserError(f"port {port}: give an integer from 0 to 65,535 (0 takes any free port)")
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ports just closed, not those in use
        listening.bind(address)
        listening.listen(64)
    except (OSError, UnicodeError) as error:
        if listening:
            listening.close()
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; give another --port (0 takes any free port), or another "
            "--host (127.0.0.1 for this machine only, 0.0.0.0 for all networks)"
        ) from None
    return listening


def is_allowed_host(header: str, host: str, loopback_only: bool) -> bool:
    """True if a Host header names this server.

    In DNS rebinding, an attacker's domain resolves to this machine, but the browser still sends that domain. So
    `localhost`, the given host and addresses are accepted; if the server is for this machine only, loopback addresses.
    Nobody can own `host.docker.internal`, which containers call this machine.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if _address(name) is not None:
        return is_loopback(name) or not loopback_only
    return name in {"localhost", "host.docker.internal", host.lower()} or (
        not loopback_only and name == socket.gethostname().lower()
    )


def same_host(origin: str, host: str) -> bool:
    """True if an Origin header is that of the Host header."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_loopback


def content_security_policy(page: str) -> str:
    """Only the page's own script and style run, and nothing is loaded from elsewhere."""

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
