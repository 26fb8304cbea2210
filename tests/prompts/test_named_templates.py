"""Chat templates by name: what they write, what is learned, and when they are refused."""

import pytest

from maxlm.data.examples.encoding import encode_chat
from maxlm.errors import DataError, TokenizerError
from maxlm.prompts.named_templates import template_names

CHAT = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
    {"role": "assistant", "content": "   I am an assistant   "},
    {"role": "user", "content": "Another question"},
]

# Control tokens besides <s> and </s>, and what publishers write for the chat above, up to the next answer. Strings of
# the tests of llama.cpp, which renders the templates of the models' repositories, with the start token that it adds
# itself; Mistral 3 as documented in Mistral's cookbook, DeepSeek 3 as in its tokenizer's settings, Vicuna and Falcon as
# in FastChat, Alpaca, ChatGLM2 and Baichuan 2 as in their authors' code.
PUBLISHED = {
    "llama2": (
        (),
        "<s>[INST] <<SYS>>\nYou are a helpful assistant\n<</SYS>>\n\nHello [/INST] Hi there </s>"
        "<s>[INST] Who are you [/INST] I am an assistant </s><s>[INST] Another question [/INST]",
    ),
    "llama3": (
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hi there<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWho are you<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nI am an assistant<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnother question<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": (
        ("<|im_start|>", "<|im_end|>"),
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n"
        "<|im_start|>assistant\n   I am an assistant   <|im_end|>\n<|im_start|>user\nAnother question<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "gemma": (
        ("<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\nYou are a helpful assistant\n\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi there<end_of_turn>\n<start_of_turn>user\nWho are you<end_of_turn>\n"
        "<start_of_turn>model\nI am an assistant<end_of_turn>\n<start_of_turn>user\nAnother question<end_of_turn>\n"
        "<start_of_turn>model\n",
    ),
    "mistral": (
        (),
        "<s> [INST] You are a helpful assistant\n\nHello [/INST] Hi there</s> [INST] Who are you [/INST]"
        "    I am an assistant   </s> [INST] Another question [/INST]",
    ),
    "mistral_v3": (
        ("[INST]", "[/INST]"),
        "<s>[INST] You are a helpful assistant\n\nHello[/INST] Hi there</s>[INST] Who are you[/INST]"
        "    I am an assistant   </s>[INST] Another question[/INST]",
    ),
    "chatglm2": (
        ("[gMASK]", "sop"),
        "[gMASK]sopYou are a helpful assistant\n\n[Round 1]\n\n问：Hello\n\n答：Hi there\n\n[Round 2]\n\n"
        "问：Who are you\n\n答：   I am an assistant   \n\n[Round 3]\n\n问：Another question\n\n答：",
    ),
    "chatglm3": (
        ("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
        "[gMASK]sop<|system|>\n You are a helpful assistant<|user|>\n Hello<|assistant|>\n Hi there<|user|>\n Who are"
        " you<|assistant|>\n    I am an assistant   <|user|>\n Another question<|assistant|>",
    ),
    "glm4": (
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        "[gMASK]<sop><|system|>\nYou are a helpful assistant<|user|>\nHello<|assistant|>\nHi there<|user|>\nWho are you"
        "<|assistant|>\n   I am an assistant   <|user|>\nAnother question<|assistant|>\n",
    ),
    "deepseek": (
        (),
        "<s>You are a helpful assistant\n\nUser: Hello\n\nAssistant: Hi there</s>User: Who are you\n\n"
        "Assistant:    I am an assistant   </s>User: Another question\n\nAssistant:",
    ),
    "deepseek_v3": (
        ("<｜User｜>", "<｜Assistant｜>"),
        "<s>You are a helpful assistant<｜User｜>Hello<｜Assistant｜>Hi there</s><｜User｜>Who are you<｜Assistant｜>"
        "   I am an assistant   </s><｜User｜>Another question<｜Assistant｜>",
    ),
    "alpaca": (
        (),
        "<s>You are a helpful assistant\n\n### Instruction:\nHello\n\n### Response:Hi there</s>\n\n"
        "### Instruction:\nWho are you\n\n### Response:   I am an assistant   </s>\n\n"
        "### Instruction:\nAnother question\n\n### Response:",
    ),
    "vicuna": (
        (),
        "<s>You are a helpful assistant USER: Hello ASSISTANT: Hi there</s>USER: Who are you ASSISTANT:"
        "    I am an assistant   </s>USER: Another question ASSISTANT:",
    ),
    "baichuan2": (
        ("<reserved_106>", "<reserved_107>"),
        "You are a helpful assistant<reserved_106>Hello<reserved_107>Hi there<reserved_106>Who are you<reserved_107>"
        "   I am an assistant   <reserved_106>Another question<reserved_107>",
    ),
    "falcon": (
        (),
        "System: You are a helpful assistant\nUser: Hello\nFalcon: Hi there\nUser: Who are you\n"
        "Falcon:    I am an assistant   \nUser: Another question\nFalcon:",
    ),
}
PUBLISHED["qwen"] = PUBLISHED["chatml"]

# What is learned of the chat above up to its second answer, where it is not each answer after a space, with its end.
LEARNED = {
    "llama2": (" Hi there </s>", " I am an assistant </s>"),
    "llama3": ("Hi there<|eot_id|>", "I am an assistant<|eot_id|>"),
    "chatml": ("Hi there<|im_end|>", "   I am an assistant   <|im_end|>"),
    "qwen": ("Hi there<|im_end|>", "   I am an assistant   <|im_end|>"),
    "gemma": ("Hi there<end_of_turn>", "I am an assistant<end_of_turn>"),
    # In the history, answers have no end.
    "chatglm2": ("Hi there", "   I am an assistant   </s>"),
    "baichuan2": ("Hi there", "   I am an assistant   </s>"),
    "falcon": (" Hi there", "    I am an assistant   </s>"),
    # The token of the next turn is the end.
    "chatglm3": ("\n Hi there<|user|>", "\n    I am an assistant   <|user|>"),
    "glm4": ("Hi there<|user|>", "   I am an assistant   <|user|>"),
    "alpaca": ("Hi there</s>", "   I am an assistant   </s>"),
    "deepseek_v3": ("Hi there</s>", "   I am an assistant   </s>"),
}
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture
def load(make_tokenizer):
    def load(name):
        return make_tokenizer("<s>", "</s>", *PUBLISHED[name][0], **NAMED).with_template(name)

    return load


def learned_parts(tokenizer, tokens):
    """The runs of learned tokens, as text."""
    parts, before = [], False
    for id_, weight in zip(tokens.ids, tokens.loss_weights):
        if weight:
            parts = [*parts[:-1], [*parts[-1], id_]] if before else [*parts, [id_]]
        before = bool(weight)
    return tuple(tokenizer.decode(part, skip_control=False) for part in parts)


def test_every_template_is_compared():
    assert sorted(PUBLISHED) == template_names()


@pytest.mark.parametrize("name", PUBLISHED)
def test_templates_write_what_publishers_write(load, name):
    tokenizer = load(name)
    tokens, expected = PUBLISHED[name]
    ids = tokenizer.encode_chat(CHAT, generation_prompt=True).ids
    assert tokenizer.decode(ids, skip_control=False) == expected
    # Each control token is one id, and nothing else is one.
    controls = [tokenizer.token_text(id_) for id_ in ids if tokenizer.is_control(id_)]
    assert len(controls) == sum(expected.count(token) for token in ("<s>", "</s>", *tokens) if token != "sop") + (
        "sop" in tokens
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_answers_are_learned_after_their_prompt_with_their_end(load, name):
    tokenizer = load(name)
    tokens = tokenizer.encode_chat(CHAT[:-1])
    assert learned_parts(tokenizer, tokens) == LEARNED.get(name, (" Hi there</s>", "    I am an assistant   </s>"))
    # The last answer follows its prompt, and ends with what stops generation.
    prompt = tokenizer.encode_chat(CHAT[:-2], generation_prompt=True)
    start = next(i for i in range(len(tokens.ids)) if all(tokens.loss_weights[i : i + 9]) and i >= len(prompt.ids))
    assert tokens.ids[:start] == prompt.ids
    assert [id_ for id_, weight in zip(tokens.ids, tokens.loss_weights) if weight][-1] in tokenizer.stop_ids


@pytest.mark.parametrize("name", PUBLISHED)
def test_text_of_a_message_cannot_become_a_control_token(load, name):
    tokenizer = load(name)
    forged = "x " + " ".join(tokenizer.control_tokens)
    ids = tokenizer.encode_chat([{"role": "user", "content": forged}], generation_prompt=True).ids
    plain = tokenizer.encode_chat([{"role": "user", "content": "x"}], generation_prompt=True).ids
    assert sum(map(tokenizer.is_control, ids)) == sum(map(tokenizer.is_control, plain))
    assert forged in tokenizer.decode(ids)


def test_defaults_of_publishers_are_written_without_a_system_prompt(load):
    expected = {
        "qwen": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n",
        "alpaca": "<s>Below is an instruction that describes a task. Write a response that appropriately completes the"
        " request.\n\n### Instruction:\nHello",
        "vicuna": "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives"
        " helpful, detailed, and polite answers to the user's questions. USER: Hello",
    }
    for name, beginning in expected.items():
        tokenizer = load(name)
        ids = tokenizer.encode_chat(CHAT[1:2], generation_prompt=True).ids
        assert tokenizer.decode(ids, skip_control=False).startswith(beginning)


@pytest.mark.parametrize("name", ["llama2", "gemma", "mistral", "mistral_v3", "chatglm2", "alpaca", "vicuna"])
def test_turns_that_do_not_alternate_are_refused_where_a_template_needs_it(load, name):
    with pytest.raises(TokenizerError, match=r"refuses the chat: .* must take turns"):
        load(name).encode_chat([CHAT[1], CHAT[1], CHAT[2]])


def test_messages_of_a_file_that_do_not_alternate_are_named(load):
    with pytest.raises(DataError, match=r"^f:7: .* must take turns; messages 1 and 2 are both of role 'user'"):
        encode_chat(load("llama2"), [CHAT[1], CHAT[1], CHAT[2]], "f:7")


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("chatml", "<|im_start|>"),
        ("llama3", "<|start_header_id|>"),
        ("gemma", "<start_of_turn>"),
        ("mistral_v3", "[INST]"),
        ("chatglm3", "sop"),
        ("glm4", "<sop>"),
        ("baichuan2", "<reserved_106>"),
        ("deepseek_v3", "<｜User｜>"),
    ],
)
def test_template_whose_tokens_are_missing_is_refused_in_one_sentence(make_tokenizer, name, lacks):
    others = [token for token in PUBLISHED[name][0] if token != lacks]
    tokenizer = make_tokenizer("<s>", "</s>", *others, **NAMED)
    with pytest.raises(TokenizerError) as error:
        tokenizer.with_template(name)
    assert f"the chat template writes {lacks!r}, which is not one token of the tokenizer" in str(error.value)
    assert "\n" not in str(error.value)


def test_template_without_an_end_token_is_refused(make_tokenizer):
    with pytest.raises(TokenizerError, match="'eos_token' is undefined; name it in tokenizer_config"):
        make_tokenizer("<s>", bos_token="<s>").with_template("llama2")
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(TokenizerError, match="ends an answer with no control token, so a model would not learn to end"):
        make_tokenizer("<s>", "</s>", chat_template=own, **NAMED).check_template()


@pytest.mark.parametrize(
    ("answer", "learned"),
    [
        # Text after the end is the template's, not the model's, and nothing is added.
        ("{{ m.content }}</s>.", ("Hi there</s>.", "Fine</s>.")),
        ("{{ m.content }}", ("Hi there<s>", "Fine<s>")),
    ],
)
def test_an_end_is_added_only_where_a_template_has_none(make_tokenizer, answer, learned):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}>{% else %}ANSWER{% endif %}{% endfor %}"
    ).replace("ANSWER", answer)
    tokenizer = make_tokenizer("<s>", "</s>", chat_template=template, **NAMED)
    chat = [*CHAT[1:4], {"role": "assistant", "content": "Fine"}]
    assert learned_parts(tokenizer, tokenizer.encode_chat(chat)) == learned


def test_unknown_name_and_second_template_are_refused(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer("<s>", "</s>", **NAMED)
    with pytest.raises(TokenizerError, match="'lama2' is neither a template nor a file; did you mean 'llama2'"):
        tokenizer.with_template("lama2")
    with pytest.raises(TokenizerError, match="has a chat template, which its model was trained with"):
        tokenizer.with_template("llama2").with_template("vicuna")


def test_own_file_is_used_as_it_is_and_saved_with_the_tokenizer(make_tokenizer, tmp_path):
    source = "{% for m in messages %}{{ m.role }}> {{ m.content + eos_token }}{% endfor %}"
    (tmp_path / "own.jinja").write_text(source)
    before = make_tokenizer("</s>", eos_token="</s>")
    tokenizer = before.with_template(str(tmp_path / "own.jinja"))
    assert tokenizer.fingerprint != before.fingerprint
    tokenizer.save(tmp_path / "saved")
    again = type(tokenizer).load(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.encode_chat(CHAT[1:3]) == tokenizer.encode_chat(CHAT[1:3])
    assert again.template.source == source


def test_unknown_roles_are_refused_with_the_nearest_one(load):
    with pytest.raises(TokenizerError, match="chat role 'usr' is unknown; did you mean 'user'"):
        load("chatml").encode_chat([{"role": "usr", "content": "Hello"}])
