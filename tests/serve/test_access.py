"""Access control: host names, origins and the API key."""

import asyncio

import httpx
import openai
import pytest
from running_server import serve

from maxlm.errors import RequestError
from maxlm.serve.access import Access
from maxlm.serve.app import create_app

KEY = "sk-test"


@pytest.fixture
def ask(served, model):
    """Send a request to an in-process application: (method, path, access, headers) -> response."""

    def ask(method, path, access, **headers):
        async def send():
            transport = httpx.ASGITransport(create_app(model, served[1], access=access))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
                return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})

        return asyncio.run(send())

    return ask


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1:5", "[::1]", "[::1]:8000", "box.test", "BOX.test:1"],
)
def test_server_answers_to_its_own_names(ask, host):
    assert ask("GET", "/v1/models", Access(hosts=("box.test",)), host=host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evillocalhost",
        "0x7f.1",
        "192.168.0.9",
        "[::2]",
        "localhost@evil.example",
        "localhost:8000@evil.example",
        "evil.example/localhost",
        "localhost:port",
        "a]b",
    ],
)
@pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/nothing"])
def test_dns_rebinding_is_blocked(ask, host, path):
    reply = ask("GET", path, Access(), host=host)
    assert reply.status_code == 403
    assert reply.json()["error"]["code"] == "host_not_allowed"
    assert "--allowed-host" in reply.json()["error"]["message"]
    assert reply.headers["x-request-id"]


def test_listening_on_all_addresses_allows_any_address_but_no_other_name(ask):
    access = Access(any_address=True)
    assert ask("GET", "/health", access, host="192.168.0.9:8000").status_code == 200
    assert ask("GET", "/health", access, host="[fd00::5]:8000").status_code == 200
    assert ask("GET", "/health", access, host="evil.example").status_code == 403
    assert ask("GET", "/health", Access(hosts=("*",)), host="evil.example").status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8000", 200),
        ("http://127.0.0.1:3000", 200),
        ("https://page.test", 200),
        ("https://evil.example", 403),
        ("http://page.test", 403),
        ("https://page.test.evil.example", 403),
        ("null", 403),
        ("chrome-extension://localhost", 403),
        ("nonsense", 403),
    ],
)
def test_unlisted_origins_are_rejected(ask, origin, status):
    access = Access(origins=("https://page.test",))
    reply = ask("GET", "/v1/models", access, origin=origin)
    assert reply.status_code == status
    if status == 403:
        assert reply.json()["error"]["code"] == "origin_not_allowed"
    is_listed = origin == "https://page.test"
    assert reply.headers.get("access-control-allow-origin") == (origin if is_listed else None)


def test_preflight_of_a_listed_origin(ask):
    """The browser's preflight request has no key, and names the headers that the client library adds."""
    access = Access(origins=("https://page.test",), api_key=KEY)
    asked = {
        "origin": "https://page.test",
        "access_control_request_method": "POST",
        "access_control_request_headers": "authorization,content-type,x-stainless-os",
    }
    reply = ask("OPTIONS", "/v1/chat/completions", access, **asked)
    assert reply.status_code == 204
    assert reply.headers["access-control-allow-origin"] == "https://page.test"
    assert "x-stainless-os" in reply.headers["access-control-allow-headers"]
    # The page can read errors too, so that it can ask for the key.
    reply = ask("GET", "/v1/models", access, origin="https://page.test")
    assert reply.status_code == 401
    assert reply.headers["access-control-allow-origin"] == "https://page.test"
    assert ask("OPTIONS", "/v1/models", Access(), access_control_request_method="POST").status_code == 405
    assert ask("GET", "/health", Access(origins=("*",)), origin="https://any.test").status_code == 200


def test_only_the_page_and_health_need_no_key(ask):
    access = Access(api_key=KEY)
    for path in ("/", "/health", "/static/app.js"):
        assert ask("GET", path, access).status_code == 200
    for path in ("/v1/models", "/v1/models/tiny-int8", "/metrics", "/openapi.json", "/nothing", "/health/"):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Basic é"}):
            reply = ask("GET", path, access, **{name: value.encode("latin-1") for name, value in headers.items()})
            assert reply.status_code == 401, path
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
    assert ask("POST", "/v1/chat/completions", access).status_code == 401
    for scheme in ("Bearer", "bearer"):
        assert ask("GET", "/v1/models", access, authorization=f"{scheme} {KEY}").status_code == 200


def test_client_sends_its_key_and_the_served_model_name(model):
    with serve(model, name="org/best", access=Access(api_key=KEY)) as (url, _):
        stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError, match="API key is wrong"):
            stranger.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            assert [entry.id for entry in client.models.list()] == ["org/best"]
            assert client.models.retrieve("org/best").id == "org/best"
            reply = client.completions.create(model="org/best", prompt="The", max_tokens=1)
            assert reply.model == "org/best"
            with pytest.raises(openai.NotFoundError, match="'tiny-int8' is not served here; use 'org/best'"):
                client.completions.create(model="tiny-int8", prompt="The")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hosts": ("http://box.test",)}, "--allowed-host"),
        ({"hosts": ("box.test/page",)}, "--allowed-host"),
        ({"hosts": ("",)}, "--allowed-host"),
        ({"origins": ("page.test",)}, "--cors"),
        ({"origins": ("https://page.test/",)}, "--cors"),
        ({"origins": ("",)}, "--cors"),
        ({"api_key": ""}, "API key is empty"),
        ({"api_key": "a b"}, "API key contains a space"),
        ({"api_key": "schlüssel"}, "characters not allowed in a header"),
        ({"api_key": "a\n"}, "characters not allowed in a header"),
    ],
)
def test_settings_that_can_never_match_raise(settings, message):
    with pytest.raises(RequestError, match=message):
        Access(**settings)
