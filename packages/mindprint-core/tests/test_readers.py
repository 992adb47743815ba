"""Readers of people's files, on files that these tests write in each format."""

from __future__ import annotations

import json
import mailbox
import zipfile
from email.message import EmailMessage
from importlib import import_module
from pathlib import Path

import pytest

from mindprint.contract import Block, Document, Turn
from mindprint.errors import DataError
from mindprint.readers.finding import Reading, read_documents
from mindprint.readers.mail import own_text
from mindprint.readers.text import plain_blocks


def read(*paths: Path) -> tuple[list[Document], Reading]:
    reading = Reading()
    return list(read_documents(paths, reading)), reading


def texts(document: Document) -> list[str]:
    return [block.text for block in document.blocks]


def headings(document: Document) -> list[str]:
    return [block.text for block in document.blocks if block.heading]


def test_paragraphs_of_a_plain_text_are_joined_and_headings_are_found(tmp_path: Path) -> None:
    file = tmp_path / "river.txt"
    file.write_text("CHAPTER I\n\nThe ferry was late\nthat morning.\n\n* * *\n\nNobody minded.\n")
    ((document,), reading) = read(file)
    assert document.blocks == (
        Block("CHAPTER I", heading=True),
        Block("The ferry was late that morning."),
        Block("* * *", heading=True),
        Block("Nobody minded."),
    )
    assert reading.read == {str(file): 1}


@pytest.mark.parametrize(
    ("text", "heading"),
    [
        ("IV.", True),
        ("Chapter 12. The Moor", True),
        ("3. The Return", True),
        ("I said so, and he took me down.", False),
        ("Mix well and serve.", False),
        ("Parting is such sweet sorrow, she said.", False),
    ],
)
def test_a_heading_is_told_from_a_short_sentence(text: str, heading: bool) -> None:
    (block,) = plain_blocks(text)
    assert block.heading == heading


def test_a_text_without_empty_lines_has_a_paragraph_a_line() -> None:
    assert [block.text for block in plain_blocks("One long line here.\nAnd another one.")] == [
        "One long line here.",
        "And another one.",
    ]


def test_verse_keeps_its_lines() -> None:
    verse = "The tide came in,\nthe tide went out,\nand so did we."
    first, _ = plain_blocks(f"{verse}\n\nEnd of it.")
    assert first.text == verse


def test_the_licence_around_a_text_of_project_gutenberg_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text(
        "The Project Gutenberg eBook of Something\n\n*** START OF THE PROJECT GUTENBERG EBOOK SOMETHING ***\n\n"
        "Produced by Somebody\n\nIt was a fine day.\n\n*** END OF THE PROJECT GUTENBERG EBOOK SOMETHING ***\n\n"
        "Licence.\n"
    )
    ((document,), _) = read(file)
    assert texts(document) == ["It was a fine day."]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252"])
def test_encodings_are_detected(encoding: str, tmp_path: Path) -> None:
    sentence = "Die Fähre fährt heute später, weil der Fluß über die Ufer tritt; das Café öffnet früher. "
    file = tmp_path / "letter.txt"
    file.write_bytes((sentence * 20).encode(encoding))
    ((document,), _) = read(file)
    assert texts(document)[0].startswith(sentence.strip())


def test_markdown_is_read_without_code_quotes_and_front_matter(tmp_path: Path) -> None:
    file = tmp_path / "post.md"
    file.write_text(
        "---\ntitle: x\n---\n# On *tides*\n\nI wrote [this](http://a.b) with `care`\nyesterday.\n\n"
        "> Somebody else's words.\n\n```python\nprint()\n```\n\n- one thing\n- another\n\n![a boat](boat.png)\n"
    )
    ((document,), _) = read(file)
    assert document.blocks == (
        Block("On tides", heading=True),
        Block("I wrote this with care yesterday."),
        Block("one thing"),
        Block("another"),
    )


PAGE = """<html><head><title>T</title><style>p {}</style></head><body><nav><p>Home</p></nav>
<article><h1>A walk</h1><p>It rained<br>all day.</p><blockquote><p>Quoted.</p></blockquote>
<p>Then &amp; there.<script>x()</script></article><footer><p>Imprint</p></footer></body></html>"""


def test_a_page_is_read_without_what_surrounds_its_article(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(PAGE)
    ((document,), _) = read(file)
    assert document.blocks == (Block("A walk", heading=True), Block("It rained\nall day."), Block("Then & there."))


def epub(path: Path, **extra: str) -> Path:
    container = (
        '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="b/o.opf"/></rootfiles></container>'
    )
    package = (
        '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="one" href="one.xhtml"/>'
        '<item id="two" href="t%20wo.xhtml"/>'
        '<item id="notes" href="notes.xhtml"/></manifest><spine><itemref idref="two"/><itemref idref="one"/>'
        '<itemref idref="notes" linear="no"/></spine></package>'
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("META-INF/container.xml", container)
        archive.writestr("b/o.opf", package)
        for name, text in (("one", "First."), ("t wo", "Second."), ("notes", "A note.")):
            archive.writestr(f"b/{name}.xhtml", f"<html><body><p>{text}</p></body></html>")
        for name, text in extra.items():
            archive.writestr(name, text)
    return path


def test_a_book_is_read_in_the_order_of_its_spine(tmp_path: Path) -> None:
    ((document,), _) = read(epub(tmp_path / "book.epub"))
    assert texts(document) == ["Second.", "First."]


def test_an_encrypted_book_is_named(tmp_path: Path) -> None:
    encryption = '<encryption xmlns:e="x"><e:CipherReference URI="b/one.xhtml"/></encryption>'
    documents, reading = read(epub(tmp_path / "book.epub", **{"META-INF/encryption.xml": encryption}))
    assert documents == []
    assert "is encrypted" in reading.skipped[str(tmp_path / "book.epub")]


def test_a_word_document_is_read_with_its_headings(tmp_path: Path) -> None:
    docx = import_module("docx")
    made = docx.Document()
    made.add_heading("The crossing", 1)
    made.add_paragraph("We left at noon.")
    made.save(tmp_path / "trip.docx")
    ((document,), _) = read(tmp_path / "trip.docx")
    assert document.blocks == (Block("The crossing", heading=True), Block("We left at noon."))


def pdf(pages: list[list[str]]) -> bytes:
    """Return a PDF with lines of text, written by hand (ISO 32000-1, 7.5)."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>", b""]
    kids = []
    for lines in pages:
        shown = " ".join(f"1 0 0 1 50 {700 - 14 * n} Tm ({line}) Tj" for n, line in enumerate(lines))
        stream = f"BT /F1 12 Tf {shown} ET".encode()
        objects.append(b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream))
        font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R "
            b"/Resources << /Font << /F1 %b >> >> >>" % (len(objects), font)
        )
        kids.append(b"%d 0 R" % len(objects))
    objects[1] = b"<< /Type /Pages /Kids [%b] /Count %d >>" % (b" ".join(kids), len(kids))
    content, offsets = b"%PDF-1.4\n", []
    for number, value in enumerate(objects, 1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%b\nendobj\n" % (number, value)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(content)
    size = len(objects) + 1
    return (
        content
        + b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
        % (size, table, size, start)
    )


def test_a_pdf_is_read_without_running_titles_and_page_numbers(tmp_path: Path) -> None:
    body = ["The ferry was late that morning and nobody was waiting", "on the bank. It rained."]
    file = tmp_path / "memoir.pdf"
    file.write_bytes(pdf([["MY MEMOIR", *body, f"page {n}"] for n in range(1, 5)]))
    ((document,), _) = read(file)
    assert texts(document) == [" ".join(body)] * 4


def test_a_pdf_of_images_says_so(tmp_path: Path) -> None:
    file = tmp_path / "scan.pdf"
    file.write_bytes(pdf([[]]))
    documents, reading = read(file)
    assert documents == []
    assert "only images" in reading.skipped[str(file)]


def test_an_encrypted_pdf_is_named(tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    file = tmp_path / "locked.pdf"
    file.write_bytes(pdf([["Nobody reads this."]]))
    writer = pypdf.PdfWriter(clone_from=file)
    writer.encrypt("secret", algorithm="RC4-128")
    writer.write(file)
    assert read(file)[0] == []
    assert read(file)[1].skipped[str(file)] == "is encrypted; save it without a password"


MAIL = """Dear Tom,

I shall be there at four.

On Mon, 3 Mar 2025 at 10:00, Tom
<tom@example.org> wrote:
> When do you come?
>> Earlier.

--{space}
Ada Lovelace
""".format(space=" ")


def test_a_message_is_read_without_quotations_and_signature() -> None:
    assert own_text(MAIL) == "Dear Tom,\n\nI shall be there at four."


@pytest.mark.parametrize(
    "introduction",
    [
        "-----Original Message-----",
        "Am 03.03.2025 um 10:00 schrieb Tom:",
        "From: Tom <tom@example.org>\nSent: Monday\nSubject: Re: Tea",
    ],
)
def test_introductions_of_quotations_are_known(introduction: str) -> None:
    quoted = "" if introduction.startswith(("-", "From")) else "> "
    assert own_text(f"Yes, gladly.\n\n{introduction}\n{quoted}When do you come?") == "Yes, gladly."


def message(sender: str, body: str, *, html: bool = False) -> EmailMessage:
    made = EmailMessage()
    made["From"], made["Subject"] = sender, "Tea"
    made.set_content(body, subtype="html" if html else "plain")
    return made


def test_a_mailbox_is_read_message_by_message_with_its_senders(tmp_path: Path) -> None:
    box = mailbox.mbox(tmp_path / "sent.mbox")
    box.add(message("Ada Lovelace <ada@example.org>", MAIL))
    box.add(
        message(
            "=?utf-8?q?J=C3=BCrgen?= <j@example.org>",
            "<p>Hello <b>there</b>.</p><blockquote>old</blockquote>",
            html=True,
        )
    )
    box.close()
    (documents, _) = read(tmp_path / "sent.mbox")
    assert [(document.author, texts(document)) for document in documents] == [
        ("Ada Lovelace <ada@example.org>", ["Dear Tom,", "I shall be there at four."]),
        ("Jürgen <j@example.org>", ["Hello there."]),
    ]
    assert documents[1].name.endswith("sent.mbox#2")


def test_a_maildir_is_one_mailbox_and_not_a_folder_of_files(tmp_path: Path) -> None:
    box = mailbox.Maildir(tmp_path / "mail")
    box.add(message("ada@example.org", "It is raining again."))
    box.close()
    documents, reading = read(tmp_path)
    assert [texts(document) for document in documents] == [["It is raining again."]]
    assert list(reading.read) == [str(tmp_path / "mail")]


WHATSAPP = """[03.03.25, 10:00:01] Tom: When do you come?
[03.03.25, 10:00:40] Ada: At four.
Or five.
[03.03.25, 10:01:00] Ada: \u200eimage omitted
[03.03.25, 10:02:00] Messages are end-to-end encrypted.
[03.03.25, 10:03:00] Tom: Good.
"""


@pytest.mark.parametrize("style", ["ios", "android", "american"])
def test_a_whatsapp_chat_is_a_conversation(style: str, tmp_path: Path) -> None:
    text = WHATSAPP
    if style == "android":
        text = text.replace("[03.03.25, 10:", "03/03/2025, 10:").replace("] ", " - ").replace(":01 - ", " - ")
    if style == "american":
        text = text.replace("03.03.25", "3/3/25").replace("] ", "\u202fAM] ")
    file = tmp_path / "chat.txt"
    file.write_text(text)
    ((document,), _) = read(file)
    assert document.turns == (Turn("Tom", "When do you come?"), Turn("Ada", "At four.\nOr five."), Turn("Tom", "Good."))


EXPORTS = {
    "telegram": {
        "name": "Tom",
        "type": "personal_chat",
        "messages": [
            {"type": "service", "text": ""},
            {"type": "message", "from": "Tom", "text": "When?"},
            {"type": "message", "from": "Ada", "text": ["At ", {"type": "bold", "text": "four"}, "."]},
            {"type": "message", "from": "Ada", "text": "Forwarded.", "forwarded_from": "Zoe"},
        ],
    },
    "discord": {
        "channel": {"name": "tea"},
        "messages": [
            {"type": "Default", "author": {"name": "tom1", "nickname": "Tom"}, "content": "When?"},
            {"type": "Reply", "author": {"name": "Ada"}, "content": "At four."},
            {"type": "GuildMemberJoin", "author": {"name": "Zoe"}, "content": "Joined."},
        ],
    },
    "slack": [
        {"type": "message", "ts": "1", "user": "U1", "text": "When?", "user_profile": {"real_name": "Tom"}},
        {"type": "message", "ts": "2", "user": "U2", "text": "At four.", "user_profile": {"real_name": "Ada"}},
        {"type": "message", "ts": "3", "user": "U2", "subtype": "channel_join", "text": "<@U2> joined"},
    ],
}
OF_MODELS = {
    "chatgpt": [
        {
            "current_node": "c",
            "mapping": {
                "a": {"parent": None, "message": None},
                "b": {"parent": "a", "message": {"author": {"role": "user"}, "content": {"parts": ["When?"]}}},
                "c": {"parent": "b", "message": {"author": {"role": "assistant"}, "content": {"parts": ["At four."]}}},
                "d": {"parent": "a", "message": {"author": {"role": "user"}, "content": {"parts": ["Edited away."]}}},
            },
        }
    ],
    "claude": [
        {
            "chat_messages": [
                {"sender": "human", "text": "When?", "content": [{"type": "text", "text": "When?"}]},
                {"sender": "assistant", "text": "At four."},
            ]
        }
    ],
}


@pytest.mark.parametrize("service", EXPORTS)
def test_an_export_of_a_service_is_a_conversation(service: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(EXPORTS[service]))
    ((document,), _) = read(tmp_path)
    assert document.turns == (Turn("Tom", "When?"), Turn("Ada", "At four."))


@pytest.mark.parametrize("service", OF_MODELS)
def test_the_person_of_an_export_of_talks_with_a_model_has_no_name(service: str, tmp_path: Path) -> None:
    (tmp_path / "conversations.json").write_text(json.dumps(OF_MODELS[service]))
    ((document,), _) = read(tmp_path)
    assert document.turns == (Turn(None, "When?"), Turn("assistant", "At four."))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "is empty"),
        ("photo.txt", b"\x89PNG\r\n\0\0", "no reader knows"),
        ("table.xlsx", b"PK\x03\x04", "no reader knows"),
        ("broken.epub", b"PK\x03\x04broken", "not a readable EPUB"),
        ("broken.json", b'{"messages": [', "not valid JSON"),
        ("other.json", b'{"a": 1}', "no reader knows"),
        ("odd.json", b'{"name": "x", "type": "y", "messages": [1]}', "not a chat export"),
        ("old.doc", b"\xd0\xcf\x11\xe0", "before 2007"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_the_others_are_read(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "zz.txt").write_text("It was a fine day.")
    documents, reading = read(tmp_path)
    assert [texts(document) for document in documents] == [["It was a fine day."]]
    assert words in reading.skipped[str(tmp_path / name)]


def test_hidden_files_and_links_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("Not meant.")
    (tmp_path / "in" / ".hidden.txt").write_text("Not meant.")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert read(tmp_path / "in")[0] == []


def test_a_path_that_does_not_exist_stops() -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read(Path("nowhere"))


def install_reader(site: Path, name: str, code: str) -> None:
    """Install a reader as a distribution in `site`: a module and its metadata."""
    metadata = site / f"{name}_reader-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-reader\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[mindprint.readers]\n{name} = {name}_reader\n")
    (site / f"{name}_reader.py").write_text(code)


READER = """\
from mindprint import hookimpl
from mindprint.contract import Block, Document


@hookimpl
def mindprint_read_documents(path, head):
    return [Document(str(path), blocks=(Block("a tape"),))] if path.suffix in (".tape", ".txt") else None
"""


def test_a_reader_of_another_distribution_comes_first_and_a_broken_one_keeps_no_file_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_reader(tmp_path / "site", "tape", READER)
    install_reader(tmp_path / "site", "broken", "import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    folder = tmp_path / "writing"
    folder.mkdir()
    for name in ("a.tape", "b.txt", "c.md"):
        (folder / name).write_text("Nobody minded.")
    documents, reading = read(folder)
    assert [texts(document) for document in documents] == [["a tape"], ["a tape"], ["Nobody minded."]]
    assert list(reading.broken) == ["broken"]
    assert "nothing_of_this_name" in reading.broken["broken"]
