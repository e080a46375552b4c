"""`FsspecStorage` on a real S3 server: the contract, what it keeps where, its cache."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

from customized_models import FsspecStorage, Merger, ModelRegistry
from customized_models.errors import (
    AlreadyExistsError,
    IntegrityError,
    InvalidOptionError,
    MissingDependencyError,
    NotLocalError,
    StorageError,
)
from customized_models.storage import open_storage, stores
from customized_models.testing import StorageContract, publish_files, tiny_llama, tiny_lora
from tests.servers.faulty_proxy import FaultyProxy
from tests.servers.s3_server import BUCKET, S3Server, options

from .stored import FILES, KEY, a_week_later, files_of


@pytest.fixture
def storage(on_s3: FsspecStorage) -> FsspecStorage:
    return on_s3


class TestFsspecStorageOnS3(StorageContract):
    pass


# Opening


def test_a_url_of_an_object_store_opens_one() -> None:
    storage = open_storage("s3://bucket/prefix")
    assert repr(storage) == "FsspecStorage('s3://bucket/prefix')"


@pytest.mark.parametrize("url", ["s3://", "s3:///", "s3://key@bucket", "s3://b?x", "s3://b/*"])
def test_a_url_without_a_bucket_or_with_more_is_refused(url: str) -> None:
    with pytest.raises(InvalidOptionError, match="with a bucket"):
        open_storage(url)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'customized-models\[s3\]'"):
        open_storage("s3://bucket/prefix")
    with pytest.raises(MissingDependencyError, match="pip install 'gcsfs'"):
        open_storage("gs://bucket/prefix")


def test_nothing_is_imported_before_it_is_used() -> None:
    script = (
        "import pickle, sys; from customized_models import FsspecStorage\n"
        "pickle.loads(pickle.dumps(FsspecStorage('s3://bucket/prefix')))\n"
        "assert not {'fsspec', 's3fs', 'botocore', 'aiohttp'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.usefixtures("at_once")
def test_a_bucket_that_is_not_there_is_an_error(s3: S3Server, tmp_path: Path) -> None:
    storage = FsspecStorage("s3://nowhere/x", options=options(s3.port), local=tmp_path)
    with pytest.raises(StorageError, match="nowhere"):
        publish_files(storage, KEY, **FILES)


def test_memory_is_for_trials(tmp_path: Path) -> None:
    storage = FsspecStorage(f"memory://{uuid.uuid4().hex}", local=tmp_path)
    publish_files(storage, KEY, **FILES)
    storage.rewrite(KEY, "card", b"new")
    assert files_of(storage, KEY) == FILES | {"card": b"new"}
    with pytest.raises(AlreadyExistsError):
        publish_files(storage, KEY, **FILES)
    assert list(storage.keys()) == [KEY]
    storage.delete(KEY)
    assert list(storage.keys()) == []


# Processes


def test_it_works_in_a_process_that_was_forked_while_it_was_in_use(
    storage: FsspecStorage,
) -> None:
    publish_files(storage, KEY, **FILES)
    pid = os.fork()
    if not pid:
        signal.alarm(60)  # rather than wait for an event loop that is not here
        try:
            publish_files(storage, "customized/b", file=b"of the child")
        finally:
            os._exit(int(list(storage.keys()) != [KEY, "customized/b"]))
    assert os.waitpid(pid, 0)[1] == 0
    assert files_of(storage, "customized/b") == {"file": b"of the child"}
    assert files_of(storage, KEY) == FILES


def test_its_pickle_sees_the_same_keys(storage: FsspecStorage) -> None:
    publish_files(storage, KEY, **FILES)
    again = pickle.loads(pickle.dumps(storage))
    assert files_of(again, KEY) == FILES


def test_staging_after_a_kill_finds_what_it_held(storage: FsspecStorage) -> None:
    script = (
        "import os, pickle, sys; storage = pickle.loads(bytes.fromhex(sys.argv[1]))\n"
        "with storage.staging('job') as directory:\n"
        "    (directory / 'shard').write_bytes(b'done'); os.kill(os.getpid(), 9)"
    )
    given = pickle.dumps(storage).hex()
    killed = subprocess.run([sys.executable, "-c", script, given])
    assert killed.returncode == -9
    with storage.staging("job") as directory:
        assert (directory / "shard").read_bytes() == b"done"


# What is in the store


def test_a_deleted_key_leaves_no_object(storage: FsspecStorage, s3: S3Server, prefix: str) -> None:
    publish_files(storage, KEY, **FILES)
    storage.rewrite(KEY, "card", b"new")
    assert len(s3.objects(prefix)) == 3  # the marker, and a file's object each
    storage.delete(KEY)
    assert s3.objects(prefix) == set()


def test_who_loses_leaves_no_object(storage: FsspecStorage, s3: S3Server, prefix: str) -> None:
    publish_files(storage, KEY, **FILES)
    before = s3.objects(prefix)
    with pytest.raises(AlreadyExistsError):
        publish_files(storage, KEY, other=b"x")
    assert s3.objects(prefix) == before


@pytest.mark.usefixtures("at_once")
def test_bytes_that_changed_in_the_store_are_found(
    storage: FsspecStorage, s3: S3Server, prefix: str
) -> None:
    publish_files(storage, KEY, **FILES)
    (path,) = (s3.bucket / prefix).rglob("weights")
    path.write_bytes(b"x" + FILES["weights"][1:])
    with pytest.raises(IntegrityError, match="weights"), storage.checkout(KEY):
        pass
    with pytest.raises(IntegrityError, match="weights"):
        storage.open(KEY, "weights")


@pytest.mark.usefixtures("at_once")
def test_a_damaged_marker_is_found_and_can_be_deleted(
    storage: FsspecStorage, s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_files(storage, KEY, **FILES)
    (s3.bucket / prefix / "keys" / KEY).write_bytes(b"{}")
    with pytest.raises(IntegrityError):
        storage.open(KEY, "card")
    with pytest.raises(AlreadyExistsError):
        publish_files(storage, KEY, **FILES)
    storage.delete(KEY)
    assert list(storage.keys()) == []
    a_week_later(storage, monkeypatch)
    assert s3.objects(prefix) == set()


def test_a_large_file_is_uploaded_in_parts_and_read_by_ranges(
    storage: FsspecStorage, s3: S3Server, prefix: str
) -> None:
    block = os.urandom(1 << 20)
    with storage.staging("large") as directory:
        with (directory / "weights").open("wb") as file:
            for number in range(40):  # of which a part has 16
                file.write(number.to_bytes(8, "big") + block[8:])
        storage.publish(directory, KEY)
    with storage.open(KEY, "weights") as opened:
        for number in (39, 3, 0):
            opened.seek(number << 20)
            assert opened.read(16) == number.to_bytes(8, "big") + block[8:16]
        opened.seek(-5, os.SEEK_END)
        assert opened.read() == block[-5:]
        assert opened.read(1) == b""
    with storage.checkout(KEY) as directory:
        assert (directory / "weights").stat().st_size == 40 << 20
    storage.delete(KEY)


# The cache of this host


def gets_of_files(proxy: FaultyProxy) -> list[str]:
    return [path for method, path in proxy.requests if method == "GET" and "/files/" in path]


def test_what_was_read_is_not_fetched_again(disturbed: FsspecStorage, proxy: FaultyProxy) -> None:
    publish_files(disturbed, KEY, **FILES)
    proxy.calm()
    files_of(disturbed, KEY)
    assert len(gets_of_files(proxy)) == 2
    disturbed.rewrite(KEY, "card", b"[]")  # of the same size
    proxy.calm()
    for _ in range(2):
        assert files_of(disturbed, KEY) == FILES | {"card": b"[]"}
    assert len(gets_of_files(proxy)) == 1


def test_what_was_damaged_in_the_cache_is_fetched_again(storage: FsspecStorage) -> None:
    publish_files(storage, KEY, **FILES)
    with storage.checkout(KEY) as directory:
        path = directory / "weights"
    path.chmod(0o644)
    path.write_bytes(b"x" * len(FILES["weights"]))
    assert files_of(storage, KEY) == FILES


def test_the_cache_is_bounded_but_for_what_is_checked_out(
    s3: S3Server, prefix: str, tmp_path: Path
) -> None:
    storage = FsspecStorage(
        f"s3://{BUCKET}/{prefix}",
        options=options(s3.port),
        local=tmp_path,
        cache_bytes=25_000,
    )

    def kept() -> int:
        return sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())

    for name in "abcd":
        publish_files(storage, f"customized/{name}", weights=name.encode() * 10_000)
    for name in "abcd":
        with storage.checkout(f"customized/{name}"):
            pass
        assert kept() <= 25_000
    with (
        storage.checkout("customized/a") as a,
        storage.checkout("customized/b") as b,
        storage.checkout("customized/c") as c,
    ):
        assert [(d / "weights").read_bytes()[:1] for d in (a, b, c)] == [b"a", b"b", b"c"]
    assert kept() <= 25_000


def test_one_of_many_readers_fetches(disturbed: FsspecStorage, proxy: FaultyProxy) -> None:
    publish_files(disturbed, KEY, **FILES)
    proxy.calm()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(files_of(disturbed, KEY))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FILES] * 4
    assert len(gets_of_files(proxy)) == 2


# The journey


@pytest.mark.slow
def test_a_model_goes_all_the_way_through_an_object_store(
    storage: FsspecStorage, s3: S3Server, prefix: str, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "registry", storage=storage)
    base = tiny_llama(tmp_path / "base")
    registry.add_base_model("tiny", base)
    customized = registry.register(tiny_lora(tmp_path / "adapter", base), train_name="t")
    complete = Merger(registry).save(customized).result(timeout=300)

    with pytest.raises(NotLocalError):
        registry.local_path(complete)
    with registry.checkout(complete) as directory:
        assert list(directory.glob("*.safetensors"))
    registry.verify(complete)

    registry.delete(customized)
    registry.verify(complete)
    registry.delete(complete)
    assert s3.objects(prefix) == set()
