"""A server that loads adapters while it runs, beside the base model that it serves.

vLLM and SGLang have the same ways: an adapter is a directory that the server reads, loaded under a
name, and `/v1/models` lists the names with these directories. What differs is in their own modules.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import evolve

from ..adapters.intake import WEIGHTS
from ..adapters.plain_lora import largest_rank, refuse_unless_plain
from ..adapters.settings import CONFIG
from ..base_models import hash_base_model
from ..errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    CustomizedModelsError,
    InvalidOptionError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedAdapterError,
    UnsupportedError,
    UnsupportedQuantizationError,
    shown,
)
from ..files.digests import SHA256, hash_file
from ..models import DeploymentEnvironment, Progress, Served, Status
from .connection import Connection, Secrets, checked_settings, environment_variable
from .http import JSONServer
from .openai_api import base_card, cards
from .protocol import AdapterBesideBase, Artifact, Plan, checked_options, chosen_served_name
from .shared_directory import SETTINGS as DIRECTORY_SETTINGS
from .shared_directory import SharedDirectory, version_name

SETTINGS = (*DIRECTORY_SETTINGS, "base", "max_lora_rank")
LOAD_SECONDS = 600.0  # a large adapter on a slow shared disk


class LoraServer:
    """What vLLM and SGLang have in common; each has a class of its own.

    A customized model is served beside its base: its adapter is copied into a directory that the
    server reads, a new one for each version, and loaded. The server forgets what was loaded when it
    ends, and `Deployer.deploy` brings it back.

    Settings, besides `models_directory` and `server_directory` (see `shared_directory`):
    `max_lora_rank`, what the server was started with; `base`, the technical name of the base model
    that it serves. A server takes an adapter of a narrower or shallower model without a word, so
    without `base` the directory that it serves is compared with the registered base, which must
    then be visible from this host under the path that the server tells.

    Attributes:
        options: The class of the backend's options.
        tool: What messages call it.
        default_port: Where the environment states none.
        max_rank: Of adapters, where the setting does not say; None if that is not known.
    """

    options: ClassVar[type[Any]]
    tool: ClassVar[str]
    default_port: ClassVar[int]
    max_rank: ClassVar[int | None]

    def __init__(
        self, environment: DeploymentEnvironment, *, secrets: Secrets = environment_variable
    ) -> None:
        self._environment = environment
        self._secrets = secrets
        settings = checked_settings(environment, SETTINGS)
        _ = self.url  # raises where there is no address
        self._directory = SharedDirectory.of(environment)
        self._base = settings.get("base")
        self._max_rank = settings.get("max_lora_rank", self.max_rank)
        if self._base is not None and not isinstance(self._base, str):
            raise InvalidOptionError("the setting 'base' must be a base model's technical name")
        given = "max_lora_rank" in settings
        if given and (type(self._max_rank) is not int or self._max_rank < 1):
            raise InvalidOptionError("the setting 'max_lora_rank' must be a positive number")

    # What differs

    def load_adapter(self, server: JSONServer, name: str, path: str, *, in_place: bool) -> None:
        """Load the adapter in a directory of the server's under a name.

        Args:
            server: The server.
            name: As it is listed.
            path: Of the directory, as the server sees it.
            in_place: Whether the name stands for another adapter, which is replaced.
        """
        raise NotImplementedError

    def unload_adapter(self, server: JSONServer, name: str) -> None:
        """Let a name that is listed stand for nothing."""
        raise NotImplementedError

    def called(self, name: str, base: str) -> str:
        """What callers put into `model` for an adapter that is listed as `name`."""
        return name

    def listed(self, called: str) -> str:
        """The name in the list, of what callers put into `model`."""
        return called

    def served_base(self, server: JSONServer) -> str:
        """The directory, or the Hub id, of the base model that the server was started with."""
        return str(base_card(server).get("root"))

    def plan_of_complete(self, artifact: Artifact, name: str, options: Any) -> Plan:
        """Of a complete model, which the server cannot load while it runs."""
        raise UnsupportedError(
            f"{self.tool} loads a complete model when it starts; deploy the customized model, "
            f"whose adapter it loads while it runs"
        )

    # What is the same

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `Backend.preflight`; sends GET requests only.

        Raises:
            UnsupportedAdapterError: The server does not apply such an adapter, or not of that rank.
            BaseModelMismatch: The setting `base` names another one than the adapter's.
            UnsupportedError: It is not known which base model the server serves; or it is a
                complete model that the server does not serve yet, or a finished GGUF file.
        """
        checked_options(options, self.options)
        name = chosen_served_name(artifact, served_name)
        if artifact.quantization != "no_quantization":
            raise UnsupportedQuantizationError(
                f"{self.tool} serves models as they are (asked for {artifact.quantization}); it "
                f"has a setting of its own, --quantization"
            )
        if artifact.finished:
            raise UnsupportedError(f"{self.tool} serves no GGUF file: deploy without gguf=")
        if artifact.adapter_config is None:
            return self.plan_of_complete(artifact, name, options)
        refuse_unless_plain(artifact.adapter_config)
        self._refuse_rank(largest_rank(artifact.adapter_config))
        self._directory.check()
        server = self.server()
        self._refuse_other_base(artifact.base, self.served_base(server))
        if cards(server).get(name, {"parent": ""}).get("parent") is None:
            raise AlreadyExistsError(
                f"{self.tool} at {server.url} serves its base model as {shown(name)}; choose "
                f"another served_name"
            )
        version = version_name(name, uuid.uuid4().hex[:12])
        details = {"version": version, "beside": str(base_card(server).get("id"))}
        return Plan(artifact, self.called(name, details["beside"]), options, details)

    def _refuse_rank(self, rank: int) -> None:
        if self._max_rank is not None and rank > self._max_rank:
            raise UnsupportedAdapterError(
                f"the adapter has rank {rank}, and the server takes {self._max_rank}: start it "
                f"with --max-lora-rank and say so in the setting 'max_lora_rank'"
            )

    def _refuse_other_base(self, name: str, root: str) -> None:
        if self._base not in (None, name):
            raise BaseModelMismatch(
                f"the adapter's base is {shown(name)}, and environment "
                f"{shown(self._environment.name)} says that it serves {shown(self._base)}"
            )
        if self._base is None and not Path(root).is_dir():
            raise UnsupportedError(
                f"the server serves {shown(root)}, which is no directory of this host, so it "
                f"cannot be compared with the adapter's base; give the environment the setting "
                f"'base', the technical name of what is served"
            )

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `Backend.push`. Details: `version`, also the name of its directory; `beside`, what
        the base model is called at the server."""
        server, version = self.server(), plan.details["version"]
        with plan.artifact.adapter() as beside:
            if self._base is None:
                self._compare_bases(beside, Path(self.served_base(server)), progress)
            files = {name: beside.adapter / name for name in (CONFIG, WEIGHTS)}
            digest = hash_file(files[WEIGHTS], SHA256).digest
            self._directory.put_directory(version, files, progress)
        try:
            progress("loading", 0, 1)
            self.load_adapter(
                server, version, self._directory.seen_by_server(version), in_place=False
            )
            progress("loading", 1, 1)
        except BaseException as error:
            try:
                self._unload(server, version, version)
            except CustomizedModelsError as second:
                error.add_note(f"{shown(version)} may be loaded at the server: {second}")
            finally:
                self._directory.remove(version, "")
            raise
        name = self.called(version, plan.details["beside"])
        return Served(name, f"{server.url}/v1", "openai", digest, dict(plan.details))

    def _compare_bases(self, beside: AdapterBesideBase, served: Path, progress: Progress) -> None:
        """Raise `BaseModelMismatch` unless the served directory holds the adapter's base."""
        if served.resolve() == beside.base.resolve():
            return  # its bytes have just been compared with what was recorded
        if hash_base_model(served, progress).digest != beside.base_digest:
            raise BaseModelMismatch(
                f"{self.tool} serves {shown(served)}, which is not the base model of the adapter"
            )

    def _unload(self, server: JSONServer, name: str, version: str) -> None:
        """Take a name away, if it stands for that version."""
        if self._version_of(cards(server).get(name)) == version:
            self.unload_adapter(server, name)

    def _version_of(self, card: Mapping[str, Any] | None) -> str | None:
        """Which version of ours a listed model is; None for another model, or none."""
        root = "" if card is None else str(card.get("root"))
        directory, _, version = root.rpartition("/")
        return version if directory == str(self._directory.there) else None

    @property
    def url(self) -> str:
        """See `Addressed`."""
        return self._environment.url_with(self.default_port)

    def identity(self, served: Served) -> str:
        """See `Promoting.identity`: the version."""
        return str(served.details["version"])

    def version(self, served: Served) -> Served:
        """See `Promoting.version`."""
        details = served.details
        return evolve(served, name=self.called(details["version"], details["beside"]))

    def refuse_taken(self, name: str, replaced: Collection[str] | None) -> None:
        """See `Promoting.refuse_taken`."""
        server = self.server()
        card = cards(server).get(self.listed(name))
        base = card is not None and card.get("parent") is None  # see `preflight`
        if card is None or base or replaced is None or self._version_of(card) in replaced:
            return
        raise AlreadyExistsError(
            f"{self.tool} at {server.url} already serves something under {shown(name)}; choose "
            f"another served_name, or say replace=True"
        )

    def promote(self, served: Served, name: str, replaced: Collection[str] | None) -> Served:
        """See `Promoting.promote`: the version is loaded once more, under the served name."""
        server, version = self.server(), served.details["version"]
        listed = self.listed(name)
        with self._directory.locked():
            card = cards(server).get(listed)
            if self._version_of(card) != version:
                self.refuse_taken(name, replaced)
                path = self._directory.seen_by_server(version)
                self.load_adapter(server, listed, path, in_place=card is not None)
                if self._version_of(cards(server).get(listed)) != version:
                    raise ServerAnswerError(
                        f"{self.tool} at {server.url} does not serve {shown(name)} as it was told "
                        f"to"
                    )
        return evolve(served, name=name)

    def status(self, served: Served) -> Status:
        """See `Backend.status`."""
        try:
            card = cards(self.server()).get(self.listed(served.name))
        except (ServerUnreachableError, ServerAnswerError):
            return Status.UNREACHABLE
        if card is None:
            return Status.ABSENT
        return Status.LOADED if self.is_what_was_served(card, served) else Status.CHANGED

    def is_what_was_served(self, card: Mapping[str, Any], served: Served) -> bool:
        """Whether a listed model is the one that was deployed."""
        return self._version_of(card) == str(served.details["version"])

    def undeploy(self, served: Served) -> None:
        """See `Backend.undeploy`. The server frees the memory when it needs it for another."""
        server, version = self.server(), served.details["version"]
        for name in dict.fromkeys((self.listed(served.name), version)):
            self._unload(server, name, version)
        self._directory.remove(version, served.digest, file=WEIGHTS)

    def server(self) -> JSONServer:
        """What requests are sent with."""
        connection = Connection.of(
            self._environment, self._secrets, default_port=self.default_port, own=SETTINGS
        )
        return JSONServer(self.tool, connection)

    def described(self, server: JSONServer, version: object) -> Mapping[str, Any]:
        """See `Describing`: the version, and the base model that it serves."""
        return {
            "version": str(version),
            "base": self._base or self.served_base(server),
            "largest rank of adapters": self._max_rank,
        }
