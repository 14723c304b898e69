"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from huoyan.errors import InputError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 1000,
    "m": MIB, "mib": MIB, "mb": 1000**2,
    "g": GIB, "gib": GIB, "gb": 1000**3,
    "t": GIB << 10, "tib": GIB << 10, "tb": 1000**4,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(value: str | int, name: str = "memory") -> int:
    """Bytes of "24GiB", "24G" (the same), "24 GB" (10⁹ each), "800MiB", or a number of bytes.

    Raises:
        InputError: none of these, or nothing; the line has `name`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        amount = float(value)
    else:
        match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
        unit = _UNITS.get(match.group(2).lower()) if match else None
        if match is None or unit is None:
            raise InputError(f"{name} is {value!r}: give an amount such as 24GiB or 800MiB")
        amount = float(match.group(1)) * unit
    if amount < 1:
        raise InputError(f"{name} is {value!r}: it must be more than nothing")
    return int(amount)


def gib(count: int) -> str:
    """`15.1 GiB`, `812 MiB`, `3 KiB`."""
    if abs(count) >= GIB:
        return f"{count / GIB:.1f} GiB"
    return f"{count / MIB:.0f} MiB" if abs(count) >= MIB else f"{count / KIB:.0f} KiB"
