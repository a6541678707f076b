"""FusedBlock against the block of mlx-lm that it stands for, over experts that both hold exactly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU
from test_models import CASES, RECORDS, arrays, build, last_logits, newest

from mlxmoe.blocks import FusedBlock, fused_block
from mlxmoe.convert.write import pack_matrix
from mlxmoe.formats import MatrixShape
from mlxmoe.kernels import ExpertBanks, PlaneBank, ReferenceKernels, activation_of
from mlxmoe.models import expert_sites, model_classes

UNKNOWN = ("gemma4", "gemma4_text")
KNOWN = [case for case in CASES if case not in UNKNOWN]
TOLERANCE = 1e-5  # float32 on both sides, outputs of order 1
NUM_EXPERTS, DIMS, HIDDEN_DIMS, GROUP_SIZE = 8, 64, 64, 32  # the vectors' experts are 40 wide, which is no whole group


class Site(NamedTuple):
    """One MoE block and what its experts hold."""

    path: str
    block: Any
    banks: ExpertBanks


class Recorder(ReferenceKernels):
    """Notes which kernels are called, and how often."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith(("expert_", "route")):
            self.calls.append(name)
        return super().__getattribute__(name)


@pytest.fixture(autouse=True)
def _on_cpu() -> Iterator[None]:
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@cache
def make_bank(name: str, rows: int, columns: int, bias: bool, seed: int) -> PlaneBank:
    """A bank of 8-bit experts with random weights."""
    random = np.random.RandomState(seed)
    shape = MatrixShape(name, rows, columns, GROUP_SIZE)
    weights = random.standard_normal((NUM_EXPERTS, rows, columns)).astype(np.float32) * columns**-0.5
    matrices = [pack_matrix(weight, shape, 8)[0] for weight in weights]
    biases = mx.array(random.standard_normal((NUM_EXPERTS, rows)).astype(np.float32)) if bias else None
    return PlaneBank.from_matrices(matrices, [8] * NUM_EXPERTS, biases)


def stock_model(case: str, config: dict[str, Any] | None = None) -> tuple[nn.Module, list[Site]]:
    """The model of a golden vector as mlxmoe builds it, but with experts that a bank holds exactly."""
    model = build(config or newest(case))
    model.load_weights(list(model.sanitize(arrays(case, "fused")).items()))
    sites = []
    for site in expert_sites(model):
        path, _, name = site.path.rpartition(".")
        block = dict(model.named_modules())[path]
        parts = {"gate_proj": (HIDDEN_DIMS, DIMS), "up_proj": (HIDDEN_DIMS, DIMS), "down_proj": (DIMS, HIDDEN_DIMS)}
        banks = {
            part: make_bank(part, *shape, site.has_bias, seed=len(parts) * site.layer + i)
            for i, (part, shape) in enumerate(parts.items())
        }
        switch = SwitchGLU(DIMS, HIDDEN_DIMS, NUM_EXPERTS, block[name].activation, bias=site.has_bias)
        for part, bank in banks.items():
            switch[part].weight = mx.stack([bank.dequantize(expert) for expert in range(NUM_EXPERTS)])
            if bank.bias is not None:
                switch[part].bias = bank.bias
        block[name] = switch
        activation = activation_of(switch.activation)
        assert activation is not None
        sites.append(Site(path, block, ExpertBanks(*banks.values(), activation)))
    return model, sites


def family(case: str) -> str:
    """mlx-lm's module for the case."""
    name: str = model_classes(newest(case))[1].name
    return name


def fuse(case: str, site: Site, kernels: ReferenceKernels | None = None) -> FusedBlock:
    fused = fused_block(site.block, site.banks, kernels or ReferenceKernels(), family(case))
    assert fused is not None
    return fused


def inputs(tokens: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.RandomState(seed).standard_normal((1, tokens, DIMS)).astype(np.float32))


def difference(fused: FusedBlock, block: Any, x: mx.array) -> float:
    """The largest difference of the outputs, which must not be trivially small."""
    wanted, found = block(x), fused(x)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert mx.abs(wanted).max() > 0.1
    return mx.abs(found - wanted).max().item()


@pytest.mark.parametrize("case", KNOWN)
def test_same_outputs_as_the_block(case: str) -> None:
    """In decode, at the border and in prefill, for each layer."""
    _, sites = stock_model(case)
    worst = max(difference(fuse(case, s), s.block, inputs(t, i)) for i, s in enumerate(sites) for t in (1, 3, 40))
    print(f"{case}: max difference {worst:.1e}")  # shown by pytest -rP
    assert worst < TOLERANCE


@pytest.mark.parametrize("case", KNOWN)
def test_a_model_of_fused_blocks(case: str) -> None:
    """The blocks take their places in the model, which keeps its parameters but for the experts' and its logits."""
    model, sites = stock_model(case)
    ids = RECORDS[case]["ids"]
    wanted = last_logits(model, ids)
    experts = re.compile(r"\.(switch_mlp|experts)\.\w+_proj\.")
    kept = [name for name, _ in tree_flatten(model.parameters()) if not experts.search(name)]
    model.update_modules(tree_unflatten([(site.path, fuse(case, site)) for site in sites]))
    assert [name for name, _ in tree_flatten(model.parameters())] == kept
    assert sum(isinstance(module, FusedBlock) for _, module in model.named_modules()) == len(sites) > 1
    assert np.abs(last_logits(model, ids) - wanted).max() < 10 * TOLERANCE  # through three or four layers


@pytest.mark.parametrize("case", KNOWN)
def test_decode_is_three_kernels(case: str) -> None:
    _, sites = stock_model(case)
    kernels = Recorder()
    fuse(case, sites[0], kernels)(inputs(1))
    assert kernels.calls == ["route", "expert_gate_up", "expert_down"]


# Settings that the vectors do not have
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "qwen3_next not normalised": ("qwen3_next", {"norm_topk_prob": False}),
    "olmoe normalised": ("olmoe", {"norm_topk_prob": True}),
    "deepseek_v2, one of many groups": ("deepseek_v2", {"topk_group": 1}),
    "deepseek_v2, groups that it ignores": ("deepseek_v2", {"topk_method": "greedy", "topk_group": 1}),
    "deepseek_v3 not normalised": ("deepseek_v3-plain", {"norm_topk_prob": False}),
    "deepseek_v3, one expert": ("deepseek_v3-plain", {"num_experts_per_tok": 1}),
    "deepseek_v3, all groups": ("deepseek_v3", {"topk_group": 4}),
    "glm4_moe, one of two groups": ("glm4_moe", {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4}),
    "glm4_moe_lite, no groups": ("glm4_moe_lite", {"n_group": 1, "topk_group": 1}),
    "mixtral, three experts": ("mixtral", {"num_experts_per_tok": 3}),
    "gpt_oss, one expert": ("gpt_oss", {"num_experts_per_tok": 1, "experts_per_token": 1}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_rule(variant: str) -> None:
    case, settings = VARIANTS[variant]
    _, sites = stock_model(case, newest(case) | settings)
    assert max(difference(fuse(case, sites[0]), sites[0].block, inputs(t)) for t in (1, 40)) < TOLERANCE


@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_next", "gpt_oss"])
def test_a_quantized_router_stays_quantized(case: str) -> None:
    _, (site, *_) = stock_model(case)
    name = "router" if case == "gpt_oss" else "gate"
    site.block[name] = site.block[name].to_quantized(group_size=32, bits=4)
    assert difference(fuse(case, site), site.block, inputs(3)) < TOLERANCE


@pytest.mark.parametrize("case", ["deepseek_v3-plain", "glm4_moe"])
def test_a_gate_that_was_not_corrected(case: str) -> None:
    """Without groups mlx-lm's own gate is a known rule too: it does not normalise the weight of a single expert."""
    _, (site, *_) = stock_model(case, newest(case) | {"n_group": 1, "topk_group": 1})
    assert difference(fuse(case, site), site.block, inputs(3)) < TOLERANCE
    site.block.gate.top_k = 1
    assert difference(fuse(case, site), site.block, inputs(3)) < TOLERANCE


# Left alone -----------------------------------------------------------------------------------------------------------


def test_unknown_blocks_are_left_alone() -> None:
    _, (site, *_) = stock_model("qwen3_moe")
    kernels = ReferenceKernels()
    assert fused_block(site.block, site.banks, kernels, "qwen3_moe") is not None
    assert fused_block(site.block, site.banks, kernels, "granitemoe") is None
    assert fused_block(site.block, site.banks, kernels, "olmoe") is None  # not a block of that family
    assert fused_block(nn.Linear(DIMS, DIMS), site.banks, kernels, "qwen3_moe") is None
    site.block.__class__ = type("Derived", (type(site.block),), {})  # may compute anything
    assert fused_block(site.block, site.banks, kernels, "qwen3_moe") is None


def changed(case: str, **settings: Any) -> FusedBlock | None:
    """What becomes of a block with these attributes."""
    _, (site, *_) = stock_model(case)
    for name, value in settings.items():
        part, _, attribute = name.rpartition("__")
        setattr(site.block[part] if part else site.block, attribute, value)
    return fused_block(site.block, site.banks, ReferenceKernels(), family(case))


def test_rules_beyond_the_kernels_are_left_alone() -> None:
    assert changed("qwen3_moe", top_k=NUM_EXPERTS) is not None
    assert changed("qwen3_moe", top_k=NUM_EXPERTS + 1) is None
    assert changed("qwen3_moe", sharding_group=mx.distributed.init()) is None
    assert changed("deepseek_v2", gate__topk_method="greedy") is not None
    assert changed("deepseek_v2", gate__topk_method="noaux_tc") is None
    assert changed("deepseek_v2", gate=nn.Linear(DIMS, NUM_EXPERTS)) is None
    assert changed("deepseek_v3", gate=nn.Linear(DIMS, NUM_EXPERTS)) is None


@pytest.mark.parametrize("case", ["deepseek_v3-plain", "glm4_moe", "glm4_moe_lite"])
def test_group_arithmetic_that_was_not_corrected_is_left_alone(case: str) -> None:
    """mlx-lm's own gate lets an expert of a rejected group win over a negative biased score."""
    _, (site, *_) = stock_model(case, newest(case) | {"n_group": 1, "topk_group": 1})
    kernels = ReferenceKernels()
    assert fused_block(site.block, site.banks, kernels, family(case)) is not None
    site.block.gate.n_group = 4
    site.block.gate.topk_group = 2
    assert fused_block(site.block, site.banks, kernels, family(case)) is None
