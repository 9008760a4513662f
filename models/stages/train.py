r"""Train a network from a recipe.

    python -m models train --recipe models/recipes/cpu.toml --data VOCdevkit \
        --weights resnet50.npz --out runs/cpu --device cpu

Rerun the command to resume from ``checkpoint.pt`` in ``--out``; the data order is the same as
without the interruption. TensorBoard logs are written beside it. Under ``torchrun`` each process
takes its share of every batch, on its own device:

    torchrun --nproc-per-node 8 -m models train --recipe models/recipes/full.toml ...
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from models.checkpoint import (
    CheckpointError,
    labels_of,
    load_checkpoint,
    load_start,
    rounded_weights,
    save_checkpoint,
)
from models.dataset import Sample, hold_out, read_split
from models.errors import StageError
from models.losses import cross_entropy
from models.networks import SegmentationNetwork, build_network
from models.networks.segmentation import Features
from models.prediction import open_device, predict_photo, score, torch_infer
from models.recipe import Recipe, find_recipe, load_recipe
from models.training_set import ResumableBatches, TrainingSet, repeat_factors
from models.transforms import Augmentation
from service.artefact.labels import VOC_LABELS, LabelSet

LOG_EVERY = 20
"""Iterations between two readings of the loss: each reading waits for the device."""


RANDOM = Path("random")


class TrainingError(StageError):
    """The run cannot continue; the message gives the reason. The last checkpoint remains."""


Autocast = Callable[[], AbstractContextManager[object]]


def learning_rate_factor(iteration: int, recipe: Recipe) -> float:
    """Poly schedule per iteration (Chen et al. 2015), after a linear warm-up; in (0, 1]."""
    warm_up = min(1.0, (iteration + 1) / (recipe.warm_up_iterations + 1))
    return float(warm_up * (1 - iteration / recipe.iterations) ** recipe.poly_power)


def parameter_groups(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and weight decay.

    The head starts from random weights and learns faster. BatchNorm and biases (the 1-D parameters)
    are not decayed (He et al., "Bag of Tricks", 2019).
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = (not name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": recipe.learning_rate * (recipe.head_learning_rate_factor if head else 1),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (head, decayed), parameters in groups.items()
    ]


def set_training_mode(network: SegmentationNetwork, recipe: Recipe) -> None:
    """Put the network in training mode, except for the parts that the recipe freezes."""
    network.train()
    for stage in network.backbone.stages()[: recipe.frozen_stages]:
        for module in stage:
            module.requires_grad_(requires_grad=False).eval()
    if recipe.batch_norm == "frozen":
        for module in network.backbone.modules():
            # SyncBatchNorm replaces BatchNorm2d on several GPUs and is not its subclass.
            if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
                module.eval()


def make_autocast(device: torch.device, recipe: Recipe) -> Autocast:
    """Return a factory of contexts that run the network at the recipe's precision."""
    if recipe.precision == "fp32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


class Run:
    """One training run: the state that a checkpoint stores, and how it is restored."""

    def __init__(
        self,
        recipe: Recipe,
        labels: LabelSet,
        device: torch.device,
        checkpoint: Path,
        weights: Path | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.labels = labels
        self.device = device
        self.checkpoint = checkpoint
        self.rank, self.world = rank, world
        self.iteration = 0
        self.history: list[dict[str, float]] = []
        network = build_network(recipe.network, len(labels))
        state = load_checkpoint(checkpoint) if checkpoint.exists() else None
        if state is None:
            if weights is None:
                raise CheckpointError("a new run needs --weights: a file, or random")
            if weights != RANDOM:
                load_start(network, weights)
        if world > 1 and device.type == "cuda":
            # One process's share of the batch is too small for its own statistics.
            nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        set_training_mode(self.network, recipe)
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.network, recipe),
            lr=recipe.learning_rate,
            momentum=recipe.momentum,
        )
        for group in self.optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        # Buffers too: BatchNorm's statistics belong to the weights that produced them.
        self.ema = AveragedModel(self.network, use_buffers=True)
        if state is not None:
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        if labels_of(state) != self.labels:
            raise CheckpointError(
                f"{self.checkpoint}: from another label set; choose another --out"
            )
        saved = Recipe.model_validate(state["recipe"])
        if saved != self.recipe:
            changed = [
                name
                for name, value in self.recipe.model_dump().items()
                if value != saved.model_dump()[name]
            ]
            raise CheckpointError(
                f"{self.checkpoint}: from another recipe ({', '.join(changed)} differ); "
                "choose another --out"
            )
        self.network.load_state_dict(state["network"])
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(state["iteration"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]
        self.history = state["history"]

    def average(self) -> None:
        """Update the moving average of the network's weights.

        At iteration i the decay is at most ``(1 + i) / (10 + i)``, so that a short run forgets the
        head's random start (TensorFlow's ExponentialMovingAverage).
        """
        decay = min(self.recipe.ema_decay, (1 + self.iteration) / (10 + self.iteration))
        self.ema.multi_avg_fn = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self.ema.update_parameters(self.network)

    def save(self) -> None:
        """Write the checkpoint; `evaluate` and `export` read its ``model``."""
        save_checkpoint(
            self.checkpoint,
            {
                "recipe": self.recipe.model_dump(mode="json"),
                "labels": self.labels.model_dump(mode="json"),
                "iteration": self.iteration,
                "history": self.history,
                "model": rounded_weights(self.ema.module),
                "network": self.network.state_dict(),
                "ema": self.ema.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def evaluate(self, samples: list[Sample], autocast: Autocast) -> tuple[float, float]:
        """Return the averaged network's mean IoU and pixel accuracy on held-out samples."""
        infer = torch_infer(self.ema.module, self.device, autocast)
        matrix = score(
            lambda image: predict_photo(
                image,
                infer,
                working_size=self.recipe.working_size,
                stride=self.network.stride,
            ),
            samples,
            len(self.labels),
        )
        return matrix.mean_iou(), matrix.pixel_accuracy()


def frozen_features(
    network: SegmentationNetwork, recipe: Recipe
) -> Callable[[Tensor], Features | None]:
    """Return a function that computes the frozen stages' features faster than training does.

    These stages do not change, so the compiler may fold their BatchNorms and choose the weights'
    layout for the device.
    """
    stages = recipe.frozen_stages
    if not stages:
        return lambda image: None
    copy = deepcopy(network).eval()
    leading: Callable[[Tensor, int], Features] = copy.leading
    if recipe.compile:
        leading = torch.compile(leading, options={"freezing": True})

    def features(image: Tensor) -> Features:
        with torch.no_grad():
            return leading(image, stages)

    return features


def train(run: Run, training: TrainingSet, held_out: list[Sample]) -> None:
    """Run the recipe to its end and save checkpoints on the way."""
    recipe, device, network = run.recipe, run.device, run.network
    rank, world = run.rank, run.world
    autocast = make_autocast(device, recipe)
    with autocast():
        leading = frozen_features(network, recipe)
    forward: nn.Module = network
    if world > 1:
        forward = DistributedDataParallel(network)
    if recipe.compile and not recipe.frozen_stages:
        forward = torch.compile(forward)  # type: ignore[assignment]
    mean_iou = run.history[-1]["mean_iou"] if run.history else math.nan
    batches = ResumableBatches(
        repeat_factors(training.present, recipe.repeat_threshold),
        recipe.batch_size,
        run.iteration,
        recipe.iterations,
        recipe.seed,
    )
    with (
        _tensorboard(run) as writer,
        tqdm(
            total=recipe.iterations * recipe.batch_size,
            initial=run.iteration * recipe.batch_size,
            unit="images",
            smoothing=0.02,
            mininterval=5,
            dynamic_ncols=True,
            disable=rank > 0,
        ) as progress,
    ):
        for keys in batches:
            factor = learning_rate_factor(run.iteration, recipe)
            for group in run.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
            batch = training.batch(keys[rank::world])
            image = batch.image.contiguous(memory_format=torch.channels_last)
            with autocast():
                logits = forward(image, leading(image))
            loss = cross_entropy(logits, batch.target, run.iteration)
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            run.optimizer.step()
            run.average()
            run.iteration += 1

            last = run.iteration == recipe.iterations
            if run.iteration % LOG_EVERY == 0 or last:
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(f"loss is {value} at iteration {run.iteration}")
                rate = recipe.learning_rate * factor
                if writer is not None:
                    writer.add_scalar("train/loss", value, run.iteration)
                    writer.add_scalar("train/learning_rate", rate, run.iteration)
                progress.set_postfix(
                    loss=f"{value:.3f}",
                    mIoU="-" if math.isnan(mean_iou) else f"{mean_iou:.3f}",
                    rate=f"{rate:.1e}",
                    refresh=False,
                )
            progress.update(recipe.batch_size)
            if writer is None:
                continue
            if run.iteration % recipe.evaluate_every == 0 or last:
                mean_iou, accuracy = run.evaluate(held_out, autocast)
                run.history.append(
                    {
                        "iteration": run.iteration,
                        "mean_iou": mean_iou,
                        "pixel_accuracy": accuracy,
                    }
                )
                writer.add_scalar("held_out/mean_iou", mean_iou, run.iteration)
                writer.add_scalar("held_out/pixel_accuracy", accuracy, run.iteration)
                tqdm.write(
                    f"iteration {run.iteration}: held-out mIoU {mean_iou:.4f}, "
                    f"pixel accuracy {accuracy:.4f}"
                )
            if run.iteration % recipe.checkpoint_every == 0 or last:
                run.save()


@contextlib.contextmanager
def _tensorboard(run: Run) -> Iterator[SummaryWriter | None]:
    """The first process's log; None in the others, which do not evaluate or save."""
    if run.rank > 0:
        yield None
        return
    folder = run.checkpoint.parent / "tensorboard"
    with SummaryWriter(folder, purge_step=run.iteration) as writer:
        yield writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's options."""
    parser.add_argument(
        "--recipe",
        type=find_recipe,
        required=True,
        help="TOML of hyper-parameters, or the name of one in models/recipes",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a value of the recipe, such as jitter=0.1; may be repeated",
    )
    parser.add_argument("--data", type=Path, required=True, help="VOCdevkit, or its VOC2012")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and logs")
    parser.add_argument(
        "--weights",
        type=Path,
        help="torchvision-layout backbone or a checkpoint to start from, or the word random",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(args: argparse.Namespace) -> int:
    """Start or resume a run."""
    recipe, labels = load_recipe(args.recipe, args.set), VOC_LABELS
    samples, held_out = hold_out(read_split(args.data, recipe.split, labels), recipe.held_out)
    with processes(args.device) as (rank, world, device):
        checkpoint = args.out / "checkpoint.pt"
        run = Run(recipe, labels, device, checkpoint, args.weights, rank, world)
        if run.iteration:
            tqdm.write(f"resuming {run.checkpoint} at iteration {run.iteration}")
        augmentation = Augmentation(
            recipe.crop_size, recipe.working_size, recipe.scale_range, recipe.jitter
        )
        training = TrainingSet(samples, augmentation, recipe.seed, device)
        if rank == 0 and (empty := training.without_class()):
            tqdm.write(
                f"{len(empty)} of {len(samples)} training masks show nothing but background or "
                f"void, such as {empty[0].mask_path}"
            )
        train(run, training, held_out)
    return 0


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """Join the processes of ``torchrun``, if it started this one.

    Yields:
        This process's rank, the number of processes, and this one's device: its own GPU for
        ``cuda``.
    """
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, open_device(device)
        return
    cuda = device == "cuda"
    own = open_device(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), own
    finally:
        dist.destroy_process_group()
