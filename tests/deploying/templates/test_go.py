"""Go templates rendered here, held against Ollama's own template package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_models.deploying.templates import Message
from customized_models.deploying.templates.go import GoExecutionError, GoSyntaxError
from customized_models.deploying.templates.go import GoUnsupportedError as Unsupported
from customized_models.deploying.templates.ollama import OllamaTemplate, collated
from tests.conftest import skip_without
from tests.servers import build_ollama
from tests.servers.template_package import TemplatePackage, template_package


@pytest.fixture(scope="module", params=build_ollama.VERSIONS)
def package(request: pytest.FixtureRequest, built_ollama: None) -> Iterator[TemplatePackage]:
    version = request.param
    skip_without(None if build_ollama.renderer(version).exists() else f"no renderer of {version}")
    with template_package(version) as running:
        yield running


def chat(*turns: tuple[str, str]) -> list[Message]:
    return [Message(role=role, content=content) for role, content in turns]


CHATS = (
    chat(("user", "hi")),
    chat(("system", "S"), ("user", "hi")),
    chat(("user", "a"), ("assistant", "b"), ("user", "c")),
    chat(("system", "S"), ("user", "a"), ("user", "é日<&>"), ("assistant", "b"), ("system", "T")),
    chat(("user", "a"), ("assistant", "b")),
    chat(("system", "x")),
    chat(("assistant", "x"), ("user", "")),
    chat(("user", "")),
)


def rendered(template: str, messages: list[Message], think: bool | None = None) -> tuple[str, str]:
    """As `TemplatePackage` has it."""
    try:
        parsed = OllamaTemplate.parsed(template)
    except GoSyntaxError as error:
        return "parse", str(error)
    try:
        return "text", parsed.render(messages, today=date.today(), think=think)
    except GoExecutionError as error:
        return "execute", str(error)


def assert_as_in_go(
    package: TemplatePackage, template: str, messages: list[Message], think: bool | None = None
) -> None:
    stage, text = package(template, messages, think)
    found = rendered(template, messages, think)
    assert found[0] == stage, (template, messages, found, text)
    if stage == "text":
        assert found[1] == text, (template, messages)


@pytest.mark.parametrize("think", [None, True, False])
def test_the_templates_that_ollama_knows_are_rendered_as_it_does(
    package: TemplatePackage, think: bool | None
) -> None:
    for version in build_ollama.VERSIONS:
        for path in sorted((build_ollama.place(version) / "templates").iterdir()):
            for messages in CHATS:
                assert_as_in_go(package, path.read_text(), messages, think)


@pytest.mark.parametrize(
    "template",
    [
        "hello",
        "",
        "   ",
        "{{ .Foo }}",
        "{{ .Prompt }}",
        "{{ .Prompt }",
        "{{ if .Prompt }",
        "{{ if }}",
        "{{ end }}",
        "{{ else }}",
        "{{ nil }}",
        "{{ frobnicate .Prompt }}",
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{% for message in messages %}{{ message.content }}{% endfor %}",
        "{{ .Prompt }}{{ .Response }}{{ .Response }}",
        "{{ if .System }}S:{{ .System }}{{ end }}U:{{ .Prompt }}A:{{ .Response }}<end>{{ .Foo }}",
        "{{ .Prompt }}{{ currentDate }}",
        "{{ .Prompt }}{{ currentDate }}{{ .Response }}",
        "{{ if .Response }}x{{ .Response }}{{ else }}y{{ end }}z",
        "{{ .Suffix }}{{ .Response }}",
        "{{ range .Messages }}{{ .Foo }}{{ end }}",
        "{{ range .Messages }}{{ .Content | printf \"%s|%d%%|%s\" .Role 1 }}{{ end }}",
        "{{ index \"text\" 999 }}{{ .Messages }}",
        "{{ eq .Foo nil }}{{ eq .Foo \"x\" }}{{ .Messages | len }}",
        "{{ $x := 1 }}{{ $x = 2 }}{{ $x }}{{ len .Messages }}",
        "{{ $x = 2 }}{{ len .Messages }}",
        "{{ define \"a\" }}{{ . }}!{{ end }}"
        "{{ range .Messages }}{{ template \"a\" .Content }}{{ end }}",
        "{{ define \"a\" }}x{{ end }}{{ .Prompt }}{{ template \"a\" }}",
        "{{ define \"a\" }}{{ . }}{{ end }}{{ .Prompt }}{{ template \"a\" .System }}",
        "{{ range $i, $_ := .Messages }}{{ $i }}{{ .Role }}{{if $i}}{{break}}{{ end }}{{ end }}",
        "{{ range .Messages }}{{ if eq .Role \"user\" }}{{continue}}{{ end }}{{ .Role }}{{ end }}",
        "{{ with .System }}{{ . }}{{ else with .Tools }}t{{ else }}n{{ end }}{{ len .Messages }}",
        "{{ json .System }}{{ .Tools }}{{ json .Tools }}{{ if .Messages }}{{ end }}",
        "{{- /* c */ -}} a {{ .Prompt }}",
        "{{/* unclosed",
        "{{ slice \"héllo\" 0 2 }}{{ .Messages | len }}",
        "{{ range 3 }}{{ . }}{{ end }}{{ range $i := 3 }}{{ $i }}{{ end }}{{ .Messages | len }}",
        "{{ (index .Messages 0).Role }}",
        "{{ and .System .Foo }}{{ or .Foo .System \"d\" }}{{ not .Foo }}{{ len .Messages }}",
        "{{ lt 1 2 }}{{ ge 2 2 }}{{ ne \"a\" \"b\" }}{{ eq 1 2 1 }}{{ len .Messages }}",
        "{{ block \"b\" . }}x{{ .System }}{{ end }}{{ len .Messages }}",
        "{{ true }}{{ .Messages | len | print 1 2 \"a\" 3 }}",
        "{{ .Prompt }}{{ if .Think }}T{{ end }}{{ if .IsThinkSet }}S{{ end }}",
    ],
)  # fmt: skip
def test_a_template_means_here_what_it_means_at_ollama(
    package: TemplatePackage, template: str
) -> None:
    for messages in CHATS:
        for think in (None, True, False):
            assert_as_in_go(package, template, messages, think)


texts = st.sampled_from(["", " ", "\n", "a", " b \n", "é", "{", "}", '"', "<|im_end|>\n", "\t日"])
names = st.sampled_from(["$x", "$y"])
leaves = st.sampled_from(
    [".", ".Role", ".Content", ".System", "$.System", "$.Messages", ".Messages", ".Response",
     ".Foo", '"user"', '"a\\n"', "`r`", "0", "1", "2", "-1", "'a'", "true", "false", "nil", "$x",
     "$", ".Think", "$.IsThinkSet", ".Tools", "currentDate"]
)  # fmt: skip


def _calls(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    function = st.sampled_from(
        ["eq", "ne", "lt", "ge", "and", "or", "not", "len", "index", "slice", "print", "json"]
    )
    call = st.builds(lambda f, a: " ".join((f, *a)), function, st.lists(inner, max_size=3))
    piped = st.builds(lambda a, f: f"{a} | {f}", inner, function)
    return st.one_of(call, piped).map("({})".format)


expressions = st.recursive(leaves, _calls, max_leaves=4)
openings = st.sampled_from(["{{ ", "{{", "{{- "])
closings = st.sampled_from([" }}", "}}", " -}}"])


def action(code: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds("{}{}{}".format, openings, code, closings)


def _nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    heads = st.one_of(
        expressions.map("if {}".format),
        expressions.map("with {}".format),
        expressions.map("range {}".format),
        st.just("range $i, $m := .Messages"),
        st.just("range $x := .Messages"),
        st.just("with $x := .System"),
    )
    end, other = action(st.just("end")), action(st.just("else"))
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{}{}{}".format, action(heads), inner, end),
        st.builds("{}{}{}{}{}".format, action(heads), inner, other, inner, end),
    )


nodes = st.one_of(
    texts,
    action(expressions),
    action(st.builds("{} := {}".format, names, expressions)),
    action(st.builds("{} = {}".format, names, expressions)),
    action(st.sampled_from(["break", "continue"])),
)
templates = st.recursive(nodes, _nested, max_leaves=8)
conversations = st.lists(
    st.builds(
        lambda role, content: Message(role=role, content=content),
        st.sampled_from(["system", "user", "assistant"]),
        st.sampled_from(["", "a", " é\n", "{{ . }}", "<|im_end|>"]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=1000, deadline=None)
@given(template=templates, messages=conversations, head=st.sampled_from(["", "{{ $x := 1 }}"]))
def test_whatever_a_template_says_go_says_the_same(
    package: TemplatePackage, template: str, messages: list[Message], head: str
) -> None:
    with suppress(Unsupported):  # said so, and wrote nothing
        assert_as_in_go(package, head + template, messages)


pieces = st.sampled_from(
    ["{{", "}}", "{{-", "-}}", " ", "\n", "if", "end", "else", "range", "with", "define",
     "template", "block", "break", ".", ".A", "$", "$x", ":=", "=", ",", "|", "(", ")", '"s"',
     "`r`", "'c'", "1", "-", "/*", "*/", "nil", "true", "len", "x", "\\", "é"]
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(template=st.lists(pieces, max_size=14).map("".join))
def test_whatever_go_refuses_to_parse_is_refused_here(
    package: TemplatePackage, template: str
) -> None:
    stage, text = package(template, CHATS[0])
    try:
        found = rendered(template, CHATS[0])
    except Unsupported:
        return
    assert found[0] == stage, (template, found, text)


def test_neighbours_of_one_role_become_one_message() -> None:
    joined = collated(chat(("user", "a"), ("user", "b"), ("tool", "c"), ("tool", "d")))
    assert joined == chat(("user", "a\n\nb"), ("tool", "c"), ("tool", "d"))
