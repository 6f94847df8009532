"""The oracle: Hugging Face PEFT on the same base and the same adapter files, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 320
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL, head_dim=16),
    "qwen2": Qwen2Config(**SMALL),  # q, k and v have biases
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
    "gemma2": Gemma2Config(
        **SMALL,
        head_dim=16,
        sliding_window=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,  # so low that it changes tokens
        final_logit_softcapping=5.0,
    ),
    "gemma3": Gemma3TextConfig(
        **SMALL,
        head_dim=16,
        sliding_window=16,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mistral": MistralConfig(**SMALL, head_dim=16, sliding_window=24),
    "phi3": Phi3Config(**SMALL),
}

Mix = tuple[tuple[str, float], ...]
"""(adapter name, weight) of a request; empty: the base."""


@dataclass(frozen=True)
class Recipe:
    """One adapter to make: LoraConfig's arguments, and the dtype of its file."""

    rank: int
    targets: dict[str, Any] = field(default_factory=lambda: {"target_modules": "all-linear"})
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


def recipes(architecture: str) -> dict[str, Recipe]:
    """Adapters of ranks 1 to 64 with different targets, scalings, patterns and file dtypes."""
    query, up = ("qkv_proj", "gate_up_proj") if architecture == "phi3" else ("q_proj", "up_proj")
    return {
        "rank1": Recipe(1, {"target_modules": [query]}),
        "rank4": Recipe(4, {"target_modules": [query, "o_proj"]}, dtype=torch.bfloat16),
        "rank8-rs": Recipe(8, options={"use_rslora": True}),
        "rank16": Recipe(16, dtype=torch.float16),
        "rank33-regex": Recipe(33, {"target_modules": rf".*\.(1|2)\.(self_attn|mlp)\.({query}|{up}|down_proj)"}),
        "rank64-patterns": Recipe(
            64,
            {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
            {"rank_pattern": {query: 5, r"layers\.0\.mlp.*": 12}, "alpha_pattern": {"o_proj": 3}, "lora_alpha": 24},
        ),
        "one-layer": Recipe(8, {"target_modules": [query, up], "layers_to_transform": [1]}),
    }


HIGH_RANKS = {
    "rank128": Recipe(128, {"target_modules": ["q_proj", "up_proj"]}, {"lora_alpha": 128}),
    "rank256-rs": Recipe(256, {"target_modules": ["v_proj", "down_proj"]}, {"use_rslora": True}, torch.bfloat16),
    "rank512": Recipe(512, options={"lora_alpha": 512}),
    "rank512-patterns": Recipe(512, options={"lora_alpha": 300, "rank_pattern": {"q_proj": 129, "mlp.*": 200}}),
}
"""Up to the highest rank that is served, for the architectures with projections of their own."""


def make_base(architecture: str, folder: Path) -> Path:
    """A tiny random model, saved. Norm weights and biases are random too, so that none of them is ignored unseen."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture])
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            about_zero = architecture.startswith("gemma") or name.endswith("bias")
            torch.nn.init.normal_(parameter, mean=0.0 if about_zero else 1.0, std=0.1)
        elif "proj" in name:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, recipe: Recipe, seed: int, strength: float = 1.0) -> Path:
    """An adapter with random A and B, saved by PEFT. `strength` scales B: large enough to change the tokens."""
    torch.manual_seed(seed)
    options = {"lora_alpha": 16, **recipe.options}
    config = LoraConfig(r=recipe.rank, init_lora_weights=False, task_type="CAUSAL_LM", **recipe.targets, **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3 * strength / recipe.rank**0.5)
            elif "lora_A" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            if "lora_" in name:
                parameter.data = parameter.data.to(recipe.dtype)
    model.save_pretrained(folder)
    return folder


class Oracle:
    """PEFT's own answer: `logprobs(tokens, mix)` of every position of one sequence, [T, vocabulary] float32."""

    def __init__(
        self,
        base: Path,
        adapters: dict[str, Path],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        self.device = device
        self.names = list(adapters)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, attn_implementation="eager").to(device)
        for name, folder in adapters.items():
            # PEFT forbids dots in the names of its adapters only; ours have none.
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name, autocast_adapter_dtype=False)
        self.model = model.to(dtype).eval()

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], mix: Mix) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.device)
        if not mix:
            with self.model.disable_adapter():
                return self.model(ids).logits[0].float().cpu()
        if len(mix) == 1 and mix[0][1] == 1.0:
            self.model.set_adapter(mix[0][0])
            return self.model(ids).logits[0].float().cpu()
        self.model.set_adapter(self._combined(mix))
        return self.model(ids).logits[0].float().cpu()

    def _combined(self, mix: Mix) -> str:
        """PEFT's `cat`: the exact weighted sum of deltas. It needs equal target modules, so mixes in tests have."""
        name = "mix-" + "-".join(f"{adapter}x{weight}" for adapter, weight in mix).replace(".", "_")
        if name not in self.model.peft_config:
            adapters, weights = zip(*mix, strict=True)
            self.model.add_weighted_adapter(list(adapters), list(weights), name, combination_type="cat")
        return name
