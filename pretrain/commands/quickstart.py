"""Pre-train a tiny model on a few photographs in two minutes, offline, and show what it learned.

The photographs come with scikit-image, so nothing is downloaded. The model overfits them, which says
little about features and a lot about whether everything works: reading, masks, training, reconstruction,
saving and loading. Beside it stands what weights that come with the package, `tiny-64`, make of these
photographs, which they never saw.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from coma.arguments import parse_arguments
from coma.config import (
    DataConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    dyvit_preset,
    method_preset,
)
from coma.config.serialization import read_config
from coma.errors import BadInput, CheckFailed
from coma.image_size import ImageSize
from coma.paths import SHIPPED
from coma.preflight import require_folder, require_packages
from coma.ranges import Range, Ranged

if TYPE_CHECKING:
    from torch import Tensor

    from coma.artifact import ArtifactConfig
    from coma.objectives import Objective

PHOTOGRAPHS = (
    *("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg"),
    *("retina.jpg", "motorcycle_left.png", "ihc.png", "camera.png"),
)
"""Files of scikit-image's data folder."""

_IMAGE_SIZE = ImageSize.of(64)
_COPY_SIZE = 80  # pixels a side: decoding the originals would take longer than the model does
_UNSEEN = f"{SHIPPED}, which comes with the package, on photographs that it was not trained on"
_TRIALS = 6
_FEWEST_STEPS, _MOST_STEPS = 200, 5000


@dataclass(frozen=True)
class QuickstartConfig(Ranged):
    """Two minutes from photographs to a pre-trained model."""

    out: Path = Path("quickstart")
    """Folder for photographs, run and pictures."""
    minutes: Annotated[float, Range(0, 600, above=True)] = 2.0
    """Training time; a few trial steps determine the number of steps."""
    method: Literal["coma", "coma4", "mae"] = "coma"
    """coma: two complementary views. coma4: four. mae: one view of a quarter of the image."""
    fresh: bool = False
    """Remove an earlier quickstart in --out and start over."""


def run(argv: list[str]) -> None:
    """Trains or resumes, verifies the artifact, draws reconstructions, and lists the results.

    Raises:
        BadInput: settings that cannot be used, or a folder that holds something else.
        CheckFailed: the artifact does not reconstruct what the trained model does.
        Interrupted: Ctrl-C; the same command resumes.
    """
    config = parse_arguments(QuickstartConfig, argv, prog="coma quickstart", description=__doc__)

    require_packages("skimage", "tensorboard", "matplotlib")
    plan = _earlier(config)
    if plan:
        print(f"resuming the quickstart in {config.out} (--fresh starts over)")
    else:
        folder = _copy_photographs(config.out / "pictures")
        print(f"{len(PHOTOGRAPHS)} photographs that come with scikit-image are in {folder}")
        plan = _plan(config)
        print(f"training for {plan.optimizer.steps} steps")

    from coma.objectives.load import load_pretrained
    from pretrain.training import pretrain
    from pretrain.visualize.reconstructions import reconstruction_sheet

    run_directory = pretrain(plan, resume=(plan.run.out / "config.json").exists())
    objective = load_pretrained(run_directory / "artifact")
    about = objective.artifact
    images, seeds = _examples(plan, about)
    verify(plan, objective, images, seeds)
    sheet, unseen = config.out / "reconstructions.png", config.out / f"reconstructions-{SHIPPED}.png"
    reconstruction_sheet(objective, images, seeds, about.mean, about.std, sheet, caption=_caption(about))
    shipped = load_pretrained(SHIPPED)
    images, seeds = _examples(plan, shipped.artifact)
    statistics = shipped.artifact.mean, shipped.artifact.std
    reconstruction_sheet(shipped, images, seeds, *statistics, unseen, caption=_UNSEEN)
    print(_results(run_directory, about, sheet, unseen))
    print(_next_steps(run_directory))


def verify(plan: PretrainConfig, objective: Objective, images: Tensor, seeds: Tensor) -> None:
    """Compares an objective loaded from the artifact with the weights in the training state.

    Args:
        plan: The run; its last training state holds those weights.
        objective: The loaded objective.
        images: `[b, c, H, W]`, normalised.
        seeds: int64 `[b]`, which fix the masks.

    Raises:
        CheckFailed: their reconstructions differ in any bit.
    """
    import torch

    from coma.masking.patchify import unit_grid
    from coma.models import build_encoder
    from coma.objectives import build_objective
    from pretrain.training.checkpoint import read_state

    folder = plan.run.out
    state = read_state(folder / "state", warn=lambda _: None)
    if state is None:
        raise CheckFailed(f"{folder / 'state'}: no training state to verify the artifact against")
    trained = build_objective(plan.objective, build_encoder(plan.model)).eval()
    trained.load_state_dict(state["model"])
    h, w = unit_grid(images.shape[-2], images.shape[-1], objective.encoder.unit)
    for view in objective.draw_visible(seeds, h, w):
        if not torch.equal(objective.reconstruct(images, view), trained.reconstruct(images, view)):
            raise CheckFailed(f"{folder / 'artifact'}: does not reconstruct the same as the trained model")


def _earlier(config: QuickstartConfig) -> PretrainConfig | None:
    """Returns the run that an earlier quickstart started in this folder, if there is one to resume."""
    out, run, pictures = config.out, config.out / "run", config.out / "pictures"
    require_folder(out)
    if not (run / "config.json").exists():
        others = sorted(path.name for path in out.glob("*") if path != pictures)
        if others:
            raise BadInput(f"--out {out}: holds other things ({others[0]}); give a new folder")
        return None
    plan = read_config(run)
    if plan.data.images is None or plan.data.images.name != pictures.name or not pictures.is_dir():
        raise BadInput(f"{run}: is not the run of a quickstart; give another --out")
    if config.fresh:
        for folder in (run, pictures):
            shutil.rmtree(folder)
        return None
    if plan.objective != _objective(config.method):
        raise BadInput(
            f"{run}: is of another method than {config.method}; add --fresh, or give another --out"
        )
    return replace(plan, data=replace(plan.data, images=pictures), run=replace(plan.run, out=run))


def _copy_photographs(folder: Path) -> Path:
    """Writes small square copies of scikit-image's photographs into `folder`, numbered in order."""
    import skimage
    from PIL import Image, ImageOps

    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(PHOTOGRAPHS, start=1):
        shipped = Path(skimage.data_dir) / name
        if not shipped.exists():
            raise BadInput(f"{shipped}: is missing; install scikit-image again")
        with Image.open(shipped) as photograph:
            small = ImageOps.fit(
                photograph.convert("RGB"), (_COPY_SIZE, _COPY_SIZE), Image.Resampling.LANCZOS
            )
        small.save(folder / f"{number}-{Path(name).stem}.png")
    return folder


def _objective(method: str) -> ObjectiveConfig:
    return replace(method_preset(method, decoder_dim=192, decoder_depth=4), norm_pix=False)


def _plan(config: QuickstartConfig) -> PretrainConfig:
    """Returns settings that overfit a few photographs.

    Fewer blocks than `tiny`, nearly fixed crops, plain pixels and many small steps: in two minutes on two
    cores this gave clearer pictures than deeper models, larger batches, or pixels normalised per unit.
    """
    pictures = config.out / "pictures"
    plan = PretrainConfig(
        data=DataConfig(pictures, _IMAGE_SIZE, crop_scale=(0.9, 1.0), flip=False, workers=0),
        model=replace(dyvit_preset("tiny", _IMAGE_SIZE), depths=(1, 1, 2, 1)),
        objective=_objective(config.method),
        optimizer=OptimizerConfig(batch_size=len(PHOTOGRAPHS), base_lr=0.032),
        run=RunConfig(out=config.out / "run", log_steps=10, reconstruction_every=0),
    )
    return replace(plan, optimizer=replace(plan.optimizer, steps=_steps(plan, config.minutes)))


def _steps(plan: PretrainConfig, minutes: float) -> int:
    """Returns how many steps this machine takes in `minutes`, from the fastest of a few."""
    from coma.amp import choose_precision
    from coma.data import BatchLayout, compute_mean_std, open_source, training_batches
    from coma.models import build_encoder
    from coma.objectives import build_objective
    from pretrain.training.distributed import processes
    from pretrain.training.train_step import TrainStep

    source, channels = open_source(plan.data.images or Path()), plan.model.channels
    slices = BatchLayout(plan.optimizer.batch_size, plan.optimizer.batch_size)
    batches = training_batches(source, plan.data, channels=channels, seed=plan.run.seed, batch=slices)
    seconds = []
    with processes(plan.run.device) as group:
        objective = build_objective(plan.objective, build_encoder(plan.model)).to(group.device)
        precision = choose_precision(plan.run.precision, group.device)
        mean, std = compute_mean_std(source, channels, workers=0)
        train_step = TrainStep(objective, plan.optimizer, plan.run, group, slices, precision, mean, std)
        for number in range(_TRIALS):
            began = time.perf_counter()
            train_step(number, 0.0, batches)
            seconds.append(time.perf_counter() - began)
    return min(max(round(60 * minutes / min(seconds)), _FEWEST_STEPS), _MOST_STEPS)


def _examples(plan: PretrainConfig, about: ArtifactConfig) -> tuple[Tensor, Tensor]:
    """Returns the eight photographs, normalised `[8, 3, S, S]`, and seeds `[8]` for their masks."""
    from coma.data import normalized_batches, open_source

    source, size, channels = open_source(plan.data.images or Path()), about.image_size, about.model.channels
    images, batch = next(
        normalized_batches(
            source, about.mean, about.std, image_size=size, channels=channels, batch_size=8, workers=0
        )
    )
    return images, batch.seeds


def _caption(about: ArtifactConfig) -> str:
    steps, images = about.trained["steps"], about.trained["images"]
    return f"A tiny DyViT after {steps} steps on {images} photographs, which it overfits"


def _results(run_directory: Path, about: ArtifactConfig, sheet: Path, unseen: Path) -> str:
    rows = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    artifact = run_directory / "artifact"
    megabytes = (artifact / "model.safetensors").stat().st_size / 1e6
    return f"""
  loss             {rows[0]["loss"]:.3f} -> {rows[-1]["loss"]:.3f} in {about.trained["steps"]} steps
  verified         the artifact, loaded again, reconstructs bit for bit what the trained model does
  reconstructions  {sheet}
  {SHIPPED:<15}  {unseen}: the weights that come with the package, which never saw these photographs
  loss curve       {run_directory / "loss_curve.png"}
  artifact         {artifact} (encoder and decoder, {megabytes:.1f} MB)
  run directory    {run_directory} (settings, metrics, TensorBoard, resumable state)
"""


def _next_steps(run_directory: Path) -> str:
    called = Path(sys.argv[0])
    coma = shlex.quote(str(called)) if called.name == "coma" and not shutil.which("coma") else "coma"
    artifact = shlex.quote(str(run_directory / "artifact"))
    return f"""next:
  {coma} pretrain PHOTOS --out runs/first
      pre-train on your own images
  {coma} pretrain --resume runs/first
      resume after an interruption
  {coma} evaluate {artifact} --data CLASSES
      measure its features on labelled images
  {coma} export {artifact}
      write ONNX files, verified against PyTorch"""
