"""Weights and checkpoints: matching keys are loaded, others listed, no code is run."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.checkpoint import (
    CheckpointError,
    load_backbone,
    load_checkpoint,
    load_network,
    load_start,
    rounded_weights,
    save_checkpoint,
)
from models.networks import build_network
from models.recipe import find_recipe, load_recipe
from service.artefact.labels import VOC_LABELS, LabelSet


def small_backbone() -> nn.Module:
    """Two layers in place of the 318 tensors of a ResNet-50."""
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def save_npz(weights: dict[str, Tensor], path: Path) -> None:
    """Write numpy's format."""
    arrays: dict[str, Any] = {key: value.numpy() for key, value in weights.items()}
    np.savez(path, **arrays)


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    ".pth": torch.save,
    ".npz": save_npz,
    ".safetensors": save_file,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_loads(tmp_path: Path, suffix: str) -> None:
    """ImageNet's classifier is ignored; batch counters may be missing."""
    source, backbone = small_backbone(), small_backbone()
    weights = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    path = tmp_path / f"weights{suffix}"
    WRITERS[suffix]({**weights, "fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}, path)
    load_backbone(backbone, path)
    for key, value in weights.items():
        assert backbone.state_dict()[key].equal(value)


def test_a_former_runs_head_is_taken_where_it_fits(tmp_path: Path) -> None:
    """The context head without edges initialises the one with edges, except its classifier."""
    former, network = (
        build_network("context_fcn_resnet50_16s"),
        build_network("context_fcn_resnet50_8s"),
    )
    save_checkpoint(tmp_path / "checkpoint.pt", {"model": former.state_dict()})
    taken = load_start(network, tmp_path / "checkpoint.pt")
    state = network.state_dict()
    assert taken == sum(key.startswith("classifier.") for key in former.state_dict()) - 1
    for key, value in former.state_dict().items():
        if key != "classifier.predict.weight":
            assert state[key].equal(value)


def test_a_head_for_other_classes_is_taken_except_its_classifier(tmp_path: Path) -> None:
    """A run on 5 classes initialises one on VOC's: backbone and context, not weights per class."""
    former, network = (build_network("context_fcn_resnet50_16s", classes) for classes in (5, 21))
    start = {key: value.clone() for key, value in network.state_dict().items()}
    save_checkpoint(tmp_path / "checkpoint.pt", {"model": former.state_dict()})
    taken = load_start(network, tmp_path / "checkpoint.pt")
    per_class = {"classifier.predict.weight", "classifier.predict.bias"}
    assert taken == sum(key.startswith("classifier.") for key in start) - len(per_class)
    for key, value in network.state_dict().items():
        assert value.equal(start[key] if key in per_class else former.state_dict()[key])


RECIPE = load_recipe(find_recipe("cpu"), ['network = "fcn_resnet50_32s"'])
PETS = LabelSet(names=("background", "cat", "dog"), colors=((0, 0, 0), (1, 1, 1), (2, 2, 2)))


def save_run(path: Path, classes: int, **entries: object) -> None:
    """Write a run's checkpoint with an untrained network."""
    model = build_network(RECIPE.network, classes).state_dict()
    save_checkpoint(path, {"recipe": RECIPE.model_dump(mode="json"), "model": model, **entries})


def test_a_checkpoint_names_its_classes(tmp_path: Path) -> None:
    """Its label set decides how many classes the network has; without one they are VOC's."""
    save_run(tmp_path / "pets.pt", 3, labels=PETS.model_dump(mode="json"))
    save_run(tmp_path / "vocs.pt", 21)
    for name, labels in (("pets", PETS), ("vocs", VOC_LABELS)):
        trained = load_network(tmp_path / f"{name}.pt")
        assert trained.labels == labels
        assert trained.network.get_parameter("classifier.predict.bias").shape == (len(labels),)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (VOC_LABELS.model_dump(mode="json"), "size mismatch"),
        ({"names": ["background", "cat", "dog"], "colors": []}, "3 classes, but 0 colors"),
    ],
)
def test_a_label_set_that_does_not_fit_is_refused(
    tmp_path: Path, labels: dict[str, Any], reason: str
) -> None:
    """Of another number of classes than the weights, or invalid."""
    save_run(tmp_path / "checkpoint.pt", 3, labels=labels)
    with pytest.raises(CheckpointError, match=reason):
        load_network(tmp_path / "checkpoint.pt")


def test_a_former_runs_backbone_is_taken(tmp_path: Path) -> None:
    """A checkpoint's backbone can be the starting weights."""
    source, backbone = small_backbone(), small_backbone()
    trained = {f"backbone.{key}": value for key, value in source.state_dict().items()}
    state = {"model": {**trained, "classifier.weight": torch.zeros(2, 2)}, "iteration": 9}
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    load_backbone(backbone, tmp_path / "checkpoint.pt")
    assert backbone.state_dict()["0.weight"].equal(source.state_dict()["0.weight"])


def test_keys_that_do_not_fit_are_all_listed(tmp_path: Path) -> None:
    """Missing keys, unknown keys and wrong shapes, in one message; nothing is loaded."""
    weights = small_backbone().state_dict()
    del weights["0.bias"]
    weights["0.weight"] = torch.zeros(4, 3, 3, 3)
    weights["layer9.weight"] = torch.zeros(1)
    torch.save(weights, tmp_path / "weights.pth")
    backbone = small_backbone()
    before = backbone.state_dict()["1.weight"].clone()
    with pytest.raises(CheckpointError) as caught:
        load_backbone(backbone, tmp_path / "weights.pth")
    message = str(caught.value)
    assert "3 keys do not fit" in message
    assert "missing: 0.bias" in message
    assert "unknown: layer9.weight" in message
    assert "shape (4, 3, 3, 3), expected (4, 3, 1, 1): 0.weight" in message
    assert backbone.state_dict()["1.weight"].equal(before)


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_code_in_weights_is_not_run(tmp_path: Path) -> None:
    """A hostile pickle as .pth and an .npz of objects are refused."""
    proof = tmp_path / "proof"
    torch.save({"conv1.weight": Payload(proof)}, tmp_path / "weights.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(proof)))
    np.savez(tmp_path / "weights.npz", w=np.array([Payload(proof)], dtype=object))
    for name in ("weights.pth", "plain.pth", "weights.npz"):
        with pytest.raises(CheckpointError, match=name):
            load_backbone(small_backbone(), tmp_path / name)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["absent.pth", "absent.npz", "absent.safetensors", "weights.h5"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """Missing, or in an unsupported format."""
    with pytest.raises(CheckpointError, match=name):
        load_backbone(small_backbone(), tmp_path / name)


def test_checkpoints_are_replaced_whole(tmp_path: Path) -> None:
    """The last state is read back, and no temporary file remains."""
    path = tmp_path / "run" / "checkpoint.pt"
    for iteration in (1, 2):
        save_checkpoint(path, {"iteration": iteration, "w": torch.ones(3)})
    assert load_checkpoint(path)["iteration"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_foreign_file_is_no_checkpoint(tmp_path: Path) -> None:
    """A weights file in place of a run's checkpoint is refused with the reason."""
    path = tmp_path / "weights.pt"
    torch.save({"conv1.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a training run"):
        load_network(path)


def test_rounded_weights_change_the_kernels_alone() -> None:
    """Four-dimensional weights become fp16; BatchNorm and biases keep fp32."""
    dtypes = {key: value.dtype for key, value in rounded_weights(small_backbone()).items()}
    assert dtypes["0.weight"] == torch.float16
    assert dtypes["0.bias"] == dtypes["1.weight"] == dtypes["1.running_var"] == torch.float32


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the file and the cause; the old checkpoint remains."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"iteration": 1})

    def on_a_full_disk(_: Path) -> IO[bytes]:
        return Path("/dev/full").open("wb", buffering=0)

    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoint.write_atomically", on_a_full_disk)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: .*No space left on device"):
            save_checkpoint(path, {"iteration": torch.zeros(100_000)})
    assert load_checkpoint(path) == {"iteration": 1}
