"""Chat templates: rendered as transformers renders them, and every failure the request's."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pilotlight.artifact import (
    CHAT_TEMPLATE,
    FORMAT_VERSION,
    Artifact,
    FileEntry,
    KvLayout,
    Manifest,
    Shapes,
    Source,
    SpecialTokens,
)
from pilotlight.errors import ArtifactError, InvalidRequest
from pilotlight.text.chat_template import MAX_REASON_CHARS, MAX_RENDERED_CHARS, ChatTemplate, load_chat_template
from pilotlight.text.sandbox import compile_template

HELLO = [{"role": "user", "content": "Hello"}]


def template(source: str, **special_texts: str) -> ChatTemplate:
    return ChatTemplate(compile_template(source), special_texts)


def artifact(folder: Path, chat_template: bytes | None) -> Artifact:
    files = {}
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_bytes(chat_template)
        files[CHAT_TEMPLATE] = FileEntry(sha256="", size_bytes=len(chat_template))
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=Source(model="test", revision=None, license=None),
        family="llama",
        precision="fp32",
        recipe={},
        num_parameters=0,
        shapes=Shapes(1, 1, 1, 1, 1, 1, 1),
        special_tokens=SpecialTokens(bos_id=None, eos_ids=[], pad_id=None),
        kv=KvLayout(dtype="float32"),
        verification={},
        files=files,
        tools={},
    )
    return Artifact(folder, manifest, "sha256:test")


class TestRendering:
    def test_messages_special_tokens_and_the_prompt_for_an_answer(self) -> None:
        source = (
            "{{ bos_token }}{% for message in messages %}\n"
            "    {% if message.role == 'user' %}\n"
            "U: {{ message['content'] }}{{ eos_token }}\n"
            "    {% endif %}\n"
            "{% endfor %}\n"
            "{% if add_generation_prompt %}A:{% endif %}"
        )
        assert template(source, bos_token="<s>", eos_token="</s>").render(HELLO) == "<s>U: Hello</s>\nA:"

    def test_tools_are_absent_or_given(self) -> None:
        tools = template("{{ tools is none }} {{ tools | tojson }}")
        assert tools.render(HELLO) == "True null"
        assert tools.render(HELLO, [{"name": "f"}]) == 'False [{"name": "f"}]'

    def test_variables_of_a_request_override_the_usual_ones(self) -> None:
        source = "{{ enable_thinking }} {{ add_generation_prompt }}"
        variables = {"enable_thinking": False, "add_generation_prompt": False}
        assert template(source).render(HELLO, variables=variables) == "False False"

    def test_json_is_not_escaped_for_html_and_takes_its_options(self) -> None:
        filters = "{{ v | tojson }} {{ v | tojson(indent=0, sort_keys=true) }} {{ v | tojson(ensure_ascii=true) }}"
        rendered = template(filters).render(HELLO, variables={"v": {"b": "<é>", "a": 1}})
        assert rendered == '{"b": "<é>", "a": 1} {\n"a": 1,\n"b": "<é>"\n} {"b": "<\\u00e9>", "a": 1}'

    def test_loop_controls(self) -> None:
        body = "{% if n == 1 %}{% continue %}{% elif n == 3 %}{% break %}{% endif %}{{ n }}"
        assert template(f"{{% for n in range(9) %}}{body}{{% endfor %}}").render(HELLO) == "02"

    def test_the_date_is_formatted_by_the_template(self) -> None:
        assert template("{{ strftime_now('%%') }}").render(HELLO) == "%"

    def test_a_generation_tag_is_a_scope_and_no_text(self) -> None:
        source = (
            "{% set n = 1 %}[{% generation %}{% set n = 2 %}{{ messages[0].content }}{{ n }}{% endgeneration %}]{{ n }}"
        )
        assert template(source).render(HELLO) == "[Hello2]1"

    def test_rendering_leaves_nothing_behind(self) -> None:
        source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
        counting = template(source)
        assert [counting.render(HELLO), counting.render(HELLO * 2)] == ["1", "2"]

    def test_operators_and_filters_work_as_they_do_elsewhere(self) -> None:
        source = (
            "{{ 'a' + 'b' }}{{ 'ab' * 2 }}{{ 2 ** 3 }}{{ '%s-%03d' % ('x', 7) }}{{ 1 ~ none ~ 'z' }}{{ 2 * 3 + 1 }}"
            "{{ ['a', 'b'] | join(', ') }}{{ 'x'.join(['1', '2']) }}{{ 'aXa' | replace('X', 'y') }}"
            "{{ 'aXa'.replace('X', 'y') }}{{ 'q' | center(3) }}{{ 'r'.rjust(2) }}{{ '%s' | format('f') }}"
            "{{ 'p' | indent(2, true) }}{{ '{:>3}'.format(5) }}{{ ([1] + [2]) | length }}"
            "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('m') }}"
            "{% for n in [1, 2] recursive %}{{ n }}{{ loop.last }}{% else %}none{% endfor %}"
        )
        expected = "ababab8x-0071Nonez7a, b1x2ayaaya q  rf  p  52mm1False2True"
        assert template(source).render(HELLO) == expected


class TestRefusals:
    @pytest.mark.parametrize(
        ("source", "reason"),
        [
            ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
            ("{{ messages[0].content.parts.text }}", "has no attribute 'parts'"),
            ("{{ messages[0].content + 1 }}", "can only concatenate str"),
            ("{{ 1 / 0 }}", "division by zero"),
            ("{{ messages.append(1) }}", "is unsafe"),
            ("{{ ''.__class__.__mro__ }}", "is unsafe"),
            ("{% for n in range(100001) %}{{ n }}{% endfor %}", "Range too big"),
            ("{{ strftime_now(1) }}", "strftime"),
            ("{{ messages | tojson(indent=nothing) }}", "'nothing' is undefined"),
            ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ],
    )
    def test_a_template_that_fails_is_the_request_s_fault_in_one_line(self, source: str, reason: str) -> None:
        with pytest.raises(InvalidRequest) as caught:
            template(source).render(HELLO)
        assert caught.value.param == "messages"
        assert caught.value.message.startswith("the chat template refused the messages: ")
        assert reason in caught.value.message
        assert "\n" not in caught.value.message

    @pytest.mark.parametrize(
        "source",
        [
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        ],
    )
    def test_a_rendering_that_takes_long_is_ended(self, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("pilotlight.text.chat_template.MAX_RENDER_S", 0.05)
        with pytest.raises(InvalidRequest, match="it takes too long"):
            template(source).render(HELLO)

    @pytest.mark.parametrize(
        "source",
        [
            "{{ 'x' * 10**12 }}",
            "{{ 10**12 * 'x' }}",
            "{{ 2 ** 99 ** 9 ** 9 }}",
            "{% set ns = namespace(s='x') %}{% for n in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "{% set ns = namespace(s='x') %}{% for n in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "{% set ns = namespace(n=3) %}{% for n in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
            "{{ '%999999999d' % 1 }}",
            "{{ '%*d' % (999999999, 1) }}",
            "{{ 'x'.ljust(10**9) }}",
            "{{ 'x' | center(10**9) }}",
            "{{ 'x' | indent(10**9) }}",
            "{{ '{:999999999}'.format(1) }}",
            "{{ '%999999999s' | format('x') }}",
            "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
            "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
            "{{ range(99999) | list | join('y' * 99999) }}",
            "{{ ('y' * 99999).join(['x'] * 99999) }}",
            "{{ messages | tojson(indent=10**9) }}",
        ],
    )
    def test_no_value_grows_beyond_a_prompt(self, source: str) -> None:
        with pytest.raises(InvalidRequest, match="too large"):
            template(source).render(HELLO)

    def test_a_long_reason_is_cut(self) -> None:
        with pytest.raises(InvalidRequest) as caught:
            template("{{ raise_exception('x' * 10000) }}").render(HELLO)
        assert len(caught.value.message) < MAX_REASON_CHARS + 100

    def test_a_rendered_text_is_bounded_before_it_is_whole(self) -> None:
        rows = (
            "{% for a in range(100000) %}{% for b in range(100000) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
        )
        messages = [{"role": "user", "content": "x" * (MAX_RENDERED_CHARS // 2)}]
        with pytest.raises(InvalidRequest, match="longer than 4,194,304 characters"):
            template(rows).render(messages)

    def test_the_longest_text_is_rendered(self) -> None:
        messages = [{"role": "user", "content": "x" * MAX_RENDERED_CHARS}]
        assert len(template("{{ messages[0].content }}").render(messages)) == MAX_RENDERED_CHARS


class TestLoading:
    def test_a_template_is_loaded_from_its_artifact(self, tmp_path: Path) -> None:
        loaded = load_chat_template(artifact(tmp_path, "{{ bos_token }}é".encode()), {"bos_token": "<s>"})
        assert loaded.render(HELLO) == "<s>é"

    def test_without_a_template_a_request_is_told_where_to_go(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidRequest, match="has no chat template; use /v1/completions"):
            load_chat_template(artifact(tmp_path, None), {}).render(HELLO)

    @pytest.mark.parametrize("source", [b"{% if %}", b"{{ x", b"{% nothing %}", b"{{ x | nothing }}"])
    def test_what_is_not_a_template_is_refused_at_the_start(self, tmp_path: Path, source: bytes) -> None:
        with pytest.raises(ArtifactError) as caught:
            load_chat_template(artifact(tmp_path, source), {})
        assert caught.value.message.startswith(f"{tmp_path / CHAT_TEMPLATE}: is not a chat template (")

    def test_what_is_not_text_is_refused_at_the_start(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="cannot be read"):
            load_chat_template(artifact(tmp_path, b"\xff"), {})


def real_templates(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*.jinja")):
        yield str(path.relative_to(folder)), path.read_text()
    for path in sorted(folder.rglob("tokenizer_config.json")):
        template = json.loads(path.read_text()).get("chat_template")
        if isinstance(template, str):
            yield path.parent.name, template
    for line in (folder / "named_templates.jsonl").read_text().splitlines():
        yield from json.loads(line).items()


def rendered_by_transformers(render: Any, source: str, variables: Mapping[str, Any]) -> str | None:
    from jinja2 import TemplateError

    try:
        (rendered,), _ = render([variables["messages"]], chat_template=source, **without(variables, "messages"))
    except (TemplateError, TypeError):
        return None
    return str(rendered)


def rendered_here(source: str, variables: Mapping[str, Any]) -> str | None:
    rest = without(variables, "messages", "tools")
    try:
        return template(source).render(variables["messages"], variables.get("tools"), rest)
    except InvalidRequest:
        return None


def without(variables: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in variables.items() if name not in names}


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'Tells the weather: <b>"now" & later</b>, für Zürich.',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALLED = {"id": "abc123xyz", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
USER = {"role": "user", "content": "Hi <|x|> {{ 1 }} 世界"}
EDGES: dict[str, dict[str, Any]] = {
    "empty": {"messages": [], "add_generation_prompt": True},
    "one": {"messages": [USER], "add_generation_prompt": True},
    "spaces": {"messages": [{"role": "user", "content": "  \n hi \n "}], "add_generation_prompt": True},
    "turns": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            USER,
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello."},
            {"role": "user", "content": ""},
        ],
        "add_generation_prompt": True,
    },
    "wrong order": {
        "messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        "add_generation_prompt": True,
    },
    "unknown role": {"messages": [{"role": "critic", "content": "a"}], "add_generation_prompt": True},
    "developer": {"messages": [{"role": "developer", "content": "a"}, USER], "add_generation_prompt": True},
    "tools": {"messages": [USER], "tools": [TOOL], "add_generation_prompt": True},
    "tools and system": {
        "messages": [{"role": "system", "content": "Be brief."}, USER],
        "tools": [TOOL, TOOL],
        "add_generation_prompt": True,
    },
    "calls": {
        "messages": [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "abc123xyz", "name": "get_weather", "content": '{"sky": "grey"}'},
            {"role": "assistant", "content": "Grey."},
            USER,
        ],
        "tools": [TOOL],
        "add_generation_prompt": True,
    },
    "several results": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALLED, CALLED]},
            {"role": "tool", "tool_call_id": "abc123xyz", "content": "a"},
            {"role": "tool", "tool_call_id": "abc123xyz", "content": "b"},
        ],
        "tools": [TOOL],
        "add_generation_prompt": True,
    },
    "thinking off": {"messages": [USER], "enable_thinking": False, "add_generation_prompt": True},
    "parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "add_generation_prompt": True,
    },
    "for training": {
        "messages": [USER, {"role": "assistant", "content": "Hello."}],
        "add_generation_prompt": False,
    },
    "system only": {"messages": [{"role": "system", "content": " Be brief.\n"}], "add_generation_prompt": True},
    "unusual text": {
        "messages": [{"role": "user", "content": "\x00\u2028\r\n{% raw %}\u0000{{ '\U0001f680' }}</s>\ufeff"}],
        "tools": [{**CALLED, "n": [1.0, 1e300, -0.0, True, None], "é": {"\u2028": "</script>"}}],
        "add_generation_prompt": True,
    },
    "special tokens": {"messages": [USER], "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True},
}


@pytest.mark.parametrize("edge", EDGES)
def test_real_templates_render_edge_cases_as_in_transformers(shared_data: Path, edge: str) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    sources = list(real_templates(shared_data / "chat_templates"))
    rendered = [(name, rendered_here(source, EDGES[edge])) for name, source in sources]
    render = transformers.render_jinja_template
    assert rendered == [(name, rendered_by_transformers(render, source, EDGES[edge])) for name, source in sources]


FAMILIES = "gemma gpt-oss llama3 mistral phi-3 phi-4 qwen2.5 qwen3 smollm3".split()


def test_the_real_templates_are_of_the_families_that_are_named(shared_data: Path) -> None:
    sources = list(real_templates(shared_data / "chat_templates"))
    for family in FAMILIES:
        assert any(family in name for name, _ in sources), family
    words = ("tools", "strftime_now", "raise_exception", "{% generation %}", "continue", "namespace", "enable_thinking")
    for word in words:
        assert any(re.search(re.sub(r"[^a-z_]+", r"\\W*", word), source) for _, source in sources), word


@pytest.mark.parametrize("context", ["minja_simple", "minja_system", "minja_tool_use"])
def test_real_templates_render_as_in_transformers(shared_data: Path, context: str) -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    folder = shared_data / "chat_templates"
    variables = json.loads((folder / f"{context}.json").read_text())
    sources = list(real_templates(folder))
    rendered = [(name, rendered_here(source, variables)) for name, source in sources]
    render = transformers.render_jinja_template
    assert rendered == [(name, rendered_by_transformers(render, source, variables)) for name, source in sources]
    assert sum(text is not None for _, text in rendered) > len(rendered) / 2


IDIOMS = {
    "tools before the last question, as Python writes them": (
        "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if tools and m == asked[-1] %}[TOOLS]{{ tools | string }}[/TOOLS]{% endif %}"
        "{{ m['role'] ~ ': ' ~ m['content'] | string }}{{ eos_token }}{% endfor %}"
    ),
    "a call's end is cut off and written anew": (
        "{% for m in messages if m.tool_calls is defined %}{% for call in m.tool_calls %}"
        '{% set out = call.function | tojson %}{{ out[:-1] }}, "id": "{{ call.id[-9:] }}"}{{ \', \' if not loop.last }}'
        "{% endfor %}{% else %}nothing{% endfor %}"
    ),
    "tools and messages over several lines": (
        "{%- if tools is not none %}\n    {%- for tool in tools %}\n        {{- tool | tojson(indent=4) }}\n"
        "    {%- endfor %}\n{%- endif %}\n\n  {% for m in messages %}\n{{ m | tojson }}\n  {% endfor %}  \n"
    ),
    "text parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable %}"
        "{{ m.content | selectattr('type', 'equalto', 'text') | map(attribute='text') | map('trim') | join('|') }}"
        "{% else %}{{ m.content is none }}{% endif %};{% endfor %}"
    ),
    "roles in turns": (
        "{% if messages | length == 0 %}{{ raise_exception('nothing was said') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ loop.cycle('a', 'b') }}{{ m.content }}{% endfor %}"
    ),
    "thinking of earlier turns is left out": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.content is not string %}{% continue %}{% endif %}"
        "{% if loop.index0 > ns.last and ns.last > 5 %}{% break %}{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    ),
    "a scope for the words of the assistant": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% set n = 1 %}"
        "{% endgeneration %}{{ n is defined }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    ),
    "macros and their callers": (
        "{% macro tag(name, of) %}<{{ name }}{{ of.items() | list if of is mapping }}>{{ caller() if caller }}"
        "</{{ name }}>{% endmacro %}"
        "{% for m in messages %}{% call tag(m.role, m) %}{{ m.content }}{% endcall %}{% endfor %}"
        "{{ tag('tools', tools) }}"
    ),
    "values of all kinds": (
        "{{ 1.0 }} {{ 1e300 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ true }} {{ none }} {{ [1, 'a'] }} {{ {'k': none} }}"
        " {{ (1,) }}{{ messages[0].nothing }}{{ messages[9] is defined }}"
        " {{ 'é' | upper }} {{ '<' | e }} {{ 'a,b'.split(',') }}"
        " {{ [3, 1] | sort | first }} {{ 'x' in 'xy' }} {{ {'b': 1, 'a': '<&>'} | tojson(separators=(',', ':')) }}"
        " {{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true, indent=2) }} {{ {'b': 1} | dictsort }}"
    ),
    "the year": "{{ strftime_now('%Y') }}{{ add_generation_prompt }}{{ documents is none }}{{ bos_token is defined }}",
}
"""What real templates are made of, also those that do not lie in the shared data; the words are our own."""


@pytest.mark.parametrize("idiom", IDIOMS)
def test_idioms_render_as_in_transformers(idiom: str) -> None:
    render = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    rendered = {edge: rendered_here(IDIOMS[idiom], variables) for edge, variables in EDGES.items()}
    expected = {edge: rendered_by_transformers(render, IDIOMS[idiom], variables) for edge, variables in EDGES.items()}
    assert rendered == expected
    assert any(rendered.values())
