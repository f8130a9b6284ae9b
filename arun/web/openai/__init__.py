"""OpenAI's API over engine pools: ``/v1/models``, ``/v1/chat/completions``, ``/v1/completions``, ``/v1/embeddings``.

>>> app = openai_app({"chat": pool, "vectors": embedding_pool})  # an ASGI app; uvicorn.run(app)
>>> app = Starlette(routes=[*openai_routes({"chat": pool}), *my_routes])

    body (JSON) -> requests: prompt and options -> pool -> deltas -> answers: chunks or one object -> body
"""

from __future__ import annotations

from arun.web.openai.backend import Backend
from arun.web.openai.endpoints import openai_app, openai_routes

__all__ = ("Backend", "openai_app", "openai_routes")
