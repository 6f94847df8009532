"""Names of adapters and aliases, and the model strings of requests."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
ALIAS = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,95}")

NAME_RULE = "1 to 96 letters, digits, '.', '_' or '-', beginning with a letter or digit"
ALIAS_RULE = "1 to 96 letters, digits, '.', '_' or '-', beginning with a letter"

Selector = int | str | None
"""A version number, an alias, or None for the default version."""

_MAX_NUMBER = 2**31 - 1  # the column's type on PostgreSQL


def valid_name(name: str) -> bool:
    return NAME.fullmatch(name) is not None


def valid_alias(alias: str) -> bool:
    return ALIAS.fullmatch(alias) is not None


def parse_selector(text: str) -> Selector:
    """`3` is a version, `prod` an alias. Raises ValueError for anything else (an alias starts with a letter)."""
    if text.isascii() and text.isdigit():
        number = int(text[:12])
        if 1 <= number <= _MAX_NUMBER:
            return number
    elif valid_alias(text):
        return text
    raise ValueError(f"{text!r} is neither a version number nor an alias")


def split_model(model: str) -> tuple[str, str | None]:
    """`adapter@selector` -> (adapter, selector); the selector is None when there is none."""
    name, at, selector = model.partition("@")
    return name, selector if at else None


def split_owner(name: str, tenant: str) -> tuple[str, str]:
    """`owner/adapter` -> (owner, adapter); a plain name is the tenant's."""
    owner, slash, rest = name.partition("/")
    return (owner, rest) if slash else (tenant, name)
