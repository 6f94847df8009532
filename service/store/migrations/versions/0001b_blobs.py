"""Which blobs are being stored, which are no longer needed, and which instances have let go of those."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001b"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "instances",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("seen_at", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "blob_claims",
        sa.Column("upload", sa.String(64), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("is_record", sa.Boolean, nullable=False),
        sa.Column("instance", sa.String(64), nullable=False),
        sa.Column("process", sa.String(64), nullable=False),
    )
    op.create_index("ix_blob_claims_sha256", "blob_claims", ["sha256"])
    op.create_table(
        "blob_garbage",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("is_record", sa.Boolean, nullable=False),
    )
    op.create_table(
        "blob_releases",
        sa.Column("sha256", sa.String(64), primary_key=True),
        sa.Column("instance", sa.String(64), primary_key=True),
    )
    op.create_table(
        "catalogue_facts",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.String(255), nullable=False),
    )
    # Names are ordered by their bytes everywhere, whatever the database's own language is: pages depend on it.
    if op.get_bind().dialect.name == "postgresql":
        for table, column, length in (
            ("adapters", "name", 96),
            ("adapter_aliases", "alias", 96),
            ("adapter_labels", "key", 63),
            ("version_files", "filename", 255),
        ):
            op.alter_column(table, column, type_=sa.String(length, collation="C"))


def downgrade() -> None:
    for table in ("catalogue_facts", "blob_releases", "blob_garbage", "blob_claims", "instances"):
        op.drop_table(table)
