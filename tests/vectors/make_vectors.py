"""Makes the golden vectors beside this file with torch and transformers; see README.md.

    pip install torch==2.13.0 transformers==5.23.0 safetensors numpy
    python tests/vectors/make_vectors.py [CASE ...]

For every case: a tiny model of one architecture, its config.json as transformers 5 writes it and in the older style,
the names and shapes of its tensors on disk in both layouts (per expert; fused as in transformers 5's memory), and the
float32 logits of the last positions for the deterministic weights of weights.py under each layout. The older config is
loaded by transformers itself and must give the same logits, so that it is a translation and not a guess.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from weights import checkpoint

HERE = Path(__file__).resolve().parent
POSITIONS = 4  # logits kept: the last four positions
TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "kv_lora_rank": 24,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
DEEPSEEK_YARN = {**YARN, "mscale": 0.8, "mscale_all_dim": 0.6}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 8,
    "num_hidden_layers": 4,
    "shared_expert_intermediate_size": 40,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.25},
}
MROPE = {**DELTA["rope_parameters"], "mrope_section": [1, 1, 0], "mrope_interleaved": True}
GEMMA: dict[str, Any] = {
    "num_experts": 8,
    "top_k_experts": 2,
    "enable_moe_block": True,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "final_logit_softcapping": 20.0,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 3000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 70000.0},
    },
}


class Case(NamedTuple):
    """A tiny model: `settings` are the keyword arguments of its transformers config."""

    model_type: str
    settings: dict[str, Any]
    tokens: int = 24
    older: str = "transformers-4"


def _default_rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


CASES: dict[str, Case] = {
    "qwen2_moe": Case(
        "qwen2_moe",
        {**TINY, "num_experts": 8, "shared_expert_intermediate_size": 48, "rope_parameters": _default_rope(20000.0)},
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        {
            **TINY,
            "num_experts": 8,
            "head_dim": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
            "rope_parameters": _default_rope(20000.0),
        },
    ),
    "qwen3_moe-yarn": Case("qwen3_moe", {**TINY, "num_experts": 8, "head_dim": 16, "rope_parameters": YARN}),
    "qwen3_next": Case(
        "qwen3_next",
        {**TINY, **DELTA, "norm_topk_prob": True, "layer_types": ["linear_attention", "full_attention"] * 2},
        tokens=80,
    ),
    "olmoe": Case(
        "olmoe", {**TINY, "intermediate_size": 40, "num_experts": 8, "rope_parameters": _default_rope(3000.0)}
    ),
    "mixtral": Case(
        "mixtral",
        {**TINY, "intermediate_size": 40, "num_local_experts": 8, "rope_parameters": _default_rope(20000.0)},
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        {**TINY, **MLA, **GROUPS, "topk_method": "group_limited_greedy", "rope_parameters": DEEPSEEK_YARN},
    ),
    "deepseek_v2-plain": Case(
        "deepseek_v2",
        {
            **TINY,
            **MLA,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "rope_parameters": _default_rope(3000.0),
        },
    ),
    "deepseek_v3": Case("deepseek_v3", {**TINY, **MLA, **GROUPS, "rope_parameters": DEEPSEEK_YARN}),
    "deepseek_v3-plain": Case(
        "deepseek_v3",
        {
            **TINY,
            **MLA,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "rope_parameters": _default_rope(3000.0),
        },
    ),
    "glm4_moe": Case(
        "glm4_moe",
        {
            **TINY,
            **GROUPS,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.7,
            "rope_parameters": {**_default_rope(20000.0), "partial_rotary_factor": 0.5},
        },
    ),
    "glm4_moe_lite": Case(
        "glm4_moe_lite",
        {
            **TINY,
            **{k: v for k, v in MLA.items() if k != "first_k_dense_replace"},
            **GROUPS,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "rms_norm_eps": 1e-3,  # large, to see which norms read it
            "rope_parameters": _default_rope(20000.0),
        },
    ),
    "gpt_oss": Case(
        "gpt_oss",
        {
            **TINY,
            "intermediate_size": 40,
            "num_local_experts": 8,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "qwen3_5_moe": Case("qwen3_5_moe", {**TINY, **DELTA, "rope_parameters": MROPE}, tokens=80),
    "qwen3_5_moe_text": Case("qwen3_5_moe_text", {**TINY, **DELTA, "rope_parameters": MROPE}, tokens=80),
    "gemma4": Case("gemma4", {**TINY, **GEMMA}, older="transformers-5.5"),
    "gemma4_text": Case("gemma4_text", {**TINY, **GEMMA}, older="transformers-5.5"),
}
VISION: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 4,
        "patch_size": 2,
        "temporal_patch_size": 1,
    },
    "gemma4": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 2,
        "position_embedding_size": 4,
    },
}


def build(case: Case) -> transformers.PreTrainedModel:
    """The model of a case with random weights; only its names and shapes are used."""
    settings = copy.deepcopy(case.settings)
    if case.model_type in VISION:
        extra = {"audio_config": None} if case.model_type == "gemma4" else {}
        config = transformers.AutoConfig.for_model(
            case.model_type,
            text_config=settings,
            vision_config=VISION[case.model_type],
            tie_word_embeddings=settings["tie_word_embeddings"],
            **extra,
        )
        return transformers.AutoModelForImageTextToText.from_config(config)
    config = transformers.AutoConfig.for_model(case.model_type, **settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def older_style(config: dict[str, Any]) -> dict[str, Any]:
    """`config` (transformers 5) as older checkpoints have it: rope_theta and rope_scaling, torch_dtype, older names."""
    old = copy.deepcopy(config)
    text = old.get("text_config", old)
    if "gemma4" in config["model_type"]:  # as Google published it: the shape of full attention layers in two keys
        (shape,) = text.pop("per_layer_config").values()
        text |= {"global_head_dim": shape["head_dim"], "num_global_key_value_heads": shape["num_key_value_heads"]}
        return old
    if "qwen3_5" in config["model_type"]:  # as Qwen published it: rope_parameters already, and the period
        text |= {"full_attention_interval": 4, "mlp_only_layers": [], "attn_output_gate": True}
        return old
    rope = old.pop("rope_parameters")
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    # DeepSeek's own configs say "type", gpt-oss and later ones "rope_type"
    key = "type" if config["model_type"].startswith("deepseek") else "rope_type"
    old["rope_scaling"] = None if kind == "default" else {key: kind, **rope}
    old["torch_dtype"] = old.pop("dtype", "float32")
    old["transformers_version"] = "4.57.0"
    if config["model_type"] in ("qwen3_moe", "qwen2_moe", "qwen3_next", "olmoe") and "num_local_experts" in old:
        old["num_experts"] = old.pop("num_local_experts")
    if config["model_type"] == "qwen3_next":
        old["full_attention_interval"] = old.pop("layer_types").index("full_attention") + 1
    if config["model_type"] == "qwen2_moe":
        old.pop("layer_types", None)
    if config["model_type"] == "glm4_moe_lite":
        old["first_k_dense_replace"] = old.pop("mlp_layer_types").index("sparse")
    if config["model_type"] == "deepseek_v3":
        old |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
        if config["rope_interleave"]:
            old.pop("rope_interleave")
    return old


def shapes_of(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a saved checkpoint."""
    (file,) = folder.glob("model*.safetensors")
    with safe_open(file, "np") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def logits_of(
    config: dict[str, Any], shapes: dict[str, list[int]], ids: list[int], bfloat16: bool = False
) -> np.ndarray:
    """transformers' float32 logits [POSITIONS, vocab] for the weights of `shapes`, rounded first if `bfloat16`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        values = {name: torch.from_numpy(value) for name, value in checkpoint(shapes).items()}
        if bfloat16:
            values = {name: value.to(torch.bfloat16) for name, value in values.items()}
        save_file(values, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        auto = (
            transformers.AutoModelForImageTextToText
            if config["model_type"] in VISION
            else transformers.AutoModelForCausalLM
        )
        model, report = auto.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        problems = {k: v for k, v in report.items() if k != "error_msgs" and v}
        assert not problems, problems
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    return logits[0, -POSITIONS:].numpy()


def make(name: str, case: Case) -> None:
    """Writes NAME.json (configs, ids, layouts) and NAME.npz (logits per layout) beside this file."""
    model = build(case)
    layouts: dict[str, dict[str, list[int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "per-expert")
        model.save_pretrained(Path(folder) / "fused", save_original_format=False)
        config = json.loads((Path(folder) / "per-expert" / "config.json").read_text())
        for layout in ("per-expert", "fused"):
            layouts[layout] = shapes_of(Path(folder) / layout)
    if layouts["fused"] == layouts["per-expert"]:
        del layouts["per-expert"]  # the published checkpoints are fused too: gpt_oss, gemma4
    configs = {"transformers-5": config, case.older: older_style(config)}
    ids = [int(i) for i in np.random.RandomState(7).randint(3, 128, case.tokens)]
    logits = {layout: logits_of(config, shapes, ids) for layout, shapes in layouts.items()}
    if "linear_num_key_heads" not in case.settings:  # mlx-lm adds 1 to those models' norm weights before it widens them
        logits["bfloat16"] = logits_of(config, layouts["fused"], ids, bfloat16=True)
    for style, other in configs.items():
        for layout, shapes in layouts.items():
            difference = float(np.abs(logits_of(other, shapes, ids) - logits[layout]).max())
            assert difference < 1e-6, (name, style, layout, difference)
    record = {
        "transformers": transformers.__version__,
        "dtype": "float32",
        "configs": configs,
        "ids": ids,
        "layouts": layouts,
    }
    (HERE / f"{name}.json").write_text(_compact(record))
    np.savez_compressed(HERE / f"{name}.npz", **logits)
    print(f"{name}: {list(layouts)}, logits deviate by {logits['fused'].std():.2f}", flush=True)


def _compact(record: dict[str, Any]) -> str:
    """JSON with one line per config or tensor, short enough to read and to diff."""
    parts = []
    for key, value in record.items():
        if isinstance(value, dict):
            rows = []
            for inner_key, inner in value.items():
                lines = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in inner.items())
                rows.append(f"  {json.dumps(inner_key)}: {{\n{lines}\n  }}")
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for chosen in sys.argv[1:] or CASES:
        make(chosen, CASES[chosen])
