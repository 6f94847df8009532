"""Usage by hour, tenant, key and adapter."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _name(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.create_table(
        "usage",
        sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant", _name(96), primary_key=True),
        sa.Column("key", _name(64), primary_key=True),
        sa.Column("adapter", _name(1600), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("first_tokens", sa.BigInteger, nullable=False),
        sa.Column("first_token_ms", sa.Float, nullable=False),
        sa.Column("loads", sa.BigInteger, nullable=False),
        sa.Column("byte_hours", sa.Float, nullable=False),
    )
    op.create_index("ix_usage_tenant_hour", "usage", ["tenant", "hour"])


def downgrade() -> None:
    op.drop_table("usage")
