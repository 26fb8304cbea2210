"""Parse numbers as people and models write them, into exact values.

Accepted: `18`, `-3`, `+.5`, `1,000.50`, `12,34,567`, `1'000`, `2e5`, `2 x 10^5`, `10⁵`, `3/4`, `1 1/2`, `½`, `$18`,
`50%`, `1.5 million`, `3万`, with any script's decimal digits and Unicode's minus signs; on request, Chinese numerals.
Not accepted: digits that belong to a name (`H2O`, `v1.5`), decimal commas, and arithmetic. Units are ignored.
"""

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction

# No answer has more digits or a larger power of ten; without the limit they would take unbounded time and memory.
_MAX_DIGITS = 400

_LETTER = r"A-Za-z\u00c0-\u024f\u0370-\u03ff\u0400-\u04ff"
_CURRENCY = r"(?:US\$|[$€£¥₩₹]|(?:USD|EUR|GBP|CNY|RMB|JPY|INR|Rs\.?)(?![A-Za-z]))"
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d{1,3}(?:['’_\u00a0\u2009\u202f]\d{3})+|\d++)(?!\d)"
# U+2064, invisible plus: between the parts of a mixed number.
_PLUS = "\u2064"
_MULTIPLES = {
    "hundred": 2,
    "thousand": 3,
    "million": 6,
    "billion": 9,
    "trillion": 12,
    "k": 3,
    "万": 4,
    "萬": 4,
    "亿": 8,
    "億": 8,
}

_NUMBER = re.compile(
    rf"""
    # A sign belongs to the number unless it follows another token: 5-3, COVID-19.
    (?:(?<![{_LETTER}\d)\]%])(?P<sign>[-+]))?
    (?:(?<![{_LETTER}]){_CURRENCY}\ ?(?P<inner_sign>[-+])?)?
    (?:
        (?:(?P<whole>{_INTEGER})[ {_PLUS}])?
        (?<!/)(?<!/\ )(?P<numerator>{_INTEGER})\ ?/\ ?(?P<denominator>{_INTEGER})(?!\.?\d|\ ?/)
      | (?P<decimal>{_INTEGER}(?:\.\d++)?|(?<!\d)\.\d++)
        (?:[eE](?P<exponent>[-+]?\d++)(?![{_LETTER}]))?
        (?:\^\{{?(?P<power>[-+]?\d++)\}}?)?
        (?:\ ?[×x*·]\ ?10\^\{{?(?P<ten_power>[-+]?\d++)\}}?)?
    )
    (?:
        \ ?(?P<multiple>(?i:hundred|thousand|million|billion|trillion))\b
      | (?P<kilo>[kK])(?![{_LETTER}\d])
      | \ ?(?P<myriad>[百千]?[万萬亿億])
    )?
    (?P<percent>\ ?%|\ (?:percent|per\ cent)\b)?
  | (?P<name>[{_LETTER}_][{_LETTER}_\d]*(?:\.\d+)*(?:\^\{{?[-+]?\d+)?|\^\{{?[-+]?\d+)
    """,
    re.VERBOSE,
)

_DIGITS = {c: value for value, characters in enumerate(
    ("零〇", "一壹", "二两兩贰貳", "三叁參", "四肆", "五伍", "六陆陸", "七柒", "八捌", "九玖")
) for c in characters}  # fmt: skip
_UNITS = {"十": 10, "拾": 10, "百": 100, "佰": 100, "千": 1000, "仟": 1000}
_MYRIADS = {"万": 10**4, "萬": 10**4, "亿": 10**8, "億": 10**8}
_D, _U = "".join(_DIGITS), "".join([*_DIGITS, *_UNITS, *_MYRIADS])
_CHINESE = re.compile(
    rf"(?P<sign>[负負])?(?:(?:(?P<whole>[{_U}]+)又)?(?P<below>[{_U}]+)分之)?"
    rf"(?P<integer>[{_D}十拾][{_U}]*)(?:[点點](?P<decimals>[{_D}]+))?"
)


_ZERO = Fraction(0)


@dataclass(frozen=True)
class Number:
    """A number in a text.

    value: exact; None if it is too large to represent exactly, or a division by zero.
    is_percent: a percent sign follows; `value` is the number as written, not divided by 100.
    """

    value: Fraction | None
    is_percent: bool = False

    def equals(self, other: "Number", *, absolute: Fraction = _ZERO, relative: Fraction = _ZERO) -> bool:
        """Whether both are the same number, or differ by at most max(absolute, relative * |other|).

        If only one has a percent sign, it is either a unit, as in the question "how many percent", or a hundredth:
        50% equals 50 and 0.5.
        """
        if self.value is None or other.value is None:
            return False
        values = [self.value]
        if self.is_percent and not other.is_percent:
            values.append(self.value / 100)
        elif other.is_percent and not self.is_percent:
            values.append(self.value * 100)
        allowed = max(absolute, relative * abs(other.value))
        return any(abs(value - other.value) <= allowed for value in values)


def find_numbers(text: str, *, chinese: bool = False) -> list[Number]:
    """The numbers of a text, in order.

    Args:
      chinese: Chinese numerals count too (十八, 两万, 三点五, 四分之三, 百分之五十, 二〇二四). They also occur in words
        that are not numbers (一起), so leave it off for texts in which none is expected.
    """
    text = _plain(text)
    found = [(match.start(), _number(match)) for match in _NUMBER.finditer(text) if match["name"] is None]
    if chinese:
        # 万 after digits belongs to them.
        taken = {index for match in _NUMBER.finditer(text) for index in range(*match.span())}
        matches = (match for match in _CHINESE.finditer(text) if match.start() not in taken)
        found += [(match.start(), _chinese_number(match)) for match in matches]
    return [number for _, number in sorted(found, key=lambda item: item[0])]


def _plain(text: str) -> str:
    """The text with ASCII digits, minus and fraction signs, and powers as `^5`."""
    if text.isascii():
        return text
    text = re.sub(r"(?<=[０-９])，(?=[０-９])", ",", text)
    text = re.sub("[⁰¹²³⁴-⁹⁻]+", lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    return re.sub(rf"(?<!\d){_PLUS}", "", "".join(_ascii(character) for character in text))


def _ascii(character: str) -> str:
    if character.isascii():
        return character
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return _PLUS + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return _SIGNS.get(character, character)


_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2013\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2044\u2215\uff0f", "/"),
    "\uff0b": "+",
    "\uff05": "%",
    "\uff04": "$",
    "\uff0e": ".",
    "\u066b": ".",
    "\u066c": ",",
}


def _number(match: re.Match) -> Number:
    negative = "-" in (match["sign"], match["inner_sign"])
    multiple = (match["multiple"] or match["kilo"] or (match["myriad"] or "")[-1:]).lower()
    powers = [int(match[name] or 0) if len(match[name] or "") < 5 else _MAX_DIGITS + 1 for name in _POWERS]
    exponent = (
        powers[0] + powers[2] + _MULTIPLES.get(multiple, 0) + {"百": 2, "千": 3}.get((match["myriad"] or " ")[0], 0)
    )
    parts = [match[name] for name in ("whole", "numerator", "denominator", "decimal") if match[name]]
    if max(map(len, parts)) > _MAX_DIGITS or max(map(abs, powers)) > _MAX_DIGITS:
        return Number(None)
    whole, numerator, denominator = (Fraction(_digits(match[n])) for n in ("whole", "numerator", "denominator"))
    if match["decimal"]:
        value = Fraction(_digits(match["decimal"]))
        if match["power"]:
            if len(match["decimal"]) * abs(powers[1]) > _MAX_DIGITS or (value == 0 and powers[1] < 0):
                return Number(None)
            value **= powers[1]
    elif denominator == 0:
        return Number(None)
    else:
        value = whole + numerator / denominator
    value *= Fraction(10) ** exponent
    return Number(-value if negative else value, match["percent"] is not None)


_POWERS = ("exponent", "power", "ten_power")


def _digits(text: str | None) -> str:
    return re.sub(r"[^\d.]", "", text or "0")


def _chinese_number(match: re.Match) -> Number:
    value = Fraction(_chinese_integer(match["integer"]))
    if match["decimals"]:
        digits = "".join(str(_DIGITS[c]) for c in match["decimals"][:_MAX_DIGITS])
        value += Fraction(int(digits), 10 ** len(digits))
    is_percent = match["below"] == "百" and match["whole"] is None
    if match["below"] and not is_percent:
        below = _chinese_integer(match["below"])
        if below == 0:
            return Number(None)
        value = value / below + (_chinese_integer(match["whole"]) if match["whole"] else 0)
    return Number(-value if match["sign"] else value, is_percent)


def _chinese_integer(text: str) -> int:
    """Value of consecutive digits (二〇二四), or of digits with units (一千零五, 两万三千, 一百二 for 120)."""
    text = text[:_MAX_DIGITS]
    if all(c in _DIGITS for c in text):
        return int("".join(str(_DIGITS[c]) for c in text))
    total = section = digit = 0
    unit = 1  # the preceding unit: a final digit may mean tens, hundreds, ...
    for c in text:
        if c in _DIGITS:
            digit = _DIGITS[c]
            unit = unit if digit else 1
        elif c in _UNITS:
            unit = _UNITS[c]
            section += (digit or 1) * unit
            digit = 0
        else:
            unit = _MYRIADS[c]
            whole = section + digit
            total = (total + whole) * unit if unit == 10**8 else total + (whole or (0 if total else 1)) * unit
            section = digit = 0
    return total + section + digit * (unit // 10 if unit >= 100 else 1)
