"""A model that says what it is told to, and a byte-level tokenizer for it: the conversation without a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxmoe.loading import Loaded, LoadReport
from mlxmoe.session import Engine

CHATML = (
    "{% for m in messages %}{% if m.role == 'system' and m.content == 'refuse' %}{{ raise_exception('no system') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def byte_tokenizer(template: str | None = CHATML) -> TokenizerWrapper:
    """One token per byte and two ChatML markers; each marker is one token."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=["<|im_start|>"]
    )
    fast.chat_template = template
    return TokenizerWrapper(fast, BPEStreamingDetokenizer)


class FixedCache(KVCache):
    """A cache that cannot go back, like that of a state-space layer."""

    def is_trimmable(self) -> bool:
        return False


class ScriptedModel(nn.Module):
    """Gives each question its answer from `answers`, token by token, then ends the sequence.

    It reads the conversation from the KV cache alone, as a real one does: a cache that does not hold what the engine
    believes it holds changes the answer.
    """

    def __init__(self, tokenizer: TokenizerWrapper, answers: dict[str, str], cache_type: type[KVCache] = KVCache):
        super().__init__()
        self.layers: list[nn.Module] = []
        self._tokenizer, self._answers, self._cache_type = tokenizer, answers, cache_type
        self.num_forwarded = 0  # tokens fed so far
        self.fail_at: int | None = None  # fails, with the cache already updated, once that many tokens are fed
        self.error: type[BaseException] = RuntimeError

    def make_cache(self) -> list[Any]:
        return [self._cache_type()]

    def __call__(self, inputs: mx.array, cache: list[Any]) -> mx.array:
        """inputs [1, L] -> logits [1, L, V]."""
        self.num_forwarded += inputs.shape[1]
        keys, _ = cache[0].update_and_fetch(*[inputs.astype(mx.float32)[:, None, :, None]] * 2)
        if self.fail_at is not None and self.num_forwarded >= self.fail_at:
            raise self.error("out of memory")
        logits = mx.zeros((1, inputs.shape[1], len(self._tokenizer)))
        logits[..., self._next([int(t) for t in keys[0, 0, :, 0].tolist()])] = 10.0
        return logits

    def _next(self, tokens: list[int]) -> int:
        prompt, opening, _ = self._tokenizer.decode(tokens).rpartition("<|im_start|>assistant\n")
        question = prompt.rpartition("user\n")[2].removesuffix(END + "\n")
        answer = self._tokenizer.encode(self._answers.get(question, "") + END)
        said = len(tokens) - len(self._tokenizer.encode(prompt + opening))
        return int(answer[min(said, len(answer) - 1)])


def held(engine: Engine) -> list[int]:
    """The tokens that are really in the engine's cache."""
    cache = engine._cache[0] if engine._cache is not None else None
    return [] if cache is None or cache.keys is None else [int(t) for t in cache.keys[0, 0, : cache.offset, 0].tolist()]


def scripted(
    answers: dict[str, str],
    context: int = 2048,
    template: str | None = CHATML,
    cache_type: type[KVCache] = KVCache,
    prefill_step: int = 512,
) -> Loaded:
    """A loaded model that gives `answers`, under the name "scripted"."""
    tokenizer = byte_tokenizer(template)
    report = LoadReport(
        source="scripted",
        folder=Path("no-such-folder"),
        architecture="scripted",
        kind="huggingface",
        mode="resident",
        context=context,
        prefill_step=prefill_step,
        nbytes_file=0,
        nbytes_experts=0,
        nbytes_trunk=0,
        nbytes_kv=0,
        nbytes_buffers=0,
        memory=10**9,
    )
    return Loaded(ScriptedModel(tokenizer, answers, cache_type), tokenizer, report)
