"""`maxlm config`: look at what a configuration resolves to."""

import argparse


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "config",
        help="show a resolved configuration, or the schema",
        description="Look at configurations without running them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  maxlm config show configs/quickstart/pretrain.yaml optim.learning_rate=1e-3\n"
            "  maxlm config schema > maxlm.schema.json      for completion in editors"
        ),
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="print the resolved configuration as YAML, or all its mistakes")
    add_config(show, "train, data, tokenizer or sweep")
    show.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    show.set_defaults(func=run_show)
    schema = actions.add_parser("schema", help="print the JSON schema of all configuration files")
    schema.set_defaults(func=run_schema)


def add_config(parser: argparse.ArgumentParser, kind: str) -> None:
    """The arguments of each command that takes a configuration: `config`, and `overrides` for `load_config`."""
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file with kind: {kind}")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="settings that differ from the file's"
    )


def run_show(args: argparse.Namespace) -> int:
    from maxlm.config import dump_yaml, load_config

    config = load_config(args.config, args.overrides)
    print(config.model_dump_json(indent=2) if args.json else dump_yaml(config), end="" if not args.json else "\n")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    import json

    from maxlm.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
