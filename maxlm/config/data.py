"""Text sources, cleaning and packing, and tokenizer training."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from maxlm.config.base import Characters, Count, CountOrZero, Fraction, Frozen, Seed


class SourceConfig(Frozen):
    """One source of documents."""

    uri: str = Field(
        description="`python:stdlib`, a path or glob of .txt, .md, .jsonl, .json or .parquet files (also .gz, .zst),"
        " `tfds:NAME[:SPLIT]` or `hf:NAME[:SPLIT]`. Files that the build wrote into its own output are not read."
    )
    text_field: str = Field(
        "text", description="The field that holds the text, in formats with fields; dots address nested fields: `a.b`."
    )
    id_field: str | None = Field(None, description="The field with a document's id; null uses file and position.")
    document_per_line: bool = Field(False, description="Each line of a plain-text file is a document.")
    split_on_blank_lines: Characters | None = Field(
        None,
        description="Split a plain-text file at blank lines into documents of about this many characters;"
        " without it and document_per_line, each file is one document.",
    )
    licence: str = Field("unknown", description="Recorded with each document, unless the source itself states one.")
    limit: Count | None = Field(None, description="Read at most this many documents.")

    @model_validator(mode="after")
    def _one_way_to_split(self) -> Self:
        if self.document_per_line and self.split_on_blank_lines:
            raise ValueError("document_per_line and split_on_blank_lines are mutually exclusive")
        return self


class RecordFormat(Frozen):
    """How to read the records of a file of chats, preferences or prompts."""

    fields: dict[str, str] = Field(
        {},
        description="Field -> its name in the file, if it differs: `{prompt: question}`; dotted names are nested.",
    )
    roles: dict[str, str] = Field(
        {}, description="Role in the file -> standard role: `{bot: assistant}`; human and gpt are built in."
    )
    ignore_keys: tuple[str, ...] = Field(
        (), description="Keys of records and messages to ignore; other unknown keys are errors."
    )


class ChatConfig(RecordFormat):
    """How chats become examples to learn from."""

    train_on: Literal["all", "last"] | tuple[int | str, ...] = Field(
        "all",
        description="Answers to learn: all, the last of a chat, or a list of their numbers in it (1 is the first, -1"
        " the last) and of names of those who answer.",
    )
    weighting: Literal["token", "dialogue"] = Field(
        "token", description="What counts the same in the loss: each learned token, or each chat."
    )
    too_long: Literal["drop", "truncate", "split"] = Field(
        "drop",
        description="What becomes of chats longer than row_length: none, their last turns after the system prompt, or"
        " several chats.",
    )

    @field_validator("train_on", mode="before")
    @classmethod
    def _names_answers(cls, value: Any) -> Any:
        is_list = isinstance(value, list | tuple) and value and all(type(each) in (int, str) and each for each in value)
        if value not in ("all", "last") and not is_list:
            raise ValueError(
                "must be all, last, or a list of names and of numbers of answers, from 1 or from -1 backwards"
            )
        return value


class CleanConfig(Frozen):
    """Text normalization and document quality filters."""

    unicode_form: Literal["NFC", "NFKC", "none"] = "NFC"
    min_characters: Characters = 40
    max_characters: Characters = 2_000_000
    min_letter_fraction: Fraction = Field(0.25, description="Share of letters among non-whitespace characters.")
    max_repeated_line_fraction: Fraction = Field(0.7, description="Share of lines that repeat earlier ones.")


class DeduplicateConfig(Frozen):
    """Removal of duplicate documents: exact duplicates always, near-duplicates by MinHash."""

    near_threshold: Fraction | None = Field(
        0.8, description="Jaccard similarity of word shingles; null keeps near-duplicates."
    )
    shingle_words: Count = 5
    num_permutations: Count = 128


class DecontaminateConfig(Frozen):
    """Removal of documents that overlap with evaluation sets."""

    files: tuple[str, ...] = Field((), description="JSON, JSONL or Parquet files; all their strings are compared.")
    ngram_words: Count = 13


class DataConfig(Frozen):
    """`maxlm data build`: sources to packed rows."""

    kind: Literal["data"]
    output: str = Field(description="Output folder of the build.")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    clean: CleanConfig = CleanConfig()
    deduplicate: DeduplicateConfig = DeduplicateConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    valid_fraction: Fraction = Field(0.05, description="Share of held-out documents, chosen by a hash of their id.")
    tokenizer: str = Field(description="Folder of the tokenizer that the rows are made with.")
    row_length: Annotated[int, Field(ge=2)] = Field(256, description="Tokens in a packed row.")
    workers: CountOrZero = Field(0, description="Processes that clean and tokenize; 0 uses one per core.")
    seed: Seed = 0


class TokenizerConfig(Frozen):
    """`maxlm tokenizer train`: text to a SentencePiece model with chat tokens."""

    kind: Literal["tokenizer"]
    output: str = Field(description="Output folder of the tokenizer.")
    input: str = Field(description="A folder of `maxlm data build`, or a text file.")
    algorithm: Literal["bpe", "unigram"] = "bpe"
    vocab_size: Count = 2048
    character_coverage: Fraction = 0.9995
    control_tokens: tuple[str, ...] = Field(
        (), description="Control tokens besides those of chats, such as <|fim_prefix|>."
    )
    max_characters: Characters = Field(50_000_000, description="Train on at most this much text, sampled evenly.")
    seed: Seed = 0
