"""One rank of a training on several: run by `test_ranks`, once for each.

python ranks.py KIND REGISTRY BASE RANK PORT
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from customized_models.training import register_from_model


def main(kind: str, registry: str, base: str, rank: str, port: str) -> None:
    os.environ |= {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if kind != "full":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    if kind == "replicated":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.get_submodule(
            "base_model.model.model" if kind == "adapter" else "model"
        ).layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    ids = torch.tensor([[1, 5 + int(rank), 7, 9, 2]])
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    registered = register_from_model(
        registry, model, train_name=kind, base_model="llama-tiny", evaluation={"rank": int(rank)}
    )
    print("nothing" if registered is None else registered.name)
    total = sum(whole(p).double().sum() for p in trained)
    print(f"{float(total):.6f}")
    distributed.barrier()
    distributed.destroy_process_group()


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's values on all ranks together."""
    gather = getattr(parameter, "full_tensor", None)
    return (gather() if gather else parameter).detach()


if __name__ == "__main__":
    main(*sys.argv[1:])
