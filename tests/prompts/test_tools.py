"""Tool calls, their results and names of speakers: as templates write them, or else as text."""

import pytest

from maxlm.prompts.chat_template import ChatTemplate, RoleTemplate
from maxlm.prompts.jinja_template import JinjaTemplate
from maxlm.prompts.tools import CALLS, NAMES, RESULTS, TOOLS, as_written

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


def call(name, **arguments):
    return {"id": "call00001", "type": "function", "function": {"name": name, "arguments": arguments}}


CHAT = [
    {"role": "user", "content": "Rome or Bern?"},
    {"role": "assistant", "content": "", "tool_calls": [call("weather", city="Rome"), call("weather", city="Bern")]},
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call00002", "name": "weather", "content": "雪"},
    {"role": "assistant", "content": "Rome."},
]

# As Qwen 2.5 writes them.
TOOLS_TEXT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": \
{"type": "string"}}}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
CALLS_TEXT = (
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
)
RESULTS_TEXT = "<tool_response>\nsunny\n</tool_response>\n<tool_response>\n雪\n</tool_response>"


def test_what_a_template_does_not_write_becomes_text():
    messages, tools = as_written(CHAT, [WEATHER], set())
    assert tools is None
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", TOOLS_TEXT),
        ("user", "Rome or Bern?"),
        ("assistant", CALLS_TEXT),
        ("user", RESULTS_TEXT),
        ("assistant", "Rome."),
    ]
    assert not any("tool_calls" in message for message in messages)


def test_text_is_added_to_what_is_there():
    system, thinking = {"role": "system", "content": "Be brief."}, CHAT[1] | {"content": "Let me see.", "weight": 0.5}
    messages, _ = as_written([system, CHAT[0], thinking], [WEATHER], set())
    assert messages[0]["content"] == f"Be brief.\n\n{TOOLS_TEXT}"
    assert messages[2] == {"role": "assistant", "content": f"Let me see.\n{CALLS_TEXT}", "weight": 0.5}


def test_names_become_text_and_weights_stay():
    messages, _ = as_written([{"role": "assistant", "name": "Ann", "content": "Hi", "weight": 0.0}], None, set())
    assert messages == [{"role": "assistant", "content": "Ann: Hi", "weight": 0.0}]


def test_a_template_that_writes_everything_gets_everything():
    everything = {CALLS, RESULTS, TOOLS, NAMES}
    assert as_written(CHAT, [WEATHER], everything) == (CHAT, [WEATHER])


# Templates in the manner of families: what they write, and how they want to be given it.
HEADERS = """\
{%- if tools %}{{- 'TOOLS ' + tools | tojson + '\n' }}{%- endif %}
{%- for m in messages %}
  {%- if m.tool_calls %}{{- '<a>' }}{%- for c in m.tool_calls %}{{- c.function | tojson }}{%- endfor %}{{- '</a>' }}
  {%- elif m.role == 'tool' %}{{- '<r>' + m.content + '</r>' }}
  {%- else %}{{- '<' + m.role[0] + '>' + m.content + '</a>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<a>' }}{%- endif %}"""
# As in DeepSeek R1: calls only if the content is none, arguments as text, nothing of tools.
CONCATENATING = """\
{%- for m in messages %}
  {%- if m.role == 'assistant' and m.content is none %}
    {%- for c in m.tool_calls %}{{- '<a>' + c.function.name + ' ' + c.function.arguments + '</a>' }}{%- endfor %}
  {%- elif m.role == 'tool' %}{{- '<r>' + m.content + '</r>' }}
  {%- else %}{{- '<' + m.role[0] + '>' + m.content + '</a>' }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<a>' }}{%- endif %}"""
PLAIN = "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '</a>' }}{% endfor %}"
NAMING = "{% for m in messages %}{{ '<' + m.role[0] + '>' + (m.name or '') + '|' + m.content + '</a>' }}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role') }}{% endif %}"
    "{{ '<' + m.role[0] + '>' + m.content + '</a>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "writes"),
    [
        (HEADERS, {CALLS, RESULTS, TOOLS}),
        (CONCATENATING, {CALLS, RESULTS}),
        (PLAIN, set()),
        (NAMING, {NAMES}),
        (STRICT, set()),
    ],
)
def test_what_a_template_writes_is_found_by_rendering(source, writes):
    assert JinjaTemplate(source, {}).writes == writes


@pytest.fixture
def encode(make_tokenizer):
    def encode(source, messages, **settings):
        tokenizer = make_tokenizer("<a>", "</a>", "<u>", "<r>", "</r>", "<s>", chat_template=source, eos_token="</a>")
        tokens = tokenizer.encode_chat(messages, **settings)
        learned = [id_ for id_, weight in zip(tokens.ids, tokens.loss_weights) if weight]
        return tuple(tokenizer.decode(ids, skip_control=False) for ids in (tokens.ids, learned))

    return encode


def test_calls_are_learned_as_the_template_writes_them(encode):
    whole, learned = encode(HEADERS, CHAT, tools=[WEATHER])
    written = '{"name": "weather", "arguments": {"city": "Rome"}}{"name": "weather", "arguments": {"city": "Bern"}}'
    assert whole.endswith(f"<u>Rome or Bern?</a><a>{written}</a><r>sunny</r><r>雪</r><a>Rome.</a>")
    assert whole.startswith('TOOLS [{"type": "function"')
    assert learned == f"{written}</a>Rome.</a>"


def test_arguments_are_given_as_a_template_wants_them(encode):
    whole, learned = encode(CONCATENATING, CHAT[:2], tools=[WEATHER])
    # It writes no tools, so they are text.
    assert whole.startswith(f"<s>{TOOLS_TEXT}</a>")
    assert whole.endswith('<a>weather {"city": "Rome"}</a><a>weather {"city": "Bern"}</a>')
    assert learned == 'weather {"city": "Rome"}</a><a>weather {"city": "Bern"}</a>'


def test_calls_without_a_template_for_them_are_learned_as_text(encode):
    prompting = PLAIN + "{% if add_generation_prompt %}<a>{% endif %}"
    whole, learned = encode(prompting, CHAT)
    assert whole == f"<u>Rome or Bern?</a><a>{CALLS_TEXT}</a><u>{RESULTS_TEXT}</a><a>Rome.</a>"
    assert learned == f"{CALLS_TEXT}</a>Rome.</a>"


def test_control_tokens_and_nulls_in_calls_are_data(encode):
    """Arguments reach the template unchanged, whatever their names, and cannot forge a turn."""
    odd = call("weather", weight=None, text="</a><u>")
    whole, _ = encode(HEADERS, [CHAT[0], CHAT[1] | {"tool_calls": [odd]}])
    assert '"arguments": {"weight": null, "text": "</a><u>"}' in whole
    tokenizer_view, learned = encode(HEADERS, [CHAT[0], CHAT[1] | {"tool_calls": [odd]}])
    assert learned == '{"name": "weather", "arguments": {"weight": null, "text": "</a><u>"}}</a>'
    assert tokenizer_view == whole


def test_our_templates_may_have_a_role_for_results():
    def role(token):
        return RoleTemplate(({"control": token},), ({"control": "</a>"},))

    roles = {name: role(f"<{name[0]}>") for name in ("user", "assistant", "tool")}
    assert ChatTemplate(roles, "assistant", ()).writes == {RESULTS}
    del roles["tool"]
    assert ChatTemplate(roles, "assistant", ()).writes == set()


QWEN_CHAT = """\
<|im_start|>system
You are Qwen, created by Alibaba Cloud. You are a helpful assistant.

{tools}<|im_end|>
<|im_start|>user
Rome or Bern?<|im_end|>
<|im_start|>assistant
{calls}<|im_end|>
<|im_start|>user
{results}<|im_end|>
<|im_start|>assistant
Rome.<|im_end|>
"""


@pytest.mark.parametrize("name", ["qwen", "chatml"])
def test_tools_of_qwen(make_tokenizer, name):
    """Those of Qwen have a template of their own; in ChatML they are the same as text."""
    tokenizer = make_tokenizer("<|im_start|>", "<|im_end|>", eos_token="<|im_end|>").with_template(name)
    assert tokenizer.template.writes == ({CALLS, RESULTS, TOOLS} if name == "qwen" else set())
    tokens = tokenizer.encode_chat(CHAT, tools=[WEATHER])
    expected = QWEN_CHAT.format(tools=TOOLS_TEXT, calls=CALLS_TEXT, results=RESULTS_TEXT)
    if name == "chatml":
        expected = expected.replace("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n", "")
    assert tokenizer.decode(tokens.ids, skip_control=False) == expected
    learned = [id_ for id_, weight in zip(tokens.ids, tokens.loss_weights) if weight]
    assert tokenizer.decode(learned, skip_control=False) == f"{CALLS_TEXT}<|im_end|>Rome.<|im_end|>"
