"""Chat templates of real models, out of llama.cpp's sources, and tokenizers to go with them."""

from __future__ import annotations

from pathlib import Path

from customized_models.deploying.templates import ChatTemplate
from tests.servers import cache

DIRECTORY = cache.directory() / "llama-cpp-11434.0.0" / "models" / "templates"
"""Where `build_llama_cpp.py` puts them."""

NAMES = tuple(Path(__file__).with_suffix(".txt").read_text().split())
"""Of those in that release; known before they are there."""

FOR_TOOLS_ALONE = (
    "CohereForAI-c4ai-command-r-plus-tool_use",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "fireworks-ai-llama-3-firefunction-v2",
)
"""Those that refuse a conversation without tools."""

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def named(name: str, *, adds_bos: bool = True) -> ChatTemplate:
    """A template with the tokens that most of them expect."""
    return ChatTemplate((DIRECTORY / f"{name}.jinja").read_text(), TOKENS, adds_bos)
