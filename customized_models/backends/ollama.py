"""Ollama, over its own HTTP API: our GGUF file as one blob, then a model made of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from ..deploying.templates.chat_template import ChatTemplate
from ..deploying.templates.conversations import Conversation
from ..deploying.templates.live import Tokenizer, prove_on_ollama
from ..deploying.templates.proofs import TemplateProof
from ..errors import (
    DeploymentError,
    InvalidNameError,
    NoTemplateError,
    ServerAnswerError,
    ServerUnreachableError,
    shown,
)
from ..gguf import GGUFFile
from ..models import DeploymentEnvironment, Progress, Served, Status
from .connection import Connection, Secrets, checked_settings, environment_variable
from .http import JSONServer
from .ollama_api import (
    CREATE_SECONDS,
    Name,
    create_model,
    digest_of,
    is_made_of,
    listed_models,
    remove_versions,
    server_version,
    show_model,
    unload_model,
    upload_file,
)
from .ollama_host import DEFAULT_PORT, environment_from_host
from .ollama_names import give_name, new_version, refuse_taken_name, take_name
from .ollama_options import OllamaOptions
from .protocol import Artifact, Plan, checked_options, chosen_served_name

if TYPE_CHECKING:
    import httpx

__all__ = ["Ollama", "OllamaOptions", "environment_from_host"]


class Ollama:
    """An Ollama server, 0.5.5 or later; on port 11434 if the environment states none.

    A model is made under a tag of its own beside the served name, such as
    `support:cm-3be93ff2a1b7`, and takes the served name once it is proven. Both stand for the same
    manifest, whose digest is recorded: only what has that digest is ever removed. Tags that begin
    with such a one, as `support:cm-3be93ff2a1b7-claim-5d1f0c2e`, are there for a moment while a
    name changes its meaning.

    Undeploying frees the disk as well: Ollama deletes a file together with the last model that is
    made of it. A file that was sent for a deployment which then failed has no model, and stays for
    the next attempt. Ollama has no request to remove it, and does so by itself when it starts:
    before 0.21.0 every such file, since then one that is more than an hour old.
    """

    options = OllamaOptions

    def __init__(
        self,
        environment: DeploymentEnvironment,
        *,
        secrets: Secrets = environment_variable,
        client: httpx.Client | None = None,
    ) -> None:
        self._environment = environment
        self._secrets = secrets
        self._given = client
        checked_settings(environment)
        self.url  # noqa: B018 -- raises where there is no address

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `Backend.preflight`; sends GET requests only.

        Raises:
            NoTemplateError: There is no deployment template. Ollama would guess one.
            UnsupportedVersionError: The server is older than 0.5.5.
        """
        options = checked_options(options, OllamaOptions)
        name = _checked(Name.of(chosen_served_name(artifact, served_name)))
        artifact.check_gguf()
        if artifact.template is None and not options.use_chat_template:
            raise NoTemplateError(
                f"Ollama needs a deployment template to serve {shown(artifact.name)}; give its "
                f"base model one with ModelRegistry.set_deployment_template, or say "
                f"template='infer' to have it made from the chat template"
            )
        server = self._server()
        found = server_version(server)
        options.refuse_unfit(found)
        template = None if options.use_chat_template else artifact.template
        details = {"version": str(new_version(name))}
        return Plan(artifact, name.short, options, details, template)

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `Backend.push`. Details: `version`, its tag, and `manifest`, its digest."""
        chat_template = plan.options.use_chat_template
        file = plan.artifact.gguf(progress, chat_template=chat_template)
        server, version = self._server(), Name.of(plan.details["version"])
        upload_file(server, file, progress)
        try:
            progress("creating", 0, 0)
            create_model(server, version, file, self._body(plan), progress)
            manifest = self._verified(server, version, plan, file)
        except BaseException as error:
            _take_back(server, version, error)
            raise
        details = {**plan.details, "manifest": manifest}
        return Served(str(version), server.url, "ollama", file.digest, details, copied=True)

    def _body(self, plan: Plan) -> dict[str, Any]:
        template = plan.template
        body: dict[str, Any] = {} if template is None else {"template": template.text}
        stop = [*(template.stop if template else ()), *plan.options.parameters.get("stop", ())]
        parameters = {n: v for n, v in plan.options.parameters.items() if n != "stop"}
        if stop:
            parameters["stop"] = list(dict.fromkeys(stop))
        if parameters:
            body["parameters"] = parameters
        if plan.options.system is not None:
            body["system"] = plan.options.system
        return body

    def _verified(self, server: JSONServer, version: Name, plan: Plan, file: GGUFFile) -> str:
        """The digest of the new manifest, once the server shows that it is what was sent."""
        where = f"Ollama at {server.url}, {shown(version)}"
        told, body = show_model(server, version), self._body(plan)
        if not is_made_of(told, file.digest):
            raise ServerAnswerError(f"{where}: it does not serve the file it was given")
        if "template" in body and told.get("template") != body["template"]:
            raise ServerAnswerError(f"{where}: its template is not the one it was given")
        if (told.get("system") or None) != plan.options.system:
            raise ServerAnswerError(f"{where}: its system message is not the one it was given")
        digest = digest_of(server, version)
        if digest is None:
            raise ServerAnswerError(f"{where}: it was created, and is not listed")
        return digest

    def probe(self, served: Served) -> OllamaProbe:
        """See `Probing`: what proves the model under its version's tag."""
        server = self._server()
        # The first answer waits for the model to be loaded.
        patient = evolve(server.connection, timeout=max(server.connection.timeout, CREATE_SECONDS))
        return OllamaProbe(evolve(server, connection=patient), served.details["version"])

    def refuse_taken(self, name: str, replaced: Collection[str] | None) -> None:
        """See `Promoting.refuse_taken`."""
        if replaced is not None:
            refuse_taken_name(self._server(), Name.of(name), replaced)

    def promote(self, served: Served, name: str, replaced: Collection[str] | None) -> Served:
        """See `Promoting.promote`."""
        server, version = self._server(), Name.of(served.details["version"])
        give_name(server, Name.of(name), version, self.identity(served), replaced)
        return evolve(served, name=name)

    def identity(self, served: Served) -> str:
        """See `Promoting.identity`: the manifest's digest."""
        return str(served.details["manifest"])

    def version(self, served: Served) -> Served:
        """See `Promoting.version`."""
        return evolve(served, name=served.details["version"])

    def status(self, served: Served) -> Status:
        """See `Backend.status`."""
        server, name = self._server(), Name.of(served.name)
        try:
            digest = digest_of(server, name)
            if digest is None:
                return Status.ABSENT
            if digest != served.details.get("manifest"):
                return Status.CHANGED
            names = {str(name), str(Name.of(served.details["version"]))}
            loaded = names & listed_models(server, "/api/ps").keys()
        except (ServerUnreachableError, ServerAnswerError):
            return Status.UNREACHABLE
        return Status.LOADED if loaded else Status.LIVE

    def unload(self, served: Served, seconds: float) -> str:
        """See `Unloading`."""
        server, digest = self._server(), served.details.get("manifest")
        version, name = Name.of(served.details["version"]), Name.of(served.name)
        if digest is None:
            return ""  # of a push that was killed, and had no other name
        take_name(server, name, version, digest)
        if digest_of(server, version) != digest:
            return ""  # its answers, if there are any, are nobody's to wait for
        if unload_model(server, (version, name), digest, seconds):
            return ""
        return (
            f"an answer was still under way after {seconds:g} seconds; the memory is freed once "
            f"that is finished"
        )

    def undeploy(self, served: Served) -> None:
        """See `Backend.undeploy`: what has the recorded digest goes, all else stays."""
        self.unload(served, 0)
        remove_versions(self._server(), Name.of(served.details["version"]))

    @property
    def url(self) -> str:
        """See `Addressed`."""
        return self._environment.url_with(DEFAULT_PORT)

    def describe(self) -> Mapping[str, Any]:
        """See `Describing`: the version, and what it can do."""
        version = server_version(self._server())
        return {
            "version": ".".join(map(str, version.number)),
            "shows what a template writes": version.renders,
            "can use the file's chat template": version.uses_file_template,
            "keeps unused files over a restart": f"{version.keeps_blobs:g} s",
        }

    def _server(self) -> JSONServer:
        connection = Connection.of(self._environment, self._secrets, default_port=DEFAULT_PORT)
        return JSONServer("Ollama", connection, self._given)


@frozen
class OllamaProbe:
    """What a model at Ollama is asked for its proofs; see `Probe`."""

    server: JSONServer
    name: str

    def template(
        self, chat: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Conversation]
    ) -> TemplateProof:
        """See `Probe.template`."""
        return prove_on_ollama(self.server, self.name, chat, tokenizer, conversations=conversations)

    def tensor_types(self) -> Mapping[str, str] | None:
        """See `Probe.tensor_types`; servers before 0.5.13 do not tell."""
        told = self.server.post("/api/show", {"model": self.name, "verbose": True})
        tensors = told.get("tensors")
        if not isinstance(tensors, list):
            return None
        return {str(t.get("name")): str(t.get("type")).upper() for t in tensors}

    def greedy(self, prompt: str, count: int) -> str:
        """See `Probe.greedy`."""
        options = {
            "temperature": 0, "num_predict": count, "repeat_penalty": 1.0, "top_k": 1, "seed": 0,
        }  # fmt: skip
        body = {
            "model": self.name, "prompt": prompt, "raw": True, "stream": False, "options": options,
        }  # fmt: skip
        answer = self.server.post("/api/generate", body, seconds=CREATE_SECONDS)
        return str(answer.get("response"))


def _checked(name: Name) -> Name:
    """The name, unless current servers take it for one of a model elsewhere.

    Source: `parseSourceSuffix` in `internal/modelref/modelref.go` of Ollama v0.34.1.
    """
    if name.tag in ("cloud", "local") or name.tag.endswith("-cloud"):
        raise InvalidNameError(
            f"served name {shown(name)}: Ollama keeps the tags 'cloud', 'local' and '...-cloud' "
            f"for itself"
        )
    return name


def _take_back(server: JSONServer, version: Name, error: BaseException) -> None:
    """Delete what a failed creation left under the tag that was drawn for it."""
    try:
        remove_versions(server, version)
    except DeploymentError as second:
        error.add_note(
            f"{shown(version)} may be left at the server, which could not be asked: {second}"
        )
