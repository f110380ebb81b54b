"""Numbers on the command line: what is taken, and what is refused in one line.

Run: python -m pytest tests/test_args.py
"""

import argparse

import pytest

from util.run import args as flags


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (flags.count, "1", 1),
        (flags.count, "1_000", 1000),
        (flags.count, "9" * 400, int("9" * 400)),  # too large for a float
        (flags.count0, "0", 0),
        (flags.rate, "1e300", 1e300),
        (flags.fraction, "1", 1.0),
        (flags.ratio, "0.999", 0.999),
        (flags.number(int, 1, 8), "8", 8),
    ],
)
def test_a_number_in_its_range_is_taken(kind, text, value):
    assert kind(text) == value and type(kind(text)) is type(value)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (flags.count, "0", "0 is out of range: it must be at least 1"),
        (flags.count, "-" + "9" * 400, "it must be at least 1"),
        (flags.count, "1.5", "'1.5' is not an integer"),
        (flags.count, "9" * 5000, "is not an integer"),  # longer than Python reads
        (flags.rate, "inf", "inf is out of range: it must be at least 0"),
        (flags.rate, "-inf", "out of range"),
        (flags.rate, "nan", "nan is out of range"),
        (flags.fraction, "1.01", "it must be from 0 to 1"),
        (flags.ratio, "1", "it must be from 0 to below 1"),
        (flags.number(int, 1, 8), "9", "it must be from 1 to 8"),
    ],
)
def test_another_is_refused_with_its_range(kind, text, reason):
    with pytest.raises(argparse.ArgumentTypeError) as refusal:
        kind(text)
    assert reason in str(refusal.value)
