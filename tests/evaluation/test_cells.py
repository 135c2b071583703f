"""Text in cells of csv and markdown."""

from __future__ import annotations

import pytest

from pec_jax.evaluation import cells


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("=1+1", "'=1+1"),
        ("@sum(a)", "'@sum(a)"),
        ("+cmd", "'+cmd"),
        ("-cmd", "'-cmd"),
        (" =cmd", "' =cmd"),
        ("\t=cmd", "'\t=cmd"),
        ("-0.5", "-0.5"),
        ("+1e-3", "+1e-3"),
        ("a cat = a dog", "a cat = a dog"),
        ("", ""),
    ],
)
def test_no_formula(text, expected):
    assert cells.plain(text) == expected
    assert cells.csv_text([[text, 1]]).startswith(expected) or '"' in cells.csv_text([[text]])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PEC (dino)", "PEC (dino)"),
        ("image_reward", "image_reward"),
        (r"$\frac{1}{$", r"\$\\frac{1}{\$"),
        ("a|b\nc", r"a\|b c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("[x](http://y)", r"\[x\](http://y)"),
    ],
)
def test_no_markup(text, expected):
    assert cells.markdown(text) == expected
