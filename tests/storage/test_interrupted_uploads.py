"""Uploads in parts that are cut short: what is sent again, and what becomes of the rest."""

from __future__ import annotations

import itertools
import pickle
import random
import re
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from s3fs import S3FileSystem

from customized_models import FsspecStorage, ModelRegistry
from customized_models.errors import StorageError
from customized_models.storage import multipart, uploads
from customized_models.storage.stores import AT_ONCE
from customized_models.testing import publish_files, tiny_llama, tiny_lora
from tests.servers.faulty_proxy import Fault, FaultyProxy
from tests.servers.s3_server import BUCKET, S3Server, options

from .stored import KEY, files_of

PART = 5 << 20  # bytes: S3 takes no smaller ones, but the last
PARTS = {*range(1, 7)}
WEIGHTS = random.Random(0).randbytes(5 * PART + 1000)
OTHERS = random.Random(1).randbytes(len(WEIGHTS))
RANK = 12288  # at which the adapter's weights have six parts
OF_A_PART = "partNumber="


@pytest.fixture(autouse=True)
def _small_parts(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "PART", PART)


def parts_sent(proxy: FaultyProxy) -> list[int]:
    """The numbers of the parts that were sent, in order."""
    found = (re.search(OF_A_PART + "([0-9]+)", path) for _, path in proxy.requests)
    return sorted(int(match[1]) for match in found if match)


def kill_in_mid_upload(proxy: FaultyProxy, script: str, *arguments: object) -> None:
    """Run a script that uploads a file of six parts, and kill it when two of them are stored."""
    proxy.disturb(Fault.HELD, 2, of=OF_A_PART)
    small = f"from customized_models.storage import multipart; multipart.PART = {PART}\n"
    command = [sys.executable, "-c", small + script, *map(str, arguments)]
    with subprocess.Popen(command) as process:
        for _ in range(AT_ONCE):  # once as many parts wait, the other two have been answered
            assert proxy.held.acquire(timeout=120)
        process.kill()
    proxy.calm()


@pytest.fixture
def killed(
    disturbed: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str, tmp_path: Path
) -> set[int]:
    """A process that publishes WEIGHTS is killed; the parts that the store has then."""
    (tmp_path / "weights").write_bytes(WEIGHTS)
    script = (
        "import pickle, shutil, sys; storage = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "with storage.staging('job') as directory:\n"
        "    shutil.copy(sys.argv[2], directory); storage.publish(directory, sys.argv[3])"
    )
    given = pickle.dumps(disturbed).hex()
    kill_in_mid_upload(proxy, script, given, tmp_path / "weights", KEY)
    return stored_parts(s3, prefix)


def stored_parts(server: S3Server, prefix: str) -> set[int]:
    """The numbers of the parts of the one upload that has been begun."""
    (begun,) = begun_uploads(server, prefix)
    of = {"Bucket": BUCKET, "Key": begun["Key"], "UploadId": begun["UploadId"]}
    found = fsspec.filesystem("s3", **options(server.port)).call_s3("list_parts", **of)
    return {part["PartNumber"] for part in found["Parts"]}


def begun_uploads(server: S3Server, prefix: str) -> list[dict[str, Any]]:
    """Uploads in parts that have neither been completed nor aborted."""
    filesystem = fsspec.filesystem("s3", **options(server.port))
    found = filesystem.call_s3("list_multipart_uploads", Bucket=BUCKET, Prefix=prefix)
    return list(found.get("Uploads", []))


# The process is killed


def test_of_an_upload_that_was_killed_only_the_missing_parts_are_sent(
    killed: set[int], disturbed: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str
) -> None:
    with disturbed.staging("job") as directory:  # it has what the killed process wrote
        disturbed.publish(directory, KEY)

    assert len(killed) == 2
    assert parts_sent(proxy) == sorted(PARTS - killed)
    assert proxy.sent < len(WEIGHTS) - 2 * PART + 10_000  # with the marker and its like
    assert files_of(disturbed, KEY) == {"weights": WEIGHTS}
    assert begun_uploads(s3, prefix) == []


@pytest.mark.usefixtures("killed")
def test_an_upload_that_nobody_takes_up_is_aborted_by_gc(
    disturbed: FsspecStorage,
    s3: S3Server,
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry = ModelRegistry(tmp_path / "registry", storage=disturbed)
    registry.gc()
    assert len(begun_uploads(s3, prefix)) == 1  # somebody may take it up
    monkeypatch.setattr(uploads, "STAGING_GRACE", -1)  # more than a week later
    registry.gc()
    assert begun_uploads(s3, prefix) == []
    assert s3.objects(prefix) == set()
    assert list((disturbed.local / "uploads").iterdir()) == []


@pytest.mark.slow
def test_a_registration_that_was_killed_goes_on_when_it_is_made_again(
    disturbed: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_lora(tmp_path / "adapter", base, r=RANK)
    registry = ModelRegistry(tmp_path / "registry", storage=disturbed)
    registry.add_base_model("tiny", base)
    script = (
        "import pickle, sys, uuid; registry = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "registry.register(sys.argv[2], train_name='t', training_id=uuid.UUID(int=1))"
    )
    kill_in_mid_upload(proxy, script, pickle.dumps(registry).hex(), adapter)
    stored = stored_parts(s3, prefix)

    registry.recover()
    assert list(registry.customized_models()) == []
    again = registry.register(adapter, train_name="t", training_id=uuid.UUID(int=1))
    assert parts_sent(proxy) == sorted(PARTS - stored)
    registry.verify(again)
    assert begun_uploads(s3, prefix) == []


# The connection, or the store


def test_a_cut_connection_costs_the_part_that_it_cut(
    disturbed: FsspecStorage, proxy: FaultyProxy
) -> None:
    proxy.disturb(Fault.RESET, 2, 1, of=OF_A_PART)
    publish_files(disturbed, KEY, weights=WEIGHTS)
    assert sorted(Counter(parts_sent(proxy)).values()) == [1, 1, 1, 1, 1, 2]
    assert files_of(disturbed, KEY) == {"weights": WEIGHTS}


def test_an_answer_that_is_lost_costs_no_other_part(
    disturbed: FsspecStorage, on_s3: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str
) -> None:
    data = WEIGHTS[: PART + 1000]
    for number in itertools.count():
        proxy.disturb(Fault.LOST, number, 1, of="weights")
        publish_files(disturbed, KEY, weights=data)
        requests = [path for _, path in proxy.requests if "weights" in path]
        lost = OF_A_PART in str(requests[number : number + 1])  # its client sends it again
        assert parts_sent(proxy) in ([[1, 2], [1, 1, 2], [1, 2, 2]] if lost else [[1, 2]])
        assert begun_uploads(s3, prefix) == []
        assert files_of(on_s3, KEY) == {"weights": data}
        on_s3.delete(KEY)
        if number >= len(requests):
            break
    assert number > 7


def test_a_store_that_was_away_is_sent_what_it_does_not_have(
    disturbed: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str
) -> None:
    proxy.disturb(Fault.BUSY, 3, of=OF_A_PART)
    with pytest.raises(StorageError):
        publish_files(disturbed, KEY, weights=WEIGHTS)
    proxy.calm()
    stored = stored_parts(s3, prefix)
    publish_files(disturbed, KEY, weights=WEIGHTS)
    assert len(stored) == 3
    assert parts_sent(proxy) == sorted(PARTS - stored)
    assert files_of(disturbed, KEY) == {"weights": WEIGHTS}


# What is in the way of the second attempt

CUT_SHORT = {"in a large file": (3, OF_A_PART), "after a large file": (0, "/z-small")}


@pytest.fixture(params=CUT_SHORT.values(), ids=CUT_SHORT)
def cut_short(request: pytest.FixtureRequest, disturbed: FsspecStorage, proxy: FaultyProxy) -> None:
    """The store goes away while WEIGHTS are published."""
    first, of = request.param
    proxy.disturb(Fault.BUSY, first, of=of)
    with pytest.raises(StorageError):
        publish_files(disturbed, KEY, **{"weights": WEIGHTS, "z-small": b"1"})
    proxy.calm()


@pytest.mark.usefixtures("cut_short")
def test_other_bytes_replace_what_was_stored(
    disturbed: FsspecStorage, s3: S3Server, prefix: str
) -> None:
    publish_files(disturbed, KEY, weights=OTHERS)
    assert files_of(disturbed, KEY) == {"weights": OTHERS}
    assert begun_uploads(s3, prefix) == []


@pytest.mark.parametrize("cut_short", [CUT_SHORT["after a large file"]], indirect=True)
@pytest.mark.usefixtures("cut_short")
def test_a_file_that_is_stored_whole_is_read_and_not_sent(
    disturbed: FsspecStorage, proxy: FaultyProxy
) -> None:
    files = {"weights": WEIGHTS, "z-small": b"1"}
    publish_files(disturbed, KEY, **files)
    assert parts_sent(proxy) == []
    assert files_of(disturbed, KEY) == files


@pytest.mark.usefixtures("cut_short")
def test_an_upload_that_was_taken_up_and_deleted_leaves_nothing(
    disturbed: FsspecStorage, s3: S3Server, prefix: str
) -> None:
    publish_files(disturbed, KEY, card=b"{}")
    disturbed.delete(KEY)
    assert s3.objects(prefix) == set()
    assert begun_uploads(s3, prefix) == []


@pytest.mark.parametrize("cut_short", [CUT_SHORT["in a large file"]], indirect=True)
@pytest.mark.usefixtures("cut_short")
def test_lists_of_the_store_are_read_to_their_end(
    disturbed: FsspecStorage,
    proxy: FaultyProxy,
    s3: S3Server,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = stored_parts(s3, prefix)
    (begun,) = begun_uploads(s3, prefix)
    for _ in range(2):  # others, whose names begin as that of the file does
        other = {"Bucket": BUCKET, "Key": begun["Key"] + "-of-another"}
        fsspec.filesystem("s3", **options(s3.port)).call_s3("create_multipart_upload", **other)
    page = {"list_parts": {"MaxParts": 1}, "list_multipart_uploads": {"MaxUploads": 1}}
    call_s3 = S3FileSystem.call_s3

    def call(filesystem: S3FileSystem, method: str, **arguments: Any) -> Any:
        return call_s3(filesystem, method, **arguments, **page.get(method, {}))

    monkeypatch.setattr(S3FileSystem, "call_s3", call)
    proxy.calm()
    publish_files(disturbed, KEY, **{"weights": WEIGHTS, "z-small": b"1"})
    assert len(stored) == 3
    assert parts_sent(proxy) == sorted(PARTS - stored)
    disturbed.delete(KEY)
    monkeypatch.undo()
    assert begun_uploads(s3, prefix) == []
