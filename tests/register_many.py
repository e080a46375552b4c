"""Registers fifty adapters that differ in one weight: `register_many.py ROOT ADAPTER NUMBER`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from customized_models import ModelRegistry


def main(root: str, adapter: str, number: str) -> None:
    registry = ModelRegistry(root)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "adapter")
        shutil.copytree(adapter, copy)
        weights = copy / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        for n in range(50):
            data[-4:-2] = (50 * int(number) + n).to_bytes(2, "little")
            weights.write_bytes(data)
            registry.register(copy, train_name=f"worker-{number}", base_model="llama-tiny")


if __name__ == "__main__":
    main(*sys.argv[1:])
