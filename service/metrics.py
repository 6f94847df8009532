"""What /metrics shows. Request figures are counted here; the engine's come with its heartbeat, and are only passed on.

With one API process the numbers live in memory. With several, prometheus_client's multi-process mode keeps them in
memory-mapped files of run/metrics/<pid of the processes' parent>/, and whichever process is asked adds up all files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from service.named_metrics import NamedMetrics
from service.settings import Settings

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_TTFT_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The counters of one API process. `engine_stats` and `engine_up` are asked at each scrape."""

    def __init__(
        self,
        settings: Settings,
        engine_stats: Callable[[], Mapping[str, float]],
        engine_up: Callable[[], bool],
    ) -> None:
        self._folder = _shared_folder(settings) if settings.api_workers > 1 else None
        # Imported only now: the library reads the variable that _shared_folder sets when it is first imported.
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        # One more series for each, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._engine = _EngineCollector(engine_stats, engine_up)

        self.requests = Counter(
            "loraplex_requests", "HTTP requests by route and status.", ("route", "status"), registry=registry
        )
        self.request_seconds = Histogram(
            "loraplex_request_seconds",
            "Time from request to the end of its answer.",
            ("route",),
            buckets=_REQUEST_S,
            registry=registry,
        )
        self.in_progress = Gauge(
            "loraplex_requests_in_progress",
            "HTTP requests being answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.prompt_tokens = Counter("loraplex_prompt_tokens", "Prompt tokens of answered requests.", registry=registry)
        self.cached_tokens = Counter(
            "loraplex_cached_prompt_tokens", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self.generated_tokens = Counter("loraplex_generated_tokens", "Generated tokens.", registry=registry)
        self.ttft = Histogram(
            "loraplex_time_to_first_token_seconds",
            "Time from submission to the first token of a sequence.",
            buckets=_TTFT_S,
            registry=registry,
        )
        self.tpot = Histogram(
            "loraplex_time_per_output_token_seconds",
            "Mean time between the tokens of a sequence, after its first.",
            buckets=_TPOT_S,
            registry=registry,
        )
        self.disconnects = Counter(
            "loraplex_client_disconnects",
            "Requests whose client left before the answer was complete.",
            registry=registry,
        )
        self.damaged_blobs = Counter(
            "loraplex_damaged_blobs",
            "Downloads refused because the stored file is damaged or gone.",
            registry=registry,
        )

        self.named = NamedMetrics.open(settings, self._folder, registry)
        """Figures by adapter and tenant, if they are wanted."""

    # What Generation tells as tokens come (generation.Observer).

    def first_token(self, seconds: float) -> None:
        self.ttft.observe(seconds)

    def tokens_done(self, tokens: int, seconds: float) -> None:
        if tokens > 1:
            self.tpot.observe(seconds / (tokens - 1))

    def expose(self, merges: Mapping[str, int] | None = None) -> tuple[bytes, str]:
        """(the page in Prometheus's text format, its content type), added up over all API processes. Reads files with
        several processes, so call it from a thread. `merges`: how many there are by state."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

        registry = self._registry
        if self._folder is not None:
            registry = CollectorRegistry()
            registry.register(_ProcessesCollector(self._folder))
        pages = [generate_latest(registry), generate_latest(self._engine.registry)]
        if merges is not None:
            counted = CollectorRegistry()
            counted.register(_MergesCollector(merges))
            pages.append(generate_latest(counted))
        return b"".join(pages), CONTENT_TYPE_LATEST

    def close(self) -> None:
        """Takes this process's gauges out of the sum; its counters stay, as they must never fall."""
        if self._folder is not None:
            from prometheus_client import multiprocess

            multiprocess.mark_process_dead(os.getpid(), path=str(self._folder))  # type: ignore[no-untyped-call]


class _ProcessesCollector:
    """What all processes of this start have counted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterator[Metric]:
        from prometheus_client import multiprocess

        # A file is empty for a moment while a process that starts makes it, and the library cannot read such a one.
        files = [str(path) for path in self._folder.glob("*.db") if _size(path)]
        yield from multiprocess.MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # of a process that has just ended
        return 0


class _MergesCollector:
    """Merges by state, from the catalogue: whichever process is asked, the numbers are the same."""

    def __init__(self, merges: Mapping[str, int]) -> None:
        self._merges = merges

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        family = GaugeMetricFamily("loraplex_merges", "Merges by state.", labels=["state"])
        for state, number in self._merges.items():
            family.add_metric([state], float(number))
        yield family


class _EngineCollector:
    """The heartbeat's statistics as metrics: `x_total` is a counter, everything else a gauge."""

    def __init__(self, stats: Callable[[], Mapping[str, float]], up: Callable[[], bool]) -> None:
        from prometheus_client import CollectorRegistry

        self._stats = stats
        self._up = up
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily("loraplex_engine_up", "1 while the engine answers.", value=float(self._up()))
        for key, value in sorted(self._stats().items()):
            name = "loraplex_engine_" + key.replace(".", "_").replace("-", "_")
            text = f"The engine's {key.replace('_', ' ')}."
            if name.endswith("_total"):
                yield CounterMetricFamily(name.removesuffix("_total"), text, value=value)
            else:
                yield GaugeMetricFamily(name, text, value=value)


def _shared_folder(settings: Settings) -> Path:
    """The folder of this start of the service, and the library switched to it. Those of earlier starts go."""
    base = settings.metrics_dir
    folder = base / str(os.getppid())
    folder.mkdir(parents=True, exist_ok=True)
    for other in base.iterdir():
        if other.name.isdigit() and not _alive(int(other.name)):
            shutil.rmtree(other, ignore_errors=True)
    for path in folder.glob("*.db"):
        # Gauges of a worker that was killed.
        pid = path.stem.rpartition("_")[2]
        if path.name.startswith("gauge_live") and pid.isdigit() and not _alive(int(pid)):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    from prometheus_client import values

    # Should something have imported the library before the variable was set.
    if values.ValueClass is values.MutexValue:
        values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    return folder


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
