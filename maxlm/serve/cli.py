"""`maxlm serve`."""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path

from maxlm.runtime.arguments import count, count_or_zero, port

KEY_VARIABLE = "MAXLM_API_KEY"


def register(subparsers) -> None:
    """Add the subcommand."""
    serve = subparsers.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model with the OpenAI API and a chat page at /. Ctrl-C or SIGTERM finishes running"
        " requests, then exits.",
        epilog="example: maxlm serve runs/small-sft --port 8000, then open http://127.0.0.1:8000/ or set the base_url"
        " of an OpenAI client to http://127.0.0.1:8000/v1",
    )
    serve.add_argument("model", metavar="MODEL", help="folder of a run, checkpoint, int8 bundle or Hugging Face model")
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=_named_run,
        metavar="NAME=RUN",
        help="also serve MODEL with the LoRA adapters of this run, as the model NAME in the API; repeatable",
    )
    serve.add_argument("--ema", action="store_true", help="use the run's EMA weights (optim.ema_decay)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)")
    serve.add_argument("--port", type=port, default=8000, help="port to listen on; 0 picks a free one (8000)")
    serve.add_argument("--slots", type=count, default=8, metavar="N", help="requests decoded concurrently (8)")
    serve.add_argument(
        "--queue", type=count_or_zero, default=64, metavar="N", help="requests that may wait for a slot (64)"
    )
    serve.add_argument(
        "--max-length", type=count, metavar="N", help="limit on prompt plus completion, in tokens (the model's context)"
    )
    serve.add_argument("--served-model-name", metavar="NAME", help="model name in the API (the name of its folder)")
    serve.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"require this key from clients; prefer {KEY_VARIABLE}, which other users of the machine cannot see",
    )
    serve.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer to this host name, as in http://NAME:8000; repeatable, * for any (only localhost and --host)",
    )
    serve.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin call the API, such as https://example.com; repeatable, * for any (none)",
    )
    serve.add_argument(
        "--votes",
        type=Path,
        metavar="DIR",
        help="let people vote on two answers, on the page or over the API, and keep the votes there as preference data",
    )
    serve.add_argument("--quiet", action="store_true", help="no access log")
    serve.set_defaults(func=run)


def need_server() -> None:
    """Raise RequestError if the packages of the extra `serve` are not installed."""
    from maxlm.errors import RequestError

    try:
        import fastapi  # noqa: F401
        import linkify_it  # noqa: F401
        import markdown_it  # noqa: F401
        import nh3  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RequestError(f"maxlm serve needs the package {error.name}: pip install 'maxlm[serve]'") from None


def run(args: argparse.Namespace) -> int:
    need_server()

    import logging

    from maxlm.generate.model import load
    from maxlm.runtime.progress import console
    from maxlm.serve import server
    from maxlm.serve.access import Access
    from maxlm.serve.app import create_app
    from maxlm.serve.votes import Votes

    listener = server.bind(args.host, args.port)
    address = server.address_of(listener)
    access = Access(
        hosts=(args.host, *args.allowed_host),
        any_address=address.is_unspecified,
        origins=tuple(args.cors),
        api_key=_api_key(args),
    )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("maxlm.serve").setLevel(logging.ERROR if args.quiet else logging.INFO)
    name = args.served_model_name or Path(args.model).resolve().name
    model = load(args.model, ema=args.ema, adapters=_adapters(args.adapter, name))
    served = {"name": name, "ema": args.ema, "max_length": args.max_length}
    kept = nullcontext() if args.votes is None else Votes.opened(args.votes, model_path=Path(args.model), served=served)
    with (
        kept as votes,
        model.engine(num_slots=args.slots, max_length=args.max_length, max_waiting=args.queue) as engine,
    ):
        with console.status("Compiling ..."):
            engine.warm_up()
        print(
            f"Serving {', '.join((name, *model.adapters))} on {server.url_of(listener)} with {engine.num_slots} slots"
            f" of {engine.max_length} tokens; Ctrl-C stops",
            flush=True,
        )
        if access.api_key is None and not address.is_loopback:
            print("No --api-key is set: anyone who can reach this port can use the model", file=sys.stderr, flush=True)
        server.run(create_app(model, engine, name=name, access=access, votes=votes), listener)
    return 0


def _named_run(text: str) -> tuple[str, str]:
    name, equals, run = text.partition("=")
    if not (name and equals and run):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=RUN")
    return name, run


def _adapters(named: list[tuple[str, str]], name: str) -> dict[str, str]:
    """Runs by name, which must differ from each other and from that of the model."""
    from maxlm.errors import RequestError

    names = [name, *(each for each, _ in named)]
    if twice := [each for each in names if names.count(each) > 1]:
        raise RequestError(f"--adapter: two models would be named {twice[0]!r}; give each a name of its own")
    return dict(named)


def _api_key(args: argparse.Namespace) -> str | None:
    return os.environ.get(KEY_VARIABLE) if args.api_key is None else args.api_key
