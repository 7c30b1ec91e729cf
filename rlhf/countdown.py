"""Countdown: a safe parser for what a model wrote, and a fast generator of problems.

Numbers and a target are given; the answer is an expression that uses each number once and equals
the target (papers/verifiable_tasks.md, sections 3.2 and 6).
"""

import operator
import random
import re
from collections.abc import Sequence
from fractions import Fraction

LONGEST_EXPRESSION, DEEPEST_NESTING = 100, 20
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def check_countdown(text: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the text is an expression over exactly these numbers that equals the target."""
    parsed = parse_expression(text)
    if parsed is None:
        return False
    value, used = parsed
    return value == target and sorted(used) == sorted(map(str, numbers))


def parse_expression(text: str) -> tuple[Fraction | None, list[str]] | None:
    """Value and numbers of an expression of digits, + - * / and parentheses; None: it is not one.

    The value is None after a division by zero. Written by a model, so nothing is ever evaluated by
    Python or sympy: 9**9**9 would hang, and stranger things run code. Two stacks (shunting yard),
    one pass, at most 100 characters, exact fractions: no number can get more digits than the
    text has. There is no sign: -3+5 and 5*(-3) are refused, as is a product without *.
    """
    text = text.strip()
    if len(text) > LONGEST_EXPRESSION or not re.fullmatch(r"[-+*/() 0-9]+", text):
        return None
    values, signs, used, depth = [], [], [], 0
    divided_by_zero = False  # what follows must still be an expression

    def apply() -> None:
        nonlocal divided_by_zero
        sign, right, left = signs.pop(), values.pop(), values.pop()
        if sign == "/" and right == 0:
            divided_by_zero, right = True, Fraction(1)
        values.append(OPERATIONS[sign](left, right))

    operand = True  # what must come next: an operand, or an operator
    for token in re.findall("[0-9]+|[-+*/()]", text):
        if operand != (token == "(" or token.isdigit()):
            return None
        if token == "(":
            signs.append(token)
            depth += 1
            if depth > DEEPEST_NESTING:
                return None
        elif token == ")":
            while signs and signs[-1] != "(":
                apply()
            if not signs:
                return None
            signs.pop()
            depth -= 1
        elif token in PRECEDENCE:
            while signs and PRECEDENCE.get(signs[-1], 0) >= PRECEDENCE[token]:
                apply()
            signs.append(token)
            operand = True
        else:
            values.append(Fraction(int(token)))
            used.append(token)
            operand = False
    if operand or depth:
        return None
    while signs:
        apply()
    return None if divided_by_zero else values[0], used


def draw_countdown(config, seed: int) -> dict:
    """An item like reasoning-gym's, which are built with sympy: 1 to 15 milliseconds each.

    Random numbers and operators from left to right, with - instead of / where that leaves a rest,
    until the target is in range; ValueError after 100 times, as there.
    """
    rng = random.Random(seed)
    count = rng.randint(config.min_numbers, config.max_numbers)
    for _ in range(100):
        numbers = [rng.randint(config.min_value, config.max_value) for _ in range(count)]
        value, text, loosest = numbers[0], str(numbers[0]), 2
        for number in numbers[1:]:
            sign = rng.choice(config.operators)
            if sign == "/" and value % number:
                sign = "-"
            if PRECEDENCE[sign] > loosest:
                text = f"({text})"
            value = value // number if sign == "/" else OPERATIONS[sign](value, number)
            text, loosest = f"{text} {sign} {number}", PRECEDENCE[sign]
        if config.min_target <= value <= config.max_target:
            if config.shuffle:
                rng.shuffle(numbers)
            return {"answer": text, "metadata": {"numbers": numbers, "target": value}}
    raise ValueError("no target in range in 100 draws")
