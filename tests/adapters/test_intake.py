from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from customized_models.adapters.intake import CONFIG, WEIGHTS, Adapter, take_in
from customized_models.errors import (
    MalformedError,
    UnsafeFileError,
    UnsupportedAdapterError,
)
from customized_models.files.digests import hash_file
from customized_models.testing import tiny_tokenizer


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    directory = tmp_path / "copy"
    directory.mkdir()
    return directory


def set_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | values))


# Copying


def test_a_copy_has_all_that_a_model_may_need_and_nothing_else(untrusted: Path, copy: Path) -> None:
    tiny_tokenizer().save_pretrained(untrusted)
    for name in ("optimizer.pt", "training_args.bin", "README.md", "pytorch_model.bin", "notes"):
        (untrusted / name).write_text("x")
    intake = take_in(untrusted, copy)
    kept = {CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    kept.add("notes")  # nobody knows whether a model needs it
    assert {path.name for path in copy.iterdir()} == kept
    assert intake.content == {name: hash_file(copy / name) for name in kept}
    for name in kept - {CONFIG}:
        assert (copy / name).read_bytes() == (untrusted / name).read_bytes()


def test_two_saves_of_one_adapter_have_one_canonical_configuration(
    untrusted: Path, copy: Path, tmp_path: Path
) -> None:
    take_in(untrusted, copy)
    config = json.loads((untrusted / CONFIG).read_text())
    config["target_modules"].reverse()
    reordered = json.dumps(dict(reversed(config.items())))
    (untrusted / CONFIG).write_text(reordered)
    other = tmp_path / "other"
    other.mkdir()
    take_in(untrusted, other)
    assert (other / CONFIG).read_bytes() == (copy / CONFIG).read_bytes()
    assert json.loads((copy / CONFIG).read_text())["target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.parametrize(
    ("stated", "kept"),
    [
        ("org/model", "org/model"),
        ("/home/someone/model", None),
        ("../../etc", None),
        ("https://example.org/x", None),
        (None, None),
        (5, None),
    ],
)
def test_only_a_hub_id_is_kept_as_the_name_of_the_base(
    stated: object, kept: str | None, untrusted: Path, copy: Path
) -> None:
    set_config(untrusted, base_model_name_or_path=stated)
    take_in(untrusted, copy)
    assert json.loads((copy / CONFIG).read_text())["base_model_name_or_path"] == kept


def test_a_local_directory_that_reads_like_a_hub_id_is_not_kept(
    untrusted: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (untrusted / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(untrusted)
    set_config(untrusted, base_model_name_or_path="org/model")
    take_in(untrusted, copy)
    assert json.loads((copy / CONFIG).read_text())["base_model_name_or_path"] is None


def test_pickled_weights_are_refused_with_the_way_out(untrusted: Path, copy: Path) -> None:
    (untrusted / WEIGHTS).rename(untrusted / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="convert_pickle"):
        take_in(untrusted, copy)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_an_adapter_without_its_files_is_malformed(name: str, untrusted: Path, copy: Path) -> None:
    (untrusted / name).unlink()
    with pytest.raises(MalformedError, match=re.escape(name)):
        take_in(untrusted, copy)


def make_link(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 100 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def cached(source: Path, cache: Path) -> Path:
    """The files of `source` as `snapshot_download` keeps them: a snapshot of links to blobs."""
    snapshot = cache / "models--me--lora" / "snapshots" / ("a" * 40)
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        (blobs / f"{path.name}-digest").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-digest")
    return snapshot


def test_an_adapter_is_taken_where_the_hubs_cache_has_it(
    untrusted: Path, copy: Path, tmp_path: Path
) -> None:
    (untrusted / "notes.txt").write_text("x")
    snapshot = cached(untrusted, tmp_path / "hub")
    intake = take_in(snapshot, copy)
    assert {path.name for path in copy.iterdir()} == {CONFIG, WEIGHTS, "notes.txt"}
    assert not any(path.is_symlink() for path in copy.iterdir())
    assert intake.adapter == Adapter.open(copy)


@pytest.mark.parametrize("target", ["/etc/hostname", "../../blobs/../../other"])
def test_a_snapshots_link_may_not_lead_out_of_its_blobs(
    target: str, untrusted: Path, copy: Path, tmp_path: Path
) -> None:
    snapshot = cached(untrusted, tmp_path / "hub")
    (tmp_path / "hub" / "other").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(target)
    with pytest.raises(UnsafeFileError, match=r"tokenizer\.json.*cp -rL"):
        take_in(snapshot, copy)


@pytest.mark.parametrize(
    "make",
    [make_link, make_dangling_link, os.mkfifo, os.mkdir, make_socket],
    ids=lambda m: m.__name__,
)
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json"])
def test_what_is_no_plain_file_is_refused_without_waiting(
    make: Callable[[Path], None], name: str, untrusted: Path, copy: Path
) -> None:
    (untrusted / name).unlink(missing_ok=True)
    make(untrusted / name)
    with pytest.raises(UnsafeFileError, match=re.escape(name)):
        take_in(untrusted, copy)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "tokenizer.json", "chat_template.jinja"])
def test_an_oversized_file_is_refused_before_it_is_read(
    name: str, untrusted: Path, copy: Path
) -> None:
    with (untrusted / name).open("ab") as file:
        os.truncate(file.fileno(), 1 << 40)  # sparse: takes no space
    with pytest.raises(UnsafeFileError, match=re.escape(name)):
        take_in(untrusted, copy)
    assert not (copy / name).exists() or (copy / name).stat().st_size == 0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '"x"', '{"r": 4, "r": 8}', '{"lora_alpha": NaN}', '{"lora_alpha": 1e400}',
     '{"r": ' + "9" * 5000 + "}", '{"a":' * 100_000, "{'r': 4}", "\ufeff{}"],
    ids=["empty", "list", "null", "string", "twice", "NaN", "infinite", "digits", "deep", "python",
         "byte order mark"],
)  # fmt: skip
def test_a_configuration_that_is_no_strict_json_object_is_refused(
    text: str, untrusted: Path, copy: Path
) -> None:
    (untrusted / CONFIG).write_text(text, encoding="utf-8")
    with pytest.raises(MalformedError):
        take_in(untrusted, copy)


def test_what_names_other_packages_or_places_is_left_out_of_the_copy(
    untrusted: Path, copy: Path
) -> None:
    set_config(
        untrusted,
        auto_mapping={"base_model_class": "ColQwen", "parent_library": "colpali_engine.models"},
        corda_config={"corda_method": "kpm", "cache_file": "/home/someone/corda.pt"},
        output_dir="/home/someone/run",
        framework="a tool of mine",
    )
    take_in(untrusted, copy)
    kept = json.loads((copy / CONFIG).read_text())
    assert [kept[key] for key in ("auto_mapping", "corda_config", "output_dir")] == [None] * 3
    assert kept["framework"] == "a tool of mine"


@pytest.mark.parametrize("library", ["os", "subprocess", "builtins", "../x", 5])
def test_a_class_of_python_itself_is_no_models(
    library: object, untrusted: Path, copy: Path
) -> None:
    set_config(untrusted, auto_mapping={"base_model_class": "system", "parent_library": library})
    with pytest.raises(UnsupportedAdapterError, match="auto_mapping"):
        take_in(untrusted, copy)


def test_layers_that_the_training_left_at_zero_are_noted(untrusted: Path, copy: Path) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.down_proj.lora_B.weight"))
    save_weights(untrusted, tensors | {name: torch.zeros_like(tensors[name]) * -1})
    intake = take_in(untrusted, copy)
    assert intake.adapter.zero_modules() == {"model.layers.1.mlp.down_proj"}
    assert intake.notes == (
        "1 of 4 modules are untrained, their LoRA is zero: 'model.layers.1.mlp.down_proj'.",
    )


def test_tensors_that_only_need_other_names_get_them(
    untrusted: Path, trained: Path, copy: Path
) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    save_weights(untrusted, {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    intake = take_in(untrusted, copy)
    assert {n: t.tolist() for n, t in load_file(copy / WEIGHTS).items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    assert intake.content[WEIGHTS] == hash_file(copy / WEIGHTS)
    assert intake.notes == (
        "8 tensors were renamed: _orig_mod of torch.compile was left in their names.",
    )


# Opening


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("r", 0),
        ("r", -1),
        ("r", 4.5),
        ("r", "4"),
        ("r", True),
        ("r", 1_000_000),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"q_proj": 10**400}),
        ("use_rslora", "false"),
        ("use_dora", 1),
        ("target_modules", 5),
        ("target_modules", [1, 2]),
        ("target_modules", [""]),
        ("modules_to_save", "lm_head"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_malformed(key: str, value: object, untrusted: Path) -> None:
    set_config(untrusted, **{key: value})
    with pytest.raises(MalformedError, match=key):
        Adapter.open(untrusted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("auto_mapping", {"base_model_class": "system", "parent_library": "os"}),
        ("auto_mapping", {"base_model_class": "A", "parent_library": "transformers.pipelines"}),
        ("megatron_config", {"x": 1}),
        ("megatron_core", "os"),
        ("corda_config", {"cache_file": "/etc/passwd"}),
        ("tokenizer_name_or_path", "someone/else"),
        ("prompt_tuning_init_state_dict_path", "/etc/passwd"),
        ("adapters", {"a": "someone/else"}),
    ],
)  # fmt: skip
def test_settings_that_lead_to_code_or_other_files_are_refused(
    key: str, value: object, untrusted: Path
) -> None:
    set_config(untrusted, **{key: value})
    with pytest.raises(UnsupportedAdapterError, match=key.partition("_")[0]):
        Adapter.open(untrusted)


def test_the_class_that_peft_notes_for_an_adapter_without_task_is_accepted(
    trained: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    from customized_models.testing import tiny_adapter

    config = LoraConfig(r=2, target_modules=["q_proj"])
    directory = tiny_adapter(tmp_path / "adapter", trained.parent / "base", config)
    assert json.loads((directory / CONFIG).read_text())["auto_mapping"]
    assert Adapter.open(directory).config["r"] == 2


def save_weights(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, directory / WEIGHTS)


@pytest.mark.parametrize("pattern", [False, 0, "", [], {"q_proj": 1}, {"q_proj": [1]}], ids=str)
def test_masks_of_ranks_that_are_none_are_malformed(pattern: object, untrusted: Path) -> None:
    config = json.loads((untrusted / CONFIG).read_text())
    config |= {"peft_type": "ADALORA", "rank_pattern": pattern}
    (untrusted / CONFIG).write_text(json.dumps(config))
    with pytest.raises(MalformedError, match="rank_pattern"):
        Adapter.open(untrusted)


def test_weights_without_tensors_are_malformed(untrusted: Path) -> None:
    save_weights(untrusted, {})
    with pytest.raises(MalformedError, match="no tensors"):
        Adapter.open(untrusted)


def test_a_tensor_without_elements_is_malformed(untrusted: Path) -> None:
    save_weights(untrusted, load_file(untrusted / WEIGHTS) | {"x": torch.zeros(0, 4)})
    with pytest.raises(MalformedError, match=r"without elements.*ZeRO-3.*zero_to_fp32"):
        Adapter.open(untrusted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_odd_dtypes_are_refused(dtype: torch.dtype, untrusted: Path) -> None:
    tensors = load_file(untrusted / WEIGHTS)
    name = next(iter(tensors))
    save_weights(untrusted, tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(UnsupportedAdapterError, match=re.escape(name)):
        Adapter.open(untrusted)


def test_a_header_of_endless_tensors_is_refused_before_it_is_parsed(untrusted: Path) -> None:
    blank = b"{}".ljust(40 << 20)
    (untrusted / WEIGHTS).write_bytes(len(blank).to_bytes(8, "little") + blank)
    with pytest.raises(MalformedError, match="header of"):
        Adapter.open(untrusted)
