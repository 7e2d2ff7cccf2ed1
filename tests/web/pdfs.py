"""PDFs for the tests, written by hand: each object as it stands in the file."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence

from pypdf import PdfReader, PdfWriter

FONT = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"


def pdf(objects: Sequence[bytes]) -> bytes:
    """A file of these objects, numbered from 1; the first is the catalogue."""
    out, offsets = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, start)
    return bytes(out)


def stream(data: bytes, keys: bytes = b"") -> bytes:
    return b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(data), keys, data)


def drawn(lines: Sequence[str], x: int = 72) -> bytes:
    """What draws these lines below each other."""
    texts = b"".join(
        b"(%b) Tj T* " % line.encode("cp1252").replace(b"(", rb"\(").replace(b")", rb"\)") for line in lines
    )
    return b"BT /F1 11 Tf %d 760 Td 14 TL %bET" % (x, texts)


def pages(contents: Sequence[bytes], keys: bytes = b"") -> bytes:
    """A PDF with a page for each of these streams. `keys`: those of the streams."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count %d /Kids [%b] /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> >>"
        % (len(contents), kids),
        FONT,
    ]
    for number, content in enumerate(contents):
        objects.append(b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R >>" % (5 + 2 * number))
        objects.append(stream(content, keys))
    return pdf(objects)


def text_pdf(*texts: str) -> bytes:
    """A page for each text."""
    return pages([drawn(text.split("\n")) for text in texts])


def zip_bomb(n_bytes: int) -> bytes:
    """Three pages; the second one's content is so many bytes of drawing, packed to a hundredth."""
    unit = b"q 1 0 0 1 0 0 cm Q\n" * 50_000
    return pages(
        [
            zlib.compress(drawn(["before the bomb"])),
            zlib.compress(unit * (n_bytes // len(unit) + 1)),
            zlib.compress(drawn(["after the bomb"])),
        ],
        b"/Filter /FlateDecode",
    )


def deep_bomb() -> bytes:
    """A page whose content is packed three times: some kilobytes for a hundred gigabytes."""
    packed = b"\0" * 10_000_000
    for _ in range(3):
        packer = zlib.compressobj(9)
        packed = b"".join(packer.compress(packed) for _ in range(22)) + packer.flush()
    return pages([packed], b"/Filter [/FlateDecode /FlateDecode /FlateDecode]")


def looping_tree() -> bytes:
    """Two nodes of pages that are each other's child, and one page that says there are a billion."""
    return pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count 1000000000 /Kids [3 0 R 4 0 R] >>",
            b"<< /Type /Pages /Count 1000000000 /Kids [2 0 R 3 0 R] /Parent 2 0 R >>",
            b"<< /Type /Page /Parent 2 0 R /Contents 5 0 R /Resources << /Font << /F1 6 0 R >> >> >>",
            stream(drawn(["after the loop"])),
            FONT,
        ]
    )


def only_loop() -> bytes:
    return pdf(
        [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 9 /Kids [3 0 R] >>", b"<< /Kids [2 0 R] >>"]
    )


def endless_form() -> bytes:
    """A page that draws a form that draws itself, ten times each."""
    return pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
            b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /XObject << /X 5 0 R /Y 6 0 R >> >> >>",
            stream(b"/X Do " * 10),
            stream(b"/Y Do " * 10, b"/Type /XObject /Subtype /Form /Resources << /XObject << /X 5 0 R /Y 6 0 R >> >>"),
            stream(b"/X Do " * 10, b"/Type /XObject /Subtype /Form /Resources << /XObject << /X 5 0 R /Y 6 0 R >> >>"),
        ]
    )


def image_only() -> bytes:
    return pdf(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count 1 /Kids [3 0 R] /MediaBox [0 0 595 842] >>",
            b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /XObject << /Im1 5 0 R >> >> >>",
            stream(b"q 595 0 0 842 0 0 cm /Im1 Do Q"),
            stream(
                b"\x80" * 64,
                b"/Type /XObject /Subtype /Image /Width 8 /Height 8 /ColorSpace /DeviceGray /BitsPerComponent 8",
            ),
        ]
    )


def encrypted(data: bytes, password: str) -> bytes:
    """The same PDF, encrypted with RC4. Without a password everybody may open it."""
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(data)))
    writer.encrypt(password, owner_password="of the owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def padded(data: bytes, n_bytes: int) -> bytes:
    """The same PDF with so many bytes: an unused object stands behind its pages."""
    return data + b"%" + b"x" * (n_bytes - len(data) - 2) + b"\n"
