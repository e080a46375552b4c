"""A tiny model as something to deploy, and the shortest way to deploy it."""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

from attrs import frozen

from customized_models import gguf as _gguf
from customized_models.backends import AdapterBesideBase, Backend
from customized_models.files.safetensors import Checkpoint, ModelSource
from customized_models.gguf import GGUFFile
from customized_models.models import (
    DeploymentEnvironment,
    DeploymentTemplate,
    Progress,
    Quantization,
    Served,
)
from customized_models.testing import deployed, tiny_llama

from .counting_proxy import CountingProxy
from .ollama_server import OllamaServer
from .stand_in import StandIn

# The white space at its end is part of it.
TEMPLATE = DeploymentTemplate(
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n \n",
    stop=("<|im_end|>", "<|im_start|>"),
)


@frozen
class FileArtifact:
    """An artifact whose two files, without and with a chat template, are there already."""

    files: tuple[GGUFFile, GGUFFile]
    name: str = "tiny_support_20260101_0123_d_abcd_no_quantization"
    architecture: str = "LlamaForCausalLM"
    base: str = "llama-tiny"
    adapter_config: None = None
    quantization: Quantization = "no_quantization"
    template: DeploymentTemplate | None = TEMPLATE
    finished: bool = False

    def check_gguf(self) -> None:
        """It has them."""

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        return self.files[chat_template]

    def base_gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        raise AssertionError("it has no base")

    def directory(self) -> AbstractContextManager[Path]:
        raise AssertionError("it has no directory")

    def adapter(self) -> AbstractContextManager[AdapterBesideBase]:
        raise AssertionError("it has no adapter")


def tiny_artifact(directory: Path, **options: object) -> FileArtifact:
    """A tiny Llama's, with its files under `directory`; `options`: see `tiny_llama`."""
    model = tiny_llama(directory / "model", **options)
    small = {path.name: path for path in model.iterdir() if path.suffix != ".safetensors"}
    source = ModelSource(small, Checkpoint.open(model))

    def written(chat_template: bool) -> GGUFFile:
        plan = _gguf.plan(source, "no_quantization", name="tiny", chat_template=chat_template)
        return plan.write(directory / f"{chat_template}.gguf", ignore)

    return FileArtifact((written(False), written(True)))


def no_gguf(directory: Path) -> GGUFFile:
    """A file that no server can load."""
    path = directory / "no.gguf"
    path.write_bytes(b"no GGUF" * 100)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return GGUFFile(path, path.stat().st_size, f"sha256:{digest}")


def ignore(phase: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def pushed(backend: Backend, artifact: FileArtifact, name: str, **options: object) -> Served:
    """`artifact` deployed under `name`."""
    return deployed(backend, artifact, name, backend.options(**options))


def at(
    server: OllamaServer | CountingProxy | StandIn,
    *,
    timeout: float = 20,
    token_env: str | None = None,
) -> DeploymentEnvironment:
    """The environment whose Ollama `server` is, in its own or another's place."""
    return DeploymentEnvironment(
        "here",
        "ollama",
        "127.0.0.1",
        server.port,
        token_env=token_env,
        settings={"timeout": timeout},
    )
