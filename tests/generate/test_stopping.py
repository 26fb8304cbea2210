"""Stop strings truncate a stream at the same place as the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from maxlm.generate.stopping import StopScanner


def stream(pieces, stop):
    scanner = StopScanner(tuple(stop))
    passed = []
    for piece in pieces:
        passed.append(scanner.push(piece))
    return "".join(passed) + scanner.flush(), scanner.stopped


@given(
    st.lists(st.text("ab\n", max_size=4), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_where_the_first_stop_string_is_complete(pieces, stop):
    """Reference: append piece by piece; at the first piece that completes stop strings, truncate at the leftmost."""
    grown = ""
    expected, expected_stopped = "".join(pieces), False
    for piece in pieces:
        grown += piece
        places = [grown.find(string) for string in stop if string in grown]
        if places:
            expected, expected_stopped = grown[: min(places)], True
            break
    assert stream(pieces, stop) == (expected, expected_stopped)


def test_only_a_possible_stop_prefix_is_held_back():
    scanner = StopScanner(("\nUser:",))
    assert scanner.push("Hello") == "Hello"
    assert scanner.push("\nUs") == ""
    assert scanner.push("eful") == "\nUseful"
    assert scanner.push("\nUser: hi") == ""
    assert scanner.stopped
    assert scanner.push("more") == ""
    assert scanner.flush() == ""


def test_nothing_is_held_back_without_stop_strings():
    assert StopScanner(()).push("text") == "text"
