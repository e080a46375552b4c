"""What a fleet of adapters on one base takes to be saved, by one worker and by two.

    python -m tests.benchmarks.fleet --disk /scratch/fleet
    python -m tests.benchmarks.fleet --disk /tmp/fleet --scale tiny --adapters 3

For each database and storage: a plain loop of `save`, then `save_many` with an executor of one
thread, and of two. What is printed for one adapter is the time, the seconds of processors that its
worker and its share of the base's keeper took, the bytes that workers read, those that keepers read
from the base, and those that came from the disk and not from the page cache. What the workers of a
fleet read of the base, they read from the keeper's memory. Linux alone counts all this. From S3,
here a versitygw on this host, each complete model is read once more, to be compared.

The base is random and made once. A complete model is removed once it is there, so that there must
be room for four. The imports, which each host pays once, are not in the figures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
from attrs import frozen

from customized_models import CustomizedModel, FsspecStorage, Merger, ModelRegistry, as_completed
from customized_models.jobs.workers import warm_up
from customized_models.testing import tiny_llama, tiny_lora, tiny_tokenizer
from tests.benchmarks.merge import LLAMA_1B, settle
from tests.servers import build_versitygw
from tests.servers.postgresql_server import postgresql_server
from tests.servers.s3_server import BUCKET, options, s3_server
from tests.waiting import until

SCALES: dict[str, dict[str, Any]] = {"1b": LLAMA_1B, "tiny": {}}
DATABASES, STORAGES = ("sqlite", "postgresql"), ("local", "s3")
HEADS = ("s", "CPU s", "GB read", "GB kept", "from disk")


def make(directory: Path, scale: str) -> None:
    """A base and a LoRA of rank 16 on all its linear layers, unless they are there."""
    if not (directory / "adapter").is_dir():
        base = tiny_llama(directory / "base", tokenizer=False, shard_size="1GB", **SCALES[scale])
        tiny_tokenizer().save_pretrained(base)
        tiny_lora(directory / "adapter", base, r=16, target_modules="all-linear")


@frozen
class Spent:
    """What has been spent: seconds of processors, and bytes.

    Attributes:
        cpu: Of workers and keepers.
        read: By workers.
        kept: By keepers.
        disk: By both, of the disk.
    """

    cpu: float
    read: int
    kept: int
    disk: int

    @classmethod
    def so_far(cls) -> Spent:
        """By keepers that are there, and by workers that have ended.

        The system adds those to their server's.
        """
        server = psutil.Process(warm_up())
        until(lambda: not set(server.children()) - set(keepers()))
        times, counters = server.cpu_times(), server.io_counters()
        cpu, kept, disk = times.children_user + times.children_system, 0, counters.read_bytes
        for keeper in keepers():
            cpu += keeper.cpu_times().user + keeper.cpu_times().system
            kept += keeper.io_counters().read_chars
            disk += keeper.io_counters().read_bytes
        return cls(cpu, counters.read_chars, kept, disk)


def keepers() -> list[psutil.Process]:
    """All processes that keep files in memory."""
    every = psutil.process_iter(["cmdline"])
    return [one for one in every if "files.keeper" in " ".join(one.info["cmdline"] or ())]


def loop(registry: ModelRegistry, models: list[CustomizedModel]) -> None:
    for customized in models:
        registry.delete(Merger(registry).save(customized).result(progress=False))


def fleet(workers: int) -> Callable[[ModelRegistry, list[CustomizedModel]], None]:
    def run(registry: ModelRegistry, models: list[CustomizedModel]) -> None:
        with ThreadPoolExecutor(workers) as pool:
            for job in as_completed(Merger(registry, executor=pool).save_many(models)):
                registry.delete(job.result(progress=False))

    return run


def measure(registry: ModelRegistry, models: list[CustomizedModel], workers: list[int]) -> None:
    loop(registry, models[:1])  # the imports, and the base into the page cache
    ways = {"loop of save": loop} | {f"{count} worker(s)": fleet(count) for count in workers}
    for title, way in ways.items():
        until(lambda: not keepers())
        settle()
        before, begun = Spent.so_far(), time.perf_counter()
        way(registry, models)
        seconds, after = time.perf_counter() - begun, Spent.so_far()
        counts = (after.read - before.read, after.kept - before.kept, after.disk - before.disk)
        spent = (seconds, after.cpu - before.cpu, *(count / 1e9 for count in counts))
        each = (value / len(models) for value in spent)
        print(f"  {title:14}" + "".join(f"{value:12.3f}" for value in each), flush=True)


@contextmanager
def registry_at(
    directory: Path, database: str, storage: str, servers: dict[str, Any]
) -> Iterator[ModelRegistry]:
    where = directory / f"{database}-{storage}"
    shutil.rmtree(where, ignore_errors=True)
    url = servers["postgresql"].database() if database == "postgresql" else None
    store = None
    if storage == "s3":
        remote = options(servers["s3"].port)
        store = FsspecStorage(f"s3://{BUCKET}/{database}", options=remote, local=where / "local")
    try:
        yield ModelRegistry(where / "registry", database=url, storage=store)
    finally:
        shutil.rmtree(where)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--scale", choices=SCALES, default="1b")
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--databases", nargs="*", choices=DATABASES, default=DATABASES)
    parser.add_argument("--storages", nargs="*", choices=STORAGES, default=STORAGES)
    asked = parser.parse_args()
    directory = asked.disk / asked.scale
    make(directory, asked.scale)
    size = sum(path.stat().st_size for path in (directory / "base").iterdir())
    print(f"{asked.adapters} adapters on a base of {size / 1e9:.3f} GB")
    with ExitStack() as stack:
        servers: dict[str, Any] = {}
        if "postgresql" in asked.databases:
            servers["postgresql"] = stack.enter_context(postgresql_server(fsync="on"))
        if "s3" in asked.storages:
            build_versitygw.build()
            objects = directory / "s3"
            shutil.rmtree(objects, ignore_errors=True)
            objects.mkdir()
            stack.callback(shutil.rmtree, objects)
            servers["s3"] = stack.enter_context(s3_server(objects))
        for database in asked.databases:
            for storage in asked.storages:
                load = os.getloadavg()[0]
                print(f"{database}, {storage} (load {load:.1f})")
                print(f"  {'for an adapter':14}" + "".join(f"{head:>12}" for head in HEADS))
                with registry_at(directory, database, storage, servers) as registry:
                    registry.add_base_model("base", directory / "base", progress=False)
                    models = [
                        registry.register(directory / "adapter", train_name=f"fleet{number}")
                        for number in range(asked.adapters)
                    ]
                    measure(registry, models, asked.workers)


if __name__ == "__main__":
    main()
