"""`maxlm generate` and `maxlm chat`."""

import argparse
import json
import secrets

from maxlm.runtime.arguments import at_least_zero, count, count_or_zero, seed, text_or_stdin


def register(subparsers) -> None:
    """Add both subcommands."""
    generate = subparsers.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text with a model and print the continuation as it is generated.",
        epilog="example: maxlm generate runs/small 'def main():' --max-new-tokens 40 --temperature 0.8 --seed 1",
    )
    _add_model(generate)
    generate.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads standard input")
    _add_sampling(generate, temperature=0.0, max_new_tokens=64)
    generate.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before this text; repeatable"
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    generate.set_defaults(func=run_generate)

    chat = subparsers.add_parser(
        "chat",
        help="chat with a model in the terminal",
        description="Chat with a model. It sees the whole conversation. /reset clears it, /quit or Ctrl-D exits,"
        " Ctrl-C stops an answer.",
        epilog="example: maxlm chat runs/small-sft --system 'You answer in one sentence.' --temperature 0.7",
    )
    _add_model(chat)
    chat.add_argument("--system", metavar="TEXT", help="system message at the start of the conversation")
    _add_sampling(chat, temperature=0.7, max_new_tokens=None)
    chat.set_defaults(func=run_chat)


def run_generate(args: argparse.Namespace) -> int:
    from maxlm.generate.model import load
    from maxlm.generate.request import Request

    model = load(args.model, ema=args.ema)
    prompt = text_or_stdin(args.prompt)
    seed = _seed(args)
    request = Request(
        tuple(model.encode(prompt)),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=seed,
        stop=tuple(args.stop),
    )
    text, num_tokens, finish_reason = "", 0, None
    with model.engine(num_slots=1) as engine:
        for event in engine.stream(request):
            text += event.text
            num_tokens += event.token is not None
            finish_reason = event.finish_reason
            if not args.json:
                print(event.text, end="", flush=True)
    if args.json:
        report = {
            "prompt": prompt,
            "text": text,
            "prompt_tokens": len(request.prompt_ids),
            "new_tokens": num_tokens,
            "finish_reason": finish_reason,
            "seed": seed,
        }
        print(json.dumps(report, ensure_ascii=False))
    else:
        print()
    return 0


def run_chat(args: argparse.Namespace) -> int:
    from maxlm.generate.chat import Chat
    from maxlm.generate.model import load

    model = load(args.model, ema=args.ema)
    with model.engine(num_slots=1) as engine:
        chat = Chat(
            model,
            engine,
            system=args.system,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            seed=_seed(args),
        )
        return chat.run()


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a run, checkpoint, int8 bundle or Hugging Face model")
    parser.add_argument("--ema", action="store_true", help="use the run's EMA weights (optim.ema_decay)")


def _add_sampling(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int | None) -> None:
    default = "as many as fit in the context" if max_new_tokens is None else max_new_tokens
    parser.add_argument(
        "--max-new-tokens", type=count, default=max_new_tokens, metavar="N", help=f"max tokens to generate ({default})"
    )
    parser.add_argument(
        "--temperature",
        type=at_least_zero,
        default=temperature,
        metavar="T",
        help=f"sampling temperature; 0 is greedy ({temperature})",
    )
    parser.add_argument(
        "--top-p", type=at_least_zero, default=1.0, metavar="P", help="sample from the top tokens of this mass (1: all)"
    )
    parser.add_argument(
        "--top-k", type=count_or_zero, default=0, metavar="K", help="sample from this many top tokens (0: all)"
    )
    parser.add_argument("--seed", type=seed, metavar="S", help="the same seed gives the same text (random)")


def _seed(args: argparse.Namespace) -> int:
    return secrets.randbits(32) if args.seed is None else args.seed
