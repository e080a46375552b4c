"""How long lists and searches of a registry with many models take.

    python -m tests.benchmarks.search [models] [directory]

Each line is the shortest of several runs, in milliseconds: by the clock, and of the processor,
which tells more where the machine is shared. The models have rows only, because lists read nothing
else. They are kept in the directory for the next run, if one is given.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path

from sqlalchemy import insert

from customized_models import (
    BaseModel,
    BaseModelCard,
    CustomizedModel,
    EvaluationSummary,
    ModelCard,
    ModelRegistry,
    TrainingConfiguration,
    metric,
    tag,
)
from customized_models.base_models import Location
from customized_models.catalog.rows import insert_value
from customized_models.catalog.schema import tags
from customized_models.naming import customized_name

MODELS = 100_000
RUNS = 7
START = datetime(2026, 1, 1, tzinfo=UTC)
DIGEST = "blake3:" + "0" * 64


def model(number: int, random: random.Random) -> CustomizedModel:
    """One of many: a sweep has a hundred, and each has some metrics."""
    id, created = uuid.UUID(int=random.getrandbits(128)), START + timedelta(minutes=number)
    name = f"sweep-{number // 100}"
    metrics = {
        "eval_loss": random.uniform(0.5, 3),
        "eval_accuracy": random.random(),
        "eval_runtime": random.uniform(5, 50),
        "train_loss": random.uniform(0.5, 3),
    }
    return CustomizedModel(
        name=f"{customized_name('base', name, created, id)}{number:x}",
        base="base",
        train_name=name,
        training_id=id,
        created=created,
        digest=DIGEST,
        card=ModelCard(
            TrainingConfiguration(
                peft={"method": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
                arguments={"learning_rate": 2e-4, "num_train_epochs": 3, "seed": number},
                datasets=("org/data",),
            ),
            EvaluationSummary(metrics=metrics, steps=1000, epochs=3.0, last_loss=1.0),
        ),
    )


def filled(root: Path, models: int) -> ModelRegistry:
    """A registry with so many models, of which every hundredth has a tag."""
    registry, draws = ModelRegistry(root), random.Random(0)
    card = BaseModelCard("LlamaForCausalLM", 1, "BF16", 2)
    base = BaseModel("base", "base", DIGEST, START, card)
    registry.catalog.bases.add(base, Location("/", {}))
    for first in range(0, models, 10_000):
        with registry.catalog.database.write() as connection:
            for number in range(first, min(first + 10_000, models)):
                made = model(number, draws)
                insert_value(connection, made, stage="visible", operation="")
                if number % 100 == 0:
                    row = {"level": "customized_models", "name": made.name, "tag": "keep"}
                    connection.execute(insert(tags).values(**row))
    return registry


def shortest(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds by the clock, and of the processor."""
    clock, processor = [], []
    for _ in range(RUNS):
        begun, used = time.perf_counter(), time.process_time()
        call()
        clock.append(1000 * (time.perf_counter() - begun))
        processor.append(1000 * (time.process_time() - used))
    return min(clock), min(processor)


def main(models: int, kept: str | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(kept or temporary, "models")
        registry = ModelRegistry(root) if root.is_dir() else filled(root, models)
        every = registry.customized_models()
        loss = metric("eval_loss")
        size = (root / "registry.db").stat().st_size >> 20
        print(f"{len(every):,} models, {size} MB; milliseconds by the clock, of the processor")
        for what, call in {
            "start of a list": lambda: every.first(),
            "first page of 100": lambda: every[:100],
            "page 500": lambda: every[49_900:50_000],
            "len": lambda: len(every),
            "page of a loop, all numbers read": lambda: list(islice(every, 101)),
            "train name": lambda: registry.customized_models(train_name="sweep-7")[:100],
            "train name, pattern": lambda: registry.customized_models(train_name="sweep-7?")[:100],
            "one day": lambda: registry.customized_models(since="2026-02-01", until="2026-02-02")[
                :100
            ],
            "best 100 by a metric": lambda: every.order_by(loss)[:100],
            "page 500 by a metric": lambda: every.order_by(loss)[49_900:50_000],
            "metric that half have": lambda: every.where(loss < 1.75)[:100],
            "metric that 0.1 % have": lambda: every.where(loss < 0.5025)[:100],
            "two metrics, by a third": lambda: every.where(
                (loss < 1.0) & (metric("eval_accuracy") > 0.9)
            ).order_by(-metric("train_loss"))[:100],
            "tag, by a metric": lambda: every.where(tag("keep")).order_by(loss)[:100],
        }.items():
            by_clock, of_processor = shortest(call)
            print(f"{what:34}{by_clock:8.1f}{of_processor:8.1f}")


if __name__ == "__main__":
    models, kept = (*sys.argv[1:], None, None)[:2]
    main(int(models) if models else MODELS, kept)
