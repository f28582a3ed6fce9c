"""Labelled images for classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from lora_exp.data.kind import Batch, Data, DataKind, Row, Tokenizer, data_kind
from lora_exp.inputs import image_path_problem

if TYPE_CHECKING:
    from torch import nn

    from lora_exp.training.metrics import RowLosses


@data_kind("images")
class Images(DataKind):
    """S × S pixels, S = ``image_size``, of a folder that has a folder a class or of a table of grey pixels;
    ``train_images`` of those not held out (null: all of them)."""

    image_size: int = 64
    train_images: int | None = None

    learners: ClassVar[tuple[str, ...]] = ("efficientnet_lite",)
    unit: ClassVar[str] = "images"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def problems(self, task: str) -> list[str]:
        found: list[str | None] = []
        for key in ("path", "validation_path", "test_path"):
            named = getattr(self, key)
            if isinstance(named, str) and (problem := image_path_problem(named)):
                found.append(problem.replace("data.path=", f"data.{key}=", 1))
            elif named is not None and not isinstance(named, str):
                found.append(
                    f"data.{key}={named} must be one path: a folder with a folder a class, or a .csv or .csv.gz"
                )
        if self.name:
            found.append(
                f"data.name={self.name} is not for images yet: name a folder with a folder a class by data.path"
            )
        if self.image_size < 8:
            found.append(f"data.image_size={self.image_size} is below 8: 64 is fast, 224 what most bases know")
        if self.train_images is not None and self.train_images < 1:
            found.append(f"data.train_images={self.train_images} is below 1: leave it out to train on all")
        return [problem for problem in found if problem]

    @property
    def rows(self) -> str:
        return f"images of {self.image_size}×{self.image_size}"

    @property
    def remedies(self) -> list[str]:
        return ["a smaller data.image_size"]

    def plan_shape(self) -> Mapping[str, Any]:
        from lora_exp.data.images import load_table

        return load_table(self).shape

    def shape_of(self, class_names: Sequence[str]) -> Mapping[str, Any]:
        return self.plan_shape()

    def row(self) -> Row:
        import torch

        pixels = torch.zeros((1, self.image_size, self.image_size), dtype=torch.uint8)
        return {"pixels": pixels, "labels": torch.zeros((), dtype=torch.long)}

    def load(self, tokenizer: Tokenizer) -> Data:
        from lora_exp.data.images import load_table

        return load_table(self)

    def collate(self, rows: list[Row]) -> Batch:
        from lora_exp.data.images import collate_images

        return collate_images(rows)

    def losses(self, model: nn.Module, batch: Batch) -> RowLosses:
        from lora_exp.data.images import image_losses

        return image_losses(model, batch)
