"""What is read as a number, and what is not."""

# ruff: noqa: RUF001 (signs of Unicode that look like those of ASCII are the point)
from fractions import Fraction

import pytest
from fuzz import time_limit

from utils.rewards.number_forms import boxed, in_ascii, plain_signs, read_number, unframed

# One value, and the ways to write it.
NUMBERS = {
    "1234": r"1234|1,234|1,234.00|1 234|1{,}234|1\,234|1,\!234|1'234|+1234|$1234|\$1,234|1234 $"
    r"|US$1,234|€1234|1234 €|1.234e3|1.234E+3|1.234\times10^3|1.234 \times 10^{3}|1.234×10³"
    r"|1.234 x 10^3|1.234*10**3|1.234·10^3|1234.|01234|x=1234|x = 1234.|n_1 = 1234|\theta=1234"
    r"|f(x)=1234|Total = 1234|**1234**|*1234*|`1234`|_1234_|$1234$|$$1234$$|\(1234\)|\[1234\]"
    r"|\boxed{1234}|\fbox{1234}|$\boxed{1234}$|so it is \boxed{1234}.|\text{1234}|{1234}"
    r"|\boxed{x=1234}|\boxed{$1234$}",
    "1234567": r"1,234,567|12,34,567|1 234 567|1\,234\,567|1{,}234{,}567|1,\!234,\!567",
    "-5": "-5|−5|–5|-5.0|- 5|-$5|$-5"
    "|-\\$5.00|x=-5|**-5**|\\boxed{-5}|-5.|- $ 5|-10/2|-\\frac{10}{2}",
    "3/4": r"3/4|0.75|.75|6/8|3 / 4|\frac{3}{4}|\frac34|\dfrac{3}{4}|\tfrac34|\frac{ 3 }{ 4 }|¾|3⁄4"
    r"|1.5/2|$\frac{3}{4}$|\boxed{\frac{3}{4}}|x = 3/4|7.5e-1|75\times10^{-2}",
    "-7/4": r"-7/4|-1.75|-1 3/4|-1\frac{3}{4}|-1\frac34|-1¾|−1 ¾|\frac{-7}{4}|-\frac{7}{4}",
    "1/3": r"1/3|\frac13|⅓|0.\overline{3}|0.3\overline{3}|2/6",
    "1/200000": r"0.000005|5e-06|5E-6|5\times10^{-6}|5×10⁻⁶|1/200,000",
}


@pytest.mark.parametrize("value", NUMBERS)
def test_a_number_in_its_usual_ways(value):
    for text in NUMBERS[value].split("|"):
        found = read_number(text)
        assert found, text
        assert found.value == Fraction(value), text
        assert not found.percent


NONE = [
    *(
        "",
        ".",
        "-",
        "$",
        "%",
        "x=",
        "apples",
        "3 apples",
        "5 cm",
        "5!",
        "nan",
        "Infinity",
        "1e",
        "x",
    ),
    *("12,34", "1,2345", "1,2", "0,5", "1.234.567", "3 4", "1/0", "--3", "-+3", "1 3/2", "0x1F"),
    *(
        "1e9999",
        "510^3",
        "5-7",
        "5–7",
        "1\n2",
        "9\n1/2",
        "3:30",
        "5=5",
        "x==5",
        "x<=5",
        "2x",
        "(1,2)",
    ),
    *(
        r"\boxed{5} or \boxed{7}",
        r"\sqrt{2}",
        r"2\pi",
        "$12%",
        "it is 5",
        "5 or 7",
        "9" * 201,
        "1_000",
    ),
]


@pytest.mark.parametrize("text", NONE)
def test_what_is_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text", ["12%", "12 %", r"12\%", "12 percent", "12 per cent", "12pct", r"12\,\%"]
)
def test_a_percentage(text):
    number = read_number(text)
    assert (number.value, number.percent) == (12, True)


def test_what_is_noted_of_a_number():
    assert read_number("x = 5").name == "x"
    assert (read_number("5 €").currency, read_number(r"\$5").currency) == ("€", "$")
    written = {
        "5": (False, False),
        "5.0": (True, False),
        "5e1": (True, True),
        "10^2": (False, True),
    }
    for text, expected in written.items():
        number = read_number(text)
        assert (number.decimal, number.scientific) == expected, text


def test_boxes_and_frames():
    assert boxed(r"a \boxed{b{c}} d \boxed {e}") == ["b{c}", "e"]
    assert boxed(r"\boxed{\frac{1}{2}") == [r"\frac{1}{2}"], "cut off"
    assert boxed("boxed{5}") == []
    assert unframed(r"so $\boxed{x^2}$ it is") == "x^2"
    assert unframed(r"\( x^2 \)") == "x^2"
    assert unframed("$5 and $7") == "$5 and $7"
    assert unframed(r"\boxed{1} or \boxed{2}") == r"\boxed{1} or \boxed{2}"
    assert plain_signs("−1\u00a02") == "-1 2"


@pytest.mark.parametrize("text", ["４２", "٤٢", "४२", "𝟒𝟐", "42。", "＄42", "42％"])
def test_digits_of_other_scripts_are_read_where_they_are_asked_for(text):
    assert read_number(text) is None
    assert read_number(in_ascii(text).removesuffix(".")).value == 42


def test_reading_takes_no_time_that_grows():
    pieces = (
        "1,000",
        "1 ",
        "9",
        "{",
        r"\boxed{",
        "$",
        "*",
        "^",
        r"\frac",
        "10^",
        "-",
        "x=",
        "½",
        "⁹",
    )
    with time_limit(10):
        for piece in pieces:
            for count in (20, 200, 20_000):
                read_number(piece * count)
                boxed(piece * min(count, 200))
