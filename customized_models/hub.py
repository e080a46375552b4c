"""The Hub: models are pushed to it and come back the same, and base models are fetched from it.

All is done by huggingface_hub's own client, which is only imported when something is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from .cards.readme import render
from .errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    BaseModelMissingError,
    CustomizedModelsError,
    HubError,
    IntegrityError,
    InUseError,
    InvalidNameError,
    MalformedError,
    UnsafeFileError,
    listed,
    shown,
)
from .files.copying import copy_untrusted
from .files.documents import from_document, to_document
from .files.locks import lock
from .files.manifest import MANIFEST, README, Manifest
from .files.model_directory import CARRIED, TABLE, Role, files_of, role_of
from .files.paths import without_path_values
from .files.remote_code import check_remote_code
from .files.safetensors import Checkpoint
from .files.writing import disk_errors, write_file
from .models import BaseModel, CompleteModel, CustomizedModel, ModelCard
from .naming import (
    TECHNICAL_NAME,
    checked_name,
    complete_name,
    customized_name,
    is_hub_id,
    train_name_of,
)
from .registering import take_in
from .shelf import Shelf, Stored
from .values import Value, checked

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from sqlalchemy import Connection

    from .catalog.catalog import Catalog

_WEIGHTS = (Role.WEIGHTS, Role.ADAPTER, Role.OTHER_WEIGHTS)

_WAIT_SECONDS = 0.1  # between two looks at another process that brings the same

_KINDS: Mapping[str, type[Stored]] = {"customized": CustomizedModel, "complete": CompleteModel}


@frozen(field_transformer=checked)
class HubCommit(Value):
    """A model as it is on the Hub.

    Attributes:
        repository: Its id there.
        commit: The commit that has it; `from_hub(repository, revision=commit)` gives it back.
        url: Of the commit.
    """

    repository: str
    commit: str
    url: str


@frozen
class Hub:
    """A Hub, and who asks.

    Attributes:
        endpoint: Its address; None for that of huggingface_hub.
        token: None for the one that huggingface_hub knows. It is in no message.
    """

    endpoint: str | None = None
    token: str | None = None

    @property
    def api(self) -> HfApi:
        """The client."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=self.token, library_name="customized-models")

    def download(
        self, repository: str, revision: str | None, directory: Path | None, *, cached: bool = False
    ) -> Path:
        """The files of a repository that a model needs; what an earlier call has is not fetched.

        Args:
            repository: Its id.
            revision: A commit, branch or tag; None for the newest.
            directory: Where to; None for the cache of huggingface_hub.
            cached: Look at what is there already, and fetch nothing.
        """
        with hub_errors(f"{repository} cannot be fetched"):
            found = self.api.snapshot_download(
                repository,
                revision=revision,
                local_dir=directory,
                local_files_only=cached,
                ignore_patterns=_UNUSED,
            )
        return Path(found)


_UNUSED = [row.pattern for row in TABLE if row.role in (Role.OTHER_WEIGHTS, Role.LITTER)]
_UNUSED.remove(MANIFEST)


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn the client's errors in the block into `HubError`; `what` failed."""
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except CustomizedModelsError:
        raise
    except HFValidationError as error:
        raise InvalidNameError(f"{what}: {shown(error)}") from error
    except LocalEntryNotFoundError as error:
        raise HubError(f"{what}: it is not in the cache, and the Hub was not reached") from error
    except Exception as error:
        # Its errors are of its own classes, of those of whichever HTTP library it was built on, or
        # RuntimeError around one of these.
        reason = error if error.__cause__ is None else f"{error} {error.__cause__}"
        raise HubError(f"{what}: {shown(reason, 500)}") from error


# Base models


def technical_name_of(hub_id: str) -> str:
    """A technical name for a base model of that Hub id.

    >>> technical_name_of("Qwen/Qwen2.5-0.5B-Instruct")
    'qwen2.5-0.5b-instruct'

    Raises:
        InvalidNameError: It is no Hub id.
    """
    if not is_hub_id(hub_id):
        raise InvalidNameError(
            f"{shown(hub_id)} is not a Hub id, as 'owner/name' is; say the technical name and the "
            f"directory of the base model"
        )
    return train_name_of(hub_id.partition("/")[2])[:24].rstrip(".-")


def base_directory(path: object, revision: str | None, *, download: bool) -> Path | None:
    """Where the files of a base model that is given by its Hub id are; None for a directory.

    Raises:
        BaseModelMissingError: They are not in the cache of huggingface_hub.
        HubError: The Hub failed.
    """
    if not isinstance(path, str) or not is_hub_id(path) or Path(path).exists():
        return None
    try:
        return Hub().download(path, revision, None, cached=not download)
    except HubError as error:
        if download:
            raise
        raise BaseModelMissingError(
            f"{shown(path)} is neither a directory nor, whole, in the cache of huggingface_hub; "
            f"download=True fetches it"
        ) from error


# Pushing


def push(
    catalog: Catalog,
    shelf: Shelf,
    hub: Hub,
    model: Stored,
    repository: str,
    *,
    private: bool,
    revision: str | None,
) -> HubCommit:
    """See `ModelRegistry.push_to_hub`."""
    if not is_hub_id(repository):
        raise InvalidNameError(f"{shown(repository)} is not a Hub id, as 'owner/name' is")
    base = catalog.levels.get(BaseModel, model.base)
    with shelf.checkout(model) as directory, tempfile.TemporaryDirectory() as scratch:
        Manifest.read(directory).verify(directory)
        with disk_errors(f"{model.name} cannot be read"):
            files = _pushed_files(directory, Path(scratch), model, base)
        with hub_errors(f"{model.name} cannot be pushed to {repository}"):
            return _commit(hub.api, files, model, repository, private=private, revision=revision)


def _pushed_files(
    directory: Path, scratch: Path, model: Stored, base: BaseModel
) -> dict[str, Path]:
    """The files as they are pushed: those of the model, its record, and a card without paths."""
    manifest = Manifest.read(directory)
    card = from_document(ModelCard, without_path_values(to_document(model.card)))
    pushed: Any = evolve(model, card=card)
    record = {"model": to_document(pushed), "base": to_document(_unplaced(base))}
    evolve(manifest, record=record).write(scratch)
    write_file(scratch / README, render(pushed, base).encode())
    files = {name: directory / name for name in manifest.content}
    files |= {name: scratch / name for name in (MANIFEST, README)}
    _refuse_private(model, files)
    return files


def _refuse_private(model: Stored, files: Mapping[str, Path]) -> None:
    """See that no text states a path below the user's home, or a token of the Hub."""
    home = os.path.expanduser("~").rstrip("/")
    private = r"\bhf_[A-Za-z0-9]{20,}" + (f"|{re.escape(home)}/" if home else "")
    telling = [
        name
        for name, path in files.items()
        if _is_text(name, path) and re.search(private.encode(), path.read_bytes())
    ]
    if telling:
        raise UnsafeFileError(
            f"{model.name} is not pushed: {listed(telling)} states a path below {home} or a token "
            f"of the Hub; make it again from a directory where that is removed"
        )


def _is_text(name: str, path: Path) -> bool:
    """Whether people or tools may have written something of their host into a file."""
    is_data = role_of(name) is Role.VOCABULARY or name.endswith(".safetensors")
    return not is_data and path.stat().st_size <= _MAX_TEXT


_MAX_TEXT = 64 << 20  # bytes; what is larger is data


def _unplaced(base: BaseModel) -> BaseModel:
    """A base model without what is for its host to say."""
    return evolve(base, trust_remote_code=False, deployment_template=None)


def _commit(
    api: HfApi,
    files: Mapping[str, Path],
    model: Stored,
    repository: str,
    *,
    private: bool,
    revision: str | None,
) -> HubCommit:
    """One commit with all files; those of another model that was there are removed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api.create_repo(repository, private=private, exist_ok=True)
    operations: list[Any] = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()
    ]
    operations += [
        CommitOperationDelete(path_in_repo=name)
        for name in _replaced(api, repository, revision) - files.keys()
    ]
    done = api.create_commit(
        repository, operations, commit_message=f"Add {model.name}", revision=revision
    )
    return HubCommit(repository, done.oid, done.commit_url)


def _replaced(api: HfApi, repository: str, revision: str | None) -> set[str]:
    """The files in a repository that are of the model that was there, and any weights."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        here = api.list_repo_files(repository, revision=revision)
    except RevisionNotFoundError:  # nothing has been committed yet
        return set()
    of_model: set[str] = set()
    if MANIFEST in here:
        with tempfile.TemporaryDirectory() as scratch:
            api.hf_hub_download(repository, MANIFEST, revision=revision, local_dir=scratch)
            with suppress(MalformedError, IntegrityError):  # or it is of something else
                of_model.update(Manifest.read(Path(scratch)).content)
    return {name for name in here if name in of_model or role_of(name) in _WEIGHTS}


# Coming back


@contextmanager
def fetched(hub: Hub, repository: str, revision: str | None, scratch: Path) -> Iterator[Path]:
    """A repository's files in a directory below `scratch`, while the block lasts.

    What an interrupted call has fetched of the same commit is found by the next one. A second call
    waits for the first.
    """
    with hub_errors(f"{repository} cannot be fetched"):
        commit = hub.api.model_info(repository, revision=revision).sha
    name = hashlib.sha256(f"{hub.endpoint} {repository} {commit}".encode()).hexdigest()[:32]
    directory, alone = scratch / name, False
    while not alone:
        with disk_errors(f"{repository} cannot be fetched into {shown(scratch)}"):
            directory.mkdir(parents=True, exist_ok=True)
        with lock(directory, wait=True) as alone:
            if alone:
                hub.download(repository, commit, directory)
                try:
                    yield directory
                finally:
                    shutil.rmtree(directory, ignore_errors=True)


def was_pushed(directory: Path) -> bool:
    """Whether fetched files are those of a model that `push` has pushed."""
    return (directory / MANIFEST).is_file()


def take_back(catalog: Catalog, shelf: Shelf, directory: Path) -> Stored:
    """The model that was pushed, in this registry under the name that it had.

    Files of others in `directory` are removed from it.

    Raises:
        IntegrityError: The files are not those that were pushed.
        MalformedError, UnsafeFileError, UnsupportedError: It is no sound model.
        BaseModelMismatch: Its base's name stands for another base model here.
        AlreadyExistsError: Its name stands for another model here.
    """
    manifest = Manifest.read(directory)
    model, base = _recorded(manifest)
    with catalog.database.read() as connection, suppress(InUseError):
        if (known := _known(catalog, connection, model, base)) is not None:
            return known
    with shelf.storage.staging(f"hub-{uuid.uuid4().hex}") as staging:
        _take_in(directory, staging, manifest, model)
        record = {"model": to_document(model), "base": to_document(base)}
        evolve(manifest, record=record).write(staging)
        write_file(staging / README, render(model, base).encode())
        return _published(catalog, shelf, staging, model, base)


def _take_in(directory: Path, staging: Path, manifest: Manifest, model: Stored) -> None:
    """Copy what the manifest names, and check it as if it came from anywhere."""
    there = files_of(directory, *set(Role) - {Role.LITTER})
    for name in there.keys() - manifest.content.keys():
        there[name].unlink()
    wrong = manifest.content.keys() - there.keys()
    if not wrong and isinstance(model, CustomizedModel):
        content = dict(take_in(directory, staging).content)
    elif not wrong:
        content = {
            name: copy_untrusted(path, staging, name)
            for name, path in there.items()
            if name in manifest.content
        }
        Checkpoint.open(staging)
    if wrong := wrong or {name for name, _ in content.items() ^ manifest.content.items()}:
        raise IntegrityError(f"{model.name} is not as it was pushed: {listed(wrong)} differ")


def _published(
    catalog: Catalog, shelf: Shelf, staging: Path, model: Stored, base: BaseModel
) -> Stored:
    """Publish what was taken in, unless another process has brought it meanwhile."""
    while True:
        with catalog.lease() as lease:
            try:
                with catalog.database.write() as connection:
                    if (known := _known(catalog, connection, model, base)) is not None:
                        return known
                    catalog.levels.restore(connection, base, path=None, files="{}")
                    here = catalog.levels.in_transaction(connection, BaseModel, base.name)
                    # Whether its code may run is for whoever adds the base here to say.
                    code = files_of(staging, *CARRIED)
                    check_remote_code(code, trusted=here.trust_remote_code)
                    shelf.announce(connection, model, lease)
            except InUseError:  # by a process that brings or deletes the same, or has done so
                if not shelf.recover():
                    time.sleep(_WAIT_SECONDS)
                continue
            shelf.publish(model, staging, lease)
            return model


def _recorded(manifest: Manifest) -> tuple[Stored, BaseModel]:
    """The model and its base that a manifest records, if they can be.

    What of a base is for its host to say is left out.
    """
    kind = _KINDS.get(manifest.kind)
    if kind is None or not {"model", "base"} <= manifest.record.keys():
        raise MalformedError(f"{MANIFEST} records no model")
    model = from_document(kind, manifest.record["model"])
    base = from_document(BaseModel, manifest.record["base"])
    checked_name("technical name", base.name, TECHNICAL_NAME)
    parents = {"base": base.digest}
    if isinstance(model, CustomizedModel):
        name = customized_name(base.name, model.train_name, model.created, model.training_id)
    else:
        name = complete_name(model.customized, model.saving_id)
        parents["customized"] = model.customized_digest
    said = (model.name, model.base, model.digest, dict(manifest.parents))
    if said != (name, base.name, manifest.digest, parents) or not _NAME.fullmatch(name):
        raise IntegrityError(f"the record in {MANIFEST} is of another model")
    if isinstance(model, CompleteModel) and model.evicted:
        raise IntegrityError(f"the record in {MANIFEST} says that the model was evicted")
    return model, _unplaced(base)


_NAME = re.compile(r"[a-z0-9._-]{1,120}", re.ASCII)  # what names of the grammar are made of


def _known(
    catalog: Catalog, connection: Connection, model: Stored, base: BaseModel
) -> Stored | None:
    """The model, if it is here already.

    Raises:
        BaseModelMismatch: Its base's name stands for another here, or its base has another name.
        AlreadyExistsError: Its name stands for another.
        InUseError: It is being made or deleted.
    """
    levels = catalog.levels
    here = next(iter(levels.settled(connection, BaseModel, name=base.name)), None)
    if here is not None and here.digest != base.digest:
        raise BaseModelMismatch(
            f"{model.name} belongs to a base model {base.name} of {base.digest}, which is "
            f"{here.digest} here"
        )
    for other in levels.settled(connection, BaseModel, model_name=base.model_name):
        if here is None:
            raise BaseModelMismatch(
                f"{model.name} belongs to the base model {base.name}, which names of its models "
                f"begin with, and {shown(base.model_name)} is called {other.name} here; bring it "
                f"into a registry that has it as {base.name}, or not yet"
            )
    for known in levels.settled(connection, type(model), name=model.name):
        if known.digest != model.digest:
            raise AlreadyExistsError(f"{model.name} is {known.digest} here, not {model.digest}")
        return known
    return None
