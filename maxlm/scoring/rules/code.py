"""Reward of code that passes the unit tests of its record, run in a bounded process."""

import json
import re
import secrets
from typing import Annotated, Any

from pydantic import Field

from maxlm.errors import ConfigError
from maxlm.runtime.bounded import IsolationError, Limits, Outcome, Program, run_programs

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]

_FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

# The verdict is marked by a secret that the code cannot print by chance, and that is read before it runs. It ends the
# process at once, so that neither threads nor exit handlers of the code run after it.
_HARNESS = """\
def main():
    import json, os, sys
    task = json.loads(sys.stdin.read())
    passed, scope = 0, {"__name__": "solution"}
    try:
        exec(compile(task["code"], "solution.py", "exec"), scope)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    else:
        for test in task["tests"]:
            try:
                exec(compile(test, "test.py", "exec"), scope)
                passed += 1
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.stdout.flush()
    os.write(1, f"\\n{task['secret']} {passed}\\n".encode())
    os._exit(0)
main()
"""


def unit_tests(
    prompt: Any,
    completions: list[str],
    record: dict[str, Any],
    *,
    metrics: dict[str, Any],
    share: bool = False,
    seconds: PositiveFloat = 10.0,
    memory_mb: Annotated[int, Field(ge=64)] = 512,
    processes: Positive = 4,
    workers: Positive | None = None,
    accept_no_isolation: bool = False,
) -> list[float]:
    """1 if the completion's code passes all `tests` of the record, each a text of Python with assertions, or an
    {input, output} of a whole program.

    The code is the last ```python block, or the completion itself. Outputs are equal up to trailing whitespace.

    Reports `stopped`, the share of an answer's programs that a bound or a signal ended.

    Args:
      share: give the share of tests that pass instead.
      seconds: for all assertions together, or for each input; also of CPU time, rounded up.
      workers: programs that run at a time; None is one for each CPU.
      accept_no_isolation: where the machine cannot isolate the code, run it nevertheless, with the files and the
        network of this user.

    Raises:
      ConfigError: the code cannot be isolated on this machine.
    """
    tests = read_tests(record)
    limits = Limits(seconds=seconds, cpu_seconds=int(seconds) + 1, memory_mb=memory_mb, processes=processes)
    codes = [find_code(text) for text in completions]
    secret = secrets.token_hex(16)
    if isinstance(tests[0], str):
        tasks = ({"code": code, "tests": tests, "secret": secret} for code in codes)
        programs = [Program(_HARNESS, stdin=json.dumps(task)) for task in tasks]
    else:
        programs = [Program(code, stdin=test["input"]) for test in tests for code in codes]
    outcomes = _run(programs, limits, workers, accept_no_isolation=accept_no_isolation)
    by_answer = [outcomes[start :: len(codes)] for start in range(len(codes))]
    metrics["stopped"] = [sum(each.ended != "exit" for each in its) / len(its) for its in by_answer]
    if isinstance(tests[0], str):
        passed = [_num_passed(outcome, secret) for (outcome,) in by_answer]
    else:
        passed = [sum(_gave(outcome, test["output"]) for outcome, test in zip(its, tests)) for its in by_answer]
    return [count / len(tests) if share else float(count == len(tests)) for count in passed]


def find_code(text: str) -> str:
    """The code of a completion."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else text


def read_tests(record: dict[str, Any]) -> list[Any]:
    """The tests of a record: texts, or inputs with outputs.

    Raises:
      ValueError: there are none, or not all are of one of the forms; the message follows the name of the field.
    """
    tests = record.get("tests")
    tests = [tests] if isinstance(tests, str) else tests
    if not isinstance(tests, list) or not tests:
        raise ValueError("must be a text of Python, or a list of such texts or of {input, output}")
    for number, test in enumerate(tests, 1):
        if isinstance(tests[0], dict):
            if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
                raise ValueError(f"must each have input and output as texts; number {number} has not")
        elif not isinstance(test, str) or not test.strip():
            raise ValueError(f"must all be texts of Python; number {number} is not")
        else:
            try:
                compile(test, "test", "exec")
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"number {number} is not Python: {error}") from None
    return tests


def _run(programs: list[Program], limits: Limits, workers: int | None, *, accept_no_isolation: bool) -> list[Outcome]:
    try:
        return run_programs(programs, limits, workers=workers)
    except IsolationError as error:
        if accept_no_isolation:
            return run_programs(programs, limits, workers=workers, isolated=False)
        raise ConfigError(
            [
                f"objective.reward: unit_tests: {error}; permit it (docs/rewards.md), or set accept_no_isolation: true"
                " in the settings of unit_tests, with which code of the model can use your files and network"
            ]
        ) from None


def _num_passed(outcome: Outcome, secret: str) -> int:
    verdict = outcome.stdout.rstrip("\n").rpartition("\n")[2]
    name, _, count = verdict.partition(" ")
    return int(count) if outcome.ended == "exit" and name == secret and count.isdecimal() else 0


def _gave(outcome: Outcome, wanted: str) -> bool:
    return outcome.ended == "exit" and outcome.exit_code == 0 and _lines(outcome.stdout) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
