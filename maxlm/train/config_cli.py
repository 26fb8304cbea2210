"""`maxlm config`: show what a configuration resolves to."""

import argparse


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "config",
        help="show the recipes, a resolved configuration, or the schema",
        description="Inspect configurations without running them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  maxlm config list                            the recipes, whose names can be given as CONFIG\n"
            "  maxlm config show configs/quickstart/pretrain.yaml optim.learning_rate=1e-3\n"
            "  maxlm config show post/distill --tree model.vocab_size=32000\n"
            "  maxlm config schema > maxlm.schema.json      for completion in editors"
        ),
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listed = actions.add_parser("list", help="print the recipes that come with maxlm")
    listed.set_defaults(func=run_list)
    show = actions.add_parser("show", help="print the resolved configuration as YAML, or all its mistakes")
    show.add_argument("file", metavar="FILE", help="a YAML file with a `kind`, or a recipe's name")
    show.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.learning_rate=3e-4")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    form.add_argument("--tree", action="store_true", help="print the model part by part, with numbers of parameters")
    show.set_defaults(func=run_show)
    schema = actions.add_parser("schema", help="print the JSON schema of all configuration files")
    schema.set_defaults(func=run_schema)


def run_show(args: argparse.Namespace) -> int:
    from maxlm.config import dump_yaml, load_config

    if args.tree:
        from maxlm.errors import ConfigError
        from maxlm.models.decoder import Decoder
        from maxlm.models.show import describe_model
        from maxlm.train.setup import declared_model

        config = load_config(args.file, args.overrides)
        if config.kind == "model":
            print(describe_model(Decoder(config.model, config.execution)))
        elif config.kind == "train":
            print(describe_model(declared_model(config)))
        else:
            raise ConfigError([f"{args.file}: kind {config.kind} has no model; give one of kind train or model"])
        return 0
    config = load_config(args.file, args.overrides)
    print(config.model_dump_json(indent=2) if args.json else dump_yaml(config), end="" if not args.json else "\n")
    return 0


def run_list(args: argparse.Namespace) -> int:
    from maxlm.config.recipes import describe_recipe, recipes

    # `maxlm models` lists those.
    found = {name: describe_recipe(path) for name, path in recipes().items() if not name.startswith("models/")}
    width = max(map(len, found))
    for name, (kind, sentence) in found.items():
        print(f"{name:{width}}  {kind:9}  {sentence}")
    return 0


def run_schema(args: argparse.Namespace) -> int:
    import json

    from maxlm.config import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0
