"""llama.cpp's server elsewhere, as a router: models by files in a directory that both hosts see.

The server is started by someone else, with
`llama-server --models-preset <server_directory>/customized-models.ini` and without a model; the
file may be empty. Each model is a process of the server's, which begins with the first call.

Source: `tools/server/server-models.cpp` of llama.cpp b11434.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath
from typing import Any

from attrs import evolve, field, frozen

from ..adapters.intake import Adapter
from ..adapters.plain_lora import refuse_unless_plain
from ..errors import (
    AlreadyExistsError,
    CustomizedModelsError,
    InvalidNameError,
    InvalidOptionError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedError,
    shown,
)
from ..files.model_directory import carried_files
from ..files.safetensors import Checkpoint, ModelSource
from ..files.writing import disk_errors
from ..gguf import GGUFFile
from ..gguf.adapter import plan_adapter
from ..models import DeploymentEnvironment, Progress, Served, Status, no_progress
from .connection import Connection, Secrets, checked_settings, environment_variable
from .http import JSONServer
from .llama_cpp import LlamaCppProbe
from .presets import FILE, VALUE, sections, with_section, without_section
from .protocol import Artifact, Plan, checked_options, chosen_served_name, positive_or_none
from .router import Router
from .shared_directory import SETTINGS, SharedDirectory, version_name

__all__ = ["LlamaServer", "LlamaServerOptions"]

DEFAULT_PORT = 8080
_OWN_NAMES = ("*", "default")  # sections that are no models
_ENCODING = ("utf-8", "surrogateescape")  # comments of others may be in any, and stay as they are


@frozen
class LlamaServerOptions:
    """How a model is served by a router.

    `beside_base`: not merged into one file, but as the adapter's file beside the base's, which all
    adapters of that base share, on the disk and in memory. `context`: tokens; None for what the
    server was started with, or the model was made for.

    Raises:
        InvalidOptionError: A value of another type.
    """

    beside_base: bool = field(default=False)
    context: int | None = field(default=None, validator=positive_or_none)

    @beside_base.validator
    def _check_beside_base(self, _: object, value: object) -> None:
        if type(value) is not bool:
            raise InvalidOptionError(f"beside_base must be True or False, not {shown(value)}")


class LlamaServer:
    """A router of llama.cpp's; on port 8080 if the environment states none.

    A model's files are copied into a directory that the server reads, under names drawn for this
    deployment, and get a section of the router's file of presets; so does the served name, once
    the model is proven. The file's own chat template is used.

    With `LlamaServerOptions(beside_base=True)`, a customized model is served as its base's file
    and a file of its adapter. The base's is there once, whatever the number of adapters, and the
    processes that serve them share its pages in memory: on a processor, unless it was started with
    `--no-mmap` or repacks the weights (`--no-repack` keeps it from that).

    Settings: see `shared_directory`.
    """

    options = LlamaServerOptions

    def __init__(
        self, environment: DeploymentEnvironment, *, secrets: Secrets = environment_variable
    ) -> None:
        self._environment = environment
        self._secrets = secrets
        checked_settings(environment, SETTINGS)
        _ = self.url  # raises where there is no address
        self._directory = SharedDirectory.of(environment)
        if not VALUE.fullmatch(str(self._directory.there)):
            raise InvalidOptionError(
                "the directory's path has characters that cannot stand in a file of presets"
            )

    @property
    def url(self) -> str:
        """See `Addressed`."""
        return self._environment.url_with(DEFAULT_PORT)

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `Backend.preflight`; sends GET requests only.

        Raises:
            UnsupportedAdapterError: llama.cpp does not apply such an adapter beside its base.
            UnsupportedError: The server is no router, or a complete model or a finished file has no
                base beside it.
        """
        options = checked_options(options, LlamaServerOptions)
        name = chosen_served_name(artifact, served_name)
        if ":" in name or name in _OWN_NAMES:
            raise InvalidNameError(f"llama.cpp's router has a meaning of its own for {shown(name)}")
        artifact.check_gguf()
        if options.beside_base:
            if artifact.finished:
                raise UnsupportedError("gguf= is a merged file, and beside_base=True serves none")
            if artifact.adapter_config is None:
                raise UnsupportedError(
                    f"{shown(artifact.name)} is complete, and has no adapter to serve beside a base"
                )
            refuse_unless_plain(artifact.adapter_config)
        self._directory.check()
        self._router().properties(self._directory.seen_by_server(FILE))
        version = version_name(name, uuid.uuid4().hex[:12])
        return Plan(artifact, name, options, {"version": version})

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `Backend.push`. Details: `version`, how its files' names begin; and `base`."""
        router, version = self._router(), plan.details["version"]
        endpoint, details = f"{self.url}/v1", dict(plan.details)
        served = Served(version, endpoint, "openai", "", details, copied=True)
        try:
            if plan.options.beside_base:
                base = plan.artifact.base_gguf(progress, chat_template=True)
                served = self._beside(served, plan.artifact.base, base)
                served = self._put_beside_base(plan, served, base, progress)
            else:
                served = self._put_whole(plan, served, progress)
            if version not in router.models(reload=True):
                raise ServerAnswerError(
                    f"llama.cpp at {self.url} does not list what was put into "
                    f"{shown(self._directory.here)}: start it with --models-preset "
                    f"{self._directory.seen_by_server(FILE)}"
                )
            router.load(version, progress)
        except BaseException as error:
            try:
                self._take_away(router, evolve(served, digest=""))
            except CustomizedModelsError as second:
                error.add_note(f"{shown(version)} may be left at the server: {second}")
            raise
        return served

    def _put_whole(self, plan: Plan, served: Served, progress: Progress) -> Served:
        file = plan.artifact.gguf(progress, chat_template=True)
        self._directory.put_file(f"{served.name}.gguf", file.path, file.digest, progress)
        self._write_section(served.name, self._section(plan, f"{served.name}.gguf"))
        return evolve(served, digest=file.digest)

    def _beside(self, served: Served, name: str, base: GGUFFile) -> Served:
        """With the name of the base's file there, which all adapters of that base have."""
        base_name = f"{name}.{base.digest.partition(':')[2][:16]}.gguf"
        details = {**served.details, "base": base_name, "base_digest": base.digest}
        return evolve(served, details=details)

    def _put_beside_base(
        self, plan: Plan, served: Served, base: GGUFFile, progress: Progress
    ) -> Served:
        """The adapter's file, and the base's unless it is there."""
        base_name = served.details["base"]
        # First the section: a file that one names is kept when another adapter is undeployed.
        section = self._section(plan, base_name)
        section["lora"] = self._directory.seen_by_server(f"{served.name}.lora")
        self._write_section(served.name, section)
        if not self._directory.holds(base_name, base.digest):
            self._directory.put_file(base_name, base.path, base.digest, progress)
        with plan.artifact.adapter() as beside, self._directory.unfinished() as path:
            base_weights = Checkpoint.open(beside.base)
            source = ModelSource(carried_files(beside.base, base_weights.shards), base_weights)
            adapter = Adapter.open(beside.adapter)
            file = plan_adapter(source, adapter, name=plan.artifact.name).write(path, progress)
            self._directory.publish(path, f"{served.name}.lora")
        return evolve(served, digest=file.digest)

    def _section(self, plan: Plan, model: str) -> dict[str, str]:
        options = {"model": self._directory.seen_by_server(model)}
        if plan.options.context is not None:
            options["ctx-size"] = str(plan.options.context)
        return options

    # Versions and names

    def identity(self, served: Served) -> str:
        """See `Promoting.identity`: the version."""
        return str(served.details["version"])

    def version(self, served: Served) -> Served:
        """See `Promoting.version`."""
        return evolve(served, name=served.details["version"])

    def refuse_taken(self, name: str, replaced: Collection[str] | None) -> None:
        """See `Promoting.refuse_taken`. A model of someone else's is never replaced."""
        section = sections(self._presets()).get(name)
        version = self._version_of(section)
        free = section is None and name not in self._router().models()
        if free or (version is not None and (replaced is None or version in replaced)):
            return
        raise AlreadyExistsError(
            f"llama.cpp at {self.url} already serves something under {shown(name)}; choose another "
            f"served_name, or say replace=True"
        )

    def promote(self, served: Served, name: str, replaced: Collection[str] | None) -> Served:
        """See `Promoting.promote`: the version's section is written again, for the served name.

        The process of what had the name before is ended then.
        """
        router, version = self._router(), served.details["version"]
        with self._directory.locked():
            before = sections(self._presets()).get(name)
            if self._version_of(before) != version:
                self.refuse_taken(name, replaced)
            section = sections(self._presets()).get(version)
            if section is None:
                raise ServerAnswerError(
                    f"{shown(self._directory.here / FILE)} has no section {shown(version)} any "
                    f"more: put it back, or undeploy what it was and deploy it again"
                )
            self._rename(name, section)
            router.models(reload=True)
        router.unload(version)
        try:
            router.load(name, no_progress)
        except BaseException:
            self._give_back(router, name, version, before)
            raise
        return evolve(served, name=name)

    def _give_back(
        self, router: Router, name: str, version: str, before: Mapping[str, str] | None
    ) -> None:
        """Let a name mean what it meant before, unless someone has taken it meanwhile."""
        with self._directory.locked():
            if self._version_of(sections(self._presets()).get(name)) == version:
                self._rename(name, before)
                router.models(reload=True)

    def _rename(self, name: str, options: Mapping[str, str] | None) -> None:
        text = without_section(self._presets(), name)
        self._write(text if options is None else with_section(text, name, options))

    def status(self, served: Served) -> Status:
        """See `Backend.status`."""
        try:
            model = self._router().models().get(served.name)
        except (ServerUnreachableError, ServerAnswerError):
            return Status.UNREACHABLE
        if model is None:
            return Status.ABSENT
        options = {"lora": model.options.get("--lora"), "model": model.options.get("--model")}
        if self._version_of(options) != served.details["version"]:
            return Status.CHANGED
        return Status.LOADED if model.is_loaded else Status.LIVE

    def undeploy(self, served: Served) -> None:
        """See `Backend.undeploy`: the base's file goes with the last adapter beside it."""
        router = self._router()
        router.models()  # raises if the server does not answer; then nothing is removed
        self._take_away(router, served)

    def _take_away(self, router: Router, served: Served) -> None:
        version, details = served.details["version"], served.details
        base = details.get("base", "")
        with self._directory.locked():
            text = self._presets()
            for name, section in sections(text).items():
                if self._version_of(section) == version:
                    text = without_section(text, name)
                    if "lora" in section:  # of a killed push, nothing else tells the base's file
                        base = base or PurePosixPath(section.get("model", "")).name
            if text != self._presets():
                self._write(text)
            used = {section.get("model") for section in sections(text).values()}
        try:
            router.models(reload=True)
        finally:  # the files are large, and a server that has died does not need them
            self._directory.remove(f"{version}.gguf", served.digest)
            # What is known of a killed push is the digest of the base's file.
            self._directory.remove(f"{version}.lora", served.digest if "base" in details else "")
            base_digest = details.get("base_digest", served.digest)
            if base and base_digest and self._directory.seen_by_server(base) not in used:
                self._directory.remove(base, base_digest)

    def probe(self, served: Served) -> LlamaCppProbe:
        """See `Probing`."""
        return LlamaCppProbe(_Named(self._server(), served.name))

    def describe(self) -> Mapping[str, Any]:
        """See `Describing`: the build, and how many models may be loaded at a time."""
        told = self._router().properties(self._directory.seen_by_server(FILE))
        return {
            "version": str(told.get("build_info")),
            "most loaded at a time": told.get("max_instances"),
        }

    # The file of presets

    def _presets(self) -> str:
        path = self._directory.here / FILE
        with disk_errors(f"{FILE} cannot be read"):
            return path.read_bytes().decode(*_ENCODING) if path.exists() else ""

    def _write(self, text: str) -> None:
        with self._directory.unfinished() as path:
            with disk_errors(f"{FILE} cannot be written"):
                path.write_bytes(text.encode(*_ENCODING))
            self._directory.publish(path, FILE)

    def _write_section(self, name: str, options: Mapping[str, str]) -> None:
        with self._directory.locked():
            self._rename(name, options)

    def _version_of(self, section: Mapping[str, str | None] | None) -> str | None:
        """Which version a section of ours is for; None for another's, or none."""
        path = PurePosixPath((section or {}).get("lora") or (section or {}).get("model") or "")
        return path.stem if path.parent == self._directory.there else None

    def _router(self) -> Router:
        return Router(self._server())

    def _server(self) -> JSONServer:
        connection = Connection.of(
            self._environment, self._secrets, default_port=DEFAULT_PORT, own=SETTINGS
        )
        return JSONServer("llama.cpp", connection)


@frozen
class _Named:
    """A router that is asked about one model."""

    server: JSONServer
    name: str

    def post(
        self, path: str, body: Mapping[str, Any], *, seconds: float | None = None
    ) -> dict[str, Any]:
        return self.server.post(path, {"model": self.name, **body}, seconds=seconds)

    def delete(self, path: str, body: Mapping[str, Any]) -> None:
        self.server.delete(path, body)
