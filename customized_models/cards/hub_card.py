"""A model's card as the Hub reads it: with its task, and what was measured as results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models import BaseModel, CompleteModel, CustomizedModel
from ..naming import is_hub_id
from .readme import render_complete, render_customized

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "text2text-generation",
}
"""The Hub's tasks by PEFT's."""

_ARCHITECTURES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
"""The Hub's tasks by the end of a base model's class."""

_EVALUATION = "eval_"  # how a Trainer's metrics of an evaluation begin


def hub_card(model: CustomizedModel | CompleteModel, base: BaseModel) -> str:
    """The `README.md` of a model for the Hub.

    Its results are the metrics of evaluations, if the card names the dataset on the Hub; a metric
    without a dataset says nothing there, and stays in the card's own part.
    """
    from huggingface_hub import ModelCard

    if isinstance(model, CompleteModel):
        text = render_complete(model, base)
    else:
        text = render_customized(model, base)
    task = _task(model, base)
    if task is None:
        return text
    card = ModelCard(text)
    data: Any = card.data  # a ModelCardData, which the class does not say
    data.pipeline_tag = task
    if results := _results(model, task):
        data.model_name, data.eval_results = model.name, results
    return str(card)


def _task(model: CustomizedModel | CompleteModel, base: BaseModel) -> str | None:
    stated = _TASKS.get(str(model.card.training.peft.get("task_type")))
    ends = (task for end, task in _ARCHITECTURES.items() if base.card.architecture.endswith(end))
    return stated or next(ends, None)


def _results(model: CustomizedModel | CompleteModel, task: str) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    datasets = [name for name in model.card.training.datasets if is_hub_id(name)]
    if len(datasets) != 1:  # it is not known which one was measured with
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0],
            dataset_name=datasets[0],
            metric_type=name.removeprefix(_EVALUATION),
            metric_value=value,
        )
        for name, value in model.card.evaluation.metrics.items()
        if name.startswith(_EVALUATION)
    ]
