"""Run the feedback loop: serve a model, collect votes on its answers, reward model, PPO, blind comparison.

    python tools/recipes/feedback_loop.py runs/feedback_loop

The model adds numbers below 20 (`sums.py`). A scripted voter asks the served model over HTTP, gets two answers, and
prefers the right one, except that one vote in ten is given at random. Nothing after the votes reads a right answer but
the measurements. Prints the accuracy before and after, the reward model's on held-out pairs, how often the voter
prefers PPO's answer without knowing whose it is, and the chain of manifests from the text to the last model.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx2 as httpx
import numpy as np
from stages import maxlm, once, print_table, read, shown, write
from sums import accuracy, prepare

from maxlm.core.interval import mean_interval
from maxlm.runtime.manifest import manifest_chain

CONFIGS = Path(__file__).parents[2] / "configs" / "recipes" / "feedback_loop"
PORT = 8765
QUESTIONS, RANDOM_VOTES = 15_000, 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/feedback_loop"))
    out = parser.parse_args().output
    prepare(out)
    data = out / "data"
    if not (out / "votes" / "votes.jsonl").exists():
        collect_votes(out / "sft", data / "prompts.jsonl", out / "votes")
    names = [f"output={out}/reward", f"init_from={out}/sft", f"objective.train_file={out}/votes/votes.jsonl"]
    maxlm("train", f"{CONFIGS}/reward.yaml", *names)
    reward = f"objective.reward=[{{model: {out}/reward}}]"
    names = [f"output={out}/ppo", f"init_from={out}/sft", f"objective.train_file={data}/prompts.jsonl", reward]
    maxlm("train", f"{CONFIGS}/ppo.yaml", *names)

    files = {"training sums, sampled": ("prompts", 1.0), "held-out sums, greedy": ("valid", 0.0)}
    rows = [
        (title, *(accuracy(out / model, data / f"{file}.jsonl", temperature) for model in ("sft", "ppo")))
        for title, (file, temperature) in files.items()
    ]
    print_table(("accuracy", "SFT", "PPO"), rows)
    print(f"\nThe reward model prefers the right answer to a held-out sum: {right_pairs(out)}")
    print(f"The voter prefers PPO's answer, blindly, ties as a half: {blind_comparison(out)}\n")
    print(" -> ".join(f"{Path(item['folder']).name} ({item['stage']})" for item in manifest_chain(out / "ppo")))


def vote(answers: list[str], right: str, numbers: random.Random) -> str:
    """What the voter says of two answers."""
    if numbers.random() < RANDOM_VOTES:
        return numbers.choice(["first", "second", "tie"])
    good = [answer.strip() == right for answer in answers]
    return {(True, True): "tie", (False, False): "both_bad"}.get(tuple(good), "first" if good[0] else "second")


def collect_votes(model: Path, prompts: Path, votes: Path) -> None:
    """Serve the model, ask it, and vote."""
    numbers, records = random.Random(0), read(prompts)
    asked = numbers.choices(records, k=QUESTIONS)
    command = [sys.executable, "-m", "maxlm.cli", "serve", str(model), "--votes", str(votes), "--port", str(PORT)]
    print("maxlm", *command[3:], file=sys.stderr)
    server = subprocess.Popen([*command, "--quiet"])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=60) as client, ThreadPoolExecutor(8) as pool:
            wait_for(server, client)
            for said in pool.map(partial(two_answers, client), range(QUESTIONS), asked):
                one, other = (answer.strip() for answer in said["answers"])
                if one != other and one and other:
                    choice = vote([one, other], said.pop("right"), numbers)
                    client.post("/v1/votes", json={**said, "choice": choice}).raise_for_status()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def two_answers(client: httpx.Client, number: int, record: dict) -> dict:
    """What a vote says, but for the choice, and the right answer."""
    settings = {"temperature": 1.0, "max_tokens": 4, "seed": number}
    reply = client.post("/v1/completions", json={"prompt": record["prompt"], "n": 2, **settings}).raise_for_status()
    answers = [choice["text"] for choice in reply.json()["choices"]]
    said = {"prompt": record["prompt"], "answers": answers, "voter": "script", "sampling": settings}
    return {**said, "right": record["answer"]}


def wait_for(server: subprocess.Popen, client: httpx.Client) -> None:
    while server.poll() is None:
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise SystemExit(f"the server ended with exit code {server.returncode}")


def right_pairs(out: Path) -> str:
    """How often the reward model scores the right answer of a held-out sum above a wrong one that is close."""
    numbers, file = random.Random(1), out / "pairs.jsonl"
    pairs = []
    for record in read(out / "data" / "valid.jsonl"):
        for distance in (-3, -2, -1, 1, 2, 3):
            if (wrong := int(record["answer"]) + distance) >= 0:
                pairs.append({"prompt": record["prompt"], "chosen": record["answer"], "rejected": str(wrong)})
    numbers.shuffle(pairs)
    write(file, pairs)
    once(out / "pairs.scores.jsonl", "score", f"{out}/reward", str(file), "--output", f"{out}/pairs.scores.jsonl")
    better = [line["chosen_score"] > line["rejected_score"] for line in read(out / "pairs.scores.jsonl")]
    return shown(mean_interval(np.array(better, np.float64)).to_dict())


def blind_comparison(out: Path) -> str:
    """The voter's share of votes for PPO's answers to all sums, each shown with SFT's in random order."""
    numbers, points = random.Random(2), []
    for file in ("prompts", "valid"):
        outputs = []
        for model in ("sft", "ppo"):
            result = out / f"{model}.{file}.json"
            options = ["--temperature", "1.0", "--max-new-tokens", "4", "--no-baselines", "--output", str(result)]
            once(result, "eval", f"{out}/{model}", "--task", f"{out}/data/{file}.jsonl", *options)
            outputs.append([example["output"] for example in json.loads(result.read_text())["tasks"][0]["examples"]])
        for record, *answers in zip(read(out / "data" / f"{file}.jsonl"), *outputs, strict=True):
            order = numbers.sample([0, 1], 2)
            choice = vote([answers[index] for index in order], record["answer"], numbers)
            shown_place = {"first": 0, "second": 1}.get(choice)
            points.append(0.5 if shown_place is None else float(order[shown_place] == 1))
    return shown(mean_interval(np.array(points)).to_dict())


if __name__ == "__main__":
    main()
