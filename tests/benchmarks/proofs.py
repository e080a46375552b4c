"""What is proven of a real fine-tune on each Ollama, in each mode, and what is sent.

    python -m tests.benchmarks.proofs

SmolLM2-135M-Instruct learns a word, as in docs/quickstart.py, in a float32 base, so that
`no_quantization` can be compared token by token. The complete model goes to each version of Ollama
that `tests/servers/build_ollama.py` builds, in every mode, twice: the second time, no weights are
sent. Prints the proofs of the first.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from customized_models import Deployer, DeploymentEnvironment, Merger, ModelRegistry
from customized_models.models import QUANTIZATIONS, CompleteModel
from docs import quickstart
from tests.servers.build_ollama import VERSIONS
from tests.servers.counting_proxy import counting_proxy
from tests.servers.ollama_server import ollama_server

PROOFS = ("content", "template", "greedy")


def fine_tuned(registry: ModelRegistry, scratch: Path) -> CompleteModel:
    """The quickstart's model, trained and saved in float32."""
    base = scratch / "base"
    original = quickstart.base_model_directory()
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).save_pretrained(base)
    AutoTokenizer.from_pretrained(original).save_pretrained(base)
    registry.add_base_model(
        quickstart.TECHNICAL_NAME, base, deployment_template=quickstart.TEMPLATE
    )
    customized = quickstart.train(registry, base, "domikano", scratch / "training")
    return Merger(registry).save(customized).result(progress=False)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        registry = ModelRegistry(scratch / "models")
        complete = fine_tuned(registry, scratch)
        deployer = Deployer(registry)
        for version in VERSIONS:
            with (
                ollama_server(version, scratch / version) as server,
                counting_proxy(server.address, server.port) as proxy,
            ):
                registry.add_environment(
                    DeploymentEnvironment(f"v{version}", "ollama", proxy.address, proxy.port)
                )
                for mode in QUANTIZATIONS:
                    print(f"\nOllama {version}, {mode}")
                    for turn in range(2):
                        proxy.requests.clear()
                        live = deployer.deploy(
                            complete,
                            environment=f"v{version}",
                            quantization=mode,
                            served_name=f"{mode}-{turn}".lower(),
                            proofs=PROOFS,
                            accept_failed=("greedy",),
                        ).result(progress=False)
                        sent = sum(
                            (method, path.startswith("/api/blobs")) == ("POST", True)
                            for method, path in proxy.requests
                        )
                        print(f"  deployment {turn + 1}: {sent} blobs sent")
                        for proof in live.proofs if turn == 0 else ():
                            print(f"  {proof.name:9} {proof.passed!s:5} {proof.compared}")
                            print(f"  {'':15} {proof.found}")
                    print("  answer:", quickstart.ask(live))


if __name__ == "__main__":
    main()
