"""Blocks as Markdown, read back with a parser of CommonMark."""

import re
from html import unescape

from markdown_it import MarkdownIt

from accent_plugin.report.markdown import to_markdown

HOSTILE = "</table><script>a|b</script> [c](javascript:d) ![e](f) `g` *h* _i_ __j__ ~~k~~ \\| \n# l\r\n| m |"


def html_of(text):
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)


def visible(page):
    return unescape(re.sub("<[^>]*>", "", page)).strip()


def test_hostile_text_is_shown_as_it_is():
    plain = " ".join(HOSTILE.split())
    for block, before in (
        (("text", f"a {HOSTILE}"), "<p>a "),
        (("list", [f"a {HOSTILE}"]), "<ul>\n<li>a "),
        (("warning", f"a {HOSTILE}"), "<blockquote>\n<p><strong>a "),
    ):
        page = html_of(to_markdown([block]))
        assert page.startswith(before) and visible(page) == f"a {plain}"
        assert not re.search("<(script|a|img|em|code|s|table)[ >]", page)


def test_hostile_text_stays_in_its_cell():
    page = html_of(to_markdown([("table", [HOSTILE, "b"], [[HOSTILE, "c"], ["d", HOSTILE]])]))
    cells = [visible(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", page)]
    plain = " ".join(HOSTILE.split())
    assert cells == [plain, "b", plain, "c", "d", plain]


def test_names_with_underscores_stay_readable():
    assert to_markdown([("text", "accent_plugin and a_b_c")]) == "accent_plugin and a_b_c\n"
