"""Trainings on several ranks: the weights are gathered, and the first rank writes."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from customized_models import ModelRegistry

SCRIPT = Path(__file__).parent / "ranks.py"


@pytest.mark.parametrize("kind", ["replicated", "adapter", "full"])
def test_two_ranks_register_one_model(kind: str, registry: ModelRegistry, tiny_base: Path) -> None:
    """Replicated by DistributedDataParallel; an adapter and a full model sharded by FSDP."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(registry.root), str(tiny_base), rank, port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(err for _, err in outputs)

    (model,) = registry.customized_models()
    (first, total), (other, same_total) = (out.split() for out, _ in outputs)
    assert (first, other) == (model.name, "nothing")
    assert total == same_total
    assert model.kind == ("checkpoint" if kind == "full" else "adapter")
    assert model.card.evaluation.metrics == {"rank": 0.0}
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    with registry.checkout(model) as directory:
        stored = load_file(directory / file)
    assert f"{sum(float(t.double().sum()) for t in stored.values()):.4f}" == f"{float(total):.4f}"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
