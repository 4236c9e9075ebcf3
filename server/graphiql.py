"""The GraphiQL page, self-hosted: built from npm packages in `web/graphiql`, committed in `web/dist/graphiql`."""

from __future__ import annotations

import gzip
from pathlib import Path

import orjson
from aiohttp import web

_FOLDER = Path(__file__).parent.parent / "web" / "dist" / "graphiql"
# Everything from this server and no inline scripts; Monaco writes its styles inline.
_POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
_FOR_EVER = "public, max-age=31536000, immutable"


class GraphiQL:
    """The page and its assets; the files are read when they are first asked for and kept (2 MB in all)."""

    def __init__(self) -> None:
        self._manifest: dict[str, dict[str, str | None]] = orjson.loads((_FOLDER / "manifest.json").read_bytes())
        self._files: dict[str, bytes] = {}

    async def page(self, request: web.Request) -> web.Response:
        """The page."""
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return web.Response(body=self._read("index.html"), content_type="text/html", charset="utf-8", headers=headers)

    async def redirect(self, request: web.Request) -> web.Response:
        """From the server's root to the page."""
        raise web.HTTPFound("/graphql")

    async def asset(self, request: web.Request) -> web.Response:
        """A script, style, worker or icon of the page; its name has its hash, so it is cached for ever."""
        entry = self._manifest.get(f"/graphiql/{request.match_info['name']}")
        if entry is None:
            raise web.HTTPNotFound
        body = self._read(str(entry["file"]))
        headers = {
            "Content-Security-Policy": _POLICY,
            "Content-Type": str(entry["contentType"]),
            "Cache-Control": _FOR_EVER,
            "Vary": "Accept-Encoding",
        }
        if entry["encoding"] == "gzip":
            if "gzip" in request.headers.get("Accept-Encoding", ""):
                headers["Content-Encoding"] = "gzip"
            else:
                body = gzip.decompress(body)
        return web.Response(body=body, headers=headers)

    def _read(self, name: str) -> bytes:
        if name not in self._files:
            self._files[name] = (_FOLDER / name).read_bytes()
        return self._files[name]
