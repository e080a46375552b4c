"""The server that Ollama's own client would call, by the variable OLLAMA_HOST."""

from __future__ import annotations

import ipaddress
import os

from ..errors import InvalidOptionError
from ..models import DeploymentEnvironment

DEFAULT_PORT = 11434
"""Where Ollama listens unless it is told otherwise."""

_PORTS = {"http": 80, "https": 443}


def environment_from_host(
    host: str | None = None, *, name: str = "ollama", token_env: str | None = None
) -> DeploymentEnvironment:
    """A deployment environment for the server that Ollama's own client would call.

    >>> environment_from_host("box").url
    'http://box:11434'
    >>> environment_from_host("https://box/ollama").url
    'https://box:443/ollama'

    Args:
        host: As OLLAMA_HOST has it; the variable itself if None.
        name: Of the environment.
        token_env: See `DeploymentEnvironment`.

    Raises:
        InvalidOptionError: It names no host, another scheme than http and https, or a user, whom
            Ollama's client takes for the host in `user:password@box`.

    Source: `Host` in `envconfig/config.go` of Ollama v0.34.1; unlike a client, nobody can call
    0.0.0.0 or ::, which a server listens on, so that they become the loopback address.
    """
    value = os.environ.get("OLLAMA_HOST", "") if host is None else host
    value = value.strip().strip("\"'").strip()
    scheme, separator, rest = value.partition("://")
    if not separator:
        scheme, rest = ("https", "ollama.com:443") if value == "ollama.com" else ("http", value)
    default = _PORTS.get(scheme, DEFAULT_PORT) if separator else DEFAULT_PORT
    hostport, _, path = rest.partition("/")
    if "@" in hostport:  # not shown: it may hold a password
        raise InvalidOptionError(
            "OLLAMA_HOST takes no user and no password: the setting 'basic_auth_env' of a "
            "DeploymentEnvironment names the environment variable that holds 'user:password'"
        )
    address, port = _split(hostport, default)
    if address in ("", "0.0.0.0", "::"):
        address = "::1" if address == "::" else "127.0.0.1"
    return DeploymentEnvironment(
        name,
        "ollama",
        address,
        port,
        scheme=scheme,
        path=path,
        token_env=token_env,
    )


def _split(hostport: str, default: int) -> tuple[str, int]:
    """Host and port, as Go's `net.SplitHostPort` tells them apart, or else as Ollama goes on."""
    inside, bracket, after = hostport.removeprefix("[").partition("]")
    if hostport.startswith("[") and bracket and after.startswith(":"):
        return inside, _port(after[1:], default)
    if hostport.count(":") == 1 and "[" not in hostport:
        host, _, port = hostport.partition(":")
        return host, _port(port, default)
    bare = hostport.strip("[]")
    try:
        return str(ipaddress.ip_address(bare)), default
    except ValueError:
        return hostport or "127.0.0.1", default


def _port(text: str, default: int) -> int:
    """A port that is none is passed over, as Ollama does; 0 would be any free one."""
    return int(text) if text.isascii() and text.isdigit() and 0 < int(text) < 65536 else default
