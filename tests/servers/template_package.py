"""Ollama's own template package, asked through a program that `build_ollama` builds."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from attrs import frozen

from customized_models.deploying.templates import Message

from . import build_ollama


@frozen
class TemplatePackage:
    """A running program; it renders as long as the block lasts that it was made for."""

    requests: IO[bytes]
    answers: IO[bytes]

    def __call__(
        self, template: str, messages: Sequence[Message], think: bool | None = None
    ) -> tuple[str, str]:
        """("text", what is written), ("parse", an error) or ("execute", an error)."""
        request = {"template": template, "messages": list(messages), "think": think}
        self.requests.write(json.dumps(request).encode() + b"\n")
        self.requests.flush()
        ((stage, text),) = json.loads(self.answers.readline()).items()
        return stage, text


@contextmanager
def template_package(version: str) -> Iterator[TemplatePackage]:
    """That version's template package."""
    with subprocess.Popen(
        [build_ollama.renderer(version)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield TemplatePackage(process.stdin, process.stdout)
        process.stdin.close()
