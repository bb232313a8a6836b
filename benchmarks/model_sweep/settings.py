"""Small settings for any config class, by the names that its fields have; and those that names do not tell."""

from __future__ import annotations

import inspect
import re
from typing import Any, Literal

VOCABULARY = 160
SPECIAL = 100
"""The first id that stands for something else than a word."""

# Name -> value, the first that matches.
_RULES: list[tuple[str, int]] = [
    (r"(.*_)?vocab_size|unpadded_vocab_size|vocab_size_per_layer_input|codebook_vocab_size", VOCABULARY),
    (
        r"num_hidden_layers|num_layers|n_layers?|(en|de)coder_layers|num_(en|de)coder_layers|depth|layers|num_blocks|"
        r"(en|de)coder_num_(hidden_)?layers|t2u_.*_layers|speech_encoder_layers|conf_num_hidden_layers|"
        r"num_attention_layers|memory_attention_num_layers|folding_trunk_num_hidden_layers",
        2,
    ),
    (r"num_attention_heads|n_heads?|num_heads|.*_attention_heads|attention_heads|.*_num_attention_heads", 4),
    (r"index_n_heads|linear_num_(key_|value_)?heads", 4),
    (r"num_key_value_heads|num_kv_heads|.*_num_key_value_heads|num_global_key_value_heads", 2),
    (r"qk_rope_head_dim|qk_nope_head_dim", 4),
    (r"head_dim|global_head_dim|.*_head_dim|d_kv|dim_head|kv_channels|head_size|d_head|resampler_dim_head", 8),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"hidden_size_per_layer_input", 8),
    (
        r"moe_intermediate_size|shared_expert_intermediate_size|(moe_|expert_)?ffn_hidden_size|shared_intermediate_size|"
        r"moe_shared_expert_intermediate_size|shared_experts_intermediate_size|expert_(intermediate|ffn_hidden)_size",
        16,
    ),
    (
        r"(.*_)?ffn_dim|d_ff|dff|.*intermediate_size|mlp_dim|n_inner|feed_forward_hidden_size|dim_feedforward|"
        r".*_feedforward_dim|dim_ff|d_inner|intermediate_size_mlp|encoder_feed_forward_dim|.*_linear_units|"
        r"mlp_hidden_size|expansion_dim|.*ffn_size",
        64,
    ),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_total", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|moe_num_active_primary_experts", 2),
    (r"n_group|topk_groups?|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|moe_layer_end_index", 1),
    (
        r"(.*)?hidden_size|d_model|n_embd|emb_dim|dim|embedding_size|embed_dim|embedding_dim|word_embed_proj_dim|"
        r"projection_dim|text_embed_dim|model_dim|output_dim|.*_embed_dim|pooler_output_size|d_embed|(.*_)?hidden_dim|"
        r"projection_size|output_proj_dims|lru_width|shared_projection_dim|embedding_length",
        32,
    ),
    (r"mamba_n_heads|mamba_num_heads|mamba_d_head|mamba_head_dim|mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_d_ssm", 64),
    (r"mamba_n_groups|n_groups", 1),
    (r"mamba_dt_rank|time_step_rank|index_topk", 4),
    (r"mamba_chunk_size|chunk_size", 8),
    (
        r"(.*_)?max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|context_length|"
        r"model_max_length|max_source_positions|max_target_positions",
        64,
    ),
    (r"sliding_window(_size)?|local_attention|attention_window_size|attention_chunk_size", 4),
    (r"image_size|input_size|pretrain_image_size|resolution|crop_size|encoder_stride", 16),
    (r"(spatial_)?patch_size|num_frames", 4),
    (r"num_queries|num_query_tokens|query_num|latent_query_num|resampler_n(um)?_latents|num_latents", 4),
    (r"num_image_tokens|mm_tokens_per_image", 4),
    (r"num_channels|in_channels|in_chans", 3),
    (r"num_nextn_predict_layers|num_mtp_layers", 0),
    (r"attn_layer_period|expert_layer_period|no_rope_layer_interval|cross_attention_frequency|max_window_layers", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"query_pre_attn_scalar|num_conv_pos_embeddings", 8),
    (r"out_hidden_size|text_hidden_size|audio_output_dim|upsample_groups", 32),
    (r"num_mel_bins|n_mel_bins|num_position_embeddings|image_seq_length|vector_quantization_hidden_dimension", 16),
    (r"codebook_size", 64),
    (r"num_conv_pos_embedding_groups", 4),
]
RULES = [(re.compile(f"^({pattern})$"), value) for pattern, value in _RULES]
_DEPTH = RULES[1][0]
_NEEDED = [RULES[0], RULES[1], *[rule for rule in RULES if re.search("experts|topk|n_group", rule[0].pattern)]]
"""Without which a model is large, whatever its width."""
Width = Literal["small", "wide", "own"]
_IDS: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "cls_token_id": 1,
    "sep_token_id": 2, "forced_eos_token_id": None, "forced_bos_token_id": None, "mask_token_id": 3, "unk_token_id": 4,
}  # fmt: skip
_KINDS = re.compile("layer_types|layers_block_type|block_types|hybrid_override_pattern")
_LEFT = ("id2label", "label2id", "transformers_version", "architectures", "dtype", "chunk_size_feed_forward")

_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
    "indexer_compress_ratio": 2, "hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 50,
    "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 2,
}  # fmt: skip
_DIFFUSION = {"num_global_key_value_heads": 2, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
# Two layers of four have states of images injected above them.
_DEEPSTACK = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"deepstack_visual_indexes": [0, 1]}}
_SHARING = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_RESNET |= {"layer_type": "basic", "out_features": ["stage4"]}
_BACKBONE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": _RESNET, "backbone": None}
_SERIES = {"prediction_length": 4, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1}
_MOLMO2 = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
}
_MUSE_SOUND = {"num_hidden_layers": 4, "hidden_sizes": [16, 16, 32, 32], "out_hidden_size": 32}
_QWEN3 = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
_QWEN3 |= {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
_VOCABULARY = {"<image>": 100, **{f"IMGIMG{'ABCDEFGHIJ'[i // 10]}{'ABCDEFGHIJ'[i % 10]}Z": 60 + i for i in range(16)}}
OVERRIDES: dict[str, dict[str, Any]] = {
    "mistral4": {"head_dim": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_head_dim": 8},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "diffusion_gemma": {"text_config": _DIFFUSION},
    "diffusion_gemma_text": _DIFFUSION,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "longcat_flash": {"qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "qk_head_dim": 8, "head_dim": 4, "v_head_dim": 8},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    "mamba2": {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 1},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "kv_channels": 16},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "qwen3_vl": _DEEPSTACK,
    "qwen3_vl_moe": _DEEPSTACK,
    "cosmos3_omni": _DEEPSTACK,
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SHARING},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SHARING},
    "gemma4": {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SHARING}},
    "esm": {"vocab_size": VOCABULARY},
    "esmc": {"num_key_value_heads": 4, "vocab_size": VOCABULARY},
    "mimi": {"codebook_dim": 16},
    "step3p7": {"text_config": {"sliding_window": 4}},
    "dia": {"delay_pattern": [0, 1, 2], "decoder_config": {"num_channels": 3}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [1, 1, 1, 1]},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "glm5_next_text": {"qk_rope_head_dim": 0},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0}},
    "dots3_note": {"text_config": {"per_layer_config": {}}},
    "molmo2": {
        "vision_config": {"image_size": [16, 16], "patch_size": 4, "num_position_embeddings": 16, **_MOLMO2},
        "adapter_config": {"text_hidden_size": 32, "vision_feature_layer": [0, 1], **_MOLMO2},
    },
    "muse_spark_audio": _MUSE_SOUND,
    "muse_spark": {
        "audio_config": _MUSE_SOUND,
    },
    "blt": {
        "encoder_hash_byte_group_vocab": 100,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "moonshine_streaming": {"num_key_value_heads": 4},
    "chameleon": {"vocabulary_map": _VOCABULARY},
    "florence2": {
        "vision_config": {"embed_dim": [8, 16, 24, 32], "num_heads": [2] * 4, "num_groups": [2] * 4, "depths": [1] * 4}
    },
    "janus": {"vq_config": {"base_channels": 32}},
    "emu3": {"vocabulary_map": _VOCABULARY, "vq_config": {"base_channels": 32}},
    "blip-2": {"image_token_index": SPECIAL},
    "instructblip": {"image_token_index": SPECIAL},
    "instructblipvideo": {"video_token_index": SPECIAL},
    "fun_asr_nano": {"text_config": {"model_type": "qwen3", **_QWEN3}},
    "gemma3n": {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SHARING}},
    "align": {"vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 64}},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 64},
    **dict.fromkeys(("autoformer", "informer", "time_series_transformer"), _SERIES),
    **dict.fromkeys(("detr", "conditional_detr", "dab-detr", "deformable_detr", "table-transformer"), _BACKBONE),
    "reformer": {"axial_pos_embds": False, "hidden_size": 32, "attn_layers": ["local", "lsh"]},
}
"""What names alone do not tell."""


def small(
    config_class: Any, width: Width = "small", layers: int | None = None, ids: dict[str, int] | None = None
) -> Any:
    """Settings with which the class makes a small config, and those of the configs inside it.

    Args:
        config_class: of transformers.
        width: ``"wide"`` is twice the small one, for those whose parts do not fit into less; ``"own"`` the default's.
        layers: how many; two, or four where more than two kinds of layers take turns.
        ids: given to special tokens so far.
    """
    ids = {} if ids is None else ids
    try:
        default = config_class()
    except Exception:  # some have no default
        return {}
    layers = layers or depth_of(default)
    inner = getattr(config_class, "sub_configs", {}) or {}
    aliases = {value: key for key, value in getattr(config_class, "attribute_map", {}).items()}
    settings: dict[str, Any] = {}
    values = {key: value for key, value in vars(default).items() if not key.startswith("_")}
    for key, value in values.items():
        if key not in inner and key not in _LEFT:
            found = _value(key, value, aliases, width, layers, ids)
            if found is not ...:
                settings[key] = found
    if "qk_rope_head_dim" in values and "head_dim" in settings:
        settings["head_dim"] = settings["qk_rope_head_dim"]
    if "kv_lora_rank" in values and "num_key_value_heads" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for key, sub in inner.items():
        given = getattr(default, key, None)
        cls: Any = type(given) if hasattr(given, "to_dict") else sub if inspect.isclass(sub) else None
        if cls is None or cls.__name__ == "AutoConfig":
            continue
        settings[key] = small(cls, width, layers, ids)
        if getattr(sub, "__name__", "") == "AutoConfig":
            settings[key] = {"model_type": cls.model_type, **settings[key]}
    return settings


def depth_of(config: Any) -> int:
    """Two layers, or four where more than two kinds take turns."""
    values = vars(config).items()
    kinds = [len(set(v)) for k, v in values if _KINDS.search(k) and isinstance(v, list | str)]
    inside = [getattr(config, key, None) for key in getattr(type(config), "sub_configs", {}) or {}]
    deeper = [depth_of(each) for each in inside if hasattr(each, "to_dict")]
    return max([4 if max(kinds, default=0) > 2 else 2, *deeper])


def _value(key: str, value: Any, aliases: dict[str, str], width: Width, layers: int, ids: dict[str, int]) -> Any:
    """A small value, or ``...`` to leave it."""
    if key in _IDS:
        if value is None and key != "pad_token_id":
            return ...
        return [_IDS[key]] if isinstance(value, list) else _IDS[key]
    if isinstance(value, bool):
        return False if key == "use_cache" else ...
    if isinstance(value, int) and re.search("_(token_)?(id|index)s?$", key) and value > 50:
        return ids.setdefault(key, SPECIAL + len(ids))
    if isinstance(value, float):
        return 0.0 if "dropout" in key or key.endswith(("_pdrop", "layerdrop")) or "drop_path" in key else ...
    if isinstance(value, list | tuple) and value:
        return _sequence(key, value, layers)
    if isinstance(value, int) or (value is None and key in ("head_dim", "num_key_value_heads")):
        return _number(key, value, aliases, width, layers)
    return ...


def _number(key: str, value: int | None, aliases: dict[str, str], width: Width, layers: int) -> Any:
    for pattern, least in RULES if width != "own" else _NEEDED:
        if any(pattern.match(name) for name in (key, aliases.get(key, key))):
            least = layers if pattern is _DEPTH else least
            if value is not None and 0 < value < least:
                return ...  # never larger than the default
            if width == "wide" and (least == 32 or (least == 8 and "head_dim" in key)):
                return 2 * least
            return least
    return ...


def _sequence(key: str, value: Any, layers: int) -> Any:
    kind = type(value)
    if all(isinstance(each, str) for each in value):
        if not _KINDS.search(key):
            return ...
        kinds = list(dict.fromkeys(value))
        return [kinds[i % len(kinds)] for i in range(layers)]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return ...
    if key.endswith("depths") or key in ("layers_depth", "stage_num_blocks", "num_block_repeats"):
        return kind(min(each, 2) for each in value)
    if key in ("num_heads", "num_attention_heads", "decoder_num_heads"):
        return kind(min(each, 4) if each != 3 else 4 for each in value)
    if key in ("image_size", "input_size"):
        return kind(min(each, 16) for each in value)
    if key == "patch_size" and len(value) == 2:
        return kind(min(each, 4) for each in value)
    if key == "deepstack_visual_indexes":
        return kind([0])
    if key in ("fullatt_block_indexes", "global_attn_indexes"):
        return kind([1])
    if key == "block_sizes":
        return kind(2 for _ in value)
    return ...
