"""Every method of PEFT that lives inside of layers, each as a tiny model that it has wrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from .models import tiny_batch, tiny_llama

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SQUARE = ["q_proj", "o_proj"]
"""Of the tiny model, the linear layers with as many inputs as outputs: some methods take no others, or not together."""

TOKENS = tiny_batch(tiny_llama(1, 32))["input_ids"][0, :2].tolist()


def _lora(**settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": LINEARS, **settings})


CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: _lora(lora_dropout=0.1),
    "rsLoRA": lambda: _lora(use_rslora=True),
    "LoRA-FA": lambda: _lora(),
    "DoRA": lambda: _lora(use_dora=True),
    "PiSSA": lambda: _lora(init_lora_weights="pissa"),
    "OLoRA": lambda: _lora(init_lora_weights="olora"),
    "LoRA with biases": lambda: _lora(lora_bias=True),
    "LoRA and modules_to_save": lambda: _lora(modules_to_save=["input_layernorm", "norm", "lm_head"]),
    "LoRA and tokens": lambda: _lora(trainable_token_indices=TOKENS),
    "LoRA on embeddings": lambda: _lora(target_modules=[*LINEARS, "embed_tokens"]),
    "MiCA": lambda: _lora(init_lora_weights="mica"),
    "QA-LoRA": lambda: _lora(use_qalora=True, qalora_group_size=4),
    "BD-LoRA": lambda: _lora(use_bdlora=BdLoraConfig(nblocks=2, match_strict=False)),
    "KaSA": lambda: _lora(kasa_config=KasaConfig()),
    "VeLoRA": lambda: _lora(velora_config=VeloraConfig()),
    "MonteCLoRA": lambda: _lora(monteclora_config=MontecloraConfig()),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=LINEARS),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=SQUARE),
    "OFT": lambda: peft.OFTConfig(oft_block_size=4, target_modules=LINEARS),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=LINEARS),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=LINEARS),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=LINEARS),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=16, target_modules=LINEARS),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=LINEARS),
    "HiRA": lambda: peft.HiraConfig(r=4, target_modules=LINEARS),
    "MiSS": lambda: peft.MissConfig(r=4, target_modules=LINEARS),
    "RandLoRA": lambda: peft.RandLoraConfig(r=4, target_modules=LINEARS),
    "RoAd": lambda: peft.RoadConfig(group_size=8, target_modules=LINEARS),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=LINEARS, random_seed=1),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=LINEARS),
    "WaveFT": lambda: peft.WaveFTConfig(n_frequency=16, target_modules=LINEARS),
    "OSF": lambda: peft.OSFConfig(effective_rank=4, target_modules=LINEARS),
    "DeLoRA": lambda: peft.DeloraConfig(r=4, target_modules=LINEARS),
    "GraLoRA": lambda: peft.GraloraConfig(r=4, gralora_k=2, target_modules=LINEARS),
    "GLoRA": lambda: peft.GloraConfig(r=4, target_modules=LINEARS),
    "AdaMSS": lambda: peft.AdamssConfig(r=8, num_subspaces=2, subspace_rank=1, target_modules=LINEARS),
    "DEFT": lambda: peft.DeftConfig(r=4, target_modules=LINEARS),
    "Lily": lambda: peft.LilyConfig(r=4, stride_A=1, num_B=2, target_modules=LINEARS),
    "FRoD": lambda: peft.FrodConfig(target_modules=SQUARE, progressbar=False),
    "PVeRA": lambda: peft.PveraConfig(r=4, target_modules=SQUARE),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=LINEARS),
    "Uni-LoRA": lambda: peft.UniLoraConfig(r=2, theta_d_length=16, target_modules=LINEARS),
    "TinyLoRA": lambda: peft.TinyLoraConfig(r=2, u=4, target_modules=LINEARS),
    "PSOFT": lambda: peft.PsoftConfig(r=4, target_modules=LINEARS),
    "PEANuT": lambda: peft.PeanutConfig(r=4, target_modules=LINEARS),
    "supertuning": lambda: peft.SupertuningConfig(target_modules=LINEARS),
    "BEFT": lambda: peft.BeftConfig(target_modules=["v_proj"]),
    "LLaMA-adapter": lambda: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM"),
    "Poly": lambda: peft.PolyConfig(
        r=4, n_tasks=2, n_skills=2, n_splits=1, target_modules=LINEARS, task_type="CAUSAL_LM"
    ),
    "Shadow": lambda: peft.ShadowConfig(r=4),
}


def base() -> Any:
    return tiny_llama(2, 32)


def wrapped(method: str, model: Any = None) -> Any:
    """The model wrapped, with parameters that already do something: at their start half of the gradients are zero."""
    torch.manual_seed(3)
    made = peft.get_peft_model(base() if model is None else model, CONFIGS[method]())
    if method == "LoRA-FA":
        for name, parameter in made.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return made
