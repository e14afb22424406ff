"""RiMModel: LoRA plus memory rows on a causal language model; combining several adapters into one.

When adapters are combined, memory rows, being embeddings, combine in one way, whatever happens to LoRA:
``sum(weight * rows)``. Weights that sum to 1 keep the rows at their trained size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from rim_peft.tuner.bases import check_base, keep_unpacked
from rim_peft.tuner.config import NUM_ROWS, RiMConfig
from rim_peft.tuner.fit import check_base_architecture, check_targets, check_vocabulary, describe_architecture
from rim_peft.tuner.generation import BlockGenerator
from rim_peft.tuner.insertion import check_mixture, mixed_rows
from rim_peft.tuner.layers import check_variants
from rim_peft.tuner.memory_embedding import MemoryEmbedding
from rim_peft.tuner.peft_plugin import BLOCK_OPTIONS, PREFIX
from rim_peft.tuner.tensors import attached_names, check_tensors
from rim_peft.tuner.variants import BlockHooks

_HOOKS = "rim_block_hooks"
"""The base's attribute for the hooks on its layers, set if an adapter needs them."""

FILE = "rim_adapter_file"
"""The base's attribute for a function that reads an adapter's file, set while transformers loads it natively."""


class RiMModel(LoraModel):
    """The tuner behind ``get_peft_model(base, RiMConfig(...))``.

    The base's input embedding is wrapped in a :class:`MemoryEmbedding`, LoRA is added to ``target_modules``, and the
    base's ``generate`` is replaced by a :class:`BlockGenerator`, so blocks are appended even if the base is called
    directly (transformers' adapter loading, pipelines).
    """

    prefix = PREFIX
    tuner_layer_cls: Any = BaseTunerLayer
    model: Any

    @property
    def memory(self) -> MemoryEmbedding:
        """The layer that holds every adapter's memory rows."""
        layer = self.model.get_input_embeddings()
        if not isinstance(layer, MemoryEmbedding):
            raise TypeError(
                f"input embedding: must be RiM's, got {type(layer).__name__}: the adapter was unloaded. Attach it "
                "again."
            )
        return layer

    def generate(self, *args: Any, num_blocks: int | None = None, **kwargs: Any) -> Any:
        """Generate after prompt and memory blocks; see :meth:`BlockGenerator.__call__`."""
        return self.model.generate(*args, num_blocks=num_blocks, **kwargs)

    def set_dropout(self, p: float, adapter_name: str | None = None) -> None:
        """Change the dropout before LoRA, for one adapter or for the active one; ``p`` may be or have been 0.

        Raises:
            ValueError: ``p`` is not in [0, 1), or there is no adapter of this name.
        """
        if not 0 <= p < 1:
            raise ValueError(f"p: must be in [0, 1), got {p!r}.")
        configs: dict[str, Any] = self.peft_config
        for name in self.active_adapters if adapter_name is None else [adapter_name]:
            if name not in configs:
                raise ValueError(f"adapter_name: must be one of {list(configs)}, got {name!r}.")
            configs[name].lora_dropout = p
            for module in self.model.modules():
                if isinstance(module, LoraLayer) and name in module.lora_dropout:
                    dropout = nn.Dropout(p) if p > 0 else nn.Identity()
                    module.lora_dropout[name] = dropout.train(module.lora_dropout.training)

    # PEFT calls these to attach and load an adapter.

    def _post_injection_hook(self, model: nn.Module, config: RiMConfig, adapter_name: str) -> None:
        vars(model)["generate"] = BlockGenerator(model)
        keep_unpacked(model)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter, and the hooks on the base's layers if it is the first one that needs them."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        configs: dict[str, Any] = self.peft_config
        if (read := vars(model).get(FILE)) is not None:  # otherwise PEFT's remapping of names checks the tensors
            tensors = attached_names(model, adapter_name, read())
            self._remap_adapter_state_dict_for_load(model, configs[adapter_name], adapter_name, tensors)
        if configs[adapter_name].changes_layers and _HOOKS not in vars(model):
            vars(model)[_HOOKS] = BlockHooks(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the hooks on the base's layers if no other adapter needs them."""
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.active_adapters:  # each layer chose the first adapter that it has, which may differ
            self.set_adapter(self.active_adapters)
        configs: dict[str, Any] = self.peft_config
        if not any(config.changes_layers for config in configs.values()):
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        hooks = vars(self.model).pop(_HOOKS, None)
        if hooks is not None:
            hooks.remove()

    def _check_new_adapter_config(self, config: RiMConfig) -> None:
        super()._check_new_adapter_config(config)
        check_base(self.model)
        check_base_architecture(config, self.model)
        num_embeddings = _matrix(self.model).shape[0]
        check_vocabulary(config, num_embeddings)
        check_variants(config, self.model)
        config.first_memory_id = num_embeddings
        config.base_architecture = describe_architecture(self.model)

    def _prepare_adapter_config(self, peft_config: RiMConfig, model_config: dict[str, Any]) -> RiMConfig:
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        check_targets(peft_config, self.model, self._embedding_name())
        return peft_config

    def _check_target_module_exists(self, peft_config: RiMConfig, key: str) -> Any:
        """Always target the input embedding, and LoRA's targets unless ``r=0``."""
        if key == self._embedding_name():
            return True
        return peft_config.r > 0 and check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        lora_config: RiMConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if current_key != self._embedding_name():
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
            )
            return
        if not isinstance(target, MemoryEmbedding):
            target = MemoryEmbedding(target, _matrix(self.model).shape[0])
            setattr(parent, target_name, target)
        initializer_range = getattr(self.model.config.get_text_config(), "initializer_range", None) or 0.02
        target.add_adapter(adapter_name, lora_config, initializer_range=initializer_range)

    def _embedding_name(self) -> str:
        embedding = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is embedding)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: RiMConfig, adapter_name: str, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the tensors to save, with DoRA's magnitudes under their full parameter names."""
        # PEFT cuts ".weight" off these names (an older format) and adds it again on loading. transformers' own loading
        # and hotswap do not add it: they keep the magnitudes at their start values, or fail. Both names load here.
        saved = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        cut = f".lora_magnitude_vector.{adapter_name}"
        return {f"{key}.weight" if key.endswith(cut) else key: value for key, value in saved.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: RiMConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Check a file's tensors before PEFT loads them; PEFT itself only warns about missing ones."""
        expected = (NUM_ROWS, _matrix(model).shape[1])
        shapes = [tuple(value.shape) for key, value in state_dict.items() if ".lora_rim_memory." in key]
        if shapes != [expected]:
            found = shapes[0] if shapes else "none"
            raise ValueError(
                f"memory rows: must be {expected} for this base, got {found} in the adapter's file: the adapter was "
                "made for another base, or this is not its file. Load it onto its own base."
            )
        named = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if len(named) < len(state_dict):
            raise ValueError(
                f"adapter's file: must hold each tensor once, got {len(state_dict)} tensors for {len(named)}, some "
                "under two names. Save the adapter again."
            )
        return check_tensors(model, adapter_name, named)

    # What merging does, and what is refused.

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_biases(adapter_names or self.active_adapters)
        if merge and safe_merge:
            self._check_finite(adapter_names or self.active_adapters)
        if merge:
            warnings.warn(
                "Merging folds LoRA into the base and drops the memory rows: the resulting plain model has no ids for "
                "them and generates without memory blocks. Keep the adapter to generate with blocks.",
                stacklevel=3,
            )
        vars(self.model).pop("generate", None)
        self._remove_hooks()
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base in place; if a safe merge fails, all layers stay as they were.

        Raises:
            ValueError: the active adapter, whose blocks are used, would not be merged, weights are not finite, or a
                layer has no bias that LoRA's could be added to.
        """
        names = adapter_names or self.active_adapters
        missing = [name for name in self.active_adapters if name not in (*names, *self.memory.merged_adapters)]
        if missing:
            raise ValueError(
                f"adapter_names: must hold the active adapter, {missing[0]!r}, got {names!r}: its blocks would be used "
                "with the LoRA of others. Call set_adapter first, or merge it too."
            )
        self._check_biases(names)
        if safe_merge:
            self._check_finite(names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _check_biases(self, adapter_names: list[str]) -> None:
        """Refuse LoRA's biases where the base has none, before the first layer is merged and the rows are gone."""
        # PEFT finds out halfway, with LoRA's matrices already in the weight, to which they would be added again.
        for name, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or getattr(module.get_base_layer(), "bias", None) is not None:
                continue
            if owner := next((own for own in adapter_names if module.lora_bias.get(own)), None):
                raise ValueError(
                    f"lora_bias: must be False for LoRA to be merged into layers without a bias, such as {name}, got "
                    f"True in the adapter {owner!r}. Keep the adapter beside its base, or export it as plain LoRA "
                    "(--format peft-lora)."
                )

    def _check_finite(self, adapter_names: list[str]) -> None:
        """Refuse what a safe merge refuses, before the first layer is merged and the rows are gone."""
        # The message contains PEFT's own sentence, by which PEFT's users recognise this error.
        for name, parameter in self.model.named_parameters():
            owner = next((own for own in adapter_names if f".{own}." in f"{name.partition('.lora_')[2]}."), None)
            if owner is not None and not bool(parameter.isfinite().all()):
                raise ValueError(
                    f"safe_merge: the adapter's weights must be finite, got NaN or infinity in {name}. NaNs "
                    f"detected in the merged weights. The adapter {owner} seems to be broken. Load another "
                    "checkpoint of it."
                )

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        """Return no modules: the embedding is wrapped, but its matrix, which a head may share, does not change."""
        return []

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let each row of a pass use its own adapter if ``adapter_names`` is given."""
        adapter_names = kwargs.pop("adapter_names", None)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            if adapter_names is None:
                yield
                return
            check_mixture(adapter_names, self.peft_config, training=self.training)
            with mixed_rows(self.model, self.memory, adapter_names):
                yield

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: continuous batching builds its inputs itself, without blocks."""
        raise ValueError(
            "generate_batch: continuous batching cannot append memory blocks. Call generate with a padded batch."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the memory ids start where the base's vocabulary ends."""
        raise ValueError(
            "resize_token_embeddings: the vocabulary must keep its size after a RiM adapter is attached, since the "
            "memory ids start at its end. Resize the base first and attach a new adapter."
        )

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter: the weighted sum of others' memory rows, and their LoRA as PEFT combines it.

        Args:
            adapters: names of adapters with the same blocks.
            weights: one number per adapter.
            adapter_name: the new adapter's name; if it exists, nothing happens.
            args: as for ``LoraModel.add_weighted_adapter``: how to combine LoRA.
            kwargs: as for ``LoraModel.add_weighted_adapter``.

        Raises:
            ValueError: the adapters have different blocks, have weights besides LoRA's matrices and memory rows, or
                PEFT cannot combine them.
        """
        configs: dict[str, Any] = self.peft_config
        if adapter_name in configs:
            return
        check_combination(configs, adapters, weights)
        with_lora = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if configs[name].r > 0]
        if with_lora:
            names, lora_weights = map(list, zip(*with_lora, strict=True))
            super().add_weighted_adapter(names, lora_weights, adapter_name, *args, **kwargs)
            use_plain_scaling(self.model, configs[adapter_name], adapter_name)
        else:
            configs[adapter_name] = replace(configs[adapters[0]])
            self.inject_adapter(self.model, adapter_name)
        combine_rows(self.memory, adapters, weights, adapter_name)
        self.set_requires_grad(adapter_name, requires_grad=False)  # PEFT does the same


def has_memory(base: nn.Module) -> bool:
    """Tell whether a base contains a RiM adapter's layers."""
    return any(isinstance(module, MemoryEmbedding) for module in base.modules())


def detach(base: nn.Module) -> None:
    """Remove all adapters from a base, even if attaching or loading one failed halfway."""
    tuner: Any = RiMModel.__new__(RiMModel)
    nn.Module.__init__(tuner)
    tuner.model = base
    tuner.unload()


def _matrix(model: Any) -> Tensor:
    """Return the base's embedding matrix, (V, H), with or without an adapter."""
    weight: Tensor = model.get_input_embeddings().weight
    return weight


_NOT_COMBINED = {
    "use_dora": (False, "DoRA's magnitudes"),
    "lora_bias": (False, "LoRA's biases"),
    "modules_to_save": (None, "modules trained in full"),
}
"""Options that give an adapter weights which cannot be combined."""


def check_combination(configs: dict[str, RiMConfig], adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse adapters that cannot be combined by a weighted sum.

    Raises:
        ValueError: names, weights or options of the adapters do not match.
    """
    missing = [name for name in adapters if name not in configs]
    if missing or not adapters:
        raise ValueError(f"adapters: must be some of {list(configs)}, got {list(adapters)!r}. Load them first.")
    if len(weights) != len(adapters) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(
            f"weights: must be a number for each of the {len(adapters)} adapters, got {list(weights)!r}. Pass one each."
        )
    for option in BLOCK_OPTIONS:
        values = {name: getattr(configs[name], option) for name in adapters}
        if len(set(values.values())) > 1:
            raise ValueError(
                f"{option}: must be the same for all combined adapters, got {values}: their memory rows are used "
                "differently. Combine adapters that were trained with the same blocks."
            )
    for option, (off, left_out) in _NOT_COMBINED.items():
        if having := {name: value for name in adapters if (value := getattr(configs[name], option))}:
            raise ValueError(
                f"{option}: must be {off} for all combined adapters, got {having}: PEFT combines LoRA's matrices "
                f"without {left_out}. Merge one of them into the base instead."
            )


def combine_rows(memory: MemoryEmbedding, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Set an adapter's memory rows to the weighted sum of other adapters' rows."""
    with torch.no_grad():
        rows = [weight * memory.rows(name) for name, weight in zip(adapters, weights, strict=True)]
        memory.rows(adapter_name).copy_(torch.stack(rows).sum(0))


def use_plain_scaling(model: nn.Module, config: RiMConfig, adapter_name: str) -> None:
    """Set the LoRA scaling of a combined adapter to 1, and record its ranks in its configuration."""
    # PEFT folds each adapter's scaling into the combined matrices and sets alpha to the rank, for a scaling of 1. With
    # rsLoRA, copied from the first adapter, the scaling would be the square root of the rank. PEFT also does not
    # record ranks that differ by layer (rank_pattern), which are needed to load a file of the adapter.
    config.use_rslora = False
    ranks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            module.use_rslora[adapter_name] = False
            module.set_scale(adapter_name, 1.0)
            matrix: Any = module.lora_A[adapter_name].weight if adapter_name in module.lora_A else None
            if matrix is not None and len(matrix) != config.r:
                ranks[name] = module.r[adapter_name] = len(matrix)
    config.rank_pattern, config.alpha_pattern = ranks, dict(ranks)
