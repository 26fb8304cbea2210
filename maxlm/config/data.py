"""Where text comes from, how it is cleaned and packed, and how a tokenizer is trained on it."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from maxlm.config.base import Characters, Count, CountOrZero, Fraction, Frozen, Seed


class SourceConfig(Frozen):
    """One source of documents."""

    uri: str = Field(
        description="`python:stdlib`, a path or glob of .txt, .md, .jsonl, .json or .parquet files (also .gz, .zst),"
        " `tfds:NAME[:SPLIT]` or `hf:NAME[:SPLIT]`. What a build wrote into its output is not read."
    )
    text_field: str = Field(
        "text", description="The field that holds the text, in formats that have fields; a dotted one is nested: `a.b`."
    )
    id_field: str | None = Field(None, description="The field that names a document; without it, file and position do.")
    document_per_line: bool = Field(False, description="Each line of a plain-text file is a document.")
    split_on_blank_lines: Characters | None = Field(
        None,
        description="Cut a plain-text file into documents of about this many characters, at blank lines;"
        " without it and document_per_line, each file is one document.",
    )
    licence: str = Field("unknown", description="Recorded with each document, unless the source itself states one.")
    limit: Count | None = Field(None, description="Read at most this many documents.")

    @model_validator(mode="after")
    def _one_way_to_cut(self) -> Self:
        if self.document_per_line and self.split_on_blank_lines:
            raise ValueError("document_per_line and split_on_blank_lines exclude each other")
        return self


class RecordFormat(Frozen):
    """How the records of a file of chats, preferences or prompts are read."""

    fields: dict[str, str] = Field(
        {},
        description="Where the file keeps a field under another name: `{prompt: question}`; dotted names are nested.",
    )
    roles: dict[str, str] = Field(
        {}, description="Roles of messages that mean others: `{observation: user}`; human and gpt are known."
    )
    ignore_keys: tuple[str, ...] = Field(
        (), description="Keys of records and messages to leave out of account; other unknown ones are refused."
    )


class CleanConfig(Frozen):
    """Normalisation, and which documents are abnormal."""

    unicode_form: Literal["NFC", "NFKC", "none"] = "NFC"
    min_characters: Characters = 40
    max_characters: Characters = 2_000_000
    min_letter_fraction: Fraction = Field(0.25, description="Letters among the characters that are not white space.")
    max_repeated_line_fraction: Fraction = Field(0.7, description="Lines that stand in the document before.")


class DeduplicateConfig(Frozen):
    """Removal of documents that stand in the corpus already: exact copies always, near copies by MinHash."""

    near_threshold: Fraction | None = Field(0.8, description="Jaccard similarity of word shingles; null keeps them.")
    shingle_words: Count = 5
    num_permutations: Count = 128


class DecontaminateConfig(Frozen):
    """Removal of documents that overlap evaluation sets."""

    files: tuple[str, ...] = Field((), description="JSON, JSONL or Parquet files; every string in them counts.")
    ngram_words: Count = 13


class DataConfig(Frozen):
    """`maxlm data build`: sources to packed rows."""

    kind: Literal["data"]
    output: str = Field(description="Folder of the build.")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    clean: CleanConfig = CleanConfig()
    deduplicate: DeduplicateConfig = DeduplicateConfig()
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    valid_fraction: Fraction = Field(0.05, description="Documents held out, chosen by a hash of their id.")
    tokenizer: str = Field(description="Folder of the tokenizer that the rows are made with.")
    row_length: Annotated[int, Field(ge=2)] = Field(256, description="Tokens in a packed row.")
    workers: CountOrZero = Field(0, description="Processes that clean and tokenise; 0 takes one for each core.")
    seed: Seed = 0


class TokenizerConfig(Frozen):
    """`maxlm tokenizer train`: text to a SentencePiece model with chat tokens."""

    kind: Literal["tokenizer"]
    output: str = Field(description="Folder of the tokenizer.")
    input: str = Field(description="A folder of `maxlm data build`, or a text file.")
    algorithm: Literal["bpe", "unigram"] = "bpe"
    vocab_size: Count = 2048
    character_coverage: Fraction = 0.9995
    max_characters: Characters = Field(50_000_000, description="Train on at most this much text, evenly drawn.")
    seed: Seed = 0
