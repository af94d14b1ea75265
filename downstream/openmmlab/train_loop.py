"""A training loop whose steps take several forward and backward passes, each on a part of the batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.registry import LOOPS
from mmengine.runner import IterBasedTrainLoop


@LOOPS.register_module()
class AccumulatingTrainLoop(IterBasedTrainLoop):
    """`IterBasedTrainLoop` that accumulates the gradients of micro-batches; an iteration stays one update.

    `train_cfg=dict(type='AccumulatingTrainLoop', passes=4, ...)` together with
    `optim_wrapper=dict(accumulative_counts=4, ...)`. The losses of the passes are averaged, so a step is that
    of the whole batch, except that batch normalisation sees one micro-batch at a time.

    Args:
        args: As of `IterBasedTrainLoop`.
        passes: Number of micro-batches; it divides the batch size.
        kwargs: As of `IterBasedTrainLoop`.
    """

    def __init__(self, *args: Any, passes: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.passes = passes

    def run(self) -> Any:
        """Launches training."""
        wrapper = self.runner.optim_wrapper  # which counts passes, and was told the number of iterations
        wrapper.initialize_count_status(
            self.runner.model, self._iter * self.passes, self._max_iters * self.passes
        )
        return super().run()

    def run_iter(self, data_batch: Any) -> None:
        """Takes one step.

        Args:
            data_batch: Batch of the data loader: lists of images and of labels.
        """
        self.runner.call_hook("before_train_iter", batch_idx=self._iter, data_batch=data_batch)
        outputs = [
            self.runner.model.train_step(part, optim_wrapper=self.runner.optim_wrapper)
            for part in parts_of(data_batch, self.passes)
        ]
        means = {name: sum(each[name] for each in outputs) / self.passes for name in outputs[0]}
        self.runner.call_hook("after_train_iter", batch_idx=self._iter, data_batch=data_batch, outputs=means)
        self._iter += 1


def parts_of(batch: dict[str, Any], count: int) -> Iterator[dict[str, Any]]:
    """Yields `count` parts of a batch, whose values are lists or tensors with an entry for every image."""
    size = len(batch["inputs"]) // count
    for start in range(0, size * count, size):
        yield {name: values[start : start + size] for name, values in batch.items()}
