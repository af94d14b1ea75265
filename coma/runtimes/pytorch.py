"""The trained model itself, behind the same interface as what was exported of it."""

from __future__ import annotations

import torch
from torch import Tensor

from coma.errors import BadInput
from coma.runtimes.base import check_inputs
from coma.runtimes.model_spec import ExportableModel


class TorchRuntime:
    """PyTorch, in the model's own precision.

    Args:
        exportable: What is run; it is moved to the device.
        device: Where.
        compiled: Compile it with torch.compile, for every shape anew.

    Raises:
        BadInput: a GPU is asked for and there is none.
    """

    def __init__(self, exportable: ExportableModel, device: str = "cpu", compiled: bool = False) -> None:
        self.spec = exportable.spec
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BadInput(f"{device}: PyTorch finds no GPU here; choose cpu")
        self.module = exportable.module.to(self.device)
        self._run = torch.compile(self.module, dynamic=False) if compiled else self.module
        how = " compiled" if compiled else ""
        self.title = f"torch {torch.__version__.partition('+')[0]}{how}, {device}"

    @torch.inference_mode()
    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Run; see `Runtime`."""
        inputs = check_inputs(self.spec, images, others)
        outputs = self._run(*(each.to(self.device) for each in inputs.values()))
        return {tensor_spec.name: out for tensor_spec, out in zip(self.spec.outputs, outputs, strict=True)}
