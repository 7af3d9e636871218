"""Text that cannot be parsed or executed is refused with its line; nothing is skipped."""

import pytest
import torch
from ptx.handwritten import HEADER, program


def load_and_launch(ptx, text):
    ptx.Module(text).launch("test", (1,), (32,), [torch.zeros(1)])


@pytest.mark.parametrize(
    "line",
    ["bra nowhere;", "mov.u32 %r1, %nothing;", "add.s32 %r1 %r2;", "{ mov.u32 %r1, 5;"],
)
def test_syntax_errors(ptx, line):
    with pytest.raises(ptx.PTXError) as caught:
        load_and_launch(ptx, program(line))
    assert caught.value.kind == "syntax" and caught.value.line > 0


@pytest.mark.parametrize(
    "line",
    ["call.uni foo, (%r1);", "tex.2d.v4.f32.f32 {%f1, %f2, %f3, %f4}, [%d1];", "cp.async.bulk.commit_group;",
     "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d1, %d2}, {%d3}, {%d4}, {%d1, %d2};", 
     "ld.shared::cluster.u32 %r1, [%r2];", "atom.global.sub.u32 %r1, [%d1], 5;", "brx.idx %r1, table;"],
)  # fmt: skip
def test_unknown_instructions(ptx, line):
    with pytest.raises(ptx.PTXError, match="unknown instruction '" + line.split()[0].rstrip(";")) as caught:
        load_and_launch(ptx, program(line))
    assert caught.value.kind == "unsupported"
    assert program(line).splitlines()[caught.value.line - 1].startswith(line)


def test_module_without_entries(ptx):
    assert ptx.Module(HEADER.format(target="sm_80")).entries == []
