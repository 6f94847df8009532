"""How many bytes of the device each account may take up, and whose turn it is where that is limited. Pure Python.

    leased, or waited for by somebody let in   <=   limit         so what is let in always finds room, once
    resident (copies under way included)       <=   limit         the account's blocks that nobody needs have gone

Who waits is let in by age. Each account is a line of its own: the first that does not fit closes it, and nobody
younger is let in there until it fits, so a mix of blocks that are leased now cannot pass it for ever. A set with
blocks of several accounts stands in each line, and has its room kept in those where it fits: leases come back, so the
oldest waiter of all fits everywhere in the end. Who is not let in holds nothing real, and accounts of which he wants
nothing do not notice him.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from adapters.keys import account_of


@dataclass(eq=False, slots=True)
class _Line:
    """Of an account with a limit."""

    limit: int
    taken: set[str] = field(default_factory=set)
    nbytes: int = 0
    closed: bool = False


class Accounts:
    """Limits, what is resident, and who is let in. Accounts without a limit take whatever there is."""

    def __init__(self, size_of: Callable[[str], int], is_known: Callable[[str], bool]) -> None:
        """`size_of`: a block's size on the device; 0 while it is not known. `is_known`: whether it is, and stays so."""
        self._size_of = size_of
        self._is_known = is_known
        self._lines: dict[str, _Line] = {}
        self._used: dict[str, int] = {}
        self.exceeded: set[str] = set()
        """Accounts with more on the device than a limit that was lowered since."""

    # ------------------------------------------------------------ limits

    @property
    def limited(self) -> bool:
        """Whether any account is."""
        return bool(self._lines)

    def limit(self, account: str, nbytes: int | None) -> bool:
        """Sets the limit of an account (None: lifts it); whether that changed anything. Then `begin` anew."""
        line = self._lines.get(account)
        if not account or nbytes == (None if line is None else line.limit):
            return False
        if nbytes is None:
            del self._lines[account]
        else:
            self._lines[account] = _Line(nbytes)
        self._note(account)
        return True

    def too_small(self, need: Iterable[str]) -> tuple[str, int, int] | None:
        """(account, bytes of it in `need` as far as they are known, its limit), if that can never be let in."""
        sums: dict[str, int] = {}
        for key in need if self._lines else ():
            account = account_of(key)
            sums[account] = sums.get(account, 0) + self._size_of(key)
        for account, nbytes in sums.items():
            line = self._lines.get(account)
            if line is not None and nbytes > line.limit:
                return account, nbytes, line.limit
        return None

    # ------------------------------------------------------------ who is let in

    def begin(self, leased: Iterable[str]) -> None:
        """Everything afresh, from the blocks that are leased."""
        for line in self._lines.values():
            line.taken, line.nbytes, line.closed = set(), 0, False
        for key in leased if self._lines else ():
            own = self._lines.get(account_of(key))
            if own is not None and key not in own.taken:
                own.taken.add(key)
                own.nbytes += self._size_of(key)

    def enter(self, need: Iterable[str]) -> bool:
        """Whether the next one by age, who needs these blocks, is let in. One with a block whose size is not known is
        not, but does not close the line either: he takes his place by age once it is."""
        wanted: dict[str, list[str]] = {}
        for key in need if self._lines else ():
            account = account_of(key)
            if account in self._lines:
                wanted.setdefault(account, []).append(key)
        let_in = True
        for account, keys in wanted.items():
            line = self._lines[account]
            if line.closed or not all(map(self._is_known, keys)):
                let_in = False
                continue
            extra = [key for key in keys if key not in line.taken]
            nbytes = sum(map(self._size_of, extra))
            if line.nbytes + nbytes > line.limit:
                line.closed = True
                let_in = False
            else:
                line.taken.update(extra)
                line.nbytes += nbytes
        return let_in

    # ------------------------------------------------------------ what is resident

    def arrives(self, account: str, nbytes: int) -> None:
        """A copy to the device begins."""
        if account:
            self._used[account] = self._used.get(account, 0) + nbytes

    def leaves(self, account: str, nbytes: int) -> None:
        if account:
            self._used[account] -= nbytes
            if not self._used[account]:
                del self._used[account]
            self._note(account)

    def used(self, account: str) -> int:
        return self._used.get(account, 0)

    def excess(self, account: str, nbytes: int = 0) -> int:
        """Bytes that have to leave the account before `nbytes` more may come; 0 or less: none."""
        line = self._lines.get(account)
        return 0 if line is None else self.used(account) + nbytes - line.limit

    def _note(self, account: str) -> None:
        """More than the limit is resident only because the limit was lowered: nothing arrives beyond it."""
        if self.excess(account) > 0:
            self.exceeded.add(account)
        else:
            self.exceeded.discard(account)

    def problems(self, resident: dict[str, int]) -> Iterable[str]:
        """What is inconsistent; `resident`: bytes of each account's blocks on the device."""
        if resident != self._used:
            yield f"bytes of accounts are {self._used}, not {resident}"
        for account, line in self._lines.items():
            if self.used(account) > line.limit and account not in self.exceeded:
                yield f"account {account} has {self.used(account)} bytes on the device, {line.limit} are allowed"
