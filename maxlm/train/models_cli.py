"""`maxlm models`: the published models that come with maxlm."""

import argparse
import json

_EPILOG = """\
examples:
  maxlm models                            all models
  maxlm models qwen                       those with "qwen" in their name
  maxlm models llama-3.1-8b               one model: memory by optimizer, and meshes that it fits on
  maxlm config show models/llama-3.1-8b --tree

a training configuration takes one with `base: models/llama-3.1-8b`
"""


def register(subparsers) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "models",
        help="list published models: parameters, memory for serving and training, meshes",
        description="List the published models in configs/models, or show one of them. Nothing is downloaded.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", default="", help="a model, or a part of names")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(func=run_models)


def run_models(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from maxlm.config.load import load_config
    from maxlm.config.recipes import recipes
    from maxlm.errors import RequestError
    from maxlm.train.model_sizes import ROW_LENGTH, fitting_meshes, model_size

    names = [name.removeprefix("models/") for name in recipes() if name.startswith("models/")]
    found = [args.name] if args.name in names else [name for name in names if args.name in name]
    if not found:
        raise RequestError(f"{args.name}: there is no such model; `maxlm models` lists them")
    presets = {name: load_config(f"models/{name}", kind="model") for name in found}
    sizes = {name: model_size(preset) for name, preset in presets.items()}
    is_one = len(found) == 1
    meshes = [*fitting_meshes(presets[found[0]], sizes[found[0]])] if is_one else []
    if args.json:
        print(json.dumps({name: asdict(size) for name, size in sizes.items()} | {"meshes": [*map(asdict, meshes)]}))
        return 0
    # In a narrower terminal lines wrap, and no number is cut off.
    console = Console(width=120, soft_wrap=True, markup=False, highlight=False)
    table = Table("name", "parameters", "active", "context", "bf16", "int8", "cache", "AdamW", box=None)
    for column in table.columns:
        column.justify, column.no_wrap = "left" if column is table.columns[0] else "right", True
    for name, size in sorted(sizes.items(), key=lambda item: (item[0].partition("-")[0], item[1].parameters)):
        counts = (f"{each / 1e9:,.2f} B" for each in (size.parameters, size.active_parameters))
        memory = (size.bfloat16, size.int8, size.cache, size.training["adamw"])
        table.add_row(name, *counts, f"{size.max_length:,}", *(f"{each / 1e9:,.2f}" for each in memory))
    console.print(table)
    console.print("GB: weights for serving, a cache of one text of the whole context, and training with AdamW")
    if is_one:
        [size] = sizes.values()
        console.print("training, GB of weights, gradients and optimizer state in float32:")
        console.print("  " + ", ".join(f"{kind} {used / 1e9:,.1f}" for kind, used in size.training.items()))
        length = min(ROW_LENGTH, size.max_length)
        console.print(f"smallest meshes for AdamW, rows of {length:,} tokens, one on each device (estimated):")
        for fit in meshes:
            mesh = " ".join(f"mesh.{axis}={count}" for axis, count in fit.mesh.items()) or "one device"
            console.print(f"  {fit.device:8}  {mesh}, {fit.device_bytes / 1e9:.1f} GB on each")
        console.print(f"source: {presets[found[0]].about.source}")
    return 0
