"""Where the server listens, and the names by which it may be called."""

import socket
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from myllm.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for browsers; port 0 takes any that is free.

    Raises:
        UserError: no such address here, or the port is taken or not allowed.
    """
    if not 0 <= port <= 65_535:
        raise UserError(f"port {port}: give a whole number from 0 to 65,535 (0 takes any that is free)")
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a moment ago; never one in use
        made.bind(address)
        made.listen(64)
    except (OSError, UnicodeError) as error:
        if made:
            made.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot listen on {host}, port {port}: {why}; give another --port (0 takes any that is free), or another "
            "--host (127.0.0.1 for this machine alone, 0.0.0.0 for all that reach it)"
        ) from None
    return made


def is_allowed_host(header: str, host: str, alone: bool) -> bool:
    """Whether a Host header names this server.

    An attacker's page whose name is made to point here still sends its own name. That is never an address: so
    `localhost` and addresses are good, of a server that is for this machine alone only this machine's own.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if _address(name) is not None:
        return is_loopback(name) or not alone
    return name in {"localhost", host.lower()} or (not alone and name == socket.gethostname().lower())


def _address(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    address = _address(name)
    return address is not None and address.is_loopback
