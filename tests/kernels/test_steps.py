"""What a step is computed by: the tails, LoRA beside the products, or the kernels of one row; and what is warmed up."""

from __future__ import annotations

import copy
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from adapters import known_code
from adapters import layers as adapter_layers
from adapters.arena import Arena
from adapters.kernels import backend, one_row, ops, triton_lora, triton_tail
from adapters.kernels.backend import TritonKernels
from adapters.kernels.device_plan import RANK_BUCKETS, DevicePlan, PlanShape, pack
from adapters.kernels.tail import SLOTS
from adapters.kernels.tail_plan import TailPlan, TailShape, pack_tail
from adapters.layers import GatedMlp, LoraHook, OutputProduct, PreNormLayer, install
from adapters.manifest import Manifest, Module
from adapters.tiers import RowEntries
from service.engine import compiled
from service.engine.runner import _Hook
from service.engine.warmup import dummy_adapter
from tests.kernels.lora_cases import error, plan_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def step() -> Iterator[ops.Step]:
    yield ops.STEP
    ops.STEP.plan = ops.STEP.tail_plan = ops.STEP.tables = ops.STEP.side = ops.STEP.tails = None


class Mlp(nn.Module):
    """As transformers writes it for Llama: two projections that share their input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(64, 48, bias=False), nn.Linear(64, 48, bias=False)
        self.down_proj = nn.Linear(48, 64)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class OtherMlp(Mlp):
    """The same in other words, which are not known."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * functional.silu(self.gate_proj(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def manifest_of(model: nn.Module) -> Manifest:
    modules = tuple(
        Module(name, "linear", module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    )
    return Manifest("0" * 64, "Block", "block", "float32", 10, 10, modules)


def bind_adapter(arena: Arena, row: int, rank: int, manifest: Manifest) -> None:
    ends = np.cumsum([rank * (m.in_features + m.out_features) for m in manifest.linears])
    region = arena.allocate(int(ends[-1]) * 4)
    assert region is not None
    values = torch.randn(int(ends[-1]), generator=torch.Generator().manual_seed(row)) / 8
    arena.data[region.offset // 4 : region.offset // 4 + len(values)] = values.to(DEVICE)
    starts = np.concatenate(([0], ends[:-1]))
    offsets = np.array([(s, s + rank * m.in_features) for s, m in zip(starts, manifest.linears, strict=True)], np.int64)
    count = len(manifest.linears)
    arena.bind(row, region, RowEntries(np.full(count, rank, np.int32), offsets, np.full(count, 2.0, np.float32)))


def test_a_step_takes_the_tails_or_not_and_a_layer_is_compiled_once_for_each(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "TAIL_TOKENS", 240)
    torch.manual_seed(0)
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    for row in range(6):
        bind_adapter(arena, row, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
    traces = CompileCounter()
    forward = torch.compile(model, backend=traces, fullgraph=True)
    x = torch.randn(240, 64, device=DEVICE)

    def ask(sequences: list[tuple[int, tuple[tuple[int, float], ...]]], *, tails: bool) -> Tensor:
        kernels.tails = tails
        kernels.begin_step(plan_of(sequences), len(x))
        hook.active = True
        with torch.inference_mode():
            return forward(x)

    cases = [
        ([(140, ((1, 1.0),)), (100, ((2, 0.5),))], True),
        ([(48, ((row, 1.0),)) for row in range(5)], True),  # more adapters than there are places
        ([(1, ((0, 1.0),)), (99, ((1, 1.0),)), (140, ())], True),
        ([(1, ((row, 1.0),)) for row in range(3)] + [(200, ((4, 1.0),)), (37, ())], True),
        ([(200, ((4, 1.0),)), (30, ((0, 0.5), (1, 0.5))), (10, ((4, 1.0),))], True),
        ([(200, ((4, 1.0),)), (30, ((4, 0.5), (1, 0.5))), (10, ())], True),  # a mix of the same adapter
        ([(240, ((0, 0.5), (1, 0.5)))], False),
        ([(10, ((0, 1.0),))], False),  # tokens of the base model, nearly all
    ]
    for sequences, tailed in cases:
        y = ask(sequences, tails=True)
        assert kernels.tailed == tailed, sequences
        assert error(y, ask(sequences, tails=False).cpu().double()) < 1e-6
        assert not kernels.tailed
    assert traces.frame_count <= 2
    assert arena.generation.sum() == 0


def test_small_steps_with_adapters_start_early_and_those_of_the_base_with_one_token(step: ops.Step) -> None:
    manifest = manifest_of(Block())
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    kernels, uniform = TritonKernels(arena, overlap=False), TritonKernels(arena, overlap=False, uniform=True)
    tail = TailPlan.from_plan(None, None, 40, DEVICE)
    for tokens, base, with_adapters in ((1, True, True), (2, False, True), (32, False, True), (33, False, False)):
        plan = plan_of([(tokens, ((0, 1.0),))])
        assert plan is not None
        beside = DevicePlan.from_plan(plan, 16, DEVICE)
        for given, wanted in ((None, base), (beside, with_adapters)):
            kernels.use(given, None, tokens)
            assert kernels.starts_early == wanted, (tokens, given)
            uniform.use(given, None, tokens)
            assert not uniform.starts_early
        kernels.use(beside, tail, tokens)
        assert kernels.starts_early == (tokens == 1)


@pytest.mark.parametrize("active", [True, False])
def test_a_step_of_one_token_has_kernels_of_its_own_and_they_are_warmed_up(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch, active: bool
) -> None:
    torch.manual_seed(0)
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    bind_adapter(arena, 0, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    met: set[tuple[int, int, bool, bool]] = set()
    product = one_row.product

    def noting(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        deltas: one_row.Deltas | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        met.add((*weight.shape, bias is not None, deltas is not None))
        return product(x, weight, bias, deltas, residual)

    monkeypatch.setattr(one_row, "product", noting)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
        shape = PlanShape.bounded(1, 2, 1, 16, 16)
        host = np.zeros(shape.size, dtype=np.int32)
        pack(None, shape, host)
        empty = DevicePlan(shape, torch.from_numpy(host).to(DEVICE), 16, covers=True)
        kernels.use(empty, None, 1)
        kernels.warm_up(empty, None, 1)
        warm = set(met)
        met.clear()
        x = torch.randn(2, 64, device=DEVICE)
        plan = plan_of([(1, ((0, 1.0),)), (1, ((0, 1.0),))]) if active else None
        hook.active = active
        kernels.begin_step(plan, 2)
        assert not kernels.one_row
        wanted = model(x)
        assert not met
        kernels.begin_step(plan_of([(1, ((0, 1.0),))]) if active else None, 1)
        assert kernels.one_row
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x[:1])
        assert error(y, wanted[:1].cpu().double()) < 1e-6
        assert met == {(96, 64, False, active), (64, 48, True, active)}
        assert not active or met == warm
        kernels.begin_step(None, 1)
        assert kernels.product(x[:0], x, None).shape == (0, 2), "no logits are wanted of the step's token"
        others = TritonKernels(arena, overlap=False, uniform=True)
        others.begin_step(None, 1)
        assert not others.one_row


def test_a_step_of_the_base_launches_nothing_of_lora(step: ops.Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """With adapters there, and right after a step that used one."""
    monkeypatch.setattr(backend, "TAIL_TOKENS", 100)
    model = Block().to(DEVICE).requires_grad_(False)
    plain = copy.deepcopy(model)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    bind_adapter(arena, 0, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    launched: list[str] = []
    places: list[tuple[Any, str]] = [
        (triton_lora, "shrink"),
        (triton_lora, "expand"),
        (triton_tail, "expand"),
        (triton_tail, "gated"),
        (triton_tail.Tails, "stage"),
        (one_row, "shrink"),
    ]

    def noting(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            launched.append(name)
            return real(*args, **kwargs)

        return call

    for place, name in places:
        monkeypatch.setattr(place, name, noting(name, getattr(place, name)))
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
        forward = torch.compile(model, backend="aot_eager")
        for tokens in (1, 2, 120):
            x = torch.randn(tokens, 64, device=DEVICE)
            kernels.begin_step(plan_of([(tokens, ((0, 1.0),))]), tokens)
            hook.active = True
            forward(x)
            assert launched, "it would not be seen"
            launched.clear()
            kernels.begin_step(None, tokens)
            hook.active = False
            assert error(forward(x), plain(x).cpu().double()) < 1e-6
            assert not launched


def test_the_output_layer_on_a_gpu_is_the_hook_s_product(step: ops.Step) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 40).to(DEVICE).requires_grad_(False)
    manifest = manifest_of(Block())
    kernels = TritonKernels(Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8), overlap=False)
    layer = OutputProduct(linear, _Hook(kernels))
    assert layer.weight is linear.weight
    for rows in (0, 1, 3):
        x = torch.randn(1, rows, 64, device=DEVICE)
        for tokens in (1, 8):
            kernels.begin_step(None, tokens)
            with torch.inference_mode():
                torch.testing.assert_close(layer(x), linear(x))


def test_warming_up_over_a_fresh_arena_leaves_numbers_in_the_tails(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is staged stays behind the weights: no numbers there would be none for every token of every later step."""
    monkeypatch.setattr(backend, "TAIL_TOKENS", 100)
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    arena.data.fill_(torch.nan)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    with torch.inference_mode():
        installed = install(model, manifest, _Hook(kernels), tails=True)
        kernels.bind(installed, len(manifest.linears))
        with dummy_adapter(arena, manifest, 0, RANK_BUCKETS[0]) as row:
            assert row == 0
            kernels.begin_step(plan_of([(100, ((0, 1.0),))]), 100)
            assert kernels.tailed
    tails = [layer.tail for layer in installed if layer.tail is not None]
    assert len(tails) == 2
    assert all(bool(part.isfinite().all()) for part in (*tails[0], *tails[1]) if part is not None)


def test_an_arena_of_one_row_has_one_dummy_adapter() -> None:
    manifest = manifest_of(Block())
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=1)
    free = arena.free_bytes
    with dummy_adapter(arena, manifest, 0, 16) as first, dummy_adapter(arena, manifest, 1, 64) as second:
        assert (first, second) == (0, None)
    assert arena.free_bytes == free


@pytest.mark.parametrize("both", [False, True])
def test_what_is_warmed_up_is_what_compiled_layers_launch(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch, both: bool
) -> None:
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    bind_adapter(arena, 0, 16, manifest)
    bind_adapter(arena, 1, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    met: set[tuple[str, int, int, bool]] = set()

    def noting(name: str, launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(y: Tensor, *rest: object, **residual: Tensor | None) -> Tensor:
            met.add((name, *y.shape, rest[-1] is not None))
            return launch(y, *rest, **residual)

        return call

    for name in ("expand", "gated"):
        launch = getattr(triton_tail, name)
        monkeypatch.setattr(triton_tail, name, noting(name, launch))
    monkeypatch.setattr(backend, "TAIL_TOKENS", 64)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
        shape = TailShape(64, SLOTS)
        host = np.zeros(shape.size, dtype=np.int32)
        pack_tail(None, None, shape, host)
        empty = TailPlan(shape, torch.from_numpy(host).to(DEVICE))
        beside = None
        if both:
            tiles = PlanShape.bounded(64, 8, 1, 16, 16)
            rest = np.zeros(tiles.size, dtype=np.int32)
            pack(None, tiles, rest)
            beside = DevicePlan(tiles, torch.from_numpy(rest).to(DEVICE), 16)
        kernels.use(beside, empty, 64)
        kernels.warm_up(beside, empty, 64)
        warm = set(met)
        met.clear()
        kernels.begin_step(plan_of([(60, ((0, 1.0),)), (4, ((int(both), 1.0),))]), 64)
        assert kernels.tailed
        assert (step.plan is not None) == both
        hook.active = True
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(64, 64, device=DEVICE))
    assert met == warm == {("gated", 64, 96 + 128, both), ("expand", 64, 64 + 128, both)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_only_code_that_is_known_has_its_gate_replaced(step: ops.Step, dtype: torch.dtype) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
    from transformers.models.llama.modeling_llama import LlamaMLP
    from transformers.models.phi3.modeling_phi3 import Phi3MLP
    from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

    def mlp(kind: str, made: type[nn.Module], **other: object) -> nn.Module:
        return made(CONFIG_MAPPING[kind](hidden_size=64, intermediate_size=48, **other))

    cases = [
        (Mlp(), "silu"),
        (OtherMlp(), None),
        (mlp("llama", LlamaMLP), "silu"),
        (mlp("llama", LlamaMLP, mlp_bias=True), "silu"),
        (mlp("llama", LlamaMLP, hidden_act="relu"), None),
        (mlp("qwen3", Qwen3MLP), "silu"),
        (mlp("gemma2", Gemma2MLP), "gelu_tanh"),
        (mlp("phi3", Phi3MLP), None),
    ]
    for given, gate in cases:
        model = nn.ModuleDict({"mlp": given.to(DEVICE, dtype)}).requires_grad_(False)
        manifest = manifest_of(model)
        kernels = TritonKernels(Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8), overlap=False)
        x = torch.randn(2, 3, 64, device=DEVICE, dtype=dtype)
        with torch.inference_mode():
            wanted = given(x)
            installed = install(model, manifest, _Hook(kernels), tails=True)
            kernels.begin_step(None, 6)
            torch.testing.assert_close(model["mlp"](x), wanted)
        found = model["mlp"]
        assert (found.gate if isinstance(found, GatedMlp) else None) == gate, type(given)
        assert [layer.gate for layer in installed if layer.gate] == ([gate] if gate else [])


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return 2 * forward(*args, **kwargs)

    return call


class DecoratedMlp(Mlp):
    forward = doubled(Mlp.forward)


class CalledMlp(Mlp):
    def __call__(self, x: Tensor) -> Tensor:
        return 3 * self.forward(x)


class WithBuffer(LlamaDecoderLayer):
    """The same code, and something of its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, 0)
        self.register_buffer("own", torch.zeros(1))


def renamed(layer: type[nn.Module]) -> type[nn.Module]:
    """A class whose forward is the layer's but for one keyword, by which it gives attention what it was given."""
    forward = inspect.unwrap(layer.forward)
    lines = textwrap.dedent(inspect.getsource(forward)).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("def "))
    text = "\n".join(lines[begin:])
    assert text.count("attention_mask=attention_mask") == 1
    scope: dict[str, Any] = dict(forward.__globals__)
    exec(text.replace("attention_mask=attention_mask", "mask=attention_mask"), scope)
    return type("Renamed", (nn.Module,), {"forward": scope["forward"]})


def test_code_that_only_looks_alike_is_not_known() -> None:
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    known = known_code.is_known
    assert known(Mlp(), known_code.gated_forward)
    assert not known(DecoratedMlp(), known_code.gated_forward)
    assert not known(CalledMlp(), known_code.gated_forward)
    layer = LlamaDecoderLayer(config, 0)
    assert known(layer, known_code.pre_norm_forward)
    assert not known(renamed(LlamaDecoderLayer)(), known_code.pre_norm_forward)
    handle = layer.register_forward_hook(lambda *_: None)
    assert not known(layer, known_code.pre_norm_forward)
    handle.remove()
    assert known(layer, known_code.pre_norm_forward)
    for made, becomes in ((layer, PreNormLayer), (WithBuffer(config), WithBuffer)):
        model = nn.ModuleDict({"layer": made})
        install(model, manifest_of(model), cast(LoraHook, None), tails=True)
        assert type(model["layer"]) is becomes
        assert isinstance(model["layer"].mlp, GatedMlp)


STEPS: dict[str, list[tuple[int, tuple[tuple[int, float], ...]]]] = {
    "one token of the base": [(1, ())],
    "the base": [(24, ())],
    "one token": [(1, ((0, 1.0),))],
    "beside the products": [(3, ((0, 1.0),)), (2, ((1, 0.5),)), (1, ())],
    "one adapter in the tails": [(24, ((0, 1.0),))],
    "in the tails and beside": [(1, ((1, 1.0),)), (20, ((0, 0.5),)), (2, ((2, 1.0),)), (1, ())],
}


@pytest.mark.parametrize(
    ("kind", "known", "traced"),
    [
        ("llama", True, False),
        ("llama", True, True),
        ("mistral", True, False),
        ("qwen2", True, False),
        ("qwen3", True, False),
        ("gemma", True, False),
        ("gemma2", False, False),
    ],
)
def test_a_layer_whose_code_is_known_adds_its_last_product_to_the_residual(
    step: ops.Step, monkeypatch: pytest.MonkeyPatch, kind: str, known: bool, traced: bool
) -> None:
    """In every kind of step, and says what it would say: the same as one that was left as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.setattr(backend, "TAIL_TOKENS", 20)
    monkeypatch.setattr(backend, "LARGE_SEGMENTS", 8)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, num_key_value_heads=2, head_dim=16, vocab_size=80, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval().to(DEVICE).requires_grad_(False)
    other = copy.deepcopy(model)
    modules = tuple(
        Module(name, "linear", module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )
    manifest = Manifest("0" * 64, type(model).__name__, kind, "float32", 80, 100, modules)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=4 << 20, rows=8)
    for row in range(3):
        bind_adapter(arena, row, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    hook = _Hook(kernels)
    with torch.inference_mode():
        kernels.bind(install(model, manifest, hook, tails=True), len(manifest.linears))
        with monkeypatch.context() as patch:
            patch.setattr(adapter_layers, "pre_norm_layer", lambda module: None)
            as_it_is = install(other, manifest, hook, tails=True)
    assert not any(layer.onto for layer in as_it_is)
    layers = model.get_decoder().layers
    assert all(isinstance(layer, PreNormLayer) == known for layer in layers)
    added: list[int] = []
    add, onto, one = Tensor.addmm_, triton_tail.expand, one_row.product
    monkeypatch.setattr(Tensor, "addmm_", lambda y, *rest: added.append(len(y)) or add(y, *rest))
    monkeypatch.setattr(
        triton_tail,
        "expand",
        lambda y, *rest, residual=None: (
            (added.append(len(y)) if residual is not None else None) or onto(y, *rest, residual=residual)
        ),
    )
    monkeypatch.setattr(
        one_row,
        "product",
        lambda x, weight, bias, deltas=None, residual=None: (
            (added.append(1) if residual is not None else None) or one(x, weight, bias, deltas, residual)
        ),
    )
    if traced:
        compiled.compile_layers(model, "aot_eager")
    steps = STEPS if kind == "llama" else dict(list(STEPS.items())[:2])
    for name, sequences in steps.items():
        tokens = sum(n for n, _ in sequences)
        ids = torch.randint(80, (1, tokens), device=DEVICE)
        plan = plan_of(sequences)
        hook.active = plan is not None and bool((plan.seg_row >= 0).any())
        with torch.inference_mode():
            kernels.begin_step(plan if hook.active else None, tokens)
            got = model(input_ids=ids, use_cache=False).logits[0]
            met = len(added)
            added.clear()
            kernels.tails = False  # only one model's are staged
            kernels.begin_step(plan if hook.active else None, tokens)
            kernels.tails = True
            wanted = other(input_ids=ids, use_cache=False).logits[0]
        assert error(got, wanted.cpu().double()) < 1e-5, name
        assert not added, "of a layer that was left as it is"
        assert met == (len(layers) if known and name != "beside the products" else 0), name
    if traced:
        compiled.undo(model)


def test_the_operators_are_registered_truthfully(step: ops.Step) -> None:
    """torch's own check: schema, mutation and fake results agree with what the operators do."""
    model = Block().to(DEVICE).requires_grad_(False)
    manifest = manifest_of(model)
    arena = Arena.for_manifest(manifest, device=DEVICE, nbytes=1 << 20, rows=8)
    bind_adapter(arena, 0, 16, manifest)
    kernels = TritonKernels(arena, overlap=False, tails=True)
    into, back = install(model, manifest, _Hook(kernels), tails=True)
    kernels.bind([into, back], len(manifest.linears))
    plan = plan_of([(5, ((0, 1.0),))])
    assert plan is not None
    placed = kernels.place(plan)
    assert placed is not None
    kernels.use(None, TailPlan.from_plan(plan, placed, 5, DEVICE), 5)
    kernels.stage()
    checks = ("test_schema", "test_faketensor")
    x, h = torch.randn(5, 64, device=DEVICE), torch.randn(5, 48, device=DEVICE)
    for layer, given in ((into, x), (back, h)):
        assert layer.tail is not None
        rest = (layer.targets, list(layer.site.offsets), list(layer.site.widths))
        torch.library.opcheck(ops.tail_linear.default, (given, *layer.tail, *rest), test_utils=checks)
    assert into.tail is not None
    assert back.tail is not None
    residual, weight = torch.randn(5, 64, device=DEVICE), back.tail.whole[:64]
    rest = (back.targets, list(back.site.offsets), list(back.site.widths))
    torch.library.opcheck(ops.tail_linear.default, (h, *back.tail, *rest, residual), test_utils=checks)
    wanted = residual + ops.tail_linear(h, *back.tail, *rest)[:, :64]
    torch.testing.assert_close(ops.tail_linear(h, *back.tail, *rest, residual), wanted)
    torch.library.opcheck(ops.add_product.default, (residual, h, weight), test_utils=checks)
    one = (h[:1], weight, None)
    torch.library.opcheck(ops.one_row_product.default, (*one, residual[:1]), test_utils=checks)
    torch.library.opcheck(ops.one_row_linear.default, (*one, *rest, residual[:1]), test_utils=checks)
    torch.library.opcheck(ops.tail_gated.default, (x, *into.tail, into.targets, "silu"), test_utils=checks)
    y = ops.tail_linear(x, *into.tail, into.targets, list(into.site.offsets), list(into.site.widths))
    gate, up = y[:, :96].chunk(2, -1)
    torch.testing.assert_close(ops.tail_gated(x, *into.tail, into.targets, "silu"), functional.silu(gate) * up)
    kernels.use(None, None, 5)
    with pytest.raises(ValueError, match="tail_plan"):
        ops.tail_linear(x, *into.tail, into.targets, list(into.site.offsets), list(into.site.widths))
    with pytest.raises(ValueError, match="tail_plan"):
        ops.tail_gated(x, *into.tail, into.targets, "silu")
