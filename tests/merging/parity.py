"""What PEFT and transformers make of an adapter and its base, compared with our merge."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

from customized_models.adapters.intake import take_in
from customized_models.files.safetensors import INDEX, SINGLE, Checkpoint
from customized_models.merging import MergeExecution, open_merge
from customized_models.merging.writing import write_checkpoint


def opened(base: Path, adapter: Path, scratch: Path) -> MergeExecution:
    """The merge of a checked copy of `adapter`."""
    copy = scratch / "copy"
    copy.mkdir(parents=True)
    return open_merge(Checkpoint.open(base), take_in(adapter, copy).adapter)


def reference(base: Path, adapter: Path, directory: Path, *, aligned: bool) -> Checkpoint:
    """What PEFT and transformers make of it, whole in memory.

    `aligned`: weights are moved from where they lie in the mapped file, which may be at any
    address: a product of a matrix with a vector has other bits there.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    for parameter in model.parameters() if aligned else ():
        parameter.data = parameter.data.clone()
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(directory, max_shard_size="1GB")
    return Checkpoint.open(directory)


def assert_parity(
    base: Path, adapter: Path, scratch: Path, changed: int, *, aligned: bool = False
) -> MergeExecution:
    """Changed tensors have PEFT's bits and dtype, all others the base's bytes and dtype."""
    expected = reference(base, adapter, scratch / "reference", aligned=aligned)
    original = Checkpoint.open(base)
    merge = opened(base, adapter, scratch)
    out = scratch / "out"
    out.mkdir()
    write_checkpoint(merge, original, out, lambda *_: None, merge.changed)
    merge.finish()
    written = Checkpoint.open(out)
    assert len(merge.changed) == changed
    assert_only_changed_tensors_differ(merge, original, written)
    for name in merge.changed:
        assert written.infos[name].dtype == expected.infos[name].dtype
        assert same_bits(written.read(name), expected.read(name)), name
    return merge


def assert_only_changed_tensors_differ(
    merge: MergeExecution, original: Checkpoint, written: Checkpoint
) -> None:
    """All else is the base's: files, order, metadata and bytes; new tensors come last."""
    assert [*written.shards] == [*original.shards]
    new = [name for name in merge.infos if name not in original.infos]
    assert merge.changed >= {*new}
    for file, header in original.shards.items():
        last = new if file == list(original.shards)[-1] else []
        assert [*written.shards[file].tensors] == [*header.tensors, *last]
        assert written.shards[file].metadata == header.metadata
    for name, before in original.infos.items():
        same = same_bits(written.read(name), original.read(name))
        assert same or name in merge.changed, name
        assert written.infos[name].dtype == before.dtype or name in merge.changed, name


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether dtype, shape and bytes are the same, NaNs and signs of zeros included."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    one, other = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)


@frozen
class Reference:
    """The merged model in memory.

    `tensors`: its state dict, with tied tensors under each of their names. `changed`: the names of
    those that are not the base's; of tied ones only the name that the others are tied to.
    """

    tensors: Mapping[str, torch.Tensor]
    changed: frozenset[str]


def merged_by_peft(
    base: Path, adapter: Path, auto_class: Any, *, aligned: bool = False, **options: Any
) -> Reference:
    """What `auto_class` and PEFT make of base and adapter; `options` are for `from_pretrained`.

    `aligned`: see `reference`.
    """
    from peft import PeftModel

    model = auto_class.from_pretrained(base, dtype="auto", **options)
    for parameter in model.parameters() if aligned else ():
        parameter.data = parameter.data.clone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ties = dict(model.all_tied_weights_keys)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    tensors = merged.state_dict()
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in before.items()}
    alike = {n for n, source in ties.items() if tensors[n].data_ptr() == tensors[source].data_ptr()}
    changed = {n for n, tensor in tensors.items() if not same_bits(tensor, before[n])}
    return Reference(tensors, frozenset(changed - alike))


def assert_loads_as(directory: Path, tensors: Mapping[str, torch.Tensor], auto_class: Any) -> None:
    """`directory` has everything that `auto_class` looks for, and it has the bits of `tensors`."""
    model, info = auto_class.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    loaded = model.state_dict()
    assert loaded.keys() == tensors.keys()
    assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in tensors.items()}
    assert [n for n, t in loaded.items() if not same_bits(t, tensors[n])] == []


def write_merged(merge: MergeExecution, base: Path, directory: Path) -> Path:
    """The merged model, with its configuration, in a new directory."""
    directory.mkdir()
    for path in base.glob("*.json"):
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / INDEX).unlink(missing_ok=True)
    config = json.loads((base / "config.json").read_text()) | dict(merge.config)
    for key in [key for key, value in merge.config.items() if value is None]:
        del config[key]
    (directory / "config.json").write_text(json.dumps(config))
    write_checkpoint(merge, Checkpoint.open(base), directory, lambda *_: None, merge.changed)
    merge.finish()
    return directory


def written(base: Path, adapter: Path, scratch: Path) -> Path:
    """What merging the two gives, as a model directory."""
    return write_merged(opened(base, adapter, scratch), base, scratch / "out")


def assert_architecture_parity(
    base: Path,
    adapter: Path,
    scratch: Path,
    auto_class: Any,
    touches: str,
    *,
    aligned: bool = False,
    **options: Any,
) -> MergeExecution:
    """What we write loads as the model that PEFT merges, and all else in it is the base's.

    `touches`: a pattern for the names in memory of exactly those tensors that must change.
    """
    expected = merged_by_peft(base, adapter, auto_class, aligned=aligned, **options)
    wrong = expected.changed ^ {name for name in expected.tensors if re.search(touches, name)}
    assert not wrong, sorted(wrong)
    assert expected.changed
    original = Checkpoint.open(base)
    merge = opened(base, adapter, scratch)
    out = write_merged(merge, base, scratch / "out")
    written = Checkpoint.open(out)
    assert_only_changed_tensors_differ(merge, original, written)
    if SINGLE not in written.shards:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {name: info.file for name, info in written.infos.items()}
        assert index["metadata"]["total_size"] == sum(i.size for i in written.infos.values())
    assert_loads_as(out, expected.tensors, auto_class)
    return merge


def tiny_model(directory: Path, config: Any, dtype: str, shard_size: str = "20KB") -> Path:
    """A random causal language model whose biases and norms are not all alike either."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_size)
    return directory
