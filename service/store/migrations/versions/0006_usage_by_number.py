"""Usage by the tenant's number instead of by its name, which a later tenant may have again."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

COUNTS = "requests, prompt_tokens, cached_tokens, completion_tokens, first_tokens, first_token_ms, loads, byte_hours"
# Whose a row is, as far as it can be known: the present tenant's of that name if it was there by then. Rows of the hour
# in which that one was created may be a predecessor's, unless they are of a key that it has. What is not surely the
# present tenant's is kept under 0, where the admin sees it and no tenant does.
NUMBER = """
    COALESCE((
        SELECT t.number FROM tenants t WHERE t.id = u.tenant AND (
            t.id = 'default'
            OR u.hour >= t.created_at
            OR (u.hour > t.created_at - 3600
                AND EXISTS (SELECT 1 FROM tenant_keys k WHERE k.id = u.key AND k.tenant_number = t.number))
        )
    ), 0)
"""


def _name(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def _counts() -> list[sa.Column[Any]]:
    def kind(name: str) -> sa.types.TypeEngine[Any]:
        return sa.Float() if name in ("first_token_ms", "byte_hours") else sa.BigInteger()

    return [sa.Column(name, kind(name), nullable=False) for name in COUNTS.split(", ")]


def upgrade() -> None:
    op.create_table(
        "usage_by_number",
        sa.Column("hour", sa.BigInteger, nullable=False),
        sa.Column("tenant_number", sa.Integer, nullable=False),
        sa.Column("tenant", _name(96), nullable=False),
        sa.Column("key", _name(64), nullable=False),
        sa.Column("adapter", _name(1600), nullable=False),
        *_counts(),
        sa.PrimaryKeyConstraint("hour", "tenant_number", "tenant", "key", "adapter", name="pk_usage_by_number"),
    )
    op.execute(
        f"INSERT INTO usage_by_number (hour, tenant_number, tenant, key, adapter, {COUNTS}) "
        f"SELECT hour, {NUMBER}, tenant, key, adapter, {COUNTS} FROM usage u"
    )
    op.drop_table("usage")
    op.rename_table("usage_by_number", "usage")
    op.create_index("ix_usage_tenant_number_hour", "usage", ["tenant_number", "hour"])


def downgrade() -> None:
    sums = ", ".join(f"SUM({name})" for name in COUNTS.split(", "))
    op.create_table(
        "usage_by_name",
        sa.Column("hour", sa.BigInteger, nullable=False),
        sa.Column("tenant", _name(96), nullable=False),
        sa.Column("key", _name(64), nullable=False),
        sa.Column("adapter", _name(1600), nullable=False),
        *_counts(),
        sa.PrimaryKeyConstraint("hour", "tenant", "key", "adapter", name="pk_usage_by_name"),
    )
    op.execute(
        f"INSERT INTO usage_by_name (hour, tenant, key, adapter, {COUNTS}) "
        f"SELECT hour, tenant, key, adapter, {sums} FROM usage GROUP BY hour, tenant, key, adapter"
    )
    op.drop_table("usage")
    op.rename_table("usage_by_name", "usage")
    op.create_index("ix_usage_tenant_hour", "usage", ["tenant", "hour"])
