"""Chat templates by name, for models that come without one, and the user's own from a file."""

import difflib
from importlib.resources import files

from maxlm.errors import TokenizerError
from maxlm.runtime.storage import storage_path

_FOLDER = files("maxlm.prompts") / "templates"
_SUFFIX = ".jinja"

# Tokens that do not look like control tokens, so that they would be taken for text.
_TOKENS = {"mistral_v3": ("[INST]", "[/INST]"), "chatglm2": ("[gMASK]", "sop"), "chatglm3": ("[gMASK]", "sop")}


def template_names() -> list[str]:
    """The names of all templates."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in _FOLDER.iterdir() if file.name.endswith(_SUFFIX))


def template_tokens(name: str) -> tuple[str, ...]:
    """Tokens that a tokenizer must have as such for this template, besides those that look like control tokens."""
    return _TOKENS.get(name, ())


def read_template(name: str) -> str:
    """The source of a template: one by name, or a Jinja file of the user.

    Raises:
      TokenizerError: there is neither.
    """
    if name in template_names():
        return (_FOLDER / (name + _SUFFIX)).read_text(encoding="utf-8")
    path = storage_path(name)
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        near = difflib.get_close_matches(name, template_names(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"names are {', '.join(template_names())}"
        raise TokenizerError(f"chat_template {name!r} is neither a template nor a file; {hint}") from None
    except UnicodeDecodeError:
        raise TokenizerError(f"{path}: is not a text in UTF-8; give a Jinja template") from None
