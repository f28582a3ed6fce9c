"""What a format of exports is: it writes a finished run's model into a folder, and loads it again in its own runtime.

A file in ``formats/`` says ``@export_format("name")`` above a class that follows ``Format``: a YAML in ``conf/export``
with ``format: name`` then chooses it. Its file is imported to look at a config, so that what takes long to import is
imported inside its methods.

Letters: N texts, T tokens a text, V entries of the vocabulary (or classes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lora_exp.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor

    from lora_exp.config import Config
    from lora_exp.use.loading import Trained
    from lora_exp.use_config import ExportConfig


@dataclass(frozen=True)
class Tolerance:
    """What a format's own rounding lets through: the largest difference of a logit, and the mean KL in nats."""

    max_logit: float
    max_kl: float

    def unless(self, section: ExportConfig) -> Tolerance:
        """The same, but where the user has said what is let through."""
        return Tolerance(
            self.max_logit if section.max_logit is None else section.max_logit,
            self.max_kl if section.max_kl is None else section.max_kl,
        )


@dataclass(frozen=True)
class Wish:
    """One export: the run ``name`` of ``trained``, as ``section`` asks. ``say(share)`` moves a progress bar to 0…1."""

    trained: Trained
    name: str
    section: ExportConfig
    say: Callable[[float], object]


class Format:
    """``runtime``: what loads it, in words. ``needs``: packages that this takes, with the extra that brings them.

    ``needs_base``: whether it holds an adapter alone. ``registers``: whether MLflow's registry takes it.
    ``log_probabilities``: whether ``logits`` gives those, as its runtime tells no more, NaN where it does not even tell
    them. ``library``: the hub's name of what reads it; ``tags``: for the hub, beside ``lora_exp``.
    """

    runtime: ClassVar[str] = ""
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    needs_base: ClassVar[bool] = False
    registers: ClassVar[bool] = False
    log_probabilities: ClassVar[bool] = False
    library: ClassVar[str] = "transformers"
    tags: ClassVar[tuple[str, ...]] = ()

    def problems(self, config: Config) -> list[str]:
        """What can be seen to be wrong with the config before anything is loaded."""
        return []

    def check(self, wish: Wish) -> None:
        """Raise UserError, with the next move, for a model or an adapter that the format cannot hold."""

    def resolved(self, wish: Wish) -> ExportConfig:
        """The section with what ``auto`` stands for, of this run; the other methods are given that one."""
        return wish.section

    def needed_bytes(self, wish: Wish) -> int:
        """About how much room what is written takes."""
        raise NotImplementedError

    def write(self, wish: Wish, folder: Path) -> Mapping[str, object] | None:
        """Fill ``folder``, which is new and empty. The model may be used up by it (merged, unloaded).

        ``provenance.json`` and ``README.md`` are written by who calls this. Returns what these are to say of it.
        """
        raise NotImplementedError

    def usage(self, wish: Wish, folder: str) -> str:
        """How the export in ``folder`` is used, in Markdown, for its card."""
        return f"Its runtime is {self.runtime}."

    def tolerance(self, section: ExportConfig) -> Tolerance:
        """How far the runtime's answers may be from the trained model's."""
        raise NotImplementedError

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        """What the runtime answers to ``tokens`` (N, T), of equal lengths: (N, T, V), or (N, V) of a classifier.

        Called in a fresh process that has loaded nothing else, on the device that ``tokens`` are on. ``base``: the
        folder of the base's own files, where ``needs_base``; how the base was stored when it was trained upon stands in
        the export's ``provenance.json``. Images are (N, C, S, S) in floating point.
        """
        raise NotImplementedError


formats: Registry[type[Format]] = Registry("export.format", "lora_exp.export.formats")
export_format = formats.add
