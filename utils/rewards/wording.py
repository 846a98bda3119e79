"""What a text gives as its answer: words, or a value with a unit, whatever it says around it.

math-verify takes a whole text for one formula (and multiplies the letters of "5 dollars"), or takes
the last number in it (and reads 5 in "not 5", "half of 5", "4 or 5"). This finds the value that a
text commits itself to; comparing it is left to others.
"""

import re
from dataclasses import dataclass

from .number_forms import boxed, in_ascii, plain_signs, powers_spelt, unframed

# How texts announce, before it, what they answer.
ANSWER_IS = re.compile(
    r"(?:\b(?:answer|solution|result)\b(?:\s+(?:is|are|was))?\s*[:=]?|####|=>|\u21d2|\u2234"
    r"|\\(?:Rightarrow|implies|therefore)\b|(?:^|\n)\s*(?:A|Ans)\s*[:=]|^\s*(?:\u2192|->))\s*",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[^\s.])[.!?]\s+(?=[A-Z])|\n")
TAG = re.compile(r"</?[A-Za-z_]+>")
BOLD = re.compile(r"(?<![\w)*])(\*{1,3}|_{1,3})(?=[^\s*_])([^*\n]*?[^\s*])\1(?![\w(*])")
CODE = re.compile(r"`+(?:[a-z]*\n)?([^`]*)`+")
TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|underline)\s*\{([^{}]*)\}(\^\{?\d\}?)?"
)
TRAILING_SPACE = re.compile(r"(?:\s|\\[,;:! ])+$")

SYMBOLS = {
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u221a": "sqrt ",
    "\u2248": r"\approx ",
    "\u00f7": "/",
    "\u2265": r"\ge ",
    "\u2264": r"\le ",
    "\u2260": r"\ne ",
    "\u222a": r"\cup ",
    "\u2208": r"\in ",
    "\u00b1": r"\pm ",
    "\u00b0C": " celsius ",
    "\u00b0F": " fahrenheit ",
    "\u2103": " celsius ",
    "\u00b0": r"^\circ ",
    "\u201c": " ",
    "\u201d": " ",
    '"': " ",
}
DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?\s*([CF])(?![A-Za-z])")
FUNCTION = r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan)h?|cot|csc|log|ln|sqrt)"
IN_LATEX = (
    (re.compile(r"\b(?:percent(?:age)?|per cent|pct)\b(?!\s+point)", re.IGNORECASE), r"\\%"),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"(?<![\\A-Za-z])inf(?:ini)?(?:ty)?(?![A-Za-z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"(?<=[\])])\s*U\s*(?=[(\[])"), r"\\cup "),
    (re.compile(r"\\?(?<![A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*(\d+(?:\.\d+)?|[a-z]\b)"), r"\\sqrt{\1}"),
    (re.compile(rf"(?<=\d)-(?!{FUNCTION}|pi\b|inf)(?=[A-Za-z]{{2}})"), " "),
    (re.compile(rf"{FUNCTION}(?=\s*[({{\d]|\s+[a-z]\b)"), r"\\\1 "),
    (re.compile(r"\b(?:minus|negative)\s+(?=\\?\$?\.?\d)", re.IGNORECASE), "-"),
    (re.compile(r"\s*\b(?:instead of|rather than)\b", re.IGNORECASE), ", not"),
)

UNIT = {
    name: names[0]
    for names in (
        *(("mm", "millimeter", "millimetre"), ("cm", "centimeter", "centimetre")),
        *(("m", "meter", "metre"), ("km", "kilometer", "kilometre"), ("in", "inch", "inche")),
        *(("ft", "foot", "feet"), ("yd", "yard"), ("mi", "mile"), ("mg", "milligram")),
        *(("g", "gram"), ("kg", "kilogram", "kilo"), ("lb", "pound"), ("oz", "ounce")),
        *(("s", "sec", "second"), ("min", "minute"), ("h", "hr", "hour"), ("day",), ("week",)),
        *(("month",), ("year", "yr"), ("ms", "millisecond"), ("l", "liter", "litre"), ("ml",)),
        *(("cent", "\u00a2"), ("dollar", "usd", "$"), ("euro", "eur", "\u20ac"), ("ton", "tonne")),
        *(("celsius",), ("fahrenheit",), ("N", "newton"), ("J", "joule"), ("W", "watt")),
        *(("V", "volt"), ("C", "coulomb"), ("A", "ampere"), ("K", "kelvin"), ("hz", "hertz")),
        *(("degree", "deg"), ("radian", "rad"), ("mi/h", "mph"), ("km/h", "kmph", "kph", "kmh")),
    )
    for name in names
}
"""One name for each unit, so that centimetres are not metres. Nothing is converted."""
LITERAL = re.compile(
    r"(?P<number>(?:[^A-Za-z\\]|\\(?:times|cdot|[dt]?frac)|(?<=\d)[eE](?=[-+\d]))*[\d)}.])"
    r"(?:\s|\\,)*(?P<unit>[^\W\d_][\w/^{}. ]*)"
)
WORD = re.compile(r"[^\W\d_]{2,}(?:['.-][^\W\d_]+)*")
PART = r"[^\W\d_]{1,12}(?:\^\{?-?\d\}?|\d)?"
COMPOUND = re.compile(rf"{PART}(?:/{PART})+|[^\W\d_]{{2,12}}(?:\^\{{?\d\}}?|\d)")
TOUCHING = re.compile(
    rf"(?<=\d)(?=(?:{'|'.join(n for n in UNIT if n.isalpha() and len(n) > 1)})s?(?![a-z])"
    r"|[a-z]{1,4}/[a-z])"
)
TOKEN = re.compile(
    r"\$\$[^$]+\$\$|\$[^$\s](?:[^$\n]*[^$\s\d])?\$(?!\d)|\$\d[^$\n]*\$(?![\d.])"
    r"|\\\((?:(?!\\\)).)+\\\)|\\\[(?:(?!\\\]).)+\\\]|\n|[^\s]+",
    re.DOTALL,
)
PUNCTUATION = "()[]\"'.,;:!?*_"
ENDS = ",;:.!?"  # what is denied before one of these is not denied after it

NEGATIONS = {"not", "cannot", "never", "no", "nor", "neither", "without", "except", "unlike"}
NEGATIONS |= {"isnt", "arent", "wasnt", "cant", "wont", "doesnt", "didnt", "dont", "couldnt"}
NEGATIONS |= {"wrong", "incorrect", "false"}
# Words by which a value is a bound, another number than it says, or one of several.
ANYWHERE_BEFORE = {"than", "between", "exceeds"}
SOON_AFTER_IT = {"half", "third", "quarter", "twice", "double", "triple", "out", "up"}
JUST_BEFORE = {"least", "most", "over", "under", "above", "below"}
JUST_BEFORE |= {"times", "plus", "minus", "negative", "mod"}
JUST_AFTER = {"or", "times", "plus", "minus", "dozen"}
LISTS = (["and"], ["or"])
JOINS = (["to"], ["by"], ["of"], ["per"], ["through"], ["versus"], ["vs"])
ZEROS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


@dataclass(frozen=True)
class Said:
    """Words, or a formula with its unit; neither where a text does not commit itself."""

    words: str = ""
    formula: str = ""
    unit: str = ""
    """Of those known here; others say nothing."""
    zeros: int = 0
    """Of "5 million"."""


def tidied(text: str) -> str:
    """What follows the last words that announce an answer, without Markdown and tags."""
    text = plain_signs(in_ascii(TAG.sub("\n", text)))
    text = CODE.sub(r"\1", text)
    text = BOLD.sub(r"\2", BOLD.sub(r"\2", text))
    if not boxed(text):
        rests = (text[match.end() :] for match in reversed([*ANSWER_IS.finditer(text)]))
        rests = (rest.strip(" \n*_:") for rest in rests)
        text = next((announced(rest) for rest in rests if re.search(r"\w", rest)), text)
    return unframed(text.strip().lstrip("*=:").rstrip("*.,;:? \n"))


def announced(rest: str) -> str:
    """What "the answer is" announces: the sentence or line, if it has a value or few words."""
    sentence = SENTENCE_END.split(rest, maxsplit=1)[0]
    short = re.search(r"\w", sentence) and len(sentence.split()) <= 3
    return sentence if "\\begin" not in rest and (short or re.search(r"\d", sentence)) else rest


def said(text: str) -> Said:
    """What a text answers that is `tidied`."""
    text = with_symbols_spelt(text)
    literal = LITERAL.fullmatch(text)
    if literal and (unit := unit_of(literal["unit"].split())):
        return Said(formula=literal["number"].strip(), unit=unit)
    for pattern, spelt in IN_LATEX:
        text = pattern.sub(spelt, text)
    tokens = TOKEN.findall(TOUCHING.sub(" ", text))
    kinds = [is_word(token, i == len(tokens) - 1) for i, token in enumerate(tokens)]
    words = [bare(token) for token, word in zip(tokens, kinds, strict=True) if word]
    if {*words} <= {"and", "or"} and "\n" not in tokens:
        return Said(formula=text.strip())
    values, gaps = parts(tokens, kinds)
    return chosen(values, gaps) if values else Said(words=" ".join(words))


def with_symbols_spelt(text: str) -> str:
    """The symbols of Unicode as LaTeX writes them, and the words in a formula as words."""
    text = powers_spelt(TEXT.sub(r" \1\2 ", text))
    for symbol, spelt in SYMBOLS.items():
        text = text.replace(symbol, spelt)
    return DEGREES.sub(lambda m: " celsius" if m[1] == "C" else " fahrenheit", text).strip()


def is_word(token: str, last: bool) -> bool:
    """Not a part of a formula: "apples", "km/h"."""
    core = token.strip(PUNCTUATION)
    if token in ("a", "an", "I", "A") or re.fullmatch("[A-Za-z]:", token):
        return not last
    return bool(WORD.fullmatch(core) or (COMPOUND.fullmatch(core) and unit_of([core])))


def bare(token: str) -> str:
    return token.strip(PUNCTUATION).casefold().replace("'", "")


def parts(tokens: list[str], kinds: list[bool]) -> tuple[list[str], list[list[str]]]:
    """The values of a text, and the words before each and after the last. A ";" among the words
    stands for whatever ends a part of a sentence."""
    values: list[str] = []
    gaps: list[list[str]] = [[]]
    for token, word, following in zip(tokens, kinds, [*kinds[1:], False], strict=True):
        if token == "\n":
            gaps[-1].append(";")
        elif word:
            gaps[-1].append(bare(token))
        elif values and not gaps[-1]:
            values[-1] += f" {token}"
        else:
            values.append(token)
            gaps.append([])
        if token[-1] in ENDS and (word or following):
            gaps[-1].append(";")
    return values, gaps


def chosen(values: list[str], gaps: list[list[str]]) -> Said:
    """The last value that is not denied: 7 of "it is not 5 but 7", nothing of "5 or 7"."""
    for last in range(len(values) - 1, -1, -1):
        first = first_of_set(gaps, last)
        before, after = last_clause(gaps[first]), first_clause(gaps[last + 1])
        if NEGATIONS & {*before, *after[:3]}:
            continue
        one_of_several = first and (gaps[first] in JOINS or before[-1:] in LISTS)
        if one_of_several or changed(before, after):
            break
        formula = ", ".join(map(stripped, values[first : last + 1]))
        zeros = ZEROS.get(after[0], 0) if after else 0
        return Said("", formula, unit_of(after[1:] if zeros else after), zeros)
    return Said()


def first_of_set(gaps: list[list[str]], last: int) -> int:
    """Of the values that nothing but "and" or "or" puts together."""
    while last and gaps[last] in LISTS:
        last -= 1
    return last


def stripped(value: str) -> str:
    return unframed(TRAILING_SPACE.sub("", value.strip(" =:").rstrip(ENDS)))


def changed(before: list[str], after: list[str]) -> bool:
    """Whether the words around a value make something else of it."""
    return bool(
        ANYWHERE_BEFORE & {*before}
        or SOON_AFTER_IT & {*before[-2:]}
        or JUST_BEFORE & {*before[-1:]}
        or (JUST_AFTER & {*after[:1]} and after[1:])
    )


def last_clause(words: list[str]) -> list[str]:
    ends = [i for i, word in enumerate(words) if word in (";", "but")]
    return words[ends[-1] + 1 :] if ends else words


def first_clause(words: list[str]) -> list[str]:
    return words[: words.index(";")] if ";" in words else words


def unit_of(words: list[str]) -> str:
    """One name for a unit however it is written; empty where it is none that is known here."""
    if not words:
        return ""
    text, rest, power = words[0].replace("{", "").replace("}", ""), words[1:], ""
    if text in ("square", "cubic", "sq", "cu") and rest:
        text, rest, power = rest[0], rest[1:], "^2" if text.startswith("sq") else "^3"
    if rest[:1] == ["per"] and rest[1:]:
        text = f"{text}/{rest[1]}"
    names = [one_unit(name) for name in text.split("/")]
    return "/".join(names) + power if all(names) else ""


def one_unit(name: str) -> str:
    """ "cm^2" of "centimeters2"."""
    base = name.rstrip("^-0123456789")
    power = name[len(base) :].removeprefix("^")
    base = base.casefold() if len(base) > 1 else base  # N is a newton, n a variable
    unit = UNIT.get(base) or UNIT.get(base.removesuffix("s"), "")
    return f"{unit}^{power}" if unit and power else unit
