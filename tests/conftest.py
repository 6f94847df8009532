"""Fixtures shared by the whole suite."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

# Before transformers is imported anywhere: its models import Triton if it is there, and what Triton defines without a
# GPU works in its interpreter only.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A script's background commands ignore Ctrl-C, and so would every program that the suite starts from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from service.default_model import ensure_default_model
from tests.ports import unused_port
from tests.real_parts import S3, Postgres

ROOT = Path(__file__).resolve().parent.parent

# Before torch is imported: the pytest workers and the engines that they start share the machine's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing in the suite may depend on a hub that answers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# `make test ARGS=...`: the makes that tests start have arguments of their own.
for name in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS"):
    os.environ.pop(name, None)


UNTRACED = (
    "tests/crash/",
    "tests/docs/",
    "tests/adapters/test_fuzz.py",
    "tests/adapters/test_residency_random.py",
    "tests/engine/test_fairness.py::test_a_flood_",
    "tests/engine/test_fairness.py::test_whatever_happens_",
    "tests/engine/test_core.py::test_whatever_happens_",
    "tests/engine/test_parity.py::test_with_only_20_pages",
    "tests/engine/test_parity.py::test_with_prefix_cache_hits_",
    "tests/engine/test_parity_smollm2.py",
    "tests/kernels/test_compiled_parity.py",
    "tests/kernels/test_draw.py::test_a_row_gives_",
    "tests/kernels/test_draw.py::test_banned_",
    "tests/kernels/test_draw.py::test_the_same_tokens_as_without_a_kernel[5000-",
    "tests/kernels/test_draw.py::test_the_same_tokens_as_without_a_kernel[97-torch.bfloat16]",
    "tests/kernels/test_draw.py::test_the_same_tokens_as_without_a_kernel[97-torch.float16]",
    "tests/kernels/test_draw.py::test_ties_",
    "tests/kernels/test_attention_kernels.py::test_a_uniform_backend_gives_every_token_the_same_bits_in_any_step[40-",
    "tests/kernels/test_attention_kernels.py::test_decode_in_several_parts_gives_the_same[None-16]",
    "tests/kernels/test_lora_kernels.py::test_a_covering_plan_writes_deltas_and_zeros[every token another adapter,",
    "tests/kernels/test_lora_kernels.py::test_every_configuration_gives_the_same_sum[64-",
    "tests/kernels/test_tail_parity.py::test_prompts_",
    "tests/kernels/test_tail_parity.py::test_tokens_",
    "tests/service/test_leases.py::test_services_share_a_limit",
    "tests/service/test_load.py",
    "tests/service/test_openapi_fuzz.py",
    "tests/service/test_real_engine.py",
)
"""Tests whose code coverage is not traced: long plays of what other tests go through as well, and those that drive
other processes. Tracing makes the former three times slower, also where a kernel runs in Triton's interpreter."""


TOGETHER = (
    "tests/crash/test_recovery.py",
    "tests/deploy/test_figures.py",
    "tests/deploy/test_proxies.py",
    "tests/engine/test_parity.py",
    "tests/engine/test_parity_smollm2.py",
    "tests/service/test_adapters_api.py",
    "tests/service/test_client.py",
    "tests/service/test_load.py",
    "tests/service/test_resident_limits.py",
    "tests/service/test_slow_clients.py",
    "tests/service/test_supervisor.py",
    "tests/service/test_tenants.py",
    "tests/service/test_tracing.py",
    "tests/service/test_upload_limits.py",
    "tests/service/test_usage_api.py",
)
"""Modules whose tests share a service or a model that takes seconds to start: one pytest worker runs them all, or each
worker would start one. Other modules that belong together say so themselves (xdist_group)."""


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.nodeid.startswith(UNTRACED):
        item.add_marker(pytest.mark.no_cover)
    module, _, test = item.nodeid.partition("::")
    if module in TOGETHER:
        # What is shared is one for each architecture in test_parity.py, which is the first parameter there.
        architecture = re.search(r"\[([a-z]+\d?)\b", test) if module == "tests/engine/test_parity.py" else None
        item.add_marker(pytest.mark.xdist_group(f"{module} {architecture[1] if architecture else ''}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu run only where there is a CUDA device; torch is imported only if such a test was collected."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """LORAPLEX_* variables of the developer's shell must not reach the code under test."""
    for key in [key for key in os.environ if key.startswith("LORAPLEX_")]:
        monkeypatch.delenv(key)


@pytest.fixture(scope="session")
def model_data_dir() -> Path:
    """The data folder whose models/ holds the embedded model: the project's own, or TEST_DATA_DIR."""
    return Path(os.environ.get("TEST_DATA_DIR") or ROOT / "data").absolute()


@pytest.fixture(scope="session")
def base_model_dir(model_data_dir: Path) -> Path:
    """The embedded base model (SmolLM2-135M-Instruct) as a Hugging Face folder; shared by all workers (file lock)."""
    return ensure_default_model(model_data_dir)


@pytest.fixture(scope="session")
def example_adapters() -> Path:
    """The folder of the example adapters: one PEFT folder each."""
    return ROOT / "examples" / "adapters"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """PostgreSQL; a test that stops it has to start it again."""
    server = Postgres()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3]:
    """An S3 server; a test that freezes it has to thaw it."""
    server = S3()
    try:
        yield server
    finally:
        server.close()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Gives TCP ports of 127.0.0.1 that nothing listens on."""
    return unused_port


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: what a kernel leaves unwritten, or reads unwritten, shows."""
    import torch  # most modules do without

    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
