"""Deployment templates: made from chat templates, checked before they are sent, proven when live.

A deployment template is an Ollama Go template with the strings that end an answer. What it must
write is what the model was trained with: its chat template, rendered by transformers.
"""

from .chat_template import ChatTemplate
from .conversations import BEGINNING, CONVERSATIONS, FURTHER, REQUIRED, Conversation, Message
from .end_tokens import EndTokens
from .fitness import check_completion_template, check_template, parsed_template
from .live import Server, Tokenizer, prove_on_llama_cpp, prove_on_ollama
from .proofs import Comparison, Difference, TemplateProof
from .proposing import ProposedTemplate, propose, propose_deployment_template

__all__ = [
    "BEGINNING",
    "CONVERSATIONS",
    "FURTHER",
    "REQUIRED",
    "ChatTemplate",
    "Comparison",
    "Conversation",
    "Difference",
    "EndTokens",
    "Message",
    "ProposedTemplate",
    "Server",
    "TemplateProof",
    "Tokenizer",
    "check_completion_template",
    "check_template",
    "parsed_template",
    "propose",
    "propose_deployment_template",
    "prove_on_llama_cpp",
    "prove_on_ollama",
]
