"""Saving: the complete model, and the job that makes it."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from customized_models import (
    BaseModelMismatch,
    CompleteModel,
    CustomizedModel,
    IntegrityError,
    InUseError,
    Job,
    JobCancelled,
    JobFailed,
    JobLost,
    JobTimeoutError,
    Merger,
    ModelRegistry,
    NotFoundError,
    UnsupportedAdapterError,
    UnsupportedQuantizationError,
)
from customized_models.jobs.job import workers
from customized_models.testing import MemoryStorage, tiny_llama, tiny_lora
from tests.waiting import stop_outside_a_transaction, until


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


# What is saved


@pytest.mark.parametrize(
    "lie",
    [{"use_rslora": True}, {"lora_alpha": -8}, {"lora_alpha": 1e38}, {"lora_alpha": 9}],
    ids=str,
)
def test_an_adapter_that_was_altered_in_the_registry_is_not_saved(
    lie: dict[str, object], registry: ModelRegistry, customized: CustomizedModel
) -> None:
    """Of itself it is sound: only what was registered tells that it lies."""
    config = registry.local_path(customized) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | lie))
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        Merger(registry).save(customized).result(progress=False)
    assert list(registry.complete_models()) == []


@pytest.mark.parametrize(
    "save", [Merger.save, lambda merger, model: merger.save_many([model, model])[0]]
)
def test_a_base_with_other_bytes_is_not_merged_though_it_looks_untouched(
    save: Callable[[Merger, CustomizedModel], Job[CompleteModel]], tmp_path: Path
) -> None:
    """Same size, time and inode: only reading it again tells."""
    base = tiny_llama(tmp_path / "base")
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("tiny", base)
    customized = registry.register(tiny_lora(tmp_path / "adapter", base), train_name="support")
    path = min(base.glob("*.safetensors"))
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BaseModelMismatch, match=re.escape(path.name)):
        save(Merger(registry), customized).result(progress=False)
    assert list(registry.complete_models()) == []
    assert list((registry.root / ".staging").iterdir()) == []


# The complete model


def test_a_saved_model_has_the_bits_of_pefts_merge(
    registry: ModelRegistry,
    customized: CustomizedModel,
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    complete = Merger(registry).save(customized).result(progress=False)

    base = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto")
    PeftModel.from_pretrained(base, tiny_adapter).merge_and_unload().save_pretrained(
        tmp_path / "reference"
    )
    reference, before = tensors_of(tmp_path / "reference"), tensors_of(tiny_base)
    with registry.checkout(complete) as directory:
        merged = tensors_of(directory)
        AutoModelForCausalLM.from_pretrained(directory)
        AutoTokenizer.from_pretrained(directory)

    assert merged.keys() == reference.keys()
    assert all(torch.equal(merged[name], reference[name]) for name in reference)
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == {n for n in merged if "q_proj" in n or "down_proj" in n}


def test_a_complete_model_has_its_bases_layout_and_small_files(
    registry: ModelRegistry, customized: CustomizedModel, tiny_base: Path
) -> None:
    complete = Merger(registry).save(customized).result(progress=False)

    with registry.checkout(complete) as directory:
        names = {path.name for path in directory.iterdir()}
        assert names == {p.name for p in tiny_base.iterdir()} | {"README.md", "manifest.json"}
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            assert (directory / name).read_bytes() == (tiny_base / name).read_bytes()
    registry.verify(complete)


def test_a_complete_model_is_named_by_the_grammar_and_knows_its_parents(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    job = Merger(registry).save(customized)
    complete = job.result(progress=False)

    assert complete.name == f"{customized.name}_s_{job.id.hex[:4]}"
    assert complete.customized_digest == customized.digest
    assert complete.recipe["torch"] == importlib.metadata.version("torch")
    with registry.checkout(complete) as directory:
        assert HubCard.load(directory / "README.md").data.base_model == "tests/llama-tiny"


def test_the_adapters_own_tokenizer_and_template_win(
    registry: ModelRegistry, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    source = tmp_path / "adapter"
    tiny_lora(source, tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(source)
    customized = registry.register(source, train_name="support")

    complete = Merger(registry).save(customized).result(progress=False)

    with registry.checkout(complete) as directory:
        assert AutoTokenizer.from_pretrained(directory).chat_template == "{{ messages }}"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what it would get wrong
def test_a_tied_model_whose_head_was_trained_is_saved_untied(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "tied", tied=True, dtype="float32")
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"])
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("tied", base)
    customized = registry.register(adapter, train_name="head")
    complete = Merger(registry).save(customized).result(progress=False)

    tokens = torch.arange(8)[None]
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with registry.checkout(complete) as directory:
        merged = AutoModelForCausalLM.from_pretrained(directory)
    registry.verify(complete)

    assert merged.config.tie_word_embeddings is False
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, trained(tokens).logits)


def test_quantization_is_refused_with_the_reason(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    with pytest.raises(UnsupportedQuantizationError, match="belongs to deployment"):
        Merger(registry).save(customized, quantization="q8_0")
    assert list(registry.jobs()) == []


def test_what_cannot_be_merged_exactly_is_refused_by_name(
    registry: ModelRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", tiny_base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"of_tomorrow": True, "peft_version": "99.0.0"})
    )
    customized = registry.register(adapter, train_name="new")

    with pytest.raises(UnsupportedAdapterError, match="of_tomorrow"):
        Merger(registry).save(customized).result(progress=False)
    assert list(registry.complete_models()) == []


def test_deleting_the_adapter_leaves_the_complete_model(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    complete = Merger(registry).save(customized).result(progress=False)
    registry.delete(customized)

    assert list(registry.complete_models()) == [complete]
    registry.verify(complete)
    registry.delete(complete)
    assert list((registry.root / "complete").iterdir()) == []


# The job


def test_a_script_without_a_main_guard_can_save(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    script = (
        "import sys; from customized_models import CustomizedModel, Merger, ModelRegistry\n"
        "registry = ModelRegistry(sys.argv[1])\n"
        "job = Merger(registry).save(registry.get(CustomizedModel, sys.argv[2]))\n"
        "print(job.result().name)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(registry.root), customized.name],
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.split() == [model.name for model in registry.complete_models()]


def test_a_notebook_can_await_a_save(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    import nbformat
    from nbclient import NotebookClient

    cell = nbformat.v4.new_code_cell(
        "from customized_models import CustomizedModel, Merger, ModelRegistry\n"
        f"registry = ModelRegistry({str(registry.root)!r})\n"
        f"job = Merger(registry).save(registry.get(CustomizedModel, {customized.name!r}))\n"
        "complete = await job\n"
        "same = job.result()\n"
        "registry.complete_models()"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute(cwd=str(tmp_path))

    shown = [output for output in cell.outputs if output.output_type == "execute_result"]
    assert f"{customized.name}_s_" in shown[0].data["text/html"]


def test_peft_may_be_used_in_the_caller_while_a_save_runs(
    registry: ModelRegistry, customized: CustomizedModel, tiny_base: Path
) -> None:
    job = Merger(registry).save(customized)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    assert wrapped.peft_config["default"].r == 8
    assert job.result(progress=False).customized == customized.name


@pytest.mark.skipif(sys.platform != "linux", reason="reads process states from /proc")
def test_a_worker_that_has_ended_is_no_zombie(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    job = Merger(registry).save(customized)
    stat = Path(f"/proc/{worker_of(job)}/stat")
    job.result(progress=False)
    for _ in range(200):
        if not stat.exists():
            return
        time.sleep(0.05)
    raise AssertionError(stat.read_text())


def test_several_saves_run_at_once_and_can_be_awaited(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    async def both() -> list[CompleteModel]:
        merger = Merger(registry)
        return await asyncio.gather(merger.save(customized), merger.save(customized))

    first, second = asyncio.run(both())
    assert first.digest == second.digest
    assert first.name != second.name


def test_a_running_save_is_found_and_awaited_from_another_process(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    script = (
        "import sys, uuid; from customized_models import ModelRegistry\n"
        "registry = ModelRegistry(sys.argv[1])\n"
        "assert [job.id.hex for job in registry.jobs()] == [sys.argv[2]]\n"
        "print(registry.job(uuid.UUID(sys.argv[2])).result(progress=False).name)"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", script, str(registry.root), job.id.hex], text=True
    )
    assert output.split() == [job.result(progress=False).name]


def test_a_finished_job_still_gives_its_result(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    complete = Merger(registry).save(customized).result(progress=False)
    (job,) = registry.jobs("succeeded")
    assert job.result() == complete
    assert job.cancel() is False


def test_waiting_too_long_leaves_the_job_running(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    with pytest.raises(JobTimeoutError):
        job.result(timeout=0.2, progress=False)
    assert job.state in ("queued", "running")
    job.result(progress=False)


def test_a_running_job_keeps_what_it_needs_from_being_deleted(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    with pytest.raises(InUseError, match="save"):
        registry.delete(customized)
    job.result(progress=False)
    registry.delete(customized)


def wait_for_merging(job: Job[CompleteModel], registry: ModelRegistry) -> None:
    """Until the worker has begun to write shards."""
    staging = registry.root / ".staging" / f"save-{job.id}"
    until(lambda: list(staging.glob("*.safetensors")) or job.state not in ("queued", "running"))
    assert job.state == "running"


def test_a_cancelled_save_leaves_nothing(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    wait_for_merging(job, registry)
    assert job.cancel() is True

    with pytest.raises(JobCancelled):
        job.result(progress=False)
    assert job.state == "cancelled"
    assert list(registry.complete_models()) == []
    assert list((registry.root / ".staging").iterdir()) == []
    registry.delete(customized)


def worker_of(job: Job[CompleteModel]) -> int:
    """The process that does it, once it has begun."""
    pid = workers[str(job.id)].pid
    assert pid is not None
    return pid


def test_a_killed_worker_is_a_lost_job_and_frees_what_it_held(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    wait_for_merging(job, registry)
    os.kill(worker_of(job), signal.SIGKILL)

    with pytest.raises(JobLost, match="nothing was published"):
        job.result(progress=False)
    assert job.state == "lost"
    assert list(registry.complete_models()) == []
    registry.delete(customized)


def test_a_save_after_a_kill_takes_over_the_shards_that_were_complete(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    staging = registry.root / ".staging" / f"save-{job.id}"
    journal = staging / "shards.jsonl"
    until(lambda: journal.is_file() and journal.read_bytes().count(b"size") >= 3)
    os.kill(worker_of(job), signal.SIGKILL)
    with pytest.raises(JobLost):
        job.result(progress=False)
    entries = [json.loads(line) for line in journal.read_bytes().splitlines()[1:]]
    inodes = {entry["file"]: (staging / entry["file"]).stat().st_ino for entry in entries}
    assert 3 <= len(inodes) < 100

    complete = Merger(registry).save(customized).result(progress=False)

    directory = registry.local_path(complete)
    assert {file: (directory / file).stat().st_ino for file in inodes} == inodes
    assert not (directory / journal.name).exists()
    assert list((registry.root / ".staging").iterdir()) == []
    registry.verify(complete)
    assert [lost.id for lost in registry.jobs("lost")] == [job.id]
    uninterrupted = Merger(registry).save(customized).result(progress=False)
    assert uninterrupted.digest == complete.digest


def test_another_process_sees_a_killed_worker_within_the_lease(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    script = (
        "import sys; from customized_models import CustomizedModel, Merger, ModelRegistry\n"
        "from customized_models.jobs.job import workers\n"
        "registry = ModelRegistry(sys.argv[1])\n"
        "job = Merger(registry).save(registry.get(CustomizedModel, sys.argv[2]))\n"
        "print(job.id, workers[str(job.id)].pid)"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", script, str(registry.root), customized.name], text=True
    )
    id, pid = output.split()
    job = registry.job(uuid.UUID(id))
    wait_for_merging(job, registry)
    os.kill(int(pid), signal.SIGKILL)

    with pytest.raises(JobLost):
        job.result(timeout=60, progress=False)
    registry.delete(customized)


def age_leases(registry: ModelRegistry) -> None:
    """As if nobody had renewed a lease for longer than one lasts."""
    with closing(sqlite3.connect(registry.root / "registry.db")) as connection, connection:
        connection.execute("UPDATE leases SET renewed = renewed - 1000")


def test_a_worker_stopped_beyond_its_lease_publishes_nothing_and_disturbs_nobody(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    wait_for_merging(job, registry)
    worker = worker_of(job)
    stop_outside_a_transaction(worker, registry)
    try:
        age_leases(registry)
        with pytest.raises(JobLost):
            job.result(timeout=60, progress=False)
        successor = Merger(registry).save(customized)  # takes over what is there
    finally:
        os.kill(worker, signal.SIGCONT)
    complete = successor.result(progress=False)
    until(lambda: job.state == "lost" and not Path(f"/proc/{worker}").exists())  # asking reaps it

    assert list(registry.complete_models()) == [complete]
    registry.verify(complete)
    assert list((registry.root / ".staging").iterdir()) == []


def test_a_storage_of_one_process_cannot_run_jobs(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models", storage=MemoryStorage())
    registry.add_base_model("llama-tiny", tiny_base)
    customized = registry.register(tiny_adapter, train_name="support")
    with pytest.raises(JobFailed, match="pickle"):
        Merger(registry).save(customized)
    assert list(registry.jobs()) == []


def test_a_deleted_model_cannot_be_saved(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    registry.delete(customized)
    with pytest.raises(NotFoundError):
        Merger(registry).save(customized)


def test_a_job_shows_how_far_it_is(
    slow: tuple[ModelRegistry, CustomizedModel],
) -> None:
    registry, customized = slow
    job = Merger(registry).save(customized)
    seen = set()
    while job.state in ("queued", "running"):
        seen.add(job.progress)
        time.sleep(0.05)
    assert max(done for _, done, _ in seen) > 0
    assert all(done <= total for _, done, total in seen)
    assert "succeeded" in job._repr_html_()
