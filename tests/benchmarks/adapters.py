"""What many adapters beside one base take at a router of llama.cpp's: disk, memory, time.

    python -m tests.benchmarks.adapters [how many, 100]

The base is SmolLM2-135M-Instruct in q8_0; the adapters are LoRA of rank 16 on all its linear
layers, with random weights. Each is deployed by itself, with its proof of the template. The router
keeps four loaded; what each of their processes has for itself is compared with what they share.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from customized_models import Deployer, DeploymentEnvironment, ModelRegistry
from customized_models.backends.llama_server import LlamaServerOptions
from customized_models.testing import tiny_lora
from customized_models.testing.backends import tokens_generated
from docs import quickstart
from tests.servers.llama_router import llama_router


def main(adapters: int) -> None:
    base = quickstart.base_model_directory()
    options = LlamaServerOptions(beside_base=True, context=256)
    with tempfile.TemporaryDirectory() as directory, llama_router(Path(directory, "r")) as router:
        registry = ModelRegistry(Path(directory, "models"))
        registry.add_base_model(quickstart.TECHNICAL_NAME, base, progress=False)
        settings = {"models_directory": str(router.models)}
        registry.add_environment(
            DeploymentEnvironment(
                "router", "llama_server", "127.0.0.1", router.port, settings=settings
            )
        )
        deployer, seconds, live = Deployer(registry), [], []
        for seed in range(adapters):
            adapter = tiny_lora(
                Path(directory, f"a{seed}"), base, seed=seed, r=16, target_modules="all-linear"
            )
            customized = registry.register(
                adapter, train_name=f"a{seed}", base_model=quickstart.TECHNICAL_NAME
            )
            start = time.monotonic()
            job = deployer.deploy(
                customized, quantization="q8_0", served_name=f"a{seed}", options=options
            )
            live.append(job.result(progress=False))
            seconds.append(time.monotonic() - start)
        for model in live[-4:]:
            assert tokens_generated(model.served) > 0
        sizes = {
            kind: [path.stat().st_size for path in router.models.glob(f"*.{kind}")]
            for kind in ("gguf", "lora")
        }
        print(f"{len(sizes['gguf'])} file of the base, {sum(sizes['gguf']) / 1e6:.1f} MB")
        print(f"{len(sizes['lora'])} files of adapters, {sum(sizes['lora']) / 1e6:.1f} MB")
        print(f"a deployment takes {statistics.median(seconds):.2f} s (the first {seconds[0]:.2f})")
        for process in router.memory():
            print("a process has", {what: f"{size / 1e6:.0f} MB" for what, size in process.items()})
        for model in live:
            deployer.undeploy(model)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
