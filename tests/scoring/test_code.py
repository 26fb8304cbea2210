"""Code is rewarded for the tests it passes, and for nothing that it does instead."""

import pytest

from maxlm.data.examples.preference import Prompt
from maxlm.errors import ConfigError, DataError
from maxlm.runtime.bounded import IsolationError, isolation_problem
from maxlm.scoring.reward_call import CheckedReward
from maxlm.scoring.rewards import RewardPart, check_record, find_rewards
from maxlm.scoring.rules import code
from maxlm.scoring.rules.code import find_code

isolates = pytest.mark.skipif(isolation_problem() is not None, reason="this machine does not permit namespaces")

ASSERTIONS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0", "assert add('a', 'b') == 'ab'"]
RIGHT = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."


def reward(completions, tests, **settings):
    (found,) = find_rewards([RewardPart(name="unit_tests", settings=settings)])
    return list(found("?", completions, {"tests": tests}, [1] * len(completions)))


@isolates
def test_assertions():
    completions = [
        RIGHT,
        "def add(a, b): return a + b",
        "def add(a, b): return a - b",
        "def add(a, b): return int(a) + int(b)",
        "def add(a, b:",
        "",
        # What ends the process, or claims to have passed, has passed nothing.
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "def add(a, b): raise SystemExit(0)",
        "print('\\n' + '0' * 32 + ' 3')",
        "import sys\ndef add(a, b): sys.stdout.write('\\n3\\n'); sys.exit(0)",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\ndef add(a, b): return a + b",
    ]
    expected = [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert reward(completions, ASSERTIONS) == expected
    assert reward(completions[:4], ASSERTIONS, share=True) == pytest.approx([1, 1, 0, 2 / 3])
    assert reward([RIGHT], "\n".join(ASSERTIONS)) == [1]


@isolates
def test_programs_with_input_and_output():
    tests = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 6\n", "output": "11"}]
    completions = [
        "```python\nprint(sum(map(int, input().split())))\n```",
        "print(3)",
        "print(sum(map(int, input().split())), '  ')",
        "print(sum(map(int, input().split())))\nraise SystemExit(1)",
    ]
    assert reward(completions, tests) == [1, 0, 1, 0]
    assert reward(completions, tests, share=True) == [1, 0.5, 1, 0]


@isolates
def test_hostile_code_is_worth_nothing_and_disturbs_no_other():
    hostile = [
        "while True: pass",
        "x = bytearray(10**10)",
        "while True: print('x' * 10**4)",
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(-1, signal.SIGKILL)",
        "import os\nwhile True: os.fork()",
    ]
    mixed = [text for each in hostile for text in (each, RIGHT)]
    (found,) = find_rewards([RewardPart(name="unit_tests", settings={"seconds": 2.0, "workers": 2})])
    metrics = {}
    assert found("?", mixed, {"tests": ASSERTIONS}, [1] * len(mixed), metrics) == [0, 1] * len(hostile)
    # Code that exits by itself, after an error or by failing to fork, was not stopped.
    assert metrics["stopped"][1::2] == [0] * len(hostile)
    assert [metrics["stopped"][place] for place in (0, 4)] == [1, 1], "endless loop, output flood"


def test_code_of_a_completion():
    assert find_code("a\n```python\nx\n```\nb\n```\ny\n```") == "y\n"
    assert find_code("```py\nx = 1") == "x = 1"
    assert find_code("x = 1") == "x = 1"


@pytest.mark.parametrize(
    ("tests", "sentence"),
    [
        ([], "must be a text of Python, or a list of such texts or of {input, output}"),
        (3, "must be a text of Python"),
        ([3], "must all be texts of Python; number 1 is not"),
        (["assert f()", " "], "must all be texts of Python; number 2 is not"),
        (["assert f("], "number 1 is not Python: "),
        ([{"input": "1"}], "must each have input and output as texts; number 1 has not"),
        ([{"input": "1", "output": 2}], "must each have input and output as texts"),
        ([{"input": "1", "output": "2"}, "assert f()"], "must each have input and output as texts; number 2 has not"),
    ],
)
def test_tests_that_no_code_can_pass_are_rejected_with_their_line(tests, sentence):
    with pytest.raises(DataError, match=rf"^p\.jsonl:7: for the reward unit_tests tests {sentence}"):
        check_record("unit_tests", {"tests": tests}, "p.jsonl:7")
    with pytest.raises(DataError, match=r"^p\.jsonl:7: lacks 'tests'"):
        check_record("unit_tests", {"answer": "4"}, "p.jsonl:7")


def test_machine_that_cannot_isolate_refuses_unless_accepted(monkeypatch):
    ran = []

    def run(programs, limits, *, workers, isolated=True):
        if isolated:
            raise IsolationError(["code cannot be isolated on this machine: unshare: Operation not permitted"])
        ran.append(len(programs))
        return [code.Outcome("exit", 0, "3\n", "", 0.0)] * len(programs)

    monkeypatch.setattr(code, "run_programs", run)
    prompt = Prompt([1], {"tests": [{"input": "", "output": "3"}]}, "p.jsonl:1")
    sentence = (
        "unit_tests: code cannot be isolated on this machine: unshare: .*accept_no_isolation: true in the settings"
    )
    with pytest.raises(ConfigError, match=sentence):
        CheckedReward(find_rewards("unit_tests"), time_limit=60).try_out([prompt])
    part = RewardPart(name="unit_tests", settings={"accept_no_isolation": True})
    assert CheckedReward(find_rewards([part]), time_limit=60)([prompt], ["x"], [1]).total.tolist() == [1]
    assert ran == [1]
