"""Tenants, their keys, who may see which adapter, and the audit log."""

from __future__ import annotations

import time

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _name(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    op.add_column("adapters", sa.Column("visibility", sa.String(16), nullable=False, server_default="private"))
    tenants = op.create_table(
        "tenants",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", _name(96), nullable=False),
        sa.Column("weight", sa.Float, nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("disabled", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("id", name="uq_tenants_id"),
        sqlite_autoincrement=True,
    )
    # Whose adapters those of a server without tenants are.
    default = {"id": "default", "weight": 1.0, "limits": {}, "disabled": False, "created_at": int(time.time())}
    op.bulk_insert(tenants, [default])
    op.create_table(
        "tenant_keys",
        sa.Column("id", _name(32), primary_key=True),
        sa.Column("tenant_number", sa.Integer, sa.ForeignKey("tenants.number"), nullable=False),
        sa.Column("salt", sa.String(32), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(255), nullable=False),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=True),
        sa.Column("last_used_at", sa.BigInteger, nullable=True),
    )
    op.create_index("ix_tenant_keys_tenant_number", "tenant_keys", ["tenant_number"])
    op.create_table(
        "adapter_grants",
        sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
        sa.Column("tenant", _name(96), primary_key=True),
    )
    op.create_index("ix_adapter_grants_tenant", "adapter_grants", ["tenant"])
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("actor", sa.String(32), nullable=False),
        sa.Column("tenant", sa.String(96), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("status", sa.Integer, nullable=False),
        sa.Column("request_id", sa.String(128), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_tenant_number", "audit", ["tenant", "number"])


def downgrade() -> None:
    for table in ("audit", "adapter_grants", "tenant_keys", "tenants"):
        op.drop_table(table)
    with op.batch_alter_table("adapters") as adapters:
        adapters.drop_column("visibility")
