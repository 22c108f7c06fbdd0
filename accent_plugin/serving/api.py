"""The HTTP API of a served classifier: one answer per file, in the format of ``accent-plugin classify``."""

import errno

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import accent_plugin
from accent_plugin.audio.samples import TOO_LONG
from accent_plugin.errors import LimitError
from accent_plugin.inference.records import Failure
from accent_plugin.serving.guard import API, NO_SPACE, STATUS, refuse, respond

UNUSABLE = 422
_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]


class Window(BaseModel):
    """A window of a recording."""

    start: float = Field(description="in seconds")
    end: float = Field(description="in seconds")
    probabilities: dict[str, float] | None = Field(description="null if the window has too little speech")


class Loss(BaseModel):
    """A part of a file that could not be decoded."""

    start: float = Field(description="where it is missing, in seconds of the decoded audio")
    seconds: float
    reason: str


class Answer(BaseModel):
    """The answer for one file. If there is an error, accent, decision, probability and probabilities are null."""

    source: str = Field(description="name of the file, as given by the client")
    model: str = Field(description="twelve digits that identify the weights")
    accent: str | None = Field(description="the most likely accent")
    decision: str | None = Field(description="the same accent; null if the classifier abstains")
    probability: float | None = Field(description="of the most likely accent; calibrated if the model is calibrated")
    probabilities: dict[str, float] | None = Field(description="of every accent")
    seconds: float | None = Field(description="duration of the recording")
    lost_seconds: float | None = Field(description="how many seconds of the file could not be decoded")
    lost: list[Loss] = Field([], description="the parts of a damaged file that could not be decoded")
    speech_seconds: float | None = Field(None, description="duration of the speech in it, estimated from the energy")
    reliable: bool | None = Field(description="whether there is at least one second of speech")
    error: str | None = Field(description="why there is no answer, as in the output of `classify`")
    sample_rate: int | None = Field(None, description="of the file, in Hz")
    channels: int | None = None
    codec: str | None = None
    warnings: list[str] = []
    windows: list[Window] = Field([], description="if the recording is longer than one window")
    threshold: float | None
    window_seconds: float
    hop_seconds: float


class Answers(BaseModel):
    """The answers for the files of a request, in order."""

    answers: list[Answer]
    error: str | None = Field(None, description="the error of the first file that could not be classified")


class Refusal(BaseModel):
    """Why a request was refused."""

    error: str


class Health(BaseModel):
    """The status of the server."""

    status: str = "ok"
    busy: int = Field(description="requests that are being answered or are waiting")


_FILE = {"type": "string", "format": "binary"}
_FORM = {"type": "object", "properties": {"files": {"type": "array", "items": _FILE}}, "required": ["files"]}
_BODY = {
    "required": True,
    "content": {"multipart/form-data": {"schema": _FORM}, "application/octet-stream": {"schema": _FILE}},
}
_REFUSALS = {
    400: "the form is malformed",
    401: "the token is missing or wrong",
    408: "the request took too long",
    413: "too many bytes, files or seconds",
    422: "a file cannot be classified; the other files are still answered",
    429: "too many requests",
}


def make_app(service):
    """Make the FastAPI app of a `Service`, without the `Guard` middleware."""
    # FastAPI's own documentation pages would load external scripts.
    app = FastAPI(
        title="accent-plugin",
        version=accent_plugin.__version__,
        description="Classifies the accent of English in recordings.",
        docs_url=None,
        redoc_url=None,
        openapi_url=f"{API}/openapi.json",
    )
    refusals: dict = {code: {"description": text, "model": Refusal} for code, text in _REFUSALS.items()}
    refusals[UNUSABLE]["model"] = Answers

    @app.get(f"{API}/health", response_model=Health)
    async def health():
        """Report that the server is running; needs no token."""
        return {"status": "ok", "busy": service.busy}

    @app.get(f"{API}/model")
    async def model() -> dict:
        """Return the labels, the model and the limits."""
        return service.about()

    @app.post(f"{API}/classify", response_model=Answers, responses=refusals, openapi_extra={"requestBody": _BODY})
    async def classify(request: Request):
        """Classify one or more files: send a form with `files`, or one file as the body."""
        async with service.slot():
            answers = await service.classify(await _read_files(request, service.limits))
        records = [service.record(answer) for answer in answers]
        failures = [answer.outcome for answer in answers if isinstance(answer.outcome, Failure)]
        if not failures:
            return respond(200, {"answers": records})
        status = STATUS["seconds"] if all(failure.reason == TOO_LONG for failure in failures) else UNUSABLE
        return respond(status, {"answers": records, "error": str(failures[0])})

    # Otherwise another mounted app would answer unknown API paths in its own format.
    @app.api_route(API + "/{rest:path}", methods=_METHODS, include_in_schema=False)
    async def unknown_path(rest: str):
        known = f"{API}/{rest}" in app.openapi()["paths"]
        return refuse(405, "Method Not Allowed") if known else refuse(404, f"unknown path {API}/{rest}")

    @app.exception_handler(OSError)
    async def disk_full(request, error):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise error
        return refuse(STATUS["busy"], NO_SPACE)

    @app.exception_handler(LimitError)
    async def limit_exceeded(request, error):
        return refuse(STATUS[error.reason], f"{error.reason}: {error}")

    @app.exception_handler(HTTPException)
    async def http_error(request, error):
        return refuse(error.status_code, str(error.detail))

    return app


async def _read_files(request, limits):
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind != "multipart/form-data":
            return [("recording", await request.body())]
        async with request.form(max_files=limits.max_files, max_fields=limits.max_files) as form:
            files = [value for _, value in form.multi_items() if hasattr(value, "read")]
            if not files:
                raise HTTPException(400, "the form contains no file: send files in the field 'files'")
            return [(file.filename or "recording", await file.read()) for file in files]
    except HTTPException as error:
        if str(error.detail).startswith("Too many files"):
            raise LimitError("files", f"there are more than {limits.max_files} files in the form") from None
        raise
