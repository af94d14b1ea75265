"""Settings of a comparison: the flags of `coma compare`, and what is filled in from them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

import tyro

from coma.arguments import parse_arguments
from coma.config import FinetuneConfig, PretrainConfig
from coma.errors import BadInput
from coma.ranges import BUDGET, IMAGES, JOBS, PROCESSES, RATE, SEED, Range, Ranged

Unit = Literal["images", "views", "seconds", "flops"]
Protocol = Literal["knn", "linear", "finetune", "finetune-10"]
SEARCH_SHARE = 0.1
"""Share of the budget of a run that the trial of a learning rate gets."""
_MOST_RATES = 5
LABEL_SHARES: dict[str, float] = {"finetune": 1.0, "finetune-10": 0.1}
"""The protocols that fine-tune, and the share of the labels that they use."""

RANDOM_BASELINE = "random"
"""Name of the table's rows without training."""
_NO_FLAG = tyro.conf.Fixed, tyro.conf.Suppress


@dataclass(frozen=True)
class Entry:
    """A method on a backbone."""

    method: str
    """Name in the table."""
    model: str
    """Name in the table."""
    config: PretrainConfig
    """Settings of all its runs; out, seed, steps and probe are set for each run."""
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of folders."""
        return f"{slug(self.method)}-{slug(self.model)}"


@dataclass(frozen=True)
class CompareConfig(Ranged):
    """Runs, their budget, and how they are evaluated."""

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Images to pre-train on, as in `coma pretrain`."""
    test: Path
    """Labelled images to evaluate on: a folder that holds train and test, as in `coma evaluate --data`."""
    budget: Annotated[tuple[Unit, float], BUDGET, tyro.conf.arg(metavar="UNIT AMOUNT")]
    """What every run gets, and how much of it. images: images seen in training, each crop counted. views:
    encoded views (CoMA encodes two of an image in a step, MAE one). seconds: time of training steps alone:
    on a GPU wall-clock time with the wait for images, on a CPU computing time of all threads; a short trial
    run of each method measures the time of a step. flops: FLOPs, forward and backward."""
    methods: Annotated[tuple[str, ...], tyro.conf.arg(metavar="METHOD ...")] = ("coma", "mae")
    """Values of `coma pretrain --method`, perhaps followed by flags, and preceded by a name for the table:
    "beyond --degrade zoom-in", "zoom: beyond --degrade zoom-in". These flags override those behind --, so
    "mae --base-lr 2e-4" gives one method another learning rate."""
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL ...")] = ("tiny",)
    """Values of `coma pretrain --model`, with flags and names as in --methods: "vit-tiny --model.depth 7",
    "ViT: vit-tiny"."""
    seeds: Annotated[tuple[int, ...], SEED, tyro.conf.arg(metavar="SEED ...")] = (0, 1, 2)
    """Seeds of the runs of every method on every backbone."""
    lr_search: Annotated[tuple[float, ...], RATE, tyro.conf.arg(metavar="LR ...")] = ()
    """Values of --base-lr, five at most, that are tried for every method on every backbone, with the first
    seed and a tenth of the budget each. The one whose training loss ends lowest is taken; labels are not
    used. The trials count: every run gets what they leave of the budget, 70 % after three. Default: no
    search."""
    protocols: tuple[Protocol, ...] = ("knn", "linear")
    """knn, linear: as in `coma evaluate`. finetune: as in `coma classify train`. finetune-10: likewise, with
    10 % of the labels."""
    out: Path = Path("compare")
    """Folder for runs, scores, compare.md, compare.csv and compare.png."""
    reference: str | None = None
    """Method that times and accuracies are related to; default: mae, or the first method."""
    probes: Annotated[int, Range(0, 10**6)] = 0
    """Number of probes during every run (knn, linear): they draw curves and tell how many images each method
    needed to match the last probe of the reference."""
    probe_train: Annotated[int, IMAGES] = 2000
    """Labelled training images of a probe; 0: all."""
    probe_test: Annotated[int, IMAGES] = 1000
    """Test images of a probe; 0: all."""
    random_baseline: bool = True
    """Also evaluate random weights."""
    finetune: Annotated[str, tyro.conf.arg(metavar="FLAGS", help_behavior_hint="")] = ""
    """Flags of `coma classify train`, in quotes: "--epochs 20 --batch-size 64"."""
    finetune_10: Annotated[str, tyro.conf.arg(metavar="FLAGS", help_behavior_hint="")] = ""
    """More such flags, after the others, for the protocol finetune-10: "--epochs 200"."""
    allow_changed_data: bool = False
    """Resume a comparison although images were added, removed, renamed or changed in size since it was
    started; finished runs stay as they are."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: all GPUs where there are any."""
    jobs: Annotated[int | None, JOBS] = None
    """Number of runs at a time; default: one on every GPU, or one on a CPU."""
    threads: Annotated[int | None, JOBS] = None
    """Threads of every run on a CPU; default: the cores divided by the jobs."""
    workers: Annotated[int | None, PROCESSES] = None
    """Processes of every run that decode images; default: by the number of cores."""
    entries: Annotated[tuple[Entry, ...], *_NO_FLAG] = ()
    """Filled in from methods, models, seeds and the flags behind --."""
    gpus: Annotated[tuple[str, ...], *_NO_FLAG] = ()
    """Filled in: names for CUDA_VISIBLE_DEVICES."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rates = [f"{rate:g}" for rate in self.lr_search]  # as they are written in names of folders
        if len(rates) > _MOST_RATES or len(set(rates)) < len(rates):
            raise BadInput(f"--lr-search {' '.join(rates)}: give at most {_MOST_RATES} different rates")

    @property
    def unit(self) -> Unit:
        """Unit of the budget."""
        return self.budget[0]

    @property
    def amount(self) -> float:
        """Amount of the budget."""
        return self.budget[1]

    @property
    def run_amount(self) -> float:
        """Amount of the budget that a run gets: all that the trials of learning rates do not use."""
        return self.amount * (1 - SEARCH_SHARE * len(self.lr_search))

    @property
    def frozen_protocols(self) -> tuple[Literal["knn", "linear"], ...]:
        """The protocols that evaluate frozen features."""
        return tuple(name for name in self.protocols if name in ("knn", "linear"))

    @property
    def finetune_protocols(self) -> tuple[Protocol, ...]:
        """The protocols that fine-tune."""
        return tuple(name for name in self.protocols if name in LABEL_SHARES)

    def finetune_flags_of(self, protocol: Protocol) -> tuple[str, ...]:
        """Returns the flags of `coma classify train`."""
        more = self.finetune_10 if protocol == "finetune-10" else ""
        return (*shlex.split(self.finetune), *shlex.split(more))


def slug(text: str) -> str:
    """Returns a name for a folder."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


@cache
def finetune_config(flags: tuple[str, ...]) -> FinetuneConfig:
    """Returns the settings of `coma classify train` with these flags.

    Raises:
        BadInput: it has no such flags.
    """
    needed = ("ARTIFACT", "--data", "CLASSES", "--out", "RUN")
    kind = tyro.conf.OmitArgPrefixes[FinetuneConfig]
    try:
        return parse_arguments(kind, [*needed, *flags], prog="coma classify train")
    except BadInput as error:
        raise BadInput(f"--finetune {shlex.join(flags)!r}: {error}") from None
    except SystemExit:
        raise BadInput(f"--finetune: coma classify train does not take {shlex.join(flags)!r}") from None
