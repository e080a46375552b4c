"""A tiny adapter beside its base, as something to deploy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import frozen

from customized_models import gguf as _gguf
from customized_models.adapters.intake import CONFIG, Adapter
from customized_models.backends import AdapterBesideBase
from customized_models.base_models import hash_base_model
from customized_models.files.digests import SHA256, hash_file
from customized_models.files.reading import json_object
from customized_models.files.safetensors import Checkpoint, ModelSource
from customized_models.gguf import GGUFFile
from customized_models.models import DeploymentTemplate, Progress, Quantization

from .artifact import TEMPLATE, ignore


@frozen
class AdapterArtifact:
    """An adapter in one directory, and its base in another; files are made in `scratch`."""

    adapter_directory: Path
    base_directory: Path
    scratch: Path
    name: str = "tiny_support_20260101_0123_d_abcd_no_quantization"
    architecture: str = "LlamaForCausalLM"
    base: str = "llama-tiny"
    quantization: Quantization = "no_quantization"
    template: DeploymentTemplate | None = TEMPLATE
    finished: bool = False

    @property
    def adapter_config(self) -> Mapping[str, Any]:
        return json_object(self.adapter_directory / CONFIG)

    @property
    def digest(self) -> str:
        """Of the adapter's weights."""
        return hash_file(self.adapter_directory / "adapter_model.safetensors", SHA256).digest

    def check_gguf(self) -> None:
        """It can."""

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        raise AssertionError("it was asked for a merged file")

    def base_gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        base = self.base_directory
        files = {path.name: path for path in base.iterdir() if path.suffix != ".safetensors"}
        source = ModelSource(files, Checkpoint.open(base))
        plan = _gguf.plan(source, self.quantization, name="tiny", chat_template=chat_template)
        return plan.write(self.scratch / f"{chat_template}.gguf", progress)

    def directory(self) -> Any:
        raise AssertionError("it has no directory")

    @contextmanager
    def adapter(self) -> Iterator[AdapterBesideBase]:
        Adapter.open(self.adapter_directory)
        digest = hash_base_model(self.base_directory, ignore).digest
        yield AdapterBesideBase(self.adapter_directory, self.base_directory, digest)
