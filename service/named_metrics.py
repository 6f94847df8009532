"""Figures of /metrics by adapter and by tenant, for the few names that have a label of their own (service/top.py).

Only where the operator asks for them: LORAPLEX_METRICS_TOP_ADAPTERS and _TENANTS. The base model is always told by its
name. Where there are tenants an adapter's label is owner/name; a mix has the names of its adapters joined with "+".
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.settings import Settings
from service.store.errors import CatalogueError
from service.store.usage import DAY_S, UsageTable
from service.top import DAYS, TopNames, most_used
from service.usage import Tokens

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_MOST_ROWS = 100_000


class _Series:
    """The metrics with one label. `what`: adapter or tenant."""

    def __init__(self, what: str, places: int, folder: Path | None, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Summary

        def counter(name: str, text: str) -> Counter:
            return Counter(f"loraplex_{what}_{name}", f"{text} by {what}.", (what,), registry=registry)

        self.places = places
        self.top = TopNames(places, None if folder is None else folder / f"{what}s.json")
        self.requests = counter("requests", "Inference requests")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests")
        self.generated_tokens = counter("generated_tokens", "Generated tokens")
        self.ttft = Summary(
            f"loraplex_{what}_time_to_first_token_seconds",
            f"Time from submission to the first token of a sequence, by {what}.",
            (what,),
            registry=registry,
        )


@dataclass(slots=True)
class NamedRequest:
    """One request, under its labels."""

    series: list[tuple[_Series, str]]

    def first_token(self, seconds: float) -> None:
        for series, label in self.series:
            series.ttft.labels(label).observe(seconds)

    def done(self, used: Tokens) -> None:
        for series, label in self.series:
            series.requests.labels(label).inc()
            series.prompt_tokens.labels(label).inc(used.prompt_tokens)
            series.generated_tokens.labels(label).inc(used.completion_tokens)


class NamedMetrics:
    """`folder`: of several processes, None for a single one. `open` gives None where nothing is wanted."""

    def __init__(self, settings: Settings, folder: Path | None, registry: CollectorRegistry) -> None:
        self._base = settings.base_name()
        self._qualified = settings.multi_tenant
        adapters, tenants = settings.metrics_top_adapters, settings.metrics_top_tenants
        self._adapters = _Series("adapter", adapters, folder, registry) if adapters else None
        self._tenants = _Series("tenant", tenants, folder, registry) if tenants else None

    @classmethod
    def open(cls, settings: Settings, folder: Path | None, registry: CollectorRegistry) -> NamedMetrics | None:
        wanted = settings.metrics_top_adapters or settings.metrics_top_tenants
        return cls(settings, folder, registry) if wanted else None

    async def seed(self, table: UsageTable) -> None:
        """The names with most use in the last days have their places from the start."""
        now = int(time.time())
        query: dict[str, Any] = {"start": now - DAYS * DAY_S, "end": now + 1, "tenant": None, "limit": _MOST_ROWS}
        with contextlib.suppress(CatalogueError):  # then places go to who comes first
            if self._adapters is not None:
                rows: Iterable[dict[str, Any]] = await table.read(**query, group_by=("tenant", "adapter"))
                named = [{**row, "adapter": self._adapter(row["tenant"], row["adapter"])} for row in rows]
                named = [row for row in named if row["adapter"] != self._base]
                self._adapters.top.seed(most_used(named, "adapter", self._adapters.places))
            if self._tenants is not None:
                rows = await table.read(**query, group_by=("tenant",))
                self._tenants.top.seed(most_used(rows, "tenant", self._tenants.places))

    def request(self, tenant: str, account: str) -> NamedRequest:
        """`account`: as usage is entered under (openai.Target)."""
        series: list[tuple[_Series, str]] = []
        if self._adapters is not None:
            name = self._adapter(tenant, account)
            series.append((self._adapters, name if name == self._base else self._adapters.top.label(name)))
        if self._tenants is not None:
            series.append((self._tenants, self._tenants.top.label(tenant)))
        return NamedRequest(series)

    def _adapter(self, tenant: str, account: str) -> str:
        if not account:
            return self._base
        if not self._qualified:
            return account
        return "+".join(part if "/" in part else f"{tenant}/{part}" for part in account.split("+"))
