"""Sizes, turns and shared files of merges; where the files of a service lie."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("merges", sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("instances", sa.Column("files_at", sa.Text, nullable=True))
    op.create_table(
        "merge_files",
        sa.Column("merge_number", sa.Integer, sa.ForeignKey("merges.number"), primary_key=True),
        sa.Column("sha256", sa.String(64), primary_key=True),
    )
    op.create_index("ix_merge_files_sha256", "merge_files", ["sha256"])
    op.create_table(
        "merge_turns",
        sa.Column("tenant", sa.String(96), primary_key=True),
        sa.Column("turn", sa.BigInteger, nullable=False),
    )
    connection = op.get_bind()
    for number, files in connection.execute(sa.text("SELECT number, files FROM merges")).all():
        size = sum(file["bytes"] for file in (json.loads(files) if isinstance(files, str) else files))
        if size:
            values = {"size": size, "number": number}
            connection.execute(sa.text("UPDATE merges SET bytes = :size WHERE number = :number"), values)


def downgrade() -> None:
    op.drop_table("merge_turns")
    op.drop_table("merge_files")
    op.drop_column("instances", "files_at")
    op.drop_column("merges", "bytes")
