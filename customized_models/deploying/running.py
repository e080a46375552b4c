"""The work of a deployment, in its own process: make, push, prove, promote, record.

What is about to be created at the tool is recorded before; if the process is killed, whoever
recovers takes it back. The served name is given to a model only once it is proven, and what had
it before is kept beside it.
"""

from __future__ import annotations

import uuid
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from ..backends import Backend, Plan, Probe, Probing, Promoting, Tools, open_backend
from ..errors import AlreadyExistsError, DatabaseError, shown
from ..files.documents import from_document
from ..jobs.work import Work
from ..models import BaseModel, DeploymentEnvironment, LiveModel, Proof, Served, is_adapter
from .artifacts import RegistryArtifact
from .proving import (
    Answering,
    load_tokenizer,
    prove_content,
    prove_greedy,
    prove_template,
    require,
)
from .request import KINDS, DeployRequest

if TYPE_CHECKING:
    from sqlalchemy import Connection


def run_deploy(work: Work, tools: Tools) -> None:
    """The worker's part of `Deployer.deploy`."""
    levels = work.catalog.levels
    request = DeployRequest.read(work.arguments)
    environment = levels.get(DeploymentEnvironment, request.environment)
    backend = open_backend(environment, tools)
    deployment = _Deployment(work, request, environment, backend)
    try:
        deployment.run()
    except BaseException:
        deployment.take_back()
        raise


class _Deployment:
    """One deployment, and how far it has come.

    `intent`: as it is recorded; None before. `before`: the live model whose name it takes.
    `promoted`: whether it has taken it.
    """

    def __init__(
        self,
        work: Work,
        request: DeployRequest,
        environment: DeploymentEnvironment,
        backend: Backend,
    ) -> None:
        self.work = work
        self.request = request
        self.environment = environment
        self.backend = backend
        self.intent: LiveModel | None = None
        self.before: LiveModel | None = None
        self.promoted = False

    def run(self) -> None:
        work, request = self.work, self.request
        model = work.catalog.levels.get(KINDS[request.kind], request.model)
        options = from_document(self.backend.options, request.options)
        with RegistryArtifact(
            work.catalog,
            work.shelf,
            model,
            work.name,
            request.quantization,
            self._hold,
            template=request.template,
            ready=None if request.gguf is None else Path(request.gguf),
            llama_cpp=self.environment.settings.get("llama_cpp"),
        ) as artifact:
            plan = self.backend.preflight(artifact, request.served_name, options)
            intent = self._announce(plan, artifact)
            served = self.backend.push(plan, work.progress)
            self._note(intent, served)
            proofs = tuple(self._prove(artifact, served))
            require(proofs, request.accept_failed)
            if isinstance(self.backend, Promoting):
                served = self.backend.promote(served, plan.served_name, self._replaced())
                self.promoted = True
            self._record(evolve(intent, served=served, proofs=proofs), artifact.key)

    def take_back(self) -> None:
        """Undo what was done for a deployment that failed; its file goes if nobody needs it."""
        work = self.work
        if self.intent is not None:
            if self.promoted and self.before and isinstance(self.backend, Promoting):
                ours = self.backend.identity(self.intent.served)
                self.backend.promote(self.before.served, self.before.served.name, [ours])
            if self.intent.served.digest:  # else the push has cleaned up after itself
                self.backend.undeploy(self.intent.served)
            with work.catalog.database.write() as connection:
                work.catalog.levels.drop(connection, self.intent, work.lease.owner)
        work.shelf.drop_unused("gguf/", even_held_by=work.lease.owner)

    def _hold(self, key: str) -> None:
        """Keep a file of the cache for this job, and note that this deployment uses it."""
        with self.work.catalog.database.write() as connection:
            self.work.lease.take(connection, [key], f"the deployment of {self.work.name}")
            if self.intent is not None:
                self.work.catalog.levels.note_artifact(connection, self.intent, key)

    def _announce(self, plan: Plan, artifact: RegistryArtifact) -> LiveModel:
        """Record what is about to be created.

        Raises:
            AlreadyExistsError: The name is taken, and not to be replaced.
        """
        work, levels = self.work, self.work.catalog.levels
        with work.catalog.database.write() as connection:
            work.lease.check(connection)
            self.before = self._holder(connection, plan.served_name)
            if self.before is not None and not self.request.replace:
                raise AlreadyExistsError(
                    f"{self.before.name} is served as {shown(plan.served_name)} at "
                    f"{self.environment.name}; choose another served_name, or say replace=True"
                )
            intent = self._intended(plan, artifact)
            levels.insert_pending(connection, intent, work.lease.owner, artifact=None)
        self.intent = intent
        if isinstance(self.backend, Promoting):
            self.backend.refuse_taken(plan.served_name, self._replaced())
        return intent

    def _holder(self, connection: Connection, served_name: str) -> LiveModel | None:
        """Which live model of this registry has a name, or is about to have it."""
        every = self.work.catalog.levels.live_at(connection, self.environment.name)
        return next((live for live in every if live.served.name == served_name), None)

    def _replaced(self) -> list[str] | None:
        """The identities that may be replaced; None for whatever there is."""
        return None if self.request.replace else []

    def _intended(self, plan: Plan, artifact: RegistryArtifact) -> LiveModel:
        model = artifact.model
        template = plan.template
        return LiveModel(
            name=self.work.name,
            source=model.name,
            base=model.base,
            train_name=model.train_name,
            quantization=self.request.quantization,
            environment=self.environment.name,
            served=Served(plan.served_name, _endpoint(self.environment), "", "", plan.details),
            deploying_id=uuid.UUID(str(self.work.id)),
            created=datetime.now(UTC),
            source_digest=model.digest,
            template_digest=template.digest if template else None,
            card=model.card,
            replaces=self.before.name if self.before else None,
        )

    def _note(self, intent: LiveModel, served: Served) -> None:
        """Write down what is at the tool now, under the name that it is to have."""
        self.intent = evolve(intent, served=evolve(served, name=intent.served.name))
        with self.work.catalog.database.write() as connection:
            self.work.lease.check(connection)
            self.work.catalog.levels.change_pending(connection, self.intent, self.work.lease.owner)

    def _prove(self, artifact: RegistryArtifact, served: Served) -> list[Proof]:
        wanted = self.request.proofs
        if not isinstance(self.backend, Probing):
            why = "the backend cannot be asked"
            return [Proof(name, None, "nothing", why) for name in wanted]
        probe, found = self.backend.probe(served), []
        for number, name in enumerate(wanted):
            self.work.progress(f"proving {name}", number, len(wanted))
            if name == "content" and artifact.file is not None:
                found.append(
                    prove_content(probe, served.digest, artifact.file.digest, artifact.types)
                )
            elif name == "template":
                with artifact.small_files() as (directory, files):
                    found.append(prove_template(probe, files, load_tokenizer(directory)))
            elif name == "greedy":
                found.append(self._prove_greedy(artifact, probe))
        return found

    def _prove_greedy(self, artifact: RegistryArtifact, probe: Probe) -> Proof:
        model, shelf, adapter = artifact.model, self.work.shelf, None
        with ExitStack() as stack:
            directory = stack.enter_context(shelf.opened(model))
            if is_adapter(model):
                base = self.work.catalog.levels.get(BaseModel, model.base)
                adapter, directory = directory, stack.enter_context(shelf.opened(base))
            small, files = stack.enter_context(artifact.small_files())
            answering = Answering(directory, small, adapter)
            return prove_greedy(probe, answering, files, self.request.quantization)

    def _record(self, live: LiveModel, artifact: str | None) -> None:
        work, levels = self.work, self.work.catalog.levels
        try:
            with work.catalog.database.write() as connection:
                work.lease.check(connection)
                if self.before is not None:
                    levels.change_state(connection, self.before.name, "superseded")
                levels.make_visible(connection, live, work.lease.owner, artifact=artifact)
                work.end(connection, "succeeded")
        except DatabaseError as error:
            if not (error.outcome_unknown and levels.is_visible(live)):
                raise


def _endpoint(environment: DeploymentEnvironment) -> str:
    return environment.url if environment.address is not None else ""
