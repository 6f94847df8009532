"""The engine against PEFT's own mixed batch, in one run on one machine: the same requests, dtype and threads.

    python -m benchmarks.mixed_batch [--model FOLDER] [--repeats 3]

Eight requests of unequal output lengths (8 to 128 tokens) over four rank-16 all-linear adapters. PEFT generates them as
one batch with `adapter_names`, so it runs until the longest is done; only the tokens asked for are counted. The engine
takes the same requests at once. Both decode greedily; end of sequence is ignored.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters.blobs import BlobStore
from benchmarks import report
from benchmarks.engine import Driver, store_adapters
from service.default_model import ensure_default_model
from service.engine.config import EngineConfig
from service.engine.messages import AdapterRef, SamplingParams, Submit

LENGTHS = (8, 25, 42, 59, 76, 93, 110, 128)
PROMPT = 64
ADAPTERS = 4


def make_adapters(base: Path, folder: Path) -> list[Path]:
    made = []
    for i in range(ADAPTERS):
        torch.manual_seed(i)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.01)
        model.save_pretrained(folder / f"bench-{i}")
        made.append(folder / f"bench-{i}")
    return made


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(100, vocabulary, (PROMPT,), generator=generator).tolist() for _ in LENGTHS]


def peft_seconds(base: Path, adapters: list[Path], repeats: int) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for i, folder in enumerate(adapters[1:], start=1):
        model.load_adapter(folder, adapter_name=f"a{i}")
    model.eval()
    ids = torch.tensor(prompts(model.config.vocab_size))
    names = [f"a{i % ADAPTERS}" for i in range(len(LENGTHS))]
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(LENGTHS),
                min_new_tokens=max(LENGTHS),
                do_sample=False,
                adapter_names=names,
            )
        seconds.append(time.perf_counter() - begin)
        if out.shape[1] != PROMPT + max(LENGTHS):
            raise RuntimeError(f"PEFT generated {out.shape[1] - PROMPT} tokens")
    return seconds[1:]


def engine_seconds(base: Path, adapters: list[Path], folder: Path, threads: int, repeats: int) -> list[float]:
    config = EngineConfig(
        model_path=str(base),
        blobs_dir=str(folder / "blobs"),
        cache_dir=str(folder / "cache"),
        socket="",
        threads=threads,
        prefix_caching=False,
    )
    driver = Driver(config)
    digests = store_adapters(BlobStore(folder / "blobs"), adapters, driver.engine.manifest)
    driver.load(digests)
    asked = prompts(driver.engine.manifest.vocab_size)
    seconds = []
    for repeat in range(repeats + 1):
        driver.times, driver.finished = {}, []
        begin = time.perf_counter()
        for i, (prompt, length) in enumerate(zip(asked, LENGTHS, strict=True)):
            name = f"{repeat}/{i}"
            driver.times[name] = []
            driver.engine.handle(
                b"bench",
                Submit(
                    request_id=name,
                    prompts=[prompt],
                    adapters=(AdapterRef(digests[i % ADAPTERS]),),
                    sampling=SamplingParams(temperature=0.0, max_tokens=length),
                ),
            )
        while driver.engine.busy:
            driver.engine.step()
        seconds.append(time.perf_counter() - begin)
        if [len(times) for times in driver.times.values()] != list(LENGTHS):
            raise RuntimeError("the engine generated other numbers of tokens than asked")
    driver.engine.close()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = args.model or ensure_default_model(Path("data").absolute())
    tokens = sum(LENGTHS)
    with tempfile.TemporaryDirectory() as temporary:
        adapters = make_adapters(base, Path(temporary))
        ours = engine_seconds(base, adapters, Path(temporary), args.threads, args.repeats)
        theirs = peft_seconds(base, adapters, args.repeats)
    rates = {name: [tokens / s for s in times] for name, times in (("engine", ours), ("PEFT", theirs))}
    ratio = statistics.median(rates["engine"]) / statistics.median(rates["PEFT"])
    for name, values in rates.items():
        print(
            f"{name}: {', '.join(f'{v:.1f}' for v in values)} output tokens/s, median {statistics.median(values):.1f}"
        )
    print(f"ratio of medians: {ratio:.2f}")
    report.append(
        "Mixed batch on CPU",
        [
            f"`python -m benchmarks.mixed_batch --repeats {args.repeats}`, {base.name}, float32, {args.threads} "
            f"threads, torch {torch.__version__}, transformers {transformers.__version__}.",
            "",
            f"8 requests, 8 to 128 output tokens, 4 adapters of rank 16, all linears. Output tokens/s, median of "
            f"{args.repeats}: engine {statistics.median(rates['engine']):.1f}, PEFT (`adapter_names`) "
            f"{statistics.median(rates['PEFT']):.1f}: **{ratio:.2f}x**.",
        ],
    )


if __name__ == "__main__":
    main()
