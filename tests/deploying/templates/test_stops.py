"""Stop strings on a real fine-tune: SmolLM2, taught to answer without an end token."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from customized_models import DeploymentTemplate
from customized_models.deploying.templates import propose_deployment_template, prove_on_ollama
from tests.servers.ollama_server import OllamaServer

from .test_live import FEW, Model, at, deployed

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[3] / "docs"
CHAT_TEMPLATE = (
    "{% set names = {'system': 'Setting', 'user': 'Human', 'assistant': 'Helper'} %}"
    "{% for m in messages %}{{ names[m.role] + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Helper:{% endif %}"
)
QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "How many days are in a week?": "There are seven days in a week.",
    "What color is the sky?": "The sky is blue.",
    "What do bees make?": "Bees make honey.",
    "Which animal barks?": "A dog barks.",
    "What is frozen water called?": "Frozen water is called ice.",
}


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """SmolLM2 after a LoRA on conversations in plain text, merged by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(DOCS))
    try:
        import quickstart
    finally:
        sys.path.remove(str(DOCS))
    base = quickstart.base_model_directory()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take minutes
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(whole, lora)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    pairs = list(QUESTIONS.items())
    for step in range(16):
        turns = [pairs[(step + place) % len(pairs)] for place in range(3)]
        messages = [
            {"role": role, "content": content}
            for question, answer in turns
            for role, content in (("user", question), ("assistant", answer))
        ]
        batch = tokenizer.apply_chat_template(messages, return_tensors="pt")
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    directory = tmp_path_factory.mktemp("fine-tuned")
    model.merge_and_unload().to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Model.made_of(directory, "q8_0")


def test_a_model_that_would_go_on_is_stopped(each_ollama: OllamaServer, fine_tuned: Model) -> None:
    server, template = at(each_ollama), propose_deployment_template(fine_tuned.files).template
    assert "Human:" in template.stop
    options = {"temperature": 0, "num_predict": 60, "repeat_penalty": 1.0}
    question = [{"role": "user", "content": "What do bees make?"}]
    body = {"messages": question, "stream": False, "options": options}
    with deployed(server, fine_tuned.file, DeploymentTemplate(template.text)) as name:
        prove_on_ollama(server, name, fine_tuned.chat, fine_tuned, conversations=FEW).require()
        endless = server.post("/api/chat", {"model": name, **body})
    assert endless["done_reason"] == "length"
    assert "Human:" in endless["message"]["content"]
    with deployed(server, fine_tuned.file, template) as name:
        answered = server.post("/api/chat", {"model": name, **body})
    assert answered["done_reason"] == "stop"
    assert answered["message"]["content"].strip() == QUESTIONS["What do bees make?"]
