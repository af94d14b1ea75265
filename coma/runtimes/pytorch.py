"""The PyTorch runtime: the model itself behind the interface of its exported files."""

from __future__ import annotations

import torch
from torch import Tensor

from coma.errors import BadInput
from coma.runtimes.base import check_inputs
from coma.runtimes.model_spec import ExportableModel


class TorchRuntime:
    """Runs a model with PyTorch in its own precision.

    Args:
        exportable: The model; it is moved to the device.
        device: Device of PyTorch.
        compiled: Whether torch.compile compiles the model, once for every shape.

    Raises:
        BadInput: a GPU is requested and PyTorch finds none.
    """

    def __init__(self, exportable: ExportableModel, device: str = "cpu", compiled: bool = False) -> None:
        self.spec = exportable.spec
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BadInput(f"{device}: PyTorch finds no GPU; choose cpu")
        self.module = exportable.module.to(self.device)
        self._run = torch.compile(self.module, dynamic=False) if compiled else self.module
        how = " compiled" if compiled else ""
        self.title = f"torch {torch.__version__.partition('+')[0]}{how}, {device}"

    @torch.inference_mode()
    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the model; see `Runtime`."""
        inputs = check_inputs(self.spec, images, others)
        outputs = self._run(*(each.to(self.device) for each in inputs.values()))
        return {tensor_spec.name: out for tensor_spec, out in zip(self.spec.outputs, outputs, strict=True)}
