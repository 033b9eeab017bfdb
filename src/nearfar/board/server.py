"""``nearfar board``: the application behind the pages. It reads, and writes nothing into the folder that it shows."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Annotated

from fastapi import Body, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from nearfar import __version__
from nearfar.board.discover import Place
from nearfar.board.embedding_map import Maps, methods, stored_map
from nearfar.board.models import Jobs, Models, compare_places, explain_place
from nearfar.board.run import examples_of, files_of, run_content, sections_of
from nearfar.board.table import Runs
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.serving.limits import PAGE_POLICY, Guard, Limits, Receive, Scope, Send

__all__ = ["build_board"]

log = logging.getLogger("nearfar.board")

#: as of a served run's page, but for styles: Plotly sets those of its charts in the page
POLICY = PAGE_POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
#: files of the served run's page that these pages share
_SHARED = ("parts.js", "style.css")
#: runs that are compared at a time
MOST = 60


def build_board(root: Path, *, hosts: Collection[str] = ("127.0.0.1", "localhost", "::1")) -> Guard:
    """The ASGI application: pages, what they ask for, and before all of them what is refused.

    Args:
        root: a folder of runs, a run, or a log.
        hosts: the names under which it may be asked (the ``Host`` header); ``*``: any.

    Raises:
        NearfarError: no such folder; Plotly is not installed.
    """
    limits = Limits(body=2**20, memory=2**24)
    return Guard(_Board(root, hosts), limits, hosts)


class _Board:
    def __init__(self, root: Path, hosts: Collection[str]) -> None:
        self.runs, self.jobs, self.models = Runs(root), Jobs(), Models(hosts)
        self.maps = Maps(self.models)
        self.files = _page_files()
        self.app = FastAPI(
            title="nearfar board",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            openapi_url=None,
            lifespan=self._lifespan,
            exception_handlers={
                NearfarError: _refused,
                RequestValidationError: _wrong,
                HTTPException: _nothing_here,
                Exception: _failed,
            },
        )
        self._routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Opened runs answer below ``/use/KEY/``, as `nearfar serve` would; all else is the board's own."""
        parts = scope.get("path", "").split("/", 3)
        if scope["type"] == "http" and len(parts) == 4 and parts[1] == "use":
            app = self.models.app(parts[2])
            if app is not None:
                await app(
                    {**scope, "path": f"/{parts[3]}", "raw_path": f"/{parts[3]}".encode()}, receive, send
                )
                return
        await self.app(scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.runs.begin()
        yield
        self.jobs.close()
        self.runs.close()
        await self.models.close(every=True)

    def _routes(self) -> None:
        add = self.app.add_api_route
        for path, name in (("/", "index.html"), ("/run/{key}", "run.html"), ("/compare", "compare.html")):
            add(path, self._page(name))
        add("/page/{name}", self.file)
        add("/api/runs", self.table)
        add("/api/runs/{key}", self.run)
        add("/api/runs/{key}/{part}", self.part)
        add("/api/runs/{key}/explain", self.explain, methods=["POST"])
        add("/api/runs/{key}/map", self.map, methods=["POST"])
        add("/api/runs/{key}/use", self.use, methods=["POST"])
        add("/api/runs/{key}/map/picture", self.picture)
        add("/api/runs/{key}/map/points.parquet", self.parquet)
        add("/api/compare", self.compare, methods=["POST"])
        add("/api/jobs/{identity}", self.job)

    # -- pages -----------------------------------------------------------------------------------------------
    def _page(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def page(request: Request) -> Response:
            return self._file(request, name)

        return page

    async def file(self, request: Request, name: str) -> Response:
        return self._file(request, name)

    def _file(self, request: Request, name: str) -> Response:
        if name not in self.files:
            raise HTTPException(404)
        path, tag = self.files[name]
        headers = {"cache-control": "no-cache", "etag": tag, "content-security-policy": POLICY}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        kind = f"{_KINDS[Path(name).suffix]}; charset=utf-8"
        return Response(path.read_bytes(), media_type=kind, headers=headers)

    # -- what there is ---------------------------------------------------------------------------------------
    async def table(self, request: Request) -> Response:
        return _tagged(request, await run_in_threadpool(self.runs.table))

    async def run(self, request: Request, key: str) -> Response:
        place = self.runs.place(key)
        content = await run_in_threadpool(run_content, place)
        return _tagged(request, content | {"name": place.name, "key": key})

    async def part(self, request: Request, key: str, part: str) -> Response:
        """What is read on request: examples, sections, files, the stored map."""
        readers: dict[str, Callable[[Place], object]] = {
            "examples": examples_of,
            "sections": sections_of,
            "files": files_of,
            "map": lambda place: {"methods": methods(), "stored": stored_map(place)},
        }
        if part not in readers:
            raise HTTPException(404)
        return _tagged(request, await run_in_threadpool(readers[part], self.runs.place(key)))

    # -- what takes longer -----------------------------------------------------------------------------------
    async def compare(
        self,
        runs: Annotated[list[str], Body(max_length=MOST)],
        baseline: Annotated[str | None, Body(max_length=2000)] = None,
        split: Annotated[str | None, Body(max_length=20)] = None,
    ) -> Response:
        places = [self.runs.place(key) for key in dict.fromkeys(runs)]
        state = tuple((place.key, place.stamp()) for place in places)
        job = self.jobs.start(
            ("compare", state, baseline, split), lambda say: compare_places(places, baseline, split, say)
        )
        return _json(job.to_dict())

    async def explain(
        self,
        key: str,
        batch: Annotated[int, Body(ge=1, le=10**9)],
        checkpoint: Annotated[str, Body(pattern="last|best")] = "last",
    ) -> Response:
        place = self.runs.place(key)
        state = ("explain", key, place.stamp(), batch, checkpoint)
        return _json(
            self.jobs.start(state, lambda say: explain_place(place, batch, checkpoint, say)).to_dict()
        )

    async def map(
        self, key: str, method: Annotated[str, Body(embed=True, max_length=20)] = "pca"
    ) -> Response:
        place = self.runs.place(key)
        state = ("map", key, place.stamp(), method)
        return _json(self.jobs.start(state, lambda say: self.maps.draw(place, method, say)).to_dict())

    async def use(self, key: str) -> Response:
        place = self.runs.place(key)
        gone = self.models.app(key) is None
        job = self.jobs.start(
            ("use", key, place.stamp()), lambda say: self.models.open(place, say), again=gone
        )
        return _json(job.to_dict())

    async def job(self, identity: str) -> Response:
        await self.models.close()
        return _json(self.jobs.get(identity).to_dict())

    # -- the map's items -------------------------------------------------------------------------------------
    async def picture(
        self, key: str, row: Annotated[int, Query(ge=0)], view: Annotated[str, Query(max_length=200)]
    ) -> Response:
        kind, content = await run_in_threadpool(self.maps.get(self.runs.place(key)).picture, row, view)
        return Response(content, media_type=kind, headers={"cache-control": "private, max-age=600"})

    async def parquet(self, key: str, method: Annotated[str, Query(max_length=20)] = "pca") -> Response:
        place = self.runs.place(key)
        content = await run_in_threadpool(self.maps.get(place).parquet, method)
        name = "".join(c if c.isascii() and (c.isalnum() or c in "=-._") else "_" for c in place.path.name)
        headers = {"content-disposition": f'attachment; filename="{name}-{method}.parquet"'}
        return Response(content, media_type="application/vnd.apache.parquet", headers=headers)


def _page_files() -> dict[str, tuple[Path, str]]:
    """The files that pages are made of, by name, each with a tag of its content."""
    own = Path(str(resources.files("nearfar.board") / "page"))
    files = {path.name: path for path in own.iterdir() if path.suffix in _KINDS}
    shared = Path(str(resources.files("nearfar.serving") / "page"))
    files |= {f"serving-{name}": shared / name for name in _SHARED}
    # Plotly's scripts lie in its package, which itself need not be imported.
    spec = importlib.util.find_spec("plotly")
    script = Path(
        str((spec.submodule_search_locations or [""])[0]) if spec else "", "package_data", "plotly.min.js"
    )
    if not script.is_file():
        raise NearfarError(
            "the board draws with Plotly, which is not installed: pip install 'nearfar[board]'."
        )
    files["plotly.js"] = script
    return {
        name: (path, f'"{hashlib.sha256(path.read_bytes()).hexdigest()[:20]}"')
        for name, path in files.items()
    }


# -- answers -------------------------------------------------------------------------------------------------
def _plain(value: object) -> object:
    """Numbers that JSON has not become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _bytes(content: object) -> bytes:
    return json.dumps(_plain(content), ensure_ascii=False, allow_nan=False, default=str).encode(
        "utf-8", "backslashreplace"
    )


def _json(content: Json, status: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(_bytes(content), status, media_type="application/json", headers=headers)


def _tagged(request: Request, content: object) -> Response:
    """JSON that a page asks for again and again: where nothing has changed it is not sent anew."""
    body = _bytes(content)
    headers = {"cache-control": "no-cache", "etag": f'"{hashlib.sha256(body).hexdigest()[:20]}"'}
    if request.headers.get("if-none-match") == headers["etag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _error(status: int, reason: str) -> JSONResponse:
    return JSONResponse({"error": reason, "problems": []}, status)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return _error(422, str(error))


async def _wrong(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _error(422, f"{'.'.join(str(each) for each in first['loc'][1:])}: {first['msg']}")


async def _nothing_here(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    reasons = {404: "there is nothing at this address", 405: "this address is not asked in this way"}
    return _error(error.status_code, reasons.get(error.status_code, str(error.detail)))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """An error of the board's own: the reason is in its log, under a number that the answer names."""
    number = secrets.token_hex(4)
    log.error("error %s at %s", number, request.url.path, exc_info=error)
    return _error(500, f"the board failed at this; its terminal has the reason under {number}")
