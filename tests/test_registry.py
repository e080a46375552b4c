"""Registering: base models, customized models, names, lists, and many processes at once."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import attrs
import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from safetensors.torch import load_file, save_file

from customized_models import (
    AlreadyExistsError,
    BaseModel,
    BaseModelMismatch,
    BaseModelMissingError,
    CompleteModel,
    CustomizedModel,
    DatabaseError,
    DeploymentEnvironment,
    DeploymentTemplate,
    IntegrityError,
    InUseError,
    InvalidArgumentError,
    InvalidNameError,
    InvalidOptionError,
    ModelRegistry,
    NonFiniteError,
    NotFoundError,
    NotLocalError,
    UnsafeFileError,
)
from customized_models.cards.readme import parse_card
from customized_models.testing import MemoryStorage, tiny_llama, tiny_lora
from tests.models import only_sqlite

TRAINING = uuid.UUID("a1b2c3d4-0000-4000-8000-000000000000")


@pytest.fixture
def registry(each_registry: ModelRegistry) -> ModelRegistry:
    """A registry that knows `tiny_base` as llama-tiny, with every kind of database."""
    return each_registry


# Base models


def test_a_base_model_has_a_card_read_from_its_files(registry: ModelRegistry) -> None:
    card = registry.get(BaseModel, "llama-tiny").card

    assert card.architecture == "LlamaForCausalLM"
    assert (card.context_length, card.vocabulary_size) == (512, 320)
    assert card.dtype == "BF16"
    assert card.parameters > 50_000
    assert card.size > 2 * card.parameters


def test_technical_and_model_names_are_unique(registry: ModelRegistry, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=32)

    with pytest.raises(AlreadyExistsError, match="llama-tiny"):
        registry.add_base_model("llama-tiny", other)
    with pytest.raises(AlreadyExistsError, match="tests/llama-tiny"):
        registry.add_base_model("another", other, model_name="tests/llama-tiny")

    assert [base.name for base in registry.base_models()] == ["llama-tiny"]


def test_adding_the_same_base_model_again_returns_it(
    registry: ModelRegistry, tiny_base: Path
) -> None:
    known = registry.get(BaseModel, "llama-tiny")
    again = registry.add_base_model("llama-tiny", tiny_base, model_name="tests/llama-tiny")
    assert again == known


@only_sqlite  # no row is made
@pytest.mark.parametrize("name", ["", "A", "a_b", "../a", "a" * 25, "-a", "a\n", "ä", "a..b"])
def test_a_technical_name_outside_its_alphabet_is_refused(
    registry: ModelRegistry, tiny_base: Path, name: str
) -> None:
    with pytest.raises(InvalidNameError):
        registry.add_base_model(name, tiny_base)


def test_a_base_model_is_never_copied(registry: ModelRegistry, tiny_base: Path) -> None:
    assert not list(registry.root.rglob("*.safetensors"))
    assert registry.local_path(registry.get(BaseModel, "llama-tiny")) == tiny_base.resolve()


def test_a_hub_cache_snapshot_is_a_base_model_of_the_same_digest(
    registry: ModelRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub/models--tests--llama/snapshots" / ("0" * 40)
    blobs = tmp_path / "hub/models--tests--llama/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(tiny_base.iterdir())):
        shutil.copy(path, blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")

    other = ModelRegistry(tmp_path / "models")
    linked = other.add_base_model("linked", snapshot)

    assert linked.digest == registry.get(BaseModel, "llama-tiny").digest


def test_a_base_model_with_a_link_out_of_its_directory_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "base"
    shutil.copytree(tiny_base, directory)
    shutil.move(directory / "config.json", tmp_path / "elsewhere.json")
    (directory / "config.json").symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(UnsafeFileError, match=r"config\.json"):
        ModelRegistry(tmp_path / "models").add_base_model("linked", directory)


def test_a_moved_base_model_is_found_again_by_its_bytes(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models")
    shutil.copytree(tiny_base, tmp_path / "before")
    base = registry.add_base_model("llama-tiny", tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "after")

    with pytest.raises(BaseModelMissingError, match="relocate_base_model"):
        registry.register(tiny_adapter, train_name="support", base_model="llama-tiny")
    assert registry.relocate_base_model("llama-tiny", tmp_path / "after") == base
    registry.register(tiny_adapter, train_name="support", base_model="llama-tiny")


def test_other_bytes_are_no_new_place_for_a_base_model(
    registry: ModelRegistry, tmp_path: Path
) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=32)
    with pytest.raises(BaseModelMismatch):
        registry.relocate_base_model("llama-tiny", other)


def test_a_base_model_that_changed_under_its_name_is_refused(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models")
    shutil.copytree(tiny_base, tmp_path / "base")
    registry.add_base_model("llama-tiny", tmp_path / "base")
    shard = next((tmp_path / "base").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)

    with pytest.raises(BaseModelMismatch, match=re.escape(shard.name)):
        registry.register(tiny_adapter, train_name="support", base_model="llama-tiny")


def test_a_base_model_that_was_only_touched_is_accepted(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models")
    shutil.copytree(tiny_base, tmp_path / "base")
    registry.add_base_model("llama-tiny", tmp_path / "base")
    for path in (tmp_path / "base").iterdir():
        os.utime(path, (1, 1))

    registry.register(tiny_adapter, train_name="support", base_model="llama-tiny")


def test_a_deployment_template_can_be_set_later(registry: ModelRegistry) -> None:
    template = DeploymentTemplate("{{ .Prompt }}", stop=("<|im_end|>",))
    registry.set_deployment_template("llama-tiny", template)
    assert registry.get(BaseModel, "llama-tiny").deployment_template == template


# Customized models


def test_a_registered_adapter_is_named_by_the_grammar(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    customized = registry.register(
        tiny_adapter, train_name="support", base_model="llama-tiny", training_id=TRAINING
    )

    assert customized.name == f"llama-tiny_support_{datetime.now(UTC):%Y%m%d}_a1b2"
    assert registry.get(CustomizedModel, customized.name) == customized


def test_only_the_adapter_and_its_tokenizer_are_copied(
    registry: ModelRegistry, tiny_adapter: Path, tmp_path: Path
) -> None:
    source = tmp_path / "out"
    shutil.copytree(tiny_adapter, source)
    for stray in ("optimizer.pt", "training_args.bin", "model.safetensors"):
        (source / stray).write_bytes(b"stray")
    (source / "chat_template.jinja").write_text("{{ messages }}")

    customized = registry.register(source, train_name="support", base_model="llama-tiny")

    with registry.checkout(customized) as directory:
        assert sorted(path.name for path in directory.iterdir()) == [
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "manifest.json",
        ]


def test_the_base_is_found_by_the_path_the_training_used(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    assert registry.register(tiny_adapter, train_name="support").base == "llama-tiny"


def test_without_a_matching_base_the_error_lists_the_candidates(
    tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("other", tiny_llama(tmp_path / "other", hidden_size=32))
    with pytest.raises(BaseModelMismatch, match="other"):
        registry.register(tiny_adapter, train_name="support")


def test_an_adapter_for_another_base_is_refused(
    registry: ModelRegistry, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry.add_base_model("wide", tiny_llama(tmp_path / "wide", hidden_size=128))
    with pytest.raises(BaseModelMismatch):
        registry.register(tiny_adapter, train_name="support", base_model="wide")
    assert list(registry.customized_models()) == []


def test_registering_the_same_training_again_returns_the_same_model(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    first = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
    again = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
    assert again == first
    assert len(list(registry.customized_models())) == 1


def test_a_training_id_stands_for_one_model(
    registry: ModelRegistry, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    first = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
    other = tiny_lora(tmp_path / "other", tiny_base, seed=1)

    with pytest.raises(AlreadyExistsError, match=first.name):
        registry.register(other, train_name="support", training_id=TRAINING)
    with pytest.raises(AlreadyExistsError, match=first.name):
        registry.register(tiny_adapter, train_name="sales", training_id=TRAINING)


def test_ids_that_begin_alike_clash_with_a_clear_error(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
    alike = uuid.UUID("a1b2ffff-0000-4000-8000-000000000000")
    with pytest.raises(AlreadyExistsError, match="draw another training id"):
        registry.register(tiny_adapter, train_name="support", training_id=alike)


def test_a_reserved_name_keeps_its_date(registry: ModelRegistry, tiny_adapter: Path) -> None:
    name = registry.reserve(train_name="support", training_id=TRAINING, base_model="llama-tiny")
    assert name == registry.reserve(
        train_name="support", training_id=TRAINING, base_model="llama-tiny"
    )
    customized = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
    assert customized.name == name


def test_a_model_may_be_dated_when_it_was_trained(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    trained = datetime(2025, 12, 31, 23, 30, tzinfo=timezone(timedelta(hours=-2)))  # 2026 in UTC
    model = registry.register(tiny_adapter, train_name="old", created=trained)

    assert model.created == trained
    assert model.name.startswith("llama-tiny_old_20260101_")
    assert registry.register(tiny_adapter, train_name="old") == model


@only_sqlite  # no row is made
@pytest.mark.parametrize(
    "created", [datetime(2026, 1, 1), datetime(9999, 1, 1, tzinfo=UTC)], ids=["naive", "future"]
)
def test_a_date_without_a_zone_or_in_the_future_is_refused(
    registry: ModelRegistry, tiny_adapter: Path, created: datetime
) -> None:
    with pytest.raises(InvalidArgumentError, match="created takes"):
        registry.register(tiny_adapter, train_name="x", created=created)


def test_an_evaluation_is_added_to_the_card_and_to_every_file_that_tells_of_it(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    first = {"eval_loss": 2.0, "eval_f1": 0.5}
    model = registry.register(tiny_adapter, train_name="support", evaluation=first)

    with registry.checkout(model) as directory:  # which others may have open meanwhile
        changed = registry.add_evaluation(model, {"eval_loss": 1.5, "mmlu": 1})
        assert parse_card(directory / "README.md") == changed.card

    assert changed.card.evaluation.metrics == {"eval_loss": 1.5, "eval_f1": 0.5, "mmlu": 1.0}
    assert (changed.name, changed.digest) == (model.name, model.digest)
    assert registry.get(CustomizedModel, model.name) == changed
    registry.verify(changed)
    lost = ModelRegistry(registry.root, database=f"sqlite:///{registry.root / 'new.db'}")
    lost.reindex()
    assert list(lost.customized_models()) == [changed]
    registry.delete(model)  # as it was known before
    with pytest.raises(NotFoundError):
        registry.add_evaluation(changed, {"late": 1.0})


def test_evaluations_added_at_once_are_all_kept(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    model = registry.register(tiny_adapter, train_name="support")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: registry.add_evaluation(model.name, {f"m{n}": n}), range(8)))

    card = registry.get(CustomizedModel, model.name).card
    assert card.evaluation.metrics == {f"m{n}": n for n in range(8)}
    with registry.checkout(model) as directory:
        assert parse_card(directory / "README.md") == card


@only_sqlite  # no row is made
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_adapter_that_has_diverged_is_refused(
    registry: ModelRegistry, tiny_adapter: Path, tmp_path: Path, dtype: str, value: float
) -> None:
    diverged = Path(shutil.copytree(tiny_adapter, tmp_path / "diverged"))
    weights = diverged / "adapter_model.safetensors"
    tensors = {name: t.to(getattr(torch, dtype)) for name, t in load_file(weights).items()}
    last = sorted(tensors)[-1]
    tensors[last][-1, -1] = value
    save_file(tensors, weights, {"format": "pt"})

    with pytest.raises(NonFiniteError, match=re.escape(last)):
        registry.register(diverged, train_name="diverged")
    assert list(registry.customized_models()) == []


@only_sqlite
@pytest.mark.parametrize(
    ("label", "train_name"),
    [
        ("support", "support"),
        ("My Run", "my-run"),
        ("llama_sft/2026.11", "llama-sft-2026.11"),
        ("Réseau_v2 (final)", "reseau-v2-final"),
        ("a" * 60, "a" * 48),
    ],
)
def test_what_a_person_calls_a_training_is_kept_and_a_name_derived_from_it(
    registry: ModelRegistry, tiny_adapter: Path, label: str, train_name: str
) -> None:
    customized = registry.register(tiny_adapter, train_name=label)
    assert (customized.label, customized.train_name) == (label, train_name)
    assert customized.name.startswith(f"llama-tiny_{train_name}_")
    for either in (label, train_name):
        assert list(registry.customized_models(train_name=either)) == [customized]


@only_sqlite  # no row is made
@pytest.mark.parametrize("name", ["", "...", "模型", "a\x00", "a\n", "a" * 201])
def test_a_train_name_that_nothing_can_be_derived_from_is_refused(
    registry: ModelRegistry, tiny_adapter: Path, name: str
) -> None:
    with pytest.raises(InvalidNameError):
        registry.register(tiny_adapter, train_name=name)


def test_the_card_reads_back_from_the_readme(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")

    with registry.checkout(customized) as directory:
        data = HubCard.load(directory / "README.md").data

    assert data.base_model == "tests/llama-tiny"
    assert data.library_name == "peft"
    assert customized.card.training.peft["r"] == 4


def test_a_base_without_a_hub_id_is_not_named_as_one(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("local", tiny_base)
    customized = registry.register(tiny_adapter, train_name="support")

    with registry.checkout(customized) as directory:
        texts = [p.read_text() for p in directory.iterdir() if p.suffix in (".md", ".json")]
        assert HubCard.load(directory / "README.md").data.base_model is None

    assert not [text for text in texts if str(tiny_base) in text or str(tmp_path) in text]


def test_a_flipped_bit_is_found(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    registry.verify(customized)

    weights = registry.local_path(customized) / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with pytest.raises(IntegrityError, match=r"adapter_model\.safetensors"):
        registry.verify(customized)


def test_bytes_that_no_row_knows_do_not_keep_a_name_from_being_registered(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    key = registry.reserve(train_name="support", training_id=TRAINING, base_model="llama-tiny")
    (registry.root / "customized" / key).mkdir(parents=True)  # published, but no row

    customized = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)

    registry.verify(customized)


# Lists


def test_lists_are_newest_first_and_filtered(registry: ModelRegistry, tiny_adapter: Path) -> None:
    names = [registry.register(tiny_adapter, train_name=f"run-{n}").name for n in range(3)]

    assert [m.name for m in registry.customized_models()] == names[::-1]
    assert [m.name for m in registry.customized_models(train_name="run-1")] == names[1:2]
    assert [m.name for m in registry.customized_models(base="llama-tiny")] == names[::-1]
    assert list(registry.customized_models(train_name="run-3")) == []


def test_a_listing_shows_escaped_in_a_notebook_without_being_consumed(
    registry: ModelRegistry, tiny_base: Path
) -> None:
    hostile = "<script>alert(1)</script>"
    registry.add_base_model("hostile", tiny_base, model_name=hostile)
    listing = registry.base_models()

    page = listing._repr_html_()

    assert hostile not in page
    assert "&lt;script&gt;" in page
    assert len(list(listing)) == 2


def test_every_entry_of_a_list_shows_base_train_name_card_and_name(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    page = registry.customized_models()._repr_html_()
    for shown in ("llama-tiny", "support", "LoRA, rank 4", customized.name):
        assert f"<td>{shown}</td>" in page


def test_every_value_has_a_short_repr_and_a_table(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    base = registry.get(BaseModel, "llama-tiny")
    for value in (customized, base, base.card):
        assert len(repr(value)) < 400
        assert "<table>" in value._repr_html_()


def test_values_hold_no_path(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    base = registry.get(BaseModel, "llama-tiny")
    for value in (customized, base):
        text = json.dumps(attrs.asdict(value), default=str)
        assert str(registry.root) not in text
        assert str(tiny_adapter) not in text


# Environments


def test_an_environment_of_a_mistyped_backend_is_refused(registry: ModelRegistry) -> None:
    with pytest.raises(InvalidOptionError, match="did you mean 'llama_cpp'"):
        registry.add_environment(DeploymentEnvironment("here", backend="llama.cpp"))


def test_an_environment_is_added_once(registry: ModelRegistry) -> None:
    here = DeploymentEnvironment("here", "ollama", "127.0.0.1", 11434)
    assert registry.add_environment(here) == here
    assert registry.add_environment(here) == here
    with pytest.raises(AlreadyExistsError):
        registry.add_environment(attrs.evolve(here, port=11435))
    assert list(registry.environments()) == [here]


# Sharing


def test_another_process_sees_everything(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    script = (
        "import sys; from customized_models import ModelRegistry\n"
        "registry = ModelRegistry(sys.argv[1], database=sys.argv[2])\n"
        "print(*[m.name for m in registry.customized_models()])"
    )
    where = [str(registry.root), registry.catalog.database.url]
    output = subprocess.check_output([sys.executable, "-c", script, *where], text=True)
    assert output.split() == [customized.name]


def test_a_registry_pickles(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    copy = pickle.loads(pickle.dumps(registry))
    assert list(copy.customized_models()) == [customized]


def test_a_registry_survives_a_fork(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    child = os.fork()
    if child == 0:
        os._exit(0 if list(registry.customized_models()) == [customized] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@only_sqlite  # for races on a server see catalog/test_postgresql.py
@pytest.mark.slow
def test_eight_processes_register_fifty_adapters_each(
    registry: ModelRegistry, tiny_adapter: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("register_many.py")
    workers = [
        subprocess.Popen([sys.executable, script, registry.root, tiny_adapter, str(n)])
        for n in range(8)
    ]
    assert [worker.wait() for worker in workers] == [0] * 8

    models = list(registry.customized_models())
    assert len({m.name for m in models}) == len({m.digest for m in models}) == 400
    for model in models:
        registry.verify(model)
    assert len(list((registry.root / "customized").iterdir())) == 400
    assert list((registry.root / ".staging").iterdir()) == []


def test_a_damaged_database_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(DatabaseError, match="not a database"):
        list(ModelRegistry(tmp_path).base_models())


def test_a_registry_in_a_storage_of_ones_own(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models", storage=MemoryStorage())
    registry.add_base_model("llama-tiny", tiny_base)
    customized = registry.register(tiny_adapter, train_name="support")

    registry.verify(customized)
    assert not (tmp_path / "models/customized").exists()
    with pytest.raises(NotLocalError):
        registry.local_path(customized)
    registry.delete(customized)
    assert list(registry.customized_models()) == []


# Deleting


def test_a_base_model_with_dependents_is_not_deleted(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    base = registry.get(BaseModel, "llama-tiny")

    with pytest.raises(InUseError, match=customized.name):
        registry.delete(base)
    registry.delete(customized)
    registry.delete(base)

    assert list(registry.base_models()) == []


def test_deleting_a_base_model_leaves_its_files(registry: ModelRegistry, tiny_base: Path) -> None:
    before = sorted(path.name for path in tiny_base.iterdir())
    registry.delete(registry.get(BaseModel, "llama-tiny"))
    assert sorted(path.name for path in tiny_base.iterdir()) == before


def test_what_is_checked_out_is_not_deleted(registry: ModelRegistry, tiny_adapter: Path) -> None:
    customized = registry.register(tiny_adapter, train_name="support")
    with registry.checkout(customized) as directory:
        with pytest.raises(InUseError, match="checkout"):
            registry.delete(customized)
        assert (directory / "adapter_model.safetensors").is_file()
    registry.delete(customized)


def test_a_deleted_model_is_gone_and_may_be_registered_again(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    first = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)
    registry.delete(first)

    with pytest.raises(NotFoundError):
        registry.get(CustomizedModel, first.name)
    with pytest.raises(NotFoundError):
        registry.delete(first)
    again = registry.register(tiny_adapter, train_name="support", training_id=TRAINING)

    assert (again.name, again.digest) == (first.name, first.digest)


def test_nothing_goes_by_an_unknown_name(registry: ModelRegistry) -> None:
    with pytest.raises(NotFoundError, match="no CompleteModel"):
        registry.get(CompleteModel, "no-such")
