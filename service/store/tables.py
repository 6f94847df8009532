"""The catalogue's tables. Times are whole seconds since 1970 (UTC), sizes are bytes.

Only portable types and constraints: the same schema runs on SQLite and on PostgreSQL. Every row hangs under a tenant;
while there is one user, that is "default".
"""

from __future__ import annotations

import sqlalchemy as sa

DEFAULT_TENANT = "default"

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.String(96), nullable=False),
    sa.Column("name", sa.String(96), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("default_version", sa.Integer, nullable=False),
    # Counts changes of the adapter; with the id (never reused) it is the ETag.
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("updated_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("tenant", "name"),
    sqlite_autoincrement=True,
)

versions = sa.Table(
    "adapter_versions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    # sha256 of the record of its files (adapters/blobs.py); the record is a blob under this name.
    sa.Column("digest", sa.String(64), nullable=False, index=True),
    # Fingerprint of the base model it was validated against.
    sa.Column("fingerprint", sa.String(128), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("max_rank", sa.Integer, nullable=False),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("adapter_id", "number"),
    sa.UniqueConstraint("adapter_id", "digest"),
    sqlite_autoincrement=True,
)

files = sa.Table(
    "version_files",
    metadata,
    sa.Column("version_id", sa.Integer, sa.ForeignKey("adapter_versions.id"), primary_key=True),
    sa.Column("filename", sa.String(255), primary_key=True),
    sa.Column("sha256", sa.String(64), nullable=False, index=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)

aliases = sa.Table(
    "adapter_aliases",
    metadata,
    sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("alias", sa.String(96), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["adapter_id", "version"], ["adapter_versions.adapter_id", "adapter_versions.number"]),
)

labels = sa.Table(
    "adapter_labels",
    metadata,
    sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("key", sa.String(63), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
    sa.Index(None, "key", "value"),
)

# Outlives its adapter, so that a version number of a name never means two different contents.
counters = sa.Table(
    "version_counters",
    metadata,
    sa.Column("tenant", sa.String(96), primary_key=True),
    sa.Column("name", sa.String(96), primary_key=True),
    sa.Column("last", sa.Integer, nullable=False),
)
