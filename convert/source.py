"""The source of a conversion: any checkpoint that mlxmoe can load, read lazily, one tensor at a time.

mlx-lm's own `sanitize` (through mlxmoe.models) maps the names on disk to the names of the model, so every architecture
that loads can be converted. It runs on lazily loaded arrays: nothing is read until one result is evaluated, and an
evaluated tensor is freed as soon as it is dropped here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import infer_quant_config

from mlxmoe.checkpoint import Checkpoint
from mlxmoe.errors import UserError
from mlxmoe.formats import MatrixShape, choose_group_size
from mlxmoe.models import ExpertSite, expert_sites, model_classes, named_arrays

PROJECTIONS = {"glu": ("gate_proj", "up_proj", "down_proj"), "mlp": ("fc1", "fc2")}


class TrunkTensor(NamedTuple):
    """A tensor outside the routed experts. `tensor_class` is None for what is never quantized: router, norms, vectors."""

    name: str
    module: str  # path of the module that would be quantized
    shape: tuple[int, ...]
    dtype: mx.Dtype
    tensor_class: str | None
    group_sizes: tuple[int, ...] = ()  # those of 64 and 128 that divide its columns, else 32; empty: not quantized


class Source:
    """A checkpoint seen through its model: expert sites, trunk tensors, and lazy arrays of both.

    Raises UserError for an unknown or dense architecture, missing tensors, wrong shapes and matrices that no group size
    divides.
    """

    def __init__(self, checkpoint: Checkpoint, group_size: int):
        if checkpoint.kind == "converted":
            raise UserError(f"{checkpoint.name} is already converted", "convert from the original checkpoint")
        if checkpoint.kind == "repacked":
            raise UserError(f"{checkpoint.name} is a repacked folder", "convert the checkpoint that it was made from")
        self.checkpoint = checkpoint
        model_class, args_class = model_classes(checkpoint.config)
        self.build: Callable[[], Any] = lambda: model_class(args_class.from_dict(checkpoint.config))  # type: ignore[call-arg]
        model = self.build()
        self.sites: list[ExpertSite] = expert_sites(model)
        self.shapes = {site.path: _expert_shapes(site, group_size) for site in self.sites}
        self._wanted = {name: tuple(array.shape) for name, array in named_arrays(model.parameters()).items()}
        self._modules = dict(model.named_modules())
        tensors = self.tensors()
        self.trunk = [self._trunk_tensor(name, tensors[name]) for name in sorted(tensors) if not self._is_expert(name)]
        self.num_parameters = sum(int(np.prod(shape)) for shape in self._wanted.values())

    def tensors(self) -> dict[str, mx.array]:
        """All tensors under the model's names, lazy. Call again for a second pass: what was evaluated stays in memory."""
        loaded: dict[str, mx.array] = {}
        for shard in self.checkpoint.shards:
            loaded.update(cast(dict[str, mx.array], mx.load(str(shard))))
        try:
            tensors = dequantized(self.build().sanitize(loaded), self._modules)
        except UserError:
            raise
        except ValueError as error:  # MLX cannot stack or split tensors of these shapes
            raise UserError(
                f"{self.checkpoint.name}: tensors do not have the shapes that config.json says ({error})",
                "config.json and weights do not belong together",
            ) from None
        for name, shape in self._wanted.items():
            if name not in tensors:
                raise UserError(f"{self.checkpoint.name} lacks the tensor {name}", "get the missing files")
            if tuple(tensors[name].shape) != shape:
                raise UserError(
                    f"{self.checkpoint.name}: {name} has shape {tuple(tensors[name].shape)}, config.json says {shape}",
                    "config.json and weights do not belong together",
                )
        extra = sorted(set(tensors) - set(self._wanted))
        if extra:
            raise UserError(
                f"{self.checkpoint.name} has {len(extra)} tensors that its architecture does not use, such as {extra[0]}",
                "config.json and weights do not belong together",
            )
        return tensors

    def experts(self, tensors: dict[str, mx.array], site: ExpertSite, projection: str) -> Iterator[np.ndarray]:
        """float32 [N, K] of each expert in order. Takes the stacked tensor out of `tensors`; holds one stack meanwhile."""
        name = f"{site.path}.{projection}.weight"
        stack = tensors.pop(name)
        mx.eval(stack)
        for e in range(site.num_experts):
            weight = np.array(stack[e].astype(mx.float32))
            if not np.isfinite(weight).all():
                raise UserError(
                    f"{self.checkpoint.name}: {name} has values that are not finite in expert {e}",
                    "the checkpoint is damaged: download it again",
                )
            yield weight

    def _is_expert(self, name: str) -> bool:
        """Expert weights become records; expert biases are small and stay in the trunk."""
        return name.endswith(".weight") and any(name.startswith(site.path + ".") for site in self.sites)

    def _trunk_tensor(self, name: str, array: mx.array) -> TrunkTensor:
        path = name.rpartition(".")[0]
        module = self._modules.get(path)
        tensor_class = None
        if name.endswith(".weight") and module is not None and hasattr(module, "to_quantized"):
            tensor_class = self._classify(path, module)
        # A tensor that no group size divides stays as it is.
        columns = array.shape[-1]
        group_sizes = tuple(g for g in (64, 128) if columns % g == 0) or tuple(g for g in (32,) if columns % g == 0)
        if tensor_class is None or not group_sizes:
            tensor_class, group_sizes = None, ()
        return TrunkTensor(name, path, tuple(array.shape), array.dtype, tensor_class, group_sizes)

    def _classify(self, path: str, module: nn.Module) -> str | None:
        """The class whose rule applies to a quantizable module, None for routers and gates."""
        if isinstance(module, nn.Embedding):
            return "embedding"
        rows = module["weight"].shape[-2]
        in_layer = re.search(r"layers\.(\d+)\.", path)
        if in_layer is None:
            return "head"
        site = next((s for s in self.sites if s.layer == int(in_layer[1])), None)
        if rows == 1 or (site is not None and rows == site.num_experts and re.search(r"gate|router", path)):
            return None
        if "shared" in path:
            return "shared"
        return "attention" if re.search(r"attn|attention", path) else "dense"


def _expert_shapes(site: ExpertSite, group_size: int) -> tuple[MatrixShape, ...]:
    """The projections of a site with their group sizes. Raises UserError where no group size divides."""
    into = (site.hidden_dims, site.input_dims)
    *first, last = PROJECTIONS[site.kind]
    dims = [(name, *into) for name in first] + [(last, *into[::-1])]
    return tuple(MatrixShape(name, n, k, choose_group_size(k, group_size)) for name, n, k in dims)


def dequantized(tensors: dict[str, mx.array], modules: dict[str, nn.Module]) -> dict[str, mx.array]:
    """Replaces packed weights (gpt-oss as shipped in MXFP4, a stock MLX checkpoint) by lazy dequantized ones."""
    result = dict(tensors)
    for name in tensors:
        if not name.endswith(".scales"):
            continue
        path = name.removesuffix(".scales")
        packed, scales = result.pop(f"{path}.weight"), result.pop(f"{path}.scales")
        settings = infer_quant_config(path, modules[path], tensors)
        result[f"{path}.weight"] = mx.dequantize(packed, scales, result.pop(f"{path}.biases", None), **settings)
    return result
