"""What a run trained, as values for a loaded model: an adapter's at an earlier step, or weights of the base itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn

from lora_exp.adapters import LoraModel
from lora_exp.adapters.files.peft_folder import peft_views
from lora_exp.adapters.files.safetensors import copy_strictly, read_tensors
from lora_exp.errors import UserError
from lora_exp.training.checkpoints import DamagedError, read
from lora_exp.use.found import FoundRun, checkpoint_folder

_PEFT = "base_model."  # how every name in a model of PEFT's begins


def take_checkpoint(model: LoraModel, name: str, run: FoundRun) -> None:
    """Give an adapter the values that it had at the run's step. Raises UserError for a checkpoint that does not fit."""
    found, place = _at_checkpoint(run)
    if any(key.startswith(_PEFT) for key in found):
        known = peft_views(model, name)
        copy_strictly(place, {own: found[key] for key in found if (own := _as_in_files(key)) in known}, known)
        return
    known = _values_of(model)
    tensors = {_renamed(key, name): value for key, value in found.items()}
    given = {id(known[key]) for key in tensors if key in known}
    if any(id(value) not in given for value in model.adapter_parameters(name).values()):
        raise UserError(f"{place} lacks values of the run's adapter: name the run itself, run={run.folder}")
    copy_strictly(place, tensors, {key: known[key].detach() for key in tensors if key in known})


def own_weights(run: FoundRun, model: nn.Module, load: Callable[[Path], nn.Module]) -> Mapping[str, Tensor]:
    """What a run trained of the base's own weights, by the names that ``model`` has for them.

    ``load`` loads a folder that holds a whole model. Raises UserError for weights that do not fit.
    """
    if run.step is not None:
        found, place = _at_checkpoint(run)
    else:
        found, place = _saved(run.adapter, load), run.adapter
    known = _values_of(model)
    if wrong := [key for key in found if key not in known or known[key].shape != found[key].shape]:
        raise UserError(f"{place} holds {wrong[0]}, which does not fit the base: name the base it was trained on")
    return found


@contextlib.contextmanager
def swapped_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Have ``model`` hold other values under the same names for a block."""
    known = {name: value.detach() for name, value in _values_of(model).items() if name in tensors}
    before = {name: value.clone() for name, value in known.items()}
    copy_strictly(Path("the run's weights"), tensors, known)
    try:
        yield
    finally:
        copy_strictly(Path("the base's weights"), before, known)


def _at_checkpoint(run: FoundRun) -> tuple[dict[str, Tensor], Path]:
    """What was trained, with the buffers that changed meanwhile, as they were at the run's step."""
    assert run.folder is not None
    assert run.step is not None
    place = checkpoint_folder(run.folder, run.step)
    try:
        state = read(place).state()
    except DamagedError as error:
        raise UserError(f"run={place} cannot be used ({error}): name the run itself, run={run.folder}") from error
    return {**state["buffers"], **state["parameters"]}, place


def _as_in_files(key: str) -> str:
    """A name in a model of PEFT's, whose adapter is ``default``, as its files have it."""
    key = key.replace(".modules_to_save.default.", ".").replace(".default", "")
    return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _renamed(key: str, name: str) -> str:
    """A name in a model of ours, whose adapter was ``default``, where it is ``name``."""
    return ".".join(name if part == "default" else part for part in key.split("."))


def _saved(folder: Path, load: Callable[[Path], nn.Module]) -> dict[str, Tensor]:
    """What a folder holds: chosen weights, or a whole model, whose names in files are transformers' own affair."""
    if (file := folder / "weights.safetensors").is_file():
        return read_tensors(file)[0]
    whole = load(folder)
    return {**dict(whole.named_parameters()), **dict(whole.named_buffers())}


def _values_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
