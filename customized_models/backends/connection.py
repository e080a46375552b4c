"""How a deployment environment's server is reached: certificates, passwords, proxies, patience.

All of it comes from the environment's own record and from where that says secrets are. No secret
is ever in a record, a message, a chain of causes or a log line.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import re
import ssl
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import field, frozen

from ..errors import InvalidOptionError, MissingDependencyError, shown
from ..models import DeploymentEnvironment

if TYPE_CHECKING:
    import httpx

Secrets: TypeAlias = Callable[[str], "str | None"]
"""Gives the secret of a name, such as an environment variable's; None if there is none."""


def environment_variable(name: str) -> str | None:
    """The secrets of who says nothing else: what the environment variable of that name holds."""
    return os.environ.get(name)


DEFAULT_SECONDS = 30.0  # a busy server may take a while for a short answer
MAX_SECONDS = 3600.0  # a proxy may hand an upload on only once it has all of it

_TELLING = 6  # characters: of a shorter secret, nobody can say that it was repeated
_STARS = "***"

_FILES = ("ca_file", "client_certificate", "client_key")
_SETTINGS = ("timeout", *_FILES, "basic_auth_env", "proxy", "llama_cpp")


@frozen
class Connection:
    """How to talk to one server.

    Attributes:
        url: Without a trailing slash.
        timeout: Seconds within which a short answer must be complete.
        authorization: The header's value, or None.
        ca_file: Certificates of the authorities to trust, besides the public ones.
        client_certificate: A certificate to show, or None.
        client_key: Its key, if that is in another file.
        proxy: The URL of a proxy, or None: an environment's address is where its bytes go,
            whichever process sends them, so variables such as HTTPS_PROXY are not looked at.
    """

    url: str
    timeout: float = DEFAULT_SECONDS
    authorization: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None
    proxy: str | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls,
        environment: DeploymentEnvironment,
        secrets: Secrets,
        *,
        default_port: int | None,
        own: Collection[str] = (),
    ) -> Connection:
        """The connection that an environment states; secrets are looked up now.

        Settings: `timeout` (seconds), `ca_file`, `client_certificate`, `client_key` (paths of PEM
        files), `basic_auth_env` (the variable that holds `user:password`), `proxy` (a URL), and
        `llama_cpp`, a checkout whose converter makes files of architectures that have none here.
        `own`: the names of further ones, which the backend looks at.

        Raises:
            InvalidOptionError: A setting is unknown or of another type, a file is missing, or a
                secret is not there.
        """
        settings = checked_settings(environment, own)
        return cls(
            url=environment.url_with(default_port),
            timeout=float(settings.get("timeout", DEFAULT_SECONDS)),
            authorization=_authorization(environment, secrets),
            ca_file=settings.get("ca_file"),
            client_certificate=settings.get("client_certificate"),
            client_key=settings.get("client_key"),
            proxy=settings.get("proxy"),
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not stand in any text: servers may repeat what they were sent.

        Each also as JSON, and as Python in a message of another library, writes it.
        """
        if self.authorization is None:
            return ()
        kind, _, credentials = self.authorization.partition(" ")
        plain = [credentials]
        if kind == "Basic":
            decoded = base64.b64decode(credentials).decode()
            plain += [decoded, decoded.partition(":")[2]]
        written = [(t, json.dumps(t)[1:-1], repr(t.encode())[2:-1]) for t in filter(None, plain)]
        return tuple(dict.fromkeys(text for texts in written for text in texts))

    def masked(self, text: object) -> str:
        """`text` with stars in place of secrets."""
        return _starred(str(text), self.secrets)

    def without_secrets(self, answer: Any) -> Any:
        """What JSON holds, with stars in place of secrets in each text and key.

        Secrets that stand in ordinary text by chance, such as `a`, are left where they are: a
        digest with stars in it would be none. They do not get into messages all the same; see
        `masked`.
        """
        telling = tuple(secret for secret in self.secrets if len(secret) >= _TELLING)
        return _each_starred(answer, telling) if telling else answer

    def client(self) -> httpx.Client:
        """A client for one exchange; it keeps no connection.

        Raises:
            InvalidOptionError: A certificate or key cannot be used.
            MissingDependencyError: What a proxy of SOCKS needs is not installed.
        """
        import httpx

        _mask_log_lines(self.secrets)
        verify = _context(self.ca_file, self.client_certificate, self.client_key)
        try:
            return httpx.Client(trust_env=False, verify=verify, proxy=self.proxy)
        except ImportError as error:
            raise MissingDependencyError(
                "a proxy of SOCKS needs socksio: pip install 'httpx[socks]'"
            ) from error


def _starred(text: str, secrets: Iterable[str]) -> str:
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _STARS)
    return text


def _each_starred(value: Any, secrets: Iterable[str]) -> Any:
    if isinstance(value, str):
        return _starred(value, secrets)
    if isinstance(value, list):
        return [_each_starred(item, secrets) for item in value]
    if isinstance(value, dict):
        return {_starred(key, secrets): _each_starred(item, secrets) for key, item in value.items()}
    return value


def checked_settings(
    environment: DeploymentEnvironment, own: Collection[str] = ()
) -> Mapping[str, Any]:
    """The environment's settings, if each is known here and of the right type.

    Args:
        environment: Has them.
        own: The names of further ones, which the backend looks at.

    Raises:
        InvalidOptionError: One is not; its value is not shown, as it may be a secret.
    """
    for name, value in environment.settings.items():
        if name in own:
            continue
        if name not in _SETTINGS:
            known = ", ".join((*_SETTINGS, *own))
            raise InvalidOptionError(f"unknown setting {shown(name)}; known are {known}")
        if name == "timeout":
            if type(value) not in (int, float) or not 0 < value <= MAX_SECONDS:
                raise InvalidOptionError(
                    f"the setting 'timeout' must be more than 0 and at most "
                    f"{MAX_SECONDS:.0f} seconds"
                )
        elif not isinstance(value, str) or not value:
            raise InvalidOptionError(f"the setting {shown(name)} must be text")
        elif name == "llama_cpp":
            if not Path(value, "convert_hf_to_gguf.py").is_file():
                raise InvalidOptionError("the setting 'llama_cpp' names no checkout of llama.cpp")
        elif name in _FILES and not Path(value).is_file():
            raise InvalidOptionError(f"the setting {shown(name)} names no file")
        elif name == "proxy" and not re.fullmatch(r"(https?|socks5h?)://[^\s@]+", value):
            raise InvalidOptionError(
                "the setting 'proxy' must be a URL such as http://proxy:3128, without a password"
            )
    if environment.token_env and environment.settings.get("basic_auth_env"):
        raise InvalidOptionError("token_env and basic_auth_env exclude each other")
    return environment.settings


def bearer_token(environment: DeploymentEnvironment, secrets: Secrets) -> str | None:
    """What `token_env` names; None if the environment names nothing.

    Raises:
        InvalidOptionError: There is no such secret, or it cannot stand in a header.
    """
    if environment.token_env is None:
        return None
    token = secrets(environment.token_env) or ""
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidOptionError(
            f"environment {shown(environment.name)} takes its bearer token from "
            f"{shown(environment.token_env)}, which does not hold one"
        )
    return token


def _authorization(environment: DeploymentEnvironment, secrets: Secrets) -> str | None:
    token = bearer_token(environment, secrets)
    if token is not None:
        return f"Bearer {token}"
    named = environment.settings.get("basic_auth_env")
    if named is None:
        return None
    pair = secrets(named) or ""
    if ":" not in pair or not pair.isprintable():
        raise InvalidOptionError(
            f"environment {shown(environment.name)} takes user and password from {shown(named)}, "
            f"which does not hold 'user:password'"
        )
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _context(ca_file: str | None, certificate: str | None, key: str | None) -> ssl.SSLContext:
    return _new_context(
        ca_file, certificate, key, os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    )


@functools.lru_cache(maxsize=8)
def _new_context(
    ca_file: str | None,
    certificate: str | None,
    key: str | None,
    env_file: str | None,
    env_directory: str | None,
) -> ssl.SSLContext:
    """Reading the public authorities takes longer than most requests, so it is done once.

    SSL_CERT_FILE and SSL_CERT_DIR add authorities, as they do for OpenSSL's own tools.
    """
    import httpx

    context = httpx.create_ssl_context(trust_env=False)
    try:
        for file in filter(None, (ca_file, env_file)):
            context.load_verify_locations(cafile=file)
        if env_directory:
            context.load_verify_locations(capath=env_directory)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidOptionError(f"a certificate or key cannot be used: {shown(error)}") from error
    return context


class _Mask(logging.Filter):
    """Puts stars in place of secrets in log records of others, who log what servers say."""

    def __init__(self) -> None:
        super().__init__()
        self.secrets: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (starred := _starred(text, self.secrets)) != text:
            record.msg, record.args = starred, ()
        return True


_mask = _Mask()
# A filter sees what its own logger is given, and not what loggers below it are.
_LOGGERS = ("httpx", *(f"httpcore.{part}" for part in ("connection", "http11", "proxy", "socks")))


def _mask_log_lines(secrets: tuple[str, ...]) -> None:
    _mask.secrets.update(secrets)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_mask)  # again is fine: a filter is added once
