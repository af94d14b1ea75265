"""mmengine's Runner with safe loading, safe interruption, a quiet terminal and a progress bar.

A run directory holds what mmengine writes (`*.py`, `iter_*.pth`, `best_*.pth`, a folder per start with logs
and TensorBoard files) and, at the end, `artifact/`.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import pickle
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import IterBasedTrainLoop, Runner
from mmengine.utils import import_modules_from_strings

import downstream.openmmlab  # noqa: F401 - before mmdet and mmseg
from coma.atomic_io import seal, sync, write_text
from coma.errors import BadInput, CheckFailed, ComaError, Interrupted, is_out_of_gpu_memory
from coma.memory import guarded
from coma.progress import Progress
from coma.signals import StopRequest
from downstream.cli_options import is_main
from downstream.configs.load import (
    REGISTER_MODULE,
    config_errors,
    nodes,
    pipeline_of,
    require_imports,
    worker_error,
)
from downstream.configs.strides import check_strides
from downstream.openmmlab.backbones import DyViT, PlainViT
from downstream.openmmlab.checkpoint import forget_lost_best, intact_checkpoint, latest_checkpoint
from downstream.openmmlab.transfer import OtherClassesHook, report_loaded
from downstream.openmmlab.worker_init import set_worker_init
from downstream.private import use_device

log = logging.getLogger(__name__)
SMALLER = "try a smaller --micro-batch or --batch-size, --grad-checkpointing or smaller images"
HEADLINES = ("bbox_mAP", "bbox_mAP_50", "segm_mAP", "segm_mAP_50", "mIoU", "mAcc", "aAcc")
_LINES = 20
"""Lines of progress over a whole run where there is no terminal."""
SCORES = "coma_scores"
"""Key of the validation scores in checkpoints, by step (by epoch for epoch-based runs)."""
CONFIG, PRINTED = "config.py", "printed.txt"
_PART = ".checkpoint.part"
"""File that a checkpoint is written to before it gets its name."""


def train(
    config: Any, folder: Path, *, device: str, source: Path | None = None, resume: bool = False
) -> Runner:
    """Trains to the end; under torchrun, on all processes.

    Args:
        config: Complete mmengine configuration.
        folder: The run directory.
        device: cuda or cpu.
        source: File of the configuration, for error messages.
        resume: Resume from the last checkpoint in the run directory.

    Returns:
        The Runner after training.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written.
        CheckFailed: a loss that is not finite, or a full disk.
        BadInput: a configuration that cannot be trained, or strides of heads that do not fit the encoder.
    """
    last = intact_checkpoint(folder) if resume else None
    config.resume = last is not None
    if last:
        config.load_from = str(last)
    elif resume:
        log.info("no checkpoint was saved before the run ended; starting from the beginning")
    blamed = config_errors(source, "cannot be trained") if source else nullcontext()
    printed, quiet = _redirect_prints(folder / PRINTED), not is_main()
    with blamed, StopRequest(quiet=quiet) as stop, Progress(quiet) as progress, printed, closed_log(folder):
        runner = build_runner(config, folder, device)
        model = getattr(runner.model, "module", runner.model)
        if isinstance(getattr(model, "backbone", None), DyViT | PlainViT):
            try:
                check_strides(model)
            except BadInput as error:  # a resumed run keeps its strides
                if not resume:
                    raise
                log.warning("%s", error)
        watch = _ProgressHook(stop, progress)
        runner.register_hook(watch, priority="LOW")
        runner.register_hook(OtherClassesHook())
        if is_main() and not resume:
            config.dump(folder / CONFIG)
        try:
            with guarded(torch.device(device), lambda: SMALLER):
                runner.train()
        except ComaError as error:
            raise type(error)(worker_error(str(error))) from error
        except (OSError, RuntimeError, EOFError) as error:
            if is_out_of_gpu_memory(error):
                raise BadInput(f"out of GPU memory; {SMALLER}") from error
            if stop.asked and "DataLoader worker" in str(error):  # the signal may arrive within a step
                last = latest_checkpoint(folder)
                raise Interrupted(
                    f"stopped; a worker process got the signal, too, so --resume {folder} continues from "
                    f"{last.name if last else 'the start'}"
                ) from error
            if "DataLoader worker" in str(error):
                raise ComaError(
                    f"{folder}: a worker process died, most likely out of memory; use fewer --workers, "
                    f"then --resume {folder}"
                ) from error
            if not _disk_is_full(error):
                raise
            raise CheckFailed(
                f"{folder}: could not save ({error}); free some space, then --resume {folder}"
            ) from error
    return runner


def test(
    config: Any,
    folder: Path,
    prepare: Callable[[torch.nn.Module], None],
    *,
    device: str,
    quiet: bool = False,
) -> dict[str, float]:
    """Measures the model of a configuration on its test images.

    Args:
        config: Complete mmengine configuration.
        folder: Folder for logs.
        prepare: Called with the built model, to load its weights.
        device: cuda or cpu.
        quiet: Show no progress bar.
    """
    with Progress(quiet or not is_main()) as progress, _redirect_prints(folder / PRINTED):
        runner = build_runner(config, folder, device)
        runner.register_hook(_ProgressHook(None, progress), priority="LOW")
        prepare(getattr(runner.model, "module", runner.model))
        return {name: float(value) for name, value in runner.test().items()}


def build_runner(config: Any, folder: Path, device: str) -> Runner:
    """Builds the Runner of a configuration in `folder`; it logs to files, and only errors to the terminal."""
    prepare_config(config, folder, device)
    import_modules_from_strings(**config.custom_imports)  # some were added after the file was read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties about each other
        use_device(device)
        return _CheckedRunner.from_cfg(config)


def prepare_config(config: Any, folder: Path, device: str) -> None:
    """Adapts a configuration to this toolkit, the device and the run directory, any number of times."""
    require_imports(config, REGISTER_MODULE)
    config.work_dir = str(folder)
    config.experiment_name = f"{folder.name}-{uuid.uuid4().hex[:8]}"  # mmengine has one logger per name
    if "visualizer" in config:  # and one visualizer, which stays in its first folder
        config.visualizer.name = config.experiment_name
    config.launcher = "pytorch" if "LOCAL_RANK" in os.environ else "none"
    for backends in (config.get("vis_backends"), config.get("visualizer", {}).get("vis_backends")):
        kinds = {backend["type"] for backend in backends or ()}
        if backends is not None and "TensorboardVisBackend" not in kinds:
            backends.append({"type": "TensorboardVisBackend"})
    if config.launcher != "none" and device == "cpu":  # mmengine would require CUDA
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo")
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
    for name in ("train", "test"):  # some tools read the variables of OpenMMLab's files instead
        if config.get(f"{name}_pipeline") and config.get(f"{name}_dataloader"):
            config[f"{name}_pipeline"] = pipeline_of(config[f"{name}_dataloader"].dataset)
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        set_worker_init(config.get(name), config.get("randomness", {}).get("seed") or 0)
    if device == "cpu" or config.launcher == "none":
        replace_sync_bn(config.model)


def scores_by_step(runner: Runner) -> dict[str, dict[str, float]]:
    """Returns the finite scores of every validation of the run."""
    return runner.message_hub.runtime_info.get(SCORES, {})


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yields a folder for what a test writes; mmengine keeps no log open in it afterwards."""
    with tempfile.TemporaryDirectory() as folder, closed_log(Path(folder)):
        yield Path(folder)


@contextmanager
def closed_log(folder: Path) -> Iterator[None]:
    """Closes the logs in `folder` at the end, and makes mmengine forget them.

    mmengine writes to its log whenever a model is initialised, also when others have closed the file: what
    configures logging anew, as servers do, closes all files of the process.
    """
    try:
        yield
    finally:
        logger = MMLogger.get_current_instance()
        files = [each for each in logger.handlers if isinstance(each, logging.FileHandler)]
        for handler in files:
            if Path(handler.baseFilename).is_relative_to(folder.absolute()):
                handler.close()
                logger.removeHandler(handler)


class _CheckedRunner(Runner):
    """A Runner that logs to files, prints only errors, and writes checksums beside its checkpoints."""

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Saves a checkpoint with its checksum; after kill -9 the file is whole, or was never there."""
        super().save_checkpoint(out_dir, _PART, *args, **kwargs)
        if is_main():
            part = Path(out_dir, _PART)
            seal(part)
            sync(part)
            part.replace(Path(out_dir, filename))
            sync(Path(out_dir))

    def resume(self, *args: Any, **kwargs: Any) -> None:
        super().resume(*args, **kwargs)
        forget_lost_best(self.message_hub.runtime_info, Path(self.work_dir))

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                handler.setLevel(logging.ERROR)
                handler.setStream(sys.stderr)
        return logger

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> Any:
        """Loads the tensors that fit and says which, where mmengine only logs."""
        try:
            checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        except pickle.UnpicklingError as error:
            raise BadInput(
                f"{filename}: holds other objects than tensors, numbers and mmengine's histories; save only "
                "its state_dict"
            ) from error
        checkpoint.get("meta", {}).pop("config", None)  # mmengine would execute it
        model: Any = getattr(self.model, "module", self.model)
        if not report_loaded(filename, model, checkpoint, resumes=bool(self.cfg.get("resume"))):
            count = len(checkpoint.get("state_dict", checkpoint))
            raise BadInput(f"{filename}: none of its {count} tensors fits one of the model")
        return checkpoint


class _ProgressHook(Hook):
    """Updates the progress bar, refuses losses that are not finite, and stops the run on request."""

    def __init__(self, stop: StopRequest | None, progress: Progress) -> None:
        self._stop, self._progress, self._steps = stop, progress, 0

    def before_train(self, runner: Any) -> None:
        self._steps = runner.max_iters
        _skip_seen_images(runner.train_loop, runner.iter)
        self._training = self._progress.bar("step", self._steps, runner.iter, _LINES)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        loss = float(torch.as_tensor((outputs or {}).get("loss", 0.0)).detach())
        if not math.isfinite(loss):
            raise CheckFailed(
                f"{runner.work_dir}: the loss is {loss} at step {runner.iter + 1}; lower --lr, or use "
                "--precision fp32; the last checkpoint is from an earlier step"
            )
        self._training.update(runner.iter + 1, f"loss {loss:.4f}")
        if self._stop and _any_process(self._stop.asked) and runner.iter + 1 < self._steps:
            self.leave(runner, runner.iter + 1)

    def leave(self, runner: Any, done: int) -> None:
        """Stops the run after `done` steps.

        Raises:
            Interrupted: always; epoch-based runs resume from the start of the epoch.
        """
        where, advice = (
            f"stopped at step {done} of {self._steps}",
            f"continue with --resume {runner.work_dir}",
        )
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            raise Interrupted(f"{where}; the finished epochs are saved, {advice}")
        _save(runner, done)
        raise Interrupted(f"{where}; everything is saved, {advice}")

    def before_val(self, runner: Any) -> None:
        self._pass = self._progress.bar("validating", len(runner.val_dataloader))

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._pass.advance()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._pass.remove()
        finite = {name: float(value) for name, value in (metrics or {}).items() if math.isfinite(value)}
        scores = runner.message_hub.runtime_info.setdefault(SCORES, {})
        by_step = isinstance(runner.train_loop, IterBasedTrainLoop)
        scores[str(runner.iter if by_step else runner.epoch)] = {
            n: round(v, 5) for n, v in finite.items() if not n.endswith("time")
        }
        shown = {name: value for name, value in (metrics or {}).items() if is_headline(name)}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self._progress.say(f"step {runner.iter}/{self._steps}: {text}")

    def before_test(self, runner: Any) -> None:
        self._pass = self._progress.bar("testing", len(runner.test_dataloader))

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._pass.advance()

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        self._pass.remove()


def is_headline(name: str) -> bool:
    """Returns whether a metric is one of the main ones."""
    return name.rpartition("/")[2] in HEADLINES


def _save(runner: Any, done: int) -> None:
    """Saves a checkpoint after `done` steps and notes it as the last one."""
    name = f"iter_{done}.pth"
    meta = {"epoch": runner.epoch, "iter": done}
    runner.save_checkpoint(runner.work_dir, name, meta=meta, by_epoch=False)
    if is_main():
        write_text(Path(runner.work_dir, "last_checkpoint"), str(Path(runner.work_dir, name)))


def _skip_seen_images(loop: Any, done: int) -> None:
    """Skips the images of `done` steps, which mmengine would load and augment again."""
    sampler: Any = loop.dataloader.sampler
    counts_steps = isinstance(loop, IterBasedTrainLoop)
    if not done or not counts_steps or not isinstance(sampler, InfiniteSampler):
        return
    taken = done * (loop.dataloader.batch_size or 1)
    order = InfiniteSampler(sampler.dataset, sampler.shuffle, sampler.seed).indices  # from the start
    sampler.indices = itertools.islice(order, taken, None)
    batches: Any = itertools.chain(itertools.repeat(None, done), loop.dataloader)
    loop.dataloader_iterator = batches


def _any_process(asked: bool) -> bool:
    if not torch.distributed.is_initialized():
        return asked
    votes = torch.tensor(float(asked), device=get_device())
    torch.distributed.all_reduce(votes)
    return bool(votes)


def replace_sync_bn(model: Any) -> None:
    """Replaces SyncBN, which needs CUDA and several processes, by BN."""
    for node in nodes(model):
        if node.get("type") in ("SyncBN", "MMSyncBN"):
            node["type"] = "BN"


@contextmanager
def _redirect_prints(path: Path) -> Iterator[None]:
    """Redirects prints of libraries to a file, such as pycocotools' reports."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file):
        yield


def _disk_is_full(error: BaseException) -> bool:
    text = str(error)
    return getattr(error, "errno", None) == 28 or "PytorchStreamWriter" in text or "No space left" in text
