"""The catalogue's tables. Times are whole seconds since 1970 (UTC), sizes are bytes.

Only portable types and constraints: the same schema runs on SQLite and on PostgreSQL. Every row hangs under a tenant;
while there is one user, that is "default".
"""

from __future__ import annotations

import sqlalchemy as sa

DEFAULT_TENANT = "default"
DEFAULT_TENANT_NUMBER = 1
"""The first that was given: migration 0003 enters this tenant, which cannot be deleted."""

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _name(length: int) -> sa.types.TypeEngine[str]:
    """Text that is ordered by its bytes, whatever language the database speaks: pages go by name."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.String(96), nullable=False),
    sa.Column("name", _name(96), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("default_version", sa.Integer, nullable=False),
    # private, shared (with the tenants of adapter_grants) or public.
    sa.Column("visibility", sa.String(16), nullable=False, server_default="private"),
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
    sa.Column("filename", _name(255), primary_key=True),
    sa.Column("sha256", sa.String(64), nullable=False, index=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
)

aliases = sa.Table(
    "adapter_aliases",
    metadata,
    sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("alias", _name(96), primary_key=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.ForeignKeyConstraint(["adapter_id", "version"], ["adapter_versions.adapter_id", "adapter_versions.number"]),
)

labels = sa.Table(
    "adapter_labels",
    metadata,
    sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("key", _name(63), primary_key=True),
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

# Jobs that make an adapter or a checkpoint out of adapters, in the order of `number` (service/store/merges.py).
merges = sa.Table(
    "merges",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    # What clients know it by.
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("tenant", sa.String(96), nullable=False),
    sa.Column("name", sa.String(96), nullable=False),
    # adapter | checkpoint
    sa.Column("target", sa.String(16), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    # method, density, ...: the fields of adapters.merge_request.MergeOptions that were given.
    sa.Column("options", sa.JSON, nullable=False),
    sa.Column("idempotency_key", sa.String(255), nullable=True),
    # sha256 of the request's body, so that a key that comes again with another one is noticed.
    sa.Column("request_digest", sa.String(64), nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("progress", sa.Float, nullable=False),
    # How often a merger has taken it up.
    sa.Column("attempts", sa.Integer, nullable=False),
    # The merger that has it: an id of the data folder, under which a checkpoint's files lie.
    sa.Column("runner", sa.String(64), nullable=True),
    # When that merger last said so.
    sa.Column("seen_at", sa.BigInteger, nullable=True),
    sa.Column("error", sa.Text, nullable=True),
    sa.Column("result_version", sa.Integer, nullable=True),
    # Of a checkpoint: [{"name", "bytes", "sha256"}].
    sa.Column("files", sa.JSON, nullable=False),
    # Of a checkpoint: what its files have, or will have as far as is known. Counts against stored_bytes.
    sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("started_at", sa.BigInteger, nullable=True),
    sa.Column("finished_at", sa.BigInteger, nullable=True),
    sa.UniqueConstraint("tenant", "idempotency_key"),
    sqlite_autoincrement=True,
)

# By name and number, not by foreign key: a finished merge tells its sources after they have gone.
merge_sources = sa.Table(
    "merge_sources",
    metadata,
    sa.Column("merge_number", sa.Integer, sa.ForeignKey("merges.number"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("adapter", sa.String(96), nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
)

# Files of checkpoints that lie in the blob store, where that is one for several services.
merge_files = sa.Table(
    "merge_files",
    metadata,
    sa.Column("merge_number", sa.Integer, sa.ForeignKey("merges.number"), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True, index=True),
)

# When a tenant's last merge was begun, counted in merges: so they take turns.
merge_turns = sa.Table(
    "merge_turns",
    metadata,
    sa.Column("tenant", sa.String(96), primary_key=True),
    sa.Column("turn", sa.BigInteger, nullable=False),
)

# What follows is the book of blobs (service/store/blob_book.py).

# Services that share this database: one per data folder. Time is the database's own.
instances = sa.Table(
    "instances",
    metadata,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("seen_at", sa.BigInteger, nullable=False),
    # Where its files lie (service/store/blob_book.py); NULL: it is of a version that did not say.
    sa.Column("files_at", sa.Text, nullable=True),
)

# Blobs that an upload is storing: entered before the first byte, gone with the commit of its version.
blob_claims = sa.Table(
    "blob_claims",
    metadata,
    sa.Column("upload", sa.String(64), primary_key=True),
    sa.Column("sha256", sa.String(64), primary_key=True, index=True),
    # Whether it is the record of a version: engines know adapters by those.
    sa.Column("is_record", sa.Boolean, nullable=False),
    sa.Column("instance", sa.String(64), nullable=False),
    # The process of that instance, by its folder in the spool.
    sa.Column("process", sa.String(64), nullable=False),
)

# Blobs that no version needs any more.
blob_garbage = sa.Table(
    "blob_garbage",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("is_record", sa.Boolean, nullable=False),
)

# Instances none of whose running requests needs that garbage.
blob_releases = sa.Table(
    "blob_releases",
    metadata,
    sa.Column("sha256", sa.String(64), primary_key=True),
    sa.Column("instance", sa.String(64), primary_key=True),
)

catalogue_facts = sa.Table(
    "catalogue_facts",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.String(255), nullable=False),
)

# What follows is about tenants (service/store/tenants.py).

tenants = sa.Table(
    "tenants",
    metadata,
    # Never reused: caches and limits go by it, so that a later tenant of the same name finds nothing of this one's.
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", _name(96), nullable=False),
    sa.Column("weight", sa.Float, nullable=False),
    sa.Column("limits", sa.JSON, nullable=False),
    sa.Column("disabled", sa.Boolean, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("id"),
    sqlite_autoincrement=True,
)

tenant_keys = sa.Table(
    "tenant_keys",
    metadata,
    # The part of the key that is no secret.
    sa.Column("id", _name(32), primary_key=True),
    sa.Column("tenant_number", sa.Integer, sa.ForeignKey("tenants.number"), nullable=False, index=True),
    sa.Column("salt", sa.String(32), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    # Separated by blanks.
    sa.Column("scopes", sa.String(255), nullable=False),
    sa.Column("description", sa.Text, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.BigInteger, nullable=True),
    sa.Column("last_used_at", sa.BigInteger, nullable=True),
    sa.Column("disabled", sa.Boolean, nullable=False, server_default=sa.false()),
)

# By name: a grant says nothing about whether there is such a tenant.
adapter_grants = sa.Table(
    "adapter_grants",
    metadata,
    sa.Column("adapter_id", sa.Integer, sa.ForeignKey("adapters.id"), primary_key=True),
    sa.Column("tenant", _name(96), primary_key=True, index=True),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    # Id of the key; "admin" for the admin key, "operator" for whoever uses a server without keys.
    sa.Column("actor", sa.String(32), nullable=False),
    sa.Column("tenant", sa.String(96), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("target", sa.Text, nullable=False),
    # Of the answer; 0: begun, and not completed (service/store/audit.py).
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("request_id", sa.String(128), nullable=False),
    sa.Index(None, "tenant", "number"),
    sqlite_autoincrement=True,
)

# Sums, to which every process adds (service/store/usage.py). `hour`: a whole one UTC.
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
    # Of `tenants`, or of one that has been deleted: a later tenant of the same name has another one. 0: nobody's, or a
    # tenant's that was deleted before numbers were noted here.
    sa.Column("tenant_number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("tenant", _name(96), primary_key=True),
    # Empty: no key (a server without tenants, or what no request asked for: loads).
    sa.Column("key", _name(64), primary_key=True),
    # `name`, `owner/name` of somebody else's, several of a mix joined with "+"; empty: the base model.
    sa.Column("adapter", _name(1600), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("first_tokens", sa.BigInteger, nullable=False),
    sa.Column("first_token_ms", sa.Float, nullable=False),
    sa.Column("loads", sa.BigInteger, nullable=False),
    sa.Column("byte_hours", sa.Float, nullable=False),
    sa.Index(None, "tenant_number", "hour"),
)

# What each service has of the limits of the tenants that use it (service/leases.py).
limit_leases = sa.Table(
    "limit_leases",
    metadata,
    sa.Column("tenant_number", sa.Integer, primary_key=True, autoincrement=False),
    # A name of service/limits.py.
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("instance", sa.String(64), primary_key=True),
    sa.Column("held", sa.BigInteger, nullable=False),
    sa.Column("wanted", sa.BigInteger, nullable=False),
    # By the database's clock.
    sa.Column("until", sa.BigInteger, nullable=False),
)
