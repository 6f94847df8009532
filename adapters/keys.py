"""What an adapter is known by in memory: its content's digest and, where there are several, the account it counts for.

Files are found by the digest alone. In memory each account has its own copy of equal content: so nobody can tell by
an adapter's state, or change by unloading it, what another one does with the same bytes.
"""

from __future__ import annotations

_SEPARATOR = "@"


def key_of(digest: str, account: str = "") -> str:
    """The key of the content `digest` for `account` (any text); the digest itself without one."""
    return f"{digest}{_SEPARATOR}{account}" if account else digest


def digest_of(key: str) -> str:
    return key.partition(_SEPARATOR)[0]


def account_of(key: str) -> str:
    """Empty: nobody's."""
    return key.partition(_SEPARATOR)[2]
