"""Markdown of answers: correct, sanitized, and the same whether rendered at once or incrementally."""

import pytest

from maxlm.serve.markdown import render_markdown

DOCUMENT = """\
# Copying 😀 files

A *first* line\twith `code`
and a **second** one

1. Open it:
   ```python
   with open("a") as file:

       print(file)
   ```
   - nested with [a link](https://example.org/a_(b))
   - ~~gone~~

2. Close it
10. Ten

* another list
- and one more
2

Heading
---

| left | right |
|------|------:|
| `a|` | 2 |

> quoted
lazily
> > twice
***
    indented code

    goes on

~~~
open to the end
"""


def whole(text):
    rendered = render_markdown(text)
    return "".join(rendered.finished + rendered.open)


@pytest.mark.parametrize("document", [DOCUMENT, DOCUMENT.replace("\n", "\r\n"), DOCUMENT.replace("\n", "\r")])
def test_finished_blocks_do_not_change_as_text_is_appended(document):
    finished, begin = [], 0
    for end in range(len(document) + 1):
        rendered = render_markdown(document[begin:end])
        finished += rendered.finished
        # Characters outside the BMP count twice, as in JavaScript.
        begin += len(document[begin:end].encode("utf-16-le")[: 2 * rendered.consumed].decode("utf-16-le"))
    assert len(finished) >= 9
    assert "".join(finished + rendered.open) == whole(document)


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("", ""),
        ("a\nb", "<p>a<br>\nb</p>\n"),
        ("3. a\n   ```py\n   x\n   ```", '<ol start="3">\n<li>a<pre><code>x\n</code></pre>\n</li>\n</ol>\n'),
        ("- a\n  - b", "<ul>\n<li>a\n<ul>\n<li>b</li>\n</ul>\n</li>\n</ul>\n"),
        ("> a\n> > b", "<blockquote>\n<p>a</p>\n<blockquote>\n<p>b</p>\n</blockquote>\n</blockquote>\n"),
        ("snake_case_name and 2*3*4", "<p>snake_case_name and 2<em>3</em>4</p>\n"),
        ("file.py at me@example", "<p>file.py at me@example</p>\n"),
        ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>\n"),
        ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>\n"),
        ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>\n"),
        ("| a |\n|--:|\n| 1 |", '<th align="right">a</th>'),
        ("https://example.org/a_b_c.", 'href="https://example.org/a_b_c" target="_blank" rel="noopener noreferrer"'),
        ("![a *cat*](https://example.org/c.png)", 'rel="noopener noreferrer">a cat</a></p>'),
        ("[![cat](https://example.org/c.png)](https://example.org)", ">cat</a></p>"),
        ("[home](/v1/models)", '<p><a target="_blank" rel="noopener noreferrer">home</a></p>\n'),
        ("[a]\n\n[a]: https://example.org", '<a href="https://example.org"'),
        ("[" * 300 + ">" * 300, "["),
    ],
)
def test_markdown(text, html):
    assert html in whole(text)
    assert not any(word in whole(text) for word in ("<img", "<script", "style=", 'href="/'))
