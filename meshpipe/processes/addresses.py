"""Network addresses: which interface to use, and who can reach it."""

import ipaddress
import socket

from meshpipe.errors import ArgumentError


def check_one_address(name: str, host: str) -> None:
    """Raises `ArgumentError` for a wildcard address, in any notation (0.0.0.0, [::], ...)."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, flags=socket.AI_NUMERICHOST)
    except OSError:  # a name
        return
    address = ipaddress.ip_address(str(found[0][4][0]))
    mapped = getattr(address, "ipv4_mapped", None)
    if (mapped or address).is_unspecified:
        raise ArgumentError(
            f"`{name}` must name one network interface of process 0's machine, so that other networks cannot reach the "
            f"run. Got {host}, which means all interfaces. Name one interface, or pass `allow_any_address`."
        )


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can reach a host. Of names, only localhost counts as loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(coordinator: str | None) -> str:
    """The address of this machine's interface towards the coordinator; other processes connect to it."""
    host, _, port = (coordinator or "127.0.0.1:1").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # nothing is sent
        probe.connect((host.strip("[]"), int(port)))
        return str(probe.getsockname()[0])
