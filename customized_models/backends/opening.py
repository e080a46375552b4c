"""A backend by its name: ours, an installed plug-in's, or one that the caller brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import TypeAlias

from attrs import field, frozen

from ..errors import InvalidOptionError, shown
from ..models import DeploymentEnvironment, LiveModel, Served
from .connection import Secrets, environment_variable
from .llama_cpp import LlamaCpp
from .llama_server import LlamaServer
from .ollama import Ollama
from .protocol import Addressed, Backend, Promoting
from .sglang import SGLang
from .vllm import VLLM

ENTRY_POINTS = "customized_models.backends"
"""The entry point group of further backends: name to a callable that takes the environment."""

BackendFactory: TypeAlias = Callable[[DeploymentEnvironment], Backend]

BUILT_IN: Mapping[str, Callable[..., Backend]] = {
    "llama_cpp": LlamaCpp,
    "llama_server": LlamaServer,
    "ollama": Ollama,
    "sglang": SGLang,
    "vllm": VLLM,
}


@frozen
class Tools:
    """The deployment tools that a caller can reach, and where it keeps their secrets.

    Attributes:
        backends: Further ones, by name.
        secrets: Gives the secret that an environment names, such as in `token_env`.
    """

    backends: Mapping[str, BackendFactory] = field(factory=dict)
    secrets: Secrets = environment_variable


def open_backend(environment: DeploymentEnvironment, tools: Tools | None = None) -> Backend:
    """The backend that serves `environment`; nothing is sent yet.

    Args:
        environment: Names it.
        tools: What the caller brings.

    Raises:
        InvalidOptionError: No backend goes by that name, or it does not know a setting.
    """
    tools = tools or Tools()
    if environment.backend in tools.backends:
        return tools.backends[environment.backend](environment)
    if environment.backend in BUILT_IN:
        return BUILT_IN[environment.backend](environment, secrets=tools.secrets)
    known = {*BUILT_IN, *tools.backends}
    further = entry_points(group=ENTRY_POINTS)
    for point in further.select(name=environment.backend):
        backend: Backend = point.load()(environment)
        return backend
    names = ", ".join(sorted({*known, *further.names}))
    raise InvalidOptionError(
        f"environment {shown(environment.name)} names the backend {shown(environment.backend)}; "
        f"known are {names}, what installed packages add to {ENTRY_POINTS}, and what "
        f"Deployer(registry, backends=...) is given"
    )


def served_there(live: LiveModel, backend: Backend) -> Served:
    """What a live model is called there: its name stands for another once it is superseded."""
    if live.state == "superseded" and isinstance(backend, Promoting):
        return backend.version(live.served)
    return live.served


def moved_endpoint(
    endpoint: str,
    old: DeploymentEnvironment,
    new: DeploymentEnvironment,
    tools: Tools | None = None,
) -> str:
    """Where a model is called whose server was at `old` and is at `new` now."""
    before, after = _address(old, tools), _address(new, tools)
    if before is None or after is None or not f"{endpoint}/".startswith(f"{before}/"):
        return endpoint
    return after + endpoint.removeprefix(before)


def _address(environment: DeploymentEnvironment, tools: Tools | None) -> str | None:
    """What endpoints there begin with; None if they are the backend's own matter."""
    if environment.address is None:
        return None
    with suppress(InvalidOptionError):  # a backend that is not installed any more, or not here
        backend = open_backend(environment, tools)
        if isinstance(backend, Addressed):
            return backend.url
    return environment.url


def check_environment(environment: DeploymentEnvironment) -> None:
    """Refuse settings that its backend does not know, and a name that is nearly a known one.

    A backend of another name may be one that the `Deployer` is given.

    Raises:
        InvalidOptionError: It is refused.
    """
    known = {*BUILT_IN, *entry_points(group=ENTRY_POINTS).names}
    if environment.backend in known:
        open_backend(environment)
    elif near := get_close_matches(environment.backend.lower().replace(".", "_"), known, 1):
        raise InvalidOptionError(
            f"there is no backend {shown(environment.backend)}; did you mean {shown(near[0])}?"
        )
