"""The cost of compiled TPU programs: the reader of their text, and the ledger of this project's programs."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from compiled_cost import CHIPS, read_cost

ROOT = Path(__file__).parents[2]

PROGRAM = """HloModule jit_step, is_scheduled=true

%scatter (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %reduce-scatter.1 = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1}}, dimensions={0}
}

%all-reduce-scatter.1 (p.3: f32[8]) -> f32[4] {
  %p.3 = f32[8]{0} parameter(0)
  %all-reduce.2 = f32[8]{0} all-reduce(%p.3), replica_groups={{0,1}}
  ROOT %slice = f32[4]{0} slice(%all-reduce.2), slice={[0:4]}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state), index=1
  %fusion.1 = f32[8]{0:T(8)} fusion(%x), kind=kLoop, calls=%c, metadata={op_name="jit(step)/sin"},
    backend_config={"estimated_cycles":"100"}
  %fusion.2 = f32[4]{0} fusion(%x), kind=kCustom, calls=%scatter, backend_config={"estimated_cycles":"7"}
  %fusion.3 = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel = f32[8]{0} custom-call(%fusion.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/flash"}
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%kernel), replica_groups={{0,1}}
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state.1), index=0
  %n = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%cheap (p.1: f32[8]) -> f32[8] {
  ROOT %p.1 = f32[8]{0} parameter(0)
}

%dear (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %copy = f32[8]{0} copy(%p.2), backend_config={"estimated_cycles":"1000"}
}

ENTRY %main (a: f32[8], i: s32[]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %loop = (s32[], f32[8]{0}) while(%a), condition=%condition, body=%body
  %choice = f32[8]{0} conditional(%i, %a, %a), branch_computations={%cheap, %dear}
  %all-gather-start = (bf16[4]{0}, bf16[8]{0}) all-gather-start(%half), dimensions={0}
  %half = bf16[4]{0} parameter(2)
  ROOT %all-gather-done = bf16[8]{0} all-gather-done(%all-gather-start)
}
"""


def test_costs_are_multiplied_by_trip_counts():
    cost = read_cost(PROGRAM)
    assert cost.cycles == {"jit(step)/sin": 300, "fusion.2": 21, "copy": 1000}
    assert cost.kernels == {"flash": 3}
    # Twice the operand of an all-reduce, once that of a reduce-scatter; the result of a gather. What a fusion contains
    # runs beside it, but for an all-reduce and a slice.
    assert cost.bytes_moved == Counter({"all-reduce": 3 * 2 * 32, "reduce-scatter": 3 * 32, "async all-gather": 16})
    expected = {"all-reduce": 3, "reduce-scatter": 3, "async reduce-scatter": 3, "async all-gather": 1}
    assert cost.counts == Counter(expected)
    assert cost.seconds(CHIPS["v5e"]) == pytest.approx(1321 / 1.5e9)
    assert cost.waiting_seconds(CHIPS["v5e"]) == pytest.approx((192 + 96) / 180e9)


@pytest.mark.exhaustive
def test_programs_cost_no_more_than_in_the_ledger():
    """If this fails for a good reason: `python tools/ledger.py update`, and the reason in the commit."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU compiler, is not installed")
    written = json.loads((ROOT / "tests" / "ledger.json").read_text(encoding="utf-8"))["versions"]
    installed = {name: importlib.metadata.version(name) for name in written}
    if installed != written:
        pytest.skip(f"the ledger is of {written}, installed are {installed}")
    command = [sys.executable, str(ROOT / "tools" / "ledger.py"), "compare"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
