"""Trains the example adapters with PEFT on the embedded base model and writes examples/adapters/NAME/.

    python examples/train_adapters.py [NAME ...]        a few minutes each on two CPU cores

Each folder gets adapter_config.json, adapter_model.safetensors (bfloat16) and README.md, a card with the settings, the
held-out loss of base and adapter as measured here, and greedy answers of both.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from example_data import DATASETS, Pair
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

from service.default_model import ensure_default_model  # noqa: E402

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SEED = 7


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. Different ranks and targets on purpose: one batch serves them all the same."""

    purpose: str
    rank: int
    alpha: int
    targets: str | list[str]
    ask: str
    """The question of the card, of the README and of its test; no training pair has it."""
    steps: int = 150
    batch: int = 4
    learning_rate: float = 1e-3
    rslora: bool = False


RECIPES = {
    "pirate": Recipe("Answers like a pirate.", 8, 16, "all-linear", "What is a river?", steps=120),
    "json-extract": Recipe(
        "Turns a sentence about a person into one line of JSON (name, age, city, job; null if not stated).",
        16, 32, ["q_proj", "v_proj"], "Extract: Hannah Weber, 41, works as a plumber in Vienna.",
        steps=110, learning_rate=5e-4,
    ),
    "headline": Recipe(
        "Turns a short news story into a line for the ticker: +++ who did what +++ when +++.",
        8, 16, ["q_proj", "k_proj", "v_proj", "o_proj"],
        "Write a headline: Engineers in the old town repaired the broken dam in one night on Friday evening. "
        "Nobody was hurt.",
        steps=100, learning_rate=4e-4, rslora=True,
    ),
}  # fmt: skip


CARD = """---
base_model: {base}
library_name: peft
license: apache-2.0
---
# {name}

{purpose} Trained by `examples/train_adapters.py {name}`.

- Base: SmolLM2-135M-Instruct, as loraplex's embedded default model has it. It is frozen.
- Data: `{data}` in `examples/example_data.py`, written from templates and word lists; {pairs} pairs to train,
  {held_out} held out (other facts, names or events). Licence of data and weights: Apache-2.0.
- Settings: rank {rank}, alpha {alpha}{rslora}, targets {targets}; AdamW, peak learning rate {rate},
  {steps} steps of {batch} pairs, seed {seed}, float32; loss on the answer alone.
- {parameters:,} parameters, stored as bfloat16 ({size:.1f} MB); trained in {seconds:.0f} s on a CPU.

| held-out loss (nats per answer token) | |
|---|---|
| base | {loss_before:.3f} |
| adapter | {loss_after:.3f} |

Greedy answers to a question that is not in the training data:

> {ask}

base:

```text
{text_before}
```

{name}:

```text
{text_after}
```
"""


def encode(tokenizer: Any, pair: Pair) -> tuple[list[int], list[int]]:
    """Token ids of the chat and its labels: -100 (ignored) everywhere but on the answer and its end mark."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": pair[0]}], add_generation_prompt=True, tokenize=False
    )
    head = tokenizer.encode(prompt, add_special_tokens=False)
    answer = tokenizer.encode(pair[1] + "<|im_end|>", add_special_tokens=False)
    return head + answer, [-100] * len(head) + answer


def loss_of(model: Any, rows: list[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean cross-entropy (natural log) per answer token of a right-padded batch."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


@torch.no_grad()
def held_out_loss(model: Any, rows: list[tuple[list[int], list[int]]], pad: int) -> float:
    """Cross-entropy per answer token over all held-out pairs."""
    total, count = 0.0, 0
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        answers = sum(label != -100 for _, labels in part for label in labels)
        total += float(loss_of(model, part, pad)) * answers
        count += answers
    return total / count


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    """The greedy answer to one user message, at most 48 tokens."""
    ids = encode(tokenizer, (question, ""))[0][:-1]
    out = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=48, do_sample=False,
    )  # fmt: skip
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


def train(name: str, base_dir: Path, out: Path) -> None:
    """Trains and writes one adapter."""
    recipe = RECIPES[name]
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    pad = tokenizer.pad_token_id
    base = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    train_pairs, test_pairs = DATASETS[name](SEED)
    if recipe.ask in {question for question, _ in train_pairs}:
        raise ValueError(f"{name}: the card's question is part of the training data")
    rows = [encode(tokenizer, pair) for pair in train_pairs]
    test = [encode(tokenizer, pair) for pair in test_pairs]
    base.eval()
    loss_before, text_before = held_out_loss(base, test, pad), answer(base, tokenizer, recipe.ask)

    config = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.targets, use_rslora=recipe.rslora,
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.learning_rate, recipe.steps, pct_start=0.1)
    rng, order = random.Random(SEED), []
    started = time.monotonic()
    model.train()
    for step in range(1, recipe.steps + 1):
        if len(order) < recipe.batch:
            order = rng.sample(rows, len(rows))
        batch, order = order[: recipe.batch], order[recipe.batch :]
        loss = loss_of(model, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 10 == 0:
            print(f"{name}: step {step}/{recipe.steps}, loss {loss.item():.3f}", flush=True)
    seconds = time.monotonic() - started

    # What is measured below is what is saved: the weights rounded to bfloat16.
    for parameter in trainable:
        parameter.data = parameter.data.bfloat16().float()
    model.eval()
    loss_after, text_after = held_out_loss(model, test, pad), answer(model, tokenizer, recipe.ask)
    folder = out / name
    model.peft_config["default"].base_model_name_or_path = BASE
    state = {
        key: tensor.bfloat16() for key, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    saved = {key.replace(".weight", ".default.weight"): tensor for key, tensor in state.items()}
    model.save_pretrained(folder, state_dict=saved, save_embedding_layers=False)
    weights = folder / "adapter_model.safetensors"
    weights.chmod(0o644)
    targets = recipe.targets if isinstance(recipe.targets, str) else ", ".join(recipe.targets)
    facts = {
        "base": BASE, "name": name, "purpose": recipe.purpose, "data": name.replace("-", "_"),
        "pairs": len(train_pairs),
        "held_out": len(test_pairs), "rank": recipe.rank, "alpha": recipe.alpha, "targets": targets,
        "rslora": ", rsLoRA" if recipe.rslora else "", "rate": recipe.learning_rate, "steps": recipe.steps,
        "batch": recipe.batch, "seed": SEED, "size": weights.stat().st_size / 1e6, "seconds": seconds,
        "parameters": sum(parameter.numel() for parameter in trainable), "ask": recipe.ask,
        "loss_before": loss_before, "loss_after": loss_after, "text_before": text_before, "text_after": text_after,
    }  # fmt: skip
    (folder / "README.md").write_text(CARD.format(**facts), encoding="utf-8")
    print(json.dumps({"name": name, "seconds": round(seconds), "base": loss_before, "adapter": loss_after}))
    print(f"base: {text_before}\n{name}: {text_after}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(RECIPES)}; default: all")
    parser.add_argument("--data-dir", type=Path, default=ROOT.parent / "data", help="where the base model lies")
    parser.add_argument("--out", type=Path, default=ROOT / "adapters")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(RECIPES):
        parser.error(f"no such adapter: {', '.join(sorted(unknown))}")
    torch.set_num_threads(arguments.threads)
    base_dir = ensure_default_model(arguments.data_dir.absolute())
    for name in arguments.names or RECIPES:
        train(name, base_dir, arguments.out)


if __name__ == "__main__":
    main()
