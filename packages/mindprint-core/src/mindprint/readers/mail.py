"""Mail: mbox, single messages (.eml) and Maildir. Only the words of the writer of each message."""

from __future__ import annotations

import mailbox
import re
from collections.abc import Iterable, Iterator
from email import message_from_bytes, policy
from email.utils import getaddresses
from pathlib import Path

from mindprint.contract import Document
from mindprint.errors import DataError
from mindprint.hookspecs import hookimpl
from mindprint.input_files import read_bytes
from mindprint.readers.markup import html_blocks
from mindprint.readers.text import plain_blocks

LARGEST_MESSAGE = 2**26

_MAILDIR = ("cur", "new", "tmp")

_ATTRIBUTION = re.compile(
    r"^(?:On\b.*\bwrote|Am\b.*\bschrieb.*|Le\b.*\ba écrit|El\b.*\bescribió|Il\b.*\bha scritto|Op\b.*\bschreef.*"
    r"|Em\b.*\bescreveu|Den\b.*\bskrev.*)\s*:\s*$",
    re.IGNORECASE | re.DOTALL,
)
_ORIGINAL = re.compile(
    r"^\s*(?:-{2,}\s*(?:Original Message|Forwarded message|Ursprüngliche Nachricht|Weitergeleitete Nachricht"
    r"|Message d'origine|Mensaje original|Messaggio originale)\s*-{2,}|_{20,}|Begin forwarded message:)\s*$",
    re.IGNORECASE,
)
_QUOTED_HEADER = re.compile(r"^\s*\*?(?:From|Von|De|Da|Van):\*?\s.*@", re.IGNORECASE)
_DEVICE = re.compile(r"^(?:Sent from my |Von meinem .* gesendet|Envoyé de mon |Enviado desde mi |Get Outlook for )")


@hookimpl
def mindprint_read_documents(path: Path, head: bytes) -> Iterable[Document] | None:
    """Read each message of a mailbox as a document."""
    if path.is_dir():
        return _maildir(path) if all((path / name).is_dir() for name in _MAILDIR) else None
    if path.suffix.lower() == ".eml":
        return _single(path)
    return _mbox(path) if head.startswith(b"From ") else None


def _single(path: Path) -> Iterator[Document]:
    try:
        content = read_bytes(path, LARGEST_MESSAGE)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    yield from _message(content, str(path))


def _mbox(path: Path) -> Iterator[Document]:
    box = mailbox.mbox(path, create=False)
    try:
        for key in box.iterkeys():
            yield from _message(box.get_bytes(key), f"{path}#{int(key) + 1}")
    finally:
        box.close()


def _maildir(path: Path) -> Iterator[Document]:
    box = mailbox.Maildir(path, create=False)
    for key in sorted(box.iterkeys()):
        yield from _message(box.get_bytes(key), f"{path}#{key}")


def _message(content: bytes, name: str) -> Iterator[Document]:
    """Yield a message as a document. One without text, or that cannot be taken apart, is left out."""
    if len(content) > LARGEST_MESSAGE:
        return
    try:
        message = message_from_bytes(content, policy=policy.default)
        sender = str(message.get("From", ""))
        body = message.get_body(("plain", "html"))
        if body is None:
            return
        text = str(body.get_content())
        is_html = body.get_content_type() == "text/html"
        flowed = body.get_param("format") == "flowed"
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError):
        # Among 100,000 messages some are broken in ways that the standard library does not survive.
        return
    if is_html:
        # Mail programs put quotations into `blockquote`, which HTML is read without.
        text = "\n\n".join(block.text for block in html_blocks(text))
    blocks = tuple(plain_blocks(own_text(_unflowed(text) if flowed else text)))
    if blocks:
        yield Document(name, _author(sender), blocks)


def own_text(text: str) -> str:
    """Return a message without quotations, what introduces them, and the signature."""
    lines: list[str] = []
    source = text.replace("\r\n", "\n").split("\n")
    for number, line in enumerate(source):
        # `-- ` on a line by itself begins a signature (RFC 3676, section 4.3). Many programs lose its space.
        if line in ("-- ", "--") or _ORIGINAL.match(line) or _DEVICE.match(line):
            break
        if _QUOTED_HEADER.match(line) and any(":" in after for after in source[number + 1 : number + 3]):
            break
        if not line.startswith(">"):
            lines.append(line)
            continue
        _drop_attribution(lines)
    # An attribution at the end introduces a quotation that was an HTML `blockquote`.
    _drop_attribution(lines)
    return "\n".join(lines).strip()


def _drop_attribution(lines: list[str]) -> None:
    """Remove `On Monday, Ada wrote:` from the end. It may be broken into three lines."""
    filled = [index for index, line in enumerate(lines) if line.strip()][-3:]
    for start in filled:
        if _ATTRIBUTION.match("\n".join(lines[start:]).strip()):
            del lines[start:]
            return


def _unflowed(text: str) -> str:
    """Join the lines that end with a space, which are one paragraph (RFC 3676, section 4.2)."""
    return re.sub(r"(?m)(?<!^--) \r?\n(?!>)", " ", text)


def _author(sender: str) -> str | None:
    """Return the sender's name and address, as far as they are given."""
    for name, address in getaddresses([sender]):
        if name and address:
            return f"{name} <{address}>"
        if name or address:
            return name or address
    return None
