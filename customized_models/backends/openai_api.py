"""What servers of OpenAI's API are asked for alike."""

from __future__ import annotations

from typing import Any

from ..errors import ServerAnswerError
from .http import JSONServer

ANSWER_SECONDS = 600.0  # a few tokens of a large model on a slow processor


def cards(server: JSONServer) -> dict[str, dict[str, Any]]:
    """What the server lists, by the names that it goes by there."""
    models = server.get("/v1/models").get("data")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise ServerAnswerError(f"the server at {server.url} does not list models")
    return {str(model.get("id")): model for model in models}


def base_card(server: JSONServer) -> dict[str, Any]:
    """What the server lists of its base model."""
    for card in cards(server).values():
        if card.get("parent") is None:
            return card
    raise ServerAnswerError(f"the server at {server.url} lists no base model")
