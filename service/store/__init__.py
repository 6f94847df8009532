"""The catalogue: names, versions and aliases of adapters, in SQLite or PostgreSQL.

Read catalogue.py first (what there is), then edits.py (how it changes). Files' bytes are in adapters/blobs.py. Nothing
is imported here: settings need names.py and the supervisor backup.py, and neither needs SQLAlchemy, which takes half a
second of processor to import.
"""
