"""The chat page: all files exist, and none loads from another host."""

import re
from pathlib import Path

import maxlm.serve.page

STATIC = Path(maxlm.serve.page.__file__).parent / "static"


def test_page_and_all_its_files_are_served(http):
    page = http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    for path in named:  # extended by the scripts' imports
        for name in re.findall(r'from "\./([^"]+)"', http.get(path).text):
            if (imported := f"/static/{name}") not in named:
                named.append(imported)
    assert sorted(path.removeprefix("/static/") for path in named) == sorted(
        file.name for file in STATIC.iterdir() if file.name != "index.html"
    )
    for path in named:
        reply = http.get(path)
        assert reply.status_code == 200
        assert reply.headers["content-type"].split(";")[0] in ("text/css", "text/javascript")


def test_nothing_names_another_host():
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        text = re.sub(r"^// .*$", "", text, flags=re.M)
        assert not re.search(r"https?:|//[a-z0-9.-]+\.[a-z]{2,}|@import|url\(", text), file.name


def test_policy_forbids_loading_from_other_hosts(http):
    policy = http.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = http.get("/").text
    assert not re.search(r"<script(?![^>]*src=)|\son\w+=|\sstyle=", page), "the policy forbids inline code and style"


def test_every_control_has_a_name_and_every_script_reference_exists():
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert set(re.findall(r'\$\("([^"]+)"\)', (STATIC / "app.js").read_text(encoding="utf-8"))) <= ids
    assert set(re.findall(r'\bfor="([^"]+)"', page)) <= ids
    labelled = set(re.findall(r'<label[^>]*\bfor="([^"]+)"', page))
    for tag in re.findall(r"<(?:input|textarea)[^>]*>", page):
        if 'type="radio"' not in tag:
            assert re.search(r'\bid="([^"]+)"', tag)[1] in labelled, tag
    for tag, inside in re.findall(r"(<button[^>]*>)(.*?)</button>", page, re.S):
        assert "aria-label" in tag or re.sub(r"<svg.*?</svg>|<[^>]+>", "", inside, flags=re.S).strip(), tag
    assert '<html lang="en">' in page


def test_fastapi_documentation_pages_are_disabled(http):
    assert http.get("/docs").status_code == 404
    assert http.get("/redoc").status_code == 404
    assert http.get("/openapi.json").status_code == 200


def test_render_endpoint(http):
    reply = http.post("/render", json={"text": "**a**\n\nb"})
    assert reply.json() == {"finished": [], "open": ["<p><strong>a</strong></p>\n", "<p>b</p>\n"], "consumed": 0}
    assert http.post("/render", json={"text": "a" * 100_000}).status_code == 400
    assert (
        http.post("/render", content=b'{"text": "\\ud800"}', headers={"Content-Type": "application/json"}).status_code
        == 400
    )
