"""Which uploads an API process lets in, and how much of the spool's disk each tenant's may take.

One tenant alone may have all slots (`max_uploads`). It does not take away what others would use: each may always have
its share, `max_uploads` divided among the tenants that upload, or one upload if it has none. So there can be more than
`max_uploads`, by at most a share or one upload for each tenant that came while all were taken; none that was let in
is refused for it later. The queue of the engine has the same rule (service/engine/permits.py).

The disk: what a tenant's unfinished uploads have written may not exceed what they leave free. So one tenant can take
half of what is free, the next one half of the rest: nobody finds the disk full because of another's uploads. Each API
process counts its own, so with k of them a tenant can take k parts of k + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from service.api.failure import ApiError
from service.store.quotas import Room

RETRY_AFTER_S = 2.0  # what a client is told to wait while there are too many uploads
FORM_BYTES = 64 << 10
"""A body may be so much larger than the files in it: names, description, labels, boundaries."""


class Shares:
    """Uploads in progress. `share_disk`: between tenants; a single user may fill it."""

    def __init__(self, max_uploads: int, *, share_disk: bool) -> None:
        self._max = max_uploads
        self._share_disk = share_disk
        self._tenants: dict[str, list[Upload]] = {}

    @contextmanager
    def enter(self, tenant: str, room: Room) -> Iterator[Upload]:
        """An upload of the tenant that is in progress until the block ends. Raises ApiError 429."""
        mine = self._tenants.get(tenant, [])
        count = sum(map(len, self._tenants.values()))
        share = self._max / (len(self._tenants) + (not mine))
        if count >= self._max and mine and len(mine) + 1 > share:
            message = f"{count} uploads are in progress, {len(mine)} of them of this tenant, which is the limit."
            raise ApiError(429, f"{message} Try again.", code="too_many_uploads", retry_after_s=RETRY_AFTER_S)
        upload = Upload(room, self._tenants.setdefault(tenant, []), self._share_disk)
        upload.together.append(upload)
        try:
            yield upload
        finally:
            upload.together.remove(upload)
            if not upload.together:
                self._tenants.pop(tenant, None)


class Upload:
    """One of them. `together`: all of its tenant's."""

    def __init__(self, room: Room, together: list[Upload], share_disk: bool) -> None:
        self.room = room
        self.together = together
        self.bytes = 0
        self._share_disk = share_disk

    def require(self, nbytes: int, free: int) -> None:
        """Raises QuotaReached or ApiError 507 unless the tenant may write so many bytes more; `free`: what can be
        written to the disk. Together its uploads may not be larger than one of them could be kept."""
        held = sum(each.bytes for each in self.together)
        self.room.require(held + nbytes, FORM_BYTES * len(self.together))
        if self._share_disk and held + nbytes > free - nbytes:
            message = "The tenant's unfinished uploads would take more of the server's disk than they leave free."
            raise ApiError(507, message, code="insufficient_storage")

    def grow(self, nbytes: int, free: int) -> None:
        """So many bytes have come. Raises as `require` does."""
        self.require(nbytes, free)
        self.bytes += nbytes
