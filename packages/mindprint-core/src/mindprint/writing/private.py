"""Private things in a text: addresses, numbers of telephones, accounts and cards, keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Private:
    """A private thing: its kind, and its place in the text."""

    kind: str
    start: int
    end: int


_EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]\d)")
# A number with a country code, or with three groups. Dates and years have neither.
_PHONE = re.compile(
    r"(?<![\w.])(?<!\d[ -])"
    r"(?:\+\d{1,3}[ ./-]?(?:\(\d+\)[ ./-]?)?\d[\d ./-]{5,13}\d|\(?0?\d{2,4}\)?[ -]\d{3,4}[ -]\d{3,5})"
    r"(?![\w-])(?! \d)"
)
_KEY = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|\b(?:sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|xox[abprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z0-9]{30,}"
    r"|AKIA[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|glpat-[A-Za-z0-9_-]{20,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,})"
)


def find_private(text: str) -> list[Private]:
    """Return the private things in a text, in its order. Of two that overlap the one of the earlier kind counts."""
    found: list[Private] = []
    for kind, pattern, is_valid in _KINDS:
        for match in pattern.finditer(text):
            apart = all(match.end() <= other.start or match.start() >= other.end for other in found)
            if apart and is_valid(match.group()):
                found.append(Private(kind, match.start(), match.end()))
    return sorted(found, key=lambda private: private.start)


def redact(text: str) -> str:
    """Return a text with its private things replaced by their kinds in brackets."""
    return "".join(_redacted(text))


def _redacted(text: str) -> Iterator[str]:
    at = 0
    for private in find_private(text):
        yield text[at : private.start]
        yield f"[{private.kind}]"
        at = private.end
    yield text[at:]


def _is_iban(text: str) -> bool:
    # ISO 13616: the first four characters go to the end, letters become numbers, and the rest modulo 97 is 1.
    compact = text.replace(" ", "")
    return int("".join(str(int(sign, 36)) for sign in compact[4:] + compact[:4])) % 97 == 1


def _is_card(text: str) -> bool:
    # Luhn's sum (ISO/IEC 7812-1): from the right every second digit is doubled, and its digits are added.
    digits = [int(sign) for sign in reversed(text) if sign.isdigit()]
    doubled = (sum(divmod(2 * digit, 10)) for digit in digits[1::2])
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _always(_: str) -> bool:
    return True


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("key", _KEY, _always),
    ("e-mail address", _EMAIL, _always),
    ("IBAN", _IBAN, _is_iban),
    ("card number", _CARD, _is_card),
    ("telephone number", _PHONE, _always),
)
