"""Models through the real model code, with every expert product executed by metalsim from the text in metal/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from metalsim import require, run
from mlx_lm.convert import convert as mlx_lm_convert
from mlx_lm.generate import generate_step
from toy_checkpoints import write_qwen3

from mlxmoe import loading
from mlxmoe.expert_memory import ExpertMemory
from mlxmoe.experts import KernelExperts
from mlxmoe.kernel_choice import Choice, LayerShape
from mlxmoe.kernels import PHASES, MetalKernels, ReferenceKernels
from mlxmoe.loading import Loaded, RuntimeConfig, open_model
from mlxmoe.prepared import full_memory, prepare, smallest_memory

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
    tables = 5 * 3 * 32 * 12 * 4
    assert resident == planes.report.nbytes_experts + tables


def test_planes_of_an_elastic_model() -> None:
    """Levels reduced to fit: as measured, in no more memory than asked, and still the same way for the same budget."""
    prepared = prepare(None, RuntimeConfig(context=128, kernels=ReferenceKernels()))
    memory = (smallest_memory(prepared) + full_memory(prepared)) // 2
    first, second = (open_model(None, RuntimeConfig(memory, 128, kernels=ReferenceKernels())) for _ in range(2))
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


def test_streamed_experts_give_the_resident_models_bits_on_simulated_kernels() -> None:
    """A prompt in the prefill kernels and single tokens, with room for little more than one token's experts: the logits of
    the resident model on the same kernels."""
    require()
    launches: list[str] = []
    config = RuntimeConfig(None, 128, kernels=simulated(launches), threads=2, direct=False)
    prepared = prepare(None, config)
    streamed = loading._open_streamed(prepared, prepared.streaming(0).least_memory * 21 // 20, config)
    resident = open_model(None, RuntimeConfig(None, 128, kernels=simulated([])))
    prompt = mx.array([streamed.tokenizer.encode(PROMPT * 4)[:10]])
    for tokens in (prompt, prompt[:, :1], prompt[:, 1:2], prompt[:, :2]):
        assert mx.array_equal(streamed.model(tokens), resident.model(tokens)).item()
    assert {"expert_gemm_planes", "expert_gate_up_planes", "expert_down_planes", "route"} == set(launches)
    assert isinstance(streamed.experts, ExpertMemory)
    assert streamed.experts.totals().evictions > 0
    assert streamed.experts.totals().hits > 0
    streamed.experts.close()


# ---------------------------------------------------------------------------------------------------------------------
# Quantized checkpoints as they are
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("stock") / "source")


@pytest.fixture(scope="module")
def stock(unquantized: Path) -> Path:
    """What mlx-lm's own converter makes of it, 4 bits in groups of 64."""
    folder = unquantized.parent / "4bit"
    mlx_lm_convert(str(unquantized), str(folder), quantize=True, q_bits=4, q_group_size=64)
    return folder


def test_a_quantized_checkpoint_decodes_the_same_tokens_on_simulated_kernels(stock: Path) -> None:
    """Its experts are not read twice: what takes their place shares the arrays."""
    require()
    launches: list[str] = []
    built_ins, ours = open_model(stock), open_model(stock, RuntimeConfig(kernels=simulated(launches)))
    assert greedy(ours, 8) == greedy(built_ins, 8)
    assert launches.count("expert_gate_up_affine") == launches.count("expert_down_affine") >= 3 * 7
    assert launches.count("route") >= 3 * 8
    layers = expert_layers(ours)
    assert len(layers) == 3
    assert sum(layer.nbytes for layer in layers) == ours.report.nbytes_experts == built_ins.report.nbytes_experts
    assert ours.report.products == "the project's kernels, as asked for"


@pytest.mark.parametrize("phases", [("decode",), ("prefill",), PHASES])
def test_a_phase_of_a_quantized_checkpoint_may_stay_with_the_built_ins(
    phases: tuple[str, ...], stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: set[str] = set()

    class Watched(ReferenceKernels):
        def expert_gate_up(self, *arguments: Any) -> mx.array:
            called.add("decode")
            return super().expert_gate_up(*arguments)

        def expert_gemm(self, *arguments: Any) -> mx.array:
            called.add("prefill")
            return super().expert_gemm(*arguments)

    asked: list[list[LayerShape]] = []

    def select_all(layers: list[LayerShape], _: object) -> Choice:
        asked.append(layers)
        return Choice(Watched(), "as measured", phases)

    monkeypatch.setattr("mlxmoe.prepared.select_all", select_all)
    ours = open_model(stock)
    assert greedy(ours, 4) == greedy(open_model(stock, RuntimeConfig(kernels=None)), 4)
    assert called == set(phases)
    assert ours.report.products == "as measured"
    ((first, *others),) = asked
    assert (first.codec, first.levels, first.group_size, first.width) == ("affine", (4,), 64, 128)
    assert others == [first] * 2


def test_a_checkpoint_without_quantized_experts_stays_with_the_built_ins(unquantized: Path) -> None:
    loaded = open_model(unquantized, RuntimeConfig(kernels=ReferenceKernels()))
    assert not expert_layers(loaded)
    assert loaded.report.products == "MLX's built-in products"
