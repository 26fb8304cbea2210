"""`maxlm verify`."""

import argparse

from maxlm.runtime.arguments import add_config

EPILOG = """\
examples:
  maxlm verify configs/quickstart/pretrain.yaml                    all variants
  maxlm verify configs/post/sft.yaml adapters.kind=lora --only mesh  with one setting changed, on every mesh
  maxlm verify configs/post/grpo.yaml --only packing --only rollout
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "verify",
        help="check that losses and gradients do not depend on parallelism, packing or implementation",
        description=(
            "Compute the loss terms and the gradient of every parameter in the simplest way on one device, and again"
            " with microbatches, packed and unpacked rows, padding, every mesh that the configuration allows (on eight"
            " virtual CPU devices), and every implementation available here, at a small size that keeps the"
            " configuration's structure and options, with synthetic data. Exits with 1 if any differs."
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(parser, "train; its data need not exist")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="a variant, a group, mesh.AXIS, or part of a name"
    )
    parser.add_argument("--all", action="store_true", help="every product of two and three mesh axes")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--markdown", action="store_true", help="print the report as a section of a document")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    import json

    from maxlm.runtime.platform import use_virtual_devices

    use_virtual_devices(8)

    from rich.console import Console

    from maxlm.config.load import load_config
    from maxlm.verify.run import verify
    from maxlm.verify.show import markdown, table

    config = load_config(args.config, args.overrides, kind="train")
    report = verify(config, title=" ".join([args.config, *args.overrides]), only=args.only, all_products=args.all)
    if args.json:
        print(json.dumps(report.to_json()))
    elif args.markdown:
        print(markdown(report), end="")
    else:
        Console(highlight=False).print(table(report))
    return 0 if report.passed else 1
