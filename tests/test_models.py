"""Architectures: logits against transformers' (tests/vectors), configs and tensor names of every style, errors."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from vectors.weights import checkpoint

from mlxmoe.errors import UserError
from mlxmoe.models import (
    YarnRoPE,
    expert_sites,
    max_context,
    model_classes,
    normalise_config,
    num_experts_per_token,
    text_config,
)

pytestmark = pytest.mark.usefixtures("on_cpu")

VECTORS = Path(__file__).resolve().parent / "vectors"
RECORDS: dict[str, dict[str, Any]] = {path.stem: json.loads(path.read_text()) for path in VECTORS.glob("*.json")}
CASES = sorted(RECORDS)
EVERY = [
    pytest.param(case, style, layout, id=f"{case}-{style}-{layout}")
    for case in CASES
    for style in RECORDS[case]["configs"]
    for layout in RECORDS[case]["layouts"]
]
TOLERANCE = 1e-4  # float32 on both sides, logits of order 1; measured in docs/architectures.md


def golden(case: str, layout: str) -> np.ndarray:
    """transformers' logits [4, vocab] of the last four positions."""
    with np.load(VECTORS / f"{case}.npz") as logits:
        return logits[layout]


def arrays(case: str, layout: str, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    values = checkpoint(RECORDS[case]["layouts"][layout])
    return {name: mx.array(value).astype(dtype) for name, value in values.items()}


def newest(case: str) -> dict[str, Any]:
    return copy.deepcopy(RECORDS[case]["configs"]["transformers-5"])


def load(folder: Path, config: dict[str, Any], weights: dict[str, mx.array]) -> nn.Module:
    """Writes a checkpoint and loads it the way mlxmoe does."""
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return load_model(folder, get_model_classes=model_classes)[0]


def build(config: dict[str, Any]) -> nn.Module:
    """The model of a config without weights."""
    model_class, arguments = model_classes(config)
    return model_class(arguments.from_dict(config))


def last_logits(model: nn.Module, ids: list[int]) -> np.ndarray:
    return np.array(model(mx.array([ids]))[0, -4:])


# Logits ---------------------------------------------------------------------------------------------------------------


def test_every_architecture_has_vectors() -> None:
    twelve = {"qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe"}
    assert twelve | {"gpt_oss", "qwen3_5_moe", "gemma4", "glm4_moe_lite"} <= set(CASES)
    assert all(len(record["configs"]) == 2 for record in RECORDS.values())


@pytest.mark.parametrize(("case", "style", "layout"), EVERY)
def test_logits_equal_transformers(case: str, style: str, layout: str, tmp_path: Path) -> None:
    record = RECORDS[case]
    model = load(tmp_path, record["configs"][style], arrays(case, layout))
    error = np.abs(last_logits(model, record["ids"]) - golden(case, layout)).max()
    print(f"{case} {style} {layout}: max error {error:.1e}")  # shown by pytest -rP
    assert error < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_decoding_with_a_cache_equals_transformers(case: str, tmp_path: Path) -> None:
    ids = RECORDS[case]["ids"]
    model = load(tmp_path, newest(case), arrays(case, "fused"))
    cache = make_prompt_cache(model)
    steps = [model(mx.array([ids[:-3]]), cache=cache)[0, -1]]
    steps += [model(mx.array([[token]]), cache=cache)[0, -1] for token in ids[-3:]]
    assert np.abs(np.array(mx.stack(steps)) - golden(case, "fused")).max() < TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if "bfloat16" in np.load(VECTORS / f"{case}.npz")])
def test_bfloat16_checkpoint(case: str, tmp_path: Path) -> None:
    model = load(tmp_path, newest(case), arrays(case, "fused", mx.bfloat16))
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.bfloat16}
    model.update(tree_map(lambda a: a.astype(mx.float32), model.parameters()))
    assert np.abs(last_logits(model, RECORDS[case]["ids"]) - golden(case, "bfloat16")).max() < TOLERANCE


# Tensor names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sanitize_is_idempotent(case: str) -> None:
    model = build(newest(case))
    once = model.sanitize(arrays(case, "fused"))
    twice = model.sanitize(dict(once))
    assert set(once) == set(twice) == {name for name, _ in tree_flatten(model.parameters())}
    assert all(mx.array_equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("case", CASES)
def test_both_layouts_give_the_same_tensors(case: str) -> None:
    layouts = RECORDS[case]["layouts"]
    if "per-expert" not in layouts:
        assert case.startswith(("gpt_oss", "gemma4"))  # always fused on disk
        return
    model = build(newest(case))
    single = arrays(case, "per-expert")
    sanitized = model.sanitize(dict(single))
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if case == "mixtral" else {}
    for site in expert_sites(model):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            part = f"layers.{site.layer}.{'block_sparse_moe' if names else 'mlp'}.experts"
            stacked = sanitized[f"{site.path}.{projection}.weight"]
            for expert in range(site.num_experts):
                wanted = f"{part}.{expert}.{names.get(projection, projection)}.weight"
                (name,) = [name for name in single if name.endswith(wanted)]
                assert mx.array_equal(stacked[expert], single[name])


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("case", CASES)
def test_sanitize_reads_no_data(case: str, layout: str, tmp_path: Path) -> None:
    if layout not in RECORDS[case]["layouts"]:
        layout = "fused"
    file = tmp_path / "model.safetensors"
    mx.save_safetensors(str(file), arrays(case, layout))
    lazy = mx.load(str(file))
    file.write_bytes(b"")  # from here on, any evaluation fails
    model = build(newest(case))
    sanitized = model.sanitize(lazy)
    site = expert_sites(model)[0]
    assert sanitized[f"{site.path}.up_proj.weight"].shape == (site.num_experts, site.hidden_dims, site.input_dims)


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe", "glm4_moe_lite", "qwen3_next", "qwen3_5_moe", "mixtral"])
def test_prediction_layers_and_frequencies_are_dropped(case: str) -> None:
    model = build(newest(case))
    weights = arrays(case, "per-expert")
    expected = set(model.sanitize(dict(weights)))
    layers = text_config(newest(case))["num_hidden_layers"]
    extra = [f"model.layers.{layers}.mlp.experts.0.up_proj.weight", f"model.layers.{layers}.eh_proj.weight"]
    extra += ["mtp.layers.0.mlp.experts.0.up_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert set(model.sanitize(weights | {name: mx.zeros(1) for name in extra})) == expected


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe", "qwen3_moe", "olmoe"])
def test_a_config_with_too_few_layers_is_refused(case: str) -> None:
    """mlx-lm leaves the layers after the last out in silence, and the model would answer nonsense."""
    config = copy.deepcopy(newest(case))
    config["num_hidden_layers"] -= 1
    if "layer_types" in config:
        config["layer_types"].pop()
    with pytest.raises(UserError, match="and the checkpoint has weights of layer"):
        build(config).sanitize(arrays(case, "per-expert"))


def test_stock_quantized_checkpoint(tmp_path: Path) -> None:
    case = "qwen3_moe"
    config = RECORDS[case]["configs"]["transformers-4"]
    (tmp_path / "source").mkdir()
    model = load(tmp_path / "source", config, arrays(case, "per-expert"))
    model, quantized = quantize_model(model, copy.deepcopy(config), group_size=32, bits=4)
    save_model(tmp_path, model)
    save_config(quantized, tmp_path / "config.json")
    loaded, _ = load_model(tmp_path, get_model_classes=model_classes)
    assert expert_sites(loaded) == expert_sites(build(config))  # also of quantized layers
    ids = RECORDS[case]["ids"]
    assert np.array_equal(last_logits(loaded, ids), last_logits(model, ids))


def test_gpt_oss_as_published_in_mxfp4() -> None:
    config = newest("gpt_oss") | {"intermediate_size": 32, "hidden_size": 64}
    model = build(config)
    weights, expected = {}, {}
    for site in expert_sites(model):
        stacks = {  # as stored: gate and up rows alternate
            "gate_up_proj": mx.random.normal(
                (site.num_experts, 2 * site.hidden_dims, site.input_dims), key=mx.random.key(1)
            ),
            "down_proj": mx.random.normal((site.num_experts, site.input_dims, site.hidden_dims), key=mx.random.key(2)),
        }
        for name, stack in stacks.items():
            packed, scales = mx.quantize(stack, 32, 4, mode="mxfp4")
            blocks = packed.view(mx.uint8).reshape(*stack.shape[:-1], -1, 16)
            weights |= {f"{site.path}.{name}_blocks": blocks, f"{site.path}.{name}_scales": scales}
            parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            for part, rows in (parts if name == "gate_up_proj" else {"down_proj": slice(None)}).items():
                expected |= {
                    f"{site.path}.{part}.weight": packed[:, rows],
                    f"{site.path}.{part}.scales": scales[:, rows],
                }
    sanitized = model.sanitize(weights)
    assert set(sanitized) == set(expected)
    assert all(mx.array_equal(sanitized[name], expected[name]) for name in expected)


def test_fp8_blocks_are_dequantized() -> None:
    config = newest("qwen3_moe") | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    plain = arrays("qwen3_moe", "per-expert")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"  # [40, 64]: the second block of rows is short
    scale = mx.array([[0.5, 1.0, 2.0, 4.0], [0.25, 8.0, 1.0, 0.125]])
    code = mx.to_fp8(plain[name])
    spread = np.repeat(np.repeat(np.array(scale), 32, 0), 16, 1)[:40, :64]
    expected = np.array(mx.from_fp8(code, mx.float32)) * spread
    stacked = build(config).sanitize(plain | {name: code, f"{name}_scale_inv": scale})
    assert not any("scale_inv" in key for key in stacked)
    assert np.array_equal(
        np.array(stacked["model.layers.1.mlp.switch_mlp.up_proj.weight"][3].astype(mx.float32)), expected
    )


def test_tied_embeddings_are_shared_not_copied(tmp_path: Path) -> None:
    model = load(tmp_path, newest("deepseek_v3-plain"), arrays("deepseek_v3-plain", "fused"))
    assert mx.array_equal(model.lm_head.weight, model.model.embed_tokens.weight)
    weights = arrays("gemma4", "fused") | {"lm_head.weight": mx.zeros((128, 64))}  # a head written out all the same
    assert not any("lm_head" in name for name in build(newest("gemma4")).sanitize(weights))


# Sites ----------------------------------------------------------------------------------------------------------------

PLACES = {
    "qwen2_moe": ("model.layers.{}.mlp.switch_mlp", [0, 1, 2]),
    "qwen3_moe": ("model.layers.{}.mlp.switch_mlp", [1, 2]),
    "qwen3_next": ("model.layers.{}.mlp.switch_mlp", [0, 1, 2, 3]),
    "olmoe": ("model.layers.{}.mlp.switch_mlp", [0, 1, 2]),
    "mixtral": ("model.layers.{}.block_sparse_moe.switch_mlp", [0, 1, 2]),
    "deepseek_v2": ("model.layers.{}.mlp.switch_mlp", [1, 2]),
    "deepseek_v3": ("model.layers.{}.mlp.switch_mlp", [1, 2]),
    "glm4_moe": ("model.layers.{}.mlp.switch_mlp", [1, 2]),
    "glm4_moe_lite": ("model.layers.{}.mlp.switch_mlp", [1, 2]),
    "gpt_oss": ("model.layers.{}.mlp.experts", [0, 1, 2]),
    "qwen3_5_moe": ("language_model.model.layers.{}.mlp.switch_mlp", [0, 1, 2, 3]),
    "gemma4": ("language_model.model.layers.{}.experts.switch_glu", [0, 1, 2]),
    "gemma4_text": ("model.layers.{}.experts.switch_glu", [0, 1, 2]),
}


@pytest.mark.parametrize("case", PLACES)
def test_expert_sites(case: str) -> None:
    path, layers = PLACES[case]
    expected = [(path.format(n), n, "glu", 8, 64, 40, case == "gpt_oss") for n in layers]
    assert expert_sites(build(newest(case))) == expected


def test_expert_sites_are_in_layer_order_and_include_subclasses() -> None:
    class Special(SwitchGLU):
        """As an architecture with its own experts would define it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Special(64, 32, 4)

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Block() for _ in range(11)]

    model = Stack()
    nn.quantize(model, group_size=32, bits=2, class_predicate=lambda path, m: path.endswith("up_proj"))
    assert [site.layer for site in expert_sites(model)] == list(range(11))
    assert expert_sites(model)[10] == ("layers.10.experts", 10, "glu", 4, 64, 32, False)


# Other architectures of mlx-lm ----------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0},
}
OTHERS: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "granitemoe": (
        {
            **SMALL,
            "logits_scaling": 1.0,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_bias": False,
        },
        ("model.layers.0.block_sparse_moe.switch_mlp", 0, "glu", 4, 32, 48, False),
    ),
    "ernie4_5_moe": (
        {
            **SMALL,
            "use_bias": False,
            "tie_word_embeddings": True,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_layer_start_index": 1,
        },
        ("model.layers.1.mlp.switch_mlp", 1, "glu", 4, 32, 24, False),
    ),
    "phimoe": (
        {
            **SMALL,
            "original_max_position_embeddings": 64,
            "rope_parameters": None,
            "rope_theta": 3000.0,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "short_mscale": 1.1,
                "long_mscale": 1.1,
                "original_max_position_embeddings": 64,
            },
        },
        ("model.layers.0.block_sparse_moe.switch_mlp", 0, "glu", 4, 32, 48, False),
    ),
    "nemotron_h": (
        {
            **SMALL,
            "hybrid_override_pattern": "*E",
            "attention_bias": False,
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "mamba_proj_bias": False,
            "ssm_state_size": 8,
            "conv_kernel": 4,
            "n_groups": 1,
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-6,
            "use_bias": False,
            "use_conv_bias": True,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
        ("backbone.layers.1.mixer.switch_mlp", 1, "mlp", 4, 32, 24, False),
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name: str) -> None:
    config, site = OTHERS[name]
    config = {"model_type": name, **config}
    model = build(config)
    assert expert_sites(model)[0] == site
    assert num_experts_per_token(config) == 2
    assert max_context(config) == 128
    logits = model(mx.array([[1, 2, 3]]))
    assert logits.shape == (1, 3, 64)
    assert mx.all(mx.isfinite(logits)).item()
    bases = {module.base for _, module in model.named_modules() if type(module) is nn.RoPE}
    assert bases <= {3000.0}  # read from transformers 5's rope_parameters


def test_other_architectures_accept_fused_experts() -> None:
    config, site = OTHERS["ernie4_5_moe"]
    model = build({"model_type": "ernie4_5_moe", **config})
    block = site[0].removesuffix(".switch_mlp") + ".experts"
    stacks = {f"{block}.gate_up_proj": mx.zeros((4, 48, 32)), f"{block}.down_proj": mx.zeros((4, 32, 24))}
    names = {name for name in model.sanitize(stacks) if name.startswith(site[0])}
    assert names == {f"{site[0]}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}


# Configs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_normalise_is_pure_and_idempotent(case: str) -> None:
    for config in RECORDS[case]["configs"].values():
        before = copy.deepcopy(config)
        normal = normalise_config(config)
        assert config == before
        assert normalise_config(normal) == normal


@pytest.mark.parametrize("case", CASES)
def test_styles_normalise_to_the_same_arguments(case: str) -> None:
    first, second = (model_classes(config)[1].from_dict(config) for config in RECORDS[case]["configs"].values())
    fields = [{k: v for k, v in vars(a).items() if k != "text_config"} for a in (first, second)]
    if "rope_scaling" in fields[0] and fields[0]["rope_scaling"]:  # "type" and "rope_type" order
        fields = [f | {"rope_scaling": sorted(f["rope_scaling"].items(), key=str)} for f in fields]
    assert fields[0] == fields[1]


def test_quantization_of_a_stock_checkpoint_is_kept() -> None:
    quantization = {"group_size": 64, "bits": 4, "model.layers.0.mlp.gate": {"group_size": 64, "bits": 8}}
    config = RECORDS["qwen3_moe"]["configs"]["transformers-4"] | {"quantization": quantization}
    assert normalise_config(config)["quantization"] == quantization


def test_published_configs(shared_dir: Path) -> None:
    """Every published config beside the project: normal form idempotent, and a model with experts can be built."""
    unsupported = {"deepseek-ai__DeepSeek-V4-Flash", "ibm-granite__granite-3.0-3b-a800m"}  # unknown; cut short
    folders = {path.parent.name: path for path in (shared_dir / "models" / "configs").glob("*/config.json")}
    assert unsupported < set(folders)
    for name, path in sorted(folders.items()):
        config = json.loads(path.read_text())
        if name in unsupported:
            with pytest.raises(UserError):
                build(config)
            continue
        normal = normalise_config(config)
        assert normalise_config(normal) == normal, name
        sites = expert_sites(build(config))
        assert sites, name
        assert 0 < num_experts_per_token(config) < sites[0].num_experts, name


def test_trained_model(tiny_model: Path) -> None:
    model, config = load_model(tiny_model, get_model_classes=model_classes)
    sites = expert_sites(model)
    assert [site.layer for site in sites] == [1, 2, 3, 4, 5]
    assert {site[2:] for site in sites} == {("glu", 32, 256, 128, False)}
    assert (num_experts_per_token(config), max_context(config)) == (4, 2048)


def test_text_config_of_a_wrapper() -> None:
    config = newest("gemma4")
    text = text_config(config)
    assert text["hidden_size"] == 64
    assert text["model_type"] == "gemma4_text"
    assert text["transformers_version"] == "5.23.0"
    assert (num_experts_per_token(config), max_context(config)) == (2, 512)
    assert max_context({"model_type": "x"}) is None


def test_gpt_oss_yarn_is_not_truncated() -> None:
    """The published gpt-oss says truncate: false; frequencies from transformers' formula, which mlx-lm truncates."""
    scaling = {"factor": 32.0, "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
    exact = YarnRoPE(64, 150000.0, False, {**scaling, "truncate": False})
    rounded = YarnRoPE(64, 150000.0, False, scaling)
    assert exact.scale == pytest.approx(1.3465735902799727)
    differences = np.abs(np.array(exact._freqs) / np.array(rounded._freqs) - 1)
    assert differences.max() > 0.02
    assert differences[:8].max() < 1e-6  # above the correction range both are plain


def test_dense_layers_of_glm4_moe_lite() -> None:
    config = newest("glm4_moe_lite") | {"mlp_layer_types": ["dense", "dense", "sparse"]}
    assert [site.layer for site in expert_sites(build(config))] == [2]


def test_yarn_scale() -> None:
    """As transformers: mscale counts only with mscale_all_dim, and attention_factor overrides both."""
    scaling = {"factor": 8.0, "original_max_position_embeddings": 64}
    plain = 0.1 * np.log(8.0) + 1
    assert YarnRoPE(16, 1e4, False, scaling).scale == pytest.approx(plain)
    assert YarnRoPE(16, 1e4, False, {**scaling, "mscale": 0.5}).scale == pytest.approx(plain)
    both = {**scaling, "mscale": 0.5, "mscale_all_dim": 0.25}
    assert YarnRoPE(16, 1e4, False, both).scale == pytest.approx((0.05 * np.log(8) + 1) / (0.025 * np.log(8) + 1))
    assert YarnRoPE(16, 1e4, False, {**both, "attention_factor": 1.25}).scale == 1.25


# Errors ---------------------------------------------------------------------------------------------------------------

WRONG = {
    "unknown architecture": ("qwen3_moe", {"model_type": "gpt_7"}, "unknown architecture 'gpt_7'; known: .*qwen3_moe"),
    "not an identifier": ("qwen3_moe", {"model_type": "../x"}, "unknown architecture"),
    "no architecture": ("qwen3_moe", {"model_type": None}, "no model_type"),
    "dense architecture": ("qwen3_moe", {"model_type": "llama"}, "'llama' is not a Mixture-of-Experts model"),
    "no experts": ("qwen3_moe", {"num_local_experts": 0}, "not a Mixture-of-Experts model"),
    "experts switched off": ("gemma4_text", {"enable_moe_block": False}, "not a Mixture-of-Experts model"),
    "only dense layers": ("deepseek_v3", {"first_k_dense_replace": 9}, "not a Mixture-of-Experts model"),
    "missing key": ("qwen3_moe", {"hidden_size": None}, "has no hidden_size"),
    "missing key of the class": ("olmoe", {"intermediate_size": None}, "olmoe has no intermediate_size"),
    "wrong value of the class": ("qwen3_next", {"linear_num_value_heads": 3}, "does not describe a qwen3_next model"),
    "heads do not divide": ("olmoe", {"num_key_value_heads": 3}, "do not divide among 3 key-value heads"),
    "not a number": ("qwen3_moe", {"hidden_size": "64"}, "hidden_size is '64', expected a positive whole number"),
    "negative": ("olmoe", {"num_experts_per_tok": -1}, "num_experts_per_tok is -1"),
    "too many chosen": ("olmoe", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
    "groups do not divide": ("deepseek_v3", {"n_group": 3}, "do not divide into 3 groups"),
    "unknown rope": ("qwen3_moe", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope scaling"),
    "dynamic rope": ("olmoe", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "cannot honour"),
    "unknown rope key": (
        "mixtral",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "wobble": 1}},
        r"cannot honour rope scaling keys \['wobble'\]",
    ),
    "rope without factor": ("mixtral", {"rope_parameters": {"rope_type": "linear"}}, "cannot honour"),
    "partial rope": ("mixtral", {"partial_rotary_factor": 0.5}, "cannot honour partial_rotary_factor 0.5"),
    "rope by layer": (
        "mixtral",
        {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "sliding_attention": {"rope_theta": 2.0}}},
        "differ by layer type",
    ),
    "sliding window": ("mixtral", {"sliding_window": 16}, "sliding_window is 16"),
    "activation": ("olmoe", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "clipped": ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
    "head width": ("mixtral", {"head_dim": 32}, "head_dim is 32"),
    "irregular attention": (
        "qwen3_next",
        {"layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"]},
        "layer_types",
    ),
    "dense layers last": ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
    "shapes by layer": ("gemma4_text", {"per_layer_config": {"0": {"head_dim": 32}}}, "per_layer_config"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_wrong_configs(reason: str) -> None:
    case, change, message = WRONG[reason]
    config = newest(case) | change
    if reason == "too many chosen" or "rope" in reason:
        build(newest(case))  # without the change it is fine
    with pytest.raises(UserError, match=message) as caught:
        build(config)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_scaled_rope_that_a_class_ignores_is_refused() -> None:
    config, _ = OTHERS["granitemoe"]
    ernie, _ = OTHERS["ernie4_5_moe"]
    yarn = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    build({"model_type": "granitemoe", **config, "rope_parameters": yarn})  # reads it
    older = {**config, "num_experts": 4, "moe_intermediate_size": 24, "n_shared_experts": 1, "rope_parameters": yarn}
    normalise_config({"model_type": "deepseek", **older})  # has the setting, but builds a plain RoPE all the same
    with pytest.raises(UserError, match="deepseek cannot honour rope scaling"):
        build({"model_type": "deepseek", **older})
    with pytest.raises(UserError, match="ernie4_5_moe cannot honour rope scaling"):
        normalise_config({"model_type": "ernie4_5_moe", **ernie, "rope_parameters": yarn})


def test_missing_expert() -> None:
    weights = arrays("qwen3_moe", "per-expert")
    del weights["model.layers.1.mlp.experts.5.up_proj.weight"]
    with pytest.raises(UserError, match=r"has 7 experts, config\.json says 8; expert 5 is missing"):
        build(newest("qwen3_moe")).sanitize(weights)


def test_fused_experts_of_another_shape() -> None:
    weights = arrays("qwen3_moe", "fused")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    weights[name] = weights[name].swapaxes(-1, -2)
    with pytest.raises(UserError, match=r"shape \(8, 64, 80\), expected \(8, 80, 64\)"):
        build(newest("qwen3_moe")).sanitize(weights)


def test_experts_per_token_unknown() -> None:
    with pytest.raises(UserError, match="how many experts"):
        num_experts_per_token({"model_type": "x"})
