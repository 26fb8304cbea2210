"""The chat page: its static files, and rendering of Markdown answers to HTML."""

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field

from maxlm.serve.markdown import Rendered, render_markdown

STATIC = Path(__file__).parent / "static"

# Rendering takes a second for the worst text of this length; the page shows a longer one as plain text.
MAX_MARKDOWN_LENGTH = 50_000

# The page loads nothing from other hosts, and the browser enforces it.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


class MarkdownBody(BaseModel):
    """`POST /render`."""

    model_config = ConfigDict(extra="forbid")
    text: Annotated[str, Field(max_length=MAX_MARKDOWN_LENGTH)]


@router.get("/")
async def page() -> Response:
    return FileResponse(STATIC / "index.html", headers=_HEADERS)


# Not async: rendering must not block the event loop, which streams the tokens.
@router.post("/render")
def render(body: MarkdownBody) -> Rendered:
    return render_markdown(body.text)


class _StaticFiles(StaticFiles):
    """Static files that the browser revalidates each time, so that two versions never mix."""

    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_HEADERS)
        return response


def add_page(app: FastAPI) -> None:
    app.include_router(router)
    app.mount("/static", _StaticFiles(directory=STATIC), name="static")
