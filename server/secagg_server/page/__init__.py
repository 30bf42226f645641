"""The operator's page: three files that a browser shows, and the document that they show."""

from __future__ import annotations

from pathlib import Path

from secagg.certificates import Role
from secagg.monitor import Answer, Route, file_route
from secagg_server.overview import Overview

__all__ = ["page_routes"]

_FOLDER = Path(__file__).parent
# A second for all who look: many viewers cost the store what one does.
_FRESH_S = 1.0


def page_routes(overview: Overview) -> dict[str, Route]:
    """What the monitor shows to operators, by path."""

    def document() -> Answer:
        return Answer(overview.document(), "application/json")

    return {
        "/": file_route(_FOLDER / "page.html", "text/html; charset=utf-8"),
        "/page.css": file_route(_FOLDER / "page.css", "text/css; charset=utf-8"),
        "/page.js": file_route(_FOLDER / "page.js", "text/javascript; charset=utf-8"),
        "/icon.svg": file_route(_FOLDER / "icon.svg", "image/svg+xml"),
        "/overview.json": Route(
            document, in_thread=True, fresh_s=_FRESH_S, readers=(Role.OPERATOR,)
        ),
    }
