"""Configurations that agree in most entries are read as any YAML is, whatever their texts hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.data.files import read_similar_yaml, read_yaml
from nearfar.errors import NearfarError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(content=st.dictionaries(st.text(max_size=8), VALUES, max_size=5), wide=st.booleans())
def test_it_reads_what_read_yaml_reads(tmp_path_factory: Any, content: dict[str, Any], wide: bool) -> None:
    file: Path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=wide), encoding="utf-8")
    assert read_similar_yaml(file) == read_yaml(file)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb:\n- 1\n- c: 2\nd: {e: [1,\n 2]}\n",
        "a: |\n  b: 1\n\n  c\nd: >-\n  folded\n  lines\n",
        'a: "first\nb: second"\nc: 3\n',
        "a: 'first\n\nb: second'\n",
        "a: &anchor {b: 1}\nc: *anchor\n",
        "a: 1\na: 2\n# b: 3\nc: 1  # one\n",
        "# nothing\n",
        "",
        "just a text\n",
        "- a\n- b\n",
        "a: 1\n---\nb: 2\n",
        "a: 1\nb: [1, 2\nc: 3\n",
        "a: b: c\n",
        "a: 2024-99-99\n",
        "{a: 1,\nb: 2}\n",
        "'a': 1\nb: 2\n",
        "a:\n  1\nb: 2\n",
        "true: 1\nnull: 2\n",
    ],
)
def test_every_form_is_read_as_a_whole_file_is(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)

    def outcome(read: Any) -> tuple[str, Any]:
        try:
            return "content", read(file)
        except NearfarError as error:
            return "error", str(error)

    assert outcome(read_similar_yaml) == outcome(read_yaml)


def test_an_entry_that_many_files_share_is_parsed_once(tmp_path: Path) -> None:
    contents = []
    for number in range(3):
        file = tmp_path / f"{number}.yaml"
        file.write_text(f"seed: {number}\nmodel:\n  layers: [1, 2]\n")
        contents.append(read_similar_yaml(file))
    assert [content["seed"] for content in contents] == [0, 1, 2]
    assert contents[0]["model"] is contents[2]["model"]
