"""Numbers in the ways that people, data sets and language models write them.

docs/rewards.md says what is read as a number, and which numbers are equal.
"""

import dataclasses
import functools
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

LONGEST = 200  # characters of a number with what is around it; a longer text is a text

SIGNS = {0x2212: "-", 0xFE63: "-", 0x2044: "/", 0x2215: "/", 0x2019: "'"}
SIGNS |= {0xD7: r"\times ", 0xB7: r"\cdot "}
FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # as in Chinese text
FULL_WIDTH |= {0x066B: ".", 0x066C: ",", 0x3002: ".", 0xFFE5: "\u00a5"}
DIGIT = re.compile(r"[^\W0-9\D]")  # of another script
LEADING_DASH = re.compile(r"^\s*[\u2010-\u2014]\s?(?=[\d.$\\])")  # elsewhere it is a range
SPACES = re.compile(r"[\u00a0\u2002-\u200a\u202f\u205f\u3000~]|(?<!\\)\\[ :;]|\\quad(?![a-z])")
SUPERSCRIPT = re.compile("[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]$")

BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
FRAMES = (
    re.compile(r"\$\$(?P<inside>[^$]+)\$\$"),
    re.compile(r"\$(?P<inside>[^$]+)\$"),
    re.compile(r"\\\((?P<inside>(?:(?!\\\)).)+)\\\)", re.DOTALL),
    re.compile(r"\\\[(?P<inside>(?:(?!\\\]).)+)\\\]", re.DOTALL),
)
MARKS = (
    re.compile(r"(?P<mark>\*{1,3}|_{1,3}|`{1,3})(?P<inside>[^*_`]+)(?P=mark)"),
    re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit|mbox|underline)\{(?P<inside>[^{}]+)\}"),
    re.compile(r"\{(?P<inside>[^{}]+)\}"),
)

NAME = re.compile(r"(?P<name>\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'?(?:\(\w\))?)\s*:?=\s*(?![=<>])")
BACKWARDS = re.compile(r"(?P<number>[^=<>:!]+?)\s*=\s*(?P<name>[A-Za-z])")
PERCENT = re.compile(r"\s*(?:\\,\s*)?(?:\\?%|per\s?cent|pct)$", re.IGNORECASE)
CURRENCY = r"(?P<currency>(?:US)?\\?\$|[\u20a0-\u20c0\u00a3\u00a5])"
BEFORE = re.compile(rf"(?P<sign>[-+]?)\s*{CURRENCY}?\s*(?P<inner>[-+]?)\s*")
AFTER = re.compile(rf"(?<=[\d.])\s*{CURRENCY}$")

# Groups of three with one separator throughout, groups in the Indian way, or none.
WHOLE = (
    r"(?:\d{1,3}(?P<separator>,\\!|,|\{,\}|\\,|[ '])\d{3}(?:(?P=separator)\d{3})*"
    r"|\d{1,2}(?:,\d{2})+,\d{3}|\d+)"
)
SEPARATORS = re.compile(r"[^\d.]")
TEN = r"10\s*(?:\^|\*\*)\s*[{(]?\s*(?P<power>[-+]?\d{1,3})\s*[})]?"
DECIMAL = re.compile(
    rf"(?P<digits>{WHOLE}(?:\.\d*)?|\.\d+)"
    rf"(?:[eE](?P<e>[-+]?\d{{1,3}})|\s*(?:\\times|\\cdot|[*xX])\s*{TEN})?"
)
POWER_OF_TEN = re.compile(rf"(?P<digits>)(?P<e>)(?:{TEN})")
REPEATING = re.compile(r"(?P<digits>\d+)\.(?P<once>\d*)\\overline\s*\{\s*(?P<again>\d{1,50})\s*\}")
PART = r"[-+]?(?:\d+(?:\.\d+)?|\d{1,3}(?:,\d{3})+)"  # of a fraction
MIXED = r"(?:(?P<whole>\d+)(?: +|(?=\\)))?"
SLASH = re.compile(rf"{MIXED}(?P<over>{PART})\s*/\s*(?P<under>{PART})")
FRAC = re.compile(
    rf"{MIXED}\\[dtc]?frac\s*(?:\{{\s*(?P<over>{PART})\s*\}}|(?P<over1>\d))"
    rf"\s*(?:\{{\s*(?P<under>{PART})\s*\}}|(?P<under1>\d))"
)


@dataclass(frozen=True)
class Quantity:
    """A number as it was written."""

    value: Fraction
    percent: bool = False
    name: str = ""
    """Of the variable that has this value: "x = 5"."""
    currency: str = ""
    decimal: bool = False
    """Written with a point or an exponent, so that it may be rounded."""
    scientific: bool = False
    """Written with a power of ten."""

    def comparable(self, other: "Quantity") -> bool:
        """Neither two variables, nor two currencies, nor money and a percentage."""
        if (self.percent and other.currency) or (other.percent and self.currency):
            return False
        pairs = (self.name, other.name), (self.currency, other.currency)
        return all(not (one and two) or one == two for one, two in pairs)

    def values(self, other: "Quantity") -> list[tuple[Fraction, Fraction]]:
        """What to compare: 12 % is 0.12, and also 12 where only one of them has the sign."""
        one, two = self.value, other.value
        if self.percent == other.percent:
            return [(one, two)]
        return [(one, two), (one / 100, two) if self.percent else (one, two / 100)]

    def equals(self, other: "Quantity") -> bool:
        return self.comparable(other) and any(a == b for a, b in self.values(other))


def in_ascii(text: str) -> str:
    """With the digits and punctuation of ASCII in the place of other scripts'."""
    if text.isascii():
        return text
    return DIGIT.sub(lambda m: str(unicodedata.decimal(m[0])), text.translate(FULL_WIDTH))


def plain_signs(text: str) -> str:
    """With one sign for minus, divided and times, and one kind of space."""
    if not text.isascii():
        text = LEADING_DASH.sub("-", text.translate(SIGNS))
    return SPACES.sub(" ", text)


def powers_spelt(text: str) -> str:
    """With "^{-3}" for superscripts."""
    if text.isascii():
        return text
    return SUPERSCRIPT.sub(lambda m: f"^{{{unicodedata.normalize('NFKC', m[0])}}}", text).replace(
        "\u2212", "-"
    )


def boxed(text: str) -> list[str]:
    """What stands in each \\boxed{...} of a text; an unclosed one goes to the end."""
    found, end = [], 0
    for match in BOX.finditer(text):
        if match.start() < end:
            continue
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        found.append(text[match.end() : end - (not depth)].strip())
    return found


def unframed(text: str, frames: tuple[re.Pattern[str], ...] = FRAMES) -> str:
    """Without what marks a text as the answer, or all of it as a formula: \\boxed{}, $ $."""
    text = text.strip()
    for _ in range(5):
        boxes = {*boxed(text)} if "box" in text else set()
        match = next(filter(None, (frame.fullmatch(text) for frame in frames)), None)
        inside = boxes.pop() if len(boxes) == 1 else match and match["inside"].strip()
        if not inside:
            break
        text = inside
    return text


@functools.lru_cache(maxsize=4096)
def read_number(text: str) -> Quantity | None:
    """The number that a text writes in the digits 0 to 9, whatever marks it as one; None where it
    is something else."""
    if len(text) > LONGEST or DIGIT.search(text):
        return None
    text = unframed(plain_signs(text), FRAMES + MARKS)
    text = text.removesuffix(".").strip()
    if "\n" in text:
        return None
    text = BACKWARDS.sub(r"\g<name>=\g<number>", text) if BACKWARDS.fullmatch(text) else text
    named = NAME.match(text)
    if named:
        text = text[named.end() :]
    number = PERCENT.sub("", text)
    percent, quantity = number != text, with_sign(number.strip())
    if quantity is None or (quantity.currency and percent):
        return None
    return dataclasses.replace(quantity, percent=percent, name=named["name"] if named else "")


def with_sign(text: str) -> Quantity | None:
    """A number with a sign, and a currency on one side of it."""
    before = BEFORE.match(text)
    assert before is not None  # it may be empty
    text, currency, sign = (
        text[before.end() :],
        before["currency"],
        before["sign"] + before["inner"],
    )
    if not currency and (after := AFTER.search(text)):
        text, currency = text[: after.start()], after["currency"]
    quantity = decimal(text) or fraction(text) or repeating(text)
    if quantity is None or len(sign) > 1:
        return None
    value = -quantity.value if sign == "-" else quantity.value
    return dataclasses.replace(quantity, value=value, currency=plain_currency(currency))


def plain_currency(currency: str | None) -> str:
    return "$" if currency and "$" in currency else currency or ""


def decimal(text: str) -> Quantity | None:
    """ "1234", "1,234.50", "1.5e3", "1.5 x 10^3", "10^3"; no sign."""
    text = powers_spelt(text)
    match = DECIMAL.fullmatch(text) or POWER_OF_TEN.fullmatch(text)
    if match is None:
        return None
    digits, power = match["digits"] or "1", match["e"] or match["power"]
    value = Fraction(Decimal(SEPARATORS.sub("", digits))) * Fraction(10) ** int(power or 0)
    rounded = bool(digits.partition(".")[2] or match["e"])
    return Quantity(value, decimal=rounded, scientific=bool(power))


def fraction(text: str) -> Quantity | None:
    """ "3/4", "\\frac{3}{4}", "1 3/4", and with a sign of Unicode's for a half; no sign."""
    if VULGAR.search(text):
        text = f"{text[:-1].strip()} {unicodedata.normalize('NFKC', text[-1])}".strip()
        text = text.replace("\u2044", "/")
    match = SLASH.fullmatch(text) or FRAC.fullmatch(text)
    if match is None:
        return None
    parts = match.groupdict()
    over, under = (number_of(parts[n] or parts.get(f"{n}1")) for n in ("over", "under"))
    if not under or (parts["whole"] and not 0 < over < under):
        return None
    return Quantity(number_of(parts["whole"]) + over / under)


def repeating(text: str) -> Quantity | None:
    """ "0.\\overline{3}"; no sign."""
    match = REPEATING.fullmatch(text)
    if match is None:
        return None
    digits, once, again = match.group("digits", "once", "again")
    period = Fraction(int(again), 10 ** len(again) - 1)
    return Quantity((int(digits + once) + period) / 10 ** len(once))


def number_of(digits: str | None) -> Fraction:
    return Fraction(Decimal((digits or "0").replace(",", "")))
