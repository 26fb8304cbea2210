"""Strict JSON parsing of request bodies: a duplicate key is an error, instead of the last one winning."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from maxlm.runtime.json_objects import DuplicateKeyError, unique_keys

_MAX_SHOWN = 80  # characters of a key in a message


class StrictRoute(APIRoute):
    """A route whose body is parsed by `parse_body`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def strictly(http: Request) -> Response:
            return await handle(_StrictRequest(http.scope, http.receive))

        return strictly


class _StrictRequest(Request):
    async def json(self) -> Any:
        return parse_body(await self.body())


def parse_body(body: bytes) -> Any:
    """Parse a body.

    Raises:
      json.JSONDecodeError: it is not JSON, has a duplicate key, is nested too deeply, or has a number of thousands of
        digits; FastAPI handles it as invalid JSON.
    """
    try:
        return json.loads(body, object_pairs_hook=unique_keys)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        problem = "nested too deeply"
    except UnicodeDecodeError:
        problem = "it is not UTF-8"
    except DuplicateKeyError as error:
        problem = str(DuplicateKeyError(error.key[:_MAX_SHOWN]))
    except ValueError:
        # Python's own limit, which guards against quadratic time.
        problem = "it contains a number of thousands of digits"
    raise json.JSONDecodeError(problem, "", 0)
