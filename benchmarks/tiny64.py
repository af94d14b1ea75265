"""How the weights `tiny-64`, which come with the package, are made and measured.

    python benchmarks/tiny64.py data DATA --work WORK            writes WORK/train and WORK/held-out
    python benchmarks/tiny64.py train --work WORK --steps N      pre-trains; the same command resumes
    python benchmarks/tiny64.py ship WORK/run/artifact           writes coma/weights/tiny-64, in 16 bits
    python benchmarks/tiny64.py measure DATA --work WORK         fills in images that models never saw

The weights that ship were trained twice: 14,000 steps, and from these (in another WORK) on with a second
schedule: train --work WORK --steps 10500 -- --init tiny-64 --base-lr 0.024 --seed 1.

DATA holds class-tinyimagenet40, natural1k and det-bccd. Every tenth photograph of natural1k, the test images
of Tiny-ImageNet and the validation images of BCCD are held out. Larger images are reduced to a short side of
128 px, and linked several times, so that every epoch has several crops of them.

`measure` hides half of the mask units (16 px) of held-out images at 64 px, the same ones for all, and reports
PSNR and SSIM: of the mean colour of what is visible, of biharmonic inpainting, and of artifacts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from machine import describe
from PIL import Image, ImageOps
from torch import Tensor

from coma.artifact import load_artifact, load_encoder, save_artifact
from coma.artifact.weights import name_of
from coma.data import normalized_batches, open_source
from coma.objectives.load import load_pretrained
from coma.paths import artifact_directory
from pretrain.evaluate.features import random_encoder
from pretrain.evaluate.protocols import evaluate
from pretrain.visualize.reconstructions import reconstruction_sheet

NAME, SIZE, UNIT = "tiny-64", 64, 16
DATA = "Tiny-ImageNet (40 classes), ImageNet photographs and BCCD"
"""What `data` collects, for the artifact."""
SHORT_SIDE = 128
COPIES = {"natural1k": 6, "det-bccd": 6}
HELD_OUT = 10
"""Every tenth photograph of natural1k, from the fifth on."""
RECIPE = (
    *("--model", "tiny", "--image-size", str(SIZE), "--method", "coma", "--objective.no-norm-pix"),
    *("--objective.decoder.dim", "192", "--objective.decoder.depth", "4", "--objective.decoder.heads", "6"),
    *("--crop-scale", "0.5", "1", "--batch-size", "32", "--optimizer", "muon", "--base-lr", "0.032"),
    *("--warmup", "0.02", "--ema-decay", "0.999", "--precision", "bf16", "--save-minutes", "5"),
    *("--reconstruction-every", "2000", "--workers", "0"),
)
PHOTOGRAPHS = 85
"""Held-out photographs that are filled in; biharmonic inpainting takes about a second for each."""


def make_data(args: argparse.Namespace) -> None:
    """Writes training and held-out images as JPEG files of the sizes that they are read at."""
    for split in ("train", "test"):
        with np.load(args.data / f"class-tinyimagenet40/{split}.npz", allow_pickle=False) as pack:
            folder = args.work / ("train/tinyimagenet" if split == "train" else "held-out/tinyimagenet")
            folder.mkdir(parents=True, exist_ok=True)
            data, ends = pack["data"], pack["offsets"]
            for name, start, end in zip(pack["file_names"], ends, ends[1:], strict=False):
                (folder / Path(str(name)).name).write_bytes(data[start:end].tobytes())
    photographs = sorted((args.data / "natural1k").glob("*.jpg"))
    held_out = set(photographs[HELD_OUT // 2 :: HELD_OUT])
    for path in photographs:
        _reduced(path, args.work, "natural1k", path in held_out)
    for split in ("train", "val"):
        for path in sorted((args.data / f"det-bccd/{split}").glob("*.jpg")):
            _reduced(path, args.work, "det-bccd", split == "val")
    for folder in sorted(args.work.glob("*/*/")):
        print(f"{folder.relative_to(args.work)}: {len(list(folder.iterdir()))} images")


def _reduced(path: Path, work: Path, kind: str, held_out: bool) -> None:
    folder = work / ("held-out" if held_out else "train") / kind
    folder.mkdir(parents=True, exist_ok=True)
    with Image.open(path) as image:
        scale = SHORT_SIDE / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        first = folder / f"{path.stem}.jpg"
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(first, quality=92)
    for number in range(1, 1 if held_out else COPIES[kind]):
        (folder / f"{path.stem}-{number}.jpg").hardlink_to(first)


def train(args: argparse.Namespace) -> None:
    """Starts or resumes the run."""
    run = args.work / "run"
    if (run / "config.json").exists():
        command = ["--resume", str(run), "--steps", str(args.steps)]
    else:
        command = [str(args.work / "train"), "--out", str(run), "--steps", str(args.steps), *RECIPE]
    os.execv(sys.executable, [sys.executable, "-m", "coma", "pretrain", *command, *args.more])


def ship(args: argparse.Namespace) -> None:
    """Writes an artifact into the package, its tensors in 16 bits."""
    artifact = load_artifact(args.artifact)
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in artifact.tensors.items()
    }
    folder = Path(__file__).parents[1] / "coma" / "weights" / NAME
    trained = artifact.config.trained | {"data": DATA}
    save_artifact(folder, tensors=tensors, config=replace(artifact.config, trained=trained))
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def measure(args: argparse.Namespace) -> None:
    """Fills in held-out images by every method, and scores frozen features."""
    sets = {"photographs": "held-out/natural1k", "Tiny-ImageNet": "held-out/tinyimagenet"}
    rows: list[dict[str, Any]] = []
    for name, folder in sets.items():
        images = _images(args.work / folder, PHOTOGRAPHS)
        visible = _visible(len(images))
        rows += [
            {"images": name, "of": len(images), "filled in by": how, **_quality(images, filled, visible)}
            for how, filled in (
                ("mean colour", _mean_colour(images, visible)),
                ("biharmonic", _biharmonic(images, visible)),
                *((name_of(str(path)), _filled_in(path, images, visible)) for path in args.artifacts),
            )
        ]
    features = _features(args) if args.features else []
    record = {"machine": describe(), "filled in": rows, "features": features}
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    if args.sheets:
        _sheets(args)


def _images(folder: Path, count: int) -> Tensor:
    """Returns centre crops, floats in 0..1, `[n, 3, 64, 64]`: evenly spaced among the files by name."""
    paths = sorted(folder.glob("*"))
    chosen = [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)]
    pixels = []
    for path in chosen:
        with Image.open(path) as image:
            crop = ImageOps.fit(image.convert("RGB"), (SIZE, SIZE), Image.Resampling.LANCZOS)
        pixels.append(np.asarray(crop, np.float32) / 255)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def _visible(count: int) -> Tensor:
    """Returns half of the mask units of every image, bool `[n, 4, 4]`, the same in every run."""
    side = SIZE // UNIT
    noise = torch.rand(count, side * side, generator=torch.Generator().manual_seed(0))
    return (noise.argsort(1).argsort(1) < side * side // 2).unflatten(1, (side, side))


def _pixels(visible: Tensor) -> Tensor:
    return repeat(visible, "n h w -> n 1 (h a) (w b)", a=UNIT, b=UNIT)


def _mean_colour(images: Tensor, visible: Tensor) -> Tensor:
    seen = _pixels(visible)
    mean = (images * seen).sum((2, 3), keepdim=True) / seen.sum((2, 3), keepdim=True)
    return torch.where(seen, images, mean)


def _biharmonic(images: Tensor, visible: Tensor) -> Tensor:
    from skimage.restoration import inpaint_biharmonic

    hidden = ~_pixels(visible)[:, 0].numpy()
    filled = [
        inpaint_biharmonic(image.permute(1, 2, 0).numpy(), mask, channel_axis=-1)
        for image, mask in zip(images, hidden, strict=True)
    ]
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2).float()


def _filled_in(artifact: Path, images: Tensor, visible: Tensor) -> Tensor:
    objective = load_pretrained(artifact)
    about = objective.artifact
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (about.mean, about.std))
    return objective.reconstruct((images - mean) / std, visible) * std + mean


def _quality(images: Tensor, filled: Tensor, visible: Tensor) -> dict[str, float]:
    """Returns the mean PSNR of hidden pixels in dB, its standard error, and the SSIM of whole images."""
    from skimage.metrics import structural_similarity

    hidden = (~_pixels(visible)).expand_as(images)
    filled = filled.clamp(0, 1)
    errors = ((images - filled) ** 2 * hidden).sum((1, 2, 3)) / hidden.sum((1, 2, 3))
    psnr = -10 * errors.log10()
    pairs = zip(images.numpy(), filled.numpy(), strict=True)
    ssim = [structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs]
    return {
        "PSNR": round(psnr.mean().item(), 2),
        "standard error": round(psnr.std().item() / len(psnr) ** 0.5, 2),
        "SSIM": round(float(np.mean(ssim)), 3),
    }


def _features(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the accuracy of frozen features on Tiny-ImageNet, of random weights as well."""
    folder = args.data / "class-tinyimagenet40"
    train, test = (open_source(folder / f"{split}.npz") for split in ("train", "test"))
    rows = []
    for path in args.artifacts:
        encoder = load_encoder(path)
        about, label = encoder.artifact, name_of(str(path))
        for name, model in ((label, encoder), (f"{label}: random weights", random_encoder(about))):
            scores = evaluate(model, about, train, test, name=name, workers=0)
            rows.append({"encoder": name, **{score.protocol: round(100 * score.top1, 1) for score in scores}})
    return rows


def _sheets(args: argparse.Namespace) -> None:
    """Draws twelve held-out photographs as the first artifact fills them in, in two sheets."""
    objective = load_pretrained(args.artifacts[0])
    about = objective.artifact
    source = open_source(args.work / "held-out/natural1k")
    size = about.image_size
    images, batch = next(
        normalized_batches(
            source, about.mean, about.std, image_size=size, channels=3, batch_size=12, workers=0
        )
    )
    for number, part in enumerate((slice(0, 6), slice(6, 12)), start=1):
        reconstruction_sheet(
            *(objective, images[part], batch.seeds[part], about.mean, about.std),
            args.sheets.with_stem(f"{args.sheets.stem}-{number}"),
            caption=f"{NAME}: photographs that it was not trained on",
        )


def main() -> None:
    """Runs one of the four commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for run, wants in ((make_data, "data"), (train, ""), (ship, "artifact"), (measure, "data")):
        command = commands.add_parser("data" if run is make_data else run.__name__)
        command.set_defaults(run=run)
        if wants:
            command.add_argument(wants, type=Path)
        if run is not ship:
            command.add_argument("--work", type=Path, default=Path("benchmarks/runs/tiny64"))
        if run is train:
            command.add_argument("--steps", type=int, default=20000)
            command.add_argument("more", nargs="*", help="further flags of `coma pretrain`, after --")
        if run is measure:
            command.add_argument("--artifacts", type=artifact_directory, nargs="+", default=[Path(NAME)])
            command.add_argument(
                "--features", action="store_true", help="also kNN and a linear probe, minutes"
            )
            command.add_argument(
                "--sheets", type=Path, help="also draw twelve photographs: PATH-1.png, PATH-2.png"
            )
            command.add_argument("--out", type=Path, help="also write the results to this file, as JSON")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
