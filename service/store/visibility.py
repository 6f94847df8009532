"""Who may see which adapter: its owner, the tenants it is shared with, or everybody.

What somebody may not see does not exist for him. The condition is part of the one statement that looks for the adapter,
so that there is no difference in what is done, nor in what is answered, between an adapter that is hidden and none.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from service.store.tables import adapter_grants, adapters

PRIVATE, SHARED, PUBLIC = "private", "shared", "public"
MAX_GRANTS = 1000


def _visible(viewer: Any) -> sa.ColumnElement[bool]:
    granted = (
        sa.select(adapter_grants.c.tenant)
        .where(adapter_grants.c.adapter_id == adapters.c.id, adapter_grants.c.tenant == viewer)
        .correlate(adapters)
        .exists()
    )
    shared = sa.and_(adapters.c.visibility == SHARED, granted)
    return sa.or_(adapters.c.tenant == viewer, adapters.c.visibility == PUBLIC, shared)


VISIBLE = _visible(sa.bindparam("viewer"))
"""For the parameter `viewer`, a tenant."""


def visible_to(viewer: str | None) -> sa.ColumnElement[bool]:
    """A condition on `adapters`; None sees everything."""
    return sa.true() if viewer is None else _visible(viewer)
