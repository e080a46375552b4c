"""Cards: read from real models' files and finished trainings, rendered, and read back equal."""

from __future__ import annotations

import json
import math
import os
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from attrs import evolve
from huggingface_hub import ModelCard as HubCard
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_models.cards.reading import (
    evaluation_summary,
    peft_settings,
    read_base_card,
    training_arguments,
    training_facts,
)
from customized_models.cards.readme import (
    parse_card,
    readme_header,
    render,
    storable_card,
)
from customized_models.errors import MalformedError, UnsafeFileError
from customized_models.files.safetensors import Checkpoint
from customized_models.models import (
    BaseModel,
    BaseModelCard,
    CompleteModel,
    CustomizedModel,
    EvaluationSummary,
    ModelCard,
    TrainingConfiguration,
)
from customized_models.testing import tiny_llama

DAY = datetime(2026, 1, 2, tzinfo=UTC)
BASE = BaseModel(
    technical_name="llama-tiny",
    model_name="tests/llama-tiny",
    digest="sha256:1",
    created=DAY,
    card=BaseModelCard("LlamaForCausalLM", 10, "BF16", 20, license="apache-2.0"),
)


def customized(card: ModelCard) -> CustomizedModel:
    return CustomizedModel(
        "n_t_20260102_aaaa", "llama-tiny", "t", uuid.UUID(int=1), DAY, "", card=card
    )


def complete(card: ModelCard) -> CompleteModel:
    return CompleteModel(
        name="n_t_20260102_aaaa_s_bbbb",
        customized="n_t_20260102_aaaa",
        base="llama-tiny",
        train_name="t",
        saving_id=uuid.UUID(int=2),
        created=DAY,
        digest="",
        customized_digest="",
        base_digest="",
        card=card,
    )


# Base models


def test_a_base_card_says_what_the_files_say(tiny_base: Path) -> None:
    checkpoint = Checkpoint.open(tiny_base)
    card = read_base_card(tiny_base, checkpoint)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    assert card.architecture == type(model).__name__
    assert card.parameters == model.num_parameters()
    assert card.dtype == "BF16"
    assert (card.context_length, card.vocabulary_size) == (512, 320)
    assert card.generation["temperature"] == 0.7
    assert card.chat_template
    assert card.size == sum(path.stat().st_size for path in tiny_base.iterdir())


def test_a_multimodal_base_is_measured_by_its_text_model(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False)
    config = json.loads((base / "config.json").read_text())
    for key in ("max_position_embeddings", "vocab_size"):
        config.setdefault("text_config", {})[key] = config.pop(key)
    (base / "config.json").write_text(json.dumps(config))

    card = read_base_card(base, Checkpoint.open(base))

    assert (card.context_length, card.vocabulary_size) == (512, 320)
    assert not card.chat_template


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# T\n", "apache-2.0"),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# Only prose\n", None),
        ("---\nlicense: [mit, other]\n---\n", None),
        ("---\nlicense: see ../../secret\n---\n", None),
        ("---\nlicense: 'mit\n---\n", None),
        ("---\n- mit\n---\n", None),
        ("---\na: &a [x,x]\nb: &b [*a,*a]\nlicense: mit\n---\n", None),
        ("---\na: &a {x: y}\nb:\n  <<: *a\nlicense: mit\n---\n", None),
        (f"---\na: {'[' * 100_000}\nlicense: mit\n---\n", None),
        (f"---\na: {'1' * 100_000}\nlicense: mit\n---\n", None),
        ("---\na: 9999-99-99\nlicense: mit\n---\n", None),
        ("---\n? {a: b}\n: c\n---\n", None),
        ("---\na: !!python/object/apply:os.getcwd []\nlicense: mit\n---\n", None),
        ("---\n" + "a" * (5 << 20) + "\nlicense: mit\n---\n", None),
    ],
)
def test_a_license_is_one_word_of_a_sound_header(
    tiny_base: Path, tmp_path: Path, readme: str, license: str | None
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        (base / path.name).symlink_to(path)
    (base / "README.md").write_text(readme, newline="")

    assert read_base_card(base, Checkpoint.open(base)).license == license


@pytest.mark.parametrize("architectures", [None, [], "absent"])
def test_a_base_without_an_architecture_is_of_its_type(
    architectures: object, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False)
    config = json.loads((base / "config.json").read_text())
    del config["architectures"]
    stated = {} if architectures == "absent" else {"architectures": architectures}
    (base / "config.json").write_text(json.dumps(config | stated))
    assert read_base_card(base, Checkpoint.open(base)).architecture == "llama"

    (base / "config.json").write_text("{}")
    with pytest.raises(MalformedError, match="neither architectures nor a model_type"):
        read_base_card(base, Checkpoint.open(base))


# Finished trainings

STATE = """{"global_step": 6, "epoch": 1.5, "max_steps": 6, "num_train_epochs": 2,
 "best_metric": NaN, "best_model_checkpoint": "/home/someone/run/checkpoint-6", "log_history": [
 {"step": 2, "epoch": 0.5, "loss": 3.0, "grad_norm": Infinity, "learning_rate": 0.1},
 {"step": 4, "epoch": 1.0, "loss": 2.0},
 {"step": 4, "epoch": 1.0, "eval_loss": 2.5, "eval_accuracy": 0.5, "eval_runtime": 3.0},
 {"step": 6, "epoch": 1.5, "loss": NaN},
 {"step": 6, "epoch": 1.5, "eval_loss": 2.25, "eval_perplexity": 1e999},
 {"step": 6, "epoch": 1.5, "train_loss": 2.5, "train_runtime": 9.0, "total_flos": 1e9}]}"""


def test_a_finished_directory_tells_its_training(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(STATE)
    (tmp_path / "all_results.json").write_text('{"eval_loss": 2.0, "eval_f1": 0.25, "epoch": 2.0}')
    (tmp_path / "README.md").write_text("---\ndatasets: [org/data, own, ../etc]\n---\n")

    card = training_facts(tmp_path, {"peft_type": "LORA", "r": 4, "use_rslora": True})

    assert card.training == TrainingConfiguration(
        peft={"method": "LoRA, rsLoRA", "peft_type": "LORA", "r": 4, "use_rslora": True},
        arguments={"max_steps": 6, "num_train_epochs": 2},
        datasets=("org/data", "own"),
    )
    assert card.evaluation == EvaluationSummary(
        metrics={"eval_accuracy": 0.5, "eval_f1": 0.25, "eval_loss": 2.0, "train_loss": 2.5},
        best_metric=None,
        steps=6,
        epochs=1.5,
        first_loss=3.0,
        last_loss=None,
        log_entries=3,
    )


def test_a_directory_that_says_nothing_has_an_empty_evaluation(tmp_path: Path) -> None:
    card = training_facts(tmp_path, {"peft_type": "IA3"})
    assert card == ModelCard(TrainingConfiguration({"method": "IA3", "peft_type": "IA3"}))


def test_a_pickle_beside_the_adapter_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "training_args.bin")  # opening it would block for ever
    assert training_facts(tmp_path, {"peft_type": "LORA"}).evaluation == EvaluationSummary()


@pytest.mark.parametrize("text", ["", "[1]", '{"a": ', "[" * 100_000, '{"a": "\\ud800"}\xff'])
def test_a_broken_log_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "trainer_state.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(MalformedError, match=r"trainer_state\.json"):
        training_facts(tmp_path, {})


def test_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "trainer_state.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UnsafeFileError):
        training_facts(tmp_path, {})


def test_paths_and_what_is_off_stay_out_of_the_peft_settings() -> None:
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "/home/someone/models/base",
        "corda_config": {"cache_file": "/home/someone/cache"},
        "target_modules": "all-linear",
        "modules_to_save": ["lm_head", "embed_tokens"],
        "use_dora": False,
        "rank_pattern": {},
        "lora_alpha": 16,
    }
    assert peft_settings(config) == {
        "method": "LoRA",
        "peft_type": "LORA",
        "target_modules": "all-linear",
        "modules_to_save": ["embed_tokens", "lm_head"],
        "lora_alpha": 16,
    }


def test_trainer_arguments_keep_only_what_bears_on_the_result() -> None:
    kept = training_arguments(
        {
            "learning_rate": 1e-4,
            "optim": "adamw_torch_fused",
            "bf16": True,
            "data_seed": None,
            "max_grad_norm": math.inf,
            "output_dir": "/home/someone/run",
            "logging_dir": "runs/somehost",
            "hub_token": "secret",
            "run_name": "run",
            "lr_scheduler_type": "/a/path",
        }
    )
    assert kept == {"learning_rate": 1e-4, "optim": "adamw_torch_fused", "bf16": True}


@settings(deadline=None)
@given(st.dictionaries(st.text(), st.recursive(st.none() | st.floats() | st.text(), st.lists)))
def test_any_state_has_a_summary(state: dict[str, object]) -> None:
    assert evaluation_summary({"log_history": [state], **state}).log_entries in (0, 1)


# Rendering, and reading back

text = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=5,
)
cards = st.builds(
    ModelCard,
    st.builds(
        TrainingConfiguration,
        peft=st.dictionaries(text, values, max_size=4),
        arguments=st.dictionaries(text, values, max_size=4),
        datasets=st.lists(text, max_size=3).map(tuple),
    ),
    st.builds(
        EvaluationSummary,
        metrics=st.dictionaries(text, st.floats(), max_size=4),
        best_metric=st.none() | st.floats(),
        steps=st.none() | st.integers(),
        epochs=st.none() | st.floats(),
        log_entries=st.integers(),
    ),
)


@settings(deadline=None)
@given(cards)
def test_a_card_is_read_back_as_it_was_rendered(card: ModelCard) -> None:
    stored = storable_card(card)
    assert storable_card(stored) == stored
    assert parse_card(render(customized(card), BASE)) == stored
    assert parse_card(render(complete(card), BASE)) == stored


@settings(deadline=None)
@given(cards)
def test_the_hub_reads_the_same_header(card: ModelCard) -> None:
    readme = render(customized(card), BASE)
    assert HubCard(readme).data.to_dict() == readme_header(readme)


def test_the_hub_reads_what_was_measured() -> None:
    card = ModelCard(
        TrainingConfiguration(peft={"task_type": "SEQ_CLS"}),
        EvaluationSummary(metrics={"eval_f1": 0.5, "mmlu": 0.25, "train_loss": 2.0}),
    )
    for model, readme in (
        (customized(card), render(customized(card), BASE)),
        (complete(card), render(complete(card), BASE)),
    ):
        data = HubCard(readme).data
        assert data.model_name == model.name
        assert [(r.task_type, r.metric_type, r.metric_value) for r in data.eval_results] == [
            ("text-classification", "f1", 0.5),
            ("text-classification", "mmlu", 0.25),
        ]


def test_what_was_not_evaluated_has_no_results_for_the_hub() -> None:
    card = ModelCard(evaluation=EvaluationSummary(metrics={"train_loss": 2.0}))
    assert HubCard(render(customized(card), BASE)).data.eval_results is None


def test_numbers_that_are_not_finite_are_not_stored() -> None:
    card = ModelCard(
        TrainingConfiguration(arguments={"a": math.nan, "b": [1.0, math.inf], "c": None}),
        EvaluationSummary(metrics={"x": math.nan, "y": 1.0}, best_metric=-math.inf),
    )
    assert storable_card(card) == ModelCard(
        TrainingConfiguration(arguments={"b": [1.0, None], "c": None}),
        EvaluationSummary(metrics={"y": 1.0}),
    )


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), {1: 2}, "\ud800", DAY])
def test_a_value_that_is_no_json_is_refused(value: object) -> None:
    with pytest.raises(MalformedError):
        storable_card(ModelCard(TrainingConfiguration(arguments={"a": value})))


@pytest.mark.parametrize("levels", [100, 400, 5000])  # of which one has three calls by recursion
def test_a_value_that_nests_without_end_is_refused(levels: int) -> None:
    value: list[object] = []
    for _ in range(levels):
        value = [value]
    with pytest.raises(MalformedError, match="levels"):
        storable_card(ModelCard(TrainingConfiguration(arguments={"a": value})))


CARD = ModelCard(
    TrainingConfiguration({"method": "LoRA", "r": 4}, {"learning_rate": 1e-05}, ("org/data",)),
    EvaluationSummary({"eval_loss": 0.5}, steps=3),
)


def test_the_hub_sees_an_adapter_of_its_base(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(render(customized(CARD), BASE))

    header = HubCard.load(path).data.to_dict()

    assert header["library_name"] == "peft"
    assert header["base_model"] == "tests/llama-tiny"
    assert header["base_model_relation"] == "adapter"
    assert header["license"] == "apache-2.0"
    assert header["datasets"] == ["org/data"]
    assert header["customized_models"]["name"] == "n_t_20260102_aaaa"
    assert parse_card(path) == CARD


def test_the_hub_sees_a_complete_model_as_a_finetune() -> None:
    header = HubCard(render(complete(CARD), BASE)).data.to_dict()

    assert header["library_name"] == "transformers"
    assert header["base_model_relation"] == "finetune"
    assert header["customized_models"]["customized"] == "n_t_20260102_aaaa"


@pytest.mark.parametrize("name", ["/home/someone/model", "model", "../model", "a/b/c"])
def test_a_base_that_is_not_on_the_hub_is_not_named_as_if_it_were(name: str) -> None:
    readme = render(customized(CARD), evolve(BASE, model_name=name))
    assert "base_model" not in HubCard(readme).data.to_dict()


def test_odd_text_stays_text_in_the_rendered_page() -> None:
    odd = "<script>\n# x | `y` [z](http://a.b) *bold* _it_ a_b"
    card = ModelCard(TrainingConfiguration(arguments={odd: odd}))
    body = render(customized(card), BASE).rpartition("\n---\n")[2]

    row = next(line for line in body.splitlines() if "script" in line)
    cell = r"&lt;script&gt; # x \| \`y\` \[z\](http&#58;//a.b) \*bold\* \_it\_ a_b"
    assert row == f"| {cell} | {cell} |"


@pytest.mark.parametrize(
    "readme", ["", "# prose", "---\na: b\n---\n", "---\ncustomized_models: 1\n---"]
)
def test_a_readme_without_our_card_is_refused(readme: str) -> None:
    with pytest.raises(MalformedError):
        parse_card(readme)
