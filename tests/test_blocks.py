"""Fused blocks against the block of mlx-lm that each stands for, over experts that both hold exactly."""

from __future__ import annotations

import re
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metalsim import require
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from test_kernels import simulated
from test_models import CASES, RECORDS, arrays, build, last_logits, newest

from mlxmoe.blocks import FusedBlock, WeightedExperts, fused_block
from mlxmoe.convert.write import pack_matrix
from mlxmoe.experts import KernelExperts
from mlxmoe.formats import MatrixShape
from mlxmoe.kernels import ExpertBanks, PlaneBank, ReferenceKernels, activation_of
from mlxmoe.models import expert_sites, model_classes
from mlxmoe.router import Router, Routing

pytestmark = pytest.mark.usefixtures("on_cpu")

TOLERANCE = 1e-5  # float32 on both sides, outputs of order 1
# How far apart neighbouring values of a type are, relatively: scores further apart keep their order when they are rounded.
STEP = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
# Blocks that round the scores by which they choose to the activations' type; the others choose by logits or in float32
ROUNDING = ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "deepseek_v2-plain", "lfm2_moe")
NUM_EXPERTS, DIMS, HIDDEN_DIMS, GROUP_SIZE = 8, 64, 64, 32  # the vectors' experts are 40 wide, which is no whole group

# Families without golden vectors: their blocks are compared with mlx-lm's own, whatever the weights
_COMMON: dict[str, Any] = {
    "hidden_size": DIMS,
    "intermediate_size": HIDDEN_DIMS,
    "moe_intermediate_size": HIDDEN_DIMS,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": 96,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
_GROUPS: dict[str, Any] = {
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "minimax": {"num_local_experts": NUM_EXPERTS, "shared_intermediate_size": 0, "rotary_dim": 16},
    "lfm2_moe": {
        "num_experts": NUM_EXPERTS,
        "use_expert_bias": True,
        "routed_scaling_factor": 1.5,
        "num_dense_layers": 1,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "ernie4_5_moe": {
        "use_bias": True,
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "granitemoe": {
        "num_local_experts": NUM_EXPERTS,
        "logits_scaling": 6.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
    },
    "phimoe": {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "router_jitter_noise": 0.25},
    "nemotron_h": {
        **_GROUPS,
        "layers_block_type": ["moe", "linear_attention", "moe"],
        "moe_shared_expert_intermediate_size": 96,
        "mlp_bias": False,
        "use_bias": False,
        "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_conv_bias": True,
        "time_step_limit": [0.0, 100.0],
    },
    "glm_moe_dsa": {
        **_GROUPS,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "index_head_dim": 32,
        "index_n_heads": 2,
        "index_topk": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
CONFIGS["deepseek_v32"] = CONFIGS["glm_moe_dsa"]
# Models around another family's blocks
CONFIGS["qwen3_vl_moe"] = {"text_config": newest("qwen3_moe")}
CONFIGS["kimi_vl"] = {"text_config": newest("deepseek_v3-plain") | {"n_group": 1, "topk_group": 1}}
CONFIGS["kimi_k25"] = CONFIGS["kimi_vl"]
WRAPPERS = ("deepseek_v32", "qwen3_vl_moe", "kimi_vl", "kimi_k25")
GEMMA = [case for case in CASES if case.startswith("gemma4")]
KNOWN = [case for case in (*CASES, *CONFIGS) if case not in GEMMA]
OWN_BLOCKS = [case for case in KNOWN if case not in WRAPPERS]
IDS = [3, 17, 5, 44, 80, 2, 61, 9]


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


class Listener(nn.Module):
    """The experts of a block, of the type that the fused block has; notes which were called."""

    def __init__(self, banks: ExpertBanks):
        super().__init__()
        self._experts = KernelExperts(banks, ReferenceKernels())

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self._chosen = indices
        return self._experts(x, indices)


class Chooser(ReferenceKernels):
    """Notes what it routes by."""

    def route(self, logits: mx.array, bias: mx.array | None, router: Router) -> Routing:
        self.logits, self.bias, self.router = logits, bias, router
        self.routing = super().route(logits, bias, router)
        return self.routing

    def selection(self) -> mx.array:
        """float32 [T, E]: what experts are chosen by, where rounding of logits is not the question."""
        logits = self.logits.astype(mx.float32)
        if self.router.score == "sigmoid":
            return mx.sigmoid(logits) + (0 if self.bias is None else self.bias)
        return mx.softmax(logits, axis=-1) if self.router.score == "softmax" else logits


@cache
def make_bank(name: str, rows: int, columns: int, bias: bool, seed: int) -> PlaneBank:
    """A bank of 8-bit experts with random weights."""
    random = np.random.RandomState(seed)
    shape = MatrixShape(name, rows, columns, GROUP_SIZE)
    weights = random.standard_normal((NUM_EXPERTS, rows, columns)).astype(np.float32) * columns**-0.5
    matrices = [pack_matrix(weight, shape, 8)[0] for weight in weights]
    biases = mx.array(random.standard_normal((NUM_EXPERTS, rows)).astype(np.float32)) if bias else None
    return PlaneBank.from_matrices(matrices, [8] * NUM_EXPERTS, biases)


def config_of(case: str) -> dict[str, Any]:
    """Of a golden vector, or of a family that has none."""
    return newest(case) if case in RECORDS else {"model_type": case, **_COMMON, **CONFIGS[case]}


def randomise(model: nn.Module) -> None:
    """Random matrices, and vectors (norms, biases) off what mlx-lm makes them; the same at each call."""

    def value(_: str, array: mx.array) -> mx.array:
        noise = mx.random.normal(array.shape)
        return noise * array.shape[-1] ** -0.5 if array.ndim > 1 else array + 0.1 * noise

    mx.random.seed(0)
    model.update(tree_map_with_path(value, model.parameters()))


def stock_model(case: str, config: dict[str, Any] | None = None) -> tuple[nn.Module, list[Site]]:
    """The model of a case as mlxmoe builds it, but with experts that a bank holds exactly."""
    model = build(config or config_of(case))
    if case in RECORDS:
        model.load_weights(list(model.sanitize(arrays(case, "fused")).items()))
    else:
        randomise(model)
    sites = []
    for site in expert_sites(model):
        path, _, name = site.path.rpartition(".")
        block = dict(model.named_modules())[path]
        gated = site.kind == "glu"
        names = ("gate_proj", "up_proj", "down_proj") if gated else ("fc1", "fc2")
        parts = dict.fromkeys(names[:-1], (HIDDEN_DIMS, DIMS)) | {names[-1]: (DIMS, HIDDEN_DIMS)}
        banks = {
            part: make_bank(part, *shape, site.has_bias, seed=len(parts) * site.layer + i)
            for i, (part, shape) in enumerate(parts.items())
        }
        kind = SwitchGLU if gated else SwitchMLP
        switch = kind(DIMS, HIDDEN_DIMS, NUM_EXPERTS, block[name].activation, bias=site.has_bias)
        for part, bank in banks.items():
            switch[part].weight = mx.stack([bank.dequantize(expert) for expert in range(NUM_EXPERTS)])
            if bank.bias is not None:
                switch[part].bias = bank.bias
        block[name] = switch
        activation = activation_of(switch.activation)
        assert activation is not None
        first, *between, last = banks.values()
        sites.append(Site(path, block, ExpertBanks(first, between[0] if gated else None, last, activation)))
    return model, sites


def family(case: str) -> str:
    """mlx-lm's module for the case."""
    name: str = model_classes(config_of(case))[1].name
    return name


def fuse(case: str, site: Site, kernels: ReferenceKernels | None = None) -> FusedBlock:
    fused = fused_block(site.block, site.banks, kernels or ReferenceKernels(), family(case))
    assert isinstance(fused, FusedBlock)
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
    ids = RECORDS[case]["ids"] if case in RECORDS else IDS
    wanted = last_logits(model, ids)
    experts = re.compile(r"\.(switch_mlp|experts)\.(\w+_proj|fc[12])\.")
    kept = [name for name, _ in tree_flatten(model.parameters()) if not experts.search(name)]
    model.update_modules(tree_unflatten([(site.path, fuse(case, site)) for site in sites]))
    assert sorted(name for name, _ in tree_flatten(model.parameters())) == sorted(kept)
    assert sum(isinstance(module, FusedBlock) for _, module in model.named_modules()) == len(sites) > 1
    assert np.abs(last_logits(model, ids) - wanted).max() < 10 * TOLERANCE  # through three or four layers


@pytest.mark.parametrize("case", KNOWN)
def test_decode_is_three_kernels(case: str) -> None:
    _, sites = stock_model(case)
    kernels = Recorder()
    fuse(case, sites[0], kernels)(inputs(1))
    assert kernels.calls == ["route", "expert_gate_up", "expert_down"]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_experts_with_the_router_beside_them(tokens: int, dtype: mx.Dtype) -> None:
    """Gemma 4: what the router chose is an argument, in the activations' type."""
    _, (site, *_) = stock_model("gemma4")
    x = inputs(tokens).astype(dtype)
    experts = mx.argsort(mx.random.normal((1, tokens, NUM_EXPERTS), key=mx.random.key(1)), axis=-1)[..., :3]
    weights = mx.softmax(mx.random.normal((1, tokens, 3), key=mx.random.key(2)), axis=-1).astype(dtype)
    site.block.switch_glu = Listener(site.banks)
    wanted, kernels = site.block(x, experts, weights), Recorder()
    fused = fused_block(site.block, site.banks, kernels, "gemma4")
    assert isinstance(fused, WeightedExperts)
    found = fused(x, experts, weights)
    assert (found.shape, found.dtype) == (wanted.shape, dtype)
    error = mx.abs(found - wanted).max() / mx.abs(wanted).max()
    assert error <= (1e-6 if dtype == mx.float32 else 2 * STEP[dtype])
    if tokens == 1:
        assert kernels.calls == ["expert_gate_up", "expert_down"]


@pytest.mark.parametrize("case", GEMMA)
def test_a_model_of_weighted_experts(case: str) -> None:
    model, sites = stock_model(case)
    wanted = last_logits(model, RECORDS[case]["ids"])
    blocks = [fused_block(site.block, site.banks, ReferenceKernels(), family(case)) for site in sites]
    assert all(isinstance(block, WeightedExperts) for block in blocks)
    model.update_modules(tree_unflatten([(site.path, block) for site, block in zip(sites, blocks, strict=True)]))
    assert np.abs(last_logits(model, RECORDS[case]["ids"]) - wanted).max() < 10 * TOLERANCE


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
    "lfm2_moe, no bias": ("lfm2_moe", {"use_expert_bias": False}),
    "lfm2_moe not normalised": ("lfm2_moe", {"norm_topk_prob": False}),
    "ernie4_5_moe, no shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 0, "use_bias": False}),
    "granitemoe, one expert": ("granitemoe", {"num_experts_per_tok": 1}),
    "phimoe, one expert": ("phimoe", {"num_experts_per_tok": 1}),
    "phimoe, four experts, none near": ("phimoe", {"num_experts_per_tok": 4, "router_jitter_noise": 1e-6}),
    "nemotron_h, narrow experts": ("nemotron_h", {"moe_latent_size": DIMS}),
    "nemotron_h, not normalised": ("nemotron_h", {"norm_topk_prob": False}),
    "glm_moe_dsa, no shared experts": ("glm_moe_dsa", {"n_shared_experts": None}),
    "glm_moe_dsa, all groups": ("glm_moe_dsa", {"n_group": 2, "topk_group": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_rule(variant: str) -> None:
    case, settings = VARIANTS[variant]
    _, sites = stock_model(case, config_of(case) | settings)
    assert max(difference(fuse(case, sites[0]), sites[0].block, inputs(t)) for t in (1, 40)) < TOLERANCE


def test_epsilons() -> None:
    """Too small for outputs to show them."""

    def epsilon(case: str) -> float:
        kernels = Chooser()
        fuse(case, stock_model(case)[1][0], kernels)(inputs(1))
        return kernels.router.epsilon

    assert epsilon("lfm2_moe") == 1e-6
    assert {epsilon(case) for case in ("minimax", "nemotron_h", "glm4_moe_lite")} == {1e-20}
    assert epsilon("glm_moe_dsa") == 0


def test_minimax_computes_its_logits_in_float32() -> None:
    _, (site, *_) = stock_model("minimax")
    site.block.gate.weight = site.block.gate.weight.astype(mx.bfloat16)
    kernels = Chooser()
    fuse("minimax", site, kernels)(inputs(1).astype(mx.bfloat16))
    assert kernels.logits.dtype == mx.float32


@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_next", "gpt_oss", "minimax", "granitemoe"])
def test_a_quantized_router_stays_quantized(case: str) -> None:
    _, (site, *_) = stock_model(case)
    holder = site.block.router if case == "granitemoe" else site.block
    name = {"gpt_oss": "router", "granitemoe": "layer"}.get(case, "gate")
    holder[name] = holder[name].to_quantized(group_size=32, bits=4)
    assert difference(fuse(case, site), site.block, inputs(3)) < TOLERANCE


@pytest.mark.parametrize("case", ["deepseek_v3-plain", "glm4_moe", "glm_moe_dsa", "nemotron_h"])
def test_a_gate_that_was_not_corrected(case: str) -> None:
    """Without groups mlx-lm's own gate is a known rule too: it does not normalise the weight of a single expert."""
    _, (site, *_) = stock_model(case, config_of(case) | {"n_group": 1, "topk_group": 1})
    assert difference(fuse(case, site), site.block, inputs(3)) < TOLERANCE
    site.block.gate.top_k = 1
    assert difference(fuse(case, site), site.block, inputs(3)) < TOLERANCE


# Sixteen bits ---------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Two choices by the same logits. others [T]: whether the experts are not the same. gap: the largest difference of
    the selection scores that they lead to, over the token's best. errors [T]: of the outputs, over the largest output."""

    others: np.ndarray
    gap: float
    errors: np.ndarray


def in_type(block: Any, dtype: mx.Dtype) -> None:
    """Casts the parameters as the loader does: selection biases stay in float32."""

    def as_loaded(name: str, array: mx.array) -> mx.array:
        return array if name.endswith(("correction_bias", "expert_bias")) else array.astype(dtype)

    block.update(tree_map_with_path(as_loaded, block.parameters()))


def choices(case: str, dtype: mx.Dtype, sharpness: float = 1.0, **settings: Any) -> Choice:
    """What the block chooses and computes, beside the fused one, in 16 bits with logits of this size."""
    _, (site, *_) = stock_model(case, config_of(case) | settings)
    switch_name = "experts" if case == "gpt_oss" else "switch_mlp"
    site.block[switch_name] = listener = Listener(site.banks)
    if sharpness != 1.0:
        site.block.gate.weight = site.block.gate.weight * sharpness
    in_type(site.block, dtype)
    chooser, x = Chooser(), inputs(48).astype(dtype)
    wanted, found = site.block(x), fuse(case, site, chooser)(x)
    assert (found.dtype, found.shape) == (dtype, wanted.shape)

    def chosen(experts: mx.array) -> tuple[np.ndarray, np.ndarray]:
        rows = np.array(experts).reshape(48, -1)
        scores = np.take_along_axis(np.array(chooser.selection()), rows, axis=-1)
        return np.sort(rows, axis=-1), np.sort(scores, axis=-1)

    (stock, stock_scores), (ours, our_scores) = chosen(listener._chosen), chosen(chooser.routing.experts)
    errors = mx.abs((found - wanted).astype(mx.float32)).max(axis=-1)[0] / mx.abs(wanted).max()
    gap = np.abs(stock_scores - our_scores) / np.abs(our_scores).max(axis=-1, keepdims=True)
    return Choice((stock != ours).any(axis=-1), gap.max(), np.array(errors))


@pytest.mark.parametrize("dtype", STEP, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", OWN_BLOCKS)
def test_in_sixteen_bits(case: str, dtype: mx.Dtype) -> None:
    """The same experts, but for scores that agree in the type, and outputs within two steps: the block rounds scores,
    weights, products with them and their sum, the kernels the sum only."""
    choice = choices(case, dtype)
    steps = choice.errors[~choice.others].max() / STEP[dtype]
    print(f"{case}: {choice.others.sum()} of 48 tokens with other experts, else {steps:.1f} steps")  # pytest -rP
    assert choice.gap <= STEP[dtype]
    assert choice.others.mean() < 0.1
    assert steps <= 2


@pytest.mark.parametrize("case", ROUNDING)
def test_scores_that_agree_in_sixteen_bits(case: str) -> None:
    """Where mlx-lm's block takes any of several experts with equal rounded scores, this one takes the best."""
    choice = choices(case, mx.bfloat16, sharpness=0.05, use_expert_bias=False)  # LFM2's keeps experts apart
    assert choice.others.any()
    assert 0 < choice.gap <= STEP[mx.bfloat16]


@pytest.mark.parametrize(
    "case", [case for case in OWN_BLOCKS if not case.startswith(("qwen", "olmoe", "deepseek_v2", "lfm2"))]
)
def test_blocks_that_round_no_score_choose_the_same(case: str) -> None:
    choice = choices(case, mx.bfloat16)
    assert choice.gap == 0


@pytest.mark.parametrize("case", ["phimoe", "lfm2_moe", "minimax", "nemotron_h", "glm_moe_dsa", "qwen2_moe", "gemma4"])
def test_on_the_kernels(case: str) -> None:
    """Executed by metalsim: what a block hands to the kernels is of the types and shapes that they take."""
    require()
    _, (site, *_) = stock_model(case)
    in_type(site.block, mx.bfloat16)
    simulation, name = simulated(), family(case)
    blocks = [fused_block(site.block, site.banks, k, name) for k in (ReferenceKernels(), simulation.kernels)]
    x = inputs(2).astype(mx.bfloat16)
    routed = (mx.array([[[1, 5], [5, 0]]], mx.uint32), mx.array([[[0.75, 0.25], [0.5, 0.5]]], mx.bfloat16))
    wanted, found = (block(x, *(routed if case == "gemma4" else ())) for block in blocks)
    simulation.clean()
    assert len(simulation.results) == (2 if case == "gemma4" else 3)
    error = mx.abs((found - wanted).astype(mx.float32)).max() / mx.abs(wanted).max()
    assert error <= 2 * STEP[mx.bfloat16]


# Left alone -----------------------------------------------------------------------------------------------------------


def test_unknown_blocks_are_left_alone() -> None:
    _, (site, *_) = stock_model("qwen3_moe")
    kernels = ReferenceKernels()
    assert fused_block(site.block, site.banks, kernels, "qwen3_moe") is not None
    assert fused_block(site.block, site.banks, kernels, "no_such_family") is None
    assert fused_block(site.block, site.banks, kernels, "olmoe") is None  # not a block of that family
    assert fused_block(nn.Linear(DIMS, DIMS), site.banks, kernels, "qwen3_moe") is None
    assert fused_block(nn.Linear(DIMS, DIMS), site.banks, kernels, "gemma4") is None
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
    assert changed("ernie4_5_moe", gate_act=nn.Softmax()) is not None
    assert changed("ernie4_5_moe", gate_act=nn.Sigmoid()) is None  # whose sums may be below the 1e-12 of the block
    assert changed("minimax", sharding_group=mx.distributed.init()) is None


@pytest.mark.parametrize("case", ["deepseek_v3-plain", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "nemotron_h"])
def test_group_arithmetic_that_was_not_corrected_is_left_alone(case: str) -> None:
    """mlx-lm's own gate lets an expert of a rejected group win over a negative biased score."""
    _, (site, *_) = stock_model(case, config_of(case) | {"n_group": 1, "topk_group": 1})
    kernels = ReferenceKernels()
    assert fused_block(site.block, site.banks, kernels, family(case)) is not None
    site.block.gate.n_group = 4
    site.block.gate.topk_group = 2
    assert fused_block(site.block, site.banks, kernels, family(case)) is None
