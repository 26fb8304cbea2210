"""The JSON of a request's body, read strictly: a key that stands twice is refused, and not the last one taken."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class StrictRoute(APIRoute):
    """A route whose body is read by `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(http: Request) -> Response:
            return await handle(_StrictRequest(http.scope, http.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_body(await self.body())


def parse_body(body: bytes) -> Any:
    """The value of a body.

    Raises:
      json.JSONDecodeError: it is not JSON, or JSON with a key twice in one object, nested too deep, or with a number of
        thousands of digits; FastAPI answers it as it does for what is not JSON.
    """
    try:
        return json.loads(body, object_pairs_hook=_object)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        problem = "nested too deep"
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except _DuplicateKeyError as error:
        problem = str(error)
    except ValueError:
        # Python's own limit, against quadratic time.
        problem = "it holds a number of thousands of digits"
    raise json.JSONDecodeError(problem, "", 0)


class _DuplicateKeyError(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise _DuplicateKeyError(f"the key {twice[:80]!r} stands twice in one object")
    return value
