"""Parse one term of LaTeX or plain mathematics and evaluate it, exactly where it is rational.

Read: integers and decimals, + - * /, juxtaposition as product, powers, \\frac, \\sqrt with index, factorials, percents,
absolute values, mixed numbers, pi, e, i, variables with subscripts, and the elementary functions of `_FUNCTIONS`.
Anything else raises `Unreadable`: relations, sums, integrals, limits, derivatives, words.
"""

import cmath
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from maxlm.scoring.rules.exact import Unreadable, Value, both, exact_power, exact_root, small

# Answers are short; the limits keep time and memory of hostile ones small.
_MAX_CHARACTERS = 1000
_MAX_DEPTH = 40

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<command>\\[A-Za-z]+)|(?P<letter>[A-Za-z\u0370-\u03ff])"
    r"|(?P<sign>[-+*/^_!%|(){}\[\]]))"
)
_PRODUCT = {"*", "\\cdot", "\\times"}
_CONSTANTS: dict[str, Value] = {"\\pi": complex(math.pi), "π": complex(math.pi), "e": complex(math.e), "i": 1j}
_GREEK = {
    *(r"\alpha", r"\beta", r"\gamma", r"\delta", r"\epsilon", r"\theta", r"\lambda", r"\mu", r"\rho"),
    *(r"\sigma", r"\tau", r"\phi", r"\omega"),
}
_FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    **{f"\\{name}": getattr(cmath, name) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp")},
    **{f"\\arc{name}": getattr(cmath, f"a{name}") for name in ("sin", "cos", "tan")},
    "\\ln": cmath.log,
    "\\log": cmath.log,
    "\\sec": lambda x: 1 / cmath.cos(x),
    "\\csc": lambda x: 1 / cmath.sin(x),
    "\\cot": lambda x: 1 / cmath.tan(x),
}


def evaluate(text: str, variables: Callable[[str], Value]) -> Value:
    """The value of a term; `variables` gives that of each variable by name.

    Raises:
      Unreadable: see above.
    """
    if len(text) > _MAX_CHARACTERS:
        raise Unreadable("it is too long")
    parser = _Parser(_tokens(text), variables)
    try:
        value = parser.sum(0)
    except (ZeroDivisionError, OverflowError, ValueError) as error:
        raise Unreadable(str(error)) from None
    if parser.place != len(parser.tokens):
        raise Unreadable(f"unexpected {parser.tokens[parser.place]}")
    if isinstance(value, complex) and not cmath.isfinite(value):
        raise Unreadable("it has no finite value")
    return value


def _tokens(text: str) -> list[str]:
    tokens, place = [], 0
    text = text.strip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise Unreadable(f"unexpected {text[place]}")
        tokens.append(match[0].strip())
        place = match.end()
    return tokens


@dataclass
class _Parser:
    """A recursive descent over tokens, which evaluates on the way."""

    tokens: list[str]
    variables: Callable[[str], Value]
    place: int = 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        token = self.peek()
        if not token or (wanted is not None and token != wanted):
            raise Unreadable(f"expected {wanted or 'more'}")
        self.place += 1
        return token

    def sum(self, depth: int) -> Value:
        value = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = self.take()
            other = self.product(depth)
            value = small(both(lambda a, b: a + b if sign == "+" else a - b, value, other))  # noqa: B023
        return value

    def product(self, depth: int) -> Value:
        value = self.factor(depth)
        while True:
            token = self.peek()
            if token in _PRODUCT:
                self.take()
                value = small(both(lambda a, b: a * b, value, self.factor(depth)))
            elif token in ("/", "\\div"):
                self.take()
                value = small(both(lambda a, b: a / b, value, self.factor(depth)))
            elif self._begins_factor(token):
                value = small(both(lambda a, b: a * b, value, self.power(depth)))
            else:
                return value

    def _begins_factor(self, token: str) -> bool:
        """Whether a product goes on without a sign; not with a number, as in `2 3`."""
        if not token or token in "+-*/^_!%|)}]" or token in _PRODUCT or token == "\\div":
            return False
        return not (token[0].isdigit() or token[0] == ".")

    def factor(self, depth: int) -> Value:
        if self.peek() in ("+", "-"):
            sign, value = self.take(), self.factor(_deeper(depth))
            return value if sign == "+" else -value
        return self.power(depth)

    def power(self, depth: int) -> Value:
        value = self.atom(depth)
        while self.peek() in ("^", "!", "%"):
            token = self.take()
            if token == "^":
                value = exact_power(value, self.argument(depth))
            elif token == "!":
                if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 100:
                    raise Unreadable("a factorial of no small integer")
                value = Fraction(math.factorial(int(value)))
            else:
                value = both(lambda a, b: a / b, value, Fraction(100))
        return value

    def argument(self, depth: int) -> Value:
        """What follows a command or `^`: a group, or a single digit or symbol, as TeX reads it."""
        token = self.peek()
        if token == "{":
            return self.group("{", "}", depth)
        if token == "-":
            self.take()
            return -self.argument(_deeper(depth))
        if token.isdigit() and len(token) > 1:
            # TeX takes one digit: \frac12 is 1/2. The rest remains.
            self.tokens[self.place] = token[1:]
            return Fraction(int(token[0]))
        return self.atom(_deeper(depth))

    def group(self, opening: str, closing: str, depth: int) -> Value:
        self.take(opening)
        value = self.sum(_deeper(depth))
        self.take(closing)
        return value

    def atom(self, depth: int) -> Value:
        token = self.peek()
        if token[:1].isdigit() or token[:1] == ".":
            self.take()
            return Fraction(token.rstrip(".") if token[0] != "." else f"0{token}")
        if token in ("(", "{", "["):
            return self.group(token, {"(": ")", "{": "}", "[": "]"}[token], depth)
        if token == "|":
            value = self.group("|", "|", depth)
            return abs(value) if isinstance(value, Fraction) else complex(abs(value))
        if token == "\\frac":
            self.take()
            over = self.argument(depth)
            return both(lambda a, b: a / b, over, self.argument(depth))
        if token == "\\sqrt":
            self.take()
            index = self.group("[", "]", depth) if self.peek() == "[" else Fraction(2)
            return exact_root(self.argument(depth), index)
        if token in _FUNCTIONS:
            return self.function(depth)
        if token in _CONSTANTS:
            self.take()
            return _CONSTANTS[token]
        if token in _GREEK or token.isalpha():
            return self.variables(self.subscripted(self.take()))
        raise Unreadable(f"unexpected {token or 'end'}")

    def function(self, depth: int) -> Value:
        name = self.take()
        base = power = None
        while self.peek() in ("_", "^"):
            if self.take() == "_":
                base = self.argument(depth)
            else:
                power = self.argument(depth)
        value = _FUNCTIONS[name](complex(self.power(_deeper(depth))))
        if base is not None:
            value /= cmath.log(complex(base))
        return value if power is None else exact_power(value, power)

    def subscripted(self, name: str) -> str:
        if self.peek() != "_":
            return name
        self.take()
        if self.peek() != "{":
            return f"{name}_{self.take()}"
        parts = []
        while self.peek() != "}":
            parts.append(self.take())
        self.take()
        return f"{name}_{''.join(parts[1:])}"


def _deeper(depth: int) -> int:
    if depth >= _MAX_DEPTH:
        raise Unreadable("it is nested too deeply")
    return depth + 1
