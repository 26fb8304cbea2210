"""Command lines: every subcommand with odd arguments."""

from hypothesis import given
from hypothesis import strategies as st
from odd_values import NUMBERS, TEXTS, overrides, scalars
from one_command import cases, check

# Commands that end early: there is no model and no data.
COMMANDS = [
    "config show configs/quickstart/pretrain.yaml",
    "config schema",
    "config",
    "data build configs/data/embedded.yaml sources=[]",
    "data show none",
    "data at-step 3 --run none",
    "tokenizer train configs/tokenizer/embedded.yaml",
    "tokenizer show none --text -",
    "train configs/post/sft.yaml",
    "train configs/quickstart/pretrain.yaml",
    "preview configs/post/dpo.yaml",
    "verify none.yaml",
    "eval none",
    "report none",
    "export none out --data none",
    "generate none -",
    "chat none",
    "serve none --port 0",
    "quickstart none.steps=1",
    "sweep configs/sweep/learning_rate.yaml --dry-run",
    "submit configs/quickstart/pretrain.yaml --name=a --project=b --zone=us-west4-a --dry-run"
    " --accelerator=v5litepod-16 --bucket=gs://a/b",
    "",
    "nonsense",
]
OPTIONS = [
    "-n",
    "--json",
    "--rows",
    "--rejects",
    "--split",
    "--seed",
    "--batch-size",
    "--data",
    "--run",
    "--text",
    "--only",
    "--all",
    "--markdown",
    "--task",
    "--compare",
    "--max-documents",
    "--max-new-tokens",
    "--temperature",
    "--stop",
    "--max-bits-per-byte",
    "--min-accuracy",
    "--output",
    "--ema",
    "--format",
    "--num-batches",
    "--max-mean-kl",
    "--top-p",
    "--top-k",
    "--system",
    "--host",
    "--slots",
    "--queue",
    "--max-length",
    "--dry-run",
    "--action",
    "--restarts",
    "--tail",
    "--worker",
    "--env",
    "--input",
    "--code",
    "--spot",
    "--no-baselines",
    "-h",
    "--",
    "-",
    "--x=y",
    "@file",
]
words = st.one_of(
    st.sampled_from(OPTIONS),
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS).map(str),
    scalars.map(str),
    overrides,
    st.text(max_size=6),
).filter(lambda word: "\0" not in word)


@cases(200)
@given(st.sampled_from(COMMANDS), st.lists(words, max_size=4), st.data())
def test_command_lines(command, more, data):
    line = command.split()
    for word in more:
        line.insert(data.draw(st.integers(min(1, len(line)), len(line))), word)
    check(*line)
