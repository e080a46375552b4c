"""What a backend is given, and how it is told from damage; backends of others; killed pushes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from customized_models import (
    AlreadyExistsError,
    BaseModelMismatch,
    CompleteModel,
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    IntegrityError,
    InUseError,
    InvalidOptionError,
    JobLost,
    LiveModel,
    Merger,
    ModelRegistry,
    NoEnvironmentError,
    Served,
    ServedModelChangedError,
    ServerAnswerError,
    Status,
    UnsupportedError,
    UnsupportedQuantizationError,
)
from customized_models.backends import Probe
from customized_models.deploying.artifacts import RegistryArtifact
from customized_models.gguf import GGUFFile
from customized_models.testing import CopyingStorage, tiny_llama, tiny_lora
from tests.deploying.third_party import Options, Shelf

BACKENDS = {"shelf": Shelf}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base that may be damaged."""
    return tiny_llama(tmp_path / "base")


@pytest.fixture
def registry(base: Path, tmp_path: Path) -> ModelRegistry:
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("tiny", base)
    return registry


@pytest.fixture
def customized(registry: ModelRegistry, base: Path, tmp_path: Path) -> CustomizedModel:
    return registry.register(tiny_lora(tmp_path / "adapter", base), train_name="support")


@pytest.fixture
def complete(registry: ModelRegistry, customized: CustomizedModel) -> CompleteModel:
    return Merger(registry).save(customized).result(progress=False)


def artifact(
    registry: ModelRegistry, model: CustomizedModel | CompleteModel, mode: str = "no_quantization"
) -> RegistryArtifact:
    return RegistryArtifact(registry.catalog, registry.shelf, model, "live", mode, lambda key: None)


def flip(path: Path, *, unnoticed: bool) -> None:
    """Change a bit of a file; `unnoticed`: its times stay as they were."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-100] ^= 0x40
    path.write_bytes(data)
    if unnoticed:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def files(registry: ModelRegistry) -> list[str]:
    return list(registry.shelf.storage.keys("gguf/"))


# Digests are checked before use


def test_a_damaged_complete_model_does_not_go_live(
    registry: ModelRegistry, complete: CompleteModel
) -> None:
    weights = max(registry.local_path(complete).glob("*.safetensors"))
    flip(weights, unnoticed=True)
    with (
        artifact(registry, complete) as damaged,
        pytest.raises(IntegrityError, match=weights.name),
    ):
        damaged.gguf(lambda *_: None, chat_template=True)
    assert files(registry) == []
    with (
        artifact(registry, complete) as damaged,
        pytest.raises(IntegrityError, match=weights.name),
        damaged.directory(),
    ):
        pass
    flip(weights, unnoticed=True)
    with artifact(registry, complete) as repaired:
        repaired.gguf(lambda *_: None, chat_template=True)


def test_a_rotten_base_does_not_go_live(
    registry: ModelRegistry, customized: CustomizedModel, base: Path
) -> None:
    weights = max(base.glob("*.safetensors"))
    flip(weights, unnoticed=True)
    with artifact(registry, customized) as rotten:
        with pytest.raises(BaseModelMismatch, match=weights.name):
            rotten.gguf(lambda *_: None, chat_template=True)
        with pytest.raises(BaseModelMismatch, match=weights.name), rotten.adapter():
            pass
    assert files(registry) == []


def damage_the_file(directory: Path) -> None:
    flip(directory / "model.gguf", unnoticed=True)


def damage_the_manifest(directory: Path) -> None:
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace("no_quantization", "q8_0"))


def empty_it(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


@pytest.mark.parametrize("damage", [damage_the_file, damage_the_manifest, empty_it])
def test_a_damaged_file_of_the_cache_is_made_again(
    registry: ModelRegistry, complete: CompleteModel, damage: Callable[[Path], None]
) -> None:
    def made() -> GGUFFile:
        with artifact(registry, complete) as form:
            return form.gguf(lambda *_: None, chat_template=True)

    first = made()
    damage(first.path.parent)
    second = made()
    assert second == first
    assert made() == first
    assert len(files(registry)) == 1


# Forms


def test_each_form_says_what_it_cannot_be(
    registry: ModelRegistry, customized: CustomizedModel, complete: CompleteModel
) -> None:
    with artifact(registry, customized) as form:
        with pytest.raises(UnsupportedError, match=r"Merger\(registry\)\.save"), form.directory():
            pass
        with form.adapter() as beside:
            assert (beside.base / "config.json").is_file()
    with artifact(registry, complete) as form:
        with pytest.raises(UnsupportedError, match="has no adapter"), form.adapter():
            pass
        with form.directory() as directory:
            assert (directory / "config.json").is_file()
    with (
        artifact(registry, complete, "q8_0") as form,
        pytest.raises(UnsupportedQuantizationError, match="q8_0"),
        form.directory(),
    ):
        pass


# Backends of others


@pytest.fixture
def there(registry: ModelRegistry, tmp_path: Path) -> DeploymentEnvironment:
    (tmp_path / "served").mkdir()
    settings = {"directory": str(tmp_path / "served")}
    return registry.add_environment(DeploymentEnvironment("there", "shelf", settings=settings))


@pytest.mark.parametrize("form", ["gguf", "directory", "adapter"])
def test_a_backend_of_somebody_elses_gets_any_form_and_names_its_own_api(
    registry: ModelRegistry,
    customized: CustomizedModel,
    complete: CompleteModel,
    there: DeploymentEnvironment,
    form: str,
) -> None:
    deployer = Deployer(registry, backends=BACKENDS)
    model = customized if form == "adapter" else complete
    live = deployer.deploy(model, options=Options(form)).result(progress=False)
    assert live.served.api == "shelf/1"
    assert deployer.status(live) is Status.LIVE
    assert list(registry.live_models()) == [live]
    assert registry.add_third_party(live).api == "shelf/1"
    deployer.undeploy(live)
    assert deployer.status(live) is Status.ABSENT


def test_a_name_is_not_replaced_where_the_tool_keeps_no_versions(
    registry: ModelRegistry, customized: CustomizedModel, there: DeploymentEnvironment
) -> None:
    deployer = Deployer(registry, backends=BACKENDS)
    options = {"options": Options("adapter"), "served_name": "support"}
    live = deployer.deploy(customized, **options).result(progress=False)
    with pytest.raises(UnsupportedError, match="undeploy what has it first, or choose another"):
        deployer.deploy(customized, replace=True, **options)
    with pytest.raises(AlreadyExistsError, match="or undeploy it first"):
        deployer.deploy(customized, **options).result(progress=False)
    assert registry.get(LiveModel, live.name).state == "live"
    assert "were not waited for" in deployer.undeploy(live, wait=60).note


def test_a_finished_file_is_not_ignored_by_a_tool_that_asks_for_another_form(
    registry: ModelRegistry,
    customized: CustomizedModel,
    there: DeploymentEnvironment,
    tmp_path: Path,
) -> None:
    deployer = Deployer(registry, backends=BACKENDS)
    job = deployer.deploy(customized, options=Options("adapter"), gguf=tmp_path / "file.gguf")
    with pytest.raises(UnsupportedError, match="deploy without gguf="):
        job.result(progress=False)
    assert list((tmp_path / "served").iterdir()) == []


class Unasked(Shelf):
    """It gives no digest, and does not answer when it is asked for proofs."""

    def probe(self, served: Served) -> Probe:
        raise ServerAnswerError("no answer")


def test_what_was_pushed_is_taken_back_though_it_has_no_digest(
    registry: ModelRegistry,
    customized: CustomizedModel,
    there: DeploymentEnvironment,
    tmp_path: Path,
) -> None:
    deployer = Deployer(registry, backends={"shelf": Unasked})
    job = deployer.deploy(customized, options=Options("adapter"))
    with pytest.raises(ServerAnswerError, match="no answer"):
        job.result(progress=False)
    assert list((tmp_path / "served").iterdir()) == []
    assert deployer.recover() == []


def test_what_somebody_changed_is_left_alone(
    registry: ModelRegistry, customized: CustomizedModel, there: DeploymentEnvironment
) -> None:
    deployer = Deployer(registry, backends=BACKENDS)
    live = deployer.deploy(customized, options=Options("adapter")).result(progress=False)
    Path(live.served.details["place"], "changed").touch()
    with pytest.raises(ServedModelChangedError) as caught:
        deployer.undeploy(live)
    assert "forget=True" in caught.value.__notes__[-1]
    assert registry.get(LiveModel, live.name).state == "live"


def test_a_backend_that_is_not_installed_any_more_keeps_nothing_from_being_removed(
    registry: ModelRegistry, customized: CustomizedModel, there: DeploymentEnvironment
) -> None:
    live = Deployer(registry, backends=BACKENDS).deploy(customized).result(progress=False)
    deployer = Deployer(registry)
    with pytest.raises(InvalidOptionError, match="shelf") as caught:
        deployer.undeploy(live)
    assert "forget=True" in caught.value.__notes__[-1]
    assert deployer.undeploy(live, forget=True).state == "undeployed"
    registry.delete(live)
    registry.delete(there)


def test_a_lineage_asks_the_tools_that_the_deployer_knows(
    registry: ModelRegistry, customized: CustomizedModel, there: DeploymentEnvironment
) -> None:
    deployer = Deployer(registry, backends=BACKENDS)
    live = deployer.deploy(customized, options=Options("adapter")).result(progress=False)
    lineage = registry.lineage(live)
    assert lineage.verify().model.state == "claimed"
    assert lineage.verify(status=deployer.status).model.state == "verified"
    shutil.rmtree(live.served.details["place"])
    assert lineage.verify(status=deployer.status).model.state == "missing"


def test_a_backend_that_is_not_given_is_named(
    registry: ModelRegistry, customized: CustomizedModel, there: DeploymentEnvironment
) -> None:
    with pytest.raises(InvalidOptionError, match=r"backends=\.\.\."):
        Deployer(registry).deploy(customized)


def test_a_deployment_works_from_a_storage_on_another_host(
    customized: CustomizedModel,
    registry: ModelRegistry,
    there: DeploymentEnvironment,
) -> None:
    away = ModelRegistry(registry.root, storage=CopyingStorage(registry.shelf.storage))
    deployer = Deployer(away, backends=BACKENDS)
    live = deployer.deploy(customized, quantization="q8_0").result(progress=False)
    place = Path(live.served.details["place"], "model.gguf")
    assert place.stat().st_size > 0
    deployer.undeploy(live)


@pytest.mark.slow
def test_what_others_write_passes_mypy() -> None:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental"]
    script = Path(__file__).with_name("third_party.py")
    done = subprocess.run([*command, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# Killed on the way


def test_what_a_killed_deployment_left_is_taken_back(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    settings = {"directory": str(served), "kill": True}
    registry.add_environment(DeploymentEnvironment("there", "shelf", settings=settings))
    job = Deployer(registry, backends=BACKENDS).deploy(customized)
    with pytest.raises(JobLost, match=r"'there'.*recover"):
        job.result(progress=False)
    assert [path.name for path in served.iterdir()] == [job.name]
    assert list(registry.live_models()) == []

    with pytest.raises(InvalidOptionError, match="shelf"):
        registry.recover()  # which does not know the backend
    assert Deployer(registry, backends=BACKENDS).recover() == [
        f"undid the deployment of {job.name} at there"
    ]
    assert list(served.iterdir()) == []
    assert len(files(registry)) == 1  # for the next attempt
    assert registry.recover() == []


def test_what_a_killed_deployment_left_at_a_server_that_is_gone_for_good_can_be_forgotten(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    (tmp_path / "served").mkdir()
    settings = {"directory": str(tmp_path / "served"), "kill": True}
    there = DeploymentEnvironment("there", "shelf", settings=settings)
    registry.add_environment(there)
    job = Deployer(registry, backends=BACKENDS).deploy(customized)
    with pytest.raises(JobLost):
        job.result(progress=False)
    for refused in (
        lambda: registry.delete(there),
        lambda: registry.update_environment(attrs.evolve(there, backend="another")),
    ):
        with pytest.raises(InUseError, match=rf"{job.name}.*recover, with forget='there'"):
            refused()

    deployer = Deployer(registry)  # which does not know the backend
    with pytest.raises(InvalidOptionError, match="shelf"):
        deployer.recover()
    with pytest.raises(NoEnvironmentError, match="elsewhere"):
        deployer.recover(forget="elsewhere")
    assert deployer.recover(forget=there) == [
        f"gave up the deployment of {job.name} at there, which is forgotten"
    ]
    assert deployer.recover() == []
    registry.delete(there)


def test_the_next_deployment_there_takes_back_what_a_killed_one_left(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    served = tmp_path / "served"
    served.mkdir()
    settings = {"directory": str(served), "kill": True}
    killing = registry.add_environment(DeploymentEnvironment("there", "shelf", settings=settings))
    deployer = Deployer(registry, backends=BACKENDS)
    with pytest.raises(JobLost):
        deployer.deploy(customized).result(progress=False)
    with pytest.raises(JobLost):
        deployer.deploy(customized).result(progress=False)
    assert len(list(served.iterdir())) == 1
    deployer.recover()
    registry.delete(killing)
