"""The demo model through the real model code, with every expert product executed by metalsim from the text in metal/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from metalsim import require, run
from mlx_lm.generate import generate_step

from mlxmoe.experts import KernelExperts
from mlxmoe.kernels import MetalKernels, ReferenceKernels
from mlxmoe.loading import Loaded, RuntimeConfig, full_memory, open_model, prepare, smallest_memory

PROMPT = "Once upon a time"
TOKENS = 32


def greedy(loaded: Loaded, tokens: int) -> list[int]:
    """The next tokens, greedily, end tokens or not."""
    prompt = mx.array(loaded.tokenizer.encode(PROMPT))
    steps = generate_step(prompt, loaded.model, max_tokens=tokens, prefill_step_size=loaded.report.prefill_step)
    return [int(token) for token, _ in steps]


def expert_layers(loaded: Loaded) -> list[KernelExperts]:
    return [module for _, module in loaded.model.named_modules() if isinstance(module, KernelExperts)]


def test_planes_give_the_tokens_of_the_built_ins() -> None:
    """Plane banks through the plain reference: same tokens as merged codes through MLX's products, in less memory."""
    built_ins, planes = open_model(None), open_model(None, RuntimeConfig(kernels=ReferenceKernels()))
    assert len(expert_layers(planes)) == 5
    assert not expert_layers(built_ins)
    assert greedy(planes, TOKENS) == greedy(built_ins, TOKENS)
    # a float16 scale a group and the planes as they are, against a float32 scale and bias and widened fields
    assert planes.report.nbytes_experts < 0.8 * built_ins.report.nbytes_experts
    resident = sum(layer.nbytes for layer in expert_layers(planes))
    tables = 5 * 3 * 32 * 8 * 4
    assert resident == planes.report.nbytes_experts + tables


def test_planes_of_an_elastic_model() -> None:
    """Levels reduced to fit: as measured, in no more memory than asked, and still the same way for the same budget."""
    prepared = prepare(None, RuntimeConfig(context=128, kernels=ReferenceKernels()))
    memory = (smallest_memory(prepared) + full_memory(prepared)) // 2
    first, second = (open_model(None, RuntimeConfig(memory, 128, ReferenceKernels())) for _ in range(2))
    assert first.report.mode == "elastic"
    assert set(first.report.levels) > {2}
    assert first.report.nbytes <= memory
    assert first.report == second.report
    assert greedy(first, 8) == greedy(second, 8)


@pytest.fixture(scope="module")
def launches() -> list[str]:
    return []


def simulated(launches: list[str]) -> MetalKernels:
    """The kernels with metalsim in the place of the GPU. The detectors run in test_kernels.py; here it is the numbers."""

    def factory(**kernel: Any) -> Callable[..., list[mx.array]]:
        def call(**launch: Any) -> list[mx.array]:
            launches.append(kernel["name"])
            return run(**kernel, **launch, check=False).outputs

        return call

    return MetalKernels(factory)


def test_the_demo_decodes_the_same_tokens_on_simulated_kernels(launches: list[str]) -> None:
    """Prefill and 32 decoded tokens, float32: exactly the tokens of the reference path, three launches a layer and token."""
    require()
    found = greedy(open_model(None, RuntimeConfig(kernels=simulated(launches))), TOKENS)
    assert found == greedy(open_model(None), TOKENS)
    assert launches.count("expert_gate_up_planes") == launches.count("expert_down_planes") >= 5 * (TOKENS - 1)
    assert launches.count("route") >= launches.count("expert_down_planes")  # once a layer and forward pass
