"""Merges and their sources."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001b"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "merges",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant", sa.String(96), nullable=False),
        sa.Column("name", sa.String(96), nullable=False),
        sa.Column("target", sa.String(16), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("options", sa.JSON, nullable=False),
        sa.Column("idempotency_key", sa.String(255), nullable=True),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("progress", sa.Float, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("runner", sa.String(64), nullable=True),
        sa.Column("seen_at", sa.BigInteger, nullable=True),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("result_version", sa.Integer, nullable=True),
        sa.Column("files", sa.JSON, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=True),
        sa.Column("finished_at", sa.BigInteger, nullable=True),
        sa.UniqueConstraint("id", name="uq_merges_id"),
        sa.UniqueConstraint("tenant", "idempotency_key", name="uq_merges_tenant_idempotency_key"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_merges_state", "merges", ["state"])
    op.create_table(
        "merge_sources",
        sa.Column("merge_number", sa.Integer, sa.ForeignKey("merges.number"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("adapter", sa.String(96), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
    )
    op.create_index("ix_merge_sources_adapter", "merge_sources", ["adapter"])


def downgrade() -> None:
    for table in ("merge_sources", "merges"):
        op.drop_table(table)
