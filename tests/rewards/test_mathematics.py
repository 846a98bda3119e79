"""Which answers say the same mathematics, and which do not: a table, and what it is made of."""

# ruff: noqa: RUF001 (signs of Unicode that look like those of ASCII are the point)
import threading
from fractions import Fraction

import pytest
from conftest import ROOT
from fuzz import time_limit

from utils.rewards import mathematics
from utils.rewards.mathematics import agree, equivalent

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

# Expected, and what says the same.
RIGHT = {
    "18": [
        *("18 dollars", "$18", r"\$18", r"\$18.00", r"18\,\text{dollars}"),
        *(r"\boxed{18 dollars}",),
    ],
    "1": [
        *("1.",),
    ],
    "-3": [
        *("-3.", "minus 3", "−3"),
    ],
    "73": [
        *("**73**", "`73`", "#### 73", "=> 73"),
    ],
    "42": [
        *("42 km/h", "Answer: 42", "42,", "x = 42.", "4２", "٤٢"),
    ],
    "5": [
        *("the answer is 5", "5 cm", "x=5", "about 5", "approximately 5", "There are 5 apples"),
        *("There are 5 apples and he is happy", "(5)", "+5", "5.0", "5.00", "05", "5.", "5?"),
        *("5;", "5:", "5。", "5，", '"5"', "'5'", "*5*", "_5_", "***5***", "__5__", "`5`"),
        *("**5.**", "**5**.", "**Answer:** 5", "**Answer**: 5", "**Answer: 5**"),
        *("Answer: **5**", "### Answer: 5", "Final Answer: 5", r"Final answer: \boxed{5}"),
        *(r"The final answer is $\boxed{5}$. I hope it is correct.",),
        *("So the answer is 5 apples.", "ANSWER: 5", "answer = 5", "Ans: 5", "A: 5", "#### 5"),
        *("####5", "=> 5", "⇒ 5", "-> 5", "→ 5", r"\Rightarrow 5", r"\therefore 5"),
        *("Therefore, 5.", "Therefore the answer is 5", "Thus x = 5", "x equals 5", "x is 5"),
        *("x: 5", "x = 5 cm", "x=5cm", "5cm", "5 cm^2", "5 cm²", "5 cm2", r"5 \text{ cm}^2"),
        *(r"5\text{ cm}^{2}", r"5\,\mathrm{cm}", r"5~\text{cm}", "5 square centimeters"),
        *("5 m/s", "5m/s", "5 m/s^2", "5 miles", "5 hours", "5 h", "5 °C", "5°C", "5°"),
        *(r"5^\circ", "5 degrees", "5 kg", "5kg", "5 people", "5 more apples", "5 times"),
        *(r"\boxed{5}", r"\boxed{5 \text{ cm}}", r"\boxed{x = 5}", r"\fbox{5}"),
        *(r"so \boxed{5}.", "5 dozen", "≈ 5", r"\approx 5", "~5", "|5|", r"5\%"),
    ],
    "The answer is 180": [
        *("180",),
    ],
    "A: 180": [
        *("180",),
    ],
    "180.": [
        *("180",),
    ],
    "**180**": [
        *("180",),
    ],
    "7": [
        *("it is not 5 but 7", "7, not 5", "7 instead of 5"),
        *("He has 12 and gives away 5, so 7 remain", "12 - 5 = 7", "= 7", "Total = 7"),
        *("Total: 7", "Total: 7 apples", "Total cost: $7", "a total of 7", "an average of 7"),
        *("7 USD", "USD 7"),
    ],
    r"25\pi": [
        *(r"25\pi square units",),
    ],
    "5000000": [
        *("5 million", "$5 million"),
    ],
    "1500": [
        *("1.5e3", "1.5 x 10^3"),
    ],
    "90": [
        *(r"90^\circ", "90°"),
    ],
    r"2\pi": [
        *("2pi", "2π", r"2\pi", "2*pi", "6.283185"),
    ],
    r"x \ge 5": [
        *("x ≥ 5", "x >= 5"),
    ],
    "1000": [
        *(r"1\,000", "1{,}000", "1 000", "1e3"),
    ],
    "12.5%": [
        *("12.5", "0.125"),
    ],
    "(A)": [
        *("A",),
    ],
    "A": [
        *("(A)", "Option A", "A", "A.", "**A**", "The answer is A", "The answer is (A)."),
        *(r"\text{A}", r"\textbf{(A)}", r"\text{(A)}", r"\boxed{A}"),
    ],
    "blue": [
        *(r"\text{Blue}", "The answer is blue.", "**Blue**", "Blue.", "The answer is blue"),
    ],
    "Paris, France": [
        *("Paris, France",),
    ],
    "3.5": [
        *(r"3\frac12", "3 1/2"),
    ],
    "602000000000000000000000": [
        *(r"6.02\times10^{23}", "6.02e23"),
    ],
    "3/4": [
        *(r"\frac{3}{4}\text{ cup}", "3/4 cup"),
    ],
    "120": [
        *("5!",),
    ],
    "5,7": [
        *("x = 5 or x = 7", r"5 \text{ and } 7", "(5, 7)"),
    ],
    r"\frac{\sqrt3}{2}": [
        *(r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}.", "sqrt(3)/2", "√3/2"),
        *(r"$\frac{\sqrt{3}}{2}$", r"The answer is $\frac{\sqrt{3}}{2}$."),
        *(r"The answer is \(\frac{\sqrt{3}}{2}\).", r"**\frac{\sqrt{3}}{2}**"),
    ],
    r"\frac12": [
        *(r"\dfrac{1}{2}",),
    ],
    "0.5": [
        *("1/2", r"\boxed{\frac{1}{2}}", ".5"),
    ],
    "(x+1)^2": [
        *("x^2+2x+1", "The answer is x^2 + 2x + 1."),
    ],
    r"(-\infty,2)\cup(3,\infty)": [
        *(r"(-\infty, 2) \cup (3, \infty)", "(-∞, 2) ∪ (3, ∞)", "(-inf, 2) U (3, inf)"),
    ],
    "[2,3)": [
        *("[2, 3)",),
    ],
    "(1,2)": [
        *("(1, 2)", r"\left(1, 2\right)", "The point is (1, 2).", "x ∈ (1, 2)", r"x \in (1,2)"),
    ],
    "2, 1": [
        *("1, 2",),
    ],
    "1,2": [
        *("1 and 2", "x = 1 or x = 2"),
    ],
    r"\{3,2,1\}": [
        *(r"\{1,2,3\}", "{1,2,3}"),
    ],
    "5>x": [
        *("x<5",),
    ],
    r"x \le 5": [
        *(r"x \leq 5", "x<=5"),
    ],
    "-3<x<5": [
        *("-3 < x < 5",),
    ],
    "7.5": [
        *("Total cost: $7.50",),
    ],
    "$7": [
        *("$7", "7 dollars"),
    ],
    "€7": [
        *("7€",),
    ],
    "1234.5": [
        *("$1,234.50",),
    ],
    "1234": [
        *("1,234 dollars", "1 234"),
    ],
    "1234567": [
        *("$1,234,567",),
    ],
    "12": [
        *("12%", "12 percent"),
    ],
    r"12\%": [
        *("12 %",),
    ],
    "12%": [
        *("12 percent", "0.12"),
    ],
    "0.12": [
        *("12 percent",),
    ],
    "1/3": [
        *(r"33\frac{1}{3}\%", "0.333333"),
    ],
    r"33\frac13": [
        *(r"33\frac{1}{3}\%",),
    ],
    "-5.0": [
        *("-5",),
    ],
    "−5": [
        *("−5",),
    ],
    "-5": [
        *("- 5", "(-5)", "negative 5", "minus 5", "The answer is -5."),
        *("The answer is negative 5",),
    ],
    "5 cm^2": [
        *("5 square centimeters",),
    ],
    "5 cm": [
        *("5 centimeters", "5"),
    ],
    "5 km/h": [
        *("5 kilometers per hour",),
    ],
    "5°": [
        *(r"5^{\circ}", "5 degrees"),
    ],
    "15": [
        *("3 times 5 is 15", r"3 \times 5 = 15", "3 × 5 = 15", "3 × 5", "3*5", "15 (fifteen)"),
    ],
    "2.5": [
        *("2 1/2", "2 1/2 cups", "2½", "2.50"),
    ],
    r"2\frac{1}{2}": [
        *("2 1/2",),
    ],
    "5/2": [
        *(r"2\frac{1}{2}",),
    ],
    "0.0015": [
        *("1.5e-3", r"1.5\times10^{-3}", "1.5·10^-3", "1.5×10⁻³"),
    ],
    "1.5e-3": [
        *(r"1.5 \times 10^{-3}",),
    ],
    r"1.6\times10^{-19}": [
        *(r"1.6\times10^{-19}", r"1.60\times10^{-19}", r"1.6\times10^{-19} C"),
    ],
    "9.11e-31": [
        *(r"9.11 \times 10^{-31} kg",),
    ],
    "1/30": [
        *("0.033333",),
    ],
    r"\pi": [
        *("3.141593",),
    ],
    r"\sqrt{2}": [
        *("1.414214", "√2"),
    ],
    r"1.414214\times10^{-20}": [
        *(r"\sqrt{2}\times10^{-20}",),
    ],
    r"1.267650600228229\times10^{30}": [
        *("2^{100}",),
    ],
    r"1.267651\times10^{30}": [
        *("2^{100}",),
    ],
    "Blue": [
        *("blue",),
    ],
    "Yes": [
        *("yes",),
    ],
    "true": [
        *("True",),
    ],
    "No solution": [
        *("no solution",),
    ],
    "no solution": [
        *(r"\text{no solution}",),
    ],
    r"\emptyset": [
        *(r"\emptyset",),
    ],
    "east": [
        *(r"\text{East}",),
    ],
    r"\pi/2": [
        *(r"\frac{\pi}{2}",),
    ],
    r"\frac{\pi}{2}": [
        *("pi/2",),
    ],
    "e^{2x}": [
        *("e^{2x}",),
    ],
    r"\sin(x)": [
        *(r"\sin x",),
    ],
    r"\sin x": [
        *("sin(x)",),
    ],
    "3": [
        *(r"\log_2 8",),
    ],
    r"\ln(2)": [
        *(r"\ln 2",),
    ],
    "3+2x": [
        *("2x+3",),
    ],
    "y=2x+3": [
        *("y = 2x + 3",),
    ],
    "2x+3": [
        *("y = 2x + 3",),
    ],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [
        *(r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ],
    "3+4i": [
        *("3+4i", "4i + 3"),
    ],
    r"\boxed{5}": [
        *("5",),
    ],
    "$5$": [
        *("5",),
    ],
    "5 apples": [
        *("5",),
    ],
    "x = 5": [
        *("5",),
    ],
    "x=5.": [
        *("5",),
    ],
    "Answer: 5": [
        *("5",),
    ],
    "#### 5": [
        *("5",),
    ],
    "=> 5": [
        *("5",),
    ],
    r"\(5\)": [
        *("5",),
    ],
    r"\[5\]": [
        *("5",),
    ],
    "$$5$$": [
        *("5",),
    ],
    "`5`": [
        *("5",),
    ],
    "*5*": [
        *("5",),
    ],
    '"5"': [
        *("5",),
    ],
    "5,": [
        *("5",),
    ],
    "5;": [
        *("5",),
    ],
    "The final answer is: $5$": [
        *("5",),
    ],
    r"The final answer is: $\boxed{5}$.": [
        *("5",),
    ],
    "The answer is 5 apples.": [
        *("5",),
    ],
    "it is not 5 but 7": [
        *("7",),
    ],
    r"The answer is \frac{3}{4}.": [
        *(r"\frac{3}{4}",),
    ],
    "42 km/h": [
        *("42",),
    ],
    "3:30": [
        *("3:30", "3:30 pm"),
    ],
    "12/05/2020": [
        *("12/05/2020",),
    ],
    "10^2": [
        *("100",),
    ],
    "10^3": [
        *("1000",),
    ],
    "x=5,y=7": [
        *("x=5, y=7",),
    ],
    "5,000,000": [
        *("5 million",),
    ],
    "1/2": [
        *("1/2 of the cake", "1:2"),
    ],
    r"2\sqrt{2}": [
        *("2√2", "2 sqrt(2)", "8^(1/2)"),
    ],
    r"\pm 5": [
        *("±5",),
    ],
    "1:2": [
        *("1:2",),
    ],
    "-1/2": [
        *("-.5",),
    ],
    r"\frac{1}{2}": [
        *("0.5",),
    ],
    "10000": [
        *("10,000", "10{,}000", r"10,\!000", r"10\,000", "10'000", r"$10,\!000"),
    ],
}

# Expected, and what says something else.
WRONG = {
    "5": [
        *("it is not 5 but 7", "not 5", "5 million", "x is greater than 5", "more than 5"),
        *("at least 5", "5 or more", "half of 5", "twice 5", "not equal to 5"),
        *("5 is not the answer", "5 is wrong", "isn't 5", "isn’t 5", "cannot be 5", "7, not 5"),
        *("7 rather than 5", "7 instead of 5", "never 5", "either 5 or 7"),
        *("3 apples and 5 oranges", "He has 12 and gives away 5, so 7 remain", "-5"),
        *("negative 5", "5!", "5 thousand", "5k", r"x \ne 5", "x ≠ 5", "5 ± 2", r"\pm 5"),
    ],
    "1,2": [
        *("12",),
    ],
    "(1,2)": [
        *("(2,1)", "[1,2]", "The point is (2, 1)."),
    ],
    "x<5": [
        *("x>5", "x≤5", "x is less than 5"),
    ],
    r"1.6\times10^{-19}": [
        *(r"9.1\times10^{-31}", r"1.61\times10^{-19}"),
    ],
    "5 m": [
        *("5 cm", "5 km"),
    ],
    "7": [
        *("5 or 7", "5, 7", "between 5 and 7", "either 5 or 7", "5 and 7", "5 to 7", "5-7"),
        *("5–7", "from 5 to 7", "5, 6, 7", "5 6 7", "5 apples and 7 pears"),
        *(r"\boxed{5} or \boxed{7}",),
    ],
    "3": [
        *("minus 3", "5 times 3"),
    ],
    "25": [
        *(r"25\pi square units",),
    ],
    r"x \ge 5": [
        *("x ≤ 5",),
    ],
    "(2,1)": [
        *(r"\{1,2\}",),
    ],
    "A": [
        *("B", "The answer is (B)."),
    ],
    "Paris, France": [
        *("France, Paris",),
    ],
    "2e-10": [
        *("1e-10",),
    ],
    "x=5": [
        *("y=5",),
    ],
    "(x+2)^2": [
        *("x^2 + 2x + 1",),
    ],
    "(2,3)": [
        *("[2, 3)",),
    ],
    "[2,3)": [
        *("(2, 3]",),
    ],
    "1,2,3": [
        *("1,2",),
    ],
    "12": [
        *("12 - 5 = 7", "0.12"),
    ],
    "$7": [
        *("7 euros", "€7", "7 cents"),
    ],
    "1234567": [
        *("1.234.567",),
    ],
    "12%": [
        *("1.2",),
    ],
    "1200": [
        *("12%",),
    ],
    "1/3": [
        *("33.33%", "0.3333", "0.33"),
    ],
    "5 cm^2": [
        *("5 square meters",),
    ],
    "5 km/h": [
        *("5 mph",),
    ],
    "5 minutes": [
        *("5 hours",),
    ],
    "15": [
        *("fifteen",),
    ],
    "2.5": [
        *("21/2",),
    ],
    "0": [
        *("1e-10",),
    ],
    "0.0000002": [
        *("0.0000001",),
    ],
    "1e-20": [
        *("0",),
    ],
    r"\pi": [
        *("3.14159", "3.14"),
    ],
    r"1.5\times10^{-20}": [
        *(r"\sqrt{2}\times10^{-20}",),
    ],
    r"1.3\times10^{30}": [
        *("2^{100}",),
    ],
    "6.03e23": [
        *("6.02e23",),
    ],
    "1000000000000000000000": [
        *("1000000000000000000001",),
    ],
    "12345678902": [
        *("12345678901",),
    ],
    "1234568": [
        *("1234567.0",),
    ],
    "(2e-20, 2)": [
        *("(1e-20, 2)",),
    ],
    r"1.6\times10^{-19}x": [
        *(r"9.1\times10^{-31}x",),
    ],
    r"\{2e-20,1\}": [
        *(r"\{1e-20,1\}",),
    ],
    "blue": [
        *("The color is blue", "not blue", "light blue"),
    ],
    "yes": [
        *("no",),
    ],
    "BA": [
        *("AB",),
    ],
    "2x+3z": [
        *("2x + 3y",),
    ],
    "y=3x+2": [
        *("y=2x+3",),
    ],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [
        *(r"\begin{pmatrix}2\\1\end{pmatrix}",),
    ],
    "3+4i": [
        *("3-4i",),
    ],
    "5 or 7": [
        *("5",),
    ],
    "it is not 5 but 7": [
        *("5",),
    ],
    "seven": [
        *("7",),
    ],
    "x = 5": [
        *(r"x \neq 5",),
    ],
    "2:1": [
        *("1:2",),
    ],
    "0.5": [
        *("0,5",),
    ],
    "1": [
        *("1,000",),
    ],
}

# Of the same kinds, by what was expected.
MORE_RIGHT = [
    (
        "18",
        [
            "The answer is $18",
            "The answer is 18.00 dollars",
            "The answer is $18.00.",
            "She makes $18 every day.",
            "18/1",
            "Eighteen (18)",
            "18 (dollars)",
            "18$",
            "$ 18",
            "18 USD.",
            "Rs. 18",
            "Rs 18",
            "₹18",
            "18 EUR",
            "18 %",
            "18 percent increase",
            "increase of 18%",
            "increased by 18",
            "the answer: 18",
            "The Answer Is 18",
            "the correct answer is 18",
            "answer is: 18",
            "answer is:\n18",
            "<b>18</b>",
            r"\textbf{18}",
            r"\mathbf{18}",
            r"\underline{18}",
            r"\bf 18",
            "**Final Answer:** \n\n**18**",
            "{18}",
            "[18]",
            "(18)",
            "• 18",
            "* 18",
            "1. 18",
            "\n18\n",
            "18 .",
            "18 ,",
            "18...",
            "=18",
            "= 18",
            ":18",
            "≈18",
            "x=18.",
            "18 = x",
            "18.0 cm",
            "18cm.",
            "18-cm",
            "18 years old",
            "18-year-old",
            "18th",
            "18 + 0",
            "17 + 1",
            "9 * 2",
            "√324",
            "36/2",
            r"\sqrt{324}",
        ],
    ),
    ("$18", [r"\$18"]),
    ("1800", ["18 hundred"]),
    ("[0,5]", ["[0, 5]", "x ∈ [0, 5]"]),
    (r"0 \le x \le 5", ["0 ≤ x ≤ 5", "0<=x<=5"]),
    (r"(-\infty, 5)", ["(-∞, 5)", "(-inf,5)"]),
    ("(-1, 2)", ["(−1, 2)"]),
    ("{2, 1}", ["{1, 2}"]),
    (r"\{2,1\}", [r"\left\{1,2\right\}"]),
    ("1,2", ["1; 2"]),
    ("1/3, 2/3", ["2/3 and 1/3"]),
    ("(0.5, 0.75)", ["(1/2, 3/4)", r"\left(\frac12, \frac34\right)"]),
    (r"30^\circ", ["30°"]),
    ("30", ["30 deg", "30 degrees Celsius"]),
    ("-10", ["-10°C"]),
    ("45", [r"45^{\circ}", r"\angle ABC = 45^\circ"]),
    (r"\frac{1}{2}", [r"$x = \frac{1}{2}$"]),
    ("1/2", [r"\dfrac{1}{2}\text{ hour}"]),
    ("0.5", ["1/2 hour"]),
    (r"2.5\times10^{-8}", ["2.5e-8"]),
    ("2.5e-8", [r"2.5 \cdot 10^{-8}", "2.5 × 10^-8 m"]),
    ("2.5e8", [r"2.5\times 10^{8} \text{ m/s}"]),
    ("300000000", [r"3\times10^{8}"]),
    ("3e8", ["3 × 10⁸", "3.00e8"]),
    ("1", ["1.0"]),
    ("1000.5", ["1,000.5"]),
    ("3 1/2", ["7/2"]),
    ("3.5", ["3½ cups"]),
    ("-3.5", ["-3 1/2"]),
    (r"3\frac{1}{2}", [r"\frac{7}{2}"]),
    ("C", ["C", "(C)", "Option C", "The answer is option C", r"\boxed{\text{C}}"]),
    ("True", ["true"]),
    ("monday", ["Monday"]),
    ("x + 1", ["x+1"]),
    ("x+1", ["f(x) = x+1", "y=x+1"]),
    ("5", ["5 = x"]),
    ("x=5", ["5 = x"]),
    (r"5-\pi", ["5 - pi", "5-pi"]),
]
MORE_WRONG = [
    (
        "18",
        [
            "- 18",
            "18!",
            "x = 18 and y = 3",
            "x = 18, y = 3",
            "18:00",
            "not 18",
            "It isn't 18",
            "18 is incorrect",
            "no",
            "0.18",
            "180",
            "1.8",
            "-18",
            "18 or 19",
            "18 and 19",
            "18, 19",
            "18/19",
            "18-19",
            "18 to 19",
            "17 < x < 19",
            "x > 18",
            "x ≠ 18",
            "> 18 years",
            "less than 18",
            "under 18",
            "over 18",
            "18+",
            "18 out of 20",
            "18x",
            "18i",
            "18^2",
            r"\sqrt{18}",
            r"18\pi",
            "18!",
            r"\frac{18}{2}",
            "18 million",
            "18k",
            "half of 36",
            "> 18",
            ">18",
            r"\geq 18",
        ],
    ),
    ("0", ["none", "zero"]),
    ("[0,5]", ["[0; 5]", "(0,5)"]),
    ("(-1, 2)", ["(2, −1)"]),
    ("1,3", ["1, 2"]),
    ("2.5e-8", ["2.4e-8"]),
    ("1", ["1.000001"]),
    ("1000.5", ["1.000,5"]),
    ("1234567.89", ["1.234.567,89"]),
    ("1234.5", ["1 234,5"]),
    ("31/2", ["3 1/2"]),
    ("C", ["D", "C and D"]),
    ("True", ["False", "not true"]),
    ("monday", ["on Monday"]),
    ("forty-two", ["42"]),
]


@pytest.mark.parametrize(("expected", "givens"), MORE_RIGHT)
def test_more_that_says_the_same(expected, givens):
    assert [given for given in givens if equivalent(given, expected) is not True] == []


@pytest.mark.parametrize(("expected", "givens"), MORE_WRONG)
def test_more_that_says_something_else(expected, givens):
    assert [given for given in givens if equivalent(given, expected) is not False] == []


@pytest.mark.parametrize("expected", RIGHT)
def test_what_says_the_same(expected):
    assert [given for given in RIGHT[expected] if equivalent(given, expected) is not True] == []


@pytest.mark.parametrize("expected", WRONG)
def test_what_says_something_else(expected):
    assert [given for given in WRONG[expected] if equivalent(given, expected) is not False] == []


@pytest.mark.parametrize(
    "expected", ["5 apples and 7 pears", "#!", "half of 5", "x" * 1001, "5 or more"]
)
def test_an_expected_answer_that_is_unclear_does_not_apply(expected):
    assert equivalent("7", expected) is None
    assert equivalent(expected, expected) is True


WHOLE_TEXTS = [
    ("Let x be the number. Then 2x = 10.\nSo x = 5.", "5", "10"),
    ("Step 1: 2+3=5\nStep 2: 5*4=20\nThe answer is 20.", "20", "5"),
    ("She sells 16 - 3 - 4 = 9 eggs and makes 9 * 2 = $18 every day.", "18", "9"),
    ("We have $x^2 = 4$ so $x = 2$.", "2", "4"),
    ("We have $x^2 = 4$ so $x = 2$ or $x = -2$.", "2,-2", "-2"),
    (r"Therefore, the area is $25\pi$ square units.", r"25\pi", "25"),
    ("Answer: 42\nExplanation: because 6 times 7 is 42, in 3 steps", "42", "3"),
    ("The answer is 5. It took me 10 minutes.", "5", "10"),
    ("The answer is 5. Let me double check: 2 + 3 = 5. Yes.", "5", "3"),
    (r"The final answer is $\boxed{5}$. I hope it is correct in 9 ways.", "5", "9"),
    ("```python\nprint(9)\n```\nThe result is 5", "5", "9"),
    ("1. First we add 2 and 3.\n2. That gives 5.\n\n**5**", "5", "2"),
    ("1. First we add 2 and 3.\n2. That gives 5.\n\n**Answer:** 5 apples", "5", "2"),
    ("Solving gives\n\\[\nx = \\frac{7}{2}\n\\]", "3.5", "7"),
    ("Solving gives\n$$x = \\frac{7}{2}$$\n", "3.5", "2"),
    ("The total is $5 + $7 = $12", "12", "5"),
    ("<reasoning>\n9\n</reasoning>\n<answer>\n1/2", "0.5", "9"),
    ("No, it is 5", "5", "0"),
    ("x = 3\ny = 4", "4", "3"),
    ("We go on. " * 200 + r"so we get \boxed{\frac{7}{2}}.", "3.5", "7"),
]


@pytest.mark.parametrize(("text", "right", "wrong"), WHOLE_TEXTS)
def test_what_a_whole_text_concludes(text, right, wrong):
    assert equivalent(text, right) is True
    assert equivalent(text, wrong) is False


@pytest.mark.parametrize(
    "text", ["I don't know", "", " ", "####", "Answer:", "The value is not 5."]
)
def test_a_text_without_an_answer(text):
    assert equivalent(text, "5") is False


# As data sets write it, and as a model may.
EXPECTED = ["5", "-3", "0", "1234", "0.75", r"\frac{2}{3}", r"3\sqrt{13}", "(3,4)", "x+1", r"\pi"]
AROUND = [
    *("{}", "{} ", "{}.", "${}$", r"\boxed{{{}}}", r"\( {} \)", "$${}$$", "The answer is {}."),
    *(
        "The answer is ${}$.",
        "Answer: {}",
        "#### {}",
        "**{}**",
        "=> {}",
        r"Therefore, $\boxed{{{}}}$.",
    ),
    *("So the final answer is: {}", "<answer>{}</answer>", "A: {}", r"\[ {} \]"),
]


@pytest.mark.parametrize("around", AROUND)
def test_nothing_around_an_answer_changes_it(around):
    """On either side, and never into another one."""
    for expected in EXPECTED:
        assert equivalent(around.format(expected), expected) is True, expected
        assert equivalent(expected, around.format(expected)) is True, expected
        others = [other for other in EXPECTED if other != expected]
        said = [other for other in others if equivalent(around.format(other), expected)]
        assert said == [], expected


def test_numbers_agree_by_their_size():
    sizes = [Fraction(10) ** n for n in range(-300, 300, 7)]
    for size in sizes:
        assert agree(size, size * (1 + Fraction(1, 10**12))) is (size < 10**3 or size >= 10**15)
        assert not agree(size, size * Fraction(11, 10)), size
        assert not agree(size, -size)
        assert not agree(size, size / 10**3)
        assert not agree(Fraction(0), size)


def test_a_tiny_number_beside_others():
    """Within sets, intervals and expressions, where math-verify compares."""
    for around in (r"\{{1, {}\}}", "({}, 2)", "[{}, 2]", "{}x", "x + {}", "x = {}", "x > {}"):
        one, other = (around.format(size) for size in (r"9.1\times10^{-31}", r"1.6\times10^{-19}"))
        assert equivalent(one, one + " ") is True
        assert equivalent(f"${one}$", one) is True
        assert equivalent(one, other) is False, around


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no GSM8K files in {GSM8K}")
def test_every_answer_of_gsm8k_is_read(grpo):
    config = grpo.MLXGRPOConfig(dataset=str(GSM8K))
    answers = [row["answer"] for row in grpo.load_questions(config, "test")]
    for answer in answers:
        assert equivalent(f"So it is {answer} dollars.", answer) is True
        assert equivalent(f"So it is {answer}1 dollars.", answer) is False


@pytest.mark.parametrize(
    "text",
    [
        *("(" * 500, "{" * 500, "$" * 500, "*" * 900, "`" * 900, r"\boxed{" * 100, r"\frac" * 200),
        *("5 " * 400, "a b " * 240, "=> " * 300, "x=1 or " * 120, r"\text{" * 160, "not " * 240),
        *("_5" * 400, "1,000" * 200, "9" * 400 + "e999", "$5 " * 300, r"\[" * 400, "10^{999}" * 50),
    ],
    ids=lambda text: text[:8],
)
def test_what_a_model_repeats_is_read_at_once(text):
    mathematics.read.cache_clear()
    with time_limit(20):
        assert equivalent(text, "42") is False


def test_a_number_beyond_reason_is_given_up(monkeypatch):
    """What SymPy does not finish counts as wrong; the limit of a second keeps the test short."""
    monkeypatch.setattr(mathematics, "time_limit", lambda: 1)
    with time_limit(30):
        assert equivalent("10^{10^{10^{10}}}", "5") is False


def test_threads_read_the_same():
    values = []
    pairs = [("It is 5 cm.", "5"), (r"\sqrt{8}", r"2\sqrt{2}"), ("1e-20", "2e-20")]
    thread = threading.Thread(target=lambda: values.extend(equivalent(*pair) for pair in pairs))
    thread.start()
    thread.join()
    assert values == [True, True, False]
