"""The work of a deployment, in its own process: make, push, prove, promote, record.

What is about to be created at the tool is recorded before; if the process is killed, whoever
recovers takes it back. The served name is given to a model only once it is proven, and what had
it before is kept beside it.
"""

from __future__ import annotations

import uuid
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import evolve

from ..backends import Backend, Plan, Probe, Probing, Promoting, Tools, open_backend
from ..errors import AlreadyExistsError, DatabaseError, StorageError, shown
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
    request = from_document(DeployRequest, dict(work.arguments))
    environment = levels.get(DeploymentEnvironment, request.environment)
    backend = open_backend(environment, tools)
    deployment = _Deployment(work, request, environment, backend)
    try:
        deployment.run()
    except BaseException as error:
        deployment.take_back(error)
        raise
    with suppress(StorageError, DatabaseError):  # it is live; the next one trims as well
        work.shelf.trim("gguf/")


class _Deployment:
    """One deployment, and how far it has come.

    `intent`: as it is recorded; None before. `before`: the live model whose name it takes.
    `pushed`: whether it is at the tool. `promoted`: whether it may have the name. `held`: keys of
    the cache that are kept for it.
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
        self.pushed = False
        self.promoted = False
        self.held: list[str] = []

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
                served = self._promote(self.backend, served, plan.served_name)
            # What the tool has a copy of is free to go from the cache.
            needed = None if served.copied else artifact.key
            self._record(evolve(intent, served=served, proofs=proofs), needed)

    def take_back(self, error: BaseException) -> None:
        """Undo what was done for a deployment that failed; its file stays for the next attempt.

        What cannot be undone now stays recorded for whoever recovers, and `error` gets a note.
        """
        for step in (self._undo, self._let_go):
            try:
                step()
            except Exception as second:  # a backend may be anybody's
                error.add_note(f"not all of {self.work.name} was taken back: {second}")

    def _undo(self) -> None:
        work = self.work
        if self.intent is not None:
            if self.pushed:  # else the push has cleaned up after itself
                self._take_off(self.intent.served)
            with work.catalog.database.write() as connection:
                work.catalog.levels.drop(connection, self.intent, work.lease.owner)

    def _promote(self, backend: Promoting, served: Served, name: str) -> Served:
        self.promoted = True
        try:
            return backend.promote(served, name, self._replaced())
        except AlreadyExistsError:
            self.promoted = False
            raise

    def _take_off(self, served: Served) -> None:
        """Undeploy it; the name goes back to what had it before."""
        if isinstance(self.backend, Promoting):
            if self.promoted and self.before is not None:
                had = self.before.served
                either = [self.backend.identity(served), self.backend.identity(had)]
                self.backend.promote(had, had.name, either)
            if not self.promoted or self.before is not None:
                # What has the name may be of the same content.
                served = self.backend.version(served)
        self.backend.undeploy(served)

    def _hold(self, key: str) -> None:
        """Keep a file of the cache for this job, and note that this deployment uses it."""
        with self.work.catalog.database.write() as connection:
            self.work.lease.take(connection, [key], f"the deployment of {self.work.name}")
            self.work.catalog.litter.forget(connection, key)
            self.held.append(key)
            if self.intent is not None:
                self.work.catalog.levels.note_artifact(connection, self.intent, key)

    def _let_go(self) -> None:
        """Hold no file of the cache any more."""
        with self.work.catalog.database.write() as connection:
            for key in self.held:
                self.work.catalog.leases.end(connection, self.work.lease.owner, key)
        self.work.shelf.trim("gguf/")

    def _announce(self, plan: Plan, artifact: RegistryArtifact) -> LiveModel:
        """Record what is about to be created.

        Raises:
            AlreadyExistsError: The name is taken, and not to be replaced.
            InUseError: What has it is being undeployed, rolled back or replaced by another.
        """
        work, levels = self.work, self.work.catalog.levels
        with work.catalog.database.write() as connection:
            work.lease.check(connection)
            self.before = self._holder(connection, plan.served_name)
            if self.before is not None:
                work.catalog.leases.refuse_if_held(connection, self.before.key)
                purpose = f"the deployment of {work.name}"
                work.lease.take(connection, [self.before.key], purpose)
            intent = self._intended(plan, artifact)
            levels.insert_pending(connection, intent, work.lease.owner, artifact=None)
        self.intent = intent
        if isinstance(self.backend, Promoting):
            self.backend.refuse_taken(plan.served_name, self._replaced())
        return intent

    def _holder(self, connection: Connection, served_name: str) -> LiveModel | None:
        """The live model of this registry whose name is to be taken over; None if it is free.

        Raises:
            AlreadyExistsError: It is not to be replaced, or another is about to have the name.
        """
        called, at = self.work.catalog.levels.called, self.environment.name
        if other := called(connection, served_name, at, stage="pending"):
            raise AlreadyExistsError(
                f"{other.name} is just being deployed as {shown(served_name)} at {at}; choose "
                f"another served_name, or wait until that is done"
            )
        holder = called(connection, served_name, at, stage="visible")
        if holder is not None and not self.request.replace:
            keeps = isinstance(self.backend, Promoting)
            raise AlreadyExistsError(
                f"{holder.name} is served as {shown(served_name)} at {at}; choose another "
                f"served_name, or {'say replace=True' if keeps else 'undeploy it first'}"
            )
        return holder

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
        self.pushed = True
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
                    levels.supersede(connection, self.before.name)
                levels.make_visible(connection, live, work.lease.owner, artifact=artifact)
                work.end(connection, "succeeded")
        except DatabaseError as error:
            if not (error.outcome_unknown and levels.is_visible(live)):
                raise


def _endpoint(environment: DeploymentEnvironment) -> str:
    return environment.url if environment.address is not None else ""
