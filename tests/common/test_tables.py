"""Tables are valid Markdown, and their columns line up."""

import pytest

from common.tables import markdown_table


def test_columns_line_up():
    assert markdown_table(["model", "top-1"], [["td4v_side", 71.5], ["aim", None]], align="lr") == (
        "| model     | top-1 |\n"
        "|-----------|------:|\n"
        "| td4v_side |  71.5 |\n"
        "| aim       |       |\n"
    )  # fmt: skip


def test_left_is_the_default_and_narrow_columns_are_still_valid():
    assert markdown_table("ab", []) == "| a   | b   |\n|-----|-----|\n"
    assert markdown_table("ab", ["xy"], "lc") == "| a   |  b  |\n|-----|:---:|\n| x   |  y  |\n"


def test_cells_cannot_break_the_table():
    assert markdown_table(["a|b"], [["one\ntwo"]]) == "| a\\|b    |\n|---------|\n| one two |\n"


@pytest.mark.parametrize(("rows", "align"), [([["x"]], None), ([["x", "y", "z"]], None), ([["x", "y"]], "l")])
def test_another_number_of_columns_is_an_error(rows, align):
    with pytest.raises(ValueError, match="must have 2 columns"):
        markdown_table(["a", "b"], rows, align)
