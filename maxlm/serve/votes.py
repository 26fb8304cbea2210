"""People's votes on two answers of the served model, kept as preference data: `POST /v1/votes`."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from fastapi import FastAPI

from maxlm.data.examples.records import check_encodable
from maxlm.errors import ConfigError, DataError, TokenizerError
from maxlm.generate.model import LoadedModel
from maxlm.runtime.manifest import FILE_NAME as MANIFEST
from maxlm.runtime.manifest import content_hash, read_manifest, write_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.storage import LineLog, locked, storage_path
from maxlm.runtime.written import read_written_lines
from maxlm.serve.errors import ApiError
from maxlm.serve.schema import VoteBody

FILE_NAME = "votes.jsonl"


class Votes:
    """The folder that votes on one model are kept in; a vote is in its file when `add` returns.

    Its manifest names the model, so that what is trained on the votes can be traced to it.
    """

    def __init__(self, folder: Path, *, model_path: Path, model_hash: str, served: dict[str, Any]):
        self._folder, self._model_path, self._hash, self._served = folder, model_path, model_hash, served
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        for record in read_written_lines(storage_path(folder) / FILE_NAME):
            self._count(record)
        self._log = LineLog(storage_path(folder) / FILE_NAME)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, *, model_path: Path, served: dict[str, Any]) -> Iterator[Self]:
        """The votes of a folder, which is this process's until the block ends; then its manifest has the counts.

        Args:
          served: the settings that the model is served with.

        Raises:
          ConfigError: the folder cannot be written, is another stage's or process's, or has votes on another model.
        """
        check_output(folder, "votes", key="--votes")
        storage_path(folder).mkdir(parents=True, exist_ok=True)
        with locked(storage_path(folder), seconds=0) as is_mine:
            if not is_mine:
                raise ConfigError([f"--votes: another server writes {folder}; stop it, or give a new folder"])
            model_hash = content_hash(model_path)
            _check_same_model(folder, model_hash)
            votes = cls(folder, model_path=model_path, model_hash=model_hash, served=served)
            # A killed server leaves this one, whose counts are those of its start.
            votes._write_manifest()
            try:
                yield votes
            finally:
                votes._write_manifest()

    def add(self, body: VoteBody) -> int:
        """Append a vote; returns how many there are now.

        Raises:
          DataError: a text cannot be stored.
          OSError: the file cannot be written; the vote is not in it.
        """
        record = self._record(body)
        check_encodable(record, "the vote")
        with self._lock:
            try:
                self._log.append(json.dumps(record, ensure_ascii=False))
            except OSError:
                # The next append removes the part that may have been written.
                self._log = LineLog(storage_path(self._folder) / FILE_NAME)
                raise
            self._count(record)
            return sum(self._counts[name] for name in ("pairs", "ties", "both_bad"))

    def _record(self, body: VoteBody) -> dict[str, Any]:
        """A preference pair, or, of a vote for neither, both answers, which only readers of single answers use."""
        if body.choice in ("tie", "both_bad"):
            said = {"answers": body.answers, "judge": body.voter, "votes": [body.choice]}
            place = {}
        else:
            chosen, rejected = body.answers if body.choice == "first" else body.answers[::-1]
            said = {"chosen": chosen, "rejected": rejected, "judge": body.voter, "votes": ["chosen"]}
            place = {"shown_first": "chosen" if body.choice == "first" else "rejected"}
        metadata = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": str(self._model_path),
            "model_hash": self._hash,
            "sampling": body.sampling.model_dump(exclude_none=True),
        }
        return {"prompt": body.asked, **said, "metadata": metadata | place}

    def _count(self, record: dict[str, Any]) -> None:
        if "chosen" in record:
            self._counts["pairs"] += 1
            self._counts["first_wins"] += record["metadata"]["shown_first"] == "chosen"
        else:
            self._counts[{"tie": "ties", "both_bad": "both_bad"}[record["votes"][0]]] += 1

    def _write_manifest(self) -> None:
        with self._lock:
            counts = {name: self._counts[name] for name in ("pairs", "ties", "both_bad")}
            pairs = counts["pairs"]
            write_manifest(
                self._folder,
                stage="votes",
                inputs={"model": self._model_path},
                hashes={"model": self._hash},
                config=self._served,
                metrics={**counts, "shown_first_wins": self._counts["first_wins"] / pairs if pairs else None},
            )


def add_votes(app: FastAPI, votes: Votes | None, model: LoadedModel) -> None:
    """Add the path; without `votes` it says how to keep them."""

    # Not async: writing must not block the event loop, which streams the tokens.
    @app.post("/v1/votes")
    def vote(body: VoteBody) -> dict:
        if votes is None:
            message = "this server keeps no votes; start it with --votes DIR"
            raise ApiError(message, code="votes_not_kept", status=404)
        try:
            model.encode(body.asked)
        except TokenizerError as error:
            raise ApiError(str(error), param="messages") from None
        if body.messages and body.messages[-1].role == model.tokenizer.answering_role:
            raise ApiError(
                "the last message must be the one that the answers reply to, without an answer", param="messages"
            )
        try:
            return {"object": "vote", "votes": votes.add(body)}
        except OSError as error:
            message = f"the vote could not be written: {error.strerror}; send it again when that is repaired"
            raise ApiError(message, code="vote_not_written", status=500) from None


def _check_same_model(folder: Path, model_hash: str) -> None:
    if not (storage_path(folder) / MANIFEST).is_file():
        return
    try:
        known = read_manifest(folder)["inputs"]["model"]
    except (DataError, KeyError) as error:
        raise ConfigError([f"--votes: {error}; give a new folder"]) from None
    if known["hash"] != model_hash:
        raise ConfigError([f"--votes: {folder} has votes on another model ({known['path']}); give a new folder"])
