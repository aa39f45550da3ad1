import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from organseg.errors import UsageError
from organseg.strict_yaml import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(PLAIN, st.sampled_from([True, False, None]))
@settings(max_examples=150, deadline=None)
def test_plain_values_come_back(value, flow):
    assert parse_yaml(yaml.safe_dump(value, default_flow_style=flow), "text") == value


def test_empty_text_is_nothing():
    assert parse_yaml("# only a comment\n", "text") is None


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: !!python/object/apply:os.system ['touch PWNED']", "tag"),
        ("!!python/name:os.system", "tag"),
        ("a: !secret b", "tag"),
        ("a: !!binary aGVsbG8=", "tag"),
        ("a: !!str 5", "tag"),
        ("a: !!set {x, y}", "tag"),
        ("a: ! 5", "tag"),
        ("a: &anchor [1]\nb: *anchor", "aliases are not allowed"),
        (BOMB, "aliases are not allowed"),
        ("base: &b {x: 1}\nc:\n  <<: *b", "aliases are not allowed"),
        ("<<: {x: 1}\ny: 2", ""),
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("- b:\n    a: 1\n    'a': 2", "duplicate key 'a'"),
        ("{1: a, 1.0: b}", "duplicate key 1.0"),
        ("? [1, 2]\n: 3", "a key must be a plain value"),
        ("[" * 33 + "]" * 33, "nested deeper than 32"),
        ("[" * 200_000, "nested deeper than 32"),
        ("{a: " * 33 + "1" + "}" * 33, "nested deeper than 32"),
        ("a: .nan", "finite"),
        ("a: [1, {b: -.inf}]", "finite"),
        ("a: 1.0e+999", "finite"),
        ("a: " + "9" * 5000, "limit"),
        ("a: [1, 2", "expected"),
        ("a: b: c", "not allowed"),
        ("a:\n\t- b", "cannot start any token"),
        ("a: \x07", "special characters"),
        ("--- 1\n--- 2\n", "single document"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_the_source(text, fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.process_time()
    with pytest.raises(UsageError) as caught:
        parse_yaml(text, "here.yaml")
    message = str(caught.value)
    assert message.startswith("here.yaml: not plain YAML: ")
    assert fault in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
    assert time.process_time() - started < 2


def test_the_deepest_nesting_that_is_allowed():
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "text") is not None


@pytest.mark.parametrize("text", ["0012", "1_000", "12:30", "2024-02-31", "2024-01-01", "0x1F", "0b11"])
def test_what_older_yaml_would_turn_into_another_number_or_a_date_stays_text(text):
    # Case ids look like this: 0012 must not become 10.
    assert parse_yaml(f"id: {text}", "text") == {"id": text}


def test_numbers_are_numbers():
    assert parse_yaml("[0, -7, 12, +3, 1.5, 2.0e-3]", "text") == [0, -7, 12, 3, 1.5, 0.002]


def test_files(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: 1\nb: ü\n", encoding="utf-8")
    assert read_yaml(path) == {"a": 1, "b": "ü"}
    with pytest.raises(UsageError, match=r"no\.yaml: no such file"):
        read_yaml(tmp_path / "no.yaml")
    with pytest.raises(UsageError, match="no such file"):
        read_yaml(tmp_path)
    path.write_bytes(b"a: \xff\n")
    with pytest.raises(UsageError, match=r"a\.yaml: not UTF-8 text .*byte 3"):
        read_yaml(path)
    path.write_text("a: [")
    with pytest.raises(UsageError, match=r"a\.yaml: not plain YAML"):
        read_yaml(path)


def test_size_is_limited_before_reading(tmp_path):
    path = tmp_path / "big.yaml"
    path.write_text("a: 1\n" + "#" * (MAX_BYTES - 5))
    assert read_yaml(path) == {"a": 1}
    path.write_text("a: 1\n" + "#" * (MAX_BYTES - 4))
    with pytest.raises(UsageError, match=f"{MAX_BYTES + 1} bytes"):
        read_yaml(path)
    assert read_yaml(path, max_bytes=MAX_BYTES + 1) == {"a": 1}
