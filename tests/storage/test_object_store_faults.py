"""`FsspecStorage` on a real S3 server that a network disturbs, or that goes away."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator

import fsspec
import pytest

from customized_models import FsspecStorage
from customized_models.errors import NotFoundError, StorageError
from customized_models.testing import publish_files
from tests.servers.faulty_proxy import Fault, FaultyProxy
from tests.servers.s3_server import BUCKET, S3Server, options

from .stored import FILES, KEY, a_week_later, files_of

# One request fails

ONE_REQUEST = [
    [Fault.ERROR, Fault.BUSY, Fault.RESET],  # it is not served
    [Fault.LOST],  # it is, and nothing is heard of that
    [Fault.CUT, Fault.DAMAGED],  # its answer is broken
]


def at_each_request(proxy: FaultyProxy, requests: int) -> Iterator[int]:
    """A number, while the request of that number is disturbed, until there are no more.

    Of each kind of faults every request has one. `requests`: at least so many there are.
    """
    for faults in ONE_REQUEST:
        for number in itertools.count():
            proxy.disturb(faults[number % len(faults)], number, 1)
            yield number
            if number >= len(proxy.requests):
                assert number >= requests
                break


pytestmark = pytest.mark.usefixtures("at_once")


def test_a_publication_survives_any_failed_request(
    disturbed: FsspecStorage, on_s3: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str
) -> None:
    for count, _ in enumerate(at_each_request(proxy, 8), 1):
        publish_files(disturbed, f"customized/{count}", **FILES)
        assert files_of(on_s3, f"customized/{count}") == FILES
        assert len(s3.objects(prefix)) == 3 * count  # markers, and an object of each file


def test_a_deletion_survives_any_failed_request(
    disturbed: FsspecStorage, on_s3: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str
) -> None:
    for _ in at_each_request(proxy, 6):
        publish_files(on_s3, KEY, **FILES)
        disturbed.delete(KEY)
        assert s3.objects(prefix) == set()


def test_a_change_survives_any_failed_request(
    disturbed: FsspecStorage, on_s3: FsspecStorage, proxy: FaultyProxy, s3: S3Server, prefix: str
) -> None:
    publish_files(on_s3, KEY, **FILES)
    for number in at_each_request(proxy, 5):
        disturbed.rewrite(KEY, "card", b"%d" % number)
        assert files_of(on_s3, KEY) == FILES | {"card": b"%d" % number}
        assert len(s3.objects(prefix)) == 3  # the marker, and a file's object each


def test_reading_survives_any_failed_request(
    disturbed: FsspecStorage, on_s3: FsspecStorage, proxy: FaultyProxy
) -> None:
    publish_files(on_s3, KEY, **FILES)
    for _ in at_each_request(proxy, 6):
        assert list(disturbed.keys()) == [KEY]
        with disturbed.open(KEY, "card") as file:
            assert file.read() == FILES["card"]
        assert files_of(disturbed, KEY) == FILES
        shutil.rmtree(disturbed.local)


# The store goes away


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOST], ids=lambda fault: fault.name)
def test_a_store_that_goes_away_leaves_nothing_half_visible(
    disturbed: FsspecStorage,
    on_s3: FsspecStorage,
    proxy: FaultyProxy,
    s3: S3Server,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    """At whichever request it goes; what it did all the same is known, or said not to be."""
    number, failed = 0, True
    while failed:
        proxy.disturb(fault, number)
        outcome_unknown = False
        try:
            publish_files(disturbed, KEY, **FILES)
        except StorageError as error:
            outcome_unknown = error.outcome_unknown
        else:
            failed = number < len(proxy.requests)  # the last request may fail, and nothing is lost
            outcome_unknown = True
        if list(on_s3.keys()) == [KEY]:
            assert outcome_unknown
            assert files_of(on_s3, KEY) == FILES
        on_s3.delete(KEY)
        a_week_later(on_s3, monkeypatch)
        assert s3.objects(prefix) == set()
        number += 1
    assert number > 5


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.LOST], ids=lambda fault: fault.name)
def test_a_store_that_goes_away_during_a_change_leaves_the_old_or_the_new(
    disturbed: FsspecStorage, on_s3: FsspecStorage, proxy: FaultyProxy, fault: Fault
) -> None:
    publish_files(on_s3, KEY, **FILES)
    number, failed, now = 0, True, FILES["card"]
    while failed:
        new = b"%d" % number
        proxy.disturb(fault, number)
        failed = unknown = False
        try:
            disturbed.rewrite(KEY, "card", new)
        except StorageError as error:
            failed, unknown = True, error.outcome_unknown
        found = files_of(on_s3, KEY)["card"]
        assert found in ([new] if not failed else [now, new] if unknown else [now])
        now, number = found, number + 1
    proxy.calm()
    assert files_of(disturbed, KEY) == FILES | {"card": now}


def test_a_store_that_goes_away_during_a_deletion_leaves_the_key_whole_or_gone(
    disturbed: FsspecStorage,
    on_s3: FsspecStorage,
    proxy: FaultyProxy,
    s3: S3Server,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(8):
        publish_files(on_s3, KEY, **FILES)
        proxy.disturb(Fault.BUSY, number)
        try:
            disturbed.delete(KEY)
        except StorageError:
            assert files_of(on_s3, KEY) == FILES
            on_s3.delete(KEY)
        assert list(on_s3.keys()) == []
    a_week_later(on_s3, monkeypatch)
    assert s3.objects(prefix) == set()


def test_parts_of_an_upload_that_never_ended_are_swept(
    on_s3: FsspecStorage,
    disturbed: FsspecStorage,
    proxy: FaultyProxy,
    s3: S3Server,
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = 0
    while not s3.objects(f"{prefix}/pending"):  # the store goes away once an upload has begun
        proxy.disturb(Fault.BUSY, number)
        with pytest.raises(StorageError):
            publish_files(disturbed, KEY, **FILES)
        number += 1
    (pending,) = s3.objects(f"{prefix}/pending")
    filesystem = fsspec.filesystem("s3", **options(s3.port))
    part = {"Bucket": BUCKET, "Key": f"{prefix}/files/{KEY}/{pending}/weights"}
    begun = filesystem.call_s3("create_multipart_upload", **part)
    part |= {"UploadId": begun["UploadId"], "PartNumber": 1}
    filesystem.call_s3("upload_part", Body=b"part", **part)
    with on_s3.staging("soon"):
        pass
    assert s3.objects(f"{prefix}/pending") == {pending}  # somebody may be about it
    a_week_later(on_s3, monkeypatch)
    assert s3.objects(prefix) == set()
    assert not filesystem.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads")


def test_a_list_that_is_late_hides_and_shows_nothing_but_names(
    disturbed: FsspecStorage, proxy: FaultyProxy
) -> None:
    publish_files(disturbed, KEY, **FILES)
    assert list(disturbed.keys()) == [KEY]
    disturbed.delete(KEY)
    proxy.disturb(Fault.STALE, 0)
    assert list(disturbed.keys()) == [KEY]
    with pytest.raises(NotFoundError):
        disturbed.open(KEY, "card")
    publish_files(disturbed, KEY, card=b"another")
    assert files_of(disturbed, KEY) == {"card": b"another"}
