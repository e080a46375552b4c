"""A deployment tool of somebody else's, with an API of its own: it serves a directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from customized_models import DeploymentEnvironment, Served, ServedModelChangedError, Status
from customized_models.backends import Artifact, Backend, Plan, Progress


@frozen
class Options:
    """`form`: "gguf", "directory" or "adapter"."""

    form: str = "gguf"


class Shelf:
    """Serves what lies under its directory, which `settings` name, by the served name.

    With the setting `kill`, the process that pushes is killed once the model is there.
    """

    options = Options

    def __init__(self, environment: DeploymentEnvironment) -> None:
        settings: Mapping[str, Any] = environment.settings
        self._directory = Path(settings["directory"])
        self._kill = settings.get("kill", False)

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        if options.form == "gguf":
            artifact.check_gguf()
        name = served_name or artifact.name
        return Plan(artifact, name, options, details={"place": str(self._directory / name)})

    def push(self, plan: Plan, progress: Progress) -> Served:
        place, digest = Path(plan.details["place"]), ""
        if plan.options.form == "gguf":
            with plan.artifact.gguf(progress, chat_template=True) as file:
                place.mkdir()
                shutil.copyfile(file.path, place / "model.gguf")
                digest = file.digest
        elif plan.options.form == "directory":
            with plan.artifact.directory() as directory:
                shutil.copytree(directory, place)
        else:
            with plan.artifact.adapter() as beside:
                shutil.copytree(beside.adapter, place)
        if self._kill:
            os.kill(os.getpid(), 9)
        return Served(plan.served_name, "http://shelf", "shelf/1", digest, details=plan.details)

    def status(self, served: Served) -> Status:
        return Status.LIVE if Path(served.details["place"]).is_dir() else Status.ABSENT

    def undeploy(self, served: Served) -> None:
        place = Path(served.details["place"])
        if (place / "changed").exists():
            raise ServedModelChangedError(f"{served.name} was changed")
        shutil.rmtree(place, ignore_errors=True)


def check(environment: DeploymentEnvironment) -> Backend:
    """What `mypy --strict` says of it."""
    return Shelf(environment)
