"""Times prefill and decode of one model, and counts the bytes that a decoded token reads.

Every model runs through mlx-lm's own generate_step with its own cache, so that only the model differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, wired_limit
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear


class DecodeRun(NamedTuple):
    """One run: `ttft_seconds` until the first token is there, `decode_seconds` for the `decoded` tokens after it."""

    prompt_tokens: int
    decoded: int
    ttft_seconds: float
    decode_seconds: float
    kv_bytes: int  # of the cache's filled part at the end: what the last token read

    @property
    def prefill_rate(self) -> float:
        return self.prompt_tokens / self.ttft_seconds

    @property
    def decode_rate(self) -> float:
        return self.decoded / self.decode_seconds


class BytesPerToken(NamedTuple):
    """Weight bytes that decoding one token reads, at batch size 1."""

    trunk: int
    experts: int

    @property
    def total(self) -> int:
        return self.trunk + self.experts


@runtime_checkable
class ExpertContainer(Protocol):
    """A layer that holds all routed experts and says so: mlxmoe.experts.ExpertLayer."""

    @property
    def nbytes(self) -> int: ...

    @property
    def num_experts(self) -> int: ...


def fixed_prompt(length: int, vocabulary: int) -> list[int]:
    """The same well-spread token ids for every model of this vocabulary."""
    return [(i * 7919 + 104729) % vocabulary for i in range(length)]


def measure(model: nn.Module, prompt: list[int], tokens: int) -> DecodeRun:
    """Prefills `prompt` and decodes `tokens` tokens greedily, whatever they are: there is no end token.

    The first of them is timed with the prefill (it comes out of it), so decode speed is over tokens - 1 of them.
    Blocks until all work that it started is done, so that nothing of it falls into the next measurement.
    """
    cache = make_prompt_cache(model)
    array = mx.array(prompt)
    mx.eval(array)
    with wired_limit(model):
        start = time.perf_counter()
        steps = generate_step(array, model, max_tokens=tokens, prompt_cache=cache)
        next(steps)
        first = time.perf_counter()
        decoded = sum(1 for _ in steps)
        last = time.perf_counter()
        # generate_step has begun a token more than it gives: wait for it here, outside the time
        mx.eval([c.state for c in cache])
    return DecodeRun(len(prompt), decoded, first - start, last - first, sum(cache_bytes(c) for c in cache))


def cache_bytes(cache: Any) -> int:
    """Bytes that attention reads of one layer's cache: its filled part, as mlx-lm's caches grow in steps of 256."""
    if isinstance(cache, CacheList):
        return sum(cache_bytes(c) for c in cache.caches)
    if isinstance(cache, (KVCache, RotatingKVCache)) and cache.keys is not None:
        room = cache.keys.shape[2]
        return cache.nbytes * min(cache.offset, room) // room
    return cache.nbytes


def weight_bytes_per_token(model: nn.Module, experts_per_token: int) -> BytesPerToken:
    """Weight bytes that one decoded token reads, from the parameters that `model` holds.

    Of routed experts, experts_per_token / num_experts of their resident bytes: exact where all experts of a layer have
    the same size, else the mean under even routing. Of the input embedding one row, unless it is the output head too.
    All other parameters count in full.
    """
    trunk = _parameter_bytes(model)
    experts = 0
    for module, nbytes in _expert_containers(model):
        trunk -= _parameter_bytes(module)
        experts += nbytes * experts_per_token // module.num_experts
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)) and _is_input_only(model, name):
            rows = module.weight.shape[0]
            trunk -= _parameter_bytes(module) * (rows - 1) // rows
    return BytesPerToken(trunk, experts)


def _expert_containers(model: nn.Module) -> Iterator[tuple[Any, int]]:
    """Outermost modules that hold routed experts, with the resident bytes of all their experts."""
    inside: tuple[str, ...] = ()
    for name, module in sorted(model.named_modules(), key=lambda item: item[0]):
        if name.startswith(inside):
            continue
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            nbytes = _parameter_bytes(module)
        elif isinstance(module, ExpertContainer):
            nbytes = module.nbytes
        else:
            continue
        inside += (f"{name}.",)
        yield module, nbytes


def _is_input_only(model: nn.Module, name: str) -> bool:
    """Token embeddings are read in full when they serve as the output head, which models without lm_head do."""
    names = {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()}
    return (
        name.rsplit(".", 1)[-1] in ("embed_tokens", "wte", "tok_embeddings", "word_embeddings") and "lm_head" in names
    )


def _parameter_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in arrays(module.parameters()))


def arrays(tree: Any) -> list[tuple[str, mx.array]]:
    """The arrays of a tree of parameters or cache states, with their paths."""
    return [(path, leaf) for path, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]  # type: ignore[str-unpack]
