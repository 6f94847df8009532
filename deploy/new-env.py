#!/usr/bin/env python3
"""Prints an .env file for docker-compose.yml's profile `full`, with secrets drawn now: deploy/new-env.py > .env

Needs nothing but Python, and does not touch what is there: `>` would, so keep the file once it is in use.
"""

import secrets
import sys

postgres, s3 = secrets.token_hex(24), secrets.token_hex(24)
sys.stdout.write(f"""\
# Made by deploy/new-env.py. Whoever has this file has everything: keep it out of version control and backups of others.
COMPOSE_PROFILES=full
LORAPLEX_ADMIN_KEY={secrets.token_urlsafe(32)}
LORAPLEX_ALLOW_PUBLIC=false
LORAPLEX_LOG_FORMAT=json
LORAPLEX_METRICS_TOP_ADAPTERS=20
LORAPLEX_METRICS_TOP_TENANTS=20
LORAPLEX_DATABASE_URL=postgresql://loraplex:{postgres}@postgres/loraplex
LORAPLEX_BLOBS_URL=s3://loraplex/adapters?endpoint=http://s3:8333
POSTGRES_PASSWORD={postgres}
AWS_ACCESS_KEY_ID=loraplex
AWS_SECRET_ACCESS_KEY={s3}
GRAFANA_PASSWORD={secrets.token_urlsafe(12)}
""")
