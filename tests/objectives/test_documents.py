"""The documents of a batch are named by file and line, also after a record that is too long to use."""

import jax
import pytest
from toy_task import chat, make_config, question, write_lines

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.interop.load import load_model
from maxlm.train.objective import RunContext
from maxlm.train.setup import resolve_model

THINGS = ["sky", "grass", "snow", "coal", "blood", "sun", "coin"]
TOO_LONG = " ".join(THINGS * 40)


def record(kind: str, thing: str) -> dict:
    if kind == "sft":
        return chat(thing, "yes")
    if kind == "policy":
        return {"prompt": question(thing), "answer": "yes"}
    if kind == "unpaired_preference":
        return {"prompt": question(thing), "completion": "yes", "label": len(thing) == 3}
    if kind == "process_reward":
        return {"prompt": question(thing), "steps": ["yes", "no"], "labels": [1, 0]}
    return {"prompt": question(thing), "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize("kind", ["sft", "reward", "process_reward", "preference", "unpaired_preference", "policy"])
def test_lines_of_a_batch_match_its_tokens(kind, tokenizer, untrained, tmp_path):
    records = [record(kind, TOO_LONG), *(record(kind, thing) for thing in THINGS)]
    file = write_lines(tmp_path / "data.jsonl", records)
    settings = {"max_new_tokens": 4, "group_size": 2} if kind == "policy" else {}
    config = make_config(
        tmp_path / "run",
        init_from=str(untrained),
        objective={"kind": kind, "train_file": file, **settings},
        batch_size=2,
        row_length=24,
    )
    config = resolve_model(config, tokenizer)
    mesh = make_mesh(MeshConfig(fsdp=1))
    with jax.set_mesh(mesh):
        model, _ = load_model(str(untrained), mesh)
        context = RunContext(config, tokenizer, mesh, lambda: model)
        data = config.objective.open_data(context)
    seen = set()
    for number in range(3):
        places = [document["id"] for document in data.documents(number)]
        lines = [records[int(place.rsplit(":", 1)[1]) - 1] for place in places]
        assert all(place.startswith(f"{file}:") for place in places)
        if kind == "sft":
            batch = next(data.batches(number, None))
            texts = " ".join(tokenizer.decode(row.tolist()) for row in batch["text"].tokens)
            for line in lines:
                assert line["messages"][0]["content"] in texts
        elif kind != "policy":
            with jax.set_mesh(mesh):
                batch = next(data.batches(number, lambda: model))
            stream = next(iter(batch.streams.values()))
            for line, row in zip(lines, stream.tokens, strict=True):
                assert line["prompt"][0]["content"] in tokenizer.decode(row.tolist())
        seen.update(places)
    assert f"{file}:1" not in seen
    assert len(seen) >= 5
