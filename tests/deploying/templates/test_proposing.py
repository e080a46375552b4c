"""Deployment templates made from chat templates, and checked against them, without a server."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from customized_models import DeploymentTemplate
from customized_models.deploying.templates import (
    CONVERSATIONS,
    REQUIRED,
    ChatTemplate,
    EndTokens,
    Message,
    ProposedTemplate,
    check_completion_template,
    check_template,
    propose,
    propose_deployment_template,
)
from customized_models.deploying.templates.ollama import OllamaTemplate, collated
from customized_models.errors import (
    InvalidOptionError,
    InvalidTemplateError,
    MalformedError,
    TemplateMismatchError,
    UnsupportedError,
)
from customized_models.testing import tiny_llama
from customized_models.testing.tiny_models import CHAT_TEMPLATE, tiny_tokenizer
from tests.conftest import skip_without
from tests.servers import build_ollama
from tests.servers.template_package import TemplatePackage, template_package

from . import chat_templates

CHATML = (
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n"
)
LLAMA_3 = (
    "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
    "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
SAYING = {
    "system first": "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "a default system": "{% for m in messages %}{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nHi<|im_end|>\n{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "system in the user's turn": "{{ bos_token }}{% set s = '' %}"
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{{ '<start>' + m.role + '\n' + (s if loop.first else '') + m.content | trim + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}",
    "system at the last turn": "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{% set s = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and s is defined %}{{ s + '\n\n' }}{% endif %}{{ m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "a date": "{{ strftime_now('%d %b %Y') + '\n' }}{% for m in messages %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "braces and quotes": "{% for m in messages %}"
    "{{ '{\"' + m.role + '\": \"' + m.content + '\"}\n{{' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '{\"assistant\": {' }}{% endif %}",
    "answers without their thinking": "{% for m in messages %}{{ '<|' + m.role + '|>' + "
    "(m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content) + "
    "'<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
}  # fmt: skip


@pytest.fixture(scope="module")
def packages(built_ollama: None) -> Iterator[list[TemplatePackage]]:
    """The template packages of all versions of Ollama."""
    for version in build_ollama.VERSIONS:
        there = build_ollama.renderer(version).exists()
        skip_without(None if there else f"no renderer of Ollama {version}")
    first, second = build_ollama.VERSIONS
    with template_package(first) as old, template_package(second) as new:
        yield [old, new]


def saying(name: str, *, adds_bos: bool = True) -> ChatTemplate:
    return ChatTemplate(SAYING[name], chat_templates.TOKENS, adds_bos)


@functools.cache
def proposed_for(name: str) -> ProposedTemplate:
    return propose(saying(name), EndTokens())


def written(
    proposed: ProposedTemplate,
    chat: ChatTemplate,
    package: TemplatePackage,
    messages: list[Message],
) -> str:
    """The whole prompt that a server makes of `messages`."""
    stage, text = package(proposed.template.text, messages)
    assert stage == "text", text
    return (chat.bos if proposed.file_adds_bos else "") + text


@pytest.mark.usefixtures("built_llama_cpp")
@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_a_real_models_chat_template_becomes_one_of_ollamas(
    packages: list[TemplatePackage], name: str
) -> None:
    chat = chat_templates.named(name)
    if name in chat_templates.FOR_TOOLS_ALONE:
        with pytest.raises(UnsupportedError, match="refuses a single user message"):
            propose(chat, EndTokens())
        return
    proposed = propose(chat, EndTokens())
    assert proposed.proof.failed == ()
    compared = 0
    for conversation in CONVERSATIONS:
        messages = list(conversation.messages)
        accepted = chat.accepted(collated(messages), dates=[date.today()])
        if accepted and conversation.kind not in proposed.proof.limits:
            compared += 1
            for package in packages:
                assert written(proposed, chat, package, messages) in accepted
    assert compared > 20


contents = st.text("ab \n\té世<>|[]/{}\"'\\&\u3000\xa0", max_size=12)


@pytest.mark.parametrize("name", SAYING)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    system=st.booleans(),
    contents=st.lists(contents, min_size=1, max_size=6),
)
def test_whatever_is_said_both_templates_write_the_same(
    packages: list[TemplatePackage], name: str, system: bool, contents: list[str]
) -> None:
    chat, proposed = saying(name), proposed_for(name)
    roles = ["system"] * system + ["user", "assistant"] * 3
    messages = [Message(role=r, content=c) for r, c in zip(roles, contents, strict=False)]
    # transformers strips the text before it, too, where nothing is there to be continued.
    nothing = messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip()
    if messages[-1]["role"] != "system" and not nothing:
        accepted = chat.accepted(messages, dates=[date.today()])
        here = OllamaTemplate.parsed(proposed.template.text).render(messages, today=date.today())
        for package in packages:
            assert written(proposed, chat, package, messages) in accepted
            assert package(proposed.template.text, messages) == ("text", here)


@pytest.mark.usefixtures("built_llama_cpp")
def test_every_real_models_chat_template_is_among_them() -> None:
    there = (path.stem for path in chat_templates.DIRECTORY.glob("*.jinja"))
    assert sorted(there) == sorted(chat_templates.NAMES)


@pytest.mark.usefixtures("built_llama_cpp")
@pytest.mark.parametrize("name", chat_templates.NAMES)
def test_a_real_models_chat_template_is_rendered_as_its_tokenizer_does(name: str) -> None:
    assert_rendered_as_its_tokenizer_does(chat_templates.named(name))


@pytest.mark.parametrize("name", SAYING)
def test_a_chat_template_is_rendered_as_its_tokenizer_does(name: str) -> None:
    assert_rendered_as_its_tokenizer_does(saying(name))


def assert_rendered_as_its_tokenizer_does(chat: ChatTemplate) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = chat.bos, chat.special_tokens["eos_token"]
    tokenizer.unk_token = tokenizer.pad_token = None
    tokenizer.chat_template = chat.text
    for conversation in CONVERSATIONS[::3]:
        messages = [dict(message) for message in conversation.messages]
        for open_end in (False, True):
            rendered = chat.render(conversation.messages, today=date.today(), open_end=open_end)
            ending = {"continue_final_message": open_end, "add_generation_prompt": not open_end}
            try:
                expected = tokenizer.apply_chat_template(messages, tokenize=False, **ending)
            except Exception:
                expected = None
            assert rendered == expected


def test_stops_are_the_marks_around_an_answers_end() -> None:
    stops = {name: proposed_for(name).template.stop for name in SAYING}
    assert stops["a default system"] == ("<|im_end|>", "<|im_start|>")
    assert stops["system in the user's turn"] == ("<end>", "<start>")
    assert stops["system at the last turn"] == ("</s>", "[INST]")
    assert stops["system first"] == ("</s>", "[user]")


@pytest.mark.parametrize(
    ("name", "adds_bos", "file_adds_bos", "text_has_bos"),
    [
        ("system first", True, True, False),  # the file adds it, so the template must not
        ("system first", False, False, True),
        ("a default system", True, False, False),  # trained without, so the file must not add it
        ("a default system", False, False, False),
    ],
)
def test_a_prompt_begins_as_the_chat_template_has_it(
    name: str, adds_bos: bool, file_adds_bos: bool, text_has_bos: bool
) -> None:
    proposed = propose(saying(name, adds_bos=adds_bos), EndTokens())
    assert proposed.file_adds_bos is file_adds_bos
    assert ("<s>" in proposed.template.text) is text_has_bos
    said = any(limit.startswith("beginning: ") for limit in proposed.limits)
    assert said is (adds_bos and not file_adds_bos)


@pytest.mark.parametrize(
    ("template", "kinds", "message"),
    [
        (LLAMA_3, REQUIRED, "writes '<|im_start|>system"),
        ("hello", REQUIRED, "the deployment 'hello'"),
        ("   ", REQUIRED, "the deployment '   '"),
        ("{{ .Foo }}", REQUIRED, "<no value>"),
        ("{{ .Prompt }}", REQUIRED, "from character 0 on"),
        (CHATML, ("no system", "several turns"), "system"),  # loses the default system message
        ("<s>" + CHATML, REQUIRED, "from character 1 on"),
        ("{{ range .Messages }}{{ .Nothing }}{{ end }}", REQUIRED, "can't evaluate field Nothing"),
        ("{{ .Prompt }}{{ .Response }}{{ .Response }}", REQUIRED, "from character 0 on"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_with_the_difference(
    template: str, kinds: tuple[str, ...], message: str
) -> None:
    with pytest.raises(TemplateMismatchError, match=message.replace("|", r"\|")) as refused:
        check_template(DeploymentTemplate(template), saying("a default system"))
    assert set(kinds) <= set(refused.value.kinds)


def test_one_blank_or_newline_makes_a_template_another() -> None:
    chat = saying("a default system")
    text = propose(chat, EndTokens()).template.text
    for wrong in (
        text.replace("assistant\n", "assistant \n"),
        text.replace("<|im_end|>\n", "<|im_end|>"),
        text.replace("Hi", "hi"),
    ):
        assert wrong != text
        with pytest.raises(TemplateMismatchError):
            check_template(DeploymentTemplate(wrong), chat)


@pytest.mark.parametrize(
    "template",
    [
        "{{ if .Prompt }",
        "{{ frobnicate .Prompt }}",
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ range .Messages }}",
        "{{ $x }}",
    ],
)
def test_what_is_no_template_of_go_is_refused_as_that(template: str) -> None:
    with pytest.raises(InvalidTemplateError, match="no template of Go"):
        check_template(DeploymentTemplate(template), saying("a default system"))


def test_a_second_beginning_of_text_is_named() -> None:
    chat = saying("system first")
    doubled = DeploymentTemplate("<s>" + propose(chat, EndTokens()).template.text)
    with pytest.raises(TemplateMismatchError, match="adds '<s>' by itself"):
        check_template(doubled, chat)


def test_a_template_that_forgets_the_turns_before_is_told_why() -> None:
    chat = ChatTemplate(CHAT_TEMPLATE)
    template = DeploymentTemplate(
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
        "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(TemplateMismatchError, match=r"without \.Messages") as refused:
        check_template(template, chat)
    assert "no system" not in refused.value.kinds


def test_a_difference_can_be_accepted_by_its_kind() -> None:
    chat = saying("a default system")
    kinds = ("no system", "several turns", "white space", "special characters")
    template = DeploymentTemplate(CHATML)
    with pytest.raises(TemplateMismatchError):
        check_template(template, chat, accept=kinds)
    proof = check_template(template, chat, accept=(*kinds, "trailing assistant"))
    assert "no system" in proof.failed
    assert "1 different" in str(proof)
    with pytest.raises(InvalidOptionError, match="no kind of conversation"):
        check_template(template, chat, accept=("everything",))


def test_an_assistants_last_words_may_be_continued_or_answered() -> None:
    chat = ChatTemplate(CHAT_TEMPLATE)
    assert check_template(DeploymentTemplate(CHATML), chat).failed == ()
    assert check_template(propose(chat, EndTokens()).template, chat).failed == ()


def test_a_model_without_chat_template_gets_one_template_alone() -> None:
    check_completion_template(DeploymentTemplate("{{ .Prompt }}"))
    for wrong in ("hello", CHATML, "{{ .Foo }}", "{{ .Prompt }}{{ range .Messages }}{{ end }}"):
        with pytest.raises(InvalidTemplateError):
            check_completion_template(DeploymentTemplate(wrong))


@pytest.mark.usefixtures("built_llama_cpp")
def test_what_a_template_cannot_do_is_said() -> None:
    gemma = propose(chat_templates.named("google-gemma-2-2b-it"), EndTokens())
    assert any(limit.startswith("system: ") for limit in gemma.limits)
    qwen = propose(chat_templates.named("Qwen-Qwen3-0.6B"), EndTokens())
    assert {"tools", "thinking"} <= {limit.partition(":")[0] for limit in qwen.limits}


@pytest.mark.usefixtures("built_llama_cpp")
def test_thinking_is_turned_off_as_the_chat_template_does(packages: list[TemplatePackage]) -> None:
    chat = chat_templates.named("Qwen-Qwen3-0.6B")
    template, question = (
        propose(chat, EndTokens()).template.text,
        [Message(role="user", content="x")],
    )
    without = chat.render(question, today=date.today(), enable_thinking=False)
    for package in packages:
        assert package(template, question, think=False) == ("text", without)
        assert package(template, question, think=True) == package(template, question)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


def files_of(directory: Path) -> dict[str, Path]:
    return {path.name: path for path in directory.iterdir()}


def edited(model: Path, target: Path, name: str, **changes: object) -> dict[str, Path]:
    """The files of a copy whose JSON file `name` has other values; None takes one away."""
    shutil.copytree(model, target)
    path = target / name
    values = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return files_of(target)


def test_a_model_directory_is_all_that_a_proposal_needs(model: Path) -> None:
    proposed = propose_deployment_template(files_of(model))
    assert proposed.template.stop == ("<|im_end|>", "<|im_start|>")
    assert proposed.file_adds_bos is False
    assert proposed.ends.file_keys == {}
    assert proposed.limits == (
        "one role twice: Ollama joins neighbours of one role by a blank line before any template",
    )


def test_the_chat_template_is_found_wherever_it_is_kept(model: Path, tmp_path: Path) -> None:
    text = (model / "chat_template.jinja").read_text()
    for name, file, value in (
        ("one", "tokenizer_config.json", text),
        ("named", "tokenizer_config.json", [{"name": "default", "template": text}]),
        ("a processor's", "chat_template.json", text),
    ):
        files = edited(model, tmp_path / name, file, chat_template=value)
        del files["chat_template.jinja"]
        assert ChatTemplate.read(files).text == text


def test_without_a_chat_template_the_way_out_is_named(model: Path) -> None:
    files = files_of(model)
    del files["chat_template.jinja"]
    with pytest.raises(UnsupportedError, match=r"no chat template.*\.Prompt"):
        propose_deployment_template(files)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chat_template": "{% if %}"}, MalformedError, "does not parse"),
        ({"chat_template": 7}, MalformedError, "no text"),
        (
            {"chat_template": [{"name": "rag", "template": "x"}]},
            UnsupportedError,
            "none called 'default'",
        ),
        (
            {"chat_template": "{{ bos_token }}", "bos_token": None},
            UnsupportedError,
            "does not name it",
        ),
        (
            {"chat_template": "{% for m in messages %}{{ m.content | upper }}{% endfor %}"},
            UnsupportedError,
            "cannot be said",
        ),
        (
            {"chat_template": "{{ strftime_now('%H:%M') }}{{ messages[0].content }}"},
            UnsupportedError,
            "'%H:%M'",
        ),
    ],
)
def test_a_chat_template_that_go_cannot_say_is_refused(
    model: Path,
    tmp_path: Path,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    files = edited(model, tmp_path / "model", "tokenizer_config.json", **changes)
    del files["chat_template.jinja"]
    with pytest.raises(error, match=message):
        propose_deployment_template(files)


def test_the_tokenizer_says_whether_a_text_begins_with_a_token(model: Path, tmp_path: Path) -> None:
    text = "{{ bos_token }}" + CHAT_TEMPLATE
    for said in (True, False):
        files = edited(
            model, tmp_path / str(said), "tokenizer_config.json",
            add_bos_token=said, bos_token="<|endoftext|>", chat_template=text,
        )  # fmt: skip
        del files["chat_template.jinja"]
        assert propose_deployment_template(files).file_adds_bos is said


def test_further_end_tokens_are_told_to_the_file(model: Path, tmp_path: Path) -> None:
    ordinary, special = 100, 0  # <|endoftext|>, at which llama.cpp stops by itself
    files = edited(
        model, tmp_path / "model", "generation_config.json", eos_token_id=[2, ordinary, special]
    )
    ends = EndTokens.read(files)
    assert ends.ids == (2, ordinary, special)
    assert ends.file_keys == {"tokenizer.ggml.eot_token_id": ordinary}
    assert ends.stop == ("<|im_end|>", "<|endoftext|>")  # never a piece of ordinary text
    assert ends.lost == ()
    files = edited(
        model, tmp_path / "many", "generation_config.json", eos_token_id=[2, 100, 101, 102]
    )
    ends = EndTokens.read(files)
    assert set(ends.file_keys.values()) == {100, 101}
    assert ends.lost == (102,)
    assert any(
        limit.startswith("end tokens") for limit in propose_deployment_template(files).limits
    )


def test_a_wrong_end_token_is_malformed(model: Path, tmp_path: Path) -> None:
    files = edited(model, tmp_path / "m", "generation_config.json", eos_token_id=["</s>"])
    with pytest.raises(MalformedError, match="is no token"):
        EndTokens.read(files)


def test_templates_are_imported_without_heavy_libraries() -> None:
    script = "import sys, customized_models.deploying.templates; print(*sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    heavy = {"torch", "transformers", "jinja2", "numpy", "httpx", "tokenizers", "sqlalchemy"}
    assert heavy.isdisjoint(output.split())
