"""What PEFT and transformers make of an adapter and its base, compared with our merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from customized_models._adapters import Adapter, copy_adapter
from customized_models._checkpoints import Checkpoint
from customized_models._merging import Merge, open_merge
from customized_models._writer import write_checkpoint


def opened(base: Path, adapter: Path, scratch: Path) -> Merge:
    """The merge of a checked copy of `adapter`."""
    copy = scratch / "copy"
    copy.mkdir(parents=True)
    copy_adapter(adapter, copy)
    return open_merge(Checkpoint.open(base), Adapter.open(copy))


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
) -> Merge:
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
    assert [*written.shards] == [*original.shards]
    new = [name for name in merge.infos if name not in original.infos]
    for file, header in original.shards.items():
        last = new if file == list(original.shards)[-1] else []
        assert [*written.shards[file].tensors] == [*header.tensors, *last]
        assert written.shards[file].metadata == header.metadata
    for name, info in written.infos.items():
        bits = written.read(name)
        before = original.read(name) if name in original.infos else None
        if name in merge.changed:
            assert info.dtype == expected.infos[name].dtype
            assert torch.equal(bits, expected.read(name))
            assert before is None or not torch.equal(bits, before), name
        else:
            assert info.dtype == original.infos[name].dtype
            assert torch.equal(bits.view(torch.uint8), before.view(torch.uint8))
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
