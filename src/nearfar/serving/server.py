"""``nearfar serve``: a trained run behind HTTP, with a page to ask it on."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from nearfar import __version__
from nearfar.data.files import Json
from nearfar.errors import NearfarError
from nearfar.serving.batcher import Batcher, Busy
from nearfar.serving.gallery import Gallery
from nearfar.serving.limits import Budget, Guard, Limits, Receive, Scope, Send
from nearfar.serving.messages import (
    Decoder,
    Description,
    EmbedRequest,
    EmbedResponse,
    ErrorResponse,
    GalleryPage,
    Health,
    PredictRequest,
    PredictResponse,
    Problem,
    SearchRequest,
    SearchResponse,
    Slide,
)
from nearfar.serving.service import Asked, EmbedKey, PredictKey, SearchKey, Service

if TYPE_CHECKING:
    from nearfar.serving.trained import Trained

__all__ = ["build_app"]

log = logging.getLogger("nearfar.serving")

_PAGE = {
    "index.html": "text/html; charset=utf-8",
    "api.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "parts.js": "text/javascript; charset=utf-8",
    "results.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
}
_ERRORS: dict[int | str, Json] = {
    status: {"model": ErrorResponse, "description": why}
    for status, why in {
        422: "A value, a name or a field is wrong; the answer says which, and what there is.",
        413: "The request is too large.",
        503: "The server has enough to do; `Retry-After` says when to come again.",
        504: "The answer took too long.",
    }.items()
}
_KEPT = {"cache-control": "private, max-age=3600"}
_FRESH = {"cache-control": "no-store"}


def build_app(
    trained: Trained,
    gallery: Gallery | None = None,
    *,
    limits: Limits | None = None,
    hosts: Collection[str] = ("127.0.0.1", "localhost", "::1"),
    wait: float = 0.004,
    batch: int = 64,
) -> Guard:
    """The ASGI application: JSON endpoints, the page, and before all of them what is refused.

    Args:
        trained: what `nearfar.load` gives.
        gallery: what is searched in; None: nothing is.
        limits: the most that is taken of everything.
        hosts: the names under which it may be asked (the ``Host`` header); ``*``: any.
        wait: seconds that a value waits for others, so that they go through the model together.
        batch: values that go through the model together.
    """
    server = _Server(Service(trained, gallery), limits or Limits(), wait, batch)
    return Guard(server, server.limits, hosts)


class _Server:
    def __init__(self, service: Service, limits: Limits, wait: float, batch: int) -> None:
        self.service, self.limits = service, limits
        self.batcher = Batcher(service.work, wait, batch, limits.waiting)
        self.pixels = Budget(10 * limits.memory, "bytes of pictures")
        self.decode = Decoder(limits.characters, limits.numbers, limits.pixels)
        self.decoding = asyncio.Semaphore(2)
        self.description = service.describe(limits)
        self.began, self.open, self.stopping = time.monotonic(), 0, False
        self.page = {
            name: (resources.files("nearfar.serving") / "page" / name).read_bytes() for name in _PAGE
        }
        self.app = FastAPI(
            title=f"nearfar · {self.description.name}",
            version=__version__,
            description="Embed, search and predict with a trained run.",
            docs_url=None,  # they load their scripts from elsewhere
            redoc_url=None,
            lifespan=self._lifespan,
            exception_handlers={
                RequestValidationError: _wrong_request,
                HTTPException: _http_error,
                NearfarError: _wrong_value,
                Busy: _busy,
                Exception: _failed,
            },
        )
        self._questions: dict[str, tuple[type[BaseModel], Callable[[Any], Awaitable[Response]]]] = {
            "/embed": (EmbedRequest, self.embed),
            "/search": (SearchRequest, self.search),
            "/predict": (PredictRequest, self.predict),
        }
        self._routes()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Questions are answered here, all other addresses by FastAPI, which describes them all.

        Its way to a function and back takes longer than the rest of a small question, and with many clients the time
        of all of them adds up.
        """
        asked = self._questions.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if asked is None:
            await self.app(scope, receive, send)
            return
        model, answer = asked
        request = Request(scope)
        try:
            response = await answer(model.model_validate_json((await receive())["body"]))
        except ValidationError as error:
            response = _wrong_fields(
                error.errors(include_url=False, include_context=False, include_input=False)
            )
        except NearfarError as error:
            response = await _wrong_value(request, error)
        except Busy as busy:
            response = await _busy(request, busy)
        except Exception as error:
            response = await _failed(request, error)
        await response(scope, receive, send)

    def _routes(self) -> None:
        add = self.app.add_api_route
        add("/health", self.health, response_model=Health, summary="Does it answer, and how much waits?")
        add("/describe", self.describe, response_model=Description, summary="What is served.")
        for path, endpoint, model, summary in (
            ("/embed", self.embed, EmbedResponse, "Values to unit vectors."),
            ("/search", self.search, SearchResponse, "The items of the gallery that are nearest to a query."),
            ("/predict", self.predict, PredictResponse, "Predictions for items, where the run makes any."),
        ):
            add(path, endpoint, methods=["POST"], response_model=model, responses=_ERRORS, summary=summary)
        add(
            "/gallery",
            self.browse,
            response_model=GalleryPage,
            responses=_ERRORS,
            summary="Items of the gallery.",
        )
        add(
            "/gallery/slide", self.slide, response_model=Slide, responses=_ERRORS, summary="Spots of a slide."
        )
        add("/gallery/{position}/{view}", self.picture, response_class=Response, responses=_ERRORS,
            summary="A picture of a value of the gallery.")  # fmt: skip
        for path, name in (("/", "index.html"), ("/docs", "api.html")):
            self.app.add_route(path, self._file(name), include_in_schema=False)
        for name in _PAGE:
            self.app.add_route(f"/page/{name}", self._file(name), include_in_schema=False)

    def _file(self, name: str) -> Callable[[Request], Awaitable[Response]]:
        async def page(request: Request) -> Response:
            return Response(self.page[name], media_type=_PAGE[name], headers={"cache-control": "no-cache"})

        return page

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        await self.close()

    async def close(self) -> None:
        """Take nothing more, and let the model go."""
        self.stopping = True
        await self.batcher.close()

    # -- what there is ---------------------------------------------------------------------------------------
    async def health(self) -> Response:
        return _json(
            Health(
                status="stopping" if self.stopping else "ok",
                name=self.description.name,
                system=self.description.system,
                waiting=len(self.batcher),
                requests=self.open,
                seconds=round(time.monotonic() - self.began, 1),
            )
        )

    async def describe(self) -> Response:
        return _json(self.description)

    # -- questions -------------------------------------------------------------------------------------------
    async def embed(self, asked: EmbedRequest) -> Response:
        """A unit vector for each value. A value that cannot be read has null, and the reason stands in `problems`."""
        view = self.service.view(asked.tower, _form_of(asked.values[0]))
        answers = await self._answers(EmbedKey(view), asked.values, self.service.forms[view])
        vectors, problems = _sorted_out(answers)
        return _json(
            EmbedResponse(
                tower=view,
                dim=self.service.trained.dim,
                vectors=[None if each is None else each.astype(float).round(8).tolist() for each in vectors],
                problems=problems,
            )
        )

    async def search(self, asked: SearchRequest) -> Response:
        """The `k` items whose cosine with the query is largest."""
        if (asked.query is None) == (asked.item is None):
            raise NearfarError("give a query, or the position of an item: one of the two")
        if asked.k > self.limits.hits:
            raise NearfarError(f"k={asked.k}: at most {self.limits.hits} hits are given")
        service, gallery = self.service, self.service.gallery
        if asked.item is not None:
            view = service.view(asked.tower)
            target = service.target(asked.target, view)
            assert gallery is not None
            query = gallery.value(asked.item, view)
        else:
            view = service.view(asked.tower, _form_of(asked.query))
            target = service.target(asked.target, view)
            assert gallery is not None
            query = asked.query
        where = gallery.conditions(asked.where or [])
        form = None if asked.item is not None else service.forms[view]
        key = SearchKey(view, target, where)
        answers = await self._answers(key, [query], form, lambda value: Asked(value, asked.k))
        nearest = _sorted_out(answers)[0][0]
        hits = [gallery.hit(rank, position, score) for rank, (position, score) in enumerate(nearest, start=1)]
        names = json.dumps({"tower": view, "target": target})
        return _sent(f'{names[:-1]}, "hits":[{",".join(hits)}]}}')

    async def predict(self, asked: PredictRequest) -> Response:
        """A row for each item. An item that cannot be read has null, and the reason stands in `problems`."""
        forms = self.service.columns
        if not forms:
            able = "; it embeds and searches" if self.service.forms else ""
            raise NearfarError(f"a run of '{self.description.system}' predicts nothing{able}")
        if (asked.values is None) == (asked.columns is None):
            raise NearfarError("give values, or columns: one of the two")
        columns = asked.columns
        if columns is None:
            if len(forms) != 1:
                raise NearfarError(f"give columns: {', '.join(forms)}")
            columns = {next(iter(forms)): list(asked.values or [])}
        names = self.service.complete(columns)
        rows = list(zip(*(columns[name] for name in names), strict=True))
        answers = await self._answers(PredictKey(tuple(names)), rows, tuple(forms[name] for name in names))
        predicted, problems = _sorted_out(answers)
        return _json(PredictResponse(rows=predicted, problems=problems))

    async def _answers(
        self,
        key: EmbedKey | SearchKey | PredictKey,
        values: Sequence[object],
        form: str | tuple[str, ...] | None,
        wrap: Callable[[object], object] = lambda value: value,
    ) -> list[Any]:
        """The batcher's answers; what cannot be decoded has its reason there and is not asked for."""
        if len(values) > self.limits.values:
            raise NearfarError(f"{len(values)} values; at most {self.limits.values} are taken at a time")
        self.open += 1
        taken = 0
        try:
            if form is None:
                answers = list(values)
            elif _has_pictures(form):
                answers = []
                for value in values:
                    async with self.decoding:
                        one = await asyncio.to_thread(self._decoded, value, form)
                    size = _bytes_of(one)
                    self.pixels.take(size)
                    taken += size
                    answers.append(one)
            else:
                answers = [self._decoded(value, form) for value in values]
            good = [i for i, answer in enumerate(answers) if not isinstance(answer, NearfarError)]
            results = await self.batcher.submit(key, [wrap(answers[i]) for i in good])
            for i, result in zip(good, results, strict=True):
                answers[i] = result
            return answers
        finally:
            self.pixels.give(taken)
            self.open -= 1

    def _decoded(self, value: Any, form: str | tuple[str, ...]) -> object:
        try:
            if isinstance(form, str):
                return self.decode(value, form)
            return tuple(self.decode(each, own) for each, own in zip(value, form, strict=True))
        except NearfarError as error:
            return error

    # -- the gallery -----------------------------------------------------------------------------------------
    async def browse(
        self,
        start: int = Query(0, ge=0, description="Position of the first."),
        count: int = Query(12, ge=1, le=100, description="How many."),
        draw: bool = Query(False, description="Drawn at random instead."),
    ) -> Response:
        """Some items of the gallery, in order, or drawn at random."""
        gallery = self._gallery()
        positions = gallery.drawn(count) if draw else gallery.listed(start, count)
        return _json(GalleryPage.model_validate(
            {"total": len(gallery), "items": [gallery.shown(position) for position in positions]}
        ))  # fmt: skip

    async def slide(
        self, name: str = Query(max_length=1000, description="One of `slides` in /describe.")
    ) -> Response:
        """Where the items of one slide lie."""
        return _json(Slide.model_validate(self._gallery().slide(name)))

    async def picture(self, position: int, view: int) -> Response:
        """The picture that the `url` of a shown value names: a PNG, or of a molecule an SVG."""
        gallery = self._gallery()
        async with self.decoding:
            kind, data = await asyncio.to_thread(gallery.picture, position, view)
        return Response(data, media_type=kind, headers=_KEPT)

    def _gallery(self) -> Gallery:
        if self.service.gallery is None:
            raise NearfarError("there is no gallery: start the server with --gallery DATA")
        return self.service.gallery


# -- values --------------------------------------------------------------------------------------------------
def _form_of(value: object) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "numbers"
    return "pair" if hasattr(value, "first") else "picture"


def _has_pictures(form: str | tuple[str, ...]) -> bool:
    forms = (form,) if isinstance(form, str) else form
    return any(each in ("picture", "pair") for each in forms)


def _bytes_of(value: object) -> int:
    if isinstance(value, tuple):
        return sum(_bytes_of(each) for each in value)
    return int(getattr(value, "nbytes", 0))


def _sorted_out(answers: Sequence[Any]) -> tuple[list[Any], list[Problem]]:
    """Answers with None for those that failed, and why; where all failed, or one for no fault of its own, an error."""
    problems, kept = [], []
    for position, answer in enumerate(answers):
        if isinstance(answer, NearfarError):
            problems.append(Problem(where=f"values.{position}", reason=str(answer)))
        elif isinstance(answer, Exception):
            raise answer
        kept.append(None if isinstance(answer, NearfarError) else answer)
    if len(problems) == len(answers):
        raise _AllWrong(problems)
    return kept, problems


class _AllWrong(NearfarError):
    """No value of a request could be read."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems[0].reason if len(problems) == 1 else "no value could be read")
        self.problems = problems


# -- answers -------------------------------------------------------------------------------------------------
def _json(model: BaseModel) -> Response:
    return _sent(model.model_dump_json())


def _sent(text: str) -> Response:
    return Response(text, media_type="application/json", headers=_FRESH)


def _error(status: int, reason: str, problems: Sequence[Problem] = (), **headers: str) -> JSONResponse:
    body = ErrorResponse(error=reason, problems=list(problems)).model_dump()
    return JSONResponse(
        body, status, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


async def _wrong_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _wrong_fields([{**each, "loc": each["loc"][1:]} for each in error.errors()])


def _wrong_fields(errors: Sequence[Any]) -> JSONResponse:
    """Fields that are missing, unknown or of a wrong type; what was sent is not repeated."""
    problems = [
        Problem(where=".".join(str(part) for part in each["loc"]) or "the request", reason=str(each["msg"]))
        for each in errors[:20]
    ]
    if any(each["type"] == "json_invalid" for each in errors):
        return _error(400, "the request is no JSON that can be read", problems)
    return _error(422, f"{problems[0].where}: {problems[0].reason}", problems)


async def _wrong_value(request: Request, error: Exception) -> JSONResponse:
    return _error(422, str(error), getattr(error, "problems", ()))


async def _busy(request: Request, error: Exception) -> JSONResponse:
    return _error(503, str(error), retry_after=str(getattr(error, "retry_after", 1)))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    reasons = {
        404: "there is nothing at this address; /docs lists what there is",
        405: "this address is not asked in this way; /docs says how",
        400: "the request is no JSON that can be read",
    }
    return _error(error.status_code, reasons.get(error.status_code, str(error.detail)))


async def _failed(request: Request, error: Exception) -> JSONResponse:
    """An error of the server's own: the reason is in its log, under a number that the answer names."""
    number = secrets.token_hex(4)
    log.error("error %s at %s", number, request.url.path, exc_info=error)
    return _error(500, f"the server failed at this; its log has the reason under {number}")
