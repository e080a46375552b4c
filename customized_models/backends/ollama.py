"""Ollama, over its own HTTP API: our GGUF file as one blob, then a model made of it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import (
    AlreadyExistsError,
    DeploymentError,
    NoTemplateError,
    ServedModelChangedError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedVersionError,
    shown,
)
from ..gguf import GGUFFile
from ..models import DeploymentEnvironment, DeploymentTemplate, Progress, Served, Status
from .http import JSONServer, answer_timeout, bearer_token
from .ollama_options import OllamaOptions
from .protocol import Artifact, Plan, checked_options, chosen_served_name

if TYPE_CHECKING:
    import httpx

__all__ = ["Ollama", "OllamaOptions"]

_CREATE_SECONDS = 900.0  # the server reads the file, and some versions copy it
_UNLOAD_SECONDS = 10.0


class Ollama:
    """An Ollama server, 0.5.5 or later.

    Of what a deployment sends, only an uploaded file can outlive its failure: Ollama has no
    request to remove one, and does it by itself the next time it starts.
    """

    options = OllamaOptions

    def __init__(
        self, environment: DeploymentEnvironment, *, client: httpx.Client | None = None
    ) -> None:
        self._environment = environment
        self._url = environment.url
        self._timeout = answer_timeout(environment)
        self._client = client

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `Backend.preflight`; sends GET requests only.

        Raises:
            NoTemplateError: the base model has no deployment template. Ollama would guess one.
            UnsupportedVersionError: the server is older than 0.5.5.
        """
        options = checked_options(options, OllamaOptions)
        name = chosen_served_name(artifact, served_name)
        artifact.check_gguf()
        if artifact.template is None or not artifact.template.text:
            raise NoTemplateError(
                f"Ollama needs a deployment template to serve {shown(artifact.name)}; give its "
                f"base model one with ModelRegistry.set_deployment_template"
            )
        server = self._server()
        _refuse_version(server.get("/api/version").get("version"))
        _refuse_taken(server, name)
        return Plan(artifact, name, options)

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `Backend.push`. Details: `manifest`, the digest the server gives the whole model."""
        file = plan.artifact.gguf(progress, chat_template=False)
        server = self._server()
        _upload_if_missing(server, file, progress)
        # Someone may have taken the name since preflight, and creating replaces silently.
        _refuse_taken(server, plan.served_name)
        try:
            progress("creating", 0, 1)
            _create(server, plan, file, progress)
            manifest = _verified(server, plan, file)
            progress("creating", 1, 1)
        except BaseException as error:
            _withdraw(server, plan.served_name, error)
            raise
        return Served(
            plan.served_name, self._url, "ollama", file.digest, details={"manifest": manifest}
        )

    def status(self, served: Served) -> Status:
        """See `Backend.status`."""
        server = self._server()
        try:
            entry = _entry(server, "/api/tags", served.name)
            if entry is None:
                return Status.ABSENT
            if entry.get("digest") != served.details["manifest"]:
                return Status.CHANGED
            loaded = _entry(server, "/api/ps", served.name)
        except (ServerUnreachableError, ServerAnswerError):
            return Status.UNREACHABLE
        return Status.LIVE if loaded is None else Status.LOADED

    def undeploy(self, served: Served) -> None:
        """See `Backend.undeploy`."""
        server = self._server()
        entry = _entry(server, "/api/tags", served.name)
        if entry is None:
            return
        if "manifest" not in served.details:  # of a push that was killed
            if not served.digest or not _serves(server, served.name, served.digest):
                return
        elif entry.get("digest") != served.details["manifest"]:
            raise ServedModelChangedError(
                f"{shown(served.name)} at {self._url} is no longer the model that was deployed: "
                f"someone else changed it, so it is not removed; once `ollama rm` has removed "
                f"it, undeploying succeeds"
            )
        _unload(server, served.name)
        server.delete("/api/delete", {"model": served.name})
        if _entry(server, "/api/tags", served.name) is not None:
            raise ServerAnswerError(
                f"Ollama at {self._url} says it deleted {shown(served.name)}, and still lists it"
            )

    def _server(self) -> JSONServer:
        token = bearer_token(self._environment)
        return JSONServer("Ollama", self._url, self._timeout, token, self._client)


def _refuse_version(version: object) -> None:
    match = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", str(version), re.ASCII)
    if match is None:
        raise ServerAnswerError(f"Ollama calls its version {shown(version)}, which is none")
    number = tuple(map(int, match.groups()))
    if number < (0, 5, 5):
        raise UnsupportedVersionError(
            f"Ollama {shown(version)} cannot make a model from an uploaded file; 0.5.5 can"
        )


def _entry(server: JSONServer, path: str, name: str) -> dict[str, Any] | None:
    """What the listing at `path` has under `name`; Ollama's names ignore case."""
    models = server.get(path).get("models") or []
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise ServerAnswerError(f"Ollama at {server.url}: {path} does not list models")
    wanted = f"{name}:latest"
    return next((m for m in models if str(m.get("name")).lower() == wanted), None)


def _refuse_taken(server: JSONServer, name: str) -> None:
    if _entry(server, "/api/tags", name) is not None:
        raise AlreadyExistsError(f"Ollama at {server.url} already has a model {shown(name)}")


def _upload_if_missing(server: JSONServer, file: GGUFFile, progress: Progress) -> None:
    blob = f"/api/blobs/{file.digest}"
    if not server.has(blob):
        server.upload(blob, file, progress)


def _create(server: JSONServer, plan: Plan, file: GGUFFile, progress: Progress) -> None:
    try:
        _create_once(server, plan, file)
    except ServerAnswerError:
        # A server that restarts drops what no model uses yet.
        if server.has(f"/api/blobs/{file.digest}"):
            raise
        _upload_if_missing(server, file, progress)
        _create_once(server, plan, file)


def _create_once(server: JSONServer, plan: Plan, file: GGUFFile) -> None:
    body: dict[str, Any] = {
        "model": plan.served_name,
        "files": {"model.gguf": file.digest},
        "template": _template(plan).text,
        "stream": True,
    }
    if parameters := _parameters(plan):
        body["parameters"] = parameters
    if plan.options.system is not None:
        body["system"] = plan.options.system
    lines = server.post_for_lines("/api/create", body, seconds=_CREATE_SECONDS)
    for line in lines:
        if "error" in line:
            raise ServerAnswerError(
                f"Ollama at {server.url} did not create {shown(plan.served_name)}: "
                f"{server.shown(line['error'])}"
            )
    if not lines or lines[-1].get("status") != "success":
        raise ServerAnswerError(
            f"Ollama at {server.url} stopped creating {shown(plan.served_name)} without success"
        )


def _parameters(plan: Plan) -> dict[str, Any]:
    stop = [*_template(plan).stop, *plan.options.parameters.get("stop", ())]
    rest = {name: v for name, v in plan.options.parameters.items() if name != "stop"}
    return {**rest, "stop": list(dict.fromkeys(stop))} if stop else rest


def _template(plan: Plan) -> DeploymentTemplate:
    template = plan.artifact.template
    assert template is not None  # preflight refused
    return template


def _verified(server: JSONServer, plan: Plan, file: GGUFFile) -> str:
    """The digest of the new model's manifest, once the server shows that it is what was sent."""
    where = f"Ollama at {server.url}, {shown(plan.served_name)}"
    shows = server.post("/api/show", {"model": plan.served_name})
    # The Modelfile's first instruction; further on, it quotes text of ours. Servers from 0.30.0 to
    # 0.34.0 serve llama-quantize's copy of the file, which has the same bytes if it was written
    # in llama.cpp's own order.
    if not _is_made_of(shows, file.digest):
        raise ServerAnswerError(f"{where}: it does not serve the file it was given")
    if shows.get("template") != _template(plan).text:
        raise ServerAnswerError(f"{where}: its template is not the one it was given")
    if (shows.get("system") or None) != plan.options.system:
        raise ServerAnswerError(f"{where}: its system message is not the one it was given")
    entry = _entry(server, "/api/tags", plan.served_name)
    if entry is None or not re.fullmatch(r"[0-9a-f]{64}", str(entry.get("digest"))):
        raise ServerAnswerError(f"{where}: it was created, and is not listed with a digest")
    return str(entry["digest"])


def _serves(server: JSONServer, name: str, digest: str) -> bool:
    return _is_made_of(server.post("/api/show", {"model": name}), digest)


def _is_made_of(shows: Mapping[str, Any], digest: str) -> bool:
    """Whether what /api/show tells of a model says that its weights are the blob of that digest."""
    weights = re.search(r"^FROM .*", str(shows.get("modelfile")), re.MULTILINE)
    return weights is not None and weights[0].rstrip().endswith(digest.replace(":", "-"))


def _withdraw(server: JSONServer, name: str, error: BaseException) -> None:
    """Delete what a failed creation left under a name that was free before."""
    try:
        if _entry(server, "/api/tags", name) is not None:
            server.delete("/api/delete", {"model": name})
    except DeploymentError as second:
        error.add_note(
            f"{shown(name)} may be left at the server, which could not be asked: {second}"
        )


def _unload(server: JSONServer, name: str) -> None:
    """Take the model out of memory, if it is there."""
    if _entry(server, "/api/ps", name) is None:
        return
    server.post("/api/generate", {"model": name, "keep_alive": 0, "stream": False})
    end = time.monotonic() + _UNLOAD_SECONDS
    while _entry(server, "/api/ps", name) is not None:
        if time.monotonic() > end:
            raise ServerAnswerError(
                f"Ollama at {server.url} does not take {shown(name)} out of memory"
            )
        time.sleep(0.05)
