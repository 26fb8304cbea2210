"""`maxlm train` and `maxlm preview`."""

import argparse
import json
import sys

from maxlm.runtime.arguments import add_config, count

TRAIN_EPILOG = """\
examples:
  maxlm train configs/quickstart/pretrain.yaml               pretrain; the same command resumes a run that was stopped
  maxlm train configs/post/sft.yaml                          fine-tune on chats
  maxlm train configs/post/sft.yaml adapters.kind=lora        the same, but train only low-rank adapters
  maxlm train configs/post/dpo.yaml objective.loss.beta=0.05     learn from preferences; reward, grpo, distill alike
  maxlm train CONFIG output=runs/second seed=1               override any setting with key=value
  maxlm train CONFIG --supervise 10                          restart from the last checkpoint after a crash
  maxlm train CONFIG steps=2000                              train a finished run longer
  maxlm train CONFIG optim.learning_rate=1e-4 --accept-changes   resume with other settings, and record them
"""

PREVIEW_EPILOG = """\
examples:
  maxlm preview configs/post/sft.yaml              is the loss on the answers only?
  maxlm preview configs/post/sft.yaml --html page.html     the same as a page, with ids and weights
  maxlm preview configs/post/dpo.yaml -n 1         one pair
  maxlm preview configs/quickstart/pretrain.yaml   where does each document start in a packed row?
"""


def register(subparsers) -> None:
    """Add the commands to the command line."""
    train = subparsers.add_parser(
        "train",
        help="pretrain, fine-tune or align a model",
        description="Train from a configuration: pretraining, distillation, SFT, reward model, DPO, GRPO. The run"
        " folder holds checkpoints, metrics.jsonl, tensorboard/ and manifest.json. An existing run is"
        " resumed if it is the same run: incompatible settings are rejected (docs/resuming.md).",
        epilog=TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(train, "train")
    train.add_argument(
        "--supervise",
        type=count,
        metavar="N",
        help="restart training from its last checkpoint after a crash, at most N times",
    )
    train.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume with settings or data that differ from the run's; they are recorded in its manifest",
    )
    train.add_argument("--json", action="store_true", help="print the final numbers as one JSON object")
    train.set_defaults(func=run_train)

    preview = subparsers.add_parser(
        "preview",
        help="show training examples, with tokens colored by loss weight",
        description="Print the first examples that a training configuration trains on, in order, with its"
        " chat template and packing. Tokens that count in the loss are highlighted.",
        epilog=PREVIEW_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config(preview, "train")
    preview.add_argument("-n", type=count, default=3, metavar="N", help="number of examples (3)")
    preview.add_argument("--html", metavar="FILE", help="write a page instead, which also shows ids and loss weights")
    preview.set_defaults(func=run_preview)


def run_train(args: argparse.Namespace) -> int:
    from maxlm.config.load import load_config

    config = load_config(args.config, args.overrides, kind="train")
    if args.supervise is not None:
        from maxlm.runtime.supervise import supervise

        flags = {"--accept-changes": args.accept_changes, "--json": args.json}
        arguments = ["train", args.config, *args.overrides, *(flag for flag, given in flags.items() if given)]
        command = [sys.executable, "-m", "maxlm.cli", *arguments]
        return supervise(command, config, restarts=args.supervise)

    from maxlm.runtime.distributed import is_primary
    from maxlm.train.run import train

    metrics = train(config, accept_changes=args.accept_changes)["metrics"]
    if not is_primary():
        return 0
    if args.json:
        print(json.dumps({"output": config.output, **metrics}))
        return 0
    state = "finished" if metrics["finished"] else "stopped; run the same command to resume"
    print(f"{config.output}: {metrics['steps']} of {config.steps} steps, {state}")
    speed = f"{metrics['seconds']:.1f} s, {metrics['tokens_per_second']:,.0f} tokens/s"
    print(f"  {speed}, {metrics['skipped']} steps skipped")
    for name, value in metrics["valid"].items():
        print(f"  valid {name} {value:.4f}")
    return 0


def run_preview(args: argparse.Namespace) -> int:
    from rich.console import Console

    from maxlm.config.load import load_config
    from maxlm.train.preview import legend, preview, render

    config = load_config(args.config, args.overrides, kind="train")
    tokenizer, examples = preview(config, num_examples=args.n)
    if args.html is not None:
        from maxlm.train.preview_page import write_preview

        write_preview(args.html, f"Training examples of {args.config}", list(examples), tokenizer)
        print(f"wrote {args.html}")
        return 0
    console = Console(highlight=False)
    plain = console.color_system is None
    for number, example in enumerate(examples):
        if number == 0:
            console.print(legend(plain=plain), "")
        console.print(render(example, tokenizer, plain=plain), soft_wrap=plain)
    return 0
