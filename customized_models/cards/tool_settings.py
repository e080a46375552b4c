"""How a tool that trains on top of transformers says it trained: the settings files it leaves.

One row a tool. A file is known by its name or by the keys in it, since people give configurations
any name.
Settings get the names that the Trainer has for them.

Sources: LLaMA-Factory `hparams/*.py` and `extras/constants.py` (`training_args.yaml`); axolotl
`utils/schemas/config.py` and `train.py` (the configuration in the README); ms-swift
`arguments/base_args` (`args.json`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from ..errors import CustomizedModelsError
from ..files.links import linked_file
from ..files.manifest import README
from ..files.reading import plain_text
from .readme import MAX_README, yaml_mapping

_MAX_YAML = 1 << 20  # bytes; configurations have some thousand
_MAX_FILES = 20  # of YAML that are looked into; a training leaves one or two
_IN_README = re.compile(r"See axolotl config.*?```ya?ml\r?\n(.*?)\r?\n```", re.DOTALL)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", re.ASCII)  # "1e-4" is text in YAML 1.1
_DATA_FILE = re.compile(r"(?:.*[/\\])?([^/\\]+\.(?:jsonl?|csv|parquet|arrow|txt))", re.DOTALL)


@frozen
class Tool:
    """A tool, and how to read its settings.

    Attributes:
        name: The tool's.
        files: The beginning of the names that such a file has, if it has one of its own.
        needs: Keys that its settings have.
        any_of: Keys of which they have at least one.
        names: The Trainer's name for a setting that the tool calls otherwise; `stage` is the kind
            of training, such as `sft` and `dpo`.
    """

    name: str
    files: tuple[str, ...]
    needs: frozenset[str]
    any_of: frozenset[str]
    names: Mapping[str, str]

    def wrote(self, file: str, settings: Mapping[str, Any]) -> bool:
        """Whether these look like its settings."""
        typical = self.needs <= settings.keys() and not self.any_of.isdisjoint(settings)
        return typical or file.startswith(self.files)


TOOLS = (
    Tool(
        "axolotl",
        ("axolotl",),
        frozenset({"base_model"}),
        frozenset({"adapter", "micro_batch_size", "sequence_len"}),
        {
            "micro_batch_size": "per_device_train_batch_size",
            "num_epochs": "num_train_epochs",
            "optimizer": "optim",
            "lr_scheduler": "lr_scheduler_type",
            "sequence_len": "max_length",
            "sample_packing": "packing",
            "rl": "stage",
            "rl_beta": "beta",
            "dpo_beta": "beta",
            "dpo_loss_type": "loss_type",
        },
    ),
    Tool(
        "LLaMA-Factory",
        ("llamafactory", "llama_factory", "training_args."),
        frozenset({"model_name_or_path"}),
        frozenset({"finetuning_type", "stage", "cutoff_len", "template"}),
        {"cutoff_len": "max_length", "pref_beta": "beta", "pref_loss": "loss_type"},
    ),
    Tool(
        "ms-swift",
        (),
        frozenset({"model"}),
        frozenset({"swift_version", "tuner_type", "train_type", "sft_type"}),
        {"rlhf_type": "stage"},
    ),
)


@frozen
class ToolSettings:
    """What a tool's settings file says.

    Attributes:
        tool: The tool's name; empty if there is no such file.
        arguments: By the Trainer's names, of which some may be unknown to it.
        datasets: Names, and of local files those without directories.
    """

    tool: str = ""
    arguments: Mapping[str, Any] = {}
    datasets: tuple[str, ...] = ()


def tool_settings(directory: Path) -> ToolSettings:
    """The settings in the first file of `directory` that is one of a known tool's.

    A file that does not parse is nobody's: whether an adapter is sound does not depend on it. Links
    are followed as `linked_file` does, and `directory` has none in its own path.
    """
    for file, settings in _documents(directory):
        for tool in TOOLS:
            if tool.wrote(file, settings):
                renamed = {tool.names.get(key, key): _number(v) for key, v in settings.items()}
                return ToolSettings(tool.name, renamed, tuple(_datasets(settings)))
    return ToolSettings()


def _documents(directory: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The names and the mappings of the files that may be settings, the likeliest first."""
    files = sorted(path for path in directory.glob("*.y*ml") if path.suffix in (".yaml", ".yml"))
    for path in [directory / "args.json", *files[:_MAX_FILES], directory / README]:
        try:
            file = linked_file(directory, path.name)
            text = plain_text(file, MAX_README if path.name == README else _MAX_YAML)
            if path.name == README:
                found = _IN_README.search(text)
                text = found[1] if found else "{}"
            yield path.name, yaml_mapping(text, path.name)  # JSON is YAML
        except CustomizedModelsError:
            continue


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _datasets(settings: Mapping[str, Any]) -> Iterator[str]:
    """Their names: `a,b`, a list of texts such as `org/name#500`, or of mappings with a path."""
    stated = settings.get("datasets") or settings.get("dataset") or ()
    every = stated.split(",") if isinstance(stated, str) else stated
    for item in every if isinstance(every, list | tuple) else ():
        name = item.get("path") if isinstance(item, Mapping) else item
        if isinstance(name, str):
            name = name.strip().partition("#")[0]
            file = _DATA_FILE.fullmatch(name)
            yield file[1] if file else name
