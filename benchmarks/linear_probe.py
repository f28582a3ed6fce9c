"""A linear probe: what a frozen base knows of the classes already, which an adapter must beat.

    python -m benchmarks.linear_probe model=minilm data=bbc_news

Mean-pooled features of the frozen base, standardised; a logistic regression on them by L-BFGS, at its best of several
strengths of regularisation, chosen on the validation rows themselves, in the probe's favour.

Letters: N rows, D features, K classes.
"""

from __future__ import annotations

import sys

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_exp import models
from lora_exp.config import conf_folder
from lora_exp.data import DataKind, kind_of, load_data
from lora_exp.machine.place import resolve_place
from lora_exp.schema import register, to_config
from lora_exp.training.classes import class_losses
from lora_exp.training.metrics import Sums, chosen

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def main(overrides: list[str]) -> None:
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = to_config(compose("config", [*overrides, "tracking=none"]))
    kind, place = kind_of(config.data), resolve_place(config.device, "float32", False, False)
    source = models.find_source(config.model)
    data = load_data(config.data, lambda: models.load_tokenizer(source, config.model))
    base = models.load_base(source, config.model, place, data.shape).eval()
    trunk = base.get_submodule(str(base.base_model_prefix))
    train, train_labels = features(trunk, kind, data.train)
    held_out, labels = features(trunk, kind, data.validation)
    mean, spread = train.mean(0), train.std(0).clamp_min(1e-6)
    found = [probe((train - mean) / spread, train_labels, strength) for strength in STRENGTHS]
    figures = [evaluated(head((held_out - mean) / spread), labels) for head in found]
    for strength, row in zip(STRENGTHS, figures, strict=True):
        print(f"strength {strength:g}: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
    best = max(figures, key=lambda row: row["accuracy"])
    print(f"{config.model.label}, best: " + ", ".join(f"{name} {value:.4f}" for name, value in best.items()))


@torch.no_grad()
def features(
    trunk: nn.Module, kind: DataKind, rows: torch.utils.data.Dataset[dict[str, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Mean-pooled features (N, D) and classes (N,)."""
    found, labels = [], []
    for batch in DataLoader(rows, batch_size=16, collate_fn=kind.collate):
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        hidden, mask = trunk(**inputs).last_hidden_state, batch["attention_mask"][:, :, None]
        found.append((hidden * mask).sum(1) / mask.sum(1))
        labels.append(batch["labels"])
    return torch.cat(found).float(), torch.cat(labels)


def probe(inputs: Tensor, labels: Tensor, strength: float) -> nn.Linear:
    """A logistic regression of ``inputs`` (N, D), with an L2 penalty of ``strength``."""
    head = nn.Linear(inputs.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(inputs), labels) + strength / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


@torch.no_grad()
def evaluated(logits: Tensor, labels: Tensor) -> dict[str, float]:
    sums = Sums().plus(class_losses(logits, labels))
    return {name: metric(sums) for name, metric in chosen("loss", "accuracy", "macro_f1").items()}


if __name__ == "__main__":
    main(sys.argv[1:])
