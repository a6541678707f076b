"""Architectures: which mlx-lm class a config.json means, and what must be set right for it to compute what was trained.

Owns the reading of configs (transformers 4 and 5), the reading of tensor names (per expert, fused, gpt-oss, already
sanitized), the few modules whose arithmetic in mlx-lm 0.32.2 differs from transformers, and the list of routed experts.
Leaves to others: opening files, memory, precision, replacing the experts. docs/architectures.md has the details.

    model, config = mlx_lm.utils.load_model(path, get_model_classes=model_classes)

Shapes: E experts, D model width, F expert width.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.utils import MODEL_ARCHITECTURE_REMAPPING, MODEL_REMAPPING

from mlxmoe.errors import UserError

Config = dict[str, Any]
Weights = dict[str, mx.array]


# ---------------------------------------------------------------------------------------------------------------------
# The routed experts of a model
# ---------------------------------------------------------------------------------------------------------------------


class ExpertSite(NamedTuple):
    """The routed experts of one layer: one SwitchGLU (gate, up, down) or SwitchMLP (fc1, fc2)."""

    path: str  # module path in the model, e.g. "model.layers.1.mlp.switch_mlp"
    layer: int  # the N in "layers.N"
    kind: str  # "glu" or "mlp"
    num_experts: int
    input_dims: int  # D
    hidden_dims: int  # F
    has_bias: bool


def named_arrays(tree: Any) -> dict[str, mx.array]:
    """The arrays of a tree of parameters or cache states under their dotted names. Evaluates nothing."""
    return {name: leaf for name, leaf in dict(tree_flatten(tree)).items() if isinstance(leaf, mx.array)}


def expert_sites(model: nn.Module) -> list[ExpertSite]:
    """The routed experts of `model` in layer order, quantized or not. Evaluates nothing: weights need not be loaded."""
    sites = [_site(path, m) for path, m in model.named_modules() if isinstance(m, (SwitchGLU, SwitchMLP))]
    return sorted(sites, key=lambda site: (site.layer, site.path))


def _site(path: str, module: SwitchGLU | SwitchMLP) -> ExpertSite:
    first = module.up_proj if isinstance(module, SwitchGLU) else module.fc1
    layer = re.search(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)(?:\.|$)", path)
    if layer is None:
        raise UserError(
            f"the experts at {path!r} are not inside a numbered layer",
            "this architecture keeps its layers in an unknown place; please report it with its config.json",
        )
    return ExpertSite(
        path=path,
        layer=int(layer.group(1)),
        kind="glu" if isinstance(module, SwitchGLU) else "mlp",
        num_experts=first.num_experts,
        input_dims=first.input_dims,
        hidden_dims=first.output_dims,
        has_bias="bias" in first,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Questions to a config
# ---------------------------------------------------------------------------------------------------------------------


def text_config(config: Config) -> Config:
    """The settings of the language model: those of `text_config` over those around it, or the config itself."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return dict(config)
    outer = {key: value for key, value in config.items() if key != "text_config"}
    return {**outer, **inner}


# What the architectures of mlx-lm call the number of experts that a token is sent to.
_TOP_K = ("num_experts_per_tok", "top_k_experts", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k")


def num_experts_per_token(config: Config) -> int:
    """Routed experts per token. Raises UserError when the config does not say."""
    text = text_config(config)
    for key in _TOP_K:
        value = text.get(key)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int):
            return value
    raise UserError(
        "config.json does not say how many experts a token uses",
        f"expected one of the keys {', '.join(_TOP_K)}",
    )


def max_context(config: Config) -> int | None:
    """The context length in tokens that the config declares, or None."""
    text = text_config(config)
    for key in ("max_position_embeddings", "max_seq_len", "seq_length", "n_positions", "max_sequence_length"):
        value = text.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Which module of mlx-lm
# ---------------------------------------------------------------------------------------------------------------------

# Text-only checkpoints of these architectures carry a model_type that has no module in mlx-lm.
_TEXT_ONLY = {"qwen3_5_moe_text": "qwen3_5_moe"}


@lru_cache(maxsize=1)
def moe_architectures() -> tuple[str, ...]:
    """Names of mlx-lm's modules that build routed experts, directly or through a module they import."""
    folder = Path(mlx_lm.models.__path__[0])
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    known = {name for name, text in texts.items() if re.search(r"\bSwitch(GLU|MLP)\b", text)} - {"switch_layers"}
    while True:
        importers = "|".join(map(re.escape, sorted(known)))
        pattern = re.compile(rf"^from \.({importers}) import|^from \. import .*\b({importers})\b", re.MULTILINE)
        more = {name for name, text in texts.items() if pattern.search(text)} - known
        if not more:
            return tuple(sorted(name for name in known if re.search(r"^class Model\b", texts[name], re.MULTILINE)))
        known |= more


def _module_name(config: Config) -> str:
    """The module of mlx-lm for `config`. Raises UserError for an architecture unknown or without routed experts."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UserError("config.json has no model_type", "expected a checkpoint in Hugging Face or MLX format")
    architectures = config.get("architectures") or ()
    names = (architectures,) if isinstance(architectures, str) else architectures
    remapped = (MODEL_ARCHITECTURE_REMAPPING.get((model_type, name)) for name in names)
    name = next((n for n in remapped if n), _TEXT_ONLY.get(model_type) or MODEL_REMAPPING.get(model_type, model_type))
    if name in moe_architectures():
        return name
    if re.fullmatch(r"\w+", name) and importlib.util.find_spec(f"mlx_lm.models.{name}") is not None:
        raise UserError(
            f"{model_type!r} is not a Mixture-of-Experts model with stacked experts",
            "mlxmoe runs models with routed experts; run this one with mlx_lm",
        )
    raise UserError(
        f"unknown architecture {model_type!r}; known: {', '.join(moe_architectures())}",
        "a newer mlx-lm may know it: pip install -U mlx-lm",
    )


def _module(name: str) -> Any:
    return importlib.import_module(f"mlx_lm.models.{name}")


# ---------------------------------------------------------------------------------------------------------------------
# Config: what transformers 4 and 5 write -> what mlx-lm's ModelArgs reads
# ---------------------------------------------------------------------------------------------------------------------

# Checked names of text architectures; any other module of mlx-lm takes the generic path.
_FAMILIES = {
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_next",
    "olmoe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "qwen3_5_moe",
    "gemma4",
}
_MLA = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}

# What transformers assumes for a key that is absent (or null), where mlx-lm assumes something else or requires the key.
_DEFAULTS: dict[str, Config] = {
    "qwen2_moe": {"rms_norm_eps": 1e-6},
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    },
    "qwen3_next": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "partial_rotary_factor": 0.25,
    },
    "qwen3_5_moe": {"partial_rotary_factor": 0.25},
    "olmoe": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "norm_topk_prob": False},
    "mixtral": {"rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "deepseek_v2": {"topk_method": "greedy", "n_shared_experts": 2, "qk_rope_head_dim": 64},
    "deepseek_v3": {
        "qk_rope_head_dim": 64,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
    "glm4_moe": {
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
    },
    "glm4_moe_lite": {"qk_rope_head_dim": 64, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "gpt_oss": {"rope_theta": 150000.0},
    "gemma4": {
        "head_dim": 256,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
}

# Settings that mlx-lm's class does not read: the values under which it is right. None stands for null and absent.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2_moe": {
        "qkv_bias": (None, True),
        "use_sliding_window": (None, False),
        "decoder_sparse_step": (None, 1),
        "mlp_only_layers": (None, []),
        "norm_topk_prob": (None, False),
    },
    "qwen3_moe": {"attention_bias": (None, False), "use_sliding_window": (None, False)},
    "qwen3_5_moe": {"attn_output_gate": (None, True), "mlp_only_layers": (None, [])},
    "olmoe": {"clip_qkv": (None,)},
    "mixtral": {"sliding_window": (None,)},
    "deepseek_v2": {
        "norm_topk_prob": (None, False),
        "scoring_func": (None, "softmax"),
        "topk_method": ("greedy", "group_limited_greedy"),
        "mlp_bias": (None, False),
    },
    "deepseek_v3": {"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")},
    "glm4_moe": {"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")},
    "glm4_moe_lite": {"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")},
    "gpt_oss": {"swiglu_alpha": (None, 1.702), "swiglu_limit": (None, 7.0), "attention_bias": (None, True)},
    "gemma4": {
        "attention_bias": (None, False),
        "use_bidirectional_attention": (None, "vision"),
        "hidden_activation": (None, "gelu_pytorch_tanh"),
    },
}

# One setting, several names over the years. A missing name takes the value of the first one present.
_ALIASES = (
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("num_experts_per_tok", "top_k_experts"),
    ("num_nextn_predict_layers", "num_mtp_layers"),
    ("torch_dtype", "dtype"),
)

_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_COUNTS = (
    *_REQUIRED,
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_group",
    "topk_group",
)


def normalise_config(config: Config) -> Config:
    """`config` in the form that mlx-lm's ModelArgs reads, whoever wrote it; the argument is left as it is.

    Idempotent, and keys that need no change (such as "quantization" of a stock MLX checkpoint) are kept.
    Raises UserError for an unknown or dense architecture, and for a setting that mlx-lm's class would not honour.
    """
    name = _module_name(config)
    result = copy.deepcopy(config)
    if isinstance(result.get("text_config"), dict):
        inner = result["text_config"]
        if inner.get("tie_word_embeddings") is None and "tie_word_embeddings" in result:
            inner["tie_word_embeddings"] = result["tie_word_embeddings"]
        result["text_config"] = _normalise_text(inner, name)
        if name == "gemma4" and "vocab_size" in inner:
            # mlx-lm's wrapper overwrites the inner value with its own, 262144 unless the outer config has one
            result["vocab_size"] = inner["vocab_size"]
        return result
    return _normalise_text(result, name)


def _family(name: str) -> str:
    return name.removesuffix("_text")


def _normalise_text(text: Config, name: str) -> Config:
    """Normalises the settings of the language model in place; `name` is the module of mlx-lm."""
    family = _family(name)
    for names in _ALIASES:
        value = next((text[key] for key in names if text.get(key) is not None), None)
        for key in names:
            if value is not None and text.get(key) is None:
                text[key] = value
    for key, value in _DEFAULTS.get(family, {}).items():
        in_rope = key in ("rope_theta", "partial_rotary_factor") and text.get("rope_parameters")
        if text.get(key) is None and not in_rope:
            text[key] = copy.copy(value)
    _check_values(text, family)
    _QUIRKS.get(family, _no_quirk)(text)
    _normalise_rope(text, name, family)
    return text


def _check_values(text: Config, family: str) -> None:
    """Raises UserError for values that are no counts, contradict each other, or that mlx-lm's class would ignore."""
    absent = [key for key in _REQUIRED if text.get(key) is None] if family in _FAMILIES else []
    if absent:
        raise UserError(f"config.json of {family} has no {absent[0]}", "check the checkpoint's config.json")
    if text.get("num_experts") == 0:
        raise _dense_error(family)
    for key in _COUNTS if family in _FAMILIES else _REQUIRED:
        value = text.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise UserError(
                f"config.json: {key} is {value!r}, expected a positive whole number",
                "check the checkpoint's config.json",
            )
    experts, top_k, groups = (text.get(k) for k in ("num_experts", "num_experts_per_tok", "n_group"))
    if experts is not None and top_k is not None and top_k > experts:
        raise UserError(
            f"config.json: {top_k} experts per token of {experts} experts", "check the checkpoint's config.json"
        )
    if family in _FAMILIES and experts is not None and groups is not None and experts % groups:
        raise UserError(
            f"config.json: {experts} experts do not divide into {groups} groups", "check the checkpoint's config.json"
        )
    heads, shared = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if family in _FAMILIES and shared is not None and heads % shared:
        raise UserError(
            f"config.json: {heads} attention heads do not divide among {shared} key-value heads",
            "check the checkpoint's config.json",
        )
    allowed = dict(_ONLY.get(family, {}))
    if family in _FAMILIES and family != "gemma4":
        allowed["hidden_act"] = (None, "silu", "swish")
    if family == "qwen2_moe" and text.get("layer_types"):
        allowed["layer_types"] = (["full_attention"] * len(text["layer_types"]),)
    for key, values in allowed.items():
        if text.get(key) not in values:
            expected = " or ".join(repr(v) for v in values if v is not None) or "null"
            raise UserError(
                f"config.json of {family}: {key} is {text[key]!r}, and mlx-lm's model supports only {expected}",
                "this checkpoint would give wrong answers; it is not supported",
            )


def _dense_error(name: str) -> UserError:
    return UserError(
        f"this {name} checkpoint is not a Mixture-of-Experts model: it has no routed experts",
        "mlxmoe runs models with routed experts; run this one with mlx_lm",
    )


def _no_quirk(text: Config) -> None:
    """Nothing to do."""


def _fill_head_dim(text: Config) -> None:
    # mlx-lm requires the key; transformers derives it when it is absent or null
    if text.get("head_dim") is None:
        text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]


def _derived_head_dim(text: Config) -> None:
    # mlx-lm derives the width of a head and does not read head_dim
    derived = text["hidden_size"] // text["num_attention_heads"]
    if text.get("head_dim") not in (None, derived):
        raise UserError(
            f"config.json: head_dim is {text['head_dim']}, and mlx-lm's model supports only {derived}",
            "this checkpoint would give wrong answers; it is not supported",
        )


def _attention_interval(text: Config) -> None:
    # transformers 5 lists the layers, mlx-lm wants the period
    _fill_head_dim(text)
    types = text.get("layer_types")
    if types is None:
        text.setdefault("full_attention_interval", 4)
        return
    interval = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
    regular = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(len(types))]
    if types != regular or len(types) != text["num_hidden_layers"] or interval > len(types):
        raise UserError(
            f"config.json: layer_types is not a full_attention layer at every n-th place: {types}",
            "mlx-lm's model supports only such a period; this checkpoint is not supported",
        )
    text["full_attention_interval"] = interval


def _dense_layers_first(text: Config) -> None:
    # transformers 5 lists the layers, mlx-lm wants the number of dense layers at the start
    types = text.get("mlp_layer_types")
    if types is None:
        return
    dense = types.index("sparse") if "sparse" in types else len(types)
    if types != ["dense"] * dense + ["sparse"] * (len(types) - dense):
        raise UserError(
            f"config.json: mlp_layer_types is not some dense layers followed by sparse ones: {types}",
            "mlx-lm's model supports only that order; this checkpoint is not supported",
        )
    text["first_k_dense_replace"] = dense


def _gemma4_layers(text: Config) -> None:
    # transformers always ends on a full attention layer when it makes the list itself
    if text.get("layer_types") is None:
        period, count = text["sliding_window_pattern"], text["num_hidden_layers"]
        types = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(count)]
        text["layer_types"] = [*types[:-1], "full_attention"]
    # transformers 5.23 moved the shape of the full attention layers from two keys into per_layer_config
    per_layer = {str(layer): shape for layer, shape in (text.get("per_layer_config") or {}).items()}
    if not per_layer:
        return
    full = {str(i) for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"}
    shape = next(iter(per_layer.values()))
    if set(per_layer) != full or any(other != shape for other in per_layer.values()):
        raise UserError(
            "config.json: per_layer_config does not give all full_attention layers, and only them, the same shape",
            "mlx-lm's model supports only that; this checkpoint is not supported",
        )
    text["global_head_dim"] = shape.get("head_dim", text["head_dim"])
    text["num_global_key_value_heads"] = shape.get("num_key_value_heads")


_QUIRKS: dict[str, Callable[[Config], None]] = {
    "qwen2_moe": _derived_head_dim,
    "qwen3_moe": _fill_head_dim,
    "qwen3_next": _attention_interval,
    "qwen3_5_moe": _attention_interval,
    "mixtral": _derived_head_dim,
    "glm4_moe": _fill_head_dim,
    "glm4_moe_lite": _dense_layers_first,
    "gemma4": _gemma4_layers,
}


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embeddings: settings
# ---------------------------------------------------------------------------------------------------------------------

# The keys that `_rope` reads, per type of scaling.
_ROPE_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    },
}
# Present in published configs and without effect on text: image position layout, a note on training, names of the type.
_ROPE_NOTES = {"mrope_section", "mrope_interleaved", "finetuned", "type", "rope_type"}
_ROPE_TYPES = {"deepseek_yarn": "yarn", "mrope": "default"}
_PARTIAL = {"glm4_moe", "qwen3_next", "qwen3_5_moe"}


def _normalise_rope(text: Config, name: str, family: str) -> None:
    """Writes rope_theta, rope_scaling (None for none) and partial_rotary_factor from whichever style is there."""
    parameters = {k: v for k, v in (text.get("rope_parameters") or {}).items() if v is not None}
    if any(isinstance(value, dict) for value in parameters.values()):
        _normalise_nested_rope(text, name, family, parameters)
        return
    # transformers moves partial_rotary_factor and rope_theta in and out of the scaling; the scaling's own value wins
    scaling = parameters or {k: v for k, v in (text.get("rope_scaling") or {}).items() if v is not None}
    theta = scaling.pop("rope_theta", text.get("rope_theta", 10000.0 if family in _FAMILIES else None))
    default = _DEFAULTS.get(family, {}).get("partial_rotary_factor")
    partial = scaling.pop("partial_rotary_factor", text.get("partial_rotary_factor", default))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = _ROPE_TYPES.get(kind, kind) if family in _FAMILIES else kind
    if kind == "yarn":
        _complete_yarn(scaling, text)
    _check_rope(kind, scaling, partial, name, family)
    scaling |= {"type": kind, "rope_type": kind}
    if theta is not None:
        text["rope_theta"] = theta
    if partial is not None:
        text["partial_rotary_factor"] = partial
    text["rope_scaling"] = None if kind == "default" else dict(scaling)
    if family == "deepseek_v2" and text["rope_scaling"] is None:
        # mlx-lm's attention indexes rope_scaling; YaRN by a factor of 1 is no scaling
        neutral = {"type": "yarn", "rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}
        text["rope_scaling"] = neutral
    if theta is not None:
        own = {"rope_theta": theta} if partial is None else {"rope_theta": theta, "partial_rotary_factor": partial}
        text["rope_parameters"] = {**scaling, **own}


def _normalise_nested_rope(text: Config, name: str, family: str, parameters: Config) -> None:
    """rope_parameters per layer type: kept where mlx-lm's class reads it so, flattened where all types agree."""
    kinds = [value for value in parameters.values() if isinstance(value, dict)]
    if family == "gemma4":
        for settings in kinds:
            kind = settings.get("rope_type", "default")
            partial = 1 if kind == "proportional" else settings.get("partial_rotary_factor", 1)
            ignored = set(settings) - {"rope_theta", "partial_rotary_factor", "factor"} - _ROPE_NOTES
            if kind not in ("default", "proportional") or ignored or partial != 1:
                raise _rope_error(name, f"rope_parameters {settings}")
        return
    if "rope_parameters" in _argument_names(name) or "text_config" in _argument_names(name):
        return
    if any(settings != kinds[0] for settings in kinds):
        raise _rope_error(name, f"rope_parameters that differ by layer type: {parameters}")
    text["rope_parameters"] = dict(kinds[0])
    _normalise_rope(text, name, family)


def _complete_yarn(scaling: Config, text: Config) -> None:
    """Fills the two keys that transformers derives from max_position_embeddings."""
    longest = text.get("max_position_embeddings")
    original = scaling.setdefault("original_max_position_embeddings", longest)
    if scaling.get("factor") is None and longest and original:
        scaling["factor"] = longest / original
    if not scaling.get("factor") or not original:
        raise UserError(
            "config.json: YaRN rope scaling without factor or original_max_position_embeddings",
            "check the checkpoint's config.json",
        )


def _check_rope(kind: str, scaling: Config, partial: float | None, name: str, family: str) -> None:
    """Raises UserError for a rope setting that the model would not honour."""
    if family in _FAMILIES and family != "gemma4":
        if kind not in _ROPE_KEYS or (kind != "default" and "factor" not in scaling):
            raise _rope_error(name, f"rope scaling {scaling}")
        ignored = set(scaling) - _ROPE_KEYS[kind] - _ROPE_NOTES
        if kind != "default" and ignored:
            raise _rope_error(name, f"rope scaling keys {sorted(ignored)}")
        if family not in _PARTIAL and partial not in (None, 1, 1.0):
            raise _rope_error(name, f"partial_rotary_factor {partial}")
        return
    names = _argument_names(name)
    if "text_config" in names:
        return  # the inner class is not known before it is built; _check_built looks at its rope modules
    if kind not in ("default", "mrope") and not names & {"rope_scaling", "rope_parameters"}:
        raise _rope_error(name, f"rope scaling {scaling}")
    if kind == "yarn" and ({"attention_factor"} & set(scaling) or scaling.get("truncate") is False):
        raise _rope_error(name, f"rope scaling {scaling}")
    if partial not in (None, 1, 1.0) and not names & {"partial_rotary_factor", "rope_parameters", "rotary_dim"}:
        raise _rope_error(name, f"partial_rotary_factor {partial}")


def _rope_error(name: str, what: str) -> UserError:
    return UserError(
        f"mlx-lm's {name} cannot honour {what}", "this checkpoint would give wrong answers; it is not supported"
    )


def _argument_names(name: str) -> set[str]:
    """The settings that the ModelArgs of mlx-lm's module `name` reads."""
    return set(inspect.signature(_module(name).ModelArgs).parameters)


# ---------------------------------------------------------------------------------------------------------------------
# Modules whose arithmetic in mlx-lm differs from transformers
# ---------------------------------------------------------------------------------------------------------------------


class YarnRoPE(nn.Module):
    """YaRN (Peng et al. 2023, arXiv:2309.00071) with the options of transformers that mlx-lm's class does not read.

    `truncate: false` (gpt-oss) keeps the correction range fractional; `attention_factor` overrides the scale of queries
    and keys; `mscale` counts only together with `mscale_all_dim`.
    """

    def __init__(self, dims: int, base: float, traditional: bool, scaling: Config) -> None:
        super().__init__()
        factor = scaling["factor"]
        original = scaling["original_max_position_embeddings"]
        self.dims = dims
        self.traditional = traditional
        self.scale = scaling.get("attention_factor") or _yarn_scale(factor, scaling)

        def correction_dim(rotations: float) -> float:
            return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        low = correction_dim(scaling.get("beta_fast") or 32.0)
        high = correction_dim(scaling.get("beta_slow") or 1.0)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        width = high - low or 0.001
        interpolated = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / width, 0, 1)
        periods = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        # the leading underscore keeps the array out of the model's parameters
        self._freqs = 1.0 / (interpolated / (factor * periods) + (1.0 - interpolated) / periods)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        """x: [..., tokens, width >= dims]; rotates the first `dims` of the last axis."""
        if self.scale != 1.0:
            x = x.at[..., : self.dims].multiply(self.scale)
        return mx.fast.rope(
            x, self.dims, traditional=self.traditional, base=None, scale=1.0, offset=offset, freqs=self._freqs
        )


def _yarn_scale(factor: float, scaling: Config) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"])
    return mscale(1.0)


def _rope(text: Config, family: str) -> nn.Module:
    """The rotary embedding of a (normalised) config, for the architectures in which all layers share one."""
    theta, scaling = text["rope_theta"], text.get("rope_scaling")
    if family in _MLA:
        dims = text["qk_rope_head_dim"]
        traditional = text.get("rope_interleave") is not False
    else:
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        dims = int(width * text.get("partial_rotary_factor", 1.0)) if family in _PARTIAL else width
        traditional = False
    if scaling is None or scaling["factor"] == 1.0:
        return nn.RoPE(dims, traditional=traditional, base=theta)
    if scaling["type"] == "yarn":
        return YarnRoPE(dims, theta, traditional, scaling)
    return initialize_rope(dims, theta, traditional, scaling, text.get("max_position_embeddings"))


@mx.compile
def _select_in_groups(
    logits: mx.array, bias: mx.array, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool, scaling: float
) -> tuple[mx.array, mx.array]:
    """logits [..., E], bias [E] -> (expert indices, weights), both [..., top_k]; scores in float32."""
    scores = mx.sigmoid(logits.astype(mx.float32))
    biased = scores + bias
    if topk_group < n_group:
        biased = mx.unflatten(biased, -1, (n_group, -1))
        groups = mx.topk(biased, 2, axis=-1).sum(axis=-1)
        num_rejected = n_group - topk_group
        rejected = mx.argpartition(groups, kth=num_rejected - 1, axis=-1)[..., :num_rejected, None]
        biased = mx.put_along_axis(biased, rejected, mx.array(-mx.inf, mx.float32), axis=-2).flatten(-2, -1)
    indices = mx.stop_gradient(mx.argpartition(-biased, kth=top_k - 1, axis=-1)[..., :top_k])
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return indices, weights * scaling


class GroupLimitedGate(nn.Module):
    """Router of DeepSeek-V3 and GLM-4 with groups (arXiv:2412.19437, section 2.1.2): sigmoid scores, top groups, top-k.

    mlx-lm scores the experts of rejected groups 0; they must lose to every expert of an accepted group, also to one
    whose biased score is negative. Keeps the parameters of mlx-lm's gate: weight [E, D], e_score_correction_bias [E].
    """

    def __init__(self, gate: Any) -> None:
        super().__init__()
        self.weight = gate.weight
        self.e_score_correction_bias = gate.e_score_correction_bias
        self.top_k = gate.top_k
        self.n_group = gate.n_group
        self.topk_group = gate.topk_group
        self.norm_topk_prob = gate.norm_topk_prob
        self.routed_scaling_factor = gate.routed_scaling_factor

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: [..., D] -> (expert indices, weights), both [..., top_k]."""
        return _select_in_groups(
            x @ self.weight.T,
            self.e_score_correction_bias,
            self.top_k,
            self.n_group,
            self.topk_group,
            self.norm_topk_prob,
            self.routed_scaling_factor,
        )


def _correct(model: nn.Module, text: Config, family: str) -> None:
    """Replaces, in a freshly built model, the modules that compute something else than transformers."""
    replaced: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if family in _FAMILIES and family != "gemma4" and path.endswith(".self_attn.rope"):
            replaced[path] = _rope(text, family)
        grouped = path.endswith(".mlp.gate") and family in ("deepseek_v3", "glm4_moe", "glm4_moe_lite")
        # without groups mlx-lm's gate is right, but for a single expert per token, which it does not normalise
        if grouped and (module.n_group > module.topk_group or module.top_k == 1):
            replaced[path] = GroupLimitedGate(module)
        if family == "glm4_moe_lite" and path.endswith(("q_a_layernorm", "kv_a_layernorm")):
            # transformers builds these two with the default of its norm, not with rms_norm_eps
            module.eps = 1e-6
    model.update_modules(tree_unflatten(list(replaced.items())))


def _check_built(model: nn.Module, text: Config, name: str) -> None:
    """Raises UserError if a freshly built model has no routed experts, or plain RoPE where the config says another."""
    sites = expert_sites(model)
    if not sites:
        raise _dense_error(name)
    if _family(name) in _FAMILIES:
        return
    scaling = text.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    plain = [m for _, m in model.named_modules() if type(m) is nn.RoPE]
    if kind not in ("default", "mrope") and any(m.scale == 1.0 for m in plain):
        raise _rope_error(name, f"rope scaling {scaling}")
    if plain and text.get("rope_theta") is not None and all(m.base != text["rope_theta"] for m in plain):
        raise _rope_error(name, f"rope_theta {text['rope_theta']}")


# ---------------------------------------------------------------------------------------------------------------------
# Weights: what is on disk -> the names of mlx-lm's modules. Everything here stays lazy.
# ---------------------------------------------------------------------------------------------------------------------

_PROJECTIONS = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_EXPERT = re.compile(r"^(\d+)\.(\w+)\.(weight|scales|biases|bias)$")
_LAYER = re.compile(r"^((?:\w+\.)*?layers\.(\d+)\.)(.+)$")


def _sanitize(model: nn.Module, weights: Weights, text: Config, family: str) -> Weights:
    """The part of sanitize before mlx-lm's own: afterwards the routed experts carry the names of the model's modules.

    Must see all tensors of the checkpoint at once (zero-centred norms are recognised by a tensor of another layer), and
    reads only their names, shapes and dtypes. Raises UserError for missing experts and for wrong shapes.
    """
    weights = _drop(weights, text)
    weights = _dequantize_fp8(weights, text)
    weights = _PREPARE.get(family, _unchanged)(weights)
    return _stack_experts(weights, expert_sites(model), family)


def _unchanged(weights: Weights) -> Weights:
    return weights


# Tensors that only a multi-token prediction layer has (DeepSeek-V3, GLM-4.5 and their kin).
_PREDICTION = ("eh_proj", "enorm", "hnorm", "shared_head")


def _drop(weights: Weights, text: Config) -> Weights:
    """Without multi-token prediction layers, which come after the last layer, and precomputed rotary frequencies.

    Raises UserError for any other layer after the last: mlx-lm would leave it out in silence.
    """
    layers = text.get("num_hidden_layers")
    # anchored at the language model: a vision tower may well have more layers
    numbered = re.compile(r"^(?:language_model\.)?(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(\w+)")
    found = [(name, int(match[1]), match[2]) for name in weights if (match := numbered.match(name)) is not None]
    beyond = [each for each in found if isinstance(layers, int) and each[1] >= layers]
    predicting = {layer for _, layer, part in beyond if part in _PREDICTION}
    unknown = sorted({layer for _, layer, _ in beyond} - predicting)
    if unknown:
        raise UserError(
            f"config.json says {layers} layers, and the checkpoint has weights of layer {unknown[0]}",
            "config.json and weights do not belong together",
        )
    dropped = {name for name, _, _ in beyond}
    dropped |= {n for n in weights if n.startswith(("mtp.", "model.mtp.")) or n.endswith("rotary_emb.inv_freq")}
    return {name: array for name, array in weights.items() if name not in dropped}


def _dequantize_fp8(weights: Weights, text: Config) -> Weights:
    """Block-scaled e4m3 (DeepSeek-V3, Qwen3 "-FP8"; fused experts too) to bfloat16: value * scale of its block."""
    settings = text.get("quantization_config") or {}
    block = settings.get("weight_block_size") or [128, 128]
    if settings.get("scale_fmt") == "ue8m0" and list(block) == [32, 32]:
        return weights  # mlx-lm keeps these packed, as mxfp8
    result = {name: array for name, array in weights.items() if not name.endswith("_scale_inv")}
    for name, scale in weights.items():
        target = name.removesuffix("_scale_inv")
        if target == name or target not in weights:
            continue
        value = mx.from_fp8(weights[target], dtype=mx.bfloat16)
        *experts, rows, columns = value.shape
        padding = [(0, 0)] * len(experts) + [(0, -rows % block[0]), (0, -columns % block[1])]
        blocks = mx.pad(value, padding).reshape(*experts, scale.shape[-2], block[0], scale.shape[-1], block[1])
        value = (blocks * scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2, -1)
        result[target] = value[..., :rows, :columns].astype(mx.bfloat16)
    return result


def _stack_experts(weights: Weights, sites: list[ExpertSite], family: str) -> Weights:
    """Per-expert tensors and fused ones -> one [E, ...] tensor per projection under the site's name.

    Already stacked tensors pass through. Outside the checked architectures only what cannot be mistaken is touched:
    the rest is left to mlx-lm's own sanitize.
    """
    checked = family in _FAMILIES
    places = {site.layer: (site, *_names_on_disk(site)) for site in sites if site.kind == "glu"}
    result: Weights = {}
    loose: dict[str, tuple[ExpertSite, dict[int, mx.array]]] = {}
    for name, array in weights.items():
        match = _LAYER.match(name)
        site, on_disk, tail = places.get(int(match.group(2)), (None, "", "")) if match else (None, "", "")
        if match is None or site is None or not match.group(3).startswith(on_disk):
            result[name] = array
            continue
        target, rest = match.group(1) + tail, match.group(3).removeprefix(on_disk)
        single = _EXPERT.match(rest)
        if checked and single and single.group(2) in _PROJECTIONS:
            stacked = f"{target}.{_PROJECTIONS[single.group(2)]}.{single.group(3)}"
            loose.setdefault(stacked, (site, {}))[1][int(single.group(1))] = array
        elif family == "gpt_oss":
            result |= {f"{target}.{key}": value for key, value in _split_gpt_oss(rest, array)}
        elif rest in ("gate_up_proj", "down_proj"):
            result |= _split_fused(name, rest, array, site, target, checked)
        else:
            result[name] = array
    for name, (site, experts) in loose.items():
        missing = sorted(set(range(site.num_experts)) - set(experts))
        if missing or len(experts) != site.num_experts:
            raise UserError(
                f"{name}: the checkpoint has {len(experts)} experts, config.json says {site.num_experts}"
                + (f"; expert {missing[0]} is missing" if missing else ""),
                "a shard may be missing or config.json may belong to another checkpoint",
            )
        result[name] = mx.stack([experts[i] for i in range(site.num_experts)])
    return result


def _names_on_disk(site: ExpertSite) -> tuple[str, str]:
    """(prefix of the experts' tensors, name of the stacked module), both after "layers.N."."""
    tail = site.path.split(f"layers.{site.layer}.", 1)[-1]
    block = [part for part in tail.split(".") if not part.startswith("switch_") and part != "experts"]
    return ".".join([*block, "experts"]) + ".", tail


def _split_fused(name: str, rest: str, array: mx.array, site: ExpertSite, target: str, checked: bool) -> Weights:
    """transformers 5: gate_up_proj [E, 2F, D] = gate then up, down_proj [E, D, F]."""
    experts, width, hidden = site.num_experts, site.input_dims, site.hidden_dims
    expected = (experts, 2 * hidden, width) if rest == "gate_up_proj" else (experts, width, hidden)
    if not checked and (tuple(array.shape) != expected or expected[1] == expected[2]):
        return {name: array}  # an architecture with another layout (llama4: [E, D, 2F]); mlx-lm's sanitize knows it
    if tuple(array.shape) != expected:
        raise UserError(
            f"{name} has shape {tuple(array.shape)}, expected {expected}",
            "config.json may belong to another checkpoint",
        )
    if rest == "down_proj":
        return {f"{target}.down_proj.weight": array}
    # contiguous: the experts are read by gather, which would copy a strided stack at every call
    gate, up = (mx.contiguous(part) for part in mx.split(array, 2, axis=-2))
    return {f"{target}.gate_proj.weight": gate, f"{target}.up_proj.weight": up}


def _split_gpt_oss(rest: str, array: mx.array) -> Iterator[tuple[str, mx.array]]:
    """gpt-oss: gate and up interleaved along their axis; bf16 [E, D, 2F] and [E, F, D], mxfp4 blocks and scales by row.

    mlx-lm's own sanitize splits the bf16 tensors along the wrong axis.
    """
    projection, _, part = re.sub(r"_(bias|blocks|scales)$", r"/\1", rest).partition("/")
    if projection not in ("gate_up_proj", "down_proj"):
        yield rest, array  # already sanitized: gate_proj.weight, ...
        return
    if part == "":
        array = array.swapaxes(-1, -2)
    if part == "blocks":
        array = array.view(mx.uint32).flatten(-2)
    suffix = {"": "weight", "blocks": "weight", "scales": "scales", "bias": "bias"}[part]
    if projection == "down_proj":
        yield f"down_proj.{suffix}", mx.contiguous(array)
        return
    pairs = array[..., None] if part == "bias" else array
    for start, half in enumerate(("gate_proj", "up_proj")):
        value = mx.contiguous(pairs[..., start::2, :])
        yield f"{half}.{suffix}", value.squeeze(-1) if part == "bias" else value


def _block_sparse_names(weights: Weights) -> Weights:
    # transformers 5 calls Mixtral's block "mlp", everyone else "block_sparse_moe"
    return {re.sub(r"(layers\.\d+)\.mlp\.", r"\1.block_sparse_moe.", name): w for name, w in weights.items()}


def _shift_delta_norms(weights: Weights) -> Weights:
    """Qwen3-Next: convolution [C, 1, W] -> [C, W, 1], and 1 added to the norms that are stored around zero.

    As mlx-lm does it, which however skips it unless it finds per-expert tensors. An unturned convolution marks a
    checkpoint in which neither was done.
    """

    def unturned(name: str) -> bool:
        return name.endswith("conv1d.weight") and weights[name].shape[-1] != 1

    if not any(unturned(name) for name in weights):
        return weights
    shifted = ("layernorm.weight", "model.norm.weight", ".q_norm.weight", ".k_norm.weight")
    result = {name: array + 1.0 if name.endswith(shifted) else array for name, array in weights.items()}
    return {name: array.moveaxis(2, 1) if unturned(name) else array for name, array in result.items()}


_PREPARE: dict[str, Callable[[Weights], Weights]] = {
    "mixtral": _block_sparse_names,
    "qwen3_next": _shift_delta_norms,
}


def _tie(model: nn.Module, weights: Weights, text: Config) -> Weights:
    """Tied embeddings: a head that mlx-lm's class builds all the same reads the embedding; one it does not, goes."""
    if not text.get("tie_word_embeddings"):
        return weights
    modules = dict(model.named_modules())
    heads = [path for path in modules if path.rsplit(".", 1)[-1] == "lm_head"]
    embeddings = [path for path in modules if path.rsplit(".", 1)[-1] == "embed_tokens"]
    if not heads:
        return {name: a for name, a in weights.items() if not re.search(r"(^|\.)lm_head\.\w+$", name)}
    result = dict(weights)
    for suffix in ("weight", "scales", "biases"):
        if len(embeddings) == 1 and f"{heads[0]}.weight" not in weights and f"{embeddings[0]}.{suffix}" in weights:
            result[f"{heads[0]}.{suffix}"] = weights[f"{embeddings[0]}.{suffix}"]
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The seam into mlx-lm
# ---------------------------------------------------------------------------------------------------------------------

# What mlx-lm's constructors raise for a config that they cannot use.
_BUILD_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError, AssertionError, ZeroDivisionError)


class ArgumentsReader(NamedTuple):
    """Stands where load_model expects a ModelArgs class: `from_dict` normalises and then asks mlx-lm's own class."""

    name: str  # the module of mlx-lm

    def from_dict(self, config: Config) -> Any:
        """mlx-lm's ModelArgs for `config`. Raises UserError for a config that it cannot use."""
        normal = normalise_config(config)
        arguments = _module(self.name).ModelArgs
        fields = inspect.signature(arguments).parameters.values()
        required = [f.name for f in fields if f.default is f.empty and "Optional" not in str(f.annotation)]
        # qwen3_5_moe's class takes a text-only config and nests it itself
        absent = [key for key in required if normal.get(key) is None and key != "text_config"]
        if absent:
            raise UserError(
                f"config.json of {self.name} has no {', '.join(absent)}", "check the checkpoint's config.json"
            )
        try:
            return arguments.from_dict(normal)
        except _BUILD_ERRORS as error:
            raise _unusable(self.name, error) from error


def _unusable(name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = f"missing {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    reason = reason.splitlines()[0]
    return UserError(f"config.json does not describe a {name} model: {reason}", "check the checkpoint's config.json")


def model_classes(config: Config) -> tuple[type[nn.Module], ArgumentsReader]:
    """(model class, reader of its arguments) for mlx_lm.utils.load_model(get_model_classes=model_classes).

    The class is mlx-lm's own with two changes: modules that differ from transformers are replaced once it is built, and
    `sanitize(weights)` accepts every style on disk, stays lazy and is idempotent. Raises UserError as normalise_config.
    """
    name = _module_name(config)
    return _adapted(_module(name).Model, name, text_config(normalise_config(config))), ArgumentsReader(name)


def _adapted(base: type[nn.Module], name: str, text: Config) -> type[nn.Module]:
    """A subclass of mlx-lm's `base` for the (normalised) settings `text`."""
    family = _family(name)

    class Model(base):  # type: ignore[misc, valid-type]
        def __init__(self, args: Any) -> None:
            try:
                super().__init__(args)
            except _BUILD_ERRORS as error:
                raise _unusable(name, error) from error
            _check_built(self, text, name)
            _correct(self, text, family)

        def sanitize(self, weights: Weights) -> Weights:
            weights = _sanitize(self, weights, text, family)
            if hasattr(base, "sanitize"):
                weights = super().sanitize(weights)
            return _tie(self, weights, text)

    Model.__doc__ = f"mlx-lm's {name}, corrected; see mlxmoe.models."
    return Model
