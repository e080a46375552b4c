"""Regular expressions out of adapters: as tools and people write them, and hostile ones."""

from __future__ import annotations

import importlib
import re
import resource
from collections import Counter
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from customized_models.adapters.patterns import check_patterns, many_expressions
from customized_models.errors import MalformedError, UnsupportedAdapterError

NAMES = [
    f"model.{part}.layers.{layer}.{block}.{module}"
    for part in ("language_model", "visual", "decoder")
    for layer in range(64)
    for block, modules in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj", "qkv"),
        "mlp": ("up_proj", "gate_proj", "down_proj", "fc1"),
    }.items()
    for module in modules
]

PROJECTIONS = "o_proj|up_proj|v_proj|down_proj|k_proj|q_proj|gate_proj"
BLOCKS = "self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer"

AS_WRITTEN = {
    "one name": "q_proj",
    "a whole name": r"model\.layers\.0\.self_attn\.q_proj",
    "Unsloth, vision": rf"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:{BLOCKS}).*?"
    rf"(?:{PROJECTIONS}|qkv).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\.(?:{BLOCKS})\.(?:(?:{PROJECTIONS})))",
    "LLaMA-Factory, two towers frozen": rf"^(?!.*(?:vision_tower|projector)).*(?:{PROJECTIONS}).*",
    "ms-swift": rf"^(model\.language_model(?=\.).*\.({PROJECTIONS}))$",
    "ms-swift 2": r"^(language_model|projector)(?!.*(lm_head|output|emb|wte|shared)).*",
    "axolotl": r"model.language_model.layers.[\d]+.(mlp|cross_attn|self_attn).(up|q|k)_proj",
    "PEFT, Whisper": r".*decoder.*(self_attn|encoder_attn).*(q_proj|v_proj)$",
    "ColPali": rf"(.*(language_model).*({PROJECTIONS}).*$|.*(custom_text_proj).*$)",
    "some layers": r".*\.(1[6-9]|2\d|3\d)\..*(q_proj|v_proj)",
    "blocks of names": r".*\.(?:self_attn\.(?:q|k)_proj|mlp\.(?:gate|up)_proj)",
    "by whole paths": "|".join(rf"model\.layers\.{n}\.self_attn\.(q|v)_proj" for n in range(64)),
    "a reference back": r".*\.(q|k)_proj(?!.*\1_proj)",
    "case": "(?i:.*Q_PROJ)",
}


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern"])
@pytest.mark.parametrize("what", AS_WRITTEN)
def test_patterns_as_tools_and_people_write_them_are_accepted(what: str, option: str) -> None:
    pattern = AS_WRITTEN[what]
    check_patterns(config_of(option, pattern), NAMES)


def config_of(option: str, pattern: str) -> dict[str, Any]:
    config: dict[str, Any] = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
    if option == "modules_to_save":
        return config | {option: [pattern]}
    return config | {option: {pattern: 4} if option.endswith("_pattern") else pattern}


OPTIONS = [
    "target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern",
]  # fmt: skip
HOSTILE = [
    "(.+)+x",
    "(.*)*=",
    r"(\w+\.?)*=",
    r"(\w|.)*=",
    ".*.*.*.*.*.*.*.*=",
    r"((.?){1,60}){60}=",
]


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("option", OPTIONS)
def test_a_hostile_pattern_costs_less_than_a_second(option: str, pattern: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with pytest.raises(UnsupportedAdapterError, match=option) as refused:
        check_patterns(config_of(option, pattern), NAMES)
    assert "full names of the modules" in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


def test_a_pattern_that_is_only_slow_with_names_that_it_targets_is_refused() -> None:
    config = config_of("rank_pattern", "(.+)+x") | {"target_modules": ".*visual.*"}
    with pytest.raises(UnsupportedAdapterError, match="rank_pattern"):
        check_patterns(config, NAMES)
    check_patterns(config | {"target_modules": "nothing"}, NAMES)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_pattern_that_does_not_compile_is_malformed(option: str) -> None:
    with pytest.raises(MalformedError, match=rf"{option} has a broken pattern"):
        check_patterns(config_of(option, "q_proj("), NAMES)


def test_one_that_takes_all_memory_is_refused() -> None:
    with pytest.raises((UnsupportedAdapterError, MalformedError)):
        check_patterns(config_of("target_modules", "(" * 5000 + "a" + "{2}){9}" * 5000), NAMES)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [f"q_proj{n}" for n in range(100_000)]},
        {"target_modules": ["q_proj"], "rank_pattern": {f"q{n}": 4 for n in range(100_000)}},
    ],
    ids=["names", "keys"],
)
def test_more_names_than_peft_can_compare_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedAdapterError, match="name them by what their names end with"):
        check_patterns({"peft_type": "LORA"} | config, NAMES)


def test_each_key_of_what_passes_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many keys as modules, as EVA and AdaLoRA write them for large models."""
    ranks = {re.escape(name): 4 for name in NAMES[:800]}
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": ranks}
    check_patterns(config, NAMES)
    settings = LoraConfig(target_modules=["q_proj"], rank_pattern=ranks)
    compiled: Counter[str] = Counter()
    compiler = importlib.import_module("re._compiler")
    real = compiler.compile

    def counted(pattern: str, flags: int) -> Any:
        compiled[pattern] += 1
        return real(pattern, flags)

    monkeypatch.setattr(compiler, "compile", counted)
    re.purge()
    with many_expressions():
        targets = [name for name in NAMES if check_target_module_exists(settings, name)]
        assert [get_pattern_key(ranks, name) for name in targets]
    assert len(compiled) >= len(ranks)
    assert set(compiled.values()) == {1}
