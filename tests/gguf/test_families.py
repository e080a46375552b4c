"""Every family's files against those of upstream's converter and quantizer: the same bytes."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from customized_models import gguf as _gguf
from customized_models.adapters.intake import Adapter
from customized_models.files.safetensors import Checkpoint, ModelSource
from customized_models.gguf.family import registered
from customized_models.merging import open_merge
from customized_models.models import QUANTIZATIONS, no_progress
from customized_models.testing.tiny_models import tiny_adapter
from tests.gguf.models import MODELS, sentencepiece, tiny_model
from tests.gguf.models import gemma as gemma_tokenizer
from tests.servers.llama_cpp_oracle import Oracle

pytestmark = pytest.mark.slow

OUTTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
LISTED = (sentencepiece, gemma_tokenizer)  # tokenizers whose pre-tokenizer has no name to find


def source(directory: Path) -> ModelSource:
    files = {p.name: p for p in directory.iterdir() if ".safetensors" not in p.name}
    return ModelSource(files, Checkpoint.open(directory))


def ours(directory: Path, path: Path, mode: str) -> Path:
    plan = _gguf.plan(source(directory), mode, name="tiny", chat_template=True)
    plan.write(path, no_progress)
    return path


def differences(a: Path, b: Path) -> list[str]:
    """What two files differ in, for a message."""
    one, two = (gguf.GGUFReader(path) for path in (a, b))
    found = []
    fields = [
        {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
        for reader in (one, two)
    ]
    for key in fields[0].keys() | fields[1].keys():
        if fields[0].get(key) != fields[1].get(key):
            found.append(f"{key}: {str(fields[0].get(key))[:80]} != {str(fields[1].get(key))[:80]}")
    if list(fields[0]) != list(fields[1]) and not found:
        found.append(f"order of keys: {list(fields[0])} != {list(fields[1])}")
    tensors = [{t.name: t for t in reader.tensors} for reader in (one, two)]
    if list(tensors[0]) != list(tensors[1]):
        found.append(f"tensors: {list(tensors[0])} != {list(tensors[1])}")
    for name in tensors[0].keys() & tensors[1].keys():
        x, y = tensors[0][name], tensors[1][name]
        if x.tensor_type != y.tensor_type or x.data.tobytes() != y.data.tobytes():
            found.append(f"{name}: {x.tensor_type.name} {x.shape} / {y.tensor_type.name} {y.shape}")
    return found


@pytest.mark.parametrize("dtype", OUTTYPES)
@pytest.mark.parametrize("name", [name for name, tiny in MODELS.items() if tiny.upstream])
def test_files_are_byte_for_byte_those_of_upstream(
    tmp_path: Path, llama_cpp: Oracle, name: str, dtype: str
) -> None:
    tiny = MODELS[name]
    # Upstream reads parts of a name without spaces into other keys than `general.name`.
    directory = tmp_path / "tiny model"
    tiny_model(directory, tiny, dtype, shard_size="1GB" if dtype == "float16" else "500KB")
    pre = None if tiny.tokenizer in LISTED else "smollm"
    plain = llama_cpp.convert(
        directory, tmp_path / "upstream.gguf", OUTTYPES[dtype], name="tiny", pre=pre
    )
    for mode in QUANTIZATIONS:
        theirs = plain
        if mode != "no_quantization":
            theirs = llama_cpp.quantize(plain, tmp_path / "quantized.gguf", mode)
        mine = ours(directory, tmp_path / "ours.gguf", mode)
        if mine.read_bytes() != theirs.read_bytes():
            pytest.fail(f"{mode}: " + "\n".join(differences(mine, theirs)[:20]))


def test_every_registered_family_has_a_tiny_model() -> None:
    import transformers

    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    made = {mapping[getattr(transformers, tiny.config)].__name__ for tiny in MODELS.values()}
    seeing = {name for name in registered() if name.endswith("ForConditionalGeneration")}
    assert set(registered()) - seeing == made


ALL = {"target_modules": "all-linear"}
EXPERTS = {
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
LORA = {
    "llama": ALL,
    "mixtral": EXPERTS,
    "qwen3moe": EXPERTS,
    "gpt_oss": EXPERTS,
    "gemma2": ALL,
    "phi3": ALL,
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "granitemoeshared": {"target_modules": ["q_proj", "v_proj", "input_linear"]},
    "bloom": {"target_modules": ["query_key_value", "dense_h_to_4h"]},
}


@pytest.mark.parametrize("name", LORA)
def test_a_merge_is_converted_as_it_runs_to_what_upstream_makes_of_a_merged_model(
    tmp_path: Path, llama_cpp: Oracle, name: str
) -> None:
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM

    tiny = MODELS[name]
    base = tiny_model(tmp_path / "base", tiny, "bfloat16")
    config = LoraConfig(r=4, task_type="CAUSAL_LM", lora_alpha=16, **LORA[name])
    adapter = tiny_adapter(tmp_path / "adapter", base, config)
    merged = tmp_path / "merged model"
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
    tiny.tokenizer(merged)
    pre = None if tiny.tokenizer in LISTED else "smollm"
    plain = llama_cpp.convert(merged, tmp_path / "upstream.gguf", "bf16", name="tiny", pre=pre)
    files = {p.name: p for p in base.iterdir() if ".safetensors" not in p.name}
    for mode in ("no_quantization", "q4_K_M"):
        theirs = plain
        if mode != "no_quantization":
            theirs = llama_cpp.quantize(plain, tmp_path / "quantized.gguf", mode)
        merge = open_merge(Checkpoint.open(base), Adapter.open(adapter))
        plan = _gguf.plan(ModelSource(files, merge), mode, name="tiny", chat_template=True)
        plan.write(tmp_path / "ours.gguf", no_progress)
        merge.finish()
        if (tmp_path / "ours.gguf").read_bytes() != theirs.read_bytes():
            found = differences(tmp_path / "ours.gguf", theirs)
            pytest.fail(f"{mode}: " + "\n".join(found[:20]))
