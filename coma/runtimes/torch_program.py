"""The runtime of `.pt2` files: programs of `torch.export`, and machine code that AOTInductor made of them.

Opening either may run code: PyTorch reads programs with pickle, and compiled ones are shared libraries. The
hash in the manifest detects damage and mix-ups, not forgery, so open only files from people you trust, as
with any program. `read_program_spec` runs nothing.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coma.errors import BadInput
from coma.library_errors import library_errors
from coma.preflight import check_regular_file
from coma.runtimes.base import check_inputs
from coma.runtimes.model_spec import METADATA, ModelSpec, parse_model_spec

SPEC_FILE = "coma.json"
"""Extra file of a program that holds its specification."""
_COMPILED = "_metadata.json"
_LARGEST_SPEC = 2**24


class TorchProgramRuntime:
    """Runs a `.pt2` file with PyTorch.

    Args:
        path: The file.
        device: cpu or cuda; a compiled program runs on the device that it was compiled for.

    Raises:
        BadInput: a file that coma export did not write, or a device that is not there.
        CheckFailed: PyTorch cannot load the file.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.spec, compiled = read_program_spec(path)
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise BadInput(f"{device}: PyTorch finds no GPU; choose cpu")
        with library_errors(f"{path.name}: PyTorch cannot load it"):
            self._run = _load_compiled(path, self.device) if compiled else _load_program(path, self.device)
        how = "AOTInductor" if compiled else "program"
        self.title = f"torch {torch.__version__.partition('+')[0]} {how}, {device}"

    @torch.inference_mode()
    def __call__(self, images: Tensor, **others: Tensor) -> dict[str, Tensor]:
        """Runs the model; see `Runtime`."""
        inputs = check_inputs(self.spec, images, others)
        with library_errors("the program could not run", BadInput):
            outputs = self._run(*(each.to(self.device) for each in inputs.values()))
        return {each.name: value for each, value in zip(self.spec.outputs, outputs, strict=True)}


def read_program_spec(path: Path) -> tuple[ModelSpec, bool]:
    """Returns the specification in a `.pt2` file, and whether the file is compiled; runs nothing of it.

    Raises:
        BadInput: not readable, or coma export did not write it.
    """
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name, compiled = entry.filename, entry.filename.endswith(_COMPILED)
                if (compiled or name.endswith(f"/extra/{SPEC_FILE}")) and entry.file_size < _LARGEST_SPEC:
                    plain = json.loads(archive.read(entry))
                    plain = plain.get(METADATA) if compiled and isinstance(plain, dict) else plain
                    if plain is not None:
                        text = plain if isinstance(plain, str) else json.dumps(plain)
                        return parse_model_spec(text, path.name), compiled
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RecursionError) as error:
        raise BadInput(f"{path}: not a readable .pt2 file ({error})") from None
    raise BadInput(f"{path}: coma export did not write this file; it has no specification of its model")


def _load_program(path: Path, device: torch.device) -> Any:
    from torch.export.passes import move_to_device_pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tells that the weights lie in the file's own memory
        program = torch.export.load(path)
    if device.type != "cpu":
        program = move_to_device_pass(program, device)
    return program.module(check_guards=False)  # `check_inputs` knows the sizes; guards exclude the smallest


def _load_compiled(path: Path, device: torch.device) -> Any:
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    loaded = torch._inductor.aoti_load_package(str(path))
    about = loaded.get_metadata()
    built_for, wanted = about.get("AOTI_DEVICE_KEY", device.type), set(about.get("AOTI_CPU_ISA", "").split())
    if missing := wanted - set(str(pick_vec_isa()).upper().split()):
        raise BadInput(f"{path}: needs a CPU with {', '.join(sorted(missing))}; export it again here")
    if built_for != device.type:
        raise BadInput(f"{path}: was compiled for {built_for}; choose that device, or export it again here")
    return loaded
