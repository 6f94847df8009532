"""A base model of a real model's shapes with random weights, and adapters for it, as real files.

    python -m benchmarks.random_base FOLDER [--layers 32] [--adapters 64 --rank 16 --targets all|attn]

Speed does not depend on the values of weights (random ones avoid the power savings of zeros), so loading, serving and
swapping can be measured where no checkpoint can be had. Every adapter's bytes are its own: a store that goes by content
would otherwise keep one hot block.
"""

from __future__ import annotations

import argparse
import json
import string
from itertools import islice, product
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 4096,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
}
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level tokenizer of exactly `size` ids: bytes, then made-up words, then the two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made_up = ("Ġ" + "".join(letters) for n in (2, 3, 4) for letters in product(string.ascii_lowercase, repeat=n))
    vocabulary = {word: i for i, word in enumerate([*alphabet, *islice(made_up, size - len(alphabet) - 2)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True), AddedToken("<|end|>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")
    fast.chat_template = CHAT
    fast.save_pretrained(folder)


def write_base(folder: Path, shape: str, layers: int, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """config, tokenizer and one safetensors shard per layer, N(0, 0.02) drawn on `device`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = SHAPES[shape]
    vocabulary = int(options["vocab_size"])
    config = LlamaConfig(
        **options,
        num_hidden_layers=layers,
        tie_word_embeddings=False,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )
    config.save_pretrained(folder)
    write_tokenizer(folder, vocabulary)
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(std=0.02, generator=generator).cpu()

    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    one = torch.ones(hidden, dtype=dtype)
    shards = [
        {
            "model.embed_tokens.weight": draw(vocabulary, hidden),
            "model.norm.weight": one.clone(),
            "lm_head.weight": draw(vocabulary, hidden),
        }
    ]
    index: dict[str, str] = {}
    total = 0
    for number in range(layers + 1):
        if number:
            p = f"model.layers.{number - 1}."
            shard = {
                p + "self_attn.q_proj.weight": draw(hidden, hidden),
                p + "self_attn.k_proj.weight": draw(kv, hidden),
                p + "self_attn.v_proj.weight": draw(kv, hidden),
                p + "self_attn.o_proj.weight": draw(hidden, hidden),
                p + "mlp.gate_proj.weight": draw(inner, hidden),
                p + "mlp.up_proj.weight": draw(inner, hidden),
                p + "mlp.down_proj.weight": draw(hidden, inner),
                p + "input_layernorm.weight": one.clone(),
                p + "post_attention_layernorm.weight": one.clone(),
            }
        else:
            shard = shards[0]
        name = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, name)
        total += sum(t.numel() * t.element_size() for t in shard.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


class AdapterMaker:
    """PEFT folders for a base: targets "all" (seven projections) or "attn" (q, k, v, o), bf16, distinct bytes."""

    def __init__(self, base: Path, targets: str) -> None:
        config = LlamaConfig.from_pretrained(base)
        hidden, inner, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
        self.base, self.targets, self.layers = base, targets, config.num_hidden_layers
        self.shapes = {
            "q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)
        }  # fmt: skip
        if targets == "all":
            self.shapes |= {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        generator = torch.Generator().manual_seed(1)
        self.pool = torch.empty(64 << 20, dtype=torch.bfloat16).normal_(std=0.01, generator=generator)

    def write(self, folder: Path, number: int, rank: int) -> Path:
        """folder/TARGETS-NUMBER"""
        out = folder / f"{self.targets}-{number}"
        out.mkdir(parents=True, exist_ok=True)
        tensors, begin = {}, number * 4099
        for layer in range(self.layers):
            for name, (k, d) in self.shapes.items():
                block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                prefix = f"base_model.model.model.layers.{layer}.{block}.{name}"
                for part, size in (("lora_A", (rank, k)), ("lora_B", (d, rank))):
                    n = size[0] * size[1]
                    begin = begin % (len(self.pool) - n)
                    tensors[f"{prefix}.{part}.weight"] = self.pool[begin : begin + n].view(size).clone()
                    begin += n
        save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
        peft = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": 2 * rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self.shapes),
            "base_model_name_or_path": str(self.base.name),
            "inference_mode": True,
        }
        (out / "adapter_config.json").write_text(json.dumps(peft))
        return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--rank", type=int, nargs="+", default=[16], help="several: in turn")
    parser.add_argument("--targets", choices=["all", "attn"], default="all")
    parser.add_argument("--to", default="adapters", help="folder of the adapters, in FOLDER")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not (args.folder / "model.safetensors.index.json").exists():
        write_base(args.folder, args.shape, args.layers, args.device)
    maker = AdapterMaker(args.folder, args.targets)
    for number in range(args.adapters):
        maker.write(args.folder / args.to, number, args.rank[number % len(args.rank)])


if __name__ == "__main__":
    main()
