"""Write blocks of a report as Markdown."""

import re


def count_cell(number):
    """Format a count for a table cell; a dash if there is none."""
    return "–" if number is None else f"{number:,}"


def table_rows(table, above=""):
    """Yield the rows of a nested dict; each innermost dict is one row."""
    for key, value in table.items():
        if isinstance(value, dict) and any(isinstance(v, dict) for v in value.values()):
            yield from table_rows(value, f"{above}{key}, ")
        elif isinstance(value, dict):
            yield [f"{above}{key}", ", ".join(f"{k} {_plain(v)}" for k, v in value.items()) or "none"]
        else:
            yield [f"{above}{key}", _plain(value)]


def _plain(value):
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not known"}[value]
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and abs(value) > 9999 else str(value)


def escape_markdown(text):
    r"""Escape plain text for Markdown, also inside table cells.

    Example
    -------
    >>> escape_markdown("<b> a_b _c_ [d](e) | `f`")
    '&lt;b&gt; a_b \\_c\\_ \\[d\\](e) \\| \\`f\\`'
    """
    text = re.sub(r"([\\`*~\[\]|])", r"\\\1", " ".join(str(text).split()))
    # An underscore between letters or digits needs no escape.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", text)
    return text.replace("<", "&lt;").replace(">", "&gt;")


def to_markdown(blocks):
    """Write blocks as GitHub-flavoured Markdown; a block of the kind "markdown" is copied."""
    lines = []
    for kind, *rest in blocks:
        if kind == "heading":
            lines.append("#" * rest[0] + " " + escape_markdown(rest[1]))
        elif kind == "warning":
            lines.append(f"> **{escape_markdown(rest[0])}**")
        elif kind == "text":
            lines.append(escape_markdown(rest[0]))
        elif kind == "list":
            lines.append("\n".join(f"* {escape_markdown(item)}" for item in rest[0]))
        elif kind == "table":
            header, rows = rest
            cells = [header, ["---"] * len(header), *rows]
            body = [[escape_markdown(c) if i != 1 else c for c in row] for i, row in enumerate(cells)]
            lines.append("\n".join("| " + " | ".join(row) + " |" for row in body))
        elif kind == "picture":
            lines.append(f"![{escape_markdown(rest[1])}]({rest[0]})")
        elif kind == "markdown":
            lines.append(rest[0])
        elif kind == "code":
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", rest[0])), default=0))
            lines.append(f"{fence}\n{rest[0]}\n{fence}")
    return "\n\n".join(lines) + "\n"
