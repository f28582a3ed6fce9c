"""A base's weights as its files have them, one at a time: what they were before they were quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from lora_exp.errors import UserError
from lora_exp.models.source import Source, weight_files

if TYPE_CHECKING:
    from torch import Tensor, nn


class DenseWeights:
    """Called with a layer's name, reads its weight (out, in); the files are looked through at the first call."""

    def __init__(self, source: Source, model: nn.Module) -> None:
        self._source, self._model = source, model
        self._files: dict[str, Path] | None = None  # by the name that a tensor has there

    def __call__(self, layer: str) -> Tensor:
        files = self._files = self._files if self._files is not None else self._found()
        known = next((name for name in self._names(layer) if name in files), None)
        if known is None:
            raise UserError(
                f"{self._source.name} has no weight of {layer} in its safetensors, so what quantisation took from it "
                "is not known: use another start, or a model folder with unquantised weights"
            )
        with safe_open(str(files[known]), "pt") as file:
            weight: Tensor = file.get_tensor(known)
        kind = getattr(self._model.get_submodule(layer), "source_cls", None)  # bitsandbytes layers made from Conv1D
        return weight.T if kind is not None and kind.__name__ == "Conv1D" else weight

    def _found(self) -> dict[str, Path]:
        found = {}
        for path in weight_files(self._model, self._source):
            with safe_open(str(path), "pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        return found

    def _names(self, layer: str) -> list[str]:
        """Its names in a file of the whole model, and of the model without its head."""
        base = getattr(self._model, "base_model_prefix", "")
        return [f"{layer}.weight", f"{layer.removeprefix(f'{base}.')}.weight"]
