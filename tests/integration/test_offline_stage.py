"""The offline stages from recipe to served artefact, on a made-up data set, in a few steps."""

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from models.__main__ import main
from models.checkpoint import load_checkpoint, load_network, save_checkpoint
from models.dataset import read_split
from models.graphs.network_file import NETWORK_FILES
from models.networks import build_network
from models.prediction import torch_infer
from models.stages import evaluate, train
from service.artefact.labels import VOC_LABELS
from service.artefact.manifest import FileEntry, load_manifest, read_files
from tests.clients import serving
from tests.voc_data import make_voc

NETWORK = "atrous_fcn_resnet50_16s"
RECIPE = f"""
network = "{NETWORK}"
split = "train"
held_out = 2
iterations = 10
batch_size = 4
crop_size = 64
working_size = 128
scale_range = [0.8, 1.2]
jitter = 0.1
repeat_threshold = 0.1
learning_rate = 0.01
head_learning_rate_factor = 10.0
momentum = 0.9
weight_decay = 1e-4
poly_power = 0.9
warm_up_iterations = 2
ema_decay = 0.5
frozen_stages = 3
batch_norm = "frozen"
precision = "fp32"
compile = false
checkpoint_every = 2
evaluate_every = 10
"""


class Offline:
    """A folder with data, starting weights and a recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = make_voc(folder, images=8)
        self.weights = folder / "weights.npz"
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(RECIPE, encoding="utf-8")
        torch.manual_seed(0)
        backbone = build_network(NETWORK).backbone
        # Untrained residual sums grow with depth; damped, a few steps suffice to learn colours.
        for name, parameter in backbone.named_parameters():
            if name.endswith("bn3.weight"):
                parameter.data.fill_(0.2)
        state: dict[str, Any] = {k: v.numpy() for k, v in backbone.state_dict().items()}
        np.savez(self.weights, **state)

    def train_arguments(self, run: str) -> list[str]:
        """The command line of a training run into folder ``run``."""
        options = {
            "--recipe": self.recipe,
            "--data": self.data,
            "--weights": self.weights,
            "--out": self.folder / run,
            "--device": "cpu",
        }
        return ["train", *(str(part) for pair in options.items() for part in pair)]

    def stage(self, name: str, **options: object) -> int:
        """Run a stage as ``python -m models`` does; returns its exit status."""
        arguments = [name]
        for key, value in options.items():
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{key.replace('_', '-')}", *map(str, values)]
        return main(arguments)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Offline]:
    """Trained once for the module, on one thread: reproducible to the bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Offline(tmp_path_factory.mktemp("offline"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "LOG_EVERY", 1)
        assert main(made.train_arguments("run")) == 0
    yield made
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def artefact(offline: Offline) -> Path:
    """Exported, written in every precision, evaluated, verified, with its manifest."""
    folder = offline.folder / "artifacts" / "tiny_fcn"
    checkpoint = offline.folder / "run" / "checkpoint.pt"
    evaluations, parity = offline.folder / "evaluation", offline.folder / "parity.json"
    assert offline.stage("export", checkpoint=checkpoint, artifact=folder, version="1.2.3") == 0
    assert offline.stage("half", artifact=folder) == 0
    assert offline.stage("quantize", artifact=folder, data=offline.data, images=4) == 0
    for precision in NETWORK_FILES:
        out = evaluations / precision
        assert (
            offline.stage(
                "evaluate", artifact=folder, data=offline.data, out=out, precision=precision
            )
            == 0
        )
    assert (
        offline.stage(
            "verify", checkpoint=checkpoint, artifact=folder, data=offline.data, out=parity
        )
        == 0
    )
    assert (
        offline.stage(
            "manifest",
            artifact=folder,
            checkpoint=checkpoint,
            evaluation=[evaluations / precision / "evaluation.json" for precision in NETWORK_FILES],
            parity=parity,
            weights_licence="none: random",
            data_licence="none: made up",
        )
        == 0
    )
    return folder


def losses(run: Path) -> list[float]:
    """The training losses in TensorBoard, in order."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def test_training_reduces_the_loss(offline: Offline) -> None:
    """After ten steps on coloured rectangles it is well below the first step's."""
    values = losses(offline.folder / "run")
    assert len(values) == 10
    assert np.mean(values[-3:]) < 0.7 * values[0]


def test_frozen_parts_keep_their_weights_and_the_rest_learns(offline: Offline) -> None:
    """The recipe freezes layer2, not layer4; running statistics do not change."""
    trained = load_checkpoint(offline.folder / "run" / "checkpoint.pt")["network"]
    with np.load(offline.weights) as start:
        for key in ("layer2.0.conv1.weight", "layer4.2.bn3.running_mean"):
            assert np.array_equal(trained[f"backbone.{key}"].numpy(), start[key])
        key = "layer4.0.conv1.weight"
        assert not np.array_equal(trained[f"backbone.{key}"].numpy(), start[key])


def test_a_killed_run_resumes_to_the_same_weights(offline: Offline) -> None:
    """`kill -9` after a checkpoint and a rerun give the uninterrupted run's weights."""
    checkpoint = offline.folder / "killed" / "checkpoint.pt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILL_AT_FIRST_CHECKPOINT, *offline.train_arguments("killed")],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    assert load_checkpoint(checkpoint)["iteration"] == 2

    assert main(offline.train_arguments("killed")) == 0
    ours = load_checkpoint(checkpoint)
    theirs = load_checkpoint(offline.folder / "run" / "checkpoint.pt")
    assert ours["iteration"] == 10
    for part in ("network", "ema", "model"):
        assert ours[part].keys() == theirs[part].keys()
        for key, value in ours[part].items():
            torch.testing.assert_close(value, theirs[part][key], rtol=1e-5, atol=1e-6)


KILL_AT_FIRST_CHECKPOINT = """
import os, signal, sys
from models.stages import train
from models.__main__ import main

save = train.Run.save

def save_and_die(run):
    save(run)
    os.kill(os.getpid(), signal.SIGKILL)

train.Run.save = save_and_die
main(sys.argv[1:])
"""


def test_two_processes_train_as_one(offline: Offline) -> None:
    """Under torchrun each takes half of every batch; the weights change like one process's."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "models", *offline.train_arguments("two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *arguments], env=environment, check=True, capture_output=True)
    ours = load_checkpoint(offline.folder / "two" / "checkpoint.pt")
    theirs = load_checkpoint(offline.folder / "run" / "checkpoint.pt")
    assert ours["iteration"] == 10
    with np.load(offline.weights) as start:
        for key in ("layer3.0.conv2.weight", "layer4.2.conv3.weight"):
            before = torch.from_numpy(start[key])
            moved = [run["network"][f"backbone.{key}"] - before for run in (ours, theirs)]
            # Not to the last bit: the mean of two halves' means weights void pixels differently.
            assert (moved[0] - moved[1]).norm() < 0.2 * moved[1].norm()
    assert len(list((offline.folder / "two" / "tensorboard").iterdir())) == 1


def test_another_recipe_does_not_continue_a_run(
    offline: Offline, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message names the difference, and the checkpoint is unchanged."""
    other = offline.folder / "other.toml"
    other.write_text(RECIPE.replace("momentum = 0.9", "momentum = 0.8"), encoding="utf-8")
    arguments = [
        str(other) if part == str(offline.recipe) else part
        for part in offline.train_arguments("run")
    ]
    assert main(arguments) == 1
    assert "momentum differ" in capsys.readouterr().err
    assert load_checkpoint(offline.folder / "run" / "checkpoint.pt")["iteration"] == 10


def test_another_label_set_does_not_continue_a_run(
    offline: Offline, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's checkpoint names its classes: one of a run on renamed classes is refused."""
    checkpoint = offline.folder / "renamed" / "checkpoint.pt"
    state = load_checkpoint(offline.folder / "run" / "checkpoint.pt")
    assert state["labels"] == VOC_LABELS.model_dump(mode="json")
    save_checkpoint(checkpoint, renamed(state))
    assert main(offline.train_arguments("renamed")) == 1
    assert "from another label set; choose another --out" in capsys.readouterr().err


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with another name for class 1."""
    labels = state["labels"]
    return {**state, "labels": {**labels, "names": ["background", "plane", *labels["names"][2:]]}}


@pytest.mark.parametrize("split", ["val", "trainval"])
def test_val_has_no_part_in_calibration(
    offline: Offline, artefact: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before any file is read."""
    assert offline.stage("quantize", artifact=artefact, data=offline.data, split=split) == 1
    assert f"--split {split}: photos to score on" in capsys.readouterr().err


def test_the_graph_is_what_the_contract_promises(artefact: Path) -> None:
    """Opset 18, BatchNorm folded, dynamic batch and size, no local path."""
    path = artefact / "network.onnx"
    model = onnx.load(path)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert str(Path.cwd()).encode() not in path.read_bytes()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 64, 96, 3), (3, 96, 64, 3)):
        (logits,) = session.run(["logits"], {"image": np.zeros(shape, dtype=np.uint8)})
        assert logits.shape == (shape[0], 21, shape[1] // 16, shape[2] // 16)


def test_the_manifest_holds_what_was_measured(artefact: Path, offline: Offline) -> None:
    """Accuracy, parity, recipe and licences of exactly these files."""
    manifest = load_manifest(artefact)
    read_files(artefact, manifest)
    assert (manifest.name, manifest.version) == ("tiny_fcn", "1.2.3")
    assert {name: entry.precision for name, entry in manifest.files.items()} == {
        name: precision for precision, name in NETWORK_FILES.items()
    }
    for precision in NETWORK_FILES:
        path = offline.folder / "evaluation" / precision / "evaluation.json"
        assert manifest.metrics[precision].model_dump() == json.loads(path.read_text())["metrics"]
    assert manifest.recipe["crop_size"] == 64
    assert manifest.licences["starting_weights"] == "none: random"
    assert manifest.parity["passed"] is True
    compared: Any = manifest.parity["shapes"]
    assert len({tuple(record["shape"]) for record in compared}) >= 3
    assert {record["batch"] for record in compared} == {1, 4}


def test_evaluation_draws_its_pictures(offline: Offline, artefact: Path) -> None:
    """Charts and sheets of photo, truth and prediction are valid images."""
    assert artefact.is_dir()
    names = ("per_class_iou.png", "boundary_iou.png", "contact_sheet.png", "worst.png")
    for name in names:
        with Image.open(offline.folder / "evaluation" / "fp32" / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 5


@pytest.fixture(scope="module")
def undecided(offline: Offline, artefact: Path) -> tuple[Path, Path]:
    """The run's checkpoint and artefact, with the background's lead subtracted from its bias.

    After ten steps all pixels are background: scores would agree even if a path were wrong.
    """
    bias = "classifier.predict.bias"
    checkpoint, folder = offline.folder / "undecided.pt", offline.folder / "undecided"
    network = load_network(offline.folder / "run" / "checkpoint.pt").network
    image, _ = read_split(offline.data, "val")[0].load()
    logits = torch_infer(network, torch.device("cpu"))(np.array(image)[None])[0]
    network.get_parameter(bias).data[0] -= (logits[0] - logits[1:].amax(0)).median()
    state = load_checkpoint(offline.folder / "run" / "checkpoint.pt")
    state["model"][bias] = network.get_parameter(bias).data
    save_checkpoint(checkpoint, state)

    model = onnx.load(artefact / "network.onnx")
    (tensor,) = [t for t in model.graph.initializer if t.name == f"network.{bias}"]
    tensor.raw_data = state["model"][bias].numpy().tobytes()
    folder.mkdir()
    onnx.save(model, folder / "network.onnx")
    files = {"network.onnx": FileEntry.of(folder / "network.onnx", "fp32")}
    load_manifest(artefact).model_copy(update={"files": files}).write(folder)
    return checkpoint, folder


def test_checkpoint_artefact_and_service_score_alike(
    undecided: tuple[Path, Path],
    offline: Offline,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Within 0.05 points of mean IoU, on photos that have to be resized."""
    checkpoint, folder = undecided
    data = make_voc(tmp_path, images=4, size=(120, 160))
    with serving(folder, precision="fp32") as server:
        for option in ({"checkpoint": checkpoint}, {"artifact": folder}, {"url": server.url}):
            (name,) = option
            assert offline.stage("evaluate", data=data, out=tmp_path / name, **option) == 0
    reports = [
        json.loads((tmp_path / name / "evaluation.json").read_text())
        for name in ("artifact", "checkpoint", "url")
    ]
    per_class = reports[0]["metrics"]["per_class_iou"]
    assert sum(iou is not None and iou > 0.05 for iou in per_class.values()) >= 2
    for report in reports[1:]:
        for key in ("miou", "pixel_accuracy"):
            assert report["metrics"][key] == pytest.approx(reports[0]["metrics"][key], abs=5e-4)
    assert "article behind this project" in capsys.readouterr().out


def test_the_worst_photos_are_named(artefact: Path, offline: Offline) -> None:
    """Each once, the lowest mean IoU first, with its confusions."""
    assert artefact.is_dir()
    report = json.loads((offline.folder / "evaluation" / "fp32" / "evaluation.json").read_text())
    names = [described["name"] for described in report["worst"]]
    assert sorted(names) == [sample.name for sample in read_split(offline.data, "val")]
    scores = [described["miou"] for described in report["worst"]]
    assert scores == sorted(scores)
    assert all(described["confused"] for described in report["worst"] if described["miou"] < 1)


@pytest.mark.parametrize("protocol", ["mmseg", "keras-fcn"])
def test_an_int8_network_takes_other_protocols_sizes(
    protocol: str, artefact: Path, offline: Offline
) -> None:
    """They are not among the contract's shapes for photos of this size."""
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    options = {"artifact": artefact, "precision": "int8", "protocol": protocol, "data": "x"}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    predict, _, source = evaluate.open_predictor(parser.parse_args(arguments))
    image, _ = read_split(offline.data, "val")[0].load()
    assert predict(image).shape == (image.height, image.width)
    assert source["sha256"] == load_manifest(artefact).files["network.int8.onnx"].sha256


def test_a_manifest_takes_the_services_protocol_only(
    offline: Offline, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under another protocol a network may score better than the service."""
    report = json.loads((offline.folder / "evaluation" / "fp32" / "evaluation.json").read_text())
    other = tmp_path / "evaluation.json"
    other.write_text(json.dumps({**report, "protocol": "mmseg"}), encoding="utf-8")
    evaluations = [offline.folder / "evaluation" / p / "evaluation.json" for p in ("fp16", "int8")]
    status = offline.stage(
        "manifest",
        artifact=artefact,
        checkpoint=offline.folder / "run" / "checkpoint.pt",
        evaluation=[other, *evaluations],
        parity=offline.folder / "parity.json",
        weights_licence="x",
        data_licence="x",
    )
    assert status == 1
    assert "another protocol than the service's" in capsys.readouterr().err


def test_verify_fails_below_the_gate(offline: Offline, artefact: Path, tmp_path: Path) -> None:
    """Another network's checkpoint: non-zero exit, and a report."""
    state = load_checkpoint(offline.folder / "run" / "checkpoint.pt")
    weight = state["model"]["classifier.predict.weight"]
    weight.copy_(weight.roll(1, dims=0))
    save_checkpoint(tmp_path / "other.pt", state)
    parity = tmp_path / "parity.json"
    status = offline.stage(
        "verify", checkpoint=tmp_path / "other.pt", artifact=artefact, data=offline.data, out=parity
    )
    assert status == 1
    assert json.loads(parity.read_text())["passed"] is False


def test_verify_compares_the_label_sets(
    offline: Offline, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An artefact from before a class was renamed is not the checkpoint's."""
    state = load_checkpoint(offline.folder / "run" / "checkpoint.pt")
    other, parity = tmp_path / "other.pt", tmp_path / "parity.json"
    save_checkpoint(other, renamed(state))
    status = offline.stage(
        "verify", checkpoint=other, artifact=artefact, data=offline.data, out=parity
    )
    assert status == 1
    assert "network.onnx: its label set differs from the checkpoint's" in capsys.readouterr().err
    assert not parity.exists()


def test_a_manifest_needs_an_evaluation_of_the_same_file(
    offline: Offline, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation of an earlier export does not cover this one."""
    report = json.loads((offline.folder / "evaluation" / "fp32" / "evaluation.json").read_text())
    report["sha256"] = "0" * 64
    stale = tmp_path / "evaluation.json"
    stale.write_text(json.dumps(report), encoding="utf-8")
    status = offline.stage(
        "manifest",
        artifact=artefact,
        checkpoint=offline.folder / "run" / "checkpoint.pt",
        evaluation=stale,
        parity=offline.folder / "parity.json",
        weights_licence="x",
        data_licence="x",
    )
    assert status == 1
    assert "run evaluate again" in capsys.readouterr().err


def test_a_manifest_needs_every_network_verified(
    offline: Offline, artefact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report of `verify` does not cover a network added later."""
    report = json.loads((offline.folder / "parity.json").read_text())
    del report["set"]["pixel_agreement"]["fp16"]
    stale = tmp_path / "parity.json"
    stale.write_text(json.dumps(report), encoding="utf-8")
    status = offline.stage(
        "manifest",
        artifact=artefact,
        checkpoint=offline.folder / "run" / "checkpoint.pt",
        evaluation=[offline.folder / "evaluation" / p / "evaluation.json" for p in NETWORK_FILES],
        parity=stale,
        weights_licence="x",
        data_licence="x",
    )
    assert status == 1
    assert "network.fp16.onnx: run verify again" in capsys.readouterr().err


def test_a_new_run_needs_starting_weights(
    offline: Offline, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, no traceback."""
    arguments = offline.train_arguments("weightless")
    at = arguments.index("--weights")
    assert main(arguments[:at] + arguments[at + 2 :]) == 1
    assert capsys.readouterr().err == "train: a new run needs --weights: a file, or random\n"


def test_an_absent_device_is_named(offline: Offline, capsys: pytest.CaptureFixture[str]) -> None:
    """GPU 1000 does not exist; training stops with one line."""
    arguments = offline.train_arguments("deviceless")
    arguments[arguments.index("--device") + 1] = "cuda:1000"
    assert main(arguments) == 1
    assert "train: device cuda:1000: " in capsys.readouterr().err


def test_a_bad_mask_stops_training_with_its_name(
    tmp_path: Path, offline: Offline, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the file, whichever thread reads it."""
    data = make_voc(tmp_path, images=8)
    mask = read_split(data, "train")[3].mask_path
    mask.write_bytes(b"not a mask")
    arguments = [
        str(data) if part == str(offline.data) else part
        for part in offline.train_arguments("bad_mask")
    ]
    assert main(arguments) == 1
    assert mask.name in capsys.readouterr().err
