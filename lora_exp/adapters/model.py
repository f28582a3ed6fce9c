"""A model with adapters."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, SupportsIndex, cast

import torch
from torch import Tensor, nn

from lora_exp.adapters.config import LoraConfig
from lora_exp.adapters.files import peft_folder, safetensors
from lora_exp.adapters.files.merged import untied_metadata
from lora_exp.adapters.inspection import adapter_state, base_hash
from lora_exp.adapters.inspection.gradients import unreached_layers
from lora_exp.adapters.inspection.low_rank import LowRank, beyond_low_rank, low_rank
from lora_exp.adapters.inspection.parameter_counts import count_parameters
from lora_exp.adapters.inspection.ties import undo_ties, weight_ties
from lora_exp.adapters.inspection.traversal import biased_modules, lora_layers, saved_modules
from lora_exp.adapters.layers.adapted import DEFAULT
from lora_exp.adapters.numerics.dropout import draw_seed
from lora_exp.adapters.numerics.packed_weights import recover_class
from lora_exp.adapters.numerics.typed_torch import not_compiled_itself
from lora_exp.adapters.routing.plan import BASE, Plan, sampled_plan, sliced_plan
from lora_exp.adapters.routing.route import Clock, Route
from lora_exp.adapters.signature import class_like, restore
from lora_exp.adapters.starts.start import NOTHING, Given
from lora_exp.adapters.surgery import merging
from lora_exp.adapters.surgery.injection import inject
from lora_exp.adapters.surgery.merging import Merged, MergeReport
from lora_exp.adapters.surgery.undo import undone_on_failure
from lora_exp.errors import UserError

log = logging.getLogger(__name__)


class _Checkpointing(Protocol):
    """transformers' models, by the older and the newer name."""

    def activation_checkpointing_enable(self, **options: object) -> None: ...

    def gradient_checkpointing_enable(self, **options: object) -> None: ...

    def enable_input_require_grads(self) -> None: ...


class LoraModel(nn.Module):
    """Freezes `model`, adds adapters to it in place, and otherwise behaves as it does.

    The base model is `wrapped`; attributes that LoraModel does not have are looked up there. Several
    named adapters may live side by side: one is active (`set_adapter`), or slices of the batch go through
    different ones (`route`). What an adapter trains requires gradients, active or not; an optimizer
    takes `adapter_parameters(name)`.
    """

    made_from: ClassVar[type[LoraModel] | None] = None  # see class_like

    def __init__(
        self,
        model: nn.Module,
        config: LoraConfig,
        adapter_name: str = DEFAULT,
        verbose: bool = True,
        given: Given = NOTHING,
    ) -> None:
        super().__init__()
        self.configs: dict[str, LoraConfig] = {}
        self._check_new_name(adapter_name)
        if (adapted := next(lora_layers(model), None)) is not None:
            raise UserError(
                f"the model has adapted layers already ({adapted[0] or 'itself'}); "
                "use add_adapter of the LoraModel around it, or merge_and_unload() first"
            )
        self.wrapped = model
        self.__class__ = class_like(type(self), model)
        self.route_state = Route()
        self.known_base = base_hash.Known()
        self._merged: Merged | None = None
        with undone_on_failure(model):
            model.requires_grad_(False)
            self.add_adapter(adapter_name, config, given)
            self.set_adapter(adapter_name)
            if verbose:
                print(self.summary())

    def forward(self, *args: object, **kwargs: object) -> object:
        """The wrapped model's forward; in training, its layer calls can be told from other passes'."""
        plan, trains = self.route_state.plan(), self.wrapped.training
        if plan.sizes is None and (not trains or (torch.compiler.is_compiling() and not self._drops(plan))):
            return self.wrapped(*args, **kwargs)
        if torch.compiler.is_compiling() and not trains:
            with self.route_state.using(plan.for_inputs([*args, *kwargs.values()])):
                return self.wrapped(*args, **kwargs)
        return self._pass(*args, **kwargs)

    @not_compiled_itself
    def _pass(self, *args: object, **kwargs: object) -> object:
        scope = self.route_state.enter_pass([*args, *kwargs.values()], self.wrapped.training)
        try:
            return self.wrapped(*args, **kwargs)
        finally:
            self.route_state.leave(scope)

    def train(self, mode: bool = True) -> LoraModel:
        self.route_state.evaluates = not mode
        return super().train(mode)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        return restore, (self.made_from or type(self),), self.__dict__

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__class__ = class_like(type(self), self.wrapped)
        for module in self.wrapped.modules():
            recover_class(module._parameters.get("weight"))

    def _get_name(self) -> str:
        # transformers asks for it to know how a loss is to be computed.
        name = self.wrapped._get_name() if "wrapped" in self._modules else super()._get_name()  # type: ignore[no-untyped-call]
        return str(name)

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "wrapped":  # not there yet: __init__, or a copy being filled
                raise
            return getattr(self.wrapped, name)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, object] | None = None, **kwargs: object
    ) -> None:
        """transformers' switch, made to work on a frozen base.

        Reentrant checkpointing passes no gradient into a block whose input requires none, and would
        train nothing without a word; so there the embeddings' output is made to require one.
        """
        options, wrapped = gradient_checkpointing_kwargs, cast(_Checkpointing, self.wrapped)
        if hasattr(wrapped, "activation_checkpointing_enable"):  # transformers' newer name
            wrapped.activation_checkpointing_enable(activation_checkpointing_kwargs=options, **kwargs)
        else:
            wrapped.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options, **kwargs)
        if (options or {}).get("use_reentrant", True) and hasattr(wrapped, "enable_input_require_grads"):
            wrapped.enable_input_require_grads()

    # Adapters

    def add_adapter(self, name: str, config: LoraConfig, given: Given = NOTHING) -> None:
        """Add a named adapter; its factors are drawn from the global RNG. It is not active yet.

        given: what a start may ask for, such as a quantised base's weights as they were ("loftq"). Whatever fails on
        the way, a Ctrl-C included, leaves the model as it was.
        """
        self._check_new_name(name)
        self._check_unmerged("add an adapter")
        with undone_on_failure(self, self.route_state):
            inject(self.wrapped, config, name, self.route_state, given)
            self.configs[name] = config
            self.route_state.clocks[name] = Clock(draw_seed())

    def set_adapter(self, name: str) -> None:
        """Let one adapter serve the whole batch, in this thread and in those that have chosen none themselves."""
        self._check_name(name)
        self._check_unmerged("switch adapters")
        self.route_state.live = Plan((name,))

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; if it was active, the first that remains is, or the base alone."""
        self._check_name(name)
        self._check_unmerged("delete an adapter")
        self.route_state.check_deletable(name)
        for _, layer in lora_layers(self.wrapped):
            if name in layer.adapters:
                del layer.adapters[name]
        for _, _, trained in biased_modules(self.wrapped):
            if name in trained.values:
                del trained.values[name]
        for _, switch in saved_modules(self.wrapped):
            if name in switch.copies:
                del switch.copies[name]
        del self.configs[name]
        self.route_state.forget(name, instead=Plan(tuple(self.configs)[:1]))

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Exactly the base model, also where an adapter was merged in."""
        merged = self._merged
        if merged is not None:
            self.unmerge()
        try:
            with self.route_state.using(Plan(), holds=None if merged is None else merged.name):
                yield
        finally:
            if merged is not None:
                self.merge(merged.name, merged.safe, merged.requantise)

    @contextmanager
    def route(self, sizes: Mapping[str, int]) -> Iterator[None]:
        """Contiguous slices of the batch through different adapters, in the mapping's order.

        In training and in inference; each adapter gets its own slice's gradient. "__base__" names the
        base alone. Backward may run outside of the context.
        """
        with self._routed(sliced_plan(sizes)):
            yield

    @contextmanager
    def route_samples(self, names: Sequence[str]) -> Iterator[None]:
        """One adapter name a sample, for inference."""
        if self.wrapped.training:
            raise UserError("route_samples is for inference; call eval() first, or train with route()")
        with self._routed(sampled_plan(names)):
            yield

    @property
    def active_adapter(self) -> str | None:
        """The adapter that serves the whole batch; None while disabled or routed."""
        live = self.route_state.live
        return live.names[0] if live.names and live.sizes is None else None

    def adapter_parameters(self, name: str = DEFAULT) -> dict[str, nn.Parameter]:
        """Everything that an adapter trains, by dotted name without the adapter's.

        Factors as `layer.lora_A`, `layer.lora_B` and `layer.magnitude`, biases as `module.bias`, modules
        to save under their own parameters' names.
        """
        self._check_name(name)
        factors = adapter_state.factor_parameters(self.wrapped, name)
        biases = adapter_state.bias_parameters(self.wrapped, name)
        saved = adapter_state.saved_tensors(self.wrapped, name)
        trained = {key: value for key, value in saved.items() if isinstance(value, nn.Parameter)}
        return adapter_state.without_repeats({**factors, **biases, **trained})

    def fast_parameters(self, name: str = DEFAULT) -> dict[str, nn.Parameter]:
        """Those of `adapter_parameters` that LoRA+ (arXiv 2402.12354) trains at a higher rate: B and vectors."""
        self._check_name(name)
        return adapter_state.fast_parameters(self.wrapped, name)

    def adapter_tensors(self, name: str = DEFAULT) -> dict[str, Tensor]:
        """`adapter_parameters`, what is frozen beside them, buffers of modules to save: what a file holds."""
        factors = adapter_state.factor_tensors(self.wrapped, name)
        buffers = adapter_state.saved_tensors(self.wrapped, name)
        return adapter_state.without_repeats({**factors, **self.adapter_parameters(name), **buffers})

    def dropout_state(self, name: str = DEFAULT) -> dict[str, int]:
        """What an adapter's dropout masks follow from; store it to resume a run exactly."""
        self._check_name(name)
        clock = self.route_state.clocks[name]
        return {"seed": clock.seed, "passes": clock.passes}

    def load_dropout_state(self, state: Mapping[str, int], name: str = DEFAULT) -> None:
        self._check_name(name)
        self.route_state.clocks[name] = Clock(**state)

    # Figures and checks

    def parameter_counts(self, name: str | None = None) -> tuple[int, int]:
        """(what an adapter trains, base and all adapters), logical parameters, equal to PEFT's counts."""
        copies = {id(p) for _, _, trained in biased_modules(self.wrapped) for p in trained.parameters()}
        # PEFT trains biases in place; our copies of them are no further parameters of the model.
        everything = [p for p in self.parameters() if id(p) not in copies]
        return count_parameters(self.adapter_parameters(self._chosen(name)).values(), everything)

    def summary(self) -> str:
        trainable, total = self.parameter_counts()
        base = adapter_state.base_parameters(self.wrapped)
        return (
            f"Initial Parameters : {count_parameters(base, base)[0]:,} || LoRA Parameters : {trainable:,} || "
            f"Trainable Proportion : {100 * trainable / total:.4f}%"
        )

    def check_gradients(self) -> list[str]:
        """After a backward pass: names of adapted layers that got no gradient; raises if none got one."""
        return unreached_layers(self.wrapped, self.route_state.trained or self.route_state.live.names)

    # Merging

    def merge(self, name: str | None = None, safe: bool = True, requantise: bool = False) -> MergeReport:
        """Fold an adapter into the base weights in place, accumulating in float32.

        The base's own weights are kept (twice the memory of adapted layers) for unmerge(). `safe` refuses
        results that are not finite. Returns what rounding to the weights' dtype cost. Quantised weights become
        dense ones of 16 bits or more; `requantise` stores the sum in their 4 or 8 bits again, which can round most
        of an update away: see `MergeReport.survived`.
        """
        self._check_unmerged("merge another adapter")
        chosen = self._chosen(name)
        report = merging.merge(self.wrapped, chosen, safe, requantise)
        self._merged = Merged(chosen, safe, requantise, self.route_state.live)
        self.route_state.live, self.route_state.merged = Plan((chosen,)), chosen
        return report

    def unmerge(self) -> None:
        """Restore the base weights bit for bit from the kept copy; the adapter that was active before is again."""
        if self._merged is None:
            raise UserError("nothing is merged; call merge() first")
        merging.unmerge(self.wrapped)
        self.route_state.live, self._merged, self.route_state.merged = self._merged.before, None, None

    def merge_and_unload(self, name: str | None = None, safe: bool = True, requantise: bool = False) -> nn.Module:
        """The original model, of its original classes, with an adapter merged in; this wrapper is done for.

        Where embedding and head were tied and only one side or both were adapted, they are two weights
        from now on, and a transformers config says so. A quantised base becomes a plain one of 16 bits or more,
        layers without an adapter included, unless `requantise` is asked for (see `merge`).
        """
        chosen, held = self._chosen(name), self._merged
        if held is not None and (held.name != chosen or requantise > held.requantise):
            self.unmerge()  # another one, or the same otherwise, is asked for
        ties = weight_ties(self.wrapped)
        if self._merged is None:
            merging.merge(self.wrapped, chosen, safe, requantise)
        plain = merging.unload(self.wrapped, chosen)
        undo_ties(plain, ties)
        return plain

    def merged_tensors(self, name: str | None = None) -> dict[str, merging.Made]:
        """The original class's state dict with an adapter merged in, each tensor made when it is called, merged weights
        as they were summed (float32). The model stays as it is."""
        return merging.merged_tensors(self.wrapped, self._chosen(name))

    def low_rank(self, name: str | None = None) -> dict[str, LowRank]:
        """An adapter as pairs of factors by layer. Raises UserError where it is more than that."""
        chosen = self._chosen(name)
        if more := beyond_low_rank(self.wrapped, chosen):
            raise UserError(f"adapter {chosen!r} is more than pairs of factors A and B: it has {'; '.join(more)}")
        return low_rank(self.wrapped, chosen)

    @property
    def merged_adapter(self) -> str | None:
        """The adapter that is merged into the weights now."""
        return None if self._merged is None else self._merged.name

    # Files

    def save_model(self, path: str | Path, merge_weights: bool = False, name: str | None = None) -> None:
        """One safetensors file: an adapter alone, or the original class's full state with it merged in.

        Where one side of tied weights was adapted, the file holds both, and says so: load it with `load_merged`.
        """
        chosen = self._chosen(name)
        if merge_weights:
            state, untied = merging.merged_state(self.wrapped, chosen)
            safetensors.write_tensors(path, state, untied_metadata(untied))
            if untied:
                log.warning(
                    "%s holds %s, one weight of the base, as different ones: load it with load_merged. load_state_dict "
                    "would keep one of them in a model that ties them; or write a folder with merge_and_unload()",
                    path,
                    " and ".join(untied[0]),
                )
        else:
            safetensors.save_adapter(path, self.adapter_tensors(chosen), self.configs[chosen])

    def load_model(self, path: str | Path, name: str | None = None) -> None:
        """Load what save_model wrote into an adapter made with the same config; strict, and all or nothing."""
        chosen = self._chosen(name)
        self._check_unmerged("load an adapter")
        safetensors.load_adapter(path, self.adapter_tensors(chosen), self.configs[chosen])

    def save_pretrained(
        self, directory: str | Path, name: str | None = None, base_files_sha256: str | None = None
    ) -> None:
        """Write an adapter in PEFT's format: adapter_config.json, adapter_model.safetensors, README.md.

        base_files_sha256: the digest of the base's weight files, if known, for whoever looks for the base.
        """
        peft_folder.save(self, directory, self._chosen(name), base_files_sha256)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        directory: str | Path,
        adapter_name: str = DEFAULT,
        strict_base: bool = False,
        verbose: bool = True,
    ) -> LoraModel:
        """`model` with an adapter in PEFT's format, ours or PEFT's own; what fails leaves `model` as it was.

        Other base weights than those it was trained on (another model, a quantised copy) are said once;
        `strict_base=True` makes them an error. The same weights in float32 or bfloat16 are the same base.
        """
        stored = peft_folder.read(directory, model)
        with undone_on_failure(model):
            made = cls(model, stored.config, adapter_name, verbose=False, given=Given(fills=False))
            peft_folder.fill(made, adapter_name, stored, strict_base)
            if verbose:
                print(made.summary())
            return made

    def load_adapter(self, directory: str | Path, name: str, strict_base: bool = False) -> None:
        """Add an adapter from a folder in PEFT's format under a new name; it is not active yet."""
        stored = peft_folder.read(directory, self.wrapped)
        with undone_on_failure(self, self.route_state):
            self.add_adapter(name, stored.config, Given(fills=False))
            peft_folder.fill(self, name, stored, strict_base)

    def base_sha256(self) -> str | None:
        """Identity of the base weights, computed once for the values that they have; None on the meta device.

        Over names, shapes and values rounded to bfloat16, so that it is the same in float32 and bfloat16; not the
        digest of a file.
        """
        known = self.known_base
        known.identity = base_hash.found(self.wrapped, known.identity)
        return known.identity.sha256

    # State dicts: while merged they hold the base's own parameters too, as "kept.…"

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, parameter in merging.kept_parameters(self.wrapped).items():
            destination[f"{prefix}kept.{name}"] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        start = f"{prefix}kept."
        theirs = {key.removeprefix(start): state_dict.pop(key) for key in [*state_dict] if key.startswith(start)}
        ours = merging.kept_parameters(self.wrapped)
        if self._merged is not None and set(theirs) != set(ours):
            raise UserError("this state dict is of another merge or of none; call unmerge() before loading it")
        if not all(tensor.is_floating_point() for tensor in theirs.values()):
            raise UserError("this state dict is of an adapter merged into a quantised base; take it after unmerge()")
        for name, tensor in theirs.items():
            if name in ours:
                ours[name].data.copy_(tensor)
            else:
                state_dict[f"{prefix}wrapped.{name}"] = tensor
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Inside

    @contextmanager
    def _routed(self, plan: Plan) -> Iterator[None]:
        self._check_unmerged("route")
        for name in set(plan.names) - {BASE}:
            self._check_name(name)
        with self.route_state.using(plan):
            yield

    def _drops(self, plan: Plan) -> bool:
        return any(self.configs[name].lora_dropout > 0 for name in plan.names if name != BASE)

    def _chosen(self, name: str | None) -> str:
        chosen = name or self.active_adapter or next(iter(self.configs), "")
        self._check_name(chosen)
        return chosen

    def _check_name(self, name: str) -> None:
        if name not in self.configs:
            raise UserError(f"there is no adapter {name!r}; this model has {', '.join(self.configs) or 'none'}")

    def _check_new_name(self, name: str) -> None:
        if name in self.configs:
            raise UserError(f"there is an adapter {name!r} already; choose another name or delete it first")
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w-]*", name) or name == BASE:
            raise UserError(f"adapter name {name!r} cannot be used; take letters, digits, _ and -")
        if any(hasattr(container, name) for container in (nn.ModuleDict(), nn.ParameterDict())):
            raise UserError(
                f"adapter name {name!r} cannot be used: torch's containers have an attribute of that name; "
                f"take another, such as {name.strip('_')}_1"
            )

    def _check_unmerged(self, what: str) -> None:
        if (merged := self.merged_adapter) is not None:
            raise UserError(f"cannot {what} while {merged!r} is merged into the weights; call unmerge() first")
