"""The way to an OpenAI-compatible server: sends requests, tells its errors apart, tries again what is worth it."""

from __future__ import annotations

import email.utils
import os
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
import msgspec

from arun.errors import EngineError, MissingExtraError, MisuseError, PoolBusy, RequestError
from arun.logs import get_logger
from arun.policies import Retry

if TYPE_CHECKING:
    import httpx2

__all__ = ("Dialect", "RemoteOptions", "Server", "import_httpx2", "read_error")

log = get_logger("arun.engine")

Dialect = Literal["openai", "vllm"]

_Seconds = Annotated[float, msgspec.Meta(gt=0)]
_MAX_ERROR_BYTES = 65_536
_REFUSED = {400, 404, 409, 413, 415, 422}
_WORTH_ANOTHER = {408, 425, 429}


def import_httpx2() -> Any:
    """httpx2, imported when first needed. :raises MissingExtraError: it is not installed."""
    try:
        import httpx2
    except ImportError as exc:
        raise MissingExtraError("RemoteEngine", extra="remote", package="httpx2") from exc
    return httpx2


class RemoteOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``EngineSpec.engine_args`` may hold for the remote engine.

    :ivar base_url: of the API, for example ``"https://api.openai.com/v1"``.
    :ivar api_key_env: name of the environment variable, in the engine's process, that holds the API key.
    :ivar dialect: ``"vllm"`` also sends what vLLM's server takes beyond OpenAI's API: top_k, min_p, regex, ...
    :ivar text_as: how a prompt that is text is sent: to ``/completions``, or as the one user message of a chat, for
        models that have chat only.
    :ivar max_tokens_name: what a chat calls its limit; OpenAI's reasoning models want ``"max_completion_tokens"``.
    :ivar extra_body: fields to add to every request.
    :ivar timeout: seconds without a byte of an answer until it counts as lost. Less than the pool's watchdog (60), so
        that one silent answer fails alone.
    :ivar connect_timeout: seconds to connect.
    :ivar attempts: at most, of a request that finds the server busy, failing or out of reach; the first one counts.
    :ivar max_wait: seconds between two attempts at most; a server that asks for more is not asked again.
    """

    base_url: str
    api_key_env: str | None = None
    dialect: Dialect = "openai"
    text_as: Literal["completion", "chat"] = "completion"
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    extra_body: dict[str, Any] = {}
    timeout: _Seconds = 45.0
    connect_timeout: _Seconds = 10.0
    attempts: Annotated[int, msgspec.Meta(ge=1)] = 5
    max_wait: _Seconds = 20.0


class _ErrorBody(msgspec.Struct):
    """What OpenAI, and those who follow it, say of an error."""

    message: str = ""
    type: str | None = None
    code: str | int | None = None


class Server:
    """One server, with the connections to it. Never shows the API key.

    :raises MisuseError: ``base_url`` is no URL of a server, or has a password in it.
    :raises EngineError: the environment variable with the key is not set.
    :raises MissingExtraError: httpx2 is not installed.
    """

    def __init__(self, options: RemoteOptions) -> None:
        http = import_httpx2()
        url = http.URL(options.base_url)
        if url.scheme not in {"http", "https"} or not url.host:
            raise MisuseError(f"base_url={options.base_url!r}: it must be like 'https://api.openai.com/v1'")
        if url.userinfo or url.query:
            raise MisuseError("base_url has a password or a query in it, and it is shown in logs; use api_key_env")
        self.url = options.base_url.rstrip("/")
        self._options = options
        self._key = _key(options)
        self._retry = Retry(attempts=options.attempts, initial=0.5, maximum=options.max_wait)
        self._client: httpx2.AsyncClient = http.AsyncClient(
            auth=None if self._key is None else _bearer(self._key),
            timeout=http.Timeout(options.timeout, connect=options.connect_timeout, pool=None),
            # How much there may be at a time is the pool's to say.
            limits=http.Limits(max_connections=None, max_keepalive_connections=256),
        )

    async def models(self) -> list[str] | None:
        """The names of its models; None where it does not tell.

        :raises EngineError: it is out of reach, or refuses the key.
        """
        try:
            response = await self.send("GET", "/models")
        except RequestError:
            return None
        try:
            listed = msgspec.json.decode(await response.aread(), type=_Models)
        except (msgspec.MsgspecError, RecursionError, import_httpx2().RequestError):
            return None
        finally:
            await response.aclose()
        return [model.id for model in listed.data]

    async def send(self, method: str, path: str, body: bytes | None = None) -> httpx2.Response:
        """Send a request until it is answered; the answer is a response to be read and closed.

        :raises RequestError: the server refuses this request.
        :raises PoolBusy: the server has too many requests, also after ``attempts``.
        :raises EngineError: it refuses the key, fails or is out of reach, also after ``attempts``.
        """
        request_error: type[Exception] = import_httpx2().RequestError
        read_timeout: type[Exception] = import_httpx2().ReadTimeout
        attempt = 0
        while True:
            attempt += 1
            request = self._client.build_request(
                method, self.url + path, content=body, headers={"content-type": "application/json"}
            )
            failure: EngineError
            cause: Exception | None = None
            asked: float | None = None
            try:
                response = await self._client.send(request, stream=True)
            except read_timeout as exc:  # it may be at work; to ask again would double that
                raise EngineError(
                    f"{self.url} did not begin to answer within {self._options.timeout:g} s; allow more with "
                    "engine_args={'timeout': seconds} and the pool's watchdog"
                ) from exc
            except request_error as exc:
                cause = exc
                failure = EngineError(f"{self.url} can't be reached: {self.clean(exc)}")
            else:
                if response.status_code == 200:
                    return response
                failure, asked = await self._failure(response)
            wait = max(self._retry.wait(attempt), asked or 0.0)
            if attempt >= self._options.attempts or wait > self._options.max_wait:
                told = f"; it asks to wait {asked:g} s" if asked else ""
                raise type(failure)(f"{failure}{told} (attempt {attempt} of {self._options.attempts})") from cause
            log.info("remote.retry", url=self.url, attempt=attempt, wait=round(wait, 2), error=str(failure))
            await anyio.sleep(wait)

    def clean(self, text: object) -> str:
        """A text of the server's or about it, on one line and without the key."""
        line = " ".join(str(text).split())
        if not line and isinstance(text, Exception):  # a timeout says nothing
            line = type(text).__name__
        return line if self._key is None else line.replace(self._key, "***")

    async def aclose(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def _failure(self, response: httpx2.Response) -> tuple[EngineError, float | None]:
        """An answer that is worth another attempt, and the seconds until then that it asks for; raises other ones."""
        status = response.status_code
        error = read_error(await self.text(response))
        told = error.message[:2000] or response.reason_phrase
        what = f"{self.url} answered {status}: {told}"
        if response.has_redirect_location:  # not followed: it could lead the key anywhere
            where = self.clean(response.headers["location"])
            raise EngineError(f"{what}. It redirects to {where}; give the base_url that leads there")
        if status in {401, 403}:
            key = f"the key in {self._options.api_key_env}" if self._options.api_key_env else "engine_args: api_key_env"
            raise EngineError(f"{what}. Check {key}, and what it may use")
        if status in _REFUSED:
            raise RequestError(what)
        if error.code == "insufficient_quota":  # a 429 that no waiting helps against
            raise EngineError(what)
        if status not in _WORTH_ANOTHER and status < 500:
            raise EngineError(what)
        return (PoolBusy if status == 429 else EngineError)(what), _retry_after(response.headers)

    async def text(self, response: httpx2.Response) -> str:
        """The beginning of a response, cleaned: some servers repeat the key that they refuse."""
        body = b""
        try:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_ERROR_BYTES:
                    break
        except import_httpx2().RequestError:
            pass  # the status says enough
        finally:
            await response.aclose()
        return self.clean(body.decode(errors="replace"))


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def read_error(text: str) -> _ErrorBody:
    """The error in a body, in whatever form servers have for it; the text itself where it is in none."""
    try:
        value = msgspec.json.decode(text)
        inner = value.get("error", value)
        if isinstance(inner, str):
            return _ErrorBody(inner)
        if "message" not in inner and "detail" in inner:
            return _ErrorBody(str(inner["detail"]))
        return msgspec.convert(inner, _ErrorBody)
    except (msgspec.MsgspecError, RecursionError, AttributeError, TypeError):
        return _ErrorBody(text)


def _key(options: RemoteOptions) -> str | None:
    name = options.api_key_env
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise EngineError(f"api_key_env={name!r}: there is no such environment variable in the engine's process")
    if not key.isascii() or key != key.strip():
        raise EngineError(f"api_key_env={name!r}: its value has spaces around it, or is no ASCII text")
    return key


def _bearer(key: str) -> Any:
    """Adds the key on the way out: a client's default headers would show it to whoever prints them."""

    def add(request: httpx2.Request) -> httpx2.Request:
        request.headers["authorization"] = f"Bearer {key}"
        return request

    return import_httpx2().FunctionAuth(add)


def _retry_after(headers: Any) -> float | None:
    value: str = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
